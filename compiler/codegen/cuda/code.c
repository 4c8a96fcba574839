/* The device code: taken as it is or compiled by the driver, its kernels, and what they get. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "state.h"

const char *quern_parameter(int32_t index) {
  return index >= 0 && (uint32_t)index < quern_this.parameters ? quern_parameters[index] : NULL;
}

int32_t quern_function_index(const char *name) {
  for (uint32_t i = 0; i < quern_this.functions; i++)
    if (!strcmp(quern_functions[i].name, name)) return (int32_t)i;
  return -1;
}

enum { UNASKED_SHARED = 48 << 10 }; /* bytes of shared memory that every GPU grants a block */

static int32_t compile(quern *model) {
  quern_info *info = &model->info;
  char *log = calloc(1, LOG_BYTES);
  if (!log) return fail(QUERN_NO_MEMORY, "out of host memory");
  int options[] = {JIT_ERROR_LOG, JIT_ERROR_LOG_BYTES};
  void *values[] = {log, (void *)(uintptr_t)LOG_BYTES}; /* the driver writes into it how much of the log it filled */
  CUresult code = model->cu.cuModuleLoadDataEx(&model->module, quern_this.ptx, 2, options, values);
  int32_t result = QUERN_OK;
  info->cubin = 0;
  log[LOG_BYTES - 1] = 0;
  for (size_t end = strlen(log); end && (log[end - 1] == '\n' || log[end - 1] == ' ');) log[--end] = 0;
  if (code == CUDA_ERROR_OUT_OF_MEMORY)
    result = short_of_memory(model, "the kernels", quern_this.ptx_bytes);
  else if (code != CUDA_SUCCESS)
    result = fail(QUERN_REFUSED, "%s did not take the code for sm_%u: %s (%d)%s%s", info->name, quern_this.arch,
                  name_of(model, code), code, *log ? ": " : "", log);
  free(log);
  return result;
}

static int32_t load_module(quern *model) {
  quern_info *info = &model->info;
  if (!quern_this.cubin_bytes || model->sm != (int)quern_this.arch || model->options & QUERN_PTX_ONLY)
    return compile(model);
  CUresult code = model->cu.cuModuleLoadDataEx(&model->module, quern_this.cubin, 0, NULL, NULL);
  info->cubin = code == CUDA_SUCCESS;
  if (info->cubin) return QUERN_OK;
  if (code == CUDA_ERROR_OUT_OF_MEMORY) return short_of_memory(model, "the kernels", quern_this.cubin_bytes);
  snprintf(info->note, sizeof info->note, "the driver refused the machine code (%s) and compiled the PTX",
           name_of(model, code));
  return compile(model);
}

/* Whether this GPU has room for a block of a kernel: compiled by the driver, it may need more than the compiler saw. */
static int32_t fit(quern *model, uint32_t kernel, uint32_t threads, uint32_t shared) {
  CUfunction function = model->functions[kernel];
  int most = 0, own = 0;
  TRY(model, cuFuncGetAttribute, &most, FUNCTION_MAX_THREADS, function);
  if ((int)threads > most)
    return fail(QUERN_REFUSED, "%s has blocks of %u threads, and %s has room for %d of them at once",
                quern_kernel_names[kernel], threads, model->info.name, most);
  TRY(model, cuFuncGetAttribute, &own, FUNCTION_STATIC_SHARED, function);
  if (!shared || own + (int)shared <= UNASKED_SHARED) return QUERN_OK;
  CUresult code = model->cu.cuFuncSetAttribute(function, FUNCTION_MAX_DYNAMIC_SHARED, (int)shared);
  return code == CUDA_SUCCESS ? QUERN_OK
                              : fail(QUERN_REFUSED, "%s needs %d bytes of shared memory for a block, and %s does not "
                                     "give them: %s (%d)", quern_kernel_names[kernel], own + (int)shared,
                                     model->info.name, name_of(model, code), code);
}

static int32_t find_kernels(quern *model) {
  model->functions = calloc(quern_this.kernels + 1, sizeof *model->functions);
  if (!model->functions) return fail(QUERN_NO_MEMORY, "out of host memory");
  for (uint32_t kernel = 0; kernel < quern_this.kernels; kernel++) {
    uint32_t threads = 0, shared = 0;
    for (uint32_t i = 0; i < quern_this.steps; i++) {
      const quern_step *s = &quern_steps[i];
      uint32_t count = s->block[0] * s->block[1] * s->block[2];
      if (s->kernel != kernel) continue;
      if (count > threads) threads = count;
      if (s->shared > shared) shared = s->shared;
    }
    TRY(model, cuModuleGetFunction, &model->functions[kernel], model->module, quern_kernel_names[kernel]);
    int32_t code = fit(model, kernel, threads, shared);
    if (code) return code;
  }
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
