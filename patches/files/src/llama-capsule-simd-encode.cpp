#include "llama-capsule-simd-avx2.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdlib>

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

static constexpr int32_t Q2_FACTORS[6] = { 10, 12, 15, 18, 23, 32 };

// of the 12 searches of a round, [factor / 2][factor % 2][y, -y][2 times the same]: values to which y is compared
struct q2_limits {
    alignas(32) int32_t one  [3][8];
    alignas(32) int32_t two  [3][8];
    alignas(32) int32_t minus[3][8];
};

// sums of y k and of k k, in the place of "2 times the same"
struct q2_sums {
    alignas(32) int32_t v[3][8];
};

// the code of z = y or -y for the scale s is (z >= s/2) + (z >= 3s/2) - (z < -s/2); num/den = s: how the integer y may say this with "greater than"
INLINE_EXACT void q2_limits_set(q2_limits & l, int i, __m256i num, __m256i den) {
    const __m256i neg = _mm256_setr_epi32(1, 1, -1, -1, 1, 1, -1, -1);
    const __m256i max = _mm256_setr_epi32(32767, 32767, 32768, 32768, 32767, 32767, 32768, 32768); // of y and of -y

    // q + r/d = s/2; num < 2^23 and d <= 512: a quotient that is no integer is not rounded to one
    const __m256i d  = _mm256_add_epi32(den, den);
    const __m256i q  = _mm256_cvttps_epi32(_mm256_div_ps(_mm256_cvtepi32_ps(num), _mm256_cvtepi32_ps(d)));
    const __m256i r  = _mm256_sub_epi32(num, _mm256_mullo_epi32(q, d));
    const __m256i r3 = _mm256_add_epi32(r, _mm256_add_epi32(r, r));
    const __m256i q3 = _mm256_add_epi32(q, _mm256_add_epi32(q, q));

    // rounded up, less 1
    const __m256i one = _mm256_add_epi32(q, _mm256_cmpeq_epi32(r, _mm256_setzero_si256()));
    const __m256i up  = _mm256_add_epi32(_mm256_cmpgt_epi32(r3, _mm256_setzero_si256()),
                        _mm256_add_epi32(_mm256_cmpgt_epi32(r3, d), _mm256_cmpgt_epi32(r3, _mm256_add_epi32(d, d))));
    const __m256i two = _mm256_sub_epi32(q3, _mm256_add_epi32(up, _mm256_set1_epi32(1)));

    _mm256_store_si256((__m256i *) l.one  [i], _mm256_sign_epi32(one, neg));
    _mm256_store_si256((__m256i *) l.two  [i], _mm256_sign_epi32(_mm256_min_epi32(two, max), neg));
    _mm256_store_si256((__m256i *) l.minus[i], _mm256_sub_epi32(_mm256_setzero_si256(), _mm256_sign_epi32(q, neg)));
}

INLINE_EXACT __m256i q2_limit(const int32_t & x) {
    return _mm256_set1_epi16((int16_t) x);
}

template<bool NEG>
INLINE_EXACT __m256i q2_codes(__m256i y, __m256i one, __m256i two, __m256i minus) {
    const __m256i k = NEG ? _mm256_cmpgt_epi16(y, minus) : _mm256_cmpgt_epi16(minus, y);

    return _mm256_sub_epi16(_mm256_sub_epi16(k,
            NEG ? _mm256_cmpgt_epi16(one, y) : _mm256_cmpgt_epi16(y, one)),
            NEG ? _mm256_cmpgt_epi16(two, y) : _mm256_cmpgt_epi16(y, two));
}

template<bool NEG>
INLINE_EXACT __m256i q2_add(const __m256i * y, const q2_limits & l, int i, int j) {
    const __m256i one   = q2_limit(l.one  [i][j]);
    const __m256i two   = q2_limit(l.two  [i][j]);
    const __m256i minus = q2_limit(l.minus[i][j]);

    __m256i xc = _mm256_setzero_si256();
    __m256i cc = _mm256_setzero_si256();
    for (int n = 0; n < 4; ++n) {
        const __m256i k = q2_codes<NEG>(y[n], one, two, minus);

        xc = _mm256_add_epi32(xc, _mm256_madd_epi16(y[n], k));
        cc = _mm256_add_epi32(cc, _mm256_madd_epi16(k, k));
    }
    return _mm256_hadd_epi32(xc, cc);
}

INLINE_EXACT void q2_round(const __m256i * y, const q2_limits & l, q2_sums & sums) {
    for (int i = 0; i < 3; ++i) {
        for (int j = 0; j < 8; j += 4) {
            const __m256i s = _mm256_hadd_epi32(q2_add<false>(y, l, i, j), q2_add<true>(y, l, i, j + 2));

            _mm_store_si128((__m128i *) (sums.v[i] + j), _mm_add_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1)));
        }
    }
}

// |sum of y k|, which is the sum of z k, and the sum of k k
INLINE_EXACT void q2_sums_get(const q2_sums & sums, int i, __m256i & xc, __m256i & cc) {
    const __m256i v = _mm256_load_si256((const __m256i *) sums.v[i]);

    xc = _mm256_abs_epi32(_mm256_shuffle_epi32(v, 0xa0));
    cc = _mm256_shuffle_epi32(v, 0xf5);
}

// 4 codes a byte
INLINE_EXACT __m256i q2_pack(__m256i k0, __m256i k1) {
    const __m256i c = _mm256_permute4x64_epi64(_mm256_packs_epi16(k0, k1), 0xd8);
    const __m256i u = _mm256_add_epi8(c, _mm256_set1_epi8(1));

    return _mm256_madd_epi16(_mm256_maddubs_epi16(u, _mm256_set1_epi16(0x0401)), _mm256_set1_epi32(0x00100001));
}

template<bool NEG>
INLINE_EXACT void q2_store(const __m256i * y, const q2_limits & l, int i, int j, uint8_t * dst) {
    const __m256i one   = q2_limit(l.one  [i][j]);
    const __m256i two   = q2_limit(l.two  [i][j]);
    const __m256i minus = q2_limit(l.minus[i][j]);

    __m256i k[4];
    for (int n = 0; n < 4; ++n) {
        k[n] = q2_codes<NEG>(y[n], one, two, minus);
    }
    const __m256i q = _mm256_permute4x64_epi64(_mm256_packus_epi32(q2_pack(k[0], k[1]), q2_pack(k[2], k[3])), 0xd8);

    _mm_storeu_si128((__m128i *) dst, _mm_packus_epi16(_mm256_castsi256_si128(q), _mm256_extracti128_si256(q, 1)));
}

TARGET_EXACT static q2_limits q2_limits_first() {
    q2_limits res;
    for (int i = 0; i < 3; ++i) {
        const __m256i f = _mm256_setr_m128i(_mm_set1_epi32(Q2_FACTORS[2*i]), _mm_set1_epi32(Q2_FACTORS[2*i + 1]));

        q2_limits_set(res, i, _mm256_slli_epi32(f, 10), _mm256_set1_epi32(1));
    }
    return res;
}

TARGET_EXACT static void quantize_block_q2_0(const float * x, const q2_limits & first, uint8_t * dst) {
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

    // the second round: the codes for the best scales of the first (the largest value always has a code: no sum is 0)
    q2_limits second;
    q2_sums   sums[2];
    q2_round(y, first, sums[0]);
    for (int i = 0; i < 3; ++i) {
        __m256i xc;
        __m256i cc;
        q2_sums_get(sums[0], i, xc, cc);
        q2_limits_set(second, i, xc, cc);
    }
    q2_round(y, second, sums[1]);

    // xc^2/cc is the squared error that is removed: those that may be the best
    __m256 score[6];
    __m256 best_score = _mm256_setzero_ps();
    for (int i = 0; i < 6; ++i) {
        __m256i xc;
        __m256i cc;
        q2_sums_get(sums[i/3], i%3, xc, cc);

        const __m256 t = _mm256_cvtepi32_ps(xc);
        score[i]   = _mm256_div_ps(_mm256_mul_ps(t, t), _mm256_cvtepi32_ps(cc));
        best_score = _mm256_max_ps(best_score, score[i]);
    }
    const __m256 least = _mm256_set1_ps(reduce_max(best_score)*(1.0f - 0x1p-20f));

    int64_t best_xc = 0;
    int64_t best_cc = 1;
    int     best    = 0; // [round][factor / 2][factor % 2][y, -y]
    int     rank    = 0; // its place in the reference: [factor][sign][round]

    for (int i = 0; i < 6; ++i) {
        for (uint32_t mask = _mm256_movemask_ps(_mm256_cmp_ps(score[i], least, _CMP_GE_OQ)) & 0x55; mask; mask &= mask - 1) {
            const int j = __builtin_ctz(mask);

            const int64_t xc = std::abs(sums[i/3].v[i%3][j]);
            const int64_t cc = sums[i/3].v[i%3][j + 1];
            const int     at = 4*(2*(i%3) + j/4) + 2*((j/2%2 != 0) != flip) + i/3;

            const int64_t ours = xc*xc*best_cc;
            const int64_t its  = best_xc*best_xc*cc;
            if (ours > its || (ours == its && at < rank)) {
                best_xc = xc;
                best_cc = cc;
                best    = 4*i + j/2;
                rank    = at;
            }
        }
    }

    const q2_limits & l = best < 12 ? first : second;

    const int  i   = best/4%3;
    const int  j   = best%4*2;
    const bool neg = best%2;

    const float scale = (float) best_xc/(float) best_cc*(amax*0x1p-15f);

    store_half((neg == flip ? 1.0f : -1.0f)*std::min(scale, 65504.0f), dst);
    if (neg) {
        q2_store<true> (y, l, i, j, dst + 2);
    } else {
        q2_store<false>(y, l, i, j, dst + 2);
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
            {
                static const q2_limits first = q2_limits_first();

                for (uint32_t i = 0; i < d; i += QK2) {
                    quantize_block_q2_0(x + i, first, (uint8_t *) dst + i/QK2*Q2_SIZE);
                }
            } break;
        default:
            llama_capsule_row_quantize(type, x, dst, d);
            break;
    }
}

#endif // CAPSULE_AVX2
