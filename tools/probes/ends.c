// SPDX-License-Identifier: GPL-2.0-or-later
/* The two ends of the plane: the guest, and the far end of the connection. See probe.h. */
#define _GNU_SOURCE
#include "probe.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define WARM 0.1 /* s */

_Noreturn void die(const char *what)
{
	perror(what);
	exit(1);
}

double now(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return ts.tv_sec + ts.tv_nsec / 1e9;
}

static void echo(int fd)
{
	char c;

	while (recv(fd, &c, 1, 0) == 1 && send(fd, &c, 1, MSG_NOSIGNAL) == 1)
		;
}

static void sink(int fd)
{
	while (recv(fd, NULL, TX_ROOM, MSG_TRUNC) > 0)
		;
}

static void source(int fd)
{
	static char data[TX_ROOM];

	while (send(fd, data, sizeof(data), MSG_NOSIGNAL) > 0)
		;
}

void far_end(uint16_t port)
{
	struct sockaddr_in addr = { .sin_family = AF_INET, .sin_port = htons(port) };
	int one = 1, listening = socket(AF_INET, SOCK_STREAM, 0);
	char work;

	setsockopt(listening, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
	if (bind(listening, (struct sockaddr *)&addr, sizeof(addr)) || listen(listening, 1))
		die("listen");
	puts("ready");
	fflush(stdout);
	for (;;) {
		int fd = accept(listening, NULL, NULL);

		if (fd < 0)
			die("accept");
		setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
		if (recv(fd, &work, 1, 0) == 1) {
			if (work == TRANSACTIONS)
				echo(fd);
			else if (work == UP)
				sink(fd);
			else
				source(fd);
		}
		close(fd);
	}
}

static void do_kick(struct shared *shared, int kick)
{
	uint64_t one = 1;

	if (!atomic_load(&shared->quiet) && write(kick, &one, 8) != 8)
		die("kick");
}

static void wait_call(int call)
{
	struct pollfd pfd = { .fd = call, .events = POLLIN };
	uint64_t n;

	/* Not for ever: a plane that takes part in nothing must not hang the guest. */
	if (poll(&pfd, 1, 100) > 0 && read(call, &n, 8) != 8 && errno != EAGAIN)
		die("call");
}

static void transaction(struct shared *shared, int kick, int call)
{
	uint64_t before = atomic_load(&shared->given);
	double began = now();

	atomic_fetch_add(&shared->avail, 1);
	do_kick(shared, kick);
	while (atomic_load(&shared->given) == before && atomic_load(&shared->phase) < 2)
		wait_call(call);
	if (atomic_load(&shared->phase) == 1 && shared->times_count < MAX_TIMES)
		shared->times[shared->times_count++] = (now() - began) * 1e9;
	/* What it acknowledges goes with the next request. */
	atomic_store(&shared->acked, atomic_load(&shared->given));
}

void guest(const struct options *options, struct shared *shared, int kick, int call)
{
	double end = now() + WARM;
	uint64_t window = (4 * TX_ROOM) / options->batch, one = 1;

	for (;;) {
		if (now() >= end) {
			uint32_t phase = atomic_fetch_add(&shared->phase, 1) + 1;

			if (write(kick, &one, 8) != 8)
				die("kick");
			if (phase == 2)
				return;
			end = now() + options->seconds;
		}
		if (options->work == TRANSACTIONS) {
			transaction(shared, kick, call);
		} else if (options->work == UP) {
			if (atomic_load(&shared->avail) - atomic_load(&shared->used) < window) {
				atomic_fetch_add(&shared->avail, 1);
				do_kick(shared, kick);
			} else {
				wait_call(call);
			}
		} else {
			uint64_t given = atomic_load(&shared->given);

			if (given != atomic_load(&shared->acked)) {
				atomic_store(&shared->acked, given);
				do_kick(shared, kick);
			} else {
				wait_call(call);
			}
		}
	}
}
