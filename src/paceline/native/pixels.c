/* Pixels: what is done with them at the speed of the core's vector units.
 *
 * Plain C for GCC and Clang, called through ctypes: no Python here, so every call runs without the interpreter's lock.
 */

#include <stdlib.h>

#include "gather.h"
#include "picture.h"

#ifndef PACELINE_SOURCE_CRC
#error "setup.py says which source this is built from; build by `python setup.py build_ext --inplace`"
#endif

#define EXPORT __attribute__((visibility("default")))

/* CRC-32 of the source that this was built from: a library of another source is not used. */
EXPORT uint32_t paceline_source_crc(void) { return PACELINE_SOURCE_CRC; }

/* The best level of vector units of this machine. */
EXPORT int32_t paceline_level(void) { return best_level(); }

/* Shift the hue (0 to 1 of its circle), scale saturation and value, mirror where asked; at a level of the machine's. */
EXPORT void paceline_jitter(const uint8_t *source, int64_t source_stride, uint8_t *out, int64_t out_stride,
                            int64_t height, int64_t width, int64_t channels, int32_t mirrored, float shift,
                            float saturation, float value, int32_t level) {
    const Picture picture = {
        .source = source, .out = out, .source_stride = source_stride, .out_stride = out_stride,
        .height = (size_t)height, .width = (size_t)width, .channels = (size_t)channels, .mirrored = mirrored,
        .jitter = jitter_of(shift, saturation, value),
    };
    jitter_at(picture, level);
}

/* Draw pictures of `size` x `size` pixels of three channels, which lie one after the other, each from as many tiles, and
 * change their colours: hue shift from 0 to 1, gains of saturation and value; mirrored along x, along y. A tile drawn at
 * another size than its own has at least 2 x 2 pixels. Pictures that are not chosen stay as they are. DRAWN, or at the
 * first that is not drawn: NO_MEMORY, or MISFIT where a tile does not lie in its image, or in the picture. */
EXPORT int32_t paceline_pictures(const Tile *tiles, const Image *images, int64_t tiles_each, const uint8_t *chosen,
                                 const double (*hsv)[3], const uint8_t (*mirrors)[2], int64_t count, int64_t size,
                                 uint8_t *out, int32_t fill, int32_t level) {
    const ptrdiff_t stride = 3 * size;
    for (int64_t i = 0; i < count; i++, tiles += tiles_each, images += tiles_each, out += stride * size) {
        if (!chosen[i])
            continue;
        const Picture picture = {
            .out = mirrors[i][1] ? out + stride * (size - 1) : out, .out_stride = mirrors[i][1] ? -stride : stride,
            .height = (size_t)size, .width = (size_t)size, .channels = most_channels(images, tiles_each),
            .mirrored = mirrors[i][0], .jitter = jitter_of((float)hsv[i][0], (float)hsv[i][1], (float)hsv[i][2]),
        };
        const int32_t done = draw_picture(tiles, images, tiles_each, picture, (uint8_t)fill, level);
        if (done != DRAWN)
            return done;
    }
    return DRAWN;
}

/* Draw a rectangle of at least 2 x 2 pixels of 1 or 3 channels into another one; 0 if there is no memory. */
EXPORT int32_t paceline_resample(const uint8_t *source, int64_t source_stride, int32_t source_height,
                                 int32_t source_width, uint8_t *out, int64_t out_stride, int32_t height, int32_t width,
                                 int32_t channels, int32_t level) {
    const Job job = {source, source_stride, source_height, source_width, height, width, channels};
    uint8_t *const room = calloc(1, room_of(&job));
    if (room == NULL)
        return 0;
    Plan plan = plan_in(&job, room);
    draw_rows(&job, &plan, 0, height, out, out_stride, level);
    free(room);
    return 1;
}

/* Copy rectangles, each from its address, rows `source_stride` bytes apart, to its address, rows close together. */
EXPORT void paceline_gather(const Rectangle *rectangles, int64_t count) { gather_all(rectangles, count); }
