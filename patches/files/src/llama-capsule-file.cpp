#include "llama-capsule-file.h"

#include "llama-arch.h"
#include "llama-impl.h"
#include "llama-mmap.h"
#include "llama-model.h"

#include "ggml-cpp.h"
#include "gguf.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <set>

//
// limits: the loader trusts nothing
//

static constexpr size_t   CAPSULE_MAX_FILE   = 1ull << 30;
static constexpr int64_t  CAPSULE_MAX_KV     = 256;
static constexpr size_t   CAPSULE_MAX_STRING = 64*1024;
static constexpr size_t   CAPSULE_MAX_ARRAY  = 1 << 20;
static constexpr uint32_t CAPSULE_MAX_BLOCK  = 256;
static constexpr uint32_t CAPSULE_MAX_TIERS  = 16;
static constexpr uint32_t CAPSULE_MAX_MLP    = 1024;

static constexpr char CAPSULE_INFIX[] = ".kvcapsule.";

static const char * capsule_rope_name(llama_rope_type type) {
    switch (type) {
        case LLAMA_ROPE_TYPE_NONE:   return "none";
        case LLAMA_ROPE_TYPE_NORM:   return "norm";
        case LLAMA_ROPE_TYPE_NEOX:   return "neox";
        case LLAMA_ROPE_TYPE_MROPE:  return "mrope";
        case LLAMA_ROPE_TYPE_IMROPE: return "imrope";
        default:                     return "other";
    }
}

//
// sha256 (FIPS 180-4)
//

struct capsule_sha256 {
    uint32_t h[8] = {
        0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19,
    };

    uint8_t  buf[64];
    uint64_t len = 0;

    static uint32_t rotr(uint32_t x, int n) {
        return (x >> n) | (x << (32 - n));
    }

    void block(const uint8_t * p) {
        static const uint32_t k[64] = {
            0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
            0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
            0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
            0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
            0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
            0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
            0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
            0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
        };

        uint32_t w[64];
        for (int i = 0; i < 16; ++i) {
            w[i] = (uint32_t) p[4*i] << 24 | (uint32_t) p[4*i + 1] << 16 | (uint32_t) p[4*i + 2] << 8 | p[4*i + 3];
        }
        for (int i = 16; i < 64; ++i) {
            const uint32_t s0 = rotr(w[i - 15], 7) ^ rotr(w[i - 15], 18) ^ (w[i - 15] >> 3);
            const uint32_t s1 = rotr(w[i - 2], 17) ^ rotr(w[i - 2], 19)  ^ (w[i - 2] >> 10);
            w[i] = w[i - 16] + s0 + w[i - 7] + s1;
        }

        uint32_t s[8];
        memcpy(s, h, sizeof(s));

        for (int i = 0; i < 64; ++i) {
            const uint32_t e1 = rotr(s[4], 6) ^ rotr(s[4], 11) ^ rotr(s[4], 25);
            const uint32_t ch = (s[4] & s[5]) ^ (~s[4] & s[6]);
            const uint32_t t1 = s[7] + e1 + ch + k[i] + w[i];
            const uint32_t e0 = rotr(s[0], 2) ^ rotr(s[0], 13) ^ rotr(s[0], 22);
            const uint32_t mj = (s[0] & s[1]) ^ (s[0] & s[2]) ^ (s[1] & s[2]);

            memmove(s + 1, s, 7*sizeof(uint32_t));
            s[0]  = t1 + e0 + mj;
            s[4] += t1;
        }

        for (int i = 0; i < 8; ++i) {
            h[i] += s[i];
        }
    }

    void update(const void * data, size_t n) {
        const auto * p = (const uint8_t *) data;
        for (size_t i = 0; i < n; ++i) {
            buf[len++ % 64] = p[i];
            if (len % 64 == 0) {
                block(buf);
            }
        }
    }

    void update(const std::string & s) {
        update(s.data(), s.size());
    }

    std::string finish() {
        const uint64_t n_bits = len*8;

        const uint8_t one = 0x80;
        update(&one, 1);
        const uint8_t zero = 0;
        while (len % 64 != 56) {
            update(&zero, 1);
        }
        for (int i = 7; i >= 0; --i) {
            const uint8_t b = (uint8_t) (n_bits >> (8*i));
            update(&b, 1);
        }

        std::string res;
        for (uint32_t x : h) {
            res += format("%08x", x);
        }
        return res;
    }
};

std::string llama_capsule_model_fingerprint(const llama_model & model) {
    const auto & hparams = model.hparams;

    const uint32_t n_layer = hparams.n_layer_all;

    std::string head_count_kv;
    std::string key_length;
    std::string value_length;

    for (uint32_t il = 0; il < n_layer; ++il) {
        const char * sep = il > 0 ? "," : "";

        head_count_kv += format("%s%u", sep, hparams.n_head_kv(il));
        key_length    += format("%s%u", sep, hparams.n_embd_head_k(il));
        value_length  += format("%s%u", sep, hparams.n_embd_head_v(il));
    }

    capsule_sha256 sha;

    sha.update("kvcapsule-base-v1\n");
    sha.update(format("arch=%s\nblock_count=%u\nembedding_length=%u\n", llm_arch_name(model.arch), n_layer, hparams.n_embd));
    sha.update("head_count_kv=" + head_count_kv + "\nkey_length=" + key_length + "\nvalue_length=" + value_length + "\n");

    static const std::string suffix = "norm.weight";

    std::map<std::string, const ggml_tensor *> norms;
    for (const auto & [name, tensor] : model.tensors_by_name) {
        if (tensor->type == GGML_TYPE_F32 && name.size() >= suffix.size() && name.compare(name.size() - suffix.size(), suffix.size(), suffix) == 0) {
            norms.emplace(name, tensor);
        }
    }

    std::vector<uint8_t> data;
    for (const auto & [name, tensor] : norms) {
        data.resize(ggml_nbytes(tensor));
        ggml_backend_tensor_get(tensor, data.data(), 0, data.size());

        sha.update(name + "\n");
        sha.update(data.data(), data.size());
    }

    return sha.finish();
}

//
// metadata
//

struct capsule_reader {
    const llama_model & model;
    const char *        path;

    gguf_context_ptr gguf;
    ggml_context_ptr ctx_meta;

    std::unique_ptr<llama_file> file;

    std::set<std::string> used; // names of the tensors that were read

    [[noreturn]] void fail(const std::string & what) const {
        throw std::runtime_error(format("capsule '%s' is damaged: %s", path, what.c_str()));
    }

    [[noreturn]] void mismatch(const std::string & what) const {
        throw llama_capsule_mismatch(format("capsule '%s' was made for another model: %s", path, what.c_str()));
    }

    int64_t find(const std::string & key, gguf_type type) const {
        const int64_t id = gguf_find_key(gguf.get(), key.c_str());
        if (id < 0) {
            fail("key " + key + " is missing");
        }
        if (gguf_get_kv_type(gguf.get(), id) != type) {
            fail("key " + key + " has the wrong type");
        }
        return id;
    }

    std::string get_str(const std::string & key) const {
        const std::string res = gguf_get_val_str(gguf.get(), find(key, GGUF_TYPE_STRING));
        if (res.size() > CAPSULE_MAX_STRING) {
            fail("key " + key + " is too long");
        }
        return res;
    }

    uint32_t get_u32(const std::string & key) const {
        return gguf_get_val_u32(gguf.get(), find(key, GGUF_TYPE_UINT32));
    }

    float get_f32(const std::string & key) const {
        const float res = gguf_get_val_f32(gguf.get(), find(key, GGUF_TYPE_FLOAT32));
        if (!std::isfinite(res)) {
            fail("key " + key + " is not finite");
        }
        return res;
    }

    int64_t find_arr(const std::string & key, gguf_type type, size_t n) const {
        const int64_t id = find(key, GGUF_TYPE_ARRAY);
        if (gguf_get_arr_type(gguf.get(), id) != type) {
            fail("array " + key + " has the wrong element type");
        }
        if (gguf_get_arr_n(gguf.get(), id) != n) {
            fail(format("array %s has %zu elements, expected %zu", key.c_str(), (size_t) gguf_get_arr_n(gguf.get(), id), n));
        }
        return id;
    }

    template<typename T>
    std::vector<T> get_arr(const std::string & key, gguf_type type, size_t n) const {
        const auto * data = (const T *) gguf_get_arr_data(gguf.get(), find_arr(key, type, n));
        return std::vector<T>(data, data + n);
    }

    std::vector<uint32_t> get_arr_u32(const std::string & key, size_t n) const {
        return get_arr<uint32_t>(key, GGUF_TYPE_UINT32, n);
    }

    std::vector<float> get_arr_f32(const std::string & key, size_t n) const {
        auto res = get_arr<float>(key, GGUF_TYPE_FLOAT32, n);
        if (!std::all_of(res.begin(), res.end(), [](float x) { return std::isfinite(x); })) {
            fail("array " + key + " has values that are not finite");
        }
        return res;
    }

    size_t arr_n(const std::string & key) const {
        const size_t n = gguf_get_arr_n(gguf.get(), find(key, GGUF_TYPE_ARRAY));
        if (n == 0 || n > CAPSULE_MAX_ARRAY) {
            fail("array " + key + " has a bad length");
        }
        return n;
    }

    // raw data of a tensor with exactly this type and shape
    std::vector<uint8_t> read_tensor(const std::string & name, ggml_type type, const std::array<int64_t, 4> & ne) {
        const ggml_tensor * t = ggml_get_tensor(ctx_meta.get(), name.c_str());
        if (!t) {
            fail("tensor " + name + " is missing");
        }
        if (t->type != type) {
            fail(format("tensor %s has type %s, expected %s", name.c_str(), ggml_type_name(t->type), ggml_type_name(type)));
        }
        for (int i = 0; i < 4; ++i) {
            if (t->ne[i] != ne[i]) {
                fail(format("tensor %s has a wrong shape: dimension %d is %lld, expected %lld", name.c_str(), i, (long long) t->ne[i], (long long) ne[i]));
            }
        }

        const size_t size = ggml_nbytes(t);
        const size_t offs = gguf_get_data_offset(gguf.get()) + gguf_get_tensor_offset(gguf.get(), gguf_find_tensor(gguf.get(), name.c_str()));
        if (offs + size < offs || offs + size > file->size()) {
            fail("tensor " + name + " is not within the file bounds, the file is incomplete");
        }

        std::vector<uint8_t> res(size);
        file->seek(offs, SEEK_SET);
        file->read_raw(res.data(), size);

        used.insert(name);

        return res;
    }

    // F32 or F16 tensor as floats
    std::vector<float> read_f32(const std::string & name, ggml_type type, const std::array<int64_t, 4> & ne) {
        const auto raw = read_tensor(name, type, ne);

        std::vector<float> res(raw.size()/ggml_type_size(type));
        if (type == GGML_TYPE_F32) {
            memcpy(res.data(), raw.data(), raw.size());
        } else {
            ggml_fp16_to_fp32_row((const ggml_fp16_t *) raw.data(), res.data(), res.size());
        }

        if (!std::all_of(res.begin(), res.end(), [](float x) { return std::isfinite(x); })) {
            fail("tensor " + name + " has values that are not finite");
        }
        return res;
    }

    void     open();
    uint64_t content_id() const;
    void check_base(const std::vector<uint32_t> & layers) const;

    void read_layer (llama_capsule_data & data, llama_capsule_data::layer & layer);
    void read_retain(llama_capsule_data & data, llama_capsule_data::layer & layer, const uint16_t * order);
    void read_tiers (llama_capsule_data & data) const;

    llama_capsule_row_counts row_counts(const llama_capsule_data & data, const uint32_t * counts, uint32_t d, const std::string & what) const;
};

void capsule_reader::open() {
    try {
        file = std::make_unique<llama_file>(path, "rb");
    } catch (const std::exception &) {
        throw std::runtime_error(format("can not open capsule '%s'", path));
    }

    if (file->size() > CAPSULE_MAX_FILE) {
        fail("larger than 1 GiB");
    }

    ggml_context * ctx = nullptr;

    const gguf_init_params params = {
        /* .no_alloc = */ true,
        /* .ctx      = */ &ctx,
    };

    gguf.reset(gguf_init_from_file(path, params));
    ctx_meta.reset(ctx);

    if (!gguf) {
        fail("not a GGUF file, or incomplete");
    }
}

// the first 64 bits of the sha256 of the file
uint64_t capsule_reader::content_id() const {
    capsule_sha256 sha;

    std::vector<uint8_t> buf(1 << 20);

    file->seek(0, SEEK_SET);
    for (size_t left = file->size(); left > 0;) {
        const size_t n = std::min(left, buf.size());
        file->read_raw(buf.data(), n);
        sha.update(buf.data(), n);
        left -= n;
    }

    return std::stoull(sha.finish().substr(0, 16), nullptr, 16);
}

void capsule_reader::check_base(const std::vector<uint32_t> & layers) const {
    const auto & hparams = model.hparams;

    const size_t n = layers.size();

    const std::string arch = get_str("kvcapsule.base.architecture");
    if (arch != llm_arch_name(model.arch)) {
        mismatch("architecture " + arch + ", not " + llm_arch_name(model.arch));
    }

    if (get_u32("kvcapsule.base.block_count") != hparams.n_layer_all) {
        mismatch("number of layers");
    }

    const auto head_count_kv = get_arr_u32("kvcapsule.base.head_count_kv", n);
    const auto key_length    = get_arr_u32("kvcapsule.base.key_length",    n);
    const auto value_length  = get_arr_u32("kvcapsule.base.value_length",  n);
    const auto freq_base     = get_arr_f32("kvcapsule.base.rope.freq_base", n);
    const auto sections      = get_arr_u32("kvcapsule.base.rope.sections",  4);

    for (size_t i = 0; i < n; ++i) {
        const uint32_t il = layers[i];
        if (il >= hparams.n_layer_all) {
            mismatch(format("layer %u does not exist", il));
        }
        if (head_count_kv[i] != hparams.n_head_kv(il)) {
            mismatch(format("layer %u has %u KV heads, the capsule %u", il, hparams.n_head_kv(il), head_count_kv[i]));
        }
        if (key_length[i] != hparams.n_embd_head_k(il) || value_length[i] != hparams.n_embd_head_v(il)) {
            mismatch(format("head size of layer %u", il));
        }
    }

    const std::string rope_type = get_str("kvcapsule.base.rope.type");
    if (rope_type != capsule_rope_name(hparams.rope_type)) {
        mismatch("RoPE type " + rope_type);
    }

    if (hparams.rope_type == LLAMA_ROPE_TYPE_MROPE || hparams.rope_type == LLAMA_ROPE_TYPE_IMROPE) {
        for (int i = 0; i < 4; ++i) {
            if ((int) sections[i] != hparams.rope_sections[i]) {
                mismatch("M-RoPE sections");
            }
        }
    }

    if (get_str("kvcapsule.base.fingerprint") != llama_capsule_model_fingerprint(model)) {
        mismatch("fingerprint (train one for this model with kvcapsule-train)");
    }
}

llama_capsule_row_counts capsule_reader::row_counts(const llama_capsule_data & data, const uint32_t * counts, uint32_t d, const std::string & what) const {
    llama_capsule_row_counts res;

    uint64_t total = 0;
    for (int t = 0; t < LLAMA_CAPSULE_N_TYPES; ++t) {
        res[t] = counts[t];
        total += counts[t];

        if (counts[t] > 0 && d % ggml_blck_size(LLAMA_CAPSULE_TYPES[t]) != 0) {
            fail(format("%s: type %s is not possible for head size %u", what.c_str(), ggml_type_name(LLAMA_CAPSULE_TYPES[t]), d));
        }
    }
    if (total < 1 || total > data.block_size) {
        fail(format("%s: %llu rows in a block of %u", what.c_str(), (unsigned long long) total, data.block_size));
    }

    return res;
}

void capsule_reader::read_tiers(llama_capsule_data & data) const {
    const size_t n_tiers  = arr_n("kvcapsule.tier.ratio");
    const size_t n_layers = data.layers.size();

    if (n_tiers < 2 || n_tiers > CAPSULE_MAX_TIERS) {
        fail("the number of tiers must be in 2..16");
    }

    const size_t n = n_tiers*n_layers;

    const auto ratio      = get_arr_f32("kvcapsule.tier.ratio",      n_tiers);
    const auto key_codec  = get_arr_u32("kvcapsule.tier.key_codec",  n);
    const auto key_rows   = get_arr_u32("kvcapsule.tier.key_rows",   n*LLAMA_CAPSULE_N_TYPES);
    const auto value_rows = get_arr_u32("kvcapsule.tier.value_rows", n*LLAMA_CAPSULE_N_TYPES);
    const auto kappa      = get_arr_f32("kvcapsule.tier.kappa",      n);

    const int64_t id_name = find_arr("kvcapsule.tier.name", GGUF_TYPE_STRING, n_tiers);

    data.tiers.resize(n_tiers);
    for (size_t it = 0; it < n_tiers; ++it) {
        auto & tier = data.tiers[it];

        tier.name  = gguf_get_arr_str(gguf.get(), id_name, it);
        tier.ratio = ratio[it];

        if (tier.ratio < -8.0f || tier.ratio > 1.0f) {
            fail("tier ratio out of range");
        }
        if ((tier.name == "faithful") != (it == 0)) {
            fail("tier 0, and no other, must be 'faithful'");
        }

        for (size_t l = 0; l < n_layers; ++l) {
            const auto & layer = data.layers[l];

            const size_t i = it*n_layers + l;
            const std::string what = format("tier %zu, layer %u", it, layer.il);

            if (key_codec[i] > 1) {
                fail(what + ": unknown key codec");
            }

            llama_capsule_data::tier_layer tl;
            tl.key_codec  = (llama_capsule_key_codec) key_codec[i];
            tl.key_rows   = row_counts(data, &key_rows  [i*LLAMA_CAPSULE_N_TYPES], layer.n_embd_head_k, what + ", keys");
            tl.value_rows = row_counts(data, &value_rows[i*LLAMA_CAPSULE_N_TYPES], layer.n_embd_head_v, what + ", values");
            tl.kappa      = kappa[i];

            if (tl.key_codec == LLAMA_CAPSULE_KEY_CODEC_RETAIN) {
                if (layer.n_kept == 0) {
                    fail(what + ": retain without kept tokens");
                }
                if (llama_capsule_rows_total(tl.key_rows) < layer.n_kept) {
                    fail(what + ": fewer rows than kept tokens");
                }
            }

            tier.layers.push_back(tl);
        }
    }
}

void capsule_reader::read_retain(llama_capsule_data & data, llama_capsule_data::layer & layer, const uint16_t * order) {
    const uint32_t N = data.block_size;
    const uint32_t K = data.n_neighbours;

    layer.token_order.assign(order, order + N);

    std::vector<bool> seen(N, false);
    for (uint16_t t : layer.token_order) {
        if (t >= N || seen[t]) {
            fail(format("token_order of layer %u is not a permutation", layer.il));
        }
        seen[t] = true;
    }

    if (layer.n_kept == 0) {
        if (layer.n_mlp > 0) {
            fail(format("layer %u has a key MLP but no kept tokens", layer.il));
        }
        return;
    }
    if (layer.n_kept >= N || K == 0) {
        fail(format("layer %u: bad kept_count or neighbour_count", layer.il));
    }
    if (layer.n_mlp > CAPSULE_MAX_MLP) {
        fail(format("layer %u: bad mlp_width", layer.il));
    }

    const std::string prefix = format("blk.%u.kvcapsule.", layer.il);

    const int64_t n_drop = N - layer.n_kept;
    const int64_t d      = layer.n_embd_head_k;
    const int64_t n_head = layer.n_head_kv;

    layer.k_gate = read_f32(prefix + "k_gate", GGML_TYPE_F16, { d, K, n_drop, n_head });

    const auto raw = read_tensor(prefix + "k_neighbours", GGML_TYPE_I32, { K, n_drop, 1, 1 });
    layer.k_neighbours.resize(K*n_drop);
    memcpy(layer.k_neighbours.data(), raw.data(), raw.size());
    for (int32_t i : layer.k_neighbours) {
        if (i < 0 || i >= (int32_t) layer.n_kept) {
            fail(format("layer %u: k_neighbours points outside the kept tokens", layer.il));
        }
    }

    if (layer.n_mlp > 0) {
        const int64_t h = layer.n_mlp;

        layer.k_mlp_up      = read_f32(prefix + "k_mlp_up",      GGML_TYPE_F16, { K*d, h, n_head, 1 });
        layer.k_mlp_up_bias = read_f32(prefix + "k_mlp_up_bias", GGML_TYPE_F32, { h, n_head, 1, 1 });
        layer.k_mlp_down    = read_f32(prefix + "k_mlp_down",    GGML_TYPE_F16, { h, d, n_head, 1 });
    }
}

void capsule_reader::read_layer(llama_capsule_data & data, llama_capsule_data::layer & layer) {
    const std::string prefix = format("blk.%u.kvcapsule.", layer.il);

    const int64_t N = data.block_size;

    layer.k_mean         = read_f32(prefix + "k_mean",         GGML_TYPE_F32, { layer.n_embd_head_k, layer.n_head_kv, 1, 1 });
    layer.v_mean         = read_f32(prefix + "v_mean",         GGML_TYPE_F32, { layer.n_embd_head_v, layer.n_head_kv, 1, 1 });
    layer.k_query_weight = read_f32(prefix + "k_query_weight", GGML_TYPE_F32, { layer.n_embd_head_k, layer.n_head_kv, 1, 1 });
    layer.k_basis        = read_f32(prefix + "k_basis",        GGML_TYPE_F32, { N, N, 1, 1 });
    layer.v_basis        = read_f32(prefix + "v_basis",        GGML_TYPE_F32, { N, N, 1, 1 });
}

llama_capsule_data_ptr llama_capsule_data_load(const llama_model & model, const char * path) {
    capsule_reader r = { model, path, {}, {}, {}, {} };

    r.open();

    const bool is_sidecar = gguf_find_key(r.gguf.get(), "adapter.type") >= 0;
    if (is_sidecar) {
        if (gguf_get_n_kv(r.gguf.get()) > CAPSULE_MAX_KV) {
            r.fail("too many keys");
        }
        if (r.get_str("general.type") != "adapter" || r.get_str("adapter.type") != "kvcapsule") {
            throw std::runtime_error(format("'%s' is not a capsule: adapter.type is not 'kvcapsule'", path));
        }
        if (r.get_str("general.architecture") != r.get_str("kvcapsule.base.architecture")) {
            r.fail("general.architecture differs from kvcapsule.base.architecture");
        }
    } else if (gguf_find_key(r.gguf.get(), "kvcapsule.version") < 0) {
        throw std::runtime_error(format("'%s' is not a capsule: no key kvcapsule.version", path));
    }

    const uint32_t version = r.get_u32("kvcapsule.version");
    if (version != 1) {
        throw std::runtime_error(format("capsule '%s' has format version %u, this library reads version 1: update it", path, version));
    }

    auto data = std::make_shared<llama_capsule_data>();

    data->path          = path;
    data->block_size    = r.get_u32("kvcapsule.block_size");
    data->image_tokens  = r.get_u32("kvcapsule.image_tokens");
    data->n_neighbours  = r.get_u32("kvcapsule.neighbour_count");
    data->default_ratio = r.get_f32("kvcapsule.default_ratio");

    if (data->block_size < 8 || data->block_size > CAPSULE_MAX_BLOCK) {
        r.fail("block_size must be in 8..256");
    }
    if (data->n_neighbours > 8) {
        r.fail("neighbour_count must be in 0..8");
    }
    if (data->image_tokens > 0 && data->image_tokens % data->block_size != 0) {
        r.fail("block_size does not divide image_tokens");
    }

    const std::string shape = r.get_str("kvcapsule.block_shape");
    if (shape != "raster") {
        throw std::runtime_error(format("capsule '%s' has block shape '%s', which is not supported yet", path, shape == "tile" ? "tile" : "unknown"));
    }

    const size_t n_layers = r.arr_n("kvcapsule.layers");
    if (n_layers > model.hparams.n_layer_all) {
        r.mismatch("number of layers");
    }

    const auto layers = r.get_arr_u32("kvcapsule.layers", n_layers);
    for (size_t i = 1; i < n_layers; ++i) {
        if (layers[i] <= layers[i - 1]) {
            r.fail("layers are not ascending");
        }
    }

    r.check_base(layers);

    const auto rope       = r.get_arr<int8_t>("kvcapsule.layer_rope", GGUF_TYPE_BOOL, n_layers);
    const auto mlp_width  = r.get_arr_u32("kvcapsule.mlp_width",  n_layers);
    const auto kept_count = r.get_arr_u32("kvcapsule.kept_count", n_layers);
    const auto order      = r.get_arr<uint16_t>("kvcapsule.token_order", GGUF_TYPE_UINT16, n_layers*data->block_size);

    for (size_t i = 0; i < n_layers; ++i) {
        const uint32_t il = layers[i];

        llama_capsule_data::layer layer;

        layer.il            = il;
        layer.rope          = rope[i] != 0;
        layer.n_head_kv     = model.hparams.n_head_kv(il);
        layer.n_embd_head_k = model.hparams.n_embd_head_k(il);
        layer.n_embd_head_v = model.hparams.n_embd_head_v(il);
        layer.n_kept        = kept_count[i];
        layer.n_mlp         = mlp_width[i];

        r.read_layer (*data, layer);
        r.read_retain(*data, layer, &order[i*data->block_size]);

        data->layers.push_back(std::move(layer));
    }

    r.read_tiers(*data);

    for (int64_t i = 0; i < gguf_get_n_tensors(r.gguf.get()); ++i) {
        const std::string name = gguf_get_tensor_name(r.gguf.get(), i);
        if (r.used.count(name) == 0 && (is_sidecar || name.find(CAPSULE_INFIX) != std::string::npos)) {
            r.fail("unexpected tensor " + name);
        }
    }

    data->id = r.content_id();

    LLAMA_LOG_INFO("%s: %zu tensors loaded, block of %u tokens, %zu layers, %zu tiers\n", __func__,
            r.used.size(), data->block_size, n_layers, data->tiers.size());

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
