// the reader of what a saved state says about images: any bytes are one state within the limits or one line

#include "capsule/store/state.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <vector>

static void require(bool ok, const char * what) {
    if (!ok) {
        fprintf(stderr, "fuzz: %s\n", what);
        abort();
    }
}

// there is one way to write a state: nothing is read that is not looked at
static void check(const std::vector<uint8_t> & again, const uint8_t * data, size_t size) {
    require(again.size() == size && memcmp(again.data(), data, size) == 0, "a state that would be written in another way");
}

static void parse(const uint8_t * data, size_t size, bool one_seq, bool large) {
    const llama_capsule_state_v4::limits limits = {
        /*.n_tiers   =*/ 10,
        /*.n_cells   =*/ 128,
        /*.n_seq_max =*/ large ? (uint32_t) LLAMA_MAX_SEQ : 4u,
        /*.one_seq   =*/ one_seq,
    };
    const auto state = llama_capsule_state_v4::parse(data, size, limits);

    check(state.format(), data, size);
    size_t n_cells = 0;
    for (const auto & slot : state.slots) {
        require(slot.cells.size() == (size_t) slot.h*slot.w && slot.h <= 8 && slot.w <= 8 && slot.i_tier < limits.n_tiers, "a tile of no known shape or tier");
        n_cells += slot.cells.size();
        for (const auto & cell : slot.cells) {
            require(cell.pos != std::numeric_limits<llama_pos>::max(), "a cell that no range of positions removes");
        }
    }
    require(n_cells <= limits.n_cells, "more cells than there is room for");
}

// the first byte picks the limits
extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    if (size < 1) {
        return 0;
    }

    try {
        parse(data + 1, size - 1, (data[0] & 1) != 0, (data[0] & 2) != 0);
    } catch (const std::runtime_error &) {
    }

    return 0;
}
