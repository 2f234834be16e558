#include "attn.h"

#include "general.h"

// what the integer kernels leave to it
static void general(const ggml_capsule_attn_args * args, int head, int first, int last, const ggml_capsule_attn_sums * sums, void * work) {
    if (!args->k_transform.is_dct(GGML_CAPSULE_SIDE, GGML_CAPSULE_SIDE) || !args->v_transform.is_dct(GGML_CAPSULE_SIDE, GGML_CAPSULE_SIDE)) {
        capsule_general(*args, head, work).run(first, last, *sums);
    }
}

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__) || defined(__aarch64__) && defined(__GNUC__)

#include "attn-kernel.h"

#if defined(__AVX512BW__) && defined(__AVX512VNNI__) && !defined(GGML_CAPSULE_NO_512)
typedef capsule_kernel<capsule_v32> kernel;
#else
typedef capsule_kernel<capsule_v16> kernel;
#endif

size_t ggml_capsule_attn_work(const ggml_capsule_attn_args * args) {
    return std::max({ kernel::work_size(*args), capsule_general::work_size(*args), ggml_capsule_attn_work_plain(args) });
}

void ggml_capsule_attn_tiles(const ggml_capsule_attn_args * args, int head, int first, int last, const ggml_capsule_attn_sums * sums, void * work) {
    general(args, head, first, last, sums, work);
    kernel(*args, head, work).run(first, last, *sums);
}

#else

size_t ggml_capsule_attn_work(const ggml_capsule_attn_args * args) {
    return std::max(capsule_general::work_size(*args), ggml_capsule_attn_work_plain(args));
}

void ggml_capsule_attn_tiles(const ggml_capsule_attn_args * args, int head, int first, int last, const ggml_capsule_attn_sums * sums, void * work) {
    general(args, head, first, last, sums, work);
    for (int is = first; is < last; ++is) {
        if (!capsule_general::takes(*args, args->slots[is])) {
            ggml_capsule_attn_tiles_plain(args, head, is, is + 1, sums, work);
        }
    }
}

#endif
