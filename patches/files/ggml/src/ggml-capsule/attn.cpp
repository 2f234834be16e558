#include "attn.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

#include "attn-kernel.h"

#if defined(__AVX512BW__) && defined(__AVX512VNNI__) && !defined(GGML_CAPSULE_NO_512)
typedef capsule_kernel<capsule_v32> kernel;
#else
typedef capsule_kernel<capsule_v16> kernel;
#endif

size_t ggml_capsule_attn_work(const ggml_capsule_attn_args * args) {
    return std::max(kernel::work_size(*args), ggml_capsule_attn_work_plain(args));
}

void ggml_capsule_attn_tiles(const ggml_capsule_attn_args * args, int head, int first, int last, const ggml_capsule_attn_sums * sums, void * work) {
    kernel(*args, head, work).run(first, last, *sums);
}

#else

size_t ggml_capsule_attn_work(const ggml_capsule_attn_args * args) {
    return ggml_capsule_attn_work_plain(args);
}

void ggml_capsule_attn_tiles(const ggml_capsule_attn_args * args, int head, int first, int last, const ggml_capsule_attn_sums * sums, void * work) {
    ggml_capsule_attn_tiles_plain(args, head, first, last, sums, work);
}

#endif
