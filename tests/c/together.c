/* What a library meets in a program: fork(), threads, a million changes. Ends with a line that says
 * which condition failed, or with "ok". */
#define _GNU_SOURCE
#include "cprd.h"

#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#define CHECK(condition)                                                                   \
    do {                                                                                   \
        if (!(condition)) {                                                                \
            printf("line %d: %s: %s\n", __LINE__, #condition, cprd_last()->text);          \
            fflush(stdout);                                                                \
            _exit(1);                                                                      \
        }                                                                                  \
    } while (0)

enum { THREADS = 4, ROUNDS = 25, KEYS = 1000 };

static int refused(int code) {
    return code == CPRD_INVALID_INPUT && strstr(cprd_last()->text, "forked child");
}

static cprd_state *state_of(int fd) {
    cprd_state *s = cprd_state_new();
    CHECK(s && !cprd_add_fd(s, "event", 0, fd));
    return s;
}

static void await_child(pid_t child) {
    int status;
    CHECK(child > 0 && waitpid(child, &status, 0) == child);
    CHECK(WIFEXITED(status) && !WEXITSTATUS(status));
}

/* A child uses what the parent made: is refused, and the parent's claim goes on. */
static void fork_with_a_claim(void) {
    cprd *c, *own;
    cprd_claim *claim;
    cprd_prepared *prepared;
    int event = eventfd(0, EFD_CLOEXEC);
    cprd_state *s = state_of(event);
    CHECK(!cprd_connect(NULL, &c));
    struct cprd_save_options wrong = {.after_exit = 3};
    CHECK(cprd_save(c, "web", s, &wrong, NULL) == CPRD_INVALID_INPUT);
    CHECK(!cprd_save(c, "web", s, NULL, NULL) && !cprd_load(c, "web", NULL, &claim));
    CHECK(!cprd_prepare(c, "other", s, NULL, &prepared));
    pid_t child = fork();
    if (!child) {
        CHECK(refused(cprd_save(c, "more", s, NULL, NULL)));
        CHECK(refused(cprd_confirm(claim)) && refused(cprd_reject(claim, "")));
        CHECK(refused(cprd_renew(claim, 1)) && refused(cprd_begin(claim, -1)));
        CHECK(refused(cprd_commit(prepared, NULL)) && refused(cprd_abort(prepared)));
        CHECK(refused(cprd_drop(c, "web", 1)) && refused(cprd_confirm_next(claim, s, NULL, NULL)));
        cprd_claim_close(claim);
        cprd_prepared_free(prepared);
        cprd_close(c);
        CHECK(!cprd_connect(NULL, &own) && !cprd_save(own, "child's", s, NULL, NULL));
        CHECK(cprd_load(own, "web", NULL, &claim) == CPRD_BUSY);
        cprd_close(own);
        cprd_state_free(s);
        _exit(0);
    }
    await_child(child);
    CHECK(cprd_find_fd(cprd_claim_state(claim), "event", 0) >= 0);
    CHECK(!cprd_renew(claim, 0) && !cprd_confirm(claim) && !cprd_commit(prepared, NULL));
    CHECK(cprd_renew(claim, 0) == CPRD_FENCED && cprd_confirm(claim) == CPRD_FENCED);
    CHECK(!cprd_drop(c, "other", 0) && !cprd_drop(c, "child's", 0));
    cprd_claim_close(claim);
    cprd_prepared_free(prepared);
    cprd_state_free(s);
    cprd_close(c);
    close(event);
}

static void fork_with_a_live_hold(void) {
    cprd *c, *own;
    cprd_live *live, *childs;
    void *memory;
    int event = eventfd(0, EFD_CLOEXEC);
    CHECK(!cprd_connect(NULL, &c) && !cprd_live_open(c, "web", NULL, &live));
    CHECK(!cprd_live_save_fd(live, "event", 0, event));
    CHECK(!cprd_live_memory(live, "m", 4096, &memory));
    strcpy(memory, "parent's");
    pid_t child = fork();
    if (!child) {
        CHECK(refused(cprd_live_save_fd(live, "event", 1, event)));
        CHECK(refused(cprd_live_delete_fd(live, "event", 0)));
        CHECK(refused(cprd_live_save_section(live, "s", "", 0, 0)));
        CHECK(refused(cprd_live_memory(live, "m", 4096, &memory)));
        CHECK(refused(cprd_live_clear(live)) && refused(cprd_live_settle(live)));
        CHECK(refused(cprd_live_end(live)) && refused(cprd_live_check(live)));
        cprd_live_close(live);
        cprd_close(c);
        CHECK(!cprd_connect(NULL, &own) && !cprd_live_open(own, "child's", NULL, &childs));
        CHECK(!cprd_live_save_fd(childs, "event", 0, event));
        CHECK(!cprd_live_end(childs));
        cprd_live_close(childs);
        cprd_close(own);
        _exit(0);
    }
    await_child(child);
    CHECK(!cprd_live_check(live) && !cprd_live_save_fd(live, "event", 1, event));
    CHECK(!cprd_live_delete_fd(live, "event", 0) && cprd_live_kept(live) == 2);
    CHECK(!strcmp(memory, "parent's"));
    cprd_live_close(live); /* kept for the test */
    cprd_close(c);
    close(event);
}

/* cprd stands still twice: no answer comes in time, and the claim goes on. */
static void wait_for_a_stopped_cprd(void) {
    cprd *c;
    cprd_claim *claim;
    struct ucred peer;
    socklen_t size = sizeof peer;
    cprd_state *s = cprd_state_new();
    CHECK(!cprd_connect(NULL, &c) && !cprd_save(c, "web", s, NULL, NULL));
    CHECK(!cprd_load(c, "web", NULL, &claim));
    CHECK(!getsockopt(cprd_socket(c), SOL_SOCKET, SO_PEERCRED, &peer, &size));
    cprd_set_timeout(c, 0.2);
    CHECK(!kill(peer.pid, SIGSTOP) && cprd_renew(claim, 0) == CPRD_TIMEOUT);
    cprd_set_timeout(c, 20);
    CHECK(!kill(peer.pid, SIGCONT) && !cprd_renew(claim, 0)); /* the late answer is passed over */
    cprd_set_timeout(c, 0.2);
    CHECK(!kill(peer.pid, SIGSTOP) && cprd_confirm(claim) == CPRD_TIMEOUT);
    cprd_set_timeout(c, 20);
    CHECK(!kill(peer.pid, SIGCONT) && !cprd_confirm(claim));
    cprd_claim_close(claim);
    cprd_state_free(s);
    cprd_close(c);
}

struct worker {
    pthread_t thread;
    cprd *shared;
    int number;
};

static void *saves_and_loads(void *argument) {
    const struct worker *w = argument;
    cprd *c = w->shared;
    char name[32];
    struct stat ours, theirs;
    int event = eventfd(0, EFD_CLOEXEC);
    snprintf(name, sizeof name, "thread%d", w->number);
    cprd_state *s = state_of(event);
    CHECK(c || !cprd_connect(NULL, &c));
    CHECK(!fstat(event, &ours));
    for (int n = 0; n < ROUNDS; n++) {
        cprd_claim *claim;
        struct cprd_saved saved;
        CHECK(!cprd_save(c, name, s, NULL, &saved));
        CHECK(cprd_save(c, name, s, NULL, NULL) == CPRD_ALREADY_HELD);
        CHECK(strstr(cprd_last()->text, name)); /* of this thread, nobody else's */
        CHECK(!cprd_load(c, name, NULL, &claim));
        CHECK(cprd_claim_generation(claim) == saved.generation);
        int fd = cprd_find_fd(cprd_claim_state(claim), "event", 0);
        CHECK(fd >= 0 && !fstat(fd, &theirs) && ours.st_ino == theirs.st_ino);
        CHECK(!cprd_confirm(claim));
        cprd_claim_close(claim);
    }
    if (!w->shared) cprd_close(c);
    cprd_state_free(s);
    close(event);
    return NULL;
}

static void *changes_a_live_hold(void *argument) {
    const struct worker *w = argument;
    char name[32];
    cprd *c;
    cprd_live *live;
    int event = eventfd(0, EFD_CLOEXEC);
    snprintf(name, sizeof name, "live%d", w->number);
    CHECK(!cprd_connect(NULL, &c) && !cprd_live_open(c, name, NULL, &live));
    for (int n = 0; n < 4 * ROUNDS; n++) CHECK(!cprd_live_save_fd(live, "event", n, event));
    for (int n = 0; n < 4 * ROUNDS; n += 2) CHECK(!cprd_live_delete_fd(live, "event", n));
    CHECK(cprd_live_kept(live) == 2 * ROUNDS && !cprd_live_end(live));
    cprd_live_close(live);
    cprd_close(c);
    close(event);
    return NULL;
}

static void in_threads(void *(*work)(void *), cprd *shared) {
    struct worker workers[THREADS];
    for (int n = 0; n < THREADS; n++) {
        workers[n] = (struct worker){.shared = shared, .number = n};
        CHECK(!pthread_create(&workers[n].thread, NULL, work, &workers[n]));
    }
    for (int n = 0; n < THREADS; n++) CHECK(!pthread_join(workers[n].thread, NULL));
}

/* So many changes of 1,000 keys at random, by one and by several at once; 900 are left. Sections
 * among them. */
static void change_often(int tx, int rx, int changes) {
    cprd_live *live;
    char kept[2 * KEYS] = {0};
    int count = 0, event = eventfd(0, EFD_CLOEXEC);
    struct cprd_live_change end = {.op = CPRD_DELETE_SECTION};
    char large[4096] = {0}, name[16];
    srandom(1);
    CHECK(!cprd_live_begin(tx, rx, 77, &live));
    for (int n = 0; n < 80; n++) { /* more bytes than a record, in a segment */
        snprintf(name, sizeof name, "large%d", n % 40);
        CHECK(!cprd_live_save_section(live, name, large, sizeof large, 0));
    }
    for (int n = 0; n < 40; n++) {
        snprintf(name, sizeof name, "large%d", n);
        end.name = name;
        CHECK(!cprd_live_change(live, &end, 1));
    }
    for (int n = 0; n < changes; n++) {
        int id = (int)(random() % (2 * KEYS)), other = (id + 1) % (2 * KEYS);
        struct cprd_live_change two[] = {{.op = CPRD_REPLACE_FD, .name = "key", .id = id},
                                         {.op = CPRD_DELETE_FD, .name = "key", .id = other}};
        two[0].fd = event;
        if (n % 16 == 0 && !cprd_live_save_section(live, "hot", &n, sizeof n, 0)) continue;
        if (n % 16 == 1 && kept[id]) {
            CHECK(!cprd_live_change(live, two, 2));
            count -= kept[other];
            kept[other] = 0;
        } else if (kept[id]) {
            CHECK(!cprd_live_delete_fd(live, "key", id));
            kept[id] = 0;
            count--;
        } else if (count < KEYS) {
            CHECK(!cprd_live_save_fd(live, "key", id, event));
            kept[id] = 1;
            count++;
        }
    }
    for (int id = 0; id < 2 * KEYS; id++)
        if (count > 900 && kept[id]) {
            CHECK(!cprd_live_delete_fd(live, "key", id));
            count--;
        }
    CHECK(cprd_live_kept(live) == (size_t)count + 1);
    printf("%d\n", count);
    fflush(stdout);
    getchar(); /* the test looks at this process, and lets it go on */
    cprd_live_close(live);
    close(event);
}

/* No descriptor is left, so that nothing can be moved: what ends has ended all the same, and stays
 * so when the root is rewritten. */
static void end_at_the_limit(int tx, int rx) {
    cprd_live *live;
    int event = eventfd(0, EFD_CLOEXEC), top = event;
    CHECK(!cprd_live_begin(tx, rx, 77, &live));
    for (int n = 0; n < 400; n++) CHECK(!cprd_live_save_fd(live, "key", n, event));
    for (int n = 0; n < 200; n++) top = dup(event);
    struct rlimit limit = {(rlim_t)top + 1, (rlim_t)top + 1};
    CHECK(!setrlimit(RLIMIT_NOFILE, &limit));
    for (int n = 0; n < 395; n++) {
        while (dup(event) >= 0) continue; /* whatever the delete before has let go of */
        int rc = cprd_live_delete_fd(live, "key", n * 17 % 400);
        CHECK(!rc || (rc == CPRD_LIMIT_EXCEEDED && strstr(cprd_last()->text, "change counts")));
    }
    CHECK(cprd_live_settle(live) == CPRD_LIMIT_EXCEEDED);
    puts("5");
    fflush(stdout);
    getchar(); /* the test looks, or kills this process */
    for (int fd = top; fd > top - 100; fd--) close(fd);
    CHECK(!cprd_live_settle(live) && cprd_live_kept(live) == 5);
    cprd_live_close(live);
    close(event);
}

static int is_locked(int file) { /* for others */
    pid_t child = fork();
    int status;
    if (!child) {
        struct flock lock = {.l_type = F_WRLCK};
        _exit(!fcntl(file, F_GETLK, &lock) && lock.l_type != F_UNLCK);
    }
    CHECK(child > 0 && waitpid(child, &status, 0) == child && WIFEXITED(status));
    return WEXITSTATUS(status);
}

/* A file that is kept, and locked: no close of a copy in this process ends the POSIX lock. */
static void keep_a_lock(int tx, int rx) {
    cprd_live *live;
    struct flock lock = {.l_type = F_WRLCK};
    int event = eventfd(0, EFD_CLOEXEC), file = open("/tmp", O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
    struct cprd_live_change changes[] = {{.op = CPRD_REPLACE_FD, .name = "file", .fd = file},
                                         {.op = CPRD_REPLACE_FD, .name = "key", .fd = event},
                                         {.op = CPRD_DELETE_FD, .name = "key", .id = 1}};
    CHECK(!cprd_live_begin(tx, rx, 77, &live) && !fcntl(file, F_SETLK, &lock) && is_locked(file));
    for (int n = 0; n < 300; n++) {
        changes[2].id = n / 2 + 1;
        CHECK(!cprd_live_save_fd(live, "key", n + 1000, event));
        CHECK(!cprd_live_change(live, changes, 3));
        CHECK(!cprd_live_delete_fd(live, "key", n / 2 + 1000));
    }
    CHECK(is_locked(file) && !cprd_live_delete_fd(live, "file", 0) && is_locked(file));
    cprd_live_close(live);
    close(file);
    close(event);
}

static void *opens_sockets(void *running) {
    cprd *c;
    while (*(atomic_int *)running) CHECK(cprd_connect("/nowhere", &c) == CPRD_UNAVAILABLE);
    return NULL;
}

/* A child connects, whatever another thread was in the midst of; and has the usual limit. */
static void fork_beside_a_thread(void) {
    atomic_int running = 1;
    struct rlimit usual, childs;
    pthread_t other;
    cprd *c;
    CHECK(!getrlimit(RLIMIT_NOFILE, &usual));
    usual.rlim_cur = usual.rlim_max - 1;
    CHECK(!setrlimit(RLIMIT_NOFILE, &usual));
    CHECK(!pthread_create(&other, NULL, opens_sockets, &running));
    for (int n = 0; n < 300; n++) {
        pid_t child = fork();
        if (!child) {
            alarm(10);
            CHECK(!cprd_connect(NULL, &c) && !getrlimit(RLIMIT_NOFILE, &childs));
            CHECK(childs.rlim_cur == usual.rlim_cur);
            _exit(0);
        }
        await_child(child);
    }
    running = 0;
    CHECK(!pthread_join(other, NULL));
}

int main(int argc, char **argv) {
    const char *what = argc > 1 ? argv[1] : "";
    cprd *c;
    if (!strcmp(what, "fork")) fork_with_a_claim();
    else if (!strcmp(what, "fork-threads")) fork_beside_a_thread();
    else if (!strcmp(what, "fork-live")) fork_with_a_live_hold();
    else if (!strcmp(what, "stopped")) wait_for_a_stopped_cprd();
    else if (!strcmp(what, "threads")) in_threads(saves_and_loads, NULL);
    else if (!strcmp(what, "threads-live")) in_threads(changes_a_live_hold, NULL);
    else if (!strcmp(what, "threads-one-connection")) {
        CHECK(!cprd_connect(NULL, &c));
        in_threads(saves_and_loads, c);
        cprd_close(c);
    } else if (!strcmp(what, "changes") && argc == 5)
        change_often(atoi(argv[2]), atoi(argv[3]), atoi(argv[4]));
    else if (!strcmp(what, "limit") && argc == 4) end_at_the_limit(atoi(argv[2]), atoi(argv[3]));
    else if (!strcmp(what, "lock") && argc == 4) keep_a_lock(atoi(argv[2]), atoi(argv[3]));
    else return 2;
    puts("ok");
    return 0;
}
