// a saved state put into a real context with a capsule: whatever it says of images, it is refused as a whole or the context works on
//
// The environment names a tiny model (FUZZ_MODEL) and its capsules of format v1 and v2 (FUZZ_CAPSULE, FUZZ_TILES). An input replaces what a real state says
// about images, under a right hash and length; the part that llama.cpp writes stays as it is. The first byte: 1 = one sequence, 2 = with the slots' data
// cut off, 4 = format v2.

#include "capsule/store/state.h"

#include "llama.h"
#include "llama-capsule.h"
#include "llama-capsule-state.h"

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

// a context with a capsule of one format
struct subject {
    llama_context * ctx;

    frame frames[2]; // of the whole state, of sequence 0

    size_t n_header; // the last 16 bytes of it: size and hash of the description
};

// magic, version, id (format v1: two tiers), size, hash
static subject subjects[2] = { { nullptr, {}, 40 }, { nullptr, {}, 32 } };

static frame split(const std::vector<uint8_t> & state, size_t n_header) {
    static const char magic[] = { 'K', 'V', 'C', 'S' };

    const auto it = std::find_end(state.begin(), state.end(), magic, magic + 4);
    require(it != state.end() && state.end() - it >= (int) n_header, "the state has no part for images");

    uint64_t size;
    memcpy(&size, &*it + n_header - 16, sizeof(size));
    require(size <= (size_t) (state.end() - it) - n_header, "the layout of the state is another one");

    const auto meta = it + n_header;

    return { { state.begin(), meta }, { meta, meta + size }, { meta + size, state.end() } };
}

static bool decode(llama_context * ctx, int32_t n, llama_pos pos, bool image) {
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

static void open(subject & x, llama_model * model, const char * path_capsule) {
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

    x.ctx = llama_capsule_init_from_model(model, params, cparams);
    llama_capsule_free(capsule);
    require(x.ctx && llama_capsule_is_attached(x.ctx), "no context with a capsule");

    // text, an image in slots, text, an image that is still hot
    require(decode(x.ctx, 2, 0, false) && decode(x.ctx, N_VISION, 2, true) && decode(x.ctx, 2, 2 + N_VISION, false) && decode(x.ctx, N_VISION, 4 + N_VISION, true), "decode");

    std::vector<uint8_t> state(llama_state_get_size(x.ctx));
    state.resize(llama_state_get_data(x.ctx, state.data(), state.size()));
    x.frames[0] = split(state, x.n_header);

    state.resize(llama_state_seq_get_size(x.ctx, 0));
    state.resize(llama_state_seq_get_data(x.ctx, state.data(), state.size(), 0));
    x.frames[1] = split(state, x.n_header);
}

extern "C" int LLVMFuzzerInitialize(int *, char ***) {
    llama_log_set(ignore_log, nullptr);
    llama_backend_init();

    llama_model_params mparams = llama_model_default_params();
    mparams.n_gpu_layers = 0;

    const char * path_model = getenv("FUZZ_MODEL");
    const char * paths[]    = { getenv("FUZZ_CAPSULE"), getenv("FUZZ_TILES") };
    require(path_model && paths[0] && paths[1], "FUZZ_MODEL, FUZZ_CAPSULE and FUZZ_TILES are not set");

    llama_model * model = llama_model_load_from_file(path_model, mparams);
    require(model, "the model does not load");

    // the real ones as seeds
    const char * folder = getenv("FUZZ_SEEDS");

    for (int i = 0; i < 2; ++i) {
        open(subjects[i], model, paths[i]);

        for (int j = 0; j < 2 && folder; ++j) {
            FILE * file = fopen((std::string(folder) + "/real-" + std::to_string(4*i + j)).c_str(), "wb");
            require(file, "FUZZ_SEEDS is not a folder");
            const auto & meta = subjects[i].frames[j].meta;
            fputc(4*i + j, file);
            fwrite(meta.data(), 1, meta.size(), file);
            fclose(file);
        }
    }

    return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    if (size < 1) {
        return 0;
    }

    const bool one_seq = (data[0] & 1) != 0;
    const bool tiles   = (data[0] & 4) != 0;

    llama_context * ctx = subjects[tiles].ctx;
    const frame & f = subjects[tiles].frames[one_seq];

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
        decode(ctx, 1, llama_memory_seq_pos_max(mem, 0) + 1, false);
        llama_capsule_compress(ctx, 0, 0, 1 << 20);
        llama_memory_seq_rm(mem, 0, 1, 9);
        llama_memory_seq_cp(mem, 0, 1, -1, -1);

        std::vector<uint8_t> again(llama_state_get_size(ctx));
        require(llama_state_get_data(ctx, again.data(), again.size()) > 0, "a state that is not saved again");
    }

    llama_memory_clear(mem, true);

    return 0;
}
