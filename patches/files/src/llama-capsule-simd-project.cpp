#include "llama-capsule-simd-avx2.h"

#include <algorithm>
#include <cmath>

//
// AVX2: many queries in 8 bits against rows as they are stored, and what a basis makes of the products
//

#ifdef CAPSULE_AVX2

static constexpr uint32_t MAX_D    = 256;
static constexpr uint32_t MAX_ROWS = 256;

// the compiler would gather many products before it adds them up, more than fit into the registers
INLINE void add16(__m256i & acc, __m256i x) {
    __asm__("vpaddw %1, %0, %0" : "+x"(acc) : "x"(x));
}

INLINE void add32(__m256i & acc, __m256i x) {
    __asm__("vpaddd %1, %0, %0" : "+x"(acc) : "x"(x));
}

template<ggml_type TYPE>
struct row_type {
    static constexpr uint32_t n_codes = TYPE == GGML_TYPE_Q2_0 ? QK2 : QK; // that share a scale
    static constexpr size_t   size    = TYPE == GGML_TYPE_Q8_0 ? Q8_SIZE : TYPE == GGML_TYPE_Q4_0 ? Q4_SIZE : Q2_SIZE;
    static constexpr int      zero    = TYPE == GGML_TYPE_Q2_0 ? 1 : 8;
    static constexpr uint32_t n_rows  = TYPE == GGML_TYPE_Q8_0 ? 4 : 8; // in a vector
};

//
// a query: codes [d], codes in the order of q2_0 [d], offsets of q4_0 [d/32], offsets of q2_0 [d/64]
//   offset: minus the sum of the codes times the one that stands for 0 in a row; two of 16 bits, of every other pair of codes
//

static constexpr size_t query_size(uint32_t d) {
    return 2*d + 4*(d/QK + d/QK2);
}

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

template<uint32_t D>
TARGET static float to_query(const llama_capsule_view & view, const float * x, void * dst, float & dot_mean) {
    alignas(32) float y[D];

    dot_mean = turn_view(view, x, y);

    const float   max   = hadamard_max<D>(y);
    const __m256  f     = _mm256_set1_ps(max > 0.0f ? 127.0f/max : 0.0f);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);

    int8_t  * codes   = (int8_t *) dst;
    int32_t * offsets = (int32_t *) (codes + 2*D);

    __m256i c[D/32];
    for (uint32_t i = 0; i < D; i += 32) {
        __m256i v[4];
        for (int j = 0; j < 4; ++j) {
            v[j] = _mm256_cvtps_epi32(_mm256_mul_ps(f, _mm256_load_ps(y + i + 8*j)));
        }
        c[i/32] = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(_mm256_packs_epi32(v[0], v[1]), _mm256_packs_epi32(v[2], v[3])), order);
        _mm256_storeu_si256((__m256i *) (codes + i), c[i/32]);
    }
    code_offsets<1>(D/QK, c, row_type<GGML_TYPE_Q4_0>::zero, offsets);

    for (uint32_t i = 0; i < D; i += QK2) {
        order_q2(c[i/32], c[i/32 + 1]);
        _mm256_storeu_si256((__m256i *) (codes + D + i),      c[i/32]);
        _mm256_storeu_si256((__m256i *) (codes + D + i + 32), c[i/32 + 1]);
    }
    code_offsets<2>(D/QK2, c, row_type<GGML_TYPE_Q2_0>::zero, offsets + D/QK);

    return max/127.0f/sqrtf((float) llama_capsule_hadamard_size(D));
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

// R vectors of rows, a row in each lane of 32 bits: 4 codes at a time. Rows of q8_0 have two lanes: the upper 4 bits of the codes plus 8, and then the lower ones
template<int R>
struct row_group {
    __m256i codes [MAX_D/4][R];
    __m256  scales[MAX_D/QK][R];
};

// 4x4 values of 32 bits in each half
INLINE void transpose(__m256i * x) {
    const __m256i y0 = _mm256_unpacklo_epi32(x[0], x[1]);
    const __m256i y1 = _mm256_unpackhi_epi32(x[0], x[1]);
    const __m256i y2 = _mm256_unpacklo_epi32(x[2], x[3]);
    const __m256i y3 = _mm256_unpackhi_epi32(x[2], x[3]);

    x[0] = _mm256_unpacklo_epi64(y0, y2);
    x[1] = _mm256_unpackhi_epi64(y0, y2);
    x[2] = _mm256_unpacklo_epi64(y1, y3);
    x[3] = _mm256_unpackhi_epi64(y1, y3);
}

// codes of a block from 16 bytes of each row
template<ggml_type TYPE, int R>
INLINE void group_codes(__m256i * x, __m256i (*dst)[R], int r) {
    transpose(x);

    const __m256i low = _mm256_set1_epi8(15);
    for (int i = 0; i < 4; ++i) {
        if (TYPE == GGML_TYPE_Q8_0) {
            // both halves hold the same rows
            const __m256i hi = _mm256_xor_si256(_mm256_and_si256(_mm256_srli_epi16(x[i], 4), low), _mm256_set1_epi8(8));
            dst[i][r] = _mm256_blend_epi32(hi, _mm256_and_si256(x[i], low), 0xf0);
        } else if (TYPE == GGML_TYPE_Q4_0) {
            dst[i][r]     = _mm256_and_si256(x[i], low);
            dst[i + 4][r] = _mm256_and_si256(_mm256_srli_epi16(x[i], 4), low);
        } else {
            for (int p = 0; p < 4; ++p) {
                dst[4*p + i][r] = _mm256_and_si256(_mm256_srli_epi16(x[i], 2*p), _mm256_set1_epi8(3));
            }
        }
    }
}

template<ggml_type TYPE, int R>
INLINE void group_rows(row_group<R> & g, uint32_t d, uint32_t n_rows, const uint8_t * src) {
    using T = row_type<TYPE>;

    const size_t stride = d/T::n_codes*T::size;

    for (int r = 0; r < R; ++r) {
        // lanes without a row repeat the last one
        const uint8_t * rows[8];
        for (uint32_t i = 0; i < 8; ++i) {
            rows[i] = src + std::min(T::n_rows*r + i%T::n_rows, n_rows - 1)*stride;
        }

        for (uint32_t b = 0; b < d/T::n_codes; ++b) {
            uint16_t h[8];
            for (int i = 0; i < 8; ++i) {
                memcpy(h + i, rows[i], sizeof(h[i]));
            }
            g.scales[b][r] = _mm256_cvtph_ps(_mm_setr_epi16(h[0], h[1], h[2], h[3], h[4], h[5], h[6], h[7]));
            if (TYPE == GGML_TYPE_Q8_0) {
                g.scales[b][r] = _mm256_mul_ps(g.scales[b][r], _mm256_setr_ps(16, 16, 16, 16, 1, 1, 1, 1));
            }

            __m256i (*dst)[R] = g.codes + b*T::n_codes/4;
            for (size_t offs = 2; offs < T::size; offs += 16, dst += 4) {
                __m256i x[4];
                for (int i = 0; i < 4; ++i) {
                    x[i] = _mm256_set_m128i(_mm_loadu_si128((const __m128i *) (rows[i + 4] + offs)), _mm_loadu_si128((const __m128i *) (rows[i] + offs)));
                }
                group_codes<TYPE, R>(x, dst, r);
            }
            for (auto & row : rows) {
                row += T::size;
            }
        }
    }
}

// V queries against a group of rows
template<ggml_type TYPE, int R, int V>
INLINE void group_dot(const row_group<R> & g, uint32_t d, const int8_t * queries, size_t stride, float * out, size_t ld_out) {
    using T = row_type<TYPE>;

    const __m256i ones = _mm256_set1_epi16(1);

    const size_t at_codes   = TYPE == GGML_TYPE_Q2_0 ? d : 0;
    const size_t at_offsets = TYPE == GGML_TYPE_Q2_0 ? 2*d + 4*d/QK : 2*d;

    __m256 acc[V][R];
    for (int v = 0; v < V; ++v) {
        for (int r = 0; r < R; ++r) {
            acc[v][r] = _mm256_setzero_ps();
        }
    }

    for (uint32_t b = 0; b < d/T::n_codes; ++b) {
        __m256i sum[V][R];
        for (int v = 0; v < V; ++v) {
            int32_t offset;
            memcpy(&offset, queries + v*stride + at_offsets + 4*b, sizeof(offset));
            for (int r = 0; r < R; ++r) {
                sum[v][r] = TYPE == GGML_TYPE_Q8_0 ? _mm256_set_m128i(_mm_setzero_si128(), _mm_set1_epi32(offset)) : _mm256_set1_epi32(offset);
            }
        }

        const int8_t * codes = queries + at_codes + b*T::n_codes;
        for (uint32_t c = 0; c < T::n_codes/4; ++c) {
            __m256i x[R];
            for (int r = 0; r < R; ++r) {
                x[r] = g.codes[b*T::n_codes/4 + c][r];
            }
            for (int v = 0; v < V; ++v) {
                int32_t four;
                memcpy(&four, codes + v*stride + 4*c, sizeof(four));

                const __m256i q = _mm256_set1_epi32(four);
                for (int r = 0; r < R; ++r) {
                    add16(sum[v][r], _mm256_maddubs_epi16(x[r], q));
                }
            }
        }

        for (int v = 0; v < V; ++v) {
            for (int r = 0; r < R; ++r) {
                acc[v][r] = _mm256_fmadd_ps(g.scales[b][r], _mm256_cvtepi32_ps(_mm256_madd_epi16(sum[v][r], ones)), acc[v][r]);
            }
        }
    }

    for (int v = 0; v < V; ++v) {
        for (int r = 0; r < R; ++r) {
            if (TYPE == GGML_TYPE_Q8_0) {
                _mm_storeu_ps(out + v*ld_out + 4*r, _mm_add_ps(_mm256_castps256_ps128(acc[v][r]), _mm256_extractf128_ps(acc[v][r], 1)));
            } else {
                _mm256_storeu_ps(out + v*ld_out + 8*r, acc[v][r]);
            }
        }
    }
}

template<ggml_type TYPE, int R>
TARGET static void group_dots(uint32_t d, uint32_t n_rows, const uint8_t * src, uint32_t n_v, const int8_t * queries, float * out, size_t ld_out) {
    row_group<R> g;
    group_rows<TYPE, R>(g, d, n_rows, src);

    const size_t stride = query_size(d);

    uint32_t v = 0;
    for (; v + 4 <= n_v; v += 4) {
        group_dot<TYPE, R, 4>(g, d, queries + v*stride, stride, out + v*ld_out, ld_out);
    }
    for (; v + 2 <= n_v; v += 2) {
        group_dot<TYPE, R, 2>(g, d, queries + v*stride, stride, out + v*ld_out, ld_out);
    }
    if (v < n_v) {
        group_dot<TYPE, R, 1>(g, d, queries + v*stride, stride, out + v*ld_out, ld_out);
    }
}

template<ggml_type TYPE>
static void dot_rows(uint32_t d, uint32_t n_rows, const uint8_t * src, uint32_t n_v, const int8_t * queries, float * out, size_t ld_out) {
    const size_t stride = d/row_type<TYPE>::n_codes*row_type<TYPE>::size;

    static constexpr uint32_t size = row_type<TYPE>::n_rows;

    for (uint32_t r = 0; r < n_rows; ) {
        const uint32_t n = n_rows - r;
        if (n > size) {
            group_dots<TYPE, 2>(d, std::min(n, 2*size), src + r*stride, n_v, queries, out + r, ld_out);
            r += 2*size;
        } else {
            group_dots<TYPE, 1>(d, n, src + r*stride, n_v, queries, out + r, ld_out);
            r += size;
        }
    }
}

void llama_capsule_dot_rows_avx2(ggml_type type, uint32_t d, uint32_t n_rows, const uint8_t * src, uint32_t n_v, const void * queries, float * out, size_t ld_out) {
    const auto * q = (const int8_t *) queries;
    switch (type) {
        case GGML_TYPE_Q8_0: dot_rows<GGML_TYPE_Q8_0>(d, n_rows, src, n_v, q, out, ld_out); break;
        case GGML_TYPE_Q4_0: dot_rows<GGML_TYPE_Q4_0>(d, n_rows, src, n_v, q, out, ld_out); break;
        case GGML_TYPE_Q2_0: dot_rows<GGML_TYPE_Q2_0>(d, n_rows, src, n_v, q, out, ld_out); break;
        default: GGML_ABORT("fatal error");
    }
}

// n values in 16 bits, of length 2^15, zeros behind them up to a multiple of 16; returns what 1 stands for
TARGET static float to_int(uint32_t n, const float * x, int16_t * dst) {
    static const int32_t ONES[16] = { -1, -1, -1, -1, -1, -1, -1, -1 };

    const uint32_t n_pad = GGML_PAD(n, 8);
    const __m256   last  = _mm256_castsi256_ps(_mm256_loadu_si256((const __m256i *) (ONES + n_pad - n)));

    alignas(32) float y[MAX_ROWS];

    __m256 sum = _mm256_setzero_ps();
    for (uint32_t i = 0; i < n_pad; i += 8) {
        __m256 v = _mm256_loadu_ps(x + i);
        if (i + 8 == n_pad) {
            v = _mm256_and_ps(v, last);
        }
        _mm256_store_ps(y + i, v);
        sum = _mm256_fmadd_ps(v, v, sum);
    }
    if (n_pad % 16 != 0) {
        _mm256_store_ps(y + n_pad, _mm256_setzero_ps());
    }

    const float  length = sqrtf(sum1(sum));
    const __m256 f      = _mm256_set1_ps(length > 0.0f ? 32767.0f/length : 0.0f);
    for (uint32_t i = 0; i < n_pad; i += 16) {
        const __m256i a = _mm256_cvtps_epi32(_mm256_mul_ps(f, _mm256_load_ps(y + i)));
        const __m256i b = _mm256_cvtps_epi32(_mm256_mul_ps(f, _mm256_load_ps(y + i + 8)));

        _mm256_store_si256((__m256i *) (dst + i), _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8));
    }

    return length/32767.0f;
}

struct project_args {
    uint32_t n_pairs;

    const int16_t * x;      // [n_v][ld_x]
    const float   * scales;
    const float   * means;
    const float   * phi;    // [n_v][n_out]

    size_t ld_x;
    size_t n_out;
};

// 8*T tokens, V views
template<int T, int V>
INLINE void project_tile(const project_args & a, uint32_t v0, const int16_t * basis, uint32_t t0, float * out) {
    __m256i acc[V][T];
    for (int v = 0; v < V; ++v) {
        for (int t = 0; t < T; ++t) {
            acc[v][t] = _mm256_setzero_si256();
        }
    }

    const int16_t * x = a.x + v0*a.ld_x;
    const int16_t * y = basis + 2*t0;
    for (uint32_t p = 0; p < a.n_pairs; ++p, x += 2, y += 2*a.n_out) {
        for (int v = 0; v < V; ++v) {
            int32_t pair;
            memcpy(&pair, x + v*a.ld_x, sizeof(pair));

            const __m256i f = _mm256_set1_epi32(pair);
            for (int t = 0; t < T; ++t) {
                add32(acc[v][t], _mm256_madd_epi16(f, _mm256_loadu_si256((const __m256i *) (y + 16*t))));
            }
        }
    }

    const float * phi = a.phi + v0*a.n_out + t0;
    for (int t = 0; t < T; ++t) {
        __m256 z = _mm256_loadu_ps(out + t0 + 8*t);
        for (int v = 0; v < V; ++v) {
            const __m256 s = _mm256_fmadd_ps(_mm256_set1_ps(a.scales[v0 + v]), _mm256_cvtepi32_ps(acc[v][t]), _mm256_set1_ps(a.means[v0 + v]));
            z = _mm256_fmadd_ps(_mm256_loadu_ps(phi + v*a.n_out + 8*t), s, z);
        }
        _mm256_storeu_ps(out + t0 + 8*t, z);
    }
}

template<int T>
TARGET static void project_cols(const project_args & a, uint32_t n_v, const int16_t * basis, uint32_t t0, float * out) {
    uint32_t v = 0;
    for (; v + 3 <= n_v && n_v - v != 4; v += 3) {
        project_tile<T, 3>(a, v, basis, t0, out);
    }
    for (; v + 2 <= n_v; v += 2) {
        project_tile<T, 2>(a, v, basis, t0, out);
    }
    if (v < n_v) {
        project_tile<T, 1>(a, v, basis, t0, out);
    }
}

void llama_capsule_project_avx2(const llama_capsule_project & p, uint32_t n_v, const float * x, size_t ld_x, const float * scales, const float * means, size_t ld_s,
        const float * phi, float * out) {
    // in parts that fit beside each other
    static constexpr uint32_t MAX_V = 24;

    alignas(32) int16_t ints[MAX_V*MAX_ROWS];

    float f   [MAX_V];
    float mean[MAX_V];

    project_args a;
    a.n_pairs = (p.n_rows + 1)/2;
    a.x       = ints;
    a.scales  = f;
    a.means   = mean;
    a.ld_x    = GGML_PAD(p.n_rows, 16);
    a.n_out   = p.n_out;

    std::fill_n(out, p.n_out, 0.0f);

    for (uint32_t v0 = 0; v0 < n_v; v0 += MAX_V) {
        const uint32_t n = std::min(MAX_V, n_v - v0);
        for (uint32_t v = 0; v < n; ++v) {
            f   [v] = scales[(v0 + v)*ld_s]*p.scale*to_int(p.n_rows, x + (v0 + v)*ld_x, ints + v*a.ld_x);
            mean[v] = means[(v0 + v)*ld_s];
        }
        a.phi = phi + v0*p.n_out;

        uint32_t t = 0;
        for (; t + 32 <= p.n_out; t += 32) {
            project_cols<4>(a, n, p.basis, t, out);
        }
        for (; t + 16 <= p.n_out; t += 16) {
            project_cols<2>(a, n, p.basis, t, out);
        }
        for (; t < p.n_out; t += 8) {
            project_cols<1>(a, n, p.basis, t, out);
        }
    }
}

#endif // CAPSULE_AVX2
