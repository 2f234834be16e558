#pragma once

#include "capsule/api/create.h"
#include "capsule/compress/encode.h"
#include "capsule/compress/spans.h"
#include "capsule/format/forms.h"
#include "capsule/graph/graph.h"
#include "capsule/hooks.h"
#include "capsule/store/slots.h"
#include "capsule/store/state.h"

#include "capsule/model/kv.h"

#include <memory>

// vision tokens of one llama_kv_cache, compressed by tiles (format v2)
class llama_capsule_cache : public llama_capsule_memory {
public:
    llama_capsule_cache(llama_context & lctx, llama_kv_cache & kv, const llama_capsule_cache_params & params);

    void clear() override;

    void seq_rm  (llama_seq_id seq_id, llama_pos p0, llama_pos p1) override;
    void seq_cp  (llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1) override;
    void seq_keep(llama_seq_id seq_id) override;
    void seq_add (llama_seq_id seq_id, llama_pos p0, llama_pos p1, llama_pos shift) override;
    void seq_div (llama_seq_id seq_id, llama_pos p0, llama_pos p1, int d) override;

    llama_pos seq_pos_min(llama_seq_id seq_id, llama_pos pos_hot) const override;
    llama_pos seq_pos_max(llama_seq_id seq_id, llama_pos pos_hot) const override;

    void memory_breakdown(std::map<ggml_backend_buffer_type_t, size_t> & res) const override;

    void state_write_begin() const override;
    void state_write(llama_io_write_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) const override;
    void state_read (llama_io_read_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) override;
    void state_read_cells(uint32_t n_cells) override;
    void state_read_slots(llama_io_read_i & io, llama_seq_id seq_id, bool has_slots) override;

    uint32_t compress(llama_seq_id seq_id, llama_pos p0, llama_pos p1) override;

    void decode_begin(const llama_batch_ext & batch) override;
    void decode_end  (const llama_batch_ext & batch) override;

    bool make_room(const llama_batch_ext & batch) override;

    ggml_tensor * build_attn(const llm_graph_context & g, const llama_capsule_attn & attn) override;

    uint32_t graph_nodes() const override;
    void     check_layers() const override;

    void get_stats(llama_capsule_stats & stats) const override;

    std::vector<token> read(llama_seq_id seq_id, llama_pos p0, llama_pos p1, int32_t il) const override;

private:
    llama_context & lctx;

    const llama_capsule_cache_params p;

    llama_capsule_kv            hot;
    mutable llama_capsule_forms forms;
    llama_capsule_slots         slots;
    llama_capsule_threads       threads;
    llama_capsule_encoder       encoder;
    llama_capsule_spans         spans;

    std::shared_ptr<llama_capsule_graph> graph;

    // what the graphs have room for
    uint32_t n_slots_reserved = 0;
    uint32_t n_cold_reserved  = 0;
    uint32_t n_forms_reserved = 0;

    bool warned_alloc  = false;
    bool warned_broken = false;
    bool grown         = false; // since the last decode

    void warn_alloc();
    void warn_broken();

    //
    // compression
    //

    uint32_t compress_image(std::vector<llama_capsule_cut> cuts);
    uint32_t compress_closed();
    uint32_t compress_rest();

    // is there room for more slots?
    bool has_room(const std::vector<llama_capsule_slot> & more);

    // makes room for them
    bool reserve(const std::vector<llama_capsule_slot> & more);
    bool reserve_graph(uint32_t n_slots, uint32_t n_cold);

    // enlarges the hot cache so that n_cells fit; false if they do not, or did before
    bool grow_hot(uint64_t n_cells);

    bool is_image(llama_seq_id seq_id, const llama_capsule_spans::span & span) const;

    // calls fn(cell) for the cells of a sequence (< 0: of any) in slots, with a position in [p0, p1)
    template<typename F>
    void for_cold(llama_seq_id seq_id, llama_pos p0, llama_pos p1, F fn) const;

    //
    // state
    //

    llama_capsule_state_v4 state_get(llama_seq_id seq_id, std::vector<uint32_t> & i_slot) const;

    void state_set_hot (const llama_capsule_state_v4 & state, llama_seq_id seq_id);
    void state_set_cold(const llama_capsule_state_v4 & state, llama_seq_id seq_id, llama_io_read_i & io);

    // the bytes of a slot of a saved state: throws if a key or a value is not finite or does not fit f16
    void state_check(uint32_t i_layer, uint32_t i_slot, std::vector<uint8_t> & data) const;

    // K (without RoPE) or V of a head of a slot, f32 [n_tokens] rows of `stride` values
    void decode(uint32_t i_layer, const llama_capsule_slot & slot, const uint8_t * data, bool is_v, uint32_t i_head, float * x, size_t stride) const;
};
