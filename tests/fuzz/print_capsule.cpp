// print_capsule FILE...: what the C++ loader makes of each file, one JSON object a line: its refusal, or a hash of each part of the contents

#include "capsule/format/reader.h"
#include "capsule/util/sha256.h"
#include "memory_source.h"

#include "ggml.h"

#include <cstdio>
#include <fstream>
#include <iterator>

static void ignore_log(ggml_log_level, const char *, void *) {}

template<typename T>
static std::string hash(const std::vector<T> & x) {
    llama_capsule_sha256 sha;
    sha.update(x.data(), x.size()*sizeof(T));
    return sha.finish().substr(0, 16);
}

// bytes that both readers can write: u32 and f32 as they are, strings with their length
struct content {
    std::vector<uint8_t> data;

    void put(const void * p, size_t n) {
        data.insert(data.end(), (const uint8_t *) p, (const uint8_t *) p + n);
    }
    void u32(uint32_t x) {
        put(&x, sizeof(x));
    }
    void f32(float x) {
        put(&x, sizeof(x));
    }
    void str(const std::string & x) {
        u32(x.size());
        put(x.data(), x.size());
    }
};

static std::string metadata(const llama_capsule_tables & c) {
    content out;

    out.str(c.architecture);
    out.u32(c.block_count);
    out.str(c.rope_type);
    out.str(c.fingerprint);
    out.u32(c.n_rot);
    for (uint32_t x : c.rope_sections) {
        out.u32(x);
    }
    for (float x : c.smaller) {
        out.f32(x);
    }
    out.u32(c.i_tier_first);

    for (const auto & l : c.layers) {
        for (uint32_t x : { l.il, (uint32_t) l.rope, l.n_head_kv, l.n_embd_head_k, l.n_embd_head_v }) {
            out.u32(x);
        }
        out.f32(l.k_energy);
        out.f32(l.v_energy);
    }

    return hash(out.data);
}

static void print(const std::string & metadata, const std::vector<std::string> & tensors) {
    printf("{\"metadata\": \"%s\", \"tensors\": [", metadata.c_str());
    for (size_t i = 0; i < tensors.size(); ++i) {
        printf("%s\"%s\"", i > 0 ? ", " : "", tensors[i].c_str());
    }
    printf("]}\n");
}

static void print(const llama_capsule_tables & c) {
    std::vector<std::string> tensors;
    for (const auto & l : c.layers) {
        for (const auto * x : { &l.k_mean, &l.v_mean, &l.v_axes }) {
            tensors.push_back(hash(*x));
        }
        tensors.push_back(hash(l.k_table));
        tensors.push_back(hash(l.v_table));
        tensors.push_back(hash(l.narrow));
    }
    print(metadata(c), tensors);
}

static std::string quoted(const std::string & s) {
    std::string res;
    for (char c : s) {
        res += c == '"' || c == '\\' ? std::string("\\") + c : std::string(1, c);
    }
    return '"' + res + '"';
}

int main(int argc, char ** argv) {
    ggml_log_set(ignore_log, nullptr);

    for (int i = 1; i < argc; ++i) {
        std::ifstream in(argv[i], std::ios::binary);
        const std::vector<uint8_t> data((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());

        memory_source source(data.data(), data.size());

        try {
            print(*llama_capsule_tables_read(source, argv[i], nullptr));
        } catch (const std::runtime_error & err) {
            printf("{\"refused\": %s}\n", quoted(err.what()).c_str());
        }
    }

    return 0;
}
