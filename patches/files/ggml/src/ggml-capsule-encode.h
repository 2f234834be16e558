#pragma once

#include "ggml-capsule-unpack.h"

//
// `pca`: the cells of a block and head -> the rows of its slot; errors: what is lost, for the guard. All sums in F32 and in a fixed order
//

struct capsule_cells {
    CAPSULE_GLOBAL const char    * data;
    CAPSULE_GLOBAL const int32_t * index;  // [N], then the slot
    CAPSULE_GLOBAL const float   * angles; // [N][n_rot]
};

CAPSULE_FN capsule_cells capsule_cells_of(CAPSULE_ARGS, capsule_ptrs p, int i_block) {
    capsule_cells res;
    res.data   = p.q;
    res.index  = (CAPSULE_GLOBAL const int32_t *) p.k + i_block*(a.N + 1);
    res.angles = (CAPSULE_GLOBAL const float   *) p.v + (int64_t) i_block*a.N*a.n_rot;
    return res;
}

CAPSULE_FN int capsule_cell(CAPSULE_ARGS, capsule_cells cells, int j) {
    return j < a.N ? cells.index[j] : -1;
}

// n_chunk tokens from first on as they are cached, zero where there is none
CAPSULE_FN void capsule_load_cells(int tid, int nt, CAPSULE_ARGS, capsule_cells cells, int d, int i_head, int first, CAPSULE_SHARED float * x) {
    for (int u = tid; u < a.n_chunk*d; u += nt) {
        const bool trans = a.is_v && a.v_trans;

        // threads side by side read what lies side by side
        const int j = trans ? u%a.n_chunk : u/d;
        const int c = trans ? u/a.n_chunk : u%d;
        const int i = capsule_cell(a, cells, first + j);

        const int64_t row = trans ? i_head*d + c : i;

        x[j*a.ld_tile + c] = i < 0 ? 0.0f : capsule_value(a.q.type, cells.data + row*a.q.nb1, trans ? i : i_head*d + c);
    }
}

// undoes RoPE, takes the mean away (if there is one): padding is the mean
CAPSULE_FN void capsule_turn_back(int tid, int nt, CAPSULE_ARGS, capsule_cells cells, CAPSULE_GLOBAL const float * mean, int d, int first, CAPSULE_SHARED float * x) {
    const int n_pairs = d/2;

    for (int u = tid; u < a.n_chunk*n_pairs; u += nt) {
        const int j  = u/n_pairs;
        const int p  = u%n_pairs;
        const int c0 = capsule_pair0(a, p);
        const int c1 = capsule_pair1(a, p);

        if (capsule_cell(a, cells, first + j) < 0) {
            continue;
        }

        CAPSULE_SHARED float * row = x + j*a.ld_tile;

        float x0 = row[c0];
        float x1 = row[c1];
        if (p < a.n_rot/2) {
            // (cos, sin) lie where the channels do
            CAPSULE_GLOBAL const float * angles = cells.angles + (first + j)*a.n_rot;

            const float y0 = x0*angles[c0] - x1*angles[c1];
            x1 = x0*angles[c1] + x1*angles[c0];
            x0 = y0;
        }
        row[c0] = mean ? x0 - mean[c0] : x0;
        row[c1] = mean ? x1 - mean[c1] : x1;
    }
}

// n_chunk tokens from first on, as they were before RoPE and the rotation of the cache
CAPSULE_FN void capsule_tokens(capsule_threads t, CAPSULE_ARGS, capsule_cells cells, CAPSULE_GLOBAL const float * mean, int d, int i_head, int first, CAPSULE_SHARED float * x) {
    CAPSULE_PHASE((capsule_load_cells(tid, t.n, a, cells, d, i_head, first, x)));
    CAPSULE_HADAMARD(float, x, a.n_chunk, d, a.ld_tile, a.is_v ? a.rot_v : a.rot_k);
    CAPSULE_PHASE((capsule_turn_back(tid, t.n, a, cells, mean, d, first, x)));
}

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

// rows [r0, r0 + n) of the list that are not Q2_0 -> the slot
CAPSULE_FN void capsule_store_rows(int tid, int nt, CAPSULE_ARGS, CAPSULE_PARAM const capsule_part & part, int d, int r0, int n, CAPSULE_SHARED const float * rows,
        CAPSULE_GLOBAL char * head) {
    int first = 0; // of the type

    for (int type = CAPSULE_F32; type < CAPSULE_Q2_0; ++type) {
        const int begin = first > r0 ? first : r0;
        const int count = capsule_min(first + part.count[type], r0 + n) - begin;
        const bool plain = type == CAPSULE_F32 || type == CAPSULE_F16;

        for (int u = tid; u < count*(plain ? d : d/32); u += nt) {
            const int r = plain ? u/d : u%count;
            const int c = plain ? u%d : u/count;

            CAPSULE_SHARED const float * x   = rows + (begin - r0 + r)*a.ld_rows;
            CAPSULE_GLOBAL char        * dst = head + part.type_offs[type] + (begin - first + r)*part.row_size[type];

            if (type == CAPSULE_F32) {
                ((CAPSULE_GLOBAL float *) dst)[c] = x[c];
            } else if (type == CAPSULE_F16) {
                capsule_put(((CAPSULE_GLOBAL capsule_half *) dst)[c], x[c]);
            } else {
                capsule_quantize<float>(type, x + 32*c, dst + c*(type == CAPSULE_Q8_0 ? 34 : 18));
            }
        }
        first += part.count[type];
    }
}

//
// Q2_0: the search of docs/codec.md, all candidates of all blocks at once; block u: the values from u/n_rows*64 on in row u%n_rows
//

CAPSULE_FN void capsule_q2_0_amax(int tid, int nt, CAPSULE_ARGS, int n_rows, int d, CAPSULE_SHARED const float * rows, CAPSULE_SHARED float * amax) {
    for (int u = tid; u < n_rows*(d/64); u += nt) {
        CAPSULE_SHARED const float * x = rows + u%n_rows*a.ld_rows + u/n_rows*64;

        float res = 0.0f;
        for (int c = 0; c < 64; ++c) {
            const float y = capsule_abs(x[c]);
            res = y > res ? y : res;
        }
        amax[u] = res;
    }
}

// values -> integers of 16 bits, as floats
CAPSULE_FN void capsule_q2_0_scale(int tid, int nt, CAPSULE_ARGS, int n_rows, int d, CAPSULE_SHARED const float * amax, CAPSULE_SHARED float * rows) {
    for (int i = tid; i < n_rows*d; i += nt) {
        const int   r = i/d;
        const int   c = i%d;
        const float m = amax[c/64*n_rows + r];

        CAPSULE_SHARED float & x = rows[r*a.ld_rows + c];

        x = m >= 9.5367431640625e-7f ? CAPSULE_RINT(x*CAPSULE_DIV(32768.0f, m)) : 0.0f;
    }
}

CAPSULE_FN int capsule_q2_0_code(int z, int num, int den) {
    const int twice = 2*den*z;

    return (twice >= num) + (twice >= 3*num) - (twice < -num);
}

// is xc^2/cc, the squared error that is removed, larger?
CAPSULE_FN bool capsule_q2_0_better(int xc, int cc, int best_xc, int best_cc) {
    return (int64_t) xc*xc*best_cc > (int64_t) best_xc*best_xc*cc;
}

// the better round of each factor and sign: xc, cc and the scale num/den that its codes are for
CAPSULE_FN void capsule_q2_0_search(int tid, int nt, CAPSULE_ARGS, int n_rows, int d, CAPSULE_SHARED const float * rows, CAPSULE_SHARED int32_t * best) {
    const int n_blocks = n_rows*(d/64);

    for (int i = tid; i < n_blocks*CAPSULE_N_FACTORS*2; i += nt) {
        const int u = i%n_blocks;
        const int k = i/n_blocks;

        CAPSULE_SHARED const float * y   = rows + u%n_rows*a.ld_rows + u/n_rows*64;
        CAPSULE_SHARED int32_t     * out = best + (u*CAPSULE_N_FACTORS*2 + k)*4;

        // 10, 12, 15, 18, 23, 32
        const int factor = (int) ((k < 8 ? 0x120f0c0au : 0x2017u) >> k%8/2*8 & 255u);
        const int sign   = k%2 == 0 ? 1 : -1;

        int num = 1024*factor;
        int den = 1;

        int best_xc  = 0;
        int best_cc  = 1;
        int best_num = num;
        int best_den = den;

        for (int round = 0; round < 2; ++round) {
            int xc = 0;
            int cc = 0;
            for (int c = 0; c < 64; ++c) {
                const int z    = sign*(int) y[c];
                const int code = capsule_q2_0_code(z, num, den);

                xc += z*code;
                cc += code*code;
            }
            if (cc == 0) {
                break;
            }
            if (capsule_q2_0_better(xc, cc, best_xc, best_cc)) {
                best_xc  = xc;
                best_cc  = cc;
                best_num = num;
                best_den = den;
            }
            num = xc;
            den = cc;
        }
        out[0] = best_xc;
        out[1] = best_cc;
        out[2] = best_num;
        out[3] = best_den;
    }
}

// a thread per byte of codes, the first of a block writes its scale
CAPSULE_FN void capsule_q2_0_store(int tid, int nt, CAPSULE_ARGS, int n_rows, int d, CAPSULE_SHARED const float * rows, CAPSULE_SHARED const float * amax,
        CAPSULE_SHARED const int32_t * best, CAPSULE_GLOBAL char * dst, int row_size) {
    for (int i = tid; i < n_rows*(d/4); i += nt) {
        const int u = i/16;
        const int b = i%16;

        CAPSULE_SHARED const float   * y     = rows + u%n_rows*a.ld_rows + u/n_rows*64;
        CAPSULE_SHARED const int32_t * list  = best + u*CAPSULE_N_FACTORS*2*4;
        CAPSULE_GLOBAL char          * block = dst + u%n_rows*row_size + u/n_rows*18;

        int k = 0; // ties keep the first
        for (int m = 1; m < CAPSULE_N_FACTORS*2; ++m) {
            if (capsule_q2_0_better(list[4*m], list[4*m + 1], list[4*k], list[4*k + 1])) {
                k = m;
            }
        }
        const int sign = k%2 == 0 ? 1 : -1;

        if (b == 0) {
            const float scale = CAPSULE_DIV((float) list[4*k], (float) list[4*k + 1])*(amax[u]*3.0517578125e-5f);

            capsule_put(*(CAPSULE_GLOBAL capsule_half *) block, (float) sign*(scale < 65504.0f ? scale : 65504.0f));
        }

        int codes = 0;
        for (int c = 0; c < 4; ++c) {
            codes |= (capsule_q2_0_code(sign*(int) y[4*b + c], list[4*k + 2], list[4*k + 3]) + 1) << 2*c;
        }
        ((CAPSULE_GLOBAL uint8_t *) block)[2 + b] = (uint8_t) codes;
    }
}

// item: block*n_head_kv + head
CAPSULE_FN void capsule_encode(capsule_threads t, CAPSULE_ARGS, capsule_ptrs p, CAPSULE_SHARED char * sm, int item) {
    CAPSULE_PARAM const capsule_tier & tier = a.tiers[a.i_tier];
    CAPSULE_PARAM const capsule_part & part = a.is_v ? tier.v : tier.k;

    const int i_head = item%a.n_head_kv;
    const int d      = a.is_v ? a.d_v : a.d_k;

    const capsule_cells cells = capsule_cells_of(a, p, item/a.n_head_kv);

    CAPSULE_GLOBAL const float * mean  = p.weights + (a.is_v ? a.w_v_mean  : a.w_k_mean) + i_head*d;
    CAPSULE_GLOBAL const float * basis = p.weights + (a.is_v ? a.w_v_basis : a.w_k_basis);
    CAPSULE_GLOBAL char        * head  = p.dst + (int64_t) cells.index[a.N]*tier.slot_size + part.offs + i_head*part.head_stride;

    CAPSULE_SHARED float   * x    = CAPSULE_SM_F(a.s_x);
    CAPSULE_SHARED float   * rows = CAPSULE_SM_F(a.s_rows);
    CAPSULE_SHARED float   * amax = CAPSULE_SM_F(a.s_amax);
    CAPSULE_SHARED int32_t * best = (CAPSULE_SHARED int32_t *) (sm + a.s_best);

    const int first_q2 = part.n_rows - part.count[CAPSULE_Q2_0];

    for (int r0 = 0; r0 < part.n_rows; r0 += a.n_chunk_r) {
        const int n = capsule_min(a.n_chunk_r, part.n_rows - r0);

        for (int first = 0; first < a.N; first += a.n_chunk) {
            capsule_tokens(t, a, cells, mean, d, i_head, first, x);
            CAPSULE_PHASE((capsule_project(tid, t.n, a, basis, d, r0, n, first, x, rows)));
        }

        const int n_plain = r0 < part.n_plain ? capsule_min(n, part.n_plain - r0) : 0;
        if (n_plain < n) {
            CAPSULE_HADAMARD(float, rows + n_plain*a.ld_rows, n - n_plain, d, a.ld_rows, d & -d);
        }

        CAPSULE_PHASE((capsule_store_rows(tid, t.n, a, part, d, r0, n, rows, head)));

        const int r2 = first_q2 > r0 ? first_q2 : r0;
        const int n2 = r0 + n - r2;
        if (n2 > 0) {
            CAPSULE_SHARED float * rows2 = rows + (r2 - r0)*a.ld_rows;

            CAPSULE_PHASE((capsule_q2_0_amax  (tid, t.n, a, n2, d, rows2, amax)));
            CAPSULE_PHASE((capsule_q2_0_scale (tid, t.n, a, n2, d, amax, rows2)));
            CAPSULE_PHASE((capsule_q2_0_search(tid, t.n, a, n2, d, rows2, best)));
            CAPSULE_PHASE((capsule_q2_0_store (tid, t.n, a, n2, d, rows2, amax, best,
                            head + part.type_offs[CAPSULE_Q2_0] + (r2 - first_q2)*part.row_size[CAPSULE_Q2_0], part.row_size[CAPSULE_Q2_0])));
        }
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
CAPSULE_FN void capsule_put_errors(int tid, int nt, CAPSULE_ARGS, capsule_cells cells, int first, int n, bool q4, CAPSULE_SHARED const float * red, CAPSULE_GLOBAL float * dst) {
    for (int j = tid; j < n; j += nt) {
        float sum_x = 0.0f;
        float sum_e = 0.0f;
        for (int i = 0; i < CAPSULE_LANES; ++i) {
            sum_x += red[j*CAPSULE_LANES + i];
            sum_e += red[(a.n_chunk + j)*CAPSULE_LANES + i];
        }

        const bool there = capsule_cell(a, cells, first + j) >= 0;
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
    CAPSULE_PARAM const capsule_tier & tier = a.tiers[a.i_tier];
    CAPSULE_PARAM const capsule_part & part = a.is_v ? tier.v : tier.k;

    const int i_head = item%a.n_head_kv;
    const int d      = a.is_v ? a.d_v : a.d_k;

    const capsule_cells cells = capsule_cells_of(a, p, item/a.n_head_kv);

    CAPSULE_GLOBAL const float * mean    = p.weights + (a.is_v ? a.w_v_mean    : a.w_k_mean) + i_head*d;
    CAPSULE_GLOBAL const float * basis   = p.weights + (a.is_v ? a.w_v_basis   : a.w_k_basis);
    CAPSULE_GLOBAL const float * basis_h = p.weights + (a.is_v ? a.w_v_basis_h : a.w_k_basis_h);
    CAPSULE_GLOBAL const float * weight  = a.is_v ? 0 : p.weights + a.w_query_weight + i_head*d;
    CAPSULE_GLOBAL float       * dst     = (CAPSULE_GLOBAL float *) p.dst + (int64_t) item*a.N*3;

    CAPSULE_SHARED float * rows = CAPSULE_SM_F(a.s_rows);
    CAPSULE_SHARED float * tile = CAPSULE_SM_F(a.s_tile);
    CAPSULE_SHARED float * x    = CAPSULE_SM_F(a.s_x);
    CAPSULE_SHARED float * red  = CAPSULE_SM_F(a.s_red);

    // keys as they were before RoPE
    capsule_rope rope;
    rope.first     = 0;
    rope.distances = 0;

    capsule_rows<float>(t, a, part, p.blob0 + (int64_t) cells.index[a.N]*tier.slot_size, i_head, d, rows);

    for (int first = 0; first < a.N; first += a.n_chunk) {
        const int n = capsule_min(a.n_chunk, a.N - first);

        capsule_tokens(t, a, cells, 0, d, i_head, first, x);
        capsule_tile<float, float>(t, a, mean, basis, basis_h, part.n_rows, d, rope, first, n, rows, tile);

        CAPSULE_PHASE((capsule_squares(tid, t.n, a, weight, d, x, tile, red)));
        CAPSULE_PHASE((capsule_put_errors(tid, t.n, a, cells, first, n, false, red, dst + 3*first)));

        CAPSULE_HADAMARD(float, x, a.n_chunk, d, a.ld_tile, d & -d);
        CAPSULE_PHASE((capsule_q4_0_errors(tid, t.n, a, d, x)));
        // the rotation keeps lengths, but not weights
        if (weight) {
            CAPSULE_HADAMARD(float, x, a.n_chunk, d, a.ld_tile, d & -d);
        }
        CAPSULE_PHASE((capsule_squares(tid, t.n, a, weight, d, x, 0, red)));
        CAPSULE_PHASE((capsule_put_errors(tid, t.n, a, cells, first, n, true, red, dst + 3*first)));
    }
}
