#include "ggml-capsule-layout.h"

#include "ggml-impl.h"

#include <algorithm>
#include <cstring>

static_assert(sizeof(ggml_capsule_params) <= GGML_MAX_OP_PARAMS, "the parameters do not fit");
static_assert(GGML_CAPSULE_N_TYPES == CAPSULE_MAX_TYPES, "the row types differ");

static constexpr ggml_type CAPSULE_GGML_TYPES[CAPSULE_MAX_TYPES] = { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0, GGML_TYPE_Q2_0 };

static_assert(CAPSULE_SRC_COUNT <= GGML_MAX_SRC && CAPSULE_SRC_COUNT == CAPSULE_N_SOURCES, "too many sources");

int capsule_type_of(ggml_type type) {
    return std::find(CAPSULE_GGML_TYPES, CAPSULE_GGML_TYPES + CAPSULE_MAX_TYPES, type) - CAPSULE_GGML_TYPES;
}

ggml_capsule_params capsule_params_of(const ggml_tensor * op) {
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

void capsule_tier_init(capsule_tier & tier, const ggml_capsule_params & p, int i) {
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

int64_t capsule_pattern_size(const ggml_capsule_params & p) {
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
// tiles
//

static_assert(sizeof(ggml_capsule_tile_params) <= GGML_MAX_OP_PARAMS, "the parameters do not fit");
static_assert(CAPSULE_TILE_SRC_COUNT <= GGML_MAX_SRC, "too many sources");

static constexpr int64_t CAPSULE_TILE_ITEMS      = 64; // KV heads, blocks of tokens and parts: enough for the threads of a CPU to end at about the same time
static constexpr int64_t CAPSULE_TILE_PART_CELLS = 128;

static void capsule_set_tile_op(ggml_tensor * res, const ggml_capsule_tile_params & p, ggml_tensor * pool, ggml_tensor * slots, ggml_tensor * tables, ggml_tensor * angles) {
    GGML_ASSERT(p.n_head_kv > 0 && p.d_k > 0 && p.d_v > 0 && p.n_rot <= p.d_k && p.n_rot % 2 == 0);
    GGML_ASSERT(pool->type == GGML_TYPE_I8 && ggml_is_contiguous(pool));
    GGML_ASSERT(slots->type == GGML_TYPE_I32 && ggml_is_contiguous(slots) && slots->ne[1] == CAPSULE_TILE_SLOT_WORDS && ggml_nrows(slots) == slots->ne[1]);
    GGML_ASSERT(tables->type == GGML_TYPE_I8 && ggml_is_contiguous(tables));
    GGML_ASSERT(p.n_rot == 0 || (angles->type == GGML_TYPE_F32 && ggml_is_contiguous(angles) && ggml_nelements(angles) >= p.n_rows*p.n_rot));

    res->op = GGML_OP_CAPSULE;
    memcpy(res->op_params, &p, sizeof(p));

    res->src[CAPSULE_TILE_SRC_POOL]   = pool;
    res->src[CAPSULE_TILE_SRC_SLOTS]  = slots;
    res->src[CAPSULE_TILE_SRC_TABLES] = tables;
    res->src[CAPSULE_TILE_SRC_ANGLES] = p.n_rot > 0 ? angles : nullptr;
}

ggml_tensor * ggml_capsule_tile_unpack(ggml_context * ctx, const ggml_capsule_tile_params * params, ggml_tensor * dst, bool copy,
        ggml_tensor * pool, ggml_tensor * slots, ggml_tensor * tables, ggml_tensor * angles) {
    ggml_capsule_tile_params p = *params;

    const bool    is_v   = p.flags & GGML_CAPSULE_FLAG_V;
    const bool    trans  = is_v && (p.flags & GGML_CAPSULE_FLAG_V_TRANS);
    const int64_t n_embd = p.n_head_kv*(is_v ? p.d_v : p.d_k);

    GGML_ASSERT(dst->ne[trans ? 1 : 0] == n_embd && dst->ne[2] == 1 && dst->ne[3] == 1 && dst->nb[0] == ggml_type_size(dst->type));
    GGML_ASSERT(!ggml_is_quantized(dst->type) || (!trans && n_embd/p.n_head_kv % ggml_blck_size(dst->type) == 0));

    p.op    = GGML_CAPSULE_OP_TILE_UNPACK;
    p.n_rot = is_v ? 0 : p.n_rot;

    ggml_tensor * res = copy ? ggml_new_tensor_2d(ctx, dst->type, dst->ne[0], dst->ne[1]) : ggml_view_tensor(ctx, dst);

    capsule_set_tile_op(res, p, pool, slots, tables, angles);
    res->src[CAPSULE_TILE_SRC_Q] = copy ? nullptr : dst;

    return res;
}

ggml_tensor * ggml_capsule_tile_attn(ggml_context * ctx, const ggml_capsule_tile_params * params, ggml_tensor * q, ggml_tensor * k, ggml_tensor * v,
        ggml_tensor * mask, ggml_tensor * mask_cold, ggml_tensor * seen, ggml_tensor * pool, ggml_tensor * slots, ggml_tensor * tables, ggml_tensor * angles) {
    ggml_capsule_tile_params p = *params;

    const bool    trans    = p.flags & GGML_CAPSULE_FLAG_V_TRANS;
    const int64_t n_kv     = k->ne[2];
    const int64_t n_slots  = slots->ne[0];
    const int64_t n_head   = q->ne[1];
    const int64_t n_tokens = q->ne[2];

    GGML_ASSERT(n_head % p.n_head_kv == 0);
    GGML_ASSERT(q->type == GGML_TYPE_F32 && q->ne[0] == p.d_k && q->nb[0] == sizeof(float) && q->ne[3] == 1);
    GGML_ASSERT(k->ne[0] == p.d_k && k->ne[1] == p.n_head_kv && k->ne[3] == 1 && k->nb[0] == ggml_type_size(k->type));
    GGML_ASSERT(v->ne[trans ? 2 : 0] == p.d_v && v->ne[1] == p.n_head_kv && v->ne[trans ? 0 : 2] == n_kv && v->ne[3] == 1 && v->nb[0] == ggml_type_size(v->type));
    GGML_ASSERT((mask->type == GGML_TYPE_F32 || mask->type == GGML_TYPE_F16) && mask->ne[0] >= n_kv && mask->ne[1] >= n_tokens && mask->nb[0] == ggml_type_size(mask->type));
    GGML_ASSERT(mask_cold->type == GGML_TYPE_F16 && mask_cold->ne[1] >= n_tokens && mask_cold->nb[0] == sizeof(ggml_fp16_t));
    GGML_ASSERT(seen->type == GGML_TYPE_I8 && seen->ne[0] == n_slots && seen->ne[1] >= n_tokens && seen->nb[0] == 1);

    // by the shapes alone: the sums are the same for any number of threads
    const int64_t n_blocks = (n_tokens + CAPSULE_TILE_TOKENS - 1)/CAPSULE_TILE_TOKENS;
    const int64_t n_units  = n_slots + (n_kv + CAPSULE_TILE_PART_CELLS - 1)/CAPSULE_TILE_PART_CELLS;

    p.op      = GGML_CAPSULE_OP_TILE_ATTN;
    p.n_parts = std::clamp<int64_t>(CAPSULE_TILE_ITEMS/(p.n_head_kv*n_blocks), 1, std::max<int64_t>(1, n_units));

    ggml_tensor * parts = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, p.d_v + 2, n_head*n_tokens, p.n_parts);

    capsule_set_tile_op(parts, p, pool, slots, tables, angles);
    parts->src[CAPSULE_TILE_SRC_Q]    = q;
    parts->src[CAPSULE_TILE_SRC_K]    = k;
    parts->src[CAPSULE_TILE_SRC_V]    = v;
    parts->src[CAPSULE_TILE_SRC_MASK] = mask;
    parts->src[CAPSULE_TILE_SRC_COLD] = mask_cold;
    parts->src[CAPSULE_TILE_SRC_SEEN] = seen;

    p.op = GGML_CAPSULE_OP_TILE_COMBINE;

    ggml_tensor * res = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, p.d_v*n_head, n_tokens);

    res->op = GGML_OP_CAPSULE;
    memcpy(res->op_params, &p, sizeof(p));
    res->src[CAPSULE_TILE_SRC_Q] = parts;

    return res;
}
