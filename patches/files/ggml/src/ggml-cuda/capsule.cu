#include "capsule.cuh"
#include "capsule-tiles.cuh"

#include "../ggml-capsule/op.h"

// compiled, and run on a CPU; never on a GPU so far: libllama takes this path only on request (LLAMA_KVCAPSULE_PATH=op)

static constexpr int CAPSULE_MAX_THREADS = GGML_CAPSULE_LANES*GGML_CAPSULE_MAX_GROUPS/CAPSULE_WARP*CAPSULE_WARP + CAPSULE_WARP;
static constexpr int CAPSULE_ROW_THREADS = 128; // of a row of the result

extern __shared__ __align__(16) char capsule_memory[];

static __global__ void __launch_bounds__(CAPSULE_MAX_THREADS, 1) capsule_unpack_kernel(const capsule_tile_args args) {
    capsule_unpack(args, capsule_memory);
}

static __global__ void __launch_bounds__(CAPSULE_MAX_THREADS, 1) capsule_attn_kernel(const capsule_tile_args args) {
    capsule_attend(args, capsule_memory);
}

static __global__ void capsule_combine_kernel(const capsule_tile_args args) {
    capsule_combine(args);
}

static bool capsule_type_of(ggml_type type, int & res) {
    switch (type) {
        case GGML_TYPE_F32:  res = CAPSULE_F32;  return true;
        case GGML_TYPE_F16:  res = CAPSULE_F16;  return true;
        case GGML_TYPE_BF16: res = CAPSULE_BF16; return true;
        default:             return false;
    }
}

static bool capsule_tensor_of(const ggml_tensor * t, capsule_tensor & res) {
    res = { (const char *) t->data, CAPSULE_F32, (int64_t) t->nb[0], (int64_t) t->nb[1], (int64_t) t->nb[2] };

    return capsule_type_of(t->type, res.type);
}

// false: there are no kernels for this node
static bool capsule_args_of(const ggml_tensor * op, capsule_tile_args & args) {
    args = {};
    memcpy(&args.p, op->op_params, sizeof(args.p));

    const auto & p      = args.p;
    const bool   halves = !(p.flags & GGML_CAPSULE_FLAG_NORM);

    args.k = { p.d_k, p.n_rot, halves };
    args.v = { p.d_v, 0, halves };

    const int n_groups = std::max(ggml_capsule_n_groups(args.k), ggml_capsule_n_groups(args.v));

    args.n_threads = GGML_PAD(GGML_CAPSULE_LANES*n_groups, CAPSULE_WARP);
    args.ld_angles = 2*GGML_CAPSULE_LANES*ggml_capsule_n_groups(args.k);

    bool res = capsule_tensor_of(op, args.dst) && !(p.flags & (GGML_CAPSULE_FLAG_ROT_K | GGML_CAPSULE_FLAG_ROT_V | GGML_CAPSULE_FLAG_WHOLE));

    const auto * const * src = op->src;
    if (p.op == GGML_CAPSULE_OP_TILE_COMBINE) {
        args.n_head   = op->ne[0]/p.d_v;
        args.n_tokens = op->ne[1];
        return capsule_tensor_of(src[CAPSULE_TILE_SRC_Q], args.q) && res;
    }

    args.n_slots = src[CAPSULE_TILE_SRC_SLOTS]->ne[0];
    args.pool    = (const uint8_t *) src[CAPSULE_TILE_SRC_POOL]->data;
    args.slots   = (const int32_t *) src[CAPSULE_TILE_SRC_SLOTS]->data;
    args.tables  = (const uint8_t *) src[CAPSULE_TILE_SRC_TABLES]->data;
    args.angles  = src[CAPSULE_TILE_SRC_ANGLES] ? (const float *) src[CAPSULE_TILE_SRC_ANGLES]->data : nullptr;

    if (p.op == GGML_CAPSULE_OP_TILE_UNPACK) {
        // one row for each channel, whatever lies beside each other in memory
        if ((p.flags & GGML_CAPSULE_FLAG_V) && (p.flags & GGML_CAPSULE_FLAG_V_TRANS)) {
            std::swap(args.dst.nb0, args.dst.nb1);
        }
        return res && op->type != GGML_TYPE_BF16;
    }

    args.n_head   = src[CAPSULE_TILE_SRC_Q]->ne[1];
    args.n_tokens = src[CAPSULE_TILE_SRC_Q]->ne[2];
    args.n_kv     = src[CAPSULE_TILE_SRC_K]->ne[2];
    args.seen     = { (const char *) src[CAPSULE_TILE_SRC_SEEN]->data, 0, 1, (int64_t) src[CAPSULE_TILE_SRC_SEEN]->nb[1], 0 };

    res = capsule_tensor_of(src[CAPSULE_TILE_SRC_Q],    args.q)     && res;
    res = capsule_tensor_of(src[CAPSULE_TILE_SRC_K],    args.hot_k) && res;
    res = capsule_tensor_of(src[CAPSULE_TILE_SRC_V],    args.hot_v) && res;
    res = capsule_tensor_of(src[CAPSULE_TILE_SRC_MASK], args.mask)  && res;
    res = capsule_tensor_of(src[CAPSULE_TILE_SRC_COLD], args.cold)  && res;

    if (p.flags & GGML_CAPSULE_FLAG_V_TRANS) {
        std::swap(args.hot_v.nb0, args.hot_v.nb2);
    }
    return res;
}

// a function for each kernel: CUDA_SET_SHARED_MEMORY_LIMIT() remembers where it was called, not for what
template <void (*kernel)(const capsule_tile_args)>
static void capsule_launch(ggml_backend_cuda_context & ctx, const capsule_tile_args & args, dim3 grid, int n_threads, size_t n_shared) {
    CUDA_SET_SHARED_MEMORY_LIMIT(kernel, ggml_cuda_info().devices[ctx.device].smpbo);

    kernel<<<grid, n_threads, n_shared, ctx.stream()>>>(args);
    CUDA_CHECK(cudaGetLastError());
}

void ggml_cuda_capsule(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    capsule_tile_args args;
    GGML_ASSERT(capsule_args_of(dst, args));

    const auto & p = args.p;

    const int n_all = args.n_head/p.n_head_kv*args.n_tokens;

    switch (p.op) {
        case GGML_CAPSULE_OP_TILE_UNPACK:
            capsule_launch<capsule_unpack_kernel>(ctx, args, dim3(args.n_slots, p.n_head_kv, 1), args.n_threads, capsule_unpack_shared(args.n_threads));
            break;
        case GGML_CAPSULE_OP_TILE_ATTN:
            capsule_launch<capsule_attn_kernel>(ctx, args, dim3(p.n_head_kv, p.n_parts, (n_all + CAPSULE_QUERIES - 1)/CAPSULE_QUERIES), args.n_threads,
                    capsule_attn_shared(p, args.n_threads));
            break;
        case GGML_CAPSULE_OP_TILE_COMBINE:
            capsule_launch<capsule_combine_kernel>(ctx, args, dim3(args.n_head*args.n_tokens, 1, 1), CAPSULE_ROW_THREADS, 0);
            break;
        default:
            GGML_ABORT("fatal error");
    }
}

bool ggml_cuda_capsule_supported(int device, const ggml_tensor * op) {
    capsule_tile_args args;
    if (!capsule_args_of(op, args)) {
        return false;
    }
    const size_t n_shared = args.p.op == GGML_CAPSULE_OP_TILE_UNPACK ? capsule_unpack_shared(args.n_threads) :
                            args.p.op == GGML_CAPSULE_OP_TILE_ATTN   ? capsule_attn_shared(args.p, args.n_threads) : 0;

    return n_shared <= ggml_cuda_info().devices[device].smpbo;
}
