/* Requests, and what states (parts/state.c) and live holds share with these. cprd.h says how to use
 * them, docs/protocol.md and docs/bundle.md have the bytes. */
#define _GNU_SOURCE
#define CPRD_INTERNAL
#include "cprd.h"

#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/sockios.h>
#include <poll.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/vfs.h>
#include <time.h>
#include <unistd.h>

enum {
    VERSION = 2,
    MAX_WHY = 1024,
    INLINE = 16 * 1024, /* bytes of a section; a larger one gets a memfd */
    MAX_MANIFEST = 256 << 20,
    MAX_SECTIONS = 1 << 16,
    FIELDS = 4, /* the place in a request of their number, ... */
    ID = 13,    /* ... and of the id */
    PAUSE = 50, /* ms, between attempts to connect */
    LOST = -1   /* the connection has ended: the request may be sent again on another one */
};
static const double MUTE = 20, RETRY_FOR = 15; /* s */
static const int SEALS = F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE;

/* -- errors, bytes, keys ----------------------------------------------------------------------- */

_Thread_local struct cprd_error cprd__last;
static const char *const classes[] = {
    "", "CprdError", "Unavailable", "NotHeld", "Busy", "Damaged", "AlreadyHeld", "Denied", "Fenced",
    "LimitExceeded", "Timeout", "ProtocolError", "InvalidInput"};

const struct cprd_error *cprd_last(void) { return &cprd__last; }

const char *cprd_code_name(int code) {
    return code >= 0 && code <= CPRD_INVALID_INPUT ? classes[code] : "?";
}

int cprd__fail(int code, const char *format, ...) {
    struct cprd_error said = {.code = code, .pid = -1, .until = -1};
    va_list arguments; /* may have cprd__last.text */
    va_start(arguments, format);
    vsnprintf(said.text, sizeof said.text, format, arguments);
    va_end(arguments);
    cprd__last = said;
    return code;
}

int cprd__no_memory(void) { return cprd__fail(CPRD_LIMIT_EXCEEDED, "no memory left here"); }

int cprd__no_room(const char *what) {
    return cprd__fail(CPRD_LIMIT_EXCEEDED, "more descriptors %s do not fit in this process: its"
                      " soft RLIMIT_NOFILE is %ld; raise it (setrlimit, ulimit -n, LimitNOFILE=)",
                      what, sysconf(_SC_OPEN_MAX));
}

int cprd__room_for(uint64_t count) {
    if (count <= (uint64_t)sysconf(_SC_OPEN_MAX)) return CPRD_OK;
    return cprd__no_room("to load (what is held stays held)");
}

int cprd__explain(int error) {
    int ours = error == EBADF || error == EINVAL, many = error == ETOOMANYREFS;
    return cprd__fail(
        ours ? CPRD_INVALID_INPUT : CPRD_LIMIT_EXCEEDED, "cannot park descriptors: %s (%s)",
        strerror(error),
        ours ? "closed by now, or of a kind that no process can get: io_uring"
        : many ? "with all that this uid has parked: raise the hard RLIMIT_NOFILE (LimitNOFILE=,"
                 " ulimit -Hn), or drop holds (cprctl list)"
               : "EAGAIN: a queue is as large as net.core.wmem_max allows");
}

void cprd__put(struct cprd__bytes *b, const void *data, size_t size) {
    if (b->room - b->size < size && !b->failed) {
        b->room = 2 * (b->size + size) + 256;
        void *at = realloc(b->at, b->room);
        b->failed = !at;
        if (at) b->at = at;
    }
    if (b->failed || !size) return;
    memcpy(b->at + b->size, data, size);
    b->size += size;
}

void cprd__put_little(struct cprd__bytes *b, uint64_t value, int width) {
    value = htole64(value);
    cprd__put(b, &value, (size_t)width);
}

uint64_t cprd__little(const unsigned char *at, int width) {
    uint64_t value = 0;
    memcpy(&value, at, (size_t)width);
    return le64toh(value);
}

static int is_utf8(const unsigned char *at, size_t left) {
    static const uint32_t first[] = {0, 0x80, 0x800, 0x10000}; /* that needs so many bytes more */
    for (size_t more; left; at += 1 + more, left -= 1 + more) {
        more = *at < 0x80 ? 0 : *at < 0xe0 ? 1 : *at < 0xf0 ? 2 : 3;
        uint32_t letter = more ? *at & (0x3f >> more) : *at;
        if (more >= left || (*at >= 0x80 && *at < 0xc0) || *at >= 0xf8) return 0;
        for (size_t n = 1; n <= more; n++) {
            if ((at[n] & 0xc0) != 0x80) return 0;
            letter = letter << 6 | (at[n] & 0x3f);
        }
        if (letter < first[more] || letter > 0x10ffff || letter >> 11 == 0x1b) return 0;
    }
    return 1;
}

struct cprd__key cprd__key(int space, const void *name, size_t length, int32_t id) {
    return (struct cprd__key){{NULL}, space, id, length, (char *)(uintptr_t)name};
}

int cprd__check_name(const struct cprd__key *key) {
    if (key->length && key->length <= 255 && !memchr(key->name, 0, key->length) &&
        (key->space == CPRD__FD || is_utf8((const unsigned char *)key->name, key->length)))
        return CPRD_OK;
    return cprd__fail(CPRD_INVALID_INPUT, "name '%.*s': wants 1 to 255 bytes; of UTF-8, unless of"
                      " a descriptor", key->length < 256 ? (int)key->length : 255, key->name);
}

struct cprd__key **cprd__slot(struct cprd__key **slot, const struct cprd__key *key) {
    uint64_t hash = 14695981039346656037u ^ (uint32_t)key->id ^ (uint64_t)key->space << 32;
    for (size_t n = 0; n < key->length; n++)
        hash = (hash ^ (unsigned char)key->name[n]) * 1099511628211u;
    hash *= 0x9e3779b97f4a7c15u;
    while (*slot && ((*slot)->space != key->space || (*slot)->id != key->id ||
                     (*slot)->length != key->length ||
                     memcmp((*slot)->name, key->name, key->length))) {
        slot = &(*slot)->below[hash >> 62];
        hash <<= 2;
    }
    return slot;
}

/* -- descriptors ------------------------------------------------------------------------------- */

/* A program may have as many descriptors open as its soft limit allows. For the moment of an own
 * call the soft limit is the hard limit; threads share that moment. */
static struct {
    pthread_mutex_t lock;
    struct rlimit usual;
    int users;
} raised = {.lock = PTHREAD_MUTEX_INITIALIZER};

static void raise_limit(int up) {
    pthread_mutex_lock(&raised.lock);
    if (up && !raised.users++) getrlimit(RLIMIT_NOFILE, &raised.usual);
    raised.users -= !up;
    struct rlimit limit = {up ? raised.usual.rlim_max : raised.usual.rlim_cur,
                           raised.usual.rlim_max};
    if (raised.users == up) setrlimit(RLIMIT_NOFILE, &limit);
    pthread_mutex_unlock(&raised.lock);
}

/* A forked child has no other threads, which may be in such a moment. */
static void before_fork(void) { pthread_mutex_lock(&raised.lock); }
static void after_fork(void) { pthread_mutex_unlock(&raised.lock); }

static void after_fork_in_child(void) {
    if (raised.users) setrlimit(RLIMIT_NOFILE, &raised.usual);
    raised.users = 0;
    after_fork();
}

__attribute__((constructor)) static void look_at_forks(void) {
    pthread_atfork(before_fork, after_fork, after_fork_in_child);
}

#define RAISED(call) (raise_limit(1), call, raise_limit(0))

void cprd__close_all(const int *fds, size_t count) {
    for (size_t n = 0; n < count; n++)
        if (fds[n] >= 0) close(fds[n]);
}

union rights {
    char data[CMSG_SPACE(CPRD__SCM_MAX * sizeof(int))];
    struct cmsghdr head;
};

int cprd__send(int sock, const void *data, size_t size, const int *fds, size_t count) {
    union rights space = {{0}};
    struct iovec part = {(void *)(uintptr_t)data, size};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
    if (count) {
        space.head = (struct cmsghdr){CMSG_LEN(count * sizeof(int)), SOL_SOCKET, SCM_RIGHTS};
        memcpy(CMSG_DATA(&space.head), fds, count * sizeof(int));
        message.msg_control = &space;
        message.msg_controllen = CMSG_SPACE(count * sizeof(int));
    }
    ssize_t sent = sendmsg(sock, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (sent < 0 && errno == ETOOMANYREFS)
        RAISED(sent = sendmsg(sock, &message, MSG_DONTWAIT | MSG_NOSIGNAL));
    return sent < 0 ? errno : 0;
}

long cprd__receive(int sock, void *data, size_t size, int *fds, size_t *count, int *flags) {
    union rights space;
    struct iovec part = {data, size};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = &space,
                             .msg_controllen = sizeof space};
    *count = 0;
    ssize_t got = recvmsg(sock, &message, *flags | MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    if (got < 0 && errno == ECONNRESET) /* said once: the other side left something unread */
        return cprd__receive(sock, data, size, fds, count, flags);
    if (got < 0) return got;
    *flags = message.msg_flags;
    for (struct cmsghdr *c = CMSG_FIRSTHDR(&message); c; c = CMSG_NXTHDR(&message, c))
        if (c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_RIGHTS) {
            *count = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
            memcpy(fds, CMSG_DATA(c), *count * sizeof(int));
        }
    return got;
}

int cprd__pair(int *tx, int *rx) {
    int ends[2], failed;
    RAISED(failed = socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends));
    if (failed) return cprd__no_room("for a queue");
    *tx = ends[0];
    *rx = ends[1];
    return CPRD_OK;
}

int cprd__waiting(int sock) {
    int count = -1;
    return ioctl(sock, SIOCINQ, &count) ? -1 : count;
}

uint64_t cprd__cookie(int fd) {
    uint64_t cookie = 0;
    socklen_t size = sizeof cookie;
    return getsockopt(fd, SOL_SOCKET, SO_COOKIE, &cookie, &size) ? 0 : cookie;
}

int cprd__is_sealed(int memfd) {
    int seals = fcntl(memfd, F_GET_SEALS);
    return seals >= 0 && (seals & SEALS) == SEALS;
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

int cprd__memfd(const char *name, const void *data, size_t size, int *out) {
    const char *label = strlen(name) < 250 ? name : "cprd-section"; /* has a limit of its own */
    size_t done = 0;
    ssize_t wrote = 1;
    RAISED(*out = memfd_create(label, MFD_CLOEXEC | MFD_ALLOW_SEALING));
    for (; *out >= 0 && done < size && wrote > 0; done += wrote > 0 ? (size_t)wrote : 0)
        wrote = write(*out, (const char *)data + done, size - done);
    if (*out >= 0 && done == size && !fcntl(*out, F_ADD_SEALS, SEALS)) return CPRD_OK;
    cprd__fail(CPRD_LIMIT_EXCEEDED, "cannot make a memfd for %s: %s; raise RLIMIT_NOFILE (EMFILE)"
               " or the memory that this cgroup may use (ENOMEM, ENOSPC)", name, strerror(errno));
    cprd__close_all(out, 1);
    return CPRD_LIMIT_EXCEEDED;
}

#include "parts/state.c"

/* -- requests --------------------------------------------------------------------------------- */

union real {
    double value;
    uint64_t bits; /* as msgpack has it */
};

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static void hang_up(cprd *c) {
    if (c->sock >= 0) close(c->sock);
    c->sock = -1;
}

void cprd__fields(struct cprd__call *call, const char *format, ...) {
    char key[32], type;
    va_list next;
    va_start(next, format);
    for (int used; sscanf(format, " %31s %c%n", key, &type, &used) == 2; format += used) {
        const char *text = strchr("sb", type) ? va_arg(next, const char *) : NULL;
        uint64_t number = strchr("fn", type) ? va_arg(next, int) != 0 : 0;
        if (strchr("uU", type)) number = va_arg(next, uint64_t);
        if (type == 'd') number = (union real){va_arg(next, double)}.bits;
        if ((!text && !number && type != 'U') || call->m.failed) continue;
        call->m.at[FIELDS]++;
        put_text(&call->m, key);
        if (type == 's') put_text(&call->m, text);
        else if (type == 'b') put_data(&call->m, 0xc6, text, 16);
        else if (strchr("fn", type)) put_number(&call->m, type == 'f' ? 0xc3 : 0xc2, 0, 0);
        else put_number(&call->m, type == 'd' ? 0xcb : 0xcf, number, 8);
    }
    va_end(next);
}

struct cprd__call cprd__call_of(const cprd_claim *t, const char *verb, const void *nonce) {
    struct cprd__call call = {.verb = verb};
    unsigned char fresh[16];
    call.m.failed = getrandom(fresh, sizeof fresh, 0) != sizeof fresh;
    put_number(&call.m, 0xdf, 0, 4); /* a map; cprd__fields counts */
    cprd__fields(&call, "id U verb s nonce b", (uint64_t)0, verb, nonce ? nonce : fresh);
    if (t) cprd__fields(&call, "name s generation u", t->name, t->generation);
    if (t && t->generation) cprd__fields(&call, "token b", t->token);
    return call;
}

static int await(const cprd *c, double until) {
    struct pollfd one = {c->sock, POLLIN, 0};
    double left;
    do {
        left = until - now();
        if (poll(&one, 1, left <= 0 ? 0 : left > 1e6 ? 1000000000 : (int)(left * 1000) + 1) > 0)
            return CPRD_OK;
    } while (left > 0);
    return cprd__fail(CPRD_TIMEOUT, "cprd accepted the connection and has not answered in time");
}

/* The error that an answer is. */
static int refused(const struct cprd__answer *a) {
    struct value until = get(a->of, "until");
    struct cprd_error said = {.code = CPRD_ERROR, .until = -1};
    char error[32];
    text(a->of, "error", error, sizeof error);
    text(a->of, "why", said.text, sizeof said.text);
    text(a->of, "phase", said.phase, sizeof said.phase);
    said.pid = (int64_t)cprd__number(a->of, "pid", UINT64_MAX);
    if (until.kind == DOUBLE) said.until = (union real){.bits = until.number}.value;
    if (until.kind == NUMBER) said.until = (double)until.number;
    for (int n = 1; n <= CPRD_INVALID_INPUT; n++)
        if (!strcmp(error, classes[n])) said.code = n;
    cprd__close_all(&a->fd, 1);
    cprd__last = said;
    return said.code;
}

/* Send a request and receive the answer to it. Returns what the answer says; LOST; TIMEOUT. */
static int ask(cprd *c, struct cprd__call *call, double until, struct cprd__answer *a) {
    int fds[CPRD__SCM_MAX];
    double left = until - c->timeout - now(); /* to wait */
    if (call->m.failed) return cprd__no_memory();
    put_big(call->m.at + ID, ++c->id, 8);
    union real wait = {left > 0.001 ? left : 0.001};
    if (call->wait > 0) put_big(call->m.at + call->m.size - 8, wait.bits, 8);
    /* EAGAIN: cprd has read none of hundreds before. Another error: cprd may have said why. */
    int error = cprd__send(c->sock, call->m.at, call->m.size, NULL, 0);
    for (;;) {
        size_t count;
        int flags = 0;
        long got;
        if ((!error || error == EAGAIN) && await(c, until)) return CPRD_TIMEOUT;
        RAISED(got = cprd__receive(c->sock, a->bytes, sizeof a->bytes, fds, &count, &flags));
        if (got <= 0) return LOST;
        struct reader r = {a->bytes, a->bytes + got, (flags & MSG_TRUNC) != 0};
        struct value all = next(&r), ok = get(all, "ok");
        skip(&r, all);
        a->of = ok.kind == MAP ? ok : all;
        a->cut = (flags & MSG_CTRUNC) != 0;
        a->fd = count ? fds[0] : -1;
        if (count) cprd__close_all(fds + 1, count - 1);
        uint64_t id = cprd__number(all, "id", c->id);
        if (!r.bad && id == c->id && ok.kind == MAP) return CPRD_OK;
        if (!r.bad && id == c->id && get(all, "error").kind == TEXT) return refused(a);
        cprd__close_all(&a->fd, 1);
        if (!r.bad && id != c->id) continue; /* to a request given up */
        hang_up(c);
        return cprd__fail(CPRD_PROTOCOL_ERROR, "an answer of cprd that cannot be read");
    }
}

static int greet(cprd *c, double until, struct cprd__answer *a) {
    struct cprd__call hello = cprd__call_of(NULL, "hello", NULL);
    int rc = CPRD_OK;
    cprd__fields(&hello, "version U", (uint64_t)VERSION);
    RAISED(c->sock = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
    if (c->sock < 0) rc = cprd__no_room("to connect to cprd with");
    else if (connect(c->sock, (struct sockaddr *)&c->address, sizeof c->address))
        rc = errno == EAGAIN ? LOST /* nobody accepts, for now */
             : cprd__fail(errno == EACCES || errno == EPERM ? CPRD_DENIED : CPRD_UNAVAILABLE,
                          "no cprd answers at %s (%s): start it, or name its socket with"
                          " $CPRD_SOCKET", c->address.sun_path, strerror(errno));
    if (!rc) rc = ask(c, &hello, until, a);
    free(hello.m.at);
    if (!rc && cprd__number(a->of, "version", 0) != VERSION)
        rc = cprd__fail(CPRD_PROTOCOL_ERROR, "cprd speaks another version of the protocol than"
                        " this program, which speaks %d", VERSION);
    if (rc) hang_up(c);
    c->cookie = cprd__cookie(c->sock);
    c->pid = rc ? 0 : cprd__number(a->of, "pid", 0);
    c->connects += !rc;
    return rc;
}

int cprd__no_fd(const struct cprd__answer *a) {
    if (a->cut) return cprd__no_room("of cprd's (what is held stays held)");
    return cprd__fail(CPRD_PROTOCOL_ERROR, "an answer of cprd without a descriptor");
}

/* Park the root in a queue of cprd, then send the request that speaks of it. The sending end is
 * closed in the end: so what was parked and not saved is let go of. */
static int ask_parked(cprd *c, struct cprd__call *call, double until, struct cprd__answer *a) {
    const struct cprd__packed *p = call->packed;
    struct cprd__call queue = cprd__call_of(NULL, "queue", NULL);
    int rc = ask(c, &queue, until, a);
    free(queue.m.at);
    if (rc) return rc;
    if (a->fd < 0) return cprd__no_fd(a);
    int inlet = a->fd, error = cprd__send(inlet, p->header, CPRD__HEADER, p->fds, p->parked);
    if (error) rc = error == EPIPE || error == ECONNRESET ? LOST : cprd__explain(error);
    if (!rc) cprd__point("pack:parked");
    if (!rc) rc = ask(c, call, until, a);
    close(inlet);
    return rc;
}

/* A request is repeated on another connection where one is lost: its nonce makes it one request.
 * Without fields there is nothing to ask but a connection. */
int cprd__request(cprd *c, struct cprd__call *call, struct cprd__answer *a) {
    double until = now() + call->wait + c->timeout, away = 0;
    int rc = CPRD_OK;
    if (c->owner != getpid()) { /* another thread may have had the lock when that forked */
        rc = cprd__fail(CPRD_INVALID_INPUT, "this connection belongs to process %d, not to its"
                        " forked child: cprd_connect() there", (int)c->owner);
        goto out;
    }
    cprd__point("%s:before", call->verb);
    pthread_mutex_lock(&c->lock);
    for (;;) {
        int was_open = c->sock >= 0;
        rc = was_open ? CPRD_OK : greet(c, until, a);
        if (!rc) away = 0;
        if (!rc && (call->m.size || call->m.failed))
            rc = (call->packed ? ask_parked : ask)(c, call, until, a);
        if (rc == LOST) hang_up(c);
        if (rc == LOST) cprd__fail(CPRD_UNAVAILABLE, "no answer: the connection is lost");
        if (!away) away = now();
        if ((rc != LOST && (rc != CPRD_UNAVAILABLE || !c->connects)) || now() >= until ||
            now() >= away + RETRY_FOR)
            break;
        if (!was_open) poll(NULL, 0, PAUSE);
    }
    pthread_mutex_unlock(&c->lock);
    rc = rc ? cprd__last.code : CPRD_OK;
    if (!rc) cprd__point("%s:answered", call->verb);
out:
    free(call->m.at);
    return rc;
}

uint64_t cprd__connects(cprd *c) {
    char byte;
    pthread_mutex_lock(&c->lock);
    ssize_t got = recv(c->sock, &byte, 1, MSG_PEEK | MSG_DONTWAIT);
    if (!got || (got < 0 && errno != EAGAIN)) hang_up(c); /* cprd has ended */
    uint64_t connects = c->sock < 0 ? 0 : c->connects;
    pthread_mutex_unlock(&c->lock);
    return connects;
}

int cprd_connect(const char *path, cprd **out) {
    struct cprd__call call = {.verb = "connect"};
    struct cprd__answer a;
    if (!path) path = getenv("CPRD_SOCKET");
    if (!path || !*path) path = "/run/cprd/cprd.sock";
    cprd *c = calloc(1, sizeof *c);
    if (!c) return cprd__no_memory();
    *c = (cprd){.sock = -1, .owner = getpid(), .timeout = MUTE, .address.sun_family = AF_UNIX};
    pthread_mutex_init(&c->lock, NULL);
    int rc, most = (int)sizeof c->address.sun_path;
    if (snprintf(c->address.sun_path, (size_t)most, "%s", path) < most)
        rc = cprd__request(c, &call, &a);
    else rc = cprd__fail(CPRD_INVALID_INPUT, "the path of a socket has less than %d bytes", most);
    if (rc) free(c);
    else *out = c;
    return rc;
}

void cprd_close(cprd *c) {
    if (c) hang_up(c);
    free(c);
}

void cprd_set_timeout(cprd *c, double seconds) { c->timeout = seconds; }
int cprd_socket(const cprd *c) { return c->sock; }

/* -- verbs ------------------------------------------------------------------------------------ */

static int claim_init(cprd_claim *t, cprd *c, const char *name, double wait) {
    *t = (cprd_claim){.c = c, .name = strdup(name), .over = 1, .bundle = -1};
    if (getrandom(t->nonces, sizeof t->nonces, 0) != sizeof t->nonces || !t->name)
        return cprd__no_memory();
    if (!wait) return CPRD_OK;
    if (cprd_connect(c->address.sun_path, &t->own)) return cprd__last.code;
    t->own->timeout = c->timeout;
    t->c = t->own;
    return CPRD_OK;
}

void cprd__set(cprd_claim *t, const struct cprd__answer *a) {
    struct value token = get(a->of, "token");
    char kept[8];
    t->generation = cprd__number(a->of, "generation", 0);
    t->attempts = cprd__number(a->of, "attempts", 0);
    text(a->of, "last_reject", t->last_reject, sizeof t->last_reject);
    text(a->of, "kept", kept, sizeof kept);
    t->stored = !strcmp(kept, "store");
    t->over = 0;
    if (token.kind == BINARY && token.number == 16) memcpy(t->token, token.data, 16);
}

int cprd__claim(cprd_claim *t, cprd *c, const char *verb, const char *name,
                const struct cprd_load_options *options, const struct cprd__packed *packed,
                struct cprd__answer *a) {
    struct cprd_load_options o = options ? *options : (struct cprd_load_options){.wait = 0};
    if (!(o.wait > 0)) o.wait = 0;
    if (claim_init(t, c, name, o.wait)) return cprd__last.code;
    struct cprd__call call = cprd__call_of(t, verb, NULL);
    cprd__fields(&call, "lease d generation u", o.lease, o.generation);
    cprd__fields(&call, strcmp(verb, "wait") ? "wait d" : "timeout d", o.wait);
    call.packed = packed;
    call.wait = o.wait;
    int rc = cprd__request(t->c, &call, a);
    if (!rc) cprd__set(t, a);
    return rc;
}

void cprd__close(cprd_claim *t) {
    cprd_close(t->own);
    free(t->name);
}

/* As long as the bundle is there, what was taken and closed since stays open. */
static int ended(cprd_claim *t) {
    t->over = 1;
    cprd__close_all(&t->bundle, 1);
    t->bundle = -1;
    return CPRD_OK;
}

int cprd__end(cprd_claim *t, const char *verb, const char *why, int cause) {
    if (t->over) return cprd__fail(CPRD_FENCED, "%s: '%s' has ended already", verb, t->name);
    int second = !strcmp(verb, "reject") || !strcmp(verb, "abort");
    struct cprd__call call = cprd__call_of(t, verb, t->nonces[second]);
    struct cprd__answer a;
    char cut[MAX_WHY + 1];
    snprintf(cut, sizeof cut, "%s", why ? why : "");
    while (!is_utf8((unsigned char *)cut, strlen(cut))) cut[strlen(cut) - 1] = 0;
    cprd__fields(&call, "why s damaged f attempt n", why ? cut : NULL, cause == CPRD_DAMAGED,
                 cause != CPRD_DAMAGED && cause != CPRD_OK);
    int rc = cprd__request(t->c, &call, &a);
    return rc ? rc : ended(t);
}

int cprd__give_back(cprd_claim *t, int cause) {
    struct cprd_error said = cprd__last;
    const char *why = cause ? said.text : "closed without confirm";
    int rc = t->over ? CPRD_OK : cprd__end(t, "reject", why, cause);
    t->over = 1;
    if (cause && rc == CPRD_FENCED) return rc; /* so it was emptied while this process read it */
    cprd__last = said;
    return cause;
}

struct process {
    int fd;              /* a pidfd, or -1 */
    uint64_t pid, inode; /* as cprd is told. pid 0: has ended; inode 0: before Linux 6.9 */
};

static int name_process(const cprd *c, struct process *p) {
    struct stat there;
    struct statfs system;
    long pid;
    if (p->fd < 0) return CPRD_OK;
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
static void say_ended(const cprd_claim *t, const struct process *p) {
    struct pollfd one = {p->fd, POLLIN, 0};
    if (!p->pid || p->inode || poll(&one, 1, 0) <= 0) return;
    struct cprd__answer a;
    struct cprd__call call = cprd__call_of(NULL, "ended", NULL);
    cprd__fields(&call, "name s generation U pid U", t->name, t->generation, p->pid);
    cprd__request(t->c, &call, &a);
}

/* A new claim has no token to say. */
static int save(cprd_claim *t, const char *verb, const cprd_state *s,
               const struct cprd_save_options *options, struct cprd_saved *out) {
    struct cprd_save_options o = options ? *options : (struct cprd_save_options){.replace = 0};
    struct process p = {.fd = o.after_exit == CPRD_AFTER_PROCESS ? o.process : -1};
    struct cprd__packed packed = {.fds = NULL};
    struct cprd__answer a;
    int rc = name_process(t->c, &p);
    if (o.after_exit < CPRD_NOW || o.after_exit > CPRD_AFTER_PROCESS)
        rc = cprd__fail(CPRD_INVALID_INPUT, "after_exit of the save options is none that there is");
    if (!rc) rc = pack(s, t->c->cookie, &packed);
    if (!rc) {
        const char *after = o.after_exit == CPRD_AFTER_ME ? "peer" : p.pid ? "process" : "no";
        struct cprd__call call = cprd__call_of(t, verb, NULL);
        cprd__fields(&call, "fds U bytes u parked u depth u after_exit s pid u inode u",
                     (uint64_t)packed.fd_count, packed.size, (uint64_t)packed.parked,
                     (uint64_t)packed.depth, after, p.pid, p.inode);
        cprd__fields(&call, "ttl d if_exists s require s", o.ttl, o.replace ? "replace" : NULL,
                     o.require_store ? "store" : NULL);
        call.packed = &packed;
        rc = cprd__request(t->c, &call, &a);
    }
    cprd__close_all(packed.made, packed.made_count); /* now: cprd's copy is never the last one */
    free(packed.made);
    free(packed.fds);
    if (rc) return rc;
    cprd__set(t, &a);
    say_ended(t, &p);
    if (out) *out = (struct cprd_saved){t->generation, t->stored};
    return CPRD_OK;
}

int cprd_save(cprd *c, const char *name, cprd_state *s, const struct cprd_save_options *options,
              struct cprd_saved *out) {
    cprd_claim t = {.c = c, .name = (char *)(uintptr_t)name, .over = 1};
    return save(&t, "save", s, options, out);
}

int cprd_prepare(cprd *c, const char *name, cprd_state *s, const struct cprd_save_options *options,
                 cprd_prepared **out) {
    cprd_prepared *p = *out = calloc(1, sizeof *p);
    if (!p) return cprd__no_memory();
    int rc = claim_init(p, c, name, 0);
    p->stays = 1;
    if (!rc) rc = save(p, "prepare", s, options, NULL);
    if (!rc) return CPRD_OK;
    cprd_claim_close(p);
    *out = NULL;
    return rc;
}

int cprd_load(cprd *c, const char *name, const struct cprd_load_options *options,
              cprd_claim **out) {
    struct cprd__answer a;
    cprd_claim *claim = *out = calloc(1, sizeof *claim);
    if (!claim) return cprd__no_memory();
    int rc = cprd__claim(claim, c, "load", name, options, NULL, &a);
    if (!rc) {
        int live = cprd__number(a.of, "live", 0) && cprd__unpack_live;
        claim->bundle = a.fd;
        if (a.fd < 0) rc = cprd__no_fd(&a);
        else rc = (live ? cprd__unpack_live : cprd_unpack)(a.fd, &claim->state);
    }
    if (!rc) return CPRD_OK;
    rc = cprd__give_back(claim, rc);
    cprd_claim_close(claim);
    *out = NULL;
    return rc;
}

cprd_state *cprd_claim_state(cprd_claim *claim) { return claim->state; }
uint64_t cprd_claim_generation(const cprd_claim *claim) { return claim->generation; }
uint64_t cprd_claim_attempts(const cprd_claim *claim) { return claim->attempts; }
const char *cprd_claim_last_reject(const cprd_claim *claim) { return claim->last_reject; }

int cprd_begin(cprd_claim *claim, int process) {
    struct process p = {.fd = process};
    struct cprd__answer a;
    if (name_process(claim->c, &p)) return cprd__last.code;
    if (process >= 0 && !p.pid)
        return cprd__fail(CPRD_INVALID_INPUT, "begin: the process that is to act has ended");
    struct cprd__call call = cprd__call_of(claim, "begin", NULL);
    cprd__fields(&call, "pid u inode u", p.pid, p.inode);
    int rc = cprd__request(claim->c, &call, &a);
    if (!rc || rc == CPRD_UNAVAILABLE || rc == CPRD_TIMEOUT) claim->stays = 1; /* perhaps */
    if (!rc) say_ended(claim, &p);
    return rc;
}

int cprd_commit(cprd_prepared *p, struct cprd_saved *out) {
    int rc = cprd__end(p, "commit", NULL, CPRD_OK);
    if (!rc && out) *out = (struct cprd_saved){p->generation, p->stored};
    return rc;
}

int cprd_abort(cprd_prepared *p) { return cprd__end(p, "abort", NULL, CPRD_OK); }
void cprd_prepared_free(cprd_prepared *p) { cprd_claim_close(p); }
int cprd_confirm(cprd_claim *claim) { return cprd__end(claim, "confirm", NULL, CPRD_OK); }

int cprd_reject(cprd_claim *claim, const char *why) {
    return cprd__end(claim, "reject", why, CPRD_OK);
}

void cprd_claim_close(cprd_claim *claim) {
    if (!claim) return;
    if (!claim->stays) cprd__give_back(claim, CPRD_OK);
    cprd__close_all(&claim->bundle, 1);
    cprd_state_free(claim->state);
    cprd__close(claim);
    free(claim);
}

int cprd_wait(cprd *c, const char *name, double seconds, uint64_t *generation) {
    struct cprd_load_options options = {.wait = seconds > 0.001 ? seconds : 0.001};
    struct cprd__answer a;
    cprd_claim t; /* a connection of its own is all that this has */
    int rc = cprd__claim(&t, c, "wait", name, &options, NULL, &a);
    if (!rc && generation) *generation = t.generation;
    cprd__close(&t);
    return rc;
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
    int rc = save(claim, "confirm_next", next, options, out);
    return rc ? rc : ended(claim);
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
        struct value holds = get(a.of, "holds");
        struct reader r = {holds.data, holds.end, holds.kind != ARRAY};
        for (; holds.number && !r.bad; holds.number--) {
            char name[512], phase[32];
            struct value row = next(&r);
            text(row, "name", name, sizeof name);
            text(row, "phase", phase, sizeof phase);
            struct cprd_row told = {name, phase, cprd__number(row, "uid", 0),
                                    cprd__number(row, "generation", 0),
                                    cprd__number(row, "fds", 0), cprd__number(row, "bytes", 0)};
            each(context, &told);
            skip(&r, row);
        }
        more = cprd__number(a.of, "more", 0);
    } while (more);
    return CPRD_OK;
}
