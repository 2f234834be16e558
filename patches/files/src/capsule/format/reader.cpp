#include "capsule/format/reader.h"

#include "capsule/format/header.h"
#include "capsule/util/sha256.h"
#include "llama-impl.h"

#include "../ggml/src/ggml-capsule/transform.h"

#include "ggml-cpp.h"
#include "gguf.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <set>

// limits, as in kvcapsule_gguf/format/schema.py
static constexpr uint64_t CAPSULE_MAX_FILE   = 1ull << 30; // of a sidecar
static constexpr uint64_t CAPSULE_MAX_KEYS   = 256;        // of a sidecar
static constexpr uint64_t CAPSULE_MAX_HEADER = 64ull << 20;

static constexpr uint32_t CAPSULE_MAX_HEADS = 4096;
static constexpr uint32_t CAPSULE_MAX_TIERS = 16;

// what the hot cache can hold, and of a mean: what is added to it has to fit as well
static constexpr float CAPSULE_MAX_VALUE = 65504.0f;
static constexpr float CAPSULE_MAX_MEAN  = 8192.0f;

static constexpr char CAPSULE_INFIX[] = ".kvcapsule.";

// all keys
static const struct { const char * name; gguf_type type; bool is_array; } CAPSULE_KEYS[] = {
    { "kvcapsule.version",                   GGUF_TYPE_UINT32,  false },
    { "kvcapsule.layers",                    GGUF_TYPE_UINT32,  true  },
    { "kvcapsule.layer_rope",                GGUF_TYPE_BOOL,    true  },
    { "kvcapsule.smaller",                   GGUF_TYPE_FLOAT32, true  },
    { "kvcapsule.key_energy",                GGUF_TYPE_FLOAT32, true  },
    { "kvcapsule.value_energy",              GGUF_TYPE_FLOAT32, true  },
    { "kvcapsule.base.architecture",         GGUF_TYPE_STRING,  false },
    { "kvcapsule.base.block_count",          GGUF_TYPE_UINT32,  false },
    { "kvcapsule.base.fingerprint",          GGUF_TYPE_STRING,  false },
    { "kvcapsule.base.head_count_kv",        GGUF_TYPE_UINT32,  true  },
    { "kvcapsule.base.key_length",           GGUF_TYPE_UINT32,  true  },
    { "kvcapsule.base.value_length",         GGUF_TYPE_UINT32,  true  },
    { "kvcapsule.base.rope.type",            GGUF_TYPE_STRING,  false },
    { "kvcapsule.base.rope.dimension_count", GGUF_TYPE_UINT32,  false },
    { "kvcapsule.base.rope.sections",        GGUF_TYPE_UINT32,  true  },
};

static void need(bool ok, const std::string & reason) {
    if (!ok) {
        throw std::runtime_error(reason);
    }
}

struct tables_reader {
    llama_capsule_source & source;

    llama_capsule_header   header;
    llama_capsule_tables & tables;

    gguf_context_ptr gguf; // values of the keys

    std::set<std::string> used; // names of the tensors that were read

    tables_reader(llama_capsule_source & source, llama_capsule_tables & tables) : source(source), header(source), tables(tables) {}

    bool is_sidecar() const {
        return header.keys.count("adapter.type") > 0;
    }

    bool is_string(const char * key) const {
        const auto it = header.keys.find(key);
        return it != header.keys.end() && it->second.type == GGUF_TYPE_STRING && !it->second.is_array;
    }

    std::string get_str(const char * key) const {
        return gguf_get_val_str(gguf.get(), gguf_find_key(gguf.get(), key));
    }

    template<typename T>
    std::vector<T> get_arr(const char * key, size_t n) const {
        const size_t n_found = header.keys.at(key).n;
        need(n_found == n, format("key %s has %zu elements, not %zu", key, n_found, n));

        const auto * data = (const T *) gguf_get_arr_data(gguf.get(), gguf_find_key(gguf.get(), key));
        return std::vector<T>(data, data + n);
    }

    void check_keys();
    void read_base();
    void read_layers();
    void read_tensors();
    void check_sizes() const;

    std::vector<uint8_t> read_tensor(const std::string & name, ggml_type type, const std::array<int64_t, 4> & ne);
    std::vector<uint8_t> read_narrow(const std::string & name, uint32_t n_head);
    std::vector<uint8_t> read_table (const std::string & name, uint32_t n_head, int64_t n_groups);
    std::vector<float>   read_floats(const std::string & name, ggml_type type, const std::array<int64_t, 4> & ne);
    std::vector<float>   read_mean  (const std::string & name, uint32_t n_head, uint32_t d);
    std::vector<float>   read_axes  (const std::string & name, uint32_t n_head, uint32_t d);

    void read_transforms(llama_capsule_tables::layer & l, const std::string & prefix);
    void read_matrix    (llama_capsule_tables::layer::transform & t, const std::string & name);
    void read_kept      (llama_capsule_tables::layer & l, const std::string & prefix);

    uint64_t content_id() const;
};

void tables_reader::check_keys() {
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

        if (known.empty()) {
            need(k.u32 != 1, "a capsule of format v1: train it anew with kvcapsule-train");
            need(k.u32 == 2, format("kvcapsule.version: format version %u, this program reads version 2: update it", k.u32));
        }
        known.insert(key);
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

void tables_reader::read_base() {
    tables.architecture = get_str("kvcapsule.base.architecture");
    tables.fingerprint  = get_str("kvcapsule.base.fingerprint");
    tables.rope_type    = get_str("kvcapsule.base.rope.type");
    tables.block_count  = header.keys.at("kvcapsule.base.block_count").u32;
    tables.n_rot        = header.keys.at("kvcapsule.base.rope.dimension_count").u32;

    const auto sections = get_arr<uint32_t>("kvcapsule.base.rope.sections", 4);
    std::copy(sections.begin(), sections.end(), tables.rope_sections.begin());

    static const std::set<std::string> rope_types = { "none", "norm", "neox", "mrope", "imrope" };

    need(rope_types.count(tables.rope_type) > 0, "kvcapsule.base.rope.type is not one of none, norm, neox, mrope, imrope");
    need(tables.fingerprint.size() == 64 && tables.fingerprint.find_first_not_of("0123456789abcdef") == std::string::npos,
            "kvcapsule.base.fingerprint is not 64 hex digits");

    const size_t n_tiers = header.keys.at("kvcapsule.smaller").n;
    need(n_tiers >= 1 && n_tiers <= CAPSULE_MAX_TIERS, format("kvcapsule.smaller has %zu tiers, not 1..%u", n_tiers, CAPSULE_MAX_TIERS));

    tables.smaller = get_arr<float>("kvcapsule.smaller", n_tiers);
    for (size_t i = 0; i < n_tiers; ++i) {
        need(std::isfinite(tables.smaller[i]) && tables.smaller[i] > 0.0f, format("kvcapsule.smaller of tier %zu is not a positive number", i));
        need(i == 0 || tables.smaller[i] < tables.smaller[i - 1], "kvcapsule.smaller does not fall");
    }

    tables.init_tier_first();
}

void tables_reader::read_layers() {
    const size_t   n     = header.keys.at("kvcapsule.layers").n;
    const uint32_t n_all = tables.block_count;

    need(n >= 1 && n <= n_all, format("kvcapsule.layers has %zu layers of a model of %u", n, n_all));

    const auto il        = get_arr<uint32_t>("kvcapsule.layers",             n);
    const auto rope      = get_arr<int8_t>  ("kvcapsule.layer_rope",         n);
    const auto k_energy  = get_arr<float>   ("kvcapsule.key_energy",         n);
    const auto v_energy  = get_arr<float>   ("kvcapsule.value_energy",       n);
    const auto n_head_kv = get_arr<uint32_t>("kvcapsule.base.head_count_kv", n);
    const auto d_k       = get_arr<uint32_t>("kvcapsule.base.key_length",    n);
    const auto d_v       = get_arr<uint32_t>("kvcapsule.base.value_length",  n);

    for (size_t i = 0; i < n; ++i) {
        const std::string at = format("of layer %u", il[i]);

        need(i == 0 || il[i] > il[i - 1], "kvcapsule.layers does not ascend");
        need(il[i] < n_all, format("kvcapsule.layers names layer %u of a model of %u", il[i], n_all));
        need(n_head_kv[i] >= 1 && n_head_kv[i] <= CAPSULE_MAX_HEADS, format("kvcapsule.base.head_count_kv %s is %u", at.c_str(), n_head_kv[i]));
        need(d_k[i] >= 1 && d_k[i] <= llama_capsule_tables::MAX_HEAD, format("kvcapsule.base.key_length %s is %u",   at.c_str(), d_k[i]));
        need(d_v[i] >= 1 && d_v[i] <= llama_capsule_tables::MAX_HEAD, format("kvcapsule.base.value_length %s is %u", at.c_str(), d_v[i]));
        need(tables.n_rot <= d_k[i] && tables.n_rot%2 == 0, format("kvcapsule.base.rope.dimension_count %u does not fit layer %u", tables.n_rot, il[i]));
        need(k_energy[i] > 0.0f && k_energy[i] < 1e30f, "kvcapsule.key_energy "   + at + " is not a positive number");
        need(v_energy[i] > 0.0f && v_energy[i] < 1e30f, "kvcapsule.value_energy " + at + " is not a positive number");

        llama_capsule_tables::layer l;

        l.il            = il[i];
        l.rope          = rope[i] != 0;
        l.n_head_kv     = n_head_kv[i];
        l.n_embd_head_k = d_k[i];
        l.n_embd_head_v = d_v[i];
        l.k_energy      = k_energy[i];
        l.v_energy      = v_energy[i];

        tables.layers.push_back(std::move(l));
    }
}

// raw data of a tensor with exactly this type and shape
std::vector<uint8_t> tables_reader::read_tensor(const std::string & name, ggml_type type, const std::array<int64_t, 4> & ne) {
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

std::vector<uint8_t> tables_reader::read_table(const std::string & name, uint32_t n_head, int64_t n_groups) {
    auto res = read_tensor(name, GGML_TYPE_I8, { n_groups, llama_capsule_tables::N_ROWS, n_head, (int64_t) tables.smaller.size() });

    need(std::all_of(res.begin(), res.end(), [](uint8_t bits) { return bits <= 4 || bits == 6 || bits == 8 || bits == 16 || bits == 32; }),
            "tensor " + name + " has a number of bits that is not one of 0, 1, 2, 3, 4, 6, 8, 16, 32");

    return res;
}

std::vector<uint8_t> tables_reader::read_narrow(const std::string & name, uint32_t n_head) {
    auto res = read_tensor(name, GGML_TYPE_I8, { n_head, 1, 1, 1 });

    need(std::all_of(res.begin(), res.end(), [](uint8_t x) { return x <= 1; }), "tensor " + name + " has a value that is neither 0 nor 1");

    return res;
}

std::vector<float> tables_reader::read_floats(const std::string & name, ggml_type type, const std::array<int64_t, 4> & ne) {
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

std::vector<float> tables_reader::read_mean(const std::string & name, uint32_t n_head, uint32_t d) {
    auto res = read_floats(name, GGML_TYPE_F32, { d, n_head, 1, 1 });

    need(std::all_of(res.begin(), res.end(), [](float x) { return fabsf(x) <= CAPSULE_MAX_MEAN; }),
            format("tensor %s has values beyond +-%.0f: keys and values could overflow f16", name.c_str(), CAPSULE_MAX_MEAN));

    return res;
}

std::vector<float> tables_reader::read_axes(const std::string & name, uint32_t n_head, uint32_t d) {
    auto res = read_floats(name, GGML_TYPE_F16, { d, d, n_head, 1 });

    std::vector<float> gram(d*d);
    for (uint32_t h = 0; h < n_head; ++h) {
        std::fill(gram.begin(), gram.end(), 0.0f);
        for (uint32_t i = 0; i < d; ++i) {
            const float * row = res.data() + (h*d + i)*d;
            for (uint32_t j = 0; j < d; ++j) {
                for (uint32_t k = 0; k < d; ++k) {
                    gram[j*d + k] += row[j]*row[k];
                }
            }
        }
        for (uint32_t j = 0; j < d*d; ++j) {
            need(fabsf(gram[j] - (j % (d + 1) == 0 ? 1.0f : 0.0f)) <= 0.01f, "tensor " + name + " is not orthonormal");
        }
    }

    return res;
}

void tables_reader::read_matrix(llama_capsule_tables::layer::transform & t, const std::string & name) {
    constexpr int64_t n = GGML_CAPSULE_MAX_ROWS;

    t.matrix = read_axes(name, 1, n);
    t.columns.resize(n*n);
    for (int64_t i = 0; i < n*n; ++i) {
        t.columns[i % n*n + i/n] = t.matrix[i];
    }
}

// kept tokens and what the others are predicted by; the weights of lanes and channels go where ggml_capsule_transform wants them
void tables_reader::read_kept(llama_capsule_tables::layer & l, const std::string & prefix) {
    constexpr int64_t n = GGML_CAPSULE_MAX_ROWS;

    auto & t = l.k_transform;

    const auto channels = tables.channels_k(l);

    const int64_t d        = l.n_embd_head_k;
    const int64_t n_head   = l.n_head_kv;
    const int64_t n_groups = ggml_capsule_n_groups(channels);
    const int64_t n_lanes  = 2*GGML_CAPSULE_LANES*n_groups;

    const std::string name = prefix + "k_near";

    const auto & ne = header.find(name)->ne;

    const int64_t n_drop = ne[1];
    const int64_t n_near = ne[0];

    need(n_drop % 2 == 1 && n_drop < n, format("tensor %s is for %lld dropped tokens, not for an odd number below %lld", name.c_str(), (long long) n_drop, (long long) n));
    need(n_near >= 1 && n_near <= GGML_CAPSULE_MAX_NEAR,
            format("tensor %s has %lld neighbours, not 1..%d", name.c_str(), (long long) n_near, GGML_CAPSULE_MAX_NEAR));

    const auto * bias = header.find(prefix + "k_mlp_bias");

    t.n_near = n_near;
    t.n_mlp  = bias ? bias->ne[0] : 0;

    need(!bias || (bias->ne[0] >= 1 && bias->ne[0] <= GGML_CAPSULE_MAX_MLP),
            format("tensor %sk_mlp_bias has %lld hidden units, not 1..%d", prefix.c_str(), (long long) (bias ? bias->ne[0] : 0), GGML_CAPSULE_MAX_MLP));

    t.order = read_tensor(prefix + "k_order", GGML_TYPE_I8, { n, 1, 1, 1 });

    const std::set<uint8_t> tokens(t.order.begin(), t.order.end());
    need(tokens.size() == (size_t) n && *tokens.rbegin() < n, format("tensor %sk_order is not an order of %lld tokens", prefix.c_str(), (long long) n));

    t.near = read_tensor(name, GGML_TYPE_I8, { n_near, n_drop, 1, 1 });
    for (uint8_t & row : t.near) {
        need(row < n - n_drop, format("tensor %s points outside the %lld kept tokens", name.c_str(), (long long) (n - n_drop)));
        row = t.order[row];
    }

    t.gates = read_floats(prefix + "k_gate", GGML_TYPE_F16, { n_lanes/2, n_near, n_drop, n_head });

    if (t.n_mlp == 0) {
        return;
    }
    const int64_t n_mlp = t.n_mlp;

    const auto up   = read_floats(prefix + "k_mlp_up",   GGML_TYPE_F16, { n_near*d, n_mlp, n_head, 1 });
    t.mlp_bias      = read_floats(prefix + "k_mlp_bias", GGML_TYPE_F32, { n_mlp, n_head, 1, 1 });
    const auto down = read_floats(prefix + "k_mlp_down", GGML_TYPE_F16, { n_mlp, d, n_head, 1 });

    t.mlp_up  .resize(n_head*n_mlp*n_near*n_lanes);
    t.mlp_down.resize(n_head*n_mlp*n_lanes);
    for (int64_t i = 0; i < n_lanes; ++i) {
        const int g    = i/(2*GGML_CAPSULE_LANES);
        const int lane = i % GGML_CAPSULE_LANES;
        const int c    = lane < ggml_capsule_n_lanes(channels, g) ? ggml_capsule_channel(channels, g, i/GGML_CAPSULE_LANES % 2, lane) : -1;
        if (c < 0) {
            continue;
        }
        for (int64_t u = 0; u < n_head*n_mlp; ++u) {
            for (int64_t k = 0; k < n_near; ++k) {
                t.mlp_up[(u*n_near + k)*n_lanes + i] = up[(u*n_near + k)*d + c];
            }
            t.mlp_down[u*n_lanes + i] = down[(u/n_mlp*d + c)*n_mlp + u % n_mlp];
        }
    }
}

void tables_reader::read_transforms(llama_capsule_tables::layer & l, const std::string & prefix) {
    if (header.find(prefix + "k_near")) {
        read_kept(l, prefix);
    } else if (header.find(prefix + "k_transform")) {
        read_matrix(l.k_transform, prefix + "k_transform");
    }
    if (header.find(prefix + "v_transform")) {
        read_matrix(l.v_transform, prefix + "v_transform");
    }
}

void tables_reader::read_tensors() {
    if (is_sidecar()) {
        header.check_cover(source);
    }

    for (auto & l : tables.layers) {
        const std::string prefix = format("blk.%u.kvcapsule.", l.il);

        l.k_mean  = read_mean (prefix + "k_mean",  l.n_head_kv, l.n_embd_head_k);
        l.v_mean  = read_mean (prefix + "v_mean",  l.n_head_kv, l.n_embd_head_v);
        l.k_table = read_table(prefix + "k_table", l.n_head_kv, ggml_capsule_n_groups(tables.channels_k(l)));
        l.v_table = read_table(prefix + "v_table", l.n_head_kv, ggml_capsule_n_groups(tables.channels_v(l)));

        if (header.find(prefix + "v_axes")) {
            l.v_axes = read_axes(prefix + "v_axes", l.n_head_kv, l.n_embd_head_v);
        }
        if (header.find(prefix + "narrow")) {
            l.narrow = read_narrow(prefix + "narrow", l.n_head_kv);
        }
        read_transforms(l, prefix);
    }

    for (const auto & t : header.tensors) {
        const bool own = is_sidecar() || t.name.find(CAPSULE_INFIX) != std::string::npos;
        need(!own || used.count(t.name) > 0, "unexpected tensor " + t.name);
    }
}

void tables_reader::check_sizes() const {
    for (size_t i = 0; i < tables.smaller.size(); ++i) {
        const size_t n = tables.bytes_tile(i);
        need(n > 0, format("tier %zu stores nothing", i));

        const double found = (double) tables.bytes_tile_f16()/n;
        need(fabs(found/tables.smaller[i] - 1.0) <= 1e-3, format("kvcapsule.smaller of tier %zu is %.3f, its tables give %.3f", i, tables.smaller[i], found));
    }
}

// the first 64 bits of the sha256 of the file
uint64_t tables_reader::content_id() const {
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

llama_capsule_tables_ptr llama_capsule_tables_read(
        llama_capsule_source & source,
        const std::string    & name,
        const std::function<void(const llama_capsule_tables &)> & check_model) {
    auto tables = std::make_shared<llama_capsule_tables>();

    tables->path = name;

    try {
        tables_reader reader(source, *tables);

        reader.check_keys();
        reader.read_base();
        reader.read_layers();

        if (check_model) {
            check_model(*tables);
        }

        reader.read_tensors();
        reader.check_sizes();

        tables->id = reader.content_id();
    } catch (const llama_capsule_mismatch &) {
        throw;
    } catch (const std::bad_alloc &) {
        throw std::runtime_error(format("capsule '%s': no memory to read it", name.c_str()));
    } catch (const std::runtime_error & err) {
        throw std::runtime_error(format("capsule '%s': %s", name.c_str(), err.what()));
    }

    return tables;
}
