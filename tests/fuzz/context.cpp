// a saved state put into a real context with a capsule: whatever it says of images, it is refused as a whole or the context works on
//
// The environment names a tiny model (FUZZ_MODEL) and its capsule (FUZZ_CAPSULE). An input replaces what a real state says about images, under a right hash and
// length; the part that llama.cpp writes stays as it is. The first byte: 1 = one sequence, 2 = with the slots' data cut off.

#include "capsule/store/state.h"

#include "llama.h"
#include "llama-capsule.h"

#include "ggml.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

static void ignore_log(ggml_log_level, const char *, void *) {}

static void require(bool ok, const char * what) {
    if (!ok) {
        fprintf(stderr, "fuzz: %s\n", what);
        abort();
    }
}

static const int N_VISION = 16;

// what is in front of the description of the images, and what is behind it
struct frame {
    std::vector<uint8_t> head;
    std::vector<uint8_t> meta;
    std::vector<uint8_t> data;
};

static llama_context * ctx;

static frame frames[2]; // of the whole state, of sequence 0

static const int N_HEADER = 32; // magic, version, id; the last 16 bytes: size and hash of the description

static frame split(const std::vector<uint8_t> & state) {
    static const char magic[] = { 'K', 'V', 'C', 'S' };

    const auto it = std::find_end(state.begin(), state.end(), magic, magic + 4);
    require(it != state.end() && state.end() - it >= N_HEADER, "the state has no part for images");

    uint64_t size;
    memcpy(&size, &*it + N_HEADER - 16, sizeof(size));
    require(size <= (size_t) (state.end() - it) - N_HEADER, "the layout of the state is another one");

    const auto meta = it + N_HEADER;

    return { { state.begin(), meta }, { meta, meta + size }, { meta + size, state.end() } };
}

static bool decode(int32_t n, llama_pos pos, bool image) {
    const int32_t n_embd = llama_model_n_embd_inp(llama_get_model(ctx));

    llama_batch batch = llama_batch_init(n, image ? n_embd : 0, 1);
    batch.n_tokens = n;
    for (int32_t i = 0; i < n; ++i) {
        if (image) {
            for (int32_t j = 0; j < n_embd; ++j) {
                batch.embd[i*n_embd + j] = 0.01f*((i*7 + j*3) % 100 - 50);
            }
        } else {
            batch.token[i] = 1 + i;
        }
        batch.pos[i]       = pos + i;
        batch.n_seq_id[i]  = 1;
        batch.seq_id[i][0] = 0;
        batch.logits[i]    = i == n - 1;
    }
    const int rc = llama_decode(ctx, batch);
    llama_batch_free(batch);

    return rc == 0;
}

static void open(llama_model * model, const char * path_capsule) {
    llama_capsule_context_params cparams = llama_capsule_context_default_params();
    llama_capsule * capsule = llama_capsule_load_from_file(model, path_capsule);
    require(capsule, llama_capsule_last_error());
    cparams.capsule = capsule;

    llama_context_params params = llama_context_default_params();
    params.n_ctx           = 256;
    params.n_seq_max       = 4;
    params.kv_unified      = true;
    params.n_threads       = 1;
    params.n_threads_batch = 1;

    ctx = llama_capsule_init_from_model(model, params, cparams);
    llama_capsule_free(capsule);
    require(ctx && llama_capsule_is_attached(ctx), "no context with a capsule");

    // text, an image in slots, text, an image that is still hot
    require(decode(2, 0, false) && decode(N_VISION, 2, true) && decode(2, 2 + N_VISION, false) && decode(N_VISION, 4 + N_VISION, true), "decode");

    std::vector<uint8_t> state(llama_state_get_size(ctx));
    state.resize(llama_state_get_data(ctx, state.data(), state.size()));
    frames[0] = split(state);

    state.resize(llama_state_seq_get_size(ctx, 0));
    state.resize(llama_state_seq_get_data(ctx, state.data(), state.size(), 0));
    frames[1] = split(state);
}

extern "C" int LLVMFuzzerInitialize(int *, char ***) {
    llama_log_set(ignore_log, nullptr);
    llama_backend_init();

    llama_model_params mparams = llama_model_default_params();
    mparams.n_gpu_layers = 0;

    const char * path_model   = getenv("FUZZ_MODEL");
    const char * path_capsule = getenv("FUZZ_CAPSULE");
    require(path_model && path_capsule, "FUZZ_MODEL and FUZZ_CAPSULE are not set");

    llama_model * model = llama_model_load_from_file(path_model, mparams);
    require(model, "the model does not load");

    // the real ones as seeds
    const char * folder = getenv("FUZZ_SEEDS");

    open(model, path_capsule);

    for (int i = 0; i < 2 && folder; ++i) {
        FILE * file = fopen((std::string(folder) + "/real-" + std::to_string(i)).c_str(), "wb");
        require(file, "FUZZ_SEEDS is not a folder");
        fputc(i, file);
        fwrite(frames[i].meta.data(), 1, frames[i].meta.size(), file);
        fclose(file);
    }

    return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    if (size < 1) {
        return 0;
    }

    const bool one_seq = (data[0] & 1) != 0;

    const frame & f = frames[one_seq];

    const uint64_t n_meta = size - 1;
    const uint64_t hash   = llama_capsule_state_v4::hash(data + 1, n_meta, 0);

    std::vector<uint8_t> state = f.head;
    memcpy(state.data() + state.size() - 16, &n_meta, sizeof(n_meta));
    memcpy(state.data() + state.size() -  8, &hash,   sizeof(hash));
    state.insert(state.end(), data + 1, data + size);
    if ((data[0] & 2) == 0) {
        state.insert(state.end(), f.data.begin(), f.data.end());
    }

    llama_memory_t mem = llama_get_memory(ctx);

    const size_t n_read = one_seq ?
        llama_state_seq_set_data(ctx, state.data(), state.size(), 0) :
        llama_state_set_data    (ctx, state.data(), state.size());

    llama_capsule_stats stats = {};
    stats.size = sizeof(stats);
    require(llama_capsule_get_stats(ctx, &stats) == 0, "stats");

    if (n_read == 0) {
        // nothing half-loaded
        require(stats.n_cold == 0 && stats.bytes_slots == 0, "slots of a refused state");
        require(llama_memory_seq_pos_max(mem, 0) == -1, "cells of a refused state");
    } else if (llama_memory_seq_pos_max(mem, 0) < 1 << 20) {
        // it works on: text after it, compression, removal, another save
        decode(1, llama_memory_seq_pos_max(mem, 0) + 1, false);
        llama_capsule_compress(ctx, 0, 0, 1 << 20);
        llama_memory_seq_rm(mem, 0, 1, 9);
        llama_memory_seq_cp(mem, 0, 1, -1, -1);

        std::vector<uint8_t> again(llama_state_get_size(ctx));
        require(llama_state_get_data(ctx, again.data(), again.size()) > 0, "a state that is not saved again");
    }

    llama_memory_clear(mem, true);

    return 0;
}
