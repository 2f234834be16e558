#include "capsule/util/floats.h"

#include "../ggml/src/ggml-capsule/clones.h"
#include "../ggml/src/ggml-capsule/half.h"

#include <cmath>
#include <cstring>

CAPSULE_CLONES
static void from_f16(const ggml_fp16_t * src, float * dst, size_t n) {
    for (size_t i = 0; i < n; ++i) {
        dst[i] = ggml_capsule_from_half(src[i]);
    }
}

void llama_capsule_to_float(ggml_type type, const void * src, float * dst, size_t n) {
    switch (type) {
        case GGML_TYPE_F32: memcpy(dst, src, n*sizeof(float));                 break;
        case GGML_TYPE_F16: from_f16((const ggml_fp16_t *) src, dst, n);       break;
        default:            ggml_get_type_traits(type)->to_float(src, dst, n); break;
    }
}

uint32_t llama_capsule_hadamard_size(uint32_t d) {
    return d & -d;
}

CAPSULE_CLONES
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

CAPSULE_CLONES
void llama_capsule_turn(uint32_t n, float * x, size_t ld, const float * cs, uint32_t n_rot, bool norm) {
    const uint32_t half = n_rot/2;

    // to: from the first member of a pair to the second
    const auto turn = [half](uint32_t step, uint32_t to, float * x, const float * cs) {
        for (uint32_t i = 0; i < half; ++i) {
            const float a = x[i*step];
            const float b = x[i*step + to];

            x[i*step]      = a*cs[i*step] - b*cs[i*step + to];
            x[i*step + to] = a*cs[i*step + to] + b*cs[i*step];
        }
    };
    for (uint32_t j = 0; j < n; ++j, x += ld, cs += n_rot) {
        if (norm) {
            turn(2, 1, x, cs);
        } else {
            turn(1, half, x, cs);
        }
    }
}
