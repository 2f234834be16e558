// what llama.cpp's own accounts say of a context, for tests/test_memory.py: the C API only prints it

#include "llama-ext.h"

extern "C" size_t context_bytes(const llama_context * ctx) {
    size_t res = 0;
    for (const auto & [buft, data] : llama_get_memory_breakdown(ctx)) {
        res += data.context;
    }
    return res;
}
