#include "capsule/api/cache.h"

#include "llama-batch.h"
#include "llama-capsule.h"
#include "llama-context.h"
#include "llama-impl.h"
#include "llama-io.h"
#include "llama-model.h"

#include <algorithm>
#include <limits>

#ifdef __GLIBC__
#include <malloc.h>
#endif

static constexpr size_t CAPSULE_NODE_BYTES  = 64*sizeof(ggml_tensor); // of a scheduler and its graph, for each node, see ggml_backend_sched_new()
static constexpr size_t CAPSULE_MASK_BYTES  = 8; // of the inputs of a graph while they are made, for each cold cell and token
static constexpr size_t CAPSULE_SPARE_BYTES = 16*1024*1024;

// memory that nobody checks when it is asked for: is there any?
static bool capsule_has_memory(size_t n_bytes) {
    return ggml_backend_buffer_ptr(ggml_backend_buft_alloc_buffer(ggml_backend_cpu_buffer_type(), n_bytes + CAPSULE_SPARE_BYTES)) != nullptr;
}

std::shared_ptr<llama_capsule_memory> llama_capsule_cache_create(llama_context & lctx, llama_kv_cache & kv, const llama_capsule_cache_params & params) {
    return std::make_shared<llama_capsule_cache>(lctx, kv, params);
}

llama_capsule_cache::llama_capsule_cache(llama_context & lctx, llama_kv_cache & kv, const llama_capsule_cache_params & params) :
    lctx(lctx), p(params), hot(lctx, kv),
    forms(p.tables),
    slots(p.tables->layers.size(), lctx.get_cparams().n_ctx_seq,
        [this](uint32_t i_layer, const llama_capsule_slot & s) -> uint32_t {
            return (forms.get(i_layer, forms.find(s.i_tier, s.h, s.w)).size + LLAMA_CAPSULE_UNIT - 1)/LLAMA_CAPSULE_UNIT;
        },
        [this](uint32_t i_layer) { return graph->pool_buft(i_layer); }),
    encoder(lctx, hot, threads, p.tables, forms, { p.quality, p.i_tier }),
    spans(hot.n_pos() > 1, p.image_tokens),
    graph(std::make_shared<llama_capsule_graph>(lctx, hot, forms, slots, llama_capsule_narrow(hot, slots, *p.tables, p.image_tokens, p.image_attention))) {
    if (!hot.init(p.n_hot)) {
        llama_capsule_refuse(format("no memory for %u hot cells", p.n_hot));
    }
}

//
// memory
//

void llama_capsule_cache::warn_alloc() {
    if (!warned_alloc) {
        LLAMA_LOG_WARN("%s: no room for more capsule slots (%.1f MiB in use): images stay in the hot KV cache\n", __func__,
            (slots.n_bytes_pools() + graph->n_bytes())/1024.0/1024.0);
        warned_alloc = true;
    }
}

void llama_capsule_cache::warn_broken() {
    if (!warned_broken) {
        LLAMA_LOG_WARN("%s: keys or values of an image are not finite or do not fit f16: such tiles stay in the hot KV cache\n", __func__);
        warned_broken = true;
    }
}

void llama_capsule_cache::memory_breakdown(std::map<ggml_backend_buffer_type_t, size_t> & res) const {
    slots.memory_breakdown(res);
    graph->memory_breakdown(res);
}

// at once: if the next decode came first, a lack of memory would end the process
bool llama_capsule_cache::reserve_graph(uint32_t n_slots, uint32_t n_cold) {
    if (n_cold > 0) { // without a slot there is no scratch
        if (!graph->reserve(n_cold)) {
            return false;
        }
        n_forms_reserved = forms.size();
    }

    const uint32_t n_tokens = std::min(lctx.get_cparams().n_ctx, lctx.get_cparams().n_ubatch);

    // of a new scheduler and its graph
    if (!capsule_has_memory(lctx.graph_max_nodes(n_tokens)*CAPSULE_NODE_BYTES)) {
        return false;
    }

    graph->plan(n_slots, n_cold);
    const bool res = lctx.capsule_reserve() && capsule_has_memory((size_t) n_cold*n_tokens*CAPSULE_MASK_BYTES);
    graph->plan(0, 0);

    n_slots_reserved = res ? n_slots : 0;
    n_cold_reserved  = res ? n_cold  : 0;

    return res;
}

static uint32_t capsule_n_tokens(const std::vector<llama_capsule_slot> & slots) {
    uint32_t res = 0;
    for (const auto & s : slots) {
        res += s.n_tokens();
    }
    return res;
}

bool llama_capsule_cache::has_room(const std::vector<llama_capsule_slot> & more) {
    if (slots.n_slots() + more.size() > n_slots_reserved || slots.n_cold() + capsule_n_tokens(more) > n_cold_reserved || !slots.fits(more)) {
        return false;
    }
    if (forms.size() > n_forms_reserved) {
        if (!graph->reserve(n_cold_reserved)) {
            return false;
        }
        n_forms_reserved = forms.size();
    }
    return true;
}

bool llama_capsule_cache::reserve(const std::vector<llama_capsule_slot> & more) {
    if (has_room(more)) {
        return true;
    }

    grown = true;

    const uint32_t n_slots_before = n_slots_reserved;
    const uint32_t n_cold_before  = n_cold_reserved;

    const uint32_t n_slots = slots.n_slots() + more.size();
    const uint32_t n_cold  = slots.n_cold()  + capsule_n_tokens(more);

    // half more than is needed, if there is memory for it: so that it is not needed often
    for (bool spare : { true, false }) {
        const auto commit = [&]() {
            return reserve_graph(spare ? n_slots + n_slots/2 : n_slots, spare ? n_cold + n_cold/2 : n_cold);
        };
        if (slots.fits(more) ? commit() : slots.grow(more, spare, commit)) {
            return true;
        }
    }

    // as it was; if even this fails, each graph allocates what it needs
    reserve_graph(n_slots_before, n_cold_before);

    return false;
}

bool llama_capsule_cache::grow_hot(uint64_t n_cells) {
    const uint64_t n_most = lctx.get_cparams().n_ctx_seq;
    const uint64_t n_now  = hot.size();

    if (n_cells <= n_now || n_cells > n_most || hot.is_shared()) {
        return false;
    }

    lctx.synchronize();
    lctx.memory_update(false);

    grown = true;

    const uint32_t n_slots = n_slots_reserved;
    const uint32_t n_cold  = n_cold_reserved;

    // half more than there is, if there is memory for it: so that it is not needed often
    for (uint64_t n : { std::max(n_cells, n_now + n_now/2), n_cells }) {
        try {
            if (hot.grow(std::min(n_most, GGML_PAD(n, 256)), [&]() { return reserve_graph(n_slots, n_cold); })) {
                LLAMA_LOG_INFO("%s: %u hot cells of %u, %.2f MiB\n", __func__, hot.size(), (uint32_t) n_most, hot.n_bytes()/1024.0/1024.0);
                return true;
            }
        } catch (const std::bad_alloc &) {
        }
    }

    // as it was; if even this fails, each graph allocates what it needs
    reserve_graph(n_slots, n_cold);

    return false;
}

//
// sequence operations
//

void llama_capsule_cache::clear() {
    slots.cells_mut().reset();
    slots.drop_empty();
    spans.clear();
}

template<typename F>
void llama_capsule_cache::for_cold(llama_seq_id seq_id, llama_pos p0, llama_pos p1, F fn) const {
    for (uint32_t i = 0; i < slots.n_slots(); ++i) {
        const auto & s = slots.slot(i);
        for (uint32_t j = s.first; j < s.first + s.n_tokens(); ++j) {
            if (slots.cells().pos_in(j, p0, p1) && (seq_id < 0 || slots.cells().seq_has(j, seq_id))) {
                fn(j);
            }
        }
    }
}

void llama_capsule_cache::seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    auto & cells = slots.cells_mut();

    for_cold(seq_id, p0, p1, [&](uint32_t i) {
        if (seq_id < 0) {
            cells.rm(i);
        } else {
            cells.seq_rm(i, seq_id);
        }
    });

    slots.drop_empty();
    spans.seq_rm(seq_id, p0, p1);
}

void llama_capsule_cache::seq_cp(llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1) {
    auto & cells = slots.cells_mut();

    for_cold(seq_id_src, p0, p1, [&](uint32_t i) {
        if (!cells.seq_has(i, seq_id_dst)) {
            cells.seq_add(i, seq_id_dst);
        }
    });

    spans.seq_cp(seq_id_src, seq_id_dst, p0, p1);
}

void llama_capsule_cache::seq_keep(llama_seq_id seq_id) {
    auto & cells = slots.cells_mut();

    for_cold(-1, 0, std::numeric_limits<llama_pos>::max(), [&](uint32_t i) { cells.seq_keep(i, seq_id); });

    slots.drop_empty();
    spans.seq_keep(seq_id);
}

void llama_capsule_cache::seq_add(llama_seq_id seq_id, llama_pos p0, llama_pos p1, llama_pos shift) {
    auto & cells = slots.cells_mut();

    for_cold(seq_id, p0, p1, [&](uint32_t i) { cells.pos_add(i, shift); });

    // RoPE is applied when the slot is read: there is no data to update
    cells.reset_shift();

    slots.drop_empty();
    spans.seq_add(seq_id, p0, p1, shift);
}

void llama_capsule_cache::seq_div(llama_seq_id seq_id, llama_pos p0, llama_pos p1, int d) {
    auto & cells = slots.cells_mut();

    for_cold(seq_id, p0, p1, [&](uint32_t i) { cells.pos_div(i, d); });

    cells.reset_shift();

    // the positions of an image mean nothing any more: it stays hot
    spans.seq_rm(seq_id, p0, p1);
}

llama_pos llama_capsule_cache::seq_pos_min(llama_seq_id seq_id, llama_pos pos_hot) const {
    const llama_pos pos = slots.cells().seq_pos_min(seq_id);

    return pos_hot < 0 ? pos : pos < 0 ? pos_hot : std::min(pos, pos_hot);
}

llama_pos llama_capsule_cache::seq_pos_max(llama_seq_id seq_id, llama_pos pos_hot) const {
    return std::max(pos_hot, slots.cells().seq_pos_max(seq_id));
}

//
// compression
//

// of one picture, or of what is left of it
uint32_t llama_capsule_cache::compress_image(std::vector<llama_capsule_cut> cuts) {
    const auto tiers = encoder.choose(cuts);

    if (std::count(tiers.begin(), tiers.end(), llama_capsule_encoder::BROKEN) > 0) {
        warn_broken();
    }

    std::vector<llama_capsule_slot> more;
    for (size_t i = 0; i < cuts.size(); ++i) {
        if (tiers[i] >= 0) {
            std::swap(cuts[more.size()], cuts[i]);
            more.push_back({ cuts[more.size()].h, cuts[more.size()].w, (uint8_t) tiers[i], 0, {} });
        }
    }

    if (!more.empty() && !reserve(more)) {
        warn_alloc();
    }
    while (!more.empty() && !has_room(more)) {
        more.pop_back();
    }
    cuts.resize(more.size());

    std::vector<uint32_t> i_slot;
    for (const auto & s : more) {
        i_slot.push_back(slots.add(s));
    }
    encoder.encode(cuts, i_slot, slots);

    // only now: nothing is lost on the way
    auto & cells = slots.cells_mut();

    uint32_t res = 0;
    for (size_t i = 0; i < cuts.size(); ++i) {
        uint32_t dst = slots.slot(i_slot[i]).first;
        for (uint32_t src : cuts[i].cells) {
            cells.pos_set(dst, hot.cells().pos_get(src));
            cells.ext_set(dst, hot.cells().ext_get(src));
            for (llama_seq_id s = 0; s < LLAMA_MAX_SEQ; ++s) {
                if (hot.cells().seq_has(src, s)) {
                    cells.seq_add(dst, s);
                }
            }
            ++dst;
        }
        hot.free(cuts[i].cells);
        res += cuts[i].cells.size();
    }

    return res;
}

uint32_t llama_capsule_cache::compress(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    lctx.synchronize();

    // after seq_add() the keys of a cell are still rotated for the old position
    lctx.memory_update(false);

    // any layer tells how wide a picture is
    const auto & layer = p.tables->layers[p.tables->layers.size()/2];

    uint32_t res = 0;
    for (auto & cuts : llama_capsule_cut_images(hot, seq_id, p0, p1, layer, p.image_tokens)) {
        try {
            res += compress_image(std::move(cuts));
        } catch (const std::bad_alloc &) {
            warn_alloc();
            slots.drop_empty(); // those that were not filled
        }
    }

    return res;
}

// audio and embeddings of text come as images do. With M-RoPE the tokens of an image share a position
bool llama_capsule_cache::is_image(llama_seq_id seq_id, const llama_capsule_spans::span & span) const {
    return hot.n_pos() == 1 || hot.find(seq_id, span.p0, span.p0 + 1).size() > 1;
}

uint32_t llama_capsule_cache::compress_closed() {
    uint32_t res = 0;
    for (const auto & [seq_id, span] : spans.take_closed()) {
        if (is_image(seq_id, span)) {
            res += compress(seq_id, span.p0, span.p1);
        }
    }
    return res;
}

// what an earlier lack of memory, a cut or a restored state left in the hot cells, but no image in the making
uint32_t llama_capsule_cache::compress_rest() {
    uint32_t res = 0;
    for (llama_seq_id s = 0; s < (llama_seq_id) hot.n_seq_max(); ++s) {
        res += compress(s, 0, spans.first(s));
    }
    return res;
}

void llama_capsule_cache::decode_begin(const llama_batch_ext & batch) {
    if (p.auto_compress) {
        spans.begin(batch);
        compress_closed();
    }
}

void llama_capsule_cache::decode_end(const llama_batch_ext & batch) {
    if (grown) {
        grown = false;
#ifdef __GLIBC__
        // the pools and the compute buffer were replaced by larger ones: give the old ones back to the system
        malloc_trim(0);
#endif
    }
    if (p.auto_compress) {
        spans.end(batch);
    }
}

bool llama_capsule_cache::make_room(const llama_batch_ext & batch) {
    if (p.auto_compress) {
        spans.close_for_room(batch);
        if (compress_closed() > 0 || compress_rest() > 0) {
            return true;
        }
    }

    llama_capsule_stats stats = {};
    get_stats(stats);

    const uint32_t n_ctx   = lctx.get_cparams().n_ctx_seq;
    const size_t   n_cells = stats.n_hot_used + batch.tokens.size();
    const bool     fits    = n_cells + stats.n_cold <= n_ctx;

    if (fits && grow_hot(n_cells)) {
        return true;
    }

    const char * what = !fits ? "use a larger context (-c) or a shorter conversation" :
        hot.is_shared() ? "they can not grow while another context reads them, use more from the start (--hot, LLAMA_KVCAPSULE_HOT)" : "there is no memory for more";

    LLAMA_LOG_WARN("%s: the hot KV cache is full: %u cells of %u, of them %u text and %u vision (%u vision tokens are in slots), %zu more do not fit: %s\n",
            __func__, stats.n_hot, n_ctx, stats.n_hot_used - stats.n_hot_vision, stats.n_hot_vision, stats.n_cold, batch.tokens.size(), what);

    return false;
}

//
// graph
//

ggml_tensor * llama_capsule_cache::build_attn(const llm_graph_context & g, const llama_capsule_attn & attn) {
    return graph->build_attn(g, attn);
}

uint32_t llama_capsule_cache::graph_nodes() const {
    return graph->graph_nodes();
}

void llama_capsule_cache::check_layers() const {
    graph->check_layers();
}

//
// info
//

void llama_capsule_cache::get_stats(llama_capsule_stats & stats) const {
    const auto & cells = hot.cells();

    stats.n_hot      = cells.size();
    stats.n_hot_used = cells.get_used();
    for (uint32_t i = 0; i < cells.size(); ++i) {
        if (!cells.is_empty(i) && cells.ext_get(i).tok == LLAMA_TOKEN_NULL) {
            stats.n_hot_vision++;
        }
    }

    stats.n_cold = slots.cells().get_used();

    stats.bytes_slots   = slots.n_bytes_used();
    stats.bytes_pools   = slots.n_bytes_pools();
    stats.bytes_scratch = graph->n_bytes();
    stats.bytes_hot     = hot.n_bytes();

    stats.n_tiers = p.tables->smaller.size();
    for (uint32_t t = 0; t < stats.n_tiers; ++t) {
        stats.smaller[t] = p.tables->smaller[t];
    }
    for (uint32_t i = 0; i < slots.n_slots(); ++i) {
        const auto & s = slots.slot(i);

        stats.n_slots_tier[s.i_tier]++;
        for (uint32_t j = s.first; j < s.first + s.n_tokens(); ++j) {
            stats.n_cold_tier[s.i_tier] += !slots.cells().is_empty(j);
        }
        for (uint32_t l = 0; l < slots.n_layer(); ++l) {
            stats.bytes_tier[s.i_tier] += (uint64_t) slots.size(l, i)*LLAMA_CAPSULE_UNIT;
        }
    }

    graph->get_stats(stats);

    for (const auto & layer : p.tables->layers) {
        stats.bytes_f16_token += layer.n_head_kv*(layer.n_embd_head_k + layer.n_embd_head_v)*sizeof(ggml_fp16_t);
    }
}
