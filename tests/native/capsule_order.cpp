// the phases of GGML_OP_CAPSULE with any number of threads, in any order: a shared library for test_capsule_phases.py
#include "ggml-capsule-attn.h"
#include "ggml-capsule.h"

#include <vector>

// returns the bytes of shared memory, of which there are max_shared
extern "C" int capsule_run(const ggml_tensor * op, int n_threads, const int * order, int max_shared) {
    capsule_args args;
    capsule_ptrs ptrs;
    ggml_capsule_args_init(op, max_shared, args, ptrs);

    // what a phase has not written is not to be relied on
    std::vector<float> shared(args.s_size/sizeof(float), NAN);
    char * sm = (char *) shared.data();

    const capsule_threads threads = { n_threads, order };

    for (int item = 0; item < args.n_items; ++item) {
        if (ggml_capsule_op_of(op) == GGML_CAPSULE_OP_UNPACK) {
            args.tile_f32 ? capsule_unpack<float>(threads, args, ptrs, sm, item) : capsule_unpack<capsule_half>(threads, args, ptrs, sm, item);
        } else {
            args.tile_f32 ? capsule_attn<float>(threads, args, ptrs, sm, item) : capsule_attn<capsule_half>(threads, args, ptrs, sm, item);
        }
    }
    return args.s_size;
}

// the parts that ggml_capsule_attn() combines
extern "C" const ggml_tensor * capsule_parts(const ggml_tensor * combined) {
    return combined->src[0];
}
