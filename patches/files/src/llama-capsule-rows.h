#pragma once

#include "ggml.h"

#include <array>
#include <cstddef>
#include <cstdint>

//
// typed rows: a list of rows of length d, the important ones first, in types of falling precision
//

static constexpr int LLAMA_CAPSULE_N_TYPES = 5;

static constexpr std::array<ggml_type, LLAMA_CAPSULE_N_TYPES> LLAMA_CAPSULE_TYPES = {
    GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0, GGML_TYPE_Q2_0,
};

// rows per type, in the order of LLAMA_CAPSULE_TYPES
using llama_capsule_row_counts = std::array<uint32_t, LLAMA_CAPSULE_N_TYPES>;

uint32_t llama_capsule_rows_total(const llama_capsule_row_counts & counts);

// bytes of a list of rows of length d
size_t llama_capsule_rows_size(const llama_capsule_row_counts & counts, uint32_t d);

// largest power of two that divides d: quantized rows are rotated by the Hadamard matrix of this size
uint32_t llama_capsule_hadamard_size(uint32_t d);

// in-place normalised Hadamard transform of each run of n values
void llama_capsule_hadamard(float * x, uint32_t n, size_t n_values);

// x is modified (rotated) if the type is quantized
void llama_capsule_row_encode(ggml_type type, float * x, void * dst, uint32_t d);
void llama_capsule_row_decode(ggml_type type, const void * src, float * x, uint32_t d);

// q2_0 with a searched scale: quantize_row_q2_0_ref never uses the code +2
void llama_capsule_quantize_row_q2_0(const float * x, void * dst, uint32_t d);
