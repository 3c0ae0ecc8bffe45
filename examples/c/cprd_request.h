/* What is said to cprd: for cprd.c and cprd_hold.c. Not for programs. */
#ifndef CPRD_REQUEST_H
#define CPRD_REQUEST_H

#include "cprd_msgpack.h"

#include <sys/un.h>

enum { HEADER = 32, MAX_ANSWER = 64 * 1024 };

struct packed { /* a state apart from the queue of the root; owns `made` */
    unsigned char header[HEADER];
    int *fds, *made; /* of the root, borrowed; what packing opened */
    size_t parked, made_count, fd_count;
    uint64_t size;
    int depth;
};

struct cprd {
    int sock;
    pid_t owner;      /* not its forked children */
    uint64_t connects; /* so often */
    uint64_t id, pid; /* of the last request; of this process, as cprd sees it */
    double timeout;
    char path[sizeof(((struct sockaddr_un *)0)->sun_path)];
    unsigned char in[MAX_ANSWER + 1];
};
struct call {
    const char *verb;
    bytes fields;
    int count;
    double wait; /* s; the daemon lets the request wait so long */
    const struct packed *packed;
    const cprd_state *state;
};
struct answer { /* `fd` is the reader's to close */
    int code, fd, cut, stored, found, live; /* cut: no room for a descriptor here */
    uint64_t id, generation, attempts, pid, version, more;
    unsigned char token[16];
    double lease;
    char last_reject[1025], last_end[128];
    struct reader holds;
};

struct ticket { /* the right to speak for a claim or a prepared save */
    cprd *c;
    char *name;
    uint64_t generation;
    unsigned char token[16], nonces[2][16]; /* of its two ends: the same words are one request */
    int stored, over;
};

/* Sends a request, again where the connection is lost, and frees its fields. Returns what cprd
 * says, UNAVAILABLE or TIMEOUT. The caller closes a->fd where there is one. */
int cprd__request(cprd *c, struct call *call, struct answer *a);
struct call cprd__call_of(const struct ticket *t, const char *verb);
int cprd__set_ticket(struct ticket *t, cprd *c, const char *name, const struct answer *a);
void cprd__field_nonce(struct call *call, const unsigned char *nonce); /* NULL: a fresh one */
void cprd__fields_of_bundle(struct call *call, const struct packed *p); /* `fds` to `depth` */
int cprd__no_fd(const struct answer *a);
int cprd__end(struct ticket *t, const char *verb, const char *why, int damaged, struct answer *a);
int cprd__unpack(int bundle, cprd_state **out); /* borrowed, and stays as it is */
/* As unpack, of what an owner of a live hold left; NULL where cprd_hold.c is not linked. */
__attribute__((weak)) int cprd__unpack_live(int bundle, cprd_state **out);
void cprd__hang_up(cprd *c);

#endif
