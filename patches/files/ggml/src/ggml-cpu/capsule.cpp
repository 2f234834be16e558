#include "capsule.h"

#include "ggml-capsule.h"
#include "ggml-capsule-attn.h"
#include "ggml-capsule-encode.h"
#include "ggml-cpu-impl.h"

#include <vector>

//
// the reference of the kernels of other backends: the same phases, the threads of a group one after the other
//

static constexpr int CAPSULE_CPU_THREADS = 64;

void ggml_compute_forward_capsule(const ggml_compute_params * params, ggml_tensor * dst) {
    if (ggml_capsule_op_of(dst) >= GGML_CAPSULE_OP_TILE_ATTN) {
        ggml_compute_forward_capsule_tiles(params, dst);
        return;
    }

    static thread_local std::vector<float> shared;

    capsule_args args;
    capsule_ptrs ptrs;
    ggml_capsule_args_init(dst, CAPSULE_SHARED_DEFAULT, CAPSULE_SHARED_DEFAULT, false, args, ptrs);

    const int op = ggml_capsule_op_of(dst);

    shared.resize(args.s_size/sizeof(float));
    char * sm = (char *) shared.data();

    const capsule_threads threads = { CAPSULE_CPU_THREADS, nullptr };

    for (int item = params->ith; item < args.n_items; item += params->nth) {
        switch (op) {
            case GGML_CAPSULE_OP_UNPACK:
                if (args.tile_f32) {
                    capsule_unpack<float, float>(threads, args, ptrs, sm, item);
                } else {
                    capsule_unpack<capsule_half, capsule_half>(threads, args, ptrs, sm, item);
                }
                break;
            case GGML_CAPSULE_OP_ATTN:
                if (args.tile_f32) {
                    capsule_attn<float, float>(threads, args, ptrs, sm, item);
                } else {
                    capsule_attn<capsule_half, capsule_half>(threads, args, ptrs, sm, item);
                }
                break;
            case GGML_CAPSULE_OP_COMBINE:
                for (int c = 0; c < args.d_v; ++c) {
                    ((float *) ptrs.dst)[(int64_t) item*args.d_v + c] = capsule_combine(args, ptrs.q, item, c);
                }
                break;
            case GGML_CAPSULE_OP_ENCODE:
                capsule_encode(threads, args, ptrs, sm, item);
                break;
            case GGML_CAPSULE_OP_ERRORS:
                capsule_errors(threads, args, ptrs, sm, item);
                break;
            default:
                GGML_ABORT("fatal error");
        }
    }
}
