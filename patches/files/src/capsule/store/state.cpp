#include "capsule/store/state.h"

#include <cstring>
#include <limits>
#include <stdexcept>
#include <type_traits>

static constexpr uint32_t CAPSULE_SIDE = 8; // a tile has at most 8 x 8 tokens

using state = llama_capsule_state_v4;

namespace {

[[noreturn]] void damaged(const char * what) {
    throw std::runtime_error(std::string("the images in the state are damaged: ") + what);
}

struct state_counts {
    uint32_t n_vision;
    uint32_t n_pending;
    uint32_t n_slots;
};

struct state_slot {
    uint8_t h;
    uint8_t w;
    uint8_t i_tier;
    uint8_t zero;
};

// followed by the ids of the sequences, ascending
struct state_cell {
    llama_pos pos;
    llama_pos x;
    llama_pos y;

    uint32_t n_seq;
};

struct state_writer {
    std::vector<uint8_t> res;

    template<typename T>
    void put(const T & x) {
        static_assert(std::is_trivially_copyable_v<T>);

        const auto * p = (const uint8_t *) &x;
        res.insert(res.end(), p, p + sizeof(T));
    }
};

struct state_reader {
    const uint8_t * data;
    size_t          size;

    template<typename T>
    T get() {
        if (size < sizeof(T)) {
            damaged("they end too early");
        }

        T res;
        memcpy(&res, data, sizeof(T));

        data += sizeof(T);
        size -= sizeof(T);

        return res;
    }

    // n things of at least this size follow; checked before anything is allocated for them
    void expect(uint32_t n, size_t each) const {
        if (n > size/each) {
            damaged("they end too early");
        }
    }
};

} // namespace

std::vector<uint8_t> state::format() const {
    state_writer out;

    out.put(state_counts { (uint32_t) vision.size(), (uint32_t) pending.size(), (uint32_t) slots.size() });

    for (const auto * spans : { &vision, &pending }) {
        for (const auto & s : *spans) {
            out.put(s);
        }
    }

    for (const auto & s : slots) {
        out.put(state_slot { s.h, s.w, s.i_tier, 0 });
        for (const auto & c : s.cells) {
            out.put(state_cell { c.pos, c.x, c.y, (uint32_t) c.seqs.count() });
            for (llama_seq_id id = 0; id < LLAMA_MAX_SEQ; ++id) {
                if (c.seqs.test(id)) {
                    out.put(id);
                }
            }
        }
    }

    return std::move(out.res);
}

static std::vector<state::span> parse_spans(state_reader & in, uint32_t n, const state::limits & limits) {
    in.expect(n, sizeof(state::span));

    const uint32_t n_seq = limits.one_seq ? 1 : limits.n_seq_max;

    std::vector<state::span> res;
    for (uint32_t i = 0; i < n; ++i) {
        const auto s = in.get<state::span>();
        if (s.seq_id < 0 || (uint32_t) s.seq_id >= n_seq || s.p0 < 0 || s.p1 <= s.p0 || s.closed > 1) {
            damaged("a span is none");
        }
        res.push_back(s);
    }

    return res;
}

static state::cell parse_cell(state_reader & in, const state::limits & limits) {
    const auto raw = in.get<state_cell>();

    const bool empty = raw.pos == -1;

    // a token of a whole state belongs to a sequence, an empty cell to none; no range [p0, p1) removes the last position
    if (raw.pos < -1 || raw.pos == std::numeric_limits<llama_pos>::max() || raw.n_seq > limits.n_seq_max || (raw.n_seq == 0) != (empty || limits.one_seq)) {
        damaged("a token has no position or no sequence");
    }

    state::cell res;
    res.pos = raw.pos;
    res.x   = raw.x;
    res.y   = raw.y;

    llama_seq_id last = -1;
    for (uint32_t i = 0; i < raw.n_seq; ++i) {
        const auto id = in.get<llama_seq_id>();
        if (id <= last || (uint32_t) id >= limits.n_seq_max) {
            damaged("a sequence does not exist");
        }
        res.seqs.set(id);
        last = id;
    }

    return res;
}

static state::slot parse_slot(state_reader & in, const state::limits & limits) {
    const auto raw = in.get<state_slot>();

    const uint32_t n = raw.h*raw.w;
    if (n == 0 || raw.h > CAPSULE_SIDE || raw.w > CAPSULE_SIDE || raw.i_tier >= limits.n_tiers || raw.zero != 0) {
        damaged("a tile has no such shape or tier");
    }

    state::slot res = { raw.h, raw.w, raw.i_tier, {} };

    bool empty = true;
    for (uint32_t j = 0; j < n; ++j) {
        res.cells.push_back(parse_cell(in, limits));
        empty = empty && res.cells.back().pos < 0;
    }
    if (empty) {
        damaged("a tile has no token");
    }

    return res;
}

llama_capsule_state_v4 state::parse(const uint8_t * data, size_t size, const limits & limits) {
    state_reader in { data, size };

    state res;

    const auto counts = in.get<state_counts>();

    res.vision  = parse_spans(in, counts.n_vision,  limits);
    res.pending = parse_spans(in, counts.n_pending, limits);

    in.expect(counts.n_slots, sizeof(state_slot) + sizeof(state_cell));

    uint64_t n_cells = 0;
    for (uint32_t i = 0; i < counts.n_slots; ++i) {
        res.slots.push_back(parse_slot(in, limits));

        n_cells += res.slots.back().cells.size();
        if (n_cells > limits.n_cells) {
            throw std::runtime_error("the state holds more vision tokens than the context has room for");
        }
    }

    if (in.size > 0) {
        damaged("something follows them");
    }

    return res;
}

uint64_t state::hash(const void * data, size_t size, uint64_t seed) {
    const auto * p = (const uint8_t *) data;

    uint64_t h = seed ^ (size*0x9e3779b97f4a7c15ull);
    for (; size > 0;) {
        uint64_t w = 0;

        const size_t n = size < sizeof(w) ? size : sizeof(w);
        memcpy(&w, p, n);

        h = (h ^ w)*0x9fb21c651e98df25ull;
        h ^= h >> 32;

        p    += n;
        size -= n;
    }

    return h;
}
