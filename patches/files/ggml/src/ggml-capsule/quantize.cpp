#include "quantize.h"

#include "clones.h"
#include "half.h"
#include "tile.h"
#include "vec.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

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

// of an h x w tile, from smooth to rough
static const uint8_t * row_order(int h, int w) {
    static const struct tables {
        uint8_t x[GGML_CAPSULE_SIDE + 1][GGML_CAPSULE_SIDE + 1][GGML_CAPSULE_MAX_ROWS];

        tables() {
            for (int h = 1; h <= GGML_CAPSULE_SIDE; ++h) {
                for (int w = 1; w <= GGML_CAPSULE_SIDE; ++w) {
                    ggml_capsule_row_order(h, w, x[h][w]);
                }
            }
        }
    } tables;
    return tables.x[h][w];
}

// N points of each of 16 lanes; the two halves of the inputs share their products
template<int N>
static CAPSULE_INLINE void dct_lanes(const capsule_vec * x, int x_step, capsule_vec * y, int y_step) {
    const float * m = dct(N);

    capsule_vec sum [N];
    capsule_vec diff[N];
    for (int t = 0; t < N/2; ++t) {
        sum [t] = x[t*x_step] + x[(N - 1 - t)*x_step];
        diff[t] = x[t*x_step] - x[(N - 1 - t)*x_step];
    }
    if (N % 2 == 1) {
        sum[N/2] = x[N/2*x_step];
    }
    for (int u = 0; u < N; ++u) {
        capsule_vec out = (u % 2 == 0 ? sum[0] : diff[0])*m[u*N];
        for (int t = 1; t < (u % 2 == 0 ? (N + 1)/2 : N/2); ++t) {
            out = out + (u % 2 == 0 ? sum[t] : diff[t])*m[u*N + t];
        }
        y[u*y_step] = out;
    }
}

static CAPSULE_INLINE void dct_lanes(int n, const capsule_vec * x, int x_step, capsule_vec * y, int y_step) {
    switch (n) {
        case 1: *y = *x; break;
        case 2: dct_lanes<2>(x, x_step, y, y_step); break;
        case 3: dct_lanes<3>(x, x_step, y, y_step); break;
        case 4: dct_lanes<4>(x, x_step, y, y_step); break;
        case 5: dct_lanes<5>(x, x_step, y, y_step); break;
        case 6: dct_lanes<6>(x, x_step, y, y_step); break;
        case 7: dct_lanes<7>(x, x_step, y, y_step); break;
        case 8: dct_lanes<8>(x, x_step, y, y_step); break;
    }
}

// tokens, `stride` floats apart, minus the mean -> coefficients from smooth to rough, [h*w][d]
CAPSULE_CLONES static void dct_tile(int h, int w, const float * x, size_t stride, const float * mean, float * rows, int d) {
    constexpr int L = GGML_CAPSULE_LANES;

    const uint8_t * order = row_order(h, w);

    capsule_vec a[GGML_CAPSULE_MAX_ROWS] = {};
    capsule_vec b[GGML_CAPSULE_MAX_ROWS];

    for (int c = 0; c < d; c += L) {
        capsule_vec zero = {};
        if (c + L <= d) {
            const capsule_vec m = mean ? *(const capsule_vec *) (mean + c) : zero;
            for (int t = 0; t < h*w; ++t) {
                a[t] = *(const capsule_vec *) (x + t*stride + c) - m;
            }
        } else {
            for (int t = 0; t < h*w; ++t) {
                float lanes[L] = {};
                for (int i = c; i < d; ++i) {
                    lanes[i - c] = x[t*stride + i] - (mean ? mean[i] : 0.0f);
                }
                memcpy(a + t, lanes, sizeof(lanes));
            }
        }
        for (int i = 0; i < w; ++i) {
            dct_lanes(h, a + i, w, b + i, w);
        }
        for (int u = 0; u < h; ++u) {
            dct_lanes(w, b + u*w, 1, a + u*w, 1);
        }
        for (int r = 0; r < h*w; ++r) {
            if (c + L <= d) {
                *(capsule_vec *) (rows + r*d + c) = a[order[r]];
            } else {
                memcpy(rows + r*d + c, a + order[r], (d - c)*sizeof(float));
            }
        }
    }
}

// y = x axes, N rows of d >= 16 channels
template<int N>
static CAPSULE_INLINE void turn_rows(const float * axes, int d, const float * x, float * y) {
    constexpr int L = GGML_CAPSULE_LANES;

    for (int j = 0; j < d; j += L) {
        const int first = std::min(j, d - L);

        capsule_vec sums[N] = {};
        for (int i = 0; i < d; ++i) {
            const capsule_vec axis = *(const capsule_vec *) (axes + i*d + first);
            for (int r = 0; r < N; ++r) {
                sums[r] = sums[r] + axis*x[r*d + i];
            }
        }
        for (int r = 0; r < N; ++r) {
            *(capsule_vec *) (y + r*d + first) = sums[r];
        }
    }
}

// y = x axes, [n][d]
CAPSULE_CLONES static void turn(const float * axes, int d, int n, const float * x, float * y) {
    int r = 0;
    for (; d >= GGML_CAPSULE_LANES && r + 4 <= n; r += 4) {
        turn_rows<4>(axes, d, x + r*d, y + r*d);
    }
    for (; r < n; ++r) {
        std::fill_n(y + r*d, d, 0.0f);
        for (int i = 0; i < d; ++i) {
            for (int j = 0; j < d; ++j) {
                y[r*d + j] += x[r*d + i]*axes[i*d + j];
            }
        }
    }
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

// in groups, as transform.h has them: where channel c of a token is
static void places_of(const ggml_capsule_channels & channels, int * places) {
    for (int g = 0; g < ggml_capsule_n_groups(channels); ++g) {
        for (int i = 0; i < 2*ggml_capsule_n_lanes(channels, g); ++i) {
            const int n = ggml_capsule_n_lanes(channels, g);
            const int c = ggml_capsule_channel(channels, g, i/n, i % n);
            if (c >= 0) {
                places[c] = (2*g + i/n)*GGML_CAPSULE_LANES + i % n;
            }
        }
    }
}

// rows [64][d] of kept tokens, and of dropped ones what is left -> tokens [64][d]
static void add_predicted(const ggml_capsule_coder & coder, const float * rows, float * tokens) {
    const int    d = coder.channels.d;
    const int    n = ggml_capsule_n_groups(coder.channels);
    const size_t ld = (size_t) 2*GGML_CAPSULE_LANES*n;

    int places[GGML_CAPSULE_MAX_D];
    places_of(coder.channels, places);

    std::vector<float> x(GGML_CAPSULE_MAX_ROWS*ld, 0.0f);
    for (int r = 0; r < GGML_CAPSULE_MAX_ROWS; ++r) {
        for (int c = 0; c < d; ++c) {
            x[coder.whole.order[r]*ld + places[c]] = rows[r*d + c];
        }
    }
    ggml_capsule_predict(coder.whole, n, x.data());
    for (int t = 0; t < GGML_CAPSULE_MAX_ROWS; ++t) {
        for (int c = 0; c < d; ++c) {
            tokens[t*d + c] = x[t*ld + places[c]];
        }
    }
}

// tokens without the mean -> rows; what is predicted is taken from kept tokens as they will be read
static void kept_rows(const ggml_capsule_coder & coder, const ggml_capsule_plan * plan, const float * tokens, float * rows, float * work) {
    const int d      = coder.channels.d;
    const int n_kept = coder.whole.n_kept;

    std::fill(rows, rows + GGML_CAPSULE_MAX_ROWS*d, 0.0f);
    for (int r = 0; r < n_kept; ++r) {
        std::copy_n(tokens + coder.whole.order[r]*d, d, rows + r*d);
    }

    std::vector<uint8_t> bytes(plan->size);
    ggml_capsule_store(coder.channels, plan, rows, bytes.data());
    ggml_capsule_load (coder.channels, plan, bytes.data(), work);
    std::fill(work + n_kept*d, work + GGML_CAPSULE_MAX_ROWS*d, 0.0f);
    add_predicted(coder, work, work);

    for (int r = n_kept; r < GGML_CAPSULE_MAX_ROWS; ++r) {
        const int t = coder.whole.order[r];
        for (int c = 0; c < d; ++c) {
            rows[r*d + c] = tokens[t*d + c] - work[t*d + c];
        }
    }
}

void ggml_capsule_rows(const ggml_capsule_coder & coder, const ggml_capsule_plan * plan, int h, int w, const float * x, size_t stride, float * rows, float * work) {
    const int d = coder.channels.d;

    if (!coder.whole.is_dct(h, w)) {
        float * a = work;
        float * b = work + GGML_CAPSULE_MAX_ROWS*d;

        for (int t = 0; t < h*w; ++t) {
            for (int c = 0; c < d; ++c) {
                a[t*d + c] = x[t*stride + c] - (coder.mean ? coder.mean[c] : 0.0f);
            }
        }
        if (coder.whole.order) {
            kept_rows(coder, plan, a, rows, b);
            return; // keys have no axes
        }
        mul_small(h*w, coder.whole.matrix, h*w, 1, a, d, coder.axes ? b : rows, d, d);
        if (coder.axes) {
            turn(coder.axes, d, h*w, b, rows);
        }
        return;
    }

    dct_tile(h, w, x, stride, coder.mean, coder.axes ? work : rows, d);
    if (coder.axes) {
        turn(coder.axes, d, h*w, work, rows);
    }
}

void ggml_capsule_inverse(const ggml_capsule_coder & coder, int h, int w, const float * rows, float * x, size_t stride, float * work) {
    const int d = coder.channels.d;
    float * a = work;
    float * b = work + GGML_CAPSULE_MAX_ROWS*d;

    const bool is_dct = coder.whole.is_dct(h, w);

    uint8_t order[GGML_CAPSULE_MAX_ROWS];
    ggml_capsule_row_order(h, w, order);
    for (int r = 0; r < h*w; ++r) {
        const float * in = rows + r*d;
        float * out = is_dct ? a + order[r]*d : b + r*d;
        for (int i = 0; i < d; ++i) {
            float sum = coder.axes ? 0.0f : in[i];
            for (int j = 0; coder.axes && j < d; ++j) {
                sum += in[j]*coder.axes[i*d + j];
            }
            out[i] = sum;
        }
    }
    if (is_dct) {
        for (int u = 0; u < h; ++u) {
            mul_small(w, dct(w), 1, w, a + u*w*d, d, b + u*w*d, d, d);
        }
        for (int i = 0; i < w; ++i) {
            mul_small(h, dct(h), 1, h, b + i*d, w*d, a + i*d, w*d, d);
        }
    } else if (coder.whole.order) {
        add_predicted(coder, b, a);
    } else {
        mul_small(h*w, coder.whole.matrix, 1, h*w, b, d, a, d, d);
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
static CAPSULE_INLINE void mix(float * x, int n_rows, int n_lanes) {
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

void ggml_capsule_mix(float * x, int n_rows, int n_lanes) {
    mix(x, n_rows, n_lanes);
}

static CAPSULE_INLINE void block(const ggml_capsule_channels & channels, int group, int n_rows, const float * rows, float * block) {
    const int n_lanes = ggml_capsule_n_lanes(channels, group);
    for (int reg = 0; reg < 2; ++reg) {
        // the channels of a register have one distance; there may be none for the last lane
        const int first = ggml_capsule_channel(channels, group, reg, 0);
        const int last  = ggml_capsule_channel(channels, group, reg, n_lanes - 1);
        const int n     = last < 0 ? n_lanes - 1 : n_lanes;
        const int step  = n > 1 ? ggml_capsule_channel(channels, group, reg, 1) - first : 1;
        for (int r = 0; r < n_rows; ++r) {
            const float * in = rows + r*channels.d + first;
            float * out = block + (2*r + reg)*n_lanes;
            out[n_lanes - 1] = 0.0f;
            if (step == 1 && n == GGML_CAPSULE_LANES) {
                memcpy(out, in, GGML_CAPSULE_LANES*sizeof(float));
                continue;
            }
            for (int i = 0; i < n; ++i) {
                out[i] = in[i*step];
            }
        }
    }
    mix(block, n_rows, n_lanes);
}

void ggml_capsule_block(const ggml_capsule_channels & channels, int group, int n_rows, const float * rows, float * out) {
    block(channels, group, n_rows, rows, out);
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
    int64_t gain  = 0;
    int64_t xc    = 0;
    int64_t cc    = 1;
    int32_t sign  = 1;
    int32_t steps = 0;
};

// the values of a block in units of 1/32767 of the largest one, padded with zeros, so that the loops have a fixed length
struct search_values {
    int     n;
    float   unit; // 0: there is nothing to code
    int16_t y[2][MAX_N]; // and the other way around
};

// x: padded as well
static CAPSULE_INLINE void search_init(const float * x, int n, search_values & v) {
    // as integers, which vectors compare: what is not a number is larger than any
    int32_t most = 0;
    for (int i = 0; i < MAX_N; ++i) {
        int32_t a;
        memcpy(&a, x + i, sizeof(a));
        most = std::max(most, a & 0x7fffffff);
    }
    float amax;
    memcpy(&amax, &most, sizeof(amax));

    v.n    = n;
    v.unit = 0.0f;
    if (!(amax >= SMALLEST && amax < INFINITY)) {
        return;
    }
    v.unit = amax/ONE;

    const float f = ONE/amax;
    for (int i = 0; i < MAX_N; ++i) {
        v.y[0][i] = (int16_t) (int32_t) std::rint(x[i]*f);
        v.y[1][i] = (int16_t) -v.y[0][i];
    }
}

// the codes of z for so many of them in a step of y, in 16 bits: the lower half of the products is never carried into the rounding
template<int BITS>
static CAPSULE_INLINE void search_codes(const int16_t * z, int32_t steps, int16_t * codes) {
    constexpr int16_t low   = -(1 << (BITS - 1));
    constexpr int16_t high  = -low - 1;
    constexpr int     shift = 14 - BITS;
    constexpr int16_t half  = 1 << (shift - 1);

    const int16_t factor = (int16_t) steps;
    const int16_t whole  = steps > INT16_MAX ? -1 : 0; // factor is 2^16 less then

    for (int i = 0; i < MAX_N; ++i) {
        const int16_t p = (int16_t) ((z[i]*factor >> 16) + (z[i] & whole) + half);
        codes[i] = std::max(low, std::min(high, (int16_t) (p >> shift)));
    }
}

template<int BITS>
static CAPSULE_INLINE void search_try(const search_values & v, int32_t sign, int32_t steps, search_best & best) {
    const int16_t * z = v.y[sign < 0];

    int16_t codes[MAX_N];
    search_codes<BITS>(z, steps, codes);

    int32_t xc = 0;
    int32_t cc = 0;
    for (int i = 0; i < MAX_N; ++i) {
        xc += z[i]*codes[i];
        cc += codes[i]*codes[i];
    }

    // whether xc^2/cc, rounded down, is more than the best; most tries are worse, and need no division
    const int64_t square = xc > 0 ? (int64_t) xc*xc : 0;
    const int64_t least  = std::max(cc, 1);
    if (square >= (best.gain + 1)*least) {
        best = { square/least, xc, cc, sign, steps };
    }
}

template<int BITS>
static CAPSULE_INLINE void search_best_codes(const search_values & v, search_best & best, int16_t * codes) {
#pragma GCC unroll 2
    for (int sign = 1; sign >= -1; sign -= 2) {
#pragma GCC unroll 4
        for (int i = 0; i < N_STARTS[BITS]; ++i) {
            search_try<BITS>(v, sign, STARTS[BITS][i] << (10 - BITS), best);
        }
    }
    for (int i = 0; i < 2; ++i) {
        const int64_t steps = (best.cc << (30 - BITS))/std::max(best.xc, (int64_t) 1);
        search_try<BITS>(v, best.sign, (int32_t) std::min(steps, (int64_t) MOST), best);
    }
    search_codes<BITS>(v.y[best.sign < 0], best.steps, codes);
}

// codes: padded with zeros
static CAPSULE_INLINE float search_scale(const search_values & v, int bits, int16_t * codes) {
    std::fill_n(codes, MAX_N, (int16_t) 0);
    if (v.unit == 0.0f) {
        std::fill_n(codes, v.n, (int16_t) (bits == 1 ? -1 : 0));
        return 0.0f;
    }

    search_best best;
    switch (bits) {
        case 1:
            best.cc = v.n;
            for (int i = 0; i < v.n; ++i) {
                codes[i] = v.y[0][i] >= 0 ? 1 : -1;
                best.xc += std::abs(v.y[0][i]);
            }
            break;
        case 2: search_best_codes<2>(v, best, codes); break;
        case 3: search_best_codes<3>(v, best, codes); break;
        case 4: search_best_codes<4>(v, best, codes); break;
        case 6: search_best_codes<6>(v, best, codes); break;
        case 8: search_best_codes<8>(v, best, codes); break;
    }
    const float scale = (float) best.sign*((float) best.xc/(float) best.cc)*v.unit;
    return ggml_capsule_from_half(ggml_capsule_to_half(std::max(-LARGEST, std::min(LARGEST, scale))));
}

CAPSULE_CLONES float ggml_capsule_search(const float * x, int n, int bits, int8_t * codes) {
    float padded[MAX_N] = {};
    std::copy_n(x, n, padded);

    search_values v;
    search_init(padded, n, v);

    int16_t wide[MAX_N];
    const float scale = search_scale(v, bits, wide);
    std::copy_n(wide, n, codes);

    return scale;
}

// the squares of x - scale*c, MAX_N of them
static CAPSULE_INLINE float square_error(const float * x, float scale, const int16_t * codes) {
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
            int16_t codes[MAX_N] = {};
            search_values v;
            const int n = 2*n_rows*ggml_capsule_n_lanes(coder.channels, g);
            block(coder.channels, g, n_rows, rows + first*coder.channels.d, x);
            search_init(x, n, v);
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
                    const float scale = search_scale(v, bits[b], codes);
                    error = square_error(x, scale, codes);
                }
            }
        }
    }
}

//
// bytes
//

static CAPSULE_INLINE void put_plane(uint8_t * bytes, int width, int n, const uint8_t * elements) {
    const int size = (width*n + 7)/8;
    std::fill_n(bytes, size, (uint8_t) 0);
    for (int first = 0, shift = 0; first < n; first += size, shift += width) {
        for (int k = 0; k < std::min(size, n - first); ++k) {
            bytes[k] |= (uint8_t) (elements[first + k] << shift);
        }
    }
}

// codes: [2*n_rows][n_lanes]
static CAPSULE_INLINE void put_codes(uint8_t * bytes, int bits, int n_rows, int n_lanes, const int16_t * codes) {
    const int n = n_rows*n_lanes;
    uint8_t a[MAX_N];
    uint8_t b[MAX_N];
    for (int r = 0; r < n_rows; ++r) {
        for (int i = 0; i < n_lanes; ++i) {
            const int16_t * c = codes + 2*r*n_lanes + i;
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

static CAPSULE_INLINE void put_half(uint8_t * bytes, float x) {
    x = x == x ? std::max(-LARGEST, std::min(LARGEST, x)) : 0.0f;
    const uint16_t half = ggml_capsule_to_half(x);
    bytes[0] = (uint8_t) half;
    bytes[1] = (uint8_t) (half >> 8);
}

// rows: the first one of the block
CAPSULE_CLONES static void store_block(const ggml_capsule_channels & channels, int group, int n_rows, int bits, const float * rows, uint8_t * scale, uint8_t * code) {
    float x[MAX_N] = {};

    const int n_lanes = ggml_capsule_n_lanes(channels, group);
    const int n       = 2*n_rows*n_lanes;

    block(channels, group, n_rows, rows, x);
    if (bits == GGML_CAPSULE_F16) {
        for (int i = 0; i < n; ++i) {
            put_half(code + 2*i, x[i]);
        }
        return;
    }
    if (bits == GGML_CAPSULE_F32) {
        memcpy(code, x, n*sizeof(float));
        return;
    }

    search_values v;
    int16_t       codes[MAX_N];

    search_init(x, n, v);
    put_half(scale, search_scale(v, bits, codes));
    if (n_rows == 2 && n_lanes == GGML_CAPSULE_LANES) {
        put_codes(code, bits, 2, GGML_CAPSULE_LANES, codes); // almost always
    } else {
        put_codes(code, bits, n_rows, n_lanes, codes);
    }
}

void ggml_capsule_store(const ggml_capsule_channels & channels, const ggml_capsule_plan * plan, const float * rows, uint8_t * bytes) {
    std::fill(bytes, bytes + plan->size, (uint8_t) 0);

    for (int g = 0; g < plan->n_groups; ++g) {
        const auto & group = plan->groups[g];
        uint8_t * code = bytes + group.code;

        ggml_capsule_plan_blocks(plan, g, [&](int row, int n_rows, int bits, int scale_at) {
            store_block(channels, g, n_rows, bits, rows + row*channels.d, bytes + scale_at, code);
            code += ggml_capsule_code_size(bits, n_rows, group.n_lanes);
        });
    }
}
