#include "ggml-metal-capsule.h"

#include "../ggml-capsule-impl.h"
#include "ggml-backend-impl.h"
#include "ggml-capsule.h"

#include <map>
#include <mutex>

static constexpr int CAPSULE_METAL_THREADS = 128;

static const char * const CAPSULE_METAL_SOURCE =
#include "ggml-metal-capsule-source.h"
;

// compiled on first use, kept until the process ends; nullptr if that fails
static ggml_metal_library_t capsule_library(ggml_metal_device_t dev) {
    static std::mutex mutex;
    static std::map<ggml_metal_device_t, ggml_metal_library_t> libraries;

    std::lock_guard<std::mutex> lock(mutex);

    const auto it = libraries.find(dev);
    if (it != libraries.end()) {
        return it->second;
    }
    return libraries[dev] = ggml_metal_library_init_from_source(dev, CAPSULE_METAL_SOURCE, true);
}

static size_t capsule_max_shared(ggml_metal_device_t dev) {
    return ggml_metal_device_get_props(dev)->max_theadgroup_memory_size;
}

static const char * capsule_kernel_name(const ggml_tensor * op, const capsule_args & args) {
    switch (ggml_capsule_op_of(op)) {
        case GGML_CAPSULE_OP_UNPACK: return args.tile_f32 ? "kernel_capsule_unpack_f32" : "kernel_capsule_unpack_f16";
        case GGML_CAPSULE_OP_ATTN:   return args.tile_f32 ? "kernel_capsule_attn_f32"   : "kernel_capsule_attn_f16";
        case GGML_CAPSULE_OP_ENCODE: return "kernel_capsule_encode";
        case GGML_CAPSULE_OP_ERRORS: return "kernel_capsule_errors";
        default:                     return "kernel_capsule_combine";
    }
}

static ggml_metal_pipeline_with_params capsule_pipeline(ggml_metal_library_t lib, const char * name) {
    ggml_metal_pipeline_with_params res = ggml_metal_library_get_pipeline(lib, name);
    if (!res.pipeline) {
        res = ggml_metal_library_compile_pipeline(lib, name, name, nullptr);
    }
    return res;
}

bool ggml_metal_capsule_supported(ggml_metal_device_t dev, const ggml_tensor * op) {
    if (ggml_capsule_op_of(op) >= GGML_CAPSULE_OP_TILE_ATTN) {
        return false;
    }

    capsule_args args;
    capsule_ptrs ptrs;
    ggml_capsule_args_init(op, capsule_max_shared(dev), capsule_max_shared(dev), false, args, ptrs);

    if ((size_t) args.s_size > capsule_max_shared(dev)) {
        return false;
    }

    ggml_metal_library_t lib = capsule_library(dev);
    if (!lib) {
        return false;
    }
    auto pipeline = capsule_pipeline(lib, capsule_kernel_name(op, args));

    return pipeline.pipeline && ggml_metal_pipeline_max_theads_per_threadgroup(pipeline) >= CAPSULE_METAL_THREADS;
}

int ggml_metal_capsule_encode(ggml_metal_device_t dev, ggml_metal_encoder_t enc, const ggml_tensor * op) {
    capsule_args args;
    capsule_ptrs ptrs;
    ggml_capsule_args_init(op, capsule_max_shared(dev), capsule_max_shared(dev), false, args, ptrs);

    ggml_metal_encoder_set_pipeline(enc, capsule_pipeline(capsule_library(dev), capsule_kernel_name(op, args)));
    ggml_metal_encoder_set_bytes   (enc, &args, sizeof(args), 0);

    auto set = [&](const ggml_tensor * t, int i) {
        ggml_backend_buffer_t buffer = t->view_src ? t->view_src->buffer : t->buffer;
        ggml_metal_encoder_set_buffer(enc, ggml_metal_buffer_get_id((ggml_metal_buffer_t) buffer->context, t), i);
    };

    // what is not there is not read, but something has to be bound
    const ggml_tensor * any = ggml_capsule_source(op, 0);
    for (int i = 0; i < CAPSULE_N_SOURCES; ++i) {
        const ggml_tensor * t = ggml_capsule_source(op, i);
        set(t ? t : any, i + 1);
    }
    set(op, CAPSULE_N_SOURCES + 1);

    if (args.s_size > 0) {
        ggml_metal_encoder_set_threadgroup_memory_size(enc, args.s_size, 0);
    }
    ggml_metal_encoder_dispatch_threadgroups(enc, args.n_items, 1, 1, CAPSULE_METAL_THREADS, 1, 1);

    return 1;
}
