# SPDX-License-Identifier: GPL-2.0-or-later
"""System calls that Python does not have, each as it is. See the .pyi."""

import os

from libc.errno cimport errno
from libc.stdint cimport uint32_t, uint64_t

cdef extern from *:
    """
    #include <dlfcn.h>
    #include <errno.h>
    #include <fcntl.h>
    #include <linux/audit.h>
    #include <linux/capability.h>
    #include <linux/filter.h>
    #include <linux/seccomp.h>
    #include <sched.h>
    #include <signal.h>
    #include <stdint.h>
    #include <stdio.h>
    #include <string.h>
    #include <sys/mount.h>
    #include <sys/prctl.h>
    #include <sys/stat.h>
    #include <sys/syscall.h>
    #include <sys/wait.h>
    #include <ucontext.h>
    #include <unistd.h>

    #if defined(__x86_64__)
    #define GW_ARCH AUDIT_ARCH_X86_64
    #elif defined(__aarch64__)
    #define GW_ARCH AUDIT_ARCH_AARCH64
    #elif defined(__riscv) && __riscv_xlen == 64
    #define GW_ARCH AUDIT_ARCH_RISCV64
    #else
    #define GW_ARCH 0                       /* no filter there, where arguments have other places; the log says so */
    #endif

    /* The arguments of a system call, as a signal's handler finds them. */
    #if defined(__x86_64__)
    static const int gw_registers[] = { REG_RDI, REG_RSI, REG_RDX };
    #define GW_ARGUMENT(context, i) (((ucontext_t *)(context))->uc_mcontext.gregs[gw_registers[i]])
    #elif defined(__aarch64__)
    #define GW_ARGUMENT(context, i) (((ucontext_t *)(context))->uc_mcontext.regs[i])
    #endif

    /* Made by setup.py from the headers of this system: CALL(name, number) for each. */
    static const struct { const char *name; long number; } gw_calls[] = {
    #define CALL(name, number) { #name, number },
    #include "_syscalls.h"
    #undef CALL
    };
    enum { GW_CALLS = sizeof(gw_calls) / sizeof(gw_calls[0]) };

    static const char *gw_call_name(long number)
    {
        for (int i = 0; i < GW_CALLS; i++)
            if (gw_calls[i].number == number)
                return gw_calls[i].name;
        return "?";
    }

    /* Where the last words go, and what they begin with. */
    static int gw_log = 2;
    static char gw_before[128];

    static size_t gw_append(char *out, size_t at, size_t most, const char *text)
    {
        while (*text && at < most)
            out[at++] = *text++;
        return at;
    }

    static size_t gw_append_number(char *out, size_t at, size_t most, unsigned long value)
    {
        char digits[24];
        int n = sizeof(digits) - 1;
        digits[n] = 0;
        do
            digits[--n] = (char)('0' + value % 10);
        while (value /= 10);
        return gw_append(out, at, most, digits + n);
    }

    /* A system call that the filter traps. Nothing here may take a lock: any thread may be anywhere. */
    static void gw_on_violation(int signal, siginfo_t *info, void *context)
    {
        char line[256];
        size_t at = 0, most = sizeof(line) - 1;
        sigset_t those;
        struct sigaction usual;
        (void)context;  /* not looked at everywhere */
        at = gw_append(line, at, most, gw_before);
        at = gw_append(line, at, most, "system call ");
        at = gw_append(line, at, most, gw_call_name(info->si_syscall));
        at = gw_append(line, at, most, " (");
        at = gw_append_number(line, at, most, (unsigned long)info->si_syscall);
    #ifdef GW_ARGUMENT
        for (int i = 0; i < 3; i++) {
            at = gw_append(line, at, most, i ? ", " : ": ");
            at = gw_append_number(line, at, most, (unsigned long)GW_ARGUMENT(context, i));
        }
    #endif
        at = gw_append(line, at, most, ") is not among those that this process needs: it ends");
        line[at++] = 10;
        if (write(gw_log, line, at) < 0)
            at = 0;
        memset(&usual, 0, sizeof(usual));
        usual.sa_handler = SIG_DFL;
        sigaction(SIGSYS, &usual, NULL);
        sigemptyset(&those);
        sigaddset(&those, SIGSYS);
        sigprocmask(SIG_UNBLOCK, &those, NULL);
        syscall(SYS_tgkill, (int)getpid(), (int)syscall(SYS_gettid), signal);
        _exit(128 + SIGSYS);    /* the first process of a PID namespace is not ended by a signal of its own */
    }

    static int gw_catch(void)
    {
        struct sigaction action;
        sigset_t those;
        sigemptyset(&those);
        sigaddset(&those, SIGSYS);
        sigprocmask(SIG_UNBLOCK, &those, NULL);     /* whoever started us may have blocked it */
        memset(&action, 0, sizeof(action));
        action.sa_sigaction = gw_on_violation;
        action.sa_flags = SA_SIGINFO | SA_NODEFER;
        return sigaction(SIGSYS, &action, NULL);
    }

    /* GCC's sanitizers find what the frames of a report are called in the files of all libraries, which they read once. */
    #ifdef __SANITIZE_ADDRESS__
    #include <sanitizer/common_interface_defs.h>
    static void gw_read_symbols(void)
    {
        char name[256];
        __sanitizer_symbolize_pc((void *)gw_read_symbols, "%f", name, sizeof(name));
    }
    #else
    static void gw_read_symbols(void) {}
    #endif

    static int gw_filter(const void *instructions, unsigned short count)
    {
        struct sock_fprog program = { count, (struct sock_filter *)instructions };
        return (int)syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_SPEC_ALLOW, &program);
    }

    static void gw_write_or_exit(const char *path, const char *text)
    {
        int fd = open(path, O_WRONLY | O_CLOEXEC);
        if (fd < 0 || write(fd, text, strlen(text)) < 0)
            _exit(errno & 0xff);
        close(fd);
    }

    static int gw_open_tree(const char *path)
    {
        return (int)syscall(SYS_open_tree, AT_FDCWD, path, 1u /* OPEN_TREE_CLONE */ | O_CLOEXEC | AT_RECURSIVE);
    }

    static int gw_move_mount(int fd, const char *path)
    {
        return (int)syscall(SYS_move_mount, fd, "", AT_FDCWD, path, 4u /* MOVE_MOUNT_F_EMPTY_PATH */);
    }

    static int gw_mount_setattr(int fd, const char *path, unsigned flags, uint64_t set)
    {
        struct { uint64_t set, clear, propagation, userns; } attributes = { set, 0, 0, 0 };
        return (int)syscall(SYS_mount_setattr, fd, path, flags, &attributes, sizeof(attributes));
    }

    static int gw_pivot_root(const char *to, const char *old)
    {
        return (int)syscall(SYS_pivot_root, to, old);
    }

    /* Whether a process like this one can go into these namespaces and do there what is to be done: 0, or an error
       number. In a child, since who has got half of the way cannot come back. Without maps no user namespace is made. */
    static int gw_try_namespaces(int flags, const char *uid_map, const char *gid_map, const char *somewhere)
    {
        int status;
        pid_t child = fork();
        if (child < 0)
            return errno;
        if (child == 0) {
            if (unshare(flags) != 0)
                _exit(errno & 0xff);
            if (*uid_map) {
                gw_write_or_exit("/proc/self/setgroups", "deny");
                gw_write_or_exit("/proc/self/uid_map", uid_map);
                gw_write_or_exit("/proc/self/gid_map", gid_map);
            }
            if (mount("none", "/", "", MS_REC | MS_PRIVATE, NULL) != 0)
                _exit(errno & 0xff);
            int tree = gw_open_tree(somewhere);
            if (tree < 0 || gw_mount_setattr(tree, "", AT_EMPTY_PATH | AT_RECURSIVE, 1 /* MOUNT_ATTR_RDONLY */) != 0
                    || mount("none", somewhere, "tmpfs", 0, NULL) != 0 || chdir(somewhere) != 0
                    || mkdir("there", 0755) != 0 || gw_move_mount(tree, "there") != 0 || gw_pivot_root(".", ".") != 0)
                _exit(errno & 0xff);
            _exit(0);
        }
        while (waitpid(child, &status, 0) < 0)
            if (errno != EINTR)
                return errno;
        return WIFEXITED(status) ? WEXITSTATUS(status) : EPERM;
    }

    static int gw_capabilities(int set, uint32_t *permitted, uint32_t *effective)
    {
        struct __user_cap_header_struct head = { _LINUX_CAPABILITY_VERSION_3, 0 };
        struct __user_cap_data_struct words[2];
        memset(words, 0, sizeof(words));
        for (int i = 0; set && i < 2; i++) {
            words[i].permitted = permitted[i];
            words[i].effective = effective[i];
        }
        if (syscall(set ? SYS_capset : SYS_capget, &head, words) != 0)
            return -1;
        for (int i = 0; i < 2; i++) {
            permitted[i] = words[i].permitted;
            effective[i] = words[i].effective;
        }
        return 0;
    }

    #ifndef SYS_landlock_create_ruleset
    #define SYS_landlock_create_ruleset 444
    #define SYS_landlock_add_rule 445
    #define SYS_landlock_restrict_self 446
    #endif
    #ifndef SYS_mount_setattr
    #define SYS_mount_setattr 442
    #endif

    static int gw_landlock_create(const void *attributes, size_t size, uint32_t flags)
    {
        return (int)syscall(SYS_landlock_create_ruleset, attributes, size, flags);
    }

    static int gw_landlock_add(int ruleset, uint64_t access, int fd)
    {
        struct { uint64_t access; int fd; } __attribute__((packed)) beneath = { access, fd };
        return (int)syscall(SYS_landlock_add_rule, ruleset, 1 /* LANDLOCK_RULE_PATH_BENEATH */, &beneath, 0);
    }

    static int gw_landlock_restrict(int ruleset)
    {
        return (int)syscall(SYS_landlock_restrict_self, ruleset, 0);
    }
    """
    enum:
        GW_ARCH
        GW_CALLS
        AT_EMPTY_PATH
        AT_RECURSIVE
        RTLD_NOW
    struct gw_call:
        const char *name
        long number
    const gw_call gw_calls[]
    int gw_log
    char gw_before[128]
    int gw_catch() nogil
    void gw_read_symbols() nogil
    int gw_filter(const void *instructions, unsigned short count) nogil
    int gw_try_namespaces(int flags, const char *uid_map, const char *gid_map, const char *somewhere) nogil
    int gw_capabilities(int set, uint32_t *permitted, uint32_t *effective) nogil
    int gw_landlock_create(const void *attributes, size_t size, uint32_t flags) nogil
    int gw_landlock_add(int ruleset, uint64_t access, int fd) nogil
    int gw_landlock_restrict(int ruleset) nogil
    int gw_open_tree(const char *path) nogil
    int gw_move_mount(int fd, const char *path) nogil
    int gw_mount_setattr(int fd, const char *path, unsigned flags, uint64_t set) nogil
    int gw_pivot_root(const char *to, const char *old) nogil
    int c_unshare "unshare"(int flags) nogil
    int c_mount "mount"(const char *source, const char *target, const char *kind, unsigned long flags,
                        const void *data) nogil
    int c_umount2 "umount2"(const char *target, int flags) nogil
    int c_prctl "prctl"(int option, unsigned long a, unsigned long b, unsigned long c, unsigned long d) nogil
    void *dlopen(const char *name, int mode) nogil

ARCH = <uint32_t>GW_ARCH


cdef int check(int result, str what) except -1:
    if result < 0:
        raise OSError(errno, f"{what}: {os.strerror(errno)}")
    return result


def calls():
    """The numbers of all system calls here, by name."""
    cdef int i
    return {gw_calls[i].name.decode(): gw_calls[i].number for i in range(GW_CALLS)}


def prctl(int option, unsigned long a=0, unsigned long b=0):
    check(c_prctl(option, a, b, 0, 0), "prctl")


def get_capabilities():
    cdef uint32_t permitted[2]
    cdef uint32_t effective[2]
    check(gw_capabilities(0, permitted, effective), "capget")
    return permitted[0] | <uint64_t>permitted[1] << 32, effective[0] | <uint64_t>effective[1] << 32


def set_capabilities(uint64_t both):
    cdef uint32_t permitted[2]
    cdef uint32_t effective[2]
    permitted[0] = effective[0] = <uint32_t>both
    permitted[1] = effective[1] = <uint32_t>(both >> 32)
    check(gw_capabilities(1, permitted, effective), "capset")


def try_namespaces(int flags, bytes uid_map, bytes gid_map, bytes somewhere):
    cdef int error = gw_try_namespaces(flags, uid_map, gid_map, somewhere)
    if error != 0:
        raise OSError(error, os.strerror(error))


def unshare(int flags):
    check(c_unshare(flags), "unshare")


def mount(bytes source, bytes target, bytes kind, unsigned long flags, bytes data=b""):
    check(c_mount(source, target, kind, flags, <const char *>data), "mount")


def umount(bytes target, int flags):
    check(c_umount2(target, flags), "umount2")


def open_tree(bytes path):
    return check(gw_open_tree(path), "open_tree")


def move_mount(int fd, bytes path):
    check(gw_move_mount(fd, path), "move_mount")


def set_mount_attributes(int fd, uint64_t attributes, bint recursive):
    cdef unsigned flags = AT_EMPTY_PATH | (AT_RECURSIVE if recursive else 0)
    check(gw_mount_setattr(fd, b"", flags, attributes), "mount_setattr")


def pivot_root(bytes to, bytes old):
    check(gw_pivot_root(to, old), "pivot_root")


def landlock_abi():
    return check(gw_landlock_create(NULL, 0, 1), "landlock_create_ruleset")


def landlock_create(bytes attributes):
    return check(gw_landlock_create(<const char *>attributes, len(attributes), 0), "landlock_create_ruleset")


def landlock_add(int ruleset, uint64_t access, int fd):
    check(gw_landlock_add(ruleset, access, fd), "landlock_add_rule")


def landlock_restrict(int ruleset):
    check(gw_landlock_restrict(ruleset), "landlock_restrict_self")


def catch_violations(int log, bytes before):
    global gw_log
    cdef int i
    cdef bytes text = before[:sizeof(gw_before) - 1] + b"\0"
    for i in range(len(text)):
        gw_before[i] = text[i]
    gw_log = log
    check(gw_catch(), "sigaction")


def load_for_reports():
    gw_read_symbols()


def filter_calls(bytes instructions):
    check(gw_filter(<const char *>instructions, len(instructions) // 8), "seccomp")


def load_for_thread_ends():
    dlopen(b"libgcc_s.so.1", RTLD_NOW)
