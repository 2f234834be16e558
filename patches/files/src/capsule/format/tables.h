#pragma once

#include "../ggml/src/ggml-capsule/layout.h"

#include <array>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

// the capsule does not fit this model (as opposed to: its file is damaged)
struct llama_capsule_mismatch : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// what a capsule says, from a file of format v2 or built in: how many bits every block of coefficients gets, means and axes
// shapes are numpy's; docs/reference/format-v2.md and kvcapsule_gguf/format/tile_capsule.py of KVCapsule
struct llama_capsule_tables {
    static constexpr uint32_t N_ROWS   = GGML_CAPSULE_MAX_BLOCKS; // of a table: row blocks of a whole tile
    static constexpr uint32_t MAX_HEAD = GGML_CAPSULE_MAX_D;      // channels

    struct layer {
        uint32_t il;
        bool     rope; // the keys are rotated

        uint32_t n_head_kv;
        uint32_t n_embd_head_k;
        uint32_t n_embd_head_v;

        std::vector<float> k_mean; // [n_head_kv][d_k]
        std::vector<float> v_mean; // [n_head_kv][d_v]
        std::vector<float> v_axes; // [n_head_kv][d_v][d_v], columns are axes; empty: none

        std::vector<uint8_t> k_table; // bits, [n_tiers][n_head_kv][N_ROWS][groups of keys]
        std::vector<uint8_t> v_table; // bits, [n_tiers][n_head_kv][N_ROWS][groups of values]

        // in place of the DCT of whole tiles, see ggml_capsule_transform; empty: there is none
        struct transform {
            std::vector<float>   matrix;
            std::vector<float>   columns;
            std::vector<uint8_t> order;
            std::vector<uint8_t> near;
            std::vector<float>   gates;
            std::vector<float>   mlp_up;
            std::vector<float>   mlp_bias;
            std::vector<float>   mlp_down;

            uint32_t n_near = 0;
            uint32_t n_mlp  = 0;

            bool empty() const { return matrix.empty() && order.empty(); }
        };
        transform k_transform;
        transform v_transform;

        std::vector<uint8_t> narrow; // [n_head_kv], 1: the head needs no other image while an image is read; empty: no such head

        float k_energy = 0.0f; // of a usual tile around the mean; 0: not known (built in)
        float v_energy = 0.0f;
    };

    std::string path; // "built in" without a file
    bool        builtin = false;

    uint64_t id = 0; // of the contents: a state is read only with the capsule that it was written with

    // the model that it was made for
    std::string architecture;
    std::string fingerprint;
    std::string rope_type;
    uint32_t    block_count = 0;
    uint32_t    n_rot       = 0; // channels of a key with RoPE, in the layers that have it

    std::array<uint32_t, 4> rope_sections = {};

    float quality = 1.0f; // the score that a tile may have, unless the program asks for another

    std::vector<float> smaller; // per tier, falling: f16 bytes over slot bytes of a whole tile

    uint32_t i_tier_first = 0; // the smallest tier that a quality may take

    std::vector<layer> layers;

    // where the channels of a head lie
    ggml_capsule_channels channels_k(const layer & l) const {
        return { (int32_t) l.n_embd_head_k, l.rope && rope_type != "none" ? (int32_t) n_rot : 0, rope_type != "norm" };
    }

    ggml_capsule_channels channels_v(const layer & l) const {
        return { (int32_t) l.n_embd_head_v, 0, 0 };
    }

    // bytes of a slot of a whole tile, all layers, without units of allocation
    size_t bytes_tile(uint32_t i_tier) const;

    // of the same tile in f16
    size_t bytes_tile_f16() const;

    // the tier whose saved share of the bytes is nearest
    uint32_t tier_for_ratio(float ratio) const;

    // the smallest tier that a quality may take: one of about 6.5x
    void init_tier_first();

    // needs the model and the shapes of the layers; fills in the rest, as codec/builtin.py does
    void init_builtin();
};

using llama_capsule_tables_ptr = std::shared_ptr<const llama_capsule_tables>;
