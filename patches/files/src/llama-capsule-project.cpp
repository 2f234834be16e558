#include "llama-capsule-project.h"

#include <algorithm>
#include <cmath>

//
// llama_capsule_projection
//

llama_capsule_projection::llama_capsule_projection(const llama_capsule_codec & codec) : codec(codec) {
    const auto & layer  = codec.layer;
    const auto & counts = codec.tl.key_rows;

    const uint32_t N      = codec.data.block_size;
    const uint32_t n_out  = GGML_PAD(N, LLAMA_CAPSULE_VEC);
    const uint32_t n_rows = llama_capsule_rows_total(counts);

    if (codec.tl.key_codec != LLAMA_CAPSULE_KEY_CODEC_PCA || counts[0] + counts[1] > 0 || layer.n_embd_head_k % 64 != 0 || layer.n_embd_head_k > 256) {
        return;
    }

    // no sum of products with values of length 1 may leave 32 bits
    float max = 0.0f;
    for (uint32_t t = 0; t < N; ++t) {
        float sum = 0.0f;
        for (uint32_t r = 0; r < n_rows; ++r) {
            sum += layer.k_basis[r*N + t]*layer.k_basis[r*N + t];
        }
        max = std::max(max, sqrtf(sum));
    }

    scale = max/32767.0f;
    basis.assign(GGML_PAD(n_rows, 2)*n_out, 0);
    for (uint32_t r = 0; r < n_rows && max > 0.0f; ++r) {
        for (uint32_t t = 0; t < N; ++t) {
            basis[(r/2*n_out + t)*2 + r%2] = (int16_t) lrintf(layer.k_basis[r*N + t]/scale);
        }
    }
}

bool llama_capsule_projection::usable() const {
    return !basis.empty() && llama_capsule_simd_get().project;
}

bool llama_capsule_projection::pays(uint32_t n_q, const llama_capsule_views & views) const {
    const size_t N = codec.data.block_size;
    const size_t d = codec.layer.n_embd_head_k;

    if (views.turn.size() % (16*views.n) != 0) {
        return false; // no kernel turns so few channels, see llama_capsule_view
    }

    // products for each row, measured: those of a rebuilt key cost about the same, but serve all queries
    return n_q*views.n*(d + N) < N*d;
}

llama_capsule_project llama_capsule_projection::params() const {
    return { basis.data(), scale, llama_capsule_rows_total(codec.tl.key_rows), GGML_PAD(codec.data.block_size, LLAMA_CAPSULE_VEC) };
}

//
// llama_capsule_project_query
//

void llama_capsule_project_query::init(const llama_capsule_projection & projection, const llama_capsule_views & views, const llama_capsule_rope_params * rope,
        uint32_t i_head, uint32_t n_q, const float * q, size_t ld_q) {
    this->projection = &projection;
    this->views      = &views;
    this->i_head     = i_head;
    this->n_q        = n_q;

    const auto & simd  = llama_capsule_simd_get();
    const auto & layer = projection.codec.layer;

    const uint32_t d   = layer.n_embd_head_k;
    const uint32_t n_v = n_q*views.n;

    llama_capsule_view view = { d, rope ? rope->n_rot : 0, rope && rope->norm, nullptr, 0.0f, layer.k_mean.data() + i_head*d };

    const size_t size = simd.query_size(d);

    queries.resize(n_v*size);
    scales .resize(n_v);
    means  .resize(n_v);

    for (uint32_t v = 0; v < n_v; ++v) {
        const uint32_t m = v/n_q;

        view.turn  = views.turn.data() + m*view.n_rot;
        view.still = views.still[m];

        scales.data()[v] = simd.to_query(view, q + v%n_q*ld_q, queries.data() + v*size, means.data()[v]);
    }
}

void llama_capsule_project_query::scores(const llama_capsule_tile & tile, const uint8_t * slot, float * out, size_t ld_out) {
    const auto & simd   = llama_capsule_simd_get();
    const auto & counts = projection->codec.tl.key_rows;

    const uint32_t d  = projection->codec.layer.n_embd_head_k;
    const uint32_t ld = GGML_PAD(llama_capsule_rows_total(counts) + 15, 16);

    float * x = products.resize(n_q*views->n*ld);

    uint32_t i_row = 0;
    for (int t = 0; t < LLAMA_CAPSULE_N_TYPES; ++t) {
        if (counts[t] > 0) {
            simd.dot_rows(LLAMA_CAPSULE_TYPES[t], d, counts[t], tile.rows_at(slot, i_head, t), n_q*views->n, queries.data(), x + i_row, ld);
        }
        i_row += counts[t];
    }

    for (uint32_t i = 0; i < n_q; ++i) {
        simd.project(projection->params(), views->n, x + i*ld, n_q*ld, scales.data() + i, means.data() + i, n_q, views->phi.data(), out + i*ld_out);
    }
}
