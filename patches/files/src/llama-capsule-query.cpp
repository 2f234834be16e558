#include "llama-capsule-query.h"

#include <algorithm>

//
// llama_capsule_variants
//

llama_capsule_variants::llama_capsule_variants(const llama_capsule_codec & codec) : codec(codec) {
    const auto & layer  = codec.layer;
    const auto & counts = codec.tl.key_rows;

    const uint32_t d = layer.n_embd_head_k;
    const uint32_t N = codec.data.block_size;
    const uint32_t K = codec.data.n_neighbours;

    const uint32_t n_rows = llama_capsule_rows_total(counts);

    // rows as they are stored, all of them rotated
    if (codec.tl.key_codec != LLAMA_CAPSULE_KEY_CODEC_RETAIN || layer.n_mlp > 0 || counts[0] + counts[1] > 0 || (d != 64 && d != 128 && d != 256) ||
            !llama_capsule_simd_get().score_rows) {
        return;
    }

    std::vector<std::vector<variant>> by_row(n_rows);
    for (uint32_t r = 0; r < n_rows; ++r) {
        by_row[r].push_back({ layer.token_order[r], NONE });
        for (uint32_t j = 0; j < (N - layer.n_kept)*K && r < layer.n_kept; ++j) {
            if (layer.k_neighbours[j] == (int32_t) r) {
                by_row[r].push_back({ layer.token_order[layer.n_kept + j/K], j*d });
            }
        }
    }

    const uint32_t n_cur = llama_capsule_score::n_rows(llama_capsule_simd_get().n_lanes); // rows at a time

    // as many vectors for a group as one of its rows meets queries; training orders the kept tokens by that
    uint32_t r = 0;
    for (uint32_t count : counts) {
        groups.push_back(first.size());
        for (uint32_t end = r + count; r < end; r = std::min(r + n_cur, end)) {
            first.push_back(variants.size()/n_cur);

            size_t n = 0;
            for (uint32_t j = r; j < std::min(r + n_cur, end); ++j) {
                n = std::max(n, by_row[j].size());
            }
            for (uint32_t v = 0; v < n*n_cur; ++v) {
                const uint32_t j     = r + v%n_cur;
                const bool     empty = j >= end || v/n_cur >= by_row[j].size();

                variants.push_back(empty ? by_row[r][0] : by_row[j][v/n_cur]);
                tokens  .push_back(empty ? N : variants.back().token);
            }
        }
    }
    groups.push_back(first.size());
    first .push_back(variants.size()/n_cur);
}

bool llama_capsule_variants::usable() const {
    return !variants.empty();
}

//
// llama_capsule_query
//

void llama_capsule_query::init(const llama_capsule_variants & variants, uint32_t i_head, uint32_t n_q, const float * q, size_t ld_q,
        const float * distances, const llama_capsule_rope_params & rope) {
    this->variants = &variants;
    this->i_head   = i_head;
    this->n_q      = n_q;

    const auto & simd  = llama_capsule_simd_get();
    const auto & data  = variants.codec.data;
    const auto & layer = variants.codec.layer;

    const uint32_t d         = layer.n_embd_head_k;
    const uint32_t N         = data.block_size;
    const uint32_t n_rows    = llama_capsule_score::n_rows(simd.n_lanes);
    const size_t   size      = llama_capsule_score::query_size(d, n_rows);

    const float * gates = layer.k_gate.data() + i_head*(N - layer.n_kept)*data.n_neighbours*d;

    if (distances != this->distances) {
        this->distances = distances;
        angles.resize(N*rope.n_rot);
        for (uint32_t t = 0; t < N; ++t) {
            rope.negate(distances + t*rope.n_rot, angles.data() + t*rope.n_rot);
        }
    }

    turned .resize(N*d);
    queries.resize(variants.first.back()*n_q*size);

    for (uint32_t i = 0; i < n_q; ++i) {
        for (uint32_t t = 0; t < N; ++t) {
            std::copy(q + i*ld_q, q + i*ld_q + d, turned.data() + t*d);
        }
        simd.rope(N, turned.data(), d, angles.data(), rope.n_rot, rope.n_rot, rope.norm);

        for (int t = 0; t < LLAMA_CAPSULE_N_TYPES; ++t) {
            lanes.clear();
            for (uint32_t g = variants.groups[t]; g < variants.groups[t + 1]; ++g) {
                const uint32_t first = variants.first[g];
                const uint32_t n     = variants.first[g + 1] - first;

                for (uint32_t v = 0; v < n*n_rows; ++v) {
                    const auto &  cur  = variants.variants[first*n_rows + v];
                    const float * gate = cur.gate == llama_capsule_variants::NONE ? nullptr : gates + cur.gate;

                    lanes.push_back({ turned.data() + cur.token*d, gate, queries.data() + first*n_q*size, n*n_q, v/n_rows*n_q + i, v%n_rows });
                }
            }
            if (!lanes.empty()) {
                simd.to_lanes(LLAMA_CAPSULE_TYPES[t], d, lanes.size(), lanes.data());
            }
        }
    }
}

void llama_capsule_query::scores(const llama_capsule_tile & tile, uint32_t n, const uint8_t * const * slots, float * out, size_t ld_slot, size_t ld_out) {
    const auto & simd   = llama_capsule_simd_get();
    const auto & layer  = variants->codec.layer;
    const auto & counts = variants->codec.tl.key_rows;

    const uint32_t N       = variants->codec.data.block_size;
    const uint32_t n_slots = llama_capsule_score::n_slots(simd.n_lanes);
    const size_t   ld      = GGML_PAD(N + 1, LLAMA_CAPSULE_VEC)*n_slots;
    const size_t   size    = (n + n_slots - 1)/n_slots*n_q*ld;

    const llama_capsule_score s = { layer.n_embd_head_k, n_q, variants->first.data(), variants->tokens.data(), queries.data(), ld };

    std::fill_n(sums.resize(size), size, 0.0f);

    dst.resize(n_slots);
    src.resize(n);

    for (int t = 0; t < LLAMA_CAPSULE_N_TYPES; ++t) {
        if (counts[t] > 0) {
            for (uint32_t i = 0; i < n; ++i) {
                src[i] = tile.rows_at(slots[i], i_head, t);
            }
            simd.score_rows(s, LLAMA_CAPSULE_TYPES[t], variants->groups[t], counts[t], n, src.data(), sums.data());
        }
    }

    for (uint32_t i = 0; i < n; i += n_slots) {
        for (uint32_t q = 0; q < n_q; ++q) {
            // lanes without a slot have the scores of the last one
            for (uint32_t j = 0; j < n_slots; ++j) {
                dst[j] = out + std::min(i + j, n - 1)*ld_slot + q*ld_out;
            }
            simd.to_slots(GGML_PAD(N, LLAMA_CAPSULE_VEC), sums.data() + (i/n_slots*n_q + q)*ld, dst.data());
        }
    }
}
