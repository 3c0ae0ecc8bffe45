/* What the owner of a live hold says to cprd. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "cprd_live_internal.h"
#include "cprd_request.h"

struct cprd__hold {
    struct ticket ticket;
    cprd *own;             /* a connection for this hold alone, or NULL */
    int found, live;       /* what was held: a live hold, or a saved state, in ... */
    int bundle;            /* ... this bundle */
    int tx, rx, parked;    /* both ends of the root, until an owner takes both; a copy to park */
    int known;             /* cprd knows our root */
    uint64_t connects;     /* of the connection by which cprd knows */
};

/* The header of a bundle whose only descriptor is the root of a live hold. */
static const unsigned char HEAD[HEADER] = "CPRB\2\0\3\1\1\0\0\0\1";

static struct packed root_of(const struct cprd__hold *w) {
    struct packed p = {.fds = (int *)(uintptr_t)&w->parked, .parked = 1, .depth = 1};
    memcpy(p.header, HEAD, HEADER);
    return p;
}

/* A root for whoever owns the hold, and a copy of the receiving end for cprd. */
static int make_root(struct cprd__hold *w) {
    if (w->parked >= 0) close(w->parked);
    w->parked = -1;
    if (cprd__pair(&w->tx, &w->rx)) return last.code;
    w->parked = fcntl(w->rx, F_DUPFD_CLOEXEC, 0);
    return w->parked < 0 ? no_room("for the root of a live hold", errno) : CPRD_OK;
}

static uint64_t random_number(void) {
    uint64_t number = 0;
    if (getrandom(&number, sizeof number, 0) != sizeof number || !number) return 1;
    return number;
}

static int begin(cprd_live *l) {
    struct cprd__hold *w = l->wire;
    int tx = w->tx, rx = w->rx;
    w->tx = w->rx = -1; /* the owner's, come what may */
    return cprd_live_take(l, tx, rx, random_number());
}

/* The root that lies in the bundle of a live hold. */
static int peek_root(int bundle, int *root) {
    unsigned char h[HEADER + 1];
    int fds[CPRD_SCM_MAX], seen, off = -1;
    size_t count;
    setsockopt(bundle, SOL_SOCKET, SO_PEEK_OFF, &off, sizeof off);
    ssize_t got = cprd__receive(bundle, h, sizeof h, MSG_PEEK, fds, &count, &seen);
    if (got < 0 && errno == ECONNRESET)
        got = cprd__receive(bundle, h, sizeof h, MSG_PEEK, fds, &count, &seen);
    if (got == HEADER && !memcmp(h, HEAD, HEADER) && count == 1) return *root = fds[0], CPRD_OK;
    if (got > 0) cprd__close_all(fds, count);
    if (got > 0 && seen & MSG_CTRUNC) return no_room("to read a live hold with", EMFILE);
    return fail(CPRD_DAMAGED, "not the bundle of a live hold");
}

/* Read what is held. *l is another object afterwards, where that was a live hold. */
static int read_bundle(cprd_live **l) {
    struct cprd__hold *w = (*l)->wire;
    cprd_live *read;
    int root = -1, rc;
    if (!w->live) return cprd__unpack(w->bundle, &(*l)->state);
    if ((rc = peek_root(w->bundle, &root))) return rc;
    rc = cprd_live_read(root, &read);
    close(root);
    if (rc) return rc;
    (*l)->wire = NULL;
    cprd__live_free(*l);
    read->wire = w, read->owner = getpid(), read->unconfirmed = 1, *l = read;
    return CPRD_OK;
}

int cprd__unpack_live(int bundle, cprd_state **out) {
    cprd_live *l = NULL;
    int root = -1, rc = peek_root(bundle, &root);
    if (!rc) rc = cprd_live_read(root, &l), close(root);
    for (size_t n = 0; !rc && n < l->slots; n++)
        for (struct kept *k = l->table[n]; k && !rc; k = k->chain) {
            char key[300];
            struct stat there;
            bytes content = {NULL, 0, 0, 0};
            int memfd = -1;
            if (k->op != MAPPED) continue;
            int length = snprintf(key, sizeof key, "memory.%.*s", k->length, k->name);
            void *map = fstat(k->fd, &there) ? MAP_FAILED
                        : mmap(NULL, (size_t)there.st_size, PROT_READ, MAP_SHARED, k->fd, 0);
            if (map == MAP_FAILED) rc = no_room("for memory", errno);
            else {
                content.at = map, content.size = (size_t)there.st_size;
                rc = cprd__memfd(key, &content, &memfd);
                munmap(map, content.size);
            }
            if (!rc) rc = cprd__own_section(l->state, key, (size_t)length, NULL, 0, memfd, 0);
            if (rc && memfd >= 0) close(memfd);
        }
    if (!rc) *out = l->state, l->state = NULL;
    cprd__live_free(l);
    return rc;
}

int cprd_live_open(cprd *c, const char *name, const struct cprd_load_options *o, cprd_live **out) {
    static const struct cprd_load_options none;
    struct call call = {.verb = "live"};
    struct answer a, ignored;
    cprd_live *l = cprd__live_new();
    struct cprd__hold *w = calloc(1, sizeof *w);
    *out = NULL;
    if (!l || !w) return cprd__live_free(l), free(w), no_memory();
    *w = (struct cprd__hold){.bundle = -1, .tx = -1, .rx = -1, .parked = -1};
    l->wire = w, l->owner = getpid();
    if (!o) o = &none;
    int rc = o->wait > 0 ? cprd_connect(c->path, &w->own) : CPRD_OK;
    if (w->own) w->own->timeout = c->timeout, c = w->own;
    if (!rc) rc = make_root(w);
    struct packed root = root_of(w);
    call.packed = &root, call.wait = o->wait;
    field_text(&call.fields, &call.count, "name", name);
    if (o->lease > 0) field_double(&call.fields, &call.count, "lease", o->lease);
    cprd__field_nonce(&call, NULL);
    point("live:before");
    if (rc) free(call.fields.at);
    else rc = cprd__request(c, &call, &a);
    if (!rc) rc = cprd__set_ticket(&w->ticket, c, name, &a);
    if (!rc) {
        point("live:answered");
        w->found = a.found, w->live = a.live, w->bundle = a.fd, w->connects = c->connects;
        w->known = !a.found, l->unconfirmed = a.found;
        rc = !w->found ? begin(l) : a.fd < 0 ? cprd__no_fd(&a) : read_bundle(&l);
        struct cprd_error why = last;
        if (rc && w->found)
            cprd__end(&w->ticket, "reject", why.text, rc == CPRD_DAMAGED ? 1 : -1, &ignored);
        last = why;
    } else w->ticket.over = 1;
    if (rc) cprd_live_close(l);
    else *out = l;
    return rc;
}

int cprd_live_found(const cprd_live *l) { return l->wire ? l->wire->found : l->state != NULL; }
cprd_state *cprd_live_state(cprd_live *l) { return l->state; }

/* Keep a saved state as the content of the new hold, which nobody knows yet. */
static int keep_saved(cprd_live *l) {
    enum { AT_ONCE = 2000 };
    struct cprd_live_change *all;
    cprd_state *s; /* all of it: the program may have taken some, and closed it */
    int rc = cprd__unpack(l->wire->bundle, &s);
    if (rc) return rc;
    size_t count = s->count + s->section_count;
    if (!(all = calloc(count + 1, sizeof *all))) rc = no_memory();
    for (size_t n = 0; n < count && !rc; n++)
        if (n < s->count)
            all[n] = (struct cprd_live_change){.op = CPRD_SAVE_FD, .name = s->keys[n].name,
                                               .id = s->keys[n].id, .fd = s->keys[n].fd};
        else {
            struct cprd_live_change *one = &all[n];
            one->op = CPRD_SAVE_SECTION, one->name = s->sections[n - s->count].key;
            rc = cprd_section(s, one->name, &one->data, &one->size, &one->packed);
        }
    l->unconfirmed = 0;
    for (size_t n = 0; n < count && !rc; n += AT_ONCE)
        rc = cprd_live_change(l, all + n, count - n < AT_ONCE ? count - n : AT_ONCE);
    l->unconfirmed = 1;
    free(all);
    cprd_state_free(s);
    return rc;
}

int cprd_live_confirm(cprd_live *l) {
    struct cprd__hold *w = l->wire;
    struct answer a;
    int rc = CPRD_OK;
    if (!w || w->known) return CPRD_OK;
    if (l->over) return fail(CPRD_FENCED, "'%s' is not this process's any more", w->ticket.name);
    if (l->root.tx < 0) { /* once: a repeated confirm parks the same root */
        if (w->tx < 0) rc = make_root(w);
        if (!rc) rc = begin(l);
        if (!rc && !w->live) rc = keep_saved(l);
    }
    if (rc) return rc;
    struct packed root = root_of(w);
    struct call call = cprd__call_of(&w->ticket, "confirm_next");
    cprd__fields_of_bundle(&call, &root);
    field_bool(&call.fields, &call.count, "live", 1);
    cprd__field_nonce(&call, w->ticket.nonces[0]);
    point("confirm:before");
    rc = cprd__request(w->ticket.c, &call, &a);
    if (rc == CPRD_FENCED) l->over = CPRD_FENCED;
    if (rc) return rc;
    if (a.fd >= 0) close(a.fd);
    w->known = 1, l->unconfirmed = 0, w->connects = w->ticket.c->connects;
    w->ticket.generation = a.generation, w->ticket.stored = a.stored;
    memcpy(w->ticket.token, a.token, sizeof a.token);
    close(w->bundle), w->bundle = -1;
    cprd_live_settle(l); /* at a limit the next change does it */
    point("confirm:answered");
    return CPRD_OK;
}

int cprd_live_socket(const cprd_live *l) { return l->wire ? l->wire->ticket.c->sock : -1; }

int cprd_live_check(cprd_live *l) {
    struct cprd__hold *w = l->wire;
    struct answer a;
    char byte;
    if (!w || !w->known || w->ticket.stored || w->ticket.over) return CPRD_OK;
    cprd *c = w->ticket.c;
    ssize_t got = c->sock < 0 ? 1 : recv(c->sock, &byte, 1, MSG_PEEK | MSG_DONTWAIT);
    if (!got || (got < 0 && errno != EAGAIN)) cprd__hang_up(c); /* cprd has ended */
    if (c->sock >= 0 && c->connects == w->connects) return CPRD_OK;
    struct packed root = root_of(w);
    struct call call = cprd__call_of(&w->ticket, "put_back");
    call.packed = &root;
    cprd__field_nonce(&call, NULL);
    point("put_back:before");
    int rc = cprd__request(c, &call, &a);
    if (rc == CPRD_FENCED || rc == CPRD_DENIED || rc == CPRD_NOT_HELD)
        return cprd__fenced(l, last.text);
    if (rc) return rc;
    if (a.fd >= 0) close(a.fd);
    w->connects = c->connects, w->ticket.generation = a.generation, w->ticket.stored = a.stored;
    memcpy(w->ticket.token, a.token, sizeof a.token);
    point("put_back:answered");
    return CPRD_OK;
}

/* The owner owns no more. */
static int say_end(struct cprd__hold *w, int keep, struct answer *a) {
    struct call call = cprd__call_of(&w->ticket, "end");
    field_bool(&call.fields, &call.count, "keep", keep);
    cprd__field_nonce(&call, w->ticket.nonces[1]);
    int rc = cprd__request(w->ticket.c, &call, a);
    if (!rc) w->ticket.over = 1;
    return rc;
}

int cprd_live_end(cprd_live *l) {
    struct answer a;
    int rc = l->wire && !l->wire->known
        ? fail(CPRD_INVALID_INPUT, "the predecessor's hold is not confirmed yet")
        : cprd_live_clear(l);
    if (!rc && l->wire) rc = say_end(l->wire, 0, &a);
    if (!rc) l->over = CPRD_NOT_HELD;
    return rc;
}

void cprd_live_close(cprd_live *l) {
    struct cprd_error before = last;
    struct cprd__hold *w = l ? l->wire : NULL;
    struct answer a;
    if (w && l->owner == getpid() && w->ticket.name && !w->ticket.over && l->over != CPRD_FENCED) {
        if (w->known) say_end(w, l->kept > 0, &a);
        else cprd__end(&w->ticket, "reject", "closed without confirm", 0, &a);
    }
    last = before;
    cprd__live_free(l);
    if (!w) return;
    if (w->bundle >= 0) close(w->bundle);
    if (w->tx >= 0) close(w->tx), close(w->rx);
    if (w->parked >= 0) close(w->parked);
    cprd_close(w->own);
    free(w->ticket.name), free(w);
}
