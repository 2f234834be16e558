// The CUDA kernels of GGML_OP_CAPSULE on a CPU, for tests/test_tile_cuda.py.

#include "cuda_on_cpu.h"

#include "ggml-cuda/capsule-tiles.cuh"

static bool launch(const capsule_tile_args & args, uint3 grid, size_t n_shared, void (*kernel)(const capsule_tile_args &, char *)) {
    // what a kernel finds in shared memory, and behind what it has asked for
    std::vector<char> shared(n_shared + 4096, (char) 0xff);

    return cuda_on_cpu::run(grid, args.n_threads, [&]() { kernel(args, shared.data()); }, [&]() {
        std::fill(shared.begin(), shared.end(), (char) 0xff);
    }) && std::all_of(shared.begin() + n_shared, shared.end(), [](char c) { return c == (char) 0xff; });
}

extern "C" size_t tile_args_size() { return sizeof(capsule_tile_args); }

extern "C" bool tile_unpack(const capsule_tile_args * args) {
    return launch(*args, { (unsigned) args->n_slots, args->p.n_head_kv, 1 }, capsule_unpack_shared(args->n_threads), capsule_unpack);
}

extern "C" bool tile_attn(const capsule_tile_args * args) {
    const int n_all = args->n_head/args->p.n_head_kv*args->n_tokens;

    return launch(*args, { args->p.n_head_kv, args->p.n_parts, (unsigned) (n_all + CAPSULE_QUERIES - 1)/CAPSULE_QUERIES },
            capsule_attn_shared(args->p, args->n_threads), capsule_attend);
}

extern "C" bool tile_combine(const capsule_tile_args * args) {
    return launch(*args, { (unsigned) (args->n_head*args->n_tokens), 1, 1 }, 0, [](const capsule_tile_args & args, char *) { capsule_combine(args); });
}
