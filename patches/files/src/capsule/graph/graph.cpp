#include "capsule/graph/graph.h"

#include "capsule/hooks.h"
#include "capsule/store/slots.h"

#include "../ggml/src/ggml-capsule/attn.h"

#include "capsule/model/kv.h"
#include "llama-capsule.h"
#include "llama-context.h"
#include "llama-impl.h"
#include "llama-kv-cells.h"
#include "llama-model.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>

static constexpr int64_t  ATTEND_MAX_TOKENS = 512; // for larger batches, which were not measured, the slots are unpacked once for all tokens (docs/results/kernel.md)
static constexpr uint32_t COLS_PAD          = 256; // FATTN_KQ_STRIDE
static constexpr uint32_t NODES_PER_LAYER   = 32;
static constexpr int64_t  SLOT_WORDS        = 5;
static constexpr uint32_t DEVICE_ITEMS      = 1024; // KV heads, blocks of tokens and parts: several for each multiprocessor of a large GPU
static constexpr uint32_t PATTERN_ROWS      = 1024; // of angles: room for the patterns of slots that are not there yet

//
// llm_graph_input_tiles
//

llm_graph_input_tiles::llm_graph_input_tiles(std::shared_ptr<llama_capsule_graph> graph, bool causal_attn) :
    graph(std::move(graph)), causal_attn(causal_attn), shape(this->graph->shape()) {
}

void llm_graph_input_tiles::set_input(const llama_ubatch * ubatch) {
    graph->set_inputs(*this, *ubatch);
}

bool llm_graph_input_tiles::can_reuse(const llm_graph_params & params) {
    return shape == graph->shape() && (!mask || mask->ne[1] == params.ubatch.n_tokens) && (hide != nullptr) == graph->narrows(params.ubatch);
}

//
// llama_capsule_graph
//

llama_capsule_graph::llama_capsule_graph(llama_context & lctx, const llama_capsule_kv & kv, llama_capsule_forms & forms,
        const llama_capsule_slots & slots, llama_capsule_narrow narrow) :
    lctx(lctx), kv(kv), forms(forms), slots(slots), narrow(std::move(narrow)) {
    init_layers();

    if (!update_tables()) {
        llama_capsule_refuse("no memory for the constants of the capsule");
    }
}

// for tests: slots are always unpacked, or stay in host memory as for a device that can not read them
// op: a device reads them itself; not by default, since its kernels have never run on hardware
static std::string env_path() {
    const char * env = getenv("LLAMA_KVCAPSULE_PATH");

    const std::string res = env ? env : "";
    if (res != "" && res != "unpack" && res != "host" && res != "op") {
        LLAMA_LOG_WARN("%s: LLAMA_KVCAPSULE_PATH=%s is ignored, there are: unpack host op\n", __func__, env);
    }
    return res;
}

// does a device unpack slots into cells of these types, and attend to them?
static bool device_has_op(ggml_backend_dev_t dev, const llama_capsule_kv & kv, ggml_capsule_tile_params p, bool & attend) {
    const ggml_init_params params = {
        /*.mem_size   =*/ 32*ggml_tensor_overhead(),
        /*.mem_buffer =*/ nullptr,
        /*.no_alloc   =*/ true,
    };
    ggml_context_ptr ctx_ptr { ggml_init(params) };
    ggml_context * ctx = ctx_ptr.get();

    p.scale  = 1.0f;
    p.n_rows = 1;

    const bool trans = p.flags & GGML_CAPSULE_FLAG_V_TRANS;

    ggml_tensor * pool   = ggml_new_tensor_1d(ctx, GGML_TYPE_I8,  LLAMA_CAPSULE_UNIT);
    ggml_tensor * slots  = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, 1, SLOT_WORDS);
    ggml_tensor * tables = ggml_new_tensor_1d(ctx, GGML_TYPE_I8,  LLAMA_CAPSULE_UNIT);
    ggml_tensor * angles = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, 2*p.d_k);

    ggml_tensor * cells_k = ggml_new_tensor_2d(ctx, kv.type_k(), p.n_head_kv*p.d_k, 1);
    ggml_tensor * cells_v = trans ? ggml_new_tensor_2d(ctx, kv.type_v(), 1, p.n_head_kv*p.d_v) : ggml_new_tensor_2d(ctx, kv.type_v(), p.n_head_kv*p.d_v, 1);

    ggml_tensor * unpack_k = ggml_capsule_tile_unpack(ctx, &p, cells_k, false, pool, slots, tables, angles);
    p.flags |= GGML_CAPSULE_FLAG_V;
    ggml_tensor * unpack_v = ggml_capsule_tile_unpack(ctx, &p, cells_v, false, pool, slots, tables, angles);
    p.flags &= ~GGML_CAPSULE_FLAG_V;

    ggml_tensor * q    = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, p.d_k, p.n_head_kv, 1);
    ggml_tensor * k    = ggml_new_tensor_3d(ctx, kv.type_k(), p.d_k, p.n_head_kv, 1);
    ggml_tensor * v    = trans ? ggml_new_tensor_3d(ctx, kv.type_v(), 1, p.n_head_kv, p.d_v) : ggml_new_tensor_3d(ctx, kv.type_v(), p.d_v, p.n_head_kv, 1);
    ggml_tensor * mask = ggml_new_tensor_2d(ctx, GGML_TYPE_F16, 1, 1);
    ggml_tensor * seen = ggml_new_tensor_2d(ctx, GGML_TYPE_I8,  1, 1);

    ggml_tensor * attn = ggml_capsule_tile_attn(ctx, &p, q, k, v, mask, mask, seen, pool, slots, tables, angles);

    attend = ggml_backend_dev_supports_op(dev, attn) && ggml_backend_dev_supports_op(dev, attn->src[0]);

    return ggml_backend_dev_supports_op(dev, unpack_k) && ggml_backend_dev_supports_op(dev, unpack_v);
}

void llama_capsule_graph::init_layers() {
    const auto & model   = lctx.get_model();
    const auto & hparams = model.hparams;

    const std::string path = env_path();

    std::vector<llama_capsule_angles::kind> kinds;

    for (const auto & t : forms.tables->layers) {
        layer res = {};

        const auto buft = ggml_backend_buffer_get_type(kv.k(t.il)->buffer);

        res.il     = t.il;
        res.local  = ggml_backend_buft_is_host(buft) && path != "host";
        res.attend = res.local && path != "unpack";
        res.i_kind = -1;

        if (t.rope) {
            if (!llama_capsule_rope_params::supported(model)) {
                llama_capsule_refuse("RoPE of an unknown kind");
            }

            llama_capsule_rope_params rope(model, lctx.get_cparams(), t.il);

            const auto same = [&](const auto & kind) { return kind.rope == rope; };

            res.i_kind = std::find_if(kinds.begin(), kinds.end(), same) - kinds.begin();
            if (res.i_kind == (int) kinds.size()) {
                kinds.push_back({ std::move(rope), forms.channels_k(layers.size()) });
            }
        }

        auto & p = res.params;

        p.flags |= hparams.rope_type == LLAMA_ROPE_TYPE_NORM ? GGML_CAPSULE_FLAG_NORM    : 0;
        p.flags |= kv.v_trans()                              ? GGML_CAPSULE_FLAG_V_TRANS : 0;
        p.flags |= kv.rot_k()                                ? GGML_CAPSULE_FLAG_ROT_K   : 0;
        p.flags |= kv.rot_v()                                ? GGML_CAPSULE_FLAG_ROT_V   : 0;
        p.flags |= t.k_transform.empty() && t.v_transform.empty() ? 0 : GGML_CAPSULE_FLAG_WHOLE;

        p.n_rot     = t.rope ? hparams.n_rot(t.il) : 0;
        p.n_head_kv = t.n_head_kv;
        p.d_k       = t.n_embd_head_k;
        p.d_v       = t.n_embd_head_v;

        if (path == "op" && !res.local && device_has_op(ggml_backend_buft_get_device(buft), kv, p, res.attend)) {
            res.local = true;
            res.dev   = ggml_backend_buft_get_device(buft);
        }

        res.i_scratch = std::find_if(scratches.begin(), scratches.end(), [&](const scratch & s) { return s.buft == buft; }) - scratches.begin();
        if (res.i_scratch == scratches.size()) {
            scratches.emplace_back().buft = buft;
        }

        layers.push_back(std::move(res));
    }

    angles.init(std::move(kinds), hparams.n_pos_per_embd());
}

ggml_backend_buffer_type_t llama_capsule_graph::pool_buft(uint32_t i_layer) const {
    const auto & layer = layers[i_layer];

    return layer.local ? scratches[layer.i_scratch].buft : ggml_backend_cpu_buffer_type();
}

uint32_t llama_capsule_graph::find_layer(int il) const {
    // a layer may reuse the cells of another one
    const int32_t i = kv.layer_id(il);

    GGML_ASSERT(i >= 0 && i < (int32_t) layers.size() && "the layer is not in the capsule");

    return i;
}

void llama_capsule_graph::check_layers() const {
    for (const auto & layer : layers) {
        if (!layer.checked) {
            llama_capsule_refuse(format("attention of layer %d does not pass through the capsule", layer.il));
        }
    }
}

size_t llama_capsule_graph::n_bytes() const {
    std::map<ggml_backend_buffer_type_t, size_t> all;
    memory_breakdown(all);

    size_t res = 0;
    for (const auto & it : all) {
        res += it.second;
    }
    return res;
}

void llama_capsule_graph::memory_breakdown(std::map<ggml_backend_buffer_type_t, size_t> & res) const {
    const auto add = [&](const ggml_backend_buffer_ptr & buf) {
        if (buf) {
            res[ggml_backend_buffer_get_type(buf.get())] += ggml_backend_buffer_get_size(buf.get());
        }
    };
    for (const auto & layer : layers) {
        add(layer.buf);
    }
    for (const auto & s : scratches) {
        add(s.buf);
    }
}

//
// tables and scratch
//

// the tables of all layers, if there are more forms than before; false: there is no memory for them
bool llama_capsule_graph::update_tables() {
    if (layers[0].tables && n_forms == forms.size()) {
        return true;
    }
    n_forms = forms.size();

    for (uint32_t i = 0; i < layers.size(); ++i) {
        auto & layer = layers[i];

        const auto data = forms.pack(i);

        const ggml_init_params params = {
            /*.mem_size   =*/ ggml_tensor_overhead(),
            /*.mem_buffer =*/ nullptr,
            /*.no_alloc   =*/ true,
        };
        ggml_context_ptr ctx { ggml_init(params) };

        ggml_tensor * t = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I8, data.size());
        ggml_format_name(t, "capsule_tables_l%d", layer.il);

        ggml_backend_buffer_ptr buf { ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), pool_buft(i)) };
        if (!buf) {
            n_forms = 0;
            return false;
        }
        ggml_backend_tensor_set(t, data.data(), 0, data.size());

        layer.ctx    = std::move(ctx);
        layer.buf    = std::move(buf);
        layer.tables = t;
    }

    return true;
}

bool llama_capsule_graph::reserve_scratch(scratch & s, uint32_t n_cold) {
    const int64_t n_cols = kv.size() + GGML_PAD(n_cold, COLS_PAD);

    if (s.k && s.k->ne[1] >= n_cols) {
        return true;
    }

    int64_t n_embd_k = 0;
    int64_t n_embd_v = 0;
    for (const auto & layer : layers) {
        if (&scratches[layer.i_scratch] == &s) {
            n_embd_k = std::max<int64_t>(n_embd_k, layer.params.n_head_kv*layer.params.d_k);
            n_embd_v = std::max<int64_t>(n_embd_v, layer.params.n_head_kv*layer.params.d_v);
        }
    }

    const ggml_init_params params = {
        /*.mem_size   =*/ 2*ggml_tensor_overhead(),
        /*.mem_buffer =*/ nullptr,
        /*.no_alloc   =*/ true,
    };

    scratch res;
    res.buft = s.buft;
    res.ctx.reset(ggml_init(params));
    res.k = ggml_new_tensor_2d(res.ctx.get(), kv.type_k(), n_embd_k, n_cols);
    res.v = ggml_new_tensor_2d(res.ctx.get(), kv.type_v(), n_embd_v, n_cols);
    ggml_set_name(res.k, "capsule_scratch_k");
    ggml_set_name(res.v, "capsule_scratch_v");

    res.buf.reset(ggml_backend_alloc_ctx_tensors_from_buft(res.ctx.get(), res.buft));
    if (!res.buf) {
        return false;
    }

    // the padding columns are masked, but must be finite
    ggml_backend_buffer_clear(res.buf.get(), 0);

    s = std::move(res);

    return true;
}

bool llama_capsule_graph::reserve(uint32_t n_cold) {
    return update_tables() && std::all_of(scratches.begin(), scratches.end(), [&](scratch & s) { return reserve_scratch(s, n_cold); });
}

//
// inputs
//

void llama_capsule_graph::plan(uint32_t n_slots, uint32_t n_cold) {
    n_slots_plan = n_slots;
    n_cold_plan  = n_cold;
}

uint32_t llama_capsule_graph::n_slots() const {
    return std::max(slots.n_slots(), n_slots_plan);
}

uint32_t llama_capsule_graph::n_cold() const {
    uint32_t res = 0;
    for (uint32_t i = 0; i < slots.n_slots(); ++i) {
        res += slots.slot(i).h*slots.slot(i).w;
    }
    return std::max(res, n_cold_plan);
}

uint32_t llama_capsule_graph::n_cold_pad() const {
    return GGML_PAD(n_cold(), COLS_PAD);
}

std::vector<int64_t> llama_capsule_graph::shape() {
    angles.update(slots);

    std::vector<int64_t> res = { n_slots(), n_cold(), angles.n_rows(), angles.regular() };

    const auto add = [&](const ggml_tensor * t) {
        res.push_back((intptr_t) t);
        res.push_back(t ? (intptr_t) t->data : 0);
        res.push_back(t ? ggml_nbytes(t) : 0);
    };
    for (uint32_t i = 0; i < layers.size(); ++i) {
        add(kv.k(layers[i].il));
        add(kv.v(layers[i].il));
        add(slots.pool(i));
        add(layers[i].tables);
        res.push_back(layers[i].i_kind < 0 ? 0 : angles.table(layers[i].i_kind).size());
    }
    for (const auto & s : scratches) {
        add(s.k);
        add(s.v);
    }
    return res;
}

void llama_capsule_graph::set_inputs(const llm_graph_input_tiles & inp, const llama_ubatch & ubatch) {
    const auto used = [](const ggml_tensor * t) {
        return t && t->buffer;
    };

    angles.update(slots);

    if (used(inp.slots)) {
        set_slots(inp.slots);
    }
    for (size_t i = 0; i < inp.angles.size(); ++i) {
        if (used(inp.angles[i])) {
            set_angles(inp.angles[i], i);
        }
    }
    if (used(inp.hide)) {
        narrow.set_hide(inp.hide, ubatch);
        n_tokens_narrow += ubatch.n_tokens;
    }
    if (!used(inp.mask) && !used(inp.mask_cold)) {
        return;
    }

    const auto seen = visible(ubatch, inp.causal_attn);

    if (used(inp.mask)) {
        set_mask(inp.mask, seen);
    }
    if (used(inp.mask_cold) && inp.mask_cold != inp.mask) {
        set_mask(inp.mask_cold, seen);
    }
    if (used(inp.seen)) {
        set_seen(inp.seen, seen);
    }
}

void llama_capsule_graph::set_slots(ggml_tensor * dst) const {
    const uint32_t n = slots.n_slots();

    std::vector<int32_t> res(ggml_nelements(dst));

    std::vector<int32_t> i_form;
    for (uint32_t i = 0; i < n; ++i) {
        const auto & s = slots.slot(i);
        i_form.push_back(forms.find(s.i_tier, s.h, s.w));
    }

    int32_t * to = res.data();
    for (uint32_t i_layer = 0; i_layer < layers.size(); ++i_layer) {
        const bool rope = layers[i_layer].i_kind >= 0;

        int32_t col = 0;
        for (uint32_t i = 0; i < n; ++i) {
            const ggml_capsule_slot slot = { int32_t(slots.offs(i_layer, i)), i_form[i], rope ? angles.rope(i) : -1, col };

            std::memcpy(to, &slot, sizeof(slot));
            to  += sizeof(slot)/sizeof(int32_t);
            col += slots.slot(i).n_tokens();
        }
        for (uint32_t i = 0; i < n; ++i) {
            *to++ = rope ? angles.pattern_row(i) : 0;
        }
    }

    ggml_backend_tensor_set(dst, res.data(), 0, ggml_nbytes(dst));
}

void llama_capsule_graph::set_angles(ggml_tensor * dst, uint32_t i_kind) const {
    const auto & table = angles.table(i_kind);

    GGML_ASSERT((int64_t) table.size() == ggml_nelements(dst));
    ggml_backend_tensor_set(dst, table.data(), 0, ggml_nbytes(dst));
}

std::vector<uint8_t> llama_capsule_graph::visible(const llama_ubatch & ubatch, bool causal_attn) const {
    const auto & cells = slots.cells();

    std::vector<uint32_t> columns;
    for (uint32_t i = 0; i < slots.n_slots(); ++i) {
        for (uint32_t j = 0; j < slots.slot(i).n_tokens(); ++j) {
            columns.push_back(slots.slot(i).first + j);
        }
    }

    std::vector<uint8_t> res(ubatch.n_tokens*columns.size());

    uint8_t * to = res.data();
    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        const llama_seq_id seq_id = ubatch.seq_id[i][0];
        const llama_pos    pos    = ubatch.pos[i];

        for (const uint32_t c : columns) {
            bool sees = !cells.is_empty(c) && cells.seq_has(c, seq_id);

            if (sees && causal_attn && cells.pos_get(c) >= pos) {
                sees = cells.pos_get(c) == pos && !(ubatch.is_pos_2d() &&
                        cells.ext_get(c).is_2d_gt(ubatch.pos[i + ubatch.n_tokens*2], ubatch.pos[i + ubatch.n_tokens]));
            }
            *to++ = sees;
        }
    }
    return res;
}

template<typename T>
static void set_mask_as(ggml_tensor * dst, const std::vector<uint8_t> & visible, size_t n_cols, T zero, T inf) {
    std::vector<T> res(ggml_nelements(dst), inf);

    for (size_t i = 0; i < visible.size(); ++i) {
        if (visible[i]) {
            res[i/n_cols*dst->ne[0] + i%n_cols] = zero;
        }
    }

    ggml_backend_tensor_set(dst, res.data(), 0, ggml_nbytes(dst));
}

void llama_capsule_graph::set_mask(ggml_tensor * dst, const std::vector<uint8_t> & visible) const {
    if (dst->type == GGML_TYPE_F16) {
        set_mask_as<ggml_fp16_t>(dst, visible, n_cold(), ggml_fp32_to_fp16(0.0f), ggml_fp32_to_fp16(-INFINITY));
    } else {
        set_mask_as<float>(dst, visible, n_cold(), 0.0f, -INFINITY);
    }
}

void llama_capsule_graph::set_seen(ggml_tensor * dst, const std::vector<uint8_t> & visible) const {
    std::vector<int8_t> res;

    auto it = visible.begin();
    while (it != visible.end()) {
        for (uint32_t i = 0; i < slots.n_slots(); ++i) {
            const int n = slots.slot(i).n_tokens();
            const int k = std::count(it, it + n, 1);

            res.push_back(k == 0 ? 0 : k == n ? 1 : 2);
            it += n;
        }
    }
    res.resize(ggml_nelements(dst), 0);

    ggml_backend_tensor_set(dst, res.data(), 0, ggml_nbytes(dst));
}

llm_graph_input_tiles * llama_capsule_graph::graph_input(const llm_graph_context & g, ggml_tensor * kq_mask) {
    for (const auto & it : g.res->inputs) {
        if (auto * inp = dynamic_cast<llm_graph_input_tiles *>(it.get())) {
            return inp;
        }
    }

    // see llama_kv_cache::set_input_kq_mask()
    const bool causal = g.cparams.causal_attn || g.hparams.non_causal_type == LLAMA_NON_CAUSAL_TYPE_SWA_ONLY;

    auto inp = std::make_unique<llm_graph_input_tiles>(shared_from_this(), causal);

    const auto input = [&](ggml_type type, int64_t ne0, int64_t ne1, int64_t ne2, const char * name) {
        ggml_tensor * res = ggml_new_tensor_3d(g.ctx0, type, ne0, ne1, ne2);
        ggml_set_input(res);
        ggml_set_name(res, name);
        return res;
    };

    if (n_slots() > 0) {
        inp->slots = input(GGML_TYPE_I32, n_slots(), SLOT_WORDS, layers.size(), "capsule_inp_slots");
        inp->seen  = input(GGML_TYPE_I8,  n_slots(), kq_mask->ne[1], 1, "capsule_inp_seen");
        inp->mask  = input(kq_mask->type, n_cold_pad(), kq_mask->ne[1], 1, "capsule_inp_mask");

        inp->mask_cold = kq_mask->type == GGML_TYPE_F16 ? inp->mask : input(GGML_TYPE_F16, n_cold_pad(), kq_mask->ne[1], 1, "capsule_inp_mask_cold");
    }

    if (narrows(g.ubatch)) {
        inp->hide = input(kq_mask->type, kq_mask->ne[0], kq_mask->ne[1], 1, "capsule_inp_hide");
    }

    return (llm_graph_input_tiles *) g.res->add_input(std::move(inp));
}

ggml_tensor * llama_capsule_graph::layer_slots(const llm_graph_context & g, llm_graph_input_tiles & inp, uint32_t i_layer) const {
    const ggml_tensor * t = inp.slots;

    return ggml_view_2d(g.ctx0, inp.slots, t->ne[0], t->ne[1], t->nb[1], i_layer*t->nb[2]);
}

// nullptr without RoPE
ggml_tensor * llama_capsule_graph::layer_angles(const llm_graph_context & g, llm_graph_input_tiles & inp, uint32_t i_layer) {
    const int i_kind = layers[i_layer].i_kind;
    if (i_kind < 0) {
        return nullptr;
    }

    inp.angles.resize(std::max<size_t>(inp.angles.size(), i_kind + 1));

    ggml_tensor *& res = inp.angles[i_kind];
    if (!res) {
        const int64_t n_plan = (n_slots_plan + PATTERN_ROWS)*ggml_capsule_angles_size(forms.channels_k(i_layer));

        res = ggml_new_tensor_1d(g.ctx0, GGML_TYPE_F32, std::max<int64_t>(angles.table(i_kind).size(), n_slots_plan > 0 ? n_plan : 0));
        ggml_set_input(res);
        ggml_format_name(res, "capsule_inp_angles_%d", i_kind);
    }
    return res;
}

//
// graph
//

uint32_t llama_capsule_graph::graph_nodes() const {
    uint32_t res = NODES_PER_LAYER*layers.size();
    for (uint32_t i = 0; i < layers.size(); ++i) {
        res += NODES_PER_LAYER*(narrow.runs(i).size() + narrow.measures());
    }
    return res;
}

void llama_capsule_graph::check_rope(const llm_graph_context & g, const ggml_tensor * k, const ggml_tensor * k_rot, uint32_t i_layer, int il) {
    if (!layers[i_layer].checked && !llama_capsule_check_rope(g.gf, k->view_src, k_rot, lctx.get_model(), g.cparams, il)) {
        llama_capsule_refuse(format("the RoPE of layer %d is of an unknown kind", il));
    }
    layers[i_layer].checked = true;
}

bool llama_capsule_graph::can_attend(const llm_graph_context & g, uint32_t i_layer, const ggml_tensor * q, const ggml_tensor * kq_b,
        const ggml_tensor * sinks) const {
    return layers[i_layer].attend && (layers[i_layer].i_kind < 0 || angles.regular()) &&
        !kq_b && !sinks && !g.hparams.attn_soft_cap && g.arch != LLM_ARCH_GROK &&
        q->type == GGML_TYPE_F32 && q->nb[0] == sizeof(float) && q->ne[2] <= ATTEND_MAX_TOKENS;
}

ggml_backend_t llama_capsule_graph::backend_of(const llm_graph_context & g, uint32_t i_layer) const {
    for (int i = 0; layers[i_layer].dev && i < ggml_backend_sched_get_n_backends(g.sched); ++i) {
        ggml_backend_t res = ggml_backend_sched_get_backend(g.sched, i);
        if (ggml_backend_get_device(res) == layers[i_layer].dev) {
            return res;
        }
    }
    return g.backend_cpu;
}

ggml_tensor * llama_capsule_graph::build_attend(const llm_graph_context & g, llm_graph_input_tiles & inp, uint32_t i_layer,
        ggml_tensor * q, ggml_tensor * k, ggml_tensor * v, ggml_tensor * kq_mask, float kq_scale) {
    auto p = layers[i_layer].params;

    p.scale   = kq_scale;
    p.n_rows  = angles.n_rows();
    p.n_parts = layers[i_layer].dev ? DEVICE_ITEMS : 0;

    ggml_tensor * res = ggml_capsule_tile_attn(g.ctx0, &p, q, k, v, kq_mask, inp.mask_cold, inp.seen, slots.pool(i_layer),
            layer_slots(g, inp, i_layer), layers[i_layer].tables, layer_angles(g, inp, i_layer));

    // other backends may claim to support every op
    ggml_backend_sched_set_tensor_backend(g.sched, res->src[0], backend_of(g, i_layer));
    ggml_backend_sched_set_tensor_backend(g.sched, res,         backend_of(g, i_layer));

    return res;
}

// the same bytes as integers: every backend copies those, but not every one quantized rows
static ggml_tensor * as_words(ggml_context * ctx, ggml_tensor * t) {
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

static void build_copy(const llm_graph_context & g, ggml_tensor * src, ggml_tensor * dst) {
    ggml_build_forward_expand(g.gf, ggml_cpy(g.ctx0, as_words(g.ctx0, src), as_words(g.ctx0, dst)));
}

// dst: the columns of the slots in the scratch
void llama_capsule_graph::build_unpack(const llm_graph_context & g, llm_graph_input_tiles & inp, uint32_t i_layer, ggml_tensor * dst, bool is_v) {
    const auto & layer = layers[i_layer];

    auto p = layer.params;

    p.flags |= is_v ? GGML_CAPSULE_FLAG_V : 0;
    p.n_rows = angles.n_rows();

    ggml_tensor * cur = ggml_capsule_tile_unpack(g.ctx0, &p, dst, !layer.local,
            slots.pool(i_layer), layer_slots(g, inp, i_layer), layer.tables, layer_angles(g, inp, i_layer));

    ggml_backend_sched_set_tensor_backend(g.sched, cur, backend_of(g, i_layer));

    if (layer.local) {
        ggml_build_forward_expand(g.gf, cur);
    } else {
        build_copy(g, cur, dst);
    }
}

// the same shapes as llama_kv_cache::get_k() and get_v()
void llama_capsule_graph::build_columns(const llm_graph_context & g, llm_graph_input_tiles & inp, uint32_t i_layer,
        ggml_tensor *& k, ggml_tensor *& v, ggml_tensor *& mask) {
    const auto & p = layers[i_layer].params;
    const auto & s = scratches[layers[i_layer].i_scratch];

    ggml_context * ctx = g.ctx0;

    const bool    trans    = kv.v_trans();
    const int64_t n_embd_k = p.n_head_kv*p.d_k;
    const int64_t n_embd_v = p.n_head_kv*p.d_v;
    const int64_t n_kv     = k->ne[2];
    const int64_t n_cols   = n_kv + n_cold_pad();

    GGML_ASSERT(s.k && n_cols <= s.k->ne[1]);

    const size_t k_row = ggml_row_size(s.k->type, n_embd_k);
    const size_t v_row = ggml_row_size(s.v->type, trans ? n_cols : n_embd_v);

    // columns [col, col + n) of the scratch
    const auto k_cols = [&](int64_t col, int64_t n) {
        return ggml_view_2d(ctx, s.k, n_embd_k, n, k_row, col*k_row);
    };
    const auto v_cols = [&](int64_t col, int64_t n) {
        return trans ?
            ggml_view_2d(ctx, s.v, n, n_embd_v, v_row, col*ggml_type_size(s.v->type)) :
            ggml_view_2d(ctx, s.v, n_embd_v, n, v_row, col*v_row);
    };

    // note: as with the KV cache itself, the scratch is written and read in the order of the calls here

    build_copy(g, ggml_view_2d(ctx, k, n_embd_k, n_kv, k->nb[2], 0), k_cols(0, n_kv));
    build_copy(g, trans ?
            ggml_view_2d(ctx, v, n_kv, n_embd_v, v->nb[2], 0) :
            ggml_view_2d(ctx, v, n_embd_v, n_kv, v->nb[2], 0), v_cols(0, n_kv));

    build_unpack(g, inp, i_layer, k_cols(n_kv, n_cold()), false);
    build_unpack(g, inp, i_layer, v_cols(n_kv, n_cold()), true);

    k = ggml_view_4d(ctx, s.k, p.d_k, p.n_head_kv, n_cols, 1, ggml_row_size(s.k->type, p.d_k), k_row, k_row*n_cols, 0);
    v = trans ?
        ggml_view_4d(ctx, s.v, n_cols, p.n_head_kv, p.d_v, 1, v_row*p.d_v, v_row, v_row*n_embd_v, 0) :
        ggml_view_4d(ctx, s.v, p.d_v, p.n_head_kv, n_cols, 1, ggml_row_size(s.v->type, p.d_v), v_row, v_row*n_cols, 0);

    if (!inp.mask_kq) {
        inp.mask_kq = ggml_concat(ctx, mask, inp.mask, 0);
    }
    mask = inp.mask_kq;
}

// heads [first, first + n) of queries, keys or values
static ggml_tensor * heads_of(ggml_context * ctx, ggml_tensor * t, int64_t first, int64_t n) {
    return ggml_view_4d(ctx, t, t->ne[0], n, t->ne[2], t->ne[3], t->nb[1], t->nb[2], t->nb[3], first*t->nb[1]);
}

ggml_tensor * llama_capsule_graph::build_narrow(const llm_graph_context & g, llm_graph_input_tiles & inp, uint32_t i_layer,
        const llama_capsule_attn & attn, const std::vector<llama_capsule_narrow::run> & runs) {
    const int64_t n_gqa = attn.q->ne[1]/layers[i_layer].params.n_head_kv;

    if (!inp.mask_own) {
        inp.mask_own = ggml_add(g.ctx0, attn.kq_mask, inp.hide);
    }

    ggml_tensor * k    = attn.k;
    ggml_tensor * v    = attn.v;
    ggml_tensor * mask = attn.kq_mask;

    if (n_slots() > 0 && std::any_of(runs.begin(), runs.end(), [](const auto & run) { return !run.narrow; })) {
        build_columns(g, inp, i_layer, k, v, mask);
    }

    ggml_tensor * res = nullptr;
    for (const auto & run : runs) {
        ggml_tensor * cur = g.build_attn_mha(
                heads_of(g.ctx0, attn.q, run.first*n_gqa, run.n*n_gqa),
                heads_of(g.ctx0, run.narrow ? attn.k : k, run.first, run.n),
                heads_of(g.ctx0, run.narrow ? attn.v : v, run.first, run.n),
                nullptr, run.narrow ? inp.mask_own : mask, nullptr, nullptr, 0, attn.kq_scale, attn.il);

        res = res ? ggml_concat(g.ctx0, res, cur, 0) : cur;
    }
    return res;
}

void llama_capsule_graph::get_stats(llama_capsule_stats & stats) const {
    for (uint32_t i = 0; i < layers.size(); ++i) {
        stats.n_heads += layers[i].params.n_head_kv;
        for (const auto & run : narrow.runs(i)) {
            stats.n_heads_narrow += run.narrow ? run.n : 0;
        }
    }
    stats.n_tokens_narrow = n_tokens_narrow;
}

ggml_tensor * llama_capsule_graph::build_attn(const llm_graph_context & g, const llama_capsule_attn & attn) {
    auto [q, k, v, kq_b, kq_mask, sinks, k_rot, kq_scale, il] = attn;

    auto & inp = *graph_input(g, kq_mask);

    const uint32_t i_layer = find_layer(il);

    check_rope(g, k, k_rot, i_layer, il);

    if (inp.hide && !narrow.runs(i_layer).empty() && !kq_b && !sinks) {
        return build_narrow(g, inp, i_layer, attn, narrow.runs(i_layer));
    }
    if (inp.hide && narrow.measures() && !kq_b && !sinks) {
        ggml_tensor * cur = build_narrow(g, inp, i_layer, attn, { { 0, layers[i_layer].params.n_head_kv, true } });
        g.cb(cur, "kqv_narrow", il);
        ggml_build_forward_expand(g.gf, cur);
    }
    if (n_slots() == 0) {
        return g.build_attn_mha(q, k, v, kq_b, kq_mask, sinks, nullptr, 0, kq_scale, il);
    }
    if (can_attend(g, i_layer, q, kq_b, sinks)) {
        return build_attend(g, inp, i_layer, q, k, v, kq_mask, kq_scale);
    }
    build_columns(g, inp, i_layer, k, v, kq_mask);

    return g.build_attn_mha(q, k, v, kq_b, kq_mask, sinks, nullptr, 0, kq_scale, il);
}
