# SPDX-License-Identifier: GPL-2.0-or-later
"""The network as the guest sees it: its configuration, the rare frames and the port forwards."""
