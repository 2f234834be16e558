#include "llama-capsule-views.h"

#include <algorithm>
#include <cmath>
#include <numeric>

// energy of the views that may be left out: a fifth of what 8 bits take from a query
static constexpr double CAPSULE_VIEWS_ENERGY = 1e-5;

// cyclic Jacobi
std::vector<double> llama_capsule_eigen(uint32_t n, std::vector<double> & a, std::vector<double> & v) {
    static constexpr int    MAX_SWEEPS = 30;
    static constexpr double EPS        = 1e-24; // of the energy beside the diagonal

    v.assign(n*n, 0.0);
    for (uint32_t i = 0; i < n; ++i) {
        v[i*n + i] = 1.0;
    }

    auto turn = [n](double * x, double * y, double c, double s, uint32_t stride) {
        for (uint32_t k = 0; k < n; ++k) {
            const double xk = x[k*stride];
            const double yk = y[k*stride];

            x[k*stride] = c*xk - s*yk;
            y[k*stride] = s*xk + c*yk;
        }
    };

    for (int sweep = 0; sweep < MAX_SWEEPS; ++sweep) {
        double all = 0.0;
        double off = 0.0;
        for (uint32_t i = 0; i < n*n; ++i) {
            all += a[i]*a[i];
            off += i/n == i%n ? 0.0 : a[i]*a[i];
        }
        if (off <= EPS*all) {
            break;
        }
        for (uint32_t p = 0; p < n; ++p) {
            for (uint32_t q = p + 1; q < n; ++q) {
                if (a[p*n + q] == 0.0) {
                    continue;
                }
                const double tau = (a[q*n + q] - a[p*n + p])/(2.0*a[p*n + q]);
                const double t   = (tau < 0.0 ? -1.0 : 1.0)/(std::fabs(tau) + std::sqrt(1.0 + tau*tau));
                const double c   = 1.0/std::sqrt(1.0 + t*t);

                turn(&a[p*n], &a[q*n], c, t*c, 1);
                turn(&a[p],   &a[q],   c, t*c, n);
                turn(&v[p*n], &v[q*n], c, t*c, 1);
            }
        }
    }

    std::vector<uint32_t> order(n);
    std::iota(order.begin(), order.end(), 0);
    std::sort(order.begin(), order.end(), [&](uint32_t i, uint32_t j) { return a[i*n + i] > a[j*n + j]; });

    std::vector<double> values;
    std::vector<double> vectors;
    for (uint32_t i : order) {
        values.push_back(a[i*n + i]);
        vectors.insert(vectors.end(), v.begin() + i*n, v.begin() + (i + 1)*n);
    }
    v = std::move(vectors);

    return values;
}

llama_capsule_views::llama_capsule_views(const float * cs, uint32_t N, uint32_t n_rot, bool norm, uint32_t d, uint32_t ld) {
    const uint32_t half = n_rot/2;

    // channels without RoPE: an angle of 0
    const double n_still = 0.5*(d - n_rot);

    std::vector<double> gram(N*N);
    for (uint32_t s = 0; s < N; ++s) {
        for (uint32_t t = s; t < N; ++t) {
            double sum = n_still;
            for (uint32_t i = 0; i < n_rot; ++i) {
                sum += (double) cs[s*n_rot + i]*cs[t*n_rot + i];
            }
            gram[s*N + t] = gram[t*N + s] = sum;
        }
    }

    std::vector<double> vectors;
    const auto values = llama_capsule_eigen(N, gram, vectors);

    double left = 0.0;
    n = N;
    while (n > 1 && left + values[n - 1] <= CAPSULE_VIEWS_ENERGY*N*(0.5*d)) {
        left += values[--n];
    }

    phi .assign(n*ld, 0.0f);
    turn.assign(n*n_rot, 0.0f);
    still.resize(n);

    for (uint32_t m = 0; m < n; ++m) {
        const double * v = vectors.data() + m*N;

        std::copy(v, v + N, phi.begin() + m*ld);

        still[m] = std::accumulate(v, v + N, 0.0);
        for (uint32_t i = 0; i < n_rot; ++i) {
            double sum = 0.0;
            for (uint32_t t = 0; t < N; ++t) {
                sum += v[t]*cs[t*n_rot + i];
            }
            const bool is_sin = norm ? i%2 == 1 : i >= half;

            turn[m*n_rot + i] = is_sin ? -sum : sum;
        }
    }
}
