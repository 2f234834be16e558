#pragma once

#include "llama-capsule-hot.h"
#include "llama-capsule-project.h"
#include "llama-capsule-query.h"
#include "llama-capsule-tile.h"

#include <algorithm>
#include <cmath>
#include <vector>

// the queries of one KV head
struct llama_capsule_head {
    const llama_capsule_simd & simd = llama_capsule_simd_get();

    uint32_t n_q = 0; // query heads of the group, token by token
    uint32_t n_group;
    uint32_t ld_k;
    uint32_t ld_v;
    uint32_t ld_s; // of the columns at hand

    llama_capsule_buf<float> q_cold; // [n_q][ld_k]
    llama_capsule_buf<float> q_slot;

    llama_capsule_buf<float> mask;   // [n_q/n_group][ld_s]
    llama_capsule_buf<float> s;      // [n_q][ld_s]
    llama_capsule_buf<float> x;      // [N][ld_k] of a slot
    llama_capsule_buf<float> w;      // [n_q][slots][rows]
    llama_capsule_buf<float> zeros;  // [rows]
    llama_capsule_buf<float> angles; // of the first token of a slot, negative

    llama_capsule_query         query;
    llama_capsule_project_query projected;

    llama_capsule_buf<llama_capsule_softmax> sums;

    llama_capsule_buf<float> l_cold; // part of the sums
    llama_capsule_buf<float> o_hot;  // [n_q][ld_v]
    llama_capsule_buf<float> o_cold; // in the space of the rows

    // continues what has been done for a head
    void init(const llama_capsule_hot & hot, uint32_t i, uint32_t n_q, uint32_t n_group, uint32_t ld_k, uint32_t ld_v,
            uint32_t n_cols_max, uint32_t n_rows_max, uint32_t n_slots_max) {
        this->n_q     = n_q;
        this->n_group = n_group;
        this->ld_k    = ld_k;
        this->ld_v    = ld_v;

        // room for columns, padded
        n_cols_max = GGML_PAD(n_cols_max, LLAMA_CAPSULE_VEC);

        mask.resize(n_q/n_group*n_cols_max);
        s   .resize(n_q*n_cols_max);
        w   .resize(n_q*n_slots_max*n_rows_max);

        std::fill_n(zeros.resize(n_rows_max), n_rows_max, 0.0f);

        q_slot.resize(n_q*ld_k);

        std::copy_n(hot.query  (i), n_q*ld_k, q_cold.resize(n_q*ld_k));
        std::copy_n(hot.out    (i), n_q*ld_v, o_hot .resize(n_q*ld_v));
        std::copy_n(hot.softmax(i), n_q,      sums  .resize(n_q));

        std::fill_n(o_cold.resize(n_q*ld_v), n_q*ld_v, 0.0f);
        std::fill_n(l_cold.resize(n_q),      n_q,      0.0f);
    }

    // n columns from col on -> those from to on; false if nothing is visible
    bool read_mask(const ggml_tensor * t, const uint8_t * kinds, int64_t col, uint32_t n, uint32_t to) {
        const uint32_t n_rows = n_q/n_group;
        const uint32_t n_pad  = GGML_PAD(n, LLAMA_CAPSULE_VEC);

        if (std::all_of(kinds, kinds + n_rows, [](uint8_t kind) { return kind == LLAMA_CAPSULE_MASK_NONE; })) {
            return false;
        }
        for (uint32_t i = 0; i < n_rows; ++i) {
            float * dst = mask.data() + i*ld_s + to;
            if (kinds[i] == LLAMA_CAPSULE_MASK_SOME) {
                llama_capsule_read_mask(t, i, col, n, dst);
                continue;
            }
            std::fill(dst, dst + n, kinds[i] == LLAMA_CAPSULE_MASK_ALL ? 0.0f : -INFINITY);
            std::fill(dst + n, dst + n_pad, -INFINITY);
        }

        return true;
    }

    // s: scores -> weights
    void softmax() {
        for (uint32_t i = 0; i < n_q; ++i) {
            float added;
            const float f = sums.data()[i].add(s.data() + i*ld_s, mask.data() + i/n_group*ld_s, ld_s, added);

            if (f != 1.0f) {
                simd.scale(ld_v, f, o_hot .data() + i*ld_v);
                simd.scale(ld_v, f, o_cold.data() + i*ld_v);
            }
            l_cold.data()[i] = f*l_cold.data()[i] + added;
        }
    }

    // fewer columns than the mask has been read for
    void set_columns(uint32_t n) {
        for (uint32_t i = 1; i < n_q/n_group; ++i) {
            std::copy(mask.data() + i*ld_s, mask.data() + i*ld_s + n, mask.data() + i*n);
        }
        ld_s = n;
    }

    // behind the N columns of each slot: no scores, and masked
    void clear_padding(uint32_t N, uint32_t n_pad) {
        for (uint32_t i = 0; i < n_q*ld_s && N < n_pad; i += n_pad) {
            std::fill(s.data() + i + N, s.data() + i + n_pad, 0.0f);
        }
    }

    // as a slot sees them that begins there; angles, NULL without RoPE
    const float * turn_queries(const llama_capsule_rope_params * rope, const float * first) {
        if (!rope) {
            return q_cold.data();
        }

        angles.resize(rope->n_rot);
        rope->negate(first, angles.data());

        std::copy(q_cold.data(), q_cold.data() + n_q*ld_k, q_slot.data());
        simd.rope(n_q, q_slot.data(), ld_k, angles.data(), 0, rope->n_rot, rope->norm);

        return q_slot.data();
    }

    // scores of one slot -> columns from to on
    void score(const llama_capsule_tile & tile, const uint8_t * slot, uint32_t i_head, uint32_t N,
            const llama_capsule_rope_params * rope, const float * first, const float * distances, uint32_t to) {
        tile.decode(slot, i_head, x.resize(N*ld_k));

        // the key of a token is R(first) R(distance) k
        const float * q = turn_queries(rope, first);
        if (rope) {
            simd.rope(N, x.data(), ld_k, distances, rope->n_rot, rope->n_rot, rope->norm);
        }
        simd.dot(N, n_q, ld_k, x.data(), ld_k, q, ld_k, s.data() + to, ld_s);
    }

    // the rest of it, for slots whose scores lie side by side
    //   next: keys of as many slots that are read after them
    void values(const llama_capsule_tile & tile_v, const std::vector<const uint8_t *> & slots, const std::vector<const uint8_t *> & next, uint32_t i_head, bool rotated_v) {
        tile_v.prefetch(slots[0], i_head);
        softmax();

        // s is [n_q][slots.size()][ld_basis]
        const uint32_t ld = tile_v.ld_rows();
        const uint32_t n  = slots.size();

        simd.mul(n_q*n, tile_v.ld_basis(), ld, s.data(), 1, tile_v.ld_basis(), tile_v.tokens(), ld, zeros.data(), w.data(), ld);

        for (uint32_t i = 0; i < n; ++i) {
            tile_v.mul_rows(slots[i], i + 1 < n ? slots[i + 1] : nullptr, i_head, rotated_v, n_q, w.data() + i*ld, n*ld, o_cold.data());
            llama_capsule_fetch(next[i], LLAMA_CAPSULE_AHEAD);
        }
    }
};
