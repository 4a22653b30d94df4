// SPDX-License-Identifier: GPL-2.0-or-later
/* The plane as it is: epoll and plain calls, with variants of receiving, sending and waiting. */
#define _GNU_SOURCE
#include "probe.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/errqueue.h>
#include <netinet/in.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#define REST 256 /* sleeps without looking before, after others wanted the processor */

static void discard(struct plane *p)
{
	uint64_t acked = atomic_load(&p->shared->acked);

	if (p->options->take != PEEK && acked != p->taken) {
		p->bytes += acked - p->taken;
		p->taken = acked;
	}
	while (p->taken != acked) {
		ssize_t n = recv(p->sock, NULL, acked - p->taken, MSG_TRUNC | MSG_DONTWAIT);

		p->calls++;
		if (n <= 0)
			die("recv MSG_TRUNC");
		p->taken += n;
		p->bytes += n;
	}
}

static void keep(struct plane *p, const struct iovec *iov, size_t bytes)
{
	size_t at = p->given % (SLOTS * FRAME);

	for (; bytes; iov++) {
		size_t part = bytes < iov->iov_len ? bytes : iov->iov_len;

		memcpy(p->kept + at, iov->iov_base, part); /* it has a frame more than the ring */
		at = (at + part) % (SLOTS * FRAME);
		bytes -= part;
	}
}

static ssize_t splice_in(struct plane *p, unsigned slot, size_t want)
{
	ssize_t n = splice(p->sock, NULL, p->pipe[1], NULL, want, SPLICE_F_NONBLOCK | SPLICE_F_MOVE), m;
	off_t at = offsetof(struct shared, rx) + (off_t)slot * FRAME;

	p->calls++;
	for (ssize_t left = n; left > 0; left -= m) {
		m = splice(p->pipe[0], NULL, p->memory, &at, left, SPLICE_F_MOVE);
		p->calls++;
		if (m <= 0)
			die("splice to the guest");
	}
	return n;
}

static void to_guest(struct plane *p)
{
	int flags = MSG_DONTWAIT | (p->options->take == PEEK ? MSG_PEEK : 0);
	struct iovec iov[MAX_FRAMES];
	struct msghdr msg = { .msg_iov = iov };

	while (p->readable && p->given - p->taken < WINDOW) {
		size_t want = buffers(p, p->slot, p->options->frames, iov);
		ssize_t n;

		msg.msg_iovlen = p->options->frames;
		if (p->options->take == SPLICE) {
			n = splice_in(p, p->slot, want);
		} else {
			n = recvmsg(p->sock, &msg, flags);
			p->calls++;
		}
		if (n < 0 && errno == EAGAIN) {
			p->readable = false;
			break;
		}
		if (n <= 0)
			die("recvmsg");
		if (p->options->take == COPY)
			keep(p, iov, n);
		/* Less than asked for: more of it raises another edge. (A splice stops short for other reasons.) */
		if ((size_t)n < want && p->options->take != SPLICE)
			p->readable = false;
		was_given(p, n);
	}
}

static void to_sock(struct plane *p)
{
	int flags = MSG_DONTWAIT | MSG_NOSIGNAL | (p->options->zerocopy ? MSG_ZEROCOPY : 0);
	struct iovec iov[MAX_FRAMES];
	struct msghdr msg = { .msg_iov = iov };

	uint64_t avail = atomic_load(&p->shared->avail); /* what comes meanwhile has its turn */

	while (p->writable && p->sent != avail) {
		size_t want, per_batch = sizeof(p->zerocopy_last) / sizeof(*p->zerocopy_last);
		ssize_t n;

		msg.msg_iovlen = batch_left(p, iov, &want);
		n = sendmsg(p->sock, &msg, flags);
		p->calls++;
		/* ENOBUFS: too much waits for notices, the next of which is an event. */
		if (n < 0 && (errno == EAGAIN || errno == ENOBUFS)) {
			p->writable = false;
			break;
		}
		if (n < 0)
			die("sendmsg");
		p->zerocopy_last[p->sent % per_batch] = p->zerocopy_next++;
		if ((size_t)n < want)
			p->writable = false;
		was_sent(p, n);
	}
}

/* The kernel has done with what was sent so: only now is it the guest's again. */
static void zerocopy_notices(struct plane *p)
{
	char control[256];
	size_t per_batch = sizeof(p->zerocopy_last) / sizeof(*p->zerocopy_last);

	for (;;) {
		struct msghdr msg = { .msg_control = control, .msg_controllen = sizeof(control) };
		struct sock_extended_err error;
		struct cmsghdr *c;
		uint64_t used = atomic_load(&p->shared->used);

		p->calls++;
		if (recvmsg(p->sock, &msg, MSG_ERRQUEUE | MSG_DONTWAIT) < 0)
			return;
		c = CMSG_FIRSTHDR(&msg);
		if (!c || c->cmsg_level != SOL_IP || c->cmsg_type != IP_RECVERR)
			die("MSG_ERRQUEUE");
		memcpy(&error, CMSG_DATA(c), sizeof(error));
		if (error.ee_origin != SO_EE_ORIGIN_ZEROCOPY)
			die("MSG_ERRQUEUE");
		p->zerocopy_notes += error.ee_data - error.ee_info + 1;
		if (error.ee_code & SO_EE_CODE_ZEROCOPY_COPIED)
			p->zerocopy_copied += error.ee_data - error.ee_info + 1;
		while (used != p->sent && (int32_t)(p->zerocopy_last[used % per_batch] - error.ee_data) <= 0)
			used++;
		atomic_store(&p->shared->used, used);
		p->writable = true;
		p->call_due = true;
	}
}

static void turn(struct plane *p)
{
	uint64_t one = 1;

	discard(p);
	to_sock(p);
	to_guest(p);
	if (p->call_due) {
		p->call_due = false;
		p->calls++;
		if (write(p->call, &one, 8) != 8)
			die("call");
	}
}

static bool guest_wants(struct plane *p)
{
	return (p->writable && p->sent != atomic_load(&p->shared->avail)) ||
	       p->taken != atomic_load(&p->shared->acked) || p->phase != atomic_load(&p->shared->phase);
}

static void watch(int epfd, int fd, uint32_t events)
{
	struct epoll_event event = { .events = events | EPOLLET, .data.fd = fd };

	if (epoll_ctl(epfd, EPOLL_CTL_ADD, fd, &event))
		die("epoll_ctl");
}

/* Whether others wanted the processor while the plane looked: then it must not. */
static bool was_pushed_aside(struct plane *p)
{
	struct rusage usage;
	long before = p->switches;

	getrusage(RUSAGE_THREAD, &usage);
	p->switches = usage.ru_nivcsw;
	return p->switches != before;
}

/* Look for a while; whether there is something, and how many events. */
static bool look(struct plane *p, int epfd, struct epoll_event *events, int room, int *n)
{
	double end = now() + p->options->spin / 1e6;

	atomic_store(&p->shared->quiet, 1);
	do {
		*n = guest_wants(p) ? 0 : epoll_wait(epfd, events, room, 0);
		p->calls++;
		if (*n || guest_wants(p))
			return true;
	} while (now() < end);
	atomic_store(&p->shared->quiet, 0);
	*n = 0;
	return guest_wants(p);
}

static int wait_events(struct plane *p, int epfd, struct epoll_event *events, int room)
{
	bool found;
	int n;

	if (p->options->spin && p->rest == 0) {
		found = look(p, epfd, events, room, &n);
		if (p->options->adapt && was_pushed_aside(p)) {
			atomic_store(&p->shared->quiet, 0);
			p->rest = REST;
			found = found || guest_wants(p);
		}
		if (found)
			return n;
	} else if (p->rest) {
		p->rest--;
	}
	p->calls++;
	return epoll_wait(epfd, events, room, -1);
}

void run_epoll(struct plane *p)
{
	struct epoll_event events[8];
	int epfd = epoll_create1(EPOLL_CLOEXEC);

	watch(epfd, p->kick, EPOLLIN);
	watch(epfd, p->sock, EPOLLIN | EPOLLRDHUP | EPOLLOUT);
	while (!over(p)) {
		int n = wait_events(p, epfd, events, 8);

		for (int i = 0; i < n; i++) {
			if (events[i].data.fd != p->sock)
				continue; /* a kick: the turn looks at what there is */
			p->readable |= (events[i].events & EPOLLIN) != 0;
			p->writable |= (events[i].events & EPOLLOUT) != 0;
			if (events[i].events & EPOLLERR)
				zerocopy_notices(p);
		}
		turn(p);
	}
	close(epfd);
}
