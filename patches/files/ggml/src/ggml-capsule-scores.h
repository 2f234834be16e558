#pragma once

#include "ggml-capsule-query.h"

//
// attention: what a group of threads does (a part of the hot cells or of the slots, for at most n_q queries of a KV head), scores and weights
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
