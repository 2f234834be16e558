// Preloaded, it takes the place of llama_capsule_store::build_attn(): attention of layer 1 does not pass through the store.
// This is what a change of llama.cpp could do, for tests/test_hooks.py.

#include "llama-capsule-store.h"

#include <dlfcn.h>

// the function of the library with the name of the caller
__attribute__((noinline)) static void * next_of_caller() {
    Dl_info info;
    dladdr(__builtin_return_address(0), &info);

    return dlsym(RTLD_NEXT, info.dli_sname);
}

ggml_tensor * llama_capsule_store::build_attn(
    const llm_graph_context & g,
                ggml_tensor * q,
                ggml_tensor * k,
                ggml_tensor * v,
                ggml_tensor * kq_b,
                ggml_tensor * kq_mask,
                ggml_tensor * sinks,
                ggml_tensor * k_rot,
                ggml_tensor * v_rot,
                      float   kq_scale,
                        int   il) {
    using function = ggml_tensor * (*)(llama_capsule_store *, const llm_graph_context &, ggml_tensor *, ggml_tensor *, ggml_tensor *, ggml_tensor *,
                                       ggml_tensor *, ggml_tensor *, ggml_tensor *, ggml_tensor *, float, int);
    static const auto next = (function) next_of_caller();

    if (il == 1) {
        return g.build_attn_mha(q, k, v, kq_b, kq_mask, sinks, nullptr, 0, kq_scale, il);
    }
    return next(this, g, q, k, v, kq_b, kq_mask, sinks, k_rot, v_rot, kq_scale, il);
}
