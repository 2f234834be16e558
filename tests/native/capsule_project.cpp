// Base views of queries, and products with rows as they are stored, for tests/test_capsule_project.py
#include "llama-capsule-simd.h"
#include "llama-capsule-views.h"

#include <algorithm>

// -> number of views; cs [N][n_rot], phi and turn have room for N views
extern "C" int views(int N, int n_rot, int norm, int d, const float * cs, float * phi, float * turn, float * still) {
    const llama_capsule_views res(cs, N, n_rot, norm, d, N);

    std::copy(res.phi.begin(),   res.phi.end(),   phi);
    std::copy(res.turn.begin(),  res.turn.end(),  turn);
    std::copy(res.still.begin(), res.still.end(), still);

    return res.n;
}

extern "C" void eigen(int n, double * a, double * values, double * vectors) {
    std::vector<double> m(a, a + n*n);
    std::vector<double> v;
    const auto res = llama_capsule_eigen(n, m, v);

    std::copy(res.begin(), res.end(), values);
    std::copy(v.begin(),   v.end(),   vectors);
}

// 0 if this machine has no such kernel; x [n_v][d], turn [n_v][n_rot], rows of a type -> products [n_v][ld], means [n_v]
extern "C" int products(int type, int n_rows, int d, int n_rot, int norm, int n_v, const float * x, const float * turn, const float * still, const float * mean,
        const uint8_t * rows, float * out, int ld, float * means) {
    const auto & simd = llama_capsule_simd_get();
    if (!simd.dot_rows) {
        return 0;
    }

    const size_t size = simd.query_size(d);

    std::vector<uint8_t> queries(n_v*size);
    std::vector<float>   scales(n_v);
    for (int v = 0; v < n_v; ++v) {
        const llama_capsule_view view = { (uint32_t) d, (uint32_t) n_rot, norm != 0, turn + v*n_rot, still[v], mean };

        scales[v] = simd.to_query(view, x + v*d, queries.data() + v*size, means[v]);
    }
    simd.dot_rows((ggml_type) type, d, n_rows, rows, n_v, queries.data(), out, ld);
    for (int i = 0; i < n_v*ld; ++i) {
        out[i] *= scales[i/ld];
    }
    return 1;
}

// basis [n_rows][n_out], of 16 bits; x [n_v][ld]
extern "C" int project(int n_rows, int n_out, const int16_t * basis, float scale, int n_v, const float * x, int ld, const float * scales, const float * means,
        const float * phi, float * out) {
    const auto & simd = llama_capsule_simd_get();
    if (!simd.project) {
        return 0;
    }

    std::vector<int16_t> pairs((n_rows + 1)/2*n_out*2);
    for (int r = 0; r < n_rows; ++r) {
        for (int t = 0; t < n_out; ++t) {
            pairs[(r/2*n_out + t)*2 + r%2] = basis[r*n_out + t];
        }
    }
    simd.project({ pairs.data(), scale, (uint32_t) n_rows, (uint32_t) n_out }, n_v, x, ld, scales, means, 1, phi, out);
    return 1;
}
