#include "llama-capsule-simd.h"

// Apple's compiler assumes the instructions, old ones can not let some functions have them
#if defined(__aarch64__) && defined(__GNUC__) && defined(__ARM_FEATURE_DOTPROD)
#define CAPSULE_DOTPROD
#define TARGET
#elif defined(__aarch64__) && defined(__linux__) && defined(__GNUC__) && (defined(__clang__) ? __clang_major__ >= 16 : __GNUC__ >= 10)
#define CAPSULE_DOTPROD
#define TARGET __attribute__((target("arch=armv8.2-a+dotprod")))
#endif

#ifdef CAPSULE_DOTPROD
#include "llama-capsule-simd-neon.h"

#ifdef __linux__
#include <sys/auxv.h>
#endif

static bool supported() {
#ifdef __linux__
    return getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#else
    return true; // of what this is compiled for
#endif
}
#endif

void llama_capsule_simd_add_dotprod(std::vector<llama_capsule_simd> & all) {
#ifdef CAPSULE_DOTPROD
    if (supported()) {
        all.push_back(neon_kernels(all.front()));
    }
#else
    GGML_UNUSED(all);
#endif
}
