#pragma once

#include "llama-capsule-rows.h"

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <vector>

//
// the inner loops of the CPU paths, in plain C++ and for AVX2, AVX-512 and NEON, chosen at run time: libllama itself is built for the baseline
//   all lengths d and n are multiples of LLAMA_CAPSULE_VEC, rows are padded with zeros
//

static constexpr uint32_t LLAMA_CAPSULE_VEC = 8;

// the blocks of ggml-common.h
static constexpr uint32_t QK  = 32; // q8_0, q4_0
static constexpr uint32_t QK2 = 64; // q2_0

static constexpr size_t Q8_SIZE = 2 + QK;
static constexpr size_t Q4_SIZE = 2 + QK/2;
static constexpr size_t Q2_SIZE = 2 + QK2/4;

// memory for vectors: aligned to cache lines, grows only, the contents are lost when it does
template<typename T>
class llama_capsule_buf {
public:
    T * resize(size_t n) {
        if (n > size) {
            ptr.reset((T *) ::operator new(n*sizeof(T), std::align_val_t(64)));
            size = n;
        }
        return ptr.get();
    }

    T * data() const {
        return ptr.get();
    }

private:
    struct deleter {
        void operator()(T * p) const {
            ::operator delete(p, std::align_val_t(64));
        }
    };

    std::unique_ptr<T, deleter> ptr;

    size_t size = 0;
};

// rows of a list that enter a product as integers
struct llama_capsule_int_rows {
    const uint8_t * q4; // rows of type q4_0
    const uint8_t * q2; // rows of type q2_0

    uint32_t n_q4;
    uint32_t n_q2;
};

static constexpr size_t LLAMA_CAPSULE_AHEAD = 512; // bytes of a list of rows that are fetched before they are read: more would take the place of the queries

// some lines of memory are read soon
static inline void llama_capsule_fetch(const uint8_t * p, size_t n) {
#ifdef __GNUC__
    for (size_t i = 0; i < n; i += 64) {
        __builtin_prefetch(p + i);
    }
#else
    GGML_UNUSED(p);
    GGML_UNUSED(n);
#endif
}

// queries in 8 bits, for rows that are read as they are stored, of n_slots slots at a time, a slot in each lane of a vector. If there are more lanes, they take n_rows rows.
//   Groups of n_rows rows of a type: vectors of queries, one for each row, and the tokens whose scores the products are part of
struct llama_capsule_score {
    static constexpr uint32_t MAX = 32; // products of a group at a time

    uint32_t d; // 64, 128 or 256
    uint32_t n_q;

    const uint32_t * first;   // [n_groups + 1], the vectors of a group
    const uint32_t * tokens;  // [n_vectors][n_rows]
    const uint8_t  * queries; // [n_vectors][n_q][query_size()], those of a group as to_lanes writes them
    size_t           ld_out;  // from one query to the next

    static constexpr uint32_t n_slots(uint32_t n_lanes) {
        return n_lanes < LLAMA_CAPSULE_VEC ? n_lanes : LLAMA_CAPSULE_VEC;
    }

    static constexpr uint32_t n_rows(uint32_t n_lanes) {
        return n_lanes/n_slots(n_lanes);
    }

    static size_t query_size(uint32_t d, uint32_t n_rows) {
        return n_rows*(d + d/QK*(sizeof(int32_t) + sizeof(float)));
    }
};

// x times its gates, or x alone, and where it goes: row p of vector j of the n of a group
struct llama_capsule_lane {
    const float * x;
    const float * gates;

    uint8_t * queries; // of the group
    uint32_t  n;
    uint32_t  j;
    uint32_t  p;
};

// a lane, Hadamard-rotated, in 8 bits
struct llama_capsule_codes {
    static constexpr uint32_t MAX = 8; // at a time

    int8_t  codes[256];    // [d], for rows of 2 bits in the order in which their codes come out
    int32_t sums [256/QK]; // [d/QK2] for rows of 2 bits, [d/QK] for others; AVX2: less than 0, two of 16 bits, of every other pair of codes
    float   scales[256/QK]; // as many
};

// a query as a base view sees it, see llama_capsule_views
struct llama_capsule_view {
    uint32_t d;     // 64, 128, 192 or 256
    uint32_t n_rot; // a multiple of 16
    bool     norm;

    const float * turn;  // [n_rot] as in rope()
    float         still; // factor of the other channels
    const float * mean;  // [d] of the keys
};

// what becomes scores of tokens: products of rows and queries
struct llama_capsule_project {
    const int16_t * basis; // [n_rows/2, rounded up][n_out][2]
    float           scale; // what 1 stands for in it

    uint32_t n_rows; // up to 256
    uint32_t n_out;  // tokens, padded
};

struct llama_capsule_simd {
    const char * name;

    // out[t][i] = init[i] + sum_r w[r*w_r + t*w_t] x[r][i]; without init it adds to out
    void (*mul)(uint32_t n_out, uint32_t n_rows, uint32_t d, const float * w, size_t w_r, size_t w_t, const float * x, size_t ld_x,
            const float * init, float * out, size_t ld_out);

    // out[q][j] = sum_i x[j][i] y[q][i]
    void (*dot)(uint32_t n_x, uint32_t n_y, uint32_t d, const float * x, size_t ld_x, const float * y, size_t ld_y, float * out, size_t ld_out);

    // y += a*b
    void (*fma)(uint32_t d, const float * a, const float * b, float * y);

    // y *= f
    void (*scale)(uint32_t d, float f, float * y);

    // rotates the first n_rot values of each row by its angles: (cos, sin) pairs for neighbours (norm), or all cos, then all sin, for halves
    void (*rope)(uint32_t n, float * x, size_t ld_x, const float * cs, size_t ld_cs, uint32_t n_rot, bool norm);

    // s += mask, returns the maximum, or NaN if there is one
    float (*add_max)(float * s, const float * mask, uint32_t n);

    // s = exp(s - max), returns the sum
    float (*exp_sum)(float * s, float max, uint32_t n);

    void (*hadamard)(float * x, uint32_t n, size_t n_values);

    // without undoing the Hadamard rotation
    void (*to_float)(ggml_type type, const void * src, float * dst, uint32_t d);

    // out[t][i] += sum_r basis[r][t] rows[r][i] in integers, see llama_capsule_int_basis; nullptr if there is no such kernel
    void (*mul_int)(uint32_t n_out, uint32_t d, const int16_t * basis, const float * basis_max, const llama_capsule_int_rows & rows,
            float * out, size_t ld_out);

    // the next four are 0 together
    uint32_t n_lanes;

    // lanes as rows of this type meet them; those of a group: for each block of codes that share a scale, n times what the codes of 0 add up to, 4 codes at a time
    //   and the scale, one of each row
    void (*to_lanes)(ggml_type type, uint32_t d, uint32_t n, const llama_capsule_lane * lanes);

    // out[i/n_slots][q][token][i%n_slots] += <row, query>, for all rows and the vectors of their groups, which are those from g0 on, in each of n_src lists of n_rows rows
    //   of type q8_0, q4_0 or q2_0; fetches what lies LLAMA_CAPSULE_AHEAD
    void (*score_rows)(const llama_capsule_score & s, ggml_type type, uint32_t g0, uint32_t n_rows, uint32_t n_src, const uint8_t * const * src, float * out);

    // out[i][t] = x[t][i] of n_slots slots
    void (*to_slots)(uint32_t n, const float * x, float * const * out);

    // out[q][i] += sum_r w[q][r] rows[r][i], rows of type q4_0 or q2_0 without undoing the Hadamard rotation; nullptr if there is no such kernel
    //   next: rows that are read after them, or nullptr
    void (*mul_rows)(ggml_type type, uint32_t n_out, uint32_t n_rows, uint32_t d, const float * w, size_t ld_w, const uint8_t * src, const uint8_t * next,
            float * out, size_t ld_out);

    // a row without rotating it: byte for byte what llama_capsule_row_quantize() writes
    void (*from_float)(ggml_type type, const float * x, void * dst, uint32_t d);

    // the next two, nullptr if there is no such kernel: n_x rows of f16 or q8_0, `stride` bytes apart, read again for each two of n_y or n_out
    // out[q][j] = sum_i x[j][i] y[q][i]
    void (*dot_cells)(ggml_type type, uint32_t n_x, uint32_t n_y, uint32_t d, const uint8_t * x, size_t stride, const float * y, size_t ld_y, float * out, size_t ld_out);

    // out[q][i] += sum_r w[q][r] x[r][i]
    void (*mul_cells)(ggml_type type, uint32_t n_out, uint32_t n_x, uint32_t d, const float * w, size_t ld_w, const uint8_t * x, size_t stride,
            float * out, size_t ld_out);

    // the rest is nullptr together: a view of a query in 8 bits, Hadamard-rotated, as dot_rows wants it; returns the scale
    size_t (*query_size)(uint32_t d);
    float  (*to_query)  (const llama_capsule_view & view, const float * x, void * dst, float & dot_mean);

    // out[v][r] = <rows[r], queries[v]>, rows of type q8_0, q4_0 or q2_0; up to 15 values behind those of a query are overwritten
    void (*dot_rows)(ggml_type type, uint32_t d, uint32_t n_rows, const uint8_t * src, uint32_t n_v, const void * queries, float * out, size_t ld_out);

    // out[t] = sum_v phi[v][t] (means[v*ld_s] + scales[v*ld_s] sum_r basis[r][t] x[v][r]), phi [n_v][n_out]
    void (*project)(const llama_capsule_project & p, uint32_t n_v, const float * x, size_t ld_x, const float * scales, const float * means, size_t ld_s,
            const float * phi, float * out);
};

// what this build has and the machine can run: plain C++ first, the widest last
const std::vector<llama_capsule_simd> & llama_capsule_simd_all();

// the fastest one for this family of CPUs; LLAMA_KVCAPSULE_SIMD=NAME selects another, 0 plain C++
const llama_capsule_simd & llama_capsule_simd_get();

// adds what compiler and machine have of an instruction set
void llama_capsule_simd_add_avx512 (std::vector<llama_capsule_simd> & all);
void llama_capsule_simd_add_neon   (std::vector<llama_capsule_simd> & all);
void llama_capsule_simd_add_dotprod(std::vector<llama_capsule_simd> & all);

// the tokens of a basis vector in the order of mul_int, as 16-bit fractions of its largest value
std::vector<int16_t> llama_capsule_int_basis(const float * basis, uint32_t n_rows, uint32_t N, std::vector<float> & basis_max);
