#pragma once

#include "llama-capsule-simd-project.h"

//
// queries in 8 bits against rows as they are stored, a row in each lane: each of them meets a query of its own
//

namespace {

// sums of products of four codes in each lane
template<class V, ggml_type TYPE>
struct lane_products {
    typedef typename V::I A;

    INLINE A    zero()                                          { return V::set1_int(0); }
    INLINE void add (A & acc, typename V::I a, typename V::I b) { acc = V::dot(acc, a, b); }
    INLINE auto sum (A acc)                                     { return acc; }
};

}

template<class V>
TARGET static void to_lanes_vec(ggml_type type, uint32_t d, const float * const * x, const float * const * gates, uint8_t * query) {
    const uint32_t n_sums = type == GGML_TYPE_Q2_0 ? 2 : 1; // of QK codes, that share a scale
    const int32_t  zero   = type == GGML_TYPE_Q2_0 ? 1 : type == GGML_TYPE_Q4_0 ? 8 : V::ZERO_Q8;

    alignas(64) int8_t codes[V::N][256];

    const uint8_t * rows[V::N];

    int32_t * offsets = (int32_t *) (query + d*V::N);
    float   * scales  = (float   *) offsets + d/QK*V::N;

    int32_t sums[V::N][256/QK];
    float   unit[V::N][256/QK];

    llama_capsule_lane lanes[V::N];
    for (int i = 0; i < V::N; ++i) {
        rows [i] = (const uint8_t *) codes[i];
        lanes[i] = { x[i], gates[i], codes[i], sums[i], unit[i] };
    }
    V::to_codes(type, d, V::N, lanes);

    for (int i = 0; i < V::N; ++i) {
        for (uint32_t b = 0; b < d/QK/n_sums; ++b) {
            offsets[b*V::N + i] = zero*(n_sums == 2 ? sums[i][2*b] + sums[i][2*b + 1] : sums[i][b]);
            scales [b*V::N + i] = unit[i][b];
        }
    }

    for (uint32_t i = 0; i < d; i += 16) {
        typename V::I words[4];
        V::load_words(rows, i, words);
        for (uint32_t j = 0; j < 4; ++j) {
            V::store_int((int32_t *) query + (i/4 + j)*V::N, words[j]);
        }
    }
}

// the rows of a group in R lists, Q vectors of queries: out[r*ld_src + q*ld_out]
template<class V, ggml_type TYPE, int R, int Q>
INLINE void score_tile(const row_group<V, R> & g, uint32_t d, const uint8_t * const * queries, float * const * out, size_t ld_src) {
    using P = lane_products<V, TYPE>;

    static constexpr int n_codes = row_type<TYPE>::n_codes;

    typename V::F acc[Q][R];
    for (auto & a : acc) {
        for (auto & x : a) {
            x = V::set1(0.0f);
        }
    }
    for (size_t b = 0; b < d/n_codes; ++b) {
        typename P::A sum[Q][R];
        for (auto & a : sum) {
            for (auto & x : a) {
                x = P::zero();
            }
        }

        const uint32_t * codes[Q];
        for (int q = 0; q < Q; ++q) {
            codes[q] = (const uint32_t *) queries[q] + b*(n_codes/4*V::N);
        }
        const auto * rows = g.codes + b*n_codes/4;

#pragma GCC unroll 16
        for (int j = 0; j < n_codes/4; ++j) {
            for (int q = 0; q < Q; ++q) {
                const auto y = V::load_int(codes[q] + j*V::N);
                for (int r = 0; r < R; ++r) {
                    P::add(sum[q][r], rows[j][r], y);
                }
            }
        }
        for (int q = 0; q < Q; ++q) {
            const auto offset = V::load_int((const uint32_t *) (queries[q] + d*V::N) + b*V::N);
            const auto scale  = V::load((const float *) (queries[q] + d*V::N) + (d/QK + b)*V::N);
            for (int r = 0; r < R; ++r) {
                acc[q][r] = V::fma(V::mul(scale, g.scales[b][r]), V::to_float(V::sub_int(P::sum(sum[q][r]), offset)), acc[q][r]);
            }
        }
    }
    for (int q = 0; q < Q; ++q) {
        for (int r = 0; r < R; ++r) {
            V::store(out[q] + r*ld_src, acc[q][r]);
        }
    }
}

// a few lines of memory at a time: many of them would hold up what is read meanwhile
template<int LEVEL>
INLINE void fetch(const uint8_t * p, size_t n) {
    for (size_t i = 0; i < n; i += 64) {
        __builtin_prefetch(p + i, 0, LEVEL);
    }
}

// rows [r0, r0 + V::N) of R lists; there are more lists, next is read after all of them
template<class V, ggml_type TYPE, int R>
TARGET static void score_group(const llama_capsule_score & s, uint32_t i_group, uint32_t r0, uint32_t n_rows, const uint8_t * const * src, bool more,
        const uint8_t * const * next, float * out, size_t ld_src) {
    static constexpr uint32_t Q = 4; // vectors at a time

    const uint32_t d      = s.d;
    const size_t   size   = d/row_type<TYPE>::n_codes*row_type<TYPE>::size;
    const size_t   stride = llama_capsule_score::query_size(d, V::N);

    // lanes without a row repeat the last one
    const uint8_t * rows[R][V::N];
    for (int r = 0; r < R; ++r) {
        for (uint32_t i = 0; i < V::N; ++i) {
            rows[r][i] = src[r] + std::min(r0 + i, n_rows - 1)*size;
        }
        if (more) {
            fetch<3>(src[R + r] + r0*size, std::min<uint32_t>(V::N, n_rows - r0)*size);
        }
        if (next) {
            fetch<2>(next[r] + r0*size, std::min<uint32_t>(V::N, n_rows - r0)*size);
        }
    }

    row_group<V, R> g;
    group_rows<V, TYPE, R>(g, d, rows);

    const uint32_t n = (s.first[i_group + 1] - s.first[i_group])*s.n_q;

    const uint8_t * query = s.queries + s.first[i_group]*s.n_q*stride;
    float         * first = out + s.first[i_group]*V::N;

    const uint8_t * queries[Q];
    float         * dst    [Q];

    for (uint32_t j = 0, i = 0; j < n; ++j, query += stride) {
        queries[j % Q] = query;
        dst    [j % Q] = first + i*s.ld_out;
        if (++i == s.n_q) {
            i = 0;
            first += V::N;
        }
        if (j % Q == Q - 1) {
            score_tile<V, TYPE, R, Q>(g, d, queries, dst, ld_src);
        } else if (j + 1 == n) {
            switch (n % Q) {
                case 1:  score_tile<V, TYPE, R, 1>(g, d, queries, dst, ld_src); break;
                case 2:  score_tile<V, TYPE, R, 2>(g, d, queries, dst, ld_src); break;
                default: score_tile<V, TYPE, R, 3>(g, d, queries, dst, ld_src); break;
            }
        }
    }
}

template<class V, ggml_type TYPE>
static void score_rows_of(const llama_capsule_score & s, uint32_t g0, uint32_t n_rows, uint32_t n_src, const uint8_t * const * src, const uint8_t * const * next, float * out) {
    const size_t ld_src = s.n_q*s.ld_out;

    // the queries of a group stay in the cache of the core
    for (uint32_t r = 0; r < n_rows; r += V::N, ++g0) {
        uint32_t i = 0;
        for (; i + 2 <= n_src; i += 2) {
            score_group<V, TYPE, 2>(s, g0, r, n_rows, src + i, i + 4 <= n_src, next ? next + i : nullptr, out + i*ld_src, ld_src);
        }
        if (i < n_src) {
            score_group<V, TYPE, 1>(s, g0, r, n_rows, src + i, false, next ? next + i : nullptr, out + i*ld_src, ld_src);
        }
    }
}

template<class V>
static void score_rows_vec(const llama_capsule_score & s, ggml_type type, uint32_t g0, uint32_t n_rows, uint32_t n_src, const uint8_t * const * src, const uint8_t * const * next,
        float * out) {
    switch (type) {
        case GGML_TYPE_Q8_0: score_rows_of<V, GGML_TYPE_Q8_0>(s, g0, n_rows, n_src, src, next, out); break;
        case GGML_TYPE_Q4_0: score_rows_of<V, GGML_TYPE_Q4_0>(s, g0, n_rows, n_src, src, next, out); break;
        case GGML_TYPE_Q2_0: score_rows_of<V, GGML_TYPE_Q2_0>(s, g0, n_rows, n_src, src, next, out); break;
        default: GGML_ABORT("fatal error");
    }
}
