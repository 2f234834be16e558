#pragma once

#include "llama-capsule-rope.h"
#include "llama-capsule-tile.h"
#include "llama-capsule-views.h"

//
// `pca`: no key is rebuilt. The score of a token is sum_m phi_m(t) <q^m, mean + sum_r basis[r][t] row_r>, with a few base views q^m of the query (llama_capsule_views)
//

// constants of a layer in a tier
class llama_capsule_projection {
public:
    const llama_capsule_codec & codec;

    llama_capsule_projection(const llama_capsule_codec & codec);

    // false if keys have to be rebuilt: rows that are not quantized, no kernel
    bool usable() const;

    // is it less work than rebuilding the keys?
    bool pays(uint32_t n_q, const llama_capsule_views & views) const;

    llama_capsule_project params() const;

private:
    std::vector<int16_t> basis;

    float scale = 0.0f;
};

// the queries of a KV head
class llama_capsule_project_query {
public:
    // q [n_q][ld_q], as the first token of a slot sees it
    void init(const llama_capsule_projection & projection, const llama_capsule_views & views, const llama_capsule_rope_params * rope, uint32_t i_head,
            uint32_t n_q, const float * q, size_t ld_q);

    // scores of the tokens of a slot: out[i*ld_out + t]
    void scores(const llama_capsule_tile & tile, const uint8_t * slot, float * out, size_t ld_out);

private:
    const llama_capsule_projection * projection = nullptr;
    const llama_capsule_views      * views      = nullptr;

    uint32_t i_head = 0;
    uint32_t n_q    = 0;

    // [views][n_q]
    llama_capsule_buf<uint8_t> queries;  // see llama_capsule_simd
    llama_capsule_buf<float>   scales;
    llama_capsule_buf<float>   means;
    llama_capsule_buf<float>   products; // each [rows]
};
