#pragma once

#include "capsule/format/tables.h"
#include "capsule/hooks.h"

#include "llama-capsule.h"

#include <memory>

struct llama_context;

class llama_kv_cache;

struct llama_capsule_cache_params {
    llama_capsule_tables_ptr tables;

    uint32_t n_hot;        // cells of the hot cache, to begin with
    float    quality;      // the score that a tile may have
    int32_t  i_tier;       // >= 0: this tier for all tiles, whatever their score
    uint32_t image_tokens; // of an image, where its positions do not tell; 0: not known

    bool auto_compress;

    llama_capsule_image_attention image_attention;
};

// throws std::runtime_error with one line if the context can not have it
std::shared_ptr<llama_capsule_memory> llama_capsule_cache_create(llama_context & lctx, llama_kv_cache & kv, const llama_capsule_cache_params & params);
