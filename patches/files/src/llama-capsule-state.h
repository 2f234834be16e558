#pragma once

#include "llama.h"
#include "llama-cparams.h"

#include <array>
#include <bitset>
#include <cstddef>
#include <cstdint>
#include <vector>

//
// what a saved state says about images, besides the data of the slots
//
// everything here works on bytes alone, without a model or a context. To fuzz the reader:
//
//   int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
//       const llama_capsule_state_limits limits = { 16, 4, { 64, 64 }, size % 2 == 0 };
//       try { llama_capsule_state_parse(data, size, limits); } catch (const std::runtime_error &) {}
//       return 0;
//   }
//

struct llama_capsule_state_cell {
    llama_pos pos = -1; // -1: empty
    llama_pos x   = 0;
    llama_pos y   = 0;

    std::bitset<LLAMA_MAX_SEQ> seqs; // none in the state of one sequence
};

struct llama_capsule_state_slot {
    uint64_t hash = 0; // of the data

    std::array<int32_t, 4> stored = {}; // position by which the keys are rotated

    std::vector<llama_capsule_state_cell> cells;
};

struct llama_capsule_state_span {
    llama_seq_id seq_id; // 0 in the state of one sequence
    llama_pos    p0;
    llama_pos    p1; // exclusive
    uint32_t     closed;
};

struct llama_capsule_state {
    std::vector<llama_capsule_state_span> vision;  // hot cells that hold vision tokens, where the state of the KV cache does not tell
    std::vector<llama_capsule_state_span> pending; // images to be compressed

    std::array<std::vector<llama_capsule_state_slot>, 2> slots; // economy, faithful
};

struct llama_capsule_state_limits {
    uint32_t block_size;
    uint32_t n_seq_max;

    std::array<uint32_t, 2> n_slots;

    bool one_seq; // the state of one sequence
};

std::vector<uint8_t> llama_capsule_state_format(const llama_capsule_state & state);

// throws std::runtime_error with one line if the bytes are not exactly one state within the limits
llama_capsule_state llama_capsule_state_parse(const uint8_t * data, size_t size, const llama_capsule_state_limits & limits);
