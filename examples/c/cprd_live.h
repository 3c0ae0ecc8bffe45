/* A live hold: a state that is kept at every change, so that kill -9 of its owner loses nothing.
 *
 * What a function changed is kept when the function returns CPRD_OK. No change talks to cprd. After
 * CPRD_FENCED (the hold was dropped by force) no change counts any more. One thread at a time; hold
 * the lock that makes it so across fork(), too. A forked child has no part in a hold.
 *
 * delete, replace and settle let go of descriptors: they may block where the last close of a file
 * does (SO_LINGER, network file systems). Close your own descriptor after the delete.
 */
#ifndef CPRD_LIVE_H
#define CPRD_LIVE_H

#include "cprd.h"

#ifdef __cplusplus
extern "C" {
#endif

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
int cprd_live_save_fd(cprd_live *live, const char *name, int32_t id, int fd);
int cprd_live_delete_fd(cprd_live *live, const char *name, int32_t id);
int cprd_live_save_section(cprd_live *live, const char *key, const void *data, size_t size,
                           int packed);
/* Writable memory that outlives this process: zeros when new, else as the predecessor left it.
 * INVALID_INPUT for another size than the memory has. Valid until cprd_live_close. */
int cprd_live_memory(cprd_live *live, const char *name, size_t size, void **out);
int cprd_live_clear(cprd_live *live); /* keep nothing, in one step */
/* Let go of what an earlier change, or a killed predecessor, did not come to. The next change does
 * the same. Confirm has done so. */
int cprd_live_settle(cprd_live *live);
size_t cprd_live_kept(const cprd_live *live); /* keys */

/* -- without cprd: both ends of a root, a SEQPACKET pair whose receiving end somebody keeps -- */

/* An empty hold. Owns `tx` and `rx`, also on failure. `hold`: a random number, not 0. */
int cprd_live_begin(int tx, int rx, uint64_t hold, cprd_live **out);
/* What an owner that has ended left. `root`: the receiving end, borrowed; nobody can append from
 * now on. LIMIT_EXCEEDED: does not fit in this process. */
int cprd_live_read(int root, cprd_live **out);
/* What was read is owned, in a new root (owned as above). No queue of the predecessor is changed
 * before cprd_live_settle or the first change: whoever keeps the root must have the new one by
 * then. */
int cprd_live_take(cprd_live *live, int tx, int rx, uint64_t hold);

#ifdef __cplusplus
}
#endif
#endif
