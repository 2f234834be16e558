#include "capsule/compress/cut.h"

#include "capsule/compress/grid.h"

#include "../ggml/src/ggml-capsule/layout.h"
#include "llama-kv-cells.h"

#include <algorithm>
#include <limits>
#include <map>

static constexpr size_t CAPSULE_SIDE = GGML_CAPSULE_SIDE;

using cells_t = std::vector<uint32_t>;

// without a grid: lines of 8 tokens, and a shorter one
static void capsule_cut_run(const cells_t & cells, std::vector<llama_capsule_cut> & res) {
    for (size_t i = 0; i < cells.size();) {
        const size_t left = cells.size() - i;
        const size_t w    = std::min(left, CAPSULE_SIDE);
        const size_t h    = std::min(left/w, CAPSULE_SIDE);

        res.push_back({ (uint8_t) h, (uint8_t) w, { cells.begin() + i, cells.begin() + i + h*w } });
        i += h*w;
    }
}

std::vector<llama_capsule_cut> llama_capsule_cut_grid(const std::vector<std::array<int32_t, 2>> & places) {
    int64_t y0 = std::numeric_limits<int32_t>::max();
    int64_t x0 = y0;
    for (const auto & [y, x] : places) {
        y0 = std::min<int64_t>(y0, y);
        x0 = std::min<int64_t>(x0, x);
    }

    std::map<std::array<int64_t, 2>, cells_t> tiles;
    for (size_t i = 0; i < places.size(); ++i) {
        tiles[{ (places[i][0] - y0)/GGML_CAPSULE_SIDE, (places[i][1] - x0)/GGML_CAPSULE_SIDE }].push_back(i);
    }

    std::vector<llama_capsule_cut> res;
    for (const auto & [_, cells] : tiles) {
        const auto & [y, x] = places[cells.front()];

        // if the tile is whole, its corners tell its sides
        const int64_t h = (int64_t) places[cells.back()][0] - y + 1;
        const int64_t w = (int64_t) places[cells.back()][1] - x + 1;

        bool whole = w > 0 && h*w == (int64_t) cells.size();
        for (size_t j = 0; j < cells.size() && whole; ++j) {
            whole = places[cells[j]][0] == y + (int64_t) j/w && places[cells[j]][1] == x + (int64_t) j%w;
        }
        if (whole) {
            res.push_back({ (uint8_t) h, (uint8_t) w, cells });
        } else {
            capsule_cut_run(cells, res);
        }
    }

    return res;
}

// cells: of one picture, whose positions do not tell where a token lies
static size_t capsule_image_width(
        const llama_capsule_kv & kv, const cells_t & cells, const llama_capsule_tables::layer & layer, uint32_t n_image) {
    const size_t n_span = kv.cells().pos_get(cells.back()) - kv.cells().pos_get(cells.front()) + 1;

    // pictures of one size, or one that lost tokens: a square, if their number is one
    if (n_image > 0 || cells.size() < n_span) {
        const size_t side = llama_capsule_square_side(n_image > 0 ? n_image : n_span);
        if (side > 0 || cells.size() < n_span) {
            return side > 0 ? side : CAPSULE_SIDE;
        }
    }

    const size_t d  = layer.n_embd_head_k;
    const size_t ld = layer.n_head_kv*d;

    llama_capsule_kv::reader reader(kv, cells);
    reader.load(layer.il, layer.rope, true, false);

    std::vector<float> keys(cells.size()*ld);
    for (uint32_t h = 0; h < layer.n_head_kv; ++h) {
        reader.read_k(h, 0, cells.size(), keys.data() + h*d, ld);
    }
    return llama_capsule_grid_width(keys.data(), cells.size(), ld);
}

// cells: of one picture
static std::vector<llama_capsule_cut> capsule_cut_image(
        const llama_capsule_kv & kv, const cells_t & cells, const llama_capsule_tables::layer & layer, uint32_t n_image) {
    const bool mrope = kv.n_pos() > 1;

    const llama_pos first = kv.cells().pos_get(cells.front());
    const int64_t   width = mrope ? 0 : capsule_image_width(kv, cells, layer, n_image);

    std::vector<std::array<int32_t, 2>> places;
    for (uint32_t i : cells) {
        if (mrope) {
            const auto & ext = kv.cells().ext_get(i);
            places.push_back({ ext.y, ext.x });
        } else {
            const int64_t dist = (int64_t) kv.cells().pos_get(i) - first;
            places.push_back({ (int32_t) (dist/width), (int32_t) (dist%width) });
        }
    }

    std::vector<llama_capsule_cut> res;

    res = llama_capsule_cut_grid(places);
    for (auto & cut : res) {
        for (auto & i : cut.cells) {
            i = cells[i];
        }
    }

    return res;
}

std::vector<std::vector<llama_capsule_cut>> llama_capsule_cut_images(
        const llama_capsule_kv & kv, llama_seq_id seq_id, llama_pos p0, llama_pos p1,
        const llama_capsule_tables::layer & layer, uint32_t n_image) {
    const auto & cells = kv.cells();

    std::vector<std::vector<llama_capsule_cut>> res;

    cells_t image;

    const auto finish = [&]() {
        if (!image.empty()) {
            res.push_back(capsule_cut_image(kv, image, layer, n_image));
            image.clear();
        }
    };

    for (uint32_t i : kv.find(seq_id, p0, p1)) {
        const llama_pos first = cells.pos_get(image.empty() ? i : image.front());
        const llama_pos dist  = cells.pos_get(i) - first;

        // M-RoPE: a new position is a new picture
        if (kv.n_pos() > 1 ? dist > 0 : n_image > 0 && (uint32_t) dist >= n_image) {
            finish();
        }
        if (cells.ext_get(i).tok == LLAMA_TOKEN_NULL) {
            image.push_back(i);
        } else {
            finish();
        }
    }
    finish();

    return res;
}
