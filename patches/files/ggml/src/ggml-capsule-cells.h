#pragma once

#include "ggml-capsule-unpack.h"

//
// cells of the cache -> the tokens of a block and head
//

// K or V of a block and head, the slot that it goes to
struct capsule_block {
    CAPSULE_PARAM const capsule_tier * tier;
    CAPSULE_PARAM const capsule_part * part;

    CAPSULE_GLOBAL const char    * cells;
    CAPSULE_GLOBAL const int32_t * index;  // [N]
    CAPSULE_GLOBAL const float   * angles; // [N][n_rot]
    CAPSULE_GLOBAL const int32_t * order;  // of the tokens, 0: as they are
    CAPSULE_GLOBAL const float   * less;   // what is taken away from them, 0: nothing
    CAPSULE_GLOBAL const float   * none;   // what is there instead of one that is not, 0: zeros
    CAPSULE_GLOBAL const float   * mean;
    CAPSULE_GLOBAL const float   * basis;

    int64_t slot; // in bytes
    int     i_head;
    int     d;
    bool    retain;
};

// item: block*n_head_kv + head
CAPSULE_FN capsule_block capsule_block_of(CAPSULE_ARGS, capsule_ptrs p, int item) {
    const int i_block = item/a.n_head_kv;

    capsule_block res;
    res.tier   = &a.tiers[a.i_tier];
    res.part   = a.is_v ? &res.tier->v : &res.tier->k;
    res.i_head = item%a.n_head_kv;
    res.d      = a.is_v ? a.d_v : a.d_k;
    res.retain = !a.is_v && res.tier->retain;
    res.cells  = p.q;
    res.index  = (CAPSULE_GLOBAL const int32_t *) p.k + i_block*(a.N + 1);
    res.angles = (CAPSULE_GLOBAL const float   *) p.v + (int64_t) i_block*a.N*a.n_rot;
    res.mean   = p.weights + (a.is_v ? a.w_v_mean  : a.w_k_mean) + res.i_head*res.d;
    res.basis  = p.weights + (a.is_v ? a.w_v_basis : a.w_k_basis);
    res.slot   = (int64_t) res.index[a.N]*res.tier->slot_size;
    res.order  = 0;
    res.less   = 0;
    res.none   = 0;
    return res;
}

// j: in order
CAPSULE_FN int capsule_token(CAPSULE_ARGS, capsule_block b, int j) {
    return b.order && j < a.N ? b.order[j] : j;
}

// < 0: there is none
CAPSULE_FN int capsule_cell(CAPSULE_ARGS, capsule_block b, int j) {
    return j < a.N ? b.index[capsule_token(a, b, j)] : -1;
}

// n tokens from first on as they are cached, zero where there is none
CAPSULE_FN void capsule_load_cells(int tid, int nt, CAPSULE_ARGS, capsule_block b, int first, int n, CAPSULE_SHARED float * x) {
    for (int u = tid; u < n*b.d; u += nt) {
        const bool trans = a.is_v && a.v_trans;

        // threads side by side read what lies side by side
        const int j = trans ? u%n : u/b.d;
        const int c = trans ? u/n : u%b.d;
        const int i = capsule_cell(a, b, first + j);

        const int64_t row = trans ? b.i_head*b.d + c : i;

        x[j*a.ld_tile + c] = i < 0 ? 0.0f : capsule_value(a.q.type, b.cells + row*a.q.nb1, trans ? i : b.i_head*b.d + c);
    }
}

// undoes RoPE
CAPSULE_FN void capsule_turn_back(int tid, int nt, CAPSULE_ARGS, capsule_block b, int first, int n, CAPSULE_SHARED float * x) {
    const int n_pairs = b.d/2;

    for (int u = tid; u < n*n_pairs; u += nt) {
        const int j  = u/n_pairs;
        const int p  = u%n_pairs;
        const int c0 = capsule_pair0(a, p);
        const int c1 = capsule_pair1(a, p);

        CAPSULE_SHARED float * row = x + j*a.ld_tile;

        if (capsule_cell(a, b, first + j) < 0) {
            row[c0] = b.none ? b.none[c0] : 0.0f;
            row[c1] = b.none ? b.none[c1] : 0.0f;
            continue;
        }

        float x0 = row[c0];
        float x1 = row[c1];
        if (p < a.n_rot/2) {
            // (cos, sin) lie where the channels do
            CAPSULE_GLOBAL const float * angles = b.angles + capsule_token(a, b, first + j)*a.n_rot;

            const float y0 = x0*angles[c0] - x1*angles[c1];
            x1 = x0*angles[c1] + x1*angles[c0];
            x0 = y0;
        }
        row[c0] = b.less ? x0 - b.less[c0] : x0;
        row[c1] = b.less ? x1 - b.less[c1] : x1;
    }
}

// n tokens from first on, as they were before RoPE and the rotation of the cache -> [n][ld_tile]
CAPSULE_FN void capsule_tokens(capsule_threads t, CAPSULE_ARGS, capsule_block b, int first, int n, CAPSULE_SHARED float * x) {
    CAPSULE_PHASE((capsule_load_cells(tid, t.n, a, b, first, n, x)));
    CAPSULE_HADAMARD(float, x, n, b.d, a.ld_tile, a.is_v ? a.rot_v : a.rot_k);
    CAPSULE_PHASE((capsule_turn_back(tid, t.n, a, b, first, n, x)));
}
