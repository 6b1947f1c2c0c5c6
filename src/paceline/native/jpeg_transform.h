/* Transform: from coefficients to samples, and from samples of three components to rows of RGB pixels.
 *
 * Every step gives the bytes of libjpeg's accurate integer method, which are laid down by its arithmetic: the inverse
 * cosine transform of Loeffler, Ligtenberg and Moschytz (ICASSP 1989) with multipliers of 13 fractional bits, columns
 * first, with 2 fractional bits between the passes; triangular upsampling; JFIF's colours by multipliers of 16
 * fractional bits. All of it is exact but for the roundings, which come where they come there.
 */

enum { PIXELS = 512, GROUP = 64 };   /* coloured at a time, in whole groups */
enum { FRACTION = 13, BETWEEN = 2 }; /* bits of multipliers, and of values between the passes */
enum { MOST_COLUMNS = 5904 };        /* magnitudes of the coefficients of two columns, see `is_tame` */

/* Multipliers by 2^13. The method adds up products with rounded sums of a[k] = sqrt(2) cos(k pi / 16); multiplied out,
 * which changes no result, the odd coefficients have those of the matrix below, in which +-a1, +-a3, +-a5 and +-a7 come
 * once in each row and column, and may be 1 off what rounding them would give. In parts of 1:
 *     4433: a6 = 0.541196    6270: a2 - a6 = 0.765367    15137: a2 + a6 = 1.847759    9633: a3 = 1.175876
 *     3196: a3 - a5 = 0.390181    16069: a3 + a5 = 1.961571    7373: a3 - a7 = 0.899976    20995: a1 + a3 = 2.562915
 *     2446: -a1 + a3 + a5 - a7 = 0.298631    16819: a1 + a3 - a5 + a7 = 2.053120
 *     25172: a1 + a3 + a5 - a7 = 3.072711    12299: a1 + a3 - a5 - a7 = 1.501321
 */
enum { A6 = 4433, A2 = 4433 + 6270, MINUS_A2 = 4433 - 15137, A3 = 9633 };
static const int16_t ODD[4][4] = { /* results of coefficients 1, 3, 5 and 7 */
    {12299 - 7373 + A3 - 3196, A3, A3 - 3196, A3 - 7373},
    {A3, 25172 - 20995 + A3 - 16069, A3 - 20995, A3 - 16069},
    {A3 - 3196, A3 - 20995, 16819 - 20995 + A3 - 3196, A3},
    {A3 - 7373, A3 - 16069, A3, 2446 - 7373 + A3 - 16069},
};

/* The transform in one dimension of half the lanes of each part, of coefficients interleaved in pairs; results lose
 * `fraction` bits. Rows i and i + 4 of them come interleaved, at places `half`, 2 + half and so on.
 */
INLINE void transform_half(Shorts p04, Shorts p26, Shorts p13, Shorts p57, int fraction, int32_t more, int half,
                           Shorts *out) {
    const Words sum = weighed(p04, 1 << FRACTION, 1 << FRACTION) + more;
    const Words difference = weighed(p04, 1 << FRACTION, -(1 << FRACTION)) + more;
    const Words from_2 = weighed(p26, A2, A6), from_6 = weighed(p26, A6, MINUS_A2);
    const Words even[4] = {sum + from_2, difference + from_6, difference - from_6, sum - from_2};
    Words odd[4];
    for (int i = 0; i < 4; i++)
        odd[i] = weighed(p13, ODD[i][0], ODD[i][1]) + weighed(p57, ODD[i][2], ODD[i][3]);
    for (int i = 0; i < 4; i++) {
        const Words one = even[i] + odd[i], four_on = even[3 - i] - odd[3 - i];
        out[2 * i + half] =
            interleaved(one >> fraction, fraction > 16 ? four_on >> (fraction - 16) : four_on << (16 - fraction));
    }
}

/* One pass over all lanes: from rows to columns, `fraction` bits less. */
INLINE void pass(Shorts rows[8], int fraction, int32_t more) {
    Shorts x[8], y[8];
    transform_half(low(rows[0], rows[4]), low(rows[2], rows[6]), low(rows[1], rows[3]), low(rows[5], rows[7]), fraction,
                   more, 0, x);
    transform_half(high(rows[0], rows[4]), high(rows[2], rows[6]), high(rows[1], rows[3]), high(rows[5], rows[7]),
                   fraction, more, 1, x);
    for (int i = 0; i < 4; i++) {
        y[2 * i] = low(x[i], x[i + 4]);
        y[2 * i + 1] = high(x[i], x[i + 4]);
    }
    for (int i = 0; i < 4; i++) {
        rows[2 * i] = low(y[i], y[i + 4]);
        rows[2 * i + 1] = high(y[i], y[i + 4]);
    }
}

/* Whether no sum of the transform leaves 16 bits, in which libjpeg's vector code computes some: magnitudes of any two
 * columns add up to MOST_COLUMNS at the most, which 4 a1 takes to 2^15. Blocks of 8-bit images hardly ever come near.
 */
static int is_tame(const int16_t *block, const int16_t *steps) {
    int32_t columns[8] = {0}, first = 0, second = 0;
    for (int i = 0; i < BLOCK; i++)
        columns[i & 7] += (block[i] < 0 ? -block[i] : block[i]) * steps[i];
    for (int i = 0; i < 8; i++) {
        if (columns[i] > first)
            second = first, first = columns[i];
        else if (columns[i] > second)
            second = columns[i];
    }
    return first + second <= MOST_COLUMNS;
}

/* Where the samples of a block go, and its steps of quantisation. */
typedef struct {
    uint8_t *to;
    size_t stride;
    const int16_t *steps;
} Place;

/* The block's `size` x `size` samples if it has no other coefficient than DC, or if they are one. libjpeg limits one in
 * its plain C, of 10 bits (see decision 69).
 */
INLINE int level_to_samples(const int16_t *block, Place place, size_t size) {
    const int32_t level = (block[0] * place.steps[0] + 4) >> 3;
    const int32_t sample = level < -128 ? 0 : level > 127 ? 255 : level + 128;
    for (size_t row = 0; row < size; row++)
        memset(place.to + row * place.stride, sample, size);
    if (size == 1)
        return level >= -512 && level < 512;
    return level >= -MOST_COLUMNS / 8 && level <= MOST_COLUMNS / 8;
}

/* Rows of PARTS blocks, by their steps of quantisation; false where one is not tame. */
INLINE int dequantised(const int16_t *blocks, const Place *places, Shorts rows[8]) {
    Words columns = {0}; /* magnitudes in pairs of columns */
    for (int i = 0; i < 8; i++) {
        const Shorts row = loaded(blocks + 8 * i, blocks + BLOCK + 8 * i);
        const Shorts by = loaded(places[0].steps + 8 * i, places[PARTS - 1].steps + 8 * i), sign = row >> 15;
        columns += weighed_by((row ^ sign) - sign, by);
        rows[i] = (Shorts)((Unsigned)row * (Unsigned)by); /* nonsense where the block is not tame */
    }
    for (int part = 0; part < PARTS && any(columns > MOST_COLUMNS / 2); part++)
        if (!is_tame(blocks + BLOCK * part, places[part].steps))
            return 0;
    return 1;
}

/* PARTS blocks of coefficients to 8 x 8 samples each; false where one is not tame. */
INLINE int blocks_to_samples(const int16_t *blocks, const Place *places) {
    Shorts rows[8];
    if (!dequantised(blocks, places, rows))
        return 0;
    enum { FIRST = FRACTION - BETWEEN, SECOND = FRACTION + BETWEEN + 3 }; /* 3 for the scale of 8 of two dimensions */
    pass(rows, FIRST, 1 << (FIRST - 1));
    pass(rows, SECOND, (1 << (SECOND - 1)) + (128 << SECOND)); /* samples are shifted by 128 (A.3.1) */
    for (int i = 0; i < 8; i += 2) {
        uint8_t two[LANES];
        store(two, limited(rows[i], rows[i + 1]));
        for (int part = 0; part < PARTS; part++)
            for (int row = 0; row < 2; row++)
                memcpy(places[part].to + (size_t)(i + row) * places[part].stride, two + 16 * part + 8 * row, 8);
    }
    return 1;
}

/* Twice as many columns: each sample leans by a quarter to its neighbour on that side; the ends are repeated. */
INLINE void widen(const uint8_t *restrict from, size_t count, uint8_t *restrict to) {
    for (size_t i = 0; i < count; i++) { /* from[-1] and from[count] repeat the ends */
        to[2 * i] = (uint8_t)((3 * from[i] + from[(ptrdiff_t)i - 1] + 1) >> 2);
        to[2 * i + 1] = (uint8_t)((3 * from[i] + from[i + 1] + 2) >> 2);
    }
}

/* Between two rows: the near one and a quarter of the way to the far one; `bias` 1 above it, 2 below. */
INLINE void lean(const uint8_t *restrict near, const uint8_t *restrict far, size_t count, int bias,
                 uint8_t *restrict to) {
    for (size_t i = 0; i < count; i++)
        to[i] = (uint8_t)((3 * near[i] + far[i] + bias) >> 2);
}

/* Both, rounded once; `sums` has a place before and behind `count`. */
INLINE void lean_and_widen(const uint8_t *restrict near, const uint8_t *restrict far, size_t count,
                           int16_t *restrict sums, uint8_t *restrict to) {
    for (size_t i = 0; i < count; i++)
        sums[i] = (int16_t)(3 * near[i] + far[i]);
    sums[-1] = sums[0];
    sums[count] = sums[count - 1];
    for (size_t i = 0; i < count; i++) {
        to[2 * i] = (uint8_t)((3 * sums[i] + sums[(ptrdiff_t)i - 1] + 8) >> 4);
        to[2 * i + 1] = (uint8_t)((3 * sums[i] + sums[i + 1] + 7) >> 4);
    }
}

INLINE void repeat(const uint8_t *restrict from, size_t count, uint8_t *restrict to) {
    for (size_t i = 0; i < count; i++)
        to[2 * i] = to[2 * i + 1] = from[i];
}

/* Product of doubled numbers with a multiplier of 16 fractional bits, rounded: the floor of half of a floor is the
 * floor of the half.
 */
INLINE Shorts share(Shorts doubled, int multiplier) { return (high_product(doubled, multiplier) + 1) >> 1; }

/* JFIF's colours: R = Y + 1.402 Cr, G = Y - 0.34414 Cb - 0.71414 Cr, B = Y + 1.772 Cb; whole parts taken out. */
INLINE void colour_half(Shorts y, Shorts cb, Shorts cr, Shorts *r, Shorts *g, Shorts *b) {
    const Shorts blue = cb - 128, red = cr - 128;
    *r = y + red + share(2 * red, 26345);
    *b = y + 2 * blue + share(2 * blue, -14942);
    const Words lower = (weighed(low(blue, red), -22554, 65536 - 46802) + 32768) >> 16;
    const Words upper = (weighed(high(blue, red), -22554, 65536 - 46802) + 32768) >> 16;
    *g = y - red + packed(lower, upper);
}

INLINE void colour(const uint8_t *y, const uint8_t *cb, const uint8_t *cr, size_t count, uint8_t *r, uint8_t *g,
                   uint8_t *b) {
    for (size_t i = 0; i < count; i += LANES) {
        const Bytes luma = load(y + i), blue = load(cb + i), red = load(cr + i);
        Shorts lower[3], upper[3];
        colour_half(low_bytes(luma), low_bytes(blue), low_bytes(red), &lower[0], &lower[1], &lower[2]);
        colour_half(high_bytes(luma), high_bytes(blue), high_bytes(red), &upper[0], &upper[1], &upper[2]);
        store(r + i, limited(lower[0], upper[0]));
        store(g + i, limited(lower[1], upper[1]));
        store(b + i, limited(lower[2], upper[2]));
    }
}

/* Of the first two channels' shuffles, lanes that come from the third are filled by the second. */
INLINE void join(const uint8_t *r, const uint8_t *g, const uint8_t *b, size_t count, uint8_t *rgb) {
    for (size_t i = 0; i < count; i += SIXTEEN) {
        const Sixteen red = load_sixteen(r + i), green = load_sixteen(g + i), blue = load_sixteen(b + i);
        const Sixteen x = SHUFFLE(Sixteen, red, green, 0, 16, 0, 1, 17, 0, 2, 18, 0, 3, 19, 0, 4, 20, 0, 5);
        const Sixteen y = SHUFFLE(Sixteen, red, green, 21, 0, 6, 22, 0, 7, 23, 0, 8, 24, 0, 9, 25, 0, 10, 26);
        const Sixteen z = SHUFFLE(Sixteen, red, green, 0, 11, 27, 0, 12, 28, 0, 13, 29, 0, 14, 30, 0, 15, 31, 0);
        uint8_t *const to = rgb + 3 * i;
        store_sixteen(to, SHUFFLE(Sixteen, x, blue, 0, 1, 16, 3, 4, 17, 6, 7, 18, 9, 10, 19, 12, 13, 20, 15));
        store_sixteen(to + 16, SHUFFLE(Sixteen, y, blue, 0, 21, 2, 3, 22, 5, 6, 23, 8, 9, 24, 11, 12, 25, 14, 15));
        store_sixteen(to + 32, SHUFFLE(Sixteen, z, blue, 26, 1, 2, 27, 4, 5, 28, 7, 8, 29, 10, 11, 30, 13, 14, 31));
    }
}

/* A row of pixels from rows of samples, which may be read as far as the end of a whole GROUP. */
INLINE void colour_row(const uint8_t *y, const uint8_t *cb, const uint8_t *cr, size_t width, uint8_t *rgb) {
    _Alignas(64) uint8_t r[PIXELS], g[PIXELS], b[PIXELS], last[3 * SIXTEEN];
    for (size_t left = 0; left < width; left += PIXELS) {
        const size_t count = width - left < PIXELS ? width - left : PIXELS;
        colour(y + left, cb + left, cr + left, (count + GROUP - 1) / GROUP * GROUP, r, g, b);
        const size_t whole = count / SIXTEEN * SIXTEEN;
        join(r, g, b, whole, rgb + 3 * left);
        if (whole < count) {
            join(r + whole, g + whole, b + whole, SIXTEEN, last);
            memcpy(rgb + 3 * (left + whole), last, 3 * (count - whole));
        }
    }
}
