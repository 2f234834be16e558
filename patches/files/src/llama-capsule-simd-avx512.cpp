#include "llama-capsule-simd.h"

//
// AVX-512 with VNNI: what gains by vectors of 64 bytes or by products of four bytes, the rest is that of AVX2
//

#if defined(__x86_64__) && (defined(__clang__) ? defined(__GNUC__) : __GNUC__ >= 9)
#define CAPSULE_AVX512
#include <immintrin.h>

#ifndef __clang__ // in GCC's own header: PR 105593
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#ifdef SIMDE_VERSION // emulated on any machine: scripts/check_simd
#define TARGET
#define SUPPORTS(name) true
#else
#define TARGET __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")))
#define SUPPORTS(name) __builtin_cpu_supports(name)
#endif

#define INLINE TARGET __attribute__((always_inline)) static inline
#include "llama-capsule-simd-score.h"

// the halves of a vector, added
INLINE __m256 fold(__m512 a) {
    return _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
}

static llama_capsule_simd base; // for the last 8 values, and for queries

void llama_capsule_to_codes_avx2(ggml_type type, uint32_t d, uint32_t n, const llama_capsule_lane * lanes, llama_capsule_codes * codes);

namespace {

struct avx512 {
    static constexpr int N = 16;

    typedef __m512  F;
    typedef __m512i I;
    typedef __m128i B;

    INLINE F    load (const float * x)   { return _mm512_loadu_ps(x); }
    INLINE void store(float * x, F a)    { _mm512_storeu_ps(x, a); }
    INLINE F    set1 (float x)           { return _mm512_set1_ps(x); }
    INLINE F    add  (F a, F b)          { return _mm512_add_ps(a, b); }
    INLINE F    sub  (F a, F b)          { return _mm512_sub_ps(a, b); }
    INLINE F    mul  (F a, F b)          { return _mm512_mul_ps(a, b); }
    INLINE F    max  (F a, F b)          { return _mm512_max_ps(a, b); }
    INLINE F    abs  (F a)               { return _mm512_abs_ps(a); }
    INLINE F    fma  (F a, F b, F c)     { return _mm512_fmadd_ps(a, b, c); }
    INLINE F    round(F a)               { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT); }
    INLINE F    exp2 (F n)               { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23)); }

    INLINE F where_greater(F x, F y, F a) { // else 0
        return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, y, _CMP_GT_OQ), a);
    }

    INLINE float max1(F a) {
        const __m256 x = _mm256_max_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
        const __m128 s = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
        const __m128 t = _mm_max_ps(s, _mm_movehl_ps(s, s));

        return _mm_cvtss_f32(_mm_max_ss(t, _mm_movehdup_ps(t)));
    }

    INLINE float sum(F a) {
        const __m256 x = fold(a);
        const __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
        const __m128 t = _mm_add_ps(s, _mm_movehl_ps(s, s));

        return _mm_cvtss_f32(_mm_add_ss(t, _mm_movehdup_ps(t)));
    }

    INLINE void sum4(const F * a, float * out) {
        const __m256 s = _mm256_hadd_ps(_mm256_hadd_ps(fold(a[0]), fold(a[1])), _mm256_hadd_ps(fold(a[2]), fold(a[3])));

        _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
    }

    INLINE F hadamard(F a) {
        a = _mm512_fmadd_ps(a, _mm512_setr_ps(1, -1,  1, -1,  1, -1,  1, -1,  1, -1,  1, -1,  1, -1,  1, -1), _mm512_shuffle_ps(a, a, 0xb1));
        a = _mm512_fmadd_ps(a, _mm512_setr_ps(1,  1, -1, -1,  1,  1, -1, -1,  1,  1, -1, -1,  1,  1, -1, -1), _mm512_shuffle_ps(a, a, 0x4e));
        a = _mm512_fmadd_ps(a, _mm512_setr_ps(1,  1,  1,  1, -1, -1, -1, -1,  1,  1,  1,  1, -1, -1, -1, -1), _mm512_shuffle_f32x4(a, a, 0xb1));
        a = _mm512_fmadd_ps(a, _mm512_setr_ps(1,  1,  1,  1,  1,  1,  1,  1, -1, -1, -1, -1, -1, -1, -1, -1), _mm512_shuffle_f32x4(a, a, 0x4e));
        return a;
    }

    INLINE F load_half(const uint8_t * p) {
        return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) p));
    }

    INLINE float half(const uint8_t * p) {
        uint16_t h;
        memcpy(&h, p, sizeof(h));
        return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(h)));
    }

    // one of each row
    INLINE F halves(const uint8_t * const * rows, size_t offs) {
        uint16_t h[N];
        for (int i = 0; i < N; ++i) {
            memcpy(h + i, rows[i] + offs, sizeof(h[i]));
        }
        return load_half((const uint8_t *) h);
    }

    INLINE B    load_b (const uint8_t * p)     { return _mm_loadu_si128((const __m128i *) p); }
    INLINE void store_b(uint32_t * p, B a)     { _mm_storeu_si128((__m128i *) p, a); }
    INLINE B    sub_b  (B a, int x)            { return _mm_sub_epi8(a, _mm_set1_epi8(x)); }

    template<int SHIFT, int MASK>
    INLINE B bits(B a) {
        return _mm_and_si128(_mm_srli_epi16(a, SHIFT), _mm_set1_epi8(MASK));
    }

    // byte i of each of four, side by side
    INLINE void interleave(B * x) {
        const __m128i a0 = _mm_unpacklo_epi8(x[0], x[1]);
        const __m128i a1 = _mm_unpackhi_epi8(x[0], x[1]);
        const __m128i b0 = _mm_unpacklo_epi8(x[2], x[3]);
        const __m128i b1 = _mm_unpackhi_epi8(x[2], x[3]);

        x[0] = _mm_unpacklo_epi16(a0, b0);
        x[1] = _mm_unpackhi_epi16(a0, b0);
        x[2] = _mm_unpacklo_epi16(a1, b1);
        x[3] = _mm_unpackhi_epi16(a1, b1);
    }

    // 16 signed codes
    INLINE void widen(B codes, F * v) {
        v[0] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes));
    }

    // acc[i] += a[4*i..] b[4*i..], a without signs
    INLINE I    dot         (I acc, I a, I b)     { return _mm512_dpbusd_epi32(acc, a, b); }
    INLINE I    load_int    (const uint32_t * x)  { return _mm512_loadu_si512(x); }
    INLINE void store_int   (int32_t * x, I a)    { _mm512_storeu_si512(x, a); }
    INLINE I    set1_int    (uint32_t x)          { return _mm512_set1_epi32(x); }
    INLINE I    sub_int     (I a, I b)            { return _mm512_sub_epi32(a, b); }
    INLINE I    shift_left_8(I a)                 { return _mm512_slli_epi32(a, 8); }
    INLINE I    to_int      (F a)                 { return _mm512_cvtps_epi32(a); }
    INLINE F    to_float    (I a)                 { return _mm512_cvtepi32_ps(a); }

    // the codes of 4 columns each, one in two bits of a byte
    INLINE void store_crumbs(uint32_t * dst, B x) {
        const __m512i i = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
        const __m512i s = _mm512_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6, 0, 2, 4, 6, 0, 2, 4, 6);
        const __m512i y = _mm512_srlv_epi32(_mm512_permutexvar_epi32(i, _mm512_broadcast_i32x4(x)), s);

        _mm512_storeu_si512(dst, _mm512_and_si512(y, _mm512_set1_epi32(0x03030303)));
    }

    // queries are those of AVX2: pairs of sums of 16 bits, times -8
    static size_t query_size(uint32_t d) { return base.query_size(d); }

    INLINE int32_t code_sum(const int8_t * sums, uint32_t b) {
        int16_t x[2];
        memcpy(x, sums + sizeof(x)*b, sizeof(x));
        return (x[0] + x[1])/-8;
    }

    static void to_codes(ggml_type type, uint32_t d, uint32_t n, const llama_capsule_lane * lanes, llama_capsule_codes * codes) {
        llama_capsule_to_codes_avx2(type, d, n, lanes, codes);
    }

    INLINE uint32_t first_sum(int32_t sums, int32_t zero) {
        return zero*((int16_t) sums + (sums >> 16));
    }

    // words of two rows, side by side for each slot
    INLINE I load_lanes(const uint32_t * x) {
        int64_t two;
        memcpy(&two, x, sizeof(two));
        return _mm512_set1_epi64(two);
    }

    INLINE F to_scale(I a) { return _mm512_castsi512_ps(a); }

    INLINE void add_scores(float * out, const uint32_t * tokens, F a) {
        const __m512i apart = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
        const __m512  x     = _mm512_permutexvar_ps(apart, a);

        _mm256_store_ps(out + 8*tokens[0], _mm256_add_ps(_mm256_load_ps(out + 8*tokens[0]), _mm512_castps512_ps256(x)));
        _mm256_store_ps(out + 8*tokens[1], _mm256_add_ps(_mm256_load_ps(out + 8*tokens[1]), _mm512_extractf32x8_ps(x, 1)));
    }

    // codes with signs become codes without
    static constexpr int ZERO_Q8 = 128;

    INLINE I signed_codes(I a) { return _mm512_xor_si512(a, _mm512_set1_epi32(0x80808080)); }

    template<int SHIFT, int MASK>
    INLINE I bits_int(I a) {
        return _mm512_and_si512(_mm512_srli_epi16(a, SHIFT), _mm512_set1_epi8(MASK));
    }

    // 16 bytes of each row: x[i] has word i of all
    INLINE void load_words(const uint8_t * const * rows, size_t offs, I * x) {
        __m512i y[4];
        for (int i = 0; i < 4; ++i) {
            y[i] = _mm512_castsi128_si512(load_b(rows[i] + offs));
            y[i] = _mm512_inserti32x4(y[i], load_b(rows[i +  4] + offs), 1);
            y[i] = _mm512_inserti32x4(y[i], load_b(rows[i +  8] + offs), 2);
            y[i] = _mm512_inserti32x4(y[i], load_b(rows[i + 12] + offs), 3);
        }
        const __m512i z0 = _mm512_unpacklo_epi32(y[0], y[1]);
        const __m512i z1 = _mm512_unpackhi_epi32(y[0], y[1]);
        const __m512i z2 = _mm512_unpacklo_epi32(y[2], y[3]);
        const __m512i z3 = _mm512_unpackhi_epi32(y[2], y[3]);

        x[0] = _mm512_unpacklo_epi64(z0, z2);
        x[1] = _mm512_unpackhi_epi64(z0, z2);
        x[2] = _mm512_unpacklo_epi64(z1, z3);
        x[3] = _mm512_unpackhi_epi64(z1, z3);
    }

    // pairs of 16 bits
    INLINE I load_pairs(const int16_t * x) { return _mm512_loadu_si512(x); }

    INLINE I dot_pairs(I acc, I a, const int16_t * b) {
        int32_t pair;
        memcpy(&pair, b, sizeof(pair));
        return _mm512_dpwssd_epi32(acc, a, _mm512_set1_epi32(pair));
    }

    static constexpr uint32_t N_WEIGHTS = 32;

    // basis times factors of four rows, high and low bytes; see llama_capsule_int_basis for the order
    INLINE void store_weights(const int16_t * basis, size_t ld, const int16_t * factors, uint32_t * hi, uint32_t * lo) {
        const __mmask64 odd = 0xaaaaaaaaaaaaaaaa;

        __m512i x[4]; // the weights
        __m512i y[4]; // rounded to their high bytes
        for (int k = 0; k < 4; ++k) {
            x[k] = _mm512_mulhrs_epi16(_mm512_loadu_si512(basis + k*ld), _mm512_set1_epi16(factors[k]));
            y[k] = _mm512_add_epi16(x[k], _mm512_set1_epi16(128));
        }
        store_quads(_mm512_mask_blend_epi8(odd, _mm512_srli_epi16(y[0], 8), y[1]), _mm512_mask_blend_epi8(odd, _mm512_srli_epi16(y[2], 8), y[3]), hi);
        if (lo) {
            store_quads(_mm512_mask_blend_epi8(odd, x[0], _mm512_slli_epi16(x[1], 8)), _mm512_mask_blend_epi8(odd, x[2], _mm512_slli_epi16(x[3], 8)), lo);
        }
    }

    INLINE void store_quads(__m512i a, __m512i b, uint32_t * dst) {
        const __m512i x = _mm512_unpacklo_epi16(a, b);
        const __m512i y = _mm512_unpackhi_epi16(a, b);

        _mm512_storeu_si512(dst,      _mm512_shuffle_i64x2(x, y, 0x44));
        _mm512_storeu_si512(dst + 16, _mm512_shuffle_i64x2(x, y, 0xee));
    }
};

}

TARGET static void mul_avx512(uint32_t n_out, uint32_t n_rows, uint32_t d, const float * w, size_t w_r, size_t w_t, const float * x, size_t ld_x,
        const float * init, float * out, size_t ld_out) {
    const uint32_t n = d/16*16;

    mul_vec<avx512>(n_out, n_rows, n, w, w_r, w_t, x, ld_x, init, out, ld_out);
    if (n < d) {
        base.mul(n_out, n_rows, d - n, w, w_r, w_t, x + n, ld_x, init ? init + n : nullptr, out + n, ld_out);
    }
}

static void dot_avx512(uint32_t n_x, uint32_t n_y, uint32_t d, const float * x, size_t ld_x, const float * y, size_t ld_y, float * out, size_t ld_out) {
    (d % 16 == 0 ? dot_vec<avx512> : base.dot)(n_x, n_y, d, x, ld_x, y, ld_y, out, ld_out);
}

static float exp_sum_avx512(float * s, float max, uint32_t n) {
    const uint32_t n16 = n/16*16;

    return exp_sum_vec<avx512>(s, max, n16) + (n16 < n ? base.exp_sum(s + n16, max, n - n16) : 0.0f);
}

static void dot_cells_avx512(ggml_type type, uint32_t n_x, uint32_t n_y, uint32_t d, const uint8_t * x, size_t stride,
        const float * y, size_t ld_y, float * out, size_t ld_out) {
    (d % 16 == 0 ? dot_cells_vec<avx512> : base.dot_cells)(type, n_x, n_y, d, x, stride, y, ld_y, out, ld_out);
}

static void mul_cells_avx512(ggml_type type, uint32_t n_out, uint32_t n_x, uint32_t d, const float * w, size_t ld_w,
        const uint8_t * x, size_t stride, float * out, size_t ld_out) {
    (d % 16 == 0 ? mul_cells_vec<avx512> : base.mul_cells)(type, n_out, n_x, d, w, ld_w, x, stride, out, ld_out);
}

static void project_avx512(const llama_capsule_project & p, uint32_t n_v, const float * x, size_t ld_x, const float * scales, const float * means, size_t ld_s,
        const float * phi, float * out) {
    (p.n_out % 16 == 0 ? project_vec<avx512> : base.project)(p, n_v, x, ld_x, scales, means, ld_s, phi, out);
}

#endif // CAPSULE_AVX512

void llama_capsule_simd_add_avx512(std::vector<llama_capsule_simd> & all) {
#ifdef CAPSULE_AVX512
    if (!SUPPORTS("avx512f") || !SUPPORTS("avx512bw") || !SUPPORTS("avx512dq") || !SUPPORTS("avx512vl") || !SUPPORTS("avx512vnni")) {
        return;
    }
    llama_capsule_simd s = all.back();

    base = s;

    s.name       = "avx512";
    s.mul        = mul_avx512;
    s.dot        = dot_avx512;
    s.exp_sum    = exp_sum_avx512;
    s.hadamard   = hadamard_vec<avx512>;
    s.to_float   = to_float_vec<avx512>;
    s.mul_int    = mul_int_vec<avx512>;
    s.n_lanes    = avx512::N;
    s.to_lanes   = to_lanes_vec<avx512>;
    s.score_rows = score_rows_vec<avx512>;
    s.mul_rows   = mul_rows_vec<avx512>;
    s.dot_cells  = dot_cells_avx512;
    s.mul_cells  = mul_cells_avx512;
    s.dot_rows   = dot_rows_vec<avx512>;
    s.project    = project_avx512;
    all.push_back(s);
#else
    GGML_UNUSED(all);
#endif
}
