#include "llama-capsule-store.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-kv-cache.h"
#include "llama-model.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

//
// GGML_OP_CAPSULE: unpack and attention on any backend that has the op, with everything it reads in tensors
//

static constexpr int64_t CAPSULE_OP_MAX_TOKENS = 64;  // larger batches unpack
static constexpr int64_t CAPSULE_OP_GROUPS     = 512; // of threads: enough to fill a large GPU

// LLAMA_KVCAPSULE_SIMD=0, for tests: sums of floats instead of products in 8 bits, here as in llama_capsule_simd_get()
static bool capsule_op_floats() {
    static const char * env = getenv("LLAMA_KVCAPSULE_SIMD");

    return env && strcmp(env, "0") == 0;
}

ggml_capsule_params llama_capsule_store::op_params(uint32_t i_layer) const {
    const auto & layer = data().layers[i_layer];

    ggml_capsule_params res = {};

    bool exact = ggml_backend_buft_is_host(layer_buft(i_layer));

    for (int ip = 0; ip < N_TIERS; ++ip) {
        const auto & tl = pools[ip].codecs[i_layer].tl;

        for (int t = 0; t < LLAMA_CAPSULE_N_TYPES; ++t) {
            // 256 rows would not fit, but neither does a block of 256 tokens
            res.rows_k[ip][t] = std::min(tl.key_rows  [t], 255u);
            res.rows_v[ip][t] = std::min(tl.value_rows[t], 255u);
        }
        exact = exact || tl.key_rows[0] > 0 || tl.value_rows[0] > 0;

        res.n_slots[ip] = pools[ip].n_used;
        res.flags      |= tl.key_codec == LLAMA_CAPSULE_KEY_CODEC_RETAIN ? GGML_CAPSULE_FLAG_RETAIN << ip : 0;
    }

    res.flags |= kv.hparams.rope_type == LLAMA_ROPE_TYPE_NORM ? GGML_CAPSULE_FLAG_NORM     : 0;
    res.flags |= kv.v_trans                                   ? GGML_CAPSULE_FLAG_V_TRANS  : 0;
    res.flags |= kv.attn_rot_k                                ? GGML_CAPSULE_FLAG_ROT_K    : 0;
    res.flags |= kv.attn_rot_v                                ? GGML_CAPSULE_FLAG_ROT_V    : 0;
    res.flags |= exact                                        ? GGML_CAPSULE_FLAG_TILE_F32 : 0;
    res.flags |= !capsule_op_floats()                         ? GGML_CAPSULE_FLAG_QUERY    : 0;

    res.n_block      = N();
    res.n_kept       = layer.n_kept;
    res.n_mlp        = layer.n_mlp;
    res.n_neighbours = data().n_neighbours;
    res.n_rot        = layer.rope ? kv.hparams.n_rot(layer.il) : 0;
    res.n_head_kv    = layer.n_head_kv;
    res.d_k          = layer.n_embd_head_k;
    res.d_v          = layer.n_embd_head_v;

    return res;
}

bool llama_capsule_store::op_available(uint32_t i_layer) const {
    auto p = op_params(i_layer);

    auto known = [](ggml_type type) {
        return std::find(LLAMA_CAPSULE_TYPES.begin(), LLAMA_CAPSULE_TYPES.end(), type) != LLAMA_CAPSULE_TYPES.end() && type != GGML_TYPE_Q2_0;
    };

    if (!ggml_capsule_valid(&p) || !known(kv.type_k()) || !known(kv.type_v())) {
        return false;
    }

    const auto buft = layer_buft(i_layer);

    ggml_backend_dev_t dev = ggml_backend_buft_is_host(buft) ? ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU) : ggml_backend_buft_get_device(buft);

    // ask with nodes as they will be: both tiers, one slot each
    const ggml_init_params params = {
        /*.mem_size   =*/ 32*ggml_tensor_overhead(),
        /*.mem_buffer =*/ nullptr,
        /*.no_alloc   =*/ true,
    };
    ggml_context_ptr ctx_ptr { ggml_init(params) };
    ggml_context * ctx = ctx_ptr.get();

    ggml_tensor * blobs[N_TIERS];
    for (int ip = 0; ip < N_TIERS; ++ip) {
        p.n_slots[ip] = 1;
        blobs[ip] = ggml_new_tensor_1d(ctx, GGML_TYPE_I8, ggml_capsule_slot_size(&p, ip));
    }
    p.n_parts_hot  = 1;
    p.n_parts_cold = 1;

    ggml_tensor * weights = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, ggml_capsule_weights_layout(&p).size);
    ggml_tensor * angles  = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, 2*(p.n_rot + 1) + N()*p.n_rot);

    // columns of the cache or the scratch, [d, n_head_kv, n]
    const auto columns = [&](ggml_type type, int64_t d, int64_t n, bool trans) {
        return trans ? ggml_new_tensor_3d(ctx, type, n, p.n_head_kv, d) : ggml_new_tensor_3d(ctx, type, d, p.n_head_kv, n);
    };
    const auto flat = [&](ggml_tensor * t, bool trans) {
        return trans ? ggml_reshape_2d(ctx, t, t->ne[0], t->ne[1]*t->ne[2]) : ggml_reshape_2d(ctx, t, t->ne[0]*t->ne[1], t->ne[2]);
    };

    ggml_tensor * k = columns(kv.type_k(), p.d_k, 2*N(), false);
    ggml_tensor * v = columns(kv.type_v(), p.d_v, 2*N(), kv.v_trans);

    std::vector<ggml_tensor *> nodes;
    for (int64_t n_tokens : { int64_t(1), CAPSULE_OP_MAX_TOKENS }) {
        ggml_tensor * q    = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, p.d_k, kv.hparams.n_head(data().layers[i_layer].il), n_tokens);
        ggml_tensor * mask = ggml_new_tensor_2d(ctx, GGML_TYPE_F16, 2*N(), n_tokens);

        nodes.push_back(ggml_capsule_attn(ctx, &p, q, k, v, mask, mask, blobs[0], blobs[1], weights, angles));
        nodes.push_back(nodes.back()->src[0]);
    }
    nodes.push_back(ggml_capsule_unpack(ctx, &p, flat(k, false), blobs[0], blobs[1], weights, angles));
    p.flags |= GGML_CAPSULE_FLAG_V;
    nodes.push_back(ggml_capsule_unpack(ctx, &p, flat(v, kv.v_trans), blobs[0], blobs[1], weights, angles));

    return dev && std::all_of(nodes.begin(), nodes.end(), [&](const ggml_tensor * t) { return ggml_backend_dev_supports_op(dev, t); });
}

void llama_capsule_store::init_op_weights(uint32_t i_layer) {
    const auto & layer = data().layers[i_layer];
    const auto p       = op_params(i_layer);
    const auto w       = ggml_capsule_weights_layout(&p);

    const uint32_t n_pad = GGML_PAD(N(), 8);
    const uint32_t n_mma = GGML_PAD(N(), 16);

    std::vector<int32_t> words(w.size, 0);

    auto at = [&](int32_t offs) {
        return (float *) words.data() + offs;
    };
    auto copy = [&](int32_t offs, const auto & x) {
        static_assert(sizeof(x[0]) == sizeof(int32_t), "words only");
        if (!x.empty()) {
            memcpy(words.data() + offs, x.data(), x.size()*sizeof(int32_t));
        }
    };

    copy(w.k_mean,      layer.k_mean);
    copy(w.v_mean,      layer.v_mean);
    copy(w.token_order, std::vector<int32_t>(layer.token_order.begin(), layer.token_order.end()));
    copy(w.neighbours,  layer.k_neighbours);
    copy(w.gate,        layer.k_gate);
    copy(w.mlp_up_bias, layer.k_mlp_up_bias);
    copy(w.query_weight, layer.k_query_weight);

    auto half = [&](int32_t offs) {
        return (ggml_fp16_t *) (words.data() + offs);
    };

    for (uint32_t r = 0; r < N(); ++r) {
        for (uint32_t t = 0; t < N(); ++t) {
            if (!layer.k_basis.empty()) {
                at  (w.k_basis)  [r*n_pad + t] = layer.k_basis[r*N() + t];
                half(w.k_basis_h)[t*n_mma + r] = ggml_fp32_to_fp16(layer.k_basis[r*N() + t]);
            }
            at  (w.v_basis)  [r*n_pad + t] = layer.v_basis[r*N() + t];
            half(w.v_basis_h)[t*n_mma + r] = ggml_fp32_to_fp16(layer.v_basis[r*N() + t]);
            at(w.v_basis_t)[t*N()   + r] = layer.v_basis[r*N() + t];
        }
    }

    const uint32_t n_in = p.n_neighbours*p.d_k;

    // for tensor cores
    const uint32_t ld_up  = GGML_PAD(p.n_neighbours*layer.n_mlp, 16);
    const uint32_t n_down = GGML_PAD(layer.n_mlp, 16);

    for (uint32_t h = 0; h < layer.n_head_kv; ++h) {
        for (uint32_t m = 0; m < layer.n_mlp; ++m) {
            for (uint32_t i = 0; i < n_in; ++i) {
                const float x = layer.k_mlp_up[(h*layer.n_mlp + m)*n_in + i];

                at  (w.mlp_up)  [(h*n_in + i)*layer.n_mlp + m]                            = x;
                half(w.mlp_up_h)[(h*p.d_k + i%p.d_k)*ld_up + i/p.d_k*layer.n_mlp + m] = ggml_fp32_to_fp16(x);
            }
            for (uint32_t i = 0; i < p.d_k; ++i) {
                const float x = layer.k_mlp_down[(h*p.d_k + i)*layer.n_mlp + m];

                at  (w.mlp_down)  [(h*layer.n_mlp + m)*p.d_k + i] = x;
                half(w.mlp_down_h)[(h*n_down      + m)*p.d_k + i] = ggml_fp32_to_fp16(x);
            }
        }
    }

    const ggml_init_params params = {
        /*.mem_size   =*/ ggml_tensor_overhead(),
        /*.mem_buffer =*/ nullptr,
        /*.no_alloc   =*/ true,
    };
    weights.resize(data().layers.size());

    auto & res = weights[i_layer];

    res.ctx.reset(ggml_init(params));
    res.op = ggml_new_tensor_1d(res.ctx.get(), GGML_TYPE_I32, w.size);
    ggml_format_name(res.op, "capsule_weights_l%d", (int) layer.il);

    res.buf.reset(ggml_backend_alloc_ctx_tensors_from_buft(res.ctx.get(), layer_buft(i_layer)));
    if (!res.buf) {
        throw std::runtime_error("no memory for the constants of the capsule");
    }
    ggml_backend_tensor_set(res.op, words.data(), 0, ggml_nbytes(res.op));
}

//
// angles
//

int64_t llama_capsule_store::op_rope_size(int i_table) const {
    update_rope();

    return rope.packed_size(i_table);
}

int32_t llama_capsule_store::op_rope_terms(int i_table) const {
    update_rope();

    return rope.packed_terms(i_table);
}

// can queries meet rows of `pca` as they are stored?
bool llama_capsule_store::op_wants_views(uint32_t i_layer) const {
    const auto p = op_params(i_layer);

    return (p.flags & GGML_CAPSULE_FLAG_QUERY) && (p.flags & (3*GGML_CAPSULE_FLAG_RETAIN)) != 3*GGML_CAPSULE_FLAG_RETAIN;
}

void llama_capsule_store::set_input_op_rope(ggml_tensor * dst, int i_table) const {
    const auto words = rope.packed(i_table);

    GGML_ASSERT((int64_t) words.size() == ggml_nelements(dst));
    ggml_backend_tensor_set(dst, words.data(), 0, ggml_nbytes(dst));
}

ggml_tensor * llama_capsule_store::op_rope(const llm_graph_context & g, llm_graph_input_capsule & inp, uint32_t i_layer) const {
    if (!data().layers[i_layer].rope) {
        return nullptr;
    }

    update_rope(); // the patterns

    const int i_table = rope.find_table(i_layer, rotated(i_layer, 0), rotated(i_layer, 1));

    ggml_tensor *& res = inp.op_rope[i_table];
    if (!res) {
        res = ggml_new_tensor_1d(g.ctx0, GGML_TYPE_I32, op_rope_size(i_table));
        res->op_params[0] = op_rope_terms(i_table); // a graph with another number of them is not reused
        ggml_set_input(res);
        ggml_format_name(res, "capsule_inp_rope_%d", i_table);
    }

    return res;
}

//
// graph
//

bool llama_capsule_store::can_op_attend(const llm_graph_context & g, uint32_t i_layer, const ggml_tensor * q, const ggml_tensor * kq_b, const ggml_tensor * sinks) const {
    return path(i_layer) == LLAMA_CAPSULE_PATH_OP && !kq_b && !sinks && !g.hparams.attn_soft_cap && g.arch != LLM_ARCH_GROK &&
        q->type == GGML_TYPE_F32 && q->nb[0] == sizeof(float) && q->ne[2] <= CAPSULE_OP_MAX_TOKENS;
}

ggml_tensor * llama_capsule_store::build_op_attend(const llm_graph_context & g, llm_graph_input_capsule & inp, uint32_t i_layer, ggml_tensor * q, ggml_tensor * k,
        ggml_tensor * v, ggml_tensor * mask, float kq_scale) const {
    ggml_tensor * angles = op_rope(g, inp, i_layer);

    auto p = op_params(i_layer);

    p.scale   = kq_scale;
    p.n_terms = angles ? angles->op_params[0] : 0;

    // parts for as many groups of threads as the device may run, but at least a block for each
    const bool    host     = ggml_backend_buft_is_host(layer_buft(i_layer));
    const int64_t n_groups = host ? 2*std::max(g.cparams.n_threads, g.cparams.n_threads_batch) : CAPSULE_OP_GROUPS;
    const int64_t n_tiles  = p.n_head_kv*((q->ne[1]/p.n_head_kv*q->ne[2] + 7)/8);
    const int64_t n_hot    = (k->ne[2] + N() - 1)/N();
    const int64_t n_cold   = p.n_slots[0] + p.n_slots[1];
    const int64_t n_parts  = std::max<int64_t>(2, n_groups/n_tiles);

    p.n_parts_hot  = std::clamp<int64_t>(n_parts*n_hot /(n_hot + n_cold), 1, n_hot);
    p.n_parts_cold = std::clamp<int64_t>(n_parts*n_cold/(n_hot + n_cold), 1, n_cold);

    return ggml_capsule_attn(g.ctx0, &p, q, k, v, mask, inp.mask, pools[0].layers[i_layer].blob, pools[1].layers[i_layer].blob, weights[i_layer].op, angles);
}

void llama_capsule_store::build_op_unpack(const llm_graph_context & g, llm_graph_input_capsule & inp, uint32_t i_layer, ggml_tensor * k_cold, ggml_tensor * v_cold) const {
    ggml_tensor * angles = op_rope(g, inp, i_layer);

    auto p = op_params(i_layer);

    p.n_terms = angles ? angles->op_params[0] : 0;

    for (ggml_tensor * dst : { k_cold, v_cold }) {
        ggml_build_forward_expand(g.gf, ggml_capsule_unpack(g.ctx0, &p, dst, pools[0].layers[i_layer].blob, pools[1].layers[i_layer].blob, weights[i_layer].op, angles));

        p.flags |= GGML_CAPSULE_FLAG_V;
    }
}
