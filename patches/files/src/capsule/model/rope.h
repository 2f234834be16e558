#pragma once

#include "ggml.h"

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

// of a cell; all 0 if it is empty. n_pos: components that RoPE reads
llama_capsule_pos llama_capsule_rope_pos(const llama_kv_cells & cells, uint32_t i, uint32_t n_pos);

// are the keys of a layer rotated?
bool llama_capsule_layer_rope(const llama_model & model, int32_t il);

// the rule above and the parameters below against what the model's own graph does to the keys that it writes to this cache
bool llama_capsule_check_rope(
        const ggml_cgraph * gf,
        const ggml_tensor * k_cache,
        const ggml_tensor * k_rot,
        const llama_model & model,
      const llama_cparams & cparams,
                  int32_t   il);

// RoPE of a layer on the host, see ggml_rope_cache_init() and ggml_mrope_cache_init()
struct llama_capsule_rope_params {
    uint32_t n_rot = 0;
    bool     norm  = false; // pairs of neighbours, otherwise of halves

    llama_capsule_rope_params() = default;
    llama_capsule_rope_params(const llama_model & model, const llama_cparams & cparams, int il);

    bool operator==(const llama_capsule_rope_params & other) const;

    // false if the kind of RoPE is not known here
    static bool supported(const llama_model & model);

    // n_rot/2 angles, by which the pairs are turned
    void angles(const llama_capsule_pos & pos, float * angle) const;

    // what a turned key is multiplied by (YaRN)
    float scale() const { return mscale; }

    // what turns a key back and undoes its scale, n_rot values: (cos, sin) per pair (norm), or all cos, then all sin
    void fill_inverse(const llama_capsule_pos & pos, float * cs) const;

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
