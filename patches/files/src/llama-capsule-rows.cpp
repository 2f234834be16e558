#include "llama-capsule-rows.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

// layout of block_q2_0 in ggml-common.h
static constexpr int QK2_0 = 64;

struct capsule_block_q2_0 {
    ggml_fp16_t d;
    uint8_t     qs[QK2_0/4];
};
static_assert(sizeof(capsule_block_q2_0) == 18, "wrong q2_0 block size/padding");

uint32_t llama_capsule_rows_total(const llama_capsule_row_counts & counts) {
    uint32_t res = 0;
    for (uint32_t n : counts) {
        res += n;
    }
    return res;
}

size_t llama_capsule_rows_size(const llama_capsule_row_counts & counts, uint32_t d) {
    size_t res = 0;
    for (int t = 0; t < LLAMA_CAPSULE_N_TYPES; ++t) {
        if (counts[t] > 0) {
            res += counts[t]*ggml_row_size(LLAMA_CAPSULE_TYPES[t], d);
        }
    }
    return res;
}

uint32_t llama_capsule_hadamard_size(uint32_t d) {
    return d & -d;
}

LLAMA_CAPSULE_SIMD
void llama_capsule_mul_rows(const float * w, const float * x, const float * mean, float * out, uint32_t n_out, uint32_t n_rows, uint32_t d) {
    constexpr uint32_t T = 4;
    constexpr uint32_t C = 16;

    for (uint32_t t0 = 0; t0 < n_out; t0 += T) {
        for (uint32_t i0 = 0; i0 < d; i0 += C) {
            if (t0 + T <= n_out && i0 + C <= d) {
                // a tile in registers
                float acc[T][C];
                for (uint32_t t = 0; t < T; ++t) {
                    for (uint32_t i = 0; i < C; ++i) {
                        acc[t][i] = mean ? mean[i0 + i] : 0.0f;
                    }
                }
                for (uint32_t r = 0; r < n_rows; ++r) {
                    const float * xr = x + r*d + i0;
                    const float * wr = w + r*n_out + t0;
                    for (uint32_t t = 0; t < T; ++t) {
                        for (uint32_t i = 0; i < C; ++i) {
                            acc[t][i] += wr[t]*xr[i];
                        }
                    }
                }
                for (uint32_t t = 0; t < T; ++t) {
                    std::copy(acc[t], acc[t] + C, out + (t0 + t)*d + i0);
                }
                continue;
            }

            for (uint32_t t = t0; t < std::min(t0 + T, n_out); ++t) {
                for (uint32_t i = i0; i < std::min(i0 + C, d); ++i) {
                    float acc = mean ? mean[i] : 0.0f;
                    for (uint32_t r = 0; r < n_rows; ++r) {
                        acc += w[r*n_out + t]*x[r*d + i];
                    }
                    out[t*d + i] = acc;
                }
            }
        }
    }
}

#if defined(__x86_64__) && defined(__GNUC__)
__attribute__((target("avx,f16c")))
static int64_t capsule_to_f16_f16c(const float * x, ggml_fp16_t * y, int64_t n) {
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
        _mm_storeu_si128((__m128i *) (y + i), _mm256_cvtps_ph(_mm256_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT));
    }
    return i;
}
#endif

void llama_capsule_to_f16(const float * x, ggml_fp16_t * y, int64_t n) {
    int64_t i = 0;
#if defined(__x86_64__) && defined(__GNUC__)
    // every CPU with AVX2 has F16C, a name that clang does not know here
    static const bool has_f16c = __builtin_cpu_supports("avx2");
    if (has_f16c) {
        i = capsule_to_f16_f16c(x, y, n);
    }
#endif
    ggml_fp32_to_fp16_row(x + i, y + i, n - i);
}

LLAMA_CAPSULE_SIMD
void llama_capsule_hadamard(float * x, uint32_t n, size_t n_values) {
    const float scale = 1.0f/sqrtf((float) n);

    for (size_t i = 0; i < n_values; i += n) {
        float * y = x + i;

        uint32_t h0 = 1;
#if defined(__GNUC__) && !defined(__clang__)
        // the steps of 1, 2 and 4 inside vectors of 8, the others vectorize by themselves
        if (n >= 8) {
            typedef float   vec __attribute__((vector_size(32), aligned(4)));
            typedef int32_t idx __attribute__((vector_size(32)));

            const idx i1 = { 1, 0, 3, 2, 5, 4, 7, 6 };
            const idx i2 = { 2, 3, 0, 1, 6, 7, 4, 5 };
            const idx i4 = { 4, 5, 6, 7, 0, 1, 2, 3 };

            const vec s1 = { 1, -1,  1, -1,  1, -1,  1, -1 };
            const vec s2 = { 1,  1, -1, -1,  1,  1, -1, -1 };
            const vec s4 = { 1,  1,  1,  1, -1, -1, -1, -1 };

            for (uint32_t j = 0; j < n; j += 8) {
                vec v = *(const vec *) (y + j);

                v = __builtin_shuffle(v, i1) + v*s1;
                v = __builtin_shuffle(v, i2) + v*s2;
                v = __builtin_shuffle(v, i4) + v*s4;

                *(vec *) (y + j) = v;
            }
            h0 = 8;
        }
#endif

        for (uint32_t h = h0; h < n; h *= 2) {
            for (uint32_t j = 0; j < n; j += 2*h) {
                for (uint32_t k = j; k < j + h; ++k) {
                    const float a = y[k];
                    const float b = y[k + h];

                    y[k]     = a + b;
                    y[k + h] = a - b;
                }
            }
        }

        for (uint32_t j = 0; j < n; ++j) {
            y[j] *= scale;
        }
    }
}

// codes of z for the scale num/den, their products with z and with themselves
static void capsule_q2_0_assign(const int32_t * z, int32_t num, int32_t den, int8_t * c, int32_t & xc, int32_t & cc) {
    xc = 0;
    cc = 0;

    for (int j = 0; j < QK2_0; ++j) {
        const int32_t twice = 2*den*z[j];

        const int32_t code = (twice >= num) + (twice >= 3*num) - (twice < -num);

        c[j] = (int8_t) code;
        xc  += z[j]*code;
        cc  += code*code;
    }
}

// in integers, so that every implementation gives the same bytes, see kvcapsule_gguf/codec/q2_0.py
static void capsule_quantize_block_q2_0(const float * x, capsule_block_q2_0 & y) {
    static constexpr int32_t factors[] = { 10, 12, 15, 18, 23, 32 };

    float amax = 0.0f;
    for (int j = 0; j < QK2_0; ++j) {
        amax = std::max(amax, fabsf(x[j]));
    }

    int8_t  best_c[QK2_0] = { 0 };
    int64_t best_xc       = 0;
    int64_t best_cc       = 1;
    int     best_sign     = 1;

    if (amax >= 0x1p-20f) {
        const float s = 32768.0f/amax;

        int32_t q[QK2_0];
        for (int j = 0; j < QK2_0; ++j) {
            q[j] = (int32_t) rintf(x[j]*s);
        }

        for (int32_t factor : factors) {
            for (int sign : { 1, -1 }) {
                int32_t z[QK2_0];
                for (int j = 0; j < QK2_0; ++j) {
                    z[j] = sign*q[j];
                }

                int32_t num = 1024*factor;
                int32_t den = 1;

                // the second round: the codes for the best scale of the first
                for (int round = 0; round < 2; ++round) {
                    int8_t  c[QK2_0];
                    int32_t xc;
                    int32_t cc;

                    capsule_q2_0_assign(z, num, den, c, xc, cc);
                    if (cc == 0) {
                        break;
                    }

                    // xc^2/cc is the squared error that is removed
                    if ((int64_t) xc*xc*best_cc > best_xc*best_xc*cc) {
                        memcpy(best_c, c, sizeof(c));
                        best_xc   = xc;
                        best_cc   = cc;
                        best_sign = sign;
                    }

                    num = xc;
                    den = cc;
                }
            }
        }
    } else {
        amax = 1.0f;
    }

    const float scale = (float) best_xc/(float) best_cc*(amax*0x1p-15f);

    y.d = ggml_fp32_to_fp16(best_sign*std::min(scale, 65504.0f));

    memset(y.qs, 0, sizeof(y.qs));
    for (int j = 0; j < QK2_0; ++j) {
        y.qs[j/4] |= (uint8_t) ((best_c[j] + 1) << (2*(j % 4)));
    }
}

void llama_capsule_quantize_row_q2_0(const float * x, void * dst, uint32_t d) {
    auto * y = (capsule_block_q2_0 *) dst;

    for (uint32_t ib = 0; ib < d/QK2_0; ++ib) {
        capsule_quantize_block_q2_0(x + ib*QK2_0, y[ib]);
    }
}

void llama_capsule_row_quantize(ggml_type type, const float * x, void * dst, uint32_t d) {
    switch (type) {
        case GGML_TYPE_F32:  memcpy(dst, x, d*sizeof(float));                        break;
        case GGML_TYPE_F16:  llama_capsule_to_f16(x, (ggml_fp16_t *) dst, d);        break;
        case GGML_TYPE_Q8_0:
        case GGML_TYPE_Q4_0: ggml_quantize_chunk(type, x, dst, 0, 1, d, nullptr);    break;
        case GGML_TYPE_Q2_0: llama_capsule_quantize_row_q2_0(x, dst, d);             break;
        default:             GGML_ABORT("unsupported row type");
    }
}

void llama_capsule_row_decode(ggml_type type, const void * src, float * x, uint32_t d) {
    if (type == GGML_TYPE_F32) {
        memcpy(x, src, d*sizeof(float));
        return;
    }

    ggml_get_type_traits(type)->to_float(src, x, d);

    if (ggml_is_quantized(type)) {
        llama_capsule_hadamard(x, llama_capsule_hadamard_size(d), d);
    }
}
