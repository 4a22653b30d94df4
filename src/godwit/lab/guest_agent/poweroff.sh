#!/bin/busybox sh
# SPDX-License-Identifier: GPL-2.0-or-later
# What acpid runs when the power button is pressed. There is nothing to be saved.

exec poweroff -f
