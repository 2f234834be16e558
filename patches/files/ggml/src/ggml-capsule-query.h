#pragma once

#include "ggml-capsule-tile.h"

//
// keys that are not rebuilt: rows stay the integers they are stored as, and the queries are turned into vectors of 8 bits that meet them
//   retain (no key MLP): a token is its own row plus gated rows of its neighbours; the gates commute with RoPE, so the query is turned back by the distance of
//     the token, and gated
//   pca: exp(-i angle of token t) ~= sum_m phi_m(t)(a_m - i b_m) for every pair of channels, so
//     q*k_t = sum_m phi_m(t) (q_m*mean + sum_r basis[r][t] q_m*row_r), where q_m is the query with its pairs times (a_m - i b_m)
// everywhere the query is turned back by the first position of the slot, and Hadamard-transformed as the rows are
//

// rows of a head as integers, 4 in a word, and a scale per 32 of them
struct capsule_codes_sink {
    CAPSULE_SHARED int   * codes;
    CAPSULE_SHARED float * scales;
    int                    ld;
    int                    n_blocks; // of 32, in a row
};

CAPSULE_FN void capsule_sink(capsule_codes_sink to, int row, int word, uint32_t codes, float scale) {
    to.codes[row*to.ld + word] = (int) codes;
    if (word % 8 == 0) {
        to.scales[row*to.n_blocks + word/8] = scale;
    }
}

CAPSULE_FN void capsule_load_codes(int tid, int nt, CAPSULE_ARGS, CAPSULE_PARAM const capsule_part & p, CAPSULE_GLOBAL const char * head, int d, CAPSULE_SHARED char * sm) {
    capsule_codes_sink to;
    to.codes    = (CAPSULE_SHARED int *) (sm + a.s_codes);
    to.scales   = CAPSULE_SM_F(a.s_scales);
    to.ld       = a.ld_codes;
    to.n_blocks = d/32;

    capsule_read_words(tid, nt, p, head, d, to);
}

// 4 products of 8 bits
CAPSULE_FN int capsule_dot4(int x, int y, int sum) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 610
    return __dp4a(x, y, sum);
#else
    CAPSULE_UNROLL
    for (int i = 0; i < 32; i += 8) {
        sum += (int) (int8_t) ((uint32_t) x >> i)*(int) (int8_t) ((uint32_t) y >> i);
    }
    return sum;
#endif
}

// a row and n_b vectors, n_b <= B
template <int B>
CAPSULE_FN void capsule_dot(CAPSULE_ARGS, int row, int vec, int n_b, CAPSULE_SHARED const char * sm, CAPSULE_PRIVATE float * res) {
    const int n_blocks = a.d_k/32;

    CAPSULE_SHARED const int   * x  = (CAPSULE_SHARED const int *) (sm + a.s_codes) + row*a.ld_codes;
    CAPSULE_SHARED const int   * y  = (CAPSULE_SHARED const int *) (sm + a.s_v_codes) + vec*a.ld_codes;
    CAPSULE_SHARED const float * xs = (CAPSULE_SHARED const float *) (sm + a.s_scales) + row*n_blocks;
    CAPSULE_SHARED const float * ys = (CAPSULE_SHARED const float *) (sm + a.s_v_scales) + vec*n_blocks;

    CAPSULE_UNROLL
    for (int b = 0; b < B; ++b) {
        res[b] = 0.0f;
    }

    for (int i = 0; i < n_blocks; ++i) {
        int sum[B] = { 0 };

        CAPSULE_UNROLL
        for (int w = 0; w < 8; ++w) {
            const int c = x[8*i + w];

            CAPSULE_UNROLL
            for (int b = 0; b < B; ++b) {
                sum[b] = capsule_dot4(c, y[(b < n_b ? b : 0)*a.ld_codes + 8*i + w], sum[b]);
            }
        }

        CAPSULE_UNROLL
        for (int b = 0; b < B; ++b) {
            res[b] += xs[i]*ys[(b < n_b ? b : 0)*n_blocks + i]*(float) sum[b];
        }
    }
}

//
// the vectors of the queries of an item: it.n_q times n_var of them
//

struct capsule_vectors {
    int retain;
    int n_var;   // retain: a token each in the order that they are stored in, then a neighbour each; pca: terms
    CAPSULE_GLOBAL const float * phi; // [n_var][N], 0: there is no RoPE
    CAPSULE_GLOBAL const float * ab;  // [n_var][d_k], (a, b) where the channels of a pair are
};

// n_var == 0: the keys of this slot have to be rebuilt
CAPSULE_FN capsule_vectors capsule_vectors_of(CAPSULE_ARGS, CAPSULE_GLOBAL const float * tables, int i_slot) {
    CAPSULE_PARAM const capsule_tier & tier = a.tiers[capsule_tier_of(a, i_slot)];

    capsule_vectors res;
    res.retain  = tier.retain;
    res.n_var   = 0;
    res.phi     = 0;
    res.ab      = 0;

    if (!tier.query) {
        return res;
    }
    if (tier.retain) {
        res.n_var = a.N + (a.N - a.n_kept)*a.n_neighbours;
        return res;
    }

    res.n_var = 1;
    if (a.n_rot > 0) {
        CAPSULE_GLOBAL const float * terms = capsule_pattern(a, tables, i_slot) + a.N*a.n_rot;

        res.n_var = ((CAPSULE_GLOBAL const int32_t *) terms)[0];
        res.phi   = terms + 1;
        res.ab    = terms + 1 + a.n_terms*a.N;
    }
    if (res.n_var*a.n_q > CAPSULE_MAX_VECTORS) {
        res.n_var = 0;
    }

    return res;
}

// of slots that begin at the same position
CAPSULE_FN bool capsule_same_vectors(CAPSULE_ARGS, CAPSULE_GLOBAL const float * tables, int i_slot, int j_slot) {
    CAPSULE_GLOBAL const int32_t * patterns = (CAPSULE_GLOBAL const int32_t *) tables + a.r_pattern;

    return a.tiers[capsule_tier_of(a, i_slot)].retain == a.tiers[capsule_tier_of(a, j_slot)].retain && (a.n_rot == 0 || patterns[i_slot] == patterns[j_slot]);
}

// vectors [v0, v0 + n) -> [][ld_make], and what a lane adds to their products with the mean
CAPSULE_FN void capsule_vectors_make(int tid, int nt, CAPSULE_ARGS, capsule_vectors vs, int v0, int n, int i_head, CAPSULE_GLOBAL const float * weights,
        capsule_rope rope, CAPSULE_SHARED char * sm) {
    const int lane = tid % CAPSULE_LANES;

    CAPSULE_GLOBAL const int32_t * order = (CAPSULE_GLOBAL const int32_t *) weights + a.w_token_order;
    CAPSULE_GLOBAL const float   * mean  = weights + a.w_k_mean + i_head*a.d_k;

    for (int v = v0 + tid/CAPSULE_LANES; v < v0 + n; v += nt/CAPSULE_LANES) {
        const int var = v%vs.n_var;

        CAPSULE_SHARED const float * q   = CAPSULE_SM_F(a.s_q) + v/vs.n_var*a.d_k;
        CAPSULE_SHARED float       * dst = CAPSULE_SM_F(a.s_make) + (v - v0)*a.ld_make;

        const int i = var < a.N ? var : a.n_kept + (var - a.N)/(a.n_neighbours > 0 ? a.n_neighbours : 1);

        CAPSULE_GLOBAL const float * gate = vs.retain && var >= a.N ? weights + a.w_gate + (i_head*(a.N - a.n_kept)*a.n_neighbours + var - a.N)*a.d_k : 0;
        CAPSULE_GLOBAL const float * turn = vs.retain && rope.first ? rope.distances + order[i]*a.n_rot : 0;

        float sum = 0.0f;
        for (int p = lane; p < a.d_k/2; p += CAPSULE_LANES) {
            const int c0 = capsule_pair0(a, p);
            const int c1 = capsule_pair1(a, p);

            float x0 = q[c0];
            float x1 = q[c1];

            if (rope.first && p < a.n_rot/2) {
                const float y0 = x0*rope.first[c0] + x1*rope.first[c1];
                x1 = x1*rope.first[c0] - x0*rope.first[c1];
                x0 = y0;
            }
            if (vs.retain) {
                if (turn && p < a.n_rot/2) {
                    const float y0 = x0*turn[c0] + x1*turn[c1];
                    x1 = x1*turn[c0] - x0*turn[c1];
                    x0 = y0;
                }
                if (gate) {
                    x0 *= gate[c0];
                    x1 *= gate[c1];
                }
            } else {
                if (vs.ab) {
                    CAPSULE_GLOBAL const float * ab = vs.ab + var*a.d_k;

                    const float y0 = x0*ab[c0] + x1*ab[c1];
                    x1 = x1*ab[c0] - x0*ab[c1];
                    x0 = y0;
                }
                sum += x0*mean[c0] + x1*mean[c1];
            }
            dst[c0] = x0;
            dst[c1] = x1;
        }
        CAPSULE_SM_F(a.s_make_red)[(v - v0)*CAPSULE_LANES + lane] = sum;
    }
}

// -> integers of 8 bits with a scale per 32
CAPSULE_FN void capsule_vectors_quantize(int tid, int nt, CAPSULE_ARGS, int v0, int n, CAPSULE_SHARED char * sm) {
    const int n_blocks = a.d_k/32;

    for (int u = tid; u < n*n_blocks; u += nt) {
        const int v = u/n_blocks;
        const int b = u%n_blocks;

        CAPSULE_SHARED const float * x   = CAPSULE_SM_F(a.s_make) + v*a.ld_make + 32*b;
        CAPSULE_SHARED int         * dst = (CAPSULE_SHARED int *) (sm + a.s_v_codes) + (v0 + v)*a.ld_codes + 8*b;

        float amax = 0.0f;
        for (int c = 0; c < 32; ++c) {
            amax = capsule_abs(x[c]) > amax ? capsule_abs(x[c]) : amax;
        }
        const float id = amax > 0.0f ? 127.0f/amax : 0.0f;

        for (int w = 0; w < 8; ++w) {
            uint32_t word = 0;
            for (int i = 0; i < 4; ++i) {
                const float y = x[4*w + i]*id;
                word |= ((uint32_t) (int) (y < 0.0f ? y - 0.5f : y + 0.5f) & 255) << 8*i;
            }
            dst[w] = (int) word;
        }
        CAPSULE_SM_F(a.s_v_scales)[(v0 + v)*n_blocks + b] = amax/127.0f;
    }
}

// -> F16, for tensor cores
CAPSULE_FN void capsule_vectors_half(int tid, int nt, CAPSULE_ARGS, int v0, int n, CAPSULE_SHARED char * sm) {
    CAPSULE_SHARED capsule_half * dst = (CAPSULE_SHARED capsule_half *) (sm + a.s_v_half) + v0*(a.d_k + 8);

    for (int u = tid; u < n*a.d_k; u += nt) {
        capsule_put(dst[u/a.d_k*(a.d_k + 8) + u%a.d_k], CAPSULE_SM_F(a.s_make)[u/a.d_k*a.ld_make + u%a.d_k]);
    }
}

// products with the mean
CAPSULE_FN void capsule_vectors_mean(int tid, int nt, CAPSULE_ARGS, int v0, int n, CAPSULE_SHARED char * sm) {
    for (int v = tid; v < n; v += nt) {
        float sum = 0.0f;
        for (int i = 0; i < CAPSULE_LANES; ++i) {
            sum += CAPSULE_SM_F(a.s_make_red)[v*CAPSULE_LANES + i];
        }
        CAPSULE_SM_F(a.s_v_mean)[v0 + v] = sum;
    }
}

//
// scores of n_q queries
//

// products of rows and vectors [v0, v1): pca [n_vec][n_rows], retain [n_vec]
CAPSULE_FN void capsule_query_dots(int tid, int nt, CAPSULE_ARGS, capsule_vectors vs, int v0, int v1, int n_rows, CAPSULE_GLOBAL const float * weights, CAPSULE_SHARED char * sm) {
    CAPSULE_SHARED float * dots = CAPSULE_SM_F(a.s_dots);

    if (vs.retain) {
        CAPSULE_GLOBAL const int32_t * neighbours = (CAPSULE_GLOBAL const int32_t *) weights + a.w_neighbours;

        for (int v = v0 + tid; v < v1; v += nt) {
            const int var = v%vs.n_var;
            const int row = var < a.N ? var : neighbours[var - a.N];
            if (row < n_rows) {
                float x[1];
                capsule_dot<1>(a, row, v, 1, sm, x);
                dots[v] = x[0];
            }
        }
        return;
    }

    for (int u = tid; u < (v1 - v0 + 3)/4*n_rows; u += nt) {
        const int r = u%n_rows;
        const int v = v0 + u/n_rows*4;
        const int n = capsule_min(v1 - v, 4);

        float x[4];
        if (n == 1) {
            capsule_dot<1>(a, r, v, 1, sm, x);
        } else {
            capsule_dot<4>(a, r, v, n, sm, x);
        }

        CAPSULE_UNROLL
        for (int b = 0; b < 4; ++b) {
            if (b < n) {
                dots[(v + b)*n_rows + r] = x[b];
            }
        }
    }
}

// pca: dots*basis -> [n_vec][n_pad], B vectors and 4 tokens at a time
template <int B>
CAPSULE_FN void capsule_query_terms(int tid, int nt, CAPSULE_ARGS, int v0, int v1, int n_rows, CAPSULE_GLOBAL const float * basis, CAPSULE_SHARED char * sm) {
    const int n_t = a.n_pad/4;

    for (int u = tid; u < (v1 - v0 + B - 1)/B*n_t; u += nt) {
        const int v = v0 + u/n_t*B;
        const int n = capsule_min(v1 - v, B);

        CAPSULE_GLOBAL const float * w    = basis + u%n_t*4;
        CAPSULE_SHARED const float * dots = CAPSULE_SM_F(a.s_dots) + v*n_rows;
        CAPSULE_SHARED float       * dst  = CAPSULE_SM_F(a.s_terms) + v*a.n_pad + u%n_t*4;

        float x[B][4] = { { 0.0f } };
        for (int r = 0; r < n_rows; ++r) {
            const capsule_vec4 y = capsule_load4(w + r*a.n_pad);

            CAPSULE_UNROLL
            for (int b = 0; b < B; ++b) {
                const float z = dots[(b < n ? b : 0)*n_rows + r];

                CAPSULE_UNROLL
                for (int i = 0; i < 4; ++i) {
                    x[b][i] += z*y.x[i];
                }
            }
        }

        CAPSULE_UNROLL
        for (int b = 0; b < B; ++b) {
            for (int i = 0; i < 4 && b < n; ++i) {
                dst[b*a.n_pad + i] = x[b][i];
            }
        }
    }
}

#if defined(CAPSULE_MMA)
CAPSULE_FN void capsule_query_half_dots(int tid, int nt, CAPSULE_ARGS, int n_rows, int v, int n_v, char * sm) {
    for (int u = tid; u < n_rows*n_v; u += nt) {
        const int r = u/n_v;
        const int c = v + u%n_v;

        capsule_put(((capsule_half *) (sm + a.s_k_rows))[r*a.ld_dots + c], CAPSULE_SM_F(a.s_terms)[r*a.ld_terms + c]/CAPSULE_DOTS);
    }
}

// the same on tensor cores, with rows and vectors in F16 -> [n_mma tokens][ld_terms]
CAPSULE_FN void capsule_query_mma(capsule_threads t, CAPSULE_ARGS, const capsule_part & part, const char * head, int v0, int v1, const float * basis_h, char * sm) {
    const int v   = v0/16*16;
    const int n_v = (v1 - v + 15)/16*16;
    const int n_r = (part.n_rows + 15)/16*16;
    const int ld  = a.d_k + 8;

    capsule_half       * rows    = (capsule_half *) (sm + a.s_k_rows);
    const capsule_half * vectors = (const capsule_half *) (sm + a.s_v_half) + v*ld;

    CAPSULE_PHASE((capsule_load_rows(tid, t.n, part, head, a.d_k, ld, n_r, rows)));
    CAPSULE_PHASE((capsule_mma<true>(tid, t.n, n_r, n_v, a.d_k, rows, ld, vectors, ld, CAPSULE_SM_F(a.s_terms) + v, a.ld_terms)));
    CAPSULE_PHASE((capsule_query_half_dots(tid, t.n, a, n_r, v, n_v, sm)));
    CAPSULE_PHASE((capsule_mma(tid, t.n, a.n_mma, n_v, n_r, (const capsule_half *) basis_h, a.n_mma, rows + v, a.ld_dots, CAPSULE_SM_F(a.s_terms) + v, a.ld_terms)));
}
#endif

// query i and token t of pca
CAPSULE_FN float capsule_query_pca(CAPSULE_ARGS, capsule_vectors vs, int i, int t, CAPSULE_SHARED const char * sm) {
    CAPSULE_SHARED const float * x    = (CAPSULE_SHARED const float *) (sm + a.s_terms) + (a.mma_t ? t*a.ld_terms + i*vs.n_var : i*vs.n_var*a.n_pad + t);
    CAPSULE_SHARED const float * mean = (CAPSULE_SHARED const float *) (sm + a.s_v_mean) + i*vs.n_var;

    const int   step = a.mma_t ? 1 : a.n_pad;
    const float unit = a.mma_t ? CAPSULE_DOTS : 1.0f;

    float res = 0.0f;
    for (int m = 0; m < vs.n_var; ++m) {
        res += (vs.phi ? vs.phi[m*a.N + t] : 1.0f)*(unit*x[m*step] + mean[m]);
    }
    return res;
}

// query i and token j of those in order
CAPSULE_FN float capsule_query_retain(CAPSULE_ARGS, capsule_vectors vs, int n_rows, int i, int j, CAPSULE_SHARED const char * sm) {
    CAPSULE_SHARED const float * dots = (CAPSULE_SHARED const float *) (sm + a.s_dots) + i*vs.n_var;

    float res = j < n_rows ? dots[j] : 0.0f;
    if (j >= a.n_kept) {
        for (int k = 0; k < a.n_neighbours; ++k) {
            res += dots[a.N + (j - a.n_kept)*a.n_neighbours + k];
        }
    }
    return res;
}

// the vectors [v0, v1) of a slot
CAPSULE_FN void capsule_vectors_init(capsule_threads t, CAPSULE_ARGS, capsule_vectors vs, int v0, int v1, CAPSULE_GLOBAL const float * weights,
        CAPSULE_GLOBAL const float * tables, int i_slot, int i_head, CAPSULE_SHARED char * sm) {
    const capsule_rope rope = capsule_rope_of(a, tables, i_slot);

    for (int v = v0; v < v1; v += CAPSULE_N_MAKE) {
        const int n = capsule_min(v1 - v, CAPSULE_N_MAKE);

        CAPSULE_PHASE((capsule_vectors_make(tid, t.n, a, vs, v, n, i_head, weights, rope, sm)));
        CAPSULE_HADAMARD(float, CAPSULE_SM_F(a.s_make), n, a.d_k, a.ld_make, a.d_k & -a.d_k);
        CAPSULE_PHASE(
            if (a.mma_t && !vs.retain) {
                capsule_vectors_half(tid, t.n, a, v, n, sm);
            } else {
                capsule_vectors_quantize(tid, t.n, a, v, n, sm);
            }
            if (!vs.retain) {
                capsule_vectors_mean(tid, t.n, a, v, n, sm);
            }
        );
    }
}
