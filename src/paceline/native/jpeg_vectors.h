/* Vectors of LANES bytes, in parts of 16.
 *
 * No operation leaves a part: of a block of coefficients eight numbers of 16 bits lie in one, and vectors of more parts
 * transform as many blocks at once. `Sixteen` is one part, for shuffles of bytes.
 */

#ifdef WITH_AVX2
enum { LANES = 32 };
#else
enum { LANES = 16 };
#endif
enum { SIXTEEN = 16, PARTS = LANES / SIXTEEN, SHORTS = LANES / 2 };

typedef uint8_t Bytes __attribute__((vector_size(LANES)));
typedef int16_t Shorts __attribute__((vector_size(LANES)));
typedef uint16_t Unsigned __attribute__((vector_size(LANES)));
typedef int32_t Words __attribute__((vector_size(LANES)));
typedef uint64_t Longs __attribute__((vector_size(LANES)));
typedef uint8_t Sixteen __attribute__((vector_size(16)));

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(kind, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(kind, a, b, ...) __builtin_shuffle(a, b, (kind){__VA_ARGS__})
#endif

/* What the compilers' own vectors do not say well, by the units' instructions or in plain C:
 *     low, high     a0 b0 a1 b1 .. of the lower or upper halves of each part
 *     weighed       of interleaved numbers a0 b0 a1 b1 .. the sums a * x + b * y, in 32 bits
 *     interleaved   the lower 16 bits of numbers of 32, a0 b0 a1 b1 .., `b` moved up by 16 bits already
 *     limited       bytes of both, limited to 0 to 255
 *     low_bytes, high_bytes   numbers of the lower or upper half of each part
 *     high_product  upper 16 bits of products
 *     packed        numbers of 32 bits that fit into 16, of both
 *     loaded        parts from their places, of which there is only one where vectors have one part
 *     any           whether any bit is set
 */
#ifdef WITH_AVX2

INLINE Shorts low(Shorts a, Shorts b) { return (Shorts)_mm256_unpacklo_epi16((__m256i)a, (__m256i)b); }
INLINE Shorts high(Shorts a, Shorts b) { return (Shorts)_mm256_unpackhi_epi16((__m256i)a, (__m256i)b); }
INLINE Words weighed(Shorts pairs, int x, int y) {
    return (Words)_mm256_madd_epi16((__m256i)pairs, _mm256_set1_epi32((x & 65535) | (int)((unsigned)y << 16)));
}
INLINE Words weighed_by(Shorts a, Shorts b) { return (Words)_mm256_madd_epi16((__m256i)a, (__m256i)b); }
INLINE Shorts interleaved(Words a, Words b) { return (Shorts)_mm256_blend_epi16((__m256i)a, (__m256i)b, 0xAA); }
INLINE Bytes limited(Shorts a, Shorts b) { return (Bytes)_mm256_packus_epi16((__m256i)a, (__m256i)b); }
INLINE Shorts low_bytes(Bytes x) { return (Shorts)_mm256_unpacklo_epi8((__m256i)x, _mm256_setzero_si256()); }
INLINE Shorts high_bytes(Bytes x) { return (Shorts)_mm256_unpackhi_epi8((__m256i)x, _mm256_setzero_si256()); }
INLINE Shorts high_product(Shorts a, int b) {
    return (Shorts)_mm256_mulhi_epi16((__m256i)a, _mm256_set1_epi16((int16_t)b));
}
INLINE Shorts packed(Words a, Words b) { return (Shorts)_mm256_packs_epi32((__m256i)a, (__m256i)b); }
INLINE Shorts loaded(const int16_t *a, const int16_t *b) {
    const __m128i first = _mm_loadu_si128((const __m128i *)a), second = _mm_loadu_si128((const __m128i *)b);
    return (Shorts)_mm256_inserti128_si256(_mm256_castsi128_si256(first), second, 1);
}
INLINE int any(Words a) { return !_mm256_testz_si256((__m256i)a, (__m256i)a); }

#else

INLINE Shorts loaded(const int16_t *a, const int16_t *b) {
    (void)b;
    Shorts shorts;
    memcpy(&shorts, a, sizeof shorts);
    return shorts;
}

#ifdef __SSE2__

INLINE Shorts low(Shorts a, Shorts b) { return (Shorts)_mm_unpacklo_epi16((__m128i)a, (__m128i)b); }
INLINE Shorts high(Shorts a, Shorts b) { return (Shorts)_mm_unpackhi_epi16((__m128i)a, (__m128i)b); }
INLINE Words weighed(Shorts pairs, int x, int y) {
    return (Words)_mm_madd_epi16((__m128i)pairs, _mm_set1_epi32((x & 65535) | (int)((unsigned)y << 16)));
}
INLINE Words weighed_by(Shorts a, Shorts b) { return (Words)_mm_madd_epi16((__m128i)a, (__m128i)b); }
INLINE Shorts interleaved(Words a, Words b) { return (Shorts)((a & 65535) | (b & -65536)); }
INLINE Bytes limited(Shorts a, Shorts b) { return (Bytes)_mm_packus_epi16((__m128i)a, (__m128i)b); }
INLINE Shorts low_bytes(Bytes x) { return (Shorts)_mm_unpacklo_epi8((__m128i)x, _mm_setzero_si128()); }
INLINE Shorts high_bytes(Bytes x) { return (Shorts)_mm_unpackhi_epi8((__m128i)x, _mm_setzero_si128()); }
INLINE Shorts high_product(Shorts a, int b) { return (Shorts)_mm_mulhi_epi16((__m128i)a, _mm_set1_epi16((int16_t)b)); }
INLINE Shorts packed(Words a, Words b) { return (Shorts)_mm_packs_epi32((__m128i)a, (__m128i)b); }
INLINE int any(Words a) { return _mm_movemask_epi8((__m128i)(a != 0)) != 0; }

#else

INLINE Shorts low(Shorts a, Shorts b) { return SHUFFLE(Shorts, a, b, 0, 8, 1, 9, 2, 10, 3, 11); }
INLINE Shorts high(Shorts a, Shorts b) { return SHUFFLE(Shorts, a, b, 4, 12, 5, 13, 6, 14, 7, 15); }
INLINE Words weighed_by(Shorts a, Shorts b) {
    Words sums;
    for (int i = 0; i < 4; i++)
        sums[i] = a[2 * i] * b[2 * i] + a[2 * i + 1] * b[2 * i + 1];
    return sums;
}
INLINE Words weighed(Shorts pairs, int x, int y) {
    const int16_t a = (int16_t)x, b = (int16_t)y;
    return weighed_by(pairs, (Shorts){a, b, a, b, a, b, a, b});
}
INLINE Shorts interleaved(Words a, Words b) {
    Shorts shorts;
    for (int i = 0; i < 4; i++) {
        shorts[2 * i] = (int16_t)(uint16_t)a[i];
        shorts[2 * i + 1] = (int16_t)(b[i] >> 16);
    }
    return shorts;
}
INLINE Bytes limited(Shorts a, Shorts b) {
    Bytes bytes;
    for (int i = 0; i < 8; i++) {
        bytes[i] = (uint8_t)(a[i] < 0 ? 0 : a[i] > 255 ? 255 : a[i]);
        bytes[8 + i] = (uint8_t)(b[i] < 0 ? 0 : b[i] > 255 ? 255 : b[i]);
    }
    return bytes;
}
INLINE Shorts low_bytes(Bytes x) { return (Shorts){x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7]}; }
INLINE Shorts high_bytes(Bytes x) { return (Shorts){x[8], x[9], x[10], x[11], x[12], x[13], x[14], x[15]}; }
INLINE Shorts high_product(Shorts a, int b) {
    Shorts products;
    for (int i = 0; i < 8; i++)
        products[i] = (int16_t)((a[i] * b) >> 16);
    return products;
}
INLINE Shorts packed(Words a, Words b) {
    Shorts shorts;
    for (int i = 0; i < 4; i++) {
        shorts[i] = (int16_t)a[i];
        shorts[4 + i] = (int16_t)b[i];
    }
    return shorts;
}
INLINE int any(Words a) { return (a[0] | a[1] | a[2] | a[3]) != 0; }

#endif
#endif

INLINE Bytes load(const void *from) {
    Bytes bytes;
    memcpy(&bytes, from, LANES);
    return bytes;
}

INLINE void store(void *to, Bytes bytes) { memcpy(to, &bytes, LANES); }

INLINE void clear(int16_t *block) {
    for (int i = 0; i < BLOCK; i += SHORTS)
        store(block + i, (Bytes){0});
}

INLINE Sixteen load_sixteen(const void *from) {
    Sixteen bytes;
    memcpy(&bytes, from, sizeof bytes);
    return bytes;
}

INLINE void store_sixteen(void *to, Sixteen bytes) { memcpy(to, &bytes, sizeof bytes); }
