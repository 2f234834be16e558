#include "llama-capsule-codec.h"

#include <algorithm>
#include <cmath>
#include <cstring>

//
// llama_capsule_layout
//

static size_t capsule_layout_part(
        llama_capsule_layout::part & part,
                            size_t   offs,
                          uint32_t   n_head,
                          uint32_t   d,
    const llama_capsule_row_counts & counts) {
    part.offs = offs;

    size_t size = 0;
    for (int t = 0; t < LLAMA_CAPSULE_N_TYPES; ++t) {
        part.type_offs[t] = size;
        if (counts[t] > 0) {
            size += counts[t]*ggml_row_size(LLAMA_CAPSULE_TYPES[t], d);
        }
    }

    // f32 rows are accessed in place
    part.head_stride = counts[0] > 0 ? GGML_PAD(size, sizeof(float)) : size;

    return offs + n_head*part.head_stride;
}

llama_capsule_layout::llama_capsule_layout(const llama_capsule_data::layer & layer, const llama_capsule_data::tier_layer & tl) {
    slot_stride = capsule_layout_part(k, 0, layer.n_head_kv, layer.n_embd_head_k, tl.key_rows);
    slot_stride = GGML_PAD(slot_stride, sizeof(float));
    slot_stride = capsule_layout_part(v, slot_stride, layer.n_head_kv, layer.n_embd_head_v, tl.value_rows);
    slot_stride = GGML_PAD(slot_stride, sizeof(float));
}

//
// llama_capsule_codec
//

llama_capsule_codec::llama_capsule_codec(const llama_capsule_data & data, uint32_t i_layer, uint32_t i_tier) :
    data(data), layer(data.layers[i_layer]), tl(data.tiers[i_tier].layers[i_layer]), layout(layer, tl) {
}

llama_capsule_codec::side llama_capsule_codec::side_k() const {
    return { layer.n_embd_head_k, tl.key_rows, layout.k, layer.k_mean, layer.k_basis };
}

llama_capsule_codec::side llama_capsule_codec::side_v() const {
    return { layer.n_embd_head_v, tl.value_rows, layout.v, layer.v_mean, layer.v_basis };
}

void llama_capsule_codec::decode_rows(const side & s, const uint8_t * slot, uint32_t i_head, float * rows) const {
    for (int t = 0; t < LLAMA_CAPSULE_N_TYPES; ++t) {
        const ggml_type type = LLAMA_CAPSULE_TYPES[t];

        const uint8_t * src = slot + s.part.offs + i_head*s.part.head_stride + s.part.type_offs[t];

        for (uint32_t i = 0; i < s.counts[t]; ++i) {
            llama_capsule_row_decode(type, src + i*ggml_row_size(type, s.d), rows, s.d);
            rows += s.d;
        }
    }
}

// x [N][d]
void llama_capsule_codec::decode_pca(const side & s, const uint8_t * slot, uint32_t i_head, float * x) const {
    const uint32_t n_rows = llama_capsule_rows_total(s.counts);

    std::vector<float> rows(n_rows*s.d);
    decode_rows(s, slot, i_head, rows.data());

    llama_capsule_mul_rows(s.basis.data(), rows.data(), s.mean.data() + i_head*s.d, x, data.block_size, n_rows, s.d);
}

void llama_capsule_codec::predict(const float * kept, uint32_t i_head, uint32_t j, float * out) const {
    const uint32_t d      = layer.n_embd_head_k;
    const uint32_t K      = data.n_neighbours;
    const uint32_t n_drop = data.block_size - layer.n_kept;
    const uint32_t n_mlp  = layer.n_mlp;

    std::fill(out, out + d, 0.0f);

    for (uint32_t k = 0; k < K; ++k) {
        const float * x = kept + layer.k_neighbours[j*K + k]*d;
        const float * g = layer.k_gate.data() + ((i_head*n_drop + j)*K + k)*d;
        for (uint32_t i = 0; i < d; ++i) {
            out[i] += g[i]*x[i];
        }
    }

    for (uint32_t m = 0; m < n_mlp; ++m) {
        float z = layer.k_mlp_up_bias[i_head*n_mlp + m];
        for (uint32_t k = 0; k < K; ++k) {
            const float * x = kept + layer.k_neighbours[j*K + k]*d;
            const float * w = layer.k_mlp_up.data() + (i_head*n_mlp + m)*K*d + k*d;
            for (uint32_t i = 0; i < d; ++i) {
                z += w[i]*x[i];
            }
        }

        z = 0.5f*z*(1.0f + erff(z*(float) M_SQRT1_2));

        for (uint32_t i = 0; i < d; ++i) {
            out[i] += layer.k_mlp_down[(i_head*d + i)*n_mlp + m]*z;
        }
    }
}

// k [N][d]
void llama_capsule_codec::decode_retain(const uint8_t * slot, uint32_t i_head, float * k) const {
    const side s = side_k();

    const uint32_t n_kept = layer.n_kept;
    const uint32_t n_rows = llama_capsule_rows_total(s.counts);

    std::vector<float> rows(n_rows*s.d);
    decode_rows(s, slot, i_head, rows.data());

    for (uint32_t i = 0; i < data.block_size; ++i) {
        float * dst = k + layer.token_order[i]*s.d;

        if (i < n_kept) {
            std::copy(rows.begin() + i*s.d, rows.begin() + (i + 1)*s.d, dst);
            continue;
        }

        predict(rows.data(), i_head, i - n_kept, dst);
        for (uint32_t c = 0; c < s.d && i < n_rows; ++c) {
            dst[c] += rows[i*s.d + c];
        }
    }
}

void llama_capsule_codec::decode_k_head(const uint8_t * slot, uint32_t i_head, float * k) const {
    if (tl.key_codec == LLAMA_CAPSULE_KEY_CODEC_RETAIN) {
        decode_retain(slot, i_head, k);
    } else {
        decode_pca(side_k(), slot, i_head, k);
    }
}

void llama_capsule_codec::decode_v_head(const uint8_t * slot, uint32_t i_head, float * v) const {
    decode_pca(side_v(), slot, i_head, v);
}

void llama_capsule_codec::decode(const uint8_t * slot, float * k, float * v) const {
    const uint32_t N      = data.block_size;
    const uint32_t n_head = layer.n_head_kv;
    const uint32_t d_k    = layer.n_embd_head_k;
    const uint32_t d_v    = layer.n_embd_head_v;

    std::vector<float> x(N*std::max(d_k, d_v));

    for (uint32_t h = 0; h < n_head; ++h) {
        decode_k_head(slot, h, x.data());
        for (uint32_t t = 0; t < N; ++t) {
            std::copy(x.begin() + t*d_k, x.begin() + (t + 1)*d_k, k + (t*n_head + h)*d_k);
        }
        decode_v_head(slot, h, x.data());
        for (uint32_t t = 0; t < N; ++t) {
            std::copy(x.begin() + t*d_v, x.begin() + (t + 1)*d_v, v + (t*n_head + h)*d_v);
        }
    }
}
