/* Loaded by LD_PRELOAD: lets chosen writes of a process fail, as a full disk or a broken one does.

   fail_writes(folder, first, count, error): of this process's writes to files under `folder`, those from number `first`
   (0 is the first) on fail with `error`, `count` of them. seen_writes() is how many there have been. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char folder[PATH_MAX];
static atomic_long seen;
static long first = LONG_MAX, count;
static int error_code;

void fail_writes(const char *where, long from, long how_many, int error) {
    strncpy(folder, where, sizeof folder - 1);
    first = from, count = how_many, error_code = error;
    atomic_store(&seen, 0);
}

long seen_writes(void) { return atomic_load(&seen); }

/* whether this call is to fail; errno is set then */
static int fails(int descriptor) {
    if (!folder[0]) return 0;
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    int kept = errno;
    ssize_t length = readlink(link, path, sizeof path - 1);
    errno = kept;
    if (length < 0) return 0;
    path[length] = 0;
    if (strncmp(path, folder, strlen(folder))) return 0;
    long number = atomic_fetch_add(&seen, 1);
    if (number < first || number >= first + count) return 0;
    errno = error_code;
    return 1;
}

#define REAL(name) __typeof__(name) *real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)

ssize_t write(int fd, const void *data, size_t size) {
    REAL(write);
    return fails(fd) ? -1 : real(fd, data, size);
}

ssize_t pwrite(int fd, const void *data, size_t size, off_t at) {
    REAL(pwrite);
    return fails(fd) ? -1 : real(fd, data, size, at);
}

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) {
    REAL(pwrite64);
    return fails(fd) ? -1 : real(fd, data, size, at);
}

ssize_t writev(int fd, const struct iovec *parts, int number) {
    REAL(writev);
    return fails(fd) ? -1 : real(fd, parts, number);
}

int fsync(int fd) {
    REAL(fsync);
    return fails(fd) ? -1 : real(fd);
}

int ftruncate64(int fd, off64_t size) {
    REAL(ftruncate64);
    return fails(fd) ? -1 : real(fd, size);
}
