/* What libcuda.so.1 must have: the driver API of CUDA 10.2 (JetPack 4) and older, found by name when a model is opened.
 *
 * DRIVER lists every entry point with the CUDA version that brought it (from the release notes of the driver API and the
 * versions in cuda.h's own #defines) and its result and arguments. Those under OPTIONAL may be missing: without them a
 * model runs launch by launch. Types and numbers are those of cuda.h 10.2; nothing of NVIDIA's headers is needed.
 */
#ifndef QUERN_DRIVER_H
#define QUERN_DRIVER_H
#include <stddef.h>
#include <stdint.h>

typedef int CUresult;
typedef int CUdevice;
typedef uint64_t CUdeviceptr;
typedef void *CUcontext, *CUmodule, *CUfunction, *CUstream, *CUevent, *CUgraph, *CUgraphExec;

enum { /* CUresult, CUdevice_attribute, CUjit_option, CUfunction_attribute, flags */
  CUDA_SUCCESS = 0,
  CUDA_ERROR_OUT_OF_MEMORY = 2,
  CUDA_ERROR_CAPTURE_INVALIDATED = 901,
  ATTRIBUTE_MULTIPROCESSORS = 16,
  ATTRIBUTE_INTEGRATED = 18,
  ATTRIBUTE_MAJOR = 75,
  ATTRIBUTE_MINOR = 76,
  JIT_INFO_LOG = 3,
  JIT_INFO_LOG_BYTES = 4,
  JIT_ERROR_LOG = 5,
  JIT_ERROR_LOG_BYTES = 6,
  FUNCTION_MAX_THREADS = 0,
  FUNCTION_STATIC_SHARED = 1,
  FUNCTION_MAX_DYNAMIC_SHARED = 8,
  HOST_PORTABLE = 1,
  ATTACH_GLOBAL = 1,
  STREAM_NON_BLOCKING = 1,
  CAPTURE_THREAD_LOCAL = 1,
  EVENT_DEFAULT = 0,
};

#define DRIVER(REQUIRED, OPTIONAL)                                                                                     \
  REQUIRED(cuInit, 2000, (unsigned flags))                                                                             \
  REQUIRED(cuDriverGetVersion, 2020, (int *version))                                                                   \
  REQUIRED(cuGetErrorName, 6000, (CUresult code, const char **text))                                                   \
  REQUIRED(cuDeviceGetCount, 2000, (int *count))                                                                       \
  REQUIRED(cuDeviceGet, 2000, (CUdevice * device, int ordinal))                                                        \
  REQUIRED(cuDeviceGetName, 2000, (char *name, int size, CUdevice device))                                             \
  REQUIRED(cuDeviceGetAttribute, 2000, (int *value, int attribute, CUdevice device))                                   \
  REQUIRED(cuDevicePrimaryCtxRetain, 7000, (CUcontext * context, CUdevice device))                                     \
  REQUIRED(cuDevicePrimaryCtxRelease, 7000, (CUdevice device))                                                         \
  REQUIRED(cuCtxSetCurrent, 4000, (CUcontext context))                                                                 \
  REQUIRED(cuMemGetInfo_v2, 3020, (size_t *free, size_t *total))                                                       \
  REQUIRED(cuMemAlloc_v2, 3020, (CUdeviceptr * at, size_t bytes))                                                      \
  REQUIRED(cuMemFree_v2, 3020, (CUdeviceptr at))                                                                       \
  REQUIRED(cuMemHostAlloc, 2020, (void **at, size_t bytes, unsigned flags))                                            \
  REQUIRED(cuMemFreeHost, 2000, (void *at))                                                                            \
  REQUIRED(cuMemAllocManaged, 6000, (CUdeviceptr * at, size_t bytes, unsigned flags))                                  \
  REQUIRED(cuMemsetD8Async, 3020, (CUdeviceptr at, unsigned char value, size_t bytes, CUstream stream))                \
  REQUIRED(cuMemcpyHtoDAsync_v2, 3020, (CUdeviceptr to, const void *from, size_t bytes, CUstream stream))              \
  REQUIRED(cuMemcpyDtoHAsync_v2, 3020, (void *to, CUdeviceptr from, size_t bytes, CUstream stream))                    \
  REQUIRED(cuMemcpyDtoDAsync_v2, 3020, (CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream))              \
  REQUIRED(cuModuleLoadDataEx, 2010, (CUmodule * module, const void *image, unsigned n, int *options, void **values))  \
  REQUIRED(cuModuleUnload, 2000, (CUmodule module))                                                                    \
  REQUIRED(cuModuleGetFunction, 2000, (CUfunction * function, CUmodule module, const char *name))                      \
  REQUIRED(cuFuncGetAttribute, 2020, (int *value, int attribute, CUfunction function))                                \
  REQUIRED(cuFuncSetAttribute, 9000, (CUfunction function, int attribute, int value))                                  \
  REQUIRED(cuLaunchKernel, 4000,                                                                                       \
           (CUfunction function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,         \
            unsigned shared, CUstream stream, void **arguments, void **extra))                                         \
  REQUIRED(cuStreamCreate, 2000, (CUstream * stream, unsigned flags))                                                  \
  REQUIRED(cuStreamSynchronize, 2000, (CUstream stream))                                                               \
  REQUIRED(cuStreamDestroy_v2, 4000, (CUstream stream))                                                                \
  REQUIRED(cuEventCreate, 2000, (CUevent * event, unsigned flags))                                                     \
  REQUIRED(cuEventRecord, 2000, (CUevent event, CUstream stream))                                                      \
  REQUIRED(cuEventSynchronize, 2000, (CUevent event))                                                                  \
  REQUIRED(cuEventElapsedTime, 2000, (float *milliseconds, CUevent from, CUevent to))                                  \
  REQUIRED(cuEventDestroy_v2, 4000, (CUevent event))                                                                   \
  OPTIONAL(cuStreamBeginCapture_v2, 10010, (CUstream stream, int mode))                                                \
  OPTIONAL(cuStreamEndCapture, 10000, (CUstream stream, CUgraph *graph))                                               \
  OPTIONAL(cuGraphInstantiate, 10000, (CUgraphExec * made, CUgraph graph, void **node, char *log, size_t log_bytes))   \
  OPTIONAL(cuGraphLaunch, 10000, (CUgraphExec graph, CUstream stream))                                                 \
  OPTIONAL(cuGraphExecDestroy, 10000, (CUgraphExec graph))                                                             \
  OPTIONAL(cuGraphDestroy, 10000, (CUgraph graph))

#define DECLARE(name, since, arguments) CUresult(*name) arguments;
typedef struct {
  DRIVER(DECLARE, DECLARE)
} driver;
#undef DECLARE

#endif
