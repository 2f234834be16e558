#include "llama-capsule-store.h"

#include "capsule/store/state.h"

#include "llama-batch.h"
#include "llama-context.h"
#include "llama-impl.h"
#include "llama-kv-cache.h"
#include "llama-model.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <limits>

static constexpr uint32_t CAPSULE_COLS_PAD = 256; // FATTN_KQ_STRIDE

static constexpr size_t CAPSULE_NODE_BYTES  = 64*sizeof(ggml_tensor); // of a scheduler and its graph, for each node, see ggml_backend_sched_new()
static constexpr size_t CAPSULE_SPARE_BYTES = 16*1024*1024;

// slots that are reconstructed at once: more cost compute buffer, fewer cost graph nodes
static uint32_t capsule_n_chunk(const llama_capsule_data & data) {
    uint32_t n_embd = 1;
    for (const auto & layer : data.layers) {
        n_embd = std::max(n_embd, layer.n_head_kv*std::max(layer.n_embd_head_k, layer.n_embd_head_v));
    }

    const uint32_t n_cols = std::min(std::max((1u << 18)/n_embd, 512u), 4096u);

    return n_cols/data.block_size;
}

// LLAMA_KVCAPSULE_LIMIT=BYTES: images that need more stay in the hot cells
static size_t capsule_bytes_limit() {
    const char * limit = getenv("LLAMA_KVCAPSULE_LIMIT");

    return limit ? strtoull(limit, nullptr, 10) : 0;
}

llama_capsule_store::llama_capsule_store(llama_context & lctx, llama_kv_cache & kv, const params & params) :
    lctx(lctx), kv(kv), p(params), n_chunk(capsule_n_chunk(*params.data)), hot(lctx, kv), n_bytes_limit(capsule_bytes_limit()) {
    const uint32_t n_cells_max = lctx.get_cparams().n_ctx_seq;

    for (int ip = 0; ip < N_TIERS; ++ip) {
        auto & pool = pools[ip];

        pool.i_tier = ip == 0 ? p.i_economy : 0;

        const uint32_t n_slots_max = (n_cells_max + N() - 1)/N();

        pool.cells.resize(n_slots_max*N());
        pool.used.resize(n_slots_max, false);
        pool.hash.resize(n_slots_max, 0);
        pool.stored.resize(n_slots_max);
        pool.layers.resize(data().layers.size());

        for (uint32_t i = 0; i < data().layers.size(); ++i) {
            pool.codecs.emplace_back(data(), i, pool.i_tier);
        }
    }

    for (uint32_t i = 0; i < data().layers.size(); ++i) {
        op_args.push_back({ this, i });
    }
    rope_checked.resize(data().layers.size(), false);

    init_scratch_const();
    init_paths();
}

const llama_capsule_data & llama_capsule_store::data() const {
    return *p.data;
}

uint32_t llama_capsule_store::N() const {
    return p.data->block_size;
}

bool llama_capsule_store::rotated(uint32_t i_layer, int i_pool) const {
    const auto & layer = data().layers[i_layer];

    // gates are equal within a pair and commute with RoPE, a key MLP does not
    return layer.rope && layer.n_mlp == 0 && pools[i_pool].codecs[i_layer].tl.key_codec == LLAMA_CAPSULE_KEY_CODEC_RETAIN &&
        llama_capsule_rope_params::supported(kv.model);
}

uint64_t llama_capsule_store::version() const {
    return n_version;
}

uint32_t llama_capsule_store::find_layer(int il) const {
    // a layer may reuse the cells of another one
    const auto it = kv.map_layer_ids.find(il);
    if (it != kv.map_layer_ids.end()) {
        il = kv.layers[it->second].il;
    }

    for (size_t i = 0; i < data().layers.size(); ++i) {
        if ((int) data().layers[i].il == il) {
            return i;
        }
    }
    GGML_ABORT("layer %d is not in the capsule", il);
}

void llama_capsule_store::check_layers() const {
    for (size_t i = 0; i < rope_checked.size(); ++i) {
        if (!rope_checked[i]) {
            llama_capsule_refuse(format("attention of layer %u does not pass through the capsule", data().layers[i].il));
        }
    }
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

size_t llama_capsule_store::n_bytes_compute() const {
    ggml_backend_sched_t sched = lctx.get_sched();

    size_t res = 0;
    for (int i = 0; i < ggml_backend_sched_get_n_backends(sched); ++i) {
        res += ggml_backend_sched_get_buffer_size(sched, ggml_backend_sched_get_backend(sched, i));
    }
    return res;
}

size_t llama_capsule_store::n_bytes_grown() const {
    size_t res = n_bytes_compute_first > 0 ? std::max(n_bytes_compute(), n_bytes_compute_first) - n_bytes_compute_first : 0;
    for (const auto & pool : pools) {
        for (const auto & layer : pool.layers) {
            res += layer.buf ? ggml_backend_buffer_get_size(layer.buf.get()) : 0;
        }
    }
    for (const auto & s : scratches) {
        res += s.buf ? ggml_backend_buffer_get_size(s.buf.get()) : 0;
    }
    return res;
}

ggml_backend_buffer_ptr llama_capsule_store::alloc_buf(ggml_context * ctx, ggml_backend_buffer_type_t buft) const {
    if (n_bytes_limit > 0 && n_bytes_grown() + ggml_backend_alloc_ctx_tensors_from_buft_size(ctx, buft) > n_bytes_limit) {
        return nullptr;
    }
    return ggml_backend_buffer_ptr { ggml_backend_alloc_ctx_tensors_from_buft(ctx, buft) };
}

void llama_capsule_store::warn_alloc() {
    if (!warned_alloc) {
        LLAMA_LOG_WARN("%s: no room for more capsule slots (%.1f MiB in use): images stay in the hot KV cache\n", __func__, n_bytes_grown()/1024.0/1024.0);
        warned_alloc = true;
    }
}

void llama_capsule_store::warn_broken() {
    if (!warned_broken) {
        LLAMA_LOG_WARN("%s: keys or values of an image are not finite or do not fit f16: such blocks stay in the hot KV cache\n", __func__);
        warned_broken = true;
    }
}

// at once: if the next decode came first, a lack of memory would end the process
bool llama_capsule_store::reserve_compute() {
    if (n_bytes_compute_first == 0) {
        n_bytes_compute_first = n_bytes_compute();
    }
    return lctx.capsule_reserve() && (n_bytes_limit == 0 || n_bytes_grown() <= n_bytes_limit);
}

// a new scheduler and its graph have memory that nobody checks: is there any?
bool llama_capsule_store::may_reserve() const {
    const size_t n_nodes = lctx.graph_max_nodes(std::min(lctx.get_cparams().n_ctx, lctx.get_cparams().n_ubatch));
    const size_t n_bytes = n_nodes*CAPSULE_NODE_BYTES + CAPSULE_SPARE_BYTES;

    return ggml_backend_buffer_ptr(ggml_backend_buft_alloc_buffer(ggml_backend_cpu_buffer_type(), n_bytes)) != nullptr;
}

bool llama_capsule_store::grow_pool(pool & pool, uint32_t n_slots) {
    const uint32_t n_max = pool.used.size();

    return grow_pool_to(pool, std::min(n_max, std::max(n_slots, pool.n_slots + pool.n_slots/2))) ||
           grow_pool_to(pool, std::min(n_max, n_slots));
}

bool llama_capsule_store::grow_pool_to(pool & pool, uint32_t n_slots) {
    if (n_slots <= pool.n_slots) {
        return false;
    }

    const uint32_t n_slots_old = pool.n_slots;

    // note: also when it fails half way, some tensors are new
    touch();
    grown = true;

    bool reserved = false;

    if (resize_layers(pool, n_slots)) {
        pool.n_slots = n_slots;

        if (reserve_scratch() && may_reserve()) {
            if (reserve_compute()) {
                return true;
            }
            reserved = true;
        }
        pool.n_slots = n_slots_old;
    }

    // as it was: what remains needs memory too
    resize_layers(pool, n_slots_old);
    touch();

    if (reserved) {
        lctx.capsule_reserve(); // if even this fails, each graph allocates what it needs
    }

    return false;
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

template<typename F>
void llama_capsule_store::for_cold(llama_seq_id seq_id, llama_pos p0, llama_pos p1, F fn) {
    for (auto & pool : pools) {
        for (uint32_t i = 0; i < pool.n_used*N(); ++i) {
            if (pool.cells.pos_in(i, p0, p1) && (seq_id < 0 || pool.cells.seq_has(i, seq_id))) {
                fn(pool.cells, i);
            }
        }
    }
}

template<typename F>
void llama_capsule_store::drop_spans(llama_seq_id seq_id, F fn) {
    for (auto & [s, list] : spans) {
        if (seq_id < 0 || s == seq_id) {
            list.erase(std::remove_if(list.begin(), list.end(), fn), list.end());
        }
    }
}

void llama_capsule_store::seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    for_cold(seq_id, p0, p1, [&](llama_kv_cells & cells, uint32_t i) {
        if (seq_id < 0) {
            cells.rm(i);
        } else {
            cells.seq_rm(i, seq_id);
        }
    });

    drop_spans(seq_id, [&](const span & sp) { return sp.p0 < p1 && sp.p1 > p0; });

    update_used();
}

void llama_capsule_store::seq_cp(llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1) {
    for_cold(seq_id_src, p0, p1, [&](llama_kv_cells & cells, uint32_t i) {
        if (!cells.seq_has(i, seq_id_dst)) {
            cells.seq_add(i, seq_id_dst);
        }
    });

    // the copy may outlive the original
    const auto it = spans.find(seq_id_src);
    if (it != spans.end()) {
        const auto list = it->second;
        for (const auto & sp : list) {
            if (sp.p0 >= p0 && sp.p1 <= p1) {
                spans[seq_id_dst].push_back(sp);
            }
        }
    }
}

void llama_capsule_store::seq_keep(llama_seq_id seq_id) {
    for_cold(-1, 0, std::numeric_limits<llama_pos>::max(), [&](llama_kv_cells & cells, uint32_t i) { cells.seq_keep(i, seq_id); });

    for (auto it = spans.begin(); it != spans.end();) {
        it = it->first == seq_id ? std::next(it) : spans.erase(it);
    }

    update_used();
}

void llama_capsule_store::seq_add(llama_seq_id seq_id, llama_pos p0, llama_pos p1, llama_pos shift) {
    for_cold(seq_id, p0, p1, [&](llama_kv_cells & cells, uint32_t i) { cells.pos_add(i, shift); });

    // RoPE is applied when the slot is read: there is no data to update
    for (auto & pool : pools) {
        pool.cells.reset_shift();
    }

    auto inside = [&](const span & sp) { return sp.p0 >= p0 && sp.p1 <= p1; };

    drop_spans(seq_id, [&](const span & sp) { return sp.p0 < p1 && sp.p1 > p0 && !(inside(sp) && sp.p0 + shift >= 0); });

    const auto it = spans.find(seq_id);
    if (it != spans.end()) {
        for (auto & sp : it->second) {
            if (inside(sp)) {
                sp.p0 += shift;
                sp.p1 += shift;
            }
        }
    }

    update_used();
}

void llama_capsule_store::seq_div(llama_seq_id seq_id, llama_pos p0, llama_pos p1, int d) {
    for_cold(seq_id, p0, p1, [&](llama_kv_cells & cells, uint32_t i) { cells.pos_div(i, d); });

    for (auto & pool : pools) {
        pool.cells.reset_shift();
    }

    drop_spans(seq_id, [&](const span & sp) { return sp.p0 < p1 && sp.p1 > p0; });
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
    for (const auto & w : weights) {
        add(w.buf);
    }
}

//
// state
//

static constexpr uint32_t CAPSULE_STATE_MAGIC   = 0x5343564b; // "KVCS"
static constexpr uint32_t CAPSULE_STATE_VERSION = 3;

// followed by the description of the slots (llama-capsule-state.h), then the data of each slot, layer by layer
struct capsule_state_header {
    uint32_t magic;
    uint32_t version;
    uint64_t capsule; // id of the file
    uint32_t i_tier[2];
    uint64_t size; // of the description
    uint64_t hash;
};

// the runs of vision tokens in the hot cells of a sequence
static void capsule_state_vision(const llama_kv_cells & cells, llama_seq_id seq_id, llama_seq_id seq_id_out, std::vector<llama_capsule_state_span> & res) {
    for (const auto & [pos, i] : cells.seq_pos_get(seq_id)) {
        if (cells.ext_get(i).tok != LLAMA_TOKEN_NULL) {
            continue;
        }
        if (!res.empty() && res.back().seq_id == seq_id_out && res.back().p1 == pos) {
            res.back().p1++;
        } else {
            res.push_back({ seq_id_out, pos, pos + 1, 0 });
        }
    }
}

uint64_t llama_capsule_store::slot_hash(const pool & pool, uint32_t i_slot) const {
    uint64_t & res = pool.hash[i_slot];
    if (res != 0) {
        return res;
    }

    std::vector<uint8_t> buf;
    for (size_t l = 0; l < pool.layers.size(); ++l) {
        buf.resize(pool.codecs[l].layout.slot_stride);
        slot_get(pool, l, i_slot, buf.data());

        res = llama_capsule_state_v4::hash(buf.data(), buf.size(), res);
    }

    return res;
}

// slots: the indices of the slots, per tier
llama_capsule_state llama_capsule_store::state_get(llama_seq_id seq_id, std::array<std::vector<uint32_t>, N_TIERS> & slots) const {
    llama_capsule_state res;

    const bool one_seq = seq_id != -1;

    for (llama_seq_id s = one_seq ? seq_id : 0; s < (one_seq ? seq_id + 1 : (llama_seq_id) kv.n_seq_max); ++s) {
        if (!kv.has_cell_ext()) {
            capsule_state_vision(kv.v_cells[0], s, one_seq ? 0 : s, res.vision);
        }
        const auto it = spans.find(s);
        if (it != spans.end()) {
            for (const auto & sp : it->second) {
                res.pending.push_back({ one_seq ? 0 : s, sp.p0, sp.p1, sp.closed });
            }
        }
    }

    for (int ip = 0; ip < N_TIERS; ++ip) {
        const auto & cells = pools[ip].cells;

        for (uint32_t s = 0; s < pools[ip].n_used; ++s) {
            llama_capsule_state_slot slot;
            slot.stored = pools[ip].stored[s];
            slot.cells.resize(N());

            bool wanted = false;
            for (uint32_t j = 0; j < N(); ++j) {
                const uint32_t i = s*N() + j;
                if (cells.is_empty(i) || (one_seq && !cells.seq_has(i, seq_id))) {
                    continue;
                }
                wanted = true;

                const auto & ext = cells.ext_get(i);

                slot.cells[j] = { cells.pos_get(i), ext.x, ext.y, {} };
                if (!one_seq) {
                    slot.cells[j].seqs = cells.seq_get_all(i);
                }
            }
            if (wanted) {
                slot.hash = slot_hash(pools[ip], s);
                slots[ip].push_back(s);
                res.slots[ip].push_back(std::move(slot));
            }
        }
    }

    return res;
}

void llama_capsule_store::state_write_begin() const {
    lctx.memory_update(false);
}

void llama_capsule_store::state_write(llama_io_write_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) const {
    std::array<std::vector<uint32_t>, N_TIERS> slots;

    const auto meta = llama_capsule_state_format(state_get(seq_id, slots));

    const capsule_state_header header = {
        CAPSULE_STATE_MAGIC, CAPSULE_STATE_VERSION, data().id,
        { pools[0].i_tier, pools[1].i_tier },
        meta.size(), llama_capsule_state_v4::hash(meta.data(), meta.size(), 0),
    };
    io.write(&header, sizeof(header));
    io.write(meta.data(), meta.size());

    std::vector<uint8_t> buf;
    for (int ip = 0; ip < N_TIERS; ++ip) {
        for (uint32_t s : slots[ip]) {
            for (size_t l = 0; l < pools[ip].layers.size(); ++l) {
                auto       * blob   = pools[ip].layers[l].blob;
                const size_t stride = pools[ip].codecs[l].layout.slot_stride;

                // a copy on the device would be tied to tensors that are replaced when the pool grows
                if (!blob || (flags & LLAMA_STATE_SEQ_FLAGS_ON_DEVICE)) {
                    buf.resize(stride);
                    slot_get(pools[ip], l, s, buf.data());
                    io.write(buf.data(), stride);
                } else {
                    io.write_tensor(blob, s*stride, stride);
                }
            }
        }
    }
}

void llama_capsule_store::state_read(llama_io_read_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) {
    hot.state_read(io, seq_id, flags);
}

void llama_capsule_store::state_read_slots(llama_io_read_i & io, llama_seq_id seq_id, bool has_slots) {
    if (!has_slots) {
        state_set_hot({}, seq_id);
        return;
    }

    capsule_state_header header;
    io.read(&header, sizeof(header));

    if (header.magic != CAPSULE_STATE_MAGIC || header.version != CAPSULE_STATE_VERSION) {
        throw std::runtime_error("the slots in the state have an unknown format");
    }
    if (header.capsule != data().id || header.i_tier[0] != pools[0].i_tier || header.i_tier[1] != pools[1].i_tier) {
        throw std::runtime_error("the state was saved with another capsule or ratio");
    }

    // piece by piece: the size may be wrong
    std::vector<uint8_t> meta;
    while (meta.size() < header.size) {
        const size_t n = std::min<uint64_t>(header.size - meta.size(), 1 << 20);
        meta.resize(meta.size() + n);
        io.read(meta.data() + meta.size() - n, n);
    }
    if (llama_capsule_state_v4::hash(meta.data(), meta.size(), 0) != header.hash) {
        throw std::runtime_error("the slots in the state are damaged");
    }

    const llama_capsule_state_limits limits = {
        N(), kv.n_seq_max, { (uint32_t) pools[0].used.size(), (uint32_t) pools[1].used.size() }, seq_id != -1,
    };
    const auto state = llama_capsule_state_parse(meta.data(), meta.size(), limits);

    state_set_hot (state, seq_id);
    state_set_cold(state, seq_id, io);
}

void llama_capsule_store::state_set_hot(const llama_capsule_state & state, llama_seq_id seq_id) {
    const bool one_seq = seq_id != -1;

    // the KV cache does not save if a cell holds text: the token itself does not matter
    if (!kv.has_cell_ext()) {
        for (llama_seq_id s = one_seq ? seq_id : 0; s < (one_seq ? seq_id + 1 : (llama_seq_id) kv.n_seq_max); ++s) {
            hot.set_token(s, 0, std::numeric_limits<llama_pos>::max(), 0);
        }
        for (const auto & span : state.vision) {
            hot.set_token(one_seq ? seq_id : span.seq_id, span.p0, span.p1, LLAMA_TOKEN_NULL);
        }
    }

    for (const auto & span : state.pending) {
        spans[one_seq ? seq_id : span.seq_id].push_back({ span.p0, span.p1, span.closed != 0 });
    }
}

void llama_capsule_store::state_set_cold(const llama_capsule_state & state, llama_seq_id seq_id, llama_io_read_i & io) {
    for (int ip = 0; ip < N_TIERS; ++ip) {
        auto & pool = pools[ip];

        const uint32_t n_new  = state.slots[ip].size();
        const uint32_t n_free = std::count(pool.used.begin(), pool.used.begin() + pool.n_slots, false);

        if (n_new > n_free && (pool.n_slots + n_new - n_free > pool.used.size() || !grow_pool(pool, pool.n_slots + n_new - n_free))) {
            throw std::runtime_error("no room for the slots in the state");
        }
    }

    std::array<std::vector<uint32_t>, N_TIERS> slots;

    for (int ip = 0; ip < N_TIERS; ++ip) {
        auto & pool = pools[ip];

        for (const auto & slot : state.slots[ip]) {
            const uint32_t s = alloc_slot(pool);

            for (uint32_t j = 0; j < N(); ++j) {
                const auto & cell = slot.cells[j];
                if (cell.pos < 0) {
                    continue;
                }

                llama_kv_cell_ext ext;
                ext.x = cell.x;
                ext.y = cell.y;

                pool.cells.pos_set(s*N() + j, cell.pos);
                pool.cells.ext_set(s*N() + j, ext);
                for (llama_seq_id id = 0; id < LLAMA_MAX_SEQ; ++id) {
                    if (seq_id == -1 ? cell.seqs.test(id) : id == seq_id) {
                        pool.cells.seq_add(s*N() + j, id);
                    }
                }
            }

            pool.hash[s]   = slot.hash;
            pool.stored[s] = slot.stored;
            slots[ip].push_back(s);
        }
    }

    update_used();
    touch();

    // a slot is checked before it is written: others share its memory. If this fails, the cells are removed again
    init_tiles();

    for (int ip = 0; ip < N_TIERS; ++ip) {
        for (uint32_t s : slots[ip]) {
            std::vector<std::vector<uint8_t>> bufs;

            uint64_t hash = 0;
            for (const auto & codec : pools[ip].codecs) {
                auto & buf = bufs.emplace_back(codec.layout.slot_stride);
                io.read(buf.data(), buf.size());

                hash = llama_capsule_state_v4::hash(buf.data(), buf.size(), hash);
            }
            if (hash != pools[ip].hash[s]) {
                throw std::runtime_error("the slots in the state are damaged");
            }

            for (size_t l = 0; l < bufs.size(); ++l) {
                std::atomic<bool> ok { true };
                threads.run(lctx.n_threads_batch(), data().layers[l].n_head_kv, [&](size_t h) {
                    if (!fits(l, ip, bufs[l].data(), h)) {
                        ok = false;
                    }
                });
                if (!ok) {
                    throw std::runtime_error("the slots in the state hold keys or values that are not finite or do not fit f16");
                }
            }
            for (size_t l = 0; l < bufs.size(); ++l) {
                slot_set(pools[ip], l, s, bufs[l].data());
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
    for (const auto & w : weights) {
        stats.bytes_scratch += w.buf ? ggml_backend_buffer_get_size(w.buf.get()) : 0;
    }

    stats.bytes_hot = kv.size_k_bytes() + kv.size_v_bytes();

    for (const auto & layer : data().layers) {
        stats.bytes_f16_token += layer.n_head_kv*(layer.n_embd_head_k + layer.n_embd_head_v)*sizeof(ggml_fp16_t);
    }
}

std::vector<llama_capsule_memory::token> llama_capsule_store::read(llama_seq_id seq_id, llama_pos p0, llama_pos p1, int32_t il) const {
    const uint32_t i_layer = find_layer(il);

    const auto & layer = data().layers[i_layer];

    const size_t n_k = layer.n_head_kv*layer.n_embd_head_k;
    const size_t n_v = layer.n_head_kv*layer.n_embd_head_v;

    std::vector<token> res;

    std::vector<float> k(N()*n_k);
    std::vector<float> v(N()*n_v);

    for (int ip = 0; ip < N_TIERS; ++ip) {
        const auto & pool  = pools[ip];
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
                    slot_get(pool, i_layer, s, slot.data());
                    codec.decode(slot.data(), k.data(), v.data());
                    if (rotated(i_layer, ip)) {
                        unrotate(i_layer, pool.stored[s], N(), k.data());
                    }
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
