#pragma once

#include <cstddef>

// how wide a picture is whose positions do not tell. It needs nothing of llama.cpp

// 0 if n is no square
size_t llama_capsule_square_side(size_t n);

// x: [n][d], the keys of a picture without RoPE -> the width for which neighbours in a column and in a row are most alike.
//   Tried: widths that divide n; those that divide n + 1, since rows may end with a token of their own, which the last one lacks; and 8,
//   whether it divides n or not. A small square is a square. As in grid_width() of kvcapsule_gguf/codec/tiles.py
size_t llama_capsule_grid_width(const float * x, size_t n, size_t d);
