/* Jitter: hue, saturation and value of rows of pixels changed in one pass, mirrored on the way where asked.
 *
 * The one body is compiled once per level of vector units, and the level is chosen at run time. All levels give the same
 * bytes: IEEE single precision, no contraction to fused operations, true division.
 *
 * A row goes through in blocks that stay in the first-level cache:
 *
 *     RGBRGB..  --masks-->  R, G, B  --16 bit-->  value, chroma, hue  --float-->  R, G, B  --masks-->  RGBRGB..
 *
 * Hardly anything is shuffled on the way, which is what the units are slowest at: planes have their pixels in an order
 * that masks can give, and numbers become wider and narrower by shifts, those of even and of odd places apart.
 */

#ifndef PACELINE_JITTER_H
#define PACELINE_JITTER_H

#include "levels.h"

enum { BLOCK = 320, GROUP = 64, LANES = 16 }; /* pixels: BLOCK at a time, in whole GROUPs; grey ones shuffled at once */
enum { SIXTH = 4096 };                        /* of the hue's circle, in fixed point */
typedef uint8_t Bytes __attribute__((vector_size(LANES)));

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (Bytes){__VA_ARGS__})
#endif

INLINE Bytes load(const uint8_t *from) {
    Bytes bytes;
    memcpy(&bytes, from, LANES);
    return bytes;
}

INLINE void store(uint8_t *to, Bytes bytes) { memcpy(to, &bytes, LANES); }

INLINE Bytes reversed(Bytes x) { return SHUFFLE(x, x, 15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0); }

/* Grey pixels, which keep their order, into pixels of three channels. */
INLINE void spread(const uint8_t *grey, size_t count, int mirrored, uint8_t *rgb) {
    for (size_t i = 0; i < count; i += LANES) {
        const Bytes read = load(grey + (mirrored ? count - LANES - i : i));
        const Bytes x = mirrored ? reversed(read) : read;
        uint8_t *const to = rgb + 3 * i;
        store(to, SHUFFLE(x, x, 0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4, 5));
        store(to + 16, SHUFFLE(x, x, 5, 5, 6, 6, 6, 7, 7, 7, 8, 8, 8, 9, 9, 9, 10, 10));
        store(to + 32, SHUFFLE(x, x, 10, 11, 11, 11, 12, 12, 12, 13, 13, 13, 14, 14, 14, 15, 15, 15));
    }
}

/* A group of 64 pixels is three parts of 64 bytes. At any place of the three stand a byte of red, one of green and one
 * of blue, since 64 is no multiple of 3:
 *
 *     place          0   1   2   3  ..  62  63
 *     first part     R0  G0  B0  R1 ..  B20 R21
 *     second part    G21 B21 R22 G22 .. R42 G42
 *     third part     B42 R43 G43 B43 .. G63 B63
 *
 * So masks alone make a plane of them: R0 R43 R22 R1 .. R42 R21. Green and blue stand in the same order one and
 * two places further on, and what goes over an end of the group there comes in at its other end. */
#define THRICE(...) __VA_ARGS__, __VA_ARGS__, __VA_ARGS__
static const uint8_t THIRDS[] = {THRICE(THRICE(THRICE(255, 0, 0)))};

/* Of three bytes the one whose turn it is at a place. */
INLINE uint8_t in_turn(size_t place, size_t turn, uint8_t first, uint8_t second, uint8_t third) {
    const uint8_t *const thirds = THIRDS + place;
    return (first & thirds[turn % 3]) | (second & thirds[(turn + 1) % 3]) | (third & thirds[(turn + 2) % 3]);
}

/* Pixels into planes, all three in the order of red: green and blue are read one and two bytes further on. */
INLINE void split(const uint8_t *restrict rgb, size_t groups, uint8_t *restrict r, uint8_t *restrict g,
                  uint8_t *restrict b) {
    uint8_t last[3 * GROUP + 2] = {0}; /* two bytes after a group are read, too, and masked */
    for (size_t group = 0; group < groups; group++) {
        const size_t to = GROUP * group;
        const uint8_t *const x = group + 1 < groups ? rgb + 3 * to : memcpy(last, rgb + 3 * to, 3 * GROUP);
        const uint8_t *const y = x + GROUP, *const z = y + GROUP;
        for (size_t i = 0; i < GROUP; i++) {
            r[to + i] = in_turn(i, 0, x[i], y[i], z[i]);
            g[to + i] = in_turn(i, 0, x[i + 1], y[i + 1], z[i + 1]);
            b[to + i] = in_turn(i, 0, x[i + 2], y[i + 2], z[i + 2]);
        }
    }
}

/* Planes into pixels, where asked from the last pixel to the first. */
INLINE void join(const uint8_t *restrict r, const uint8_t *restrict g, const uint8_t *restrict b, size_t groups,
                 int mirrored, uint8_t *restrict rgb) {
    for (size_t group = 0; group < groups; group++) {
        const ptrdiff_t from = (ptrdiff_t)(GROUP * group), last = from + GROUP - 1;
        uint8_t *const first = rgb + 3 * GROUP * (mirrored ? groups - 1 - group : group);
        uint8_t *const second = first + GROUP, *const third = second + GROUP;
        for (ptrdiff_t i = 0; i < GROUP; i++) { /* places before the planes' first are read, and masked */
            const uint8_t red = r[mirrored ? last - 2 - i : from + i];
            const uint8_t green = g[mirrored ? last - 1 - i : from + i - 1];
            const uint8_t blue = b[mirrored ? last - i : from + i - 2];
            first[i] = in_turn((size_t)i, 0, red, blue, green);
            second[i] = in_turn((size_t)i, 1, red, blue, green);
            third[i] = in_turn((size_t)i, 2, red, blue, green);
        }
        if (mirrored) { /* what went over an end of the group */
            second[-1] = r[last - 1];
            third[-2] = r[last];
            third[-1] = g[last];
        } else {
            second[0] = g[last];
            second[1] = b[last];
            third[0] = b[last - 1];
        }
    }
}

INLINE float lesser(float a, float b) { return a < b ? a : b; }
INLINE float greater(float a, float b) { return a > b ? a : b; }
INLINE int16_t least_of(int16_t a, int16_t b) { return a < b ? a : b; }
INLINE int16_t most_of(int16_t a, int16_t b) { return a > b ? a : b; }

typedef struct {
    float shift;      /* of the hue in fixed point: 1 to 7 sixths, so that no hue is negative, and a half to round */
    float saturation; /* gain, times 2^16 over SIXTH */
    float value;      /* gain, times 256 */
} Jitter;

/* One number for each pixel of a block, or two of them as one of 32 bits. */
typedef union {
    uint16_t each[BLOCK];
    uint32_t pairs[BLOCK / 2];
} Numbers;

/* A block between the steps: first value and chroma, 0 to 255, and the hue in sixths, -1 to 5, times the chroma; then
 * what the jitter made of them. Pixels of even places come first, those of odd places after all of them. */
typedef struct {
    _Alignas(64) Numbers values, chromas, hues, new_hues, new_chromas, leasts;
} Block;

INLINE void look(Block *block, size_t place, int16_t red, int16_t green, int16_t blue) {
    const int16_t value = most_of(most_of(red, green), blue);
    const int16_t chroma = value - least_of(least_of(red, green), blue);
    const int16_t from_green = blue - red + 2 * chroma, from_blue = red - green + 4 * chroma;
    const int16_t other = value == green ? from_green : from_blue;
    block->hues.each[place] = (uint16_t)(value == red ? green - blue : other);
    block->values.each[place] = (uint16_t)value;
    block->chromas.each[place] = (uint16_t)chroma;
}

typedef struct {
    uint32_t hue, chroma, least; /* in fixed point of 16 bits: a SIXTH is 4096, a step of 255 is 256 */
} Shade;

/* The hue comes times 2^16, as the upper half of a number. */
INLINE Shade change(int32_t old_value, int32_t old_chroma, int32_t old_hue, Jitter jitter) {
    const float value_before = (float)old_value, chroma_before = (float)old_chroma;
    /* One division serves hue and saturation; without chroma both are 0 whatever it gives. */
    const float reciprocal = (SIXTH / 65536.0f) / greater(value_before * chroma_before, 1.0f);
    const float hue = (float)old_hue * (value_before * reciprocal) + jitter.shift;
    const float saturation = lesser(chroma_before * (chroma_before * reciprocal) * jitter.saturation, 1.0f);
    const float value = lesser(value_before * jitter.value, 255.0f * 256.0f);
    const float chroma = value * saturation;
    return (Shade){
        .hue = (uint32_t)(int32_t)hue,
        .chroma = (uint32_t)(int32_t)(chroma + 0.5f),
        .least = (uint32_t)(int32_t)(value - chroma + 130.0f), /* a half to round, a hair for truncations */
    };
}

/* A channel in 128ths: the least of the three and the share of the chroma that its hue gives it. */
INLINE uint16_t channel(uint16_t least, uint16_t chroma, int16_t share) {
    const uint16_t ramp = (uint16_t)(least_of(most_of(share, 0), SIXTH) << 3); /* 1 is 2^15 */
    return (uint16_t)(least + (uint16_t)(((uint32_t)chroma * ramp) >> 16));
}

typedef struct {
    uint16_t red, green, blue;
} Colour;

INLINE Colour show(const Block *block, size_t place) {
    const uint16_t once = block->new_hues.each[place];
    const uint16_t less = (uint16_t)(once - 6 * SIXTH); /* a full circle less, or a very large number */
    const int16_t hue = (int16_t)(once < less ? once : less);
    const uint16_t chroma = block->new_chromas.each[place], least = block->leasts.each[place] >> 1;
    return (Colour){
        .red = channel(least, chroma, most_of(2 * SIXTH - hue, hue - 4 * SIXTH)),
        .green = channel(least, chroma, least_of(hue, 4 * SIXTH - hue)),
        .blue = channel(least, chroma, least_of(hue - 2 * SIXTH, 6 * SIXTH - hue)),
    };
}

/* Whole values of two pixels side by side. */
INLINE uint16_t both(uint16_t even, uint16_t odd) { return (uint16_t)(even >> 7 | (odd << 1 & 0xFF00)); }

INLINE uint16_t pair_at(const uint8_t *bytes) {
    uint16_t pair;
    memcpy(&pair, bytes, sizeof pair);
    return pair;
}

INLINE void put_pair(uint8_t *bytes, uint16_t pair) { memcpy(bytes, &pair, sizeof pair); }

/* Exact but for the last step, in fixed point of 16 bits, which is off by 0.05 of 255 at the most before rounding. */
INLINE void jitter_planes(uint8_t *restrict r, uint8_t *restrict g, uint8_t *restrict b, size_t groups, Jitter jitter) {
    Block block;
    const size_t half = groups * (GROUP / 2);
    for (size_t i = 0; i < half; i++) {
        const uint16_t red = pair_at(r + 2 * i), green = pair_at(g + 2 * i), blue = pair_at(b + 2 * i);
        look(&block, i, red & 255, green & 255, blue & 255);
        look(&block, half + i, red >> 8, green >> 8, blue >> 8);
    }
    for (size_t i = 0; i < half; i++) {
        const uint32_t value = block.values.pairs[i], chroma = block.chromas.pairs[i], hue = block.hues.pairs[i];
        const Shade low = change(value & 0xFFFF, chroma & 0xFFFF, (int32_t)(hue << 16), jitter);
        const Shade high = change(value >> 16, chroma >> 16, (int32_t)(hue & 0xFFFF0000), jitter);
        block.new_hues.pairs[i] = low.hue | high.hue << 16;
        block.new_chromas.pairs[i] = low.chroma | high.chroma << 16;
        block.leasts.pairs[i] = low.least | high.least << 16;
    }
    for (size_t i = 0; i < half; i++) {
        const Colour even = show(&block, i), odd = show(&block, half + i);
        put_pair(r + 2 * i, both(even.red, odd.red));
        put_pair(g + 2 * i, both(even.green, odd.green));
        put_pair(b + 2 * i, both(even.blue, odd.blue));
    }
}

/* The same for grey pixels, to the last bit. */
INLINE void brighten(const uint8_t *restrict from, uint8_t *restrict to, size_t count, Jitter jitter) {
    for (size_t i = 0; i < count; i++) {
        const float value = lesser(from[i] * jitter.value, 255.0f * 256.0f);
        to[i] = (uint8_t)((uint16_t)(int32_t)(value * 0.5f + 65.0f) >> 7);
    }
}

typedef struct {
    const uint8_t *source;
    uint8_t *out;
    ptrdiff_t source_stride, out_stride; /* bytes from row to row, negative to go upwards */
    size_t height, width, channels;      /* 3 channels, or 1: a grey picture, of which `out` gets three planes */
    int mirrored;                        /* left and right change places */
    Jitter jitter;
} Picture;

INLINE void jitter_rows(const Picture *picture) {
    const size_t channels = picture->channels;
    _Alignas(64) uint8_t planes[3][GROUP + BLOCK] = {{0}}, rest[3 * BLOCK] = {0};
    uint8_t *const r = planes[0] + GROUP, *const g = planes[1] + GROUP, *const b = planes[2] + GROUP;
    for (size_t row = 0; row < picture->height; row++) {
        const uint8_t *source = picture->source + (ptrdiff_t)row * picture->source_stride;
        uint8_t *out = picture->out + (ptrdiff_t)row * picture->out_stride;
        for (size_t left = 0; left < picture->width; left += BLOCK) {
            const size_t wanted = picture->width - left < BLOCK ? picture->width - left : BLOCK;
            const size_t groups = (wanted + GROUP - 1) / GROUP, count = groups * GROUP;
            const uint8_t *from = source + channels * (picture->mirrored ? picture->width - left - wanted : left);
            uint8_t *const to = out + 3 * left;
            if (count > wanted) /* the last group is not whole: it is made beside the picture */
                from = memcpy(rest, from, channels * wanted);
            uint8_t *const made = count > wanted ? rest : to;
            if (channels == 3) {
                split(from, groups, r, g, b);
                jitter_planes(r, g, b, groups, picture->jitter);
                if (picture->mirrored)
                    join(r, g, b, groups, 1, made);
                else
                    join(r, g, b, groups, 0, made);
            } else {
                brighten(from, r, count, picture->jitter);
                spread(r, count, picture->mirrored, made);
            }
            if (count > wanted)
                memcpy(to, rest + 3 * (picture->mirrored ? count - wanted : 0), 3 * wanted);
        }
    }
}

static void jitter_portable(const Picture *picture) { jitter_rows(picture); }

#if ON_X86
WITH_SSE4 static void jitter_sse4(const Picture *picture) { jitter_rows(picture); }

WITH_AVX2 static void jitter_avx2(const Picture *picture) { jitter_rows(picture); }

WITH_AVX512 static void jitter_avx512(const Picture *picture) { jitter_rows(picture); }

WITH_VBMI static void jitter_vbmi(const Picture *picture) { jitter_rows(picture); }
#endif

/* What a picture's numbers are in the arithmetic: the hue's shift, 0 to 1 of its circle, and the two gains. */
static Jitter jitter_of(float shift, float saturation, float value) {
    const float sixths = 6.0f * shift;
    return (Jitter){
        .shift = (sixths < 1.0f ? sixths + 6.0f : sixths) * SIXTH + 0.5f,
        .saturation = saturation * 65536.0f / SIXTH,
        .value = value * 256.0f,
    };
}

/* Rows of a picture, at a level of the machine's. */
static void jitter_at(Picture picture, int32_t level) {
    const ptrdiff_t dense = (ptrdiff_t)(picture.width * picture.channels);
    if (!picture.mirrored && picture.source_stride == dense && picture.out_stride == (ptrdiff_t)picture.width * 3) {
        picture.width *= picture.height; /* one long row: one last group */
        picture.height = picture.height > 0;
    }
    (void)level; /* of which some machines have but one */
#if ON_X86
    if (level >= VBMI)
        jitter_vbmi(&picture);
    else if (level >= AVX512)
        jitter_avx512(&picture);
    else if (level >= AVX2)
        jitter_avx2(&picture);
    else if (level >= SSE4)
        jitter_sse4(&picture);
    else
#endif
        jitter_portable(&picture);
}

#endif
