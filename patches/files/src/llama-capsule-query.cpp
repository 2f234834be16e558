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

    const uint32_t n_lanes = llama_capsule_simd_get().n_lanes;

    // as many vectors for a group as one of its rows meets queries; training orders the kept tokens by that
    uint32_t r = 0;
    for (uint32_t count : counts) {
        groups.push_back(first.size());
        for (uint32_t end = r + count; r < end; r = std::min(r + n_lanes, end)) {
            first.push_back(variants.size()/n_lanes);

            const uint32_t n = std::min(n_lanes, end - r);
            for (uint32_t v = 0, more = 1; more > 0; ++v) {
                more = 0;
                for (uint32_t j = 0; j < n_lanes; ++j) {
                    const bool empty = j >= n || v >= by_row[r + j].size();
                    variants.push_back(empty ? variant{ NONE, NONE } : by_row[r + j][v]);
                    more += j < n && v + 1 < by_row[r + j].size();
                }
            }
        }
    }
    groups.push_back(first.size());
    first .push_back(variants.size()/n_lanes);

    const uint32_t n_dropped = N - layer.n_kept;

    n_terms = (K + 1)/2;
    own  .assign(N, variants.size());
    terms.assign(2*n_terms*n_dropped, variants.size());
    for (uint32_t v = 0; v < variants.size(); ++v) {
        const auto & cur = variants[v];
        if (cur.token == NONE) {
            continue;
        }
        if (cur.gate == NONE) {
            own[cur.token] = v;
        } else {
            const uint32_t j = cur.gate/d/K;
            const uint32_t k = cur.gate/d%K;
            terms[(k/2*n_dropped + j)*2 + k%2] = v;
        }
    }
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
    const uint32_t n_vectors = variants.variants.size()/simd.n_lanes;
    const size_t   size      = llama_capsule_score::query_size(d, simd.n_lanes);

    const float * gates = layer.k_gate.data() + i_head*(N - layer.n_kept)*data.n_neighbours*d;

    if (distances != this->distances) {
        this->distances = distances;
        angles.resize(N*rope.n_rot);
        for (uint32_t t = 0; t < N; ++t) {
            rope.negate(distances + t*rope.n_rot, angles.data() + t*rope.n_rot);
        }
    }

    turned    .resize(N*d);
    lanes     .resize(simd.n_lanes);
    lane_gates.resize(simd.n_lanes);
    queries   .resize(n_vectors*n_q*size);

    for (uint32_t i = 0; i < n_q; ++i) {
        for (uint32_t t = 0; t < N; ++t) {
            std::copy(q + i*ld_q, q + i*ld_q + d, turned.data() + t*d);
        }
        simd.rope(N, turned.data(), d, angles.data(), rope.n_rot, rope.n_rot, rope.norm);

        for (int t = 0; t < LLAMA_CAPSULE_N_TYPES; ++t) {
            for (uint32_t v = variants.first[variants.groups[t]]; v < variants.first[variants.groups[t + 1]]; ++v) {
                for (uint32_t j = 0; j < simd.n_lanes; ++j) {
                    const auto & cur = variants.variants[v*simd.n_lanes + j];

                    lanes     [j] = cur.token == llama_capsule_variants::NONE ? nullptr : turned.data() + cur.token*d;
                    lane_gates[j] = cur.gate  == llama_capsule_variants::NONE ? nullptr : gates + cur.gate;
                }
                simd.to_lanes(LLAMA_CAPSULE_TYPES[t], d, lanes.data(), lane_gates.data(), queries.data() + (v*n_q + i)*size);
            }
        }
    }
}

void llama_capsule_query::scores(const llama_capsule_tile & tile, uint32_t n, const uint8_t * const * slots, const uint8_t * const * next, float * out, size_t ld_slot, size_t ld_out) {
    const auto & simd   = llama_capsule_simd_get();
    const auto & layer  = variants->codec.layer;
    const auto & counts = variants->codec.tl.key_rows;

    const uint32_t N         = variants->codec.data.block_size;
    const uint32_t n_dropped = N - layer.n_kept;
    const uint32_t n_zero    = variants->variants.size();
    const size_t   ld        = GGML_PAD(n_zero + 1, LLAMA_CAPSULE_VEC);

    const llama_capsule_score s = { layer.n_embd_head_k, n_q, variants->first.data(), queries.data(), ld };

    products.resize(n*n_q*ld);
    src     .resize(n);
    src_next.resize(n);

    for (int t = 0; t < LLAMA_CAPSULE_N_TYPES; ++t) {
        if (counts[t] > 0) {
            for (uint32_t i = 0; i < n; ++i) {
                src     [i] = tile.rows_at(slots[i], i_head, t);
                src_next[i] = next ? tile.rows_at(next[i], i_head, t) : nullptr;
            }
            simd.score_rows(s, LLAMA_CAPSULE_TYPES[t], variants->groups[t], counts[t], n, src.data(), next ? src_next.data() : nullptr, products.data());
        }
    }

    const uint16_t * dropped = layer.token_order.data() + layer.n_kept;

    for (uint32_t i = 0; i < n*n_q; ++i) {
        float * p = products.data() + i*ld;
        float * y = out + i/n_q*ld_slot + i%n_q*ld_out;

        p[n_zero] = 0.0f;
        for (uint32_t t = 0; t < N; ++t) {
            y[t] = p[variants->own[t]];
        }
        const uint32_t * term = variants->terms.data();
        for (uint32_t k = 0; k < variants->n_terms; ++k) {
            for (uint32_t j = 0; j < n_dropped; ++j, term += 2) {
                y[dropped[j]] += p[term[0]] + p[term[1]];
            }
        }
    }
}
