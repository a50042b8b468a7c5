/* Makes the n-th change to a file fail, or kills the process there.
 *
 * Loaded with LD_PRELOAD; armed from Python through ctypes, or for a whole program by the
 * variables FAULT_PREFIX, FAULT_AT and FAULT_MODE. What counts as a change is a
 * call that writes, syncs, truncates, renames or unlinks a file whose path begins with a prefix:
 * a database with its journal, write-ahead log and shared memory. The clock on the wall
 * can be moved as well.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

enum { OFF, KILL_BEFORE, KILL_AFTER, KILL_TORN, IO_ERROR, DISK_FULL };

static char prefix[PATH_MAX];
static long fail_at, seen;
static int mode = OFF;

void fault_arm(const char *path, long n, int how) {
    strncpy(prefix, path, sizeof prefix - 1);
    fail_at = n;
    seen = 0;
    mode = how;
}

__attribute__((constructor)) static void arm_from_environment(void) {
    const char *path = getenv("FAULT_PREFIX"), *n = getenv("FAULT_AT");
    const char *how = getenv("FAULT_MODE");
    if (path && n && how) fault_arm(path, atol(n), atoi(how));
}

long fault_seen(void) { return seen; }

static long clock_moved_by;

void fault_clock(long seconds) { clock_moved_by = seconds; }

static int is_ours(const char *path) {
    return prefix[0] && strncmp(path, prefix, strlen(prefix)) == 0;
}

static int is_our_fd(int fd) {
    char link[64], path[PATH_MAX];
    if (!prefix[0]) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return is_ours(path);
}

static void die(void) {
    kill(getpid(), SIGKILL);
    for (;;) pause();
}

/* Whether this change is to be torn or to fail; kills before it. Errors last. */
static int reached(int is_write) {
    long n = __atomic_add_fetch(&seen, 1, __ATOMIC_SEQ_CST);
    if (mode == OFF || !fail_at || n < fail_at) return 0;
    if (mode == KILL_BEFORE && n == fail_at) die();
    if (mode == IO_ERROR) { errno = EIO; return -1; }
    if (mode == DISK_FULL && is_write) { errno = ENOSPC; return -1; }
    return n == fail_at && (mode == KILL_AFTER || mode == KILL_TORN);
}

#define REAL(name) \
    static __typeof__(name) *real; \
    if (!real) real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)

#define WRITES(call_all, call_half) \
    if (is_our_fd(fd)) { \
        int now = reached(1); \
        if (now < 0) return -1; \
        if (now) { \
            if (mode == KILL_TORN) call_half; else call_all; \
            die(); \
        } \
    } \
    return call_all

#define CHANGES(is_ours_, call) \
    if (is_ours_) { \
        int now = reached(0); \
        if (now < 0) return -1; \
        if (now) { call; die(); } \
    } \
    return call

ssize_t write(int fd, const void *bytes, size_t count) {
    REAL(write);
    WRITES(real(fd, bytes, count), real(fd, bytes, count / 2));
}

ssize_t pwrite(int fd, const void *bytes, size_t count, off_t offset) {
    REAL(pwrite);
    WRITES(real(fd, bytes, count, offset), real(fd, bytes, count / 2, offset));
}

ssize_t pwrite64(int fd, const void *bytes, size_t count, off64_t offset) {
    REAL(pwrite64);
    WRITES(real(fd, bytes, count, offset), real(fd, bytes, count / 2, offset));
}

int fsync(int fd) {
    REAL(fsync);
    CHANGES(is_our_fd(fd), real(fd));
}

int fdatasync(int fd) {
    REAL(fdatasync);
    CHANGES(is_our_fd(fd), real(fd));
}

int ftruncate(int fd, off_t length) {
    REAL(ftruncate);
    CHANGES(is_our_fd(fd), real(fd, length));
}

int ftruncate64(int fd, off64_t length) {
    REAL(ftruncate64);
    CHANGES(is_our_fd(fd), real(fd, length));
}

int unlink(const char *path) {
    REAL(unlink);
    CHANGES(is_ours(path), real(path));
}

int rename(const char *from, const char *to) {
    REAL(rename);
    CHANGES(is_ours(to), real(from, to));
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    REAL(clock_gettime);
    int failed = real(clock, now);
    if (!failed && clock == CLOCK_REALTIME) now->tv_sec += clock_moved_by;
    return failed;
}

time_t time(time_t *now) {
    REAL(time);
    time_t seconds = real(NULL) + clock_moved_by;
    if (now) *now = seconds;
    return seconds;
}
