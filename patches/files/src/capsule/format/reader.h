#pragma once

#include "capsule/format/tables.h"

#include "llama-capsule-header.h"

#include <functional>

// the format version that a file says it has; 0 if it says nothing: it is no capsule, or damaged
uint32_t llama_capsule_file_version(llama_capsule_source & source);

// a file of format v2, or the capsule inside an mmproj
// name: of the file, for the messages. check_model sees everything but the tensors, which are not read if it throws
// throws std::runtime_error with one line: what is wrong and where
llama_capsule_tables_ptr llama_capsule_tables_read(
        llama_capsule_source & source,
        const std::string    & name,
        const std::function<void(const llama_capsule_tables &)> & check_model);
