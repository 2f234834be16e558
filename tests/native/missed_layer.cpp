// Preloaded, it takes the place of llama_capsule_cache::build_attn(): attention of layer 1 does not pass through the capsule.
// This is what a change of llama.cpp could do, for tests/test_hooks.py.

#include "capsule/api/cache.h"

#include <dlfcn.h>

// the function of the library with the name of the caller
__attribute__((noinline)) static void * next_of_caller() {
    Dl_info info;
    dladdr(__builtin_return_address(0), &info);

    return dlsym(RTLD_NEXT, info.dli_sname);
}

ggml_tensor * llama_capsule_cache::build_attn(const llm_graph_context & g, const llama_capsule_attn & attn) {
    using function = ggml_tensor * (*)(llama_capsule_cache *, const llm_graph_context &, const llama_capsule_attn &);
    static const auto next = (function) next_of_caller();

    if (attn.il == 1) {
        return g.build_attn_mha(attn.q, attn.k, attn.v, attn.kq_b, attn.kq_mask, attn.sinks, nullptr, 0, attn.kq_scale, attn.il);
    }
    return next(this, g, attn);
}
