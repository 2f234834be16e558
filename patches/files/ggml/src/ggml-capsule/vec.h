#pragma once

#include "layout.h"

// 16 lanes
#if defined(__GNUC__)
typedef float capsule_vec __attribute__((vector_size(64), aligned(4), may_alias));
#else
struct capsule_vec {
    float x[GGML_CAPSULE_LANES];

    template<typename F>
    static capsule_vec map(F f) {
        capsule_vec res;
        for (int i = 0; i < GGML_CAPSULE_LANES; ++i) {
            res.x[i] = f(i);
        }
        return res;
    }
    capsule_vec operator+(const capsule_vec & y) const { return map([&](int i) { return x[i] + y.x[i]; }); }
    capsule_vec operator-(const capsule_vec & y) const { return map([&](int i) { return x[i] - y.x[i]; }); }
    capsule_vec operator*(const capsule_vec & y) const { return map([&](int i) { return x[i]*y.x[i]; }); }
    capsule_vec operator*(float y)               const { return map([&](int i) { return x[i]*y; }); }
};
#endif
