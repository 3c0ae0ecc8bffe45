/* States, bundles, requests. cprd.h says how to use them, docs/protocol.md and docs/bundle.md have
 * the bytes. */
#define _GNU_SOURCE
#define CPRD_INTERNAL
#include "cprd.h"

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

static unsigned long long soft_limit(void) {
    struct rlimit limit = {0, 0};
    getrlimit(RLIMIT_NOFILE, &limit);
    return limit.rlim_cur;
}

int cprd__no_room(const char *what) {
    return cprd__fail(CPRD_LIMIT_EXCEEDED, "no descriptor left %s: the soft RLIMIT_NOFILE is %llu;"
                      " raise it (setrlimit, ulimit -n, LimitNOFILE=)", what, soft_limit());
}

int cprd__room_for(uint64_t count) {
    if (count <= soft_limit()) return CPRD_OK;
    return cprd__fail(CPRD_LIMIT_EXCEEDED, "%llu descriptors do not fit in this process: its soft"
                      " RLIMIT_NOFILE is %llu; raise it before loading (setrlimit, ulimit -n,"
                      " LimitNOFILE=); what is held stays held", 0ull + count, soft_limit());
}

int cprd__explain(int error) {
    if (error == EBADF || error == EINVAL)
        return cprd__fail(CPRD_INVALID_INPUT, "a descriptor is not open (any more), or of a kind"
                          " that the kernel passes to no process (io_uring): %s", strerror(error));
    if (error == ETOOMANYREFS)
        return cprd__fail(CPRD_LIMIT_EXCEEDED, "too many descriptors in flight for this uid: all"
                          " that its processes have parked counts against RLIMIT_NOFILE; raise the"
                          " hard limit (LimitNOFILE=, ulimit -Hn), or drop holds of this uid"
                          " (cprctl list); nothing was changed");
    return cprd__fail(CPRD_LIMIT_EXCEEDED, "cannot park the descriptors: %s (EAGAIN: a queue is as"
                      " large as net.core.wmem_max allows); nothing was changed", strerror(error));
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

int cprd__check_name(int space, const char *name, size_t length) {
    if (length && length <= 255 && !memchr(name, 0, length) &&
        (space == CPRD__FD || is_utf8((const unsigned char *)name, length)))
        return CPRD_OK;
    return cprd__fail(CPRD_INVALID_INPUT, "%s '%.*s': wants 1 to 255 bytes%s",
                      space == CPRD__FD ? "name" : "section", length < 256 ? (int)length : 255,
                      name, space == CPRD__FD ? " without NUL" : " of UTF-8");
}

struct cprd__key **cprd__slot(const struct cprd__table *t, int space, const char *name,
                              size_t length, int32_t id) {
    uint64_t hash = 14695981039346656037u ^ (uint32_t)id ^ (uint64_t)space << 32;
    for (size_t n = 0; n < length; n++) hash = (hash ^ (unsigned char)name[n]) * 1099511628211u;
    hash *= 0x9e3779b97f4a7c15u;
    struct cprd__key **slot = &t->slots[hash >> 32 & (t->size - 1)];
    while (*slot && ((*slot)->space != space || (*slot)->id != id || (*slot)->length != length ||
                     memcmp((*slot)->name, name, length)))
        slot = &(*slot)->chain;
    return slot;
}

int cprd__grow(struct cprd__table *t) {
    if (t->used < t->size) return CPRD_OK;
    struct cprd__table more = {.size = t->size ? 2 * t->size : 16, .used = t->used};
    more.slots = calloc(more.size, sizeof(struct cprd__key *));
    if (!more.slots) return cprd__no_memory();
    for (size_t n = 0; n < t->size; n++)
        for (struct cprd__key *k = t->slots[n], *next; k; k = next) {
            next = k->chain;
            k->chain = NULL;
            *cprd__slot(&more, k->space, k->name, k->length, k->id) = k;
        }
    free(t->slots);
    *t = more;
    return CPRD_OK;
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
    message.msg_control = fds ? &space : NULL;
    message.msg_controllen = fds ? sizeof space : 0;
    int how = *flags | MSG_DONTWAIT | MSG_CMSG_CLOEXEC;
    *count = 0;
    ssize_t got = recvmsg(sock, &message, how);
    if (got < 0 && errno == ECONNRESET) { /* said once: the other side left something unread */
        message.msg_controllen = fds ? sizeof space : 0;
        got = recvmsg(sock, &message, how);
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

int cprd__pair(int *tx, int *rx) {
    int ends[2];
    raise_limit();
    int failed = socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends);
    restore_limit();
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

struct item { /* a descriptor, or a section */
    struct cprd__key key;
    int fd, owned; /* of a section: its memfd, or -1. -1: taken */
    int packed;
    struct cprd__bytes content; /* of a section that has no memfd */
    void *map;                  /* of the memfd */
    size_t size;
};
struct cprd_state {
    struct cprd__table table;
    struct list {
        struct item **at; /* in the order of saving */
        size_t count, room;
    } lists[2]; /* of descriptors, of sections */
};

cprd_state *cprd_state_new(void) {
    cprd_state *s = calloc(1, sizeof *s);
    if (s && !cprd__grow(&s->table)) return s;
    free(s);
    return NULL;
}

static void item_free(struct item *item) {
    if (item->map) munmap(item->map, item->size);
    if (item->owned && item->fd >= 0) close(item->fd);
    free(item->content.at);
    free(item->key.name);
    free(item);
}

void cprd_state_free(cprd_state *s) {
    if (!s) return;
    for (int space = CPRD__FD; space <= CPRD__SECTION; space++) {
        for (size_t n = 0; n < s->lists[space].count; n++) item_free(s->lists[space].at[n]);
        free(s->lists[space].at);
    }
    free(s->table.slots);
    free(s);
}

static struct item *find(const cprd_state *s, int space, const char *name, int32_t id) {
    return (struct item *)*cprd__slot(&s->table, space, name, strlen(name), id);
}

int cprd__add(cprd_state *s, const struct cprd__key *key, int fd, int owned, const void *data,
              size_t size, int packed) {
    struct list *list = &s->lists[key->space];
    if (cprd__check_name(key->space, key->name, key->length)) return CPRD_INVALID_INPUT;
    if (key->space == CPRD__SECTION && list->count == MAX_SECTIONS)
        return cprd__fail(CPRD_LIMIT_EXCEEDED, "more than %d sections", MAX_SECTIONS);
    if (list->count == list->room) {
        size_t room = 2 * list->room + 16;
        struct item **more = realloc(list->at, room * sizeof *more);
        if (!more) return cprd__no_memory();
        list->at = more;
        list->room = room;
    }
    if (cprd__grow(&s->table)) return cprd__last.code;
    struct cprd__key **slot = cprd__slot(&s->table, key->space, key->name, key->length, key->id);
    if (*slot)
        return cprd__fail(CPRD_INVALID_INPUT, "key (%.*s, %d) is used already", (int)key->length,
                          key->name, key->id);
    struct item *item = calloc(1, sizeof *item);
    if (!item) return cprd__no_memory();
    *item = (struct item){.key = *key, .fd = -1, .packed = packed};
    item->key.chain = NULL;
    item->key.name = strndup(key->name, key->length);
    cprd__put(&item->content, data, size);
    if (!item->key.name || item->content.failed) {
        item_free(item);
        return cprd__no_memory();
    }
    item->fd = fd;
    item->owned = owned;
    list->at[list->count++] = item;
    *slot = &item->key;
    s->table.used++;
    return CPRD_OK;
}

int cprd_add_fd(cprd_state *s, const char *name, int32_t id, int fd) {
    struct cprd__key key = {NULL, CPRD__FD, id, strlen(name), (char *)(uintptr_t)name};
    if (fd < 0) return cprd__fail(CPRD_INVALID_INPUT, "fd %d of (%s, %d) is none", fd, name, id);
    return cprd__add(s, &key, fd, 0, NULL, 0, 0);
}

static int set_section(cprd_state *s, const char *name, int memfd, const void *data, size_t size,
                       int packed) {
    struct cprd__key key = {NULL, CPRD__SECTION, 0, strlen(name), (char *)(uintptr_t)name};
    struct list *list = &s->lists[CPRD__SECTION];
    struct item *old = find(s, CPRD__SECTION, name, 0);
    for (size_t n = 0; old && n < list->count; n++)
        if (list->at[n] == old) {
            memmove(&list->at[n], &list->at[n + 1], (--list->count - n) * sizeof *list->at);
            *cprd__slot(&s->table, CPRD__SECTION, name, key.length, 0) = old->key.chain;
            s->table.used--;
            item_free(old);
            break;
        }
    return cprd__add(s, &key, memfd, 0, data, size, packed != 0);
}

int cprd_add_section(cprd_state *s, const char *key, const void *data, size_t size, int packed) {
    return set_section(s, key, -1, data, size, packed);
}

int cprd_add_memfd(cprd_state *s, const char *key, int memfd, int packed) {
    if (memfd >= 0 && cprd__is_sealed(memfd)) return set_section(s, key, memfd, NULL, 0, packed);
    return cprd__fail(CPRD_INVALID_INPUT, "section '%s': fd %d is no memfd with all four seals"
                      " (F_SEAL_SEAL, SHRINK, GROW, WRITE)", key, memfd);
}

size_t cprd_fd_count(const cprd_state *s) { return s->lists[CPRD__FD].count; }
size_t cprd_section_count(const cprd_state *s) { return s->lists[CPRD__SECTION].count; }

int cprd_fd_at(const cprd_state *s, size_t index, const char **name, int32_t *id) {
    if (index >= cprd_fd_count(s)) return -1;
    const struct item *item = s->lists[CPRD__FD].at[index];
    if (name) *name = item->key.name;
    if (id) *id = item->key.id;
    return item->fd;
}

int cprd_find_fd(const cprd_state *s, const char *name, int32_t id) {
    const struct item *item = find(s, CPRD__FD, name, id);
    return item ? item->fd : -1;
}

int cprd_take_fd(cprd_state *s, const char *name, int32_t id) {
    struct item *item = find(s, CPRD__FD, name, id);
    int fd = item ? item->fd : -1;
    if (item) item->fd = -1;
    return fd;
}

const char *cprd_section_key(const cprd_state *s, size_t index) {
    return index < cprd_section_count(s) ? s->lists[CPRD__SECTION].at[index]->key.name : NULL;
}

int cprd_section_fd(const cprd_state *s, const char *key) {
    const struct item *item = find(s, CPRD__SECTION, key, 0);
    return item ? item->fd : -1;
}

static int section_size(struct item *section) {
    struct stat there;
    if (section->fd >= 0 && fstat(section->fd, &there))
        return cprd__fail(CPRD_INVALID_INPUT, "section '%s': fd %d is not open (any more)",
                          section->key.name, section->fd);
    section->size = section->fd >= 0 ? (size_t)there.st_size : section->content.size;
    return CPRD_OK;
}

int cprd_section(cprd_state *s, const char *key, const void **data, size_t *size, int *packed) {
    struct item *found = find(s, CPRD__SECTION, key, 0);
    if (!found) return cprd__fail(CPRD_NOT_HELD, "the state has no section '%s'", key);
    if (section_size(found)) return cprd__last.code;
    if (found->fd >= 0 && !found->map && found->size) { /* before 6.7 no shared mapping of these */
        void *map = mmap(NULL, found->size, PROT_READ, MAP_PRIVATE, found->fd, 0);
        if (map == MAP_FAILED) return cprd__no_memory();
        found->map = map;
    }
    *data = found->map ? found->map : found->content.at;
    *size = found->size;
    if (packed) *packed = found->packed;
    return CPRD_OK;
}

/* -- msgpack: as much as cprd and bundles take ------------------------------------------------- */

static void put_number(struct cprd__bytes *b, int type, uint64_t value, int width) {
    unsigned char data[9] = {(unsigned char)type};
    for (int n = 0; n < width; n++) data[1 + n] = (unsigned char)(value >> 8 * (width - 1 - n));
    cprd__put(b, data, 1 + (size_t)width);
}

static void put_text(struct cprd__bytes *b, const char *text) {
    put_number(b, 0xdb, strlen(text), 4);
    cprd__put(b, text, strlen(text));
}

static void put_binary(struct cprd__bytes *b, const void *data, size_t size) {
    put_number(b, 0xc6, size, 4);
    cprd__put(b, data, size);
}

struct reader { /* trusts no length; no depth of what is read is a depth of calls */
    const unsigned char *at, *end;
    int bad;
};
enum kind { NIL = 'n', BAD = '-', BOOL = 'b', UINT = 'u', INT = 'i', FLOAT = 'f', DOUBLE = 'd',
            TEXT = 't', BINARY = 'x', ARRAY = 'a', MAP = 'm' };
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
    unsigned type = (unsigned)take(r, 1), at = type & 31;
    struct value v = {.kind = UINT, .number = type};
    if (type >= 0xe0) v = (struct value){.kind = INT, .number = (uint64_t)(int8_t)type};
    else if (type >= 0xc0) v = (struct value){kinds[at], take(r, widths[at] - '0'), NULL, 0};
    else if (type >= 0xa0) v = (struct value){.kind = TEXT, .number = at};
    else if (type >= 0x80) v = (struct value){type < 0x90 ? MAP : ARRAY, type & 15, NULL, 0};
    if (v.kind == BOOL) v.number = type & 1;
    if (v.kind == INT && type < 0xe0) { /* the sign of a shorter number */
        int shift = 64 - 8 * (widths[at] - '0');
        v.number = (uint64_t)((int64_t)(v.number << shift) >> shift);
    }
    if (v.kind == INT && (int64_t)v.number >= 0) v.kind = UINT;
    if (v.kind == FLOAT) {
        uint32_t raw = (uint32_t)v.number;
        float narrow;
        memcpy(&narrow, &raw, sizeof narrow);
        double wide = narrow;
        memcpy(&v.number, &wide, sizeof wide);
        v.kind = DOUBLE;
    }
    if (v.kind == BAD || ((v.kind == TEXT || v.kind == BINARY) &&
                          (uint64_t)(r->end - r->at) < v.number))
        r->bad = 1;
    if (r->bad) return (struct value){.kind = NIL};
    if (v.kind == TEXT || v.kind == BINARY) {
        v.data = r->at;
        v.size = (size_t)v.number;
        r->at += v.size;
    }
    return v;
}

static int is(const struct value *v, const char *text) {
    return v->kind == TEXT && v->size == strlen(text) && !memcmp(v->data, text, v->size);
}

static int is_number(const struct value *v) {
    return v->kind == BOOL || v->kind == UINT || v->kind == INT;
}

struct field { /* of a map that is read: where its value goes, if it is of that kind */
    const char *key;
    enum kind kind; /* BOOL: UINT too; DOUBLE: UINT too */
    void *to;
    size_t room; /* of a text, with the NUL, or of a binary */
};

static void set_field(const struct field *f, const struct value *v) {
    if (f->kind == UINT && (v->kind == UINT || v->kind == BOOL)) *(uint64_t *)f->to = v->number;
    if (f->kind == DOUBLE && v->kind == UINT) *(double *)f->to = (double)v->number;
    if (f->kind == DOUBLE && v->kind == DOUBLE) memcpy(f->to, &v->number, sizeof(double));
    if (f->kind == BINARY && v->size == f->room) memcpy(f->to, v->data, v->size);
    if (f->kind == TEXT && v->kind == TEXT)
        snprintf(f->to, f->room, "%.*s", v->size < f->room ? (int)v->size : (int)f->room, v->data);
}

static uint64_t items(const struct value *v) {
    return v->kind == MAP ? 2 * v->number : v->kind == ARRAY ? v->number : 0;
}

static void skip(struct reader *r, uint64_t values) {
    for (; values && !r->bad; values--) {
        struct value v = next(r);
        values += items(&v);
    }
}

/* A map, and in the same breath what is in its "ok": returns whether there was that. The rows of
 * "holds" go to `rows`. What is not known is passed over. */
static int read_map(struct reader *r, const struct field *fields, struct cprd__bytes *rows) {
    int ok = 0;
    struct value v = next(r);
    if (v.kind != MAP) r->bad = 1;
    for (uint64_t left = v.number; left && !r->bad; left--) {
        struct value key = next(r);
        const unsigned char *start = r->at;
        v = next(r);
        for (const struct field *f = fields; f->key; f++)
            if (is(&key, f->key)) set_field(f, &v);
        if (is(&key, "ok") && v.kind == MAP) {
            ok = 1;
            left += v.number;
            continue;
        }
        skip(r, items(&v));
        if (is(&key, "holds") && rows) cprd__put(rows, start, (size_t)(r->at - start));
    }
    return ok;
}

/* -- a bundle, written ------------------------------------------------------------------------- */

static void make_header(unsigned char *header, int depth, size_t here, size_t total, uint64_t size,
                        uint64_t index) {
    struct cprd__bytes b = {header, 0, CPRD__HEADER, 0};
    cprd__put(&b, "CPRB\1", 6);
    cprd__put_little(&b, depth ? 2 : 1, 1);
    cprd__put_little(&b, (uint64_t)depth, 1);
    cprd__put_little(&b, here, 4);
    cprd__put_little(&b, total, 4);
    cprd__put_little(&b, size, 8);
    cprd__put_little(&b, index, 8);
}

/* The manifest, in p->fds before the memfds of sections and all descriptors. */
static int pack_manifest(const cprd_state *s, uint64_t ours, struct cprd__packed *p) {
    struct cprd__bytes manifest = {0}, ids = {0}, names = {0};
    int rc = CPRD_OK;
    p->parked = 1;
    put_number(&manifest, 0x83, 0, 0);
    put_text(&manifest, "sections");
    put_number(&manifest, 0xdd, cprd_section_count(s), 4);
    for (size_t n = 0; n < cprd_section_count(s) && !rc; n++) {
        struct item *section = s->lists[CPRD__SECTION].at[n];
        int memfd = section->fd;
        rc = section_size(section);
        p->size += section->size;
        if (!rc && memfd < 0 && section->size > INLINE) {
            rc = cprd__memfd(section->key.name, section->content.at, section->size, &memfd);
            if (!rc) p->made[p->made_count++] = memfd;
        }
        if (memfd >= 0) p->fds[p->parked++] = memfd;
        put_number(&manifest, 0x94, 0, 0);
        put_text(&manifest, section->key.name);
        put_number(&manifest, section->packed, 0, 0);
        put_number(&manifest, memfd >= 0, 0, 0);
        put_binary(&manifest, section->content.at, memfd < 0 ? section->size : 0);
    }
    for (size_t n = 0; n < cprd_fd_count(s) && !rc; n++) {
        const struct item *item = s->lists[CPRD__FD].at[n];
        if (fcntl(item->fd, F_GETFD) < 0 || (ours && cprd__cookie(item->fd) == ours))
            rc = cprd__fail(CPRD_INVALID_INPUT, "fd %d of (%s, %d) is not open (any more), or is"
                            " the connection to cprd itself", item->fd, item->key.name,
                            item->key.id);
        p->fds[p->parked++] = item->fd;
        cprd__put_little(&ids, (uint32_t)item->key.id, 4);
        cprd__put(&names, item->key.name, item->key.length + (n + 1 < cprd_fd_count(s)));
    }
    put_text(&manifest, "ids");
    put_binary(&manifest, ids.at, ids.size);
    put_text(&manifest, "names");
    put_binary(&manifest, names.at, names.size);
    if (!rc && (manifest.failed || ids.failed || names.failed)) rc = cprd__no_memory();
    if (!rc && manifest.size > MAX_MANIFEST)
        rc = cprd__fail(CPRD_LIMIT_EXCEEDED, "keys and small sections exceed %d bytes",
                        MAX_MANIFEST);
    if (!rc) rc = cprd__memfd("cprd-manifest", manifest.at, manifest.size, &p->fds[0]);
    if (!rc) p->made[p->made_count++] = p->fds[0];
    free(manifest.at);
    free(ids.at);
    free(names.at);
    return rc;
}

/* Queues of 253 descriptors each, in the place of these, until one message is enough. `totals`:
 * descriptors below each. */
static int pack_tree(struct cprd__packed *p, size_t *totals) {
    while (p->parked > CPRD__SCM_MAX) {
        size_t above = 0;
        if (p->depth == 2) return cprd__fail(CPRD_LIMIT_EXCEEDED, "too many descriptors");
        for (size_t start = 0; start < p->parked; start += CPRD__SCM_MAX, above++) {
            size_t left = p->parked - start, total = 0;
            size_t here = left < CPRD__SCM_MAX ? left : CPRD__SCM_MAX;
            unsigned char header[CPRD__HEADER];
            int tx = -1, rx = -1;
            for (size_t n = start; n < start + here; n++) total += totals[n];
            make_header(header, p->depth, here, total, 0, above);
            if (cprd__pair(&tx, &rx)) return cprd__last.code;
            p->made[p->made_count++] = rx;
            int error = cprd__send(tx, header, CPRD__HEADER, p->fds + start, here);
            close(tx);
            if (error) return cprd__explain(error);
            cprd__point("pack:sent");
            p->fds[above] = rx; /* what lay there is parked by now */
            totals[above] = total;
        }
        p->parked = above;
        p->depth++;
    }
    return CPRD_OK;
}

/* `ours`: the cookie of the connection, which is not to be saved. */
static int pack(const cprd_state *s, uint64_t ours, struct cprd__packed *p) {
    size_t most = 1 + cprd_section_count(s) + cprd_fd_count(s);
    *p = (struct cprd__packed){.fd_count = cprd_fd_count(s)};
    size_t *totals = calloc(most, sizeof *totals);
    p->fds = calloc(most, sizeof *p->fds);
    p->made = calloc(2 * most, sizeof *p->made);
    int rc = totals && p->fds && p->made ? CPRD_OK : cprd__no_memory();
    if (!rc) rc = pack_manifest(s, ours, p);
    if (!rc) cprd__point("pack:manifest");
    size_t total = p->parked;
    for (size_t n = 0; n < total && !rc; n++) totals[n] = 1;
    if (!rc) rc = pack_tree(p, totals);
    make_header(p->header, p->depth, p->parked, total, p->size, 0);
    free(totals);
    return rc;
}

static void packed_free(struct cprd__packed *p) {
    cprd__close_all(p->made, p->made_count);
    free(p->made);
    free(p->fds);
}

/* -- a bundle, read ---------------------------------------------------------------------------- */

static int check_header(const unsigned char *h, long got, int depth, uint64_t index) {
    size_t here = cprd__little(h + 8, 4), total = cprd__little(h + 12, 4);
    if (got >= 6 && !memcmp(h, "CPRB", 4) && cprd__little(h + 4, 2) != 1)
        return cprd__fail(CPRD_BUSY, "a bundle of version %d; this program reads version 1 (with"
                          " cprd_live.c 2, a live hold)", (int)cprd__little(h + 4, 2));
    if (got != CPRD__HEADER || memcmp(h, "CPRB", 4) || !here || here > CPRD__SCM_MAX ||
        h[7] > 2 || h[6] != (h[7] ? 2 : 1) || (h[7] ? total < here : total != here) ||
        h[7] != depth || cprd__little(h + 24, 8) != index)
        return cprd__fail(CPRD_DAMAGED, "a part of the bundle has no header that makes sense");
    return CPRD_OK;
}

/* One node of a bundle, and all below. Appends to `out`, which has room for `most`. */
static int peek_node(int fd, int depth, uint64_t index, int *out, size_t *count, size_t most) {
    unsigned char h[CPRD__HEADER + 1] = {0};
    int fds[CPRD__SCM_MAX], flags = MSG_PEEK, off = -1;
    size_t some, used = 0, before = *count;
    setsockopt(fd, SOL_SOCKET, SO_PEEK_OFF, &off, sizeof off);
    long got = cprd__receive(fd, h, sizeof h, fds, &some, &flags);
    int rc = check_header(h, got, depth, index);
    size_t here = cprd__little(h + 8, 4), total = cprd__little(h + 12, 4);
    if (!rc && cprd__waiting(fd) != CPRD__HEADER)
        rc = cprd__fail(CPRD_DAMAGED, "a part of the bundle has more than one message");
    if (!rc && flags & MSG_CTRUNC) /* a limit of this process; what is held is whole */
        rc = cprd__no_room("to load with (what is held stays held)");
    if (!rc && (some != here || total > most - before))
        rc = cprd__fail(CPRD_DAMAGED, "a part of the bundle does not have what it says");
    if (!rc && !depth) {
        memcpy(out + before, fds, some * sizeof(int));
        *count += some;
        return CPRD_OK;
    }
    for (; !rc && used < some; used++) {
        rc = peek_node(fds[used], depth - 1, used, out, count, before + total);
        close(fds[used]);
    }
    if (!rc && *count != before + total)
        rc = cprd__fail(CPRD_DAMAGED, "the bundle says %zu descriptors, has %zu", total,
                        *count - before);
    cprd__close_all(fds + used, some - used);
    return rc;
}

/* The array of sections. *taken: those of the descriptors that are the state's by now. */
static int read_sections(cprd_state *s, struct reader *r, const int *fds, size_t count,
                         size_t *taken) {
    struct value list = next(r);
    if (list.kind != ARRAY || list.number > MAX_SECTIONS) r->bad = 1;
    for (uint64_t left = list.number; left-- && !r->bad;) {
        struct value one = next(r), name = next(r), packed = next(r), by = next(r), data = next(r);
        int memfd = by.number && *taken < count ? fds[*taken] : -1;
        if (one.kind != ARRAY || one.number != 4 || name.kind != TEXT || !is_number(&packed) ||
            !is_number(&by) || data.kind != BINARY || (by.number && !cprd__is_sealed(memfd)))
            r->bad = 1;
        struct cprd__key key = {NULL, CPRD__SECTION, 0, name.size, (char *)(uintptr_t)name.data};
        if (!r->bad && cprd__add(s, &key, memfd, 1, data.data, by.number ? 0 : data.size,
                                 packed.number != 0))
            return cprd__last.code;
        *taken += !r->bad && by.number;
    }
    return CPRD_OK;
}

/* The state of the descriptors of a bundle, the manifest apart. */
static int read_manifest(cprd_state *s, struct reader *r, const int *fds, size_t count,
                         size_t *taken) {
    struct value map = next(r), names = {.kind = NIL}, ids = {.kind = NIL};
    if (map.kind != MAP || map.number > 16) r->bad = 1;
    for (uint64_t parts = map.number; parts-- && !r->bad;) {
        struct value part = next(r);
        if (part.kind == ARRAY || part.kind == MAP) r->bad = 1;
        if (part.kind == TEXT && !is_utf8(part.data, part.size)) r->bad = 1;
        if (is(&part, "names")) names = next(r);
        else if (is(&part, "ids")) ids = next(r);
        else if (!is(&part, "sections")) skip(r, 1); /* of a later version, which allows that */
        else if (read_sections(s, r, fds, count, taken)) return cprd__last.code;
    }
    size_t left = count - *taken;
    if (r->bad || r->at != r->end || names.kind != BINARY || ids.kind != BINARY ||
        ids.size != 4 * left || (!left && names.size))
        return cprd__fail(CPRD_DAMAGED, "the manifest cannot be read, or names other descriptors"
                          " than there are");
    const char *at = (const char *)names.data, *end = at + names.size;
    for (size_t n = 0; n < left; n++) {
        const char *stop = memchr(at, 0, (size_t)(end - at));
        if (!stop == (n + 1 < left))
            return cprd__fail(CPRD_DAMAGED, "the manifest does not name all descriptors");
        struct cprd__key key = {.space = CPRD__FD, .name = (char *)(uintptr_t)at};
        key.id = (int32_t)cprd__little(ids.data + 4 * n, 4);
        key.length = (size_t)((stop ? stop : end) - at);
        if (cprd__add(s, &key, fds[*taken], 1, NULL, 0, 0)) return cprd__last.code;
        ++*taken;
        at += key.length + 1;
    }
    return CPRD_OK;
}

int cprd_unpack(int bundle, cprd_state **out) {
    unsigned char h[CPRD__HEADER + 1] = {0};
    struct stat there;
    int *fds = NULL, off = -1, flags = MSG_PEEK;
    size_t count = 0, taken = 0;
    void *map = MAP_FAILED;
    cprd_state *s = NULL;
    setsockopt(bundle, SOL_SOCKET, SO_PEEK_OFF, &off, sizeof off);
    long got = cprd__receive(bundle, h, sizeof h, NULL, &count, &flags);
    size_t total = cprd__little(h + 12, 4);
    uint64_t index = cprd__little(h + 24, 8);
    int rc = check_header(h, got, h[7], index);
    if (!rc) rc = cprd__room_for(total + 8);
    if (!rc && (!(fds = calloc(total, sizeof *fds)) || !(s = cprd_state_new())))
        rc = cprd__no_memory();
    if (!rc) rc = peek_node(bundle, h[7], index, fds, &count, total);
    cprd__point("load:peeked");
    if (!rc && (!cprd__is_sealed(fds[0]) || fstat(fds[0], &there) || !there.st_size ||
                there.st_size > MAX_MANIFEST))
        rc = cprd__fail(CPRD_DAMAGED, "the manifest of the bundle is not a sealed memfd");
    if (!rc) map = mmap(NULL, (size_t)there.st_size, PROT_READ, MAP_PRIVATE, fds[0], 0);
    if (!rc && map == MAP_FAILED) rc = cprd__no_memory();
    if (!rc) {
        struct reader r = {map, (unsigned char *)map + there.st_size, 0};
        rc = read_manifest(s, &r, fds + 1, count - 1, &taken);
        if (rc == CPRD_INVALID_INPUT) rc = cprd__fail(CPRD_DAMAGED, "%s", cprd__last.text);
        munmap(map, (size_t)there.st_size);
    }
    if (count) close(fds[0]);
    if (count) cprd__close_all(fds + 1 + taken, count - 1 - taken);
    free(fds);
    if (rc) cprd_state_free(s);
    else *out = s;
    return rc;
}

/* -- requests ---------------------------------------------------------------------------------- */

struct cprd {
    int sock;
    pid_t owner;        /* not its forked children */
    uint64_t connects;  /* so often */
    uint64_t id, pid;   /* of the last request; of this process, as cprd sees the process */
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

/* Adds fields. `format` has for each a key and the type of an argument: "s" a text, "u" a uint64_t,
 * "d" a double, "f" a flag, "n" what the flag is not (int), "b" 16 bytes. NULL and 0 are left out,
 * so that the default counts, but for capital letters. */
void cprd__fields(struct cprd__call *call, const char *format, ...) {
    char key[32], type;
    va_list next;
    va_start(next, format);
    for (int used; sscanf(format, " %31s %c%n", key, &type, &used) == 2; format += used) {
        int is_text = type == 's' || type == 'b', is_double = type == 'd' || type == 'D';
        const char *text = is_text ? va_arg(next, const char *) : NULL;
        double real = is_double ? va_arg(next, double) : 0;
        uint64_t number = type == 'f' || type == 'n' ? va_arg(next, int) != 0 : real != 0;
        if (type == 'u' || type == 'U') number = va_arg(next, uint64_t);
        if (!text && !number && type != 'U' && type != 'D') continue;
        if (is_double) memcpy(&number, &real, sizeof number);
        call->count++;
        put_text(&call->m, key);
        if (type == 's') put_text(&call->m, text);
        else if (type == 'b') put_binary(&call->m, text, 16);
        else if (type == 'f' || type == 'n') put_number(&call->m, type == 'f' ? 0xc3 : 0xc2, 0, 0);
        else put_number(&call->m, is_double ? 0xcb : 0xcf, number, 8);
    }
    va_end(next);
}

struct cprd__call cprd__call(const char *verb, const char *name, const void *nonce) {
    struct cprd__call call = {.verb = verb};
    unsigned char fresh[16];
    call.m.failed = getrandom(fresh, sizeof fresh, 0) != sizeof fresh;
    put_number(&call.m, 0xdf, 0, 4); /* a map; the count of its fields comes last */
    cprd__fields(&call, "verb s name s nonce b", verb, name, nonce ? nonce : fresh);
    return call;
}

struct cprd__call cprd__call_of(const struct cprd__ticket *t, const char *verb, const void *nonce) {
    struct cprd__call call = cprd__call(verb, t->name, nonce);
    cprd__fields(&call, "generation U token b", t->generation, t->token);
    return call;
}

static int await(const cprd *c, short event, double until) {
    struct pollfd one = {c->sock, event, 0};
    for (;;) {
        double left = until - now();
        int ready = poll(&one, 1, left <= 0 ? 0 : left > 1e6 ? 1000000000 : (int)(left * 1000) + 1);
        if (ready > 0) return CPRD_OK;
        if (ready < 0 ? errno != EINTR : left <= 0)
            return cprd__fail(CPRD_TIMEOUT, "cprd accepted the connection and has not answered in"
                              " time");
    }
}

static int read_answer(struct reader r, struct cprd__answer *a, struct cprd__bytes *rows) {
    char error[32] = "";
    uint64_t pid = UINT64_MAX;
    *a = (struct cprd__answer){.fd = -1, .error = {.pid = -1, .until = -1}};
    const struct field fields[] = {
        {"id", UINT, &a->id, 0}, {"version", UINT, &a->version, 0}, {"pid", UINT, &pid, 0},
        {"generation", UINT, &a->generation, 0}, {"attempts", UINT, &a->attempts, 0},
        {"found", UINT, &a->found, 0}, {"live", UINT, &a->live, 0}, {"more", UINT, &a->more, 0},
        {"token", BINARY, a->token, 16}, {"kept", TEXT, a->kept, sizeof a->kept},
        {"last_reject", TEXT, a->last_reject, sizeof a->last_reject},
        {"error", TEXT, error, sizeof error}, {"why", TEXT, a->error.text, sizeof a->error.text},
        {"phase", TEXT, a->error.phase, sizeof a->error.phase},
        {"until", DOUBLE, &a->error.until, 0}, {NULL, NIL, NULL, 0}};
    int ok = read_map(&r, fields, rows);
    if (r.bad || (!ok && !*error))
        return cprd__fail(CPRD_PROTOCOL_ERROR, "an answer of cprd that cannot be read");
    a->error.pid = (int64_t)pid;
    if (ok) return CPRD_OK;
    a->error.code = CPRD_ERROR;
    for (int n = 1; n <= CPRD_INVALID_INPUT; n++)
        if (!strcmp(error, classes[n])) a->error.code = n;
    return CPRD_OK;
}

/* Send a request and receive the answer to it. OK: an answer came, see a->error; LOST; TIMEOUT;
 * PROTOCOL_ERROR. */
static int ask(cprd *c, struct cprd__call *call, double until, struct cprd__answer *a) {
    unsigned char in[MAX_ANSWER + 1];
    int fds[CPRD__SCM_MAX], rc = CPRD_OK, error = 0;
    size_t count, size = call->m.size;
    unsigned fields = call->count;
    double left = until - c->timeout - now(); /* to wait */
    cprd__fields(call, "id U", ++c->id);
    if (call->wait_as) cprd__fields(call, call->wait_as, left > 0 ? left : 0.0);
    if (call->m.failed) return cprd__no_memory();
    if (call->m.size > MAX_REQUEST)
        return cprd__fail(CPRD_INVALID_INPUT, "%s: arguments exceed %d bytes", call->verb,
                          MAX_REQUEST);
    call->m.at[4] = (unsigned char)call->count;
    do {
        error = cprd__send(c->sock, call->m.at, call->m.size, NULL, 0);
        if (error == EAGAIN) rc = await(c, POLLOUT, until);
    } while (!rc && (error == EAGAIN || error == EINTR));
    call->m.size = size;
    call->count = fields;
    while (!rc) {
        int flags = 0;
        if (!error && (rc = await(c, POLLIN, until))) break; /* on an error: may have said why */
        raise_limit(); /* for the descriptor of the answer alone */
        long got = cprd__receive(c->sock, in, sizeof in, fds, &count, &flags);
        restore_limit();
        if (got < 0 && !error && (errno == EAGAIN || errno == EINTR)) continue;
        if (got <= 0) return LOST;
        if (call->rows) call->rows->size = 0;
        rc = read_answer((struct reader){in, in + got, (flags & MSG_TRUNC) != 0}, a, call->rows);
        if (!rc && count) a->fd = fds[0];
        a->cut = (flags & MSG_CTRUNC) != 0;
        if (!rc && (!a->id || a->id == c->id)) {
            cprd__close_all(fds + 1, count ? count - 1 : 0);
            return CPRD_OK;
        }
        cprd__close_all(fds, count); /* the late answer to a request given up */
    }
    return rc;
}

static int greet(cprd *c, double until) {
    struct cprd__answer a;
    struct cprd__call hello = cprd__call("hello", NULL, NULL);
    cprd__fields(&hello, "version u", (uint64_t)VERSION);
    raise_limit();
    c->sock = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    restore_limit();
    int rc = c->sock < 0 ? cprd__no_room("to connect to cprd with") : CPRD_OK, failed = !rc;
    while (failed) {
        failed = connect(c->sock, (struct sockaddr *)&c->address, sizeof c->address);
        if (!failed || errno != EAGAIN || now() >= until) break; /* nobody accepts, for now */
        pause_for(PAUSE);
    }
    if (failed && (errno == EACCES || errno == EPERM))
        rc = cprd__fail(CPRD_DENIED, "no permission to connect to %s", c->address.sun_path);
    else if (failed)
        rc = cprd__fail(CPRD_UNAVAILABLE, "no cprd answers at %s (%s): start it, or name its socket"
                        " with $CPRD_SOCKET", c->address.sun_path, strerror(errno));
    if (!rc) rc = ask(c, &hello, until, &a);
    if (!rc && a.fd >= 0) close(a.fd);
    if (!rc && a.error.code) {
        cprd__last = a.error;
        rc = a.error.code;
    }
    if (!rc && a.version != VERSION)
        rc = cprd__fail(CPRD_PROTOCOL_ERROR, "cprd speaks version %llu of the protocol, this"
                        " program %d", 0ull + a.version, VERSION);
    free(hello.m.at);
    if (rc) {
        hang_up(c);
        return rc;
    }
    c->pid = (uint64_t)a.error.pid;
    c->connects++;
    return CPRD_OK;
}

int cprd__no_fd(const struct cprd__answer *a) {
    if (a->cut) return cprd__no_room("to receive a queue of cprd with (what is held stays held)");
    return cprd__fail(CPRD_PROTOCOL_ERROR, "an answer of cprd without a descriptor");
}

/* Park the root in a queue of cprd, then send the request that speaks of it. The sending end is
 * closed in the end: so what was parked and not saved is let go of. */
static int ask_parked(cprd *c, struct cprd__call *call, double until, struct cprd__answer *a) {
    const struct cprd__packed *p = call->packed;
    struct cprd__call queue = cprd__call("queue", NULL, NULL);
    int rc = ask(c, &queue, until, a);
    free(queue.m.at);
    if (rc || a->error.code) return rc;
    int inlet = a->fd;
    a->fd = -1;
    if (inlet < 0) return cprd__no_fd(a);
    int error = cprd__send(inlet, p->header, CPRD__HEADER, p->fds, p->parked);
    if (error == EPIPE || error == ECONNRESET) rc = LOST;
    else if (error) rc = cprd__explain(error);
    if (!rc) cprd__point("pack:parked");
    if (!rc) rc = ask(c, call, until, a);
    close(inlet);
    return rc;
}

/* A request is repeated on another connection where one is lost: its nonce makes it one request. */
int cprd__request(cprd *c, struct cprd__call *call, struct cprd__answer *a) {
    double until = now() + call->wait + c->timeout, away = 0;
    int rc = check_owner(c);
    if (rc) {
        free(call->m.at);
        return rc;
    }
    pthread_mutex_lock(&c->lock);
    for (;;) {
        int was_open = c->sock >= 0;
        rc = was_open ? CPRD_OK : greet(c, until);
        if (!rc) away = 0;
        if (!rc) rc = call->packed ? ask_parked(c, call, until, a) : ask(c, call, until, a);
        if (rc == LOST || rc == CPRD_PROTOCOL_ERROR) hang_up(c);
        if (rc != LOST && rc != CPRD_UNAVAILABLE) break;
        if (!away) away = now();
        if (now() >= until || now() >= away + RETRY_FOR) {
            if (rc == LOST)
                rc = cprd__fail(CPRD_UNAVAILABLE, "no answer: the connection is lost");
            break;
        }
        if (!was_open) pause_for(PAUSE);
    }
    pthread_mutex_unlock(&c->lock);
    free(call->m.at);
    if (rc || !a->error.code) return rc;
    if (a->fd >= 0) close(a->fd);
    cprd__last = a->error;
    return a->error.code;
}

int cprd_connect(const char *path, cprd **out) {
    if (!path) path = getenv("CPRD_SOCKET");
    if (!path || !*path) path = "/run/cprd/cprd.sock";
    cprd *c = calloc(1, sizeof *c);
    if (!c) return cprd__no_memory();
    *c = (cprd){.sock = -1, .owner = getpid(), .timeout = MUTE};
    pthread_mutex_init(&c->lock, NULL);
    c->address.sun_family = AF_UNIX;
    int rc = LOST;
    if (strlen(path) >= sizeof c->address.sun_path)
        rc = cprd__fail(CPRD_INVALID_INPUT, "the path of a socket has less than %zu bytes",
                        sizeof c->address.sun_path);
    else strcpy(c->address.sun_path, path);
    for (int tries = 6; rc == LOST && tries; tries--) { /* each may have met a killed cprd */
        rc = greet(c, now() + MUTE);
        if (rc == LOST) pause_for(PAUSE);
    }
    if (rc == LOST)
        rc = cprd__fail(CPRD_UNAVAILABLE, "cprd at %s closed the connection before it said hello",
                        path);
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

struct cprd_prepared {
    struct cprd__ticket ticket;
};
struct cprd_claim {
    struct cprd__ticket ticket;
    cprd_state *state;
    int bundle, begun;
    uint64_t attempts;
    char last_reject[sizeof(((struct cprd__answer *)0)->last_reject)];
};

static int ticket_new(struct cprd__ticket *t, cprd *c, const char *name, double wait) {
    *t = (struct cprd__ticket){.c = c, .name = strdup(name), .over = 1};
    if (getrandom(t->nonces, sizeof t->nonces, 0) != sizeof t->nonces || !t->name)
        return cprd__no_memory();
    if (!(wait > 0)) return CPRD_OK;
    if (cprd_connect(c->address.sun_path, &t->own)) return cprd__last.code;
    t->own->timeout = c->timeout;
    t->c = t->own;
    return CPRD_OK;
}

void cprd__set(struct cprd__ticket *t, const struct cprd__answer *a) {
    t->generation = a->generation;
    t->stored = !strcmp(a->kept, "store");
    t->over = 0;
    memcpy(t->token, a->token, sizeof t->token);
}

int cprd__claim(struct cprd__ticket *t, cprd *c, const char *verb, const char *name,
                const struct cprd_load_options *options, const struct cprd__packed *packed,
                struct cprd__answer *a) {
    static const struct cprd_load_options none;
    const struct cprd_load_options *o = options ? options : &none;
    if (ticket_new(t, c, name, o->wait)) return cprd__last.code;
    struct cprd__call call = cprd__call(verb, name, NULL);
    cprd__fields(&call, "lease d generation u", o->lease, o->generation);
    call.packed = packed;
    call.wait = o->wait;
    call.wait_as = o->wait > 0 ? "wait D" : NULL;
    int rc = cprd__request(t->c, &call, a);
    if (!rc) cprd__set(t, a);
    return rc;
}

void cprd__close(struct cprd__ticket *t) {
    cprd_close(t->own);
    free(t->name);
}

int cprd__end(struct cprd__ticket *t, const char *verb, const char *why, int cause,
              struct cprd__answer *a) {
    if (t->over)
        return cprd__fail(CPRD_FENCED, "%s: '%s' has been ended already", verb, t->name);
    int second = !strcmp(verb, "reject") || !strcmp(verb, "abort");
    struct cprd__call call = cprd__call_of(t, verb, t->nonces[second]);
    char cut[MAX_WHY + 1];
    snprintf(cut, sizeof cut, "%s", why ? why : "");
    while (!is_utf8((unsigned char *)cut, strlen(cut))) cut[strlen(cut) - 1] = 0;
    cprd__fields(&call, "why s damaged f attempt n", why ? cut : NULL, cause == CPRD_DAMAGED,
                 cause != CPRD_DAMAGED && cause != CPRD_OK);
    int rc = cprd__request(t->c, &call, a);
    if (!rc) t->over = 1;
    return rc;
}

int cprd__give_back(struct cprd__ticket *t, int cause) {
    struct cprd_error said = cprd__last;
    struct cprd__answer a;
    if (!t->over) cprd__end(t, "reject", cause ? said.text : "closed without confirm", cause, &a);
    t->over = 1;
    cprd__last = said;
    return cause;
}

struct process { /* as cprd is told */
    uint64_t pid, inode; /* inode 0: before Linux 6.9 */
    int ended;
};

static int name_process(const cprd *c, int pidfd, struct process *p) {
    struct stat there;
    struct statfs system;
    long pid;
    if (!cprd__fdinfo(pidfd, "\nPid:", &pid) || fstat(pidfd, &there) || fstatfs(pidfd, &system))
        return cprd__fail(CPRD_INVALID_INPUT, "descriptor %d is not a pidfd", pidfd);
    *p = (struct process){.ended = pid < 0};
    if (p->ended) return CPRD_OK;
    p->pid = (uint64_t)pid;
    p->inode = system.f_type == 0x50494446 ? there.st_ino : 0; /* PID_FS_MAGIC */
    if (pid && c->pid == (uint64_t)getpid()) return CPRD_OK;
    return cprd__fail(CPRD_LIMIT_EXCEEDED, "cprd lives in another pid namespace, and cannot tell"
                      " which process that is: let that process connect by itself");
}

/* Without an inode cprd may watch another process, which got the pid in between. */
static void say_ended(cprd *c, const char *name, uint64_t generation, const struct process *p,
                      int pidfd) {
    struct pollfd one = {pidfd, POLLIN, 0};
    if (!p->pid || p->inode || poll(&one, 1, 0) <= 0) return;
    struct cprd__answer a;
    struct cprd__call call = cprd__call("ended", name, NULL);
    cprd__fields(&call, "generation U pid U", generation, p->pid);
    cprd__request(c, &call, &a);
}

/* What save, prepare and confirm_next have in common. Frees `call`. */
static int save(cprd *c, struct cprd__call call, const char *name, cprd_state *s,
                const struct cprd_save_options *options, struct cprd__answer *a) {
    static const struct cprd_save_options none;
    const struct cprd_save_options *o = options ? options : &none;
    struct process p = {0, 0, 0};
    struct cprd__packed packed = {.fds = NULL};
    int rc = check_owner(c);
    if (!rc && (o->after_exit < CPRD_NOW || o->after_exit > CPRD_AFTER_PROCESS || o->ttl < 0))
        rc = cprd__fail(CPRD_INVALID_INPUT, "after_exit or ttl of the save options makes no sense");
    if (!rc && o->after_exit == CPRD_AFTER_PROCESS) rc = name_process(c, o->process, &p);
    if (!rc) rc = pack(s, cprd__cookie_of(c), &packed);
    if (rc) free(call.m.at);
    else {
        const char *after = o->after_exit == CPRD_AFTER_ME ? "peer" : p.pid ? "process" : "no";
        cprd__fields(&call, "if_exists s require s", o->replace ? "replace" : "error",
                     o->require_store ? "store" : "memory");
        cprd__fields(&call, "fds U bytes U parked U depth U ttl d after_exit s pid u inode u",
                     (uint64_t)packed.fd_count, packed.size, (uint64_t)packed.parked,
                     (uint64_t)packed.depth, o->ttl, after, p.pid, p.inode);
        call.packed = &packed;
        cprd__point("save:packed");
        rc = cprd__request(c, &call, a);
        if (!rc) say_ended(c, name, a->generation, &p, o->process);
    }
    packed_free(&packed); /* after the answer: cprd's copy is never the last one */
    return rc;
}

static void set_saved(struct cprd_saved *out, const struct cprd__answer *a) {
    if (out) *out = (struct cprd_saved){a->generation, !strcmp(a->kept, "store")};
}

int cprd_save(cprd *c, const char *name, cprd_state *s, const struct cprd_save_options *options,
              struct cprd_saved *out) {
    struct cprd__answer a;
    int rc = save(c, cprd__call("save", name, NULL), name, s, options, &a);
    if (rc) return rc;
    cprd__point("save:answered");
    set_saved(out, &a);
    return CPRD_OK;
}

int cprd_prepare(cprd *c, const char *name, cprd_state *s, const struct cprd_save_options *options,
                 cprd_prepared **out) {
    struct cprd__answer a;
    *out = NULL;
    cprd_prepared *p = calloc(1, sizeof *p);
    int rc = p ? ticket_new(&p->ticket, c, name, 0) : cprd__no_memory();
    if (!rc) rc = save(c, cprd__call("prepare", name, NULL), name, s, options, &a);
    if (rc) cprd_prepared_free(p);
    else {
        cprd__point("save:answered");
        cprd__set(&p->ticket, &a);
        *out = p;
    }
    return rc;
}

int cprd_commit(cprd_prepared *p, struct cprd_saved *out) {
    struct cprd__answer a;
    cprd__point("commit:before");
    int rc = cprd__end(&p->ticket, "commit", NULL, 0, &a);
    if (rc) return rc;
    cprd__point("commit:answered");
    set_saved(out, &a);
    return CPRD_OK;
}

int cprd_abort(cprd_prepared *p) {
    struct cprd__answer a;
    return cprd__end(&p->ticket, "abort", NULL, 0, &a);
}

void cprd_prepared_free(cprd_prepared *p) {
    if (p) cprd__close(&p->ticket);
    free(p);
}

int cprd_load(cprd *c, const char *name, const struct cprd_load_options *options,
              cprd_claim **out) {
    struct cprd__answer a;
    *out = NULL;
    cprd_claim *claim = calloc(1, sizeof *claim);
    if (!claim) return cprd__no_memory();
    claim->bundle = -1;
    cprd__point("load:before");
    int rc = cprd__claim(&claim->ticket, c, "load", name, options, NULL, &a);
    if (!rc) {
        claim->bundle = a.fd;
        claim->attempts = a.attempts;
        strcpy(claim->last_reject, a.last_reject);
        cprd__point("load:claimed");
        if (a.fd < 0) rc = cprd__no_fd(&a);
        else if (a.live && cprd__unpack_live) rc = cprd__unpack_live(a.fd, &claim->state);
        else rc = cprd_unpack(a.fd, &claim->state);
        if (!rc) cprd__point("load:unpacked");
        else cprd__give_back(&claim->ticket, rc);
    }
    if (rc) cprd_claim_close(claim);
    else *out = claim;
    return rc;
}

cprd_state *cprd_claim_state(cprd_claim *claim) { return claim->state; }
uint64_t cprd_claim_generation(const cprd_claim *claim) { return claim->ticket.generation; }
uint64_t cprd_claim_attempts(const cprd_claim *claim) { return claim->attempts; }
const char *cprd_claim_last_reject(const cprd_claim *claim) { return claim->last_reject; }

int cprd_renew(cprd_claim *claim, double lease) {
    struct cprd__answer a;
    struct cprd__call call = cprd__call_of(&claim->ticket, "renew", NULL);
    cprd__fields(&call, "lease d", lease);
    return cprd__request(claim->ticket.c, &call, &a);
}

int cprd_begin(cprd_claim *claim, int process) {
    struct cprd__ticket *t = &claim->ticket;
    struct cprd__answer a;
    struct process p = {0, 0, 0};
    if (process >= 0 && name_process(t->c, process, &p)) return cprd__last.code;
    if (p.ended)
        return cprd__fail(CPRD_INVALID_INPUT, "begin: the process that is to act has ended");
    cprd__point("begin:before");
    struct cprd__call call = cprd__call_of(t, "begin", NULL);
    cprd__fields(&call, "pid u inode u", p.pid, p.inode);
    int rc = cprd__request(t->c, &call, &a);
    if (!rc || rc == CPRD_UNAVAILABLE || rc == CPRD_TIMEOUT) claim->begun = 1; /* perhaps */
    if (rc) return rc;
    say_ended(t->c, t->name, t->generation, &p, process);
    cprd__point("begin:answered");
    return CPRD_OK;
}

/* As long as the bundle is there, what was taken and closed since stays open. */
static int confirmed(cprd_claim *claim) {
    cprd__point("confirm:answered");
    if (claim->bundle >= 0) close(claim->bundle);
    claim->bundle = -1;
    return CPRD_OK;
}

int cprd_confirm(cprd_claim *claim) {
    struct cprd__answer a;
    cprd__point("confirm:before");
    int rc = cprd__end(&claim->ticket, "confirm", NULL, 0, &a);
    return rc ? rc : confirmed(claim);
}

int cprd_confirm_next(cprd_claim *claim, cprd_state *next, const struct cprd_save_options *options,
                      struct cprd_saved *out) {
    struct cprd__ticket *t = &claim->ticket;
    struct cprd__answer a;
    if (t->over)
        return cprd__fail(CPRD_FENCED, "confirm: '%s' has been ended already", t->name);
    cprd__point("confirm:before");
    int rc = save(t->c, cprd__call_of(t, "confirm_next", NULL), t->name, next, options, &a);
    if (rc) return rc;
    t->over = 1;
    set_saved(out, &a);
    return confirmed(claim);
}

int cprd_reject(cprd_claim *claim, const char *why) {
    struct cprd__answer a;
    cprd__point("reject:before");
    int rc = cprd__end(&claim->ticket, "reject", why, 0, &a);
    if (!rc) cprd__point("reject:answered");
    return rc;
}

void cprd_claim_close(cprd_claim *claim) {
    if (!claim) return;
    if (!claim->begun) cprd__give_back(&claim->ticket, CPRD_OK);
    if (claim->bundle >= 0) close(claim->bundle);
    cprd_state_free(claim->state);
    cprd__close(&claim->ticket);
    free(claim);
}

int cprd_wait(cprd *c, const char *name, double seconds, uint64_t *generation) {
    struct cprd__answer a;
    struct cprd__ticket t; /* a connection of its own is all that this has */
    struct cprd__call call = cprd__call("wait", name, NULL);
    call.wait = seconds > 0 ? seconds : 0;
    call.wait_as = "timeout D";
    int rc = ticket_new(&t, c, name, 1);
    if (rc) free(call.m.at);
    else rc = cprd__request(t.c, &call, &a);
    if (!rc && generation) *generation = a.generation;
    cprd__close(&t);
    return rc;
}

static int force_out(cprd *c, const char *verb, const char *name, int force) {
    struct cprd__answer a;
    struct cprd__call call = cprd__call(verb, name, NULL);
    cprd__fields(&call, "force f", force);
    return cprd__request(c, &call, &a);
}

int cprd_drop(cprd *c, const char *name, int force) { return force_out(c, "drop", name, force); }

int cprd_release(cprd *c, const char *name, int force) {
    return force_out(c, "release", name, force);
}

int cprd_list(cprd *c, void (*each)(void *context, const struct cprd_row *row), void *context) {
    struct cprd__answer a = {.more = 0};
    struct cprd__bytes rows = {0};
    int rc;
    do {
        struct cprd__call call = cprd__call("list", NULL, NULL);
        cprd__fields(&call, "after u", a.more);
        call.rows = &rows;
        rc = cprd__request(c, &call, &a);
        struct reader r = {rows.at, rows.at + rows.size, rows.failed || !rows.size};
        for (uint64_t left = rc ? 0 : next(&r).number; left-- && !r.bad;) {
            char name[512] = "", phase[32] = "";
            struct cprd_row row = {name, phase, 0, 0, 0, 0};
            const struct field fields[] = {
                {"name", TEXT, name, sizeof name}, {"phase", TEXT, phase, sizeof phase},
                {"uid", UINT, &row.uid, 0}, {"generation", UINT, &row.generation, 0},
                {"fds", UINT, &row.fds, 0}, {"bytes", UINT, &row.bytes, 0}, {NULL, NIL, NULL, 0}};
            read_map(&r, fields, NULL);
            each(context, &row);
        }
    } while (!rc && a.more);
    free(rows.at);
    return rc;
}
