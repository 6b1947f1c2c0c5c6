/* Resample: a rectangle of pixels drawn larger or smaller by linear interpolation, at the speed of the vector units.
 *
 * Each row of the result lies between two rows of the source:
 *
 *     source row j    --across-->  values between pixels, 16 bits --+
 *                                                                   +-- down --> row of the result
 *     source row j+1  --across-->  values between pixels, 16 bits --+
 *
 * A source row goes across once, since rows of the result that need it follow each other. Weights across are 255ths, so
 * that two products of a byte and a byte add up to 16 bits and the ends are exact; weights down are 15 bits. Results lie
 * within 1.04 of what is exact. Both texts, for all machines and for AVX2, give the same bytes.
 */

#ifndef PACELINE_RESAMPLE_H
#define PACELINE_RESAMPLE_H

#include "levels.h"

enum { LANE = 16, LANES_AT_ONCE = 2, NOTHING = 0x80 }; /* bytes; of a vector; what a shuffle takes for zero */
enum { WHOLE = 255 };                          /* of the weights across */
enum { FRACTION = 6 };                         /* bits of a result before it is rounded */
#define DOWN 8224.0                    /* of the weights down: 64 / 255 in 15 bits, so that results have FRACTION bits */
#define MIDDLE (128 * 64 + 32)         /* values are around 128; and a half to round */

typedef struct {
    const uint8_t *source;
    ptrdiff_t source_stride; /* bytes from row to row */
    int32_t source_height, source_width;
    int32_t height, width;   /* of the result */
    int32_t channels;        /* 1 or 3 */
} Job;

/* Pixels of the result go across by lanes, two of three channels or eight grey ones: one load of a source row has them
 * all with their neighbours, a shuffle puts these in pairs. */
typedef struct {
    int32_t *first;   /* of each pixel of the result: byte in a source row of the left one of its two */
    uint8_t *weights; /* of lanes: those of each pair of bytes */
    uint8_t *pairs;   /* of lanes: where in the load each byte of the pairs is */
    int32_t *load;    /* of each lane: where in the row its load begins */
    int32_t in_lanes; /* pixels that have such lanes; the others go across one by one */
    int16_t *rows[2]; /* what the two source rows are across */
    int32_t there;    /* the source row that rows[0] holds; the next one is in rows[1] */
} Plan;

static int32_t pixels_of_lane(int32_t channels) { return channels == 1 ? 8 : 2; }

/* Where a pixel of the result lies among `count` of the source: the first of its two, and the share of the other. */
static int32_t first_of_two(int32_t place, double step, int32_t count, double *share) {
    double at = (place + 0.5) * step - 0.5;
    at = at < 0 ? 0 : at > count - 1 ? count - 1 : at;
    int32_t first = (int32_t)at;
    first = first > count - 2 ? count - 2 : first;
    *share = at - first;
    return first;
}

/* Where the first pair of pixel x is in tables of lanes. */
static size_t pair_of(int32_t x, int32_t channels) {
    const int32_t pixels = pixels_of_lane(channels);
    return LANE * (size_t)(x / pixels) + 2 * (size_t)channels * (size_t)(x % pixels);
}

static void lay_out(const Job *job, Plan *plan) {
    const double step = (double)job->source_width / job->width;
    for (int32_t x = 0; x < job->width; x++) {
        double share;
        plan->first[x] = job->channels * first_of_two(x, step, job->source_width, &share);
        const uint8_t right = (uint8_t)(share * WHOLE + 0.5);
        uint8_t *const weights = plan->weights + pair_of(x, job->channels);
        for (int32_t channel = 0; channel < job->channels; channel++) {
            weights[2 * channel] = WHOLE - right;
            weights[2 * channel + 1] = right;
        }
    }
    plan->in_lanes = 0;
    const int32_t pixels = pixels_of_lane(job->channels), row_bytes = job->channels * job->source_width;
    if (row_bytes < LANE)
        return;
    memset(plan->pairs, NOTHING, LANE * (size_t)(job->width / pixels));
    for (int32_t lane = 0; (lane + 1) * pixels <= job->width; lane++) {
        const int32_t *const first = plan->first + lane * pixels;
        const int32_t load = *first < row_bytes - LANE ? *first : row_bytes - LANE; /* within the row */
        if (first[pixels - 1] + 2 * job->channels > load + LANE)
            break; /* neighbours in the result are far from each other in the source */
        plan->load[lane] = load;
        for (int32_t pixel = 0; pixel < pixels; pixel++)
            for (int32_t channel = 0; channel < job->channels; channel++) {
                uint8_t *const pair = plan->pairs + pair_of(lane * pixels + pixel, job->channels) + 2 * channel;
                pair[0] = (uint8_t)(first[pixel] - load + channel);
                pair[1] = (uint8_t)(pair[0] + job->channels);
            }
        if (lane % LANES_AT_ONCE == LANES_AT_ONCE - 1)
            plan->in_lanes = (lane + 1) * pixels;
    }
}

static void across(const Job *job, const Plan *plan, const uint8_t *row, int16_t *to, int32_t from) {
    const int32_t channels = job->channels;
    for (int32_t x = from; x < job->width; x++) {
        const uint8_t *const left = row + plan->first[x], *const weights = plan->weights + pair_of(x, channels);
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
WITH_AVX2 static void across_by_avx2(const Job *job, const Plan *plan, const uint8_t *row, int16_t *to) {
    const __m256i around = _mm256_set1_epi8(-128);
    const ptrdiff_t numbers = job->channels == 1 ? 8 : 6; /* of a lane; where it has six, the next one covers the rest */
    const int32_t *load = plan->load, *const end = load + plan->in_lanes / pixels_of_lane(job->channels);
    const __m256i *weights = (const __m256i *)plan->weights, *pairs = (const __m256i *)plan->pairs;
    for (int16_t *sums = to; load < end; load += LANES_AT_ONCE, weights++, pairs++, sums += LANES_AT_ONCE * numbers) {
        const __m128i left = _mm_loadu_si128((const __m128i *)(row + load[0]));
        const __m128i right = _mm_loadu_si128((const __m128i *)(row + load[1]));
        const __m256i pixels = _mm256_inserti128_si256(_mm256_castsi128_si256(left), right, 1);
        const __m256i values = _mm256_xor_si256(_mm256_shuffle_epi8(pixels, _mm256_loadu_si256(pairs)), around);
        const __m256i sum = _mm256_maddubs_epi16(_mm256_loadu_si256(weights), values);
        _mm_storeu_si128((__m128i *)sums, _mm256_castsi256_si128(sum));
        _mm_storeu_si128((__m128i *)(sums + numbers), _mm256_extracti128_si256(sum, 1));
    }
    _mm256_zeroupper(); /* GCC forgets it before a last call, and what follows would take half as long again */
    across(job, plan, row, to, plan->in_lanes);
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
        across_by_avx2(job, plan, from, to);
        return;
    }
#endif
    across(job, plan, from, to, 0);
}

/* Bytes of memory for the tables of a job. */
static size_t room_of(const Job *job) {
    const size_t lanes = (size_t)job->width / (size_t)pixels_of_lane(job->channels) + LANES_AT_ONCE;
    const size_t row_bytes = 2 * ((size_t)job->channels * (size_t)job->width + LANE);
    const size_t bytes = 2 * LANE * lanes + 2 * row_bytes + 4 * lanes + 4 * (size_t)job->width;
    return (bytes + LANE - 1) / LANE * LANE;
}

/* Make the tables of a job in zeroed memory. */
static Plan plan_in(const Job *job, uint8_t *room) {
    const size_t lanes = (size_t)job->width / (size_t)pixels_of_lane(job->channels) + LANES_AT_ONCE;
    const size_t row_bytes = 2 * ((size_t)job->channels * (size_t)job->width + LANE), tables = LANE * lanes;
    Plan plan = {
        .weights = room,
        .pairs = room + tables,
        .rows = {(int16_t *)(room + 2 * tables), (int16_t *)(room + 2 * tables + row_bytes)},
        .load = (int32_t *)(room + 2 * tables + 2 * row_bytes),
        .first = (int32_t *)(room + 2 * tables + 2 * row_bytes + 4 * lanes),
        .there = -2,
    };
    lay_out(job, &plan);
    return plan;
}

/* Draw rows `from` to `to` - 1 of the result, the first of them at `out`; from one call to the next they go on. */
static void draw_rows(const Job *job, Plan *plan, int32_t from, int32_t to, uint8_t *out, ptrdiff_t out_stride,
                      int32_t level) {
    const double step = (double)job->source_height / job->height;
    const int32_t count = job->channels * job->width;
    for (int32_t y = from; y < to; y++, out += out_stride) {
        double share;
        const int32_t first = first_of_two(y, step, job->source_height, &share);
        if (first == plan->there + 1) {
            int16_t *const kept = plan->rows[1];
            plan->rows[1] = plan->rows[0];
            plan->rows[0] = kept;
        } else if (first != plan->there) {
            go_across(job, plan, first, plan->rows[0], level);
        }
        if (first != plan->there)
            go_across(job, plan, first + 1, plan->rows[1], level);
        plan->there = first;
        const int16_t lower = (int16_t)(share * DOWN + 0.5), upper = (int16_t)(DOWN - lower);
#if ON_X86
        if (level >= AVX2) {
            down_by_avx2(plan->rows[0], plan->rows[1], upper, lower, out, count);
            continue;
        }
#endif
        down(plan->rows[0], plan->rows[1], upper, lower, out, count, 0);
    }
}

#endif
