/* What cprd.c and cprd_live.c share. Not for programs. */
#ifndef CPRD_INTERNAL_H
#define CPRD_INTERNAL_H

#include "cprd.h"

#include <sys/types.h>

#ifndef SO_PEEK_OFF
#define SO_PEEK_OFF 42
#endif

enum {
    CPRD_SCM_MAX = 253, /* descriptors of one message */
    CPRD_MAX_SECTIONS = 1 << 16
};

extern _Thread_local struct cprd_error cprd__last;
extern const char *const cprd__names[]; /* of the codes */
int cprd__no_memory(void);
int cprd__no_room(const char *what, int error);
__attribute__((format(printf, 2, 3))) int cprd__fail(int code, const char *format, ...);
/* A pause point of the tests: nothing without -DCPRD_PAUSE. */
#ifdef CPRD_PAUSE
void cprd__point(const char *name);
#else
#define cprd__point(name) ((void)0)
#endif

struct cprd__bytes { /* grows; `failed`: no memory, and the bytes are not all there */
    unsigned char *at;
    size_t size, room;
    int failed;
};
void cprd__put(struct cprd__bytes *b, const void *data, size_t size);

static inline void cprd__little_endian(unsigned char *at, uint64_t value, int width) {
    for (int n = 0; n < width; n++) at[n] = (unsigned char)(value >> 8 * n);
}
static inline uint64_t cprd__number_at(const unsigned char *at, int width) {
    uint64_t value = 0;
    for (int n = width; n--;) value = value << 8 | at[n];
    return value;
}

/* One message with descriptors, which stay the caller's; at the limit in flight once more with the
 * soft RLIMIT_NOFILE at the hard one. Returns 0 or an errno. */
int cprd__send(int sock, const void *data, size_t size, const int *fds, size_t count);
/* One message. The caller owns fds[0..*count]. `seen`: MSG_CTRUNC, MSG_TRUNC. -1: errno. */
ssize_t cprd__receive(int sock, void *data, size_t size, int flags, int fds[CPRD_SCM_MAX],
                      size_t *count, int *seen);
int cprd__pair(int *tx, int *rx); /* both ends of a new queue, the caller's */
int cprd__raise_limit(uint64_t *soft, uint64_t *hard); /* to the hard one; ... */
void cprd__restore_limit(uint64_t soft);               /* ... after every cprd__raise_limit */
uint64_t cprd__soft_limit(void);
void cprd__close_all(const int *fds, size_t count);
int cprd__memfd(const char *name, const struct cprd__bytes *content, int *out); /* sealed */
int cprd__is_sealed(int memfd);
int cprd__waiting(int sock); /* bytes in its queue */

struct cprd__process {
    uint64_t pid, inode; /* pid 0: out of sight; inode 0: this kernel has none for pidfds */
    int ended;
};
int cprd__process(int pidfd, struct cprd__process *p);

struct cprd__key {
    char *name;
    int32_t id;
    int fd; /* -1: taken */
};
struct cprd__section {
    char *key;
    struct cprd__bytes content; /* where no memfd has the bytes */
    int memfd, packed, owned;
    void *map;
    size_t mapped;
};
struct cprd_state {
    struct cprd__key *keys;
    size_t count, room, slots;
    size_t *table; /* open addressing: 1 + index of a key, 0: free */
    int owned;     /* the descriptors are the state's, where not taken */
    struct cprd__section *sections;
    size_t section_count, section_room;
};
int cprd__section_size(const struct cprd__section *section, size_t *size);
int cprd__is_utf8(const unsigned char *at, size_t left);
/* What these add is the state's when they return OK. */
int cprd__own_fd(cprd_state *s, const char *name, size_t length, int32_t id, int fd);
int cprd__own_section(cprd_state *s, const char *key, size_t length, const void *data, size_t size,
                      int memfd, int packed); /* memfd -1: the bytes are copied */

/* Short names in these files. */
typedef struct cprd__bytes bytes;
#define fail cprd__fail
#define last cprd__last
#define point cprd__point
#define put cprd__put
#define no_memory cprd__no_memory
#define no_room cprd__no_room
#define is_utf8 cprd__is_utf8
#define section_size cprd__section_size
#define number_at cprd__number_at
#define little_endian cprd__little_endian

#endif
