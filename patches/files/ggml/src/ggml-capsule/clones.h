#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

// functions with loops worth the vector units of the machine: ggml-base and libllama are built for the baseline
// (not under the thread sanitizer: the resolvers run before it is ready)
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12 && !defined(__SANITIZE_THREAD__)
#define CAPSULE_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define CAPSULE_INLINE inline __attribute__((always_inline))
#else
#define CAPSULE_CLONES
#define CAPSULE_INLINE inline
#endif

// the bits of a magnitude, as an integer: those of a larger one are larger, and what is not a number is larger than any
static CAPSULE_INLINE int32_t capsule_magnitude(const float * x) {
    int32_t res;
    memcpy(&res, x, sizeof(res));

    return res & 0x7fffffff;
}

// the largest magnitude; integers, since vectors compare those
static CAPSULE_INLINE float capsule_largest(const float * x, size_t n) {
    int32_t most = 0;
    for (size_t i = 0; i < n; ++i) {
        most = std::max(most, capsule_magnitude(x + i));
    }

    float res;
    memcpy(&res, &most, sizeof(res));

    return res;
}
