#pragma once

#include "llama-capsule-simd.h"

#include <cmath>
#include <cstring>

//
// kernels over a thin vector type V, for the files that define TARGET and INLINE (function attributes) before they include this one
//   V::N floats, V::F floats, V::B 16 bytes; lengths that are no multiples of V::N are left to others
//

// a tile of T rows and C vectors in registers
template<class V, int T, int C>
INLINE void mul_tile(uint32_t n_rows, const float * w, size_t w_r, size_t w_t, const float * x, size_t ld_x, const float * init, float * out, size_t ld_out) {
    typename V::F acc[T][C];
    for (int t = 0; t < T; ++t) {
        for (int c = 0; c < C; ++c) {
            acc[t][c] = V::load((init ? init : out + t*ld_out) + V::N*c);
        }
    }
    for (uint32_t r = 0; r < n_rows; ++r) {
        typename V::F xr[C];
        for (int c = 0; c < C; ++c) {
            xr[c] = V::load(x + r*ld_x + V::N*c);
        }
        for (int t = 0; t < T; ++t) {
            const auto f = V::set1(w[r*w_r + t*w_t]);
            for (int c = 0; c < C; ++c) {
                acc[t][c] = V::fma(f, xr[c], acc[t][c]);
            }
        }
    }
    for (int t = 0; t < T; ++t) {
        for (int c = 0; c < C; ++c) {
            V::store(out + t*ld_out + V::N*c, acc[t][c]);
        }
    }
}

template<class V, int C>
TARGET static void mul_cols(uint32_t n_out, uint32_t n_rows, const float * w, size_t w_r, size_t w_t, const float * x, size_t ld_x,
        const float * init, float * out, size_t ld_out) {
    uint32_t t = 0;
    for (; n_out - t >= 6 && n_out - t != 7 && n_out - t != 8; t += 6) {
        mul_tile<V, 6, C>(n_rows, w + t*w_t, w_r, w_t, x, ld_x, init, out + t*ld_out, ld_out);
    }
    for (; n_out - t >= 4; t += 4) {
        mul_tile<V, 4, C>(n_rows, w + t*w_t, w_r, w_t, x, ld_x, init, out + t*ld_out, ld_out);
    }
    w   += t*w_t;
    out += t*ld_out;
    switch (n_out - t) {
        case 3: mul_tile<V, 3, C>(n_rows, w, w_r, w_t, x, ld_x, init, out, ld_out); break;
        case 2: mul_tile<V, 2, C>(n_rows, w, w_r, w_t, x, ld_x, init, out, ld_out); break;
        case 1: mul_tile<V, 1, C>(n_rows, w, w_r, w_t, x, ld_x, init, out, ld_out); break;
        default: break;
    }
}

// d is a multiple of V::N
template<class V>
TARGET static void mul_vec(uint32_t n_out, uint32_t n_rows, uint32_t d, const float * w, size_t w_r, size_t w_t, const float * x, size_t ld_x,
        const float * init, float * out, size_t ld_out) {
    uint32_t i = 0;
    for (; i + 4*V::N <= d; i += 4*V::N) {
        mul_cols<V, 4>(n_out, n_rows, w, w_r, w_t, x + i, ld_x, init ? init + i : nullptr, out + i, ld_out);
    }
    for (; i < d; i += V::N) {
        mul_cols<V, 1>(n_out, n_rows, w, w_r, w_t, x + i, ld_x, init ? init + i : nullptr, out + i, ld_out);
    }
}

// 4 rows of x against Q rows of y
template<class V, int Q>
INLINE void dot_tile(uint32_t d, const float * x, size_t ld_x, const float * y, size_t ld_y, float * out, size_t ld_out) {
    typename V::F acc[Q][4];
    for (int q = 0; q < Q; ++q) {
        for (int j = 0; j < 4; ++j) {
            acc[q][j] = V::set1(0.0f);
        }
    }
    for (uint32_t i = 0; i < d; i += V::N) {
        typename V::F xi[4];
        for (int j = 0; j < 4; ++j) {
            xi[j] = V::load(x + j*ld_x + i);
        }
        for (int q = 0; q < Q; ++q) {
            const auto yi = V::load(y + q*ld_y + i);
            for (int j = 0; j < 4; ++j) {
                acc[q][j] = V::fma(xi[j], yi, acc[q][j]);
            }
        }
    }
    for (int q = 0; q < Q; ++q) {
        V::sum4(acc[q], out + q*ld_out);
    }
}

// d is a multiple of V::N
template<class V>
TARGET static void dot_vec(uint32_t n_x, uint32_t n_y, uint32_t d, const float * x, size_t ld_x, const float * y, size_t ld_y, float * out, size_t ld_out) {
    const uint32_t n_x4 = n_x/4*4;

    // x stays in the cache, of y there may be much more
    uint32_t q = 0;
    for (; q + 4 <= n_y; q += 4) {
        for (uint32_t j = 0; j < n_x4; j += 4) {
            dot_tile<V, 4>(d, x + j*ld_x, ld_x, y + q*ld_y, ld_y, out + q*ld_out + j, ld_out);
        }
    }
    for (; q < n_y; ++q) {
        for (uint32_t j = 0; j < n_x4; j += 4) {
            dot_tile<V, 1>(d, x + j*ld_x, ld_x, y + q*ld_y, ld_y, out + q*ld_out + j, ld_out);
        }
    }
    for (uint32_t j = n_x4; j < n_x; ++j) {
        for (q = 0; q < n_y; ++q) {
            auto acc = V::set1(0.0f);
            for (uint32_t i = 0; i < d; i += V::N) {
                acc = V::fma(V::load(x + j*ld_x + i), V::load(y + q*ld_y + i), acc);
            }
            out[q*ld_out + j] = V::sum(acc);
        }
    }
}

// x <= 0; e^x = 2^n (1 + p(r)), with r = x - n ln 2, as for AVX2
template<class V>
INLINE typename V::F exp_vec(typename V::F x) {
    x = V::max(x, V::set1(-87.0f));

    const auto n = V::round(V::mul(x, V::set1(1.44269504f)));

    auto r = V::fma(n, V::set1(-0.693359375f), x);
    r = V::fma(n, V::set1(2.12194440e-4f), r);

    auto p = V::set1(1.0f/5040.0f);
    for (float c : { 1.0f/720.0f, 1.0f/120.0f, 1.0f/24.0f, 1.0f/6.0f, 0.5f, 1.0f, 1.0f }) {
        p = V::fma(p, r, V::set1(c));
    }
    return V::mul(p, V::exp2(n));
}

// n is a multiple of V::N
template<class V>
TARGET static float exp_sum_vec(float * s, float max, uint32_t n) {
    auto sum = V::set1(0.0f);
    for (uint32_t i = 0; i < n; i += V::N) {
        const auto x = V::sub(V::load(s + i), V::set1(max));
        const auto y = V::where_greater(x, V::set1(-87.0f), exp_vec<V>(x)); // masked columns are exactly 0

        V::store(s + i, y);
        sum = V::add(sum, y);
    }
    return V::sum(sum);
}

// rows of hot cells, far apart in memory, for few queries: read once, not copied
template<class V, ggml_type TYPE>
struct cells {
    static constexpr int SIZE = TYPE == GGML_TYPE_F16 ? V::N : QK; // values at a time
    static constexpr int C    = SIZE/V::N;

    INLINE void load(const uint8_t * x, uint32_t i, typename V::F * v) {
        if (TYPE == GGML_TYPE_F16) {
            v[0] = V::load_half(x + 2*i);
            return;
        }
        x += i/QK*Q8_SIZE;

        V::widen(V::load_b(x + 2),      v);
        V::widen(V::load_b(x + 2 + 16), v + C/2);
        for (int c = 0; c < C; ++c) {
            v[c] = V::mul(v[c], V::set1(V::half(x)));
        }
    }
};

template<class V, ggml_type TYPE, int Q, int R>
INLINE void dot_cells_tile(uint32_t d, const uint8_t * x, size_t stride, const float * y, size_t ld_y, typename V::F (&acc)[Q][R]) {
    using T = cells<V, TYPE>;

    for (auto & a : acc) {
        for (auto & v : a) {
            v = V::set1(0.0f);
        }
    }
    for (uint32_t i = 0; i < d; i += T::SIZE) {
        for (int r = 0; r < R; ++r) {
            typename V::F v[T::C];
            T::load(x + r*stride, i, v);
            for (int q = 0; q < Q; ++q) {
                for (int c = 0; c < T::C; ++c) {
                    acc[q][r] = V::fma(v[c], V::load(y + q*ld_y + i + V::N*c), acc[q][r]);
                }
            }
        }
    }
}

template<class V, ggml_type TYPE, int Q>
TARGET static void dot_cells_of(uint32_t n_x, uint32_t d, const uint8_t * x, size_t stride, const float * y, size_t ld_y, float * out, size_t ld_out) {
    uint32_t j = 0;
    for (; j + 4 <= n_x; j += 4) {
        typename V::F acc[Q][4];
        dot_cells_tile<V, TYPE>(d, x + j*stride, stride, y, ld_y, acc);
        for (int q = 0; q < Q; ++q) {
            V::sum4(acc[q], out + q*ld_out + j);
        }
    }
    for (; j < n_x; ++j) {
        typename V::F acc[Q][1];
        dot_cells_tile<V, TYPE>(d, x + j*stride, stride, y, ld_y, acc);
        for (int q = 0; q < Q; ++q) {
            out[q*ld_out + j] = V::sum(acc[q][0]);
        }
    }
}

// d is a multiple of V::N
template<class V>
TARGET static void dot_cells_vec(ggml_type type, uint32_t n_x, uint32_t n_y, uint32_t d, const uint8_t * x, size_t stride,
        const float * y, size_t ld_y, float * out, size_t ld_out) {
    const bool f16 = type == GGML_TYPE_F16;

    const auto four = f16 ? dot_cells_of<V, GGML_TYPE_F16, 4> : dot_cells_of<V, GGML_TYPE_Q8_0, 4>;
    const auto one  = f16 ? dot_cells_of<V, GGML_TYPE_F16, 1> : dot_cells_of<V, GGML_TYPE_Q8_0, 1>;

    uint32_t q = 0;
    for (; q + 4 <= n_y; q += 4) {
        four(n_x, d, x, stride, y + q*ld_y, ld_y, out + q*ld_out, ld_out);
    }
    for (; q < n_y; ++q) {
        one(n_x, d, x, stride, y + q*ld_y, ld_y, out + q*ld_out, ld_out);
    }
}

// C vectors of each of Q outputs
template<class V, ggml_type TYPE, int Q, int C>
INLINE void mul_cells_tile(uint32_t n_x, const float * w, size_t ld_w, const uint8_t * x, size_t stride, uint32_t i0, float * out, size_t ld_out) {
    using T = cells<V, TYPE>;

    typename V::F acc[Q][C];
    for (int q = 0; q < Q; ++q) {
        for (int c = 0; c < C; ++c) {
            acc[q][c] = V::load(out + q*ld_out + i0 + V::N*c);
        }
    }
    for (uint32_t r = 0; r < n_x; ++r) {
        for (int c = 0; c < C; c += T::C) {
            typename V::F v[T::C];
            T::load(x + r*stride, i0 + V::N*c, v);
            for (int q = 0; q < Q; ++q) {
                const auto f = V::set1(w[q*ld_w + r]);
                for (int j = 0; j < T::C; ++j) {
                    acc[q][c + j] = V::fma(f, v[j], acc[q][c + j]);
                }
            }
        }
    }
    for (int q = 0; q < Q; ++q) {
        for (int c = 0; c < C; ++c) {
            V::store(out + q*ld_out + i0 + V::N*c, acc[q][c]);
        }
    }
}

template<class V, ggml_type TYPE, int Q>
TARGET static void mul_cells_of(uint32_t n_x, uint32_t d, const float * w, size_t ld_w, const uint8_t * x, size_t stride, float * out, size_t ld_out) {
    static constexpr int C = QK2/V::N < 8 ? QK2/V::N : 8;

    uint32_t i = 0;
    for (; i + C*V::N <= d; i += C*V::N) {
        mul_cells_tile<V, TYPE, Q, C>(n_x, w, ld_w, x, stride, i, out, ld_out);
    }
    for (; i < d; i += cells<V, TYPE>::SIZE) {
        mul_cells_tile<V, TYPE, Q, cells<V, TYPE>::C>(n_x, w, ld_w, x, stride, i, out, ld_out);
    }
}

// d is a multiple of V::N
template<class V>
TARGET static void mul_cells_vec(ggml_type type, uint32_t n_out, uint32_t n_x, uint32_t d, const float * w, size_t ld_w,
        const uint8_t * x, size_t stride, float * out, size_t ld_out) {
    const bool f16 = type == GGML_TYPE_F16;

    const auto two = f16 ? mul_cells_of<V, GGML_TYPE_F16, 2> : mul_cells_of<V, GGML_TYPE_Q8_0, 2>;
    const auto one = f16 ? mul_cells_of<V, GGML_TYPE_F16, 1> : mul_cells_of<V, GGML_TYPE_Q8_0, 1>;

    uint32_t q = 0;
    for (; q + 2 <= n_out; q += 2) {
        two(n_x, d, w + q*ld_w, ld_w, x, stride, out + q*ld_out, ld_out);
    }
    if (q < n_out) {
        one(n_x, d, w + q*ld_w, ld_w, x, stride, out + q*ld_out, ld_out);
    }
}

// 64 values in registers; the order of the operations is that of llama_capsule_hadamard(), and so are the bits
template<class V>
INLINE void hadamard_64(float * x, float scale) {
    typename V::F v[64/V::N];
    for (int i = 0; i < 64/V::N; ++i) {
        v[i] = V::hadamard(V::load(x + V::N*i));
    }
    for (int h = 1; h < 64/V::N; h *= 2) {
        for (int i = 0; i < 64/V::N; ++i) {
            if ((i & h) == 0) {
                const auto a = v[i];
                const auto b = v[i + h];

                v[i]     = V::add(a, b);
                v[i + h] = V::sub(a, b);
            }
        }
    }
    for (int i = 0; i < 64/V::N; ++i) {
        V::store(x + V::N*i, V::mul(v[i], V::set1(scale)));
    }
}

template<class V>
TARGET static void hadamard_vec(float * x, uint32_t n, size_t n_values) {
    if (n < 64) {
        llama_capsule_hadamard(x, n, n_values);
        return;
    }

    const float scale = 1.0f/sqrtf((float) n);

    for (size_t i = 0; i < n_values; i += n) {
        for (uint32_t j = 0; j < n; j += 64) {
            hadamard_64<V>(x + i + j, n == 64 ? scale : 1.0f);
        }
        for (uint32_t h = 64; h < n; h *= 2) {
            const auto f = V::set1(2*h == n ? scale : 1.0f);

            for (uint32_t j = 0; j < n; j += 2*h) {
                for (float * y = x + i + j; y < x + i + j + h; y += V::N) {
                    const auto a = V::load(y);
                    const auto b = V::load(y + h);

                    V::store(y,     V::mul(V::add(a, b), f));
                    V::store(y + h, V::mul(V::sub(a, b), f));
                }
            }
        }
    }
}

// 16 signed codes
template<class V>
INLINE void store_codes(float * dst, typename V::B codes, typename V::F scale) {
    typename V::F v[16/V::N];
    V::widen(codes, v);
    for (int i = 0; i < 16/V::N; ++i) {
        V::store(dst + V::N*i, V::mul(scale, v[i]));
    }
}

template<class V>
TARGET static void to_float_vec(ggml_type type, const void * src, float * dst, uint32_t d) {
    const uint8_t * p = (const uint8_t *) src;

    switch (type) {
        case GGML_TYPE_F16:
            {
                uint32_t i = 0;
                for (; i + V::N <= d; i += V::N) {
                    V::store(dst + i, V::load_half(p + 2*i));
                }
                for (; i < d; ++i) {
                    dst[i] = V::half(p + 2*i);
                }
            } break;
        case GGML_TYPE_Q8_0:
            for (uint32_t i = 0; i < d; i += QK, p += Q8_SIZE) {
                const auto scale = V::set1(V::half(p));

                store_codes<V>(dst + i,      V::load_b(p + 2),      scale);
                store_codes<V>(dst + i + 16, V::load_b(p + 2 + 16), scale);
            }
            break;
        case GGML_TYPE_Q4_0:
            for (uint32_t i = 0; i < d; i += QK, p += Q4_SIZE) {
                const auto scale = V::set1(V::half(p));
                const auto x     = V::load_b(p + 2);

                store_codes<V>(dst + i,      V::sub_b(V::template bits<0, 15>(x), 8), scale);
                store_codes<V>(dst + i + 16, V::sub_b(V::template bits<4, 15>(x), 8), scale);
            }
            break;
        case GGML_TYPE_Q2_0:
            for (uint32_t i = 0; i < d; i += QK2, p += Q2_SIZE) {
                const auto scale = V::set1(V::half(p));
                const auto x     = V::load_b(p + 2);

                typename V::B c[4] = { V::template bits<0, 3>(x), V::template bits<2, 3>(x), V::template bits<4, 3>(x), V::template bits<6, 3>(x) };
                V::interleave(c);
                for (int j = 0; j < 4; ++j) {
                    store_codes<V>(dst + i + 16*j, V::sub_b(c[j], 1), scale);
                }
            }
            break;
        case GGML_TYPE_F32:
            memcpy(dst, src, d*sizeof(float));
            break;
        default:
            ggml_get_type_traits(type)->to_float(src, dst, d);
            break;
    }
}
