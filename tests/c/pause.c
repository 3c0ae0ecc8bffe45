/* Stops the process at the step that $CPRD_PAUSE names, as cprd/linux/pause.py: for tests alone, in
 * programs built with PAUSE=1. */
#define _GNU_SOURCE
#define CPRD_INTERNAL
#include "cprd.h"

#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

void cprd__point(const char *format, ...) {
    char name[64];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(name, sizeof name, format, arguments);
    va_end(arguments);
    static int hits;
    const char *where = getenv("CPRD_PAUSE"), *log = getenv("CPRD_PAUSE_LOG");
    if (log) {
        int fd = open(log, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
        if (fd < 0 || dprintf(fd, "%s\n", name) < 0) abort();
        close(fd);
    }
    if (!where) return;
    size_t length = strcspn(where, "#");
    if (length && (strncmp(where, name, length) || name[length])) return;
    if (++hits == (where[length] ? atoi(where + length + 1) : 1)) raise(SIGSTOP);
}
