// Runs the blocks of a launch one after another, a fiber a thread, and watches every access to memory.
//
// Found, each with thread and block: an access outside the arrays of the launch, the block's shared memory and the
// thread's own stack; a misaligned one; a read of shared memory that nobody wrote; two threads that touch a byte of
// shared memory, one of them writing, without a barrier between; barriers and warp functions that not all threads
// reach; a copy that is used before it was waited for. The first finding ends the launch.
#include <sys/mman.h>

#include <cstdarg>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

using QuernPerform = void (*)(void* const*);
struct QuernPlace {
  unsigned x, y, z;
};
struct QuernThread {
  QuernPlace thread, block, block_size, grid_size;
  int lane;
};
struct QuernRegion {  // an array of the launch
  const void* start;
  uint64_t bytes;
};
struct QuernFunction {  // one table a kernel's source
  const char* name;
  void (*call)(void** arguments);
};
extern "C" {
QuernThread quern_thread;
extern char __start_quern_shared[] __attribute__((weak));
extern char __stop_quern_shared[] __attribute__((weak));
extern const QuernFunction quern_functions[];
}

namespace {
constexpr size_t STACK = 64 << 10;
constexpr ptrdiff_t FAR = 1 << 16;  // beyond the end of an array: not meant for it

// As much of a vector as is needed, so that nothing has to be linked; elements are plain data.
template <class T>
struct List {
  T* items = nullptr;
  size_t count = 0, room = 0;
  T& operator[](size_t i) { return items[i]; }
  T* begin() { return items; }
  T* end() { return items + count; }
  void resize(size_t size) {  // new elements are zero
    if (size > room) {
      items = static_cast<T*>(std::realloc(static_cast<void*>(items), (room = size + size / 2) * sizeof(T)));
      if (!items) std::abort();
    }
    if (size > count) std::memset(static_cast<void*>(items + count), 0, (size - count) * sizeof(T));
    count = size;
  }
  void push(const T& item) {
    resize(count + 1);
    items[count - 1] = item;
  }
  void drop(size_t first) {  // the first ones
    std::memmove(static_cast<void*>(items), static_cast<void*>(items + first), (count -= first) * sizeof(T));
  }
  void clear_all() { std::memset(static_cast<void*>(items), 0, count * sizeof(T)); }
};

enum State { RUNS, AT_BARRIER, AT_WARP, ENDED };
struct Copy {
  char* to;
  const char* from;
  int size, bytes, group;  // size: written, bytes: read; the rest becomes 0
};
struct Fiber {
  void* stack_pointer;
  State state;
  QuernPlace thread;
  List<Copy> copies;
  int group;  // of copies that are not committed yet
};
struct Warp {
  void* operands[32];
  QuernPerform perform;
  const char* what;
  int arrived;
  uint32_t epoch;  // barriers of the warp so far
};
// The last write of a byte and its last two reads by different threads; epochs say between which barriers.
struct Touch {
  uint32_t block_epoch, warp_epoch;
  int thread;
};
struct Shadow {
  Touch written, read, read_before;
  bool initialised, pending;
};

List<Fiber> fibers;
List<Warp> warps;
List<QuernRegion> regions;
List<Shadow> static_shadow, dynamic_shadow;
char* stacks;
char* dynamic_start;
size_t dynamic_bytes, static_bytes, stacks_for;
int current, threads, at_barrier, ended;
uint32_t block_epoch;
char message[1024];
bool failed, performing;
void* scheduler;
void (*entry)(void**);
void** entry_arguments;

extern "C" void quern_switch(void** save, void* to);
#if defined(__x86_64__)
asm(R"(
.text
.globl quern_switch
quern_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
constexpr int SAVED = 6, RETURN = 6, FRAME = 8;  // words; the stack is 16-aligned before the call that never was
#elif defined(__aarch64__)
asm(R"(
.text
.globl quern_switch
quern_switch:
  sub sp, sp, #160
  stp x19, x20, [sp]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
)");
constexpr int SAVED = 11, RETURN = 11, FRAME = 20;
#endif

void leave() { quern_switch(&fibers[current].stack_pointer, scheduler); }

[[noreturn]] void fail(const char* format, ...) {
  int used = 0;
  if (current >= 0) {
    const QuernPlace t = fibers[current].thread, b = quern_thread.block;
    used = std::snprintf(message, sizeof message, "thread (%u, %u, %u) of block (%u, %u, %u): ", t.x, t.y, t.z, b.x, b.y, b.z);
  }
  va_list rest;
  va_start(rest, format);
  std::vsnprintf(message + used, sizeof message - used, format, rest);
  va_end(rest);
  failed = true;
  for (;;) leave();
}

void begin() {
  entry(entry_arguments);
  Fiber& f = fibers[current];
  if (f.copies.count) fail("ends with %zu asynchronous copies that it did not wait for", f.copies.count);
  f.state = ENDED;
  ++ended;
  for (;;) leave();
}

bool inside(const void* p, size_t bytes, const void* start, size_t size) {
  auto a = reinterpret_cast<uintptr_t>(p), s = reinterpret_cast<uintptr_t>(start);
  return a >= s && bytes <= size && a - s <= size - bytes;
}

bool unordered(const Touch& t) {
  if (t.block_epoch != block_epoch || t.thread == current) return false;
  return t.thread / 32 != current / 32 || t.warp_epoch == warps[current / 32].epoch;
}

void touch(Shadow* shadow, size_t offset, size_t bytes, bool write, const char* what) {
  const Touch now{block_epoch, warps[current / 32].epoch, current};
  for (size_t i = offset; i < offset + bytes; ++i) {
    Shadow& s = shadow[i];
    if (s.pending) fail("%s uses byte %zu of shared memory while an asynchronous copy to it is under way", what, i);
    if (unordered(s.written))
      fail("%s %s byte %zu of shared memory, which thread %d wrote; no barrier lies between", what,
           write ? "writes" : "reads", i, s.written.thread);
    if (write) {
      for (int r = 0; r < 2; ++r)
        if (const Touch& read = r ? s.read_before : s.read; unordered(read))
          fail("%s writes byte %zu of shared memory, which thread %d reads; no barrier lies between", what, i,
               read.thread);
      s.written = now;
      s.initialised = true;
    } else {
      if (!s.initialised) fail("%s reads byte %zu of shared memory, which nobody wrote", what, i);
      if (s.read.thread != current) s.read_before = s.read;
      s.read = now;
    }
  }
}

// What is known of the bytes at p, or null where that is not the block's shared memory.
Shadow* shadow_of(const void* p, size_t bytes) {
  if (inside(p, bytes, dynamic_start, dynamic_bytes))
    return dynamic_shadow.items + (static_cast<const char*>(p) - dynamic_start);
  if (inside(p, bytes, __start_quern_shared, static_bytes))
    return static_shadow.items + (static_cast<const char*>(p) - __start_quern_shared);
  return nullptr;
}

void check(const void* p, size_t bytes, bool write, const char* what) {
  if (current < 0 || performing) return;
  if (inside(p, bytes, stacks + current * STACK, STACK) || inside(p, bytes, &quern_thread, sizeof quern_thread)) return;
  if (inside(p, bytes, dynamic_start, dynamic_bytes))
    return touch(dynamic_shadow.items, static_cast<const char*>(p) - dynamic_start, bytes, write, what);
  if (inside(p, bytes, __start_quern_shared, static_bytes))
    return touch(static_shadow.items, static_cast<const char*>(p) - __start_quern_shared, bytes, write, what);
  if (!regions.count) return;  // a caller that does not say what there is
  for (const QuernRegion& r : regions)
    if (inside(p, bytes, r.start, r.bytes)) return;
  const QuernRegion* near = nullptr;
  for (const QuernRegion& r : regions)
    if (r.start <= p && (near == nullptr || near->start < r.start)) near = &r;
  const ptrdiff_t at = near ? static_cast<const char*>(p) - static_cast<const char*>(near->start) : 0;
  if (!near || at > static_cast<ptrdiff_t>(near->bytes) + FAR)
    fail("%s of %zu bytes is outside every array, shared memory and the thread's stack", what, bytes);
  fail("%s of %zu bytes at byte %td of array %td, which has %llu", what, bytes, at, near - regions.items,
       static_cast<unsigned long long>(near->bytes));
}

void plain(const void* p, size_t bytes, bool write, bool aligned) {
  const char* what = write ? "a write" : "a read";
  if (aligned && current >= 0 && !performing && reinterpret_cast<uintptr_t>(p) % bytes)
    fail("%s of %zu bytes at an address that is no multiple of them", what, bytes);
  check(p, bytes, write, what);
}

void release_barrier() {
  ++block_epoch;
  at_barrier = 0;
  for (Fiber& f : fibers) f.state = RUNS;
}

void prepare(int i) {
  auto** top = reinterpret_cast<void**>(stacks + (i + 1) * STACK) - FRAME - (SAVED % 2 == 0 ? 2 : 0);
  std::memset(top, 0, FRAME * sizeof *top);
  top[RETURN] = reinterpret_cast<void*>(begin);
  fibers[i].stack_pointer = top;
  fibers[i].state = RUNS;
  fibers[i].copies.count = 0;
  fibers[i].group = 0;
}

void run_block() {
  for (int i = 0; i < threads; ++i) prepare(i);
  for (Warp& w : warps) w = Warp{{}, nullptr, "", 0, 1};
  block_epoch = 1, at_barrier = 0, ended = 0;
  static_shadow.clear_all();
  dynamic_shadow.clear_all();
  std::memset(dynamic_start, 0xA5, dynamic_bytes);
  std::memset(__start_quern_shared, 0xA5, static_bytes);
  while (ended < threads && !failed) {
    bool any = false;
    for (int i = 0; i < threads && !failed; ++i) {
      if (fibers[i].state != RUNS) continue;
      any = true;
      current = i;
      quern_thread.thread = fibers[i].thread;
      quern_thread.lane = i % 32;
      quern_switch(&scheduler, fibers[i].stack_pointer);
    }
    if (any || failed) continue;
    for (int i = 0; i < threads; ++i) {  // nobody can go on: somebody waits for one who is elsewhere
      if (fibers[i].state != AT_WARP && fibers[i].state != AT_BARRIER) continue;
      current = i;
      const char* where = fibers[i].state == AT_BARRIER ? "the block's barrier" : warps[i / 32].what;
      if (fibers[i].state == AT_WARP || at_barrier == threads - ended) {
        std::snprintf(message, sizeof message, "thread %d waits at %s, which other threads never reach", i, where);
        failed = true;
        break;
      }
    }
    if (!failed) {
      std::snprintf(message, sizeof message, "threads wait for each other at barriers and warp functions");
      failed = true;
    }
  }
  current = -1;
}
}  // namespace

extern "C" {
void quern_collective(QuernPerform perform, void* operands, const char* what) {
  Warp& w = warps[current / 32];
  if (w.arrived && w.perform != perform) fail("is at %s while other lanes of its warp are at %s", what, w.what);
  w.perform = perform, w.what = what;
  w.operands[current % 32] = operands;
  if (++w.arrived < 32) {
    fibers[current].state = AT_WARP;
    return leave();
  }
  w.arrived = 0;
  performing = true;  // reads and writes what lies on the stacks of all lanes
  perform(w.operands);
  performing = false;
  for (int i = current / 32 * 32; i < current / 32 * 32 + 32; ++i) fibers[i].state = RUNS;
}
void quern_warp_sync() {
  char none = 0;
  quern_collective([](void* const*) { ++warps[current / 32].epoch; }, &none, "warp_sync");
}
void quern_block_sync() {
  fibers[current].state = AT_BARRIER;
  if (++at_barrier == threads) return release_barrier();
  leave();
}
void* quern_dynamic_shared() { return dynamic_start; }
void quern_check(const void* address, int bytes, int alignment, int write, const char* what) {
  if (reinterpret_cast<uintptr_t>(address) % alignment)
    fail("%s at %p, which is no multiple of %d", what, address, alignment);
  check(address, bytes, write, what);
}
void quern_fail(const char* what, const char* why) { fail("%s: %s", what, why); }
void quern_async_copy(void* to, const void* from, int size, int bytes) {
  Fiber& f = fibers[current];
  quern_check(to, size, size, 1, "async_copy to");
  if (bytes < 0 || bytes > size) fail("async_copy of %d bytes", bytes);
  if (bytes) quern_check(from, bytes, size, 0, "async_copy from");
  Shadow* shadow = shadow_of(to, size);
  if (!shadow) fail("async_copy to what is not shared memory");
  for (int i = 0; i < size; ++i) shadow[i].pending = true;
  f.copies.push(Copy{static_cast<char*>(to), static_cast<const char*>(from), size, bytes, f.group});
}
void quern_async_commit() { ++fibers[current].group; }
void quern_async_wait(int groups) {  // copies land as late as they may
  Fiber& f = fibers[current];
  size_t done = 0;
  for (; done < f.copies.count && f.copies[done].group < f.group - groups; ++done) {
    const Copy c = f.copies[done];
    Shadow* shadow = shadow_of(c.to, c.size);
    for (int i = 0; i < c.size; ++i) {
      shadow[i].pending = false;
      shadow[i].written = Touch{block_epoch, warps[current / 32].epoch, current};
    }
    std::memset(c.to, 0, c.size);
    std::memcpy(c.to, c.from, c.bytes);
  }
  f.copies.drop(done);
}

// ---- what -fsanitize=thread calls
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void*, void*) {}
void __tsan_vptr_read(void*) {}
#define QUERN_HOOKS(BYTES)                                                                      \
  void __tsan_read##BYTES(void* p) { plain(p, BYTES, false, true); }                            \
  void __tsan_write##BYTES(void* p) { plain(p, BYTES, true, true); }                            \
  void __tsan_read_write##BYTES(void* p) { plain(p, BYTES, false, true), plain(p, BYTES, true, true); }
QUERN_HOOKS(1)
QUERN_HOOKS(2)
QUERN_HOOKS(4)
QUERN_HOOKS(8)
QUERN_HOOKS(16)
#define QUERN_UNALIGNED(BYTES)                                                                  \
  void __tsan_unaligned_read##BYTES(void* p) { plain(p, BYTES, false, false); }                 \
  void __tsan_unaligned_write##BYTES(void* p) { plain(p, BYTES, true, false); }                 \
  void __tsan_unaligned_read_write##BYTES(void* p) { plain(p, BYTES, false, false), plain(p, BYTES, true, false); }
QUERN_UNALIGNED(2)
QUERN_UNALIGNED(4)
QUERN_UNALIGNED(8)
QUERN_UNALIGNED(16)
void* __tsan_memcpy(void* to, const void* from, size_t bytes) {
  if (bytes) plain(from, bytes, false, false), plain(to, bytes, true, false);
  return std::memcpy(to, from, bytes);
}
void* __tsan_memmove(void* to, const void* from, size_t bytes) {
  if (bytes) plain(from, bytes, false, false), plain(to, bytes, true, false);
  return std::memmove(to, from, bytes);
}
void* __tsan_memset(void* to, int value, size_t bytes) {
  if (bytes) plain(to, bytes, true, false);
  return std::memset(to, value, bytes);
}

// ---- what Python and the mock libcuda call
const char* quern_message() { return message; }

// The arrays that launches may touch from now on; with none, every address outside shared memory is allowed.
void quern_regions(const QuernRegion* list, int count) {
  regions.count = 0;
  for (int i = 0; i < count; ++i) regions.push(list[i]);
}

// As cuLaunchKernel: arguments[i] points to the value of parameter i. 0, or 1 with a message.
int quern_launch(const char* name, const unsigned* grid, const unsigned* block, unsigned shared, void** arguments) {
  const QuernFunction* f = quern_functions;
  while (f->name && std::strcmp(f->name, name)) ++f;
  failed = false, message[0] = 0, current = -1;
  threads = block[0] * block[1] * block[2];
  if (!f->name) {
    std::snprintf(message, sizeof message, "there is no function %s", name);
    return 1;
  }
  if (threads <= 0 || threads > 1024 || threads % 32) {
    std::snprintf(message, sizeof message, "%s: a block of %d threads; must be 32 to 1024, whole warps", name, threads);
    return 1;
  }
  entry = f->call, entry_arguments = arguments;
  static_bytes = __stop_quern_shared - __start_quern_shared;
  if (stacks_for < size_t(threads)) {
    if (stacks) munmap(stacks, stacks_for * STACK);
    stacks_for = threads;
    stacks = static_cast<char*>(mmap(nullptr, stacks_for * STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (stacks == MAP_FAILED) std::abort();
  }
  fibers.resize(threads);
  warps.resize(threads / 32);
  static_shadow.resize(static_bytes);
  dynamic_shadow.resize(shared);
  std::free(dynamic_start);
  dynamic_bytes = shared;
  dynamic_start = static_cast<char*>(std::aligned_alloc(1024, (shared + 1024) / 1024 * 1024));
  quern_thread.block_size = {block[0], block[1], block[2]};
  quern_thread.grid_size = {grid[0], grid[1], grid[2]};
  for (int i = 0; i < threads; ++i)
    fibers[i].thread = {i % block[0], i / block[0] % block[1], i / (block[0] * block[1])};
  for (unsigned z = 0; z < grid[2] && !failed; ++z)
    for (unsigned y = 0; y < grid[1] && !failed; ++y)
      for (unsigned x = 0; x < grid[0] && !failed; ++x) {
        quern_thread.block = {x, y, z};
        run_block();
      }
  return failed;
}
}
