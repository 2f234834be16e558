#include "llama-capsule-store.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-kv-cache.h"

#include <algorithm>
#include <map>

//
// hot cells -> slots with GGML_OP_CAPSULE, where both of them are, some layers at a time: only the sums for the guard come back
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

static constexpr uint32_t CAPSULE_OP_LAYERS = 8; // of a graph: a block that the guard refuses is encoded in vain in the rest of them

// the blocks of a tier
struct llama_capsule_store::op_batch {
    std::vector<block *> blocks;
    std::vector<size_t>  first; // of their cells in the reader
    std::vector<int32_t> index; // [blocks][N + 1]

    ggml_tensor * index_t = nullptr;

    // by what undoes the RoPE of the cells, -1: there is none
    struct table {
        std::vector<float> angles; // [blocks][N][n_rot]

        ggml_tensor * angles_t = nullptr;
    };
    std::map<int, table> tables;
};

struct llama_capsule_store::op_graph {
    ggml_context_ptr        ctx;
    ggml_backend_buffer_ptr buf;

    ggml_cgraph * gf = nullptr;

    std::array<op_batch, N_TIERS> batches;

    // of K and V, nullptr if the guard does not ask
    using errors = std::array<ggml_tensor *, 2>;

    std::vector<std::array<errors, N_TIERS>> layers;
};

void llama_capsule_store::op_encode_blocks(const std::vector<block *> & blocks, op_graph & g) const {
    size_t first = 0;
    for (block * b : blocks) {
        if (b->wanted()) {
            auto & batch = g.batches[b->i_pool];

            batch.blocks.push_back(b);
            batch.first.push_back(first);
            batch.index.insert(batch.index.end(), b->idxs.begin(), b->idxs.end());
            batch.index.resize(batch.blocks.size()*(N() + 1) - 1, -1);
            batch.index.push_back(b->i_slot);
        }
        first += b->idxs.size();
    }

    for (auto & batch : g.batches) {
        if (!batch.blocks.empty()) {
            batch.index_t = ggml_new_tensor_2d(g.ctx.get(), GGML_TYPE_I32, N() + 1, batch.blocks.size());
        }
    }
}

// layers with the same angles share them
ggml_tensor * llama_capsule_store::op_encode_angles(uint32_t i_layer, int i_pool, llama_capsule_kv::reader & reader, op_graph & g) const {
    const auto * params = rope.params(i_layer);
    if (!params) {
        return nullptr;
    }

    const uint32_t n_rot = params->n_rot;

    auto & batch = g.batches[i_pool];
    auto & res   = batch.tables[rope.find_table(i_layer, rotated(i_layer, 0), rotated(i_layer, 1))];
    if (res.angles_t) {
        return res.angles_t;
    }
    res.angles.resize(batch.blocks.size()*N()*n_rot, 0.0f);
    res.angles_t = ggml_new_tensor_3d(g.ctx.get(), GGML_TYPE_F32, n_rot, N(), batch.blocks.size());

    const float * angles = reader.angles(data().layers[i_layer].il, true);

    std::vector<float> stored(n_rot); // keys that are stored rotated keep these

    for (size_t i = 0; i < batch.blocks.size(); ++i) {
        const block & b   = *batch.blocks[i];
        const float * src = angles + batch.first[i]*n_rot;
        float       * dst = res.angles.data() + i*N()*n_rot;

        if (!rotated(i_layer, i_pool)) {
            std::copy(src, src + b.idxs.size()*n_rot, dst);
            continue;
        }
        params->fill(pools[i_pool].stored[b.i_slot], false, stored.data());
        for (size_t j = 0; j < b.idxs.size(); ++j) {
            params->add(src + j*n_rot, stored.data(), dst + j*n_rot);
        }
    }

    return res.angles_t;
}

// false: the backend lacks something
bool llama_capsule_store::op_encode_build(ggml_backend_t backend, uint32_t i_layer, llama_capsule_kv::reader & reader, op_graph & g) const {
    const auto & cells = kv.layers[kv.map_layer_ids.at(data().layers[i_layer].il)];

    ggml_context * ctx = g.ctx.get();

    std::vector<ggml_tensor *> nodes;

    std::array<op_graph::errors, N_TIERS> errors = {};
    for (int ip = 0; ip < N_TIERS; ++ip) {
        if (g.batches[ip].blocks.empty()) {
            continue;
        }
        ggml_tensor * index  = g.batches[ip].index_t;
        ggml_tensor * angles = op_encode_angles(i_layer, ip, reader, g);

        auto p = op_params(i_layer);

        p.flags |= ip > 0 ? GGML_CAPSULE_FLAG_TIER_1 : 0;

        for (bool is_v : { false, true }) {
            p.flags |= is_v ? GGML_CAPSULE_FLAG_V : 0;

            ggml_tensor * x = is_v ? cells.v : cells.k;
            if (is_v && kv.v_trans) {
                x = ggml_view_2d(ctx, x, kv.get_size(), p.n_head_kv*p.d_v, kv.get_size()*ggml_element_size(x), 0);
            }

            nodes.push_back(ggml_capsule_encode(ctx, &p, pools[ip].layers[i_layer].blob, x, index, angles, weights[i_layer].op));
            if (guarded(i_layer, ip, is_v)) {
                nodes.push_back(ggml_capsule_errors(ctx, &p, nodes.back(), x, index, angles, weights[i_layer].op));
                errors[ip][is_v] = nodes.back();
            }
        }
    }

    for (const ggml_tensor * t : nodes) {
        if (!ggml_backend_supports_op(backend, t)) {
            return false;
        }
    }
    for (ggml_tensor * t : nodes) {
        ggml_build_forward_expand(g.gf, t);
    }
    g.layers.push_back(errors);

    return true;
}

bool llama_capsule_store::op_encode_compute(ggml_backend_t backend, ggml_backend_buffer_type_t buft, op_graph & g) const {
    g.buf.reset(ggml_backend_alloc_ctx_tensors_from_buft(g.ctx.get(), buft));
    if (!g.buf) {
        return false;
    }
    for (const auto & batch : g.batches) {
        if (batch.index_t) {
            ggml_backend_tensor_set(batch.index_t, batch.index.data(), 0, ggml_nbytes(batch.index_t));
        }
        for (const auto & [i_table, table] : batch.tables) {
            ggml_backend_tensor_set(table.angles_t, table.angles.data(), 0, ggml_nbytes(table.angles_t));
        }
    }
    return ggml_backend_graph_compute(backend, g.gf) == GGML_STATUS_SUCCESS;
}

// what the guard says of a layer
void llama_capsule_store::op_encode_finish(uint32_t i_layer, const op_batch & batch, const std::array<ggml_tensor *, 2> & sums, llama_capsule_kv::reader & reader) const {
    const size_t n = data().layers[i_layer].n_head_kv*N();

    block_errors all;
    for (int side = 0; side < 2; ++side) {
        if (sums[side]) {
            all[side].resize(batch.blocks.size()*n);
            ggml_backend_tensor_get(sums[side], all[side].data(), 0, ggml_nbytes(sums[side]));
        }
    }

    if (batch.blocks.empty()) {
        return;
    }
    const auto & layer = data().layers[i_layer];

    const uint32_t d_k = layer.n_embd_head_k;
    const uint32_t d_v = layer.n_embd_head_v;

    // quantizers may take a NaN for nothing
    reader.load(layer.il, layer.rope);

    std::vector<float> x(N()*std::max(d_k, d_v));

    for (size_t i = 0; i < batch.blocks.size(); ++i) {
        block_errors errors;
        for (int side = 0; side < 2; ++side) {
            if (sums[side]) {
                errors[side].assign(all[side].begin() + i*n, all[side].begin() + (i + 1)*n);
            }
        }
        auto & b = *batch.blocks[i];

        accept(b, i_layer, errors);

        const uint32_t n_head = layer.n_head_kv;
        const size_t   n_b    = b.idxs.size();

        for (uint32_t h = 0; h < n_head && !b.broken; ++h) {
            reader.read_k(h, batch.first[i], n_b, x.data(), d_k);
            b.broken = !llama_capsule_finite(x.data(), n_b*d_k);
            reader.read_v(h, batch.first[i], n_b, x.data(), d_v);
            b.broken = b.broken || !llama_capsule_finite(x.data(), n_b*d_v);
        }

        // the device has written it already
        std::vector<uint8_t> slot(pools[b.i_pool].codecs[i_layer].layout.slot_stride);
        slot_get(pools[b.i_pool], i_layer, b.i_slot, slot.data());

        for (uint32_t h = 0; h < n_head && !b.broken; ++h) {
            b.broken = !fits(i_layer, b.i_pool, slot.data(), h);
        }
        if (b.broken) {
            std::fill(slot.begin(), slot.end(), 0);
            slot_set(pools[b.i_pool], i_layer, b.i_slot, slot.data());
        }
    }
}

uint32_t llama_capsule_store::op_encode(const std::vector<block *> & blocks, uint32_t i_layer, llama_capsule_kv::reader & reader) const {
    const auto buft = layer_buft(i_layer);

    ggml_backend_t backend = path(i_layer) == LLAMA_CAPSULE_PATH_OP ? capsule_backend(lctx.get_sched(), buft) : nullptr;
    if (!backend) {
        return 0;
    }

    static constexpr size_t n_tensors = CAPSULE_OP_LAYERS*N_TIERS*8;

    const ggml_init_params params = {
        /*.mem_size   =*/ n_tensors*ggml_tensor_overhead() + ggml_graph_overhead_custom(n_tensors, false),
        /*.mem_buffer =*/ nullptr,
        /*.no_alloc   =*/ true,
    };
    op_graph g;
    g.ctx.reset(ggml_init(params));
    g.gf = ggml_new_graph_custom(g.ctx.get(), n_tensors, false);

    op_encode_blocks(blocks, g);

    const uint32_t n_max = std::min<uint32_t>(CAPSULE_OP_LAYERS, data().layers.size() - i_layer);

    uint32_t n = 0;
    while (n < n_max && path(i_layer + n) == LLAMA_CAPSULE_PATH_OP && layer_buft(i_layer + n) == buft && op_encode_build(backend, i_layer + n, reader, g)) {
        ++n;
    }

    // without nodes every block has been refused
    if (ggml_graph_n_nodes(g.gf) > 0 && !op_encode_compute(backend, buft, g)) {
        return 0;
    }

    for (uint32_t i = 0; i < n; ++i) {
        for (int ip = 0; ip < N_TIERS; ++ip) {
            op_encode_finish(i_layer + i, g.batches[ip], g.layers[i][ip], reader);
        }
    }
    LLAMA_LOG_DEBUG("%s: %u layers compressed by GGML_OP_CAPSULE\n", __func__, n);

    return n;
}
