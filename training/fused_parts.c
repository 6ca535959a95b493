/* Parts of a Transformer in training, forward and backward, in one pass over memory each: where PyTorch computes them
   operation by operation, it reads and writes each tensor several times.

   All tensors are contiguous floats. Rows are shared out among threads, and a row gives the same whoever computes it. */

#include "../machine/vectors.h"
#include "causal_attention.h"

static inline vec load(const float *from, int64_t n) { /* the first n lanes; the others are 0 */
    vec lanes = {0};
    if (n >= LANES) return load_vec_fp32(from, 0);
    memcpy(&lanes, from, 4 * n);
    return lanes;
}

static inline void store(float *to, vec lanes, int64_t n) {
    if (n >= LANES) store_vec(to, lanes);
    else memcpy(to, &lanes, 4 * n);
}

/* out = silu(gate) * up */
void swiglu(float *out, const float *gate, const float *up, int64_t n, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < n; i += LANES) {
        vec g = load(gate + i, n - i);
        store(out + i, g * sigmoid(g) * load(up + i, n - i), n - i);
    }
}

void swiglu_backward(float *of_gate, float *of_up, const float *of_out, const float *gate, const float *up, int64_t n,
                     int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < n; i += LANES) {
        vec g = load(gate + i, n - i), u = load(up + i, n - i), d = load(of_out + i, n - i), s = sigmoid(g);
        store(of_up + i, d * g * s, n - i);
        store(of_gate + i, d * u * s * (1.0f + g * (1.0f - s)), n - i);
    }
}

/* Rows (n, width) over their root mean square, times weight; `inverse` (n) is kept for the backward pass. */
void rms_norm(float *out, float *inverse, const float *x, const float *weight, int64_t n, int64_t width, float eps,
              int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < n; row++) {
        const float *from = x + row * width;
        float *to = out + row * width;
        vec squares = {0};
        for (int64_t i = 0; i < width; i += LANES) {
            vec lanes = load(from + i, width - i);
            squares += lanes * lanes;
        }
        float scale = inverse[row] = 1.0f / sqrtf(total(squares) / width + eps);
        for (int64_t i = 0; i < width; i++) to[i] = from[i] * scale * weight[i];
    }
}

/* of_weight: (parts, width), a sum for each part of the rows; it is added to. */
void rms_norm_backward(float *of_x, float *of_weight, const float *of_out, const float *inverse, const float *x,
                       const float *weight, int64_t n, int64_t width, int64_t parts, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int64_t part = 0; part < parts; part++) {
        float *sums = of_weight + part * width;
        for (int64_t row = n * part / parts; row < n * (part + 1) / parts; row++) {
            const float *from = x + row * width, *d = of_out + row * width;
            float *to = of_x + row * width, scale = inverse[row];
            vec products = {0};
            for (int64_t i = 0; i < width; i += LANES) {
                int64_t rest = width - i;
                vec lanes = load(d + i, rest), normed = load(from + i, rest) * scale;
                store(sums + i, load(sums + i, rest) + lanes * normed, rest);
                products += lanes * load(weight + i, rest) * normed;
            }
            float mean = total(products) / width;
            for (int64_t i = 0; i < width; i++) to[i] = (d[i] * weight[i] - from[i] * scale * mean) * scale;
        }
    }
}

/* Rows (n, width) turned by the angles of their positions, (2, positions, width) cosines and sines, of which each stands
   for `repeats` rows in turn; turned back if `back`, which is the gradient. */
void rotate(float *out, const float *x, const float *angles, int64_t positions, int64_t repeats, int64_t n,
            int64_t width, int back, int threads) {
    int64_t half = width / 2;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < n; row++) {
        const float *from = x + row * width, *cosine = angles + row / repeats % positions * width;
        const float *sine = cosine + positions * width, *other = sine + half;
        float *to = out + row * width;
        if (back)
            for (int64_t i = 0; i < half; i++) {
                to[i] = from[i] * cosine[i] + from[half + i] * other[i];
                to[half + i] = from[half + i] * cosine[half + i] - from[i] * sine[i];
            }
        else
            for (int64_t i = 0; i < half; i++) {
                to[i] = from[i] * cosine[i] - from[half + i] * sine[i];
                to[half + i] = from[half + i] * cosine[half + i] + from[i] * other[i];
            }
    }
}

/* The cross-entropies (n) of logits (n, width), which become their gradients: probabilities, less 1 at the target. A
   row whose target is negative has none: 0. */
void cross_entropy(float *losses, float *logits, const int64_t *targets, int64_t n, int64_t width, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < n; row++) {
        float *x = logits + row * width;
        if (targets[row] < 0) {
            memset(x, 0, 4 * width);
            losses[row] = 0;
            continue;
        }
        float largest = x[0], wanted = x[targets[row]];
        int64_t whole = width / LANES * LANES;
        if (whole) {
            vec lanes = load(x, LANES);
            for (int64_t i = LANES; i < whole; i += LANES) lanes = larger_of(load(x + i, LANES), lanes);
            largest = largest_lane(lanes);
        }
        for (int64_t i = whole; i < width; i++) largest = x[i] > largest ? x[i] : largest;
        vec sums = {0};
        for (int64_t i = 0; i < whole; i += LANES) {
            vec e = exponential(load(x + i, LANES) - largest);
            store(x + i, e, LANES);
            sums += e;
        }
        float sum = total(sums);
        for (int64_t i = whole; i < width; i++) sum += x[i] = expf(x[i] - largest);
        losses[row] = logf(sum) + largest - wanted;
        float share = 1.0f / sum;
        for (int64_t i = 0; i < width; i++) x[i] *= share;
        x[targets[row]] -= 1.0f;
    }
}
