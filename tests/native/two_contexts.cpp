// contexts with and without a capsule in one process, each in a thread of its own, on one model; see scripts/thread_sanitizer
//
//   two_contexts MODEL CAPSULE ROUNDS

#include "llama-capsule.h"
#include "llama.h"

#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>
#include <vector>

static void require(bool ok, const char * what) {
    if (!ok) {
        fprintf(stderr, "two_contexts: %s failed\n", what);
        exit(1);
    }
}

static void quiet(ggml_log_level, const char *, void *) {
}

// n tokens or n embeddings of one sequence
static void decode(llama_context * ctx, const std::vector<llama_token> & tokens, const std::vector<float> & embd, int32_t n, llama_pos & pos, llama_seq_id seq_id) {
    llama_batch batch = llama_batch_init(n, embd.empty() ? 0 : embd.size()/n, 1);

    batch.n_tokens = n;
    for (int32_t i = 0; i < n; ++i) {
        if (embd.empty()) {
            batch.token[i] = tokens[i];
        }
        batch.pos[i]       = pos++;
        batch.n_seq_id[i]  = 1;
        batch.seq_id[i][0] = seq_id;
        batch.logits[i]    = i == n - 1;
    }
    std::copy(embd.begin(), embd.end(), batch.embd);

    require(llama_decode(ctx, batch) == 0, "llama_decode");
    require(llama_get_logits_ith(ctx, n - 1) != nullptr, "llama_get_logits_ith");

    llama_batch_free(batch);
}

static void converse(const llama_model * model, const llama_capsule * capsule, int seed, int rounds) {
    constexpr int n_image = 96;

    llama_context_params params = llama_context_default_params();
    params.n_ctx           = 2048;
    params.n_batch         = 128;
    params.n_seq_max       = 2;
    params.kv_unified      = true;
    params.n_threads       = 2;
    params.n_threads_batch = 2;

    if (capsule) {
        llama_capsule_context_params next = llama_capsule_context_default_params();
        next.capsule = capsule;
        next.n_hot   = 512;
        llama_capsule_set_next_context(next);
    }

    llama_context * ctx = llama_init_from_model(const_cast<llama_model *>(model), params);
    require(ctx && llama_capsule_is_attached(ctx) == (capsule != nullptr), "llama_init_from_model");

    llama_memory_t mem = llama_get_memory(ctx);

    std::mt19937 rng(seed);
    std::normal_distribution<float> normal;

    const std::vector<llama_token> text = { 1, 5, 3, 7, 2 };

    llama_pos pos = 0;
    for (int r = 0; r < rounds; ++r) {
        std::vector<float> image(n_image*llama_model_n_embd(model));
        for (float & x : image) {
            x = normal(rng);
        }

        decode(ctx, text, {},    text.size(), pos, 0);
        decode(ctx, {},   image, n_image,     pos, 0);
        decode(ctx, text, {},    text.size(), pos, 0);

        // a fork, a saved state, a cut inside the image
        llama_memory_seq_cp(mem, 0, 1, -1, -1);
        llama_pos fork = pos;
        decode(ctx, text, {}, text.size(), fork, 1);

        std::vector<uint8_t> state(llama_state_seq_get_size(ctx, 0));
        require(llama_state_seq_get_data(ctx, state.data(), state.size(), 0) == state.size(), "llama_state_seq_get_data");
        require(llama_memory_seq_rm(mem, 1, -1, -1), "llama_memory_seq_rm");
        require(llama_state_seq_set_data(ctx, state.data(), state.size(), 0) == state.size(), "llama_state_seq_set_data");
        require(llama_memory_seq_rm(mem, 0, pos - 60, pos - 40), "llama_memory_seq_rm");

        if (pos > 700) {
            llama_memory_clear(mem, true);
            pos = 0;
        }
    }

    if (capsule) {
        llama_capsule_stats stats = {};
        stats.size = sizeof(stats);
        require(llama_capsule_get_stats(ctx, &stats) == 0 && stats.bytes_pools > 0, "llama_capsule_get_stats");
    }

    llama_free(ctx);
}

int main(int argc, char ** argv) {
    require(argc == 4, "two_contexts MODEL CAPSULE ROUNDS");

    llama_log_set(quiet, nullptr);
    llama_backend_init();

    llama_model_params params = llama_model_default_params();
    params.n_gpu_layers = 0;

    llama_model * model = llama_model_load_from_file(argv[1], params);
    require(model, "llama_model_load_from_file");

    llama_capsule * capsule = llama_capsule_load_from_file(model, argv[2]);
    require(capsule, "llama_capsule_load_from_file");

    const int rounds = atoi(argv[3]);

    std::vector<std::thread> threads;
    for (int i = 0; i < 3; ++i) {
        threads.emplace_back(converse, model, i == 1 ? nullptr : capsule, i, rounds);
    }
    for (auto & thread : threads) {
        thread.join();
    }

    llama_capsule_free(capsule);
    llama_model_free(model);
    llama_backend_free();

    printf("%d rounds in 3 threads: with, without and with a capsule\n", rounds);
    return 0;
}
