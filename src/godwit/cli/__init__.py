# SPDX-License-Identifier: GPL-2.0-or-later
"""The commands: one module each, argument parsing and nothing else.

A command's module has ``main(argv=None) -> int``; what it returns is the
process's exit status.
"""
