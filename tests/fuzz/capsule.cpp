// the capsule loader without a model: any bytes are a capsule or one line, and what is accepted can be used

#include "capsule/format/reader.h"

#include "memory_source.h"

#include "ggml.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>

static void ignore_log(ggml_log_level, const char *, void *) {}

static void require(bool ok, const char * what) {
    if (!ok) {
        fprintf(stderr, "fuzz: %s\n", what);
        abort();
    }
}

extern "C" int LLVMFuzzerInitialize(int *, char ***) {
    ggml_log_set(ignore_log, nullptr);
    return 0;
}

static void read_tables(memory_source & source) {
    const auto tables = llama_capsule_tables_read(source, "fuzz", nullptr);

    for (uint32_t i = 0; i < tables->smaller.size(); ++i) {
        require(tables->bytes_tile(i) > 0, "a tier without bytes");
    }
    require(tables->tier_for_ratio(0.5f) < tables->smaller.size() && tables->i_tier_first < tables->smaller.size(), "a tier that does not exist");

    for (const auto & l : tables->layers) {
        const size_t n = tables->smaller.size()*l.n_head_kv*llama_capsule_tables::N_ROWS;
        require(l.k_table.size() == n*ggml_capsule_n_groups(tables->channels_k(l)) && l.v_table.size() == n*ggml_capsule_n_groups(tables->channels_v(l)), "a table of another size");
    }
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    memory_source source(data, size);

    try {
        read_tables(source);
    } catch (const std::runtime_error & err) {
        for (const char * c = err.what(); *c; ++c) {
            require(*c >= 0x20 && *c < 0x7f, "a line with control characters");
        }
        // the header was checked before: ggml's parser and ours must agree
        require(strcmp(err.what(), "capsule 'fuzz': ggml does not read its header") != 0, err.what());
    }

    return 0;
}
