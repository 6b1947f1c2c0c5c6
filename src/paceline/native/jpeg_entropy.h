/* Entropy: from the bytes of a scan to the coefficients of its blocks (ITU-T T.81, annex F.2.2).
 *
 * A segment (the scan, or its part between two restarts) goes through a window, rid of its stuffing, so that eight
 * bytes can be taken at once without looking at them. What a look-up finds by the next LOOKUP_BITS bits:
 *
 *     | code 1 | value 1 | code 2 | value 2 | ..      two coefficients, where the second lies within these bits;
 *     | code 1 | value ...                            else one, of whose value the bits are taken from the stream
 *
 * A second one that is not there is a zero written to the next place, which is zero or still to be written. So a
 * coefficient costs no branch, and the chain from one look-up to the next is a shift, a load and a shift.
 */

enum { LOOKUP_BITS = 10, MOST_VALUE_BITS = 11 }; /* of 8-bit samples: 11 for DC, 10 for AC */
enum { WINDOW = 4096, SLACK = 288 }; /* bytes; a block takes 209 at most, 27 bits and 63 times 26 */

/* Fields of an entry, each of 8 bits but for the last, which has 16. */
enum { TAKEN = 0, SHIFT = 8, RUN = 16, SECOND_PLACE = 24, STEP = 32, SECOND_VALUE = 40, BASE = 48 };
enum { ENDS = 128, LONG = 192 }; /* runs that lead behind any block: its end, and a code that is not in the table */
#define FIELD(entry, field) ((uint32_t)((entry) >> (field)) & 255)

typedef struct {
    uint64_t entries[1 << LOOKUP_BITS];
    uint32_t limits[LONGEST_CODE + 1];  /* first 16 bits that belong to no code of up to this length */
    int32_t offsets[LONGEST_CODE + 1];  /* from a code of this length to the place of its symbol */
    const uint8_t *symbols;
} Lookup;

typedef struct {
    uint64_t bits; /* next bits of the scan from the top, `count` of them sure to be right */
    const uint8_t *at; /* what is taken next */
    uint32_t count;
} Bits;

typedef struct {
    const uint8_t *next, *end; /* of the file, from where the window is filled */
    const uint8_t *filled;     /* end of what is in the window */
    Bits bits;                 /* as they are between two calls of `decode_block` */
    int marker;                /* that has ended the segment; 0 before that, -1 at the end of the file */
    uint8_t window[WINDOW + SLACK];
} Stream;

/* Value of `size` bits at the top of `bits`, as F.2.2.1 extends its sign. */
INLINE int32_t value_of(uint64_t bits, uint32_t size) {
    const int32_t raw = (int32_t)((bits >> 1) >> (63 - size));
    return bits >> 63 ? raw : raw + 1 - (1 << size);
}

/* The same by an entry: its bits as a number, code included, less that of the code and what a lower half is off. */
INLINE int16_t first_value(uint64_t bits, uint64_t entry) {
    return (int16_t)(uint16_t)((bits >> (entry >> SHIFT & 63)) - (entry >> BASE));
}

INLINE uint32_t first_taken(uint64_t entry) { return 64 - FIELD(entry, SHIFT); }

static int is_valid(uint32_t symbol, int is_dc) { /* in an 8-bit image */
    const uint32_t size = symbol & 15;
    return is_dc ? symbol < MOST_VALUE_BITS + 1 : size ? size < MOST_VALUE_BITS : symbol == 0 || symbol == 0xF0;
}

/* A code with the bit behind it, the sign of its value, at place `index` of the table. */
static uint64_t entry_of(uint32_t symbol, uint32_t length, uint32_t index, int is_dc) {
    const uint32_t size = symbol & 15, taken = length + size;
    if (!is_valid(symbol, is_dc) || (size && length == LOOKUP_BITS))
        return (uint64_t)LONG << RUN;
    const uint32_t code = index >> (LOOKUP_BITS - length);
    const int is_lower = size && !(index >> (LOOKUP_BITS - length - 1) & 1);
    const uint16_t base = (uint16_t)((code << size) + (is_lower ? (1u << size) - 1 : 0));
    const uint64_t run = !is_dc && symbol == 0 ? ENDS : symbol >> 4;
    return (uint64_t)taken << TAKEN | (uint64_t)(64 - taken) << SHIFT | run << RUN | (uint64_t)1 << SECOND_PLACE |
           (uint64_t)1 << STEP | (uint64_t)base << BASE;
}

/* An entry with what the table says about the bits that follow within `index`, if they are a whole code and value. */
static uint64_t pair_of(const Lookup *lookup, uint64_t first, uint32_t index) {
    const uint32_t taken = first_taken(first);
    if (FIELD(first, RUN) >= ENDS || taken >= LOOKUP_BITS)
        return first;
    const uint32_t rest = index << taken & ((1 << LOOKUP_BITS) - 1);
    const uint64_t second = lookup->entries[rest];
    const uint32_t run = FIELD(second, RUN), both = taken + first_taken(second);
    if (run == LONG || both > LOOKUP_BITS)
        return first;
    const int16_t value = first_value((uint64_t)rest << (64 - LOOKUP_BITS), second);
    if (value != (int8_t)value)
        return first;
    const uint64_t place = run == ENDS ? 1 : run + 1, step = run == ENDS ? ENDS + 1 : run + 2;
    const uint64_t kept = first & ((uint64_t)255 << SHIFT | (uint64_t)255 << RUN | (uint64_t)65535 << BASE);
    return kept | both << TAKEN | place << SECOND_PLACE | step << STEP | (uint64_t)(uint8_t)value << SECOND_VALUE;
}

/* Annex C.2. False where the numbers of codes are those of no code. */
static int build(Lookup *lookup, Code code, int is_dc) {
    uint32_t next = 0, place = 0;
    for (int i = 0; i < 1 << LOOKUP_BITS; i++)
        lookup->entries[i] = (uint64_t)LONG << RUN;
    lookup->symbols = code.symbols;
    for (uint32_t length = 1; length <= LONGEST_CODE; length++, next <<= 1) {
        lookup->offsets[length] = (int32_t)place - (int32_t)next;
        for (uint32_t i = 0; i < code.counts[length - 1]; i++, next++, place++) {
            if (next >> length || (is_dc && code.symbols[place] > MOST_VALUE_BITS))
                return 0;
            if (length > LOOKUP_BITS)
                continue;
            const uint32_t spare = LOOKUP_BITS - length;
            for (uint32_t index = next << spare; index < (next + 1) << spare; index++)
                lookup->entries[index] = entry_of(code.symbols[place], length, index, is_dc);
        }
        lookup->limits[length] = next << (LONGEST_CODE - length);
    }
    for (uint32_t index = 0; index < 1 << LOOKUP_BITS && !is_dc; index++)
        lookup->entries[index] = pair_of(lookup, lookup->entries[index], index);
    return 1;
}

/* Move what is left to the front of the window and fill it up, to the marker that ends the segment at the most. */
static const uint8_t *fill(Stream *stream, const uint8_t *at) {
    uint8_t *to = stream->window, *const end = stream->window + WINDOW;
    const size_t left = (size_t)(stream->filled - at);
    memmove(to, at, left);
    to += left;
    while (to < end && !stream->marker) {
        const size_t room = (size_t)(end - to), rest = (size_t)(stream->end - stream->next);
        const size_t most = room < rest ? room : rest;
        const uint8_t *const found = most ? memchr(stream->next, 0xFF, most) : NULL;
        const size_t plain = found ? (size_t)(found - stream->next) : most;
        memcpy(to, stream->next, plain);
        to += plain;
        stream->next += plain;
        if (stream->end - stream->next < 2 && (found || plain == rest)) {
            stream->marker = -1;
        } else if (found) {
            if (stream->next[1] == 0)
                *to++ = 0xFF;
            else
                stream->marker = stream->next[1];
            stream->next += 2;
        }
    }
    stream->filled = to;
    memset(to, 0, SLACK);
    return stream->window;
}

/* At least 56 bits are there afterwards. */
INLINE Bits refilled(Bits b) {
    uint64_t bytes;
    memcpy(&bytes, b.at, sizeof bytes);
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    bytes = __builtin_bswap64(bytes);
#endif
    return (Bits){.bits = b.bits | bytes >> b.count, .at = b.at + ((63 - b.count) >> 3), .count = b.count | 56};
}

static void open_segment(Stream *stream) {
    stream->filled = stream->window;
    stream->marker = 0;
    stream->bits = refilled((Bits){.at = fill(stream, stream->window)});
}

/* Whether a segment has ended here, with this marker, and nothing between but the bits that fill the last byte. */
static int ends_with(Stream *stream, int marker) {
    if (!stream->marker)
        stream->bits.at = fill(stream, stream->bits.at);
    const ptrdiff_t left = (stream->filled - stream->bits.at) * 8 + (ptrdiff_t)stream->bits.count;
    return stream->marker == marker && left >= 0 && left < 8;
}

INLINE Bits without(Bits b, uint32_t num_bits) {
    return (Bits){.bits = b.bits << (num_bits & 63), .at = b.at, .count = b.count - num_bits};
}

typedef struct {
    int32_t symbol; /* -1 where the bits begin no code */
    uint32_t length;
} Found;

/* A code of any length. */
static Found look_long(const Lookup *lookup, uint64_t all_bits) {
    const uint32_t bits = (uint32_t)(all_bits >> (64 - LONGEST_CODE));
    uint32_t length = 1;
    while (length <= LONGEST_CODE && bits >= lookup->limits[length])
        length++;
    if (length > LONGEST_CODE)
        return (Found){.symbol = -1};
    const int32_t place = (int32_t)(bits >> (LONGEST_CODE - length)) + lookup->offsets[length];
    return (Found){.symbol = lookup->symbols[place], .length = length};
}

/* The next block's DC coefficient, with the window filled for all of the block; false where the bits are those of none. */
INLINE int decode_dc(Stream *stream, Bits *bits, const Lookup *dc, int32_t *predicted) {
    Bits b = *bits;
    const uint64_t difference = dc->entries[b.bits >> (64 - LOOKUP_BITS)]; /* of 16 or more bits left */
    if (stream->filled - b.at < SLACK) {
        if (!stream->marker)
            b.at = fill(stream, b.at);
        else if (b.at > stream->filled + 8)
            return 0;
    }
    b = refilled(b);
    if (FIELD(difference, RUN) == 0) {
        *predicted += first_value(b.bits, difference);
        b = without(b, FIELD(difference, TAKEN));
    } else {
        const Found found = look_long(dc, b.bits);
        if (found.symbol < 0)
            return 0;
        b = without(b, found.length);
        *predicted += value_of(b.bits, (uint32_t)found.symbol);
        b = without(b, (uint32_t)found.symbol);
    }
    *bits = b;
    return *predicted >= -MOST_DC && *predicted <= MOST_DC;
}

/* Coefficients of the next block, which must be zero before. Returns the number of those up to the last in the zigzag's
 * order, DC included; 0 where the bits are those of no block of an 8-bit image.
 */
INLINE int decode_block(Stream *stream, Bits *bits, const Lookup *dc, const Lookup *ac, int32_t *predicted,
                        int16_t *block) {
    Bits b = *bits;
    if (!decode_dc(stream, &b, dc, predicted))
        return 0;
    block[0] = (int16_t)*predicted;

    int result;
    uint64_t entry = ac->entries[b.bits >> (64 - LOOKUP_BITS)];
    for (uint32_t k = 1;;) { /* next place in the zigzag's order */
        b = refilled(b); /* while the entry is on its way */
        uint32_t place;
        for (int twice = 0; twice < 2; twice++) { /* at most 20 bits each, of 56, of which the next look-up needs 10 */
            place = k + FIELD(entry, RUN);
            if (place >= BLOCK - 1)
                goto special;
            const uint64_t now = entry, bits_now = b.bits;
            b = without(b, FIELD(now, TAKEN));
            entry = ac->entries[b.bits >> (64 - LOOKUP_BITS)];
            block[PLACES[place]] = first_value(bits_now, now);
            block[PLACES[place + FIELD(now, SECOND_PLACE)]] = (int8_t)FIELD(now, SECOND_VALUE);
            k = place + FIELD(now, STEP);
        }
        continue;
    special:;
        const int ended = k >= ENDS;
        if (ended | ((FIELD(entry, RUN) == ENDS) & (k < BLOCK))) {
            b = without(b, ended ? 0 : FIELD(entry, TAKEN));
            result = (int)(ended ? k - ENDS : k);
            break;
        }
        if (k >= BLOCK) { /* complete, or beyond: 0 */
            result = k == BLOCK ? BLOCK : 0;
            break;
        }
        if (place == BLOCK - 1) { /* a second coefficient would be the next block's */
            block[BLOCK - 1] = first_value(b.bits, entry);
            b = without(b, first_taken(entry));
            result = BLOCK;
            break;
        }
        if (FIELD(entry, RUN) != LONG)
            return 0;
        b = refilled(b);
        const Found found = look_long(ac, b.bits);
        const uint32_t size = (uint32_t)found.symbol & 15;
        if (found.symbol < 0 || !is_valid((uint32_t)found.symbol, 0))
            return 0;
        b = without(b, found.length);
        if (found.symbol == 0) {
            result = (int)k;
            break;
        }
        k += (uint32_t)found.symbol >> 4;
        if (k >= BLOCK)
            return 0;
        block[PLACES[k++]] = (int16_t)value_of(b.bits, size);
        b = without(b, size);
        entry = ac->entries[b.bits >> (64 - LOOKUP_BITS)];
    }
    *bits = b;
    return result;
}

/* What a look-up passes over where no coefficient is kept but DC: all codes within LOOKUP_BITS bits, with their values,
 * of which bits may lie behind.
 */
typedef struct {
    uint32_t entries[1 << LOOKUP_BITS];
} Skips;

/* Fields of an entry: bits taken, coefficients passed over, whether the block ends; all 0 if the first code is longer. */
enum { PASSED = 8, ENDED = 16 };

static void build_skips(Skips *skips, const Lookup *ac) {
    for (uint32_t index = 0; index < 1 << LOOKUP_BITS; index++) {
        uint32_t taken = 0, passed = 0, ended = 0;
        while (taken < LOOKUP_BITS && !ended) {
            const uint32_t left = LOOKUP_BITS - taken;
            const uint64_t entry = ac->entries[index << taken & ((1 << LOOKUP_BITS) - 1)];
            if (FIELD(entry, RUN) < BLOCK && first_taken(entry) <= left) { /* the quick way to the same */
                taken += first_taken(entry);
                passed += FIELD(entry, RUN) + 1;
                continue;
            }
            const Found found = look_long(ac, (uint64_t)index << (64 - left));
            if (found.symbol < 0 || found.length > left || !is_valid((uint32_t)found.symbol, 0))
                break;
            taken += found.length + ((uint32_t)found.symbol & 15);
            ended = found.symbol == 0;
            passed += ended ? 0 : ((uint32_t)found.symbol >> 4) + 1;
        }
        skips->entries[index] = taken | passed << PASSED | ended << ENDED;
    }
}

/* The next block's DC coefficient, the others passed over; returns 1, or 0 where `decode_block` does. */
INLINE int decode_level(Stream *stream, Bits *bits, const Lookup *dc, const Lookup *ac, const Skips *skips,
                        int32_t *predicted) {
    Bits b = *bits;
    if (!decode_dc(stream, &b, dc, predicted))
        return 0;
    for (uint32_t k = 1; k < BLOCK;) {
        const uint32_t entry = skips->entries[b.bits >> (64 - LOOKUP_BITS)];
        b = refilled(b);
        const uint32_t next = k + (entry >> PASSED & 255);
        if (entry && next < BLOCK) { /* else codes behind the last coefficient are the next block's */
            b = without(b, entry & 255);
            k = next;
            if (entry >> ENDED)
                break;
            continue;
        }
        const Found found = look_long(ac, b.bits);
        if (found.symbol < 0 || !is_valid((uint32_t)found.symbol, 0))
            return 0;
        b = without(b, found.length + ((uint32_t)found.symbol & 15));
        if (found.symbol == 0)
            break;
        k += ((uint32_t)found.symbol >> 4) + 1;
        if (k > BLOCK)
            return 0;
    }
    *bits = b;
    return 1;
}
