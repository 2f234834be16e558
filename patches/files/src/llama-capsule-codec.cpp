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

// rows [i0, i0 + n) of the list
void llama_capsule_codec::encode_rows(const side & s, const float * rows, uint32_t i0, uint32_t n, uint32_t i_head, uint8_t * slot) const {
    std::vector<float> row(s.d);

    uint32_t first = 0;
    for (int t = 0; t < LLAMA_CAPSULE_N_TYPES; ++t) {
        const ggml_type type = LLAMA_CAPSULE_TYPES[t];

        uint8_t * dst = slot + s.part.offs + i_head*s.part.head_stride + s.part.type_offs[t];

        for (uint32_t i = std::max(first, i0); i < std::min(first + s.counts[t], i0 + n); ++i) {
            std::copy(rows + (i - i0)*s.d, rows + (i - i0 + 1)*s.d, row.begin());
            llama_capsule_row_encode(type, row.data(), dst + (i - first)*ggml_row_size(type, s.d), s.d);
        }
        first += s.counts[t];
    }
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

// x [N][n_head_kv][d]
void llama_capsule_codec::encode_pca(const side & s, const float * x, uint8_t * slot) const {
    const uint32_t N      = data.block_size;
    const uint32_t n_head = layer.n_head_kv;
    const uint32_t n_rows = llama_capsule_rows_total(s.counts);

    std::vector<float> basis_t(N*n_rows);
    for (uint32_t r = 0; r < n_rows; ++r) {
        for (uint32_t t = 0; t < N; ++t) {
            basis_t[t*n_rows + r] = s.basis[r*N + t];
        }
    }

    std::vector<float> centred(N*s.d);
    std::vector<float> rows(n_rows*s.d);

    for (uint32_t h = 0; h < n_head; ++h) {
        const float * mean = s.mean.data() + h*s.d;

        for (uint32_t t = 0; t < N; ++t) {
            for (uint32_t i = 0; i < s.d; ++i) {
                centred[t*s.d + i] = x[(t*n_head + h)*s.d + i] - mean[i];
            }
        }

        llama_capsule_mul_rows(basis_t.data(), centred.data(), nullptr, rows.data(), n_rows, N, s.d);

        encode_rows(s, rows.data(), 0, n_rows, h, slot);
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

void llama_capsule_codec::encode_retain(const float * k, uint8_t * slot) const {
    const side s = side_k();

    const uint32_t n_head = layer.n_head_kv;
    const uint32_t n_kept = layer.n_kept;
    const uint32_t n_rows = llama_capsule_rows_total(s.counts);

    std::vector<float> rows(n_rows*s.d);
    std::vector<float> pred(s.d);

    for (uint32_t h = 0; h < n_head; ++h) {
        for (uint32_t i = 0; i < n_kept; ++i) {
            const float * src = k + (layer.token_order[i]*n_head + h)*s.d;
            std::copy(src, src + s.d, rows.begin() + i*s.d);
        }
        encode_rows(s, rows.data(), 0, n_kept, h, slot);

        // the residuals are those of the rows as they will be read
        decode_rows(s, slot, h, rows.data());

        for (uint32_t i = n_kept; i < n_rows; ++i) {
            const float * src = k + (layer.token_order[i]*n_head + h)*s.d;

            predict(rows.data(), h, i - n_kept, pred.data());
            for (uint32_t c = 0; c < s.d; ++c) {
                rows[i*s.d + c] = src[c] - pred[c];
            }
        }
        encode_rows(s, rows.data() + n_kept*s.d, n_kept, n_rows - n_kept, h, slot);
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

void llama_capsule_codec::encode(const float * k, const float * v, uint8_t * slot) const {
    memset(slot, 0, layout.slot_stride);

    if (tl.key_codec == LLAMA_CAPSULE_KEY_CODEC_RETAIN) {
        encode_retain(k, slot);
    } else {
        encode_pca(side_k(), k, slot);
    }
    encode_pca(side_v(), v, slot);
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

// max over tokens of err(x_hat)/err(q4_0(x))
static float capsule_score_part(const float * x, const float * x_hat, const float * weight, uint32_t n, uint32_t n_head, uint32_t d) {
    if (d % ggml_blck_size(GGML_TYPE_Q4_0) != 0) {
        return 0.0f; // q4_0 is no rival for this head size
    }

    // a token that is nearly nothing, or that q4_0 happens to hit, is no measure
    float energy = 0.0f;
    for (uint32_t i = 0; i < n*n_head*d; ++i) {
        energy += (weight ? weight[i % (n_head*d)] : 1.0f)*x[i]*x[i];
    }
    const float least = std::max(1e-3f*energy/n, 1e-20f);

    std::vector<float>   y(d);
    std::vector<uint8_t> row(ggml_row_size(GGML_TYPE_Q4_0, d));

    float res = 0.0f;

    for (uint32_t t = 0; t < n; ++t) {
        float err    = 0.0f;
        float err_q4 = 0.0f;

        for (uint32_t h = 0; h < n_head; ++h) {
            const size_t offs = (size_t) (t*n_head + h)*d;

            std::copy(x + offs, x + offs + d, y.begin());
            llama_capsule_row_encode(GGML_TYPE_Q4_0, y.data(), row.data(), d);
            llama_capsule_row_decode(GGML_TYPE_Q4_0, row.data(), y.data(), d);

            for (uint32_t i = 0; i < d; ++i) {
                const float w  = weight ? weight[h*d + i] : 1.0f;
                const float e  = x_hat[offs + i] - x[offs + i];
                const float e4 = y[i]            - x[offs + i];

                err    += w*e*e;
                err_q4 += w*e4*e4;
            }
        }

        res = std::max(res, err/std::max(err_q4, least));
    }

    return res;
}

float llama_capsule_codec::score(const float * k, const float * v, const float * k_hat, const float * v_hat, uint32_t n) const {
    return std::max(
            capsule_score_part(k, k_hat, layer.k_query_weight.data(), n, layer.n_head_kv, layer.n_embd_head_k),
            capsule_score_part(v, v_hat, nullptr,                     n, layer.n_head_kv, layer.n_embd_head_v));
}
