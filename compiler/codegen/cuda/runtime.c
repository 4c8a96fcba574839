/* The host side of a CUDA bundle: opens a GPU, puts the weights there, walks the launch tables that the compiler wrote.
 *
 * Plain C on the driver API, found by dlopen: no CUDA runtime, no C++ library, nothing that a JetPack need not have.
 * One model, one stream, one thread. A function that fails gives a code of model.h and leaves its text in quern_error().
 */
#include <dlfcn.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "driver.h"
#include "model.h"

enum { STAGING_BYTES = 8 << 20, STAGES = 2, LOG_BYTES = 8 << 10, COHERENT_SM = 72, UNWRITTEN = 77 };

struct quern {
  driver cu;
  void *library;
  CUdevice device;
  CUcontext context;
  CUstream stream;
  CUevent began, ended, staged[STAGES];
  void *staging[STAGES];
  unsigned uploads;
  CUmodule module;
  CUfunction *functions;  /* by kernel */
  CUdeviceptr weights, caches, arena;
  uint32_t sets;          /* how often all parameters are there: 1, but for measuring */
  CUdeviceptr *parameters; /* by set and number */
  CUdeviceptr *values;    /* by set and place: what kernels get */
  void **arguments;       /* by set and place: where in `values` it is */
  CUgraphExec *graphs;    /* by function; NULL until its second call */
  unsigned *calls;        /* by function */
  int options, sm, retained, timed;
  quern_info info;
};

static char error_text[LOG_BYTES + 1024];

static int32_t fail(int32_t code, const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(error_text, sizeof error_text, format, arguments);
  va_end(arguments);
  return code;
}

static const char *name_of(quern *model, CUresult code) {
  const char *text = NULL;
  model->cu.cuGetErrorName(code, &text);
  return text ? text : "an error it has no name for";
}

static int32_t failed(quern *model, const char *call, CUresult code) {
  return fail(QUERN_FAILED, "%s failed: %s (%d)", call, name_of(model, code), code);
}

/* Return from the function around it when the driver does not say CUDA_SUCCESS. */
#define TRY(model, name, ...)                                         \
  do {                                                                \
    CUresult tried_ = (model)->cu.name(__VA_ARGS__);                  \
    if (tried_ != CUDA_SUCCESS) return failed(model, #name, tried_);  \
  } while (0)

int32_t quern_abi(void) { return QUERN_ABI; }

const char *quern_error(void) { return error_text; }

const char *quern_parameter(int32_t index) {
  return index >= 0 && (uint32_t)index < quern_this.parameters ? quern_parameters[index] : NULL;
}

int32_t quern_function_index(const char *name) {
  for (uint32_t i = 0; i < quern_this.functions; i++)
    if (!strcmp(quern_functions[i].name, name)) return (int32_t)i;
  return -1;
}

/* ---- opening ---- */

static int32_t find_driver(quern *model, const char *libcuda) {
  model->library = dlopen(libcuda, RTLD_NOW | RTLD_LOCAL);
  if (!model->library) return fail(QUERN_NO_DRIVER, "the NVIDIA driver is not there: %s", dlerror());
#define REQUIRED(name, since, arguments)                                                                          \
  if (!(*(void **)&model->cu.name = dlsym(model->library, #name)))                                                \
    return fail(QUERN_OLD_DRIVER, "%s has no " #name ", which CUDA %d.%d brought", libcuda, since / 1000,         \
                since % 1000 / 10);
#define OPTIONAL(name, since, arguments) *(void **)&model->cu.name = dlsym(model->library, #name);
  DRIVER(REQUIRED, OPTIONAL)
#undef REQUIRED
#undef OPTIONAL
  return QUERN_OK;
}

static int has_graphs(const driver *cu) {
  return cu->cuStreamBeginCapture_v2 && cu->cuStreamEndCapture && cu->cuGraphInstantiate && cu->cuGraphLaunch &&
         cu->cuGraphExecDestroy && cu->cuGraphDestroy;
}

static int32_t find_device(quern *model, int32_t ordinal) {
  CUresult code = model->cu.cuInit(0);
  if (code != CUDA_SUCCESS)
    return fail(QUERN_NO_DRIVER, "the NVIDIA driver does not start: %s (%d)", name_of(model, code), code);
  int count = 0;
  quern_info *info = &model->info;
  TRY(model, cuDriverGetVersion, &info->driver);
  TRY(model, cuDeviceGetCount, &count);
  if (ordinal < 0 || ordinal >= count)
    return fail(QUERN_NO_DRIVER, "the driver shows %d GPUs, so there is no number %d", count, ordinal);
  TRY(model, cuDeviceGet, &model->device, ordinal);
  TRY(model, cuDeviceGetName, info->name, sizeof info->name, model->device);
  TRY(model, cuDeviceGetAttribute, &info->major, ATTRIBUTE_MAJOR, model->device);
  TRY(model, cuDeviceGetAttribute, &info->minor, ATTRIBUTE_MINOR, model->device);
  TRY(model, cuDeviceGetAttribute, &info->multiprocessors, ATTRIBUTE_MULTIPROCESSORS, model->device);
  TRY(model, cuDeviceGetAttribute, &info->integrated, ATTRIBUTE_INTEGRATED, model->device);
  model->sm = 10 * info->major + info->minor;
  if (model->sm < (int)quern_this.arch)
    return fail(QUERN_WRONG_DEVICE, "the code is for sm_%u and later, but %s is sm_%d", quern_this.arch, info->name,
                model->sm);
  if (info->driver < (int)quern_this.driver)
    return fail(QUERN_OLD_DRIVER, "the driver is of CUDA %d.%d, but the code needs %u.%u", info->driver / 1000,
                info->driver % 1000 / 10, quern_this.driver / 1000, quern_this.driver % 1000 / 10);
  return QUERN_OK;
}

static int32_t start(quern *model) {
  TRY(model, cuDevicePrimaryCtxRetain, &model->context, model->device);
  model->retained = 1;
  TRY(model, cuCtxSetCurrent, model->context);
  TRY(model, cuStreamCreate, &model->stream, STREAM_NON_BLOCKING); /* the default stream cannot be captured */
  TRY(model, cuEventCreate, &model->began, EVENT_DEFAULT);
  TRY(model, cuEventCreate, &model->ended, EVENT_DEFAULT);
  model->info.cubin = -1;
  model->info.graphs = (model->options & QUERN_GRAPHS) && has_graphs(&model->cu);
  if ((model->options & QUERN_GRAPHS) && !model->info.graphs)
    snprintf(model->info.note, sizeof model->info.note, "the driver has no CUDA graphs");
  return QUERN_OK;
}

int32_t quern_open(const char *libcuda, int32_t ordinal, int32_t options, quern **out) {
  quern *model = calloc(1, sizeof *model);
  *out = NULL;
  if (!model) return fail(QUERN_NO_MEMORY, "out of host memory");
  model->options = options;
  int32_t code = find_driver(model, libcuda);
  if (!code) code = find_device(model, ordinal);
  if (!code) code = start(model);
  if (code)
    quern_close(model);
  else
    *out = model;
  return code;
}

int32_t quern_describe(quern *model, quern_info *out) {
  size_t available = 0, total = 0;
  TRY(model, cuCtxSetCurrent, model->context);
  TRY(model, cuMemGetInfo_v2, &available, &total);
  model->info.free_bytes = available;
  model->info.total_bytes = total;
  *out = model->info;
  return QUERN_OK;
}

/* ---- memory ---- */

static int32_t allocate(quern *model, const char *what, uint64_t bytes, CUdeviceptr *out) {
  CUresult code = model->cu.cuMemAlloc_v2(out, bytes ? bytes : 1);
  if (code != CUDA_ERROR_OUT_OF_MEMORY) return code == CUDA_SUCCESS ? QUERN_OK : failed(model, "cuMemAlloc", code);
  size_t available = 0, total = 0;
  model->cu.cuMemGetInfo_v2(&available, &total);
  return fail(QUERN_NO_MEMORY, "%s need %llu MiB of GPU memory, but %s has %llu MiB free of %llu MiB", what,
              (unsigned long long)((bytes + (1 << 20) - 1) >> 20), model->info.name,
              (unsigned long long)(available >> 20), (unsigned long long)(total >> 20));
}

/* offsets: of every parameter, bytes into the weights, or with QUERN_PARAMETER set into the caches. */
int32_t quern_memory(quern *model, uint64_t weights_bytes, uint64_t caches_bytes, const uint64_t *offsets) {
  int32_t code = QUERN_OK;
  TRY(model, cuCtxSetCurrent, model->context);
  if (!code) code = allocate(model, "the weights", weights_bytes, &model->weights);
  if (!code) code = allocate(model, "the caches", caches_bytes, &model->caches);
  if (!code) code = allocate(model, "the activations", quern_this.arena_bytes, &model->arena);
  if (code) return code;
  TRY(model, cuMemsetD8Async, model->caches, 0, caches_bytes ? caches_bytes : 1, model->stream);
  TRY(model, cuMemsetD8Async, model->arena, 0, quern_this.arena_bytes, model->stream);
  model->sets = 1;
  model->parameters = calloc(quern_this.parameters + 1, sizeof *model->parameters);
  if (!model->parameters) return fail(QUERN_NO_MEMORY, "out of host memory");
  for (uint32_t i = 0; i < quern_this.parameters; i++)
    model->parameters[i] =
        offsets[i] & QUERN_PARAMETER ? model->caches + (offsets[i] & ~QUERN_PARAMETER) : model->weights + offsets[i];
  return QUERN_OK;
}

/* Measuring, instead of quern_memory: the parameters lie in memory of another model of this process, `sets` times.
 * addresses: [sets][parameters]. What a kernel does not write of its results stays UNWRITTEN. */
int32_t quern_borrow(quern *model, uint32_t sets, const uint64_t *addresses) {
  TRY(model, cuCtxSetCurrent, model->context);
  int32_t code = allocate(model, "the activations", quern_this.arena_bytes, &model->arena);
  if (code) return code;
  TRY(model, cuMemsetD8Async, model->arena, UNWRITTEN, quern_this.arena_bytes, model->stream);
  size_t count = (size_t)sets * quern_this.parameters;
  model->sets = sets;
  model->parameters = calloc(count + 1, sizeof *model->parameters);
  if (!model->parameters) return fail(QUERN_NO_MEMORY, "out of host memory");
  for (size_t i = 0; i < count; i++) model->parameters[i] = addresses[i];
  return QUERN_OK;
}

/* Where the weights begin in GPU memory, for quern_borrow. */
uint64_t quern_weights(quern *model) { return model->weights; }

/* Host memory that the GPU copies from and to by itself.
 *
 * On an integrated GPU before sm_72 the CPU does not cache pinned memory (NVIDIA, "CUDA for Tegra": pinned memory is
 * cached on I/O coherent devices only), and to look through the logits would take longer than to compute them. Managed
 * memory is cached there, and needs nothing more than that the GPU is idle when the CPU reads, which it is after a call.
 */
static int32_t host(quern *model, uint64_t bytes, void **out) {
  CUresult code;
  if (model->info.integrated && model->sm < COHERENT_SM) {
    CUdeviceptr at = 0;
    code = model->cu.cuMemAllocManaged(&at, bytes, ATTACH_GLOBAL);
    *out = (void *)(uintptr_t)at;
  } else {
    code = model->cu.cuMemHostAlloc(out, bytes, HOST_PORTABLE);
  }
  if (code == CUDA_ERROR_OUT_OF_MEMORY)
    return fail(QUERN_NO_MEMORY, "%llu KiB of host memory cannot be pinned", (unsigned long long)(bytes >> 10));
  return code == CUDA_SUCCESS ? QUERN_OK : failed(model, "cuMemHostAlloc", code);
}

int32_t quern_host(quern *model, uint64_t bytes, void **out) {
  TRY(model, cuCtxSetCurrent, model->context);
  TRY(model, cuStreamSynchronize, model->stream);
  return host(model, bytes, out);
}

void quern_host_free(quern *model, void *memory) {
  if (!memory) return;
  model->cu.cuCtxSetCurrent(model->context);
  model->cu.cuStreamSynchronize(model->stream);
  if (model->info.integrated && model->sm < COHERENT_SM)
    model->cu.cuMemFree_v2((CUdeviceptr)(uintptr_t)memory);
  else
    model->cu.cuMemFreeHost(memory);
}

/* A stretch of the weights, through two pinned buffers in turns: reading the file and copying go on at once, and the
 * memory for it stays at 16 MiB, whatever the model's size. */
int32_t quern_upload(quern *model, uint64_t offset, const void *data, uint64_t bytes) {
  TRY(model, cuCtxSetCurrent, model->context);
  for (int i = 0; i < STAGES && !model->staging[i]; i++) {
    int32_t code = host(model, STAGING_BYTES, &model->staging[i]);
    if (code) return code;
    TRY(model, cuEventCreate, &model->staged[i], EVENT_DEFAULT);
  }
  /* Managed staging memory must not be touched while the GPU is busy: there the two buffers do not overlap. */
  int alone = model->info.integrated && model->sm < COHERENT_SM;
  for (uint64_t done = 0; done < bytes;) {
    int i = (int)(model->uploads++ % STAGES);
    uint64_t count = bytes - done < STAGING_BYTES ? bytes - done : STAGING_BYTES;
    if (alone)
      TRY(model, cuStreamSynchronize, model->stream);
    else if (model->uploads > STAGES)
      TRY(model, cuEventSynchronize, model->staged[i]);
    memcpy(model->staging[i], (const char *)data + done, count);
    TRY(model, cuMemcpyHtoDAsync_v2, model->weights + offset + done, model->staging[i], count, model->stream);
    TRY(model, cuEventRecord, model->staged[i], model->stream);
    done += count;
  }
  return QUERN_OK;
}

static int32_t end_uploads(quern *model) {
  TRY(model, cuStreamSynchronize, model->stream);
  for (int i = 0; i < STAGES; i++) {
    quern_host_free(model, model->staging[i]);
    if (model->staged[i]) TRY(model, cuEventDestroy_v2, model->staged[i]);
    model->staging[i] = NULL;
    model->staged[i] = NULL;
  }
  return QUERN_OK;
}

/* ---- device code ---- */

static int32_t load_module(quern *model) {
  quern_info *info = &model->info;
  if (quern_this.cubin_bytes && model->sm == (int)quern_this.arch && !(model->options & QUERN_PTX_ONLY)) {
    CUresult code = model->cu.cuModuleLoadDataEx(&model->module, quern_this.cubin, 0, NULL, NULL);
    if (code == CUDA_SUCCESS) {
      info->cubin = 1;
      return QUERN_OK;
    }
    snprintf(info->note, sizeof info->note, "the driver refused the machine code (%s) and compiled the PTX",
             name_of(model, code));
  }
  char *log = calloc(1, LOG_BYTES);
  if (!log) return fail(QUERN_NO_MEMORY, "out of host memory");
  int options[] = {JIT_ERROR_LOG, JIT_ERROR_LOG_BYTES};
  void *values[] = {log, (void *)(uintptr_t)LOG_BYTES};
  CUresult code = model->cu.cuModuleLoadDataEx(&model->module, quern_this.ptx, 2, options, values);
  int32_t result = QUERN_OK;
  info->cubin = 0;
  log[LOG_BYTES - 1] = 0;
  for (size_t end = strlen(log); end && (log[end - 1] == '\n' || log[end - 1] == ' ');) log[--end] = 0;
  if (code != CUDA_SUCCESS)
    result = fail(QUERN_REFUSED, "%s did not take the code for sm_%u: %s (%d)%s%s", info->name, quern_this.arch,
                  name_of(model, code), code, *log ? ": " : "", log);
  free(log);
  return result;
}

static int32_t find_kernels(quern *model) {
  model->functions = calloc(quern_this.kernels + 1, sizeof *model->functions);
  if (!model->functions) return fail(QUERN_NO_MEMORY, "out of host memory");
  for (uint32_t i = 0; i < quern_this.kernels; i++)
    TRY(model, cuModuleGetFunction, &model->functions[i], model->module, quern_kernel_names[i]);
  for (uint32_t i = 0; i < quern_this.steps; i++) /* every GPU grants 48 KiB unasked */
    if (quern_steps[i].shared > 48 << 10)
      TRY(model, cuFuncSetAttribute, model->functions[quern_steps[i].kernel], FUNCTION_MAX_DYNAMIC_SHARED,
          (int)quern_steps[i].shared);
  return QUERN_OK;
}

int32_t quern_load(quern *model) {
  TRY(model, cuCtxSetCurrent, model->context);
  int32_t code = end_uploads(model);
  if (!code) code = load_module(model);
  if (!code) code = find_kernels(model);
  if (code) return code;
  uint32_t places = quern_this.places, functions = quern_this.functions;
  size_t values = (size_t)model->sets * places;
  model->values = calloc(values + 1, sizeof *model->values);
  model->arguments = calloc(values + 1, sizeof *model->arguments);
  model->graphs = calloc(functions + 1, sizeof *model->graphs);
  model->calls = calloc(functions + 1, sizeof *model->calls);
  if (!model->values || !model->arguments || !model->graphs || !model->calls)
    return fail(QUERN_NO_MEMORY, "out of host memory");
  for (size_t i = 0; i < values; i++) {
    uint64_t place = quern_places[i % places];
    const CUdeviceptr *parameters = model->parameters + i / places * quern_this.parameters;
    model->values[i] = place & QUERN_PARAMETER ? parameters[place & ~QUERN_PARAMETER] : model->arena + place;
    model->arguments[i] = &model->values[i];
  }
  return QUERN_OK;
}

/* ---- running ---- */

static int32_t launch_set(quern *model, const quern_function *function, uint32_t set) {
  void **arguments = model->arguments + (size_t)set * quern_this.places;
  for (uint32_t i = 0; i < function->steps; i++) {
    const quern_step *s = &quern_steps[function->first_step + i];
    CUresult code = model->cu.cuLaunchKernel(model->functions[s->kernel], s->grid[0], s->grid[1], s->grid[2],
                                             s->block[0], s->block[1], s->block[2], s->shared, model->stream,
                                             arguments + s->first_place, NULL);
    if (code != CUDA_SUCCESS)
      return fail(QUERN_FAILED, "launching %s failed: %s (%d)", quern_kernel_names[s->kernel], name_of(model, code),
                  code);
  }
  return QUERN_OK;
}

static int32_t launch_all(quern *model, const quern_function *function) { return launch_set(model, function, 0); }

static void no_graphs(quern *model, const char *call, CUresult code) {
  model->info.graphs = 0;
  snprintf(model->info.note, sizeof model->info.note, "%s failed (%s), so calls are not replayed as graphs", call,
           name_of(model, code));
}

/* The function's launches as a graph, or NULL. Not before its second call: a driver that loads kernels lazily (CUDA
 * 11.7 and later) does that at the first launch, where a capture would not let it. */
static CUgraphExec capture(quern *model, const quern_function *function, int32_t *code) {
  CUgraph graph = NULL;
  CUgraphExec made = NULL;
  CUresult begun = model->cu.cuStreamBeginCapture_v2(model->stream, CAPTURE_THREAD_LOCAL);
  if (begun != CUDA_SUCCESS) {
    no_graphs(model, "cuStreamBeginCapture", begun);
    return NULL;
  }
  *code = launch_all(model, function);
  CUresult ended = model->cu.cuStreamEndCapture(model->stream, &graph);
  if (*code) return NULL;
  if (ended != CUDA_SUCCESS) {
    no_graphs(model, "cuStreamEndCapture", ended);
    return NULL;
  }
  CUresult instantiated = model->cu.cuGraphInstantiate(&made, graph, NULL, NULL, 0);
  model->cu.cuGraphDestroy(graph);
  if (instantiated != CUDA_SUCCESS) {
    no_graphs(model, "cuGraphInstantiate", instantiated);
    return NULL;
  }
  return made;
}

static int32_t launch(quern *model, uint32_t index) {
  const quern_function *function = &quern_functions[index];
  if (!model->info.graphs) return launch_all(model, function);
  if (model->calls[index]++ && !model->graphs[index]) {
    int32_t code = QUERN_OK;
    model->graphs[index] = capture(model, function, &code);
    if (code) return code;
  }
  if (!model->graphs[index]) return launch_all(model, function);
  TRY(model, cuGraphLaunch, model->graphs[index], model->stream);
  return QUERN_OK;
}

/* One call. header: pinned, span i32[2] and from header_ids_at on ids i32[tokens]; NULL for a function of hidden states.
 * result: pinned room for all rows, or NULL to leave them on the GPU. All of it has happened when this returns. */
int32_t quern_run(quern *model, int32_t function, const void *header, uint64_t header_bytes, void *result) {
  if (function < 0 || (uint32_t)function >= quern_this.functions) return fail(QUERN_FAILED, "there is no such function");
  const quern_function *called = &quern_functions[function];
  TRY(model, cuCtxSetCurrent, model->context);
  if (header) TRY(model, cuMemcpyHtoDAsync_v2, model->arena, header, header_bytes, model->stream);
  model->timed = model->options & QUERN_TIMED;
  if (model->timed) TRY(model, cuEventRecord, model->began, model->stream);
  int32_t code = launch(model, (uint32_t)function);
  if (code) return code;
  if (model->timed) TRY(model, cuEventRecord, model->ended, model->stream);
  if (result)
    TRY(model, cuMemcpyDtoHAsync_v2, result, model->arena + called->result_at, called->tokens * called->row_bytes,
        model->stream);
  TRY(model, cuStreamSynchronize, model->stream);
  return QUERN_OK;
}

/* Rows of what `from` left become the first rows of what `to` takes; nothing leaves the GPU. */
int32_t quern_hand_over(quern *model, int32_t from, uint32_t first_row, uint32_t rows, int32_t to) {
  const quern_function *a = &quern_functions[from], *b = &quern_functions[to];
  if (first_row + rows > a->tokens || rows > b->tokens)
    return fail(QUERN_FAILED, "%s has no rows %u to %u for %s", a->name, first_row, first_row + rows, b->name);
  TRY(model, cuCtxSetCurrent, model->context);
  TRY(model, cuMemcpyDtoDAsync_v2, model->arena + b->input_at, model->arena + a->result_at + first_row * a->row_bytes,
      rows * a->row_bytes, model->stream);
  return QUERN_OK;
}

/* Whether calls are replayed as graphs from now on, where the driver can. */
int32_t quern_replay(quern *model, int32_t on) {
  model->info.graphs = on && (model->options & QUERN_GRAPHS) && has_graphs(&model->cu);
  return QUERN_OK;
}

/* Time on the GPU of the last call's kernels; needs QUERN_TIMED. */
int32_t quern_milliseconds(quern *model, float *out) {
  if (!model->timed) return fail(QUERN_FAILED, "the model was not opened with QUERN_TIMED, or has not run");
  TRY(model, cuEventElapsedTime, out, model->began, model->ended);
  return QUERN_OK;
}

/* `calls` calls behind each other, the first with parameters number `set`, the next with the set after it: time on the
 * GPU of all of them, the gaps between them included. */
int32_t quern_measure(quern *model, int32_t function, uint32_t set, uint32_t calls, float *milliseconds) {
  if (function < 0 || (uint32_t)function >= quern_this.functions) return fail(QUERN_FAILED, "there is no such function");
  TRY(model, cuCtxSetCurrent, model->context);
  TRY(model, cuEventRecord, model->began, model->stream);
  for (uint32_t i = 0; i < calls; i++) {
    int32_t code = launch_set(model, &quern_functions[function], (set + i) % model->sets);
    if (code) return code;
  }
  TRY(model, cuEventRecord, model->ended, model->stream);
  TRY(model, cuStreamSynchronize, model->stream);
  TRY(model, cuEventElapsedTime, milliseconds, model->began, model->ended);
  return QUERN_OK;
}

/* The fastest of `repeats` copies of `bytes` bytes from GPU memory to GPU memory: bytes read and bytes written, GB/s. */
int32_t quern_copy_speed(quern *model, uint64_t bytes, int32_t repeats, double *gb_s) {
  CUdeviceptr from = 0, to = 0;
  TRY(model, cuCtxSetCurrent, model->context);
  int32_t code = allocate(model, "the copies", bytes, &from);
  if (!code && (code = allocate(model, "the copies", bytes, &to))) model->cu.cuMemFree_v2(from);
  if (code) return code;
  CUresult went = model->cu.cuMemsetD8Async(from, 1, bytes, model->stream);
  *gb_s = 0;
  for (int32_t i = 0; i <= repeats && went == CUDA_SUCCESS; i++) { /* the first one does not count */
    float milliseconds = 0;
    went = model->cu.cuEventRecord(model->began, model->stream);
    if (went == CUDA_SUCCESS) went = model->cu.cuMemcpyDtoDAsync_v2(to, from, bytes, model->stream);
    if (went == CUDA_SUCCESS) went = model->cu.cuEventRecord(model->ended, model->stream);
    if (went == CUDA_SUCCESS) went = model->cu.cuStreamSynchronize(model->stream);
    if (went == CUDA_SUCCESS) went = model->cu.cuEventElapsedTime(&milliseconds, model->began, model->ended);
    double speed = milliseconds > 0 ? 2.0 * (double)bytes / 1e6 / milliseconds : 0;
    if (i && speed > *gb_s) *gb_s = speed;
  }
  model->cu.cuMemFree_v2(from);
  model->cu.cuMemFree_v2(to);
  return went == CUDA_SUCCESS ? QUERN_OK : failed(model, "measuring copies", went);
}

void quern_close(quern *model) {
  if (!model) return;
  driver *cu = &model->cu;
  if (model->retained) {
    cu->cuCtxSetCurrent(model->context);
    if (model->stream) cu->cuStreamSynchronize(model->stream);
    for (uint32_t i = 0; model->graphs && i < quern_this.functions; i++)
      if (model->graphs[i]) cu->cuGraphExecDestroy(model->graphs[i]);
    if (model->module) cu->cuModuleUnload(model->module);
    for (int i = 0; i < STAGES; i++) {
      quern_host_free(model, model->staging[i]);
      if (model->staged[i]) cu->cuEventDestroy_v2(model->staged[i]);
    }
    CUdeviceptr held[] = {model->weights, model->caches, model->arena};
    for (int i = 0; i < 3; i++)
      if (held[i]) cu->cuMemFree_v2(held[i]);
    if (model->began) cu->cuEventDestroy_v2(model->began);
    if (model->ended) cu->cuEventDestroy_v2(model->ended);
    if (model->stream) cu->cuStreamDestroy_v2(model->stream);
    cu->cuDevicePrimaryCtxRelease(model->device);
  }
  free(model->functions);
  free(model->parameters);
  free(model->values);
  free(model->arguments);
  free(model->graphs);
  free(model->calls);
  /* The driver stays loaded: its threads do not survive a dlclose. */
  free(model);
}
