#include "llama-capsule-grid.h"

#include <algorithm>
#include <limits>
#include <map>
#include <numeric>

std::vector<uint32_t> llama_capsule_tile_order(const std::vector<llama_capsule_place> & places, uint32_t width, uint32_t height) {
    int64_t y0 = std::numeric_limits<int64_t>::max();
    int64_t x0 = y0;
    int64_t y1 = std::numeric_limits<int64_t>::min();

    for (const auto & [y, x] : places) {
        y0 = std::min<int64_t>(y0, y);
        x0 = std::min<int64_t>(x0, x);
        y1 = std::max<int64_t>(y1, y);
    }

    // rows from here on are in no whole tile
    const int64_t bottom = places.empty() ? 0 : (y1 - y0 + 1)/height*height;

    std::map<std::array<int64_t, 2>, uint32_t> n_tokens; // of a tile
    for (const auto & [y, x] : places) {
        n_tokens[{ (y - y0)/height, (x - x0)/width }]++;
    }

    std::vector<std::array<int64_t, 5>> keys;
    for (const auto & place : places) {
        const int64_t y = place[0] - y0;
        const int64_t x = place[1] - x0;

        if (n_tokens[{ y/height, x/width }] == width*height) {
            keys.push_back({ 0, y/height, x/width, y, x });
        } else if (y < bottom) {
            keys.push_back({ 1, y, x, 0, 0 });
        } else {
            keys.push_back({ 2, -x, y, 0, 0 });
        }
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
