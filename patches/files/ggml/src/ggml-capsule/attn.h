#pragma once

#include "transform.h"

//
// Attention of the queries of one KV head over tiles, one online softmax. The caller merges hot cells through the same sums.
//

struct ggml_capsule_slot {
    int32_t offset; // from `pool`, in units of `unit` bytes
    int32_t form;   // which of `forms`
    int32_t rope;   // which of `ropes`
    int32_t token;  // the column of its first token in `mask`; its tokens follow line by line
};

// RoPE inside a tile: by how much each pair turns from a token to the next one, and from a line to the next one
// positions along a line of a picture of W tokens: (theta, W*theta); M-RoPE: (theta or 0, theta or 0) by section
// made once for each kind of tile, shared by all layers with the same theta; plain data, its size depends on the number of groups
struct ggml_capsule_rope {
    enum {
        NONE, // nothing turns within half a line
        SIN,  // the cosine is 1
        FULL,
    };

    int32_t n; // lanes of all groups, padded to 32
    uint8_t turn[60]; // of each group, from token to token
    double  steps[1]; // radians [2][n], to the next token and to the next line; then the tables, and the same in f32

    static constexpr int N_TABLES = 3*GGML_CAPSULE_SIDE;

    // from the first token to the middle of line y, times 2^13
    const int16_t * y_cos(int y) const { return (const int16_t *) (steps + 2*n) + y*n; }
    const int16_t * y_sin(int y) const { return y_cos(GGML_CAPSULE_SIDE + y); }

    // of i + 1/2 tokens, i < 4, times 2^15
    const int16_t * x_cos(int i) const { return y_cos(2*GGML_CAPSULE_SIDE + i); }
    const int16_t * x_sin(int i) const { return y_cos(2*GGML_CAPSULE_SIDE + GGML_CAPSULE_SIDE/2 + i); }

    // of any of these
    const float * exact(const int16_t * table) const { return (const float *) y_cos(N_TABLES) + (table - y_cos(0)); }
};

size_t ggml_capsule_rope_size(const ggml_capsule_channels & k); // a multiple of 64

// step_x, step_y: radians of each pair, [n_rot/2]
void ggml_capsule_rope_init(ggml_capsule_rope * rope, const ggml_capsule_channels & k, const double * step_x, const double * step_y);

// the turn of the first token of a slot, cos and sin of each lane: f32 [2][16*n_groups]
// angle: of each pair, [n_rot/2]; scale: what RoPE multiplies keys by (YaRN), else 1
size_t ggml_capsule_angles_size(const ggml_capsule_channels & k); // floats, a multiple of 16
void   ggml_capsule_angles_init(float * angles, const ggml_capsule_channels & k, const double * angle, float scale);

struct ggml_capsule_attn_args {
    // the layer
    ggml_capsule_channels k;
    ggml_capsule_channels v;
    int32_t               n_head_kv;
    const float         * k_mean;  // [n_head_kv][d_k], NULL: zero
    const float         * v_mean;  // [n_head_kv][d_v], NULL: zero
    const float         * v_axes;  // [n_head_kv][d_v][d_v], columns are axes, NULL: none

    // of the layer
    ggml_capsule_transform k_transform;
    ggml_capsule_transform v_transform;

    // the slots
    const uint8_t                 * pool;
    size_t                          unit;
    const ggml_capsule_form       * forms;
    const ggml_capsule_slot       * slots;
    const ggml_capsule_rope * const * ropes; // NULL: no RoPE
    const float                   * angles;  // of slot i at angles + i*ggml_capsule_angles_size()

    // the queries: row j = t*n_gqa + i is query head i (of those of this KV head) of token t
    int32_t       n_tokens;
    int32_t       n_gqa;
    const float * q;           // with RoPE of its own position, times the scale of the scores
    size_t        q_token;     // floats from token to token
    size_t        q_head;      // floats from query head to query head; KV head h has n_gqa*h and on

    // what the queries see
    const uint8_t * seen;      // [n_tokens][n_seen]: of each slot, 0 nothing, 1 all of it, 2 what `mask` says; NULL: all of it
    size_t          n_seen;    // from token to token
    const uint16_t * mask;     // f16 [n_tokens][n_mask], added to the scores: 0 or -INFINITY
    size_t           n_mask;   // from token to token
};

// sums of a range of keys, of one KV head: rows j = t*n_gqa + i
// out[j] = sum_k exp(s_k - max[j]) v_k, sum[j] = sum_k exp(s_k - max[j]); nothing seen yet: max -INFINITY, sum 0, out 0
struct ggml_capsule_attn_sums {
    float * max; // [n_tokens*n_gqa]
    float * sum; // [n_tokens*n_gqa]
    float * out; // [n_tokens*n_gqa][d_v], in the channels of V
};

// bytes of work memory, aligned to 64, that one thread needs
size_t ggml_capsule_attn_work(const ggml_capsule_attn_args * args);

// adds the tokens of slots first .. last - 1 to the sums of KV head `head`
// a slot without steps, because ggml_capsule_slot_seal() has not been called, is read in plain C++
void ggml_capsule_attn_tiles(const ggml_capsule_attn_args * args, int head, int first, int last, const ggml_capsule_attn_sums * sums, void * work);

// the same in plain C++ and f32, for any CPU; what the kernels are tested against
size_t ggml_capsule_attn_work_plain(const ggml_capsule_attn_args * args);
void   ggml_capsule_attn_tiles_plain(const ggml_capsule_attn_args * args, int head, int first, int last, const ggml_capsule_attn_sums * sums, void * work);
