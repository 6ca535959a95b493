/* Attention of tokens to keys and values that lie in blocks of cells; paged_cache.py says what it computes.

   Each token first stores its key and value in its cell. Then the queries read the blocks of their own past once, with
   the softmax corrected as its maximum grows (online softmax, arXiv:1805.02867): no row of scores is kept, whatever the
   length. In a block the keys lie transposed, so that the scores of its 16 cells are the lanes of one vector, or of two.

   Neighbours in a prompt go through their past together: a block comes to the first cache once for QUERIES of them, and
   to a register once for TILE. Each meets the same operations in the same order as it would alone, and gives the same to
   the last bit. */

#include "../../machine/vectors.h"
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

enum { QUERIES = 16, TILE = 4 };
enum { CHUNK = 16 * BLOCK_SIZE }; /* the softmax looks for its maximum once in so many cells */

typedef struct { /* a query on its way through its past */
    const float *query;
    float *out; /* (head_dim,): the sum of e^(score − highest) · value */
    int64_t length;
    vec totals; /* of e^(score − highest) */
    float highest, score[CHUNK]; /* scores of a chunk, and then weights */
} Past;

/* The scores of n queries in the cells of a block, which are added up in two sums, of even and of odd dimensions: an
   addition waits for the one before it. The two go side by side where the registers hold them. */
INLINE void score_block(int n, Past *pasts, const float *keys, int64_t first, int64_t head_dim, vec factor) {
    enum { VECS = BLOCK_SIZE / LANES < 2 ? BLOCK_SIZE / LANES : 2 };
    const int n_sums = n * VECS > 4 ? 1 : 2;
    for (int cell = 0; cell < BLOCK_SIZE; cell += VECS * LANES) {
        vec sums[2][TILE][VECS] = {{{{0}}}};
        for (int parity = 0; parity < 2; parity += n_sums)
            for (int64_t i = parity; i < head_dim; i += 2)
                UNROLL for (int s = 0; s < n_sums && i + s < head_dim; s++) {
                    vec key[VECS];
                    UNROLL for (int v = 0; v < VECS; v++) {
                        key[v] = load_vec_fp32(keys + (i + s) * BLOCK_SIZE + cell, v * LANES);
                        KEEP_IN_REGISTER(key[v]);
                    }
                    UNROLL for (int q = 0; q < n; q++) {
                        vec number = spread(pasts[q].query[i + s]);
                        UNROLL for (int v = 0; v < VECS; v++)
                            sums[parity + s][q][v] = add_product(sums[parity + s][q][v], number, key[v]);
                    }
                }
        UNROLL for (int q = 0; q < n; q++)
            UNROLL for (int v = 0; v < VECS; v++) {
                vec score = factor * (sums[0][q][v] + sums[1][q][v]);
                store_vec(pasts[q].score + first + cell + v * LANES, score);
            }
    }
}

/* The scores of the `count` cells of a chunk that a query sees become weights against the highest score so far. */
static void weigh(Past *past, int64_t count, int64_t head_dim) {
    float *score = past->score, highest = past->highest;
    vec largest = (vec){0} - INFINITY;
    int64_t n_cells = (count + BLOCK_SIZE - 1) / BLOCK_SIZE * BLOCK_SIZE;
    for (int64_t c = count; c < n_cells; c++) score[c] = -INFINITY;
    for (int64_t c = 0; c < n_cells; c += LANES) largest = larger_of(load_vec_fp32(score, c), largest);
    if (largest_lane(largest) > highest) highest = largest_lane(largest);
    if (highest > past->highest && past->highest > -INFINITY) { /* the sums so far were taken against the old maximum */
        float correction = expf(past->highest - highest);
        past->totals *= correction;
        for (int64_t i = 0; i < head_dim; i++) past->out[i] *= correction;
    }
    past->highest = highest;
    for (int64_t c = 0; c < n_cells; c += LANES) store_vec(score + c, exponential(load_vec_fp32(score, c) - highest));
    for (int64_t c = count; c < n_cells; c++) score[c] = 0;
    for (int64_t c = 0; c < n_cells; c += LANES) past->totals += load_vec_fp32(score, c);
}

/* The scores or weights of a block of INT8 cells times the scales of their keys or values: once, in place of head_dim
   numbers. */
static void scale_block(float *scores, const float *scales) {
    for (int c = 0; c < BLOCK_SIZE; c++) scores[c] *= scales[c];
}

/* Adds the values of the cells from `begin` to `end` of a block, n queries' weights of which start at number `first`. */
INLINE void add_values(int n, Past *pasts, const float *values, int64_t first, int64_t begin, int64_t end,
                       int64_t head_dim) {
    enum { VECS = 2 };
    int64_t i = 0;
    for (; i + VECS * LANES <= head_dim; i += VECS * LANES) {
        vec sums[TILE][VECS];
        UNROLL for (int q = 0; q < n; q++)
            UNROLL for (int v = 0; v < VECS; v++) sums[q][v] = load_vec_fp32(pasts[q].out + i, v * LANES);
        for (int64_t c = begin; c < end; c++) {
            vec value[VECS];
            UNROLL for (int v = 0; v < VECS; v++) {
                value[v] = load_vec_fp32(values + c * head_dim + i, v * LANES);
                KEEP_IN_REGISTER(value[v]);
            }
            UNROLL for (int q = 0; q < n; q++) {
                vec weight = spread(pasts[q].score[first + c]);
                UNROLL for (int v = 0; v < VECS; v++) sums[q][v] = add_product(sums[q][v], weight, value[v]);
            }
        }
        UNROLL for (int q = 0; q < n; q++)
            UNROLL for (int v = 0; v < VECS; v++) store_vec(pasts[q].out + i + v * LANES, sums[q][v]);
    }
    for (; i < head_dim; i++)
        for (int q = 0; q < n; q++)
            for (int64_t c = begin; c < end; c++) {
                float weight = pasts[q].score[first + c];
                pasts[q].out[i] = add_product(spread(pasts[q].out[i]), spread(weight), spread(values[c * head_dim + i]))[0];
            }
}

INLINE int64_t within(int64_t number, int64_t most) { return number < 0 ? 0 : at_most(number, most); }

/* out (head_dim,) = softmax(query · keys / √head_dim) · values of n queries, over the first `length` cells of a sequence,
   each of which has one more than the one before it. */
static void attend(int n, Past *pasts, const Cache *cache, int64_t base, const int32_t *blocks) {
    int64_t head_dim = cache->head_dim, size = head_dim * BLOCK_SIZE, length = pasts[n - 1].length;
    int is_int8 = cache->key_scales != NULL, whole = n - n % TILE; /* the queries in whole tiles */
    float factor = 1 / sqrtf((float)head_dim), buffer[is_int8 ? size : 1];
    for (int q = 0; q < n; q++) {
        pasts[q].highest = -INFINITY;
        pasts[q].totals = (vec){0};
        memset(pasts[q].out, 0, head_dim * sizeof(float));
    }
    for (int64_t start = 0; start < length; start += CHUNK, blocks += CHUNK / BLOCK_SIZE) {
        int64_t n_cells = within(length - start, CHUNK);
        /* All cells of a block are computed, those beyond the last token as well; only those that are seen count */
        for (int64_t c = 0; c < n_cells; c += BLOCK_SIZE) {
            int64_t block = base + blocks[c / BLOCK_SIZE];
            const float *keys = as_floats(cache->keys, is_int8, block, size, buffer);
            for (int q = 0; q < whole; q += TILE) score_block(TILE, pasts + q, keys, c, head_dim, spread(factor));
            for (int q = whole; q < n; q++) score_block(1, pasts + q, keys, c, head_dim, spread(factor));
            for (int q = 0; is_int8 && q < n; q++) scale_block(pasts[q].score + c, cache->key_scales + block * BLOCK_SIZE);
        }
        for (int q = 0; q < n; q++)
            if (pasts[q].length > start) weigh(pasts + q, within(pasts[q].length - start, CHUNK), head_dim);
        for (int64_t c = 0; c < n_cells; c += BLOCK_SIZE) {
            int64_t block = base + blocks[c / BLOCK_SIZE];
            const float *values = as_floats(cache->values, is_int8, block, size, buffer);
            for (int q = 0; is_int8 && q < n; q++) /* they go into the weights, of which the totals are made already */
                scale_block(pasts[q].score + c, cache->value_scales + block * BLOCK_SIZE);
            for (int q = 0; q < n; q++) {
                int64_t all_see = 0, sees = within(pasts[q].length - start - c, BLOCK_SIZE);
                if (q < whole) {
                    all_see = within(pasts[q - q % TILE].length - start - c, BLOCK_SIZE);
                    if (q % TILE == 0) add_values(TILE, pasts + q, values, c, 0, all_see, head_dim);
                }
                if (sees > all_see) add_values(1, pasts + q, values, c, all_see, sees, head_dim);
            }
        }
    }
    for (int q = 0; q < n; q++) {
        float weights = total(pasts[q].totals);
        for (int64_t i = 0; i < head_dim; i++) pasts[q].out[i] /= weights;
    }
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

/* What query head h of n tokens, one after another in a sequence, finds in their past and themselves; of n at most QUERIES.
   The rows of a token lie `stride` numbers after those of the one before it. */
static void attend_tokens(const Cache *cache, int64_t layer, int64_t slot, int64_t position, int64_t h, int64_t n,
                          const float *query, int64_t query_stride, float *out, int64_t out_stride) {
    int64_t base = (layer * cache->kv_heads + h / (cache->heads / cache->kv_heads)) * cache->blocks;
    const int32_t *blocks = cache->table + slot * cache->blocks_per_slot;
    Past pasts[QUERIES];
    for (int64_t q = 0; q < n; q++) {
        pasts[q].query = query + q * query_stride;
        pasts[q].out = out + q * out_stride;
        pasts[q].length = position + q + 1;
    }
    attend((int)n, pasts, cache, base, blocks);
}

/* How many tokens go through their past together with number t as the first of them; 0 if an earlier one is that. */
static int64_t tokens_from(const int64_t *slots, int64_t t, int64_t tokens) {
    int64_t n = 1, most = QUERIES - t % QUERIES;
    if (most < QUERIES && slots[t] == slots[t - 1]) return 0;
    while (n < most && t + n < tokens && slots[t + n] == slots[t]) n++;
    return n;
}

/* Store the keys and values of all tokens, then compute out (tokens, heads, head_dim). */
void paged_attention(const Cache *cache, int64_t layer, Rows query, Rows key, Rows value, float *out,
                     const int64_t *slots, const int64_t *positions, int64_t tokens, int threads) {
    int64_t heads = cache->heads, head_dim = cache->head_dim;
    #pragma omp parallel num_threads(threads)
    {
        #pragma omp for collapse(2) schedule(static)
        for (int64_t t = 0; t < tokens; t++)
            for (int64_t g = 0; g < cache->kv_heads; g++)
                store_token(cache, layer, slots[t], positions[t], g, head_of(key, t, g), head_of(value, t, g));
        /* all threads have waited for each other: tokens of one prompt see each other. As pasts differ in length, a
           thread that is done takes the next two heads (dynamic) */
        #pragma omp for collapse(2) schedule(dynamic, 2)
        for (int64_t t = 0; t < tokens; t++)
            for (int64_t h = 0; h < heads; h++) {
                int64_t n = tokens_from(slots, t, tokens);
                if (n)
                    attend_tokens(cache, layer, slots[t], positions[t], h, n, head_of(query, t, h), query.token_stride,
                                  out + (t * heads + h) * head_dim, heads * head_dim);
            }
    }
}
