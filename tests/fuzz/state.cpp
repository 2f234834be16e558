// the reader of what a saved state says about images: any bytes are one state within the limits or one line

#include "llama-capsule-state.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <vector>

// the first byte picks the limits
extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    if (size < 1) {
        return 0;
    }

    const bool large = (data[0] & 2) != 0;

    const llama_capsule_state_limits limits = {
        /*.block_size =*/ large ? 16u : 8u,
        /*.n_seq_max  =*/ large ? (uint32_t) LLAMA_MAX_SEQ : 4u,
        /*.n_slots    =*/ { 8, 4 },
        /*.one_seq    =*/ (data[0] & 1) != 0,
    };

    try {
        const auto state = llama_capsule_state_parse(data + 1, size - 1, limits);

        // there is one way to write a state: nothing is read that is not looked at
        const std::vector<uint8_t> again = llama_capsule_state_format(state);
        if (again.size() != size - 1 || memcmp(again.data(), data + 1, again.size()) != 0) {
            fprintf(stderr, "fuzz: a state that would be written in another way\n");
            abort();
        }

        for (const auto & slots : state.slots) {
            for (const auto & slot : slots) {
                for (const auto & cell : slot.cells) {
                    if (cell.pos == std::numeric_limits<llama_pos>::max()) {
                        fprintf(stderr, "fuzz: a cell that no range of positions removes\n");
                        abort();
                    }
                }
            }
        }
    } catch (const std::runtime_error &) {
    }

    return 0;
}
