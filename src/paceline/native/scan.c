/* Scan: heads of image files and plain YOLO label files, many per call, without Python's lock.

   Both functions judge only what is ordinary and whole. Whatever else they meet (another type, a damaged, cut off or
   absent file, a line that is no plain box) they mark ASIDE, and the caller looks at that file in Python, which knows
   the rules in full and words the findings. So these functions may be strict, and never have to explain.

   `paths` holds the file names one after the other, each ended by a zero byte. */

#ifndef PACELINE_SOURCE_CRC
#error "setup.py says which source this is built from; build by `python setup.py build_ext --inplace`"
#endif

#define _GNU_SOURCE /* pread, O_CLOEXEC */

#include <fcntl.h>
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { ASIDE = 0, PLAIN = 1, PLAIN_JPEG = 1, PLAIN_PNG = 2 };
enum { HEAD = 4096, TAIL = 64, LABEL_BYTES = 1 << 16, LONGEST_NUMBER = 64, ORIENTATION_TAG = 274 };

#define EXPORT __attribute__((visibility("default")))

EXPORT uint32_t paceline_source_crc(void) { return PACELINE_SOURCE_CRC; }

/* -- heads ------------------------------------------------------------------------------------------------------- */

typedef struct {
    int descriptor;
    int64_t size, held; /* bytes of the file, and of its beginning in `head` */
    uint8_t head[HEAD], piece[TAIL];
} File;

typedef struct {
    int64_t height, width;
    int orientation;
} Header;

static unsigned big16(const uint8_t *at) { return (unsigned)at[0] << 8 | at[1]; }
static uint32_t big32(const uint8_t *at) { return (uint32_t)big16(at) << 16 | big16(at + 2); }
static unsigned little16(const uint8_t *at) { return (unsigned)at[1] << 8 | at[0]; }
static uint32_t little32(const uint8_t *at) { return (uint32_t)little16(at + 2) << 16 | little16(at); }

/* Return `length` (at most TAIL) bytes of the file at `offset`, NULL where it ends before. */
static const uint8_t *bytes_at(File *file, int64_t offset, int64_t length) {
    if (offset + length <= file->held) return file->head + offset;
    if (offset + length > file->size || length > TAIL) return NULL;
    return pread(file->descriptor, file->piece, (size_t)length, offset) == length ? file->piece : NULL;
}

/* Read the orientation in the EXIF body at `offset`; -1 where it is not laid out as cameras do. */
static int orientation_at(const File *file, int64_t offset, int64_t length) {
    if (offset + length > file->held) length = file->held - offset; /* its first directory is enough */
    if (length < 10) return -1;
    const uint8_t *body = file->head + offset;
    const int little = body[0] == 'I' && body[1] == 'I';
    if (!little && !(body[0] == 'M' && body[1] == 'M')) return -1;
    if ((little ? little16(body + 2) : big16(body + 2)) != 42) return -1;
    const int64_t directory = little ? little32(body + 4) : big32(body + 4);
    if (directory + 2 > length) return -1;
    const int64_t number = little ? little16(body + directory) : big16(body + directory);
    if (number < 1 || number > 4096 || directory + 2 + 12 * number > length) return -1;
    int orientation = 1;
    for (const uint8_t *entry = body + directory + 2, *end = entry + 12 * number; entry < end; entry += 12) {
        if ((little ? little16(entry) : big16(entry)) != ORIENTATION_TAG) continue;
        if ((little ? little16(entry + 2) : big16(entry + 2)) != 3) return -1;
        if ((little ? little32(entry + 4) : big32(entry + 4)) != 1) return -1;
        orientation = (int)(little ? little16(entry + 8) : big16(entry + 8));
    }
    return orientation >= 1 && orientation <= 8 ? orientation : 1;
}

static int read_jpeg(File *file, Header *header) {
    int64_t offset = 2;
    for (;;) {
        const uint8_t *segment = bytes_at(file, offset, 4);
        if (!segment || segment[0] != 0xFF) return ASIDE;
        const int marker = segment[1];
        const int64_t length = big16(segment + 2);
        if (marker == 0xFF) { /* a fill byte before the marker */
            offset += 1;
            continue;
        }
        if (marker == 0x01 || (marker >= 0xD0 && marker <= 0xD9)) return ASIDE;
        if (marker >= 0xC0 && marker <= 0xCF && marker != 0xC4 && marker != 0xC8 && marker != 0xCC) {
            const uint8_t *size = bytes_at(file, offset + 4, 6);
            const int known = marker <= 0xC3 || marker == 0xC9 || marker == 0xCA;
            if (!size || !known || size[0] != 8 || !(size[5] == 1 || size[5] == 3 || size[5] == 4)) return ASIDE;
            header->height = big16(size + 1);
            header->width = big16(size + 3);
        } else if (marker == 0xE1) {
            const uint8_t *kind = bytes_at(file, offset + 4, 6);
            if (!kind) return ASIDE;
            if (!memcmp(kind, "Exif\0\0", 6)) {
                if (offset + 10 > file->held) return ASIDE;
                header->orientation = orientation_at(file, offset + 10, length - 8);
                if (header->orientation < 0) return ASIDE;
            }
        }
        offset += 2 + length;
        if (marker == 0xDA) break;
    }
    const int64_t near = offset > file->size - TAIL ? offset : file->size - TAIL;
    const uint8_t *tail = near < file->size ? bytes_at(file, near, file->size - near) : NULL;
    if (!tail) return ASIDE;
    for (const uint8_t *end = tail + (file->size - near) - 1; tail < end; tail++)
        if (tail[0] == 0xFF && tail[1] == 0xD9) return PLAIN_JPEG;
    return ASIDE;
}

static int read_png(File *file, Header *header) {
    if (file->held < 33 || memcmp(file->head + 12, "IHDR", 4)) return ASIDE;
    header->width = big32(file->head + 16);
    header->height = big32(file->head + 20);
    const int bits = file->head[24], colours = file->head[25];
    if (bits != 8 && bits != 16 && !((bits == 1 || bits == 2 || bits == 4) && (colours == 0 || colours == 3))) return ASIDE;
    if (colours > 6 || colours == 1 || colours == 5 || (colours == 3 && bits == 16)) return ASIDE;
    if (file->head[26] || file->head[27] || file->head[28] > 1) return ASIDE; /* compression, filters, interlace */
    int palette = colours != 3; /* whether there is one, or none is needed */
    for (int64_t offset = 33;;) {
        const uint8_t *chunk = bytes_at(file, offset, 8);
        if (!chunk) return ASIDE;
        const int64_t length = big32(chunk);
        if (!memcmp(chunk + 4, "IDAT", 4)) break;
        if (!memcmp(chunk + 4, "PLTE", 4)) palette = 1;
        if (!memcmp(chunk + 4, "eXIf", 4)) {
            if (offset + 8 > file->held) return ASIDE;
            header->orientation = orientation_at(file, offset + 8, length);
            if (header->orientation < 0) return ASIDE;
        }
        offset += 12 + length;
    }
    const uint8_t *tail = bytes_at(file, file->size - 8, 4);
    return tail && palette && !memcmp(tail, "IEND", 4) ? PLAIN_PNG : ASIDE;
}

static int read_head(File *file, Header *header) {
    struct stat found;
    if (fstat(file->descriptor, &found) || !S_ISREG(found.st_mode)) return ASIDE;
    file->size = found.st_size;
    file->held = read(file->descriptor, file->head, HEAD);
    if (file->held < (file->size < HEAD ? file->size : HEAD) || file->held < 16) return ASIDE;
    if (!memcmp(file->head, "\xFF\xD8\xFF", 3)) return read_jpeg(file, header);
    if (!memcmp(file->head, "\x89PNG\r\n\x1A\n", 8)) return read_png(file, header);
    return ASIDE;
}

/* Read size (height, width, after rotation) and EXIF orientation of `number` images; `marks` says what
   each is: PLAIN_JPEG, PLAIN_PNG, or ASIDE. */
EXPORT void paceline_read_heads(const char *paths, int64_t number, int32_t *sizes, uint8_t *orientations, uint8_t *marks) {
    File file;
    for (int64_t k = 0; k < number; k++, paths += strlen(paths) + 1) {
        Header header = {0, 0, 1};
        marks[k] = ASIDE;
        file.descriptor = open(paths, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
        if (file.descriptor < 0) continue;
        const int mark = read_head(&file, &header);
        close(file.descriptor);
        if (mark == ASIDE || header.height < 1 || header.width < 1) continue;
        if (header.height > INT32_MAX || header.width > INT32_MAX) continue;
        const int turned = header.orientation > 4;
        sizes[2 * k] = (int32_t)(turned ? header.width : header.height);
        sizes[2 * k + 1] = (int32_t)(turned ? header.height : header.width);
        orientations[k] = (uint8_t)header.orientation;
        marks[k] = (uint8_t)mark;
    }
}

/* -- labels ------------------------------------------------------------------------------------------------------ */

static const double POWERS[] = {1e0,  1e1,  1e2,  1e3,  1e4,  1e5,  1e6,  1e7,  1e8,  1e9,  1e10, 1e11,
                                1e12, 1e13, 1e14, 1e15, 1e16, 1e17, 1e18, 1e19, 1e20, 1e21, 1e22};

static int is_digit(char letter) { return letter >= '0' && letter <= '9'; }

/* Parse a decimal number at *place, which moves behind it, rounded as Python's float() does.

   Up to 15 digits and a power of ten up to 22 are exact doubles, so one division or multiplication rounds once; longer
   numbers go to strtod, which rounds rightly too. Returns 0 where no number that is written plainly stands there. */
static int parse_number(const char **place, double *value) {
    const char *start = *place, *at = start;
    int digits = 0, significant = 0, decimals = 0;
    uint64_t mantissa = 0;
    const int negative = *at == '-';
    if (*at == '-' || *at == '+') at++;
    for (; is_digit(*at); at++, digits++)
        if (mantissa || *at != '0') {
            if (significant++ < 19) mantissa = 10 * mantissa + (uint64_t)(*at - '0');
        }
    if (*at == '.') {
        for (at++; is_digit(*at); at++, digits++, decimals++)
            if (mantissa || *at != '0') {
                if (significant++ < 19) mantissa = 10 * mantissa + (uint64_t)(*at - '0');
            }
    }
    if (!digits || at - start > LONGEST_NUMBER) return 0;
    int exponent = 0;
    if (*at == 'e' || *at == 'E') {
        at++;
        const int down = *at == '-';
        if (*at == '-' || *at == '+') at++;
        if (!is_digit(*at)) return 0;
        for (; is_digit(*at); at++)
            if ((exponent = 10 * exponent + (*at - '0')) > 400) return 0;
        if (down) exponent = -exponent;
    }
    exponent -= decimals;
    *place = at;
    if (FLT_EVAL_METHOD == 0 && significant <= 15 && exponent >= -22 && exponent <= 22) {
        const double whole = (double)mantissa;
        const double size = exponent < 0 ? whole / POWERS[-exponent] : whole * POWERS[exponent];
        *value = negative ? -size : size;
        return 1;
    }
    char *end;
    *value = strtod(start, &end); /* where the locale has a decimal comma, it stops before the number's end */
    return end == at;
}

static const char *skip_blanks(const char *at) {
    while (*at == ' ' || *at == '\t') at++;
    return at;
}

typedef struct {
    int64_t capacity, filled;
    int64_t *files, *labels, *lines;
    double *quads;
} Boxes;

/* Parse `text`, ended by a zero byte at `end`; return 1 where every line is blank or a plain box, 0 where not, -1 where
   `boxes` are full. */
static int parse_labels(const char *text, const char *end, int64_t number, Boxes *boxes) {
    if (end - text >= 3 && !memcmp(text, "\xEF\xBB\xBF", 3)) text += 3;
    for (int64_t line = 1; text < end; line++) {
        text = skip_blanks(text);
        if (*text != '\n' && *text != '\r' && text < end) {
            double label, quad[4];
            if (!parse_number(&text, &label) || !(fabs(label) <= (double)(1 << 30)) || label != floor(label)) return 0;
            for (int k = 0; k < 4; k++) {
                const char *next = skip_blanks(text);
                if (next == text || !parse_number(&next, &quad[k])) return 0;
                text = next;
            }
            text = skip_blanks(text);
            if (boxes->filled == boxes->capacity) return -1;
            const int64_t row = boxes->filled++;
            boxes->files[row] = number;
            boxes->labels[row] = (int64_t)label;
            boxes->lines[row] = line;
            memcpy(boxes->quads + 4 * row, quad, sizeof quad);
        }
        if (text == end) return 1;
        if (*text == '\r') text++;
        if (*text++ != '\n') return 0;
    }
    return 1;
}

/* Read a file whole; return its length, -1 where it cannot be read or is longer than `capacity`. */
static int64_t read_whole(const char *path, char *content, int64_t capacity) {
    const int descriptor = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (descriptor < 0) return -1;
    int64_t length = 0, got;
    while ((got = read(descriptor, content + length, (size_t)(capacity - length))) > 0)
        if ((length += got) == capacity) got = -1;
    close(descriptor);
    return got < 0 || length == capacity ? -1 : length;
}

/* Read the boxes of `number` label files into at most `capacity` rows of `files` (number of the file), `labels`,
   `lines` (from 1) and `quads` (x, y, width, height as written); `marks` says which files are PLAIN.

   Returns how many files were dealt with, fewer than `number` where the rows did not suffice, and in *filled the rows. */
EXPORT int64_t paceline_read_labels(const char *paths, int64_t number, int64_t capacity, int64_t *files, int64_t *labels,
                             int64_t *lines, double *quads, uint8_t *marks, int64_t *filled) {
    char *content = malloc(LABEL_BYTES + 1);
    Boxes boxes = {capacity, 0, files, labels, lines, quads};
    int64_t k = 0;
    for (; content && k < number; k++, paths += strlen(paths) + 1) {
        const int64_t before = boxes.filled, length = read_whole(paths, content, LABEL_BYTES);
        marks[k] = ASIDE;
        if (length < 0) continue;
        content[length] = '\0';
        const int plain = parse_labels(content, content + length, k, &boxes);
        if (plain == 1) marks[k] = PLAIN;
        else boxes.filled = before;
        if (plain < 0) break;
    }
    free(content);
    *filled = boxes.filled;
    return k;
}
