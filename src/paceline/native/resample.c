/* Resample: a rectangle of pixels drawn larger or smaller by linear interpolation, at the speed of the vector units.
 *
 * Plain C for GCC and Clang, called through ctypes. Each row of the result lies between two rows of the source:
 *
 *     source row j    --across-->  values between pixels, 16 bits --+
 *                                                                   +-- down --> row of the result
 *     source row j+1  --across-->  values between pixels, 16 bits --+
 *
 * A source row goes across once, since rows of the result that need it follow each other. Weights across are 255ths, so
 * that two products of a byte and a byte add up to 16 bits and the ends are exact; weights down are 15 bits. Results lie
 * within 1.04 of what is exact. Both texts, for all machines and for AVX2, give the same bytes.
 */

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifndef PACELINE_SOURCE_CRC
#error "setup.py says which source this is built from; build by `python setup.py build_ext --inplace`"
#endif

#if defined(__x86_64__) || defined(__i386__)
#define ON_X86 1
#include <immintrin.h>
#define WITH_AVX2 __attribute__((target("avx2")))
#else
#define ON_X86 0
#endif

#define EXPORT __attribute__((visibility("default")))

enum { PORTABLE = 0, AVX2 = 1 };
enum { MOST_CHANNELS = 3, GROUP = 4, LANE = 16 };  /* pixels that go across together; bytes of half a vector */
enum { GREY_GROUP = 16 };
enum { WHOLE = 255 };                  /* of the weights across */
enum { FRACTION = 6 };                 /* bits of a result before it is rounded */
#define DOWN 8224.0                    /* of the weights down: 64 / 255 in 15 bits, so that results have FRACTION bits */
#define MIDDLE (128 * 64 + 32)         /* values are around 128; and a half to round */

typedef struct {
    const uint8_t *source;
    ptrdiff_t source_stride; /* bytes from row to row */
    int32_t source_height, source_width;
    uint8_t *out;
    ptrdiff_t out_stride;
    int32_t height, width;
    int32_t channels; /* 1 or 3 */
} Job;

typedef struct {
    int32_t *first;    /* of each pixel of the result: byte in a source row of the left one of its two */
    uint8_t *weights;  /* of the two, pairs in the order of the products */
    int32_t vectors;   /* pixels that whole vectors of loads reach without leaving the row */
    int16_t *rows[2];  /* what the two source rows are across */
} Plan;

/* Where a pixel of the result lies among `count` of the source: the first of its two, and the share of the other. */
static int32_t between(int32_t place, double step, int32_t count, double *share) {
    double at = (place + 0.5) * step - 0.5;
    at = at < 0 ? 0 : at > count - 1 ? count - 1 : at;
    int32_t first = (int32_t)at;
    first = first > count - 2 ? count - 2 : first;
    *share = at - first;
    return first;
}

/* Weights of pixel x, as the vectors want them: for three channels, six bytes of each pixel in lanes of two. */
static uint8_t *weights_of(const Plan *plan, int32_t x, int32_t channels) {
    return channels == 1 ? plan->weights + 2 * (size_t)x : plan->weights + LANE * (size_t)(x / 2) + 6 * (size_t)(x % 2);
}

static void lay_out(const Job *job, Plan *plan) {
    const double step = (double)job->source_width / job->width;
    for (int32_t x = 0; x < job->width; x++) {
        double share;
        plan->first[x] = job->channels * between(x, step, job->source_width, &share);
        const uint8_t right = (uint8_t)(share * WHOLE + 0.5);
        uint8_t *const weights = weights_of(plan, x, job->channels);
        for (int32_t channel = 0; channel < job->channels; channel++) {
            weights[2 * channel] = WHOLE - right;
            weights[2 * channel + 1] = right;
        }
    }
    /* A load takes eight bytes for three channels, two for one; those of the last pixels would leave the row. */
    const int32_t taken = job->channels == 1 ? 2 : 8, group = job->channels == 1 ? GREY_GROUP : GROUP;
    int32_t x = 0;
    while (x + group <= job->width && plan->first[x + group - 1] + taken <= job->channels * job->source_width)
        x += group;
    plan->vectors = x;
}

static void across(const Job *job, const Plan *plan, const uint8_t *row, int16_t *to, int32_t from) {
    const int32_t channels = job->channels;
    for (int32_t x = from; x < job->width; x++) {
        const uint8_t *const left = row + plan->first[x], *const weights = weights_of(plan, x, channels);
        for (int32_t channel = 0; channel < channels; channel++)
            to[channels * x + channel] = (int16_t)((left[channel] - 128) * weights[0] +
                                                   (left[channel + channels] - 128) * weights[1]);
    }
}

static inline int16_t scaled(int16_t value, int16_t weight) { return (int16_t)((value * weight + (1 << 14)) >> 15); }

static void down(const int16_t *above, const int16_t *below, int16_t first, int16_t second, uint8_t *to, int32_t count,
                 int32_t from) {
    for (int32_t i = from; i < count; i++) {
        const int32_t value = (scaled(above[i], first) + scaled(below[i], second) + MIDDLE) >> FRACTION;
        to[i] = (uint8_t)(value < 0 ? 0 : value > 255 ? 255 : value);
    }
}

#if ON_X86
WITH_AVX2 static inline __m128i two_loads(const uint8_t *row, const int32_t *first) {
    const __m128i left = _mm_loadl_epi64((const __m128i *)(row + first[0]));
    return _mm_castpd_si128(_mm_loadh_pd(_mm_castsi128_pd(left), (const double *)(row + first[1])));
}

WITH_AVX2 static void across_by_avx2(const Job *job, const Plan *plan, const uint8_t *row, int16_t *to) {
    const __m256i pairs = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 3, 1, 4, 2, 5, 8, 11, 9, 12, 10, 13, -1, -1, -1, -1));
    const __m256i around = _mm256_set1_epi8(-128);
    const int32_t *first = plan->first, *const end = first + plan->vectors;
    const __m256i *weights = (const __m256i *)plan->weights;
    for (int16_t *sums = to; first < end; first += GROUP, weights++, sums += 3 * GROUP) {
        const __m256i pixels =
            _mm256_inserti128_si256(_mm256_castsi128_si256(two_loads(row, first)), two_loads(row, first + 2), 1);
        const __m256i values = _mm256_xor_si256(_mm256_shuffle_epi8(pixels, pairs), around);
        const __m256i sum = _mm256_maddubs_epi16(_mm256_loadu_si256(weights), values); /* twelve numbers of sixteen */
        _mm_storeu_si128((__m128i *)sums, _mm256_castsi256_si128(sum));
        _mm_storeu_si128((__m128i *)(sums + 6), _mm256_extracti128_si256(sum, 1));
    }
    across(job, plan, row, to, plan->vectors);
}

WITH_AVX2 static void grey_across_by_avx2(const Job *job, const Plan *plan, const uint8_t *row, int16_t *to) {
    const __m256i around = _mm256_set1_epi8(-128);
    for (int32_t x = 0; x < plan->vectors; x += GREY_GROUP) {
        uint16_t pairs[GREY_GROUP];
        for (int32_t i = 0; i < GREY_GROUP; i++)
            memcpy(pairs + i, row + plan->first[x + i], 2);
        const __m256i values = _mm256_xor_si256(_mm256_loadu_si256((const __m256i *)pairs), around);
        const __m256i weights = _mm256_loadu_si256((const __m256i *)(plan->weights + 2 * (size_t)x));
        _mm256_storeu_si256((__m256i *)(to + x), _mm256_maddubs_epi16(weights, values));
    }
    across(job, plan, row, to, plan->vectors);
}

WITH_AVX2 static void down_by_avx2(const int16_t *above, const int16_t *below, int16_t first, int16_t second,
                                   uint8_t *to, int32_t count) {
    const __m256i weight = _mm256_set1_epi16(first), other = _mm256_set1_epi16(second);
    const __m256i middle = _mm256_set1_epi16(MIDDLE);
    int32_t i = 0;
    for (; i + 32 <= count; i += 32) {
        __m256i halves[2];
        for (int32_t half = 0; half < 2; half++) {
            const __m256i *const upper = (const __m256i *)(above + i + 16 * half);
            const __m256i *const lower = (const __m256i *)(below + i + 16 * half);
            const __m256i sum = _mm256_add_epi16(_mm256_mulhrs_epi16(_mm256_loadu_si256(upper), weight),
                                                 _mm256_mulhrs_epi16(_mm256_loadu_si256(lower), other));
            halves[half] = _mm256_srai_epi16(_mm256_add_epi16(sum, middle), FRACTION);
        }
        const __m256i bytes = _mm256_packus_epi16(halves[0], halves[1]); /* by lanes: quarters 0 2 1 3 */
        _mm256_storeu_si256((__m256i *)(to + i), _mm256_permute4x64_epi64(bytes, 0xD8));
    }
    down(above, below, first, second, to, count, i);
}
#endif

static void go_across(const Job *job, const Plan *plan, int32_t row, int16_t *to, int32_t level) {
    const uint8_t *const from = job->source + row * job->source_stride;
    (void)level; /* of which some machines have but one */
#if ON_X86
    if (level >= AVX2) {
        if (job->channels == 1)
            grey_across_by_avx2(job, plan, from, to);
        else
            across_by_avx2(job, plan, from, to);
        return;
    }
#endif
    across(job, plan, from, to, 0);
}

static void draw(const Job *job, Plan *plan, int32_t level) {
    const double step = (double)job->source_height / job->height;
    const int32_t count = job->channels * job->width;
    int32_t there = -2; /* the source row that rows[0] holds; the next one is in rows[1] */
    for (int32_t y = 0; y < job->height; y++) {
        double share;
        const int32_t first = between(y, step, job->source_height, &share);
        if (first == there + 1) {
            int16_t *const kept = plan->rows[1];
            plan->rows[1] = plan->rows[0];
            plan->rows[0] = kept;
        } else if (first != there) {
            go_across(job, plan, first, plan->rows[0], level);
        }
        if (first != there)
            go_across(job, plan, first + 1, plan->rows[1], level);
        there = first;
        const int16_t lower = (int16_t)(share * DOWN + 0.5), upper = (int16_t)(DOWN - lower);
        uint8_t *const to = job->out + y * job->out_stride;
#if ON_X86
        if (level >= AVX2) {
            down_by_avx2(plan->rows[0], plan->rows[1], upper, lower, to, count);
            continue;
        }
#endif
        down(plan->rows[0], plan->rows[1], upper, lower, to, count, 0);
    }
}

/* CRC-32 of the source that this was built from: a library of another source is not used. */
EXPORT uint32_t paceline_source_crc(void) { return PACELINE_SOURCE_CRC; }

/* The best level of vector units of this machine. */
EXPORT int32_t paceline_level(void) {
#if ON_X86
    if (__builtin_cpu_supports("avx2"))
        return AVX2;
#endif
    return PORTABLE;
}

/* Draw a rectangle of at least 2 x 2 pixels of 1 or 3 channels into another one; 0 if there is no memory. */
EXPORT int32_t paceline_resample(const uint8_t *source, int64_t source_stride, int32_t source_height,
                                 int32_t source_width, uint8_t *out, int64_t out_stride, int32_t height, int32_t width,
                                 int32_t channels, int32_t level) {
    const Job job = {source, source_stride, source_height, source_width, out, out_stride, height, width, channels};
    const size_t padded = ((size_t)width + GREY_GROUP) / GREY_GROUP * GREY_GROUP;
    const size_t row_bytes = 2 * (MOST_CHANNELS * padded + LANE), weight_bytes = LANE / 2 * padded + 2 * LANE;
    uint8_t *const room = calloc(1, 4 * padded + weight_bytes + 2 * row_bytes);
    if (room == NULL)
        return 0;
    Plan plan = {
        .first = (int32_t *)room,
        .weights = room + 4 * padded,
        .rows = {(int16_t *)(room + 4 * padded + weight_bytes), (int16_t *)(room + 4 * padded + weight_bytes + row_bytes)},
    };
    lay_out(&job, &plan);
    draw(&job, &plan, level);
    free(room);
    return 1;
}
