#pragma once

// GGML_OP_CAPSULE: what its constructors and what backends are told have in common

#include "ggml-capsule.h"
#include "ggml-capsule-impl.h"

static constexpr int CAPSULE_MAX_N = 128; // tokens of a block
static constexpr int CAPSULE_MAX_D = 512;

// where the sources of a node are, in the order of capsule_ptrs
enum capsule_src {
    CAPSULE_SRC_Q, // unpack: dst; encode, errors: cells
    CAPSULE_SRC_K, // encode, errors: index
    CAPSULE_SRC_V, // encode, errors: angles
    CAPSULE_SRC_MASK,
    CAPSULE_SRC_COLD,
    CAPSULE_SRC_BLOB0,
    CAPSULE_SRC_BLOB1,
    CAPSULE_SRC_WEIGHTS,
    CAPSULE_SRC_ROPE,
    CAPSULE_SRC_COUNT,
};

// CAPSULE_MAX_TYPES for another type
int capsule_type_of(ggml_type type);

ggml_capsule_params capsule_params_of(const ggml_tensor * op);

// what is known of a pattern of positions, in units of 4 bytes
int64_t capsule_pattern_size(const ggml_capsule_params & p);

// where the rows of tier i are
void capsule_tier_init(capsule_tier & tier, const ggml_capsule_params & p, int i);

// where the sources of a node of tiles are
enum capsule_tile_src {
    CAPSULE_TILE_SRC_Q, // unpack: dst; combine: parts
    CAPSULE_TILE_SRC_K,
    CAPSULE_TILE_SRC_V,
    CAPSULE_TILE_SRC_MASK,
    CAPSULE_TILE_SRC_COLD,
    CAPSULE_TILE_SRC_SEEN,
    CAPSULE_TILE_SRC_POOL,
    CAPSULE_TILE_SRC_SLOTS,
    CAPSULE_TILE_SRC_TABLES,
    CAPSULE_TILE_SRC_ANGLES,
    CAPSULE_TILE_SRC_COUNT,
};

static constexpr int CAPSULE_TILE_SLOT_WORDS = 5;
static constexpr int CAPSULE_TILE_TOKENS     = 64; // that meet a slot at a time
