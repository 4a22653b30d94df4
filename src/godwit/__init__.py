# SPDX-License-Identifier: GPL-2.0-or-later
"""Virtual-machine networking over vhost-user that survives live migration."""

__version__ = "0.1.0"
