#pragma once

#include "llama-capsule-simd.h"

//
// attention over hot cells, on the CPU, open for more scores: slots follow
//   the heads of a cell lie side by side and its neighbours far away, so a few cells are read for all heads before the next ones are
//

// the sums of a query's weights over what it has seen so far
struct llama_capsule_softmax {
    float m;
    float l;

    // n scores -> weights, their sum; returns what earlier sums have to be multiplied by (l has been)
    float add(float * s, const float * mask, uint32_t n, float & added);
};

enum llama_capsule_mask_kind : uint8_t {
    LLAMA_CAPSULE_MASK_NONE, // nothing is visible
    LLAMA_CAPSULE_MASK_ALL,  // zeros
    LLAMA_CAPSULE_MASK_SOME,
};

// n columns of a row of a mask
llama_capsule_mask_kind llama_capsule_mask_kind_of(const ggml_tensor * mask, int64_t row, int64_t col, uint32_t n);

// as floats, -inf up to the next multiple of LLAMA_CAPSULE_VEC
void llama_capsule_read_mask(const ggml_tensor * mask, int64_t row, int64_t col, uint32_t n, float * dst);

class llama_capsule_hot {
public:
    // queries of n_heads KV heads, n_q each, token by token; returns them to be filled: [n_heads][n_q][ld_k], padded with zeros
    float * init(uint32_t n_heads, uint32_t n_q, uint32_t n_group, uint32_t ld_k, uint32_t ld_v);

    // columns [col, col_end) of the KV heads from i_head on
    void attend(const ggml_tensor * k, const ggml_tensor * v, bool v_trans, const ggml_tensor * mask, uint32_t i_head, int64_t col, int64_t col_end);

    // of the i-th head
    const float                 * query  (uint32_t i) const; // [n_q][ld_k]
    const llama_capsule_softmax * softmax(uint32_t i) const; // [n_q]
    const float                 * out    (uint32_t i) const; // [n_q][ld_v], not divided by l

private:
    uint32_t n_heads;
    uint32_t n_q;
    uint32_t n_group;
    uint32_t ld_k;
    uint32_t ld_v;
    uint32_t ld_s; // columns at a time

    const llama_capsule_simd & simd = llama_capsule_simd_get();

    llama_capsule_buf<float> q;
    llama_capsule_buf<float> o;
    llama_capsule_buf<float> s;  // [heads at a time][n_q][ld_s]
    llama_capsule_buf<float> x;  // keys or values of a few cells
    llama_capsule_buf<float> w;  // [n_q][channels at a time]
    llama_capsule_buf<float> visible; // [n_q/n_group][ld_s]

    llama_capsule_buf<llama_capsule_softmax> sums;

    void scores  (const ggml_tensor * k, uint32_t i_head, uint32_t i0, uint32_t i1, int64_t col, uint32_t n);
    void values  (const ggml_tensor * v, uint32_t i_head, uint32_t i0, uint32_t i1, int64_t col, uint32_t n);
    void values_t(const ggml_tensor * v, uint32_t i_head, uint32_t i0, uint32_t i1, int64_t col, uint32_t n);
};
