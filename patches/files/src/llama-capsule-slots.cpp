#include "llama-capsule-store.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-kv-cache.h"
#include "llama-model.h"

#include <algorithm>
#include <cstdlib>

//
// where the slots of a layer live, and how attention gets at them
//

ggml_backend_buffer_type_t llama_capsule_store::layer_buft(uint32_t i_layer) const {
    const auto & layer = kv.layers[kv.map_layer_ids.at(data().layers[i_layer].il)];

    return ggml_backend_buffer_get_type(layer.k->buffer);
}

ggml_backend_buffer_type_t llama_capsule_store::slots_buft(uint32_t i_layer) const {
    return path(i_layer) == LLAMA_CAPSULE_PATH_HOST ? ggml_backend_cpu_buffer_type() : layer_buft(i_layer);
}

llama_capsule_path llama_capsule_store::path(uint32_t i_layer) const {
    return paths[i_layer];
}

// of a variable with a few known values; what is none of them is as if it were not set
static std::string capsule_env(const char * name, const std::vector<std::string> & known) {
    const char * env = getenv(name);
    if (!env || !*env || std::find(known.begin(), known.end(), env) != known.end()) {
        return env ? env : "";
    }

    std::string list;
    for (const auto & value : known) {
        list += " " + value;
    }
    LLAMA_LOG_WARN("%s: %s=%s is ignored, there are:%s\n", __func__, name, env, list.c_str());

    return "";
}

void llama_capsule_store::init_paths() {
    const std::string wanted = capsule_env("LLAMA_KVCAPSULE_PATH", { "reconstruct", "host", "unpack", "fused", "op" });

    std::vector<std::string> simds = { "0" };
    for (const auto & simd : llama_capsule_simd_all()) {
        simds.push_back(simd.name);
    }
    capsule_env("LLAMA_KVCAPSULE_SIMD", simds);

    // not for every layer
    std::string warned;
    const auto warn = [&warned, func = __func__](const std::string & line) {
        if (line != warned) {
            LLAMA_LOG_INFO("%s: %s\n", func, line.c_str());
            warned = line;
        }
    };

    for (uint32_t i = 0; i < data().layers.size(); ++i) {
        const auto buft = layer_buft(i);

        // the ops of the CPU know this kind of RoPE
        const bool known = !data().layers[i].rope || llama_capsule_rope_params::supported(kv.model);

        auto & res = paths.emplace_back(LLAMA_CAPSULE_PATH_RECONSTRUCT);

        if (known && wanted == "host") {
            res = LLAMA_CAPSULE_PATH_HOST;
            continue;
        }
        if (known && wanted == "op") {
            if (op_available(i)) {
                init_op_weights(i);
                res = LLAMA_CAPSULE_PATH_OP;
                continue;
            }
            warn(format("%s lacks GGML_OP_CAPSULE for these heads, blocks or types of the cache: its layers take another path", ggml_backend_buft_name(buft)));
        }
        if (known && wanted != "reconstruct" && ggml_backend_buft_is_host(buft)) {
            res = wanted == "unpack" ? LLAMA_CAPSULE_PATH_UNPACK : LLAMA_CAPSULE_PATH_FUSED;
            continue;
        }

        init_weights(i);

        const std::string op = find_unsupported(i);
        if (op.empty()) {
            continue;
        }

        const std::string line = format("%s lacks %s", ggml_backend_buft_name(buft), op.c_str());
        if (!known) {
            llama_capsule_refuse(line);
        }

        weights[i] = {};
        res = LLAMA_CAPSULE_PATH_HOST;

        warn(line + ": the slots of its layers stay in host memory, attention over them is slower");
    }
}

//
// the tensors of one layer
//

void llama_capsule_store::make_slots(pool_layer & res, const llama_capsule_codec & codec, uint32_t n_slots, bool planes, size_t align) const {
    const auto & layer = codec.layer;

    const ggml_init_params params = {
        /*.mem_size   =*/ (3 + 8*LLAMA_CAPSULE_N_TYPES)*ggml_tensor_overhead(),
        /*.mem_buffer =*/ nullptr,
        /*.no_alloc   =*/ true,
    };
    res.ctx.reset(ggml_init(params));
    res.n_slots = n_slots;

    if (!planes) {
        res.blob = ggml_new_tensor_1d(res.ctx.get(), GGML_TYPE_I8, codec.layout.slot_stride*n_slots);
        ggml_format_name(res.blob, "capsule_l%d", (int) layer.il);
        return;
    }

    auto make = [&](auto & dst, const llama_capsule_row_counts & counts, uint32_t d) {
        for (int t = 0; t < LLAMA_CAPSULE_N_TYPES; ++t) {
            if (counts[t] == 0) {
                continue;
            }
            auto & plane = dst[t];

            const ggml_type type = LLAMA_CAPSULE_TYPES[t];

            const size_t size = layer.n_head_kv*counts[t]*ggml_row_size(type, d);

            plane.stride = GGML_PAD(n_chunk*size, align);
            plane.mem    = ggml_new_tensor_1d(res.ctx.get(), GGML_TYPE_I8, n_slots/n_chunk*plane.stride + n_slots%n_chunk*size);
            plane.rows   = ggml_new_tensor_4d(res.ctx.get(), type, d, counts[t], layer.n_head_kv, std::min(n_slots, n_chunk));
            plane.rows->view_src = plane.mem;
            ggml_format_name(plane.mem, "capsule_l%d_%s", (int) layer.il, ggml_type_name(type));
        }
    };

    make(res.k, codec.tl.key_rows,   layer.n_embd_head_k);
    make(res.v, codec.tl.value_rows, layer.n_embd_head_v);
}

// memory by memory: all that fits
static void capsule_copy_slots(ggml_context * ctx, ggml_tensor * src, ggml_tensor * dst) {
    if (src && dst) {
        const int64_t n = std::min(src->ne[0], dst->ne[0]);

        ggml_tensor * from = ggml_view_1d(ctx, src, n, 0);
        ggml_tensor * to   = ggml_view_1d(ctx, dst, n, 0);

        ggml_backend_view_init(from);
        ggml_backend_view_init(to);
        ggml_backend_tensor_copy(from, to);
    }
}

bool llama_capsule_store::resize_layers(pool & pool, uint32_t n_slots) {
    for (uint32_t i = 0; i < data().layers.size(); ++i) {
        if (pool.layers[i].n_slots != n_slots && !resize_layer(pool, i, n_slots)) {
            return false;
        }
    }
    return true;
}

bool llama_capsule_store::resize_layer(pool & pool, uint32_t i_layer, uint32_t n_slots) {
    const auto buft = slots_buft(i_layer);

    pool_layer res;

    if (n_slots == 0) {
        pool.layers[i_layer] = std::move(res);
        return true;
    }

    make_slots(res, pool.codecs[i_layer], n_slots, path(i_layer) == LLAMA_CAPSULE_PATH_RECONSTRUCT, ggml_backend_buft_get_alignment(buft));

    auto & old = pool.layers[i_layer];

    res.buf = n_slots > old.n_slots ? alloc_buf(res.ctx.get(), buft) : ggml_backend_buffer_ptr { ggml_backend_alloc_ctx_tensors_from_buft(res.ctx.get(), buft) };
    if (!res.buf) {
        return false;
    }
    ggml_backend_buffer_clear(res.buf.get(), 0);

    capsule_copy_slots(res.ctx.get(), old.blob, res.blob);
    for (int t = 0; t < LLAMA_CAPSULE_N_TYPES; ++t) {
        capsule_copy_slots(res.ctx.get(), old.k[t].mem, res.k[t].mem);
        capsule_copy_slots(res.ctx.get(), old.v[t].mem, res.v[t].mem);
    }

    // layer by layer: only one layer exists twice
    old = std::move(res);

    return true;
}

//
// whole slots
//

// calls fn(tensor, offset in it, offset in the slot, size of a head) for the rows of each type
template<typename P, typename F>
static void capsule_for_planes(const P & planes, const llama_capsule_layout::part & part, uint32_t i_slot, uint32_t n_chunk, F fn) {
    for (int t = 0; t < LLAMA_CAPSULE_N_TYPES; ++t) {
        const auto & plane = planes[t];
        if (plane.rows) {
            fn(plane.mem, i_slot/n_chunk*plane.stride + i_slot%n_chunk*plane.rows->nb[3], part.offs + part.type_offs[t], plane.rows->nb[2]);
        }
    }
}

void llama_capsule_store::slot_get(const pool & pool, uint32_t i_layer, uint32_t i_slot, uint8_t * data) const {
    const auto & slots  = pool.layers[i_layer];
    const auto & layout = pool.codecs[i_layer].layout;

    if (slots.blob) {
        ggml_backend_tensor_get(slots.blob, data, i_slot*layout.slot_stride, layout.slot_stride);
        return;
    }

    std::fill(data, data + layout.slot_stride, 0); // what pads the layout

    const uint32_t n_head = pool.codecs[i_layer].layer.n_head_kv;

    std::vector<uint8_t> buf;
    auto get = [&](const auto & planes, const llama_capsule_layout::part & part) {
        capsule_for_planes(planes, part, i_slot, n_chunk, [&](const ggml_tensor * mem, size_t offs, size_t first, size_t size) {
            buf.resize(n_head*size);
            ggml_backend_tensor_get(mem, buf.data(), offs, buf.size());
            for (uint32_t h = 0; h < n_head; ++h) {
                std::copy(buf.begin() + h*size, buf.begin() + (h + 1)*size, data + first + h*part.head_stride);
            }
        });
    };
    get(slots.k, layout.k);
    get(slots.v, layout.v);
}

void llama_capsule_store::slot_set(const pool & pool, uint32_t i_layer, uint32_t i_slot, const uint8_t * data) const {
    const auto & slots  = pool.layers[i_layer];
    const auto & layout = pool.codecs[i_layer].layout;

    if (slots.blob) {
        ggml_backend_tensor_set(slots.blob, data, i_slot*layout.slot_stride, layout.slot_stride);
        return;
    }

    const uint32_t n_head = pool.codecs[i_layer].layer.n_head_kv;

    std::vector<uint8_t> buf;
    auto set = [&](const auto & planes, const llama_capsule_layout::part & part) {
        capsule_for_planes(planes, part, i_slot, n_chunk, [&](ggml_tensor * mem, size_t offs, size_t first, size_t size) {
            buf.clear();
            for (uint32_t h = 0; h < n_head; ++h) {
                const uint8_t * src = data + first + h*part.head_stride;
                buf.insert(buf.end(), src, src + size);
            }
            ggml_backend_tensor_set(mem, buf.data(), offs, buf.size());
        });
    };
    set(slots.k, layout.k);
    set(slots.v, layout.v);
}
