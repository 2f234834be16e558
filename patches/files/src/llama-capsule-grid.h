#pragma once

#include <array>
#include <cstdint>
#include <vector>

// place of a token in its image: y, x
using llama_capsule_place = std::array<int32_t, 2>;

// tile blocks: the order in which the tokens of one image are cut into blocks of width*height
//   tile by tile: the whole tiles, then what there is of the others
std::vector<uint32_t> llama_capsule_tile_order(const std::vector<llama_capsule_place> & places, uint32_t width, uint32_t height);

// the side of a square of n tokens, 0 if it is none
uint32_t llama_capsule_square_side(uint32_t n);
