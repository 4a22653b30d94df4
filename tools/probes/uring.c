// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * The plane with io_uring(7) in epoll's place, by its system calls alone.
 *
 * All that a turn wants done is submitted, and the next event waited for, by one
 * call. Results are looked at where the data plane needs them: how much was sent,
 * how much was received. The others (the call, the discard) report failures only.
 */
#define _GNU_SOURCE
#include "probe.h"

#include <errno.h>
#include <linux/io_uring.h>
#include <poll.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#define ENTRIES 64
#define BATCH 16 /* receives that are submitted at once */
#define SQ_IDLE_MS 1 /* before the kernel's submission thread sleeps */

enum { KICK, SOCK, SEND, GIVE, QUIET }; /* user_data */
enum { FILE_KICK, FILE_CALL, FILE_SOCK };

struct ring {
	int fd;
	unsigned flags, queued;
	_Atomic unsigned *sq_tail, *sq_flags, *cq_head, *cq_tail;
	unsigned sq_mask, cq_mask;
	struct io_uring_sqe *sqes;
	struct io_uring_cqe *cqes;
};

struct engine_state {
	struct plane *plane;
	struct ring ring;
	bool sending, watching_kick, watching_sock;
	unsigned giving, given_first; /* receives that are out, and the slot of the first */
	bool ended; /* one of them got less than asked for */
	struct iovec send_iov[MAX_FRAMES], give_iov[BATCH];
	size_t send_want;
	struct msghdr send_msg, give_msg[BATCH];
	uint64_t one;
};

static void ring_open(struct ring *r, bool sqpoll, const int *files, unsigned count)
{
	struct io_uring_params params = { .flags = IORING_SETUP_CQSIZE, .cq_entries = 1024 };
	char *sq, *cq;
	unsigned *array;

	if (sqpoll) {
		params.flags |= IORING_SETUP_SQPOLL;
		params.sq_thread_idle = SQ_IDLE_MS;
	} else {
		/* The cheapest there is for one thread (Linux 6.1): nothing is done but when it asks. */
		params.flags |= IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN;
	}
	r->flags = params.flags;
	r->fd = syscall(SYS_io_uring_setup, ENTRIES, &params);
	if (r->fd < 0)
		die("io_uring_setup");
	if (syscall(SYS_io_uring_register, r->fd, IORING_REGISTER_FILES, files, count))
		die("IORING_REGISTER_FILES");
	sq = mmap(NULL, params.sq_off.array + params.sq_entries * sizeof(unsigned), PROT_READ | PROT_WRITE,
		  MAP_SHARED | MAP_POPULATE, r->fd, IORING_OFF_SQ_RING);
	cq = mmap(NULL, params.cq_off.cqes + params.cq_entries * sizeof(struct io_uring_cqe), PROT_READ | PROT_WRITE,
		  MAP_SHARED | MAP_POPULATE, r->fd, IORING_OFF_CQ_RING);
	r->sqes = mmap(NULL, params.sq_entries * sizeof(struct io_uring_sqe), PROT_READ | PROT_WRITE,
		       MAP_SHARED | MAP_POPULATE, r->fd, IORING_OFF_SQES);
	if (sq == MAP_FAILED || cq == MAP_FAILED || r->sqes == MAP_FAILED)
		die("mmap of the ring");
	r->sq_tail = (_Atomic unsigned *)(sq + params.sq_off.tail);
	r->sq_flags = (_Atomic unsigned *)(sq + params.sq_off.flags);
	r->sq_mask = *(unsigned *)(sq + params.sq_off.ring_mask);
	r->cq_head = (_Atomic unsigned *)(cq + params.cq_off.head);
	r->cq_tail = (_Atomic unsigned *)(cq + params.cq_off.tail);
	r->cq_mask = *(unsigned *)(cq + params.cq_off.ring_mask);
	r->cqes = (struct io_uring_cqe *)(cq + params.cq_off.cqes);
	array = (unsigned *)(sq + params.sq_off.array);
	for (unsigned i = 0; i < params.sq_entries; i++)
		array[i] = i;
}

/* At most BATCH and a few are queued between two calls, and the kernel takes all of them. */
static struct io_uring_sqe *queue(struct ring *r, uint8_t opcode, int file, uint64_t data)
{
	unsigned tail = atomic_load_explicit(r->sq_tail, memory_order_relaxed) + r->queued++;
	struct io_uring_sqe *sqe = &r->sqes[tail & r->sq_mask];

	memset(sqe, 0, sizeof(*sqe));
	sqe->opcode = opcode;
	sqe->flags = IOSQE_FIXED_FILE;
	sqe->fd = file;
	sqe->user_data = data;
	if (data == QUIET)
		sqe->flags |= IOSQE_CQE_SKIP_SUCCESS;
	return sqe;
}

static unsigned ready(const struct ring *r)
{
	return atomic_load_explicit(r->cq_tail, memory_order_acquire) -
	       atomic_load_explicit(r->cq_head, memory_order_relaxed);
}

static void submit_and_wait(struct plane *p, struct ring *r, unsigned wanted)
{
	unsigned submitted = r->queued, flags = IORING_ENTER_GETEVENTS;

	atomic_fetch_add_explicit(r->sq_tail, submitted, memory_order_release);
	r->queued = 0;
	if (r->flags & IORING_SETUP_SQPOLL) {
		atomic_thread_fence(memory_order_seq_cst);
		if (submitted && *r->sq_flags & IORING_SQ_NEED_WAKEUP)
			flags |= IORING_ENTER_SQ_WAKEUP;
		else if (ready(r) >= wanted)
			return;
	}
	p->calls++;
	if (syscall(SYS_io_uring_enter, r->fd, submitted, wanted, flags, NULL, 0) < 0 && errno != EINTR)
		die("io_uring_enter");
}

static void queue_poll(struct ring *r, int file, uint32_t events, uint64_t data)
{
	struct io_uring_sqe *sqe = queue(r, IORING_OP_POLL_ADD, file, data);

	sqe->len = IORING_POLL_ADD_MULTI;
	sqe->poll32_events = events;
}

static void queue_discard(struct engine_state *e)
{
	struct plane *p = e->plane;
	uint64_t acked = atomic_load(&p->shared->acked);
	struct io_uring_sqe *sqe;

	if (acked == p->taken)
		return;
	sqe = queue(&e->ring, IORING_OP_RECV, FILE_SOCK, QUIET);
	sqe->len = acked - p->taken;
	sqe->msg_flags = MSG_TRUNC | MSG_DONTWAIT;
	p->bytes += acked - p->taken;
	p->taken = acked;
}

static void queue_send(struct engine_state *e)
{
	struct plane *p = e->plane;
	struct io_uring_sqe *sqe;
	size_t want;

	if (e->sending || !p->writable || p->sent == atomic_load(&p->shared->avail))
		return;
	e->send_msg.msg_iov = e->send_iov;
	e->send_msg.msg_iovlen = batch_left(p, e->send_iov, &want);
	sqe = queue(&e->ring, IORING_OP_SENDMSG, FILE_SOCK, SEND);
	sqe->addr = (uintptr_t)&e->send_msg;
	sqe->len = 1;
	/* Without MSG_DONTWAIT it would wait for room by itself, and cost half as much again: it wakes for each bit. */
	sqe->msg_flags = MSG_NOSIGNAL | MSG_DONTWAIT;
	e->sending = true;
	e->send_want = want;
}

static void queue_receives(struct engine_state *e)
{
	struct plane *p = e->plane;
	bool posted = p->options->engine == POSTED;
	unsigned room = (WINDOW - (p->given - p->taken)) / FRAME;

	if (e->giving || (!posted && !p->readable))
		return;
	/*
	 * A posted one is for what is not there yet, and only when nothing waits for the guest's acknowledgement:
	 * the socket counts as readable then, though there is nothing to peek, and all comes to a standstill.
	 */
	if (posted && p->given != p->taken)
		return;
	if (room > BATCH)
		room = BATCH;
	if (p->options->work == TRANSACTIONS)
		room = 1;
	e->given_first = p->slot;
	e->ended = false;
	for (; e->giving < room; e->giving++) {
		struct msghdr *msg = &e->give_msg[e->giving];
		struct io_uring_sqe *sqe = queue(&e->ring, IORING_OP_RECVMSG, FILE_SOCK, GIVE);

		buffers(p, p->slot + e->giving, 1, &e->give_iov[e->giving]);
		memset(msg, 0, sizeof(*msg));
		msg->msg_iov = &e->give_iov[e->giving];
		msg->msg_iovlen = 1;
		sqe->addr = (uintptr_t)msg;
		sqe->len = 1;
		sqe->msg_flags = MSG_PEEK | (posted ? 0 : MSG_DONTWAIT);
	}
}

static void queue_call(struct engine_state *e)
{
	struct io_uring_sqe *sqe;

	if (!e->plane->call_due)
		return;
	e->plane->call_due = false;
	e->one = 1;
	sqe = queue(&e->ring, IORING_OP_WRITE, FILE_CALL, QUIET);
	sqe->addr = (uintptr_t)&e->one;
	sqe->len = 8;
}

static void done(struct engine_state *e, const struct io_uring_cqe *cqe)
{
	struct plane *p = e->plane;
	int n = cqe->res;

	if (cqe->user_data == KICK) {
		e->watching_kick = cqe->flags & IORING_CQE_F_MORE;
	} else if (cqe->user_data == SOCK) {
		e->watching_sock = cqe->flags & IORING_CQE_F_MORE;
		p->readable |= (n & POLLIN) != 0;
		p->writable |= (n & POLLOUT) != 0;
	} else if (cqe->user_data == SEND) {
		e->sending = false;
		if (n < 0 || (size_t)n < e->send_want)
			p->writable = false;
		if (n == -EAGAIN)
			return;
		if (n < 0) {
			errno = -n;
			die("io_uring: sendmsg");
		}
		was_sent(p, n);
	} else if (cqe->user_data == GIVE) {
		e->giving--;
		if (n == -EAGAIN) {
			p->readable = false;
			return;
		}
		if (n <= 0) {
			errno = -n;
			die("io_uring: recvmsg");
		}
		if (e->ended)
			p->readable = true; /* more has come meanwhile */
		if ((unsigned)n < FRAME) {
			p->readable = false;
			e->ended = true;
		}
		was_given(p, n);
	} else {
		errno = -n;
		die("io_uring: call or discard");
	}
}

void run_uring(struct plane *p)
{
	struct engine_state e = { .plane = p };
	const int files[] = { [FILE_KICK] = p->kick, [FILE_CALL] = p->call, [FILE_SOCK] = p->sock };

	ring_open(&e.ring, p->options->sqpoll, files, 3);
	p->writable = p->options->engine == POSTED; /* it has transactions only, and is told of no room */
	while (!over(p)) {
		unsigned head, count, wanted = 1;

		if (!e.watching_kick) {
			queue_poll(&e.ring, FILE_KICK, POLLIN, KICK);
			e.watching_kick = true;
		}
		if (!e.watching_sock && p->options->engine != POSTED) {
			queue_poll(&e.ring, FILE_SOCK, POLLIN | POLLOUT, SOCK);
			e.watching_sock = true;
		}
		queue_discard(&e);
		queue_send(&e);
		queue_receives(&e);
		queue_call(&e);
		if (p->options->engine != POSTED && e.giving)
			wanted = e.giving; /* they never wait */
		else if (e.sending)
			wanted = p->options->work == TRANSACTIONS ? 2 : 1; /* that it was sent, and what comes of it */
		submit_and_wait(p, &e.ring, wanted);
		head = atomic_load_explicit(e.ring.cq_head, memory_order_relaxed);
		for (count = ready(&e.ring); count; count--, head++)
			done(&e, &e.ring.cqes[head & e.ring.cq_mask]);
		atomic_store_explicit(e.ring.cq_head, head, memory_order_release);
	}
	close(e.ring.fd);
}
