#include "llama-capsule-store.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-kv-cache.h"
#include "llama-model.h"

#include <algorithm>
#include <cmath>

static constexpr uint32_t CAPSULE_ROWS_PAD = 16; // the matrix products of the CPU backend are much faster with it
static constexpr uint32_t CAPSULE_POS_PAD  = 64; // RoPE of the Vulkan backend wants aligned positions

//
// llm_graph_input_capsule
//

llm_graph_input_capsule::llm_graph_input_capsule(std::shared_ptr<const llama_capsule_store> store, bool causal_attn) :
    store(std::move(store)), version(this->store->version()), causal_attn(causal_attn) {
}

void llm_graph_input_capsule::set_input(const llama_ubatch * ubatch) {
    store->update_rope();

    if (pos && pos->buffer) {
        store->set_input_pos(pos);
    }
    if (mask && mask->buffer) {
        store->set_input_mask(mask, ubatch, causal_attn);
    }
    for (const auto & [i_table, t] : op_rope) {
        if (t->buffer) {
            store->set_input_op_rope(t, i_table);
        }
    }
}

bool llm_graph_input_capsule::can_reuse(const llm_graph_params & params) {
    const auto fits = [this](const auto & it) { return it.second->ne[0] == store->op_rope_size(it.first) && it.second->op_params[0] == store->op_rope_terms(it.first); };

    return version == store->version() && (!mask || mask->ne[1] == params.ubatch.n_tokens) && std::all_of(op_rope.begin(), op_rope.end(), fits);
}

//
// constants
//

static std::vector<float> capsule_hadamard_matrix(uint32_t n) {
    std::vector<float> res(n*n, 0.0f);
    for (uint32_t i = 0; i < n; ++i) {
        res[i*n + i] = 1.0f;
    }
    llama_capsule_hadamard(res.data(), n, res.size());
    return res;
}

void llama_capsule_store::init_scratch_const() {
    const auto & layers = data().layers;

    for (uint32_t i = 0; i < layers.size(); ++i) {
        const auto buft = layer_buft(i);
        if (std::any_of(scratches.begin(), scratches.end(), [&](const scratch & s) { return s.buft == buft; })) {
            continue;
        }

        scratch s;
        s.buft = buft;

        const ggml_init_params params = {
            /*.mem_size   =*/ 3*ggml_tensor_overhead(),
            /*.mem_buffer =*/ nullptr,
            /*.no_alloc   =*/ true,
        };
        s.ctx_const.reset(ggml_init(params));

        uint32_t n_head = 0;
        for (const auto & layer : layers) {
            n_head = std::max(n_head, layer.n_head_kv);
        }

        // heads of one size in all layers, see the check in llama_capsule_create_memory()
        const uint32_t n_rot_k = llama_capsule_hadamard_size(layers[0].n_embd_head_k);
        const uint32_t n_rot_v = llama_capsule_hadamard_size(layers[0].n_embd_head_v);

        s.idx   = ggml_new_tensor_3d(s.ctx_const.get(), GGML_TYPE_I32, N(), n_head, n_chunk);
        s.rot_k = ggml_new_tensor_2d(s.ctx_const.get(), GGML_TYPE_F32, n_rot_k, n_rot_k);
        s.rot_v = ggml_new_tensor_2d(s.ctx_const.get(), GGML_TYPE_F32, n_rot_v, n_rot_v);

        s.buf_const.reset(ggml_backend_alloc_ctx_tensors_from_buft(s.ctx_const.get(), buft));
        if (!s.buf_const) {
            throw std::runtime_error("no memory for the constants of the capsule");
        }

        std::vector<int32_t> idx(ggml_nelements(s.idx));
        for (size_t j = 0; j < idx.size(); ++j) {
            idx[j] = j % N();
        }
        ggml_backend_tensor_set(s.idx, idx.data(), 0, ggml_nbytes(s.idx));
        ggml_backend_tensor_set(s.rot_k, capsule_hadamard_matrix(n_rot_k).data(), 0, ggml_nbytes(s.rot_k));
        ggml_backend_tensor_set(s.rot_v, capsule_hadamard_matrix(n_rot_v).data(), 0, ggml_nbytes(s.rot_v));

        scratches.push_back(std::move(s));
    }
}

void llama_capsule_store::init_weights(uint32_t i_layer) {
    const uint32_t K = data().n_neighbours;

    weights.resize(data().layers.size());

    const auto & layer = data().layers[i_layer];
    auto       & w     = weights[i_layer];

    const ggml_init_params params = {
        /*.mem_size   =*/ (4*N_TIERS + 4 + 2*K)*ggml_tensor_overhead(),
        /*.mem_buffer =*/ nullptr,
        /*.no_alloc   =*/ true,
    };
    ggml_context_ptr ctx { ggml_init(params) };

    std::vector<std::pair<ggml_tensor *, std::vector<float>>>   floats;
    std::vector<std::pair<ggml_tensor *, std::vector<int32_t>>> ints;

    auto pca = [&](weights_part & part, const llama_capsule_row_counts & counts, uint32_t d, const std::vector<float> & mean, const std::vector<float> & basis) {
        const uint32_t n_rows = llama_capsule_rows_total(counts);
        const uint32_t n_all  = GGML_PAD(n_rows + 1, CAPSULE_ROWS_PAD);

        part.basis = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, n_all, N());
        part.mean  = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, d, 1, layer.n_head_kv);

        // the mean is one more row, with weight 1 for every token
        std::vector<float> b(n_all*N(), 0.0f);
        for (uint32_t t = 0; t < N(); ++t) {
            for (uint32_t r = 0; r < n_rows; ++r) {
                b[t*n_all + r] = basis[r*N() + t];
            }
            b[t*n_all + n_rows] = 1.0f;
        }

        floats.emplace_back(part.basis, std::move(b));
        floats.emplace_back(part.mean,  mean);
    };

    bool retain = false;
    for (int ip = 0; ip < N_TIERS; ++ip) {
        const auto & tl = pools[ip].codecs[i_layer].tl;

        if (tl.key_codec == LLAMA_CAPSULE_KEY_CODEC_PCA) {
            pca(w.k[ip], tl.key_rows, layer.n_embd_head_k, layer.k_mean, layer.k_basis);
        } else {
            retain = true;
        }
        pca(w.v[ip], tl.value_rows, layer.n_embd_head_v, layer.v_mean, layer.v_basis);
    }

    if (retain) {
        const uint32_t n_head = layer.n_head_kv;
        const uint32_t n_drop = N() - layer.n_kept;
        const uint32_t d      = layer.n_embd_head_k;

        w.retain.idx_inv = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_I32, N(), n_head, n_chunk);

        std::vector<int32_t> inv(N());
        for (uint32_t i = 0; i < N(); ++i) {
            inv[layer.token_order[i]] = i;
        }
        std::vector<int32_t> inv_all;
        for (uint32_t i = 0; i < n_head*n_chunk; ++i) {
            inv_all.insert(inv_all.end(), inv.begin(), inv.end());
        }
        ints.emplace_back(w.retain.idx_inv, std::move(inv_all));

        for (uint32_t k = 0; k < K; ++k) {
            w.retain.idx .push_back(ggml_new_tensor_3d(ctx.get(), GGML_TYPE_I32, n_drop, n_head, n_chunk));
            w.retain.gate.push_back(ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, d, n_drop, n_head));

            std::vector<int32_t> idx;
            for (uint32_t i = 0; i < n_head*n_chunk; ++i) {
                for (uint32_t j = 0; j < n_drop; ++j) {
                    idx.push_back(layer.k_neighbours[j*K + k]);
                }
            }

            std::vector<float> gate;
            for (uint32_t i = 0; i < n_head*n_drop; ++i) {
                const auto first = layer.k_gate.begin() + (i*K + k)*d;
                gate.insert(gate.end(), first, first + d);
            }

            ints  .emplace_back(w.retain.idx [k], std::move(idx));
            floats.emplace_back(w.retain.gate[k], std::move(gate));
        }

        if (layer.n_mlp > 0) {
            w.retain.mlp_up      = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, K*d, layer.n_mlp, n_head);
            w.retain.mlp_up_bias = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, layer.n_mlp, 1, n_head);
            w.retain.mlp_down    = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, layer.n_mlp, d, n_head);

            floats.emplace_back(w.retain.mlp_up,      layer.k_mlp_up);
            floats.emplace_back(w.retain.mlp_up_bias, layer.k_mlp_up_bias);
            floats.emplace_back(w.retain.mlp_down,    layer.k_mlp_down);
        }
    }

    ggml_backend_buffer_ptr buf { ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), layer_buft(i_layer)) };
    if (!buf) {
        throw std::runtime_error("no memory for the constants of the capsule");
    }

    for (const auto & [t, x] : floats) {
        GGML_ASSERT(x.size() == (size_t) ggml_nelements(t));
        ggml_backend_tensor_set(t, x.data(), 0, ggml_nbytes(t));
    }
    for (const auto & [t, x] : ints) {
        GGML_ASSERT(x.size() == (size_t) ggml_nelements(t));
        ggml_backend_tensor_set(t, x.data(), 0, ggml_nbytes(t));
    }

    w.ctx = std::move(ctx);
    w.buf = std::move(buf);
}

//
// scratch
//

const llama_capsule_store::scratch & llama_capsule_store::layer_scratch(uint32_t i_layer) const {
    const auto buft = layer_buft(i_layer);
    for (const auto & s : scratches) {
        if (s.buft == buft) {
            return s;
        }
    }
    GGML_ABORT("no scratch for the layer");
}

// room for all hot cells and all slots
bool llama_capsule_store::reserve_scratch() {
    const int64_t n_cols = GGML_PAD((pools[0].n_slots + pools[1].n_slots)*N(), 256) + kv.get_size();
    const int64_t n_pos  = 2*n_pos_total(pools[0].n_slots, pools[1].n_slots);

    uint32_t n_embd_k = 0;
    uint32_t n_embd_v = 0;
    for (const auto & layer : data().layers) {
        n_embd_k = std::max(n_embd_k, layer.n_head_kv*layer.n_embd_head_k);
        n_embd_v = std::max(n_embd_v, layer.n_head_kv*layer.n_embd_head_v);
    }

    for (auto & s : scratches) {
        if (s.k && s.k->ne[1] >= n_cols && s.pos->ne[0] >= n_pos) {
            continue;
        }

        const ggml_init_params params = {
            /*.mem_size   =*/ 3*ggml_tensor_overhead(),
            /*.mem_buffer =*/ nullptr,
            /*.no_alloc   =*/ true,
        };
        ggml_context_ptr ctx { ggml_init(params) };

        ggml_tensor * k = ggml_new_tensor_2d(ctx.get(), kv.type_k(), n_embd_k, n_cols);
        ggml_tensor * v = ggml_new_tensor_2d(ctx.get(), kv.type_v(), n_embd_v, n_cols);
        ggml_set_name(k, "capsule_scratch_k");
        ggml_set_name(v, "capsule_scratch_v");

        ggml_tensor * pos = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I32, n_pos);

        auto buf = alloc_buf(ctx.get(), s.buft);
        if (!buf) {
            return false;
        }

        // the padding columns are masked, but must be finite
        ggml_backend_buffer_clear(buf.get(), 0);

        s.ctx = std::move(ctx);
        s.buf = std::move(buf);
        s.k   = k;
        s.v   = v;
        s.pos = pos;

        touch();
    }

    return true;
}

//
// inputs
//

size_t llama_capsule_store::n_pos_chunk(uint32_t n_slots) const {
    return GGML_PAD(n_slots*N()*kv.hparams.n_pos_per_embd(), CAPSULE_POS_PAD);
}

size_t llama_capsule_store::n_pos_total(uint32_t n_slots_0, uint32_t n_slots_1) const {
    size_t res = 0;
    for (uint32_t n : { n_slots_0, n_slots_1 }) {
        res += n/n_chunk*n_pos_chunk(n_chunk) + n_pos_chunk(n%n_chunk);
    }
    return res;
}

// the positions, and then what is left of them for layers with rotated keys
void llama_capsule_store::set_input_pos(ggml_tensor * dst) const {
    const uint32_t n_pos = kv.hparams.n_pos_per_embd();

    std::vector<int32_t> res(ggml_nelements(dst));

    // section-major within a chunk
    int32_t * data = res.data();
    for (bool rotated : { false, true }) {
        for (const auto & pool : pools) {
            for (uint32_t s = 0; s < pool.n_used; s += n_chunk) {
                const uint32_t n_slots = std::min(n_chunk, pool.n_used - s);
                const uint32_t n       = n_slots*N();

                for (uint32_t j = 0; j < n; ++j) {
                    const uint32_t i = s*N() + j;

                    llama_capsule_rope_pos(pool.cells, i, n_pos, data + j, n);
                    for (uint32_t k = 0; k < n_pos && rotated && !pool.cells.is_empty(i); ++k) {
                        data[k*n + j] = (uint32_t) data[k*n + j] - (uint32_t) pool.stored[i/N()][k]; // a saved state may hold any position
                    }
                }
                data += n_pos_chunk(n_slots);
            }
        }
    }

    ggml_backend_tensor_set(dst, res.data(), 0, ggml_nbytes(dst));
}

template<typename T>
static void capsule_set_mask(ggml_tensor * dst, const llama_ubatch * ubatch, bool causal_attn, uint32_t N,
        const std::vector<std::pair<const llama_kv_cells *, uint32_t>> & pools, T keep, T drop) {
    const int64_t n_cols = dst->ne[0];

    std::vector<T> res(ggml_nelements(dst), drop);

    for (uint32_t i = 0; i < ubatch->n_tokens; ++i) {
        const llama_seq_id seq_id = ubatch->seq_id[i][0];
        const llama_pos    pos    = ubatch->pos[i];

        T * row = res.data() + i*n_cols;

        for (const auto & [cells, n_used] : pools) {
            for (uint32_t j = 0; j < n_used*N; ++j) {
                if (cells->is_empty(j) || !cells->seq_has(j, seq_id)) {
                    continue;
                }
                if (causal_attn) {
                    if (cells->pos_get(j) > pos) {
                        continue;
                    }
                    if (ubatch->is_pos_2d() && cells->pos_get(j) == pos &&
                        cells->ext_get(j).is_2d_gt(ubatch->pos[i + ubatch->n_tokens*2], ubatch->pos[i + ubatch->n_tokens])) {
                        continue;
                    }
                }
                row[j] = keep;
            }
            row += n_used*N;
        }
    }

    ggml_backend_tensor_set(dst, res.data(), 0, ggml_nbytes(dst));
}

void llama_capsule_store::set_input_mask(ggml_tensor * dst, const llama_ubatch * ubatch, bool causal_attn) const {
    const std::vector<std::pair<const llama_kv_cells *, uint32_t>> all = {
        { &pools[0].cells, pools[0].n_used },
        { &pools[1].cells, pools[1].n_used },
    };

    if (dst->type == GGML_TYPE_F16) {
        capsule_set_mask<ggml_fp16_t>(dst, ubatch, causal_attn, N(), all, ggml_fp32_to_fp16(0.0f), ggml_fp32_to_fp16(-INFINITY));
    } else {
        capsule_set_mask<float>(dst, ubatch, causal_attn, N(), all, 0.0f, -INFINITY);
    }
}

llm_graph_input_capsule * llama_capsule_store::graph_input(const llm_graph_context & g, ggml_tensor * kq_mask) const {
    for (const auto & it : g.res->inputs) {
        if (auto * inp = dynamic_cast<llm_graph_input_capsule *>(it.get())) {
            return inp;
        }
    }

    // see llama_kv_cache::set_input_kq_mask()
    const bool causal = g.cparams.causal_attn || kv.hparams.non_causal_type == LLAMA_NON_CAUSAL_TYPE_SWA_ONLY;

    auto inp = std::make_unique<llm_graph_input_capsule>(shared_from_this(), causal);

    if (n_cold() > 0) {
        inp->pos = ggml_new_tensor_1d(g.ctx0, GGML_TYPE_I32, 2*n_pos_total(pools[0].n_used, pools[1].n_used));
        ggml_set_input(inp->pos);
        ggml_set_name(inp->pos, "capsule_inp_pos");

        inp->mask = ggml_new_tensor_2d(g.ctx0, kq_mask->type, n_cold_pad(), kq_mask->ne[1]);
        ggml_set_input(inp->mask);
        ggml_set_name(inp->mask, "capsule_inp_mask");

        inp->mask_kq = ggml_concat(g.ctx0, kq_mask, inp->mask, 0);
    }

    return (llm_graph_input_capsule *) g.res->add_input(std::move(inp));
}

//
// reconstruction
//

uint32_t llama_capsule_store::graph_nodes() const {
    uint32_t n_chunks = 0;
    for (const auto & pool : pools) {
        n_chunks += (pool.n_slots + n_chunk - 1)/n_chunk;
    }

    uint32_t res = 0;
    for (uint32_t i = 0; i < data().layers.size(); ++i) {
        res += 32 + (path(i) != LLAMA_CAPSULE_PATH_RECONSTRUCT ? 0 : n_chunks*(96 + 8*data().n_neighbours));
    }
    return res;
}

// the rows of n_slots slots -> F32 [d, n_rows, n_head_kv, n_slots], without the Hadamard rotation
ggml_tensor * llama_capsule_store::build_rows(ggml_context * ctx, const scratch & s, const std::array<pool_layer::plane, LLAMA_CAPSULE_N_TYPES> & planes,
        const llama_capsule_row_counts & counts, uint32_t i_slot, uint32_t n_slots, ggml_tensor * rot) const {
    ggml_tensor * plain = nullptr;
    ggml_tensor * quant = nullptr;

    for (int t = 0; t < LLAMA_CAPSULE_N_TYPES; ++t) {
        if (counts[t] == 0) {
            continue;
        }

        ggml_tensor * src = planes[t].rows;

        ggml_tensor * rows = ggml_view_4d(ctx, src, src->ne[0], src->ne[1], src->ne[2], n_slots, src->nb[1], src->nb[2], src->nb[3], i_slot/n_chunk*planes[t].stride);
        ggml_tensor * idx  = ggml_view_3d(ctx, s.idx, src->ne[1], src->ne[2], n_slots, s.idx->nb[1], s.idx->nb[2], 0);

        // get_rows dequantizes on every backend
        ggml_tensor * x = ggml_get_rows(ctx, rows, idx);

        auto & list = ggml_is_quantized(src->type) ? quant : plain;
        list = list ? ggml_concat(ctx, list, x, 1) : x;
    }

    if (quant) {
        quant = llama_mul_mat_hadamard(ctx, quant, rot);
    }

    return plain && quant ? ggml_concat(ctx, plain, quant, 1) : plain ? plain : quant;
}

// rows -> [d*n_head_kv, N, n_slots], or transposed [N, d*n_head_kv, n_slots]
ggml_tensor * llama_capsule_store::build_pca(ggml_context * ctx, ggml_tensor * rows, const weights_part & w, uint32_t n_slots, bool trans) const {
    const int64_t d      = w.mean->ne[0];
    const int64_t n_head = w.mean->ne[2];
    const int64_t n_all  = w.basis->ne[0];

    ggml_tensor * x = ggml_concat(ctx, rows, ggml_repeat_4d(ctx, w.mean, d, 1, n_head, n_slots), 1);

    if (x->ne[1] < n_all) {
        x = ggml_pad(ctx, x, 0, n_all - x->ne[1], 0, 0);
    }

    x = ggml_cont_3d(ctx, ggml_permute(ctx, x, 1, 0, 2, 3), n_all, d*n_head, n_slots);

    if (trans) {
        return ggml_mul_mat(ctx, w.basis, x);
    }

    return ggml_mul_mat(ctx, x, ggml_repeat_4d(ctx, w.basis, n_all, N(), n_slots, 1));
}

// rows -> [d*n_head_kv, N, n_slots]
ggml_tensor * llama_capsule_store::build_retain(ggml_context * ctx, ggml_tensor * rows, uint32_t i_layer, uint32_t n_slots) const {
    const auto & layer = data().layers[i_layer];
    const auto & w     = weights[i_layer].retain;

    const int64_t d      = layer.n_embd_head_k;
    const int64_t n_head = layer.n_head_kv;
    const int64_t n_kept = layer.n_kept;
    const int64_t n_drop = N() - n_kept;
    const int64_t n_res  = rows->ne[1] - n_kept;

    auto chunk = [&](ggml_tensor * idx) {
        return ggml_view_3d(ctx, idx, idx->ne[0], idx->ne[1], n_slots, idx->nb[1], idx->nb[2], 0);
    };

    ggml_tensor * kept = ggml_view_4d(ctx, rows, d, n_kept, n_head, n_slots, rows->nb[1], rows->nb[2], rows->nb[3], 0);

    ggml_tensor * pred = nullptr;
    ggml_tensor * z    = nullptr;

    for (size_t k = 0; k < w.idx.size(); ++k) {
        ggml_tensor * x = ggml_get_rows(ctx, kept, chunk(w.idx[k]));
        ggml_tensor * y = ggml_mul(ctx, x, w.gate[k]);

        pred = pred ? ggml_add(ctx, pred, y) : y;

        if (w.mlp_up) {
            z = z ? ggml_concat(ctx, z, x, 0) : x;
        }
    }

    if (w.mlp_up) {
        // the slots as more columns of each head: one product for all, and Vulkan repeats no matrix along dimension 3
        auto swap = [&](ggml_tensor * x) {
            return ggml_cont(ctx, ggml_permute(ctx, x, 0, 1, 3, 2));
        };

        z = ggml_reshape_3d(ctx, swap(z), z->ne[0], n_drop*n_slots, n_head);
        z = ggml_mul_mat(ctx, w.mlp_up, z);
        z = ggml_add(ctx, z, w.mlp_up_bias);
        z = ggml_gelu_erf(ctx, z);
        z = ggml_mul_mat(ctx, w.mlp_down, z);

        pred = ggml_add(ctx, pred, swap(ggml_reshape_4d(ctx, z, d, n_drop, n_slots, n_head)));
    }

    if (n_res > 0) {
        ggml_tensor * res = ggml_cont(ctx, ggml_view_4d(ctx, rows, d, n_res, n_head, n_slots, rows->nb[1], rows->nb[2], rows->nb[3], n_kept*rows->nb[1]));
        if (n_res < n_drop) {
            res = ggml_pad(ctx, res, 0, n_drop - n_res, 0, 0);
        }
        pred = ggml_add(ctx, pred, res);
    }

    ggml_tensor * x = ggml_concat(ctx, kept, pred, 1);

    x = ggml_get_rows(ctx, x, chunk(w.idx_inv)); // [d, N, n_head, n_slots]

    return ggml_cont_3d(ctx, ggml_permute(ctx, x, 0, 2, 1, 3), d*n_head, N(), n_slots);
}

// the same bytes as integers: every backend copies those, but not every one quantized rows
static ggml_tensor * capsule_as_words(ggml_context * ctx, ggml_tensor * t) {
    const size_t row = ggml_row_size(t->type, t->ne[0]);

    if (!ggml_is_quantized(t->type) || row % sizeof(int32_t) != 0) {
        return t;
    }

    ggml_tensor * res = ggml_view_2d(ctx, t, t->ne[0], t->ne[1], t->nb[1], 0);

    res->type  = GGML_TYPE_I32;
    res->ne[0] = row/sizeof(int32_t);
    res->nb[0] = sizeof(int32_t);

    return res;
}

void llama_capsule_store::build_copy(const build_args & a, ggml_tensor * src, ggml_tensor * dst) const {
    if (src->type == dst->type) {
        src = capsule_as_words(a.ctx, src);
        dst = capsule_as_words(a.ctx, dst);
    }

    ggml_build_forward_expand(a.gf, ggml_cpy(a.ctx, src, dst));
}

void llama_capsule_store::build_chunk(const build_args & a, int ip, const pool_layer & slots, uint32_t i_slot, uint32_t n_slots, int64_t col, int64_t i_pos) const {
    const auto & layer = data().layers[a.i_layer];
    const auto & tl    = pools[ip].codecs[a.i_layer].tl;
    const auto & s     = layer_scratch(a.i_layer);
    const auto & w     = weights[a.i_layer];

    ggml_context * ctx = a.ctx;

    const int64_t n        = n_slots*N();
    const int64_t n_embd_k = layer.n_head_kv*layer.n_embd_head_k;
    const int64_t n_embd_v = layer.n_head_kv*layer.n_embd_head_v;

    ggml_tensor * x = build_rows(ctx, s, slots.k, tl.key_rows, i_slot, n_slots, s.rot_k);

    x = tl.key_codec == LLAMA_CAPSULE_KEY_CODEC_RETAIN ?
        build_retain(ctx, x, a.i_layer, n_slots) :
        build_pca   (ctx, x, w.k[ip], n_slots, false);

    x = ggml_reshape_3d(ctx, x, layer.n_embd_head_k, layer.n_head_kv, n);
    if (layer.rope) {
        ggml_tensor * pos = ggml_view_1d(ctx, a.pos, n*kv.hparams.n_pos_per_embd(), i_pos*sizeof(int32_t));

        x = llama_capsule_rope(ctx, kv.model, a.cparams, x, pos, kv.model.get_rope_factors(a.cparams, layer.il), layer.il);
    }
    if (a.k_rot) {
        x = llama_mul_mat_hadamard(ctx, x, a.k_rot);
    }
    build_copy(a, ggml_reshape_2d(ctx, x, n_embd_k, n), ggml_view_2d(ctx, a.k_cold, n_embd_k, n, a.k_cold->nb[1], col*a.k_cold->nb[1]));

    x = build_rows(ctx, s, slots.v, tl.value_rows, i_slot, n_slots, s.rot_v);
    x = build_pca(ctx, x, w.v[ip], n_slots, kv.v_trans);

    if (kv.v_trans) {
        const size_t es = ggml_type_size(a.v_cold->type);

        build_copy(a, x, ggml_view_3d(ctx, a.v_cold, N(), n_embd_v, n_slots, a.v_cold->nb[1], N()*es, col*es));
    } else {
        if (a.v_rot) {
            x = llama_mul_mat_hadamard(ctx, x, a.v_rot);
        }
        build_copy(a, ggml_reshape_2d(ctx, x, n_embd_v, n), ggml_view_2d(ctx, a.v_cold, n_embd_v, n, a.v_cold->nb[1], col*a.v_cold->nb[1]));
    }
}

void llama_capsule_store::build_reconstruct(const build_args & a) const {
    int64_t col   = 0;
    int64_t i_pos = 0;

    const int64_t n_pos_all = n_pos_total(pools[0].n_used, pools[1].n_used);

    for (int ip = 0; ip < N_TIERS; ++ip) {
        const auto & pool = pools[ip];

        for (uint32_t i_slot = 0; i_slot < pool.n_used; i_slot += n_chunk) {
            const uint32_t n_slots = std::min(n_chunk, pool.n_used - i_slot);

            build_chunk(a, ip, pool.layers[a.i_layer], i_slot, n_slots, col, rotated(a.i_layer, ip) ? n_pos_all + i_pos : i_pos);

            col   += n_slots*N();
            i_pos += n_pos_chunk(n_slots);
        }
    }
}

std::string llama_capsule_store::find_unsupported(uint32_t i_layer) const {
    const auto buft = layer_buft(i_layer);
    const auto dev  = ggml_backend_buft_get_device(buft);
    if (!dev) {
        return "";
    }

    const auto & layer = data().layers[i_layer];

    const size_t n_nodes = 256 + 64*data().n_neighbours;

    const ggml_init_params params = {
        /*.mem_size   =*/ 2*n_nodes*ggml_tensor_overhead() + ggml_graph_overhead_custom(n_nodes, false),
        /*.mem_buffer =*/ nullptr,
        /*.no_alloc   =*/ true,
    };
    ggml_context_ptr ctx { ggml_init(params) };

    auto f32 = [&](int64_t n) {
        return ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, n, n);
    };

    const int64_t n        = n_chunk*N();
    const int64_t n_embd_k = layer.n_head_kv*layer.n_embd_head_k;
    const int64_t n_embd_v = layer.n_head_kv*layer.n_embd_head_v;

    // one full chunk of each tier, as build_attn() does it
    build_args a = {
        ctx.get(), ggml_new_graph_custom(ctx.get(), n_nodes, false), lctx.get_cparams(), i_layer, nullptr, nullptr,
        ggml_new_tensor_2d(ctx.get(), kv.type_k(), n_embd_k, n),
        kv.v_trans ? ggml_new_tensor_2d(ctx.get(), kv.type_v(), n, n_embd_v) : ggml_new_tensor_2d(ctx.get(), kv.type_v(), n_embd_v, n),
        ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I32, n_pos_chunk(n_chunk)),
        kv.attn_rot_k ? f32(llama_capsule_hadamard_size(layer.n_embd_head_k)) : nullptr,
        kv.attn_rot_v ? f32(64) : nullptr,
    };

    build_copy(a, ggml_dup_tensor(ctx.get(), a.pos),    a.pos);
    build_copy(a, ggml_dup_tensor(ctx.get(), a.k_cold), a.k_cold);
    build_copy(a, ggml_dup_tensor(ctx.get(), a.v_cold), a.v_cold);

    std::array<pool_layer, N_TIERS> slots;
    for (int ip = 0; ip < N_TIERS; ++ip) {
        make_slots(slots[ip], pools[ip].codecs[i_layer], n_chunk, true, ggml_backend_buft_get_alignment(buft));
        build_chunk(a, ip, slots[ip], 0, n_chunk, 0, 0);
    }

    for (int i = 0; i < ggml_graph_n_nodes(a.gf); ++i) {
        const ggml_tensor * op = ggml_graph_node(a.gf, i);

        if (!ggml_backend_dev_supports_op(dev, op)) {
            return format("%s (%s, %s)", ggml_op_desc(op), op->src[0] ? ggml_type_name(op->src[0]->type) : "", ggml_type_name(op->type));
        }
    }

    return "";
}

ggml_tensor * llama_capsule_store::build_attn(
        const llm_graph_context & g,
                    ggml_tensor * q,
                    ggml_tensor * k,
                    ggml_tensor * v,
                    ggml_tensor * kq_b,
                    ggml_tensor * kq_mask,
                    ggml_tensor * sinks,
                    ggml_tensor * k_rot,
                    ggml_tensor * v_rot,
                          float   kq_scale,
                            int   il) {
    auto * inp = graph_input(g, kq_mask);

    const uint32_t i_layer = find_layer(il);

    if (!rope_checked[i_layer]) {
        if (!llama_capsule_check_rope(g.gf, k->view_src, k_rot, kv.model, g.cparams, il)) {
            llama_capsule_refuse(format("the RoPE of layer %d is of an unknown kind", il));
        }
        rope_checked[i_layer] = true;
    }

    if (n_cold() == 0) {
        return g.build_attn_mha(q, k, v, kq_b, kq_mask, sinks, nullptr, 0, kq_scale, il);
    }

    if (can_attend(g, i_layer, q, kq_b, sinks)) {
        return build_attend(g, i_layer, q, k, v, kq_mask, inp->mask, kq_scale);
    }
    if (can_op_attend(g, i_layer, q, kq_b, sinks)) {
        return build_op_attend(g, *inp, i_layer, q, k, v, kq_mask, kq_scale);
    }

    const auto & layer = data().layers[i_layer];
    const auto & s     = layer_scratch(i_layer);

    ggml_context * ctx = g.ctx0;

    const int64_t d_k      = layer.n_embd_head_k;
    const int64_t d_v      = layer.n_embd_head_v;
    const int64_t n_head   = layer.n_head_kv;
    const int64_t n_embd_k = n_head*d_k;
    const int64_t n_embd_v = n_head*d_v;

    const bool v_trans = kv.v_trans;

    const int64_t n_kv   = k->ne[2];
    const int64_t n_cols = n_kv + n_cold_pad();

    const size_t k_row = ggml_row_size(s.k->type, n_embd_k);
    const size_t v_row = v_trans ? ggml_row_size(s.v->type, n_cols) : ggml_row_size(s.v->type, n_embd_v);

    // columns [col, col + n) of the scratch
    auto k_cols = [&](int64_t col, int64_t n) {
        return ggml_view_2d(ctx, s.k, n_embd_k, n, k_row, col*k_row);
    };
    auto v_cols = [&](int64_t col, int64_t n) {
        return v_trans ?
            ggml_view_2d(ctx, s.v, n, n_embd_v, v_row, col*ggml_type_size(s.v->type)) :
            ggml_view_2d(ctx, s.v, n_embd_v, n, v_row, col*v_row);
    };

    // note: as with the KV cache itself, the scratch is written and read in the order of the calls here

    // hot cells
    ggml_tensor * v_hot = v_trans ? ggml_view_2d(ctx, v, n_kv, n_embd_v, v->nb[2], 0) : ggml_view_2d(ctx, v, n_embd_v, n_kv, v->nb[2], 0);

    build_args a = { ctx, g.gf, g.cparams, i_layer, g.sched, g.backend_cpu, k_cols(n_kv, n_cold()), v_cols(n_kv, n_cold()), nullptr, k_rot, v_rot };

    build_copy(a, ggml_view_2d(ctx, k, n_embd_k, n_kv, k->nb[2], 0), k_cols(0, n_kv));
    build_copy(a, v_hot, v_cols(0, n_kv));

    // slots
    if (path(i_layer) == LLAMA_CAPSULE_PATH_RECONSTRUCT) {
        // once per device: views of an input would be copied one by one
        auto & pos = inp->pos_dev[s.buft];
        if (!pos) {
            pos = ggml_cpy(ctx, inp->pos, ggml_view_1d(ctx, s.pos, inp->pos->ne[0], 0));
            ggml_build_forward_expand(g.gf, pos);
        }
        a.pos = pos;

        build_reconstruct(a);
    } else if (path(i_layer) == LLAMA_CAPSULE_PATH_OP) {
        build_op_unpack(g, *inp, i_layer, a.k_cold, a.v_cold);
    } else {
        build_unpack(a);
    }

    // the same shapes as llama_kv_cache::get_k() and get_v()
    k = ggml_view_4d(ctx, s.k, d_k, n_head, n_cols, 1, ggml_row_size(s.k->type, d_k), k_row, k_row*n_cols, 0);
    v = v_trans ?
        ggml_view_4d(ctx, s.v, n_cols, n_head, d_v, 1, v_row*d_v, v_row, v_row*n_embd_v, 0) :
        ggml_view_4d(ctx, s.v, d_v, n_head, n_cols, 1, ggml_row_size(s.v->type, d_v), v_row, v_row*n_cols, 0);

    return g.build_attn_mha(q, k, v, kq_b, inp->mask_kq, sinks, nullptr, 0, kq_scale, il);
}
