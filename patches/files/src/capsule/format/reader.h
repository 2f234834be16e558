#pragma once

#include "capsule/format/tables.h"

#include "capsule/format/header.h"

#include <functional>

// a capsule file, or the capsule inside an mmproj
// name: of the file, for the messages. check_model sees everything but the tensors, which are not read if it throws
// throws std::runtime_error with one line: what is wrong and where
llama_capsule_tables_ptr llama_capsule_tables_read(
        llama_capsule_source & source,
        const std::string    & name,
        const std::function<void(const llama_capsule_tables &)> & check_model);
