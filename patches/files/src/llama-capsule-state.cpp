#include "llama-capsule-state.h"

#include <cstring>
#include <limits>
#include <stdexcept>

static std::runtime_error capsule_state_damaged() {
    return std::runtime_error("the slots in the state are damaged");
}

namespace {

struct state_counts {
    uint32_t n_vision;
    uint32_t n_pending;
    uint32_t n_slots[2];
};

// followed by the ids of the sequences in ascending order
struct state_cell {
    llama_pos pos;
    llama_pos x;
    llama_pos y;

    uint32_t n_seq;
};

class state_writer {
public:
    std::vector<uint8_t> res;

    template<typename T>
    void put(const T & x) {
        const auto * p = (const uint8_t *) &x;
        res.insert(res.end(), p, p + sizeof(T));
    }
};

class state_reader {
public:
    state_reader(const uint8_t * data, size_t size) : data(data), size(size) {}

    template<typename T>
    T get() {
        if (size < sizeof(T)) {
            throw capsule_state_damaged();
        }

        T res;
        memcpy(&res, data, sizeof(T));

        data += sizeof(T);
        size -= sizeof(T);

        return res;
    }

    size_t left() const {
        return size;
    }

private:
    const uint8_t * data;
    size_t          size;
};

} // namespace

std::vector<uint8_t> llama_capsule_state_format(const llama_capsule_state & state) {
    state_writer out;

    out.put(state_counts {
        (uint32_t) state.vision.size(),
        (uint32_t) state.pending.size(),
        { (uint32_t) state.slots[0].size(), (uint32_t) state.slots[1].size() },
    });

    for (const auto * spans : { &state.vision, &state.pending }) {
        for (const auto & span : *spans) {
            out.put(span);
        }
    }

    for (const auto & slots : state.slots) {
        for (const auto & slot : slots) {
            out.put(slot.hash);
            out.put(slot.stored);
            for (const auto & cell : slot.cells) {
                out.put(state_cell { cell.pos, cell.x, cell.y, (uint32_t) cell.seqs.count() });
                for (llama_seq_id s = 0; s < LLAMA_MAX_SEQ; ++s) {
                    if (cell.seqs.test(s)) {
                        out.put(s);
                    }
                }
            }
        }
    }

    return std::move(out.res);
}

static std::vector<llama_capsule_state_span> capsule_state_parse_spans(state_reader & in, uint32_t n, const llama_capsule_state_limits & limits) {
    // before anything is allocated for them
    if (n > in.left()/sizeof(llama_capsule_state_span)) {
        throw capsule_state_damaged();
    }

    std::vector<llama_capsule_state_span> res;
    for (uint32_t i = 0; i < n; ++i) {
        const auto span = in.get<llama_capsule_state_span>();

        const uint32_t n_seq = limits.one_seq ? 1 : limits.n_seq_max;
        if (span.seq_id < 0 || (uint32_t) span.seq_id >= n_seq || span.p0 < 0 || span.p1 <= span.p0 || span.closed > 1) {
            throw capsule_state_damaged();
        }
        res.push_back(span);
    }

    return res;
}

static llama_capsule_state_cell capsule_state_parse_cell(state_reader & in, const llama_capsule_state_limits & limits) {
    const auto raw = in.get<state_cell>();

    const bool empty = raw.pos == -1;

    // a cell of a whole state belongs to a sequence, an empty cell to none; no range [p0, p1) removes the last position
    if (raw.pos < -1 || raw.pos == std::numeric_limits<llama_pos>::max() || raw.n_seq > limits.n_seq_max || (raw.n_seq == 0) != (empty || limits.one_seq)) {
        throw capsule_state_damaged();
    }

    llama_capsule_state_cell res;
    res.pos = raw.pos;
    res.x   = raw.x;
    res.y   = raw.y;

    llama_seq_id last = -1;
    for (uint32_t i = 0; i < raw.n_seq; ++i) {
        const auto s = in.get<llama_seq_id>();
        if (s <= last || (uint32_t) s >= limits.n_seq_max) {
            throw capsule_state_damaged();
        }
        res.seqs.set(s);
        last = s;
    }

    return res;
}

llama_capsule_state llama_capsule_state_parse(const uint8_t * data, size_t size, const llama_capsule_state_limits & limits) {
    state_reader in(data, size);

    llama_capsule_state res;

    const auto counts = in.get<state_counts>();

    res.vision  = capsule_state_parse_spans(in, counts.n_vision,  limits);
    res.pending = capsule_state_parse_spans(in, counts.n_pending, limits);

    for (size_t ip = 0; ip < res.slots.size(); ++ip) {
        if (counts.n_slots[ip] > limits.n_slots[ip]) {
            throw std::runtime_error("the state holds more slots than the context has room for");
        }
        for (uint32_t n = 0; n < counts.n_slots[ip]; ++n) {
            llama_capsule_state_slot slot;

            slot.hash   = in.get<uint64_t>();
            slot.stored = in.get<std::array<int32_t, 4>>();

            bool empty = true;
            for (uint32_t j = 0; j < limits.block_size; ++j) {
                slot.cells.push_back(capsule_state_parse_cell(in, limits));
                empty = empty && slot.cells.back().pos < 0;
            }
            if (empty) {
                throw capsule_state_damaged();
            }

            res.slots[ip].push_back(std::move(slot));
        }
    }

    if (in.left() > 0) {
        throw capsule_state_damaged();
    }

    return res;
}
