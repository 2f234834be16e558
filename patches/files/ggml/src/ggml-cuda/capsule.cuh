#include "common.cuh"

// GGML_OP_CAPSULE, see ggml-capsule.h

void ggml_cuda_capsule(ggml_backend_cuda_context & ctx, ggml_tensor * dst);

bool ggml_cuda_capsule_supported(int device, const ggml_tensor * op);
