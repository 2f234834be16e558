// runs a harness where there is no libFuzzer: the corpus, then byte mutations of it. The flags are libFuzzer's

#include <sanitizer/common_interface_defs.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size);
extern "C" __attribute__((weak)) int LLVMFuzzerInitialize(int *, char ***);

using bytes = std::vector<uint8_t>;

static const uint64_t INTERESTING[] = { 0, 1, 2, 8, 16, 64, 127, 128, 255, 256, 65535, 65536, 1u << 31, 0xffffffff, 1ull << 62, 1ull << 63, ~0ull };

static void mutate(bytes & x, const std::vector<bytes> & corpus, std::mt19937_64 & rng) {
    auto below = [&](size_t n) { return (size_t) (rng() % std::max<size_t>(n, 1)); };

    switch (below(7)) {
        case 0: if (!x.empty()) { x[below(x.size())] ^= 1 << below(8); } break;
        case 1: if (!x.empty()) { x[below(x.size())] = (uint8_t) rng(); } break;
        case 2: x.resize(below(x.size() + 1)); break;
        case 3: x.insert(x.begin() + below(x.size() + 1), 1 + below(16), (uint8_t) rng()); break;
        case 4: {
            const uint64_t v = INTERESTING[below(std::size(INTERESTING))];
            const size_t   n = (size_t) 1 << below(4);
            if (x.size() >= n) {
                memcpy(x.data() + below(x.size() - n + 1), &v, n);
            }
        } break;
        case 5: {
            // a piece of another file
            const bytes & y = corpus[below(corpus.size())];
            const size_t at = below(y.size());
            const size_t n  = std::min(below(256), y.size() - at);
            if (x.size() >= n && n > 0) {
                memcpy(x.data() + below(x.size() - n + 1), y.data() + at, n);
            }
        } break;
        case 6: if (x.size() > 8) { const size_t at = below(x.size() - 8); x.erase(x.begin() + at, x.begin() + at + 1 + below(7)); } break;
    }
}

static std::string   crash_path = "crash-input";
static const bytes * current    = nullptr;

extern "C" const char * __asan_default_options() {
    return "handle_abort=1:detect_leaks=1";
}

static void save_input() {
    if (current) {
        std::ofstream(crash_path, std::ios::binary).write((const char *) current->data(), current->size());
        fprintf(stderr, "Test unit written to %s\n", crash_path.c_str());
    }
}

static void run(const bytes & x) {
    current = &x;

    // exactly as large as the input, so that the sanitizer sees a read behind it
    uint8_t * copy = (uint8_t *) malloc(std::max<size_t>(x.size(), 1));
    memcpy(copy, x.data(), x.size());
    LLVMFuzzerTestOneInput(copy, x.size());
    free(copy);

    current = nullptr;
}

int main(int argc, char ** argv) {
    uint64_t n_runs = 1000000;
    uint64_t seed   = 1;
    double   limit  = 1e9;

    std::vector<std::string> paths;
    for (int i = 1; i < argc; ++i) {
        const std::string arg = argv[i];
        if      (arg.rfind("-runs=", 0)            == 0) { n_runs  = std::stoull(arg.substr(6)); }
        else if (arg.rfind("-seed=", 0)            == 0) { seed    = std::stoull(arg.substr(6)); }
        else if (arg.rfind("-max_total_time=", 0)  == 0) { limit   = std::stod(arg.substr(16)); }
        else if (arg.rfind("-artifact_prefix=", 0) == 0) { crash_path = arg.substr(17) + "crash-input"; }
        else if (arg[0] != '-')                          { paths.push_back(arg); }
    }

    __sanitizer_set_death_callback(save_input);

    if (LLVMFuzzerInitialize) {
        LLVMFuzzerInitialize(&argc, &argv);
    }

    std::vector<bytes> corpus;
    for (const auto & path : paths) {
        std::vector<std::filesystem::path> files;
        if (std::filesystem::is_directory(path)) {
            for (const auto & entry : std::filesystem::directory_iterator(path)) {
                files.push_back(entry.path());
            }
        } else {
            files.push_back(path);
        }
        std::sort(files.begin(), files.end());
        for (const auto & file : files) {
            std::ifstream in(file, std::ios::binary);
            corpus.emplace_back(std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>());
            run(corpus.back());
        }
    }
    if (corpus.empty()) {
        corpus.push_back({});
    }

    std::mt19937_64 rng(seed);

    const auto start = std::chrono::steady_clock::now();
    auto seconds = [&]() { return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count(); };

    uint64_t i = 0;
    for (; i < n_runs && (i % 1024 != 0 || seconds() < limit); ++i) {
        bytes x = corpus[rng() % corpus.size()];
        for (size_t n = 1 + rng() % 4; n > 0; --n) {
            mutate(x, corpus, rng);
        }
        run(x);
    }

    fprintf(stderr, "Done %llu runs in %.0f second(s)\n", (unsigned long long) i, seconds());

    return 0;
}
