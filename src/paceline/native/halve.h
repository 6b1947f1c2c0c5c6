/* Halve: a row of half as many pixels from two rows, each the mean of four, half a step rounded up. */

#ifndef PACELINE_HALVE_H
#define PACELINE_HALVE_H

#include "levels.h"

#if ON_X86
/* Return how many pixels of the result are made; a vector writes a little over what it has, so it stops before the end. */
WITH_AVX2 static int32_t halve_by_avx2(const uint8_t *above, const uint8_t *below, int32_t width, int32_t channels,
                                       uint8_t *to) {
    const __m256i ones = _mm256_set1_epi8(1), half = _mm256_set1_epi16(2);
    const __m256i neighbours = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11, -1, -1, -1, -1)); /* of four pixels, in pairs */
    const int32_t at_once = channels == 3 ? 4 : 16, lane = channels == 3 ? 6 : 8; /* bytes of the result in a lane */
    const uintptr_t next = 2 * (uintptr_t)(below - above); /* the rows that come next are fetched meanwhile */
    int32_t x = 0;
    for (; x + at_once + 1 <= width; x += at_once) {
        __m256i sum = half;
        for (int32_t row = 0; row < 2; row++) {
            const uint8_t *const from = (row == 0 ? above : below) + 2 * x * channels;
            __builtin_prefetch((const void *)((uintptr_t)from + next));
            const __m128i left = _mm_loadu_si128((const __m128i *)from);
            const __m128i right = _mm_loadu_si128((const __m128i *)(from + 2 * lane));
            __m256i pixels = _mm256_inserti128_si256(_mm256_castsi128_si256(left), right, 1);
            if (channels == 3)
                pixels = _mm256_shuffle_epi8(pixels, neighbours);
            sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(pixels, ones));
        }
        const __m256i means = _mm256_srli_epi16(sum, 2), bytes = _mm256_packus_epi16(means, means);
        _mm_storel_epi64((__m128i *)(to + x * channels), _mm256_castsi256_si128(bytes));
        _mm_storel_epi64((__m128i *)(to + x * channels + lane), _mm256_extracti128_si256(bytes, 1));
    }
    return x;
}
#endif

/* `width` and `channels` are those of the result. */
static void halve_row(const uint8_t *above, const uint8_t *below, int32_t width, int32_t channels, uint8_t *to,
                      int32_t level) {
    int32_t done = 0;
    (void)level; /* of which some machines have but one */
#if ON_X86
    if (level >= AVX2)
        done = halve_by_avx2(above, below, width, channels, to);
#endif
    for (int32_t i = done * channels; i < width * channels; i++) {
        const int32_t left = 2 * i - i % channels, right = left + channels;
        to[i] = (uint8_t)((above[left] + above[right] + below[left] + below[right] + 2) >> 2);
    }
}

#endif
