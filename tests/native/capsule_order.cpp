// the phases of GGML_OP_CAPSULE with any number of threads, in any order: a shared library for test_capsule_phases.py
#include "ggml-capsule-attn.h"
#include "ggml-capsule-encode.h"
#include "ggml-capsule.h"

#include <vector>

template <typename T, typename U>
static void run_item(const ggml_tensor * op, capsule_threads threads, const capsule_args & args, capsule_ptrs ptrs, char * sm, int item) {
    if (ggml_capsule_op_of(op) == GGML_CAPSULE_OP_UNPACK) {
        capsule_unpack<T, U>(threads, args, ptrs, sm, item);
    } else if (ggml_capsule_op_of(op) == GGML_CAPSULE_OP_ENCODE) {
        capsule_encode(threads, args, ptrs, sm, item);
    } else if (ggml_capsule_op_of(op) == GGML_CAPSULE_OP_ERRORS) {
        capsule_errors(threads, args, ptrs, sm, item);
    } else {
        capsule_attn<T, U>(threads, args, ptrs, sm, item);
    }
}

// returns the bytes of shared memory, of which there are max_shared, for the vectors of many queries most_shared; mma: with what stands for tensor cores here
extern "C" int capsule_run(const ggml_tensor * op, int n_threads, const int * order, int max_shared, int most_shared, int mma) {
    capsule_args args;
    capsule_ptrs ptrs;
    ggml_capsule_args_init(op, max_shared, most_shared, mma, args, ptrs);

    // what a phase has not written is not to be relied on
    std::vector<float> shared(args.s_size/sizeof(float), NAN);
    char * sm = (char *) shared.data();

    const capsule_threads threads = { n_threads, order };

    for (int item = 0; item < args.n_items; ++item) {
        if (args.tile_f32) {
            run_item<float, float>(op, threads, args, ptrs, sm, item);
        } else if (args.mma) {
            run_item<capsule_half, float>(op, threads, args, ptrs, sm, item);
        } else {
            run_item<capsule_half, capsule_half>(op, threads, args, ptrs, sm, item);
        }
    }
    return (args.mma || args.mma_v) == mma ? args.s_size : -1;
}

// the parts that ggml_capsule_attn() combines
extern "C" const ggml_tensor * capsule_parts(const ggml_tensor * combined) {
    return combined->src[0];
}
