#include "llama-capsule-tile.h"

#include <algorithm>
#include <cmath>

static constexpr int T_Q8 = 2; // in LLAMA_CAPSULE_TYPES
static constexpr int T_Q4 = 3;
static constexpr int T_Q2 = 4;

static_assert(LLAMA_CAPSULE_TYPES[T_Q8] == GGML_TYPE_Q8_0 && LLAMA_CAPSULE_TYPES[T_Q4] == GGML_TYPE_Q4_0 && LLAMA_CAPSULE_TYPES[T_Q2] == GGML_TYPE_Q2_0, "the order of the types has changed");

llama_capsule_tile::llama_capsule_tile(const llama_capsule_codec & codec, bool is_v) :
    codec(codec),
    counts(is_v ? codec.tl.value_rows : codec.tl.key_rows),
    part(is_v ? codec.layout.v : codec.layout.k),
    is_v(is_v),
    retain(!is_v && codec.tl.key_codec == LLAMA_CAPSULE_KEY_CODEC_RETAIN) {
    const auto & layer = codec.layer;

    const uint32_t N = codec.data.block_size;

    if (retain) {
        for (uint32_t h = 0; h < layer.n_head_kv; ++h) {
            for (uint32_t m = 0; m < layer.n_mlp; ++m) {
                for (uint32_t i = 0; i < d(); ++i) {
                    mlp_down.push_back(layer.k_mlp_down[(h*d() + i)*layer.n_mlp + m]);
                }
            }
        }
        return;
    }

    const auto & layer_mean  = is_v ? layer.v_mean  : layer.k_mean;
    const auto & layer_basis = is_v ? layer.v_basis : layer.k_basis;

    mean.assign(layer.n_head_kv*ld(), 0.0f);
    for (uint32_t h = 0; h < layer.n_head_kv; ++h) {
        std::copy(layer_mean.begin() + h*d(), layer_mean.begin() + (h + 1)*d(), mean.begin() + h*ld());
    }
    if (has_rotated()) {
        llama_capsule_hadamard(mean.data(), llama_capsule_hadamard_size(d()), mean.size());
    }

    if (N % LLAMA_CAPSULE_VEC != 0) {
        basis_pad.assign(n_rows()*ld_basis(), 0.0f);
        for (uint32_t r = 0; r < n_rows(); ++r) {
            std::copy(layer_basis.begin() + r*N, layer_basis.begin() + (r + 1)*N, basis_pad.begin() + r*ld_basis());
        }
    }

    if (is_v) {
        basis_t.assign(ld_basis()*ld_rows(), 0.0f);
        for (uint32_t r = 0; r < n_rows(); ++r) {
            for (uint32_t t = 0; t < N; ++t) {
                basis_t[t*ld_rows() + r] = layer_basis[r*N + t];
            }
        }
    }

    const uint32_t n_int = counts[T_Q4] + counts[T_Q2];

    if (n_int > 0 && llama_capsule_simd_get().mul_int) {
        basis_int = llama_capsule_int_basis(layer_basis.data() + (n_rows() - n_int)*N, n_int, N, basis_max);
    }
}

uint32_t llama_capsule_tile::d() const {
    return is_v ? codec.layer.n_embd_head_v : codec.layer.n_embd_head_k;
}

uint32_t llama_capsule_tile::ld() const {
    return GGML_PAD(d(), LLAMA_CAPSULE_VEC);
}

uint32_t llama_capsule_tile::n_rows() const {
    return llama_capsule_rows_total(counts);
}

const float * llama_capsule_tile::basis() const {
    return !basis_pad.empty() ? basis_pad.data() : (is_v ? codec.layer.v_basis : codec.layer.k_basis).data();
}

uint32_t llama_capsule_tile::ld_basis() const {
    return GGML_PAD(codec.data.block_size, LLAMA_CAPSULE_VEC);
}

const float * llama_capsule_tile::tokens() const {
    return basis_t.data();
}

uint32_t llama_capsule_tile::ld_rows() const {
    return GGML_PAD(n_rows(), LLAMA_CAPSULE_VEC);
}

void llama_capsule_tile::prefetch(const uint8_t * slot, uint32_t i_head) const {
    llama_capsule_fetch(rows_at(slot, i_head, 0), part.head_stride);
}

bool llama_capsule_tile::has_rotated() const {
    for (int t = 0; t < LLAMA_CAPSULE_N_TYPES; ++t) {
        if (counts[t] > 0 && ggml_is_quantized(LLAMA_CAPSULE_TYPES[t])) {
            return true;
        }
    }
    return false;
}

const uint8_t * llama_capsule_tile::rows_at(const uint8_t * slot, uint32_t i_head, int t) const {
    return slot + part.offs + i_head*part.head_stride + part.type_offs[t];
}

float * llama_capsule_tile::decode_types(const uint8_t * slot, uint32_t i_head, int t0, int t1, bool rotated, float * out) const {
    const auto & simd = llama_capsule_simd_get();

    const uint32_t n_had = llama_capsule_hadamard_size(d());

    for (int t = t0; t < t1; ++t) {
        if (counts[t] == 0) {
            continue;
        }

        const ggml_type type = LLAMA_CAPSULE_TYPES[t];
        const size_t    size = ggml_row_size(type, d());
        const uint8_t * src  = rows_at(slot, i_head, t);

        float * first = out;
        for (uint32_t r = 0; r < counts[t]; ++r, out += ld()) {
            simd.to_float(type, src + r*size, out, d());
            std::fill(out + d(), out + ld(), 0.0f);
        }
        if (ggml_is_quantized(type) != rotated) {
            simd.hadamard(first, n_had, out - first); // rotated rows have no padding: their types ask for multiples of 32
        }
    }

    return out;
}

void llama_capsule_tile::decode_rows(const uint8_t * slot, uint32_t i_head, bool rotated, float * out) const {
    decode_types(slot, i_head, 0, LLAMA_CAPSULE_N_TYPES, rotated, out);
}

void llama_capsule_tile::mul_rows(const uint8_t * slot, const uint8_t * next, uint32_t i_head, bool rotated, uint32_t n_q, const float * w, size_t ld_w, float * out) const {
    static thread_local llama_capsule_buf<float> rows;

    const auto & simd = llama_capsule_simd_get();

    // quantized rows are read as they are stored, without padding
    const bool     as_stored = rotated && simd.mul_rows;
    const uint32_t n_float   = n_rows() - (as_stored ? counts[T_Q8] + counts[T_Q4] + counts[T_Q2] : 0);

    if (n_float > 0) {
        decode_types(slot, i_head, 0, as_stored ? T_Q8 : LLAMA_CAPSULE_N_TYPES, rotated, rows.resize(n_float*ld()));
        simd.mul(n_q, n_float, ld(), w, 1, ld_w, rows.data(), ld(), nullptr, out, ld());
    }

    if (next) {
        llama_capsule_fetch(rows_at(next, i_head, 0), as_stored ? part.type_offs[T_Q4] - part.type_offs[0] : part.head_stride);
    }

    w += n_float;
    for (int t = T_Q8; t < LLAMA_CAPSULE_N_TYPES && as_stored; w += counts[t++]) {
        const ggml_type type = LLAMA_CAPSULE_TYPES[t];
        if (counts[t] == 0) {
            continue;
        }
        if (t == T_Q8) {
            simd.mul_cells(type, n_q, counts[t], d(), w, ld_w, rows_at(slot, i_head, t), ggml_row_size(type, d()), out, ld());
        } else {
            simd.mul_rows(type, n_q, counts[t], d(), w, ld_w, rows_at(slot, i_head, t), next ? rows_at(next, i_head, t) : nullptr, out, ld());
        }
    }
}

void llama_capsule_tile::decode(const uint8_t * slot, uint32_t i_head, float * out) const {
    if (retain) {
        decode_retain(slot, i_head, out);
    } else {
        decode_pca(slot, i_head, out);
    }
}

bool llama_capsule_finite(const float * x, size_t n) {
    bool res = true; // no way out of the loop: compilers make vectors of it
    for (size_t i = 0; i < n; ++i) {
        res &= fabsf(x[i]) <= 65504.0f;
    }
    return res;
}

bool llama_capsule_tile::fits(const uint8_t * slot, uint32_t i_head) const {
    static thread_local llama_capsule_buf<float> x;

    const size_t n = codec.data.block_size*ld();

    decode(slot, i_head, x.resize(n));

    return llama_capsule_finite(x.data(), n);
}

void llama_capsule_tile::decode_pca(const uint8_t * slot, uint32_t i_head, float * out) const {
    static thread_local llama_capsule_buf<float> rows;

    const auto & simd = llama_capsule_simd_get();

    const uint32_t N       = codec.data.block_size;
    const bool     rotated = has_rotated();

    rows.resize(n_rows()*ld());

    const float * end = decode_types(slot, i_head, 0, basis_int.empty() ? LLAMA_CAPSULE_N_TYPES : T_Q4, rotated, rows.data());

    simd.mul(N, (end - rows.data())/ld(), ld(), basis(), ld_basis(), 1, rows.data(), ld(), mean.data() + i_head*ld(), out, ld());

    if (!basis_int.empty()) {
        const llama_capsule_int_rows ints = { rows_at(slot, i_head, T_Q4), rows_at(slot, i_head, T_Q2), counts[T_Q4], counts[T_Q2] };

        simd.mul_int(N, d(), basis_int.data(), basis_max.data(), ints, out, ld());
    }

    if (rotated) {
        simd.hadamard(out, llama_capsule_hadamard_size(d()), N*ld());
    }
}

void llama_capsule_tile::decode_retain(const uint8_t * slot, uint32_t i_head, float * out) const {
    static thread_local llama_capsule_buf<float> rows;
    static thread_local llama_capsule_buf<float> up; // [K][n_kept][n_mlp]
    static thread_local llama_capsule_buf<float> z;  // [n_mlp]

    const auto & simd  = llama_capsule_simd_get();
    const auto & layer = codec.layer;

    const uint32_t N      = codec.data.block_size;
    const uint32_t K      = codec.data.n_neighbours;
    const uint32_t n_kept = layer.n_kept;
    const uint32_t n_drop = N - n_kept;
    const uint32_t n_mlp  = layer.n_mlp;

    if (d() != ld()) {
        rows.resize(N*d());
        codec.decode_k_head(slot, i_head, rows.data());
        for (uint32_t t = 0; t < N; ++t) {
            std::copy(rows.data() + t*d(), rows.data() + (t + 1)*d(), out + t*ld());
            std::fill(out + t*ld() + d(), out + (t + 1)*ld(), 0.0f);
        }
        return;
    }

    rows.resize(n_rows()*ld());
    decode_types(slot, i_head, 0, LLAMA_CAPSULE_N_TYPES, false, rows.data());

    // what the kept keys add to the hidden units, as each of the K neighbours
    if (n_mlp > 0) {
        up.resize(K*n_kept*n_mlp);
        for (uint32_t k = 0; k < K; ++k) {
            simd.dot(n_mlp, n_kept, d(), layer.k_mlp_up.data() + i_head*n_mlp*K*d() + k*d(), K*d(), rows.data(), ld(), up.data() + k*n_kept*n_mlp, n_mlp);
        }
        z.resize(n_mlp);
    }

    for (uint32_t i = 0; i < N; ++i) {
        float * dst = out + layer.token_order[i]*ld();

        // its own row, or the residual of the prediction
        if (i < n_rows()) {
            std::copy(rows.data() + i*ld(), rows.data() + (i + 1)*ld(), dst);
        } else {
            std::fill(dst, dst + ld(), 0.0f);
        }
        if (i < n_kept) {
            continue;
        }

        const uint32_t j  = i - n_kept;
        const int32_t * n = layer.k_neighbours.data() + j*K;

        for (uint32_t k = 0; k < K; ++k) {
            simd.fma(d(), layer.k_gate.data() + ((i_head*n_drop + j)*K + k)*d(), rows.data() + n[k]*ld(), dst);
        }

        for (uint32_t m = 0; m < n_mlp; ++m) {
            float x = layer.k_mlp_up_bias[i_head*n_mlp + m];
            for (uint32_t k = 0; k < K; ++k) {
                x += up.data()[(k*n_kept + n[k])*n_mlp + m];
            }
            z.data()[m] = 0.5f*x*(1.0f + erff(x*(float) M_SQRT1_2));
        }
        if (n_mlp > 0) {
            simd.mul(1, n_mlp, d(), z.data(), 1, 0, mlp_down.data() + i_head*n_mlp*d(), d(), nullptr, dst, ld());
        }
    }
}
