#include "capsule/format/tables.h"

#include "llama-capsule-sha256.h"
#include "llama-impl.h"

#include <algorithm>
#include <cmath>

//
// sizes
//

static constexpr uint32_t N_GROUP = 32; // channels, in two registers

// the channels with RoPE first; an odd last channel has a zero beside it
static std::vector<uint32_t> capsule_groups(uint32_t d, uint32_t n_rot) {
    std::vector<uint32_t> res;
    for (uint32_t i = 0; i < n_rot; i += N_GROUP) {
        res.push_back(std::min(N_GROUP, n_rot - i));
    }
    for (uint32_t i = n_rot; i < d; i += N_GROUP) {
        res.push_back(std::min(N_GROUP, GGML_PAD(d - i, 2)));
    }
    return res;
}

std::vector<uint32_t> llama_capsule_tables::groups_k(const layer & l) const {
    return capsule_groups(l.n_embd_head_k, l.rope ? n_rot : 0);
}

std::vector<uint32_t> llama_capsule_tables::groups_v(const layer & l) const {
    return capsule_groups(l.n_embd_head_v, 0);
}

// of a head: scales, then codes in planes of 8, 4, 2 and 1 bits, each padded to 8 bytes; f16 and f32 values need no scale
static size_t capsule_head_bytes(const uint8_t * table, const std::vector<uint32_t> & groups) {
    size_t n_scales = 0;
    size_t n_codes  = 0;
    for (uint32_t i = 0; i < llama_capsule_tables::N_ROWS; ++i) {
        // the first and the last row are alone
        const uint32_t n_rows = i == 0 || i == llama_capsule_tables::N_ROWS - 1 ? 1 : 2;
        for (uint32_t n : groups) {
            const uint32_t bits = *table++;

            n_scales += bits > 0 && bits < 16 ? sizeof(ggml_fp16_t) : 0;
            for (uint32_t plane : { 32, 16, 8, 4, 2, 1 }) {
                n_codes += bits & plane ? (n_rows*n*plane + 7)/8 : 0;
            }
        }
    }
    return GGML_PAD(n_scales, 8) + GGML_PAD(n_codes, 8);
}

size_t llama_capsule_tables::bytes_tile(uint32_t i_tier) const {
    size_t res = 0;
    for (const auto & l : layers) {
        const auto g_k = groups_k(l);
        const auto g_v = groups_v(l);

        for (size_t h = i_tier*l.n_head_kv; h < (i_tier + 1)*l.n_head_kv; ++h) {
            res += capsule_head_bytes(l.k_table.data() + h*N_ROWS*g_k.size(), g_k);
            res += capsule_head_bytes(l.v_table.data() + h*N_ROWS*g_v.size(), g_v);
        }
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
static constexpr uint8_t BUILTIN[][llama_capsule_tables::N_ROWS] = {
    { 16, 4, 4, 4, 3, 3, 3, 3, 3, 2, 2, 2, 2, 3, 2, 2, 2, 3, 2, 2, 1, 2, 2, 1, 2, 1, 1, 1, 1, 1, 1, 1, 0 },
    { 16, 4, 4, 4, 3, 4, 3, 3, 3, 3, 3, 3, 2, 3, 2, 2, 2, 3, 2, 2, 2, 2, 3, 2, 2, 2, 2, 2, 1, 1, 1, 1, 2 },
    { 16, 6, 4, 4, 4, 4, 3, 3, 4, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 2, 2, 3, 2, 2, 2, 2, 2, 2, 2, 2, 2, 3 },
    { 16, 6, 6, 6, 4, 4, 4, 4, 4, 3, 4, 4, 3, 4, 3, 3, 3, 4, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 2 },
    { 16, 6, 6, 6, 6, 6, 6, 4, 6, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 6 },
    { 16, 8, 8, 8, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 4, 6, 4, 4, 4 },
    { 16, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 6, 8, 6, 6, 8 },
};

static std::vector<uint8_t> capsule_builtin_table(uint32_t n_head, uint32_t n_groups) {
    std::vector<uint8_t> res;
    for (const auto & tier : BUILTIN) {
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
    quality = 0.5f;

    llama_capsule_sha256 sha;

    sha.update("kvcapsule-builtin\n" + fingerprint + format("\nn_rot=%u\n", n_rot));
    sha.update(BUILTIN, sizeof(BUILTIN));

    for (auto & l : layers) {
        l.k_mean.assign(l.n_head_kv*l.n_embd_head_k, 0.0f);
        l.v_mean.assign(l.n_head_kv*l.n_embd_head_v, 0.0f);

        l.k_table = capsule_builtin_table(l.n_head_kv, groups_k(l).size());
        l.v_table = capsule_builtin_table(l.n_head_kv, groups_v(l).size());

        sha.update(format("%u,%d,%u,%u,%u\n", l.il, l.rope, l.n_head_kv, l.n_embd_head_k, l.n_embd_head_v));
    }

    smaller.resize(sizeof(BUILTIN)/sizeof(BUILTIN[0]));
    for (uint32_t i = 0; i < smaller.size(); ++i) {
        smaller[i] = (double) bytes_tile_f16()/bytes_tile(i);
    }
    init_tier_first();

    id = std::stoull(sha.finish().substr(0, 16), nullptr, 16);
}
