#pragma once

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

//
// The kernels are written with the names of AVX2. Here is what they use of it, in pairs of NEON vectors; never timed.
//

#define CAPSULE_INLINE static inline __attribute__((always_inline))

typedef int32x4_t   __m128i;
typedef float32x4_t __m128;
struct __m256i { __m128i v[2]; };
struct __m256  { __m128  v[2]; };

// the same bits as other lanes, and back
#define CAPSULE_S8(x)  vreinterpretq_s8_s32(x)
#define CAPSULE_U8(x)  vreinterpretq_u8_s32(x)
#define CAPSULE_S16(x) vreinterpretq_s16_s32(x)
#define CAPSULE_U16(x) vreinterpretq_u16_s32(x)
#define CAPSULE_S32(x) (x)
#define CAPSULE_U32(x) vreinterpretq_u32_s32(x)
#define CAPSULE_S64(x) vreinterpretq_s64_s32(x)
#define CAPSULE_U64(x) vreinterpretq_u64_s32(x)

CAPSULE_INLINE __m128i capsule_bits(int8x16_t  x) { return vreinterpretq_s32_s8(x); }
CAPSULE_INLINE __m128i capsule_bits(uint8x16_t x) { return vreinterpretq_s32_u8(x); }
CAPSULE_INLINE __m128i capsule_bits(int16x8_t  x) { return vreinterpretq_s32_s16(x); }
CAPSULE_INLINE __m128i capsule_bits(uint16x8_t x) { return vreinterpretq_s32_u16(x); }
CAPSULE_INLINE __m128i capsule_bits(int32x4_t  x) { return x; }
CAPSULE_INLINE __m128i capsule_bits(uint32x4_t x) { return vreinterpretq_s32_u32(x); }
CAPSULE_INLINE __m128i capsule_bits(int64x2_t  x) { return vreinterpretq_s32_s64(x); }
CAPSULE_INLINE __m128i capsule_bits(uint64x2_t x) { return vreinterpretq_s32_u64(x); }

// name(a, b): f on both halves as lanes of type L; name(a, n): every lane shifted by n
#define CAPSULE_TWO(name, f, L)   CAPSULE_INLINE __m256i name(__m256i a, __m256i b) { \
    return { { capsule_bits(f(L(a.v[0]), L(b.v[0]))), capsule_bits(f(L(a.v[1]), L(b.v[1]))) } }; }
#define CAPSULE_SHIFT(name, f, dup, L, n_is) CAPSULE_INLINE __m256i name(__m256i a, int n) { \
    return { { capsule_bits(f(L(a.v[0]), dup(n_is))), capsule_bits(f(L(a.v[1]), dup(n_is))) } }; }
#define CAPSULE_FLOATS(name, f)   CAPSULE_INLINE __m256 name(__m256 a, __m256 b) { return { { f(a.v[0], b.v[0]), f(a.v[1], b.v[1]) } }; }
#define CAPSULE_ALL(name, dup, C) CAPSULE_INLINE __m256i name(C x) { return { { capsule_bits(dup(x)), capsule_bits(dup(x)) } }; }

CAPSULE_ALL(_mm256_set1_epi8,   vdupq_n_s8,  int8_t)
CAPSULE_ALL(_mm256_set1_epi16,  vdupq_n_s16, int16_t)
CAPSULE_ALL(_mm256_set1_epi32,  vdupq_n_s32, int32_t)
CAPSULE_ALL(_mm256_set1_epi64x, vdupq_n_s64, int64_t)

CAPSULE_INLINE __m256i _mm256_setzero_si256() { return _mm256_set1_epi32(0); }
CAPSULE_INLINE __m256  _mm256_set1_ps(float x) { return { { vdupq_n_f32(x), vdupq_n_f32(x) } }; }
CAPSULE_INLINE __m256  _mm256_setzero_ps()     { return _mm256_set1_ps(0.0f); }

template<typename A>
CAPSULE_INLINE __m128i capsule_load16(const A & x) { return capsule_bits(vld1q_u8((const uint8_t *) &x)); }

template<typename... A>
CAPSULE_INLINE __m128i _mm_setr_epi8(A... x) { const int8_t a[16] = { (int8_t) x... }; return capsule_load16(a); }

CAPSULE_INLINE __m256i _mm256_setr_epi64x(int64_t a, int64_t b, int64_t c, int64_t d) {
    const int64_t x[2][2] = { { a, b }, { c, d } };
    return { { capsule_load16(x[0]), capsule_load16(x[1]) } };
}
template<typename... A>
CAPSULE_INLINE __m256 _mm256_setr_ps(A... x) { const float a[8] = { (float) x... }; return { { vld1q_f32(a), vld1q_f32(a + 4) } }; }

// memory
CAPSULE_INLINE __m128i _mm_loadu_si128(const __m128i * p)         { return capsule_load16(*p); }
CAPSULE_INLINE __m128i _mm_loadl_epi64(const __m128i * p)         { return capsule_bits(vcombine_u8(vld1_u8((const uint8_t *) p), vdup_n_u8(0))); }
CAPSULE_INLINE void    _mm_store_si128(__m128i * p, __m128i x)    { vst1q_u8((uint8_t *) p, CAPSULE_U8(x)); }
CAPSULE_INLINE __m256i _mm256_loadu_si256(const __m256i * p)      { return { { capsule_load16(p->v[0]), capsule_load16(p->v[1]) } }; }
CAPSULE_INLINE __m256i _mm256_load_si256(const __m256i * p)       { return _mm256_loadu_si256(p); }
CAPSULE_INLINE void    _mm256_store_si256(__m256i * p, __m256i x) { _mm_store_si128(p->v, x.v[0]); _mm_store_si128(p->v + 1, x.v[1]); }
CAPSULE_INLINE __m256  _mm256_loadu_ps(const float * p)           { return { { vld1q_f32(p), vld1q_f32(p + 4) } }; }
CAPSULE_INLINE __m256  _mm256_load_ps(const float * p)            { return _mm256_loadu_ps(p); }
CAPSULE_INLINE void    _mm256_storeu_ps(float * p, __m256 x)      { vst1q_f32(p, x.v[0]); vst1q_f32(p + 4, x.v[1]); }
CAPSULE_INLINE void    _mm256_store_ps(float * p, __m256 x)       { _mm256_storeu_ps(p, x); }
CAPSULE_INLINE __m256  _mm256_broadcast_ss(const float * p)       { return _mm256_set1_ps(*p); }

#define _MM_HINT_T0 3
#define _mm_prefetch(p, hint) __builtin_prefetch(p, 0, hint)

// halves and bits
CAPSULE_INLINE __m128i _mm256_castsi256_si128(__m256i x)          { return x.v[0]; }
CAPSULE_INLINE __m128  _mm256_castps256_ps128(__m256 x)           { return x.v[0]; }
CAPSULE_INLINE __m128i _mm256_extracti128_si256(__m256i x, int i) { return x.v[i]; }
CAPSULE_INLINE __m128  _mm256_extractf128_ps(__m256 x, int i)     { return x.v[i]; }
CAPSULE_INLINE __m256i _mm256_broadcastsi128_si256(__m128i x)     { return { { x, x } }; }
CAPSULE_INLINE __m256i _mm256_broadcastq_epi64(__m128i x)         { return _mm256_set1_epi64x(vgetq_lane_s64(CAPSULE_S64(x), 0)); }
CAPSULE_INLINE __m256i _mm256_castps_si256(__m256 x) { return { { vreinterpretq_s32_f32(x.v[0]), vreinterpretq_s32_f32(x.v[1]) } }; }
CAPSULE_INLINE __m256  _mm256_castsi256_ps(__m256i x) { return { { vreinterpretq_f32_s32(x.v[0]), vreinterpretq_f32_s32(x.v[1]) } }; }

// integers
CAPSULE_TWO(_mm256_and_si256, vandq_s32, CAPSULE_S32)
CAPSULE_TWO(_mm256_or_si256,  vorrq_s32, CAPSULE_S32)
CAPSULE_TWO(_mm256_add_epi8,  vaddq_s8,  CAPSULE_S8)
CAPSULE_TWO(_mm256_add_epi16, vaddq_s16, CAPSULE_S16)
CAPSULE_TWO(_mm256_add_epi32, vaddq_s32, CAPSULE_S32)
CAPSULE_TWO(_mm256_sub_epi16, vsubq_s16, CAPSULE_S16)
CAPSULE_TWO(_mm256_sub_epi32, vsubq_s32, CAPSULE_S32)
CAPSULE_TWO(_mm256_mulhrs_epi16, vqrdmulhq_s16, CAPSULE_S16)
CAPSULE_TWO(_mm256_hadd_epi32,   vpaddq_s32,    CAPSULE_S32)
CAPSULE_TWO(_mm256_shuffle_epi8, vqtbl1q_u8,    CAPSULE_U8) // an index with the highest bit gives 0, as there

CAPSULE_INLINE int16x8_t capsule_pairs16(int32x4_t a, int32x4_t b) { // unsigned bytes times signed ones, two beside each other added
    const int16x8_t x = vmulq_s16(vreinterpretq_s16_u16(vmovl_u8(vget_low_u8 (CAPSULE_U8(a)))), vmovl_s8(vget_low_s8 (CAPSULE_S8(b))));
    const int16x8_t y = vmulq_s16(vreinterpretq_s16_u16(vmovl_u8(vget_high_u8(CAPSULE_U8(a)))), vmovl_s8(vget_high_s8(CAPSULE_S8(b))));
    return vpaddq_s16(x, y);
}
CAPSULE_INLINE int32x4_t capsule_pairs32(int16x8_t a, int16x8_t b) { return vpaddq_s32(vmull_s16(vget_low_s16(a), vget_low_s16(b)), vmull_high_s16(a, b)); }
CAPSULE_TWO(_mm256_maddubs_epi16, capsule_pairs16, CAPSULE_S32)
CAPSULE_TWO(_mm256_madd_epi16,    capsule_pairs32, CAPSULE_S16)

CAPSULE_INLINE int16x8_t capsule_packs32(int32x4_t a, int32x4_t b) { return vcombine_s16(vqmovn_s32(a), vqmovn_s32(b)); }
CAPSULE_INLINE int8x16_t capsule_packs16(int16x8_t a, int16x8_t b) { return vcombine_s8 (vqmovn_s16(a), vqmovn_s16(b)); }
CAPSULE_TWO(_mm256_packs_epi32, capsule_packs32, CAPSULE_S32)
CAPSULE_TWO(_mm256_packs_epi16, capsule_packs16, CAPSULE_S16)

CAPSULE_SHIFT(_mm256_slli_epi16, vshlq_s16, vdupq_n_s16, CAPSULE_S16,  (int16_t) n)
CAPSULE_SHIFT(_mm256_slli_epi32, vshlq_s32, vdupq_n_s32, CAPSULE_S32,  n)
CAPSULE_SHIFT(_mm256_srli_epi16, vshlq_u16, vdupq_n_s16, CAPSULE_U16,  (int16_t) -n)
CAPSULE_SHIFT(_mm256_srai_epi16, vshlq_s16, vdupq_n_s16, CAPSULE_S16,  (int16_t) -n)
CAPSULE_SHIFT(_mm256_srai_epi32, vshlq_s32, vdupq_n_s32, CAPSULE_S32, -n)

CAPSULE_INLINE uint32x4_t capsule_shift32(int32x4_t a, int32x4_t n) { // by 32 and more, or less than 0: 0
    return vandq_u32(vshlq_u32(CAPSULE_U32(a), n), vcltq_u32(CAPSULE_U32(n), vdupq_n_u32(32)));
}
CAPSULE_INLINE uint64x2_t capsule_left (int32x4_t a, int32x4_t n) { return vshlq_u64(CAPSULE_U64(a), CAPSULE_S64(n)); }
CAPSULE_INLINE uint64x2_t capsule_right(int32x4_t a, int32x4_t n) { return vshlq_u64(CAPSULE_U64(a), vnegq_s64(CAPSULE_S64(n))); }
CAPSULE_TWO(_mm256_sllv_epi32, capsule_shift32, CAPSULE_S32)
CAPSULE_TWO(_mm256_sllv_epi64, capsule_left,    CAPSULE_S32)
CAPSULE_TWO(_mm256_srlv_epi64, capsule_right,   CAPSULE_S32)

// lanes elsewhere; only with the constants that the kernels use
CAPSULE_INLINE __m256i _mm256_permute4x64_epi64(__m256i x, int /* 0xd8 */) {
    return { { capsule_bits(vzip1q_s64(CAPSULE_S64(x.v[0]), CAPSULE_S64(x.v[1]))), capsule_bits(vzip2q_s64(CAPSULE_S64(x.v[0]), CAPSULE_S64(x.v[1]))) } };
}
CAPSULE_INLINE __m256i _mm256_permute2x128_si256(__m256i a, __m256i b, int which) { return { { a.v[which & 1], b.v[which & 1] } }; } // 0x20, 0x31
CAPSULE_INLINE __m256  _mm256_permute2f128_ps(__m256 a, __m256 b, int which)      { return { { a.v[which & 1], b.v[which & 1] } }; }
CAPSULE_INLINE __m256i _mm256_blend_epi16(__m256i a, __m256i b, int /* 0xaa */) {
    const uint32x4_t high = vdupq_n_u32(0xffff0000);
    return { { vbslq_s32(high, b.v[0], a.v[0]), vbslq_s32(high, b.v[1], a.v[1]) } };
}
CAPSULE_INLINE float32x4_t capsule_quarters(float32x4_t a, float32x4_t b, int which) { // 0x44: the lower halves; 0xee: the upper ones
    return which == 0x44 ? vcombine_f32(vget_low_f32(a), vget_low_f32(b)) : vcombine_f32(vget_high_f32(a), vget_high_f32(b));
}
CAPSULE_INLINE __m256 _mm256_shuffle_ps(__m256 a, __m256 b, int which) {
    return { { capsule_quarters(a.v[0], b.v[0], which), capsule_quarters(a.v[1], b.v[1], which) } };
}

// wider lanes
CAPSULE_INLINE __m128i _mm_cvtepu8_epi16(__m128i x)       { return capsule_bits(vmovl_u8(vget_low_u8(CAPSULE_U8(x)))); }
CAPSULE_INLINE __m256i _mm256_cvtepu8_epi16(__m128i x)    { return { { _mm_cvtepu8_epi16(x), capsule_bits(vmovl_high_u8(CAPSULE_U8(x))) } }; }
CAPSULE_INLINE __m256i _mm256_cvtepi16_epi32(__m128i x)   { return { { vmovl_s16(vget_low_s16(CAPSULE_S16(x))), vmovl_high_s16(CAPSULE_S16(x)) } }; }
CAPSULE_INLINE __m256i _mm256_cvtepu16_epi32(__m128i x) {
    return { { capsule_bits(vmovl_u16(vget_low_u16(CAPSULE_U16(x)))), capsule_bits(vmovl_high_u16(CAPSULE_U16(x))) } };
}
CAPSULE_INLINE __m256i _mm256_cvtepu8_epi32(__m128i x)    { return _mm256_cvtepu16_epi32(_mm_cvtepu8_epi16(x)); }

// four lanes
CAPSULE_INLINE __m128i _mm_add_epi32(__m128i a, __m128i b)    { return vaddq_s32(a, b); }
CAPSULE_INLINE __m128i _mm_max_epu8(__m128i a, __m128i b)     { return capsule_bits(vmaxq_u8(CAPSULE_U8(a), CAPSULE_U8(b))); }
CAPSULE_INLINE __m128i _mm_shuffle_epi8(__m128i x, __m128i i) { return capsule_bits(vqtbl1q_u8(CAPSULE_U8(x), CAPSULE_U8(i))); }
CAPSULE_INLINE __m128i _mm_set1_epi8(int8_t x)                { return capsule_bits(vdupq_n_s8(x)); }
CAPSULE_INLINE __m128i _mm_cvtsi32_si128(int32_t x)           { return vsetq_lane_s32(x, vdupq_n_s32(0), 0); }

// floats
CAPSULE_FLOATS(_mm256_add_ps, vaddq_f32)
CAPSULE_FLOATS(_mm256_sub_ps, vsubq_f32)
CAPSULE_FLOATS(_mm256_mul_ps, vmulq_f32)
CAPSULE_FLOATS(_mm256_div_ps, vdivq_f32)
CAPSULE_FLOATS(_mm256_max_ps, vmaxq_f32)
CAPSULE_FLOATS(_mm256_unpacklo_ps, vzip1q_f32)
CAPSULE_FLOATS(_mm256_unpackhi_ps, vzip2q_f32)

CAPSULE_INLINE __m256 _mm256_fmadd_ps (__m256 a, __m256 b, __m256 c) { return { { vfmaq_f32(c.v[0], a.v[0], b.v[0]), vfmaq_f32(c.v[1], a.v[1], b.v[1]) } }; }
CAPSULE_INLINE __m256 _mm256_fnmadd_ps(__m256 a, __m256 b, __m256 c) { return { { vfmsq_f32(c.v[0], a.v[0], b.v[0]), vfmsq_f32(c.v[1], a.v[1], b.v[1]) } }; }
CAPSULE_INLINE __m256 _mm256_fmsub_ps (__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, { { vnegq_f32(c.v[0]), vnegq_f32(c.v[1]) } }); }
CAPSULE_INLINE __m256 _mm256_round_ps (__m256 x, int /* to even */)  { return { { vrndnq_f32(x.v[0]), vrndnq_f32(x.v[1]) } }; }

CAPSULE_INLINE __m256  _mm256_cvtepi32_ps(__m256i x) { return { { vcvtq_f32_s32(x.v[0]), vcvtq_f32_s32(x.v[1]) } }; }
CAPSULE_INLINE __m256i _mm256_cvtps_epi32(__m256 x)  { return { { vcvtnq_s32_f32(x.v[0]), vcvtnq_s32_f32(x.v[1]) } }; }
CAPSULE_INLINE __m256  _mm256_cvtph_ps(__m128i x) {
    const float16x8_t h = vreinterpretq_f16_s32(x);
    return { { vcvt_f32_f16(vget_low_f16(h)), vcvt_high_f32_f16(h) } };
}
CAPSULE_INLINE float   _mm256_cvtss_f32(__m256 x) { return vgetq_lane_f32(x.v[0], 0); }

CAPSULE_INLINE __m256 _mm256_and_ps(__m256 a, __m256 b)    { return _mm256_castsi256_ps(_mm256_and_si256(_mm256_castps_si256(a), _mm256_castps_si256(b))); }
CAPSULE_INLINE __m256 _mm256_or_ps (__m256 a, __m256 b)    { return _mm256_castsi256_ps(_mm256_or_si256 (_mm256_castps_si256(a), _mm256_castps_si256(b))); }
CAPSULE_INLINE __m256 _mm256_andnot_ps(__m256 a, __m256 b) {
    const __m256i x = _mm256_castps_si256(a);
    return _mm256_and_ps(_mm256_castsi256_ps({ { vmvnq_s32(x.v[0]), vmvnq_s32(x.v[1]) } }), b);
}
#define _CMP_EQ_OQ 0
CAPSULE_INLINE __m256 _mm256_cmp_ps(__m256 a, __m256 b, int /* equal */) {
    return { { vreinterpretq_f32_u32(vceqq_f32(a.v[0], b.v[0])), vreinterpretq_f32_u32(vceqq_f32(a.v[1], b.v[1])) } };
}
