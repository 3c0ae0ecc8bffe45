/* s6life: what a life costs in s6-fdholderd, the yardstick of benchmarks/live.py.
 *
 *     s6life SOCKET KEPT
 *
 * Stores KEPT descriptors, then waits for lines on stdin, each a number of lives: so many times one
 * more is stored and another one, at random, retrieved and deleted. Answers with the microseconds of
 * each store and of each retrieve-and-delete, "STORE RETRIEVE" a line, then an empty line.
 *
 * Each identifier gets an expiry of its own, far away: s6-fdholderd keys a tree by expiry and walks
 * from one to the next where two are equal, so that "never" for all would make a store O(KEPT).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>
#include <skalibs/tai.h>
#include <s6/fdholder.h>

static double now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1e6 + t.tv_nsec / 1e3;
}

static void die(const char *what)
{
	perror(what);
	exit(1);
}

static s6_fdholder_t a = S6_FDHOLDER_ZERO;
static tain deadline, expiry;
static int fd;

static void store(unsigned int number)
{
	char id[32];
	snprintf(id, sizeof id, "bench:%u", number);
	if (++expiry.nano >= 1000000000U) { expiry.nano = 0; expiry.sec.x++; }
	if (!s6_fdholder_store_g(&a, fd, id, &expiry, &deadline)) die("store");
}

static void retrieve_delete(unsigned int number)
{
	char id[32];
	int got;
	snprintf(id, sizeof id, "bench:%u", number);
	got = s6_fdholder_retrieve_delete_g(&a, id, &deadline);
	if (got < 0) die("retrieve");
	close(got);
}

int main(int argc, char **argv)
{
	struct rlimit limit;
	unsigned int kept, next, *ids, lives;
	if (argc != 3) return 100;
	getrlimit(RLIMIT_NOFILE, &limit);
	limit.rlim_cur = limit.rlim_max;
	setrlimit(RLIMIT_NOFILE, &limit);
	kept = atoi(argv[2]);
	ids = malloc((kept + 1) * sizeof *ids);
	fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	tain_now_set_stopwatch_g();
	tain_addsec_g(&deadline, 3600);
	tain_add_g(&expiry, &tain_infinite_relative);
	if (!s6_fdholder_start_g(&a, argv[1], &deadline)) die("start");
	for (next = 0; next < kept; next++) { store(next); ids[next] = next; }
	srand(1);
	while (scanf("%u", &lives) == 1) {
		while (lives--) {
			unsigned int at = rand() % kept;
			double begin = now(), stored, ended;
			store(next);
			stored = now();
			retrieve_delete(ids[at]);
			ended = now();
			ids[at] = next++;
			printf("%.2f %.2f\n", stored - begin, ended - stored);
		}
		printf("\n");
		fflush(stdout);
	}
	return 0;
}
