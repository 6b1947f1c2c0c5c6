/* Gather: rows of bytes from anywhere in memory to where they lie close together, past the caches.
 *
 * What is gathered goes to a device; no core reads it again soon. So it need not push other data out of the caches, and
 * lines that are written whole need not be fetched first:
 *
 *     rows, fetched ahead  --copy-->  stage, in the first-level cache  --whole lines-->  memory
 */

#ifndef PACELINE_GATHER_H
#define PACELINE_GATHER_H

#include "levels.h"

enum { STAGE_BYTES = 4096, MEMORY_LINE = 64, ROWS_AHEAD = 4 };

/* Rows of a rectangle: the address and size of the first, bytes from each to the next, and where they go. */
typedef struct {
    int64_t source, source_stride, row_bytes, rows, out;
} Rectangle;

/* Write bytes `from` to `end` of a stage to their places; `to`, where byte 0 goes, begins a line. */
static void write_lines(const uint8_t *stage, size_t from, size_t end, uint8_t *to) {
#if defined(__x86_64__)
    const size_t first = (from + MEMORY_LINE - 1) / MEMORY_LINE * MEMORY_LINE, last = end / MEMORY_LINE * MEMORY_LINE;
    if (first < last) {
        memcpy(to + from, stage + from, first - from);
        for (size_t i = first; i < last; i += sizeof(__m128i))
            _mm_stream_si128((__m128i *)(void *)(to + i), _mm_load_si128((const __m128i *)(const void *)(stage + i)));
        from = last;
    }
#endif
    memcpy(to + from, stage + from, end - from);
}

static void gather(Rectangle part) {
    _Alignas(MEMORY_LINE) uint8_t stage[STAGE_BYTES];
    const uint8_t *row = (const uint8_t *)(intptr_t)part.source;
    const size_t row_bytes = (size_t)part.row_bytes;
    size_t begin = (uintptr_t)part.out % MEMORY_LINE, filled = begin; /* of the stage, whose bytes before belong to others */
    uint8_t *to = (uint8_t *)(intptr_t)part.out - begin;
    for (int64_t left = part.rows; left > 0; left--, row += part.source_stride) {
        for (size_t i = 0; i < row_bytes && left > ROWS_AHEAD; i += MEMORY_LINE)
            __builtin_prefetch(row + ROWS_AHEAD * part.source_stride + (ptrdiff_t)i);
        for (size_t done = 0; done < row_bytes;) {
            const size_t room = STAGE_BYTES - filled, rest = row_bytes - done, count = rest < room ? rest : room;
            memcpy(stage + filled, row + done, count);
            done += count, filled += count;
            if (filled == STAGE_BYTES) {
                write_lines(stage, begin, filled, to);
                to += STAGE_BYTES, begin = filled = 0;
            }
        }
    }
    write_lines(stage, begin, filled, to);
}

/* Gather all; they lie in memory for every core afterwards. */
static void gather_all(const Rectangle *parts, int64_t count) {
    for (int64_t i = 0; i < count; i++)
        gather(parts[i]);
#if defined(__x86_64__)
    _mm_sfence();
#endif
}

#endif
