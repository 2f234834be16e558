#pragma once

#include "layout.h"

#include <algorithm>

//
// What takes the place of the DCT in a whole tile, if a file has it (kvcapsule_gguf/codec/transform.py). Shorter tiles keep the DCT.
//
// learned        rows are products of an orthonormal matrix with the tokens
// kept tokens    row i < n_kept is token order[i] as it is; row n_kept + j is what is left of token order[n_kept + j] after a prediction
//                from kept tokens as they are read back: gates times neighbours, plus down max(up x + bias, 0) of all neighbours (keys only)
//
// Tokens are in groups here: [64][n_groups][2][16], the registers of layout.h; both channels of a lane have one gate.
//

constexpr int GGML_CAPSULE_MAX_NEAR = 8;
constexpr int GGML_CAPSULE_MAX_MLP  = 1024;

struct ggml_capsule_transform {
    const float   * matrix  = nullptr; // [row][token], NULL: not learned
    const float   * columns = nullptr; // the same, [token][row]

    const uint8_t * order   = nullptr; // the token of each row, [64], NULL: no kept tokens
    const uint8_t * near    = nullptr; // the tokens that each dropped one is predicted from, [64 - n_kept][n_near]
    int32_t         n_kept  = 0;
    int32_t         n_near  = 0;
    int32_t         n_mlp   = 0;

    // of a head; of a layer: head after head
    const float   * gates    = nullptr; // [64 - n_kept][n_near][16*n_groups]
    const float   * mlp_up   = nullptr; // [n_mlp][n_near][32*n_groups]
    const float   * mlp_bias = nullptr; // [n_mlp]
    const float   * mlp_down = nullptr; // [n_mlp][32*n_groups]

    bool is_dct(int h, int w) const {
        return (!matrix && !order) || h*w < GGML_CAPSULE_MAX_ROWS;
    }

    ggml_capsule_transform of_head(int n_groups, int head) const {
        ggml_capsule_transform res = *this;

        const size_t lanes = (size_t) head*GGML_CAPSULE_LANES*n_groups;

        res.gates    += gates    ? lanes*(GGML_CAPSULE_MAX_ROWS - n_kept)*n_near : 0;
        res.mlp_up   += mlp_up   ? 2*lanes*n_mlp*n_near                          : 0;
        res.mlp_bias += mlp_bias ? (size_t) head*n_mlp                           : 0;
        res.mlp_down += mlp_down ? 2*lanes*n_mlp                                 : 0;

        return res;
    }
};

// adds to every dropped token of x what its neighbours say
inline void ggml_capsule_predict(const ggml_capsule_transform & t, int n_groups, float * x) {
    constexpr int L = GGML_CAPSULE_LANES;

    const size_t ld = (size_t) 2*L*n_groups;

    for (int j = 0; j < GGML_CAPSULE_MAX_ROWS - t.n_kept; ++j) {
        const uint8_t * near = t.near + j*t.n_near;
        float         * out  = x + t.order[t.n_kept + j]*ld;

        for (int g = 0; g < n_groups; ++g) {
            float a[L];
            float b[L];
            std::copy_n(out + 2*L*g,     L, a);
            std::copy_n(out + 2*L*g + L, L, b);

            for (int k = 0; k < t.n_near; ++k) {
                const float * gate = t.gates + ((size_t) (j*t.n_near + k)*n_groups + g)*L;
                const float * from = x + near[k]*ld + 2*L*g;
                for (int i = 0; i < L; ++i) {
                    a[i] += gate[i]*from[i];
                }
                for (int i = 0; i < L; ++i) {
                    b[i] += gate[i]*from[L + i];
                }
            }
            std::copy_n(a, L, out + 2*L*g);
            std::copy_n(b, L, out + 2*L*g + L);
        }

        for (int u = 0; u < t.n_mlp; ++u) {
            float sums[L] = {};
            for (int k = 0; k < t.n_near; ++k) {
                const float * up   = t.mlp_up + (size_t) (u*t.n_near + k)*ld;
                const float * from = x + near[k]*ld;
                for (size_t c = 0; c < ld; c += L) {
                    for (int i = 0; i < L; ++i) {
                        sums[i] += up[c + i]*from[c + i];
                    }
                }
            }
            float hidden = t.mlp_bias[u];
            for (float sum : sums) {
                hidden += sum;
            }
            if (!(hidden <= 0.0f)) {
                const float * down = t.mlp_down + u*ld;
                for (size_t c = 0; c < ld; ++c) {
                    out[c] += hidden*down[c];
                }
            }
        }
    }
}
