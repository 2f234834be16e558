#include "llama-capsule-head.h"
#include "llama-capsule-store.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-kv-cache.h"
#include "llama-model.h"

#include <algorithm>
#include <cmath>

//
// attention straight on the slots, on the CPU: one online softmax over hot cells and slots, for all query heads of a KV head at once
//   V of a block does not exist: the weights go through the basis instead. K neither, or as a tile in the cache of the core
//

static constexpr uint32_t CAPSULE_GROUP_MAX = 32; // slots times queries at a time
static constexpr uint32_t CAPSULE_QUERY_MAX = 32; // queries of a KV head; for more of them it is cheaper to rebuild the keys

// behind the parameters of a custom op
static float & capsule_kq_scale(ggml_tensor * t) {
    return ((float *) t->op_params)[GGML_MAX_OP_PARAMS/sizeof(float) - 1];
}

// the slots, those that the same queries serve together
void llama_capsule_store::attend_order(uint32_t i_layer, uint32_t n_q, std::vector<slot_ref> & res) const {
    res.clear();

    uint32_t col = 0;
    for (int ip = 0; ip < N_TIERS; ++ip) {
        const auto & projection = projections[i_layer][ip];

        const bool turned    = rotated(i_layer, ip) && variants[i_layer][ip].usable() && n_q <= CAPSULE_QUERY_MAX;
        const bool projected = projection.usable();

        for (uint32_t s = 0; s < pools[ip].n_used; ++s, col += N()) {
            slot_ref cur = { ip, s, col, -1, projected ? &rope.views(i_layer, ip, s) : nullptr };

            if (projected && !projection.pays(n_q, *cur.views)) {
                cur.views = nullptr;
            }
            if (turned && !rope.moved(ip, s)) {
                cur.pattern = N_TIERS*rope.pattern(ip, s) + ip;
            }
            res.push_back(cur);
        }
    }

    std::stable_sort(res.begin(), res.end(), [](const slot_ref & a, const slot_ref & b) { return a.pattern < b.pattern; });
}

const uint8_t * llama_capsule_store::slot_data(uint32_t i_layer, const slot_ref & s) const {
    return (const uint8_t *) pools[s.i_pool].layers[i_layer].blob->data + s.i_slot*pools[s.i_pool].codecs[i_layer].layout.slot_stride;
}

// one call of attend(), in one thread
struct llama_capsule_store::attend_call {
    const ggml_tensor * q;    // [d_k, n_head, n_tokens]
    const ggml_tensor * k;    // [d_k, n_head_kv, n_kv]
    const ggml_tensor * v;
    const ggml_tensor * hot_mask;
    const ggml_tensor * cold_mask;

    ggml_tensor * dst;

    uint32_t i_layer;
    uint32_t n_tokens;
    uint32_t n_group;
    uint32_t n_q;
    uint32_t n_parts;
    uint32_t n_pad;       // columns of a slot
    uint32_t n_slots_max; // at a time

    bool rotated_v;

    const llama_capsule_rope_params * rope;

    llama_capsule_hot  hot;
    llama_capsule_head a;

    std::vector<slot_ref>        order;
    std::vector<slot_ref>        slots;
    std::vector<const uint8_t *> rows; // of the slots
    std::vector<const uint8_t *> next; // keys of as many slots, read after them
    std::vector<uint8_t>         kinds; // of the masks of the slots, [n_slots][n_tokens]
};

void llama_capsule_store::attend_init(attend_call & c, ggml_tensor * dst, uint32_t i_layer) const {
    const auto & layer = data().layers[i_layer];

    c.dst       = dst;
    c.q         = dst->src[0];
    c.k         = dst->src[1];
    c.v         = dst->src[2];
    c.hot_mask  = dst->src[3];
    c.cold_mask = dst->src[4];

    c.i_layer     = i_layer;
    c.n_tokens    = c.q->ne[2];
    c.n_group     = c.q->ne[1]/layer.n_head_kv;
    c.n_q         = c.n_group*c.n_tokens;
    c.n_parts     = dst->ne[2];
    c.n_pad       = GGML_PAD(N(), LLAMA_CAPSULE_VEC);
    c.rotated_v   = tile(i_layer, 0, true).has_rotated() || tile(i_layer, 1, true).has_rotated();
    c.rope        = rope.params(i_layer);

    c.a.query.reset();
    attend_order(i_layer, c.n_q, c.order);

    // queries of a pattern meet as many slots at once as a vector has lanes
    const bool     patterns = std::any_of(c.order.begin(), c.order.end(), [](const slot_ref & s) { return s.pattern >= 0; });
    const uint32_t n_lanes  = patterns ? llama_capsule_score::n_slots(c.a.simd.n_lanes) : 1;

    c.n_slots_max = std::clamp<uint32_t>(CAPSULE_GROUP_MAX/c.n_q, n_lanes, CAPSULE_GROUP_MAX/4);

    // once for all heads: the rows of the mask are long, those of a slot far apart
    c.kinds.resize(c.order.size()*c.n_tokens);
    for (uint32_t i = 0; i < c.n_tokens; ++i) {
        for (uint32_t j = 0; j < c.order.size(); ++j) {
            c.kinds[j*c.n_tokens + i] = llama_capsule_mask_kind_of(c.cold_mask, i, j*N(), N());
        }
    }
}

// the KV heads [h0, h0 + n_heads) and a part of the hot cells
void llama_capsule_store::attend_hot(attend_call & c, uint32_t h0, uint32_t n_heads, uint32_t i_part) const {
    const uint32_t ld_k = tile(c.i_layer, 0, false).ld();
    const uint32_t d_k  = c.q->ne[0];

    float * to = c.hot.init(n_heads, c.n_q, c.n_group, ld_k, tile(c.i_layer, 0, true).ld());

    for (uint32_t i = 0; i < n_heads*c.n_q; ++i, to += ld_k) {
        const uint32_t i_head  = (h0 + i/c.n_q)*c.n_group + i%c.n_group;
        const uint32_t i_token = i%c.n_q/c.n_group;

        const float * src = (const float *) ((const char *) c.q->data + i_head*c.q->nb[1] + i_token*c.q->nb[2]);
        for (uint32_t j = 0; j < d_k; ++j) {
            to[j] = src[j]*capsule_kq_scale(c.dst);
        }
    }

    c.hot.attend(c.k, c.v, kv.v_trans, c.hot_mask, h0, c.k->ne[2]*i_part/c.n_parts, c.k->ne[2]*(i_part + 1)/c.n_parts);
}

// the scores of n of the slots at hand that are served alike, from i on
void llama_capsule_store::attend_slots(attend_call & c, uint32_t i_head, int & pattern, size_t i, uint32_t n) const {
    auto & a = c.a;

    const auto & cur  = c.slots[i];
    const int    ip   = cur.i_pool;
    const auto & keys = tile(c.i_layer, ip, false);

    const float * first     = c.rope ? rope.first(c.i_layer, ip, cur.i_slot, rotated(c.i_layer, ip)) : nullptr;
    const float * distances = c.rope ? rope.distances(c.i_layer, ip, cur.i_slot) : nullptr;

    float * s = a.s.data() + i*c.n_pad;

    if (cur.pattern >= 0) {
        if (cur.pattern != pattern) {
            pattern = cur.pattern;
            a.query.init(variants[c.i_layer][ip], i_head, c.n_q, a.turn_queries(c.rope, first), a.ld_k, distances, *c.rope);
        }
        a.query.scores(keys, n, c.rows.data() + i, s, c.n_pad, a.ld_s);
    } else if (cur.views) {
        a.projected.init(projections[c.i_layer][ip], *cur.views, c.rope, i_head, c.n_q, a.turn_queries(c.rope, first), a.ld_k);
        a.projected.scores(keys, c.rows[i], s, a.ld_s);
    } else {
        a.score(keys, c.rows[i], i_head, N(), c.rope, first, distances, i*c.n_pad);
    }
}

// the scores of the slots at hand
void llama_capsule_store::attend_scores(attend_call & c, uint32_t i_head, int & pattern) const {
    const auto & keys = tile(c.i_layer, c.slots[0].i_pool, false);

    for (size_t i = 0, n; i < c.slots.size(); i += n) {
        const int p = c.slots[i].pattern;

        // all that the same queries serve
        for (n = 1; p >= 0 && i + n < c.slots.size() && c.slots[i + n].pattern == p; ++n) {
        }

        // a query for many slots looks ahead itself
        if (p < 0 && i + 1 < c.rows.size()) {
            keys.prefetch(c.rows[i + 1], i_head);
        }
        attend_slots(c, i_head, pattern, i, n);
    }
    c.a.clear_padding(N(), c.n_pad);
}

// a part of the slots
void llama_capsule_store::attend_cold(attend_call & c, uint32_t i_head, uint32_t i_part) const {
    auto & a = c.a;

    int pattern = -1; // that the queries have been made for

    const uint32_t n_slots = c.order.size();
    const uint32_t i_end   = n_slots*(i_part + 1)/c.n_parts;

    for (uint32_t i = n_slots*i_part/c.n_parts; i < i_end;) {
        const int ip = c.order[i].i_pool;

        // a group of slots: what they share stays in the cache of the core
        c.slots.clear();
        a.ld_s = c.n_slots_max*c.n_pad;
        for (; i < i_end && c.order[i].i_pool == ip && c.slots.size() < c.n_slots_max; ++i) {
            if (a.read_mask(c.cold_mask, c.kinds.data() + c.order[i].col/N()*c.n_tokens, c.order[i].col, N(), c.slots.size()*c.n_pad)) {
                c.slots.push_back(c.order[i]);
            }
        }
        if (c.slots.empty()) {
            continue;
        }
        a.set_columns(c.slots.size()*c.n_pad);

        const auto & keys = tile(c.i_layer, ip, false);

        c.rows.clear();
        c.next.clear();
        for (size_t j = 0; j < c.slots.size(); ++j) {
            const auto & next = c.order[std::min<size_t>(i + j, i_end - 1)];

            c.rows.push_back(slot_data(c.i_layer, c.slots[j]));
            c.next.push_back(keys.rows_at(next.i_pool == ip ? slot_data(c.i_layer, next) : c.rows[j], i_head, 0));
        }

        attend_scores(c, i_head, pattern);
        a.values(tile(c.i_layer, ip, true), c.rows, c.next, i_head, c.rotated_v);
    }
}

void llama_capsule_store::attend_result(attend_call & c, uint32_t i_head, uint32_t i_part) const {
    auto & a = c.a;

    const auto & layer = data().layers[c.i_layer];

    const uint32_t d_v     = layer.n_embd_head_v;
    const uint32_t n_head  = c.q->ne[1];
    const bool     partial = c.dst->ne[0] == d_v + 2;

    for (uint32_t i = 0; i < c.n_q; ++i) {
        float * o = a.o_cold.data() + i*a.ld_v;

        if (c.rotated_v) {
            a.simd.hadamard(o, llama_capsule_hadamard_size(d_v), d_v);
        }
        for (uint32_t j = 0; j < d_v; ++j) {
            o[j] += a.l_cold.data()[i]*layer.v_mean[i_head*d_v + j];
        }
        if (kv.attn_rot_v) {
            a.simd.hadamard(o, 64, d_v);
        }

        const uint32_t row = i/c.n_group*n_head + i_head*c.n_group + i%c.n_group;

        float * to = (float *) ((char *) c.dst->data + (partial ? row*c.dst->nb[1] + i_part*c.dst->nb[2] : row*d_v*sizeof(float)));

        const auto & sum = a.sums.data()[i];

        const float f = partial || sum.l == 0.0f ? 1.0f : 1.0f/sum.l;
        for (uint32_t j = 0; j < d_v; ++j) {
            to[j] = f*(a.o_hot.data()[i*a.ld_v + j] + o[j]);
        }
        if (partial) {
            to[d_v]     = sum.m;
            to[d_v + 1] = sum.l;
        }
    }
}

// dst: the result [d_v*n_head, n_tokens], or [d_v + 2, n_head*n_tokens, n_parts] to be combined
void llama_capsule_store::attend(ggml_tensor * dst, uint32_t i_layer, int ith, int nth) const {
    static thread_local attend_call c;

    attend_init(c, dst, i_layer);

    const uint32_t n_head_kv = data().layers[i_layer].n_head_kv;
    const uint32_t d_k       = c.q->ne[0];

    // an item is a KV head and a part of the columns; a thread has neighbouring heads
    const uint64_t n_items  = n_head_kv*c.n_parts;
    const uint32_t item_end = n_items*(ith + 1)/nth;

    for (uint32_t item = n_items*ith/nth; item < item_end;) {
        const uint32_t p       = item/n_head_kv;
        const uint32_t h0      = item%n_head_kv;
        const uint32_t n_heads = std::min(n_head_kv - h0, item_end - item);

        attend_hot(c, h0, n_heads, p);

        for (uint32_t h = h0; h < h0 + n_heads; ++h) {
            const auto & value_0 = tile(i_layer, 0, true);
            const auto & value_1 = tile(i_layer, 1, true);

            c.a.init(c.hot, h - h0, c.n_q, c.n_group, tile(i_layer, 0, false).ld(), value_0.ld(),
                    c.n_slots_max*c.n_pad, std::max(value_0.ld_rows(), value_1.ld_rows()), c.n_slots_max);

            // slots know nothing of the rotation of a quantized hot cache
            for (uint32_t i = 0; i < c.n_q && kv.attn_rot_k; ++i) {
                c.a.simd.hadamard(c.a.q_cold.data() + i*c.a.ld_k, llama_capsule_hadamard_size(d_k), d_k);
            }

            attend_cold  (c, h, p);
            attend_result(c, h, p);
        }

        item += n_heads;
    }
}

// the parts of attend() -> [d_v*n_head, n_tokens]
static void capsule_attn_combine(ggml_tensor * dst, int ith, int nth, void * /*userdata*/) {
    const ggml_tensor * src = dst->src[0]; // [d_v + 2, n_head*n_tokens, n_parts]

    const int64_t d_v     = src->ne[0] - 2;
    const int64_t n_parts = src->ne[2];

    auto part = [&](int64_t row, int64_t p) {
        return (const float *) ((const char *) src->data + row*src->nb[1] + p*src->nb[2]);
    };

    for (int64_t row = ith; row < src->ne[1]; row += nth) {
        float m = -INFINITY;
        for (int64_t p = 0; p < n_parts; ++p) {
            const float x = part(row, p)[d_v];
            m = x <= m ? m : x; // a NaN makes the result NaN
        }

        float * to = (float *) dst->data + row*d_v;
        std::fill(to, to + d_v, 0.0f);

        float l = 0.0f;
        for (int64_t p = 0; p < n_parts && m != -INFINITY; ++p) {
            const float * x = part(row, p);
            const float   f = expf(x[d_v] - m);

            l += f*x[d_v + 1];
            for (int64_t c = 0; c < d_v; ++c) {
                to[c] += f*x[c];
            }
        }
        for (int64_t c = 0; c < d_v && l > 0.0f; ++c) {
            to[c] /= l;
        }
    }
}

bool llama_capsule_store::can_attend(const llm_graph_context & g, uint32_t i_layer, const ggml_tensor * q, const ggml_tensor * kq_b, const ggml_tensor * sinks) const {
    return path(i_layer) == LLAMA_CAPSULE_PATH_FUSED && !kq_b && !sinks && !g.hparams.attn_soft_cap && g.arch != LLM_ARCH_GROK &&
        q->type == GGML_TYPE_F32 && q->nb[0] == sizeof(float) && q->ne[2] <= CAPSULE_ATTEND_MAX_TOKENS;
}

ggml_tensor * llama_capsule_store::build_attend(const llm_graph_context & g, uint32_t i_layer, ggml_tensor * q, ggml_tensor * k, ggml_tensor * v,
        ggml_tensor * mask, ggml_tensor * mask_cold, float kq_scale) {
    const auto & layer = data().layers[i_layer];

    const int64_t d_v      = layer.n_embd_head_v;
    const int64_t n_head   = q->ne[1];
    const int64_t n_tokens = q->ne[2];

    ggml_tensor * args[5 + N_TIERS] = { q, k, v, mask, mask_cold };

    const int n_args = 5 + blobs_in_use(i_layer, args + 5);

    const ggml_custom_op_t fn = [](ggml_tensor * dst, int ith, int nth, void * userdata) {
        const auto * arg = (const op_arg *) userdata;
        arg->store->attend(dst, arg->i_layer, ith, nth);
    };

    // two items for a thread, so that they end at about the same time
    const int64_t n_threads = std::max(g.cparams.n_threads, g.cparams.n_threads_batch);
    const int64_t n_parts   = n_threads <= 1 ? 1 : (2*n_threads + layer.n_head_kv - 1)/layer.n_head_kv;

    ggml_tensor * cur = n_parts == 1 ?
        ggml_custom_4d(g.ctx0, GGML_TYPE_F32, d_v*n_head, n_tokens, 1, 1, args, n_args, fn, GGML_N_TASKS_MAX, &op_args[i_layer]) :
        ggml_custom_4d(g.ctx0, GGML_TYPE_F32, d_v + 2, n_head*n_tokens, n_parts, 1, args, n_args, fn, GGML_N_TASKS_MAX, &op_args[i_layer]);

    capsule_kq_scale(cur) = kq_scale;

    ggml_backend_sched_set_tensor_backend(g.sched, cur, g.backend_cpu); // RPC devices claim to support every op

    if (n_parts > 1) {
        cur = ggml_custom_4d(g.ctx0, GGML_TYPE_F32, d_v*n_head, n_tokens, 1, 1, &cur, 1, capsule_attn_combine, GGML_N_TASKS_MAX, nullptr);
        ggml_backend_sched_set_tensor_backend(g.sched, cur, g.backend_cpu);
    }

    return cur;
}
