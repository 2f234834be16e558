#pragma once

#include "ggml.h"

#include <array>
#include <cstddef>
#include <cstdint>

//
// typed rows: a list of rows of length d, the important ones first, in types of falling precision
//

static constexpr int LLAMA_CAPSULE_N_TYPES = 5;

static constexpr uint32_t LLAMA_CAPSULE_MAX_HEAD_SIZE = 512; // of a row, the kernels have room for no more

static constexpr std::array<ggml_type, LLAMA_CAPSULE_N_TYPES> LLAMA_CAPSULE_TYPES = {
    GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0, GGML_TYPE_Q2_0,
};

// rows per type, in the order of LLAMA_CAPSULE_TYPES
using llama_capsule_row_counts = std::array<uint32_t, LLAMA_CAPSULE_N_TYPES>;

uint32_t llama_capsule_rows_total(const llama_capsule_row_counts & counts);

// bytes of a list of rows of length d
size_t llama_capsule_rows_size(const llama_capsule_row_counts & counts, uint32_t d);

// functions with loops worth the vector units of the machine: libllama itself is built for the baseline
// (not under the thread sanitizer: the resolvers run before it is ready)
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12 && !defined(__SANITIZE_THREAD__)
#define LLAMA_CAPSULE_SIMD __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define LLAMA_CAPSULE_SIMD
#endif

// out[t][i] = mean[i] + sum_r w[r][t] x[r][i], with w [n_rows][n_out], x [n_rows][d], out [n_out][d]; mean may be NULL
void llama_capsule_mul_rows(const float * w, const float * x, const float * mean, float * out, uint32_t n_out, uint32_t n_rows, uint32_t d);

void llama_capsule_to_f16(const float * x, ggml_fp16_t * y, int64_t n);

// largest power of two that divides d: quantized rows are rotated by the Hadamard matrix of this size
uint32_t llama_capsule_hadamard_size(uint32_t d);

// in-place normalised Hadamard transform of each run of n values
void llama_capsule_hadamard(float * x, uint32_t n, size_t n_values);

// without rotating it
void llama_capsule_row_quantize(ggml_type type, const float * x, void * dst, uint32_t d);

// undoes the rotation if the type is quantized
void llama_capsule_row_decode(ggml_type type, const void * src, float * x, uint32_t d);

// q2_0 with a searched scale: quantize_row_q2_0_ref never uses the code +2
void llama_capsule_quantize_row_q2_0(const float * x, void * dst, uint32_t d);
