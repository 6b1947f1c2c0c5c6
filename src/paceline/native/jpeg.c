/* JPEG: baseline files of 8-bit images decoded to grey or RGB pixels, for the files that most data sets consist of.
 *
 * Written from ITU-T T.81. Plain C for GCC and Clang, called through ctypes: no Python here, so every call runs without
 * the interpreter's lock. What is decoded has the pixels of libjpeg's accurate method to the last bit, or is refused:
 * progressive, arithmetic and lossless files, CMYK and RGB, several scans, odd subsamplings, and whatever is damaged or
 * only unusual. Whoever calls has another decoder for those. Files are not trusted: all reads and writes are bounded,
 * and nothing is allocated by what a header says before the caller's buffer has room for it.
 *
 *     scan --entropy--> blocks of some MCUs --transform--> a row of MCUs, by component --upsampling, colours--> pixels
 *
 * The one body is compiled once per level of vector units, and the level is chosen at run time.
 */

#include "jpeg.h"

#ifndef PACELINE_SOURCE_CRC
#error "setup.py says which source this is built from; build by `python setup.py build_ext --inplace`"
#endif

#ifdef __SSE2__
#include <emmintrin.h>
#endif

#ifndef _WIN32
#include <errno.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>
#endif

#include "jpeg_decode.h"

INLINE uint32_t number(const uint8_t *bytes) { return (uint32_t)bytes[0] << 8 | bytes[1]; }

static int read_steps(Image *image, const uint8_t *at, const uint8_t *end) {
    while (at < end) {
        const int wide = *at >> 4, table = *at & 15;
        if (wide > 1 || table >= MOST_TABLES || end - ++at < BLOCK << wide)
            return 0;
        for (int i = 0; i < BLOCK; i++, at += 1 + wide) {
            const uint32_t step = wide ? number(at) : *at;
            if (step == 0 || step > MOST_STEP)
                return 0;
            image->steps[table][PLACES[i]] = (int16_t)step;
        }
        image->has_steps[table] = 1;
    }
    return 1;
}

static int read_codes(Image *image, const uint8_t *at, const uint8_t *end) {
    while (at < end) {
        const int is_ac = *at >> 4, table = *at & 15;
        if (is_ac > 1 || table >= MOST_CODES || end - ++at < LONGEST_CODE)
            return 0;
        int symbols = 0;
        for (int i = 0; i < LONGEST_CODE; i++)
            symbols += at[i];
        if (symbols > 256 || end - at - LONGEST_CODE < symbols)
            return 0;
        image->codes[is_ac][table] = (Code){.counts = at, .symbols = at + LONGEST_CODE};
        at += LONGEST_CODE + symbols;
    }
    return 1;
}

/* One component, or luma and two of chroma of one block per MCU. */
static int read_frame(Image *image, const uint8_t *at, const uint8_t *end) {
    if (image->num_components || end - at < 6 || at[0] != 8)
        return 0;
    image->height = number(at + 1);
    image->width = number(at + 3);
    image->num_components = at[5];
    if (!image->height || !image->width || image->height > MOST_SIDE || image->width > MOST_SIDE ||
        (at[5] != 1 && at[5] != 3) || end - at != 6 + 3 * at[5])
        return 0;
    for (int i = 0; i < image->num_components; i++) {
        const uint8_t *const from = at + 6 + 3 * i;
        const Component component = {.id = from[0], .across = from[1] >> 4, .down = from[1] & 15, .steps = from[2]};
        if (component.steps >= MOST_TABLES)
            return 0;
        for (int before = 0; before < i; before++)
            if (image->components[before].id == component.id)
                return 0;
        image->components[i] = component;
    }
    Component *const first = image->components;
    if (first->across < 1 || first->across > 2 || first->down < 1 || first->down > 2)
        return 0;
    for (int i = 1; i < image->num_components; i++)
        if (first[i].across != 1 || first[i].down != 1)
            return 0;
    if (image->num_components == 1) /* then one block is an MCU, whatever is said (A.2.2) */
        first->across = first->down = 1;
    else if (first[0].id == 'R' && first[1].id == 'G' && first[2].id == 'B')
        return 0;
    image->across = first->across;
    image->down = first->down;
    return 1;
}

/* The one scan, of all components, with all their tables. */
static int read_scan(Image *image, const uint8_t *at, const uint8_t *end) {
    const int count = image->num_components;
    if (!count || end - at != 4 + 2 * count || at[0] != count)
        return 0;
    for (int i = 0; i < count; i++) {
        Component *const component = &image->components[i];
        component->dc = at[2 + 2 * i] >> 4;
        component->ac = at[2 + 2 * i] & 15;
        if (at[1 + 2 * i] != component->id || component->dc >= MOST_CODES || component->ac >= MOST_CODES ||
            !image->codes[0][component->dc].counts || !image->codes[1][component->ac].counts ||
            !image->has_steps[component->steps])
            return 0;
    }
    at += 1 + 2 * count;
    return at[0] == 0 && at[1] == BLOCK - 1 && at[2] == 0;
}

/* Read the markers up to the scan; false where anything is unusual. */
static int read_markers(Image *image, const uint8_t *at, const uint8_t *end) {
    memset(image, 0, sizeof *image);
    if (end - at < 2 || at[0] != 0xFF || at[1] != 0xD8)
        return 0;
    for (at += 2; end - at >= 4 && at[0] == 0xFF;) {
        const int marker = at[1];
        const ptrdiff_t length = number(at + 2);
        const uint8_t *const content = at + 4;
        if (length < 2 || end - at - 2 < length)
            return 0;
        at += 2 + length;
        int good = 1;
        switch (marker) {
        case 0xDB: good = read_steps(image, content, at); break;
        case 0xC4: good = read_codes(image, content, at); break;
        case 0xC0: case 0xC1: good = read_frame(image, content, at); break;
        case 0xDD:
            good = at - content == 2;
            image->restart_interval = good ? number(content) : 0;
            break;
        case 0xDA:
            image->scan = at;
            image->end = end;
            return read_scan(image, content, at);
        case 0xE0: /* JFIF's, of the one version that has had files */
            good = at - content < 14 || memcmp(content, "JFIF", 5) != 0 || content[5] == 1;
            break;
        case 0xEE: /* Adobe's says which colours these are: 1 is YCbCr */
            good = at - content < 12 || memcmp(content, "Adobe", 5) != 0 || content[11] == 1;
            break;
        default: good = (marker >= 0xE0 && marker <= 0xEF) || marker == 0xFE; /* of applications, and comments */
        }
        if (!good)
            return 0;
    }
    return 0;
}

/* Choose the size of the pixels; false where it is none, or where simplejpeg could not be asked for it: several of its
 * reductions give small images the same size. Chroma of half the resolution along both axes has its own reduction.
 */
static int choose(Image *image, int32_t reduction) {
    if (reduction != 1 && reduction != 2 && reduction != 4 && reduction != 8)
        return 0;
    if (reduction > 1 && image->height <= SIDE && image->width <= SIDE)
        return 0;
    image->mcus_down = quotient_up(image->height, SIDE * (size_t)image->down);
    image->mcus_across = quotient_up(image->width, SIDE * (size_t)image->across);
    image->height = quotient_up(image->height, (size_t)reduction);
    image->width = quotient_up(image->width, (size_t)reduction);
    image->reduction = reduction;
    const int own = reduction > 1 && image->across == 2 && image->down == 2;
    for (int i = 0; i < image->num_components; i++)
        image->components[i].size = (uint8_t)(SIDE / reduction * (own && i ? 2 : 1));
    image->wider = own ? 1 : image->across;
    image->taller = own ? 1 : image->down;
    return 1;
}

enum { PORTABLE = 0, AVX2 = 1 };

/* CRC-32 of the sources that this was built from: a library of others is not used. */
EXPORT uint32_t paceline_source_crc(void) { return PACELINE_SOURCE_CRC; }

/* The best level of vector units of this machine. */
EXPORT int32_t paceline_level(void) {
#if ON_X86
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2"))
        return AVX2;
#endif
    return PORTABLE;
}

/* Height, width and number of channels (1 or 3) of a file that may be decoded here, reduced by 1, 2, 4 or 8; 0 where it
 * is refused at once.
 */
EXPORT int32_t paceline_jpeg_shape(const uint8_t *encoded, int64_t size, int32_t reduction, int32_t *shape) {
    Image image;
    if (!read_markers(&image, encoded, encoded + size) || !choose(&image, reduction))
        return 0;
    shape[0] = (int32_t)image.height;
    shape[1] = (int32_t)image.width;
    shape[2] = image.num_components;
    return 1;
}

/* Decode to `out` of `room` bytes, and say the shape; 0 where the file is refused, which may be seen after pixels are
 * written.
 */
EXPORT int32_t paceline_jpeg_decode(const uint8_t *encoded, int64_t size, uint8_t *out, int64_t room, int32_t reduction,
                                    int32_t *shape, int32_t level) {
    Image image;
    if (!read_markers(&image, encoded, encoded + size) || !choose(&image, reduction) ||
        (int64_t)(image.height * image.width) > room / image.num_components)
        return 0;
    shape[0] = (int32_t)image.height;
    shape[1] = (int32_t)image.width;
    shape[2] = image.num_components;
    (void)level; /* of which some machines have but one */
#if ON_X86
    if (level >= AVX2)
        return paceline_decode_by_avx2(&image, out);
#endif
    return decode_image(&image, out);
}

/* Whether there is an end of a JPEG in a file, from the back: before it are only trailers such as phones write. */
static int has_end(const uint8_t *file, int64_t size) {
    for (int64_t at = size - 2; at >= 0; at--)
        if (file[at] == 0xFF && file[at + 1] == 0xD9)
            return 1;
    return 0;
}

/* Bytes of a file, which are read to `into` where it has room for all of them; -1 where it cannot be read as a whole. */
static int64_t read_file(const char *path, uint8_t *into, int64_t room) {
#ifdef _WIN32
    (void)path, (void)into, (void)room;
    return -1;
#else
    struct stat found;
    const int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0)
        return -1;
    int64_t size = fstat(file, &found) == 0 && S_ISREG(found.st_mode) ? (int64_t)found.st_size : -1;
    for (int64_t there = 0; size <= room && there < size;) {
        const ssize_t more = read(file, into + there, (size_t)(size - there));
        if (more < 0 && errno == EINTR)
            continue;
        if (more <= 0) /* it has become shorter, or cannot be read */
            size = -1;
        else
            there += more;
    }
    close(file);
    return size;
#endif
}

/* Read a file to `file` of `file_room` bytes, and decode it as above. Returns how many bytes it has, which are in `file`
 * where there is room for them; -1 where it cannot be read. The first side of the shape is 0 where nothing is decoded.
 */
EXPORT int64_t paceline_jpeg_load(const char *path, uint8_t *file, int64_t file_room, uint8_t *out, int64_t room,
                                  int32_t reduction, int32_t *shape, int32_t level) {
    const int64_t size = read_file(path, file, file_room);
    if (size < 2 || size > file_room || file[0] != 0xFF || file[1] != 0xD8 || !has_end(file, size) ||
        !paceline_jpeg_decode(file, size, out, room, reduction, shape, level))
        shape[0] = 0;
    return size;
}
