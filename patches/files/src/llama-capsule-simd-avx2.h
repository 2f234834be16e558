#pragma once

#include "llama-capsule-simd.h"

#include <cstring>

// what the files with AVX2 share

#if defined(__x86_64__) && defined(__GNUC__)
#define CAPSULE_AVX2
#include <immintrin.h>

#define TARGET __attribute__((target("avx2,fma,f16c")))
#define INLINE TARGET __attribute__((always_inline)) static inline

// not inlined: in a large function GCC keeps the sums of a tile in memory, as it does where it does not unroll their loops early
#define ALONE __attribute__((noinline)) TARGET static

INLINE __m128 sum4(__m256 a0, __m256 a1, __m256 a2, __m256 a3) {
    const __m256 s = _mm256_hadd_ps(_mm256_hadd_ps(a0, a1), _mm256_hadd_ps(a2, a3));

    return _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
}

INLINE float sum1(__m256 a) {
    const __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 t = _mm_add_ps(s, _mm_movehl_ps(s, s));

    return _mm_cvtss_f32(_mm_add_ss(t, _mm_movehdup_ps(t)));
}

INLINE float max1(__m256 a) {
    const __m128 s = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 t = _mm_max_ps(s, _mm_movehl_ps(s, s));

    return _mm_cvtss_f32(_mm_max_ss(t, _mm_movehdup_ps(t)));
}

INLINE float half_at(const uint8_t * p) {
    uint16_t h;
    memcpy(&h, p, sizeof(h));
    return _cvtsh_ss(h);
}

// the codes 0..15 of 32 values
INLINE __m256i codes_q4(const uint8_t * qs) {
    const __m128i x = _mm_loadu_si128((const __m128i *) qs);
    const __m128i m = _mm_set1_epi8(15);

    return _mm256_set_m128i(_mm_and_si128(_mm_srli_epi16(x, 4), m), _mm_and_si128(x, m));
}

// the codes 0..3 of 64 values
INLINE void codes_q2(const uint8_t * qs, __m256i & lo, __m256i & hi) {
    const __m128i x = _mm_loadu_si128((const __m128i *) qs);
    const __m128i m = _mm_set1_epi8(3);

    const __m128i c0 = _mm_and_si128(x, m);
    const __m128i c1 = _mm_and_si128(_mm_srli_epi16(x, 2), m);
    const __m128i c2 = _mm_and_si128(_mm_srli_epi16(x, 4), m);
    const __m128i c3 = _mm_and_si128(_mm_srli_epi16(x, 6), m);

    const __m128i a0 = _mm_unpacklo_epi8(c0, c1);
    const __m128i a1 = _mm_unpackhi_epi8(c0, c1);
    const __m128i b0 = _mm_unpacklo_epi8(c2, c3);
    const __m128i b1 = _mm_unpackhi_epi8(c2, c3);

    lo = _mm256_set_m128i(_mm_unpackhi_epi16(a0, b0), _mm_unpacklo_epi16(a0, b0));
    hi = _mm256_set_m128i(_mm_unpackhi_epi16(a1, b1), _mm_unpacklo_epi16(a1, b1));
}

// llama-capsule-simd-encode.cpp
void llama_capsule_from_float_avx2(ggml_type type, const float * x, void * dst, uint32_t d);

// 64 values, without a scale; the order of the operations is that of llama_capsule_hadamard(), and so are the bits
INLINE void hadamard_64(__m256 * v) {
    const __m256 s1 = _mm256_setr_ps(1, -1,  1, -1,  1, -1,  1, -1);
    const __m256 s2 = _mm256_setr_ps(1,  1, -1, -1,  1,  1, -1, -1);
    const __m256 s4 = _mm256_setr_ps(1,  1,  1,  1, -1, -1, -1, -1);

    for (int i = 0; i < 8; ++i) {
        v[i] = _mm256_fmadd_ps(v[i], s1, _mm256_permute_ps(v[i], 0xb1));
        v[i] = _mm256_fmadd_ps(v[i], s2, _mm256_permute_ps(v[i], 0x4e));
        v[i] = _mm256_fmadd_ps(v[i], s4, _mm256_permute2f128_ps(v[i], v[i], 0x01));
    }
    for (int h = 1; h < 8; h *= 2) {
        for (int i = 0; i < 8; ++i) {
            if ((i & h) == 0) {
                const __m256 a = v[i];
                const __m256 b = v[i + h];

                v[i]     = _mm256_add_ps(a, b);
                v[i + h] = _mm256_sub_ps(a, b);
            }
        }
    }
}

INLINE void hadamard_64(float * x, float scale) {
    const __m256 sc = _mm256_set1_ps(scale);

    __m256 v[8];
    for (int i = 0; i < 8; ++i) {
        v[i] = _mm256_loadu_ps(x + 8*i);
    }
    hadamard_64(v);
    for (int i = 0; i < 8; ++i) {
        _mm256_storeu_ps(x + 8*i, _mm256_mul_ps(v[i], sc));
    }
}

// llama-capsule-simd-score.cpp
void llama_capsule_to_lanes_avx2(ggml_type type, uint32_t d, uint32_t n, const llama_capsule_lane * lanes);

void llama_capsule_score_rows_avx2(const llama_capsule_score & s, ggml_type type, uint32_t g0, uint32_t n_rows, uint32_t n_src, const uint8_t * const * src,
        float * out);

void llama_capsule_to_slots_avx2(uint32_t n, const float * x, float * const * out);

// llama-capsule-simd-basis.cpp
void llama_capsule_mul_int_avx2(uint32_t n_out, uint32_t d, const int16_t * basis, const float * basis_max, const llama_capsule_int_rows & rows, float * out, size_t ld_out);

// llama-capsule-simd-rows.cpp
void llama_capsule_mul_rows_avx2(ggml_type type, uint32_t n_out, uint32_t n_rows, uint32_t d, const float * w, size_t ld_w, const uint8_t * src, const uint8_t * next,
        float * out, size_t ld_out);

// llama-capsule-simd-hot.cpp
void llama_capsule_dot_cells_avx2(ggml_type type, uint32_t n_x, uint32_t n_y, uint32_t d, const uint8_t * x, size_t stride,
        const float * y, size_t ld_y, float * out, size_t ld_out);

void llama_capsule_mul_cells_avx2(ggml_type type, uint32_t n_out, uint32_t n_x, uint32_t d, const float * w, size_t ld_w,
        const uint8_t * x, size_t stride, float * out, size_t ld_out);

//
// a query, for AVX-512 too: codes [d], codes in the order of q2_0 [d], offsets of q4_0 [d/32], offsets of q2_0 [d/64]
//   offset: minus the sum of the codes times the one that stands for 0 in a row; two of 16 bits, of every other pair of codes
//

inline constexpr size_t query_size(uint32_t d) {
    return 2*d + 4*(d/QK + d/QK2);
}

static constexpr int Q4_ZERO = 8;
static constexpr int Q2_ZERO = 1;

// llama-capsule-simd-query.cpp
void llama_capsule_to_codes_avx2(ggml_type type, uint32_t d, uint32_t n, const llama_capsule_lane * lanes, llama_capsule_codes * codes);

size_t llama_capsule_query_size_avx2(uint32_t d);

float llama_capsule_to_query_avx2(const llama_capsule_view & view, const float * x, void * dst, float & dot_mean);

// llama-capsule-simd-project.cpp
void llama_capsule_dot_rows_avx2(ggml_type type, uint32_t d, uint32_t n_rows, const uint8_t * src, uint32_t n_v, const void * queries, float * out, size_t ld_out);

void llama_capsule_project_avx2(const llama_capsule_project & p, uint32_t n_v, const float * x, size_t ld_x, const float * scales, const float * means, size_t ld_s,
        const float * phi, float * out);

#endif // CAPSULE_AVX2
