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
    for (uint32_t i = 0; i < n; ++i) {
        s[i] += mask[i];
        res = std::max(res, s[i]);
    }
    return res;
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

// the compiler may not gather products before it adds them up: they would not fit into the registers
#define KEEP(x) __asm__("" : "+x"(x))

// a tile of T rows and C vectors in registers
template<int T, int C>
INLINE void mul_tile(uint32_t n_rows, const float * w, size_t w_r, size_t w_t, const float * x, size_t ld_x, const float * init, float * out, size_t ld_out) {
    __m256 acc[T][C];
    for (int t = 0; t < T; ++t) {
        for (int c = 0; c < C; ++c) {
            acc[t][c] = _mm256_loadu_ps((init ? init : out + t*ld_out) + 8*c);
        }
    }
    for (uint32_t r = 0; r < n_rows; ++r) {
        __m256 xr[C];
        for (int c = 0; c < C; ++c) {
            xr[c] = _mm256_loadu_ps(x + r*ld_x + 8*c);
        }
        for (int t = 0; t < T; ++t) {
            const __m256 f = _mm256_broadcast_ss(w + r*w_r + t*w_t);
            for (int c = 0; c < C; ++c) {
                acc[t][c] = _mm256_fmadd_ps(f, xr[c], acc[t][c]);
            }
        }
    }
    for (int t = 0; t < T; ++t) {
        for (int c = 0; c < C; ++c) {
            _mm256_storeu_ps(out + t*ld_out + 8*c, acc[t][c]);
        }
    }
}

template<int C>
TARGET static void mul_cols(uint32_t n_out, uint32_t n_rows, const float * w, size_t w_r, size_t w_t, const float * x, size_t ld_x,
        const float * init, float * out, size_t ld_out) {
    uint32_t t = 0;
    for (; t + 6 <= n_out; t += 6) {
        mul_tile<6, C>(n_rows, w + t*w_t, w_r, w_t, x, ld_x, init, out + t*ld_out, ld_out);
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
    __m256 m = _mm256_set1_ps(-INFINITY);
    for (uint32_t i = 0; i < n; i += 8) {
        const __m256 v = _mm256_add_ps(_mm256_loadu_ps(s + i), _mm256_loadu_ps(mask + i));

        _mm256_storeu_ps(s + i, v);
        m = _mm256_max_ps(m, v);
    }
    return max1(m);
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

//
// products of rows of 4 and 2 bits in integers, two rows at a time: the scales of the rows go into the basis,
//   which becomes 16 bits wide for q4_0, with sums of 32 bits, and 8 bits wide for q2_0, with sums of 16 bits
//

// 2-bit codes less their offset are at most 2: sums stay below 2^15
static constexpr uint32_t Q2_MAX_ROWS = 32767/127/2;

struct int_buffers {
    llama_capsule_buf<uint8_t>  codes;   // [d/32][n_pairs][32 columns][2 rows], bytes or 16 bits
    llama_capsule_buf<uint8_t>  row;     // [2][d]
    llama_capsule_buf<float>    scales;  // [d/32][n_rows, padded]
    llama_capsule_buf<int16_t>  factors; // [n_rows, padded]
    llama_capsule_buf<uint32_t> w;       // [n_pairs][N16]
    llama_capsule_buf<int16_t>  offs;    // [N16]
};

// the factors of the rows in a column block: the largest product with the basis becomes top; returns what 1 stands for, 0 if all are 0
TARGET static float int_factors(uint32_t n_pad, const float * scales, const float * basis_max, float top, int16_t * factors) {
    const __m256 sign = _mm256_set1_ps(-0.0f);

    __m256 m = _mm256_setzero_ps();
    for (uint32_t i = 0; i < n_pad; i += 8) {
        m = _mm256_max_ps(m, _mm256_andnot_ps(sign, _mm256_mul_ps(_mm256_loadu_ps(scales + i), _mm256_loadu_ps(basis_max + i))));
    }
    const float max = max1(m);
    if (max == 0.0f) {
        return 0.0f;
    }

    const __m256 f = _mm256_set1_ps(top/max);
    for (uint32_t i = 0; i < n_pad; i += 8) {
        const __m256i x = _mm256_cvtps_epi32(_mm256_mul_ps(f, _mm256_mul_ps(_mm256_loadu_ps(scales + i), _mm256_loadu_ps(basis_max + i))));

        _mm_storeu_si128((__m128i *) (factors + i), _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1)));
    }

    return max/top;
}

// codes and scales of n rows, the codes of two rows side by side
template<bool Q4>
TARGET static void int_codes(int_buffers & buf, uint32_t n, uint32_t n_pad, uint32_t d, const uint8_t * src) {
    const uint32_t n_blocks = d/QK;
    const uint32_t n_pairs  = (n + 1)/2;
    const size_t   size     = Q4 ? 128 : 64;

    buf.codes.resize(n_blocks*n_pairs*size);
    buf.row.resize(2*d);
    std::fill_n(buf.scales.resize(n_pad*n_blocks), n_pad*n_blocks, 0.0f);

    for (uint32_t p = 0; p < n_pairs; ++p) {
        for (uint32_t k = 0; k < 2; ++k) {
            uint8_t * row   = buf.row.data() + k*d;
            float   * scale = buf.scales.data() + 2*p + k;

            if (2*p + k >= n) {
                memset(row, 0, d);
                continue;
            }
            for (uint32_t b = 0; b < n_blocks; b += Q4 ? 1 : 2) {
                if (Q4) {
                    _mm256_storeu_si256((__m256i *) (row + b*QK), _mm256_sub_epi8(codes_q4(src + 2), _mm256_set1_epi8(8)));
                    scale[b*n_pad] = half_at(src);
                    src += Q4_SIZE;
                } else {
                    __m256i lo;
                    __m256i hi;
                    codes_q2(src + 2, lo, hi);

                    _mm256_storeu_si256((__m256i *) (row + b*QK),      lo);
                    _mm256_storeu_si256((__m256i *) (row + b*QK + QK), hi);
                    scale[b*n_pad] = scale[(b + 1)*n_pad] = half_at(src);
                    src += Q2_SIZE;
                }
            }
        }
        for (uint32_t b = 0; b < n_blocks; ++b) {
            const __m256i x = _mm256_loadu_si256((const __m256i *) (buf.row.data() + b*QK));
            const __m256i y = _mm256_loadu_si256((const __m256i *) (buf.row.data() + b*QK + d));

            const __m256i lo = _mm256_unpacklo_epi8(x, y);
            const __m256i hi = _mm256_unpackhi_epi8(x, y);

            const __m256i c0 = _mm256_permute2x128_si256(lo, hi, 0x20);
            const __m256i c1 = _mm256_permute2x128_si256(lo, hi, 0x31);

            __m256i * dst = (__m256i *) (buf.codes.data() + (b*n_pairs + p)*size);

            if (Q4) {
                _mm256_storeu_si256(dst,     _mm256_cvtepi8_epi16(_mm256_castsi256_si128(c0)));
                _mm256_storeu_si256(dst + 1, _mm256_cvtepi8_epi16(_mm256_extracti128_si256(c0, 1)));
                _mm256_storeu_si256(dst + 2, _mm256_cvtepi8_epi16(_mm256_castsi256_si128(c1)));
                _mm256_storeu_si256(dst + 3, _mm256_cvtepi8_epi16(_mm256_extracti128_si256(c1, 1)));
            } else {
                _mm256_storeu_si256(dst,     c0);
                _mm256_storeu_si256(dst + 1, c1);
            }
        }
    }
}

// 16*J tokens of the basis of a column block: pairs of factors, for 8 bits each pair twice, and what the offsets of the codes add up to
template<bool Q4, int J>
INLINE void int_weights_tile(uint32_t n_pairs, uint32_t N16, const int16_t * basis, const int16_t * factors, uint32_t * w, int16_t * offs) {
    const __m256i half = _mm256_set1_epi16(128);
    const __m256i low  = _mm256_set1_epi16(255);

    __m256i sum[J];
    for (int j = 0; j < J; ++j) {
        sum[j] = _mm256_setzero_si256();
    }

    for (uint32_t r = 0; r < 2*n_pairs; r += 2, basis += 2*N16, w += N16) {
        const __m256i f0 = _mm256_set1_epi16(factors[r]);
        const __m256i f1 = _mm256_set1_epi16(factors[r + 1]);

        for (int j = 0; j < J; ++j) {
            __m256i x = _mm256_mulhrs_epi16(_mm256_loadu_si256((const __m256i *) (basis + 16*j)),       f0);
            __m256i y = _mm256_mulhrs_epi16(_mm256_loadu_si256((const __m256i *) (basis + 16*j + N16)), f1);

            if (!Q4) {
                x = _mm256_srai_epi16(_mm256_add_epi16(x, half), 8);
                y = _mm256_srai_epi16(_mm256_add_epi16(y, half), 8);

                sum[j] = _mm256_add_epi16(sum[j], _mm256_add_epi16(x, y));

                x = _mm256_or_si256(_mm256_and_si256(x, low), _mm256_slli_epi16(y, 8));
                y = x;
            }

            _mm256_storeu_si256((__m256i *) (w + 16*j),     _mm256_unpacklo_epi16(x, y));
            _mm256_storeu_si256((__m256i *) (w + 16*j + 8), _mm256_unpackhi_epi16(x, y));
        }
    }

    for (int j = 0; j < J && !Q4; ++j) {
        _mm256_storeu_si256((__m256i *) (offs + 16*j), _mm256_permute4x64_epi64(sum[j], 0xd8));
    }
}

template<bool Q4>
TARGET static void int_weights(uint32_t n_pairs, uint32_t N16, const int16_t * basis, const int16_t * factors, uint32_t * w, int16_t * offs) {
    uint32_t j = 0;
    for (; j + 32 <= N16; j += 32) {
        int_weights_tile<Q4, 2>(n_pairs, N16, basis + j, factors, w + j, offs + j);
    }
    if (j < N16) {
        int_weights_tile<Q4, 1>(n_pairs, N16, basis + j, factors, w + j, offs + j);
    }
}

INLINE void add_scaled(float * y, __m256 scale, __m256i x) {
    _mm256_storeu_ps(y, _mm256_fmadd_ps(scale, _mm256_cvtepi32_ps(x), _mm256_loadu_ps(y)));
}

// T tokens of a column block
template<int T>
INLINE void q4_tile(uint32_t n_pairs, const uint8_t * codes, const uint32_t * w, size_t ld_w, __m256 scale, float * out, size_t ld_out) {
    for (int half = 0; half < 2; ++half) {
        __m256i acc[T][2];
        for (int t = 0; t < T; ++t) {
            acc[t][0] = _mm256_setzero_si256();
            acc[t][1] = _mm256_setzero_si256();
        }
        for (uint32_t p = 0; p < n_pairs; ++p) {
            const __m256i c0 = _mm256_loadu_si256((const __m256i *) (codes + 128*p + 64*half));
            const __m256i c1 = _mm256_loadu_si256((const __m256i *) (codes + 128*p + 64*half + 32));
            for (int t = 0; t < T; ++t) {
                const __m256i f = _mm256_set1_epi32(w[p*ld_w + t]);

                acc[t][0] = _mm256_add_epi32(acc[t][0], _mm256_madd_epi16(c0, f));
                acc[t][1] = _mm256_add_epi32(acc[t][1], _mm256_madd_epi16(c1, f));
                KEEP(acc[t][0]);
                KEEP(acc[t][1]);
            }
        }
        for (int t = 0; t < T; ++t) {
            add_scaled(out + t*ld_out + 16*half,     scale, acc[t][0]);
            add_scaled(out + t*ld_out + 16*half + 8, scale, acc[t][1]);
        }
    }
}

template<int T>
INLINE void q2_tile(uint32_t n_pairs, const uint8_t * codes, const uint32_t * w, size_t ld_w, const int16_t * offs, __m256 scale, float * out, size_t ld_out) {
    __m256i acc[T][2];
    for (int t = 0; t < T; ++t) {
        acc[t][0] = _mm256_set1_epi16(-offs[t]);
        acc[t][1] = acc[t][0];
    }
    for (uint32_t p = 0; p < n_pairs; ++p) {
        const __m256i c0 = _mm256_loadu_si256((const __m256i *) (codes + 64*p));
        const __m256i c1 = _mm256_loadu_si256((const __m256i *) (codes + 64*p + 32));
        for (int t = 0; t < T; ++t) {
            const __m256i f = _mm256_set1_epi32(w[p*ld_w + t]);

            acc[t][0] = _mm256_add_epi16(acc[t][0], _mm256_maddubs_epi16(c0, f));
            acc[t][1] = _mm256_add_epi16(acc[t][1], _mm256_maddubs_epi16(c1, f));
            KEEP(acc[t][0]);
            KEEP(acc[t][1]);
        }
    }
    for (int t = 0; t < T; ++t) {
        for (int c = 0; c < 2; ++c) {
            float * y = out + t*ld_out + 16*c;

            add_scaled(y,     scale, _mm256_cvtepi16_epi32(_mm256_castsi256_si128(acc[t][c])));
            add_scaled(y + 8, scale, _mm256_cvtepi16_epi32(_mm256_extracti128_si256(acc[t][c], 1)));
        }
    }
}

template<bool Q4, int T>
INLINE void int_tile(uint32_t n_pairs, const uint8_t * codes, const uint32_t * w, size_t ld_w, const int16_t * offs, __m256 scale, float * out, size_t ld_out) {
    if (Q4) {
        q4_tile<T>(n_pairs, codes, w, ld_w, scale, out, ld_out);
    } else {
        q2_tile<T>(n_pairs, codes, w, ld_w, offs, scale, out, ld_out);
    }
}

template<bool Q4>
TARGET static void int_cols(uint32_t n_out, uint32_t n_pairs, const uint8_t * codes, const uint32_t * w, uint32_t N16, const int16_t * offs, float scale,
        float * out, size_t ld_out) {
    const __m256 s = _mm256_set1_ps(scale);

    uint32_t t = 0;
    for (; t + 6 <= n_out; t += 6) {
        int_tile<Q4, 6>(n_pairs, codes, w + t, N16, offs + t, s, out + t*ld_out, ld_out);
    }
    for (; t + 4 <= n_out; t += 4) {
        int_tile<Q4, 4>(n_pairs, codes, w + t, N16, offs + t, s, out + t*ld_out, ld_out);
    }
    for (; t < n_out; ++t) {
        int_tile<Q4, 1>(n_pairs, codes, w + t, N16, offs + t, s, out + t*ld_out, ld_out);
    }
}

template<bool Q4>
TARGET static void mul_codes(uint32_t n_out, uint32_t d, const int16_t * basis, const float * basis_max, const uint8_t * src, uint32_t n, float * out, size_t ld_out) {
    static thread_local int_buffers buf;

    const uint32_t N16     = GGML_PAD(n_out, 16);
    const uint32_t n_pairs = (n + 1)/2;
    const uint32_t n_pad   = GGML_PAD(n, 8);

    int_codes<Q4>(buf, n, n_pad, d, src);

    buf.factors.resize(n_pad);
    buf.w.resize(n_pairs*N16);
    buf.offs.resize(N16);

    for (uint32_t b = 0; b < d/QK; ++b) {
        const float scale = int_factors(n_pad, buf.scales.data() + b*n_pad, basis_max, Q4 ? 32767.0f : 127.0f*256.0f, buf.factors.data());
        if (scale == 0.0f) {
            continue;
        }

        int_weights<Q4>(n_pairs, N16, basis, buf.factors.data(), buf.w.data(), buf.offs.data());
        int_cols<Q4>(n_out, n_pairs, buf.codes.data() + b*n_pairs*(Q4 ? 128 : 64), buf.w.data(), N16, buf.offs.data(), Q4 ? scale : 256.0f*scale,
                out + b*QK, ld_out);
    }
}

TARGET static void mul_int_avx2(uint32_t n_out, uint32_t d, const int16_t * basis, const float * basis_max, const llama_capsule_int_rows & rows,
        float * out, size_t ld_out) {
    const uint32_t N16 = GGML_PAD(n_out, 16);

    if (rows.n_q4 > 0) {
        mul_codes<true>(n_out, d, basis, basis_max, rows.q4, rows.n_q4, out, ld_out);
    }
    for (uint32_t i = 0; i < rows.n_q2; i += Q2_MAX_ROWS) {
        const uint32_t first = rows.n_q4 + i;

        mul_codes<false>(n_out, d, basis + first*N16, basis_max + first, rows.q2 + i*(d/QK2)*Q2_SIZE, std::min(Q2_MAX_ROWS, rows.n_q2 - i), out, ld_out);
    }
}

static const llama_capsule_simd simd_avx2 = {
    "avx2", mul_avx2, dot_avx2, fma_avx2, scale_avx2, rope_avx2, add_max_avx2, exp_sum_avx2, hadamard_avx2, to_float_avx2, mul_int_avx2,
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

const llama_capsule_simd & llama_capsule_simd_get() {
    static const llama_capsule_simd & res = []() -> const llama_capsule_simd & {
        const auto & all = llama_capsule_simd_all();
        const char * env = getenv("LLAMA_KVCAPSULE_SIMD");

        for (const auto & simd : all) {
            if (env && (strcmp(env, simd.name) == 0 || strcmp(env, "0") == 0)) {
                return simd;
            }
        }
        return all.back();
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
