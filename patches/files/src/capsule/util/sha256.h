#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

// FIPS 180-4
struct llama_capsule_sha256 {
    void update(const void * data, size_t n);
    void update(const std::string & s);

    // 64 hex digits; to be called once
    std::string finish();

private:
    uint32_t h[8] = {
        0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19,
    };

    uint8_t  buf[64];
    uint64_t len = 0;

    void block(const uint8_t * p);
};
