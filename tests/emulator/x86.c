/* Instructions that this CPU lacks, executed by a SIGILL handler: AMX tiles with int8 products, and VEX-encoded VPDPBUSD.

   Loading the library installs the handler. It decodes the faulting instruction, does to the thread's registers, memory
   and tiles what the Intel SDM (volume 2, "Operation" of each instruction) says, and skips it. Whatever a real CPU would
   refuse with #UD or #GP ends the process with status 99 and one line on stderr, and so does a tile instruction before
   permission was asked for (Linux: Documentation/arch/x86/xstate.rst). Preloaded, the library also answers arch_prctl:
   ARCH_REQ_XCOMP_PERM succeeds, or fails with EOPNOTSUPP where QUERN_EMULATOR_REFUSES is set. */
#define _GNU_SOURCE
#include <cpuid.h>
#include <errno.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

enum { TILES = 8, ROWS = 16, BYTES = 64 };
enum { ARCH_GET_XCOMP_SUPP = 0x1021, ARCH_REQ_XCOMP_PERM = 0x1023, XTILEDATA = 18 };
enum { NONE = 0, P66 = 1, PF3 = 2, PF2 = 3 };

static __thread struct {
    int configured;
    uint8_t config[64];
    uint8_t data[TILES][ROWS][BYTES];
} tiles;

static volatile int permitted;
static struct sigaction before;

/* What has been executed, by all threads: a test can see that the emulated path ran, and how often. */
uint64_t emulated_configurations, emulated_releases, emulated_products, emulated_vnni;

static void fail(const char *what, const char *why) {
    char text[200];
    int size = snprintf(text, sizeof text, "emulator: %s: %s\n", what, why);
    if (write(2, text, (size_t)size) != size) _exit(98);
    _exit(99);
}

static void count(uint64_t *counter) { __atomic_fetch_add(counter, 1, __ATOMIC_RELAXED); }

long emulated_arch_prctl(int code, unsigned long argument) {
    if (code == ARCH_REQ_XCOMP_PERM && argument == XTILEDATA) {
        if (getenv("QUERN_EMULATOR_REFUSES")) {
            errno = EOPNOTSUPP;
            return -1;
        }
        permitted = 1;
        return 0;
    }
    if (code == ARCH_GET_XCOMP_SUPP) {
        *(uint64_t *)argument = getenv("QUERN_EMULATOR_REFUSES") ? 0 : 3ull << 17;
        return 0;
    }
    return syscall(SYS_arch_prctl, code, argument);
}

int arch_prctl(int code, unsigned long argument) { return (int)emulated_arch_prctl(code, argument); }

static int colsb(int tile) { return tiles.config[16 + 2 * tile] | tiles.config[17 + 2 * tile] << 8; }
static int rows(int tile) { return tiles.config[48 + tile]; }

static int any(const uint8_t *bytes, int from, int to) {
    for (int i = from; i < to; i++)
        if (bytes[i]) return 1;
    return 0;
}

static void configure(const uint8_t *m) {
    memset(&tiles, 0, sizeof tiles);
    if (m[0] == 0) return; /* palette 0: like TILERELEASE */
    if (m[0] != 1) fail("LDTILECFG", "#GP: unknown palette");
    if (m[1] != 0) fail("LDTILECFG", "start_row is not 0, which only an interrupted load leaves");
    if (any(m, 2, 16)) fail("LDTILECFG", "#GP: reserved bytes 2..15 are not zero");
    if (any(m, 32, 48)) fail("LDTILECFG", "#GP: colsb of tiles 8..15 is not zero");
    if (any(m, 56, 64)) fail("LDTILECFG", "#GP: rows of tiles 8..15 are not zero");
    memcpy(tiles.config, m, sizeof tiles.config);
    for (int t = 0; t < TILES; t++) {
        if (colsb(t) > BYTES) fail("LDTILECFG", "#GP: colsb above 64");
        if (rows(t) > ROWS) fail("LDTILECFG", "#GP: rows above 16");
        if (!colsb(t) != !rows(t)) fail("LDTILECFG", "#GP: a tile with rows or columns, but not both");
    }
    tiles.configured = 1;
    count(&emulated_configurations);
}

static void usable(const char *what, int tile) {
    if (!tiles.configured) fail(what, "#UD: tiles are not configured");
    if (tile >= TILES) fail(what, "#UD: no such tile");
    if (!rows(tile)) fail(what, "#UD: a tile of size 0");
}

static void product(int d, int a, int b, int a_signed, int b_signed) {
    const char *what = "TDP";
    usable(what, d), usable(what, a), usable(what, b);
    if (d == a || d == b || a == b) fail(what, "#UD: the same tile twice");
    if (colsb(d) % 4 || colsb(a) % 4 || colsb(b) % 4) fail(what, "#UD: colsb is no multiple of 4");
    if (rows(d) != rows(a)) fail(what, "#UD: rows of the sum and the first factor differ");
    if (colsb(d) != colsb(b)) fail(what, "#UD: columns of the sum and the second factor differ");
    if (colsb(a) / 4 != rows(b)) fail(what, "#UD: columns of the first and rows of the second factor differ");
    for (int m = 0; m < rows(d); m++) {
        int32_t sum[BYTES / 4];
        memcpy(sum, tiles.data[d][m], BYTES);
        for (int k = 0; k < colsb(a) / 4; k++)
            for (int n = 0; n < colsb(d) / 4; n++)
                for (int i = 0; i < 4; i++) {
                    int x = tiles.data[a][m][4 * k + i], y = tiles.data[b][k][4 * n + i];
                    x = a_signed ? (int8_t)x : x, y = b_signed ? (int8_t)y : y;
                    sum[n] = (int32_t)((uint32_t)sum[n] + (uint32_t)(x * y));
                }
        memset(tiles.data[d][m], 0, BYTES);
        memcpy(tiles.data[d][m], sum, (size_t)colsb(d));
    }
    memset(tiles.data[d][rows(d)], 0, (size_t)(ROWS - rows(d)) * BYTES);
    count(&emulated_products);
}

typedef struct {
    int r, x, b, map, w, vvvv, l, pp; /* fields of the VEX prefix, inverted ones turned right */
    uint8_t opcode;
    int mod, reg, rm, has_sib;
    const uint8_t *end; /* first byte after the instruction */
    uint64_t address, stride; /* of the memory operand; stride: what the index register adds for every row */
} Instruction;

static uint64_t general(const ucontext_t *context, int number) {
    static const int place[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                  REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
    return (uint64_t)context->uc_mcontext.gregs[place[number]];
}

/* Returns 0 for anything but a VEX instruction of map 0F38. With no immediate, the operand ends the instruction. */
static int decode(const ucontext_t *context, Instruction *in) {
    const uint8_t *p = (const uint8_t *)context->uc_mcontext.gregs[REG_RIP];
    if (p[0] != 0xC4) return 0;
    memset(in, 0, sizeof *in);
    in->r = !(p[1] >> 7), in->x = !(p[1] >> 6 & 1), in->b = !(p[1] >> 5 & 1), in->map = p[1] & 31;
    in->w = p[2] >> 7, in->vvvv = ~(p[2] >> 3) & 15, in->l = p[2] >> 2 & 1, in->pp = p[2] & 3;
    in->opcode = p[3];
    in->mod = p[4] >> 6, in->reg = p[4] >> 3 & 7, in->rm = p[4] & 7;
    p += 5;
    if (in->map != 2 || in->w) return 0;
    if (in->mod != 3) {
        uint64_t base = 0;
        int relative = 0, displacement = in->mod == 1 ? 1 : in->mod == 2 ? 4 : 0;
        if (in->rm == 4) {
            int index = (*p >> 3 & 7) | in->x << 3, low = *p & 7;
            in->has_sib = 1;
            in->stride = index == 4 ? 0 : general(context, index) << (*p >> 6);
            if (low == 5 && in->mod == 0) displacement = 4;
            else base = general(context, low | in->b << 3);
            p++;
        } else if (in->rm == 5 && in->mod == 0) {
            displacement = 4, relative = 1;
        } else {
            base = general(context, in->rm | in->b << 3);
        }
        int32_t far;
        memcpy(&far, p, 4);
        int64_t offset = displacement == 1 ? *(const int8_t *)p : displacement == 4 ? far : 0;
        p += displacement;
        in->address = base + (uint64_t)offset + (relative ? (uint64_t)p : 0);
    }
    in->end = p;
    return 1;
}

static int tile_instruction(const Instruction *in) {
    int memory = in->mod != 3, key = in->opcode << 8 | in->pp << 4 | memory;
    int rrr = in->reg | in->r << 3;
    if (in->l || (in->opcode != 0x49 && in->opcode != 0x4B && in->opcode != 0x5E)) return 0;
    if (in->opcode != 0x5E && in->vvvv) fail("tile instruction", "#UD: VEX.vvvv is used");
    if (in->opcode == 0x4B && !in->has_sib) fail("tile instruction", "#UD: a tile in memory needs a SIB byte");
    if (in->opcode == 0x5E && (memory || rrr > 7 || in->b)) fail("TDP", "#UD: operands must be tiles 0..7");
    if (!permitted) fail("tile instruction", "SIGILL: before permission was asked for");
    switch (key) {
    case 0x49 << 8 | NONE << 4 | 1: configure((const uint8_t *)(in->address + in->stride)); return 1;
    case 0x49 << 8 | P66 << 4 | 1: memcpy((void *)(in->address + in->stride), tiles.config, 64); return 1;
    case 0x49 << 8 | NONE << 4 | 0:
        memset(&tiles, 0, sizeof tiles);
        count(&emulated_releases);
        return 1;
    case 0x49 << 8 | PF2 << 4 | 0:
        usable("TILEZERO", rrr);
        memset(tiles.data[rrr], 0, sizeof tiles.data[rrr]);
        return 1;
    case 0x4B << 8 | PF2 << 4 | 1:
    case 0x4B << 8 | P66 << 4 | 1: /* T1 is a hint */
        usable("TILELOADD", rrr);
        memset(tiles.data[rrr], 0, sizeof tiles.data[rrr]);
        for (int r = 0; r < rows(rrr); r++)
            memcpy(tiles.data[rrr][r], (const void *)(in->address + (uint64_t)r * in->stride), (size_t)colsb(rrr));
        return 1;
    case 0x4B << 8 | PF3 << 4 | 1:
        usable("TILESTORED", rrr);
        for (int r = 0; r < rows(rrr); r++)
            memcpy((void *)(in->address + (uint64_t)r * in->stride), tiles.data[rrr][r], (size_t)colsb(rrr));
        return 1;
    case 0x5E << 8 | PF2 << 4: product(rrr, in->rm, in->vvvv, 1, 1); return 1;
    case 0x5E << 8 | PF3 << 4: product(rrr, in->rm, in->vvvv, 1, 0); return 1;
    case 0x5E << 8 | P66 << 4: product(rrr, in->rm, in->vvvv, 0, 1); return 1;
    case 0x5E << 8 | NONE << 4: product(rrr, in->rm, in->vvvv, 0, 0); return 1;
    }
    return 0;
}

/* Where a signal frame keeps the halves of vector register `number`. The frame has XSAVE's standard format: legacy area
   of 512 bytes, header with the bits of the components in use, then each component where CPUID leaf 0xD says. */
static unsigned component_offset[7];

static void find_components(void) { /* once: in a virtual machine CPUID takes 20 us */
    for (int bit = 2; bit < 7; bit++) {
        unsigned size, offset, c, d;
        __cpuid_count(0xD, bit, size, offset, c, d);
        component_offset[bit] = size ? offset : 0;
    }
    component_offset[1] = 160;
}

static uint8_t *component(ucontext_t *context, int bit, int number, int bytes) {
    unsigned offset = component_offset[bit];
    return offset ? (uint8_t *)context->uc_mcontext.fpregs + offset + number * bytes : NULL;
}

static void read_ymm(ucontext_t *context, int number, uint8_t *value) {
    uint64_t used;
    memcpy(&used, (uint8_t *)context->uc_mcontext.fpregs + 512, 8);
    for (int half = 0; half < 2; half++) {
        if (used >> (half + 1) & 1) memcpy(value + 16 * half, component(context, half + 1, number, 16), 16);
        else memset(value + 16 * half, 0, 16);
    }
}

static void write_ymm(ucontext_t *context, int number, const uint8_t *value, int bytes) {
    uint64_t used;
    uint8_t *header = (uint8_t *)context->uc_mcontext.fpregs + 512, *above = component(context, 6, number, 32);
    memcpy(&used, header, 8);
    for (int bit = 1; bit <= 2; bit++)
        if (!(used >> bit & 1)) memset(component(context, bit, 0, 16), 0, 16 * 16);
    used |= 6;
    memcpy(header, &used, 8);
    memcpy(component(context, 1, number, 16), value, 16);
    if (bytes == 32) memcpy(component(context, 2, number, 16), value + 16, 16);
    else memset(component(context, 2, number, 16), 0, 16);
    if (above && used >> 6 & 1) memset(above, 0, 32);
}

/* VPDPBUSD and VPDPBUSDS are opcodes 50 and 51; only the first is emulated. */
static int vnni_instruction(ucontext_t *context, const Instruction *in) {
    if (in->opcode != 0x50 || in->pp != P66) return 0;
    int bytes = in->l ? 32 : 16, d = in->reg | in->r << 3;
    uint8_t u[32], s[32];
    int32_t sum[8];
    read_ymm(context, d, (uint8_t *)sum);
    read_ymm(context, in->vvvv, u);
    if (in->mod == 3) read_ymm(context, in->rm | in->b << 3, s);
    else memcpy(s, (const void *)(in->address + in->stride), (size_t)bytes);
    for (int i = 0; i < bytes; i++)
        sum[i / 4] = (int32_t)((uint32_t)sum[i / 4] + (uint32_t)(u[i] * (int8_t)s[i]));
    write_ymm(context, d, (const uint8_t *)sum, bytes);
    count(&emulated_vnni);
    return 1;
}

static void handle(int number, siginfo_t *info, void *raw) {
    ucontext_t *context = raw;
    Instruction in;
    if (decode(context, &in) && (tile_instruction(&in) || vnni_instruction(context, &in))) {
        context->uc_mcontext.gregs[REG_RIP] = (greg_t)in.end;
        return;
    }
    if (before.sa_flags & SA_SIGINFO) before.sa_sigaction(number, info, raw);
    else if (before.sa_handler != SIG_DFL && before.sa_handler != SIG_IGN) before.sa_handler(number);
    else fail("SIGILL", "an instruction that is not emulated");
}

__attribute__((constructor)) static void install(void) {
    struct sigaction action;
    find_components();
    memset(&action, 0, sizeof action);
    action.sa_sigaction = handle;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigemptyset(&action.sa_mask);
    if (sigaction(SIGILL, &action, &before)) fail("sigaction", "cannot be installed");
}
