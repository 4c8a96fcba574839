/* A libcuda.so.1 without a GPU: memory is the host's, kernels are those of tests/emulator/cuda, streams are queues.
 *
 * It refuses what a driver refuses, by the driver's own numbers: the driver API's manual says of every call what makes
 * it fail. Work waits in its stream's queue until somebody synchronises, so that a copy out of memory that was given
 * another content too early shows, and so does managed memory that the CPU touches before the GPU is idle, where a
 * board would not allow it. It has the entry points that compiler/codegen/cuda/driver.h lists and no other. Environment:
 *   QUERN_MOCK_ARCH, _DRIVER    90, 12040                  QUERN_MOCK_MEMORY        bytes of GPU memory
 *   QUERN_MOCK_INTEGRATED       1 for a board              QUERN_MOCK_KERNELS       the emulated kernels, a library
 *   QUERN_MOCK_REFUSE           "init", "context", "cubin", "ptx", "threads", "code memory", "capture", "replay", "launch",
 *                               "hang"
 *   QUERN_MOCK_COUNTS           file that gets one JSON object when a process ends that loaded kernels
 * Stricter than a driver: host memory of a copy must be pinned, and there is no default stream.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "device_code.h"
#include "driver.h"

#define ERRORS(X)                                                                                                  \
  X(INVALID_VALUE, 1) X(OUT_OF_MEMORY, 2) X(NOT_INITIALIZED, 3) X(NO_DEVICE, 100) X(INVALID_DEVICE, 101)           \
  X(INVALID_IMAGE, 200) X(INVALID_CONTEXT, 201) X(NO_BINARY_FOR_GPU, 209) X(INVALID_PTX, 218)                      \
  X(UNSUPPORTED_PTX_VERSION, 222) X(INVALID_HANDLE, 400) X(NOT_FOUND, 500) X(NOT_READY, 600)                       \
  X(LAUNCH_OUT_OF_RESOURCES, 701) X(CONTEXT_IS_DESTROYED, 709) X(LAUNCH_FAILED, 719)                               \
  X(STREAM_CAPTURE_UNSUPPORTED, 900) X(STREAM_CAPTURE_INVALIDATED, 901) X(CAPTURED_EVENT, 907)
#define NUMBER(name, number) name = number,
enum { ERRORS(NUMBER) };
#undef NUMBER
enum { MAX_REGIONS = 1024, MAX_HANDLES = 1 << 16, MAX_PARAMETERS = 32, POISON = 0xA5, UNASKED_SHARED = 48 << 10,
       COHERENT_SM = 72, WARP = 32 };

typedef struct { void *start; uint64_t bytes; int host, managed; } region;
typedef struct { /* what emulates a module's kernels, if anything does */
  int (*launch)(const char *, const unsigned *, const unsigned *, unsigned, void **);
  const char *(*message)(void);
  void (*set_regions)(const void *, int);
} emulation;
typedef struct { kernel_facts *facts; unsigned granted; int launched; emulation emulated; } function;
typedef struct { code_facts facts; function *functions; } module;
typedef struct { double at; int recorded, waiting, captured; struct stream *in; } event;
typedef struct {
  enum { COPY, SET, LAUNCH, RECORD } kind;
  void *to; const void *from; size_t bytes; int value;
  function *f; unsigned grid[3], block[3], shared; uint64_t values[MAX_PARAMETERS];
} work;
typedef struct { work *items; size_t count, room; } queue;
typedef struct stream { queue pending, captured; int capturing, spoilt; } stream;
typedef struct { queue work; } graph;
typedef enum { STREAM = 1, EVENT, MODULE, GRAPH, GRAPH_EXEC } kind;

static region regions[MAX_REGIONS];
static struct { void *at; kind of; } handles[MAX_HANDLES];
static int region_count, handle_count, started, loaded, broken, retained;
static _Thread_local CUcontext current;
static uint64_t used, peak;
static struct { long launches, graph_launches, captures, copies_in, copies_out, bytes_in, syncs, ptx; } counts;

static const char *setting(const char *name, const char *otherwise) {
  const char *value = getenv(name);
  return value && *value ? value : otherwise;
}
static int refuses(const char *what) { return !strcmp(setting("QUERN_MOCK_REFUSE", ""), what); }
static int arch(void) { return atoi(setting("QUERN_MOCK_ARCH", "90")); }
static int driver_version(void) { return atoi(setting("QUERN_MOCK_DRIVER", "12040")); }
static int integrated(void) { return atoi(setting("QUERN_MOCK_INTEGRATED", "0")); }
static uint64_t memory(void) { return strtoull(setting("QUERN_MOCK_MEMORY", "8589934592"), NULL, 10); }

/* ---- handles ---- */

static void *keep(size_t bytes, kind of) {
  void *made = calloc(1, bytes);
  if (handle_count == MAX_HANDLES) abort();
  handles[handle_count].at = made, handles[handle_count++].of = of;
  return made;
}
static int alive(const void *at, kind of) {
  for (int i = 0; at && i < handle_count; i++)
    if (handles[i].at == at && handles[i].of == of) return 1;
  return 0;
}
static int living(kind of) {
  int found = 0;
  for (int i = 0; i < handle_count; i++) found += handles[i].of == of;
  return found;
}
static void forget(void *at) {
  for (int i = 0; i < handle_count; i++)
    if (handles[i].at == at) {
      handles[i] = handles[--handle_count];
      free(at);
      return;
    }
}

__attribute__((destructor)) static void report(void) {
  const char *path = getenv("QUERN_MOCK_COUNTS");
  FILE *out = path && loaded ? fopen(path, "w") : NULL;
  if (!out) return;
  int left = 0, host_left = 0;
  for (int i = 0; i < region_count; i++) left += !regions[i].host, host_left += regions[i].host;
  fprintf(out,
          "{\"launches\": %ld, \"graph_launches\": %ld, \"captures\": %ld, \"graphs_alive\": %d, \"copies_in\": %ld, "
          "\"copies_out\": %ld, \"bytes_in\": %ld, \"syncs\": %ld, \"modules_alive\": %d, \"ptx\": %ld, "
          "\"peak_bytes\": %llu, \"left\": %d, \"host_left\": %d, \"others_alive\": %d}\n",
          counts.launches, counts.graph_launches, counts.captures, living(GRAPH) + living(GRAPH_EXEC), counts.copies_in,
          counts.copies_out, counts.bytes_in, counts.syncs, living(MODULE), counts.ptx, (unsigned long long)peak, left,
          host_left, living(STREAM) + living(EVENT) + retained);
  fclose(out);
}

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1e3 + t.tv_nsec / 1e6;
}

/* ---- memory ---- */

static region *find(uint64_t at, uint64_t bytes) {
  for (int i = 0; i < region_count; i++) {
    uint64_t start = (uint64_t)(uintptr_t)regions[i].start;
    if (start <= at && at + bytes <= start + regions[i].bytes) return &regions[i];
  }
  return NULL;
}

static void tell_regions(const emulation *to) {
  struct { void *start; uint64_t bytes; } known[MAX_REGIONS];
  int count = 0;
  for (int i = 0; i < region_count; i++)
    if (!regions[i].host) known[count].start = regions[i].start, known[count++].bytes = regions[i].bytes;
  to->set_regions(known, count);
}

static int idle(void) {
  for (int i = 0; i < handle_count; i++)
    if (handles[i].of == STREAM && ((stream *)handles[i].at)->pending.count) return 0;
  return 1;
}

/* Where CPU and GPU may not use managed memory at once ("CUDA for Tegra": no concurrent access), a CPU that does while
 * the GPU has work gets a signal. */
static void guard(int open) {
  if (!integrated() || arch() >= COHERENT_SM) return;
  for (int i = 0; i < region_count; i++)
    if (regions[i].managed) mprotect(regions[i].start, regions[i].bytes, open ? PROT_READ | PROT_WRITE : PROT_NONE);
}

static CUresult take(void **out, size_t bytes, int host, int managed) {
  if (!bytes) return INVALID_VALUE;
  if (!host && used + bytes > memory()) return OUT_OF_MEMORY;
  if (region_count == MAX_REGIONS) return OUT_OF_MEMORY;
  if (managed)
    *out = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  else if (posix_memalign(out, 256, bytes))
    return OUT_OF_MEMORY;
  memset(*out, POISON, bytes);
  regions[region_count++] = (region){*out, bytes, host, managed};
  if (!host) used += bytes, peak = used > peak ? used : peak;
  if (managed && !idle()) guard(0);
  return CUDA_SUCCESS;
}

static CUresult give(void *at, int host, int managed) {
  for (int i = 0; i < region_count; i++)
    if (regions[i].start == at && regions[i].host == host && regions[i].managed == managed) {
      if (!host) used -= regions[i].bytes;
      if (managed) munmap(at, regions[i].bytes);
      else free(at);
      regions[i] = regions[--region_count];
      return CUDA_SUCCESS;
    }
  return INVALID_VALUE;
}

/* ---- streams ---- */

static void put(queue *q, work item) {
  if (q->count == q->room) q->items = realloc(q->items, (q->room = 2 * q->room + 64) * sizeof *q->items);
  q->items[q->count++] = item;
}

static CUresult add(CUstream handle, work item) {
  stream *s = handle;
  if (s->spoilt) return STREAM_CAPTURE_INVALIDATED;
  put(s->capturing ? &s->captured : &s->pending, item);
  if (!s->capturing) guard(0);
  return CUDA_SUCCESS;
}

static void run(const work *w) {
  if (w->kind == COPY) memcpy(w->to, w->from, w->bytes);
  if (w->kind == SET) memset(w->to, w->value, w->bytes);
  if (w->kind == RECORD) ((event *)w->to)->at = now(), ((event *)w->to)->waiting--;
  if (w->kind != LAUNCH || broken) return;
  counts.launches++, broken = refuses("launch");
  while (refuses("hang")) sleep(1);
  void *arguments[MAX_PARAMETERS];
  for (unsigned i = 0; i < w->f->facts->parameters; i++) arguments[i] = (void *)&w->values[i];
  const emulation *by = &w->f->emulated;
  if (!by->launch) return;
  tell_regions(by);
  if (by->launch(w->f->facts->name, w->grid, w->block, w->shared, arguments)) {
    fprintf(stderr, "mock GPU: %s: %s\n", w->f->facts->name, by->message());
    broken = 1;
  }
}

static CUresult finish(stream *s) {
  guard(1);
  for (size_t i = 0; i < s->pending.count; i++) run(&s->pending.items[i]);
  s->pending.count = 0;
  if (!idle()) guard(0);
  return broken ? LAUNCH_FAILED : CUDA_SUCCESS;
}

/* What waits for the whole GPU; not while this thread records a graph, which that would spoil. */
static CUresult finish_all(void) {
  CUresult code = CUDA_SUCCESS;
  for (int i = 0; i < handle_count; i++)
    if (handles[i].of == STREAM && ((stream *)handles[i].at)->capturing)
      ((stream *)handles[i].at)->spoilt = 1, code = STREAM_CAPTURE_UNSUPPORTED;
  for (int i = 0; i < handle_count && !code; i++)
    if (handles[i].of == STREAM) code = finish(handles[i].at);
  return code;
}

/* No call goes without a context of this thread; after a kernel has failed every one says so. */
#define IN_CONTEXT                                                    \
  do {                                                                \
    if (!started) return NOT_INITIALIZED;                             \
    if (!current) return INVALID_CONTEXT;                             \
    if (!retained) return CONTEXT_IS_DESTROYED;                       \
    if (broken) return LAUNCH_FAILED;                                 \
  } while (0)
/* What may wait or allocate spoils a graph that is being recorded. */
#define NOT_WHILE_CAPTURING                                           \
  do {                                                                \
    IN_CONTEXT;                                                       \
    for (int i_ = 0; i_ < handle_count; i_++)                         \
      if (handles[i_].of == STREAM && ((stream *)handles[i_].at)->capturing) {      \
        ((stream *)handles[i_].at)->spoilt = 1;                       \
        return STREAM_CAPTURE_UNSUPPORTED;                            \
      }                                                               \
  } while (0)
#define ON(handle)                                                    \
  do {                                                                \
    IN_CONTEXT;                                                       \
    if (!alive(handle, STREAM)) return INVALID_HANDLE;                \
  } while (0)

/* ---- the driver ---- */

const int quern_emulated = 1; /* runtime/cuda_driver.py: times on this GPU are none */

CUresult cuInit(unsigned flags) {
  if (flags) return INVALID_VALUE;
  if (refuses("init")) return NO_DEVICE;
  started = 1;
  return CUDA_SUCCESS;
}
CUresult cuDriverGetVersion(int *version) { return *version = driver_version(), CUDA_SUCCESS; }
CUresult cuGetErrorName(CUresult code, const char **text) {
#define NAME(name, number) {number, "CUDA_ERROR_" #name},
  static const struct { int code; const char *name; } names[] = {ERRORS(NAME)};
#undef NAME
  for (size_t i = 0; i < sizeof names / sizeof *names; i++)
    if (names[i].code == code) return *text = names[i].name, CUDA_SUCCESS;
  return *text = NULL, INVALID_VALUE;
}
CUresult cuDeviceGetCount(int *count) { return started ? (*count = 1, CUDA_SUCCESS) : NOT_INITIALIZED; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) {
  if (!started) return NOT_INITIALIZED;
  return ordinal ? INVALID_DEVICE : (*device = 0, CUDA_SUCCESS);
}
CUresult cuDeviceGetName(char *name, int size, CUdevice device) {
  if (!started || device) return started ? INVALID_DEVICE : NOT_INITIALIZED;
  snprintf(name, (size_t)size, "Mock GPU");
  return CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int *value, int attribute, CUdevice device) {
  if (!started || device) return started ? INVALID_DEVICE : NOT_INITIALIZED;
  switch (attribute) {
    case ATTRIBUTE_MAJOR: return *value = arch() / 10, CUDA_SUCCESS;
    case ATTRIBUTE_MINOR: return *value = arch() % 10, CUDA_SUCCESS;
    case ATTRIBUTE_MULTIPROCESSORS: return *value = 2, CUDA_SUCCESS;
    case ATTRIBUTE_INTEGRATED: return *value = integrated(), CUDA_SUCCESS;
    default: return INVALID_VALUE;
  }
}
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
  if (!started || device) return started ? INVALID_DEVICE : NOT_INITIALIZED;
  if (refuses("context")) return OUT_OF_MEMORY;
  return retained++, *context = &started, CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRelease(CUdevice device) {
  if (device || !retained) return device ? INVALID_DEVICE : INVALID_CONTEXT;
  return retained--, CUDA_SUCCESS;
}
CUresult cuCtxSetCurrent(CUcontext context) {
  if (!started || (context && context != &started)) return started ? INVALID_CONTEXT : NOT_INITIALIZED;
  return current = context, CUDA_SUCCESS;
}
CUresult cuMemGetInfo_v2(size_t *available, size_t *total) {
  IN_CONTEXT;
  return *total = memory(), *available = memory() - used, CUDA_SUCCESS;
}
CUresult cuMemAlloc_v2(CUdeviceptr *at, size_t bytes) {
  void *out = NULL;
  NOT_WHILE_CAPTURING;
  CUresult code = take(&out, bytes, 0, 0);
  return *at = (CUdeviceptr)(uintptr_t)out, code;
}
CUresult cuMemFree_v2(CUdeviceptr at) {
  NOT_WHILE_CAPTURING;
  region *r = find(at, 1);
  CUresult code = finish_all();
  return code ? code : r ? give((void *)(uintptr_t)at, r->managed, r->managed) : INVALID_VALUE;
}
CUresult cuMemHostAlloc(void **at, size_t bytes, unsigned flags) {
  NOT_WHILE_CAPTURING;
  return flags & ~7u ? INVALID_VALUE : take(at, bytes, 1, 0);
}
CUresult cuMemFreeHost(void *at) {
  NOT_WHILE_CAPTURING;
  CUresult code = finish_all();
  return code ? code : give(at, 1, 0);
}
CUresult cuMemAllocManaged(CUdeviceptr *at, size_t bytes, unsigned flags) {
  void *out = NULL;
  NOT_WHILE_CAPTURING;
  if (flags != ATTACH_GLOBAL) return INVALID_VALUE;
  CUresult code = take(&out, bytes, 1, 1);
  return *at = (CUdeviceptr)(uintptr_t)out, code;
}
static CUresult copy(CUstream s, CUdeviceptr to, int to_host, CUdeviceptr from, int from_host, size_t bytes) {
  region *a = find(to, bytes), *b = find(from, bytes);
  if (!bytes) return CUDA_SUCCESS;
  if (!a || !b || a->host != to_host || b->host != from_host) return INVALID_VALUE;
  return add(s, (work){.kind = COPY, .to = (void *)(uintptr_t)to, .from = (void *)(uintptr_t)from, .bytes = bytes});
}
CUresult cuMemsetD8Async(CUdeviceptr at, unsigned char value, size_t bytes, CUstream s) {
  ON(s);
  if (!find(at, bytes)) return INVALID_VALUE;
  return add(s, (work){.kind = SET, .to = (void *)(uintptr_t)at, .bytes = bytes, .value = value});
}
CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void *from, size_t bytes, CUstream s) {
  ON(s);
  counts.copies_in++, counts.bytes_in += (long)bytes;
  return copy(s, to, 0, (CUdeviceptr)(uintptr_t)from, 1, bytes);
}
CUresult cuMemcpyDtoHAsync_v2(void *to, CUdeviceptr from, size_t bytes, CUstream s) {
  ON(s);
  counts.copies_out++;
  return copy(s, (CUdeviceptr)(uintptr_t)to, 1, from, 0, bytes);
}
CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream s) {
  ON(s);
  if (to < from + bytes && from < to + bytes) return INVALID_VALUE;
  return copy(s, to, 0, from, 0, bytes);
}

/* ---- device code ---- */

/* PTX may be for this GPU or an older one, and of a version that the driver reads; machine code must be for this GPU. */
static CUresult check_image(const void *image, char *log, size_t room) {
  if (refuses("code memory")) return OUT_OF_MEMORY;
  if (!memcmp(image, "\177ELF", 4)) { /* e_flags: the architecture, as cuobjdump reads it */
    return refuses("cubin") || ((const unsigned char *)image)[48] != arch() ? NO_BINARY_FOR_GPU : CUDA_SUCCESS;
  }
  const char *version = strstr(image, "\n.version "), *target = strstr(image, "\n.target sm_");
  if (!version || !target) return INVALID_IMAGE;
  char *point = NULL;
  int major = (int)strtol(version + 10, &point, 10), minor = (int)strtol(point + 1, NULL, 10);
  if (10 * major + minor > ptx_version_of(driver_version())) return UNSUPPORTED_PTX_VERSION;
  if (refuses("ptx") || atoi(target + 12) > arch()) {
    if (log) snprintf(log, room, "ptxas fatal   : SM version of the mock's refusal\n");
    return INVALID_PTX;
  }
  counts.ptx++;
  return CUDA_SUCCESS;
}

static CUresult find_emulation(emulation *out) {
  const char *path = getenv("QUERN_MOCK_KERNELS");
  void *kernels = path ? dlopen(path, RTLD_NOW | RTLD_LOCAL) : NULL;
  if (path && !kernels) return fprintf(stderr, "mock GPU: %s\n", dlerror()), NOT_FOUND;
  if (!kernels) return CUDA_SUCCESS;
  *(void **)&out->launch = dlsym(kernels, "quern_launch");
  *(void **)&out->message = dlsym(kernels, "quern_message");
  *(void **)&out->set_regions = dlsym(kernels, "quern_regions");
  return CUDA_SUCCESS;
}

CUresult cuModuleLoadDataEx(CUmodule *out, const void *image, unsigned n, int *options, void **values) {
  char *log = NULL;
  size_t room = 0;
  emulation emulated = {0};
  NOT_WHILE_CAPTURING;
  for (unsigned i = 0; i < n; i++) {
    if (options[i] == JIT_ERROR_LOG) log = values[i];
    else if (options[i] == JIT_ERROR_LOG_BYTES) room = (size_t)(uintptr_t)values[i];
    else return INVALID_VALUE;
  }
  *out = NULL;
  CUresult code = check_image(image, log, room);
  if (!code) code = find_emulation(&emulated);
  if (code) return code;
  module *made = keep(sizeof *made, MODULE);
  made->facts = memcmp(image, "\177ELF", 4) ? read_ptx(image) : read_machine_code(image);
  made->functions = calloc(made->facts.count + 1, sizeof *made->functions);
  for (size_t i = 0; i < made->facts.count; i++)
    made->functions[i] = (function){.facts = &made->facts.kernels[i], .emulated = emulated};
  loaded = 1;
  return *out = made, CUDA_SUCCESS;
}
CUresult cuModuleUnload(CUmodule handle) {
  module *m = handle;
  NOT_WHILE_CAPTURING;
  if (!alive(m, MODULE)) return INVALID_HANDLE;
  CUresult code = finish_all();
  free(m->facts.kernels), free(m->functions), forget(m);
  return code;
}
CUresult cuModuleGetFunction(CUfunction *out, CUmodule handle, const char *name) {
  module *m = handle;
  IN_CONTEXT;
  if (!alive(m, MODULE)) return INVALID_HANDLE;
  for (size_t i = 0; i < m->facts.count; i++)
    if (!strcmp(m->facts.kernels[i].name, name)) return *out = &m->functions[i], CUDA_SUCCESS;
  return NOT_FOUND;
}

static function *function_of(CUfunction f) {
  for (int i = 0; i < handle_count; i++) {
    module *m = handles[i].at;
    if (handles[i].of == MODULE && (function *)f >= m->functions && (function *)f < m->functions + m->facts.count)
      return f;
  }
  return NULL;
}
/* Registers are given to a warp eight a thread at a time. */
static unsigned most_threads(const kernel_facts *facts) {
  unsigned most = facts->bound ? facts->bound : 1024, each = (facts->registers + 7) / 8 * 8;
  if (refuses("threads")) return WARP;
  unsigned room = each ? registers_of_block(arch()) / (each * WARP) * WARP : most;
  return room < most ? room : most;
}
CUresult cuFuncGetAttribute(int *value, int attribute, CUfunction handle) {
  function *f = function_of(handle);
  IN_CONTEXT;
  if (!f) return INVALID_HANDLE;
  if (attribute == FUNCTION_MAX_THREADS) return *value = (int)most_threads(f->facts), CUDA_SUCCESS;
  if (attribute == FUNCTION_STATIC_SHARED) return *value = (int)f->facts->static_shared, CUDA_SUCCESS;
  return INVALID_VALUE;
}
CUresult cuFuncSetAttribute(CUfunction handle, int attribute, int value) {
  function *f = function_of(handle);
  IN_CONTEXT;
  if (!f) return INVALID_HANDLE;
  if (attribute != FUNCTION_MAX_DYNAMIC_SHARED || value < 0 || value + f->facts->static_shared > most_shared(arch()))
    return INVALID_VALUE;
  return f->granted = (unsigned)value, CUDA_SUCCESS;
}
CUresult cuLaunchKernel(CUfunction handle, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                        unsigned shared, CUstream s, void **arguments, void **extra) {
  function *f = function_of(handle);
  ON(s);
  if (!f) return INVALID_HANDLE;
  uint64_t threads = (uint64_t)bx * by * bz;
  if (!gx || !gy || !gz || !threads || gx > 0x7fffffff || gy > 65535 || gz > 65535 || bx > 1024 || by > 1024 || bz > 64 ||
      extra || f->facts->parameters > MAX_PARAMETERS)
    return INVALID_VALUE;
  if (threads > 1024 || (f->facts->bound && threads > f->facts->bound)) return INVALID_VALUE;
  if (threads > most_threads(f->facts)) return LAUNCH_OUT_OF_RESOURCES;
  if (shared > f->granted && shared + f->facts->static_shared > UNASKED_SHARED) return INVALID_VALUE;
  stream *in = s;
  if (in->capturing && !f->launched) return in->spoilt = 1, STREAM_CAPTURE_UNSUPPORTED; /* loaded lazily, which waits */
  f->launched |= !in->capturing;
  work item = {.kind = LAUNCH, .f = f, .grid = {gx, gy, gz}, .block = {bx, by, bz}, .shared = shared};
  for (unsigned i = 0; i < f->facts->parameters; i++) memcpy(&item.values[i], arguments[i], sizeof item.values[i]);
  return add(s, item);
}

/* ---- streams and events ---- */

CUresult cuStreamCreate(CUstream *out, unsigned flags) {
  NOT_WHILE_CAPTURING;
  return flags > 1 ? INVALID_VALUE : (*out = keep(sizeof(stream), STREAM), CUDA_SUCCESS);
}
CUresult cuStreamSynchronize(CUstream s) {
  ON(s);
  counts.syncs++;
  if (((stream *)s)->capturing) return ((stream *)s)->spoilt = 1, STREAM_CAPTURE_UNSUPPORTED;
  return finish(s);
}
CUresult cuStreamDestroy_v2(CUstream s) {
  ON(s);
  CUresult code = finish(s);
  free(((stream *)s)->pending.items), forget(s);
  return code;
}
CUresult cuEventCreate(CUevent *out, unsigned flags) {
  NOT_WHILE_CAPTURING;
  return flags & ~7u ? INVALID_VALUE : (*out = keep(sizeof(event), EVENT), CUDA_SUCCESS);
}
CUresult cuEventRecord(CUevent handle, CUstream s) {
  event *e = handle;
  ON(s);
  if (!alive(e, EVENT)) return INVALID_HANDLE;
  e->captured = ((stream *)s)->capturing, e->in = s, e->recorded = 1, e->waiting += !e->captured;
  return add(s, (work){.kind = RECORD, .to = e});
}
CUresult cuEventSynchronize(CUevent handle) {
  event *e = handle;
  NOT_WHILE_CAPTURING;
  if (!alive(e, EVENT)) return INVALID_HANDLE;
  counts.syncs++;
  if (e->captured) return CAPTURED_EVENT;
  return e->waiting ? finish(e->in) : CUDA_SUCCESS;
}
CUresult cuEventElapsedTime(float *milliseconds, CUevent from, CUevent to) {
  event *a = from, *b = to;
  IN_CONTEXT;
  if (!alive(a, EVENT) || !alive(b, EVENT) || !a->recorded || !b->recorded) return INVALID_HANDLE;
  if (a->captured || b->captured) return CAPTURED_EVENT;
  if (a->waiting || b->waiting) return NOT_READY;
  return *milliseconds = (float)(b->at - a->at), CUDA_SUCCESS;
}
CUresult cuEventDestroy_v2(CUevent handle) {
  event *e = handle;
  IN_CONTEXT;
  if (!alive(e, EVENT)) return INVALID_HANDLE;
  CUresult code = e->waiting ? finish(e->in) : CUDA_SUCCESS;
  return forget(e), code;
}

/* ---- graphs ---- */

#ifndef WITHOUT_GRAPHS
CUresult cuStreamBeginCapture_v2(CUstream handle, int mode) {
  stream *s = handle;
  ON(s);
  if (mode < 0 || mode > 2) return INVALID_VALUE;
  if (refuses("capture") || s->capturing) return STREAM_CAPTURE_UNSUPPORTED;
  s->capturing = 1, s->spoilt = 0, s->captured = (queue){0};
  return CUDA_SUCCESS;
}
CUresult cuStreamEndCapture(CUstream handle, CUgraph *out) {
  stream *s = handle;
  ON(s);
  if (!s->capturing) return INVALID_VALUE;
  int spoilt = s->spoilt;
  s->capturing = s->spoilt = 0;
  if (spoilt) return free(s->captured.items), *out = NULL, STREAM_CAPTURE_INVALIDATED;
  graph *made = keep(sizeof *made, GRAPH);
  made->work = s->captured, counts.captures++;
  return *out = made, CUDA_SUCCESS;
}
CUresult cuGraphInstantiate(CUgraphExec *out, CUgraph handle, void **node, char *log, size_t bytes) {
  graph *from = handle;
  IN_CONTEXT;
  if (!alive(from, GRAPH)) return INVALID_HANDLE;
  if (node || log || bytes) return INVALID_VALUE; /* as one of CUDA 12 might read it: flags that it does not know */
  graph *made = keep(sizeof *made, GRAPH_EXEC);
  for (size_t i = 0; i < from->work.count; i++) put(&made->work, from->work.items[i]);
  return *out = made, CUDA_SUCCESS;
}
CUresult cuGraphLaunch(CUgraphExec handle, CUstream s) {
  graph *made = handle;
  ON(s);
  if (!alive(made, GRAPH_EXEC)) return INVALID_HANDLE;
  if (refuses("replay")) return OUT_OF_MEMORY;
  counts.graph_launches++;
  for (size_t i = 0; i < made->work.count; i++) add(s, made->work.items[i]);
  return CUDA_SUCCESS;
}
static CUresult drop(graph *g, kind of) {
  IN_CONTEXT;
  if (!alive(g, of)) return INVALID_HANDLE;
  free(g->work.items), forget(g);
  return CUDA_SUCCESS;
}
CUresult cuGraphExecDestroy(CUgraphExec g) { return drop(g, GRAPH_EXEC); }
CUresult cuGraphDestroy(CUgraph g) { return drop(g, GRAPH); }
#endif
