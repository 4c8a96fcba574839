/* A call: launches one after the other, or all of them as a graph. */
#include <stdio.h>

#include "state.h"

int32_t launch_step(quern *model, const quern_function *function, uint32_t step, uint32_t set) {
  const quern_step *s = &quern_steps[function->first_step + step];
  void **arguments = model->arguments + (size_t)set * quern_this.places + s->first_place;
  CUresult code = model->cu.cuLaunchKernel(model->functions[s->kernel], s->grid[0], s->grid[1], s->grid[2], s->block[0],
                                           s->block[1], s->block[2], s->shared, model->stream, arguments, NULL);
  if (code == CUDA_SUCCESS && model->options & QUERN_CHECKED) code = model->cu.cuStreamSynchronize(model->stream);
  if (code == CUDA_SUCCESS) return QUERN_OK;
  return fail(QUERN_FAILED, "launch %u of %s, %s: %s (%d)", step + 1, function->name, quern_kernel_names[s->kernel],
              name_of(model, code), code);
}

int32_t launch_set(quern *model, const quern_function *function, uint32_t set) {
  int32_t code = QUERN_OK;
  for (uint32_t i = 0; i < function->steps && !code; i++) code = launch_step(model, function, i, set);
  return code;
}

/* Calls go on launch by launch: whatever is wrong, a launch by itself has the better words for it. */
static void no_graphs(quern *model, const char *call, CUresult code) {
  model->info.graphs = 0;
  snprintf(model->info.note, sizeof model->info.note, "%s failed (%s), so calls are not replayed as graphs", call,
           name_of(model, code));
}

/* The launches of some calls as a graph, or NULL. Not before the function's second call: a driver that loads kernels
 * lazily (CUDA 11.7 and later) does that at the first launch, where a capture would not let it. Nothing but launches may
 * happen in between: a call that waits or allocates spoils the capture. */
CUgraphExec capture(quern *model, const quern_function *function, uint32_t set, uint32_t calls) {
  CUgraph graph = NULL;
  CUgraphExec made = NULL;
  CUresult code = model->cu.cuStreamBeginCapture_v2(model->stream, CAPTURE_THREAD_LOCAL);
  if (code != CUDA_SUCCESS) return no_graphs(model, "cuStreamBeginCapture", code), NULL;
  int32_t launched = QUERN_OK;
  for (uint32_t i = 0; i < calls && !launched; i++) launched = launch_set(model, function, (set + i) % model->sets);
  code = model->cu.cuStreamEndCapture(model->stream, &graph);
  if (code == CUDA_SUCCESS && launched) code = CUDA_ERROR_CAPTURE_INVALIDATED;
  /* CUDA 10's five arguments. With zeros they mean the same to CUDA 12's cuGraphInstantiate(out, graph, flags). */
  const char *call = code == CUDA_SUCCESS ? "cuGraphInstantiate" : "cuStreamEndCapture";
  if (code == CUDA_SUCCESS) code = model->cu.cuGraphInstantiate(&made, graph, NULL, NULL, 0);
  if (graph) model->cu.cuGraphDestroy(graph);
  return code == CUDA_SUCCESS ? made : (no_graphs(model, call, code), NULL);
}

static int32_t launch(quern *model, uint32_t index) {
  const quern_function *function = &quern_functions[index];
  if (model->info.graphs && model->calls[index]++ && !model->graphs[index])
    model->graphs[index] = capture(model, function, 0, 1);
  if (model->info.graphs && model->graphs[index]) {
    CUresult code = model->cu.cuGraphLaunch(model->graphs[index], model->stream);
    if (code == CUDA_SUCCESS) return QUERN_OK;
    no_graphs(model, "cuGraphLaunch", code);
  }
  return launch_set(model, function, 0);
}

/* One call. header: pinned, span i32[2] and from header_ids_at on ids i32[tokens]; NULL for one of a hidden
 * state. result: pinned room for what it gives, or NULL to leave that on the GPU. All of it has happened when this returns. */
int32_t quern_run(quern *model, int32_t function, const void *header, uint64_t header_bytes, void *result) {
  if (function < 0 || (uint32_t)function >= quern_this.functions) return fail(QUERN_FAILED, "no such function");
  const quern_function *called = &quern_functions[function];
  TRY(model, cuCtxSetCurrent, model->context);
  if (header) TRY(model, cuMemcpyHtoDAsync_v2, model->arena, header, header_bytes, model->stream);
  model->timed = model->options & QUERN_TIMED;
  if (model->timed) TRY(model, cuEventRecord, model->began, model->stream);
  int32_t code = launch(model, (uint32_t)function);
  if (code) return code;
  if (model->timed) TRY(model, cuEventRecord, model->ended, model->stream);
  if (result)
    TRY(model, cuMemcpyDtoHAsync_v2, result, model->arena + called->result_at, called->result_bytes, model->stream);
  TRY(model, cuStreamSynchronize, model->stream);
  return QUERN_OK;
}

/* What `from` left is what `to` takes; nothing leaves the GPU. */
int32_t quern_hand_over(quern *model, int32_t from, int32_t to) {
  const quern_function *a = &quern_functions[from], *b = &quern_functions[to];
  if (b->takes_ids || a->result_bytes != b->input_bytes)
    return fail(QUERN_FAILED, "%s does not take what %s leaves", b->name, a->name);
  TRY(model, cuCtxSetCurrent, model->context);
  TRY(model, cuMemcpyDtoDAsync_v2, model->arena + b->input_at, model->arena + a->result_at, a->result_bytes,
      model->stream);
  return QUERN_OK;
}

/* Whether calls are replayed as graphs from now on, where the driver can. */
int32_t quern_replay(quern *model, int32_t on) {
  model->info.graphs = on && (model->options & QUERN_GRAPHS) && has_graphs(&model->cu);
  return QUERN_OK;
}
