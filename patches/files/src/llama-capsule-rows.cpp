#include "llama-capsule-rows.h"

#include <algorithm>
#include <cmath>
#include <cstring>

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

void llama_capsule_hadamard(float * x, uint32_t n, size_t n_values) {
    const float scale = 1.0f/sqrtf((float) n);

    for (size_t i = 0; i < n_values; i += n) {
        float * y = x + i;

        for (uint32_t h = 1; h < n; h *= 2) {
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

void llama_capsule_quantize_row_q2_0(const float * x, void * dst, uint32_t d) {
    static constexpr float factors[] = { 0.30f, 0.36f, 0.42f, 0.48f, 0.54f, 0.60f, 0.70f, 0.80f, 1.00f };

    auto * y = (capsule_block_q2_0 *) dst;

    for (uint32_t ib = 0; ib < d/QK2_0; ++ib) {
        const float * xb = x + ib*QK2_0;

        float amax = 0.0f;
        for (int j = 0; j < QK2_0; ++j) {
            amax = std::max(amax, fabsf(xb[j]));
        }

        float best_gain = 0.0f; // (x.c)^2 / (c.c), the squared error that is removed
        float best_d    = 0.0f;

        int8_t best_c[QK2_0] = { 0 };

        for (float f : factors) {
            for (float sign : { 1.0f, -1.0f }) {
                float scale = sign*f*amax;

                // the second round re-assigns the codes with the optimal scale of the first
                for (int round = 0; round < 2 && scale != 0.0f; ++round) {
                    int8_t c[QK2_0];

                    float xc = 0.0f;
                    float cc = 0.0f;

                    for (int j = 0; j < QK2_0; ++j) {
                        const float v = floorf(xb[j]/scale + 0.5f);

                        c[j] = (int8_t) std::min(2.0f, std::max(-1.0f, v));

                        xc += xb[j]*c[j];
                        cc += (float) (c[j]*c[j]);
                    }

                    if (cc == 0.0f) {
                        break;
                    }

                    const float gain = xc*xc/cc;

                    if (gain > best_gain) {
                        best_gain = gain;
                        best_d    = xc/cc;
                        memcpy(best_c, c, sizeof(c));
                    }

                    scale = xc/cc;
                }
            }
        }

        y[ib].d = ggml_fp32_to_fp16(best_d);
        memset(y[ib].qs, 0, sizeof(y[ib].qs));
        for (int j = 0; j < QK2_0; ++j) {
            y[ib].qs[j/4] |= (uint8_t) ((best_c[j] + 1) << (2*(j % 4)));
        }
    }
}

void llama_capsule_row_encode(ggml_type type, float * x, void * dst, uint32_t d) {
    if (ggml_is_quantized(type)) {
        llama_capsule_hadamard(x, llama_capsule_hadamard_size(d), d);
    }

    switch (type) {
        case GGML_TYPE_F32:  memcpy(dst, x, d*sizeof(float));                        break;
        case GGML_TYPE_F16:  ggml_fp32_to_fp16_row(x, (ggml_fp16_t *) dst, d);       break;
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
