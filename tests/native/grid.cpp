// llama_capsule_grid_width() for tests/test_grid.py

#include "../../patches/files/src/capsule/compress/grid.cpp"

extern "C" size_t grid_width(const float * x, size_t n, size_t d) {
    return llama_capsule_grid_width(x, n, d);
}
