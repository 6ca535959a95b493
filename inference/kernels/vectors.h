/* Vectors of as many fp32 numbers as a register of this processor holds: AVX-512, AVX2, NEON or SSE2. GCC's and Clang's
   vector extensions choose the instructions, but for a few that they do not find. */

#ifndef LANES
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 6") /* or the sums would live in memory */
#if defined(__AVX512F__)
#define KEEP_IN_REGISTER(v) __asm__("" : "+v"(v)) /* GCC would load it again for each use */
#elif defined(__x86_64__)
#define KEEP_IN_REGISTER(v) __asm__("" : "+x"(v))
#elif defined(__aarch64__)
#define KEEP_IN_REGISTER(v) __asm__("" : "+w"(v))
#else
#define KEEP_IN_REGISTER(v)
#endif

INLINE long at_most(long count, long limit) { return count < limit ? count : limit; }

typedef float vec __attribute__((vector_size(4 * LANES)));

INLINE vec load_vec_fp32(const void *row, long k) {
    vec v;
    memcpy(&v, (const float *)row + k, sizeof v);
    return v;
}

/* sum + a · b, rounded once. Left to itself, a compiler rounds once in some tiles and twice in others, and a row would not
   give the same in both. */
INLINE vec add_product(vec sum, vec a, vec b) {
#if LANES == 16
    return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
#elif LANES == 8 && defined(__FMA__)
    return (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
#elif defined(__aarch64__)
    return (vec)vfmaq_f32((float32x4_t)sum, (float32x4_t)a, (float32x4_t)b);
#else
    return sum + a * b;
#endif
}
#endif
