# SPDX-License-Identifier: GPL-2.0-or-later
"""What a process gives up once it has all that it needs: capabilities, namespaces, files, system calls.

Each module is one means of Linux's; what a process keeps is for its caller to say (`godwit.daemon.sandbox`,
`godwit.repair.helper`). All of it is for a process with one thread, and the threads that it starts later inherit it.
"""
