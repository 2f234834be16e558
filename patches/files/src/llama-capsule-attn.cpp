#include "llama-capsule-hot.h"
#include "llama-capsule-store.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-kv-cache.h"
#include "llama-model.h"

#include <algorithm>
#include <cmath>
#include <cstring>

//
// attention straight on the slots, on the CPU: one online softmax over hot cells and slots, for all query heads of a KV head at once
//   K of a block exists only as a tile in the cache of the core, V not at all: the weights go through the basis instead
//

static constexpr uint32_t CAPSULE_GROUP_MAX = 32; // slots times queries at a time
static constexpr uint32_t CAPSULE_QUERY_MAX = 32; // queries of a KV head; for more of them it is cheaper to rebuild the keys

namespace {

// the queries of one KV head
struct capsule_attn {
    const llama_capsule_simd & simd = llama_capsule_simd_get();

    uint32_t n_q = 0; // query heads of the group, token by token
    uint32_t n_group;
    uint32_t ld_k;
    uint32_t ld_v;
    uint32_t ld_s; // of the columns at hand

    llama_capsule_buf<float> q_cold; // [n_q][ld_k]
    llama_capsule_buf<float> q_slot;

    llama_capsule_buf<float> mask;   // [n_q/n_group][ld_s]
    llama_capsule_buf<float> s;      // [n_q][ld_s]
    llama_capsule_buf<float> x;      // keys or values of a chunk or block
    llama_capsule_buf<float> w;      // [n_q][slots][rows]
    llama_capsule_buf<float> zeros;  // [rows]
    llama_capsule_buf<float> angles; // of the first token of a slot, negative

    llama_capsule_query         query;
    llama_capsule_project_query projected;

    llama_capsule_buf<llama_capsule_softmax> sums;

    llama_capsule_buf<float> l_cold; // part of the sums
    llama_capsule_buf<float> o_hot;  // [n_q][ld_v]
    llama_capsule_buf<float> o_cold; // in the space of the rows

    // continues what has been done for a head
    void init(const llama_capsule_hot & hot, uint32_t i, uint32_t n_q, uint32_t n_group, uint32_t ld_k, uint32_t ld_v,
            uint32_t n_cols_max, uint32_t n_rows_max, uint32_t n_slots_max) {
        this->n_q     = n_q;
        this->n_group = n_group;
        this->ld_k    = ld_k;
        this->ld_v    = ld_v;

        // room for columns, padded
        n_cols_max = GGML_PAD(n_cols_max, LLAMA_CAPSULE_VEC);

        mask.resize(n_q/n_group*n_cols_max);
        s   .resize(n_q*n_cols_max);
        x   .resize(n_cols_max*std::max(ld_k, ld_v));
        w   .resize(n_q*n_slots_max*n_rows_max);

        std::fill_n(zeros.resize(n_rows_max), n_rows_max, 0.0f);

        q_slot.resize(n_q*ld_k);

        std::copy_n(hot.query  (i), n_q*ld_k, q_cold.resize(n_q*ld_k));
        std::copy_n(hot.out    (i), n_q*ld_v, o_hot .resize(n_q*ld_v));
        std::copy_n(hot.softmax(i), n_q,      sums  .resize(n_q));

        std::fill_n(o_cold.resize(n_q*ld_v), n_q*ld_v, 0.0f);
        std::fill_n(l_cold.resize(n_q),      n_q,      0.0f);
    }

    // n columns from col on -> those from to on; false if nothing is visible
    bool read_mask(const ggml_tensor * t, const uint8_t * kinds, int64_t col, uint32_t n, uint32_t to) {
        const uint32_t n_rows = n_q/n_group;
        const uint32_t n_pad  = GGML_PAD(n, LLAMA_CAPSULE_VEC);

        if (std::all_of(kinds, kinds + n_rows, [](uint8_t kind) { return kind == LLAMA_CAPSULE_MASK_NONE; })) {
            return false;
        }
        for (uint32_t i = 0; i < n_rows; ++i) {
            float * dst = mask.data() + i*ld_s + to;
            if (kinds[i] == LLAMA_CAPSULE_MASK_SOME) {
                llama_capsule_read_mask(t, i, col, n, dst);
                continue;
            }
            std::fill(dst, dst + n, kinds[i] == LLAMA_CAPSULE_MASK_ALL ? 0.0f : -INFINITY);
            std::fill(dst + n, dst + n_pad, -INFINITY);
        }

        return true;
    }

    // s: scores -> weights
    void softmax() {
        for (uint32_t i = 0; i < n_q; ++i) {
            float added;
            const float f = sums.data()[i].add(s.data() + i*ld_s, mask.data() + i/n_group*ld_s, ld_s, added);

            if (f != 1.0f) {
                simd.scale(ld_v, f, o_hot .data() + i*ld_v);
                simd.scale(ld_v, f, o_cold.data() + i*ld_v);
            }
            l_cold.data()[i] = f*l_cold.data()[i] + added;
        }
    }

    // fewer columns than the mask has been read for
    void set_columns(uint32_t n) {
        for (uint32_t i = 1; i < n_q/n_group; ++i) {
            std::copy(mask.data() + i*ld_s, mask.data() + i*ld_s + n, mask.data() + i*n);
        }
        ld_s = n;
    }

    // behind the N columns of each slot: no scores, and masked
    void clear_padding(uint32_t N, uint32_t n_pad) {
        for (uint32_t i = 0; i < n_q*ld_s && N < n_pad; i += n_pad) {
            std::fill(s.data() + i + N, s.data() + i + n_pad, 0.0f);
        }
    }

    // as a slot sees them that begins there; angles, NULL without RoPE
    const float * turn_queries(const llama_capsule_rope_params * rope, const float * first) {
        if (!rope) {
            return q_cold.data();
        }

        angles.resize(rope->n_rot);
        rope->negate(first, angles.data());

        std::copy(q_cold.data(), q_cold.data() + n_q*ld_k, q_slot.data());
        simd.rope(n_q, q_slot.data(), ld_k, angles.data(), 0, rope->n_rot, rope->norm);

        return q_slot.data();
    }

    // scores of one slot -> columns from to on
    void score(const llama_capsule_tile & tile, const uint8_t * slot, uint32_t i_head, uint32_t N,
            const llama_capsule_rope_params * rope, const float * first, const float * distances, uint32_t to) {
        tile.decode(slot, i_head, x.data());

        // the key of a token is R(first) R(distance) k
        const float * q = turn_queries(rope, first);
        if (rope) {
            simd.rope(N, x.data(), ld_k, distances, rope->n_rot, rope->n_rot, rope->norm);
        }
        simd.dot(N, n_q, ld_k, x.data(), ld_k, q, ld_k, s.data() + to, ld_s);
    }

    // the rest of it, for slots whose scores lie side by side
    void values(const llama_capsule_tile & tile_v, const std::vector<const uint8_t *> & slots, uint32_t i_head, bool rotated_v) {
        softmax();

        // s is [n_q][slots.size()][ld_basis]
        const uint32_t ld = tile_v.ld_rows();
        const uint32_t n  = slots.size();

        simd.mul(n_q*n, tile_v.ld_basis(), ld, s.data(), 1, tile_v.ld_basis(), tile_v.tokens(), ld, zeros.data(), w.data(), ld);

        for (uint32_t i = 0; i < n; ++i) {
            tile_v.mul_rows(slots[i], i_head, rotated_v, n_q, w.data() + i*ld, n*ld, o_cold.data());
        }
    }
};

}

// behind the parameters of a custom op
static float & capsule_kq_scale(ggml_tensor * t) {
    return ((float *) t->op_params)[GGML_MAX_OP_PARAMS/sizeof(float) - 1];
}

// the slots, those that the same queries serve together
void llama_capsule_store::attend_order(uint32_t i_layer, uint32_t n_q, std::vector<slot_ref> & res) const {
    res.clear();

    uint32_t col = 0;
    for (int ip = 0; ip < N_TIERS; ++ip) {
        const bool usable = rotated(i_layer, ip) && variants[i_layer][ip].usable() && n_q <= CAPSULE_QUERY_MAX;

        for (uint32_t s = 0; s < pools[ip].n_used; ++s, col += N()) {
            res.push_back({ ip, s, col, usable && !rope.moved(ip, s) ? N_TIERS*rope.pattern(ip, s) + ip : -1 });
        }
    }

    std::stable_sort(res.begin(), res.end(), [](const slot_ref & a, const slot_ref & b) { return a.pattern < b.pattern; });
}

// item: a KV head and a part of the columns; dst: the result [d_v*n_head, n_tokens], or [d_v + 2, n_head*n_tokens, n_parts] to be combined
void llama_capsule_store::attend(ggml_tensor * dst, uint32_t i_layer, int ith, int nth) const {
    static thread_local llama_capsule_hot hot;
    static thread_local capsule_attn a;
    static thread_local std::vector<slot_ref> order;
    static thread_local std::vector<slot_ref> slots;
    static thread_local std::vector<const uint8_t *> rows;
    static thread_local std::vector<uint8_t> kinds; // of the masks of the slots, [n_slots][n_tokens]

    const ggml_tensor * q    = dst->src[0]; // [d_k, n_head, n_tokens]
    const ggml_tensor * k    = dst->src[1]; // [d_k, n_head_kv, n_kv]
    const ggml_tensor * v    = dst->src[2];
    const ggml_tensor * mask = dst->src[3]; // hot
    const ggml_tensor * cold = dst->src[4];

    const auto & layer = data().layers[i_layer];

    const uint32_t d_k      = layer.n_embd_head_k;
    const uint32_t d_v      = layer.n_embd_head_v;
    const uint32_t n_head   = q->ne[1];
    const uint32_t n_tokens = q->ne[2];
    const uint32_t n_group  = n_head/layer.n_head_kv;
    const uint32_t n_q      = n_group*n_tokens;
    const uint32_t n_parts  = dst->ne[2];
    const bool     partial  = dst->ne[0] == d_v + 2;

    const uint32_t n_slots = pools[0].n_used + pools[1].n_used;

    const bool rotated_v = tile(i_layer, 0, true).has_rotated() || tile(i_layer, 1, true).has_rotated();

    uint32_t n_rows_max = 0;
    for (int ip = 0; ip < N_TIERS; ++ip) {
        n_rows_max = std::max(n_rows_max, tile(i_layer, ip, true).ld_rows());
    }

    const auto * rope_params = rope.params(i_layer);

    attend_order(i_layer, n_q, order);

    // once for all heads: the rows of the mask are long, those of a slot far apart
    kinds.resize(n_slots*n_tokens);
    for (uint32_t i = 0; i < n_tokens; ++i) {
        for (uint32_t j = 0; j < n_slots; ++j) {
            kinds[j*n_tokens + i] = llama_capsule_mask_kind_of(cold, i, j*N(), N());
        }
    }

    const uint32_t n_pad       = GGML_PAD(N(), LLAMA_CAPSULE_VEC);
    const uint32_t n_slots_max = std::clamp<uint32_t>(CAPSULE_GROUP_MAX/n_q, 1, CAPSULE_GROUP_MAX/4);

    auto slot_data = [&](const slot_ref & s) {
        return (const uint8_t *) pools[s.i_pool].layers[i_layer].blob->data + s.i_slot*pools[s.i_pool].codecs[i_layer].layout.slot_stride;
    };

    // a range of items for each thread: neighbouring heads of a part
    const uint32_t n_items = layer.n_head_kv*n_parts;

    for (uint32_t item = (uint64_t) n_items*ith/nth, item_end = (uint64_t) n_items*(ith + 1)/nth; item < item_end;) {
        const uint32_t p       = item/layer.n_head_kv;
        const uint32_t h0      = item%layer.n_head_kv;
        const uint32_t n_heads = std::min(layer.n_head_kv - h0, item_end - item);

        item += n_heads;

        float * to_q = hot.init(n_heads, n_q, n_group, tile(i_layer, 0, false).ld(), tile(i_layer, 0, true).ld());

        for (uint32_t i = 0; i < n_heads*n_q; ++i, to_q += tile(i_layer, 0, false).ld()) {
            const uint32_t h = h0 + i/n_q;
            const uint32_t t = i%n_q/n_group;

            const float * src = (const float *) ((const char *) q->data + (h*n_group + i%n_group)*q->nb[1] + t*q->nb[2]);
            for (uint32_t c = 0; c < d_k; ++c) {
                to_q[c] = src[c]*capsule_kq_scale(dst);
            }
        }
        hot.attend(k, v, kv.v_trans, mask, h0, k->ne[2]*p/n_parts, k->ne[2]*(p + 1)/n_parts);

        for (uint32_t h = h0; h < h0 + n_heads; ++h) {
            a.init(hot, h - h0, n_q, n_group, tile(i_layer, 0, false).ld(), tile(i_layer, 0, true).ld(), n_slots_max*n_pad, n_rows_max, n_slots_max);

            // slots know nothing of the rotation of a quantized hot cache
            for (uint32_t i = 0; i < n_q && kv.attn_rot_k; ++i) {
                a.simd.hadamard(a.q_cold.data() + i*a.ld_k, llama_capsule_hadamard_size(d_k), d_k);
            }

            int pattern = -1; // that the queries have been made for

            const uint32_t n_end = n_slots*(p + 1)/n_parts;
            for (uint32_t i = n_slots*p/n_parts; i < n_end;) {
                const int ip = order[i].i_pool;

                // a group of slots: what they share stays in the cache of the core
                slots.clear();
                a.ld_s = n_slots_max*n_pad;
                for (; i < n_end && order[i].i_pool == ip && slots.size() < n_slots_max; ++i) {
                    if (a.read_mask(cold, kinds.data() + order[i].col/N()*n_tokens, order[i].col, N(), slots.size()*n_pad)) {
                        slots.push_back(order[i]);
                    }
                }
                if (slots.empty()) {
                    continue;
                }
                a.set_columns(slots.size()*n_pad);

                rows.clear();
                for (const auto & cur : slots) {
                    const float * first     = rope_params ? rope.first(i_layer, ip, cur.i_slot, rotated(i_layer, ip)) : nullptr;
                    const float * distances = rope_params ? rope.distances(i_layer, ip, cur.i_slot) : nullptr;

                    const uint8_t * slot = slot_data(cur);
                    const uint32_t  to   = rows.size()*n_pad;

                    rows.push_back(slot);
                    tile(i_layer, ip, true).prefetch(slot, h);
                    if (rows.size() < slots.size()) {
                        tile(i_layer, ip, false).prefetch(slot_data(slots[rows.size()]), h);
                    }

                    if (projections[i_layer][ip].usable() && projections[i_layer][ip].pays(n_q, rope.views(i_layer, ip, cur.i_slot))) {
                        a.projected.init(projections[i_layer][ip], rope.views(i_layer, ip, cur.i_slot), rope_params, h, n_q, a.turn_queries(rope_params, first), a.ld_k);
                        a.projected.scores(tile(i_layer, ip, false), slot, a.s.data() + to, a.ld_s);
                        continue;
                    }
                    if (cur.pattern < 0) {
                        a.score(tile(i_layer, ip, false), slot, h, N(), rope_params, first, distances, to);
                        continue;
                    }
                    if (cur.pattern != pattern) {
                        pattern = cur.pattern;
                        a.query.init(variants[i_layer][ip], h, n_q, a.turn_queries(rope_params, first), a.ld_k, distances, *rope_params);
                    }
                    a.query.scores(tile(i_layer, ip, false), slot, a.s.data() + to, a.ld_s);
                }
                a.clear_padding(N(), n_pad);
                a.values(tile(i_layer, ip, true), rows, h, rotated_v);
            }

            for (uint32_t i = 0; i < n_q; ++i) {
                float * o = a.o_cold.data() + i*a.ld_v;

                if (rotated_v) {
                    a.simd.hadamard(o, llama_capsule_hadamard_size(d_v), d_v);
                }
                for (uint32_t c = 0; c < d_v; ++c) {
                    o[c] += a.l_cold.data()[i]*layer.v_mean[h*d_v + c];
                }
                if (kv.attn_rot_v) {
                    a.simd.hadamard(o, 64, d_v);
                }

                const uint32_t row = i/n_group*n_head + h*n_group + i%n_group;

                float * to = (float *) ((char *) dst->data + (partial ? row*dst->nb[1] + p*dst->nb[2] : row*d_v*sizeof(float)));

                const float f = partial || a.sums.data()[i].l == 0.0f ? 1.0f : 1.0f/a.sums.data()[i].l;
                for (uint32_t c = 0; c < d_v; ++c) {
                    to[c] = f*(a.o_hot.data()[i*a.ld_v + c] + o[c]);
                }
                if (partial) {
                    to[d_v]     = a.sums.data()[i].m;
                    to[d_v + 1] = a.sums.data()[i].l;
                }
            }
        }
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
            m = std::max(m, part(row, p)[d_v]);
        }

        float * to = (float *) dst->data + row*d_v;
        std::fill(to, to + d_v, 0.0f);

        float l = 0.0f;
        for (int64_t p = 0; p < n_parts && m > -INFINITY; ++p) {
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
