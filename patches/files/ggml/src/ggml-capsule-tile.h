#pragma once

#include "ggml-capsule-mma.h"

//
// K or V of a block and head as a tile
//

// quantized rows of a head as words of 4 integers of 8 bits; a thread reads 4 bytes of a row at a time
template <typename Sink>
CAPSULE_FN void capsule_read_words(int tid, int nt, CAPSULE_PARAM const capsule_part & p, CAPSULE_GLOBAL const char * head, int d, Sink to) {
    int first = p.n_plain;

    CAPSULE_UNROLL
    for (int type = CAPSULE_Q8_0; type < CAPSULE_MAX_TYPES; ++type) {
        const int bits    = type == CAPSULE_Q8_0 ? 8 : type == CAPSULE_Q4_0 ? 4 : 2;
        const int size    = type == CAPSULE_Q2_0 ? 64 : 32; // values of a block
        const int n_block = size*bits/32;                   // words of a block, as they are stored
        const int n_words = d*bits/32;

        CAPSULE_GLOBAL const char * src = head + p.type_offs[type];

        for (int u = tid; u < p.count[type]*n_words; u += nt) {
            const int r = first + u/n_words;
            const int b = u%n_words/n_block;
            const int w = u%n_block;

            // blocks begin at multiples of 2 bytes
            CAPSULE_GLOBAL const uint16_t * block = (CAPSULE_GLOBAL const uint16_t *) (src + u/n_words*p.row_size[type]) + b*(1 + 2*n_block);

            const uint32_t x     = block[1 + 2*w] | (uint32_t) block[2 + 2*w] << 16;
            const float    scale = capsule_float(*(CAPSULE_GLOBAL const capsule_half *) block);

            if (type == CAPSULE_Q8_0) {
                capsule_sink(to, r, 8*b + w, x, scale);
            } else if (type == CAPSULE_Q4_0) {
                // less 8, in every byte
                capsule_sink(to, r, 8*b + w,     ((x      & 0x0f0f0f0fu) + 0x78787878u) ^ 0x80808080u, scale);
                capsule_sink(to, r, 8*b + w + 4, ((x >> 4 & 0x0f0f0f0fu) + 0x78787878u) ^ 0x80808080u, scale);
            } else {
                CAPSULE_UNROLL
                for (int i = 0; i < 4; ++i) {
                    const uint32_t y = x >> 8*i;
                    const uint32_t z = (y & 3) | (y & 12) << 6 | (y & 48) << 12 | (y & 192) << 18;
                    capsule_sink(to, r, 16*b + 4*w + i, (z + 0x7f7f7f7fu) ^ 0x80808080u, scale);
                }
            }
        }
        first += p.count[type];
    }
}

// -> [][ld]
template <typename T>
struct capsule_rows_sink {
    CAPSULE_SHARED T * rows;
    int                ld;
};

template <typename T>
CAPSULE_FN void capsule_sink(capsule_rows_sink<T> to, int row, int word, uint32_t codes, float scale) {
    CAPSULE_UNROLL
    for (int i = 0; i < 4; ++i) {
        capsule_put(to.rows[row*to.ld + 4*word + i], scale*(float) (int8_t) (codes >> 8*i));
    }
}

// rows of a head -> [n_rows][ld], zeros behind them up to n_fill
template <typename T>
CAPSULE_FN void capsule_load_rows(int tid, int nt, CAPSULE_PARAM const capsule_part & p, CAPSULE_GLOBAL const char * head, int d, int ld, int n_fill, CAPSULE_SHARED T * rows) {
    for (int type = CAPSULE_F32; type <= CAPSULE_F16; ++type) {
        CAPSULE_GLOBAL const char * src = head + p.type_offs[type];
        CAPSULE_SHARED T          * dst = rows + (type == CAPSULE_F32 ? 0 : p.count[CAPSULE_F32])*ld;

        for (int u = tid; u < p.count[type]*d; u += nt) {
            capsule_put(dst[u/d*ld + u%d], capsule_value(type, src + u/d*p.row_size[type], u%d));
        }
    }

    capsule_rows_sink<T> to;
    to.rows = rows;
    to.ld   = ld;

    capsule_read_words(tid, nt, p, head, d, to);

    for (int u = tid; u < (n_fill - p.n_rows)*d; u += nt) {
        capsule_put(rows[(p.n_rows + u/d)*ld + u%d], 0.0f);
    }
}

// RoPE: the angle of a token is that of the first position of the slot plus that of its distance from there
struct capsule_rope {
    CAPSULE_GLOBAL const float * first;     // 0: no RoPE
    CAPSULE_GLOBAL const float * distances; // [N][n_rot]
};

// what is known of the pattern of a slot
CAPSULE_FN CAPSULE_GLOBAL const float * capsule_pattern(CAPSULE_ARGS, CAPSULE_GLOBAL const float * tables, int i_slot) {
    return tables + a.r_distances + (int64_t) ((CAPSULE_GLOBAL const int32_t *) tables)[a.r_pattern + i_slot]*a.r_stride;
}

CAPSULE_FN capsule_rope capsule_rope_of(CAPSULE_ARGS, CAPSULE_GLOBAL const float * tables, int i_slot) {
    capsule_rope res;
    res.first     = 0;
    res.distances = 0;
    if (a.n_rot > 0) {
        res.first     = tables + i_slot*a.n_rot;
        res.distances = capsule_pattern(a, tables, i_slot);
    }
    return res;
}

// the channels of pair p
CAPSULE_FN int capsule_pair0(CAPSULE_ARGS, int p) {
    return a.norm || p >= a.n_rot/2 ? 2*p : p;
}

CAPSULE_FN int capsule_pair1(CAPSULE_ARGS, int p) {
    return a.norm || p >= a.n_rot/2 ? 2*p + 1 : p + a.n_rot/2;
}

// pair p of token j -> a row of the tile, with RoPE
template <typename T>
CAPSULE_FN void capsule_put_pair(CAPSULE_ARGS, capsule_rope rope, int j, int p, float x0, float x1, CAPSULE_SHARED T * row) {
    const int c0 = capsule_pair0(a, p);
    const int c1 = capsule_pair1(a, p);

    if (rope.first && p < a.n_rot/2) {
        // (cos, sin) lie where the channels do
        CAPSULE_GLOBAL const float * dist = rope.distances + j*a.n_rot;

        const float co = rope.first[c0]*dist[c0] - rope.first[c1]*dist[c1];
        const float si = rope.first[c1]*dist[c0] + rope.first[c0]*dist[c1];

        const float y0 = x0*co - x1*si;
        x1 = x0*si + x1*co;
        x0 = y0;
    }

    capsule_put(row[c0], x0);
    capsule_put(row[c1], x1);
}

// tile = mean + basis*rows, for n tokens from first (a multiple of 8) on
template <typename T, typename U>
CAPSULE_FN void capsule_tile_pca(int tid, int nt, CAPSULE_ARGS, CAPSULE_GLOBAL const float * mean, CAPSULE_GLOBAL const float * basis, int n_rows, int d,
        capsule_rope rope, int first, int n, CAPSULE_SHARED const T * rows, CAPSULE_SHARED U * tile) {
    const int n_pairs = d/2;

    for (int i = tid; i < (n + 7)/8*n_pairs; i += nt) {
        const int j0 = first + i/n_pairs*8;
        const int p  = i%n_pairs;
        const int c0 = capsule_pair0(a, p);
        const int c1 = capsule_pair1(a, p);

        float x0[8];
        float x1[8];

        CAPSULE_UNROLL
        for (int j = 0; j < 8; ++j) {
            x0[j] = mean[c0];
            x1[j] = mean[c1];
        }

        for (int r = 0; r < n_rows; ++r) {
            const float y0 = capsule_float(rows[r*a.ld_rows + c0]);
            const float y1 = capsule_float(rows[r*a.ld_rows + c1]);

            CAPSULE_GLOBAL const float * w = basis + r*a.n_pad + j0;

            CAPSULE_UNROLL
            for (int j = 0; j < 8; ++j) {
                x0[j] += w[j]*y0;
                x1[j] += w[j]*y1;
            }
        }

        CAPSULE_UNROLL
        for (int j = 0; j < 8; ++j) {
            if (j0 + j < a.N) {
                capsule_put_pair(a, rope, j0 + j, p, x0[j], x1[j], tile + (j0 + j - first)*a.ld_tile);
            }
        }
    }
}

#if defined(CAPSULE_MMA)
// the same on tensor cores, in two steps: tile = basis*rows
CAPSULE_FN void capsule_tile_product(int tid, int nt, CAPSULE_ARGS, const float * basis_h, int n_rows, int d, int first, int n, const capsule_half * rows, float * tile) {
    capsule_mma(tid, nt, (n + 15)/16*16, d, (n_rows + 15)/16*16, (const capsule_half *) basis_h + first*a.n_mma, a.n_mma, rows, a.ld_rows, tile, a.ld_tile);
}

// other types of rows and tiles are not asked for
template <typename T, typename U>
CAPSULE_FN void capsule_tile_product(int, int, CAPSULE_ARGS, const float *, int, int, int, int, const T *, U *) {
    (void) a;
}

// then the mean and RoPE
template <typename U>
CAPSULE_FN void capsule_tile_finish(int tid, int nt, CAPSULE_ARGS, const float * mean, int d, capsule_rope rope, int first, int n, U * tile) {
    const int n_pairs = d/2;

    for (int u = tid; u < n*n_pairs; u += nt) {
        const int j  = u/n_pairs;
        const int p  = u%n_pairs;
        const int c0 = capsule_pair0(a, p);
        const int c1 = capsule_pair1(a, p);

        U * row = tile + j*a.ld_tile;

        capsule_put_pair(a, rope, first + j, p, capsule_float(row[c0]) + mean[c0], capsule_float(row[c1]) + mean[c1], row);
    }
}
#endif

template <typename T, typename U>
CAPSULE_FN void capsule_tile(capsule_threads t, CAPSULE_ARGS, CAPSULE_GLOBAL const float * mean, CAPSULE_GLOBAL const float * basis, CAPSULE_GLOBAL const float * basis_h,
        int n_rows, int d, capsule_rope rope, int first, int n, CAPSULE_SHARED const T * rows, CAPSULE_SHARED U * tile) {
#if defined(CAPSULE_MMA)
    if (a.mma) {
        CAPSULE_PHASE((capsule_tile_product(tid, t.n, a, basis_h, n_rows, d, first, n, rows, tile)));
        CAPSULE_PHASE((capsule_tile_finish (tid, t.n, a, mean, d, rope, first, n, tile)));
        return;
    }
#else
    (void) basis_h;
#endif
    CAPSULE_PHASE((capsule_tile_pca(tid, t.n, a, mean, basis, n_rows, d, rope, first, n, rows, tile)));
}

// hidden units of the key MLP for n dropped tokens from j0 on -> [n][n_mlp]
template <typename T>
CAPSULE_FN void capsule_mlp(int tid, int nt, CAPSULE_ARGS, CAPSULE_GLOBAL const float * weights, int i_head, int j0, int n, CAPSULE_SHARED const T * rows,
        CAPSULE_SHARED float * z) {
    CAPSULE_GLOBAL const int32_t * neighbours = (CAPSULE_GLOBAL const int32_t *) weights + a.w_neighbours;

    for (int i = tid; i < n*a.n_mlp; i += nt) {
        const int j = j0 + i/a.n_mlp;
        const int m = i%a.n_mlp;

        float x = weights[a.w_mlp_up_bias + i_head*a.n_mlp + m];
        for (int k = 0; k < a.n_neighbours; ++k) {
            CAPSULE_SHARED const T     * row = rows + neighbours[j*a.n_neighbours + k]*a.ld_rows;
            CAPSULE_GLOBAL const float * up  = weights + a.w_mlp_up + (i_head*a.n_neighbours + k)*a.d_k*a.n_mlp + m;

            for (int c = 0; c < a.d_k; ++c) {
                x += up[c*a.n_mlp]*capsule_float(row[c]);
            }
        }

        z[i] = 0.5f*x*(1.0f + capsule_erf(x*0.70710678118654752f));
    }
}

#if defined(CAPSULE_MMA)
// the same on tensor cores, in two steps: products of all kept rows and the weights of every neighbour -> [n_kept][ld_u]
CAPSULE_FN void capsule_mlp_product(int tid, int nt, CAPSULE_ARGS, const float * weights, int i_head, const capsule_half * rows, float * dst) {
    const capsule_half * up = (const capsule_half *) (weights + a.w_mlp_up_h) + i_head*a.d_k*a.ld_up;

    capsule_mma(tid, nt, (a.n_kept + 15)/16*16, a.ld_up, a.d_k, rows, a.ld_rows, up, a.ld_up, dst, a.ld_u);
}

template <typename T>
CAPSULE_FN void capsule_mlp_product(int, int, CAPSULE_ARGS, const float *, int, const T *, float *) {
    (void) a; // other types are not asked for
}

// then the hidden units -> [n_mma tokens][ld_z], zero for tokens that are kept
CAPSULE_FN void capsule_mlp_finish(int tid, int nt, CAPSULE_ARGS, const float * weights, int i_head, const float * products, capsule_half * z) {
    const int32_t * order      = (const int32_t *) weights + a.w_token_order;
    const int32_t * neighbours = (const int32_t *) weights + a.w_neighbours;

    const int n_z = a.ld_z - 8;

    for (int u = tid; u < a.n_mma*n_z; u += nt) {
        const int i = u/n_z;
        const int m = u%n_z;

        float y = 0.0f;
        if (i >= a.n_kept && i < a.N && m < a.n_mlp) {
            float x = weights[a.w_mlp_up_bias + i_head*a.n_mlp + m];
            for (int k = 0; k < a.n_neighbours; ++k) {
                x += products[neighbours[(i - a.n_kept)*a.n_neighbours + k]*a.ld_u + k*a.n_mlp + m];
            }
            y = 0.5f*x*(1.0f + capsule_erf(x*0.70710678118654752f));
        }
        capsule_put(z[(i < a.N ? order[i] : i)*a.ld_z + m], y);
    }
}

// and what they add to n tokens from first on -> tile
CAPSULE_FN void capsule_mlp_down(int tid, int nt, CAPSULE_ARGS, const float * weights, int i_head, int first, int n, const capsule_half * z, float * tile) {
    const capsule_half * down = (const capsule_half *) (weights + a.w_mlp_down_h) + i_head*(a.ld_z - 8)*a.d_k;

    capsule_mma(tid, nt, (n + 15)/16*16, a.d_k, a.ld_z - 8, z + first*a.ld_z, a.ld_z, down, a.d_k, tile, a.ld_tile);
}

template <typename U>
CAPSULE_FN void capsule_mlp_down(int, int, CAPSULE_ARGS, const float *, int, int, int, const capsule_half *, U *) {
    (void) a;
}
#endif

// what gated neighbours say of a pair of channels of dropped token j, and the key MLP (z: its hidden units), where tensor cores do not
template <typename T>
CAPSULE_FN void capsule_predict(CAPSULE_ARGS, CAPSULE_GLOBAL const float * weights, int i_head, int j, int c0, int c1, CAPSULE_SHARED const T * rows,
        CAPSULE_SHARED const float * z, CAPSULE_PRIVATE float & x0, CAPSULE_PRIVATE float & x1) {
    CAPSULE_GLOBAL const int32_t * neighbours = (CAPSULE_GLOBAL const int32_t *) weights + a.w_neighbours + j*a.n_neighbours;

    for (int k = 0; k < a.n_neighbours; ++k) {
        CAPSULE_SHARED const T     * row  = rows + neighbours[k]*a.ld_rows;
        CAPSULE_GLOBAL const float * gate = weights + a.w_gate + ((i_head*(a.N - a.n_kept) + j)*a.n_neighbours + k)*a.d_k;

        x0 += gate[c0]*capsule_float(row[c0]);
        x1 += gate[c1]*capsule_float(row[c1]);
    }
    for (int m = 0; m < a.n_mlp && !a.mma; ++m) {
        CAPSULE_GLOBAL const float * down = weights + a.w_mlp_down + (i_head*a.n_mlp + m)*a.d_k;

        x0 += down[c0]*z[m];
        x1 += down[c1]*z[m];
    }
}

// kept tokens as they are, the others predicted from their neighbours, plus a residual
template <typename T, typename U>
CAPSULE_FN void capsule_tile_retain(int tid, int nt, CAPSULE_ARGS, CAPSULE_GLOBAL const float * weights, int i_head, int n_rows,
        capsule_rope rope, int first, int n, CAPSULE_SHARED const T * rows, CAPSULE_SHARED const float * z, CAPSULE_SHARED U * tile) {
    CAPSULE_GLOBAL const int32_t * order = (CAPSULE_GLOBAL const int32_t *) weights + a.w_token_order;

    const int n_pairs = a.d_k/2;

    for (int u = tid; u < a.N*n_pairs; u += nt) {
        const int i  = u/n_pairs;
        const int p  = u%n_pairs;
        const int c0 = capsule_pair0(a, p);
        const int c1 = capsule_pair1(a, p);

        // another chunk?
        const int t = order[i] - first;
        if (t < 0 || t >= n) {
            continue;
        }

        float x0 = i < n_rows ? capsule_float(rows[i*a.ld_rows + c0]) : 0.0f;
        float x1 = i < n_rows ? capsule_float(rows[i*a.ld_rows + c1]) : 0.0f;

        if (i >= a.n_kept) {
            const int j = i - a.n_kept;

            capsule_predict(a, weights, i_head, j, c0, c1, rows, z + j*a.n_mlp, x0, x1);
            if (a.mma && a.n_mlp > 0) {
                x0 += capsule_float(tile[t*a.ld_tile + c0]);
                x1 += capsule_float(tile[t*a.ld_tile + c1]);
            }
        }

        capsule_put_pair(a, rope, order[i], p, x0, x1, tile + t*a.ld_tile);
    }
}

// the rows of a head in a slot
template <typename T>
CAPSULE_FN void capsule_rows(capsule_threads t, CAPSULE_ARGS, CAPSULE_PARAM const capsule_part & part, CAPSULE_GLOBAL const char * slot, int i_head, int d,
        CAPSULE_SHARED T * rows) {
    // tensor cores take 16 rows at a time
    CAPSULE_PHASE((capsule_load_rows<T>(tid, t.n, part, slot + part.offs + i_head*part.head_stride, d, a.ld_rows, a.mma ? a.n_mma : 0, rows)));
    if (part.n_rows > part.n_plain) {
        CAPSULE_HADAMARD(T, rows + part.n_plain*a.ld_rows, part.n_rows - part.n_plain, d, a.ld_rows, d & -d);
    }
}

template <typename T>
CAPSULE_FN void capsule_rows_k(capsule_threads t, CAPSULE_ARGS, CAPSULE_PARAM const capsule_tier & tier, CAPSULE_GLOBAL const char * slot, CAPSULE_GLOBAL const float * weights,
        int i_head, CAPSULE_SHARED char * sm) {
    CAPSULE_SHARED T * rows = CAPSULE_SM_T(a.s_rows);

    capsule_rows<T>(t, a, tier.k, slot, i_head, a.d_k, rows);
    if (tier.retain && a.n_mlp > 0) {
#if defined(CAPSULE_MMA)
        if (a.mma) {
            CAPSULE_PHASE((capsule_mlp_product(tid, t.n, a, weights, i_head, (const T *) rows, CAPSULE_SM_F(a.s_u))));
            CAPSULE_PHASE((capsule_mlp_finish (tid, t.n, a, weights, i_head, CAPSULE_SM_F(a.s_u), (capsule_half *) (sm + a.s_z))));
            return;
        }
#endif
        CAPSULE_PHASE((capsule_mlp<T>(tid, t.n, a, weights, i_head, 0, a.N - a.n_kept, rows, CAPSULE_SM_F(a.s_z))));
    }
}

// rows -> tile of n keys from first on, with RoPE
template <typename T, typename U>
CAPSULE_FN void capsule_tile_k(capsule_threads t, CAPSULE_ARGS, CAPSULE_PARAM const capsule_tier & tier, CAPSULE_GLOBAL const float * weights, capsule_rope rope, int i_head,
        int first, int n, CAPSULE_SHARED char * sm) {
    CAPSULE_SHARED T * rows = CAPSULE_SM_T(a.s_rows);
    CAPSULE_SHARED U * tile = CAPSULE_SM_U(a.s_tile);

    if (tier.retain) {
#if defined(CAPSULE_MMA)
        if (a.mma && a.n_mlp > 0) {
            CAPSULE_PHASE((capsule_mlp_down(tid, t.n, a, weights, i_head, first, n, (const capsule_half *) (sm + a.s_z), tile)));
        }
#endif
        CAPSULE_PHASE((capsule_tile_retain(tid, t.n, a, weights, i_head, tier.k.n_rows, rope, first, n, rows, CAPSULE_SM_F(a.s_z), tile)));
    } else {
        capsule_tile<T, U>(t, a, weights + a.w_k_mean + i_head*a.d_k, weights + a.w_k_basis, weights + a.w_k_basis_h, tier.k.n_rows, a.d_k, rope, first, n, rows, tile);
    }
}

// K or V, as a.is_v says
template <typename T>
CAPSULE_FN void capsule_rows_kv(capsule_threads t, CAPSULE_ARGS, CAPSULE_PARAM const capsule_tier & tier, CAPSULE_GLOBAL const char * slot, CAPSULE_GLOBAL const float * weights,
        int i_head, CAPSULE_SHARED char * sm) {
    if (a.is_v) {
        capsule_rows<T>(t, a, tier.v, slot, i_head, a.d_v, CAPSULE_SM_T(a.s_rows));
    } else {
        capsule_rows_k<T>(t, a, tier, slot, weights, i_head, sm);
    }
}

template <typename T, typename U>
CAPSULE_FN void capsule_tile_kv(capsule_threads t, CAPSULE_ARGS, CAPSULE_PARAM const capsule_tier & tier, CAPSULE_GLOBAL const float * weights, capsule_rope rope, int i_head,
        int first, int n, CAPSULE_SHARED char * sm) {
    if (a.is_v) {
        capsule_tile<T, U>(t, a, weights + a.w_v_mean + i_head*a.d_v, weights + a.w_v_basis, weights + a.w_v_basis_h, tier.v.n_rows, a.d_v, rope, first, n,
                CAPSULE_SM_T(a.s_rows), CAPSULE_SM_U(a.s_tile));
    } else {
        capsule_tile_k<T, U>(t, a, tier, weights, rope, i_head, first, n, sm);
    }
}
