/* vmm NAME: the shape of a VMM that is upgraded under its guest, as QEMU's cpr-transfer has it. RAM
 * is a memfd, an interrupt an eventfd; the guest counts in RAM, the device in its own registers.
 * Commands on stdin: "run" (the guest takes a step), "save" (hand over, and end). */
#define _GNU_SOURCE
#include "cprd.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

enum { RAM = 1 << 20 };
struct device { uint64_t steps; };
static cprd_state *outgoing, *incoming; /* incoming: of the predecessor, while devices are made */
static void die(const char *what) {
    exit((fprintf(stderr, "vmm: %s: %s\n", what, cprd_last()->text), 1));
}

/* QEMU's include/migration/cpr.h. */
static void cpr_save_fd(const char *name, int id, int fd) {
    if (cprd_add_fd(outgoing, name, id, fd)) die(name);
}
static int cpr_find_fd(const char *name, int id) {
    int fd = incoming ? cprd_take_fd(incoming, name, id) : -1;
    if (fd >= 0) cpr_save_fd(name, id, fd); /* for the next upgrade */
    return fd;
}

/* Each device looks for what its predecessor had, before making its own. */
static volatile uint64_t *realize_ram(void) {
    int fd = cpr_find_fd("ram0", 0);
    if (fd < 0) {
        fd = memfd_create("ram0", MFD_CLOEXEC);
        if (fd < 0 || ftruncate(fd, RAM)) return perror("ram0"), exit(1), NULL;
        cpr_save_fd("ram0", 0, fd);
    }
    void *ram = mmap(NULL, RAM, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (ram == MAP_FAILED) return perror("ram0"), exit(1), NULL;
    return ram;
}
static int realize_irq(void) {
    int fd = cpr_find_fd("irqfd", 0);
    if (fd >= 0) return fd;
    if ((fd = eventfd(0, EFD_NONBLOCK)) < 0) return perror("irqfd"), exit(1), -1;
    return cpr_save_fd("irqfd", 0, fd), fd;
}

/* The guest stands still meanwhile. Returns only where it has to go on here. */
static void hand_over(cprd *c, const char *name, const struct device *device) {
    struct cprd_save_options options = {.after_exit = CPRD_AFTER_ME};
    cprd_prepared *prepared;
    if (cprd_add_section(outgoing, "device", device, sizeof *device, 0) ||
        cprd_prepare(c, name, outgoing, &options, &prepared)) {
        fprintf(stderr, "vmm: the guest goes on here: %s\n", cprd_last()->text);
        return;
    }
    /* Here a VMM lets go of what the next one wants for itself: locks of images, ports. */
    while (cprd_commit(prepared, NULL)) /* the same request each time, whatever became of it */
        if (cprd_last()->code != CPRD_UNAVAILABLE && cprd_last()->code != CPRD_TIMEOUT) die(name);
    exit(0); /* the guest is the successor's once this process has ended */
}

int main(int argc, char **argv) {
    const struct cprd_load_options patient = {.wait = 10};
    struct device device = {0};
    cprd_claim *claim = NULL;
    cprd *c;
    char line[64];
    if (argc != 2) return fprintf(stderr, "usage: vmm NAME\n"), 2;
    if (cprd_connect(NULL, &c)) die("connect");
    int rc = cprd_load(c, argv[1], NULL, &claim);
    if (rc == CPRD_BUSY) rc = cprd_load(c, argv[1], &patient, &claim); /* it is still ending */
    if (rc && rc != CPRD_NOT_HELD) die(argv[1]); /* somebody has the guest: never start a second */
    if (claim) incoming = cprd_claim_state(claim);
    outgoing = cprd_state_new();
    volatile uint64_t *ram = realize_ram();
    int irq = realize_irq();
    if (claim) {
        const void *data; size_t size;
        if (cprd_section(incoming, "device", &data, &size, NULL) || size != sizeof device)
            exit((cprd_reject(claim, "no state of the device in it"), 1));
        memcpy(&device, data, size);
        if (cprd_confirm(claim)) die(argv[1]); /* before the guest runs: from now on it is ours */
        cprd_claim_close(claim);
        incoming = NULL;
    }
    printf("%s: RAM %llu, device %llu\n", rc ? "cold boot" : "restored", 0ull + ram[0],
           0ull + device.steps);
    while (fflush(stdout), fgets(line, sizeof line, stdin)) {
        if (!strcmp(line, "save\n")) hand_over(c, argv[1], &device);
        ram[0]++, device.steps++;
        if (eventfd_write(irq, 1)) return 1;
        printf("RAM %llu, device %llu\n", 0ull + ram[0], 0ull + device.steps);
    }
    cprd_close(c);
    return 0;
}
