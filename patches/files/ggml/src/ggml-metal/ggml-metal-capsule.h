#pragma once

// GGML_OP_CAPSULE on Metal, see capsule.cmake

#include "ggml-metal-device.h"

#ifdef __cplusplus
extern "C" {
#endif

#ifdef GGML_METAL_CAPSULE

bool ggml_metal_capsule_supported(ggml_metal_device_t dev, const struct ggml_tensor * op);

// returns the number of nodes
int ggml_metal_capsule_encode(ggml_metal_device_t dev, ggml_metal_encoder_t enc, const struct ggml_tensor * op);

#else

static inline bool ggml_metal_capsule_supported(ggml_metal_device_t dev, const struct ggml_tensor * op) {
    (void) dev;
    (void) op;
    return false;
}

static inline int ggml_metal_capsule_encode(ggml_metal_device_t dev, ggml_metal_encoder_t enc, const struct ggml_tensor * op) {
    (void) dev;
    (void) enc;
    (void) op;
    return 1;
}

#endif

#ifdef __cplusplus
}
#endif
