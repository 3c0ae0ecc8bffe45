/* The queues of a live hold: see cprd_live.h for the use, docs/bundle.md for the records.
 *
 * A change is one record: the commit. Segments that still hold what the commit made void (`dirty`)
 * are rewritten before the change returns, the segment with the commit (`holder`) last: as long as
 * something void lies elsewhere, the record that says so stays. A dirty segment that cannot be
 * rewritten at a limit is the first work of the next change. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "cprd_live_internal.h"

/* -- keys in segments -------------------------------------------------------------------------- */

static void mark(cprd_live *l, struct segment *s) {
    if (!s->dirty) l->dirty++;
    s->dirty = 1;
}
static void clean(cprd_live *l, struct segment *s) {
    if (s->dirty) l->dirty--;
    s->dirty = 0;
}

/* `k` does not count in its segment any more. `there`: it lies there nonetheless. */
static void leave(cprd_live *l, struct kept *k, int there) {
    struct segment *s = k->segment;
    for (size_t n = 0; n < s->count; n++)
        if (s->keys[n] == k) s->keys[n] = s->keys[--s->count], s->bytes -= entry_size(k);
    k->segment = NULL;
    if (there) mark(l, s);
}
static void enter(struct segment *s, struct kept *k) { /* room is there */
    s->keys[s->count++] = k, s->bytes += entry_size(k), k->segment = s;
}

/* -- records ----------------------------------------------------------------------------------- */

/* Send one record to a segment that keeps `new`, with the descriptors `fds` (-1: none), and ends
 * `gone`. As a snapshot it says again what the segment keeps otherwise, and voids what lies there.
 * Nothing is written down. */
static int write_to(cprd_live *l, struct segment *s, int snapshot, struct kept **new,
                    const int *fds, size_t count, struct kept **gone, size_t gone_count) {
    size_t n = 0, fd_count = 0, most = count + gone_count + s->count;
    struct entry *entries = calloc(most + 1, sizeof *entries);
    int *all = calloc(most + 1, sizeof *all), rc = entries && all ? CPRD_OK : no_memory();
    struct messages m = {0};
    int copies = 0;
    for (size_t at = 0; snapshot && at < s->count; at++) {
        struct kept *k = s->keys[at];
        int stays = 1;
        for (size_t other = 0; other < gone_count; other++) stays = stays && gone[other] != k;
        for (size_t other = 0; other < count; other++)
            stays = stays && *cprd__slot(l, new[other]) != k;
        if (!stays || rc) continue;
        if (carries(k->op) && !copies++) rc = cprd__peek(s->rx, &m, 0);
        if (rc == CPRD_DAMAGED) rc = cprd__fenced(l, "its queue was changed");
        if (!rc && carries(k->op) && (all[fd_count++] = cprd__copy_of(&m, k)) < 0)
            rc = cprd__fenced(l, "its queue was changed");
        entries[n++] = (struct entry){k, 0};
    }
    for (size_t at = 0; at < count; at++) {
        entries[n++] = (struct entry){new[at], 0};
        if (fds[at] >= 0) all[fd_count++] = fds[at];
    }
    for (size_t at = 0; at < gone_count; at++) entries[n++] = (struct entry){gone[at], 1};
    struct record r = {.kind = snapshot ? SNAPSHOT : CHANGE, .flags = s->kind == OWN, .count = n,
                       .fd_count = fd_count, .entries = entries, .fds = all};
    if (!rc) rc = cprd__send_record(l, s, &r);
    cprd__messages_free(&m); /* before the drain: so no close of a copy is the last one */
    if (!rc && snapshot) rc = cprd__drain(l, s, s->records - 1), s->parked = (int)fd_count;
    free(entries), free(all);
    return rc;
}

/* A record of the root: names `fresh`, ends `gone`. */
static int attach(cprd_live *l, struct segment **fresh, size_t count, struct kept **gone,
                  size_t gone_count) {
    uint32_t ids[CPRD_SCM_MAX];
    int fds[CPRD_SCM_MAX];
    struct segment **more = realloc(l->segments, (l->count + count) * sizeof *more + 1);
    struct entry *entries = calloc(gone_count + 1, sizeof *entries);
    if (more) l->segments = more;
    int rc = more && entries ? CPRD_OK : no_memory();
    if (!rc && count > CPRD_SCM_MAX)
        rc = fail(CPRD_LIMIT_EXCEEDED, "more keys than one change can have: make it in several");
    for (size_t n = 0; n < gone_count && !rc; n++) entries[n] = (struct entry){gone[n], 1};
    for (size_t n = 0; n < count && !rc; n++) ids[n] = fresh[n]->id, fds[n] = fresh[n]->rx;
    struct record r = {.kind = ATTACH, .ids = ids, .id_count = count, .count = gone_count,
                       .fd_count = count, .entries = entries, .fds = fds};
    if (!rc) rc = cprd__send_record(l, &l->root, &r);
    for (size_t n = 0; n < count && !rc; n++) l->segments[l->count++] = fresh[n];
    free(entries);
    return rc;
}

/* How many records it takes to write the root anew. */
static size_t root_parts(const cprd_live *l) {
    size_t left = 0, texts = (l->ended + 63) / 64;
    for (size_t n = 0; n < l->count; n++) left += !is_useless(l->segments[n]);
    left = (left + PART - 1) / PART;
    return left > texts ? left : texts ? texts : 1;
}

/* Void all records of the root by new ones, that name all segments but those of no use; with
 * `nothing`, no segment at all. Ended keys that may lie in some segment are said again. */
static int write_root(cprd_live *l, int nothing) {
    size_t left = 0, before = l->root.records, ended = 0;
    struct entry *entries = calloc(l->used + 1, sizeof *entries);
    uint32_t *ids = calloc(l->count + 1, sizeof *ids);
    int *fds = calloc(l->count + 1, sizeof *fds), rc = entries && ids && fds ? 0 : no_memory();
    for (size_t n = 0; n < l->slots && !rc && !nothing; n++)
        for (struct kept *k = l->table[n]; k; k = k->chain)
            if (k->op >= DELETE) entries[ended++] = (struct entry){k, 1};
    for (size_t n = 0; n < l->count && !rc && !nothing; n++)
        if (!is_useless(l->segments[n]))
            ids[left] = l->segments[n]->id, fds[left++] = l->segments[n]->rx;
    size_t parts = nothing ? 1 : root_parts(l);
    for (size_t part = 0; part < parts && !rc; part++) {
        size_t at = part * PART, first = part * 64;
        struct record r = {.kind = ROOT, .part = (uint16_t)(part + 1), .parts = (uint16_t)parts};
        r.ids = ids + at, r.fds = fds + at, r.entries = entries + first;
        r.id_count = at >= left ? 0 : left - at < PART ? left - at : PART;
        r.fd_count = r.id_count;
        r.count = first >= ended ? 0 : ended - first < 64 ? ended - first : 64;
        rc = cprd__send_record(l, &l->root, &r);
    }
    free(entries), free(ids), free(fds);
    if (!rc) rc = cprd__drain(l, &l->root, before);
    size_t stay = 0;
    for (size_t n = 0; n < l->count && !rc && !nothing; n++)
        if (is_useless(l->segments[n])) cprd__segment_free(l->segments[n]);
        else l->segments[stay++] = l->segments[n];
    if (!rc && !nothing) l->count = stay;
    return rc;
}

/* -- afterwards -------------------------------------------------------------------------------- */

/* Keep the keys of a predecessor's segment in one of our own. */
static int move(cprd_live *l, struct segment *s) {
    struct messages m = {0};
    struct segment *fresh = cprd__segment_new(s->kind);
    size_t count = s->count;
    struct kept **keys = calloc(count, sizeof *keys);
    int *fds = calloc(count, sizeof *fds), rc = CPRD_OK, copies = 0;
    if (!fresh || !keys || !fds) rc = fresh ? no_memory() : last.code;
    if (!rc && count > fresh->room) {
        struct kept **room = realloc(fresh->keys, count * sizeof *room);
        if (room) fresh->keys = room, fresh->room = count;
        else rc = no_memory();
    }
    for (size_t n = 0; n < count && !rc; n++) {
        keys[n] = s->keys[n], fds[n] = -1;
        if (!carries(keys[n]->op)) continue;
        if (!copies++) rc = cprd__peek(s->rx, &m, 0);
        if (rc == CPRD_DAMAGED) rc = cprd__fenced(l, "a queue was changed");
        if (!rc && (fds[n] = cprd__copy_of(&m, keys[n])) < 0)
            rc = cprd__fenced(l, "a queue was changed");
    }
    if (!rc) fresh->id = ++l->next_id, rc = write_to(l, fresh, 0, keys, fds, count, NULL, 0);
    if (!rc) rc = attach(l, &fresh, 1, NULL, 0);
    cprd__messages_free(&m);
    for (size_t n = 0; n < count && !rc; n++) leave(l, keys[n], 1), enter(fresh, keys[n]);
    if (rc) cprd__segment_free(fresh);
    free(keys), free(fds);
    return rc;
}

/* Let go of what is void in a segment. What lies in a segment of kind OWN is never copied: closing
 * the copy of a regular file would end the POSIX locks of this process. */
static int rewrite(cprd_live *l, struct segment *s) {
    int rc = CPRD_OK;
    if (s->count && s->tx < 0 && s->kind != OWN) rc = move(l, s);
    else if (s->count && s->tx >= 0) rc = write_to(l, s, 1, NULL, NULL, 0, NULL, 0);
    if (!rc && !s->count) rc = cprd__drain(l, s, s->records), s->parked = 0;
    if (!rc) clean(l, s);
    return rc;
}

static int tidy(cprd_live *l) {
    int rc = CPRD_OK;
    for (size_t n = 0; n < l->count && l->dirty && !rc; n++) {
        if (!l->segments[n]->dirty || l->segments[n] == l->holder) continue;
        /* Of a predecessor's ended keys, a new root says all again; of our own it would not. */
        if (l->taken && l->root.records >= ROOT_RECORDS + root_parts(l))
            rc = write_root(l, 0), n = (size_t)-1;
        else rc = rewrite(l, l->segments[n]);
    }
    if (!rc && l->holder && l->holder->dirty) rc = rewrite(l, l->holder);
    if (rc) return rc;
    l->holder = NULL, l->taken = 0;
    if (l->ended) { /* nothing of them lies anywhere any more */
        for (size_t n = 0; n < l->slots; n++)
            for (struct kept **slot = &l->table[n], *k; (k = *slot);)
                if (k->op >= DELETE) *slot = k->chain, l->used--, cprd__kept_free(k);
                else slot = &k->chain;
        l->ended = 0;
    }
    return CPRD_OK;
}

static int guard(const cprd_live *l) {
    if (l->over == CPRD_FENCED) return fail(CPRD_FENCED, "this live hold was dropped by force");
    if (l->over) return fail(CPRD_INVALID_INPUT, "this live hold has ended");
    if (l->owner != getpid())
        return fail(CPRD_INVALID_INPUT, "a live hold belongs to the process that opened it, not to"
                    " a forked child: open it after the last fork");
    if (l->root.tx < 0 || l->unconfirmed)
        return fail(CPRD_INVALID_INPUT, "the predecessor's hold is not confirmed yet");
    return CPRD_OK;
}

int cprd_live_settle(cprd_live *l) { return guard(l) ? last.code : tidy(l); }

/* -- changes ----------------------------------------------------------------------------------- */

struct puts { /* columns, for write_to */
    struct kept **keys, **gone;
    int *fds, *made; /* made: memfds to close */
    uint8_t *kinds;  /* of segments */
    size_t count, gone_count, made_count;
};

/* The segment that takes some keys of one kind: of their own, the usual one, or any; NULL: none. */
static struct segment *place(cprd_live *l, int kind, struct kept **keys, size_t count) {
    size_t size = 0, most = kind == OWN ? 1 : kind == SHARED ? SHARED_KEYS : VALUE_KEYS;
    for (size_t n = 0; n < count; n++) size += entry_size(keys[n]);
    struct kept *old = *cprd__slot(l, keys[0]);
    struct segment *first = old && old->op < DELETE && kind == VALUES ? old->segment : NULL;
    for (size_t n = 0; n < l->count + 2; n++) {
        struct segment *s = n == 0 ? first : n == 1 ? l->current[kind] : l->segments[n - 2];
        if (!s || s->tx < 0 || s->dirty || (s->count && (s->kind != kind || kind == OWN))) continue;
        if (s->count + count > most || s->bytes + size > ROOM) continue;
        if (!s->count) s->kind = kind;
        return s;
    }
    return NULL;
}

/* Write down what a record in `s` (NULL: the root) ends, and what is kept in `s` by it. */
static void written(cprd_live *l, struct segment *s, int snapshot, struct kept **new, size_t count,
                    struct kept **gone, size_t gone_count) {
    for (size_t n = 0; n < count + gone_count; n++) {
        struct kept *k = n < count ? cprd__link(l, new[n]) : gone[n - count];
        if (n < count) enter(s, new[n]), l->kept++;
        if (!k) continue;
        if (k->op < DELETE)
            leave(l, k, k->segment != s || (carries(k->op) && !snapshot)), l->kept--;
        if (n >= count) cprd__unlink(l, k);
        if (k->space == FD && l->state) { /* a copy that nobody took would keep the file open */
            int fd = cprd_take_fd(l->state, k->name, k->id);
            if (fd >= 0) close(fd);
        }
        cprd__kept_free(k);
    }
    l->holder = s;
}

/* Fresh segments, attached with all that is ended in one record. */
static int commit_fresh(cprd_live *l, struct puts *p) {
    struct segment **fresh = calloc(p->count + 1, sizeof *fresh);
    size_t *counts = calloc(p->count + 1, sizeof *counts), made = 0, at = 0;
    int rc = fresh && counts ? CPRD_OK : no_memory();
    if (!rc && l->root.records >= ROOT_RECORDS) rc = write_root(l, 0);
    while (at < p->count && !rc) { /* the keys are sorted by kind */
        int kind = p->kinds[at];
        size_t most = kind == OWN ? 1 : kind == SHARED ? SHARED_KEYS : VALUE_KEYS, size = 0, n = 0;
        for (; at + n < p->count && n < most && p->kinds[at + n] == kind; n++) {
            size += entry_size(p->keys[at + n]);
            if (n && size > ROOM) break;
        }
        if (!(fresh[made] = cprd__segment_new(kind))) rc = last.code;
        else {
            fresh[made]->id = ++l->next_id;
            rc = write_to(l, fresh[made], 0, p->keys + at, p->fds + at, n, NULL, 0);
            counts[made++] = n, at += n;
        }
    }
    if (!rc) rc = attach(l, fresh, made, p->gone, p->gone_count);
    for (size_t n = 0, first = 0; n < made; first += counts[n++])
        if (rc) cprd__segment_free(fresh[n]);
        else {
            written(l, fresh[n], 0, p->keys + first, counts[n], NULL, 0);
            l->current[fresh[n]->kind] = fresh[n];
        }
    if (!rc) written(l, NULL, 0, NULL, 0, p->gone, p->gone_count);
    free(fresh), free(counts);
    return rc;
}

static int commit(cprd_live *l, struct puts *p) {
    struct segment *s = NULL;
    int snapshot = 0, rc;
    if (p->count && p->count <= VALUE_KEYS && p->kinds[0] == p->kinds[p->count - 1])
        s = place(l, p->kinds[0], p->keys, p->count);
    for (size_t n = 0; !p->count && n < p->gone_count && !s; n++)
        if (p->gone[n]->segment->tx >= 0) s = p->gone[n]->segment;
    if (!s || p->gone_count > VALUE_KEYS) return commit_fresh(l, p);
    for (size_t n = 0; n < p->count + p->gone_count; n++) {
        struct kept *old = n < p->count ? *cprd__slot(l, p->keys[n]) : p->gone[n - p->count];
        if (old && old->segment == s && carries(old->op)) snapshot = 1;
    }
    size_t most = s->kind == SHARED ? SHARED_RECORDS : VALUE_RECORDS;
    snapshot = (snapshot && s->kind != OWN) || s->records >= most || s->spent > 100 * 1024;
    rc = write_to(l, s, snapshot, p->keys, p->fds, p->count, p->gone, p->gone_count);
    if (rc == CPRD_LIMIT_EXCEEDED && !p->count && snapshot) /* no descriptors, and so no limit */
        rc = write_to(l, s, snapshot = 0, NULL, NULL, 0, p->gone, p->gone_count);
    if (!rc) written(l, s, snapshot, p->keys, p->count, p->gone, p->gone_count);
    return rc;
}

static int is_ours(const cprd_live *l, int fd, const struct stat *there) {
    struct stat other;
    if (!S_ISSOCK(there->st_mode) || !(fcntl(fd, F_GETFL) & O_APPEND)) return 0;
    for (size_t n = 0; n <= l->count; n++) {
        const struct segment *s = n < l->count ? l->segments[n] : &l->root;
        if ((!fstat(s->rx, &other) && other.st_ino == there->st_ino) ||
            (s->tx >= 0 && !fstat(s->tx, &other) && other.st_ino == there->st_ino)) return 1;
    }
    return 0;
}

/* One more key to keep, or to end. */
static int add(cprd_live *l, struct puts *p, const struct cprd_live_change *c, int map) {
    static const int spaces[] = {FD, FD, FD, SECTION, SECTION, MEMORY};
    size_t length = strlen(c->name);
    int space = map >= 0 ? MEMORY : spaces[c->op], op, fd = -1;
    int32_t id = space == FD ? c->id : 0;
    struct stat there;
    if (!length || length > 255 ||
        (space != FD && !is_utf8((const unsigned char *)c->name, length)))
        return fail(CPRD_INVALID_INPUT, "key '%.255s': wants 1 to 255 bytes", c->name);
    struct kept *old = l->slots ? *cprd__slot_of(l, space, c->name, length, id) : NULL, *k;
    if (map < 0 && (c->op == CPRD_DELETE_FD || c->op >= CPRD_DELETE_SECTION)) {
        if (old && old->op < DELETE) p->gone[p->gone_count++] = old;
        return CPRD_OK;
    }
    if (map < 0 && c->op == CPRD_SAVE_FD && old && old->op < DELETE)
        return fail(CPRD_INVALID_INPUT, "key (%s, %d) is used already", c->name, id);
    op = map >= 0 ? MAPPED : space == FD ? SAVE : c->packed ? PACKED : RAW;
    if (map >= 0) fd = map;
    else if (space == FD) fd = c->fd;
    else if (c->size > INLINE) {
        bytes content = {.at = (unsigned char *)(uintptr_t)c->data, .size = c->size};
        if (cprd__memfd(c->name, &content, &fd)) return last.code;
        p->made[p->made_count++] = fd, op = c->packed ? PACKED_MEMFD : RAW_MEMFD;
    }
    if (carries(op) && fstat(fd, &there))
        return fail(CPRD_INVALID_INPUT, "fd %d of (%s, %d) is not open", fd, c->name, id);
    if (op == SAVE && is_ours(l, fd, &there))
        return fail(CPRD_INVALID_INPUT, "fd %d is a socket of the live hold itself", fd);
    if (!(k = cprd__kept_new(op, c->name, length, id))) return last.code;
    p->keys[p->count] = k, p->fds[p->count] = fd;
    if (!carries(op)) {
        if (!(k->value = malloc(c->size + 1))) return p->count++, no_memory();
        memcpy(k->value, c->size ? c->data : "", k->size = c->size);
    }
    int plain = carries(op) && (S_ISSOCK(there.st_mode) || S_ISFIFO(there.st_mode) ||
                                !(there.st_mode & S_IFMT));
    p->kinds[p->count++] = !carries(op) ? VALUES : plain ? SHARED : OWN;
    k->birth = old && old->op < DELETE ? old->birth : ++l->birth;
    return CPRD_OK;
}

static int by_key(const void *one, const void *other) {
    const struct kept *a = *(struct kept *const *)one, *b = *(struct kept *const *)other;
    int order = memcmp(a->name, b->name, a->length < b->length ? a->length : b->length);
    return order ? order : a->length != b->length ? a->length - b->length
           : a->space != b->space ? a->space - b->space : (a->id > b->id) - (a->id < b->id);
}

/* Sorted by kind, for commit_fresh; no key twice. */
static int sort(struct puts *p) {
    struct puts old = *p;
    int *fds = calloc(p->count + 1, sizeof *fds), twice = 0;
    uint8_t *kinds = calloc(p->count + 1, 1);
    struct kept **keys = calloc(p->count + 1, sizeof *keys);
    size_t at = 0;
    if (!fds || !kinds || !keys) return free(fds), free(kinds), free(keys), no_memory();
    memcpy(keys, p->keys, p->count * sizeof *keys);
    qsort(keys, p->count, sizeof *keys, by_key);
    for (size_t n = 1; n < p->count; n++) twice |= !by_key(&keys[n - 1], &keys[n]);
    for (int kind = SHARED; kind <= OWN; kind++)
        for (size_t n = 0; n < old.count; n++)
            if (old.kinds[n] == kind)
                keys[at] = old.keys[n], fds[at] = old.fds[n], kinds[at++] = old.kinds[n];
    p->keys = keys, p->fds = fds, p->kinds = kinds;
    free(old.keys), free(old.fds), free(old.kinds);
    return twice ? fail(CPRD_INVALID_INPUT, "a key twice in one change") : CPRD_OK;
}

static int change(cprd_live *l, const struct cprd_live_change *c, size_t count, int map) {
    struct puts p = {.count = 0};
    int rc = guard(l);
    size_t own = 0;
    if (rc || (rc = tidy(l)) || (rc = cprd__live_room(l, count))) return rc;
    p.keys = calloc(count + 1, sizeof *p.keys), p.gone = calloc(count + 1, sizeof *p.gone);
    p.fds = calloc(count + 1, sizeof *p.fds), p.made = calloc(count + 1, sizeof *p.made);
    p.kinds = calloc(count + 1, 1);
    if (!p.keys || !p.gone || !p.fds || !p.made || !p.kinds) rc = no_memory();
    for (size_t n = 0; n < count && !rc; n++) rc = add(l, &p, &c[n], map);
    if (!rc && count > 1) rc = sort(&p);
    for (size_t n = 0; n < p.count; n++) own += p.kinds[n] == OWN;
    for (size_t n = 0; n < l->count && own; n++)
        own += l->segments[n]->kind == OWN && l->segments[n]->count;
    if (!rc && own > MAX_OWN)
        rc = fail(CPRD_LIMIT_EXCEEDED, "more than %d descriptors that are neither socket, pipe nor"
                  " anonymous inode (files, memfds), and sections above 4 KiB; nothing was changed",
                  MAX_OWN);
    int done = !rc && p.count + p.gone_count;
    if (done) rc = commit(l, &p), done = !rc;
    for (size_t n = 0; n < p.count && !done; n++) cprd__kept_free(p.keys[n]);
    cprd__close_all(p.made, p.made_count);
    free(p.keys), free(p.gone), free(p.fds), free(p.made), free(p.kinds);
    if (done && (rc = tidy(l)) == CPRD_LIMIT_EXCEEDED)
        rc = fail(rc, "the change counts, but the kernel still holds what it ended (the next change"
                  " tries again): %s", last.text);
    return rc;
}

int cprd_live_change(cprd_live *l, const struct cprd_live_change *changes, size_t count) {
    return change(l, changes, count, -1);
}

int cprd_live_save_fd(cprd_live *l, const char *name, int32_t id, int fd) {
    return change(l, &(struct cprd_live_change){CPRD_SAVE_FD, name, id, fd, NULL, 0, 0}, 1, -1);
}
int cprd_live_delete_fd(cprd_live *l, const char *name, int32_t id) {
    return change(l, &(struct cprd_live_change){CPRD_DELETE_FD, name, id, -1, NULL, 0, 0}, 1, -1);
}
int cprd_live_save_section(cprd_live *l, const char *key, const void *data, size_t size,
                           int packed) {
    struct cprd_live_change one = {CPRD_SAVE_SECTION, key, 0, -1, data, size, packed};
    return change(l, &one, 1, -1);
}

int cprd_live_memory(cprd_live *l, const char *name, size_t size, void **out) {
    struct kept *k = *cprd__slot_of(l, MEMORY, name, strlen(name), 0);
    struct stat there = {.st_size = (off_t)size};
    int fd = k ? k->fd : -1, rc = guard(l);
    if (rc || (k && k->map && k->mapped == size)) return *out = rc ? NULL : k->map, rc;
    if (!size || (k && ((k->map && k->mapped != size) || fd < 0 || fstat(fd, &there) ||
                        (size_t)there.st_size != size)))
        return fail(CPRD_INVALID_INPUT, "memory '%s' has another size than %zu", name, size);
    struct map *map = malloc(sizeof *map);
    if (!map) return no_memory();
    if (!k && ((fd = memfd_create("cprd.memory", MFD_CLOEXEC | MFD_ALLOW_SEALING)) < 0 ||
               ftruncate(fd, (off_t)size) ||
               fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL)))
        rc = no_room("for memory", errno);
    map->at = rc ? MAP_FAILED : mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (!rc && (map->at == MAP_FAILED || madvise(map->at, size, MADV_DONTFORK)))
        rc = fail(CPRD_LIMIT_EXCEEDED, "cannot map memory '%s': %s", name, strerror(errno));
    if (!rc && !k) {
        struct cprd_live_change one = {CPRD_SAVE_FD, name, 0, fd, NULL, 0, 0};
        rc = change(l, &one, 1, fd);
        k = rc ? NULL : *cprd__slot_of(l, MEMORY, name, strlen(name), 0);
    }
    if (fd >= 0) close(fd); /* no descriptor stays: the mapping is all that this process has */
    if (k) k->fd = -1;
    if (rc) {
        if (map->at != MAP_FAILED) munmap(map->at, size);
        return free(map), rc;
    }
    map->size = size, map->next = l->maps, l->maps = map;
    k->map = map->at, k->mapped = size, *out = map->at;
    return CPRD_OK;
}

int cprd_live_clear(cprd_live *l) {
    int rc = guard(l);
    if (rc || (rc = write_root(l, 1))) return rc;
    for (size_t n = 0; n < l->count; n++) { /* a forked child may have an end */
        if (!rc) rc = cprd__drain(l, l->segments[n], l->segments[n]->records);
        cprd__segment_free(l->segments[n]);
    }
    l->count = 0, l->dirty = 0, l->holder = NULL;
    memset(l->current, 0, sizeof l->current);
    cprd__forget_keys(l);
    return rc;
}

size_t cprd_live_kept(const cprd_live *l) { return l->kept; }

static int set_root(cprd_live *l, int tx, int rx, uint64_t hold) {
    int size = 1 << 20;
    l->root = (struct segment){.tx = tx, .rx = rx}, l->owner = getpid();
    setsockopt(tx, SOL_SOCKET, SO_SNDBUF, &size, sizeof size);
    fcntl(tx, F_SETFL, O_APPEND), fcntl(rx, F_SETFL, O_APPEND);
    if (!l->hold) l->hold = hold;
    int rc = write_root(l, 0);
    if (rc) close(tx), close(rx), l->root.tx = l->root.rx = -1;
    return rc;
}

int cprd_live_take(cprd_live *l, int tx, int rx, uint64_t hold) {
    l->taken = 1;
    return set_root(l, tx, rx, hold);
}

int cprd_live_begin(int tx, int rx, uint64_t hold, cprd_live **out) {
    cprd_live *l = cprd__live_new();
    if (!l) return close(tx), close(rx), last.code;
    int rc = set_root(l, tx, rx, hold);
    if (rc) cprd__live_free(l);
    else *out = l;
    return rc;
}
