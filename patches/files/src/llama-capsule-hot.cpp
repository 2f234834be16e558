#include "llama-capsule-hot.h"

#include <algorithm>
#include <cmath>

static constexpr uint32_t HOT_CELLS    = 8;   // read at a time
static constexpr uint32_t HOT_COLS     = 64;  // scores at a time
static constexpr uint32_t HOT_COLS_T   = 512; // ... with V transposed: its rows are long
static constexpr uint32_t HOT_CHANNELS = 4;   // of these rows at a time
static constexpr uint32_t HOT_QUERIES  = 64;  // for more of them a head at a time is enough work for its cells

float llama_capsule_softmax::add(float * s, const float * mask, uint32_t n, float & added) {
    const auto & simd = llama_capsule_simd_get();

    const float max = simd.add_max(s, mask, n);
    if (max == -INFINITY) {
        std::fill(s, s + n, 0.0f);
        added = 0.0f;
        return 1.0f;
    }

    float f = 1.0f;
    if (!(max <= m)) { // a NaN makes the sums NaN
        f = expf(m - max);
        m = max;
    }
    added = simd.exp_sum(s, m, n);
    l     = f*l + added;

    return f;
}

template<typename T>
static llama_capsule_mask_kind mask_kind(const T * x, uint32_t n, T zero, T inf) {
    bool all  = true;
    bool none = true;
    for (uint32_t i = 0; i < n; ++i) {
        all  &= x[i] == zero;
        none &= x[i] == inf;
    }
    return all ? LLAMA_CAPSULE_MASK_ALL : none ? LLAMA_CAPSULE_MASK_NONE : LLAMA_CAPSULE_MASK_SOME;
}

llama_capsule_mask_kind llama_capsule_mask_kind_of(const ggml_tensor * mask, int64_t row, int64_t col, uint32_t n) {
    const char * src = (const char *) mask->data + row*mask->nb[1];

    return mask->type == GGML_TYPE_F16 ?
        mask_kind<ggml_fp16_t>((const ggml_fp16_t *) src + col, n, 0, 0xfc00) :
        mask_kind<float>      ((const float       *) src + col, n, 0.0f, -INFINITY);
}

void llama_capsule_read_mask(const ggml_tensor * mask, int64_t row, int64_t col, uint32_t n, float * dst) {
    const char * src = (const char *) mask->data + row*mask->nb[1] + col*ggml_type_size(mask->type);

    llama_capsule_simd_get().to_float(mask->type, src, dst, n);
    std::fill(dst + n, dst + GGML_PAD(n, LLAMA_CAPSULE_VEC), -INFINITY);
}

float * llama_capsule_hot::init(uint32_t n_heads, uint32_t n_q, uint32_t n_group, uint32_t ld_k, uint32_t ld_v) {
    this->n_heads = n_heads;
    this->n_q     = n_q;
    this->n_group = n_group;
    this->ld_k    = ld_k;
    this->ld_v    = ld_v;

    std::fill_n(q.resize(n_heads*n_q*ld_k), n_heads*n_q*ld_k, 0.0f);
    std::fill_n(o.resize(n_heads*n_q*ld_v), n_heads*n_q*ld_v, 0.0f);
    std::fill_n(sums.resize(n_heads*n_q), n_heads*n_q, llama_capsule_softmax { -INFINITY, 0.0f });

    return q.data();
}

const float * llama_capsule_hot::query(uint32_t i) const {
    return q.data() + i*n_q*ld_k;
}

const llama_capsule_softmax * llama_capsule_hot::softmax(uint32_t i) const {
    return sums.data() + i*n_q;
}

const float * llama_capsule_hot::out(uint32_t i) const {
    return o.data() + i*n_q*ld_v;
}

void llama_capsule_hot::attend(const ggml_tensor * k, const ggml_tensor * v, bool v_trans, const ggml_tensor * mask, uint32_t i_head, int64_t col, int64_t col_end) {
    ld_s = v_trans ? HOT_COLS_T : HOT_COLS;

    const uint32_t n_at_once = std::clamp(HOT_QUERIES/n_q, 1u, n_heads);

    s      .resize(n_at_once*n_q*ld_s);
    x      .resize(std::max(HOT_CELLS*std::max(ld_k, ld_v), HOT_CHANNELS*ld_s));
    w      .resize(n_q*HOT_CHANNELS);
    visible.resize(n_q/n_group*ld_s);

    for (uint32_t i0 = 0; i0 < n_heads; i0 += n_at_once) {
        const uint32_t i1 = std::min(i0 + n_at_once, n_heads);

        for (int64_t c = col; c < col_end; c += ld_s) {
            const uint32_t n     = std::min<int64_t>(ld_s, col_end - c);
            const uint32_t n_pad = GGML_PAD(n, LLAMA_CAPSULE_VEC);

            bool any = false;
            for (uint32_t i = 0; i < n_q/n_group; ++i) {
                any = llama_capsule_mask_kind_of(mask, i, c, n) != LLAMA_CAPSULE_MASK_NONE || any;
                llama_capsule_read_mask(mask, i, c, n, visible.data() + i*ld_s);
            }
            if (!any) {
                continue;
            }
            scores(k, i_head, i0, i1, c, n);

            for (uint32_t i = i0*n_q; i < i1*n_q; ++i) {
                float * row = s.data() + (i - i0*n_q)*ld_s;

                std::fill(row + n, row + n_pad, 0.0f);

                float added;
                const float f = sums.data()[i].add(row, visible.data() + i%n_q/n_group*ld_s, n_pad, added);
                if (f != 1.0f) {
                    simd.scale(ld_v, f, o.data() + i*ld_v);
                }
            }
            if (v_trans) {
                values_t(v, i_head, i0, i1, c, n);
            } else {
                values(v, i_head, i0, i1, c, n);
            }
        }
    }
}

// cells [col, col + n) of a head that are there
static void prefetch(const ggml_tensor * t, uint32_t i_head, int64_t col, uint32_t n) {
    const size_t size = ggml_row_size(t->type, t->ne[0]);
    for (int64_t j = col; j < std::min<int64_t>(col + n, t->ne[2]); ++j) {
        llama_capsule_fetch((const uint8_t *) t->data + i_head*t->nb[1] + j*t->nb[2], size);
    }
}

// cells that are used as they lie; for more queries it is faster to copy them as floats
static const uint8_t * cells_in_place(const ggml_tensor * t, uint32_t i_head, int64_t col, uint32_t n_q, uint32_t ld) {
    const uint32_t n_max = t->type == GGML_TYPE_F16 ? 8 : t->type == GGML_TYPE_Q8_0 ? 4 : 0;

    return n_q <= n_max && t->ne[0] == ld ? (const uint8_t *) t->data + i_head*t->nb[1] + col*t->nb[2] : nullptr;
}

// -> [n][ld]
static void read_cells(const llama_capsule_simd & simd, const ggml_tensor * t, uint32_t i_head, int64_t col, uint32_t n, float * dst, uint32_t ld) {
    const uint32_t d = t->ne[0];

    for (uint32_t j = 0; j < n; ++j, dst += ld) {
        simd.to_float(t->type, (const char *) t->data + i_head*t->nb[1] + (col + j)*t->nb[2], dst, d);
        std::fill(dst + d, dst + ld, 0.0f);
    }
}

void llama_capsule_hot::scores(const ggml_tensor * k, uint32_t i_head, uint32_t i0, uint32_t i1, int64_t col, uint32_t n) {
    for (uint32_t j = 0; j < n; j += HOT_CELLS) {
        const uint32_t n_cells = std::min(HOT_CELLS, n - j);

        for (uint32_t i = i0; i < i1; ++i) {
            float * out = s.data() + (i - i0)*n_q*ld_s + j;

            const uint8_t * cells = cells_in_place(k, i_head + i, col + j, n_q, ld_k);
            if (cells && simd.dot_cells) {
                simd.dot_cells(k->type, n_cells, n_q, ld_k, cells, k->nb[2], query(i), ld_k, out, ld_s);
                continue;
            }
            prefetch(k, i_head + i, col + j + HOT_CELLS, HOT_CELLS);
            read_cells(simd, k, i_head + i, col + j, n_cells, x.data(), ld_k);
            simd.dot(n_cells, n_q, ld_k, x.data(), ld_k, query(i), ld_k, out, ld_s);
        }
    }
}

void llama_capsule_hot::values(const ggml_tensor * v, uint32_t i_head, uint32_t i0, uint32_t i1, int64_t col, uint32_t n) {
    for (uint32_t j = 0; j < n; j += HOT_CELLS) {
        const uint32_t n_cells = std::min(HOT_CELLS, n - j);

        for (uint32_t i = i0; i < i1; ++i) {
            const float * weights = s.data() + (i - i0)*n_q*ld_s + j;

            const uint8_t * cells = cells_in_place(v, i_head + i, col + j, n_q, ld_v);
            if (cells && simd.mul_cells) {
                simd.mul_cells(v->type, n_q, n_cells, ld_v, weights, ld_s, cells, v->nb[2], o.data() + i*n_q*ld_v, ld_v);
                continue;
            }
            prefetch(v, i_head + i, col + j + HOT_CELLS, HOT_CELLS);
            read_cells(simd, v, i_head + i, col + j, n_cells, x.data(), ld_v);
            simd.mul(n_q, n_cells, ld_v, weights, 1, ld_s, x.data(), ld_v, nullptr, o.data() + i*n_q*ld_v, ld_v);
        }
    }
}

// v: [n_kv, n_head, d]
void llama_capsule_hot::values_t(const ggml_tensor * v, uint32_t i_head, uint32_t i0, uint32_t i1, int64_t col, uint32_t n) {
    const uint32_t n_pad = GGML_PAD(n, LLAMA_CAPSULE_VEC);
    const uint32_t d     = v->ne[2];

    for (uint32_t i = i0; i < i1; ++i) {
        for (uint32_t c = 0; c < d; c += HOT_CHANNELS) {
            const uint32_t n_ch = std::min(HOT_CHANNELS, d - c);

            for (uint32_t j = 0; j < n_ch; ++j) {
                const char * src = (const char *) v->data + (i_head + i)*v->nb[1] + (c + j)*v->nb[2] + col*ggml_type_size(v->type);

                simd.to_float(v->type, src, x.data() + j*n_pad, n);
                std::fill(x.data() + j*n_pad + n, x.data() + (j + 1)*n_pad, 0.0f);
            }
            simd.dot(n_ch, n_q, n_pad, x.data(), n_pad, s.data() + (i - i0)*n_q*ld_s, ld_s, w.data(), HOT_CHANNELS);

            for (uint32_t t = 0; t < n_q; ++t) {
                for (uint32_t j = 0; j < n_ch; ++j) {
                    o.data()[(i*n_q + t)*ld_v + c + j] += w.data()[t*HOT_CHANNELS + j];
                }
            }
        }
    }
}
