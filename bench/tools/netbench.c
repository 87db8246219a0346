// SPDX-License-Identifier: Apache-2.0
/*
 * TCP load with one number as the answer.
 *
 *   netbench serve ADDRESS PORT CPU                    serves until killed; prints "ready" when it listens
 *   netbench run MODE ADDRESS PORT MILLISECONDS CPU    prints one JSON object
 *
 * MODE stream: octets that arrived at the server, as Gbit/s. MODE rr: one octet there and one back on one connection, round
 * trips a second, and their latency. MODE connect: connect, one octet there and one back, close; connections a second, and
 * the time from the call of connect until the octet is back. ADDRESS may then be a list with commas: they take turns.
 * The first octet that a client sends names the mode. Server and client are pinned to one CPU each. Exit 1: a system call
 * failed, stderr says which.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netdb.h>
#include <netinet/tcp.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define CHUNK (128 * 1024)
#define SAMPLES (1 << 22)
#define TARGETS 256

static char buffer[CHUNK];
static uint32_t samples[SAMPLES];

static void die(const char *what)
{
	fprintf(stderr, "netbench: %s: %s\n", what, strerror(errno));
	exit(1);
}

static void pin(const char *cpu)
{
	cpu_set_t set;

	CPU_ZERO(&set);
	CPU_SET(atoi(cpu), &set);
	if (sched_setaffinity(0, sizeof(set), &set))
		die("sched_setaffinity");
}

static uint64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static struct addrinfo *resolve(const char *address, const char *port)
{
	struct addrinfo hints = {
		.ai_flags = AI_NUMERICHOST | AI_NUMERICSERV,
		.ai_socktype = SOCK_STREAM,
	};
	struct addrinfo *found;
	int error = getaddrinfo(address, port, &hints, &found);

	if (error) {
		fprintf(stderr, "netbench: %s port %s: %s\n", address, port, gai_strerror(error));
		exit(1);
	}
	return found;
}

static int dial(const struct addrinfo *to, char mode)
{
	int one = 1;
	int fd = socket(to->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);

	if (fd < 0)
		die("socket");
	if (setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one)))
		die("TCP_NODELAY");
	if (connect(fd, to->ai_addr, to->ai_addrlen))
		die("connect");
	if (send(fd, &mode, 1, MSG_NOSIGNAL) != 1)
		die("send");
	return fd;
}

static void serve_stream(int fd)
{
	uint64_t total = 0;
	ssize_t got;

	while ((got = recv(fd, buffer, sizeof(buffer), 0)) > 0)
		total += (uint64_t)got;
	(void)send(fd, &total, sizeof(total), MSG_NOSIGNAL);
}

static void serve_echo(int fd)
{
	char octet;

	while (recv(fd, &octet, 1, 0) == 1 && send(fd, &octet, 1, MSG_NOSIGNAL) == 1)
		;
}

static _Noreturn void serve(const char *address, const char *port)
{
	struct addrinfo *at = resolve(address, port);
	int one = 1;
	int fd = socket(at->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);

	if (fd < 0)
		die("socket");
	if (setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one)))
		die("SO_REUSEADDR");
	if (bind(fd, at->ai_addr, at->ai_addrlen))
		die("bind");
	if (listen(fd, 1024))
		die("listen");
	freeaddrinfo(at);
	puts("ready");
	fflush(stdout);
	for (;;) {
		char mode;
		int peer = accept4(fd, NULL, NULL, SOCK_CLOEXEC);

		if (peer < 0)
			die("accept");
		(void)setsockopt(peer, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
		if (recv(peer, &mode, 1, 0) == 1) {
			if (mode == 's')
				serve_stream(peer);
			else if (mode == 'r')
				serve_echo(peer);
			else if (send(peer, &mode, 1, MSG_NOSIGNAL) == 1)
				(void)recv(peer, &mode, 1, 0); // until the client closed: TIME_WAIT is its own
		}
		close(peer);
	}
}

static void run_stream(const struct addrinfo *to, uint64_t duration)
{
	int fd = dial(to, 's');
	uint64_t start = now_ns();
	uint64_t total;

	while (now_ns() - start < duration)
		if (send(fd, buffer, sizeof(buffer), MSG_NOSIGNAL) < 0)
			die("send");
	if (shutdown(fd, SHUT_WR))
		die("shutdown");
	if (recv(fd, &total, sizeof(total), MSG_WAITALL) != sizeof(total))
		die("recv of the server's count");
	printf("{\"gbit_s\": %.4f}\n", (double)total * 8 / (double)(now_ns() - start));
	close(fd);
}

static int compare(const void *a, const void *b)
{
	uint32_t x = *(const uint32_t *)a;
	uint32_t y = *(const uint32_t *)b;

	return x < y ? -1 : x > y;
}

static void run_rr(const struct addrinfo *to, uint64_t duration)
{
	int fd = dial(to, 'r');
	uint64_t start = now_ns();
	uint64_t last = start;
	size_t count = 0;
	char octet = 'r';

	while (last - start < duration && count < SAMPLES) {
		uint64_t before = last;

		if (send(fd, &octet, 1, MSG_NOSIGNAL) != 1)
			die("send");
		if (recv(fd, &octet, 1, 0) != 1)
			die("recv");
		last = now_ns();
		samples[count++] = (uint32_t)(last - before);
	}
	close(fd);
	qsort(samples, count, sizeof(samples[0]), compare);
	printf("{\"per_s\": %.1f, \"mean_us\": %.4f, \"p50_us\": %.4f, \"p99_us\": %.4f}\n",
	       (double)count * 1e9 / (double)(last - start), (double)(last - start) / 1e3 / (double)count,
	       samples[count / 2] / 1e3, samples[count * 99 / 100] / 1e3);
}

static void run_connect(struct addrinfo *const *to, size_t many, uint64_t duration)
{
	uint64_t start = now_ns();
	uint64_t last = start;
	size_t count = 0;
	char octet;

	while (last - start < duration && count < SAMPLES) {
		uint64_t before = last;
		int fd = dial(to[count % many], 'c');

		if (recv(fd, &octet, 1, 0) != 1)
			die("recv");
		samples[count++] = (uint32_t)(now_ns() - before);
		close(fd);
		last = now_ns();
	}
	qsort(samples, count, sizeof(samples[0]), compare);
	printf("{\"per_s\": %.1f, \"p50_us\": %.4f, \"p99_us\": %.4f}\n", (double)count * 1e9 / (double)(last - start),
	       samples[count / 2] / 1e3, samples[count * 99 / 100] / 1e3);
}

int main(int argc, char **argv)
{
	signal(SIGPIPE, SIG_IGN);
	if (argc == 5 && !strcmp(argv[1], "serve")) {
		pin(argv[4]);
		serve(argv[2], argv[3]);
	}
	if (argc == 7 && !strcmp(argv[1], "run")) {
		struct addrinfo *to[TARGETS];
		size_t many = 0;
		uint64_t duration = strtoull(argv[5], NULL, 10) * 1000000u;

		for (char *name = strtok(argv[3], ","); name && many < TARGETS; name = strtok(NULL, ","))
			to[many++] = resolve(name, argv[4]);
		if (!many)
			goto usage;
		pin(argv[6]);
		if (!strcmp(argv[2], "stream"))
			run_stream(to[0], duration);
		else if (!strcmp(argv[2], "rr"))
			run_rr(to[0], duration);
		else if (!strcmp(argv[2], "connect"))
			run_connect(to, many, duration);
		else
			goto usage;
		while (many)
			freeaddrinfo(to[--many]);
		return 0;
	}
usage:
	fprintf(stderr, "usage: netbench serve ADDRESS PORT CPU\n"
			"       netbench run stream|rr|connect ADDRESS PORT MILLISECONDS CPU\n");
	return 2;
}
