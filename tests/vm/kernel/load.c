// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * MPTCP connections for the kernel's tests.
 *
 *   load serve PORT COUNT          answer each byte with itself, on COUNT ports from PORT, both
 *                                  families; now and then close or reset instead. Says "serving"
 *   load hold ADDRESS PORT COUNT   open COUNT connections, exchange a byte, say "ready", and
 *                                  exchange another twice a second, until killed
 *   load churn SECONDS SEED PORT COUNT ADDRESS...
 *                                  open, use and end connections in every way there is; prints
 *                                  how many of each
 *                                  (with FAIL=1, its allocations fail as failslab says)
 *   load once ADDRESS PORT SIZE [tcp]
 *                                  send SIZE bytes and get them back: says "equal"
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#include "let_fail.h"

#define IPPROTO_MPTCP_ 262
#define POOL 12

enum ending { CLOSE, RESET, AGAIN, SHUT_WRITE, UNREAD, SHUT_BOTH, EARLY, ENDINGS };
static const char *const names[] = {
	"close", "reset", "again", "shut-write", "unread", "shut-both", "early",
};

static void fail(const char *what)
{
	perror(what);
	exit(1);
}

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec + t.tv_nsec / 1e9;
}

static socklen_t address_of(const char *text, int port, struct sockaddr_storage *made)
{
	struct sockaddr_in6 *v6 = (void *)made;
	struct sockaddr_in *v4 = (void *)made;

	memset(made, 0, sizeof(*made));
	if (inet_pton(AF_INET, text, &v4->sin_addr) == 1) {
		v4->sin_family = AF_INET;
		v4->sin_port = htons(port);
		return sizeof(*v4);
	}
	if (inet_pton(AF_INET6, text, &v6->sin6_addr) == 1) {
		v6->sin6_family = AF_INET6;
		v6->sin6_port = htons(port);
		return sizeof(*v6);
	}
	fprintf(stderr, "%s is no address\n", text);
	exit(2);
}

static void reset(int fd)
{
	struct linger none = { .l_onoff = 1, .l_linger = 0 };

	setsockopt(fd, SOL_SOCKET, SO_LINGER, &none, sizeof(none));
	close(fd);
}

static int open_socket(int family, int protocol)
{
	struct timeval patience = { .tv_sec = 3 };
	int fd = socket(family, SOCK_STREAM, protocol);

	if (fd < 0)
		return -1;
	setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
	setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof(patience));
	return fd;
}

/* A byte there and back: with its acknowledgement the connection is fully established. */
static int exchange(int fd)
{
	char byte = 'x';

	return send(fd, &byte, 1, MSG_NOSIGNAL) == 1 && recv(fd, &byte, 1, 0) == 1;
}

static void serve(int port, int count)
{
	int poller = epoll_create1(0), i, n, fd, one = 1;
	struct epoll_event event, events[64];
	static int listener[65536];
	char bytes[65536];
	ssize_t got;

	for (i = 0; i < count; i++) {
		struct sockaddr_in6 any = { .sin6_family = AF_INET6, .sin6_port = htons(port + i) };

		fd = socket(AF_INET6, SOCK_STREAM | SOCK_NONBLOCK, IPPROTO_MPTCP_);
		if (fd < 0)
			fail("socket");
		setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
		if (bind(fd, (void *)&any, sizeof(any)) || listen(fd, 4096))
			fail("listen");
		listener[fd] = 1;
		event = (struct epoll_event){ .events = EPOLLIN, .data.fd = fd };
		epoll_ctl(poller, EPOLL_CTL_ADD, fd, &event);
	}
	puts("serving");
	fflush(stdout);
	for (;;) {
		n = epoll_wait(poller, events, 64, -1);
		for (i = 0; i < n; i++) {
			fd = events[i].data.fd;
			if (listener[fd]) {
				fd = accept4(fd, NULL, NULL, SOCK_NONBLOCK);
				if (fd < 0)
					continue;
				event = (struct epoll_event){ .events = EPOLLIN, .data.fd = fd };
				epoll_ctl(poller, EPOLL_CTL_ADD, fd, &event);
				continue;
			}
			got = read(fd, bytes, sizeof(bytes));
			/* Single bytes are those of the churn. */
			if (got <= 0 || (got == 8 && random() % 4 == 0))
				close(fd);
			else if (got == 8 && random() % 4 == 0)
				reset(fd);
			else
				for (ssize_t sent = 0, more; sent < got; sent += more) {
					struct pollfd room = { .fd = fd, .events = POLLOUT };

					more = send(fd, bytes + sent, got - sent, MSG_NOSIGNAL);
					if (more < 0 && errno != EAGAIN)
						break;
					if (more < 0) {
						more = 0;
						poll(&room, 1, 1000);
					}
				}
		}
	}
}

static void hold(const char *address, int port, int count)
{
	struct sockaddr_storage to;
	socklen_t length = address_of(address, port, &to);
	int i, *fds = calloc(count, sizeof(*fds));

	for (i = 0; i < count; i++) {
		fds[i] = open_socket(to.ss_family, IPPROTO_MPTCP_);
		if (fds[i] < 0 || connect(fds[i], (void *)&to, length) || !exchange(fds[i]))
			fail("connect");
	}
	puts("ready");
	fflush(stdout);
	for (;;) {
		usleep(500000);
		for (i = 0; i < count; i++)
			if (!exchange(fds[i]))
				fail("exchange");
	}
}

static void churn(double seconds, unsigned int seed, int port, int count, char **addresses)
{
	int number = 0, pool[POOL], ended[ENDINGS] = { 0 }, made = 0, refused = 0, i, how;
	struct sockaddr unspecified = { .sa_family = AF_UNSPEC };
	struct sockaddr_storage to[POOL];
	double end = now() + seconds;
	socklen_t length = 0;
	char bytes[8] = "unread.";

	while (addresses[number])
		number++;
	let_fail("1");
	srandom(seed);
	memset(pool, -1, sizeof(pool));
	while (now() < end) {
		i = random() % POOL;
		if (pool[i] < 0) {
			length = address_of(addresses[random() % number], port + random() % count,
					    &to[i]);
			pool[i] = open_socket(to[i].ss_family, IPPROTO_MPTCP_);
			if (pool[i] < 0 || connect(pool[i], (void *)&to[i], length)) {
				refused++;
				close(pool[i]);
				pool[i] = -1;
				usleep(10000);
				continue;
			}
			made++;
			if (random() % 8 == 0) {
				ended[EARLY]++;
				random() % 2 ? close(pool[i]) : reset(pool[i]);
				pool[i] = -1;
			}
			continue;
		}
		if (random() % 4) {
			if (exchange(pool[i]))
				continue;
			close(pool[i]);
			pool[i] = -1;
			continue;
		}
		how = random() % EARLY;
		ended[how]++;
		switch (how) {
		case RESET:
			reset(pool[i]);
			break;
		case AGAIN:
			length = to[i].ss_family == AF_INET ? sizeof(struct sockaddr_in) :
							      sizeof(struct sockaddr_in6);
			connect(pool[i], &unspecified, sizeof(unspecified));
			if (!connect(pool[i], (void *)&to[i], length) && exchange(pool[i]))
				continue; /* it stays */
			close(pool[i]);
			break;
		case SHUT_WRITE:
			shutdown(pool[i], SHUT_WR);
			while (recv(pool[i], bytes, sizeof(bytes), 0) > 0)
				;
			close(pool[i]);
			break;
		case UNREAD:
			send(pool[i], bytes, sizeof(bytes), MSG_NOSIGNAL);
			usleep(random() % 20000);
			close(pool[i]);
			break;
		case SHUT_BOTH:
			shutdown(pool[i], SHUT_RDWR);
			/* fall through */
		default:
			close(pool[i]);
		}
		pool[i] = -1;
	}
	let_fail("0");
	printf("made=%d refused=%d", made, refused);
	for (i = 0; i < ENDINGS; i++)
		printf(" %s=%d", names[i], ended[i]);
	puts("");
}

static void once(const char *address, int port, size_t size, int protocol)
{
	struct sockaddr_storage to;
	socklen_t length = address_of(address, port, &to);
	size_t sent = 0, back = 0, i;
	char *out = malloc(size), *in = malloc(size);
	int fd = open_socket(to.ss_family, protocol);
	ssize_t more;

	for (i = 0; i < size; i++)
		out[i] = random();
	if (fd < 0 || connect(fd, (void *)&to, length))
		fail("connect");
	while (back < size) {
		struct pollfd ready = { .fd = fd, .events = POLLIN | (sent < size ? POLLOUT : 0) };

		if (poll(&ready, 1, 30000) != 1)
			fail("poll");
		if (ready.revents & POLLOUT) {
			more = send(fd, out + sent, size - sent, MSG_NOSIGNAL | MSG_DONTWAIT);
			if (more < 0 && errno != EAGAIN)
				fail("send");
			sent += more > 0 ? more : 0;
		}
		if (ready.revents & ~POLLOUT) {
			more = recv(fd, in + back, size - back, 0);
			if (more <= 0)
				fail("recv");
			back += more;
		}
	}
	puts(memcmp(in, out, size) ? "different" : "equal");
	close(fd);
}

int main(int count, char **arguments)
{
	signal(SIGPIPE, SIG_IGN);
	if (count == 4 && !strcmp(arguments[1], "serve"))
		serve(atoi(arguments[2]), atoi(arguments[3]));
	else if (count == 5 && !strcmp(arguments[1], "hold"))
		hold(arguments[2], atoi(arguments[3]), atoi(arguments[4]));
	else if (count >= 7 && !strcmp(arguments[1], "churn"))
		churn(atof(arguments[2]), atoi(arguments[3]), atoi(arguments[4]),
		      atoi(arguments[5]), arguments + 6);
	else if (count >= 5 && !strcmp(arguments[1], "once"))
		once(arguments[2], atoi(arguments[3]), atoi(arguments[4]),
		     count > 5 ? 0 : IPPROTO_MPTCP_);
	else
		return 2;
	return 0;
}
