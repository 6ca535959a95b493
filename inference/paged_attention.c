/* Attention of single tokens to keys and values that lie in blocks of cells; paged_attention.py says what it computes.

   Each token first stores its key and value in its cell. Then every query reads the cells of its own past once, block
   by block, with the softmax corrected as its maximum grows (online softmax, arXiv:1805.02867), so that no row of
   scores is kept, whatever the length. The query heads that share a key head read it together. */

#include <math.h>
#include <stdint.h>
#include <string.h>

enum { BLOCK = 16, MAX_HEAD_DIM = 256, MAX_GROUP = 64 };

typedef struct {
    void *keys, *values;               /* (layers, kv_heads, cells, head_dim), float or int8_t */
    float *key_scales, *value_scales;  /* (layers, kv_heads, cells), or NULL where the cells are floats */
    const int32_t *table;              /* (slots, blocks_per_slot): the blocks of each sequence, in order */
    int64_t heads, kv_heads, cells, head_dim, blocks_per_slot;
} Cache;

typedef struct {                       /* of a tensor (1, heads, tokens, head_dim) */
    const float *data;
    int64_t head_stride, token_stride;
} Rows;

static inline float exponential(float x) {  /* x <= 0; relative error below 2e-7; unlike expf, it can be vectorised */
    x = x < -87.0f ? -87.0f : x;
    float n = rintf(x * 1.44269504f);
    float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  /* |r| <= ln(2) / 2 */
    float p = 1.0f + r * (1.0f + r * (0.5f + r * (1.66666667e-1f + r * (4.16666667e-2f + r * (8.33333333e-3f + r * 1.38888889e-3f)))));
    int32_t bits = ((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    return p * power;
}

static void store(void *cells, float *scales, int64_t cell, const float *row, int64_t head_dim) {
    if (!scales) {
        memcpy((float *)cells + cell * head_dim, row, head_dim * sizeof(float));
        return;
    }
    float largest = 0;
    for (int64_t i = 0; i < head_dim; i++) largest = fmaxf(largest, fabsf(row[i]));
    float scale = fmaxf(largest, 1e-30f) / 127;
    int8_t *target = (int8_t *)cells + cell * head_dim;
    for (int64_t i = 0; i < head_dim; i++) target[i] = (int8_t)rintf(row[i] / scale);
    scales[cell] = scale;
}

/* `count` cells as floats: where they lie, or expanded into `buffer`. */
static const float *load(const void *cells, const float *scales, int64_t first, int count, int64_t head_dim, float *buffer) {
    if (!scales) return (const float *)cells + first * head_dim;
    const int8_t *source = (const int8_t *)cells + first * head_dim;
    for (int c = 0; c < count; c++) {
        float scale = scales[first + c];
        for (int64_t i = 0; i < head_dim; i++) buffer[c * head_dim + i] = scale * source[c * head_dim + i];
    }
    return buffer;
}

static void attend(const Cache *cache, int64_t base, const float *query, int64_t head_stride, int64_t group,
                   const int32_t *blocks, int64_t length, float *out) {
    int64_t head_dim = cache->head_dim;
    float factor = 1.0f / sqrtf((float)head_dim);
    float highest[MAX_GROUP], total[MAX_GROUP];
    float key_buffer[BLOCK * MAX_HEAD_DIM], value_buffer[BLOCK * MAX_HEAD_DIM];
    for (int64_t h = 0; h < group; h++) highest[h] = -INFINITY, total[h] = 0;
    memset(out, 0, group * head_dim * sizeof(float));
    for (int64_t start = 0; start < length; start += BLOCK) {
        int count = length - start < BLOCK ? (int)(length - start) : BLOCK;
        int64_t first = base + (int64_t)blocks[start / BLOCK] * BLOCK;
        const float *keys = load(cache->keys, cache->key_scales, first, count, head_dim, key_buffer);
        const float *values = load(cache->values, cache->value_scales, first, count, head_dim, value_buffer);
        for (int64_t h = 0; h < group; h++) {
            const float *q = query + h * head_stride;
            float *o = out + h * head_dim, score[BLOCK], highest_here = highest[h];
            for (int c = 0; c < count; c++) {
                float sum = 0;
                #pragma omp simd reduction(+ : sum)
                for (int64_t i = 0; i < head_dim; i++) sum += q[i] * keys[c * head_dim + i];
                score[c] = sum * factor;
                highest_here = score[c] > highest_here ? score[c] : highest_here;
            }
            if (highest_here > highest[h]) {
                float correction = exponential(highest[h] - highest_here);
                total[h] *= correction;
                for (int64_t i = 0; i < head_dim; i++) o[i] *= correction;
                highest[h] = highest_here;
            }
            for (int c = count; c < BLOCK; c++) score[c] = -INFINITY;
            #pragma omp simd
            for (int c = 0; c < BLOCK; c++) score[c] = exponential(score[c] - highest_here);
            for (int c = 0; c < count; c++) {
                total[h] += score[c];
                #pragma omp simd
                for (int64_t i = 0; i < head_dim; i++) o[i] += score[c] * values[c * head_dim + i];
            }
        }
    }
    for (int64_t h = 0; h < group; h++)
        for (int64_t i = 0; i < head_dim; i++) out[h * head_dim + i] /= total[h];
}

/* Store the keys and values of all tokens, then compute out (tokens, heads, head_dim) for the first `attending`. */
void paged_attention(const Cache *cache, int64_t layer, Rows query, Rows key, Rows value, float *out,
                     const int64_t *slots, const int64_t *positions, int64_t tokens, int64_t attending, int threads) {
    int64_t kv_heads = cache->kv_heads, group = cache->heads / kv_heads, head_dim = cache->head_dim;
    #pragma omp parallel num_threads(threads)
    {
        #pragma omp for collapse(2) schedule(static)
        for (int64_t t = 0; t < tokens; t++)
            for (int64_t g = 0; g < kv_heads; g++) {
                const int32_t *blocks = cache->table + slots[t] * cache->blocks_per_slot;
                int64_t cell = (layer * kv_heads + g) * cache->cells
                             + (int64_t)blocks[positions[t] / BLOCK] * BLOCK + positions[t] % BLOCK;
                store(cache->keys, cache->key_scales, cell, key.data + g * key.head_stride + t * key.token_stride, head_dim);
                store(cache->values, cache->value_scales, cell, value.data + g * value.head_stride + t * value.token_stride, head_dim);
            }  /* all threads wait here: tokens of one prompt see each other */
        #pragma omp for collapse(2) schedule(dynamic)
        for (int64_t t = 0; t < attending; t++)
            for (int64_t g = 0; g < kv_heads; g++)
                attend(cache, (layer * kv_heads + g) * cache->cells,
                       query.data + g * group * query.head_stride + t * query.token_stride, query.head_stride, group,
                       cache->table + slots[t] * cache->blocks_per_slot, positions[t] + 1,
                       out + (t * cache->heads + g * group) * head_dim);
    }
}
