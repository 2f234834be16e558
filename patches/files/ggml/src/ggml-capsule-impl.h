#pragma once

//
// GGML_OP_CAPSULE: all its arithmetic, for every backend; compiles as C++, CUDA and Metal Shading Language
//
// A kernel is a sequence of phases with barriers between them. A phase is a function of the id of the thread; what one thread writes in a phase
// no other thread of the group reads or writes in the same phase. The CPU runs the threads of a phase one after the other, in any order.
//
// here: names of a backend, what a kernel is told, values of rows; -mma.h: tensor cores; -tile.h: blocks; -unpack.h; the way back: -cells.h, -put.h, -encode.h;
// -query.h: keys that are not rebuilt; attention: -scores.h, -attn.h
//

#if defined(__METAL_VERSION__)
#define CAPSULE_FN     static inline
#define CAPSULE_GLOBAL device
#define CAPSULE_SHARED threadgroup
#define CAPSULE_PARAM  constant
#define CAPSULE_PRIVATE thread
#define CAPSULE_UNROLL _Pragma("unroll")
#define CAPSULE_BARRIER() threadgroup_barrier(mem_flags::mem_threadgroup)
#define CAPSULE_BARRIER_GLOBAL() threadgroup_barrier(mem_flags::mem_device)
#define CAPSULE_PHASES
#define CAPSULE_RAISE(x) (x) = 1
#define CAPSULE_EXP(x) exp(x)
#define CAPSULE_DIV(x, y) ((x)/(y))
#define CAPSULE_RINT(x) rint(x)
typedef half capsule_half;
CAPSULE_FN float capsule_float(float x) { return x; }
CAPSULE_FN float capsule_float(half  x) { return (float) x; }
CAPSULE_FN float capsule_as_half(float x) { return (float) (half) x; }
CAPSULE_FN void capsule_put(threadgroup float & y, float x) { y = x; }
CAPSULE_FN void capsule_put(threadgroup half  & y, float x) { y = (half) x; }
CAPSULE_FN void capsule_put(device      half  & y, float x) { y = (half) x; }
#elif defined(__CUDACC__) || defined(__HIPCC__) || defined(__MUSACC__)
#include <cstdint>
#define CAPSULE_FN     static __device__ __forceinline__
#define CAPSULE_GLOBAL
#define CAPSULE_SHARED
#define CAPSULE_PARAM
#define CAPSULE_PRIVATE
#define CAPSULE_UNROLL _Pragma("unroll")
#define CAPSULE_UNROLL_2 _Pragma("unroll 2") // or registers run out
#define CAPSULE_BARRIER() __syncthreads()
#define CAPSULE_PHASES
#define CAPSULE_RAISE(x) (x) = 1
#define CAPSULE_EXP(x) expf(x)
#define CAPSULE_DIV(x, y) __fdiv_rn(x, y) // also with -use_fast_math
#define CAPSULE_RINT(x) rintf(x)
typedef half capsule_half;
CAPSULE_FN float capsule_float(float x) { return x; }
CAPSULE_FN float capsule_float(half  x) { return __half2float(x); }
CAPSULE_FN float capsule_as_half(float x) { return __half2float(__float2half_rn(x)); }
CAPSULE_FN void capsule_put(float & y, float x) { y = x; }
CAPSULE_FN void capsule_put(half  & y, float x) { y = __float2half_rn(x); }
#else
#include "ggml.h"
#include "ggml-impl.h"
#include <cmath>
#include <cstdint>
#define CAPSULE_FN     static inline
#define CAPSULE_GLOBAL
#define CAPSULE_SHARED
#define CAPSULE_PARAM
#define CAPSULE_PRIVATE
#define CAPSULE_UNROLL
#define CAPSULE_UNROLL_2
#define CAPSULE_RAISE(x) __atomic_store_n(&(x), 1, __ATOMIC_RELAXED)
#define CAPSULE_EXP(x) expf(x)
#define CAPSULE_DIV(x, y) ((x)/(y))
#define CAPSULE_RINT(x) rintf(x)
struct capsule_half { ggml_fp16_t bits; };
CAPSULE_FN float capsule_float(float x) { return x; }
CAPSULE_FN float capsule_float(capsule_half x) { return ggml_compute_fp16_to_fp32(x.bits); }
CAPSULE_FN float capsule_as_half(float x) { return ggml_compute_fp16_to_fp32(ggml_compute_fp32_to_fp16(x)); }
CAPSULE_FN void capsule_put(float & y, float x) { y = x; }
CAPSULE_FN void capsule_put(capsule_half & y, float x) { y.bits = ggml_compute_fp32_to_fp16(x); }
#endif

// what threads of the group have written to global memory can be read from here on; Metal alone needs more for that than the end of a phase
#if !defined(CAPSULE_BARRIER_GLOBAL)
#define CAPSULE_BARRIER_GLOBAL()
#endif

#if defined(CAPSULE_PHASES)
// every thread runs the kernel
struct capsule_threads {
    int n; // a multiple of 32
    int id;
};
#define CAPSULE_PHASE(call) do { const int tid = t.id; call; CAPSULE_BARRIER(); } while (0)
#else
// one thread runs it for all
struct capsule_threads {
    int         n;
    const int * order;
};
#define CAPSULE_PHASE(call) do { for (int i_ = 0; i_ < t.n; ++i_) { const int tid = t.order ? t.order[i_] : i_; call; } } while (0)
#endif

#define CAPSULE_MAX_TYPES 5 // F32, F16, Q8_0, Q4_0, Q2_0
#define CAPSULE_LANES     32
#define CAPSULE_N_FLAGS   9
#define CAPSULE_N_FACTORS 6 // see ggml-capsule-put.h

// see ggml-capsule-query.h
#define CAPSULE_N_MAKE      16 // vectors that are made at a time
#define CAPSULE_MAX_VECTORS 48 // pca: if the queries of an item take more, it is less work to rebuild the keys
#define CAPSULE_DOTS        16.0f // unit of products in F16
#define CAPSULE_NEG       (-1e30f) // -INFINITY is not for fast-math

enum capsule_type {
    CAPSULE_F32,
    CAPSULE_F16,
    CAPSULE_Q8_0,
    CAPSULE_Q4_0,
    CAPSULE_Q2_0,
};

// K or V in the slots of a tier
struct capsule_part {
    int offs;
    int head_stride;
    int count    [CAPSULE_MAX_TYPES];
    int type_offs[CAPSULE_MAX_TYPES];
    int row_size [CAPSULE_MAX_TYPES];
    int n_rows;
    int n_plain; // the first rows: not rotated
};

struct capsule_tier {
    capsule_part k;
    capsule_part v;
    capsule_part kept; // retain: of k, the rows that are tokens
    int          slot_size;
    int          n_slots;
    int          retain;
    int          query;  // keys need not be rebuilt
    int          codes;  // values stay integers
};

// a tensor that is not one of rows in slots: element (i0, i1, i2) at i0*size + i1*nb1 + i2*nb2
struct capsule_tensor {
    int     type;
    int64_t nb1;
    int64_t nb2;
};

// everything that a kernel wants to know, see ggml_capsule_args_init()
struct capsule_args {
    int N;
    int n_pad;
    int n_head_kv;
    int n_group;
    int n_tokens;
    int max_q;    // queries of a group of threads: room for them, a multiple of 4
    int n_q;      // at most as many of them
    int n_tiles;  // of n_q queries, per KV head
    int n_chunk;  // tokens in the tile at a time, a multiple of 8
    int n_kv;
    int d_k;
    int d_v;
    int n_rot;
    int norm;
    int rot_k;    // size of the Hadamard transform of the cache, 0: none
    int rot_v;
    int is_v;
    int v_trans;
    int tile_f32;
    int n_kept;
    int n_mlp;
    int n_neighbours;
    int n_terms;  // of the projected-query form, at most
    int mma;      // tensor cores: keys that are rebuilt
    int mma_t;    // pca: rows that meet vectors
    int mma_v;    // values
    int n_mma;    // N, rounded up to a multiple of 16
    int n_slots;
    int n_parts_hot;
    int n_parts;
    int n_items;  // combine: rows; otherwise groups of threads
    int i_tier;   // encode, errors
    int n_chunk_r; // encode: rows at a time
    float scale;

    // weights and angles, in units of 4 bytes
    int w_k_mean;
    int w_v_mean;
    int w_k_basis;
    int w_k_basis_h;
    int w_v_basis;
    int w_v_basis_h;
    int w_v_basis_t;
    int w_token_order;
    int w_neighbours;
    int w_gate;
    int w_mlp_up;
    int w_mlp_up_bias;
    int w_mlp_down;
    int w_mlp_up_h;
    int w_mlp_down_h;
    int w_query_weight;
    int r_pattern;
    int r_distances;
    int r_stride;  // from pattern to pattern

    capsule_tensor q;
    capsule_tensor k;
    capsule_tensor v;
    capsule_tensor mask;
    capsule_tensor cold;
    capsule_tensor dst;

    capsule_tier tiers[2];

    // shared memory, in bytes
    int s_rows;  // [n_rows][ld_rows]
    int s_tile;  // [n_chunk][ld_tile]
    int s_z;     // F32 [N - n_kept][n_mlp], or for tensor cores F16 [n_mma][ld_z]
    int s_u;     // F32 [n_kept][ld_u], tensor cores, where the tile will be
    int s_q;     // F32 [max_q][d_k]
    int s_s;     // F32 [max_q][N]
    int s_dots;     // F32 [n_vec][n_rows] or [n_vec], where the rows and the tile were
    int s_w;        // F32 [max_q][n_rows], where the dots were, or for tensor cores [16][n_mma]
    int s_v_rows;   // F16 [n_mma][d_v + 8], tensor cores, where rows and tile, or dots and codes, were
    int s_half;     // F16 [16][n_mma], weights of tokens, then of rows
    int s_codes;    // I8 [n_rows][4*ld_codes]
    int s_scales;   // F32 [n_rows][d/32]
    int s_terms;    // F32 [n_vec][n_pad], pca, where the codes were, or for tensor cores [n_mma][ld_terms], products with rows, then that
    int s_k_rows;   // F16 [n_mma][d_k + 8], tensor cores, then [n_mma][ld_dots]
    int s_make;     // F32 [CAPSULE_N_MAKE][ld_make], where dots and codes will be
    int s_make_red; // F32 [CAPSULE_N_MAKE][LANES]
    int s_v_codes;  // I8 [n_vec][4*ld_codes], kept from slot to slot
    int s_v_half;   // F16 [n_vec][d_k + 8], pca on tensor cores, in the same place
    int s_v_scales; // F32 [n_vec][d_k/32]
    int s_v_mean;   // F32 [n_vec], pca
    int s_o;     // F32 [n_o][max_q][d_v], or for tensor cores [16][d_v]
    int s_red;   // F32 [2][max_q][LANES], maxima and sums
    int s_m;     // F32 [3][max_q], m, m and l
    int s_flags; // I32 [3][CAPSULE_N_FLAGS]
    int s_x;     // F32 [n_chunk][ld_tile], encode, errors: tokens
    int s_kept;  // F32 [n_kept][ld_rows], encode, retain; then s_z: [n_chunk_r][n_mlp]
    int s_amax;  // F32 [n_chunk_r*d/64], encode, where the tokens were
    int s_best;  // I32 [n_chunk_r*d/64][CAPSULE_N_FACTORS*2][4]
    int s_size;
    int ld_rows;
    int ld_tile;
    int ld_z;
    int ld_u;
    int ld_up;   // of mlp_up_h: n_neighbours*n_mlp, rounded up to a multiple of 16
    int ld_codes; // in words
    int ld_make;
    int ld_w;
    int ld_half;
    int ld_dots;
    int ld_terms;
    int n_o;     // accumulators: 2 if there are both plain and rotated rows of values
    int n_rot_o; // size of the Hadamard transform that takes the last accumulator back, 0: none
};

struct capsule_ptrs {
    CAPSULE_GLOBAL const char * q;
    CAPSULE_GLOBAL const char * k;
    CAPSULE_GLOBAL const char * v;
    CAPSULE_GLOBAL const char * mask;
    CAPSULE_GLOBAL const char * cold;
    CAPSULE_GLOBAL const char * blob0;
    CAPSULE_GLOBAL const char * blob1;
    CAPSULE_GLOBAL const float * weights;
    CAPSULE_GLOBAL const float * rope;
    CAPSULE_GLOBAL char * dst;
};

#if !defined(__METAL_VERSION__)
struct ggml_tensor;

// of a node of GGML_OP_CAPSULE: args.s_size bytes of shared memory at most, if that is possible; for the vectors of many queries most_shared; mma: args.mma, if that is possible
GGML_API void ggml_capsule_args_init(const ggml_tensor * op, size_t max_shared, size_t most_shared, bool mma, capsule_args & args, capsule_ptrs & ptrs);

#define CAPSULE_SHARED_DEFAULT (48*1024) // every CUDA device has it

// enum ggml_capsule_op
GGML_API int ggml_capsule_op_of(const ggml_tensor * op);

// the sources in the order of capsule_ptrs, NULL for those that are not there; the first one always is
#define CAPSULE_N_SOURCES 9
GGML_API const ggml_tensor * ggml_capsule_source(const ggml_tensor * op, int i);

#endif

#define CAPSULE_ARGS CAPSULE_PARAM const capsule_args & a
#define CAPSULE_SM_F(offs) ((CAPSULE_SHARED float *) (sm + (offs)))
#define CAPSULE_SM_T(offs) ((CAPSULE_SHARED T *) (sm + (offs)))
#define CAPSULE_SM_U(offs) ((CAPSULE_SHARED U *) (sm + (offs)))

//
// values
//

struct alignas(16) capsule_vec4 {
    float x[4];
};

CAPSULE_FN capsule_vec4 capsule_load4(CAPSULE_GLOBAL const float * src) {
#if defined(__METAL_VERSION__)
    capsule_vec4 res;
    for (int i = 0; i < 4; ++i) {
        res.x[i] = src[i];
    }
    return res;
#else
    return *(const capsule_vec4 *) src;
#endif
}

CAPSULE_FN int capsule_min(int x, int y) {
    return x < y ? x : y;
}

CAPSULE_FN float capsule_abs(float x) {
    return x < 0.0f ? -x : x;
}

// Abramowitz and Stegun 7.1.26, absolute error below 2e-7; not every backend has erf
CAPSULE_FN float capsule_erf(float x) {
    const float y = x < 0.0f ? -x : x;
    const float u = 1.0f/(1.0f + 0.3275911f*y);
    const float r = 1.0f - ((((1.061405429f*u - 1.453152027f)*u + 1.421413741f)*u - 0.284496736f)*u + 0.254829592f)*u*CAPSULE_EXP(-y*y);

    return x < 0.0f ? -r : r;
}

// value c of a row
CAPSULE_FN float capsule_value(int type, CAPSULE_GLOBAL const char * row, int c) {
    if (type == CAPSULE_F32) {
        return ((CAPSULE_GLOBAL const float *) row)[c];
    }
    if (type == CAPSULE_F16) {
        return capsule_float(((CAPSULE_GLOBAL const capsule_half *) row)[c]);
    }

    const bool q2 = type == CAPSULE_Q2_0;

    CAPSULE_GLOBAL const char    * block = row + (q2 ? c/64 : c/32)*(type == CAPSULE_Q8_0 ? 34 : 18);
    CAPSULE_GLOBAL const uint8_t * qs    = (CAPSULE_GLOBAL const uint8_t *) (block + 2);

    const float d = capsule_float(*(CAPSULE_GLOBAL const capsule_half *) block);

    if (type == CAPSULE_Q8_0) {
        return d*(float) (int8_t) qs[c % 32];
    }
    if (type == CAPSULE_Q4_0) {
        const int j = c % 32;
        return d*(float) ((j < 16 ? qs[j] & 15 : qs[j - 16] >> 4) - 8);
    }
    const int j = c % 64;
    return d*(float) (((qs[j/4] >> 2*(j % 4)) & 3) - 1);
}

// value i of a row of a mask, CAPSULE_NEG for -INFINITY
CAPSULE_FN float capsule_mask(int type, CAPSULE_GLOBAL const char * row, int i) {
    if (type == CAPSULE_F16) {
        const uint16_t bits = ((CAPSULE_GLOBAL const uint16_t *) row)[i];
        return bits == 0 ? 0.0f : bits == 0xfc00 ? CAPSULE_NEG : capsule_float(((CAPSULE_GLOBAL const capsule_half *) row)[i]);
    }
    const uint32_t bits = ((CAPSULE_GLOBAL const uint32_t *) row)[i];
    return bits == 0xff800000u ? CAPSULE_NEG : ((CAPSULE_GLOBAL const float *) row)[i];
}

CAPSULE_FN CAPSULE_GLOBAL const char * capsule_slot(CAPSULE_ARGS, CAPSULE_GLOBAL const char * blob0, CAPSULE_GLOBAL const char * blob1, int i_slot) {
    return i_slot < a.tiers[0].n_slots ?
        blob0 + (int64_t) i_slot*a.tiers[0].slot_size :
        blob1 + (int64_t) (i_slot - a.tiers[0].n_slots)*a.tiers[1].slot_size;
}

CAPSULE_FN int capsule_tier_of(CAPSULE_ARGS, int i_slot) {
    return i_slot < a.tiers[0].n_slots ? 0 : 1;
}

//
// Hadamard transform of rows of d values: a pass per 4 steps, normalised
//

// 1 << bits values with a distance of h
template <int bits, typename T>
CAPSULE_FN void capsule_butterfly(CAPSULE_SHARED T * x, int h) {
    float y[1 << bits];

    CAPSULE_UNROLL
    for (int i = 0; i < 1 << bits; ++i) {
        y[i] = capsule_float(x[i*h]);
    }

    float norm = 1.0f;

    CAPSULE_UNROLL
    for (int b = 0; b < bits; ++b) {
        norm *= 0.70710678118654752f;

        CAPSULE_UNROLL
        for (int i = 0; i < 1 << bits; ++i) {
            const int j = i | 1 << b;
            if (j != i) {
                const float u = y[i];
                const float v = y[j];
                y[i] = u + v;
                y[j] = u - v;
            }
        }
    }

    CAPSULE_UNROLL
    for (int i = 0; i < 1 << bits; ++i) {
        capsule_put(x[i*h], norm*y[i]);
    }
}

template <int bits, typename T>
CAPSULE_FN void capsule_hadamard_rows(int tid, int nt, CAPSULE_SHARED T * x, int n_rows, int d, int ld, int h) {
    const int n = d >> bits; // groups of a row

    for (int r = tid/CAPSULE_LANES; r < n_rows; r += nt/CAPSULE_LANES) {
        for (int g = tid % CAPSULE_LANES; g < n; g += CAPSULE_LANES) {
            capsule_butterfly<bits, T>(x + r*ld + (g & ~(h - 1))*(1 << bits) + (g & (h - 1)), h);
        }
    }
}

template <typename T>
CAPSULE_FN void capsule_hadamard_pass(int tid, int nt, CAPSULE_SHARED T * x, int n_rows, int d, int ld, int n, int h) {
    const int left = n/h;
    if (left >= 16) {
        capsule_hadamard_rows<4, T>(tid, nt, x, n_rows, d, ld, h);
    } else if (left == 8) {
        capsule_hadamard_rows<3, T>(tid, nt, x, n_rows, d, ld, h);
    } else if (left == 4) {
        capsule_hadamard_rows<2, T>(tid, nt, x, n_rows, d, ld, h);
    } else {
        capsule_hadamard_rows<1, T>(tid, nt, x, n_rows, d, ld, h);
    }
}

#define CAPSULE_HADAMARD(T_, x_, n_rows_, d_, ld_, n_) \
    for (int h_ = 1; h_ < (n_); h_ *= 16) { \
        CAPSULE_PHASE((capsule_hadamard_pass<T_>(tid, t.n, x_, n_rows_, d_, ld_, n_, h_))); \
    }
