#pragma once

// What differs between the pinned llama.cpp and the newest one that the series is tried on (scripts/newer_llama_cpp).

#if __has_include("llama-moe-cache.h") // b11549: the rotation has a size, 0 without one
#    define LLAMA_CAPSULE_ROT_K(kv) ((kv).n_rot_k > 0)
#    define LLAMA_CAPSULE_ROT_V(kv) ((kv).n_rot_v > 0)
#else
#    define LLAMA_CAPSULE_ROT_K(kv) ((kv).attn_rot_k)
#    define LLAMA_CAPSULE_ROT_V(kv) ((kv).attn_rot_v)
#endif
