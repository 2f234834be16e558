#include "capsule/format/header.h"

#include "llama-impl.h"

#include <algorithm>
#include <cstring>
#include <set>
#include <stdexcept>

// limits of any file
static constexpr uint64_t HEADER_MAX_COUNT     = 65536; // keys, tensors
static constexpr uint64_t HEADER_MAX_NAME      = 256;
static constexpr uint64_t HEADER_MAX_ALIGNMENT = 65536;
static constexpr int64_t  HEADER_MAX_ELEMENTS  = 1ll << 40;

// limits of the keys that a capsule may have
static constexpr uint64_t HEADER_MAX_STRING = 64*1024;
static constexpr uint64_t HEADER_MAX_ARRAY  = 65536;

[[noreturn]] static void fail(const std::string & reason) {
    throw std::runtime_error(reason);
}

static bool starts_with(const std::string & s, const char * prefix) {
    return s.compare(0, strlen(prefix), prefix) == 0;
}

static bool is_plain(const std::string & s) {
    return std::all_of(s.begin(), s.end(), [](char c) { return c >= 0x20 && c < 0x7f; });
}

// strings that are compared or logged; the others are never looked at
static bool is_plain_key(const std::string & key) {
    return key == "general.type" || key == "general.architecture" || key == "adapter.type" ||
        (starts_with(key, "kvcapsule.") && !starts_with(key, "kvcapsule.train."));
}

// bytes of an element, the least for a string
static uint64_t element_size(gguf_type type) {
    switch (type) {
        case GGUF_TYPE_UINT8:
        case GGUF_TYPE_INT8:
        case GGUF_TYPE_BOOL:    return 1;
        case GGUF_TYPE_UINT16:
        case GGUF_TYPE_INT16:   return 2;
        case GGUF_TYPE_UINT32:
        case GGUF_TYPE_INT32:
        case GGUF_TYPE_FLOAT32: return 4;
        default:                return 8;
    }
}

struct header_cursor {
    llama_capsule_source & source;

    uint64_t size = source.size();
    uint64_t at   = 0;

    // the header is read in pieces
    std::vector<uint8_t> buf    = {};
    uint64_t             buf_at = 0;

    void need(uint64_t n) const {
        if (n > size - at) {
            fail("the file ends inside its header, it is incomplete");
        }
    }

    void skip(uint64_t n) {
        need(n);
        at += n;
    }

    void copy(void * dst, size_t n) {
        need(n);
        if (at < buf_at || at + n > buf_at + buf.size()) {
            buf.resize(std::min<uint64_t>(std::max<size_t>(n, 16*1024), size - at));
            buf_at = at;
            source.read(at, buf.data(), buf.size());
        }
        memcpy(dst, buf.data() + (at - buf_at), n);
        at += n;
    }

    template<typename T>
    T get() {
        T res;
        copy(&res, sizeof(res));
        return res;
    }

    std::string str(uint64_t n) {
        std::string res(n, '\0');
        copy(&res[0], n);
        return res;
    }

    std::string name(const char * what) {
        const uint64_t n = get<uint64_t>();
        need(n);
        if (n < 1 || n > HEADER_MAX_NAME) {
            fail(format("the name of a %s has %llu bytes, not 1..%llu", what, (unsigned long long) n, (unsigned long long) HEADER_MAX_NAME));
        }
        const std::string res = str(n);
        if (!is_plain(res)) {
            fail(format("the name of a %s is not printable ASCII", what));
        }
        return res;
    }

    // the string of a value
    void string_value(const std::string & key, bool own) {
        const uint64_t n = get<uint64_t>();
        need(n);
        if (own && n > HEADER_MAX_STRING) {
            fail(format("key %s has a string of %llu bytes, more than %llu", key.c_str(), (unsigned long long) n, (unsigned long long) HEADER_MAX_STRING));
        }
        if (!is_plain_key(key)) {
            skip(n);
        } else if (!is_plain(str(n))) {
            fail("key " + key + " is not printable ASCII");
        }
    }

    llama_capsule_header::key value(const std::string & key, bool own) {
        llama_capsule_header::key res = { get_type(key), false, 1 };

        if (res.type == GGUF_TYPE_ARRAY) {
            res = { get_type(key), true, get<uint64_t>() };

            if (res.type == GGUF_TYPE_ARRAY) {
                fail("key " + key + " is an array of arrays");
            }
            if (own && res.n > HEADER_MAX_ARRAY) {
                fail(format("key %s is an array of %llu elements, more than %llu", key.c_str(), (unsigned long long) res.n, (unsigned long long) HEADER_MAX_ARRAY));
            }
        }

        const uint64_t least = element_size(res.type);
        if (res.n > (size - at)/least) {
            need(UINT64_MAX);
        }
        if (res.type != GGUF_TYPE_STRING) {
            skip(res.n*least);
        }
        for (uint64_t i = 0; i < res.n && res.type == GGUF_TYPE_STRING; ++i) {
            string_value(key, own);
        }

        return res;
    }

    gguf_type get_type(const std::string & key) {
        const uint32_t type = get<uint32_t>();
        if (type >= GGUF_TYPE_COUNT) {
            fail(format("key %s has an unknown type %u", key.c_str(), type));
        }
        return (gguf_type) type;
    }

    llama_capsule_header::tensor tensor() {
        llama_capsule_header::tensor res = { name("tensor"), GGML_TYPE_F32, { 1, 1, 1, 1 }, 0, 0 };

        const char * name = res.name.c_str();

        if (res.name.size() >= GGML_MAX_NAME) {
            fail(format("tensor %s has a name of %zu bytes, more than %d", name, res.name.size(), GGML_MAX_NAME - 1));
        }

        const uint32_t n_dims = get<uint32_t>();
        if (n_dims < 1 || n_dims > GGML_MAX_DIMS) {
            fail(format("tensor %s has %u dimensions, not 1..%d", name, n_dims, GGML_MAX_DIMS));
        }

        int64_t n = 1;
        for (uint32_t i = 0; i < n_dims; ++i) {
            res.ne[i] = get<int64_t>();
            if (res.ne[i] < 1 || res.ne[i] > HEADER_MAX_ELEMENTS/n) {
                fail(format("tensor %s has an impossible shape", name));
            }
            n *= res.ne[i];
        }

        const uint32_t type = get<uint32_t>();
        if (type >= GGML_TYPE_COUNT || ggml_blck_size((ggml_type) type) == 0) {
            fail(format("tensor %s has an unknown type %u", name, type));
        }
        res.type = (ggml_type) type;

        if (res.ne[0] % ggml_blck_size(res.type) != 0) {
            fail(format("tensor %s has rows of %lld, not a multiple of the blocks of %s", name, (long long) res.ne[0], ggml_type_name(res.type)));
        }

        res.size   = n/ggml_blck_size(res.type)*ggml_type_size(res.type);
        res.offset = get<uint64_t>();

        return res;
    }
};

static uint64_t pad(uint64_t n, uint64_t alignment) {
    return (n + alignment - 1)/alignment*alignment;
}

llama_capsule_header::llama_capsule_header(llama_capsule_source & source) {
    header_cursor c = { source };

    if (c.size < 24 || c.str(4) != GGUF_MAGIC) {
        fail("not a GGUF file");
    }

    const uint32_t version = c.get<uint32_t>();
    if (version < 2 || version > GGUF_VERSION) {
        fail(format("GGUF version %u, only 2 and 3 (little-endian) are read", version));
    }

    const uint64_t n_tensors = c.get<uint64_t>();

    n_keys = c.get<uint64_t>();
    if (n_keys > HEADER_MAX_COUNT || n_tensors > HEADER_MAX_COUNT) {
        fail(format("%llu keys and %llu tensors, more than %llu",
                    (unsigned long long) n_keys, (unsigned long long) n_tensors, (unsigned long long) HEADER_MAX_COUNT));
    }

    std::set<std::string> names;

    for (uint64_t i = 0; i < n_keys; ++i) {
        const std::string name = c.name("key");
        if (!names.insert(name).second) {
            fail("key " + name + " is there twice");
        }

        const bool own = starts_with(name, "kvcapsule.") || starts_with(name, "general.") || starts_with(name, "adapter.");

        const uint64_t at = c.at;

        key value = c.value(name, own);
        if (value.type == GGUF_TYPE_UINT32 && !value.is_array) {
            c.at = at + sizeof(uint32_t);
            value.u32 = c.get<uint32_t>();
        }
        if (own) {
            keys.emplace(name, value);
        } else if (foreign.empty()) {
            foreign = name;
        }

        if (name == GGUF_KEY_GENERAL_ALIGNMENT) {
            alignment = value.u32;
            if (alignment < 1 || alignment > HEADER_MAX_ALIGNMENT || (alignment & (alignment - 1)) != 0) {
                fail("general.alignment is not a power of two up to 65536");
            }
        }
    }

    names.clear();

    for (uint64_t i = 0; i < n_tensors; ++i) {
        tensors.push_back(c.tensor());
        if (!names.insert(tensors.back().name).second) {
            fail("tensor " + tensors.back().name + " is there twice");
        }
    }

    n_end  = c.at;
    n_data = pad(n_end, alignment);

    // ggml wants the tensors one after the other, in their order in the header
    uint64_t offset = 0;
    for (auto & t : tensors) {
        if (t.offset != offset) {
            fail(format("tensor %s is at offset %llu, not at %llu behind the one before it", t.name.c_str(), (unsigned long long) t.offset, (unsigned long long) offset));
        }
        offset += pad(t.size, alignment);
        t.offset += n_data;
    }
}

const llama_capsule_header::tensor * llama_capsule_header::find(const std::string & name) const {
    const auto it = std::find_if(tensors.begin(), tensors.end(), [&](const tensor & t) { return t.name == name; });

    return it == tensors.end() ? nullptr : &*it;
}

void llama_capsule_header::check_cover(llama_capsule_source & source) const {
    const uint64_t n_last = tensors.empty() ? n_end : tensors.back().offset + tensors.back().size;

    if (n_last > source.size()) {
        fail("the tensors reach behind the end of the file, it is incomplete");
    }
    if (source.size() > pad(n_last, alignment)) {
        fail(format("%llu bytes behind the last tensor belong to nothing", (unsigned long long) (source.size() - n_last)));
    }

    std::vector<char> buf;

    auto check_zeros = [&](uint64_t begin, uint64_t end) {
        buf.resize(end - begin);
        if (!buf.empty()) {
            source.read(begin, buf.data(), buf.size());
        }
        if (std::any_of(buf.begin(), buf.end(), [](char c) { return c != 0; })) {
            fail("the padding of the file is not zeros");
        }
    };

    check_zeros(n_end, std::min(n_data, source.size()));
    for (const auto & t : tensors) {
        check_zeros(t.offset + t.size, std::min(pad(t.offset + t.size, alignment), source.size()));
    }
}
