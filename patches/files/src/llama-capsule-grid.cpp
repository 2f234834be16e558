#include "llama-capsule-grid.h"

#include <algorithm>
#include <limits>
#include <map>
#include <numeric>

std::vector<uint32_t> llama_capsule_tile_order(const std::vector<llama_capsule_place> & places, uint32_t width, uint32_t height) {
    int64_t y0 = std::numeric_limits<int64_t>::max();
    int64_t x0 = y0;
    for (const auto & [y, x] : places) {
        y0 = std::min<int64_t>(y0, y);
        x0 = std::min<int64_t>(x0, x);
    }

    std::map<std::array<int64_t, 2>, uint32_t> n_tokens; // of a tile
    for (const auto & [y, x] : places) {
        n_tokens[{ (y - y0)/height, (x - x0)/width }]++;
    }

    std::vector<std::array<int64_t, 5>> keys;
    for (const auto & [y, x] : places) {
        const int64_t row = (y - y0)/height;
        const int64_t col = (x - x0)/width;

        keys.push_back({ n_tokens[{ row, col }] != width*height, row, col, y, x });
    }

    std::vector<uint32_t> res(places.size());
    std::iota(res.begin(), res.end(), 0);
    std::stable_sort(res.begin(), res.end(), [&](uint32_t a, uint32_t b) { return keys[a] < keys[b]; });

    return res;
}

uint32_t llama_capsule_square_side(uint32_t n) {
    uint32_t side = 0;
    while ((uint64_t) (side + 1)*(side + 1) <= n) {
        ++side;
    }
    return side*side == n ? side : 0;
}
