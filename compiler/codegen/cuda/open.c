/* Finds the driver and a GPU that can run the code, and lets go of both. */
#include <dlfcn.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "state.h"

static char error_text[LOG_BYTES + 1024];

int32_t fail(int32_t code, const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(error_text, sizeof error_text, format, arguments);
  va_end(arguments);
  return code;
}

const char *name_of(quern *model, CUresult code) {
  const char *text = NULL;
  model->cu.cuGetErrorName(code, &text);
  return text ? text : "an error it has no name for";
}

int32_t failed(quern *model, const char *call, CUresult code) {
  return fail(QUERN_FAILED, "%s failed: %s (%d)", call, name_of(model, code), code);
}

int32_t quern_abi(void) { return QUERN_ABI; }

const char *quern_error(void) { return error_text; }

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

int has_graphs(const driver *cu) {
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
  /* The primary context: the one that CUDA's own libraries use, shared by all models of this process. */
  CUresult code = model->cu.cuDevicePrimaryCtxRetain(&model->context, model->device);
  if (code == CUDA_ERROR_OUT_OF_MEMORY)
    return fail(QUERN_NO_MEMORY, "%s lacks the free memory for a context of its driver", model->info.name);
  if (code != CUDA_SUCCESS) return failed(model, "cuDevicePrimaryCtxRetain", code);
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
  model->options = options & QUERN_CHECKED ? options & ~QUERN_GRAPHS : options;
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

/* What fails here fails because a kernel did, and that was told: everything goes with the process. */
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
