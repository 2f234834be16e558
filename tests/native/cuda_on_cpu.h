#pragma once

#include "ggml-capsule/half.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#include <ucontext.h>

//
// As much of CUDA as our kernels use, on a CPU: the threads of a block are fibers that take turns. A barrier that not all threads reach never ends: it is reported.
//

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline

struct float2 { float x, y; };
struct uint3  { unsigned x, y, z; };

inline float2 make_float2(float x, float y) { return { x, y }; }

struct half { uint16_t bits; };

inline half     __ushort_as_half(uint16_t bits) { return { bits }; }
inline uint16_t __half_as_ushort(half x)        { return x.bits; }
inline float    __half2float(half x)            { return ggml_capsule_from_half(x.bits); }
inline half     __float2half_rn(float x)        { return { ggml_capsule_to_half(x) }; }

inline float __uint_as_float(uint32_t bits) {
    float res;
    memcpy(&res, &bits, sizeof(res));
    return res;
}

inline float cospif(float x)                 { return (float) std::cos(3.14159265358979323846*x); }
inline int   __popcll(unsigned long long x)  { return __builtin_popcountll(x); }

static uint3 threadIdx, blockIdx, blockDim;

namespace cuda_on_cpu {

struct barrier {
    int waiting    = 0;
    int generation = 0;
};

struct block {
    static constexpr int    WARP  = 32;
    static constexpr size_t STACK = 256*1024;

    struct fiber {
        ucontext_t              context;
        std::unique_ptr<char[]> stack;
        bool                    done = false;
    };

    std::vector<fiber> fibers;
    ucontext_t         scheduler;

    barrier              all;
    std::vector<barrier> warps;
    std::vector<float>   lanes; // what the threads of a warp show each other
    bool                 moved; // since the scheduler has looked last

    std::function<void()> kernel;

    void yield() {
        const unsigned id = threadIdx.x;
        swapcontext(&fibers[id].context, &scheduler);
        threadIdx.x = id;
    }

    void wait(barrier & b, int n) {
        moved = true;
        if (++b.waiting == n) {
            b.waiting = 0;
            ++b.generation;
            return;
        }
        for (const int generation = b.generation; b.generation == generation;) {
            yield();
        }
        moved = true;
    }
};

static block * current;

inline void entry() {
    current->kernel();
    current->fibers[threadIdx.x].done = true;
    current->moved = true;
    swapcontext(&current->fibers[threadIdx.x].context, &current->scheduler);
}

// false: the threads do not meet at the same barriers
inline bool run(uint3 grid, unsigned n_threads, const std::function<void()> & kernel, const std::function<void()> & begin) {
    blockDim = { n_threads, 1, 1 };
    for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z) {
        for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y) {
            for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
                begin();

                block b;
                b.kernel = kernel;
                b.fibers.resize(n_threads);
                b.warps.resize(n_threads/block::WARP);
                b.lanes.resize(n_threads);
                current = &b;

                for (auto & f : b.fibers) {
                    f.stack.reset(new char[block::STACK]);
                    getcontext(&f.context);
                    f.context.uc_stack.ss_sp   = f.stack.get();
                    f.context.uc_stack.ss_size = block::STACK;
                    f.context.uc_link          = nullptr;
                    makecontext(&f.context, entry, 0);
                }
                for (bool left = true; left;) {
                    left    = false;
                    b.moved = false;
                    for (unsigned i = 0; i < n_threads; ++i) {
                        if (!b.fibers[i].done) {
                            threadIdx = { i, 0, 0 };
                            swapcontext(&b.scheduler, &b.fibers[i].context);
                            left = left || !b.fibers[i].done;
                        }
                    }
                    if (left && !b.moved) {
                        return false;
                    }
                }
            }
        }
    }
    return true;
}

inline barrier & warp_barrier() { return current->warps[threadIdx.x/block::WARP]; }

} // namespace cuda_on_cpu

inline void __syncthreads() { cuda_on_cpu::current->wait(cuda_on_cpu::current->all, blockDim.x); }
inline void __syncwarp()    { cuda_on_cpu::current->wait(cuda_on_cpu::warp_barrier(), cuda_on_cpu::block::WARP); }

inline float __shfl_xor_sync(unsigned, float x, int step) {
    auto & lanes = cuda_on_cpu::current->lanes;

    lanes[threadIdx.x] = x;
    __syncwarp();
    const float res = lanes[threadIdx.x ^ step];
    __syncwarp();
    return res;
}
