#pragma once

#include "llama-capsule-simd-vec.h"

#include <algorithm>

//
// weighted sums of rows of 4 and 2 bits in integers, four rows at a time, over a vector type with products of four bytes (V::dot)
//   weights and the scales of the rows together become 16 bits, high and low byte apart; one vector holds a column of four rows in each lane
//

static constexpr float INT_TOP = 127.0f*256.0f; // the largest weight: its high byte does not overflow when it is rounded

namespace {

struct int_buffers {
    llama_capsule_buf<uint32_t> codes;   // [n_quads][columns of a block]
    llama_capsule_buf<float>    scales;  // [n_pad]
    llama_capsule_buf<float>    f;       // [n_pad]
    llama_capsule_buf<int32_t>  ints;    // [n_pad]
    llama_capsule_buf<int16_t>  factors; // [n_pad]
    llama_capsule_buf<uint32_t> w;       // [2], high and low bytes of [n_quads][ld] or [n_out][n_quads]
    llama_capsule_buf<int32_t>  offs;    // [ld]
    llama_capsule_buf<float>    out_scales;
};

struct int_weights {
    const uint32_t * w; // bytes of four rows

    size_t ld_term; // from the high to the low bytes
    size_t ld_quad;
    size_t ld_out;

    const int32_t * offs;   // sums of the weights of each output
    const float   * scales; // of each output
};

}

// x = a*b*top/max in integers, n a multiple of 16; returns what 1 stands for, 0 if all are 0
template<class V>
TARGET static float to_ints(uint32_t n, const float * a, const float * b, float top, int32_t * x) {
    auto m = V::set1(0.0f);
    for (uint32_t i = 0; i < n; i += V::N) {
        m = V::max(m, V::abs(V::mul(V::load(a + i), V::load(b + i))));
    }
    const float max = V::max1(m);
    if (max == 0.0f) {
        return 0.0f;
    }

    const auto f = V::set1(top/max);
    for (uint32_t i = 0; i < n; i += V::N) {
        V::store_int(x + i, V::to_int(V::mul(f, V::mul(V::load(a + i), V::load(b + i)))));
    }
    return max/top;
}

// codes and scales of block b of n rows, zeros up to n_pad
template<class V, int BITS>
INLINE void int_codes(int_buffers & buf, uint32_t n, uint32_t n_pad, uint32_t d, uint32_t b, const uint8_t * src) {
    static const uint8_t none[2 + 16] = { 0 };

    static constexpr uint32_t cols   = BITS == 4 ? QK : QK2;
    static constexpr size_t   size   = BITS == 4 ? Q4_SIZE : Q2_SIZE;
    static_assert(size == sizeof(none), "16 bytes of codes behind a scale");

    const size_t stride = d/cols*size;

    float    * scales = buf.scales.resize(n_pad);
    uint32_t * dst    = buf.codes.resize(n_pad/4*cols);

    for (uint32_t r = 0; r < n_pad; r += 4, dst += cols) {
        typename V::B x[4];
        for (uint32_t k = 0; k < 4; ++k) {
            const uint8_t * p = r + k < n ? src + (r + k)*stride + b*size : none;

            scales[r + k] = V::half(p);
            x[k] = V::load_b(p + 2);
        }
        V::interleave(x);
        for (int j = 0; j < 4; ++j) {
            if (BITS == 4) {
                V::store_b(dst + 4*j,      V::template bits<0, 15>(x[j]));
                V::store_b(dst + 4*j + 16, V::template bits<4, 15>(x[j]));
            } else {
                V::store_crumbs(dst + 16*j, x[j]);
            }
        }
    }
}

// T outputs and C vectors of columns
template<class V, int ZERO, int TERMS, int T, int C>
INLINE void int_tile(uint32_t n_quads, const uint32_t * codes, size_t ld_codes, const int_weights & w, uint32_t t0, float * out, size_t ld_out) {
    typename V::I acc[T][C];
    for (int t = 0; t < T; ++t) {
        for (int c = 0; c < C; ++c) {
            acc[t][c] = V::set1_int(0);
        }
    }
    for (int term = 0; term < TERMS; ++term) {
        const uint32_t * wt = w.w + term*w.ld_term + t0*w.ld_out;

        for (int t = 0; t < T && term > 0; ++t) {
            for (int c = 0; c < C; ++c) {
                acc[t][c] = V::shift_left_8(acc[t][c]);
            }
        }
        for (uint32_t i = 0; i < n_quads; ++i) {
            typename V::I x[C];
            for (int c = 0; c < C; ++c) {
                x[c] = V::load_int(codes + i*ld_codes + V::N*c);
            }
            for (int t = 0; t < T; ++t) {
                const auto f = V::set1_int(wt[i*w.ld_quad + t*w.ld_out]);
                for (int c = 0; c < C; ++c) {
                    acc[t][c] = V::dot(acc[t][c], x[c], f);
                }
            }
        }
    }
    for (int t = 0; t < T; ++t) {
        const auto offset = V::set1_int(ZERO*w.offs[t0 + t]);
        const auto scale  = V::set1(w.scales[t0 + t]);
        for (int c = 0; c < C; ++c) {
            float * y = out + (t0 + t)*ld_out + V::N*c;
            V::store(y, V::fma(scale, V::to_float(V::sub_int(acc[t][c], offset)), V::load(y)));
        }
    }
}

// out += w codes for a block of columns
template<class V, int BITS, int TERMS>
TARGET static void int_product(uint32_t n_out, uint32_t n_quads, const uint32_t * codes, const int_weights & w, float * out, size_t ld_out) {
    static constexpr int cols = BITS == 4 ? QK : QK2;
    static constexpr int zero = BITS == 4 ? 8 : 1; // the code of 0
    static constexpr int C    = cols/V::N < 4 ? cols/V::N : 4;

    for (int i = 0; i < cols; i += C*V::N) {
        uint32_t t = 0;
        for (; t + 6 <= n_out; t += 6) {
            int_tile<V, zero, TERMS, 6, C>(n_quads, codes + i, cols, w, t, out + i, ld_out);
        }
        for (; t + 2 <= n_out; t += 2) {
            int_tile<V, zero, TERMS, 2, C>(n_quads, codes + i, cols, w, t, out + i, ld_out);
        }
        for (; t < n_out; ++t) {
            int_tile<V, zero, TERMS, 1, C>(n_quads, codes + i, cols, w, t, out + i, ld_out);
        }
    }
}

// what the codes of 0 add up to, eight times or once: sums of the weights
template<class V, int TERMS>
INLINE void int_offsets(uint32_t n_quads, uint32_t ld, const uint32_t * w, size_t ld_term, int32_t * offs) {
    const auto ones = V::set1_int(0x01010101);
    for (uint32_t t = 0; t < ld; t += V::N) {
        auto sum = V::set1_int(0);
        for (int term = 0; term < TERMS; ++term) {
            sum = V::shift_left_8(sum);
            for (uint32_t i = 0; i < n_quads; ++i) {
                sum = V::dot(sum, ones, V::load_int(w + term*ld_term + i*ld + t));
            }
        }
        V::store_int(offs + t, sum);
    }
}

// rows of 4 bits with both bytes of the weights, rows of 2 bits with the high ones
template<class V, int BITS>
TARGET static void mul_codes(uint32_t n_out, uint32_t d, const int16_t * basis, const float * basis_max, const uint8_t * src, uint32_t n, float * out, size_t ld_out) {
    static thread_local int_buffers buf;

    static constexpr uint32_t cols  = BITS == 4 ? QK : QK2;
    static constexpr int      terms = BITS == 4 ? 2 : 1;

    const uint32_t N16     = GGML_PAD(n_out, 16);
    const uint32_t ld      = GGML_PAD(n_out, 32);
    const uint32_t n_pad   = GGML_PAD(n, 16);
    const uint32_t n_quads = (n + 3)/4;

    buf.w.resize(2*n_quads*ld);
    buf.offs.resize(ld);
    buf.ints.resize(n_pad);
    buf.factors.resize(n_pad);
    buf.out_scales.resize(ld);

    for (uint32_t b = 0; b < d/cols; ++b) {
        int_codes<V, BITS>(buf, n, n_pad, d, b, src);

        const float scale = to_ints<V>(n_pad, buf.scales.data(), basis_max, INT_TOP, buf.ints.data());
        if (scale == 0.0f) {
            continue;
        }
        std::copy(buf.ints.data(), buf.ints.data() + n_pad, buf.factors.data());
        std::fill_n(buf.out_scales.data(), n_out, (terms == 1 ? 256.0f : 1.0f)*scale);

        const size_t ld_term = n_quads*ld;
        for (uint32_t i = 0; i < n_quads; ++i) {
            for (uint32_t t = 0; t < N16; t += V::N_WEIGHTS) {
                uint32_t * w = buf.w.data() + i*ld + t;
                V::store_weights(basis + 4*i*N16 + t, N16, buf.factors.data() + 4*i, w, terms > 1 ? w + ld_term : nullptr);
            }
        }
        int_offsets<V, terms>(n_quads, ld, buf.w.data(), ld_term, buf.offs.data());

        const int_weights w = { buf.w.data(), ld_term, ld, 1, buf.offs.data(), buf.out_scales.data() };
        int_product<V, BITS, terms>(n_out, n_quads, buf.codes.data(), w, out + b*cols, ld_out);
    }
}

template<class V>
TARGET static void mul_int_vec(uint32_t n_out, uint32_t d, const int16_t * basis, const float * basis_max, const llama_capsule_int_rows & rows,
        float * out, size_t ld_out) {
    if (rows.n_q4 > 0) {
        mul_codes<V, 4>(n_out, d, basis, basis_max, rows.q4, rows.n_q4, out, ld_out);
    }
    if (rows.n_q2 > 0) {
        mul_codes<V, 2>(n_out, d, basis + rows.n_q4*GGML_PAD(n_out, 16), basis_max + rows.n_q4, rows.q2, rows.n_q2, out, ld_out);
    }
}

// rows of 4 bits with weights of 16 bits, rows of 2 bits with weights of 8 bits
template<class V, int BITS>
TARGET static void mul_rows_of(uint32_t n_out, uint32_t n_rows, uint32_t d, const float * w, size_t ld_w, const uint8_t * src, float * out, size_t ld_out) {
    static thread_local int_buffers buf;

    static constexpr uint32_t cols  = BITS == 4 ? QK : QK2;
    static constexpr int      terms = BITS == 4 ? 2 : 1;

    const uint32_t n_pad   = GGML_PAD(n_rows, 16);
    const uint32_t n_quads = n_pad/4;
    const size_t   ld_term = n_out*n_quads;

    int8_t  * hi   = (int8_t *) buf.w.resize(2*ld_term);
    int8_t  * lo   = hi + n_out*n_pad;
    int32_t * offs = buf.offs.resize(n_out);
    int32_t * ints = buf.ints.resize(n_pad);
    float   * f    = buf.f.resize(n_pad);
    float   * one  = buf.out_scales.resize(n_out);

    std::fill_n(f, n_pad, 0.0f);

    for (uint32_t b = 0; b < d/cols; ++b) {
        int_codes<V, BITS>(buf, n_rows, n_pad, d, b, src);

        for (uint32_t t = 0; t < n_out; ++t) {
            std::copy(w + t*ld_w, w + t*ld_w + n_rows, f);

            one[t] = to_ints<V>(n_pad, f, buf.scales.data(), terms > 1 ? INT_TOP : 127.0f, ints);
            if (one[t] == 0.0f) {
                std::fill_n(ints, n_pad, 0);
            }

            int32_t sum = 0;
            for (uint32_t r = 0; r < n_pad; ++r) {
                hi[t*n_pad + r] = (int8_t) (terms > 1 ? (ints[r] + 128) >> 8 : ints[r]);
                lo[t*n_pad + r] = (int8_t) ints[r];
                sum += ints[r];
            }
            offs[t] = sum;
        }

        const int_weights weights = { buf.w.data(), ld_term, 1, n_quads, offs, one };
        int_product<V, BITS, terms>(n_out, n_quads, buf.codes.data(), weights, out + b*cols, ld_out);
    }
}

template<class V>
static void mul_rows_vec(ggml_type type, uint32_t n_out, uint32_t n_rows, uint32_t d, const float * w, size_t ld_w, const uint8_t * src, const uint8_t * next,
        float * out, size_t ld_out) {
    for (uint32_t r = 0; r < n_rows && next; ++r) {
        __builtin_prefetch(next + r*ggml_row_size(type, d));
    }

    (type == GGML_TYPE_Q4_0 ? mul_rows_of<V, 4> : mul_rows_of<V, 2>)(n_out, n_rows, d, w, ld_w, src, out, ld_out);
}
