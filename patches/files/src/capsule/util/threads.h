#pragma once

#include "ggml-cpp.h"

#include <cstddef>
#include <functional>

// work that is shared by the threads of a CPU backend
class llama_capsule_threads {
public:
    llama_capsule_threads();

    // calls fn(i) for every i < n, in any order and from n_threads threads; what they throw is thrown here
    void run(int n_threads, size_t n, const std::function<void(size_t)> & fn) const;

private:
    ggml_backend_ptr backend;
};
