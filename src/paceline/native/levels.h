/* Levels: the vector units that code for pixels is compiled for, from what all machines have upwards. */

#ifndef PACELINE_LEVELS_H
#define PACELINE_LEVELS_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

enum { PORTABLE = 0, SSE4 = 1, AVX2 = 2, AVX512 = 3, VBMI = 4 };

#if defined(__x86_64__) || defined(__i386__)
#define ON_X86 1
#include <immintrin.h>
#define WITH_SSE4 __attribute__((target("sse4.1")))
#define WITH_AVX2 __attribute__((target("avx2")))
#define WITH_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))
#define WITH_VBMI __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")))
#else
#define ON_X86 0
#endif

/* The best level of this machine. */
static int32_t best_level(void) {
#if ON_X86
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        return __builtin_cpu_supports("avx512vbmi") ? VBMI : AVX512;
    if (__builtin_cpu_supports("avx2"))
        return AVX2;
    if (__builtin_cpu_supports("sse4.1"))
        return SSE4;
#endif
    return PORTABLE;
}

#endif
