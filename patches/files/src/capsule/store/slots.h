#pragma once

#include "llama-kv-cells.h"

#include "ggml-backend.h"
#include "ggml-cpp.h"

#include <cstdint>
#include <functional>
#include <map>
#include <vector>

static constexpr uint32_t LLAMA_CAPSULE_UNIT = 64; // bytes: slots begin at multiples of it

// one tile of vision tokens, compressed for every layer
struct llama_capsule_slot {
    uint8_t h; // tokens of the tile, line by line
    uint8_t w;
    uint8_t i_tier;

    uint32_t first; // of its h*w cells

    std::vector<uint32_t> offs; // per layer: where its bytes begin in the pool, in units

    uint32_t n_tokens() const {
        return h*w;
    }
};

// the slots in use, the cells of their tokens, and one pool of memory per layer
//
// Slots lie in the order of their indices, in the cells and in every pool. Those that lose their last token go at once;
//   what they leave is closed when room is needed.
class llama_capsule_slots {
public:
    // of a tile in a layer, in units
    using size_fn = std::function<uint32_t(uint32_t i_layer, const llama_capsule_slot & slot)>;

    // where the pool of a layer belongs
    using buft_fn = std::function<ggml_backend_buffer_type_t(uint32_t i_layer)>;

    // n_cells: of all slots that may ever exist
    llama_capsule_slots(uint32_t n_layer, uint32_t n_cells, size_fn size, buft_fn buft);

    //
    // reading
    //

    uint32_t n_layer() const { return pools.size(); }
    uint32_t n_slots() const { return slots.size(); }

    // cells of all slots, those without a token included
    uint32_t n_cold() const;

    const llama_capsule_slot & slot(uint32_t i_slot) const { return slots[i_slot]; }

    // in units
    uint32_t offs(uint32_t i_layer, uint32_t i_slot) const { return slots[i_slot].offs[i_layer]; }
    uint32_t size(uint32_t i_layer, uint32_t i_slot) const { return size_of(i_layer, slots[i_slot]); }

    // I8, nullptr while there is none
    ggml_tensor * pool(uint32_t i_layer) const { return pools[i_layer].mem; }

    const llama_kv_cells & cells() const { return v_cells; }

    // changes with every change of slots, pools, cells or positions
    uint64_t version() const { return n_version; }

    // the bytes of a slot in a layer
    void get(uint32_t i_layer, uint32_t i_slot,       uint8_t * data) const;
    void set(uint32_t i_layer, uint32_t i_slot, const uint8_t * data);

    size_t n_bytes_used()  const;
    size_t n_bytes_pools() const;

    void memory_breakdown(std::map<ggml_backend_buffer_type_t, size_t> & res) const;

    //
    // changes
    //

    // for changes of what the cells hold; then drop_empty()
    llama_kv_cells & cells_mut() { n_version++; return v_cells; }

    // is there room for more slots? The gaps between the others may be closed for it
    bool fits(const std::vector<llama_capsule_slot> & more);

    // enlarges the pools for more slots, a layer after the other, and calls commit(). All is as before if there is no memory or commit() says no
    //   spare: by half more than is needed
    bool grow(const std::vector<llama_capsule_slot> & more, bool spare, const std::function<bool()> & commit);

    // the index of a new slot, which must fit; its cells are empty
    uint32_t add(const llama_capsule_slot & slot);

    // gives back the slots without a token
    void drop_empty();

private:
    struct pool_layer {
        ggml_context_ptr        ctx;
        ggml_backend_buffer_ptr buf;

        ggml_tensor * mem = nullptr;
    };

    const size_fn size_of;
    const buft_fn buft_of;

    llama_kv_cells v_cells;

    std::vector<llama_capsule_slot> slots;
    std::vector<pool_layer>         pools;

    uint64_t n_version = 0;

    // the first cell, and the first unit of a pool, behind the last slot
    uint32_t end_cells() const;
    uint32_t end_pool(uint32_t i_layer) const;

    uint32_t capacity(uint32_t i_layer) const; // in units

    // of the pool of a layer with these slots behind the others
    uint32_t end_with(uint32_t i_layer, const std::vector<llama_capsule_slot> & more) const;

    bool fits_now(const std::vector<llama_capsule_slot> & more) const;
    bool has_gaps() const;

    bool resize(uint32_t i_layer, uint32_t n_units);
    bool resize_all(const std::vector<uint32_t> & n_units);

    void close_gaps();
};
