/* States and their bundles: included by cprd.c, which has what this uses. docs/bundle.md has the
 * bytes. */

/* -- a state ----------------------------------------------------------------------------------- */

struct item {
    struct cprd__key key;
    struct cprd_item known; /* to programs */
    int owned;              /* the descriptor */
    size_t place;           /* in the order of adding */
    char text[];            /* data that is not mapped, and the name */
};
struct cprd_state {
    struct cprd__key *keys;   /* the top of all */
    struct cprd__bytes items; /* pointers, in order */
    size_t sections;
};

static size_t count_of(const cprd_state *s) { return s->items.size / sizeof(struct item *); }
static struct item **at(const cprd_state *s, size_t n) { return (struct item **)s->items.at + n; }

cprd_state *cprd_state_new(void) { return calloc(1, sizeof(cprd_state)); }

static void item_free(struct item *item) {
    if (item->known.is_section && item->known.fd >= 0 && item->known.size)
        munmap((void *)(uintptr_t)item->known.data, item->known.size);
    if (item->owned) cprd__close_all(&item->known.fd, 1);
    free(item);
}

void cprd_state_free(cprd_state *s) {
    if (!s) return;
    for (size_t n = 0; n < count_of(s); n++) item_free(*at(s, n));
    free(s->items.at);
    free(s);
}

/* All bytes of a memfd; privately, for no sealed one can be shared before Linux 6.7. */
static int map(int memfd, const void **data, size_t *size) {
    struct stat there = {.st_size = 0};
    fstat(memfd, &there);
    *size = (size_t)there.st_size;
    *data = *size ? mmap(NULL, *size, PROT_READ, MAP_PRIVATE, memfd, 0) : NULL;
    if (*data == MAP_FAILED) *size = 0;
    return *data == MAP_FAILED ? cprd__no_memory() : CPRD_OK;
}

int cprd__add(cprd_state *s, const struct cprd__key *key, int fd, int owned, const void *data,
              size_t size, int packed) {
    int is_section = key->space == CPRD__SECTION;
    if (cprd__check_name(key)) return cprd__last.code;
    struct cprd__key **slot = cprd__slot(&s->keys, key);
    struct item *old = (struct item *)*slot;
    if (old && (owned || !is_section))
        return cprd__fail(CPRD_INVALID_INPUT, "key (%s, %d) is used already", old->key.name,
                          old->key.id);
    struct item *item = calloc(1, sizeof *item + size + key->length + 1);
    if (!item) return cprd__no_memory();
    item->key = old ? old->key : *key; /* with all below */
    item->key.name = memcpy(item->text + size, key->name, key->length);
    item->known = (struct cprd_item){is_section, item->key.name, key->id, fd, packed != 0,
                                     size ? memcpy(item->text, data, size) : item->text, size};
    item->place = old ? old->place : count_of(s);
    int rc = is_section && fd >= 0 ? map(fd, &item->known.data, &item->known.size) : CPRD_OK;
    if (!rc && !old) cprd__put(&s->items, &item, sizeof item);
    if (rc || s->items.failed) {
        item_free(item);
        return cprd__no_memory();
    }
    item->owned = owned;
    *at(s, item->place) = item;
    *slot = &item->key;
    s->sections += !old && is_section;
    if (old) item_free(old);
    return CPRD_OK;
}

/* What a program adds; borrowed. */
static int add(cprd_state *s, int space, const char *name, int32_t id, int fd, const void *data,
               size_t size, int packed) {
    struct cprd__key key = cprd__key(space, name, strlen(name), id);
    return cprd__add(s, &key, fd, 0, data, size, packed);
}

int cprd_add_fd(cprd_state *s, const char *name, int32_t id, int fd) {
    if (fcntl(fd, F_GETFD) >= 0) return add(s, CPRD__FD, name, id, fd, NULL, 0, 0);
    return cprd__fail(CPRD_INVALID_INPUT, "fd %d of (%s, %d) is not open", fd, name, id);
}

int cprd_add_section(cprd_state *s, const char *name, const void *data, size_t size, int packed) {
    return add(s, CPRD__SECTION, name, 0, -1, data, size, packed);
}

int cprd_add_memfd(cprd_state *s, const char *name, int memfd, int packed) {
    if (cprd__is_sealed(memfd)) return add(s, CPRD__SECTION, name, 0, memfd, NULL, 0, packed);
    return cprd__fail(CPRD_INVALID_INPUT, "section '%s': fd %d is no memfd with all four seals"
                      " (F_SEAL_SEAL, SHRINK, GROW, WRITE)", name, memfd);
}

const struct cprd_item *cprd_item_at(const cprd_state *s, size_t index) {
    return index < count_of(s) ? &(*at(s, index))->known : NULL;
}

static struct cprd_item *find(const cprd_state *s, int space, const char *name, int32_t id) {
    struct cprd__key key = cprd__key(space, name, strlen(name), id), *top = s->keys;
    struct item *item = (struct item *)*cprd__slot(&top, &key);
    return item ? &item->known : NULL;
}

const struct cprd_item *cprd_find_section(const cprd_state *s, const char *name) {
    return find(s, CPRD__SECTION, name, 0);
}

int cprd_find_fd(const cprd_state *s, const char *name, int32_t id) {
    const struct cprd_item *item = find(s, CPRD__FD, name, id);
    return item ? item->fd : -1;
}

int cprd_take_fd(cprd_state *s, const char *name, int32_t id) {
    struct cprd_item *item = find(s, CPRD__FD, name, id);
    int fd = item ? item->fd : -1;
    if (item) item->fd = -1;
    return fd;
}

/* -- msgpack: as much as cprd and bundles take ------------------------------------------------- */

static void put_big(unsigned char *to, uint64_t value, int width) {
    for (; width--; value >>= 8) to[width] = (unsigned char)value;
}

static void put_number(struct cprd__bytes *b, int type, uint64_t value, int width) {
    unsigned char data[9] = {(unsigned char)type};
    put_big(data + 1, value, width);
    cprd__put(b, data, 1 + (size_t)width);
}

static void put_data(struct cprd__bytes *b, int type, const void *data, size_t size) {
    put_number(b, type, size, 4);
    cprd__put(b, data, size);
}

static void put_text(struct cprd__bytes *b, const char *s) { put_data(b, 0xdb, s, strlen(s)); }

struct reader { /* trusts no length; no depth of what is read is a depth of calls */
    const unsigned char *at, *end;
    int bad;
};

static uint64_t take(struct reader *r, int width) {
    uint64_t value = 0;
    if (r->end - r->at < width) r->bad = 1;
    while (width-- && !r->bad) value = value << 8 | *r->at++;
    return value;
}

/* The head of the next value; text and binary with their bytes. */
static struct value next(struct reader *r) {
    static const char kinds[] = "n-uuxxx---fduuuuuuuu-----tttaamm"; /* of types from 0xc0 on */
    static const char widths[] = "00001240004812481248000001242424";
    unsigned type = (unsigned)take(r, 1), n = type & 31;
    struct value v = {.kind = NUMBER, .number = (uint64_t)(int8_t)type};
    if (type >= 0xc0 && type < 0xe0) {
        v.kind = (enum kind)kinds[n];
        v.number = take(r, widths[n] - '0');
    } else if (type >= 0x80 && type < 0xc0) {
        v.kind = type < 0x90 ? MAP : type < 0xa0 ? ARRAY : TEXT;
        v.number = type < 0xa0 ? type & 15 : n;
    }
    if (type == 0xc3) v.number = 1;
    v.data = r->at;
    v.end = r->end;
    if (v.kind == TEXT || v.kind == BINARY) {
        r->bad |= (uint64_t)(r->end - r->at) < v.number;
        r->at += r->bad ? 0 : v.number;
    }
    r->bad |= v.kind == BAD;
    return r->bad ? (struct value){.kind = NIL} : v;
}

static int is(const struct value *v, const char *text) {
    return v->kind == TEXT && v->number == strlen(text) && !memcmp(v->data, text, v->number);
}

/* All that is in `v`, which was read last. */
static void skip(struct reader *r, struct value v) {
    for (uint64_t left = 1; left && !r->bad; left--) {
        left += v.kind == MAP ? 2 * v.number : v.kind == ARRAY ? v.number : 0;
        if (left > 1) v = next(r);
    }
}

/* The value of a key in a map, or nil. What is not known is passed over. */
static struct value get(struct value map, const char *key) {
    struct reader r = {map.data, map.end, map.kind != MAP};
    while (!r.bad && map.number--) {
        struct value name = next(&r), v = next(&r);
        if (is(&name, key)) return v;
        skip(&r, v);
    }
    return (struct value){.kind = NIL};
}

uint64_t cprd__number(struct value map, const char *key, uint64_t otherwise) {
    struct value v = get(map, key);
    return v.kind == NUMBER ? v.number : otherwise;
}

static void text(struct value map, const char *key, char *to, size_t room) {
    struct value v = get(map, key);
    size_t size = v.kind != TEXT ? 0 : v.number < room ? v.number : room - 1;
    if (size) memcpy(to, v.data, size);
    to[size] = 0;
}

/* -- a bundle ---------------------------------------------------------------------------------- */

static const char *const PARTS[] = {"sections", "ids", "names"}; /* of the manifest */

static void make_header(unsigned char *header, int depth, size_t here, size_t total, uint64_t size,
                        uint64_t index) {
    struct cprd__bytes b = {header, 0, CPRD__HEADER, 0};
    cprd__put(&b, depth ? "CPRB\1\0\2" : "CPRB\1\0\1", 7);
    cprd__put_little(&b, (uint64_t)depth, 1);
    cprd__put_little(&b, here, 4);
    cprd__put_little(&b, total, 4);
    cprd__put_little(&b, size, 8);
    cprd__put_little(&b, index, 8);
}

/* `parts`: of the manifest: sections, ids, names. `ours`: the cookie of the connection. */
static int pack_item(const struct cprd_item *item, uint64_t ours, struct cprd__packed *p,
                     struct cprd__bytes *parts) {
    int fd = item->fd;
    if (item->is_section) {
        if (fd < 0 && item->size > INLINE) {
            if (cprd__memfd(item->name, item->data, item->size, &fd)) return cprd__last.code;
            p->made[p->made_count++] = fd;
        }
        p->size += item->size;
        put_number(parts, 0x94, 0, 0);
        put_text(parts, item->name);
        put_number(parts, item->packed, 0, 0);
        put_number(parts, fd >= 0, 0, 0);
        put_data(parts, 0xc6, item->data, fd < 0 ? item->size : 0);
    } else {
        if (fd < 0 || (ours && cprd__cookie(fd) == ours))
            return cprd__fail(CPRD_INVALID_INPUT, "fd %d of (%s, %d) was taken, or is the"
                              " connection to cprd itself", fd, item->name, item->id);
        cprd__put(&parts[2], "", p->fd_count++ > 0); /* a NUL between */
        cprd__put(&parts[2], item->name, strlen(item->name));
        cprd__put_little(&parts[1], (uint32_t)item->id, 4);
    }
    if (fd >= 0) p->fds[p->parked++] = fd;
    return CPRD_OK;
}

/* Queues of 253 descriptors each, in the place of these, until one message is enough. */
static int pack_tree(struct cprd__packed *p) {
    const size_t most = CPRD__SCM_MAX, total = p->parked;
    for (size_t below = 1; p->parked > most; below *= most, p->depth++) { /* one has so many */
        size_t above = 0;
        if (p->depth == 2) return cprd__fail(CPRD_LIMIT_EXCEEDED, "too many descriptors");
        for (size_t start = 0; start < p->parked; start += most, above++) {
            size_t left = p->parked - start, here = left < most ? left : most;
            size_t rest = total - start * below, under = here * below;
            unsigned char header[CPRD__HEADER];
            int tx = -1, rx = -1;
            make_header(header, p->depth, here, under < rest ? under : rest, 0, above);
            if (cprd__pair(&tx, &rx)) return cprd__last.code;
            p->made[p->made_count++] = rx;
            int error = cprd__send(tx, header, CPRD__HEADER, p->fds + start, here);
            close(tx);
            if (error) return cprd__explain(error);
            cprd__point("pack:sent");
            p->fds[above] = rx; /* what lay there is parked by now */
        }
        p->parked = above;
    }
    make_header(p->header, p->depth, p->parked, total, p->size, 0);
    return CPRD_OK;
}

/* The manifest, memfds of sections, and the descriptors under keys, in a tree. */
static int pack(const cprd_state *s, uint64_t ours, struct cprd__packed *p) {
    struct cprd__bytes parts[4] = {{0}}, *manifest = &parts[3];
    int rc = CPRD_OK;
    *p = (struct cprd__packed){.fds = calloc(count_of(s) + 1, sizeof(int)), .parked = 1};
    p->made = calloc(2 * count_of(s) + 2, sizeof(int));
    if (!p->fds || !p->made) return cprd__no_memory();
    for (int is_section = 1; is_section >= 0; is_section--)
        for (size_t n = 0; n < count_of(s) && !rc; n++)
            if ((*at(s, n))->known.is_section == is_section)
                rc = pack_item(&(*at(s, n))->known, ours, p, parts);
    put_number(manifest, 0x83, 0, 0);
    for (int n = 0; n < 3; n++) {
        put_text(manifest, PARTS[n]);
        put_number(manifest, n ? 0xc6 : 0xdd, n ? parts[n].size : s->sections, 4);
        cprd__put(manifest, parts[n].at, parts[n].size);
        manifest->failed |= parts[n].failed;
        free(parts[n].at);
    }
    if (!rc && manifest->failed) rc = cprd__no_memory();
    if (!rc && (manifest->size > MAX_MANIFEST || s->sections > MAX_SECTIONS))
        rc = cprd__fail(CPRD_LIMIT_EXCEEDED, "keys and small sections exceed %d bytes, or more than"
                        " %d sections", MAX_MANIFEST, MAX_SECTIONS);
    if (!rc) rc = cprd__memfd("cprd-manifest", manifest->at, manifest->size, &p->fds[0]);
    if (!rc) p->made[p->made_count++] = p->fds[0];
    free(manifest->at);
    if (!rc) cprd__point("pack:manifest");
    return rc ? rc : pack_tree(p);
}

static int damaged(const char *why) {
    return cprd__fail(CPRD_DAMAGED, "the bundle is not whole: %s", why);
}

/* One node of a bundle, and all below; its descriptors are appended to `out`. `parent`: the depth
 * that the parent has; 0: the root. */
static int peek_node(int sock, int parent, uint64_t index, struct cprd__bytes *out) {
    unsigned char h[CPRD__HEADER + 1] = {0};
    int fds[CPRD__SCM_MAX], flags = MSG_PEEK, off = -1, rc = CPRD_OK;
    size_t count, used = 0, before = out->size;
    setsockopt(sock, SOL_SOCKET, SO_PEEK_OFF, &off, sizeof off);
    long got = cprd__receive(sock, h, sizeof h, fds, &count, &flags);
    size_t here = cprd__little(h + 8, 4), total = cprd__little(h + 12, 4);
    int version = (int)cprd__little(h + 4, 2), depth = h[7];
    if (got >= 6 && !memcmp(h, "CPRB", 4) && version != 1)
        rc = cprd__fail(CPRD_BUSY, "a bundle of version %d; this program reads version 1 (with"
                        " cprd_live.c 2, a live hold)", version);
    else if (got != CPRD__HEADER || memcmp(h, "CPRB", 4) || cprd__waiting(sock) != CPRD__HEADER ||
             depth > 2 || h[6] != (depth ? 2 : 1) || (depth ? total < here : total != here) ||
             (parent && (depth != parent - 1 || cprd__little(h + 24, 8) != index)))
        rc = damaged("a part has no header that makes sense");
    else if (flags & MSG_CTRUNC) rc = cprd__no_room("to load (what is held stays held)");
    else if (!here || count != here) rc = damaged("a part lacks what it says");
    else rc = cprd__room_for(total + 8); /* and what a program opens next */
    if (!rc && !depth) cprd__put(out, fds, count * sizeof *fds);
    if (!rc && out->failed) rc = cprd__no_memory();
    if (!rc && !depth) used = count;
    for (; !rc && used < count; used++) {
        rc = peek_node(fds[used], depth, used, out);
        close(fds[used]);
    }
    if (!rc && out->size - before != total * sizeof *fds)
        rc = damaged("it has other descriptors than it says");
    cprd__close_all(fds + used, count - used);
    return rc;
}

/* The array of sections. Of memfds, *fds is the next; -1 as soon as the state owns it. */
static int read_sections(cprd_state *s, struct value list, int **fds, const int *end) {
    struct reader r = {list.data, list.end, list.kind != ARRAY || list.number > MAX_SECTIONS};
    for (; list.number && !r.bad; list.number--) {
        struct value one = next(&r), name = next(&r), packed = next(&r);
        struct value by = next(&r), data = next(&r);
        int memfd = by.number && *fds < end ? **fds : -1;
        if (one.kind != ARRAY || one.number != 4 || name.kind != TEXT || packed.kind != NUMBER ||
            by.kind != NUMBER || data.kind != BINARY || (by.number && !cprd__is_sealed(memfd)))
            break;
        struct cprd__key key = cprd__key(CPRD__SECTION, name.data, name.number, 0);
        size_t size = by.number ? 0 : data.number;
        if (cprd__add(s, &key, memfd, 1, data.data, size, packed.number != 0))
            return cprd__last.code;
        if (by.number) *(*fds)++ = -1;
    }
    return list.number || r.bad ? damaged("its sections cannot be read") : CPRD_OK;
}

/* The state of the descriptors of a bundle, the manifest apart. */
static int read_manifest(cprd_state *s, struct reader r, int *fds, const int *last) {
    struct value map = next(&r), of[3] = {{.kind = ARRAY}, {.kind = NIL}, {.kind = NIL}};
    if (map.kind != MAP || map.number > 16) r.bad = 1;
    for (; map.number && !r.bad; map.number--) {
        struct value part = next(&r), v = next(&r);
        if (part.kind == ARRAY || part.kind == MAP) r.bad = 1;
        if (part.kind == TEXT && !is_utf8(part.data, part.number)) r.bad = 1;
        for (int n = 0; n < 3; n++)
            if (is(&part, PARTS[n])) of[n] = v;
        skip(&r, v); /* another one is of a later version */
    }
    const struct value ids = of[1], names = of[2];
    if (r.bad || r.at != r.end) return damaged("the manifest cannot be read");
    if (read_sections(s, of[0], &fds, last)) return cprd__last.code;
    size_t left = (size_t)(last - fds);
    if (names.kind != BINARY || ids.kind != BINARY || ids.number != 4 * left ||
        (!left && names.number))
        return damaged("the manifest names other descriptors than there are");
    const char *name = (const char *)names.data, *end = name + names.number;
    for (const unsigned char *id = ids.data; left; left--, id += 4) {
        const char *nul = memchr(name, 0, (size_t)(end - name)), *stop = nul ? nul : end;
        if (!nul != (left == 1)) return damaged("the manifest does not name all descriptors");
        struct cprd__key key =
            cprd__key(CPRD__FD, name, (size_t)(stop - name), (int32_t)cprd__little(id, 4));
        if (cprd__add(s, &key, *fds, 1, NULL, 0, 0)) return cprd__last.code;
        *fds++ = -1;
        name = stop + 1;
    }
    return CPRD_OK;
}

int cprd_unpack(int bundle, cprd_state **out) {
    struct cprd__bytes found = {0};
    const void *data = NULL;
    size_t size = 0;
    cprd_state *s = cprd_state_new();
    int rc = s ? peek_node(bundle, 0, 0, &found) : cprd__no_memory(), *fds = (int *)found.at;
    size_t count = found.size / sizeof *fds;
    cprd__point("load:peeked");
    if (!rc && cprd__is_sealed(*fds)) rc = map(*fds, &data, &size);
    if (!rc && (!size || size > MAX_MANIFEST)) rc = damaged("the manifest is not a sealed memfd");
    struct reader r = {data, size ? (const unsigned char *)data + size : NULL, 0};
    if (!rc) rc = read_manifest(s, r, fds + 1, fds + count);
    if (rc == CPRD_INVALID_INPUT) rc = cprd__fail(CPRD_DAMAGED, "%s", cprd__last.text);
    if (size) munmap((void *)(uintptr_t)data, size);
    cprd__close_all(fds, count); /* what the state does not own */
    free(found.at);
    if (rc) cprd_state_free(s);
    else *out = s;
    return rc;
}
