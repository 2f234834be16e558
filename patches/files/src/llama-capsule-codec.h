#pragma once

#include "llama-capsule-file.h"

// where the rows of one layer lie inside a slot: [K: heads][V: heads], the rows of a head are contiguous, in the order of the types
struct llama_capsule_layout {
    struct part {
        size_t offs;        // of the first head, in the slot
        size_t head_stride;

        std::array<size_t, LLAMA_CAPSULE_N_TYPES> type_offs; // in the head
    };

    part   k;
    part   v;
    size_t slot_stride;

    llama_capsule_layout() = default;
    llama_capsule_layout(const llama_capsule_data::layer & layer, const llama_capsule_data::tier_layer & tl);
};

// how one layer is stored in one tier; the reference for reading it, plain floats on the host (llama_capsule_tile: the same fast, and the way there)
//   K and V of a block: [N][n_head_kv][d], K without RoPE
struct llama_capsule_codec {
    const llama_capsule_data & data;
    const llama_capsule_data::layer & layer;
    const llama_capsule_data::tier_layer & tl;

    llama_capsule_layout layout;

    llama_capsule_codec(const llama_capsule_data & data, uint32_t i_layer, uint32_t i_tier);

    void decode(const uint8_t * slot, float * k, float * v) const;

    // one head, [N][d]
    void decode_k_head(const uint8_t * slot, uint32_t i_head, float * k) const;
    void decode_v_head(const uint8_t * slot, uint32_t i_head, float * v) const;

private:
    // what is different for K and V
    struct side {
        uint32_t d;

        const llama_capsule_row_counts & counts;
        const llama_capsule_layout::part & part;
        const std::vector<float> & mean;
        const std::vector<float> & basis;
    };

    side side_k() const;
    side side_v() const;

    void decode_rows(const side & s, const uint8_t * slot, uint32_t i_head, float * rows) const;

    void decode_pca(const side & s, const uint8_t * slot, uint32_t i_head, float * x) const;

    void decode_retain(const uint8_t * slot, uint32_t i_head, float * k) const;

    // prediction of dropped token j of a head from the decoded kept rows [n_kept][d]
    void predict(const float * kept, uint32_t i_head, uint32_t j, float * out) const;
};
