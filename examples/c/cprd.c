/* Bundles and the protocol. See cprd.h for the use, docs/protocol.md and docs/bundle.md for the
 * bytes. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "cprd_request.h"

enum {
    VERSION = 2,
    MAX_REQUEST = 16 * 1024,
    INLINE = 16 * 1024, /* bytes of a section; a larger one gets a memfd */
    MAX_MANIFEST = 256 << 20,
    LEAF = 1,
    NODE = 2,
    LOST = -1 /* the connection ended: the request may be sent again on another one */
};
static const double MUTE = 20, RETRY_FOR = 15, SERVED = 1; /* s */

/* -- a bundle ---------------------------------------------------------------------------------- */

static void make_header(unsigned char *h, int depth, size_t here, size_t total, uint64_t size,
                        uint64_t index) {
    memcpy(h, "CPRB\1\0", 6);
    h[6] = depth ? NODE : LEAF, h[7] = (unsigned char)depth;
    little_endian(h + 8, here, 4), little_endian(h + 12, total, 4);
    little_endian(h + 16, size, 8), little_endian(h + 24, index, 8);
}

static void packed_free(struct packed *p) {
    cprd__close_all(p->made, p->made_count);
    free(p->made), free(p->fds);
}

/* The kernel's errno for a message with descriptors of a state. */
static int explain(int error, const cprd_state *s) {
    for (size_t n = 0; error == EBADF && n < s->count; n++)
        if (fcntl(s->keys[n].fd, F_GETFD) < 0)
            return fail(CPRD_INVALID_INPUT, "fd %d of (%s, %d) is not open (any more)",
                        s->keys[n].fd, s->keys[n].name, s->keys[n].id);
    if (error == EINVAL)
        return fail(CPRD_INVALID_INPUT, "a descriptor of the state cannot be passed to another"
                    " process (the kernel refuses some kinds, io_uring for one)");
    if (error == ETOOMANYREFS)
        return fail(CPRD_LIMIT_EXCEEDED, "too many descriptors in flight for this uid: all that its"
                    " processes have parked counts against RLIMIT_NOFILE; raise the hard limit"
                    " (LimitNOFILE=, ulimit -Hn), or drop holds of this uid (cprctl list)");
    return fail(CPRD_LIMIT_EXCEEDED, "cannot park the descriptors: %s", strerror(error));
}

/* Every descriptor is open, and none is the connection itself: a bundle may not hold itself. */
static int check_fds(const cprd_state *s, int connection) {
    struct stat ours, theirs;
    int known = !fstat(connection, &ours);
    for (size_t n = 0; n < s->count; n++) { /* O_APPEND marks connections: no file is touched */
        int flags = fcntl(s->keys[n].fd, F_GETFL);
        if (flags < 0) return explain(EBADF, s);
        if (known && flags & O_APPEND && !fstat(s->keys[n].fd, &theirs) &&
            ours.st_ino == theirs.st_ino && ours.st_dev == theirs.st_dev)
            return fail(CPRD_INVALID_INPUT, "(%s, %d): fd %d is the connection to cprd itself",
                        s->keys[n].name, s->keys[n].id, s->keys[n].fd);
    }
    return CPRD_OK;
}

/* The manifest and the memfds of large sections, as the first of p->fds. */
static int pack_sections(const cprd_state *s, struct packed *p, size_t *count) {
    bytes manifest = {0}, ids = {0}, joined = {0};
    *count = 1;
    put(&manifest, "\x83", 1);
    put_text(&manifest, "sections");
    put_number(&manifest, 0xdd, s->section_count, 4);
    int rc = CPRD_OK;
    for (size_t n = 0; n < s->section_count && !rc; n++) {
        const struct cprd__section *section = &s->sections[n];
        size_t size;
        int memfd = section->memfd;
        if ((rc = section_size(section, &size))) break;
        p->size += size;
        if (memfd < 0 && size > INLINE) {
            if ((rc = cprd__memfd(section->key, &section->content, &memfd))) break;
            p->made[p->made_count++] = memfd;
        }
        if (memfd >= 0) p->fds[(*count)++] = memfd;
        put_number(&manifest, 0x94, 0, 0);
        put_text(&manifest, section->key);
        put_number(&manifest, section->packed ? 1 : 0, 0, 0);
        put_number(&manifest, memfd >= 0, 0, 0);
        put_binary(&manifest, section->content.at, memfd >= 0 ? 0 : size);
    }
    for (size_t n = 0; n < s->count; n++) {
        unsigned char id[4];
        little_endian(id, (uint32_t)s->keys[n].id, 4);
        put(&ids, id, 4);
        put(&joined, s->keys[n].name, strlen(s->keys[n].name) + (n + 1 < s->count));
        p->fds[*count + n] = s->keys[n].fd;
    }
    *count += s->count;
    put_text(&manifest, "ids"), put_binary(&manifest, ids.at, ids.size);
    put_text(&manifest, "names"), put_binary(&manifest, joined.at, joined.size);
    if (!rc && (manifest.failed || ids.failed || joined.failed)) rc = no_memory();
    if (!rc && manifest.size > MAX_MANIFEST)
        rc = fail(CPRD_LIMIT_EXCEEDED, "keys and small sections exceed %d bytes", MAX_MANIFEST);
    if (!rc && !(rc = cprd__memfd("cprd-manifest", &manifest, &p->fds[0])))
        p->made[p->made_count++] = p->fds[0];
    free(manifest.at), free(ids.at), free(joined.at);
    return rc;
}

static int pack(const cprd_state *s, int connection, struct packed *p) {
    *p = (struct packed){.fd_count = s->count};
    size_t most = 1 + s->section_count + s->count, count;
    p->fds = calloc(most, sizeof(int));
    p->made = calloc(1 + s->section_count + 3 * (most / CPRD_SCM_MAX + 4), sizeof(int));
    if (!p->fds || !p->made) return no_memory();
    if (check_fds(s, connection) || pack_sections(s, p, &count)) return last.code;
    point("pack:manifest");
    size_t total = count;
    /* Whole leaves first, then nodes above them until one message is enough. The totals of full
     * subtrees follow from their depth; only the last one of a level has less. */
    size_t each = 1; /* descriptors below each of p->fds, the last one apart */
    while (count > CPRD_SCM_MAX) {
        size_t above = 0, below = each * CPRD_SCM_MAX;
        if (p->depth == 2) return fail(CPRD_LIMIT_EXCEEDED, "%zu descriptors: too many", total);
        for (size_t start = 0; start < count; start += CPRD_SCM_MAX, above++) {
            size_t here = count - start < CPRD_SCM_MAX ? count - start : CPRD_SCM_MAX;
            size_t held = start * each + below <= total ? below : total - start * each;
            unsigned char header[HEADER];
            int tx, rx;
            make_header(header, p->depth, here, held, 0, above);
            if (cprd__pair(&tx, &rx)) return last.code;
            p->made[p->made_count++] = rx;
            int error = cprd__send(tx, header, HEADER, p->fds + start, here);
            close(tx);
            if (error) return explain(error, s);
            point("pack:sent");
            p->fds[above] = rx; /* what lay there is parked by now */
        }
        count = above, each = below, p->depth++;
    }
    p->parked = count;
    make_header(p->header, p->depth, count, total, p->size, 0);
    return CPRD_OK;
}

/* `got` bytes of a node's header, which should be of that depth and place. */
static int check_header(const unsigned char *h, ssize_t got, int depth, uint64_t index) {
    size_t here = number_at(h + 8, 4), total = number_at(h + 12, 4);
    if (got >= 6 && !memcmp(h, "CPRB", 4) && number_at(h + 4, 2) != 1)
        return fail(CPRD_BUSY, number_at(h + 4, 2) == 2 && h[6] == 3
                    ? "what is held is a live hold: link cprd_hold.c, too"
                    : "a bundle of a later version; this program reads version 1: upgrade it");
    if (got != HEADER || memcmp(h, "CPRB", 4) || !here || here > CPRD_SCM_MAX || h[7] > 2 ||
        h[6] != (h[7] ? NODE : LEAF) || (h[7] ? total < here : total != here) ||
        h[7] != depth || number_at(h + 24, 8) != index)
        return fail(CPRD_DAMAGED, "a part of the bundle has no header that makes sense");
    return CPRD_OK;
}

/* One node of a bundle and all below it; appends to `out`, which has room for `most`. */
static int peek_node(int fd, int depth, uint64_t index, int *out, size_t *count, size_t most) {
    unsigned char h[HEADER + 1] = {0};
    int fds[CPRD_SCM_MAX], seen, off = -1, rc = CPRD_DAMAGED;
    size_t some, before = *count, used = 0;
    setsockopt(fd, SOL_SOCKET, SO_PEEK_OFF, &off, sizeof off);
    ssize_t got = cprd__receive(fd, h, sizeof h, MSG_PEEK, fds, &some, &seen);
    if (got < 0 && errno == ECONNRESET) /* said once: its sender left something unread */
        got = cprd__receive(fd, h, sizeof h, MSG_PEEK, fds, &some, &seen);
    if (got < 0)
        return fail(CPRD_DAMAGED, "a part of the bundle cannot be read: %s", strerror(errno));
    size_t here = number_at(h + 8, 4), total = number_at(h + 12, 4);
    int fault = check_header(h, got, depth, index);
    if (fault) rc = fault;
    else if (cprd__waiting(fd) != HEADER)
        fail(rc, "a part of the bundle has more than one message");
    else if (seen & MSG_CTRUNC) /* a limit of this process; what is held is whole */
        rc = no_room("to load with (what is held stays held)", EMFILE);
    else if (some != here || total > most - before)
        fail(rc, "a part of the bundle says %zu descriptors, has %zu", here, some);
    else if (!depth) {
        memcpy(out + before, fds, some * sizeof(int));
        return *count += some, CPRD_OK;
    } else {
        rc = CPRD_OK;
        for (; used < some && !rc; used++) {
            rc = peek_node(fds[used], depth - 1, used, out, count, before + total);
            close(fds[used]);
        }
        if (!rc && *count != before + total)
            rc = fail(CPRD_DAMAGED, "the bundle says %zu descriptors, has %zu", total,
                      *count - before);
    }
    cprd__close_all(fds + used, some - used);
    return rc;
}

/* The state of the descriptors of a bundle. *taken: those that are the state's by now. */
static int read_manifest(cprd_state *s, struct reader *r, const int *fds, size_t count,
                         size_t *taken) {
    struct value v = next(r), names = {.kind = NIL}, ids = {.kind = NIL};
    if (v.kind != MAP || v.number > 16) r->bad = 1;
    for (uint64_t parts = v.number; parts-- && !r->bad;) {
        struct value part = next(r);
        if (part.kind >= ARRAY || (part.kind == TEXT && !is_utf8(part.data, part.size))) r->bad = 1;
        else if (is(&part, "names")) names = next(r);
        else if (is(&part, "ids")) ids = next(r);
        else if (!is(&part, "sections")) skip(r); /* of a later version, which allows that */
        else {
            struct value list = next(r);
            if (list.kind != ARRAY || list.number > CPRD_MAX_SECTIONS) r->bad = 1;
            for (uint64_t left = list.number; left-- && !r->bad;) {
                struct value one = next(r), key = next(r), packed = next(r), memfd = next(r),
                             data = next(r);
                if (one.kind != ARRAY || one.number != 4 || key.kind != TEXT || r->bad ||
                    packed.kind < BOOL || packed.kind > INT || memfd.kind < BOOL ||
                    memfd.kind > INT || data.kind != BINARY ||
                    (memfd.number && (*taken + 1 >= count || !cprd__is_sealed(fds[*taken + 1]))))
                    r->bad = 1;
                else if (cprd__own_section(s, (const char *)key.data, key.size, data.data,
                                           memfd.number ? 0 : data.size,
                                           memfd.number ? fds[*taken + 1] : -1, packed.number != 0))
                    return last.code == CPRD_INVALID_INPUT ? CPRD_DAMAGED : last.code;
                else if (memfd.number) ++*taken;
            }
        }
    }
    size_t left = count - 1 - *taken;
    if (r->bad || r->at != r->end || names.kind != BINARY || ids.kind != BINARY ||
        ids.size != 4 * left)
        return fail(CPRD_DAMAGED, "the manifest cannot be read, or names other descriptors than"
                    " there are");
    const char *at = (const char *)names.data, *end = at + names.size;
    if (!left && names.size) return fail(CPRD_DAMAGED, "the manifest names too many descriptors");
    for (size_t n = 0; n < left; n++) {
        const char *stop = memchr(at, 0, (size_t)(end - at));
        if (!stop == (n + 1 < left))
            return fail(CPRD_DAMAGED, "the manifest does not name all descriptors");
        size_t length = (size_t)((stop ? stop : end) - at);
        int32_t id = (int32_t)number_at(ids.data + 4 * n, 4);
        if (cprd__own_fd(s, at, length, id, fds[1 + *taken])) return last.code;
        ++*taken, at += length + 1;
    }
    return CPRD_OK;
}

/* `bundle` is borrowed, and stays as it is. */
int cprd__unpack(int bundle, cprd_state **out) {
    unsigned char h[HEADER + 1] = {0};
    struct stat there;
    int off = -1;
    setsockopt(bundle, SOL_SOCKET, SO_PEEK_OFF, &off, sizeof off);
    ssize_t got = recv(bundle, h, sizeof h, MSG_PEEK | MSG_DONTWAIT);
    if (got < 0 && errno == ECONNRESET) got = recv(bundle, h, sizeof h, MSG_PEEK | MSG_DONTWAIT);
    if (check_header(h, got, h[7], number_at(h + 24, 8))) return last.code;
    size_t total = number_at(h + 12, 4), count = 0, taken = 0;
    if (total + 8 > cprd__soft_limit())
        return fail(CPRD_LIMIT_EXCEEDED, "%zu descriptors do not fit in this process: its soft"
                    " RLIMIT_NOFILE is %llu; raise it before loading (setrlimit, ulimit -n,"
                    " LimitNOFILE=); what is held stays held", total,
                    (unsigned long long)cprd__soft_limit());
    int *fds = calloc(total + 1, sizeof(int));
    cprd_state *s = cprd_state_new();
    int rc = fds && s ? peek_node(bundle, h[7], number_at(h + 24, 8), fds, &count, total)
                      : no_memory();
    point("load:peeked");
    void *map = MAP_FAILED;
    if (!rc && (!cprd__is_sealed(fds[0]) || fstat(fds[0], &there) || !there.st_size ||
                there.st_size > MAX_MANIFEST))
        rc = fail(CPRD_DAMAGED, "the manifest of the bundle is not a sealed memfd");
    else if (!rc && (map = mmap(NULL, (size_t)there.st_size, PROT_READ, MAP_PRIVATE, fds[0], 0)) ==
                        MAP_FAILED)
        rc = no_memory();
    if (!rc) {
        struct reader r = {map, (unsigned char *)map + there.st_size, 0};
        rc = read_manifest(s, &r, fds, count, &taken);
        if (rc == CPRD_INVALID_INPUT) rc = fail(CPRD_DAMAGED, "%s", last.text);
    }
    if (map != MAP_FAILED) munmap(map, (size_t)there.st_size);
    if (count) close(fds[0]), cprd__close_all(fds + 1 + taken, count - 1 - taken);
    free(fds);
    if (rc) cprd_state_free(s);
    else *out = s;
    return rc;
}

/* -- requests ---------------------------------------------------------------------------------- */

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}
static void pause_for(double seconds) { poll(NULL, 0, (int)(seconds * 1000)); }

void cprd__hang_up(cprd *c) {
    if (c->sock >= 0) close(c->sock);
    c->sock = -1;
}

static void read_fields(struct reader *r, struct answer *a) {
    struct value map = next(r);
    if (map.kind != MAP) r->bad = 1;
    for (uint64_t left = map.number; left-- && !r->bad;) {
        struct value key = next(r);
        if (is(&key, "holds")) {
            a->holds = *r;
            skip(r);
            a->holds.end = r->at;
            continue;
        }
        struct reader after = *r;
        struct value v = next(r);
        if (v.kind == ARRAY || v.kind == MAP) *r = after, skip(r);
        else if (is(&key, "generation")) a->generation = v.number;
        else if (is(&key, "attempts")) a->attempts = v.number;
        else if (is(&key, "pid")) a->pid = v.number;
        else if (is(&key, "version")) a->version = v.number;
        else if (is(&key, "more")) a->more = v.kind == UINT ? v.number : 0;
        else if (is(&key, "lease")) a->lease = seconds_of(&v);
        else if (is(&key, "found")) a->found = v.number != 0;
        else if (is(&key, "live")) a->live = v.number != 0;
        else if (is(&key, "last_end")) copy_text(a->last_end, sizeof a->last_end, &v);
        else if (is(&key, "kept")) a->stored = is(&v, "store");
        else if (is(&key, "last_reject")) copy_text(a->last_reject, sizeof a->last_reject, &v);
        else if (is(&key, "token") && v.size == 16) memcpy(a->token, v.data, 16);
    }
}

/* One answer. Returns OK (a->code is what cprd says), or PROTOCOL_ERROR. */
static int read_answer(struct reader r, struct answer *a) {
    struct value map = next(&r), v, code = {.kind = NIL};
    struct cprd_error said = {.pid = -1, .until = -1};
    int ok = 0;
    if (map.kind != MAP) r.bad = 1;
    for (uint64_t left = map.number; left-- && !r.bad;) {
        struct value key = next(&r);
        if (is(&key, "ok")) {
            read_fields(&r, a), ok = 1;
            continue;
        }
        v = next(&r);
        if (v.kind == ARRAY || v.kind == MAP) r.bad = 1;
        else if (is(&key, "id")) a->id = v.number;
        else if (is(&key, "error")) code = v;
        else if (is(&key, "why")) copy_text(said.text, sizeof said.text, &v);
        else if (is(&key, "phase")) copy_text(said.phase, sizeof said.phase, &v);
        else if (is(&key, "pid") && v.kind == UINT) said.pid = (int64_t)v.number;
        else if (is(&key, "until")) said.until = seconds_of(&v);
    }
    if (r.bad || (!ok && code.kind != TEXT))
        return fail(CPRD_PROTOCOL_ERROR, "an answer of cprd that cannot be read");
    if (!ok) {
        said.code = CPRD_ERROR;
        for (int n = 1; n <= CPRD_INVALID_INPUT; n++)
            if (is(&code, cprd__names[n])) said.code = n;
        last = said, a->code = said.code;
    }
    return CPRD_OK;
}

static int await(int sock, short event, double until) {
    struct pollfd one = {sock, event, 0};
    for (;;) {
        double left = until - now();
        int ready = poll(&one, 1, left <= 0 ? 0 : left > 1e6 ? 1000000000 : (int)(left * 1000) + 1);
        if (ready > 0) return CPRD_OK;
        if (ready < 0 ? errno != EINTR : left <= 0)
            return fail(CPRD_TIMEOUT, "cprd accepted the connection and has not answered in time");
    }
}

/* Send a request and receive the answer to it. OK: an answer came, see a->code; LOST; TIMEOUT;
 * PROTOCOL_ERROR. */
static int ask(cprd *c, const struct call *call, double until, double elapsed, struct answer *a) {
    bytes m = {0};
    int n = 0, error, rc, fds[CPRD_SCM_MAX], seen, over = 0;
    size_t count;
    put_number(&m, 0xdf, (uint64_t)call->count + 2 + (call->wait > 0), 4);
    field_text(&m, &n, "verb", call->verb), field_uint(&m, &n, "id", ++c->id);
    if (call->wait > 0)
        field_double(&m, &n, strcmp(call->verb, "wait") ? "wait" : "timeout",
                     elapsed < call->wait ? call->wait - elapsed : 0);
    put(&m, call->fields.at, call->fields.size);
    rc = m.failed || call->fields.failed ? no_memory() : CPRD_OK;
    if (m.size > MAX_REQUEST)
        rc = fail(CPRD_INVALID_INPUT, "%s: arguments exceed %d bytes", call->verb, MAX_REQUEST);
    while (!rc && (error = cprd__send(c->sock, m.at, m.size, NULL, 0)) && !over)
        if (error == EAGAIN || error == EINTR) rc = await(c->sock, POLLOUT, until);
        else over = 1; /* cprd has hung up: it may have said why */
    free(m.at);
    while (!rc) {
        if (!over && (rc = await(c->sock, POLLIN, until))) break;
        uint64_t soft, hard;
        *a = (struct answer){.fd = -1};
        cprd__raise_limit(&soft, &hard); /* for the descriptor of the answer alone */
        ssize_t got = cprd__receive(c->sock, c->in, sizeof c->in, 0, fds, &count, &seen);
        if (got < 0 && errno == ECONNRESET) /* said once: cprd left something unread */
            got = cprd__receive(c->sock, c->in, sizeof c->in, 0, fds, &count, &seen);
        cprd__restore_limit(soft);
        if (got < 0 && !over && (errno == EAGAIN || errno == EINTR)) continue;
        if (got <= 0) return cprd__close_all(fds, count), LOST;
        if (seen & MSG_TRUNC) rc = fail(CPRD_PROTOCOL_ERROR, "an answer longer than 64 KiB");
        if (!rc) rc = read_answer((struct reader){c->in, c->in + got, 0}, a);
        if (rc || (a->id && a->id != c->id)) { /* the late answer to a request given up */
            cprd__close_all(fds, count);
            continue;
        }
        if (count) a->fd = fds[0], cprd__close_all(fds + 1, count - 1);
        a->cut = (seen & MSG_CTRUNC) != 0;
        return CPRD_OK;
    }
    return rc;
}

static int greet(cprd *c, double until) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    struct answer a;
    struct call hello = {.verb = "hello"};
    double left = until - now() > 0.001 ? until - now() : 0.001;
    struct timeval time = {(time_t)left, (suseconds_t)((left - floor(left)) * 1e6)};
    memcpy(address.sun_path, c->path, sizeof c->path);
    uint64_t soft, hard;
    cprd__raise_limit(&soft, &hard);
    c->sock = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    cprd__restore_limit(soft);
    if (c->sock < 0) return no_room("to connect to cprd with", EMFILE);
    setsockopt(c->sock, SOL_SOCKET, SO_SNDTIMEO, &time, sizeof time); /* of connect() */
    if (connect(c->sock, (struct sockaddr *)&address, sizeof address)) {
        int error = errno;
        cprd__hang_up(c);
        if (error == EACCES || error == EPERM)
            return fail(CPRD_DENIED, "no permission to connect to %s", c->path);
        return fail(CPRD_UNAVAILABLE, "no cprd answers at %s (%s): start it, or name its socket"
                    " with $CPRD_SOCKET", c->path,
                    error == EAGAIN ? "nobody accepts" : strerror(error));
    }
    fcntl(c->sock, F_SETFL, O_APPEND); /* means nothing to a socket: check_fds knows it by that */
    field_uint(&hello.fields, &hello.count, "version", VERSION);
    int rc = ask(c, &hello, until, 0, &a);
    free(hello.fields.at);
    if (!rc && a.code) rc = a.code;
    if (!rc && a.version != VERSION)
        rc = fail(CPRD_PROTOCOL_ERROR, "cprd speaks version %d of the protocol, this program %d",
                  (int)a.version, VERSION);
    if (!rc && a.fd >= 0) close(a.fd);
    if (rc) cprd__hang_up(c);
    else c->pid = a.pid, c->connects++;
    return rc;
}

/* Why an answer brought no descriptor. */
int cprd__no_fd(const struct answer *a) {
    if (a->cut) return no_room("to receive a queue of cprd with (what is held stays held)", EMFILE);
    return fail(CPRD_PROTOCOL_ERROR, "an answer of cprd without a descriptor");
}

/* Park the root in a queue of the daemon, then send the request that speaks of it. The sending end
 * is closed in the end: so what was parked and not saved is let go of. */
static int ask_parked(cprd *c, const struct call *call, double until, struct answer *a) {
    const struct call queue = {.verb = "queue"};
    int rc = ask(c, &queue, until, 0, a);
    if (rc || a->code) return rc;
    if (a->fd < 0) return a->code = cprd__no_fd(a), CPRD_OK;
    int inlet = a->fd, error = cprd__send(inlet, call->packed->header, HEADER, call->packed->fds,
                                          call->packed->parked);
    a->fd = -1;
    if (error == EPIPE || error == ECONNRESET) rc = LOST;
    else if (error) rc = a->code = explain(error, call->state), rc = CPRD_OK;
    else point("pack:parked"), rc = ask(c, call, until, 0, a);
    close(inlet);
    return rc;
}

/* A request is repeated on another connection where one is lost: its nonce makes it one request. */
int cprd__request(cprd *c, struct call *call, struct answer *a) {
    double began = now(), until = began + call->wait + c->timeout, give_up = 0;
    int rc = c->owner == getpid() ? CPRD_OK
             : fail(CPRD_INVALID_INPUT, "this connection belongs to the parent process");
    while (!rc) {
        double tried = now();
        int was_open = c->sock >= 0;
        rc = was_open ? CPRD_OK : greet(c, until);
        if (!rc) {
            rc = call->packed ? ask_parked(c, call, until, a)
                              : ask(c, call, until, tried - began, a);
            if (!rc) break;
        }
        if (rc == CPRD_INVALID_INPUT || rc == CPRD_LIMIT_EXCEEDED) break; /* nothing was sent */
        cprd__hang_up(c);
        if (rc != LOST && rc != CPRD_UNAVAILABLE) break;
        if (now() - tried > SERVED || !give_up) /* the daemon was there in between */
            give_up = now() + (c->timeout < RETRY_FOR ? c->timeout : RETRY_FOR);
        if (now() >= (give_up < until ? give_up : until)) {
            rc = rc == LOST ? fail(CPRD_UNAVAILABLE, "no answer: the connection is lost") : rc;
            break;
        }
        if (!was_open) pause_for(0.05);
        rc = CPRD_OK;
    }
    free(call->fields.at);
    if (!rc && a->code && a->fd >= 0) close(a->fd);
    return rc ? rc : a->code;
}

int cprd_connect(const char *path, cprd **out) {
    if (!path && (!(path = getenv("CPRD_SOCKET")) || !*path)) path = "/run/cprd/cprd.sock";
    cprd *c = calloc(1, sizeof *c);
    if (!c) return no_memory();
    *c = (cprd){.sock = -1, .owner = getpid(), .timeout = MUTE};
    int rc = LOST;
    if (strlen(path) >= sizeof c->path)
        rc = fail(CPRD_INVALID_INPUT, "a socket's path has less than %zu bytes", sizeof c->path);
    else strcpy(c->path, path);
    for (int tries = 6; rc == LOST && tries; tries--) /* each may have met a killed cprd */
        if ((rc = greet(c, now() + MUTE)) == LOST) pause_for(0.05);
    if (rc == LOST) rc = fail(CPRD_UNAVAILABLE, "cprd at %s closed the connection before it said"
                              " hello", path);
    if (rc) free(c);
    else *out = c;
    return rc;
}

void cprd_close(cprd *c) {
    if (c) cprd__hang_up(c);
    free(c);
}
void cprd_set_timeout(cprd *c, double seconds) { c->timeout = seconds; }
int cprd_socket(const cprd *c) { return c->sock; }

/* -- verbs ------------------------------------------------------------------------------------- */

struct cprd_prepared { struct ticket ticket; };
struct cprd_claim {
    struct ticket ticket;
    cprd_state *state;
    cprd *own; /* a connection for this claim alone, or NULL */
    int bundle, begun;
    uint64_t attempts;
    char last_reject[1025];
};

void cprd__field_nonce(struct call *call, const unsigned char *nonce) {
    unsigned char fresh[16];
    if (!nonce && getrandom(fresh, sizeof fresh, 0) != sizeof fresh) call->fields.failed = 1;
    field(&call->fields, &call->count, "nonce");
    put_binary(&call->fields, nonce ? nonce : fresh, sizeof fresh);
}

struct call cprd__call_of(const struct ticket *t, const char *verb) {
    struct call call = {.verb = verb};
    field_text(&call.fields, &call.count, "name", t->name);
    field_uint(&call.fields, &call.count, "generation", t->generation);
    field(&call.fields, &call.count, "token"), put_binary(&call.fields, t->token, 16);
    return call;
}

int cprd__set_ticket(struct ticket *t, cprd *c, const char *name, const struct answer *a) {
    *t = (struct ticket){.c = c, .name = strdup(name), .generation = a->generation,
                         .stored = a->stored};
    memcpy(t->token, a->token, sizeof t->token);
    int random = getrandom(t->nonces, sizeof t->nonces, 0) == sizeof t->nonces;
    return t->name && random ? CPRD_OK : no_memory();
}

/* The process of a pidfd, as cprd is told of it. */
static int name_process(const cprd *c, int pidfd, struct cprd__process *p) {
    if (cprd__process(pidfd, p) || p->ended) return p->ended ? CPRD_OK : last.code;
    if (p->pid && c->pid == (uint64_t)getpid()) return CPRD_OK;
    return fail(CPRD_LIMIT_EXCEEDED, "cprd lives in another pid namespace, and cannot tell which"
                " process that is: let that process connect by itself");
}

/* Without an inode cprd may watch another process, that got the pid in between. */
static void seen_ended(cprd *c, const char *name, uint64_t generation,
                       const struct cprd__process *p, int pidfd) {
    struct pollfd one = {pidfd, POLLIN, 0};
    if (!p->pid || p->inode || poll(&one, 1, 0) <= 0) return;
    struct answer a;
    struct call call = {.verb = "ended"};
    field_text(&call.fields, &call.count, "name", name);
    field_uint(&call.fields, &call.count, "generation", generation);
    field_uint(&call.fields, &call.count, "pid", p->pid);
    cprd__request(c, &call, &a);
}

void cprd__fields_of_bundle(struct call *call, const struct packed *p) {
    bytes *f = &call->fields;
    field_uint(f, &call->count, "fds", p->fd_count), field_uint(f, &call->count, "bytes", p->size);
    field_uint(f, &call->count, "parked", p->parked);
    field_uint(f, &call->count, "depth", (uint64_t)p->depth);
    call->packed = p;
}

/* What save, prepare and confirm_next have in common. `call` has the other fields. */
static int save(cprd *c, struct call call, const char *name, cprd_state *s,
                const struct cprd_save_options *o, struct answer *a) {
    static const char *const when[] = {"no", "peer", "process"};
    struct cprd__process p = {0, 0, 0};
    struct packed packed = {.fds = NULL};
    int rc = CPRD_OK, after = o->after_exit;
    if (after < CPRD_NOW || after > CPRD_AFTER_PROCESS || o->ttl < 0)
        rc = fail(CPRD_INVALID_INPUT, "after_exit or ttl of the save options makes no sense");
    if (!rc && after == CPRD_AFTER_PROCESS) rc = name_process(c, o->process, &p);
    if (p.ended) after = CPRD_NOW;
    if (!rc) { /* a program may have all open that its soft limit allows */
        uint64_t soft, hard;
        cprd__raise_limit(&soft, &hard);
        rc = pack(s, c->sock, &packed);
        cprd__restore_limit(soft);
    }
    if (rc) free(call.fields.at);
    else {
        bytes *f = &call.fields;
        cprd__fields_of_bundle(&call, &packed);
        if (o->ttl > 0) field_double(f, &call.count, "ttl", o->ttl);
        field_text(f, &call.count, "after_exit", when[after]);
        field_uint(f, &call.count, "pid", p.pid), field_uint(f, &call.count, "inode", p.inode);
        cprd__field_nonce(&call, NULL);
        call.state = s;
        point("save:packed");
        rc = cprd__request(c, &call, a);
        if (!rc) seen_ended(c, name, a->generation, &p, o->process);
    }
    packed_free(&packed); /* after the answer: the daemon's copy is never the last one */
    return rc;
}

static int save_as(cprd *c, const char *verb, const char *name, cprd_state *s,
                   const struct cprd_save_options *o, struct answer *a) {
    static const struct cprd_save_options none;
    struct call call = {.verb = verb};
    if (!o) o = &none;
    field_text(&call.fields, &call.count, "name", name);
    field_text(&call.fields, &call.count, "if_exists", o->replace ? "replace" : "error");
    if (o->require_store) field_text(&call.fields, &call.count, "require", "store");
    int rc = save(c, call, name, s, o, a);
    if (!rc) point("save:answered");
    return rc;
}

static void set_saved(struct cprd_saved *out, uint64_t generation, int stored) {
    if (out) *out = (struct cprd_saved){generation, stored};
}

int cprd_save(cprd *c, const char *name, cprd_state *s, const struct cprd_save_options *options,
              struct cprd_saved *out) {
    struct answer a;
    int rc = save_as(c, "save", name, s, options, &a);
    if (!rc) set_saved(out, a.generation, a.stored);
    return rc;
}

int cprd_prepare(cprd *c, const char *name, cprd_state *s, const struct cprd_save_options *options,
                 cprd_prepared **out) {
    struct answer a = {.fd = -1};
    *out = NULL;
    cprd_prepared *p = calloc(1, sizeof *p);
    int rc = p ? save_as(c, "prepare", name, s, options, &a) : no_memory();
    if (!rc) rc = cprd__set_ticket(&p->ticket, c, name, &a);
    if (rc) cprd_prepared_free(p);
    else *out = p;
    return rc;
}

/* One of the two ends of a ticket. */
int cprd__end(struct ticket *t, const char *verb, const char *why, int damaged, struct answer *a) {
    if (t->over) return fail(CPRD_FENCED, "%s: '%s' has been ended already", verb, t->name);
    struct call call = cprd__call_of(t, verb);
    cprd__field_nonce(&call, t->nonces[why || !strcmp(verb, "abort")]);
    if (why) {
        char cut[1025];
        size_t size = (size_t)snprintf(cut, sizeof cut, "%s", why);
        for (size = strlen(cut); size && !is_utf8((unsigned char *)cut, size);) cut[--size] = 0;
        field_text(&call.fields, &call.count, "why", cut);
        if (damaged > 0) field_bool(&call.fields, &call.count, "damaged", 1);
        if (damaged < 0) field_bool(&call.fields, &call.count, "attempt", 0);
    }
    int rc = cprd__request(t->c, &call, a);
    if (!rc) t->over = 1;
    return rc;
}

int cprd_commit(cprd_prepared *p, struct cprd_saved *out) {
    struct answer a;
    point("commit:before");
    int rc = cprd__end(&p->ticket, "commit", NULL, 0, &a);
    if (rc) return rc;
    point("commit:answered");
    set_saved(out, p->ticket.generation, a.stored);
    return CPRD_OK;
}

int cprd_abort(cprd_prepared *p) {
    struct answer a;
    return cprd__end(&p->ticket, "abort", NULL, 0, &a);
}

void cprd_prepared_free(cprd_prepared *p) {
    if (p) free(p->ticket.name);
    free(p);
}

int cprd_load(cprd *c, const char *name, const struct cprd_load_options *o, cprd_claim **out) {
    static const struct cprd_load_options none;
    struct answer a, ignored;
    struct call call = {.verb = "load"};
    *out = NULL;
    if (!o) o = &none;
    cprd_claim *claim = calloc(1, sizeof *claim);
    if (!claim) return no_memory();
    claim->bundle = -1;
    int rc = o->wait > 0 ? cprd_connect(c->path, &claim->own) : CPRD_OK;
    if (claim->own) claim->own->timeout = c->timeout, c = claim->own;
    point("load:before");
    call.wait = o->wait;
    field_text(&call.fields, &call.count, "name", name);
    if (o->lease > 0) field_double(&call.fields, &call.count, "lease", o->lease);
    if (o->generation) field_uint(&call.fields, &call.count, "generation", o->generation);
    cprd__field_nonce(&call, NULL);
    if (rc) free(call.fields.at);
    else rc = cprd__request(c, &call, &a);
    if (!rc) rc = cprd__set_ticket(&claim->ticket, c, name, &a);
    if (!rc) {
        claim->bundle = a.fd, claim->attempts = a.attempts;
        strcpy(claim->last_reject, a.last_reject);
        point("load:claimed");
        int (*read)(int, cprd_state **) = a.live && cprd__unpack_live ? cprd__unpack_live
                                                                      : cprd__unpack;
        rc = a.fd < 0 ? cprd__no_fd(&a) : read(a.fd, &claim->state);
        if (!rc) point("load:unpacked");
        struct cprd_error why = last;
        /* No attempt is counted where this process had no room, or is too old. */
        int damaged = rc == CPRD_DAMAGED ? 1 : -1;
        if (rc) cprd__end(&claim->ticket, "reject", why.text, damaged, &ignored), last = why;
    }
    if (rc) claim->ticket.over = 1, cprd_claim_close(claim);
    else *out = claim;
    return rc;
}

cprd_state *cprd_claim_state(cprd_claim *claim) { return claim->state; }
uint64_t cprd_claim_generation(const cprd_claim *claim) { return claim->ticket.generation; }
uint64_t cprd_claim_attempts(const cprd_claim *claim) { return claim->attempts; }
const char *cprd_claim_last_reject(const cprd_claim *claim) { return claim->last_reject; }

int cprd_renew(cprd_claim *claim, double lease) {
    struct answer a;
    struct call call = cprd__call_of(&claim->ticket, "renew");
    if (lease > 0) field_double(&call.fields, &call.count, "lease", lease);
    return cprd__request(claim->ticket.c, &call, &a);
}

int cprd_begin(cprd_claim *claim, int process) {
    struct answer a;
    struct cprd__process p = {0, 0, 0};
    int rc = process < 0 ? CPRD_OK : name_process(claim->ticket.c, process, &p);
    if (!rc && p.ended)
        rc = fail(CPRD_INVALID_INPUT, "begin: the process that is to act has ended");
    if (rc) return rc;
    point("begin:before");
    struct call call = cprd__call_of(&claim->ticket, "begin");
    field_uint(&call.fields, &call.count, "pid", p.pid);
    field_uint(&call.fields, &call.count, "inode", p.inode);
    cprd__field_nonce(&call, NULL);
    int before = claim->begun;
    claim->begun = 1;
    rc = cprd__request(claim->ticket.c, &call, &a);
    if (rc == CPRD_INVALID_INPUT || rc == CPRD_LIMIT_EXCEEDED || rc == CPRD_FENCED)
        claim->begun = before; /* refused: nothing has begun by this */
    if (rc) return rc;
    seen_ended(claim->ticket.c, claim->ticket.name, claim->ticket.generation, &p, process);
    point("begin:answered");
    return CPRD_OK;
}

/* As long as the bundle is there, what was taken and closed since stays open. */
static void confirmed(cprd_claim *claim) {
    point("confirm:answered");
    if (claim->bundle >= 0) close(claim->bundle);
    claim->bundle = -1;
}

int cprd_confirm(cprd_claim *claim) {
    struct answer a;
    point("confirm:before");
    int rc = cprd__end(&claim->ticket, "confirm", NULL, 0, &a);
    if (!rc) confirmed(claim);
    return rc;
}

int cprd_confirm_next(cprd_claim *claim, cprd_state *next, const struct cprd_save_options *options,
                      struct cprd_saved *out) {
    static const struct cprd_save_options none;
    struct ticket *t = &claim->ticket;
    struct answer a;
    if (t->over) return fail(CPRD_FENCED, "confirm: '%s' has been ended already", t->name);
    point("confirm:before");
    struct call call = cprd__call_of(t, "confirm_next");
    int rc = save(t->c, call, t->name, next, options ? options : &none, &a);
    if (rc) return rc;
    t->over = 1;
    set_saved(out, a.generation, a.stored);
    confirmed(claim);
    return CPRD_OK;
}

int cprd_reject(cprd_claim *claim, const char *why) {
    struct answer a;
    point("reject:before");
    int rc = cprd__end(&claim->ticket, "reject", why, 0, &a);
    if (!rc) point("reject:answered");
    return rc;
}

void cprd_claim_close(cprd_claim *claim) {
    struct cprd_error before = last;
    struct answer a;
    if (!claim) return;
    if (!claim->ticket.over && !claim->begun)
        cprd__end(&claim->ticket, "reject", "closed without confirm", 0, &a);
    last = before;
    if (claim->bundle >= 0) close(claim->bundle);
    cprd_state_free(claim->state);
    cprd_close(claim->own);
    free(claim->ticket.name), free(claim);
}

int cprd_wait(cprd *c, const char *name, double seconds, uint64_t *generation) {
    struct answer a;
    struct call call = {.verb = "wait", .wait = seconds};
    cprd *own;
    int rc = cprd_connect(c->path, &own);
    if (rc) return rc;
    own->timeout = c->timeout;
    field_text(&call.fields, &call.count, "name", name);
    if (!(seconds > 0)) field_double(&call.fields, &call.count, "timeout", 0);
    rc = cprd__request(own, &call, &a);
    if (!rc && generation) *generation = a.generation;
    cprd_close(own);
    return rc;
}

static int force_out(cprd *c, const char *verb, const char *name, int force) {
    struct answer a;
    struct call call = {.verb = verb};
    field_text(&call.fields, &call.count, "name", name);
    field_bool(&call.fields, &call.count, "force", force);
    cprd__field_nonce(&call, NULL);
    return cprd__request(c, &call, &a);
}
int cprd_drop(cprd *c, const char *name, int force) { return force_out(c, "drop", name, force); }
int cprd_release(cprd *c, const char *name, int force) {
    return force_out(c, "release", name, force);
}

int cprd_list(cprd *c, void (*each)(void *context, const struct cprd_row *row), void *context) {
    struct answer a = {.more = 0};
    do {
        struct call call = {.verb = "list"};
        if (a.more) field_uint(&call.fields, &call.count, "after", a.more);
        int rc = cprd__request(c, &call, &a);
        if (rc) return rc;
        struct reader r = a.holds;
        for (uint64_t rows = next(&r).number; rows-- && !r.bad;) {
            char name[512] = "", phase[32] = "";
            struct cprd_row row = {name, phase, 0, 0, 0, 0};
            for (uint64_t left = next(&r).number; left-- && !r.bad;) {
                struct value key = next(&r), v = next(&r);
                if (is(&key, "name")) copy_text(name, sizeof name, &v);
                else if (is(&key, "phase")) copy_text(phase, sizeof phase, &v);
                else if (is(&key, "uid")) row.uid = v.number;
                else if (is(&key, "generation")) row.generation = v.number;
                else if (is(&key, "fds")) row.fds = v.number;
                else if (is(&key, "bytes")) row.bytes = v.number;
            }
            each(context, &row);
        }
    } while (a.more);
    return CPRD_OK;
}
