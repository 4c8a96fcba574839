/* What a driver knows of a kernel before it runs: read from PTX text or from machine code (an ELF file). */
#ifndef MOCK_DEVICE_CODE_H
#define MOCK_DEVICE_CODE_H
#include <stddef.h>
#include <stdint.h>

enum { NAME_BYTES = 256 };
typedef struct {
  char name[NAME_BYTES];
  unsigned parameters;    /* each of 8 bytes: our kernels take pointers only */
  unsigned static_shared; /* bytes */
  unsigned bound;         /* threads of a block by __launch_bounds__; 0: none */
  unsigned registers;     /* of a thread; 0: PTX does not say */
} kernel_facts;
typedef struct { kernel_facts *kernels; size_t count; } code_facts;

code_facts read_ptx(const char *text);
code_facts read_machine_code(const unsigned char *image);

/* By compute capability: bytes of shared memory that a block may have if it asks, registers of a block. */
unsigned most_shared(int sm);
unsigned registers_of_block(int sm);
/* The PTX version that a driver of this CUDA version reads, 74 for 7.4: PTX ISA manual, release history. */
int ptx_version_of(int driver);
#endif
