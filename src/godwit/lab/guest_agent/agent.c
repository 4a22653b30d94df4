// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * The traffic agent inside a QEMU guest.
 *
 * Runs as process 1 of the laboratory's guest image. It takes commands, one a
 * line, from the serial port that is its first argument, and answers there:
 *
 *   hello                                     -> hello 1
 *   get JOB ADDR PORT SEED BYTES RATE         -> done JOB RESULT
 *   put JOB ADDR PORT SEED BYTES RATE         -> done JOB RESULT
 *   echo JOB ADDR PORT COUNT                  -> open JOB OPEN FAILED
 *   check JOB TIMEOUT_MS                      -> alive JOB ALIVE DEAD SILENT
 *   listen PORT                               -> listening PORT
 *   datagrams PORT                            -> serving PORT
 *   status JOB                                -> status JOB RESULT
 *   stop JOB     (end a put here and now)     -> stopped JOB
 *   drop JOB     (close, and forget it)       -> dropped JOB
 *   exec JOB COMMAND...                       -> out JOB LINE (any number), exit JOB STATUS
 *   flood JOB ADDR PORT u|d MS COUNT          -> flooded JOB BYTES MS
 *
 * RESULT is: STATE BYTES CRC WRONG_AT GAP_MS ERRNO, where STATE is one of
 * running, ok, failed; WRONG_AT is -1 while every byte was right; GAP_MS is the
 * longest time without progress. A command that cannot be carried out is
 * answered with: error TEXT. JOB is a number that the other side picks; get
 * and put with BYTES 0 go on until stopped by the sending side. RATE is in
 * bytes per second, 0 for as fast as it goes. A datagram that comes to a port of
 * "datagrams" is given back to its sender as it is. A flood sends ("u") or
 * receives ("d") for so long what nobody looks at, over COUNT connections: how
 * fast it goes. Each begins with that letter; of a "u", the other side closes
 * when all has come.
 *
 * On a connection, the side that opens it says in one line what it wants:
 *
 *   get JOB SEED BYTES RATE | put JOB SEED | echo JOB
 *
 * The side that sends the stream ends it with a FIN; the side that received
 * answers "BYTES CRC\n" and closes. Both then know that all of it arrived, and
 * both directions of the connection have been used. The stream and its
 * checksum are defined in godwit/lab/stream.py.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#define PERIOD 65521
#define MAX_CONNS 16384
#define MAX_JOBS 256
#define MAX_CONNECTING 128 /* of one echo job at a time */
#define MAX_FLOOD 16 /* connections */
#define FLOOD_PATIENCE_MS 10000
#define LINE_MAX_BYTES 1024
#define TICK_MS 5

enum kind {
	FREE, /* the slot is unused */
	LISTEN,
	DATAGRAMS,
	ASKED, /* accepted, the request line has not come yet */
	SENDER,
	RECEIVER,
	ECHO_SERVER,
	ECHO_CLIENT,
};

enum state { RUNNING, OK, FAILED };

struct stream {
	uint32_t seed;
	uint8_t *block; /* two periods, so that any period's length from any offset is one piece */
};

struct conn {
	enum kind kind;
	int fd;
	int job; /* -1: opened from outside, nobody here waits for it */
	bool connecting;
	bool eof_sent;
	bool stop; /* a sender is to end */
	bool paused; /* a sender waits for its rate's next tick */
	char line[LINE_MAX_BYTES]; /* the request while it comes or goes, a sender's answer */
	unsigned line_len, line_sent;
	struct stream *stream;
	uint64_t bytes, limit, rate;
	uint32_t crc;
	int64_t wrong_at;
	int64_t started_ms, progress_ms, gap_ms;
	uint64_t token; /* of an echo client: what the last check sent */
	uint8_t echo[512]; /* echo server: bytes to give back; client: bytes that came back */
	unsigned echo_len, echo_sent;
	bool waiting; /* echo client: the echo has not come back */
	bool failed;
};

struct job {
	bool used;
	int id;
	enum kind kind; /* SENDER, RECEIVER or ECHO_CLIENT */
	int conn; /* of a transfer, -1 once it is over */
	enum state state;
	uint64_t bytes;
	uint32_t crc;
	int64_t wrong_at, gap_ms;
	int error;
	/* Echo: */
	struct sockaddr_storage addr;
	socklen_t addr_len;
	int wanted, started, connecting, open, failed;
	bool announced; /* "open" has been said */
	int silent; /* of a check that runs: connections whose echo is due */
	int64_t check_until; /* 0: no check runs */
};

static struct conn conns[MAX_CONNS];
static struct job jobs[MAX_JOBS];
static struct stream streams[MAX_JOBS];
static int epoll_fd, control_fd;
static int conns_high; /* no slot from here on was ever used */
static uint64_t next_token = 1;
static uint32_t crc_table[8][256];
static uint8_t buffer[1 << 17];

static int64_t now_ms(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (int64_t)ts.tv_sec * 1000 + ts.tv_nsec / 1000000;
}

/* --- the control line ---------------------------------------------------- */

__attribute__((format(printf, 1, 2))) static void say(const char *format, ...)
{
	char text[LINE_MAX_BYTES * 2];
	va_list args;
	int len, done = 0;

	va_start(args, format);
	len = vsnprintf(text, sizeof(text) - 1, format, args);
	va_end(args);
	if (len < 0)
		return;
	if (len > (int)sizeof(text) - 2)
		len = sizeof(text) - 2;
	text[len++] = '\n';
	while (done < len) {
		/* The port blocks: an answer is short, and the other side reads. */
		ssize_t n = write(control_fd, text + done, len - done);

		if (n < 0 && errno != EINTR && errno != EAGAIN)
			return;
		if (n > 0)
			done += n;
	}
}

/* --- stream and checksum ------------------------------------------------- */

static void crc_init(void)
{
	for (int i = 0; i < 256; i++) {
		uint32_t c = i;

		for (int k = 0; k < 8; k++)
			c = c & 1 ? 0xEDB88320U ^ (c >> 1) : c >> 1;
		crc_table[0][i] = c;
	}
	for (int i = 0; i < 256; i++)
		for (int t = 1; t < 8; t++)
			crc_table[t][i] = crc_table[0][crc_table[t - 1][i] & 255] ^ (crc_table[t - 1][i] >> 8);
}

static uint32_t crc_add(uint32_t crc, const uint8_t *p, size_t len)
{
	crc = ~crc;
	for (; len >= 8; len -= 8, p += 8) {
		uint32_t lo, hi;

		memcpy(&lo, p, 4);
		memcpy(&hi, p + 4, 4);
		lo ^= crc;
		crc = crc_table[7][lo & 255] ^ crc_table[6][lo >> 8 & 255] ^ crc_table[5][lo >> 16 & 255] ^
		      crc_table[4][lo >> 24] ^ crc_table[3][hi & 255] ^ crc_table[2][hi >> 8 & 255] ^
		      crc_table[1][hi >> 16 & 255] ^ crc_table[0][hi >> 24];
	}
	while (len--)
		crc = crc_table[0][(crc ^ *p++) & 255] ^ (crc >> 8);
	return ~crc;
}

static struct stream *stream_of(uint32_t seed)
{
	struct stream *s;
	uint32_t x = seed;

	for (s = streams; s < streams + MAX_JOBS && s->block; s++)
		if (s->seed == seed)
			return s;
	if (s == streams + MAX_JOBS)
		return NULL;
	s->block = malloc(2 * PERIOD);
	if (!s->block)
		return NULL;
	s->seed = seed;
	for (int i = 0; i < PERIOD; i++) {
		x = x * 1664525U + 1013904223U;
		s->block[i] = s->block[i + PERIOD] = x >> 24;
	}
	return s;
}

/* --- jobs ---------------------------------------------------------------- */

static struct job *job_of(int id)
{
	for (struct job *j = jobs; j < jobs + MAX_JOBS; j++)
		if (j->used && j->id == id)
			return j;
	return NULL;
}

static struct job *job_new(int id, enum kind kind)
{
	if (job_of(id))
		return NULL;
	for (struct job *j = jobs; j < jobs + MAX_JOBS; j++)
		if (!j->used) {
			memset(j, 0, sizeof(*j));
			j->used = true;
			j->id = id;
			j->kind = kind;
			j->conn = -1;
			j->wrong_at = -1;
			return j;
		}
	return NULL;
}

static void job_report(const char *word, struct job *j)
{
	static const char *const names[] = { "running", "ok", "failed" };
	uint64_t bytes = j->bytes;
	uint32_t crc = j->crc;
	int64_t wrong = j->wrong_at, gap = j->gap_ms;

	if (j->conn >= 0) {
		struct conn *c = &conns[j->conn];
		int64_t idle = now_ms() - c->progress_ms;

		bytes = c->bytes;
		crc = c->crc;
		wrong = c->wrong_at;
		gap = c->gap_ms > idle ? c->gap_ms : idle;
	}
	say("%s %d %s %" PRIu64 " %08" PRIx32 " %" PRId64 " %" PRId64 " %d", word, j->id, names[j->state], bytes, crc,
	    wrong, gap, j->error);
}

/* --- connections --------------------------------------------------------- */

static void conn_watch(struct conn *c, uint32_t events)
{
	struct epoll_event ev = { .events = events, .data.u32 = c - conns };

	epoll_ctl(epoll_fd, EPOLL_CTL_MOD, c->fd, &ev);
}

static struct conn *conn_new(enum kind kind, int fd, uint32_t events)
{
	struct epoll_event ev = { .events = events };
	int i;

	for (i = 0; i < MAX_CONNS && conns[i].kind != FREE; i++)
		;
	if (i == MAX_CONNS)
		return NULL;
	if (i >= conns_high)
		conns_high = i + 1;
	memset(&conns[i], 0, sizeof(conns[i]));
	conns[i].kind = kind;
	conns[i].fd = fd;
	conns[i].job = -1;
	conns[i].wrong_at = -1;
	conns[i].started_ms = conns[i].progress_ms = now_ms();
	ev.data.u32 = i;
	epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &ev);
	return &conns[i];
}

static void conn_close(struct conn *c)
{
	close(c->fd);
	c->kind = FREE;
	c->fd = -1;
}

static void progress(struct conn *c)
{
	int64_t now = now_ms();

	if (now - c->progress_ms > c->gap_ms)
		c->gap_ms = now - c->progress_ms;
	c->progress_ms = now;
}

static void echo_check_over(struct job *j)
{
	say("alive %d %d %d %d", j->id, j->open - j->silent, j->failed, j->silent);
	j->check_until = 0;
}

static void echo_announce(struct job *j)
{
	if (!j->announced && j->started == j->wanted && !j->connecting) {
		j->announced = true;
		say("open %d %d %d", j->id, j->open, j->failed);
	}
}

/* The end of a connection; error 0 means that all went as it should. */
static void conn_over(struct conn *c, int error)
{
	struct job *j = c->job < 0 ? NULL : job_of(c->job);

	if (j && c->kind == ECHO_CLIENT) {
		if (c->connecting)
			j->connecting--;
		else
			j->open--;
		j->failed++;
		if (error)
			j->error = error;
		if (c->waiting)
			j->silent--;
	} else if (j) {
		j->bytes = c->bytes;
		j->crc = c->crc;
		j->wrong_at = c->wrong_at;
		j->gap_ms = c->gap_ms;
		j->error = error;
		j->state = error || c->wrong_at >= 0 ? FAILED : OK;
		j->conn = -1;
	}
	conn_close(c);
	if (j && j->kind == ECHO_CLIENT) {
		echo_announce(j);
		if (j->check_until && !j->silent)
			echo_check_over(j);
	} else if (j) {
		job_report("done", j);
	}
}

/* Sends what is left of the line; false: not yet all of it, or the connection is over. */
static bool flush_line(struct conn *c)
{
	while (c->line_sent < c->line_len) {
		ssize_t n = send(c->fd, c->line + c->line_sent, c->line_len - c->line_sent, MSG_NOSIGNAL);

		if (n < 0) {
			if (errno != EAGAIN && errno != EINTR)
				conn_over(c, errno);
			else
				conn_watch(c, EPOLLIN | EPOLLOUT);
			return false;
		}
		c->line_sent += n;
	}
	return true;
}

static void sender_can_send(struct conn *c)
{
	uint64_t budget = 1 << 20; /* then the others have a turn */

	if (!flush_line(c))
		return;
	while (!c->eof_sent && budget) {
		uint64_t left = c->limit ? c->limit - c->bytes : UINT64_MAX;
		size_t at = c->bytes % PERIOD, len = PERIOD;
		ssize_t n;

		if (c->stop || !left) {
			c->eof_sent = true;
			shutdown(c->fd, SHUT_WR);
			c->line_len = 0;
			break;
		}
		if (c->rate) {
			uint64_t due = (uint64_t)(now_ms() - c->started_ms) * c->rate / 1000;

			/* Not a few bytes at a time: a hundredth of a second's worth. */
			if (due < c->bytes + (left < c->rate / 100 ? left : c->rate / 100) || due == c->bytes) {
				c->paused = true;
				conn_watch(c, EPOLLIN);
				return;
			}
			if (left > due - c->bytes)
				left = due - c->bytes;
		}
		if (len > left)
			len = left;
		n = send(c->fd, c->stream->block + at, len, MSG_NOSIGNAL);
		if (n < 0) {
			if (errno == EAGAIN || errno == EINTR)
				break;
			conn_over(c, errno);
			return;
		}
		c->crc = crc_add(c->crc, c->stream->block + at, n);
		c->bytes += n;
		budget -= (uint64_t)n < budget ? (uint64_t)n : budget;
		progress(c);
	}
	conn_watch(c, c->eof_sent ? EPOLLIN : EPOLLIN | EPOLLOUT);
}

/* The receiver's answer: its totals have to be ours. */
static void sender_can_receive(struct conn *c)
{
	char *end;
	ssize_t n = recv(c->fd, buffer, LINE_MAX_BYTES, 0);

	if (n < 0) {
		if (errno != EAGAIN && errno != EINTR)
			conn_over(c, errno);
		return;
	}
	if (n > 0 && c->eof_sent && c->line_len + n < LINE_MAX_BYTES) {
		memcpy(c->line + c->line_len, buffer, n);
		c->line_len += n;
		c->line[c->line_len] = 0;
		return;
	}
	if (n > 0 || !c->eof_sent) {
		conn_over(c, EPROTO);
		return;
	}
	c->line[c->line_len] = 0;
	if (strtoull(c->line, &end, 10) != c->bytes || strtoul(end, NULL, 16) != c->crc)
		conn_over(c, EBADMSG);
	else
		conn_over(c, 0);
}

static void receiver_can_receive(struct conn *c)
{
	for (int turn = 0; turn < 8; turn++) {
		ssize_t n = recv(c->fd, buffer, sizeof(buffer), 0), done = 0;

		if (n < 0) {
			if (errno != EAGAIN && errno != EINTR)
				conn_over(c, errno);
			return;
		}
		progress(c);
		if (n == 0) {
			if (c->limit && c->bytes != c->limit) {
				conn_over(c, ENODATA);
				return;
			}
			c->line_len = snprintf(c->line, sizeof(c->line), "%" PRIu64 " %08" PRIx32 "\n", c->bytes, c->crc);
			c->line_sent = 0;
			if (send(c->fd, c->line, c->line_len, MSG_NOSIGNAL) != (ssize_t)c->line_len)
				conn_over(c, errno);
			else
				conn_over(c, 0);
			return;
		}
		while (done < n) {
			size_t at = c->bytes % PERIOD, len = n - done;

			if (len > PERIOD)
				len = PERIOD;
			if (c->wrong_at < 0 && memcmp(buffer + done, c->stream->block + at, len)) {
				size_t i = 0;

				while (buffer[done + i] == c->stream->block[at + i])
					i++;
				c->wrong_at = c->bytes + i;
			}
			c->crc = crc_add(c->crc, buffer + done, len);
			c->bytes += len;
			done += len;
		}
	}
}

static void echo_serve(struct conn *c)
{
	for (;;) {
		ssize_t n;

		while (c->echo_sent < c->echo_len) {
			n = send(c->fd, c->echo + c->echo_sent, c->echo_len - c->echo_sent, MSG_NOSIGNAL);
			if (n < 0) {
				if (errno != EAGAIN && errno != EINTR)
					conn_over(c, errno);
				else
					conn_watch(c, EPOLLOUT);
				return;
			}
			c->echo_sent += n;
		}
		c->echo_len = c->echo_sent = 0;
		n = recv(c->fd, c->echo, sizeof(c->echo), 0);
		if (n < 0 && (errno == EAGAIN || errno == EINTR)) {
			conn_watch(c, EPOLLIN);
			return;
		}
		if (n <= 0) {
			conn_over(c, n < 0 ? errno : 0);
			return;
		}
		c->echo_len = n;
	}
}

static void echo_answer(struct conn *c)
{
	struct job *j = job_of(c->job);
	ssize_t n = recv(c->fd, c->echo + c->echo_len, sizeof(c->echo) - c->echo_len, 0);

	if (n < 0) {
		if (errno != EAGAIN && errno != EINTR)
			conn_over(c, errno);
		return;
	}
	if (n == 0 || !j) {
		conn_over(c, 0);
		return;
	}
	c->echo_len += n;
	if (c->echo_len < sizeof(c->token))
		return;
	if (!c->waiting || c->echo_len > sizeof(c->token) || memcmp(c->echo, &c->token, sizeof(c->token))) {
		conn_over(c, EBADMSG);
		return;
	}
	c->echo_len = 0;
	c->waiting = false;
	if (!--j->silent && j->check_until)
		echo_check_over(j);
}

static void accept_all(struct conn *listener)
{
	for (;;) {
		int fd = accept4(listener->fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);

		if (fd < 0)
			return;
		if (!conn_new(ASKED, fd, EPOLLIN))
			close(fd);
	}
}

static void give_datagrams_back(int fd)
{
	struct sockaddr_storage from;
	socklen_t len;
	ssize_t n;

	while (len = sizeof(from), (n = recvfrom(fd, buffer, sizeof(buffer), 0, (struct sockaddr *)&from, &len)) >= 0)
		sendto(fd, buffer, n, 0, (struct sockaddr *)&from, len); /* lost where it does not go: these are datagrams */
}

/* The first line on a connection that was opened from outside. */
static void read_request(struct conn *c)
{
	uint64_t seed, limit = 0, rate = 0;
	int job;

	while (c->line_len < LINE_MAX_BYTES - 1) {
		/* One byte at a time: what follows the line is the stream. */
		ssize_t n = recv(c->fd, c->line + c->line_len, 1, 0);

		if (n < 0 && (errno == EAGAIN || errno == EINTR))
			return;
		if (n <= 0) {
			conn_over(c, 0);
			return;
		}
		if (c->line[c->line_len++] == '\n')
			break;
	}
	c->line[c->line_len] = 0;
	c->line_len = c->line_sent = 0;
	c->started_ms = c->progress_ms = now_ms();
	if (sscanf(c->line, "get %d %" SCNu64 " %" SCNu64 " %" SCNu64, &job, &seed, &limit, &rate) == 4) {
		c->kind = SENDER;
		c->limit = limit;
		c->rate = rate;
		c->stream = stream_of(seed);
		conn_watch(c, EPOLLIN | EPOLLOUT);
	} else if (sscanf(c->line, "put %d %" SCNu64, &job, &seed) == 2) {
		c->kind = RECEIVER;
		c->stream = stream_of(seed);
		receiver_can_receive(c);
		return;
	} else if (sscanf(c->line, "echo %d", &job) == 1) {
		c->kind = ECHO_SERVER;
		echo_serve(c);
		return;
	}
	if (c->kind == ASKED || !c->stream)
		conn_over(c, EPROTO);
}

static void conn_event(struct conn *c, uint32_t events)
{
	struct job *j = c->job < 0 ? NULL : job_of(c->job);

	if (c->connecting) {
		int error = 0;
		socklen_t len = sizeof(error);

		getsockopt(c->fd, SOL_SOCKET, SO_ERROR, &error, &len);
		if (error) {
			conn_over(c, error);
			return;
		}
		if (!(events & EPOLLOUT))
			return;
		if (j && c->kind == ECHO_CLIENT) {
			j->connecting--;
			j->open++;
		}
		c->connecting = false;
		progress(c);
		if (!flush_line(c))
			return;
		if (c->kind != SENDER)
			conn_watch(c, EPOLLIN);
		if (j && c->kind == ECHO_CLIENT)
			echo_announce(j);
	}
	switch (c->kind) {
	case LISTEN:
		accept_all(c);
		break;
	case DATAGRAMS:
		give_datagrams_back(c->fd);
		break;
	case ASKED:
		read_request(c);
		break;
	case SENDER:
		if (events & (EPOLLIN | EPOLLERR | EPOLLHUP))
			sender_can_receive(c);
		if (c->kind == SENDER && events & EPOLLOUT)
			sender_can_send(c);
		break;
	case RECEIVER:
		if (flush_line(c)) {
			if (events & EPOLLOUT)
				conn_watch(c, EPOLLIN);
			receiver_can_receive(c);
		}
		break;
	case ECHO_SERVER:
		echo_serve(c);
		break;
	case ECHO_CLIENT:
		if (flush_line(c)) {
			if (events & EPOLLOUT)
				conn_watch(c, EPOLLIN);
			echo_answer(c);
		}
		break;
	case FREE:
		break;
	}
}

static bool resolve(const char *host, const char *port, struct sockaddr_storage *addr, socklen_t *len)
{
	struct in_addr in4;
	struct in6_addr in6;

	memset(addr, 0, sizeof(*addr));
	if (inet_pton(AF_INET, host, &in4) == 1) {
		struct sockaddr_in *sin = (struct sockaddr_in *)addr;

		sin->sin_family = AF_INET;
		sin->sin_addr = in4;
		sin->sin_port = htons(atoi(port));
		*len = sizeof(*sin);
		return true;
	}
	if (inet_pton(AF_INET6, host, &in6) == 1) {
		struct sockaddr_in6 *sin6 = (struct sockaddr_in6 *)addr;

		sin6->sin6_family = AF_INET6;
		sin6->sin6_addr = in6;
		sin6->sin6_port = htons(atoi(port));
		*len = sizeof(*sin6);
		return true;
	}
	return false;
}

static struct conn *conn_open(enum kind kind, const struct sockaddr_storage *addr, socklen_t len)
{
	int fd = socket(addr->ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0), saved;
	struct conn *c;

	if (fd < 0)
		return NULL;
	if (connect(fd, (const struct sockaddr *)addr, len) && errno != EINPROGRESS) {
		saved = errno;
		close(fd);
		errno = saved;
		return NULL;
	}
	c = conn_new(kind, fd, EPOLLOUT);
	if (!c) {
		close(fd);
		errno = EMFILE;
		return NULL;
	}
	c->connecting = true;
	return c;
}

/* Keeps an echo job's connections coming, a few at a time. */
static void echo_start_more(struct job *j)
{
	while (j->started < j->wanted && j->connecting < MAX_CONNECTING) {
		struct conn *c = conn_open(ECHO_CLIENT, &j->addr, j->addr_len);

		j->started++;
		if (!c) {
			j->failed++;
			j->error = errno;
			continue;
		}
		j->connecting++;
		c->job = j->id;
		c->line_len = snprintf(c->line, sizeof(c->line), "echo %d\n", j->id);
	}
	echo_announce(j);
}

/* --- commands ------------------------------------------------------------ */

static void do_exec(int id, const char *command)
{
	char line[LINE_MAX_BYTES];
	FILE *out = popen(command, "r");
	int status;

	if (!out) {
		say("error exec: %s", strerror(errno));
		return;
	}
	while (fgets(line, sizeof(line), out)) {
		line[strcspn(line, "\r\n")] = 0;
		say("out %d %s", id, line);
	}
	status = pclose(out);
	say("exit %d %d", id, WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status));
}

/* A connection of a flood, which has said what it is; -1 with errno. */
static int flood_open(const struct sockaddr_storage *addr, socklen_t len, bool up)
{
	struct timeval patience = { .tv_sec = FLOOD_PATIENCE_MS / 1000 };
	int fd = socket(addr->ss_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
	int error;

	if (fd < 0)
		return -1;
	setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
	setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof(patience));
	if (!connect(fd, (const struct sockaddr *)addr, len) && send(fd, up ? "u" : "d", 1, MSG_NOSIGNAL) == 1)
		return fd;
	error = errno;
	close(fd);
	errno = error;
	return -1;
}

/* The agent does nothing else meanwhile: such a guest has one processor, and what it can do is little enough. */
static void do_flood(int id, const char *host, const char *port, bool up, int64_t duration_ms, int count)
{
	static uint8_t block[1 << 17];
	struct pollfd fds[MAX_FLOOD];
	struct sockaddr_storage addr;
	socklen_t len;
	uint64_t bytes = 0;
	int64_t begun;
	ssize_t n;
	int i, open = 0;

	if (count < 1 || count > MAX_FLOOD || !resolve(host, port, &addr, &len)) {
		say("error %d: bad address, or too many", id);
		return;
	}
	for (; open < count; open++) {
		fds[open].events = up ? POLLOUT : POLLIN;
		fds[open].fd = flood_open(&addr, len, up);
		if (fds[open].fd < 0)
			goto failed;
	}
	begun = now_ms();
	do {
		n = poll(fds, count, FLOOD_PATIENCE_MS);
		if (n <= 0) {
			errno = n ? errno : ETIMEDOUT;
			goto failed;
		}
		for (i = 0; i < count; i++) {
			if (!fds[i].revents)
				continue;
			/* TCP throws away what is received with MSG_TRUNC. */
			n = up ? send(fds[i].fd, block, sizeof(block), MSG_NOSIGNAL | MSG_DONTWAIT)
			       : recv(fds[i].fd, block, sizeof(block), MSG_TRUNC | MSG_DONTWAIT);
			if (n < 0 && errno == EAGAIN)
				continue;
			if (n <= 0) {
				errno = n ? errno : ECONNRESET;
				goto failed;
			}
			bytes += n;
		}
	} while (now_ms() < begun + duration_ms);
	for (i = 0; up && i < count; i++)
		if (shutdown(fds[i].fd, SHUT_WR))
			goto failed;
	for (i = 0; up && i < count; i++)
		if (recv(fds[i].fd, block, 1, 0))
			goto failed;
	say("flooded %d %" PRIu64 " %" PRId64, id, bytes, now_ms() - begun);
	goto out;
failed:
	say("error flood: %s", strerror(errno));
out:
	while (open--)
		close(fds[open].fd);
}

static void do_transfer(bool get, int id, const char *host, const char *port, uint64_t seed, uint64_t bytes,
			uint64_t rate)
{
	struct sockaddr_storage addr;
	socklen_t len;
	struct stream *stream = stream_of(seed);
	struct conn *c;
	struct job *j;

	if (!stream || !resolve(host, port, &addr, &len) || !(j = job_new(id, get ? RECEIVER : SENDER))) {
		say("error %d: bad address, job in use, or too many", id);
		return;
	}
	c = conn_open(j->kind, &addr, len);
	if (!c) {
		j->state = FAILED;
		j->error = errno;
		job_report("done", j);
		return;
	}
	j->conn = c - conns;
	c->job = id;
	c->stream = stream;
	c->limit = bytes;
	c->rate = get ? 0 : rate;
	if (get)
		c->line_len = snprintf(c->line, sizeof(c->line), "get %d %" PRIu64 " %" PRIu64 " %" PRIu64 "\n", id,
				       seed, bytes, rate);
	else
		c->line_len = snprintf(c->line, sizeof(c->line), "put %d %" PRIu64 "\n", id, seed);
}

static void do_check(struct job *j, int timeout_ms)
{
	j->silent = 0;
	j->check_until = now_ms() + timeout_ms;
	for (int i = 0; i < conns_high; i++) {
		struct conn *c = &conns[i];

		if (c->kind != ECHO_CLIENT || c->job != j->id || c->connecting)
			continue;
		if (c->waiting) { /* since a check before this one */
			j->silent++;
			continue;
		}
		c->token = next_token++;
		c->waiting = true;
		j->silent++;
		/* Eight bytes on a connection with nothing else under way fit. */
		if (send(c->fd, &c->token, sizeof(c->token), MSG_NOSIGNAL) != sizeof(c->token)) {
			int64_t until = j->check_until;

			j->check_until = 0; /* the answer comes at the end of the loop */
			conn_over(c, errno);
			j->check_until = until;
		}
	}
	if (!j->silent)
		echo_check_over(j);
}

/* Serve a port, over IPv6 and IPv4: connections, or datagrams. */
static void do_listen(int port, bool datagrams)
{
	struct sockaddr_in6 any = { .sin6_family = AF_INET6, .sin6_port = htons(port) };
	int type = datagrams ? SOCK_DGRAM : SOCK_STREAM;
	int fd = socket(AF_INET6, type | SOCK_NONBLOCK | SOCK_CLOEXEC, 0), one = 1;

	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
	if (fd < 0 || bind(fd, (struct sockaddr *)&any, sizeof(any)) || (!datagrams && listen(fd, 4096)) ||
	    !conn_new(datagrams ? DATAGRAMS : LISTEN, fd, EPOLLIN)) {
		say("error listen: %s", strerror(errno));
		if (fd >= 0)
			close(fd);
		return;
	}
	say(datagrams ? "serving %d" : "listening %d", port);
}

static void drop_job(struct job *j)
{
	for (int i = 0; i < conns_high; i++)
		if (conns[i].kind != FREE && conns[i].job == j->id)
			conn_close(&conns[i]);
	j->used = false;
	say("dropped %d", j->id);
}

static void command(char *line)
{
	char host[128], port[16];
	uint64_t seed, bytes, rate;
	int id, n, count, skip = 0;
	struct job *j;
	char way;

	if (!strcmp(line, "hello")) {
		say("hello 1");
	} else if (sscanf(line, "get %d %127s %15s %" SCNu64 " %" SCNu64 " %" SCNu64, &id, host, port, &seed, &bytes,
			  &rate) == 6) {
		do_transfer(true, id, host, port, seed, bytes, rate);
	} else if (sscanf(line, "put %d %127s %15s %" SCNu64 " %" SCNu64 " %" SCNu64, &id, host, port, &seed, &bytes,
			  &rate) == 6) {
		do_transfer(false, id, host, port, seed, bytes, rate);
	} else if (sscanf(line, "echo %d %127s %15s %d", &id, host, port, &n) == 4) {
		j = job_new(id, ECHO_CLIENT);
		if (!j || !resolve(host, port, &j->addr, &j->addr_len)) {
			say("error %d: bad address, job in use, or too many", id);
			return;
		}
		j->wanted = n;
		echo_start_more(j);
	} else if (sscanf(line, "exec %d %n", &id, &skip) == 1 && skip) {
		do_exec(id, line + skip);
	} else if (sscanf(line, "flood %d %127s %15s %c %d %d", &id, host, port, &way, &n, &count) == 6) {
		do_flood(id, host, port, way == 'u', n, count);
	} else if (sscanf(line, "listen %d", &n) == 1) {
		do_listen(n, false);
	} else if (sscanf(line, "datagrams %d", &n) == 1) {
		do_listen(n, true);
	} else if (sscanf(line, "%*s %d", &id) == 1 && (j = job_of(id))) {
		if (sscanf(line, "check %*d %d", &n) == 1 && j->kind == ECHO_CLIENT) {
			do_check(j, n);
		} else if (!strncmp(line, "status ", 7)) {
			job_report("status", j);
		} else if (!strncmp(line, "stop ", 5)) {
			say("stopped %d", id);
			if (j->conn >= 0 && j->kind == SENDER) {
				conns[j->conn].stop = true;
				conn_watch(&conns[j->conn], EPOLLIN | EPOLLOUT);
			}
		} else if (!strncmp(line, "drop ", 5)) {
			drop_job(j);
		} else {
			say("error not understood: %s", line);
		}
	} else {
		say("error not understood: %s", line);
	}
}

static void control_can_read(void)
{
	static char line[LINE_MAX_BYTES];
	static unsigned len;
	ssize_t n = read(control_fd, buffer, 256);

	for (ssize_t i = 0; i < n; i++) {
		if (buffer[i] == '\n' || buffer[i] == '\r') {
			line[len] = 0;
			if (len)
				command(line);
			len = 0;
		} else if (len < sizeof(line) - 1) {
			line[len++] = buffer[i];
		}
	}
}

/* What happens by the clock. */
static void tick(void)
{
	int64_t now = now_ms();

	for (int i = 0; i < conns_high; i++)
		if (conns[i].kind == SENDER && conns[i].paused) {
			conns[i].paused = false;
			sender_can_send(&conns[i]);
		}
	for (struct job *j = jobs; j < jobs + MAX_JOBS; j++) {
		if (!j->used || j->kind != ECHO_CLIENT)
			continue;
		if (j->started < j->wanted)
			echo_start_more(j);
		if (j->check_until && now >= j->check_until)
			echo_check_over(j);
	}
}

static bool busy(void)
{
	for (int i = 0; i < conns_high; i++)
		if (conns[i].kind == SENDER && conns[i].paused)
			return true;
	for (struct job *j = jobs; j < jobs + MAX_JOBS; j++)
		if (j->used && (j->check_until || j->started < j->wanted))
			return true;
	return false;
}

static void open_control(const char *path)
{
	struct epoll_event ev = { .events = EPOLLIN, .data.u32 = MAX_CONNS };
	struct termios tio;

	control_fd = open(path, O_RDWR | O_NOCTTY | O_CLOEXEC);
	if (control_fd < 0) {
		perror(path);
		exit(1);
	}
	if (!tcgetattr(control_fd, &tio)) {
		cfmakeraw(&tio);
		cfsetspeed(&tio, B115200);
		tio.c_cflag |= CLOCAL;
		tcsetattr(control_fd, TCSANOW, &tio);
	}
	epoll_ctl(epoll_fd, EPOLL_CTL_ADD, control_fd, &ev);
}

int main(int argc, char **argv)
{
	struct rlimit files = { MAX_CONNS + 64, MAX_CONNS + 64 };
	struct epoll_event events[256];

	if (argc != 2) {
		fprintf(stderr, "usage: agent PORT\n");
		return 2;
	}
	setrlimit(RLIMIT_NOFILE, &files);
	signal(SIGPIPE, SIG_IGN);
	crc_init();
	epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	open_control(argv[1]);
	say("hello 1");
	for (;;) {
		int n = epoll_wait(epoll_fd, events, 256, busy() ? TICK_MS : -1);

		for (int i = 0; i < n; i++) {
			if (events[i].data.u32 == MAX_CONNS)
				control_can_read();
			else if (conns[events[i].data.u32].kind != FREE)
				conn_event(&conns[events[i].data.u32], events[i].events);
		}
		tick();
	}
}
