/* Memory of the GPU, and memory of the host that the GPU reaches by itself. */
#include <stdlib.h>
#include <string.h>

#include "state.h"

enum { STAGING_BYTES = 8 << 20 };

int32_t short_of_memory(quern *model, const char *what, uint64_t bytes) {
  size_t available = 0, total = 0;
  model->cu.cuMemGetInfo_v2(&available, &total);
  return fail(QUERN_NO_MEMORY, "%s need %llu MiB of GPU memory, but %s has %llu MiB free of %llu MiB", what,
              (unsigned long long)((bytes + (1 << 20) - 1) >> 20), model->info.name,
              (unsigned long long)(available >> 20), (unsigned long long)(total >> 20));
}

int32_t allocate(quern *model, const char *what, uint64_t bytes, CUdeviceptr *out) {
  CUresult code = model->cu.cuMemAlloc_v2(out, bytes ? bytes : 1);
  if (code == CUDA_ERROR_OUT_OF_MEMORY) return short_of_memory(model, what, bytes);
  return code == CUDA_SUCCESS ? QUERN_OK : failed(model, "cuMemAlloc", code);
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

int32_t end_uploads(quern *model) {
  TRY(model, cuStreamSynchronize, model->stream);
  for (int i = 0; i < STAGES; i++) {
    quern_host_free(model, model->staging[i]);
    if (model->staged[i]) TRY(model, cuEventDestroy_v2, model->staged[i]);
    model->staging[i] = NULL;
    model->staged[i] = NULL;
  }
  return QUERN_OK;
}
