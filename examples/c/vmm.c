/* vmm NAME: the shape of a VMM that is upgraded under its guest, as QEMU's cpr-transfer. Stdin:
 * "run" (a step of the guest: counts in RAM, and in a device), "save" (hand over, and end). */
#define _GNU_SOURCE
#include "cprd.h"
#include <err.h>
#include <stdio.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

enum { RAM = 1 << 20 };
struct device { unsigned long long steps; };
static cprd_state *outgoing;
static cprd_claim *claim; /* on what the predecessor left, while devices are made; NULL: nothing */
static void die(const char *what) { errx(1, "%s: %s", what, cprd_last()->text); }

/* QEMU's include/migration/cpr.h. */
static void cpr_save_fd(const char *name, int id, int fd) {
    if (cprd_add_fd(outgoing, name, id, fd)) die(name);
}
static int cpr_find_fd(const char *name, int id) {
    int fd = claim ? cprd_take_fd(cprd_claim_state(claim), name, id) : -1;
    if (fd >= 0) cpr_save_fd(name, id, fd); /* for the next upgrade */
    return fd;
}

/* Each device looks for what its predecessor had, before making its own. */
static volatile unsigned long long *realize_ram(void) {
    int fd = cpr_find_fd("ram0", 0);
    if (fd < 0) {
        fd = memfd_create("ram0", MFD_CLOEXEC);
        if (fd < 0 || ftruncate(fd, RAM)) err(1, "ram0");
        cpr_save_fd("ram0", 0, fd);
    }
    void *ram = mmap(NULL, RAM, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (ram == MAP_FAILED) err(1, "ram0");
    return ram;
}
static int realize_irq(void) {
    int old = cpr_find_fd("irqfd", 0), fd = old < 0 ? eventfd(0, EFD_NONBLOCK) : old;
    if (old < 0) cpr_save_fd("irqfd", 0, fd); /* ends the program where there is none */
    return fd;
}

/* The guest stands still meanwhile. Returns only where it has to go on here. */
static void hand_over(cprd *c, const char *name, const struct device *device) {
    struct cprd_save_options options = {.after_exit = CPRD_AFTER_ME};
    cprd_prepared *prepared;
    if (cprd_add_section(outgoing, "device", device, sizeof *device, 0) ||
        cprd_prepare(c, name, outgoing, &options, &prepared)) {
        warnx("the guest goes on here: %s", cprd_last()->text);
        return;
    }
    /* Here a VMM lets go of what the next one wants for itself: locks of images, ports. */
    while (cprd_commit(prepared, NULL)) /* the same request each time, whatever became of it */
        if (cprd_last()->code != CPRD_UNAVAILABLE && cprd_last()->code != CPRD_TIMEOUT) die(name);
    _exit(0); /* the guest is the successor's once this process has ended */
}

int main(int argc, char **argv) {
    struct cprd_load_options patient = {.wait = 10}; /* the predecessor may be ending still */
    struct device device = {0};
    cprd *c;
    char line[64];
    if (argc != 2) errx(2, "usage: vmm NAME");
    setlinebuf(stdout);
    if (cprd_connect(NULL, &c)) die("connect");
    int rc = cprd_load(c, argv[1], NULL, &claim);
    if (rc == CPRD_BUSY) rc = cprd_load(c, argv[1], &patient, &claim);
    if (rc && rc != CPRD_NOT_HELD) die(argv[1]); /* somebody has the guest: never start a second */
    outgoing = cprd_state_new();
    volatile unsigned long long *ram = realize_ram();
    int irq = realize_irq();
    if (claim) {
        const struct cprd_item *item = cprd_find_section(cprd_claim_state(claim), "device");
        if (!item || item->size != sizeof device) {
            cprd_reject(claim, "no state of the device in it");
            return 1;
        }
        memcpy(&device, item->data, item->size);
        if (cprd_confirm(claim)) die(argv[1]); /* before the guest runs: from now on it is ours */
        cprd_claim_close(claim);
        claim = NULL;
    }
    printf("%s: RAM %llu, device %llu\n", rc ? "cold boot" : "restored", *ram, device.steps);
    while (fgets(line, sizeof line, stdin)) {
        if (!strcmp(line, "save\n")) hand_over(c, argv[1], &device);
        ++*ram;
        device.steps++;
        eventfd_write(irq, 1);
        printf("RAM %llu, device %llu\n", *ram, device.steps);
    }
    cprd_close(c);
    return 0;
}
