/* See device_code.h. Fields of machine code are those that NVRTC 11.8 writes for sm_53 to sm_90; tests/codegen compares
 * them with what ptxas says of the same kernels. */
#include "device_code.h"

#include <stdlib.h>
#include <string.h>

enum { /* .nv.info: attributes, each of a format byte, a number byte and 16 bits: a value, or the size of what follows */
  SIZED = 4, LAUNCH_BOUND = 0x05, PARAMETER_BYTES = 0x19, REGISTERS = 0x2f,
  RESERVED_SHARED = 1024 /* from sm_90 on the section of shared memory holds what CUDA keeps for itself, too */
};

static kernel_facts *another(code_facts *found, const char *name, size_t length) {
  found->kernels = realloc(found->kernels, (found->count + 1) * sizeof *found->kernels);
  kernel_facts *made = memset(&found->kernels[found->count++], 0, sizeof *made);
  memcpy(made->name, name, length < NAME_BYTES ? length : NAME_BYTES - 1);
  return made;
}

/* How often `word` stands in a stretch of text. */
static unsigned count(const char *from, const char *end, const char *word) {
  unsigned found = 0;
  for (const char *at = from; (at = strstr(at, word)) && at < end; at += strlen(word)) found++;
  return found;
}

code_facts read_ptx(const char *text) {
  code_facts found = {0};
  for (const char *at = text; (at = strstr(at, ".entry "));) {
    const char *name = at + 7, *open = strchr(name, '('), *close = strchr(open, ')'), *body = strchr(close, '{');
    const char *end = strstr(body, "\n}");
    kernel_facts *made = another(&found, name, (size_t)(open - name));
    made->parameters = count(open, close, ".param");
    const char *bound = strstr(close, ".maxntid ");
    if (bound && bound < body) {
      char *next = (char *)bound + 9;
      made->bound = (unsigned)strtoul(next, &next, 10);
      while (*next == ',') made->bound *= (unsigned)strtoul(next + 1, &next, 10);
    }
    for (const char *shared = body; (shared = strstr(shared, "\t.shared .align ")) && shared < end; shared++) {
      unsigned align = (unsigned)strtoul(shared + 16, NULL, 10);
      const char *size = strchr(shared, '[');
      made->static_shared = (made->static_shared + align - 1) / align * align + (unsigned)strtoul(size + 1, NULL, 10);
    }
    at = end;
  }
  return found;
}

static uint64_t number(const unsigned char *at, int bytes) {
  uint64_t value = 0;
  memcpy(&value, at, (size_t)bytes);
  return value;
}

typedef struct { const char *name; const unsigned char *at; uint64_t bytes; uint32_t info; } section;

static section section_of(const unsigned char *image, uint64_t index) {
  const unsigned char *headers = image + number(image + 40, 8);
  const unsigned char *h = headers + 64 * index, *names = headers + 64 * number(image + 62, 2);
  return (section){(const char *)image + number(names + 24, 8) + number(h, 4), image + number(h + 24, 8),
                   number(h + 32, 8), (uint32_t)number(h + 44, 4)};
}

static const char *behind(const char *name, const char *start) {
  size_t length = strlen(start);
  return strncmp(name, start, length) ? NULL : name + length;
}

/* The value of an attribute in a section of .nv.info: of a sized one for `symbol`, where its first word must be that. */
static uint64_t attribute(section s, int wanted, int64_t symbol, uint64_t otherwise) {
  for (const unsigned char *at = s.at; at < s.at + s.bytes;) {
    int format = at[0], which = at[1];
    uint64_t value = number(at + 2, 2);
    const unsigned char *more = at + 4;
    at = more + (format == SIZED ? value : 0);
    if (which != wanted) continue;
    if (format != SIZED) return value;
    if (which == LAUNCH_BOUND) return number(more, 4) * number(more + 4, 4) * number(more + 8, 4);
    if (symbol < 0 || number(more, 4) == (uint64_t)symbol) return number(more + 4, 4);
  }
  return otherwise;
}

code_facts read_machine_code(const unsigned char *image) {
  code_facts found = {0};
  uint64_t sections = number(image + 60, 2);
  section all = {0};
  for (uint64_t i = 0; i < sections; i++)
    if (!strcmp(section_of(image, i).name, ".nv.info")) all = section_of(image, i);
  for (uint64_t i = 0; i < sections; i++) {
    section code = section_of(image, i);
    const char *name = behind(code.name, ".text.");
    if (!name) continue;
    kernel_facts *made = another(&found, name, strlen(name));
    made->registers = (unsigned)attribute(all, REGISTERS, code.info & 0xffffff, 0);
    for (uint64_t j = 0; j < sections; j++) {
      section s = section_of(image, j);
      const char *of = behind(s.name, ".nv.info."), *shared = behind(s.name, ".nv.shared.");
      if (of && !strcmp(of, name)) {
        made->parameters = (unsigned)attribute(s, PARAMETER_BYTES, -1, 0) / 8;
        made->bound = (unsigned)attribute(s, LAUNCH_BOUND, -1, 0);
      }
      if (shared && !strcmp(shared, name))
        made->static_shared = (unsigned)s.bytes - (image[48] >= 90 ? RESERVED_SHARED : 0);
    }
  }
  return found;
}

/* CUDA C++ programming guide, technical specifications per compute capability. */
unsigned most_shared(int sm) {
  static const struct { int sm; unsigned kib; } known[] = {
      {70, 96}, {72, 96}, {75, 64}, {80, 163}, {86, 99}, {87, 163}, {89, 99}, {90, 227}, {100, 227}};
  for (size_t i = 0; i < sizeof known / sizeof *known; i++)
    if (known[i].sm == sm) return known[i].kib << 10;
  return 48 << 10;
}

unsigned registers_of_block(int sm) { return sm == 53 || sm == 62 ? 32 << 10 : 64 << 10; }

int ptx_version_of(int driver) {
  int major = driver / 1000, minor = driver % 1000 / 10;
  return major == 10 ? 63 + minor : 10 * (major - 4) + minor;
}
