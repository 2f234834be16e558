#pragma once

#include "ggml-capsule-tile.h"

//
// unpack: a slot and head -> columns of the cache
//

// the first value of largest magnitude in a block of 32
template <typename T>
CAPSULE_FN float capsule_largest(CAPSULE_SHARED const T * x) {
    float res = 0.0f;
    for (int c = 0; c < 32; ++c) {
        const float y = capsule_float(x[c]);
        if (capsule_abs(y) > capsule_abs(res)) {
            res = y;
        }
    }
    return res;
}

// a block of 32 values as ggml's quantize_row_q8_0_ref and quantize_row_q4_0_ref
template <typename T>
CAPSULE_FN void capsule_quantize(int type, CAPSULE_SHARED const T * x, CAPSULE_GLOBAL char * block) {
    const float max = capsule_largest<T>(x);

    const float d  = type == CAPSULE_Q8_0 ? CAPSULE_DIV(capsule_abs(max), 127.0f) : CAPSULE_DIV(max, -8.0f);
    const float id = d != 0.0f ? CAPSULE_DIV(1.0f, d) : 0.0f;

    capsule_put(*(CAPSULE_GLOBAL capsule_half *) block, d);

    CAPSULE_GLOBAL uint8_t * qs = (CAPSULE_GLOBAL uint8_t *) (block + 2);

    if (type == CAPSULE_Q8_0) {
        for (int c = 0; c < 32; ++c) {
            const float y = capsule_float(x[c])*id;
            qs[c] = (uint8_t) (int8_t) (int) (y < 0.0f ? y - 0.5f : y + 0.5f);
        }
        return;
    }
    for (int c = 0; c < 16; ++c) {
        const int y0 = (int) (capsule_float(x[c     ])*id + 8.5f);
        const int y1 = (int) (capsule_float(x[c + 16])*id + 8.5f);
        qs[c] = (uint8_t) ((y0 < 15 ? y0 : 15) | (y1 < 15 ? y1 : 15) << 4);
    }
}

// n columns, the first of them is col
template <typename T>
CAPSULE_FN void capsule_store(int tid, int nt, CAPSULE_ARGS, CAPSULE_SHARED const T * tile, int d, int i_head, int col, int n, CAPSULE_GLOBAL char * dst) {
    const int type = a.dst.type;

    if (a.is_v && a.v_trans) {
        // a row per channel
        for (int c = tid/CAPSULE_LANES; c < d; c += nt/CAPSULE_LANES) {
            CAPSULE_GLOBAL char * row = dst + (int64_t) (i_head*d + c)*a.dst.nb1;
            for (int j = tid % CAPSULE_LANES; j < n; j += CAPSULE_LANES) {
                const float x = capsule_float(tile[j*a.ld_tile + c]);
                if (type == CAPSULE_F32) {
                    ((CAPSULE_GLOBAL float *) row)[col + j] = x;
                } else {
                    capsule_put(((CAPSULE_GLOBAL capsule_half *) row)[col + j], x);
                }
            }
        }
        return;
    }

    for (int j = tid/CAPSULE_LANES; j < n; j += nt/CAPSULE_LANES) {
        CAPSULE_GLOBAL char    * row = dst + (int64_t) (col + j)*a.dst.nb1;
        CAPSULE_SHARED const T * x   = tile + j*a.ld_tile;

        if (type == CAPSULE_Q8_0 || type == CAPSULE_Q4_0) {
            for (int b = tid % CAPSULE_LANES; b < d/32; b += CAPSULE_LANES) {
                capsule_quantize<T>(type, x + b*32, row + (i_head*(d/32) + b)*(type == CAPSULE_Q8_0 ? 34 : 18));
            }
            continue;
        }
        for (int c = tid % CAPSULE_LANES; c < d; c += CAPSULE_LANES) {
            if (type == CAPSULE_F32) {
                ((CAPSULE_GLOBAL float *) row)[i_head*d + c] = capsule_float(x[c]);
            } else {
                capsule_put(((CAPSULE_GLOBAL capsule_half *) row)[i_head*d + c], capsule_float(x[c]));
            }
        }
    }
}

// item: slot*n_head_kv + head; rows are T, tiles are U
template <typename T, typename U>
CAPSULE_FN void capsule_unpack(capsule_threads t, CAPSULE_ARGS, capsule_ptrs p, CAPSULE_SHARED char * sm, int item) {
    const int i_slot = item/a.n_head_kv;
    const int i_head = item%a.n_head_kv;

    CAPSULE_PARAM const capsule_tier & tier = a.tiers[capsule_tier_of(a, i_slot)];

    CAPSULE_GLOBAL const char * slot = capsule_slot(a, p.blob0, p.blob1, i_slot);
    CAPSULE_SHARED U          * tile = CAPSULE_SM_U(a.s_tile);

    const capsule_rope rope = capsule_rope_of(a, p.rope, i_slot);

    const int d   = a.is_v ? a.d_v   : a.d_k;
    const int rot = a.is_v ? a.rot_v : a.rot_k;

    capsule_rows_kv<T>(t, a, tier, slot, p.weights, i_head, sm);

    for (int first = 0; first < a.N; first += a.n_chunk) {
        const int n = capsule_min(a.n_chunk, a.N - first);

        capsule_tile_kv<T, U>(t, a, tier, p.weights, rope, i_head, first, n, sm);
        CAPSULE_HADAMARD(U, tile, n, d, a.ld_tile, rot);
        CAPSULE_PHASE((capsule_store<U>(tid, t.n, a, tile, d, i_head, i_slot*a.N + first, n, p.dst)));
    }
}
