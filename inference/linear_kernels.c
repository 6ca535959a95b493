/* y = x Wᵀ for inference: x in fp32, W in int8, fp16, bf16 or fp32, as it lies in memory.

   With one row of x the time is that of reading W, so W is read once, in order, each core its own part of the rows.
   With more rows a tile of W_ROWS rows of W and X_ROWS rows of x is multiplied in registers, so that W still comes from
   memory once, and every number that is loaded is used several times.

   A row of x meets the same additions in the same order in whatever tile it is: what it gives does not depend on its
   neighbours, to the last bit. GCC's and Clang's vector extensions become AVX-512, AVX2 or NEON by themselves. */

#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define LANES 16
#define X_ROWS 4 /* 4 · 4 sums, 4 + 4 operands: 32 registers hold them */
#elif defined(__AVX__)
#define LANES 8
#define X_ROWS 2 /* 16 registers */
#else
#define LANES 4
#define X_ROWS 4
#endif
#define W_ROWS 4
#define AHEAD 16384 /* bytes; the processor itself foresees only the next few cache lines of a row */
#define UNROLL _Pragma("GCC unroll 4") /* or the sums would live in memory */
#if defined(__AVX512F__)
#define KEEP_IN_REGISTER(v) __asm__("" : "+v"(v)) /* GCC would load it again for each use */
#elif defined(__x86_64__)
#define KEEP_IN_REGISTER(v) __asm__("" : "+x"(v))
#elif defined(__aarch64__)
#define KEEP_IN_REGISTER(v) __asm__("" : "+w"(v))
#else
#define KEEP_IN_REGISTER(v)
#endif
#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef float quarter __attribute__((vector_size(16)));
typedef int32_t int_vec __attribute__((vector_size(4 * LANES)));
typedef int16_t short_vec __attribute__((vector_size(2 * LANES)));
typedef int8_t byte_vec __attribute__((vector_size(LANES)));

/* LANES weights from number k of a row on, as fp32; and a single one, for the end of a row. */
typedef vec (*load_vec_fn)(const void *row, long k);
typedef float (*load_one_fn)(const void *row, long k);

INLINE vec load_vec_fp32(const void *row, long k) {
    vec v;
    memcpy(&v, (const float *)row + k, sizeof v);
    return v;
}
INLINE float load_one_fp32(const void *row, long k) { return ((const float *)row)[k]; }

INLINE vec load_vec_int8(const void *row, long k) {
    const int8_t *p = (const int8_t *)row + k;
#if defined(__AVX512F__) /* GCC makes of the general way below a loop over single numbers */
    return (vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
#elif defined(__AVX2__)
    return (vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
#else
    byte_vec v;
    memcpy(&v, p, sizeof v);
    return __builtin_convertvector(__builtin_convertvector(v, int_vec), vec);
#endif
}
INLINE float load_one_int8(const void *row, long k) { return ((const int8_t *)row)[k]; }

/* bf16 is the upper half of an fp32 number. */
INLINE vec load_vec_bf16(const void *row, long k) {
    const int16_t *p = (const int16_t *)row + k;
#if defined(__AVX512F__)
    return (vec)_mm512_slli_epi32(_mm512_cvtepi16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16);
#elif defined(__AVX2__)
    return (vec)_mm256_slli_epi32(_mm256_cvtepi16_epi32(_mm_loadu_si128((const __m128i *)p)), 16);
#else
    short_vec v;
    memcpy(&v, p, sizeof v);
    return (vec)(__builtin_convertvector(v, int_vec) << 16);
#endif
}
INLINE float load_one_bf16(const void *row, long k) {
    uint32_t bits = (uint32_t)((const uint16_t *)row)[k] << 16;
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

#if defined(__F16C__) /* x86 */
INLINE vec load_vec_fp16(const void *row, long k) {
    const uint16_t *p = (const uint16_t *)row + k;
#if LANES == 16
    return (vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
#else
    return (vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
#endif
}
INLINE float load_one_fp16(const void *row, long k) { return _cvtsh_ss(((const uint16_t *)row)[k]); }
#define HAS_FP16
#elif defined(__aarch64__)
typedef __fp16 half_vec __attribute__((vector_size(2 * LANES)));
INLINE vec load_vec_fp16(const void *row, long k) {
    half_vec v;
    memcpy(&v, (const __fp16 *)row + k, sizeof v);
    return __builtin_convertvector(v, vec);
}
INLINE float load_one_fp16(const void *row, long k) { return ((const __fp16 *)row)[k]; }
#define HAS_FP16
#endif

/* The last numbers of a row, fewer than LANES, filled up with zeros. */
INLINE vec load_rest(const void *row, long k, long n_in, load_one_fn load_one) {
    float lanes[LANES] = {0};
    vec v;
    for (long i = 0; k + i < n_in; i++) lanes[i] = load_one(row, k + i);
    memcpy(&v, lanes, sizeof v);
    return v;
}

/* Four numbers that sum up to what the lanes of v sum up to. */
INLINE quarter quarters(vec v) {
    quarter parts[LANES / 4], sum;
    memcpy(parts, &v, sizeof v);
    sum = parts[0];
    for (int i = 1; i < LANES / 4; i++) sum += parts[i];
    return sum;
}

/* The products of x_rows rows of x with w_rows rows of W; both counts are constants at each call. What lies `ahead`
   bytes further in W is asked for meanwhile. */
INLINE void tile(int x_rows, int w_rows, const float *x, const char *w, const float *scale, const float *bias, float *y,
                 long n_out, long n_in, long bytes, long ahead, load_vec_fn load_vec, load_one_fn load_one) {
    vec sums[X_ROWS][W_ROWS] = {{{0}}};
    long k = 0, row_bytes = n_in * bytes;
    for (; k + LANES <= n_in; k += LANES) {
        vec weights[W_ROWS];
        UNROLL for (int j = 0; j < w_rows; j++) {
            weights[j] = load_vec(w + j * row_bytes, k);
            __builtin_prefetch(w + j * row_bytes + k * bytes + ahead);
            if (x_rows > 1) KEEP_IN_REGISTER(weights[j]);
        }
        UNROLL for (int i = 0; i < x_rows; i++) {
            vec inputs = load_vec_fp32(x + i * n_in, k);
            KEEP_IN_REGISTER(inputs);
            UNROLL for (int j = 0; j < w_rows; j++) sums[i][j] += inputs * weights[j];
        }
    }
    if (k < n_in)
        UNROLL for (int j = 0; j < w_rows; j++) {
            vec weights = load_rest(w + j * row_bytes, k, n_in, load_one);
            UNROLL for (int i = 0; i < x_rows; i++)
                sums[i][j] += load_rest(x + i * n_in, k, n_in, load_one_fp32) * weights;
        }
    UNROLL for (int i = 0; i < x_rows; i++)
        UNROLL for (int j = 0; j < w_rows; j++) {
            quarter four = quarters(sums[i][j]);
            float sum = (four[0] + four[1]) + (four[2] + four[3]);
            y[i * n_out + j] = sum * (scale ? scale[j] : 1) + (bias ? bias[j] : 0);
        }
}

/* All rows of x with W_ROWS rows of W, or with the fewer that are left; these stay in the first cache. */
INLINE void strip(const float *x, const char *w, const float *scale, const float *bias, float *y, long n_x, long n_out,
                  long n_in, long left, long bytes, load_vec_fn load_vec, load_one_fn load_one) {
    long i = 0;
    if (left >= W_ROWS) {
        for (; i + X_ROWS <= n_x; i += X_ROWS)
            tile(X_ROWS, W_ROWS, x + i * n_in, w, scale, bias, y + i * n_out, n_out, n_in, bytes, i ? 0 : AHEAD,
                 load_vec, load_one);
        for (; i < n_x; i++)
            tile(1, W_ROWS, x + i * n_in, w, scale, bias, y + i * n_out, n_out, n_in, bytes, i ? 0 : AHEAD, load_vec,
                 load_one);
    } else
        for (; i < n_x; i++)
            for (long j = 0; j < left; j++)
                tile(1, 1, x + i * n_in, w + j * n_in * bytes, scale ? scale + j : 0, bias ? bias + j : 0,
                     y + i * n_out + j, n_out, n_in, bytes, 0, load_vec, load_one);
}

/* x (n_x, n_in) times w (n_out, n_in) as y (n_x, n_out); scale and bias are (n_out,) or NULL. The parallel loop is here
   and not in a function of its own, because a compiler gives a loop's body no constants from outside, and would call
   load_vec for each vector. */
#define LINEAR(type, bytes)                                                                                            \
    void linear_##type(const float *x, const char *w, const float *scale, const float *bias, float *y, long n_x,       \
                       long n_out, long n_in, int threads) {                                                           \
        _Pragma("omp parallel for num_threads(threads) schedule(static)")                                              \
        for (long j = 0; j < n_out; j += W_ROWS)                                                                       \
            strip(x, w + j * n_in * bytes, scale ? scale + j : 0, bias ? bias + j : 0, y + j, n_x, n_out, n_in,        \
                  n_out - j, bytes, load_vec_##type, load_one_##type);                                                 \
    }
LINEAR(fp32, 4)
LINEAR(int8, 1)
LINEAR(bf16, 2)
#ifdef HAS_FP16
LINEAR(fp16, 2)
#endif
