#include "ggml-capsule.h"
#include "ggml-capsule-impl.h"
#include "ggml-impl.h"

#include <algorithm>
#include <cstring>

static_assert(sizeof(ggml_capsule_params) <= GGML_MAX_OP_PARAMS, "the parameters do not fit");
static_assert(GGML_CAPSULE_N_TYPES == CAPSULE_MAX_TYPES, "the row types differ");

static constexpr ggml_type CAPSULE_GGML_TYPES[CAPSULE_MAX_TYPES] = { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0, GGML_TYPE_Q2_0 };

static constexpr int CAPSULE_MAX_N = 128; // tokens of a block
static constexpr int CAPSULE_MAX_D = 512;


// where the sources of a node are, in the order of capsule_ptrs
enum capsule_src {
    CAPSULE_SRC_Q, // unpack: dst; encode, errors: cells
    CAPSULE_SRC_K, // encode, errors: index
    CAPSULE_SRC_V, // encode, errors: angles
    CAPSULE_SRC_MASK,
    CAPSULE_SRC_COLD,
    CAPSULE_SRC_BLOB0,
    CAPSULE_SRC_BLOB1,
    CAPSULE_SRC_WEIGHTS,
    CAPSULE_SRC_ROPE,
    CAPSULE_SRC_COUNT,
};

static_assert(CAPSULE_SRC_COUNT <= GGML_MAX_SRC && CAPSULE_SRC_COUNT == CAPSULE_N_SOURCES, "too many sources");

static int capsule_type_of(ggml_type type) {
    return std::find(CAPSULE_GGML_TYPES, CAPSULE_GGML_TYPES + CAPSULE_MAX_TYPES, type) - CAPSULE_GGML_TYPES;
}

static ggml_capsule_params capsule_params_of(const ggml_tensor * op) {
    ggml_capsule_params res;
    memcpy(&res, op->op_params, sizeof(res));
    return res;
}

//
// layout of weights and slots
//

ggml_capsule_weights ggml_capsule_weights_layout(const ggml_capsule_params * p) {
    const int N      = p->n_block;
    const int n_pad  = GGML_PAD(N, 8);
    const int n_mma  = GGML_PAD(N, 16);
    const int n_drop = N - p->n_kept;

    ggml_capsule_weights res;

    int32_t size = 0;
    auto add = [&](int32_t & offs, int64_t n) {
        offs  = size;
        size += GGML_PAD(n, 8);
    };

    add(res.k_mean,      p->n_head_kv*p->d_k);
    add(res.v_mean,      p->n_head_kv*p->d_v);
    add(res.k_basis,     N*n_pad);
    add(res.k_basis_h,   n_mma*n_mma/2);
    add(res.v_basis,     N*n_pad);
    add(res.v_basis_h,   n_mma*n_mma/2);
    add(res.v_basis_t,   N*N);
    add(res.token_order, N);
    add(res.neighbours,  n_drop*p->n_neighbours);
    add(res.gate,        p->n_head_kv*n_drop*p->n_neighbours*p->d_k);
    add(res.mlp_up,      p->n_head_kv*p->n_neighbours*p->d_k*p->n_mlp);
    add(res.mlp_up_bias, p->n_head_kv*p->n_mlp);
    add(res.mlp_down,    p->n_head_kv*p->n_mlp*p->d_k);
    add(res.mlp_up_h,    p->n_head_kv*p->d_k*GGML_PAD(p->n_neighbours*p->n_mlp, 16)/2);
    add(res.mlp_down_h,  p->n_head_kv*p->d_k*GGML_PAD(p->n_mlp, 16)/2);
    add(res.query_weight, p->n_head_kv*p->d_k);

    res.size = size;

    return res;
}

// see llama_capsule_layout
static int capsule_part_init(capsule_part & part, int offs, int n_head, int d, const uint8_t * rows) {
    part.offs = offs;

    int size = 0;
    part.n_rows = 0;
    for (int t = 0; t < CAPSULE_MAX_TYPES; ++t) {
        part.count    [t] = rows[t];
        part.type_offs[t] = size;
        part.row_size [t] = rows[t] > 0 ? ggml_row_size(CAPSULE_GGML_TYPES[t], d) : 0;

        size        += part.count[t]*part.row_size[t];
        part.n_rows += part.count[t];
    }
    part.n_plain     = rows[CAPSULE_F32] + rows[CAPSULE_F16];
    part.head_stride = rows[CAPSULE_F32] > 0 ? GGML_PAD(size, 4) : size;

    return GGML_PAD(offs + n_head*part.head_stride, 4);
}

// the first n rows
static capsule_part capsule_part_head(const capsule_part & part, int n) {
    capsule_part res = part;

    int n_left = n;
    for (int & count : res.count) {
        count   = std::min(count, n_left);
        n_left -= count;
    }
    res.n_rows  = n - n_left;
    res.n_plain = std::min(part.n_plain, res.n_rows);

    return res;
}

static void capsule_tier_init(capsule_tier & tier, const ggml_capsule_params & p, int i) {
    tier.slot_size = capsule_part_init(tier.k, 0,              p.n_head_kv, p.d_k, p.rows_k[i]);
    tier.slot_size = capsule_part_init(tier.v, tier.slot_size, p.n_head_kv, p.d_v, p.rows_v[i]);
    tier.n_slots   = p.n_slots[i];
    tier.retain    = (p.flags & (GGML_CAPSULE_FLAG_RETAIN << i)) != 0;
    tier.kept      = capsule_part_head(tier.k, p.n_kept);
}

size_t ggml_capsule_slot_size(const ggml_capsule_params * params, int tier) {
    capsule_tier res;
    capsule_tier_init(res, *params, tier);
    return res.slot_size;
}

bool ggml_capsule_valid(const ggml_capsule_params * p) {
    if (p->n_block < 1 || p->n_block > CAPSULE_MAX_N || p->n_head_kv < 1 ||
        p->d_k < 2 || p->d_k > CAPSULE_MAX_D || p->d_k % 2 != 0 ||
        p->d_v < 2 || p->d_v > CAPSULE_MAX_D || p->d_v % 2 != 0 || p->n_rot > p->d_k || p->n_rot % 2 != 0) {
        return false;
    }
    for (int i = 0; i < GGML_CAPSULE_N_TIERS; ++i) {
        int n_k = 0;
        int n_v = 0;
        for (int t = 0; t < CAPSULE_MAX_TYPES; ++t) {
            const int block = ggml_blck_size(CAPSULE_GGML_TYPES[t]);
            if ((p->rows_k[i][t] > 0 && p->d_k % block != 0) || (p->rows_v[i][t] > 0 && p->d_v % block != 0)) {
                return false;
            }
            n_k += p->rows_k[i][t];
            n_v += p->rows_v[i][t];
        }
        if (n_k > p->n_block || n_v > p->n_block) {
            return false;
        }
        if ((p->flags & (GGML_CAPSULE_FLAG_RETAIN << i)) && (p->n_kept < 1 || p->n_kept > n_k || p->n_neighbours < 1)) {
            return false;
        }
    }
    return p->n_kept <= p->n_block;
}

//
// constructors
//

// what is known of a pattern of positions, in units of 4 bytes
static int64_t capsule_pattern_size(const ggml_capsule_params & p) {
    return p.n_block*p.n_rot + (p.n_terms > 0 ? 1 + p.n_terms*(p.n_block + p.d_k) : 0);
}

static void capsule_set_op(ggml_tensor * res, const ggml_capsule_params & p, ggml_tensor * blob0, ggml_tensor * blob1, ggml_tensor * weights, ggml_tensor * rope) {
    GGML_ASSERT(ggml_capsule_valid(&p));

    ggml_tensor * blobs[GGML_CAPSULE_N_TIERS] = { blob0, blob1 };
    for (int i = 0; i < GGML_CAPSULE_N_TIERS; ++i) {
        GGML_ASSERT(p.n_slots[i] == 0 || (blobs[i] && ggml_is_contiguous(blobs[i]) && ggml_nbytes(blobs[i]) >= p.n_slots[i]*ggml_capsule_slot_size(&p, i)));
    }

    const int64_t n_slots = p.n_slots[0] + p.n_slots[1];

    GGML_ASSERT(weights->type == GGML_TYPE_I32 && ggml_is_contiguous(weights) && ggml_nelements(weights) == ggml_capsule_weights_layout(&p).size);
    GGML_ASSERT(p.n_rot == 0 || n_slots == 0 || (rope->type == GGML_TYPE_I32 && ggml_is_contiguous(rope) && ggml_nelements(rope) >= n_slots*(p.n_rot + 1) + capsule_pattern_size(p)));

    res->op = GGML_OP_CAPSULE;
    memcpy(res->op_params, &p, sizeof(p));

    res->src[CAPSULE_SRC_BLOB0]   = p.n_slots[0] > 0 ? blob0 : nullptr;
    res->src[CAPSULE_SRC_BLOB1]   = p.n_slots[1] > 0 ? blob1 : nullptr;
    res->src[CAPSULE_SRC_WEIGHTS] = weights;
    res->src[CAPSULE_SRC_ROPE]    = p.n_rot > 0 && n_slots > 0 ? rope : nullptr;
}

ggml_tensor * ggml_capsule_unpack(ggml_context * ctx, const ggml_capsule_params * params, ggml_tensor * dst, ggml_tensor * blob0, ggml_tensor * blob1,
        ggml_tensor * weights, ggml_tensor * rope) {
    ggml_capsule_params p = *params;

    p.op = GGML_CAPSULE_OP_UNPACK;

    const bool is_v  = p.flags & GGML_CAPSULE_FLAG_V;
    const bool trans = is_v && (p.flags & GGML_CAPSULE_FLAG_V_TRANS);

    const int64_t n_embd = p.n_head_kv*(is_v ? p.d_v : p.d_k);
    const int64_t n_cols = (p.n_slots[0] + p.n_slots[1])*p.n_block;

    GGML_ASSERT(n_cols > 0);
    GGML_ASSERT(dst->ne[trans ? 1 : 0] == n_embd && dst->ne[trans ? 0 : 1] >= n_cols && dst->ne[2] == 1 && dst->ne[3] == 1);
    GGML_ASSERT(dst->type == GGML_TYPE_F32 || dst->type == GGML_TYPE_F16 || (!trans && (dst->type == GGML_TYPE_Q8_0 || dst->type == GGML_TYPE_Q4_0) && n_embd/p.n_head_kv % 32 == 0));

    if (is_v) {
        p.n_rot = 0;
    }

    ggml_tensor * res = ggml_view_tensor(ctx, dst);

    capsule_set_op(res, p, blob0, blob1, weights, rope);
    res->src[CAPSULE_SRC_Q] = dst;

    return res;
}

ggml_tensor * ggml_capsule_attn(ggml_context * ctx, const ggml_capsule_params * params, ggml_tensor * q, ggml_tensor * k, ggml_tensor * v,
        ggml_tensor * mask, ggml_tensor * mask_cold, ggml_tensor * blob0, ggml_tensor * blob1, ggml_tensor * weights, ggml_tensor * rope) {
    ggml_capsule_params p = *params;

    p.op = GGML_CAPSULE_OP_ATTN;

    const bool    trans    = p.flags & GGML_CAPSULE_FLAG_V_TRANS;
    const int64_t n_kv     = k->ne[2];
    const int64_t n_head   = q->ne[1];
    const int64_t n_tokens = q->ne[2];
    const int64_t n_cols   = (p.n_slots[0] + p.n_slots[1])*p.n_block;

    GGML_ASSERT(p.n_parts_hot > 0 || n_kv == 0);
    GGML_ASSERT(p.n_parts_cold > 0 || n_cols == 0);
    GGML_ASSERT(p.n_parts_hot + p.n_parts_cold > 0);
    GGML_ASSERT(n_head % p.n_head_kv == 0);

    GGML_ASSERT(q->type == GGML_TYPE_F32 && q->ne[0] == p.d_k && q->nb[0] == sizeof(float) && q->ne[3] == 1);
    GGML_ASSERT(k->ne[0] == p.d_k && k->ne[1] == p.n_head_kv && k->ne[3] == 1 && k->nb[0] == ggml_type_size(k->type));
    GGML_ASSERT(v->ne[trans ? 2 : 0] == p.d_v && v->ne[1] == p.n_head_kv && v->ne[trans ? 0 : 2] == n_kv && v->ne[3] == 1 && v->nb[0] == ggml_type_size(v->type));
    GGML_ASSERT(capsule_type_of(k->type) < CAPSULE_MAX_TYPES && capsule_type_of(v->type) < CAPSULE_MAX_TYPES);

    for (const auto * m : { mask, n_cols > 0 ? mask_cold : mask }) {
        GGML_ASSERT((m->type == GGML_TYPE_F32 || m->type == GGML_TYPE_F16) && m->ne[1] >= n_tokens && m->nb[0] == ggml_type_size(m->type));
    }
    GGML_ASSERT(mask->ne[0] >= n_kv && (n_cols == 0 || mask_cold->ne[0] >= n_cols));

    ggml_tensor * parts = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, p.d_v + 2, n_head*n_tokens, p.n_parts_hot + p.n_parts_cold);

    capsule_set_op(parts, p, blob0, blob1, weights, rope);
    parts->src[CAPSULE_SRC_Q]    = q;
    parts->src[CAPSULE_SRC_K]    = k;
    parts->src[CAPSULE_SRC_V]    = v;
    parts->src[CAPSULE_SRC_MASK] = mask;
    parts->src[CAPSULE_SRC_COLD] = n_cols > 0 ? mask_cold : nullptr;

    p.op = GGML_CAPSULE_OP_COMBINE;

    ggml_tensor * res = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, p.d_v*n_head, n_tokens);

    res->op = GGML_OP_CAPSULE;
    memcpy(res->op_params, &p, sizeof(p));
    res->src[CAPSULE_SRC_Q] = parts;

    return res;
}

static ggml_capsule_params capsule_cells_params(const ggml_capsule_params * params, int op) {
    ggml_capsule_params res = *params;

    res.op         = op;
    res.n_slots[0] = 0;
    res.n_slots[1] = 0;
    res.n_rot      = (res.flags & GGML_CAPSULE_FLAG_V) ? 0 : res.n_rot;

    return res;
}

static void capsule_set_cells(ggml_tensor * res, const ggml_capsule_params & p, ggml_tensor * slots, ggml_tensor * cells, ggml_tensor * index, ggml_tensor * angles,
        ggml_tensor * weights) {
    const int  i_tier = (p.flags & GGML_CAPSULE_FLAG_TIER_1) ? 1 : 0;
    const bool is_v   = p.flags & GGML_CAPSULE_FLAG_V;
    const bool trans  = is_v && (p.flags & GGML_CAPSULE_FLAG_V_TRANS);

    GGML_ASSERT(slots->type == GGML_TYPE_I8 && ggml_is_contiguous(slots) && ggml_nbytes(slots) % ggml_capsule_slot_size(&p, i_tier) == 0);
    GGML_ASSERT(cells->ne[trans ? 1 : 0] == p.n_head_kv*(is_v ? p.d_v : p.d_k) && cells->ne[2] == 1 && cells->ne[3] == 1);
    GGML_ASSERT(capsule_type_of(cells->type) < CAPSULE_MAX_TYPES && cells->nb[0] == ggml_type_size(cells->type) && (!trans || ggml_blck_size(cells->type) == 1));
    GGML_ASSERT(index->type == GGML_TYPE_I32 && ggml_is_contiguous(index) && index->ne[0] == p.n_block + 1 && ggml_nelements(index) == index->ne[0]*index->ne[1]);
    GGML_ASSERT(p.n_rot == 0 || (angles->type == GGML_TYPE_F32 && ggml_is_contiguous(angles) && ggml_nelements(angles) == index->ne[1]*p.n_block*p.n_rot));

    capsule_set_op(res, p, nullptr, nullptr, weights, nullptr);
    res->src[CAPSULE_SRC_Q]     = cells;
    res->src[CAPSULE_SRC_K]     = index;
    res->src[CAPSULE_SRC_V]     = p.n_rot > 0 ? angles : nullptr;
    res->src[CAPSULE_SRC_BLOB0] = slots;
}

ggml_tensor * ggml_capsule_encode(ggml_context * ctx, const ggml_capsule_params * params, ggml_tensor * slots, ggml_tensor * cells, ggml_tensor * index,
        ggml_tensor * angles, ggml_tensor * weights) {
    ggml_tensor * res = ggml_view_tensor(ctx, slots);

    capsule_set_cells(res, capsule_cells_params(params, GGML_CAPSULE_OP_ENCODE), slots, cells, index, angles, weights);

    return res;
}

ggml_tensor * ggml_capsule_errors(ggml_context * ctx, const ggml_capsule_params * params, ggml_tensor * slots, ggml_tensor * cells, ggml_tensor * index,
        ggml_tensor * angles, ggml_tensor * weights) {
    GGML_ASSERT(((params->flags & GGML_CAPSULE_FLAG_V) ? params->d_v : params->d_k) % 32 == 0);

    ggml_tensor * res = ggml_new_tensor_4d(ctx, GGML_TYPE_F32, 3, params->n_block, params->n_head_kv, index->ne[1]);

    capsule_set_cells(res, capsule_cells_params(params, GGML_CAPSULE_OP_ERRORS), slots, cells, index, angles, weights);

    return res;
}

//
// for the backends
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
