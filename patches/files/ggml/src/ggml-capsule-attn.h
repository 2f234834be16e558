#pragma once

#include "ggml-capsule-query.h"

//
// attention: a part of the hot cells or of the slots, for at most n_q queries of a KV head
//

struct capsule_item {
    int part;
    int head;
    int q0; // first query, token by token
    int n_q;
    int i0; // of these, the ones that see something of a slot (or of hot cells): [i0, i1)
    int i1;
};

CAPSULE_FN capsule_item capsule_item_of(CAPSULE_ARGS, int item) {
    capsule_item it;
    it.head = item/a.n_tiles%a.n_head_kv;
    it.part = item/a.n_tiles/a.n_head_kv;
    it.q0   = item%a.n_tiles*a.n_q;
    it.n_q  = a.n_group*a.n_tokens - it.q0;
    it.n_q  = capsule_min(it.n_q, a.n_q);
    it.i0   = 0;
    it.i1   = it.n_q;
    return it;
}

// what the phases tell each other, for 3 units of columns: which tokens see something, and whether the vectors have to be made anew
#define CAPSULE_FLAG_MOVED  8
#define CAPSULE_FLAGS(step) ((CAPSULE_SHARED int *) (sm + a.s_flags) + (step) % 3*CAPSULE_N_FLAGS)

// false: no query sees anything of these columns
CAPSULE_FN bool capsule_item_window(CAPSULE_ARGS, CAPSULE_PRIVATE capsule_item & it, CAPSULE_SHARED const int * flags) {
    const int t0 = it.q0/a.n_group;

    it.i0 = it.n_q;
    it.i1 = 0;
    for (int i = 0; i < CAPSULE_FLAG_MOVED; ++i) {
        if (flags[i]) {
            it.i0 = capsule_min(it.i0, (t0 + i)*a.n_group - it.q0);
            it.i1 = capsule_min(it.n_q, (t0 + i + 1)*a.n_group - it.q0);
        }
    }
    it.i0 = it.i0 < 0 ? 0 : it.i0;
    if (it.i1 - it.i0 > 1) {
        it.i0 = it.i0/4*4; // in groups of 4
    }
    return it.i1 > 0;
}

// groups of B queries
template <int B>
CAPSULE_FN int capsule_n_groups(capsule_item it) {
    return (it.i1 - it.i0 + B - 1)/B;
}

// of 4, if there is more than one
#define CAPSULE_PHASE_Q(name, ...) \
    do { \
        if (it.i1 - it.i0 == 1) { \
            CAPSULE_PHASE((name<1>(__VA_ARGS__))); \
        } else { \
            CAPSULE_PHASE((name<4>(__VA_ARGS__))); \
        } \
    } while (0)

CAPSULE_FN void capsule_attn_init(int tid, int nt, CAPSULE_ARGS, capsule_item it, CAPSULE_GLOBAL const char * q, CAPSULE_SHARED char * sm) {
    for (int i = tid/CAPSULE_LANES; i < a.max_q; i += nt/CAPSULE_LANES) {
        const int i_token = (it.q0 + i)/a.n_group;
        const int i_head  = (it.q0 + i)%a.n_group + it.head*a.n_group;

        CAPSULE_GLOBAL const float * src = (CAPSULE_GLOBAL const float *) (q + i_head*a.q.nb1 + i_token*a.q.nb2);

        for (int c = tid % CAPSULE_LANES; c < a.d_k; c += CAPSULE_LANES) {
            CAPSULE_SM_F(a.s_q)[i*a.d_k + c] = i < it.n_q ? a.scale*src[c] : 0.0f;
        }
    }
    for (int i = tid; i < a.n_o*a.max_q*a.d_v; i += nt) {
        CAPSULE_SM_F(a.s_o)[i] = 0.0f;
    }
    for (int i = tid; i < a.max_q*CAPSULE_LANES; i += nt) {
        CAPSULE_SM_F(a.s_red)[a.max_q*CAPSULE_LANES + i] = 0.0f;
    }
    for (int i = tid; i < 2*a.max_q; i += nt) {
        CAPSULE_SM_F(a.s_m)[i] = CAPSULE_NEG;
    }
    for (int i = tid; i < 3*CAPSULE_N_FLAGS; i += nt) {
        CAPSULE_FLAGS(0)[i] = 0;
    }
}

// which tokens see any of the columns [col, col + n)? the flags of the step after next are cleared: nobody reads those any more
CAPSULE_FN void capsule_attn_visible(int tid, int nt, CAPSULE_ARGS, capsule_item it, CAPSULE_PARAM const capsule_tensor & mask, CAPSULE_GLOBAL const char * data,
        int64_t col, int n, int step, CAPSULE_SHARED char * sm) {
    for (int i = tid; i < CAPSULE_N_FLAGS; i += nt) {
        CAPSULE_FLAGS(step + 1)[i] = 0;
    }

    const int t0 = it.q0/a.n_group;
    const int t1 = (it.q0 + it.n_q - 1)/a.n_group;

    for (int i = t0; i <= t1; ++i) {
        bool any = false;
        for (int j = tid; j < n; j += nt) {
            any = any || capsule_mask(mask.type, data + i*mask.nb1, (int) col + j) != CAPSULE_NEG;
        }
        if (any) {
            CAPSULE_RAISE(CAPSULE_FLAGS(step)[i - t0]);
        }
    }
}

// do the first positions of two slots differ?
CAPSULE_FN void capsule_attn_moved(int tid, int nt, CAPSULE_ARGS, CAPSULE_GLOBAL const float * tables, int i_slot, int j_slot, int step, CAPSULE_SHARED char * sm) {
    bool any = false;
    for (int c = tid; c < a.n_rot; c += nt) {
        any = any || tables[i_slot*a.n_rot + c] != tables[j_slot*a.n_rot + c];
    }
    if (any) {
        CAPSULE_RAISE(CAPSULE_FLAGS(step)[CAPSULE_FLAG_MOVED]);
    }
}

// n hot cells from col on -> tile
template <typename T>
CAPSULE_FN void capsule_attn_load_hot(int tid, int nt, CAPSULE_ARGS, CAPSULE_GLOBAL const char * k, int i_head, int64_t col, int n, CAPSULE_SHARED T * tile) {
    for (int j = tid/CAPSULE_LANES; j < n; j += nt/CAPSULE_LANES) {
        CAPSULE_GLOBAL const char * row = k + i_head*a.k.nb1 + (col + j)*a.k.nb2;
        for (int c = tid % CAPSULE_LANES; c < a.d_k; c += CAPSULE_LANES) {
            capsule_put(tile[j*a.ld_tile + c], capsule_value(a.k.type, row, c));
        }
    }
}

CAPSULE_FN void capsule_attn_put_score(CAPSULE_ARGS, capsule_item it, CAPSULE_PARAM const capsule_tensor & mask, CAPSULE_GLOBAL const char * data, int i, int j, int col,
        float s, CAPSULE_SHARED char * sm) {
    const float m = capsule_mask(mask.type, data + (it.q0 + i)/a.n_group*mask.nb1, col);
    CAPSULE_SM_F(a.s_s)[i*a.N + j] = m == CAPSULE_NEG ? CAPSULE_NEG : s + m;
}

template <int B, typename T>
CAPSULE_FN void capsule_attn_dot(CAPSULE_ARGS, CAPSULE_SHARED const T * x, CAPSULE_SHARED const float * q, CAPSULE_PRIVATE float * s) {
    for (int c = 0; c < a.d_k; ++c) {
        const float y = capsule_float(x[c]);

        CAPSULE_UNROLL
        for (int b = 0; b < B; ++b) {
            s[b] += y*q[b*a.d_k + c];
        }
    }
}

#if defined(CAPSULE_MMA)
// rows of tiles that tensor cores wrote are aligned to 16 bytes: 4 channels at a time, so that threads with different rows do not meet in a bank
template <int B>
CAPSULE_FN void capsule_attn_dot(CAPSULE_ARGS, const float * x, const float * q, float * s) {
    if (!a.mma) {
        capsule_attn_dot<B, float>(a, x, q, s);
        return;
    }
    CAPSULE_UNROLL_2
    for (int c = 0; c < a.d_k; c += 4) {
        const capsule_vec4 y = capsule_load4(x + c);

        CAPSULE_UNROLL
        for (int b = 0; b < B; ++b) {
            const capsule_vec4 z = capsule_load4(q + b*a.d_k + c);

            CAPSULE_UNROLL
            for (int i = 0; i < 4; ++i) {
                s[b] += y.x[i]*z.x[i];
            }
        }
    }
}
#endif

// s = q*tile + mask, for n columns from col on, which go to s from first on
template <int B, typename T>
CAPSULE_FN void capsule_attn_scores(int tid, int nt, CAPSULE_ARGS, capsule_item it, CAPSULE_PARAM const capsule_tensor & mask, CAPSULE_GLOBAL const char * data,
        int64_t col, int first, int n, CAPSULE_SHARED const T * tile, CAPSULE_SHARED char * sm) {
    for (int u = tid; u < n*capsule_n_groups<B>(it); u += nt) {
        const int j = u%n;
        const int i = it.i0 + u/n*B;

        CAPSULE_SHARED const float * q = CAPSULE_SM_F(a.s_q) + i*a.d_k;
        CAPSULE_SHARED const T     * x = tile + j*a.ld_tile;

        float s[B] = { 0.0f };
        capsule_attn_dot<B>(a, x, q, s);

        CAPSULE_UNROLL
        for (int b = 0; b < B; ++b) {
            if (i + b < it.i1) {
                capsule_attn_put_score(a, it, mask, data, i + b, first + j, (int) col + j, s[b], sm);
            }
        }
    }
}

// the same from products with vectors, for a whole slot
CAPSULE_FN void capsule_attn_query_scores(int tid, int nt, CAPSULE_ARGS, capsule_item it, capsule_vectors vs, int n_rows, CAPSULE_GLOBAL const char * data, int64_t col,
        CAPSULE_GLOBAL const float * weights, CAPSULE_SHARED char * sm) {
    CAPSULE_GLOBAL const int32_t * order = (CAPSULE_GLOBAL const int32_t *) weights + a.w_token_order;

    for (int u = tid; u < a.N*(it.i1 - it.i0); u += nt) {
        const int i = it.i0 + u/a.N;
        const int j = u%a.N;
        const int x = vs.retain ? order[j] : j;

        capsule_attn_put_score(a, it, a.cold, data, i, x, (int) col + x, vs.retain ? capsule_query_retain(a, vs, n_rows, i, j, sm) : capsule_query_pca(a, vs, i, j, sm), sm);
    }
}

CAPSULE_FN void capsule_attn_max(int tid, int nt, CAPSULE_ARGS, capsule_item it, int n, CAPSULE_SHARED char * sm) {
    const int lane = tid % CAPSULE_LANES;

    for (int i = it.i0 + tid/CAPSULE_LANES; i < it.i1; i += nt/CAPSULE_LANES) {
        float m = CAPSULE_NEG;
        for (int j = lane; j < n; j += CAPSULE_LANES) {
            const float s = CAPSULE_SM_F(a.s_s)[i*a.N + j];
            m = s > m ? s : m;
        }
        CAPSULE_SM_F(a.s_red)[i*CAPSULE_LANES + lane] = m;
    }
}

// s -> weights; the maxima are kept twice: this step reads [step] and writes [step + 1]
CAPSULE_FN void capsule_attn_softmax(int tid, int nt, CAPSULE_ARGS, capsule_item it, int n, int step, CAPSULE_SHARED char * sm) {
    const int lane = tid % CAPSULE_LANES;

    CAPSULE_SHARED float * m_old = CAPSULE_SM_F(a.s_m) + (step & 1)*a.max_q;
    CAPSULE_SHARED float * m_new = CAPSULE_SM_F(a.s_m) + (~step & 1)*a.max_q;
    CAPSULE_SHARED float * red   = CAPSULE_SM_F(a.s_red);
    CAPSULE_SHARED float * sum   = red + a.max_q*CAPSULE_LANES;

    for (int i = tid/CAPSULE_LANES; i < it.n_q; i += nt/CAPSULE_LANES) {
        float m = m_old[i];
        if (i < it.i0 || i >= it.i1) {
            if (lane == 0) {
                m_new[i] = m;
            }
            continue;
        }
        for (int b = 0; b < CAPSULE_LANES; ++b) {
            const float x = red[i*CAPSULE_LANES + b];
            m = x > m ? x : m;
        }

        float l = 0.0f;
        for (int j = lane; j < n; j += CAPSULE_LANES) {
            const float s = CAPSULE_SM_F(a.s_s)[i*a.N + j];
            const float x = s == CAPSULE_NEG ? 0.0f : CAPSULE_EXP(s - m);
            CAPSULE_SM_F(a.s_s)[i*a.N + j] = x;
            l += x;
        }

        sum[i*CAPSULE_LANES + lane] = sum[i*CAPSULE_LANES + lane]*CAPSULE_EXP(m_old[i] - m) + l;
        if (lane == 0) {
            m_new[i] = m;
        }
    }
}

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
    return l > 0.0f ? o/l : 0.0f;
}
