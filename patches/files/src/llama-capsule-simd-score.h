#pragma once

#include "llama-capsule-simd-project.h"

//
// queries in 8 bits against rows as they are stored: the same rows of as many slots as a vector has room for, one in each lane. They meet the same queries, so that no sum
//   runs across lanes. A lane is that of slot lane/P, row lane%P, of P rows at a time
//

namespace {

// sums of products of four codes in each lane
template<class V, ggml_type TYPE>
struct lane_products {
    INLINE void add(typename V::I & acc, typename V::I a, typename V::I b) { acc = V::dot(acc, a, b); }
    INLINE auto sum(typename V::I acc)                                     { return acc; }
};

template<class V, ggml_type TYPE>
struct score_shape {
    static constexpr uint32_t S = llama_capsule_score::n_slots(V::N);
    static constexpr uint32_t P = V::N/S;

    static constexpr int n_codes = row_type<TYPE>::n_codes;
    static constexpr int n_parts = n_codes/QK;       // of 32 codes
    static constexpr int n_words = (2 + n_codes/4)*P; // of a query in a block: what its sums start from, its codes, its scale

    static constexpr int zero = TYPE == GGML_TYPE_Q2_0 ? 1 : TYPE == GGML_TYPE_Q4_0 ? 8 : V::ZERO_Q8; // the code of 0
};

}

template<class V, ggml_type TYPE>
INLINE void to_lanes_of(uint32_t d, uint32_t n, const llama_capsule_lane * lanes) {
    using T = score_shape<V, TYPE>;

    const uint32_t n_blocks = d/T::n_codes;

    llama_capsule_codes all[llama_capsule_codes::MAX];

    V::to_codes(TYPE, d, n, lanes, all);

    for (uint32_t i = 0; i < n; ++i) {
        const auto & lane = lanes[i];
        const auto & cur  = all[i];

        auto * first = (uint32_t *) lane.queries;
        for (uint32_t b = 0; b < n_blocks; ++b) {
            uint32_t * dst = first + (b*lane.n + lane.j)*T::n_words + lane.p;

            *dst = V::first_sum(cur.sums[b], T::zero);
            for (int k = 0; k < T::n_codes/4; ++k) {
                memcpy(dst + (1 + k)*T::P, cur.codes + b*T::n_codes + 4*k, sizeof(*dst));
            }
            memcpy(dst + (1 + T::n_codes/4)*T::P, cur.scales + b, sizeof(*dst));
        }
    }
}

template<class V>
TARGET static void to_lanes_vec(ggml_type type, uint32_t d, uint32_t n, const llama_capsule_lane * lanes) {
    for (uint32_t n_cur; n > 0; n -= n_cur, lanes += n_cur) {
        n_cur = std::min(n, llama_capsule_codes::MAX);

        // gates are read in the order of the rows that they are for: nothing but this fetches them
        for (uint32_t i = n_cur; i < std::min(n, 2*n_cur); ++i) {
            for (uint32_t j = 0; j < d && lanes[i].gates; j += 16) {
                __builtin_prefetch(lanes[i].gates + j);
            }
        }

        switch (type) {
            case GGML_TYPE_Q8_0: to_lanes_of<V, GGML_TYPE_Q8_0>(d, n_cur, lanes); break;
            case GGML_TYPE_Q4_0: to_lanes_of<V, GGML_TYPE_Q4_0>(d, n_cur, lanes); break;
            case GGML_TYPE_Q2_0: to_lanes_of<V, GGML_TYPE_Q2_0>(d, n_cur, lanes); break;
            default: GGML_ABORT("fatal error");
        }
    }
}

// 32 codes of each lane, 4 at a time, a part of those in words
template<class V, ggml_type TYPE, int PART>
INLINE void lane_codes(const typename V::I * words, typename V::I * codes) {
    for (int i = 0; i < 4; ++i) {
        if constexpr (TYPE == GGML_TYPE_Q8_0) {
            codes[i]     = V::signed_codes(words[i]);
            codes[i + 4] = V::signed_codes(words[i + 4]);
        } else if constexpr (TYPE == GGML_TYPE_Q4_0) {
            codes[i]     = V::template bits_int<0, 15>(words[i]);
            codes[i + 4] = V::template bits_int<4, 15>(words[i]);
        } else {
            codes[i]     = V::template bits_int<4*PART,     3>(words[i]);
            codes[i + 4] = V::template bits_int<4*PART + 2, 3>(words[i]);
        }
    }
}

// Q queries against 32 codes of a block; their sums of the last part are taken up, those of this one are left or end in acc
template<class V, ggml_type TYPE, int PART, int Q>
INLINE void score_tile(const typename V::I * codes, typename V::F scale, const uint32_t * queries, typename V::I * sums, typename V::F * acc) {
    using P = lane_products<V, TYPE>;
    using T = score_shape  <V, TYPE>;

    typename V::I sum[Q];
#pragma GCC unroll 4
    for (int q = 0; q < Q; ++q) {
        sum[q] = PART == 0 ? V::load_lanes(queries + q*T::n_words) : sums[q];
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
#pragma GCC unroll 4
        for (int q = 0; q < Q; ++q) {
            P::add(sum[q], codes[i], V::load_lanes(queries + q*T::n_words + (1 + 8*PART + i)*T::P));
        }
    }
#pragma GCC unroll 4
    for (int q = 0; q < Q; ++q) {
        if (PART + 1 < T::n_parts) {
            sums[q] = sum[q];
        } else {
            const auto unit = V::mul(scale, V::to_scale(V::load_lanes(queries + q*T::n_words + (1 + T::n_codes/4)*T::P)));

            acc[q] = V::fma(unit, V::to_float(P::sum(sum[q])), acc[q]);
        }
    }
}

// n queries, N of them or, if that is 0, any number
template<class V, ggml_type TYPE, int PART, int N>
INLINE void score_part(const typename V::I * words, typename V::F scale, uint32_t n, const uint32_t * queries, typename V::I * sums, typename V::F * acc) {
    static constexpr int n_words = score_shape<V, TYPE>::n_words;

    typename V::I codes[8];
    lane_codes<V, TYPE, PART>(words, codes);

    if constexpr (N > 0) {
        score_tile<V, TYPE, PART, N>(codes, scale, queries, sums, acc);
    } else {
        uint32_t j = 0;
        for (; j + 4 <= n; j += 4, queries += 4*n_words) {
            score_tile<V, TYPE, PART, 4>(codes, scale, queries, sums + j, acc + j);
        }
        switch (n - j) {
            case 3: score_tile<V, TYPE, PART, 3>(codes, scale, queries, sums + j, acc + j); break;
            case 2: score_tile<V, TYPE, PART, 2>(codes, scale, queries, sums + j, acc + j); break;
            case 1: score_tile<V, TYPE, PART, 1>(codes, scale, queries, sums + j, acc + j); break;
            default: break;
        }
    }
}

// ld: words from one block to the next
template<class V, ggml_type TYPE, int N>
INLINE void score_queries(const uint8_t * const * rows, uint32_t d, uint32_t n, const uint32_t * queries, size_t ld, typename V::F * out) {
    using T = score_shape<V, TYPE>;

    typename V::I sums[N > 0 ? N : llama_capsule_score::MAX];
    typename V::F few [N > 0 ? N : 1];

    auto * acc = N > 0 ? few : out; // in registers
    // a call of memset takes longer
    float zero = 0.0f;
    __asm__("" : "+m"(zero));

    for (uint32_t j = 0; j < (N > 0 ? N : n); ++j) {
        acc[j] = V::set1(zero);
    }

    size_t offs = 0;
    for (uint32_t b = 0; b < d/T::n_codes; ++b, queries += ld) {
        const auto scale = V::halves(rows, offs);
        offs += 2;

        typename V::I words[8];
        for (int i = 0; i < T::n_codes*row_type<TYPE>::n_bits/128; ++i, offs += 16) {
            V::load_words(rows, offs, words + 4*i);
        }
        score_part<V, TYPE, 0, N>(words, scale, n, queries, sums, acc);
        if constexpr (T::n_parts > 1) {
            score_part<V, TYPE, 1, N>(words, scale, n, queries, sums, acc);
        }
    }
    for (int j = 0; j < N; ++j) {
        out[j] = few[j];
    }
}

// P rows of S slots and all queries that they meet
template<class V, ggml_type TYPE>
INLINE void score_group(const llama_capsule_score & s, uint32_t i_group, const uint8_t * const * rows, float * out) {
    using T = score_shape<V, TYPE>;

    const uint32_t n_q    = s.n_q;
    const size_t   ld_out = s.ld_out;
    const uint32_t n      = (s.first[i_group + 1] - s.first[i_group])*n_q;
    const size_t   ld     = n*T::n_words;

    const auto * queries = (const uint32_t *) (s.queries + s.first[i_group]*n_q*llama_capsule_score::query_size(s.d, T::P));
    const auto * tokens  = s.tokens + s.first[i_group]*T::P;

    typename V::F acc[llama_capsule_score::MAX];

    for (uint32_t j0 = 0, q = 0; j0 < n; j0 += llama_capsule_score::MAX, queries += llama_capsule_score::MAX*T::n_words) {
        const uint32_t n_cur = std::min<uint32_t>(n - j0, llama_capsule_score::MAX);
        switch (n_cur) {
            case 1:  score_queries<V, TYPE, 1>(rows, s.d, n_cur, queries, ld, acc); break;
            case 2:  score_queries<V, TYPE, 2>(rows, s.d, n_cur, queries, ld, acc); break;
            case 3:  score_queries<V, TYPE, 3>(rows, s.d, n_cur, queries, ld, acc); break;
            case 4:  score_queries<V, TYPE, 4>(rows, s.d, n_cur, queries, ld, acc); break;
            default: score_queries<V, TYPE, 0>(rows, s.d, n_cur, queries, ld, acc); break;
        }
        for (uint32_t j = 0; j < n_cur; ++j) {
            V::add_scores(out + q*ld_out, tokens, acc[j]);
            if (++q == n_q) {
                q = 0;
                tokens += T::P;
            }
        }
    }
}

// slots [i, i + n), S of them at most
template<class V, ggml_type TYPE>
TARGET static void score_slots(const llama_capsule_score & s, uint32_t g0, uint32_t n_rows, uint32_t i, uint32_t n, const uint8_t * const * src, float * out) {
    using T = score_shape<V, TYPE>;

    const size_t size = s.d/T::n_codes*row_type<TYPE>::size;

    // lanes without a slot or a row repeat the last one
    const uint8_t * rows[V::N];
    for (uint32_t j = 0; j < V::N; ++j) {
        rows[j] = src[i + std::min(j/T::P, n - 1)] + std::min(j%T::P, n_rows - 1)*size;
    }
    for (uint32_t r = 0; r < n_rows; r += T::P) {
        for (uint32_t j = 0; j < n; ++j) {
            llama_capsule_fetch(rows[j*T::P] + LLAMA_CAPSULE_AHEAD, T::P*size);
        }
        score_group<V, TYPE>(s, g0 + r/T::P, rows, out);

        for (uint32_t j = 0; j < V::N; ++j) {
            rows[j] += (r + T::P + j%T::P < n_rows ? T::P : T::P - 1)*size;
        }
    }
}

template<class V, ggml_type TYPE>
static void score_rows_of(const llama_capsule_score & s, uint32_t g0, uint32_t n_rows, uint32_t n_src, const uint8_t * const * src, float * out) {
    static constexpr uint32_t S = score_shape<V, TYPE>::S;

    for (uint32_t i = 0; i < n_src; i += S, out += s.n_q*s.ld_out) {
        score_slots<V, TYPE>(s, g0, n_rows, i, std::min(S, n_src - i), src, out);
    }
}

template<class V>
static void score_rows_vec(const llama_capsule_score & s, ggml_type type, uint32_t g0, uint32_t n_rows, uint32_t n_src, const uint8_t * const * src, float * out) {
    switch (type) {
        case GGML_TYPE_Q8_0: score_rows_of<V, GGML_TYPE_Q8_0>(s, g0, n_rows, n_src, src, out); break;
        case GGML_TYPE_Q4_0: score_rows_of<V, GGML_TYPE_Q4_0>(s, g0, n_rows, n_src, src, out); break;
        case GGML_TYPE_Q2_0: score_rows_of<V, GGML_TYPE_Q2_0>(s, g0, n_rows, n_src, src, out); break;
        default: GGML_ABORT("fatal error");
    }
}
