/* States, and what cprd.c and cprd_live.c share: errors, descriptors, memfds. See cprd.h. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/sockios.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "cprd_internal.h"

/* -- errors ------------------------------------------------------------------------------------ */

_Thread_local struct cprd_error last;
const char *const cprd__names[] = {
    "", "CprdError", "Unavailable", "NotHeld", "Busy", "Damaged", "AlreadyHeld", "Denied", "Fenced",
    "LimitExceeded", "Timeout", "ProtocolError", "InvalidInput"};

const struct cprd_error *cprd_last(void) { return &last; }

const char *cprd_code_name(int code) {
    return code >= 0 && code <= CPRD_INVALID_INPUT ? cprd__names[code] : "?";
}

int fail(int code, const char *format, ...) {
    va_list arguments;
    char text[sizeof last.text]; /* an argument may be last.text itself */
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    last = (struct cprd_error){.code = code, .pid = -1, .until = -1};
    memcpy(last.text, text, sizeof text);
    return code;
}

int no_memory(void) { return fail(CPRD_LIMIT_EXCEEDED, "no memory left in this process"); }

int no_room(const char *what, int error) {
    uint64_t soft = cprd__soft_limit();
    return fail(CPRD_LIMIT_EXCEEDED,
                "no descriptor left %s (%s): the soft RLIMIT_NOFILE is %llu; raise it (setrlimit,"
                " ulimit -n, LimitNOFILE=)",
                what, strerror(error), (unsigned long long)soft);
}

#ifdef CPRD_PAUSE
/* As cprd/linux/pause.py. */
void point(const char *name) {
    static int hits;
    const char *where = getenv("CPRD_PAUSE"), *log = getenv("CPRD_PAUSE_LOG");
    if (log) {
        int fd = open(log, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
        if (fd < 0 || dprintf(fd, "%s\n", name) < 0) abort();
        close(fd);
    }
    if (!where) return;
    size_t length = strcspn(where, "#");
    if (length && (strncmp(where, name, length) || name[length])) return;
    if (++hits == (where[length] ? atoi(where + length + 1) : 1)) raise(SIGSTOP);
}
#endif

/* -- bytes ----------------------------------------------------------------------------------- */

void put(struct cprd__bytes *b, const void *data, size_t size) {
    if (b->room - b->size < size && !b->failed) {
        size_t room = b->room ? b->room : 256;
        while (room - b->size < size) room *= 2;
        unsigned char *at = realloc(b->at, room);
        if (at) b->at = at, b->room = room;
        else b->failed = 1;
    }
    if (b->failed || !size) return;
    memcpy(b->at + b->size, data, size);
    b->size += size;
}

/* -- descriptors ------------------------------------------------------------------------------- */

static pthread_mutex_t limit_lock = PTHREAD_RECURSIVE_MUTEX_INITIALIZER_NP;

uint64_t cprd__soft_limit(void) {
    struct rlimit limit = {0, 0};
    getrlimit(RLIMIT_NOFILE, &limit);
    return limit.rlim_cur;
}

int cprd__raise_limit(uint64_t *soft, uint64_t *hard) {
    struct rlimit limit = {0, 0};
    pthread_mutex_lock(&limit_lock); /* no thread takes another's raised limit for its own */
    getrlimit(RLIMIT_NOFILE, &limit);
    *soft = limit.rlim_cur, *hard = limit.rlim_max;
    limit.rlim_cur = limit.rlim_max;
    return setrlimit(RLIMIT_NOFILE, &limit);
}

void cprd__restore_limit(uint64_t soft) {
    struct rlimit limit = {0, 0};
    getrlimit(RLIMIT_NOFILE, &limit);
    limit.rlim_cur = soft;
    setrlimit(RLIMIT_NOFILE, &limit);
    pthread_mutex_unlock(&limit_lock);
}

void cprd__close_all(const int *fds, size_t count) {
    for (size_t n = 0; n < count; n++)
        if (fds[n] >= 0) close(fds[n]);
}

union rights {
    char data[CMSG_SPACE(CPRD_SCM_MAX * sizeof(int))];
    struct cmsghdr head;
};

int cprd__send(int sock, const void *data, size_t size, const int *fds, size_t count) {
    union rights space;
    struct iovec part = {(void *)(uintptr_t)data, size};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
    if (count) {
        memset(&space, 0, sizeof space);
        space.head = (struct cmsghdr){CMSG_LEN(count * sizeof(int)), SOL_SOCKET, SCM_RIGHTS};
        memcpy(CMSG_DATA(&space.head), fds, count * sizeof(int));
        message.msg_control = &space, message.msg_controllen = CMSG_SPACE(count * sizeof(int));
    }
    if (sendmsg(sock, &message, MSG_DONTWAIT | MSG_NOSIGNAL) >= 0) return 0;
    if (errno != ETOOMANYREFS) return errno;
    uint64_t soft, hard;
    cprd__raise_limit(&soft, &hard);
    int error = sendmsg(sock, &message, MSG_DONTWAIT | MSG_NOSIGNAL) < 0 ? errno : 0;
    cprd__restore_limit(soft);
    return error;
}

ssize_t cprd__receive(int sock, void *data, size_t size, int flags, int fds[CPRD_SCM_MAX],
                      size_t *count, int *seen) {
    union rights space;
    struct iovec part = {data, size};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = &space,
                             .msg_controllen = sizeof space};
    *count = 0, *seen = 0;
    ssize_t got = recvmsg(sock, &message, flags | MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    if (got < 0) return -1;
    *seen = message.msg_flags;
    for (struct cmsghdr *c = CMSG_FIRSTHDR(&message); c; c = CMSG_NXTHDR(&message, c))
        if (c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_RIGHTS) {
            size_t more = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
            memcpy(fds + *count, CMSG_DATA(c), more * sizeof(int));
            *count += more;
        }
    return got;
}

int cprd__pair(int *tx, int *rx) {
    int ends[2];
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends)) {
        uint64_t soft, hard; /* a program may have more open than its soft limit allows */
        cprd__raise_limit(&soft, &hard);
        int error = socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) ? errno : 0;
        cprd__restore_limit(soft);
        if (error) return no_room("for a queue", error);
    }
    *tx = ends[0], *rx = ends[1];
    return CPRD_OK;
}

int cprd__waiting(int sock) {
    int count = -1;
    return ioctl(sock, SIOCINQ, &count) ? -1 : count;
}

static const int SEALS = F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE;

int cprd__is_sealed(int memfd) {
    int seals = fcntl(memfd, F_GET_SEALS);
    return seals >= 0 && (seals & SEALS) == SEALS;
}

int cprd__memfd(const char *name, const bytes *content, int *out) {
    char label[200];
    snprintf(label, sizeof label, "%s", name);
    int fd = memfd_create(label, MFD_CLOEXEC | MFD_ALLOW_SEALING);
    for (size_t done = 0; fd >= 0 && done < content->size;) {
        ssize_t wrote = write(fd, content->at + done, content->size - done);
        if (wrote > 0) done += (size_t)wrote;
        else if (errno != EINTR) break;
    }
    struct stat there;
    if (fd >= 0 && !fstat(fd, &there) && (size_t)there.st_size == content->size &&
        !fcntl(fd, F_ADD_SEALS, SEALS))
        return *out = fd, CPRD_OK;
    int error = errno;
    if (fd >= 0) close(fd);
    return fail(CPRD_LIMIT_EXCEEDED,
                "cannot make a memfd for %s: %s; raise RLIMIT_NOFILE (EMFILE) or the memory that"
                " this cgroup may use (ENOMEM, ENOSPC)", label, strerror(error));
}

int cprd__process(int pidfd, struct cprd__process *p) {
    char path[64], info[1024];
    struct stat there, other;
    long pid;
    *p = (struct cprd__process){0, 0, 0};
    snprintf(path, sizeof path, "/proc/self/fdinfo/%d", pidfd);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t got = fd < 0 ? -1 : read(fd, info, sizeof info - 1);
    if (fd >= 0) close(fd);
    info[got > 0 ? got : 0] = 0;
    char *found = strstr(info, "\nPid:");
    if (!found || sscanf(found, "\nPid: %ld", &pid) != 1 || fstat(pidfd, &there))
        return fail(CPRD_INVALID_INPUT, "descriptor %d is not a pidfd", pidfd);
    p->ended = pid < 0;
    p->pid = pid < 0 ? 0 : (uint64_t)pid;
    /* Before Linux 6.9 all pidfds have one inode, that of anonymous files. */
    int anonymous = eventfd(0, EFD_CLOEXEC);
    if (anonymous >= 0 && !fstat(anonymous, &other) && other.st_dev != there.st_dev)
        p->inode = there.st_ino;
    if (anonymous >= 0) close(anonymous);
    return CPRD_OK;
}

/* -- a state ----------------------------------------------------------------------------------- */

cprd_state *cprd_state_new(void) { return calloc(1, sizeof(cprd_state)); }

static void free_section(struct cprd__section *section) {
    if (section->map) munmap(section->map, section->mapped);
    if (section->owned) close(section->memfd);
    free(section->content.at), free(section->key);
}

void cprd_state_free(cprd_state *s) {
    if (!s) return;
    for (size_t n = 0; n < s->count; n++) {
        if (s->owned && s->keys[n].fd >= 0) close(s->keys[n].fd);
        free(s->keys[n].name);
    }
    for (size_t n = 0; n < s->section_count; n++) free_section(&s->sections[n]);
    free(s->keys), free(s->table), free(s->sections), free(s);
}

/* The place of a key in the table, or of a free slot. There is always a free one. */
static size_t *slot_of(const cprd_state *s, const char *name, size_t length, int32_t id) {
    uint64_t hash = 14695981039346656037u ^ (uint32_t)id;
    for (size_t n = 0; n < length; n++) hash = (hash ^ (unsigned char)name[n]) * 1099511628211u;
    hash = (hash ^ (uint32_t)id) * 0x9e3779b97f4a7c15u;
    for (size_t at = hash >> 20;; at++) {
        size_t *slot = &s->table[at & (s->slots - 1)];
        if (!*slot) return slot;
        const struct cprd__key *key = &s->keys[*slot - 1];
        if (key->id == id && !strncmp(key->name, name, length) && !key->name[length]) return slot;
    }
}

static int grow(cprd_state *s) {
    size_t room = s->room ? 2 * s->room : 16, slots = 2 * room;
    struct cprd__key *keys = realloc(s->keys, room * sizeof *keys);
    if (!keys) return no_memory();
    s->keys = keys;
    size_t *table = calloc(slots, sizeof *table);
    if (!table) return no_memory();
    free(s->table);
    s->table = table, s->slots = slots, s->room = room;
    for (size_t n = 0; n < s->count; n++)
        *slot_of(s, keys[n].name, strlen(keys[n].name), keys[n].id) = n + 1;
    return CPRD_OK;
}

static int add_key(cprd_state *s, const char *name, size_t length, int32_t id, int fd) {
    if (!length || length > 255 || memchr(name, 0, length))
        return fail(CPRD_INVALID_INPUT, "name '%.*s': wants 1 to 255 bytes without NUL",
                    (int)(length < 256 ? length : 256), name);
    if (s->count == s->room && grow(s)) return last.code;
    size_t *slot = slot_of(s, name, length, id);
    if (*slot)
        return fail(CPRD_INVALID_INPUT, "key (%.*s, %d) is used already", (int)length, name, id);
    char *copy = strndup(name, length);
    if (!copy) return no_memory();
    s->keys[s->count] = (struct cprd__key){copy, id, fd};
    *slot = ++s->count;
    return CPRD_OK;
}

int cprd__own_fd(cprd_state *s, const char *name, size_t length, int32_t id, int fd) {
    s->owned = 1;
    return add_key(s, name, length, id, fd);
}

int cprd_add_fd(cprd_state *s, const char *name, int32_t id, int fd) {
    if (s->owned) return fail(CPRD_INVALID_INPUT, "a loaded state takes no more descriptors");
    if (fd < 0) return fail(CPRD_INVALID_INPUT, "fd %d of (%s, %d) is none", fd, name, id);
    return add_key(s, name, strlen(name), id, fd);
}

static struct cprd__section *find_section(const cprd_state *s, const char *key, size_t length) {
    for (size_t n = 0; n < s->section_count; n++)
        if (strlen(s->sections[n].key) == length && !memcmp(s->sections[n].key, key, length))
            return &s->sections[n];
    return NULL;
}

/* What follows a key's bytes; only valid UTF-8 is a text on the wire. */
int is_utf8(const unsigned char *at, size_t left) {
    while (left) {
        size_t more = *at < 0x80 ? 0 : *at >= 0xc2 && *at < 0xe0 ? 1 : (*at & 0xf0) == 0xe0 ? 2
                      : *at >= 0xf0 && *at < 0xf5 ? 3 : 4;
        if (more >= left || more == 4) return 0;
        for (size_t n = 1; n <= more; n++)
            if ((at[n] & 0xc0) != 0x80) return 0;
        if ((*at == 0xe0 && at[1] < 0xa0) || (*at == 0xed && at[1] > 0x9f) ||
            (*at == 0xf0 && at[1] < 0x90) || (*at == 0xf4 && at[1] > 0x8f)) return 0;
        at += 1 + more, left -= 1 + more;
    }
    return 1;
}

void cprd_delete_section(cprd_state *s, const char *key) {
    struct cprd__section *found = find_section(s, key, strlen(key));
    if (!found) return;
    free_section(found);
    memmove(found, found + 1, (size_t)(s->sections + --s->section_count - found) * sizeof *found);
}

static int add_section(cprd_state *s, const char *key, size_t length, struct cprd__section made) {
    if (!length || length > 255 || memchr(key, 0, length) ||
        !is_utf8((const unsigned char *)key, length))
        return fail(CPRD_INVALID_INPUT, "section '%.*s': wants 1 to 255 bytes of UTF-8",
                    (int)(length < 256 ? length : 256), key);
    if (find_section(s, key, length))
        return fail(CPRD_INVALID_INPUT, "section '%.*s' is there already", (int)length, key);
    if (s->section_count == CPRD_MAX_SECTIONS)
        return fail(CPRD_LIMIT_EXCEEDED, "more than %d sections", CPRD_MAX_SECTIONS);
    if (s->section_count == s->section_room) {
        size_t room = s->section_room ? 2 * s->section_room : 8;
        struct cprd__section *more = realloc(s->sections, room * sizeof *more);
        if (!more) return no_memory();
        s->sections = more, s->section_room = room;
    }
    if (!(made.key = strndup(key, length))) return no_memory();
    s->sections[s->section_count++] = made;
    return CPRD_OK;
}

int cprd__own_section(cprd_state *s, const char *key, size_t length, const void *data, size_t size,
                      int memfd, int packed) {
    struct cprd__section made = {.memfd = memfd, .packed = packed, .owned = memfd >= 0};
    put(&made.content, data, size);
    if (made.content.failed) return no_memory();
    int rc = add_section(s, key, length, made);
    if (rc) free(made.content.at);
    return rc;
}

int cprd_add_section(cprd_state *s, const char *key, const void *data, size_t size, int packed) {
    return cprd__own_section(s, key, strlen(key), data, size, -1, packed != 0);
}

int cprd_add_memfd(cprd_state *s, const char *key, int memfd, int packed) {
    if (memfd < 0 || !cprd__is_sealed(memfd))
        return fail(CPRD_INVALID_INPUT, "section '%s': fd %d is no memfd with all four seals"
                    " (F_SEAL_SEAL, SHRINK, GROW, WRITE)", key, memfd);
    struct cprd__section made = {.memfd = memfd, .packed = packed != 0};
    return add_section(s, key, strlen(key), made);
}

size_t cprd_fd_count(const cprd_state *s) { return s->count; }
size_t cprd_section_count(const cprd_state *s) { return s->section_count; }

int cprd_fd_at(const cprd_state *s, size_t index, const char **name, int32_t *id) {
    if (index >= s->count) return -1;
    if (name) *name = s->keys[index].name;
    if (id) *id = s->keys[index].id;
    return s->keys[index].fd;
}

static struct cprd__key *find_key(const cprd_state *s, const char *name, int32_t id) {
    size_t *slot = s->count ? slot_of(s, name, strlen(name), id) : NULL;
    return slot && *slot ? &s->keys[*slot - 1] : NULL;
}

int cprd_find_fd(const cprd_state *s, const char *name, int32_t id) {
    struct cprd__key *key = find_key(s, name, id);
    return key ? key->fd : -1;
}

int cprd_take_fd(cprd_state *s, const char *name, int32_t id) {
    struct cprd__key *key = find_key(s, name, id);
    int fd = key ? key->fd : -1;
    if (key) key->fd = -1;
    return fd;
}

const char *cprd_section_key(const cprd_state *s, size_t index) {
    return index < s->section_count ? s->sections[index].key : NULL;
}

int cprd_section_fd(const cprd_state *s, const char *key) {
    struct cprd__section *section = find_section(s, key, strlen(key));
    return section ? section->memfd : -1;
}

int section_size(const struct cprd__section *section, size_t *size) {
    struct stat there;
    *size = section->content.size;
    if (section->memfd < 0) return CPRD_OK;
    if (fstat(section->memfd, &there))
        return fail(CPRD_INVALID_INPUT, "section '%s': fd %d is not open (any more)", section->key,
                    section->memfd);
    *size = (size_t)there.st_size;
    return CPRD_OK;
}

int cprd_section(cprd_state *s, const char *key, const void **data, size_t *size, int *packed) {
    struct cprd__section *found = find_section(s, key, strlen(key));
    if (!found) return fail(CPRD_NOT_HELD, "the state has no section '%s'", key);
    if (section_size(found, size)) return last.code;
    if (found->memfd >= 0 && !found->map && *size) { /* MAP_PRIVATE: before 6.7 no shared mapping */
        void *map = mmap(NULL, *size, PROT_READ, MAP_PRIVATE, found->memfd, 0);
        if (map == MAP_FAILED)
            return fail(CPRD_LIMIT_EXCEEDED, "section '%s': %s", key, strerror(errno));
        found->map = map, found->mapped = *size;
    }
    *data = found->map ? found->map : (void *)found->content.at;
    if (packed) *packed = found->packed;
    return CPRD_OK;
}
