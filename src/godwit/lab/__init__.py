# SPDX-License-Identifier: GPL-2.0-or-later
"""A laboratory: hosts, guests and traffic on one machine.

For the demo, the end-to-end tests and the bench. Hosts are network
namespaces on a bridge (``netns``), guests are namespaces behind a vhost-user
front-end of our own (``guest``) or QEMU machines (``qemu``).
"""
