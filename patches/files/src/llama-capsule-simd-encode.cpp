#include "llama-capsule-simd-avx2.h"

#include <algorithm>
#include <cfloat>
#include <cmath>

//
// rows into their types, byte for byte as llama_capsule_row_quantize()
//

#ifdef CAPSULE_AVX2

// without FMA: the bytes may not depend on what a compiler fuses
#define TARGET_EXACT __attribute__((target("avx2,f16c")))
#define INLINE_EXACT TARGET_EXACT __attribute__((always_inline)) static inline

INLINE_EXACT float reduce_max(__m256 a) {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));

    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}

INLINE_EXACT void store_half(float x, uint8_t * dst) {
    const uint16_t h = _mm_cvtsi128_si32(_mm_cvtps_ph(_mm_set_ss(x), _MM_FROUND_TO_NEAREST_INT));
    memcpy(dst, &h, sizeof(h));
}

//
// q8_0, q4_0: like quantize_row_*_ref()
//

INLINE_EXACT float abs_32(const float * x, __m256 * v, __m256 * a) {
    const __m256 sign = _mm256_set1_ps(-0.0f);

    for (int i = 0; i < 4; ++i) {
        v[i] = _mm256_loadu_ps(x + 8*i);
        a[i] = _mm256_andnot_ps(sign, v[i]);
    }
    return reduce_max(_mm256_max_ps(_mm256_max_ps(a[0], a[1]), _mm256_max_ps(a[2], a[3])));
}

TARGET_EXACT static void quantize_q8_0(const float * x, uint8_t * dst, uint32_t d) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    const __m256 half = _mm256_set1_ps(0.49999997f); // halves away from zero, what is below them not

    for (uint32_t ib = 0; ib < d; ib += QK, dst += Q8_SIZE) {
        __m256 v[4];
        __m256 a[4];

        const float scale = abs_32(x + ib, v, a)/127;
        const float inv   = scale != 0.0f ? 1.0f/scale : 0.0f;

        __m256i c[4];
        for (int i = 0; i < 4; ++i) {
            const __m256 y = _mm256_mul_ps(v[i], _mm256_set1_ps(inv));

            // low bytes, as the conversion of a number that does not fit leaves them
            c[i] = _mm256_and_si256(_mm256_cvttps_epi32(_mm256_add_ps(y, _mm256_or_ps(half, _mm256_and_ps(sign, y)))), _mm256_set1_epi32(255));
        }

        const __m256i lo = _mm256_permute4x64_epi64(_mm256_packus_epi32(c[0], c[1]), 0xd8);
        const __m256i hi = _mm256_permute4x64_epi64(_mm256_packus_epi32(c[2], c[3]), 0xd8);

        store_half(scale, dst);
        _mm256_storeu_si256((__m256i *) (dst + 2), _mm256_permute4x64_epi64(_mm256_packus_epi16(lo, hi), 0xd8));
    }
}

TARGET_EXACT static void quantize_q4_0(const float * x, uint8_t * dst, uint32_t d) {
    for (uint32_t ib = 0; ib < d; ib += QK, dst += Q4_SIZE) {
        __m256 v[4];
        __m256 a[4];

        const __m256 amax = _mm256_set1_ps(abs_32(x + ib, v, a));

        // the first of the largest
        uint32_t where = 0;
        for (int i = 0; i < 4; ++i) {
            where |= (uint32_t) _mm256_movemask_ps(_mm256_cmp_ps(a[i], amax, _CMP_EQ_OQ)) << 8*i;
        }

        const float scale = (where ? x[ib + __builtin_ctz(where)] : 0.0f)/-8;
        const float inv   = scale != 0.0f ? 1.0f/scale : 0.0f;

        __m256i c[4];
        for (int i = 0; i < 4; ++i) {
            const __m256 y = _mm256_add_ps(_mm256_mul_ps(v[i], _mm256_set1_ps(inv)), _mm256_set1_ps(8.5f));

            c[i] = _mm256_min_epi32(_mm256_and_si256(_mm256_cvttps_epi32(y), _mm256_set1_epi32(255)), _mm256_set1_epi32(15));
        }

        const __m256i lo = _mm256_packus_epi32(c[0], c[1]);
        const __m256i hi = _mm256_packus_epi32(c[2], c[3]);
        const __m256i q  = _mm256_permute4x64_epi64(_mm256_or_si256(lo, _mm256_slli_epi16(hi, 4)), 0xd8);

        store_half(scale, dst);
        _mm_storeu_si128((__m128i *) (dst + 2), _mm_packus_epi16(_mm256_castsi256_si128(q), _mm256_extracti128_si256(q, 1)));
    }
}

//
// q2_0: the search of llama_capsule_quantize_row_q2_0() in 16 bits. The values of a block lie in -32768..32768 and its largest is one of both,
//   so they or their opposites fit, unless both are there
//

// code k of y, for the scale s: k = (z >= s/2) + (z >= 3s/2) - (z < -s/2), z = y or -y; as limits of y
struct q2_limits {
    int32_t one;
    int32_t two;
    int32_t minus;

    // s = num/den
    q2_limits(int32_t num, int32_t den) {
        const int32_t q = num/(2*den);
        const int32_t r = num%(2*den);

        one   = q + (r > 0) - 1;                                                    // z > one
        two   = std::min(3*q + (r > 0) + (3*r > 2*den) + (3*r > 4*den) - 1, 32768); // z > two
        minus = q;                                                                  // -z > minus
    }
};

template<bool NEG>
INLINE_EXACT __m256i q2_codes(__m256i y, const q2_limits & l) {
    // y itself is at most 32767
    const __m256i one   = NEG ? _mm256_cmpgt_epi16(_mm256_set1_epi16(-l.one), y)  : _mm256_cmpgt_epi16(y, _mm256_set1_epi16(l.one));
    const __m256i two   = NEG ? _mm256_cmpgt_epi16(_mm256_set1_epi16(-l.two), y)  : _mm256_cmpgt_epi16(y, _mm256_set1_epi16(std::min(l.two, 32767)));
    const __m256i minus = NEG ? _mm256_cmpgt_epi16(y, _mm256_set1_epi16(l.minus)) : _mm256_cmpgt_epi16(_mm256_set1_epi16(-l.minus), y);

    return _mm256_sub_epi16(_mm256_sub_epi16(minus, one), two);
}

// sums of z k and of k k
struct q2_sums {
    int32_t xc;
    int32_t cc;
};

template<bool NEG>
INLINE_EXACT void q2_add(const __m256i * y, const q2_limits & l, __m256i & xc, __m256i & cc) {
    xc = _mm256_setzero_si256();
    cc = _mm256_setzero_si256();
    for (int i = 0; i < 4; ++i) {
        const __m256i k = q2_codes<NEG>(y[i], l);

        xc = _mm256_add_epi32(xc, _mm256_madd_epi16(y[i], k));
        cc = _mm256_add_epi32(cc, _mm256_madd_epi16(k, k));
    }
}

// for y and for -y at once
INLINE_EXACT void q2_assign(const __m256i * y, const q2_limits * l, q2_sums * res) {
    __m256i xc[2];
    __m256i cc[2];
    q2_add<false>(y, l[0], xc[0], cc[0]);
    q2_add<true> (y, l[1], xc[1], cc[1]);

    const __m256i s = _mm256_hadd_epi32(_mm256_hadd_epi32(xc[0], cc[0]), _mm256_hadd_epi32(xc[1], cc[1]));
    const __m128i t = _mm_add_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));

    res[0] = {  _mm_cvtsi128_si32(t),      _mm_extract_epi32(t, 1) };
    res[1] = { -_mm_extract_epi32(t, 2),   _mm_extract_epi32(t, 3) };
}

// 4 codes a byte
INLINE_EXACT __m256i q2_pack(__m256i k0, __m256i k1) {
    const __m256i c = _mm256_permute4x64_epi64(_mm256_packs_epi16(k0, k1), 0xd8);
    const __m256i u = _mm256_add_epi8(c, _mm256_set1_epi8(1));

    return _mm256_madd_epi16(_mm256_maddubs_epi16(u, _mm256_set1_epi16(0x0401)), _mm256_set1_epi32(0x00100001));
}

template<bool NEG>
INLINE_EXACT void q2_store(const __m256i * y, const q2_limits & l, uint8_t * dst) {
    const __m256i lo = q2_pack(q2_codes<NEG>(y[0], l), q2_codes<NEG>(y[1], l));
    const __m256i hi = q2_pack(q2_codes<NEG>(y[2], l), q2_codes<NEG>(y[3], l));
    const __m256i q  = _mm256_permute4x64_epi64(_mm256_packus_epi32(lo, hi), 0xd8);

    _mm_storeu_si128((__m128i *) dst, _mm_packus_epi16(_mm256_castsi256_si128(q), _mm256_extracti128_si256(q, 1)));
}

TARGET_EXACT static void quantize_block_q2_0(const float * x, uint8_t * dst) {
    __m256 v[8];
    __m256 hi = _mm256_set1_ps(-FLT_MAX);
    __m256 lo = _mm256_set1_ps(-FLT_MAX); // of the opposites
    for (int i = 0; i < 8; ++i) {
        v[i] = _mm256_loadu_ps(x + 8*i);
        hi = _mm256_max_ps(v[i], hi);
        lo = _mm256_max_ps(_mm256_xor_ps(v[i], _mm256_set1_ps(-0.0f)), lo);
    }

    const float max_pos = reduce_max(hi);
    const float max_neg = reduce_max(lo);
    const float amax    = std::max(max_pos, max_neg);

    // nearly nothing, or not a number
    if (!(amax >= 0x1p-20f && amax <= FLT_MAX)) {
        llama_capsule_quantize_row_q2_0(x, dst, QK2);
        return;
    }

    const float s = 32768.0f/amax;

    const bool flip = rintf(max_pos*s) > 32767.0f;
    if (flip && rintf(max_neg*s) > 32767.0f) {
        llama_capsule_quantize_row_q2_0(x, dst, QK2);
        return;
    }

    const __m256 f = _mm256_set1_ps(flip ? -s : s);

    __m256i y[4];
    for (int i = 0; i < 4; ++i) {
        y[i] = _mm256_packs_epi32(_mm256_cvtps_epi32(_mm256_mul_ps(v[2*i], f)), _mm256_cvtps_epi32(_mm256_mul_ps(v[2*i + 1], f)));
        y[i] = _mm256_permute4x64_epi64(y[i], 0xd8);
    }

    q2_sums   best        = { 0, 1 };
    q2_limits best_limits = { 0, 1 };
    int       best_i      = 0;

    for (int32_t factor : { 10, 12, 15, 18, 23, 32 }) {
        const q2_limits first[2] = { { 1024*factor, 1 }, { 1024*factor, 1 } };

        q2_sums sums[2][2];
        q2_assign(y, first, sums[0]);

        // the second round: the codes for the best scale of the first (the largest value has a code, hence cc > 0)
        const q2_limits second[2] = { { sums[0][0].xc, sums[0][0].cc }, { sums[0][1].xc, sums[0][1].cc } };
        q2_assign(y, second, sums[1]);

        // the first of the best, in the order of the reference
        for (int i : { +flip, 1 - flip }) {
            for (int round = 0; round < 2; ++round) {
                const q2_sums & cur = sums[round][i];

                // xc^2/cc is the squared error that is removed
                if ((int64_t) cur.xc*cur.xc*best.cc > (int64_t) best.xc*best.xc*cur.cc) {
                    best        = cur;
                    best_limits = round == 0 ? first[i] : second[i];
                    best_i      = i;
                }
            }
        }
    }

    const float scale = (float) best.xc/(float) best.cc*(amax*0x1p-15f);
    const float sign  = best_i == (int) flip ? 1.0f : -1.0f;

    store_half(sign*std::min(scale, 65504.0f), dst);
    if (best_i == 0) {
        q2_store<false>(y, best_limits, dst + 2);
    } else {
        q2_store<true> (y, best_limits, dst + 2);
    }
}

void llama_capsule_from_float_avx2(ggml_type type, const float * x, void * dst, uint32_t d) {
    switch (type) {
        case GGML_TYPE_Q8_0:
            quantize_q8_0(x, (uint8_t *) dst, d);
            break;
        case GGML_TYPE_Q4_0:
            quantize_q4_0(x, (uint8_t *) dst, d);
            break;
        case GGML_TYPE_Q2_0:
            for (uint32_t i = 0; i < d; i += QK2) {
                quantize_block_q2_0(x + i, (uint8_t *) dst + i/QK2*Q2_SIZE);
            }
            break;
        default:
            llama_capsule_row_quantize(type, x, dst, d);
            break;
    }
}

#endif // CAPSULE_AVX2
