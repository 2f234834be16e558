#pragma once

#include "layout.h"

#include <type_traits>

//
// The inverse cosine transform of up to 8 vectors by butterflies, in 16-bit integers. V is a type of vectors (simd.h).
// The larger inputs are multiplied beforehand (ggml_capsule_shape::factor), so that all constants here are below 1.
//

constexpr int capsule_q15(double x) { return (int) (x*32768 + (x < 0 ? -0.5 : 0.5)); }

// 28 additions, 6 multiplications, 1 shift
template<typename V>
inline void capsule_idct8(typename V::T * x) {
    typedef typename V::T T;

    constexpr int c2 = capsule_q15(0.92387953);
    constexpr int c4 = capsule_q15(0.70710678);
    constexpr int c6 = capsule_q15(0.38268343);

    const T a0 = V::add(x[0], x[4]);
    const T a1 = V::sub(x[0], x[4]);
    const T a3 = V::mul(V::add(x[2], x[6]), c4);
    const T a2 = V::sub(V::sub(x[2], x[6]), a3);

    const T e0 = V::add(a0, a3);
    const T e3 = V::sub(a0, a3);
    const T e1 = V::add(a1, a2);
    const T e2 = V::sub(a1, a2);

    const T z13 = V::add(x[5], x[3]);
    const T z10 = V::sub(x[5], x[3]);
    const T z11 = V::add(x[1], x[7]);
    const T z12 = V::sub(x[1], x[7]);

    const T o7 = V::half(V::add(z11, z13));
    const T o6 = V::sub(V::sub(V::mul(z12, c2), V::mul(z10, c6)), o7);
    const T o5 = V::sub(V::mul(V::sub(z11, z13), c4), o6);
    const T o4 = V::sub(o5, V::add(V::mul(z12, c6), V::mul(z10, c2)));

    x[0] = V::add(e0, o7);
    x[7] = V::sub(e0, o7);
    x[1] = V::add(e1, o6);
    x[6] = V::sub(e1, o6);
    x[2] = V::add(e2, o5);
    x[5] = V::sub(e2, o5);
    x[4] = V::add(e3, o4);
    x[3] = V::sub(e3, o4);
}

// [u][t]: cos(pi (t + 1/2) u/n), orthonormal, times 2^15
typedef int16_t ggml_capsule_cosines[GGML_CAPSULE_SIDE][GGML_CAPSULE_SIDE];
const ggml_capsule_cosines & ggml_capsule_cosines_of(int n);

// of 1 to 7 points, straight from its definition; the two halves of the outputs share their products
template<typename V, int N>
inline void capsule_idct_n(typename V::T * x) {
    typedef typename V::T T;

    if (N == 1) {
        return;
    }
    const auto & c = ggml_capsule_cosines_of(N);

    T y[N];
#pragma GCC unroll 4
    for (int t = 0; t < (N + 1)/2; ++t) {
        T even = V::mul(x[0], c[0][t]);
        T odd  = V::mul(x[1], c[1][t]);
#pragma GCC unroll 4
        for (int u = 2; u < N; u += 2) {
            even = V::add(even, V::mul(x[u], c[u][t]));
        }
#pragma GCC unroll 4
        for (int u = 3; u < N; u += 2) {
            odd = V::add(odd, V::mul(x[u], c[u][t]));
        }
        y[N - 1 - t] = V::sub(even, odd);
        y[t]         = V::add(even, odd);
    }
#pragma GCC unroll 8
    for (int t = 0; t < N; ++t) {
        x[t] = y[t];
    }
}

template<typename V, int N>
inline void capsule_idct(typename V::T * x) {
    if (N == GGML_CAPSULE_SIDE) {
        capsule_idct8<V>(x);
    } else {
        capsule_idct_n<V, N == GGML_CAPSULE_SIDE ? 1 : N>(x);
    }
}

// calls f(std::integral_constant<int, n>()), so that n is a constant in f
template<typename F>
inline void capsule_with_size(int n, F f) {
    switch (n) {
        case 1: f(std::integral_constant<int, 1>()); break;
        case 2: f(std::integral_constant<int, 2>()); break;
        case 3: f(std::integral_constant<int, 3>()); break;
        case 4: f(std::integral_constant<int, 4>()); break;
        case 5: f(std::integral_constant<int, 5>()); break;
        case 6: f(std::integral_constant<int, 6>()); break;
        case 7: f(std::integral_constant<int, 7>()); break;
        case 8: f(std::integral_constant<int, 8>()); break;
    }
}

// what the kernels know about tiles of h x w tokens
struct ggml_capsule_shape {
    static constexpr int N = 48; // blocks, padded

    int     n_blocks;
    int     n_pairs;
    bool    lone;              // the last block is a row alone
    uint8_t place [GGML_CAPSULE_MAX_ROWS]; // u*8 + v of each row
    float   factor[GGML_CAPSULE_MAX_ROWS]; // what the butterflies want each row multiplied by
    alignas(32) float pair_a[N]; // the factors of both rows of a pair over the root of 2; of a single row its own
    alignas(32) float pair_b[N];
    int32_t first [N];         // place of the first row of each block
    int32_t second[N];         // of the second one, 0 if there is none
    alignas(32) float pair[N]; // all bits where there is a second one, else none
    float   mix   [N];         // 1 over the root of 2 for pairs, 1 for single rows
    float   cos_h [GGML_CAPSULE_SIDE][GGML_CAPSULE_SIDE]; // [u][y]
    float   cos_w [GGML_CAPSULE_SIDE][GGML_CAPSULE_SIDE]; // [v][x]
    float   scale [GGML_CAPSULE_MAX_ROWS]; // u*8 + v: what the outputs of the fast transform of 8 x 8 weights are multiplied by
    alignas(32) float hidden[GGML_CAPSULE_MAX_ROWS]; // x*8 + y: 0, or -INFINITY where there is no token
};

const ggml_capsule_shape & ggml_capsule_shape_of(int h, int w);
