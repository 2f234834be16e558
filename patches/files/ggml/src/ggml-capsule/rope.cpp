#include "attn.h"

#include <cmath>
#include <cstring>

// a multiple of the lanes, so that sizes are multiples of 64 bytes
static size_t padded_pairs(const ggml_capsule_channels & k) {
    return (k.n_rot/2 + GGML_CAPSULE_LANES - 1)/GGML_CAPSULE_LANES*GGML_CAPSULE_LANES;
}

size_t ggml_capsule_rope_size(const ggml_capsule_channels & k) {
    return 2*padded_pairs(k)*sizeof(float);
}

void ggml_capsule_rope_init(ggml_capsule_rope * rope, const ggml_capsule_channels & k, const double * step_x, const double * step_y) {
    float * steps = (float *) rope;

    memset(steps, 0, ggml_capsule_rope_size(k));
    for (int i = 0; i < k.n_rot/2; ++i) {
        steps[i]                   = step_x[i];
        steps[i + padded_pairs(k)] = step_y[i];
    }
}

size_t ggml_capsule_angles_size(const ggml_capsule_channels & k) {
    return 2*padded_pairs(k);
}

void ggml_capsule_angles_init(float * angles, const ggml_capsule_channels & k, const double * angle, float scale) {
    memset(angles, 0, ggml_capsule_angles_size(k)*sizeof(float));
    for (int i = 0; i < k.n_rot/2; ++i) {
        angles[i]                   = scale*cos(angle[i]);
        angles[i + padded_pairs(k)] = scale*sin(angle[i]);
    }
}
