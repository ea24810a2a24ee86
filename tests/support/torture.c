// Stands between a process and the C library's file calls, loaded before it (LD_PRELOAD). Calls that touch `root` are counted; the k-th fails, kills the
// process, is cut short or is late. With a shadow directory, what fsync has made durable is kept there: what a file held and what a directory listed, by inode.
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { COUNT, FAIL, KILL, SHORT, DELAY };
enum { MOST = 1 << 16 };
static char root[PATH_MAX], shadow[PATH_MAX];
static long due, count;
static int mode = -1, number, inside;
static char writes[MOST];  // which of the calls write

void torture_arm(const char* at, long k, int how, int error, const char* durable) {
  snprintf(root, sizeof root, "%s", at);
  snprintf(shadow, sizeof shadow, "%s", durable);
  due = k, count = 0, number = error, mode = how;
}
long torture_count(void) { return count; }
int torture_writes(long k) { return writes[k]; }
void torture_disarm(void) { mode = -1; }

static int ours(const char* path) { return mode >= 0 && !inside && path && strncmp(path, root, strlen(root)) == 0; }
static int path_of(int fd, char* path) {
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  const ssize_t size = readlink(link, path, PATH_MAX - 1);
  path[size < 0 ? 0 : size] = 0;
  return size > 0;
}
static int ours_fd(int fd) {
  char path[PATH_MAX];
  return mode >= 0 && !inside && path_of(fd, path) && ours(path);
}
static int ours_at(int dir, const char* path) { return path && (path[0] == '/' || dir == AT_FDCWD ? ours(path) : ours_fd(dir)); }

// Counts a call; 1 where it must fail.
static int struck(void) {
  if (++count != due) return 0;
  if (mode == KILL) kill(getpid(), SIGKILL);
  if (mode == DELAY) usleep(30000);
  if (mode == FAIL) errno = number;
  return mode == FAIL;
}

static void keep(int fd) {  // what is durable of a file or a directory from now on
  char path[PATH_MAX], to[2 * PATH_MAX];
  struct stat found;
  if (!shadow[0] || fstat(fd, &found) || !path_of(fd, path)) return;
  inside = 1;
  snprintf(to, sizeof to, "%s/%lu", shadow, (unsigned long)found.st_ino);
  FILE* out = fopen(to, "wb");
  if (S_ISDIR(found.st_mode)) {
    DIR* listed = opendir(path);
    for (struct dirent* one; (one = readdir(listed));) fprintf(out, "%s\t%lu\t%d\n", one->d_name, (unsigned long)one->d_ino, one->d_type == DT_DIR);
    closedir(listed);
  } else {
    FILE* in = fopen(path, "rb");
    char part[1 << 16];
    for (size_t n; in && (n = fread(part, 1, sizeof part, in));) fwrite(part, 1, n, out);
    if (in) fclose(in);
  }
  fclose(out);
  inside = 0;
}

#define REAL(name) static typeof(&name) real; if (!real) real = (typeof(&name))dlsym(RTLD_NEXT, #name)
#define WITH(call, mine)                    \
  if (!(mine)) return call;                 \
  if (struck()) return -1;                  \
  return call
#define OPEN(name)                                                      \
  int name(const char* path, int flags, ...) {                          \
    REAL(name);                                                         \
    va_list rest;                                                       \
    va_start(rest, flags);                                              \
    const mode_t bits = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, int) : 0; \
    va_end(rest);                                                       \
    WITH(real(path, flags, bits), ours(path));                          \
  }
#define OPENAT(name)                                                    \
  int name(int dir, const char* path, int flags, ...) {                 \
    REAL(name);                                                         \
    va_list rest;                                                       \
    va_start(rest, flags);                                              \
    const mode_t bits = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, int) : 0; \
    va_end(rest);                                                       \
    WITH(real(dir, path, flags, bits), ours_at(dir, path));             \
  }
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)

ssize_t write(int fd, const void* data, size_t size) {
  REAL(write);
  if (!ours_fd(fd)) return real(fd, data, size);
  if (struck()) return -1;
  if (count < MOST) writes[count] = size > 1;
  return real(fd, data, count == due && mode == SHORT && size > 1 ? size / 2 : size);
}
ssize_t pwrite64(int fd, const void* data, size_t size, off64_t at) { REAL(pwrite64); WITH(real(fd, data, size, at), ours_fd(fd)); }
ssize_t writev(int fd, const struct iovec* parts, int n) { REAL(writev); WITH(real(fd, parts, n), ours_fd(fd)); }
int fsync(int fd) {
  REAL(fsync);
  if (!ours_fd(fd)) return real(fd);
  if (struck()) return -1;
  const int result = real(fd);
  if (!result) keep(fd);
  return result;
}
int fdatasync(int fd) {
  REAL(fdatasync);
  if (!ours_fd(fd)) return real(fd);
  if (struck()) return -1;
  const int result = real(fd);
  if (!result) keep(fd);
  return result;
}
int ftruncate64(int fd, off64_t size) { REAL(ftruncate64); WITH(real(fd, size), ours_fd(fd)); }
int rename(const char* from, const char* to) { REAL(rename); WITH(real(from, to), ours(to) || ours(from)); }
int renameat(int a, const char* from, int b, const char* to) { REAL(renameat); WITH(real(a, from, b, to), ours_at(b, to)); }
int link(const char* from, const char* to) { REAL(link); WITH(real(from, to), ours(to)); }
int unlink(const char* path) { REAL(unlink); WITH(real(path), ours(path)); }
int unlinkat(int dir, const char* path, int flags) { REAL(unlinkat); WITH(real(dir, path, flags), ours_at(dir, path)); }
int mkdir(const char* path, mode_t bits) { REAL(mkdir); WITH(real(path, bits), ours(path)); }
int rmdir(const char* path) { REAL(rmdir); WITH(real(path), ours(path)); }
