#include "tile.h"

#include "half.h"

#include <algorithm>
#include <cstring>

static constexpr int MAX_N = 4*GGML_CAPSULE_LANES;

static float get_half(const uint8_t * bytes) {
    return ggml_capsule_from_half((uint16_t) (bytes[0] | bytes[1] << 8));
}

static void get_plane(const uint8_t * bytes, int width, int n, uint8_t * elements) {
    const int size = (width*n + 7)/8;
    for (int j = 0; j < n; ++j) {
        elements[j] = (uint8_t) (bytes[j % size] >> j/size*width & ((1 << width) - 1));
    }
}

// codes: [2*n_rows][n_lanes]
static void get_codes(const uint8_t * bytes, int bits, int n_rows, int n_lanes, int8_t * codes) {
    const int n     = n_rows*n_lanes;
    const int width = bits == 1 ? 2 : bits <= 3 ? 4 : 8; // of the first plane
    const int low   = width - bits;                      // bits of b in it
    uint8_t first [MAX_N];
    uint8_t second[MAX_N] = {};
    get_plane(bytes, width, n, first);
    if (low != bits) {
        get_plane(bytes + (width*n + 7)/8, bits - low, n, second);
    }
    for (int r = 0; r < n_rows; ++r) {
        for (int i = 0; i < n_lanes; ++i) {
            const int j = i*n_rows + r;
            const int a = low == bits ? first[j] & ((1 << bits) - 1) : first[j] >> low;
            const int b = low == bits ? first[j] >> bits : second[j] << low | (first[j] & ((1 << low) - 1));
            int8_t * c = codes + 2*r*n_lanes + i;
            c[0]       = (int8_t) (bits == 1 ? 2*a - 1 : a - (1 << (bits - 1)));
            c[n_lanes] = (int8_t) (bits == 1 ? 2*b - 1 : b - (1 << (bits - 1)));
        }
    }
}

void ggml_capsule_load(const ggml_capsule_channels & channels, const ggml_capsule_plan * plan, const uint8_t * bytes, float * rows) {
    std::fill(rows, rows + plan->h*plan->w*channels.d, 0.0f);

    for (int g = 0; g < plan->n_groups; ++g) {
        const auto & group = plan->groups[g];
        const uint8_t * code = bytes + group.code;

        ggml_capsule_plan_blocks(plan, g, [&](int row, int n_rows, int bits, int scale_at) {
            float  x    [MAX_N];
            int8_t codes[MAX_N];
            const int n = 2*n_rows*group.n_lanes;
            if (bits == GGML_CAPSULE_F16) {
                for (int i = 0; i < n; ++i) {
                    x[i] = get_half(code + 2*i);
                }
            } else if (bits == GGML_CAPSULE_F32) {
                memcpy(x, code, n*sizeof(float));
            } else {
                const float scale = get_half(bytes + scale_at);
                get_codes(code, bits, n_rows, group.n_lanes, codes);
                for (int i = 0; i < n; ++i) {
                    x[i] = scale*codes[i];
                }
            }
            code += ggml_capsule_code_size(bits, n_rows, group.n_lanes);

            ggml_capsule_mix(x, n_rows, group.n_lanes);
            for (int r = 0; r < n_rows; ++r) {
                for (int i = 0; i < 2*group.n_lanes; ++i) {
                    const int c = ggml_capsule_channel(channels, g, i/group.n_lanes, i % group.n_lanes);
                    if (c >= 0) {
                        rows[(row + r)*channels.d + c] = x[2*r*group.n_lanes + i];
                    }
                }
            }
        });
    }
}

void ggml_capsule_read(const ggml_capsule_coder & coder, const ggml_capsule_plan * plan, const uint8_t * bytes,
        float * x, size_t stride, float * rows, float * work) {
    ggml_capsule_load(coder.channels, plan, bytes, rows);
    ggml_capsule_inverse(coder, plan->h, plan->w, rows, x, stride, work);
}
