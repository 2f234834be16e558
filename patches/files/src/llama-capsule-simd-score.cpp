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

    INLINE F set1    (float x)       { return _mm256_set1_ps(x); }
    INLINE F mul     (F a, F b)      { return _mm256_mul_ps(a, b); }
    INLINE F fma     (F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
    INLINE F to_float(I a)           { return _mm256_cvtepi32_ps(a); }

    // a word for all slots
    INLINE I load_lanes(const uint32_t * x) { return _mm256_set1_epi32(*x); }
    INLINE F to_scale  (I a)                { return _mm256_castsi256_ps(a); }

    INLINE void add_scores(float * out, const uint32_t * tokens, F a) {
        _mm256_store_ps(out + N**tokens, _mm256_add_ps(a, _mm256_load_ps(out + N**tokens)));
    }

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

    static void to_codes(ggml_type type, uint32_t d, uint32_t n, const llama_capsule_lane * lanes, llama_capsule_codes * codes) {
        llama_capsule_to_codes_avx2(type, d, n, lanes, codes);
    }

    // two of 16 bits
    INLINE uint32_t first_sum(int32_t sums, int32_t zero) {
        return (uint16_t) (zero*(int16_t) sums) | (uint32_t) (zero*(sums >> 16)) << 16;
    }
};

// without signs: two sums of 16 bits that start from what the codes of 0 add up to, 8*127*16 at most
template<ggml_type TYPE>
struct lane_products<avx2, TYPE> {
    // the compiler would gather many products before it adds them up
    INLINE void add(__m256i & acc, __m256i a, __m256i b) {
        __m256i sum = _mm256_add_epi16(acc, _mm256_maddubs_epi16(a, b));
        __asm__("" : "+x"(sum));
        acc = sum;
    }

    INLINE __m256i sum(__m256i acc) {
        return _mm256_madd_epi16(acc, _mm256_set1_epi16(1));
    }
};

template<>
struct lane_products<avx2, GGML_TYPE_Q8_0> {
    INLINE void add(__m256i & acc, __m256i a, __m256i b) {
        const __m256i x = _mm256_maddubs_epi16(_mm256_abs_epi8(a), _mm256_sign_epi8(b, a));
        acc = _mm256_add_epi32(acc, _mm256_madd_epi16(x, _mm256_set1_epi16(1)));
    }

    INLINE __m256i sum(__m256i acc) {
        return acc;
    }
};

}

void llama_capsule_to_lanes_avx2(ggml_type type, uint32_t d, uint32_t n, const llama_capsule_lane * lanes) {
    to_lanes_vec<avx2>(type, d, n, lanes);
}

void llama_capsule_score_rows_avx2(const llama_capsule_score & s, ggml_type type, uint32_t g0, uint32_t n_rows, uint32_t n_src, const uint8_t * const * src,
        float * out) {
    score_rows_vec<avx2>(s, type, g0, n_rows, n_src, src, out);
}

// 8 tokens at a time
TARGET void llama_capsule_to_slots_avx2(uint32_t n, const float * x, float * const * out) {
    for (uint32_t t = 0; t < n; t += 8, x += 64) {
        __m256 y[8];
        for (int i = 0; i < 8; i += 2) {
            const __m256 a = _mm256_load_ps(x + 8*i);
            const __m256 b = _mm256_load_ps(x + 8*i + 8);

            y[i]     = _mm256_unpacklo_ps(a, b);
            y[i + 1] = _mm256_unpackhi_ps(a, b);
        }
        for (int i = 0; i < 4; ++i) {
            // slots i and i + 4, tokens 0 to 3 and 4 to 7
            const int k = i/2;

            const __m256 a = i % 2 ? _mm256_shuffle_ps(y[k],     y[k + 2], 0xee) : _mm256_shuffle_ps(y[k],     y[k + 2], 0x44);
            const __m256 b = i % 2 ? _mm256_shuffle_ps(y[k + 4], y[k + 6], 0xee) : _mm256_shuffle_ps(y[k + 4], y[k + 6], 0x44);

            _mm256_storeu_ps(out[i]     + t, _mm256_permute2f128_ps(a, b, 0x20));
            _mm256_storeu_ps(out[i + 4] + t, _mm256_permute2f128_ps(a, b, 0x31));
        }
    }
}

#endif // CAPSULE_AVX2
