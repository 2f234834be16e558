#pragma once

#include "ggml-capsule-cells.h"
#include "ggml-capsule-put.h"

//
// the cells of a block and head -> the rows of its slot; errors: what is lost, for the guard. All sums in F32 and in a fixed order
//

// rows += basis*x: n rows from r0 on, n_chunk tokens from first on; the basis is zero behind N
CAPSULE_FN void capsule_project(int tid, int nt, CAPSULE_ARGS, CAPSULE_GLOBAL const float * basis, int d, int r0, int n, int first, CAPSULE_SHARED const float * x,
        CAPSULE_SHARED float * rows) {
    for (int u = tid; u < (n + 7)/8*d; u += nt) {
        const int r = u/d*8;
        const int c = u%d;

        CAPSULE_SHARED float * dst = rows + r*a.ld_rows + c;

        float sum[8];

        CAPSULE_UNROLL
        for (int k = 0; k < 8; ++k) {
            sum[k] = first > 0 && r + k < n ? dst[k*a.ld_rows] : 0.0f;
        }

        for (int j = 0; j < a.n_chunk && first + j < a.N; j += 4) {
            float y[4];

            CAPSULE_UNROLL
            for (int i = 0; i < 4; ++i) {
                y[i] = x[(j + i)*a.ld_tile + c];
            }

            CAPSULE_UNROLL
            for (int k = 0; k < 8; ++k) {
                const capsule_vec4 w = capsule_load4(basis + (r0 + capsule_min(r + k, n - 1))*a.n_pad + first + j);

                CAPSULE_UNROLL
                for (int i = 0; i < 4; ++i) {
                    sum[k] += w.x[i]*y[i];
                }
            }
        }

        CAPSULE_UNROLL
        for (int k = 0; k < 8; ++k) {
            if (r + k < n) {
                dst[k*a.ld_rows] = sum[k];
            }
        }
    }
}

CAPSULE_FN void capsule_encode_pca(capsule_threads t, CAPSULE_ARGS, capsule_block b, CAPSULE_GLOBAL char * head, CAPSULE_SHARED char * sm) {
    CAPSULE_PARAM const capsule_part & part = *b.part;

    CAPSULE_SHARED float * x    = CAPSULE_SM_F(a.s_x);
    CAPSULE_SHARED float * rows = CAPSULE_SM_F(a.s_rows);

    b.less = b.mean; // a token that is not there is the mean

    for (int r0 = 0; r0 < part.n_rows; r0 += a.n_chunk_r) {
        const int n = capsule_min(a.n_chunk_r, part.n_rows - r0);

        for (int first = 0; first < a.N; first += a.n_chunk) {
            capsule_tokens(t, a, b, first, a.n_chunk, x);
            CAPSULE_PHASE((capsule_project(tid, t.n, a, b.basis, b.d, r0, n, first, x, rows)));
        }
        capsule_put_rows(t, a, part, b.d, r0, n, rows, head, sm);
    }
}

// rows -= what kept rows predict of n dropped tokens from j0 on
CAPSULE_FN void capsule_residuals(int tid, int nt, CAPSULE_ARGS, CAPSULE_GLOBAL const float * weights, int i_head, int j0, int n, CAPSULE_SHARED const float * kept,
        CAPSULE_SHARED const float * z, CAPSULE_SHARED float * rows) {
    const int n_pairs = a.d_k/2;

    for (int u = tid; u < n*n_pairs; u += nt) {
        const int r  = u/n_pairs;
        const int c0 = capsule_pair0(a, u%n_pairs);
        const int c1 = capsule_pair1(a, u%n_pairs);

        float x0 = 0.0f;
        float x1 = 0.0f;
        capsule_predict(a, weights, i_head, j0 + r, c0, c1, kept, z + r*a.n_mlp, x0, x1);

        rows[r*a.ld_rows + c0] -= x0;
        rows[r*a.ld_rows + c1] -= x1;
    }
}

CAPSULE_FN void capsule_encode_retain(capsule_threads t, CAPSULE_ARGS, capsule_block b, CAPSULE_GLOBAL const float * weights, CAPSULE_GLOBAL char * slot,
        CAPSULE_GLOBAL char * head, CAPSULE_SHARED char * sm) {
    CAPSULE_PARAM const capsule_part & part = *b.part;

    CAPSULE_SHARED float * rows = CAPSULE_SM_F(a.s_rows);
    CAPSULE_SHARED float * kept = CAPSULE_SM_F(a.s_kept);
    CAPSULE_SHARED float * z    = CAPSULE_SM_F(a.s_z);

    b.order = (CAPSULE_GLOBAL const int32_t *) weights + a.w_token_order;
    b.none  = b.mean;

    for (int r0 = 0; r0 < a.n_kept; r0 += a.n_chunk_r) {
        const int n = capsule_min(a.n_chunk_r, a.n_kept - r0);

        capsule_tokens(t, a, b, r0, n, rows);
        capsule_put_rows(t, a, part, b.d, r0, n, rows, head, sm);
    }
    if (part.n_rows == a.n_kept) {
        return;
    }

    // the residuals are those of the rows as they will be read
    CAPSULE_BARRIER_GLOBAL();
    capsule_rows<float>(t, a, b.tier->kept, slot, b.i_head, b.d, kept);

    for (int r0 = a.n_kept; r0 < part.n_rows; r0 += a.n_chunk_r) {
        const int n = capsule_min(a.n_chunk_r, part.n_rows - r0);
        const int j = r0 - a.n_kept;

        capsule_tokens(t, a, b, r0, n, rows);
        if (a.n_mlp > 0) {
            CAPSULE_PHASE((capsule_mlp<float>(tid, t.n, a, weights, b.i_head, j, n, kept, z)));
        }
        CAPSULE_PHASE((capsule_residuals(tid, t.n, a, weights, b.i_head, j, n, kept, z, rows)));
        capsule_put_rows(t, a, part, b.d, r0, n, rows, head, sm);
    }
}

// item: block*n_head_kv + head
CAPSULE_FN void capsule_encode(capsule_threads t, CAPSULE_ARGS, capsule_ptrs p, CAPSULE_SHARED char * sm, int item) {
    const capsule_block b = capsule_block_of(a, p, item);

    CAPSULE_GLOBAL char * slot = p.dst + b.slot;
    CAPSULE_GLOBAL char * head = slot + b.part->offs + b.i_head*b.part->head_stride;

    if (b.retain) {
        capsule_encode_retain(t, a, b, p.weights, slot, head, sm);
    } else {
        capsule_encode_pca(t, a, b, head, sm);
    }
}

//
// errors
//

// every thread of a token a part of its channels: the squares of x, and those of x - y (if there is one)
CAPSULE_FN void capsule_squares(int tid, int nt, CAPSULE_ARGS, CAPSULE_GLOBAL const float * weight, int d, CAPSULE_SHARED const float * x, CAPSULE_SHARED const float * y,
        CAPSULE_SHARED float * red) {
    for (int u = tid; u < a.n_chunk*CAPSULE_LANES; u += nt) {
        const int j = u/CAPSULE_LANES;

        float sum_x = 0.0f;
        float sum_e = 0.0f;
        for (int c = u%CAPSULE_LANES; c < d; c += CAPSULE_LANES) {
            const float w = weight ? weight[c] : 1.0f;
            const float z = x[j*a.ld_tile + c];
            const float e = y ? y[j*a.ld_tile + c] - z : 0.0f;

            sum_x += w*z*z;
            sum_e += w*e*e;
        }
        red[u]                             = sum_x;
        red[a.n_chunk*CAPSULE_LANES + u] = sum_e;
    }
}

// sums of n tokens -> [n][3]
CAPSULE_FN void capsule_put_errors(int tid, int nt, CAPSULE_ARGS, capsule_block b, int first, int n, bool q4, CAPSULE_SHARED const float * red, CAPSULE_GLOBAL float * dst) {
    for (int j = tid; j < n; j += nt) {
        float sum_x = 0.0f;
        float sum_e = 0.0f;
        for (int i = 0; i < CAPSULE_LANES; ++i) {
            sum_x += red[j*CAPSULE_LANES + i];
            sum_e += red[(a.n_chunk + j)*CAPSULE_LANES + i];
        }

        const bool there = capsule_cell(a, b, first + j) >= 0;
        if (q4) {
            dst[3*j + 1] = there ? sum_x : 0.0f;
        } else {
            dst[3*j + 0] = there ? sum_e : 0.0f;
            dst[3*j + 2] = there ? sum_x : 0.0f;
        }
    }
}

// values -> their errors as Q4_0
CAPSULE_FN void capsule_q4_0_errors(int tid, int nt, CAPSULE_ARGS, int d, CAPSULE_SHARED float * x) {
    for (int u = tid; u < a.n_chunk*(d/32); u += nt) {
        CAPSULE_SHARED float * y = x + u%a.n_chunk*a.ld_tile + u/a.n_chunk*32;

        const float scale   = CAPSULE_DIV(capsule_largest<float>(y), -8.0f);
        const float inverse = scale != 0.0f ? CAPSULE_DIV(1.0f, scale) : 0.0f;
        const float stored  = capsule_as_half(scale);

        for (int c = 0; c < 32; ++c) {
            y[c] -= stored*(float) (capsule_min((int) (y[c]*inverse + 8.5f), 15) - 8);
        }
    }
}

// item: block*n_head_kv + head
CAPSULE_FN void capsule_errors(capsule_threads t, CAPSULE_ARGS, capsule_ptrs p, CAPSULE_SHARED char * sm, int item) {
    const capsule_block b = capsule_block_of(a, p, item);

    CAPSULE_GLOBAL const float * weight = a.is_v ? 0 : p.weights + a.w_query_weight + b.i_head*b.d;
    CAPSULE_GLOBAL float       * dst    = (CAPSULE_GLOBAL float *) p.dst + (int64_t) item*a.N*3;

    CAPSULE_SHARED float * tile = CAPSULE_SM_F(a.s_tile);
    CAPSULE_SHARED float * x    = CAPSULE_SM_F(a.s_x);
    CAPSULE_SHARED float * red  = CAPSULE_SM_F(a.s_red);

    // keys as they are stored
    capsule_rope rope;
    rope.first     = 0;
    rope.distances = 0;

    capsule_rows_kv<float>(t, a, *b.tier, p.blob0 + b.slot, p.weights, b.i_head, sm);

    for (int first = 0; first < a.N; first += a.n_chunk) {
        const int n = capsule_min(a.n_chunk, a.N - first);

        capsule_tokens(t, a, b, first, a.n_chunk, x);
        capsule_tile_kv<float, float>(t, a, *b.tier, p.weights, rope, b.i_head, first, n, sm);

        CAPSULE_PHASE((capsule_squares(tid, t.n, a, weight, b.d, x, tile, red)));
        CAPSULE_PHASE((capsule_put_errors(tid, t.n, a, b, first, n, false, red, dst + 3*first)));

        CAPSULE_HADAMARD(float, x, a.n_chunk, b.d, a.ld_tile, b.d & -b.d);
        CAPSULE_PHASE((capsule_q4_0_errors(tid, t.n, a, b.d, x)));
        // the rotation keeps lengths, but not weights
        if (weight) {
            CAPSULE_HADAMARD(float, x, a.n_chunk, b.d, a.ld_tile, b.d & -b.d);
        }
        CAPSULE_PHASE((capsule_squares(tid, t.n, a, weight, b.d, x, 0, red)));
        CAPSULE_PHASE((capsule_put_errors(tid, t.n, a, b, first, n, true, red, dst + 3*first)));
    }
}
