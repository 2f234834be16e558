#pragma once

#include "ggml.h"

//
// GGML_OP_CAPSULE: K and V of blocks of N tokens that are stored as a few typed rows ("slots"), and attention straight on them
//
// slots lie in one I8 blob per tier:   [n_slots][K: heads][V: heads], the rows of a head by type: F32, F16, Q8_0, Q4_0, Q2_0
// the constants of a layer in one I32 tensor ("weights", see ggml_capsule_weights), the angles of RoPE in another one ("rope"):
//   F32 [n_slots][n_rot] of the first position of a slot, I32 [n_slots] its pattern; for every pattern F32 [N][n_rot] of the distances from there, and if n_terms > 0
//   I32 number of terms (0: these keys are rebuilt), F32 phi [n_terms][N], F32 ab [n_terms][d_k]: exp(-i angle of a distance) ~= sum_m phi_m(token)(a_m - i b_m)
//   (cos, sin), (a, b) per pair of neighbours, or all cos, then all sin
//

#ifdef  __cplusplus
extern "C" {
#endif

    enum ggml_capsule_op {
        GGML_CAPSULE_OP_UNPACK,  // slots -> columns of a K or V cache
        GGML_CAPSULE_OP_ATTN,    // attention over hot cells and slots, in parts
        GGML_CAPSULE_OP_COMBINE, // parts -> result
        GGML_CAPSULE_OP_ENCODE,  // cells -> rows of slots
        GGML_CAPSULE_OP_ERRORS,  // how well slots hold their cells

        // of tiles, see below
        GGML_CAPSULE_OP_TILE_ATTN,
        GGML_CAPSULE_OP_TILE_COMBINE,
        GGML_CAPSULE_OP_TILE_UNPACK,
    };

    enum ggml_capsule_flag {
        GGML_CAPSULE_FLAG_V        = 1 << 0, // unpack, encode, errors: V
        GGML_CAPSULE_FLAG_V_TRANS  = 1 << 1, // V of the cache is transposed
        GGML_CAPSULE_FLAG_NORM     = 1 << 2, // RoPE of pairs of neighbours, otherwise of halves
        GGML_CAPSULE_FLAG_ROT_K    = 1 << 3, // K of the cache is Hadamard-rotated, see llama_kv_cache::build_input_k_rot()
        GGML_CAPSULE_FLAG_ROT_V    = 1 << 4,
        GGML_CAPSULE_FLAG_TILE_F32 = 1 << 5, // tiles of K in F32 instead of F16
        GGML_CAPSULE_FLAG_RETAIN   = 1 << 6, // keys of tier 0 (and 1: << 7) are kept tokens instead of components
        GGML_CAPSULE_FLAG_QUERY    = 1 << 8, // attention: keys are not rebuilt where queries in 8 bits can meet their rows instead
        GGML_CAPSULE_FLAG_TIER_1   = 1 << 9, // encode, errors: the slots are those of tier 1
    };

    #define GGML_CAPSULE_N_TIERS 2
    #define GGML_CAPSULE_N_TYPES 5

    // what is constant for a layer, and how many slots there are
    struct ggml_capsule_params {
        uint16_t op;
        uint16_t flags;
        float    scale; // of q*k
        uint16_t n_block;
        uint16_t n_kept;
        uint16_t n_mlp;
        uint16_t n_neighbours;
        uint16_t n_rot; // 0: no RoPE
        uint16_t n_head_kv;
        uint16_t d_k;
        uint16_t d_v;
        uint32_t n_slots[GGML_CAPSULE_N_TIERS];
        uint8_t  rows_k[GGML_CAPSULE_N_TIERS][GGML_CAPSULE_N_TYPES];
        uint8_t  rows_v[GGML_CAPSULE_N_TIERS][GGML_CAPSULE_N_TYPES];
        uint16_t n_parts_hot;
        uint16_t n_parts_cold;
        uint16_t n_terms; // pca: of a pattern, at most
    };

    // where the constants of a layer lie, in units of 4 bytes; n_pad: N, rounded up to a multiple of 8, n_mma: of 16
    struct ggml_capsule_weights {
        int32_t k_mean;      // F32 [n_head_kv][d_k]
        int32_t v_mean;      // F32 [n_head_kv][d_v]
        int32_t k_basis;     // F32 [N][n_pad], a row per component, zero behind N
        int32_t k_basis_h;   // F16 [n_mma tokens][n_mma components], for tensor cores
        int32_t v_basis;     // F32 [N][n_pad]
        int32_t v_basis_h;   // F16 [n_mma tokens][n_mma components]
        int32_t v_basis_t;   // F32 [N tokens][N components]
        int32_t token_order; // I32 [N], the kept tokens first
        int32_t neighbours;  // I32 [N - n_kept][n_neighbours]
        int32_t gate;        // F32 [n_head_kv][N - n_kept][n_neighbours][d_k]
        int32_t mlp_up;      // F32 [n_head_kv][n_neighbours*d_k][n_mlp]
        int32_t mlp_up_bias; // F32 [n_head_kv][n_mlp]
        int32_t mlp_down;    // F32 [n_head_kv][n_mlp][d_k]
        int32_t mlp_up_h;    // F16 [n_head_kv][d_k][n_neighbours*n_mlp], rows padded to a multiple of 16, for tensor cores
        int32_t mlp_down_h;  // F16 [n_head_kv][n_mlp][d_k], n_mlp padded to a multiple of 16
        int32_t query_weight; // F32 [n_head_kv][d_k], errors
        int32_t size;
    };

    GGML_API struct ggml_capsule_weights ggml_capsule_weights_layout(const struct ggml_capsule_params * params);

    // bytes of a slot
    GGML_API size_t ggml_capsule_slot_size(const struct ggml_capsule_params * params, int tier);

    // false: the op does not exist for this geometry (on no backend)
    GGML_API bool ggml_capsule_valid(const struct ggml_capsule_params * params);

    // blobs of tiers without slots, and rope without RoPE, are NULL

    // writes the slots into dst [n_head_kv*d, >= n_slots*N], or transposed (V) [>= n_slots*N, n_head_kv*d]; returns a view of dst
    GGML_API struct ggml_tensor * ggml_capsule_unpack(
            struct ggml_context              * ctx,
            const struct ggml_capsule_params * params,
            struct ggml_tensor               * dst,
            struct ggml_tensor               * blob0,
            struct ggml_tensor               * blob1,
            struct ggml_tensor               * weights,
            struct ggml_tensor               * rope);

    // q F32 [d_k, n_head, n_tokens], k [d_k, n_head_kv, n_kv], v [d_v, n_head_kv, n_kv] or transposed [n_kv, n_head_kv, d_v]
    // mask [n_kv, n_tokens], mask_cold [>= n_slots*N, n_tokens], both F16 or both F32
    // -> [d_v*n_head, n_tokens]; two nodes: parts [d_v + 2, n_head*n_tokens, n_parts], and their combination
    GGML_API struct ggml_tensor * ggml_capsule_attn(
            struct ggml_context              * ctx,
            const struct ggml_capsule_params * params,
            struct ggml_tensor               * q,
            struct ggml_tensor               * k,
            struct ggml_tensor               * v,
            struct ggml_tensor               * mask,
            struct ggml_tensor               * mask_cold,
            struct ggml_tensor               * blob0,
            struct ggml_tensor               * blob1,
            struct ggml_tensor               * weights,
            struct ggml_tensor               * rope);

    // cells -> rows of slots; returns a view of slots
    //   slots  I8, those of one tier; bytes between the heads are left alone
    //   cells  [n_head_kv*d, n], of the types that attention reads, or transposed (V) [n, n_head_kv*d]
    //   index  I32 [N + 1, n_blocks]: the cells of a block, < 0 where there is none, then its slot
    //   angles F32 [n_rot, N, n_blocks] that undo the RoPE of the cells (as those of `rope`), or what is not to be stored of it; NULL without RoPE
    GGML_API struct ggml_tensor * ggml_capsule_encode(
            struct ggml_context              * ctx,
            const struct ggml_capsule_params * params,
            struct ggml_tensor               * slots,
            struct ggml_tensor               * cells,
            struct ggml_tensor               * index,
            struct ggml_tensor               * angles,
            struct ggml_tensor               * weights);

    // of the same -> F32 [3, N, n_head_kv, n_blocks]: sums of the squared errors of a token in its slot, with rotated Q4_0, and of its squares; those of keys are weighted
    // 0 where there is no token; d is a multiple of 32
    GGML_API struct ggml_tensor * ggml_capsule_errors(
            struct ggml_context              * ctx,
            const struct ggml_capsule_params * params,
            struct ggml_tensor               * slots,
            struct ggml_tensor               * cells,
            struct ggml_tensor               * index,
            struct ggml_tensor               * angles,
            struct ggml_tensor               * weights);

    //
    // tiles (format v2): slots of any shape and tier in one pool, in any order. How their bytes lie is in ggml-capsule/layout.h
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
        uint16_t flags;     // V, V_TRANS, NORM, ROT_K, ROT_V
        float    scale;     // of q*k
        uint16_t n_rot;     // 0: no RoPE
        uint16_t n_head_kv;
        uint16_t d_k;
        uint16_t d_v;
        uint32_t n_rows;    // of angles
        uint32_t n_parts;   // set by ggml_capsule_tile_attn()
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
