#pragma once

#include "llama-capsule-views.h"

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

struct llama_model;
struct llama_cparams;

class llama_kv_cells;

// position of a token: t, y, x, z; only t without M-RoPE
using llama_capsule_pos = std::array<int32_t, 4>;

// a - b; the positions of a saved state may be anything
inline llama_capsule_pos llama_capsule_pos_sub(const llama_capsule_pos & a, const llama_capsule_pos & b) {
    llama_capsule_pos res;
    for (size_t k = 0; k < res.size(); ++k) {
        res[k] = (int32_t) ((uint32_t) a[k] - (uint32_t) b[k]);
    }
    return res;
}

//
// RoPE of a layer on the host, see ggml_rope_cache_init() and ggml_mrope_cache_init()
//

struct llama_capsule_rope_params {
    uint32_t n_rot = 0;
    bool     norm  = false; // pairs of neighbours, otherwise of halves

    llama_capsule_rope_params() = default;
    llama_capsule_rope_params(const llama_model & model, const llama_cparams & cparams, int il);

    bool operator==(const llama_capsule_rope_params & other) const;

    // false if the kind of RoPE is not known here
    static bool supported(const llama_model & model);

    // n_rot values: (cos, sin) per pair (norm), or all cos, then all sin; scale is that of YaRN, for tables that are used once per key
    void fill(const llama_capsule_pos & pos, bool scale, float * cs) const;

    // n_rot/2 angles, by which the pairs are turned
    void angles(const llama_capsule_pos & pos, float * angle) const;

    // what a turned key is multiplied by (YaRN)
    float scale() const { return mscale; }

    // undoes the rotation of fill(pos, true) and its scale
    void fill_inverse(const llama_capsule_pos & pos, float * cs) const;

    // angles of a + b
    void add(const float * a, const float * b, float * cs) const;

    // angles of -a
    void negate(const float * a, float * cs) const;

private:
    bool multi       = false;
    bool interleaved = false;

    std::array<int32_t, 4> sections = {};

    float freq_scale   = 1.0f;
    float theta_scale  = 1.0f;
    float ext_factor   = 0.0f;
    float mscale       = 1.0f;
    float corr_dims[2] = {};

    std::vector<float> factors; // may be empty
};

//
// angles of the tokens in slots: of a first position per slot, and of the distances of its tokens, which slots share
//

class llama_capsule_rope_cache {
public:
    // layers without RoPE have no params; d: head size of the layers that ask for views(), 0 if none does
    void init(std::vector<llama_capsule_rope_params> params, const std::vector<int> & layer_params, uint32_t N, uint32_t d);

    // the cells of n_slots slots, pool by pool; false positives are impossible: every position is compared
    //   stored: the position by which the rows of a slot are rotated already, if those of the layer are
    void update(uint32_t i_pool, const llama_kv_cells & cells, const std::vector<llama_capsule_pos> & stored, uint32_t n_slots, uint32_t n_pos);

    const llama_capsule_rope_params * params(uint32_t i_layer) const; // nullptr: no RoPE

    // rows that are rotated already lack only what the slot has been moved by since
    const float * first    (uint32_t i_layer, uint32_t i_pool, uint32_t i_slot, bool rotated) const; // [n_rot]
    const float * distances(uint32_t i_layer, uint32_t i_pool, uint32_t i_slot) const; // [N][n_rot]

    // of the queries, by the tokens of a slot
    const llama_capsule_views & views(uint32_t i_layer, uint32_t i_pool, uint32_t i_slot) const;

    // layers with the same angles, and rows rotated already in the same pools, have the same table, -1: no RoPE
    int find_table(uint32_t i_layer, bool rotated_0, bool rotated_1) const;

    // for GGML_OP_CAPSULE: first positions and patterns of all slots, pool by pool, then the distances and views of every pattern
    std::vector<int32_t> packed      (int i_table) const;
    size_t               packed_size (int i_table) const;
    uint32_t             packed_terms(int i_table) const; // room for as many views of a pattern

    // slots with the same pattern have the same distances
    int  pattern(uint32_t i_pool, uint32_t i_slot) const;
    bool moved  (uint32_t i_pool, uint32_t i_slot) const;

private:
    struct table {
        llama_capsule_rope_params params;

        std::vector<std::vector<float>>  distances; // per pattern
        std::vector<llama_capsule_views> views;     // the same, empty if nobody asks
        std::array<std::vector<float>, 2> first; // per pool, [n_slots][n_rot]
        std::array<std::vector<float>, 2> rest;  // the same less what is stored
    };

    struct slot {
        llama_capsule_pos first   = {};
        llama_capsule_pos stored  = {};
        int               pattern = -1;
    };

    uint32_t N = 0;
    uint32_t d = 0;

    llama_capsule_views views_still; // of layers without RoPE

    std::vector<int>   layer_table;
    std::vector<table> tables;

    std::vector<std::vector<llama_capsule_pos>> patterns; // distances of the tokens of a slot
    std::array<std::vector<slot>, 2>            slots;

    // does a slot that begins there look like this? empty cells do not matter
    static bool matches(const std::vector<llama_capsule_pos> & pos, const std::vector<bool> & empty, const llama_capsule_pos & first,
            const std::vector<llama_capsule_pos> & pattern);

    void drop_unused_patterns();
};
