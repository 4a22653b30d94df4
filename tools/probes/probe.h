// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * A data plane reduced to its system calls, to try others in their place.
 *
 * Three processes. The *guest* has memory that it shares with the plane, and two
 * eventfds: it kicks, and is called. The *plane* is what is measured: it waits for
 * kicks and for its socket, and moves bytes between the shared memory and the
 * socket. The *far* end has the other socket, in another namespace or not. What a
 * frame costs apart from system calls (headers, rings, flow table) is left out.
 */
#ifndef PROBE_H
#define PROBE_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

#define FRAME 65536u
#define SLOTS 64u /* frames of the largest size that the guest has room for */
#define WINDOW (32u * FRAME) /* bytes to the guest that it has not acknowledged */
#define TX_ROOM (1u << 20) /* the largest batch from the guest */
#define MAX_FRAMES 64u /* of one call */
#define MAX_TIMES (1u << 19)

enum work {
	TRANSACTIONS, /* a byte there, a byte back */
	UP, /* from the guest to the far end */
	DOWN,
	MAP, /* what TCP_ZEROCOPY_RECEIVE would do with it */
};

enum engine {
	EPOLL,
	URING, /* io_uring in epoll's place: multishot poll, all else submitted in batches */
	POSTED, /* and the next receive is posted before there is anything to receive */
};

enum take {
	PEEK, /* MSG_PEEK; MSG_TRUNC when the guest has acknowledged */
	READ, /* once and for all */
	COPY, /* the same, and a copy is kept for retransmissions */
	SPLICE, /* by way of a pipe into the guest's memory as a file */
};

struct options {
	enum work work;
	enum engine engine;
	enum take take;
	bool sqpoll, zerocopy;
	bool tell_sent; /* call the guest for what was sent, too */
	unsigned frames; /* to the guest, by one call */
	unsigned frame; /* bytes of one to the guest, FRAME or less */
	unsigned batch; /* bytes that the guest sends at once */
	unsigned spin; /* us before the plane sleeps */
	bool adapt; /* not where others want the processor */
	unsigned busy_poll; /* SO_BUSY_POLL, us */
	int cpu; /* the plane's processor; -1: as the guest */
	double seconds;
	const char *addr;
	uint16_t port;
};

/* What guest and plane share. Counters only grow. */
struct shared {
	_Atomic uint32_t phase; /* 0: warming up, 1: it counts, 2: over */
	_Atomic uint32_t quiet; /* the plane looks by itself: no kicks */
	_Atomic uint64_t avail, used; /* batches from the guest */
	_Atomic uint64_t given, acked; /* bytes to the guest */
	uint32_t times_count;
	uint32_t times[MAX_TIMES]; /* ns of each transaction */
	_Alignas(4096) uint8_t tx[TX_ROOM];
	_Alignas(4096) uint8_t rx[SLOTS * FRAME];
};

struct snapshot {
	double time, process, thread; /* s; processor time of the process and of the plane's own thread */
	uint64_t bytes, calls;
};

struct plane {
	const struct options *options;
	struct shared *shared;
	int memory, kick, call, sock, pipe[2];
	bool readable, writable, call_due;
	uint64_t sent; /* batches */
	size_t sent_of_batch; /* bytes of the next one */
	uint64_t given, taken;
	unsigned slot; /* the next of the guest's buffers */
	uint8_t *kept; /* COPY */
	uint32_t zerocopy_next, zerocopy_last[TX_ROOM / 1024]; /* of each batch: the number of its last call */
	uint64_t zerocopy_notes, zerocopy_copied;
	unsigned rest; /* sleeps before the plane looks again */
	long switches; /* so far, involuntary ones */
	uint64_t bytes, calls; /* moved, system calls made */
	uint32_t phase;
	struct snapshot from, to;
};

_Noreturn void die(const char *what);
double now(void);

/* The far end: serves connections, one after the other, for ever. */
void far_end(uint16_t port);

/* The guest; returns when it is over. */
void guest(const struct options *options, struct shared *shared, int kick, int call);

/* Whether it is over; takes the time when it begins to count. */
bool over(struct plane *plane);

/* The plane's parts that all engines have in common. */
size_t batch_left(struct plane *plane, struct iovec *iov, size_t *bytes);
size_t buffers(struct plane *plane, unsigned first, unsigned frames, struct iovec *iov);
void was_sent(struct plane *plane, size_t bytes);
void was_given(struct plane *plane, size_t bytes);

void run_epoll(struct plane *plane);
void run_uring(struct plane *plane);

/* Move so many connections, with so many bytes queued on each, and print what each takes. */
void move_connections(unsigned count, unsigned queued);

/* Receive for so long by TCP_ZEROCOPY_RECEIVE, and print what becomes of it. */
void try_map(int sock, struct shared *shared, double seconds);

#endif
