/* The floor for handing descriptors to another process: nobody holds anything in between.
 *
 *   direct_pass COUNT
 *
 * A parent and its child share one AF_UNIX SOCK_SEQPACKET pair. The parent owns COUNT eventfds and sends
 * them with SCM_RIGHTS, 253 to a message, which is the most that the kernel takes; the child installs
 * them all and says so with one byte. Prints the nanoseconds from before the first sendmsg() until that
 * byte has come. The child closes the copies that fork() gave it first, as a stranger has none.
 */
#define _GNU_SOURCE
#include <err.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define BATCH 253

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

static void give(int channel, const int *fds, size_t count)
{
	union control control = { 0 };
	struct iovec payload = { .iov_base = "x", .iov_len = 1 };
	struct msghdr message = {
		.msg_iov = &payload,
		.msg_iovlen = 1,
		.msg_control = control.bytes,
		.msg_controllen = CMSG_SPACE(count * sizeof *fds),
	};
	struct cmsghdr *rights = CMSG_FIRSTHDR(&message);

	rights->cmsg_level = SOL_SOCKET;
	rights->cmsg_type = SCM_RIGHTS;
	rights->cmsg_len = CMSG_LEN(count * sizeof *fds);
	memcpy(CMSG_DATA(rights), fds, count * sizeof *fds);
	if (sendmsg(channel, &message, 0) < 0)
		err(1, "sendmsg");
}

static size_t take(int channel)
{
	union control control;
	char byte;
	struct iovec payload = { .iov_base = &byte, .iov_len = 1 };
	struct msghdr message = {
		.msg_iov = &payload,
		.msg_iovlen = 1,
		.msg_control = control.bytes,
		.msg_controllen = sizeof control.bytes,
	};

	if (recvmsg(channel, &message, MSG_CMSG_CLOEXEC) != 1)
		err(1, "recvmsg");
	if (message.msg_flags & MSG_CTRUNC)
		errx(1, "descriptors were cut off: raise the limit (ulimit -n)");
	return (CMSG_FIRSTHDR(&message)->cmsg_len - CMSG_LEN(0)) / sizeof(int);
}

static void child(int channel, const int *fds, size_t count)
{
	for (size_t i = 0; i < count; i++)
		close(fds[i]);
	if (send(channel, "r", 1, 0) != 1)
		err(1, "send");
	for (size_t got = 0; got < count;)
		got += take(channel);
	if (send(channel, "d", 1, 0) != 1)
		err(1, "send");
	_exit(0);
}

int main(int argc, char **argv)
{
	size_t count = argc == 2 ? strtoul(argv[1], NULL, 10) : 0;
	int ends[2], status;
	int *fds = calloc(count, sizeof *fds);
	char byte;
	int64_t start;

	if (!count || !fds)
		errx(2, "usage: direct_pass COUNT");
	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) < 0)
		err(1, "socketpair");
	for (size_t i = 0; i < count; i++)
		if ((fds[i] = eventfd(0, EFD_CLOEXEC)) < 0)
			err(1, "eventfd");
	switch (fork()) {
	case -1:
		err(1, "fork");
	case 0:
		close(ends[0]);
		child(ends[1], fds, count);
	}
	close(ends[1]);
	if (recv(ends[0], &byte, 1, 0) != 1)
		errx(1, "the child has gone");
	start = clock_ns();
	for (size_t i = 0; i < count; i += BATCH)
		give(ends[0], fds + i, count - i < BATCH ? count - i : BATCH);
	if (recv(ends[0], &byte, 1, 0) != 1)
		errx(1, "the child has gone");
	printf("%lld\n", (long long)(clock_ns() - start));
	wait(&status);
	return status != 0;
}
