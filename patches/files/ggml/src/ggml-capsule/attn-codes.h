#pragma once

#include "half.h"
#include "layout.h"
#include "simd.h"

#include <cstring>
#include <initializer_list>

//
// From the planes of a block to bytes: 2*lane + row of the first register in a, of the second one in b.
// A row that is left alone has zeros beside it: read with a zero for every second byte, its planes look like those of a pair.
//

CAPSULE_INLINE capsule_i256 capsule_qwords(int64_t a, int64_t b, int64_t c, int64_t d) { return _mm256_setr_epi64x(a, b, c, d); }

CAPSULE_INLINE capsule_i256 capsule_and(capsule_i256 a, int mask) { return _mm256_and_si256(a, _mm256_set1_epi8((char) mask)); }

// a plane of 8 bits an element
template<bool LONE>
CAPSULE_INLINE capsule_i256 capsule_plane8(const uint8_t * p) {
    return LONE ? _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *) p)) : _mm256_loadu_si256((const __m256i *) p);
}

// of 4 bits, twice
template<bool LONE>
CAPSULE_INLINE capsule_i256 capsule_plane4(const uint8_t * p) {
    return _mm256_broadcastsi128_si256(LONE ? _mm_cvtepu8_epi16(_mm_loadl_epi64((const __m128i *) p)) : _mm_loadu_si128((const __m128i *) p));
}

// of 2 bits, four times
template<bool LONE>
CAPSULE_INLINE capsule_i256 capsule_plane2(const uint8_t * p) {
    if (LONE) {
        int32_t x;
        memcpy(&x, p, sizeof(x));
        return _mm256_broadcastq_epi64(_mm_cvtepu8_epi16(_mm_cvtsi32_si128(x)));
    }
    int64_t x;
    memcpy(&x, p, sizeof(x));
    return _mm256_set1_epi64x(x);
}

// codes at the top of their bytes
template<int B, bool LONE>
CAPSULE_INLINE void capsule_codes_high(const uint8_t * p, capsule_i256 & a, capsule_i256 & b) {
    constexpr int half = LONE ? 1 : 2; // a plane of w bits takes 8*w*half bytes

    auto shift = [](capsule_i256 x, capsule_i256 n) { return _mm256_sllv_epi64(x, n); };

    const capsule_i256 even  = capsule_qwords(7, 5, 3, 1);
    const capsule_i256 odd   = capsule_qwords(6, 4, 2, 0);
    const capsule_i256 right = capsule_qwords(4, 4, 0, 0);
    if (B == 1) {
        const capsule_i256 x = capsule_plane2<LONE>(p);
        a = capsule_and(shift(x, even), 0x80);
        b = capsule_and(shift(x, odd),  0x80);
    } else if (B == 2) {
        const capsule_i256 x = capsule_plane4<LONE>(p);
        a = capsule_and(shift(x, capsule_qwords(6, 6, 2, 2)), 0xc0);
        b = capsule_and(shift(x, right), 0xc0);
    } else if (B == 3) {
        const capsule_i256 x = capsule_plane4<LONE>(p);
        const capsule_i256 y = capsule_plane2<LONE>(p + 8*half);
        a = capsule_and(shift(x, right), 0xe0);
        b = _mm256_or_si256(capsule_and(shift(x, capsule_qwords(5, 5, 1, 1)), 0x20), capsule_and(shift(y, odd), 0xc0));
    } else if (B == 4) {
        const capsule_i256 x = capsule_plane8<LONE>(p);
        a = capsule_and(_mm256_slli_epi16(x, 4), 0xf0);
        b = capsule_and(x, 0xf0);
    } else if (B == 6) {
        const capsule_i256 x = capsule_plane8<LONE>(p);
        const capsule_i256 y = capsule_plane4<LONE>(p + 16*half);
        a = capsule_and(x, 0xfc);
        b = _mm256_or_si256(capsule_and(_mm256_slli_epi16(x, 2), 0x0c), capsule_and(shift(y, right), 0xf0));
    } else {
        a = capsule_plane8<LONE>(p);
        b = capsule_plane8<LONE>(p + 16*half);
    }
}

// codes at the bottom; those of 1 bit are doubled, so that the zero of b bits is 2^(b - 1) for all of them
template<int B, bool LONE>
CAPSULE_INLINE void capsule_codes_low(const uint8_t * p, capsule_i256 & a, capsule_i256 & b) {
    constexpr int half = LONE ? 1 : 2;

    auto shift = [](capsule_i256 x, capsule_i256 n) { return _mm256_srlv_epi64(x, n); };

    const capsule_i256 even = capsule_qwords(0, 2, 4, 6);
    const capsule_i256 odd  = capsule_qwords(1, 3, 5, 7);
    const capsule_i256 left = capsule_qwords(0, 0, 4, 4);
    if (B == 1) {
        const capsule_i256 x = capsule_plane2<LONE>(p);
        a = capsule_and(shift(x, even), 1);
        b = capsule_and(shift(x, odd),  1);
        a = _mm256_add_epi8(a, a);
        b = _mm256_add_epi8(b, b);
    } else if (B == 2) {
        const capsule_i256 x = capsule_plane4<LONE>(p);
        a = capsule_and(shift(x, left), 3);
        b = capsule_and(shift(x, capsule_qwords(2, 2, 6, 6)), 3);
    } else if (B == 3) {
        const capsule_i256 x = capsule_plane4<LONE>(p);
        const capsule_i256 y = capsule_and(shift(capsule_plane2<LONE>(p + 8*half), even), 3);
        a = capsule_and(shift(x, capsule_qwords(1, 1, 5, 5)), 7);
        b = _mm256_add_epi8(capsule_and(shift(x, left), 1), _mm256_add_epi8(y, y));
    } else if (B == 4) {
        const capsule_i256 x = capsule_plane8<LONE>(p);
        a = capsule_and(x, 15);
        b = capsule_and(_mm256_srli_epi16(x, 4), 15);
    } else if (B == 6) {
        const capsule_i256 x = capsule_plane8<LONE>(p);
        const capsule_i256 y = capsule_and(shift(capsule_plane4<LONE>(p + 16*half), left), 15);
        a = capsule_and(_mm256_srli_epi16(x, 2), 0x3f);
        b = _mm256_or_si256(capsule_and(x, 3), _mm256_slli_epi16(y, 2));
    } else {
        a = capsule_plane8<LONE>(p);
        b = capsule_plane8<LONE>(p + 16*half);
    }
}

// the codes of a short group as those of 16 lanes
static inline void capsule_widen(const ggml_capsule_plan * plan, int g, const uint8_t * code, uint8_t * out) {
    const int n_lanes = plan->groups[g].n_lanes;

    ggml_capsule_plan_blocks(plan, g, [&](int, int n_rows, int bits, int) {
        const int n    = n_rows*n_lanes;
        const int wide = n_rows*GGML_CAPSULE_LANES;
        if (bits == GGML_CAPSULE_F16) {
            for (int reg = 0; reg < 2*n_rows; ++reg) {
                memcpy(out + 2*reg*GGML_CAPSULE_LANES, code + 2*reg*n_lanes, 2*n_lanes);
                memset(out + 2*reg*GGML_CAPSULE_LANES + 2*n_lanes, 0, 2*(GGML_CAPSULE_LANES - n_lanes));
            }
            code += 4*n;
            out  += 4*wide;
            return;
        }
        const int first = bits == 1 ? 2 : bits <= 3 ? 4 : 8;
        for (int width : { first, bits == 8 ? 8 : 2*bits - first }) {
            if (width == 0) {
                continue;
            }
            const int size      = (width*n + 7)/8;
            const int wide_size = width*wide/8;
            memset(out, 0, wide_size);
            for (int j = 0; j < n; ++j) {
                const int element = code[j % size] >> j/size*width & ((1 << width) - 1);
                out[j % wide_size] |= (uint8_t) (element << j/wide_size*width);
            }
            code += size;
            out  += wide_size;
        }
    });
}
