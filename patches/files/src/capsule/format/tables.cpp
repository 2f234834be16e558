#include "capsule/format/tables.h"

#include "capsule/util/sha256.h"
#include "llama-impl.h"

#include <algorithm>
#include <cmath>
#include <iterator>

//
// sizes
//

size_t llama_capsule_tables::bytes_tile(uint32_t i_tier) const {
    size_t res = 0;

    auto add = [&](const ggml_capsule_channels & channels, const std::vector<uint8_t> & table, uint32_t n_head) {
        const size_t n = N_ROWS*ggml_capsule_n_groups(channels);
        for (size_t h = i_tier*n_head; h < (i_tier + 1)*n_head; ++h) {
            res += ggml_capsule_head_size(channels, table.data() + h*n, GGML_CAPSULE_SIDE, GGML_CAPSULE_SIDE);
        }
    };
    for (const auto & l : layers) {
        add(channels_k(l), l.k_table, l.n_head_kv);
        add(channels_v(l), l.v_table, l.n_head_kv);
    }

    return res;
}

size_t llama_capsule_tables::bytes_tile_f16() const {
    size_t res = 0;
    for (const auto & l : layers) {
        res += 64*sizeof(ggml_fp16_t)*l.n_head_kv*(l.n_embd_head_k + l.n_embd_head_v);
    }
    return res;
}

uint32_t llama_capsule_tables::tier_for_ratio(float ratio) const {
    auto distance = [&](uint32_t i) { return fabsf(1.0f - 1.0f/smaller[i] - ratio); };

    uint32_t res = 0;
    for (uint32_t i = 1; i < smaller.size(); ++i) {
        if (distance(i) < distance(res)) {
            res = i;
        }
    }
    return res;
}

void llama_capsule_tables::init_tier_first() {
    // a tier is a little smaller than it was made for
    i_tier_first = 0;
    while (i_tier_first + 1 < smaller.size() && smaller[i_tier_first] >= 7.0f) {
        ++i_tier_first;
    }
}

//
// without a file
//

// bits of the row blocks of each tier, what kvcapsule_gguf/codec/builtin.py finds
using capsule_builtin = uint8_t[7][llama_capsule_tables::N_ROWS];

static constexpr capsule_builtin BUILTIN_K = {
    { 16, 6, 4, 4, 4, 4, 3, 3, 3, 3, 3, 3, 2, 3, 2, 2, 2, 3, 2, 2, 2, 2, 3, 2, 2, 2, 2, 2, 2, 2, 1, 1, 1 },
    { 16, 6, 4, 4, 4, 4, 3, 3, 4, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 2, 3, 3, 2, 3, 2, 2, 2, 2, 2, 2, 2, 2 },
    { 16, 6, 4, 6, 4, 4, 4, 4, 4, 3, 3, 3, 3, 4, 3, 3, 3, 4, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 2, 3 },
    { 16, 6, 6, 6, 6, 6, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 3, 4, 4, 3, 4, 4, 3, 3, 3, 3, 3, 3, 4 },
    { 16, 8, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 4, 6, 4, 4, 4, 6, 4, 4, 4, 4, 6, 4, 4, 4, 4, 4, 4, 4, 4, 4, 6 },
    { 16, 8, 8, 8, 8, 8, 8, 6, 8, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 8 },
    { 16, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8 },
};

static constexpr capsule_builtin BUILTIN_V = {
    { 16, 4, 3, 4, 3, 3, 2, 2, 3, 2, 2, 2, 2, 2, 2, 1, 1, 2, 1, 1, 1, 1, 2, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0 },
    { 16, 4, 4, 4, 3, 3, 3, 3, 3, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 1, 1, 2, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0 },
    { 16, 4, 4, 4, 3, 4, 3, 3, 3, 3, 3, 3, 2, 3, 2, 2, 2, 3, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 1, 1, 1, 1, 1 },
    { 16, 6, 4, 4, 4, 4, 4, 3, 4, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 2, 3, 3, 2, 3, 3, 3, 2, 2, 2, 2, 2, 2 },
    { 16, 6, 6, 6, 4, 6, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 3, 4, 4, 3, 4, 3, 4, 3, 3, 3, 3, 3, 3 },
    { 16, 8, 6, 8, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 4, 6, 6, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4 },
    { 16, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 6, 6, 8, 6, 6, 6, 6, 6, 6, 6, 6, 6, 8 },
};

static std::vector<uint8_t> capsule_builtin_table(const capsule_builtin & tiers, uint32_t n_head, uint32_t n_groups) {
    std::vector<uint8_t> res;
    for (const auto & tier : tiers) {
        for (uint32_t h = 0; h < n_head; ++h) {
            for (uint8_t bits : tier) {
                res.insert(res.end(), n_groups, bits);
            }
        }
    }
    return res;
}

void llama_capsule_tables::init_builtin() {
    path    = "built in";
    builtin = true;

    llama_capsule_sha256 sha;

    sha.update("kvcapsule-builtin\n" + fingerprint + format("\nn_rot=%u\n", n_rot));
    sha.update(BUILTIN_K, sizeof(BUILTIN_K));
    sha.update(BUILTIN_V, sizeof(BUILTIN_V));

    for (auto & l : layers) {
        l.k_mean.assign(l.n_head_kv*l.n_embd_head_k, 0.0f);
        l.v_mean.assign(l.n_head_kv*l.n_embd_head_v, 0.0f);

        l.k_table = capsule_builtin_table(BUILTIN_K, l.n_head_kv, ggml_capsule_n_groups(channels_k(l)));
        l.v_table = capsule_builtin_table(BUILTIN_V, l.n_head_kv, ggml_capsule_n_groups(channels_v(l)));

        sha.update(format("%u,%d,%u,%u,%u\n", l.il, l.rope, l.n_head_kv, l.n_embd_head_k, l.n_embd_head_v));
    }

    smaller.resize(std::size(BUILTIN_K));
    for (uint32_t i = 0; i < smaller.size(); ++i) {
        smaller[i] = (double) bytes_tile_f16()/bytes_tile(i);
    }
    init_tier_first();

    id = std::stoull(sha.finish().substr(0, 16), nullptr, 16);
}
