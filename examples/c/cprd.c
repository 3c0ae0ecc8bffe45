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
#include <search.h>
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
    MAX_REQUEST = 16 * 1024,
    MAX_ANSWER = 64 * 1024,
    MAX_WHY = 1024,
    INLINE = 16 * 1024, /* bytes of a section; a larger one gets a memfd */
    MAX_MANIFEST = 256 << 20,
    MAX_SECTIONS = 1 << 16,
    LOST = -1 /* the connection has ended: the request may be sent again on another one */
};
static const double MUTE = 20, RETRY_FOR = 15, PAUSE = 0.05; /* s */
static const int SEALS = F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE;

/* -- errors ------------------------------------------------------------------------------------ */

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

int cprd__no_memory(void) {
    return cprd__fail(CPRD_LIMIT_EXCEEDED, "no memory left in this process");
}

int cprd__no_room(uint64_t count) {
    struct rlimit limit = {0, 0};
    getrlimit(RLIMIT_NOFILE, &limit);
    return cprd__fail(CPRD_LIMIT_EXCEEDED, "%llu descriptors more do not fit in this process: its"
                      " soft RLIMIT_NOFILE is %llu; raise it (setrlimit, ulimit -n, LimitNOFILE=);"
                      " what is held stays held", 0ull + count, 0ull + limit.rlim_cur);
}

int cprd__room_for(uint64_t count) {
    struct rlimit limit = {0, 0};
    getrlimit(RLIMIT_NOFILE, &limit);
    return count <= limit.rlim_cur ? CPRD_OK : cprd__no_room(count);
}

int cprd__explain(int error) {
    int is_ours = error == EBADF || error == EINVAL;
    const char *why = is_ours ? "one is not open (any more), or no process can get it (io_uring)"
                      : error == ETOOMANYREFS
                          ? "too many in flight for this uid: all that its processes have parked"
                            " counts against RLIMIT_NOFILE; raise the hard limit (LimitNOFILE=,"
                            " ulimit -Hn), or drop holds of this uid (cprctl list)"
                          : "EAGAIN: a queue is as large as net.core.wmem_max allows";
    return cprd__fail(is_ours ? CPRD_INVALID_INPUT : CPRD_LIMIT_EXCEEDED, "cannot park the"
                      " descriptors: %s (%s); nothing was changed", strerror(error), why);
}

/* -- bytes and keys ---------------------------------------------------------------------------- */

void cprd__put(struct cprd__bytes *b, const void *data, size_t size) {
    if (b->room - b->size < size && !b->failed) {
        size_t room = 2 * (b->size + size) + 256;
        unsigned char *at = realloc(b->at, room);
        b->failed = !at;
        b->at = at ? at : b->at;
        b->room = at ? room : b->room;
    }
    if (b->failed || !size) return;
    memcpy(b->at + b->size, data, size);
    b->size += size;
}

void cprd__put_little(struct cprd__bytes *b, uint64_t value, int width) {
    for (int n = 0; n < width; n++) {
        unsigned char byte = (unsigned char)(value >> 8 * n);
        cprd__put(b, &byte, 1);
    }
}

uint64_t cprd__little(const unsigned char *at, int width) {
    uint64_t value = 0;
    while (width--) value = value << 8 | at[width];
    return value;
}

static int is_utf8(const unsigned char *at, size_t left) {
    static const uint32_t first[] = {0, 0x80, 0x800, 0x10000}; /* that needs so many bytes more */
    while (left) {
        size_t more = *at < 0x80 ? 0 : *at < 0xe0 ? 1 : *at < 0xf0 ? 2 : 3;
        uint32_t letter = more ? *at & (0x3f >> more) : *at;
        if (more >= left || (*at >= 0x80 && *at < 0xc0) || *at >= 0xf8) return 0;
        for (size_t n = 1; n <= more; n++) {
            if ((at[n] & 0xc0) != 0x80) return 0;
            letter = letter << 6 | (at[n] & 0x3f);
        }
        if (letter < first[more] || letter > 0x10ffff || letter >> 11 == 0x1b) return 0;
        at += 1 + more;
        left -= 1 + more;
    }
    return 1;
}

int cprd__check_name(int kind, const char *name, size_t length) {
    if (length && length <= 255 && !memchr(name, 0, length) &&
        (kind == CPRD_FD || is_utf8((const unsigned char *)name, length)))
        return CPRD_OK;
    return cprd__fail(CPRD_INVALID_INPUT, "%s '%.*s': wants 1 to 255 bytes%s",
                      kind == CPRD_FD ? "name" : "section", length < 256 ? (int)length : 255,
                      name, kind == CPRD_FD ? " without NUL" : " of UTF-8");
}

int cprd__by_key(const void *one, const void *other) {
    const struct cprd_key *a = one, *b = other;
    if (a->kind != b->kind) return a->kind - b->kind;
    if (a->id != b->id) return a->id < b->id ? -1 : 1;
    return strcmp(a->name, b->name);
}

/* -- descriptors ------------------------------------------------------------------------------- */

/* A program may have as many descriptors open as its soft limit allows. For the moment of an own
 * call the soft limit is the hard limit; threads share that moment. */
static pthread_mutex_t limit_lock = PTHREAD_MUTEX_INITIALIZER;
static struct rlimit usual_limit;
static int raised;

static void raise_limit(void) {
    pthread_mutex_lock(&limit_lock);
    if (!raised++ && !getrlimit(RLIMIT_NOFILE, &usual_limit)) {
        struct rlimit high = {usual_limit.rlim_max, usual_limit.rlim_max};
        setrlimit(RLIMIT_NOFILE, &high);
    }
    pthread_mutex_unlock(&limit_lock);
}

static void restore_limit(void) {
    pthread_mutex_lock(&limit_lock);
    if (!--raised) setrlimit(RLIMIT_NOFILE, &usual_limit);
    pthread_mutex_unlock(&limit_lock);
}

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
        space.head.cmsg_len = CMSG_LEN(count * sizeof(int));
        space.head.cmsg_level = SOL_SOCKET;
        space.head.cmsg_type = SCM_RIGHTS;
        memcpy(CMSG_DATA(&space.head), fds, count * sizeof(int));
        message.msg_control = &space;
        message.msg_controllen = CMSG_SPACE(count * sizeof(int));
    }
    if (sendmsg(sock, &message, MSG_DONTWAIT | MSG_NOSIGNAL) >= 0) return 0;
    if (errno != ETOOMANYREFS) return errno;
    raise_limit();
    int error = sendmsg(sock, &message, MSG_DONTWAIT | MSG_NOSIGNAL) < 0 ? errno : 0;
    restore_limit();
    return error;
}

long cprd__receive(int sock, void *data, size_t size, int *fds, size_t *count, int *flags) {
    union rights space;
    struct iovec part = {data, size};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
    ssize_t got = -1;
    *count = 0;
    for (int tries = 2; got < 0 && tries; tries--) {
        message.msg_control = fds ? &space : NULL;
        message.msg_controllen = fds ? sizeof space : 0;
        got = recvmsg(sock, &message, *flags | MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
        if (got < 0 && errno != ECONNRESET) return got; /* said once: something was left unread */
    }
    if (got < 0) return got;
    *flags = message.msg_flags;
    for (struct cmsghdr *c = CMSG_FIRSTHDR(&message); c; c = CMSG_NXTHDR(&message, c))
        if (c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_RIGHTS) {
            *count = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
            memcpy(fds, CMSG_DATA(c), *count * sizeof(int));
        }
    return got;
}

void cprd__peek_from(int sock, int from) {
    setsockopt(sock, SOL_SOCKET, SO_PEEK_OFF, &from, sizeof from);
}

int cprd__pair(int *tx, int *rx) {
    int ends[2];
    raise_limit();
    int failed = socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends);
    restore_limit();
    if (failed) return cprd__no_room(2);
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

int cprd__is_sealed(int memfd) {
    int seals = fcntl(memfd, F_GET_SEALS);
    return seals >= 0 && (seals & SEALS) == SEALS;
}

int cprd__memfd(const char *name, const void *data, size_t size, int *out) {
    char label[200];
    size_t done = 0;
    snprintf(label, sizeof label, "%s", name);
    raise_limit();
    int fd = memfd_create(label, MFD_CLOEXEC | MFD_ALLOW_SEALING);
    restore_limit();
    while (fd >= 0 && done < size) {
        ssize_t wrote = write(fd, (const char *)data + done, size - done);
        if (wrote < 0 && errno != EINTR) break;
        done += wrote > 0 ? (size_t)wrote : 0;
    }
    *out = fd;
    if (fd >= 0 && done == size && !fcntl(fd, F_ADD_SEALS, SEALS)) return CPRD_OK;
    cprd__fail(CPRD_LIMIT_EXCEEDED, "cannot make a memfd for %s: %s; raise RLIMIT_NOFILE (EMFILE)"
               " or the memory that this cgroup may use (ENOMEM, ENOSPC)", label, strerror(errno));
    if (fd >= 0) close(fd);
    return CPRD_LIMIT_EXCEEDED;
}

/* -- a state ----------------------------------------------------------------------------------- */

struct item {
    struct cprd_item known; /* first: what a program sees */
    int owned, mapped;      /* the descriptor, the data */
    size_t place;           /* in the order of adding */
    char text[];            /* the name, and data that is not mapped */
};
struct cprd_state {
    void *tree; /* of items, by key */
    struct cprd__bytes items; /* in order: pointers */
};

static size_t count_of(const cprd_state *s) { return s->items.size / sizeof(struct item *); }

static struct item **at(const cprd_state *s, size_t n) { return (struct item **)s->items.at + n; }

cprd_state *cprd_state_new(void) { return calloc(1, sizeof(cprd_state)); }

static void item_free(struct item *item) {
    if (item->mapped) munmap((void *)(uintptr_t)item->known.data, item->known.size);
    if (item->owned && item->known.fd >= 0) close(item->known.fd);
    free(item);
}

void cprd_state_free(cprd_state *s) {
    for (size_t n = 0; s && n < count_of(s); n++) {
        tdelete(*at(s, n), &s->tree, cprd__by_key);
        item_free(*at(s, n));
    }
    if (s) free(s->items.at);
    free(s);
}

/* `replace`: in the place of what is there under the key. */
static int add(cprd_state *s, const struct cprd_item *given, size_t length, int owned,
               int replace) {
    int is_section = given->key.kind == CPRD_SECTION;
    size_t copied = is_section && given->fd < 0 ? given->size : 0;
    struct stat there = {.st_size = (off_t)copied};
    if (cprd__check_name(given->key.kind, given->key.name, length)) return CPRD_INVALID_INPUT;
    if (is_section && given->fd >= 0 && fstat(given->fd, &there))
        return cprd__fail(CPRD_INVALID_INPUT, "fd %d of a section is not open", given->fd);
    struct item *item = calloc(1, sizeof *item + length + 1 + copied), **found = NULL;
    if (!item) return cprd__no_memory();
    *item = (struct item){.known = *given, .place = count_of(s)};
    item->known.key.name = memcpy(item->text, given->key.name, length);
    item->known.size = (size_t)there.st_size;
    item->known.data = item->text + length + 1;
    if (copied) memcpy(item->text + length + 1, given->data, copied);
    if (is_section && given->fd >= 0 && there.st_size) { /* before 6.7 no shared mapping of these */
        item->known.data = mmap(NULL, item->known.size, PROT_READ, MAP_PRIVATE, given->fd, 0);
        item->mapped = item->known.data != MAP_FAILED;
    }
    cprd__put(&s->items, &item, sizeof item);
    if (!s->items.failed && item->known.data != MAP_FAILED)
        found = tsearch(item, &s->tree, cprd__by_key);
    if (found && *found == item) {
        item->owned = owned;
        return CPRD_OK;
    }
    s->items.size = item->place * sizeof item;
    if (!found || !replace) {
        if (!found) cprd__no_memory();
        else
            cprd__fail(CPRD_INVALID_INPUT, "key (%s, %d) is used already", item->text,
                       given->key.id);
        item_free(item);
        return cprd__last.code;
    }
    item->owned = owned;
    item->place = (*found)->place;
    item_free(*found);
    *found = *at(s, item->place) = item;
    return CPRD_OK;
}

int cprd__add(cprd_state *s, const struct cprd_item *given, size_t length, int owned) {
    return add(s, given, length, owned, 0);
}

int cprd_add_fd(cprd_state *s, const char *name, int32_t id, int fd) {
    struct cprd_item item = {.key = {CPRD_FD, id, name}, .fd = fd};
    if (fcntl(fd, F_GETFD) >= 0) return add(s, &item, strlen(name), 0, 0);
    return cprd__fail(CPRD_INVALID_INPUT, "fd %d of (%s, %d) is not open", fd, name, id);
}

int cprd_add_section(cprd_state *s, const char *key, const void *data, size_t size, int packed) {
    struct cprd_item item = {{CPRD_SECTION, 0, key}, -1, packed != 0, size, data};
    int large = size > INLINE;
    if (large && cprd__memfd(key, data, size, &item.fd)) return cprd__last.code;
    int rc = add(s, &item, strlen(key), large, 1);
    if (rc && large) close(item.fd);
    return rc;
}

int cprd_add_memfd(cprd_state *s, const char *key, int memfd, int packed) {
    struct cprd_item item = {{CPRD_SECTION, 0, key}, memfd, packed != 0, 0, NULL};
    if (memfd >= 0 && cprd__is_sealed(memfd)) return add(s, &item, strlen(key), 0, 1);
    return cprd__fail(CPRD_INVALID_INPUT, "section '%s': fd %d is no memfd with all four seals"
                      " (F_SEAL_SEAL, SHRINK, GROW, WRITE)", key, memfd);
}

const struct cprd_item *cprd_item_at(const cprd_state *s, size_t index) {
    return index < count_of(s) ? &(*at(s, index))->known : NULL;
}

static struct item *find(const cprd_state *s, int kind, const char *name, int32_t id) {
    struct cprd_key key = {kind, id, name};
    struct item **found = tfind(&key, &s->tree, cprd__by_key);
    return found ? *found : NULL;
}

int cprd_find_fd(const cprd_state *s, const char *name, int32_t id) {
    const struct item *item = find(s, CPRD_FD, name, id);
    return item ? item->known.fd : -1;
}

int cprd_take_fd(cprd_state *s, const char *name, int32_t id) {
    struct item *item = find(s, CPRD_FD, name, id);
    int fd = item ? item->known.fd : -1;
    if (item) item->known.fd = -1;
    return fd;
}

const struct cprd_item *cprd_find_section(const cprd_state *s, const char *key) {
    const struct item *item = find(s, CPRD_SECTION, key, 0);
    return item ? &item->known : NULL;
}

/* -- msgpack: as much as cprd and bundles take ------------------------------------------------- */

enum kind { NIL = 'n', BAD = '-', BOOL = 'b', UINT = 'u', INT = 'i', FLOAT = 'f', DOUBLE = 'd',
            TEXT = 't', BINARY = 'x', ARRAY = 'a', MAP = 'm' };

static void put_number(struct cprd__bytes *b, int type, uint64_t value, int width) {
    unsigned char data[9] = {(unsigned char)type};
    for (int n = 0; n < width; n++) data[1 + n] = (unsigned char)(value >> 8 * (width - 1 - n));
    cprd__put(b, data, 1 + (size_t)width);
}

static void put_string(struct cprd__bytes *b, enum kind kind, const void *data, size_t size) {
    put_number(b, kind == TEXT ? 0xdb : 0xc6, size, 4);
    cprd__put(b, data, size);
}

static void put_text(struct cprd__bytes *b, const char *text) {
    put_string(b, TEXT, text, strlen(text));
}

struct reader { /* trusts no length; no depth of what is read is a depth of calls */
    const unsigned char *at, *end;
    int bad;
};
struct value {
    enum kind kind;
    uint64_t number;           /* of a bool, an integer, a double; or how many items */
    const unsigned char *data; /* of text and binary */
    size_t size;
};

static uint64_t take(struct reader *r, int width) {
    uint64_t value = 0;
    if (r->end - r->at < width) r->bad = 1;
    while (width-- && !r->bad) value = value << 8 | *r->at++;
    return value;
}

/* The head of the next value; text and binary with their bytes. */
static struct value next(struct reader *r) {
    static const char kinds[] = "n-bbxxx---fduuuuiiii-----tttaamm"; /* of types from 0xc0 on */
    static const char widths[] = "00001240004812481248000001242424";
    unsigned type = (unsigned)take(r, 1), n = type & 31;
    struct value v = {.kind = type < 0x80 ? UINT : type < 0x90 ? MAP : type < 0xa0 ? ARRAY : TEXT};
    v.number = type < 0x80 ? type : type < 0xa0 ? type & 15 : n;
    int width = widths[n] - '0';
    if (type >= 0xc0) v = (struct value){(enum kind)kinds[n], take(r, width), NULL, 0};
    if (type >= 0xe0) v = (struct value){.kind = INT, .number = type};
    if (v.kind == BOOL) v.number = type & 1;
    if (v.kind == INT && type < 0xe0 && !(v.number >> (8 * width - 1))) v.kind = UINT;
    if (v.kind == TEXT || v.kind == BINARY) {
        v.data = r->at;
        v.size = (size_t)v.number;
        r->bad |= (uint64_t)(r->end - r->at) < v.number;
        r->at += r->bad ? 0 : v.size;
    }
    r->bad |= v.kind == BAD;
    return r->bad ? (struct value){.kind = NIL} : v;
}

static int is(const struct value *v, const char *text) {
    return v->kind == TEXT && v->size == strlen(text) && !memcmp(v->data, text, v->size);
}

static int is_number(const struct value *v) {
    return v->kind == BOOL || v->kind == UINT || v->kind == INT;
}

static void skip(struct reader *r, struct value v) {
    for (uint64_t left = 1; left && !r->bad; left--) {
        left += v.kind == MAP ? 2 * v.number : v.kind == ARRAY ? v.number : 0;
        if (left > 1) v = next(r);
    }
}

struct field { /* of a map, and where its value is in a struct */
    const char *key;
    enum kind kind; /* UINT: uint64_t. When read UINT takes BOOL, too; DOUBLE takes UINT, too */
    size_t at, room;
};
#define FIELD(key, kind, of, member) \
    {key, kind, offsetof(struct of, member), sizeof(((struct of *)0)->member)}
#define ASKED(kind, member) FIELD(#member, kind, cprd__exchange, member)
#define TOLD(kind, member) FIELD(#member, kind, cprd__answer, member)
#define ROW(kind, member) FIELD(#member, kind, cprd_row, member)

/* In a request TEXT and BINARY are pointers, BOOL is a flag, NIL a flag of what is false, INT a
 * pointer to a number that may be 0. What is 0 is left out. */
static const struct field request_fields[] = {
    ASKED(TEXT, verb), ASKED(TEXT, name), ASKED(TEXT, if_exists), ASKED(TEXT, require),
    ASKED(TEXT, after_exit), ASKED(TEXT, why), ASKED(BINARY, token), ASKED(BINARY, nonce),
    ASKED(UINT, version), ASKED(UINT, id), ASKED(UINT, generation), ASKED(INT, fds),
    ASKED(UINT, bytes), ASKED(UINT, parked), ASKED(UINT, depth), ASKED(UINT, pid),
    ASKED(UINT, inode), ASKED(UINT, after), ASKED(BOOL, force), ASKED(BOOL, keep),
    ASKED(BOOL, live), ASKED(BOOL, damaged), FIELD("attempt", NIL, cprd__exchange, uncounted),
    ASKED(DOUBLE, ttl), ASKED(DOUBLE, lease), ASKED(DOUBLE, wait), ASKED(DOUBLE, timeout),
    {.key = NULL}};
static const struct field answer_fields[] = {
    TOLD(UINT, id), TOLD(UINT, version), TOLD(UINT, generation), TOLD(UINT, attempts),
    TOLD(UINT, found), TOLD(UINT, live), TOLD(UINT, more), TOLD(BINARY, token), TOLD(TEXT, kept),
    TOLD(TEXT, last_reject), TOLD(TEXT, error), FIELD("why", TEXT, cprd__answer, said.text),
    FIELD("pid", UINT, cprd__answer, said.pid), FIELD("phase", TEXT, cprd__answer, said.phase),
    FIELD("until", DOUBLE, cprd__answer, said.until), {.key = NULL}};
static const struct field row_fields[] = {
    ROW(TEXT, name), ROW(TEXT, phase), ROW(UINT, uid), ROW(UINT, generation), ROW(UINT, fds),
    ROW(UINT, bytes), {.key = NULL}};

static void put_map(struct cprd__bytes *b, const struct field *fields, const void *from) {
    unsigned char count = 0;
    put_number(b, 0xde, 0, 2); /* the count of fields, which comes last */
    for (const struct field *f = fields; f->key; f++) {
        const char *member = (const char *)from + f->at;
        int points = f->kind == TEXT || f->kind == BINARY || f->kind == INT;
        const void *to = NULL;
        uint64_t number = 0;
        memcpy(points ? (void *)&to : (void *)&number, member, f->room);
        if (!to && !number) continue;
        count++;
        put_text(b, f->key);
        if (f->kind == INT) memcpy(&number, to, sizeof number);
        if (f->kind == TEXT) put_text(b, to);
        else if (f->kind == BINARY) put_string(b, BINARY, to, 16);
        else if (f->kind == BOOL) put_number(b, 0xc3, 0, 0);
        else if (f->kind == NIL) put_number(b, 0xc2, 0, 0);
        else put_number(b, f->kind == DOUBLE ? 0xcb : 0xcf, number, 8);
    }
    if (!b->failed) b->at[2] = count;
}

static void set_field(const struct field *f, void *to, const struct value *v) {
    if (f->kind == UINT && (v->kind == UINT || v->kind == BOOL)) *(uint64_t *)to = v->number;
    if (f->kind == DOUBLE && v->kind == UINT) *(double *)to = (double)v->number;
    if (f->kind == DOUBLE && v->kind == DOUBLE) memcpy(to, &v->number, sizeof(double));
    if (f->kind == BINARY && v->size == f->room) memcpy(to, v->data, v->size);
    if (f->kind == TEXT && v->kind == TEXT)
        snprintf(to, f->room, "%.*s", (int)(v->size < f->room ? v->size : f->room), v->data);
}

/* A map, and in the same breath what is in its "ok": returns whether there was that. The rows of
 * "holds" go to `rows`. What is not known is passed over. TEXT and BINARY are arrays. */
static int read_map(struct reader *r, const struct field *fields, void *to,
                    struct cprd__bytes *rows) {
    int ok = 0;
    struct value v = next(r);
    if (v.kind != MAP) r->bad = 1;
    for (uint64_t left = v.number; left && !r->bad; left--) {
        struct value key = next(r);
        const unsigned char *start = r->at;
        v = next(r);
        for (const struct field *f = fields; f->key; f++)
            if (is(&key, f->key)) set_field(f, (char *)to + f->at, &v);
        if (is(&key, "ok") && v.kind == MAP) {
            ok = 1;
            left += v.number;
            continue;
        }
        skip(r, v);
        if (is(&key, "holds") && rows) cprd__put(rows, start, (size_t)(r->at - start));
    }
    return ok;
}

/* -- a bundle ---------------------------------------------------------------------------------- */

static struct cprd__header header(int depth, size_t here, size_t total, uint64_t size,
                                  uint64_t index) {
    return (struct cprd__header){
        "CPRB", htole16(1), depth ? 2 : 1, (uint8_t)depth, htole32((uint32_t)here),
        htole32((uint32_t)total), htole64(size), htole64(index)};
}

/* The manifest, in p->fds before the memfds of sections and all descriptors. */
static int pack_manifest(const cprd_state *s, uint64_t ours, struct cprd__packed *p) {
    struct cprd__bytes sections = {0}, ids = {0}, names = {0}, manifest = {0};
    size_t all = count_of(s), section_count = 0;
    int rc = CPRD_OK;
    p->parked = 1;
    for (size_t n = 0; n < 2 * all && !rc; n++) { /* sections first */
        const struct cprd_item *item = &(*at(s, n % all))->known;
        if ((item->key.kind == CPRD_SECTION) != (n < all)) continue;
        if (item->fd >= 0) p->fds[p->parked++] = item->fd;
        if (item->key.kind == CPRD_SECTION) {
            section_count++;
            p->size += item->size;
            put_number(&sections, 0x94, 0, 0);
            put_text(&sections, item->key.name);
            put_number(&sections, item->packed, 0, 0);
            put_number(&sections, item->fd >= 0, 0, 0);
            put_string(&sections, BINARY, item->data, item->fd < 0 ? item->size : 0);
            continue;
        }
        if (item->fd < 0 || (ours && cprd__cookie(item->fd) == ours))
            rc = cprd__fail(CPRD_INVALID_INPUT, "fd %d of (%s, %d) was taken, or is the connection"
                            " to cprd itself", item->fd, item->key.name, item->key.id);
        p->fd_count++;
        cprd__put_little(&ids, (uint32_t)item->key.id, 4);
        cprd__put(&names, "", names.size > 0);
        cprd__put(&names, item->key.name, strlen(item->key.name));
    }
    put_number(&manifest, 0x83, 0, 0);
    put_text(&manifest, "sections");
    put_number(&manifest, 0xdd, section_count, 4);
    cprd__put(&manifest, sections.at, sections.size);
    put_text(&manifest, "ids");
    put_string(&manifest, BINARY, ids.at, ids.size);
    put_text(&manifest, "names");
    put_string(&manifest, BINARY, names.at, names.size);
    if (!rc && (manifest.failed || sections.failed || ids.failed || names.failed))
        rc = cprd__no_memory();
    if (!rc && (manifest.size > MAX_MANIFEST || section_count > MAX_SECTIONS))
        rc = cprd__fail(CPRD_LIMIT_EXCEEDED, "keys and small sections exceed %d bytes, or more than"
                        " %d sections", MAX_MANIFEST, MAX_SECTIONS);
    if (!rc) rc = cprd__memfd("cprd-manifest", manifest.at, manifest.size, &p->fds[0]);
    if (!rc) p->made[p->made_count++] = p->fds[0];
    free(manifest.at);
    free(sections.at);
    free(ids.at);
    free(names.at);
    return rc;
}

/* Queues of 253 descriptors each, in the place of these, until one message is enough. */
static int pack_tree(struct cprd__packed *p, size_t total) {
    for (size_t below = 1; p->parked > CPRD__SCM_MAX; below *= CPRD__SCM_MAX, p->depth++) {
        size_t above = 0;
        for (size_t start = 0; start < p->parked; start += CPRD__SCM_MAX, above++) {
            size_t left = p->parked - start, here = left < CPRD__SCM_MAX ? left : CPRD__SCM_MAX;
            size_t rest = total - start * below, most = here * below;
            size_t under = most < rest ? most : rest;
            struct cprd__header h = header((int)p->depth, here, under, 0, above);
            int tx = -1, rx = -1;
            if (cprd__pair(&tx, &rx)) return cprd__last.code;
            p->made[p->made_count++] = rx;
            int error = cprd__send(tx, &h, sizeof h, p->fds + start, here);
            close(tx);
            if (error) return cprd__explain(error);
            cprd__point("pack", "sent");
            p->fds[above] = rx; /* what lay there is parked by now */
        }
        p->parked = above;
    }
    return CPRD_OK;
}

/* `ours`: the cookie of the connection, which is not to be saved. */
static int pack(const cprd_state *s, uint64_t ours, struct cprd__packed *p) {
    *p = (struct cprd__packed){.fds = calloc(count_of(s) + 1, sizeof(int))};
    p->made = calloc(count_of(s) + 1, sizeof(int));
    int rc = p->fds && p->made ? pack_manifest(s, ours, p) : cprd__no_memory();
    size_t total = p->parked;
    cprd__point("pack", "manifest");
    if (!rc) rc = pack_tree(p, total);
    p->header = header((int)p->depth, p->parked, total, p->size, 0);
    return rc;
}

static void packed_free(struct cprd__packed *p) {
    cprd__close_all(p->made, p->made_count);
    free(p->made);
    free(p->fds);
}

static int damaged(const char *why) {
    return cprd__fail(CPRD_DAMAGED, "the bundle is not whole: %s", why);
}

/* The header of one node, and its descriptors, unless `fds` is NULL. */
static int peek_header(int sock, struct cprd__header *h, int *fds, size_t *count, int *flags) {
    *flags = MSG_PEEK;
    *h = (struct cprd__header){.version = 0};
    cprd__peek_from(sock, -1);
    long got = cprd__receive(sock, h, sizeof *h, fds, count, flags);
    h->version = le16toh(h->version);
    h->here = le32toh(h->here);
    h->total = le32toh(h->total);
    h->index = le64toh(h->index);
    if (got >= 6 && !memcmp(h->magic, "CPRB", 4) && h->version != 1)
        return cprd__fail(CPRD_BUSY, "a bundle of version %d; this program reads version 1 (with"
                          " cprd_live.c 2, a live hold)", h->version);
    if (got != sizeof *h || *flags & MSG_TRUNC || memcmp(h->magic, "CPRB", 4) || !h->here ||
        h->here > CPRD__SCM_MAX || h->depth > 2 || h->kind != (h->depth ? 2 : 1) ||
        (h->depth ? h->total < h->here : h->total != h->here))
        return damaged("a part has no header that makes sense");
    return CPRD_OK;
}

/* One node of a bundle, and all below: `total` descriptors at most. */
static int peek_node(int sock, int depth, uint64_t index, struct cprd__bytes *out, size_t most) {
    struct cprd__header h;
    int fds[CPRD__SCM_MAX], flags;
    size_t count, used = 0, before = out->size / sizeof(int);
    int rc = peek_header(sock, &h, fds, &count, &flags);
    if (!rc && (h.depth != depth || h.index != index || cprd__waiting(sock) != sizeof h))
        rc = damaged("a part in a wrong place, or with more than one message");
    if (!rc && flags & MSG_CTRUNC) rc = cprd__no_room(h.here); /* what is held is whole */
    if (!rc && (count != h.here || h.total > most))
        rc = damaged("a part does not have what it says");
    for (; !rc && used < count; used++)
        if (!depth) cprd__put(out, &fds[used], sizeof(int)); /* has room */
        else {
            size_t left = before + h.total - out->size / sizeof(int);
            rc = peek_node(fds[used], depth - 1, used, out, left);
            close(fds[used]);
        }
    if (!rc && out->size / sizeof(int) != before + h.total)
        rc = damaged("other descriptors than it says");
    cprd__close_all(fds + used, count - used);
    return rc;
}

/* The array of sections. *fds: of memfds that are not the state's yet. */
static int read_sections(cprd_state *s, struct reader *r, const int **fds, const int *end) {
    struct value list = next(r);
    if (list.kind != ARRAY || list.number > MAX_SECTIONS) r->bad = 1;
    for (uint64_t left = list.number; left-- && !r->bad;) {
        struct value one = next(r), name = next(r), packed = next(r), by = next(r), data = next(r);
        struct cprd_item section = {{CPRD_SECTION, 0, (const char *)name.data}, -1,
                                    packed.number != 0, data.size, data.data};
        if (by.number && *fds < end) section.fd = **fds;
        if (one.kind != ARRAY || one.number != 4 || name.kind != TEXT || !is_number(&packed) ||
            !is_number(&by) || data.kind != BINARY || (by.number && !cprd__is_sealed(section.fd)))
            r->bad = 1;
        if (!r->bad && cprd__add(s, &section, name.size, 1)) return cprd__last.code;
        *fds += !r->bad && by.number;
    }
    return CPRD_OK;
}

/* The state of the descriptors of a bundle, the manifest apart. */
static int read_manifest(cprd_state *s, struct reader *r, const int **fds, const int *last) {
    struct value map = next(r), names = {.kind = NIL}, ids = {.kind = NIL};
    if (map.kind != MAP || map.number > 16) r->bad = 1;
    for (uint64_t parts = map.number; parts-- && !r->bad;) {
        struct value part = next(r);
        if (part.kind == ARRAY || part.kind == MAP) r->bad = 1;
        if (part.kind == TEXT && !is_utf8(part.data, part.size)) r->bad = 1;
        if (is(&part, "names")) names = next(r);
        else if (is(&part, "ids")) ids = next(r);
        else if (!is(&part, "sections")) skip(r, next(r)); /* of a later version */
        else if (read_sections(s, r, fds, last)) return cprd__last.code;
    }
    size_t left = (size_t)(last - *fds);
    if (r->bad || r->at != r->end || names.kind != BINARY || ids.kind != BINARY ||
        ids.size != 4 * left || (!left && names.size))
        return damaged("the manifest cannot be read, or names other descriptors than there are");
    const char *name = (const char *)names.data, *end = name + names.size;
    for (; left; left--, ids.data += 4) {
        const char *stop = memchr(name, 0, (size_t)(end - name));
        int32_t id = (int32_t)cprd__little(ids.data, 4);
        struct cprd_item item = {.key = {CPRD_FD, id, name}, .fd = **fds};
        if (!stop == (left > 1)) return damaged("the manifest does not name all descriptors");
        if (cprd__add(s, &item, (size_t)((stop ? stop : end) - name), 1)) return cprd__last.code;
        ++*fds;
        name = stop ? stop + 1 : end;
    }
    return CPRD_OK;
}

int cprd_unpack(int bundle, cprd_state **out) {
    struct cprd__bytes found = {0};
    struct cprd__header h;
    struct stat there;
    size_t none;
    int flags;
    void *map = MAP_FAILED;
    cprd_state *s = cprd_state_new();
    int rc = peek_header(bundle, &h, NULL, &none, &flags);
    if (!rc) rc = cprd__room_for(h.total + 8);
    if (!rc) found.at = malloc(found.room = (h.total + 1) * sizeof(int));
    if (!rc && (!found.at || !s)) rc = cprd__no_memory();
    if (!rc) rc = peek_node(bundle, h.depth, h.index, &found, h.total);
    cprd__point("load", "peeked");
    const int *fds = (int *)found.at, *end = fds + found.size / sizeof(int), *rest = fds;
    if (!rc && (!cprd__is_sealed(fds[0]) || fstat(fds[0], &there) || !there.st_size ||
                there.st_size > MAX_MANIFEST))
        rc = damaged("the manifest is not a sealed memfd");
    if (!rc) map = mmap(NULL, (size_t)there.st_size, PROT_READ, MAP_PRIVATE, fds[0], 0);
    if (!rc && map == MAP_FAILED) rc = cprd__no_memory();
    if (!rc) {
        struct reader r = {map, (unsigned char *)map + there.st_size, 0};
        close(*rest++);
        rc = read_manifest(s, &r, &rest, end);
        if (rc == CPRD_INVALID_INPUT) rc = cprd__fail(CPRD_DAMAGED, "%s", cprd__last.text);
        munmap(map, (size_t)there.st_size);
    }
    if (found.at) cprd__close_all(rest, (size_t)(end - rest));
    free(found.at);
    if (rc) cprd_state_free(s);
    else *out = s;
    return rc;
}

/* -- requests ---------------------------------------------------------------------------------- */

struct cprd {
    int sock;
    pid_t owner;       /* not its forked children */
    uint64_t connects; /* so often */
    uint64_t id, pid;  /* of the last request; of this process, as cprd sees the process */
    double timeout;
    pthread_mutex_t lock; /* threads take turns */
    struct sockaddr_un address;
};

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static void pause_for(double seconds) { poll(NULL, 0, (int)(seconds * 1000)); }

static void hang_up(cprd *c) {
    if (c->sock >= 0) close(c->sock);
    c->sock = -1;
}

/* Before the lock, which another thread may have had when this process was forked. */
static int check_owner(const cprd *c) {
    if (c->owner == getpid()) return CPRD_OK;
    return cprd__fail(CPRD_INVALID_INPUT, "this connection belongs to process %d, not to its forked"
                      " child: cprd_connect() there", (int)c->owner);
}

uint64_t cprd__cookie_of(cprd *c) {
    pthread_mutex_lock(&c->lock);
    uint64_t cookie = cprd__cookie(c->sock);
    pthread_mutex_unlock(&c->lock);
    return cookie;
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

static int await(const cprd *c, short event, double until) {
    struct pollfd one = {c->sock, event, 0};
    double left;
    do {
        left = until - now();
        if (poll(&one, 1, left <= 0 ? 0 : left > 1e6 ? 1000000000 : (int)(left * 1000) + 1) > 0)
            return CPRD_OK;
    } while (left > 0);
    return cprd__fail(CPRD_TIMEOUT, "cprd accepted the connection and has not answered in time");
}

static int read_answer(struct reader r, struct cprd__answer *a, struct cprd__bytes *rows) {
    *a = (struct cprd__answer){.fd = -1, .said = {.pid = -1, .until = -1}};
    rows->size = 0;
    int ok = read_map(&r, answer_fields, a, rows);
    if (r.bad || (!ok && !*a->error))
        return cprd__fail(CPRD_PROTOCOL_ERROR, "an answer of cprd that cannot be read");
    a->said.code = ok ? CPRD_OK : CPRD_ERROR;
    for (int n = 1; n <= CPRD_INVALID_INPUT && !ok; n++)
        if (!strcmp(a->error, classes[n])) a->said.code = n;
    return CPRD_OK;
}

/* Send a request and receive the answer to it. OK: an answer came, see said.code; LOST; TIMEOUT;
 * PROTOCOL_ERROR. */
static int ask(cprd *c, struct cprd__exchange *x, double until) {
    unsigned char in[MAX_ANSWER + 1];
    struct cprd__bytes m = {0};
    int fds[CPRD__SCM_MAX], rc = CPRD_OK, error = EAGAIN;
    size_t count;
    x->id = ++c->id;
    put_map(&m, request_fields, x);
    if (m.failed) rc = cprd__no_memory();
    if (m.size > MAX_REQUEST)
        rc = cprd__fail(CPRD_INVALID_INPUT, "arguments exceed %d bytes", MAX_REQUEST);
    while (!rc && error == EAGAIN) {
        error = cprd__send(c->sock, m.at, m.size, NULL, 0);
        if (error == EAGAIN) rc = await(c, POLLOUT, until);
    }
    free(m.at);
    while (!rc) {
        int flags = 0;
        if (!error && (rc = await(c, POLLIN, until))) break; /* on an error: may have said why */
        raise_limit(); /* for the descriptor of the answer alone */
        long got = cprd__receive(c->sock, in, sizeof in, fds, &count, &flags);
        restore_limit();
        if (got < 0 && !error && (errno == EAGAIN || errno == EINTR)) continue;
        if (got <= 0) return LOST;
        struct reader r = {in, in + got, (flags & MSG_TRUNC) != 0};
        rc = read_answer(r, &x->answer, &x->rows);
        x->answer.cut = (flags & MSG_CTRUNC) != 0;
        int late = rc || (x->answer.id && x->answer.id != c->id); /* to a request given up */
        if (!late && count) x->answer.fd = fds[0];
        if (count) cprd__close_all(fds + !late, count - !late);
        if (!late) return CPRD_OK;
    }
    return rc;
}

static int greet(cprd *c, double until) {
    struct cprd__exchange x = {.verb = "hello", .version = VERSION};
    raise_limit();
    c->sock = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    restore_limit();
    if (c->sock < 0) return cprd__no_room(1);
    int rc = CPRD_OK, failed = 1;
    while (failed) {
        failed = connect(c->sock, (struct sockaddr *)&c->address, sizeof c->address);
        if (!failed || errno != EAGAIN || now() >= until) break; /* nobody accepts, for now */
        pause_for(PAUSE);
    }
    if (failed)
        rc = cprd__fail(errno == EACCES || errno == EPERM ? CPRD_DENIED : CPRD_UNAVAILABLE,
                        "no cprd answers at %s (%s): start it, or name its socket with"
                        " $CPRD_SOCKET", c->address.sun_path, strerror(errno));
    if (!rc) rc = ask(c, &x, until);
    free(x.rows.at);
    if (!rc && x.answer.fd >= 0) close(x.answer.fd);
    if (!rc && (rc = x.answer.said.code)) cprd__last = x.answer.said;
    if (!rc && x.answer.version != VERSION)
        rc = cprd__fail(CPRD_PROTOCOL_ERROR, "cprd speaks version %llu of the protocol, this"
                        " program %d", 0ull + x.answer.version, VERSION);
    c->pid = rc ? 0 : (uint64_t)x.answer.said.pid;
    c->connects += !rc;
    if (rc) hang_up(c);
    return rc;
}

int cprd__no_fd(const struct cprd__answer *a) {
    if (a->cut) return cprd__no_room(1);
    return cprd__fail(CPRD_PROTOCOL_ERROR, "an answer of cprd without a descriptor");
}

/* Park the root in a queue of cprd, for the request that speaks of it. *inlet: the sending end, to
 * be kept until the answer: closed before, it takes back what was parked. */
static int park(cprd *c, const struct cprd__packed *p, double until, struct cprd__answer *a,
                int *inlet) {
    struct cprd__exchange queue = {.verb = "queue"};
    int rc = ask(c, &queue, until);
    free(queue.rows.at);
    if (rc) return rc;
    *a = queue.answer;
    *inlet = a->fd;
    a->fd = -1;
    if (a->said.code) return CPRD_OK;
    if (*inlet < 0) return cprd__no_fd(a);
    int error = cprd__send(*inlet, &p->header, sizeof p->header, p->fds, p->parked);
    if (error == EPIPE || error == ECONNRESET) return LOST;
    if (error) return cprd__explain(error);
    cprd__point("pack", "parked");
    return CPRD_OK;
}

/* A request is repeated on another connection where one is lost: its nonce makes it one request. */
int cprd__exchange(cprd *c, struct cprd__exchange *x) {
    unsigned char nonce[16];
    double until = now() + x->wait + x->timeout + c->timeout, away = -1;
    int rc = check_owner(c);
    if (rc) return rc;
    if (getrandom(nonce, sizeof nonce, 0) != sizeof nonce) return cprd__no_memory();
    x->nonce = x->nonce ? x->nonce : nonce;
    cprd__point(x->verb ? x->verb : "connect", "before");
    pthread_mutex_lock(&c->lock);
    for (;;) {
        int was_open = c->sock >= 0, inlet = -1;
        double left = until - c->timeout - now();
        x->answer.said.code = CPRD_OK;
        x->wait = left > 0 && x->wait > 0 ? left : 0;
        x->timeout = x->timeout <= 0 ? 0 : left > 0.001 ? left : 0.001; /* 0: cprd's default */
        rc = was_open ? CPRD_OK : greet(c, until);
        if (!rc) away = -1;
        if (!rc && x->packed) rc = park(c, x->packed, until, &x->answer, &inlet);
        if (!rc && x->verb && !x->answer.said.code) rc = ask(c, x, until);
        if (inlet >= 0) close(inlet);
        if (rc == LOST || rc == CPRD_PROTOCOL_ERROR) hang_up(c);
        if (rc == LOST) cprd__fail(CPRD_UNAVAILABLE, "no answer: the connection is lost");
        if (away < 0) away = now();
        if ((rc != LOST && (rc != CPRD_UNAVAILABLE || !c->connects)) || now() >= until ||
            now() >= away + RETRY_FOR)
            break;
        if (!was_open) pause_for(PAUSE);
    }
    pthread_mutex_unlock(&c->lock);
    x->nonce = NULL;
    if (rc) return cprd__last.code;
    if (!x->answer.said.code) {
        cprd__point(x->verb ? x->verb : "connect", "answered");
        return CPRD_OK;
    }
    if (x->answer.fd >= 0) close(x->answer.fd);
    cprd__last = x->answer.said;
    return cprd__last.code;
}

int cprd_connect(const char *path, cprd **out) {
    struct cprd__exchange only_hello = {.verb = NULL};
    if (!path) path = getenv("CPRD_SOCKET");
    if (!path || !*path) path = "/run/cprd/cprd.sock";
    cprd *c = calloc(1, sizeof *c);
    if (!c) return cprd__no_memory();
    *c = (cprd){.sock = -1, .owner = getpid(), .timeout = MUTE, .address.sun_family = AF_UNIX};
    pthread_mutex_init(&c->lock, NULL);
    int rc = CPRD_OK, size = (int)sizeof c->address.sun_path;
    if (snprintf(c->address.sun_path, (size_t)size, "%s", path) >= size)
        rc = cprd__fail(CPRD_INVALID_INPUT, "the path of a socket has less than %d bytes", size);
    if (!rc) rc = cprd__exchange(c, &only_hello);
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

/* -- verbs ------------------------------------------------------------------------------------- */

/* NULL: no memory. */
static struct cprd__ticket *ticket_new(cprd *c, const char *name) {
    struct cprd__ticket *t = calloc(1, sizeof *t);
    if (t) *t = (struct cprd__ticket){.c = c, .name = strdup(name), .over = 1, .bundle = -1};
    if (t && t->name && getrandom(t->nonces, sizeof t->nonces, 0) == sizeof t->nonces) return t;
    cprd__no_memory();
    free(t);
    return NULL;
}

void cprd__set(struct cprd__ticket *t, const struct cprd__answer *a) {
    t->known.generation = a->generation;
    t->known.attempts = a->attempts;
    strcpy(t->known.last_reject, a->last_reject);
    t->stored = !strcmp(a->kept, "store");
    t->over = 0;
    memcpy(t->token, a->token, sizeof t->token);
}

struct cprd__exchange cprd__of(const struct cprd__ticket *t, const char *verb) {
    return (struct cprd__exchange){.verb = verb, .name = t->name, .token = t->token,
                                   .generation = t->known.generation};
}

int cprd__claim(cprd *c, struct cprd__exchange *x, const struct cprd_load_options *options,
                struct cprd__ticket **out) {
    static const struct cprd_load_options none;
    const struct cprd_load_options *o = options ? options : &none;
    struct cprd__ticket *t = *out = ticket_new(c, x->name);
    if (!t) return cprd__last.code;
    x->lease = o->lease;
    x->generation = o->generation;
    x->wait = o->wait;
    int rc = cprd__exchange(t->c, x);
    if (rc) return rc;
    cprd__set(t, &x->answer);
    t->bundle = x->answer.fd;
    return CPRD_OK;
}

/* commit, abort, confirm, reject. `cause`: the error for which this process cannot read a state. */
static int end(struct cprd__ticket *t, const char *verb, const char *why, int cause) {
    char cut[MAX_WHY + 1];
    if (t->over)
        return cprd__fail(CPRD_FENCED, "%s: '%s' has been ended already", verb, t->name);
    struct cprd__exchange x = cprd__of(t, verb);
    x.nonce = t->nonces[!strcmp(verb, "reject") || !strcmp(verb, "abort")];
    snprintf(cut, sizeof cut, "%s", why ? why : "");
    while (!is_utf8((unsigned char *)cut, strlen(cut))) cut[strlen(cut) - 1] = 0;
    x.why = why ? cut : NULL;
    x.damaged = cause == CPRD_DAMAGED;
    x.uncounted = cause && cause != CPRD_DAMAGED;
    int rc = cprd__exchange(t->c, &x);
    t->over = !rc;
    return rc;
}

int cprd__give_back(struct cprd__ticket *t, int cause) {
    struct cprd_error said = cprd__last;
    if (!t->over) end(t, "reject", cause ? said.text : "closed without confirm", cause);
    t->over = 1;
    cprd__last = said;
    return cause;
}

/* The pid and inode of a pidfd, as cprd is told. pid 0: has ended; inode 0: before Linux 6.9. */
static int name_process(const cprd *c, int pidfd, struct cprd__exchange *x) {
    struct stat there;
    struct statfs system;
    long pid;
    if (!cprd__fdinfo(pidfd, "\nPid:", &pid) || fstat(pidfd, &there) || fstatfs(pidfd, &system))
        return cprd__fail(CPRD_INVALID_INPUT, "descriptor %d is not a pidfd", pidfd);
    if (pid < 0) return CPRD_OK;
    if (!pid || c->pid != (uint64_t)getpid())
        return cprd__fail(CPRD_LIMIT_EXCEEDED, "cprd lives in another pid namespace, and cannot"
                          " tell which process that is: let that process connect by itself");
    x->pid = (uint64_t)pid;
    x->inode = system.f_type == 0x50494446 ? there.st_ino : 0; /* PID_FS_MAGIC */
    return CPRD_OK;
}

/* Without an inode cprd may watch another process, which got the pid in between. */
static void say_ended(cprd *c, const struct cprd__exchange *x, int pidfd) {
    struct pollfd one = {pidfd, POLLIN, 0};
    if (!x->pid || x->inode || poll(&one, 1, 0) <= 0) return;
    struct cprd__exchange said = {.verb = "ended", .name = x->name, .pid = x->pid};
    said.generation = x->answer.generation ? x->answer.generation : x->generation;
    cprd__exchange(c, &said);
}

/* What save, prepare and confirm_next have in common. */
static int save(cprd *c, struct cprd__exchange *x, const cprd_state *s,
                const struct cprd_save_options *options, struct cprd_saved *out) {
    static const struct cprd_save_options none;
    static const char *const after[] = {"no", "peer", "process"};
    const struct cprd_save_options *o = options ? options : &none;
    struct cprd__packed packed = {.fds = NULL};
    int rc = check_owner(c);
    if (!rc && (o->after_exit < CPRD_NOW || o->after_exit > CPRD_AFTER_PROCESS || o->ttl < 0))
        rc = cprd__fail(CPRD_INVALID_INPUT, "after_exit or ttl of the save options makes no sense");
    if (!rc && o->after_exit == CPRD_AFTER_PROCESS) rc = name_process(c, o->process, x);
    if (!rc) rc = pack(s, cprd__cookie_of(c), &packed);
    if (!rc) {
        x->after_exit = after[o->after_exit == CPRD_AFTER_PROCESS && !x->pid ? 0 : o->after_exit];
        x->if_exists = o->replace ? "replace" : NULL;
        x->require = o->require_store ? "store" : NULL;
        x->ttl = o->ttl;
        x->fds = &packed.fd_count;
        x->bytes = packed.size;
        x->parked = packed.parked;
        x->depth = packed.depth;
        x->packed = &packed;
        cprd__point("pack", "packed");
        rc = cprd__exchange(c, x);
    }
    if (!rc) say_ended(c, x, o->process);
    packed_free(&packed); /* after the answer: cprd's copy is never the last one */
    if (!rc && out)
        *out = (struct cprd_saved){x->answer.generation, !strcmp(x->answer.kept, "store")};
    return rc;
}

int cprd_save(cprd *c, const char *name, cprd_state *s, const struct cprd_save_options *options,
              struct cprd_saved *out) {
    struct cprd__exchange x = {.verb = "save", .name = name};
    return save(c, &x, s, options, out);
}

int cprd_prepare(cprd *c, const char *name, cprd_state *s, const struct cprd_save_options *options,
                 cprd_prepared **out) {
    struct cprd__exchange x = {.verb = "prepare", .name = name};
    struct cprd__ticket *t = ticket_new(c, name);
    *out = &t->known;
    if (!t) return cprd__last.code;
    t->stays = 1;
    int rc = save(c, &x, s, options, NULL);
    if (!rc) cprd__set(t, &x.answer);
    if (!rc) return CPRD_OK;
    cprd_claim_close(*out);
    *out = NULL;
    return rc;
}

int cprd_commit(cprd_prepared *p, struct cprd_saved *out) {
    struct cprd__ticket *t = (struct cprd__ticket *)p;
    int rc = end(t, "commit", NULL, 0);
    if (!rc && out) *out = (struct cprd_saved){p->generation, t->stored};
    return rc;
}

int cprd_abort(cprd_prepared *p) { return end((struct cprd__ticket *)p, "abort", NULL, 0); }

int cprd_load(cprd *c, const char *name, const struct cprd_load_options *options,
              cprd_claim **out) {
    struct cprd__exchange x = {.verb = "load", .name = name};
    struct cprd__ticket *t;
    *out = NULL;
    int rc = cprd__claim(c, &x, options, &t);
    if (!rc) {
        int (*read)(int, cprd_state **) = x.answer.live && cprd__unpack_live ? cprd__unpack_live
                                                                             : cprd_unpack;
        rc = t->bundle < 0 ? cprd__no_fd(&x.answer) : read(t->bundle, &t->known.state);
        if (rc) cprd__give_back(t, rc);
    }
    if (!rc) *out = &t->known;
    else if (t) cprd_claim_close(&t->known);
    return rc;
}

int cprd_renew(cprd_claim *claim, double lease) {
    struct cprd__ticket *t = (struct cprd__ticket *)claim;
    struct cprd__exchange x = cprd__of(t, "renew");
    x.lease = lease;
    return cprd__exchange(t->c, &x);
}

int cprd_begin(cprd_claim *claim, int process) {
    struct cprd__ticket *t = (struct cprd__ticket *)claim;
    struct cprd__exchange x = cprd__of(t, "begin");
    if (process >= 0 && name_process(t->c, process, &x)) return cprd__last.code;
    if (process >= 0 && !x.pid)
        return cprd__fail(CPRD_INVALID_INPUT, "begin: the process that is to act has ended");
    int rc = cprd__exchange(t->c, &x);
    if (!rc || rc == CPRD_UNAVAILABLE || rc == CPRD_TIMEOUT) t->stays = 1; /* perhaps */
    if (!rc) say_ended(t->c, &x, process);
    return rc;
}

/* As long as the bundle is there, what was taken and closed since stays open. */
static int confirmed(struct cprd__ticket *t) {
    t->over = 1;
    if (t->bundle >= 0) close(t->bundle);
    t->bundle = -1;
    return CPRD_OK;
}

int cprd_confirm(cprd_claim *claim) {
    int rc = end((struct cprd__ticket *)claim, "confirm", NULL, 0);
    return rc ? rc : confirmed((struct cprd__ticket *)claim);
}

int cprd_confirm_next(cprd_claim *claim, cprd_state *next, const struct cprd_save_options *options,
                      struct cprd_saved *out) {
    struct cprd__ticket *t = (struct cprd__ticket *)claim;
    struct cprd__exchange x = cprd__of(t, "confirm_next");
    if (t->over)
        return cprd__fail(CPRD_FENCED, "confirm: '%s' has been ended already", t->name);
    int rc = save(t->c, &x, next, options, out);
    return rc ? rc : confirmed(t);
}

int cprd_reject(cprd_claim *claim, const char *why) {
    return end((struct cprd__ticket *)claim, "reject", why, 0);
}

void cprd_claim_close(cprd_claim *claim) {
    struct cprd__ticket *t = (struct cprd__ticket *)claim;
    if (!t) return;
    if (!t->stays) cprd__give_back(t, CPRD_OK);
    if (t->bundle >= 0) close(t->bundle);
    cprd_state_free(claim->state);
    free(t->name);
    free(t);
}

int cprd_wait(cprd *c, const char *name, double seconds, uint64_t *generation) {
    struct cprd__exchange x = {.verb = "wait", .name = name};
    x.timeout = seconds > 0.001 ? seconds : 0.001; /* 0: cprd's default */
    int rc = cprd__exchange(c, &x);
    if (!rc && generation) *generation = x.answer.generation;
    return rc;
}

int cprd_drop(cprd *c, const char *name, int force) {
    struct cprd__exchange x = {.verb = "drop", .name = name, .force = force != 0};
    return cprd__exchange(c, &x);
}

int cprd_release(cprd *c, const char *name, int force) {
    struct cprd__exchange x = {.verb = "release", .name = name, .force = force != 0};
    return cprd__exchange(c, &x);
}

int cprd_list(cprd *c, void (*each)(void *context, const struct cprd_row *row), void *context) {
    struct cprd__exchange x = {.verb = "list"};
    int rc;
    do {
        rc = cprd__exchange(c, &x);
        struct reader r = {x.rows.at, x.rows.at + x.rows.size, x.rows.failed || !x.rows.size};
        for (uint64_t left = rc ? 0 : next(&r).number; left-- && !r.bad;) {
            struct cprd_row row = {.uid = 0};
            read_map(&r, row_fields, &row, NULL);
            each(context, &row);
        }
        x.after = x.answer.more;
    } while (!rc && x.after);
    free(x.rows.at);
    return rc;
}
