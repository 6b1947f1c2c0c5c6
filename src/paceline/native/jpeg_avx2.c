/* JPEG by AVX2: the decoder compiled for machines that have it; `jpeg.c` chooses it at run time. */

#include "jpeg.h"

#if ON_X86

#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,bmi,bmi2"))), apply_to = function)
#else
#pragma GCC target("avx2,bmi,bmi2")
#endif

#define WITH_AVX2
#include "jpeg_decode.h"

int paceline_decode_by_avx2(const Image *image, uint8_t *out) { return decode_image(image, out); }

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
