#include "capsule/model/resolve.h"

#include "llama-arch.h"
#include "llama-context.h"
#include "llama-impl.h"
#include "llama-kv-cache.h"
#include "llama-kv-cache-iswa.h"
#include "llama-memory-hybrid.h"
#include "llama-memory-hybrid-idx.h"
#include "llama-memory-hybrid-iswa.h"
#include "llama-memory-recurrent.h"
#include "llama-model.h"

// what tests/test_architectures.py compares with the unpatched library
static bool capsule_arch_is_tested(llm_arch arch) {
    switch (arch) {
        case LLM_ARCH_LLAMA:
        case LLM_ARCH_LLAMA4:
        case LLM_ARCH_MISTRAL3:
        case LLM_ARCH_DECI:
        case LLM_ARCH_SMOLLM3:
        case LLM_ARCH_QWEN2:
        case LLM_ARCH_QWEN2VL:
        case LLM_ARCH_PADDLEOCR:
        case LLM_ARCH_QWEN3:
        case LLM_ARCH_QWEN3MOE:
        case LLM_ARCH_QWEN3VL:
        case LLM_ARCH_QWEN3VLMOE:
        case LLM_ARCH_QWEN35:
        case LLM_ARCH_GEMMA:
        case LLM_ARCH_GEMMA2:
        case LLM_ARCH_GEMMA3:
        case LLM_ARCH_GEMMA4:
        case LLM_ARCH_GRANITE:
        case LLM_ARCH_GRANITE_HYBRID:
        case LLM_ARCH_INTERNLM2:
        case LLM_ARCH_LFM2:
        case LLM_ARCH_PHI3:
            return true;
        default:
            return false;
    }
}

llama_kv_cache * llama_capsule_find_kv(llama_memory_t memory) {
    // derives from llama_memory_hybrid, but its attention is its own
    if (dynamic_cast<llama_memory_hybrid_idx *>(memory)) {
        return nullptr;
    }
    if (auto * hybrid = dynamic_cast<llama_memory_hybrid *>(memory)) {
        return hybrid->get_mem_attn();
    }
    if (auto * hybrid = dynamic_cast<llama_memory_hybrid_iswa *>(memory)) {
        return hybrid->get_mem_attn()->get_base();
    }
    // layers with a sliding window forget by themselves
    if (auto * iswa = dynamic_cast<llama_kv_cache_iswa *>(memory)) {
        return iswa->get_base();
    }
    return dynamic_cast<llama_kv_cache *>(memory);
}

llama_kv_cache * llama_capsule_resolve(const llama_context & lctx, llama_memory_t memory, std::string & reason) {
    const auto & model   = lctx.get_model();
    const auto & hparams = model.hparams;

    auto * kv = llama_capsule_find_kv(memory);

    reason.clear();

    if (!memory) {
        reason = "the model has no KV cache (an encoder)";
    } else if (dynamic_cast<llama_memory_recurrent *>(memory)) {
        reason = "a recurrent model has no KV cache";
    } else if (hparams.is_mla()) {
        reason = "MLA is not supported";
    } else if (!kv) {
        reason = "attention with a cache of its own (sparse or compressed) is not supported";
    } else if (kv->get_layer_ids().empty()) {
        reason = "every layer has a sliding window, there is nothing to compress";
    } else if (hparams.use_alibi) {
        reason = "ALiBi is not supported";
    } else if (hparams.n_pos_per_embd() > 1 && hparams.rope_sections[3] > 0) {
        reason = "M-RoPE with a fourth section is not supported, the KV cache does not keep its position";
    } else if (lctx.get_cparams().ctx_other) {
        reason = "contexts that share the cells of another one are not supported";
    } else if (!capsule_arch_is_tested(model.arch)) {
        reason = format("the architecture '%s' is not supported", llm_arch_name(model.arch));
    } else if (kv->get_n_stream() > 1) {
        reason = "several streams are not supported, use a unified KV cache (--kv-unified)";
    } else if (model.split_mode() == LLAMA_SPLIT_MODE_TENSOR) {
        reason = "tensor split is not supported";
    } else if (lctx.get_cparams().training) {
        reason = "training is not supported";
    }

    return reason.empty() ? kv : nullptr;
}
