// contexts with and without a capsule in one process, each in a thread of its own, on one model; see scripts/sanitizers
//
//   two_contexts MODEL CAPSULE ROUNDS TYPE QUALITY

#include "llama-capsule.h"
#include "llama.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
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

struct conversation {
    llama_context * ctx;
    bool            mrope;

    // n tokens or n embeddings, all of one sequence; an image is 12 tokens wide
    void decode(const std::vector<llama_token> & tokens, const std::vector<float> & embd, int32_t n, llama_pos & pos, llama_seq_id seq_id) {
        std::vector<llama_pos> grid(4*n);
        for (int32_t i = 0; i < n; ++i) {
            grid[i] = embd.empty() || !mrope ? pos + i : pos;
            if (!embd.empty() && mrope) {
                grid[n + i]   = pos + i/12;
                grid[2*n + i] = pos + i%12;
            }
        }
        const std::vector<llama_seq_id> seq_ids(n, seq_id);
        run(tokens, embd, n, grid, seq_ids);
        pos += embd.empty() || !mrope ? n : std::max(12, n/12);
    }

    // a token of each sequence in one batch
    void decode_both(llama_pos & pos, llama_pos & fork) {
        run({ 4, 6 }, {}, 2, { pos, fork }, { 0, 1 });
        pos++;
        fork++;
    }

private:
    void run(const std::vector<llama_token> & tokens, const std::vector<float> & embd, int32_t n, const std::vector<llama_pos> & pos, const std::vector<llama_seq_id> & seq_ids) {
        llama_batch batch = llama_batch_init(n, embd.empty() ? 0 : embd.size()/n, 1);

        llama_pos * own = batch.pos;

        batch.n_tokens = n;
        batch.pos      = const_cast<llama_pos *>(pos.data());
        for (int32_t i = 0; i < n; ++i) {
            if (embd.empty()) {
                batch.token[i] = tokens[i];
            }
            batch.n_seq_id[i]  = 1;
            batch.seq_id[i][0] = seq_ids[i];
            batch.logits[i]    = i == n - 1;
        }
        std::copy(embd.begin(), embd.end(), batch.embd);

        require(llama_decode(ctx, batch) == 0, "llama_decode");
        require(llama_get_logits_ith(ctx, n - 1) != nullptr, "llama_get_logits_ith");

        batch.pos = own;
        llama_batch_free(batch);
    }
};

// the most slots of each tier; of format v1: economy, faithful
static std::vector<uint32_t> converse(const llama_model * model, const llama_capsule * capsule, ggml_type type, float quality, int seed, int rounds) {
    constexpr int n_image = 9*12; // not a multiple of a block

    llama_context_params params = llama_context_default_params();
    params.n_ctx           = 2048;
    params.n_batch         = 128;
    params.n_seq_max       = 2;
    params.kv_unified      = true;
    params.n_threads       = 2;
    params.n_threads_batch = 2;
    params.type_k          = type;
    params.type_v          = type;
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;

    llama_capsule_context_params capsule_params = llama_capsule_context_default_params();
    capsule_params.capsule = capsule;
    capsule_params.n_hot   = 512;
    capsule_params.quality = quality;

    llama_context * ctx = llama_capsule_init_from_model(const_cast<llama_model *>(model), params, capsule_params);
    require(ctx && llama_capsule_is_attached(ctx) == (capsule != nullptr), "llama_capsule_init_from_model");

    llama_memory_t mem = llama_get_memory(ctx);

    conversation c = { ctx, llama_model_rope_type(model) == LLAMA_ROPE_TYPE_MROPE };

    std::mt19937 rng(seed);
    std::normal_distribution<float> normal;

    const std::vector<llama_token> text = { 1, 5, 3, 7, 2 };

    std::vector<uint32_t> res;

    llama_pos pos = 0;
    for (int r = 0; r < rounds; ++r) {
        std::vector<float> image(n_image*llama_model_n_embd(model));
        for (float & x : image) {
            x = normal(rng);
        }

        c.decode(text, {},    text.size(), pos, 0);
        c.decode({},   image, n_image,     pos, 0);
        c.decode(text, {},    text.size(), pos, 0);

        // a fork, a saved state, a cut inside the image
        llama_memory_seq_cp(mem, 0, 1, -1, -1);
        llama_pos fork = pos;
        c.decode(text, {}, text.size(), fork, 1);
        c.decode_both(pos, fork);
        c.decode({ 5 }, {}, 1, pos, 0);

        std::vector<uint8_t> state(llama_state_seq_get_size(ctx, 0));
        require(llama_state_seq_get_data(ctx, state.data(), state.size(), 0) == state.size(), "llama_state_seq_get_data");
        require(llama_memory_seq_rm(mem, 1, -1, -1), "llama_memory_seq_rm");
        require(llama_state_seq_set_data(ctx, state.data(), state.size(), 0) == state.size(), "llama_state_seq_set_data");
        require(llama_memory_seq_rm(mem, 0, pos - 60, pos - 40), "llama_memory_seq_rm");

        if (capsule) {
            llama_capsule_stats stats = {};
            stats.size = sizeof(stats);
            require(llama_capsule_get_stats(ctx, &stats) == 0 && stats.bytes_pools > 0, "llama_capsule_get_stats");
            const uint32_t * slots = stats.n_slots_tier;
            res.resize(stats.n_tiers);
            for (size_t t = 0; t < res.size(); ++t) {
                res[t] = std::max(res[t], slots[t]);
            }
        }

        if (pos > 700) {
            llama_memory_clear(mem, true);
            pos = 0;
        }
    }

    llama_free(ctx);

    return res;
}

int main(int argc, char ** argv) {
    require(argc == 6, "two_contexts MODEL CAPSULE ROUNDS TYPE QUALITY");

    llama_log_set(quiet, nullptr);
    llama_backend_init();

    llama_model_params params = llama_model_default_params();
    params.n_gpu_layers = 0;

    llama_model * model = llama_model_load_from_file(argv[1], params);
    require(model, "llama_model_load_from_file");

    llama_capsule * capsule = llama_capsule_load_from_file(model, argv[2]);
    require(capsule, "llama_capsule_load_from_file");

    const int       rounds  = atoi(argv[3]);
    const ggml_type type    = strcmp(argv[4], "q8_0") == 0 ? GGML_TYPE_Q8_0 : GGML_TYPE_F16;
    const float     quality = atof(argv[5]);

    std::vector<uint32_t>    slots[3];
    std::vector<std::thread> threads;
    for (int i = 0; i < 3; ++i) {
        threads.emplace_back([&, i]() { slots[i] = converse(model, i == 1 ? nullptr : capsule, type, quality, i, rounds); });
    }
    for (auto & thread : threads) {
        thread.join();
    }

    llama_capsule_free(capsule);
    llama_model_free(model);
    llama_backend_free();

    // with a capsule, the most slots at a time
    for (size_t t = 0; t < slots[0].size(); ++t) {
        printf("%s%u", t ? " + " : "", slots[0][t]);
    }
    printf("\n");
    return 0;
}
