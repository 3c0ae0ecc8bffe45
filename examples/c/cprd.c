/* States, bundles, requests. cprd.h says how to use them, docs/protocol.md and docs/bundle.md have
 * the bytes. */
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
static void raise_limit(int up) {
    static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    static struct rlimit usual;
    static int users;
    pthread_mutex_lock(&lock);
    if (up && !users++) getrlimit(RLIMIT_NOFILE, &usual);
    users -= !up;
    struct rlimit limit = {up ? usual.rlim_max : usual.rlim_cur, usual.rlim_max};
    if (users == up) setrlimit(RLIMIT_NOFILE, &limit);
    pthread_mutex_unlock(&lock);
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

/* -- a state ----------------------------------------------------------------------------------- */

struct item {
    struct cprd__key key;
    struct cprd_item known; /* to programs */
    int owned;              /* the descriptor */
    size_t place;           /* in the order of adding */
    char text[];            /* data that is not mapped, and the name */
};
struct cprd_state {
    struct cprd__key *keys;   /* the top of all */
    struct cprd__bytes items; /* pointers, in order */
    size_t sections;
};

static size_t count_of(const cprd_state *s) { return s->items.size / sizeof(struct item *); }
static struct item **at(const cprd_state *s, size_t n) { return (struct item **)s->items.at + n; }

cprd_state *cprd_state_new(void) { return calloc(1, sizeof(cprd_state)); }

static void item_free(struct item *item) {
    if (item->known.is_section && item->known.fd >= 0 && item->known.size)
        munmap((void *)(uintptr_t)item->known.data, item->known.size);
    if (item->owned) cprd__close_all(&item->known.fd, 1);
    free(item);
}

void cprd_state_free(cprd_state *s) {
    if (!s) return;
    for (size_t n = 0; n < count_of(s); n++) item_free(*at(s, n));
    free(s->items.at);
    free(s);
}

/* All bytes of a memfd; privately, for no sealed one can be shared before Linux 6.7. */
static int map(int memfd, const void **data, size_t *size) {
    struct stat there = {.st_size = 0};
    fstat(memfd, &there);
    *size = (size_t)there.st_size;
    *data = *size ? mmap(NULL, *size, PROT_READ, MAP_PRIVATE, memfd, 0) : NULL;
    if (*data == MAP_FAILED) *size = 0;
    return *data == MAP_FAILED ? cprd__no_memory() : CPRD_OK;
}

int cprd__add(cprd_state *s, const struct cprd__key *key, int fd, int owned, const void *data,
              size_t size, int packed) {
    int is_section = key->space == CPRD__SECTION;
    if (cprd__check_name(key)) return cprd__last.code;
    struct cprd__key **slot = cprd__slot(&s->keys, key);
    struct item *old = (struct item *)*slot;
    if (old && (owned || !is_section))
        return cprd__fail(CPRD_INVALID_INPUT, "key (%s, %d) is used already", old->key.name,
                          old->key.id);
    struct item *item = calloc(1, sizeof *item + size + key->length + 1);
    if (!item) return cprd__no_memory();
    item->key = old ? old->key : *key; /* with all below */
    item->key.name = memcpy(item->text + size, key->name, key->length);
    item->known = (struct cprd_item){is_section, item->key.name, key->id, fd, packed != 0,
                                     size ? memcpy(item->text, data, size) : item->text, size};
    item->place = old ? old->place : count_of(s);
    int rc = is_section && fd >= 0 ? map(fd, &item->known.data, &item->known.size) : CPRD_OK;
    if (!rc && !old) cprd__put(&s->items, &item, sizeof item);
    if (rc || s->items.failed) {
        item_free(item);
        return cprd__no_memory();
    }
    item->owned = owned;
    *at(s, item->place) = item;
    *slot = &item->key;
    s->sections += !old && is_section;
    if (old) item_free(old);
    return CPRD_OK;
}

/* What a program adds; borrowed. */
static int add(cprd_state *s, int space, const char *name, int32_t id, int fd, const void *data,
               size_t size, int packed) {
    struct cprd__key key = cprd__key(space, name, strlen(name), id);
    return cprd__add(s, &key, fd, 0, data, size, packed);
}

int cprd_add_fd(cprd_state *s, const char *name, int32_t id, int fd) {
    if (fcntl(fd, F_GETFD) >= 0) return add(s, CPRD__FD, name, id, fd, NULL, 0, 0);
    return cprd__fail(CPRD_INVALID_INPUT, "fd %d of (%s, %d) is not open", fd, name, id);
}

int cprd_add_section(cprd_state *s, const char *name, const void *data, size_t size, int packed) {
    return add(s, CPRD__SECTION, name, 0, -1, data, size, packed);
}

int cprd_add_memfd(cprd_state *s, const char *name, int memfd, int packed) {
    if (cprd__is_sealed(memfd)) return add(s, CPRD__SECTION, name, 0, memfd, NULL, 0, packed);
    return cprd__fail(CPRD_INVALID_INPUT, "section '%s': fd %d is no memfd with all four seals"
                      " (F_SEAL_SEAL, SHRINK, GROW, WRITE)", name, memfd);
}

const struct cprd_item *cprd_item_at(const cprd_state *s, size_t index) {
    return index < count_of(s) ? &(*at(s, index))->known : NULL;
}

static struct cprd_item *find(const cprd_state *s, int space, const char *name, int32_t id) {
    struct cprd__key key = cprd__key(space, name, strlen(name), id), *top = s->keys;
    struct item *item = (struct item *)*cprd__slot(&top, &key);
    return item ? &item->known : NULL;
}

const struct cprd_item *cprd_find_section(const cprd_state *s, const char *name) {
    return find(s, CPRD__SECTION, name, 0);
}

int cprd_find_fd(const cprd_state *s, const char *name, int32_t id) {
    const struct cprd_item *item = find(s, CPRD__FD, name, id);
    return item ? item->fd : -1;
}

int cprd_take_fd(cprd_state *s, const char *name, int32_t id) {
    struct cprd_item *item = find(s, CPRD__FD, name, id);
    int fd = item ? item->fd : -1;
    if (item) item->fd = -1;
    return fd;
}

/* -- msgpack: as much as cprd and bundles take ------------------------------------------------- */

static void put_big(unsigned char *to, uint64_t value, int width) {
    for (; width--; value >>= 8) to[width] = (unsigned char)value;
}

static void put_number(struct cprd__bytes *b, int type, uint64_t value, int width) {
    unsigned char data[9] = {(unsigned char)type};
    put_big(data + 1, value, width);
    cprd__put(b, data, 1 + (size_t)width);
}

static void put_data(struct cprd__bytes *b, int type, const void *data, size_t size) {
    put_number(b, type, size, 4);
    cprd__put(b, data, size);
}

static void put_text(struct cprd__bytes *b, const char *s) { put_data(b, 0xdb, s, strlen(s)); }

static uint64_t take(struct reader *r, int width) {
    uint64_t value = 0;
    if (r->end - r->at < width) r->bad = 1;
    while (width-- && !r->bad) value = value << 8 | *r->at++;
    return value;
}

/* The head of the next value; text and binary with their bytes. */
struct value cprd__next(struct reader *r) {
    static const char kinds[] = "n-uuxxx---fduuuuuuuu-----tttaamm"; /* of types from 0xc0 on */
    static const char widths[] = "00001240004812481248000001242424";
    unsigned type = (unsigned)take(r, 1), n = type & 31;
    struct value v = {.kind = NUMBER, .number = (uint64_t)(int8_t)type};
    if (type >= 0xc0 && type < 0xe0) {
        v.kind = (enum kind)kinds[n];
        v.number = take(r, widths[n] - '0');
    } else if (type >= 0x80 && type < 0xc0) {
        v.kind = type < 0x90 ? MAP : type < 0xa0 ? ARRAY : TEXT;
        v.number = type < 0xa0 ? type & 15 : n;
    }
    if (type == 0xc3) v.number = 1;
    v.data = r->at;
    v.end = r->end;
    if (v.kind == TEXT || v.kind == BINARY) {
        r->bad |= (uint64_t)(r->end - r->at) < v.number;
        r->at += r->bad ? 0 : v.number;
    }
    r->bad |= v.kind == BAD;
    return r->bad ? (struct value){.kind = NIL} : v;
}

static int is(const struct value *v, const char *text) {
    return v->kind == TEXT && v->number == strlen(text) && !memcmp(v->data, text, v->number);
}

/* All that is in `v`, which was read last. */
void cprd__skip(struct reader *r, struct value v) {
    for (uint64_t left = 1; left && !r->bad; left--) {
        left += v.kind == MAP ? 2 * v.number : v.kind == ARRAY ? v.number : 0;
        if (left > 1) v = cprd__next(r);
    }
}

/* The value of a key in a map, or nil. What is not known is passed over. */
struct value cprd__get(struct value map, const char *key) {
    struct reader r = {map.data, map.end, map.kind != MAP};
    while (!r.bad && map.number--) {
        struct value name = cprd__next(&r), v = cprd__next(&r);
        if (is(&name, key)) return v;
        cprd__skip(&r, v);
    }
    return (struct value){.kind = NIL};
}

uint64_t cprd__number(struct value map, const char *key, uint64_t otherwise) {
    struct value v = cprd__get(map, key);
    return v.kind == NUMBER ? v.number : otherwise;
}

void cprd__text(struct value map, const char *key, char *to, size_t room) {
    struct value v = cprd__get(map, key);
    size_t size = v.kind != TEXT ? 0 : v.number < room ? v.number : room - 1;
    if (size) memcpy(to, v.data, size);
    to[size] = 0;
}

/* -- a bundle ---------------------------------------------------------------------------------- */

static const char *const PARTS[] = {"sections", "ids", "names"}; /* of the manifest */

static void make_header(unsigned char *header, int depth, size_t here, size_t total, uint64_t size,
                        uint64_t index) {
    struct cprd__bytes b = {header, 0, CPRD__HEADER, 0};
    cprd__put(&b, depth ? "CPRB\1\0\2" : "CPRB\1\0\1", 7);
    cprd__put_little(&b, (uint64_t)depth, 1);
    cprd__put_little(&b, here, 4);
    cprd__put_little(&b, total, 4);
    cprd__put_little(&b, size, 8);
    cprd__put_little(&b, index, 8);
}

/* `parts`: of the manifest: sections, ids, names. `ours`: the cookie of the connection. */
static int pack_item(const struct cprd_item *item, uint64_t ours, struct cprd__packed *p,
                     struct cprd__bytes *parts) {
    int fd = item->fd;
    if (item->is_section) {
        if (fd < 0 && item->size > INLINE) {
            if (cprd__memfd(item->name, item->data, item->size, &fd)) return cprd__last.code;
            p->made[p->made_count++] = fd;
        }
        p->size += item->size;
        put_number(parts, 0x94, 0, 0);
        put_text(parts, item->name);
        put_number(parts, item->packed, 0, 0);
        put_number(parts, fd >= 0, 0, 0);
        put_data(parts, 0xc6, item->data, fd < 0 ? item->size : 0);
    } else {
        if (fd < 0 || (ours && cprd__cookie(fd) == ours))
            return cprd__fail(CPRD_INVALID_INPUT, "fd %d of (%s, %d) was taken, or is the"
                              " connection to cprd itself", fd, item->name, item->id);
        cprd__put(&parts[2], "", p->fd_count++ > 0); /* a NUL between */
        cprd__put(&parts[2], item->name, strlen(item->name));
        cprd__put_little(&parts[1], (uint32_t)item->id, 4);
    }
    if (fd >= 0) p->fds[p->parked++] = fd;
    return CPRD_OK;
}

/* Queues of 253 descriptors each, in the place of these, until one message is enough. */
static int pack_tree(struct cprd__packed *p) {
    const size_t most = CPRD__SCM_MAX, total = p->parked;
    for (size_t below = 1; p->parked > most; below *= most, p->depth++) { /* one has so many */
        size_t above = 0;
        if (p->depth == 2) return cprd__fail(CPRD_LIMIT_EXCEEDED, "too many descriptors");
        for (size_t start = 0; start < p->parked; start += most, above++) {
            size_t left = p->parked - start, here = left < most ? left : most;
            size_t rest = total - start * below, under = here * below;
            unsigned char header[CPRD__HEADER];
            int tx = -1, rx = -1;
            make_header(header, p->depth, here, under < rest ? under : rest, 0, above);
            if (cprd__pair(&tx, &rx)) return cprd__last.code;
            p->made[p->made_count++] = rx;
            int error = cprd__send(tx, header, CPRD__HEADER, p->fds + start, here);
            close(tx);
            if (error) return cprd__explain(error);
            cprd__point("pack:sent");
            p->fds[above] = rx; /* what lay there is parked by now */
        }
        p->parked = above;
    }
    make_header(p->header, p->depth, p->parked, total, p->size, 0);
    return CPRD_OK;
}

/* The manifest, memfds of sections, and the descriptors under keys, in a tree. */
static int pack(const cprd_state *s, uint64_t ours, struct cprd__packed *p) {
    struct cprd__bytes parts[4] = {{0}}, *manifest = &parts[3];
    int rc = CPRD_OK;
    *p = (struct cprd__packed){.fds = calloc(count_of(s) + 1, sizeof(int)), .parked = 1};
    p->made = calloc(2 * count_of(s) + 2, sizeof(int));
    if (!p->fds || !p->made) return cprd__no_memory();
    for (int is_section = 1; is_section >= 0; is_section--)
        for (size_t n = 0; n < count_of(s) && !rc; n++)
            if ((*at(s, n))->known.is_section == is_section)
                rc = pack_item(&(*at(s, n))->known, ours, p, parts);
    put_number(manifest, 0x83, 0, 0);
    for (int n = 0; n < 3; n++) {
        put_text(manifest, PARTS[n]);
        put_number(manifest, n ? 0xc6 : 0xdd, n ? parts[n].size : s->sections, 4);
        cprd__put(manifest, parts[n].at, parts[n].size);
        manifest->failed |= parts[n].failed;
        free(parts[n].at);
    }
    if (!rc && manifest->failed) rc = cprd__no_memory();
    if (!rc && (manifest->size > MAX_MANIFEST || s->sections > MAX_SECTIONS))
        rc = cprd__fail(CPRD_LIMIT_EXCEEDED, "keys and small sections exceed %d bytes, or more than"
                        " %d sections", MAX_MANIFEST, MAX_SECTIONS);
    if (!rc) rc = cprd__memfd("cprd-manifest", manifest->at, manifest->size, &p->fds[0]);
    if (!rc) p->made[p->made_count++] = p->fds[0];
    free(manifest->at);
    if (!rc) cprd__point("pack:manifest");
    return rc ? rc : pack_tree(p);
}

static int damaged(const char *why) {
    return cprd__fail(CPRD_DAMAGED, "the bundle is not whole: %s", why);
}

/* One node of a bundle, and all below; its descriptors are appended to `out`. `parent`: the depth
 * that the parent has; 0: the root. */
static int peek_node(int sock, int parent, uint64_t index, struct cprd__bytes *out) {
    unsigned char h[CPRD__HEADER + 1] = {0};
    int fds[CPRD__SCM_MAX], flags = MSG_PEEK, off = -1, rc = CPRD_OK;
    size_t count, used = 0, before = out->size;
    setsockopt(sock, SOL_SOCKET, SO_PEEK_OFF, &off, sizeof off);
    long got = cprd__receive(sock, h, sizeof h, fds, &count, &flags);
    size_t here = cprd__little(h + 8, 4), total = cprd__little(h + 12, 4);
    int version = (int)cprd__little(h + 4, 2), depth = h[7];
    if (got >= 6 && !memcmp(h, "CPRB", 4) && version != 1)
        rc = cprd__fail(CPRD_BUSY, "a bundle of version %d; this program reads version 1 (with"
                        " cprd_live.c 2, a live hold)", version);
    else if (got != CPRD__HEADER || memcmp(h, "CPRB", 4) || cprd__waiting(sock) != CPRD__HEADER ||
             depth > 2 || h[6] != (depth ? 2 : 1) || (depth ? total < here : total != here) ||
             (parent && (depth != parent - 1 || cprd__little(h + 24, 8) != index)))
        rc = damaged("a part has no header that makes sense");
    else if (flags & MSG_CTRUNC) rc = cprd__no_room("to load (what is held stays held)");
    else if (!here || count != here) rc = damaged("a part lacks what it says");
    else rc = cprd__room_for(total + 8); /* and what a program opens next */
    if (!rc && !depth) cprd__put(out, fds, count * sizeof *fds);
    if (!rc && out->failed) rc = cprd__no_memory();
    if (!rc && !depth) used = count;
    for (; !rc && used < count; used++) {
        rc = peek_node(fds[used], depth, used, out);
        close(fds[used]);
    }
    if (!rc && out->size - before != total * sizeof *fds)
        rc = damaged("it has other descriptors than it says");
    cprd__close_all(fds + used, count - used);
    return rc;
}

/* The array of sections. Of memfds, *fds is the next; -1 as soon as the state owns it. */
static int read_sections(cprd_state *s, struct value list, int **fds, const int *end) {
    struct reader r = {list.data, list.end, list.kind != ARRAY || list.number > MAX_SECTIONS};
    for (; list.number && !r.bad; list.number--) {
        struct value one = cprd__next(&r), name = cprd__next(&r), packed = cprd__next(&r);
        struct value by = cprd__next(&r), data = cprd__next(&r);
        int memfd = by.number && *fds < end ? **fds : -1;
        if (one.kind != ARRAY || one.number != 4 || name.kind != TEXT || packed.kind != NUMBER ||
            by.kind != NUMBER || data.kind != BINARY || (by.number && !cprd__is_sealed(memfd)))
            break;
        struct cprd__key key = cprd__key(CPRD__SECTION, name.data, name.number, 0);
        size_t size = by.number ? 0 : data.number;
        if (cprd__add(s, &key, memfd, 1, data.data, size, packed.number != 0))
            return cprd__last.code;
        if (by.number) *(*fds)++ = -1;
    }
    return list.number || r.bad ? damaged("its sections cannot be read") : CPRD_OK;
}

/* The state of the descriptors of a bundle, the manifest apart. */
static int read_manifest(cprd_state *s, struct reader r, int *fds, const int *last) {
    struct value map = cprd__next(&r), of[3] = {{.kind = ARRAY}, {.kind = NIL}, {.kind = NIL}};
    if (map.kind != MAP || map.number > 16) r.bad = 1;
    for (; map.number && !r.bad; map.number--) {
        struct value part = cprd__next(&r), v = cprd__next(&r);
        if (part.kind == ARRAY || part.kind == MAP) r.bad = 1;
        if (part.kind == TEXT && !is_utf8(part.data, part.number)) r.bad = 1;
        for (int n = 0; n < 3; n++)
            if (is(&part, PARTS[n])) of[n] = v;
        cprd__skip(&r, v); /* another one is of a later version */
    }
    const struct value ids = of[1], names = of[2];
    if (r.bad || r.at != r.end) return damaged("the manifest cannot be read");
    if (read_sections(s, of[0], &fds, last)) return cprd__last.code;
    size_t left = (size_t)(last - fds);
    if (names.kind != BINARY || ids.kind != BINARY || ids.number != 4 * left ||
        (!left && names.number))
        return damaged("the manifest names other descriptors than there are");
    const char *name = (const char *)names.data, *end = name + names.number;
    for (const unsigned char *id = ids.data; left; left--, id += 4) {
        const char *nul = memchr(name, 0, (size_t)(end - name)), *stop = nul ? nul : end;
        if (!nul != (left == 1)) return damaged("the manifest does not name all descriptors");
        struct cprd__key key =
            cprd__key(CPRD__FD, name, (size_t)(stop - name), (int32_t)cprd__little(id, 4));
        if (cprd__add(s, &key, *fds, 1, NULL, 0, 0)) return cprd__last.code;
        *fds++ = -1;
        name = stop + 1;
    }
    return CPRD_OK;
}

int cprd_unpack(int bundle, cprd_state **out) {
    struct cprd__bytes found = {0};
    const void *data = NULL;
    size_t size = 0;
    cprd_state *s = cprd_state_new();
    int rc = s ? peek_node(bundle, 0, 0, &found) : cprd__no_memory(), *fds = (int *)found.at;
    size_t count = found.size / sizeof *fds;
    cprd__point("load:peeked");
    if (!rc && cprd__is_sealed(*fds)) rc = map(*fds, &data, &size);
    if (!rc && (!size || size > MAX_MANIFEST)) rc = damaged("the manifest is not a sealed memfd");
    struct reader r = {data, size ? (const unsigned char *)data + size : NULL, 0};
    if (!rc) rc = read_manifest(s, r, fds + 1, fds + count);
    if (rc == CPRD_INVALID_INPUT) rc = cprd__fail(CPRD_DAMAGED, "%s", cprd__last.text);
    if (size) munmap((void *)(uintptr_t)data, size);
    cprd__close_all(fds, count); /* what the state does not own */
    free(found.at);
    if (rc) cprd_state_free(s);
    else *out = s;
    return rc;
}

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

void cprd__hang_up(cprd *c) {
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
    struct value until = cprd__get(a->of, "until");
    struct cprd_error said = {.code = CPRD_ERROR, .until = -1};
    char error[32];
    cprd__text(a->of, "error", error, sizeof error);
    cprd__text(a->of, "why", said.text, sizeof said.text);
    cprd__text(a->of, "phase", said.phase, sizeof said.phase);
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
        struct value all = cprd__next(&r), ok = cprd__get(all, "ok");
        cprd__skip(&r, all);
        a->of = ok.kind == MAP ? ok : all;
        a->cut = (flags & MSG_CTRUNC) != 0;
        a->fd = count ? fds[0] : -1;
        if (count) cprd__close_all(fds + 1, count - 1);
        uint64_t id = cprd__number(all, "id", c->id);
        if (!r.bad && id == c->id && ok.kind == MAP) return CPRD_OK;
        if (!r.bad && id == c->id && cprd__get(all, "error").kind == TEXT) return refused(a);
        cprd__close_all(&a->fd, 1);
        if (!r.bad && id != c->id) continue; /* to a request given up */
        cprd__hang_up(c);
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
    if (rc) cprd__hang_up(c);
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
        if (rc == LOST) cprd__hang_up(c);
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
    if (c) cprd__hang_up(c);
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
    struct value token = cprd__get(a->of, "token");
    char kept[8];
    t->generation = cprd__number(a->of, "generation", 0);
    t->attempts = cprd__number(a->of, "attempts", 0);
    cprd__text(a->of, "last_reject", t->last_reject, sizeof t->last_reject);
    cprd__text(a->of, "kept", kept, sizeof kept);
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
    return rc ? rc : cprd__ended(t);
}

/* As long as the bundle is there, what was taken and closed since stays open. */
int cprd__ended(cprd_claim *t) {
    t->over = 1;
    cprd__close_all(&t->bundle, 1);
    t->bundle = -1;
    return CPRD_OK;
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

/* Before the request, unless there is no pidfd. */
static int name_process(const cprd *c, struct cprd__process *p) {
    if (p->fd < 0 || cprd__name_process) return p->fd < 0 ? CPRD_OK : cprd__name_process(c, p);
    return cprd__fail(CPRD_INVALID_INPUT, "link cprd_more.c for a process by its pidfd");
}

/* A new claim has no token to say. */
int cprd__save(cprd_claim *t, const char *verb, const cprd_state *s,
               const struct cprd_save_options *options, struct cprd_saved *out) {
    struct cprd_save_options o = options ? *options : (struct cprd_save_options){.replace = 0};
    struct cprd__process p = {.fd = o.after_exit == CPRD_AFTER_PROCESS ? o.process : -1};
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
    if (p.fd >= 0) cprd__say_ended(t, &p);
    if (out) *out = (struct cprd_saved){t->generation, t->stored};
    return CPRD_OK;
}

int cprd_save(cprd *c, const char *name, cprd_state *s, const struct cprd_save_options *options,
              struct cprd_saved *out) {
    cprd_claim t = {.c = c, .name = (char *)(uintptr_t)name, .over = 1};
    return cprd__save(&t, "save", s, options, out);
}

int cprd_prepare(cprd *c, const char *name, cprd_state *s, const struct cprd_save_options *options,
                 cprd_prepared **out) {
    cprd_prepared *p = *out = calloc(1, sizeof *p);
    if (!p) return cprd__no_memory();
    int rc = claim_init(p, c, name, 0);
    p->stays = 1;
    if (!rc) rc = cprd__save(p, "prepare", s, options, NULL);
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
    struct cprd__process p = {.fd = process};
    struct cprd__answer a;
    if (name_process(claim->c, &p)) return cprd__last.code;
    if (process >= 0 && !p.pid)
        return cprd__fail(CPRD_INVALID_INPUT, "begin: the process that is to act has ended");
    struct cprd__call call = cprd__call_of(claim, "begin", NULL);
    cprd__fields(&call, "pid u inode u", p.pid, p.inode);
    int rc = cprd__request(claim->c, &call, &a);
    if (!rc || rc == CPRD_UNAVAILABLE || rc == CPRD_TIMEOUT) claim->stays = 1; /* perhaps */
    if (!rc && process >= 0) cprd__say_ended(claim, &p);
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
