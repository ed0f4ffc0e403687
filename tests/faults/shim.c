/* Preloaded into a process: notes its calls on files under a folder, and makes the n-th of them fail, fall short or raise a signal. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { NONE, FAIL, SHORT, SIGNAL };

static char root[PATH_MAX], wanted[32], notes[1 << 20];
static long nth, seen;
static int action, value, sticky;
static size_t noted;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

/* Calls of kind `op` ("*": any) on paths that start with `under` are counted; `how` happens to the `n`-th, and if `ever` to all after it. */
void t2n_arm(const char *under, const char *op, long n, int how, int what, int ever) {
    pthread_mutex_lock(&lock);
    snprintf(root, sizeof root, "%s", under);
    snprintf(wanted, sizeof wanted, "%s", op);
    nth = n, action = how, value = what, sticky = ever, seen = 0, noted = 0, notes[0] = 0;
    pthread_mutex_unlock(&lock);
}

long t2n_seen(void) { return seen; }
const char *t2n_notes(void) { return notes; }

/* What shall happen to this call; FAIL has set errno. */
static int fate(const char *op, const char *path, const char *to) {
    if (!root[0] || strncmp(path, root, strlen(root))) return NONE;
    pthread_mutex_lock(&lock);
    int hit = 0;
    if (!strcmp(wanted, "*") || !strcmp(wanted, op)) {
        seen++;
        hit = seen == nth || (sticky && nth && seen > nth);
    }
    if (noted + 2 * PATH_MAX < sizeof notes) noted += sprintf(notes + noted, "%s\t%s\t%s\n", op, path, to ? to : "");
    int how = hit ? action : NONE;
    pthread_mutex_unlock(&lock);
    if (how == SIGNAL) kill(getpid(), value);
    if (how == FAIL) errno = value;
    return how;
}

static const char *absolute(int dir, const char *path, char *into) {
    char link[64], base[PATH_MAX] = "";
    if (path[0] == '/') return path;
    snprintf(link, sizeof link, dir == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", dir);
    ssize_t length = readlink(link, base, sizeof base - 1);
    base[length < 0 ? 0 : length] = 0;
    snprintf(into, 2 * PATH_MAX, path[0] ? "%s/%s" : "%s", base, path);
    return into;
}

static int fate_of_file(const char *op, int file) {
    int before = errno;
    char path[2 * PATH_MAX];
    absolute(file, "", path);
    errno = before;
    return fate(op, path, NULL);
}

static int fate_of_path(const char *op, int dir, const char *path) {
    char whole[2 * PATH_MAX];
    return fate(op, absolute(dir, path, whole), NULL);
}

static int fate_of_two(const char *op, int dir, const char *path, int to_dir, const char *to) {
    char whole[2 * PATH_MAX], to_whole[2 * PATH_MAX];
    return fate(op, absolute(dir, path, whole), absolute(to_dir, to, to_whole));
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

#define OPEN(name)                                                                            \
    int name(const char *path, int flags, ...) {                                              \
        va_list more;                                                                         \
        va_start(more, flags);                                                                \
        mode_t mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(more, mode_t) : 0;             \
        va_end(more);                                                                         \
        if (fate_of_path(flags & O_CREAT ? "create" : "open", AT_FDCWD, path) == FAIL) return -1; \
        return REAL(name)(path, flags, mode);                                                 \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                                          \
    int name(int dir, const char *path, int flags, ...) {                                     \
        va_list more;                                                                         \
        va_start(more, flags);                                                                \
        mode_t mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(more, mode_t) : 0;             \
        va_end(more);                                                                         \
        if (fate_of_path(flags & O_CREAT ? "create" : "open", dir, path) == FAIL) return -1;  \
        return REAL(name)(dir, path, flags, mode);                                            \
    }
OPENAT(openat)
OPENAT(openat64)

ssize_t write(int file, const void *bytes, size_t count) {
    int how = fate_of_file("write", file);
    if (how == FAIL) return -1;
    return REAL(write)(file, bytes, how == SHORT && count > 1 ? count / 2 : count);
}

ssize_t writev(int file, const struct iovec *parts, int count) {
    if (fate_of_file("write", file) == FAIL) return -1;
    return REAL(writev)(file, parts, count);
}

ssize_t sendfile64(int to, int from, off64_t *at, size_t count) {
    int how = fate_of_file("write", to);
    if (how == FAIL) return -1;
    return REAL(sendfile64)(to, from, at, how == SHORT && count > 1 ? count / 2 : count);
}

ssize_t copy_file_range(int from, off64_t *at, int to, off64_t *to_at, size_t count, unsigned flags) {
    int how = fate_of_file("write", to);
    if (how == FAIL) return -1;
    return REAL(copy_file_range)(from, at, to, to_at, how == SHORT && count > 1 ? count / 2 : count, flags);
}

int fsync(int file) { return fate_of_file("fsync", file) == FAIL ? -1 : REAL(fsync)(file); }
int fdatasync(int file) { return fate_of_file("fsync", file) == FAIL ? -1 : REAL(fdatasync)(file); }
int flock(int file, int how) { return fate_of_file("lock", file) == FAIL ? -1 : REAL(flock)(file, how); }
int mkdir(const char *path, mode_t mode) {
    if (!access(path, F_OK)) return REAL(mkdir)(path, mode); /* nothing is made */
    return fate_of_path("mkdir", AT_FDCWD, path) == FAIL ? -1 : REAL(mkdir)(path, mode);
}
int rmdir(const char *path) { return fate_of_path("remove", AT_FDCWD, path) == FAIL ? -1 : REAL(rmdir)(path); }
int unlink(const char *path) { return fate_of_path("remove", AT_FDCWD, path) == FAIL ? -1 : REAL(unlink)(path); }
int unlinkat(int dir, const char *path, int flags) {
    return fate_of_path("remove", dir, path) == FAIL ? -1 : REAL(unlinkat)(dir, path, flags);
}
int link(const char *path, const char *to) {
    return fate_of_two("link", AT_FDCWD, path, AT_FDCWD, to) == FAIL ? -1 : REAL(link)(path, to);
}
int linkat(int dir, const char *path, int to_dir, const char *to, int flags) {
    return fate_of_two("link", dir, path, to_dir, to) == FAIL ? -1 : REAL(linkat)(dir, path, to_dir, to, flags);
}
int rename(const char *path, const char *to) {
    return fate_of_two("rename", AT_FDCWD, path, AT_FDCWD, to) == FAIL ? -1 : REAL(rename)(path, to);
}
int renameat(int dir, const char *path, int to_dir, const char *to) {
    return fate_of_two("rename", dir, path, to_dir, to) == FAIL ? -1 : REAL(renameat)(dir, path, to_dir, to);
}
int renameat2(int dir, const char *path, int to_dir, const char *to, unsigned flags) {
    const char *op = flags & RENAME_EXCHANGE ? "exchange" : "rename";
    return fate_of_two(op, dir, path, to_dir, to) == FAIL ? -1 : REAL(renameat2)(dir, path, to_dir, to, flags);
}
