#pragma once

#include "ggml-capsule-scores.h"

//
// attention: values, the parts of a row, their combination
//

// what the sums so far are to be multiplied with
CAPSULE_FN float capsule_attn_factor(CAPSULE_ARGS, int i, int step, CAPSULE_SHARED char * sm) {
    return CAPSULE_EXP(CAPSULE_SM_F(a.s_m)[(step & 1)*a.max_q + i] - CAPSULE_SM_F(a.s_m)[(~step & 1)*a.max_q + i]);
}

// o += weights*V of hot cells
template <int B>
CAPSULE_FN void capsule_attn_hot_values(int tid, int nt, CAPSULE_ARGS, capsule_item it, CAPSULE_GLOBAL const char * v, int64_t col, int n, int step,
        CAPSULE_SHARED char * sm) {
    for (int u = tid; u < a.d_v*capsule_n_groups<B>(it); u += nt) {
        const int c = u%a.d_v;
        const int i = it.i0 + u/a.d_v*B;

        CAPSULE_SHARED const float * w = CAPSULE_SM_F(a.s_s) + i*a.N;

        float o[B] = { 0.0f };
        for (int j = 0; j < n; ++j) {
            const float x = a.v_trans ?
                capsule_value(a.v.type, v + it.head*a.v.nb1 + c*a.v.nb2, (int) col + j) :
                capsule_value(a.v.type, v + it.head*a.v.nb1 + (col + j)*a.v.nb2, c);

            CAPSULE_UNROLL
            for (int b = 0; b < B; ++b) {
                o[b] += x*w[b*a.N + j];
            }
        }

        CAPSULE_UNROLL
        for (int b = 0; b < B; ++b) {
            if (i + b < it.i1) {
                CAPSULE_SHARED float * dst = CAPSULE_SM_F(a.s_o) + (i + b)*a.d_v + c;
                *dst = *dst*capsule_attn_factor(a, i + b, step, sm) + o[b];
            }
        }
    }
}

// weights of tokens -> weights of rows
template <int B>
CAPSULE_FN void capsule_attn_row_weights(int tid, int nt, CAPSULE_ARGS, capsule_item it, CAPSULE_GLOBAL const float * basis_t, int n_rows, CAPSULE_SHARED char * sm) {
    for (int u = tid; u < n_rows*capsule_n_groups<B>(it); u += nt) {
        const int r = u%n_rows;
        const int i = it.i0 + u/n_rows*B;

        CAPSULE_SHARED const float * s = CAPSULE_SM_F(a.s_s) + i*a.N;

        float w[B] = { 0.0f };
        for (int j = 0; j < a.N; ++j) {
            const float x = basis_t[j*a.N + r];

            CAPSULE_UNROLL
            for (int b = 0; b < B; ++b) {
                w[b] += x*s[b*a.N + j];
            }
        }

        CAPSULE_UNROLL
        for (int b = 0; b < B; ++b) {
            CAPSULE_SM_F(a.s_w)[(i + b)*a.ld_w + r] = w[b];
        }
    }
}

// o += weights*rows, apart for rows that are stored rotated
template <int B>
CAPSULE_FN void capsule_attn_row_values(int tid, int nt, CAPSULE_ARGS, capsule_item it, CAPSULE_PARAM const capsule_part & part, CAPSULE_GLOBAL const char * head, int step,
        CAPSULE_SHARED char * sm) {
    for (int u = tid; u < a.d_v*capsule_n_groups<B>(it); u += nt) {
        const int c = u%a.d_v;
        const int i = it.i0 + u/a.d_v*B;

        float o0[B] = { 0.0f };
        float o1[B] = { 0.0f };

        CAPSULE_SHARED const float * w = CAPSULE_SM_F(a.s_w) + i*a.ld_w;

        CAPSULE_UNROLL
        for (int type = 0; type < CAPSULE_MAX_TYPES; ++type) {
            CAPSULE_GLOBAL const char * row = head + part.type_offs[type];

            for (int r = 0; r < part.count[type]; ++r) {
                const float x = capsule_value(type, row, c);

                CAPSULE_UNROLL
                for (int b = 0; b < B; ++b) {
                    o1[b] += x*w[b*a.ld_w + r];
                }
                row += part.row_size[type];
            }
            w += part.count[type];

            if (type == CAPSULE_F16) {
                CAPSULE_UNROLL
                for (int b = 0; b < B; ++b) {
                    o0[b] = o1[b];
                    o1[b] = 0.0f;
                }
            }
        }

        CAPSULE_UNROLL
        for (int b = 0; b < B; ++b) {
            if (i + b < it.i1) {
                CAPSULE_SHARED float * dst0 = CAPSULE_SM_F(a.s_o) + (i + b)*a.d_v + c;
                CAPSULE_SHARED float * dst1 = dst0 + (a.n_o - 1)*a.max_q*a.d_v;

                const float f = capsule_attn_factor(a, i + b, step, sm);

                if (a.n_o == 1) {
                    *dst0 = *dst0*f + o0[b] + o1[b];
                } else {
                    *dst0 = *dst0*f + o0[b];
                    *dst1 = *dst1*f + o1[b];
                }
            }
        }
    }
}

// o += weights*rows that are integers
template <int B>
CAPSULE_FN void capsule_attn_code_values(int tid, int nt, CAPSULE_ARGS, capsule_item it, int n_rows, int step, CAPSULE_SHARED char * sm) {
    for (int u = tid; u < a.d_v*capsule_n_groups<B>(it); u += nt) {
        const int c = u%a.d_v;
        const int i = it.i0 + u/a.d_v*B;

        CAPSULE_SHARED const int8_t * x     = (CAPSULE_SHARED const int8_t *) (sm + a.s_codes) + c;
        CAPSULE_SHARED const float  * scale = CAPSULE_SM_F(a.s_scales) + c/32;
        CAPSULE_SHARED const float  * w     = CAPSULE_SM_F(a.s_w) + i*a.ld_w;

        float o[B] = { 0.0f };
        for (int r = 0; r < n_rows; ++r) {
            const float y = scale[r*(a.d_v/32)]*(float) x[r*4*a.ld_codes];

            CAPSULE_UNROLL
            for (int b = 0; b < B; ++b) {
                o[b] += y*w[b*a.ld_w + r];
            }
        }

        CAPSULE_UNROLL
        for (int b = 0; b < B; ++b) {
            if (i + b < it.i1) {
                CAPSULE_SHARED float * dst0 = CAPSULE_SM_F(a.s_o) + (i + b)*a.d_v + c;
                CAPSULE_SHARED float * dst1 = dst0 + (a.n_o - 1)*a.max_q*a.d_v;

                const float f = capsule_attn_factor(a, i + b, step, sm);

                if (a.n_o == 2) {
                    *dst0 *= f;
                }
                *dst1 = *dst1*f + o[b];
            }
        }
    }
}

#if defined(CAPSULE_MMA)
//
// the same on tensor cores: 16 queries (those that are not there are zero), rows and weights in F16
//

// after the softmax, in the same phase: a thread reads what it wrote there
CAPSULE_FN void capsule_attn_half_weights(int tid, int nt, CAPSULE_ARGS, capsule_item it, int n, char * sm) {
    const int lane = tid % CAPSULE_LANES;

    for (int i = tid/CAPSULE_LANES; i < 16; i += nt/CAPSULE_LANES) {
        capsule_half * dst = (capsule_half *) (sm + a.s_half) + i*a.ld_half;

        for (int j = lane; j < a.n_mma; j += CAPSULE_LANES) {
            capsule_put(dst[j], i >= it.i0 && i < it.i1 && j < n ? CAPSULE_SM_F(a.s_s)[i*a.N + j] : 0.0f);
        }
    }
}

// weights of rows -> F16, and the accumulators for what is added to them
CAPSULE_FN void capsule_attn_half_rows(int tid, int nt, CAPSULE_ARGS, capsule_item it, int n_rows, int step, char * sm) {
    for (int u = tid; u < 16*n_rows; u += nt) {
        capsule_put(((capsule_half *) (sm + a.s_half))[u/n_rows*a.ld_half + u%n_rows], CAPSULE_SM_F(a.s_w)[u/n_rows*a.ld_w + u%n_rows]);
    }
    for (int u = tid; u < (it.i1 - it.i0)*a.d_v; u += nt) {
        const int i = it.i0 + u/a.d_v;

        CAPSULE_SM_F(a.s_o)[i*a.d_v + u%a.d_v] *= capsule_attn_factor(a, i, step, sm);
    }
}

CAPSULE_FN void capsule_attn_mma_values(capsule_threads t, CAPSULE_ARGS, capsule_item it, const float * basis_h, int n_rows, int step, char * sm) {
    const int n = (n_rows + 15)/16*16;

    const capsule_half * half = (const capsule_half *) (sm + a.s_half);
    const capsule_half * rows = (const capsule_half *) (sm + a.s_v_rows);

    CAPSULE_PHASE((capsule_mma(tid, t.n, 16, n, a.n_mma, half, a.ld_half, (const capsule_half *) basis_h, a.n_mma, CAPSULE_SM_F(a.s_w), a.ld_w)));
    CAPSULE_PHASE((capsule_attn_half_rows(tid, t.n, a, it, n, step, sm)));
    CAPSULE_PHASE((capsule_mma(tid, t.n, 16, a.d_v, n, half, a.ld_half, rows, a.d_v + 8, CAPSULE_SM_F(a.s_o), a.d_v, true)));
}
#endif

// l: the sums of all lanes
CAPSULE_FN void capsule_attn_sum(int tid, CAPSULE_ARGS, CAPSULE_SHARED char * sm) {
    if (tid < a.max_q) {
        float l = 0.0f;
        for (int b = 0; b < CAPSULE_LANES; ++b) {
            l += CAPSULE_SM_F(a.s_red)[(a.max_q + tid)*CAPSULE_LANES + b];
        }
        CAPSULE_SM_F(a.s_m)[2*a.max_q + tid] = l;
    }
}

// both accumulators, and what the mean adds
CAPSULE_FN void capsule_attn_join(int tid, int nt, CAPSULE_ARGS, CAPSULE_GLOBAL const float * mean, CAPSULE_SHARED char * sm) {
    for (int u = tid; u < a.max_q*a.d_v; u += nt) {
        CAPSULE_SHARED float * o = CAPSULE_SM_F(a.s_o) + u;

        const float other = a.n_o == 1 ? 0.0f : o[a.max_q*a.d_v];

        *o += other + CAPSULE_SM_F(a.s_m)[2*a.max_q + u/a.d_v]*mean[u%a.d_v];
    }
}

CAPSULE_FN void capsule_attn_store(int tid, int nt, CAPSULE_ARGS, capsule_item it, int step, CAPSULE_GLOBAL char * dst, CAPSULE_SHARED char * sm) {
    for (int i = tid/CAPSULE_LANES; i < it.n_q; i += nt/CAPSULE_LANES) {
        const int row = (it.q0 + i)/a.n_group*a.n_group*a.n_head_kv + it.head*a.n_group + (it.q0 + i)%a.n_group;

        CAPSULE_GLOBAL float * to = (CAPSULE_GLOBAL float *) (dst + row*a.dst.nb1 + it.part*a.dst.nb2);

        for (int c = tid % CAPSULE_LANES; c < a.d_v; c += CAPSULE_LANES) {
            to[c] = CAPSULE_SM_F(a.s_o)[i*a.d_v + c];
        }
        if (tid % CAPSULE_LANES == 0) {
            to[a.d_v]     = CAPSULE_SM_F(a.s_m)[(step & 1)*a.max_q + i];
            to[a.d_v + 1] = CAPSULE_SM_F(a.s_m)[2*a.max_q + i];
        }
    }
}

// item: (part*n_head_kv + head)*n_tiles + tile of queries; rows are T, tiles are U
template <typename T, typename U>
CAPSULE_FN void capsule_attn(capsule_threads t, CAPSULE_ARGS, capsule_ptrs p, CAPSULE_SHARED char * sm, int item) {
    capsule_item it = capsule_item_of(a, item);

    CAPSULE_SHARED U   * tile  = CAPSULE_SM_U(a.s_tile);

    const bool hot     = it.part < a.n_parts_hot;
    const int  n_units = hot ? (a.n_kv + a.N - 1)/a.N : a.n_slots;
    const int  n_parts = hot ? a.n_parts_hot : a.n_parts - a.n_parts_hot;
    const int  i_part  = hot ? it.part : it.part - a.n_parts_hot;

    CAPSULE_PHASE(capsule_attn_init(tid, t.n, a, it, p.q, sm));
    if (!hot) {
        // slots know nothing of the rotation of a quantized cache
        CAPSULE_HADAMARD(float, CAPSULE_SM_F(a.s_q), a.max_q, a.d_k, a.d_k, a.rot_k);
    }

    int step  = 0; // units that are visible
    int check = 0;
    int made  = -1; // the slot that the vectors are for, those of the queries [made0, made1)
    int made0 = 0;
    int made1 = 0;
    for (int i = (int) ((int64_t) n_units*i_part/n_parts); i < (int) ((int64_t) n_units*(i_part + 1)/n_parts); ++i) {
        const int64_t col = (int64_t) i*a.N;
        const int     n   = hot ? capsule_min(a.N, a.n_kv - (int) col) : a.N;

        CAPSULE_PARAM const capsule_tensor & mask = hot ? a.mask : a.cold;
        CAPSULE_GLOBAL const char          * data = hot ? p.mask : p.cold;

        CAPSULE_PHASE(
            capsule_attn_visible(tid, t.n, a, it, mask, data, col, n, check, sm);
            if (made >= 0) {
                capsule_attn_moved(tid, t.n, a, p.rope, i, made, check, sm);
            }
        );
        const bool seen  = capsule_item_window(a, it, CAPSULE_FLAGS(check));
        const bool moved = CAPSULE_FLAGS(check)[CAPSULE_FLAG_MOVED];

        check++;
        if (!seen) {
            continue;
        }

        CAPSULE_GLOBAL const char * slot = hot ? p.k : capsule_slot(a, p.blob0, p.blob1, i);

        CAPSULE_PARAM const capsule_tier & tier = a.tiers[hot ? 0 : capsule_tier_of(a, i)];

        capsule_vectors vs;
        vs.n_var = 0;
        if (!hot) {
            vs = capsule_vectors_of(a, p.rope, i);
        }
        if (vs.n_var > 0) {
            const int v0 = it.i0*vs.n_var;
            const int v1 = it.i1*vs.n_var;

            if (made < 0 || moved || it.i0 < made0 || it.i1 > made1 || !capsule_same_vectors(a, p.rope, i, made)) {
                capsule_vectors_init(t, a, vs, v0, v1, p.weights, p.rope, i, it.head, sm);
                made  = i;
                made0 = it.i0;
                made1 = it.i1;
            }
            CAPSULE_GLOBAL const char * head = slot + tier.k.offs + it.head*tier.k.head_stride;
#if defined(CAPSULE_MMA)
            if (sizeof(T) == 2 && a.mma_t && !vs.retain) {
                capsule_query_mma(t, a, tier.k, head, v0, v1, p.weights + a.w_k_basis_h, sm);
            } else
#endif
            {
                CAPSULE_PHASE((capsule_load_codes(tid, t.n, a, tier.k, head, a.d_k, sm)));
                CAPSULE_PHASE((capsule_query_dots(tid, t.n, a, vs, v0, v1, tier.k.n_rows, p.weights, sm)));
                if (!vs.retain && v1 - v0 == 1) {
                    CAPSULE_PHASE((capsule_query_terms<1>(tid, t.n, a, v0, v1, tier.k.n_rows, p.weights + a.w_k_basis, sm)));
                } else if (!vs.retain) {
                    CAPSULE_PHASE((capsule_query_terms<4>(tid, t.n, a, v0, v1, tier.k.n_rows, p.weights + a.w_k_basis, sm)));
                }
            }
            CAPSULE_PHASE((capsule_attn_query_scores(tid, t.n, a, it, vs, tier.k.n_rows, data, col, p.weights, sm)));
        } else if (!hot) {
            capsule_rows_k<T>(t, a, tier, slot, p.weights, it.head, sm);
        }
        for (int first = 0; first < n && vs.n_var == 0; first += a.n_chunk) {
            const int n_tile = capsule_min(a.n_chunk, n - first);

            if (hot) {
                CAPSULE_PHASE((capsule_attn_load_hot<U>(tid, t.n, a, p.k, it.head, col + first, n_tile, tile)));
            } else {
                capsule_tile_k<T, U>(t, a, tier, p.weights, capsule_rope_of(a, p.rope, i), it.head, first, n_tile, sm);
            }
            CAPSULE_PHASE_Q(capsule_attn_scores, tid, t.n, a, it, mask, data, col + first, first, n_tile, tile, sm);
        }

        CAPSULE_GLOBAL const char * head = slot + tier.v.offs + it.head*tier.v.head_stride; // values
#if defined(CAPSULE_MMA)
        if (sizeof(T) == 2 && !hot && a.mma_v) {
            CAPSULE_PHASE(
                capsule_attn_max(tid, t.n, a, it, n, sm);
                capsule_load_rows(tid, t.n, tier.v, head, a.d_v, a.d_v + 8, a.n_mma, (capsule_half *) (sm + a.s_v_rows));
            );
            CAPSULE_PHASE(
                capsule_attn_softmax(tid, t.n, a, it, n, step, sm);
                capsule_attn_half_weights(tid, t.n, a, it, n, sm);
            );
            capsule_attn_mma_values(t, a, it, p.weights + a.w_v_basis_h, tier.v.n_rows, step, sm);
            step++;
            continue;
        }
#endif
        CAPSULE_PHASE(
            capsule_attn_max(tid, t.n, a, it, n, sm);
            if (!hot && tier.codes) {
                capsule_load_codes(tid, t.n, a, tier.v, head, a.d_v, sm);
            }
        );
        CAPSULE_PHASE(capsule_attn_softmax(tid, t.n, a, it, n, step, sm));

        if (hot) {
            CAPSULE_PHASE_Q(capsule_attn_hot_values, tid, t.n, a, it, p.v, col, n, step, sm);
        } else {
            CAPSULE_PHASE_Q(capsule_attn_row_weights, tid, t.n, a, it, p.weights + a.w_v_basis_t, tier.v.n_rows, sm);
            if (tier.codes) {
                CAPSULE_PHASE_Q(capsule_attn_code_values, tid, t.n, a, it, tier.v.n_rows, step, sm);
            } else {
                CAPSULE_PHASE_Q(capsule_attn_row_values, tid, t.n, a, it, tier.v, head, step, sm);
            }
        }
        step++;
    }

    CAPSULE_PHASE(capsule_attn_sum(tid, a, sm));
    if (!hot) {
        CAPSULE_SHARED float * o = CAPSULE_SM_F(a.s_o);

        CAPSULE_HADAMARD(float, o + (a.n_o - 1)*a.max_q*a.d_v, a.max_q, a.d_v, a.d_v, a.n_rot_o);
        CAPSULE_PHASE(capsule_attn_join(tid, t.n, a, p.weights + a.w_v_mean + it.head*a.d_v, sm));
        CAPSULE_HADAMARD(float, o, a.max_q, a.d_v, a.d_v, a.rot_v);
    }
    CAPSULE_PHASE(capsule_attn_store(tid, t.n, a, it, step, p.dst, sm));
}

//
// the parts of a row -> the result, value c
//

CAPSULE_FN float capsule_combine(CAPSULE_ARGS, CAPSULE_GLOBAL const char * parts, int row, int c) {
    float m = CAPSULE_NEG;
    for (int p = 0; p < a.n_parts; ++p) {
        const float x = ((CAPSULE_GLOBAL const float *) (parts + row*a.q.nb1 + p*a.q.nb2))[a.d_v];
        m = x > m ? x : m;
    }

    float l = 0.0f;
    float o = 0.0f;
    for (int p = 0; p < a.n_parts; ++p) {
        CAPSULE_GLOBAL const float * x = (CAPSULE_GLOBAL const float *) (parts + row*a.q.nb1 + p*a.q.nb2);

        const float f = CAPSULE_EXP(x[a.d_v] - m);

        l += f*x[a.d_v + 1];
        o += f*x[c];
    }
    return l == 0.0f ? 0.0f : o/l; // NaN stays NaN
}
