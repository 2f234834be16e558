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
    static constexpr uint32_t n_rows  = TYPE == GGML_TYPE_Q8_0 ? 4 : 8; // in a vector
};

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
