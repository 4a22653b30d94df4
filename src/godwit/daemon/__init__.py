# SPDX-License-Identifier: GPL-2.0-or-later
"""The daemon: one guest's network, from its start to its end."""
