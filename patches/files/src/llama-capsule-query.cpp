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
    if (codec.tl.key_codec != LLAMA_CAPSULE_KEY_CODEC_RETAIN || layer.n_mlp > 0 || counts[0] + counts[1] > 0 || (d != 64 && d != 128 && d != 256)) {
        return;
    }

    static constexpr float ZERO[LLAMA_CAPSULE_N_TYPES] = { 0, 0, 0, -8, -1 };

    for (uint32_t r = 0; r < n_rows; ++r) {
        first.push_back(token.size());
        token.push_back(layer.token_order[r]);
        gate .push_back(-1);

        for (uint32_t j = 0; j < (N - layer.n_kept)*K && r < layer.n_kept; ++j) {
            if (layer.k_neighbours[j] == (int32_t) r) {
                token.push_back(layer.token_order[layer.n_kept + j/K]);
                gate .push_back(j*d);
            }
        }
    }
    first.push_back(token.size());

    uint32_t i_row = 0;
    for (int t = 0; t < LLAMA_CAPSULE_N_TYPES; ++t) {
        i_row += counts[t];
        zero.resize(first[i_row], ZERO[t]);
    }

    by_token.resize(token.size());
    for (uint32_t v = 0; v < token.size(); ++v) {
        by_token[v] = v;
    }
    std::stable_sort(by_token.begin(), by_token.end(), [&](uint32_t a, uint32_t b) { return token[a] < token[b]; });
}

bool llama_capsule_variants::usable() const {
    return !first.empty() && llama_capsule_simd_get().score_rows;
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

    const uint32_t d = layer.n_embd_head_k;
    const uint32_t n = variants.token.size();

    const float * gates = layer.k_gate.data() + i_head*(data.block_size - layer.n_kept)*data.n_neighbours*d;

    angles.resize(rope.n_rot);
    turned.resize(n_q*d);
    row   .resize(d);
    codes .resize(n_q*n*d);
    scales.resize(n_q*n);

    std::fill_n(offsets.resize(n_q*n*LLAMA_CAPSULE_VEC), n_q*n*LLAMA_CAPSULE_VEC, 0.0f);

    uint32_t last = UINT32_MAX;
    for (uint32_t v : variants.by_token) {
        const uint32_t t = variants.token[v];
        if (t != last) {
            rope.negate(distances + t*rope.n_rot, angles.data());
            for (uint32_t i = 0; i < n_q; ++i) {
                std::copy(q + i*ld_q, q + i*ld_q + d, turned.data() + i*d);
            }
            simd.rope(n_q, turned.data(), d, angles.data(), 0, rope.n_rot, rope.norm);
            last = t;
        }

        for (uint32_t i = 0; i < n_q; ++i) {
            if (variants.gate[v] < 0) {
                std::copy(turned.data() + i*d, turned.data() + (i + 1)*d, row.data());
            } else {
                std::fill_n(row.data(), d, 0.0f);
                simd.fma(d, gates + variants.gate[v], turned.data() + i*d, row.data());
            }
            simd.hadamard(row.data(), llama_capsule_hadamard_size(d), d);

            float * sums = offsets.data() + (i*n + v)*LLAMA_CAPSULE_VEC;

            scales.data()[i*n + v] = simd.to_codes(d, row.data(), codes.data() + (i*n + v)*d, sums);
            for (uint32_t b = 0; b < LLAMA_CAPSULE_VEC; ++b) {
                sums[b] *= variants.zero[v];
            }
        }
    }
}

void llama_capsule_query::scores(const llama_capsule_tile & tile, const uint8_t * slot, float * out, size_t ld_out) {
    const auto & simd   = llama_capsule_simd_get();
    const auto & counts = variants->codec.tl.key_rows;

    const uint32_t N = variants->codec.data.block_size;

    const llama_capsule_score s = {
        variants->codec.layer.n_embd_head_k, n_q, N, (uint32_t) variants->token.size(), variants->first.data(), variants->token.data(),
        codes.data(), scales.data(), offsets.data(),
    };

    std::fill_n(acc.resize(n_q*N*LLAMA_CAPSULE_VEC), n_q*N*LLAMA_CAPSULE_VEC, 0.0f);

    uint32_t i_row = 0;
    for (int t = 0; t < LLAMA_CAPSULE_N_TYPES; ++t) {
        if (counts[t] > 0) {
            simd.score_rows(s, LLAMA_CAPSULE_TYPES[t], i_row, counts[t], tile.rows_at(slot, i_head, t), acc.data());
        }
        i_row += counts[t];
    }

    for (uint32_t i = 0; i < n_q; ++i) {
        simd.sum(N, acc.data() + i*N*LLAMA_CAPSULE_VEC, out + i*ld_out);
    }
}
