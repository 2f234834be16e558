#include "llama-capsule.h"

#include "capsule/api/create.h"
#include "capsule/model/binding.h"
#include "capsule/model/kv.h"
#include "capsule/model/resolve.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-kv-cache.h"
#include "llama-model.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <tuple>

struct llama_capsule {
    llama_capsule_tables_ptr tables;
};

// what the context that is being created gets
struct capsule_request {
    llama_capsule_tables_ptr tables;

    uint32_t n_hot;
    uint32_t image_tokens;
    float    quality;
    float    ratio;
    bool     auto_compress;

    llama_capsule_image_attention image_attention;
};

static thread_local std::optional<capsule_request> capsule_next;
static thread_local std::string                    capsule_error;

static void capsule_set_error(const std::string & what) {
    capsule_error = what;
    std::replace(capsule_error.begin(), capsule_error.end(), '\n', ' ');

    LLAMA_LOG_ERROR("%s\n", capsule_error.c_str());
}

static llama_capsule_memory * capsule_get(const llama_context & lctx) {
    auto * kv = llama_capsule_find_kv(lctx.get_memory());

    return kv ? kv->capsule.get() : nullptr;
}

//
// creation
//

static void capsule_check_request(const capsule_request & req) {
    if (!std::isfinite(req.quality) || req.quality < 0.0f) {
        throw std::runtime_error("the quality is not a positive number");
    }
    if (!(req.ratio <= 1.0f) || !std::isfinite(req.ratio)) { // a lossless tier saves less than nothing
        throw std::runtime_error("the ratio is not a number of at most 1");
    }
    if (req.quality > 0.0f && req.ratio > 0.0f) {
        throw std::runtime_error("a quality and a ratio are given: a ratio is one tier for everything, so give one of them");
    }
    const float largest = 1.0f - 1.0f/req.tables->smaller[0];
    if (req.ratio > std::max(0.0f, largest + 0.005f)) { // the names of tiers are rounded
        throw std::runtime_error(format("the ratio %.3f is above the largest of this capsule, %.3f (%.2f times smaller)", req.ratio, largest, req.tables->smaller[0]));
    }
}

// for programs that know nothing of capsules: LLAMA_KVCAPSULE=auto|FILE, _HOT=N, _IMAGE_TOKENS=N, _QUALITY=Q or _RATIO=R,
//   _IMAGE_ATTENTION=auto|full
static std::optional<capsule_request> capsule_request_from_env(const llama_model & model) {
    const char * path = getenv("LLAMA_KVCAPSULE");
    if (!path || !*path) {
        return {};
    }

    auto number = [](const char * name, double most) {
        const char * value = getenv(name);
        if (!value || !*value) {
            return 0.0;
        }
        char * end = nullptr;
        const double number = strtod(value, &end);
        if (*end || !(number > 0.0 && number <= most)) {
            throw std::runtime_error(format("%s=%s is not a number above 0 and up to %g", name, value, most));
        }
        return number;
    };

    const char * attention = getenv("LLAMA_KVCAPSULE_IMAGE_ATTENTION");
    if (attention && *attention && strcmp(attention, "auto") != 0 && strcmp(attention, "full") != 0) {
        throw std::runtime_error(format("LLAMA_KVCAPSULE_IMAGE_ATTENTION=%s is neither auto nor full", attention));
    }

    capsule_request res = {
        nullptr,
        (uint32_t) number("LLAMA_KVCAPSULE_HOT", 1 << 30),
        (uint32_t) number("LLAMA_KVCAPSULE_IMAGE_TOKENS", 1 << 20),
        (float) number("LLAMA_KVCAPSULE_QUALITY", 100),
        (float) number("LLAMA_KVCAPSULE_RATIO", 1),
        true,
        attention && strcmp(attention, "auto") == 0 ? LLAMA_CAPSULE_IMAGE_ATTENTION_AUTO : LLAMA_CAPSULE_IMAGE_ATTENTION_FULL,
    };

    try {
        res.tables = strcmp(path, "auto") == 0 ? llama_capsule_tables_builtin(model) : llama_capsule_tables_load(model, path);
    } catch (const llama_capsule_mismatch & err) {
        // draft and embedding models live in the same process
        LLAMA_LOG_INFO("%s: %s, continuing without it\n", __func__, err.what());
        return {};
    }

    capsule_check_request(res);

    return res;
}

void llama_capsule_refuse(const std::string & reason) {
    capsule_error = "can not attach the capsule: " + reason;

    throw std::runtime_error(capsule_error);
}

// cells that the memory is created with, before llama_capsule_kv::init()
static uint32_t capsule_n_first(const llama_hparams & hparams, const llama_cparams & cparams) {
    // the cache of the layers with a sliding window is never larger than the other, see llama_kv_cache_iswa
    const uint32_t n = hparams.is_swa_any() ? hparams.n_swa*cparams.n_seq_max + cparams.n_ubatch : 1;

    return std::min(cparams.n_ctx_seq, GGML_PAD(n, 256));
}

// logical cells -> cells of the hot cache, to begin with
static uint32_t capsule_n_hot(const capsule_request & req, const llama_cparams & cparams) {
    const uint32_t n_ctx   = cparams.n_ctx_seq;
    const uint32_t n_image = 4096; // also with smaller ones: text needs the room that they leave

    const uint32_t n_hot = std::min(n_ctx, req.n_hot > 0 ? req.n_hot : n_image + std::max(2048u, n_ctx/4));

    return std::min(n_ctx, GGML_PAD(n_hot, 256));
}

// "" if they fit
static std::string capsule_check_layers(const std::vector<llama_capsule_tables::layer> & layers, const llama_kv_cache & kv) {
    const auto ids = kv.get_layer_ids();

    if (ids.size() != layers.size()) {
        return "the capsule does not cover all layers of the KV cache";
    }
    for (size_t i = 0; i < ids.size(); ++i) {
        const auto & layer = layers[i];
        if (ids[i] != layer.il) {
            return "the capsule does not cover all layers of the KV cache";
        }
        if (layer.n_embd_head_k != layers[0].n_embd_head_k || layer.n_embd_head_v != layers[0].n_embd_head_v) {
            return "head sizes that differ between the layers with full attention are not supported";
        }
    }
    return "";
}

// returns what it attaches, for the log
static std::string capsule_attach(llama_context & lctx, llama_kv_cache & kv, const capsule_request & req) {
    const auto & tables = req.tables;

    const bool  by_ratio = req.ratio > 0.0f;
    const float quality  = req.quality > 0.0f ? req.quality : tables->quality;

    const int32_t i_tier = by_ratio ? (int32_t) tables->tier_for_ratio(req.ratio) : -1;

    const uint32_t n_hot = capsule_n_hot(req, lctx.get_cparams());

    kv.capsule = llama_capsule_cache_create(lctx, kv, { tables, n_hot, quality, i_tier, req.image_tokens, req.auto_compress, req.image_attention });

    const std::string name = tables->builtin ? "the built-in capsule" : "capsule '" + tables->path + "'";
    if (by_ratio) {
        return name + format(", %.2f times smaller", tables->smaller[i_tier]);
    }
    return name + format(", quality %.2f (%.2f to %.2f times smaller)", quality, tables->smaller[tables->i_tier_first], tables->smaller.back());
}

llama_memory_i * llama_capsule_create_memory(llama_context & lctx, const llama_memory_params & params) {
    const auto & model   = lctx.get_model();
    const auto & cparams = lctx.get_cparams();

    // a dry run that measures memory has no tensors to compare with the capsule
    if (model.hparams.no_alloc) {
        return model.create_memory(params, cparams);
    }

    const bool from_env = !capsule_next;

    auto req = from_env ? capsule_request_from_env(model) : std::move(capsule_next);
    capsule_next.reset();

    // a draft that reads the cells of another context; others have cells of their own, and what they are given has seen the images
    if (model.arch == LLM_ARCH_GEMMA4_ASSISTANT && cparams.ctx_other && capsule_get(*cparams.ctx_other)) {
        LLAMA_LOG_WARN("%s: this context shares the cells of one with a capsule: it does not see compressed images, so fewer drafts are accepted\n", __func__);
    }

    if (!req) {
        return model.create_memory(params, cparams);
    }

    if (!from_env) {
        try {
            llama_capsule_check_model(*req->tables, model);
        } catch (const llama_capsule_mismatch & err) {
            llama_capsule_refuse(err.what());
        }
    }

    // note: not cparams itself, the choice of the RoPE factors depends on it
    auto cparams_hot = cparams;
    cparams_hot.n_ctx_seq = capsule_n_first(model.hparams, cparams);

    auto params_hot = params;
    params_hot.swa_full = false;

    std::unique_ptr<llama_memory_i> memory(model.create_memory(params_hot, cparams_hot));

    std::string reason;

    auto * kv = llama_capsule_resolve(lctx, memory.get(), reason);
    if (kv) {
        reason = capsule_check_layers(req->tables->layers, *kv);
    }

    if (!reason.empty()) {
        if (!from_env) {
            llama_capsule_refuse(reason);
        }
        LLAMA_LOG_WARN("%s: can not attach the capsule: %s, continuing without it\n", __func__, reason.c_str());

        memory.reset();
        return model.create_memory(params, cparams);
    }

    const bool other_layers = kv != (llama_memory_i *) memory.get();
    if (req->image_attention != LLAMA_CAPSULE_IMAGE_ATTENTION_FULL && (other_layers || model.hparams.f_max_alibi_bias > 0.0f)) {
        LLAMA_LOG_WARN("%s: image attention is full: a model with %s is read so\n", __func__, other_layers ? "layers of other kinds" : "ALiBi");
        req->image_attention = LLAMA_CAPSULE_IMAGE_ATTENTION_FULL;
    }

    const std::string what = capsule_attach(lctx, *kv, *req);

    LLAMA_LOG_INFO("%s: %s, %u hot cells of %u, which grow when text needs it\n", __func__, what.c_str(), kv->get_size(), cparams.n_ctx_seq);
    if (params.swa_full && model.hparams.is_swa_any()) {
        LLAMA_LOG_INFO("%s: swa_full is off with a capsule: layers with a sliding window keep the cells of their window only\n", __func__);
    }

    return memory.release();
}

//
// hooks
//

bool llama_capsule_state_check(const llama_capsule_memory * memory, uint32_t & n_stream) {
    const bool res = (n_stream & LLAMA_CAPSULE_STATE_FLAG) != 0;

    n_stream &= ~LLAMA_CAPSULE_STATE_FLAG;

    if (res && !memory) {
        throw std::runtime_error("the state holds images in capsule slots, but no capsule is attached");
    }

    return res;
}

void llama_capsule_decode_begin(llama_context & lctx, const llama_batch_ext & batch) {
    if (auto * capsule = capsule_get(lctx)) {
        capsule->decode_begin(batch);
    }
}

void llama_capsule_decode_end(llama_context & lctx, const llama_batch_ext & batch) {
    if (auto * capsule = capsule_get(lctx)) {
        capsule->decode_end(batch);
    }
}

bool llama_capsule_make_room(llama_context & lctx, const llama_batch_ext & batch) {
    auto * capsule = capsule_get(lctx);

    return capsule && capsule->make_room(batch);
}

uint32_t llama_capsule_graph_nodes(const llama_context & lctx) {
    const auto * capsule = capsule_get(lctx);

    return capsule ? capsule->graph_nodes() : 0;
}

void llama_capsule_check_layers(const llama_context & lctx) {
    if (const auto * capsule = capsule_get(lctx)) {
        capsule->check_layers();
    }
}

//
// C API
//

// calls fn, exceptions become last_error and -1
template<typename F>
static int32_t capsule_call(F fn) {
    capsule_error.clear();

    try {
        return fn();
    } catch (const std::exception & err) {
        capsule_set_error(err.what());
    }

    return -1;
}

// calls fn, exceptions become last_error and nullptr
template<typename F>
static llama_capsule * capsule_make(F fn) {
    capsule_error.clear();

    try {
        return new llama_capsule(fn());
    } catch (const std::exception & err) {
        capsule_set_error(err.what());
    }

    return nullptr;
}

struct llama_capsule * llama_capsule_load_from_file(const struct llama_model * model, const char * path) {
    return capsule_make([&]() { return llama_capsule { llama_capsule_tables_load(*model, path) }; });
}

struct llama_capsule * llama_capsule_init_default(const struct llama_model * model) {
    return capsule_make([&]() { return llama_capsule { llama_capsule_tables_builtin(*model) }; });
}

void llama_capsule_free(struct llama_capsule * capsule) {
    delete capsule;
}

struct llama_capsule_context_params llama_capsule_context_default_params(void) {
    return {
        /*.size          =*/ sizeof(llama_capsule_context_params),
        /*.capsule       =*/ nullptr,
        /*.n_hot         =*/ 0,
        /*.image_tokens  =*/ 0,
        /*.quality       =*/ 0.0f,
        /*.ratio         =*/ 0.0f,
        /*.auto_compress =*/ true,
        /*.image_attention =*/ LLAMA_CAPSULE_IMAGE_ATTENTION_FULL,
    };
}

struct llama_context * llama_capsule_init_from_model(
                 struct llama_model * model,
        struct llama_context_params   params,
        struct llama_capsule_context_params capsule_params) {
    capsule_error.clear();

    if (capsule_params.size != sizeof(capsule_params)) {
        capsule_set_error(format("llama_capsule_context_params has %zu bytes here and %zu in the program: it was built for another version", sizeof(capsule_params), capsule_params.size));
        return nullptr;
    }

    llama_context * res = nullptr;
    try {
        if (capsule_params.capsule) {
            const auto & p = capsule_params;
            capsule_next = { p.capsule->tables, p.n_hot, p.image_tokens, p.quality, p.ratio, p.auto_compress, p.image_attention };
            capsule_check_request(*capsule_next);
        }
        res = llama_init_from_model(model, params);
    } catch (const std::exception & err) {
        capsule_set_error(err.what());
    }
    capsule_next.reset();

    if (!res && capsule_error.empty()) {
        capsule_set_error("the context can not be created, the log says why");
    }

    return res;
}

bool llama_capsule_is_attached(const struct llama_context * ctx) {
    return capsule_get(*ctx) != nullptr;
}

int32_t llama_capsule_compress(struct llama_context * ctx, llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    capsule_error.clear();

    auto * capsule = capsule_get(*ctx);
    if (!capsule) {
        capsule_set_error("no capsule is attached to this context");
        return -1;
    }
    if (seq_id < 0 || seq_id >= LLAMA_MAX_SEQ || p0 < 0 || p1 < p0) {
        capsule_set_error(format("bad range to compress: sequence %d, positions [%d, %d)", seq_id, p0, p1));
        return -1;
    }

    return capsule_call([&]() { return (int32_t) capsule->compress(seq_id, p0, p1); });
}

int32_t llama_capsule_get_stats(const struct llama_context * ctx, struct llama_capsule_stats * stats) {
    const auto * capsule = capsule_get(*ctx);

    if (!capsule || stats->size != sizeof(*stats)) {
        return -1;
    }

    *stats = {};
    stats->size = sizeof(*stats);
    capsule->get_stats(*stats);

    return 0;
}

static int32_t capsule_read_kv(
        struct llama_context * ctx,
                llama_seq_id   seq_id,
                   llama_pos   p0,
                   llama_pos   p1,
                     int32_t   il,
                     float   * k,
                     float   * v,
                    uint32_t   n_max) {
    const auto & hparams = ctx->get_model().hparams;

    std::string reason;

    auto * kv = llama_capsule_resolve(*ctx, ctx->get_memory(), reason);
    if (!kv) {
        capsule_set_error(reason);
        return -1;
    }

    const auto ids = kv->get_layer_ids();
    if (seq_id < 0 || seq_id >= LLAMA_MAX_SEQ || std::find(ids.begin(), ids.end(), (uint32_t) il) == ids.end()) {
        capsule_set_error(format("no sequence %d or no KV in layer %d", seq_id, il));
        return -1;
    }

    ctx->synchronize();
    ctx->memory_update(false);

    const llama_capsule_kv hot(*ctx, *kv);

    const auto idxs = hot.find(seq_id, p0, p1);

    // with a capsule: the slots, decoded
    std::vector<llama_capsule_memory::token> cold;
    if (kv->capsule) {
        cold = kv->capsule->read(seq_id, p0, p1, il);
    }

    const size_t n = idxs.size() + cold.size();
    if (n > n_max) {
        capsule_set_error(format("%zu tokens in the range, room for %u", n, n_max));
        return -1;
    }

    const size_t n_k = hparams.n_embd_k_gqa(il);
    const size_t n_v = hparams.n_embd_v_gqa(il);

    std::vector<float> kh(k ? idxs.size()*n_k : 0);
    std::vector<float> vh(v ? idxs.size()*n_v : 0);

    llama_capsule_kv::reader reader(hot, idxs);
    reader.load(il, llama_capsule_layer_rope(ctx->get_model(), il), k, v);

    for (uint32_t h = 0; h < hparams.n_head_kv(il); ++h) {
        if (k) {
            reader.read_k(h, 0, idxs.size(), kh.data() + h*hparams.n_embd_head_k(il), n_k);
        }
        if (v) {
            reader.read_v(h, 0, idxs.size(), vh.data() + h*hparams.n_embd_head_v(il), n_v);
        }
    }

    const auto & cells = kv->get_cells(seq_id);
    for (size_t i = 0; i < idxs.size(); ++i) {
        const auto & ext = cells.ext_get(idxs[i]);

        llama_capsule_memory::token token = { cells.pos_get(idxs[i]), ext.y, ext.x, {}, {} };
        if (k) {
            token.k.assign(kh.begin() + i*n_k, kh.begin() + (i + 1)*n_k);
        }
        if (v) {
            token.v.assign(vh.begin() + i*n_v, vh.begin() + (i + 1)*n_v);
        }
        cold.push_back(std::move(token));
    }

    std::stable_sort(cold.begin(), cold.end(), [](const auto & a, const auto & b) {
        return std::tie(a.pos, a.y, a.x) < std::tie(b.pos, b.y, b.x);
    });

    for (size_t i = 0; i < n; ++i) {
        if (k) {
            std::copy(cold[i].k.begin(), cold[i].k.end(), k + i*n_k);
        }
        if (v) {
            std::copy(cold[i].v.begin(), cold[i].v.end(), v + i*n_v);
        }
    }

    return n;
}

int32_t llama_capsule_read_kv(
        struct llama_context * ctx,
                llama_seq_id   seq_id,
                   llama_pos   p0,
                   llama_pos   p1,
                     int32_t   il,
                     float   * k,
                     float   * v,
                    uint32_t   n_max) {
    return capsule_call([&]() { return capsule_read_kv(ctx, seq_id, p0, p1, il, k, v, n_max); });
}

int32_t llama_capsule_layer_shape(const struct llama_model * model, int32_t il, int32_t * shape) {
    const auto & hparams = model->hparams;

    if (il < 0 || (uint32_t) il >= hparams.n_layer()) {
        return -1;
    }

    const bool has_kv = hparams.has_kv(il) && !hparams.is_recr(il) && hparams.n_head_kv(il) > 0;

    shape[0] = has_kv ? hparams.n_head_kv(il)     : 0;
    shape[1] = has_kv ? hparams.n_embd_head_k(il) : 0;
    shape[2] = has_kv ? hparams.n_embd_head_v(il) : 0;

    return 0;
}

int32_t llama_capsule_fingerprint(const struct llama_model * model, char * buf, size_t buf_size) {
    return capsule_call([&]() {
        const std::string res = llama_capsule_model_fingerprint(*model);

        if (buf_size < res.size() + 1) {
            throw std::runtime_error("a fingerprint has 64 digits and a 0 behind them");
        }

        memcpy(buf, res.c_str(), res.size() + 1);
        return 0;
    });
}

const char * llama_capsule_last_error(void) {
    return capsule_error.c_str();
}
