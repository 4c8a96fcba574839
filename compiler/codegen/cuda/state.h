/* What the files of the runtime share: an opened model, and how a failure is told.
 *
 * Plain C on the driver API, found by dlopen: no CUDA runtime, no C++ library, nothing that a JetPack need not have.
 * One model, one stream, one thread. What fails gives a code of model.h and leaves its text in quern_error().
 *   open.c     the driver, the GPU, and the end
 *   memory.c   weights, caches, arena; host memory that the GPU reaches
 *   code.c     machine code or PTX, and whether its kernels fit this GPU
 *   run.c      a call, launch by launch or replayed as a graph
 *   measure.c  times and what only measuring needs
 */
#ifndef QUERN_STATE_H
#define QUERN_STATE_H
#include "driver.h"
#include "model.h"

enum { STAGES = 2, LOG_BYTES = 8 << 10, COHERENT_SM = 72 };

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

/* Return from the function around it when the driver does not say CUDA_SUCCESS. */
#define TRY(model, name, ...)                                         \
  do {                                                                \
    CUresult tried_ = (model)->cu.name(__VA_ARGS__);                  \
    if (tried_ != CUDA_SUCCESS) return failed(model, #name, tried_);  \
  } while (0)

/* Notes the text and gives `code` back. */
__attribute__((format(printf, 2, 3))) int32_t fail(int32_t code, const char *format, ...);
/* The same for a call of the driver that did not succeed. */
int32_t failed(quern *model, const char *call, CUresult code);
const char *name_of(quern *model, CUresult code);

int has_graphs(const driver *cu);
/* QUERN_NO_MEMORY, in words: what was asked, and what is free. */
int32_t short_of_memory(quern *model, const char *what, uint64_t bytes);
/* GPU memory; or the words above. */
int32_t allocate(quern *model, const char *what, uint64_t bytes, CUdeviceptr *out);
/* The buffers of uploads go; all copies have arrived. */
int32_t end_uploads(quern *model);
/* One launch of a function, or all of them, with parameters number `set`. */
int32_t launch_step(quern *model, const quern_function *function, uint32_t step, uint32_t set);
int32_t launch_set(quern *model, const quern_function *function, uint32_t set);
/* So many calls as a graph, the first with parameters number `set`, the next with the set after it; or NULL. */
CUgraphExec capture(quern *model, const quern_function *function, uint32_t set, uint32_t calls);

#endif
