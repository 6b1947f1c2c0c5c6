/* Image: what the markers of a JPEG file say, and what its decoders share. */

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if UINTPTR_MAX < UINT64_MAX
#error "sizes of images are reckoned in 64 bits"
#endif

#define EXPORT __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))

enum { BLOCK = 64, SIDE = 8 };
enum { MOST_DC = 8191, MOST_STEP = 4095 }; /* of a quantised DC coefficient, and of quantisation: no sum overflows */
enum { MOST_COMPONENTS = 3, MOST_TABLES = 4, MOST_CODES = 2, MOST_SIDE = 65500, LONGEST_CODE = 16 };

#if defined(__x86_64__)
#define ON_X86 1
#else
#define ON_X86 0
#endif

/* A Huffman code as the file gives it: numbers of codes of 1 to 16 bits, and their symbols. */
typedef struct {
    const uint8_t *counts, *symbols;
} Code;

typedef struct {
    uint8_t id, across, down; /* blocks of an MCU */
    uint8_t steps, dc, ac;    /* numbers of its tables */
    uint8_t size;             /* samples along a side of a block: 8, or less if the image is reduced */
} Component;

/* What the markers say, up to the entropy-coded bytes. */
typedef struct {
    size_t height, width; /* of the pixels that are to be drawn */
    size_t mcus_down, mcus_across;
    int reduction;        /* 1, 2, 4 or 8 */
    int wider, taller;    /* times that samples of chroma are to be repeated or spread, 1 or 2 */
    int num_components, across, down; /* the largest of the components' */
    Component components[MOST_COMPONENTS];
    uint32_t restart_interval; /* MCUs; 0 for none */
    const uint8_t *scan, *end;
    Code codes[2][MOST_CODES];              /* DC and AC */
    int16_t steps[MOST_TABLES][BLOCK];      /* of quantisation, by rows and columns */
    uint8_t has_steps[MOST_TABLES];
} Image;

static const uint8_t PLACES[BLOCK + 16] = { /* from the zigzag's order to rows and columns, then nowhere */
    0,  1,  8,  16, 9,  2,  3,  10, 17, 24, 32, 25, 18, 11, 4,  5,  12, 19, 26, 33, 40, 48, 41, 34, 27, 20, 13,
    6,  7,  14, 21, 28, 35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23, 30, 37, 44, 51, 58, 59, 52, 45, 38, 31,
    39, 46, 53, 60, 61, 54, 47, 55, 62, 63, 64, 64, 64, 64, 64, 64, 64, 64, 64, 64, 64, 64, 64, 64, 64, 64,
};

INLINE size_t quotient_up(size_t a, size_t b) { return (a + b - 1) / b; }

#if ON_X86
int paceline_decode_by_avx2(const Image *image, uint8_t *out);
#endif
