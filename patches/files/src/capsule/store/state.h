#pragma once

#include "llama.h"
#include "llama-cparams.h"

#include <bitset>
#include <cstddef>
#include <cstdint>
#include <vector>

//
// what a saved state says about images, besides the bytes of the slots
//
// Everything here works on bytes alone, without a model or a context. To fuzz the reader:
//
//   int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
//       try { llama_capsule_state_v4::parse(data, size, { 10, 256, 4, size % 2 == 0 }); } catch (const std::runtime_error &) {}
//       return 0;
//   }
//

struct llama_capsule_state_v4 {
    // part of a sequence
    struct span {
        llama_seq_id seq_id; // 0 in the state of one sequence
        llama_pos    p0;
        llama_pos    p1; // exclusive
        uint32_t     closed;
    };

    struct cell {
        llama_pos pos = -1; // -1: no token
        llama_pos x   = 0;
        llama_pos y   = 0;

        std::bitset<LLAMA_MAX_SEQ> seqs; // none in the state of one sequence
    };

    struct slot {
        uint8_t h = 0;
        uint8_t w = 0;
        uint8_t i_tier = 0;

        std::vector<cell> cells; // [h*w]
    };

    struct limits {
        uint32_t n_tiers;
        uint32_t n_cells;
        uint32_t n_seq_max;

        bool one_seq; // the state of one sequence
    };

    std::vector<span> vision;  // hot cells that hold vision tokens, where the state of the KV cache does not tell
    std::vector<span> pending; // images to be compressed
    std::vector<slot> slots;

    std::vector<uint8_t> format() const;

    // throws std::runtime_error with one line if the bytes are not exactly one state within the limits
    static llama_capsule_state_v4 parse(const uint8_t * data, size_t size, const limits & limits);

    // not cryptographic: finds damage, not intent
    static uint64_t hash(const void * data, size_t size, uint64_t seed);
};
