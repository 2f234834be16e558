#pragma once

#include "llama-capsule-simd.h"

//
// NEON, for the files that define TARGET (function attribute) and, if they have products of four bytes (sdot), CAPSULE_DOTPROD
//

#include <arm_neon.h>

#define INLINE TARGET __attribute__((always_inline)) static inline
#include "llama-capsule-simd-score.h"

namespace {

struct neon {
    static constexpr int N = 4;

    typedef float32x4_t F;
    typedef int32x4_t   I;
    typedef uint8x16_t  B;

    INLINE F    load (const float * x)   { return vld1q_f32(x); }
    INLINE void store(float * x, F a)    { vst1q_f32(x, a); }
    INLINE F    set1 (float x)           { return vdupq_n_f32(x); }
    INLINE F    add  (F a, F b)          { return vaddq_f32(a, b); }
    INLINE F    sub  (F a, F b)          { return vsubq_f32(a, b); }
    INLINE F    mul  (F a, F b)          { return vmulq_f32(a, b); }
    INLINE F    max  (F a, F b)          { return vmaxq_f32(a, b); }
    INLINE F    abs  (F a)               { return vabsq_f32(a); }
    INLINE F    fma  (F a, F b, F c)     { return vfmaq_f32(c, a, b); } // a*b + c
    INLINE F    round(F a)               { return vrndnq_f32(a); }
    INLINE F    exp2 (F n)               { return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(n), vdupq_n_s32(127)), 23)); }

    INLINE F where_greater(F x, F y, F a) { // else 0
        return vreinterpretq_f32_u32(vandq_u32(vcgtq_f32(x, y), vreinterpretq_u32_f32(a)));
    }

    INLINE float max1(F a) { return vmaxvq_f32(a); }
    INLINE float sum (F a) { return vaddvq_f32(a); }

    INLINE void sum4(const F * a, float * out) {
        vst1q_f32(out, vpaddq_f32(vpaddq_f32(a[0], a[1]), vpaddq_f32(a[2], a[3])));
    }

    INLINE F hadamard(F a) {
        static const float s1[4] = { 1, -1, 1, -1 };
        static const float s2[4] = { 1, 1, -1, -1 };

        a = vfmaq_f32(vrev64q_f32(a), a, vld1q_f32(s1));
        return vfmaq_f32(vextq_f32(a, a, 2), a, vld1q_f32(s2));
    }

    INLINE F load_half(const uint8_t * p) {
        return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(p)));
    }

    INLINE float half(const uint8_t * p) {
        __fp16 h;
        memcpy(&h, p, sizeof(h));
        return h;
    }

    INLINE B    load_b (const uint8_t * p)     { return vld1q_u8(p); }
    INLINE void store_b(uint32_t * p, B a)     { vst1q_u8((uint8_t *) p, a); }
    INLINE B    sub_b  (B a, int x)            { return vsubq_u8(a, vdupq_n_u8(x)); }

    template<int SHIFT, int MASK>
    INLINE B bits(B a) {
        return vandq_u8(SHIFT ? vshrq_n_u8(a, SHIFT ? SHIFT : 1) : a, vdupq_n_u8(MASK));
    }

    // byte i of each of four, side by side
    INLINE void interleave(B * x) {
        const uint16x8_t a0 = vreinterpretq_u16_u8(vzip1q_u8(x[0], x[1]));
        const uint16x8_t a1 = vreinterpretq_u16_u8(vzip2q_u8(x[0], x[1]));
        const uint16x8_t b0 = vreinterpretq_u16_u8(vzip1q_u8(x[2], x[3]));
        const uint16x8_t b1 = vreinterpretq_u16_u8(vzip2q_u8(x[2], x[3]));

        x[0] = vreinterpretq_u8_u16(vzip1q_u16(a0, b0));
        x[1] = vreinterpretq_u8_u16(vzip2q_u16(a0, b0));
        x[2] = vreinterpretq_u8_u16(vzip1q_u16(a1, b1));
        x[3] = vreinterpretq_u8_u16(vzip2q_u16(a1, b1));
    }

    // 16 signed codes
    INLINE void widen(B codes, F * v) {
        const int8x16_t c  = vreinterpretq_s8_u8(codes);
        const int16x8_t lo = vmovl_s8(vget_low_s8(c));
        const int16x8_t hi = vmovl_high_s8(c);

        v[0] = vcvtq_f32_s32(vmovl_s16(vget_low_s16(lo)));
        v[1] = vcvtq_f32_s32(vmovl_high_s16(lo));
        v[2] = vcvtq_f32_s32(vmovl_s16(vget_low_s16(hi)));
        v[3] = vcvtq_f32_s32(vmovl_high_s16(hi));
    }

    // acc[i] += a[4*i..] b[4*i..]
    INLINE I dot(I acc, I a, I b) {
        const int8x16_t x = vreinterpretq_s8_s32(a);
        const int8x16_t y = vreinterpretq_s8_s32(b);
#ifdef CAPSULE_DOTPROD
        return vdotq_s32(acc, x, y);
#else
        const int32x4_t lo = vpaddlq_s16(vmull_s8(vget_low_s8(x), vget_low_s8(y)));
        const int32x4_t hi = vpaddlq_s16(vmull_high_s8(x, y));

        return vaddq_s32(acc, vpaddq_s32(lo, hi));
#endif
    }

    INLINE I    load_int    (const uint32_t * x)  { return vreinterpretq_s32_u32(vld1q_u32(x)); }
    INLINE void store_int   (int32_t * x, I a)    { vst1q_s32(x, a); }
    INLINE I    set1_int    (uint32_t x)          { return vreinterpretq_s32_u32(vdupq_n_u32(x)); }
    INLINE I    sub_int     (I a, I b)            { return vsubq_s32(a, b); }
    INLINE I    shift_left_8(I a)                 { return vshlq_n_s32(a, 8); }
    INLINE I    to_int      (F a)                 { return vcvtnq_s32_f32(a); }
    INLINE F    to_float    (I a)                 { return vcvtq_f32_s32(a); }

    static constexpr int ZERO_Q8 = 0;

    INLINE I signed_codes(I a) { return a; }

    template<int SHIFT, int MASK>
    INLINE I bits_int(I a) {
        return vreinterpretq_s32_u8(bits<SHIFT, MASK>(vreinterpretq_u8_s32(a)));
    }

    // 16 bytes of each row: x[i] has word i of all
    INLINE void load_words(const uint8_t * const * rows, size_t offs, I * x) {
        const int64x2_t a0 = load_zip<false>(rows[0] + offs, rows[1] + offs);
        const int64x2_t a1 = load_zip<true> (rows[0] + offs, rows[1] + offs);
        const int64x2_t b0 = load_zip<false>(rows[2] + offs, rows[3] + offs);
        const int64x2_t b1 = load_zip<true> (rows[2] + offs, rows[3] + offs);

        x[0] = vreinterpretq_s32_s64(vzip1q_s64(a0, b0));
        x[1] = vreinterpretq_s32_s64(vzip2q_s64(a0, b0));
        x[2] = vreinterpretq_s32_s64(vzip1q_s64(a1, b1));
        x[3] = vreinterpretq_s32_s64(vzip2q_s64(a1, b1));
    }

    template<bool HIGH>
    INLINE int64x2_t load_zip(const uint8_t * a, const uint8_t * b) {
        const I x = vreinterpretq_s32_u8(vld1q_u8(a));
        const I y = vreinterpretq_s32_u8(vld1q_u8(b));

        return vreinterpretq_s64_s32(HIGH ? vzip2q_s32(x, y) : vzip1q_s32(x, y));
    }

    // one of each row
    INLINE F halves(const uint8_t * const * rows, size_t offs) {
        uint16_t h[N];
        for (int i = 0; i < N; ++i) {
            memcpy(h + i, rows[i] + offs, sizeof(h[i]));
        }
        return load_half((const uint8_t *) h);
    }

    static void to_codes(ggml_type type, uint32_t d, uint32_t n, const llama_capsule_lane * lanes, llama_capsule_codes * codes);

    INLINE uint32_t first_sum(int32_t sum, int32_t zero) { return -zero*sum; }

    // a word for all slots
    INLINE I load_lanes(const uint32_t * x) { return vreinterpretq_s32_u32(vld1q_dup_u32(x)); }
    INLINE F to_scale  (I a)                { return vreinterpretq_f32_s32(a); }

    INLINE void add_scores(float * out, const uint32_t * tokens, F a) {
        vst1q_f32(out + N**tokens, vaddq_f32(vld1q_f32(out + N**tokens), a));
    }

#ifdef CAPSULE_DOTPROD
    // the codes of 4 columns each, one in two bits of a byte
    INLINE void store_crumbs(uint32_t * dst, B x) {
        static const int32_t shifts[4] = { 0, -2, -4, -6 };

        const uint32x4_t w = vreinterpretq_u32_u8(x);
        const uint32x4_t m = vdupq_n_u32(0x03030303);
        const int32x4_t  s = vld1q_s32(shifts);

        vst1q_u32(dst +  0, vandq_u32(vshlq_u32(vdupq_laneq_u32(w, 0), s), m));
        vst1q_u32(dst +  4, vandq_u32(vshlq_u32(vdupq_laneq_u32(w, 1), s), m));
        vst1q_u32(dst +  8, vandq_u32(vshlq_u32(vdupq_laneq_u32(w, 2), s), m));
        vst1q_u32(dst + 12, vandq_u32(vshlq_u32(vdupq_laneq_u32(w, 3), s), m));
    }

    static size_t query_size(uint32_t d) { return 2*d + sizeof(int32_t)*d/QK; }

    INLINE int32_t code_sum(const int8_t * sums, uint32_t b) {
        int32_t x;
        memcpy(&x, sums + sizeof(x)*b, sizeof(x));
        return x;
    }

    // pairs of 16 bits
    INLINE int16x4x2_t load_pairs(const int16_t * x) { return vld2_s16(x); }

    INLINE I dot_pairs(I acc, int16x4x2_t a, const int16_t * b) {
        return vmlal_n_s16(vmlal_n_s16(acc, a.val[0], b[0]), a.val[1], b[1]);
    }

    static constexpr uint32_t N_WEIGHTS = 16;

    // basis times factors of four rows, high and low bytes; see llama_capsule_int_basis for the order
    INLINE void store_weights(const int16_t * basis, size_t ld, const int16_t * factors, uint32_t * hi, uint32_t * lo) {
        for (int h = 0; h < 2; ++h, basis += 8, hi += 4, lo += lo ? 4 : 0) {
            uint16x8_t x[4]; // the weights
            uint16x8_t y[4]; // rounded to their high bytes
            for (int k = 0; k < 4; ++k) {
                const int16x8_t w = vqrdmulhq_n_s16(vld1q_s16(basis + k*ld), factors[k]);

                x[k] = vreinterpretq_u16_s16(w);
                y[k] = vreinterpretq_u16_s16(vaddq_s16(w, vdupq_n_s16(128)));
            }
            store_quads(vsriq_n_u16(y[1], y[0], 8), vsriq_n_u16(y[3], y[2], 8), hi);
            if (lo) {
                store_quads(vsliq_n_u16(x[0], x[1], 8), vsliq_n_u16(x[2], x[3], 8), lo);
            }
        }
    }

    INLINE void store_quads(uint16x8_t a, uint16x8_t b, uint32_t * dst) {
        vst1q_u16((uint16_t *) dst,       vzip1q_u16(a, b));
        vst1q_u16((uint16_t *) (dst + 8), vzip2q_u16(a, b));
    }
#endif
};

}

TARGET static void fma_neon(uint32_t d, const float * a, const float * b, float * y) {
    for (uint32_t i = 0; i < d; i += 4) {
        vst1q_f32(y + i, vfmaq_f32(vld1q_f32(y + i), vld1q_f32(a + i), vld1q_f32(b + i)));
    }
}

TARGET static void scale_neon(uint32_t d, float f, float * y) {
    for (uint32_t i = 0; i < d; i += 4) {
        vst1q_f32(y + i, vmulq_n_f32(vld1q_f32(y + i), f));
    }
}

static llama_capsule_simd base; // for pairs that are no multiple of 4

TARGET static void rope_neon(uint32_t n, float * x, size_t ld_x, const float * cs, size_t ld_cs, uint32_t n_rot, bool norm) {
    const uint32_t half = n_rot/2;

    if (half % 4 != 0) {
        base.rope(n, x, ld_x, cs, ld_cs, n_rot, norm);
        return;
    }
    for (uint32_t j = 0; j < n; ++j, x += ld_x, cs += ld_cs) {
        for (uint32_t i = 0; i < half; i += 4) {
            float32x4x2_t a;
            float32x4x2_t c;
            if (norm) {
                a = vld2q_f32(x  + 2*i);
                c = vld2q_f32(cs + 2*i);
            } else {
                a = { { vld1q_f32(x  + i), vld1q_f32(x  + i + half) } };
                c = { { vld1q_f32(cs + i), vld1q_f32(cs + i + half) } };
            }

            const float32x4x2_t y = { {
                vfmsq_f32(vmulq_f32(a.val[0], c.val[0]), a.val[1], c.val[1]),
                vfmaq_f32(vmulq_f32(a.val[0], c.val[1]), a.val[1], c.val[0]),
            } };

            if (norm) {
                vst2q_f32(x + 2*i, y);
            } else {
                vst1q_f32(x + i,        y.val[0]);
                vst1q_f32(x + i + half, y.val[1]);
            }
        }
    }
}

TARGET static float add_max_neon(float * s, const float * mask, uint32_t n) {
    float32x4_t m = vdupq_n_f32(-INFINITY);
    for (uint32_t i = 0; i < n; i += 4) {
        const float32x4_t v = vaddq_f32(vld1q_f32(s + i), vld1q_f32(mask + i));

        vst1q_f32(s + i, v);
        m = vmaxq_f32(m, v);
    }
    return vmaxvq_f32(m);
}

// x in 8 bits, and the sums of 32 codes each; returns the scale
TARGET static float to_codes_neon(uint32_t d, const float * x, int8_t * codes, int32_t * sums) {
    float32x4_t m = vdupq_n_f32(0.0f);
    for (uint32_t i = 0; i < d; i += 4) {
        m = vmaxq_f32(m, vabsq_f32(vld1q_f32(x + i)));
    }
    const float max = vmaxvq_f32(m);
    const float f   = max > 0.0f ? 127.0f/max : 0.0f;

    for (uint32_t i = 0; i < d; i += QK) {
        int32x4_t sum = vdupq_n_s32(0);
        for (uint32_t j = i; j < i + QK; j += 8) {
            const int32x4_t a = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(x + j),     f));
            const int32x4_t b = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(x + j + 4), f));

            sum = vaddq_s32(sum, vaddq_s32(a, b));
            vst1_s8(codes + j, vmovn_s16(vcombine_s16(vmovn_s32(a), vmovn_s32(b))));
        }
        sums[i/QK] = vaddvq_s32(sum);
    }
    return max/127.0f;
}

// of 64 codes every fourth one
static void order_q2(uint32_t d, const int8_t * codes, int8_t * dst) {
    for (uint32_t i = 0; i < d; i += QK2) {
        const int8x16x4_t c = vld4q_s8(codes + i);
        for (int j = 0; j < 4; ++j) {
            vst1q_s8(dst + i + 16*j, c.val[j]);
        }
    }
}

void neon::to_codes(ggml_type type, uint32_t d, uint32_t n, const llama_capsule_lane * lanes, llama_capsule_codes * codes) {
    for (const auto * lane = lanes; lane < lanes + n; ++lane, ++codes) {
        float y[256];
        for (uint32_t i = 0; i < d; ++i) {
            y[i] = lane->gates ? lane->x[i]*lane->gates[i] : lane->x[i];
        }
        hadamard_vec<neon>(y, llama_capsule_hadamard_size(d), d);

        const uint32_t n_codes = type == GGML_TYPE_Q2_0 ? QK2 : QK;
        for (uint32_t i = 0; i < d; i += n_codes) {
            codes->scales[i/n_codes] = to_codes_neon(n_codes, y + i, codes->codes + i, codes->sums + i/QK);
        }

        if (type == GGML_TYPE_Q2_0) {
            order_q2(d, codes->codes, codes->codes);
            for (uint32_t i = 0; i < d/QK2; ++i) {
                codes->sums[i] = codes->sums[2*i] + codes->sums[2*i + 1];
            }
        }
    }
}

// 4 tokens at a time
TARGET static void to_slots_neon(uint32_t n, const float * x, float * const * out) {
    for (uint32_t t = 0; t < n; t += 4, x += 16) {
        const float32x4x4_t y = vld4q_f32(x);
        for (int i = 0; i < 4; ++i) {
            vst1q_f32(out[i] + t, y.val[i]);
        }
    }
}

#ifdef CAPSULE_DOTPROD
static float to_query_neon(const llama_capsule_view & view, const float * x, void * dst, float & dot_mean) {
    const uint32_t d = view.d;

    float y[256];
    std::copy(x, x + d, y);
    rope_neon(1, y, d, view.turn, 0, view.n_rot, view.norm);
    scale_neon(d - view.n_rot, view.still, y + view.n_rot);

    float32x4_t sum = vdupq_n_f32(0.0f);
    for (uint32_t i = 0; i < d; i += 4) {
        sum = vfmaq_f32(sum, vld1q_f32(y + i), vld1q_f32(view.mean + i));
    }
    dot_mean = vaddvq_f32(sum);

    hadamard_vec<neon>(y, llama_capsule_hadamard_size(d), d);

    int8_t  * codes = (int8_t *) dst;
    int32_t * sums  = (int32_t *) (codes + 2*d);

    const float scale = to_codes_neon(d, y, codes, sums);

    order_q2(d, codes, codes + d);

    return scale;
}
#endif

static llama_capsule_simd neon_kernels(const llama_capsule_simd & plain) {
    base = plain;

    llama_capsule_simd s = plain;

    s.name       = "neon";
    s.mul        = mul_vec<neon>;
    s.dot        = dot_vec<neon>;
    s.fma        = fma_neon;
    s.scale      = scale_neon;
    s.rope       = rope_neon;
    s.add_max    = add_max_neon;
    s.exp_sum    = exp_sum_vec<neon>;
    s.hadamard   = hadamard_vec<neon>;
    s.to_float   = to_float_vec<neon>;
    s.n_lanes    = neon::N;
    s.to_lanes   = to_lanes_vec<neon>;
    s.score_rows = score_rows_vec<neon>;
    s.to_slots   = to_slots_neon;
    s.dot_cells  = dot_cells_vec<neon>;
    s.mul_cells  = mul_cells_vec<neon>;
#ifdef CAPSULE_DOTPROD
    s.name       = "dotprod";
    s.mul_int    = mul_int_vec<neon>;
    s.mul_rows   = mul_rows_vec<neon>;
    s.query_size = neon::query_size;
    s.to_query   = to_query_neon;
    s.dot_rows   = dot_rows_vec<neon>;
    s.project    = project_vec<neon>;
#endif
    return s;
}
