/* What the files of the live hold share. Not for programs. */
#ifndef CPRD_LIVE_INTERNAL_H
#define CPRD_LIVE_INTERNAL_H

#include "cprd_live.h"

#include "cprd_internal.h"

enum { CHANGE = 1, SNAPSHOT, ATTACH, ROOT }; /* kinds of records */
enum { SAVE = 1, RAW, PACKED, RAW_MEMFD, PACKED_MEMFD, MAPPED, DELETE = 8 }; /* ops */
enum { FD, SECTION, MEMORY };     /* spaces of keys */
enum { SHARED, VALUES, OWN };     /* kinds of segments */
enum {
    MOST = 64 * 1024,             /* bytes of a record */
    ROOM = 12 * 1024,             /* bytes of entries in a segment */
    INLINE = 4096,                /* bytes of a section; a larger one gets a memfd */
#ifdef CPRD_SMALL                     /* for tests: a few changes reach every step */
    SHARED_KEYS = 2, VALUE_KEYS = 3, SHARED_RECORDS = 2, VALUE_RECORDS = 3,
    ROOT_RECORDS = 3, PART = 2,
#else
    SHARED_KEYS = 16, VALUE_KEYS = 64, SHARED_RECORDS = 9, VALUE_RECORDS = 32,
    ROOT_RECORDS = 100,           /* then the root is rewritten, ... */
    PART = CPRD_SCM_MAX,          /* ... so many segments in a record */
#endif
    MAX_OWN = 512
};

struct segment { /* or the root */
    uint32_t id;
    int tx, rx;        /* tx -1: a predecessor's, which is only drained */
    int kind, dirty;
    int parked;        /* descriptors in the queue */
    size_t records, spent, last; /* in the queue; of the send buffer; bytes of the last record */
    uint64_t next;     /* ordinal */
    size_t count, room, bytes; /* of the keys that count here */
    struct kept **keys;
};

struct kept { /* a key; where a hold was read, an ended one, too */
    struct kept *chain;
    struct segment *segment;
    uint64_t birth, seq;
    uint8_t op, space, length, hides; /* hides: the key lies in a segment where it is void */
    int32_t id;
    int fd; /* a copy that was read, of MAPPED: not mapped yet; -1: none */
    void *map;
    size_t mapped, size;
    unsigned char *value; /* of a small section, `size` bytes */
    char name[];
};

struct map { struct map *next; void *at; size_t size; };

struct cprd_live {
    struct segment root, **segments, *current[3], *holder;
    size_t count, dirty, kept, ended; /* segments; dirty ones; keys; ended keys in the table */
    struct kept **table;
    size_t slots, used;
    uint64_t hold, seq, birth;
    uint32_t next_id;
    int owner, over, unconfirmed; /* pid; why nothing can be changed any more; or not yet */
    int taken; /* nothing was changed since the take-over */
    struct map *maps;
    cprd_state *state; /* what was read */
    struct cprd__hold *wire;
};

static inline int carries(int op) {
    return op == SAVE || op == RAW_MEMFD || op == PACKED_MEMFD || op == MAPPED;
}
static inline size_t entry_size(const struct kept *k) { return 18u + k->length + k->size; }
static inline int is_useless(const struct segment *s) {
    return s->tx < 0 && !s->count && !s->dirty;
}

struct message { /* one record that was peeked, with its descriptors */
    unsigned char *data;
    size_t size, fd_count, count, id_count;
    int *fds;
    int kind, flags, part, parts;
    uint64_t hold, seq, ordinal;
    const unsigned char *ids;
    struct item { /* an entry */
        int op, space, fd; /* fd: index, -1: none */
        int32_t id;
        uint64_t birth;
        const char *name;
        const unsigned char *value;
        size_t length, size;
    } *items;
};
struct messages { struct message *at; size_t count; };

/* All records of a queue, with copies of their descriptors; consumes nothing. `reading`: of a hold
 * whose owner has ended; that tries again while a queue changes. DAMAGED: no queue in order. */
int cprd__peek(int rx, struct messages *out, int reading);
int cprd__copy_of(const struct messages *m, const struct kept *k); /* borrowed; -1: not there */
void cprd__messages_free(struct messages *m); /* closes the descriptors */

struct entry { struct kept *k; int ends; };
struct record {
    int kind, flags;
    const uint32_t *ids;
    size_t id_count, count, fd_count;
    uint16_t part, parts;
    const struct entry *entries;
    const int *fds; /* of the entries, in their order, or of the ids */
};
/* Append a record. FENCED, LIMIT_EXCEEDED, INVALID_INPUT: it is not there. */
int cprd__send_record(cprd_live *l, struct segment *q, const struct record *r);
int cprd__drain(cprd_live *l, struct segment *q, size_t count); /* let go of the oldest records */
int cprd__fenced(cprd_live *l, const char *why);
struct segment *cprd__segment_new(int kind); /* the root does not name it yet */

cprd_live *cprd__live_new(void);
void cprd__live_free(cprd_live *l);
int cprd__live_room(cprd_live *l, size_t more);
struct kept *cprd__kept_new(int op, const char *name, size_t length, int32_t id);
void cprd__kept_free(struct kept *k);
struct kept **cprd__slot(const cprd_live *l, const struct kept *k);
struct kept **cprd__slot_of(const cprd_live *l, int space, const char *name, size_t length,
                            int32_t id);
struct kept *cprd__link(cprd_live *l, struct kept *k);
void cprd__unlink(cprd_live *l, struct kept *k);
void cprd__forget_keys(cprd_live *l);
void cprd__segment_free(struct segment *s);

#endif
