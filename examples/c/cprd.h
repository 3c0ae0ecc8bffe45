/* A client of cprd in C11, for Linux, without dependencies: compile cprd.c with your program, and
 * cprd_live.c for live holds. These include parts/.
 *
 * A state is descriptors under keys (name, id), in order, and named sections of bytes. One process
 * saves a state under a name, another loads that state, whole, and confirms.
 *
 * Functions return CPRD_OK or an error code; cprd_last() has the words. All block until cprd has
 * answered, at most the timeout of the connection (20 s, cprd_set_timeout) and whatever the call
 * itself waits for. A lost connection is opened again and the request repeated, with the same
 * nonce: whatever was asked for is done once.
 *
 * Threads: requests of several threads over one connection take turns; one thread at a time uses a
 * state, a claim, a prepared save or a live hold. A child of fork() needs a connection of its own:
 * what the parent made is refused there with INVALID_INPUT, and closing a copy changes nothing for
 * the parent.
 *
 * After CPRD_TIMEOUT or CPRD_UNAVAILABLE the outcome is unknown. The same call of commit, abort,
 * confirm or reject once more repeats the same request, and gets the first answer. A timeout closes
 * no connection: what hangs on the connection goes on.
 */
#ifndef CPRD_H
#define CPRD_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum cprd_code { /* the error classes of docs/protocol.md, in words by cprd_code_name() */
    CPRD_OK,
    CPRD_ERROR,          /* CprdError: of no other class */
    CPRD_UNAVAILABLE,    /* nobody answers at the socket, within the time for retries */
    CPRD_NOT_HELD,       /* nothing bears the name: a cold start is right */
    CPRD_BUSY,           /* held, and not to be had now; pid, phase, until say more */
    CPRD_DAMAGED,        /* what is held is not whole; never served in part */
    CPRD_ALREADY_HELD,   /* the name is taken, and `replace` was 0 */
    CPRD_DENIED,         /* the credentials of this process do not allow it */
    CPRD_FENCED,         /* the claim or prepared save is over: somebody else may have the state */
    CPRD_LIMIT_EXCEEDED, /* the text names the limit and how to raise it; nothing was changed */
    CPRD_TIMEOUT,        /* cprd accepted the connection and stayed mute */
    CPRD_PROTOCOL_ERROR, /* the other side did not understand, or is not to be understood */
    CPRD_INVALID_INPUT   /* an argument was refused before anything happened */
};

struct cprd_error {
    int code;       /* of enum cprd_code */
    char text[1024];
    int64_t pid;    /* BUSY: the process in the way; -1: none, or not known */
    char phase[32]; /* BUSY: of the hold; "" where a name is out of sight */
    double until;   /* BUSY: end of the lease in seconds of CLOCK_BOOTTIME; -1: none */
};

const struct cprd_error *cprd_last(void); /* of this thread; valid until its next call */
const char *cprd_code_name(int code);     /* "NotHeld" */

/* -- a state ---------------------------------------------------------------------------------- */

typedef struct cprd_state cprd_state;

cprd_state *cprd_state_new(void); /* NULL: no memory */
/* Frees the state; closes what the state owns: the descriptors of a loaded state that nobody took,
 * and the memfds of its sections. Never closes what was added by cprd_add_*. */
void cprd_state_free(cprd_state *state);

/* `fd` is borrowed: must stay open until the state has been saved, and is the caller's then. */
int cprd_add_fd(cprd_state *state, const char *name, int32_t id, int fd);
/* The bytes are copied, and replace what was there. `packed`: one msgpack value, else raw bytes. */
int cprd_add_section(cprd_state *state, const char *key, const void *data, size_t size, int packed);
/* A memfd with all of F_SEAL_SEAL, SHRINK, GROW and WRITE; borrowed as cprd_add_fd. */
int cprd_add_memfd(cprd_state *state, const char *key, int memfd, int packed);

/* What a state has under a key; valid until the key is replaced, or the state freed. */
struct cprd_item {
    int is_section;
    const char *name;
    int32_t id;       /* of a descriptor */
    int fd;           /* borrowed; -1: taken. Of a section: its memfd, or -1 */
    int packed;       /* of a section, as all below */
    const void *data; /* size 0: may be NULL */
    size_t size;
};
/* Number `index`: descriptors are in the order of saving, and sections are. NULL: no more. */
const struct cprd_item *cprd_item_at(const cprd_state *state, size_t index);
const struct cprd_item *cprd_find_section(const cprd_state *state, const char *key); /* or NULL */
int cprd_find_fd(const cprd_state *state, const char *name, int32_t id); /* borrowed; -1: none */
int cprd_take_fd(cprd_state *state, const char *name, int32_t id); /* the caller's from now on */

/* -- a connection ------------------------------------------------------------------------------ */

typedef struct cprd cprd;

/* `path` NULL: $CPRD_SOCKET, else /run/cprd/cprd.sock. */
int cprd_connect(const char *path, cprd **out);
void cprd_close(cprd *c); /* after all claims and prepared saves made through the connection */
void cprd_set_timeout(cprd *c, double seconds);
int cprd_socket(const cprd *c); /* borrowed; -1 while there is none */

struct cprd_saved {
    uint64_t generation; /* the number of the hold, greater than all before */
    int stored;          /* 1: survives a crash of cprd; 0: in memory, survives its restart */
};

struct cprd_save_options { /* all 0: an error where the name is taken, for ever, served at once */
    int replace;
    double ttl;        /* seconds until the hold is dropped unless loaded; 0: none */
    int after_exit;    /* CPRD_NOW, CPRD_AFTER_ME (served after the end of this process), or ... */
    int process;       /* ... CPRD_AFTER_PROCESS, whose pidfd this is; borrowed */
    int require_store; /* LIMIT_EXCEEDED where cprd would keep the state in memory only */
};
enum { CPRD_NOW, CPRD_AFTER_ME, CPRD_AFTER_PROCESS };

/* The state stays the caller's, as are its descriptors, which may be closed after the return.
 * `options` and `out` may be NULL. */
int cprd_save(cprd *c, const char *name, cprd_state *state, const struct cprd_save_options *options,
              struct cprd_saved *out);

typedef struct cprd_claim cprd_claim; /* an exclusive lease on a hold */
typedef cprd_claim cprd_prepared;     /* kept, and not served before the commit */

int cprd_prepare(cprd *c, const char *name, cprd_state *state,
                 const struct cprd_save_options *options, cprd_prepared **out);
int cprd_commit(cprd_prepared *p, struct cprd_saved *out);
int cprd_abort(cprd_prepared *p); /* what was held before is served */
void cprd_prepared_free(cprd_prepared *p); /* without a commit or abort the state is in doubt,
                                              as soon as the connection ends */

struct cprd_load_options {
    double wait;         /* seconds to wait for the hold, at most; on a connection of its own */
    double lease;        /* seconds until an unconfirmed claim goes back; 0: 30 */
    uint64_t generation; /* that hold only, else FENCED; 0: any */
};

/* What a killed owner of a live hold left can be loaded, too, where cprd_live.c is linked; memory
 * comes as sections "memory.NAME". */
int cprd_load(cprd *c, const char *name, const struct cprd_load_options *options, cprd_claim **out);
/* Owned by the claim. Descriptors and bytes that nobody took live until cprd_claim_close. */
cprd_state *cprd_claim_state(cprd_claim *claim);
uint64_t cprd_claim_generation(const cprd_claim *claim);
uint64_t cprd_claim_attempts(const cprd_claim *claim); /* loads of the hold, this one included */
const char *cprd_claim_last_reject(const cprd_claim *claim); /* why it was given back before */
/* From now on this process, or that of the pidfd `process` (borrowed; -1: none), acts on the
 * state: without a confirm or reject the hold is in doubt, and served again by force only. */
int cprd_begin(cprd_claim *claim, int process);
int cprd_confirm(cprd_claim *claim); /* the hold is gone; the state is this program's */
int cprd_reject(cprd_claim *claim, const char *why); /* held again, with the reason */
/* Gives back what is neither confirmed, rejected nor begun, and closes what nobody took. */
void cprd_claim_close(cprd_claim *claim);

/* Waits until `name` could be loaded; claims nothing. Errors as of a load when the time is over. */
int cprd_wait(cprd *c, const char *name, double seconds, uint64_t *generation);

int cprd_renew(cprd_claim *claim, double lease); /* seconds; 0: as before */
/* The hold is gone and `next` is held in its place, in one step. `replace` is not looked at. */
int cprd_confirm_next(cprd_claim *claim, cprd_state *next, const struct cprd_save_options *options,
                      struct cprd_saved *out);
int cprd_drop(cprd *c, const char *name, int force);
int cprd_release(cprd *c, const char *name, int force);

struct cprd_row {
    const char *name, *phase; /* valid during the call */
    uint64_t uid, generation, fds, bytes;
};
int cprd_list(cprd *c, void (*each)(void *context, const struct cprd_row *row), void *context);

/* -- a live hold: cprd_live.c -------------------------------------------------------------------
 *
 * A state that is kept at every change, so that kill -9 of its owner loses nothing. What a function
 * changed is kept when the function returns CPRD_OK. No change talks to cprd. After CPRD_FENCED
 * (the hold was dropped by force) no change counts any more. Hold the lock that keeps other threads
 * out across fork(), too. A forked child has no part in a hold.
 *
 * delete, replace and settle let go of descriptors: they may block where the last close of a file
 * does (SO_LINGER, network file systems). Close your own descriptor after the delete. */
typedef struct cprd_live cprd_live;

/* Claims what is held under `name`, live or saved, or begins with nothing. `options` may be NULL;
 * no generation in it. Call it after the last fork of a program that daemonizes itself. */
int cprd_live_open(cprd *c, const char *name, const struct cprd_load_options *options,
                   cprd_live **out);
/* Whether a predecessor left something: take what you need from the state, then confirm. Until
 * then nothing can be changed, and the hold goes back whole if this process ends. */
int cprd_live_found(const cprd_live *live);
/* What the predecessor left; owned by the hold until cprd_live_close, what was taken excepted. */
cprd_state *cprd_live_state(cprd_live *live);
int cprd_live_confirm(cprd_live *live); /* once more after TIMEOUT or UNAVAILABLE */
/* Where cprd keeps in memory only, an owner puts its hold back into the next cprd. Call this when
 * cprd_live_socket() becomes readable, or every few seconds. Blocks as requests do. */
int cprd_live_check(cprd_live *live);
int cprd_live_socket(const cprd_live *live); /* borrowed; -1: call cprd_live_check soon */
int cprd_live_end(cprd_live *live); /* keep nothing any more; then cprd_live_close */
/* Stop owning; the next process finds everything. Frees `live`, and unmaps its memory. */
void cprd_live_close(cprd_live *live);

/* One change; `fd` is borrowed and may be closed after the return, `data` is copied. */
enum cprd_live_op {
    CPRD_SAVE_FD,        /* name, id, fd; refused where the key is in use */
    CPRD_REPLACE_FD,     /* name, id, fd */
    CPRD_DELETE_FD,      /* name, id; an absent key is no error, nor below */
    CPRD_SAVE_SECTION,   /* name, data, size, packed; replaces */
    CPRD_DELETE_SECTION, /* name */
    CPRD_DELETE_MEMORY   /* name; what is mapped stays mapped until cprd_live_close */
};
struct cprd_live_change {
    enum cprd_live_op op;
    const char *name;
    int32_t id;
    int fd;
    const void *data;
    size_t size;
    int packed;
};
/* All of them in one step, or none; a key appears once. LIMIT_EXCEEDED: nothing was changed, unless
 * the text says that the change counts. */
int cprd_live_change(cprd_live *live, const struct cprd_live_change *changes, size_t count);
static inline int cprd_live_save_fd(cprd_live *live, const char *name, int32_t id, int fd) {
    struct cprd_live_change one = {CPRD_SAVE_FD, name, id, fd, NULL, 0, 0};
    return cprd_live_change(live, &one, 1);
}
static inline int cprd_live_delete_fd(cprd_live *live, const char *name, int32_t id) {
    struct cprd_live_change one = {CPRD_DELETE_FD, name, id, -1, NULL, 0, 0};
    return cprd_live_change(live, &one, 1);
}
static inline int cprd_live_save_section(cprd_live *live, const char *key, const void *data,
                                         size_t size, int packed) {
    struct cprd_live_change one = {CPRD_SAVE_SECTION, key, 0, -1, data, size, packed};
    return cprd_live_change(live, &one, 1);
}
/* Writable memory that outlives this process: zeros when new, else as the predecessor left it.
 * INVALID_INPUT for another size than the memory has. Valid until cprd_live_close. */
int cprd_live_memory(cprd_live *live, const char *name, size_t size, void **out);
int cprd_live_clear(cprd_live *live); /* keep nothing, in one step */
/* Let go of what an earlier change, or a killed predecessor, did not come to. The next change does
 * the same. Confirm has done so. */
static inline int cprd_live_settle(cprd_live *live) { return cprd_live_change(live, NULL, 0); }
size_t cprd_live_kept(const cprd_live *live); /* keys */

/* Without cprd: by both ends of a root, a SEQPACKET pair whose receiving end somebody keeps. Owns
 * `tx` and `rx`, also on failure. `hold`: a random number, not 0. What is kept in `root` is taken
 * over: the receiving end of another root whose owner has ended; borrowed, and nobody can append
 * there from now on; or -1. No queue of the predecessor is changed before cprd_live_settle or the
 * first change: whoever keeps `root` must have the new one by then. */
int cprd_live_take(int root, int tx, int rx, uint64_t hold, cprd_live **out);
static inline int cprd_live_begin(int tx, int rx, uint64_t hold, cprd_live **out) {
    return cprd_live_take(-1, tx, rx, hold, out);
}
/* What an owner that has ended left, as a state; memory as sections "memory.NAME". `root` as above.
 * LIMIT_EXCEEDED: does not fit in this process. */
int cprd_live_read(int root, cprd_state **out);

/* What a bundle holds, as a state: `bundle` is a receiving end with one message, borrowed, and
 * stays as it is. DAMAGED, BUSY (a later version), LIMIT_EXCEEDED (no room in this process). */
int cprd_unpack(int bundle, cprd_state **out);

/* -- between cprd.c and cprd_live.c: not for programs ------------------------------------------ */
#ifdef CPRD_INTERNAL
#include <pthread.h>
#include <sys/types.h>
#include <sys/un.h>

enum {
    CPRD__SCM_MAX = 253, /* descriptors of one message */
    CPRD__HEADER = 32,   /* bytes of a message of a bundle */
    CPRD__FD = 0,        /* the spaces of keys */
    CPRD__SECTION,
    CPRD__MEMORY
};

extern _Thread_local struct cprd_error cprd__last;
__attribute__((format(printf, 2, 3))) int cprd__fail(int code, const char *format, ...);
int cprd__no_memory(void);
int cprd__no_room(const char *what); /* for one more descriptor */
int cprd__explain(int error);        /* the errno of a send with descriptors, as an error */
#ifdef CPRD_PAUSE
__attribute__((format(printf, 1, 2))) void cprd__point(const char *format, ...); /* of tests */
#else
#define cprd__point(...) ((void)0)
#endif

struct cprd__bytes { /* grows; `failed`: no memory, and the bytes are not all there */
    unsigned char *at;
    size_t size, room;
    int failed;
};
void cprd__put(struct cprd__bytes *b, const void *data, size_t size);
void cprd__put_little(struct cprd__bytes *b, uint64_t value, int width);
uint64_t cprd__little(const unsigned char *at, int width);

struct cprd__key { /* the first member of what has a key */
    struct cprd__key *below[4]; /* of a tree of keys: by two more bits of their hashes */
    int space;
    int32_t id;
    size_t length;
    char *name; /* and a NUL, in a tree */
};
struct cprd__key cprd__key(int space, const void *name, size_t length, int32_t id);
int cprd__check_name(const struct cprd__key *key);
/* Where the key is, or would be, in the tree with the top *slot. */
struct cprd__key **cprd__slot(struct cprd__key **slot, const struct cprd__key *key);

/* One message. Returns 0 or an errno. At the limit in flight it is sent once more, with the soft
 * RLIMIT_NOFILE at the hard one. */
int cprd__send(int sock, const void *data, size_t size, const int *fds, size_t count);
/* One message. The caller owns fds[0..*count]. `flags`: in, and out MSG_CTRUNC, MSG_TRUNC. */
long cprd__receive(int sock, void *data, size_t size, int *fds, size_t *count, int *flags);
int cprd__pair(int *tx, int *rx);
void cprd__close_all(const int *fds, size_t count);
int cprd__waiting(int sock); /* bytes in its queue */
uint64_t cprd__cookie(int fd); /* of a socket, as of no other; else 0 */
int cprd__room_for(uint64_t count); /* of descriptors, in this process */
int cprd__memfd(const char *name, const void *data, size_t size, int *out); /* sealed */
int cprd__is_sealed(int memfd);
int cprd__fdinfo(int fd, const char *key, long *value); /* of /proc; returns whether it is there */

/* Add to a state. A descriptor is the state's when this returns OK, where `owned`. A section that
 * is not owned replaces what is there. */
int cprd__add(cprd_state *s, const struct cprd__key *key, int fd, int owned, const void *data,
              size_t size, int packed);

struct cprd__packed { /* a state apart from the queue of the root */
    unsigned char header[CPRD__HEADER];
    int *fds, *made;  /* of the root, borrowed; what packing opened */
    size_t parked, made_count, fd_count;
    uint64_t size;
    int depth;
};
enum kind { /* of values of msgpack */
    NIL = 'n', BAD = '-', NUMBER = 'u', FLOAT = 'f', DOUBLE = 'd',
    TEXT = 't', BINARY = 'x', ARRAY = 'a', MAP = 'm'
};
struct value {
    enum kind kind;
    uint64_t number; /* of NUMBER, a boolean too; bits of DOUBLE; how many items, or bytes */
    const unsigned char *data, *end; /* of text and binary; where items begin, and must end */
};
uint64_t cprd__number(struct value map, const char *key, uint64_t otherwise);

struct cprd {
    int sock;
    pid_t owner;       /* not its forked children */
    uint64_t connects; /* so often */
    uint64_t id, pid;  /* of the last request; of this process, as cprd sees the process */
    double timeout;
    _Atomic uint64_t cookie; /* of the socket */
    pthread_mutex_t lock;    /* threads take turns; of all above */
    struct sockaddr_un address;
};
struct cprd__call { /* a request; cprd__request frees what the call has */
    struct cprd__bytes m;
    const char *verb;
    double wait; /* s; cprd lets the request wait so long: the value of the last field */
    const struct cprd__packed *packed;
};
struct cprd__answer { /* `fd` is the reader's to close; -1: none */
    int fd, cut; /* cut: no room for a descriptor here */
    struct value of; /* a map, of `bytes` */
    unsigned char bytes[64 * 1024 + 1];
};
struct cprd_claim { /* or a prepared save, or what a live hold has: the right to speak for a hold */
    cprd *c;
    cprd *own; /* a connection for this alone, or NULL */
    char *name, last_reject[1025];
    uint64_t generation, attempts;
    unsigned char token[16], nonces[2][16]; /* of its two ends: the same words are one request */
    cprd_state *state;
    int stored, over, bundle, stays; /* stays: its close gives nothing back */
};
/* A request, about the hold of a claim (or NULL). `nonce` NULL: a new one. */
struct cprd__call cprd__call_of(const cprd_claim *t, const char *verb, const void *nonce);
/* Adds fields. `format` has for each a key and the type of an argument: "s" a text, "b" 16 bytes,
 * "d" a double, "f" a flag, "n" what the flag is not (int), "u" a uint64_t. NULL and 0 are left
 * out, so that the default counts; but for "U", a uint64_t that may be 0. */
void cprd__fields(struct cprd__call *call, const char *format, ...);
/* Sends a request, again where the connection is lost. Returns what cprd says, or UNAVAILABLE,
 * TIMEOUT. */
int cprd__request(cprd *c, struct cprd__call *call, struct cprd__answer *a);
uint64_t cprd__connects(cprd *c); /* the number of the connection; 0: cprd has ended it */
int cprd__no_fd(const struct cprd__answer *a); /* why an answer brought no descriptor */
/* `load`, `live` or `wait`. The claim is to be closed in any case. */
int cprd__claim(cprd_claim *t, cprd *c, const char *verb, const char *name,
                const struct cprd_load_options *options, const struct cprd__packed *packed,
                struct cprd__answer *a);
void cprd__set(cprd_claim *t, const struct cprd__answer *a); /* what the answer gave */
/* commit, abort, confirm, reject. `cause`: the error for which this process cannot read a state. */
int cprd__end(cprd_claim *t, const char *verb, const char *why, int cause);
/* Unless ended. Returns `cause`; FENCED where the claim was over before: then for that reason. */
int cprd__give_back(cprd_claim *t, int cause);
void cprd__close(cprd_claim *t); /* what belongs to it alone; not the state, nor the bundle */
/* As cprd_unpack, of a live hold; NULL where cprd_live.c is not linked. */
__attribute__((weak)) int cprd__unpack_live(int bundle, cprd_state **out);
#endif

#ifdef __cplusplus
}
#endif
#endif
