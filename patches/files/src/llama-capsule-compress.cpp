#include "llama-capsule-store.h"

#include "llama-capsule-grid.h"

#include "llama-batch.h"
#include "llama-context.h"
#include "llama-impl.h"
#include "llama-kv-cache.h"
#include "llama-model.h"

#include <algorithm>
#include <limits>

#ifdef __GLIBC__
#include <malloc.h>
#endif

//
// hot cells -> slots
//

// copies what the cells know about the tokens
void llama_capsule_store::place(pool & pool, uint32_t i_slot, const std::vector<uint32_t> & idxs) {
    const auto & cells = kv.v_cells[0];

    for (size_t j = 0; j < idxs.size(); ++j) {
        const uint32_t src = idxs[j];
        const uint32_t dst = i_slot*N() + j;

        pool.cells.pos_set(dst, cells.pos_get(src));
        pool.cells.ext_set(dst, cells.ext_get(src));

        for (llama_seq_id s = 0; s < LLAMA_MAX_SEQ; ++s) {
            if (cells.seq_has(src, s)) {
                pool.cells.seq_add(dst, s);
            }
        }
    }
}

// idxs: cells of vision tokens, in the order in which they are cut into blocks
uint32_t llama_capsule_store::compress_run(const std::vector<uint32_t> & idxs) {
    std::vector<block> blocks;
    for (size_t i = 0; i < idxs.size(); i += N()) {
        const size_t n = std::min<size_t>(N(), idxs.size() - i);

        // a remainder becomes a padded slot if that saves anything, or it stays hot
        if (n < N()/2) {
            break;
        }
        blocks.push_back({ { idxs.begin() + i, idxs.begin() + i + n }, n == N() ? 0 : 1, -1, false, false });
    }

    auto alloc = [&](block & b, uint32_t n_more) {
        auto & pool = pools[b.i_pool];

        b.i_slot = alloc_slot(pool);
        if (b.i_slot < 0 && grow_pool(pool, pool.n_slots + n_more)) {
            b.i_slot = alloc_slot(pool);
        }
        return b.i_slot >= 0;
    };

    for (size_t i = 0; i < blocks.size(); ++i) {
        const uint32_t n_more = std::count_if(blocks.begin() + i, blocks.end(), [&](const block & b) { return b.i_pool == blocks[i].i_pool; });

        if (!alloc(blocks[i], n_more)) {
            warn_alloc();
            blocks.resize(i);
            break;
        }
    }

    auto select = [&](auto fn) {
        std::vector<block *> res;
        for (auto & b : blocks) {
            if (fn(b)) {
                res.push_back(&b);
            }
        }
        return res;
    };

    encode(select([](const block &) { return true; }));

    uint32_t n_failed = 0;
    for (auto & b : blocks) {
        if (b.failed && !b.broken) {
            pools[b.i_pool].used[b.i_slot] = false;

            b.i_pool = 1;
            n_failed++;
        }
    }
    for (auto & b : blocks) {
        if (!b.failed || b.broken) {
            continue;
        }
        if (alloc(b, n_failed)) {
            n_failed--;
        } else {
            warn_alloc();
        }
    }

    encode(select([](const block & b) { return b.failed && !b.broken && b.i_slot >= 0; }));

    // only now: nothing is lost on the way
    uint32_t res = 0;
    for (auto & b : blocks) {
        if (b.broken) {
            warn_broken();
        } else if (b.i_slot >= 0) {
            place(pools[b.i_pool], b.i_slot, b.idxs);
            hot.free(b.idxs);
            res += b.idxs.size();
        }
    }

    update_used();

    return res;
}

// idxs: the cells of one run of vision tokens, in their order; res: the same in the order in which they are cut into blocks, image by image
std::vector<std::vector<uint32_t>> llama_capsule_store::cut_run(const std::vector<uint32_t> & idxs) const {
    if (data().block_shape == "raster") {
        return { idxs };
    }

    const auto & cells = kv.v_cells[0];
    const bool   grid  = kv.hparams.n_pos_per_embd() > 1; // the positions tell the place

    const uint32_t n_image = data().image_tokens;
    const uint32_t side    = llama_capsule_square_side(n_image);

    std::vector<std::vector<uint32_t>> res;
    for (size_t i = 0; i < idxs.size();) {
        const llama_pos first = cells.pos_get(idxs[i]);

        std::vector<uint32_t>            image;
        std::vector<llama_capsule_place> places;

        for (; i < idxs.size(); ++i) {
            const uint32_t dist = cells.pos_get(idxs[i]) - first;
            if (!grid && dist >= n_image) {
                break;
            }
            image.push_back(idxs[i]);
            if (grid) {
                const auto & ext = cells.ext_get(idxs[i]);
                places.push_back({ ext.y, ext.x });
            } else {
                places.push_back({ (int32_t) (dist/side), (int32_t) (dist%side) });
            }
        }

        std::vector<uint32_t> sorted;
        for (uint32_t j : llama_capsule_tile_order(places, data().block_width, N()/data().block_width)) {
            sorted.push_back(image[j]);
        }
        res.push_back(std::move(sorted));
    }

    return res;
}

uint32_t llama_capsule_store::compress(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    lctx.synchronize();

    // after seq_add() the keys of a cell are still rotated for the old position
    lctx.memory_update(false);

    const auto & cells = kv.v_cells[0];

    std::vector<std::vector<uint32_t>> runs;

    std::vector<uint32_t> run;
    for (uint32_t i : hot.find(seq_id, p0, p1)) {
        const bool vision = cells.ext_get(i).tok == LLAMA_TOKEN_NULL;

        // M-RoPE: a new position is a new image
        const bool next = !run.empty() && kv.hparams.n_pos_per_embd() > 1 && cells.pos_get(run.back()) != cells.pos_get(i);

        if ((!vision || next) && !run.empty()) {
            runs.push_back(std::move(run));
            run.clear();
        }
        if (vision) {
            run.push_back(i);
        }
    }
    if (!run.empty()) {
        runs.push_back(std::move(run));
    }

    uint32_t res = 0;
    for (const auto & r : runs) {
        for (const auto & image : cut_run(r)) {
            try {
                res += compress_run(image);
            } catch (const std::bad_alloc &) {
                warn_alloc();
                update_used(); // gives back the slots without cells
            }
        }
    }

    return res;
}

//
// automatic mode
//

// does an embedding at this position continue the image?
bool llama_capsule_store::is_next(const span & sp, llama_pos pos) const {
    return kv.hparams.n_pos_per_embd() > 1 ? pos == sp.p0 : pos == sp.p1;
}

// audio and embeddings of text come as images do. The tokens of an image share a position (M-RoPE), or are as many as the capsule says;
//   if it does not say, nothing tells them apart
bool llama_capsule_store::is_image(llama_seq_id seq_id, const span & sp) const {
    if (kv.hparams.n_pos_per_embd() == 1) {
        return data().image_tokens == 0 || (uint32_t) (sp.p1 - sp.p0) == data().image_tokens;
    }
    const auto & list = kv.v_cells[0].seq_pos_get(seq_id);

    const auto it = list.lower_bound({ sp.p0, 0 });

    return it != list.end() && std::next(it) != list.end() && std::next(it)->first == sp.p0;
}

void llama_capsule_store::close_spans(const llama_batch_ext & batch) {
    for (auto & [seq_id, list] : spans) {
        for (const auto & token : batch.tokens) {
            if (token.seq_ids.count(seq_id) == 0) {
                continue;
            }

            // only the first token of the sequence is of interest
            const bool is_embd = token.has_embd && token.id == LLAMA_TOKEN_NULL;
            for (auto & sp : list) {
                sp.closed = sp.closed || &sp != &list.back() || !is_embd || !is_next(sp, token.pos[0]);
            }
            break;
        }
    }
}

uint32_t llama_capsule_store::compress_closed() {
    uint32_t res = 0;

    for (auto & [seq_id, list] : spans) {
        const auto first = std::stable_partition(list.begin(), list.end(), [](const span & sp) { return !sp.closed; });
        const std::vector<span> todo(first, list.end());

        list.erase(first, list.end());

        for (const auto & sp : todo) {
            if (is_image(seq_id, sp)) {
                res += compress(seq_id, sp.p0, sp.p1);
            }
        }
    }

    return res;
}

// what an earlier lack of memory, a cut or a restored state left in the hot cells, but no image in the making
uint32_t llama_capsule_store::compress_rest() {
    uint32_t res = 0;

    for (llama_seq_id s = 0; s < (llama_seq_id) kv.n_seq_max; ++s) {
        llama_pos p1 = std::numeric_limits<llama_pos>::max();

        const auto it = spans.find(s);
        if (it != spans.end()) {
            for (const auto & sp : it->second) {
                p1 = std::min(p1, sp.p0);
            }
        }
        res += compress(s, 0, p1);
    }

    return res;
}

void llama_capsule_store::decode_begin(const llama_batch_ext & batch) {
    if (!p.auto_compress || spans.empty()) {
        return;
    }

    close_spans(batch);
    compress_closed();
}

void llama_capsule_store::decode_end(const llama_batch_ext & batch) {
    if (grown) {
        grown = false;
#ifdef __GLIBC__
        // the pools and the compute buffer were replaced by larger ones: give the old ones back to the system
        malloc_trim(0);
#endif
    }

    if (!p.auto_compress) {
        return;
    }

    for (const auto & token : batch.tokens) {
        const bool is_embd = token.has_embd && token.id == LLAMA_TOKEN_NULL;

        for (llama_seq_id seq_id : token.seq_ids) {
            auto & list = spans[seq_id];

            if (!is_embd) {
                for (auto & sp : list) {
                    sp.closed = true;
                }
                continue;
            }

            const llama_pos pos = token.pos[0];

            if (!list.empty() && !list.back().closed && is_next(list.back(), pos)) {
                list.back().p1 = pos + 1;
            } else {
                if (!list.empty()) {
                    list.back().closed = true;
                }
                list.push_back({ pos, pos + 1, false });
            }

            // images of a known size may follow each other
            auto & sp = list.back();
            if (kv.hparams.n_pos_per_embd() == 1 && data().image_tokens > 0 && (uint32_t) (sp.p1 - sp.p0) == data().image_tokens) {
                sp.closed = true;
            }
        }
    }

    for (auto it = spans.begin(); it != spans.end();) {
        it = it->second.empty() ? spans.erase(it) : std::next(it);
    }
}

bool llama_capsule_store::make_room(const llama_batch_ext & batch) {
    close_spans(batch);

    // images at the end of other sequences are complete: a client decodes an image in one go
    for (auto & [seq_id, list] : spans) {
        const llama_seq_id s = seq_id;
        const bool in_batch = std::any_of(batch.tokens.begin(), batch.tokens.end(),
                [&](const llama_batch_ext::token & token) { return token.seq_ids.count(s) > 0; });
        for (auto & sp : list) {
            // of an image of unknown size, what is there of it
            const bool unknown = kv.hparams.n_pos_per_embd() == 1 && data().image_tokens == 0;

            sp.closed = sp.closed || !in_batch || unknown;
        }
    }

    if (p.auto_compress && (compress_closed() > 0 || compress_rest() > 0)) {
        return true;
    }

    llama_capsule_stats stats = {};
    get_stats(stats);

    const uint32_t n_text = stats.n_hot_used - stats.n_hot_vision;

    LLAMA_LOG_WARN("%s: the hot KV cache is full: %u cells, of them %u text and %u vision (%u vision tokens are in slots), %zu more do not fit: "
            "use more hot cells (--hot, LLAMA_KVCAPSULE_HOT) or a shorter conversation\n", __func__,
            stats.n_hot, n_text, stats.n_hot_vision, stats.n_cold, batch.tokens.size());

    return false;
}
