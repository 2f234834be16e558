#include "llama-capsule-simd-avx2.h"

//
// AVX2: rows of `retain` as they are stored, each against a query of its own
//

#ifdef CAPSULE_AVX2

#include "llama-capsule-simd-score.h"

namespace {

struct avx2 {
    static constexpr int N = 8;

    typedef __m256  F;
    typedef __m256i I;

    INLINE F    load (const float * x)           { return _mm256_loadu_ps(x); }
    INLINE void store(float * x, F a)            { _mm256_storeu_ps(x, a); }
    INLINE F    set1 (float x)                   { return _mm256_set1_ps(x); }
    INLINE F    mul  (F a, F b)                  { return _mm256_mul_ps(a, b); }
    INLINE F    fma  (F a, F b, F c)             { return _mm256_fmadd_ps(a, b, c); }
    // once into a register
    INLINE I load_int(const uint32_t * x) {
        __m256i res = _mm256_loadu_si256((const __m256i *) x);
        __asm__("" : "+x"(res));
        return res;
    }

    INLINE void store_int(int32_t * x, I a)      { _mm256_storeu_si256((__m256i *) x, a); }
    INLINE I    sub_int (I a, I b)               { return _mm256_sub_epi32(a, b); }
    INLINE F    to_float(I a)                    { return _mm256_cvtepi32_ps(a); }

    static constexpr int ZERO_Q8 = 0;

    INLINE I signed_codes(I a) { return a; }

    template<int SHIFT, int MASK>
    INLINE I bits_int(I a) {
        return _mm256_and_si256(_mm256_srli_epi16(a, SHIFT), _mm256_set1_epi8(MASK));
    }

    INLINE F halves(const uint8_t * const * rows, size_t offs) {
        uint16_t h[N];
        for (int i = 0; i < N; ++i) {
            memcpy(h + i, rows[i] + offs, sizeof(h[i]));
        }
        return _mm256_cvtph_ps(_mm_setr_epi16(h[0], h[1], h[2], h[3], h[4], h[5], h[6], h[7])); // in registers
    }

    INLINE I two(const uint8_t * a, const uint8_t * b) {
        return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i *) a)), _mm_loadu_si128((const __m128i *) b), 1);
    }

    INLINE void load_words(const uint8_t * const * rows, size_t offs, I * x) {
        const __m256i a = two(rows[0] + offs, rows[4] + offs);
        const __m256i b = two(rows[1] + offs, rows[5] + offs);
        const __m256i c = two(rows[2] + offs, rows[6] + offs);
        const __m256i d = two(rows[3] + offs, rows[7] + offs);

        const __m256i y0 = _mm256_unpacklo_epi32(a, b);
        const __m256i y1 = _mm256_unpackhi_epi32(a, b);
        const __m256i y2 = _mm256_unpacklo_epi32(c, d);
        const __m256i y3 = _mm256_unpackhi_epi32(c, d);

        x[0] = _mm256_unpacklo_epi64(y0, y2);
        x[1] = _mm256_unpackhi_epi64(y0, y2);
        x[2] = _mm256_unpacklo_epi64(y1, y3);
        x[3] = _mm256_unpackhi_epi64(y1, y3);
    }

    static void to_codes(ggml_type type, uint32_t d, uint32_t n, const llama_capsule_lane * lanes) {
        llama_capsule_to_codes_avx2(type, d, n, lanes);
    }
};

// without signs: two sums of 16 bits, 2*15*127*8 at most
template<ggml_type TYPE>
struct lane_products<avx2, TYPE> {
    typedef __m256i A;

    INLINE A zero() {
        return _mm256_setzero_si256();
    }

    // the compiler would gather many products before it adds them up
    INLINE void add(A & acc, __m256i a, __m256i b) {
        __asm__("vpaddw %1, %0, %0" : "+x"(acc) : "x"(_mm256_maddubs_epi16(a, b)));
    }

    INLINE __m256i sum(A acc) {
        return _mm256_madd_epi16(acc, _mm256_set1_epi16(1));
    }
};

template<>
struct lane_products<avx2, GGML_TYPE_Q8_0> {
    typedef __m256i A;

    INLINE A zero() {
        return _mm256_setzero_si256();
    }

    INLINE void add(A & acc, __m256i a, __m256i b) {
        const __m256i x = _mm256_maddubs_epi16(_mm256_abs_epi8(a), _mm256_sign_epi8(b, a));
        acc = _mm256_add_epi32(acc, _mm256_madd_epi16(x, _mm256_set1_epi16(1)));
    }

    INLINE __m256i sum(A acc) {
        return acc;
    }
};

}

void llama_capsule_to_lanes_avx2(ggml_type type, uint32_t d, const float * const * x, const float * const * gates, uint8_t * query) {
    to_lanes_vec<avx2>(type, d, x, gates, query);
}

void llama_capsule_score_rows_avx2(const llama_capsule_score & s, ggml_type type, uint32_t g0, uint32_t n_rows, uint32_t n_src, const uint8_t * const * src,
        const uint8_t * const * next, float * out) {
    score_rows_vec<avx2>(s, type, g0, n_rows, n_src, src, next, out);
}

#endif // CAPSULE_AVX2
