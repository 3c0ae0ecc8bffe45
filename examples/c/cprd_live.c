/* The owner of a live hold. cprd.h says how to use it, docs/bundle.md has the records.
 *
 * Keys lie in segments: queues that the root names. A change is one record: a CHANGE in a segment
 * that has room; or an ATTACH in the root, with fresh segments and all that ends. What a change
 * made void still lies in a segment, which is `dirty`: what counts there is written to another one,
 * then the segment is drained as a whole. Until no segment is dirty, keys that have ended stay in
 * the table, and each rewritten root says again that they have ended. */
#define _GNU_SOURCE
#define CPRD_INTERNAL
#include "cprd.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

enum { CHANGE = 1, SNAPSHOT, ATTACH, ROOT }; /* kinds of records */
enum { SAVE = 1, RAW, PACKED, RAW_MEMFD, PACKED_MEMFD, MAPPED, DELETE = 8 }; /* ops */
enum {
    RECORD_HEADER = 40,
    MOST = 64 * 1024,     /* bytes of a record */
    MOST_RECORDS = 1024,  /* of a queue */
    MOST_SEGMENTS = 131072,
    GROUP = 12 * 1024,    /* bytes of values that go to a segment at once */
    INLINE = 4096,        /* bytes of a section; a larger one gets a memfd */
    SPEND = 96 * 1024,    /* of the send buffer of a segment (212,992) */
    ENDED = 64,           /* ended keys in a record of the root */
    IDLE = 4,             /* empty segments that are kept for what comes */
#ifdef CPRD_SMALL         /* for tests: a few changes reach every step */
    KEYS = 2, RECORDS = 3, ROOT_RECORDS = 3, PART = 2,
#else
    KEYS = 16,            /* of a segment */
    RECORDS = 16,         /* of a segment, before they become one */
    ROOT_RECORDS = 100,   /* then the root is rewritten, ... */
    PART = CPRD__SCM_MAX, /* ... so many segments in a record */
#endif
    MOST_OWN = 512        /* files and memfds: each has a segment of its own */
};

struct segment { /* or the root */
    uint32_t id;
    int tx, rx;               /* tx -1: a predecessor's, which is only drained */
    uint64_t cookies[2], seq, next; /* of both ends; of the last record; ordinal of the next */
    int own;                  /* copies of what lies here must not be closed in this process */
    int dirty, leaves;        /* something void lies here; the next root does not name it */
    size_t records, spent;    /* in the queue; of the send buffer */
    size_t count;
    struct kept *keys;        /* that count here */
    struct records {
        struct record *at;
        size_t count;
    } queue;                  /* while it is read */
};

struct kept {
    struct cprd__key key;
    struct segment *segment; /* or the place of the keys that ended */
    struct kept *sibling;    /* in the segment */
    int op;
    uint64_t birth, seq;
    struct entry *found;     /* while a hold is read */
    int fd;                  /* of MAPPED that a predecessor left; -1: none */
    void *map;
    size_t size;             /* of the map */
};

struct entry { /* of a record, that is read or is to be written */
    struct cprd__key key;
    struct kept *k;
    int op, fd, made; /* made: the memfd is to be closed by whoever made the entry */
    int own;
    uint64_t birth;
    const unsigned char *value;
    size_t size;
};

struct record { /* that was read */
    unsigned char *data;
    int fds[CPRD__SCM_MAX], kind, own; /* fds: of segments; entries have theirs */
    size_t size, fd_count, id_count, count;
    unsigned part, parts;
    uint64_t hold, seq, ordinal;
    const unsigned char *ids; /* of segments */
    struct entry *entries;
};

struct map {
    struct map *next;
    void *at;
    size_t size;
};

struct cprd_live {
    struct cprd__table table;
    struct segment root, ended, **segments; /* ended: not a queue, but the place of ended keys */
    size_t count, kept;
    uint64_t hold, seq, birth;
    uint32_t next_id;
    pid_t owner;
    int over, unconfirmed; /* CPRD_FENCED, CPRD_NOT_HELD: ended */
    struct map *maps;
    cprd_state *state; /* that was found */
    struct cprd__ticket ticket; /* c NULL: without cprd */
    int found, known, bundle;   /* known: cprd has our root */
    uint64_t connects;          /* of the connection by which cprd knows */
};

static int carries(int op) {
    return op == SAVE || op == RAW_MEMFD || op == PACKED_MEMFD || op == MAPPED;
}

static int fenced(cprd_live *l, const char *why) {
    l->over = CPRD_FENCED;
    return cprd__fail(CPRD_FENCED, "this live hold is not this process's any more (%s): it was"
                      " dropped by force (cprctl drop --force), and no change counts from now on",
                      why);
}

/* -- keys in segments -------------------------------------------------------------------------- */

static void enter(struct segment *s, struct kept *k) {
    k->segment = s;
    k->sibling = s->keys;
    s->keys = k;
    s->count++;
}

static void leave(struct kept *k) {
    struct kept **at = &k->segment->keys;
    while (*at != k) at = &(*at)->sibling;
    *at = k->sibling;
    k->segment->count--;
}

static struct kept *look(const cprd_live *l, const struct cprd__key *key) {
    return (struct kept *)*cprd__slot(&l->table, key->space, key->name, key->length, key->id);
}

/* As look; a key that is new has ended. NULL: no memory. */
static struct kept *know(cprd_live *l, const struct cprd__key *key) {
    struct kept *k = look(l, key);
    if (k || cprd__grow(&l->table)) return k;
    char *name = strndup(key->name, key->length);
    k = calloc(1, sizeof *k);
    if (!k || !name) {
        cprd__no_memory();
        free(k);
        free(name);
        return NULL;
    }
    *k = (struct kept){.key = *key, .op = DELETE + key->space, .fd = -1};
    k->key.name = name;
    k->key.chain = NULL;
    *cprd__slot(&l->table, key->space, key->name, key->length, key->id) = &k->key;
    l->table.used++;
    enter(&l->ended, k);
    return k;
}

static void forget(cprd_live *l, struct kept *k) {
    *cprd__slot(&l->table, k->key.space, k->key.name, k->key.length, k->key.id) = k->key.chain;
    l->table.used--;
    if (k->fd >= 0) close(k->fd);
    free(k->key.name);
    free(k);
}

static void segment_free(struct segment *s) {
    if (s->tx >= 0) close(s->tx);
    if (s->rx >= 0) close(s->rx);
    free(s);
}

/* One that the root does not name yet. */
static struct segment *segment_new(cprd_live *l, int own) {
    struct segment *s = calloc(1, sizeof *s);
    if (!s) cprd__no_memory();
    if (!s) return NULL;
    *s = (struct segment){.id = ++l->next_id, .tx = -1, .rx = -1, .own = own};
    if (cprd__pair(&s->tx, &s->rx)) {
        free(s);
        return NULL;
    }
    s->cookies[0] = cprd__cookie(s->tx);
    s->cookies[1] = cprd__cookie(s->rx);
    return s;
}

/* -- records, written -------------------------------------------------------------------------- */

static size_t cost(size_t size) { /* of a send buffer, at most */
    size_t block = 512;
    while (block < size + 320) block *= 2;
    return 320 + block;
}

/* Append a record, with the receiving ends of `segments` or the descriptors of `entries`. FENCED,
 * LIMIT_EXCEEDED, INVALID_INPUT: it is not there. */
static int send_record(cprd_live *l, struct segment *q, int kind, const unsigned *part,
                       struct segment **segments, size_t segment_count,
                       const struct entry *entries, size_t count) {
    struct cprd__bytes b = {0};
    int fds[CPRD__SCM_MAX], large = 1 << 20;
    size_t fd_count = 0;
    for (size_t n = 0; n < segment_count; n++) fds[fd_count++] = segments[n]->rx;
    for (size_t n = 0; n < count; n++)
        if (entries[n].fd >= 0) fds[fd_count++] = entries[n].fd;
    cprd__put(&b, "CPRL\1", 6);
    cprd__put_little(&b, (uint64_t)kind, 1);
    cprd__put_little(&b, (uint64_t)q->own, 1);
    cprd__put_little(&b, l->hold, 8);
    cprd__put_little(&b, l->seq + 1, 8);
    cprd__put_little(&b, q->next, 8);
    cprd__put_little(&b, count, 2);
    cprd__put_little(&b, fd_count, 2);
    cprd__put_little(&b, 0, 4); /* the size, which comes last */
    for (int n = 0; part && n < 2; n++) cprd__put_little(&b, part[n], 2);
    for (size_t n = 0; n < segment_count; n++) cprd__put_little(&b, segments[n]->id, 4);
    for (size_t n = 0; n < count; n++) cprd__put_little(&b, (uint64_t)entries[n].op, 1);
    for (size_t n = 0; n < count; n++) cprd__put_little(&b, entries[n].birth, 8);
    for (size_t n = 0; n < count; n++) cprd__put_little(&b, (uint32_t)entries[n].key.id, 4);
    for (size_t n = 0; n < count; n++)
        if (entries[n].value) cprd__put_little(&b, entries[n].size, 4);
    for (size_t n = 0; n < count; n++) cprd__put(&b, entries[n].value, entries[n].size);
    for (size_t n = 0; n < count; n++) {
        cprd__put(&b, entries[n].key.name, entries[n].key.length);
        if (n + 1 < count) cprd__put(&b, "", 1);
    }
    int error = b.failed ? ENOMEM : b.size > MOST ? EMSGSIZE : 0;
    for (int n = 0; !error && n < 4; n++) b.at[36 + n] = (unsigned char)(b.size >> 8 * n);
    if (!error) {
        cprd__point("live:send");
        error = cprd__send(q->tx, b.at, b.size, fds, fd_count);
        if (error == EAGAIN || error == ENOBUFS) { /* a small net.core.wmem_default */
            setsockopt(q->tx, SOL_SOCKET, SO_SNDBUF, &large, sizeof large);
            error = cprd__send(q->tx, b.at, b.size, fds, fd_count);
        }
    }
    free(b.at);
    if (error == EMSGSIZE)
        return cprd__fail(CPRD_LIMIT_EXCEEDED, "the change takes more than %d bytes in one record:"
                          " make several of it; nothing was changed", MOST);
    if (error == EPIPE || error == EPERM || error == ECONNRESET || error == ENOTCONN)
        return fenced(l, strerror(error));
    if (error) return cprd__explain(error);
    cprd__point("live:sent");
    q->seq = ++l->seq;
    q->next++;
    q->records++;
    q->spent += cost(b.size);
    return CPRD_OK;
}

/* Let go of the oldest records of a queue. */
static int drain(cprd_live *l, struct segment *q, size_t count) {
    char byte;
    cprd__point("live:drain");
    for (size_t n = 0; n < count; n++)
        if (recv(q->rx, &byte, 1, MSG_DONTWAIT) <= 0) return fenced(l, "its queue was changed");
    cprd__point("live:drained");
    q->records -= count;
    if (!q->records) q->spent = 0;
    return CPRD_OK;
}

/* Void all records of the root by new ones, that name all segments but those of no use; or, with
 * `nothing`, none. */
static int write_root(cprd_live *l, int nothing) {
    size_t before = l->root.records, left = 0, ended = nothing ? 0 : l->ended.count, idle = 0;
    for (size_t n = 0; n < l->count; n++) {
        struct segment *s = l->segments[n];
        int useless = !s->count && !s->dirty && (s->tx < 0 || ++idle > IDLE);
        s->leaves = nothing || useless;
        left += !s->leaves;
    }
    size_t by_left = (left + PART - 1) / PART, by_ended = (ended + ENDED - 1) / ENDED;
    unsigned part[2] = {1, (unsigned)(by_left > by_ended ? by_left : by_ended)};
    const struct kept *k = l->ended.keys;
    size_t at = 0;
    if (!part[1]) part[1] = 1;
    for (; part[0] <= part[1]; part[0]++) {
        struct segment *some[CPRD__SCM_MAX];
        struct entry entries[ENDED];
        size_t named = 0, said = 0;
        for (; at < l->count && named < PART; at++)
            if (!l->segments[at]->leaves) some[named++] = l->segments[at];
        for (; ended && said < ENDED; ended--, k = k->sibling)
            entries[said++] = (struct entry){.key = k->key, .op = k->op, .fd = -1};
        int rc = send_record(l, &l->root, ROOT, part, some, named, entries, said);
        if (rc) return rc;
    }
    int rc = drain(l, &l->root, before);
    size_t stay = 0;
    for (size_t n = 0; n < l->count; n++) {
        struct segment *s = l->segments[n];
        if (!s->leaves) l->segments[stay++] = s;
        else {
            if (!rc) rc = drain(l, s, s->records); /* a forked child may have an end */
            segment_free(s);
        }
    }
    l->count = stay;
    return rc;
}

/* -- changes ----------------------------------------------------------------------------------- */

static void mark_void(struct kept *k, const struct segment *now) {
    if (k->op < DELETE && (k->segment != now || carries(k->op))) k->segment->dirty = 1;
}

/* Write down what a record says that lies in `s` (NULL: the root, and the keys end). */
static void apply(cprd_live *l, struct segment *s, const struct entry *entries, size_t count) {
    for (size_t n = 0; n < count; n++) {
        const struct entry *e = &entries[n];
        struct kept *k = e->k;
        l->kept += (size_t)(e->op < DELETE) - (size_t)(k->op < DELETE);
        mark_void(k, s);
        leave(k);
        k->op = e->op;
        k->birth = e->birth;
        k->seq = s ? s->seq : l->seq;
        enter(s ? s : &l->ended, k);
    }
}

/* How many of the first entries, which are sorted, go to one segment. */
static size_t group(const struct entry *entries, size_t count) {
    size_t n = 0, size = 0;
    while (n < count && n < KEYS && entries[n].op < DELETE && entries[n].own == entries[0].own) {
        size += entries[n].size;
        if (n && (size > GROUP || entries[0].own)) break;
        n++;
    }
    return n;
}

/* The fullest segment that has room for these, which are a group. NULL: none. */
static struct segment *place(const cprd_live *l, const struct entry *entries, size_t count) {
    struct segment *best = NULL;
    for (size_t n = 0; n < l->count; n++) {
        struct segment *s = l->segments[n];
        size_t more = count - (count == 1 && entries->k->op < DELETE && entries->k->segment == s);
        if (s->tx < 0 || s->dirty || s->spent > SPEND || s->count + more > KEYS) continue;
        if (s->count && (s->own || entries->own)) continue;
        if (!more) return s; /* the key lies there */
        if (!best || s->count > best->count) best = s;
    }
    return best;
}

/* Fresh segments for what is kept, attached by one record with all that ends. */
static int attach(cprd_live *l, const struct entry *entries, size_t count) {
    struct segment *fresh[CPRD__SCM_MAX];
    size_t made = 0, at = 0, some, firsts[CPRD__SCM_MAX];
    int rc = l->root.records < ROOT_RECORDS ? CPRD_OK : write_root(l, 0);
    for (; !rc && (some = group(entries + at, count - at)); at += some) {
        if (made == CPRD__SCM_MAX)
            rc = cprd__fail(CPRD_LIMIT_EXCEEDED, "more keys than one change can have: make several"
                            " of it; nothing was changed");
        else if (!(fresh[made] = segment_new(l, entries[at].own))) rc = cprd__last.code;
        else {
            firsts[made] = at;
            rc = send_record(l, fresh[made++], CHANGE, NULL, NULL, 0, entries + at, some);
        }
    }
    struct segment **more = rc ? NULL : realloc(l->segments, (l->count + made + 1) * sizeof *more);
    if (!rc && !more) rc = cprd__no_memory();
    if (more) l->segments = more;
    if (!rc)
        rc = send_record(l, &l->root, ATTACH, NULL, fresh, made, entries + at, count - at);
    for (size_t n = 0; n < made; n++)
        if (rc) segment_free(fresh[n]);
        else {
            l->segments[l->count++] = fresh[n];
            size_t last = n + 1 < made ? firsts[n + 1] : at;
            apply(l, fresh[n], entries + firsts[n], last - firsts[n]);
        }
    if (!rc) apply(l, NULL, entries + at, count - at);
    return rc;
}

/* Make the changes of `entries`, which are sorted: what is kept before what ends. */
static int commit(cprd_live *l, struct entry *entries, size_t count) {
    struct segment *s = NULL;
    if (!count) return CPRD_OK;
    if (group(entries, count) == count) s = place(l, entries, count);
    if (!s) return attach(l, entries, count);
    if (!s->count) s->own = entries->own;
    int rc = send_record(l, s, CHANGE, NULL, NULL, 0, entries, count);
    if (!rc) apply(l, s, entries, count);
    return rc;
}

static int peek(struct segment *s, int reading);
static void records_free(struct records *r);

/* Keep elsewhere what counts in a segment, and let go of the segment's records. What this process
 * put into a segment of its own is not copied: closing a copy of a file would end the POSIX locks
 * of this process. */
static int rewrite(cprd_live *l, struct segment *s) {
    struct entry *entries = calloc(s->count + 1, sizeof *entries);
    size_t count = 0, wanted = s->own && s->tx >= 0 ? 0 : s->count;
    int rc = entries ? CPRD_OK : cprd__no_memory(), dirty = s->dirty;
    if (!rc && wanted) rc = peek(s, 0);
    if (rc == CPRD_DAMAGED) rc = fenced(l, "its queue was changed");
    for (size_t n = 0; !rc && n < s->queue.count; n++)
        for (size_t at = 0; at < s->queue.at[n].count; at++) {
            struct entry *e = &s->queue.at[n].entries[at];
            e->k = look(l, &e->key);
            if (e->k && e->k->segment == s && e->k->seq == s->queue.at[n].seq && count < wanted)
                entries[count++] = *e;
        }
    if (!rc && count != wanted) rc = fenced(l, "its queue was changed");
    s->dirty = 1; /* so that nothing is written there */
    if (!rc) rc = commit(l, entries, count);
    records_free(&s->queue); /* before the drain: so no close of a copy is the last one */
    if (!rc && !s->count) rc = drain(l, s, s->records);
    s->dirty = rc ? dirty : 0;
    free(entries);
    return rc;
}

/* A segment that is better rewritten: of many records; or of few keys, where there is another such
 * segment that takes them. */
static struct segment *worst(const cprd_live *l) {
    struct segment *few = NULL;
    for (size_t n = 0; n < l->count; n++) {
        struct segment *s = l->segments[n];
        if (s->own || !s->count) continue;
        if (s->tx >= 0 && s->records >= RECORDS) return s;
        if (s->count > KEYS / 2 || s->spent > GROUP) continue;
        if (few) return s->tx < 0 ? s : few;
        few = s;
    }
    return NULL;
}

/* Let go of what is void; then make few segments of many. A limit is no error of the latter. */
static int tidy(cprd_live *l) {
    struct segment *s;
    size_t idle = 0;
    int rc = CPRD_OK;
    for (size_t n = 0; n < l->count && !rc; n++)
        if (l->segments[n]->dirty) {
            rc = rewrite(l, l->segments[n]);
            n = (size_t)-1; /* the root may have lost some meanwhile */
        }
    while (!rc && l->ended.keys) { /* nothing of it lies anywhere any more */
        struct kept *k = l->ended.keys;
        leave(k);
        forget(l, k);
    }
    if (rc) return rc;
    while (!rc && (s = worst(l))) rc = rewrite(l, s);
    for (size_t n = 0; n < l->count; n++) idle += !l->segments[n]->count;
    if (!rc && idle > 2 * IDLE + l->count / 8) rc = write_root(l, 0);
    return rc == CPRD_LIMIT_EXCEEDED ? CPRD_OK : rc;
}

static int guard(const cprd_live *l) {
    if (l->owner != getpid())
        return cprd__fail(CPRD_INVALID_INPUT, "a live hold belongs to the process that opened it,"
                          " not to a forked child: open it after the last fork");
    if (l->over == CPRD_FENCED)
        return cprd__fail(CPRD_FENCED, "this live hold was dropped by force");
    if (l->over) return cprd__fail(CPRD_INVALID_INPUT, "this live hold has ended");
    if (l->unconfirmed)
        return cprd__fail(CPRD_INVALID_INPUT, "the predecessor's hold is not confirmed yet");
    return CPRD_OK;
}

int cprd_live_settle(cprd_live *l) { return guard(l) ? cprd__last.code : tidy(l); }

/* A socket of the hold, or the connection to cprd: never to be kept in the hold. */
static int is_ours(const cprd_live *l, int fd) {
    uint64_t cookie = cprd__cookie(fd);
    for (size_t n = 0; cookie && n <= l->count; n++) {
        const struct segment *s = n < l->count ? l->segments[n] : &l->root;
        if (cookie == s->cookies[0] || cookie == s->cookies[1]) return 1;
    }
    return cookie && l->ticket.c && cookie == cprd__cookie_of(l->ticket.c);
}

/* The entry of a change. `memory`: a new memfd, whose change this is; or -1. */
static int make_entry(cprd_live *l, const struct cprd_live_change *c, int memory,
                      struct entry *e) {
    static const int spaces[] = {CPRD__FD, CPRD__FD, CPRD__FD, CPRD__SECTION, CPRD__SECTION,
                                 CPRD__MEMORY};
    int ends = c->op == CPRD_DELETE_FD || c->op >= CPRD_DELETE_SECTION;
    struct stat there = {0};
    *e = (struct entry){.fd = -1};
    e->key = (struct cprd__key){.space = spaces[c->op], .name = (char *)(uintptr_t)c->name};
    e->key.length = strlen(c->name);
    e->key.id = e->key.space == CPRD__FD ? c->id : 0;
    if (cprd__check_name(e->key.space, c->name, e->key.length)) return cprd__last.code;
    if (!(e->k = know(l, &e->key))) return cprd__last.code;
    e->op = DELETE + e->key.space;
    if (memory < 0 && ends) return CPRD_OK;
    if (c->op == CPRD_SAVE_FD && e->k->op < DELETE)
        return cprd__fail(CPRD_INVALID_INPUT, "key (%s, %d) is used already", c->name, c->id);
    e->birth = e->k->op < DELETE ? e->k->birth : ++l->birth;
    if (memory >= 0) e->op = MAPPED;
    else if (c->op != CPRD_SAVE_SECTION) e->op = SAVE;
    else if (c->size > INLINE) e->op = c->packed ? PACKED_MEMFD : RAW_MEMFD;
    else e->op = c->packed ? PACKED : RAW;
    if (!carries(e->op)) {
        e->value = c->size ? c->data : (const void *)"";
        e->size = c->size;
        return CPRD_OK;
    }
    e->fd = memory >= 0 ? memory : c->fd;
    e->made = c->op == CPRD_SAVE_SECTION && memory < 0;
    if (e->made && cprd__memfd(c->name, c->data, c->size, &e->fd)) {
        e->made = 0;
        return cprd__last.code;
    }
    if (fstat(e->fd, &there))
        return cprd__fail(CPRD_INVALID_INPUT, "fd %d of (%s, %d) is not open", e->fd, c->name,
                          c->id);
    if (is_ours(l, e->fd))
        return cprd__fail(CPRD_INVALID_INPUT, "fd %d is a socket of the live hold itself", e->fd);
    e->own = !S_ISSOCK(there.st_mode) && !S_ISFIFO(there.st_mode) && there.st_mode & S_IFMT;
    return CPRD_OK;
}

/* What is kept before what ends; what needs a segment of its own in between. */
static int order(const void *one, const void *other) {
    const struct entry *a = one, *b = other;
    if ((a->op < DELETE) != (b->op < DELETE)) return a->op < DELETE ? -1 : 1;
    if (a->own != b->own) return a->own - b->own;
    return (a->birth > b->birth) - (a->birth < b->birth);
}

static int change(cprd_live *l, const struct cprd_live_change *c, size_t count, int memory) {
    int rc = guard(l), done = 0;
    size_t own = 0, made = 0, kept = 0, there = 0;
    struct entry *entries = rc ? NULL : calloc(count + 1, sizeof *entries);
    if (!entries) return rc ? rc : cprd__no_memory();
    for (; made < count && !rc; made++) {
        struct entry *e = &entries[made];
        rc = make_entry(l, &c[made], memory, e);
        if (!rc && e->k->found)
            rc = cprd__fail(CPRD_INVALID_INPUT, "key '%s' twice in one change", c[made].name);
        if (!rc) e->k->found = e;
        own += (size_t)e->own;
    }
    for (size_t n = 0; n < made; n++)
        if (entries[n].k) entries[n].k->found = NULL;
    for (size_t n = 0; n < l->count; n++) there += l->segments[n]->own && l->segments[n]->count;
    size_t wanted = there + own, most = there > MOST_OWN ? there : MOST_OWN;
    for (size_t n = 0; n < made; n++) /* what is replaced, or ends */
        wanted -= entries[n].k && entries[n].k->op < DELETE && entries[n].k->segment->own;
    if (!rc && own && wanted > most && l->bundle < 0) /* what was saved is taken whole */
        rc = cprd__fail(CPRD_LIMIT_EXCEEDED, "more than %d descriptors that are neither socket,"
                        " pipe nor anonymous inode (files, memfds), and sections above %d bytes;"
                        " nothing was changed", MOST_OWN, INLINE);
    for (size_t n = 0; n < made && !rc; n++) /* what ends and is not there takes no record */
        if (entries[n].op < DELETE || entries[n].k->op < DELETE) entries[kept++] = entries[n];
    if (!rc) {
        made = kept;
        qsort(entries, kept, sizeof *entries, order);
        rc = commit(l, entries, kept);
        done = !rc;
    }
    for (size_t n = 0; n < kept && done && l->state; n++) /* a copy would keep the file open */
        if (entries[n].key.space == CPRD__FD) {
            int fd = cprd_take_fd(l->state, entries[n].key.name, entries[n].key.id);
            if (fd >= 0) close(fd);
        }
    for (size_t n = 0; n < made; n++)
        if (entries[n].made) close(entries[n].fd);
    free(entries);
    if (done) rc = tidy(l);
    if (done && rc == CPRD_LIMIT_EXCEEDED)
        rc = cprd__fail(rc, "the change counts, but the kernel still holds what it ended (the next"
                        " change tries again): %s", cprd__last.text);
    return rc;
}

int cprd_live_change(cprd_live *l, const struct cprd_live_change *changes, size_t count) {
    return change(l, changes, count, -1);
}

int cprd_live_memory(cprd_live *l, const char *name, size_t size, void **out) {
    struct cprd__key key = {NULL, CPRD__MEMORY, 0, strlen(name), (char *)(uintptr_t)name};
    struct kept *k = look(l, &key);
    struct stat there = {.st_size = (off_t)size};
    int rc = guard(l), is_new = !k || k->op != MAPPED, fd = is_new ? -1 : k->fd;
    *out = NULL;
    if (rc) return rc;
    if (!is_new && k->map) there.st_size = (off_t)k->size;
    else if (!is_new) rc = fstat(fd, &there);
    if (rc || !size || (size_t)there.st_size != size)
        return cprd__fail(CPRD_INVALID_INPUT, "memory '%s' has another size than %zu", name, size);
    if (!is_new && k->map) {
        *out = k->map;
        return CPRD_OK;
    }
    struct map *map = malloc(sizeof *map);
    if (!map) return cprd__no_memory();
    *map = (struct map){l->maps, MAP_FAILED, size};
    if (is_new) {
        fd = memfd_create("cprd.memory", MFD_CLOEXEC | MFD_ALLOW_SEALING);
        if (fd < 0 || ftruncate(fd, (off_t)size) ||
            fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL))
            rc = cprd__no_room("for memory");
    }
    if (!rc) map->at = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (!rc && (map->at == MAP_FAILED || madvise(map->at, size, MADV_DONTFORK)))
        rc = cprd__fail(CPRD_LIMIT_EXCEEDED, "cannot map memory '%s': %s", name, strerror(errno));
    struct cprd_live_change one = {CPRD_DELETE_MEMORY, name, 0, -1, NULL, 0, 0};
    if (!rc && is_new) rc = change(l, &one, 1, fd);
    k = look(l, &key);
    if (rc == CPRD_LIMIT_EXCEEDED && is_new && k && k->op == MAPPED) rc = CPRD_OK; /* it counts */
    if (fd >= 0 && (is_new || !rc)) close(fd); /* the mapping is all that this process has */
    if (rc) {
        if (map->at != MAP_FAILED) munmap(map->at, size);
        free(map);
        return rc;
    }
    k->fd = -1;
    k->map = map->at;
    k->size = size;
    l->maps = map;
    *out = map->at;
    return CPRD_OK;
}

static void forget_all(cprd_live *l) {
    for (size_t n = 0; n < l->table.size; n++)
        while (l->table.slots[n]) forget(l, (struct kept *)l->table.slots[n]);
    l->ended = (struct segment){.tx = -1};
    l->kept = 0;
}

int cprd_live_clear(cprd_live *l) {
    int rc = guard(l);
    if (!rc) rc = write_root(l, 1);
    if (!rc) forget_all(l);
    return rc;
}

size_t cprd_live_kept(const cprd_live *l) { return l->kept; }

/* -- records, read ----------------------------------------------------------------------------- */

static int wrong(const char *what) {
    return cprd__fail(CPRD_DAMAGED, "a live hold with %s", what);
}

/* Whoever wrote the bytes may be hostile: lengths are looked at before contents. */
static int decode(struct record *r) {
    static const signed char spaces[] = {-1, CPRD__FD, CPRD__SECTION, CPRD__SECTION, CPRD__SECTION,
                                         CPRD__SECTION, CPRD__MEMORY, -1, CPRD__FD, CPRD__SECTION,
                                         CPRD__MEMORY};
    const unsigned char *d = r->data, *end = d + r->size, *at = d + RECORD_HEADER;
    if (r->size < RECORD_HEADER || memcmp(d, "CPRL", 4)) return wrong("no header of a record");
    if (cprd__little(d + 4, 2) != 1)
        return cprd__fail(CPRD_BUSY, "a live hold of version %d; this program reads version 1:"
                          " upgrade it", (int)cprd__little(d + 4, 2));
    r->kind = d[6];
    r->own = d[7];
    r->hold = cprd__little(d + 8, 8);
    r->seq = cprd__little(d + 16, 8);
    r->ordinal = cprd__little(d + 24, 8);
    r->count = cprd__little(d + 32, 2);
    if (cprd__little(d + 36, 4) != r->size || r->size > MOST || r->own > 1 || r->seq >> 62 ||
        r->ordinal >> 62 || r->kind < CHANGE || r->kind > ROOT)
        return wrong("a record whose header contradicts itself");
    if (cprd__little(d + 34, 2) != r->fd_count) return wrong("a record without its descriptors");
    r->id_count = r->kind >= ATTACH ? r->fd_count : 0;
    size_t parts = r->kind == ROOT ? 4 : 0, fixed = parts + 4 * r->id_count + 13 * r->count;
    if ((size_t)(end - at) < fixed) return wrong("a record that ends too early");
    r->part = parts ? (unsigned)cprd__little(at, 2) : 1;
    r->parts = parts ? (unsigned)cprd__little(at + 2, 2) : 1;
    r->ids = at + parts;
    if (r->part < 1 || r->part > r->parts) return wrong("a part of no whole");
    for (size_t n = 0; n < r->id_count; n++)
        if (cprd__little(r->ids + 4 * n, 4) >> 31) return wrong("a segment beyond all numbers");
    if (!r->count) return at + fixed == end ? CPRD_OK : wrong("something behind a record");
    if (!(r->entries = calloc(r->count, sizeof *r->entries))) return cprd__no_memory();
    const unsigned char *ops = r->ids + 4 * r->id_count, *births = ops + r->count;
    const unsigned char *ids = births + 8 * r->count, *sizes = ids + 4 * r->count, *values = sizes;
    size_t carried = 0;
    for (size_t n = 0; n < r->count; n++) {
        r->entries[n].fd = -1; /* whatever comes: who frees the record closes what entries have */
        values += ops[n] == RAW || ops[n] == PACKED ? 4 : 0;
    }
    if (values > end) return wrong("a record that ends too early");
    for (size_t n = 0; n < r->count; n++) {
        struct entry *e = &r->entries[n];
        *e = (struct entry){.op = ops[n], .fd = -1, .own = r->own};
        e->birth = cprd__little(births + 8 * n, 8);
        e->key.space = ops[n] < sizeof spaces ? spaces[ops[n]] : -1;
        e->key.id = (int32_t)cprd__little(ids + 4 * n, 4);
        if (e->key.space < 0 || e->birth >> 62 || (e->key.space != CPRD__FD && e->key.id) ||
            (e->op < DELETE && r->kind >= ATTACH))
            return wrong("an entry that cannot be");
        if (carries(e->op) && carried++ < r->fd_count) e->fd = r->fds[carried - 1];
        if (e->op != RAW && e->op != PACKED) continue;
        e->size = cprd__little(sizes, 4);
        e->value = values;
        sizes += 4;
        if ((size_t)(end - values) < e->size) return wrong("a record that ends too early");
        values += e->size;
    }
    if (carried != r->fd_count - r->id_count) return wrong("other descriptors than entries");
    for (size_t n = 0; n < r->count; n++) {
        struct cprd__key *key = &r->entries[n].key;
        const unsigned char *nul = memchr(values, 0, (size_t)(end - values));
        key->name = (char *)(uintptr_t)values;
        key->length = (size_t)((nul ? nul : end) - values);
        if (!nul != (n + 1 == r->count) || cprd__check_name(key->space, key->name, key->length))
            return wrong("a name that no key can have");
        values += key->length + 1;
    }
    return CPRD_OK;
}

static void records_free(struct records *r) {
    for (size_t n = 0; n < r->count; n++) {
        struct record *one = &r->at[n];
        cprd__close_all(one->fds, one->fd_count);
        for (size_t at = 0; one->entries && at < one->count && one->fd_count == one->id_count; at++)
            if (one->entries[at].fd >= 0) close(one->entries[at].fd);
        free(one->entries);
        free(one->data);
    }
    free(r->at);
    *r = (struct records){NULL, 0};
}

/* The next record of a queue. */
static int peek_record(struct segment *s, size_t *total) {
    struct record *more = realloc(s->queue.at, (s->queue.count + 1) * sizeof *more);
    if (!more) return cprd__no_memory();
    s->queue.at = more;
    struct record *r = &more[s->queue.count];
    *r = (struct record){.data = malloc(MOST + 1)};
    if (!r->data) return cprd__no_memory();
    s->queue.count++;
    int flags = MSG_PEEK;
    long got = cprd__receive(s->rx, r->data, MOST + 1, r->fds, &r->fd_count, &flags);
    if (got <= 0 || flags & MSG_TRUNC || s->queue.count > MOST_RECORDS)
        return wrong("a queue that is not in order");
    if (flags & MSG_CTRUNC) return cprd__no_room("for a live hold (what is held stays held)");
    r->size = (size_t)got;
    *total += r->size;
    unsigned char *less = realloc(r->data, r->size);
    r->data = less ? less : r->data;
    int rc = decode(r);
    if (rc) return rc;
    r->fd_count = r->id_count; /* the others are the entries' */
    if (r > more && (r->ordinal != r[-1].ordinal + 1 || r->seq <= r[-1].seq ||
                     r->hold != r[-1].hold))
        return wrong("a record missing");
    return CPRD_OK;
}

/* All records of a queue, with copies of their descriptors; consumes nothing. `reading`: a stopped
 * owner may go on, and drain what is void: then tries again. */
static int peek(struct segment *s, int reading) {
    int off = 0, rc = CPRD_DAMAGED, before = -1, same = 3;
    cprd__point(reading ? "live:read" : "live:peek");
    for (int tries = reading ? 200 : 1; rc == CPRD_DAMAGED && tries && same; tries--) {
        int waiting = cprd__waiting(s->rx);
        size_t total = 0;
        same = waiting == before ? same - 1 : 3;
        before = waiting;
        setsockopt(s->rx, SOL_SOCKET, SO_PEEK_OFF, &off, sizeof off);
        for (rc = CPRD_OK; !rc && (int)total < waiting;) rc = peek_record(s, &total);
        if (!rc && ((int)total != waiting || cprd__waiting(s->rx) != waiting))
            rc = wrong("a queue that changes");
        if (rc) records_free(&s->queue);
        if (rc == CPRD_DAMAGED && reading) poll(NULL, 0, 1);
    }
    off = -1;
    setsockopt(s->rx, SOL_SOCKET, SO_PEEK_OFF, &off, sizeof off);
    if (!reading) cprd__point("live:peeked");
    return rc;
}

/* -- a hold, read ------------------------------------------------------------------------------ */

/* Let nobody append to a queue. *parked: how many descriptors lie there. */
static int shut(int rx, size_t *parked) {
    int domain = 0, type = 0;
    socklen_t size = sizeof domain;
    long count;
    if (getsockopt(rx, SOL_SOCKET, SO_DOMAIN, &domain, &size) || domain != AF_UNIX ||
        getsockopt(rx, SOL_SOCKET, SO_TYPE, &type, &size) || type != SOCK_SEQPACKET)
        return wrong("a part that is no queue");
    shutdown(rx, SHUT_RD);
    cprd__fdinfo(rx, "scm_fds:", &count);
    *parked += (size_t)count;
    return CPRD_OK;
}

/* What a record says of a key: the highest seq counts. */
static int offer(cprd_live *l, struct segment *s, struct entry *e, uint64_t seq) {
    struct kept *k = know(l, &e->key);
    if (!k) return cprd__last.code;
    if (k->found && k->seq >= seq) {
        if (e->op < DELETE && (k->segment != s || carries(e->op))) s->dirty = 1;
        return CPRD_OK;
    }
    mark_void(k, s);
    leave(k);
    k->op = e->op;
    k->birth = e->birth;
    k->seq = seq;
    k->found = e;
    enter(e->op < DELETE ? s : &l->ended, k);
    return CPRD_OK;
}

static int by_id(const void *one, const void *other) {
    const struct segment *a = *(struct segment *const *)one, *b = *(struct segment *const *)other;
    return (a->id > b->id) - (a->id < b->id);
}

/* The segments that count: those of the last complete ROOT, and of each ATTACH since. */
static int read_root(cprd_live *l, struct segment *root) {
    size_t start = 0, end = 0, first = 0;
    unsigned part = 0;
    int rc = peek(root, 1);
    for (size_t n = 0; n < root->queue.count && !rc; n++) {
        const struct record *r = &root->queue.at[n];
        if (r->kind < ATTACH) rc = wrong("a record of a segment in its root");
        l->hold = r->hold;
        l->seq = r->seq;
        if (r->kind != ROOT) continue;
        if (r->part == 1) first = n;
        part = r->part == 1 || (part && r->part == part + 1) ? r->part : 0;
        if (!part || part != r->parts) continue;
        start = first;
        end = n + 1;
        part = 0;
    }
    for (size_t n = start; n < root->queue.count && !rc; n++) {
        struct record *r = &root->queue.at[n];
        if ((r->kind == ROOT) != (n < end)) continue;
        struct segment **more = realloc(l->segments, (l->count + r->id_count + 1) * sizeof *more);
        if (!more) return cprd__no_memory();
        l->segments = more;
        for (size_t at = 0; at < r->id_count; at++) {
            struct segment *s = calloc(1, sizeof *s);
            if (!s) return cprd__no_memory();
            *s = (struct segment){.tx = -1, .rx = r->fds[at]};
            s->id = (uint32_t)cprd__little(r->ids + 4 * at, 4);
            s->cookies[1] = cprd__cookie(s->rx);
            r->fds[at] = -1;
            more[l->count++] = s;
        }
        for (size_t at = 0; at < r->count && !rc; at++)
            rc = offer(l, NULL, &r->entries[at], r->seq);
    }
    if (l->count) qsort(l->segments, l->count, sizeof *l->segments, by_id);
    for (size_t n = 1; n < l->count && !rc; n++)
        if (l->segments[n]->id == l->segments[n - 1]->id) rc = wrong("a segment twice");
    if (!rc && l->count) l->next_id = l->segments[l->count - 1]->id;
    return !rc && l->count > MOST_SEGMENTS ? wrong("too many segments") : rc;
}

static int read_segment(cprd_live *l, struct segment *s) {
    size_t first = 0;
    int rc = peek(s, 1);
    for (size_t n = 0; n < s->queue.count && !rc; n++) {
        struct record *r = &s->queue.at[n];
        if (r->kind == SNAPSHOT) first = n; /* voids what is before it, deletions excepted */
        if (r->kind > SNAPSHOT || r->hold != l->hold) rc = wrong("a record of another queue");
    }
    for (size_t n = 0; n < s->queue.count && !rc; n++) {
        struct record *r = &s->queue.at[n];
        if (r->seq > l->seq) l->seq = r->seq;
        s->own = r->own;
        s->records++;
        s->spent += cost(r->size);
        for (size_t at = 0; at < r->count && !rc; at++) {
            struct entry *e = &r->entries[at];
            if (n >= first || e->op >= DELETE) rc = offer(l, s, e, r->seq);
            else if (carries(e->op)) s->dirty = 1;
        }
    }
    return rc;
}

static int by_birth(const void *one, const void *other) {
    const struct kept *a = *(struct kept *const *)one, *b = *(struct kept *const *)other;
    if (a->birth != b->birth) return a->birth > b->birth ? 1 : -1;
    return (a->seq > b->seq) - (a->seq < b->seq);
}

/* Put a key that counts into the state; or its memory aside, unless `as_state`. */
static int found(cprd_live *l, struct kept *k, int as_state) {
    struct entry *e = k->found;
    struct stat there;
    struct cprd__key key = k->key;
    char name[300];
    int seals = k->op == MAPPED ? fcntl(e->fd, F_GET_SEALS) : 0, rc = CPRD_OK;
    if (k->birth > l->birth) l->birth = k->birth;
    l->kept++;
    if (k->op == MAPPED && (seals < 0 || !(seals & F_SEAL_SHRINK) || !(seals & F_SEAL_GROW) ||
                            fstat(e->fd, &there) || !there.st_size))
        return wrong("memory that is no memfd of a fixed size");
    if (key.space == CPRD__SECTION && e->fd >= 0 && !cprd__is_sealed(e->fd))
        return wrong("a section that is not sealed");
    if (k->op == MAPPED && as_state) {
        key.space = CPRD__SECTION;
        key.length = (size_t)snprintf(name, sizeof name, "memory.%s", k->key.name);
        key.name = name;
    }
    if (k->op == MAPPED && !as_state) k->fd = e->fd;
    else rc = cprd__add(l->state, &key, e->fd, 1, e->value, e->size,
                        k->op == PACKED || k->op == PACKED_MEMFD);
    if (!rc) e->fd = -1;
    return rc; /* INVALID_INPUT: memory whose name as a section is taken, or too long; no damage */
}

/* All that is kept in a root whose owner has ended, into an empty hold. */
static int read_hold(cprd_live *l, int root, int as_state) {
    struct segment top = {.rx = root, .tx = -1};
    struct kept **all = NULL;
    size_t parked = 64, count = 0;
    int rc = shut(root, &parked);
    if (!rc) rc = cprd__room_for(parked);
    if (!rc) rc = read_root(l, &top);
    parked = 64 + l->count;
    for (size_t n = 0; !rc && n < l->count; n++) /* all are shut before the first is read */
        rc = shut(l->segments[n]->rx, &parked);
    if (!rc) rc = cprd__room_for(parked);
    for (size_t n = 0; !rc && n < l->count; n++) rc = read_segment(l, l->segments[n]);
    if (!rc && (!(all = calloc(l->table.used + 1, sizeof *all)) || !(l->state = cprd_state_new())))
        rc = cprd__no_memory();
    for (size_t n = 0; !rc && n < l->table.size; n++)
        for (struct cprd__key *k = l->table.slots[n]; k; k = k->chain)
            if (((struct kept *)k)->op < DELETE) all[count++] = (struct kept *)k;
    if (count) qsort(all, count, sizeof *all, by_birth);
    for (size_t n = 0; n < count && !rc; n++) rc = found(l, all[n], as_state);
    for (size_t n = 0; n < count; n++) all[n]->found = NULL;
    for (struct kept *k = l->ended.keys; k; k = k->sibling) k->found = NULL;
    for (size_t n = 0; n < l->count; n++) records_free(&l->segments[n]->queue);
    records_free(&top.queue);
    free(all);
    return rc;
}

static void live_free(cprd_live *l) {
    if (!l) return;
    forget_all(l);
    for (size_t n = 0; n < l->count; n++) segment_free(l->segments[n]);
    if (l->root.tx >= 0) close(l->root.tx);
    if (l->root.rx >= 0) close(l->root.rx);
    if (l->bundle >= 0) close(l->bundle);
    for (struct map *m = l->maps, *next; m; m = next) {
        next = m->next;
        if (l->owner == getpid()) munmap(m->at, m->size);
        free(m);
    }
    cprd_state_free(l->state);
    free(l->table.slots);
    free(l->segments);
    free(l);
}

/* Owns `tx` and `rx`, also on failure. */
static cprd_live *live_new(int tx, int rx, uint64_t hold) {
    int size = 1 << 20;
    cprd_live *l = calloc(1, sizeof *l);
    if (!l) {
        cprd__no_memory();
        close(tx);
        close(rx);
        return NULL;
    }
    *l = (cprd_live){.hold = hold, .owner = getpid(), .bundle = -1};
    l->root = (struct segment){.tx = tx, .rx = rx};
    l->root.cookies[0] = cprd__cookie(tx);
    l->root.cookies[1] = cprd__cookie(rx);
    setsockopt(tx, SOL_SOCKET, SO_SNDBUF, &size, sizeof size);
    if (!cprd__grow(&l->table)) return l;
    live_free(l);
    return NULL;
}

int cprd_live_begin(int tx, int rx, uint64_t hold, cprd_live **out) {
    *out = live_new(tx, rx, hold);
    return *out ? CPRD_OK : cprd__last.code;
}

int cprd_live_take(int root, int tx, int rx, uint64_t hold, cprd_live **out) {
    cprd_live *l = *out = live_new(tx, rx, hold);
    int rc = l ? read_hold(l, root, 0) : cprd__last.code;
    if (!rc) rc = write_root(l, 0);
    if (!rc) return CPRD_OK;
    live_free(l);
    *out = NULL;
    return rc;
}

int cprd_live_read(int root, cprd_state **out) {
    cprd_live *l = live_new(-1, -1, 0);
    int rc = l ? read_hold(l, root, 1) : cprd__last.code;
    if (!rc) *out = l->state;
    if (!rc) l->state = NULL;
    live_free(l);
    return rc;
}

/* -- with cprd --------------------------------------------------------------------------------- */

/* The header of a bundle whose only descriptor is the root of a live hold. */
static const unsigned char HEAD[CPRD__HEADER] = "CPRB\2\0\3\1\1\0\0\0\1";

static struct cprd__packed root_of(cprd_live *l) {
    struct cprd__packed p = {.fds = &l->root.rx, .parked = 1, .depth = 1};
    memcpy(p.header, HEAD, sizeof HEAD);
    return p;
}

/* The root that lies in the bundle of a live hold: the caller's. */
static int peek_root(int bundle, int *root) {
    unsigned char h[CPRD__HEADER + 1];
    int fds[CPRD__SCM_MAX], flags = MSG_PEEK, off = -1;
    size_t count;
    setsockopt(bundle, SOL_SOCKET, SO_PEEK_OFF, &off, sizeof off);
    long got = cprd__receive(bundle, h, sizeof h, fds, &count, &flags);
    *root = got > 0 && count ? fds[0] : -1;
    if (got == CPRD__HEADER && !memcmp(h, HEAD, sizeof HEAD) && count == 1) return CPRD_OK;
    *root = -1;
    cprd__close_all(fds, got > 0 ? count : 0);
    if (got > 0 && flags & MSG_CTRUNC) return cprd__no_room("to read a live hold with");
    return cprd__fail(CPRD_DAMAGED, "not the bundle of a live hold");
}

int cprd__unpack_live(int bundle, cprd_state **out) {
    int root, rc = peek_root(bundle, &root);
    if (rc) return rc;
    rc = cprd_live_read(root, out);
    close(root);
    return rc;
}

/* What was held, into the new root, which nobody knows yet. */
static int take_in(cprd_live *l, int is_live) {
    int root = -1, rc = is_live ? peek_root(l->bundle, &root) : cprd_unpack(l->bundle, &l->state);
    if (!rc && is_live) rc = read_hold(l, root, 0);
    if (!rc && is_live) rc = write_root(l, 0);
    if (root >= 0) close(root);
    cprd_state *s = l->state;
    l->state = NULL; /* so that no change takes from it */
    const struct cprd_item *item;
    for (size_t n = 0; !rc && !is_live && (item = cprd_item_at(s, n)); n++) {
        struct cprd_live_change one = {item->is_section ? CPRD_SAVE_SECTION : CPRD_SAVE_FD,
                                       item->name, item->id, item->fd, item->data, item->size,
                                       item->packed};
        rc = change(l, &one, 1, -1);
    }
    l->state = s;
    return rc;
}

int cprd_live_open(cprd *c, const char *name, const struct cprd_load_options *options,
                   cprd_live **out) {
    struct cprd__answer a;
    uint64_t hold;
    int tx, rx;
    *out = NULL;
    if (getrandom(&hold, sizeof hold, 0) != sizeof hold || cprd__pair(&tx, &rx))
        return cprd__no_room("for the root of a live hold");
    cprd_live *l = live_new(tx, rx, hold | 1);
    if (!l) return cprd__last.code;
    struct cprd__packed root = root_of(l);
    cprd__point("live:before");
    int rc = cprd__claim(&l->ticket, c, "live", name, options, &root, &a);
    if (!rc) {
        cprd__point("live:answered");
        l->connects = cprd__connects(l->ticket.c);
        l->found = a.found != 0;
        l->known = !l->found;
        l->bundle = a.fd;
        if (l->found) rc = a.fd < 0 ? cprd__no_fd(&a) : take_in(l, a.live != 0);
        if (rc) cprd__give_back(&l->ticket, rc);
        l->unconfirmed = l->found;
    }
    if (rc) cprd_live_close(l);
    else *out = l;
    return rc;
}

int cprd_live_found(const cprd_live *l) { return l->ticket.c ? l->found : l->state != NULL; }
cprd_state *cprd_live_state(cprd_live *l) { return l->state; }
int cprd_live_socket(const cprd_live *l) { return l->ticket.c ? cprd_socket(l->ticket.c) : -1; }

/* cprd has our root, by this answer. */
static void is_known(cprd_live *l, const struct cprd__answer *a) {
    if (a->fd >= 0) close(a->fd);
    cprd__set(&l->ticket, a);
    l->known = 1;
    l->connects = cprd__connects(l->ticket.c);
}

int cprd_live_confirm(cprd_live *l) {
    struct cprd__answer a;
    if (!l->ticket.c || l->known) return CPRD_OK;
    if (l->over)
        return cprd__fail(CPRD_FENCED, "'%s' is not this process's any more", l->ticket.name);
    struct cprd__packed root = root_of(l);
    struct cprd__call call = cprd__call_of(&l->ticket, "confirm_next", l->ticket.nonces[0]);
    cprd__fields(&call, "fds U parked u depth u live f", (uint64_t)0, (uint64_t)1, (uint64_t)1, 1);
    call.packed = &root;
    cprd__point("confirm:before");
    int rc = cprd__request(l->ticket.c, &call, &a);
    if (rc == CPRD_FENCED) l->over = CPRD_FENCED;
    if (rc) return rc;
    is_known(l, &a);
    l->unconfirmed = 0;
    close(l->bundle);
    l->bundle = -1;
    tidy(l); /* at a limit the next change does it */
    cprd__point("confirm:answered");
    return CPRD_OK;
}

int cprd_live_check(cprd_live *l) {
    struct cprd__answer a;
    if (!l->ticket.c || !l->known || l->ticket.stored || l->ticket.over) return CPRD_OK;
    if (guard(l)) return cprd__last.code;
    if (cprd__connects(l->ticket.c) == l->connects) return CPRD_OK;
    struct cprd__packed root = root_of(l);
    struct cprd__call call = cprd__call_of(&l->ticket, "put_back", NULL);
    call.packed = &root;
    cprd__point("put_back:before");
    int rc = cprd__request(l->ticket.c, &call, &a);
    if (rc == CPRD_FENCED || rc == CPRD_DENIED || rc == CPRD_NOT_HELD)
        return fenced(l, cprd__last.text);
    if (rc) return rc;
    is_known(l, &a);
    cprd__point("put_back:answered");
    return CPRD_OK;
}

/* The owner owns no more. */
static int say_end(cprd_live *l, int keep) {
    struct cprd__answer a;
    struct cprd__call call = cprd__call_of(&l->ticket, "end", l->ticket.nonces[1]);
    cprd__fields(&call, "keep f", keep);
    int rc = cprd__request(l->ticket.c, &call, &a);
    if (!rc) l->ticket.over = 1;
    return rc;
}

int cprd_live_end(cprd_live *l) {
    int rc = cprd_live_clear(l);
    if (!rc && l->ticket.c) rc = say_end(l, 0);
    if (!rc) l->over = CPRD_NOT_HELD;
    return rc;
}

void cprd_live_close(cprd_live *l) {
    struct cprd_error before = cprd__last;
    if (!l) return;
    if (l->ticket.c && l->owner == getpid() && !l->ticket.over && l->over != CPRD_FENCED) {
        struct cprd__answer a;
        int rc = l->known ? say_end(l, l->kept > 0)
                          : cprd__end(&l->ticket, "reject", "closed without confirm", CPRD_OK, &a);
        l->known = 1;
        l->unconfirmed = 0;
        if (rc == CPRD_FENCED && l->kept && !cprd_live_check(l)) say_end(l, 1); /* cprd is new */
    }
    cprd__close(&l->ticket);
    live_free(l);
    cprd__last = before;
}
