#include "llama-capsule-simd-avx2.h"

#include <algorithm>
#include <cmath>

//
// AVX2: views of queries in 8 bits
//

#ifdef CAPSULE_AVX2

// the order in which the codes of q2_0 come out: every fourth one of 64
INLINE void order_q2(__m256i & x, __m256i & y) {
    const __m256i fourth = _mm256_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15, 0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m256i order  = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);

    const __m256i a = _mm256_shuffle_epi8(x, fourth);
    const __m256i b = _mm256_shuffle_epi8(y, fourth);

    x = _mm256_permutevar8x32_epi32(_mm256_unpacklo_epi32(a, b), order);
    y = _mm256_permutevar8x32_epi32(_mm256_unpackhi_epi32(a, b), order);
}

// of n blocks of N vectors
template<int N>
INLINE void code_offsets(int n, const __m256i * codes, int zero, int32_t * dst) {
    const __m256i ones = _mm256_set1_epi8(1);

    for (int i = 0; i < n; i += 4) {
        __m256i sum[4];
        for (int j = 0; j < 4; ++j) {
            sum[j] = _mm256_setzero_si256();
            for (int k = 0; k < N && i + j < n; ++k) {
                sum[j] = _mm256_add_epi16(sum[j], _mm256_maddubs_epi16(ones, codes[(i + j)*N + k]));
            }
        }
        const __m256i a = _mm256_add_epi16(_mm256_unpacklo_epi32(sum[0], sum[1]), _mm256_unpackhi_epi32(sum[0], sum[1]));
        const __m256i b = _mm256_add_epi16(_mm256_unpacklo_epi32(sum[2], sum[3]), _mm256_unpackhi_epi32(sum[2], sum[3]));
        const __m256i c = _mm256_add_epi16(_mm256_unpacklo_epi64(a, b),           _mm256_unpackhi_epi64(a, b));
        const __m128i x = _mm_add_epi16(_mm256_castsi256_si128(c), _mm256_extracti128_si256(c, 1));

        alignas(16) int32_t res[4];
        _mm_store_si128((__m128i *) res, _mm_mullo_epi16(x, _mm_set1_epi16(-zero)));
        std::copy_n(res, std::min(4, n - i), dst + i);
    }
}

// y: x turned; returns its product with the mean
INLINE float turn_view(const llama_capsule_view & view, const float * x, float * y) {
    const uint32_t half = view.n_rot/2;

    const float * cs   = view.turn;
    const float * mean = view.mean;

    __m256 dot0 = _mm256_setzero_ps();
    __m256 dot1 = _mm256_setzero_ps();

    uint32_t i = 0;
    if (view.norm) {
        for (; i + 8 <= view.n_rot; i += 8) {
            const __m256 f = _mm256_loadu_ps(cs + i);
            const __m256 v = _mm256_loadu_ps(x + i);
            const __m256 u = _mm256_mul_ps(_mm256_permute_ps(v, 0xb1), _mm256_movehdup_ps(f));
            const __m256 z = _mm256_fmaddsub_ps(v, _mm256_moveldup_ps(f), u);

            dot0 = _mm256_fmadd_ps(_mm256_loadu_ps(mean + i), z, dot0);
            _mm256_storeu_ps(y + i, z);
        }
    } else {
        for (; i + 8 <= half; i += 8) {
            const __m256 c = _mm256_loadu_ps(cs + i);
            const __m256 s = _mm256_loadu_ps(cs + i + half);
            const __m256 a = _mm256_loadu_ps(x + i);
            const __m256 b = _mm256_loadu_ps(x + i + half);

            const __m256 z0 = _mm256_fmsub_ps(a, c, _mm256_mul_ps(b, s));
            const __m256 z1 = _mm256_fmadd_ps(a, s, _mm256_mul_ps(b, c));

            dot0 = _mm256_fmadd_ps(_mm256_loadu_ps(mean + i),        z0, dot0);
            dot1 = _mm256_fmadd_ps(_mm256_loadu_ps(mean + i + half), z1, dot1);
            _mm256_storeu_ps(y + i,        z0);
            _mm256_storeu_ps(y + i + half, z1);
        }
        i *= 2;
    }

    const __m256 still = _mm256_set1_ps(view.still);
    for (; i < view.d; i += 8) {
        const __m256 z = _mm256_mul_ps(still, _mm256_loadu_ps(x + i));

        dot0 = _mm256_fmadd_ps(_mm256_loadu_ps(mean + i), z, dot0);
        _mm256_storeu_ps(y + i, z);
    }

    return sum1(_mm256_add_ps(dot0, dot1));
}

// without its scale; returns the largest value
template<uint32_t D>
INLINE float hadamard_max(float * x) {
    const __m256 sign = _mm256_set1_ps(-0.0f);

    for (uint32_t i = 0; i < D; i += 64) {
        hadamard_64(x + i, 1.0f);
    }
    for (uint32_t j = 0; j < D && D == 256; j += 128) {
        for (float * y = x + j; y < x + j + 64; y += 8) {
            const __m256 a = _mm256_load_ps(y);
            const __m256 b = _mm256_load_ps(y + 64);

            _mm256_store_ps(y,      _mm256_add_ps(a, b));
            _mm256_store_ps(y + 64, _mm256_sub_ps(a, b));
        }
    }

    __m256 m0 = _mm256_setzero_ps();
    __m256 m1 = _mm256_setzero_ps();
    for (float * y = x; y < x + D/2; y += 8) {
        __m256 a = _mm256_load_ps(y);
        __m256 b = _mm256_load_ps(y + D/2);
        if (D == 128 || D == 256) {
            const __m256 sum = _mm256_add_ps(a, b);

            b = _mm256_sub_ps(a, b);
            a = sum;
            _mm256_store_ps(y,       a);
            _mm256_store_ps(y + D/2, b);
        }
        m0 = _mm256_max_ps(m0, _mm256_andnot_ps(sign, a));
        m1 = _mm256_max_ps(m1, _mm256_andnot_ps(sign, b));
    }
    return max1(_mm256_max_ps(m0, m1));
}

// 32 values times f
INLINE __m256i codes_32(__m256 f, const float * x) {
    __m256i v[4];
    for (int j = 0; j < 4; ++j) {
        v[j] = _mm256_cvtps_epi32(_mm256_mul_ps(f, _mm256_load_ps(x + 8*j)));
    }
    return _mm256_permutevar8x32_epi32(_mm256_packs_epi16(_mm256_packs_epi32(v[0], v[1]), _mm256_packs_epi32(v[2], v[3])), _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

template<uint32_t D>
TARGET static float to_query(const llama_capsule_view & view, const float * x, void * dst, float & dot_mean) {
    alignas(32) float y[D];

    dot_mean = turn_view(view, x, y);

    const float  max = hadamard_max<D>(y);
    const __m256 f   = _mm256_set1_ps(max > 0.0f ? 127.0f/max : 0.0f);

    int8_t  * codes   = (int8_t *) dst;
    int32_t * offsets = (int32_t *) (codes + 2*D);

    __m256i c[D/32];
    for (uint32_t i = 0; i < D; i += 32) {
        c[i/32] = codes_32(f, y + i);
        _mm256_storeu_si256((__m256i *) (codes + i), c[i/32]);
    }
    code_offsets<1>(D/QK, c, Q4_ZERO, offsets);

    for (uint32_t i = 0; i < D; i += QK2) {
        order_q2(c[i/32], c[i/32 + 1]);
        _mm256_storeu_si256((__m256i *) (codes + D + i),      c[i/32]);
        _mm256_storeu_si256((__m256i *) (codes + D + i + 32), c[i/32 + 1]);
    }
    code_offsets<2>(D/QK2, c, Q2_ZERO, offsets + D/QK);

    return max/127.0f/sqrtf((float) llama_capsule_hadamard_size(D));
}

// a lane rotated, without the scale of that
template<uint32_t D>
INLINE void rotate_lane(const llama_capsule_lane & lane, float * y) {
    const float * x = lane.x;
    const float * g = lane.gates;

    if (D != 128) {
        for (uint32_t i = 0; i < D; i += 8) {
            const __m256 v = _mm256_loadu_ps(x + i);
            _mm256_store_ps(y + i, g ? _mm256_mul_ps(v, _mm256_loadu_ps(g + i)) : v);
        }
        hadamard_max<D>(y);
        return;
    }

    __m256 v[8];
    for (int half = 0; half < 2; ++half, x += 64) {
        for (int i = 0; i < 8; ++i) {
            v[i] = _mm256_loadu_ps(x + 8*i);
        }
        for (int i = 0; i < 8 && g; ++i) {
            v[i] = _mm256_mul_ps(v[i], _mm256_loadu_ps(g + 64*half + 8*i));
        }
        hadamard_64(v);
        for (int i = 0; i < 8 && half == 0; ++i) {
            _mm256_store_ps(y + 8*i, v[i]);
        }
    }

    for (int i = 0; i < 8; ++i) {
        const __m256 u = _mm256_load_ps(y + 8*i);

        _mm256_store_ps(y + 8*i,      _mm256_add_ps(u, v[i]));
        _mm256_store_ps(y + 8*i + 64, _mm256_sub_ps(u, v[i]));
    }
}

// a step of all lanes at a time: each of them alone waits for its own results
template<uint32_t D, bool Q2>
TARGET static void to_codes(uint32_t n, const llama_capsule_lane * lanes, llama_capsule_codes * codes) {
    static constexpr uint32_t n_codes = Q2 ? QK2 : QK; // that share a scale

    const __m256 sign = _mm256_set1_ps(-0.0f);
    const float  unit = 1.0f/127.0f/sqrtf((float) llama_capsule_hadamard_size(D));

    alignas(32) float y[llama_capsule_codes::MAX][D];

    for (uint32_t l = 0; l < n; ++l) {
        rotate_lane<D>(lanes[l], y[l]);
    }
    for (uint32_t l = 0; l < n; ++l) {
        auto & cur = codes[l];

        __m256i c[D/32];
        for (uint32_t b = 0; b < D; b += n_codes) {
            __m256 m = _mm256_setzero_ps();
            for (uint32_t i = b; i < b + n_codes; i += 8) {
                m = _mm256_max_ps(m, _mm256_andnot_ps(sign, _mm256_load_ps(y[l] + i)));
            }
            const float  max = max1(m);
            const __m256 f   = _mm256_set1_ps(max > 0.0f ? 127.0f/max : 0.0f);

            for (uint32_t i = b; i < b + n_codes; i += 32) {
                c[i/32] = codes_32(f, y[l] + i);
            }
            cur.scales[b/n_codes] = max*unit;
        }
        for (uint32_t i = 0; i < D/32; i += 2) {
            if (Q2) {
                order_q2(c[i], c[i + 1]);
            }
            _mm256_storeu_si256((__m256i *) (cur.codes + 32*i),      c[i]);
            _mm256_storeu_si256((__m256i *) (cur.codes + 32*i + 32), c[i + 1]);
        }
        code_offsets<Q2 ? 2 : 1>(D/(Q2 ? QK2 : QK), c, 1, cur.sums);
    }
}

template<bool Q2>
static void to_codes_of(uint32_t d, uint32_t n, const llama_capsule_lane * lanes, llama_capsule_codes * codes) {
    switch (d) {
        case  64: to_codes< 64, Q2>(n, lanes, codes); break;
        case 128: to_codes<128, Q2>(n, lanes, codes); break;
        case 256: to_codes<256, Q2>(n, lanes, codes); break;
        default: GGML_ABORT("fatal error");
    }
}

void llama_capsule_to_codes_avx2(ggml_type type, uint32_t d, uint32_t n, const llama_capsule_lane * lanes, llama_capsule_codes * codes) {
    (type == GGML_TYPE_Q2_0 ? to_codes_of<true> : to_codes_of<false>)(d, n, lanes, codes);
}

float llama_capsule_to_query_avx2(const llama_capsule_view & view, const float * x, void * dst, float & dot_mean) {
    switch (view.d) {
        case  64: return to_query< 64>(view, x, dst, dot_mean);
        case 128: return to_query<128>(view, x, dst, dot_mean);
        case 192: return to_query<192>(view, x, dst, dot_mean);
        case 256: return to_query<256>(view, x, dst, dot_mean);
        default: GGML_ABORT("fatal error");
    }
}

size_t llama_capsule_query_size_avx2(uint32_t d) {
    return query_size(d);
}

#endif // CAPSULE_AVX2
