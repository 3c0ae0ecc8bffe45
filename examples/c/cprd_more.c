/* What few programs need: the acting process by a pidfd, a longer lease, a confirm that saves, and
 * what operators do: list, drop, release. Live holds need it, too. cprd.h says how to use it. */
#define _GNU_SOURCE
#define CPRD_INTERNAL
#include "cprd.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

uint64_t cprd__connects(cprd *c) {
    char byte;
    pthread_mutex_lock(&c->lock);
    ssize_t got = recv(c->sock, &byte, 1, MSG_PEEK | MSG_DONTWAIT);
    if (!got || (got < 0 && errno != EAGAIN)) cprd__hang_up(c); /* cprd has ended */
    uint64_t connects = c->sock < 0 ? 0 : c->connects;
    pthread_mutex_unlock(&c->lock);
    return connects;
}

int cprd__fdinfo(int fd, const char *key, long *value) {
    char path[64], info[1024] = "";
    snprintf(path, sizeof path, "/proc/self/fdinfo/%d", fd);
    int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file >= 0 && read(file, info, sizeof info - 1) < 0) *info = 0;
    if (file >= 0) close(file);
    const char *found = strstr(info, key);
    *value = found ? strtol(found + strlen(key), NULL, 10) : 0;
    return found != NULL;
}

int cprd__name_process(const cprd *c, struct cprd__process *p) {
    struct stat there;
    struct statfs system;
    long pid;
    if (!cprd__fdinfo(p->fd, "\nPid:", &pid) || fstat(p->fd, &there) || fstatfs(p->fd, &system))
        return cprd__fail(CPRD_INVALID_INPUT, "descriptor %d is not a pidfd", p->fd);
    if (pid < 0) return CPRD_OK;
    p->pid = (uint64_t)pid;
    p->inode = system.f_type == 0x50494446 ? there.st_ino : 0; /* PID_FS_MAGIC */
    if (c->owner != getpid()) return CPRD_OK; /* the request says so */
    if (pid && c->pid == (uint64_t)getpid()) return CPRD_OK;
    return cprd__fail(CPRD_LIMIT_EXCEEDED, "cprd lives in another pid namespace, and cannot tell"
                      " which process that is: let that process connect by itself");
}

/* Without an inode cprd may watch another process, which got the pid in between. */
void cprd__say_ended(const cprd_claim *t, const struct cprd__process *p) {
    struct pollfd one = {p->fd, POLLIN, 0};
    if (!p->pid || p->inode || poll(&one, 1, 0) <= 0) return;
    struct cprd__answer a;
    struct cprd__call call = cprd__call_of(NULL, "ended", NULL);
    cprd__fields(&call, "name s generation U pid U", t->name, t->generation, p->pid);
    cprd__request(t->c, &call, &a);
}

int cprd_renew(cprd_claim *claim, double lease) {
    struct cprd__answer a;
    struct cprd__call call = cprd__call_of(claim, "renew", NULL);
    cprd__fields(&call, "lease d", lease);
    return cprd__request(claim->c, &call, &a);
}

int cprd_confirm_next(cprd_claim *claim, cprd_state *next, const struct cprd_save_options *options,
                      struct cprd_saved *out) {
    if (claim->over)
        return cprd__fail(CPRD_FENCED, "confirm: '%s' has ended already", claim->name);
    int rc = cprd__save(claim, "confirm_next", next, options, out);
    return rc ? rc : cprd__ended(claim);
}

static int forced(cprd *c, const char *verb, const char *name, int force) {
    struct cprd__answer a;
    struct cprd__call call = cprd__call_of(NULL, verb, NULL);
    cprd__fields(&call, "name s force f", name, force);
    return cprd__request(c, &call, &a);
}

int cprd_drop(cprd *c, const char *name, int force) { return forced(c, "drop", name, force); }
int cprd_release(cprd *c, const char *name, int force) { return forced(c, "release", name, force); }

int cprd_list(cprd *c, void (*each)(void *context, const struct cprd_row *row), void *context) {
    uint64_t more = 0;
    do {
        struct cprd__answer a;
        struct cprd__call call = cprd__call_of(NULL, "list", NULL);
        cprd__fields(&call, "after u", more);
        if (cprd__request(c, &call, &a)) return cprd__last.code;
        struct value holds = cprd__get(a.of, "holds");
        struct reader r = {holds.data, holds.end, holds.kind != ARRAY};
        for (; holds.number && !r.bad; holds.number--) {
            char name[512], phase[32];
            struct value row = cprd__next(&r);
            cprd__text(row, "name", name, sizeof name);
            cprd__text(row, "phase", phase, sizeof phase);
            struct cprd_row told = {name, phase, cprd__number(row, "uid", 0),
                                    cprd__number(row, "generation", 0),
                                    cprd__number(row, "fds", 0), cprd__number(row, "bytes", 0)};
            each(context, &told);
            cprd__skip(&r, row);
        }
        more = cprd__number(a.of, "more", 0);
    } while (more);
    return CPRD_OK;
}
