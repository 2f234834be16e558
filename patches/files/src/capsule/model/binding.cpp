#include "capsule/model/binding.h"

#include "capsule/format/reader.h"
#include "capsule/model/rope.h"
#include "capsule/util/sha256.h"

#include "llama-arch.h"
#include "llama-impl.h"
#include "llama-mmap.h"
#include "llama-model.h"

#include <algorithm>
#include <map>

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

llama_capsule_tables_ptr llama_capsule_tables_builtin(const llama_model & model) {
    const auto & hparams = model.hparams;

    auto res = std::make_shared<llama_capsule_tables>();

    res->architecture = llm_arch_name(model.arch);
    res->fingerprint  = llama_capsule_model_fingerprint(model);
    res->rope_type    = capsule_rope_name(hparams.rope_type);
    res->block_count  = hparams.n_layer_all;

    std::copy(hparams.rope_sections.begin(), hparams.rope_sections.begin() + 4, res->rope_sections.begin());

    // with full attention and cells of their own
    for (uint32_t il = 0; il < hparams.n_layer(); ++il) {
        if (!hparams.has_kv(il) || hparams.is_recr(il) || hparams.is_swa(il) || hparams.n_head_kv(il) == 0) {
            continue;
        }

        llama_capsule_tables::layer l = {};

        l.il            = il;
        l.rope          = llama_capsule_layer_rope(model, il);
        l.n_head_kv     = hparams.n_head_kv(il);
        l.n_embd_head_k = hparams.n_embd_head_k(il);
        l.n_embd_head_v = hparams.n_embd_head_v(il);

        const uint32_t d = std::max(l.n_embd_head_k, l.n_embd_head_v);
        if (d > llama_capsule_tables::MAX_HEAD) {
            throw llama_capsule_mismatch(format("heads of %u channels are not supported, at most %u are", d, llama_capsule_tables::MAX_HEAD));
        }
        if (l.rope) {
            res->n_rot = hparams.n_rot(il);
        }
        res->layers.push_back(std::move(l));
    }

    if (res->layers.empty()) {
        throw llama_capsule_mismatch("the model has no layer with full attention and a KV cache, there is nothing to compress");
    }

    res->init_builtin();

    return res;
}

void llama_capsule_check_model(const llama_capsule_tables & tables, const llama_model & model) {
    const auto & hparams = model.hparams;

    auto mismatch = [&](const std::string & what) {
        throw llama_capsule_mismatch(format("capsule '%s' was made for another model: %s", tables.path.c_str(), what.c_str()));
    };

    if (tables.architecture != llm_arch_name(model.arch)) {
        mismatch("architecture " + tables.architecture + ", not " + llm_arch_name(model.arch));
    }
    if (tables.block_count != hparams.n_layer_all) {
        mismatch(format("%u layers, not %u", tables.block_count, hparams.n_layer_all));
    }

    for (const auto & l : tables.layers) {
        const uint32_t n_head_kv = hparams.n_head_kv(l.il);
        if (l.n_head_kv != n_head_kv) {
            mismatch(format("layer %u has %u KV heads, the capsule %u", l.il, n_head_kv, l.n_head_kv));
        }
        if (l.n_embd_head_k != hparams.n_embd_head_k(l.il) || l.n_embd_head_v != hparams.n_embd_head_v(l.il)) {
            mismatch(format("head size of layer %u", l.il));
        }
    }

    if (tables.rope_type != capsule_rope_name(hparams.rope_type)) {
        mismatch("RoPE type " + tables.rope_type);
    }
    for (const auto & l : tables.layers) {
        if (l.rope != llama_capsule_layer_rope(model, l.il)) {
            mismatch(format("layer %u is %s RoPE", l.il, l.rope ? "without" : "with"));
        }
        if (l.rope && tables.n_rot != hparams.n_rot(l.il)) {
            mismatch(format("layer %u has RoPE on %u channels, the capsule on %u", l.il, hparams.n_rot(l.il), tables.n_rot));
        }
    }
    if (hparams.rope_type == LLAMA_ROPE_TYPE_MROPE || hparams.rope_type == LLAMA_ROPE_TYPE_IMROPE) {
        for (int i = 0; i < 4; ++i) {
            if ((int) tables.rope_sections[i] != hparams.rope_sections[i]) {
                mismatch("M-RoPE sections");
            }
        }
    }

    if (tables.fingerprint != llama_capsule_model_fingerprint(model)) {
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

static std::unique_ptr<llama_capsule_source> capsule_open(const char * path) {
    try {
        return std::make_unique<capsule_file>(path);
    } catch (const std::exception &) {
        throw std::runtime_error(format("can not open capsule '%s'", path));
    }
}

llama_capsule_tables_ptr llama_capsule_tables_load(const llama_model & model, const char * path) {
    const auto source = capsule_open(path);

    return llama_capsule_tables_read(*source, path, [&](const llama_capsule_tables & tables) { llama_capsule_check_model(tables, model); });
}
