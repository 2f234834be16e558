#pragma once

#include "llama.h"

#include <string>

struct llama_context;

class llama_kv_cache;

// the KV cache of the layers with full attention, nullptr if there is none of a known kind
llama_kv_cache * llama_capsule_find_kv(llama_memory_t memory);

// the same, nullptr and a reason if the model or the context is not supported
llama_kv_cache * llama_capsule_resolve(const llama_context & lctx, llama_memory_t memory, std::string & reason);
