// Every function of every table of kernels that this machine can run, against loops in double: for tests/test_capsule_simd.py and scripts/check_simd
#include "llama-capsule-simd.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>

static std::mt19937 rng(1);

static uint32_t one_of(std::initializer_list<uint32_t> x) {
    return x.begin()[rng() % x.size()];
}

static float uniform() {
    return (int32_t) rng()*0x1p-31f;
}

static std::vector<float> values(size_t n, float f = 1.0f) {
    std::vector<float> res(n);
    for (float & x : res) {
        x = f*uniform();
    }
    return res;
}

// what lies between rows and behind the last one has to stay
static constexpr float CANARY = 12345.0f;

struct matrix {
    uint32_t n, d, ld;
    std::vector<float> x;

    matrix(uint32_t n, uint32_t d, bool random = true) : n(n), d(d), ld(d + one_of({ 0, 8 })), x(n*ld + 16, CANARY) {
        for (uint32_t i = 0; i < n*d; ++i) {
            at(i/d, i%d) = random ? uniform() : 0.0f;
        }
    }

    float & at(uint32_t i, uint32_t j)       { return x[i*ld + j]; }
    float   at(uint32_t i, uint32_t j) const { return x[i*ld + j]; }

    bool intact() const {
        for (size_t i = 0; i < x.size(); ++i) {
            if ((i/ld >= n || i%ld >= d) && x[i] != CANARY) {
                return false;
            }
        }
        return true;
    }
};

// the squared error of what was computed, relative to what should have been, or to the size of what was added up
struct comparison {
    double err = 0.0;
    double ref = 0.0;
    bool   ok  = true;

    void add(double got, double want, double size = 0.0) {
        err += (got - want)*(got - want);
        ref += std::max(want*want, size*size);
        ok   = ok && std::isfinite(got);
    }

    void check(bool x) {
        ok = ok && x;
    }

    double nmse() const {
        return ref > 0.0 ? err/ref : err;
    }
};

struct rows {
    ggml_type type;
    uint32_t  n, d;
    std::vector<uint8_t> data;
    std::vector<float>   x; // as ggml decodes them

    rows(ggml_type type, uint32_t n, uint32_t d) : type(type), n(n), d(d), data(n*ggml_row_size(type, d)), x(n*d) {
        for (uint32_t i = 0; i < n; ++i) {
            const auto v = values(d, i % 7 == 6 ? 0.0f : powf(2.0f, 4*uniform()));
            uint8_t * dst = data.data() + i*ggml_row_size(type, d);

            llama_capsule_row_quantize(type, v.data(), dst, d);
            if (type == GGML_TYPE_F32) {
                std::copy(v.begin(), v.end(), x.begin() + i*d);
            } else {
                ggml_get_type_traits(type)->to_float(dst, x.data() + i*d, d);
            }
        }
    }
};

using simd = llama_capsule_simd;

static uint32_t length() {
    return one_of({ 8, 24, 32, 40, 64, 80, 96, 128, 256, 320, 384, 512 });
}

static comparison test_mul(const simd & s) {
    const uint32_t n_out = 1 + rng() % 33, n_rows = 1 + rng() % 40;
    const bool by_row = rng() % 2, with_init = rng() % 2;

    const matrix x(n_rows, length());
    const auto w    = values(n_rows*n_out);
    const auto init = values(x.d);
    matrix     out(n_out, x.d);
    const auto before = out;

    const size_t w_r = by_row ? n_out : 1, w_t = by_row ? 1 : n_rows;
    s.mul(n_out, n_rows, x.d, w.data(), w_r, w_t, x.x.data(), x.ld, with_init ? init.data() : nullptr, out.x.data(), out.ld);

    comparison res;
    for (uint32_t t = 0; t < n_out; ++t) {
        for (uint32_t i = 0; i < x.d; ++i) {
            double sum = with_init ? init[i] : before.at(t, i), size = 0.0;
            for (uint32_t r = 0; r < n_rows; ++r) {
                sum  += (double) w[r*w_r + t*w_t]*x.at(r, i);
                size += fabs(w[r*w_r + t*w_t]*x.at(r, i));
            }
            res.add(out.at(t, i), sum, size);
        }
    }
    res.check(out.intact());
    return res;
}

static comparison test_dot(const simd & s) {
    const matrix x(1 + rng() % 70, length());
    const matrix y(1 + rng() % 33, x.d);
    matrix out(y.n, x.n);

    s.dot(x.n, y.n, x.d, x.x.data(), x.ld, y.x.data(), y.ld, out.x.data(), out.ld);

    comparison res;
    for (uint32_t q = 0; q < y.n; ++q) {
        for (uint32_t j = 0; j < x.n; ++j) {
            double sum = 0.0, size = 0.0;
            for (uint32_t i = 0; i < x.d; ++i) {
                sum  += (double) x.at(j, i)*y.at(q, i);
                size += fabs(x.at(j, i)*y.at(q, i));
            }
            res.add(out.at(q, j), sum, size);
        }
    }
    res.check(out.intact());
    return res;
}

static comparison test_fma(const simd & s) {
    matrix y(1, length());
    const auto a = values(y.d), b = values(y.d);
    const auto before = y;

    s.fma(y.d, a.data(), b.data(), y.x.data());

    comparison res;
    for (uint32_t i = 0; i < y.d; ++i) {
        res.add(y.at(0, i), before.at(0, i) + (double) a[i]*b[i]);
    }
    res.check(y.intact());
    return res;
}

static comparison test_scale(const simd & s) {
    matrix y(1, length());
    const auto  before = y;
    const float f      = uniform();

    s.scale(y.d, f, y.x.data());

    comparison res;
    for (uint32_t i = 0; i < y.d; ++i) {
        res.add(y.at(0, i), (double) f*before.at(0, i));
    }
    res.check(y.intact());
    return res;
}

static comparison test_rope(const simd & s) {
    matrix x(1 + rng() % 9, one_of({ 32, 64, 80, 128 }));
    const uint32_t n_rot = one_of({ x.d, x.d/2, 20 }), ld_cs = one_of({ 0, n_rot });
    const bool norm = rng() % 2;

    const auto cs     = values(n_rot + (x.n - 1)*ld_cs);
    const auto before = x;
    s.rope(x.n, x.x.data(), x.ld, cs.data(), ld_cs, n_rot, norm);

    comparison res;
    for (uint32_t j = 0; j < x.n; ++j) {
        for (uint32_t i = 0; i < n_rot/2; ++i) {
            const uint32_t i0 = norm ? 2*i : i, i1 = norm ? 2*i + 1 : i + n_rot/2;
            const double   c  = cs[j*ld_cs + i0], sn = cs[j*ld_cs + i1];

            res.add(x.at(j, i0), before.at(j, i0)*c  - before.at(j, i1)*sn);
            res.add(x.at(j, i1), before.at(j, i0)*sn + before.at(j, i1)*c);
        }
        for (uint32_t i = n_rot; i < x.d; ++i) {
            res.check(x.at(j, i) == before.at(j, i));
        }
    }
    res.check(x.intact());
    return res;
}

static comparison test_add_max(const simd & s) {
    matrix x(1, length());
    auto mask = values(x.d);
    const auto before = x;
    for (float & m : mask) {
        m = rng() % 3 ? m : -INFINITY;
    }
    const float max = s.add_max(x.x.data(), mask.data(), x.d);

    comparison res;
    float want = -INFINITY;
    for (uint32_t i = 0; i < x.d; ++i) {
        want = std::max(want, before.at(0, i) + mask[i]);
        res.check(x.at(0, i) == before.at(0, i) + mask[i]);
    }
    res.check(max == want && x.intact());

    // a NaN anywhere shows
    x.at(0, rng() % x.d) = NAN;
    res.check(std::isnan(s.add_max(x.x.data(), mask.data(), x.d)));
    return res;
}

static comparison test_exp_sum(const simd & s) {
    matrix x(1, length());
    for (uint32_t i = 0; i < x.d; ++i) {
        x.at(0, i) = i % 5 == 3 ? -INFINITY : i % 5 == 4 ? -200.0f : -20.0f + 20.0f*uniform();
    }
    const auto  before = x;
    const float max    = 0.5f;
    const float sum    = s.exp_sum(x.x.data(), max, x.d);

    comparison res;
    double want = 0.0;
    for (uint32_t i = 0; i < x.d; ++i) {
        const double e = exp((double) before.at(0, i) - max);

        want += e;
        res.add(x.at(0, i)/std::max(e, 1e-30), e > 1e-30 ? 1.0 : 0.0); // each by itself
        res.check(i % 5 != 3 || x.at(0, i) == 0.0f);
    }
    res.add(sum/want, 1.0);
    res.check(x.intact());
    return res;
}

static comparison test_hadamard(const simd & s) {
    const uint32_t n = one_of({ 8, 16, 32, 64, 128, 256 });
    matrix x(1, n*(1 + rng() % 3));
    auto want = x;

    s.hadamard(x.x.data(), n, x.d);
    llama_capsule_hadamard(want.x.data(), n, x.d);

    comparison res;
    res.check(x.x == want.x);
    return res;
}

static comparison test_to_float(const simd & s) {
    const ggml_type type = LLAMA_CAPSULE_TYPES[rng() % LLAMA_CAPSULE_N_TYPES];
    const uint32_t  d    = ggml_is_quantized(type) ? one_of({ 64, 128, 192, 256 }) : 1 + rng() % 100; // V of a cache without flash attention: any number

    const rows src(type, 1, d);
    matrix out(1, d);
    s.to_float(type, src.data.data(), out.x.data(), d);

    comparison res;
    res.check(std::equal(src.x.begin(), src.x.end(), out.x.begin()) && out.intact());
    return res;
}

static comparison test_from_float(const simd & s) {
    const ggml_type type = LLAMA_CAPSULE_TYPES[rng() % LLAMA_CAPSULE_N_TYPES];
    const uint32_t  d    = one_of({ 64, 128, 192, 256 });
    const size_t    size = ggml_row_size(type, d);

    const auto x = values(d);
    std::vector<uint8_t> got(size + 64, 0xa5), want = got;
    s.from_float(type, x.data(), got.data(), d);
    llama_capsule_row_quantize(type, x.data(), want.data(), d);

    comparison res;
    res.check(got == want);
    return res;
}

// rows of 4 and of 2 bits, one of them alone now and then, with weights of 8 bits
static comparison test_mul_int(const simd & s) {
    const uint32_t N = one_of({ 12, 16, 17, 40, 48, 64, 72, 96 }), d = one_of({ 32, 64, 96, 128, 256, 320, 384, 512 }), kind = rng() % 4;
    const uint32_t n_q4 = kind == 0 && d % QK2 == 0 ? 0 : 1 + rng() % 64, n_q2 = kind == 1 || d % QK2 != 0 ? 0 : 1 + rng() % (rng() % 4 ? 48 : 140), n = n_q4 + n_q2;

    const rows q4(GGML_TYPE_Q4_0, n_q4, d);
    const rows q2(GGML_TYPE_Q2_0, n_q2, n_q2 > 0 ? d : QK2);
    const auto basis = values(n*N);

    std::vector<float> basis_max;
    const auto ints = llama_capsule_int_basis(basis.data(), n, N, basis_max);

    matrix out(N, d);
    const auto before = out;
    s.mul_int(N, d, ints.data(), basis_max.data(), { q4.data.data(), q2.data.data(), n_q4, n_q2 }, out.x.data(), out.ld);

    comparison res;
    for (uint32_t t = 0; t < N; ++t) {
        for (uint32_t i = 0; i < d; ++i) {
            double sum = 0.0;
            for (uint32_t r = 0; r < n; ++r) {
                sum += (double) basis[r*N + t]*(r < n_q4 ? q4.x[r*d + i] : q2.x[(r - n_q4)*d + i]);
            }
            res.add((double) out.at(t, i) - before.at(t, i), sum);
        }
    }
    res.check(out.intact());
    return res;
}

// rows of slots as they are stored, against the queries that they meet
static comparison test_score_rows(const simd & s) {
    const uint32_t S = llama_capsule_score::n_slots(s.n_lanes), P = llama_capsule_score::n_rows(s.n_lanes), N = 1 + rng() % 70;
    const uint32_t d = one_of({ 64, 128, 256 }), n_q = 1 + rng() % 9, n_src = 1 + rng() % (3*S), n_had = llama_capsule_hadamard_size(d);
    const ggml_type type = LLAMA_CAPSULE_TYPES[2 + rng() % 3];
    const uint32_t n_rows = 1 + rng() % 20, g0 = rng() % 3, n_groups = g0 + (n_rows + P - 1)/P;

    std::vector<rows> src;
    std::vector<const uint8_t *> data;
    for (uint32_t i = 0; i < n_src; ++i) {
        src.emplace_back(type, n_rows, d);
    }
    for (const auto & x : src) {
        data.push_back(x.data.data());
    }

    std::vector<uint32_t> first = { 0 };
    for (uint32_t g = 0; g < n_groups; ++g) {
        first.push_back(first.back() + 1 + rng() % 5);
    }

    const uint32_t n_v = first.back();
    const size_t   size = llama_capsule_score::query_size(d, P), ld = N*S + 8*(rng() % 3);

    llama_capsule_buf<uint8_t> queries; // aligned
    std::fill_n(queries.resize(n_v*n_q*size), n_v*n_q*size, 0xa5);

    std::vector<uint32_t> tokens(n_v*P);
    for (auto & t : tokens) {
        t = rng() % N;
    }

    std::vector<float> views(n_v*n_q*P*d);
    for (uint32_t g = 0, v = 0; g < n_groups; ++g) {
        for (uint32_t n = (first[g + 1] - first[g])*n_q, j = 0; j < n; ++j, ++v) {
            std::vector<std::vector<float>> x(P), gates(P);
            std::vector<llama_capsule_lane> lanes;
            for (uint32_t p = 0; p < P; ++p) {
                x[p] = values(d);
                if (rng() % 2) {
                    gates[p] = values(d);
                }
                lanes.push_back({ x[p].data(), gates[p].empty() ? nullptr : gates[p].data(), queries.data() + first[g]*n_q*size, n, j, p });
                float * y = views.data() + (v*P + p)*d;
                for (uint32_t i = 0; i < d; ++i) {
                    y[i] = x[p][i]*(gates[p].empty() ? 1.0f : gates[p][i]);
                }
                llama_capsule_hadamard(y, n_had, d);
            }
            s.to_lanes(type, d, P, lanes.data());
        }
    }

    const size_t n_out = (n_src + S - 1)/S*n_q*ld;

    llama_capsule_buf<float> out;
    std::fill_n(out.resize(n_out), n_out, 0.5f);
    const llama_capsule_score score = { d, n_q, first.data(), tokens.data(), queries.data(), ld };
    s.score_rows(score, type, g0, n_rows, n_src, data.data(), out.data());

    comparison res;
    for (uint32_t n = 0; n < n_src; ++n) {
        for (uint32_t q = 0; q < n_q; ++q) {
            const float * got = out.data() + (n/S*n_q + q)*ld;
            res.check(std::all_of(got + N*S, got + ld, [](float x) { return x == 0.5f; }));

            std::vector<double> sum(N, 0.0), square(N, 0.0);
            for (uint32_t g = g0; g < n_groups; ++g) {
                for (uint32_t v = first[g]*P; v < first[g + 1]*P; ++v) {
                    // the vectors of a group come with all queries
                    const float * x = views.data() + ((v/P*n_q + q)*P + v%P)*d;
                    const float * y = src[n].x.data() + std::min((g - g0)*P + v%P, n_rows - 1)*d;

                    double x2 = 0.0, y2 = 0.0;
                    for (uint32_t i = 0; i < d; ++i) {
                        sum[tokens[v]] += (double) x[i]*y[i];
                        x2 += (double) x[i]*x[i];
                        y2 += (double) y[i]*y[i];
                    }
                    square[tokens[v]] += x2*y2/d;
                }
            }
            for (uint32_t t = 0; t < N; ++t) {
                if (square[t] > 0.0) {
                    res.add(got[t*S + n%S] - 0.5f, sum[t], sqrt(square[t]));
                } else {
                    res.check(got[t*S + n%S] == 0.5f);
                }
            }
        }
    }
    return res;
}

static comparison test_to_slots(const simd & s) {
    const uint32_t n = LLAMA_CAPSULE_VEC*(1 + rng() % 9), S = llama_capsule_score::n_slots(s.n_lanes);

    llama_capsule_buf<float> x; // aligned
    x.resize(n*S);
    const auto y = values(n*S);
    std::copy(y.begin(), y.end(), x.data());

    matrix out(S, n);
    std::vector<float *> dst;
    for (uint32_t i = 0; i < S; ++i) {
        dst.push_back(out.x.data() + i*out.ld);
    }
    s.to_slots(n, x.data(), dst.data());

    comparison res;
    for (uint32_t i = 0; i < S; ++i) {
        for (uint32_t t = 0; t < n; ++t) {
            res.add(out.at(i, t), y[t*S + i]);
        }
    }
    res.check(out.intact());
    return res;
}

// rows of one type alone
template<ggml_type TYPE>
static comparison test_mul_rows(const simd & s) {
    const uint32_t n_rows = 1 + rng() % (rng() % 4 ? 48 : 300), d = TYPE == GGML_TYPE_Q4_0 ? one_of({ 32, 64, 96, 128, 256, 320, 384, 512 }) : one_of({ 64, 128, 256, 320, 384, 512 });

    const rows src(TYPE, n_rows, d);
    matrix w(1 + rng() % 32, n_rows);
    for (uint32_t i = 0; i < w.n*n_rows; ++i) {
        w.at(i/n_rows, i%n_rows) *= i/n_rows % 5 == 4 ? 0.0f : powf(2.0f, 3*uniform());
    }
    matrix out(w.n, d);
    const auto before = out;
    s.mul_rows(TYPE, w.n, n_rows, d, w.x.data(), w.ld, src.data.data(), rng() % 2 ? src.data.data() : nullptr, out.x.data(), out.ld);

    comparison res;
    for (uint32_t q = 0; q < w.n; ++q) {
        for (uint32_t i = 0; i < d; ++i) {
            double sum = 0.0;
            for (uint32_t r = 0; r < n_rows; ++r) {
                sum += (double) w.at(q, r)*src.x[r*d + i];
            }
            res.add((double) out.at(q, i) - before.at(q, i), sum);
        }
    }
    res.check(out.intact());
    return res;
}

// hot cells: rows far apart
struct spread_rows : rows {
    size_t stride;
    std::vector<uint8_t> cells;

    spread_rows(ggml_type type) : rows(type, 1 + rng() % 70, type == GGML_TYPE_F16 ? length() : one_of({ 32, 64, 96, 128, 256, 320, 384, 512 })), stride(ggml_row_size(type, d) + 2*(rng() % 100)) {
        cells.resize(n*stride);
        for (uint32_t i = 0; i < n; ++i) {
            std::copy_n(data.data() + i*ggml_row_size(type, d), ggml_row_size(type, d), cells.data() + i*stride);
        }
    }
};

static comparison test_dot_cells(const simd & s) {
    const spread_rows x(rng() % 2 ? GGML_TYPE_F16 : GGML_TYPE_Q8_0);
    const matrix y(1 + rng() % 9, x.d);
    matrix out(y.n, x.n);
    s.dot_cells(x.type, x.n, y.n, x.d, x.cells.data(), x.stride, y.x.data(), y.ld, out.x.data(), out.ld);

    comparison res;
    for (uint32_t q = 0; q < y.n; ++q) {
        for (uint32_t j = 0; j < x.n; ++j) {
            double sum = 0.0, size = 0.0;
            for (uint32_t i = 0; i < x.d; ++i) {
                sum  += (double) x.x[j*x.d + i]*y.at(q, i);
                size += fabs(x.x[j*x.d + i]*y.at(q, i));
            }
            res.add(out.at(q, j), sum, size);
        }
    }
    res.check(out.intact());
    return res;
}

static comparison test_mul_cells(const simd & s) {
    const spread_rows x(rng() % 2 ? GGML_TYPE_F16 : GGML_TYPE_Q8_0);
    const matrix w(1 + rng() % 9, x.n);
    matrix out(w.n, x.d);
    const auto before = out;
    s.mul_cells(x.type, w.n, x.n, x.d, w.x.data(), w.ld, x.cells.data(), x.stride, out.x.data(), out.ld);

    comparison res;
    for (uint32_t q = 0; q < w.n; ++q) {
        for (uint32_t i = 0; i < x.d; ++i) {
            double sum = before.at(q, i), size = 0.0;
            for (uint32_t r = 0; r < x.n; ++r) {
                sum  += (double) w.at(q, r)*x.x[r*x.d + i];
                size += fabs(w.at(q, r)*x.x[r*x.d + i]);
            }
            res.add(out.at(q, i), sum, size);
        }
    }
    res.check(out.intact());
    return res;
}

// views of queries in 8 bits against rows as they are stored: the error by what products of vectors of these lengths have
static comparison test_dot_rows(const simd & s) {
    const uint32_t d = one_of({ 64, 128, 192, 256 }), n_v = 1 + rng() % 24, n_had = llama_capsule_hadamard_size(d);
    const uint32_t n_rot = one_of({ 0, 16, d/2, d });
    const bool     norm  = rng() % 2;
    const rows     src(LLAMA_CAPSULE_TYPES[2 + rng() % 3], 1 + rng() % 50, d);

    const size_t size = s.query_size(d);
    std::vector<uint8_t> queries(n_v*size);
    std::vector<float>   scales(n_v), views(n_v*d);

    comparison res;
    for (uint32_t v = 0; v < n_v; ++v) {
        const auto x = values(d), turn = values(n_rot), mean = values(d);
        const llama_capsule_view view = { d, n_rot, norm, turn.data(), uniform(), mean.data() };

        float dot_mean;
        scales[v] = s.to_query(view, x.data(), queries.data() + v*size, dot_mean);

        double sum = 0.0, all = 0.0;
        float * y = views.data() + v*d;
        for (uint32_t i = 0; i < n_rot/2; ++i) {
            const uint32_t i0 = norm ? 2*i : i, i1 = norm ? 2*i + 1 : i + n_rot/2;
            y[i0] = x[i0]*turn[i0] - x[i1]*turn[i1];
            y[i1] = x[i0]*turn[i1] + x[i1]*turn[i0];
        }
        for (uint32_t i = 0; i < d; ++i) {
            y[i] = i < n_rot ? y[i] : view.still*x[i];
            sum += y[i]*mean[i];
            all += fabs(y[i]*mean[i]);
        }
        res.check(fabs(dot_mean - sum) <= 1e-5*all);
        llama_capsule_hadamard(y, n_had, d);
    }

    const uint32_t ld = src.n + 15;
    std::vector<float> out(n_v*ld + 8, CANARY);
    s.dot_rows(src.type, d, src.n, src.data.data(), n_v, queries.data(), out.data(), ld);

    double rows2 = 0.0;
    for (float x : src.x) {
        rows2 += x*x/src.n;
    }
    for (uint32_t v = 0; v < n_v; ++v) {
        double view2 = 0.0;
        for (uint32_t i = 0; i < d; ++i) {
            view2 += views[v*d + i]*views[v*d + i];
        }
        for (uint32_t r = 0; r < src.n; ++r) {
            double sum = 0.0;
            for (uint32_t i = 0; i < d; ++i) {
                sum += views[v*d + i]*src.x[r*d + i];
            }
            res.add(scales[v]*out[v*ld + r], sum, sqrt(view2*rows2/d));
        }
    }
    res.check(std::all_of(out.begin() + n_v*ld, out.end(), [](float x) { return x == CANARY; }));
    return res;
}

static comparison test_project(const simd & s) {
    const uint32_t n_rows = 1 + rng() % (rng() % 4 ? 64 : 256), n_out = one_of({ 8, 16, 40, 48, 64, 72, 96 }), n_v = 1 + rng() % 40;
    const uint32_t ld = n_rows + 15, ld_s = one_of({ 1, 3 });

    std::vector<int16_t> basis((n_rows + 1)/2*n_out*2, 0);
    for (uint32_t r = 0; r < n_rows; ++r) {
        for (uint32_t t = 0; t < n_out; ++t) {
            basis[(r/2*n_out + t)*2 + r%2] = (int16_t) (32767*uniform()/sqrtf((float) n_rows));
        }
    }
    const auto x = values(n_v*ld), scales = values(n_v*ld_s), means = values(n_v*ld_s), phi = values(n_v*n_out);
    const llama_capsule_project p = { basis.data(), 1.0f/32767.0f, n_rows, n_out };

    matrix out(1, n_out);
    s.project(p, n_v, x.data(), ld, scales.data(), means.data(), ld_s, phi.data(), out.x.data());

    comparison res;
    for (uint32_t t = 0; t < n_out; ++t) {
        double want = 0.0, size = 0.0;
        for (uint32_t v = 0; v < n_v; ++v) {
            double sum = 0.0;
            for (uint32_t r = 0; r < n_rows; ++r) {
                sum += (double) basis[(r/2*n_out + t)*2 + r%2]/32767.0*x[v*ld + r];
            }
            want += phi[v*n_out + t]*(means[v*ld_s] + scales[v*ld_s]*sum);
            size += fabs(phi[v*n_out + t]*(fabs(means[v*ld_s]) + fabs(scales[v*ld_s]*sum)));
        }
        res.add(out.at(0, t), want, size);
    }
    res.check(out.intact());
    return res;
}

struct test {
    const char * name;
    bool         have;
    comparison (*fn)(const simd & s);
    double       limit; // of the NMSE; 0: every bit
};

static int run(const simd & s, int n_cases) {
    const test tests[] = {
        { "mul",            true,                     test_mul,                       1e-12 },
        { "dot",            true,                     test_dot,                       1e-12 },
        { "fma",            true,                     test_fma,                       1e-12 },
        { "scale",          true,                     test_scale,                     1e-12 },
        { "rope",           true,                     test_rope,                      1e-12 },
        { "add_max",        true,                     test_add_max,                   0     },
        { "exp_sum",        true,                     test_exp_sum,                   1e-12 },
        { "hadamard",       true,                     test_hadamard,                  0     },
        { "to_float",       true,                     test_to_float,                  0     },
        { "from_float",     true,                     test_from_float,                0     },
        { "mul_int",        s.mul_int != nullptr,     test_mul_int,                   1e-3  },
        { "score_rows",     s.score_rows != nullptr,  test_score_rows,                1e-3  },
        { "to_slots",       s.to_slots != nullptr,    test_to_slots,                  0.0   },
        { "mul_rows, q4_0", s.mul_rows != nullptr,    test_mul_rows<GGML_TYPE_Q4_0>,  1e-3  },
        { "mul_rows, q2_0", s.mul_rows != nullptr,    test_mul_rows<GGML_TYPE_Q2_0>,  1e-3  },
        { "dot_cells",      s.dot_cells != nullptr,   test_dot_cells,                 1e-12 },
        { "mul_cells",      s.mul_cells != nullptr,   test_mul_cells,                 1e-12 },
        { "dot_rows",       s.dot_rows != nullptr,    test_dot_rows,                  1e-3  },
        { "project",        s.project != nullptr,     test_project,                   1e-8  },
    };

    int n_bad = 0;
    for (const auto & t : tests) {
        if (!t.have) {
            printf("%-8s %-15s -\n", s.name, t.name);
            continue;
        }
        double worst = 0.0;
        int    bad   = 0;
        for (int i = 0; i < n_cases; ++i) {
            const auto res = t.fn(s);
            worst = std::max(worst, res.nmse());
            bad  += !(res.ok && res.nmse() <= t.limit);
        }
        printf("%-8s %-15s %d cases, worst NMSE %.1e, limit %.0e: %s\n", s.name, t.name, n_cases, worst, t.limit, bad ? "WRONG" : "ok");
        n_bad += bad > 0;
    }
    return n_bad;
}

// [cases of each function]
int main(int argc, char ** argv) {
    setvbuf(stdout, nullptr, _IOLBF, 0);
    int n_bad = 0;
    for (const auto & s : llama_capsule_simd_all()) {
        n_bad += run(s, argc > 1 ? atoi(argv[1]) : 50);
    }
    printf("chosen: %s\n", llama_capsule_simd_get().name);
    return n_bad > 0;
}
