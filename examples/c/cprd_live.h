/* Between cprd_live.c and cprd_live_read.c: not for programs. docs/bundle.md has the records. */
#define CPRD_INTERNAL
#include "cprd.h"

#include <sys/types.h>
#include <sys/uio.h>

enum { CHANGE = 1, SNAPSHOT, ATTACH, ROOT }; /* kinds of records */
enum { SAVE = 1, RAW, PACKED, RAW_MEMFD, PACKED_MEMFD, MAPPED, DELETE = 8, SEGMENT = 11 }; /* ops */
enum {
    HEADER = 40,         /* bytes of a record's */
    MOST = 64 * 1024,    /* bytes of a record */
    MOST_RECORDS = 1024, /* of a queue */
};

struct segment { /* a queue with keys; or the root */
    struct segment *next;
    int tx, rx;             /* tx -1: a predecessor's, where nobody can append */
    int id, is_root, dirty; /* dirty: has something void, or more records than it needs */
    int own;                /* copies of what lies here must not be closed in this process */
    size_t count;           /* keys that count here */
    uint64_t seq, ordinal;  /* of the last record; of the next */
    size_t records, bytes;  /* in the queue */
};
struct entry { /* of a record; or what the table has of a key */
    struct cprd__key key;
    struct segment *segment;     /* where it lies; NULL: the root */
    struct entry *next, *found;  /* in the table: all keys; what counts, while a hold is read */
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

extern const signed char cprd__spaces[]; /* of ops */
extern const unsigned char cprd__live_head[CPRD__HEADER]; /* of the bundle of a live hold */
/* What the table has of a key; of a new one, that it has ended. NULL: no memory. */
struct entry *cprd__know(cprd_live *l, const struct cprd__key *key);
void cprd__note(cprd_live *l, const struct entry *e); /* what a record says of a known key */
void cprd__forget(cprd_live *l, int op);              /* keys with this op or a higher one */
void cprd__dirty(cprd_live *l, struct segment *s);
struct segment *cprd__segment(cprd_live *l); /* one more, without its ends. NULL: no memory */
void cprd__segment_free(cprd_live *l, struct segment *s);
void cprd__live_clean(cprd_live *l); /* frees all but root, ticket and itself */
int cprd__map(cprd_live *l, int fd, size_t size, struct iovec *out); /* until the hold is closed */
/* A record of entries, the segments first; `part`: the number of a ROOT's, and
 * 65536 times how many there are; else 0. */
void cprd__encode(const cprd_live *l, const struct segment *q, uint64_t part,
                  const struct entry *e, size_t count, struct cprd__bytes *b);
/* All records of a queue, with copies of their descriptors; consumes nothing. */
int cprd__peek(cprd_live *l, struct segment *s, struct peeked *p, int tries);
void cprd__let_go(struct peeked *p);
/* What a killed owner left, into an empty hold: keys, segments, state; memory is mapped for an
 * owner, else part of the state. */
int cprd__read_hold(cprd_live *l, int root);
int cprd__root_of(int bundle, int *root); /* of a bundle that is borrowed; the caller's */
