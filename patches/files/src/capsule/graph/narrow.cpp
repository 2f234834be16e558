#include "capsule/graph/narrow.h"

#include "capsule/model/kv.h"
#include "capsule/store/slots.h"

#include "llama-batch.h"
#include "llama-kv-cells.h"

#include "ggml-backend.h"

#include <algorithm>
#include <cmath>
#include <map>

llama_capsule_narrow::llama_capsule_narrow(const llama_capsule_kv & hot, const llama_capsule_slots & slots, const llama_capsule_tables & tables,
        uint32_t n_image, llama_capsule_image_attention mode) :
    hot(hot), slots(slots), n_image(n_image), mode(mode), layers(tables.layers.size()) {
    for (size_t i = 0; mode == LLAMA_CAPSULE_IMAGE_ATTENTION_AUTO && i < layers.size(); ++i) {
        const auto & heads = tables.layers[i].narrow;

        if (std::count(heads.begin(), heads.end(), 1) == 0) {
            continue;
        }
        for (uint32_t h = 0; h < heads.size(); ++h) {
            if (h == 0 || heads[h] != heads[h - 1]) {
                layers[i].push_back({ h, 0, heads[h] != 0 });
            }
            layers[i].back().n++;
        }
    }
}

static bool is_vision(const llama_kv_cells & cells, uint32_t i) {
    return !cells.is_empty(i) && cells.ext_get(i).tok == LLAMA_TOKEN_NULL;
}

namespace {

// vision tokens of a sequence: how many at each position, and how many of them are in slots
struct seq_images {
    struct count {
        uint32_t n      = 0;
        uint32_t n_cold = 0;
    };
    std::map<llama_pos, count> at;

    seq_images(const llama_kv_cells & hot, const llama_capsule_slots & slots, llama_seq_id seq_id) {
        for (uint32_t i = 0; i < hot.size(); ++i) {
            if (is_vision(hot, i) && hot.seq_has(i, seq_id)) {
                at[hot.pos_get(i)].n++;
            }
        }
        const auto & cold = slots.cells();
        for (uint32_t i = 0; i < slots.n_slots(); ++i) {
            for (uint32_t j = slots.slot(i).first; j < slots.slot(i).first + slots.slot(i).n_tokens(); ++j) {
                if (!cold.is_empty(j) && cold.seq_has(j, seq_id)) {
                    auto & c = at[cold.pos_get(j)];
                    c.n++;
                    c.n_cold++;
                }
            }
        }
    }
};

} // namespace

std::vector<llama_capsule_narrow::range> llama_capsule_narrow::own_images(const llama_ubatch & ubatch) const {
    const bool any = measures() || std::any_of(layers.begin(), layers.end(), [](const auto & runs) { return !runs.empty(); });

    if (!any || !ubatch.embd || (ubatch.token && std::any_of(ubatch.token, ubatch.token + ubatch.n_tokens, [](llama_token t) { return t != LLAMA_TOKEN_NULL; }))) {
        return {};
    }

    std::map<llama_seq_id, seq_images> all;
    std::vector<range> res;

    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        const llama_seq_id seq_id = ubatch.seq_id[i][0];
        const llama_pos    pos    = ubatch.pos[i];

        if (i > 0 && ubatch.seq_id[i - 1][0] == seq_id && pos >= res.back().first && pos < res.back().second) {
            res.push_back(res.back());
            continue;
        }

        const auto & at = all.try_emplace(seq_id, hot.cells(), slots, seq_id).first->second.at;

        // as in llama_capsule_spans: with M-RoPE the tokens of an image share a position, otherwise they are neighbours
        range own = { pos, pos + 1 };
        if (hot.n_pos() == 1) {
            while (at.count(own.first - 1) > 0) {
                own.first--;
            }
            while (at.count(own.second) > 0) {
                own.second++;
            }
            if (n_image > 0) {
                own.first += (pos - own.first)/n_image*n_image;
                own.second = std::min<llama_pos>(own.second, own.first + n_image);
            }
        }

        // a single token may be audio or a text's embedding. What is in slots can not be seen
        uint32_t n = 0;
        for (auto it = at.lower_bound(own.first); it != at.end() && it->first < own.second; ++it) {
            if (it->second.n_cold > 0) {
                return {};
            }
            n += it->second.n;
        }
        if (n < 2) {
            return {};
        }
        res.push_back(own);
    }

    // the first image sees no other one
    const auto others = [&](const auto & images) {
        return std::any_of(images.second.at.begin(), images.second.at.end(), [&](const auto & it) {
            return std::none_of(res.begin(), res.end(), [&](const range & own) { return it.first >= own.first && it.first < own.second; });
        });
    };
    const bool several = std::any_of(res.begin(), res.end(), [&](const range & own) { return own != res[0]; });

    return slots.n_slots() > 0 || several || std::any_of(all.begin(), all.end(), others) ? res : std::vector<range>();
}

bool llama_capsule_narrow::find(const llama_ubatch & ubatch) const {
    return !own_images(ubatch).empty();
}

template<typename T>
static void set_hide_as(ggml_tensor * dst, const llama_kv_cells & cells, const std::vector<std::pair<llama_pos, llama_pos>> & own, T zero, T inf) {
    std::vector<T> res(ggml_nelements(dst), zero);

    const uint32_t n = std::min<int64_t>(dst->ne[0], cells.size());
    for (uint32_t c = 0; c < n; ++c) {
        if (!is_vision(cells, c)) {
            continue;
        }
        const llama_pos pos = cells.pos_get(c);
        for (size_t i = 0; i < own.size(); ++i) {
            if (pos < own[i].first || pos >= own[i].second) {
                res[i*dst->ne[0] + c] = inf;
            }
        }
    }

    ggml_backend_tensor_set(dst, res.data(), 0, ggml_nbytes(dst));
}

void llama_capsule_narrow::set_hide(ggml_tensor * dst, const llama_ubatch & ubatch) const {
    const auto own = own_images(ubatch);

    if (dst->type == GGML_TYPE_F16) {
        set_hide_as<ggml_fp16_t>(dst, hot.cells(), own, ggml_fp32_to_fp16(0.0f), ggml_fp32_to_fp16(-INFINITY));
    } else {
        set_hide_as<float>(dst, hot.cells(), own, 0.0f, -INFINITY);
    }
}
