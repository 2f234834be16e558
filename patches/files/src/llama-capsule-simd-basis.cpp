#include "llama-capsule-simd-avx2.h"

#include <algorithm>

//
// AVX2: products of rows of 4 and 2 bits in integers, two rows at a time: the scales of the rows go into the basis, which becomes 8 bits wide, with a scale
//   for each token and sums of 16 bits
//

#ifdef CAPSULE_AVX2

// rows whose sums stay below 2^15 with weights of 100 or more: codes less those of 0 are at most 8 and 2
static constexpr uint32_t Q4_TOP       = 8;
static constexpr uint32_t Q2_TOP       = 2;
static constexpr uint32_t INT_MAX_SUM  = 32767;
static constexpr uint32_t INT_MAX_CODE = INT_MAX_SUM/100;

struct int_buffers {
    llama_capsule_buf<uint8_t>  codes;   // [d/32][n_pairs][32 columns][2 rows], rows of 4 bits first in even blocks of columns and last in odd ones
    llama_capsule_buf<uint8_t>  row;     // [2][d]
    llama_capsule_buf<float>    scales;  // [d/32][rows of 4 bits, padded], [d/64][rows of 2 bits, padded]
    llama_capsule_buf<int16_t>  factors; // [2][rows of 4 bits, padded], [rows of 2 bits, padded]
    llama_capsule_buf<uint32_t> w;       // [n_pairs][N16] of an even block, [n_pairs][N16] of the odd one behind it: they share the rows of 2 bits
    llama_capsule_buf<int16_t>  offs;    // [2][N16], those of rows of 2 bits behind
    llama_capsule_buf<int16_t>  max;     // [N16] of the tokens
    llama_capsule_buf<int16_t>  grow;    // [N16][2] in vectors, see int_grow
    llama_capsule_buf<float>    units;   // [N16] what a weight of 1 stands for
};

TARGET static float max_product(uint32_t n_pad, const float * a, const float * b) {
    const __m256 sign = _mm256_set1_ps(-0.0f);

    __m256 m = _mm256_setzero_ps();
    for (uint32_t i = 0; i < n_pad; i += 8) {
        m = _mm256_max_ps(m, _mm256_andnot_ps(sign, _mm256_mul_ps(_mm256_loadu_ps(a + i), _mm256_loadu_ps(b + i))));
    }
    return max1(m);
}

// factors of the rows of a block of columns
TARGET static void int_factors(uint32_t n_pad, const float * scales, const float * basis_max, float f, int16_t * factors) {
    for (uint32_t i = 0; i < n_pad; i += 8) {
        const __m256i x = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_set1_ps(f), _mm256_mul_ps(_mm256_loadu_ps(scales + i), _mm256_loadu_ps(basis_max + i))));

        _mm_storeu_si128((__m128i *) (factors + i), _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1)));
    }
}

// codes and scales of n rows, the codes of two rows side by side; dst [d/32] blocks of columns
template<bool Q4>
TARGET static void int_codes(uint8_t * row, uint32_t n, uint32_t n_pad, uint32_t d, const uint8_t * src, uint8_t * const * dst, float * scales) {
    static constexpr uint32_t n_codes = Q4 ? QK : QK2;

    std::fill_n(scales, d/n_codes*n_pad, 0.0f);

    for (uint32_t r = 0; r < n; r += 2) {
        for (uint32_t k = 0; k < 2; ++k) {
            uint8_t * to = row + k*d;
            if (r + k >= n) {
                memset(to, 0, d);
                continue;
            }
            for (uint32_t b = 0; b < d/n_codes; ++b, to += n_codes) {
                if (Q4) {
                    _mm256_storeu_si256((__m256i *) to, codes_q4(src + 2));
                } else {
                    __m256i lo;
                    __m256i hi;
                    codes_q2(src + 2, lo, hi);

                    _mm256_storeu_si256((__m256i *) to,      lo);
                    _mm256_storeu_si256((__m256i *) to + 1, hi);
                }
                scales[b*n_pad + r + k] = half_at(src);
                src += Q4 ? Q4_SIZE : Q2_SIZE;
            }
        }
        for (uint32_t b = 0; b < d/QK; ++b) {
            const __m256i x = _mm256_loadu_si256((const __m256i *) (row + b*QK));
            const __m256i y = _mm256_loadu_si256((const __m256i *) (row + b*QK + d));

            const __m256i lo = _mm256_unpacklo_epi8(x, y);
            const __m256i hi = _mm256_unpackhi_epi8(x, y);

            _mm256_storeu_si256((__m256i *) (dst[b] + r*QK),      _mm256_permute2x128_si256(lo, hi, 0x20));
            _mm256_storeu_si256((__m256i *) (dst[b] + r*QK) + 1, _mm256_permute2x128_si256(lo, hi, 0x31));
        }
    }
}

// the largest products of each token in n rows
TARGET static void int_max(uint32_t n, uint32_t N16, const int16_t * basis, const int16_t * factors, int16_t * max) {
    for (uint32_t t = 0; t < N16; t += 16) {
        __m256i m = _mm256_loadu_si256((const __m256i *) (max + t));
        for (uint32_t r = 0; r < n; ++r) {
            m = _mm256_max_epi16(m, _mm256_abs_epi16(_mm256_mulhrs_epi16(_mm256_loadu_si256((const __m256i *) (basis + r*N16 + t)), _mm256_set1_epi16(factors[r]))));
        }
        _mm256_storeu_si256((__m256i *) (max + t), m);
    }
}

// what makes top of the maxima: times a power of two, and a fraction of that more; one: what 1 stands for in the maxima
TARGET static void int_grow(uint32_t N16, const int16_t * max, float top, float one, int16_t * grow, float * units) {
    for (uint32_t t = 0; t < N16; t += 16) {
        __m256i power[2];
        __m256i more [2];
        __m256  unit [2];
        for (int h = 0; h < 2; ++h) {
            const __m256 m = _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(_mm_max_epi16(_mm_loadu_si128((const __m128i *) (max + t + 8*h)), _mm_set1_epi16(1))));
            const __m256 f = _mm256_div_ps(_mm256_set1_ps(top), m);
            const __m256 p = _mm256_and_ps(f, _mm256_castsi256_ps(_mm256_set1_epi32(0x7f800000)));

            power[h] = _mm256_cvtps_epi32(p);
            more [h] = _mm256_cvttps_epi32(_mm256_fmsub_ps(_mm256_set1_ps(32768.0f), _mm256_div_ps(f, p), _mm256_set1_ps(32768.0f)));
            unit [h] = _mm256_div_ps(_mm256_set1_ps(256.0f*one), f);
        }
        _mm256_storeu_ps(units + t,     _mm256_permute2f128_ps(unit[0], unit[1], 0x20));
        _mm256_storeu_ps(units + t + 8, _mm256_permute2f128_ps(unit[0], unit[1], 0x31));
        _mm256_storeu_si256((__m256i *) (grow + 2*t),      _mm256_permute4x64_epi64(_mm256_packs_epi32(power[0], power[1]), 0xd8));
        _mm256_storeu_si256((__m256i *) (grow + 2*t + 16), _mm256_permute4x64_epi64(_mm256_packs_epi32(more[0], more[1]), 0xd8));
    }
}

INLINE __m256i to_weights(__m256i x, const int16_t * grow) {
    const __m256i y = _mm256_mullo_epi16(x, _mm256_loadu_si256((const __m256i *) grow));
    const __m256i z = _mm256_add_epi16(y, _mm256_mulhrs_epi16(y, _mm256_loadu_si256((const __m256i *) (grow + 16))));

    return _mm256_srai_epi16(_mm256_add_epi16(z, _mm256_set1_epi16(128)), 8);
}

// 16*J tokens of the basis of a block of columns: each pair of weights twice, and what the codes of 0 add up to
template<int J>
INLINE void int_weights_tile(uint32_t n_pairs, uint32_t N16, const int16_t * basis, const int16_t * factors, const int16_t * grow, int zero, uint32_t * w, int16_t * offs) {
    const __m256i low = _mm256_set1_epi16(255);

    __m256i sum[J];
#pragma GCC unroll 2
    for (int j = 0; j < J; ++j) {
        sum[j] = _mm256_setzero_si256();
    }

    for (uint32_t r = 0; r < 2*n_pairs; r += 2, basis += 2*N16, w += N16) {
        const __m256i f0 = _mm256_set1_epi16(factors[r]);
        const __m256i f1 = _mm256_set1_epi16(factors[r + 1]);

#pragma GCC unroll 2
        for (int j = 0; j < J; ++j) {
            const __m256i x = to_weights(_mm256_mulhrs_epi16(_mm256_loadu_si256((const __m256i *) (basis + 16*j)),       f0), grow + 32*j);
            const __m256i y = to_weights(_mm256_mulhrs_epi16(_mm256_loadu_si256((const __m256i *) (basis + 16*j + N16)), f1), grow + 32*j);

            sum[j] = _mm256_add_epi16(sum[j], _mm256_add_epi16(x, y));

            const __m256i xy = _mm256_or_si256(_mm256_and_si256(x, low), _mm256_slli_epi16(y, 8));

            _mm256_storeu_si256((__m256i *) (w + 16*j),     _mm256_unpacklo_epi16(xy, xy));
            _mm256_storeu_si256((__m256i *) (w + 16*j + 8), _mm256_unpackhi_epi16(xy, xy));
        }
    }

#pragma GCC unroll 2
    for (int j = 0; j < J; ++j) {
        __m256i * o = (__m256i *) (offs + 16*j);

        _mm256_storeu_si256(o, _mm256_add_epi16(_mm256_loadu_si256(o), _mm256_mullo_epi16(_mm256_set1_epi16(zero), _mm256_permute4x64_epi64(sum[j], 0xd8))));
    }
}

TARGET static void int_weights(uint32_t n_pairs, uint32_t N16, const int16_t * basis, const int16_t * factors, const int16_t * grow, int zero, uint32_t * w, int16_t * offs) {
    uint32_t j = 0;
    for (; j + 32 <= N16; j += 32) {
        int_weights_tile<2>(n_pairs, N16, basis + j, factors, grow + 2*j, zero, w + j, offs + j);
    }
    if (j < N16) {
        int_weights_tile<1>(n_pairs, N16, basis + j, factors, grow + 2*j, zero, w + j, offs + j);
    }
}

INLINE void add_scaled(float * y, __m256 scale, __m256i x) {
    _mm256_storeu_ps(y, _mm256_fmadd_ps(scale, _mm256_cvtepi32_ps(x), _mm256_loadu_ps(y)));
}

INLINE void add16(__m256i & acc, __m256i x) {
    __asm__("vpaddw %1, %0, %0" : "+x"(acc) : "x"(x));
}

// T tokens of a block of columns
template<int T>
INLINE void int_tile(uint32_t n_pairs, const uint8_t * codes, const uint32_t * w, size_t ld_w, const int16_t * offs, const float * units, float * out, size_t ld_out) {
    __m256i acc[T][2];
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
        acc[t][0] = _mm256_set1_epi16(-offs[t]);
        acc[t][1] = acc[t][0];
    }
    for (uint32_t p = 0; p < n_pairs; ++p) {
        const __m256i c0 = _mm256_loadu_si256((const __m256i *) (codes + 64*p));
        const __m256i c1 = _mm256_loadu_si256((const __m256i *) (codes + 64*p + 32));
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
            const __m256i f = _mm256_set1_epi32(w[p*ld_w + t]);

            add16(acc[t][0], _mm256_maddubs_epi16(c0, f));
            add16(acc[t][1], _mm256_maddubs_epi16(c1, f));
        }
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
#pragma GCC unroll 8
        for (int c = 0; c < 2; ++c) {
            float * y = out + t*ld_out + 16*c;

            add_scaled(y,     _mm256_broadcast_ss(units + t), _mm256_cvtepi16_epi32(_mm256_castsi256_si128(acc[t][c])));
            add_scaled(y + 8, _mm256_broadcast_ss(units + t), _mm256_cvtepi16_epi32(_mm256_extracti128_si256(acc[t][c], 1)));
        }
    }
}

// units and offsets are in the order of the tokens
ALONE void int_cols(uint32_t n_out, uint32_t n_pairs, const uint8_t * codes, const uint32_t * w, uint32_t N16, const int16_t * offs, const float * units,
        float * out, size_t ld_out) {
    uint32_t t = 0;
    for (; t + 6 <= n_out; t += 6) {
        int_tile<6>(n_pairs, codes, w + t, N16, offs + t, units + t, out + t*ld_out, ld_out);
    }
    for (; t + 4 <= n_out; t += 4) {
        int_tile<4>(n_pairs, codes, w + t, N16, offs + t, units + t, out + t*ld_out, ld_out);
    }
    for (; t < n_out; ++t) {
        int_tile<1>(n_pairs, codes, w + t, N16, offs + t, units + t, out + t*ld_out, ld_out);
    }
}

// rows whose sums fit into 16 bits
TARGET static void mul_codes(uint32_t n_out, uint32_t d, const int16_t * basis_4, const float * max_4, const int16_t * basis_2, const float * max_2, const llama_capsule_int_rows & rows,
        float * out, size_t ld_out) {
    static thread_local int_buffers buf;

    const uint32_t N16     = GGML_PAD(n_out, 16);
    const uint32_t pairs_4 = (rows.n_q4 + 1)/2;
    const uint32_t pairs_2 = (rows.n_q2 + 1)/2;
    const uint32_t n_pairs = pairs_4 + pairs_2;
    const uint32_t pad_4   = GGML_PAD(rows.n_q4, 8);
    const uint32_t pad_2   = GGML_PAD(rows.n_q2, 8);

    uint8_t  * codes    = buf.codes.resize(d/QK*n_pairs*2*QK);
    uint8_t  * row      = buf.row.resize(2*d);
    float    * scales_4 = buf.scales.resize(d/QK*pad_4 + d/QK2*pad_2);
    float    * scales_2 = scales_4 + d/QK*pad_4;
    int16_t  * factors  = buf.factors.resize(2*pad_4 + pad_2);
    uint32_t * w        = buf.w.resize((n_pairs + pairs_4)*N16);
    int16_t  * offs     = buf.offs.resize(2*N16);

    uint8_t * to_4[LLAMA_CAPSULE_MAX_HEAD_SIZE/QK];
    uint8_t * to_2[LLAMA_CAPSULE_MAX_HEAD_SIZE/QK];
    for (uint32_t b = 0; b < d/QK; ++b) {
        to_4[b] = codes + (b*n_pairs + (b % 2 == 0 ? 0 : pairs_2))*2*QK;
        to_2[b] = codes + (b*n_pairs + (b % 2 == 0 ? pairs_4 : 0))*2*QK;
    }
    int_codes<true> (row, rows.n_q4, pad_4, d, rows.q4, to_4, scales_4);
    int_codes<false>(row, rows.n_q2, pad_2, d, rows.q2, to_2, scales_2);

    const float top = 256.0f*std::min(127u, INT_MAX_SUM/(Q4_TOP*rows.n_q4 + Q2_TOP*rows.n_q2));

    int16_t * max   = buf.max.resize(N16);
    int16_t * grow  = buf.grow.resize(2*N16);
    float   * units = buf.units.resize(N16);

    uint32_t * w_2 = w + pairs_4*N16;
    int16_t  * o_2 = offs + N16;
    int16_t  * f_2 = factors + 2*pad_4;

    for (uint32_t b0 = 0; b0 < d/QK; b0 += 2) {
        const uint32_t b1 = std::min(b0 + 2, d/QK);

        float max_q4 = 0.0f;
        for (uint32_t b = b0; b < b1; ++b) {
            max_q4 = std::max(max_q4, max_product(pad_4, scales_4 + b*pad_4, max_4));
        }
        const float max_q2 = rows.n_q2 > 0 ? max_product(pad_2, scales_2 + b0/2*pad_2, max_2) : 0.0f;

        // in one sum, unless the rows of 4 bits would be rounded more than alone
        const bool together = max_q2 <= max_q4;

        std::fill_n(max, N16, 0);
        if (rows.n_q2 > 0 && max_q2 + max_q4 > 0.0f) {
            int_factors(pad_2, scales_2 + b0/2*pad_2, max_2, (top - 1.0f)/(together ? max_q4 : max_q2), f_2);
            int_max(rows.n_q2, N16, basis_2, f_2, max);
        }
        std::fill_n(o_2, N16, 0);
        if (!together) {
            int_grow(N16, max, top, max_q2/(top - 1.0f), grow, units);
            int_weights(pairs_2, N16, basis_2, f_2, grow, Q2_ZERO, w_2, o_2);
            for (uint32_t b = b0; b < b1; ++b) {
                int_cols(n_out, pairs_2, to_2[b], w_2, N16, o_2, units, out + b*QK, ld_out);
            }
            std::fill_n(max, N16, 0);
            std::fill_n(o_2, N16, 0);
        }
        if (max_q4 == 0.0f) {
            continue;
        }
        for (uint32_t b = b0; b < b1; ++b) {
            int_factors(pad_4, scales_4 + b*pad_4, max_4, (top - 1.0f)/max_q4, factors + (b - b0)*pad_4);
            int_max(rows.n_q4, N16, basis_4, factors + (b - b0)*pad_4, max);
        }
        int_grow(N16, max, top, max_q4/(top - 1.0f), grow, units);
        if (together) {
            int_weights(pairs_2, N16, basis_2, f_2, grow, Q2_ZERO, w_2, o_2);
        }
        for (uint32_t b = b0; b < b1; ++b) {
            uint32_t * w_4 = b == b0 ? w : w_2 + pairs_2*N16;

            std::copy_n(o_2, N16, offs);
            int_weights(pairs_4, N16, basis_4, factors + (b - b0)*pad_4, grow, Q4_ZERO, w_4, offs);

            if (together) {
                int_cols(n_out, n_pairs, codes + b*n_pairs*2*QK, b == b0 ? w : w_2, N16, offs, units, out + b*QK, ld_out);
            } else {
                int_cols(n_out, pairs_4, to_4[b], w_4, N16, offs, units, out + b*QK, ld_out);
            }
        }
    }
}

void llama_capsule_mul_int_avx2(uint32_t n_out, uint32_t d, const int16_t * basis, const float * basis_max, const llama_capsule_int_rows & rows,
        float * out, size_t ld_out) {
    const uint32_t N16 = GGML_PAD(n_out, 16);

    // as many at once as the sums have room for
    for (uint32_t i4 = 0, i2 = 0; i4 < rows.n_q4 || i2 < rows.n_q2;) {
        const uint32_t n4 = std::min(INT_MAX_CODE/Q4_TOP,               rows.n_q4 - i4);
        const uint32_t n2 = std::min((INT_MAX_CODE - Q4_TOP*n4)/Q2_TOP, rows.n_q2 - i2);

        const llama_capsule_int_rows part = { rows.q4 + i4*(d/QK)*Q4_SIZE, rows.q2 + i2*(d/QK2)*Q2_SIZE, n4, n2 };

        const uint32_t first = rows.n_q4 + i2;

        mul_codes(n_out, d, basis + i4*N16, basis_max + i4, basis + first*N16, basis_max + first, part, out, ld_out);
        i4 += n4;
        i2 += n2;
    }
}

#endif // CAPSULE_AVX2
