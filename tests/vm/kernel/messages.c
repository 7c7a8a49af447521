// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Messages for the kernel's DETOUR family, many and wrong ones.
 *
 *   messages list                   how many entries there are
 *   messages flush                  remove them all
 *   messages churn SECONDS SEED FILE
 *                                   add, delete, look at and list the entries of FILE at random,
 *                                   with and without a lifetime ("nat ADDRESS PORT ADDRESS PORT" or
 *                                   "vpn INTERFACE" a line); prints what was answered how often
 *   messages listen                 join and leave the group and the namespace's requests, until
 *                                   killed by SIGTERM; prints how many were heard
 *   messages fuzz COUNT SEED        random messages; prints what was answered how often
 *   messages nth COUNT FILE         each command of the first and the last entry of FILE, and a new
 *                                   network namespace now and then, with each of their first COUNT
 *                                   allocations failing (for namespaces: one of the first 400)
 *
 * FAIL=1 in the environment: allocations of the churn fail as /sys/kernel/debug/failslab says.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/genetlink.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "let_fail.h"

enum { ECHO = 1, ADD, DEL, REQ, STAT, GET };
enum { DETOUR_IP = 1, DETOUR_PORT, REMOTE_IP, REMOTE_PORT, IFNAME, DETOUR_IP6, REMOTE_IP6,
       LIFETIME, STATS };

struct message {
	struct nlmsghdr head;
	struct genlmsghdr command;
	char attributes[8000];
};

static int nl, family, group;
static uint32_t sequence;
static volatile sig_atomic_t stopped;

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

static void start(struct message *m, int type, int command, int flags)
{
	m->head = (struct nlmsghdr){ .nlmsg_len = NLMSG_LENGTH(GENL_HDRLEN), .nlmsg_type = type,
		.nlmsg_flags = NLM_F_REQUEST | flags, .nlmsg_seq = ++sequence };
	m->command = (struct genlmsghdr){ .cmd = command, .version = 1 };
}

static void put(struct message *m, int type, const void *value, int length)
{
	struct nlattr *a = (void *)((char *)m + NLMSG_ALIGN(m->head.nlmsg_len));

	a->nla_type = type;
	a->nla_len = NLA_HDRLEN + length;
	memcpy(a + 1, value, length);
	memset((char *)(a + 1) + length, 0, NLA_ALIGN(length) - length);
	m->head.nlmsg_len = NLMSG_ALIGN(m->head.nlmsg_len) + NLA_ALIGN(a->nla_len);
}

static int connected(void)
{
	struct sockaddr_nl us = { .nl_family = AF_NETLINK };
	struct timeval patience = { .tv_sec = 20 };
	int fd = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_GENERIC), one = 1;

	if (fd < 0)
		return -1;
	setsockopt(fd, SOL_NETLINK, NETLINK_EXT_ACK, &one, sizeof(one));
	setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
	if (bind(fd, (void *)&us, sizeof(us))) {
		close(fd);
		return -1;
	}
	return fd;
}

/*
 * The answer to the message: 0 or an error number. For a list: how many entries it had, negative
 * when it broke off.
 */
static int ask(struct message *m, struct message *got)
{
	int dump = (m->head.nlmsg_flags & NLM_F_DUMP) == NLM_F_DUMP, found = 0;
	static char buffer[1 << 17];

	if (send(nl, m, m->head.nlmsg_len, 0) < 0)
		return dump ? -errno : errno;
	for (;;) {
		ssize_t length = recv(nl, buffer, sizeof(buffer), 0);

		if (length < 0)
			return dump ? -errno : errno;
		for (struct nlmsghdr *h = (void *)buffer; NLMSG_OK(h, length);
		     h = NLMSG_NEXT(h, length)) {
			struct nlmsgerr *answer = NLMSG_DATA(h);

			if (h->nlmsg_seq != m->head.nlmsg_seq)
				continue;
			if (h->nlmsg_type == NLMSG_ERROR)
				return dump ? answer->error : -answer->error;
			if (h->nlmsg_type == NLMSG_DONE)
				return found;
			if (got)
				memcpy(got, h, h->nlmsg_len < sizeof(*got) ? h->nlmsg_len :
									     sizeof(*got));
			found++;
		}
	}
}

static void find_family(void)
{
	struct message m, got;
	struct nlattr *a, *b, *c;

	nl = connected();
	start(&m, GENL_ID_CTRL, CTRL_CMD_GETFAMILY, NLM_F_ACK);
	put(&m, CTRL_ATTR_FAMILY_NAME, "DETOUR", 7);
	if (nl < 0 || ask(&m, &got))
		fail("DETOUR");
#define EACH(a, from, length) \
	a = (void *)(from); (char *)a < (char *)(from) + (length); \
	a = (void *)((char *)a + NLA_ALIGN(a->nla_len))
	for (EACH(a, got.attributes, got.head.nlmsg_len - NLMSG_LENGTH(GENL_HDRLEN))) {
		if (a->nla_type == CTRL_ATTR_FAMILY_ID)
			family = *(uint16_t *)(a + 1);
		if (a->nla_type != CTRL_ATTR_MCAST_GROUPS)
			continue;
		for (EACH(b, a + 1, a->nla_len - NLA_HDRLEN))
			for (EACH(c, b + 1, b->nla_len - NLA_HDRLEN))
				if (c->nla_type == CTRL_ATTR_MCAST_GRP_ID)
					group = *(uint32_t *)(c + 1);
	}
}

static int list(void)
{
	struct message m;

	start(&m, family, GET, NLM_F_DUMP);
	return ask(&m, NULL);
}

static void flush(void)
{
	struct message m, got;

	for (;;) {
		start(&m, family, GET, NLM_F_DUMP);
		if (ask(&m, &got) <= 0)
			return;
		/* The last one of the list, without what a name has not. */
		start(&m, family, DEL, NLM_F_ACK);
		for (struct nlattr *a, *end = (void *)((char *)&got + got.head.nlmsg_len),
		     *from = (void *)got.attributes; (a = from) < end;
		     from = (void *)((char *)a + NLA_ALIGN(a->nla_len)))
			if (a->nla_type < LIFETIME)
				put(&m, a->nla_type, a + 1, a->nla_len - NLA_HDRLEN);
		ask(&m, NULL);
	}
}

struct entry {
	int family; /* 0: an interface */
	char detour[16], remote[16], interface[32];
	uint16_t detour_port, remote_port;
};

static int read_entries(const char *path, struct entry *entries, int most)
{
	char kind[8], detour[64], remote[64];
	FILE *file = fopen(path, "r");
	int number = 0;

	if (!file)
		fail(path);
	for (; number < most && fscanf(file, "%7s %63s", kind, detour) == 2; number++) {
		struct entry *e = &entries[number];
		int port, remote_port;

		memset(e, 0, sizeof(*e));
		if (!strcmp(kind, "vpn")) {
			snprintf(e->interface, sizeof(e->interface), "%.15s", detour);
			continue;
		}
		if (fscanf(file, "%d %63s %d", &port, remote, &remote_port) != 3)
			fail("entry");
		e->family = strchr(detour, ':') ? AF_INET6 : AF_INET;
		inet_pton(e->family, detour, e->detour);
		inet_pton(e->family, remote, e->remote);
		e->detour_port = htons(port);
		e->remote_port = htons(remote_port);
	}
	fclose(file);
	return number;
}

static void put_entry(struct message *m, const struct entry *e)
{
	int size = e->family == AF_INET6 ? 16 : 4;

	if (!e->family) {
		put(m, IFNAME, e->interface, strlen(e->interface) + random() % 2);
		return;
	}
	put(m, size == 4 ? DETOUR_IP : DETOUR_IP6, e->detour, size);
	put(m, DETOUR_PORT, &e->detour_port, 2);
	put(m, size == 4 ? REMOTE_IP : REMOTE_IP6, e->remote, size);
	put(m, REMOTE_PORT, &e->remote_port, 2);
}

static int answers[7][200]; /* by command and error number */

static void tell(void)
{
	static const char *const names[] = { "", "echo", "add", "del", "req", "stat", "get" };
	const char *between = "";

	for (int command = 0; command < 7; command++)
		for (int error = 0; error < 200; error++)
			if (answers[command][error]) {
				printf("%s%s.%s=%d", between, names[command],
				       error ? strerrorname_np(error) : "OK",
				       answers[command][error]);
				between = " ";
			}
	puts("");
}

static void churn(double seconds, int seed, const char *path)
{
	static struct entry entries[4096];
	int number = read_entries(path, entries, 4096), answer;
	double end = now() + seconds;
	struct message m;

	let_fail("1");
	srandom(seed);
	while (now() < end && !stopped) {
		struct entry *e = &entries[random() % number];
		uint32_t lifetime = random() % 3;
		int command = (int[]){ ADD, ADD, ADD, DEL, DEL, STAT, STAT, GET }[random() % 8];

		if (command == GET) {
			answer = list();
			answers[GET][answer < 0 ? -answer : 0]++;
			continue;
		}
		start(&m, family, command, NLM_F_ACK);
		put_entry(&m, e);
		if (command == ADD && random() % 4)
			put(&m, LIFETIME, &lifetime, 4);
		answer = ask(&m, NULL);
		answers[command][answer < 200 ? answer : 0]++;
		if (random() % 4 == 0)
			usleep(random() % 5000);
	}
	let_fail("0");
	tell();
}

static void stop(int signal_)
{
	(void)signal_;
	stopped = 1;
}

static void listen_(void)
{
	long heard = 0, joins = 0, errors = 0;
	char buffer[8192];

	signal(SIGTERM, stop);
	while (!stopped) {
		int fd = connected();
		double until = now() + 0.2 + random() % 100 / 50.0;

		if (fd < 0 || setsockopt(fd, SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, &group,
					 sizeof(group))) {
			errors++;
			close(fd);
			continue;
		}
		joins++;
		while (!stopped && now() < until) {
			struct pollfd ready = { .fd = fd, .events = POLLIN };

			if (poll(&ready, 1, 100) == 1 && recv(fd, buffer, sizeof(buffer), 0) > 0)
				heard++;
		}
		close(fd);
	}
	printf("heard=%ld joins=%ld errors=%ld\n", heard, joins, errors);
}

/* Something of that type that may well be right. */
static int value_of(int type, char *value)
{
	static const char *const interfaces[] = { "lo", "tun0", "tun1", "eth0", "nonesuch", "" };
	static const char *const v6[] = { "dead:beef:1::2", "dead:beef:2::1", "::ffff:10.0.2.1",
					  "ff02::1", "::", "fe80::1" };
	static const char *const v4[] = { "10.0.1.2", "10.0.2.1", "127.0.0.1", "224.0.0.1",
					  "0.0.0.0", "255.255.255.255" };
	uint32_t lifetime = (uint32_t[]){ 0, 1, 1, 2, 604800, 604801, ~0u }[random() % 7];
	uint16_t ports[] = { 5001, 5002, 8000, 8001, 0, 65535 };
	uint16_t port = htons(ports[random() % 6]);

	switch (type) {
	case DETOUR_IP: case REMOTE_IP:
		inet_pton(AF_INET, v4[random() % (random() % 3 ? 2 : 6)], value);
		return 4;
	case DETOUR_IP6: case REMOTE_IP6:
		inet_pton(AF_INET6, v6[random() % (random() % 3 ? 2 : 6)], value);
		return 16;
	case DETOUR_PORT: case REMOTE_PORT:
		memcpy(value, &port, 2);
		return 2;
	case IFNAME:
		strcpy(value, interfaces[random() % 6]);
		return strlen(value) + random() % 2;
	case LIFETIME:
		memcpy(value, &lifetime, 4);
		return 4;
	}
	return random() % 40;
}

static void random_attributes(struct message *m, int command)
{
	static const int ways[][5] = {
		{ DETOUR_IP, DETOUR_PORT, REMOTE_IP, REMOTE_PORT, LIFETIME },
		{ DETOUR_IP6, DETOUR_PORT, REMOTE_IP6, REMOTE_PORT, LIFETIME },
		{ IFNAME, LIFETIME, 0, 0, 0 },
	};
	const int *way = ways[random() % 3];
	int number = random() % 8, i, j, type, length;
	char value[8192];

	for (i = 0; i < (random() % 3 ? 5 : number); i++) {
		/* One third as they should be, with a wrong one now and then. */
		type = i < 5 ? way[i] : 0;
		if (!type || random() % 16 == 0)
			type = random() % 14;
		if (type == LIFETIME && command != ADD && random() % 8)
			continue;
		for (j = 0; j < 40; j++)
			value[j] = random();
		length = value_of(type, value);
		if (random() % 32 == 0)
			length = random() % 40;
		if (random() % 1024 == 0)
			memset(value, random(), length = random() % 1500);
		if (random() % 64 == 0)
			type |= random() % 2 ? NLA_F_NESTED : NLA_F_NET_BYTEORDER;
		put(m, type, value, length);
		if (random() % 64 == 0) { /* a length that lies */
			char *a = (char *)m + m->head.nlmsg_len - NLA_ALIGN(length) - NLA_HDRLEN;

			((struct nlattr *)a)->nla_len = random() % 100;
		}
	}
}

static void fuzz(int count, int seed)
{
	int passive = connected(), drained, i;
	struct sockaddr_nl kernel = { .nl_family = AF_NETLINK };
	static char buffer[1 << 17];

	srandom(seed);
	setsockopt(passive, SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, &group, sizeof(group));
	for (i = 0; i < count; i++) {
		/* in a message, and a buffer for what is longer than it says */
		static union { struct message m; char bytes[16384]; } it;
		struct message *m = &it.m;
		int command = random() % 8 ? 1 + random() % 6 : random() % 256;
		size_t length;

		start(m, family, command, NLM_F_ACK);
		if (command == ECHO && random() % 64) /* it writes to the log */
			m->command.cmd = command = ADD;
		if (command == GET || random() % 16 == 0)
			m->head.nlmsg_flags |= NLM_F_DUMP;
		if (random() % 32 == 0)
			m->head.nlmsg_flags = random();
		if (random() % 32 == 0)
			m->command.version = random();
		if (random() % 32 == 0)
			m->command.reserved = random();
		random_attributes(m, command);
		length = NLMSG_ALIGN(m->head.nlmsg_len);
		if (random() % 16 == 0)
			length = random() % (length + 1);
		if (random() % 16 == 0) /* mostly the message's length as is sent */
			m->head.nlmsg_len = random() % (length + 50);
		else if (random() % 2)
			m->head.nlmsg_len = length;
		if (random() % 64 == 0)
			for (int j = 0; j < 4; j++)
				it.bytes[random() % 100] = random();
		if (random() % 256 == 0)
			m->head.nlmsg_type = family;
		/* to the kernel, whatever was made of it; to no other family */
		if (m->head.nlmsg_type != family && m->head.nlmsg_type > NLMSG_OVERRUN)
			m->head.nlmsg_type = family;
		sendto(nl, m, length, MSG_DONTWAIT, (void *)&kernel, sizeof(kernel));
		while ((drained = recv(nl, buffer, sizeof(buffer), MSG_DONTWAIT)) > 0) {
			ssize_t left = drained;

			for (struct nlmsghdr *h = (void *)buffer; NLMSG_OK(h, left);
			     h = NLMSG_NEXT(h, left)) {
				int error = -((struct nlmsgerr *)NLMSG_DATA(h))->error;

				if (h->nlmsg_type == NLMSG_ERROR && error >= 0 && error < 200)
					answers[h->nlmsg_seq == sequence && command < 7 ?
						command : 0][error]++;
			}
		}
		while (recv(passive, buffer, sizeof(buffer), MSG_DONTWAIT) > 0)
			;
	}
	tell();
}

static void fail_nth(int control, int number)
{
	char digits[16];

	snprintf(digits, sizeof(digits), "%d", number);
	if (pwrite(control, digits, strlen(digits), 0) < 0)
		fail("fail-nth");
}

static void nth(int count, const char *path)
{
	static struct entry entries[4096];
	int number = read_entries(path, entries, 4096), made = 0, unmade = 0, i, step, which;
	int control = open("/proc/thread-self/fail-nth", O_RDWR | O_CLOEXEC), back = nl, error;
	struct message m;

	if (control < 0)
		fail("fail-nth");
	for (i = 1; i <= count; i++)
		for (which = 0; which < 2; which++)
			for (step = 0; step < 4; step++) {
				int command = (int[]){ ADD, STAT, GET, DEL }[step];

				/* A socket of its own: what was not answered is not for the next. */
				nl = connected();
				start(&m, family, command,
				      command == GET ? NLM_F_DUMP : NLM_F_ACK);
				if (command != GET)
					put_entry(&m, &entries[which ? number - 1 : 0]);
				/* for no answer there will be none later */
				fcntl(nl, F_SETFL, O_NONBLOCK);
				fail_nth(control, i);
				error = ask(&m, NULL);
				fail_nth(control, 0);
				if (command == GET)
					error = error < 0 ? -error : 0;
				answers[command][error < 200 ? error : 0]++;
				close(nl);
			}
	nl = back;
	for (i = 0; i < count; i++) {
		fail_nth(control, 1 + random() % 400);
		error = unshare(CLONE_NEWNET);
		fail_nth(control, 0);
		error ? unmade++ : made++;
	}
	printf("namespaces=%d no-namespaces=%d ", made, unmade);
	tell();
}

int main(int count, char **arguments)
{
	signal(SIGTERM, stop);
	find_family();
	if (count == 2 && !strcmp(arguments[1], "list"))
		printf("%d\n", list());
	else if (count == 2 && !strcmp(arguments[1], "flush"))
		flush();
	else if (count == 5 && !strcmp(arguments[1], "churn"))
		churn(atof(arguments[2]), atoi(arguments[3]), arguments[4]);
	else if (count == 2 && !strcmp(arguments[1], "listen"))
		listen_();
	else if (count == 4 && !strcmp(arguments[1], "fuzz"))
		fuzz(atoi(arguments[2]), atoi(arguments[3]));
	else if (count == 4 && !strcmp(arguments[1], "nth"))
		nth(atoi(arguments[2]), arguments[3]);
	else
		return 2;
	return 0;
}
