/* Decode: from the markers of a file to its pixels. Compiled once per level of vector units. */

#include "jpeg_vectors.h"

#include "jpeg_entropy.h"
#include "jpeg_transform.h"

#include "jpeg_reduced.h"

enum { BLOCKS_AT_ONCE = 24 };
enum { MARGIN = 64 }; /* bytes before and behind a row of samples */

/* A component's samples of one row of MCUs, and of the row above it. */
typedef struct {
    uint8_t *rows; /* first sample of the first row */
    size_t stride, width, height; /* those of the whole component, without what fills the last blocks */
} Band;

/* Blocks of one size, one behind the other. */
typedef struct {
    _Alignas(64) int16_t coefficients[(BLOCKS_AT_ONCE + 1) * BLOCK];
    uint8_t live[BLOCKS_AT_ONCE + 1]; /* numbers of their coefficients up to the last that is not zero */
} Batch;

typedef struct {
    Stream stream;
    Lookup lookups[2][MOST_CODES];
    Skips skips[MOST_CODES];
    int32_t predicted[MOST_COMPONENTS];
    uint32_t until_restart;
    int restarts;
    Batch batches[2];       /* luma's size, and another one of chroma */
    uint8_t nowhere[BLOCK];           /* samples of a block that is there to make their number even */
} Work;

/* Which batch a component's blocks belong to. */
INLINE int batch_of(const Image *image, int component) {
    return image->components[component].size != image->components[0].size;
}

/* Coefficients of `count` MCUs. */
INLINE int decode_mcus(const Image *image, Work *work, size_t count) {
    size_t num_blocks[2] = {0};
    Bits bits = work->stream.bits;
    for (size_t mcu = 0; mcu < count; mcu++) {
        if (image->restart_interval && work->until_restart-- == 0) {
            work->stream.bits = bits;
            if (!ends_with(&work->stream, 0xD0 + (work->restarts++ & 7)))
                return 0;
            open_segment(&work->stream);
            bits = work->stream.bits;
            memset(work->predicted, 0, sizeof work->predicted);
            work->until_restart = image->restart_interval - 1;
        }
        for (int i = 0; i < image->num_components; i++) {
            const Component *const component = &image->components[i];
            const Lookup *const dc = &work->lookups[0][component->dc], *const ac = &work->lookups[1][component->ac];
            Batch *const batch = &work->batches[batch_of(image, i)];
            size_t *const next = &num_blocks[batch_of(image, i)];
            for (int left = component->across * component->down; left; left--, (*next)++) {
                int16_t *const block = batch->coefficients + *next * BLOCK;
                int found;
                if (component->size == 1) {
                    found = decode_level(&work->stream, &bits, dc, ac, &work->skips[component->ac], &work->predicted[i]);
                    block[0] = (int16_t)work->predicted[i];
                } else {
                    clear(block);
                    found = decode_block(&work->stream, &bits, dc, ac, &work->predicted[i], block);
                }
                if (!found)
                    return 0;
                batch->live[*next] = (uint8_t)found;
            }
        }
    }
    work->stream.bits = bits;
    return 1;
}

/* Samples of a batch, whose blocks have `size`, of `count` MCUs from `first` on. */
INLINE int transform_batch(const Image *image, Work *work, const Band *bands, int number, size_t size, size_t first,
                           size_t count) {
    Batch *const batch = &work->batches[number];
    Place places[BLOCKS_AT_ONCE + PARTS];
    size_t num_blocks = 0;
    for (size_t mcu = first; mcu < first + count; mcu++)
        for (int i = 0; i < image->num_components; i++) {
            const Component component = image->components[i];
            if (batch_of(image, i) != number)
                continue;
            for (size_t row = 0; row < component.down; row++)
                for (size_t column = 0; column < component.across; column++)
                    places[num_blocks++] = (Place){
                        .to = bands[i].rows + size * (row * bands[i].stride + mcu * component.across + column),
                        .stride = bands[i].stride, .steps = image->steps[component.steps],
                    };
        }
    places[num_blocks] = (Place){.to = work->nowhere, .stride = 8, .steps = image->steps[image->components[0].steps]};
    batch->live[num_blocks] = 1;
    clear(batch->coefficients + num_blocks * BLOCK);
    for (size_t i = 0; i < num_blocks; i += PARTS) {
        const int16_t *const blocks = batch->coefficients + i * BLOCK;
        int live = 0, good = 1;
        for (size_t part = 0; part < PARTS; part++)
            live |= batch->live[i + part];
        if (live > 1 && size > 1)
            good = size == 8   ? blocks_to_samples(blocks, places + i)
                   : size == 4 ? blocks_to_four(blocks, places + i)
                               : blocks_to_two(blocks, places + i);
        else
            for (size_t part = 0; part < PARTS; part++)
                good &= level_to_samples(blocks + part * BLOCK, places[i + part], size);
        if (!good)
            return 0;
    }
    return 1;
}

/* Samples of `count` MCUs from `first` on. */
INLINE int transform_mcus(const Image *image, Work *work, const Band *bands, size_t first, size_t count) {
    const int last = image->num_components - 1, num_batches = 1 + batch_of(image, last);
    for (int number = 0; number < num_batches; number++) {
        int good;
        switch (image->components[number ? last : 0].size) { /* each is compiled by itself */
        case 8: good = transform_batch(image, work, bands, number, 8, first, count); break;
        case 4: good = transform_batch(image, work, bands, number, 4, first, count); break;
        case 2: good = transform_batch(image, work, bands, number, 2, first, count); break;
        default: good = transform_batch(image, work, bands, number, 1, first, count);
        }
        if (!good)
            return 0;
    }
    return 1;
}

/* Whether chroma is spread rather than repeated: libjpeg repeats it where blocks are one sample. */
INLINE int is_smooth(const Image *image) { return image->reduction < 8; }

/* Row `y` of a component of chroma at the image's width; `top` is the row of the component where its band begins. */
INLINE const uint8_t *chroma_row(const Image *image, const Band *band, ptrdiff_t y, ptrdiff_t top, int16_t *sums,
                                 uint8_t *made) {
    const ptrdiff_t stride = (ptrdiff_t)band->stride, last = (ptrdiff_t)band->height - 1;
    if (image->taller == 1 && image->wider == 1)
        return band->rows + (y - top) * stride;
    const int wide = image->wider == 2, narrow = band->width <= 2 || !is_smooth(image);
    const ptrdiff_t near_y = image->taller == 2 ? y >> 1 : y, other_y = near_y + (y & 1 ? 1 : -1);
    const ptrdiff_t far_y = other_y < 0 ? 0 : other_y > last ? last : other_y;
    uint8_t *const near = band->rows + (near_y - top) * stride;
    const uint8_t *const far = band->rows + (far_y - top) * stride;
    if (wide && narrow) {
        repeat(near, band->width, made);
    } else if (!is_smooth(image)) {
        return near;
    } else if (image->taller == 1) {
        near[-1] = near[0];
        near[band->width] = near[band->width - 1];
        widen(near, band->width, made);
    } else if (wide) {
        lean_and_widen(near, far, band->width, sums, made);
    } else {
        lean(near, far, band->width, y & 1 ? 2 : 1, made);
    }
    return made;
}

/* Pixels of rows `from` to `to` of the image, of the row of MCUs that begins at row `top`. */
INLINE void draw_rows(const Image *image, const Band *bands, size_t from, size_t to, size_t top, int16_t *sums,
                      uint8_t *const made[2], uint8_t *out) {
    for (size_t y = from; y < to; y++) {
        const uint8_t *const luma = bands[0].rows + ((ptrdiff_t)y - (ptrdiff_t)top) * (ptrdiff_t)bands[0].stride;
        if (image->num_components == 1) {
            memcpy(out + y * image->width, luma, image->width);
            continue;
        }
        const uint8_t *chroma[2];
        const ptrdiff_t chroma_top = (ptrdiff_t)(top / (size_t)image->taller);
        for (int i = 0; i < 2; i++)
            chroma[i] = chroma_row(image, &bands[1 + i], (ptrdiff_t)y, chroma_top, sums, made[i]);
        colour_row(luma, chroma[0], chroma[1], image->width, out + 3 * y * image->width);
    }
}

/* Ready for the first MCU; false where a code is none. */
static int begin(const Image *image, Work *work) {
    work->stream.next = image->scan;
    work->stream.end = image->end;
    open_segment(&work->stream);
    memset(work->predicted, 0, sizeof work->predicted);
    work->until_restart = image->restart_interval;
    work->restarts = 0;
    int built[2][MOST_CODES] = {{0}};
    for (int i = 0; i < image->num_components; i++)
        for (int is_ac = 0; is_ac < 2; is_ac++) {
            const int code = is_ac ? image->components[i].ac : image->components[i].dc;
            if (!built[is_ac][code] && !build(&work->lookups[is_ac][code], image->codes[is_ac][code], !is_ac))
                return 0;
            if (!built[is_ac][code] && is_ac && image->components[i].size == 1)
                build_skips(&work->skips[code], &work->lookups[1][code]);
            built[is_ac][code] = 1;
        }
    return 1;
}

/* All pixels to `out`, with `samples` for rows of samples, each of `row_bytes`: two of upsampled chroma, two for sums
 * of 16 bits, and those of the bands.
 */
INLINE int decode_bands(const Image *image, Work *work, uint8_t *samples, size_t row_bytes, uint8_t *out) {
    const size_t down = (size_t)(image->down * SIDE / image->reduction), num_across = image->mcus_across;
    uint8_t *row = samples + MARGIN;
    uint8_t *const made[2] = {row, row + row_bytes};
    int16_t *const sums = (int16_t *)(void *)(row + 2 * row_bytes);
    row += 4 * row_bytes;
    Band bands[MOST_COMPONENTS];
    size_t num_blocks = 0;
    for (int i = 0; i < image->num_components; i++) {
        const Component component = image->components[i];
        bands[i] = (Band){
            .rows = row + row_bytes, .stride = row_bytes,
            .width = i ? quotient_up(image->width, (size_t)image->wider) : image->width,
            .height = i ? quotient_up(image->height, (size_t)image->taller) : image->height,
        };
        row += ((size_t)component.size * component.down + 1) * row_bytes;
        num_blocks += (size_t)component.across * component.down;
    }
    const size_t at_once = BLOCKS_AT_ONCE / num_blocks, lag = is_smooth(image) ? (size_t)image->taller - 1 : 0;
    for (size_t mcu_row = 0; mcu_row < image->mcus_down; mcu_row++) {
        for (size_t first = 0; first < num_across; first += at_once) {
            const size_t count = num_across - first < at_once ? num_across - first : at_once;
            if (!decode_mcus(image, work, count) || !transform_mcus(image, work, bands, first, count))
                return 0;
        }
        const size_t top = mcu_row * down; /* its last row waits for the next one's first where chroma leans */
        const size_t to = mcu_row + 1 == image->mcus_down ? image->height : top + down - lag;
        draw_rows(image, bands, mcu_row ? top - lag : 0, to, top, sums, made, out);
        for (int i = 0; i < image->num_components && lag; i++) {
            const Component component = image->components[i];
            const uint8_t *const last = bands[i].rows + ((size_t)component.size * component.down - 1) * row_bytes;
            memcpy(bands[i].rows - row_bytes, last, row_bytes - MARGIN);
        }
    }
    return ends_with(&work->stream, 0xD9);
}

/* All pixels to `out`, which has room for them; false where the scan is refused. */
static int decode_image(const Image *image, uint8_t *out) {
    const size_t width = image->mcus_across * (size_t)(image->across * SIDE / image->reduction);
    const size_t row_bytes = quotient_up(width, GROUP) * GROUP + 2 * MARGIN;
    size_t num_rows = 4;
    for (int i = 0; i < image->num_components; i++)
        num_rows += (size_t)image->components[i].size * image->components[i].down + 1;
    Work *const work = aligned_alloc(_Alignof(Work), sizeof *work);
    uint8_t *const samples = calloc(num_rows, row_bytes);
    const int good = work && samples && begin(image, work) && decode_bands(image, work, samples, row_bytes, out);
    free(samples);
    free(work);
    return good;
}
