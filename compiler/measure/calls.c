/* Runs kernels of one TVM object in a given order, without TVM's runtime and without a C library, so that zig links it
 * for any CPU in a second: a program for qemu.
 *
 *     calls PLAN DATA BYTES_OF_DATA OUT
 *
 * PLAN, little-endian int64: tensors, then for each: DLPack code, bits, place in DATA or -1 (zeroed), dimensions,
 * extents; calls, then for each: kernel, arguments, their tensors; outputs, then their tensors. OUT gets the outputs'
 * bytes, one after another. A kernel's number is its place in quern_kernels, which the build generates.
 * DATA is mapped, a tensor lies in it at a multiple of 64. Exits with 1 and a line on stderr when a file is short or a
 * kernel refuses its arguments. System calls: man 2 syscall; numbers of asm-generic/unistd.h, which both CPUs share.
 *
 * Layouts: DLTensor of dlpack.h 1.0, TVMFFIAny of tvm/ffi/c_api.h 0.1, __TVMBackendParallelLaunch of
 * tvm/runtime/c_backend_api.h. Parallel loops run as one task on the calling thread. */
#include <stddef.h>
#include <stdint.h>

typedef struct {
  void *data;
  struct { int32_t type, id; } device;
  int32_t ndim;
  struct { uint8_t code, bits; uint16_t lanes; } dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;
} tensor;
typedef struct { int32_t type_index; uint32_t padding; union { int64_t i; void *p; } value; } any;
typedef struct { void *sync; int32_t num_task; } parallel_env;
typedef int (*kernel)(void *self, const any *args, int32_t count, any *result);
enum { CPU = 1, DLTENSOR = 7, ALIGNMENT = 64, MOST_ARGS = 64 };
enum { AT_FDCWD = -100, OPENAT = 56, READ = 63, WRITE = 64, EXIT = 93, MMAP = 222 };
enum { READ_ONLY = 0, CREATE = 01101, MAY_READ_WRITE = 3, PRIVATE = 2, ANONYMOUS = 0x20 };

extern const kernel quern_kernels[];

#if defined(__aarch64__)
static long call(long number, long a, long b, long c, long d, long e, long f) {
  register long x8 __asm__("x8") = number, x0 __asm__("x0") = a, x1 __asm__("x1") = b, x2 __asm__("x2") = c;
  register long x3 __asm__("x3") = d, x4 __asm__("x4") = e, x5 __asm__("x5") = f;
  __asm__ volatile("svc 0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2), "r"(x3), "r"(x4), "r"(x5) : "memory");
  return x0;
}
__asm__(".globl _start\n_start:\nmov x29, 0\nmov x0, sp\nand sp, x0, -16\nb quern_main\n");
#elif defined(__riscv)
static long call(long number, long a, long b, long c, long d, long e, long f) {
  register long a7 __asm__("a7") = number, a0 __asm__("a0") = a, a1 __asm__("a1") = b, a2 __asm__("a2") = c;
  register long a3 __asm__("a3") = d, a4 __asm__("a4") = e, a5 __asm__("a5") = f;
  __asm__ volatile("ecall" : "+r"(a0) : "r"(a7), "r"(a1), "r"(a2), "r"(a3), "r"(a4), "r"(a5) : "memory");
  return a0;
}
__asm__(".globl _start\n_start:\n.option push\n.option norelax\nla gp, __global_pointer$\n.option pop\n"
        "mv a0, sp\nandi sp, sp, -16\ntail quern_main\n");
#else
#error "no system calls for this CPU"
#endif

/* The compiler calls these by itself. */
void *memset(void *to, int value, size_t bytes) {
  for (size_t i = 0; i < bytes; i++) ((volatile char *)to)[i] = (char)value;
  return to;
}

void *memcpy(void *to, const void *from, size_t bytes) {
  for (size_t i = 0; i < bytes; i++) ((volatile char *)to)[i] = ((const char *)from)[i];
  return to;
}

static void say(const char *text) {
  size_t length = 0;
  while (text[length]) length++;
  call(WRITE, 2, (long)text, (long)length, 0, 0, 0);
}

static void fail(const char *what) {
  say("calls: "), say(what), say("\n");
  call(EXIT, 1, 0, 0, 0, 0, 0);
  __builtin_unreachable();
}

void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts, int32_t count, const char *where) {
  (void)where;
  say(kind), say(": ");
  for (int32_t i = 0; i < count; i++) say(parts[i]);
  say("\n");
}

static void *mapped(uint64_t bytes, long flags, long file) {
  long place = call(MMAP, 0, (long)(bytes + ALIGNMENT), MAY_READ_WRITE, flags, file, 0);
  if (place < 0 && place > -4096) fail("out of memory");
  return (void *)place;
}

static void *allocate(uint64_t bytes) { return mapped(bytes, PRIVATE | ANONYMOUS, -1); }

static int launch(int (*task)(int, parallel_env *, void *), void *closure, int tasks) {
  (void)tasks;
  parallel_env env = {0, 1};
  return task(0, &env, closure);
}

/* A kernel's own workspace, never given back: a run is short. */
static void *workspace(int type, int id, uint64_t bytes, int code, int bits) {
  (void)type, (void)id, (void)code, (void)bits;
  return allocate(bytes);
}

static int release(int type, int id, void *place) {
  (void)type, (void)id, (void)place;
  return 0;
}

/* Weak in the object, for whoever loads it to fill in. */
void *__TVMBackendParallelLaunch = (void *)launch;
void *__TVMBackendAllocWorkspace = (void *)workspace;
void *__TVMBackendFreeWorkspace = (void *)release;

static long opened(const char *path, long flags) {
  long file = call(OPENAT, AT_FDCWD, (long)path, flags, 0644, 0, 0);
  if (file < 0) fail(path);
  return file;
}

static long plan;

static int64_t next(void) {
  static int64_t values[4096], at, end;
  if (at == end) at = 0, end = call(READ, plan, (long)values, sizeof values, 0, 0, 0) / (long)sizeof *values;
  if (at >= end) fail("the plan is short");
  return values[at++];
}

static uint64_t bytes_of(const tensor *t) {
  uint64_t bytes = t->dtype.bits / 8;
  for (int i = 0; i < t->ndim; i++) bytes *= (uint64_t)t->shape[i];
  return bytes;
}

static void read_tensor(tensor *t, char *data) {
  t->device.type = CPU;
  t->dtype.code = (uint8_t)next();
  t->dtype.bits = (uint8_t)next();
  t->dtype.lanes = 1;
  int64_t place = next();
  t->ndim = (int32_t)next();
  t->shape = allocate((uint64_t)t->ndim * sizeof *t->shape);
  for (int i = 0; i < t->ndim; i++) t->shape[i] = next();
  t->data = place < 0 ? allocate(bytes_of(t)) : data + place;
}

__attribute__((noreturn, used)) void quern_main(const long *stack) {
  const char *const *argv = (const char *const *)(stack + 1);
  if (stack[0] != 5) fail("usage: calls PLAN DATA BYTES_OF_DATA OUT");
  plan = opened(argv[1], READ_ONLY);
  uint64_t data_bytes = 0;
  for (const char *digit = argv[3]; *digit; digit++) data_bytes = 10 * data_bytes + (uint64_t)(*digit - '0');
  char *data = mapped(data_bytes, PRIVATE, opened(argv[2], READ_ONLY));
  long out = opened(argv[4], CREATE);
  int64_t tensors = next();
  tensor *all = allocate((uint64_t)tensors * sizeof *all);
  for (int64_t i = 0; i < tensors; i++) read_tensor(&all[i], data);
  for (int64_t calls = next(); calls > 0; calls--) {
    any args[MOST_ARGS], result = {0, 0, {0}};
    int64_t which = next(), count = next();
    if (count > MOST_ARGS) fail("too many arguments");
    for (int64_t i = 0; i < count; i++) {
      args[i].type_index = DLTENSOR;
      args[i].padding = 0;
      args[i].value.p = &all[next()];
    }
    if (quern_kernels[which](0, args, (int32_t)count, &result)) fail("a kernel refused its arguments");
  }
  for (int64_t outputs = next(); outputs > 0; outputs--) {
    const tensor *t = &all[next()];
    if (call(WRITE, out, (long)t->data, (long)bytes_of(t), 0, 0, 0) != (long)bytes_of(t)) fail("cannot write");
  }
  call(EXIT, 0, 0, 0, 0, 0, 0);
  __builtin_unreachable();
}
