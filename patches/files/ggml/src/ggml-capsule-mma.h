#pragma once

#include "ggml-capsule-impl.h"

//
// products of 16x16x16 tiles by a warp: tensor cores of CUDA (sm_70 and later), elsewhere the same calls in plain C++; rows of F16, sums of F32
//

#if defined(__CUDACC__) && !defined(__HIPCC__) && !defined(__MUSACC__)

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 700
#define CAPSULE_MMA
#include <mma.h>
namespace capsule_wmma = nvcuda::wmma;
#define CAPSULE_WARP_CALL(tid)
#endif

#elif !defined(__METAL_VERSION__)

#define CAPSULE_MMA
// the first thread of a warp computes for all of them
#define CAPSULE_WARP_CALL(tid) if ((tid) % CAPSULE_LANES != 0) { return; }

namespace capsule_wmma {
    struct matrix_a {};
    struct matrix_b {};
    struct accumulator {};
    struct row_major {};
    struct col_major {};

    enum layout_t { mem_row_major };

    template <typename Use, int m, int n, int k, typename T, typename Layout = void>
    struct fragment {
        float x[16*16];
    };

    template <typename Frag>
    static inline void fill_fragment(Frag & f, float x) {
        for (float & y : f.x) {
            y = x;
        }
    }

    template <typename Frag, typename T>
    static inline void load_matrix_sync(Frag & f, const T * src, unsigned ld) {
        for (int i = 0; i < 16*16; ++i) {
            f.x[i] = capsule_float(src[i/16*ld + i%16]);
        }
    }

    static inline void load_matrix_sync(fragment<matrix_b, 16, 16, 16, capsule_half, col_major> & f, const capsule_half * src, unsigned ld) {
        for (int i = 0; i < 16*16; ++i) {
            f.x[i] = capsule_float(src[i%16*ld + i/16]);
        }
    }

    template <typename Frag>
    static inline void load_matrix_sync(Frag & f, const float * src, unsigned ld, layout_t) {
        load_matrix_sync(f, src, ld);
    }

    template <typename D, typename A, typename B, typename C>
    static inline void mma_sync(D & d, const A & a, const B & b, const C & c) {
        for (int i = 0; i < 16; ++i) {
            for (int j = 0; j < 16; ++j) {
                float sum = c.x[i*16 + j];
                for (int k = 0; k < 16; ++k) {
                    sum += a.x[i*16 + k]*b.x[k*16 + j];
                }
                d.x[i*16 + j] = sum;
            }
        }
    }

    template <typename Frag>
    static inline void store_matrix_sync(float * dst, const Frag & f, unsigned ld, layout_t) {
        for (int i = 0; i < 16*16; ++i) {
            dst[i/16*ld + i%16] = f.x[i];
        }
    }
}

#endif

#if defined(CAPSULE_MMA)

template <bool trans>
struct capsule_mma_b {
    typedef capsule_wmma::fragment<capsule_wmma::matrix_b, 16, 16, 16, capsule_half, capsule_wmma::row_major> fragment;
};

template <>
struct capsule_mma_b<true> {
    typedef capsule_wmma::fragment<capsule_wmma::matrix_b, 16, 16, 16, capsule_half, capsule_wmma::col_major> fragment;
};

// c [n_i][n_j] = (or +=) a [n_i][n_k]*b [n_k][n_j] (trans: b [n_j][n_k]), all of them multiples of 16: a warp takes a tile of c
template <bool trans = false>
CAPSULE_FN void capsule_mma(int tid, int nt, int n_i, int n_j, int n_k, const capsule_half * a, int ld_a, const capsule_half * b, int ld_b, float * c, int ld_c,
        bool add = false) {
    CAPSULE_WARP_CALL(tid);

    for (int u = tid/CAPSULE_LANES; u < n_i/16*(n_j/16); u += nt/CAPSULE_LANES) {
        const int i = u/(n_j/16)*16;
        const int j = u%(n_j/16)*16;

        capsule_wmma::fragment<capsule_wmma::accumulator, 16, 16, 16, float> sum;
        if (add) {
            capsule_wmma::load_matrix_sync(sum, c + i*ld_c + j, ld_c, capsule_wmma::mem_row_major);
        } else {
            capsule_wmma::fill_fragment(sum, 0.0f);
        }

        for (int k = 0; k < n_k; k += 16) {
            capsule_wmma::fragment<capsule_wmma::matrix_a, 16, 16, 16, capsule_half, capsule_wmma::row_major> x;
            typename capsule_mma_b<trans>::fragment y;

            capsule_wmma::load_matrix_sync(x, a + i*ld_a + k, ld_a);
            capsule_wmma::load_matrix_sync(y, trans ? b + j*ld_b + k : b + k*ld_b + j, ld_b);
            capsule_wmma::mma_sync(sum, x, y, sum);
        }
        capsule_wmma::store_matrix_sync(c + i*ld_c + j, sum, ld_c, capsule_wmma::mem_row_major);
    }
}

#endif
