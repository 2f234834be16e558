#pragma once

#include "capsule/format/header.h"

#include <cstring>
#include <stdexcept>

// a capsule file in memory
struct memory_source : llama_capsule_source {
    const uint8_t * data;
    uint64_t        n;

    memory_source(const uint8_t * data, uint64_t n) : data(data), n(n) {}

    uint64_t size() const override {
        return n;
    }

    void read(uint64_t offset, void * dst, size_t n_read) override {
        if (offset > n || n_read > n - offset) {
            // the loader checks what it reads against the size of the file
            throw std::logic_error("a read behind the end of the file");
        }
        if (n_read > 0) {
            memcpy(dst, data + offset, n_read);
        }
    }
};
