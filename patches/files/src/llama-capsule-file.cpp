#include "llama-capsule-file.h"

#include "llama-capsule-grid.h"
#include "llama-capsule-sha256.h"
#include "llama-impl.h"

#include "ggml-cpp.h"
#include "gguf.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <set>

// limits
static constexpr uint64_t CAPSULE_MAX_FILE   = 1ull << 30; // of a sidecar
static constexpr uint64_t CAPSULE_MAX_KEYS   = 256;        // of a sidecar
static constexpr uint64_t CAPSULE_MAX_HEADER = 64ull << 20;

static constexpr uint32_t CAPSULE_MAX_HEADS      = 4096;
static constexpr uint32_t CAPSULE_MAX_NEIGHBOURS = 8;
static constexpr uint32_t CAPSULE_MAX_MLP        = 1024;

// what the hot cache can hold, and of a mean: what is added to it has to fit as well
static constexpr float CAPSULE_MAX_VALUE = 65504.0f;
static constexpr float CAPSULE_MAX_MEAN  = 8192.0f;

static constexpr char CAPSULE_INFIX[] = ".kvcapsule.";

// all keys of format v1
static const struct { const char * name; gguf_type type; bool is_array; } CAPSULE_KEYS[] = {
    { "kvcapsule.version",              GGUF_TYPE_UINT32,  false },
    { "kvcapsule.block_size",           GGUF_TYPE_UINT32,  false },
    { "kvcapsule.block_shape",          GGUF_TYPE_STRING,  false },
    { "kvcapsule.block_width",          GGUF_TYPE_UINT32,  false },
    { "kvcapsule.image_tokens",         GGUF_TYPE_UINT32,  false },
    { "kvcapsule.layers",               GGUF_TYPE_UINT32,  true  },
    { "kvcapsule.layer_rope",           GGUF_TYPE_BOOL,    true  },
    { "kvcapsule.base.architecture",    GGUF_TYPE_STRING,  false },
    { "kvcapsule.base.block_count",     GGUF_TYPE_UINT32,  false },
    { "kvcapsule.base.head_count_kv",   GGUF_TYPE_UINT32,  true  },
    { "kvcapsule.base.key_length",      GGUF_TYPE_UINT32,  true  },
    { "kvcapsule.base.value_length",    GGUF_TYPE_UINT32,  true  },
    { "kvcapsule.base.rope.type",       GGUF_TYPE_STRING,  false },
    { "kvcapsule.base.rope.sections",   GGUF_TYPE_UINT32,  true  },
    { "kvcapsule.base.rope.freq_base",  GGUF_TYPE_FLOAT32, true  },
    { "kvcapsule.base.fingerprint",     GGUF_TYPE_STRING,  false },
    { "kvcapsule.mlp_width",            GGUF_TYPE_UINT32,  true  },
    { "kvcapsule.kept_count",           GGUF_TYPE_UINT32,  true  },
    { "kvcapsule.neighbour_count",      GGUF_TYPE_UINT32,  false },
    { "kvcapsule.token_order",          GGUF_TYPE_UINT16,  true  },
    { "kvcapsule.tier.name",            GGUF_TYPE_STRING,  true  },
    { "kvcapsule.tier.ratio",           GGUF_TYPE_FLOAT32, true  },
    { "kvcapsule.tier.key_codec",       GGUF_TYPE_UINT32,  true  },
    { "kvcapsule.tier.key_rows",        GGUF_TYPE_UINT32,  true  },
    { "kvcapsule.tier.value_rows",      GGUF_TYPE_UINT32,  true  },
    { "kvcapsule.tier.kappa",           GGUF_TYPE_FLOAT32, true  },
    { "kvcapsule.default_ratio",        GGUF_TYPE_FLOAT32, false },
};

[[noreturn]] static void fail(const std::string & reason) {
    throw std::runtime_error(reason);
}

static void need(bool ok, const std::string & reason) {
    if (!ok) {
        fail(reason);
    }
}

struct capsule_reader {
    llama_capsule_source & source;

    llama_capsule_header header;
    llama_capsule_data & data;

    gguf_context_ptr gguf; // values of the keys

    std::set<std::string> used; // names of the tensors that were read

    capsule_reader(llama_capsule_source & source, llama_capsule_data & data) : source(source), header(source), data(data) {}

    bool is_sidecar() const {
        return header.keys.count("adapter.type") > 0;
    }

    //
    // keys
    //

    bool is_string(const char * key) const {
        const auto it = header.keys.find(key);
        return it != header.keys.end() && it->second.type == GGUF_TYPE_STRING && !it->second.is_array;
    }

    int64_t find(const std::string & key) const {
        return gguf_find_key(gguf.get(), key.c_str());
    }

    std::string get_str(const std::string & key) const {
        return gguf_get_val_str(gguf.get(), find(key));
    }

    uint32_t get_u32(const std::string & key) const {
        return gguf_get_val_u32(gguf.get(), find(key));
    }

    size_t get_n(const std::string & key) const {
        return header.keys.at(key).n;
    }

    void need_n(const std::string & key, size_t n) const {
        need(get_n(key) == n, format("key %s has %zu elements, not %zu", key.c_str(), get_n(key), n));
    }

    template<typename T>
    std::vector<T> get_arr(const std::string & key, size_t n) const {
        need_n(key, n);
        const auto * data = (const T *) gguf_get_arr_data(gguf.get(), find(key));
        return std::vector<T>(data, data + n);
    }

    void check_keys();
    void read_keys();
    void read_layers();
    void read_tiers();
    void check_ratios() const;

    llama_capsule_row_counts row_counts(const uint32_t * counts, uint32_t d, const std::string & what) const;

    //
    // tensors
    //

    std::vector<uint8_t> read_tensor(const std::string & name, ggml_type type, const std::array<int64_t, 4> & ne);
    std::vector<float>   read_floats(const std::string & name, ggml_type type, const std::array<int64_t, 4> & ne);

    void read_tensors();
    void read_retain (llama_capsule_data::layer & layer);

    uint64_t content_id() const;
};

void capsule_reader::check_keys() {
    if (is_sidecar()) {
        need(source.size() <= CAPSULE_MAX_FILE, format("the file has %llu bytes, more than 1 GiB", (unsigned long long) source.size()));
        need(header.n_keys <= CAPSULE_MAX_KEYS, format("%llu keys, more than %llu", (unsigned long long) header.n_keys, (unsigned long long) CAPSULE_MAX_KEYS));
        need(header.foreign.empty(), "unknown key " + header.foreign);
    }
    need(header.keys.count("kvcapsule.version") > 0, "not a capsule: key kvcapsule.version is missing");
    need(header.n_end <= CAPSULE_MAX_HEADER, "a header of more than 64 MiB");

    std::vector<uint8_t> buf(header.n_data);
    source.read(0, buf.data(), std::min(header.n_data, source.size()));

    const gguf_init_params params = { /* .no_alloc = */ true, /* .ctx = */ nullptr };

    gguf.reset(gguf_init_from_buffer(buf.data(), buf.size(), params));
    need(gguf != nullptr, "ggml does not read its header");

    if (is_sidecar()) {
        for (const auto & [key, wanted] : { std::make_pair("general.type", "adapter"), std::make_pair("adapter.type", "kvcapsule") }) {
            need(is_string(key) && get_str(key) == wanted, format("not a capsule: key %s is not '%s'", key, wanted));
        }
    }

    std::set<std::string> known;

    for (const auto & [key, type, is_array] : CAPSULE_KEYS) {
        const auto it = header.keys.find(key);
        need(it != header.keys.end(), format("key %s is missing", key));

        const auto & k = it->second;
        need(k.type == type && k.is_array == is_array, format("key %s is %s%s, not %s%s", key,
                    k.is_array ? "an array of " : "", gguf_type_name(k.type), is_array ? "an array of " : "", gguf_type_name(type)));

        known.insert(key);

        if (it->first == "kvcapsule.version") {
            const uint32_t version = get_u32(key);
            need(version == 1, format("kvcapsule.version: format version %u, this program reads versions 1 and 2: update it", version));
        }
    }

    for (const auto & [key, k] : header.keys) {
        const bool own = key.compare(0, 10, "kvcapsule.") == 0 && key.compare(0, 16, "kvcapsule.train.") != 0;
        need(!own || known.count(key) > 0, "unknown key " + key);
    }

    if (is_sidecar()) {
        need(is_string("general.architecture") && get_str("general.architecture") == get_str("kvcapsule.base.architecture"),
                "general.architecture is not kvcapsule.base.architecture");
    }
}

void capsule_reader::read_keys() {
    data.block_size    = get_u32("kvcapsule.block_size");
    data.block_shape   = get_str("kvcapsule.block_shape");
    data.block_width   = get_u32("kvcapsule.block_width");
    data.image_tokens  = get_u32("kvcapsule.image_tokens");
    data.n_neighbours  = get_u32("kvcapsule.neighbour_count");
    data.default_ratio = gguf_get_val_f32(gguf.get(), find("kvcapsule.default_ratio"));

    const uint32_t N = data.block_size;

    need(N >= 8 && N <= 256, format("kvcapsule.block_size is %u, not in 8..256", N));
    need(data.block_shape == "raster" || data.block_shape == "tile", "kvcapsule.block_shape is not raster or tile");
    need(data.block_shape == "raster" || (data.block_width > 0 && N % data.block_width == 0),
            format("kvcapsule.block_width %u does not divide block_size %u", data.block_width, N));
    need(data.image_tokens % N == 0, format("kvcapsule.image_tokens %u is not a multiple of block_size %u", data.image_tokens, N));
    need(data.n_neighbours <= CAPSULE_MAX_NEIGHBOURS, format("kvcapsule.neighbour_count is %u, more than %u", data.n_neighbours, CAPSULE_MAX_NEIGHBOURS));
    need(std::isfinite(data.default_ratio) && data.default_ratio >= -8.0f && data.default_ratio <= 1.0f, "kvcapsule.default_ratio is not in -8..1");

    auto & base = data.model;

    base.architecture = get_str("kvcapsule.base.architecture");
    base.block_count  = get_u32("kvcapsule.base.block_count");
    base.rope_type    = get_str("kvcapsule.base.rope.type");
    base.fingerprint  = get_str("kvcapsule.base.fingerprint");

    const auto sections = get_arr<uint32_t>("kvcapsule.base.rope.sections", 4);
    std::copy(sections.begin(), sections.end(), base.rope_sections.begin());

    static const std::set<std::string> rope_types = { "none", "norm", "neox", "mrope", "imrope" };

    need(rope_types.count(base.rope_type) > 0, "kvcapsule.base.rope.type is not one of none, norm, neox, mrope, imrope");
    need(data.block_shape == "raster" || base.rope_type == "mrope" || base.rope_type == "imrope" || llama_capsule_square_side(data.image_tokens) > 0,
            format("kvcapsule.block_shape is tile, but neither the RoPE type %s nor image_tokens %u gives a grid", base.rope_type.c_str(), data.image_tokens));
    need(base.fingerprint.size() == 64 && base.fingerprint.find_first_not_of("0123456789abcdef") == std::string::npos,
            "kvcapsule.base.fingerprint is not 64 hex digits");
}

void capsule_reader::read_layers() {
    const size_t n = get_n("kvcapsule.layers");

    const uint32_t N = data.block_size;
    const uint32_t n_all = data.model.block_count;

    need(n >= 1 && n <= n_all, format("kvcapsule.layers has %zu layers of a model of %u", n, n_all));

    const auto layers    = get_arr<uint32_t>("kvcapsule.layers",              n);
    const auto rope      = get_arr<int8_t>  ("kvcapsule.layer_rope",          n);
    const auto n_head_kv = get_arr<uint32_t>("kvcapsule.base.head_count_kv",  n);
    const auto d_k       = get_arr<uint32_t>("kvcapsule.base.key_length",     n);
    const auto d_v       = get_arr<uint32_t>("kvcapsule.base.value_length",   n);
    const auto freq_base = get_arr<float>   ("kvcapsule.base.rope.freq_base", n);
    const auto n_mlp     = get_arr<uint32_t>("kvcapsule.mlp_width",           n);
    const auto n_kept    = get_arr<uint32_t>("kvcapsule.kept_count",          n);
    const auto order     = get_arr<uint16_t>("kvcapsule.token_order",         n*N);

    for (size_t i = 0; i < n; ++i) {
        const std::string at = format("of layer %u", layers[i]);

        need(i == 0 || layers[i] > layers[i - 1], "kvcapsule.layers does not ascend");
        need(layers[i] < n_all, format("kvcapsule.layers names layer %u of a model of %u", layers[i], n_all));
        need(n_head_kv[i] >= 1 && n_head_kv[i] <= CAPSULE_MAX_HEADS,     format("kvcapsule.base.head_count_kv %s is %u", at.c_str(), n_head_kv[i]));
        need(d_k[i]       >= 1 && d_k[i]       <= LLAMA_CAPSULE_MAX_HEAD_SIZE, format("kvcapsule.base.key_length %s is %u",    at.c_str(), d_k[i]));
        need(d_v[i]       >= 1 && d_v[i]       <= LLAMA_CAPSULE_MAX_HEAD_SIZE, format("kvcapsule.base.value_length %s is %u",  at.c_str(), d_v[i]));
        need(std::isfinite(freq_base[i]) && freq_base[i] >= 0.0f, "kvcapsule.base.rope.freq_base " + at + " is negative or not finite");
        need(n_kept[i] < N, format("kvcapsule.kept_count %s is %u in a block of %u", at.c_str(), n_kept[i], N));
        need(n_kept[i] == 0 || data.n_neighbours > 0, format("kvcapsule.kept_count %s is %u without neighbours", at.c_str(), n_kept[i]));
        need(n_mlp[i] <= CAPSULE_MAX_MLP, format("kvcapsule.mlp_width %s is %u, more than %u", at.c_str(), n_mlp[i], CAPSULE_MAX_MLP));
        need(n_mlp[i] == 0 || n_kept[i] > 0, format("kvcapsule.mlp_width %s is %u without kept tokens", at.c_str(), n_mlp[i]));

        llama_capsule_data::layer layer;

        layer.il            = layers[i];
        layer.rope          = rope[i] != 0;
        layer.n_head_kv     = n_head_kv[i];
        layer.n_embd_head_k = d_k[i];
        layer.n_embd_head_v = d_v[i];
        layer.freq_base     = freq_base[i];
        layer.n_kept        = n_kept[i];
        layer.n_mlp         = n_mlp[i];

        layer.token_order.assign(order.begin() + i*N, order.begin() + (i + 1)*N);

        std::vector<bool> seen(N, false);
        for (uint16_t t : layer.token_order) {
            need(t < N && !seen[t], format("kvcapsule.token_order %s is not a permutation of 0..%u", at.c_str(), N - 1));
            seen[t] = true;
        }

        data.layers.push_back(std::move(layer));
    }
}

llama_capsule_row_counts capsule_reader::row_counts(const uint32_t * counts, uint32_t d, const std::string & what) const {
    llama_capsule_row_counts res;

    uint64_t total = 0;
    for (int t = 0; t < LLAMA_CAPSULE_N_TYPES; ++t) {
        res[t] = counts[t];
        total += counts[t];
    }
    need(total >= 1 && total <= data.block_size, format("%s: %llu rows in a block of %u", what.c_str(), (unsigned long long) total, data.block_size));

    for (int t = 0; t < LLAMA_CAPSULE_N_TYPES; ++t) {
        const ggml_type type = LLAMA_CAPSULE_TYPES[t];
        need(counts[t] == 0 || d % ggml_blck_size(type) == 0, format("%s: type %s does not fit head size %u", what.c_str(), ggml_type_name(type), d));
    }

    return res;
}

void capsule_reader::read_tiers() {
    const size_t n_tiers  = get_n("kvcapsule.tier.name");
    const size_t n_layers = data.layers.size();

    need(n_tiers >= 2 && n_tiers <= 16, format("kvcapsule.tier.name has %zu tiers, not 2..16", n_tiers));

    const size_t n = n_tiers*n_layers;

    const auto ratio      = get_arr<float>   ("kvcapsule.tier.ratio",      n_tiers);
    const auto key_codec  = get_arr<uint32_t>("kvcapsule.tier.key_codec",  n);
    const auto key_rows   = get_arr<uint32_t>("kvcapsule.tier.key_rows",   n*LLAMA_CAPSULE_N_TYPES);
    const auto value_rows = get_arr<uint32_t>("kvcapsule.tier.value_rows", n*LLAMA_CAPSULE_N_TYPES);
    const auto kappa      = get_arr<float>   ("kvcapsule.tier.kappa",      n);

    data.tiers.resize(n_tiers);
    for (size_t it = 0; it < n_tiers; ++it) {
        auto & tier = data.tiers[it];

        tier.name  = gguf_get_arr_str(gguf.get(), find("kvcapsule.tier.name"), it);
        tier.ratio = ratio[it];

        need((tier.name == "faithful") == (it == 0), format("kvcapsule.tier.name of tier %zu is '%s'; tier 0, and no other, is 'faithful'", it, tier.name.c_str()));
        need(std::isfinite(tier.ratio) && tier.ratio >= -8.0f && tier.ratio <= 1.0f, format("kvcapsule.tier.ratio of tier %zu is not in -8..1", it));

        for (size_t l = 0; l < n_layers; ++l) {
            const auto & layer = data.layers[l];

            const size_t i = it*n_layers + l;

            const std::string at = format("of tier %zu, layer %u", it, layer.il);

            need(key_codec[i] <= 1, format("kvcapsule.tier.key_codec %s is %u, not 0 or 1", at.c_str(), key_codec[i]));
            need(std::isfinite(kappa[i]), "kvcapsule.tier.kappa " + at + " is not finite");

            llama_capsule_data::tier_layer tl;
            tl.key_codec  = (llama_capsule_key_codec) key_codec[i];
            tl.key_rows   = row_counts(&key_rows  [i*LLAMA_CAPSULE_N_TYPES], layer.n_embd_head_k, "kvcapsule.tier.key_rows "   + at);
            tl.value_rows = row_counts(&value_rows[i*LLAMA_CAPSULE_N_TYPES], layer.n_embd_head_v, "kvcapsule.tier.value_rows " + at);
            tl.kappa      = kappa[i];

            if (tl.key_codec == LLAMA_CAPSULE_KEY_CODEC_RETAIN) {
                need(layer.n_kept > 0, "kvcapsule.tier.key_codec " + at + " is retain, but the layer has no kept tokens");
                need(llama_capsule_rows_total(tl.key_rows) >= layer.n_kept,
                        format("kvcapsule.tier.key_rows %s: fewer rows than the %u kept tokens", at.c_str(), layer.n_kept));
            }

            tier.layers.push_back(tl);
        }
    }
}

void capsule_reader::check_ratios() const {
    uint64_t n_f16 = 0;
    for (const auto & layer : data.layers) {
        n_f16 += 2ull*data.block_size*layer.n_head_kv*(layer.n_embd_head_k + layer.n_embd_head_v);
    }

    for (size_t it = 0; it < data.tiers.size(); ++it) {
        const float  ratio = data.tiers[it].ratio;
        const double found = 1.0 - (double) data.bytes_slot(it)/(double) n_f16;

        need(fabs(found - ratio) <= 1e-3, format("kvcapsule.tier.ratio of tier %zu is %.4f, its rows give %.4f", it, ratio, found));
        need(it < 2 || ratio >= data.tiers[it - 1].ratio, "kvcapsule.tier.ratio does not ascend");
    }
}

// raw data of a tensor with exactly this type and shape
std::vector<uint8_t> capsule_reader::read_tensor(const std::string & name, ggml_type type, const std::array<int64_t, 4> & ne) {
    auto shape = [](const std::array<int64_t, 4> & ne) {
        return format("[%lld, %lld, %lld, %lld]", (long long) ne[0], (long long) ne[1], (long long) ne[2], (long long) ne[3]);
    };

    const auto * t = header.find(name);

    need(t != nullptr, "tensor " + name + " is missing");
    need(t->type == type, format("tensor %s has type %s, not %s", name.c_str(), ggml_type_name(t->type), ggml_type_name(type)));
    need(t->ne == ne, "tensor " + name + " has shape " + shape(t->ne) + ", not " + shape(ne));
    need(t->offset <= source.size() && t->size <= source.size() - t->offset, "tensor " + name + " reaches behind the end of the file, which is incomplete");

    used.insert(name);

    std::vector<uint8_t> res(t->size);
    source.read(t->offset, res.data(), res.size());

    return res;
}

// F32 or F16 tensor as floats
std::vector<float> capsule_reader::read_floats(const std::string & name, ggml_type type, const std::array<int64_t, 4> & ne) {
    const auto raw = read_tensor(name, type, ne);

    std::vector<float> res(raw.size()/ggml_type_size(type));
    if (type == GGML_TYPE_F32) {
        memcpy(res.data(), raw.data(), raw.size());
    } else {
        ggml_fp16_to_fp32_row((const ggml_fp16_t *) raw.data(), res.data(), res.size());
    }

    need(std::all_of(res.begin(), res.end(), [](float x) { return fabsf(x) <= CAPSULE_MAX_VALUE; }),
            "tensor " + name + " has values that are not finite or too large for f16");

    return res;
}

static void check_mean(const std::string & name, const std::vector<float> & mean) {
    need(std::all_of(mean.begin(), mean.end(), [](float x) { return fabsf(x) <= CAPSULE_MAX_MEAN; }),
            format("tensor %s has values beyond +-%.0f: keys and values could overflow f16", name.c_str(), CAPSULE_MAX_MEAN));
}

static void check_basis(const std::string & name, const std::vector<float> & basis, uint32_t N) {
    for (uint32_t r = 0; r < N; ++r) {
        double sum = 0.0;
        for (uint32_t t = 0; t < N; ++t) {
            sum += (double) basis[r*N + t]*basis[r*N + t];
        }
        need(fabs(sum - 1.0) <= 0.01, format("tensor %s has a row %u that is not a unit vector", name.c_str(), r));
    }
}

void capsule_reader::read_retain(llama_capsule_data::layer & layer) {
    const std::string prefix = format("blk.%u.kvcapsule.", layer.il);

    const int64_t K = data.n_neighbours;
    const int64_t h = layer.n_mlp;
    const int64_t d = layer.n_embd_head_k;

    const int64_t n_head = layer.n_head_kv;
    const int64_t n_drop = data.block_size - layer.n_kept;

    if (layer.n_kept > 0) {
        layer.k_gate = read_floats(prefix + "k_gate", GGML_TYPE_F16, { d, K, n_drop, n_head });

        const auto raw = read_tensor(prefix + "k_neighbours", GGML_TYPE_I32, { K, n_drop, 1, 1 });
        layer.k_neighbours.resize(K*n_drop);
        memcpy(layer.k_neighbours.data(), raw.data(), raw.size());

        need(std::all_of(layer.k_neighbours.begin(), layer.k_neighbours.end(), [&](int32_t i) { return i >= 0 && i < (int32_t) layer.n_kept; }),
                format("tensor %sk_neighbours points outside the %u kept tokens", prefix.c_str(), layer.n_kept));
    }

    if (h > 0) {
        layer.k_mlp_up      = read_floats(prefix + "k_mlp_up",      GGML_TYPE_F16, { K*d, h, n_head, 1 });
        layer.k_mlp_up_bias = read_floats(prefix + "k_mlp_up_bias", GGML_TYPE_F32, { h, n_head, 1, 1 });
        layer.k_mlp_down    = read_floats(prefix + "k_mlp_down",    GGML_TYPE_F16, { h, d, n_head, 1 });
    }
}

void capsule_reader::read_tensors() {
    if (is_sidecar()) {
        header.check_cover(source);
    }

    const int64_t N = data.block_size;

    for (auto & layer : data.layers) {
        const std::string prefix = format("blk.%u.kvcapsule.", layer.il);

        layer.k_mean         = read_floats(prefix + "k_mean",         GGML_TYPE_F32, { layer.n_embd_head_k, layer.n_head_kv, 1, 1 });
        layer.v_mean         = read_floats(prefix + "v_mean",         GGML_TYPE_F32, { layer.n_embd_head_v, layer.n_head_kv, 1, 1 });
        layer.k_basis        = read_floats(prefix + "k_basis",        GGML_TYPE_F32, { N, N, 1, 1 });
        layer.v_basis        = read_floats(prefix + "v_basis",        GGML_TYPE_F32, { N, N, 1, 1 });
        layer.k_query_weight = read_floats(prefix + "k_query_weight", GGML_TYPE_F32, { layer.n_embd_head_k, layer.n_head_kv, 1, 1 });

        check_mean(prefix + "k_mean", layer.k_mean);
        check_mean(prefix + "v_mean", layer.v_mean);

        check_basis(prefix + "k_basis", layer.k_basis, N);
        check_basis(prefix + "v_basis", layer.v_basis, N);

        need(std::all_of(layer.k_query_weight.begin(), layer.k_query_weight.end(), [](float x) { return x >= 0.0f; }),
                "tensor " + prefix + "k_query_weight has negative values");

        read_retain(layer);
    }

    for (const auto & t : header.tensors) {
        const bool own = is_sidecar() || t.name.find(CAPSULE_INFIX) != std::string::npos;
        need(!own || used.count(t.name) > 0, "unexpected tensor " + t.name);
    }
}

// the first 64 bits of the sha256 of the file
uint64_t capsule_reader::content_id() const {
    llama_capsule_sha256 sha;

    std::vector<uint8_t> buf(std::min<uint64_t>(1 << 20, source.size()));

    for (uint64_t at = 0; at < source.size();) {
        const size_t n = std::min<uint64_t>(source.size() - at, buf.size());
        source.read(at, buf.data(), n);
        sha.update(buf.data(), n);
        at += n;
    }

    return std::stoull(sha.finish().substr(0, 16), nullptr, 16);
}

llama_capsule_data_ptr llama_capsule_data_read(
        llama_capsule_source & source,
        const std::string    & name,
        const std::function<void(const llama_capsule_data &)> & check_model) {
    auto data = std::make_shared<llama_capsule_data>();

    data->path = name;

    try {
        capsule_reader reader(source, *data);

        reader.check_keys();
        reader.read_keys();
        reader.read_layers();
        reader.read_tiers();
        reader.check_ratios();

        if (check_model) {
            check_model(*data);
        }

        reader.read_tensors();

        data->id = reader.content_id();
    } catch (const llama_capsule_mismatch &) {
        throw;
    } catch (const std::bad_alloc &) {
        throw std::runtime_error(format("capsule '%s': no memory to read it", name.c_str()));
    } catch (const std::runtime_error & err) {
        throw std::runtime_error(format("capsule '%s': %s", name.c_str(), err.what()));
    }

    return data;
}

uint32_t llama_capsule_data::tier_for_ratio(float ratio) const {
    if (ratio <= 0.0f) {
        ratio = default_ratio;
    }

    uint32_t res = 1;
    for (uint32_t i = 2; i < tiers.size(); ++i) {
        if (fabsf(tiers[i].ratio - ratio) < fabsf(tiers[res].ratio - ratio)) {
            res = i;
        }
    }
    return res;
}

size_t llama_capsule_data::bytes_slot(uint32_t i_tier) const {
    size_t res = 0;
    for (size_t i = 0; i < layers.size(); ++i) {
        const auto & layer = layers[i];
        const auto & tl    = tiers[i_tier].layers[i];

        res += layer.n_head_kv*llama_capsule_rows_size(tl.key_rows,   layer.n_embd_head_k);
        res += layer.n_head_kv*llama_capsule_rows_size(tl.value_rows, layer.n_embd_head_v);
    }
    return res;
}
