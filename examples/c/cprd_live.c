/* The owner of a live hold. cprd.h says how to use it, docs/bundle.md has the records.
 *
 * Keys lie in segments: queues that the root names, each written once. A change moves what stays in
 * the segments of its keys into fresh ones; a record of the root names these, and all that ends:
 * that record is the change. Then the old segments are drained. Where that cannot be, because a
 * predecessor was killed or a limit is met, a segment is `dirty`: something void lies there. Until
 * no segment is dirty, each rewritten root says again which keys have ended. */
#define _GNU_SOURCE
#define CPRD_INTERNAL
#include "cprd.h"

#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <search.h>
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
    MOST = 64 * 1024,    /* bytes of a record */
    MOST_RECORDS = 1024, /* of a queue */
    MOST_SEGMENTS = 131072,
    INLINE = 4096,       /* bytes of a section; a larger one gets a memfd */
    VALUES = 12 * 1024,  /* bytes of the sections of a segment */
    SLICE = 250,         /* keys that surely go into one change */
    ENDED = 64,          /* ended keys in a record of the root */
#ifdef CPRD_SMALL        /* for tests: a few changes reach every step */
    KEYS = 2, ROOT_RECORDS = 3, PART = 2,
#else
    KEYS = 16,            /* of a segment */
    ROOT_RECORDS = 100,   /* then the root is rewritten, ... */
    PART = CPRD__SCM_MAX, /* ... so many segments in a record */
#endif
    MOST_OWN = 512       /* files and memfds: each has a segment of its own */
};

struct segment {
    uint32_t id;
    int rx;
    int own;           /* copies of what lies here must not be closed in this process */
    int dirty, moves;  /* something void lies here; all that stays is about to move */
    size_t count, ends, size; /* keys; those that a change has; bytes of values */
};

struct kept { /* a key that counts, or has ended */
    struct cprd_key key;
    int op, found, changing, listed; /* found: while a hold is read. listed: in l->ended */
    uint64_t birth, seq;
    struct segment *segment; /* NULL: has ended */
    struct kept *next;       /* in l->ended */
    int fd;                  /* what was found, until a state has it */
    struct cprd__bytes value;
    void *map;
    size_t size;             /* of the map */
    char name[];
};

struct change { /* of a record */
    struct cprd_key key;
    struct kept *k;
    int op, own, fd, made; /* made: the fd is to be closed by whoever made the entry */
    int *slot;             /* where a record that was read has the fd */
    uint64_t birth, seq;
    struct segment *to; /* the fresh segment */
    const unsigned char *value;
    size_t size;
};

struct header { /* little-endian */
    char magic[4];
    uint16_t version;
    uint8_t kind, own;
    uint64_t hold, seq, ordinal;
    uint16_t count, fds;
    uint32_t size;
};

struct record {
    struct record *next; /* in the queue */
    int kind, own, fds[CPRD__SCM_MAX]; /* fds: of segments first */
    uint64_t hold, seq, ordinal;
    unsigned part, parts;
    uint32_t ids[CPRD__SCM_MAX]; /* of segments */
    size_t id_count, fd_count, count, size;
    struct change *entries;
    unsigned char *data; /* where names and values lie */
};

struct cprd_live {
    void *tree;                   /* of kept, by key */
    struct kept *ended;
    struct cprd__bytes segments, maps; /* pointers; struct map */
    int tx, rx;                   /* of the root */
    size_t records, weight, kept; /* records in the root, and what they take; keys */
    uint64_t hold, seq, birth, ordinal;
    uint32_t next_id;
    pid_t owner;
    int over, unconfirmed;        /* CPRD_FENCED, CPRD_NOT_HELD: ended */
    cprd_state *state;            /* that was found */
    struct cprd__ticket *ticket;  /* NULL: without cprd */
    int found, known;             /* known: cprd has our root */
    uint64_t connects;            /* of the connection by which cprd knows */
};
struct map {
    void *at;
    size_t size;
};

static int carries(int op) {
    return op == SAVE || op == RAW_MEMFD || op == PACKED_MEMFD || op == MAPPED;
}

static int wrong(const char *what) {
    return cprd__fail(CPRD_DAMAGED, "a live hold with %s", what);
}

static int fenced(cprd_live *l, const char *why) {
    l->over = CPRD_FENCED;
    return cprd__fail(CPRD_FENCED, "this live hold is not this process's any more (%s): it was"
                      " dropped by force (cprctl drop --force), and no change counts from now on",
                      why);
}

static size_t count_of(const cprd_live *l) { return l->segments.size / sizeof(struct segment *); }

static struct segment **at(const cprd_live *l, size_t n) {
    return (struct segment **)(void *)l->segments.at + n;
}

/* -- keys -------------------------------------------------------------------------------------- */

static struct kept *look(const cprd_live *l, const struct cprd_key *key) {
    struct kept **found = tfind(key, &l->tree, cprd__by_key);
    return found ? *found : NULL;
}

static void list_ended(cprd_live *l, struct kept *k) {
    if (k->listed) return;
    k->listed = 1;
    k->next = l->ended;
    l->ended = k;
}

/* As look; a key that is new has ended. NULL: no memory. */
static struct kept *know(cprd_live *l, const struct cprd_key *key) {
    struct kept *k = look(l, key);
    if (k) return k;
    k = calloc(1, sizeof *k + strlen(key->name) + 1);
    if (k) *k = (struct kept){.key = *key, .op = DELETE + key->kind, .fd = -1};
    if (k) k->key.name = strcpy(k->name, key->name);
    if (k && tsearch(k, &l->tree, cprd__by_key)) {
        list_ended(l, k);
        return k;
    }
    cprd__no_memory();
    free(k);
    return NULL;
}

static void kept_free(void *node) {
    struct kept *k = node;
    if (k->fd >= 0) close(k->fd);
    free(k->value.at);
    free(k);
}

/* Nothing of what has ended lies anywhere any more, unless a segment is dirty. */
static void forget_ended(cprd_live *l) {
    for (size_t n = 0; n < count_of(l); n++)
        if ((*at(l, n))->dirty) return;
    for (struct kept *k = l->ended, *next; k; k = next) {
        next = k->next;
        k->listed = 0;
        if (k->op < DELETE) continue;
        tdelete(k, &l->tree, cprd__by_key);
        kept_free(k);
    }
    l->ended = NULL;
}

/* -- records ----------------------------------------------------------------------------------- */

static void put_name(struct record *r, const struct segment *s) {
    r->ids[r->id_count] = s->id;
    r->fds[r->id_count++] = s->rx;
}

/* Append a record to a queue. FENCED, LIMIT_EXCEEDED, INVALID_INPUT: it is not there. */
static int append(cprd_live *l, int tx, struct record *r) {
    struct cprd__bytes b = {0};
    const struct change *e = r->entries, *end = e + r->count;
    int fds[2 * CPRD__SCM_MAX];
    memcpy(fds, r->fds, sizeof r->fds);
    r->fd_count = r->id_count;
    for (e = r->entries; e < end; e++)
        if (e->fd >= 0) fds[r->fd_count++] = e->fd;
    struct header h = {"CPRL", htole16(1), (uint8_t)r->kind, (uint8_t)r->own, htole64(l->hold),
                       htole64(l->seq + 1), htole64(r->ordinal), htole16((uint16_t)r->count),
                       htole16((uint16_t)r->fd_count), 0};
    cprd__put(&b, &h, sizeof h);
    if (r->kind == ROOT) cprd__put_little(&b, r->part | r->parts << 16, 4);
    for (size_t n = 0; n < r->id_count; n++) cprd__put_little(&b, r->ids[n], 4);
    for (e = r->entries; e < end; e++) cprd__put_little(&b, (uint64_t)e->op, 1);
    for (e = r->entries; e < end; e++) cprd__put_little(&b, e->birth, 8);
    for (e = r->entries; e < end; e++) cprd__put_little(&b, (uint32_t)e->key.id, 4);
    for (e = r->entries; e < end; e++)
        if (e->value) cprd__put_little(&b, e->size, 4);
    for (e = r->entries; e < end; e++) cprd__put(&b, e->value, e->size);
    for (e = r->entries; e < end; e++)
        cprd__put(&b, e->key.name, strlen(e->key.name) + (e + 1 < end));
    r->size = b.size;
    h.size = htole32((uint32_t)b.size);
    if (!b.failed) memcpy(b.at, &h, sizeof h);
    cprd__point("live", "send");
    int error = b.failed ? ENOMEM : b.size > MOST || r->count > UINT16_MAX ? EMSGSIZE
                : cprd__send(tx, b.at, b.size, fds, r->fd_count);
    free(b.at);
    if (error == EMSGSIZE)
        return cprd__fail(CPRD_LIMIT_EXCEEDED, "the change takes more than %d bytes in one record:"
                          " make several of it; nothing was changed", MOST);
    if (error == EPIPE || error == EPERM || error == ECONNRESET || error == ENOTCONN)
        return fenced(l, strerror(error));
    if (error) return cprd__explain(error);
    cprd__point("live", "sent");
    r->seq = ++l->seq;
    return CPRD_OK;
}

static uint64_t take(struct record *r, size_t *at, int width) {
    *at += (size_t)width;
    return *at <= r->size ? cprd__little(r->data + *at - width, width) : UINT64_MAX >> 1;
}

/* Whoever wrote the bytes may be hostile. What is beyond the end is read as a number that cannot
 * be; r->data has a NUL behind the end. */
static int decode(struct record *r) {
    static const signed char kinds[] = {-1, CPRD_FD, CPRD_SECTION, CPRD_SECTION, CPRD_SECTION,
                                        CPRD_SECTION, CPRD__MEMORY, -1, CPRD_FD, CPRD_SECTION,
                                        CPRD__MEMORY};
    struct header h;
    size_t at = sizeof h, carried;
    if (r->size < sizeof h || memcmp(r->data, "CPRL", 4)) return wrong("no header of a record");
    memcpy(&h, r->data, sizeof h);
    if (h.version != htole16(1))
        return cprd__fail(CPRD_BUSY, "a live hold of version %d; this program reads version 1:"
                          " upgrade it", le16toh(h.version));
    r->kind = h.kind;
    r->own = h.own;
    r->hold = le64toh(h.hold);
    r->seq = le64toh(h.seq);
    r->ordinal = le64toh(h.ordinal);
    r->count = le16toh(h.count);
    r->id_count = carried = h.kind >= ATTACH ? r->fd_count : 0;
    if (le32toh(h.size) != r->size || r->size > MOST || r->own > 1 || r->seq >> 62 ||
        r->ordinal >> 62 || r->kind < CHANGE || r->kind > ROOT || le16toh(h.fds) != r->fd_count)
        return wrong("a record whose header contradicts itself");
    r->part = r->kind == ROOT ? (unsigned)take(r, &at, 2) : 1;
    r->parts = r->kind == ROOT ? (unsigned)take(r, &at, 2) : 1;
    int bad = r->part < 1 || r->part > r->parts;
    for (size_t n = 0; n < r->id_count; n++) {
        r->ids[n] = (uint32_t)take(r, &at, 4);
        bad |= r->ids[n] > INT32_MAX;
    }
    if (!(r->entries = calloc(r->count + 1, sizeof *r->entries))) return cprd__no_memory();
    struct change *e, *first = r->entries, *end = first + r->count;
    for (e = first; e < end; e++) e->op = (int)take(r, &at, 1);
    for (e = first; e < end; e++) e->birth = take(r, &at, 8);
    for (e = first; e < end; e++) e->key.id = (int32_t)take(r, &at, 4);
    for (e = first; e < end; e++)
        if (e->op == RAW || e->op == PACKED) e->size = (size_t)take(r, &at, 4);
    for (e = first; e < end && at <= r->size; e++) {
        e->value = e->op == RAW || e->op == PACKED ? r->data + at : NULL;
        at += e->size;
    }
    for (e = first; e < end && at <= r->size && !bad; e++) {
        const char *name = e->key.name = (const char *)r->data + at;
        size_t length = strlen(name);
        at += length + (e + 1 < end);
        e->key.kind = e->op >= 0 && e->op < (int)sizeof kinds ? kinds[e->op] : -1;
        e->own = r->own;
        e->fd = -1;
        bad |= e->key.kind < 0 || e->birth >> 62 || (e->key.kind != CPRD_FD && e->key.id) ||
               (e->op < DELETE && r->kind >= ATTACH) ||
               cprd__check_name(e->key.kind, name, length);
        if (!carries(e->op)) continue;
        e->slot = carried < r->fd_count ? &r->fds[carried] : NULL;
        e->fd = e->slot ? *e->slot : -1;
        carried++;
    }
    if (bad || at != r->size || carried != r->fd_count)
        return wrong("a record that contradicts itself, or its descriptors");
    return CPRD_OK;
}

static void records_free(struct record **list) {
    for (struct record *r = *list, *next; r; r = next) {
        next = r->next;
        cprd__close_all(r->fds, r->fd_count);
        free(r->entries);
        free(r->data);
        free(r);
    }
    *list = NULL;
}

/* The next record of a queue. */
static int peek_record(int rx, struct record *r, const struct record *before) {
    unsigned char data[MOST + 1];
    int flags = MSG_PEEK;
    long got = cprd__receive(rx, data, sizeof data, r->fds, &r->fd_count, &flags);
    if (got > 0 && flags & MSG_CTRUNC) return cprd__no_room(CPRD__SCM_MAX);
    if (got <= 0 || flags & MSG_TRUNC) return wrong("a queue that is not in order");
    r->size = (size_t)got;
    if (!(r->data = calloc(1, r->size + 1))) return cprd__no_memory();
    memcpy(r->data, data, r->size);
    int rc = decode(r);
    if (!rc && before && (r->ordinal != before->ordinal + 1 || r->seq <= before->seq ||
                          r->hold != before->hold))
        return wrong("a record missing");
    return rc;
}

/* All records of a queue, with copies of their descriptors; consumes nothing. A predecessor that
 * was stopped may go on, and drain what is void: then the queue is read again. */
static int peek(int rx, struct record **list) {
    int waiting, rc;
    do {
        struct record **last = list, *before = NULL;
        size_t total = 0, count = 0;
        records_free(list);
        waiting = cprd__waiting(rx);
        cprd__peek_from(rx, 0);
        for (rc = CPRD_OK; !rc && (int)total < waiting; last = &before->next) {
            struct record *r = *last = calloc(1, sizeof *r);
            if (!r) return cprd__no_memory();
            rc = ++count > MOST_RECORDS ? wrong("too many records") : peek_record(rx, r, before);
            total += r->size;
            before = r;
        }
        if (!rc && ((int)total != waiting || cprd__waiting(rx) != waiting))
            rc = wrong("a queue that changes");
    } while (rc == CPRD_DAMAGED && cprd__waiting(rx) != waiting);
    cprd__peek_from(rx, -1);
    return rc;
}

/* -- the root ---------------------------------------------------------------------------------- */

static int append_root(cprd_live *l, struct record *r) {
    r->ordinal = l->ordinal;
    int rc = append(l, l->tx, r);
    if (rc) return rc;
    l->ordinal++;
    l->records++;
    l->weight += 1 + r->size / 1024;
    return CPRD_OK;
}

/* Let go of the oldest records of a queue. */
static void drain(int rx, size_t count) {
    char byte;
    cprd__point("live", "drain");
    while (count && recv(rx, &byte, 1, MSG_DONTWAIT) > 0) count--;
}

static void segment_free(struct segment *s) {
    if (s->rx >= 0) close(s->rx);
    free(s);
}

/* Void all records of the root by new ones, that name all segments. */
static int write_root(cprd_live *l) {
    size_t before = l->records, count = count_of(l), n = 0, ended = 0;
    const struct kept *k;
    for (k = l->ended; k; k = k->next) ended += k->op >= DELETE && k->seq;
    size_t by_count = (count + PART - 1) / PART, by_ended = (ended + ENDED - 1) / ENDED;
    unsigned parts = (unsigned)(by_count > by_ended ? by_count : by_ended);
    l->weight = 0;
    k = l->ended;
    for (unsigned part = 1; part <= parts || part == 1; part++) {
        struct change entries[ENDED];
        struct record r = {.kind = ROOT, .part = part, .parts = parts ? parts : 1};
        r.entries = entries;
        for (; n < count && r.id_count < PART; n++) put_name(&r, *at(l, n));
        for (; k && r.count < ENDED; k = k->next)
            if (k->op >= DELETE && k->seq)
                entries[r.count++] = (struct change){.key = k->key, .op = k->op, .fd = -1};
        int rc = append_root(l, &r);
        if (rc) return rc;
    }
    drain(l->rx, before);
    l->records -= before;
    return CPRD_OK;
}

/* -- changes ----------------------------------------------------------------------------------- */

/* What is kept before what ends; what needs a segment of its own in between. */
static int order(const void *one, const void *other) {
    const struct change *a = one, *b = other;
    if ((a->op < DELETE) != (b->op < DELETE)) return a->op < DELETE ? -1 : 1;
    if (a->own != b->own) return a->own - b->own;
    return (a->birth > b->birth) - (a->birth < b->birth);
}

/* A fresh segment of the first of these. NULL: see cprd_last. */
static struct segment *write_segment(cprd_live *l, struct change *entries, size_t count) {
    struct record r = {.kind = CHANGE, .own = entries->own, .entries = entries};
    struct segment *s = calloc(1, sizeof *s);
    int tx, rc = s ? cprd__pair(&tx, &s->rx) : cprd__no_memory();
    if (rc) {
        free(s);
        return NULL;
    }
    s->id = ++l->next_id;
    s->own = r.own;
    for (; r.count < count && r.count < (s->own ? 1 : KEYS); r.count++) {
        const struct change *e = &entries[r.count];
        if (e->op >= DELETE || e->own != s->own || (r.count && s->size + e->size > VALUES)) break;
        s->size += e->size;
    }
    s->count = r.count;
    rc = append(l, tx, &r);
    close(tx);
    for (size_t n = 0; n < r.count; n++) {
        entries[n].seq = r.seq;
        entries[n].to = s;
    }
    if (!rc) return s;
    segment_free(s);
    return NULL;
}

/* Adds to `list` what counts in a segment and does not change, with copies of its descriptors. What
 * this process put into a segment of its own never moves: closing a copy of a file would end the
 * POSIX locks of this process. */
static int gather(cprd_live *l, const struct segment *s, struct cprd__bytes *list,
                  struct record **copies) {
    size_t found = s->ends;
    struct record *first = NULL;
    int rc = found < s->count ? peek(s->rx, &first) : CPRD_OK;
    for (struct record *r = first; r && !rc; r = r->next)
        for (size_t n = 0; n < r->count; n++) {
            struct change *e = &r->entries[n];
            e->k = look(l, &e->key);
            if (!e->k || e->k->segment != s || e->k->seq != r->seq || e->k->changing) continue;
            cprd__put(list, e, sizeof *e);
            found++;
        }
    if (rc == CPRD_DAMAGED || (!rc && found != s->count)) rc = fenced(l, "its queue was changed");
    while (first) {
        struct record *r = first;
        first = r->next;
        r->next = *copies;
        *copies = r;
    }
    return rc;
}

/* Make the changes of `entries`, move what else lies in segments that move, and drain these. */
static int commit(cprd_live *l, struct change *entries, size_t count) {
    size_t before = count_of(l), done = 0;
    struct record root = {.kind = ATTACH};
    int rc = l->weight < ROOT_RECORDS ? CPRD_OK : write_root(l);
    if (count) qsort(entries, count, sizeof *entries, order);
    while (!rc && done < count && entries[done].op < DELETE) {
        struct segment *s = NULL;
        if (root.id_count == CPRD__SCM_MAX)
            rc = cprd__fail(CPRD_LIMIT_EXCEEDED, "more keys than one change can have: make several"
                            " of it; nothing was changed");
        else if (!(s = write_segment(l, entries + done, count - done))) rc = cprd__last.code;
        else {
            cprd__put(&l->segments, &s, sizeof s);
            if (l->segments.failed) segment_free(s);
            if (l->segments.failed) rc = cprd__no_memory();
            else done += s->count;
            if (!rc) put_name(&root, s);
        }
    }
    root.entries = entries + done;
    root.count = count - done;
    if (!rc && count) rc = append_root(l, &root);
    for (size_t n = before; rc && n < count_of(l); n++) segment_free(*at(l, n));
    if (rc) l->segments.size = before * sizeof(struct segment *);
    if (rc) return rc;
    for (size_t n = 0; n < count; n++) {
        struct change *e = &entries[n];
        struct kept *k = e->k;
        l->kept += (size_t)(e->op < DELETE) - (size_t)(k->op < DELETE);
        if (k->segment) k->segment->count--;
        k->op = e->op;
        k->birth = e->birth;
        k->seq = n < done ? e->seq : root.seq;
        k->segment = n < done ? e->to : NULL;
        if (n >= done) list_ended(l, k);
    }
    return CPRD_OK;
}

/* The segments whose content moved are not needed any more. `moved` 0: it did not. */
static void let_go(cprd_live *l, int moved) {
    size_t stay = 0;
    for (size_t n = 0; n < count_of(l); n++) {
        struct segment *s = *at(l, n);
        int gone = s->moves && moved;
        if (gone) drain(s->rx, SIZE_MAX); /* a forked child may have the socket, too */
        if (gone) segment_free(s);
        else *at(l, stay++) = s;
        if (!gone) s->moves = 0;
        if (!gone) s->ends = 0;
    }
    l->segments.size = stay * sizeof(struct segment *);
    forget_ended(l);
}

/* Move, with the changes of `list`, what stays in segments that move; unless `rc` is an error. */
static int move(cprd_live *l, struct cprd__bytes *list, int rc) {
    struct record *copies = NULL;
    for (size_t n = 0; n < count_of(l) && !rc; n++)
        if ((*at(l, n))->moves) rc = gather(l, *at(l, n), list, &copies);
    if (!rc && list->failed) rc = cprd__no_memory();
    struct change *entries = (struct change *)(void *)list->at;
    size_t count = list->size / sizeof *entries;
    for (size_t n = 0; n < count; n++)
        if (entries[n].k) entries[n].k->changing = 0;
    if (!rc) rc = commit(l, entries, count);
    records_free(&copies); /* before the drain: so no close of a copy is the last one */
    let_go(l, !rc);
    return rc;
}

/* Move what counts out of dirty segments. */
static int tidy(cprd_live *l) {
    int rc = CPRD_OK;
    for (size_t n = 0; n < count_of(l) && !rc;) {
        struct segment *s = *at(l, n);
        struct cprd__bytes none = {0};
        if (!s->dirty) n++;
        else {
            s->moves = 1;
            rc = move(l, &none, CPRD_OK);
            free(none.at);
        }
    }
    return rc;
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

int cprd_live_settle(cprd_live *l) {
    int rc = guard(l);
    return rc ? rc : tidy(l);
}

/* The fullest segment that has room for so many keys more; it moves along with these. */
static void choose_partner(cprd_live *l, size_t more, size_t size) {
    struct segment *best = NULL;
    for (size_t n = 0; n < count_of(l); n++) {
        struct segment *s = *at(l, n);
        if (s->moves || s->own || s->count + more > KEYS || s->size + size > VALUES) continue;
        if (!best || s->count > best->count) best = s;
    }
    if (best) best->moves = 1;
}

/* The entry of a change. `memory`: a new memfd, whose change this is; or -1. */
static int make_entry(cprd_live *l, const struct cprd_live_change *c, int memory,
                      struct change *e) {
    static const struct {
        int kind, op;
    } how[] = {{CPRD_FD, SAVE}, {CPRD_FD, SAVE}, {CPRD_FD, DELETE}, {CPRD_SECTION, RAW},
               {CPRD_SECTION, DELETE}, {CPRD__MEMORY, DELETE}};
    int kind = how[c->op].kind;
    struct stat there = {0};
    *e = (struct change){.key = {kind, kind == CPRD_FD ? c->id : 0, c->name}, .fd = -1};
    if (cprd__check_name(kind, c->name, strlen(c->name))) return CPRD_INVALID_INPUT;
    if (!(e->k = know(l, &e->key))) return cprd__last.code;
    if (e->k->changing)
        return cprd__fail(CPRD_INVALID_INPUT, "key '%s' twice in one change", c->name);
    if (c->op == CPRD_SAVE_FD && e->k->op < DELETE)
        return cprd__fail(CPRD_INVALID_INPUT, "key (%s, %d) is used already", c->name, c->id);
    e->op = memory >= 0 ? MAPPED : how[c->op].op == DELETE ? DELETE + kind : how[c->op].op;
    if (e->op < DELETE) e->birth = e->k->op < DELETE ? e->k->birth : ++l->birth;
    e->fd = memory >= 0 ? memory : e->op == SAVE ? c->fd : -1;
    if (e->op == RAW && c->size > INLINE) {
        int rc = cprd__memfd(c->name, c->data, c->size, &e->fd);
        if (rc) return rc;
        e->made = 1;
        e->op = c->packed ? PACKED_MEMFD : RAW_MEMFD;
    } else if (e->op == RAW) {
        e->op = c->packed ? PACKED : RAW;
        e->value = c->size ? c->data : (const void *)"";
        e->size = c->size;
    }
    if (carries(e->op) && fstat(e->fd, &there))
        return cprd__fail(CPRD_INVALID_INPUT, "fd %d of (%s, %d) is not open", e->fd, c->name,
                          c->id);
    uint64_t cookie = carries(e->op) ? cprd__cookie(e->fd) : 0;
    if (cookie && (cookie == cprd__cookie(l->tx) || cookie == cprd__cookie(l->rx) ||
                   (l->ticket && cookie == cprd__cookie_of(l->ticket->c))))
        return cprd__fail(CPRD_INVALID_INPUT, "fd %d is a socket of the live hold itself", e->fd);
    e->own = carries(e->op) && !S_ISSOCK(there.st_mode) && !S_ISFIFO(there.st_mode) &&
             there.st_mode & S_IFMT;
    return CPRD_OK;
}

static int change(cprd_live *l, const struct cprd_live_change *c, size_t count, int memory) {
    struct cprd__bytes list = {0};
    size_t own = 0, stays = 0, size = 0;
    int rc = guard(l), saves = 0, new_own = 0;
    if (!rc) rc = tidy(l);
    if (rc == CPRD_LIMIT_EXCEEDED) rc = CPRD_OK; /* the next change tries again */
    for (size_t n = 0; n < count && !rc; n++) {
        struct change e;
        rc = make_entry(l, &c[n], memory, &e);
        if (!rc && e.op >= DELETE && !e.k->segment) continue; /* is not there anyway */
        cprd__put(&list, &e, sizeof e);
        if (rc) break;
        struct segment *s = e.k->segment;
        e.k->changing = 1;
        if (s) s->moves = 1;
        if (s) s->ends++;
        saves |= e.op < DELETE;
        stays += e.op < DELETE && !e.own;
        size += e.size;
        new_own += e.own && !(s && s->own);
    }
    for (size_t n = 0; n < count_of(l); n++) {
        const struct segment *s = *at(l, n);
        own += (size_t)s->own;
        stays += s->moves && !s->own ? s->count - s->ends : 0;
        size += s->moves ? s->size : 0;
    }
    if (!rc && new_own && own + (size_t)new_own > MOST_OWN && (!l->ticket || l->ticket->bundle < 0))
        rc = cprd__fail(CPRD_LIMIT_EXCEEDED, "more than %d descriptors that are neither socket,"
                        " pipe nor anonymous inode (files, memfds), and sections above %d bytes;"
                        " nothing was changed", MOST_OWN, INLINE);
    if (stays % KEYS) choose_partner(l, stays % KEYS, size);
    rc = move(l, &list, rc);
    struct change *entries = (struct change *)(void *)list.at;
    size_t all = list.size / sizeof *entries, ended = 0;
    for (size_t n = 0; rc == CPRD_LIMIT_EXCEEDED && !saves && n < all; n++)
        if (entries[n].op >= DELETE) {
            entries[ended++] = entries[n];
            entries[n].k->segment->dirty = 1; /* what stays there moves when there is room */
        }
    if (ended) rc = commit(l, entries, all = ended);
    for (size_t n = 0; n < all; n++) {
        const struct change *e = &entries[n];
        if (e->made) close(e->fd);
        if (rc || e->slot || e->key.kind != CPRD_FD || !l->state) continue;
        int fd = cprd_take_fd(l->state, e->key.name, e->key.id); /* would keep the file open */
        if (fd >= 0) close(fd);
    }
    free(list.at);
    return rc;
}

int cprd_live_change(cprd_live *l, const struct cprd_live_change *changes, size_t count) {
    return change(l, changes, count, -1);
}

int cprd_live_memory(cprd_live *l, const char *name, size_t size, void **out) {
    struct cprd_live_change new = {.op = CPRD_DELETE_MEMORY, .name = name};
    struct cprd_key key = {CPRD__MEMORY, 0, name};
    struct kept *k = look(l, &key);
    struct stat there = {.st_size = 0};
    struct map map = {MAP_FAILED, size};
    int rc = guard(l), is_new = !k || !k->segment, fd = is_new ? -1 : k->fd;
    *out = NULL;
    if (rc) return rc;
    if (!is_new && !k->map && fstat(fd, &there)) return wrong("memory that is not there");
    if (!size || (!is_new && size != (k->map ? k->size : (size_t)there.st_size)))
        return cprd__fail(CPRD_INVALID_INPUT, "memory '%s' has another size than %zu", name, size);
    if (!is_new && k->map) {
        *out = k->map;
        return CPRD_OK;
    }
    if (is_new) fd = memfd_create("cprd.memory", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd < 0) return cprd__no_room(1);
    if (!is_new || (!ftruncate(fd, (off_t)size) &&
                    !fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL)))
        map.at = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (map.at == MAP_FAILED || madvise(map.at, size, MADV_DONTFORK))
        rc = cprd__fail(CPRD_LIMIT_EXCEEDED, "cannot map memory '%s': %s", name, strerror(errno));
    if (!rc && is_new) rc = change(l, &new, 1, fd);
    if (!rc) cprd__put(&l->maps, &map, sizeof map); /* lost, where there is no memory left */
    if (is_new || !rc) close(fd); /* the mapping is all that this process has */
    if (rc && map.at != MAP_FAILED) munmap(map.at, size);
    if (rc) return rc;
    k = look(l, &key);
    k->fd = -1;
    k->size = size;
    *out = k->map = map.at;
    return CPRD_OK;
}

static void forget_all(cprd_live *l) {
    for (size_t n = 0; n < count_of(l); n++) segment_free(*at(l, n));
    l->segments.size = 0;
    tdestroy(l->tree, kept_free);
    l->tree = NULL;
    l->ended = NULL;
    l->kept = 0;
}

int cprd_live_clear(cprd_live *l) {
    struct cprd__bytes segments = l->segments;
    struct kept *ended = l->ended;
    int rc = guard(l);
    if (rc) return rc;
    l->segments.size = 0;
    l->ended = NULL;
    rc = write_root(l); /* that names nothing */
    l->segments = segments;
    l->ended = ended;
    for (size_t n = 0; n < count_of(l) && !rc; n++) drain((*at(l, n))->rx, SIZE_MAX);
    if (!rc) forget_all(l);
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
    return CPRD_OK;
}

/* What a record says of a key: the highest seq counts. */
static int offer(cprd_live *l, struct segment *s, const struct change *e, uint64_t seq) {
    struct kept *k = know(l, &e->key);
    if (!k) return cprd__last.code;
    if (k->found && k->seq >= seq) {
        if (e->op < DELETE) s->dirty = 1;
        return CPRD_OK;
    }
    if (k->segment) {
        k->segment->dirty = 1;
        k->segment->count--;
    }
    if (k->fd >= 0) close(k->fd);
    k->fd = e->fd;
    if (e->slot) *e->slot = -1;
    k->value.size = 0;
    cprd__put(&k->value, e->value, e->size);
    k->found = 1;
    k->op = e->op;
    k->birth = e->birth;
    k->seq = seq;
    k->segment = e->op < DELETE ? s : NULL;
    if (k->segment) s->count++;
    if (k->segment) s->size += e->size;
    return k->value.failed ? cprd__no_memory() : CPRD_OK;
}

static int by_id(const void *one, const void *other) {
    const struct segment *a = *(struct segment *const *)one, *b = *(struct segment *const *)other;
    return (a->id > b->id) - (a->id < b->id);
}

/* The segments that count: those of the last complete ROOT, and of each ATTACH since. */
static int read_root(cprd_live *l, struct record *queue) {
    const struct record *first = NULL, *start = NULL, *end = NULL;
    unsigned part = 0;
    int rc = CPRD_OK;
    for (struct record *r = queue; r; r = r->next) {
        if (r->kind < ATTACH) return wrong("a record of a segment in its root");
        l->hold = r->hold;
        l->seq = r->seq;
        if (r->kind != ROOT) continue;
        if (r->part == 1) first = r;
        part = r->part == 1 || (part && r->part == part + 1) ? r->part : 0;
        if (!part || part != r->parts) continue;
        start = first;
        end = r;
        part = 0;
    }
    for (struct record *r = queue; r && !rc; r = r->next) {
        if (start && r->ordinal < start->ordinal) continue;
        if ((r->kind == ROOT) != (end && r->ordinal <= end->ordinal)) continue;
        for (size_t n = 0; n < r->id_count; n++) {
            struct segment *s = calloc(1, sizeof *s);
            if (s) *s = (struct segment){.id = r->ids[n], .rx = r->fds[n]};
            if (s) cprd__put(&l->segments, &s, sizeof s);
            if (!s || l->segments.failed) return cprd__no_memory();
            r->fds[n] = -1;
        }
        for (size_t n = 0; n < r->count && !rc; n++) rc = offer(l, NULL, &r->entries[n], r->seq);
    }
    size_t count = count_of(l);
    if (count) qsort(at(l, 0), count, sizeof(struct segment *), by_id);
    for (size_t n = 1; n < count && !rc; n++)
        if ((*at(l, n))->id == (*at(l, n - 1))->id) rc = wrong("a segment twice");
    if (!rc && count) l->next_id = (*at(l, count - 1))->id;
    return !rc && count > MOST_SEGMENTS ? wrong("too many segments") : rc;
}

static int read_segment(cprd_live *l, struct segment *s) {
    struct record *queue = NULL;
    uint64_t first = 0;
    int rc = peek(s->rx, &queue);
    for (struct record *r = queue; r && !rc; r = r->next) {
        if (r->kind == SNAPSHOT) first = r->ordinal; /* voids what was saved before it */
        if (r->kind > SNAPSHOT || r->hold != l->hold) rc = wrong("a record of another queue");
    }
    for (struct record *r = queue; r && !rc; r = r->next) {
        if (r->seq > l->seq) l->seq = r->seq;
        s->own = r->own;
        for (size_t n = 0; n < r->count && !rc; n++)
            if (r->ordinal >= first || r->entries[n].op >= DELETE)
                rc = offer(l, s, &r->entries[n], r->seq);
            else s->dirty = 1;
    }
    records_free(&queue);
    return rc;
}

static int by_birth(const void *one, const void *other) {
    const struct kept *a = *(struct kept *const *)one, *b = *(struct kept *const *)other;
    if (a->birth != b->birth) return a->birth > b->birth ? 1 : -1;
    return (a->seq > b->seq) - (a->seq < b->seq);
}

/* Put a key that counts into the state; its memory only `as_state`. */
static int found(cprd_live *l, struct kept *k, int as_state) {
    struct cprd_item item = {k->key, k->fd, k->op == PACKED || k->op == PACKED_MEMFD,
                             k->value.size, k->value.at};
    struct stat there;
    char name[300];
    int seals = k->op == MAPPED ? fcntl(k->fd, F_GET_SEALS) : 0;
    if (k->birth > l->birth) l->birth = k->birth;
    l->kept++;
    if (k->op == MAPPED && (seals < 0 || !(seals & F_SEAL_SHRINK) || !(seals & F_SEAL_GROW) ||
                            fstat(k->fd, &there) || !there.st_size))
        return wrong("memory that is no memfd of a fixed size");
    if (k->key.kind == CPRD_SECTION && k->fd >= 0 && !cprd__is_sealed(k->fd))
        return wrong("a section that is not sealed");
    if (k->op == MAPPED && !as_state) return CPRD_OK;
    if (k->op == MAPPED) {
        snprintf(name, sizeof name, "memory.%s", k->key.name);
        item.key = (struct cprd_key){CPRD_SECTION, 0, name};
    }
    int rc = cprd__add(l->state, &item, strlen(item.key.name), 1);
    if (!rc) k->fd = -1;
    return rc; /* INVALID_INPUT: memory whose name as a section is taken, or too long; no damage */
}

/* All that is kept in a root whose owner has ended, into an empty hold. */
static int read_hold(cprd_live *l, int root, int as_state) {
    struct record *queue = NULL;
    size_t parked = 64, count = 0, stay = 0, most = 1;
    cprd__point("live", "read");
    int rc = shut(root, &parked);
    if (!rc) rc = cprd__room_for(parked);
    if (!rc) rc = peek(root, &queue);
    if (!rc) rc = read_root(l, queue);
    records_free(&queue);
    parked = 64 + count_of(l);
    for (size_t n = 0; !rc && n < count_of(l); n++) /* all are shut before the first is read */
        rc = shut((*at(l, n))->rx, &parked);
    if (!rc) rc = cprd__room_for(parked);
    for (size_t n = 0; !rc && n < count_of(l); n++) rc = read_segment(l, *at(l, n));
    for (size_t n = 0; n < count_of(l); n++) {
        struct segment *s = *at(l, n);
        most += s->count;
        if (s->count || s->dirty) *at(l, stay++) = s;
        else segment_free(s);
    }
    l->segments.size = stay * sizeof(struct segment *);
    struct kept **all = malloc(most * sizeof *all), *next;
    if (!rc && (!all || !(l->state = cprd_state_new()))) rc = cprd__no_memory();
    next = l->ended; /* all keys, so far */
    l->ended = NULL;
    for (struct kept *k = next; k && all; k = next) {
        next = k->next;
        k->listed = 0;
        if (k->segment) all[count++] = k;
        else list_ended(l, k);
    }
    if (count) qsort(all, count, sizeof *all, by_birth);
    for (size_t n = 0; n < count && !rc; n++) rc = found(l, all[n], as_state);
    free(all);
    return rc;
}

static void live_free(cprd_live *l) {
    struct map *map = (struct map *)(void *)l->maps.at;
    forget_all(l);
    if (l->tx >= 0) close(l->tx);
    if (l->rx >= 0) close(l->rx);
    for (size_t n = 0; n < l->maps.size / sizeof *map && l->owner == getpid(); n++)
        munmap(map[n].at, map[n].size);
    cprd_state_free(l->state);
    free(l->maps.at);
    free(l->segments.at);
    free(l);
}

/* Owns `tx` and `rx`, also on failure. */
int cprd_live_begin(int root, int tx, int rx, uint64_t hold, cprd_live **out) {
    int size = 1 << 20, rc = CPRD_OK;
    cprd_live *l = *out = calloc(1, sizeof *l);
    if (!l) {
        close(tx);
        close(rx);
        return cprd__no_memory();
    }
    *l = (cprd_live){.hold = hold, .owner = getpid(), .tx = tx, .rx = rx};
    setsockopt(tx, SOL_SOCKET, SO_SNDBUF, &size, sizeof size);
    if (root >= 0) rc = read_hold(l, root, 0);
    if (!rc && root >= 0) rc = write_root(l);
    if (!rc) return CPRD_OK;
    live_free(l);
    *out = NULL;
    return rc;
}

int cprd_live_read(int root, cprd_state **out) {
    cprd_live *l;
    int rc = cprd_live_begin(-1, -1, -1, 0, &l);
    if (rc) return rc;
    rc = read_hold(l, root, 1);
    if (!rc) *out = l->state;
    if (!rc) l->state = NULL;
    live_free(l);
    return rc;
}

/* -- with cprd --------------------------------------------------------------------------------- */

/* The header of a bundle whose only descriptor is the root of a live hold. */
static struct cprd__header live_header(void) {
    return (struct cprd__header){"CPRB", htole16(2), 3, 1, htole32(1), htole32(1), 0, 0};
}

/* The root that lies in the bundle of a live hold: the caller's. */
static int peek_root(int bundle, int *root) {
    struct cprd__header h, wanted = live_header();
    int fds[CPRD__SCM_MAX], flags = MSG_PEEK;
    size_t count;
    cprd__peek_from(bundle, -1);
    long got = cprd__receive(bundle, &h, sizeof h, fds, &count, &flags);
    *root = fds[0];
    if (got == sizeof h && !memcmp(&h, &wanted, sizeof h) && count == 1) return CPRD_OK;
    cprd__close_all(fds, count);
    if (got > 0 && flags & MSG_CTRUNC) return cprd__no_room(1);
    return cprd__fail(CPRD_DAMAGED, "not the bundle of a live hold");
}

int cprd__unpack_live(int bundle, cprd_state **out) {
    int root, rc = peek_root(bundle, &root);
    if (rc) return rc;
    rc = cprd_live_read(root, out);
    close(root);
    return rc;
}

/* A saved state, into the new root, which nobody knows yet. */
static int take_in(cprd_live *l, cprd_state *s) {
    struct cprd_live_change slice[SLICE];
    const struct cprd_item *item;
    size_t count = 0;
    int rc = CPRD_OK;
    for (size_t n = 0; !rc && (item = cprd_item_at(s, n)); n++) {
        enum cprd_live_op op = item->key.kind == CPRD_FD ? CPRD_SAVE_FD : CPRD_SAVE_SECTION;
        slice[count++] = (struct cprd_live_change){op, item->key.name, item->key.id, item->fd,
                                                   item->data, item->size, item->packed};
        if (count < SLICE && cprd_item_at(s, n + 1)) continue;
        rc = change(l, slice, count, -1);
        count = 0;
    }
    l->state = s;
    return rc;
}

/* Where cprd has the root, the request has it parked; the answer has another token. */
static int with_root(cprd_live *l, struct cprd__exchange *x) {
    struct cprd__packed p = {.header = live_header(), .fds = &l->rx, .parked = 1};
    x->packed = &p;
    int rc = cprd__exchange(l->ticket->c, x);
    x->packed = NULL;
    if (rc) return rc;
    if (x->answer.fd >= 0) close(x->answer.fd);
    cprd__set(l->ticket, &x->answer);
    l->known = 1;
    l->connects = cprd__connects(l->ticket->c);
    return CPRD_OK;
}

int cprd_live_open(cprd *c, const char *name, const struct cprd_load_options *options,
                   cprd_live **out) {
    struct cprd__exchange x = {.verb = "live", .name = name};
    struct cprd__ticket *t = NULL;
    uint64_t hold;
    int tx, rx, root, rc = cprd__pair(&tx, &rx);
    *out = NULL;
    if (!rc && getrandom(&hold, sizeof hold, 0) != sizeof hold) hold = (uint64_t)tx + 1;
    if (!rc) rc = cprd_live_begin(-1, tx, rx, hold | 1, out);
    if (rc) return rc;
    cprd_live *l = *out;
    struct cprd__packed p = {.header = live_header(), .fds = &l->rx, .parked = 1};
    x.packed = &p;
    rc = cprd__claim(c, &x, options, &t);
    l->ticket = t;
    l->connects = rc ? 0 : cprd__connects(c);
    l->found = !rc && x.answer.found;
    l->known = !rc && !x.answer.found;
    if (!rc && l->found) {
        if (t->bundle < 0) rc = cprd__no_fd(&x.answer);
        else if (!x.answer.live) {
            cprd_state *s;
            rc = cprd_unpack(t->bundle, &s);
            if (!rc) rc = take_in(l, s);
        } else {
            rc = peek_root(t->bundle, &root);
            if (!rc) {
                rc = read_hold(l, root, 0);
                close(root);
            }
            if (!rc) rc = write_root(l);
        }
        if (rc) cprd__give_back(t, rc);
        l->unconfirmed = 1;
    }
    if (!rc) return CPRD_OK;
    cprd_live_close(l);
    *out = NULL;
    return rc;
}

int cprd_live_found(const cprd_live *l) { return l->ticket ? l->found : l->state != NULL; }
cprd_state *cprd_live_state(cprd_live *l) { return l->state; }
int cprd_live_socket(const cprd_live *l) { return l->ticket ? cprd_socket(l->ticket->c) : -1; }

int cprd_live_confirm(cprd_live *l) {
    if (!l->ticket || l->known) return CPRD_OK;
    if (l->over)
        return cprd__fail(CPRD_FENCED, "'%s' is not this process's any more", l->ticket->name);
    uint64_t none = 0;
    struct cprd__exchange x = cprd__of(l->ticket, "confirm_next");
    x.nonce = l->ticket->nonces[0];
    x.fds = &none;
    x.parked = x.depth = x.live = 1;
    int rc = with_root(l, &x);
    if (rc == CPRD_FENCED) l->over = CPRD_FENCED;
    if (rc) return rc;
    l->unconfirmed = 0;
    close(l->ticket->bundle);
    l->ticket->bundle = -1;
    tidy(l); /* at a limit the next change does it */
    return CPRD_OK;
}

int cprd_live_check(cprd_live *l) {
    if (!l->ticket || !l->known || l->ticket->stored || l->ticket->over) return CPRD_OK;
    if (guard(l)) return cprd__last.code;
    if (cprd__connects(l->ticket->c) == l->connects) return CPRD_OK;
    struct cprd__exchange x = cprd__of(l->ticket, "put_back");
    int rc = with_root(l, &x);
    if (rc == CPRD_FENCED || rc == CPRD_DENIED || rc == CPRD_NOT_HELD)
        return fenced(l, cprd__last.text);
    return rc;
}

/* The owner owns no more. */
static int say_end(cprd_live *l, int keep) {
    struct cprd__exchange x = cprd__of(l->ticket, "end");
    x.nonce = l->ticket->nonces[1];
    x.keep = keep != 0;
    int rc = cprd__exchange(l->ticket->c, &x);
    if (!rc) l->ticket->over = 1;
    return rc;
}

int cprd_live_end(cprd_live *l) {
    int rc = cprd_live_clear(l);
    if (!rc && l->ticket) rc = say_end(l, 0);
    if (!rc) l->over = CPRD_NOT_HELD;
    return rc;
}

void cprd_live_close(cprd_live *l) {
    struct cprd_error before = cprd__last;
    if (!l) return;
    struct cprd__ticket *t = l->ticket;
    int ours = l->owner == getpid() && !l->over;
    if (ours && l->kept && !l->unconfirmed) write_root(l); /* so that no void segment is left */
    if (ours && t && !t->over) {
        int rc = l->unconfirmed ? cprd_reject(&t->known, "closed without confirm")
                                : say_end(l, l->kept > 0);
        l->known = 1;
        l->unconfirmed = 0;
        if (rc == CPRD_FENCED && l->kept && !cprd_live_check(l)) say_end(l, 1); /* cprd is new */
    }
    if (t) t->stays = 1;
    if (t) cprd_claim_close(&t->known);
    live_free(l);
    cprd__last = before;
}
