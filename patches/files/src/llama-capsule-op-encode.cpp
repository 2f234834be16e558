#include "llama-capsule-store.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-kv-cache.h"

#include <algorithm>

//
// hot cells -> slots with GGML_OP_CAPSULE, where both of them are: the guard reads sums, and the hash the slots
//

// the backend that computes in this memory, nullptr if there is none
static ggml_backend_t capsule_backend(ggml_backend_sched_t sched, ggml_backend_buffer_type_t buft) {
    const int n = ggml_backend_sched_get_n_backends(sched);

    // the last one is the CPU
    for (int i = ggml_backend_buft_is_host(buft) ? n - 1 : 0; i < n; ++i) {
        ggml_backend_t backend = ggml_backend_sched_get_backend(sched, i);
        if (ggml_backend_supports_buft(backend, buft)) {
            return backend;
        }
    }
    return nullptr;
}

struct llama_capsule_store::op_batch {
    std::vector<block *> blocks;
    std::vector<int32_t> index;  // [blocks][N + 1]
    std::vector<float>   angles; // [blocks][N][n_rot], empty without RoPE

    ggml_tensor * index_t  = nullptr;
    ggml_tensor * angles_t = nullptr;

    std::array<ggml_tensor *, 2> errors = {}; // of K and V
};

void llama_capsule_store::op_encode_inputs(const std::vector<block *> & blocks, uint32_t i_layer, llama_capsule_kv::reader & reader,
        std::array<op_batch, N_TIERS> & batches) const {
    const auto & layer  = data().layers[i_layer];
    const auto * params = rope.params(i_layer);

    const uint32_t n_rot  = op_params(i_layer).n_rot;
    const float  * angles = reader.angles(layer.il, layer.rope);

    std::vector<float> stored(n_rot); // keys that are stored rotated keep these

    size_t first = 0;
    for (block * b : blocks) {
        const size_t n = b->idxs.size();

        if (!b->failed || b->i_pool != 0) {
            auto & cur = batches[b->i_pool];

            cur.blocks.push_back(b);
            cur.index.insert(cur.index.end(), b->idxs.begin(), b->idxs.end());
            cur.index.resize(cur.blocks.size()*(N() + 1) - 1, -1);
            cur.index.push_back(b->i_slot);
            if (angles) {
                const float * src = angles + first*n_rot;

                cur.angles.resize(cur.blocks.size()*N()*n_rot, 0.0f);
                float * dst = cur.angles.data() + (cur.blocks.size() - 1)*N()*n_rot;

                if (rotated(i_layer, b->i_pool)) {
                    params->fill(pools[b->i_pool].stored[b->i_slot], false, stored.data());
                    for (size_t j = 0; j < n; ++j) {
                        params->add(src + j*n_rot, stored.data(), dst + j*n_rot);
                    }
                } else {
                    std::copy(src, src + n*n_rot, dst);
                }
            }
        }
        first += n;
    }
}

void llama_capsule_store::op_encode_build(ggml_context * ctx, ggml_cgraph * gf, uint32_t i_layer, int i_pool, op_batch & batch) const {
    const auto & cells = kv.layers[kv.map_layer_ids.at(data().layers[i_layer].il)];

    auto p = op_params(i_layer);

    batch.index_t  = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, N() + 1, batch.blocks.size());
    batch.angles_t = batch.angles.empty() ? nullptr : ggml_new_tensor_3d(ctx, GGML_TYPE_F32, p.n_rot, N(), batch.blocks.size());

    p.flags |= i_pool > 0 ? GGML_CAPSULE_FLAG_TIER_1 : 0;

    for (bool is_v : { false, true }) {
        p.flags |= is_v ? GGML_CAPSULE_FLAG_V : 0;

        ggml_tensor * x = is_v ? cells.v : cells.k;
        if (is_v && kv.v_trans) {
            x = ggml_view_2d(ctx, x, kv.get_size(), p.n_head_kv*p.d_v, kv.get_size()*ggml_element_size(x), 0);
        }

        ggml_tensor * slots = ggml_capsule_encode(ctx, &p, pools[i_pool].layers[i_layer].blob, x, batch.index_t, batch.angles_t, weights[i_layer].op);
        ggml_build_forward_expand(gf, slots);

        if (guarded(i_layer, i_pool, is_v)) {
            batch.errors[is_v] = ggml_capsule_errors(ctx, &p, slots, x, batch.index_t, batch.angles_t, weights[i_layer].op);
            ggml_build_forward_expand(gf, batch.errors[is_v]);
        }
    }
}

void llama_capsule_store::op_encode_finish(uint32_t i_layer, int i_pool, const op_batch & batch) {
    const size_t n = data().layers[i_layer].n_head_kv*N();

    std::vector<uint8_t> slot(pools[i_pool].codecs[i_layer].layout.slot_stride);

    for (size_t i = 0; i < batch.blocks.size(); ++i) {
        block & b = *batch.blocks[i];

        block_errors errors;
        for (int side = 0; side < 2; ++side) {
            if (batch.errors[side]) {
                errors[side].resize(n);
                ggml_backend_tensor_get(batch.errors[side], errors[side].data(), i*n*sizeof(llama_capsule_errors), n*sizeof(llama_capsule_errors));
            }
        }
        if (accept(b, i_layer, errors)) {
            slot_get(pools[i_pool], i_layer, b.i_slot, slot.data());
            add_hash(b, i_layer, slot.data());
        }
    }
}

bool llama_capsule_store::op_encode_layer(const std::vector<block *> & blocks, uint32_t i_layer, llama_capsule_kv::reader & reader) {
    const auto buft = layer_buft(i_layer);

    ggml_backend_t backend = path(i_layer) == LLAMA_CAPSULE_PATH_OP ? capsule_backend(lctx.get_sched(), buft) : nullptr;
    if (!backend) {
        return false;
    }

    std::array<op_batch, N_TIERS> batches;
    op_encode_inputs(blocks, i_layer, reader, batches);

    const ggml_init_params params = {
        /*.mem_size   =*/ 32*ggml_tensor_overhead() + ggml_graph_overhead_custom(32, false),
        /*.mem_buffer =*/ nullptr,
        /*.no_alloc   =*/ true,
    };
    ggml_context_ptr ctx { ggml_init(params) };
    ggml_cgraph * gf = ggml_new_graph_custom(ctx.get(), 32, false);

    for (int ip = 0; ip < N_TIERS; ++ip) {
        if (!batches[ip].blocks.empty()) {
            op_encode_build(ctx.get(), gf, i_layer, ip, batches[ip]);
        }
    }

    // every block has been refused
    if (ggml_graph_n_nodes(gf) == 0) {
        return true;
    }
    for (int i = 0; i < ggml_graph_n_nodes(gf); ++i) {
        if (!ggml_backend_supports_op(backend, ggml_graph_node(gf, i))) {
            return false;
        }
    }

    ggml_backend_buffer_ptr buf { ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), buft) };
    if (!buf) {
        return false;
    }
    for (const auto & cur : batches) {
        if (cur.index_t) {
            ggml_backend_tensor_set(cur.index_t, cur.index.data(), 0, ggml_nbytes(cur.index_t));
        }
        if (cur.angles_t) {
            ggml_backend_tensor_set(cur.angles_t, cur.angles.data(), 0, ggml_nbytes(cur.angles_t));
        }
    }
    if (ggml_backend_graph_compute(backend, gf) != GGML_STATUS_SUCCESS) {
        return false;
    }

    for (int ip = 0; ip < N_TIERS; ++ip) {
        op_encode_finish(i_layer, ip, batches[ip]);
    }
    return true;
}
