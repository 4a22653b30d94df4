/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * spray syn|udp RATE SECONDS: from a guest, to the whole of 10.0.0.0/8, where nobody answers.
 *
 * Connections that are asked for and left, or datagrams from a new port each. Says how many there were.
 */
#include <arpa/inet.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define KEPT 8192 /* sockets that are open at a time */

static double now(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return ts.tv_sec + ts.tv_nsec / 1e9;
}

int main(int argc, char **argv)
{
	static int kept[KEPT];
	struct rlimit most = { 1 << 17, 1 << 17 };
	struct sockaddr_in to = { .sin_family = AF_INET };
	double rate, seconds, begun = now();
	unsigned long sent = 0, failed = 0;
	int udp;

	if (argc != 4)
		return 2;
	udp = !strcmp(argv[1], "udp");
	rate = atof(argv[2]);
	seconds = atof(argv[3]);
	setrlimit(RLIMIT_NOFILE, &most);
	memset(kept, -1, sizeof(kept));
	while (now() < begun + seconds) {
		int *slot = &kept[(sent + failed) % KEPT];

		if (sent + failed > rate * (now() - begun)) {
			usleep(1000);
			continue;
		}
		if (*slot >= 0)
			close(*slot);
		*slot = socket(AF_INET, (udp ? SOCK_DGRAM : SOCK_STREAM) | SOCK_NONBLOCK, 0);
		to.sin_addr.s_addr = htonl(10u << 24 | (random() & 0xFFFFFF));
		to.sin_port = htons(1 + random() % 65535);
		/* A connection that is only begun is no failure, but says that it is (EINPROGRESS). */
		if (*slot < 0 || (udp && sendto(*slot, "data", 4, 0, (struct sockaddr *)&to, sizeof(to)) < 0)) {
			failed++;
			continue;
		}
		if (!udp)
			connect(*slot, (struct sockaddr *)&to, sizeof(to));
		sent++;
	}
	printf("%lu sent, %lu failed\n", sent, failed);
	return 0;
}
