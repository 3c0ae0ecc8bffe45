/* A client of cprd in C11, for Linux, without dependencies: compile cprd.c with your program.
 *
 * A state is descriptors under keys (name, id), in order, and named sections of bytes. One process
 * saves a state under a name, another loads that state, whole, and confirms.
 *
 * Functions return CPRD_OK or an error code; cprd_last() has the words. All block until cprd has
 * answered, at most the timeout of the connection (20 s, cprd_set_timeout) and whatever the call
 * itself waits for. A lost connection is opened again and the request repeated, with the same
 * nonce: whatever was asked for is done once. One thread at a time may use a connection and what
 * was made through the connection; a child of fork() needs a connection of its own.
 *
 * After CPRD_TIMEOUT or CPRD_UNAVAILABLE the outcome is unknown. The same call of commit, abort,
 * confirm or reject once more repeats the same request, and gets the first answer.
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
/* The bytes are copied. `packed`: they are one msgpack value, else raw bytes. */
int cprd_add_section(cprd_state *state, const char *key, const void *data, size_t size, int packed);
/* A memfd with all of F_SEAL_SEAL, SHRINK, GROW and WRITE; borrowed as cprd_add_fd. */
int cprd_add_memfd(cprd_state *state, const char *key, int memfd, int packed);

void cprd_delete_section(cprd_state *state, const char *key); /* absent: no error */

size_t cprd_fd_count(const cprd_state *state);
/* The descriptor number `index`, in the order of saving: borrowed, -1 where taken. */
int cprd_fd_at(const cprd_state *state, size_t index, const char **name, int32_t *id);
int cprd_find_fd(const cprd_state *state, const char *name, int32_t id); /* borrowed; -1: none */
int cprd_take_fd(cprd_state *state, const char *name, int32_t id); /* the caller's from now on */
size_t cprd_section_count(const cprd_state *state);
const char *cprd_section_key(const cprd_state *state, size_t index);
/* The bytes of a section, valid until cprd_state_free. NOT_HELD: the state has no such section. */
int cprd_section(cprd_state *state, const char *key, const void **data, size_t *size, int *packed);
int cprd_section_fd(const cprd_state *state, const char *key); /* its memfd, borrowed; -1: none */

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

typedef struct cprd_prepared cprd_prepared; /* kept, and not served before the commit */

int cprd_prepare(cprd *c, const char *name, cprd_state *state,
                 const struct cprd_save_options *options, cprd_prepared **out);
int cprd_commit(cprd_prepared *p, struct cprd_saved *out);
int cprd_abort(cprd_prepared *p); /* what was held before is served */
void cprd_prepared_free(cprd_prepared *p); /* without a commit or abort the state is in doubt,
                                              as soon as the connection ends */

typedef struct cprd_claim cprd_claim; /* an exclusive lease on a hold */

struct cprd_load_options {
    double wait;         /* seconds to wait for the hold, at most; on a connection of its own */
    double lease;        /* seconds until an unconfirmed claim goes back; 0: 30 */
    uint64_t generation; /* that hold only, else FENCED; 0: any */
};

/* What a killed owner of a live hold left can be loaded, too, where cprd_hold.c is linked; memory
 * comes as sections "memory.NAME". */
int cprd_load(cprd *c, const char *name, const struct cprd_load_options *options, cprd_claim **out);
/* Owned by the claim. Descriptors and bytes that nobody took live until cprd_claim_close. */
cprd_state *cprd_claim_state(cprd_claim *claim);
uint64_t cprd_claim_generation(const cprd_claim *claim);
uint64_t cprd_claim_attempts(const cprd_claim *claim); /* loads of the hold, this one included */
const char *cprd_claim_last_reject(const cprd_claim *claim); /* why it was given back before */
int cprd_renew(cprd_claim *claim, double lease); /* seconds; 0: as before */
/* From now on this process, or that of the pidfd `process` (borrowed; -1: none), acts on the
 * state: without a confirm or reject the hold is in doubt, and served again by force only. */
int cprd_begin(cprd_claim *claim, int process);
int cprd_confirm(cprd_claim *claim); /* the hold is gone; the state is this program's */
/* The hold is gone and `next` is held in its place, in one step. `replace` is not looked at. */
int cprd_confirm_next(cprd_claim *claim, cprd_state *next, const struct cprd_save_options *options,
                      struct cprd_saved *out);
int cprd_reject(cprd_claim *claim, const char *why); /* held again, with the reason */
/* Gives back what is neither confirmed, rejected nor begun, and closes what nobody took. */
void cprd_claim_close(cprd_claim *claim);

/* Waits until `name` could be loaded; claims nothing. Errors as of a load when the time is over. */
int cprd_wait(cprd *c, const char *name, double seconds, uint64_t *generation);
int cprd_drop(cprd *c, const char *name, int force);
int cprd_release(cprd *c, const char *name, int force);

struct cprd_row {
    const char *name, *phase; /* valid during the call */
    uint64_t uid, generation, fds, bytes;
};
int cprd_list(cprd *c, void (*each)(void *context, const struct cprd_row *row), void *context);

#ifdef __cplusplus
}
#endif
#endif
