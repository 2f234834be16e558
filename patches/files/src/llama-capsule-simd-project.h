#pragma once

#include "llama-capsule-simd-int.h"

//
// queries in 8 bits against rows as they are stored, a row in each lane, and what a basis makes of the products; as llama-capsule-simd-project.cpp has it for AVX2
//   a query: codes [d], codes in the order of q2_0 [d], what V::code_sum() makes sums of 32 codes of
//

namespace {

template<ggml_type TYPE>
struct row_type {
    static constexpr int    n_codes = TYPE == GGML_TYPE_Q2_0 ? QK2 : QK; // that share a scale
    static constexpr int    n_bits  = TYPE == GGML_TYPE_Q8_0 ? 8 : TYPE == GGML_TYPE_Q4_0 ? 4 : 2;
    static constexpr size_t size    = TYPE == GGML_TYPE_Q8_0 ? Q8_SIZE : TYPE == GGML_TYPE_Q4_0 ? Q4_SIZE : Q2_SIZE;
};

// V::N*R rows: 4 codes at a time
template<class V, int R>
struct row_group {
    typename V::I codes [256/4][R];
    typename V::F scales[256/QK][R];
};

}

// rows: of each lane
template<class V, ggml_type TYPE, int R>
INLINE void group_rows(row_group<V, R> & g, uint32_t d, const uint8_t * const (*rows)[V::N]) {
    using T = row_type<TYPE>;

    for (int r = 0; r < R; ++r) {
        size_t offs = 0;
        for (uint32_t b = 0; b < d/T::n_codes; ++b) {
            g.scales[b][r] = V::halves(rows[r], offs);
            offs += 2;

            auto dst = g.codes + b*T::n_codes/4;
            for (int j = 0; j < T::n_codes*T::n_bits/128; ++j, dst += 4, offs += 16) {
                typename V::I x[4];
                V::load_words(rows[r], offs, x);
                for (int i = 0; i < 4; ++i) {
                    dst[i][r] = T::n_bits == 8 ? V::signed_codes(x[i]) : V::template bits_int<0, (1 << (T::n_bits & 7)) - 1>(x[i]);
                    for (int p = 1; p < 8/T::n_bits; ++p) {
                        dst[4*p + i][r] = T::n_bits == 4 ? V::template bits_int<4, 15>(x[i]) :
                            p == 1 ? V::template bits_int<2, 3>(x[i]) : p == 2 ? V::template bits_int<4, 3>(x[i]) : V::template bits_int<6, 3>(x[i]);
                    }
                }
            }
        }
    }
}

// Q queries against a group of rows
template<class V, ggml_type TYPE, int R, int Q>
INLINE void group_dot(const row_group<V, R> & g, uint32_t d, const int8_t * queries, size_t stride, float * out, size_t ld_out) {
    using T = row_type<TYPE>;

    static constexpr int zero = TYPE == GGML_TYPE_Q8_0 ? V::ZERO_Q8 : TYPE == GGML_TYPE_Q4_0 ? 8 : 1;

    typename V::F acc[Q][R];
    for (auto & a : acc) {
        for (auto & x : a) {
            x = V::set1(0.0f);
        }
    }
    for (uint32_t b = 0; b < d/T::n_codes; ++b) {
        typename V::I sum[Q][R];
        for (int q = 0; q < Q; ++q) {
            int32_t codes = 0;
            for (int i = 0; i < T::n_codes/(int) QK && zero > 0; ++i) {
                codes += V::code_sum(queries + q*stride + 2*d, b*T::n_codes/QK + i);
            }
            for (int r = 0; r < R; ++r) {
                sum[q][r] = V::set1_int(-zero*codes);
            }
        }

        const int8_t * codes = queries + (TYPE == GGML_TYPE_Q2_0 ? d : 0) + b*T::n_codes;
        for (int c = 0; c < T::n_codes/4; ++c) {
            for (int q = 0; q < Q; ++q) {
                int32_t four;
                memcpy(&four, codes + q*stride + 4*c, sizeof(four));

                const auto y = V::set1_int(four);
                for (int r = 0; r < R; ++r) {
                    sum[q][r] = V::dot(sum[q][r], g.codes[b*T::n_codes/4 + c][r], y);
                }
            }
        }
        for (int q = 0; q < Q; ++q) {
            for (int r = 0; r < R; ++r) {
                acc[q][r] = V::fma(g.scales[b][r], V::to_float(sum[q][r]), acc[q][r]);
            }
        }
    }
    for (int q = 0; q < Q; ++q) {
        for (int r = 0; r < R; ++r) {
            V::store(out + q*ld_out + V::N*r, acc[q][r]);
        }
    }
}

template<class V, ggml_type TYPE, int R>
TARGET static void group_dots(uint32_t d, uint32_t n_rows, const uint8_t * src, uint32_t n_q, const int8_t * queries, size_t stride, float * out, size_t ld_out) {
    const size_t size = d/row_type<TYPE>::n_codes*row_type<TYPE>::size;

    // lanes without a row repeat the last one
    const uint8_t * rows[R][V::N];
    for (uint32_t i = 0; i < R*V::N; ++i) {
        rows[i/V::N][i%V::N] = src + std::min(i, n_rows - 1)*size;
    }

    row_group<V, R> g;
    group_rows<V, TYPE, R>(g, d, rows);

    uint32_t q = 0;
    for (; q + 4 <= n_q; q += 4) {
        group_dot<V, TYPE, R, 4>(g, d, queries + q*stride, stride, out + q*ld_out, ld_out);
    }
    for (; q < n_q; ++q) {
        group_dot<V, TYPE, R, 1>(g, d, queries + q*stride, stride, out + q*ld_out, ld_out);
    }
}

template<class V, ggml_type TYPE>
static void dot_rows_of(uint32_t d, uint32_t n_rows, const uint8_t * src, uint32_t n_q, const int8_t * queries, size_t stride, float * out, size_t ld_out) {
    const size_t size = d/row_type<TYPE>::n_codes*row_type<TYPE>::size;

    uint32_t r = 0;
    for (; r + V::N < n_rows; r += 2*V::N) {
        group_dots<V, TYPE, 2>(d, n_rows - r, src + r*size, n_q, queries, stride, out + r, ld_out);
    }
    if (r < n_rows) {
        group_dots<V, TYPE, 1>(d, n_rows - r, src + r*size, n_q, queries, stride, out + r, ld_out);
    }
}

template<class V>
static void dot_rows_vec(ggml_type type, uint32_t d, uint32_t n_rows, const uint8_t * src, uint32_t n_v, const void * queries, float * out, size_t ld_out) {
    const auto * q = (const int8_t *) queries;

    const size_t stride = V::query_size(d);
    switch (type) {
        case GGML_TYPE_Q8_0: dot_rows_of<V, GGML_TYPE_Q8_0>(d, n_rows, src, n_v, q, stride, out, ld_out); break;
        case GGML_TYPE_Q4_0: dot_rows_of<V, GGML_TYPE_Q4_0>(d, n_rows, src, n_v, q, stride, out, ld_out); break;
        case GGML_TYPE_Q2_0: dot_rows_of<V, GGML_TYPE_Q2_0>(d, n_rows, src, n_v, q, stride, out, ld_out); break;
        default: GGML_ABORT("fatal error");
    }
}

// n values in 16 bits, of length 2^15, zeros behind them up to a multiple of 16; returns what 1 stands for
template<class V>
TARGET static float to_int16(uint32_t n, const float * x, int16_t * dst) {
    float   y   [256];
    int32_t ints[256];

    const uint32_t n_pad = GGML_PAD(n, 16);
    std::copy(x, x + n, y);
    std::fill(y + n, y + n_pad, 0.0f);

    auto sum = V::set1(0.0f);
    for (uint32_t i = 0; i < n_pad; i += V::N) {
        sum = V::fma(V::load(y + i), V::load(y + i), sum);
    }
    const float length = sqrtf(V::sum(sum));

    const auto f = V::set1(length > 0.0f ? 32767.0f/length : 0.0f);
    for (uint32_t i = 0; i < n_pad; i += V::N) {
        V::store_int(ints + i, V::to_int(V::mul(f, V::load(y + i))));
    }
    std::copy(ints, ints + n_pad, dst);

    return length/32767.0f;
}

// T vectors of tokens, M views of a query
template<class V, int T, int M>
INLINE void project_tile(const llama_capsule_project & p, const int16_t * x, size_t ld_x, const float * scales, const float * means, const float * phi,
        uint32_t t0, float * out) {
    typename V::I acc[M][T];
    for (auto & a : acc) {
        for (auto & y : a) {
            y = V::set1_int(0);
        }
    }
    for (uint32_t i = 0; i < (p.n_rows + 1)/2; ++i) {
        const int16_t * pairs = p.basis + 2*(i*p.n_out + t0);
        for (int t = 0; t < T; ++t) {
            const auto y = V::load_pairs(pairs + 2*V::N*t);
            for (int m = 0; m < M; ++m) {
                acc[m][t] = V::dot_pairs(acc[m][t], y, x + m*ld_x + 2*i);
            }
        }
    }
    for (int t = 0; t < T; ++t) {
        auto z = V::load(out + t0 + V::N*t);
        for (int m = 0; m < M; ++m) {
            const auto s = V::fma(V::set1(scales[m]), V::to_float(acc[m][t]), V::set1(means[m]));
            z = V::fma(V::load(phi + m*p.n_out + t0 + V::N*t), s, z);
        }
        V::store(out + t0 + V::N*t, z);
    }
}

template<class V, int M>
TARGET static void project_views(const llama_capsule_project & p, const int16_t * x, size_t ld_x, const float * scales, const float * means, const float * phi, float * out) {
    uint32_t t = 0;
    for (; t + 4*V::N <= p.n_out; t += 4*V::N) {
        project_tile<V, 4, M>(p, x, ld_x, scales, means, phi, t, out);
    }
    for (; t < p.n_out; t += V::N) {
        project_tile<V, 1, M>(p, x, ld_x, scales, means, phi, t, out);
    }
}

// n_out is a multiple of V::N
template<class V>
TARGET static void project_vec(const llama_capsule_project & p, uint32_t n_v, const float * x, size_t ld_x, const float * scales, const float * means, size_t ld_s,
        const float * phi, float * out) {
    static constexpr uint32_t M = 3; // views at a time

    int16_t ints[M*256];
    float   f   [M];
    float   mean[M];

    const size_t ld = GGML_PAD(p.n_rows, 16);

    std::fill_n(out, p.n_out, 0.0f);

    for (uint32_t v = 0; v < n_v; v += M, phi += M*p.n_out) {
        const uint32_t n = std::min(M, n_v - v);
        for (uint32_t i = 0; i < n; ++i) {
            f   [i] = scales[(v + i)*ld_s]*p.scale*to_int16<V>(p.n_rows, x + (v + i)*ld_x, ints + i*ld);
            mean[i] = means[(v + i)*ld_s];
        }
        switch (n) {
            case 1:  project_views<V, 1>(p, ints, ld, f, mean, phi, out); break;
            case 2:  project_views<V, 2>(p, ints, ld, f, mean, phi, out); break;
            default: project_views<V, 3>(p, ints, ld, f, mean, phi, out); break;
        }
    }
}
