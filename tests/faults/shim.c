/* Calls to the system that open, read, write, map, name, lock, list or remove something in a
 * folder, counted; the one that is asked for fails.
 *
 * Loaded before all else (LD_PRELOAD). fault_arm says which folder, which call and which errno;
 * calls before it, and of other folders, go through. */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char prefix[4096];
static long wanted = -1, count = 0;
static int number = 0;
static char last[64];

void fault_arm(const char *folder, long nth, int error) {
  snprintf(prefix, sizeof prefix, "%s", folder);
  wanted = nth;
  number = error;
  count = 0;
  last[0] = 0;
}

long fault_count(void) { return count; }

/* What failed, or nothing where the call never came. */
const char *fault_name(void) { return last; }

static int fails(const char *what, const char *path) {
  if (!prefix[0] || !path || strncmp(path, prefix, strlen(prefix))) return 0;
  if (__sync_fetch_and_add(&count, 1) != wanted) return 0;
  snprintf(last, sizeof last, "%s", what);
  errno = number;
  return 1;
}

static int fails_fd(const char *what, int fd) {
  char name[64], path[4096];
  if (!prefix[0] || fd < 0) return 0;
  int before = errno;
  snprintf(name, sizeof name, "/proc/self/fd/%d", fd);
  ssize_t size = readlink(name, path, sizeof path - 1);
  errno = before;
  if (size < 0) return 0;
  path[size] = 0;
  return fails(what, path);
}

/* A name in a folder that is open, as the removal of trees gives it. */
static int fails_at(const char *what, int at, const char *name) {
  char link[64], path[8192];
  if (!prefix[0] || !name || name[0] == '/' || at == AT_FDCWD) return fails(what, name);
  int before = errno;
  snprintf(link, sizeof link, "/proc/self/fd/%d", at);
  ssize_t size = readlink(link, path, 4095);
  errno = before;
  if (size < 0) return 0;
  snprintf(path + size, sizeof path - size, "/%s", name);
  return fails(what, path);
}

#define REAL(name) \
  static __typeof__(&name) real; \
  if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

#define MODE(flags) \
  mode_t mode = 0; \
  if ((flags) & (O_CREAT | O_TMPFILE)) { \
    va_list rest; \
    va_start(rest, flags); \
    mode = va_arg(rest, mode_t); \
    va_end(rest); \
  }

int open(const char *path, int flags, ...) {
  REAL(open);
  MODE(flags);
  return fails("open", path) ? -1 : real(path, flags, mode);
}

int open64(const char *path, int flags, ...) {
  REAL(open64);
  MODE(flags);
  return fails("open", path) ? -1 : real(path, flags, mode);
}

int openat(int at, const char *path, int flags, ...) {
  REAL(openat);
  MODE(flags);
  return fails_at("open", at, path) ? -1 : real(at, path, flags, mode);
}

int openat64(int at, const char *path, int flags, ...) {
  REAL(openat64);
  MODE(flags);
  return fails_at("open", at, path) ? -1 : real(at, path, flags, mode);
}

FILE *fopen(const char *path, const char *how) {
  REAL(fopen);
  return fails("open", path) ? NULL : real(path, how);
}

FILE *fopen64(const char *path, const char *how) {
  REAL(fopen64);
  return fails("open", path) ? NULL : real(path, how);
}

ssize_t read(int fd, void *data, size_t size) {
  REAL(read);
  return fails_fd("read", fd) ? -1 : real(fd, data, size);
}

ssize_t write(int fd, const void *data, size_t size) {
  REAL(write);
  return fails_fd("write", fd) ? -1 : real(fd, data, size);
}

ssize_t writev(int fd, const struct iovec *parts, int some) {
  REAL(writev);
  return fails_fd("write", fd) ? -1 : real(fd, parts, some);
}

ssize_t sendfile64(int out, int in, off64_t *offset, size_t size) {
  static ssize_t (*real)(int, int, off64_t *, size_t);
  if (!real) real = dlsym(RTLD_NEXT, "sendfile64");
  return fails_fd("write", out) ? -1 : real(out, in, offset, size);
}

int rename(const char *from, const char *to) {
  REAL(rename);
  return fails("rename", from) ? -1 : real(from, to);
}

int renameat2(int at, const char *from, int to_at, const char *to, unsigned flags) {
  REAL(renameat2);
  return fails("rename", from) ? -1 : real(at, from, to_at, to, flags);
}

int link(const char *from, const char *to) {
  REAL(link);
  return fails("link", to) ? -1 : real(from, to);
}

int linkat(int at, const char *from, int to_at, const char *to, int flags) {
  REAL(linkat);
  return fails("link", to) ? -1 : real(at, from, to_at, to, flags);
}

int mkdir(const char *path, mode_t mode) {
  REAL(mkdir);
  return fails("mkdir", path) ? -1 : real(path, mode);
}

int unlink(const char *path) {
  REAL(unlink);
  return fails("unlink", path) ? -1 : real(path);
}

int unlinkat(int at, const char *path, int flags) {
  REAL(unlinkat);
  const char *what = flags & AT_REMOVEDIR ? "rmdir" : "unlink";
  return fails_at(what, at, path) ? -1 : real(at, path, flags);
}

int rmdir(const char *path) {
  REAL(rmdir);
  return fails("rmdir", path) ? -1 : real(path);
}

DIR *opendir(const char *path) {
  REAL(opendir);
  return fails("list", path) ? NULL : real(path);
}

DIR *fdopendir(int fd) {
  REAL(fdopendir);
  return fails_fd("list", fd) ? NULL : real(fd);
}

int flock(int fd, int what) {
  REAL(flock);
  return fails_fd("flock", fd) ? -1 : real(fd, what);
}

int ioctl(int fd, unsigned long request, ...) {
  static int (*real)(int, unsigned long, void *);
  if (!real) real = dlsym(RTLD_NEXT, "ioctl");
  va_list rest;
  va_start(rest, request);
  void *argument = va_arg(rest, void *);
  va_end(rest);
  return fails_fd("ioctl", fd) ? -1 : real(fd, request, argument);
}

int fsync(int fd) {
  REAL(fsync);
  return fails_fd("fsync", fd) ? -1 : real(fd);
}

int ftruncate64(int fd, off64_t size) {
  REAL(ftruncate64);
  return fails_fd("truncate", fd) ? -1 : real(fd, size);
}

void *mmap(void *at, size_t size, int protection, int flags, int fd, off_t offset) {
  REAL(mmap);
  return fails_fd("mmap", fd) ? MAP_FAILED : real(at, size, protection, flags, fd, offset);
}

void *mmap64(void *at, size_t size, int protection, int flags, int fd, off64_t offset) {
  REAL(mmap64);
  return fails_fd("mmap", fd) ? MAP_FAILED : real(at, size, protection, flags, fd, offset);
}
