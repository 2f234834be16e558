#pragma once

#include "capsule/format/forms.h"
#include "capsule/graph/angles.h"
#include "capsule/graph/narrow.h"

#include "ggml-capsule.h"
#include "ggml-cpp.h"
#include "llama-graph.h"

#include <map>
#include <memory>
#include <vector>

struct llama_capsule_attn;
struct llama_capsule_stats;
struct llama_context;

class llama_capsule_graph;
class llama_capsule_kv;
class llama_capsule_slots;

//
// what attention reads of the slots of one llama_kv_cache, as inputs of a graph
//

// every graph of a context with a capsule has one, also when there is no slot: it must not be reused when there is
class llm_graph_input_tiles : public llm_graph_input_i {
public:
    llm_graph_input_tiles(std::shared_ptr<llama_capsule_graph> graph, bool causal_attn);

    void set_input(const llama_ubatch * ubatch) override;

    bool can_reuse(const llm_graph_params & params) override;

    const std::shared_ptr<llama_capsule_graph> graph;

    const bool causal_attn;

    // what the shapes and the pools of the graph depend on
    std::vector<int64_t> shape;

    // see ggml-capsule.h
    ggml_tensor * slots     = nullptr; // I32 [n_slots, 5, n_layers]
    ggml_tensor * seen      = nullptr; // I8 [n_slots, n_tokens]
    ggml_tensor * mask_cold = nullptr; // F16 [n_cold, n_tokens]

    // of stock attention
    ggml_tensor * mask    = nullptr; // of the columns of the slots
    ggml_tensor * mask_kq = nullptr; // of all columns

    // of narrowed heads, over the hot cells; nullptr where all heads see everything
    ggml_tensor * hide     = nullptr; // -INF: a cell of another image
    ggml_tensor * mask_own = nullptr; // of the model, and this

    std::vector<ggml_tensor *> angles; // F32, by kind of RoPE; nullptr where no layer has asked yet
};

//
// llama_capsule_graph
//

class llama_capsule_graph : public std::enable_shared_from_this<llama_capsule_graph> {
public:
    // throws if the slots of a layer can not be read; what it refers to must live as long as graphs are built and computed
    llama_capsule_graph(llama_context & lctx, const llama_capsule_kv & kv, llama_capsule_forms & forms, const llama_capsule_slots & slots,
            llama_capsule_narrow narrow);

    // where the pool of a layer belongs
    ggml_backend_buffer_type_t pool_buft(uint32_t i_layer) const;

    // room for all hot cells, n_cold cold ones and the forms that there are; false: there is no memory for it
    bool reserve(uint32_t n_cold);

    // graphs that are built from here on have room for so many slots and cold cells; (0, 0): for those that there are
    void plan(uint32_t n_slots, uint32_t n_cold);

    // build_attn_mha() over the hot cells and the slots
    ggml_tensor * build_attn(const llm_graph_context & g, const llama_capsule_attn & attn);

    // an upper bound of the nodes that build_attn() adds to a graph
    uint32_t graph_nodes() const;

    // throws if a layer did not pass through build_attn(): its images would be lost
    void check_layers() const;

    // what the shapes and the pools of a graph depend on
    std::vector<int64_t> shape();

    // do heads that are narrowed see less of this batch than others?
    bool narrows(const llama_ubatch & ubatch) const { return narrow.find(ubatch); }

    // of the heads that are narrowed
    void get_stats(llama_capsule_stats & stats) const;

    // for the slots that there are now
    void set_inputs(const llm_graph_input_tiles & inp, const llama_ubatch & ubatch);

    // of the scratch and the tables
    size_t n_bytes() const;
    void   memory_breakdown(std::map<ggml_backend_buffer_type_t, size_t> & res) const;

private:
    // K and V of hot and cold cells side by side, for stock attention; the layers of a device take turns
    struct scratch {
        ggml_backend_buffer_type_t buft;

        ggml_context_ptr        ctx;
        ggml_backend_buffer_ptr buf;

        ggml_tensor * k = nullptr;
        ggml_tensor * v = nullptr;
    };

    struct layer {
        int32_t il;
        bool    local;   // slots lie in the memory of the hot cells and are read there, otherwise the CPU unpacks them and copies the result
        bool    attend;  // the op attends to the slots as they are

        ggml_backend_dev_t dev; // that has the op, nullptr: the CPU

        int    i_kind;  // of RoPE, -1: none
        size_t i_scratch;
        bool   checked; // see llama_capsule_check_rope()

        ggml_capsule_tile_params params;

        ggml_context_ptr        ctx;
        ggml_backend_buffer_ptr buf;

        ggml_tensor * tables = nullptr;
    };

    llama_context             & lctx;
    const llama_capsule_kv    & kv;
    llama_capsule_forms       & forms;
    const llama_capsule_slots & slots;

    std::vector<layer>   layers;
    std::vector<scratch> scratches;

    llama_capsule_angles angles;
    llama_capsule_narrow narrow;

    uint64_t n_tokens_narrow = 0; // that were read

    // at least, see plan()
    uint32_t n_slots_plan = 0;
    uint32_t n_cold_plan  = 0;

    uint32_t n_forms = 0; // in the tables

    void init_layers();

    // what runs the op of a layer
    ggml_backend_t backend_of(const llm_graph_context & g, uint32_t i_layer) const;

    bool update_tables();
    bool reserve_scratch(scratch & s, uint32_t n_cold);

    uint32_t find_layer(int il) const;

    uint32_t n_slots()    const; // of a graph
    uint32_t n_cold()     const; // columns of a graph
    uint32_t n_cold_pad() const;

    // as bytes: what each token sees of each column
    std::vector<uint8_t> visible(const llama_ubatch & ubatch, bool causal_attn) const;

    void set_slots (ggml_tensor * dst) const;
    void set_angles(ggml_tensor * dst, uint32_t i_kind) const;
    void set_mask  (ggml_tensor * dst, const std::vector<uint8_t> & visible) const;
    void set_seen  (ggml_tensor * dst, const std::vector<uint8_t> & visible) const;

    llm_graph_input_tiles * graph_input(const llm_graph_context & g, ggml_tensor * kq_mask);

    ggml_tensor * layer_slots (const llm_graph_context & g, llm_graph_input_tiles & inp, uint32_t i_layer) const;
    ggml_tensor * layer_angles(const llm_graph_context & g, llm_graph_input_tiles & inp, uint32_t i_layer);

    void check_rope(const llm_graph_context & g, const ggml_tensor * k, const ggml_tensor * k_rot, uint32_t i_layer, int il);

    bool can_attend(const llm_graph_context & g, uint32_t i_layer, const ggml_tensor * q, const ggml_tensor * kq_b, const ggml_tensor * sinks) const;

    ggml_tensor * build_attend(const llm_graph_context & g, llm_graph_input_tiles & inp, uint32_t i_layer,
            ggml_tensor * q, ggml_tensor * k, ggml_tensor * v, ggml_tensor * kq_mask, float kq_scale);

    // some heads see the hot cells of text and of their own image only
    ggml_tensor * build_narrow(const llm_graph_context & g, llm_graph_input_tiles & inp, uint32_t i_layer, const llama_capsule_attn & attn,
            const std::vector<llama_capsule_narrow::run> & runs);

    // puts hot cells and slots side by side for stock attention -> k, v and mask of both
    void build_columns(const llm_graph_context & g, llm_graph_input_tiles & inp, uint32_t i_layer, ggml_tensor *& k, ggml_tensor *& v, ggml_tensor *& mask);

    void build_unpack(const llm_graph_context & g, llm_graph_input_tiles & inp, uint32_t i_layer, ggml_tensor * dst, bool is_v);
};
