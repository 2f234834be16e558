#pragma once

#include <cstdint>
#include <cstring>

// f16 <-> f32 on any machine

inline float ggml_capsule_from_half(uint16_t h) {
    const uint32_t magnitude = h & 0x7fff;

    uint32_t bits = magnitude << 13;
    float    x;
    memcpy(&x, &bits, sizeof(x));
    x *= 0x1p112f; // numbers below the smallest normal one become normal by it
    memcpy(&bits, &x, sizeof(x));
    bits |= magnitude >= 0x7c00 ? 0x7f800000 : 0; // infinite or not a number
    bits |= (uint32_t) (h & 0x8000) << 16;
    memcpy(&x, &bits, sizeof(x));
    return x;
}

// halves to even; what is too large becomes infinite
inline uint16_t ggml_capsule_to_half(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof(x));
    const uint16_t sign = (uint16_t) (bits >> 16 & 0x8000);
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) {
        return sign | 0x7e00;
    }
    if (bits >= 0x477ff000) { // 65520
        return sign | 0x7c00;
    }
    if (bits < 0x38800000) { // below 2^-14: in units of 2^-24
        float y;
        memcpy(&y, &bits, sizeof(y));
        y += 0.5f; // its last bit is worth 2^-24
        memcpy(&bits, &y, sizeof(y));
        return sign | (uint16_t) (bits - 0x3f000000);
    }
    bits += 0xfff + (bits >> 13 & 1);
    return sign | (uint16_t) ((bits - 0x38000000) >> 13);
}
