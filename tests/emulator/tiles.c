/* What the emulator is tried with, compiled by another compiler than TVM's LLVM: `tiles NAME` does one thing.
   The names of mistakes must be refused; "products" prints nothing and leaves with 0 when all is right. */
#include <immintrin.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

extern int arch_prctl(int code, unsigned long argument); /* glibc has it, and no header for it */

enum { M = 5, K = 28, N = 11 }; /* rows and bytes of A; sums a row of C */

static struct __attribute__((packed)) {
    uint8_t palette, start_row, reserved[14];
    uint16_t colsb[16];
    uint8_t rows[16];
} config = {.palette = 1, .colsb = {4 * N, K, 4 * N}, .rows = {M, M, K / 4}};

static uint8_t a[M][64], b[K / 4][64];
static int32_t c[M][16], before[M][16];

static int32_t plain(int m, int n, int a_signed, int b_signed) {
    uint32_t sum = (uint32_t)before[m][n];
    for (int k = 0; k < K; k++) {
        uint8_t x = a[m][k], y = b[k / 4][4 * n + k % 4];
        sum += (uint32_t)((a_signed ? (int8_t)x : x) * (b_signed ? (int8_t)y : y));
    }
    return (int32_t)sum;
}

static int differ(int a_signed, int b_signed) {
    for (int m = 0; m < M; m++)
        for (int n = 0; n < 16; n++)
            if (c[m][n] != (n < N ? plain(m, n, a_signed, b_signed) : -1)) return 1;
    return 0;
}

#define TRY(instruction, a_signed, b_signed)                                                                         \
    memset(c, 255, sizeof c), _tile_loadd(0, before, 64), instruction(0, 1, 2), _tile_stored(0, c, 64);              \
    if (differ(a_signed, b_signed)) return 1

static int products(void) {
    for (size_t i = 0; i < sizeof a; i++) ((uint8_t *)a)[i] = (uint8_t)(i % 3 ? 0x80 + i % 5 : 0x7f);
    for (size_t i = 0; i < sizeof b; i++) ((uint8_t *)b)[i] = (uint8_t)(i % 4 ? 0xff - i % 7 : 0x80);
    for (int i = 0; i < M * 16; i++) before[i / 16][i % 16] = i % 2 ? INT32_MAX - i : -i; /* sums wrap */
    _tile_loadconfig(&config);
    uint8_t stored[64];
    _tile_storeconfig(stored);
    if (memcmp(stored, &config, 64)) return 2;
    _tile_loadd(1, a, 64), _tile_stream_loadd(2, b, 64);
    TRY(_tile_dpbssd, 1, 1);
    TRY(_tile_dpbsud, 1, 0);
    TRY(_tile_dpbusd, 0, 1);
    TRY(_tile_dpbuud, 0, 0);
    _tile_zero(0), _tile_stored(0, c, 64);
    for (int i = 0; i < M * 16; i++)
        if (c[i / 16][i % 16] != (i % 16 < N ? 0 : -1)) return 3;
    _tile_release();
    return 0;
}

/* Registers, memory, 128 bits. Only here: elsewhere the compiler would use the instructions for plain C. */
__attribute__((target("avxvnni"))) static int vnni(void) {
    uint8_t u[32];
    int8_t s[32];
    for (int i = 0; i < 32; i++) u[i] = (uint8_t)(255 - i), s[i] = (int8_t)(i % 2 ? -128 + i : 127 - i);
    __m256i sum = _mm256_set1_epi32(INT32_MAX), x = _mm256_loadu_si256((const __m256i *)u);
    volatile __m256i memory;
    memcpy((void *)&memory, s, 32);
    sum = _mm256_dpbusd_avx_epi32(sum, x, _mm256_loadu_si256((const __m256i *)s));
    __m256i again = _mm256_dpbusd_avx_epi32(_mm256_setzero_si256(), x, memory);
    __m128i low = _mm_dpbusd_avx_epi32(_mm_setzero_si128(), _mm256_castsi256_si128(x), _mm256_castsi256_si128(memory));
    int32_t got[3][8] = {{0}};
    memcpy(got[0], &sum, 32), memcpy(got[1], &again, 32), memcpy(got[2], &low, 16);
    for (int i = 0; i < 8; i++) {
        int32_t want = 0;
        for (int j = 0; j < 4; j++) want += u[4 * i + j] * s[4 * i + j];
        if (got[0][i] != (int32_t)((uint32_t)INT32_MAX + (uint32_t)want) || got[1][i] != want) return 1;
        if (got[2][i] != (i < 4 ? want : 0)) return 2;
    }
    return 0;
}

static int is(const char *name, const char *what) { return !strcmp(name, what); }

int main(int argc, char **argv) {
    const char *name = argc > 1 ? argv[1] : "";
    if (is(name, "vnni")) return vnni();
    if (!is(name, "no permission")) {
        int refused = arch_prctl(0x1023, 18);
        if (is(name, "refused")) return refused ? 0 : 1;
    }
    if (is(name, "products")) return products();
    if (is(name, "palette")) config.palette = 2;
    if (is(name, "reserved")) config.reserved[13] = 1;
    if (is(name, "too wide")) config.colsb[1] = 65;
    if (is(name, "too high")) config.rows[1] = 17;
    if (is(name, "tile 8")) config.colsb[8] = 4;
    if (is(name, "rows only")) config.colsb[1] = 0;
    if (is(name, "colsb")) config.colsb[1] = K + 2;
    if (is(name, "rows of sum")) config.rows[0] = M + 1;
    if (is(name, "columns of sum")) config.colsb[0] = 4 * N + 4;
    if (is(name, "inner")) config.rows[2] = K / 4 + 1;
    if (!is(name, "not configured")) _tile_loadconfig(&config);
    if (is(name, "released")) _tile_release();
    if (is(name, "unused tile")) _tile_zero(3);
    if (is(name, "same tile")) __asm__ volatile(".byte 0xc4, 0xe2, 0x73, 0x5e, 0xc1"); /* assemblers refuse it */
    else _tile_dpbssd(0, 1, 2);
    if (is(name, "foreign")) __asm__ volatile("ud2");
    return 0;
}
