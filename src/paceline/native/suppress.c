/* Suppress: the greedy rule of non-maximum suppression for the sorted boxes of many images, in one call.

   A box is compared with the boxes of its image that are kept so far, a block at a time, until one overlaps it. Every
   operation is that of `paceline.evaluation.nms`, in float32 and in its order, so both decide alike to the last box;
   hence no contraction to fused operations either. */

#ifndef PACELINE_SOURCE_CRC
#error "setup.py says which source this is built from; build by `python setup.py build_ext --inplace`"
#endif

#include <stdint.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))

enum { BLOCK = 16, PLANES = 6 };

EXPORT uint32_t paceline_source_crc(void) { return PACELINE_SOURCE_CRC; }

/* BLOCK kept boxes, plane by plane: x1, y1, x2, y2, area, class. */
typedef struct {
    float plane[PLANES][BLOCK];
} Block;

INLINE float least(float a, float b) { return a < b ? a : b; }
INLINE float most(float a, float b) { return a > b ? a : b; }

/* Say whether any box of a block overlaps `box` by more than `iou`; places that hold no box have class -1. */
INLINE int overlaps(const Block *block, const float box[PLANES], float iou, float eps) {
    int any = 0;
    for (int i = 0; i < BLOCK; i++) {
        const float width = most(least(block->plane[2][i], box[2]) - most(block->plane[0][i], box[0]), 0.0f);
        const float height = most(least(block->plane[3][i], box[3]) - most(block->plane[1][i], box[1]), 0.0f);
        const float intersection = width * height;
        const float both = most(block->plane[4][i] + box[4] - intersection, eps);
        any |= (intersection / both > iou) & (block->plane[5][i] == box[5]);
    }
    return any;
}

INLINE int64_t suppress_image(const float *planes, int64_t num_boxes, int64_t num_valid, float iou, float eps,
                              int64_t max_det, Block *kept, int64_t *ranks) {
    int64_t count = 0;
    for (int64_t rank = 0; rank < num_valid && count < max_det; rank++) {
        float box[PLANES];
        for (int plane = 0; plane < PLANES; plane++) box[plane] = planes[plane * num_boxes + rank];
        const int64_t blocks = (count + BLOCK - 1) / BLOCK;
        int64_t number = 0;
        while (number < blocks && !overlaps(kept + number, box, iou, eps)) number++;
        if (number < blocks) continue;
        Block *last = kept + count / BLOCK;
        if (count % BLOCK == 0) {
            memset(last, 0, sizeof *last);
            for (int i = 0; i < BLOCK; i++) last->plane[5][i] = -1.0f;
        }
        for (int plane = 0; plane < PLANES; plane++) last->plane[plane][count % BLOCK] = box[plane];
        ranks[count++] = rank;
    }
    return count;
}

INLINE void suppress_all(const float *planes, const int64_t *num_valid, int64_t num_images, int64_t num_boxes,
                         float iou, float eps, int64_t max_det, Block *kept, int64_t *ranks, int64_t *count) {
    for (int64_t image = 0; image < num_images; image++)
        count[image] = suppress_image(planes + image * PLANES * num_boxes, num_boxes, num_valid[image], iou, eps,
                                      max_det, kept, ranks + image * max_det);
}

#define PARAMETERS                                                                                                  \
    const float *planes, const int64_t *num_valid, int64_t num_images, int64_t num_boxes, float iou, float eps,     \
        int64_t max_det, Block *kept, int64_t *ranks, int64_t *count
#define ARGUMENTS planes, num_valid, num_images, num_boxes, iou, eps, max_det, kept, ranks, count

#if defined(__x86_64__)
__attribute__((target("avx2"))) static void suppress_avx2(PARAMETERS) { suppress_all(ARGUMENTS); }
__attribute__((target("avx512f,avx512vl,avx512dq,avx512bw,prefer-vector-width=512"))) static void
suppress_avx512(PARAMETERS) {
    suppress_all(ARGUMENTS);
}
#endif

/* Keep, for each image, the ranks of up to `max_det` of its first `num_valid` boxes.

   planes: images x 6 x boxes; the boxes of each image sorted, best first. kept: room for max_det boxes, rounded up to
   whole blocks. ranks: images x max_det, untouched beyond `count`. */
EXPORT void paceline_suppress(PARAMETERS) {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512bw")) {
        suppress_avx512(ARGUMENTS);
        return;
    }
    if (__builtin_cpu_supports("avx2")) {
        suppress_avx2(ARGUMENTS);
        return;
    }
#endif
    suppress_all(ARGUMENTS);
}
