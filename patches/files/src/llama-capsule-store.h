#pragma once

#include "capsule/hooks.h"

#include "llama-capsule-codec.h"
#include "llama-capsule-kv.h"
#include "llama-capsule-project.h"
#include "llama-capsule-query.h"
#include "llama-capsule-rope.h"
#include "llama-capsule-state.h"
#include "llama-capsule-threads.h"
#include "llama-capsule-tile.h"

#include "ggml-capsule.h"
#include "llama-graph.h"
#include "llama-io.h"
#include "llama-kv-cells.h"
#include "llama-memory.h"

#include <map>
#include <memory>
#include <vector>

struct llama_batch_ext;

class llama_capsule_store;

//
// llm_graph_input_capsule
//

// registered in every graph of a context with a capsule, also when no slot is in use:
//   a graph that was built for other slots must never be reused
class llm_graph_input_capsule : public llm_graph_input_i {
public:
    llm_graph_input_capsule(std::shared_ptr<const llama_capsule_store> store, bool causal_attn);

    void set_input(const llama_ubatch * ubatch) override;

    bool can_reuse(const llm_graph_params & params) override;

    std::shared_ptr<const llama_capsule_store> store;

    const uint64_t version;
    const bool     causal_attn;

    ggml_tensor * pos     = nullptr; // I32, chunk by chunk, twice: see set_input_pos()
    ggml_tensor * mask    = nullptr; // F32/F16 [n_cold_pad, n_tokens]
    ggml_tensor * mask_kq = nullptr; // hot and cold

    std::map<ggml_backend_buffer_type_t, ggml_tensor *> pos_dev; // in the scratch of each device

    // of GGML_OP_CAPSULE: angles, by their table
    std::map<int, ggml_tensor *> op_rope;
};

//
// llama_capsule_store
//

// how attention gets at the slots of a layer; LLAMA_KVCAPSULE_PATH=reconstruct|host|unpack|fused|op
enum llama_capsule_path {
    LLAMA_CAPSULE_PATH_RECONSTRUCT, // stock ops, any backend
    LLAMA_CAPSULE_PATH_HOST,        // the device lacks one of these ops: slots in host memory, unpacked there and copied to the device
    LLAMA_CAPSULE_PATH_UNPACK,      // CPU: one op each for K and V, then the usual attention
    LLAMA_CAPSULE_PATH_FUSED,       // CPU: attention on the slots for small batches, unpack for large ones
    LLAMA_CAPSULE_PATH_OP,          // the same with GGML_OP_CAPSULE, on backends that have it
};

// the slots of one llama_kv_cache: blocks of vision tokens, compressed for every layer
class llama_capsule_store : public llama_capsule_memory, public std::enable_shared_from_this<llama_capsule_store> {
public:
    struct params {
        llama_capsule_data_ptr data;

        uint32_t i_economy;     // tier
        bool     auto_compress;
        bool     guard;
    };

    llama_capsule_store(llama_context & lctx, llama_kv_cache & kv, const params & params);

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
    void state_read_slots(llama_io_read_i & io, llama_seq_id seq_id, bool has_slots) override;

    uint32_t compress(llama_seq_id seq_id, llama_pos p0, llama_pos p1) override;

    void decode_begin(const llama_batch_ext & batch) override;
    void decode_end  (const llama_batch_ext & batch) override;

    bool make_room(const llama_batch_ext & batch) override;

    ggml_tensor * build_attn(
            const llm_graph_context & g,
                        ggml_tensor * q,
                        ggml_tensor * k,
                        ggml_tensor * v,
                        ggml_tensor * kq_b,
                        ggml_tensor * kq_mask,
                        ggml_tensor * sinks,
                        ggml_tensor * k_rot,
                        ggml_tensor * v_rot,
                              float   kq_scale,
                                int   il) override;

    uint32_t graph_nodes() const override;
    void     check_layers() const override;

    void get_stats(llama_capsule_stats & stats) const override;

    std::vector<token> read(llama_seq_id seq_id, llama_pos p0, llama_pos p1, int32_t il) const override;

    //
    // graph
    //

    uint64_t version() const;

    // the op of the CPU path: slots -> dst, the columns of the slots in the scratch
    void unpack(ggml_tensor * dst, uint32_t i_layer, bool is_v, int ith, int nth) const;

    // the op of the fused path: attention over hot cells and slots
    void attend(ggml_tensor * dst, uint32_t i_layer, int ith, int nth) const;

    // follows changed positions, before a graph is computed
    void update_rope() const;

    void set_input_pos (ggml_tensor * dst) const;
    void set_input_mask(ggml_tensor * dst, const llama_ubatch * ubatch, bool causal_attn) const;

    void set_input_op_rope(ggml_tensor * dst, int i_table) const;

    // of the angles of this table, 4 bytes each
    int64_t op_rope_size (int i_table) const;
    int32_t op_rope_terms(int i_table) const;

    const llama_capsule_data & data() const;

private:
    static constexpr int N_TIERS = 2; // economy, faithful

    static constexpr int64_t CAPSULE_ATTEND_MAX_TOKENS = 256; // larger batches unpack

    struct pool_layer {
        ggml_context_ptr        ctx;
        ggml_backend_buffer_ptr buf;

        uint32_t n_slots = 0;

        // slot by slot, for ops that read whole slots: I8 [slot_stride*n_slots]
        ggml_tensor * blob = nullptr;

        // or type by type, for stock ops: their strides must be multiples of a block and their offsets aligned (Vulkan)
        struct plane {
            ggml_tensor * mem  = nullptr; // I8, chunk by chunk
            ggml_tensor * rows = nullptr; // the first chunk of it, [d, rows, n_head_kv, n_slots]

            size_t stride = 0; // of a chunk
        };
        std::array<plane, LLAMA_CAPSULE_N_TYPES> k;
        std::array<plane, LLAMA_CAPSULE_N_TYPES> v;
    };

    struct pool {
        uint32_t i_tier;

        uint32_t n_slots = 0; // allocated
        uint32_t n_used  = 0; // index of the last slot in use + 1

        llama_kv_cells cells; // of all slots that may ever exist

        std::vector<llama_capsule_codec> codecs; // per layer
        std::vector<pool_layer>          layers;

        std::vector<bool> used;

        mutable std::vector<uint64_t> hash; // of the data of a slot, 0: nobody has asked yet

        std::vector<llama_capsule_pos> stored; // position by which the keys of a slot are rotated, in the layers where they are
    };

    // constants of the reconstruction of one layer in one tier
    struct weights_part {
        ggml_tensor * basis = nullptr; // F32 [n_rows + n_pad, N]
        ggml_tensor * mean  = nullptr; // F32 [d, 1, n_head_kv]
    };

    struct weights_retain {
        ggml_tensor * idx_inv = nullptr; // I32 [N, n_head_kv, n_chunk], to the order of the tokens

        std::vector<ggml_tensor *> idx;  // per neighbour, I32 [N - n_kept, n_head_kv, n_chunk]
        std::vector<ggml_tensor *> gate; // per neighbour, F32 [d, N - n_kept, n_head_kv]

        ggml_tensor * mlp_up      = nullptr; // F32 [K*d, n_mlp, n_head_kv]
        ggml_tensor * mlp_up_bias = nullptr; // F32 [n_mlp, 1, n_head_kv]
        ggml_tensor * mlp_down    = nullptr; // F32 [n_mlp, d, n_head_kv]
    };

    struct weights_layer {
        ggml_context_ptr        ctx;
        ggml_backend_buffer_ptr buf;

        std::array<weights_part, N_TIERS> k;
        std::array<weights_part, N_TIERS> v;

        weights_retain retain;

        ggml_tensor * op = nullptr; // I32, of GGML_OP_CAPSULE, which needs none of the others
    };

    // shared by all layers of a device: f16 (or whatever the type of the hot cache) K and V of hot and cold cells
    struct scratch {
        ggml_backend_buffer_type_t buft;

        ggml_context_ptr        ctx;
        ggml_backend_buffer_ptr buf;

        ggml_tensor * k = nullptr;
        ggml_tensor * v = nullptr;

        ggml_tensor * pos = nullptr; // I32, the positions of the cold cells: copied once for all layers

        ggml_tensor * idx   = nullptr; // I32 [N, n_head_kv, n_chunk], 0..N-1
        ggml_tensor * rot_k = nullptr; // F32 Hadamard matrices of the rows
        ggml_tensor * rot_v = nullptr;

        // the constants that belong to no layer
        ggml_context_ptr        ctx_const;
        ggml_backend_buffer_ptr buf_const;
    };

    // an image in the hot cells, as seen by llama_context::decode()
    struct span {
        llama_pos p0;
        llama_pos p1; // exclusive

        bool closed;  // something else followed
    };

    llama_context  & lctx;
    llama_kv_cache & kv;

    const params p;

    const uint32_t n_chunk; // slots that are reconstructed at once

    llama_capsule_kv      hot;
    llama_capsule_threads threads;

    std::array<pool, N_TIERS> pools;

    // arguments of the ops of a layer
    struct op_arg {
        const llama_capsule_store * store;
        uint32_t                    i_layer;
    };
    std::vector<op_arg> op_args;

    // of the CPU paths, made when a graph first needs them
    mutable llama_capsule_rope_cache rope;

    mutable std::vector<std::vector<llama_capsule_tile>>     tiles;    // per layer: K and V of each tier
    mutable std::vector<std::vector<llama_capsule_variants>> variants; // per layer and tier

    mutable std::vector<std::vector<llama_capsule_projection>> projections; // the same

    std::vector<llama_capsule_path> paths; // per layer

    std::vector<bool> rope_checked; // per layer, see llama_capsule_check_rope()

    std::vector<weights_layer> weights;

    std::vector<scratch> scratches;

    uint64_t n_version = 0;

    const size_t n_bytes_limit; // of n_bytes_grown(), 0 = none

    bool warned_alloc  = false;
    bool warned_broken = false;
    bool grown         = false; // since the last decode

    size_t n_bytes_compute_first = 0; // before the first growth

    // images that may still grow
    std::map<llama_seq_id, std::vector<span>> spans;

    uint32_t N() const;

    ggml_backend_buffer_type_t layer_buft(uint32_t i_layer) const; // of the hot cells
    ggml_backend_buffer_type_t slots_buft(uint32_t i_layer) const;

    // chooses the paths, asks each device for the ops of the reconstruction
    void init_paths();

    // the first op that the device of the layer lacks, "" if none
    std::string find_unsupported(uint32_t i_layer) const;

    // the tensors of a layer with n_slots slots, not allocated
    void make_slots(pool_layer & res, const llama_capsule_codec & codec, uint32_t n_slots, bool planes, size_t align) const;

    // whole slots, in the layout of the codec
    void slot_get(const pool & pool, uint32_t i_layer, uint32_t i_slot,       uint8_t * data) const;
    void slot_set(const pool & pool, uint32_t i_layer, uint32_t i_slot, const uint8_t * data) const;
    const scratch &            layer_scratch(uint32_t i_layer) const;

    uint32_t find_layer(int il) const; // index in the capsule of the layer that holds the cells of layer il

    // are the keys stored with the RoPE of the first token of a slot?
    bool rotated(uint32_t i_layer, int i_pool) const;

    // k [n][n_head_kv][d], all back by the same position
    void unrotate(uint32_t i_layer, const llama_capsule_pos & pos, uint32_t n, float * k) const;

    void init_weights(uint32_t i_layer);
    void init_scratch_const();

    size_t n_bytes_compute() const; // of the compute buffers
    size_t n_bytes_grown()   const; // of pools and scratch, and what the compute buffers have grown by

    // nullptr if there is no memory for it
    ggml_backend_buffer_ptr alloc_buf(ggml_context * ctx, ggml_backend_buffer_type_t buft) const;

    // false if there is no memory for it
    bool grow_pool(pool & pool, uint32_t n_slots);
    bool grow_pool_to(pool & pool, uint32_t n_slots);
    bool resize_layers(pool & pool, uint32_t n_slots);
    bool resize_layer (pool & pool, uint32_t i_layer, uint32_t n_slots);
    bool reserve_scratch();
    bool reserve_compute();
    bool may_reserve() const;

    void warn_alloc();
    void warn_broken();

    // -1 if none is left
    int alloc_slot(pool & pool);

    void update_used();
    void touch();

    // calls fn(cells, i) for the cells of a sequence (< 0: of any) in slots, with a position in [p0, p1)
    template<typename F>
    void for_cold(llama_seq_id seq_id, llama_pos p0, llama_pos p1, F fn);

    // forgets the pending images that fn selects: what is left of them stays hot
    template<typename F>
    void drop_spans(llama_seq_id seq_id, F fn);

    uint32_t n_cold()     const; // columns
    uint32_t n_cold_pad() const;

    // of the positions of n slots: the views of the chunks must be aligned
    size_t n_pos_chunk(uint32_t n_slots) const;
    size_t n_pos_total(uint32_t n_slots_0, uint32_t n_slots_1) const;

    llama_capsule_state state_get(llama_seq_id seq_id, std::array<std::vector<uint32_t>, N_TIERS> & slots) const;

    uint64_t slot_hash(const pool & pool, uint32_t i_slot) const;

    void state_set_hot (const llama_capsule_state & state, llama_seq_id seq_id);
    void state_set_cold(const llama_capsule_state & state, llama_seq_id seq_id, llama_io_read_i & io);

    std::vector<std::vector<uint32_t>> cut_run(const std::vector<uint32_t> & idxs) const;

    // a block on its way into a slot
    struct block {
        std::vector<uint32_t> idxs; // hot cells

        int  i_pool;
        int  i_slot;
        bool failed; // the economy tier would distort it
        bool broken; // it, or what a slot makes of it, is not finite or does not fit f16: it stays hot

        bool wanted() const {
            return !broken && (!failed || i_pool != 0);
        }
    };

    // writes the slots of the blocks, one layer after the other; those of the economy tier may fail
    void encode      (const std::vector<block *> & blocks);
    void encode_layer(const std::vector<block *> & blocks, uint32_t i_layer, llama_capsule_kv::reader & reader);

    // K and V, [n_head][N]; empty if the guard does not ask
    using block_errors = std::array<std::vector<llama_capsule_errors>, 2>;

    bool guarded(uint32_t i_layer, int i_pool, bool is_v) const;

    // do K and V of a head, as a slot holds them, fit f16?
    bool fits(uint32_t i_layer, int i_pool, const uint8_t * slot, uint32_t i_head) const;

    // false: the guard refuses the block, now or before
    bool accept(block & b, uint32_t i_layer, const block_errors & errors) const;

    uint32_t compress_run(const std::vector<uint32_t> & idxs);
    void     place(pool & pool, uint32_t i_slot, const std::vector<uint32_t> & idxs);

    bool is_next (const span & sp, llama_pos pos) const;
    bool is_image(llama_seq_id seq_id, const span & sp) const;

    void close_spans(const llama_batch_ext & batch);
    uint32_t compress_closed();
    uint32_t compress_rest();

    llm_graph_input_capsule * graph_input(const llm_graph_context & g, ggml_tensor * kq_mask) const;

    llama_capsule_path path(uint32_t i_layer) const;

    void init_tiles() const;

    const llama_capsule_tile & tile(uint32_t i_layer, int i_pool, bool is_v) const;

    struct slot_ref {
        int      i_pool;
        uint32_t i_slot;
        uint32_t col;     // in the mask
        int      pattern; // slots that the same queries serve have the same, < 0: none do

        const llama_capsule_views * views; // that serve the slot, nullptr: without a pattern its keys are rebuilt
    };
    void attend_order(uint32_t i_layer, uint32_t n_q, std::vector<slot_ref> & res) const;

    struct attend_call;

    void attend_init  (attend_call & c, ggml_tensor * dst, uint32_t i_layer) const;
    void attend_hot   (attend_call & c, uint32_t h0, uint32_t n_heads, uint32_t i_part) const;
    void attend_cold  (attend_call & c, uint32_t i_head, uint32_t i_part) const;
    void attend_scores(attend_call & c, uint32_t i_head, int & pattern) const;
    void attend_slots (attend_call & c, uint32_t i_head, int & pattern, size_t i, uint32_t n) const;
    void attend_result(attend_call & c, uint32_t i_head, uint32_t i_part) const;

    const uint8_t * slot_data(uint32_t i_layer, const slot_ref & s) const;

    // returns their number
    int blobs_in_use(uint32_t i_layer, ggml_tensor ** blobs) const;

    bool can_attend(const llm_graph_context & g, uint32_t i_layer, const ggml_tensor * q, const ggml_tensor * kq_b, const ggml_tensor * sinks) const;

    ggml_tensor * build_attend(const llm_graph_context & g, uint32_t i_layer, ggml_tensor * q, ggml_tensor * k, ggml_tensor * v,
            ggml_tensor * mask, ggml_tensor * mask_cold, float kq_scale);

    // llama-capsule-op.cpp

    bool op_available(uint32_t i_layer) const; // asks the device
    void init_op_weights(uint32_t i_layer);

    ggml_capsule_params op_params(uint32_t i_layer) const;
    bool                op_wants_views(uint32_t i_layer) const;
    ggml_tensor *       op_rope  (const llm_graph_context & g, llm_graph_input_capsule & inp, uint32_t i_layer) const;

    bool can_op_attend(const llm_graph_context & g, uint32_t i_layer, const ggml_tensor * q, const ggml_tensor * kq_b, const ggml_tensor * sinks) const;

    ggml_tensor * build_op_attend(const llm_graph_context & g, llm_graph_input_capsule & inp, uint32_t i_layer, ggml_tensor * q, ggml_tensor * k, ggml_tensor * v,
            ggml_tensor * mask, float kq_scale) const;

    // llama-capsule-op-encode.cpp: encode_layer() on the device; returns how many layers from i_layer on are done, 0 if the host has to
    uint32_t op_encode(const std::vector<block *> & blocks, uint32_t i_layer, llama_capsule_kv::reader & reader) const;

    struct op_batch;
    struct op_graph;

    void op_encode_blocks (const std::vector<block *> & blocks, op_graph & g) const;
    bool op_encode_build  (ggml_backend_t backend, uint32_t i_layer, llama_capsule_kv::reader & reader, op_graph & g) const;
    bool op_encode_compute(ggml_backend_t backend, ggml_backend_buffer_type_t buft, op_graph & g) const;
    void op_encode_finish (uint32_t i_layer, const op_batch & batch, const std::array<ggml_tensor *, 2> & sums, llama_capsule_kv::reader & reader) const;

    ggml_tensor * op_encode_angles(uint32_t i_layer, int i_pool, llama_capsule_kv::reader & reader, op_graph & g) const;

    void build_op_unpack(const llm_graph_context & g, llm_graph_input_capsule & inp, uint32_t i_layer, ggml_tensor * k_cold, ggml_tensor * v_cold) const;

    // where a graph is built, and what it writes to
    struct build_args {
        ggml_context * ctx;
        ggml_cgraph  * gf;

        const llama_cparams & cparams;

        uint32_t i_layer;

        ggml_backend_sched_t sched; // nullptr if nothing is computed
        ggml_backend_t       backend_cpu;

        ggml_tensor * k_cold; // the columns of the slots in the scratch
        ggml_tensor * v_cold;
        ggml_tensor * pos;
        ggml_tensor * k_rot;
        ggml_tensor * v_rot;
    };

    void build_unpack     (const build_args & a) const;
    void build_reconstruct(const build_args & a) const;

    // n_slots slots from i_slot on, to columns from col on
    void build_chunk(const build_args & a, int ip, const pool_layer & slots, uint32_t i_slot, uint32_t n_slots, int64_t col, int64_t i_pos) const;

    void build_copy(const build_args & a, ggml_tensor * src, ggml_tensor * dst) const;

    ggml_tensor * build_rows(ggml_context * ctx, const scratch & s, const std::array<pool_layer::plane, LLAMA_CAPSULE_N_TYPES> & planes,
            const llama_capsule_row_counts & counts, uint32_t i_slot, uint32_t n_slots, ggml_tensor * rot) const;
    ggml_tensor * build_pca(ggml_context * ctx, ggml_tensor * rows, const weights_part & w, uint32_t n_slots, bool trans) const;
    ggml_tensor * build_retain(ggml_context * ctx, ggml_tensor * rows, uint32_t i_layer, uint32_t n_slots) const;

    friend class llm_graph_input_capsule;
};
