#pragma once

#include "capsule/model/rope.h"

#include "../ggml/src/ggml-capsule/layout.h"

class llama_capsule_slots;

//
// RoPE of the keys in slots: the key of a token is R(first position of its slot) R(distance of the token) k
// slots whose tokens have the same distances share a pattern
//

class llama_capsule_angles {
public:
    // of all layers with the same angles
    struct kind {
        llama_capsule_rope_params rope;
        ggml_capsule_channels     channels;
    };

    // n_pos: positions of a token that RoPE reads
    void init(std::vector<kind> kinds, uint32_t n_pos);

    // follows the positions of the slots
    void update(const llama_capsule_slots & slots);

    // of a table: one for each slot, then one for each token of each pattern
    uint32_t n_rows() const;

    // the first row of the tokens of a slot
    uint32_t pattern_row(uint32_t i_slot) const;

    // which ropes a slot has, -1: its tokens are not the same steps apart
    int32_t rope(uint32_t i_slot) const;

    // do all slots have ropes?
    bool regular() const;

    // rows, then ropes, see ggml-capsule.h
    const std::vector<float> & table(uint32_t i_kind) const;

private:
    std::vector<kind> kinds;

    uint32_t n_pos = 1;

    uint64_t version = 0; // of the slots that the tables are for
    bool     valid   = false;

    struct slot {
        llama_capsule_pos first;
        uint32_t          i_pattern;
    };
    std::vector<slot> slots;

    struct pattern {
        std::vector<llama_capsule_pos> distances;

        uint32_t w;
        uint32_t row;
        int32_t  rope;

        // from token to token and from line to line, if it has ropes
        llama_capsule_pos step_x;
        llama_capsule_pos step_y;
    };
    std::vector<pattern> patterns;

    uint32_t n_rows_all  = 0;
    int32_t  n_ropes     = 0;
    bool     all_regular = true;

    std::vector<std::vector<float>> tables; // per kind

    // the tokens of a slot; those that are gone may have been anywhere
    struct tokens {
        uint32_t h;
        uint32_t w;

        std::vector<llama_capsule_pos> pos;
        std::vector<bool>              empty;
    };

    slot    find    (const tokens & t);
    pattern describe(const tokens & t, llama_capsule_pos & first) const;

    void fill(const kind & k, std::vector<float> & res) const;
};
