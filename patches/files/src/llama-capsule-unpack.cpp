#include "llama-capsule-store.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-kv-cache.h"
#include "llama-model.h"

#include <algorithm>
#include <cstring>

//
// slots -> K and V in the scratch, on the CPU: what the reconstruction in llama-capsule-graph.cpp does, as one node and without intermediates
//

void llama_capsule_store::init_tiles() const {
    if (tiles.empty()) {
        std::vector<llama_capsule_rope_params> params;
        std::vector<int> layer_params;

        for (const auto & layer : data().layers) {
            int i = -1;
            if (layer.rope && llama_capsule_rope_params::supported(kv.model)) {
                const llama_capsule_rope_params cur(kv.model, lctx.get_cparams(), layer.il);

                i = std::find(params.begin(), params.end(), cur) - params.begin();
                if (i == (int) params.size()) {
                    params.push_back(cur);
                }
            }
            layer_params.push_back(i);
        }

        tiles.resize(data().layers.size());
        variants.resize(tiles.size());
        projections.resize(tiles.size());

        uint32_t d_views = 0;
        for (uint32_t i = 0; i < tiles.size(); ++i) {
            for (const auto & pool : pools) {
                projections[i].emplace_back(pool.codecs[i]);
                variants[i].emplace_back(pool.codecs[i]);
                tiles[i].emplace_back(pool.codecs[i], false);
                tiles[i].emplace_back(pool.codecs[i], true);

                if ((path(i) == LLAMA_CAPSULE_PATH_FUSED && projections[i].back().usable()) || (path(i) == LLAMA_CAPSULE_PATH_OP && op_wants_views(i))) {
                    d_views = data().layers[i].n_embd_head_k;
                }
            }
        }

        rope.init(std::move(params), layer_params, N(), d_views);
    }
}

// before a graph is computed
void llama_capsule_store::update_rope() const {
    init_tiles();

    for (int ip = 0; ip < N_TIERS; ++ip) {
        rope.update(ip, pools[ip].cells, pools[ip].stored, pools[ip].n_used, kv.hparams.n_pos_per_embd());
    }
}

void llama_capsule_store::unrotate(uint32_t i_layer, const llama_capsule_pos & pos, uint32_t n, float * k) const {
    init_tiles();

    const auto & layer  = data().layers[i_layer];
    const auto * params = rope.params(i_layer);

    std::vector<float> cs(params->n_rot);
    params->fill(pos, false, cs.data());
    params->negate(cs.data(), cs.data());

    llama_capsule_simd_get().rope(n*layer.n_head_kv, k, layer.n_embd_head_k, cs.data(), 0, params->n_rot, params->norm);
}

const llama_capsule_tile & llama_capsule_store::tile(uint32_t i_layer, int i_pool, bool is_v) const {
    return tiles[i_layer][2*i_pool + is_v];
}

// dst: the columns of the slots in the scratch
void llama_capsule_store::unpack(ggml_tensor * dst, uint32_t i_layer, bool is_v, int ith, int nth) const {
    static thread_local std::vector<float> angles;
    static thread_local std::vector<float> x;
    static thread_local std::vector<float> col;

    const auto & layer = data().layers[i_layer];
    const auto & simd  = llama_capsule_simd_get();

    const uint32_t n_head = layer.n_head_kv;
    const uint32_t d      = is_v ? layer.n_embd_head_v : layer.n_embd_head_k;

    const auto * rope_params = is_v ? nullptr : rope.params(i_layer);
    const bool   trans       = is_v && kv.v_trans;

    // the rotation of a quantized hot cache, see llama_kv_cache::build_input_k_rot()
    const uint32_t n_hadamard = is_v ? (kv.attn_rot_v ? 64 : 0) : (kv.attn_rot_k ? llama_capsule_hadamard_size(d) : 0);

    auto store = [dst](const float * src, char * to, int64_t n) {
        switch (dst->type) {
            case GGML_TYPE_F32: memcpy(to, src, n*sizeof(float));                            break;
            case GGML_TYPE_F16: llama_capsule_to_f16(src, (ggml_fp16_t *) to, n);            break;
            default:            ggml_get_type_traits(dst->type)->from_float_ref(src, to, n); break;
        }
    };

    uint32_t i_slot = 0; // over all tiers
    for (int ip = 0; ip < N_TIERS; ++ip) {
        const auto & pool = pools[ip];
        const auto & t    = tile(i_layer, ip, is_v);

        x.resize(N()*t.ld());
        col.resize(N());

        for (uint32_t s = 0; s < pool.n_used; ++s, ++i_slot) {
            if (i_slot % nth != (uint32_t) ith) {
                continue;
            }

            const uint8_t * slot = (const uint8_t *) pool.layers[i_layer].blob->data + s*pool.codecs[i_layer].layout.slot_stride;

            if (rope_params) {
                angles.resize(N()*rope_params->n_rot);
                for (uint32_t j = 0; j < N(); ++j) {
                    const uint32_t offs = j*rope_params->n_rot;
                    rope_params->add(rope.first(i_layer, ip, s, rotated(i_layer, ip)), rope.distances(i_layer, ip, s) + offs, angles.data() + offs);
                }
            }

            for (uint32_t h = 0; h < n_head; ++h) {
                t.decode(slot, h, x.data());

                if (trans) {
                    // a row per channel
                    for (uint32_t i = 0; i < d; ++i) {
                        for (uint32_t j = 0; j < N(); ++j) {
                            col[j] = x[j*t.ld() + i];
                        }
                        store(col.data(), (char *) dst->data + (h*d + i)*dst->nb[1] + i_slot*N()*ggml_type_size(dst->type), N());
                    }
                    continue;
                }

                if (rope_params) {
                    simd.rope(N(), x.data(), t.ld(), angles.data(), rope_params->n_rot, rope_params->n_rot, rope_params->norm);
                }
                for (uint32_t j = 0; j < N(); ++j) {
                    if (n_hadamard > 0) {
                        simd.hadamard(x.data() + j*t.ld(), n_hadamard, d);
                    }
                    store(x.data() + j*t.ld(), (char *) dst->data + (i_slot*N() + j)*dst->nb[1] + ggml_row_size(dst->type, h*d), d);
                }
            }
        }
    }
}

void llama_capsule_store::build_unpack(const build_args & a) const {
    ggml_tensor * blobs[N_TIERS];

    const int n_blobs = blobs_in_use(a.i_layer, blobs);

    auto * arg = const_cast<op_arg *>(&op_args[a.i_layer]);

    const ggml_custom_op_t fn_k = [](ggml_tensor * dst, int ith, int nth, void * userdata) {
        const auto * arg = (const op_arg *) userdata;
        arg->store->unpack(dst, arg->i_layer, false, ith, nth);
    };
    const ggml_custom_op_t fn_v = [](ggml_tensor * dst, int ith, int nth, void * userdata) {
        const auto * arg = (const op_arg *) userdata;
        arg->store->unpack(dst, arg->i_layer, true, ith, nth);
    };

    auto build = [&](ggml_tensor * dst, ggml_custom_op_t fn) {
        if (path(a.i_layer) == LLAMA_CAPSULE_PATH_HOST) {
            // into host memory, then to the device
            ggml_tensor * cur = ggml_custom_4d(a.ctx, dst->type, dst->ne[0], dst->ne[1], 1, 1, blobs, n_blobs, fn, GGML_N_TASKS_MAX, arg);
            ggml_backend_sched_set_tensor_backend(a.sched, cur, a.backend_cpu); // RPC devices claim to support every op
            build_copy(a, cur, dst);
        } else {
            ggml_build_forward_expand(a.gf, ggml_custom_inplace(a.ctx, dst, blobs, n_blobs, fn, GGML_N_TASKS_MAX, arg));
        }
    };
    build(a.k_cold, fn_k);
    build(a.v_cold, fn_v);
}

int llama_capsule_store::blobs_in_use(uint32_t i_layer, ggml_tensor ** blobs) const {
    int n = 0;
    for (const auto & pool : pools) {
        if (pool.n_used > 0) {
            blobs[n++] = pool.layers[i_layer].blob;
        }
    }
    return n;
}
