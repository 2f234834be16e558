#include "ggml-capsule-layout.h"

#include "ggml-impl.h"

#include <algorithm>

//
// GGML_OP_CAPSULE: what its kernels are told, and how they use shared memory
//

static void capsule_tensor_init(capsule_tensor & res, const ggml_tensor * t, int i1, int i2) {
    if (t) {
        res.type = capsule_type_of(t->type);
        res.nb1  = t->nb[i1];
        res.nb2  = t->nb[i2];
    }
}

// vectors that a query becomes
static int capsule_n_vectors(const capsule_args & a, const capsule_tier & tier) {
    return tier.retain ? a.N + (a.N - a.n_kept)*a.n_neighbours : a.n_rot == 0 ? 1 : a.n_terms;
}

// layout of the shared memory for these n_q, max_q and n_chunk
static void capsule_shared_init(capsule_args & a, int op) {
    const int  size = a.tile_f32 ? 4 : 2;
    const bool attn = op == GGML_CAPSULE_OP_ATTN;

    const int size_tile = a.mma ? 4 : size;

    int n_rows_k = 0; // of keys that are rebuilt
    int n_rows_v = 0;
    int n_codes  = 0;
    int n_vec    = 0;
    int n_mean   = 0; // vectors of pca, n_vec: those in 8 bits
    int n_dots   = 0;
    int n_terms  = 0;
    bool mlp     = false;
    bool plain   = false;
    bool rotated = false;
    for (const auto & tier : a.tiers) {
        if (tier.n_slots == 0) {
            continue;
        }
        // pca: a pattern may have no terms
        if (!tier.query || !tier.retain) {
            n_rows_k = std::max(n_rows_k, tier.k.n_rows);
        }
        if (tier.query) {
            const int n = tier.retain ? a.n_q*capsule_n_vectors(a, tier) : std::min(a.n_q*capsule_n_vectors(a, tier), CAPSULE_MAX_VECTORS);

            if (!tier.retain) {
                n_mean = std::max(n_mean, n);
            }
            if (tier.retain || !a.mma_t) {
                n_codes = std::max(n_codes, tier.k.n_rows);
                n_vec   = std::max(n_vec,   n);
                n_dots  = std::max(n_dots,  tier.retain ? n : n*tier.k.n_rows);
                n_terms = std::max(n_terms, tier.retain ? 0 : n*a.n_pad);
            }
        }
        if (tier.codes && attn && !a.mma_v) {
            n_codes = std::max(n_codes, tier.v.n_rows);
        }
        n_rows_v = std::max(n_rows_v, tier.v.n_rows);
        mlp      = mlp     || (tier.retain && a.n_mlp > 0 && !a.is_v);
        plain    = plain   || tier.v.n_plain > 0;
        rotated  = rotated || tier.v.n_plain < tier.v.n_rows;
    }

    a.ld_dots  = GGML_PAD(n_mean, 16) + 8;
    a.ld_terms = GGML_PAD(n_mean, 16) + 4;

    const int d = a.is_v ? a.d_v : a.d_k;

    // an odd number of banks, so that threads can go through different rows side by side; tensor cores want multiples of 16 bytes
    a.ld_rows  = a.mma ? d + 8 : d;
    a.ld_tile  = a.mma ? d + 4 : d + (a.tile_f32 ? 1 : 2);
    a.ld_w     = a.mma_v ? a.n_mma + 4 : n_rows_v + 1;
    a.ld_half  = a.n_mma + 8;
    a.ld_z     = GGML_PAD(a.n_mlp, 16) + 8;
    a.ld_up    = GGML_PAD(a.n_neighbours*a.n_mlp, 16);
    a.ld_u     = a.ld_up + 4;
    a.ld_codes = std::max(a.d_k, a.d_v)/4 + 1;
    a.ld_make  = a.d_k + 1;
    a.n_o      = plain && rotated ? 2 : 1;
    a.n_rot_o  = rotated ? a.d_v & -a.d_v : 0;

    int n = 0;
    auto add = [&](int & offs, int bytes) {
        offs = n;
        n   += GGML_PAD(bytes, 32);
    };

    const int n_rows = a.is_v ? n_rows_v : n_rows_k;

    add(a.s_rows, (a.mma && n_rows > 0 ? a.n_mma : n_rows)*a.ld_rows*size);
    // U of the key MLP is gone when the tile is written
    const int size_u = a.mma && mlp ? GGML_PAD(a.n_kept, 16)*a.ld_u*4 : 0;

    add(a.s_tile, std::max(a.n_chunk*a.ld_tile*size_tile, size_u));
    add(a.s_z,    !mlp ? 0 : a.mma ? a.n_mma*a.ld_z*2 : (a.N - a.n_kept)*a.n_mlp*4);
    a.s_u = a.s_tile;
    if (attn) {
        // in the same place
        const int n_tile = n;
        n = 0;
        add(a.s_dots,   n_dots*4);
        if (!a.mma_v) {
            a.s_w = a.s_dots;
            n = std::max<int>(n, a.s_w + GGML_PAD(a.max_q*a.ld_w*4, 32));
        }
        add(a.s_codes,  n_codes*a.ld_codes*4);
        add(a.s_scales, n_codes*(std::max(a.d_k, a.d_v)/32)*4);
        a.s_terms = a.s_codes;
        n = std::max<int>(n, a.s_terms + GGML_PAD(n_terms*4, 32));

        int n_most = std::max(n_tile, n);
        auto next = [&]() {
            n_most = std::max(n_most, n);
            n      = 0;
        };
        next();
        if (n_vec + n_mean > 0) {
            add(a.s_make,     CAPSULE_N_MAKE*a.ld_make*4);
            add(a.s_make_red, CAPSULE_N_MAKE*CAPSULE_LANES*4);
            next();
        }
        if (a.mma_t) {
            add(a.s_k_rows, a.n_mma*(a.d_k + 8)*2);
            add(a.s_terms,  a.n_mma*a.ld_terms*4);
            next();
        }
        if (a.mma_v) {
            add(a.s_v_rows, a.n_mma*(a.d_v + 8)*2);
            add(a.s_half,   16*a.ld_half*2);
            add(a.s_w,      16*a.ld_w*4);
            next();
        }
        n = n_most;

        add(a.s_v_codes,  n_vec*a.ld_codes*4);
        add(a.s_v_scales, n_vec*(a.d_k/32)*4);
        a.s_v_half = a.s_v_codes;
        n = std::max<int>(n, a.s_v_half + (a.mma_t ? GGML_PAD(n_mean, 16)*(a.d_k + 8)*2 : 0));
        add(a.s_v_mean,   n_mean*4);

        add(a.s_q,     a.max_q*a.d_k*4);
        add(a.s_s,     a.max_q*a.N*4);
        add(a.s_o,     (a.mma_v ? 16 : a.max_q)*a.d_v*a.n_o*4);
        add(a.s_red,   a.max_q*CAPSULE_LANES*2*4);
        add(a.s_m,     a.max_q*3*4);
        add(a.s_flags, 3*CAPSULE_N_FLAGS*4);
    }
    a.s_size = n;
}

// the largest pieces that fit, of at least n_least queries (or all n_q)
static bool capsule_pieces_init(capsule_args & a, int op, int n_q, int n_least, bool mma_v, size_t max_shared) {
    static const struct { int n_q; int n_chunk; } options[] = { { 8, CAPSULE_MAX_N }, { 8, 32 }, { 8, 16 }, { 4, 32 }, { 4, 16 }, { 4, 8 }, { 2, 16 }, { 1, 16 } };

    for (const auto & option : options) {
        if (option.n_q < std::min(n_q, n_least)) {
            break;
        }
        a.n_q     = std::max(1, std::min(option.n_q, n_q));
        a.max_q   = GGML_PAD(a.n_q, 4);
        a.mma_v   = mma_v && a.n_q >= 4;
        a.n_chunk = std::min(option.n_chunk, a.mma ? a.n_mma : a.n_pad);
        if (a.mma && a.n_chunk % 16 != 0) {
            break;
        }
        capsule_shared_init(a, op);
        if ((size_t) a.s_size <= max_shared) {
            return true;
        }
    }
    return false;
}

// the first form that fits: with tensor cores or without; with the vectors of `retain`, which many queries share more memory for, those of `pca`, or none
static void capsule_form_init(capsule_args & a, int op, int n_q, size_t max_shared, size_t most_shared) {
    static const struct { bool retain; bool pca; bool most; } forms[] = {
        { true, true, false }, { true, true, true }, { false, true, false }, { false, false, false },
    };

    const bool mma   = a.mma;
    const bool mma_t = a.mma_t;
    const bool mma_v = a.mma_v;

    bool query[GGML_CAPSULE_N_TIERS];
    bool retain = false;
    for (int i = 0; i < GGML_CAPSULE_N_TIERS; ++i) {
        query[i] = a.tiers[i].query;
        retain   = retain || (query[i] && a.tiers[i].retain);
    }

    for (const auto & form : forms) {
        if (form.retain && form.most && !retain) {
            continue;
        }
        bool any = false;
        for (int i = 0; i < GGML_CAPSULE_N_TIERS; ++i) {
            a.tiers[i].query = query[i] && (a.tiers[i].retain ? form.retain : form.pca);
            any = any || a.tiers[i].query;
        }
        // keys that are rebuilt, or fetched, are not for one query alone
        const int n_least = any && !form.most ? 2 : 4;

        // tensor cores for everything, not for rows that meet vectors, for nothing
        for (int cores = 2; cores >= 0; --cores) {
            a.mma   = mma   && cores > 0;
            a.mma_t = mma_t && cores > 1 && form.pca;
            if (capsule_pieces_init(a, op, n_q, n_least, mma_v && cores > 0, form.most ? most_shared : max_shared)) {
                return;
            }
        }
    }
}

// layout of the shared memory of encode and errors, with the largest pieces that fit
static void capsule_encode_init(capsule_args & a, int op, size_t max_shared) {
    static const struct { int n_rows; int n_chunk; } options[] = { { CAPSULE_MAX_N, 32 }, { CAPSULE_MAX_N, 16 }, { CAPSULE_MAX_N, 8 }, { 32, 16 }, { 16, 16 }, { 8, 8 } };

    const int    d      = a.is_v ? a.d_v : a.d_k;
    const auto & tier   = a.tiers[a.i_tier];
    const int    n_rows = a.is_v ? tier.v.n_rows : tier.k.n_rows;
    const bool   retain = !a.is_v && tier.retain;
    const bool   errors = op == GGML_CAPSULE_OP_ERRORS;

    // an odd number of banks
    a.ld_rows = d + 1;
    a.ld_tile = d + 1;

    for (const auto & option : options) {
        a.n_chunk   = std::min(option.n_chunk, a.n_pad);
        a.n_chunk_r = errors ? n_rows : std::min(option.n_rows, GGML_PAD(n_rows, 8));

        int n = 0;
        auto add = [&](int & offs, int words) {
            offs = n;
            n   += GGML_PAD(4*words, 32);
        };

        add(a.s_rows, a.n_chunk_r*a.ld_rows);
        if (errors) {
            add(a.s_x,    a.n_chunk*a.ld_tile);
            add(a.s_tile, a.n_chunk*a.ld_tile);
            add(a.s_red,  a.n_chunk*CAPSULE_LANES*2);
            add(a.s_z,    retain ? (a.N - a.n_kept)*a.n_mlp : 0);
            a.s_size = n;
        } else {
            if (retain && n_rows > a.n_kept) {
                add(a.s_kept, a.n_kept*a.ld_rows);
                add(a.s_z,    a.n_chunk_r*a.n_mlp);
            }
            // in the same place; `retain` has its tokens where the rows are
            const int n_shared = n;
            add(a.s_x,    retain ? 0 : a.n_chunk*a.ld_tile);
            const int n_x = n;
            n = n_shared;
            add(a.s_amax, a.n_chunk_r*(d/64));
            add(a.s_best, a.n_chunk_r*(d/64)*CAPSULE_N_FACTORS*2*4);
            a.s_size = std::max(n, n_x);
        }
        if ((size_t) a.s_size <= max_shared) {
            return;
        }
    }
}

// which keys need not be rebuilt, which values stay integers, what tensor cores do
static void capsule_forms_init(capsule_args & a, const ggml_capsule_params & p, bool mma) {
    const int d = a.is_v ? a.d_v : a.d_k;

    // `retain` without a key MLP and hot cells: there are no products
    bool product = a.is_v;
    for (const auto & tier : a.tiers) {
        product = product || (tier.n_slots > 0 && (!tier.retain || a.n_mlp > 0));
    }
    a.mma   = mma && product && !a.tile_f32 && d % 16 == 0;
    a.mma_v = mma && !a.tile_f32 && p.op == GGML_CAPSULE_OP_ATTN && a.n_slots > 0 && a.d_v % 16 == 0;

    for (auto & tier : a.tiers) {
        tier.codes = tier.v.n_plain == 0;
        a.mma_v    = a.mma_v && (tier.codes || tier.n_slots == 0);
        tier.query = (p.flags & GGML_CAPSULE_FLAG_QUERY) && tier.k.n_plain == 0 && tier.n_slots > 0 && p.op == GGML_CAPSULE_OP_ATTN;
        if (tier.retain) {
            tier.query = tier.query && a.n_mlp == 0;
        } else {
            tier.query = tier.query && (a.n_rot == 0 || a.n_terms > 0);
            a.mma_t    = a.mma_t || (tier.query && mma && !a.tile_f32 && d % 16 == 0 && d > CAPSULE_MAX_VECTORS);
        }
    }
}

void ggml_capsule_args_init(const ggml_tensor * op, size_t max_shared, size_t most_shared, bool mma, capsule_args & a, capsule_ptrs & ptrs) {
    const auto p = capsule_params_of(op);
    const auto w = ggml_capsule_weights_layout(&p);

    const auto * src = op->src;

    a = {};

    a.N            = p.n_block;
    a.n_pad        = GGML_PAD(p.n_block, 8);
    a.n_mma        = GGML_PAD(p.n_block, 16);
    a.n_head_kv    = p.n_head_kv;
    a.d_k          = p.d_k;
    a.d_v          = p.d_v;
    a.n_rot        = p.n_rot;
    a.norm         = (p.flags & GGML_CAPSULE_FLAG_NORM) != 0;
    a.rot_k        = (p.flags & GGML_CAPSULE_FLAG_ROT_K) ? p.d_k & -p.d_k : 0;
    a.rot_v        = (p.flags & GGML_CAPSULE_FLAG_ROT_V) ? 64 : 0;
    a.is_v         = p.op != GGML_CAPSULE_OP_ATTN && p.op != GGML_CAPSULE_OP_COMBINE && (p.flags & GGML_CAPSULE_FLAG_V);
    a.i_tier       = (p.flags & GGML_CAPSULE_FLAG_TIER_1) ? 1 : 0;
    a.v_trans      = (p.flags & GGML_CAPSULE_FLAG_V_TRANS) != 0;
    a.tile_f32     = (p.flags & GGML_CAPSULE_FLAG_TILE_F32) != 0;
    a.n_kept       = p.n_kept;
    a.n_mlp        = p.n_mlp;
    a.n_neighbours = p.n_neighbours;
    a.n_terms      = p.n_terms;
    a.n_slots      = p.n_slots[0] + p.n_slots[1];
    a.n_parts_hot  = p.n_parts_hot;
    a.n_parts      = p.n_parts_hot + p.n_parts_cold;
    a.scale        = p.scale;

    a.w_k_mean      = w.k_mean;
    a.w_v_mean      = w.v_mean;
    a.w_k_basis     = w.k_basis;
    a.w_k_basis_h   = w.k_basis_h;
    a.w_v_basis     = w.v_basis;
    a.w_v_basis_h   = w.v_basis_h;
    a.w_v_basis_t   = w.v_basis_t;
    a.w_token_order = w.token_order;
    a.w_neighbours  = w.neighbours;
    a.w_gate        = w.gate;
    a.w_mlp_up      = w.mlp_up;
    a.w_mlp_up_bias = w.mlp_up_bias;
    a.w_mlp_down    = w.mlp_down;
    a.w_mlp_up_h    = w.mlp_up_h;
    a.w_mlp_down_h  = w.mlp_down_h;
    a.w_query_weight = w.query_weight;
    a.r_pattern     = a.n_slots*a.n_rot;
    a.r_distances   = a.n_slots*(a.n_rot + 1);
    a.r_stride      = capsule_pattern_size(p);

    for (int i = 0; i < GGML_CAPSULE_N_TIERS; ++i) {
        capsule_tier_init(a.tiers[i], p, i);
    }

    capsule_tensor_init(a.q,    src[CAPSULE_SRC_Q],    1, 2);
    capsule_tensor_init(a.k,    src[CAPSULE_SRC_K],    1, 2);
    capsule_tensor_init(a.v,    src[CAPSULE_SRC_V],    1, 2);
    capsule_tensor_init(a.mask, src[CAPSULE_SRC_MASK], 1, 2);
    capsule_tensor_init(a.cold, src[CAPSULE_SRC_COLD], 1, 2);
    capsule_tensor_init(a.dst,  op,                    1, 2);

    if (p.op == GGML_CAPSULE_OP_ATTN) {
        const auto * q = src[CAPSULE_SRC_Q];

        a.n_group  = q->ne[1]/p.n_head_kv;
        a.n_tokens = q->ne[2];
        a.n_kv     = src[CAPSULE_SRC_K]->ne[2];
    }

    if (p.op == GGML_CAPSULE_OP_COMBINE) {
        a.n_items = src[CAPSULE_SRC_Q]->ne[1];
    } else if (p.op == GGML_CAPSULE_OP_ENCODE || p.op == GGML_CAPSULE_OP_ERRORS) {
        capsule_encode_init(a, p.op, max_shared);
        a.tile_f32 = 1;
        a.n_items  = p.n_head_kv*src[CAPSULE_SRC_K]->ne[1];
    } else {
        const int n_q = a.n_group*a.n_tokens;

        capsule_forms_init(a, p, mma);

        capsule_form_init(a, p.op, n_q, max_shared, most_shared);
        a.n_tiles = (n_q + a.n_q - 1)/a.n_q;
        a.n_items = p.n_head_kv*(p.op == GGML_CAPSULE_OP_ATTN ? a.n_parts*a.n_tiles : a.n_slots);
    }

    auto data = [](const ggml_tensor * t) {
        return t ? (const char *) t->data : nullptr;
    };

    ptrs = {};
    ptrs.q       = data(src[CAPSULE_SRC_Q]);
    ptrs.k       = data(src[CAPSULE_SRC_K]);
    ptrs.v       = data(src[CAPSULE_SRC_V]);
    ptrs.mask    = data(src[CAPSULE_SRC_MASK]);
    ptrs.cold    = data(src[CAPSULE_SRC_COLD]);
    ptrs.blob0   = data(src[CAPSULE_SRC_BLOB0]);
    ptrs.blob1   = data(src[CAPSULE_SRC_BLOB1]);
    ptrs.weights = (const float *) data(src[CAPSULE_SRC_WEIGHTS]);
    ptrs.rope    = (const float *) data(src[CAPSULE_SRC_ROPE]);
    ptrs.dst     = (char *) op->data;
}

const ggml_tensor * ggml_capsule_source(const ggml_tensor * op, int i) {
    return op->src[i];
}

int ggml_capsule_op_of(const ggml_tensor * op) {
    return capsule_params_of(op).op;
}
