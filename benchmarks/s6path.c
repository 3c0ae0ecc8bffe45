/* s6path: many descriptors through s6-fdholderd one by one, the yardstick of benchmarks/floors.py.
 *
 *     s6path SOCKET COUNT ROUNDS
 *
 * On one connection, by libs6: in each round COUNT stores, then COUNT retrieve-and-deletes. Prints
 * "STORE RETRIEVE", nanoseconds, for each round. Each identifier gets an expiry of its own, far away
 * (see s6life.c).
 */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>
#include <skalibs/tai.h>
#include <s6/fdholder.h>

static long long now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static void die(const char *what)
{
	perror(what);
	exit(1);
}

int main(int argc, char **argv)
{
	s6_fdholder_t a = S6_FDHOLDER_ZERO;
	struct rlimit limit;
	tain deadline, expiry;
	int *fds, count, rounds;
	char id[32];
	if (argc != 4) return 100;
	count = atoi(argv[2]);
	rounds = atoi(argv[3]);
	getrlimit(RLIMIT_NOFILE, &limit);
	limit.rlim_cur = limit.rlim_max;
	setrlimit(RLIMIT_NOFILE, &limit);
	fds = malloc(count * sizeof *fds);
	for (int i = 0; i < count; i++) if ((fds[i] = eventfd(0, EFD_CLOEXEC)) < 0) die("eventfd");
	tain_now_set_stopwatch_g();
	tain_addsec_g(&deadline, 3600);
	tain_add_g(&expiry, &tain_infinite_relative);
	if (!s6_fdholder_start_g(&a, argv[1], &deadline)) die("start");
	while (rounds--) {
		long long begun = now(), stored, done;
		for (int i = 0; i < count; i++) {
			snprintf(id, sizeof id, "bench:%d", i);
			if (++expiry.nano >= 1000000000U) { expiry.nano = 0; expiry.sec.x++; }
			if (!s6_fdholder_store_g(&a, fds[i], id, &expiry, &deadline)) die("store");
		}
		stored = now();
		for (int i = 0; i < count; i++) {
			snprintf(id, sizeof id, "bench:%d", i);
			close(fds[i]);
			if ((fds[i] = s6_fdholder_retrieve_delete_g(&a, id, &deadline)) < 0) die("retrieve");
		}
		done = now();
		printf("%lld %lld\n", stored - begun, done - stored);
		fflush(stdout);
	}
	return 0;
}
