#pragma once

#include "common.cuh"

// GGML_OP_CAPSULE, see ggml-capsule.h: CUDA has no kernels for it yet, so the CPU unpacks slots and copies them to the device

static inline void ggml_cuda_capsule(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    GGML_UNUSED(ctx);
    GGML_UNUSED(dst);
    GGML_ABORT("no kernel");
}

static inline bool ggml_cuda_capsule_supported(int device, const ggml_tensor * op) {
    GGML_UNUSED(device);
    GGML_UNUSED(op);
    return false;
}
