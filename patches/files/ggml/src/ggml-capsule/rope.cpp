#include "attn.h"

#include <algorithm>
#include <cmath>
#include <complex>

// lanes of all groups; kernels may take two groups at once
static int padded_lanes(const ggml_capsule_channels & k) {
    return (ggml_capsule_n_groups(k) + 1)/2*2*GGML_CAPSULE_LANES;
}

size_t ggml_capsule_rope_size(const ggml_capsule_channels & k) {
    return offsetof(ggml_capsule_rope, steps) + padded_lanes(k)*(2*sizeof(double) + ggml_capsule_rope::N_TABLES*(sizeof(int16_t) + sizeof(float)));
}

void ggml_capsule_rope_init(ggml_capsule_rope * rope, const ggml_capsule_channels & k, const double * step_x, const double * step_y) {
    typedef std::complex<double> turn; // one angle gives all the others of a pair

    std::fill((uint8_t *) rope, (uint8_t *) rope + ggml_capsule_rope_size(k), (uint8_t) 0);
    rope->n = padded_lanes(k);

    auto put = [&](const int16_t * table, int i, double x, int one) {
        const_cast<int16_t *>(table)[i]           = (int16_t) std::min(32767L, std::lrint(one*x));
        const_cast<float *>(rope->exact(table))[i] = (float) x;
    };
    for (int i = 0; i < rope->n; ++i) {
        const double x = i < k.n_rot/2 ? step_x[i] : 0.0; // groups of pairs come first, and only the last of them is short
        const double y = i < k.n_rot/2 ? step_y[i] : 0.0;
        rope->steps[i]           = x;
        rope->steps[rope->n + i] = y;

        const turn half = std::polar(1.0, x/2);
        const turn token = half*half;
        turn at = half;
        for (int j = 0; j < GGML_CAPSULE_SIDE/2; ++j, at *= token) {
            put(rope->x_cos(j), i, at.real(), 32768);
            put(rope->x_sin(j), i, at.imag(), 32768);
        }
        const turn line = std::polar(1.0, y);
        at = half*token*token*token; // the middle of 8 tokens
        for (int j = 0; j < GGML_CAPSULE_SIDE; ++j, at *= line) {
            put(rope->y_cos(j), i, at.real(), 8192);
            put(rope->y_sin(j), i, at.imag(), 8192);
        }

        const double most = (GGML_CAPSULE_SIDE - 1)/2.0*std::fabs(x);
        auto & group = rope->turn[i/GGML_CAPSULE_LANES];
        group = std::max(group, (uint8_t) (most > 0.036 ? ggml_capsule_rope::FULL : most > 1e-4 ? ggml_capsule_rope::SIN : ggml_capsule_rope::NONE));
    }
}

size_t ggml_capsule_angles_size(const ggml_capsule_channels & k) {
    return (size_t) 2*GGML_CAPSULE_LANES*ggml_capsule_n_groups(k);
}

void ggml_capsule_angles_init(float * angles, const ggml_capsule_channels & k, const double * angle, float scale) {
    const int n = (int) ggml_capsule_angles_size(k)/2;
    for (int i = 0; i < n; ++i) {
        angles[i]     = i < k.n_rot/2 ? scale*(float) std::cos(angle[i]) : 1.0f;
        angles[n + i] = i < k.n_rot/2 ? scale*(float) std::sin(angle[i]) : 0.0f;
    }
}
