#pragma once

#include "llama-capsule-rope.h"
#include "llama-capsule-tile.h"

//
// `retain` without a key MLP, keys stored rotated: no key is rebuilt. The score of a token is that of its own row with the query turned back by its distance, plus
//   those of the rows that it is predicted from with the same query times its gates. These queries are made once for all slots with the same distances
//

// which queries the rows of a layer in a tier meet
struct llama_capsule_variants {
    static constexpr uint32_t NONE = UINT32_MAX;

    // a query, and the row that it meets
    struct variant {
        uint32_t token; // that sees the query, and whose score the product is part of
        uint32_t gate;  // offset in the gates of a head, NONE: the row is that of the token itself
    };

    const llama_capsule_codec & codec;

    // groups of rows of one type, see llama_capsule_score
    std::vector<uint32_t> groups; // [LLAMA_CAPSULE_N_TYPES + 1], the first of a type
    std::vector<uint32_t> first;

    std::vector<variant>  variants; // [n_vectors][n_rows]
    std::vector<uint32_t> tokens;   // of the variants; block_size: of none, the variant fills up a vector

    llama_capsule_variants(const llama_capsule_codec & codec);

    // false if the tile has to be decoded
    bool usable() const;
};

class llama_capsule_query {
public:
    // distances may have changed
    void reset() {
        distances = nullptr;
    }

    // q [n_q][d], as the first token of a slot sees it; distances [N][n_rot]
    void init(const llama_capsule_variants & variants, uint32_t i_head, uint32_t n_q, const float * q, size_t ld_q,
            const float * distances, const llama_capsule_rope_params & rope);

    // scores of the tokens of n slots: out[i_slot*ld_slot + i_q*ld_out + t]
    void scores(const llama_capsule_tile & tile, uint32_t n, const uint8_t * const * slots, float * out, size_t ld_slot, size_t ld_out);

private:
    const llama_capsule_variants * variants = nullptr;

    uint32_t i_head = 0;
    uint32_t n_q    = 0;

    const float * distances = nullptr; // that the angles are of

    llama_capsule_buf<float>   angles;  // [N][n_rot], negative
    llama_capsule_buf<float>   turned;  // [N][d], a query as the tokens see it
    llama_capsule_buf<uint8_t> queries; // see llama_capsule_score

    std::vector<llama_capsule_lane> lanes;

    llama_capsule_buf<float>     sums; // [n/n_slots, rounded up][n_q][tokens, and that of none][n_slots]
    std::vector<float *>         dst;
    std::vector<const uint8_t *> src;
};
