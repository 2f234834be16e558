#pragma once

#include "capsule/format/tables.h"

#include <string>

struct llama_model;

//
// what binds tables to a model
//

// sha256 over what shapes the K and V of a model, as 64 hex digits
std::string llama_capsule_model_fingerprint(const llama_model & model);

// for any model, without a file
// throws llama_capsule_mismatch: why there is none for this one
llama_capsule_tables_ptr llama_capsule_tables_builtin(const llama_model & model);

// from a file, checked, for this model
// throws std::runtime_error: what is wrong and where; llama_capsule_mismatch if the file is for another model
llama_capsule_tables_ptr llama_capsule_tables_load(const llama_model & model, const char * path);

// throws llama_capsule_mismatch
void llama_capsule_check_model(const llama_capsule_tables & tables, const llama_model & model);
