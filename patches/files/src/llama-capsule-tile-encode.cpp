#include "llama-capsule-tile.h"

#include <algorithm>

//
// hot cells -> rows, see llama_capsule_tile::decode() for the way back
//

void llama_capsule_tile::encode(const float * x, uint32_t i_head, uint8_t * slot) const {
    if (retain) {
        encode_retain(x, i_head, slot);
    } else {
        encode_pca(x, i_head, slot);
    }
}

void llama_capsule_tile::encode_rows(float * rows, uint32_t i0, uint32_t n, uint32_t i_head, uint8_t * slot) const {
    const auto & simd = llama_capsule_simd_get();

    const uint32_t d  = this->d();
    const uint32_t ld = this->ld();

    uint32_t first = 0;
    for (int t = 0; t < LLAMA_CAPSULE_N_TYPES; ++t) {
        const uint32_t a = std::max(first, i0);
        const uint32_t b = std::min(first + counts[t], i0 + n);

        if (a < b) {
            const ggml_type type = LLAMA_CAPSULE_TYPES[t];
            const size_t    size = ggml_row_size(type, d);

            uint8_t * dst = slot + (rows_at(slot, i_head, t) - slot) + (a - first)*size;

            // their types ask for multiples of 32: no padding
            if (ggml_is_quantized(type)) {
                simd.hadamard(rows + (a - i0)*ld, llama_capsule_hadamard_size(d), (b - a)*ld);
            }
            for (uint32_t i = a; i < b; ++i, dst += size) {
                simd.from_float(type, rows + (i - i0)*ld, dst, d);
            }
        }
        first += counts[t];
    }
}

LLAMA_CAPSULE_SIMD
static void capsule_sub(const float * x, const float * y, float * out, size_t n) {
    for (size_t i = 0; i < n; ++i) {
        out[i] = x[i] - y[i];
    }
}

LLAMA_CAPSULE_SIMD
static void capsule_square(const float * x, float * out, size_t n) {
    for (size_t i = 0; i < n; ++i) {
        out[i] = x[i]*x[i];
    }
}

void llama_capsule_tile::encode_pca(const float * x, uint32_t i_head, uint8_t * slot) const {
    static thread_local llama_capsule_buf<float> centred;
    static thread_local llama_capsule_buf<float> rows;
    static thread_local llama_capsule_buf<float> zeros;

    const uint32_t N  = codec.data.block_size;
    const uint32_t d  = this->d();
    const uint32_t ld = this->ld();

    const float * mean = (is_v ? codec.layer.v_mean : codec.layer.k_mean).data() + i_head*d;

    centred.resize(N*ld);
    for (uint32_t t = 0; t < N; ++t) {
        capsule_sub(x + t*ld, mean, centred.data() + t*ld, d);
        std::fill(centred.data() + t*ld + d, centred.data() + (t + 1)*ld, 0.0f);
    }

    rows.resize(n_rows()*ld);
    std::fill_n(zeros.resize(ld), ld, 0.0f);

    llama_capsule_simd_get().mul(n_rows(), N, ld, basis(), 1, ld_basis(), centred.data(), ld, zeros.data(), rows.data(), ld);

    encode_rows(rows.data(), 0, n_rows(), i_head, slot);
}

void llama_capsule_tile::encode_retain(const float * x, uint32_t i_head, uint8_t * slot) const {
    static thread_local llama_capsule_buf<float> rows;
    static thread_local llama_capsule_buf<float> pred;

    const auto & layer = codec.layer;

    const uint32_t N      = codec.data.block_size;
    const uint32_t n_kept = layer.n_kept;
    const uint32_t ld     = this->ld();

    rows.resize(n_rows()*ld);
    for (uint32_t i = 0; i < n_kept; ++i) {
        const float * src = x + layer.token_order[i]*ld;
        std::copy(src, src + ld, rows.data() + i*ld);
    }
    encode_rows(rows.data(), 0, n_kept, i_head, slot);

    if (n_rows() == n_kept) {
        return;
    }

    // the residuals are those of the rows as they will be read; without residuals a slot holds the predictions
    pred.resize(N*ld);
    decode_retain(slot, i_head, pred.data());

    for (uint32_t i = n_kept; i < n_rows(); ++i) {
        const uint32_t t = layer.token_order[i];
        capsule_sub(x + t*ld, pred.data() + t*ld, rows.data() + i*ld, ld);
    }
    encode_rows(rows.data() + n_kept*ld, n_kept, n_rows() - n_kept, i_head, slot);
}

bool llama_capsule_tile::errors(const float * x, const uint8_t * slot, uint32_t i_head, uint32_t n, llama_capsule_errors * out) const {
    static thread_local llama_capsule_buf<float>   hat;
    static thread_local llama_capsule_buf<float>   rotated;
    static thread_local llama_capsule_buf<float>   weights;
    static thread_local llama_capsule_buf<float>   sums;
    static thread_local llama_capsule_buf<uint8_t> row;

    const auto & simd = llama_capsule_simd_get();

    const uint32_t d     = this->d();
    const uint32_t n_had = llama_capsule_hadamard_size(d);

    weights.resize(d);
    if (is_v) {
        std::fill_n(weights.data(), d, 1.0f);
    } else {
        std::copy_n(codec.layer.k_query_weight.data() + i_head*d, d, weights.data());
    }

    // weighted sums of the squares of e; hat is overwritten
    auto measure = [&](const float * e, float llama_capsule_errors::* what) {
        capsule_square(e, hat.data(), n*d);
        simd.dot(n, 1, d, hat.data(), d, weights.data(), d, sums.resize(n), n);
        for (uint32_t t = 0; t < n; ++t) {
            out[t].*what = sums.data()[t];
        }
    };

    hat.resize(codec.data.block_size*d);
    decode(slot, i_head, hat.data());

    const bool res = llama_capsule_finite(hat.data(), codec.data.block_size*d);

    capsule_sub(hat.data(), x, hat.data(), n*d);
    measure(hat.data(), &llama_capsule_errors::slot);

    measure(x, &llama_capsule_errors::energy);

    rotated.resize(n*d);
    std::copy_n(x, n*d, rotated.data());
    simd.hadamard(rotated.data(), n_had, n*d);

    row.resize(ggml_row_size(GGML_TYPE_Q4_0, d));
    for (uint32_t t = 0; t < n; ++t) {
        simd.from_float(GGML_TYPE_Q4_0, rotated.data() + t*d, row.data(), d);
        simd.to_float  (GGML_TYPE_Q4_0, row.data(), hat.data() + t*d, d);
    }
    capsule_sub(hat.data(), rotated.data(), hat.data(), n*d);

    // the rotation keeps lengths, but not weights
    if (!is_v) {
        simd.hadamard(hat.data(), n_had, n*d);
    }
    measure(hat.data(), &llama_capsule_errors::q4);

    return res;
}
