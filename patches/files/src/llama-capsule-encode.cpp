#include "llama-capsule-store.h"

#include "llama-context.h"
#include "llama-kv-cache.h"

#include <algorithm>
#include <atomic>
#include <deque>

//
// blocks of hot cells -> slots: the heads of all blocks of a layer are shared by the threads; the bytes do not depend on their number
//

void llama_capsule_store::encode(const std::vector<block *> & blocks) {
    init_tiles();

    std::vector<uint32_t> cells;
    for (block * b : blocks) {
        auto & pool = pools[b->i_pool];

        pool.hash[b->i_slot] = 0;
        llama_capsule_rope_pos(kv.v_cells[0], b->idxs[0], kv.hparams.n_pos_per_embd(), pool.stored[b->i_slot].data(), 1);
        cells.insert(cells.end(), b->idxs.begin(), b->idxs.end());
    }

    llama_capsule_kv::reader reader(hot, std::move(cells));

    for (uint32_t l = 0; l < data().layers.size() && !blocks.empty();) {
        const uint32_t n_done = op_encode(blocks, l, reader);
        if (n_done > 0) {
            l += n_done;
            continue;
        }
        reader.load(data().layers[l].il, data().layers[l].rope);

        encode_layer(blocks, l, reader);
        l++;
    }
}

// is the error of each of the first n tokens at most kappa times that of rotated q4_0? errors: [n_head][N]; not if it is NaN
static bool capsule_errors_ok(const llama_capsule_errors * errors, uint32_t n_head, uint32_t N, uint32_t n, float kappa) {
    auto sum = [&](uint32_t t, float llama_capsule_errors::* what) {
        float res = 0.0f;
        for (uint32_t h = 0; h < n_head; ++h) {
            res += errors[h*N + t].*what;
        }
        return res;
    };

    float energy = 0.0f;
    for (uint32_t t = 0; t < n; ++t) {
        energy += sum(t, &llama_capsule_errors::energy);
    }

    // a token that is nearly nothing, or that q4_0 happens to hit, is no measure
    const float least = std::max(1e-3f*energy/n, 1e-20f);

    for (uint32_t t = 0; t < n; ++t) {
        if (!(sum(t, &llama_capsule_errors::slot)/std::max(sum(t, &llama_capsule_errors::q4), least) <= kappa)) {
            return false;
        }
    }

    return true;
}

bool llama_capsule_store::guarded(uint32_t i_layer, int i_pool, bool is_v) const {
    const auto & codec = pools[i_pool].codecs[i_layer];

    const uint32_t d = is_v ? codec.layer.n_embd_head_v : codec.layer.n_embd_head_k;

    // a block that is refused must be better off
    const bool finer = data().tiers[0].ratio <= data().tiers[p.i_economy].ratio;

    // is q4_0 a rival for this head size?
    return i_pool == 0 && p.guard && finer && codec.tl.kappa > 0.0f && d % ggml_blck_size(GGML_TYPE_Q4_0) == 0;
}

bool llama_capsule_store::accept(block & b, uint32_t i_layer, const block_errors & errors) const {
    const auto & codec = pools[b.i_pool].codecs[i_layer];

    for (const auto & e : errors) {
        if (!e.empty() && !capsule_errors_ok(e.data(), codec.layer.n_head_kv, N(), b.idxs.size(), codec.tl.kappa)) {
            b.failed = true;
        }
    }
    return !b.failed || b.i_pool != 0;
}

bool llama_capsule_store::fits(uint32_t i_layer, int i_pool, const uint8_t * slot, uint32_t i_head) const {
    return tile(i_layer, i_pool, false).fits(slot, i_head) && tile(i_layer, i_pool, true).fits(slot, i_head);
}

void llama_capsule_store::encode_layer(const std::vector<block *> & blocks, uint32_t i_layer, llama_capsule_kv::reader & reader) {
    const auto & layer  = data().layers[i_layer];
    const auto * params = rope.params(i_layer);

    const uint32_t n_head = layer.n_head_kv;

    struct job {
        block * b;
        size_t  first; // of its cells in the reader

        std::vector<uint8_t> slot;
        std::vector<float>   angles; // keys that are stored rotated

        block_errors errors;

        std::atomic<bool> fits { true };
    };
    std::deque<job> jobs;

    size_t first = 0;
    for (block * b : blocks) {
        if (b->wanted()) {
            const auto & pool  = pools[b->i_pool];
            const auto & codec = pool.codecs[i_layer];

            job & cur = jobs.emplace_back();

            cur.b     = b;
            cur.first = first;
            cur.slot.resize(codec.layout.slot_stride, 0);

            if (rotated(i_layer, b->i_pool)) {
                cur.angles.resize(params->n_rot);
                params->fill(pool.stored[b->i_slot], false, cur.angles.data());
            }
            for (bool is_v : { false, true }) {
                if (guarded(i_layer, b->i_pool, is_v)) {
                    cur.errors[is_v].resize(n_head*N());
                }
            }
        }
        first += b->idxs.size();
    }

    threads.run(lctx.n_threads_batch(), jobs.size()*2*n_head, [&](size_t i) {
        static thread_local llama_capsule_buf<float> x;

        auto & cur = jobs[i/(2*n_head)];

        const bool     is_v = i/n_head % 2;
        const uint32_t h    = i % n_head;
        const size_t   n    = cur.b->idxs.size();
        const auto   & t    = tile(i_layer, cur.b->i_pool, is_v);

        x.resize(N()*t.ld());
        if (t.ld() > t.d()) {
            std::fill_n(x.data(), N()*t.ld(), 0.0f);
        }

        if (is_v) {
            reader.read_v(h, cur.first, n, x.data(), t.ld());
        } else {
            reader.read_k(h, cur.first, n, x.data(), t.ld());
        }

        // padding: the mean costs nothing
        const float * mean = (is_v ? layer.v_mean : layer.k_mean).data() + h*t.d();
        for (size_t j = n; j < N(); ++j) {
            std::copy(mean, mean + t.d(), x.data() + j*t.ld());
        }

        if (!is_v && !cur.angles.empty()) {
            llama_capsule_simd_get().rope(n, x.data(), t.ld(), cur.angles.data(), 0, params->n_rot, params->norm);
        }

        t.encode(x.data(), h, cur.slot.data());
        const bool fits = cur.errors[is_v].empty() ? t.fits(cur.slot.data(), h) : t.errors(x.data(), cur.slot.data(), h, n, cur.errors[is_v].data() + h*N());

        // quantizers may take a NaN for nothing
        if (!fits || !llama_capsule_finite(x.data(), N()*t.ld())) {
            cur.fits = false;
        }
    });

    for (auto & cur : jobs) {
        auto & b = *cur.b;

        if (!cur.fits) {
            b.broken = true;
        } else if (accept(b, i_layer, cur.errors)) {
            slot_set(pools[b.i_pool], i_layer, b.i_slot, cur.slot.data());
        }
    }
}
