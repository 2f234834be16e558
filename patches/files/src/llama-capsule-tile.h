#pragma once

#include "llama-capsule-codec.h"
#include "llama-capsule-simd.h"

//
// the blocks of one layer in one tier, fast: K or V of a head as floats, or the rows alone
//   everything is padded with zeros to ld() values per row
//

// squared errors of a token in one head, those of keys weighted by the second moment of the queries
struct llama_capsule_errors {
    float slot;   // of what is read back
    float q4;     // of rotated q4_0
    float energy; // of nothing
};

// is each of n numbers finite, and does it fit f16?
bool llama_capsule_finite(const float * x, size_t n);

class llama_capsule_tile {
public:
    llama_capsule_tile(const llama_capsule_codec & codec, bool is_v);

    uint32_t d()      const;
    uint32_t ld()     const; // d padded
    uint32_t n_rows() const;

    // [N][ld], K without RoPE
    void decode(const uint8_t * slot, uint32_t i_head, float * out) const;

    // the inverse, into a slot of zeros
    void encode(const float * x, uint32_t i_head, uint8_t * slot) const;

    // is all that decode() gives finite, and does it fit f16?
    bool fits(const uint8_t * slot, uint32_t i_head) const;

    // how well the slot holds the first n tokens of x; d() must fit q4_0. Returns what fits() does
    bool errors(const float * x, const uint8_t * slot, uint32_t i_head, uint32_t n, llama_capsule_errors * out) const;

    // basis [n_rows][ld_basis()], zero behind the N tokens of a row
    const float * basis()    const;
    uint32_t      ld_basis() const;

    // the same by tokens: [ld_basis()][ld_rows()], zero behind the tokens and behind the rows
    const float * tokens()  const;
    uint32_t      ld_rows() const;

    // [n_rows][ld]: x = mean + basis*rows, or its Hadamard transform
    void decode_rows(const uint8_t * slot, uint32_t i_head, bool rotated, float * out) const;

    // out[q][i] += sum_r w[q][r] rows[r][i], the rows as decode_rows() gives them; next: the slot that is read after it, or nullptr
    void mul_rows(const uint8_t * slot, const uint8_t * next, uint32_t i_head, bool rotated, uint32_t n_q, const float * w, size_t ld_w, float * out) const;

    // those of a type as they are stored
    const uint8_t * rows_at(const uint8_t * slot, uint32_t i_head, int t) const;

    // the rows of a head are needed soon
    void prefetch(const uint8_t * slot, uint32_t i_head) const;

    // are there rows that are stored rotated?
    bool has_rotated() const;

private:
    const llama_capsule_codec & codec;

    const llama_capsule_row_counts   & counts;
    const llama_capsule_layout::part & part;

    bool is_v;
    bool retain;

    std::vector<float>   basis_pad; // only if N is not a multiple of the vector size
    std::vector<float>   basis_t;   // see tokens(), of V only
    std::vector<float>   mean;      // [n_head_kv][ld], rotated if the rows are
    std::vector<int16_t> basis_int; // of the q4_0 and q2_0 rows
    std::vector<float>   basis_max;

    std::vector<float> mlp_down; // [n_head_kv][n_mlp][d]

    // rows of the types [t0, t1)
    float * decode_types(const uint8_t * slot, uint32_t i_head, int t0, int t1, bool rotated, float * out) const;

    void decode_pca   (const uint8_t * slot, uint32_t i_head, float * out) const;
    void decode_retain(const uint8_t * slot, uint32_t i_head, float * out) const;

    // llama-capsule-tile-encode.cpp
    void encode_pca   (const float * x, uint32_t i_head, uint8_t * slot) const;
    void encode_retain(const float * x, uint32_t i_head, uint8_t * slot) const;

    // rows [i0, i0 + n) of the list, modified
    void encode_rows(float * rows, uint32_t i0, uint32_t n, uint32_t i_head, uint8_t * slot) const;
};
