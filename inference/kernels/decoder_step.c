/* A forward pass for the tokens of a step in one call, from token ids to logits; decoder_step.py says when and why.

   One parallel region computes the whole step: the threads stay together from the first norm to the last, and wait for
   each other only where one needs what another has made. The mathematics is that of transformer_components.py. */

#include "linear_products.c"
#include "paged_attention.c"

typedef struct {
    const float *weight, *bias; /* (size,); a norm without bias is an RMSNorm, without weight it is none */
    int64_t size, is_rms;
    double eps;
} Norm;
LAYOUT(Norm, FIELD(Norm, weight), FIELD(Norm, bias), FIELD(Norm, size), FIELD(Norm, is_rms), FIELD(Norm, eps));

typedef struct {
    Norm attention_norm, query_norm, key_norm, feed_forward_norm;
    Linear query, key, value, output; /* of attention */
    Linear up, down, gate;            /* of the feed-forward network: gate without weight: GELU, otherwise SwiGLU */
    Linear router;                    /* with experts these take its place: three layers each, in this order */
    const Linear *experts;
    int64_t n_experts, experts_per_token;
} Layer;
LAYOUT(Layer, FIELD(Layer, attention_norm), FIELD(Layer, query_norm), FIELD(Layer, key_norm),
       FIELD(Layer, feed_forward_norm), FIELD(Layer, query), FIELD(Layer, key), FIELD(Layer, value),
       FIELD(Layer, output), FIELD(Layer, up), FIELD(Layer, down), FIELD(Layer, gate), FIELD(Layer, router),
       FIELD(Layer, experts), FIELD(Layer, n_experts), FIELD(Layer, experts_per_token));

typedef struct {
    const Layer *layers;
    Norm final_norm;
    const float *rotary; /* cosines and sines, (2, max_seq_len, head_dim), or NULL */
    int64_t n_layers, d_model, d_ff, max_seq_len;
    Linear head, tokens, positions; /* the last two are tables (n_out, d_model); rotary models have none of positions */
} Model;
LAYOUT(Model, FIELD(Model, layers), FIELD(Model, final_norm), FIELD(Model, rotary), FIELD(Model, n_layers),
       FIELD(Model, d_model), FIELD(Model, d_ff), FIELD(Model, max_seq_len), FIELD(Model, head), FIELD(Model, tokens),
       FIELD(Model, positions));

typedef struct { /* the tokens of a step */
    const int64_t *ids, *slots, *positions; /* (tokens,); their cells in the cache must be there */
    const int64_t *last;                    /* (n_last,): of which tokens logits are wanted */
    int64_t tokens, n_last;
} Tokens;
LAYOUT(Tokens, FIELD(Tokens, ids), FIELD(Tokens, slots), FIELD(Tokens, positions), FIELD(Tokens, last),
       FIELD(Tokens, tokens), FIELD(Tokens, n_last));

typedef struct { /* room for the intermediate results of a step */
    float *hidden;      /* (tokens, d_model): the residual stream; at the end what comes out of the final norm */
    float *normed;      /* (tokens, d_model) */
    float *query, *key, *value, *attended; /* (tokens, heads or kv_heads, head_dim) */
    float *inner, *gate; /* (tokens, d_ff), rounded up to whole vectors, see activate */
    char *digits;       /* (tokens, the most bytes that a layer's linear_digit_bytes asks for) */
    float *shares;      /* (tokens, n_experts): of each token's output the share of each expert; of most 0 */
    float *gathered, *computed; /* (tokens, d_model): what goes through one expert, and what comes out */
    int64_t *rows;      /* (n_experts, 1 + tokens): how many tokens go through an expert, and which */
} Scratch;
LAYOUT(Scratch, FIELD(Scratch, hidden), FIELD(Scratch, normed), FIELD(Scratch, query), FIELD(Scratch, key),
       FIELD(Scratch, value), FIELD(Scratch, attended), FIELD(Scratch, inner), FIELD(Scratch, gate),
       FIELD(Scratch, digits), FIELD(Scratch, shares), FIELD(Scratch, gathered), FIELD(Scratch, computed),
       FIELD(Scratch, rows));

/* The sum of x - minus, or of the squares of that; the first `whole` of n numbers fill whole vectors. */
INLINE float sum_of(const float *x, long n, long whole, float minus, int squared) {
    vec sums = {0};
    for (long k = 0; k < whole; k += LANES) {
        vec v = load_vec_fp32(x, k) - minus;
        sums += squared ? v * v : v;
    }
    float sum = sum_of_lanes(sums);
    for (long k = whole; k < n; k++) sum += squared ? (x[k] - minus) * (x[k] - minus) : x[k] - minus;
    return sum;
}

/* LayerNorm (arXiv:1607.06450) or RMSNorm (arXiv:1910.07467) of one row; out may be x. */
static void normalize(const Norm *norm, const float *x, float *out) {
    long n = norm->size, whole = n - n % LANES;
    float mean = norm->is_rms ? 0 : sum_of(x, n, whole, 0, 0) / n;
    float variance = sum_of(x, n, whole, mean, 1) / n;
    float factor = (float)(1 / sqrt(variance + norm->eps));
    for (long k = 0; k < n; k++)
        out[k] = (x[k] - mean) * factor * norm->weight[k] + (norm->bias ? norm->bias[k] : 0);
}

/* The two halves of a head are rotated against each other (arXiv:2104.09864), in place. */
static void rotate(const Model *model, float *head, int64_t position, int64_t head_dim) {
    const float *cosine = model->rotary + position * head_dim, *sine = cosine + model->max_seq_len * head_dim;
    int64_t half = head_dim / 2;
    for (int64_t i = 0; i < half; i++) {
        float first = head[i], second = head[i + half];
        head[i] = first * cosine[i] - second * sine[i];
        head[i + half] = second * cosine[i + half] + first * sine[i + half];
    }
}

/* A query or key of one head gets its norm and its position. */
static void place(const Model *model, const Norm *norm, float *head, int64_t position, int64_t head_dim) {
    if (norm->weight) normalize(norm, head, head);
    if (model->rotary) rotate(model, head, position, head_dim);
}

/* LANES numbers of the inner layer: SwiGLU (arXiv:2002.05202), or GELU with tanh, whose (1 + tanh z) / 2 is
   sigmoid(2 z). */
INLINE void activate(float *inner, const float *gate) {
    vec x = load_vec_fp32(inner, 0);
    if (gate) {
        vec g = load_vec_fp32(gate, 0);
        x *= g * sigmoid(g);
    } else
        x *= sigmoid(1.5957691216f * (x + 0.044715f * x * x * x));
    store_vec(inner, x);
}

/* out = row `index` of a table, or with `add` plus that. */
static void expand_row(const Linear *table, int64_t index, float *out, int add) {
    long n = table->n_in;
    if (table->type == INT4) {
        expand_grouped_row(table, index, out, add);
        return;
    }
    static const int bytes_of[] = {[FP32] = 4, [FP16] = 2, [BF16] = 2, [INT8] = 1};
    const char *row = table->weight + index * n * bytes_of[table->type];
    float scale = table->scale ? ((const float *)table->scale)[index] : 1;
    for (long k = 0; k < n; k++) {
        float number = table->type == FP32 ? load_one_fp32(row, k)
                       : table->type == INT8 ? load_one_int8(row, k)
                       : table->type == BF16 ? load_one_bf16(row, k)
                                             : load_one_fp16(row, k);
        out[k] = number * scale + (add ? out[k] : 0);
    }
}

/* out (tokens, d_model) = or, with `add`, += the feed-forward network of x, of which `digits` are made already. All
   threads call it, and have waited for each other when it returns. */
static void feed_forward(const Linear *up, const Linear *down, const Linear *gate, const Scratch *s, const float *x,
                         float *out, int64_t tokens, int64_t d_ff, int add, Meeting *all) {
    multiply(up, x, s->digits, s->inner, tokens, 0);
    if (gate->weight) multiply(gate, x, s->digits, s->gate, tokens, 0);
    meet(all); /* the same numbers are shared out in another way */

    #pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < tokens * d_ff; i += LANES) activate(s->inner + i, gate->weight ? s->gate + i : NULL);
    meet(all);
    if (prepare(down, s->inner, s->digits, tokens)) meet(all);
    multiply(down, s->inner, s->digits, out, tokens, add);
    meet(all); /* the next norm needs whole rows */
}

/* A token's router logits become the shares of the experts: their probabilities, of the likeliest alone, with sum 1. */
static void share_out(float *shares, int64_t n_experts, int64_t n_chosen) {
    float largest = shares[0], sum = 0;
    for (int64_t e = 1; e < n_experts; e++) largest = shares[e] > largest ? shares[e] : largest;
    for (int64_t e = 0; e < n_experts; e++) shares[e] = expf(shares[e] - largest);
    for (int64_t n = 0; n < n_chosen; n++) { /* the chosen are marked by a minus */
        int64_t best = -1;
        for (int64_t e = 0; e < n_experts; e++)
            if (!signbit(shares[e]) && (best < 0 || shares[e] > shares[best])) best = e;
        sum += shares[best];
        shares[best] = -shares[best];
    }
    for (int64_t e = 0; e < n_experts; e++) shares[e] = signbit(shares[e]) ? -shares[e] / sum : 0;
}

/* hidden (tokens, d_model) += the mixture of experts of normed. All threads call it. */
static void mix_experts(const Layer *layer, const Scratch *s, int64_t tokens, int64_t d_model, int64_t d_ff,
                        Meeting *all) {
    int64_t n_experts = layer->n_experts;
    multiply(&layer->router, s->normed, s->digits, s->shares, tokens, 0); /* in FP32, which needs no digits */
    meet(all);
    #pragma omp for schedule(static) nowait
    for (int64_t t = 0; t < tokens; t++) share_out(s->shares + t * n_experts, n_experts, layer->experts_per_token);
    meet(all);
    #pragma omp for schedule(static) nowait
    for (int64_t e = 0; e < n_experts; e++) {
        int64_t *rows = s->rows + e * (1 + tokens);
        rows[0] = 0;
        for (int64_t t = 0; t < tokens; t++)
            if (s->shares[t * n_experts + e] > 0) rows[++rows[0]] = t;
    }
    meet(all);
    for (int64_t e = 0; e < n_experts; e++) {
        const Linear *up = layer->experts + 3 * e;
        const int64_t *rows = s->rows + e * (1 + tokens) + 1, n = rows[-1];
        if (!n) continue; /* for all threads alike */
        #pragma omp for schedule(static) nowait
        for (int64_t i = 0; i < n; i++) {
            memcpy(s->gathered + i * d_model, s->normed + rows[i] * d_model, d_model * sizeof(float));
            prepare_row(up, s->gathered, s->digits, i, n);
        }
        meet(all);
        feed_forward(up, up + 1, up + 2, s, s->gathered, s->computed, n, d_ff, 0, all);
        #pragma omp for schedule(static) nowait
        for (int64_t i = 0; i < n; i++) {
            float share = s->shares[rows[i] * n_experts + e];
            float *hidden = s->hidden + rows[i] * d_model, *computed = s->computed + i * d_model;
            for (int64_t k = 0; k < d_model; k++) hidden[k] += share * computed[k];
        }
        meet(all);
    }
}

/* hidden (tokens, d_model) and logits (n_last, vocabulary). */
void decoder_step(const Model *model, const Cache *cache, const Tokens *step, const Scratch *scratch, float *logits,
                  int threads) {
    int64_t heads = cache->heads, kv_heads = cache->kv_heads, head_dim = cache->head_dim;
    int64_t d_model = model->d_model, d_ff = model->d_ff, tokens = step->tokens, n_last = step->n_last;
    const int64_t *slots = step->slots, *positions = step->positions;
    Scratch s = *scratch;
    Meeting meeting = {0}, *all = &meeting;
    #pragma omp parallel num_threads(threads)
    {
        join(all);
        #pragma omp for schedule(static)
        for (int64_t t = 0; t < tokens; t++) {
            expand_row(&model->tokens, step->ids[t], s.hidden + t * d_model, 0);
            if (model->positions.weight) expand_row(&model->positions, positions[t], s.hidden + t * d_model, 1);
        }
        for (int64_t index = 0; index < model->n_layers; index++) {
            const Layer *layer = model->layers + index;

            #pragma omp for schedule(static) nowait
            for (int64_t t = 0; t < tokens; t++) {
                normalize(&layer->attention_norm, s.hidden + t * d_model, s.normed + t * d_model);
                prepare_row(&layer->query, s.normed, s.digits, t, tokens); /* the key's and the value's, too: one kind of weights */
            }
            meet(all);
            multiply(&layer->query, s.normed, s.digits, s.query, tokens, 0);
            multiply(&layer->key, s.normed, s.digits, s.key, tokens, 0);
            multiply(&layer->value, s.normed, s.digits, s.value, tokens, 0);
            meet(all); /* a head may be the work of several threads */

            #pragma omp for collapse(2) schedule(static) nowait
            for (int64_t t = 0; t < tokens; t++)
                for (int64_t g = 0; g < kv_heads; g++) {
                    int64_t head = (t * kv_heads + g) * head_dim;
                    place(model, &layer->key_norm, s.key + head, positions[t], head_dim);
                    store_token(cache, index, slots[t], positions[t], g, s.key + head, s.value + head);
                }
            meet(all);
            /* all keys and values are stored. A query's own thread places it: nobody else needs it */
            #pragma omp for collapse(2) schedule(dynamic, 2) nowait
            for (int64_t t = 0; t < tokens; t++)
                for (int64_t h = 0; h < heads; h++) {
                    int64_t head = (t * heads + h) * head_dim, stride = heads * head_dim, n = tokens_from(slots, t, tokens);
                    for (int64_t q = 0; q < n; q++)
                        place(model, &layer->query_norm, s.query + head + q * stride, positions[t + q], head_dim);
                    if (n)
                        attend_tokens(cache, index, slots[t], positions[t], h, n, s.query + head, stride,
                                      s.attended + head, stride);
                }
            meet(all);
            if (prepare(&layer->output, s.attended, s.digits, tokens)) meet(all);
            multiply(&layer->output, s.attended, s.digits, s.hidden, tokens, 1); /* plus the residual stream */
            meet(all); /* a norm needs the whole row */

            #pragma omp for schedule(static) nowait
            for (int64_t t = 0; t < tokens; t++) {
                normalize(&layer->feed_forward_norm, s.hidden + t * d_model, s.normed + t * d_model);
                if (!layer->experts) prepare_row(&layer->up, s.normed, s.digits, t, tokens);
            }
            meet(all);
            if (layer->experts)
                mix_experts(layer, &s, tokens, d_model, d_ff, all);
            else
                feed_forward(&layer->up, &layer->down, &layer->gate, &s, s.normed, s.hidden, tokens, d_ff, 1, all);
        }
        #pragma omp for schedule(static) nowait
        for (int64_t t = 0; t < tokens; t++)
            normalize(&model->final_norm, s.hidden + t * d_model, s.hidden + t * d_model);
        meet(all);
        #pragma omp for schedule(static) nowait
        for (int64_t i = 0; i < n_last; i++) {
            memcpy(s.normed + i * d_model, s.hidden + step->last[i] * d_model, d_model * sizeof(float));
            prepare_row(&model->head, s.normed, s.digits, i, n_last);
        }
        meet(all);
        multiply(&model->head, s.normed, s.digits, logits, n_last, 0);
    }
}
