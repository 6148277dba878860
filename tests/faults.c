/* A library for LD_PRELOAD (Linux) that stands between a program and its disk: it notes the calls on files below one
 * directory, and has those that a rule names fail with an error, do only a part of what was asked, or take their time.
 *
 * What is watched and which rule holds is set by `faults_watch` and `faults_rule` (by way of ctypes), or from the
 * beginning by FAULTS_DIRECTORY and FAULTS_RULE ("call pattern first last error at_most ns_per_byte", none with
 * a space in it).
 *
 * Built by tests/faults.py: cc -shared -fPIC -O1 faults.c -ldl -lpthread
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char directory[PATH_MAX]; /* empty: nothing is watched */
static struct {
    char call[32], pattern[PATH_MAX]; /* both as of fnmatch(3); the pattern of a path below the directory */
    long first, last;                 /* of the calls that both name, counted from 1, those that the rule is for */
    int error;                        /* errno of those calls; 0: they do not fail; -n: signal n comes before them */
    long at_most;                     /* bytes that they read or write; 0: all */
    double ns_per_byte;               /* how long they take beside that */
} rule;
static long matched, hits;
static char *calls; /* "call path\n" of each */
static size_t used, room;

void faults_watch(const char *path) {
    pthread_mutex_lock(&lock);
    snprintf(directory, sizeof directory, "%s", path ? path : "");
    used = 0;
    pthread_mutex_unlock(&lock);
}

void faults_rule(const char *call, const char *pattern, long first, long last, int error, long at_most, double ns) {
    pthread_mutex_lock(&lock);
    snprintf(rule.call, sizeof rule.call, "%s", call);
    snprintf(rule.pattern, sizeof rule.pattern, "%s", pattern);
    rule.first = first, rule.last = last, rule.error = error, rule.at_most = at_most, rule.ns_per_byte = ns;
    matched = hits = 0;
    pthread_mutex_unlock(&lock);
}

long faults_hits(void) { return hits; }

const char *faults_calls(void) { return used ? calls : ""; }

__attribute__((constructor)) static void from_environment(void) {
    const char *text = getenv("FAULTS_RULE");
    char call[32], pattern[PATH_MAX];
    long first, last, at_most;
    int error;
    double ns;
    if (text && sscanf(text, "%31s %4000s %ld %ld %d %ld %lf", call, pattern, &first, &last, &error, &at_most, &ns) == 7)
        faults_rule(call, pattern, first, last, error, at_most, ns);
    if (getenv("FAULTS_DIRECTORY")) faults_watch(getenv("FAULTS_DIRECTORY"));
}

/* The call of this name on this path is about to be made: notes it. Returns whether the rule is for it. */
static int comes(const char *call, const char *path) {
    size_t n = strlen(directory);
    if (!n || strncmp(path, directory, n) || path[n] != '/') return 0;
    path += n + 1;
    pthread_mutex_lock(&lock);
    size_t needed = used + strlen(call) + strlen(path) + 3;
    if (needed > room) calls = realloc(calls, room = 2 * needed);
    used += sprintf(calls + used, "%s %s\n", call, path);
    int is_meant = *rule.call && !fnmatch(rule.call, call, 0) && !fnmatch(rule.pattern, path, 0);
    if (is_meant) is_meant = ++matched >= rule.first && matched <= rule.last;
    hits += is_meant;
    pthread_mutex_unlock(&lock);
    if (is_meant && rule.error < 0) kill(getpid(), -rule.error);
    return is_meant;
}

static int comes_to(const char *call, int fd) {
    char link[64], path[PATH_MAX];
    if (!*directory) return 0;
    int before = errno;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    errno = before;
    if (n <= 0) return 0;
    path[n] = 0;
    return comes(call, path);
}

static void take_time(ssize_t nbytes) {
    if (nbytes <= 0 || rule.ns_per_byte <= 0) return;
    double ns = nbytes * rule.ns_per_byte;
    struct timespec pause = {(time_t)(ns / 1e9), (long)(ns - 1e9 * (time_t)(ns / 1e9))};
    nanosleep(&pause, NULL);
}

#define REAL(name) \
    static __typeof__(&name) real; \
    if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)
#define FAIL(result) \
    if (rule.error > 0) { \
        errno = rule.error; \
        return result; \
    }
#define SHORTER(n) (rule.at_most && (size_t)rule.at_most < (n) ? (size_t)rule.at_most : (n))

/* Reads and writes of one piece of memory. */
#define PIECE(type, name, call, pointer, declared, passed) \
    type name(int fd, pointer data, size_t n declared) { \
        REAL(name); \
        if (!comes_to(call, fd)) return real(fd, data, n passed); \
        FAIL(-1) \
        type done = real(fd, data, SHORTER(n) passed); \
        take_time(done); \
        return done; \
    }
#define COMMA ,
PIECE(ssize_t, read, "read", void *, , )
PIECE(ssize_t, pread, "read", void *, COMMA off_t at, COMMA at)
PIECE(ssize_t, pread64, "read", void *, COMMA off64_t at, COMMA at)
PIECE(ssize_t, write, "write", const void *, , )
PIECE(ssize_t, pwrite, "write", const void *, COMMA off_t at, COMMA at)
PIECE(ssize_t, pwrite64, "write", const void *, COMMA off64_t at, COMMA at)

/* Of several pieces: a short one stops within one of them. */
static int shorter(const struct iovec *all, int count, struct iovec *some) {
    size_t left = rule.at_most ? (size_t)rule.at_most : SIZE_MAX;
    int n = 0;
    for (; n < count && left; n++) {
        some[n] = all[n];
        if (some[n].iov_len > left) some[n].iov_len = left;
        left -= some[n].iov_len;
    }
    return n;
}
#define PIECES(name, call, declared, passed) \
    ssize_t name(int fd, const struct iovec *all, int count declared) { \
        REAL(name); \
        if (!comes_to(call, fd)) return real(fd, all, count passed); \
        FAIL(-1) \
        struct iovec some[IOV_MAX]; \
        ssize_t done = real(fd, some, shorter(all, count, some) passed); \
        take_time(done); \
        return done; \
    }
PIECES(readv, "read", , )
PIECES(preadv, "read", COMMA off_t at, COMMA at)
PIECES(preadv64, "read", COMMA off64_t at, COMMA at)
PIECES(preadv2, "read", COMMA off_t at COMMA int flags, COMMA at COMMA flags)
PIECES(preadv64v2, "read", COMMA off64_t at COMMA int flags, COMMA at COMMA flags)
PIECES(writev, "write", , )
PIECES(pwritev, "write", COMMA off_t at, COMMA at)
PIECES(pwritev64, "write", COMMA off64_t at, COMMA at)
PIECES(pwritev2, "write", COMMA off_t at COMMA int flags, COMMA at COMMA flags)
PIECES(pwritev64v2, "write", COMMA off64_t at COMMA int flags, COMMA at COMMA flags)

/* Files are opened, for reading or for writing. */
#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        REAL(name); \
        va_list rest; \
        va_start(rest, flags); \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
        va_end(rest); \
        if (comes(flags & (O_WRONLY | O_RDWR) ? "create" : "open", path)) FAIL(-1) \
        return real(path, flags, mode); \
    }
OPEN(open)
OPEN(open64)
#define OPEN_AT(name) \
    int name(int at, const char *path, int flags, ...) { \
        REAL(name); \
        va_list rest; \
        va_start(rest, flags); \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
        va_end(rest); \
        if (comes(flags & (O_WRONLY | O_RDWR) ? "create" : "open", path)) FAIL(-1) \
        return real(at, path, flags, mode); \
    }
OPEN_AT(openat)
OPEN_AT(openat64)
DIR *opendir(const char *path) {
    REAL(opendir);
    if (comes("open", path)) FAIL(NULL)
    return real(path);
}

/* Whatever else may find the disk full or broken. */
#define OF_FILE(name, call, declared, passed) \
    int name(int fd declared) { \
        REAL(name); \
        if (comes_to(call, fd)) FAIL(-1) \
        return real(fd passed); \
    }
OF_FILE(fsync, "sync", , )
OF_FILE(fdatasync, "sync", , )
OF_FILE(sync_file_range, "sync", COMMA off64_t at COMMA off64_t n COMMA unsigned flags, COMMA at COMMA n COMMA flags)
OF_FILE(ftruncate, "allocate", COMMA off_t n, COMMA n)
OF_FILE(ftruncate64, "allocate", COMMA off64_t n, COMMA n)
#define ALLOCATE(name, offset) \
    int name(int fd, offset at, offset n) { \
        REAL(name); \
        if (comes_to("allocate", fd) && rule.error > 0) return rule.error; /* not by way of errno */ \
        return real(fd, at, n); \
    }
ALLOCATE(posix_fallocate, off_t)
ALLOCATE(posix_fallocate64, off64_t)
int rename(const char *from, const char *to) {
    REAL(rename);
    if (comes("rename", to)) FAIL(-1)
    return real(from, to);
}
int mkdir(const char *path, mode_t mode) {
    REAL(mkdir);
    if (comes("mkdir", path)) FAIL(-1)
    return real(path, mode);
}
#define MAP(name, offset) \
    void *name(void *address, size_t n, int protection, int flags, int fd, offset at) { \
        REAL(name); \
        if (fd >= 0 && comes_to("map", fd)) FAIL(MAP_FAILED) \
        return real(address, n, protection, flags, fd, at); \
    }
MAP(mmap, off_t)
MAP(mmap64, off64_t)
#define SEND(name, offset) \
    ssize_t name(int to, int from, offset *at, size_t n) { \
        REAL(name); \
        if (comes_to("write", to)) FAIL(-1) \
        return real(to, from, at, n); \
    }
SEND(sendfile, off_t)
SEND(sendfile64, off64_t)
ssize_t copy_file_range(int from, off64_t *at, int to, off64_t *put, size_t n, unsigned flags) {
    REAL(copy_file_range);
    if (comes_to("write", to)) FAIL(-1)
    return real(from, at, to, put, n, flags);
}
