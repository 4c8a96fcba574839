/* A libcuda.so.1 without a GPU: memory is the host's, kernels are those of tests/emulator/cuda, streams are queues.
 *
 * Work waits in the queue until somebody synchronises, so that a copy out of memory that was given another content too
 * early shows. It has the entry points that compiler/codegen/cuda/driver.h lists and no other. Environment:
 *   QUERN_MOCK_ARCH, _DRIVER    90, 12040                  QUERN_MOCK_MEMORY        bytes of GPU memory
 *   QUERN_MOCK_INTEGRATED       1 for a board              QUERN_MOCK_KERNELS       the emulated kernels, a library
 *   QUERN_MOCK_REFUSE           "init", "cubin", "ptx", "capture" or "launch"
 *   QUERN_MOCK_COUNTS           file that gets one JSON object when a process ends that loaded kernels
 * Not as a driver does it: arguments of a launch are read when it runs; our launches keep theirs for good.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "driver.h"

enum {
  INVALID_VALUE = 1, NOT_INITIALIZED = 3, NO_DEVICE = 100, INVALID_IMAGE = 200, NO_BINARY = 209, INVALID_PTX = 218,
  NOT_FOUND = 500, LAUNCH_FAILED = 719, CAPTURE_UNSUPPORTED = 900,
};
enum { MAX_REGIONS = 1024, POISON = 0xA5 };

typedef struct { void *start; uint64_t bytes; int host, managed; } region;
typedef struct { char name[256]; } function;
typedef struct { double at; } event;
typedef struct {
  enum { COPY, SET, LAUNCH, RECORD } kind;
  void *to; const void *from; size_t bytes; int value;
  function *f; unsigned grid[3], block[3], shared; void **arguments;
} work;
typedef struct { work *items; size_t count, room; } queue;

static region regions[MAX_REGIONS];
static int region_count, started, loaded, capturing, broken;
static uint64_t used, peak;
static queue pending, captured;
static void *kernels;
static int (*launch)(const char *, const unsigned *, const unsigned *, unsigned, void **);
static const char *(*message)(void);
static void (*set_regions)(const void *, int);
static struct { long launches, graph_launches, captures, graphs, copies_in, copies_out, bytes_in, syncs, modules, ptx; } counts;

static const char *setting(const char *name, const char *otherwise) {
  const char *value = getenv(name);
  return value && *value ? value : otherwise;
}
static int refuses(const char *what) { return !strcmp(setting("QUERN_MOCK_REFUSE", ""), what); }
static int arch(void) { return atoi(setting("QUERN_MOCK_ARCH", "90")); }
static uint64_t memory(void) { return strtoull(setting("QUERN_MOCK_MEMORY", "8589934592"), NULL, 10); }

__attribute__((destructor)) static void report(void) {
  const char *path = getenv("QUERN_MOCK_COUNTS");
  FILE *out = path && loaded ? fopen(path, "w") : NULL;
  if (!out) return;
  int left = 0, host_left = 0;
  for (int i = 0; i < region_count; i++) left += !regions[i].host, host_left += regions[i].host;
  fprintf(out,
          "{\"launches\": %ld, \"graph_launches\": %ld, \"captures\": %ld, \"graphs_alive\": %ld, \"copies_in\": %ld, "
          "\"copies_out\": %ld, \"bytes_in\": %ld, \"syncs\": %ld, \"modules_alive\": %ld, \"ptx\": %ld, "
          "\"peak_bytes\": %llu, \"left\": %d, \"host_left\": %d}\n",
          counts.launches, counts.graph_launches, counts.captures, counts.graphs, counts.copies_in, counts.copies_out,
          counts.bytes_in, counts.syncs, counts.modules, counts.ptx, (unsigned long long)peak, left, host_left);
  fclose(out);
}

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1e3 + t.tv_nsec / 1e6;
}

static region *find(uint64_t at, uint64_t bytes) {
  for (int i = 0; i < region_count; i++) {
    uint64_t start = (uint64_t)(uintptr_t)regions[i].start;
    if (start <= at && at + bytes <= start + regions[i].bytes) return &regions[i];
  }
  return NULL;
}

static void tell_regions(void) {
  struct { void *start; uint64_t bytes; } known[MAX_REGIONS];
  int count = 0;
  for (int i = 0; i < region_count; i++)
    if (!regions[i].host) known[count].start = regions[i].start, known[count++].bytes = regions[i].bytes;
  if (set_regions) set_regions(known, count);
}

static CUresult take(void **out, size_t bytes, int host, int managed) {
  if (!started) return NOT_INITIALIZED;
  if (!bytes) return INVALID_VALUE;
  if (!host && used + bytes > memory()) return CUDA_ERROR_OUT_OF_MEMORY;
  if (region_count == MAX_REGIONS || posix_memalign(out, 256, bytes)) return CUDA_ERROR_OUT_OF_MEMORY;
  memset(*out, POISON, bytes);
  regions[region_count++] = (region){*out, bytes, host, managed};
  if (!host) used += bytes, peak = used > peak ? used : peak;
  tell_regions();
  return CUDA_SUCCESS;
}

static CUresult give(void *at, int host) {
  for (int i = 0; i < region_count; i++)
    if (regions[i].start == at && regions[i].host == host) {
      if (!host) used -= regions[i].bytes;
      free(at);
      regions[i] = regions[--region_count];
      tell_regions();
      return CUDA_SUCCESS;
    }
  return INVALID_VALUE;
}

static CUresult add(work item) {
  queue *q = capturing ? &captured : &pending;
  if (q->count == q->room) q->items = realloc(q->items, (q->room = 2 * q->room + 64) * sizeof *q->items);
  q->items[q->count++] = item;
  return CUDA_SUCCESS;
}

static void run(const work *w) {
  if (w->kind == COPY) memcpy(w->to, w->from, w->bytes);
  if (w->kind == SET) memset(w->to, w->value, w->bytes);
  if (w->kind == RECORD) ((event *)w->to)->at = now();
  if (w->kind != LAUNCH || broken) return;
  counts.launches++, broken = refuses("launch");
  if (kernels && launch(w->f->name, w->grid, w->block, w->shared, w->arguments)) {
    fprintf(stderr, "mock GPU: %s: %s\n", w->f->name, message());
    broken = 1;
  }
}

static CUresult flush(void) {
  if (capturing) return CAPTURE_UNSUPPORTED;
  counts.syncs++;
  for (size_t i = 0; i < pending.count; i++) run(&pending.items[i]);
  pending.count = 0;
  return broken ? LAUNCH_FAILED : CUDA_SUCCESS;
}

const int quern_emulated = 1; /* runtime/cuda_driver.py: times on this GPU are none */

CUresult cuInit(unsigned flags) {
  (void)flags;
  if (refuses("init")) return NO_DEVICE;
  started = 1;
  return CUDA_SUCCESS;
}
CUresult cuDriverGetVersion(int *version) { return *version = atoi(setting("QUERN_MOCK_DRIVER", "12040")), CUDA_SUCCESS; }
CUresult cuGetErrorName(CUresult code, const char **text) {
  static const struct { int code; const char *name; } names[] = {
      {INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE"}, {CUDA_ERROR_OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY"},
      {NO_DEVICE, "CUDA_ERROR_NO_DEVICE"}, {INVALID_IMAGE, "CUDA_ERROR_INVALID_IMAGE"},
      {NO_BINARY, "CUDA_ERROR_NO_BINARY_FOR_GPU"}, {INVALID_PTX, "CUDA_ERROR_INVALID_PTX"},
      {NOT_FOUND, "CUDA_ERROR_NOT_FOUND"}, {LAUNCH_FAILED, "CUDA_ERROR_LAUNCH_FAILED"},
      {CAPTURE_UNSUPPORTED, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"}};
  for (size_t i = 0; i < sizeof names / sizeof *names; i++)
    if (names[i].code == code) return *text = names[i].name, CUDA_SUCCESS;
  return *text = NULL, INVALID_VALUE;
}
CUresult cuDeviceGetCount(int *count) { return *count = 1, CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) { return *device = 0, ordinal ? INVALID_VALUE : CUDA_SUCCESS; }
CUresult cuDeviceGetName(char *name, int size, CUdevice device) {
  (void)device;
  snprintf(name, (size_t)size, "Mock GPU");
  return CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int *value, int attribute, CUdevice device) {
  (void)device;
  switch (attribute) {
    case ATTRIBUTE_MAJOR: return *value = arch() / 10, CUDA_SUCCESS;
    case ATTRIBUTE_MINOR: return *value = arch() % 10, CUDA_SUCCESS;
    case ATTRIBUTE_MULTIPROCESSORS: return *value = 2, CUDA_SUCCESS;
    case ATTRIBUTE_INTEGRATED: return *value = atoi(setting("QUERN_MOCK_INTEGRATED", "0")), CUDA_SUCCESS;
    default: return INVALID_VALUE;
  }
}
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
  (void)device;
  return *context = &started, started ? CUDA_SUCCESS : NOT_INITIALIZED;
}
CUresult cuDevicePrimaryCtxRelease(CUdevice device) { return (void)device, CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { return context == &started ? CUDA_SUCCESS : INVALID_VALUE; }
CUresult cuMemGetInfo_v2(size_t *available, size_t *total) {
  return *total = memory(), *available = memory() - used, CUDA_SUCCESS;
}
CUresult cuMemAlloc_v2(CUdeviceptr *at, size_t bytes) {
  void *out = NULL;
  CUresult code = take(&out, bytes, 0, 0);
  return *at = (CUdeviceptr)(uintptr_t)out, code;
}
CUresult cuMemFree_v2(CUdeviceptr at) {
  region *r = find(at, 1);
  return r ? give((void *)(uintptr_t)at, r->managed) : INVALID_VALUE;
}
CUresult cuMemHostAlloc(void **at, size_t bytes, unsigned flags) { return (void)flags, take(at, bytes, 1, 0); }
CUresult cuMemFreeHost(void *at) { return give(at, 1); }
CUresult cuMemAllocManaged(CUdeviceptr *at, size_t bytes, unsigned flags) {
  void *out = NULL;
  if (flags != ATTACH_GLOBAL) return INVALID_VALUE;
  CUresult code = take(&out, bytes, 1, 1);
  return *at = (CUdeviceptr)(uintptr_t)out, code;
}
static CUresult copy(CUdeviceptr to, int to_host, CUdeviceptr from, int from_host, size_t bytes) {
  region *a = find(to, bytes), *b = find(from, bytes);
  if (!bytes) return CUDA_SUCCESS;
  if (!a || !b || a->host != to_host || b->host != from_host) return INVALID_VALUE;
  return add((work){.kind = COPY, .to = (void *)(uintptr_t)to, .from = (void *)(uintptr_t)from, .bytes = bytes});
}
CUresult cuMemsetD8Async(CUdeviceptr at, unsigned char value, size_t bytes, CUstream stream) {
  (void)stream;
  if (!find(at, bytes)) return INVALID_VALUE;
  return add((work){.kind = SET, .to = (void *)(uintptr_t)at, .bytes = bytes, .value = value});
}
CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void *from, size_t bytes, CUstream stream) {
  (void)stream;
  counts.copies_in++, counts.bytes_in += (long)bytes;
  return copy(to, 0, (CUdeviceptr)(uintptr_t)from, 1, bytes);
}
CUresult cuMemcpyDtoHAsync_v2(void *to, CUdeviceptr from, size_t bytes, CUstream stream) {
  (void)stream;
  counts.copies_out++;
  return copy((CUdeviceptr)(uintptr_t)to, 1, from, 0, bytes);
}
CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream) {
  (void)stream;
  if (to < from + bytes && from < to + bytes) return INVALID_VALUE;
  return copy(to, 0, from, 0, bytes);
}

/* PTX may be for this GPU or an older one; machine code must be for it. The reason goes into the log, if there is one. */
CUresult cuModuleLoadDataEx(CUmodule *module, const void *image, unsigned n, int *options, void **values) {
  char *log = NULL;
  size_t room = 0;
  for (unsigned i = 0; i < n; i++) {
    if (options[i] == JIT_ERROR_LOG) log = values[i];
    if (options[i] == JIT_ERROR_LOG_BYTES) room = (size_t)(uintptr_t)values[i];
  }
  *module = NULL;
  if (!memcmp(image, "\177ELF", 4)) {
    int made_for = ((const unsigned char *)image)[48]; /* e_flags: the architecture, as cuobjdump reads it */
    if (refuses("cubin") || made_for != arch()) return NO_BINARY;
  } else {
    const char *target = strstr(image, "\n.target sm_");
    if (refuses("ptx") || !target || atoi(target + 12) > arch()) {
      if (log) snprintf(log, room, "ptxas fatal   : SM version of the mock's refusal\n");
      return INVALID_PTX;
    }
    counts.ptx++;
  }
  const char *path = getenv("QUERN_MOCK_KERNELS");
  if (path && !kernels) {
    kernels = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!kernels) return fprintf(stderr, "mock GPU: %s\n", dlerror()), NOT_FOUND;
    *(void **)&launch = dlsym(kernels, "quern_launch");
    *(void **)&message = dlsym(kernels, "quern_message");
    *(void **)&set_regions = dlsym(kernels, "quern_regions");
    tell_regions();
  }
  counts.modules++, loaded = 1;
  return *module = &counts, CUDA_SUCCESS;
}
CUresult cuModuleUnload(CUmodule module) { return counts.modules--, module == &counts ? CUDA_SUCCESS : INVALID_VALUE; }
CUresult cuModuleGetFunction(CUfunction *out, CUmodule module, const char *name) {
  function *made = calloc(1, sizeof *made);
  if (module != &counts) return INVALID_VALUE;
  snprintf(made->name, sizeof made->name, "%s", name);
  return *out = made, CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction f, int attribute, int value) {
  (void)f;
  return attribute == FUNCTION_MAX_DYNAMIC_SHARED && value <= 227 << 10 ? CUDA_SUCCESS : INVALID_VALUE;
}
CUresult cuLaunchKernel(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                        unsigned shared, CUstream stream, void **arguments, void **extra) {
  (void)stream;
  if (!f || !gx || !gy || !gz || !(bx * by * bz) || bx * by * bz > 1024 || gy > 65535 || gz > 65535 || bz > 64 || extra)
    return INVALID_VALUE;
  return add((work){.kind = LAUNCH, .f = f, .grid = {gx, gy, gz}, .block = {bx, by, bz}, .shared = shared,
                    .arguments = arguments});
}
CUresult cuStreamCreate(CUstream *stream, unsigned flags) { return (void)flags, *stream = &pending, CUDA_SUCCESS; }
CUresult cuStreamSynchronize(CUstream stream) { return (void)stream, flush(); }
CUresult cuStreamDestroy_v2(CUstream stream) { return stream == &pending ? CUDA_SUCCESS : INVALID_VALUE; }
CUresult cuEventCreate(CUevent *out, unsigned flags) { return (void)flags, *out = calloc(1, sizeof(event)), CUDA_SUCCESS; }
CUresult cuEventRecord(CUevent e, CUstream stream) { return (void)stream, add((work){.kind = RECORD, .to = e}); }
CUresult cuEventSynchronize(CUevent e) { return (void)e, flush(); }
CUresult cuEventElapsedTime(float *milliseconds, CUevent from, CUevent to) {
  return *milliseconds = (float)(((event *)to)->at - ((event *)from)->at), CUDA_SUCCESS;
}
CUresult cuEventDestroy_v2(CUevent e) { return free(e), CUDA_SUCCESS; }

#ifndef WITHOUT_GRAPHS
typedef struct { queue work; } graph;
CUresult cuStreamBeginCapture_v2(CUstream stream, int mode) {
  (void)stream, (void)mode;
  if (refuses("capture") || capturing) return CAPTURE_UNSUPPORTED;
  capturing = 1, captured = (queue){0};
  return CUDA_SUCCESS;
}
CUresult cuStreamEndCapture(CUstream stream, CUgraph *out) {
  (void)stream;
  graph *made = calloc(1, sizeof *made);
  made->work = captured, captured = (queue){0}, capturing = 0, counts.captures++;
  return *out = made, CUDA_SUCCESS;
}
CUresult cuGraphInstantiate(CUgraphExec *out, CUgraph g, void **node, char *log, size_t bytes) {
  (void)node, (void)log, (void)bytes;
  graph *made = calloc(1, sizeof *made), *from = g;
  made->work.items = malloc((from->work.count + 1) * sizeof(work)), made->work.count = from->work.count;
  memcpy(made->work.items, from->work.items, from->work.count * sizeof(work));
  counts.graphs++;
  return *out = made, CUDA_SUCCESS;
}
CUresult cuGraphLaunch(CUgraphExec g, CUstream stream) {
  (void)stream;
  graph *made = g;
  counts.graph_launches++;
  for (size_t i = 0; i < made->work.count; i++) add(made->work.items[i]);
  return CUDA_SUCCESS;
}
static CUresult drop(graph *g) { return free(g->work.items), free(g), CUDA_SUCCESS; }
CUresult cuGraphExecDestroy(CUgraphExec g) { return counts.graphs--, drop(g); }
CUresult cuGraphDestroy(CUgraph g) { return drop(g); }
#endif
