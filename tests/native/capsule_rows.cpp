// The quantizers and the Hadamard rotation of the machine and in plain C++, for tests/test_capsule_rows.py
#include "llama-capsule-simd.h"

// x [n][d]; dst: n rows
extern "C" void quantize(int simd, int type, const float * x, uint8_t * dst, int n, int d) {
    const auto fn = simd ? llama_capsule_simd_get().from_float : llama_capsule_row_quantize;

    for (int i = 0; i < n; ++i) {
        fn((ggml_type) type, x + i*d, dst + i*ggml_row_size((ggml_type) type, d), d);
    }
}

extern "C" void rotate(int simd, float * x, int size, int n_values) {
    const auto fn = simd ? llama_capsule_simd_get().hadamard : llama_capsule_hadamard;

    fn(x, size, n_values);
}
