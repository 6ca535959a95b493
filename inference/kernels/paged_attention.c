/* Attention of single tokens to keys and values that lie in blocks of cells; paged_cache.py says what it computes.

   Each token first stores its key and value in its cell. Then every query reads the blocks of its own past once, with
   the softmax corrected as its maximum grows (online softmax, arXiv:1805.02867): no row of scores is kept, whatever the
   length. In a block the keys lie transposed, so that the scores of its 16 cells are the 16 lanes of one vector. */

#include <math.h>
#include <stdint.h>
#include <string.h>
#include "../../machine/exponential.h"
#include "layout.h"

enum { BLOCK_SIZE = 16 };
const int64_t cells_of_a_block = BLOCK_SIZE; /* paged_attention.py knows the number, too */

typedef struct {
    void *keys;                        /* (layers, kv_heads, blocks, head_dim, BLOCK_SIZE), float or int8_t */
    void *values;                      /* (layers, kv_heads, blocks, BLOCK_SIZE, head_dim), float or int8_t */
    float *key_scales, *value_scales;  /* (layers, kv_heads, blocks, BLOCK_SIZE), or NULL where the cells are floats */
    const int32_t *table;              /* (slots, blocks_per_slot): the blocks of each sequence, in order */
    int64_t heads, kv_heads, blocks, head_dim, blocks_per_slot;
} Cache;
LAYOUT(Cache, FIELD(Cache, keys), FIELD(Cache, values), FIELD(Cache, key_scales), FIELD(Cache, value_scales),
       FIELD(Cache, table), FIELD(Cache, heads), FIELD(Cache, kv_heads), FIELD(Cache, blocks), FIELD(Cache, head_dim),
       FIELD(Cache, blocks_per_slot));

typedef struct {                       /* of a tensor (1, heads, tokens, head_dim) */
    const float *data;
    int64_t head_stride, token_stride;
} Rows;
LAYOUT(Rows, FIELD(Rows, data), FIELD(Rows, head_stride), FIELD(Rows, token_stride));

/* The n numbers of a block as floats: where they lie, or converted into the buffer. */
static inline const float *as_floats(const void *cells, int is_int8, int64_t block, int64_t n, float *buffer) {
    if (!is_int8) return (const float *)cells + block * n;
    const int8_t *source = (const int8_t *)cells + block * n;
    for (int64_t i = 0; i < n; i++) buffer[i] = source[i];
    return buffer;
}

static inline Lanes scores(const float *query, const float *keys, int64_t head_dim) {
    const Lanes *key = (const Lanes *)keys;
    Lanes even = {0}, odd = {0};  /* two sums, as an addition waits for the one before it */
    int64_t i = 0;
    for (; i + 2 <= head_dim; i += 2) {
        even += query[i] * key[i];
        odd += query[i + 1] * key[i + 1];
    }
    if (i < head_dim) even += query[i] * key[i];
    return even + odd;
}

static inline void add_values(float *out, const float *weight, const float *values, int count, int64_t head_dim) {
    int64_t i = 0;
    for (; i + BLOCK_SIZE <= head_dim; i += BLOCK_SIZE) {
        Lanes sum = *(Lanes *)(out + i);
        for (int c = 0; c < count; c++) sum += weight[c] * *(const Lanes *)(values + c * head_dim + i);
        *(Lanes *)(out + i) = sum;
    }
    for (; i < head_dim; i++)
        for (int c = 0; c < count; c++) out[i] += weight[c] * values[c * head_dim + i];
}

/* out (head_dim,) = softmax(query · keys / √head_dim) · values, over the first `length` cells of a sequence. While the
   blocks go by, `out` is the sum of e^(score − highest) · value and `total` that of e^(score − highest). */
static void attend(const Cache *cache, int64_t base, const float *query, const int32_t *blocks, int64_t length,
                   float *out) {
    int64_t head_dim = cache->head_dim, size = head_dim * BLOCK_SIZE;
    int is_int8 = cache->key_scales != NULL;
    float highest = -INFINITY, total = 0, factor = 1 / sqrtf((float)head_dim), score[BLOCK_SIZE], weight[BLOCK_SIZE];
    float buffer[is_int8 ? size : 1];
    memset(out, 0, head_dim * sizeof(float));
    for (int64_t start = 0; start < length; start += BLOCK_SIZE) {
        int count = length - start < BLOCK_SIZE ? (int)(length - start) : BLOCK_SIZE;
        int64_t block = base + blocks[start / BLOCK_SIZE];
        /* All 16 cells are computed, those beyond the last token as well; only `count` of them are counted */
        Lanes lanes = factor * scores(query, as_floats(cache->keys, is_int8, block, size, buffer), head_dim);
        if (is_int8) lanes *= *(const Lanes *)(cache->key_scales + block * BLOCK_SIZE);
        *(Lanes *)score = lanes;
        float highest_before = highest;
        for (int c = 0; c < count; c++) highest = score[c] > highest ? score[c] : highest;
        if (highest > highest_before && start > 0) {
            float correction = expf(highest_before - highest); /* the sums so far were taken against the old maximum */
            total *= correction;
            for (int64_t i = 0; i < head_dim; i++) out[i] *= correction;
        }
        *(Lanes *)weight = lanes = exponential(lanes - highest);
        for (int c = 0; c < count; c++) total += weight[c];
        /* The scale of a value goes into its weight, once, in place of head_dim numbers; `total` must not have it */
        if (is_int8) *(Lanes *)weight = lanes * *(const Lanes *)(cache->value_scales + block * BLOCK_SIZE);
        add_values(out, weight, as_floats(cache->values, is_int8, block, size, buffer), count, head_dim);
    }
    for (int64_t i = 0; i < head_dim; i++) out[i] /= total;
}

/* One row into every `stride`-th place of its cell; as 8-bit integers and a scale where there are scales. */
static inline void store(void *cell, int64_t stride, float *scale, const float *row, int64_t head_dim) {
    if (!scale) {
        for (int64_t i = 0; i < head_dim; i++) ((float *)cell)[i * stride] = row[i];
        return;
    }
    float largest = 1e-30f * 127;
    int finite = 1;
    for (int64_t i = 0; i < head_dim; i++) {
        largest = fmaxf(largest, fabsf(row[i]));
        finite &= isfinite(row[i]) != 0;
    }
    *scale = finite ? largest / 127 : NAN; /* it shows, where an integer would be some number */
    if (!finite) return;
    for (int64_t i = 0; i < head_dim; i++) ((int8_t *)cell)[i * stride] = (int8_t)rintf(row[i] / *scale);
}

/* One head of one token. */
static inline const float *head_of(Rows rows, int64_t token, int64_t head) {
    return rows.data + head * rows.head_stride + token * rows.token_stride;
}

/* Store key and value of kv head g of token t in their cell. */
static void store_token(const Cache *cache, int64_t layer, int64_t slot, int64_t position, int64_t g, const float *key,
                        const float *value) {
    int64_t head_dim = cache->head_dim;
    int is_int8 = cache->key_scales != NULL;
    int64_t number_size = is_int8 ? 1 : sizeof(float);
    int32_t block = cache->table[slot * cache->blocks_per_slot + position / BLOCK_SIZE];
    int64_t first = ((layer * cache->kv_heads + g) * cache->blocks + block) * BLOCK_SIZE;
    int64_t offset = position % BLOCK_SIZE;
    store((char *)cache->keys + (first * head_dim + offset) * number_size, BLOCK_SIZE,
          is_int8 ? cache->key_scales + first + offset : NULL, key, head_dim);
    store((char *)cache->values + (first + offset) * head_dim * number_size, 1,
          is_int8 ? cache->value_scales + first + offset : NULL, value, head_dim);
}

/* What query head h of a token at this position finds in its past and itself. */
static void attend_token(const Cache *cache, int64_t layer, int64_t slot, int64_t position, int64_t h,
                         const float *query, float *out) {
    int64_t base = (layer * cache->kv_heads + h / (cache->heads / cache->kv_heads)) * cache->blocks;
    attend(cache, base, query, cache->table + slot * cache->blocks_per_slot, position + 1, out);
}

/* Store the keys and values of all tokens, then compute out (tokens, heads, head_dim) for the first `attending`. */
void paged_attention(const Cache *cache, int64_t layer, Rows query, Rows key, Rows value, float *out,
                     const int64_t *slots, const int64_t *positions, int64_t tokens, int64_t attending, int threads) {
    int64_t heads = cache->heads;
    #pragma omp parallel num_threads(threads)
    {
        #pragma omp for collapse(2) schedule(static)
        for (int64_t t = 0; t < tokens; t++)
            for (int64_t g = 0; g < cache->kv_heads; g++)
                store_token(cache, layer, slots[t], positions[t], g, head_of(key, t, g), head_of(value, t, g));
        /* all threads have waited for each other: tokens of one prompt see each other. As pasts differ in length, a
           thread that is done takes the next two heads (dynamic) */
        #pragma omp for collapse(2) schedule(dynamic, 2)
        for (int64_t t = 0; t < attending; t++)
            for (int64_t h = 0; h < heads; h++)
                attend_token(cache, layer, slots[t], positions[t], h, head_of(query, t, h),
                             out + (t * heads + h) * cache->head_dim);
    }
}
