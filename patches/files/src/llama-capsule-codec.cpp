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

// rows [i0, i0 + n) of the list
void llama_capsule_codec::encode_rows(const float * rows, uint32_t i0, uint32_t n, uint32_t d, const llama_capsule_row_counts & counts,
        const llama_capsule_layout::part & part, uint32_t i_head, uint8_t * slot) const {
    std::vector<float> row(d);

    uint32_t first = 0;
    for (int t = 0; t < LLAMA_CAPSULE_N_TYPES; ++t) {
        const ggml_type type = LLAMA_CAPSULE_TYPES[t];

        for (uint32_t i = std::max(first, i0); i < std::min(first + counts[t], i0 + n); ++i) {
            std::copy(rows + (i - i0)*d, rows + (i - i0 + 1)*d, row.begin());
            uint8_t * dst = slot + part.offs + i_head*part.head_stride + part.type_offs[t] + (i - first)*ggml_row_size(type, d);
            llama_capsule_row_encode(type, row.data(), dst, d);
        }
        first += counts[t];
    }
}

void llama_capsule_codec::decode_rows(const uint8_t * slot, uint32_t i_head, uint32_t d, const llama_capsule_row_counts & counts,
        const llama_capsule_layout::part & part, float * rows) const {
    for (int t = 0; t < LLAMA_CAPSULE_N_TYPES; ++t) {
        const ggml_type type = LLAMA_CAPSULE_TYPES[t];

        const uint8_t * src = slot + part.offs + i_head*part.head_stride + part.type_offs[t];
        for (uint32_t i = 0; i < counts[t]; ++i) {
            llama_capsule_row_decode(type, src + i*ggml_row_size(type, d), rows, d);
            rows += d;
        }
    }
}

void llama_capsule_codec::encode_pca(const float * x, uint32_t d, const float * mean, const float * basis, const llama_capsule_row_counts & counts,
        const llama_capsule_layout::part & part, uint8_t * slot) const {
    const uint32_t N      = data.block_size;
    const uint32_t n_head = layer.n_head_kv;
    const uint32_t n_rows = llama_capsule_rows_total(counts);

    std::vector<float> centred(N*d);
    std::vector<float> rows(n_rows*d);

    for (uint32_t h = 0; h < n_head; ++h) {
        for (uint32_t t = 0; t < N; ++t) {
            for (uint32_t i = 0; i < d; ++i) {
                centred[t*d + i] = x[(t*n_head + h)*d + i] - mean[h*d + i];
            }
        }

        std::fill(rows.begin(), rows.end(), 0.0f);
        for (uint32_t r = 0; r < n_rows; ++r) {
            float * row = rows.data() + r*d;
            for (uint32_t t = 0; t < N; ++t) {
                const float   b = basis[r*N + t];
                const float * c = centred.data() + t*d;
                for (uint32_t i = 0; i < d; ++i) {
                    row[i] += b*c[i];
                }
            }
        }

        encode_rows(rows.data(), 0, n_rows, d, counts, part, h, slot);
    }
}

void llama_capsule_codec::decode_pca(const uint8_t * slot, uint32_t d, const float * mean, const float * basis, const llama_capsule_row_counts & counts,
        const llama_capsule_layout::part & part, float * x) const {
    const uint32_t N      = data.block_size;
    const uint32_t n_head = layer.n_head_kv;
    const uint32_t n_rows = llama_capsule_rows_total(counts);

    std::vector<float> rows(n_rows*d);

    for (uint32_t h = 0; h < n_head; ++h) {
        decode_rows(slot, h, d, counts, part, rows.data());

        for (uint32_t t = 0; t < N; ++t) {
            float * y = x + (t*n_head + h)*d;

            std::copy(mean + h*d, mean + (h + 1)*d, y);
            for (uint32_t r = 0; r < n_rows; ++r) {
                const float   b = basis[r*N + t];
                const float * c = rows.data() + r*d;
                for (uint32_t i = 0; i < d; ++i) {
                    y[i] += b*c[i];
                }
            }
        }
    }
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
    const uint32_t d      = layer.n_embd_head_k;
    const uint32_t n_head = layer.n_head_kv;
    const uint32_t n_kept = layer.n_kept;
    const uint32_t n_rows = llama_capsule_rows_total(tl.key_rows);

    std::vector<float> rows(n_rows*d);
    std::vector<float> pred(d);

    for (uint32_t h = 0; h < n_head; ++h) {
        for (uint32_t i = 0; i < n_kept; ++i) {
            const float * src = k + (layer.token_order[i]*n_head + h)*d;
            std::copy(src, src + d, rows.begin() + i*d);
        }
        encode_rows(rows.data(), 0, n_kept, d, tl.key_rows, layout.k, h, slot);

        // the residuals are those of the rows as they will be read
        decode_rows(slot, h, d, tl.key_rows, layout.k, rows.data());

        for (uint32_t i = n_kept; i < n_rows; ++i) {
            const float * src = k + (layer.token_order[i]*n_head + h)*d;

            predict(rows.data(), h, i - n_kept, pred.data());
            for (uint32_t c = 0; c < d; ++c) {
                rows[i*d + c] = src[c] - pred[c];
            }
        }
        encode_rows(rows.data() + n_kept*d, n_kept, n_rows - n_kept, d, tl.key_rows, layout.k, h, slot);
    }
}

void llama_capsule_codec::decode_retain(const uint8_t * slot, float * k) const {
    const uint32_t N      = data.block_size;
    const uint32_t d      = layer.n_embd_head_k;
    const uint32_t n_head = layer.n_head_kv;
    const uint32_t n_kept = layer.n_kept;
    const uint32_t n_rows = llama_capsule_rows_total(tl.key_rows);

    std::vector<float> rows(n_rows*d);

    for (uint32_t h = 0; h < n_head; ++h) {
        decode_rows(slot, h, d, tl.key_rows, layout.k, rows.data());

        for (uint32_t i = 0; i < N; ++i) {
            float * dst = k + (layer.token_order[i]*n_head + h)*d;

            if (i < n_kept) {
                std::copy(rows.begin() + i*d, rows.begin() + (i + 1)*d, dst);
                continue;
            }

            predict(rows.data(), h, i - n_kept, dst);
            for (uint32_t c = 0; c < d && i < n_rows; ++c) {
                dst[c] += rows[i*d + c];
            }
        }
    }
}

void llama_capsule_codec::encode(const float * k, const float * v, uint8_t * slot) const {
    memset(slot, 0, layout.slot_stride);

    if (tl.key_codec == LLAMA_CAPSULE_KEY_CODEC_RETAIN) {
        encode_retain(k, slot);
    } else {
        encode_pca(k, layer.n_embd_head_k, layer.k_mean.data(), layer.k_basis.data(), tl.key_rows, layout.k, slot);
    }
    encode_pca(v, layer.n_embd_head_v, layer.v_mean.data(), layer.v_basis.data(), tl.value_rows, layout.v, slot);
}

void llama_capsule_codec::decode(const uint8_t * slot, float * k, float * v) const {
    if (tl.key_codec == LLAMA_CAPSULE_KEY_CODEC_RETAIN) {
        decode_retain(slot, k);
    } else {
        decode_pca(slot, layer.n_embd_head_k, layer.k_mean.data(), layer.k_basis.data(), tl.key_rows, layout.k, k);
    }
    decode_pca(slot, layer.n_embd_head_v, layer.v_mean.data(), layer.v_basis.data(), tl.value_rows, layout.v, v);
}

// max over tokens of err(x_hat)/err(q4_0(x))
static float capsule_score_part(const float * x, const float * x_hat, const float * weight, uint32_t n, uint32_t n_head, uint32_t d) {
    if (d % ggml_blck_size(GGML_TYPE_Q4_0) != 0) {
        return 0.0f; // q4_0 is no rival for this head size
    }

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

        res = std::max(res, err/std::max(err_q4, 1e-20f));
    }

    return res;
}

float llama_capsule_codec::score(const float * k, const float * v, const float * k_hat, const float * v_hat, uint32_t n) const {
    return std::max(
            capsule_score_part(k, k_hat, layer.k_query_weight.data(), n, layer.n_head_kv, layer.n_embd_head_k),
            capsule_score_part(v, v_hat, nullptr,                     n, layer.n_head_kv, layer.n_embd_head_v));
}
