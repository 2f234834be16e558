#include "llama-capsule-simd-avx2.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>


//
// plain C++
//

static void mul_plain(uint32_t n_out, uint32_t n_rows, uint32_t d, const float * w, size_t w_r, size_t w_t, const float * x, size_t ld_x,
        const float * init, float * out, size_t ld_out) {
    for (uint32_t t = 0; t < n_out; ++t) {
        float * y = out + t*ld_out;
        if (init) {
            std::copy(init, init + d, y);
        }
        for (uint32_t r = 0; r < n_rows; ++r) {
            const float   f  = w[r*w_r + t*w_t];
            const float * xr = x + r*ld_x;
            for (uint32_t i = 0; i < d; ++i) {
                y[i] += f*xr[i];
            }
        }
    }
}

static void dot_plain(uint32_t n_x, uint32_t n_y, uint32_t d, const float * x, size_t ld_x, const float * y, size_t ld_y, float * out, size_t ld_out) {
    for (uint32_t q = 0; q < n_y; ++q) {
        for (uint32_t j = 0; j < n_x; ++j) {
            float acc[LLAMA_CAPSULE_VEC] = { 0 };
            for (uint32_t i = 0; i < d; i += LLAMA_CAPSULE_VEC) {
                for (uint32_t k = 0; k < LLAMA_CAPSULE_VEC; ++k) {
                    acc[k] += x[j*ld_x + i + k]*y[q*ld_y + i + k];
                }
            }
            float sum = 0.0f;
            for (float a : acc) {
                sum += a;
            }
            out[q*ld_out + j] = sum;
        }
    }
}

static void fma_plain(uint32_t d, const float * a, const float * b, float * y) {
    for (uint32_t i = 0; i < d; ++i) {
        y[i] += a[i]*b[i];
    }
}

static void scale_plain(uint32_t d, float f, float * y) {
    for (uint32_t i = 0; i < d; ++i) {
        y[i] *= f;
    }
}

static inline void rope_pairs(float * x, const float * cs, uint32_t i0, uint32_t half, bool norm) {
    for (uint32_t i = i0; i < half; ++i) {
        float & a = norm ? x[2*i]     : x[i];
        float & b = norm ? x[2*i + 1] : x[i + half];

        const float c = norm ? cs[2*i]     : cs[i];
        const float s = norm ? cs[2*i + 1] : cs[i + half];

        const float x0 = a;
        const float x1 = b;

        a = x0*c - x1*s;
        b = x0*s + x1*c;
    }
}

static void rope_plain(uint32_t n, float * x, size_t ld_x, const float * cs, size_t ld_cs, uint32_t n_rot, bool norm) {
    for (uint32_t j = 0; j < n; ++j) {
        rope_pairs(x + j*ld_x, cs + j*ld_cs, 0, n_rot/2, norm);
    }
}

static float add_max_plain(float * s, const float * mask, uint32_t n) {
    float res = -INFINITY;
    bool  nan = false;
    for (uint32_t i = 0; i < n; ++i) {
        s[i] += mask[i];
        res = std::max(res, s[i]);
        nan = nan || std::isnan(s[i]);
    }
    return nan ? NAN : res;
}

static float exp_sum_plain(float * s, float max, uint32_t n) {
    float res = 0.0f;
    for (uint32_t i = 0; i < n; ++i) {
        s[i] = expf(s[i] - max);
        res += s[i];
    }
    return res;
}

static void to_float_plain(ggml_type type, const void * src, float * dst, uint32_t d) {
    if (type == GGML_TYPE_F32) {
        memcpy(dst, src, d*sizeof(float));
    } else {
        ggml_get_type_traits(type)->to_float(src, dst, d);
    }
}

static const llama_capsule_simd simd_plain = {
    "plain", mul_plain, dot_plain, fma_plain, scale_plain, rope_plain, add_max_plain, exp_sum_plain, llama_capsule_hadamard, to_float_plain,
    nullptr, 0, nullptr, nullptr, nullptr, nullptr,
    llama_capsule_row_quantize,
};

//
// AVX2
//

#ifdef CAPSULE_AVX2

// a tile of T rows and C vectors in registers
template<int T, int C>
INLINE void mul_tile(uint32_t n_rows, const float * w, size_t w_r, size_t w_t, const float * x, size_t ld_x, const float * init, float * out, size_t ld_out) {
    __m256 acc[T][C];
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) {
            acc[t][c] = _mm256_loadu_ps((init ? init : out + t*ld_out) + 8*c);
        }
    }
    for (uint32_t r = 0; r < n_rows; ++r) {
        __m256 xr[C];
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) {
            xr[c] = _mm256_loadu_ps(x + r*ld_x + 8*c);
        }
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
            const __m256 f = _mm256_broadcast_ss(w + r*w_r + t*w_t);
#pragma GCC unroll 8
            for (int c = 0; c < C; ++c) {
                acc[t][c] = _mm256_fmadd_ps(f, xr[c], acc[t][c]);
            }
        }
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) {
            _mm256_storeu_ps(out + t*ld_out + 8*c, acc[t][c]);
        }
    }
}

template<int C>
TARGET static void mul_cols(uint32_t n_out, uint32_t n_rows, const float * w, size_t w_r, size_t w_t, const float * x, size_t ld_x,
        const float * init, float * out, size_t ld_out) {
    // no tile of one or two is left if it can be helped: the latency of its sums would show
    uint32_t t = 0;
    for (; n_out - t >= 6 && n_out - t != 7 && n_out - t != 8; t += 6) {
        mul_tile<6, C>(n_rows, w + t*w_t, w_r, w_t, x, ld_x, init, out + t*ld_out, ld_out);
    }
    if (n_out - t >= 6) {
        mul_tile<4, C>(n_rows, w + t*w_t, w_r, w_t, x, ld_x, init, out + t*ld_out, ld_out);
        t += 4;
    }
    w   += t*w_t;
    out += t*ld_out;
    switch (n_out - t) {
        case 5: mul_tile<5, C>(n_rows, w, w_r, w_t, x, ld_x, init, out, ld_out); break;
        case 4: mul_tile<4, C>(n_rows, w, w_r, w_t, x, ld_x, init, out, ld_out); break;
        case 3: mul_tile<3, C>(n_rows, w, w_r, w_t, x, ld_x, init, out, ld_out); break;
        case 2: mul_tile<2, C>(n_rows, w, w_r, w_t, x, ld_x, init, out, ld_out); break;
        case 1: mul_tile<1, C>(n_rows, w, w_r, w_t, x, ld_x, init, out, ld_out); break;
        default: break;
    }
}

// few rows: wide tiles hide the latency
template<int T>
TARGET static void mul_few(uint32_t n_rows, uint32_t d, const float * w, size_t w_r, size_t w_t, const float * x, size_t ld_x,
        const float * init, float * out, size_t ld_out) {
    uint32_t i = 0;
    for (; i + 32 <= d; i += 32) {
        mul_tile<T, 4>(n_rows, w, w_r, w_t, x + i, ld_x, init ? init + i : nullptr, out + i, ld_out);
    }
    for (; i < d; i += 8) {
        mul_tile<T, 1>(n_rows, w, w_r, w_t, x + i, ld_x, init ? init + i : nullptr, out + i, ld_out);
    }
}

TARGET static void mul_avx2(uint32_t n_out, uint32_t n_rows, uint32_t d, const float * w, size_t w_r, size_t w_t, const float * x, size_t ld_x,
        const float * init, float * out, size_t ld_out) {
    switch (n_out) {
        case 1: mul_few<1>(n_rows, d, w, w_r, w_t, x, ld_x, init, out, ld_out); return;
        case 2: mul_few<2>(n_rows, d, w, w_r, w_t, x, ld_x, init, out, ld_out); return;
        default: break;
    }
    uint32_t i = 0;
    for (; i + 16 <= d; i += 16) {
        mul_cols<2>(n_out, n_rows, w, w_r, w_t, x + i, ld_x, init ? init + i : nullptr, out + i, ld_out);
    }
    for (; i < d; i += 8) {
        mul_cols<1>(n_out, n_rows, w, w_r, w_t, x + i, ld_x, init ? init + i : nullptr, out + i, ld_out);
    }
}

// 4 rows of x against Q rows of y
template<int Q>
INLINE void dot_tile(uint32_t d, const float * x, size_t ld_x, const float * y, size_t ld_y, float * out, size_t ld_out) {
    __m256 acc[Q][4];
    for (int q = 0; q < Q; ++q) {
        for (int j = 0; j < 4; ++j) {
            acc[q][j] = _mm256_setzero_ps();
        }
    }
    for (uint32_t i = 0; i < d; i += 8) {
        __m256 xi[4];
        for (int j = 0; j < 4; ++j) {
            xi[j] = _mm256_loadu_ps(x + j*ld_x + i);
        }
        for (int q = 0; q < Q; ++q) {
            const __m256 yi = _mm256_loadu_ps(y + q*ld_y + i);
            for (int j = 0; j < 4; ++j) {
                acc[q][j] = _mm256_fmadd_ps(xi[j], yi, acc[q][j]);
            }
        }
    }
    for (int q = 0; q < Q; ++q) {
        _mm_storeu_ps(out + q*ld_out, sum4(acc[q][0], acc[q][1], acc[q][2], acc[q][3]));
    }
}

TARGET static void dot_avx2(uint32_t n_x, uint32_t n_y, uint32_t d, const float * x, size_t ld_x, const float * y, size_t ld_y, float * out, size_t ld_out) {
    const uint32_t n_x4 = n_x/4*4;

    // x stays in the cache, of y there may be much more
    for (uint32_t q = 0; q < n_y; q += 2) {
        for (uint32_t j = 0; j < n_x4; j += 4) {
            if (q + 2 <= n_y) {
                dot_tile<2>(d, x + j*ld_x, ld_x, y + q*ld_y, ld_y, out + q*ld_out + j, ld_out);
            } else {
                dot_tile<1>(d, x + j*ld_x, ld_x, y + q*ld_y, ld_y, out + q*ld_out + j, ld_out);
            }
        }
    }
    for (uint32_t j = n_x4; j < n_x; ++j) {
        for (uint32_t q = 0; q < n_y; ++q) {
            __m256 acc = _mm256_setzero_ps();
            for (uint32_t i = 0; i < d; i += 8) {
                acc = _mm256_fmadd_ps(_mm256_loadu_ps(x + j*ld_x + i), _mm256_loadu_ps(y + q*ld_y + i), acc);
            }
            out[q*ld_out + j] = sum1(acc);
        }
    }
}

TARGET static void fma_avx2(uint32_t d, const float * a, const float * b, float * y) {
    for (uint32_t i = 0; i < d; i += 8) {
        _mm256_storeu_ps(y + i, _mm256_fmadd_ps(_mm256_loadu_ps(a + i), _mm256_loadu_ps(b + i), _mm256_loadu_ps(y + i)));
    }
}

TARGET static void scale_avx2(uint32_t d, float f, float * y) {
    for (uint32_t i = 0; i < d; i += 8) {
        _mm256_storeu_ps(y + i, _mm256_mul_ps(_mm256_set1_ps(f), _mm256_loadu_ps(y + i)));
    }
}

TARGET static void rope_avx2(uint32_t n, float * x, size_t ld_x, const float * cs, size_t ld_cs, uint32_t n_rot, bool norm) {
    const uint32_t half = n_rot/2;

    for (uint32_t j = 0; j < n; ++j, x += ld_x, cs += ld_cs) {
        uint32_t i = 0;
        if (norm) {
            for (; i + 8 <= n_rot; i += 8) {
                const __m256 f = _mm256_loadu_ps(cs + i);
                const __m256 v = _mm256_loadu_ps(x + i);
                const __m256 u = _mm256_mul_ps(_mm256_permute_ps(v, 0xb1), _mm256_movehdup_ps(f));

                _mm256_storeu_ps(x + i, _mm256_fmaddsub_ps(v, _mm256_moveldup_ps(f), u));
            }
            i /= 2;
        } else {
            for (; i + 8 <= half; i += 8) {
                const __m256 c = _mm256_loadu_ps(cs + i);
                const __m256 s = _mm256_loadu_ps(cs + i + half);
                const __m256 a = _mm256_loadu_ps(x + i);
                const __m256 b = _mm256_loadu_ps(x + i + half);

                _mm256_storeu_ps(x + i,        _mm256_fmsub_ps(a, c, _mm256_mul_ps(b, s)));
                _mm256_storeu_ps(x + i + half, _mm256_fmadd_ps(a, s, _mm256_mul_ps(b, c)));
            }
        }
        rope_pairs(x, cs, i, half, norm);
    }
}

TARGET static float add_max_avx2(float * s, const float * mask, uint32_t n) {
    __m256 m   = _mm256_set1_ps(-INFINITY);
    __m256 nan = _mm256_setzero_ps();
    for (uint32_t i = 0; i < n; i += 8) {
        const __m256 v = _mm256_add_ps(_mm256_loadu_ps(s + i), _mm256_loadu_ps(mask + i));

        _mm256_storeu_ps(s + i, v);
        m   = _mm256_max_ps(m, v);
        nan = _mm256_or_ps(nan, _mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    }
    return _mm256_movemask_ps(nan) != 0 ? NAN : max1(m);
}

// x <= 0, relative error below 2e-7; e^x = 2^n (1 + p(r)), with r = x - n ln 2
INLINE __m256 exp8(__m256 x) {
    x = _mm256_max_ps(x, _mm256_set1_ps(-87.0f));

    const __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);

    __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x);
    r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), r);

    // Taylor: |r| <= 0.347, the first term left out is r^8/8! < 6e-9
    __m256 p = _mm256_set1_ps(1.0f/5040.0f);
    for (float c : { 1.0f/720.0f, 1.0f/120.0f, 1.0f/24.0f, 1.0f/6.0f, 0.5f, 1.0f, 1.0f }) {
        p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(c));
    }

    const __m256i e = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);

    return _mm256_mul_ps(p, _mm256_castsi256_ps(e));
}

TARGET static float exp_sum_avx2(float * s, float max, uint32_t n) {
    const __m256 m   = _mm256_set1_ps(max);
    const __m256 low = _mm256_set1_ps(-87.0f);

    __m256 sum = _mm256_setzero_ps();
    for (uint32_t i = 0; i < n; i += 8) {
        const __m256 x = _mm256_sub_ps(_mm256_loadu_ps(s + i), m);
        const __m256 y = _mm256_and_ps(exp8(x), _mm256_cmp_ps(x, low, _CMP_GT_OQ)); // masked columns are exactly 0

        _mm256_storeu_ps(s + i, y);
        sum = _mm256_add_ps(sum, y);
    }
    return sum1(sum);
}

TARGET static void hadamard_avx2(float * x, uint32_t n, size_t n_values) {
    if (n < 64) {
        llama_capsule_hadamard(x, n, n_values);
        return;
    }

    const float scale = 1.0f/sqrtf((float) n);

    for (size_t i = 0; i < n_values; i += n) {
        for (uint32_t j = 0; j < n; j += 64) {
            hadamard_64(x + i + j, n == 64 ? scale : 1.0f);
        }
        for (uint32_t h = 64; h < n; h *= 2) {
            const __m256 f = _mm256_set1_ps(2*h == n ? scale : 1.0f);

            for (uint32_t j = 0; j < n; j += 2*h) {
                for (float * y = x + i + j; y < x + i + j + h; y += 8) {
                    const __m256 a = _mm256_loadu_ps(y);
                    const __m256 b = _mm256_loadu_ps(y + h);

                    _mm256_storeu_ps(y,     _mm256_mul_ps(_mm256_add_ps(a, b), f));
                    _mm256_storeu_ps(y + h, _mm256_mul_ps(_mm256_sub_ps(a, b), f));
                }
            }
        }
    }
}

// dst[i] = scale*(code - offset), 32 values
INLINE void scale_codes(__m256i codes, __m256 scale, int offset, float * dst) {
    const __m256i c = _mm256_sub_epi8(codes, _mm256_set1_epi8(offset));

    const __m128i lo = _mm256_castsi256_si128(c);
    const __m128i hi = _mm256_extracti128_si256(c, 1);

    _mm256_storeu_ps(dst +  0, _mm256_mul_ps(scale, _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(lo))));
    _mm256_storeu_ps(dst +  8, _mm256_mul_ps(scale, _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(lo, 8)))));
    _mm256_storeu_ps(dst + 16, _mm256_mul_ps(scale, _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(hi))));
    _mm256_storeu_ps(dst + 24, _mm256_mul_ps(scale, _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(hi, 8)))));
}

TARGET static void to_float_avx2(ggml_type type, const void * src, float * dst, uint32_t d) {
    const uint8_t * p = (const uint8_t *) src;

    switch (type) {
        case GGML_TYPE_F16:
            {
                uint32_t i = 0;
                for (; i + 8 <= d; i += 8) {
                    _mm256_storeu_ps(dst + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) (p + 2*i))));
                }
                for (; i < d; ++i) {
                    dst[i] = half_at(p + 2*i);
                }
            } break;
        case GGML_TYPE_Q8_0:
            for (uint32_t i = 0; i < d; i += QK, p += Q8_SIZE) {
                scale_codes(_mm256_loadu_si256((const __m256i *) (p + 2)), _mm256_set1_ps(half_at(p)), 0, dst + i);
            }
            break;
        case GGML_TYPE_Q4_0:
            for (uint32_t i = 0; i < d; i += QK, p += Q4_SIZE) {
                scale_codes(codes_q4(p + 2), _mm256_set1_ps(half_at(p)), 8, dst + i);
            }
            break;
        case GGML_TYPE_Q2_0:
            for (uint32_t i = 0; i < d; i += QK2, p += Q2_SIZE) {
                const __m256 scale = _mm256_set1_ps(half_at(p));

                __m256i lo;
                __m256i hi;
                codes_q2(p + 2, lo, hi);

                scale_codes(lo, scale, 1, dst + i);
                scale_codes(hi, scale, 1, dst + i + 32);
            }
            break;
        default:
            to_float_plain(type, src, dst, d);
            break;
    }
}

static const llama_capsule_simd simd_avx2 = {
    "avx2", mul_avx2, dot_avx2, fma_avx2, scale_avx2, rope_avx2, add_max_avx2, exp_sum_avx2, hadamard_avx2, to_float_avx2, llama_capsule_mul_int_avx2,
    8, llama_capsule_to_lanes_avx2, llama_capsule_score_rows_avx2, llama_capsule_to_slots_avx2, llama_capsule_mul_rows_avx2,
    llama_capsule_from_float_avx2, llama_capsule_dot_cells_avx2, llama_capsule_mul_cells_avx2,
    llama_capsule_query_size_avx2, llama_capsule_to_query_avx2, llama_capsule_dot_rows_avx2, llama_capsule_project_avx2,
};

#endif // CAPSULE_AVX2

const std::vector<llama_capsule_simd> & llama_capsule_simd_all() {
    static const std::vector<llama_capsule_simd> res = []() {
        std::vector<llama_capsule_simd> all = { simd_plain };
#ifdef CAPSULE_AVX2
        // every CPU with AVX2 has F16C, a name that clang does not know here
        if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
            all.push_back(simd_avx2);
            llama_capsule_simd_add_avx512(all);
        }
#endif
        llama_capsule_simd_add_neon(all);
        llama_capsule_simd_add_dotprod(all);
        return all;
    }();

    return res;
}

// the fastest table by the family of the CPU, never by timing: one machine always gives one answer
static const char * simd_fastest() {
#ifdef CAPSULE_AVX2
    // Zen 4 runs operations on 512 bits in two halves, see docs/results/decode-zen4.md (Zen 3 is of the same family and has avx2 only)
    if (__builtin_cpu_is("amdfam19h")) {
        return "avx2";
    }
#endif
    return llama_capsule_simd_all().back().name;
}

const llama_capsule_simd & llama_capsule_simd_get() {
    static const llama_capsule_simd & res = []() -> const llama_capsule_simd & {
        const auto & all = llama_capsule_simd_all();
        const char * env = getenv("LLAMA_KVCAPSULE_SIMD");

        if (env && strcmp(env, "0") == 0) {
            return all.front();
        }

        const llama_capsule_simd * res = &all.back();
        for (const char * name : { simd_fastest(), env ? env : "" }) {
            for (const auto & simd : all) {
                res = strcmp(name, simd.name) == 0 ? &simd : res;
            }
        }
        return *res;
    }();

    return res;
}

std::vector<int16_t> llama_capsule_int_basis(const float * basis, uint32_t n_rows, uint32_t N, std::vector<float> & basis_max) {
    const uint32_t N16 = GGML_PAD(N, 16);

    // read by up to four rows, 32 tokens and 16 maxima at a time
    std::vector<int16_t> res((n_rows + 4)*N16, 0);
    basis_max.assign(n_rows + 16, 0.0f);

    for (uint32_t r = 0; r < n_rows; ++r) {
        float max = 0.0f;
        for (uint32_t t = 0; t < N; ++t) {
            max = std::max(max, fabsf(basis[r*N + t]));
        }
        basis_max[r] = max;

        for (uint32_t t = 0; t < N && max > 0.0f; ++t) {
            // the second and the third quarter of 16 change places, see int_weights
            const uint32_t quarter = t/4 % 4;
            const uint32_t pos     = quarter == 1 ? t + 4 : quarter == 2 ? t - 4 : t;

            res[r*N16 + pos] = (int16_t) lrintf(32767.0f*basis[r*N + t]/max);
        }
    }

    return res;
}
