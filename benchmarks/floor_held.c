/* floor_held: the whole path in C, through a third process that holds, the floor of a hand-over.
 *
 *     floor_held COUNT [ROUNDS]
 *
 * The old process has an array of COUNT descriptors. It parks them in the queue of a socket pair, 253
 * a message, hands the receiving end to the holder, and hears that the holder has it. Then a
 * successor, which comes afterwards, asks the holder, receives the end, receives all descriptors out
 * of the queue into an array, confirms, and hears that the holder has let go. Nothing has a name,
 * nothing is checked, nothing outlives the holder.
 *
 * Prints for each round "SAVE LOAD CONFIRM", nanoseconds. The time between save and load is no part.
 */
#define _GNU_SOURCE
#include <err.h>
#include <inttypes.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define BATCH 253 /* SCM_MAX_FD */

union control {
	char bytes[CMSG_SPACE(BATCH * sizeof(int))];
	struct cmsghdr align;
};

static int64_t clock_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * INT64_C(1000000000) + now.tv_nsec;
}

static void give(int channel, char word, const int *fds, size_t count)
{
	union control control = { 0 };
	struct iovec payload = { .iov_base = &word, .iov_len = 1 };
	struct msghdr message = { .msg_iov = &payload, .msg_iovlen = 1 };

	if (count) {
		message.msg_control = control.bytes;
		message.msg_controllen = CMSG_SPACE(count * sizeof *fds);
		struct cmsghdr *rights = CMSG_FIRSTHDR(&message);
		rights->cmsg_level = SOL_SOCKET;
		rights->cmsg_type = SCM_RIGHTS;
		rights->cmsg_len = CMSG_LEN(count * sizeof *fds);
		memcpy(CMSG_DATA(rights), fds, count * sizeof *fds);
	}
	if (sendmsg(channel, &message, MSG_NOSIGNAL) < 0)
		err(1, "sendmsg");
}

static size_t take(int channel, char *word, int *fds)
{
	union control control;
	struct iovec payload = { .iov_base = word, .iov_len = 1 };
	struct msghdr message = {
		.msg_iov = &payload,
		.msg_iovlen = 1,
		.msg_control = control.bytes,
		.msg_controllen = sizeof control.bytes,
	};
	struct cmsghdr *rights;
	size_t count;

	if (recvmsg(channel, &message, MSG_CMSG_CLOEXEC) != 1)
		err(1, "recvmsg");
	if (message.msg_flags & MSG_CTRUNC)
		errx(1, "descriptors were cut off: raise the limit (ulimit -n)");
	if (!(rights = CMSG_FIRSTHDR(&message)))
		return 0;
	count = (rights->cmsg_len - CMSG_LEN(0)) / sizeof(int);
	memcpy(fds, CMSG_DATA(rights), count * sizeof(int));
	return count;
}

static void pair(int ends[2])
{
	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) < 0)
		err(1, "socketpair");
}

static void hold(int from_old, int from_new)
{
	int held = -1, fds[BATCH];
	char word;

	for (;;) {
		if (recv(from_old, &word, 1, MSG_PEEK) != 1)
			_exit(0);
		take(from_old, &word, fds);
		held = fds[0];
		give(from_old, 'k', NULL, 0);
		take(from_new, &word, fds); /* the successor asks */
		give(from_new, 'h', &held, 1);
		take(from_new, &word, fds); /* and confirms */
		close(held);
		give(from_new, 'g', NULL, 0);
	}
}

static void succeed(int holder, int told, size_t count)
{
	int *fds = calloc(count + BATCH, sizeof *fds), queue, none[BATCH];
	int64_t times[3];
	char word;

	while (recv(told, &word, 1, 0) == 1) {
		times[0] = clock_ns();
		give(holder, 'l', NULL, 0);
		take(holder, &word, &queue);
		for (size_t got = 0; got < count;)
			got += take(queue, &word, fds + got);
		times[1] = clock_ns();
		give(holder, 'c', NULL, 0);
		take(holder, &word, none);
		times[2] = clock_ns();
		close(queue);
		for (size_t i = 0; i < count; i++)
			close(fds[i]);
		if (send(told, times, sizeof times, 0) != sizeof times)
			err(1, "send");
	}
	_exit(0);
}

int main(int argc, char **argv)
{
	size_t count = argc > 1 ? strtoul(argv[1], NULL, 10) : 0;
	int rounds = argc > 2 ? atoi(argv[2]) : 1;
	int old[2], new[2], told[2], status, *fds = calloc(count, sizeof *fds), none[BATCH];
	struct rlimit limit;
	char word;

	if (!count || !fds)
		errx(2, "usage: floor_held COUNT [ROUNDS]");
	getrlimit(RLIMIT_NOFILE, &limit);
	limit.rlim_cur = limit.rlim_max;
	setrlimit(RLIMIT_NOFILE, &limit);
	pair(old);
	pair(new);
	pair(told);
	switch (fork()) {
	case -1:
		err(1, "fork");
	case 0:
		close(old[0]), close(new[0]), close(told[0]), close(told[1]);
		hold(old[1], new[1]);
	}
	switch (fork()) {
	case -1:
		err(1, "fork");
	case 0:
		close(old[0]), close(old[1]), close(new[1]), close(told[0]);
		succeed(new[0], told[1], count);
	}
	close(old[1]), close(new[0]), close(new[1]), close(told[1]);
	for (size_t i = 0; i < count; i++)
		if ((fds[i] = eventfd(0, EFD_CLOEXEC)) < 0)
			err(1, "eventfd");
	while (rounds--) {
		int queue[2];
		int64_t begun = clock_ns(), saved, times[3];

		pair(queue);
		for (size_t i = 0; i < count; i += BATCH)
			give(queue[0], 'f', fds + i, count - i < BATCH ? count - i : BATCH);
		close(queue[0]);
		give(old[0], 's', queue + 1, 1);
		take(old[0], &word, none);
		saved = clock_ns();
		close(queue[1]);
		if (send(told[0], "l", 1, 0) != 1 || recv(told[0], times, sizeof times, 0) != sizeof times)
			errx(1, "the successor has gone");
		printf("%" PRId64 " %" PRId64 " %" PRId64 "\n", saved - begun, times[1] - times[0],
		       times[2] - times[1]);
		fflush(stdout);
	}
	close(old[0]), close(told[0]);
	while (wait(&status) > 0)
		;
	return 0;
}
