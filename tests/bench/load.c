// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * The loads that Python would be too slow for: new TCP connections as fast as they go, and MPTCP
 * connections at a given rate.
 *
 *   load sink PORT COUNT               accept on COUNT ports from PORT, and reset at once
 *   load connect FILE AT-ONCE SECONDS  connect to what FILE lists ("SOURCE ADDRESS PORT" a line)
 *   load echo PORT COUNT               MPTCP: answer each byte with itself
 *   load mptcp ADDRESS PORT RATE SECONDS HOLD-MS
 *                                      MPTCP connections at RATE, each open for HOLD-MS
 *   load joined ADDRESS PORT COUNT STEP
 *                                      MPTCP connections, one after the other, to PORT, PORT + STEP
 *                                      and so on, each until a second subflow is established
 *
 * Servers run until they are killed and say "serving"; clients print JSON.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define IPPROTO_MPTCP_ 262
#define SOL_MPTCP_ 284
#define MPTCP_TCPINFO_ 2
#define TCP_STATE_ESTABLISHED 1
#define EVENTS 256
#define JOIN_SECONDS 5

static void fail(const char *what)
{
	perror(what);
	exit(1);
}

/*
 * Each end on a processor of its own, where there are two: otherwise it is the scheduler's choice
 * that is measured, which changes from run to run.
 */
static void stay_on(int processor)
{
	cpu_set_t set;

	CPU_ZERO(&set);
	CPU_SET(processor % sysconf(_SC_NPROCESSORS_ONLN), &set);
	sched_setaffinity(0, sizeof(set), &set);
}

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec + t.tv_nsec / 1e9;
}

static struct sockaddr_in address_of(const char *text, int port)
{
	struct sockaddr_in made = { .sin_family = AF_INET, .sin_port = htons(port) };

	if (inet_pton(AF_INET, text, &made.sin_addr) != 1) {
		fprintf(stderr, "%s is no address\n", text);
		exit(2);
	}
	return made;
}

/* Close without a FIN: neither end keeps the connection in TIME_WAIT. */
static void reset(int fd)
{
	struct linger none = { .l_onoff = 1, .l_linger = 0 };

	setsockopt(fd, SOL_SOCKET, SO_LINGER, &none, sizeof(none));
	close(fd);
}

static void watch(int poll, int fd, int operation, uint32_t events, uint64_t data)
{
	struct epoll_event event = { .events = events, .data.u64 = data };

	if (epoll_ctl(poll, operation, fd, &event))
		fail("epoll_ctl");
}

static int listen_on(int protocol, int port)
{
	struct sockaddr_in any = { .sin_family = AF_INET, .sin_port = htons(port) };
	int one = 1, fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, protocol);

	if (fd < 0)
		fail("socket");
	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
	if (bind(fd, (struct sockaddr *)&any, sizeof(any)) || listen(fd, 4096))
		fail("listen");
	return fd;
}

__attribute__((noreturn))
static void serve(int protocol, int port, int count)
{
	struct epoll_event events[EVENTS];
	int first = -1, last = -1, poll = epoll_create1(0);

	for (int n = 0; n < count; n++) {
		last = listen_on(protocol, port + n);
		if (n == 0)
			first = last;
		watch(poll, last, EPOLL_CTL_ADD, EPOLLIN, last);
	}
	puts("serving");
	fflush(stdout);
	for (;;) {
		int ready = epoll_wait(poll, events, EVENTS, -1);

		for (int n = 0; n < ready; n++) {
			int fd = events[n].data.u64, accepted;
			char data[512];
			ssize_t got;

			if (fd >= first && fd <= last) {
				while ((accepted = accept4(fd, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
					if (protocol == IPPROTO_TCP)
						reset(accepted);
					else
						watch(poll, accepted, EPOLL_CTL_ADD, EPOLLIN, accepted);
				}
				continue;
			}
			got = read(fd, data, sizeof(data));
			if (got > 0)
				got = write(fd, data, got);
			else if (got == 0 || errno != EAGAIN)
				close(fd);
		}
	}
}

struct target {
	struct sockaddr_in from, to;
};

static void begin(int poll, const struct target *targets, int count)
{
	const struct target *target = &targets[random() % count];
	int one = 1, fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, IPPROTO_TCP);

	if (fd < 0)
		fail("socket");
	/* The port is chosen by connect(), which looks at the whole four-tuple. */
	setsockopt(fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &one, sizeof(one));
	if (bind(fd, (struct sockaddr *)&target->from, sizeof(target->from)))
		fail("bind");
	if (connect(fd, (struct sockaddr *)&target->to, sizeof(target->to)) &&
	    errno != EINPROGRESS)
		fail("connect");
	watch(poll, fd, EPOLL_CTL_ADD, EPOLLIN | EPOLLRDHUP, fd);
}

static int connect_load(const char *file, int at_once, double seconds)
{
	struct epoll_event events[EVENTS];
	struct target *targets = NULL;
	int count = 0, room = 0, port, open = 0, poll = epoll_create1(0);
	long done = 0, failed = 0;
	char from[64], to[64];
	FILE *stream = fopen(file, "r");
	double start, end;

	if (!stream)
		fail(file);
	while (fscanf(stream, "%63s %63s %d", from, to, &port) == 3) {
		if (count == room) {
			room = room ? 2 * room : 1024;
			targets = realloc(targets, room * sizeof(*targets));
			if (!targets)
				fail("realloc");
		}
		targets[count].from = address_of(from, 0);
		targets[count++].to = address_of(to, port);
	}
	fclose(stream);
	srandom(getpid());
	for (start = now(); open < at_once; open++)
		begin(poll, targets, count);
	while (open && now() < start + seconds) {
		int ready = epoll_wait(poll, events, EVENTS, 100);

		for (int n = 0; n < ready; n++) {
			int fd = events[n].data.u64, error = 0;
			socklen_t length = sizeof(error);

			/* The server's reset is what ends a connection that was accepted. */
			getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &length);
			if (error == ECONNRESET)
				done++;
			else
				failed++;
			reset(fd);
			begin(poll, targets, count);
		}
	}
	end = now();
	printf("{\"connections\": %ld, \"failed\": %ld, \"seconds\": %.6f}\n",
	       done, failed, end - start);
	return 0;
}

struct connection {
	int fd;
	double opened;
	int answered;
};

/* How many subflows of the connection are established. */
static int established_subflows(int fd)
{
	struct {
		uint32_t head, subflows, kernel, user;
		uint8_t info[8][104];
	} __attribute__((aligned(8))) data = { .head = 16, .user = 104 };
	socklen_t length = sizeof(data);
	int found = 0;

	if (getsockopt(fd, SOL_MPTCP_, MPTCP_TCPINFO_, &data, &length))
		return 0;
	for (uint32_t n = 0; n < data.subflows && n < 8; n++)
		found += data.info[n][0] == TCP_STATE_ESTABLISHED;
	return found;
}

static int mptcp_load(const char *address, int port, double rate, double seconds, double hold)
{
	long total = rate * seconds, opened = 0, closed = 0;
	long answered = 0, refused = 0, single = 0, several = 0;
	struct connection *all = calloc(total, sizeof(*all));
	struct sockaddr_in to = address_of(address, port);
	struct epoll_event events[EVENTS];
	int poll = epoll_create1(0);
	double start = now(), latest = 0, opening_ended = start;

	if (!all)
		fail("calloc");
	while (closed < total) {
		double time = now();

		while (opened < total && start + opened / rate <= time) {
			struct connection *each = &all[opened];

			if (time - (start + opened / rate) > latest)
				latest = time - (start + opened / rate);
			each->opened = now();
			each->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, IPPROTO_MPTCP_);
			if (each->fd < 0)
				fail("socket");
			if (connect(each->fd, (struct sockaddr *)&to, sizeof(to)) &&
			    errno != EINPROGRESS)
				fail("connect");
			watch(poll, each->fd, EPOLL_CTL_ADD, EPOLLOUT, opened);
			opened++;
			opening_ended = now();
		}
		while (closed < opened && all[closed].opened + hold <= time) {
			int subflows = established_subflows(all[closed].fd);

			if (all[closed].answered && subflows >= 2)
				several++;
			else if (all[closed].answered)
				single++;
			close(all[closed].fd);
			all[closed++].fd = -1;
		}
		int ready = epoll_wait(poll, events, EVENTS, 1);

		for (int n = 0; n < ready; n++) {
			uint64_t number = events[n].data.u64;
			int fd = all[number].fd;
			char byte = 'x';

			if (fd < 0)
				continue;
			if (events[n].events & EPOLLIN) {
				if (read(fd, &byte, 1) == 1 && !all[number].answered) {
					all[number].answered = 1;
					answered++;
				}
				watch(poll, fd, EPOLL_CTL_MOD, 0, number);
			} else if (events[n].events & EPOLLOUT) {
				if (write(fd, &byte, 1) != 1)
					refused++;
				watch(poll, fd, EPOLL_CTL_MOD, EPOLLIN, number);
			} else {
				watch(poll, fd, EPOLL_CTL_DEL, 0, number);
				refused++;
			}
		}
	}
	printf("{\"opened\": %ld, \"answered\": %ld, \"refused\": %ld, \"without_detour\": %ld, "
	       "\"with_detour\": %ld, \"seconds\": %.6f, \"latest_ms\": %.3f}\n",
	       opened, answered, refused, single, several, opening_ended - start, latest * 1000);
	return 0;
}

static int joined_load(const char *address, int port, int count, int step)
{
	const struct timespec a_little = { .tv_nsec = 2000000 };
	int opened = 0, joined = 0;

	for (; opened < count; opened++) {
		struct sockaddr_in to = address_of(address, port + opened * step);
		int fd = socket(AF_INET, SOCK_STREAM, IPPROTO_MPTCP_);
		char byte = 'x';
		double start;

		if (fd < 0)
			fail("socket");
		if (connect(fd, (struct sockaddr *)&to, sizeof(to)))
			fail("connect");
		if (write(fd, &byte, 1) != 1 || read(fd, &byte, 1) != 1)
			fail("echo");
		for (start = now(); now() < start + JOIN_SECONDS;) {
			if (established_subflows(fd) >= 2) {
				joined++;
				break;
			}
			nanosleep(&a_little, NULL);
		}
		close(fd);
	}
	printf("{\"opened\": %d, \"joined\": %d}\n", opened, joined);
	return 0;
}

int main(int argc, char **argv)
{
	const char *mode = argc > 1 ? argv[1] : "";
	struct rlimit files = { 1 << 18, 1 << 18 };

	if (setrlimit(RLIMIT_NOFILE, &files))
		perror("setrlimit");
	if (!strcmp(mode, "sink") && argc == 4) {
		stay_on(1);
		serve(IPPROTO_TCP, atoi(argv[2]), atoi(argv[3]));
	}
	if (!strcmp(mode, "connect") && argc == 5) {
		stay_on(0);
		return connect_load(argv[2], atoi(argv[3]), atof(argv[4]));
	}
	if (!strcmp(mode, "echo") && argc == 4)
		serve(IPPROTO_MPTCP_, atoi(argv[2]), atoi(argv[3]));
	if (!strcmp(mode, "mptcp") && argc == 7)
		return mptcp_load(argv[2], atoi(argv[3]), atof(argv[4]), atof(argv[5]),
				  atof(argv[6]) / 1000);
	if (!strcmp(mode, "joined") && argc == 6)
		return joined_load(argv[2], atoi(argv[3]), atoi(argv[4]), atoi(argv[5]));
	fprintf(stderr, "usage: see the top of load.c\n");
	return 2;
}
