// AVX-512 in plain C++ by SIMDe (0.8 or newer), for tests/native/capsule_simd.cpp; what SIMDe 0.8.2 lacks is here
#pragma once

#define SIMDE_ENABLE_NATIVE_ALIASES
#define SIMDE_NO_NATIVE // the compiler's own types of these vectors would have the same names
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#include <simde/x86/fma.h>

template<typename T>
static inline simde__m512i capsule_widen(simde__m128i x) {
    T        from[16];
    int32_t  to  [16];
    simde_mm_storeu_si128((simde__m128i *) from, x);
    for (int i = 0; i < 16; ++i) {
        to[i] = from[i];
    }
    return simde_mm512_loadu_si512(to);
}

#undef  _mm512_cvtepi8_epi32
#undef  _mm512_cvtepu8_epi32
#define _mm512_cvtepi8_epi32 capsule_widen<int8_t>
#define _mm512_cvtepu8_epi32 capsule_widen<uint8_t>
