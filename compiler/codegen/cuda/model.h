/* What the compiler writes of one model (tables.py), and what the runtime makes of it: the flat interface of model.so.
 *
 * runtime/on_cuda.py is the only caller, through ctypes: keep its structures equal to these.
 */
#ifndef QUERN_MODEL_H
#define QUERN_MODEL_H
#include <stddef.h>
#include <stdint.h>

#define QUERN_ABI 2

/* ---- written by the compiler ---- */

/* A place is byte `place` of the arena, or with PARAMETER set the parameter of that number. */
#define QUERN_PARAMETER (1ull << 63)

typedef struct {
  uint32_t kernel;      /* index into quern_kernel_names */
  uint32_t grid[3];     /* blocks */
  uint32_t block[3];    /* threads */
  uint32_t shared;      /* bytes of dynamic shared memory */
  uint32_t first_place; /* its arguments are quern_places[first_place .. + places] */
  uint32_t places;
} quern_step;

typedef struct {
  const char *name;
  uint32_t first_step, steps;
  uint32_t takes_ids; /* 1: the header is copied in before the call; 0: a hidden state lies at input_at */
  uint64_t input_at, input_bytes, result_at, result_bytes;
} quern_function;

typedef struct {
  uint32_t arch;   /* 87 for sm_87 */
  uint32_t driver; /* the oldest driver that reads the PTX, as cuDriverGetVersion says it: 11040 */
  uint64_t arena_bytes, header_ids_at;
  const unsigned char *ptx; /* ends with a zero byte */
  const unsigned char *cubin;
  uint64_t ptx_bytes, cubin_bytes; /* cubin_bytes 0: there is none */
  uint32_t kernels, steps, places, functions, parameters;
} quern_model;

extern const quern_model quern_this;
extern const char *const quern_kernel_names[];
extern const quern_step quern_steps[];
extern const uint64_t quern_places[];
extern const quern_function quern_functions[];
extern const char *const quern_parameters[];

/* ---- the interface ---- */

enum { /* what went wrong; the text is quern_error() */
  QUERN_OK = 0,
  QUERN_NO_DRIVER = 1,    /* libcuda is not there, or has no such device */
  QUERN_OLD_DRIVER = 2,   /* it lacks an entry point, or cannot read this PTX version */
  QUERN_WRONG_DEVICE = 3, /* the GPU is of an older architecture */
  QUERN_NO_MEMORY = 4,    /* the text has what was asked and what is free */
  QUERN_REFUSED = 5,      /* the driver did not take the device code; the text has its log */
  QUERN_FAILED = 6,       /* any other call of the driver */
};

enum { /* options of quern_open */
  QUERN_GRAPHS = 1,   /* replay calls as graphs where the driver can */
  QUERN_TIMED = 2,    /* quern_milliseconds works */
  QUERN_PTX_ONLY = 4, /* leave the machine code alone */
  QUERN_CHECKED = 8,  /* wait after every launch, without graphs: a kernel that fails is named */
};

typedef struct {
  char name[128];
  int32_t major, minor, multiprocessors, integrated;
  int32_t driver; /* 11040 */
  int32_t cubin;  /* 1: machine code was taken; 0: the driver compiled the PTX; -1: nothing is loaded yet */
  int32_t graphs; /* 1: calls are replayed as graphs */
  int32_t reserved;
  uint64_t total_bytes, free_bytes;
  char note[256]; /* why graphs or machine code are not used, or empty */
} quern_info;

typedef struct quern quern;

#define QUERN_API __attribute__((visibility("default")))
QUERN_API int32_t quern_abi(void);
QUERN_API const char *quern_error(void);
QUERN_API const char *quern_parameter(int32_t index);
QUERN_API int32_t quern_function_index(const char *name);

QUERN_API int32_t quern_open(const char *libcuda, int32_t ordinal, int32_t options, quern **out);
QUERN_API int32_t quern_describe(quern *model, quern_info *out);
QUERN_API int32_t quern_memory(quern *model, uint64_t weights_bytes, uint64_t caches_bytes, const uint64_t *offsets);
QUERN_API int32_t quern_upload(quern *model, uint64_t offset, const void *data, uint64_t bytes);
QUERN_API int32_t quern_load(quern *model);
QUERN_API int32_t quern_host(quern *model, uint64_t bytes, void **out);
QUERN_API void quern_host_free(quern *model, void *memory);
QUERN_API int32_t quern_run(quern *model, int32_t function, const void *header, uint64_t header_bytes, void *result);
QUERN_API int32_t quern_hand_over(quern *model, int32_t from, int32_t to);
QUERN_API int32_t quern_replay(quern *model, int32_t on);
QUERN_API int32_t quern_milliseconds(quern *model, float *out);
QUERN_API int32_t quern_borrow(quern *model, uint32_t sets, const uint64_t *addresses);
QUERN_API uint64_t quern_weights(quern *model);
QUERN_API int32_t quern_measure(quern *model, int32_t function, uint32_t set, uint32_t calls, float *milliseconds);
QUERN_API const char *quern_launched(int32_t function, uint32_t step);
QUERN_API int32_t quern_profile(quern *model, int32_t function, float *milliseconds);
QUERN_API int32_t quern_copy_speed(quern *model, uint64_t bytes, int32_t repeats, double *gb_s);
QUERN_API void quern_close(quern *model);

#endif
