#pragma once

#include "capsule/format/tables.h"
#include "capsule/model/kv.h"

#include <array>
#include <cstdint>
#include <vector>

// hot cells that become one slot: a tile of h x w tokens, line by line
struct llama_capsule_cut {
    uint8_t h;
    uint8_t w;

    std::vector<uint32_t> cells;
};

// the tokens of one picture at places (y, x), ordered: tiles of 8 x 8 tokens from left to right and from top to bottom, and what is left at the edges.
//   What is there of a tile that lost tokens becomes lines of 8. The "cells" are indices into places
std::vector<llama_capsule_cut> llama_capsule_cut_grid(const std::vector<std::array<int32_t, 2>> & places);

// the vision tokens of a sequence with a position in [p0, p1) that are in hot cells, picture by picture
//   layer: its keys tell how wide a picture is, where positions do not; n_image: tokens of a picture, 0 if that is not known
std::vector<std::vector<llama_capsule_cut>> llama_capsule_cut_images(
        const llama_capsule_kv & kv, llama_seq_id seq_id, llama_pos p0, llama_pos p1,
        const llama_capsule_tables::layer & layer, uint32_t n_image);
