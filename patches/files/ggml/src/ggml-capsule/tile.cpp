#include "tile.h"

#include "clones.h"
#include "dct.h"
#include "half.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

static constexpr int MAX_N = 4*GGML_CAPSULE_LANES;

static CAPSULE_INLINE float get_half(const uint8_t * bytes) {
    return ggml_capsule_from_half((uint16_t) (bytes[0] | bytes[1] << 8));
}

static CAPSULE_INLINE void get_plane(const uint8_t * bytes, int width, int n, uint8_t * elements) {
    const int size = (width*n + 7)/8;
    for (int first = 0, shift = 0; first < n; first += size, shift += width) {
        for (int k = 0; k < std::min(size, n - first); ++k) {
            elements[first + k] = (uint8_t) (bytes[k] >> shift & ((1 << width) - 1));
        }
    }
}

// codes: [2*n_rows][n_lanes]
static CAPSULE_INLINE void get_codes(const uint8_t * bytes, int bits, int n_rows, int n_lanes, int8_t * codes) {
    const int n     = n_rows*n_lanes;
    const int width = ggml_capsule_plane_width(bits);
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

// the values of a block as they are stored: f32 [2*n_rows][n_lanes]
CAPSULE_CLONES static void load_block(const uint8_t * scale_at, const uint8_t * code, int bits, int n_rows, int n_lanes, float * x) {
    const int n = 2*n_rows*n_lanes;
    if (bits == GGML_CAPSULE_F16) {
        for (int i = 0; i < n; ++i) {
            x[i] = get_half(code + 2*i);
        }
        return;
    }
    if (bits == GGML_CAPSULE_F32) {
        memcpy(x, code, n*sizeof(float));
        return;
    }

    int8_t codes[MAX_N];
    if (n_rows == 2 && n_lanes == GGML_CAPSULE_LANES) {
        get_codes(code, bits, 2, GGML_CAPSULE_LANES, codes); // almost always
    } else {
        get_codes(code, bits, n_rows, n_lanes, codes);
    }
    const float scale = get_half(scale_at);
    for (int i = 0; i < n; ++i) {
        x[i] = scale*codes[i];
    }
}

void ggml_capsule_load(const ggml_capsule_channels & channels, const ggml_capsule_plan * plan, const uint8_t * bytes, float * rows) {
    std::fill(rows, rows + plan->h*plan->w*channels.d, 0.0f);

    for (int g = 0; g < plan->n_groups; ++g) {
        const int n_lanes = plan->groups[g].n_lanes;
        const uint8_t * code = bytes + plan->groups[g].code;

        int places[2*GGML_CAPSULE_LANES];
        for (int i = 0; i < 2*n_lanes; ++i) {
            places[i] = ggml_capsule_channel(channels, g, i/n_lanes, i % n_lanes);
        }
        ggml_capsule_plan_blocks(plan, g, [&](int row, int n_rows, int bits, int scale_at) {
            float x[MAX_N];
            load_block(bytes + scale_at, code, bits, n_rows, n_lanes, x);
            code += ggml_capsule_code_size(bits, n_rows, n_lanes);

            ggml_capsule_mix(x, n_rows, n_lanes);
            for (int r = 0; r < n_rows; ++r) {
                for (int i = 0; i < 2*n_lanes; ++i) {
                    if (places[i] >= 0) {
                        rows[(row + r)*channels.d + places[i]] = x[2*r*n_lanes + i];
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

//
// steps
//

// numbers that remember how large they have been
struct tracked {
    static constexpr int W = GGML_CAPSULE_LANES;

    struct T {
        float x[W];
    };

    static thread_local T most;

    static T see(const T & a) {
        for (int i = 0; i < W; ++i) {
            most.x[i] = std::max(most.x[i], std::fabs(a.x[i]));
        }
        return a;
    }

    template<typename F>
    static T map(F f) {
        T res;
        for (int i = 0; i < W; ++i) {
            res.x[i] = f(i);
        }
        return see(res);
    }

    static T add(const T & a, const T & b) { return map([&](int i) { return a.x[i] + b.x[i]; }); }
    static T sub(const T & a, const T & b) { return map([&](int i) { return a.x[i] - b.x[i]; }); }
    static T mul(const T & a, int c)       { return map([&](int i) { return a.x[i]*c*0x1p-15f; }); }
    static T half(const T & a)             { return map([&](int i) { return a.x[i]*0.5f; }); }
};

thread_local tracked::T tracked::most;

// all keys of 16 lanes of both registers, x: [u][v][2]
template<int H, int W>
static void track_tile(tracked::T (*x)[GGML_CAPSULE_SIDE][2]) {
    for (int reg = 0; reg < 2; ++reg) {
        tracked::T line[GGML_CAPSULE_SIDE];
        for (int u = 0; u < H; ++u) {
            for (int v = 0; v < W; ++v) {
                line[v] = x[u][v][reg];
            }
            capsule_idct<tracked, W>(line);
            for (int v = 0; v < W; ++v) {
                x[u][v][reg] = line[v];
            }
        }
        for (int v = 0; v < W; ++v) {
            for (int u = 0; u < H; ++u) {
                line[u] = x[u][v][reg];
            }
            capsule_idct<tracked, H>(line);
            for (int u = 0; u < H; ++u) {
                x[u][v][reg] = line[u];
            }
        }
    }
    for (int y = 0; y < H; ++y) {
        for (int v = 0; v < W; ++v) {
            tracked::map([&](int i) { return std::sqrt(x[y][v][0].x[i]*x[y][v][0].x[i] + x[y][v][1].x[i]*x[y][v][1].x[i]); }); // turned
        }
    }
}

float ggml_capsule_step(const ggml_capsule_coder & coder, const ggml_capsule_plan * plan, const uint8_t * bytes) {
    const int h = plan->h;
    const int w = plan->w;
    const int d = coder.channels.d;
    const auto & shape = ggml_capsule_shape_of(h, w);

    std::vector<float> rows(h*w*d);
    ggml_capsule_load(coder.channels, plan, bytes, rows.data());
    for (int c = 0; coder.mean && c < d; ++c) {
        rows[c] += coder.mean[c]*std::sqrt((float) (h*w));
    }

    tracked::most = {};
    float most = 1e-20f;
    for (int g = 0; g < plan->n_groups; ++g) {
        const auto & group = plan->groups[g];

        int channels[2][GGML_CAPSULE_LANES];
        for (int i = 0; i < 2*group.n_lanes; ++i) {
            channels[i/group.n_lanes][i % group.n_lanes] = ggml_capsule_channel(coder.channels, g, i/group.n_lanes, i % group.n_lanes);
        }

        tracked::T x[GGML_CAPSULE_SIDE][GGML_CAPSULE_SIDE][2] = {};
        for (int r = 0; r < h*w; ++r) {
            auto & at = x[shape.place[r]/GGML_CAPSULE_SIDE][shape.place[r]%GGML_CAPSULE_SIDE];
            for (int i = 0; i < group.n_lanes; ++i) {
                const float a = rows[r*d + channels[0][i]];
                const float b = channels[1][i] < 0 ? 0.0f : rows[r*d + channels[1][i]];
                at[0].x[i] = (a + b)*0.70710678f*shape.factor[r]; // the kernels leave the registers mixed
                at[1].x[i] = (a - b)*0.70710678f*shape.factor[r];
            }
            tracked::see(at[0]);
            tracked::see(at[1]);
        }
        capsule_with_size(h, [&](auto n_h) {
            capsule_with_size(w, [&](auto n_w) {
                track_tile<decltype(n_h)::value, decltype(n_w)::value>(x);
            });
        });

        // and the multipliers
        ggml_capsule_plan_blocks(plan, g, [&](int row, int, int bits, int scale_at) {
            if (bits < GGML_CAPSULE_F16) {
                const int   i = (row + 1)/2;
                const float f = std::max(std::fabs(shape.pair_a[i]), std::fabs(shape.pair_b[i]));
                most = std::max(most, std::fabs(get_half(bytes + scale_at))*f*(float) (2 << std::max(bits, 2)));
            }
        });
    }
    for (float m : tracked::most.x) {
        most = std::max(most, m);
    }
    return most/32400.0f; // the rest is for rounding
}

void ggml_capsule_slot_seal(const ggml_capsule_form & form, int n_head_kv, const ggml_capsule_coder * k, uint8_t * slot) {
    if (!k[0].whole.is_dct(form.h, form.w)) {
        return; // the kernels do not read it
    }
    for (int i = 0; i < n_head_kv; ++i) {
        uint8_t * bytes = slot + form.k_offset[i];
        *ggml_capsule_step_of(bytes) = ggml_capsule_step(k[i], ggml_capsule_form_k(form, i), bytes);
    }
}
