#pragma once

#include "ggml.h"

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

//
// rows of floats
//

// memory for vectors: aligned to cache lines, grows only, the contents are lost when it does
template<typename T>
class llama_capsule_buf {
public:
    T * resize(size_t n) {
        if (n > size) {
            ptr.reset((T *) ::operator new(n*sizeof(T), std::align_val_t(64)));
            size = n;
        }
        return ptr.get();
    }

    T * data() const {
        return ptr.get();
    }

private:
    struct deleter {
        void operator()(T * p) const {
            ::operator delete(p, std::align_val_t(64));
        }
    };

    std::unique_ptr<T, deleter> ptr;

    size_t size = 0;
};

// of any type that a KV cache may have
void llama_capsule_to_float(ggml_type type, const void * src, float * dst, size_t n);

// largest power of two that divides d: rows of d values are rotated by the Hadamard matrix of this size
uint32_t llama_capsule_hadamard_size(uint32_t d);

// in-place normalised Hadamard transform of each run of n values
void llama_capsule_hadamard(float * x, uint32_t n, size_t n_values);

// turns the pairs of n rows by their angles [n][n_rot]: (cos, sin) for pairs of neighbours (norm), or all cos, then all sin, for pairs of halves
void llama_capsule_turn(uint32_t n, float * x, size_t ld, const float * cs, uint32_t n_rot, bool norm);
