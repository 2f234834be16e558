#pragma once

#include "capsule/model/rope.h"

#include "ggml-cpp.h"
#include "llama.h"

#include <cstdint>
#include <functional>
#include <vector>

struct llama_context;

class llama_io_read_i;
class llama_kv_cache;
class llama_kv_cells;

// the hot cells of a llama_kv_cache
class llama_capsule_kv {
public:
    llama_capsule_kv(llama_context & lctx, llama_kv_cache & kv);

    // makes an empty cache n cells large, with a buffer for each layer; false: there is no memory for it
    bool init(uint32_t n);

    // makes the cache n cells large, a layer after the other, and calls commit(). All is as before if there is no memory or commit() says no
    //   no graph may be computed meanwhile, and none that was built before may be computed after
    bool grow(uint32_t n, const std::function<bool()> & commit);

    bool is_shared() const; // does another context read the cells? Then they can not grow

    // cells of a sequence with a position in [p0, p1), ordered by (pos, y, x)
    std::vector<uint32_t> find(llama_seq_id seq_id, llama_pos p0, llama_pos p1) const;

    // free the given cells, whatever sequences they belong to
    void free(const std::vector<uint32_t> & idxs);

    // says of the cells of a sequence in [p0, p1) what they hold: LLAMA_TOKEN_NULL is a vision token
    void set_token(llama_seq_id seq_id, llama_pos p0, llama_pos p1, llama_token tok);

    // llama_kv_cache::state_read() without its hook; what is damaged leaves the sequence (or the cache) empty
    void state_read(llama_io_read_i & io, llama_seq_id seq_id, llama_state_seq_flags flags);

    const llama_model    & model() const;
    const llama_kv_cells & cells() const;

    uint32_t size()      const; // cells
    uint32_t n_seq_max() const;
    uint32_t n_pos()     const; // components of a position
    size_t   n_bytes()   const;

    bool has_cell_ext() const; // does a saved state tell vision tokens from text?

    // index of the layer whose K and V layer il reads, < 0: of none
    int32_t layer_id(int32_t il) const;

    // of all cells; V may be transposed
    ggml_tensor * k(int32_t il) const;
    ggml_tensor * v(int32_t il) const;

    ggml_type type_k() const;
    ggml_type type_v() const;

    bool v_trans() const;
    bool rot_k()   const; // are the keys of a quantized cache multiplied with a Hadamard matrix?
    bool rot_v()   const;

    class reader;

private:
    llama_context  & lctx;
    llama_kv_cache & kv;

    bool resize(size_t i_layer, uint32_t n);
};

// K without RoPE and V of some of them, as floats
class llama_capsule_kv::reader {
public:
    reader(const llama_capsule_kv & cells, std::vector<uint32_t> idxs);

    // a layer; copied if its device has memory of its own; either part may be left out
    void load(int32_t il, bool rope, bool want_k = true, bool want_v = true);

    // one head of the cells [first, first + n) of the list, rows of ld values; for several threads at a time
    void read_k(uint32_t i_head, size_t first, size_t n, float * dst, size_t ld) const;
    void read_v(uint32_t i_head, size_t first, size_t n, float * dst, size_t ld) const;

private:
    const llama_context  & lctx;
    const llama_kv_cache & kv;

    const std::vector<uint32_t> idxs;

    int32_t il = -1;

    // as they are stored
    struct rows {
        const uint8_t * data;
        bool            all; // of the whole cache, otherwise only the cells of the list

        std::vector<uint8_t> copy;
    };
    rows k = {};
    rows v = {}; // transposed: [n_embd][n], copied

    void            load_rows(rows & r, const ggml_tensor * t);
    const uint8_t * row      (const rows & r, const ggml_tensor * t, size_t i, uint32_t first) const; // of cell i from channel `first` on

    // angles that undo RoPE, [n][n_rot]; layers with the same RoPE share them
    struct table {
        llama_capsule_rope_params params;
        std::vector<float>        angles;
    };
    std::vector<table> tables;

    int i_table = -1; // of the layer, -1: no RoPE

    int find_table();
};
