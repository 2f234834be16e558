#include "capsule/compress/grid.h"

#include <algorithm>
#include <vector>

static constexpr size_t CAPSULE_LEAST_WIDTH = 8; // of a tile
static constexpr size_t CAPSULE_MAX_ASPECT  = 8;
static constexpr double CAPSULE_CLEARLY     = 0.9; // most pictures of a square number of tokens are squares: another width has to be that much better

size_t llama_capsule_square_side(size_t n) {
    size_t side = 0;
    while (side*side < n) {
        ++side;
    }
    return side*side == n ? side : 0;
}

size_t llama_capsule_grid_width(const float * x, size_t n, size_t d) {
    const size_t side = llama_capsule_square_side(n);
    if (side > 0 && side < CAPSULE_LEAST_WIDTH) {
        return side;
    }

    const auto distance = [&](size_t i, size_t j) {
        float sum = 0.0f;
        for (size_t c = 0; c < d; ++c) {
            const float diff = x[i*d + c] - x[j*d + c];
            sum += diff*diff;
        }
        return sum;
    };

    std::vector<float> left(n, 0.0f); // of a token and the one before it
    for (size_t i = 1; i < n; ++i) {
        left[i] = distance(i, i - 1);
    }

    // the mean over neighbours in a column, and over neighbours in a row
    const auto roughness = [&](size_t w) {
        double column = 0.0;
        double row    = 0.0;
        for (size_t i = w; i < n; ++i) {
            column += distance(i, i - w);
        }
        for (size_t i = 0; i < n; ++i) {
            row += i%w > 0 ? left[i] : 0.0f;
        }
        return column/(n - w) + row/(n - (n + w - 1)/w);
    };

    size_t res   = CAPSULE_LEAST_WIDTH;
    double least = n > res ? roughness(res) : 0.0;

    for (size_t w = CAPSULE_LEAST_WIDTH + 1; w <= (n + 1)/CAPSULE_LEAST_WIDTH; ++w) {
        const size_t h = (n + 1)/w;
        if ((n%w == 0 || (n + 1)%w == 0) && std::max(w, h) <= CAPSULE_MAX_ASPECT*std::min(w, h)) {
            const double rough = roughness(w)*(w == side ? CAPSULE_CLEARLY : 1.0);
            if (rough < least) {
                res   = w;
                least = rough;
            }
        }
    }

    return res;
}
