// Preloaded: the memory of ggml's buffers (posix_memalign) is counted and may be limited. What is freed can not be read any more.

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <mutex>

#include <sys/mman.h>

extern "C" void __libc_free(void *);

static constexpr size_t PAGE = 4096;
static constexpr size_t ALL  = size_t(1) << 40; // addresses, which are used once

static constexpr size_t SMALL    = 16*1024; // what ggml ends the process for if it does not get it: headers of tensors. They are not limited
static constexpr size_t N_EVENTS = 1 << 20;

static std::mutex mutex;

static uint8_t * region = nullptr;
static size_t    end    = 0;
static size_t    live   = 0;
static size_t    most   = SIZE_MAX;
static int64_t   more   = -1; // buffers, < 0: as many as there are

static int64_t events[N_EVENTS]; // bytes: > 0 allocated, < 0 freed
static size_t  n_events = 0;

static void add_event(int64_t n) {
    if (n_events < N_EVENTS) {
        events[n_events++] = n;
    }
}

extern "C" int posix_memalign(void ** ptr, size_t alignment, size_t size) {
    const std::lock_guard<std::mutex> lock(mutex);

    if (!region) {
        region = (uint8_t *) mmap(nullptr, ALL, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    }

    // a page that knows the size lies before it
    const size_t n = (size + PAGE - 1)/PAGE*PAGE + PAGE;
    if (alignment > PAGE || region == MAP_FAILED || end + n > ALL || (size > SMALL && (size > most || live > most - size || more == 0))) {
        return ENOMEM;
    }
    uint8_t * res = region + end;
    if (mprotect(res, n, PROT_READ | PROT_WRITE) != 0) {
        return ENOMEM;
    }
    *(size_t *) res = size;
    *ptr = res + PAGE;

    more -= size > SMALL && more > 0;
    end  += n;
    live += size;
    add_event(size);

    return 0;
}

extern "C" void free(void * ptr) {
    if ((uint8_t *) ptr < region || (uint8_t *) ptr >= region + ALL || !region) {
        __libc_free(ptr);
        return;
    }
    const std::lock_guard<std::mutex> lock(mutex);

    uint8_t * res  = (uint8_t *) ptr - PAGE;
    size_t    size = *(size_t *) res;

    mmap(res, (size + PAGE - 1)/PAGE*PAGE + PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);

    live -= size;
    add_event(-(int64_t) size);
}

// so many bytes, and buffers, more from here on; < 0: as many as there are
extern "C" void few_bytes_limit(int64_t n_bytes, int64_t n_buffers) {
    const std::lock_guard<std::mutex> lock(mutex);

    most = n_bytes < 0 ? SIZE_MAX : live + n_bytes;
    more = n_buffers;
}

// since the last call
extern "C" size_t few_bytes_events(int64_t * res, size_t n) {
    const std::lock_guard<std::mutex> lock(mutex);

    for (size_t i = 0; i < n_events && i < n; ++i) {
        res[i] = events[i];
    }
    const size_t n_all = n_events;
    n_events = 0;

    return n_all;
}
