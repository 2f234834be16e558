#include "llama-capsule-kv.h"

#include "llama-capsule-simd.h"

#include "llama-arch.h"
#include "llama-context.h"
#include "llama-impl.h"
#include "llama-kv-cache.h"
#include "llama-kv-cache-iswa.h"
#include "llama-memory-hybrid.h"
#include "llama-memory-hybrid-idx.h"
#include "llama-memory-hybrid-iswa.h"
#include "llama-memory-recurrent.h"
#include "llama-model.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <tuple>

//
// which models
//

// what tests/test_architectures.py compares with the unpatched library
static bool capsule_arch_is_tested(llm_arch arch) {
    switch (arch) {
        case LLM_ARCH_LLAMA:
        case LLM_ARCH_LLAMA4:
        case LLM_ARCH_MISTRAL3:
        case LLM_ARCH_DECI:
        case LLM_ARCH_SMOLLM3:
        case LLM_ARCH_QWEN2:
        case LLM_ARCH_QWEN2VL:
        case LLM_ARCH_PADDLEOCR:
        case LLM_ARCH_QWEN3:
        case LLM_ARCH_QWEN3MOE:
        case LLM_ARCH_QWEN3VL:
        case LLM_ARCH_QWEN3VLMOE:
        case LLM_ARCH_QWEN35:
        case LLM_ARCH_GEMMA:
        case LLM_ARCH_GEMMA2:
        case LLM_ARCH_GEMMA3:
        case LLM_ARCH_GEMMA4:
        case LLM_ARCH_GRANITE:
        case LLM_ARCH_GRANITE_HYBRID:
        case LLM_ARCH_INTERNLM2:
        case LLM_ARCH_LFM2:
        case LLM_ARCH_PHI3:
            return true;
        default:
            return false;
    }
}

llama_kv_cache * llama_capsule_find_kv(llama_memory_t memory) {
    // derives from llama_memory_hybrid, but its attention is its own
    if (dynamic_cast<llama_memory_hybrid_idx *>(memory)) {
        return nullptr;
    }
    if (auto * hybrid = dynamic_cast<llama_memory_hybrid *>(memory)) {
        return hybrid->get_mem_attn();
    }
    if (auto * hybrid = dynamic_cast<llama_memory_hybrid_iswa *>(memory)) {
        return hybrid->get_mem_attn()->get_base();
    }
    // layers with a sliding window forget by themselves
    if (auto * iswa = dynamic_cast<llama_kv_cache_iswa *>(memory)) {
        return iswa->get_base();
    }
    return dynamic_cast<llama_kv_cache *>(memory);
}

llama_kv_cache * llama_capsule_resolve(const llama_context & lctx, llama_memory_t memory, std::string & reason) {
    const auto & model   = lctx.get_model();
    const auto & hparams = model.hparams;

    auto * kv = llama_capsule_find_kv(memory);

    reason.clear();

    if (!memory) {
        reason = "the model has no KV cache (an encoder)";
    } else if (dynamic_cast<llama_memory_recurrent *>(memory)) {
        reason = "a recurrent model has no KV cache";
    } else if (hparams.is_mla()) {
        reason = "MLA is not supported";
    } else if (!kv) {
        reason = "attention with a cache of its own (sparse or compressed) is not supported";
    } else if (kv->get_layer_ids().empty()) {
        reason = "every layer has a sliding window, there is nothing to compress";
    } else if (hparams.use_alibi) {
        reason = "ALiBi is not supported";
    } else if (hparams.n_pos_per_embd() > 1 && hparams.rope_sections[3] > 0) {
        reason = "M-RoPE with a fourth section is not supported, the KV cache does not keep its position";
    } else if (lctx.get_cparams().ctx_other) {
        reason = "contexts that share the cells of another one are not supported";
    } else if (!capsule_arch_is_tested(model.arch)) {
        reason = format("the architecture '%s' is not supported", llm_arch_name(model.arch));
    } else if (kv->get_n_stream() > 1) {
        reason = "several streams are not supported, use a unified KV cache (--kv-unified)";
    } else if (model.split_mode() == LLAMA_SPLIT_MODE_TENSOR) {
        reason = "tensor split is not supported";
    } else if (lctx.get_cparams().training) {
        reason = "training is not supported";
    }

    return reason.empty() ? kv : nullptr;
}

//
// RoPE
//

bool llama_capsule_layer_rope(const llama_model & model, int32_t il) {
    const auto & hparams = model.hparams;

    if (hparams.rope_type == LLAMA_ROPE_TYPE_NONE || !hparams.has_rope(il)) {
        return false;
    }

    // not in has_rope(), the graphs of these models decide it
    switch (model.arch) {
        case LLM_ARCH_LLAMA4:
        case LLM_ARCH_SMOLLM3:
            return hparams.n_no_rope_layer_step > 0 && (il + 1) % hparams.n_no_rope_layer_step != 0;
        default:
            return true;
    }
}

bool llama_capsule_check_rope(
        const ggml_cgraph * gf,
        const ggml_tensor * k_cache,
        const ggml_tensor * k_rot,
        const llama_model & model,
      const llama_cparams & cparams,
                  int32_t   il) {
    const ggml_tensor * x = nullptr;

    for (int i = 0; i < ggml_graph_n_nodes(const_cast<ggml_cgraph *>(gf)) && !x; ++i) {
        const ggml_tensor * t = ggml_graph_node(const_cast<ggml_cgraph *>(gf), i);
        if (t->op == GGML_OP_SET_ROWS && t->view_src == k_cache) {
            x = t->src[0];
        }
    }

    // back over what changes no direction and over the rotation of a quantized cache
    while (x) {
        if (x->op == GGML_OP_RESHAPE || x->op == GGML_OP_VIEW || x->op == GGML_OP_PERMUTE || x->op == GGML_OP_CONT || x->op == GGML_OP_RMS_NORM) {
            x = x->src[0];
        } else if (x->op == GGML_OP_MUL_MAT && x->src[0] == k_rot) {
            x = x->src[1];
        } else {
            break;
        }
    }

    // a layer that reuses the cells of another one writes nothing
    if (!x) {
        return true;
    }
    if (x->op != GGML_OP_ROPE || !llama_capsule_layer_rope(model, il)) {
        return (x->op == GGML_OP_ROPE) == llama_capsule_layer_rope(model, il);
    }

    const ggml_init_params params = {
        /*.mem_size   =*/ 4*ggml_tensor_overhead(),
        /*.mem_buffer =*/ nullptr,
        /*.no_alloc   =*/ true,
    };
    ggml_context_ptr ctx { ggml_init(params) };

    auto * factors = model.get_rope_factors(cparams, il);

    const ggml_tensor * y = llama_capsule_rope(ctx.get(), model, cparams,
            ggml_dup_tensor(ctx.get(), x->src[0]), ggml_dup_tensor(ctx.get(), x->src[1]), factors, il);

    return x->src[2] == factors && memcmp(x->op_params, y->op_params, sizeof(x->op_params)) == 0;
}

ggml_tensor * llama_capsule_rope(
        ggml_context * ctx,
   const llama_model & model,
 const llama_cparams & cparams,
         ggml_tensor * x,
         ggml_tensor * pos,
         ggml_tensor * factors,
             int32_t   il) {
    const auto & hparams = model.hparams;

    const int   n_rot      = hparams.n_rot(il);
    const int   mode       = hparams.rope_type;
    const float freq_base  = model.get_rope_freq_base (cparams, il);
    const float freq_scale = model.get_rope_freq_scale(cparams, il);

    if (hparams.n_pos_per_embd() > 1) {
        int sections[4];
        std::copy(hparams.rope_sections.begin(), hparams.rope_sections.begin() + 4, sections);

        return ggml_rope_multi(ctx, x, pos, factors, n_rot, sections, mode, cparams.n_ctx_orig_yarn, freq_base, freq_scale,
                cparams.yarn_ext_factor, cparams.yarn_attn_factor, cparams.yarn_beta_fast, cparams.yarn_beta_slow);
    }

    return ggml_rope_ext(ctx, x, pos, factors, n_rot, mode, cparams.n_ctx_orig_yarn, freq_base, freq_scale,
            cparams.yarn_ext_factor, cparams.yarn_attn_factor, cparams.yarn_beta_fast, cparams.yarn_beta_slow);
}

//
// llama_capsule_kv
//

llama_capsule_kv::llama_capsule_kv(llama_context & lctx, llama_kv_cache & kv) : lctx(lctx), kv(kv) {
}

std::vector<uint32_t> llama_capsule_kv::find(llama_seq_id seq_id, llama_pos p0, llama_pos p1) const {
    const auto & cells = kv.v_cells[0];

    std::vector<uint32_t> res;
    for (const auto & [pos, i] : cells.seq_pos_get(seq_id)) {
        if (pos >= p0 && pos < p1) {
            res.push_back(i);
        }
    }

    // the tokens of an image share one position with M-RoPE
    std::stable_sort(res.begin(), res.end(), [&](uint32_t a, uint32_t b) {
        const auto & ea = cells.ext_get(a);
        const auto & eb = cells.ext_get(b);
        return std::make_tuple(cells.pos_get(a), ea.y, ea.x) < std::make_tuple(cells.pos_get(b), eb.y, eb.x);
    });

    return res;
}

void llama_capsule_kv::free(const std::vector<uint32_t> & idxs) {
    auto & cells = kv.v_cells[0];
    auto & head  = kv.v_heads[0];

    for (uint32_t i : idxs) {
        cells.rm(i);
        head = std::min(head, i);
    }
}

void llama_capsule_kv::set_token(llama_seq_id seq_id, llama_pos p0, llama_pos p1, llama_token tok) {
    auto & cells = kv.v_cells[0];

    const auto & list = cells.seq_pos_get(seq_id);
    for (auto it = list.lower_bound({ p0, 0 }); it != list.end() && it->first < p1; ++it) {
        auto ext = cells.ext_get(it->second);
        ext.tok = tok;
        cells.ext_set(it->second, ext);
    }
}

void llama_capsule_kv::state_read(llama_io_read_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) {
    try {
        // the KV cache itself forgets this if the state has no hot cells
        if (seq_id != -1) {
            kv.seq_rm(seq_id, -1, -1);
        }
        kv.state_read_sinfo(io, seq_id, flags, nullptr, nullptr);
    } catch (...) {
        kv.state_clear(seq_id);
        throw;
    }
}

const llama_model    & llama_capsule_kv::model() const { return kv.model; }
const llama_kv_cells & llama_capsule_kv::cells() const { return kv.v_cells[0]; }

uint32_t llama_capsule_kv::size()      const { return kv.get_size(); }
uint32_t llama_capsule_kv::n_seq_max() const { return kv.n_seq_max; }
uint32_t llama_capsule_kv::n_pos()     const { return kv.hparams.n_pos_per_embd(); }
size_t   llama_capsule_kv::n_bytes()   const { return kv.size_k_bytes() + kv.size_v_bytes(); }

bool llama_capsule_kv::has_cell_ext() const { return kv.has_cell_ext(); }

int32_t llama_capsule_kv::layer_id(int32_t il) const {
    const auto it = kv.map_layer_ids.find(il);

    return it == kv.map_layer_ids.end() ? -1 : it->second;
}

ggml_tensor * llama_capsule_kv::k(int32_t il) const { return kv.layers[kv.map_layer_ids.at(il)].k; }
ggml_tensor * llama_capsule_kv::v(int32_t il) const { return kv.layers[kv.map_layer_ids.at(il)].v; }

ggml_type llama_capsule_kv::type_k() const { return kv.type_k(); }
ggml_type llama_capsule_kv::type_v() const { return kv.type_v(); }

bool llama_capsule_kv::v_trans() const { return kv.v_trans; }
bool llama_capsule_kv::rot_k()   const { return kv.attn_rot_k; }
bool llama_capsule_kv::rot_v()   const { return kv.attn_rot_v; }

//
// llama_capsule_kv::reader
//

llama_capsule_kv::reader::reader(const llama_capsule_kv & cells, std::vector<uint32_t> idxs) :
    lctx(cells.lctx), kv(cells.kv), idxs(std::move(idxs)) {
}

// calls fn(first, cell, n) for each run of consecutive cells
template<typename F>
static void capsule_for_runs(const std::vector<uint32_t> & idxs, F fn) {
    for (size_t i = 0; i < idxs.size();) {
        size_t n = 1;
        while (i + n < idxs.size() && idxs[i + n] == idxs[i] + n) {
            ++n;
        }
        fn(i, idxs[i], n);
        i += n;
    }
}

void llama_capsule_kv::reader::load_rows(rows & r, const ggml_tensor * t) {
    r.all = ggml_backend_buffer_is_host(t->buffer);
    if (r.all) {
        r.data = (const uint8_t *) t->data;
        return;
    }

    const size_t row_size = ggml_row_size(t->type, t->ne[0]);

    r.copy.resize(idxs.size()*row_size);
    r.data = r.copy.data();
    capsule_for_runs(idxs, [&](size_t first, uint32_t cell, size_t n) {
        ggml_backend_tensor_get(t, r.copy.data() + first*row_size, cell*row_size, n*row_size);
    });
}

const uint8_t * llama_capsule_kv::reader::row(const rows & r, const ggml_tensor * t, size_t i, uint32_t first) const {
    return r.data + (r.all ? idxs[i] : i)*ggml_row_size(t->type, t->ne[0]) + ggml_row_size(t->type, first);
}

void llama_capsule_kv::reader::load(int32_t il, bool rope, bool want_k, bool want_v) {
    const auto & layer = kv.layers[kv.map_layer_ids.at(il)];

    this->il = il;

    if (want_k) {
        load_rows(k, layer.k);
        i_table = rope ? find_table() : -1;
    }
    if (want_v && !kv.v_trans) {
        load_rows(v, layer.v);
    }
    if (want_v && kv.v_trans) {
        const size_t n_embd  = kv.hparams.n_embd_v_gqa(il);
        const size_t kv_size = kv.get_size();
        const size_t es      = ggml_type_size(layer.v->type);
        const size_t stride  = idxs.size()*es;

        // all channels of a run at once: a device is asked few times
        v.copy.resize(n_embd*stride);
        capsule_for_runs(idxs, [&](size_t first, uint32_t cell, size_t n) {
            ggml_backend_tensor_get_2d(layer.v, v.copy.data() + first*es, cell*es, n*es, n_embd, kv_size*es, stride);
        });
    }
}

const float * llama_capsule_kv::reader::angles(int32_t il, bool rope) {
    this->il = il;

    return rope ? tables[find_table()].angles.data() : nullptr;
}

int llama_capsule_kv::reader::find_table() {
    const llama_capsule_rope_params params(kv.model, lctx.get_cparams(), il);

    for (size_t i = 0; i < tables.size(); ++i) {
        if (tables[i].params == params) {
            return i;
        }
    }

    table res = { params, std::vector<float>(idxs.size()*params.n_rot) };
    for (size_t i = 0; i < idxs.size(); ++i) {
        llama_capsule_pos pos = {};
        llama_capsule_rope_pos(kv.v_cells[0], idxs[i], kv.hparams.n_pos_per_embd(), pos.data(), 1);

        params.fill_inverse(pos, res.angles.data() + i*params.n_rot);
    }
    tables.push_back(std::move(res));

    return tables.size() - 1;
}

void llama_capsule_kv::reader::read_k(uint32_t i_head, size_t first, size_t n, float * dst, size_t ld) const {
    const auto & simd = llama_capsule_simd_get();

    const ggml_tensor * t = kv.layers[kv.map_layer_ids.at(il)].k;

    const uint32_t d = kv.hparams.n_embd_head_k(il);

    for (size_t i = 0; i < n; ++i) {
        simd.to_float(t->type, row(k, t, first + i, i_head*d), dst + i*ld, d);

        if (kv.attn_rot_k) {
            // see llama_kv_cache::build_input_k_rot()
            simd.hadamard(dst + i*ld, llama_capsule_hadamard_size(kv.n_embd_head_k_all), d);
        }
    }
    if (i_table >= 0) {
        const auto & rope = tables[i_table];
        simd.rope(n, dst, ld, rope.angles.data() + first*rope.params.n_rot, rope.params.n_rot, rope.params.n_rot, rope.params.norm);
    }
}

void llama_capsule_kv::reader::read_v(uint32_t i_head, size_t first, size_t n, float * dst, size_t ld) const {
    static thread_local std::vector<float> col;

    const auto & simd = llama_capsule_simd_get();

    const ggml_tensor * t = kv.layers[kv.map_layer_ids.at(il)].v;

    const uint32_t d = kv.hparams.n_embd_head_v(il);

    if (kv.v_trans) {
        const size_t    es  = ggml_type_size(t->type);
        const uint8_t * src = v.copy.data() + (i_head*d*idxs.size() + first)*es;

        col.resize(n);
        for (uint32_t j = 0; j < d; ++j) {
            simd.to_float(t->type, src + j*idxs.size()*es, col.data(), n);
            for (size_t i = 0; i < n; ++i) {
                dst[i*ld + j] = col[i];
            }
        }
        return;
    }

    for (size_t i = 0; i < n; ++i) {
        simd.to_float(t->type, row(v, t, first + i, i_head*d), dst + i*ld, d);

        if (kv.attn_rot_v) {
            // see llama_kv_cache::build_input_v_rot()
            simd.hadamard(dst + i*ld, 64, d);
        }
    }
}

void llama_capsule_rope_pos(const llama_kv_cells & cells, uint32_t i, uint32_t n_pos, int32_t * dst, size_t stride) {
    if (cells.is_empty(i)) {
        for (uint32_t j = 0; j < n_pos; ++j) {
            dst[j*stride] = 0;
        }
        return;
    }

    dst[0] = cells.pos_get(i);
    if (n_pos > 1) {
        // t, y, x, z as in llm_graph_input_pos
        const auto & ext = cells.ext_get(i);

        dst[1*stride] = ext.y;
        dst[2*stride] = ext.x;
        dst[3*stride] = 0;
    }
}
