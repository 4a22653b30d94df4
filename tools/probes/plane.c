// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * What the engines have in common, and the program:
 *
 *   plane far PORT
 *   plane WORK ADDR PORT [OPTION=VALUE...]
 *
 * WORK is rr, up, down or map. It prints one JSON object. See probe.h.
 */
#define _GNU_SOURCE
#include "probe.h"

#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

/* The next bytes of the guest's batch, in pieces of a frame; returns how many pieces. */
size_t batch_left(struct plane *p, struct iovec *iov, size_t *bytes)
{
	size_t at = p->sent_of_batch, n = 0;

	*bytes = p->options->batch - at;
	while (at < p->options->batch) {
		size_t part = FRAME - at % FRAME;

		if (part > p->options->batch - at)
			part = p->options->batch - at;
		iov[n].iov_base = p->shared->tx + at;
		iov[n++].iov_len = part;
		at += part;
	}
	return n;
}

void was_sent(struct plane *p, size_t bytes)
{
	p->bytes += bytes;
	p->sent_of_batch += bytes;
	if (p->sent_of_batch < p->options->batch)
		return;
	p->sent_of_batch = 0;
	p->sent++;
	if (p->options->zerocopy)
		return; /* it is the guest's again when the kernel says so */
	atomic_store(&p->shared->used, p->sent);
	/* With transactions the guest does not care when it has its buffer back, but many drivers ask all the same. */
	if (p->options->work == UP || p->options->tell_sent)
		p->call_due = true;
}

/* How far apart the guest's buffers are. */
static unsigned stride(const struct plane *p)
{
	return (p->options->frame + 2047) / 2048 * 2048;
}

static unsigned slots(const struct plane *p)
{
	return SLOTS * FRAME / stride(p);
}

/* Buffers of the guest for so many frames; returns their bytes. */
size_t buffers(struct plane *p, unsigned first, unsigned frames, struct iovec *iov)
{
	for (unsigned i = 0; i < frames; i++) {
		iov[i].iov_base = p->shared->rx + (size_t)((first + i) % slots(p)) * stride(p);
		iov[i].iov_len = p->options->frame;
	}
	return (size_t)frames * p->options->frame;
}

void was_given(struct plane *p, size_t bytes)
{
	p->slot = (p->slot + (bytes + p->options->frame - 1) / p->options->frame) % slots(p);
	p->given += bytes;
	atomic_store(&p->shared->given, p->given);
	p->call_due = true;
}

static double cpu(clockid_t clock)
{
	struct timespec ts;

	clock_gettime(clock, &ts);
	return ts.tv_sec + ts.tv_nsec / 1e9;
}

static struct snapshot snap(const struct plane *p)
{
	/* The kernel's threads of io_uring are threads of this process: its clock has theirs as well. */
	return (struct snapshot){ now(), cpu(CLOCK_PROCESS_CPUTIME_ID), cpu(CLOCK_THREAD_CPUTIME_ID), p->bytes, p->calls };
}

bool over(struct plane *p)
{
	uint32_t phase = atomic_load(&p->shared->phase);

	if (phase == p->phase)
		return false;
	p->phase = phase;
	if (phase == 1)
		p->from = snap(p);
	else
		p->to = snap(p);
	return phase == 2;
}

/* Threads of this process apart from this one. */
static int helpers(void)
{
	DIR *dir = opendir("/proc/self/task");
	int n = -1;

	for (struct dirent *entry; (entry = readdir(dir));)
		n += entry->d_name[0] != '.';
	closedir(dir);
	return n;
}

static int compare(const void *a, const void *b)
{
	uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;

	return (x > y) - (x < y);
}

static void report(struct plane *p, int threads)
{
	struct shared *s = p->shared;
	double bytes = p->to.bytes - p->from.bytes, calls = p->to.calls - p->from.calls;
	double process = p->to.process - p->from.process, thread = p->to.thread - p->from.thread;
	double seconds = p->to.time - p->from.time;
	int napi = 0;
	socklen_t size = sizeof(napi);

	printf("{\"CPU s/s\": %.4f, \"of it other threads\": %.4f, \"threads\": %d", process / seconds,
	       (process - thread) / seconds, threads);
	if (p->options->work == TRANSACTIONS) {
		uint32_t n = s->times_count;

		if (!n)
			die("no transaction");
		qsort(s->times, n, sizeof(*s->times), compare);
		getsockopt(p->sock, SOL_SOCKET, SO_INCOMING_NAPI_ID, &napi, &size);
		printf(", \"transactions/s\": %.0f, \"p50 us\": %.2f, \"p99 us\": %.2f, \"CPU us\": %.3f, \"calls\": %.2f,"
		       " \"NAPI id\": %d",
		       n / seconds, s->times[n / 2] / 1e3, s->times[n * 99ul / 100] / 1e3, process / n * 1e6, calls / n,
		       napi);
	} else {
		double gib = bytes / (1 << 30);

		if (bytes == 0)
			die("no byte");
		printf(", \"Gbit/s\": %.2f, \"CPU s/GiB\": %.4f, \"calls\": %.0f", bytes * 8 / seconds / 1e9, process / gib,
		       calls / gib);
	}
	if (p->options->zerocopy)
		printf(", \"notices\": %llu, \"copied\": %.3f", (unsigned long long)p->zerocopy_notes,
		       p->zerocopy_notes ? (double)p->zerocopy_copied / p->zerocopy_notes : 0.0);
	puts("}");
}

static int dial(const struct options *o)
{
	struct sockaddr_in addr = { .sin_family = AF_INET, .sin_port = htons(o->port) };
	int fd = socket(AF_INET, SOCK_STREAM, 0), one = 1, zero = 0, busy = o->busy_poll;
	char work = o->work;

	if (inet_pton(AF_INET, o->addr, &addr.sin_addr) != 1 || connect(fd, (struct sockaddr *)&addr, sizeof(addr)))
		die("connect");
	if (setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one)) || send(fd, &work, 1, 0) != 1)
		die("connection");
	if (o->take == PEEK && setsockopt(fd, SOL_SOCKET, SO_PEEK_OFF, &zero, sizeof(zero)))
		die("SO_PEEK_OFF");
	if (o->zerocopy && setsockopt(fd, SOL_SOCKET, SO_ZEROCOPY, &one, sizeof(one)))
		die("SO_ZEROCOPY");
	if (o->busy_poll && setsockopt(fd, SOL_SOCKET, SO_BUSY_POLL, &busy, sizeof(busy)))
		die("SO_BUSY_POLL");
	return fd;
}

static unsigned among(const char *value, const char *const *names)
{
	for (unsigned i = 0; names[i]; i++)
		if (!strcmp(value, names[i]))
			return i;
	fprintf(stderr, "plane: what is %s?\n", value);
	exit(2);
}

static const char *const works[] = { "rr", "up", "down", "map", NULL };
static const char *const engines[] = { "epoll", "uring", "posted", NULL };
static const char *const takes[] = { "peek", "read", "copy", "splice", NULL };

static void set(struct options *o, char *option)
{
	static const char *const names[] = { "engine", "take", "sqpoll", "zerocopy", "frames", "batch",
					     "spin",   "busy_poll", "seconds", "cpu", "tell_sent", "frame", "adapt", NULL };
	char *value = strchr(option, '=');
	unsigned number;

	if (!value) {
		fprintf(stderr, "plane: %s has no value\n", option);
		exit(2);
	}
	*value++ = 0;
	number = strtoul(value, NULL, 10);
	switch (among(option, names)) {
	case 0: o->engine = among(value, engines); break;
	case 1: o->take = among(value, takes); break;
	case 2: o->sqpoll = number; break;
	case 3: o->zerocopy = number; break;
	case 4: o->frames = number; break;
	case 5: o->batch = number; break;
	case 6: o->spin = number; break;
	case 7: o->busy_poll = number; break;
	case 8: o->seconds = strtod(value, NULL); break;
	case 9: o->cpu = number; break;
	case 10: o->tell_sent = number; break;
	case 11: o->frame = number; break;
	case 12: o->adapt = number; break;
	}
}

int main(int argc, char **argv)
{
	struct options o = { .frames = 1, .frame = FRAME, .seconds = 1, .batch = TX_ROOM, .cpu = -1 };
	cpu_set_t cpus;
	struct plane p = { .options = &o };
	pid_t child;
	int threads;

	if (argc == 3 && !strcmp(argv[1], "far")) {
		far_end(atoi(argv[2]));
		return 0;
	}
	if (argc == 4 && !strcmp(argv[1], "moving")) {
		move_connections(atoi(argv[2]), atoi(argv[3]));
		return 0;
	}
	if (argc < 4) {
		fputs("usage: plane far PORT | plane moving COUNT BYTES | plane WORK ADDR PORT [OPTION=VALUE...]\n", stderr);
		return 2;
	}
	o.work = among(argv[1], works);
	o.addr = argv[2];
	o.port = atoi(argv[3]);
	if (o.work == TRANSACTIONS)
		o.batch = 1;
	for (int i = 4; i < argc; i++)
		set(&o, argv[i]);
	if (!o.batch || o.batch > TX_ROOM || !o.frames || o.frames > MAX_FRAMES || !o.frame || o.frame > FRAME) {
		fputs("plane: too many, or too much\n", stderr);
		return 2;
	}
	p.memory = memfd_create("guest", MFD_CLOEXEC);
	if (p.memory < 0 || ftruncate(p.memory, sizeof(struct shared)))
		die("memfd");
	p.shared = mmap(NULL, sizeof(struct shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, p.memory, 0);
	p.kept = malloc(SLOTS * FRAME + FRAME);
	/* As QEMU's: not blocking. (io_uring hands a write to any other eventfd to a thread.) */
	p.kick = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
	p.call = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
	if (p.shared == MAP_FAILED || !p.kept || p.kick < 0 || p.call < 0)
		die("memory");
	if (pipe2(p.pipe, O_CLOEXEC) || fcntl(p.pipe[1], F_SETPIPE_SZ, TX_ROOM) < 0)
		die("pipe");
	memset(p.kept, 1, SLOTS * FRAME + FRAME);
	p.sock = dial(&o);
	if (o.work == MAP) {
		try_map(p.sock, p.shared, o.seconds);
		return 0;
	}
	child = fork();
	if (child < 0)
		die("fork");
	if (child == 0) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		close(p.sock);
		guest(&o, p.shared, p.kick, p.call);
		_exit(0);
	}
	CPU_ZERO(&cpus);
	if (o.cpu >= 0)
		CPU_SET(o.cpu, &cpus);
	if (o.cpu >= 0 && sched_setaffinity(0, sizeof(cpus), &cpus))
		die("cpu");
	if (o.engine == EPOLL)
		run_epoll(&p);
	else
		run_uring(&p);
	threads = helpers();
	waitpid(child, NULL, 0);
	report(&p, threads);
	return 0;
}
