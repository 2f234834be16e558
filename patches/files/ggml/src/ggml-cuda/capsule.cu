#include "capsule.cuh"

#include "../ggml-capsule-attn.h"
#include "../ggml-capsule-encode.h"
#include "ggml-capsule.h"

// compiled, never run on a GPU so far: libllama takes this path only on request (LLAMA_KVCAPSULE_PATH=op)

static constexpr int CAPSULE_CUDA_THREADS = 128;
static constexpr int CAPSULE_CUDA_BLOCKS  = 4; // on a multiprocessor: shared memory allows 1 to 5, registers are no limit then
static constexpr int CAPSULE_CUDA_WIDE    = 256; // threads of a block that has most of a multiprocessor's shared memory to itself

extern __shared__ __align__(32) char capsule_shared[]; // tensor cores want that

template <typename T, typename U>
static __global__ void __launch_bounds__(CAPSULE_CUDA_THREADS, CAPSULE_CUDA_BLOCKS) capsule_unpack_kernel(const capsule_args args, const capsule_ptrs ptrs) {
    capsule_unpack<T, U>({ CAPSULE_CUDA_THREADS, (int) threadIdx.x }, args, ptrs, capsule_shared, blockIdx.x);
}

template <typename T, typename U>
static __global__ void __launch_bounds__(CAPSULE_CUDA_THREADS, CAPSULE_CUDA_BLOCKS) capsule_attn_kernel(const capsule_args args, const capsule_ptrs ptrs) {
    capsule_attn<T, U>({ CAPSULE_CUDA_THREADS, (int) threadIdx.x }, args, ptrs, capsule_shared, blockIdx.x);
}

static __global__ void __launch_bounds__(CAPSULE_CUDA_WIDE, 1) capsule_attn_wide_kernel(const capsule_args args, const capsule_ptrs ptrs) {
    capsule_attn<half, half>({ CAPSULE_CUDA_WIDE, (int) threadIdx.x }, args, ptrs, capsule_shared, blockIdx.x);
}

static __global__ void __launch_bounds__(CAPSULE_CUDA_THREADS, CAPSULE_CUDA_BLOCKS) capsule_encode_kernel(const capsule_args args, const capsule_ptrs ptrs) {
    capsule_encode({ CAPSULE_CUDA_THREADS, (int) threadIdx.x }, args, ptrs, capsule_shared, blockIdx.x);
}

static __global__ void __launch_bounds__(CAPSULE_CUDA_THREADS, CAPSULE_CUDA_BLOCKS) capsule_errors_kernel(const capsule_args args, const capsule_ptrs ptrs) {
    capsule_errors({ CAPSULE_CUDA_THREADS, (int) threadIdx.x }, args, ptrs, capsule_shared, blockIdx.x);
}

static __global__ void capsule_combine_kernel(const capsule_args args, const capsule_ptrs ptrs) {
    for (int c = threadIdx.x; c < args.d_v; c += blockDim.x) {
        ((float *) ptrs.dst)[(int64_t) blockIdx.x*args.d_v + c] = capsule_combine(args, ptrs.q, blockIdx.x, c);
    }
}

// a function per kernel: CUDA_SET_SHARED_MEMORY_LIMIT() remembers where it was called, not for what
template <void (*kernel)(const capsule_args, const capsule_ptrs), int n_threads = CAPSULE_CUDA_THREADS>
static void capsule_launch(ggml_backend_cuda_context & ctx, const capsule_args & args, const capsule_ptrs & ptrs) {
    CUDA_SET_SHARED_MEMORY_LIMIT(kernel, ggml_cuda_info().devices[ctx.device].smpbo);

    kernel<<<args.n_items, n_threads, args.s_size, ctx.stream()>>>(args, ptrs);
    CUDA_CHECK(cudaGetLastError());
}

static void capsule_args_init(int device, const ggml_tensor * op, capsule_args & args, capsule_ptrs & ptrs) {
    const auto & info = ggml_cuda_info().devices[device];

    // tensor cores: not on other vendors' devices
    ggml_capsule_args_init(op, CAPSULE_SHARED_DEFAULT, info.smpbo, GGML_CUDA_CC_IS_NVIDIA(info.cc) && info.cc >= GGML_CUDA_CC_TURING, args, ptrs);
}

void ggml_cuda_capsule(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    capsule_args args;
    capsule_ptrs ptrs;
    capsule_args_init(ctx.device, dst, args, ptrs);

    switch (ggml_capsule_op_of(dst)) {
        case GGML_CAPSULE_OP_UNPACK:
            if (args.tile_f32) {
                capsule_launch<capsule_unpack_kernel<float, float>>(ctx, args, ptrs);
            } else if (args.mma) {
                capsule_launch<capsule_unpack_kernel<half, float>>(ctx, args, ptrs);
            } else {
                capsule_launch<capsule_unpack_kernel<half, half>>(ctx, args, ptrs);
            }
            break;
        case GGML_CAPSULE_OP_ATTN:
            if (args.tile_f32) {
                capsule_launch<capsule_attn_kernel<float, float>>(ctx, args, ptrs);
            } else if (args.mma) {
                capsule_launch<capsule_attn_kernel<half, float>>(ctx, args, ptrs);
            } else if (args.s_size > CAPSULE_SHARED_DEFAULT) {
                capsule_launch<capsule_attn_wide_kernel, CAPSULE_CUDA_WIDE>(ctx, args, ptrs);
            } else {
                capsule_launch<capsule_attn_kernel<half, half>>(ctx, args, ptrs);
            }
            break;
        case GGML_CAPSULE_OP_COMBINE:
            capsule_launch<capsule_combine_kernel>(ctx, args, ptrs);
            break;
        case GGML_CAPSULE_OP_ENCODE:
            capsule_launch<capsule_encode_kernel>(ctx, args, ptrs);
            break;
        case GGML_CAPSULE_OP_ERRORS:
            capsule_launch<capsule_errors_kernel>(ctx, args, ptrs);
            break;
        default:
            GGML_ABORT("fatal error");
    }
}

bool ggml_cuda_capsule_supported(int device, const ggml_tensor * op) {
    if (ggml_capsule_op_of(op) >= GGML_CAPSULE_OP_TILE_ATTN) {
        return false;
    }

    capsule_args args;
    capsule_ptrs ptrs;
    capsule_args_init(device, op, args, ptrs);

    return (size_t) args.s_size <= ggml_cuda_info().devices[device].smpbo;
}
