#pragma once

// GGML_OP_CAPSULE, see ggml-capsule.h: Metal has no kernels for it yet, so the CPU unpacks slots and copies them to the device

#include "ggml-metal-device.h"

static inline bool ggml_metal_capsule_supported(ggml_metal_device_t dev, const struct ggml_tensor * op) {
    GGML_UNUSED(dev);
    GGML_UNUSED(op);
    return false;
}

// returns the number of nodes
static inline int ggml_metal_capsule_encode(ggml_metal_device_t dev, ggml_metal_encoder_t enc, const struct ggml_tensor * op) {
    GGML_UNUSED(dev);
    GGML_UNUSED(enc);
    GGML_UNUSED(op);
    return 1;
}
