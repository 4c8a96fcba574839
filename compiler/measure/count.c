/* A plugin for qemu-user: how often every instruction was executed, exactly.
 *
 *     qemu-aarch64 -plugin libcount.so,out=FILE PROGRAM
 *
 * FILE gets a line "address word count" (hexadecimal, hexadecimal, decimal) for every instruction that ran.
 * Plugin interface version 1 (qemu 6.0 to 8.2, docs/devel/tcg-plugins.rst). Debian packages no header for it, so what is
 * used of it is declared here. Counts are exact for programs of one thread. */
#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))
typedef uint64_t plugin_id;
struct qemu_plugin_tb;
struct qemu_plugin_insn;
enum { INLINE_ADD_U64 = 0 };
EXPORT int qemu_plugin_version = 1;
extern void qemu_plugin_register_vcpu_tb_trans_cb(plugin_id, void (*)(plugin_id, struct qemu_plugin_tb *));
extern size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *);
extern struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *, size_t);
extern const void *qemu_plugin_insn_data(const struct qemu_plugin_insn *);
extern size_t qemu_plugin_insn_size(const struct qemu_plugin_insn *);
extern uint64_t qemu_plugin_insn_vaddr(const struct qemu_plugin_insn *);
extern void qemu_plugin_register_vcpu_insn_exec_inline(struct qemu_plugin_insn *, int, void *, uint64_t);
extern void qemu_plugin_register_atexit_cb(plugin_id, void (*)(plugin_id, void *), void *);

typedef struct entry {
  uint64_t address, count;
  uint32_t word;
  struct entry *next;
} entry;
enum { BUCKETS = 1 << 16 };
static entry *table[BUCKETS];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static const char *path;

static entry *entry_of(uint64_t address, uint32_t word) {
  entry **bucket = &table[address / 2 % BUCKETS]; /* RISC-V instructions may have two bytes */
  for (entry *e = *bucket; e; e = e->next)
    if (e->address == address && e->word == word) return e;
  entry *made = calloc(1, sizeof *made);
  if (!made) abort();
  *made = (entry){address, 0, word, *bucket};
  return *bucket = made;
}

/* Called once for each stretch of code that qemu translates, maybe again for the same code. */
static void translated(plugin_id id, struct qemu_plugin_tb *tb) {
  (void)id;
  pthread_mutex_lock(&lock);
  size_t count = qemu_plugin_tb_n_insns(tb);
  for (size_t i = 0; i < count; i++) {
    struct qemu_plugin_insn *insn = qemu_plugin_tb_get_insn(tb, i);
    uint32_t word = 0;
    size_t bytes = qemu_plugin_insn_size(insn);
    memcpy(&word, qemu_plugin_insn_data(insn), bytes < sizeof word ? bytes : sizeof word);
    entry *e = entry_of(qemu_plugin_insn_vaddr(insn), word);
    qemu_plugin_register_vcpu_insn_exec_inline(insn, INLINE_ADD_U64, &e->count, 1);
  }
  pthread_mutex_unlock(&lock);
}

static void finished(plugin_id id, void *nothing) {
  (void)id, (void)nothing;
  FILE *out = fopen(path, "w");
  if (!out) return;
  for (size_t bucket = 0; bucket < BUCKETS; bucket++)
    for (const entry *e = table[bucket]; e; e = e->next)
      if (e->count) fprintf(out, "%llx %08x %llu\n", (unsigned long long)e->address, e->word, (unsigned long long)e->count);
  fclose(out);
}

EXPORT int qemu_plugin_install(plugin_id id, const void *info, int argc, char **argv) {
  (void)info;
  for (int i = 0; i < argc; i++)
    if (!strncmp(argv[i], "out=", 4)) path = strdup(argv[i] + 4);
  if (!path) return -1;
  qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
  qemu_plugin_register_atexit_cb(id, finished, NULL);
  return 0;
}
