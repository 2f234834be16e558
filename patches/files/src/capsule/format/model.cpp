// what binds tables to a model

#include "capsule/format/reader.h"

#include "llama-arch.h"
#include "llama-capsule-file.h"
#include "llama-capsule-kv.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>

llama_capsule_tables_ptr llama_capsule_tables_builtin(const llama_model & model) {
    const auto & hparams = model.hparams;

    auto res = std::make_shared<llama_capsule_tables>();

    res->architecture = llm_arch_name(model.arch);
    res->fingerprint  = llama_capsule_model_fingerprint(model);
    res->rope_type    = llama_capsule_rope_name(hparams.rope_type);
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

    if (tables.rope_type != llama_capsule_rope_name(hparams.rope_type)) {
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

llama_capsule_tables_ptr llama_capsule_tables_load(const llama_model & model, const char * path) {
    const auto source = llama_capsule_open(path);

    return llama_capsule_tables_read(*source, path, [&](const llama_capsule_tables & tables) { llama_capsule_check_model(tables, model); });
}
