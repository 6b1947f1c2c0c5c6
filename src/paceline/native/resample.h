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
 * within 1.04 of what is exact. All texts, for all machines and for vector units, give the same bytes.
 */

#ifndef PACELINE_RESAMPLE_H
#define PACELINE_RESAMPLE_H

#include "levels.h"

enum { LANE = 16, LANE_OF_VBMI = 64, LANES_AT_ONCE = 2 }; /* bytes; of a vector of AVX2 */
enum { LINE = 64 };                    /* bytes of the cache: a load or store within one takes half as long */
enum { WHOLE = 255 };                  /* of the weights across */
enum { FRACTION = 6 };                 /* bits of a result before it is rounded */
#define DOWN 8224.0                    /* of the weights down: 64 / 255 in 15 bits, so that results have FRACTION bits */
#define MIDDLE (128 * 64 + 32)         /* values are around 128; and a half to round */

typedef struct {
    const uint8_t *source;
    ptrdiff_t source_stride; /* bytes from row to row */
    int32_t source_height, source_width;
    int32_t height, width;   /* of the result */
    int32_t channels;        /* 1 or 3 */
} Job;

/* Values, the channels of pixels one after the other, go across by lanes: one load of a source row has the two bytes that
 * each lies between, a shuffle puts these in pairs. A lane has as many values as have their bytes close enough to each
 * other, whole pixels or not. */
typedef struct {
    int32_t *first;     /* of each pixel of the result: byte in a source row of the left one of its two */
    uint8_t *right;     /* and the weight of the right one */
    int16_t *rows[2];   /* what the two source rows are across */
    int32_t there;      /* the source row that rows[0] holds; the next one is in rows[1] */
    int32_t lane;       /* bytes of a lane and its load; 0 if pixels go one by one */
    int32_t values;     /* of a lane */
    int32_t lanes;
    int32_t *load;      /* of each lane: where in the row its load begins */
    uint16_t *pairs;    /* of its values: where in the load the two bytes are */
    uint16_t *weights;  /* and what they weigh */
} Plan;

/* Where a pixel of the result lies among `count` of the source: the first of its two, and the share of the other. */
static int32_t first_of_two(int32_t place, double step, int32_t count, double *share) {
    double at = (place + 0.5) * step - 0.5;
    at = at < 0 ? 0 : at > count - 1 ? count - 1 : at;
    int32_t first = (int32_t)at;
    first = first > count - 2 ? count - 2 : first;
    *share = at - first;
    return first;
}

static double step_across(const Job *job) { return (double)job->source_width / job->width; }

static int32_t bytes_of_lane(const Job *job, int32_t level) {
    const int32_t row_bytes = job->channels * job->source_width;
    return level >= VBMI && row_bytes >= LANE_OF_VBMI ? LANE_OF_VBMI : level >= AVX2 && row_bytes >= LANE ? LANE : 0;
}

/* The most values that have all their bytes in one load, wherever they are; those of a pixel always have. */
static int32_t values_of_lane(const Job *job, int32_t lane) {
    const int32_t channels = job->channels;
    const double step = step_across(job);
    int32_t values = lane / 2;
    for (; values > channels; values--) {
        const int32_t pixels = values % channels == 0 ? values / channels - 1 : (values + channels - 2) / channels;
        const int32_t further = (int32_t)(pixels * step + 1e-6) + 1; /* in the source, at most */
        if (channels * (further - pixels + 1) + values <= lane)
            break;
    }
    return values;
}

static int32_t lanes_of(const Job *job, int32_t lane) {
    const int32_t values = values_of_lane(job, lane);
    return (job->channels * job->width + values - 1) / values;
}

static void lay_out(const Job *job, Plan *plan) {
    const double step = step_across(job);
    for (int32_t x = 0; x < job->width; x++) {
        double share;
        plan->first[x] = job->channels * first_of_two(x, step, job->source_width, &share);
        plan->right[x] = (uint8_t)(share * WHOLE + 0.5);
    }
}

static void lay_out_lanes(const Job *job, Plan *plan, int32_t lane) {
    const int32_t channels = job->channels, last_load = channels * job->source_width - lane;
    plan->lane = lane, plan->values = values_of_lane(job, lane), plan->lanes = lanes_of(job, lane);
    int32_t x = 0, channel = 0;
    for (int32_t i = 0; x < job->width; i++) {
        int32_t load = plan->first[x] + channel;
        if (x + 1 < job->width && plan->first[x + 1] < load)
            load = plan->first[x + 1]; /* it lies between the same two, and begins with their first channel */
        load = load < last_load ? load : last_load; /* within the row */
        uint16_t *const pairs = plan->pairs + i * lane / 2, *const weights = plan->weights + i * lane / 2;
        plan->load[i] = load;
        for (int32_t value = 0; value < plan->values && x < job->width; value++) {
            const int32_t left = plan->first[x] + channel - load;
            pairs[value] = (uint16_t)(left | (left + channels) << 8);
            weights[value] = (uint16_t)((WHOLE - plan->right[x]) | plan->right[x] << 8);
            if (++channel == channels)
                channel = 0, x++;
        }
    }
}

static void across(const Job *job, const Plan *plan, const uint8_t *row, int16_t *to) {
    const int32_t channels = job->channels;
    for (int32_t x = 0; x < job->width; x++) {
        const uint8_t *const left = row + plan->first[x], right = plan->right[x];
        for (int32_t channel = 0; channel < channels; channel++)
            *to++ = (int16_t)((left[channel] - 128) * (WHOLE - right) + (left[channel + channels] - 128) * right);
    }
}

static inline int16_t scaled(int16_t value, int16_t weight) { return (int16_t)((value * weight + (1 << 14)) >> 15); }

static void down(const int16_t *above, const int16_t *below, int16_t first, int16_t second, uint8_t *to, int32_t count) {
    for (int32_t i = 0; i < count; i++) {
        const int32_t value = (scaled(above[i], first) + scaled(below[i], second) + MIDDLE) >> FRACTION;
        to[i] = (uint8_t)(value < 0 ? 0 : value > 255 ? 255 : value);
    }
}

#if ON_X86
WITH_AVX2 static void across_by_avx2(const Plan *plan, const uint8_t *row, const uint8_t *next, int16_t *to) {
    const __m256i around = _mm256_set1_epi8(-128);
    const ptrdiff_t values = plan->values;
    const __m256i *weights = (const __m256i *)plan->weights, *pairs = (const __m256i *)plan->pairs;
    for (int32_t i = 0; i < plan->lanes; i += LANES_AT_ONCE, to += LANES_AT_ONCE * values) {
        __builtin_prefetch(next + plan->load[i]);
        const __m128i left = _mm_loadu_si128((const __m128i *)(row + plan->load[i]));
        const __m128i right = _mm_loadu_si128((const __m128i *)(row + plan->load[i + 1]));
        const __m256i bytes = _mm256_inserti128_si256(_mm256_castsi128_si256(left), right, 1);
        const __m256i paired = _mm256_xor_si256(_mm256_shuffle_epi8(bytes, _mm256_load_si256(pairs++)), around);
        const __m256i sum = _mm256_maddubs_epi16(_mm256_load_si256(weights++), paired);
        _mm_storeu_si128((__m128i *)to, _mm256_castsi256_si128(sum)); /* what is no value of the lane, */
        _mm_storeu_si128((__m128i *)(to + values), _mm256_extracti128_si256(sum, 1)); /* the next one covers */
    }
}

WITH_VBMI static void across_by_vbmi(const Plan *plan, const uint8_t *row, const uint8_t *next, int16_t *to) {
    const __m512i around = _mm512_set1_epi8(-128);
    const __m512i *weights = (const __m512i *)plan->weights, *pairs = (const __m512i *)plan->pairs;
    for (int32_t i = 0; i < plan->lanes; i++, to += plan->values) {
        __builtin_prefetch(next + plan->load[i]);
        const __m512i bytes = _mm512_loadu_si512(row + plan->load[i]);
        const __m512i paired = _mm512_xor_si512(_mm512_permutexvar_epi8(_mm512_load_si512(pairs++), bytes), around);
        _mm512_storeu_si512(to, _mm512_maddubs_epi16(_mm512_load_si512(weights++), paired));
    }
}

WITH_AVX2 static void down_by_avx2(const int16_t *above, const int16_t *below, int16_t first, int16_t second,
                                   uint8_t *to, int32_t count) {
    const __m256i weight = _mm256_set1_epi16(first), other = _mm256_set1_epi16(second);
    const __m256i middle = _mm256_set1_epi16(MIDDLE);
    for (int32_t next = 0; next < count; next += 32) {
        const int32_t i = next + 32 <= count ? next : count - 32; /* the last ones may be some once more */
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
}

WITH_AVX512 static void down_by_avx512(const int16_t *above, const int16_t *below, int16_t first, int16_t second,
                                       uint8_t *to, int32_t count) {
    const __m512i weight = _mm512_set1_epi16(first), other = _mm512_set1_epi16(second);
    const __m512i middle = _mm512_set1_epi16(MIDDLE), order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
    for (int32_t next = 0; next < count; next += 64) {
        const int32_t i = next + 64 <= count ? next : count - 64;
        __m512i halves[2];
        for (int32_t half = 0; half < 2; half++) {
            const __m512i sum =
                _mm512_add_epi16(_mm512_mulhrs_epi16(_mm512_loadu_si512(above + i + 32 * half), weight),
                                 _mm512_mulhrs_epi16(_mm512_loadu_si512(below + i + 32 * half), other));
            halves[half] = _mm512_srai_epi16(_mm512_add_epi16(sum, middle), FRACTION);
        }
        const __m512i bytes = _mm512_packus_epi16(halves[0], halves[1]);
        _mm512_storeu_si512(to + i, _mm512_permutexvar_epi64(order, bytes));
    }
}
#endif

/* Meanwhile the next row is fetched from memory: no machine foresees it where rows are parts of longer ones. */
static void go_across(const Job *job, const Plan *plan, int32_t row, int16_t *to) {
    const uint8_t *const from = job->source + row * job->source_stride;
#if ON_X86
    const uint8_t *const next = row + 1 < job->source_height ? from + job->source_stride : from;
    if (plan->lane == LANE_OF_VBMI) {
        across_by_vbmi(plan, from, next, to);
        return;
    }
    if (plan->lane == LANE) {
        across_by_avx2(plan, from, next, to);
        return;
    }
#endif
    across(job, plan, from, to);
}

static void go_down(const Plan *plan, double share, uint8_t *to, int32_t count, int32_t level) {
    const int16_t *const above = plan->rows[0], *const below = plan->rows[1];
    const int16_t second = (int16_t)(share * DOWN + 0.5), first = (int16_t)(DOWN - second);
    (void)level; /* of which some machines have but one */
#if ON_X86
    if (level >= AVX512 && count >= 64) {
        down_by_avx512(above, below, first, second, to, count);
        return;
    }
    if (level >= AVX2 && count >= 32) {
        down_by_avx2(above, below, first, second, to, count);
        return;
    }
#endif
    down(above, below, first, second, to, count);
}

static size_t in_lines(size_t bytes) { return (bytes + LINE - 1) / LINE * LINE; }

/* Bytes of a row of values, of which the last lane may write more than there are. */
static size_t bytes_of_row(const Job *job) {
    return in_lines(2 * ((size_t)job->channels * (size_t)job->width + LANE_OF_VBMI));
}

/* Bytes of each of two tables of lanes. */
static size_t bytes_of_lanes(const Job *job) {
    const size_t narrow = LANE * (size_t)lanes_of(job, LANE), wide = LANE_OF_VBMI * (size_t)lanes_of(job, LANE_OF_VBMI);
    return in_lines(narrow > wide ? narrow : wide);
}

/* Bytes of memory for the tables of a job. */
static size_t room_of(const Job *job) {
    const size_t of_pixels = in_lines((sizeof(int32_t) + 1) * (size_t)job->width);
    const size_t lanes = bytes_of_lanes(job); /* where their loads begin takes no more than a quarter of it */
    return LINE + 2 * lanes + in_lines(lanes / 4) + 2 * bytes_of_row(job) + of_pixels;
}

/* Make the tables of a job in zeroed memory. */
static Plan plan_in(const Job *job, uint8_t *room) {
    room += (LINE - (uintptr_t)room % LINE) % LINE;
    const size_t lanes = bytes_of_lanes(job), row = bytes_of_row(job);
    uint8_t *const rows = room + 2 * lanes, *const load = rows + 2 * row, *const first = load + in_lines(lanes / 4);
    Plan plan = {
        .pairs = (uint16_t *)room,
        .weights = (uint16_t *)(room + lanes),
        .rows = {(int16_t *)rows, (int16_t *)(rows + row)},
        .load = (int32_t *)load,
        .first = (int32_t *)first,
        .right = first + sizeof(int32_t) * (size_t)job->width,
        .there = -2,
    };
    lay_out(job, &plan);
    return plan;
}

/* Draw rows `from` to `to` - 1 of the result, the first of them at `out`; from one call to the next they go on. */
static void draw_rows(const Job *job, Plan *plan, int32_t from, int32_t to, uint8_t *out, ptrdiff_t out_stride,
                      int32_t level) {
    const double step = (double)job->source_height / job->height;
    const int32_t lane = bytes_of_lane(job, level);
    if (lane != plan->lane)
        lay_out_lanes(job, plan, lane);
    for (int32_t y = from; y < to; y++, out += out_stride) {
        double share;
        const int32_t first = first_of_two(y, step, job->source_height, &share);
        if (first == plan->there + 1) {
            int16_t *const kept = plan->rows[1];
            plan->rows[1] = plan->rows[0];
            plan->rows[0] = kept;
        } else if (first != plan->there) {
            go_across(job, plan, first, plan->rows[0]);
        }
        if (first != plan->there)
            go_across(job, plan, first + 1, plan->rows[1]);
        plan->there = first;
        go_down(plan, share, out, job->channels * job->width, level);
    }
}

#endif
