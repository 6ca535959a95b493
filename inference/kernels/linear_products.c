/* y = x Wᵀ for inference: x in fp32, W in fp32, fp16, bf16, int8 or (int4_products.h) int4, as it lies in memory.

   With one row of x the time is that of reading W, so W is read once, in order, each core its own part of the rows.
   With more rows a tile of W_ROWS rows of W and X_ROWS rows of x is multiplied in registers, so that W still comes from
   memory once, and every number that is loaded is used several times.

   A row of x meets the same additions in the same order in whatever tile it is: what it gives does not depend on its
   neighbours, to the last bit. */

#include <time.h>
#include "../../machine/vectors.h"
#include "layout.h"

#if defined(__AVX512F__)
#define X_ROWS 4 /* 4 · 4 sums, 4 + 4 operands: 32 registers hold them */
#elif defined(__AVX2__)
#define X_ROWS 2 /* 16 registers */
#else
#define X_ROWS 4
#endif
#define W_ROWS 4

/* The processor itself foresees only the next few cache lines of a row: the first to read W asks for what lies so many
   bytes further on. (Not past the caches, as what is read once in a pass would allow: that halves the speed.) */
enum { AHEAD = 8256, CACHE_LINE = 64 };

typedef float quarter __attribute__((vector_size(16)));
typedef int32_t int_quarter __attribute__((vector_size(16)));
typedef double double_quarter __attribute__((vector_size(32)));
typedef int16_t short_vec __attribute__((vector_size(2 * LANES)));
typedef int8_t byte_vec __attribute__((vector_size(LANES)));

/* LANES weights from number k of a row on, as fp32; and a single one, for the end of a row. */
typedef vec (*load_vec_fn)(const void *row, long k);
typedef float (*load_one_fn)(const void *row, long k);

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
#elif defined(__aarch64__)
typedef __fp16 half_vec __attribute__((vector_size(2 * LANES)));
INLINE vec load_vec_fp16(const void *row, long k) {
    half_vec v;
    memcpy(&v, (const __fp16 *)row + k, sizeof v);
    return __builtin_convertvector(v, vec);
}
INLINE float load_one_fp16(const void *row, long k) { return ((const __fp16 *)row)[k]; }
#else /* its ten bits of fraction and five of exponent come to lie where fp32 has them; the bias of those is 112 less */
INLINE vec from_fp16(int_vec bits) {
    vec magnitude = (vec)((bits & 0x7fff) << 13) * 0x1p112f; /* subnormal numbers, too */
    int_vec not_finite = ((bits & 0x7c00) == 0x7c00) & 0x7f800000;
    return (vec)((int_vec)magnitude | not_finite | (bits & 0x8000) << 16);
}
INLINE vec load_vec_fp16(const void *row, long k) {
    short_vec v;
    memcpy(&v, (const int16_t *)row + k, sizeof v);
    return from_fp16(__builtin_convertvector(v, int_vec));
}
INLINE float load_one_fp16(const void *row, long k) { return from_fp16((int_vec){0} + ((const int16_t *)row)[k])[0]; }
#endif

/* The last numbers of a row, fewer than LANES, filled up with zeros. */
INLINE vec load_rest(const void *row, long k, long n_in, load_one_fn load_one) {
    float lanes[LANES] = {0};
    vec v;
    _Pragma("GCC unroll 1") for (long i = 0; k + i < n_in; i++) lanes[i] = load_one(row, k + i);
    memcpy(&v, lanes, sizeof v);
    return v;
}

/* What the lanes of four vectors sum up to, one number for each: of floats, and exactly of integers. */
#if LANES == 16
#define PAIRS(type, a, b) \
    ((type)_mm512_unpacklo_ps((__m512)(a), (__m512)(b)) + (type)_mm512_unpackhi_ps((__m512)(a), (__m512)(b)))
#define FOURS(type, a, b) \
    ((type)_mm512_unpacklo_pd((__m512d)(a), (__m512d)(b)) + (type)_mm512_unpackhi_pd((__m512d)(a), (__m512d)(b)))
#elif LANES == 8
#define PAIRS(type, a, b) \
    ((type)_mm256_unpacklo_ps((__m256)(a), (__m256)(b)) + (type)_mm256_unpackhi_ps((__m256)(a), (__m256)(b)))
#define FOURS(type, a, b) \
    ((type)_mm256_unpacklo_pd((__m256d)(a), (__m256d)(b)) + (type)_mm256_unpackhi_pd((__m256d)(a), (__m256d)(b)))
#endif
#ifdef PAIRS /* as one adds up by hand, all four at once */
#define SUM_FOUR(type, v) FOURS(type, PAIRS(type, v[0], v[1]), PAIRS(type, v[2], v[3]))
#else
#define SUM_FOUR(type, v) \
    ((type){(v[0][0] + v[0][1]) + (v[0][2] + v[0][3]), (v[1][0] + v[1][1]) + (v[1][2] + v[1][3]), \
            (v[2][0] + v[2][1]) + (v[2][2] + v[2][3]), (v[3][0] + v[3][1]) + (v[3][2] + v[3][3])})
#endif
#define SUMS_OF_FOUR(name, type, quarter_type) \
    INLINE quarter_type name(const type *v) { \
        type sums = SUM_FOUR(type, v); \
        quarter_type parts[LANES / 4], four; \
        memcpy(parts, &sums, sizeof sums); \
        four = parts[0]; \
        for (int i = 1; i < LANES / 4; i++) four += parts[i]; \
        return four; \
    }
SUMS_OF_FOUR(sums_of_four, vec, quarter)
SUMS_OF_FOUR(int_sums_of_four, int_vec, int_quarter)

INLINE float sum_of_lanes(vec v) {
    quarter parts[LANES / 4], four;
    memcpy(parts, &v, sizeof v);
    four = parts[0];
    for (int i = 1; i < LANES / 4; i++) four += parts[i];
    return (four[0] + four[1]) + (four[2] + four[3]);
}

/* The first n of four numbers, if there are any. */
INLINE quarter four_of(const float *numbers, int n, float otherwise) {
    quarter four = (quarter){0} + otherwise;
    if (numbers) memcpy(&four, numbers, n * sizeof(float));
    return four;
}

/* As `add_product`. */
INLINE quarter add_four_products(quarter sum, quarter a, quarter b) {
#if defined(__FMA__)
    return (quarter)_mm_fmadd_ps((__m128)a, (__m128)b, (__m128)sum);
#elif defined(__aarch64__)
    return (quarter)vfmaq_f32((float32x4_t)sum, (float32x4_t)a, (float32x4_t)b);
#else
    return sum + a * b;
#endif
}

/* A tile's sums for one row of x become numbers of y: times the scale of x and those of W, plus the bias, and with `add`
   plus what is in y. */
INLINE void finish(quarter sums, int w_rows, float x_scale, const float *scale, const float *bias, float *y, int add) {
    quarter result = add_four_products(four_of(bias, w_rows, 0), sums * x_scale, four_of(scale, w_rows, 1));
    if (add) result += four_of(y, w_rows, 0);
    memcpy(y, &result, w_rows * sizeof(float));
}

/* Adds the products of the next LANES numbers of the rows. */
INLINE void add_products(vec sums[X_ROWS][W_ROWS], int x_rows, int w_rows, const float *x, const char *w, long n_in,
                         long k, long bytes, load_vec_fn load_vec) {
    vec weights[W_ROWS];
    UNROLL for (int j = 0; j < w_rows; j++) {
        weights[j] = load_vec(w + j * n_in * bytes, k);
        if (x_rows > 1) KEEP_IN_REGISTER(weights[j]); /* used once, it may stay in memory as an operand */
    }
    UNROLL for (int i = 0; i < x_rows; i++) {
        vec inputs = load_vec_fp32(x + i * n_in, k);
        KEEP_IN_REGISTER(inputs);
        UNROLL for (int j = 0; j < w_rows; j++) sums[i][j] = add_product(sums[i][j], inputs, weights[j]);
    }
}

/* The products of x_rows rows of x with w_rows rows of W; both counts are constants at each call. The first to read W
   asks meanwhile for what lies AHEAD, once for each cache line. */
INLINE void tile(int x_rows, int w_rows, const float *x, const char *w, const float *scale, const float *bias, float *y,
                 long n_out, long n_in, int add, long bytes, int is_first, load_vec_fn load_vec, load_one_fn load_one) {
    vec sums[X_ROWS][W_ROWS] = {{{0}}};
    long k = 0, row_bytes = n_in * bytes, line = CACHE_LINE / bytes;
    if (is_first)
        for (; k + line <= n_in; k += line) {
            UNROLL for (int j = 0; j < w_rows; j++) __builtin_prefetch(w + j * row_bytes + k * bytes + AHEAD);
            UNROLL for (long i = 0; i < line; i += LANES)
                add_products(sums, x_rows, w_rows, x, w, n_in, k + i, bytes, load_vec);
        }
    for (; k + LANES <= n_in; k += LANES) add_products(sums, x_rows, w_rows, x, w, n_in, k, bytes, load_vec);
    if (k < n_in)
        UNROLL for (int j = 0; j < w_rows; j++) {
            vec weights = load_rest(w + j * row_bytes, k, n_in, load_one);
            UNROLL for (int i = 0; i < x_rows; i++)
                sums[i][j] = add_product(sums[i][j], load_rest(x + i * n_in, k, n_in, load_one_fp32), weights);
        }
    UNROLL for (int i = 0; i < x_rows; i++) finish(sums_of_four(sums[i]), w_rows, 1, scale, bias, y + i * n_out, add);
}

/* Some rows of x with W_ROWS rows of W, or with the fewer that are left. The first tile brings these into the first
   cache, where the others find them: only it asks ahead. The counts and, for a single row, the 1 are written out in each call
   of `tile`, as each then becomes a loop of its own without conditions. */
INLINE void strip(const float *x, const char *w, const float *scale, const float *bias, float *y, long n_x, long n_out,
                  long n_in, int add, long left, int is_first, long bytes, load_vec_fn load_vec, load_one_fn load_one) {
    long i = 0;
    if (left >= W_ROWS && n_x == 1)
        tile(1, W_ROWS, x, w, scale, bias, y, n_out, n_in, add, bytes, 1, load_vec, load_one);
    else if (left >= W_ROWS) {
        for (; i + X_ROWS <= n_x; i += X_ROWS, is_first = 0)
            tile(X_ROWS, W_ROWS, x + i * n_in, w, scale, bias, y + i * n_out, n_out, n_in, add, bytes, is_first, load_vec,
                 load_one);
        for (; i < n_x; i++, is_first = 0)
            tile(1, W_ROWS, x + i * n_in, w, scale, bias, y + i * n_out, n_out, n_in, add, bytes, is_first, load_vec,
                 load_one);
    } else /* at most W_ROWS - 1 in a whole matrix: not worth tiles of their own */
        for (; i < n_x; i++)
            for (long j = 0; j < left; j++)
                tile(1, 1, x + i * n_in, w + j * n_in * bytes, scale ? scale + j : 0, bias ? bias + j : 0,
                     y + i * n_out + j, n_out, n_in, add, bytes, 0, load_vec, load_one);
}

/* INT8 by integer arithmetic, which is exact: every processor gives the same numbers.

   A row of x becomes integers with one scale. For INT8_DYNAMIC they have 8 bits, x ≈ a · scale. Some processors add up
   four products of 8-bit numbers in one instruction, others two of 16-bit numbers, into which the same integers are put.
   The former are so fast that they compute INT8 in this way, too, with 24 bits, as many as fp32 has, written as three
   digits: x ≈ (2^16 a + 2^8 b + c) · scale. */
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#define DOT(sum, weights, digits) (int_vec) _mm512_dpbusd_epi32((__m512i)(sum), (__m512i)(weights), (__m512i)(digits))
#define UNSIGNED 128
#define DIGIT_SUMS 6 /* and W_ROWS of each: rows of x times digits; 32 registers hold them */
#elif defined(__AVXVNNI__)
#define DOT(sum, weights, digits) \
    (int_vec) _mm256_dpbusd_avx_epi32((__m256i)(sum), (__m256i)(weights), (__m256i)(digits))
#define UNSIGNED 128
#define DIGIT_SUMS 3
#elif defined(__ARM_FEATURE_DOTPROD)
#define DOT(sum, weights, digits) (int_vec) vdotq_s32((int32x4_t)(sum), (int8x16_t)(weights), (int8x16_t)(digits))
#define DIGIT_SUMS 6
#endif

#ifdef DOT
typedef int8_t digit;
#else
typedef int16_t digit;
#if LANES == 16 || defined(__aarch64__)
#define DIGIT_SUMS 6
#else
#define DIGIT_SUMS 3 /* 16 registers */
#endif
#endif
#ifndef UNSIGNED
#define UNSIGNED 0 /* what is added to the weights, as some instructions multiply unsigned by signed numbers */
#endif
enum { MOST_DIGITS = 3, LONGEST_ROW = 65536 }; /* 2^31 holds this many products of 255 and 128 */
enum { DIGITS = 4 * LANES / sizeof(digit) };   /* in a vector */

typedef digit digit_vec __attribute__((vector_size(4 * LANES)));
typedef int8_t weight_vec __attribute__((vector_size(DIGITS)));

/* Weights as they are multiplied with digits. */
INLINE digit_vec widened(weight_vec weights) {
#ifdef DOT
    return weights ^ (int8_t)UNSIGNED; /* 128 flips the highest bit, which adds 128 */
#elif defined(__AVX512BW__)
    return (digit_vec)_mm512_cvtepi8_epi16((__m256i)weights);
#elif defined(__AVX2__)
    return (digit_vec)_mm256_cvtepi8_epi16((__m128i)weights);
#else
    return __builtin_convertvector(weights, digit_vec);
#endif
}

/* The sums with the products of neighbours added to each. */
INLINE int_vec dot(int_vec sums, digit_vec weights, digit_vec digits) {
#ifdef DOT
    return DOT(sums, weights, digits);
#elif defined(__AVX512BW__)
    return sums + (int_vec)_mm512_madd_epi16((__m512i)weights, (__m512i)digits);
#elif defined(__AVX2__)
    return sums + (int_vec)_mm256_madd_epi16((__m256i)weights, (__m256i)digits);
#elif defined(__SSE2__) && LANES == 4
    return sums + (int_vec)_mm_madd_epi16((__m128i)weights, (__m128i)digits);
#else
    short_vec w[2], d[2];
    memcpy(w, &weights, sizeof w);
    memcpy(d, &digits, sizeof d);
    for (int i = 0; i < 2; i++) sums += __builtin_convertvector(w[i], int_vec) * __builtin_convertvector(d[i], int_vec);
    return sums;
#endif
}

typedef struct { /* a row of x; its digits follow, the highest first, each kind padded with zeros to whole vectors */
    int32_t begin[MOST_DIGITS][LANES]; /* what the sums begin with, against what UNSIGNED adds to them */
    float scale;
    char to_a_cache_line[60];
} digit_row;

INLINE long padded(long n_in) { return (n_in + DIGITS - 1) / DIGITS * DIGITS; }
INLINE long digit_row_bytes(int digits, long n_in) {
    return sizeof(digit_row) + digits * padded(n_in) * (long)sizeof(digit);
}

/* The largest magnitude in a row; NaN if there is one. */
INLINE float largest_of(const float *x, long n_in) {
    int32_t largest_bits = 0; /* as integers, the bits of positive numbers have the same order; NaN is the largest */
    float largest;
    for (long k = 0; k < n_in; k++) {
        int32_t bits;
        memcpy(&bits, x + k, sizeof bits);
        bits &= 0x7fffffff;
        largest_bits = bits > largest_bits ? bits : largest_bits;
    }
    memcpy(&largest, &largest_bits, sizeof largest);
    return largest;
}

INLINE void split_into_digits(int digits, const float *x, char *out, long n_in) {
    digit_row *row = (digit_row *)out;
    digit *first = (digit *)(row + 1);
    const float most = digits == 1 ? 127 : 127 << 16; /* a bit below what 24 bits can hold */
    float largest = largest_of(x, n_in);
    float factor = largest > 1e-30f ? most / largest : 0; /* of a smaller row it would be infinite */
    memset(row, 0, digit_row_bytes(digits, n_in));
    if (!(largest < INFINITY)) { /* infinities and NaN spoil the row, visibly */
        row->scale = NAN;
        return;
    }
    row->scale = largest / most;
    for (long k = 0; k < n_in; k++) {
        float scaled = x[k] * factor;
        int32_t number = (int32_t)(scaled + (scaled < 0 ? -0.5f : 0.5f));
        UNROLL for (int d = digits - 1; d > 0; d--) {
            int8_t low = (int8_t)number; /* −128 … 127, so that what is left is a multiple of 256 */
            first[d * padded(n_in) + k] = low;
            number = (number - low) >> 8;
        }
        first[k] = (digit)number;
    }
    if (UNSIGNED) /* the weights are multiplied as w + 128; 128 times the sum of the digits is taken off beforehand */
        for (int d = 0; d < digits; d++) {
            int_vec sum = {0};
            for (long k = 0; k < padded(n_in); k += DIGITS) {
                digit_vec some;
                memcpy(&some, first + d * padded(n_in) + k, sizeof some);
                sum = dot(sum, (digit_vec){0} + (digit)UNSIGNED, some);
            }
            sum = -sum;
            memcpy(row->begin[d], &sum, sizeof sum);
        }
}

/* Adds the products of the next `n` numbers of the rows, at most DIGITS. */
INLINE void add_dots(int_vec sums[DIGIT_SUMS][W_ROWS], int digits, int x_rows, int w_rows, const char *x, const char *w,
                     long n, long n_in) {
    digit_vec weights[W_ROWS];
    UNROLL for (int j = 0; j < w_rows; j++) {
        weight_vec bytes;
        if (n < DIGITS) bytes = (weight_vec){0};
        memcpy(&bytes, w + j * n_in, n);
        weights[j] = widened(bytes);
        KEEP_IN_REGISTER(weights[j]);
    }
    UNROLL for (int i = 0; i < x_rows; i++)
        UNROLL for (int d = 0; d < digits; d++) {
            digit_vec inputs;
            int_vec *sum = sums[i * digits + d];
            memcpy(&inputs, x + i * digit_row_bytes(digits, n_in) + d * padded(n_in) * sizeof(digit), sizeof inputs);
            KEEP_IN_REGISTER(inputs);
            UNROLL for (int j = 0; j < w_rows; j++) sum[j] = dot(sum[j], weights[j], inputs);
        }
}

/* A tile's sums for one row of x become what its whole numbers gave, rounded once. */
INLINE quarter put_together(int digits, int_vec sums[][W_ROWS]) {
    if (digits == 1) return __builtin_convertvector(int_sums_of_four(sums[0]), quarter);
    /* Doubles hold these whole numbers exactly, as they stay below 2^53 */
    double_quarter total = __builtin_convertvector(int_sums_of_four(sums[0]), double_quarter);
    UNROLL for (int d = 1; d < digits; d++)
        total = total * 256 + __builtin_convertvector(int_sums_of_four(sums[d]), double_quarter);
    return __builtin_convertvector(total, quarter);
}

INLINE void digit_tile(int digits, int x_rows, int w_rows, const char *x, const char *w, const float *scale,
                       const float *bias, float *y, long n_out, long n_in, int add, int is_first) {
    int_vec sums[DIGIT_SUMS][W_ROWS] = {{{0}}};
    long k = 0, row_bytes = digit_row_bytes(digits, n_in);
    UNROLL for (int i = 0; i < x_rows; i++)
        UNROLL for (int d = 0; d < digits; d++)
            UNROLL for (int j = 0; j < w_rows; j++)
                memcpy(&sums[i * digits + d][j], ((const digit_row *)(x + i * row_bytes))->begin[d], sizeof(int_vec));
    x += sizeof(digit_row); /* to the digits */
    if (is_first)
        for (; k + CACHE_LINE <= n_in; k += CACHE_LINE) {
            UNROLL for (int j = 0; j < w_rows; j++) __builtin_prefetch(w + j * n_in + k + AHEAD);
            UNROLL for (long i = k; i < k + CACHE_LINE; i += DIGITS)
                add_dots(sums, digits, x_rows, w_rows, x + i * sizeof(digit), w + i, DIGITS, n_in);
        }
    for (; k + DIGITS <= n_in; k += DIGITS)
        add_dots(sums, digits, x_rows, w_rows, x + k * sizeof(digit), w + k, DIGITS, n_in);
    if (k < n_in) add_dots(sums, digits, x_rows, w_rows, x + k * sizeof(digit), w + k, n_in - k, n_in);
    UNROLL for (int i = 0; i < x_rows; i++) {
        float x_scale = ((const digit_row *)(x + i * row_bytes) - 1)->scale;
        finish(put_together(digits, sums + i * digits), w_rows, x_scale, scale, bias, y + i * n_out, add);
    }
}

/* The same of rows of x that are written as digits. */
INLINE void digit_strip(const char *x, const char *w, const float *scale, const float *bias, float *y, long n_x,
                        long n_out, long n_in, int add, long left, int is_first, int digits) {
    const int x_rows = DIGIT_SUMS / digits;
    long i = 0, row_bytes = digit_row_bytes(digits, n_in);
    if (left >= W_ROWS && n_x == 1)
        digit_tile(digits, 1, W_ROWS, x, w, scale, bias, y, n_out, n_in, add, 1);
    else if (left >= W_ROWS) {
        for (; i + x_rows <= n_x; i += x_rows, is_first = 0)
            digit_tile(digits, x_rows, W_ROWS, x + i * row_bytes, w, scale, bias, y + i * n_out, n_out, n_in, add, is_first);
        for (; i < n_x; i++, is_first = 0)
            digit_tile(digits, 1, W_ROWS, x + i * row_bytes, w, scale, bias, y + i * n_out, n_out, n_in, add, is_first);
    } else
        for (; i < n_x; i++)
            for (long j = 0; j < left; j++)
                digit_tile(digits, 1, 1, x + i * row_bytes, w + j * n_in, scale ? scale + j : 0, bias ? bias + j : 0,
                           y + i * n_out + j, n_out, n_in, add, 0);
}

enum { FP32, FP16, BF16, INT8, INT8_DYNAMIC, INT4 }; /* INT8_DYNAMIC is INT8 with x rounded to 8 bits as well */

typedef struct {
    const char *weight; /* (n_out, n_in) */
    const void *scale;  /* (n_out,) fp32 or NULL; of INT4 (n_out, n_in / GROUP) fp16, and so is the minimum, or NULL */
    const void *minimum;
    const float *bias; /* (n_out,) or NULL */
    int64_t n_out, n_in, type;
} Linear;
LAYOUT(Linear, FIELD(Linear, weight), FIELD(Linear, scale), FIELD(Linear, minimum), FIELD(Linear, bias),
       FIELD(Linear, n_out), FIELD(Linear, n_in), FIELD(Linear, type));

#include "int4_products.h"

/* Many rows of x are taken in blocks that stay in a core's cache, each with a group of rows of W that stays there, too:
   otherwise all of x would come from further away for every few rows of W. */
enum { X_BYTES = 512 << 10, W_BYTES = 32 << 10 };

/* How many rows a block has: all blocks are equal, of about X_BYTES at most and of whole tiles. */
INLINE long rows_of_block(long n_x, long row_bytes, long tile_rows) {
    long n_blocks = 1 + n_x * row_bytes / X_BYTES, rows = (n_x + n_blocks - 1) / n_blocks;
    return (rows + tile_rows - 1) / tile_rows * tile_rows;
}

#include "amx_products.h"

/* With how many digits x is written, or 0: as it is. */
INLINE int digits_of(int64_t type, long n_in) {
    if (n_in > LONGEST_ROW || type == INT4) return 0;
#ifdef DOT
    if (type == INT8) return MOST_DIGITS;
#endif
    return type == INT8_DYNAMIC;
}

/* Whether rows of this length can be computed with weights of a type. */
int linear_knows(int64_t type, long n_in) {
    return type == INT4 ? n_in % GROUP == 0 : type != INT8_DYNAMIC || digits_of(type, n_in);
}

/* Bytes that a row of x takes as digits. */
long linear_digit_bytes(int64_t type, long n_in) {
    int digits = digits_of(type, n_in);
    if (type == INT4) return grouped_row_bytes(n_in);
    return digits ? digit_row_bytes(digits, n_in) : 0;
}

/* Row i of n_x rows of x into digits, if the kernel wants them. */
static void prepare_row(const Linear *l, const float *x, char *out, long i, long n_x) {
    int digits = digits_of(l->type, l->n_in);
    x += i * l->n_in;
    if (in_tiles(l->type, l->n_in, n_x)) {
        lay_into_tiles(digits, x, out, i, n_x, l->n_in);
        return;
    }
    out += i * linear_digit_bytes(l->type, l->n_in);
    if (digits == 1) split_into_digits(1, x, out, l->n_in);
    if (digits > 1) split_into_digits(MOST_DIGITS, x, out, l->n_in);
    if (l->type == INT4) split_into_groups(x, out, l->n_in);
}

/* Where the threads of a parallel region wait for each other. OpenMP's own barrier sleeps at once if it is told to, or
   if other libraries of the process have threads, too; to wake up takes longer than most of what is waited for. */
typedef struct {
    int threads, arrived; /* how many there are, and how many of them wait */
    char to_a_cache_line[56];
    unsigned round;
} Meeting;
enum { SPINS = 16384, NAP = 20000 }; /* about half a millisecond, then naps of so many nanoseconds */

/* Called by each thread, and followed by a barrier of OpenMP's. */
INLINE void join(Meeting *meeting) { __atomic_add_fetch(&meeting->threads, 1, __ATOMIC_RELAXED); }

static void meet(Meeting *meeting) {
    unsigned round = __atomic_load_n(&meeting->round, __ATOMIC_RELAXED);
    if (__atomic_add_fetch(&meeting->arrived, 1, __ATOMIC_ACQ_REL) == meeting->threads) {
        __atomic_store_n(&meeting->arrived, 0, __ATOMIC_RELAXED);
        __atomic_store_n(&meeting->round, round + 1, __ATOMIC_RELEASE);
        return;
    }
    for (long spins = 0; __atomic_load_n(&meeting->round, __ATOMIC_ACQUIRE) == round; spins++) {
        if (spins >= SPINS) nanosleep(&(struct timespec){0, NAP}, NULL); /* another program may need the core */
#if defined(__x86_64__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        __asm__ volatile("yield");
#endif
    }
}

/* All rows; called by all threads of a parallel region, none of which waits for the others. Whether there was anything to
   do, and they have to wait before the product. */
static int prepare(const Linear *l, const float *x, char *out, long n_x) {
    if (!linear_digit_bytes(l->type, l->n_in)) return 0;
    #pragma omp for schedule(static) nowait
    for (long i = 0; i < n_x; i++) prepare_row(l, x, out, i, n_x);
    return 1;
}

#define FURTHER(p, bytes) ((p) ? (const void *)((const char *)(p) + (bytes)) : NULL)

/* For each kind of weights a function of its own, or the compiler would run out of registers.

   Each thread takes a stretch of W, in order (static), and writes numbers of y that no other thread writes or reads: it
   need not wait at the end (nowait), but goes on with the next product of the same x. Where x is one block, a group of W
   is needed once, and the smallest groups share out most evenly; otherwise a group meets all rows of a block while it is
   in the cache. Only the first block asks ahead for W. */
#define MULTIPLY(name, x_type, x_row_bytes, x_tile, w_row_bytes, scale_bytes, strip, ...)                              \
    static __attribute__((noinline)) void name(const Linear *l, const x_type *x, float *y, long n_x, int add) {       \
        long n_in = l->n_in, n_out = l->n_out, block = rows_of_block(n_x, x_row_bytes, x_tile);                       \
        long group = (1 + W_BYTES / (W_ROWS * (w_row_bytes))) * W_ROWS;                                               \
        if (n_x <= block) group = W_ROWS;                                                                             \
        _Pragma("omp for collapse(2) schedule(static) nowait")                                                        \
        for (long g = 0; g < n_out; g += group)                                                                       \
            for (long i = 0; i < n_x; i += block)                                                                     \
                for (long j = g; j < at_most(g + group, n_out); j += W_ROWS)                                          \
                    strip(x + i * (x_row_bytes / (long)sizeof *x), l->weight + j * (w_row_bytes),                     \
                          FURTHER(l->scale, j * (scale_bytes)), l->bias ? l->bias + j : 0, y + i * n_out + j,         \
                          at_most(block, n_x - i), n_out, n_in, add, n_out - j, !i, __VA_ARGS__);          \
    }
MULTIPLY(multiply_fp32, float, 4 * n_in, X_ROWS, 4 * n_in, 4, strip, 4, load_vec_fp32, load_one_fp32)
MULTIPLY(multiply_bf16, float, 4 * n_in, X_ROWS, 2 * n_in, 4, strip, 2, load_vec_bf16, load_one_bf16)
MULTIPLY(multiply_int8, float, 4 * n_in, X_ROWS, n_in, 4, strip, 1, load_vec_int8, load_one_int8)
MULTIPLY(multiply_fp16, float, 4 * n_in, X_ROWS, 2 * n_in, 4, strip, 2, load_vec_fp16, load_one_fp16)
MULTIPLY(multiply_digit, char, digit_row_bytes(1, n_in), DIGIT_SUMS, n_in, 4, digit_strip, 1)
#ifdef DOT
MULTIPLY(multiply_digits, char, digit_row_bytes(MOST_DIGITS, n_in), DIGIT_SUMS / MOST_DIGITS, n_in, 4, digit_strip,
         MOST_DIGITS)
#endif
#define SCALES_BYTES (n_in / GROUP * 2)
MULTIPLY(multiply_int4, char, grouped_row_bytes(n_in), GROUP_X_ROWS, n_in / 2, SCALES_BYTES, group_strip, NULL)
MULTIPLY(multiply_int4_with_minima, char, grouped_row_bytes(n_in), GROUP_X_ROWS, n_in / 2, SCALES_BYTES, group_strip,
         FURTHER(l->minimum, j * SCALES_BYTES))

/* y (n_x, n_out) = x (n_x, n_in) Wᵀ, or with `add` plus that. Called by all threads of a parallel region, each takes
   its part, and none waits for the others. */
static void multiply(const Linear *l, const float *x, const char *digits, float *y, long n_x, int add) {
    int n_digits = digits_of(l->type, l->n_in);
    if (in_tiles(l->type, l->n_in, n_x)) {
        multiply_in_tiles(n_digits, l, digits, y, n_x, add);
        return;
    }
    if (n_digits == 1) multiply_digit(l, digits, y, n_x, add);
#ifdef DOT
    if (n_digits > 1) multiply_digits(l, digits, y, n_x, add);
#endif
    if (l->type == INT4 && l->minimum) multiply_int4_with_minima(l, digits, y, n_x, add);
    if (l->type == INT4 && !l->minimum) multiply_int4(l, digits, y, n_x, add);
    if (l->type == FP16) multiply_fp16(l, x, y, n_x, add);
    if (l->type == FP32) multiply_fp32(l, x, y, n_x, add);
    if (l->type == BF16) multiply_bf16(l, x, y, n_x, add);
    if (l->type == INT8 && !n_digits) multiply_int8(l, x, y, n_x, add);
}

/* y (n_x, n_out) = x (n_x, n_in) Wᵀ; `digits` has room for n_x times linear_digit_bytes. */
void linear(const Linear *l, const float *x, char *digits, float *y, long n_x, int threads) {
    #pragma omp parallel num_threads(threads)
    {
        if (prepare(l, x, digits, n_x)) {
            #pragma omp barrier
        }
        multiply(l, x, digits, y, n_x, 0);
    }
}
