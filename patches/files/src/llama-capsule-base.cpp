#include "llama-capsule-file.h"

#include "llama-arch.h"
#include "llama-capsule-kv.h"
#include "llama-capsule-sha256.h"
#include "llama-impl.h"
#include "llama-mmap.h"
#include "llama-model.h"

#include <map>

//
// what binds a capsule to a model
//

const char * llama_capsule_rope_name(llama_rope_type type) {
    switch (type) {
        case LLAMA_ROPE_TYPE_NONE:   return "none";
        case LLAMA_ROPE_TYPE_NORM:   return "norm";
        case LLAMA_ROPE_TYPE_NEOX:   return "neox";
        case LLAMA_ROPE_TYPE_MROPE:  return "mrope";
        case LLAMA_ROPE_TYPE_IMROPE: return "imrope";
        default:                     return "other";
    }
}

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

    llama_capsule_sha256 sha;

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

void llama_capsule_check_model(const llama_capsule_data & data, const llama_model & model) {
    const auto & hparams = model.hparams;
    const auto & base    = data.model;

    auto mismatch = [&](const std::string & what) {
        throw llama_capsule_mismatch(format("capsule '%s' was made for another model: %s", data.path.c_str(), what.c_str()));
    };

    if (base.architecture != llm_arch_name(model.arch)) {
        mismatch("architecture " + base.architecture + ", not " + llm_arch_name(model.arch));
    }
    if (base.block_count != hparams.n_layer_all) {
        mismatch(format("%u layers, not %u", base.block_count, hparams.n_layer_all));
    }

    for (const auto & layer : data.layers) {
        const uint32_t n_head_kv = hparams.n_head_kv(layer.il);
        if (layer.n_head_kv != n_head_kv) {
            mismatch(format("layer %u has %u KV heads, the capsule %u", layer.il, n_head_kv, layer.n_head_kv));
        }
        if (layer.n_embd_head_k != hparams.n_embd_head_k(layer.il) || layer.n_embd_head_v != hparams.n_embd_head_v(layer.il)) {
            mismatch(format("head size of layer %u", layer.il));
        }
    }

    if (base.rope_type != llama_capsule_rope_name(hparams.rope_type)) {
        mismatch("RoPE type " + base.rope_type);
    }
    for (const auto & layer : data.layers) {
        if (layer.rope != llama_capsule_layer_rope(model, layer.il)) {
            mismatch(format("layer %u is %s RoPE", layer.il, layer.rope ? "without" : "with"));
        }
    }
    if (hparams.rope_type == LLAMA_ROPE_TYPE_MROPE || hparams.rope_type == LLAMA_ROPE_TYPE_IMROPE) {
        for (int i = 0; i < 4; ++i) {
            if ((int) base.rope_sections[i] != hparams.rope_sections[i]) {
                mismatch("M-RoPE sections");
            }
        }
    }

    if (base.fingerprint != llama_capsule_model_fingerprint(model)) {
        mismatch("fingerprint (train one for this model with kvcapsule-train)");
    }
}

//
// files
//

struct capsule_file : llama_capsule_source {
    llama_file file;

    explicit capsule_file(const char * path) : file(path, "rb") {}

    uint64_t size() const override {
        return file.size();
    }

    void read(uint64_t offset, void * dst, size_t n) override {
        file.seek(offset, SEEK_SET);
        file.read_raw(dst, n);
    }
};

std::unique_ptr<llama_capsule_source> llama_capsule_open(const char * path) {
    try {
        return std::make_unique<capsule_file>(path);
    } catch (const std::exception &) {
        throw std::runtime_error(format("can not open capsule '%s'", path));
    }
}

llama_capsule_data_ptr llama_capsule_data_load(const llama_model & model, const char * path) {
    const auto file = llama_capsule_open(path);

    auto data = llama_capsule_data_read(*file, path, [&](const llama_capsule_data & data) { llama_capsule_check_model(data, model); });

    LLAMA_LOG_INFO("%s: block of %u tokens, %zu layers, %zu tiers\n", __func__, data->block_size, data->layers.size(), data->tiers.size());

    return data;
}
