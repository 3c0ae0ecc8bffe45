/* cprd-c: each verb of cprd.h, from a shell. */
#define _GNU_SOURCE
#include "cprd.h"

#include <err.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

static const char usage[] =
    "cprd-c save NAME [--replace] [--prepare] [--abort] [--ttl=S] [--store]\n"
    "                 [--after-exit[=PIDFD]]\n"
    "cprd-c load NAME [--wait=S] [--lease=S] [--begin[=PIDFD]] [--reject=WHY|--next|--leave]\n"
    "cprd-c wait NAME [--wait=S]      cprd-c drop|release NAME [--force]      cprd-c list\n"
    "cprd-c live NAME [--wait=S] [--lease=S] [--unconfirmed]\n"
    "cprd-c unpack BUNDLE ...      cprd-c found ROOT ...      what inherited queues hold, each\n"
    "cprd-c own TX RX HOLD [--take=ROOT]      a live hold without cprd, by inherited ends\n"
    "save, and load with --next, read a state from stdin:\n"
    "    fd NAME ID NUMBER | raw KEY FILE | packed KEY FILE | memfd KEY NUMBER\n"
    "live and own read changes from stdin, and answers each with a line:\n"
    "    save NAME ID NUMBER | replace NAME ID NUMBER | delete NAME ID | raw KEY FILE\n"
    "    packed KEY FILE | drop KEY | memory NAME SIZE | write NAME SIZE BYTE | forget NAME\n"
    "    clear | check | confirm | end | batch (what follows up to \"commit\" is one change)\n";

struct options {
    int prepare, abort, force, begin, acting, next, leave; /* acting: a pidfd, or -1 */
    const char *reject;
    double timeout;
    int take, unconfirmed;
    struct cprd_save_options save;
    struct cprd_load_options load;
};

static int failed(void) {
    const struct cprd_error *error = cprd_last();
    fprintf(stderr, "cprd-c: %s: %s\n", cprd_code_name(error->code), error->text);
    return error->code == CPRD_NOT_HELD ? 3 : error->code == CPRD_BUSY ? 4 : 1;
}

static int wrong(const char *what) {
    fprintf(stderr, "cprd-c: %s\n%s", what, usage);
    return 2;
}

/* The content of a file, which the caller frees. */
static char *slurp(const char *path, size_t *size) {
    struct stat there;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    char *data = fd < 0 || fstat(fd, &there) ? NULL : malloc((size_t)there.st_size + 1);
    for (*size = 0; data && *size < (size_t)there.st_size;) {
        ssize_t got = read(fd, data + *size, (size_t)there.st_size - *size);
        if (got <= 0) break;
        *size += (size_t)got;
    }
    if (fd >= 0) close(fd);
    return data;
}

static int add_line(cprd_state *s, const char *line) {
    char verb[16], name[256], rest[4096];
    int id, fd;
    if (sscanf(line, "fd %255s %d %d", name, &id, &fd) == 3) return cprd_add_fd(s, name, id, fd);
    if (sscanf(line, "memfd %255s %d", name, &fd) == 2) return cprd_add_memfd(s, name, fd, 0);
    if (sscanf(line, "%15s %255s %4095[^\n]", verb, name, rest) == 3) {
        size_t size;
        char *data = slurp(rest, &size);
        if (!data) err(1, "%s", rest);
        int rc = cprd_add_section(s, name, data, size, !strcmp(verb, "packed"));
        free(data);
        return rc;
    }
    exit(wrong(line));
}

static int read_state(cprd_state **out) {
    char line[8192];
    *out = cprd_state_new();
    while (*out && fgets(line, sizeof line, stdin))
        if (add_line(*out, line)) return failed();
    return *out ? 0 : 1;
}

static uint32_t crc32(const unsigned char *data, size_t size) { /* zlib's */
    static uint32_t table[256];
    for (uint32_t n = 0; n < 256 && !table[255]; n++) {
        table[n] = n;
        for (int bit = 0; bit < 8; bit++) table[n] = table[n] >> 1 ^ (table[n] & 1) * 0xedb88320u;
    }
    uint32_t crc = ~0u;
    for (size_t at = 0; at < size; at++) crc = crc >> 8 ^ table[(crc ^ data[at]) & 255];
    return ~crc;
}

static void print_state(const cprd_state *s) {
    const struct cprd_item *item;
    for (size_t n = 0; (item = cprd_item_at(s, n)); n++) {
        struct stat there = {0};
        if (item->is_section) continue;
        fstat(item->fd, &there);
        printf("fd %s %d %d %llu\n", item->name, item->id, item->fd, 0ull + there.st_ino);
    }
    for (size_t n = 0; (item = cprd_item_at(s, n)); n++)
        if (item->is_section)
            printf("%s %s %zu %08x\n", item->packed ? "packed" : "raw", item->name, item->size,
                   crc32(item->data, item->size));
    fflush(stdout);
}

static int save(cprd *c, const char *name, const struct options *o) {
    cprd_state *s;
    struct cprd_saved saved;
    int rc = read_state(&s);
    if (!rc && o->prepare) {
        cprd_prepared *p;
        rc = cprd_prepare(c, name, s, &o->save, &p);
        if (!rc) rc = o->abort ? cprd_abort(p) : cprd_commit(p, &saved);
        cprd_prepared_free(p);
    } else if (!rc) rc = cprd_save(c, name, s, &o->save, &saved);
    if (rc) rc = failed();
    else if (!o->abort)
        printf("%llu %s\n", 0ull + saved.generation, saved.stored ? "store" : "memory");
    cprd_state_free(s);
    return rc;
}

static int load(cprd *c, const char *name, const struct options *o) {
    cprd_claim *claim;
    cprd_state *next = NULL;
    int rc = o->next ? read_state(&next) : 0;
    if (rc || cprd_load(c, name, &o->load, &claim)) {
        cprd_state_free(next);
        return rc ? rc : failed();
    }
    print_state(cprd_claim_state(claim));
    if (o->begin) rc = cprd_begin(claim, o->acting);
    if (!rc && !o->leave)
        rc = o->reject ? cprd_reject(claim, o->reject)
             : o->next ? cprd_confirm_next(claim, next, &o->save, NULL) : cprd_confirm(claim);
    if (rc) rc = failed();
    cprd_claim_close(claim);
    cprd_state_free(next);
    return rc;
}

static void print_row(void *context, const struct cprd_row *row) {
    (void)context;
    printf("%llu/%s %s %llu fds %llu bytes\n", (unsigned long long)row->uid, row->name, row->phase,
           (unsigned long long)row->fds, (unsigned long long)row->bytes);
}

/* -- live holds -------------------------------------------------------------------------------- */

enum { BATCH = 4096 };
static struct cprd_live_change batch[BATCH];
static size_t gathered;

/* A line as a change; what it needs is allocated. 0: not a change. */
static int change_of(const char *line, struct cprd_live_change *c) {
    char verb[16], name[256], rest[4096];
    *c = (struct cprd_live_change){.fd = -1};
    if (sscanf(line, "%15s %255s %4095[^\n]", verb, name, rest) < 2) return 0;
    if (sscanf(line, "save %255s %d %d", name, &c->id, &c->fd) == 3) c->op = CPRD_SAVE_FD;
    else if (sscanf(line, "replace %255s %d %d", name, &c->id, &c->fd) == 3)
        c->op = CPRD_REPLACE_FD;
    else if (sscanf(line, "delete %255s %d", name, &c->id) == 2) c->op = CPRD_DELETE_FD;
    else if (!strcmp(verb, "drop")) c->op = CPRD_DELETE_SECTION;
    else if (!strcmp(verb, "forget")) c->op = CPRD_DELETE_MEMORY;
    else if (!strcmp(verb, "raw") || !strcmp(verb, "packed")) {
        c->op = CPRD_SAVE_SECTION;
        c->packed = verb[0] == 'p';
        c->data = slurp(rest, &c->size);
        if (!c->data) err(1, "%s", rest);
    } else return 0;
    c->name = strdup(name);
    return 1;
}

static void let_go(struct cprd_live_change *c) {
    free((void *)c->name);
    free((void *)c->data);
}

/* One line of a live hold's owner. -1: a change of a batch that goes on. */
static int act(cprd_live *l, const char *line, int *gathers) {
    struct cprd_live_change one;
    char name[256];
    size_t size;
    void *memory;
    int byte, rc;
    if (!strcmp(line, "batch\n")) {
        *gathers = 1;
        return -1;
    }
    if (!strcmp(line, "clear\n")) return cprd_live_clear(l);
    if (!strcmp(line, "check\n")) return cprd_live_check(l);
    if (!strcmp(line, "confirm\n")) return cprd_live_confirm(l);
    if (!strcmp(line, "end\n")) return cprd_live_end(l);
    if (!strcmp(line, "commit\n")) {
        rc = cprd_live_change(l, batch, gathered);
        while (gathered) let_go(&batch[--gathered]);
        *gathers = 0;
        return rc;
    }
    if (sscanf(line, "memory %255s %zu", name, &size) == 2)
        return cprd_live_memory(l, name, size, &memory);
    if (sscanf(line, "write %255s %zu %d", name, &size, &byte) == 3) {
        rc = cprd_live_memory(l, name, size, &memory);
        if (!rc) memset(memory, byte, size);
        return rc;
    }
    if (!change_of(line, &one)) exit(wrong(line));
    if (*gathers && gathered < BATCH) {
        batch[gathered++] = one;
        return -1;
    }
    rc = cprd_live_change(l, &one, 1);
    let_go(&one);
    return rc;
}

static int changes(cprd_live *l) {
    char line[8192];
    int gathers = 0, rc;
    while (fgets(line, sizeof line, stdin)) {
        if ((rc = act(l, line, &gathers)) < 0) continue;
        if (rc) printf("%s: %s\n", cprd_code_name(rc), cprd_last()->text);
        else printf("ok\n");
        fflush(stdout);
    }
    return 0;
}

static int live(cprd *c, const char *name, const struct options *o) {
    cprd_live *l;
    if (cprd_live_open(c, name, &o->load, &l)) return failed();
    if (cprd_live_found(l)) print_state(cprd_live_state(l));
    if (!o->unconfirmed && cprd_live_confirm(l)) {
        int status = failed();
        cprd_live_close(l);
        return status;
    }
    puts(cprd_live_found(l) ? "taken\nok" : "ok");
    fflush(stdout);
    int rc = changes(l);
    cprd_live_close(l);
    return rc;
}

static int own(int tx, int rx, uint64_t hold, int take) {
    cprd_live *l;
    if (take < 0) {
        if (cprd_live_begin(tx, rx, hold, &l)) return failed();
    } else {
        if (cprd_live_take(take, tx, rx, hold, &l)) return failed();
        print_state(cprd_live_state(l));
        puts("taken");
        fflush(stdout);
        if (cprd_live_settle(l)) return failed();
    }
    puts("ok");
    fflush(stdout);
    int rc = changes(l);
    cprd_live_close(l);
    return rc;
}

static int look(char **queues, int is_live) {
    for (; *queues; queues++) {
        cprd_state *s = NULL;
        int rc = is_live ? cprd_live_read(atoi(*queues), &s) : cprd_unpack(atoi(*queues), &s);
        if (!rc) {
            print_state(s);
            puts("ok");
        } else printf("%s: %s\n", cprd_code_name(rc), cprd_last()->text);
        cprd_state_free(s);
    }
    return 0;
}

static int parse(char **words, struct options *o) {
    for (; *words; words++) {
        char *value = strchr(*words, '=');
        if (value) value++;
        if (!strcmp(*words, "--replace")) o->save.replace = 1;
        else if (!strcmp(*words, "--prepare")) o->prepare = 1;
        else if (!strcmp(*words, "--abort")) o->prepare = o->abort = 1;
        else if (!strcmp(*words, "--after-exit")) o->save.after_exit = CPRD_AFTER_ME;
        else if (!strcmp(*words, "--store")) o->save.require_store = 1;
        else if (!strcmp(*words, "--force")) o->force = 1;
        else if (!strcmp(*words, "--begin")) o->begin = 1;
        else if (!strcmp(*words, "--next")) o->next = 1;
        else if (!strcmp(*words, "--leave")) o->leave = 1;
        else if (!strcmp(*words, "--unconfirmed")) o->unconfirmed = 1;
        else if (value && !strncmp(*words, "--begin=", 8)) {
            o->begin = 1;
            o->acting = atoi(value);
        } else if (value && !strncmp(*words, "--after-exit=", 13)) {
            o->save.after_exit = CPRD_AFTER_PROCESS;
            o->save.process = atoi(value);
        } else if (value && !strncmp(*words, "--ttl=", 6)) o->save.ttl = atof(value);
        else if (value && !strncmp(*words, "--wait=", 7)) o->load.wait = atof(value);
        else if (value && !strncmp(*words, "--lease=", 8)) o->load.lease = atof(value);
        else if (value && !strncmp(*words, "--reject=", 9)) o->reject = value;
        else if (value && !strncmp(*words, "--timeout=", 10)) o->timeout = atof(value);
        else if (value && !strncmp(*words, "--take=", 7)) o->take = atoi(value);
        else return 0;
    }
    return 1;
}

int main(int argc, char **argv) {
    struct options o = {.take = -1, .acting = -1};
    struct rlimit limit;
    cprd *c;
    int rc = 0;
    if (!getrlimit(RLIMIT_NOFILE, &limit) && limit.rlim_cur < limit.rlim_max) {
        limit.rlim_cur = limit.rlim_max; /* what is loaded has to fit; nothing here select()s */
        setrlimit(RLIMIT_NOFILE, &limit);
    }
    if (argc > 4 && !strcmp(argv[1], "own"))
        return parse(argv + 5, &o) ? own(atoi(argv[2]), atoi(argv[3]), strtoull(argv[4], NULL, 10),
                                         o.take) : wrong("unknown option");
    const char *verb = argc > 1 ? argv[1] : "", *name = argc > 2 ? argv[2] : "";
    if (argc < 2 || (argc < 3 && strcmp(verb, "list"))) return wrong("which verb, which NAME?");
    if (!strcmp(verb, "unpack") || !strcmp(verb, "found")) return look(argv + 2, verb[0] == 'f');
    if (argc > 3 && !parse(argv + 3, &o)) return wrong("unknown option");
    if (cprd_connect(NULL, &c)) return failed();
    if (o.timeout > 0) cprd_set_timeout(c, o.timeout);
    if (!strcmp(verb, "save")) rc = save(c, name, &o);
    else if (!strcmp(verb, "load")) rc = load(c, name, &o);
    else if (!strcmp(verb, "live")) rc = live(c, name, &o);
    else if (!strcmp(verb, "wait")) rc = cprd_wait(c, name, o.load.wait, NULL) ? failed() : 0;
    else if (!strcmp(verb, "drop")) rc = cprd_drop(c, name, o.force) ? failed() : 0;
    else if (!strcmp(verb, "release")) rc = cprd_release(c, name, o.force) ? failed() : 0;
    else if (!strcmp(verb, "list")) rc = cprd_list(c, print_row, NULL) ? failed() : 0;
    else rc = wrong("unknown verb");
    cprd_close(c);
    return rc;
}
