/* INT4: y = x Wᵀ with weights of 4 bits in groups of 32 with one scale, w = scale · (q − 8), or scale · q + minimum.

   Included by linear_products.c. The inputs of a group become whole numbers of 8 bits with one scale, which costs little
   beside the rounding of the weights, and are multiplied exactly: every processor has a fast kind of integer arithmetic
   for unsigned 4-bit (they are below 16) times signed 8-bit numbers. A group is one lane of a vector: after its 32
   products the lanes hold the sums of as many groups, ready to meet their scales, which lie side by side in memory.

   For that the weights of a row stand in blocks of 16 groups (the last may be shorter), made of four parts: part p has
   four bytes of each group, byte b with weight 8p + b in its lower half and 8p + 4 + b in its upper half. A last block
   so short that all its parts together fit into a vector is multiplied as one part, a group then having four lanes. */

enum { GROUP = 32, GROUPS = 16, PARTS = 4 };

typedef struct { /* the inputs of a block of groups, with zeros where a row has ended */
    float scales[GROUPS], sums[GROUPS]; /* of the rounded inputs */
    int32_t eightfold[GROUPS];          /* 8 times the sum of the whole numbers: to be taken off, as q − 8 is meant */
    int8_t numbers[2 * PARTS][GROUPS][4]; /* by parts and halves of a byte */
} InputBlock;

/* How many groups the last block has, if its parts are multiplied as one; otherwise 0. */
INLINE long groups_at_once(long n_in) {
    long rest = n_in / GROUP % GROUPS;
    return rest * PARTS <= LANES && (rest & (rest - 1)) == 0 ? rest : 0;
}

INLINE long grouped_row_bytes(long n_in) {
    return (n_in / GROUP + GROUPS - 1) / GROUPS * (long)sizeof(InputBlock);
}

static void split_into_groups(const float *x, char *out, long n_in) {
    long n_groups = n_in / GROUP, at_once = groups_at_once(n_in);
    memset(out, 0, grouped_row_bytes(n_in));
    for (long g = 0; g < n_groups; g++, x += GROUP) {
        InputBlock *block = (InputBlock *)out + g / GROUPS;
        long lane = g % GROUPS;
        float largest = largest_of(x, GROUP), factor = largest > 1e-30f ? 127 / largest : 0;
        int32_t sum = 0;
        int8_t numbers[GROUP];
        if (!(largest < INFINITY)) { /* infinities and NaN spoil the row, visibly */
            block->scales[lane] = NAN;
            continue;
        }
        for (int k = 0; k < GROUP; k++) {
            float scaled = x[k] * factor;
            numbers[k] = (int8_t)(int32_t)(scaled + (scaled < 0 ? -0.5f : 0.5f));
            sum += numbers[k];
        }
        for (int half = 0; half < 2 * PARTS; half++)
            if (g < n_groups - at_once) memcpy(block->numbers[half][lane], numbers + 4 * half, 4);
            else memcpy(block->numbers[half % 2][half / 2 * at_once + lane], numbers + 4 * half, 4);
        for (int part = 0; part < (g < n_groups - at_once ? 1 : PARTS); part++)
            block->scales[part * at_once + lane] = largest / 127;
        block->sums[lane] = largest / 127 * sum;
        block->eightfold[lane] = 8 * sum;
    }
}

/* Sums of the products of four bytes a lane: into the lane where there is an instruction for that, and otherwise into its
   two halves of 16 bits, which hold eight times two of them: 8 · 2 · 15 · 128 < 2^15. */
typedef uint8_t byte_lanes __attribute__((vector_size(4 * LANES)));
#ifdef DOT
typedef int_vec part_sums;
#else
typedef int16_t part_sums __attribute__((vector_size(4 * LANES)));
#endif

INLINE part_sums add_bytes(part_sums sums, byte_lanes weights, byte_lanes digits) {
#ifdef DOT
    return DOT(sums, weights, digits);
#elif defined(__AVX512BW__)
    return sums + (part_sums)_mm512_maddubs_epi16((__m512i)weights, (__m512i)digits);
#elif defined(__AVX2__) && LANES == 8
    return sums + (part_sums)_mm256_maddubs_epi16((__m256i)weights, (__m256i)digits);
#else
    part_sums w = (part_sums)weights, d = (part_sums)digits;
    return sums + (w & 15) * ((d << 8) >> 8) + (w >> 8) * (d >> 8);
#endif
}

INLINE int_vec lanes_of(part_sums sums) {
#ifdef DOT
    return sums;
#elif defined(__AVX512BW__)
    return (int_vec)_mm512_madd_epi16((__m512i)sums, _mm512_set1_epi16(1));
#elif defined(__AVX2__) && LANES == 8
    return (int_vec)_mm256_madd_epi16((__m256i)sums, _mm256_set1_epi16(1));
#else
    return (((int_vec)sums << 16) >> 16) + ((int_vec)sums >> 16);
#endif
}

INLINE vec floats_of(int_vec v) {
#if LANES == 16
    return (vec)_mm512_cvtepi32_ps((__m512i)v);
#elif LANES == 8
    return (vec)_mm256_cvtepi32_ps((__m256i)v);
#else
    return __builtin_convertvector(v, vec);
#endif
}

/* Four bytes each of the first `count` lanes. */
INLINE byte_lanes load_lanes(const char *p, long count) {
    byte_lanes lanes = {0};
    if (count == LANES) {
        memcpy(&lanes, p, sizeof lanes);
        return lanes;
    }
#if LANES == 16
    return (byte_lanes)_mm512_maskz_loadu_epi32((__mmask16)((1u << count) - 1), p);
#elif LANES == 8
    __m256i there = _mm256_cmpgt_epi32(_mm256_set1_epi32((int)count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    return (byte_lanes)_mm256_maskload_epi32((const int *)p, there);
#else
    memcpy(&lanes, p, 4 * count);
    return lanes;
#endif
}

#if defined(__AVX512F__)
#define GROUP_X_ROWS 4
#else
#define GROUP_X_ROWS 2
#endif

/* The first `count` numbers in fp16 from number `first` on. */
INLINE vec load_halves(const uint16_t *row, long first, long count) {
    if (count == LANES) return load_vec_fp16(row, first);
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    return (vec)_mm512_cvtph_ps(_mm256_maskz_loadu_epi16((__mmask16)((1u << count) - 1), row + first));
#else
    uint16_t lanes[LANES] = {0};
    for (long i = 0; i < count; i++) lanes[i] = row[first + i];
    return load_vec_fp16(lanes, 0);
#endif
}

/* 1, 2 or 4 numbers in fp16 from number `first` on, again and again. */
INLINE vec repeat_halves(const uint16_t *row, long first, long count) {
    typedef uint64_t fours __attribute__((vector_size(2 * LANES)));
    uint64_t four = row[first] * (uint64_t)0x0001000100010001;
    if (count == 2) four = (row[first] | (uint64_t)row[first + 1] << 16) * 0x0000000100000001;
    if (count == 4) memcpy(&four, row + first, sizeof four);
    fours all = four - (fours){0};
    return load_vec_fp16((const uint16_t *)&all, 0);
}

/* Adds the products of `count` groups from number `first` on, one in a lane; or, with one part, of the last block in
   four lanes each. */
INLINE void add_groups(vec sums[GROUP_X_ROWS][W_ROWS], int x_rows, int w_rows, const char *x, const char *w,
                       const uint16_t *scale, const uint16_t *minimum, long first, long count, int n_parts, long n_in,
                       int is_first) {
    part_sums parts[GROUP_X_ROWS][W_ROWS] = {{{0}}};
    long n_groups = n_in / GROUP, block = first / GROUPS, lane = first % GROUPS;
    long in_block = at_most(n_groups - block * GROUPS, GROUPS), row_bytes = grouped_row_bytes(n_in);
    w += block * (GROUPS * GROUP / 2) + 4 * lane;
    x += block * (long)sizeof(InputBlock);
    UNROLL for (int part = 0; part < n_parts; part++)
        UNROLL for (int j = 0; j < w_rows; j++) {
            const char *bytes = w + j * (n_in / 2) + part * 4 * in_block;
            byte_lanes both = load_lanes(bytes, n_parts == 1 ? PARTS * count : count);
            byte_lanes even = both & 15, odd = (byte_lanes)((int_vec)both >> 4) & 15;
            if (is_first) __builtin_prefetch(bytes + AHEAD);
            UNROLL for (int i = 0; i < x_rows; i++) {
                const InputBlock *inputs = (const InputBlock *)(x + i * row_bytes);
                byte_lanes low, high;
                memcpy(&low, inputs->numbers[2 * part][lane], sizeof low);
                memcpy(&high, inputs->numbers[2 * part + 1][lane], sizeof high);
                parts[i][j] = add_bytes(add_bytes(parts[i][j], even, low), odd, high);
            }
        }
    UNROLL for (int j = 0; j < w_rows; j++) {
        const uint16_t *its_scale = scale + j * n_groups, *its_minimum = minimum ? minimum + j * n_groups : NULL;
        vec scales = n_parts == 1 ? repeat_halves(its_scale, first, count) : load_halves(its_scale, first, count), minima;
        if (minimum)
            minima = n_parts == 1 ? repeat_halves(its_minimum, first, count) : load_halves(its_minimum, first, count);
        UNROLL for (int i = 0; i < x_rows; i++) {
            const InputBlock *inputs = (const InputBlock *)(x + i * row_bytes);
            int_vec whole = lanes_of(parts[i][j]), eightfold;
            if (minimum)
                sums[i][j] = add_product(sums[i][j], minima, load_vec_fp32(inputs->sums, lane));
            else {
                memcpy(&eightfold, inputs->eightfold + lane, sizeof eightfold);
                whole -= eightfold;
            }
            sums[i][j] = add_product(sums[i][j], floats_of(whole) * load_vec_fp32(inputs->scales, lane), scales);
        }
    }
}

INLINE void group_tile(int x_rows, int w_rows, const char *x, const char *w, const uint16_t *scale,
                       const uint16_t *minimum, const float *bias, float *y, long n_out, long n_in, int add, int is_first) {
    vec sums[GROUP_X_ROWS][W_ROWS] = {{{0}}};
    long first = 0, n_groups = n_in / GROUP;
    for (; first + LANES <= n_groups; first += LANES)
        add_groups(sums, x_rows, w_rows, x, w, scale, minimum, first, LANES, PARTS, n_in, is_first);
    long rest = n_groups - first, at_once = groups_at_once(n_in);
    if (at_once) add_groups(sums, x_rows, w_rows, x, w, scale, minimum, first, at_once, 1, n_in, 0);
    else if (rest) add_groups(sums, x_rows, w_rows, x, w, scale, minimum, first, rest, PARTS, n_in, 0);
    UNROLL for (int i = 0; i < x_rows; i++)
        finish(sums_of_four(sums[i]), w_rows, 1, NULL, bias, y + i * n_out, add);
}

/* Some rows of x with W_ROWS rows of W, or the fewer that are left, as `strip` does it. */
INLINE void group_strip(const char *x, const char *w, const uint16_t *scale, const float *bias, float *y, long n_x,
                        long n_out, long n_in, int add, long left, int is_first, const uint16_t *minimum) {
    long i = 0, row_bytes = grouped_row_bytes(n_in), n_groups = n_in / GROUP;
    if (left >= W_ROWS && n_x == 1)
        group_tile(1, W_ROWS, x, w, scale, minimum, bias, y, n_out, n_in, add, 1);
    else if (left >= W_ROWS) {
        for (; i + GROUP_X_ROWS <= n_x; i += GROUP_X_ROWS, is_first = 0)
            group_tile(GROUP_X_ROWS, W_ROWS, x + i * row_bytes, w, scale, minimum, bias, y + i * n_out, n_out, n_in, add,
                       is_first);
        for (; i < n_x; i++, is_first = 0)
            group_tile(1, W_ROWS, x + i * row_bytes, w, scale, minimum, bias, y + i * n_out, n_out, n_in, add, is_first);
    } else
        for (; i < n_x; i++)
            for (long j = 0; j < left; j++)
                group_tile(1, 1, x + i * row_bytes, w + j * (n_in / 2), scale + j * n_groups,
                           minimum ? minimum + j * n_groups : NULL, bias ? bias + j : 0, y + i * n_out + j, n_out, n_in,
                           add, 0);
}

/* out = row `index` of a table, or with `add` plus that. */
static void expand_grouped_row(const Linear *table, int64_t index, float *out, int add) {
    long n_in = table->n_in, n_groups = n_in / GROUP;
    const uint8_t *row = (const uint8_t *)table->weight + index * (n_in / 2);
    for (long k = 0; k < n_in; k++) {
        long g = k / GROUP, block = g / GROUPS, in_block = at_most(GROUPS, n_groups - block * GROUPS), in_group = k % GROUP;
        long byte = block * (GROUPS * GROUP / 2) + (in_group / 8 * in_block + g % GROUPS) * 4 + k % 4;
        float scale = load_one_fp16(table->scale, index * n_groups + g);
        float minimum = table->minimum ? load_one_fp16(table->minimum, index * n_groups + g) : -8 * scale;
        out[k] = (row[byte] >> (in_group / 4 % 2 * 4) & 15) * scale + minimum + (add ? out[k] : 0);
    }
}
