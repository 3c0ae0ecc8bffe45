/* What a killed owner of a live hold left. Included by cprd_live.c. docs/bundle.md has the records.
 *
 * Whoever wrote the queues may be hostile: lengths come before contents, and no more is installed
 * than there is room for. */
#include "../cprd.h"

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

enum { CHANGE = 1, SNAPSHOT, ATTACH, ROOT }; /* kinds of records */
enum { SAVE = 1, RAW, PACKED, RAW_MEMFD, PACKED_MEMFD, MAPPED, DELETE = 8, SEGMENT = 11 }; /* ops */
enum {
    HEADER = 40,         /* bytes of a record's */
    MOST = 64 * 1024,    /* bytes of a record */
    MOST_RECORDS = 1024, /* of a queue */
    MOST_SEGMENTS = 131072
};

struct segment { /* a queue with keys; or the root */
    struct segment *next;
    int tx, rx;             /* tx -1: a predecessor's, where nobody can append */
    int id, is_root, dirty; /* dirty: has something void, or more records than it needs */
    int own;                /* copies of what lies here must not be closed in this process */
    size_t count;           /* keys that count here */
    uint64_t seq, ordinal;  /* of the last record; of the next */
    size_t records, bytes;  /* in the queue; bytes: since it was rewritten */
};
struct entry { /* of a record; or what the table has of a key */
    struct cprd__key key;
    struct segment *segment;     /* where it lies; NULL: the root */
    struct entry *next, *found;  /* all keys of the table; what a key is of, while read */
    int op, fd, own, counts;     /* SEGMENT: one that a record of the root names, by key.id */
    uint64_t birth, seq, change; /* the number of the last change: a key is in it once */
    struct iovec value, map;
};
struct peeked { /* all records of a queue, in order */
    struct entry *at;
    size_t count, first, part; /* `first` entry of the last ROOT, of which there is up to `part` */
    unsigned char *data;
};
struct cprd_live { /* what a hold has, and its owner */
    struct cprd__key *keys; /* the top of all; ... */
    struct entry *known;    /* ... the first */
    size_t used;
    struct segment root, *segments;
    size_t count, dirty, gone; /* segments; gone: that the root still names */
    size_t kept, owns;         /* keys; of these in segments of their own */
    uint64_t hold, seq, birth;
    int last_id;
    cprd_state *state; /* that was found */
    pid_t owner;       /* 0: reads only */
    int over, takes;   /* FENCED; NOT_HELD: ended; BUSY: not confirmed. takes: what was saved */
    uint64_t changes, connects; /* connects: of the connection by which cprd has the root */
    struct iovec *maps;
    size_t map_count;
    cprd_claim ticket; /* c NULL: without cprd */
    struct cprd__packed packed; /* the root, for cprd */
};

static inline int has_value(int op) { return op == RAW || op == PACKED; }
static inline int carries(int op) { return op < DELETE && !has_value(op); }

static const unsigned char LIVE_HEAD[CPRD__HEADER] = "CPRB\2\0\3\1\1\0\0\0\1";
static const signed char SPACES[] = {-1, 0, 1, 1, 1, 1, 2, -1, 0, 1, 2, 3}; /* of ops */

static int wrong(const char *what) {
    return cprd__fail(CPRD_DAMAGED, "a live hold with %s", what);
}

/* -- keys and segments ------------------------------------------------------------------------- */

/* What the table has of a key; of a new one, that it has ended. NULL: no memory. */
static struct entry *know(cprd_live *l, const struct cprd__key *key) {
    struct cprd__key **slot = cprd__slot(&l->keys, key);
    struct entry *k = (struct entry *)*slot;
    if (k) return k;
    if (!(k = calloc(1, sizeof *k + key->length + 1))) cprd__no_memory();
    if (!k) return NULL;
    *k = (struct entry){.next = l->known, .op = DELETE + key->space, .fd = -1};
    k->key = cprd__key(key->space, memcpy(k + 1, key->name, key->length), key->length, key->id);
    *slot = &k->key;
    l->known = k;
    l->used++;
    return k;
}

/* Any key from below may take the place of one that goes: the hash begins with the same bits. */
static void take_out(struct cprd__key **slot) {
    struct cprd__key *gone = *slot, **leaf = slot;
    for (int n = 0; n < 4;)
        if (!(*leaf)->below[n]) n++;
        else {
            leaf = &(*leaf)->below[n];
            n = 0;
        }
    struct cprd__key *instead = *leaf;
    *leaf = NULL;
    if (instead == gone) return;
    memcpy(instead->below, gone->below, sizeof gone->below);
    *slot = instead;
}

/* Keys with this op or a higher one. */
static void forget(cprd_live *l, int from) {
    for (struct entry **at = &l->known, *k; (k = *at);)
        if (k->op < from) at = &k->next;
        else {
            take_out(cprd__slot(&l->keys, &k->key));
            *at = k->next;
            l->used--;
            free(k);
        }
}

static void make_dirty(cprd_live *l, struct segment *s) {
    l->dirty += !s->dirty && !s->is_root;
    s->dirty = 1;
}

/* What a record says of a known key. */
static void note(cprd_live *l, const struct entry *e) {
    struct entry *k = know(l, &e->key);
    if (k->op < DELETE) {
        l->kept--;
        l->owns -= (size_t)k->segment->own;
        k->segment->count--;
        if (k->segment != e->segment || carries(k->op)) make_dirty(l, k->segment);
    }
    if (k->birth != e->birth) k->map = (struct iovec){NULL, 0};
    k->op = e->op;
    k->birth = e->birth;
    k->seq = e->seq;
    k->segment = e->op < DELETE ? e->segment : NULL;
    if (k->op >= DELETE) return;
    l->kept++;
    l->owns += (size_t)k->segment->own;
    k->segment->count++;
}

/* One more, without its ends. NULL: no memory. */
static struct segment *segment_new(cprd_live *l) {
    struct segment *s = calloc(1, sizeof *s);
    if (!s) cprd__no_memory();
    if (!s) return NULL;
    *s = (struct segment){.next = l->segments, .id = ++l->last_id, .tx = -1, .rx = -1};
    l->count++;
    return l->segments = s;
}

static void segment_free(cprd_live *l, struct segment *s) {
    struct segment **at = &l->segments;
    while (*at != s) at = &(*at)->next;
    *at = s->next;
    l->count--;
    l->dirty -= (size_t)s->dirty;
    cprd__close_all((int[]){s->tx, s->rx}, 2);
    free(s);
}

/* Until the hold is closed. */
static int map(cprd_live *l, int fd, size_t size, struct iovec *out) {
    struct iovec *more = realloc(l->maps, (l->map_count + 1) * sizeof *more);
    l->maps = more ? more : l->maps;
    void *at = more ? mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0) : MAP_FAILED;
    if (at == MAP_FAILED)
        return cprd__fail(CPRD_LIMIT_EXCEEDED, "cannot map memory: %s", strerror(errno));
    madvise(at, size, MADV_DONTFORK);
    *out = l->maps[l->map_count++] = (struct iovec){at, size};
    return CPRD_OK;
}

/* Frees all but root, ticket and the hold itself. */
static void clean(cprd_live *l) {
    forget(l, 0);
    while (l->segments) segment_free(l, l->segments);
    for (size_t n = 0; n < l->map_count && l->owner == getpid(); n++)
        munmap(l->maps[n].iov_base, l->maps[n].iov_len);
    cprd_state_free(l->state);
    free(l->maps);
}

/* -- records ----------------------------------------------------------------------------------- */

enum { KIND, OWN, BY, SEQ, ORDINAL, ENTRIES, FDS, SIZE, FIELDS }; /* of a header; BY: the hold */
static const int WIDTHS[FIELDS] = {1, 1, 8, 8, 8, 2, 2, 4};

/* A record of entries, segments first. `part`: of a ROOT, and 65536 times how many; else 0. */
static void encode(const cprd_live *l, const struct segment *q, uint64_t part,
                  const struct entry *e, size_t count, struct cprd__bytes *b) {
    uint64_t fields[FIELDS] = {part ? ROOT : q->is_root ? ATTACH : CHANGE, (size_t)q->own, l->hold,
                               l->seq + 1, q->ordinal, count, 0, 0};
    for (size_t n = 0; n < count; n++) {
        fields[FDS] += e[n].fd >= 0;
        fields[ENTRIES] -= e[n].op == SEGMENT;
    }
    size_t named = count - fields[ENTRIES];
    cprd__put(b, "CPRL\1", 6);
    for (int n = 0; n < FIELDS; n++) cprd__put_little(b, fields[n], WIDTHS[n]);
    if (part) cprd__put_little(b, part, 4);
    for (size_t n = 0; n < named; n++) cprd__put_little(b, (uint32_t)e[n].key.id, 4);
    for (size_t n = named; n < count; n++) cprd__put_little(b, (uint64_t)e[n].op, 1);
    for (size_t n = named; n < count; n++) cprd__put_little(b, e[n].birth, 8);
    for (size_t n = named; n < count; n++) cprd__put_little(b, (uint32_t)e[n].key.id, 4);
    for (size_t n = named; n < count; n++)
        if (has_value(e[n].op)) cprd__put_little(b, e[n].value.iov_len, 4);
    for (size_t n = named; n < count; n++) cprd__put(b, e[n].value.iov_base, e[n].value.iov_len);
    for (size_t n = named; n < count; n++) {
        cprd__put(b, "", n > named); /* a NUL between */
        cprd__put(b, e[n].key.name, e[n].key.length);
    }
    for (int n = 0; n < 4 && !b->failed; n++) b->at[36 + n] = (unsigned char)(b->size >> 8 * n);
}

struct cursor { /* `bad`: was to go beyond the end; numbers are 0 from then on */
    const unsigned char *at, *end;
    int bad;
};

static const unsigned char *bytes(struct cursor *c, size_t size) {
    const unsigned char *at = c->at;
    c->bad |= (size_t)(c->end - at) < size;
    c->at += c->bad ? 0 : size;
    return at;
}

static uint64_t number(struct cursor *c, int width) {
    const unsigned char *at = bytes(c, (size_t)width);
    return c->bad ? 0 : cprd__little(at, width);
}

/* As encode wrote them. `named` of the entries are segments. */
static int decode_entries(struct cursor *c, struct entry *e, size_t named, size_t count,
                          const int *fds, size_t fd_count) {
    size_t carried = named;
    for (size_t n = 0; n < named; n++) c->bad |= (e[n].key.id = (int32_t)number(c, 4)) < 0;
    for (size_t n = named; n < count; n++) e[n].op = (int)number(c, 1);
    for (size_t n = named; n < count; n++) e[n].birth = number(c, 8);
    for (size_t n = named; n < count; n++) e[n].key.id = (int32_t)number(c, 4);
    for (size_t n = named; n < count; n++)
        if (has_value(e[n].op)) e[n].value.iov_len = number(c, 4);
    for (size_t n = named; n < count; n++)
        e[n].value.iov_base = (void *)(uintptr_t)bytes(c, e[n].value.iov_len);
    for (size_t n = named; n < count && !c->bad; n++) {
        struct cprd__key *key = &e[n].key;
        const unsigned char *nul = memchr(c->at, 0, (size_t)(c->end - c->at));
        key->length = (size_t)((nul ? nul : c->end) - c->at);
        key->name = (char *)(uintptr_t)bytes(c, key->length);
        bytes(c, n + 1 < count);
        key->space = e[n].op < SEGMENT ? SPACES[e[n].op] : -1;
        c->bad |= key->space < 0 || e[n].birth >> 62 || (key->space != CPRD__FD && key->id) ||
                  cprd__check_name(key);
        if (carries(e[n].op) && carried++ < fd_count) e[n].fd = fds[carried - 1];
    }
    return !c->bad && c->at == c->end && carried == fd_count;
}

/* One more record of a queue. */
static int decode(cprd_live *l, struct segment *s, struct peeked *p, const unsigned char *data,
                  size_t size, const int *fds, size_t fd_count) {
    struct cursor c = {data, data + size, size < HEADER};
    const unsigned char *magic = bytes(&c, 4);
    int version = (int)number(&c, 2);
    uint64_t f[FIELDS];
    for (int n = 0; n < FIELDS; n++) f[n] = number(&c, WIDTHS[n]);
    int is_root = f[KIND] >= ATTACH, parted = f[KIND] == ROOT;
    size_t part = parted ? number(&c, 2) : 1, parts = parted ? number(&c, 2) : 1;
    size_t named = is_root ? fd_count : 0, count = named + f[ENTRIES];
    if (c.bad || memcmp(magic, "CPRL", 4)) return wrong("no header of a record");
    if (version != 1)
        return cprd__fail(CPRD_BUSY, "a live hold of version %d; this program reads version 1:"
                          " upgrade it", version);
    if (s->is_root && !s->records) l->hold = f[BY];
    if (f[SIZE] != size || size > MOST || f[FDS] != fd_count || size < 13 * f[ENTRIES] ||
        f[KIND] < CHANGE || f[KIND] > ROOT || is_root != s->is_root || f[OWN] > 1 || !part ||
        part > parts || f[BY] != l->hold || (f[SEQ] | f[ORDINAL]) >> 62 ||
        (s->records && (f[ORDINAL] != s->ordinal || f[SEQ] <= s->seq)))
        return wrong("a record that contradicts itself, or the one before");
    struct entry *e = realloc(p->at, ((p->count + count) / 32 * 32 + 32) * sizeof *e); /* seldom */
    if (!e) return cprd__no_memory();
    p->at = e;
    e += p->count;
    for (size_t n = 0; n < count; n++)
        e[n] = (struct entry){.key = cprd__key(SPACES[SEGMENT], "", 0, 0), .op = SEGMENT,
                              .fd = n < named ? fds[n] : -1, .own = (int)f[OWN], .seq = f[SEQ],
                              .counts = !parted};
    int bad = !decode_entries(&c, e, named, count, fds, fd_count);
    for (size_t n = 0; n < count; n++) bad |= is_root && e[n].op < DELETE;
    if (bad) return wrong("a record that makes no sense");
    for (size_t n = 0; f[KIND] == SNAPSHOT && n < p->count; n++) /* a DELETE still counts */
        p->at[n].counts &= p->at[n].op >= DELETE;
    if (parted && part == 1) p->first = p->count;
    if (parted) p->part = part == 1 || part == p->part + 1 ? part : 0;
    p->count += count;
    if (parted && p->part == parts) { /* is whole: so nothing else counts so far */
        for (size_t n = 0; n < p->count; n++)
            p->at[n].counts = n >= p->first && !p->at[n].counts;
        p->part = 0;
    }
    s->own = (int)f[OWN];
    s->records++;
    s->ordinal = f[ORDINAL] + 1;
    s->seq = f[SEQ];
    if (s->seq > l->seq) l->seq = s->seq;
    return CPRD_OK;
}

static void let_go(struct peeked *p) {
    for (size_t n = 0; n < p->count; n++) cprd__close_all(&p->at[n].fd, 1);
    free(p->at);
    free(p->data);
    *p = (struct peeked){0};
}

/* All records of a queue, with copies of their descriptors; consumes nothing. Tried until they are
 * in order: a stopped owner may go on, and drain what is void. */
static int peek(cprd_live *l, struct segment *s, struct peeked *p, int tries) {
    int off = 0, before = -1, rc = CPRD_DAMAGED;
    while (rc == CPRD_DAMAGED && tries > 0) {
        int waiting = cprd__waiting(s->rx), total = 0;
        struct segment seen = *s;
        if (before >= 0) poll(NULL, 0, 1);
        tries -= waiting == before ? 60 : 1; /* where nobody drains */
        before = waiting;
        setsockopt(s->rx, SOL_SOCKET, SO_PEEK_OFF, &off, sizeof off);
        seen.records = 0;
        *p = (struct peeked){.data = malloc((size_t)waiting + 1)};
        rc = p->data ? CPRD_OK : cprd__no_memory();
        while (!rc && total < waiting) {
            unsigned char *at = p->data + total;
            int fds[CPRD__SCM_MAX], flags = MSG_PEEK;
            size_t count;
            long got = cprd__receive(s->rx, at, (size_t)(waiting + 1 - total), fds, &count, &flags);
            if (got <= 0 || flags & MSG_TRUNC || seen.records == MOST_RECORDS)
                rc = wrong("a queue that is not in order");
            else if (flags & MSG_CTRUNC) rc = cprd__no_room("for a live hold (which stays held)");
            else rc = decode(l, &seen, p, at, (size_t)got, fds, count);
            if (rc) cprd__close_all(fds, count);
            total += (int)got;
        }
        if (!rc && (total != waiting || cprd__waiting(s->rx) != waiting))
            rc = wrong("a queue that changes");
        if (rc) let_go(p);
        else *s = seen;
    }
    off = -1;
    setsockopt(s->rx, SOL_SOCKET, SO_PEEK_OFF, &off, sizeof off);
    cprd__point("live:read");
    return rc;
}

/* -- a hold ------------------------------------------------------------------------------------ */

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

/* What a record says of a key, or of a segment: the highest seq counts. */
static int offer(cprd_live *l, struct segment *s, struct entry *e) {
    struct entry *k = e->counts ? know(l, &e->key) : NULL;
    if (e->counts && !k) return cprd__last.code;
    if (k && e->op == SEGMENT && k->found) return wrong("a segment twice");
    if (k && (!k->found || k->seq < e->seq)) {
        e->segment = s;
        note(l, e);
        k->found = e;
    } else if (s && e->op < DELETE) make_dirty(l, s);
    if (e->birth > l->birth) l->birth = e->birth;
    return CPRD_OK;
}

/* The segments that the root names, and the keys that it ends. */
static int read_root(cprd_live *l, int root, size_t *parked) {
    struct segment top = {.rx = root, .is_root = 1}, *s = NULL;
    struct peeked p;
    int rc = peek(l, &top, &p, 200);
    for (size_t n = 0; n < p.count && !rc; n++) {
        struct entry *e = &p.at[n];
        rc = offer(l, NULL, e);
        if (rc || e->op != SEGMENT || !e->counts) continue;
        if (!(s = segment_new(l))) rc = cprd__last.code;
        else {
            s->rx = e->fd;
            e->fd = -1;
        }
    }
    forget(l, SEGMENT);
    let_go(&p);
    if (!rc && l->count > MOST_SEGMENTS) rc = wrong("too many segments");
    *parked += l->count;
    for (s = l->segments; s && !rc; s = s->next) rc = shut(s->rx, parked);
    return rc;
}

static int by_birth(const void *one, const void *other) {
    const struct entry *a = *(struct entry *const *)one, *b = *(struct entry *const *)other;
    if (a->birth != b->birth) return a->birth > b->birth ? 1 : -1;
    return (a->seq > b->seq) - (a->seq < b->seq);
}

/* Put what counts into the state; but memory into the process of an owner. */
static int install(cprd_live *l, struct entry *e) {
    struct cprd__key key = e->key;
    struct stat there;
    char name[300];
    int seals = e->op == MAPPED ? fcntl(e->fd, F_GET_SEALS) : 0;
    if (key.space == CPRD__SECTION && e->fd >= 0 && !cprd__is_sealed(e->fd))
        return wrong("a section that is not sealed");
    if (e->op == MAPPED) {
        if (seals < 0 || !(seals & F_SEAL_SHRINK) || !(seals & F_SEAL_GROW) ||
            fstat(e->fd, &there) || !there.st_size)
            return wrong("memory that is no memfd of a fixed size");
        if (l->owner)
            return map(l, e->fd, (size_t)there.st_size, &know(l, &key)->map);
        key.space = CPRD__SECTION;
        key.length = (size_t)snprintf(name, sizeof name, "memory.%.*s", (int)key.length, key.name);
        key.name = name; /* too long, or there already: INVALID_INPUT, for that is no damage */
    }
    int rc = cprd__add(l->state, &key, e->fd, 1, e->value.iov_base, e->value.iov_len,
                       e->op == PACKED || e->op == PACKED_MEMFD);
    if (!rc) e->fd = -1;
    return rc;
}

/* What a killed owner left, into an empty hold: keys, segments, state; memory is mapped for an
 * owner, else part of the state. */
static int read_hold(cprd_live *l, int root) {
    size_t parked = 64, at = 0, count = 0;
    int rc = shut(root, &parked);
    if (!rc) rc = read_root(l, root, &parked);
    struct peeked *p = calloc(l->count + 1, sizeof *p);
    if (!rc && (!p || !(l->state = cprd_state_new()))) rc = cprd__no_memory();
    for (struct segment *s = l->segments; s && !rc; s = s->next, at++) {
        rc = peek(l, s, &p[at], 200);
        for (size_t n = 0; n < p[at].count && !rc; n++) rc = offer(l, s, &p[at].at[n]);
        if (!s->count) make_dirty(l, s); /* is of no use */
    }
    struct entry **all = calloc(l->kept + 1, sizeof *all);
    if (!rc && !all) rc = cprd__no_memory();
    for (struct entry *k = l->known; k && !rc; k = k->next)
        if (k->op < DELETE) all[count++] = k->found;
    if (count) qsort(all, count, sizeof *all, by_birth);
    for (size_t n = 0; n < count && !rc; n++) rc = install(l, all[n]);
    while (p && at--) let_go(&p[at]);
    free(all);
    free(p);
    return rc;
}

int cprd_live_read(int root, cprd_state **out) {
    cprd_live l = {0};
    int rc = read_hold(&l, root);
    if (!rc) *out = l.state;
    if (!rc) l.state = NULL;
    clean(&l);
    return rc;
}

/* Of a bundle that is borrowed; *root is the caller's. */
static int root_of(int bundle, int *root) {
    unsigned char head[CPRD__HEADER + 1];
    int fds[CPRD__SCM_MAX], flags = MSG_PEEK, off = -1, rc = CPRD_OK;
    size_t count;
    setsockopt(bundle, SOL_SOCKET, SO_PEEK_OFF, &off, sizeof off);
    long got = cprd__receive(bundle, head, sizeof head, fds, &count, &flags);
    if (got > 0 && flags & MSG_CTRUNC) rc = cprd__no_room("to read a live hold with");
    else if (got != CPRD__HEADER || memcmp(head, LIVE_HEAD, CPRD__HEADER) || count != 1)
        rc = wrong("a bundle of something else");
    if (rc) cprd__close_all(fds, count);
    else *root = fds[0];
    return rc;
}

int cprd__unpack_live(int bundle, cprd_state **out) {
    int root, rc = root_of(bundle, &root);
    if (rc) return rc;
    rc = cprd_live_read(root, out);
    cprd__close_all(&root, 1);
    return rc;
}
