/* Makes chosen system calls of a process fail. Preloaded, so that it stands between libc and whoever calls it: Python, the C++ of torch
   and Arrow, the Rust of safetensors and tokenizers.

   FAILING_CALLS is "CALLS:ACTION:SKIP:COUNT:GLOB:DISK:MARKER":
     CALLS   names joined by '+': open (for reading), create, write, read, sync, rename, mkdir, lock, list
     ACTION  the errno to answer with; "kill" for SIGKILL, "term" for two SIGTERM to the process and its
             launcher, before the call is made
     SKIP    how many calls to let pass first
     COUNT   how many calls fail then, 0 for all
     GLOB    which files, as a pattern of fnmatch over the absolute path ('*' matches '/' too)
     DISK    with a disk that is full: which files lie on it
     MARKER  a file that is made when the first call fails

   With ENOSPC and COUNT 0 the disk is full from the first failing call on: that call writes half of its bytes, later ones that need room
   on the disk fail too, also those of other processes with the same marker, and statvfs says that nothing is free. Removing a file
   frees nothing. */

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
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { OPEN = 1, CREATE = 2, WRITE = 4, READ = 8, SYNC = 16, RENAME = 32, MKDIR = 64, LOCK = 128, LIST = 256 };
enum { KILL = -1, TERM = -2 };

static struct {
    int calls, action;
    long skip, count;
    char glob[PATH_MAX], disk[PATH_MAX], marker[PATH_MAX];
} rule;
static pthread_mutex_t guard = PTHREAD_MUTEX_INITIALIZER;
static int is_full;

#define REAL(name) static __typeof__(name) *real; if (!real) real = dlsym(RTLD_NEXT, #name)

/* Takes a rule, or none for "". The constructor takes that of the environment. */
void set_failing_calls(const char *text) {
    static const struct { const char *name; int bit; } names[] = {{"open", OPEN}, {"create", CREATE}, {"write", WRITE}, {"read", READ},
        {"sync", SYNC}, {"rename", RENAME}, {"mkdir", MKDIR}, {"lock", LOCK}, {"list", LIST}};
    char copy[4 * PATH_MAX];
    rule.calls = is_full = 0;
    if (!text || !*text) return;
    snprintf(copy, sizeof copy, "%s", text);
    char *rest = copy, *calls = strsep(&rest, ":"), *action = strsep(&rest, ":"), *skip = strsep(&rest, ":"), *count = strsep(&rest, ":");
    char *glob = strsep(&rest, ":"), *disk = strsep(&rest, ":");
    if (!rest) abort();
    rule.action = !strcmp(action, "kill") ? KILL : !strcmp(action, "term") ? TERM : atoi(action);
    rule.skip = atol(skip);
    rule.count = atol(count);
    snprintf(rule.glob, sizeof rule.glob, "%s", glob);
    snprintf(rule.disk, sizeof rule.disk, "%s", disk);
    snprintf(rule.marker, sizeof rule.marker, "%s", rest);
    for (char *name; (name = strsep(&calls, "+"));) {
        int bit = 0;
        for (unsigned i = 0; i < sizeof names / sizeof *names; i++)
            if (!strcmp(name, names[i].name)) bit = names[i].bit;
        if (!bit) abort();
        rule.calls |= bit;
    }
}

__attribute__((constructor)) static void begin(void) { set_failing_calls(getenv("FAILING_CALLS")); }

static int fails_everywhere(void) { return rule.action == ENOSPC && rule.count == 0; }

/* Whether the call must fail; errno is set then. `first` becomes true for the first call that fails. */
static int fails(int call, const char *path, int *first) {
    int is_watched = rule.calls & call && !fnmatch(rule.glob, path, 0), result = 0;
    int needs_room = fails_everywhere() && (WRITE | CREATE | MKDIR) & call && !fnmatch(rule.disk, path, 0);
    if (!is_watched && !needs_room) return 0;
    pthread_mutex_lock(&guard);
    if (needs_room && (is_full || (is_full = !syscall(SYS_access, rule.marker, F_OK)))) {
        result = 1;
    } else if (!is_watched) {
    } else if (rule.skip > 0) {
        rule.skip--;
    } else if (rule.count >= 0) {
        int fd = syscall(SYS_openat, AT_FDCWD, rule.marker, O_CREAT | O_WRONLY | O_APPEND, 0600);
        if (fd < 0) abort();
        syscall(SYS_close, fd);
        if (first) *first = 1;
        is_full = fails_everywhere();
        if (rule.count > 0 && --rule.count == 0) rule.count = -1;
        result = 1;
    }
    pthread_mutex_unlock(&guard);
    if (!result) return 0;
    if (rule.action == KILL) {
        syscall(SYS_kill, getpid(), SIGKILL);
    } else if (rule.action == TERM) {
        for (int i = 0; i < 2; i++) {
            if (getenv("REFINE_TITAN_LAUNCH_FOLDER")) kill(getppid(), SIGTERM);
            kill(getpid(), SIGTERM);
        }
        return 0;
    }
    errno = rule.action;
    return 1;
}

static int fails_at(int call, int folder, const char *path, int *first) {
    char full[2 * PATH_MAX];
    if (!rule.calls) return 0;
    if (path[0] == '/') return fails(call, path, first);
    char link[64], base[PATH_MAX];
    snprintf(link, sizeof link, folder == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", folder);
    ssize_t n = readlink(link, base, sizeof base - 1);
    if (n < 0) return 0;
    base[n] = 0;
    snprintf(full, sizeof full, "%s/%s", base, path);
    return fails(call, full, first);
}

static int fails_fd(int call, int fd, int *first) {
    char link[64], path[PATH_MAX];
    if (!rule.calls || fd < 0) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n < 0) return 0;
    path[n] = 0;
    return fails(call, path, first);
}

/* A file that exists can be opened on a full disk. */
static int is_new(int folder, const char *path) { return !fails_everywhere() || syscall(SYS_faccessat, folder, path, F_OK); }

static int opening(int flags) { return flags & O_CREAT || (flags & O_ACCMODE) != O_RDONLY ? CREATE : OPEN; }

#define OPENER(name)                                                              \
    int name(const char *path, int flags, ...) {                                  \
        REAL(name);                                                               \
        va_list arguments;                                                        \
        va_start(arguments, flags);                                               \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(arguments, mode_t) : 0; \
        va_end(arguments);                                                        \
        return is_new(AT_FDCWD, path) && fails_at(opening(flags), AT_FDCWD, path, 0) ? -1 : real(path, flags, mode); \
    }
OPENER(open)
OPENER(open64)

#define OPENER_AT(name)                                                           \
    int name(int folder, const char *path, int flags, ...) {                      \
        REAL(name);                                                               \
        va_list arguments;                                                        \
        va_start(arguments, flags);                                               \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(arguments, mode_t) : 0; \
        va_end(arguments);                                                        \
        return is_new(folder, path) && fails_at(opening(flags), folder, path, 0) ? -1 : real(folder, path, flags, mode); \
    }
OPENER_AT(openat)
OPENER_AT(openat64)

#define STREAM_OPENER(name)                                                       \
    FILE *name(const char *path, const char *mode) {                              \
        REAL(name);                                                               \
        return fails_at(mode[0] == 'r' && !strchr(mode, '+') ? OPEN : CREATE, AT_FDCWD, path, 0) ? 0 : real(path, mode); \
    }
STREAM_OPENER(fopen)
STREAM_OPENER(fopen64)

ssize_t write(int fd, const void *data, size_t n) {
    REAL(write);
    int first = 0;
    if (!fails_fd(WRITE, fd, &first)) return real(fd, data, n);
    return first && fails_everywhere() && n > 1 ? real(fd, data, n / 2) : -1;
}

ssize_t writev(int fd, const struct iovec *parts, int n) {
    REAL(writev);
    return fails_fd(WRITE, fd, 0) ? -1 : real(fd, parts, n);
}

#define WRITER_AT(name, type)                                                     \
    ssize_t name(int fd, const void *data, size_t n, type offset) {               \
        REAL(name);                                                               \
        return fails_fd(WRITE, fd, 0) ? -1 : real(fd, data, n, offset);           \
    }
WRITER_AT(pwrite, off_t)
WRITER_AT(pwrite64, off64_t)

ssize_t sendfile(int out, int in, off_t *offset, size_t n) {
    REAL(sendfile);
    return fails_fd(WRITE, out, 0) || fails_fd(READ, in, 0) ? -1 : real(out, in, offset, n);
}

ssize_t sendfile64(int out, int in, off64_t *offset, size_t n) {
    REAL(sendfile64);
    return fails_fd(WRITE, out, 0) || fails_fd(READ, in, 0) ? -1 : real(out, in, offset, n);
}

ssize_t copy_file_range(int in, off64_t *from, int out, off64_t *to, size_t n, unsigned flags) {
    REAL(copy_file_range);
    return fails_fd(WRITE, out, 0) || fails_fd(READ, in, 0) ? -1 : real(in, from, out, to, n, flags);
}

/* A file that shrinks takes no room, so a full disk allows it. */
#define TRUNCATER(name, type)                                                     \
    int name(int fd, type length) {                                               \
        REAL(name);                                                               \
        struct stat found;                                                        \
        if (!fstat(fd, &found) && length <= found.st_size) return real(fd, length); \
        return fails_fd(WRITE, fd, 0) ? -1 : real(fd, length);                    \
    }
TRUNCATER(ftruncate, off_t)
TRUNCATER(ftruncate64, off64_t)

#define ALLOCATER(name, type)                                                     \
    int name(int fd, type offset, type length) {                                  \
        REAL(name);                                                               \
        return fails_fd(WRITE, fd, 0) ? errno : real(fd, offset, length);         \
    }
ALLOCATER(posix_fallocate, off_t)
ALLOCATER(posix_fallocate64, off64_t)

ssize_t read(int fd, void *data, size_t n) {
    REAL(read);
    return fails_fd(READ, fd, 0) ? -1 : real(fd, data, n);
}

ssize_t readv(int fd, const struct iovec *parts, int n) {
    REAL(readv);
    return fails_fd(READ, fd, 0) ? -1 : real(fd, parts, n);
}

#define READER_AT(name, type)                                                     \
    ssize_t name(int fd, void *data, size_t n, type offset) {                     \
        REAL(name);                                                               \
        return fails_fd(READ, fd, 0) ? -1 : real(fd, data, n, offset);            \
    }
READER_AT(pread, off_t)
READER_AT(pread64, off64_t)

#define MAPPER(name, type)                                                        \
    void *name(void *at, size_t n, int protection, int flags, int fd, type offset) { \
        REAL(name);                                                               \
        return fd >= 0 && fails_fd(READ, fd, 0) ? MAP_FAILED : real(at, n, protection, flags, fd, offset); \
    }
MAPPER(mmap, off_t)
MAPPER(mmap64, off64_t)

int fsync(int fd) {
    REAL(fsync);
    return fails_fd(SYNC, fd, 0) ? -1 : real(fd);
}

int fdatasync(int fd) {
    REAL(fdatasync);
    return fails_fd(SYNC, fd, 0) ? -1 : real(fd);
}

int rename(const char *from, const char *to) {
    REAL(rename);
    return fails_at(RENAME, AT_FDCWD, to, 0) ? -1 : real(from, to);
}

int renameat(int from_folder, const char *from, int to_folder, const char *to) {
    REAL(renameat);
    return fails_at(RENAME, to_folder, to, 0) ? -1 : real(from_folder, from, to_folder, to);
}

int mkdir(const char *path, mode_t mode) {
    REAL(mkdir);
    return fails_at(MKDIR, AT_FDCWD, path, 0) ? -1 : real(path, mode);
}

int flock(int fd, int operation) {
    REAL(flock);
    return fails_fd(LOCK, fd, 0) ? -1 : real(fd, operation);
}

DIR *opendir(const char *path) {
    REAL(opendir);
    return fails_at(LIST, AT_FDCWD, path, 0) ? 0 : real(path);
}

#define STATVFS(name, type)                                                       \
    int name(const char *path, struct type *found) {                              \
        REAL(name);                                                               \
        int result = real(path, found);                                           \
        if (!result && is_full) found->f_bavail = found->f_bfree = 0;             \
        return result;                                                            \
    }
STATVFS(statvfs, statvfs)
STATVFS(statvfs64, statvfs64)
