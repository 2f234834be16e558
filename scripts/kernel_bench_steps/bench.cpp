// Times attention over the tiles of one layer; scripts/kernel_bench compiles it for each instruction set.
//   bench TABLES GQA REPEATS THREADS    ns a token and KV head, a line for each repeat; GQA query heads for a KV head
//   bench TABLES size                   bytes of f16 over bytes of a slot
// TABLES: u8 [n][2][33][4], bits of K and V for heads of 128 channels; head h uses table h mod n
// CPU time of the process with one thread, else the time of the clock. HUGE in the environment: slots lie in huge pages
#include "attn.h"
#include "tile.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <sys/mman.h>
#include <thread>
#include <time.h>
#include <vector>

static constexpr int D         = 128;
static constexpr int N_HEAD_KV = 32;
static constexpr int WIDTH     = 24; // of a picture
static constexpr int N_SLOTS   = 28*9;
static constexpr int N_TOKENS  = 64*N_SLOTS;
static constexpr int N_POOL    = 32; // different tiles of each table; to code all of them would take longer than the benchmark

static double now(clockid_t clock) {
    timespec t;
    clock_gettime(clock, &t);
    return t.tv_sec + 1e-9*t.tv_nsec;
}

struct layer {
    ggml_capsule_channels k = { D, D, 0 };
    ggml_capsule_channels v = { D, 0, 0 };

    std::vector<uint8_t>  plans[2];
    std::vector<uint32_t> offsets[2];
    ggml_capsule_form     form = {};
    std::vector<ggml_capsule_slot> slots;
    uint8_t             * pool = nullptr;
    std::vector<double>   rope;
    const ggml_capsule_rope * ropes[1];
    std::vector<float>    angles, mean_k, mean_v, q, axes;

    layer(const uint8_t * tables, int n_tables) {
        std::mt19937 rng(1);
        std::normal_distribution<float> normal;

        const size_t stride = (ggml_capsule_plan_size(4) + 7)/8*8;
        auto plan_of = [&](int i, int h) { return (ggml_capsule_plan *) (plans[i].data() + h*stride); };
        for (int i = 0; i < 2; ++i) {
            plans[i].resize(N_HEAD_KV*stride);
            for (int h = 0; h < N_HEAD_KV; ++h) {
                ggml_capsule_plan_init(plan_of(i, h), i == 0 ? k : v, tables + (h % n_tables*2 + i)*33*4, 8, 8);
            }
            offsets[i].resize(N_HEAD_KV);
        }
        form.h = form.w = 8;
        form.k_plan = plans[0].data();
        form.v_plan = plans[1].data();
        form.k_stride = form.v_stride = n_tables > 1 ? stride : 0;
        form.size     = (ggml_capsule_form_offsets(form, N_HEAD_KV, offsets[0].data(), offsets[1].data()) + 63)/64*64;
        form.k_offset = offsets[0].data();
        form.v_offset = offsets[1].data();

        mean_k.resize(N_HEAD_KV*D);
        mean_v.resize(N_HEAD_KV*D);
        for (int i = 0; i < N_HEAD_KV*D; ++i) {
            mean_k[i] = i/D == 0 ? 0.5f*normal(rng) : mean_k[i % D]; // one for all heads: tiles go around
            mean_v[i] = i/D == 0 ? 0.2f*normal(rng) : mean_v[i % D];
        }
        uint8_t order[GGML_CAPSULE_MAX_ROWS];
        ggml_capsule_row_order(8, 8, order);

        std::vector<std::vector<uint8_t>> coded[2]; // [table][tile]
        std::vector<float> rows(64*D), steps(n_tables*N_POOL);
        for (int i = 0; i < 2; ++i) {
            for (int t = 0; t < n_tables*N_POOL; ++t) {
                const auto * plan = plan_of(i, t/N_POOL);
                for (int r = 0; r < 64; ++r) {
                    const int   u = order[r]/8;
                    const int   w = order[r]%8;
                    const float s = (i == 0 ? 3.0f : 1.5f)*std::pow(1.0f + u*u + w*w, -0.55f);
                    for (int c = 0; c < D; ++c) {
                        rows[r*D + c] = s*normal(rng);
                    }
                }
                coded[i].emplace_back(plan->size);
                ggml_capsule_store(i == 0 ? k : v, plan, rows.data(), coded[i][t].data());
                if (i == 0) {
                    steps[t] = ggml_capsule_step({ k, mean_k.data(), nullptr }, plan, coded[0][t].data());
                }
            }
        }
        constexpr size_t page = 2 << 20;
        const size_t size = (N_SLOTS*form.size + GGML_CAPSULE_PAD + page - 1)/page*page;
        pool = (uint8_t *) aligned_alloc(page, size);
        if (getenv("HUGE")) {
            madvise(pool, size, MADV_HUGEPAGE);
        }
        for (int i = 0; i < N_SLOTS; ++i) {
            uint8_t * slot = pool + i*form.size;
            for (int h = 0; h < N_HEAD_KV; ++h) {
                const int a = h % n_tables*N_POOL + (i*7 + h*13) % N_POOL;
                const int b = h % n_tables*N_POOL + (i*5 + h*11) % N_POOL;
                *ggml_capsule_step_of(slot + form.k_offset[h]) = steps[a];
                std::copy(coded[0][a].begin(), coded[0][a].end(), slot + form.k_offset[h]);
                std::copy(coded[1][b].begin(), coded[1][b].end(), slot + form.v_offset[h]);
            }
            slots.push_back({ i*(int) (form.size/64), 0, 0, 64*i });
        }

        double step_x[D/2], step_y[D/2], angle[D/2];
        for (int f = 0; f < D/2; ++f) {
            step_x[f] = std::pow(1e4, -f/(double) (D/2));
            step_y[f] = WIDTH*step_x[f];
        }
        rope.resize(ggml_capsule_rope_size(k)/sizeof(double));
        ropes[0] = (ggml_capsule_rope *) rope.data();
        ggml_capsule_rope_init((ggml_capsule_rope *) rope.data(), k, step_x, step_y);
        angles.resize(N_SLOTS*ggml_capsule_angles_size(k));
        for (int i = 0; i < N_SLOTS; ++i) {
            for (int f = 0; f < D/2; ++f) {
                angle[f] = step_x[f]*(5 + i/9*583 + i % 9/3*8*WIDTH + i % 3*8);
            }
            ggml_capsule_angles_init(&angles[i*ggml_capsule_angles_size(k)], k, angle, 1.0f);
        }
        q.resize(N_HEAD_KV*8*D);
        for (float & x : q) {
            x = 1.6f*normal(rng)/std::sqrt((float) D);
        }
        axes.resize(N_HEAD_KV*D*D);
        for (int h = 0; h < N_HEAD_KV; ++h) {
            for (int c = 0; c < D; ++c) {
                axes[(h*D + c)*D + c] = 1.0f;
            }
        }
    }

    ggml_capsule_attn_args args(int n_gqa) const {
        ggml_capsule_attn_args a = {};
        a.k = k;
        a.v = v;
        a.n_head_kv = N_HEAD_KV;
        a.k_mean = mean_k.data();
        a.v_mean = mean_v.data();
        a.v_axes = axes.data();
        a.pool   = pool;
        a.unit   = 64;
        a.forms  = &form;
        a.slots  = slots.data();
        a.ropes  = ropes;
        a.angles = angles.data();
        a.n_tokens = 1;
        a.n_gqa    = n_gqa;
        a.q        = q.data();
        a.q_token  = N_HEAD_KV*n_gqa*D;
        a.q_head   = D;
        return a;
    }
};

struct sums {
    std::vector<float> max, sum, out;
    ggml_capsule_attn_sums s;

    explicit sums(int n) : max(n, -INFINITY), sum(n), out((size_t) n*D), s{ max.data(), sum.data(), out.data() } {}
};

static void all_heads(const ggml_capsule_attn_args & args, int first, int last) {
    void * work = aligned_alloc(64, (ggml_capsule_attn_work(&args) + 63)/64*64);
    for (int h = first; h < last; ++h) {
        sums s(args.n_gqa);
        ggml_capsule_attn_tiles(&args, h, 0, N_SLOTS, &s.s, work);
    }
    free(work);
}

int main(int argc, char ** argv) {
    if (argc < 3) {
        return 1;
    }
    std::vector<uint8_t> tables(1 << 20);
    FILE * file = fopen(argv[1], "rb");
    tables.resize(file ? fread(tables.data(), 1, tables.size(), file) : 0);
    const int n_tables = (int) tables.size()/(2*33*4);
    if (n_tables == 0 || n_tables > N_HEAD_KV) {
        fprintf(stderr, "bench: 1 to %d tables are needed, %s has %d\n", N_HEAD_KV, argv[1], n_tables);
        return 1;
    }
    fclose(file);

    const auto l = std::make_unique<layer>(tables.data(), n_tables);
    if (argc < 5) {
        printf("%.3f\n", 2.0*2*64*D*N_HEAD_KV/l->form.size);
        return 0;
    }
    const int repeats   = atoi(argv[3]);
    const int n_threads = atoi(argv[4]);
    const auto args = l->args(atoi(argv[2]));
    all_heads(args, 0, 2);
    for (int i = 0; i < repeats; ++i) {
        const clockid_t clock = n_threads > 1 ? CLOCK_MONOTONIC : CLOCK_PROCESS_CPUTIME_ID;
        const double t = now(clock);
        std::vector<std::thread> threads;
        for (int j = 1; j < n_threads; ++j) {
            threads.emplace_back([&, j] { all_heads(args, N_HEAD_KV*j/n_threads, N_HEAD_KV*(j + 1)/n_threads); });
        }
        all_heads(args, 0, N_HEAD_KV/n_threads);
        for (auto & thread : threads) {
            thread.join();
        }
        printf("%.2f\n", 1e9*(now(clock) - t)/N_HEAD_KV/N_TOKENS);
    }
}
