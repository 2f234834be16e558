#include "llama-capsule-store.h"

#include "llama-batch.h"
#include "llama-context.h"
#include "llama-kv-cache.h"
#include "llama-model.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

static constexpr uint32_t CAPSULE_COLS_PAD = 256; // FATTN_KQ_STRIDE

// slots that are reconstructed at once: more cost compute buffer, fewer cost graph nodes
static uint32_t capsule_n_chunk(const llama_capsule_data & data) {
    uint32_t n_embd = 1;
    for (const auto & layer : data.layers) {
        n_embd = std::max(n_embd, layer.n_head_kv*std::max(layer.n_embd_head_k, layer.n_embd_head_v));
    }

    const uint32_t n_cols = std::min(std::max((1u << 18)/n_embd, 512u), 4096u);

    return n_cols/data.block_size;
}

llama_capsule_store::llama_capsule_store(llama_context & lctx, llama_kv_cache & kv, const params & params) :
    lctx(lctx), kv(kv), p(params), n_chunk(capsule_n_chunk(*params.data)), reader(lctx, kv) {
    const uint32_t n_cells_max = lctx.get_cparams().n_ctx_seq;

    for (int ip = 0; ip < N_TIERS; ++ip) {
        auto & pool = pools[ip];

        pool.i_tier = ip == 0 ? p.i_economy : 0;

        const uint32_t n_slots_max = (n_cells_max + N() - 1)/N();

        pool.cells.resize(n_slots_max*N());
        pool.used.resize(n_slots_max, false);
        pool.layers.resize(data().layers.size());

        for (uint32_t i = 0; i < data().layers.size(); ++i) {
            pool.codecs.emplace_back(data(), i, pool.i_tier);
        }
    }

    for (uint32_t i = 0; i < data().layers.size(); ++i) {
        unpack_args.push_back({ this, i });
    }

    init_weights();
    init_scratch_const();
}

const llama_capsule_data & llama_capsule_store::data() const {
    return *p.data;
}

uint32_t llama_capsule_store::N() const {
    return p.data->block_size;
}

uint64_t llama_capsule_store::version() const {
    return n_version;
}

int llama_capsule_store::find_layer(int il) const {
    for (size_t i = 0; i < data().layers.size(); ++i) {
        if ((int) data().layers[i].il == il) {
            return i;
        }
    }
    return -1;
}

ggml_backend_buffer_type_t llama_capsule_store::layer_buft(uint32_t i_layer) const {
    const auto & layer = kv.layers[kv.map_layer_ids.at(data().layers[i_layer].il)];

    return ggml_backend_buffer_get_type(layer.k->buffer);
}

//
// slots
//

uint32_t llama_capsule_store::n_cold() const {
    return (pools[0].n_used + pools[1].n_used)*N();
}

uint32_t llama_capsule_store::n_cold_pad() const {
    return GGML_PAD(n_cold(), CAPSULE_COLS_PAD);
}

void llama_capsule_store::touch() {
    n_version++;
}

void llama_capsule_store::update_used() {
    for (auto & pool : pools) {
        const uint32_t n_old = pool.n_used;

        uint32_t n_used = 0;
        for (uint32_t s = 0; s < pool.n_slots; ++s) {
            bool used = false;
            for (uint32_t j = 0; j < N() && !used; ++j) {
                used = !pool.cells.is_empty(s*N() + j);
            }
            pool.used[s] = used;
            if (used) {
                n_used = s + 1;
            }
        }

        pool.n_used = n_used;
        if (n_used != n_old) {
            touch();
        }
    }
}

bool llama_capsule_store::grow_pool_layer(pool & pool, uint32_t i_layer, uint32_t n_slots) {
    const auto & layer  = data().layers[i_layer];
    const auto & codec  = pool.codecs[i_layer];
    const auto & layout = codec.layout;

    pool_layer res;

    const ggml_init_params params = {
        /*.mem_size   =*/ (1 + 2*LLAMA_CAPSULE_N_TYPES)*ggml_tensor_overhead(),
        /*.mem_buffer =*/ nullptr,
        /*.no_alloc   =*/ true,
    };
    res.ctx.reset(ggml_init(params));

    res.blob = ggml_new_tensor_1d(res.ctx.get(), GGML_TYPE_I8, layout.slot_stride*n_slots);
    ggml_format_name(res.blob, "capsule_%d_l%d", (int) pool.i_tier, layer.il);

    res.buf.reset(ggml_backend_alloc_ctx_tensors_from_buft(res.ctx.get(), layer_buft(i_layer)));
    if (!res.buf) {
        return false;
    }
    ggml_backend_buffer_clear(res.buf.get(), 0);

    // the rows of one type as a tensor on the memory of the blob
    auto typed = [&](ggml_type type, uint32_t n_rows, uint32_t d, const llama_capsule_layout::part & part, size_t offs) {
        ggml_tensor * t = ggml_new_tensor_4d(res.ctx.get(), type, d, n_rows, layer.n_head_kv, n_slots);

        t->nb[2]     = part.head_stride;
        t->nb[3]     = layout.slot_stride;
        t->view_src  = res.blob;
        t->view_offs = part.offs + offs;

        ggml_backend_view_init(t);

        return t;
    };

    for (int t = 0; t < LLAMA_CAPSULE_N_TYPES; ++t) {
        const ggml_type type = LLAMA_CAPSULE_TYPES[t];

        if (codec.tl.key_rows[t] > 0) {
            res.k[t] = typed(type, codec.tl.key_rows[t], layer.n_embd_head_k, layout.k, layout.k.type_offs[t]);
        }
        if (codec.tl.value_rows[t] > 0) {
            res.v[t] = typed(type, codec.tl.value_rows[t], layer.n_embd_head_v, layout.v, layout.v.type_offs[t]);
        }
    }

    auto & old = pool.layers[i_layer];
    if (old.blob) {
        std::vector<uint8_t> buf(ggml_nbytes(old.blob));
        ggml_backend_tensor_get(old.blob, buf.data(), 0, buf.size());
        ggml_backend_tensor_set(res.blob, buf.data(), 0, std::min(buf.size(), ggml_nbytes(res.blob)));
    }

    // layer by layer: only one layer exists twice
    old = std::move(res);

    return true;
}

bool llama_capsule_store::grow_pool(pool & pool, uint32_t n_slots) {
    n_slots = std::max(n_slots, pool.n_slots + pool.n_slots/2);
    n_slots = std::min<uint32_t>(n_slots, pool.used.size());

    if (n_slots <= pool.n_slots) {
        return false;
    }

    touch();

    for (uint32_t i = 0; i < data().layers.size(); ++i) {
        const auto & layer = pool.layers[i];

        // a layer may be ahead of the others if a previous attempt ran out of memory
        if (layer.blob && ggml_nbytes(layer.blob) >= pool.codecs[i].layout.slot_stride*n_slots) {
            continue;
        }
        if (!grow_pool_layer(pool, i, n_slots)) {
            return false;
        }
    }

    const uint32_t n_slots_old = pool.n_slots;

    pool.n_slots = n_slots;

    if (!reserve_scratch()) {
        pool.n_slots = n_slots_old;
        return false;
    }

    lctx.capsule_request_reserve();
    grown = true;

    return true;
}

int llama_capsule_store::alloc_slot(pool & pool) {
    for (uint32_t s = 0; s < pool.n_slots; ++s) {
        if (!pool.used[s]) {
            pool.used[s] = true;
            return s;
        }
    }
    return -1;
}

//
// sequence operations
//

void llama_capsule_store::clear() {
    for (auto & pool : pools) {
        pool.cells.reset();
    }
    spans.clear();

    update_used();
}

void llama_capsule_store::seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    bool removed = false;

    for (auto & pool : pools) {
        for (uint32_t i = 0; i < pool.cells.used_max_p1(); ++i) {
            if (!pool.cells.pos_in(i, p0, p1)) {
                continue;
            }
            if (seq_id < 0) {
                pool.cells.rm(i);
                removed = true;
            } else if (pool.cells.seq_has(i, seq_id)) {
                pool.cells.seq_rm(i, seq_id);
                removed = true;
            }
        }
    }

    // what is left of a pending image stays hot
    for (auto & [s, list] : spans) {
        if (seq_id < 0 || s == seq_id) {
            list.erase(std::remove_if(list.begin(), list.end(), [&](const span & sp) { return sp.p0 < p1 && sp.p1 > p0; }), list.end());
        }
    }

    if (removed) {
        update_used();
    }
}

void llama_capsule_store::seq_cp(llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1) {
    for (auto & pool : pools) {
        for (uint32_t i = 0; i < pool.n_used*N(); ++i) {
            if (pool.cells.pos_in(i, p0, p1) && pool.cells.seq_has(i, seq_id_src) && !pool.cells.seq_has(i, seq_id_dst)) {
                pool.cells.seq_add(i, seq_id_dst);
            }
        }
    }
}

void llama_capsule_store::seq_keep(llama_seq_id seq_id) {
    for (auto & pool : pools) {
        for (uint32_t i = 0; i < pool.n_used*N(); ++i) {
            pool.cells.seq_keep(i, seq_id);
        }
    }

    for (auto it = spans.begin(); it != spans.end();) {
        it = it->first == seq_id ? std::next(it) : spans.erase(it);
    }

    update_used();
}

void llama_capsule_store::seq_add(llama_seq_id seq_id, llama_pos p0, llama_pos p1, llama_pos shift) {
    for (auto & pool : pools) {
        for (uint32_t i = 0; i < pool.n_used*N(); ++i) {
            if (pool.cells.pos_in(i, p0, p1) && pool.cells.seq_has(i, seq_id)) {
                pool.cells.pos_add(i, shift);
            }
        }

        // RoPE is applied when the slot is read: there is no data to update
        pool.cells.reset_shift();
    }
    spans.erase(seq_id);

    update_used();
}

void llama_capsule_store::seq_div(llama_seq_id seq_id, llama_pos p0, llama_pos p1, int d) {
    for (auto & pool : pools) {
        for (uint32_t i = 0; i < pool.n_used*N(); ++i) {
            if (pool.cells.pos_in(i, p0, p1) && pool.cells.seq_has(i, seq_id)) {
                pool.cells.pos_div(i, d);
            }
        }
        pool.cells.reset_shift();
    }
    spans.erase(seq_id);
}

llama_pos llama_capsule_store::seq_pos_min(llama_seq_id seq_id, llama_pos pos_hot) const {
    llama_pos res = pos_hot;
    for (const auto & pool : pools) {
        const llama_pos pos = pool.cells.seq_pos_min(seq_id);
        if (pos >= 0 && (res < 0 || pos < res)) {
            res = pos;
        }
    }
    return res;
}

llama_pos llama_capsule_store::seq_pos_max(llama_seq_id seq_id, llama_pos pos_hot) const {
    llama_pos res = pos_hot;
    for (const auto & pool : pools) {
        res = std::max(res, pool.cells.seq_pos_max(seq_id));
    }
    return res;
}

void llama_capsule_store::memory_breakdown(std::map<ggml_backend_buffer_type_t, size_t> & res) const {
    auto add = [&](const ggml_backend_buffer_ptr & buf) {
        if (buf) {
            res[ggml_backend_buffer_get_type(buf.get())] += ggml_backend_buffer_get_size(buf.get());
        }
    };

    for (const auto & pool : pools) {
        for (const auto & layer : pool.layers) {
            add(layer.buf);
        }
    }
    for (const auto & s : scratches) {
        add(s.buf);
        add(s.buf_const);
    }
    for (const auto & it : ctxs_bufs) {
        add(it.second);
    }
}

//
// state
//

static constexpr uint32_t CAPSULE_STATE_MAGIC   = 0x5343564b; // "KVCS"
static constexpr uint32_t CAPSULE_STATE_VERSION = 1;

struct capsule_state_header {
    uint32_t magic;
    uint32_t version;
    uint64_t capsule; // id of the file
    uint32_t i_tier[2];
    uint32_t n_slots[2];
};

struct capsule_state_cell {
    llama_pos pos; // -1: empty
    llama_pos x;
    llama_pos y;

    uint32_t n_seq; // followed by the ids of the sequences
};

void llama_capsule_store::state_write(llama_io_write_i & io, llama_seq_id seq_id) const {
    auto wanted = [&](const pool & pool, uint32_t i) {
        return !pool.cells.is_empty(i) && (seq_id == -1 || pool.cells.seq_has(i, seq_id));
    };

    std::array<std::vector<uint32_t>, N_TIERS> slots;
    for (int ip = 0; ip < N_TIERS; ++ip) {
        for (uint32_t s = 0; s < pools[ip].n_used; ++s) {
            for (uint32_t j = 0; j < N(); ++j) {
                if (wanted(pools[ip], s*N() + j)) {
                    slots[ip].push_back(s);
                    break;
                }
            }
        }
    }

    const capsule_state_header header = {
        CAPSULE_STATE_MAGIC, CAPSULE_STATE_VERSION, data().id,
        { pools[0].i_tier, pools[1].i_tier },
        { (uint32_t) slots[0].size(), (uint32_t) slots[1].size() },
    };
    io.write(&header, sizeof(header));

    for (int ip = 0; ip < N_TIERS; ++ip) {
        const auto & pool = pools[ip];

        for (uint32_t s : slots[ip]) {
            for (uint32_t j = 0; j < N(); ++j) {
                const uint32_t i = s*N() + j;

                capsule_state_cell cell = { -1, 0, 0, 0 };

                std::vector<llama_seq_id> seqs;
                if (wanted(pool, i)) {
                    cell.pos = pool.cells.pos_get(i);
                    cell.x   = pool.cells.ext_get(i).x;
                    cell.y   = pool.cells.ext_get(i).y;

                    for (llama_seq_id id = 0; id < LLAMA_MAX_SEQ && seq_id == -1; ++id) {
                        if (pool.cells.seq_has(i, id)) {
                            seqs.push_back(id);
                        }
                    }
                    cell.n_seq = seqs.size();
                }

                io.write(&cell, sizeof(cell));
                io.write(seqs.data(), seqs.size()*sizeof(llama_seq_id));
            }

            for (size_t l = 0; l < pool.layers.size(); ++l) {
                const size_t stride = pool.codecs[l].layout.slot_stride;
                io.write_tensor(pool.layers[l].blob, s*stride, stride);
            }
        }
    }
}

void llama_capsule_store::state_read(llama_io_read_i & io, llama_seq_id seq_id) {
    seq_rm(seq_id, 0, std::numeric_limits<llama_pos>::max());

    try {
        state_read_slots(io, seq_id);
    } catch (...) {
        seq_rm(seq_id, 0, std::numeric_limits<llama_pos>::max());
        update_used();
        throw;
    }

    update_used();
}

void llama_capsule_store::state_read_slots(llama_io_read_i & io, llama_seq_id seq_id) {
    capsule_state_header header;
    io.read(&header, sizeof(header));

    if (header.magic != CAPSULE_STATE_MAGIC || header.version != CAPSULE_STATE_VERSION) {
        throw std::runtime_error("the slots in the state have an unknown format");
    }
    if (header.capsule != data().id || header.i_tier[0] != pools[0].i_tier || header.i_tier[1] != pools[1].i_tier) {
        throw std::runtime_error("the state was saved with another capsule or ratio");
    }

    // before the first read_tensor(), which may keep the tensor for later
    for (int ip = 0; ip < N_TIERS; ++ip) {
        auto & pool = pools[ip];

        const uint32_t n_free = std::count(pool.used.begin(), pool.used.begin() + pool.n_slots, false);
        if (header.n_slots[ip] > n_free && !grow_pool(pool, pool.n_slots + header.n_slots[ip] - n_free)) {
            throw std::runtime_error("no memory for the slots in the state");
        }
    }

    for (int ip = 0; ip < N_TIERS; ++ip) {
        auto & pool = pools[ip];

        for (uint32_t n = 0; n < header.n_slots[ip]; ++n) {
            const int s = alloc_slot(pool);
            if (s < 0) {
                throw std::runtime_error("no memory for the slots in the state");
            }

            for (uint32_t j = 0; j < N(); ++j) {
                const uint32_t i = s*N() + j;

                capsule_state_cell cell;
                io.read(&cell, sizeof(cell));

                if (cell.pos < -1 || cell.n_seq > LLAMA_MAX_SEQ || (cell.pos == -1 && cell.n_seq > 0)) {
                    throw std::runtime_error("the slots in the state are damaged");
                }

                std::vector<llama_seq_id> seqs(cell.n_seq);
                io.read(seqs.data(), seqs.size()*sizeof(llama_seq_id));

                if (cell.pos < 0) {
                    continue;
                }

                llama_kv_cell_ext ext;
                ext.x = cell.x;
                ext.y = cell.y;

                pool.cells.pos_set(i, cell.pos);
                pool.cells.ext_set(i, ext);
                if (seq_id != -1) {
                    pool.cells.seq_add(i, seq_id);
                }
                for (llama_seq_id id : seqs) {
                    if (seq_id != -1 || id < 0 || id >= LLAMA_MAX_SEQ || pool.cells.seq_has(i, id)) {
                        throw std::runtime_error("the slots in the state are damaged");
                    }
                    pool.cells.seq_add(i, id);
                }
            }

            for (size_t l = 0; l < pool.layers.size(); ++l) {
                const size_t stride = pool.codecs[l].layout.slot_stride;
                io.read_tensor(pool.layers[l].blob, s*stride, stride);
            }
        }
    }
}

//
// info
//

void llama_capsule_store::get_stats(llama_capsule_stats & stats) const {
    const auto & cells = kv.v_cells[0];

    stats.block_size = N();
    stats.n_hot      = cells.size();
    stats.n_hot_used = cells.get_used();

    for (uint32_t i = 0; i < cells.size(); ++i) {
        if (!cells.is_empty(i) && cells.ext_get(i).tok == LLAMA_TOKEN_NULL) {
            stats.n_hot_vision++;
        }
    }

    for (int ip = 0; ip < N_TIERS; ++ip) {
        const auto & pool = pools[ip];

        stats.n_cold     += pool.cells.get_used();
        stats.n_slots[ip] = std::count(pool.used.begin(), pool.used.end(), true);

        for (size_t l = 0; l < pool.layers.size(); ++l) {
            stats.bytes_slot[ip] += pool.codecs[l].layout.slot_stride;

            if (pool.layers[l].buf) {
                stats.bytes_pools += ggml_backend_buffer_get_size(pool.layers[l].buf.get());
            }
        }
        stats.bytes_slots += stats.n_slots[ip]*stats.bytes_slot[ip];
    }

    for (const auto & s : scratches) {
        stats.bytes_scratch += s.buf ? ggml_backend_buffer_get_size(s.buf.get()) : 0;
        stats.bytes_scratch += ggml_backend_buffer_get_size(s.buf_const.get());
    }
    for (const auto & it : ctxs_bufs) {
        stats.bytes_scratch += ggml_backend_buffer_get_size(it.second.get());
    }

    stats.bytes_hot = kv.size_k_bytes() + kv.size_v_bytes();

    for (const auto & layer : data().layers) {
        stats.bytes_f16_token += layer.n_head_kv*(layer.n_embd_head_k + layer.n_embd_head_v)*sizeof(ggml_fp16_t);
    }
}

std::vector<llama_capsule_store::cold_token> llama_capsule_store::read(llama_seq_id seq_id, llama_pos p0, llama_pos p1, uint32_t i_layer) const {
    const auto & layer = data().layers[i_layer];

    const size_t n_k = layer.n_head_kv*layer.n_embd_head_k;
    const size_t n_v = layer.n_head_kv*layer.n_embd_head_v;

    std::vector<cold_token> res;

    std::vector<float> k(N()*n_k);
    std::vector<float> v(N()*n_v);

    for (const auto & pool : pools) {
        const auto & codec = pool.codecs[i_layer];

        std::vector<uint8_t> slot(codec.layout.slot_stride);

        for (uint32_t s = 0; s < pool.n_used; ++s) {
            bool decoded = false;

            for (uint32_t j = 0; j < N(); ++j) {
                const uint32_t i = s*N() + j;

                if (!pool.cells.pos_in(i, p0, p1) || !pool.cells.seq_has(i, seq_id)) {
                    continue;
                }
                if (!decoded) {
                    ggml_backend_tensor_get(pool.layers[i_layer].blob, slot.data(), s*slot.size(), slot.size());
                    codec.decode(slot.data(), k.data(), v.data());
                    decoded = true;
                }

                const auto & ext = pool.cells.ext_get(i);
                res.push_back({
                    pool.cells.pos_get(i), ext.y, ext.x,
                    { k.begin() + j*n_k, k.begin() + (j + 1)*n_k },
                    { v.begin() + j*n_v, v.begin() + (j + 1)*n_v },
                });
            }
        }
    }

    return res;
}
