/* Causal attention of short texts in training, forward and backward, one head after another: its scores stay in the cache.

   Included by fused_parts.c. Tensors are contiguous floats: queries and what comes of them (B, T, heads, width), keys
   and values (B, T, kv_heads, width), width a multiple of LANES. Heads that share keys are computed by one thread, in
   one order. `padded` is T, rounded up to a multiple of TILE. */

/* Rows of a tile: with two vectors each, its sums hide the latency of a multiplication. fused_parts.py makes room for as
   many. */
#define ROWS 6
#define TILE (2 * LANES) /* columns */

INLINE void tile(float *c, int64_t c_row, const float *a, int64_t a_row, int64_t a_step, const float *b, int64_t b_row,
                 int64_t depth, int add, const int rows, const int vecs) {
    vec sums[ROWS][2];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < vecs; v++)
            sums[r][v] = add ? load_vec_fp32(c + r * c_row, v * LANES) : (vec){0};
    for (int64_t k = 0; k < depth; k++) {
        vec columns[2];
        UNROLL for (int v = 0; v < vecs; v++) columns[v] = load_vec_fp32(b + k * b_row, v * LANES);
        UNROLL for (int r = 0; r < rows; r++) {
            vec factor = spread(a[r * a_row + k * a_step]);
            UNROLL for (int v = 0; v < vecs; v++) sums[r][v] = add_product(sums[r][v], factor, columns[v]);
        }
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < vecs; v++) store_vec(c + r * c_row + v * LANES, sums[r][v]);
}

/* c (rows, columns) = a (rows, depth) · b (depth, columns), or that is added to c; at most ROWS rows. a's numbers lie
   a_row and a_step apart; columns is a multiple of LANES. */
static void product(float *c, int64_t c_row, const float *a, int64_t a_row, int64_t a_step, const float *b,
                    int64_t b_row, int64_t depth, int64_t rows, int64_t columns, int add) {
    for (int64_t j = 0; j < columns; j += TILE) {
        int is_wide = columns - j >= TILE;
        if (rows == ROWS && is_wide) tile(c + j, c_row, a, a_row, a_step, b + j, b_row, depth, add, ROWS, 2);
        else if (rows == ROWS) tile(c + j, c_row, a, a_row, a_step, b + j, b_row, depth, add, ROWS, 1);
        else
            for (int64_t r = 0; r < rows; r++) {
                float *to = c + r * c_row + j;
                if (is_wide) tile(to, 0, a + r * a_row, 0, a_step, b + j, b_row, depth, add, 1, 2);
                else tile(to, 0, a + r * a_row, 0, a_step, b + j, b_row, depth, add, 1, 1);
            }
    }
}

static int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

/* to (width, padded): the transpose of rows (n, width) that lie `row` apart, and zeros. */
static void transpose(float *to, int64_t padded, const float *from, int64_t row, int64_t n, int64_t width) {
    for (int64_t k = 0; k < width; k++) {
        for (int64_t j = 0; j < n; j++) to[k * padded + j] = from[j * row + k];
        memset(to + k * padded + n, 0, 4 * (padded - n));
    }
}

/* Of scores (rows, padded), for queries at first, first + 1, …: what is left are exp(scale · score − shift) of the keys
   that a query sees, and zeros up to the key `end`. The shift of a query is its entry of `shifts`; if `find`, that is
   found first, such that its weights sum to 1, as the logarithm of the sum of exponentials. */
static void weigh(float *scores, int64_t padded, float *shifts, float scale, int64_t first, int64_t rows, int64_t end,
                  int find) {
    for (int64_t r = 0; r < rows; r++) {
        float *row = scores + r * padded;
        int64_t seen = first + r + 1, whole = round_up(seen, LANES);
        for (int64_t j = seen; j < whole; j++) row[j] = -3e38f; /* whose exponential is nothing beside the others */
        if (find) {
            vec lanes = load_vec_fp32(row, 0);
            for (int64_t j = LANES; j < whole; j += LANES) lanes = larger_of(load_vec_fp32(row, j), lanes);
            float largest = scale * largest_lane(lanes);
            vec sums = {0};
            for (int64_t j = 0; j < whole; j += LANES) {
                vec e = exponential(load_vec_fp32(row, j) * scale - largest);
                store_vec(row + j, e);
                sums += e;
            }
            float sum = total(sums);
            shifts[r] = largest + logf(sum);
            for (int64_t j = 0; j < whole; j += LANES) store_vec(row + j, load_vec_fp32(row, j) * (1.0f / sum));
        } else
            for (int64_t j = 0; j < whole; j += LANES)
                store_vec(row + j, exponential(load_vec_fp32(row, j) * scale - shifts[r]));
        for (int64_t j = seen; j < end; j++) row[j] = 0;
    }
}

/* shifts: (B, heads, T), kept for the backward pass; memory: (threads, padded · (width + ROWS)). */
void causal_attention(float *out, float *shifts, float *memory, const float *query, const float *key,
                      const float *value, int64_t batch, int64_t length, int64_t padded, int64_t heads,
                      int64_t kv_heads, int64_t width, float scale, int threads) {
    int64_t group = heads / kv_heads, q_row = heads * width, k_row = kv_heads * width, pairs = batch * kv_heads;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int64_t part = 0; part < threads; part++) {
        float *keys = memory + part * padded * (width + ROWS), *scores = keys + padded * width;
        for (int64_t pair = pairs * part / threads; pair < pairs * (part + 1) / threads; pair++) {
            int64_t text = pair / kv_heads, kv = pair % kv_heads, shared = text * length * k_row + kv * width;
            transpose(keys, padded, key + shared, k_row, length, width);
            for (int64_t head = kv * group; head < (kv + 1) * group; head++) {
                int64_t at = text * length * q_row + head * width;
                for (int64_t i = 0; i < length; i += ROWS) {
                    int64_t rows = at_most(length - i, ROWS), end = i + rows;
                    product(scores, padded, query + at + i * q_row, q_row, 1, keys, padded, width, rows,
                            round_up(end, LANES), 0);
                    weigh(scores, padded, shifts + (text * heads + head) * length + i, scale, i, rows, end, 1);
                    product(out + at + i * q_row, q_row, scores, padded, 1, value + shared, k_row, end, rows, width, 0);
                }
            }
        }
    }
}

/* memory: (threads, 2 · padded · (width + T)). */
void causal_attention_backward(float *of_query, float *of_key, float *of_value, float *memory, const float *of_out,
                               const float *out, float *shifts, const float *query, const float *key,
                               const float *value, int64_t batch, int64_t length, int64_t padded, int64_t heads,
                               int64_t kv_heads, int64_t width, float scale, int threads) {
    int64_t group = heads / kv_heads, q_row = heads * width, k_row = kv_heads * width, pairs = batch * kv_heads;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int64_t part = 0; part < threads; part++) {
        float *keys = memory + part * 2 * padded * (width + length), *values = keys + padded * width;
        float *weights = values + padded * width, *errors = weights + padded * length; /* both (T, padded) */
        for (int64_t pair = pairs * part / threads; pair < pairs * (part + 1) / threads; pair++) {
            int64_t text = pair / kv_heads, kv = pair % kv_heads, shared = text * length * k_row + kv * width;
            transpose(keys, padded, key + shared, k_row, length, width);
            transpose(values, padded, value + shared, k_row, length, width);
            for (int64_t head = kv * group; head < (kv + 1) * group; head++) {
                int64_t at = text * length * q_row + head * width;
                const float *q = query + at, *d = of_out + at, *o = out + at;
                for (int64_t i = 0; i < length; i += ROWS) {
                    int64_t rows = at_most(length - i, ROWS), end = i + rows, columns = round_up(end, LANES);
                    float *p = weights + i * padded, *e = errors + i * padded;
                    product(p, padded, q + i * q_row, q_row, 1, keys, padded, width, rows, columns, 0);
                    weigh(p, padded, shifts + (text * heads + head) * length + i, scale, i, rows, end, 0);
                    product(e, padded, d + i * q_row, q_row, 1, values, padded, width, rows, columns, 0);
                    for (int64_t r = 0; r < rows; r++) { /* the softmax's gradient */
                        vec products = {0};
                        for (int64_t k = 0; k < width; k += LANES)
                            products += load_vec_fp32(d + (i + r) * q_row, k) * load_vec_fp32(o + (i + r) * q_row, k);
                        float mean = total(products);
                        for (int64_t j = 0; j < end; j++)
                            e[r * padded + j] = p[r * padded + j] * (e[r * padded + j] - mean) * scale;
                    }
                    product(of_query + at + i * q_row, q_row, e, padded, 1, key + shared, k_row, end, rows, width, 0);
                }
                int add = head > kv * group;
                for (int64_t j = 0; j < length; j += ROWS) { /* queries from j on see the key j */
                    int64_t rows = at_most(length - j, ROWS), to = shared + j * k_row, from = j * padded + j;
                    product(of_value + to, k_row, weights + from, 1, padded, d + j * q_row, q_row, length - j, rows,
                            width, add);
                    product(of_key + to, k_row, errors + from, 1, padded, q + j * q_row, q_row, length - j, rows, width,
                            add);
                }
            }
        }
    }
}
