#pragma once

#include "ggml.h"

//
// GGML_OP_CAPSULE: K and V of tiles of an image that are stored compressed ("slots"), and attention straight on them
//

#ifdef  __cplusplus
extern "C" {
#endif

    enum ggml_capsule_op {
        GGML_CAPSULE_OP_TILE_ATTN,    // attention over hot cells and slots, in parts
        GGML_CAPSULE_OP_TILE_COMBINE, // parts -> result
        GGML_CAPSULE_OP_TILE_UNPACK,  // slots -> columns of a K or V cache
    };

    enum ggml_capsule_flag {
        GGML_CAPSULE_FLAG_V       = 1 << 0, // unpack: V
        GGML_CAPSULE_FLAG_V_TRANS = 1 << 1, // V of the cache is transposed
        GGML_CAPSULE_FLAG_NORM    = 1 << 2, // RoPE of pairs of neighbours, otherwise of halves
        GGML_CAPSULE_FLAG_ROT_K   = 1 << 3, // K of the cache is Hadamard-rotated, see llama_kv_cache::build_input_k_rot()
        GGML_CAPSULE_FLAG_ROT_V   = 1 << 4,
        GGML_CAPSULE_FLAG_WHOLE   = 1 << 5, // whole tiles have another transform than the DCT, see ggml_capsule_tile_tables
    };

    //
    // slots of any shape and tier lie in one pool, in any order. How their bytes lie is in ggml-capsule/layout.h
    //
    // pool    I8
    // slots   I32 [n_slots, 5]: n_slots times { bytes/64 from the pool's first one, form, ropes or -1, column of the first token },
    //         then the first row of the angles of each slot's tokens
    // tables  I8, the constants of a layer: ggml_capsule_tile_tables, and what it refers to
    // angles  F32: n_rows rows { cosines, sines } of pairs; row i is the first position of slot i, others are distances of tokens from there:
    //         the key of a token is R(first) R(distance) k. Then the ropes of ggml-capsule/attn.h. NULL without RoPE
    //

    // the beginning of `tables`; offsets are bytes from there, 0: there is none
    struct ggml_capsule_tile_tables {
        int32_t n_forms;
        int32_t forms;  // ggml_capsule_tile_form [n_forms]
        int32_t k_mean; // F32 [n_head_kv][d_k]
        int32_t v_mean; // F32 [n_head_kv][d_v]
        int32_t v_axes; // F32 [n_head_kv][d_v][d_v]

        // ggml_capsule_transform of ggml-capsule/transform.h
        int32_t k_matrix;
        int32_t k_columns;
        int32_t v_matrix;
        int32_t v_columns;
        int32_t k_order;
        int32_t k_near;
        int32_t k_gates;
        int32_t k_mlp_up;
        int32_t k_mlp_bias;
        int32_t k_mlp_down;
        int32_t n_kept;
        int32_t n_near;
        int32_t n_mlp;
    };

    // a ggml_capsule_form of ggml-capsule/layout.h
    struct ggml_capsule_tile_form {
        int32_t h;
        int32_t w;
        int32_t size;
        int32_t k_plan;
        int32_t v_plan;
        int32_t k_stride;
        int32_t v_stride;
        int32_t k_offset;
        int32_t v_offset;
    };

    // what is constant for a layer, and how many angles there are
    struct ggml_capsule_tile_params {
        uint16_t op;
        uint16_t flags;     // ggml_capsule_flag
        float    scale;     // of q*k
        uint16_t n_rot;     // 0: no RoPE
        uint16_t n_head_kv;
        uint16_t d_k;
        uint16_t d_v;
        uint32_t n_rows;    // of angles
        uint32_t n_parts;   // attention: at most so many KV heads, blocks of tokens and parts, 0: as a CPU wants it; in the node, the number of parts
    };

    // writes the slots into columns of dst [n_head_kv*d, n], or transposed (V) [n, n_head_kv*d]
    // returns a view of dst, or if `copy` a new tensor of its type and shape
    GGML_API struct ggml_tensor * ggml_capsule_tile_unpack(
            struct ggml_context                   * ctx,
            const struct ggml_capsule_tile_params * params,
            struct ggml_tensor                    * dst,
            bool                                    copy,
            struct ggml_tensor                    * pool,
            struct ggml_tensor                    * slots,
            struct ggml_tensor                    * tables,
            struct ggml_tensor                    * angles);

    // q F32 [d_k, n_head, n_tokens], k [d_k, n_head_kv, n_kv], v [d_v, n_head_kv, n_kv] or transposed [n_kv, n_head_kv, d_v], of the types of a KV cache
    // mask F16 or F32 [n_kv, n_tokens], mask_cold F16 [columns of the slots, n_tokens]
    // seen I8 [n_slots, n_tokens]: what a token sees of a slot: 0 nothing, 1 all, 2 what mask_cold says
    // -> [d_v*n_head, n_tokens]; two nodes: parts [d_v + 2, n_head*n_tokens, n_parts], and their combination
    GGML_API struct ggml_tensor * ggml_capsule_tile_attn(
            struct ggml_context                   * ctx,
            const struct ggml_capsule_tile_params * params,
            struct ggml_tensor                    * q,
            struct ggml_tensor                    * k,
            struct ggml_tensor                    * v,
            struct ggml_tensor                    * mask,
            struct ggml_tensor                    * mask_cold,
            struct ggml_tensor                    * seen,
            struct ggml_tensor                    * pool,
            struct ggml_tensor                    * slots,
            struct ggml_tensor                    * tables,
            struct ggml_tensor                    * angles);

#ifdef  __cplusplus
}
#endif
