#pragma once

// GGML_OP_CAPSULE: what its constructors and its implementations have in common

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
