#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

struct llama_model;
struct llama_cparams;

class llama_kv_cells;

// position of a token: t, y, x, z; only t without M-RoPE
using llama_capsule_pos = std::array<int32_t, 4>;

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
    // layers without RoPE have no params
    void init(std::vector<llama_capsule_rope_params> params, const std::vector<int> & layer_params, uint32_t N);

    // the cells of n_slots slots, pool by pool; false positives are impossible: every position is compared
    void update(uint32_t i_pool, const llama_kv_cells & cells, uint32_t n_slots, uint32_t n_pos);

    const llama_capsule_rope_params * params(uint32_t i_layer) const; // nullptr: no RoPE

    const float * first    (uint32_t i_layer, uint32_t i_pool, uint32_t i_slot) const; // [n_rot]
    const float * distances(uint32_t i_layer, uint32_t i_pool, uint32_t i_slot) const; // [N][n_rot]

    // layers with the same angles have the same table, -1: no RoPE
    int find_table(uint32_t i_layer) const;

    // for GGML_OP_CAPSULE: first positions and patterns of all slots, pool by pool, then the distances of every pattern
    std::vector<int32_t> packed     (int i_table) const;
    size_t               packed_size(int i_table) const;

private:
    struct table {
        llama_capsule_rope_params params;

        std::vector<std::vector<float>> distances; // per pattern
        std::array<std::vector<float>, 2> first;   // per pool, [n_slots][n_rot]
    };

    struct slot {
        llama_capsule_pos first   = {};
        int               pattern = -1;
    };

    uint32_t N = 0;

    std::vector<int>   layer_table;
    std::vector<table> tables;

    std::vector<std::vector<llama_capsule_pos>> patterns; // distances of the tokens of a slot
    std::array<std::vector<slot>, 2>            slots;

    // does a slot that begins there look like this? empty cells do not matter
    static bool matches(const std::vector<llama_capsule_pos> & pos, const std::vector<bool> & empty, const llama_capsule_pos & first,
            const std::vector<llama_capsule_pos> & pattern);

    void drop_unused_patterns();
};
