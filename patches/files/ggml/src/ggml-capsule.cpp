#include "ggml-capsule.h"

#include "ggml-capsule/op.h"
#include "ggml-impl.h"

#include <algorithm>
#include <cstring>

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

    const int64_t n_items  = p.n_parts > 0 ? p.n_parts : CAPSULE_TILE_ITEMS;

    p.op      = GGML_CAPSULE_OP_TILE_ATTN;
    p.n_parts = std::clamp<int64_t>(n_items/(p.n_head_kv*n_blocks), 1, std::max<int64_t>(1, n_units));

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
