# SPDX-License-Identifier: GPL-2.0-or-later
"""The system calls and constants that the data plane uses, by header."""

from libc.stdint cimport int16_t, uint8_t, uint16_t, uint32_t, uint64_t

cdef extern from "<sys/uio.h>" nogil:
    cdef struct iovec:
        void *iov_base
        size_t iov_len

cdef extern from "<errno.h>" nogil:
    int errno
    enum:
        EAGAIN
        EINTR
        EINPROGRESS
        EINVAL
        ENOBUFS
        ENOMEM
        EMFILE
        ENFILE
        EPIPE
        ECONNREFUSED
        ECONNRESET
        EACCES
        EPERM
        EIO
        EMSGSIZE
        ENETUNREACH
        EHOSTUNREACH
        EADDRNOTAVAIL
        ETIMEDOUT

cdef extern from "<unistd.h>" nogil:
    int close(int fd)
    int dup(int fd)
    ssize_t read(int fd, void *buf, size_t n)
    ssize_t write(int fd, const void *buf, size_t n)
    int ftruncate(int fd, long size)

cdef extern from "<fcntl.h>" nogil:
    int fcntl(int fd, int cmd, ...)
    enum:
        F_DUPFD_CLOEXEC

cdef extern from "<sys/stat.h>" nogil:
    ctypedef long off_t
    cdef struct stat_t "stat":
        off_t st_size
    int fstat(int fd, stat_t *st)

cdef extern from "<sys/mman.h>" nogil:
    void *mmap(void *addr, size_t n, int prot, int flags, int fd, off_t offset)
    int munmap(void *addr, size_t n)
    void *MAP_FAILED
    enum:
        PROT_NONE
        PROT_READ
        PROT_WRITE
        MAP_SHARED
        MAP_PRIVATE
        MAP_ANONYMOUS
        MAP_NORESERVE
        MAP_FIXED

cdef extern from "<signal.h>" nogil:
    ctypedef struct siginfo_t:
        int si_code
        void *si_addr
    cdef struct sigaction_t "sigaction":
        void (*sa_sigaction)(int number, siginfo_t *info, void *context) noexcept nogil
        int sa_flags
    int sigaction(int number, const sigaction_t *action, sigaction_t *old)
    enum:
        BUS_ADRERR
        SA_NODEFER
        SA_SIGINFO
        SIGBUS

cdef extern from "<sys/prctl.h>" nogil:
    int prctl(int option, ...)
    enum:
        PR_SET_NAME

cdef extern from "<sys/eventfd.h>" nogil:
    int eventfd(unsigned int initval, int flags)
    enum:
        EFD_NONBLOCK
        EFD_CLOEXEC

cdef extern from "<sys/random.h>" nogil:
    ssize_t getrandom(void *buf, size_t n, unsigned int flags)

cdef extern from "<sys/ioctl.h>" nogil:
    int ioctl(int fd, unsigned long request, ...)

cdef extern from "<linux/sockios.h>" nogil:
    enum:
        SIOCOUTQ
        SIOCINQ

cdef extern from "<sys/epoll.h>" nogil:
    ctypedef union epoll_data_t:
        uint64_t u64
    cdef struct epoll_event:
        uint32_t events
        epoll_data_t data
    int epoll_create1(int flags)
    int epoll_ctl(int epfd, int op, int fd, epoll_event *ev)
    int epoll_wait(int epfd, epoll_event *ev, int n, int timeout)
    enum:
        EPOLLIN
        EPOLLOUT
        EPOLLPRI
        EPOLLRDHUP
        EPOLLERR
        EPOLLHUP
        EPOLLET "((uint32_t)EPOLLET)"
        EPOLL_CLOEXEC
        EPOLL_CTL_ADD
        EPOLL_CTL_DEL
        EPOLL_CTL_MOD

cdef extern from "<poll.h>" nogil:
    cdef struct pollfd:
        int fd
        short events
        short revents
    int poll(pollfd *fds, unsigned long n, int timeout)
    enum:
        POLLIN
        POLLOUT

cdef extern from "<semaphore.h>" nogil:
    ctypedef struct sem_t:
        pass
    int sem_init(sem_t *s, int pshared, unsigned int value)
    int sem_destroy(sem_t *s)
    int sem_post(sem_t *s)
    int sem_wait(sem_t *s)

cdef extern from "<time.h>" nogil:
    cdef struct timespec:
        long tv_sec
        long tv_nsec
    int clock_gettime(int clock, timespec *ts)
    enum:
        CLOCK_MONOTONIC
        CLOCK_REALTIME
        CLOCK_THREAD_CPUTIME_ID

cdef extern from "<sys/socket.h>" nogil:
    ctypedef unsigned int socklen_t
    cdef struct sockaddr:
        unsigned short sa_family
    cdef struct linger:
        int l_onoff
        int l_linger
    cdef struct sockaddr_storage:
        unsigned short ss_family
    cdef struct msghdr:
        void *msg_name
        socklen_t msg_namelen
        iovec *msg_iov
        size_t msg_iovlen
        void *msg_control
        size_t msg_controllen
        int msg_flags
    cdef struct mmsghdr:
        msghdr msg_hdr
        unsigned int msg_len
    cdef struct cmsghdr:
        size_t cmsg_len
        int cmsg_level
        int cmsg_type
    cmsghdr *CMSG_FIRSTHDR(msghdr *msg)
    cmsghdr *CMSG_NXTHDR(msghdr *msg, cmsghdr *c)
    uint8_t *CMSG_DATA(cmsghdr *c)
    size_t CMSG_LEN(size_t n)
    size_t CMSG_SPACE(size_t n)
    int socket(int domain, int type, int protocol)
    int bind(int fd, const sockaddr *addr, socklen_t n)
    int listen(int fd, int backlog)
    int connect(int fd, const sockaddr *addr, socklen_t n)
    int accept4(int fd, sockaddr *addr, socklen_t *n, int flags)
    int shutdown(int fd, int how)
    int getsockname(int fd, sockaddr *addr, socklen_t *n)
    int getpeername(int fd, sockaddr *addr, socklen_t *n)
    int getsockopt(int fd, int level, int opt, void *val, socklen_t *n)
    int setsockopt(int fd, int level, int opt, const void *val, socklen_t n)
    ssize_t recv(int fd, void *buf, size_t n, int flags)
    ssize_t send(int fd, const void *buf, size_t n, int flags)
    ssize_t sendmsg(int fd, const msghdr *msg, int flags)
    ssize_t recvmsg(int fd, msghdr *msg, int flags)
    int sendmmsg(int fd, mmsghdr *msgs, unsigned int n, int flags)
    int recvmmsg(int fd, mmsghdr *msgs, unsigned int n, int flags, timespec *timeout)
    enum:
        AF_INET
        AF_INET6
        SOCK_STREAM
        SOCK_DGRAM
        SOCK_NONBLOCK
        SOCK_CLOEXEC
        SOL_SOCKET
        SO_BINDTODEVICE
        SO_BROADCAST
        SO_ERROR
        SO_REUSEADDR
        SO_REUSEPORT
        SO_KEEPALIVE
        SO_OOBINLINE
        SO_PEEK_OFF
        SO_RCVBUF
        SO_SNDBUF
        SO_TYPE
        SO_LINGER
        SHUT_WR
        MSG_DONTWAIT
        MSG_ERRQUEUE
        MSG_NOSIGNAL
        MSG_PEEK
        MSG_TRUNC

cdef extern from "<linux/tcp.h>" nogil:
    enum:
        TCP_NODELAY

cdef extern from "<netinet/in.h>" nogil:
    cdef struct in_addr:
        uint32_t s_addr
    cdef struct sockaddr_in:
        unsigned short sin_family
        uint16_t sin_port
        in_addr sin_addr
    cdef struct in6_addr:
        uint8_t s6_addr[16]
    cdef struct sockaddr_in6:
        unsigned short sin6_family
        uint16_t sin6_port
        uint32_t sin6_flowinfo
        in6_addr sin6_addr
        uint32_t sin6_scope_id
    enum:
        IPPROTO_IP
        IPPROTO_TCP
        IPPROTO_UDP
        IPPROTO_ICMP
        IPPROTO_ICMPV6
        IPPROTO_IPV6
        IP_BIND_ADDRESS_NO_PORT
        IP_MTU_DISCOVER
        IP_MULTICAST_TTL
        IP_PKTINFO
        IP_PMTUDISC_DO
        IP_PMTUDISC_DONT
        IP_RECVERR
        IP_RECVTOS
        IP_TOS
        IP_TTL
        IPV6_MTU_DISCOVER
        IPV6_MULTICAST_HOPS
        IPV6_PKTINFO
        IPV6_PMTUDISC_DO
        IPV6_PMTUDISC_WANT
        IPV6_RECVERR
        IPV6_RECVPKTINFO
        IPV6_RECVTCLASS
        IPV6_TCLASS
        IPV6_UNICAST_HOPS
        IPV6_V6ONLY
        IP_FREEBIND
    cdef struct in_pktinfo:
        int ipi_ifindex
        in_addr ipi_spec_dst
        in_addr ipi_addr
    cdef struct in6_pktinfo:
        in6_addr ipi6_addr
        unsigned int ipi6_ifindex

cdef extern from "<linux/udp.h>" nogil:
    enum:
        UDP_GRO
        UDP_SEGMENT

# ip(7), "IP_RECVERR". The header uses struct timespec without saying where it is from.
cdef extern from *:
    """
    #include <time.h>
    #include <linux/errqueue.h>
    """
    cdef struct sock_extended_err:
        uint32_t ee_errno
        uint8_t ee_origin
        uint8_t ee_type
        uint8_t ee_code
        uint32_t ee_info
    sockaddr *SO_EE_OFFENDER(sock_extended_err *e) nogil
    enum:
        SO_EE_ORIGIN_LOCAL
        SO_EE_ORIGIN_ICMP
        SO_EE_ORIGIN_ICMP6

cdef extern from *:
    """
    #include <stdint.h>
    #include <string.h>
    #include <sys/socket.h>
    #ifndef TCP_RTO_MAX_MS
    #define TCP_RTO_MAX_MS 44
    #endif
    #ifndef IPV6_FREEBIND
    #define IPV6_FREEBIND 78
    #endif
    #ifndef SO_BUF_LOCK
    #define SO_BUF_LOCK 72
    #endif
    #ifndef SO_MEMINFO
    #define SO_MEMINFO 55
    #endif
    #if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
    #error "godwit's virtqueues are written for little-endian hosts"
    #endif
    static inline uint16_t gw_be16(const void *p)
    { uint16_t v; memcpy(&v, p, 2); return __builtin_bswap16(v); }
    static inline uint32_t gw_be32(const void *p)
    { uint32_t v; memcpy(&v, p, 4); return __builtin_bswap32(v); }
    static inline void gw_put16(void *p, uint16_t v)
    { v = __builtin_bswap16(v); memcpy(p, &v, 2); }
    static inline void gw_put32(void *p, uint32_t v)
    { v = __builtin_bswap32(v); memcpy(p, &v, 4); }
    static inline uint16_t gw_load16_acquire(const void *p)
    { return __atomic_load_n((const uint16_t *)p, __ATOMIC_ACQUIRE); }
    static inline uint16_t gw_load16(const void *p)
    { return __atomic_load_n((const uint16_t *)p, __ATOMIC_RELAXED); }
    static inline uint64_t gw_load64(const void *p)
    { return __atomic_load_n((const uint64_t *)p, __ATOMIC_RELAXED); }
    static inline uint64_t gw_load64_acquire(const void *p)
    { return __atomic_load_n((const uint64_t *)p, __ATOMIC_ACQUIRE); }
    static inline void gw_store64_release(void *p, uint64_t v)
    { __atomic_store_n((uint64_t *)p, v, __ATOMIC_RELEASE); }
    static inline void gw_store16_release(void *p, uint16_t v)
    { __atomic_store_n((uint16_t *)p, v, __ATOMIC_RELEASE); }
    static inline void gw_store16(void *p, uint16_t v)
    { __atomic_store_n((uint16_t *)p, v, __ATOMIC_RELAXED); }
    static inline void gw_fence(void)
    { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
    static inline void gw_or8(void *p, uint8_t v)
    { __atomic_fetch_or((uint8_t *)p, v, __ATOMIC_RELAXED); }
    static inline uint32_t gw_load32_acquire(const void *p)
    { return __atomic_load_n((const uint32_t *)p, __ATOMIC_ACQUIRE); }
    static inline void gw_store32_release(void *p, uint32_t v)
    { __atomic_store_n((uint32_t *)p, v, __ATOMIC_RELEASE); }
    """
    enum:
        IPV6_FREEBIND
        SO_BUF_LOCK
        SO_MEMINFO
        TCP_RTO_MAX_MS
    uint16_t be16 "gw_be16"(const void *p) nogil
    uint32_t be32 "gw_be32"(const void *p) nogil
    void put16 "gw_put16"(void *p, uint16_t v) nogil
    void put32 "gw_put32"(void *p, uint32_t v) nogil
    uint16_t load16_acquire "gw_load16_acquire"(const void *p) nogil
    uint16_t load16 "gw_load16"(const void *p) nogil
    uint64_t load64 "gw_load64"(const void *p) nogil
    void store16_release "gw_store16_release"(void *p, uint16_t v) nogil
    void store16 "gw_store16"(void *p, uint16_t v) nogil
    void fence "gw_fence"() nogil
    void or8 "gw_or8"(void *p, uint8_t v) nogil
    uint32_t load32_acquire "gw_load32_acquire"(const void *p) nogil
    void store32_release "gw_store32_release"(void *p, uint32_t v) nogil
    uint64_t load64_acquire "gw_load64_acquire"(const void *p) nogil
    void store64_release "gw_store64_release"(void *p, uint64_t v) nogil


cdef inline bint before(uint32_t a, uint32_t b) noexcept nogil:
    """Whether sequence number a comes before b (RFC 9293, 3.4: modulo 2^32)."""
    return <int>(a - b) < 0


cdef inline int reset_on_close(int fd, bint on) noexcept nogil:
    """Have the end of a TCP socket's last descriptor be a reset (socket(7), SO_LINGER), however that end comes."""
    cdef linger how
    how.l_onoff = on
    how.l_linger = 0
    return setsockopt(fd, SOL_SOCKET, SO_LINGER, &how, sizeof(how))

cdef inline int set_option(int fd, int level, int option, int value) noexcept nogil:
    """setsockopt with a whole number; 0, or -1 and errno."""
    return setsockopt(fd, level, option, &value, sizeof(value))
