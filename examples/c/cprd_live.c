/* The owner of a live hold. cprd.h says how to use it, docs/bundle.md has the records.
 *
 * Keys lie in segments: queues that the root names. A change is one record: a CHANGE in a segment
 * that has room; or an ATTACH in the root, with fresh segments and all that ends. So deletions lie
 * in the root alone. What a change made void still lies in a segment, which is `dirty`: what counts
 * there is written to another one, then the segment is drained as a whole. Until no segment is
 * dirty, keys that have ended stay in the table, and each rewritten root says so again. */
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

#ifndef CPRD_SMALL
#define CPRD_SMALL 0 /* 1, for tests: a few changes reach every step */
#endif
enum { CHANGE = 1, SNAPSHOT, ATTACH, ROOT }; /* kinds of records */
enum { SAVE = 1, RAW, PACKED, RAW_MEMFD, PACKED_MEMFD, MAPPED, DELETE = 8, SEGMENT = 11 }; /* ops */
enum {
    SAVE_MEMORY = CPRD_DELETE_MEMORY + 1, /* a change that cprd_live_memory makes */
    OURS = 0x4350524c,                   /* SO_RCVLOWAT of our queues, which no hold keeps */
    HEADER = 40,                         /* bytes of a record's */
    MOST = 64 * 1024,                    /* bytes of a record */
    MOST_RECORDS = 1024,                 /* of a queue */
    MOST_SEGMENTS = 131072,
    MOST_OWN = 512,                      /* files and memfds: each has a segment of its own */
    INLINE = 4096,                       /* bytes of a section; a larger one gets a memfd */
    GROUP = 12 * 1024,                   /* bytes of values that go to a segment at once */
    KEYS = CPRD_SMALL ? 2 : 16,          /* of a segment */
    RECORDS = CPRD_SMALL ? 3 : 16,       /* of a segment, before they become one */
    ROOT_RECORDS = CPRD_SMALL ? 3 : 200, /* then the root is rewritten, ... */
    PART = CPRD_SMALL ? 2 : 200          /* ... so many segments and ended keys in a record */
};

struct segment { /* or the root */
    int tx, rx;                  /* tx -1: a predecessor's, which is only drained */
    int id, is_root, dirty, leaves;
    int own;                     /* copies of what lies here must not be closed in this process */
    uint64_t seq, ordinal;       /* of the last record; of the next */
    size_t records, count;       /* in the queue; keys that count here */
    struct entry *queue;         /* what was peeked: of all records, in order; ... */
    unsigned char *data;         /* ... their bytes, ... */
    size_t entries, first, part; /* ... and where the last ROOT begins, up to which part */
};

struct entry { /* of a record; or what the table has of a key */
    struct cprd__key key;
    struct entry *k;         /* of the key, in the table */
    struct entry *next;      /* in the table */
    struct segment *segment; /* where it lies; NULL: the root */
    int op, fd, own, counts; /* SEGMENT: one that a record of the root names, by key.id */
    uint64_t birth, seq, change; /* the number of the last change: a key is in it once */
    struct iovec value, map;
};

struct cprd_live {
    struct cprd__key *table; /* the top of all keys */
    struct entry *known;     /* the first of all */
    struct segment root, **segments;
    struct iovec *maps;
    size_t count, used, kept, map_count, most_own; /* of segments, of keys, ... */
    uint64_t hold, seq, birth, changes, connects; /* of the connection by which cprd has the root */
    int last_id, untidy, over; /* CPRD_FENCED; CPRD_NOT_HELD: ended; CPRD_BUSY: not confirmed */
    pid_t owner;
    cprd_state *state;          /* that was found */
    cprd_claim ticket; /* c NULL: without cprd */
    struct cprd__packed packed; /* the root, for cprd */
};

static const unsigned char HEAD[CPRD__HEADER] = "CPRB\2\0\3\1\1\0\0\0\1"; /* of a bundle */

static const signed char SPACES[] = {-1, 0, 1, 1, 1, 1, 2, -1, 0, 1, 2, 3}; /* of ops */

static int has_value(int op) { return op == RAW || op == PACKED; }
static int carries(int op) { return op < DELETE && !has_value(op); }

static int wrong(const char *what) {
    return cprd__fail(CPRD_DAMAGED, "a live hold with %s", what);
}

static int too_large(void) {
    return cprd__fail(CPRD_LIMIT_EXCEEDED, "one change has %d bytes of keys, and %d segments, at"
                      " most: make several of it; nothing was changed", MOST, CPRD__SCM_MAX);
}

static int fenced(cprd_live *l, const char *why) {
    l->over = CPRD_FENCED;
    return cprd__fail(CPRD_FENCED, "this live hold is not this process's any more (%s): it was"
                      " dropped by force (cprctl drop --force), and no change counts from now on",
                      why);
}

/* -- what lies where --------------------------------------------------------------------------- */

static struct entry *known(cprd_live *l, const struct cprd__key *key) {
    return (struct entry *)*cprd__slot(&l->table, key);
}

static void remember(cprd_live *l, struct entry *k) {
    memset(k->key.below, 0, sizeof k->key.below);
    *cprd__slot(&l->table, &k->key) = &k->key;
    k->next = l->known;
    l->known = k;
    l->used++;
}

/* What the table has of a key; of one that is new, that it has ended. NULL: no memory. */
static struct entry *know(cprd_live *l, const struct cprd__key *key) {
    struct entry *k = known(l, key);
    if (k) return k;
    k = calloc(1, sizeof *k + key->length + 1);
    if (!k) cprd__no_memory();
    if (!k) return NULL;
    *k = (struct entry){.key = *key, .op = DELETE + key->space};
    k->key.name = memcpy(k + 1, key->name, key->length);
    remember(l, k);
    return k;
}

/* Forget the keys that have ended, or all. */
static void forget(cprd_live *l, int all) {
    struct entry *k = l->known, *next;
    l->table = NULL;
    l->known = NULL;
    l->used = 0;
    for (; k; k = next) {
        next = k->next;
        if (all || k->op >= DELETE) free(k);
        else remember(l, k);
    }
    if (all) l->kept = 0;
}

static void make_dirty(cprd_live *l, struct segment *s) { s->dirty = l->untidy = 1; }

/* Write down what a record says of a key. */
static void put(cprd_live *l, const struct entry *e) {
    struct entry *k = e->k;
    if (k->op < DELETE) {
        l->kept--;
        k->segment->count--;
        if (k->segment != e->segment || carries(k->op)) make_dirty(l, k->segment);
    }
    k->op = e->op;
    k->birth = e->birth;
    k->seq = e->seq;
    k->segment = e->op < DELETE ? e->segment : NULL;
    k->map = (struct iovec){NULL, 0};
    if (k->op >= DELETE) return;
    l->kept++;
    k->segment->count++;
}

static void segment_free(struct segment *s) {
    cprd__close_all((int[]){s->tx, s->rx}, 2);
    free(s);
}

static void prepare(int tx, int rx) {
    int mark = OURS, size = 1 << 20;
    setsockopt(rx, SOL_SOCKET, SO_RCVLOWAT, &mark, sizeof mark);
    setsockopt(tx, SOL_SOCKET, SO_RCVLOWAT, &mark, sizeof mark);
    setsockopt(tx, SOL_SOCKET, SO_SNDBUF, &size, sizeof size);
}

/* One more, that the root does not name yet. Owns the ends; NULL: no memory. */
static struct segment *segment_add(cprd_live *l, int tx, int rx) {
    struct segment **more = realloc(l->segments, (l->count + 1) * sizeof *more);
    struct segment *s = more ? calloc(1, sizeof *s) : NULL;
    l->segments = more ? more : l->segments;
    if (!s) cprd__close_all((int[]){tx, rx}, 2);
    if (!s) cprd__no_memory();
    if (!s) return NULL;
    *s = (struct segment){.id = ++l->last_id, .tx = tx, .rx = rx};
    prepare(tx, rx);
    return l->segments[l->count++] = s;
}

/* -- records, written -------------------------------------------------------------------------- */

/* Append a record; to the root an ATTACH, or part of a ROOT: the number, and 65536 times how many.
 * FENCED, LIMIT_EXCEEDED, INVALID_INPUT: it is not there. */
static int send_record(cprd_live *l, struct segment *q, size_t part, struct entry *e,
                       size_t count) {
    struct cprd__bytes b = {0};
    int fds[CPRD__SCM_MAX];
    size_t fd_count = 0, named = 0, kind = part ? ROOT : q->is_root ? ATTACH : CHANGE;
    for (size_t n = 0; n < count; n++) {
        if (e[n].fd >= 0) fds[fd_count++] = e[n].fd;
        named += e[n].op == SEGMENT;
    }
    q->own = count ? e->own : 0;
    cprd__put(&b, "CPRL\1", 6);
    const uint64_t header[] = {kind | (size_t)q->own << 8, l->hold, l->seq + 1, q->ordinal,
                               (count - named) | fd_count << 16, 0};
    for (int n = 0; n < 6; n++) cprd__put_little(&b, header[n], n ? n < 4 ? 8 : 4 : 2);
    if (part) cprd__put_little(&b, part, 4);
    for (size_t n = 0; n < named; n++) cprd__put_little(&b, (uint32_t)e[n].key.id, 4);
    for (size_t n = named; n < count; n++) cprd__put_little(&b, (uint64_t)e[n].op, 1);
    for (size_t n = named; n < count; n++) cprd__put_little(&b, e[n].birth, 8);
    for (size_t n = named; n < count; n++) cprd__put_little(&b, (uint32_t)e[n].key.id, 4);
    for (size_t n = named; n < count; n++)
        if (has_value(e[n].op)) cprd__put_little(&b, e[n].value.iov_len, 4);
    for (size_t n = named; n < count; n++) cprd__put(&b, e[n].value.iov_base, e[n].value.iov_len);
    for (size_t n = named; n < count; n++) /* with the NUL, but for the last */
        cprd__put(&b, e[n].key.name, e[n].key.length + (n + 1 < count));
    int error = b.failed ? ENOMEM : b.size > MOST ? EMSGSIZE : 0;
    for (int n = 0; !error && n < 4; n++) b.at[36 + n] = (unsigned char)(b.size >> 8 * n);
    if (!error) error = cprd__send(q->tx, b.at, b.size, fds, fd_count);
    free(b.at);
    if (error == EPIPE || error == EPERM || error == ECONNRESET || error == ENOTCONN)
        return fenced(l, strerror(error));
    if (error == EMSGSIZE) return too_large();
    if (error) return cprd__explain(error);
    cprd__point("live:sent");
    q->seq = ++l->seq;
    q->ordinal++;
    l->untidy |= ++q->records >= RECORDS;
    for (size_t n = 0; n < count; n++) {
        e[n].seq = q->seq;
        e[n].segment = q->is_root ? NULL : q;
    }
    return CPRD_OK;
}

/* Let go of the oldest records of a queue. */
static int drain(cprd_live *l, struct segment *q, size_t count) {
    for (char byte; count; count--, q->records--)
        if (recv(q->rx, &byte, 1, MSG_DONTWAIT) <= 0) return fenced(l, "its queue was changed");
    cprd__point("live:drained");
    return CPRD_OK;
}

/* Void all records of the root by new ones, that name all segments but those of no use; or, with
 * `nothing`, none. */
static int write_root(cprd_live *l, int nothing) {
    size_t before = l->root.records, count = 0, stay = 0, ended = l->used - l->kept;
    struct entry *e = calloc(l->count + ended + 1, sizeof *e);
    int rc = e ? CPRD_OK : cprd__no_memory();
    for (size_t n = 0; n < l->count && !rc; n++) {
        struct segment *s = l->segments[n];
        s->leaves = nothing || !(s->count || s->dirty);
        if (!s->leaves) e[count++] = (struct entry){.op = SEGMENT, .key.id = s->id, .fd = s->rx};
    }
    for (const struct entry *k = l->known; k && ended && !rc; k = k->next)
        if (k->op >= DELETE && k->key.space <= CPRD__MEMORY) {
            e[count] = *k;
            e[count++].fd = -1;
        }
    size_t parts = count ? (count + PART - 1) / PART : 1;
    for (size_t part = 1, at = 0; part <= parts && !rc; part++, at += PART)
        rc = send_record(l, &l->root, part | parts << 16, e + at,
                         count - at < PART ? count - at : PART);
    free(e);
    if (!rc) rc = drain(l, &l->root, before);
    if (rc) return rc;
    for (size_t n = 0; n < l->count; n++) {
        struct segment *s = l->segments[n];
        if (!s->leaves) l->segments[stay++] = s;
        else {
            rc = rc ? rc : drain(l, s, s->records); /* for a forked child may have an end */
            segment_free(s);
        }
    }
    l->count = stay;
    return rc;
}

/* -- records, read ----------------------------------------------------------------------------- */

/* One more record of a queue. Whoever wrote it may be hostile: lengths come before contents. */
static int decode(cprd_live *l, struct segment *s, const unsigned char *d, size_t size,
                  const int *fds, size_t fd_count) {
    if (size < HEADER || memcmp(d, "CPRL", 4)) return wrong("no header of a record");
    if (cprd__little(d + 4, 2) != 1)
        return cprd__fail(CPRD_BUSY, "a live hold of version %d; this program reads version 1:"
                          " upgrade it", (int)cprd__little(d + 4, 2));
    int kind = d[6], own = d[7], bad = 0;
    uint64_t hold = cprd__little(d + 8, 8), seq = cprd__little(d + 16, 8);
    uint64_t ordinal = cprd__little(d + 24, 8);
    size_t named = kind >= ATTACH ? fd_count : 0, carried = named;
    size_t count = cprd__little(d + 32, 2), body = HEADER + (kind == ROOT ? 4 : 0) + 4 * named;
    if (cprd__little(d + 36, 4) != size || size > MOST || own > 1 || (seq | ordinal) >> 62 ||
        kind < CHANGE || kind > ROOT || cprd__little(d + 34, 2) != fd_count ||
        size < body + 13 * count)
        return wrong("a record whose header contradicts itself");
    const unsigned char *end = d + size, *ops = d + body, *sizes = ops + 13 * count, *at = sizes;
    size_t part = kind == ROOT ? cprd__little(d + HEADER, 2) : 1;
    size_t parts = kind == ROOT ? cprd__little(d + HEADER + 2, 2) : 1;
    if (s->is_root && !s->records) l->hold = hold;
    if ((kind >= ATTACH) != s->is_root || hold != l->hold || !part || part > parts ||
        (s->records && (ordinal != s->ordinal || seq <= s->seq)))
        return wrong("a record of another queue, or without the one before");
    size_t room = (s->entries + named + count) / 32 * 32 + 32; /* seldom another one */
    struct entry *e = realloc(s->queue, room * sizeof *e);
    if (!e) return cprd__no_memory();
    s->queue = e;
    e += s->entries;
    for (size_t n = 0; n < named + count; n++) {
        e[n] = (struct entry){.key.name = "", .key.space = SPACES[SEGMENT], .op = SEGMENT};
        e[n].fd = n < named ? fds[n] : -1;
        e[n].key.id = n < named ? (int32_t)cprd__little(ops - 4 * (named - n), 4) : 0;
        e[n].own = own;
        e[n].seq = seq;
        e[n].counts = kind != ROOT;
        bad |= e[n].key.id < 0;
    }
    e += named;
    for (size_t n = 0; n < count; n++) {
        e[n].op = ops[n];
        e[n].birth = cprd__little(ops + count + 8 * n, 8);
        e[n].key.id = (int32_t)cprd__little(ops + 9 * count + 4 * n, 4);
        e[n].key.space = ops[n] < SEGMENT ? SPACES[ops[n]] : -1;
        bad |= e[n].key.space < 0 || e[n].birth >> 62 || (ops[n] < DELETE && s->is_root) ||
               (e[n].key.space != CPRD__FD && e[n].key.id);
        if (carries(ops[n]) && carried++ < fd_count) e[n].fd = fds[carried - 1];
        at += has_value(ops[n]) ? 4 : 0;
    }
    for (size_t n = 0; n < count && at <= end; n++) {
        if (!has_value(ops[n])) continue;
        e[n].value = (struct iovec){(void *)(uintptr_t)at, cprd__little(sizes, 4)};
        sizes += 4;
        at += (size_t)(end - at) < e[n].value.iov_len ? MOST + 1 : e[n].value.iov_len;
    }
    for (size_t n = 0; n < count && at <= end && !bad; n++) {
        const unsigned char *nul = memchr(at, 0, (size_t)(end - at)), *stop = nul ? nul : end;
        e[n].key.name = (char *)(uintptr_t)at;
        e[n].key.length = (size_t)(stop - at);
        bad = !nul != (n + 1 == count) ||
              cprd__check_name(&e[n].key);
        at = stop + (n + 1 < count);
    }
    if (bad || at != end || carried != fd_count) return wrong("a record that contradicts itself");
    for (size_t n = 0; kind == SNAPSHOT && n < s->entries; n++) /* a DELETE still counts */
        s->queue[n].counts &= s->queue[n].op >= DELETE;
    if (kind == ROOT && part == 1) s->first = s->entries;
    if (kind == ROOT) s->part = part == 1 || part == s->part + 1 ? part : 0;
    s->entries += named + count;
    if (kind == ROOT && s->part == parts) { /* is whole: so nothing else counts so far */
        for (size_t n = 0; n < s->entries; n++)
            s->queue[n].counts = n >= s->first && !s->queue[n].counts;
        s->part = 0;
    }
    s->own = own;
    s->records++;
    s->ordinal = ordinal + 1;
    s->seq = seq;
    if (seq > l->seq) l->seq = seq;
    return CPRD_OK;
}

static void let_go(struct segment *s) { /* what was peeked */
    for (size_t n = 0; n < s->entries; n++) cprd__close_all(&s->queue[n].fd, 1);
    free(s->queue);
    free(s->data);
    s->queue = NULL;
    s->data = NULL;
    s->entries = 0;
}

/* All records of a queue, with copies of their descriptors; consumes nothing. `reading`: a stopped
 * owner may go on, and drain what is void: then tries again. */
static int peek(cprd_live *l, struct segment *s, int reading) {
    int off = 0, before = -1, rc = CPRD_DAMAGED;
    for (int tries = reading ? 200 : 1; rc == CPRD_DAMAGED && tries > 0;) {
        int waiting = cprd__waiting(s->rx), total = 0;
        struct segment seen = *s;
        if (before >= 0) poll(NULL, 0, 1);
        tries -= waiting == before ? 60 : 1; /* where nobody drains */
        before = waiting;
        setsockopt(s->rx, SOL_SOCKET, SO_PEEK_OFF, &off, sizeof off);
        seen.records = seen.part = 0;
        seen.data = malloc((size_t)waiting + 1);
        rc = seen.data ? CPRD_OK : cprd__no_memory();
        while (!rc && total < waiting) {
            unsigned char *at = seen.data + total;
            int fds[CPRD__SCM_MAX], flags = MSG_PEEK;
            size_t count;
            long got = cprd__receive(s->rx, at, (size_t)(waiting + 1 - total), fds, &count, &flags);
            if (got <= 0 || flags & MSG_TRUNC || seen.records == MOST_RECORDS)
                rc = wrong("a queue that is not in order");
            else if (flags & MSG_CTRUNC) rc = cprd__no_room("for a live hold (which stays held)");
            else rc = decode(l, &seen, at, (size_t)got, fds, count);
            if (rc) cprd__close_all(fds, count);
            total += (int)got;
        }
        if (!rc && (total != waiting || cprd__waiting(s->rx) != waiting))
            rc = wrong("a queue that changes");
        if (rc) let_go(&seen);
        else *s = seen;
    }
    off = -1;
    setsockopt(s->rx, SOL_SOCKET, SO_PEEK_OFF, &off, sizeof off);
    cprd__point("live:read");
    return rc;
}

/* Whether what a record in `s` says counts still. */
static int is_current(cprd_live *l, const struct segment *s, struct entry *e) {
    struct entry *k = known(l, &e->key);
    if (!e->counts || !k || k->segment != s || k->seq != e->seq) return 0;
    e->k = k;
    e->key.name = k->key.name; /* which has a NUL */
    return 1;
}

/* -- changes ----------------------------------------------------------------------------------- */

/* How many of the first entries go to one segment. */
static size_t group(const struct entry *e, size_t count) {
    size_t n = 0, size = 0;
    while (n < count && n < KEYS && e[n].op < DELETE && e[n].own == e->own) {
        size += e[n].value.iov_len;
        if (n && (size > GROUP || e->own)) break;
        n++;
    }
    return n;
}

/* A segment with room for these, which are a group; of a single key, the one where it lies. */
static struct segment *place(const cprd_live *l, const struct entry *e, size_t count) {
    struct segment *best = NULL, *same = count == 1 ? e->k->segment : NULL;
    for (size_t n = 0; n < l->count; n++) {
        struct segment *s = l->segments[n];
        if (s->dirty || s->tx < 0 || s->records >= 2 * RECORDS) continue;
        if (s->count && (s->own || e->own)) continue;
        if (s == same) return s;
        if (s->count + count <= KEYS && (!best || s->count > best->count)) best = s;
    }
    return best;
}

/* Fresh segments for what is kept, attached by one record with all that ends. */
static int attach(cprd_live *l, struct entry *e, size_t count) {
    struct entry *all = calloc(count, sizeof *all);
    int tx, rx, rc = all ? CPRD_OK : cprd__no_memory();
    if (!rc && l->root.records >= ROOT_RECORDS) rc = write_root(l, 0);
    if (rc == CPRD_LIMIT_EXCEEDED && l->root.records < MOST_RECORDS / 2) rc = CPRD_OK;
    struct segment *s = NULL;
    size_t before = l->count, named = 0, at = 0, some;
    for (; !rc && (some = group(e + at, count - at)); at += some) {
        rc = named == CPRD__SCM_MAX ? too_large() : cprd__pair(&tx, &rx);
        if (!rc && !(s = segment_add(l, tx, rx))) rc = cprd__last.code;
        if (!rc) all[named++] = (struct entry){.op = SEGMENT, .key.id = s->id, .fd = rx};
        if (!rc) rc = send_record(l, s, 0, e + at, some);
    }
    if (!rc) memcpy(all + named, e + at, (count - at) * sizeof *all);
    if (!rc) rc = send_record(l, &l->root, 0, all, named + count - at);
    while (rc && l->count > before) segment_free(l->segments[--l->count]);
    free(all);
    return rc;
}

/* Make the changes of entries, which are sorted by order(). */
static int commit(cprd_live *l, struct entry *e, size_t count) {
    struct segment *s = group(e, count) == count ? place(l, e, count) : NULL;
    int rc = s ? send_record(l, s, 0, e, count) : attach(l, e, count);
    for (size_t n = 0; n < count && !rc; n++) put(l, &e[n]);
    return rc;
}

/* Keep elsewhere what counts in a segment, and let go of all that lies there. What this process put
 * into a segment of its own is never copied: to close a copy of a file would end the POSIX locks of
 * this process. */
static int rewrite(cprd_live *l, struct segment *s) {
    size_t count = 0;
    int rc = s->count ? peek(l, s, 0) : CPRD_OK, dirty = s->dirty;
    for (size_t n = 0; n < s->entries; n++)
        if (is_current(l, s, &s->queue[n])) {
            struct entry e = s->queue[n];
            s->queue[n] = s->queue[count];
            s->queue[count++] = e;
        }
    if (rc == CPRD_DAMAGED || (!rc && count != s->count)) rc = fenced(l, "its queue was changed");
    s->dirty = 1; /* so that nothing is written there */
    if (!rc && count) rc = commit(l, s->queue, count);
    let_go(s); /* before the drain: so no close of a copy is the last one */
    if (!rc) rc = drain(l, s, s->records);
    s->dirty = rc ? dirty : 0;
    return rc;
}

/* Let go of what is void, and make one of many records. At a limit go on with the others: what
 * needs none makes room. */
static int tidy(cprd_live *l) {
    int rc = CPRD_OK, done = l->untidy, dirty = 0;
    for (int first = 1; done && rc != CPRD_FENCED && (rc || first); first = 0) {
        done = rc = dirty = 0;
        for (size_t n = l->count; n-- && rc != CPRD_FENCED;) {
            if (n >= l->count) continue; /* the root has lost some: those before move to the left */
            struct segment *s = l->segments[n];
            if (s->dirty || (s->tx >= 0 && s->records >= RECORDS && s->count > 1)) {
                int one = rewrite(l, s);
                done |= !one;
                rc = one ? one : rc;
            }
            dirty |= s->dirty;
        }
    }
    l->untidy = rc != CPRD_OK;
    if (dirty || (rc && rc != CPRD_LIMIT_EXCEEDED)) return rc;
    if (l->used - l->kept > 16 + l->kept / 8) forget(l, 0);
    if (l->count > 64 + l->kept) write_root(l, 0); /* many of no use; at a limit another time */
    return CPRD_OK;
}

static int guard(const cprd_live *l) {
    if (l->owner != getpid())
        return cprd__fail(CPRD_INVALID_INPUT, "a live hold belongs to the process that opened it,"
                          " not to a forked child: open it after the last fork");
    if (l->over == CPRD_FENCED)
        return cprd__fail(CPRD_FENCED, "this live hold was dropped by force");
    if (!l->over) return CPRD_OK;
    return cprd__fail(CPRD_INVALID_INPUT, l->over == CPRD_BUSY
                      ? "the predecessor's hold is not confirmed yet" : "this live hold has ended");
}

/* The entry of a change: without `k` where there is nothing to do. */
static int make_entry(cprd_live *l, const struct cprd_live_change *c, struct entry *e) {
    static const int ops[] = {SAVE, SAVE, DELETE, RAW, DELETE + 1, DELETE + 2, MAPPED};
    int space = SPACES[ops[c->op]], mark = 0;
    struct stat there = {0};
    socklen_t size = sizeof mark;
    int32_t id = space == CPRD__FD ? c->id : 0;
    *e = (struct entry){.key = cprd__key(space, c->name, strlen(c->name), id)};
    e->fd = -1;
    e->op = ops[c->op];
    if (cprd__check_name(&e->key)) return cprd__last.code;
    struct entry *k = know(l, &e->key);
    if (!k) return cprd__last.code;
    int is_kept = k->op < DELETE, is_new = c->op == CPRD_SAVE_FD;
    if ((is_kept && is_new) || k->change == l->changes)
        return cprd__fail(CPRD_INVALID_INPUT, "key (%s, %d) is used already%s", c->name, c->id,
                          is_new && is_kept ? "" : " in this change");
    k->change = l->changes;
    e->k = is_kept || e->op < DELETE ? k : NULL;
    if (e->op >= DELETE) return CPRD_OK;
    e->birth = is_kept ? k->birth : ++l->birth;
    if (space == CPRD__SECTION) {
        e->op = (c->size > INLINE ? RAW_MEMFD : RAW) + (c->packed != 0);
        e->own = c->size > INLINE;
        if (e->own) return cprd__memfd(c->name, c->data, c->size, &e->fd) ? cprd__last.code : 0;
        e->value = (struct iovec){(void *)(uintptr_t)c->data, c->size};
        return CPRD_OK;
    }
    e->fd = c->fd;
    if (fstat(e->fd, &there))
        return cprd__fail(CPRD_INVALID_INPUT, "fd %d of (%s, %d) is not open", e->fd, c->name,
                          c->id);
    e->own = !S_ISSOCK(there.st_mode) && !S_ISFIFO(there.st_mode) && there.st_mode & S_IFMT;
    getsockopt(e->fd, SOL_SOCKET, SO_RCVLOWAT, &mark, &size);
    if (mark == OURS || (l->ticket.c && S_ISSOCK(there.st_mode) &&
                         cprd__cookie(e->fd) == l->ticket.c->cookie))
        return cprd__fail(CPRD_INVALID_INPUT, "fd %d is a socket of the live hold itself", e->fd);
    return CPRD_OK;
}

/* What is kept before what ends; what needs a segment of its own in between. */
static int order(const void *one, const void *other) {
    const struct entry *a = one, *b = other;
    return (a->op >= DELETE) * 2 + a->own - (b->op >= DELETE) * 2 - b->own;
}

int cprd_live_change(cprd_live *l, const struct cprd_live_change *c, size_t count) {
    size_t made = 0, own = 0, leave = 0;
    int rc = guard(l);
    struct entry *e = rc ? NULL : calloc(count + 1, sizeof *e);
    if (!e) return rc ? rc : cprd__no_memory();
    l->changes++;
    for (size_t n = 0; n < count && !rc; n++) {
        if ((rc = make_entry(l, &c[n], &e[made])) || !e[made].k) continue;
        leave += e[made].k->op < DELETE && e[made].k->segment->own;
        own += (size_t)e[made++].own;
    }
    for (size_t n = 0; n < l->count && own > leave; n++)
        own += l->segments[n]->own && l->segments[n]->count;
    if (!rc && own > leave && own - leave > l->most_own)
        rc = cprd__fail(CPRD_LIMIT_EXCEEDED, "more than %d files, memfds, devices and sections"
                        " above %d bytes; nothing was changed", MOST_OWN, INLINE);
    if (made) qsort(e, made, sizeof *e, order);
    if (!rc && made) rc = commit(l, e, made);
    for (size_t n = 0; n < made; n++) {
        if (e[n].key.space == CPRD__SECTION) cprd__close_all(&e[n].fd, 1);
        if (rc || !l->state || e[n].key.space != CPRD__FD) continue;
        int fd = cprd_take_fd(l->state, e[n].key.name, e[n].key.id); /* would keep the file open */
        cprd__close_all(&fd, 1);
    }
    free(e);
    if (rc || !(rc = tidy(l)) || rc != CPRD_LIMIT_EXCEEDED) return rc;
    return cprd__fail(rc, "the change counts, but the kernel still holds what it ended (the next"
                      " change tries again): %s", cprd__last.text);
}

/* -- memory ------------------------------------------------------------------------------------ */

/* Map memory until the hold is closed. */
static int map(cprd_live *l, int fd, size_t size) {
    struct iovec *more = realloc(l->maps, (l->map_count + 1) * sizeof *more);
    if (!more) return cprd__no_memory();
    l->maps = more;
    void *at = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (at == MAP_FAILED)
        return cprd__fail(CPRD_LIMIT_EXCEEDED, "cannot map memory: %s", strerror(errno));
    madvise(at, size, MADV_DONTFORK);
    l->maps[l->map_count++] = (struct iovec){at, size};
    return CPRD_OK;
}

/* New memory, which is kept and mapped. */
static int make_memory(cprd_live *l, const char *name, size_t size) {
    int fd = memfd_create("cprd.memory", MFD_CLOEXEC | MFD_ALLOW_SEALING), rc = CPRD_OK;
    struct cprd_live_change one = {(enum cprd_live_op)SAVE_MEMORY, name, 0, fd, NULL, 0, 0};
    size_t before = l->kept;
    if (fd < 0 || ftruncate(fd, (off_t)size) ||
        fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL))
        rc = cprd__no_room("for memory");
    if (!rc) rc = map(l, fd, size);
    if (!rc && (rc = cprd_live_change(l, &one, 1))) {
        if (rc == CPRD_LIMIT_EXCEEDED && l->kept > before) rc = CPRD_OK; /* it counts */
        else munmap(l->maps[--l->map_count].iov_base, size);
    }
    cprd__close_all(&fd, 1); /* the mapping is all that this process has */
    return rc;
}

int cprd_live_memory(cprd_live *l, const char *name, size_t size, void **out) {
    struct cprd__key key = cprd__key(CPRD__MEMORY, name, strlen(name), 0);
    struct entry *k = known(l, &key);
    int rc = guard(l), is_new = !k || k->op != MAPPED;
    *out = NULL;
    if (rc) return rc;
    if (!size || (!is_new && k->map.iov_len != size))
        return cprd__fail(CPRD_INVALID_INPUT, "memory '%s' has another size than %zu", name, size);
    if (is_new && make_memory(l, name, size)) return cprd__last.code;
    k = known(l, &key);
    if (is_new) k->map = l->maps[l->map_count - 1];
    *out = k->map.iov_base;
    return CPRD_OK;
}

int cprd_live_clear(cprd_live *l) {
    int rc = guard(l);
    if (!rc) rc = write_root(l, 1);
    if (!rc) forget(l, 1);
    return rc;
}

size_t cprd_live_kept(const cprd_live *l) { return l->kept; }

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
    return cprd__room_for(*parked);
}

/* What a record says of a key: the highest seq counts. */
static int offer(cprd_live *l, struct segment *s, struct entry *e) {
    e->segment = s;
    if (e->counts && !(e->k = know(l, &e->key))) return cprd__last.code;
    if (e->counts && (!e->k->counts || e->k->seq < e->seq)) {
        e->k->counts = 1;
        put(l, e);
    } else {
        e->counts = 0;
        if (s && e->op < DELETE) make_dirty(l, s);
    }
    return CPRD_OK;
}

static int by_birth(const void *one, const void *other) {
    const struct entry *a = *(struct entry *const *)one, *b = *(struct entry *const *)other;
    if (a->birth != b->birth) return a->birth > b->birth ? 1 : -1;
    return (a->seq > b->seq) - (a->seq < b->seq);
}

/* Put what counts into the state; and memory, unless `as_state`, into this process. */
static int find(cprd_live *l, struct entry *e, int as_state) {
    struct cprd__key key = e->key;
    struct stat there;
    char name[300];
    int seals = e->op == MAPPED ? fcntl(e->fd, F_GET_SEALS) : 0, rc;
    if (e->birth > l->birth) l->birth = e->birth;
    if (key.space == CPRD__SECTION && e->fd >= 0 && !cprd__is_sealed(e->fd))
        return wrong("a section that is not sealed");
    if (e->op == MAPPED) {
        if (seals < 0 || !(seals & F_SEAL_SHRINK) || !(seals & F_SEAL_GROW) ||
            fstat(e->fd, &there) || !there.st_size)
            return wrong("memory that is no memfd of a fixed size");
        if (!as_state && !(rc = map(l, e->fd, (size_t)there.st_size)))
            e->k->map = l->maps[l->map_count - 1];
        if (!as_state) return rc;
        key.space = CPRD__SECTION;
        key.length = (size_t)snprintf(name, sizeof name, "memory.%s", e->key.name);
        key.name = name; /* too long, or there already: INVALID_INPUT, for that is no damage */
    }
    rc = cprd__add(l->state, &key, e->fd, 1, e->value.iov_base, e->value.iov_len,
                   e->op == PACKED || e->op == PACKED_MEMFD);
    if (!rc) e->fd = -1;
    return rc;
}

/* All that is kept in a root whose owner has ended, into an empty hold. */
static int read_hold(cprd_live *l, int root, int as_state) {
    struct segment top = {.rx = root, .is_root = 1};
    size_t parked = 64, count = 0;
    struct entry **all = NULL;
    int rc = shut(root, &parked);
    if (!rc) rc = peek(l, &top, 1);
    for (size_t n = 0; n < top.entries && !rc; n++) {
        struct entry *e = &top.queue[n];
        if (!e->counts) continue;
        if (e->op == SEGMENT && known(l, &e->key)) /* the table has it already */
            rc = wrong("a segment twice");
        if (!rc) rc = offer(l, NULL, e);
        if (rc || e->op != SEGMENT) continue;
        if (!segment_add(l, -1, e->fd)) rc = cprd__last.code;
        e->fd = -1;
        parked++;
    }
    if (!rc && l->count > MOST_SEGMENTS) rc = wrong("too many segments");
    for (size_t n = 0; n < l->count && !rc; n++) rc = shut(l->segments[n]->rx, &parked);
    for (size_t at = 0; at < l->count && !rc; at++) {
        struct segment *s = l->segments[at];
        rc = peek(l, s, 1);
        for (size_t n = 0; n < s->entries && !rc; n++) rc = offer(l, s, &s->queue[n]);
    }
    if (!rc && (!(all = calloc(l->kept + 1, sizeof *all)) || !(l->state = cprd_state_new())))
        rc = cprd__no_memory();
    for (size_t at = 0; at < l->count && !rc; at++) {
        struct segment *s = l->segments[at];
        for (size_t n = 0; n < s->entries; n++)
            if (is_current(l, s, &s->queue[n])) all[count++] = &s->queue[n];
    }
    if (count) qsort(all, count, sizeof *all, by_birth);
    for (size_t n = 0; n < count && !rc; n++) rc = find(l, all[n], as_state);
    for (size_t n = 0; n < l->count; n++) let_go(l->segments[n]);
    let_go(&top);
    free(all);
    return rc;
}

static void live_free(cprd_live *l) {
    while (l->count) segment_free(l->segments[--l->count]);
    cprd__close_all((int[]){l->root.tx, l->root.rx}, 2);
    for (size_t n = 0; n < l->map_count && l->owner == getpid(); n++)
        munmap(l->maps[n].iov_base, l->maps[n].iov_len);
    forget(l, 1);
    cprd_state_free(l->state);
    cprd__close(&l->ticket);
    free(l->segments);
    free(l->maps);
    free(l);
}

/* Owns `tx` and `rx`, also on failure. NULL: no memory. */
static cprd_live *live_new(int tx, int rx, uint64_t hold) {
    cprd_live *l = calloc(1, sizeof *l);
    if (!l) cprd__no_memory();
    if (!l) cprd__close_all((int[]){tx, rx}, 2);
    if (!l) return NULL;
    *l = (cprd_live){.hold = hold, .owner = getpid(), .most_own = MOST_OWN};
    l->root = (struct segment){.tx = tx, .rx = rx, .is_root = 1};
    l->packed = (struct cprd__packed){.fds = &l->root.rx, .parked = 1, .depth = 1};
    memcpy(l->packed.header, HEAD, sizeof HEAD);
    prepare(tx, rx);
    return l;
}

int cprd_live_take(int root, int tx, int rx, uint64_t hold, cprd_live **out) {
    cprd_live *l = *out = live_new(tx, rx, hold);
    int rc = l ? CPRD_OK : cprd__last.code;
    if (!rc && root >= 0 && !(rc = read_hold(l, root, 0))) rc = write_root(l, 0);
    if (l && rc) live_free(l);
    if (rc) *out = NULL;
    return rc;
}

/* -- with cprd --------------------------------------------------------------------------------- */

/* As read_hold: the root lies in the bundle of a live hold. */
static int read_bundle(cprd_live *l, int bundle, int as_state) {
    unsigned char h[CPRD__HEADER + 1];
    int fds[CPRD__SCM_MAX], flags = MSG_PEEK, off = -1, rc;
    size_t count;
    setsockopt(bundle, SOL_SOCKET, SO_PEEK_OFF, &off, sizeof off);
    long got = cprd__receive(bundle, h, sizeof h, fds, &count, &flags);
    if (got > 0 && flags & MSG_CTRUNC) rc = cprd__no_room("to read a live hold with");
    else if (got == CPRD__HEADER && !memcmp(h, HEAD, sizeof HEAD) && count == 1)
        rc = read_hold(l, fds[0], as_state);
    else rc = wrong("a bundle of something else");
    cprd__close_all(fds, count);
    return rc;
}

static int read_by(int (*read)(cprd_live *, int, int), int queue, cprd_state **out) {
    cprd_live *l = live_new(-1, -1, 0);
    int rc = l ? read(l, queue, 1) : cprd__last.code;
    if (!rc) *out = l->state;
    if (!rc) l->state = NULL;
    if (l) live_free(l);
    return rc;
}

int cprd_live_read(int root, cprd_state **out) { return read_by(read_hold, root, out); }
int cprd__unpack_live(int bundle, cprd_state **out) { return read_by(read_bundle, bundle, out); }

/* What was saved, into the new root, which nobody knows yet. */
static int take_in(cprd_live *l, cprd_state *s) {
    const struct cprd_item *item;
    int rc = CPRD_OK;
    l->most_own = SIZE_MAX; /* what was saved is taken whole */
    for (size_t n = 0; !rc && (item = cprd_item_at(s, n)); n++) {
        struct cprd_live_change one = {item->is_section ? CPRD_SAVE_SECTION : CPRD_SAVE_FD,
                                       item->name, item->id, item->fd, item->data, item->size,
                                       item->packed};
        rc = cprd_live_change(l, &one, 1);
    }
    l->most_own = MOST_OWN;
    l->state = s;
    return rc;
}

int cprd_live_open(cprd *c, const char *name, const struct cprd_load_options *options,
                   cprd_live **out) {
    struct cprd__answer a;
    cprd_state *saved = NULL;
    uint64_t hold;
    int tx, rx;
    *out = NULL;
    if (getrandom(&hold, sizeof hold, 0) != sizeof hold || cprd__pair(&tx, &rx))
        return cprd__no_room("for the root of a live hold");
    cprd_live *l = live_new(tx, rx, hold | 1);
    if (!l) return cprd__last.code;
    int rc = cprd__claim(&l->ticket, c, "live", name, options, &l->packed, &a);
    if (!rc) {
        uint64_t found = cprd__number(a.of, "found", 0), live = cprd__number(a.of, "live", 0);
        cprd__point("live:answered");
        l->connects = cprd__connects(l->ticket.c);
        if (found && a.fd < 0) rc = cprd__no_fd(&a);
        else if (found && !live) rc = cprd_unpack(a.fd, &saved);
        else if (found) rc = read_bundle(l, a.fd, 0);
        if (!rc && found) rc = saved ? take_in(l, saved) : write_root(l, 0);
        cprd__close_all(&a.fd, 1);
        if (rc) rc = cprd__give_back(&l->ticket, rc);
        l->over = found ? CPRD_BUSY : CPRD_OK;
    }
    if (rc) cprd_live_close(l);
    else *out = l;
    return rc;
}

int cprd_live_found(const cprd_live *l) { return l->state != NULL; }
cprd_state *cprd_live_state(cprd_live *l) { return l->state; }
int cprd_live_socket(const cprd_live *l) { return l->ticket.c ? cprd_socket(l->ticket.c) : -1; }

/* A request with our root. By the answer cprd has the root. */
static int give_root(cprd_live *l, struct cprd__call call) {
    struct cprd__answer a;
    call.packed = &l->packed;
    int rc = cprd__request(l->ticket.c, &call, &a);
    if (rc) return rc;
    cprd__close_all(&a.fd, 1);
    cprd__set(&l->ticket, &a);
    l->connects = cprd__connects(l->ticket.c);
    l->over = CPRD_OK;
    return CPRD_OK;
}

int cprd_live_confirm(cprd_live *l) {
    if (l->over != CPRD_BUSY) return l->over == CPRD_FENCED ? guard(l) : CPRD_OK;
    struct cprd__call call = cprd__call_of(&l->ticket, "confirm_next", l->ticket.nonces[0]);
    cprd__fields(&call, "fds U parked u depth u live f", (uint64_t)0, (uint64_t)1, (uint64_t)1, 1);
    cprd__point("confirm:before");
    int rc = give_root(l, call);
    if (rc == CPRD_FENCED) l->over = rc;
    if (!rc) tidy(l); /* at a limit the next change does it */
    if (!rc) cprd__point("confirm:answered");
    return rc;
}

int cprd_live_check(cprd_live *l) {
    if (!l->ticket.c || l->over == CPRD_BUSY || l->ticket.stored || l->ticket.over) return CPRD_OK;
    if (guard(l)) return cprd__last.code;
    if (cprd__connects(l->ticket.c) == l->connects) return CPRD_OK;
    cprd__point("put_back:before");
    int rc = give_root(l, cprd__call_of(&l->ticket, "put_back", NULL));
    if (rc == CPRD_FENCED || rc == CPRD_DENIED || rc == CPRD_NOT_HELD)
        return fenced(l, cprd__last.text);
    if (!rc) cprd__point("put_back:answered");
    return rc;
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
        int rc = l->over != CPRD_BUSY
                     ? say_end(l, l->kept > 0)
                     : cprd__end(&l->ticket, "reject", "closed without confirm", CPRD_OK);
        l->over = CPRD_OK;
        if (rc == CPRD_FENCED && l->kept && !cprd_live_check(l)) say_end(l, 1); /* cprd is new */
    }
    live_free(l);
    cprd__last = before;
}
