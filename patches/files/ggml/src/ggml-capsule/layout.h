#pragma once

#include <cstddef>
#include <cstdint>

//
// The bytes of a slot: one tile of tokens, all KV heads of a layer (docs/reference/format-v2.md).
// This is the only place that knows them.
//
//   slot    head after head: 8 bytes (f32 step, 0), its K, its V; K and V beside each other meet fewer pages
//   head    scales, padded to 8 bytes, then codes, padded to 8 bytes
//   scales  f16, of the blocks that have one (all but those of 0 and 16 bits): group after group, from smooth to rough
//   codes   group after group: the constant row, then the pairs of rows from many bits to few (those of equal bits from
//           smooth to rough), then the row that is left alone where their number is even
//   block   a block of n rows has n*lanes elements; element lane*n + row holds the codes a and b of the two registers:
//           1, 2, 4 bits: a plane of 2, 4, 8 bits an element, a | b << bits
//           3 bits: a plane of 4 bits, (b & 1) | a << 1, and one of 2 bits, b >> 1
//           6 bits: a plane of 8 bits, (b & 3) | a << 2, and one of 4 bits, b >> 2
//           8 bits: a plane of 8 bits with all a, and one with all b
//           16 bits (f16): register after register, the first row before the second
//   plane   of less than 8 bits an element: byte k has the elements k, k + n, k + 2*n, ... if the plane has n bytes,
//           from the lowest bits up
//
// Codes are stored as c + 2^(bits - 1), with 1 bit as (c + 1)/2.
// The steps belong to the integer kernels: ggml_capsule_slot_seal() makes them from the rest when a slot is written or loaded.
// Kernels read up to GGML_CAPSULE_PAD bytes behind the last slot of a pool; what is there does not matter.
//

// formulas that GPUs need as well
#if defined(__CUDACC__) || defined(__HIPCC__) || defined(__MUSACC__)
#define GGML_CAPSULE_FN __host__ __device__ inline
#else
#define GGML_CAPSULE_FN inline
#endif

constexpr int GGML_CAPSULE_SIDE       = 8;   // a tile has at most 8 x 8 tokens
constexpr int GGML_CAPSULE_MAX_ROWS   = 64;
constexpr int GGML_CAPSULE_MAX_BLOCKS = 33;  // of rows: the constant row, 31 pairs, the last row; the height of a table
constexpr int GGML_CAPSULE_PAD_BLOCKS = 40;
constexpr int GGML_CAPSULE_LANES      = 16;
constexpr int GGML_CAPSULE_MAX_D      = 512;
constexpr int GGML_CAPSULE_MAX_GROUPS = GGML_CAPSULE_MAX_D/(2*GGML_CAPSULE_LANES) + 1;
constexpr int GGML_CAPSULE_PAD        = 64;
constexpr int GGML_CAPSULE_F16        = 16;  // "bits" of a block that is stored as f16; 0: not stored
constexpr int GGML_CAPSULE_F32        = 32;  // as f32: for tests, no integer kernel takes it

// the numbers of bits that a block can have, in the order of the bytes
constexpr int     GGML_CAPSULE_N_BITS = 8;
constexpr uint8_t GGML_CAPSULE_BITS[GGML_CAPSULE_N_BITS] = { GGML_CAPSULE_F16, 8, 6, 4, 3, 2, 1, GGML_CAPSULE_F32 };

// how the channels of a head of K or V lie in groups: a group is two registers of up to 16 lanes
// K: the first members of 16 neighbouring RoPE pairs, and the second ones. V, and channels without RoPE: in their order
struct ggml_capsule_channels {
    int32_t d;      // head size, 1 .. 512
    int32_t n_rot;  // how many of the first channels have RoPE; 0 for V
    int32_t halves; // RoPE pairs are (i, i + n_rot/2), else (2*i, 2*i + 1)
};

// groups of RoPE pairs come first
GGML_CAPSULE_FN int ggml_capsule_n_pair_groups(const ggml_capsule_channels & channels) {
    return (channels.n_rot/2 + GGML_CAPSULE_LANES - 1)/GGML_CAPSULE_LANES;
}

GGML_CAPSULE_FN int ggml_capsule_n_groups(const ggml_capsule_channels & channels) {
    return ggml_capsule_n_pair_groups(channels) + (channels.d - channels.n_rot + 2*GGML_CAPSULE_LANES - 1)/(2*GGML_CAPSULE_LANES);
}

// lanes of a group, 1 .. 16
GGML_CAPSULE_FN int ggml_capsule_n_lanes(const ggml_capsule_channels & channels, int group) {
    const int  n_paired = ggml_capsule_n_pair_groups(channels);
    const bool paired   = group < n_paired;
    const int  n_left   = paired ? channels.n_rot/2 - GGML_CAPSULE_LANES*group : (channels.d - channels.n_rot - 2*GGML_CAPSULE_LANES*(group - n_paired) + 1)/2;

    return n_left < GGML_CAPSULE_LANES ? n_left : GGML_CAPSULE_LANES;
}

// the channel at a place, -1: none (the second register of an odd last channel)
GGML_CAPSULE_FN int ggml_capsule_channel(const ggml_capsule_channels & channels, int group, int reg, int lane) {
    const int n_paired = ggml_capsule_n_pair_groups(channels);
    if (group < n_paired) {
        const int pair = GGML_CAPSULE_LANES*group + lane;
        return channels.halves ? pair + reg*channels.n_rot/2 : 2*pair + reg;
    }
    const int first   = channels.n_rot + 2*GGML_CAPSULE_LANES*(group - n_paired);
    const int channel = first + reg*ggml_capsule_n_lanes(channels, group) + lane;
    return channel < channels.d ? channel : -1;
}

// how rough coefficient u*w + v of an h x w tile is: they are stored from smooth to rough, those that are equally rough by their numbers
GGML_CAPSULE_FN int ggml_capsule_roughness(int i, int h, int w) {
    return i/w*w*(i/w*w) + i%w*h*(i%w*h);
}

// the coefficients of an h x w tile in this order: [h*w]
void ggml_capsule_row_order(int h, int w, uint8_t * order);

inline int ggml_capsule_n_blocks(int h, int w) { return 1 + h*w/2; }

// the row of a whole tile's table that each block of rows of an h x w tile uses: [ggml_capsule_n_blocks(h, w)]
void ggml_capsule_table_rows(int h, int w, uint8_t * rows);

// bits of an element in the first plane of a block of up to 8 bits
GGML_CAPSULE_FN constexpr int ggml_capsule_plane_width(int bits) { return bits == 1 ? 2 : bits <= 3 ? 4 : 8; }

// codes of both registers, as numbers from 0 on, from the elements of both planes
template<int BITS>
GGML_CAPSULE_FN void ggml_capsule_codes(int first, int second, int & a, int & b) {
    constexpr int low = ggml_capsule_plane_width(BITS) - BITS; // bits of b in the first plane
    if (low == BITS) {
        a = first & ((1 << BITS) - 1);
        b = first >> BITS;
    } else {
        a = first >> low;
        b = second << low | (first & ((1 << low) - 1));
    }
}

// bytes of the codes of a block
GGML_CAPSULE_FN size_t ggml_capsule_code_size(int bits, int n_rows, int n_lanes) {
    const size_t n = (size_t) n_rows*n_lanes;
    switch (bits) {
        case 3:  return (n + 1)/2 + (n + 3)/4;
        case 6:  return n + (n + 1)/2;
        default: return (2*bits*n + 7)/8;
    }
}

//
// plan: where the blocks of one head are, for one table and one shape; plain data, its size depends on the number of groups
//

struct ggml_capsule_plan_group {
    uint32_t code;     // offset of the first code from the head's first byte
    uint16_t scale;    // offset of the first scale
    uint8_t  n_lanes;
    uint8_t  first;    // bits of the constant row
    uint8_t  last;     // bits of the row that is left alone, 0 if there is none
    uint8_t  n_pairs[GGML_CAPSULE_N_BITS]; // how many pairs have so many bits
    uint8_t  pair[GGML_CAPSULE_MAX_BLOCKS - 2]; // the pairs in the order of their codes, then those without: pair i is the rows 2*i - 1 and 2*i
    uint8_t  bits[GGML_CAPSULE_PAD_BLOCKS];     // of each block of rows
    uint8_t  low_first, low_last;   // blocks of up to 3 bits are within 8*low_first .. 8*low_last - 1, both 0 if there are none
    uint8_t  high_first, high_last; // those of 4 to 8 bits
    // how a byte shuffle brings the scales of 8 blocks to their places: those of up to 3 bits, those of more
    uint16_t source [GGML_CAPSULE_PAD_BLOCKS/8];
    uint8_t  shuffle[2][GGML_CAPSULE_PAD_BLOCKS/8][16];
};

struct ggml_capsule_plan {
    uint32_t size; // bytes of the head
    uint16_t n_groups;
    uint8_t  h;
    uint8_t  w;
    uint32_t exact; // some block is f32
    ggml_capsule_plan_group groups[1]; // [n_groups]
};

inline size_t ggml_capsule_plan_size(int n_groups) {
    return sizeof(ggml_capsule_plan) + (n_groups - 1)*sizeof(ggml_capsule_plan_group);
}

// calls f(first row, number of rows, bits, offset of the scale) for the stored blocks of a group in the order of their codes
template<typename F>
void ggml_capsule_plan_blocks(const ggml_capsule_plan * plan, int g, F f) {
    const ggml_capsule_plan_group & group = plan->groups[g];

    int scales[GGML_CAPSULE_MAX_BLOCKS]; // where the scale of each block is
    int n = 0;
    for (int i = 0; i < ggml_capsule_n_blocks(plan->h, plan->w); ++i) {
        scales[i] = group.scale + 2*n;
        n += group.bits[i] > 0 && group.bits[i] < GGML_CAPSULE_F16;
    }

    if (group.first > 0) {
        f(0, 1, (int) group.first, scales[0]);
    }
    const uint8_t * pair = group.pair;
    for (int b = 0; b < GGML_CAPSULE_N_BITS; ++b) {
        for (int i = 0; i < group.n_pairs[b]; ++i, ++pair) {
            f(2**pair - 1, 2, (int) GGML_CAPSULE_BITS[b], scales[*pair]);
        }
    }
    if (group.last > 0) {
        f(plan->h*plan->w - 1, 1, (int) group.last, scales[plan->h*plan->w/2]);
    }
}

// table: bits of each block, [33][n_groups]
void ggml_capsule_plan_init(ggml_capsule_plan * plan, const ggml_capsule_channels & channels, const uint8_t * table, int h, int w);

// bytes of one head in a slot
size_t ggml_capsule_head_size(const ggml_capsule_channels & channels, const uint8_t * table, int h, int w);

//
// form: a tier and a shape, for all heads of a layer
//

struct ggml_capsule_form {
    int32_t          h;
    int32_t          w;
    size_t           size;   // bytes of a slot
    const uint8_t  * k_plan; // plan of head i at k_plan + i*k_stride
    const uint8_t  * v_plan;
    size_t           k_stride; // 0: all heads have one table
    size_t           v_stride;
    const uint32_t * k_offset; // offset of the bytes of head i in a slot
    const uint32_t * v_offset;
};

// the step of a head of K lies before its bytes
inline float * ggml_capsule_step_of(uint8_t * bytes)             { return (float *) bytes - 2; }
inline float   ggml_capsule_step_of(const uint8_t * bytes)       { return ((const float *) bytes)[-2]; }

inline const ggml_capsule_plan * ggml_capsule_form_k(const ggml_capsule_form & form, int head) {
    return (const ggml_capsule_plan *) (form.k_plan + head*form.k_stride);
}

inline const ggml_capsule_plan * ggml_capsule_form_v(const ggml_capsule_form & form, int head) {
    return (const ggml_capsule_plan *) (form.v_plan + head*form.v_stride);
}

// fills in the offsets [n_head_kv] of the heads from their plans, returns the bytes of a slot
size_t ggml_capsule_form_offsets(const ggml_capsule_form & form, int n_head_kv, uint32_t * k_offset, uint32_t * v_offset);
