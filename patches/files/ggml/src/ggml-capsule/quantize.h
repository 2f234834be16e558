#pragma once

#include "transform.h"

//
// From the K or V of a tile to the bytes of a head. The same coefficients give the same bytes as kvcapsule_gguf/codec does.
//

// what one head of K or V of a layer is coded with
struct ggml_capsule_coder {
    ggml_capsule_channels channels;
    const float         * mean; // [d], NULL: zero
    const float         * axes; // [d][d], column j is axis j; NULL: the channels themselves

    ggml_capsule_transform whole = {}; // of a whole tile, for this head
};

// x: [h*w] tokens, line by line, `stride` floats apart -> coefficients f32 [h*w][d], from smooth to rough
// plan: how they will be stored, which the rows of dropped tokens depend on; NULL if there are none
// work: ggml_capsule_rows_work(d) floats
size_t ggml_capsule_rows_work(int d);
void   ggml_capsule_rows(const ggml_capsule_coder & coder, const ggml_capsule_plan * plan, int h, int w, const float * x, size_t stride, float * rows, float * work);

// the inverse: coefficients -> tokens; the same work
void   ggml_capsule_inverse(const ggml_capsule_coder & coder, int h, int w, const float * rows, float * x, size_t stride, float * work);

// Hadamard transform between the registers of a block, in place: [2*n_rows][n_lanes]; it is its own inverse
void ggml_capsule_mix(float * block, int n_rows, int n_lanes);

// the values of a block as they are stored: f32 [2*n_rows][n_lanes]
void ggml_capsule_block(const ggml_capsule_channels & channels, int group, int n_rows, const float * rows, float * block);

// n values -> signed scale (an f16 number) and n codes of `bits` bits; the rule is in codec/scale.py
float ggml_capsule_search(const float * x, int n, int bits, int8_t * codes);

// the squared error that each number of bits leaves in each block of rows and group, and with 0 bits: the energy
// errors: f32 [ggml_capsule_n_blocks(h, w)][n_groups][n_bits], bits: [n_bits] with 0 and 16 among them as wanted
// wanted: [ggml_capsule_n_blocks(h, w)][n_groups], bit b is set where bits[b] is asked for; NULL: all are
void ggml_capsule_errors(const ggml_capsule_coder & coder, int h, int w, const float * rows, int n_bits, const uint8_t * bits, const uint16_t * wanted,
        float * errors);

// coefficients -> the bytes of a head; what is not finite is stored as some finite number
void ggml_capsule_store(const ggml_capsule_channels & channels, const ggml_capsule_plan * plan, const float * rows, uint8_t * bytes);
