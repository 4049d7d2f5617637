// Faults on demand, for a process that preloads this: the n-th large allocation, new thread, write to a file or sync of
// one fails, as a system without memory, threads, room or a sound disk would fail it. Needs glibc.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#include <sys/stat.h>
#include <unistd.h>

enum { ALLOCATION, THREAD, WRITE, SYNC, KINDS };

static atomic_long seen[KINDS], failing[KINDS];  // calls so far; the first that fails, 0 for none
static atomic_int lasting[KINDS];                // whether those after it fail too
static atomic_long large = 1 << 14;              // bytes from which an allocation counts

// Fail call `at` of a kind, counted from now, and all after it if `always`; 0 fails none.
void fault_plant(int kind, long at, int always) {
  failing[kind] = 0;
  seen[kind] = 0;
  lasting[kind] = always;
  failing[kind] = at;
}

long fault_seen(int kind) { return seen[kind]; }

void fault_large(long bytes) { large = bytes; }

static int fails(int kind) {
  const long number = ++seen[kind], at = failing[kind];
  return at > 0 && (number == at || (lasting[kind] && number > at));
}

static int refused(size_t bytes) { return bytes >= (size_t)large && fails(ALLOCATION); }

extern void *__libc_malloc(size_t), *__libc_calloc(size_t, size_t), *__libc_realloc(void *, size_t);
extern void *__libc_memalign(size_t, size_t);

void *malloc(size_t bytes) {
  if (refused(bytes)) return errno = ENOMEM, NULL;
  return __libc_malloc(bytes);
}

void *calloc(size_t count, size_t each) {
  if (each && refused(count * each)) return errno = ENOMEM, NULL;
  return __libc_calloc(count, each);
}

void *realloc(void *old, size_t bytes) {
  if (refused(bytes)) return errno = ENOMEM, NULL;
  return __libc_realloc(old, bytes);
}

void *aligned_alloc(size_t to, size_t bytes) {
  if (refused(bytes)) return errno = ENOMEM, NULL;
  return __libc_memalign(to, bytes);
}

int posix_memalign(void **found, size_t to, size_t bytes) {
  if (refused(bytes)) return ENOMEM;
  *found = __libc_memalign(to, bytes);
  return *found ? 0 : ENOMEM;
}

int pthread_create(pthread_t *thread, const pthread_attr_t *how, void *(*start)(void *), void *with) {
  static int (*real)(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *);
  if (!real) *(void **)&real = dlsym(RTLD_NEXT, "pthread_create");
  return fails(THREAD) ? EAGAIN : real(thread, how, start, with);
}

ssize_t write(int file, const void *bytes, size_t count) {
  static ssize_t (*real)(int, const void *, size_t);
  struct stat about;
  if (!real) *(void **)&real = dlsym(RTLD_NEXT, "write");
  if (file > 2 && fstat(file, &about) == 0 && S_ISREG(about.st_mode) && fails(WRITE)) return errno = ENOSPC, -1;
  return real(file, bytes, count);
}

int fsync(int file) {
  static int (*real)(int);
  if (!real) *(void **)&real = dlsym(RTLD_NEXT, "fsync");
  return fails(SYNC) ? (errno = EIO, -1) : real(file);
}
