/* Hand-overs of one descriptor by the C client (examples/c), on two open connections.
 *
 *     small_client SOCKET COUNT NAME
 *
 * Writes the CPU time of a hand-over of this process, and the median on the wall, in ns.
 */
#include <stdio.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#include "cprd.h"

#define WARM_UP 100

static double now(clockid_t clock)
{
    struct timespec t;
    clock_gettime(clock, &t);
    return t.tv_sec * 1e9 + t.tv_nsec;
}

static void check(int code)
{
    if (code != CPRD_OK) {
        fprintf(stderr, "%s\n", cprd_last()->text);
        exit(1);
    }
}

static void once(cprd *old, cprd *new, const char *name, int fd)
{
    cprd_state *state = cprd_state_new();
    cprd_claim *claim;

    check(cprd_add_fd(state, "client", 7, fd));
    check(cprd_save(old, name, state, NULL, NULL));
    cprd_state_free(state);
    check(cprd_load(new, name, NULL, &claim));
    int taken = cprd_take_fd(cprd_claim_state(claim), "client", 7);
    check(cprd_confirm(claim));
    close(taken);
    cprd_claim_close(claim);
}

static int compare(const void *a, const void *b)
{
    return *(const double *)a < *(const double *)b ? -1 : 1;
}

int main(int argc, char **argv)
{
    if (argc != 4)
        return 2;
    int count = atoi(argv[2]), fd = eventfd(0, 0);
    double *took = malloc(count * sizeof *took), used = 0;
    cprd *old, *new;

    check(cprd_connect(argv[1], &old));
    check(cprd_connect(argv[1], &new));
    for (int i = -WARM_UP; i < count; i++) {
        double begun = now(CLOCK_MONOTONIC);
        if (i == 0)
            used = now(CLOCK_PROCESS_CPUTIME_ID);
        once(old, new, argv[3], fd);
        if (i >= 0)
            took[i] = now(CLOCK_MONOTONIC) - begun;
    }
    used = now(CLOCK_PROCESS_CPUTIME_ID) - used;
    qsort(took, count, sizeof *took, compare);
    printf("%.0f %.0f\n", used / count, took[count / 2]);
    return 0;
}
