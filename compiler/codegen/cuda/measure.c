/* Times by the GPU's own clock, and parameters that another model holds: what only measuring needs. */
#include <stdlib.h>

#include "state.h"

enum { UNWRITTEN = 77 };

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

/* Time on the GPU of the last call's kernels; needs QUERN_TIMED. */
int32_t quern_milliseconds(quern *model, float *out) {
  if (!model->timed) return fail(QUERN_FAILED, "the model was not opened with QUERN_TIMED, or has not run");
  TRY(model, cuEventElapsedTime, out, model->began, model->ended);
  return QUERN_OK;
}

/* `calls` calls behind each other, the first with parameters number `set`, the next with the set after it: time on the
 * GPU of all of them, the gaps between them included. As one graph where there are graphs, once the function has run:
 * the gaps are then those of a replayed token, and a short kernel does not wait for its launch. */
int32_t quern_measure(quern *model, int32_t function, uint32_t set, uint32_t calls, float *milliseconds) {
  if (function < 0 || (uint32_t)function >= quern_this.functions) return fail(QUERN_FAILED, "no such function");
  const quern_function *called = &quern_functions[function];
  TRY(model, cuCtxSetCurrent, model->context);
  CUgraphExec burst = model->info.graphs && model->calls[function] ? capture(model, called, set, calls) : NULL;
  TRY(model, cuEventRecord, model->began, model->stream);
  int replayed = burst && model->cu.cuGraphLaunch(burst, model->stream) == CUDA_SUCCESS;
  for (uint32_t i = 0; i < calls && !replayed; i++) {
    int32_t code = launch_set(model, called, (set + i) % model->sets);
    if (code) return code;
  }
  TRY(model, cuEventRecord, model->ended, model->stream);
  TRY(model, cuStreamSynchronize, model->stream);
  if (burst) TRY(model, cuGraphExecDestroy, burst);
  TRY(model, cuEventElapsedTime, milliseconds, model->began, model->ended);
  return QUERN_OK;
}

/* The kernel of a launch of a function; NULL behind the last one. */
const char *quern_launched(int32_t function, uint32_t step) {
  if (function < 0 || (uint32_t)function >= quern_this.functions || step >= quern_functions[function].steps) return NULL;
  return quern_kernel_names[quern_steps[quern_functions[function].first_step + step].kernel];
}

/* A call by itself, on what the last one left in the header: time on the GPU of every launch. */
int32_t quern_profile(quern *model, int32_t function, float *milliseconds) {
  if (function < 0 || (uint32_t)function >= quern_this.functions) return fail(QUERN_FAILED, "no such function");
  const quern_function *called = &quern_functions[function];
  TRY(model, cuCtxSetCurrent, model->context);
  for (uint32_t i = 0; i < called->steps; i++) {
    TRY(model, cuEventRecord, model->began, model->stream);
    int32_t code = launch_step(model, called, i, 0);
    if (code) return code;
    TRY(model, cuEventRecord, model->ended, model->stream);
    TRY(model, cuStreamSynchronize, model->stream);
    TRY(model, cuEventElapsedTime, &milliseconds[i], model->began, model->ended);
  }
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
