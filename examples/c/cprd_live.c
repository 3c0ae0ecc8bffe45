/* The owner of a live hold. cprd.h says how to use it, docs/bundle.md has the records.
 *
 * Keys lie in segments: queues that the root names. A change is one record: a CHANGE in a segment
 * that has room; or an ATTACH in the root, with fresh segments and all that ends. So deletions lie
 * in the root alone. A segment where something has become void is `dirty`: what counts there is
 * written anew, to its end or to other segments, then all before is drained. Until no segment is
 * dirty, keys that have ended stay in the table, and each rewritten root says so again. */
#define _GNU_SOURCE
#define CPRD_INTERNAL
#include "cprd.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "parts/live_read.c"

#ifndef CPRD_SMALL
#define CPRD_SMALL 0 /* 1, for tests: a few changes reach every step */
#endif
enum {
    SAVE_MEMORY = CPRD_DELETE_MEMORY + 1, /* a change that cprd_live_memory makes */
    OURS = 0x4350524c,                    /* SO_RCVLOWAT of our queues, which no hold keeps */
    MOST_OWN = 512,                       /* files and memfds: each has a segment of its own */
    INLINE = 4096,                        /* bytes of a section; a larger one gets a memfd */
    KEYS = CPRD_SMALL ? 2 : 16,           /* of a segment */
    RECORDS = CPRD_SMALL ? 3 : 16,        /* of a segment, before they become one */
    ROOT_RECORDS = CPRD_SMALL ? 3 : 200,  /* then the root is rewritten, ... */
    PART = CPRD_SMALL ? 2 : 200           /* ... so many segments and ended keys in a record */
};

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

static void prepare(const struct segment *q) {
    int mark = OURS, size = 1 << 20;
    setsockopt(q->rx, SOL_SOCKET, SO_RCVLOWAT, &mark, sizeof mark);
    setsockopt(q->tx, SOL_SOCKET, SO_RCVLOWAT, &mark, sizeof mark);
    setsockopt(q->tx, SOL_SOCKET, SO_SNDBUF, &size, sizeof size);
}

/* -- records ----------------------------------------------------------------------------------- */

/* Append a record. FENCED, LIMIT_EXCEEDED, INVALID_INPUT: it is not there. */
static int send_record(cprd_live *l, struct segment *q, uint64_t part, struct entry *e,
                       size_t count) {
    struct cprd__bytes b = {0};
    int fds[CPRD__SCM_MAX], full = q->records >= (part ? MOST_RECORDS : MOST_RECORDS / 2);
    size_t fd_count = 0;
    for (size_t n = 0; n < count; n++)
        if (e[n].fd >= 0) fds[fd_count++] = e[n].fd;
    q->own = count ? e->own : 0;
    encode(l, q, part, e, count, &b);
    int error = b.failed ? ENOMEM : b.size > MOST ? EMSGSIZE : full ? EAGAIN : 0;
    if (!error) error = cprd__send(q->tx, b.at, b.size, fds, fd_count);
    free(b.at);
    if (error == EPIPE || error == EPERM || error == ECONNRESET || error == ENOTCONN)
        return fenced(l, strerror(error));
    if (error) return error == EMSGSIZE ? too_large() : cprd__explain(error);
    cprd__point("live:sent");
    q->seq = ++l->seq;
    q->ordinal++;
    q->bytes += b.size;
    if (++q->records >= (q->is_root ? ROOT_RECORDS : RECORDS) || q->bytes > 2 * MOST)
        make_dirty(l, q);
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

/* Void all records of the root by new ones, that name all segments, and each key that has ended,
 * unless nothing of it can lie anywhere. */
static int write_root(cprd_live *l) {
    if (!l->dirty) forget(l, DELETE);
    size_t before = l->root.records, count = 0;
    struct entry *e = calloc(l->count + l->used + 1, sizeof *e);
    int rc = e ? CPRD_OK : cprd__no_memory();
    for (struct segment *s = l->segments; s && !rc; s = s->next)
        e[count++] = (struct entry){.op = SEGMENT, .key.id = s->id, .fd = s->rx};
    for (const struct entry *k = l->known; k && !rc; k = k->next)
        if (k->op >= DELETE) e[count++] = *k;
    size_t parts = count ? (count + PART - 1) / PART : 1;
    l->root.bytes = l->gone = 0;
    for (size_t part = 1, at = 0; part <= parts && !rc; part++, at += PART)
        rc = send_record(l, &l->root, part | parts << 16, e + at,
                         count - at < PART ? count - at : PART);
    free(e);
    if (!rc) rc = drain(l, &l->root, before);
    if (rc) return rc;
    l->root.dirty = 0;
    return CPRD_OK;
}

/* -- changes ----------------------------------------------------------------------------------- */

/* How many of the first entries go to one segment. */
static size_t group(const struct entry *e, size_t count) {
    size_t n = 0, size = HEADER;
    while (n < count && n < KEYS && e[n].op < DELETE && e[n].own == e->own) {
        size += 18 + e[n].key.length + e[n].value.iov_len;
        if (n && (size > MOST || e->own)) break;
        n++;
    }
    return n;
}

static int is_open(const struct segment *s) { return !s->dirty && s->tx >= 0 && !s->own; }

/* A segment with room for these; of a single key, the one where it lies. NULL: none. */
static struct segment *place(cprd_live *l, const struct entry *e, size_t count) {
    struct segment *s = count == 1 ? know(l, &e->key)->segment : NULL;
    if (e->own || group(e, count) < count) return NULL;
    if (s && is_open(s)) return s;
    for (s = l->segments; s && (s->count + count > KEYS || !is_open(s)); s = s->next) continue;
    return s;
}

/* Fresh segments for what is kept, attached by one record with all that ends. */
static int attach(cprd_live *l, struct entry *e, size_t count) {
    struct entry *all = calloc(count, sizeof *all);
    struct segment *before = l->segments, *s = NULL;
    size_t named = 0, at = 0, some;
    int rc = all ? CPRD_OK : cprd__no_memory();
    for (; !rc && (some = group(e + at, count - at)); at += some) {
        if (named == CPRD__SCM_MAX) rc = too_large();
        else if (!(s = segment_new(l)) || cprd__pair(&s->tx, &s->rx)) rc = cprd__last.code;
        if (rc) break;
        prepare(s);
        all[named++] = (struct entry){.op = SEGMENT, .key.id = s->id, .fd = s->rx};
        rc = send_record(l, s, 0, e + at, some);
        if (some < count && some <= KEYS / 2 && !s->own) make_dirty(l, s); /* so joins others */
    }
    if (!rc) memcpy(all + named, e + at, (count - at) * sizeof *all);
    if (!rc) rc = send_record(l, &l->root, 0, all, named + count - at);
    while (rc && l->segments != before) segment_free(l, l->segments);
    free(all);
    return rc;
}

/* Make the changes of entries, which are sorted by order(): by one record in `s`, or the root. */
static int commit(cprd_live *l, struct segment *s, struct entry *e, size_t count) {
    int rc = s ? send_record(l, s, 0, e, count) : attach(l, e, count);
    for (size_t n = 0; n < count && !rc; n++) note(l, &e[n]);
    return rc;
}

/* Write anew what counts in a dirty segment, few keys to another one, and let go of all that lay
 * there. What this process put into a segment of its own is never copied: to close a
 * copy of a file would end the POSIX locks of this process. */
static int rewrite(cprd_live *l, struct segment *s) {
    struct peeked p = {0};
    size_t count = 0, before = s->records;
    int rc = s->count ? peek(l, s, &p, 1) : CPRD_OK;
    for (size_t n = 0; n < p.count; n++) {
        struct entry e = p.at[n], *k = e.counts ? know(l, &e.key) : NULL;
        if (!k || k->segment != s || k->seq != e.seq) continue;
        p.at[n] = p.at[count];
        p.at[count++] = e;
    }
    if (rc == CPRD_DAMAGED || (!rc && count != s->count)) rc = fenced(l, "its queue was changed");
    if (!rc && count) {
        int stays = s->tx >= 0 && group(p.at, count) == count;
        struct segment *to = stays && count > KEYS / 2 ? s : place(l, p.at, count);
        rc = commit(l, to || !stays ? to : s, p.at, count);
    }
    let_go(&p); /* before the drain: so no close of a copy is the last one */
    if (!rc) rc = drain(l, s, before);
    if (rc) return rc;
    l->dirty--;
    s->dirty = 0;
    s->bytes = 0;
    l->gone += !s->count;
    if (!s->count) segment_free(l, s);
    return CPRD_OK;
}

/* Let go of what is void, and make one record of many. At a limit go on with the others: what needs
 * none makes room. */
static int tidy(cprd_live *l) {
    int rc = CPRD_OK, one;
    for (struct segment *s = l->segments, *next; s && l->dirty && rc != CPRD_FENCED; s = next) {
        next = s->next;
        one = s->dirty ? rewrite(l, s) : CPRD_OK;
        if (!one && !rc && l->root.dirty) one = write_root(l);
        rc = one ? one : rc;
    }
    if (!l->dirty && l->used - l->kept > PART) forget(l, DELETE);
    if (!rc && (l->root.dirty || l->gone > 8 + l->count / 4)) rc = write_root(l);
    return rc;
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

/* The entry of a change; op 0: there is nothing to do. *owns: keys in segments of their own. */
static int make_entry(cprd_live *l, const struct cprd_live_change *c, struct entry *e,
                      size_t *owns) {
    static const int ops[] = {SAVE, SAVE, DELETE, RAW, DELETE + 1, DELETE + 2, MAPPED};
    struct stat there = {0};
    int space = SPACES[ops[c->op]], mark = 0;
    socklen_t size = sizeof mark;
    int32_t id = space == CPRD__FD ? c->id : 0;
    *e = (struct entry){.key = cprd__key(space, c->name, strlen(c->name), id), .op = ops[c->op],
                        .fd = -1};
    if (cprd__check_name(&e->key)) return cprd__last.code;
    struct entry *k = know(l, &e->key);
    if (!k) return cprd__last.code;
    int is_kept = k->op < DELETE, is_new = c->op == CPRD_SAVE_FD;
    if ((is_kept && is_new) || k->change == l->changes)
        return cprd__fail(CPRD_INVALID_INPUT, "key (%s, %d) is used already%s", c->name, c->id,
                          is_new && is_kept ? "" : " in this change");
    k->change = l->changes;
    if (e->op >= DELETE && !is_kept) e->op = 0;
    if (!e->op || e->op >= DELETE) return CPRD_OK;
    e->birth = is_kept ? k->birth : ++l->birth;
    if (space == CPRD__SECTION) {
        e->op += (c->size > INLINE ? RAW_MEMFD - RAW : 0) + (c->packed != 0);
        e->own = c->size > INLINE;
        if (!e->own) e->value = (struct iovec){(void *)(uintptr_t)c->data, c->size};
        else if (cprd__memfd(c->name, c->data, c->size, &e->fd)) return cprd__last.code;
    } else {
        e->fd = c->fd;
        if (fstat(e->fd, &there))
            return cprd__fail(CPRD_INVALID_INPUT, "fd %d of (%s, %d) is not open", e->fd, c->name,
                              c->id);
        e->own = !S_ISSOCK(there.st_mode) && !S_ISFIFO(there.st_mode) && there.st_mode & S_IFMT;
        getsockopt(e->fd, SOL_SOCKET, SO_RCVLOWAT, &mark, &size);
        if (mark == OURS || (l->ticket.c && S_ISSOCK(there.st_mode) &&
                             cprd__cookie(e->fd) == l->ticket.c->cookie))
            return cprd__fail(CPRD_INVALID_INPUT, "fd %d is a socket of the live hold itself",
                              e->fd);
    }
    *owns += e->own && !(is_kept && k->segment->own);
    return CPRD_OK;
}

/* What is kept before what ends; what needs a segment of its own in between. */
static int order(const void *one, const void *other) {
    const struct entry *a = one, *b = other;
    return (a->op >= DELETE) * 2 + a->own - (b->op >= DELETE) * 2 - b->own;
}

int cprd_live_change(cprd_live *l, const struct cprd_live_change *c, size_t count) {
    size_t made = 0, owns = l->owns;
    int rc = guard(l);
    struct entry *e = rc ? NULL : calloc(count + 1, sizeof *e);
    if (!e) return rc ? rc : cprd__no_memory();
    l->changes++;
    for (size_t n = 0; n < count && !rc; n++)
        if (!(rc = make_entry(l, &c[n], &e[made], &owns))) made += e[made].op != 0;
    if (!rc && owns > l->owns && owns > MOST_OWN && !l->takes)
        rc = cprd__fail(CPRD_LIMIT_EXCEEDED, "more than %d files, memfds, devices and sections"
                        " above %d bytes; nothing was changed", MOST_OWN, INLINE);
    if (made) qsort(e, made, sizeof *e, order);
    if (!rc && made) rc = commit(l, place(l, e, made), e, made);
    for (size_t n = 0; n < made; n++) {
        if (e[n].key.space == CPRD__SECTION) cprd__close_all(&e[n].fd, 1);
        if (rc || !l->state || e[n].key.space != CPRD__FD) continue;
        int fd = cprd_take_fd(l->state, e[n].key.name, e[n].key.id); /* would keep the file open */
        cprd__close_all(&fd, 1);
    }
    free(e);
    if (rc || (rc = tidy(l)) != CPRD_LIMIT_EXCEEDED) return rc;
    return cprd__fail(rc, "the change counts, but the kernel still holds what it ended (the next"
                      " change tries again): %s", cprd__last.text);
}

int cprd_live_clear(cprd_live *l) {
    size_t before = l->root.records;
    int rc = guard(l);
    if (!rc) rc = send_record(l, &l->root, 1 | 1 << 16, NULL, 0); /* a ROOT that names nothing */
    if (!rc) rc = drain(l, &l->root, before);
    if (rc) return rc;
    l->kept = l->owns = 0;
    forget(l, 0);
    while (l->segments && !rc) { /* for a forked child may have an end */
        rc = drain(l, l->segments, l->segments->records);
        segment_free(l, l->segments);
    }
    return rc;
}

size_t cprd_live_kept(const cprd_live *l) { return l->kept; }

/* -- memory ------------------------------------------------------------------------------------ */

int cprd_live_memory(cprd_live *l, const char *name, size_t size, void **out) {
    struct cprd__key key = cprd__key(CPRD__MEMORY, name, strlen(name), 0);
    struct cprd_live_change one = {(enum cprd_live_op)SAVE_MEMORY, name, 0, -1, NULL, 0, 0};
    struct entry *k = NULL;
    struct iovec made;
    *out = NULL;
    if (guard(l) || cprd__check_name(&key) || !(k = know(l, &key)))
        return cprd__last.code;
    if (!size || (k->op == MAPPED && k->map.iov_len != size))
        return cprd__fail(CPRD_INVALID_INPUT, "memory '%s' has another size than %zu", name, size);
    if ((*out = k->map.iov_base)) return CPRD_OK;
    int fd = one.fd = memfd_create("cprd.memory", MFD_CLOEXEC | MFD_ALLOW_SEALING), rc = CPRD_OK;
    if (fd < 0 || ftruncate(fd, (off_t)size) ||
        fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL))
        rc = cprd__no_room("for memory");
    if (!rc) rc = map(l, fd, size, &made);
    if (!rc) {
        rc = cprd_live_change(l, &one, 1);
        k = know(l, &key);
        if (k && k->op == MAPPED) { /* it counts, also at a limit of what the change ended */
            *out = made.iov_base;
            k->map = made;
            rc = CPRD_OK;
        } else munmap(l->maps[--l->map_count].iov_base, size);
    }
    cprd__close_all(&fd, 1); /* the mapping is all that this process has */
    return rc;
}

/* -- begin and end ----------------------------------------------------------------------------- */

static void live_free(cprd_live *l) {
    cprd__close_all((int[]){l->root.tx, l->root.rx}, 2);
    cprd__close(&l->ticket);
    clean(l);
    free(l);
}

/* Owns `tx` and `rx`, also on failure. NULL: no memory. */
static cprd_live *live_new(int tx, int rx, uint64_t hold) {
    cprd_live *l = calloc(1, sizeof *l);
    if (!l) cprd__close_all((int[]){tx, rx}, 2);
    if (!l) cprd__no_memory();
    if (!l) return NULL;
    *l = (cprd_live){.hold = hold, .owner = getpid()};
    l->root = (struct segment){.tx = tx, .rx = rx, .is_root = 1};
    l->packed = (struct cprd__packed){.fds = &l->root.rx, .parked = 1, .depth = 1};
    memcpy(l->packed.header, LIVE_HEAD, CPRD__HEADER);
    prepare(&l->root);
    return l;
}

int cprd_live_take(int root, int tx, int rx, uint64_t hold, cprd_live **out) {
    cprd_live *l = *out = live_new(tx, rx, hold);
    int rc = l ? CPRD_OK : cprd__last.code;
    if (!rc && root >= 0 && !(rc = read_hold(l, root))) rc = write_root(l);
    if (l && rc) live_free(l);
    if (rc) *out = NULL;
    return rc;
}

/* What was saved, into the new root, which nobody knows yet. */
static int take_in(cprd_live *l, cprd_state *s) {
    const struct cprd_item *item;
    int rc = CPRD_OK;
    l->takes = 1; /* whole, however many large sections */
    for (size_t n = 0; !rc && (item = cprd_item_at(s, n)); n++) {
        struct cprd_live_change one = {item->is_section ? CPRD_SAVE_SECTION : CPRD_SAVE_FD,
                                       item->name, item->id, item->fd, item->data, item->size,
                                       item->packed};
        rc = cprd_live_change(l, &one, 1);
    }
    l->takes = 0;
    l->state = s;
    return rc;
}

int cprd_live_open(cprd *c, const char *name, const struct cprd_load_options *options,
                   cprd_live **out) {
    struct cprd__answer a;
    cprd_state *saved = NULL;
    uint64_t hold;
    int tx, rx, root = -1;
    *out = NULL;
    if (getrandom(&hold, sizeof hold, 0) != sizeof hold || cprd__pair(&tx, &rx))
        return cprd__no_room("for the root of a live hold");
    cprd_live *l = live_new(tx, rx, hold | 1);
    if (!l) return cprd__last.code;
    int rc = cprd__claim(&l->ticket, c, "live", name, options, &l->packed, &a);
    uint64_t found = rc ? 0 : cprd__number(a.of, "found", 0);
    uint64_t live = rc ? 0 : cprd__number(a.of, "live", 0);
    if (!rc) {
        cprd__point("live:answered");
        l->connects = cprd__connects(l->ticket.c);
        if (found && a.fd < 0) rc = cprd__no_fd(&a);
        else if (found && !live) rc = cprd_unpack(a.fd, &saved);
        else if (found) rc = root_of(a.fd, &root);
        if (root >= 0) rc = read_hold(l, root);
        if (!rc && found) rc = saved ? take_in(l, saved) : write_root(l);
        cprd__close_all((int[]){a.fd, root}, 2);
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
