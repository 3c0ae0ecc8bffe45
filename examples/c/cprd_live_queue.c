/* A live hold's keys in a table, its records as bytes and back, and a hold that is read. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "cprd_live_internal.h"

/* -- keys -------------------------------------------------------------------------------------- */

struct kept **cprd__slot_of(const cprd_live *l, int space, const char *name, size_t n, int32_t id) {
    uint64_t hash = 14695981039346656037u ^ (uint32_t)id ^ (uint64_t)space << 32;
    for (size_t at = 0; at < n; at++) hash = (hash ^ (unsigned char)name[at]) * 1099511628211u;
    hash *= 0x9e3779b97f4a7c15u;
    struct kept **slot = &l->table[hash >> 32 & (l->slots - 1)];
    while (*slot && !((*slot)->space == space && (*slot)->id == id && (*slot)->length == n &&
                      !memcmp((*slot)->name, name, n))) slot = &(*slot)->chain;
    return slot;
}
struct kept **cprd__slot(const cprd_live *l, const struct kept *k) {
    return cprd__slot_of(l, k->space, k->name, k->length, k->id);
}

int cprd__live_room(cprd_live *l, size_t more) {
    while (l->used + more > l->slots) {
        size_t slots = l->slots ? 2 * l->slots : 64, old = l->slots;
        struct kept **table = calloc(slots, sizeof *table), **before = l->table;
        if (!table) return no_memory();
        l->table = table, l->slots = slots;
        for (size_t n = 0; n < old; n++)
            for (struct kept *k = before[n], *next; k; k = next)
                next = k->chain, k->chain = NULL, *cprd__slot(l, k) = k;
        free(before);
    }
    return CPRD_OK;
}

struct kept *cprd__kept_new(int op, const char *name, size_t length, int32_t id) {
    struct kept *k = calloc(1, sizeof *k + length + 1);
    if (!k) return no_memory(), NULL;
    k->op = (uint8_t)op, k->id = id, k->fd = -1, k->length = (uint8_t)length;
    k->space = op >= DELETE ? op - DELETE : op == SAVE ? FD : op == MAPPED ? MEMORY : SECTION;
    memcpy(k->name, name, length);
    return k;
}

void cprd__kept_free(struct kept *k) {
    if (!k) return;
    if (k->fd >= 0) close(k->fd);
    free(k->value), free(k);
}

/* Put a key in the place of the same key: returns what was there, out of the table. */
struct kept *cprd__link(cprd_live *l, struct kept *k) {
    struct kept **slot = cprd__slot(l, k), *old = *slot;
    k->chain = old ? old->chain : NULL;
    *slot = k;
    if (!old) l->used++;
    return old;
}

void cprd__unlink(cprd_live *l, struct kept *k) {
    *cprd__slot(l, k) = k->chain, l->used--;
}

/* -- records, written -------------------------------------------------------------------------- */

int cprd__fenced(cprd_live *l, const char *why) {
    l->over = CPRD_FENCED;
    return fail(CPRD_FENCED, "this live hold is not this process's any more (%s): it was dropped by"
                " force (cprctl drop --force), and no change counts from now on", why);
}

static size_t cost(size_t size) { /* of a send buffer, at most */
    size_t block = 512;
    while (block < size + 320) block *= 2;
    return 320 + block;
}

static void put_le(bytes *b, uint64_t value, int width) {
    unsigned char raw[8];
    little_endian(raw, value, width), put(b, raw, (size_t)width);
}

int cprd__send_record(cprd_live *l, struct segment *q, const struct record *r) {
    bytes b = {0};
    put(&b, "CPRL\1\0", 6), put_le(&b, (uint64_t)r->kind, 1), put_le(&b, (uint64_t)r->flags, 1);
    put_le(&b, l->hold, 8), put_le(&b, l->seq + 1, 8), put_le(&b, q->next, 8);
    put_le(&b, r->count, 2), put_le(&b, r->fd_count, 2), put_le(&b, 0, 4);
    if (r->kind == ROOT) put_le(&b, r->part, 2), put_le(&b, r->parts, 2);
    for (size_t n = 0; n < r->id_count; n++) put_le(&b, r->ids[n], 4);
    for (int column = 0; column < 6; column++)
        for (size_t n = 0; n < r->count; n++) {
            const struct kept *k = r->entries[n].k;
            int ends = r->entries[n].ends;
            if (column == 0) put_le(&b, ends ? DELETE + k->space : k->op, 1);
            else if (column == 1) put_le(&b, ends ? 0 : k->birth, 8);
            else if (column == 2) put_le(&b, (uint32_t)k->id, 4);
            else if (column == 5) put(&b, k->name, k->length + (n + 1 < r->count));
            else if (!ends && (k->op == RAW || k->op == PACKED)) {
                if (column == 3) put_le(&b, k->size, 4);
                else put(&b, k->value, k->size);
            }
        }
    int error = b.failed ? ENOMEM : b.size > MOST ? EMSGSIZE : 0;
    if (!error) {
        little_endian(b.at + 36, b.size, 4);
        point("live:send");
        error = cprd__send(q->tx, b.at, b.size, r->fds, r->fd_count);
        if (error == EAGAIN || error == ENOBUFS) { /* a small net.core.wmem_default */
            int more = 1 << 20;
            setsockopt(q->tx, SOL_SOCKET, SO_SNDBUF, &more, sizeof more);
            error = cprd__send(q->tx, b.at, b.size, r->fds, r->fd_count);
        }
    }
    free(b.at);
    switch (error) {
    case 0:
        point("live:sent");
        l->seq++, q->next++, q->records++;
        q->parked += (int)r->fd_count, q->spent += cost(b.size), q->last = b.size;
        return CPRD_OK;
    case EPIPE: case EPERM: case ECONNRESET: case ENOTCONN: case ESHUTDOWN:
        return cprd__fenced(l, strerror(error));
    case EBADF: case EINVAL:
        return fail(CPRD_INVALID_INPUT, "a descriptor is not open, or cannot be passed to another"
                    " process (%s)", strerror(error));
    case EMSGSIZE:
        return fail(CPRD_LIMIT_EXCEEDED, "the change takes more than %d bytes in one record: make"
                    " several of it; nothing was changed", MOST);
    default:
        return fail(CPRD_LIMIT_EXCEEDED, "cannot keep the descriptors (%s): all that the processes"
                    " of this uid have parked counts against RLIMIT_NOFILE (ETOOMANYREFS), a queue"
                    " against net.core.wmem_max (EAGAIN); nothing was changed", strerror(error));
    }
}

/* Let go of the oldest records of a queue. */
int cprd__drain(cprd_live *l, struct segment *q, size_t count) {
    char byte;
    point("live:drain");
    for (size_t n = 0; n < count; n++)
        if (recv(q->rx, &byte, 1, MSG_DONTWAIT) <= 0)
            return cprd__fenced(l, "its queue was changed");
    point("live:drained");
    q->records -= count, q->spent = q->records ? cost(q->last) : 0;
    return CPRD_OK;
}

/* -- segments ---------------------------------------------------------------------------------- */

void cprd__segment_free(struct segment *s) {
    if (!s) return;
    if (s->tx >= 0) close(s->tx);
    if (s->rx >= 0) close(s->rx);
    free(s->keys), free(s);
}

/* A segment that the root does not name yet. O_APPEND means nothing to a socket: marks ours. */
struct segment *cprd__segment_new(int kind) {
    struct segment *s = calloc(1, sizeof *s);
    if (!s) return no_memory(), NULL;
    *s = (struct segment){.tx = -1, .rx = -1, .kind = kind};
    if (!(s->keys = calloc(s->room = VALUE_KEYS, sizeof *s->keys))) no_memory();
    else if (!cprd__pair(&s->tx, &s->rx)) {
        fcntl(s->tx, F_SETFL, O_APPEND), fcntl(s->rx, F_SETFL, O_APPEND);
        return s;
    }
    cprd__segment_free(s);
    return NULL;
}

/* -- records, read ----------------------------------------------------------------------------- */

void cprd__messages_free(struct messages *m) {
    for (size_t n = 0; n < m->count; n++) {
        cprd__close_all(m->at[n].fds, m->at[n].fd_count);
        free(m->at[n].data), free(m->at[n].fds), free(m->at[n].items);
    }
    free(m->at);
    *m = (struct messages){NULL, 0};
}

int cprd__copy_of(const struct messages *m, const struct kept *k) {
    for (size_t n = m->count; n--;)
        for (size_t at = m->at[n].count; at--;) {
            const struct item *i = &m->at[n].items[at];
            if (i->fd >= 0 && i->space == k->space && i->id == k->id && i->length == k->length &&
                !memcmp(i->name, k->name, k->length)) return m->at[n].fds[i->fd];
        }
    return -1;
}

static int wrong(const char *what) { return fail(CPRD_DAMAGED, "a live hold with %s", what); }

/* Whoever wrote the bytes may be hostile: lengths are looked at before contents. */
static int decode(struct message *m) {
    static const signed char spaces[] = {-1, FD, SECTION, SECTION, SECTION, SECTION, MEMORY, -1, FD,
                                         SECTION, MEMORY};
    const unsigned char *d = m->data, *end = d + m->size, *at = d + 40;
    if (m->size < 40 || memcmp(d, "CPRL", 4)) return wrong("a record without its header");
    if (number_at(d + 4, 2) != 1)
        return fail(CPRD_BUSY, "a live hold of version %d; this program reads version 1: upgrade"
                    " it", (int)number_at(d + 4, 2));
    m->kind = d[6], m->flags = d[7], m->hold = number_at(d + 8, 8), m->seq = number_at(d + 16, 8);
    m->ordinal = number_at(d + 24, 8), m->count = number_at(d + 32, 2);
    if (number_at(d + 36, 4) != m->size || m->size > MOST || m->flags > 1 || m->seq >> 62 ||
        m->ordinal >> 62 || m->kind < CHANGE || m->kind > ROOT)
        return wrong("a record whose header contradicts itself");
    if (number_at(d + 34, 2) != m->fd_count) return wrong("a record without all its descriptors");
    if (m->kind == ROOT) {
        if (end - at < 4) return wrong("a record that ends too early");
        m->part = (int)number_at(at, 2), m->parts = (int)number_at(at + 2, 2), at += 4;
        if (m->part < 1 || m->part > m->parts) return wrong("a part of no whole");
    }
    m->id_count = m->kind >= ATTACH ? m->fd_count : 0, m->ids = at;
    if ((size_t)(end - at) < 4 * m->id_count) return wrong("a record that ends too early");
    at += 4 * m->id_count;
    if ((size_t)(end - at) < 13 * m->count) return wrong("a record that ends too early");
    if (!m->count) return at == end ? CPRD_OK : wrong("something behind a record");
    if (!(m->items = calloc(m->count, sizeof *m->items))) return no_memory();
    const unsigned char *births = at + m->count, *ids = births + 8 * m->count,
                        *lengths = ids + 4 * m->count, *values = lengths;
    size_t carried = 0;
    for (size_t n = 0; n < m->count; n++) values += at[n] == RAW || at[n] == PACKED ? 4 : 0;
    if (values > end) return wrong("a record that ends too early");
    for (size_t n = 0; n < m->count; n++) {
        struct item *i = &m->items[n];
        i->op = at[n], i->space = at[n] < sizeof spaces ? spaces[at[n]] : -1;
        i->birth = number_at(births + 8 * n, 8), i->id = (int32_t)number_at(ids + 4 * n, 4);
        if (i->space < 0 || i->birth >> 62 || (i->space != FD && i->id) ||
            (i->op < DELETE && m->kind >= ATTACH)) return wrong("an entry that cannot be");
        i->fd = carries(i->op) ? (int)carried++ : -1;
        if (i->op != RAW && i->op != PACKED) continue;
        i->size = number_at(lengths, 4), i->value = values, lengths += 4;
        if ((size_t)(end - values) < i->size) return wrong("a record that ends too early");
        values += i->size;
    }
    if (carried != m->fd_count - m->id_count) return wrong("other descriptors than entries");
    const char *name = (const char *)values, *stop = (const char *)end;
    for (size_t n = 0; n < m->count; n++) {
        struct item *i = &m->items[n];
        const char *nul = memchr(name, 0, (size_t)(stop - name));
        i->name = name, i->length = (size_t)((nul ? nul : stop) - name);
        if (!nul != (n + 1 == m->count) || !i->length || i->length > 255 ||
            (i->space != FD && !is_utf8((const unsigned char *)name, i->length)))
            return wrong("a name that no key can have");
        name += i->length + 1;
    }
    return CPRD_OK;
}

/* One pass over a queue. */
static int peek_once(int rx, struct messages *out, unsigned char *buffer) {
    int off = 0, waiting, total = 0, seen, fds[CPRD_SCM_MAX], rc = CPRD_OK;
    size_t count;
    setsockopt(rx, SOL_SOCKET, SO_PEEK_OFF, &off, sizeof off);
    for (waiting = cprd__waiting(rx); total < waiting && !rc;) {
        ssize_t got = cprd__receive(rx, buffer, MOST + 1, MSG_PEEK, fds, &count, &seen);
        struct message *more = got > 0 && out->count < 1024
            ? realloc(out->at, (out->count + 1) * sizeof *more) : NULL;
        if (more) {
            struct message *m = &(out->at = more)[out->count];
            *m = (struct message){.size = (size_t)got, .fd_count = count};
            m->data = malloc((size_t)got), m->fds = malloc((count + 1) * sizeof(int));
            if (m->data && m->fds) {
                memcpy(m->data, buffer, (size_t)got), memcpy(m->fds, fds, count * sizeof(int));
                out->count++, total += (int)got;
                if (seen & MSG_CTRUNC)
                    rc = no_room("for a live hold (what is held stays held)", EMFILE);
                else rc = seen & MSG_TRUNC ? wrong("a record that is too long") : decode(m);
                if (!rc && out->count > 1 && (m->ordinal != m[-1].ordinal + 1 ||
                                              m->seq <= m[-1].seq || m->hold != m[-1].hold))
                    rc = wrong("a record missing");
                continue;
            }
            free(m->data), free(m->fds);
        }
        cprd__close_all(fds, count);
        rc = got <= 0 || out->count >= 1024 ? wrong("a queue that is not in order") : no_memory();
    }
    if (!rc && (total != waiting || cprd__waiting(rx) != waiting))
        rc = wrong("a queue that changes");
    return rc;
}

int cprd__peek(int rx, struct messages *out, int reading) {
    unsigned char *buffer = malloc(MOST + 1);
    int off = -1, rc = buffer ? CPRD_DAMAGED : no_memory(), waiting = -1;
    point(reading ? "live:read" : "live:peek");
    /* A stopped owner may go on, and drain what is void: a queue that changes is read again. */
    for (int tries = reading ? 200 : 1, same = 3; rc == CPRD_DAMAGED && tries && same; tries--) {
        cprd__messages_free(out);
        rc = peek_once(rx, out, buffer);
        if (rc == CPRD_DAMAGED && reading) poll(NULL, 0, 1);
        same = cprd__waiting(rx) == waiting ? same - 1 : 3;
        waiting = cprd__waiting(rx);
    }
    setsockopt(rx, SOL_SOCKET, SO_PEEK_OFF, &off, sizeof off);
    if (rc) cprd__messages_free(out);
    if (!reading) point("live:peeked");
    free(buffer);
    return rc;
}

/* -- a hold, read ------------------------------------------------------------------------------ */

cprd_live *cprd__live_new(void) {
    cprd_live *l = calloc(1, sizeof *l);
    if (!l) return no_memory(), NULL;
    l->root.tx = l->root.rx = -1;
    if (cprd__live_room(l, 1)) return free(l), NULL;
    return l;
}

void cprd__forget_keys(cprd_live *l) {
    for (size_t n = 0; n < l->slots; n++)
        for (struct kept *k = l->table[n], *next; k; k = next) next = k->chain, cprd__kept_free(k);
    memset(l->table, 0, l->slots * sizeof *l->table);
    l->kept = l->used = l->ended = 0;
}

void cprd__live_free(cprd_live *l) {
    if (!l) return;
    cprd__forget_keys(l);
    for (size_t n = 0; n < l->count; n++) cprd__segment_free(l->segments[n]);
    if (l->root.tx >= 0) close(l->root.tx), close(l->root.rx);
    for (struct map *m = l->maps, *next; m; m = next) {
        next = m->next;
        if (l->owner == getpid()) munmap(m->at, m->size);
        free(m);
    }
    cprd_state_free(l->state);
    free(l->table), free(l->segments), free(l);
}

static int shut(int rx) {
    int domain = 0, type = 0;
    socklen_t size = sizeof domain;
    if (getsockopt(rx, SOL_SOCKET, SO_DOMAIN, &domain, &size) || domain != AF_UNIX ||
        getsockopt(rx, SOL_SOCKET, SO_TYPE, &type, &size) || type != SOCK_SEQPACKET)
        return wrong("a part that is no queue");
    shutdown(rx, SHUT_RD);
    return CPRD_OK;
}

static size_t parked_in(int fd) { /* scm_fds, without a read */
    char path[64], info[1024];
    snprintf(path, sizeof path, "/proc/self/fdinfo/%d", fd);
    int file = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t got = file < 0 ? -1 : read(file, info, sizeof info - 1);
    if (file >= 0) close(file);
    info[got > 0 ? got : 0] = 0;
    const char *found = strstr(info, "scm_fds:");
    return found ? strtoul(found + 8, NULL, 10) : 0;
}

static int room_for(size_t count) {
    uint64_t soft = cprd__soft_limit();
    return count + 64 <= soft ? CPRD_OK
           : fail(CPRD_LIMIT_EXCEEDED, "%zu descriptors do not fit in this process: its soft"
                  " RLIMIT_NOFILE is %llu; raise it before (setrlimit, ulimit -n, LimitNOFILE=);"
                  " what is held stays held", count + 64, (unsigned long long)soft);
}

/* What one record says of a key: the highest seq counts. */
static int offer(cprd_live *l, struct segment *s, struct message *m, struct item *i) {
    if (cprd__live_room(l, 1)) return last.code;
    struct kept *k = cprd__kept_new(i->op, i->name, i->length, i->id);
    if (!k) return last.code;
    struct kept *old = *cprd__slot(l, k);
    if (i->size && !(k->value = malloc(i->size))) return cprd__kept_free(k), no_memory();
    if (i->size) memcpy(k->value, i->value, i->size);
    k->size = i->size, k->birth = i->birth, k->seq = m->seq, k->segment = s;
    if (i->fd >= 0) k->fd = m->fds[i->fd], m->fds[i->fd] = -1;
    struct kept *loser = old && old->seq >= k->seq ? k : old, *winner = loser == k ? old : k;
    if (loser != k) cprd__link(l, k);
    if (!loser) return CPRD_OK;
    winner->hides = loser->hides;
    if (loser->op < DELETE && loser->segment != winner->segment) {
        winner->hides = 1;
        if (!loser->segment->dirty) loser->segment->dirty = 1, l->dirty++;
    }
    cprd__kept_free(loser);
    return CPRD_OK;
}

static int read_segment(cprd_live *l, struct segment *s) {
    struct messages m = {0};
    size_t first = 0;
    int rc = cprd__peek(s->rx, &m, 1);
    for (size_t n = 0; n < m.count; n++) {
        if (m.at[n].kind == SNAPSHOT) first = n; /* voids what is before it, deletions excepted */
        if (m.at[n].kind > SNAPSHOT || m.at[n].hold != l->hold)
            rc = wrong("a record of another queue");
    }
    for (size_t n = 0; n < m.count && !rc; n++) {
        struct message *one = &m.at[n];
        if (one->seq > l->seq) l->seq = one->seq;
        s->kind = one->flags ? OWN : SHARED, s->next = one->ordinal + 1, s->records++;
        s->parked += (int)one->fd_count;
        for (size_t at = 0; at < one->count && !rc; at++)
            if (n >= first || one->items[at].op >= DELETE) rc = offer(l, s, one, &one->items[at]);
    }
    cprd__messages_free(&m);
    return rc;
}

static int by_id(const void *one, const void *other) {
    const struct segment *a = *(struct segment *const *)one, *b = *(struct segment *const *)other;
    return (a->id > b->id) - (a->id < b->id);
}

/* The segments: those of the last complete ROOT and of every ATTACH since. */
static int read_root(cprd_live *l, int root) {
    struct messages m = {0};
    size_t part = 0, whole = 0; /* of the ROOT that may become whole; its first record */
    int rc = cprd__peek(root, &m, 1);
    char *counts = calloc(m.count + 1, 1);
    if (!rc && !counts) rc = no_memory();
    for (size_t n = 0; n < m.count && !rc; n++) {
        const struct message *one = &m.at[n];
        if (one->kind < ATTACH) rc = wrong("a record of a segment in its root");
        l->hold = one->hold, l->seq = one->seq;
        if (one->kind == ATTACH) { counts[n] = 1; continue; }
        if (one->part == 1) part = 0, whole = n;
        part = (size_t)one->part == part + 1 ? part + 1 : 0;
        if (!part || part < (size_t)one->parts) continue;
        memset(counts, 0, n), memset(counts + whole, 0, n - whole + 1);
        for (size_t at = whole; at <= n; at++) counts[at] = m.at[at].kind == ROOT;
        part = 0;
    }
    for (size_t n = 0; n < m.count && !rc; n++) {
        struct message *one = &m.at[n];
        if (!counts[n]) continue;
        struct segment **more = realloc(l->segments, (l->count + one->id_count + 1) * sizeof *more);
        if (more) l->segments = more;
        else rc = no_memory();
        for (size_t at = 0; at < one->id_count && !rc; at++) {
            struct segment *s = calloc(1, sizeof *s);
            if (!s) { rc = no_memory(); break; }
            *s = (struct segment){.tx = -1, .rx = one->fds[at],
                                  .id = (uint32_t)number_at(one->ids + 4 * at, 4)};
            one->fds[at] = -1, l->segments[l->count++] = s;
            if (s->id >> 31) rc = wrong("a segment beyond all numbers");
            if (s->id > l->next_id) l->next_id = s->id;
        }
        for (size_t at = 0; at < one->count && !rc; at++) rc = offer(l, NULL, one, &one->items[at]);
    }
    if (l->count) qsort(l->segments, l->count, sizeof *l->segments, by_id);
    for (size_t n = 1; n < l->count && !rc; n++)
        if (l->segments[n]->id == l->segments[n - 1]->id) rc = wrong("a segment twice");
    cprd__messages_free(&m);
    free(counts);
    return rc;
}

static int by_birth(const void *one, const void *other) {
    const struct kept *a = *(struct kept *const *)one, *b = *(struct kept *const *)other;
    return a->birth != b->birth ? (a->birth > b->birth ? 1 : -1) : a->op - b->op;
}

/* Make the state, and note where its keys lie. */
static int settle_read(cprd_live *l) {
    struct kept **all = calloc(l->used + 1, sizeof *all);
    size_t count = 0;
    int rc = all ? CPRD_OK : no_memory();
    for (size_t n = 0; n < l->slots && !rc; n++)
        for (struct kept **slot = &l->table[n], *k; (k = *slot);)
            if (k->op >= DELETE && !k->hides) *slot = k->chain, l->used--, cprd__kept_free(k);
            else {
                if (k->op >= DELETE) l->ended++;
                else all[count++] = k;
                slot = &k->chain;
            }
    qsort(all, all ? count : 0, sizeof *all, by_birth);
    if (!rc && !(l->state = cprd_state_new())) rc = no_memory();
    for (size_t n = 0; n < count && !rc; n++) {
        struct kept *k = all[n];
        struct segment *s = k->segment;
        struct stat there;
        if (s->count == s->room) {
            struct kept **keys = realloc(s->keys, (s->room + 16) * sizeof *keys);
            if (!keys) { rc = no_memory(); break; }
            s->keys = keys, s->room += 16;
        }
        s->keys[s->count++] = k, s->bytes += entry_size(k), l->kept++;
        if (k->birth > l->birth) l->birth = k->birth;
        if (!carries(k->op) && s->kind == SHARED) s->kind = VALUES;
        int seals = k->space == MEMORY ? fcntl(k->fd, F_GET_SEALS) : 0;
        if (k->space == FD) rc = cprd__own_fd(l->state, k->name, k->length, k->id, k->fd);
        else if (k->space == MEMORY)
            rc = seals >= 0 && seals & F_SEAL_SHRINK && seals & F_SEAL_GROW &&
                 !fstat(k->fd, &there) && there.st_size
                 ? CPRD_OK : wrong("memory that is no memfd of a fixed size");
        else if (k->fd >= 0 && !cprd__is_sealed(k->fd)) rc = wrong("a section that is not sealed");
        else rc = cprd__own_section(l->state, k->name, k->length, k->value, k->size, k->fd,
                                    k->op == PACKED || k->op == PACKED_MEMFD);
        if (!rc && k->space != MEMORY) k->fd = -1;
    }
    for (size_t n = 0; n < l->count && !rc; n++) { /* void, and still parked */
        struct segment *s = l->segments[n];
        int held = 0;
        for (size_t at = 0; at < s->count; at++) held += carries(s->keys[at]->op);
        if (s->parked > held && !s->dirty) s->dirty = 1, l->dirty++;
    }
    free(all);
    return rc == CPRD_INVALID_INPUT ? fail(CPRD_DAMAGED, "%s", last.text) : rc;
}

int cprd_live_read(int root, cprd_live **out) {
    cprd_live *l = cprd__live_new();
    size_t total = 0;
    int rc = !l ? last.code : shut(root);
    *out = NULL;
    if (!rc && !(rc = room_for(parked_in(root)))) rc = read_root(l, root);
    for (size_t n = 0; !rc && n < l->count; n++) { /* all are shut before the first is read */
        rc = shut(l->segments[n]->rx);
        total += 1 + parked_in(l->segments[n]->rx);
    }
    if (!rc) rc = room_for(total);
    for (size_t n = 0; !rc && n < l->count; n++) rc = read_segment(l, l->segments[n]);
    if (!rc) rc = settle_read(l);
    if (rc) cprd__live_free(l);
    else *out = l;
    return rc;
}
