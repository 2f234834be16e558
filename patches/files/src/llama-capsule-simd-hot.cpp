#include "llama-capsule-simd-avx2.h"

//
// rows of hot cells, far apart in memory, for few queries: read once, not copied
//

#ifdef CAPSULE_AVX2

static constexpr int ROWS = 4; // at a time: as many streams of memory

// values of a row, N at a time
struct rows_f16 {
    static constexpr uint32_t N = 8;

    INLINE void load(const uint8_t * x, uint32_t i, __m256 * v) {
        v[0] = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) (x + 2*i)));
    }
};

struct rows_q8_0 {
    static constexpr uint32_t N = QK;

    INLINE void load(const uint8_t * x, uint32_t i, __m256 * v) {
        x += i/QK*Q8_SIZE;

        const __m256 scale = _mm256_set1_ps(half_at(x));
        for (int j = 0; j < 4; ++j) {
            const __m256i codes = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *) (x + 2 + 8*j)));
            v[j] = _mm256_mul_ps(scale, _mm256_cvtepi32_ps(codes));
        }
    }
};

template<typename T, int Q, int R>
INLINE void dot_tile(uint32_t d, const uint8_t * x, size_t stride, const float * y, size_t ld_y, __m256 (&acc)[Q][R]) {
#pragma GCC unroll 8
    for (int q = 0; q < Q; ++q) {
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            acc[q][r] = _mm256_setzero_ps();
        }
    }
    for (uint32_t i = 0; i < d; i += T::N) {
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            __m256 v[T::N/8];
            T::load(x + r*stride, i, v);
#pragma GCC unroll 8
            for (int q = 0; q < Q; ++q) {
#pragma GCC unroll 8
                for (uint32_t j = 0; j < T::N/8; ++j) {
                    acc[q][r] = _mm256_fmadd_ps(v[j], _mm256_loadu_ps(y + q*ld_y + i + 8*j), acc[q][r]);
                }
            }
        }
    }
}

template<typename T, int Q>
TARGET static void dot(uint32_t n_x, uint32_t d, const uint8_t * x, size_t stride, const float * y, size_t ld_y, float * out, size_t ld_out) {
    uint32_t j = 0;
    for (; j + ROWS <= n_x; j += ROWS, x += ROWS*stride) {
        __m256 acc[Q][ROWS];
        dot_tile<T>(d, x, stride, y, ld_y, acc);
        for (int q = 0; q < Q; ++q) {
            _mm_storeu_ps(out + q*ld_out + j, sum4(acc[q][0], acc[q][1], acc[q][2], acc[q][3]));
        }
    }
    for (; j < n_x; ++j, x += stride) {
        __m256 acc[Q][1];
        dot_tile<T>(d, x, stride, y, ld_y, acc);
        for (int q = 0; q < Q; ++q) {
            out[q*ld_out + j] = sum1(acc[q][0]);
        }
    }
}

// C vectors of each of Q outputs
template<typename T, int Q, int C>
INLINE void mul_cols(uint32_t n_x, const float * w, size_t ld_w, const uint8_t * x, size_t stride, uint32_t i0, float * out, size_t ld_out) {
    __m256 acc[Q][C];
#pragma GCC unroll 8
    for (int q = 0; q < Q; ++q) {
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) {
            acc[q][c] = _mm256_loadu_ps(out + q*ld_out + i0 + 8*c);
        }
    }
    for (uint32_t r = 0; r < n_x; ++r) {
#pragma GCC unroll 8
        for (int c = 0; c < C; c += T::N/8) {
            __m256 v[T::N/8];
            T::load(x + r*stride, i0 + 8*c, v);
#pragma GCC unroll 8
            for (int q = 0; q < Q; ++q) {
                const __m256 f = _mm256_broadcast_ss(w + q*ld_w + r);
#pragma GCC unroll 8
                for (uint32_t j = 0; j < T::N/8; ++j) {
                    acc[q][c + j] = _mm256_fmadd_ps(f, v[j], acc[q][c + j]);
                }
            }
        }
    }
#pragma GCC unroll 8
    for (int q = 0; q < Q; ++q) {
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) {
            _mm256_storeu_ps(out + q*ld_out + i0 + 8*c, acc[q][c]);
        }
    }
}

template<typename T, int Q>
TARGET static void mul(uint32_t n_x, uint32_t d, const float * w, size_t ld_w, const uint8_t * x, size_t stride, float * out, size_t ld_out) {
    constexpr int C = 8/Q;

    uint32_t i = 0;
    for (; i + 8*C <= d; i += 8*C) {
        mul_cols<T, Q, C>(n_x, w, ld_w, x, stride, i, out, ld_out);
    }
    for (; i < d; i += T::N) {
        mul_cols<T, Q, T::N/8>(n_x, w, ld_w, x, stride, i, out, ld_out);
    }
}

TARGET void llama_capsule_dot_cells_avx2(ggml_type type, uint32_t n_x, uint32_t n_y, uint32_t d, const uint8_t * x, size_t stride,
        const float * y, size_t ld_y, float * out, size_t ld_out) {
    const bool f16 = type == GGML_TYPE_F16;

    const auto two = f16 ? dot<rows_f16, 2> : dot<rows_q8_0, 2>;
    for (; n_y >= 2; n_y -= 2, y += 2*ld_y, out += 2*ld_out) {
        two(n_x, d, x, stride, y, ld_y, out, ld_out);
    }
    if (n_y > 0) {
        (f16 ? dot<rows_f16, 1> : dot<rows_q8_0, 1>)(n_x, d, x, stride, y, ld_y, out, ld_out);
    }
}

TARGET void llama_capsule_mul_cells_avx2(ggml_type type, uint32_t n_out, uint32_t n_x, uint32_t d, const float * w, size_t ld_w,
        const uint8_t * x, size_t stride, float * out, size_t ld_out) {
    const bool f16 = type == GGML_TYPE_F16;

    const auto two = f16 ? mul<rows_f16, 2> : mul<rows_q8_0, 2>;
    for (; n_out >= 2; n_out -= 2, w += 2*ld_w, out += 2*ld_out) {
        two(n_x, d, w, ld_w, x, stride, out, ld_out);
    }
    if (n_out > 0) {
        (f16 ? mul<rows_f16, 1> : mul<rows_q8_0, 1>)(n_x, d, w, ld_w, x, stride, out, ld_out);
    }
}

#endif // CAPSULE_AVX2
