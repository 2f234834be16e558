#pragma once

#include "half.h"
#include "quantize.h"
#include "vec.h"

#include <cmath>
#include <cstring>

//
// ggml_capsule_read() with vectors, for code that is built for an instruction set (ggml-cpu)
//

struct capsule_read_tables {
    float   cosines[GGML_CAPSULE_SIDE + 1][GGML_CAPSULE_SIDE][GGML_CAPSULE_SIDE];    // [n][u][t], orthonormal
    uint8_t order  [GGML_CAPSULE_SIDE + 1][GGML_CAPSULE_SIDE + 1][GGML_CAPSULE_MAX_ROWS]; // [h][w]

    capsule_read_tables() {
        for (int n = 1; n <= GGML_CAPSULE_SIDE; ++n) {
            for (int u = 0; u < n; ++u) {
                for (int t = 0; t < n; ++t) {
                    cosines[n][u][t] = (float) (std::cos(3.14159265358979323846*(t + 0.5)*u/n)*std::sqrt((u == 0 ? 1.0 : 2.0)/n));
                }
            }
            for (int w = 1; w <= GGML_CAPSULE_SIDE; ++w) {
                ggml_capsule_row_order(n, w, order[n][w]);
            }
        }
    }

    static const capsule_read_tables & get() {
        static const capsule_read_tables res;
        return res;
    }
};

// n elements of `width` bits
inline void capsule_read_plane(const uint8_t * bytes, int width, int n, uint8_t * elements) {
    const int size = (width*n + 7)/8;
    const int mask = (1 << width) - 1;

    for (int j = 0; j < n; j += size, elements += size) {
        const int shift = j/size*width;
        for (int k = 0; k < size; ++k) {
            elements[k] = bytes[k] >> shift & mask;
        }
    }
}

// the codes of a block -> a and b: [2 rows][16], mixed back
template<int BITS, int ROWS>
inline void capsule_read_block(const uint8_t * code, int n_lanes, float scale, float * a, float * b) {
    constexpr int   width = ggml_capsule_plane_width(BITS);
    constexpr float zero  = BITS == 1 ? 0.5f : (float) (1 << (BITS - 1));
    constexpr float norm  = (BITS == 1 ? 2.0f : 1.0f)*(ROWS == 2 ? 0.5f : 0.70710678118654752f);

    uint8_t first [4*GGML_CAPSULE_LANES] = {};
    uint8_t second[4*GGML_CAPSULE_LANES] = {};

    const int n = ROWS*n_lanes;
    capsule_read_plane(code, width, n, first);
    if (width != 2*BITS) {
        capsule_read_plane(code + (width*n + 7)/8, 2*BITS - width, n, second);
    }

    const float f = norm*scale;
    for (int i = 0; i < GGML_CAPSULE_LANES; ++i) {
        int a0, b0;
        ggml_capsule_codes<BITS>(first[ROWS*i], second[ROWS*i], a0, b0);

        const float s0 = (float) (a0 + b0) - 2*zero;
        const float d0 = (float) (a0 - b0);
        if (ROWS == 1) {
            a[i] = f*s0;
            b[i] = f*d0;
            continue;
        }

        int a1, b1;
        ggml_capsule_codes<BITS>(first[ROWS*i + 1], second[ROWS*i + 1], a1, b1);

        const float s1 = (float) (a1 + b1) - 2*zero;
        const float d1 = (float) (a1 - b1);
        a[i]                      = f*(s0 + s1);
        b[i]                      = f*(d0 + d1);
        a[i + GGML_CAPSULE_LANES] = f*(s0 - s1);
        b[i + GGML_CAPSULE_LANES] = f*(d0 - d1);
    }
}

// the same of a block whose values are not codes, [2*n_rows][n_lanes]
template<typename F>
inline void capsule_read_floats(int n_rows, int n_lanes, F value, float * a, float * b) {
    float x[4][GGML_CAPSULE_LANES] = {};
    for (int r = 0; r < 2*n_rows; ++r) {
        for (int i = 0; i < n_lanes; ++i) {
            x[r][i] = value(r*n_lanes + i);
        }
    }
    const float norm = n_rows == 2 ? 0.5f : 0.70710678118654752f;
    for (int i = 0; i < GGML_CAPSULE_LANES; ++i) {
        a[i]                      = norm*(x[0][i] + x[1][i] + (x[2][i] + x[3][i]));
        b[i]                      = norm*(x[0][i] - x[1][i] + (x[2][i] - x[3][i]));
        a[i + GGML_CAPSULE_LANES] = norm*(x[0][i] + x[1][i] - (x[2][i] + x[3][i]));
        b[i + GGML_CAPSULE_LANES] = norm*(x[0][i] - x[1][i] - (x[2][i] - x[3][i]));
    }
}

// the rows of a group -> x: [u*w + v][ld], 2 registers of 16 lanes side by side; lanes that are not there are finite
// order: where else each row goes
inline void capsule_read_group(const ggml_capsule_plan * plan, int g, const uint8_t * bytes, float * x, size_t ld, const uint8_t * order = nullptr) {
    constexpr int L = GGML_CAPSULE_LANES;

    const auto & group   = plan->groups[g];
    order = order ? order : capsule_read_tables::get().order[plan->h][plan->w];
    const int    n_lanes = group.n_lanes;

    for (int i = 0; i < ggml_capsule_n_blocks(plan->h, plan->w); ++i) {
        for (int r = i == 0 ? 0 : 2*i - 1; group.bits[i] == 0 && r <= 2*i && r < plan->h*plan->w; ++r) {
            std::memset(x + order[r]*ld, 0, 2*L*sizeof(float));
        }
    }

    const uint8_t * code = bytes + group.code;

    ggml_capsule_plan_blocks(plan, g, [&](int row, int n_rows, int bits, int scale_at) {
        float a[2*L];
        float b[2*L];

        const auto codes = [&](auto one, auto two) {
            const float scale = ggml_capsule_from_half((uint16_t) (bytes[scale_at] | bytes[scale_at + 1] << 8));
            (n_rows == 1 ? one : two)(code, n_lanes, scale, a, b);
        };
        switch (bits) {
            case 1: codes(capsule_read_block<1, 1>, capsule_read_block<1, 2>); break;
            case 2: codes(capsule_read_block<2, 1>, capsule_read_block<2, 2>); break;
            case 3: codes(capsule_read_block<3, 1>, capsule_read_block<3, 2>); break;
            case 4: codes(capsule_read_block<4, 1>, capsule_read_block<4, 2>); break;
            case 6: codes(capsule_read_block<6, 1>, capsule_read_block<6, 2>); break;
            case 8: codes(capsule_read_block<8, 1>, capsule_read_block<8, 2>); break;
            case GGML_CAPSULE_F16:
                capsule_read_floats(n_rows, n_lanes, [&](int i) { return ggml_capsule_from_half((uint16_t) (code[2*i] | code[2*i + 1] << 8)); }, a, b);
                break;
            default:
                capsule_read_floats(n_rows, n_lanes, [&](int i) { float y; std::memcpy(&y, code + 4*i, sizeof(y)); return y; }, a, b);
                break;
        }
        code += ggml_capsule_code_size(bits, n_rows, n_lanes);

        for (int r = 0; r < n_rows; ++r) {
            std::memcpy(x + order[row + r]*ld,     a + r*L, L*sizeof(float));
            std::memcpy(x + order[row + r]*ld + L, b + r*L, L*sizeof(float));
        }
    });
}

// N points of 16 lanes, `step` floats apart, in place; the two halves of the outputs share their products
template<int N>
inline void capsule_inverse(float * x, size_t step) {
    const auto & c = capsule_read_tables::get().cosines[N];

    capsule_vec in[N];
    for (int u = 0; u < N; ++u) {
        in[u] = *(const capsule_vec *) (x + u*step);
    }
    for (int t = 0; t < (N + 1)/2; ++t) {
        capsule_vec even = in[0]*c[0][t];
        for (int u = 2; u < N; u += 2) {
            even = even + in[u]*c[u][t];
        }
        capsule_vec odd = in[N > 1 ? 1 : 0]*(N > 1 ? c[1][t] : 0.0f);
        for (int u = 3; u < N; u += 2) {
            odd = odd + in[u]*c[u][t];
        }
        *(capsule_vec *) (x + (N - 1 - t)*step) = even - odd;
        *(capsule_vec *) (x + t*step)           = even + odd;
    }
}

// x: [h*w][ld] of 16 lanes, coefficients -> tokens
inline void capsule_inverse_tile(float * x, size_t ld, int h, int w) {
    static constexpr void (* inverse[])(float *, size_t) = {
        nullptr, capsule_inverse<1>, capsule_inverse<2>, capsule_inverse<3>, capsule_inverse<4>,
        capsule_inverse<5>, capsule_inverse<6>, capsule_inverse<7>, capsule_inverse<8>,
    };
    for (int u = 0; u < h; ++u) {
        inverse[w](x + u*w*ld, ld);
    }
    for (int v = 0; v < w; ++v) {
        inverse[h](x + v*ld, w*ld);
    }
}
