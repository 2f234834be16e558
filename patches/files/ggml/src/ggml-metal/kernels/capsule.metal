// GGML_OP_CAPSULE; compiled with the headers ggml-capsule-*.h in front of it, see capsule.cmake

#define CAPSULE_METAL_BUFFERS \
        constant capsule_args & args [[buffer(0)]], \
        device const char * q        [[buffer(1)]], \
        device const char * k        [[buffer(2)]], \
        device const char * v        [[buffer(3)]], \
        device const char * mask     [[buffer(4)]], \
        device const char * cold     [[buffer(5)]], \
        device const char * blob0    [[buffer(6)]], \
        device const char * blob1    [[buffer(7)]], \
        device const char * weights  [[buffer(8)]], \
        device const char * rope     [[buffer(9)]], \
        device       char * dst      [[buffer(10)]]

#define CAPSULE_METAL_PTRS { q, k, v, mask, cold, blob0, blob1, (device const float *) weights, (device const float *) rope, dst }

#define CAPSULE_METAL_KERNEL(name, ...) \
    kernel void kernel_capsule_##name( \
            CAPSULE_METAL_BUFFERS, \
            threadgroup char * sm [[threadgroup(0)]], \
            uint item [[threadgroup_position_in_grid]], \
            uint tid  [[thread_position_in_threadgroup]], \
            uint nt   [[threads_per_threadgroup]]) { \
        const capsule_threads threads = { (int) nt, (int) tid }; \
        const capsule_ptrs    ptrs    = CAPSULE_METAL_PTRS; \
        __VA_ARGS__(threads, args, ptrs, sm, (int) item); \
    }

CAPSULE_METAL_KERNEL(unpack_f16, capsule_unpack<half, half>)
CAPSULE_METAL_KERNEL(unpack_f32, capsule_unpack<float, float>)
CAPSULE_METAL_KERNEL(attn_f16,   capsule_attn<half, half>)
CAPSULE_METAL_KERNEL(attn_f32,   capsule_attn<float, float>)
CAPSULE_METAL_KERNEL(encode,     capsule_encode)
CAPSULE_METAL_KERNEL(errors,     capsule_errors)

kernel void kernel_capsule_combine(
        CAPSULE_METAL_BUFFERS,
        uint item [[threadgroup_position_in_grid]],
        uint tid  [[thread_position_in_threadgroup]],
        uint nt   [[threads_per_threadgroup]]) {
    for (int c = tid; c < args.d_v; c += nt) {
        ((device float *) dst)[(int64_t) item*args.d_v + c] = capsule_combine(args, q, item, c);
    }
}
