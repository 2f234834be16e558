#include "capsule/util/threads.h"

#include "ggml-backend.h"
#include "ggml.h"

#include <atomic>
#include <exception>
#include <mutex>
#include <new>

llama_capsule_threads::llama_capsule_threads() : backend(ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr)) {
    GGML_ASSERT(backend);
}

void llama_capsule_threads::run(int n_threads, size_t n, const std::function<void(size_t)> & fn) const {
    if (n_threads <= 1 || n <= 1) {
        for (size_t i = 0; i < n; ++i) {
            fn(i);
        }
        return;
    }

    struct job {
        const std::function<void(size_t)> & fn;

        const size_t        n;
        std::atomic<size_t> next = 0;

        std::mutex         mutex;
        std::exception_ptr error;
    } job { fn, n, {}, {}, {} };

    const ggml_custom_op_t op = [](ggml_tensor *, int, int, void * userdata) {
        auto & job = *(struct job *) userdata;
        try {
            for (size_t i = job.next++; i < job.n; i = job.next++) {
                job.fn(i);
            }
        } catch (...) {
            const std::lock_guard<std::mutex> lock(job.mutex);
            job.error = std::current_exception();
        }
    };

    const ggml_init_params params = {
        /*.mem_size   =*/ 2*ggml_tensor_overhead() + ggml_graph_overhead_custom(1, false),
        /*.mem_buffer =*/ nullptr,
        /*.no_alloc   =*/ true,
    };
    ggml_context_ptr ctx { ggml_init(params) };

    ggml_cgraph * gf = ggml_new_graph_custom(ctx.get(), 1, false);
    ggml_build_forward_expand(gf, ggml_custom_4d(ctx.get(), GGML_TYPE_F32, 1, 1, 1, 1, nullptr, 0, op, GGML_N_TASKS_MAX, &job));

    auto * reg = ggml_backend_dev_backend_reg(ggml_backend_get_device(backend.get()));
    auto set_n_threads = (ggml_backend_set_n_threads_t) ggml_backend_reg_get_proc_address(reg, "ggml_backend_set_n_threads");
    if (set_n_threads) {
        set_n_threads(backend.get(), n_threads);
    }

    if (ggml_backend_graph_compute(backend.get(), gf) != GGML_STATUS_SUCCESS) {
        throw std::bad_alloc();
    }
    if (job.error) {
        std::rethrow_exception(job.error);
    }
}
