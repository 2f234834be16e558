#include "capsule/util/sha256.h"

#include "llama-impl.h"

#include <cstring>

static uint32_t rotr(uint32_t x, int n) {
    return (x >> n) | (x << (32 - n));
}

void llama_capsule_sha256::block(const uint8_t * p) {
    static const uint32_t k[64] = {
        0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
        0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
        0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
        0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
        0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
        0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
        0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
        0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
    };

    uint32_t w[64];
    for (int i = 0; i < 16; ++i) {
        w[i] = (uint32_t) p[4*i] << 24 | (uint32_t) p[4*i + 1] << 16 | (uint32_t) p[4*i + 2] << 8 | p[4*i + 3];
    }
    for (int i = 16; i < 64; ++i) {
        const uint32_t s0 = rotr(w[i - 15], 7) ^ rotr(w[i - 15], 18) ^ (w[i - 15] >> 3);
        const uint32_t s1 = rotr(w[i - 2], 17) ^ rotr(w[i - 2], 19)  ^ (w[i - 2] >> 10);
        w[i] = w[i - 16] + s0 + w[i - 7] + s1;
    }

    uint32_t s[8];
    memcpy(s, h, sizeof(s));

    for (int i = 0; i < 64; ++i) {
        const uint32_t e1 = rotr(s[4], 6) ^ rotr(s[4], 11) ^ rotr(s[4], 25);
        const uint32_t ch = (s[4] & s[5]) ^ (~s[4] & s[6]);
        const uint32_t t1 = s[7] + e1 + ch + k[i] + w[i];
        const uint32_t e0 = rotr(s[0], 2) ^ rotr(s[0], 13) ^ rotr(s[0], 22);
        const uint32_t mj = (s[0] & s[1]) ^ (s[0] & s[2]) ^ (s[1] & s[2]);

        memmove(s + 1, s, 7*sizeof(uint32_t));
        s[0]  = t1 + e0 + mj;
        s[4] += t1;
    }

    for (int i = 0; i < 8; ++i) {
        h[i] += s[i];
    }
}

void llama_capsule_sha256::update(const void * data, size_t n) {
    const auto * p = (const uint8_t *) data;
    for (size_t i = 0; i < n; ++i) {
        buf[len++ % 64] = p[i];
        if (len % 64 == 0) {
            block(buf);
        }
    }
}

void llama_capsule_sha256::update(const std::string & s) {
    update(s.data(), s.size());
}

std::string llama_capsule_sha256::finish() {
    const uint64_t n_bits = len*8;

    const uint8_t one = 0x80;
    update(&one, 1);
    const uint8_t zero = 0;
    while (len % 64 != 56) {
        update(&zero, 1);
    }
    for (int i = 7; i >= 0; --i) {
        const uint8_t b = (uint8_t) (n_bits >> (8*i));
        update(&b, 1);
    }

    std::string res;
    for (uint32_t x : h) {
        res += format("%08x", x);
    }
    return res;
}
