#include "llama-capsule-simd-avx2.h"

#include <algorithm>
#include <cmath>

//
// AVX2: weighted sums of rows of 4 and 2 bits: two rows at a time, a column of both in each 16 bits; weights and scales together become 8 bits
//

#ifdef CAPSULE_AVX2

template<int BITS>
struct mul_type {
    static constexpr uint32_t n_codes  = BITS == 4 ? QK : QK2;
    static constexpr size_t   size     = BITS == 4 ? Q4_SIZE : Q2_SIZE;
    static constexpr int      zero     = BITS == 4 ? 8 : 1;
    static constexpr uint32_t max_rows = BITS == 4 ? 32 : 64; // weighted sums of as many values are below 2^15
};

static constexpr uint32_t MUL_MAX_BLOCKS = LLAMA_CAPSULE_MAX_HEAD_SIZE/QK;

// of one output
template<int BITS>
struct mul_weights {
    alignas(32) int8_t w[MUL_MAX_BLOCKS][mul_type<BITS>::max_rows];

    int32_t zero [MUL_MAX_BLOCKS]; // what the codes of 0 add up to
    float   scale[MUL_MAX_BLOCKS]; // what 1 stands for
};

// the sums of four vectors
INLINE __m128i sum_ints(const __m256i * x) {
    const __m256i s = _mm256_hadd_epi32(_mm256_hadd_epi32(x[0], x[1]), _mm256_hadd_epi32(x[2], x[3]));

    return _mm_add_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
}

// up to 8 values of n, zeros behind them
INLINE __m256 load_up_to(const float * x, int n) {
    static const int32_t MASK[16] = { -1, -1, -1, -1, -1, -1, -1, -1 };

    return n >= 8 ? _mm256_loadu_ps(x) : _mm256_maskload_ps(x, _mm256_loadu_si256((const __m256i *) (MASK + 8 - std::max(n, 0))));
}

// w*scales
template<int BITS>
INLINE void to_weights(uint32_t n_blocks, uint32_t n, const float * w, const float (*scales)[mul_type<BITS>::max_rows], mul_weights<BITS> & res) {
    const __m256 sign = _mm256_set1_ps(-0.0f);

    alignas(32) float y[mul_type<BITS>::max_rows];
    for (uint32_t i = 0; i < GGML_PAD(n, 16); i += 8) {
        _mm256_store_ps(y + i, load_up_to(w + i, (int) n - (int) i));
    }

    for (uint32_t b0 = 0; b0 < n_blocks; b0 += 4) {
        __m256i sum[4];
        for (uint32_t b = b0; b < b0 + 4; ++b) {
            sum[b - b0] = _mm256_setzero_si256();
            if (b >= n_blocks) {
                continue;
            }

            __m256 m = _mm256_setzero_ps();
            for (uint32_t i = 0; i < GGML_PAD(n, 16); i += 8) {
                m = _mm256_max_ps(m, _mm256_andnot_ps(sign, _mm256_mul_ps(_mm256_load_ps(y + i), _mm256_load_ps(scales[b] + i))));
            }
            const float  max = max1(m);
            const __m256 f   = _mm256_set1_ps(max > 0.0f ? 127.0f/max : 0.0f);

            res.scale[b] = max/127.0f;
            for (uint32_t i = 0; i < n; i += 16) {
                const __m256i y0 = _mm256_cvtps_epi32(_mm256_mul_ps(f, _mm256_mul_ps(_mm256_load_ps(y + i),     _mm256_load_ps(scales[b] + i))));
                const __m256i y1 = _mm256_cvtps_epi32(_mm256_mul_ps(f, _mm256_mul_ps(_mm256_load_ps(y + i + 8), _mm256_load_ps(scales[b] + i + 8))));
                const __m256i z  = _mm256_permute4x64_epi64(_mm256_packs_epi32(y0, y1), 0xd8);

                sum[b - b0] = _mm256_add_epi32(sum[b - b0], _mm256_add_epi32(y0, y1));
                _mm_store_si128((__m128i *) (res.w[b] + i), _mm_packs_epi16(_mm256_castsi256_si128(z), _mm256_extracti128_si256(z, 1)));
            }
        }
        _mm_storeu_si128((__m128i *) (res.zero + b0), _mm_mullo_epi32(sum_ints(sum), _mm_set1_epi32(mul_type<BITS>::zero)));
    }
}

INLINE void add_cols(float * y, __m256 scale, __m128i x) {
    _mm256_storeu_ps(y, _mm256_fmadd_ps(scale, _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(x)), _mm256_loadu_ps(y)));
}

// rows of 4 bits: columns 16*j + i, rows of 2 bits: columns 4*i + j
template<int BITS>
INLINE void add_block(const __m256i * acc, float scale, float * y) {
    const __m256 f = _mm256_set1_ps(scale);

    if (BITS == 4) {
        for (int j = 0; j < 2; ++j) {
            add_cols(y + 16*j,     f, _mm256_castsi256_si128(acc[j]));
            add_cols(y + 16*j + 8, f, _mm256_extracti128_si256(acc[j], 1));
        }
        return;
    }

    const __m256i a0 = _mm256_unpacklo_epi16(acc[0], acc[1]);
    const __m256i a1 = _mm256_unpackhi_epi16(acc[0], acc[1]);
    const __m256i b0 = _mm256_unpacklo_epi16(acc[2], acc[3]);
    const __m256i b1 = _mm256_unpackhi_epi16(acc[2], acc[3]);

    const __m256i c[4] = { _mm256_unpacklo_epi32(a0, b0), _mm256_unpackhi_epi32(a0, b0), _mm256_unpacklo_epi32(a1, b1), _mm256_unpackhi_epi32(a1, b1) };
    for (int i = 0; i < 4; ++i) {
        add_cols(y + 8*i,      f, _mm256_castsi256_si128(c[i]));
        add_cols(y + 8*i + 32, f, _mm256_extracti128_si256(c[i], 1));
    }
}

INLINE void add16(__m256i & acc, __m256i x) {
    __asm__("vpaddw %1, %0, %0" : "+x"(acc) : "x"(x)); // one after the other: the compiler would gather products that do not fit into the registers
}

INLINE __m256i two_weights(const int8_t * w) {
    int16_t pair;
    memcpy(&pair, w, sizeof(pair));
    return _mm256_set1_epi16(pair);
}

// a block of columns for Q outputs
template<int BITS, int Q>
INLINE void mul_block(uint32_t n_rows, const uint8_t * src, size_t stride, uint32_t b, const mul_weights<BITS> * w, float * out, size_t ld_out) {
    static constexpr int n_acc = 8/BITS;

    const __m256i mask = _mm256_set1_epi8(BITS == 4 ? 15 : 3);

    __m256i acc[Q][n_acc];
#pragma GCC unroll 4
    for (int q = 0; q < Q; ++q) {
#pragma GCC unroll 4
        for (int j = 0; j < n_acc; ++j) {
            acc[q][j] = _mm256_set1_epi16(-w[q].zero[b]);
        }
    }

    for (uint32_t r = 0; r < n_rows; r += 2, src += 2*stride) {
        // the last row may be alone, its neighbour has no weight
        const __m128i x  = _mm_loadu_si128((const __m128i *) src);
        const __m128i y  = _mm_loadu_si128((const __m128i *) (src + (r + 1 < n_rows ? stride : 0)));
        const __m256i xy = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_unpacklo_epi8(x, y)), _mm_unpackhi_epi8(x, y), 1);

        __m256i f[Q];
#pragma GCC unroll 4
        for (int q = 0; q < Q; ++q) {
            f[q] = two_weights(w[q].w[b] + r);
        }
#pragma GCC unroll 4
        for (int j = 0; j < n_acc; ++j) {
            const __m256i c = _mm256_and_si256(_mm256_srli_epi16(xy, BITS*j), mask);
#pragma GCC unroll 4
            for (int q = 0; q < Q; ++q) {
                add16(acc[q][j], _mm256_maddubs_epi16(c, f[q]));
            }
        }
    }

#pragma GCC unroll 4
    for (int q = 0; q < Q; ++q) {
        add_block<BITS>(acc[q], w[q].scale[b], out + q*ld_out);
    }
}

template<int BITS, int Q>
ALONE void mul_blocks(uint32_t n_rows, uint32_t n_blocks, const uint8_t * src, const mul_weights<BITS> * w, float * out, size_t ld_out) {
    using T = mul_type<BITS>;

    for (uint32_t b = 0; b < n_blocks; ++b) {
        mul_block<BITS, Q>(n_rows, src + b*T::size + 2, n_blocks*T::size, b, w, out + b*T::n_codes, ld_out);
    }
}

// D: the usual length, so that the compiler knows it, or 0
template<int BITS, uint32_t D>
TARGET static void mul_rows(uint32_t n_out, uint32_t n_rows, uint32_t d, const float * w, size_t ld_w, const uint8_t * src, const uint8_t * next,
        float * out, size_t ld_out) {
    using T = mul_type<BITS>;

    const uint32_t n_blocks = (D > 0 ? D : d)/T::n_codes;
    const size_t   stride   = n_blocks*T::size;
    const uint32_t n_pad    = GGML_PAD(n_rows, 16);

    alignas(32) float scales[MUL_MAX_BLOCKS][T::max_rows];

    static constexpr uint32_t Q = BITS == 4 ? 4 : 3; // outputs at a time

    mul_weights<BITS> weights[Q];

    for (uint32_t r = 0; r < n_pad; r += 8) {
        const uint8_t * rows[8];
        const uint8_t * p = src + std::min(r, n_rows - 1)*stride;
        for (uint32_t i = 0; i < 8; ++i) {
            rows[i] = p;
            p += r + i + 1 < n_rows ? stride : 0; // the last one again
        }
        if (next && r < n_rows) {
            llama_capsule_fetch(next + r*stride, std::min(8u, n_rows - r)*stride);
        }
        for (uint32_t b = 0; b < n_blocks; ++b) {
            uint16_t h[8];
            for (int i = 0; i < 8; ++i) {
                memcpy(h + i, rows[i] + b*T::size, sizeof(h[i]));
            }
            _mm256_store_ps(scales[b] + r, _mm256_cvtph_ps(_mm_setr_epi16(h[0], h[1], h[2], h[3], h[4], h[5], h[6], h[7])));
        }
    }

    for (uint32_t q = 0, n; q < n_out; q += n) {
        n = n_out - q == Q + 1 ? Q - 1 : std::min(Q, n_out - q);
        for (uint32_t i = 0; i < n; ++i) {
            to_weights<BITS>(n_blocks, n_rows, w + (q + i)*ld_w, scales, weights[i]);
        }
        switch (n) {
            case 1:  mul_blocks<BITS, 1>(n_rows, n_blocks, src, weights, out + q*ld_out, ld_out); break;
            case 2:  mul_blocks<BITS, 2>(n_rows, n_blocks, src, weights, out + q*ld_out, ld_out); break;
            case 3:  mul_blocks<BITS, 3>(n_rows, n_blocks, src, weights, out + q*ld_out, ld_out); break;
            default: mul_blocks<BITS, Q>(n_rows, n_blocks, src, weights, out + q*ld_out, ld_out); break;
        }
    }
}

void llama_capsule_mul_rows_avx2(ggml_type type, uint32_t n_out, uint32_t n_rows, uint32_t d, const float * w, size_t ld_w, const uint8_t * src, const uint8_t * next,
        float * out, size_t ld_out) {
    const bool     q4       = type == GGML_TYPE_Q4_0;
    const uint32_t max_rows = q4 ? mul_type<4>::max_rows : mul_type<2>::max_rows;
    const size_t   size     = q4 ? d/QK*Q4_SIZE : d/QK2*Q2_SIZE;

    const auto mul = d == 128 ? (q4 ? mul_rows<4, 128> : mul_rows<2, 128>) : (q4 ? mul_rows<4, 0> : mul_rows<2, 0>);

    for (uint32_t r = 0; r < n_rows; r += max_rows) {
        mul(n_out, std::min(n_rows - r, max_rows), d, w + r, ld_w, src + r*size, next ? next + r*size : nullptr, out, ld_out);
    }
}

#endif // CAPSULE_AVX2
