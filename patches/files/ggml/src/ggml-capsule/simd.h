#pragma once

#if defined(__aarch64__)
#include "simd-neon.h"
#else
#include <immintrin.h>

#define CAPSULE_INLINE static inline __attribute__((always_inline))
#endif

#include <cstdint>

//
// vectors of 16-bit integers: V::T has V::W lanes. Sums wrap; saturating ones run at half the rate on some CPUs.
//

#define CAPSULE_ALONE  static __attribute__((noinline))

typedef __m256i capsule_i256;

// the same 32 bits in all lanes
CAPSULE_INLINE capsule_i256 capsule_all(const int32_t * p) {
    return _mm256_castps_si256(_mm256_broadcast_ss((const float *) p));
}

struct capsule_v16 {
    static constexpr int W = 16;

    typedef __m256i T;

    CAPSULE_INLINE T    load(const int16_t * p)      { return _mm256_load_si256((const T *) p); }
    CAPSULE_INLINE T    loadu(const int16_t * p)     { return _mm256_loadu_si256((const T *) p); }
    CAPSULE_INLINE void store(int16_t * p, T x)      { _mm256_store_si256((T *) p, x); }
    CAPSULE_INLINE T    zero()                       { return _mm256_setzero_si256(); }
    CAPSULE_INLINE T    all(int x)                   { return _mm256_set1_epi16((short) x); }
    CAPSULE_INLINE T    add(T a, T b)                { return _mm256_add_epi16(a, b); }
    CAPSULE_INLINE T    sub(T a, T b)                { return _mm256_sub_epi16(a, b); }
    CAPSULE_INLINE T    mul(T a, T b)                { return _mm256_mulhrs_epi16(a, b); } // a*b/2^15, rounded
    CAPSULE_INLINE T    mul(T a, int c)              { return _mm256_mulhrs_epi16(a, all(c)); }
    CAPSULE_INLINE T    half(T a)                    { return _mm256_srai_epi16(a, 1); }
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
    CAPSULE_INLINE T    dot(T sum, T a, T b)         { return _mm256_dpwssd_epi32(sum, a, b); } // pairs, to 32 bits
#else
    CAPSULE_INLINE T    dot(T sum, T a, T b)         { return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b)); }
#endif
    CAPSULE_INLINE capsule_i256 fold(T a)            { return a; } // half the sums
    CAPSULE_INLINE T    join(const capsule_i256 * x) { return x[0]; }
    CAPSULE_INLINE T    gather(const int16_t * p, int) { return load(p); } // 16 lanes at p, at p + step ..
    CAPSULE_INLINE T    all32(const int32_t * p)     { return capsule_all(p); }

    // bytes -> words: 32 of them, two vectors
    CAPSULE_INLINE void widen(capsule_i256 x, T * o) {
        o[0] = _mm256_cvtepu8_epi16(_mm256_castsi256_si128(x));
        o[1] = _mm256_cvtepu8_epi16(_mm256_extracti128_si256(x, 1));
    }
    // o += sums*unit + f*row - z, 8 lanes; row: f16, or NULL
    CAPSULE_INLINE void add_sums(float * o, T sums, float unit, float z, const uint8_t * row, float f) {
        __m256 x = _mm256_sub_ps(_mm256_load_ps(o), _mm256_set1_ps(z));
        if (row) {
            x = _mm256_fmadd_ps(_mm256_set1_ps(f), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) row)), x);
        }
        _mm256_store_ps(o, _mm256_fmadd_ps(_mm256_set1_ps(unit), _mm256_cvtepi32_ps(sums), x));
    }
};

#if defined(__AVX512BW__) && defined(__AVX512VNNI__)
struct capsule_v32 {
    static constexpr int W = 32;

    typedef __m512i T;

    CAPSULE_INLINE T    load(const int16_t * p)      { return _mm512_load_si512(p); }
    CAPSULE_INLINE T    loadu(const int16_t * p)     { return _mm512_loadu_si512(p); }
    CAPSULE_INLINE void store(int16_t * p, T x)      { _mm512_store_si512(p, x); }
    CAPSULE_INLINE T    zero()                       { return _mm512_setzero_si512(); }
    CAPSULE_INLINE T    all(int x)                   { return _mm512_set1_epi16((short) x); }
    CAPSULE_INLINE T    add(T a, T b)                { return _mm512_add_epi16(a, b); }
    CAPSULE_INLINE T    sub(T a, T b)                { return _mm512_sub_epi16(a, b); }
    CAPSULE_INLINE T    mul(T a, T b)                { return _mm512_mulhrs_epi16(a, b); }
    CAPSULE_INLINE T    mul(T a, int c)              { return _mm512_mulhrs_epi16(a, all(c)); }
    CAPSULE_INLINE T    half(T a)                    { return _mm512_srai_epi16(a, 1); }
    CAPSULE_INLINE T    dot(T sum, T a, T b)         { return _mm512_dpwssd_epi32(sum, a, b); }
    CAPSULE_INLINE T    join(const capsule_i256 * x) {
        return _mm512_inserti64x4(_mm512_castsi256_si512(x[0]), x[1], 1);
    }
    CAPSULE_INLINE T    gather(const int16_t * p, int step) {
        return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_load_si256((const capsule_i256 *) p)), _mm256_load_si256((const capsule_i256 *) (p + step)), 1);
    }
    CAPSULE_INLINE T    all32(const int32_t * p)     { return _mm512_set1_epi32(*p); }
    CAPSULE_INLINE void widen(capsule_i256 x, T * o) { *o = _mm512_cvtepu8_epi16(x); }

    CAPSULE_INLINE void add_sums(float * o, T sums, float unit, float z, const uint8_t * row, float f) {
        __m512 x = _mm512_sub_ps(_mm512_loadu_ps(o), _mm512_set1_ps(z));
        if (row) {
            x = _mm512_fmadd_ps(_mm512_set1_ps(f), _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) row)), x);
        }
        _mm512_storeu_ps(o, _mm512_fmadd_ps(_mm512_set1_ps(unit), _mm512_cvtepi32_ps(sums), x));
    }
    CAPSULE_INLINE capsule_i256 fold(T a) {
        return _mm256_add_epi32(_mm512_castsi512_si256(a), _mm512_extracti64x4_epi64(a, 1));
    }
};
#endif

// four bytes of a times four of b, to 32 bits; no two products may leave 16 bits
CAPSULE_INLINE capsule_i256 capsule_dot_bytes(capsule_i256 sum, capsule_i256 a, capsule_i256 b) {
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
    return _mm256_dpbusd_epi32(sum, a, b);
#else
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), _mm256_set1_epi16(1)));
#endif
}

// eight sums of eight 32-bit lanes
CAPSULE_INLINE capsule_i256 capsule_sums(const capsule_i256 * a) {
    const __m256i b0 = _mm256_hadd_epi32(a[0], a[1]);
    const __m256i b1 = _mm256_hadd_epi32(a[2], a[3]);
    const __m256i b2 = _mm256_hadd_epi32(a[4], a[5]);
    const __m256i b3 = _mm256_hadd_epi32(a[6], a[7]);
    const __m256i c0 = _mm256_hadd_epi32(b0, b1);
    const __m256i c1 = _mm256_hadd_epi32(b2, b3);
    return _mm256_add_epi32(_mm256_permute2x128_si256(c0, c1, 0x20), _mm256_permute2x128_si256(c0, c1, 0x31));
}

CAPSULE_INLINE __m128i capsule_sums4(const capsule_i256 * a) {
    const __m256i b = _mm256_hadd_epi32(_mm256_hadd_epi32(a[0], a[1]), _mm256_hadd_epi32(a[2], a[3]));
    return _mm_add_epi32(_mm256_castsi256_si128(b), _mm256_extracti128_si256(b, 1));
}

// eight maxima of eight lanes
CAPSULE_INLINE __m256 capsule_maxima(const __m256 * a) {
    auto two = [](__m256 x, __m256 y) { return _mm256_max_ps(_mm256_unpacklo_ps(x, y), _mm256_unpackhi_ps(x, y)); }; // x y x y
    auto four = [](__m256 x, __m256 y) { return _mm256_max_ps(_mm256_shuffle_ps(x, y, 0x44), _mm256_shuffle_ps(x, y, 0xee)); };
    const __m256 x = four(two(a[0], a[1]), two(a[2], a[3]));
    const __m256 y = four(two(a[4], a[5]), two(a[6], a[7]));
    return _mm256_max_ps(_mm256_permute2f128_ps(x, y, 0x20), _mm256_permute2f128_ps(x, y, 0x31));
}

// n of 64 numbers
CAPSULE_INLINE void capsule_pick(const float * x, const int32_t * index, int n, float * o) {
#if defined(__AVX512F__)
    const __m512 x0 = _mm512_loadu_ps(x);
    const __m512 x1 = _mm512_loadu_ps(x + 16);
    const __m512 x2 = _mm512_loadu_ps(x + 32);
    const __m512 x3 = _mm512_loadu_ps(x + 48);
    for (int i = 0; i < n; i += 16) {
        const __m512i  at  = _mm512_loadu_si512(index + i);
        const __mmask16 up = _mm512_test_epi32_mask(at, _mm512_set1_epi32(32));
        _mm512_storeu_ps(o + i, _mm512_mask_blend_ps(up, _mm512_permutex2var_ps(x0, at, x1), _mm512_permutex2var_ps(x2, at, x3)));
    }
#else
    for (int i = 0; i < n; ++i) {
        o[i] = x[index[i]];
    }
#endif
}

#if defined(__aarch64__)
CAPSULE_INLINE float capsule_max(__m256 x) { return vmaxvq_f32(vmaxq_f32(x.v[0], x.v[1])); }
CAPSULE_INLINE float capsule_sum(__m256 x) { return vaddvq_f32(vaddq_f32(x.v[0], x.v[1])); }
#else
CAPSULE_INLINE float capsule_max(__m256 x) {
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}

CAPSULE_INLINE float capsule_sum(__m256 x) {
    __m128 m = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    m = _mm_add_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_add_ss(m, _mm_movehdup_ps(m)));
}
#endif

CAPSULE_INLINE __m256 capsule_abs(__m256 x) {
    return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x);
}

// exp of x <= 0, relative error 2e-7
CAPSULE_INLINE __m256 capsule_exp(__m256 x) {
    x = _mm256_max_ps(_mm256_set1_ps(-87.3f), x); // what is not a number stays so
    const __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)), 0);
    const __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(1.42860677e-6f), _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693145752f), x));
    __m256 p = _mm256_fmadd_ps(r, _mm256_set1_ps(1/720.0f), _mm256_set1_ps(1/120.0f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1/24.0f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1/6.0f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(0.5f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f));
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23)));
}

// forward DCT of 8; output k is sqrt(8)*aan(k) times the orthonormal one
CAPSULE_INLINE void capsule_fdct8(__m256 * x) {
    auto add = [](__m256 a, __m256 b) { return _mm256_add_ps(a, b); };
    auto sub = [](__m256 a, __m256 b) { return _mm256_sub_ps(a, b); };

    const __m256 t0 = add(x[0], x[7]), t7 = sub(x[0], x[7]);
    const __m256 t1 = add(x[1], x[6]), t6 = sub(x[1], x[6]);
    const __m256 t2 = add(x[2], x[5]), t5 = sub(x[2], x[5]);
    const __m256 t3 = add(x[3], x[4]), t4 = sub(x[3], x[4]);
    const __m256 e0 = add(t0, t3), e3 = sub(t0, t3);
    const __m256 e1 = add(t1, t2), e2 = sub(t1, t2);
    const __m256 c4 = _mm256_set1_ps(0.70710678f);

    x[0] = add(e0, e1);
    x[4] = sub(e0, e1);
    const __m256 z1 = _mm256_mul_ps(add(e2, e3), c4);
    x[2] = add(e3, z1);
    x[6] = sub(e3, z1);

    const __m256 a = add(t4, t5), b = add(t5, t6), c = add(t6, t7);
    const __m256 z5  = _mm256_mul_ps(sub(a, c), _mm256_set1_ps(0.38268343f));
    const __m256 z2  = _mm256_fmadd_ps(a, _mm256_set1_ps(0.54119610f), z5);
    const __m256 z4  = _mm256_fmadd_ps(c, _mm256_set1_ps(1.30656296f), z5);
    const __m256 z3  = _mm256_mul_ps(b, c4);
    const __m256 z11 = add(t7, z3), z13 = sub(t7, z3);
    x[5] = add(z13, z2);
    x[3] = sub(z13, z2);
    x[1] = add(z11, z4);
    x[7] = sub(z11, z4);
}

CAPSULE_INLINE void capsule_transpose8(__m256 * r) {
    __m256 t[8], u[8];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        t[2*i]     = _mm256_unpacklo_ps(r[2*i], r[2*i + 1]);
        t[2*i + 1] = _mm256_unpackhi_ps(r[2*i], r[2*i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
        u[4*i]     = _mm256_shuffle_ps(t[4*i],     t[4*i + 2], 0x44);
        u[4*i + 1] = _mm256_shuffle_ps(t[4*i],     t[4*i + 2], 0xee);
        u[4*i + 2] = _mm256_shuffle_ps(t[4*i + 1], t[4*i + 3], 0x44);
        u[4*i + 3] = _mm256_shuffle_ps(t[4*i + 1], t[4*i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        r[i]     = _mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
        r[i + 4] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
    }
}
