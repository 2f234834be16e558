#include "capsule/model/kv.h"

#include "capsule/util/floats.h"
#include "capsule/util/upstream.h"

#include "llama-context.h"
#include "llama-kv-cache.h"
#include "llama-model.h"

#include <algorithm>
#include <tuple>
#include <utility>

llama_capsule_kv::llama_capsule_kv(llama_context & lctx, llama_kv_cache & kv) : lctx(lctx), kv(kv) {
}

//
// growth
//

// K and V of n cells, without memory
static ggml_context_ptr capsule_new_layer(const ggml_tensor * k, const ggml_tensor * v, uint32_t n, ggml_tensor *& k_new, ggml_tensor *& v_new) {
    const ggml_init_params params = {
        /*.mem_size   =*/ 8*ggml_tensor_overhead(), // with their streams, and what they are copied from and to
        /*.mem_buffer =*/ nullptr,
        /*.no_alloc   =*/ true,
    };
    ggml_context_ptr ctx { ggml_init(params) };

    k_new = ggml_new_tensor_3d(ctx.get(), k->type, k->ne[0], n, 1);
    v_new = ggml_new_tensor_3d(ctx.get(), v->type, v->ne[0], n, 1);
    ggml_set_name(k_new, k->name);
    ggml_set_name(v_new, v->name);

    return ctx;
}

static ggml_tensor * capsule_view_cells(ggml_context * ctx, ggml_tensor * t, uint32_t n) {
    ggml_tensor * res = ggml_view_2d(ctx, t, t->ne[0], n, t->nb[1], 0);
    ggml_backend_view_init(res);

    return res;
}

// the first n cells of a transposed V, one channel after the other; both may lie in the same place, if that is to become smaller
static void capsule_copy_v_trans(const ggml_tensor * from, ggml_tensor * to, uint32_t n) {
    uint8_t buf[16*1024];

    const size_t es = ggml_type_size(from->type);

    for (int64_t j = 0; j < from->ne[0]; ++j) {
        for (size_t i = 0; i < n*es; i += sizeof(buf)) {
            const size_t n_bytes = std::min(sizeof(buf), n*es - i);

            ggml_backend_tensor_get(from, buf, j*from->ne[1]*es + i, n_bytes);
            ggml_backend_tensor_set(to,   buf, j*to  ->ne[1]*es + i, n_bytes);
        }
    }
}

bool llama_capsule_kv::init(uint32_t n) {
    GGML_ASSERT(kv.n_stream == 1 && !kv.other && kv.v_cells[0].get_used() == 0);

    std::vector<ggml_backend_buffer_type_t> bufts;
    for (const auto & layer : kv.layers) {
        bufts.push_back(ggml_backend_buffer_get_type(layer.k->buffer));
    }

    auto before = std::move(kv.ctxs_bufs);
    for (auto & it : before) {
        it.second.reset();
    }

    kv.ctxs_bufs.clear();
    for (size_t i = 0; i < kv.layers.size(); ++i) {
        auto & layer = kv.layers[i];

        auto ctx = capsule_new_layer(layer.k, layer.v, n, layer.k, layer.v);

        ggml_backend_buffer_ptr buf { ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), bufts[i]) };
        if (!buf) {
            return false;
        }
        ggml_backend_buffer_clear(buf.get(), 0);

        layer.k_stream[0] = capsule_view_cells(ctx.get(), layer.k, n);
        layer.v_stream[0] = capsule_view_cells(ctx.get(), layer.v, n);

        kv.ctxs_bufs.emplace_back(std::move(ctx), std::move(buf));
    }
    kv.v_cells[0].resize(n);

    return true;
}

// of the buffer of a layer; to make it smaller never fails, but may leave the memory as it is
bool llama_capsule_kv::resize(size_t i_layer, uint32_t n) {
    auto & layer = kv.layers[i_layer];
    auto & mem   = kv.ctxs_bufs[i_layer];

    const uint32_t n_copy = std::min<int64_t>(n, layer.k->ne[1]);

    ggml_tensor * k;
    ggml_tensor * v;
    auto ctx = capsule_new_layer(layer.k, layer.v, n, k, v);

    ggml_backend_buffer_ptr buf { ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), ggml_backend_buffer_get_type(mem.second.get())) };
    if (buf) {
        // the cells without a token are masked, but must be finite
        ggml_backend_buffer_clear(buf.get(), 0);
        ggml_backend_tensor_copy(capsule_view_cells(mem.first.get(), layer.k, n_copy), capsule_view_cells(ctx.get(), k, n_copy));
        if (!kv.v_trans) {
            ggml_backend_tensor_copy(capsule_view_cells(mem.first.get(), layer.v, n_copy), capsule_view_cells(ctx.get(), v, n_copy));
        }
    } else if (n_copy < n) {
        return false;
    } else {
        ggml_backend_tensor_alloc(mem.second.get(), k, layer.k->data);
        ggml_backend_tensor_alloc(mem.second.get(), v, layer.v->data);
    }
    if (kv.v_trans) {
        capsule_copy_v_trans(layer.v, v, n_copy);
    }

    layer.k = k;
    layer.v = v;

    layer.k_stream[0] = capsule_view_cells(ctx.get(), k, n);
    layer.v_stream[0] = capsule_view_cells(ctx.get(), v, n);

    mem.first = std::move(ctx);
    if (buf) {
        mem.second = std::move(buf);
    }
    return true;
}

bool llama_capsule_kv::grow(uint32_t n, const std::function<bool()> & commit) {
    GGML_ASSERT(n > size() && !is_shared());

    const uint32_t before = size();

    llama_kv_cells cells;
    cells.resize(n);
    cells.set(0, kv.v_cells[0].cp(0, before));

    size_t i = 0;
    while (i < kv.layers.size() && resize(i, n)) {
        ++i;
    }
    if (i == kv.layers.size()) {
        std::swap(kv.v_cells[0], cells);
        if (commit()) {
            return true;
        }
        std::swap(kv.v_cells[0], cells);
    }
    while (i-- > 0) {
        resize(i, before);
    }
    return false;
}

bool llama_capsule_kv::is_shared() const {
    return kv.v_cells_impl.use_count() > 1;
}

//
// cells
//

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
size_t   llama_capsule_kv::n_bytes()   const { return kv.total_size(); }

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
bool llama_capsule_kv::rot_k()   const { return LLAMA_CAPSULE_ROT_K(kv); }
bool llama_capsule_kv::rot_v()   const { return LLAMA_CAPSULE_ROT_V(kv); }

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

int llama_capsule_kv::reader::find_table() {
    const llama_capsule_rope_params params(kv.model, lctx.get_cparams(), il);

    for (size_t i = 0; i < tables.size(); ++i) {
        if (tables[i].params == params) {
            return i;
        }
    }

    table res = { params, std::vector<float>(idxs.size()*params.n_rot) };
    for (size_t i = 0; i < idxs.size(); ++i) {
        params.fill_inverse(llama_capsule_rope_pos(kv.v_cells[0], idxs[i], kv.hparams.n_pos_per_embd()), res.angles.data() + i*params.n_rot);
    }
    tables.push_back(std::move(res));

    return tables.size() - 1;
}

void llama_capsule_kv::reader::read_k(uint32_t i_head, size_t first, size_t n, float * dst, size_t ld) const {
    const ggml_tensor * t = kv.layers[kv.map_layer_ids.at(il)].k;

    const uint32_t d = kv.hparams.n_embd_head_k(il);

    for (size_t i = 0; i < n; ++i) {
        llama_capsule_to_float(t->type, row(k, t, first + i, i_head*d), dst + i*ld, d);

        if (LLAMA_CAPSULE_ROT_K(kv)) {
            // see llama_kv_cache::build_input_k_rot()
            llama_capsule_hadamard(dst + i*ld, llama_capsule_hadamard_size(kv.n_embd_head_k_all), d);
        }
    }
    if (i_table >= 0) {
        const auto & rope = tables[i_table];
        llama_capsule_turn(n, dst, ld, rope.angles.data() + first*rope.params.n_rot, rope.params.n_rot, rope.params.norm);
    }
}

void llama_capsule_kv::reader::read_v(uint32_t i_head, size_t first, size_t n, float * dst, size_t ld) const {
    static thread_local std::vector<float> col;

    const ggml_tensor * t = kv.layers[kv.map_layer_ids.at(il)].v;

    const uint32_t d = kv.hparams.n_embd_head_v(il);

    if (kv.v_trans) {
        const size_t    es  = ggml_type_size(t->type);
        const uint8_t * src = v.copy.data() + (i_head*d*idxs.size() + first)*es;

        col.resize(n);
        for (uint32_t j = 0; j < d; ++j) {
            llama_capsule_to_float(t->type, src + j*idxs.size()*es, col.data(), n);
            for (size_t i = 0; i < n; ++i) {
                dst[i*ld + j] = col[i];
            }
        }
        return;
    }

    for (size_t i = 0; i < n; ++i) {
        llama_capsule_to_float(t->type, row(v, t, first + i, i_head*d), dst + i*ld, d);

        if (LLAMA_CAPSULE_ROT_V(kv)) {
            // see llama_kv_cache::build_input_v_rot()
            llama_capsule_hadamard(dst + i*ld, 64, d);
        }
    }
}
