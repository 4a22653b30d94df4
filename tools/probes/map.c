// SPDX-License-Identifier: GPL-2.0-or-later
/* Whether TCP_ZEROCOPY_RECEIVE can put what has come into the guest's memory. See probe.h. */
#define _GNU_SOURCE
#include "probe.h"

#include <errno.h>
#include <linux/tcp.h>
#include <netinet/in.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>

#define LENGTH (1u << 20)

static int receive(int sock, void *where, struct tcp_zerocopy_receive *z)
{
	socklen_t size = sizeof(*z);

	memset(z, 0, sizeof(*z));
	z->address = (uintptr_t)where;
	z->length = LENGTH;
	return getsockopt(sock, IPPROTO_TCP, TCP_ZEROCOPY_RECEIVE, z, &size);
}

void try_map(int sock, struct shared *shared, double seconds)
{
	struct tcp_zerocopy_receive z;
	struct pollfd pfd = { .fd = sock, .events = POLLIN };
	void *own = mmap(NULL, LENGTH, PROT_READ, MAP_SHARED, sock, 0);
	double end = now() + seconds;
	uint64_t mapped = 0, left = 0;
	const char *refused = "nothing";

	if (own == MAP_FAILED)
		die("mmap of the socket");
	if (poll(&pfd, 1, 1000) == 1 && receive(sock, shared->rx, &z))
		refused = strerrorname_np(errno);
	while (now() < end && poll(&pfd, 1, 1000) == 1) {
		if (receive(sock, own, &z))
			die("TCP_ZEROCOPY_RECEIVE");
		mapped += z.length;
		/* What cannot be mapped has to be read. */
		if (z.recv_skip_hint) {
			ssize_t n = recv(sock, NULL, z.recv_skip_hint, MSG_TRUNC | MSG_DONTWAIT);

			left += n > 0 ? n : 0;
		}
		madvise(own, LENGTH, MADV_DONTNEED);
	}
	printf("{\"guest's memory\": \"%s\", \"mapped of the socket's own\": %.3f}\n", refused,
	       (double)mapped / (mapped + left));
}
