#pragma once

#include "quantize.h"

//
// From the bytes of a head back to K or V, in plain C++ and f32: what the kernels are tested against, and the slow way.
//

// the bytes of a head -> coefficients f32 [h*w][d]
void ggml_capsule_load(const ggml_capsule_channels & channels, const ggml_capsule_plan * plan, const uint8_t * bytes, float * rows);

// the bytes of a head -> K (without RoPE) or V, f32 [h*w] tokens, line by line, `stride` floats apart
// rows: h*w*d floats of work; work: ggml_capsule_rows_work(d) floats
void ggml_capsule_read(const ggml_capsule_coder & coder, const ggml_capsule_plan * plan, const uint8_t * bytes,
        float * x, size_t stride, float * rows, float * work);

// what an integer of the kernels stands for, so that no sum on the way to the keys of this tile leaves 16 bits
float ggml_capsule_step(const ggml_capsule_coder & coder, const ggml_capsule_plan * plan, const uint8_t * bytes);

// the steps of all heads of a slot, from its K; call it when a slot has been written or loaded
void ggml_capsule_slot_seal(const ggml_capsule_form & form, int n_head_kv, const ggml_capsule_coder * k, uint8_t * slot);
