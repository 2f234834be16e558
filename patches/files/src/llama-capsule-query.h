#pragma once

#include "llama-capsule-rope.h"
#include "llama-capsule-tile.h"

//
// `retain` without a key MLP, keys stored rotated: no key is rebuilt. The score of a token is that of its own row with the query turned back by its distance, plus
//   those of the rows that it is predicted from with the same query times its gates. These queries are made once for all slots with the same distances
//

// which queries the rows of a layer in a tier meet, ordered by row
struct llama_capsule_variants {
    const llama_capsule_codec & codec;

    std::vector<uint32_t> first; // [n_rows + 1]
    std::vector<uint32_t> token;
    std::vector<int32_t>  gate;  // offset in the gates of a head, -1: the row is that of the token itself
    std::vector<float>    zero;  // minus the code that stands for 0 in the row

    std::vector<uint32_t> by_token; // ordered by token

    llama_capsule_variants(const llama_capsule_codec & codec);

    // false if the tile has to be decoded
    bool usable() const;
};

class llama_capsule_query {
public:
    // q [n_q][d], as the first token of a slot sees it; distances [N][n_rot]
    void init(const llama_capsule_variants & variants, uint32_t i_head, uint32_t n_q, const float * q, size_t ld_q,
            const float * distances, const llama_capsule_rope_params & rope);

    // scores of the tokens of a slot: out[i*ld_out + t]
    void scores(const llama_capsule_tile & tile, const uint8_t * slot, float * out, size_t ld_out);

private:
    const llama_capsule_variants * variants = nullptr;

    uint32_t i_head = 0;
    uint32_t n_q    = 0;

    llama_capsule_buf<float>  angles;
    llama_capsule_buf<float>  turned;  // [n_q][d]
    llama_capsule_buf<float>  row;     // [d]
    llama_capsule_buf<int8_t> codes;   // see llama_capsule_score
    llama_capsule_buf<float>  scales;
    llama_capsule_buf<float>  offsets;
    llama_capsule_buf<float>  acc;     // [n_q][N][LLAMA_CAPSULE_VEC]
};
