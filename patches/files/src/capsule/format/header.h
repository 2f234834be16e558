#pragma once

#include "ggml.h"
#include "gguf.h"

#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

// the bytes of a capsule file, wherever they are
struct llama_capsule_source {
    virtual ~llama_capsule_source() = default;

    virtual uint64_t size() const = 0;

    // throws if not all of the n bytes are there
    virtual void read(uint64_t offset, void * dst, size_t n) = 0;
};

// the outline of a GGUF header. It is read before ggml's parser, which allocates what the counts and lengths of the file ask for;
// values are left to that parser
struct llama_capsule_header {
    struct key {
        gguf_type type; // of the elements of an array
        bool      is_array;
        uint64_t  n;
        uint32_t  u32 = 0; // the value, if it is a single one of this type
    };

    struct tensor {
        std::string name;
        ggml_type   type;

        std::array<int64_t, 4> ne;

        uint64_t offset; // from the start of the file
        uint64_t size;
    };

    uint64_t n_keys = 0;
    uint64_t n_end  = 0; // the header proper ends here, the data starts at the next multiple of the alignment
    uint64_t n_data = 0;

    std::map<std::string, key> keys;    // general.*, adapter.* and kvcapsule.*
    std::string                foreign; // a key outside of these, if there is one

    std::vector<tensor> tensors; // in the order of their data, one after the other

    size_t alignment = GGUF_DEFAULT_ALIGNMENT;

    // throws std::runtime_error: the reason, without the name of the file
    explicit llama_capsule_header(llama_capsule_source & source);

    const tensor * find(const std::string & name) const;

    // the bytes of a sidecar are all accounted for: nothing but zeros between and behind the tensors
    void check_cover(llama_capsule_source & source) const;
};
