/* INT8 with several rows of x by AMX, whose instructions multiply tiles: of 16 rows of W and 16 rows of x, 64 numbers
   of each. W is read as it lies in memory; the digits of x are laid into tiles, 16 rows of x together:

       16 scales, then of each digit and of each four numbers of a row: those of the first row, of the second, …

   The sums are the same whole numbers as without, so y is the same to the last bit. Included by linear_products.c. */

#if defined(__AMX_INT8__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>

enum { TILE_ROWS = 16, TILE_BYTES = 64, FEWEST_ROWS = 8, LONGEST_IN_TILES = 16384 };
enum { SUMS = 0, OF_W = 4, OF_X = 6 }; /* registers 0–3, 4–5 and 6–7; the instructions want plain numbers */

int may_use_tiles; /* seen by tests */
__attribute__((constructor)) static void ask_linux_for_tiles(void) {
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    may_use_tiles = !syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA);
}

/* Whether x is laid into tiles, by what all products with the same x have in common. */
INLINE int in_tiles(int64_t type, long n_in, long n_x) {
    return may_use_tiles && (type == INT8 || type == INT8_DYNAMIC) && n_in % TILE_BYTES == 0 &&
           n_in <= LONGEST_IN_TILES && n_x >= FEWEST_ROWS;
}

/* Row i of n_x rows of x. */
static void lay_into_tiles(int digits, const float *x, char *out, long i, long n_x, long n_in) {
    char split[sizeof(digit_row) + MOST_DIGITS * LONGEST_IN_TILES];
    long in_tile = i % TILE_ROWS, first = i - in_tile, rows = at_most(TILE_ROWS, n_x - first);
    if (digits == 1) split_into_digits(1, x, split, n_in);
    else split_into_digits(MOST_DIGITS, x, split, n_in);
    float *scales = (float *)(out + first * digit_row_bytes(digits, n_in));
    int32_t *fours = (int32_t *)(scales + TILE_ROWS) + in_tile;
    scales[in_tile] = ((digit_row *)split)->scale;
    for (long k = 0; k < digits * n_in / 4; k++) memcpy(fours + k * rows, split + sizeof(digit_row) + 4 * k, 4);
}

/* Two tiles of W, with so many rows, and two of x. */
static void shape_tiles(const int *w_rows, const int *x_rows) {
    struct {
        uint8_t palette, zeros[15];
        uint16_t bytes[16]; /* of a row of a register */
        uint8_t rows[16];
    } shapes = {.palette = 1};
    for (int a = 0; a < 2; a++) {
        shapes.rows[OF_W + a] = w_rows[a], shapes.bytes[OF_W + a] = TILE_BYTES;
        shapes.rows[OF_X + a] = TILE_BYTES / 4, shapes.bytes[OF_X + a] = 4 * x_rows[a];
        for (int b = 0; b < 2; b++)
            shapes.rows[SUMS + 2 * a + b] = w_rows[a], shapes.bytes[SUMS + 2 * a + b] = 4 * x_rows[b];
    }
    __asm__ volatile("" : : "r"(&shapes) : "memory"); /* GCC's intrinsic names the first eight bytes alone */
    _tile_loadconfig(&shapes);
}

/* Columns become rows. */
INLINE void transpose(__m512i r[TILE_ROWS]) {
    __m512i t[TILE_ROWS];
    UNROLL for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    UNROLL for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]), r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]), r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    UNROLL for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88), t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    UNROLL for (int i = 0; i < 8; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    }
}

/* The sums of one tile, or of one for each digit, become numbers of y. As `put_together` and `finish`. */
INLINE void finish_tile(int digits, const int32_t sums[][TILE_ROWS * TILE_ROWS], const float *x_scale,
                        const float *scale, const float *bias, float *y, long n_out, int w_rows, int x_rows, int add) {
    __m512i columns[MOST_DIGITS][TILE_ROWS];
    __mmask16 some = (1u << w_rows) - 1;
    __m512 scales = scale ? _mm512_maskz_loadu_ps(some, scale) : _mm512_set1_ps(1);
    __m512 biases = bias ? _mm512_maskz_loadu_ps(some, bias) : _mm512_setzero_ps();
    UNROLL for (int d = 0; d < digits; d++) {
        for (int i = 0; i < TILE_ROWS; i++) columns[d][i] = _mm512_load_si512(sums[d] + i * TILE_ROWS);
        transpose(columns[d]);
    }
    for (int i = 0; i < x_rows; i++, y += n_out) {
        __m512 whole = _mm512_cvtepi32_ps(columns[0][i]);
        if (digits > 1) {
            __m512d low = _mm512_cvtepi32_pd(_mm512_castsi512_si256(columns[0][i]));
            __m512d high = _mm512_cvtepi32_pd(_mm512_extracti64x4_epi64(columns[0][i], 1));
            UNROLL for (int d = 1; d < digits; d++) {
                low = low * 256 + _mm512_cvtepi32_pd(_mm512_castsi512_si256(columns[d][i]));
                high = high * 256 + _mm512_cvtepi32_pd(_mm512_extracti64x4_epi64(columns[d][i], 1));
            }
            whole = _mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps(low)), _mm512_cvtpd_ps(high), 1);
        }
        __m512 result = _mm512_fmadd_ps(whole * _mm512_set1_ps(x_scale[i]), scales, biases);
        if (add) result += _mm512_maskz_loadu_ps(some, y);
        _mm512_mask_storeu_ps(y, some, result);
    }
}

/* The rows of W that come after these. */
INLINE void ask_for_next_rows(int w_tiles, const char *w, long k, long n_in) {
    for (int j = 0; j < w_tiles * TILE_ROWS; j++) __builtin_prefetch(w + (w_tiles * TILE_ROWS + j) * n_in + k, 0, 2);
}

/* Two tiles of W with two of x, or with one of either; the counts are constants at each call. */
INLINE void sum_tiles(int w_tiles, int x_tiles, const char *w, const char *const x[2], const int x_rows[2], long n_in,
                      int is_first) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (long k = 0; k < n_in; k += TILE_BYTES) {
        if (is_first) ask_for_next_rows(w_tiles, w, k, n_in);
        _tile_loadd(4, w + k, n_in);
        _tile_loadd(6, x[0] + k * x_rows[0], 4 * x_rows[0]);
        _tile_dpbssd(0, 4, 6);
        if (x_tiles > 1) {
            _tile_loadd(7, x[1] + k * x_rows[1], 4 * x_rows[1]);
            _tile_dpbssd(1, 4, 7);
        }
        if (w_tiles > 1) {
            _tile_loadd(5, w + TILE_ROWS * n_in + k, n_in);
            _tile_dpbssd(2, 5, 6);
            if (x_tiles > 1) _tile_dpbssd(3, 5, 7);
        }
    }
}

/* One tile of W with the three digits of one of x. */
INLINE void sum_digits(const char *w, const char *x, int x_rows, long n_in, int is_first) {
    long digit_bytes = x_rows * n_in, stride = 4 * x_rows;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    for (long k = 0; k < n_in; k += TILE_BYTES) {
        const char *tile = x + k * x_rows;
        if (is_first) ask_for_next_rows(1, w, k, n_in);
        _tile_loadd(4, w + k, n_in);
        _tile_loadd(6, tile, stride);
        _tile_dpbssd(0, 4, 6);
        _tile_loadd(7, tile + digit_bytes, stride);
        _tile_dpbssd(1, 4, 7);
        _tile_loadd(6, tile + 2 * digit_bytes, stride);
        _tile_dpbssd(2, 4, 6);
    }
}

/* As the functions of MULTIPLY. */
static __attribute__((noinline)) void multiply_in_tiles(int digits, const Linear *l, const char *x, float *y, long n_x,
                                                        int add) {
    long n_in = l->n_in, n_out = l->n_out, row_bytes = digit_row_bytes(digits, n_in);
    long at_once = digits == 1 ? 2 * TILE_ROWS : TILE_ROWS, block = rows_of_block(n_x, digits * n_in, at_once);
    int shaped[4] = {0};
    for (long first = 0; first < n_x; first += block)
        _Pragma("omp for schedule(static) nowait")
        for (long j = 0; j < n_out; j += at_once)
            for (long i = first; i < at_most(first + block, n_x); i += at_once) {
                int32_t sums[4][TILE_ROWS * TILE_ROWS] __attribute__((aligned(64)));
                const char *w = l->weight + j * n_in, *tiles[2];
                int rows[4]; /* of W, W, x and x */
                for (int a = 0; a < 2; a++) {
                    rows[a] = at_most(TILE_ROWS, n_out - j - a * TILE_ROWS);
                    rows[2 + a] = at_most(TILE_ROWS, n_x - i - a * TILE_ROWS);
                    tiles[a] = x + (i + a * TILE_ROWS) * row_bytes + TILE_BYTES;
                }
                int w_tiles = digits == 1 && rows[1] > 0 ? 2 : 1, x_tiles = digits == 1 && rows[3] > 0 ? 2 : 1;
                if (w_tiles == 1) rows[1] = rows[0];
                if (x_tiles == 1) rows[3] = rows[2];
                if (memcmp(shaped, rows, sizeof rows)) shape_tiles(rows, rows + 2);
                memcpy(shaped, rows, sizeof rows);
                if (digits > 1) sum_digits(w, tiles[0], rows[2], n_in, !i);
                else if (w_tiles == 2 && x_tiles == 2) sum_tiles(2, 2, w, tiles, rows + 2, n_in, !i);
                else if (w_tiles == 2) sum_tiles(2, 1, w, tiles, rows + 2, n_in, !i);
                else if (x_tiles == 2) sum_tiles(1, 2, w, tiles, rows + 2, n_in, !i);
                else sum_tiles(1, 1, w, tiles, rows + 2, n_in, !i);
                _tile_stored(0, sums[0], TILE_BYTES);
                _tile_stored(1, sums[1], TILE_BYTES);
                _tile_stored(2, sums[2], TILE_BYTES);
                if (digits == 1) _tile_stored(3, sums[3], TILE_BYTES);
                for (int a = 0; a < w_tiles; a++)
                    for (int b = 0; b < x_tiles; b++) {
                        long n = j + a * TILE_ROWS, m = i + b * TILE_ROWS;
                        const float *scale = l->scale ? (const float *)l->scale + n : NULL;
                        const float *bias = l->bias ? l->bias + n : NULL;
                        const float *x_scale = (const float *)(tiles[b] - TILE_BYTES);
                        if (digits == 1)
                            finish_tile(1, sums + 2 * a + b, x_scale, scale, bias, y + m * n_out + n, n_out, rows[a],
                                        rows[2 + b], add);
                        else
                            finish_tile(MOST_DIGITS, sums, x_scale, scale, bias, y + m * n_out + n, n_out, rows[a],
                                        rows[2 + b], add);
                    }
            }
    _tile_release();
}
#else
INLINE int in_tiles(int64_t type, long n_in, long n_x) { return (void)type, (void)n_in, (void)n_x, 0; }
static void lay_into_tiles(int digits, const float *x, char *out, long i, long n_x, long n_in) {
    (void)digits, (void)x, (void)out, (void)i, (void)n_x, (void)n_in;
}
static void multiply_in_tiles(int digits, const Linear *l, const char *x, float *y, long n_x, int add) {
    (void)digits, (void)l, (void)x, (void)y, (void)n_x, (void)add;
}
#endif
