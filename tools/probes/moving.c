// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * What it takes to move TCP connections in system calls alone: on a source to
 * freeze and read them, on a target to make them anew, and there to let them go.
 * Both ends are in this process, on the loopback interface. What is queued for the
 * guest goes into a pipe that another process empties, and into the new socket.
 */
#define _GNU_SOURCE
#include "probe.h"

#include <netinet/in.h>
#include <linux/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define FROZEN_TTL 255
#define OPT_MSS 2
#define OPT_WS 3
#define OPT_SACK 4
#define OPT_TS 8

struct connection {
	struct sockaddr_in ours, peers;
	int sock, peer;
	struct tcp_info info;
	struct tcp_repair_window window;
	int mss;
	uint32_t timestamp, sent, received;
};

static double processor(void)
{
	struct timespec t;

	clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
	return t.tv_sec + t.tv_nsec * 1e-9;
}

static void set(int fd, int level, int option, const void *value, socklen_t size)
{
	if (setsockopt(fd, level, option, value, size))
		die("setsockopt");
}

static void set_tcp(int fd, int option, int value)
{
	set(fd, IPPROTO_TCP, option, &value, sizeof(value));
}

static void get(int fd, int option, void *value, socklen_t size)
{
	if (getsockopt(fd, IPPROTO_TCP, option, value, &size))
		die("getsockopt");
}

static unsigned queued;
static char *bytes;
static int drain; /* a pipe */

static void make(struct connection *c, int listener, const struct sockaddr_in *where)
{
	socklen_t size = sizeof(c->ours);

	c->peers = *where;
	c->sock = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (c->sock < 0 || connect(c->sock, (const struct sockaddr *)where, sizeof(*where)))
		die("connect");
	c->peer = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
	if (c->peer < 0 || getsockname(c->sock, (struct sockaddr *)&c->ours, &size))
		die("accept");
	for (ssize_t n, left = queued; left; left -= n)
		if ((n = send(c->peer, bytes, left, 0)) <= 0)
			die("send");
}

static void save(struct connection *c)
{
	int ttl = FROZEN_TTL;

	set(c->sock, IPPROTO_IP, IP_MINTTL, &ttl, sizeof(ttl));
	set_tcp(c->sock, TCP_REPAIR, 1);
	get(c->sock, TCP_INFO, &c->info, sizeof(c->info));
	get(c->sock, TCP_MAXSEG, &c->mss, sizeof(c->mss));
	get(c->sock, TCP_TIMESTAMP, &c->timestamp, sizeof(c->timestamp));
	get(c->sock, TCP_REPAIR_WINDOW, &c->window, sizeof(c->window));
	set_tcp(c->sock, TCP_REPAIR_QUEUE, TCP_SEND_QUEUE);
	get(c->sock, TCP_QUEUE_SEQ, &c->sent, sizeof(c->sent));
	set_tcp(c->sock, TCP_REPAIR_QUEUE, TCP_RECV_QUEUE);
	get(c->sock, TCP_QUEUE_SEQ, &c->received, sizeof(c->received));
	if (queued && (recv(c->sock, bytes, queued, MSG_PEEK | MSG_DONTWAIT) != queued ||
		       write(drain, bytes, queued) != queued))
		die("a queue");
}

static void load(struct connection *c)
{
	struct tcp_repair_opt options[] = {
		{ OPT_WS, c->info.tcpi_snd_wscale | (uint32_t)c->info.tcpi_rcv_wscale << 16 },
		{ OPT_MSS, c->mss },
		{ OPT_SACK, 0 },
		{ OPT_TS, 0 },
	};

	c->sock = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (c->sock < 0)
		die("socket");
	set_tcp(c->sock, TCP_REPAIR, 1);
	if (bind(c->sock, (const struct sockaddr *)&c->ours, sizeof(c->ours)))
		die("bind");
	set_tcp(c->sock, TCP_TIMESTAMP, c->timestamp);
	set_tcp(c->sock, TCP_REPAIR_QUEUE, TCP_SEND_QUEUE);
	set_tcp(c->sock, TCP_QUEUE_SEQ, c->sent);
	set_tcp(c->sock, TCP_REPAIR_QUEUE, TCP_RECV_QUEUE);
	set_tcp(c->sock, TCP_QUEUE_SEQ, c->received - queued);
	set_tcp(c->sock, TCP_MAXSEG, c->mss > 32767 ? 32767 : c->mss);
	if (connect(c->sock, (const struct sockaddr *)&c->peers, sizeof(c->peers)))
		die("connect in repair mode");
	if (queued && send(c->sock, bytes, queued, 0) != queued)
		die("send in repair mode");
	set(c->sock, IPPROTO_TCP, TCP_REPAIR_OPTIONS, options, sizeof(options));
	set(c->sock, IPPROTO_TCP, TCP_REPAIR_WINDOW, &c->window, sizeof(c->window));
}

static void let_go(struct connection *c, int epoll)
{
	struct epoll_event event = { .events = EPOLLIN | EPOLLET };

	set_tcp(c->sock, TCP_REPAIR, 0); /* a window probe goes out, and its answer comes back */
	if (epoll_ctl(epoll, EPOLL_CTL_ADD, c->sock, &event))
		die("epoll_ctl");
}

static void check(const struct connection *c)
{
	char byte = 'x';

	if (queued && recv(c->sock, bytes, queued, MSG_WAITALL) != queued)
		die("what was queued");
	if (send(c->peer, &byte, 1, 0) != 1 || recv(c->sock, &byte, 1, 0) != 1 || byte != 'x' ||
	    send(c->sock, &byte, 1, 0) != 1 || recv(c->peer, &byte, 1, 0) != 1)
		die("a connection that has moved");
}

static void begin_drain(void)
{
	static char taken[1 << 18];
	int ends[2];
	pid_t child;

	if (pipe(ends) || (child = fork()) < 0)
		die("pipe");
	close(ends[child ? 0 : 1]);
	drain = ends[1];
	if (!child) {
		while (read(ends[0], taken, sizeof(taken)) > 0)
			;
		_exit(0);
	}
}

void move_connections(unsigned count, unsigned each)
{
	static const char *const names[] = { "save", "load", "let go" };
	struct connection *all = calloc(count, sizeof(*all));
	struct sockaddr_in where = { .sin_family = AF_INET, .sin_addr = { htonl(INADDR_LOOPBACK) } };
	struct rlimit limit = { 2 * count + 64, 2 * count + 64 };
	socklen_t size = sizeof(where);
	int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), epoll = epoll_create1(EPOLL_CLOEXEC);

	queued = each;
	bytes = calloc(1, each + 1);
	begin_drain();
	setrlimit(RLIMIT_NOFILE, &limit); /* where it cannot be had it shows */
	if (!all || !bytes || listener < 0 || epoll < 0 || bind(listener, (struct sockaddr *)&where, size) ||
	    listen(listener, 16) || getsockname(listener, (struct sockaddr *)&where, &size))
		die("listen");
	for (unsigned i = 0; i < count; i++)
		make(&all[i], listener, &where);
	for (int step = 0; step < 3; step++) {
		double before = processor();

		for (unsigned i = 0; i < count; i++)
			if (step == 0)
				save(&all[i]);
			else if (step == 1)
				load(&all[i]);
			else
				let_go(&all[i], epoll);
		printf("%s\"%s CPU us\": %.3f", step ? ", " : "{", names[step], (processor() - before) * 1e6 / count);
		for (unsigned i = 0; step == 0 && i < count; i++)
			close(all[i].sock); /* in repair mode this is silent */
	}
	puts("}");
	for (unsigned i = 0; i < count; i++)
		check(&all[i]);
	close(drain);
	wait(NULL);
}
