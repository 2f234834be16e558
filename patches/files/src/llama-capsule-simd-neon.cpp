#include "llama-capsule-simd.h"

#if defined(__aarch64__) && defined(__GNUC__)
#define CAPSULE_NEON
#define TARGET
#include "llama-capsule-simd-neon.h"
#endif

void llama_capsule_simd_add_neon(std::vector<llama_capsule_simd> & all) {
#ifdef CAPSULE_NEON
    all.push_back(neon_kernels(all.front()));
#else
    GGML_UNUSED(all);
#endif
}
