// Preloaded, it takes the place of llama_capsule_store::build_attn(): attention of layer 1 does not pass through the store.
// This is what a change of llama.cpp could do, for tests/test_hooks.py.

#include "llama-capsule-store.h"

#include <cstring>
#include <dlfcn.h>

static void * next_build_attn() {
    auto    build_attn = &llama_capsule_store::build_attn;
    void *  here;
    Dl_info info;

    memcpy(&here, &build_attn, sizeof(here)); // its first word is the address
    dladdr(here, &info);

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
    static const auto next = (function) next_build_attn();

    if (il == 1) {
        return g.build_attn_mha(q, k, v, kq_b, kq_mask, sinks, nullptr, 0, kq_scale, il);
    }
    return next(this, g, q, k, v, kq_b, kq_mask, sinks, k_rot, v_rot, kq_scale, il);
}
