#include "llama-capsule-simd-avx2.h"

#include <algorithm>
#include <cmath>

//
// AVX2: rows that are never decoded. Their codes meet queries or weights of 8 bits
//

#ifdef CAPSULE_AVX2

TARGET float llama_capsule_to_codes_avx2(uint32_t d, const float * x, int8_t * codes, float * sums) {
    const __m256 sign = _mm256_set1_ps(-0.0f);

    __m256 m = _mm256_setzero_ps();
    for (uint32_t i = 0; i < d; i += 8) {
        m = _mm256_max_ps(m, _mm256_andnot_ps(sign, _mm256_loadu_ps(x + i)));
    }
    const float max = max1(m);

    const __m256  f     = _mm256_set1_ps(max > 0.0f ? 127.0f/max : 0.0f);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);

    for (uint32_t i = 0; i < d; i += QK) {
        __m256i v[4];
        for (int j = 0; j < 4; ++j) {
            v[j] = _mm256_cvtps_epi32(_mm256_mul_ps(f, _mm256_loadu_ps(x + i + 8*j)));
        }
        const __m256i y = _mm256_packs_epi16(_mm256_packs_epi32(v[0], v[1]), _mm256_packs_epi32(v[2], v[3]));

        _mm256_storeu_si256((__m256i *) (codes + i), _mm256_permutevar8x32_epi32(y, order));

        sums[i/QK] = sum1(_mm256_cvtepi32_ps(_mm256_add_epi32(_mm256_add_epi32(v[0], v[1]), _mm256_add_epi32(v[2], v[3]))));
    }

    return max/127.0f;
}

// up to 8 f16 scales, zeros behind them
template<int N>
INLINE __m256 load_scales(const uint8_t * src, size_t stride) {
    __m128i h = _mm_setzero_si128();
    uint16_t x[8] = { 0 };
    for (int i = 0; i < N; ++i) {
        memcpy(x + i, src + i*stride, sizeof(x[i]));
    }
    if (N > 0) { h = _mm_insert_epi16(h, x[0], 0); }
    if (N > 1) { h = _mm_insert_epi16(h, x[1], 1); }
    if (N > 2) { h = _mm_insert_epi16(h, x[2], 2); }
    if (N > 3) { h = _mm_insert_epi16(h, x[3], 3); }
    if (N > 4) { h = _mm_insert_epi16(h, x[4], 4); }
    if (N > 5) { h = _mm_insert_epi16(h, x[5], 5); }
    if (N > 6) { h = _mm_insert_epi16(h, x[6], 6); }
    if (N > 7) { h = _mm_insert_epi16(h, x[7], 7); }

    return _mm256_cvtph_ps(h);
}

// the codes of a row as they are stored, NB = d/QK, and the scale of each QK of them
template<ggml_type TYPE, int NB>
INLINE __m256 row_codes(const uint8_t * src, __m256i * codes) {
    if (TYPE == GGML_TYPE_Q2_0) {
        for (int b = 0; b < NB; b += 2) {
            codes_q2(src + b/2*Q2_SIZE + 2, codes[b], codes[b + 1]);
        }
        const __m256i twice = _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3);

        return _mm256_permutevar8x32_ps(load_scales<NB/2>(src, Q2_SIZE), twice);
    }

    static constexpr size_t size = TYPE == GGML_TYPE_Q8_0 ? Q8_SIZE : Q4_SIZE;
    for (int b = 0; b < NB; ++b) {
        codes[b] = TYPE == GGML_TYPE_Q8_0 ? _mm256_loadu_si256((const __m256i *) (src + b*size + 2)) : codes_q4(src + b*size + 2);
    }
    return load_scales<NB>(src, size);
}

template<ggml_type TYPE>
INLINE __m256i row_products(__m256i codes, const int8_t * q) {
    const __m256i x = _mm256_loadu_si256((const __m256i *) q);

    // codes of 8 bits have a sign
    return TYPE == GGML_TYPE_Q8_0 ? _mm256_maddubs_epi16(_mm256_abs_epi8(codes), _mm256_sign_epi8(x, codes)) : _mm256_maddubs_epi16(codes, x);
}

// in 8 floats
template<ggml_type TYPE, int NB>
INLINE __m256 row_dot(const int8_t * q, const __m256i * codes, const __m256 * scales, __m256 acc) {
    const __m256i ones = _mm256_set1_epi16(1);

    __m256 y = _mm256_setzero_ps();
    for (int b = 0; b < NB; ++b) {
        const __m256 scale = scales[b];

        __m256i x = row_products<TYPE>(codes[b], q + QK*b);
        if (TYPE == GGML_TYPE_Q2_0) {
            b++;
            x = _mm256_add_epi16(x, row_products<TYPE>(codes[b], q + QK*b));
        }
        __m256 & sum = b < NB/2 ? acc : y;
        sum = _mm256_fmadd_ps(scale, _mm256_cvtepi32_ps(_mm256_madd_epi16(x, ones)), sum);
    }
    return _mm256_add_ps(acc, y);
}

template<ggml_type TYPE, int NB>
TARGET static void score_rows(const llama_capsule_score & s, uint32_t i_row, uint32_t n_rows, const uint8_t * src, float * acc) {
    static constexpr size_t size = TYPE == GGML_TYPE_Q8_0 ? NB*Q8_SIZE : TYPE == GGML_TYPE_Q4_0 ? NB*Q4_SIZE : NB/2*Q2_SIZE;
    static constexpr size_t d    = NB*QK;

    const size_t n_tokens   = s.n_tokens;
    const size_t n_variants = s.n_variants;

    for (uint32_t r = i_row; r < i_row + n_rows; ++r, src += size) {
        __m256i codes [NB];
        __m256  scales[NB];

        const __m256 all = row_codes<TYPE, NB>(src, codes);
        for (int b = 0; b < NB; ++b) {
            scales[b] = _mm256_permutevar8x32_ps(all, _mm256_set1_epi32(b));
        }

        const uint32_t v0 = s.first[r];
        const uint32_t n  = s.first[r + 1] - v0;

        const uint32_t * token = s.token + v0;
        for (uint32_t i = 0; i < s.n_q; ++i) {
            const int8_t * q      = s.codes   + (i*n_variants + v0)*d;
            const float  * scale  = s.scales  +  i*n_variants + v0;
            const float  * offset = s.offsets + (i*n_variants + v0)*8;

            float * y0 = acc + i*n_tokens*8;
            for (uint32_t v = 0; v < n; ++v, q += d, offset += 8) {
                float * y = y0 + token[v]*8;

                const __m256 x = row_dot<TYPE, NB>(q, codes, scales, _mm256_mul_ps(all, _mm256_load_ps(offset)));
                _mm256_store_ps(y, _mm256_fmadd_ps(_mm256_broadcast_ss(scale + v), x, _mm256_load_ps(y)));
            }
        }
    }
}

template<ggml_type TYPE>
static void score_rows_any(const llama_capsule_score & s, uint32_t i_row, uint32_t n_rows, const uint8_t * src, float * acc) {
    switch (s.d) {
        case  64: score_rows<TYPE, 2>(s, i_row, n_rows, src, acc); break;
        case 128: score_rows<TYPE, 4>(s, i_row, n_rows, src, acc); break;
        case 256: score_rows<TYPE, 8>(s, i_row, n_rows, src, acc); break;
        default: GGML_ABORT("fatal error");
    }
}

void llama_capsule_score_rows_avx2(const llama_capsule_score & s, ggml_type type, uint32_t i_row, uint32_t n_rows, const uint8_t * src, float * acc) {
    switch (type) {
        case GGML_TYPE_Q8_0: score_rows_any<GGML_TYPE_Q8_0>(s, i_row, n_rows, src, acc); break;
        case GGML_TYPE_Q4_0: score_rows_any<GGML_TYPE_Q4_0>(s, i_row, n_rows, src, acc); break;
        case GGML_TYPE_Q2_0: score_rows_any<GGML_TYPE_Q2_0>(s, i_row, n_rows, src, acc); break;
        default: GGML_ABORT("fatal error");
    }
}

TARGET void llama_capsule_sum_avx2(uint32_t n, const float * x, float * out) {
    uint32_t i = 0;
    for (; i + 4 <= n; i += 4, x += 32) {
        _mm_storeu_ps(out + i, sum4(_mm256_loadu_ps(x), _mm256_loadu_ps(x + 8), _mm256_loadu_ps(x + 16), _mm256_loadu_ps(x + 24)));
    }
    for (; i < n; ++i, x += 8) {
        out[i] = sum1(_mm256_loadu_ps(x));
    }
}

//
// weighted sums of rows of q2_0: four rows at a time, two of them in each half of a vector; weights and scales together in 16 bits, as two numbers of 8 bits
//

static constexpr uint32_t MUL_MAX_ROWS = 128; // sums of 2*128*3 for every fourth row stay below 2^15
static constexpr int      MUL_N_VEC    = 8;   // accumulators of a block of columns
static constexpr float    MUL_TOP      = 127*256;

// codes of a block of columns of four rows, rows 0 and 1 (2 and 3) side by side: [MUL_N_VEC][32 bytes], vector 2*p + h holds columns 4*i + p, i from 8*h on
INLINE void mul_quad(const uint8_t * r0, const uint8_t * r1, const uint8_t * r2, const uint8_t * r3, __m256i * dst) {
    const __m256i x = _mm256_set_m128i(_mm_loadu_si128((const __m128i *) r2), _mm_loadu_si128((const __m128i *) r0));
    const __m256i y = _mm256_set_m128i(_mm_loadu_si128((const __m128i *) r3), _mm_loadu_si128((const __m128i *) r1));
    const __m256i m = _mm256_set1_epi8(3);

    for (int p = 0; p < 4; ++p) {
        const __m256i xp = _mm256_and_si256(_mm256_srli_epi16(x, 2*p), m);
        const __m256i yp = _mm256_and_si256(_mm256_srli_epi16(y, 2*p), m);

        dst[2*p]     = _mm256_unpacklo_epi8(xp, yp);
        dst[2*p + 1] = _mm256_unpackhi_epi8(xp, yp);
    }
}

// n weights, a multiple of 16, as 256*hi + lo; returns what 1 stands for
INLINE float mul_weights(uint32_t n, const float * w, int8_t * hi, int8_t * lo, int32_t & sum) {
    const __m256 sign = _mm256_set1_ps(-0.0f);

    __m256 m = _mm256_setzero_ps();
    for (uint32_t i = 0; i < n; i += 8) {
        m = _mm256_max_ps(m, _mm256_andnot_ps(sign, _mm256_load_ps(w + i)));
    }
    const float   max   = max1(m);
    const __m256  scale = _mm256_set1_ps(max > 0.0f ? MUL_TOP/max : 0.0f);
    const __m256i half  = _mm256_set1_epi16(128);

    __m256i total = _mm256_setzero_si256();
    for (uint32_t i = 0; i < n; i += 16) {
        const __m256i a = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_load_ps(w + i),     scale));
        const __m256i b = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_load_ps(w + i + 8), scale));

        total = _mm256_add_epi32(total, _mm256_add_epi32(a, b));

        const __m256i x = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8);
        const __m256i h = _mm256_srai_epi16(_mm256_adds_epi16(x, half), 8);
        const __m256i c = _mm256_permute4x64_epi64(_mm256_packs_epi16(h, _mm256_sub_epi16(x, _mm256_slli_epi16(h, 8))), 0xd8);

        _mm_store_si128((__m128i *) (hi + i), _mm256_castsi256_si128(c));
        _mm_store_si128((__m128i *) (lo + i), _mm256_extracti128_si256(c, 1));
    }
    const __m128i t = _mm_add_epi32(_mm256_castsi256_si128(total), _mm256_extracti128_si256(total, 1));
    const __m128i u = _mm_add_epi32(t, _mm_shuffle_epi32(t, 0x4e));

    sum = _mm_cvtsi128_si32(_mm_add_epi32(u, _mm_shuffle_epi32(u, 0xb1)));

    return max/MUL_TOP;
}

// both halves together
INLINE __m256i mul_halves(__m256i x) {
    return _mm256_add_epi32(_mm256_cvtepi16_epi32(_mm256_castsi256_si128(x)), _mm256_cvtepi16_epi32(_mm256_extracti128_si256(x, 1)));
}

// the sums of a block in the order of its columns
INLINE void mul_order(const __m256i * acc, __m256i * dst) {
    for (int h = 0; h < 2; ++h, dst += 4) {
        const __m256i a0 = _mm256_unpacklo_epi16(acc[h],     acc[2 + h]);
        const __m256i a1 = _mm256_unpackhi_epi16(acc[h],     acc[2 + h]);
        const __m256i b0 = _mm256_unpacklo_epi16(acc[4 + h], acc[6 + h]);
        const __m256i b1 = _mm256_unpackhi_epi16(acc[4 + h], acc[6 + h]);

        dst[0] = mul_halves(_mm256_unpacklo_epi32(a0, b0));
        dst[1] = mul_halves(_mm256_unpackhi_epi32(a0, b0));
        dst[2] = mul_halves(_mm256_unpacklo_epi32(a1, b1));
        dst[3] = mul_halves(_mm256_unpackhi_epi32(a1, b1));
    }
}

INLINE void mul_acc(const __m256i * codes, const int8_t * w, __m256i * acc) {
    const __m256i pairs = _mm256_setr_epi8(0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 2, 3, 2, 3, 2, 3, 2, 3, 2, 3, 2, 3, 2, 3, 2, 3);

    int32_t quad;
    memcpy(&quad, w, sizeof(quad));

    const __m256i f = _mm256_shuffle_epi8(_mm256_set1_epi32(quad), pairs);
    for (int j = 0; j < MUL_N_VEC; ++j) {
        acc[j] = _mm256_add_epi16(acc[j], _mm256_maddubs_epi16(codes[j], f));
    }
}

// a block of columns of four rows or fewer
INLINE void mul_block(const uint8_t * src, size_t stride, uint32_t n_rows, __m256i * dst) {
    static const uint8_t none[QK] = { 0 };

    src += 2;
    if (n_rows >= 4) {
        mul_quad(src, src + stride, src + 2*stride, src + 3*stride, dst);
    } else {
        mul_quad(src, n_rows > 1 ? src + stride : none, n_rows > 2 ? src + 2*stride : none, none, dst);
    }
}

TARGET static void mul_rows(uint32_t n_out, uint32_t n_rows, uint32_t d, const float * w, size_t ld_w, const uint8_t * src, float * out, size_t ld_out) {
    const size_t stride = d/QK2*Q2_SIZE;

    __m256i codes[MUL_N_VEC*MUL_MAX_ROWS/4];
    alignas(32) float  scales[MUL_MAX_ROWS];
    alignas(32) float  f     [MUL_MAX_ROWS];
    alignas(32) int8_t hi    [MUL_MAX_ROWS];
    alignas(32) int8_t lo    [MUL_MAX_ROWS];

    const uint32_t n_pad = GGML_PAD(n_rows, 16);

    std::fill_n(scales, n_pad, 0.0f);
    std::fill_n(f,      n_pad, 0.0f);

    for (uint32_t b = 0; b < d/QK2; ++b, src += Q2_SIZE) {
        uint32_t r = 0;
        for (; r + 8 <= n_rows; r += 8) {
            _mm256_store_ps(scales + r, load_scales<8>(src + r*stride, stride));
        }
        for (; r < n_rows; ++r) {
            scales[r] = half_at(src + r*stride);
        }

        for (r = 0; r < n_rows; r += 4) {
            mul_block(src + r*stride, stride, n_rows - r, codes + MUL_N_VEC*r/4);
        }

        for (uint32_t i = 0; i < n_out; ++i) {
            std::copy(w + i*ld_w, w + i*ld_w + n_rows, f);
            for (r = 0; r < n_pad; r += 8) {
                _mm256_store_ps(f + r, _mm256_mul_ps(_mm256_load_ps(f + r), _mm256_load_ps(scales + r)));
            }

            int32_t sum;
            const __m256  scale  = _mm256_set1_ps(mul_weights(n_pad, f, hi, lo, sum));
            const __m256i offset = _mm256_set1_epi32(sum);

            __m256i parts[2][MUL_N_VEC];
            for (int k = 0; k < 2; ++k) {
                __m256i acc[MUL_N_VEC];
                for (auto & x : acc) {
                    x = _mm256_setzero_si256();
                }
                for (r = 0; r < n_rows; r += 4) {
                    mul_acc(codes + MUL_N_VEC*r/4, (k == 0 ? hi : lo) + r, acc);
                }
                mul_order(acc, parts[k]);
            }

            float * y = out + i*ld_out + b*QK2;
            for (int j = 0; j < MUL_N_VEC; ++j, y += 8) {
                const __m256i x = _mm256_sub_epi32(_mm256_add_epi32(_mm256_slli_epi32(parts[0][j], 8), parts[1][j]), offset);

                _mm256_storeu_ps(y, _mm256_fmadd_ps(scale, _mm256_cvtepi32_ps(x), _mm256_loadu_ps(y)));
            }
        }
    }
}

void llama_capsule_mul_q2_avx2(uint32_t n_out, uint32_t n_rows, uint32_t d, const float * w, size_t ld_w, const uint8_t * src, float * out, size_t ld_out) {
    for (uint32_t r = 0; r < n_rows; r += MUL_MAX_ROWS) {
        mul_rows(n_out, std::min(n_rows - r, +MUL_MAX_ROWS), d, w + r, ld_w, src + r*(d/QK2)*Q2_SIZE, out, ld_out);
    }
}

#endif // CAPSULE_AVX2
