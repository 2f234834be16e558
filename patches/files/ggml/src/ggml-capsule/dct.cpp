#include "dct.h"

#include <cmath>
#include <cstring>

static constexpr int SIDE = GGML_CAPSULE_SIDE;

static const double PI = 3.14159265358979323846;

static double basis(int n, int u, int t) {
    return std::cos(PI*(t + 0.5)*u/n)*std::sqrt((u == 0 ? 1.0 : 2.0)/n);
}

// of frequency u of n
static double factor(int n, int u) {
    if (n < SIDE) {
        return 1.0;
    }
    const double aan = u == 0 ? 1.0 : std::sqrt(2.0)*std::cos(u*PI/16);
    return aan/std::sqrt(8.0)*(u % 4 == 0 ? 1.0 : u % 2 == 0 ? std::sqrt(2.0) : 2.0);
}

struct shape_tables {
    ggml_capsule_cosines cosines[SIDE + 1] = {};
    ggml_capsule_shape   shapes [SIDE + 1][SIDE + 1] = {};

    shape_tables() {
        for (int n = 2; n <= SIDE; ++n) {
            for (int u = 0; u < n; ++u) {
                for (int t = 0; t < n; ++t) {
                    cosines[n][u][t] = (int16_t) std::lrint(32768*basis(n, u, t));
                }
            }
        }
        for (int h = 1; h <= SIDE; ++h) {
            for (int w = 1; w <= SIDE; ++w) {
                init(shapes[h][w], h, w);
            }
        }
    }

    static void init(ggml_capsule_shape & s, int h, int w) {
        s.n_blocks = ggml_capsule_n_blocks(h, w);
        s.lone     = h*w % 2 == 0;
        s.n_pairs  = s.n_blocks - 1 - s.lone;

        uint8_t order[GGML_CAPSULE_MAX_ROWS];
        ggml_capsule_row_order(h, w, order);
        for (int r = 0; r < h*w; ++r) {
            const int u = order[r]/w;
            const int v = order[r]%w;
            s.place [r] = (uint8_t) (SIDE*u + v);
            s.factor[r] = (float) (factor(h, u)*factor(w, v));
        }
        for (int i = 0; i < s.n_blocks; ++i) {
            const bool pair = i > 0 && i <= s.n_pairs;
            const int  r    = i == 0 ? 0 : 2*i - 1;
            const uint32_t bits = pair ? ~0u : 0;
            memcpy(&s.pair[i], &bits, sizeof(bits));
            s.first [i] = s.place[r];
            s.second[i] = pair ? s.place[r + 1] : 0;
            s.mix[i]    = pair ? (float) std::sqrt(0.5) : 1.0f;
            s.pair_a[i] = s.factor[r]*s.mix[i];
            s.pair_b[i] = pair ? s.factor[r + 1]*s.mix[i] : 0.0f;
        }
        for (int u = 0; u < SIDE; ++u) {
            for (int t = 0; t < SIDE; ++t) {
                s.cos_h[u][t] = u < h && t < h ? (float) basis(h, u, t) : 0.0f;
                s.cos_w[u][t] = u < w && t < w ? (float) basis(w, u, t) : 0.0f;
                s.hidden[t*SIDE + u] = u < h && t < w ? 0.0f : -INFINITY;

                auto aan = [](int k) { return k == 0 ? 1.0 : std::sqrt(2.0)*std::cos(k*PI/16); };
                s.scale[u*SIDE + t] = (float) (1.0/(aan(u)*aan(t)*8.0));
            }
        }
    }
};

static const shape_tables tables;

const ggml_capsule_cosines & ggml_capsule_cosines_of(int n) {
    return tables.cosines[n];
}

const ggml_capsule_shape & ggml_capsule_shape_of(int h, int w) {
    return tables.shapes[h][w];
}
