// what ggml.c and llama-impl.cpp refer to, but the loader never calls: saves building ggml's backends with sanitizers

#include "ggml-backend.h"
#include "llama-mmap.h"

#include <cstdlib>

void ggml_backend_tensor_set(ggml_tensor *, const void *, size_t, size_t) {
    abort();
}

void ggml_backend_tensor_get(const ggml_tensor *, void *, size_t, size_t) {
    abort();
}

void ggml_backend_tensor_memset(ggml_tensor *, uint8_t, size_t, size_t) {
    abort();
}

ggml_backend_buffer_usage ggml_backend_buffer_get_usage(ggml_backend_buffer_t) {
    abort();
}

bool ggml_backend_buffer_is_host(ggml_backend_buffer_t) {
    abort();
}

void llama_prefetch(llama_memory_ranges) {
    abort();
}
