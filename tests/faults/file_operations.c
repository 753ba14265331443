// Between a process and its C library: counts what it does to files below one folder, and at the n-th such operation
// kills it (a write is half done by then), or lets the disk be full or broken. Loaded with LD_PRELOAD; does nothing
// until `faults_arm` is called. Rust and C++ go through the C library, too, so no writer escapes.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { COUNT, KILL, FAIL_ONCE, FAIL_FROM };

static char folder[4096];
static size_t folder_length;
static long strike_at;
static int what, error_number;
static atomic_long num_done;

void faults_arm(const char *below, long at, int action, int error) {
    snprintf(folder, sizeof folder, "%s", below);
    folder_length = strlen(folder);
    strike_at = at, what = action, error_number = error;
    atomic_store(&num_done, 0);
}

long faults_count(void) { return atomic_load(&num_done); }

static int is_below(const char *path) {
    return folder_length && !strncmp(path, folder, folder_length) && (path[folder_length] == '/' || !path[folder_length]);
}

static int is_at_below(int directory, const char *path) {
    char link[64], whole[8192];
    if (!folder_length || !path) return 0;
    if (path[0] == '/') return is_below(path);
    if (directory == AT_FDCWD) return 0;  // runs are given absolute paths
    snprintf(link, sizeof link, "/proc/self/fd/%d", directory);
    ssize_t length = readlink(link, whole, 4096);
    if (length <= 0) return 0;
    snprintf(whole + length, sizeof whole - length, "/%s", path);
    return is_below(whole);
}

static int is_file_below(int file) {
    char link[64], path[4096];
    if (!folder_length) return 0;
    int kept = errno;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    errno = kept;
    if (length <= 0) return 0;
    path[length] = 0;
    return is_below(path);
}

// 0: go on. 1: this one is the n-th. 2: a later one, with FAIL_FROM.
static int is_struck(void) {
    long number = atomic_fetch_add(&num_done, 1) + 1;
    if (what == COUNT || number < strike_at) return 0;
    if (number == strike_at) return 1;
    return what == FAIL_FROM ? 2 : 0;
}

// Whether the operation fails; `needs_space`: those that a full disk refuses.
static int strikes(int needs_space) {
    int struck = is_struck();
    if (!struck) return 0;
    if (what == KILL) kill(getpid(), SIGKILL);
    if (!needs_space) return 0;
    errno = error_number;
    return 1;
}

static int has_mode(int flags) { return flags & O_CREAT || (flags & O_TMPFILE) == O_TMPFILE; }

#define REAL(type, name, ...)                                            \
    static type (*real)(__VA_ARGS__);                                    \
    if (!real) real = (type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name)

#define OPEN_AT(name)                                                                           \
    int name(int directory, const char *path, int flags, ...) {                                 \
        REAL(int, name, int, const char *, int, ...);                                           \
        va_list rest;                                                                           \
        va_start(rest, flags);                                                                  \
        int mode = has_mode(flags) ? va_arg(rest, int) : 0;                       \
        va_end(rest);                                                                           \
        if (flags & (O_CREAT | O_WRONLY | O_RDWR) && is_at_below(directory, path) && strikes(flags & O_CREAT)) \
            return -1;                                                                          \
        return real(directory, path, flags, mode);                                              \
    }
OPEN_AT(openat)
OPEN_AT(openat64)

#define OPEN(name)                                                                              \
    int name(const char *path, int flags, ...) {                                                \
        REAL(int, name, const char *, int, ...);                                                \
        va_list rest;                                                                           \
        va_start(rest, flags);                                                                  \
        int mode = has_mode(flags) ? va_arg(rest, int) : 0;                       \
        va_end(rest);                                                                           \
        if (flags & (O_CREAT | O_WRONLY | O_RDWR) && is_at_below(AT_FDCWD, path) && strikes(flags & O_CREAT)) \
            return -1;                                                                          \
        return real(path, flags, mode);                                                         \
    }
OPEN(open)
OPEN(open64)

// Half of the bytes are written, then the process is dead, or the disk is full: as a real one ends.
#define STRIKE_A_WRITE(half)                                             \
    int struck = is_file_below(file) ? is_struck() : 0;                  \
    if (struck) {                                                        \
        ssize_t written = struck == 1 && size > 1 ? (half) : 0;          \
        if (what == KILL) kill(getpid(), SIGKILL);                       \
        if (what == FAIL_FROM && written > 0) return written;            \
        errno = error_number;                                            \
        return -1;                                                       \
    }

ssize_t write(int file, const void *data, size_t size) {
    REAL(ssize_t, write, int, const void *, size_t);
    STRIKE_A_WRITE(what == FAIL_ONCE ? 0 : real(file, data, size / 2))
    return real(file, data, size);
}

#define PWRITE(name)                                                                 \
    ssize_t name(int file, const void *data, size_t size, off_t at) {                \
        REAL(ssize_t, name, int, const void *, size_t, off_t);                       \
        STRIKE_A_WRITE(what == FAIL_ONCE ? 0 : real(file, data, size / 2, at))       \
        return real(file, data, size, at);                                           \
    }
PWRITE(pwrite)
PWRITE(pwrite64)

ssize_t writev(int file, const struct iovec *parts, int size) {
    REAL(ssize_t, writev, int, const struct iovec *, int);
    STRIKE_A_WRITE(what == FAIL_ONCE ? 0 : real(file, parts, size / 2))
    return real(file, parts, size);
}

#define SEND(name)                                                                   \
    ssize_t name(int file, int source, off_t *at, size_t size) {                     \
        REAL(ssize_t, name, int, int, off_t *, size_t);                              \
        STRIKE_A_WRITE(what == FAIL_ONCE ? 0 : real(file, source, at, size / 2))     \
        return real(file, source, at, size);                                         \
    }
SEND(sendfile)
SEND(sendfile64)

#define WITH_FILE(type, name, needs_space, parameters, values)                       \
    type name parameters {                                                           \
        static type(*real) parameters;                                               \
        if (!real) real = (type(*) parameters)dlsym(RTLD_NEXT, #name);               \
        return is_file_below(file) && strikes(needs_space) ? -1 : real values;       \
    }
WITH_FILE(int, fsync, 1, (int file), (file))
WITH_FILE(int, fdatasync, 1, (int file), (file))
WITH_FILE(int, fchmod, 0, (int file, mode_t mode), (file, mode))
WITH_FILE(int, ftruncate, 1, (int file, off_t size), (file, size))
WITH_FILE(int, ftruncate64, 1, (int file, off_t size), (file, size))

#define WITH_PATH(type, name, needs_space, parameters, values)                       \
    type name parameters {                                                           \
        static type(*real) parameters;                                               \
        if (!real) real = (type(*) parameters)dlsym(RTLD_NEXT, #name);               \
        return is_at_below(AT_FDCWD, path) && strikes(needs_space) ? -1 : real values; \
    }
WITH_PATH(int, rename, 1, (const char *path, const char *to), (path, to))
WITH_PATH(int, mkdir, 1, (const char *path, mode_t mode), (path, mode))
WITH_PATH(int, unlink, 0, (const char *path), (path))
WITH_PATH(int, rmdir, 0, (const char *path), (path))
WITH_PATH(int, chmod, 0, (const char *path, mode_t mode), (path, mode))

#define WITH_AT(type, name, needs_space, parameters, values)                         \
    type name parameters {                                                           \
        static type(*real) parameters;                                               \
        if (!real) real = (type(*) parameters)dlsym(RTLD_NEXT, #name);               \
        return is_at_below(directory, path) && strikes(needs_space) ? -1 : real values; \
    }
WITH_AT(int, renameat, 1, (int directory, const char *path, int other, const char *to), (directory, path, other, to))
WITH_AT(int, mkdirat, 1, (int directory, const char *path, mode_t mode), (directory, path, mode))
WITH_AT(int, unlinkat, 0, (int directory, const char *path, int flags), (directory, path, flags))
