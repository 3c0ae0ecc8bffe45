/* Answers bind() of a held address with the held socket; for LD_PRELOAD (cprctl run --bind).
 *
 * CPRD_BIND has one entry a listener, joined by commas: FD:INODE:DEVICE:FILE, the descriptor, its
 * socket's inode, and for a path in the file system the device and inode of the file (else 0:0).
 * Each exec moves the descriptors out of the program's way, to high numbers, and says so in
 * CPRD_BIND for the next exec. They stay open until a bind() has been answered; from then on they
 * are closed by exec, so that what the service starts does not inherit them.
 *
 * bind() to exactly the address of a held socket (family, type, address, port, IPV6_V6ONLY of a
 * wildcard; of a path the file) puts that socket at the caller's descriptor with dup3(). Its
 * O_NONBLOCK and FD_CLOEXEC stay as they were, and the options that accepted sockets inherit are
 * copied. A second bind() of the same address (SO_REUSEPORT, a worker, a restart inside the
 * process) is answered as well. Any other bind() is the kernel's.
 *
 * What would end the held socket for all is kept from it: listen() with a smaller queue,
 * shutdown(), unlink() of its path, and a loop that closes every descriptor.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#ifndef CLOSE_RANGE_CLOEXEC
#define CLOSE_RANGE_CLOEXEC 4
#endif

enum { MOST = 256, QUEUE = 4096 };

struct held {
    int fd, domain, type, only6;
    unsigned given; /* how often this process has had it */
    ino_t inode;    /* of the socket */
    dev_t device;   /* of the file at its path, 0: none */
    ino_t file;
    socklen_t length;
    struct sockaddr_storage address;
};

static struct held held[MOST];
static int count, files;
static struct stat errors; /* what descriptor 2 was, when the program began */

/* The next definitions, which are libc's unless another object is preloaded too. Looked up before
 * main(): a child of fork() may call close() while another thread held the dynamic linker's lock. */
static struct {
    int (*bind)(int, const struct sockaddr *, socklen_t);
    int (*listen)(int, int);
    int (*shutdown)(int, int);
    int (*close)(int);
    int (*close_range)(unsigned, unsigned, int);
    int (*unlink)(const char *);
    int (*unlinkat)(int, const char *, int);
    int (*remove)(const char *);
} next;

static void look_up(void) {
    if (next.bind) return;
    *(void **)&next.listen = dlsym(RTLD_NEXT, "listen");
    *(void **)&next.shutdown = dlsym(RTLD_NEXT, "shutdown");
    *(void **)&next.close = dlsym(RTLD_NEXT, "close");
    *(void **)&next.close_range = dlsym(RTLD_NEXT, "close_range");
    *(void **)&next.unlink = dlsym(RTLD_NEXT, "unlink");
    *(void **)&next.unlinkat = dlsym(RTLD_NEXT, "unlinkat");
    *(void **)&next.remove = dlsym(RTLD_NEXT, "remove");
    *(void **)&next.bind = dlsym(RTLD_NEXT, "bind");
}

static int option(int fd, int level, int name) {
    int value = 0;
    socklen_t length = sizeof value;
    return getsockopt(fd, level, name, &value, &length) ? -1 : value;
}

static int is_socket(int fd, ino_t inode) {
    struct stat found;
    return !fstat(fd, &found) && S_ISSOCK(found.st_mode) && found.st_ino == inode;
}

/* The held socket that a descriptor is: one of ours, or what a bind() was answered with. */
static struct held *same_socket(int fd) {
    struct stat found;
    if (!count || fstat(fd, &found) || !S_ISSOCK(found.st_mode)) return NULL;
    for (int i = 0; i < count; i++)
        if (held[i].inode == found.st_ino) return &held[i];
    return NULL;
}

/* Whether a descriptor is where we keep a held socket. */
static int kept_at(int fd) {
    for (int i = 0; i < count; i++)
        if (held[i].fd == fd) return is_socket(fd, held[i].inode);
    return 0;
}

static int out_of_the_way(int fd, int spare) {
    struct rlimit limit;
    long at = 1000;
    if (!getrlimit(RLIMIT_NOFILE, &limit) && limit.rlim_cur < (rlim_t)(at + spare))
        at = (long)limit.rlim_cur - spare;
    if (fd >= at || at < 3) return fd;
    int high = fcntl(fd, F_DUPFD, (int)at);
    if (high < 0) return fd;
    close(fd);
    return high;
}

static void know(int fd, unsigned long long inode, unsigned long long device,
                 unsigned long long file) {
    struct held *one = &held[count];
    one->length = sizeof one->address;
    if (!is_socket(fd, (ino_t)inode)) return; /* closed by an exec, or by the program */
    if (getsockname(fd, (struct sockaddr *)&one->address, &one->length)) return;
    one->domain = option(fd, SOL_SOCKET, SO_DOMAIN);
    one->type = option(fd, SOL_SOCKET, SO_TYPE);
    one->only6 = one->domain == AF_INET6 ? option(fd, IPPROTO_IPV6, IPV6_V6ONLY) : 0;
    one->inode = (ino_t)inode;
    one->device = (dev_t)device;
    one->file = (ino_t)file;
    files += device || file;
    one->fd = out_of_the_way(fd, MOST);
    count++;
}

__attribute__((constructor)) static void learn(void) {
    const char *at = getenv("CPRD_BIND");
    look_up();
    if (fstat(2, &errors)) errors.st_ino = 0;
    static char said[MOST * 96];
    unsigned long long inode, device, file;
    int fd, used;
    size_t length = 0;
    while (at && count < MOST &&
           sscanf(at, "%d:%llu:%llu:%llu%n", &fd, &inode, &device, &file, &used) == 4) {
        know(fd, inode, device, file);
        at += used;
        if (*at++ != ',') break;
    }
    for (int i = 0; i < count; i++)
        length += (size_t)snprintf(said + length, sizeof said - length, "%s%d:%llu:%llu:%llu",
                                   i ? "," : "", held[i].fd, (unsigned long long)held[i].inode,
                                   (unsigned long long)held[i].device,
                                   (unsigned long long)held[i].file);
    if (count) setenv("CPRD_BIND", said, 1);
}

/* -- bind -------------------------------------------------------------------------------------- */

static int same_path(const struct held *one, const struct sockaddr_un *wanted, socklen_t length) {
    const struct sockaddr_un *known = (const struct sockaddr_un *)&one->address;
    size_t start = offsetof(struct sockaddr_un, sun_path);
    if (length <= start) return 0; /* any name */
    if (!wanted->sun_path[0]) /* abstract */
        return length == one->length && !memcmp(wanted->sun_path, known->sun_path, length - start);
    char path[sizeof wanted->sun_path + 1];
    struct stat found;
    size_t room = length - start < sizeof path - 1 ? length - start : sizeof path - 1;
    memcpy(path, wanted->sun_path, room);
    path[room] = 0;
    return one->file && !stat(path, &found) && found.st_dev == one->device &&
           found.st_ino == one->file;
}

static int same_address(const struct held *one, int fd, const struct sockaddr *wanted,
                        socklen_t length) {
    if (wanted->sa_family != one->address.ss_family) return 0;
    if (wanted->sa_family == AF_INET && length >= sizeof(struct sockaddr_in)) {
        const struct sockaddr_in *a = (const void *)wanted, *b = (const void *)&one->address;
        return a->sin_port == b->sin_port && a->sin_addr.s_addr == b->sin_addr.s_addr;
    }
    if (wanted->sa_family == AF_INET6 && length >= sizeof(struct sockaddr_in6)) {
        const struct sockaddr_in6 *a = (const void *)wanted, *b = (const void *)&one->address;
        if (a->sin6_port != b->sin6_port || memcmp(&a->sin6_addr, &b->sin6_addr, 16)) return 0;
        if (IN6_IS_ADDR_UNSPECIFIED(&a->sin6_addr))
            return option(fd, IPPROTO_IPV6, IPV6_V6ONLY) == one->only6;
        return a->sin6_scope_id == b->sin6_scope_id;
    }
    if (wanted->sa_family == AF_UNIX) return same_path(one, (const void *)wanted, length);
    return 0;
}

/* The held socket for a bind(); of several (SO_REUSEPORT) the one given least often. */
static struct held *find(int fd, const struct sockaddr *wanted, socklen_t length) {
    struct held *best = NULL;
    if (!count || !wanted || length < sizeof wanted->sa_family) return NULL;
    int domain = option(fd, SOL_SOCKET, SO_DOMAIN), type = option(fd, SOL_SOCKET, SO_TYPE);
    for (int i = 0; i < count; i++) {
        struct held *one = &held[i];
        if (one->domain != domain || one->type != type || !is_socket(one->fd, one->inode)) continue;
        if (!same_address(one, fd, wanted, length) || is_socket(fd, one->inode)) continue;
        if (!best || one->given < best->given) best = one;
    }
    return best;
}

static const struct {
    int level, name;
} copied[] = {
    {SOL_SOCKET, SO_KEEPALIVE},
    {SOL_SOCKET, SO_PASSCRED},
    {SOL_SOCKET, SO_TIMESTAMP},
    {SOL_SOCKET, SO_RXQ_OVFL},
    {IPPROTO_IP, IP_PKTINFO},
    {IPPROTO_IP, IP_TOS},
    {IPPROTO_IP, IP_TTL},
    {IPPROTO_IP, IP_RECVTTL},
    {IPPROTO_IP, IP_RECVTOS},
    {IPPROTO_IP, IP_MTU_DISCOVER},
    {IPPROTO_IPV6, IPV6_RECVPKTINFO},
    {IPPROTO_IPV6, IPV6_TCLASS},
    {IPPROTO_IPV6, IPV6_RECVTCLASS},
    {IPPROTO_IPV6, IPV6_RECVHOPLIMIT},
    {IPPROTO_IPV6, IPV6_MTU_DISCOVER},
    {IPPROTO_TCP, TCP_NODELAY},
    {IPPROTO_TCP, TCP_KEEPIDLE},
    {IPPROTO_TCP, TCP_KEEPINTVL},
    {IPPROTO_TCP, TCP_KEEPCNT},
    {IPPROTO_TCP, TCP_DEFER_ACCEPT},
    {IPPROTO_TCP, TCP_USER_TIMEOUT},
};

static void copy_options(int from, const struct held *to) {
    for (size_t i = 0; i < sizeof copied / sizeof *copied; i++) {
        int level = copied[i].level, name = copied[i].name;
        if (level == IPPROTO_IP && to->domain != AF_INET) continue;
        if (level == IPPROTO_IPV6 && to->domain != AF_INET6) continue;
        if (level == IPPROTO_TCP && (to->domain == AF_UNIX || to->type != SOCK_STREAM)) continue;
        int value = option(from, level, name);
        if (value >= 0 && value != option(to->fd, level, name))
            setsockopt(to->fd, level, name, &value, sizeof value);
    }
}

/* A line on stderr, unless descriptor 2 is another file by now (a database, in a daemon). */
static void say(const char *format, const struct sockaddr *address, int type, int only6) {
    char name[INET6_ADDRSTRLEN] = "", where[INET6_ADDRSTRLEN + 24], line[256];
    const struct sockaddr_in *four = (const void *)address;
    const struct sockaddr_in6 *six = (const void *)address;
    int v6 = address->sa_family == AF_INET6;
    struct stat now;
    if (!errors.st_ino || fstat(2, &now)) return;
    if (now.st_dev != errors.st_dev || now.st_ino != errors.st_ino) return;
    inet_ntop(v6 ? AF_INET6 : AF_INET, v6 ? (const void *)&six->sin6_addr : &four->sin_addr, name,
              sizeof name);
    snprintf(where, sizeof where, "%s%s%s%s:%u%s", type == SOCK_DGRAM ? "udp:" : "", v6 ? "[" : "",
             name, v6 ? "]" : "", ntohs(four->sin_port), v6 && only6 == 1 ? ",v6only" : "");
    int length = snprintf(line, sizeof line, format, where);
    if (write(2, line, (size_t)length) < 0) errors.st_ino = 0;
}

/* Said once: the program binds an address that overlaps with a held one, and is not the same. */
static void hint(int fd, const struct sockaddr *wanted) {
    static int said;
    if (said || (wanted->sa_family != AF_INET && wanted->sa_family != AF_INET6)) return;
    in_port_t port = ((const struct sockaddr_in *)(const void *)wanted)->sin_port;
    int type = option(fd, SOL_SOCKET, SO_TYPE);
    for (int i = 0; i < count; i++) {
        const struct sockaddr_in *known = (const void *)&held[i].address;
        if (held[i].domain == AF_UNIX || held[i].type != type || known->sin_port != port) continue;
        say("cprd: the program binds another address than --listen says, and the held socket is in"
            " the way: --listen %s would be it\n",
            wanted, type, option(fd, IPPROTO_IPV6, IPV6_V6ONLY));
        said = 1;
        return;
    }
}

/* Said of the first few: the program listens where nothing is held. */
static void not_held(int fd) {
    static int said;
    struct sockaddr_storage address;
    struct sockaddr *name = (struct sockaddr *)&address;
    socklen_t length = sizeof address;
    if (!count || said >= 4 || getsockname(fd, name, &length)) return;
    if (name->sa_family != AF_INET && name->sa_family != AF_INET6) return;
    said++;
    say("cprd: the program listens on %s as well, which is not held: no --listen says so\n", name,
        SOCK_STREAM, option(fd, IPPROTO_IPV6, IPV6_V6ONLY));
}

int bind(int fd, const struct sockaddr *wanted, socklen_t length) {
    look_up();
    struct held *one = find(fd, wanted, length);
    if (!one) {
        int result = next.bind(fd, wanted, length), why = errno;
        if (result && why == EADDRINUSE && count) hint(fd, wanted);
        errno = why;
        return result;
    }
    int flags = fcntl(fd, F_GETFL), closes = fcntl(fd, F_GETFD);
    copy_options(fd, one);
    if (dup3(one->fd, fd, closes & FD_CLOEXEC ? O_CLOEXEC : 0) < 0) return -1;
    fcntl(fd, F_SETFL, (fcntl(fd, F_GETFL) & ~O_NONBLOCK) | (flags & O_NONBLOCK));
    fcntl(one->fd, F_SETFD, FD_CLOEXEC);
    one->given++;
    return 0;
}

/* -- what would end a held socket -------------------------------------------------------------- */

int listen(int fd, int backlog) {
    look_up();
    if (same_socket(fd)) {
        if (option(fd, SOL_SOCKET, SO_ACCEPTCONN) == 1) return 0;
        if (backlog < QUEUE) backlog = QUEUE;
        return next.listen(fd, backlog);
    }
    int result = next.listen(fd, backlog);
    if (!result) not_held(fd);
    return result;
}

int shutdown(int fd, int how) {
    look_up();
    int listens = same_socket(fd) && option(fd, SOL_SOCKET, SO_ACCEPTCONN) == 1;
    int result = next.shutdown(fd, how);
    if (listens) listen(fd, QUEUE); /* a thread that waits in accept() was woken up */
    return result;
}

int close(int fd) {
    look_up();
    return kept_at(fd) ? 0 : next.close(fd);
}

static unsigned next_kept(unsigned from) {
    unsigned best = ~0U;
    for (int i = 0; i < count; i++)
        if ((unsigned)held[i].fd >= from && (unsigned)held[i].fd < best && kept_at(held[i].fd))
            best = (unsigned)held[i].fd;
    return best;
}

int close_range(unsigned first, unsigned last, int flags) {
    look_up();
    if (!next.close_range) { /* glibc before 2.34 */
        errno = ENOSYS;
        return -1;
    }
    if (first > last) return next.close_range(first, last, flags);
    for (;;) {
        unsigned at = next_kept(first);
        if (at > last || at == ~0U) return next.close_range(first, last, flags);
        if (at > first && next.close_range(first, at - 1, flags)) return -1;
        if (at == last) return 0;
        first = at + 1;
    }
}

void closefrom(int low) {
    close_range(low > 0 ? (unsigned)low : 0, ~0U, 0);
}

static int is_held_file(int folder, const char *path) {
    struct stat found;
    if (!files || fstatat(folder, path, &found, AT_SYMLINK_NOFOLLOW)) return 0;
    for (int i = 0; i < count; i++)
        if (held[i].file && held[i].file == found.st_ino && held[i].device == found.st_dev)
            return is_socket(held[i].fd, held[i].inode);
    return 0;
}

int unlink(const char *path) {
    look_up();
    return is_held_file(AT_FDCWD, path) ? 0 : next.unlink(path);
}

int unlinkat(int folder, const char *path, int flags) {
    look_up();
    return is_held_file(folder, path) ? 0 : next.unlinkat(folder, path, flags);
}

int remove(const char *path) {
    look_up();
    return is_held_file(AT_FDCWD, path) ? 0 : next.remove(path);
}
