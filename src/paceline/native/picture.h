/* Picture: tiles resampled into their places and changed in colour, in one pass over the picture.
 *
 * It goes strip by strip, so that what was drawn is still in the first-level cache when its colours change:
 *
 *     rows of the tiles  --resample-->  strip  --jitter, mirror-->  rows of the picture
 */

#ifndef PACELINE_PICTURE_H
#define PACELINE_PICTURE_H

#include <stdlib.h>

#include "halve.h"
#include "jitter.h"
#include "resample.h"

enum { STRIP = 16 };             /* rows */
enum { MOST_SIDE_PX = 1 << 24 }; /* of a part of an image: places in its rows are numbers of 32 bits */
enum { MISFIT = -1, NO_MEMORY = 0, DRAWN = 1 };

/* A rectangle of an image, and where it comes to lie before the picture is mirrored. */
typedef struct {
    int64_t x, y, height, width; /* in the image; even sides where it is to be halved first */
    int64_t is_halved;
    int64_t left, top, right, bottom; /* in the picture */
} Tile;

/* An image: the address of its first pixel, 0 where there is none, the bytes from row to row, 3 channels or 1, sides. */
typedef struct {
    int64_t pixels, stride, channels, height, width;
} Image;

typedef struct {
    Job job;
    Plan plan;
    int32_t left, top, bottom;
    int32_t is_copied; /* drawn at its own size */
} Drawn;

/* Rows of a picture, or of what becomes one. */
typedef struct {
    uint8_t *first;
    ptrdiff_t stride; /* bytes */
    int32_t channels;
} Rows;

/* Whether a tile's part lies in its image, 2 x 2 pixels at least once it is halved, and the tile in the picture. */
static int fits(const Tile *tile, const Image *image, const Picture *picture) {
    const int64_t unit = tile->is_halved ? 2 : 1, height = (int64_t)picture->height, width = (int64_t)picture->width;
    return tile->x >= 0 && tile->width >= 2 * unit && tile->width % unit == 0 && tile->width <= MOST_SIDE_PX &&
           tile->x <= image->width - tile->width && tile->y >= 0 && tile->height >= 2 * unit &&
           tile->height % unit == 0 && tile->height <= MOST_SIDE_PX && tile->y <= image->height - tile->height &&
           tile->left >= 0 && tile->left <= tile->right && tile->right <= width && tile->top >= 0 &&
           tile->top <= tile->bottom && tile->bottom <= height;
}

/* Whether there is anything to draw. */
static int is_seen(const Tile *tile, const Image *image) {
    return image->pixels && tile->left < tile->right && tile->top < tile->bottom;
}

static size_t rounded(size_t bytes) { return (bytes + LANE - 1) / LANE * LANE; }

static size_t bytes_of_half(const Tile *tile, const Image *image) {
    return tile->is_halved ? rounded((size_t)(tile->height / 2 * (tile->width / 2) * image->channels)) : 0;
}

static Job job_of(const Tile *tile, const Image *image) {
    return (Job){
        .source = (const uint8_t *)(intptr_t)(image->pixels + tile->y * image->stride + tile->x * image->channels),
        .source_stride = (ptrdiff_t)image->stride,
        .source_height = (int32_t)(tile->is_halved ? tile->height / 2 : tile->height),
        .source_width = (int32_t)(tile->is_halved ? tile->width / 2 : tile->width),
        .height = (int32_t)(tile->bottom - tile->top),
        .width = (int32_t)(tile->right - tile->left),
        .channels = (int32_t)image->channels,
    };
}

/* Give a job the half of its source, made in `room`. */
static void halve(Job *job, uint8_t *room, int32_t level) {
    const ptrdiff_t row_bytes = (ptrdiff_t)job->channels * job->source_width;
    for (int32_t row = 0; row < job->source_height; row++) {
        const uint8_t *const above = job->source + 2 * row * job->source_stride;
        halve_row(above, above + job->source_stride, job->source_width, job->channels, room + row * row_bytes, level);
    }
    job->source = room, job->source_stride = row_bytes;
}

/* Draw rows of a tile as they are; `to` has the tile's channels. */
static void draw_own(Drawn *drawn, int32_t from, int32_t below, Rows to, int32_t level) {
    const Job *const job = &drawn->job;
    if (!drawn->is_copied) {
        draw_rows(job, &drawn->plan, from, below, to.first, to.stride, level);
        return;
    }
    for (int32_t row = from; row < below; row++, to.first += to.stride)
        memcpy(to.first, job->source + row * job->source_stride, (size_t)job->channels * (size_t)job->width);
}

/* Draw rows of a tile into those of the picture; `grey` has room for as many without colour. */
static void draw_into(Drawn *drawn, int32_t from, int32_t below, Rows to, uint8_t *grey, int32_t level) {
    const int32_t width = drawn->job.width;
    if (drawn->job.channels == to.channels) {
        draw_own(drawn, from, below, to, level);
        return;
    }
    draw_own(drawn, from, below, (Rows){grey, width, 1}, level);
    for (int32_t row = from; row < below; row++, to.first += to.stride, grey += width)
        for (int32_t x = 0; x < width; x++)
            to.first[3 * x] = to.first[3 * x + 1] = to.first[3 * x + 2] = grey[x];
}

/* Channels of a picture of these images: of those that are there, the most that one has. */
static size_t most_channels(const Image *images, int64_t count) {
    size_t most = 1;
    for (int64_t i = 0; i < count; i++)
        most = images[i].pixels && images[i].channels > 1 ? 3 : most;
    return most;
}

/* Draw tiles over each other, `fill` where none is, and change the colours; or say why nothing is drawn.
 *
 * `picture` says where the result goes, how large it is, and what its colours become; it has no source of its own. */
static int32_t draw_picture(const Tile *tiles, const Image *images, int64_t count, Picture picture, uint8_t fill,
                            int32_t level) {
    const int32_t channels = (int32_t)picture.channels, height = (int32_t)picture.height;
    const size_t stride = picture.channels * picture.width, strip_bytes = rounded(stride * STRIP);
    const size_t grey_bytes = picture.width * STRIP;
    size_t tables = 0, halves = 0;
    for (int64_t i = 0; i < count; i++) {
        if (images[i].pixels && !fits(tiles + i, images + i, &picture))
            return MISFIT;
        if (!is_seen(tiles + i, images + i))
            continue;
        const Job job = job_of(tiles + i, images + i);
        tables += room_of(&job);
        halves += bytes_of_half(tiles + i, images + i);
    }
    const size_t heads = rounded((size_t)count * sizeof(Drawn));
    uint8_t *const room = malloc(heads + tables + halves + strip_bytes + grey_bytes);
    if (room == NULL)
        return NO_MEMORY;
    Drawn *const drawn = (Drawn *)room;
    uint8_t *table = memset(room + heads, 0, tables), *half = table + tables, *const strip = half + halves;
    uint8_t *const grey = strip + strip_bytes;
    int64_t there = 0; /* tiles */
    for (int64_t i = 0; i < count; i++) {
        if (!is_seen(tiles + i, images + i))
            continue;
        Job job = job_of(tiles + i, images + i);
        if (tiles[i].is_halved)
            halve(&job, half, level);
        half += bytes_of_half(tiles + i, images + i);
        Drawn *const next = drawn + there++;
        *next = (Drawn){
            .job = job,
            .left = (int32_t)tiles[i].left, .top = (int32_t)tiles[i].top, .bottom = (int32_t)tiles[i].bottom,
            .is_copied = job.height == job.source_height && job.width == job.source_width,
        };
        if (!next->is_copied)
            next->plan = plan_in(&next->job, table);
        table += room_of(&next->job);
    }
    for (int32_t top = 0; top < height; top += STRIP) {
        const int32_t bottom = top + STRIP < height ? top + STRIP : height;
        memset(strip, fill, strip_bytes);
        for (Drawn *next = drawn; next < drawn + there; next++) {
            const int32_t from = next->top > top ? next->top : top, to = next->bottom < bottom ? next->bottom : bottom;
            if (from >= to)
                continue;
            uint8_t *const place = strip + (ptrdiff_t)stride * (from - top) + channels * next->left;
            const Rows rows = {place, (ptrdiff_t)stride, channels};
            draw_into(next, from - next->top, to - next->top, rows, grey, level);
        }
        Picture rows = picture;
        rows.source = strip, rows.source_stride = (ptrdiff_t)stride;
        rows.out += top * picture.out_stride, rows.height = (size_t)(bottom - top);
        jitter_at(rows, level);
    }
    free(room);
    return DRAWN;
}

#endif
