#include "capsule/store/slots.h"

#include "../ggml/src/ggml-capsule/layout.h"

#include <algorithm>

#if defined(__linux__)
#include <sys/mman.h>
#endif

llama_capsule_slots::llama_capsule_slots(uint32_t n_layer, uint32_t n_cells, size_fn size, buft_fn buft) :
    size_of(std::move(size)), buft_of(std::move(buft)), pools(n_layer) {
    v_cells.resize(n_cells);
}

//
// reading
//

uint32_t llama_capsule_slots::n_cold() const {
    uint32_t res = 0;
    for (const auto & s : slots) {
        res += s.n_tokens();
    }
    return res;
}

void llama_capsule_slots::get(uint32_t i_layer, uint32_t i_slot, uint8_t * data) const {
    ggml_backend_tensor_get(pool(i_layer), data, (size_t) offs(i_layer, i_slot)*LLAMA_CAPSULE_UNIT, (size_t) size(i_layer, i_slot)*LLAMA_CAPSULE_UNIT);
}

void llama_capsule_slots::set(uint32_t i_layer, uint32_t i_slot, const uint8_t * data) {
    ggml_backend_tensor_set(pool(i_layer), data, (size_t) offs(i_layer, i_slot)*LLAMA_CAPSULE_UNIT, (size_t) size(i_layer, i_slot)*LLAMA_CAPSULE_UNIT);
}

size_t llama_capsule_slots::n_bytes_used() const {
    size_t res = 0;
    for (uint32_t l = 0; l < n_layer(); ++l) {
        for (const auto & s : slots) {
            res += (size_t) size_of(l, s)*LLAMA_CAPSULE_UNIT;
        }
    }
    return res;
}

size_t llama_capsule_slots::n_bytes_pools() const {
    size_t res = 0;
    for (const auto & p : pools) {
        res += p.buf ? ggml_backend_buffer_get_size(p.buf.get()) : 0;
    }
    return res;
}

void llama_capsule_slots::memory_breakdown(std::map<ggml_backend_buffer_type_t, size_t> & res) const {
    for (const auto & p : pools) {
        if (p.buf) {
            res[ggml_backend_buffer_get_type(p.buf.get())] += ggml_backend_buffer_get_size(p.buf.get());
        }
    }
}

uint32_t llama_capsule_slots::end_cells() const {
    return slots.empty() ? 0 : slots.back().first + slots.back().n_tokens();
}

uint32_t llama_capsule_slots::end_pool(uint32_t i_layer) const {
    return slots.empty() ? 0 : slots.back().offs[i_layer] + size_of(i_layer, slots.back());
}

uint32_t llama_capsule_slots::capacity(uint32_t i_layer) const {
    const auto * mem = pools[i_layer].mem;

    return mem ? (mem->ne[0] - GGML_CAPSULE_PAD)/LLAMA_CAPSULE_UNIT : 0;
}

//
// room
//

uint32_t llama_capsule_slots::end_with(uint32_t i_layer, const std::vector<llama_capsule_slot> & more) const {
    uint32_t res = end_pool(i_layer);
    for (const auto & s : more) {
        res += size_of(i_layer, s);
    }
    return res;
}

bool llama_capsule_slots::fits_now(const std::vector<llama_capsule_slot> & more) const {
    uint32_t n_cells = end_cells();
    for (const auto & s : more) {
        n_cells += s.n_tokens();
    }
    if (n_cells > v_cells.size()) {
        return false;
    }
    for (uint32_t l = 0; l < n_layer(); ++l) {
        if (end_with(l, more) > capacity(l)) {
            return false;
        }
    }
    return true;
}

// every gap is one of cells too
bool llama_capsule_slots::has_gaps() const {
    return end_cells() > n_cold();
}

bool llama_capsule_slots::fits(const std::vector<llama_capsule_slot> & more) {
    if (!fits_now(more) && has_gaps()) {
        close_gaps();
    }
    return fits_now(more);
}

void llama_capsule_slots::close_gaps() {
    n_version++;

    uint32_t first = 0;
    for (auto & s : slots) {
        if (s.first != first) {
            const auto moved = v_cells.cp(s.first, s.n_tokens());
            for (uint32_t j = 0; j < s.n_tokens(); ++j) {
                if (!v_cells.is_empty(s.first + j)) {
                    v_cells.rm(s.first + j);
                }
            }
            v_cells.set(first, moved);
            s.first = first;
        }
        first += s.n_tokens();
    }

    std::vector<uint8_t> buf;
    for (uint32_t l = 0; l < n_layer(); ++l) {
        uint32_t end = 0;
        for (uint32_t i = 0; i < n_slots(); ++i) {
            if (offs(l, i) != end) {
                buf.resize((size_t) size(l, i)*LLAMA_CAPSULE_UNIT);
                get(l, i, buf.data());
                slots[i].offs[l] = end;
                set(l, i, buf.data());
            }
            end += size(l, i);
        }
    }
}

// each tile of a head lies on pages of its own, so that small pages cost attention a few percent
static void ask_for_huge_pages(ggml_backend_buffer_t buf) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr uintptr_t page = 2*1024*1024;
    if (ggml_backend_buffer_is_host(buf)) {
        const uintptr_t base  = (uintptr_t) ggml_backend_buffer_get_base(buf);
        const uintptr_t first = (base + page - 1)/page*page;
        const uintptr_t end   = (base + ggml_backend_buffer_get_size(buf))/page*page;
        if (first < end) {
            madvise((void *) first, end - first, MADV_HUGEPAGE); // a hint: it may fail
        }
    }
#else
    GGML_UNUSED(buf);
#endif
}

bool llama_capsule_slots::resize(uint32_t i_layer, uint32_t n_units) {
    auto & old = pools[i_layer];

    if (n_units == capacity(i_layer)) {
        return true;
    }
    if (n_units == 0) {
        old = {};
        return true;
    }

    const ggml_init_params params = {
        /*.mem_size   =*/ 3*ggml_tensor_overhead(),
        /*.mem_buffer =*/ nullptr,
        /*.no_alloc   =*/ true,
    };

    pool_layer res;
    res.ctx.reset(ggml_init(params));
    res.mem = ggml_new_tensor_1d(res.ctx.get(), GGML_TYPE_I8, (int64_t) n_units*LLAMA_CAPSULE_UNIT + GGML_CAPSULE_PAD);
    ggml_format_name(res.mem, "capsule_pool_%u", i_layer);

    res.buf.reset(ggml_backend_alloc_ctx_tensors_from_buft(res.ctx.get(), buft_of(i_layer)));
    if (!res.buf) {
        return false;
    }
    ask_for_huge_pages(res.buf.get());
    ggml_backend_buffer_clear(res.buf.get(), 0);

    const int64_t n = (int64_t) end_pool(i_layer)*LLAMA_CAPSULE_UNIT;
    if (n > 0) {
        ggml_tensor * from = ggml_view_1d(res.ctx.get(), old.mem, n, 0);
        ggml_tensor * to   = ggml_view_1d(res.ctx.get(), res.mem, n, 0);

        ggml_backend_view_init(from);
        ggml_backend_view_init(to);
        ggml_backend_tensor_copy(from, to);
    }

    old = std::move(res);

    return true;
}

// a layer after the other: only one layer exists twice
bool llama_capsule_slots::resize_all(const std::vector<uint32_t> & n_units) {
    n_version++;

    for (uint32_t l = 0; l < n_layer(); ++l) {
        if (!resize(l, n_units[l])) {
            return false;
        }
    }
    return true;
}

bool llama_capsule_slots::grow(const std::vector<llama_capsule_slot> & more, bool spare, const std::function<bool()> & commit) {
    std::vector<uint32_t> before;
    std::vector<uint32_t> wanted;
    for (uint32_t l = 0; l < n_layer(); ++l) {
        const uint32_t need = end_with(l, more);

        before.push_back(capacity(l));
        wanted.push_back(std::max(before[l], spare ? need + need/2 : need));
    }

    if (resize_all(wanted) && fits_now(more) && commit()) {
        return true;
    }

    // what remains needs memory too
    resize_all(before);

    return false;
}

//
// slots
//

uint32_t llama_capsule_slots::add(const llama_capsule_slot & slot) {
    n_version++;

    llama_capsule_slot res = slot;
    res.first = end_cells();
    res.offs.clear();
    for (uint32_t l = 0; l < n_layer(); ++l) {
        res.offs.push_back(end_pool(l));
    }
    slots.push_back(std::move(res));

    return n_slots() - 1;
}

void llama_capsule_slots::drop_empty() {
    const auto is_empty = [&](const llama_capsule_slot & s) {
        for (uint32_t j = 0; j < s.n_tokens(); ++j) {
            if (!v_cells.is_empty(s.first + j)) {
                return false;
            }
        }
        return true;
    };

    const auto end = std::remove_if(slots.begin(), slots.end(), is_empty);
    if (end != slots.end()) {
        slots.erase(end, slots.end());
        n_version++;
    }
}
