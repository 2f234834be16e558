#pragma once

#include "llama-capsule.h"
#include "llama-capsule-header.h"
#include "llama-capsule-rows.h"

#include <array>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

struct llama_model;

// the file does not fit this model (as opposed to: the file is damaged)
struct llama_capsule_mismatch : std::runtime_error {
    using std::runtime_error::runtime_error;
};

enum llama_capsule_key_codec {
    LLAMA_CAPSULE_KEY_CODEC_PCA    = 0,
    LLAMA_CAPSULE_KEY_CODEC_RETAIN = 1,
};

// the contents of a capsule file, checked
// format: docs/reference/format-v1.md of KVCapsule
struct llama_capsule_data {
    // the model that it was made for
    struct base {
        std::string architecture;
        uint32_t    block_count;
        std::string rope_type;
        std::string fingerprint;

        std::array<uint32_t, 4> rope_sections;
    };

    // schedule of a layer in a tier
    struct tier_layer {
        llama_capsule_key_codec key_codec;

        llama_capsule_row_counts key_rows;
        llama_capsule_row_counts value_rows;

        float kappa;
    };

    struct tier {
        std::string name;
        float       ratio;

        std::vector<tier_layer> layers;
    };

    struct layer {
        uint32_t il;
        bool     rope;

        uint32_t n_head_kv;
        uint32_t n_embd_head_k;
        uint32_t n_embd_head_v;

        float freq_base;

        std::vector<float> k_mean;         // [n_head_kv][d_k]
        std::vector<float> v_mean;         // [n_head_kv][d_v]
        std::vector<float> k_basis;        // [N][N], a row per basis vector
        std::vector<float> v_basis;        // [N][N]
        std::vector<float> k_query_weight; // [n_head_kv][d_k]

        // retain
        uint32_t n_kept = 0;
        uint32_t n_mlp  = 0;

        std::vector<uint16_t> token_order;   // [N]
        std::vector<float>    k_gate;        // [n_head_kv][N - n_kept][K][d_k]
        std::vector<int32_t>  k_neighbours;  // [N - n_kept][K]
        std::vector<float>    k_mlp_up;      // [n_head_kv][n_mlp][K*d_k]
        std::vector<float>    k_mlp_up_bias; // [n_head_kv][n_mlp]
        std::vector<float>    k_mlp_down;    // [n_head_kv][d_k][n_mlp]
    };

    std::string path;

    uint64_t id = 0; // of the contents of the file

    base model;

    std::string block_shape; // "raster" or "tile"

    uint32_t block_size   = 0;
    uint32_t block_width  = 0;
    uint32_t image_tokens = 0;
    uint32_t n_neighbours = 0;

    float default_ratio = 0.0f;

    std::vector<layer> layers;
    std::vector<tier>  tiers; // [0] = faithful

    // the economy tier with the ratio nearest to the requested one
    uint32_t tier_for_ratio(float ratio) const;

    // bytes of the rows of one slot
    size_t bytes_slot(uint32_t i_tier) const;
};

using llama_capsule_data_ptr = std::shared_ptr<const llama_capsule_data>;

// name: of the file, for the messages. check_model sees everything but the tensors, which are not read if it throws
// throws std::runtime_error with one line: what is wrong and where
llama_capsule_data_ptr llama_capsule_data_read(
        llama_capsule_source & source,
        const std::string    & name,
        const std::function<void(const llama_capsule_data &)> & check_model);

//
// llama-capsule-base.cpp
//

// throws std::runtime_error if it can not be opened
std::unique_ptr<llama_capsule_source> llama_capsule_open(const char * path);

// the same from a file, for this model
llama_capsule_data_ptr llama_capsule_data_load(const llama_model & model, const char * path);

const char * llama_capsule_rope_name(llama_rope_type type);

// sha256 over what shapes the K and V of a model, as 64 hex digits
std::string llama_capsule_model_fingerprint(const llama_model & model);

// throws llama_capsule_mismatch
void llama_capsule_check_model(const llama_capsule_data & data, const llama_model & model);
