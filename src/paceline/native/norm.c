/* Norm: batch norm in training, with the SiLU and the sum that may follow, in two passes over memory each way.
 *
 *     forward     x --> mean, variance           x --> z = silu((x - mean) / deviation * weight + bias) + carried
 *     backward    x, g --> sums for weight, bias x, g --> gradient of x
 *
 * Maps are matrices of rows (cells) by channels that lie beside each other, in float or in bfloat16; all arithmetic is in
 * float, sums over chunks in double. Chunks are the same whatever the number of threads, and so are results, to the bit.
 * Threads are those of the OpenMP runtime that the caller has already: its `GOMP_parallel` is handed in, since a second
 * runtime would fight with it for the cores. NaN and infinity go through: a run that diverges has to notice.
 */

#include <math.h>
#include <stdlib.h>

#include "levels.h"

#ifndef PACELINE_SOURCE_CRC
#error "setup.py says which source this is built from; build by `python setup.py build_ext --inplace`"
#endif

#define EXPORT __attribute__((visibility("default")))

/* Before a loop whose arrays lie apart. Of many arrays compilers do not find that out, and take number by number: the
 * sums of float32 took eight times as long. */
#if defined(__clang__)
#define APART _Pragma("clang loop vectorize(assume_safety)")
#else
#define APART _Pragma("GCC ivdep")
#endif

enum { RUN = 128, CHUNK = 1 << 15 };  /* numbers: of a line at least, where rows lie close together; of a chunk */
enum { FLUSHED = 64 };                /* lines whose sums are added up before they join those of the chunk */
enum { AHEAD = 2048 };                /* bytes: how far before they are needed numbers are asked for */
enum { PIECES = 2 };                  /* at most, into which channels are cut */
enum { STATISTICS, RESULT, SUMS, GRADIENT };

typedef void (*Team)(void (*work)(void *), void *data, unsigned threads, unsigned flags);

/* What is asked for; Python fills it in. Pitches count numbers from row to row. */
typedef struct {
    int64_t rows, channels, pieces;
    int64_t is_half, is_silu; /* bfloat16; whether SiLU follows */
    int64_t threads, level;
    Team team;                /* NULL: one thread */
    const void *x;            /* rows close together */
    void *z[PIECES];          /* forward the results, backward their gradients; of each piece of the channels */
    int64_t z_pitch[PIECES];
    const void *carried;      /* added to the result, of one piece; NULL for nothing */
    int64_t carried_pitch;
    void *of_x;               /* backward, the result; rows close together */
    const float *weight, *bias;
    float *mean, *inverse;    /* of each channel; the inverse of the deviation */
    float *of_mean, *of_variance; /* forward: the mean once more, and the unbiased variance, for who keeps statistics */
    float *of_weight, *of_bias;
    double eps;
} Call;

typedef struct {
    const Call *call;
    int64_t rows_of_line, rows_of_chunk, chunks, next;
    int32_t pass;
    float *mean, *scale, *shift, *slope, *offset; /* of each number of a line: see `prepare` */
    float *of_channels;                          /* room for two numbers of each channel */
    double *parts;                               /* of each chunk, two numbers for each channel */
} Job;

INLINE float value_at(const void *from, int64_t i, int is_half) {
    if (!is_half)
        return ((const float *)from)[i];
    const uint32_t bits = (uint32_t)((const uint16_t *)from)[i] << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* Rounded to the nearest, of two that are as near away from zero: a few operations less than to the even one. */
INLINE void put_at(void *to, int64_t i, float value, int is_half) {
    if (!is_half) {
        ((float *)to)[i] = value;
        return;
    }
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    ((uint16_t *)to)[i] = (uint16_t)((bits + 0x8000) >> 16);
}

INLINE const void *moved(const void *from, int64_t numbers, int is_half) {
    return (const char *)from + numbers * (is_half ? 2 : 4);
}

/* e^-x, to a few times 1e-7 of it, under bfloat16 1e-4: 2^n e^-f with |f| below ln(2) / 2. */
INLINE float decay(float x, int is_half) {
    const float limit = 87.0f, whole = 12582912.0f; /* adding 1.5 x 2^23 rounds to whole numbers, n in the last bits */
    const float raised = x > -limit ? x : -limit, within = raised < limit ? raised : limit;
    const float rounded = whole - within * 1.44269504f, n = rounded - whole;
    float series;
    if (is_half) {
        const float f = within + n * 0.693147182f;
        series = 0.999924421f - f * (0.99998492f - f * (0.505027354f - f * 0.167671129f));
    } else {
        const float f = (within + n * 0.693359375f) - n * 2.12194440e-4f;
        const float rest = 0.166666667f - f * (0.0416666667f - f * (0.00833333333f - f * 0.00138888889f));
        series = 1.0f - f * (1.0f - f * (0.5f - f * rest));
    }
    uint32_t bits, power;
    memcpy(&bits, &series, sizeof bits);
    memcpy(&power, &rounded, sizeof power);
    bits += power << 23;
    memcpy(&series, &bits, sizeof series);
    return series;
}

/* 1 / x of a number from 1 to 2^126, as near: a division takes as long as all the rest. Negating the logarithm, which the
 * bits are, leaves a share e of at most .0506 away, and 1 / (1 - e) = (1 + e)(1 + e^2)(1 + e^4)..., under bfloat16 a
 * parabola that is right for x = 1, where e is largest. */
INLINE float inverse_of(float x, int is_half) {
    uint32_t bits;
    float guess;
    memcpy(&bits, &x, sizeof bits);
    bits = 0x7EF31000u - bits;
    memcpy(&guess, &bits, sizeof guess);
    const float e = 1.0f - x * guess;
    if (is_half)
        return guess * (0.999991959f + e * (1.00218144f + e * 1.01321054f));
    const float square = e * e, nearer = guess + guess * e, near = nearer + nearer * square;
    return near + near * (square * square);
}

INLINE float silu(float z, int is_half) { return z * inverse_of(1.0f + decay(z, is_half), is_half); }

/* The gradient of what SiLU was given, from that of what it gave. */
INLINE float before_silu(float gradient, float z, int is_half) {
    const float power = decay(z, is_half), share = inverse_of(1.0f + power, is_half);
    return gradient * (share * (1.0f + z * (power * share)));
}

/* Lines, one after the other: a few rows of one piece of the channels, which a loop goes through as one. */
typedef struct {
    int64_t row, end, step; /* rows of the chunk; of a line */
    int64_t first, width;   /* channels */
    int64_t table;          /* where tables of a line of this piece begin */
} Lines;

INLINE Lines lines_of(const Job *job, int64_t chunk, int64_t piece) {
    const int64_t begin = chunk * job->rows_of_chunk, end = begin + job->rows_of_chunk;
    const int64_t width = job->call->channels / job->call->pieces;
    return (Lines){
        .row = begin, .end = end < job->call->rows ? end : job->call->rows, .step = job->rows_of_line,
        .first = piece * width, .width = width, .table = piece * width * job->rows_of_line,
    };
}

INLINE int64_t rows_of(const Lines *lines) {
    return lines->end - lines->row < lines->step ? lines->end - lines->row : lines->step;
}

/* Ask for what is wanted some lines later: there is so much arithmetic that loads do not run far enough ahead. */
INLINE void fetch_ahead(const void *from, int64_t numbers, int is_half) {
    for (int64_t byte = 0; byte < numbers * (is_half ? 2 : 4); byte += 64)
        __builtin_prefetch((const char *)from + AHEAD + byte);
}

/* The numbers of a line, from `first` of its rows that are `pitch` apart: where they lie, or close together in `room`. */
INLINE const void *gathered(const void *from, int64_t pitch, int64_t first, const Lines *lines, void *room, int is_half) {
    const void *const begin = moved(from, lines->row * pitch + first, is_half);
    const int64_t rows = rows_of(lines), width = lines->width;
    if (rows == 1 || pitch == width) {
        fetch_ahead(begin, rows * width, is_half);
        return begin;
    }
    for (int64_t row = 0; row < rows; row++) {
        const void *const part = moved(begin, row * pitch, is_half);
        fetch_ahead(part, width, is_half);
        memcpy((void *)moved(room, row * width, is_half), part, (size_t)(width * (is_half ? 2 : 4)));
    }
    return room;
}

/* The other way round: put a line that was written to `line` where it belongs. */
INLINE void scatter(void *to, int64_t pitch, int64_t first, const Lines *lines, const void *line, int is_half) {
    char *const begin = (char *)moved(to, lines->row * pitch + first, is_half);
    if (begin == (const char *)line)
        return;
    const int64_t width = lines->width;
    for (int64_t row = 0; row < rows_of(lines); row++)
        memcpy((void *)moved(begin, row * pitch, is_half), moved(line, row * width, is_half),
               (size_t)(width * (is_half ? 2 : 4)));
}

/* Where a line is to be written: where it belongs, or `room` if that is not in one place. */
INLINE void *place_of(void *to, int64_t pitch, int64_t first, const Lines *lines, void *room, int is_half) {
    const int is_one = rows_of(lines) == 1 || pitch == lines->width;
    return is_one ? (void *)moved(to, lines->row * pitch + first, is_half) : room;
}

/* Add the sums of a line to those of the chunk. */
INLINE void flush(float *restrict sums, float *restrict total, int64_t count) {
    for (int64_t i = 0; i < count; i++)
        total[i] += sums[i], sums[i] = 0;
}

/* Sums of the distances from the first row, and of their squares: mean, and squares around it, of the chunk. */
INLINE void statistics(const Job *job, int64_t chunk, float *room, int is_half) {
    const Call *const call = job->call;
    Lines lines = lines_of(job, chunk, 0);
    const int64_t channels = lines.width = call->channels, count = lines.step * channels;
    float *restrict const first = room, *restrict const sums = room + count, *restrict const squares = sums + count;
    float *restrict const total = squares + count, *restrict const of_squares = total + count;
    const double rows = (double)(lines.end - lines.row);
    for (int64_t i = 0; i < count; i++)
        first[i] = value_at(call->x, lines.row * channels + i % channels, is_half);
    memset(sums, 0, (size_t)count * 4 * sizeof *sums);
    for (int64_t line = 1; lines.row < lines.end; lines.row += lines.step, line++) {
        const void *const x = moved(call->x, lines.row * channels, is_half);
        const int64_t length = rows_of(&lines) * channels;
        fetch_ahead(x, length, is_half);
        APART for (int64_t i = 0; i < length; i++) {
            const float distance = value_at(x, i, is_half) - first[i];
            sums[i] += distance;
            squares[i] += distance * distance;
        }
        if (line % FLUSHED == 0)
            flush(sums, total, count), flush(squares, of_squares, count);
    }
    flush(sums, total, count), flush(squares, of_squares, count);
    double *const mean = job->parts + 2 * channels * chunk, *const spread = mean + channels;
    for (int64_t channel = 0; channel < channels; channel++) {
        double sum = 0, square = 0;
        for (int64_t i = channel; i < count; i += channels)
            sum += total[i], square += of_squares[i];
        mean[channel] = first[channel] + sum / rows;
        spread[channel] = square - sum * sum / rows;
    }
}

INLINE void result(const Job *job, int64_t chunk, int64_t piece, float *room, int is_half, int is_silu, int is_added) {
    const Call *const call = job->call;
    Lines lines = lines_of(job, chunk, piece);
    const int64_t count = lines.step * lines.width, pitch = call->z_pitch[piece];
    const float *restrict const mean = job->mean + lines.table, *restrict const scale = job->scale + lines.table;
    const float *restrict const shift = job->shift + lines.table;
    for (; lines.row < lines.end; lines.row += lines.step) {
        const void *const x = gathered(call->x, call->channels, lines.first, &lines, room, is_half);
        const void *const carried =
            is_added ? gathered(call->carried, call->carried_pitch, 0, &lines, room + count, is_half) : NULL;
        void *const to = place_of(call->z[piece], pitch, 0, &lines, room + 2 * count, is_half);
        const int64_t length = rows_of(&lines) * lines.width;
        APART for (int64_t i = 0; i < length; i++) {
            const float z = (value_at(x, i, is_half) - mean[i]) * scale[i] + shift[i];
            const float activated = is_silu ? silu(z, is_half) : z;
            put_at(to, i, is_added ? activated + value_at(carried, i, is_half) : activated, is_half);
        }
        scatter(call->z[piece], pitch, 0, &lines, to, is_half);
    }
}

/* Of gradients before the activation, and of their products with distances from the mean. */
INLINE void sums(const Job *job, int64_t chunk, int64_t piece, float *room, int is_half, int is_silu) {
    const Call *const call = job->call;
    Lines lines = lines_of(job, chunk, piece);
    const int64_t count = lines.step * lines.width;
    const float *restrict const mean = job->mean + lines.table, *restrict const scale = job->scale + lines.table;
    const float *restrict const shift = job->shift + lines.table;
    float *restrict const plain = room, *restrict const products = room + count;
    float *restrict const total = products + count, *restrict const of_products = total + count;
    float *const beside = of_products + count;
    memset(room, 0, (size_t)count * 4 * sizeof *room);
    for (int64_t line = 1; lines.row < lines.end; lines.row += lines.step, line++) {
        const void *const x = gathered(call->x, call->channels, lines.first, &lines, beside, is_half);
        const void *const of_z = gathered(call->z[piece], call->z_pitch[piece], 0, &lines, beside + count, is_half);
        const int64_t length = rows_of(&lines) * lines.width;
        APART for (int64_t i = 0; i < length; i++) {
            const float distance = value_at(x, i, is_half) - mean[i], gradient = value_at(of_z, i, is_half);
            const float before = is_silu ? before_silu(gradient, distance * scale[i] + shift[i], is_half) : gradient;
            plain[i] += before;
            products[i] += before * distance;
        }
        if (line % FLUSHED == 0)
            flush(plain, total, count), flush(products, of_products, count);
    }
    flush(plain, total, count), flush(products, of_products, count);
    double *const sum = job->parts + 2 * call->channels * chunk + lines.first, *const product = sum + call->channels;
    for (int64_t channel = 0; channel < lines.width; channel++) {
        sum[channel] = product[channel] = 0;
        for (int64_t i = channel; i < count; i += lines.width)
            sum[channel] += total[i], product[channel] += of_products[i];
    }
}

INLINE void gradient(const Job *job, int64_t chunk, int64_t piece, float *room, int is_half, int is_silu) {
    const Call *const call = job->call;
    Lines lines = lines_of(job, chunk, piece);
    const int64_t count = lines.step * lines.width;
    const float *restrict const mean = job->mean + lines.table, *restrict const scale = job->scale + lines.table;
    const float *restrict const shift = job->shift + lines.table, *restrict const slope = job->slope + lines.table;
    const float *restrict const offset = job->offset + lines.table;
    for (; lines.row < lines.end; lines.row += lines.step) {
        const void *const x = gathered(call->x, call->channels, lines.first, &lines, room, is_half);
        const void *const of_z = gathered(call->z[piece], call->z_pitch[piece], 0, &lines, room + count, is_half);
        void *const to = place_of(call->of_x, call->channels, lines.first, &lines, room + 2 * count, is_half);
        const int64_t length = rows_of(&lines) * lines.width;
        APART for (int64_t i = 0; i < length; i++) {
            const float distance = value_at(x, i, is_half) - mean[i], of_result = value_at(of_z, i, is_half);
            const float before = is_silu ? before_silu(of_result, distance * scale[i] + shift[i], is_half) : of_result;
            put_at(to, i, before * scale[i] - (distance * slope[i] + offset[i]), is_half);
        }
        scatter(call->of_x, call->channels, lines.first, &lines, to, is_half);
    }
}

/* One chunk of a pass, the loops written out for each type and activation. */
INLINE void chunk_of(const Job *job, int64_t chunk, float *room) {
    const int is_half = job->call->is_half != 0, is_silu = job->call->is_silu != 0, is_added = job->call->carried != NULL;
    if (job->pass == STATISTICS) {
        is_half ? statistics(job, chunk, room, 1) : statistics(job, chunk, room, 0);
        return;
    }
    for (int64_t piece = 0; piece < job->call->pieces; piece++) {
#define FOR_EACH_KIND(ACT, ...)                                                                                        \
    is_half ? (is_silu ? ACT(__VA_ARGS__, 1, 1) : ACT(__VA_ARGS__, 1, 0))                                              \
            : (is_silu ? ACT(__VA_ARGS__, 0, 1) : ACT(__VA_ARGS__, 0, 0))
#define WITH_CARRIED(job, chunk, piece, room, half, silu)                                                              \
    (is_added ? result(job, chunk, piece, room, half, silu, 1) : result(job, chunk, piece, room, half, silu, 0))
        if (job->pass == RESULT)
            FOR_EACH_KIND(WITH_CARRIED, job, chunk, piece, room);
        else if (job->pass == SUMS)
            FOR_EACH_KIND(sums, job, chunk, piece, room);
        else
            FOR_EACH_KIND(gradient, job, chunk, piece, room);
#undef WITH_CARRIED
#undef FOR_EACH_KIND
    }
}

static void chunk_portable(const Job *job, int64_t chunk, float *room) { chunk_of(job, chunk, room); }

#if ON_X86
__attribute__((target("avx2,fma"))) static void chunk_avx2(const Job *job, int64_t chunk, float *room) {
    chunk_of(job, chunk, room);
}

__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))) static void
chunk_avx512(const Job *job, int64_t chunk, float *room) {
    chunk_of(job, chunk, room);
}
#endif

/* What each thread does: chunks as long as there are any. */
static void work(void *data) {
    Job *const job = data;
    const int64_t count = job->rows_of_line * job->call->channels;
    float *const room = malloc((size_t)(6 * count) * sizeof *room);
    for (;;) {
        const int64_t chunk = room ? __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED) : job->chunks;
        if (chunk >= job->chunks)
            break;
#if ON_X86
        if (job->call->level >= AVX512)
            chunk_avx512(job, chunk, room);
        else if (job->call->level >= AVX2)
            chunk_avx2(job, chunk, room);
        else
#endif
            chunk_portable(job, chunk, room);
    }
    free(room);
}

/* Go through all chunks; 0 where no thread had memory for it. */
static int32_t pass_over(Job *job, int32_t pass) {
    const Call *const call = job->call;
    const int64_t threads = call->threads < job->chunks ? call->threads : job->chunks;
    job->pass = pass, job->next = 0;
    if (call->team != NULL && threads > 1)
        call->team(work, job, (unsigned)threads, 0);
    else
        work(job);
    return job->next >= job->chunks;
}

/* Write numbers of channels for each number of a line, piece by piece. */
static void spread(const Job *job, float *table, const float *of_channels) {
    const int64_t width = job->call->channels / job->call->pieces;
    for (int64_t piece = 0; piece < job->call->pieces; piece++, of_channels += width)
        for (int64_t row = 0; row < job->rows_of_line; row++, table += width)
            memcpy(table, of_channels, (size_t)width * sizeof *table);
}

static void prepare(const Job *job) {
    const Call *const call = job->call;
    spread(job, job->mean, call->mean);
    spread(job, job->shift, call->bias);
    for (int64_t channel = 0; channel < call->channels; channel++)
        job->of_channels[channel] = call->weight[channel] * call->inverse[channel];
    spread(job, job->scale, job->of_channels);
}

/* Mean and variance of all rows from those of the chunks. */
static void settle_statistics(const Job *job) {
    const Call *const call = job->call;
    const double rows = (double)call->rows;
    for (int64_t channel = 0; channel < call->channels; channel++) {
        double mean = 0, spread = 0;
        for (int32_t turn = 0; turn < 2; turn++) {
            double sum = 0;
            for (int64_t chunk = 0; chunk < job->chunks; chunk++) {
                const int64_t left = call->rows - chunk * job->rows_of_chunk;
                const double weight = (double)(left < job->rows_of_chunk ? left : job->rows_of_chunk);
                const double *const part = job->parts + 2 * call->channels * chunk + channel;
                const double distance = part[0] - mean;
                sum += turn == 0 ? weight * part[0] : part[call->channels] + weight * distance * distance;
            }
            if (turn == 0)
                mean = sum / rows;
            else
                spread = sum;
        }
        call->mean[channel] = call->of_mean[channel] = (float)mean;
        call->inverse[channel] = (float)(1.0 / sqrt(spread / rows + call->eps));
        call->of_variance[channel] = (float)(spread / (rows - 1.0));
    }
}

/* Gradients of weight and bias, and what they mean for that of x: two numbers for each channel. */
static void settle_sums(const Job *job) {
    const Call *const call = job->call;
    for (int64_t channel = 0; channel < call->channels; channel++) {
        double sum = 0, product = 0;
        for (int64_t chunk = 0; chunk < job->chunks; chunk++) {
            const double *const part = job->parts + 2 * call->channels * chunk + channel;
            sum += part[0], product += part[call->channels];
        }
        const double inverse = call->inverse[channel], scale = inverse * call->weight[channel];
        call->of_bias[channel] = (float)sum;
        call->of_weight[channel] = (float)(product * inverse);
        job->of_channels[channel] = (float)(scale * sum / (double)call->rows);
        job->of_channels[call->channels + channel] = (float)(scale * product * inverse * inverse / (double)call->rows);
    }
    spread(job, job->offset, job->of_channels);
    spread(job, job->slope, job->of_channels + call->channels);
}

/* Lay a call out in memory, which is the caller's to free; NULL if there is none. */
static void *laid_out(const Call *call, Job *job) {
    const int64_t width = call->channels / call->pieces;
    *job = (Job){.call = call, .rows_of_line = width < RUN ? RUN / width : 1};
    const int64_t count = job->rows_of_line * call->channels, lines = CHUNK / count > 0 ? CHUNK / count : 1;
    job->rows_of_chunk = lines * job->rows_of_line;
    job->chunks = (call->rows + job->rows_of_chunk - 1) / job->rows_of_chunk;
    const size_t line_bytes = (size_t)count * sizeof(float);
    uint8_t *const room = malloc((size_t)(2 * call->channels * job->chunks) * sizeof(double) + 5 * line_bytes +
                                 2 * (size_t)call->channels * sizeof(float));
    if (room == NULL)
        return NULL;
    job->parts = (double *)room;
    job->mean = (float *)(job->parts + 2 * call->channels * job->chunks);
    job->scale = job->mean + count, job->shift = job->scale + count;
    job->slope = job->shift + count, job->offset = job->slope + count;
    job->of_channels = job->offset + count;
    return room;
}

/* CRC-32 of the source that this was built from: a library of another source is not used. */
EXPORT uint32_t paceline_source_crc(void) { return PACELINE_SOURCE_CRC; }

/* The best level of vector units of this machine. */
EXPORT int32_t paceline_level(void) {
#if ON_X86
    if (!__builtin_cpu_supports("fma"))
        return PORTABLE;
#endif
    return best_level();
}

/* Write z, and mean, inverse and variance; 0 if there is no memory. */
EXPORT int32_t paceline_norm_forward(const Call *call) {
    Job job;
    void *const room = laid_out(call, &job);
    int32_t done = room != NULL && pass_over(&job, STATISTICS);
    if (done) {
        settle_statistics(&job);
        prepare(&job);
        done = pass_over(&job, RESULT);
    }
    free(room);
    return done;
}

/* Write the gradients of x, weight and bias from those of z; 0 if there is no memory. */
EXPORT int32_t paceline_norm_backward(const Call *call) {
    Job job;
    void *const room = laid_out(call, &job);
    int32_t done = room != NULL;
    if (done) {
        prepare(&job);
        done = pass_over(&job, SUMS);
    }
    if (done) {
        settle_sums(&job);
        done = pass_over(&job, GRADIENT);
    }
    free(room);
    return done;
}
