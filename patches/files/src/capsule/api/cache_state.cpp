#include "capsule/api/cache.h"

#include "../ggml/src/ggml-capsule/tile.h"
#include "llama-context.h"
#include "llama-io.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <stdexcept>

//
// slots of a llama_capsule_cache -> bytes of a saved state, or floats
//

static constexpr uint32_t CAPSULE_STATE_MAGIC   = 0x5343564b; // "KVCS"
static constexpr uint32_t CAPSULE_STATE_VERSION = 4;

static constexpr float CAPSULE_F16_MAX = 65504.0f;

// followed by the description (capsule/store/state.h), then each slot: its bytes, layer by layer, and their hash
struct capsule_state_header {
    uint32_t magic;
    uint32_t version;
    uint64_t capsule; // id of the tables
    uint64_t size;    // of the description
    uint64_t hash;
};

using state_v4 = llama_capsule_state_v4;

// the runs of vision tokens in the hot cells of a sequence
static void capsule_state_vision(const llama_kv_cells & cells, llama_seq_id seq_id, llama_seq_id seq_id_out, std::vector<state_v4::span> & res) {
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

// i_slot: the slots of the state
state_v4 llama_capsule_cache::state_get(llama_seq_id seq_id, std::vector<uint32_t> & i_slot) const {
    state_v4 res;

    const bool one_seq = seq_id != -1;

    for (llama_seq_id s = one_seq ? seq_id : 0; s < (one_seq ? seq_id + 1 : (llama_seq_id) hot.n_seq_max()); ++s) {
        if (!hot.has_cell_ext()) {
            capsule_state_vision(hot.cells(), s, one_seq ? 0 : s, res.vision);
        }
        for (const auto & sp : spans.get(s)) {
            res.pending.push_back({ one_seq ? 0 : s, sp.p0, sp.p1, sp.closed });
        }
    }

    const auto & cells = slots.cells();

    for (uint32_t i = 0; i < slots.n_slots(); ++i) {
        const auto & s = slots.slot(i);

        state_v4::slot slot = { s.h, s.w, s.i_tier, std::vector<state_v4::cell>(s.n_tokens()) };

        bool wanted = false;
        for (uint32_t j = 0; j < s.n_tokens(); ++j) {
            const uint32_t c = s.first + j;
            if (cells.is_empty(c) || (one_seq && !cells.seq_has(c, seq_id))) {
                continue;
            }
            wanted = true;

            const auto & ext = cells.ext_get(c);

            slot.cells[j] = { cells.pos_get(c), ext.x, ext.y, {} };
            if (!one_seq) {
                slot.cells[j].seqs = cells.seq_get_all(c);
            }
        }
        if (wanted) {
            i_slot.push_back(i);
            res.slots.push_back(std::move(slot));
        }
    }

    return res;
}

void llama_capsule_cache::state_write_begin() const {
    lctx.memory_update(false);
}

void llama_capsule_cache::state_write(llama_io_write_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) const {
    GGML_UNUSED(flags); // the slots are not kept on the device: their pools move

    std::vector<uint32_t> i_slot;

    const auto meta = state_get(seq_id, i_slot).format();

    const capsule_state_header header = {
        CAPSULE_STATE_MAGIC, CAPSULE_STATE_VERSION, p.tables->id, meta.size(), state_v4::hash(meta.data(), meta.size(), 0),
    };
    io.write(&header, sizeof(header));
    io.write(meta.data(), meta.size());

    std::vector<uint8_t> data;
    for (uint32_t i : i_slot) {
        uint64_t hash = 0;
        for (uint32_t l = 0; l < slots.n_layer(); ++l) {
            data.resize((size_t) slots.size(l, i)*LLAMA_CAPSULE_UNIT);
            slots.get(l, i, data.data());

            hash = state_v4::hash(data.data(), data.size(), hash);
            io.write(data.data(), data.size());
        }
        io.write(&hash, sizeof(hash));
    }
}

void llama_capsule_cache::state_read(llama_io_read_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) {
    hot.state_read(io, seq_id, flags);
}

void llama_capsule_cache::state_read_cells(uint32_t n_cells) {
    grow_hot((uint64_t) hot.cells().get_used() + n_cells);
}

void llama_capsule_cache::state_read_slots(llama_io_read_i & io, llama_seq_id seq_id, bool has_slots) {
    if (!has_slots) {
        state_set_hot({}, seq_id);
        return;
    }

    capsule_state_header header;
    io.read(&header, sizeof(header));

    if (header.magic == CAPSULE_STATE_MAGIC && header.version < CAPSULE_STATE_VERSION) {
        throw std::runtime_error("the images in the state are of format v1, which is not read any more: evaluate the prompt again");
    }
    if (header.magic != CAPSULE_STATE_MAGIC || header.version != CAPSULE_STATE_VERSION) {
        throw std::runtime_error("the images in the state have an unknown format");
    }
    if (header.capsule != p.tables->id) {
        throw std::runtime_error("the state was saved with another capsule");
    }

    // piece by piece: the size may be wrong
    std::vector<uint8_t> meta;
    while (meta.size() < header.size) {
        const size_t n = std::min<uint64_t>(header.size - meta.size(), 1 << 20);
        meta.resize(meta.size() + n);
        io.read(meta.data() + meta.size() - n, n);
    }
    if (state_v4::hash(meta.data(), meta.size(), 0) != header.hash) {
        throw std::runtime_error("the images in the state are damaged: hash mismatch");
    }

    const auto state = state_v4::parse(meta.data(), meta.size(), {
        (uint32_t) p.tables->smaller.size(), slots.cells().size(), hot.n_seq_max(), seq_id != -1,
    });

    state_set_hot (state, seq_id);
    state_set_cold(state, seq_id, io);
}

void llama_capsule_cache::state_set_hot(const state_v4 & state, llama_seq_id seq_id) {
    const bool one_seq = seq_id != -1;

    // the KV cache does not save if a cell holds text: the token itself does not matter
    if (!hot.has_cell_ext()) {
        for (llama_seq_id s = one_seq ? seq_id : 0; s < (one_seq ? seq_id + 1 : (llama_seq_id) hot.n_seq_max()); ++s) {
            hot.set_token(s, 0, std::numeric_limits<llama_pos>::max(), 0);
        }
        for (const auto & span : state.vision) {
            hot.set_token(one_seq ? seq_id : span.seq_id, span.p0, span.p1, LLAMA_TOKEN_NULL);
        }
    }

    for (const auto & span : state.pending) {
        spans.add(one_seq ? seq_id : span.seq_id, { span.p0, span.p1, span.closed != 0 });
    }
}

void llama_capsule_cache::state_set_cold(const state_v4 & state, llama_seq_id seq_id, llama_io_read_i & io) {
    lctx.synchronize();

    std::vector<llama_capsule_slot> more;
    for (const auto & s : state.slots) {
        more.push_back({ s.h, s.w, s.i_tier, 0, {} });
    }
    if (!reserve(more)) {
        throw std::runtime_error("no room for the images in the state");
    }

    // a slot is checked before it is written; its cells come last
    std::vector<std::vector<uint8_t>> data(slots.n_layer());

    try {
        for (const auto & s : state.slots) {
            const uint32_t i = slots.add({ s.h, s.w, s.i_tier, 0, {} });

            uint64_t hash = 0;
            for (uint32_t l = 0; l < slots.n_layer(); ++l) {
                data[l].resize((size_t) slots.size(l, i)*LLAMA_CAPSULE_UNIT);
                io.read(data[l].data(), data[l].size());

                hash = state_v4::hash(data[l].data(), data[l].size(), hash);
            }

            uint64_t expected;
            io.read(&expected, sizeof(expected));
            if (hash != expected) {
                throw std::runtime_error("the images in the state are damaged: hash mismatch");
            }

            for (uint32_t l = 0; l < slots.n_layer(); ++l) {
                state_check(l, i, data[l]);
                slots.set(l, i, data[l].data());
            }
        }
    } catch (...) {
        slots.drop_empty();
        throw;
    }

    auto & cells = slots.cells_mut();

    uint32_t i = slots.n_slots() - state.slots.size();
    for (const auto & s : state.slots) {
        uint32_t dst = slots.slot(i++).first;
        for (const auto & cell : s.cells) {
            if (cell.pos >= 0) {
                llama_kv_cell_ext ext;
                ext.x = cell.x;
                ext.y = cell.y;

                cells.pos_set(dst, cell.pos);
                cells.ext_set(dst, ext);
                for (llama_seq_id id = 0; id < LLAMA_MAX_SEQ; ++id) {
                    if (seq_id == -1 ? cell.seqs.test(id) : id == seq_id) {
                        cells.seq_add(dst, id);
                    }
                }
            }
            ++dst;
        }
    }
}

void llama_capsule_cache::state_check(uint32_t i_layer, uint32_t i_slot, std::vector<uint8_t> & data) const {
    const auto & layer = p.tables->layers[i_layer];
    const auto & slot  = slots.slot(i_slot);

    std::atomic<bool> ok { true };

    threads.run(lctx.n_threads_batch(), 2*layer.n_head_kv, [&](size_t i) {
        const bool     is_v = i >= layer.n_head_kv;
        const uint32_t d    = is_v ? layer.n_embd_head_v : layer.n_embd_head_k;

        std::vector<float> x(slot.n_tokens()*d);
        decode(i_layer, slot, data.data(), is_v, i % layer.n_head_kv, x.data(), d);

        if (!std::all_of(x.begin(), x.end(), [](float v) { return fabsf(v) <= CAPSULE_F16_MAX; })) {
            ok = false;
        }
    });

    if (!ok) {
        throw std::runtime_error("the images in the state hold keys or values that are not finite or do not fit f16");
    }

    // what kernels are told of a slot follows from the rest
    std::vector<ggml_capsule_coder> k;
    for (uint32_t h = 0; h < layer.n_head_kv; ++h) {
        k.push_back(forms.coder_k(i_layer, h));
    }
    ggml_capsule_slot_seal(forms.get(i_layer, forms.find(slot.i_tier, slot.h, slot.w)), layer.n_head_kv, k.data(), data.data());
}

void llama_capsule_cache::decode(uint32_t i_layer, const llama_capsule_slot & slot, const uint8_t * data, bool is_v, uint32_t i_head, float * x, size_t stride) const {
    const auto & form  = forms.get(i_layer, forms.find(slot.i_tier, slot.h, slot.w));
    const auto * plan  = is_v ? ggml_capsule_form_v(form, i_head) : ggml_capsule_form_k(form, i_head);
    const auto   coder = is_v ? forms.coder_v(i_layer, i_head) : forms.coder_k(i_layer, i_head);
    const size_t offs  = is_v ? form.v_offset[i_head] : form.k_offset[i_head];

    std::vector<float> rows(slot.n_tokens()*coder.channels.d);
    std::vector<float> work(ggml_capsule_rows_work(coder.channels.d));

    ggml_capsule_read(coder, plan, data + offs, x, stride, rows.data(), work.data());
}

std::vector<llama_capsule_memory::token> llama_capsule_cache::read(llama_seq_id seq_id, llama_pos p0, llama_pos p1, int32_t il) const {
    const uint32_t i_layer = hot.layer_id(il);
    const auto   & layer   = p.tables->layers[i_layer];
    const auto   & cells   = slots.cells();

    const size_t n_k = layer.n_head_kv*layer.n_embd_head_k;
    const size_t n_v = layer.n_head_kv*layer.n_embd_head_v;

    std::vector<token> res;

    std::vector<uint8_t> data;
    std::vector<float>   k;
    std::vector<float>   v;

    for (uint32_t i = 0; i < slots.n_slots(); ++i) {
        const auto & s = slots.slot(i);

        bool decoded = false;
        for (uint32_t j = 0; j < s.n_tokens(); ++j) {
            const uint32_t c = s.first + j;
            if (!cells.pos_in(c, p0, p1) || !cells.seq_has(c, seq_id)) {
                continue;
            }

            if (!decoded) {
                data.resize((size_t) slots.size(i_layer, i)*LLAMA_CAPSULE_UNIT);
                slots.get(i_layer, i, data.data());

                k.resize(s.n_tokens()*n_k);
                v.resize(s.n_tokens()*n_v);
                for (uint32_t h = 0; h < layer.n_head_kv; ++h) {
                    decode(i_layer, s, data.data(), false, h, k.data() + h*layer.n_embd_head_k, n_k);
                    decode(i_layer, s, data.data(), true,  h, v.data() + h*layer.n_embd_head_v, n_v);
                }
                decoded = true;
            }

            const auto & ext = cells.ext_get(c);
            res.push_back({
                cells.pos_get(c), ext.y, ext.x,
                { k.begin() + j*n_k, k.begin() + (j + 1)*n_k },
                { v.begin() + j*n_v, v.begin() + (j + 1)*n_v },
            });
        }
    }

    return res;
}
