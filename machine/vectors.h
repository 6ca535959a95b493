/* Vectors of as many fp32 numbers as a register of this processor holds, and what is computed with them. Included by the
   C files of training and of inference.

   GCC's and Clang's vector extensions choose the instructions of AVX-512, AVX2, NEON or SSE2, but for a few that they do
   not find. Wider vectors than the registers would be compared number by number. */

#ifndef LANES
#include <math.h>
#include <stdint.h>
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
#define UNROLL _Pragma("GCC unroll 8") /* or the sums would live in memory */
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
typedef int32_t int_vec __attribute__((vector_size(4 * LANES)));

INLINE vec load_vec_fp32(const void *row, long k) {
    vec v;
    memcpy(&v, (const float *)row + k, sizeof v);
    return v;
}
INLINE vec spread(float x) { return x - (vec){0}; } /* x + 0 would be another number for −0 */
INLINE void store_vec(float *to, vec v) { memcpy(to, &v, sizeof v); }

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

INLINE vec larger_of(vec a, vec b) { /* of each lane; NaN in b stays */
    int_vec larger = a > b;
    return (vec)((larger & (int_vec)a) | (~larger & (int_vec)b));
}

INLINE float largest_lane(vec v) {
    float largest = v[0];
    for (int lane = 1; lane < LANES; lane++) largest = v[lane] > largest ? v[lane] : largest;
    return largest;
}

INLINE float total(vec v) { /* of its lanes, one after another */
    float sum = 0;
    for (int lane = 0; lane < LANES; lane++) sum += v[lane];
    return sum;
}

INLINE vec exponential(vec x) { /* of x <= 88; relative error below 3e-7 */
    x = larger_of((vec){0} - 87.0f, x);
    const float magic = 12582912.0f; /* adding 1.5 * 2^23 rounds to a whole number */
    vec n = (x * 1.44269504f + magic) - magic;
    vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f; /* x = n ln 2 + r, |r| <= ln(2) / 2 */
    vec p = r * 1.38888889e-3f + 8.33333333e-3f;
    p = p * r + 4.16666667e-2f;
    p = p * r + 1.66666667e-1f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return p * (vec)((__builtin_convertvector(n, int_vec) + 127) << 23);
}

INLINE vec sigmoid(vec x) { return 1.0f / (1.0f + exponential(-larger_of((vec){0} - 88.0f, x))); }
#endif
