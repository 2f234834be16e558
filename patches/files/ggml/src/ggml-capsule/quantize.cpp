#include "quantize.h"

#include "clones.h"
#include "half.h"

#include <algorithm>
#include <cmath>
#include <cstring>

//
// transform
//

// DCT-II of n points, orthonormal, [n][n], rows from smooth to rough
static const float * dct(int n) {
    static const struct tables {
        float x[GGML_CAPSULE_SIDE + 1][GGML_CAPSULE_SIDE*GGML_CAPSULE_SIDE];

        tables() {
            const double pi = 3.14159265358979323846;
            for (int n = 1; n <= GGML_CAPSULE_SIDE; ++n) {
                for (int u = 0; u < n; ++u) {
                    for (int t = 0; t < n; ++t) {
                        x[n][u*n + t] = (float) (std::cos(pi*(t + 0.5)*u/n)*std::sqrt((u == 0 ? 1.0 : 2.0)/n));
                    }
                }
            }
        }
    } tables;
    return tables.x[n];
}

// y[i] = sum_j m[i*m_i + j*m_j] x[j], of vectors of d floats
CAPSULE_CLONES static void mul_small(int n, const float * m, int m_i, int m_j, const float * x, size_t x_stride, float * y, size_t y_stride, int d) {
    for (int i = 0; i < n; ++i) {
        float * out = y + i*y_stride;
        for (int c = 0; c < d; ++c) {
            out[c] = m[i*m_i]*x[c];
        }
        for (int j = 1; j < n; ++j) {
            const float   f  = m[i*m_i + j*m_j];
            const float * in = x + j*x_stride;
            for (int c = 0; c < d; ++c) {
                out[c] += f*in[c];
            }
        }
    }
}

size_t ggml_capsule_rows_work(int d) {
    return (size_t) 2*GGML_CAPSULE_MAX_ROWS*d;
}

void ggml_capsule_rows(const ggml_capsule_coder & coder, int h, int w, const float * x, size_t stride, float * rows, float * work) {
    const int d = coder.channels.d;
    float * a = work;
    float * b = work + GGML_CAPSULE_MAX_ROWS*d;

    for (int t = 0; t < h*w; ++t) {
        for (int c = 0; c < d; ++c) {
            a[t*d + c] = x[t*stride + c] - (coder.mean ? coder.mean[c] : 0.0f);
        }
    }
    for (int i = 0; i < w; ++i) {
        mul_small(h, dct(h), h, 1, a + i*d, w*d, b + i*d, w*d, d);
    }
    for (int u = 0; u < h; ++u) {
        mul_small(w, dct(w), w, 1, b + u*w*d, d, a + u*w*d, d, d);
    }

    uint8_t order[GGML_CAPSULE_MAX_ROWS];
    ggml_capsule_row_order(h, w, order);
    for (int r = 0; r < h*w; ++r) {
        const float * in = a + order[r]*d;
        float * out = rows + r*d;
        if (!coder.axes) {
            std::copy(in, in + d, out);
            continue;
        }
        std::fill(out, out + d, 0.0f);
        for (int i = 0; i < d; ++i) {
            for (int j = 0; j < d; ++j) {
                out[j] += in[i]*coder.axes[i*d + j];
            }
        }
    }
}

void ggml_capsule_inverse(const ggml_capsule_coder & coder, int h, int w, const float * rows, float * x, size_t stride, float * work) {
    const int d = coder.channels.d;
    float * a = work;
    float * b = work + GGML_CAPSULE_MAX_ROWS*d;

    uint8_t order[GGML_CAPSULE_MAX_ROWS];
    ggml_capsule_row_order(h, w, order);
    for (int r = 0; r < h*w; ++r) {
        const float * in = rows + r*d;
        float * out = a + order[r]*d;
        for (int i = 0; i < d; ++i) {
            float sum = coder.axes ? 0.0f : in[i];
            for (int j = 0; coder.axes && j < d; ++j) {
                sum += in[j]*coder.axes[i*d + j];
            }
            out[i] = sum;
        }
    }
    for (int u = 0; u < h; ++u) {
        mul_small(w, dct(w), 1, w, a + u*w*d, d, b + u*w*d, d, d);
    }
    for (int i = 0; i < w; ++i) {
        mul_small(h, dct(h), 1, h, b + i*d, w*d, a + i*d, w*d, d);
    }
    for (int t = 0; t < h*w; ++t) {
        for (int c = 0; c < d; ++c) {
            x[t*stride + c] = a[t*d + c] + (coder.mean ? coder.mean[c] : 0.0f);
        }
    }
}

//
// blocks
//

// Hadamard between registers, x: [2*n_rows][n_lanes]; the order of the additions is part of the format
void ggml_capsule_mix(float * x, int n_rows, int n_lanes) {
    for (int r = 0; r < n_rows; ++r) {
        float * a = x + 2*r*n_lanes;
        float * b = a + n_lanes;
        for (int i = 0; i < n_lanes; ++i) {
            const float sum = a[i] + b[i];
            b[i] = a[i] - b[i];
            a[i] = sum;
        }
    }
    for (int i = 0; n_rows == 2 && i < 2*n_lanes; ++i) {
        const float sum = x[i] + x[2*n_lanes + i];
        x[2*n_lanes + i] = x[i] - x[2*n_lanes + i];
        x[i] = sum;
    }
    const float f = n_rows == 2 ? 0.5f : 0.70710678f;
    for (int i = 0; i < 2*n_rows*n_lanes; ++i) {
        x[i] *= f;
    }
}

void ggml_capsule_block(const ggml_capsule_channels & channels, int group, int n_rows, const float * rows, float * block) {
    const int n_lanes = ggml_capsule_n_lanes(channels, group);
    for (int reg = 0; reg < 2; ++reg) {
        // the channels of a register have one distance; there may be none for the last lane
        const int first = ggml_capsule_channel(channels, group, reg, 0);
        const int last  = ggml_capsule_channel(channels, group, reg, n_lanes - 1);
        const int n     = last < 0 ? n_lanes - 1 : n_lanes;
        const int step  = n > 1 ? ggml_capsule_channel(channels, group, reg, 1) - first : 1;
        for (int r = 0; r < n_rows; ++r) {
            float * out = block + (2*r + reg)*n_lanes;
            out[n_lanes - 1] = 0.0f;
            for (int i = 0; i < n; ++i) {
                out[i] = rows[r*channels.d + first + i*step];
            }
        }
    }
    ggml_capsule_mix(block, n_rows, n_lanes);
}

//
// search
//

static constexpr float SMALLEST = 0x1p-20f;
static constexpr float LARGEST  = 65504.0f;
static constexpr float ONE      = 32767.0f;
static constexpr int   MOST     = 61439; // keeps y*steps below 2^31
static constexpr int   MAX_N    = 4*GGML_CAPSULE_LANES;

// in 1/32 codes, for 2, 3, 4, 6, 8 bits
static constexpr int N_STARTS[9] = { 0, 0, 4, 4, 4, 0, 4, 0, 1 };
static constexpr int STARTS[9][4] = {
    {}, {}, { 32, 46, 67, 96 }, { 96, 115, 139, 166 }, { 218, 238, 258, 282 }, {}, { 922, 961, 1002, 1044 }, {}, { 4080 },
};

struct search_best {
    int64_t gain = 0;
    int64_t xc   = 0;
    int64_t cc   = 1;
    int32_t sign = 1;
    int32_t codes[MAX_N] = {};
};

// y: padded with zeros to MAX_N, so that the loops have a fixed length
static CAPSULE_INLINE void search_try(const int32_t * y, int bits, int32_t sign, int32_t steps, search_best & best) {
    const int32_t low   = -(1 << (bits - 1));
    const int32_t high  = -low - 1;
    const int     shift = 30 - bits;

    int32_t codes[MAX_N];
    int32_t xc = 0;
    int32_t cc = 0;
    for (int i = 0; i < MAX_N; ++i) {
        const int32_t z = sign*y[i];
        const int32_t c = std::max(low, std::min(high, (z*steps + (1 << (shift - 1))) >> shift));
        codes[i] = c;
        xc += z*c;
        cc += c*c;
    }
    const int64_t gain = xc > 0 ? (int64_t) xc*xc/std::max(cc, 1) : 0;
    if (gain > best.gain) {
        best.gain = gain;
        best.xc   = xc;
        best.cc   = cc;
        best.sign = sign;
        std::copy(codes, codes + MAX_N, best.codes);
    }
}

CAPSULE_CLONES float ggml_capsule_search(const float * x, int n, int bits, int8_t * codes) {
    const float amax = capsule_largest(x, n);
    if (!(amax >= SMALLEST && amax < INFINITY)) {
        std::fill(codes, codes + n, (int8_t) (bits == 1 ? -1 : 0));
        return 0.0f;
    }

    const float f = ONE/amax;
    int32_t y[MAX_N] = {};
    for (int i = 0; i < n; ++i) {
        y[i] = (int32_t) std::rint(x[i]*f);
    }

    search_best best;
    if (bits == 1) {
        best.cc = n;
        for (int i = 0; i < n; ++i) {
            best.codes[i] = y[i] >= 0 ? 1 : -1;
            best.xc += std::abs(y[i]);
        }
    } else {
        for (int sign = 1; sign >= -1; sign -= 2) {
            for (int i = 0; i < N_STARTS[bits]; ++i) {
                search_try(y, bits, sign, STARTS[bits][i] << (10 - bits), best);
            }
        }
        for (int i = 0; i < 2; ++i) {
            const int64_t steps = (best.cc << (30 - bits))/std::max(best.xc, (int64_t) 1);
            search_try(y, bits, best.sign, (int32_t) std::min(steps, (int64_t) MOST), best);
        }
    }
    for (int i = 0; i < n; ++i) {
        codes[i] = (int8_t) best.codes[i];
    }
    const float scale = (float) best.sign*((float) best.xc/(float) best.cc)*(amax/ONE);
    return ggml_capsule_from_half(ggml_capsule_to_half(std::max(-LARGEST, std::min(LARGEST, scale))));
}

// the squares of x - scale*c, MAX_N of them
static CAPSULE_INLINE float square_error(const float * x, float scale, const int8_t * codes) {
    float sums[GGML_CAPSULE_LANES] = {};
    for (int j = 0; j < MAX_N; j += GGML_CAPSULE_LANES) {
        for (int i = 0; i < GGML_CAPSULE_LANES; ++i) {
            const float e = x[j + i] - scale*codes[j + i];
            sums[i] += e*e;
        }
    }
    float res = 0.0f;
    for (float sum : sums) {
        res += sum;
    }
    return res;
}

CAPSULE_CLONES void ggml_capsule_errors(const ggml_capsule_coder & coder, int h, int w, const float * rows, int n_bits, const uint8_t * bits, const uint16_t * wanted,
        float * errors) {
    const int n_groups = ggml_capsule_n_groups(coder.channels);
    const int n_blocks = ggml_capsule_n_blocks(h, w);
    for (int i = 0; i < n_blocks; ++i) {
        const int first  = i == 0 ? 0 : 2*i - 1;
        const int n_rows = i == 0 || first + 1 == h*w ? 1 : 2;
        for (int g = 0; g < n_groups; ++g) {
            float  x    [MAX_N] = {};
            float  y    [MAX_N];
            int8_t codes[MAX_N] = {};
            const int n = 2*n_rows*ggml_capsule_n_lanes(coder.channels, g);
            ggml_capsule_block(coder.channels, g, n_rows, rows + first*coder.channels.d, x);
            for (int b = 0; b < n_bits; ++b) {
                float & error = errors[(i*n_groups + g)*n_bits + b];
                if (wanted && !(wanted[i*n_groups + g] >> b & 1)) {
                    continue;
                }
                if (bits[b] == 0) {
                    error = square_error(x, 0.0f, codes);
                } else if (bits[b] == GGML_CAPSULE_F16) {
                    for (int j = 0; j < MAX_N; ++j) {
                        y[j] = x[j] - ggml_capsule_from_half(ggml_capsule_to_half(x[j]));
                    }
                    error = square_error(y, 0.0f, codes);
                } else {
                    const float scale = ggml_capsule_search(x, n, bits[b], codes);
                    error = square_error(x, scale, codes);
                }
            }
        }
    }
}

//
// bytes
//

static void put_plane(uint8_t * bytes, int width, int n, const uint8_t * elements) {
    const int size = (width*n + 7)/8;
    std::fill(bytes, bytes + size, (uint8_t) 0);
    for (int j = 0; j < n; ++j) {
        bytes[j % size] |= (uint8_t) (elements[j] << j/size*width);
    }
}

// codes: [2*n_rows][n_lanes]
static void put_codes(uint8_t * bytes, int bits, int n_rows, int n_lanes, const int8_t * codes) {
    const int n = n_rows*n_lanes;
    uint8_t a[MAX_N];
    uint8_t b[MAX_N];
    for (int r = 0; r < n_rows; ++r) {
        for (int i = 0; i < n_lanes; ++i) {
            const int8_t * c = codes + 2*r*n_lanes + i;
            a[i*n_rows + r] = (uint8_t) (bits == 1 ? c[0]       > 0 : c[0]       + (1 << (bits - 1)));
            b[i*n_rows + r] = (uint8_t) (bits == 1 ? c[n_lanes] > 0 : c[n_lanes] + (1 << (bits - 1)));
        }
    }
    const int width = bits == 1 ? 2 : bits <= 3 ? 4 : 8; // of the first plane
    const int low   = width - bits;                      // bits of b in it
    if (low == bits) {
        for (int j = 0; j < n; ++j) {
            a[j] |= (uint8_t) (b[j] << bits);
        }
        put_plane(bytes, width, n, a);
        return;
    }
    for (int j = 0; j < n; ++j) {
        a[j] = (uint8_t) (a[j] << low | (b[j] & ((1 << low) - 1)));
        b[j] = (uint8_t) (b[j] >> low);
    }
    put_plane(bytes, width, n, a);
    put_plane(bytes + (width*n + 7)/8, bits - low, n, b);
}

static void put_half(uint8_t * bytes, float x) {
    x = x == x ? std::max(-LARGEST, std::min(LARGEST, x)) : 0.0f;
    const uint16_t half = ggml_capsule_to_half(x);
    bytes[0] = (uint8_t) half;
    bytes[1] = (uint8_t) (half >> 8);
}

void ggml_capsule_store(const ggml_capsule_channels & channels, const ggml_capsule_plan * plan, const float * rows, uint8_t * bytes) {
    std::fill(bytes, bytes + plan->size, (uint8_t) 0);

    for (int g = 0; g < plan->n_groups; ++g) {
        const auto & group = plan->groups[g];
        uint8_t * code = bytes + group.code;

        ggml_capsule_plan_blocks(plan, g, [&](int row, int n_rows, int bits, int scale_at) {
            float  x    [MAX_N];
            int8_t codes[MAX_N];
            const int n = 2*n_rows*group.n_lanes;
            ggml_capsule_block(channels, g, n_rows, rows + row*channels.d, x);
            if (bits == GGML_CAPSULE_F16) {
                for (int i = 0; i < n; ++i) {
                    put_half(code + 2*i, x[i]);
                }
            } else if (bits == GGML_CAPSULE_F32) {
                memcpy(code, x, n*sizeof(float));
            } else {
                put_half(bytes + scale_at, ggml_capsule_search(x, n, bits, codes));
                put_codes(code, bits, n_rows, group.n_lanes, codes);
            }
            code += ggml_capsule_code_size(bits, n_rows, group.n_lanes);
        });
    }
}
