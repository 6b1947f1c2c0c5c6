/* Reduced: from coefficients of a block to 4 x 4, 2 x 2 or one sample, by libjpeg's arithmetic of reduced sizes.
 *
 * A sample of a reduced block is the mean of those that it stands for, along each axis: coefficient k, which gives
 * sqrt(2) cos(k pi / 16) cos(..) to the full size (see `jpeg_transform.h`), loses a factor cos(k pi / 16) where two
 * become one, and cos(k pi / 8) more where four do. Coefficient 4 vanishes from four samples, all that are even from two.
 * Multipliers have 13 fractional bits of twice, or four times, that mean, and are rounded each by itself. All is exact
 * but for the two roundings, one after each axis, columns first.
 */

enum { HALF = 1 << (FRACTION + 1) }; /* twice coefficient 0, and half of four times it */

/* Sums of coefficients of one line in pairs of lanes to its 4 samples, `bits` of them lost. */
INLINE void four_of(Words even, Shorts p26, Shorts p13, Shorts p57, int bits, Words out[4]) {
    const Words two_and_six = weighed(p26, 15137, -6270); /* 2 sqrt(2) cos(k pi / 16) cos((2 m + 1) k pi / 8), m = 0 */
    const Words outer = weighed(p13, 20995, 7373) + weighed(p57, -4926, -4176);  /* m = 0, and 3 with the other sign */
    const Words inner = weighed(p13, 8697, -17799) + weighed(p57, 11893, -1730); /* m = 1, and 2 */
    out[0] = (even + two_and_six + outer) >> bits;
    out[1] = (even - two_and_six + inner) >> bits;
    out[2] = (even - two_and_six - inner) >> bits;
    out[3] = (even + two_and_six - outer) >> bits;
}

/* PARTS blocks to 4 x 4 samples each; false where one is not tame. */
INLINE int blocks_to_four(const int16_t *blocks, const Place *places) {
    enum { FIRST = FRACTION - BETWEEN + 1, SECOND = FRACTION + BETWEEN + 3 + 1 };
    Shorts rows[8], across[4];
    if (!dequantised(blocks, places, rows))
        return 0;
    const Shorts none = rows[0] ^ rows[0];
    Words left[4], right[4], out[4];
    four_of(weighed(low(rows[0], none), HALF, 0) + (1 << (FIRST - 1)), low(rows[2], rows[6]), low(rows[1], rows[3]),
            low(rows[5], rows[7]), FIRST, left);
    four_of(weighed(high(rows[0], none), HALF, 0) + (1 << (FIRST - 1)), high(rows[2], rows[6]), high(rows[1], rows[3]),
            high(rows[5], rows[7]), FIRST, right);
    for (int i = 0; i < 4; i++)
        across[i] = packed(left[i], right[i]);
    const Shorts lower[2] = {low(across[0], across[2]), low(across[1], across[3])};
    const Shorts upper[2] = {high(across[0], across[2]), high(across[1], across[3])};
    const Shorts c01 = low(lower[0], lower[1]), c23 = high(lower[0], lower[1]); /* columns of 4, one behind the other */
    const Shorts c45 = low(upper[0], upper[1]), c67 = high(upper[0], upper[1]);
    four_of(weighed(low(c01, none), HALF, 0) + (1 << (SECOND - 1)) + (128 << SECOND), low(c23, c67), high(c01, c23),
            high(c45, c67), SECOND, out);
    const Shorts even = packed(out[0], out[2]), odd = packed(out[1], out[3]);
    const Shorts first = low(even, odd), last = high(even, odd); /* pairs of each row, its left one and its right one */
    uint8_t samples[LANES];
    store(samples, (Bytes)low((Shorts)limited(first, last), (Shorts)limited(last, first)));
    for (int part = 0; part < PARTS; part++)
        for (int row = 0; row < 4; row++)
            memcpy(places[part].to + (size_t)row * places[part].stride, samples + 16 * part + 4 * row, 4);
    return 1;
}

/* The odd coefficients' share in the first of two samples, and with the other sign in the second; in parts of 1:
 * 4 sqrt(2) cos(k pi / 16) cos(k pi / 8) cos(k pi / 4).
 */
enum { TWO_1 = 29692, TWO_3 = -10426, TWO_5 = 6967, TWO_7 = -5906 };

#define TWICE(...) {__VA_ARGS__, __VA_ARGS__}
#ifdef WITH_AVX2
#define ALL_PARTS(...) TWICE(__VA_ARGS__, __VA_ARGS__)
#else
#define ALL_PARTS(...) TWICE(__VA_ARGS__)
#endif
static const Shorts ZEROTH = ALL_PARTS(HALF, 0, 0, 0), ODDS = ALL_PARTS(TWO_1, TWO_3, TWO_5, TWO_7);

/* PARTS blocks to 2 x 2 samples each; false where one is not tame. */
INLINE int blocks_to_two(const int16_t *blocks, const Place *places) {
    enum { FIRST = FRACTION - BETWEEN + 2, SECOND = FRACTION + BETWEEN + 3 + 2 };
    Shorts rows[8];
    if (!dequantised(blocks, places, rows))
        return 0;
    Words sums[2], differences[2];
    for (int half = 0; half < 2; half++) {
        const Shorts p00 = half ? high(rows[0], rows[0]) : low(rows[0], rows[0]);
        const Shorts p13 = half ? high(rows[1], rows[3]) : low(rows[1], rows[3]);
        const Shorts p57 = half ? high(rows[5], rows[7]) : low(rows[5], rows[7]);
        const Words even = weighed(p00, HALF, HALF) + (1 << (FIRST - 1));
        const Words odd = weighed(p13, TWO_1, TWO_3) + weighed(p57, TWO_5, TWO_7);
        sums[half] = (even + odd) >> FIRST;
        differences[half] = (even - odd) >> FIRST;
    }
    const Shorts upper = packed(sums[0], sums[1]), lower = packed(differences[0], differences[1]);
    const Shorts x = low(upper, lower), y = high(upper, lower);
    const Shorts even = low(low(x, y), high(x, y)), odd = high(low(x, y), high(x, y)); /* of the upper row, the lower */
    const Words zeroth = weighed_by(even, ZEROTH), odds = weighed_by(odd, ODDS);
    const Words level = 2 * zeroth + (1 << (SECOND - 1)) + (128 << SECOND); /* in the first of each two lanes, as all: */
    const Words sway = odds + (Words)((Longs)odds >> 32);
    const Longs left = (Longs)((level + sway) >> SECOND), right = (Longs)((level - sway) >> SECOND);
    const Shorts pairs = packed((Words)((left & 0xFFFFFFFF) | right << 32), zeroth);
    uint8_t samples[LANES];
    store(samples, limited(pairs, pairs));
    for (int part = 0; part < PARTS; part++)
        for (int row = 0; row < 2; row++)
            memcpy(places[part].to + (size_t)row * places[part].stride, samples + 16 * part + 2 * row, 2);
    return 1;
}
