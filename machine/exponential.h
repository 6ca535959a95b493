/* e to the power of 16 numbers at once. Included by the C files of training and of inference, which see it alike. */

#include <stdint.h>

typedef float Lanes __attribute__((vector_size(4 * 16), aligned(4), may_alias));
typedef int32_t IntLanes __attribute__((vector_size(4 * 16), aligned(4)));

static inline Lanes exponential(Lanes x) {  /* of x <= 88; relative error below 3e-7 */
    const Lanes lowest = (Lanes){0} - 87.0f;
    IntLanes low = x < lowest;
    x = (Lanes)((low & (IntLanes)lowest) | (~low & (IntLanes)x));
    const float magic = 12582912.0f;  /* adding 1.5 * 2^23 rounds to a whole number */
    Lanes n = (x * 1.44269504f + magic) - magic;
    Lanes r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  /* x = n ln 2 + r, |r| <= ln(2) / 2 */
    Lanes p = r * 1.38888889e-3f + 8.33333333e-3f;
    p = p * r + 4.16666667e-2f;
    p = p * r + 1.66666667e-1f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return p * (Lanes)((__builtin_convertvector(n, IntLanes) + 127) << 23);
}
