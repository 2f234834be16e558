#pragma once

// all that llama.cpp, and the C API, know of capsules

#include "llama.h"

#include "ggml-backend.h"

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

struct llama_batch_ext;
struct llama_capsule_stats;
struct llama_memory_i;
struct llama_memory_params;
struct llm_graph_context;

class llama_io_read_i;
class llama_io_write_i;

// what attention of a layer is called with, see llm_graph_context::build_attn_mha()
struct llama_capsule_attn {
    ggml_tensor * q;
    ggml_tensor * k; // hot cells
    ggml_tensor * v;
    ggml_tensor * kq_b;
    ggml_tensor * kq_mask;
    ggml_tensor * sinks;
    ggml_tensor * k_rot;
    float         kq_scale;
    int           il;
};

// the compressed part of one llama_kv_cache: vision tokens that left its (hot) cells
class llama_capsule_memory {
public:
    virtual ~llama_capsule_memory() = default;

    //
    // sequence operations, forwarded by llama_kv_cache
    //

    virtual void clear() = 0;

    virtual void seq_rm  (llama_seq_id seq_id, llama_pos p0, llama_pos p1) = 0;
    virtual void seq_cp  (llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1) = 0;
    virtual void seq_keep(llama_seq_id seq_id) = 0;
    virtual void seq_add (llama_seq_id seq_id, llama_pos p0, llama_pos p1, llama_pos shift) = 0;
    virtual void seq_div (llama_seq_id seq_id, llama_pos p0, llama_pos p1, int d) = 0;

    // the smallest and the largest position, that of the hot cells included (-1: they have none)
    virtual llama_pos seq_pos_min(llama_seq_id seq_id, llama_pos pos_hot) const = 0;
    virtual llama_pos seq_pos_max(llama_seq_id seq_id, llama_pos pos_hot) const = 0;

    virtual void memory_breakdown(std::map<ggml_backend_buffer_type_t, size_t> & res) const = 0;

    //
    // state
    //

    // before anything is read from the hot cells: their keys are rotated for the positions that they have now
    virtual void state_write_begin() const = 0;

    // after the state of the KV cache: what the hot cells hold, and the slots
    virtual void state_write(llama_io_write_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) const = 0;

    // replaces llama_kv_cache::state_read(): a state that is damaged leaves the sequence (or the cache) empty
    virtual void state_read(llama_io_read_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) = 0;

    // so many hot cells are about to be read, and what they replace is gone: makes room for them, if there is memory for it
    virtual void state_read_cells(uint32_t n_cells) = 0;

    // the part that state_write() wrote; without one, all hot cells that were read hold text
    virtual void state_read_slots(llama_io_read_i & io, llama_seq_id seq_id, bool has_slots) = 0;

    //
    // compression
    //

    // moves the vision tokens of a sequence in [p0, p1) into slots, returns how many moved
    virtual uint32_t compress(llama_seq_id seq_id, llama_pos p0, llama_pos p1) = 0;

    // automatic mode: an image is compressed when something else follows it
    virtual void decode_begin(const llama_batch_ext & batch) = 0;
    virtual void decode_end  (const llama_batch_ext & batch) = 0;

    // the hot cache is full: compresses what may be compressed, or makes it larger; false if there is no room for the batch
    virtual bool make_room(const llama_batch_ext & batch) = 0;

    //
    // graph
    //

    // build_attn_mha() over the hot cells and the slots
    virtual ggml_tensor * build_attn(const llm_graph_context & g, const llama_capsule_attn & attn) = 0;

    // an upper bound of the nodes that build_attn() adds to a graph
    virtual uint32_t graph_nodes() const = 0;

    // throws if a layer did not pass through build_attn(): its images would be lost
    virtual void check_layers() const = 0;

    //
    // info
    //

    virtual void get_stats(llama_capsule_stats & stats) const = 0;

    // K (without RoPE) and V of the tokens of a sequence in slots, with a position in [p0, p1), appended slot by slot
    struct token {
        llama_pos pos;
        llama_pos y;
        llama_pos x;

        std::vector<float> k; // [n_head_kv][d_k]
        std::vector<float> v; // [n_head_kv][d_v]
    };
    virtual std::vector<token> read(llama_seq_id seq_id, llama_pos p0, llama_pos p1, int32_t il) const = 0;
};

// fails the creation of the context, see llama_capsule_last_error()
[[noreturn]] void llama_capsule_refuse(const std::string & reason);

// the memory of a new context, with a capsule behind it if the thread or the environment asks for one
llama_memory_i * llama_capsule_create_memory(llama_context & lctx, const llama_memory_params & params);

// state: the number of streams carries a flag if slots follow, which makes unpatched readers refuse it
static constexpr uint32_t LLAMA_CAPSULE_STATE_FLAG = 0x80000000;

// strips the flag; throws if there are slots, but no capsule for them
bool llama_capsule_state_check(const llama_capsule_memory * memory, uint32_t & n_stream);

// hooks of llama_context::decode(), nothing happens without a capsule
void llama_capsule_decode_begin(llama_context & lctx, const llama_batch_ext & batch);
void llama_capsule_decode_end  (llama_context & lctx, const llama_batch_ext & batch);
bool llama_capsule_make_room   (llama_context & lctx, const llama_batch_ext & batch);

uint32_t llama_capsule_graph_nodes(const llama_context & lctx);

// after the first graphs were built
void llama_capsule_check_layers(const llama_context & lctx);
