#include "layout.h"

#include <algorithm>
#include <cstring>

void ggml_capsule_row_order(int h, int w, uint8_t * order) {
    for (int i = 0; i < h*w; ++i) {
        order[i] = (uint8_t) i;
    }
    std::stable_sort(order, order + h*w, [=](uint8_t a, uint8_t b) { return ggml_capsule_roughness(a, h, w) < ggml_capsule_roughness(b, h, w); });
}

void ggml_capsule_table_rows(int h, int w, uint8_t * rows) {
    constexpr int side = GGML_CAPSULE_SIDE;

    uint8_t whole[GGML_CAPSULE_MAX_ROWS];
    uint8_t rank [GGML_CAPSULE_MAX_ROWS];
    uint8_t order[GGML_CAPSULE_MAX_ROWS];

    ggml_capsule_row_order(side, side, whole);
    for (int i = 0; i < GGML_CAPSULE_MAX_ROWS; ++i) {
        rank[whole[i]] = (uint8_t) i;
    }
    ggml_capsule_row_order(h, w, order);

    // where the first row of a block is in the spectrum of a whole tile
    rows[0] = 0;
    for (int i = 1; i < ggml_capsule_n_blocks(h, w); ++i) {
        const int u = order[2*i - 1]/w;
        const int v = order[2*i - 1]%w;
        rows[i] = (uint8_t) ((rank[(2*u + 1)*side/(2*h)*side + (2*v + 1)*side/(2*w)] + 1)/2);
    }
}

void ggml_capsule_plan_init(ggml_capsule_plan * plan, const ggml_capsule_channels & channels, const uint8_t * table, int h, int w) {
    const int n_groups = ggml_capsule_n_groups(channels);
    const int n_blocks = ggml_capsule_n_blocks(h, w);
    const bool lone    = h*w % 2 == 0; // the last block is a row alone
    const int n_pairs  = n_blocks - 1 - lone;

    uint8_t rows[GGML_CAPSULE_MAX_BLOCKS];
    ggml_capsule_table_rows(h, w, rows);

    memset(plan, 0, ggml_capsule_plan_size(n_groups));
    plan->n_groups = (uint16_t) n_groups;
    plan->h        = (uint8_t) h;
    plan->w        = (uint8_t) w;

    size_t scale = 0;
    for (int g = 0; g < n_groups; ++g) {
        auto & group = plan->groups[g];
        group.scale = (uint16_t) scale;
        for (int i = 0; i < n_blocks; ++i) {
            group.bits[i] = table[rows[i]*n_groups + g];
            plan->exact |= group.bits[i] == GGML_CAPSULE_F32;
        }
        memset(group.shuffle, 0x80, sizeof(group.shuffle));
        for (int i = 0; i < GGML_CAPSULE_PAD_BLOCKS; ++i) {
            if (i % 8 == 0) {
                group.source[i/8] = (uint16_t) scale;
            }
            if (group.bits[i] > 0 && group.bits[i] < GGML_CAPSULE_F16) {
                uint8_t * shuffle = group.shuffle[group.bits[i] > 3][i/8] + 2*(i % 8);
                shuffle[0] = (uint8_t) (scale - group.source[i/8]);
                shuffle[1] = (uint8_t) (shuffle[0] + 1);
                scale += sizeof(uint16_t);

                uint8_t & first = group.bits[i] > 3 ? group.high_first : group.low_first;
                uint8_t & last  = group.bits[i] > 3 ? group.high_last  : group.low_last;
                first = last > 0 ? first : (uint8_t) (i/8);
                last  = (uint8_t) (i/8 + 1);
            }
        }
    }

    size_t code = (scale + 7)/8*8;
    for (int g = 0; g < n_groups; ++g) {
        auto & group = plan->groups[g];
        group.code    = (uint32_t) code;
        group.n_lanes = (uint8_t) ggml_capsule_n_lanes(channels, g);
        group.first   = group.bits[0];
        group.last    = lone ? group.bits[n_blocks - 1] : 0;

        int n = 0;
        for (int b = 0; b < GGML_CAPSULE_N_BITS; ++b) {
            for (int i = 1; i <= n_pairs; ++i) {
                if (group.bits[i] == GGML_CAPSULE_BITS[b]) {
                    group.pair[n++] = (uint8_t) i;
                    group.n_pairs[b]++;
                }
            }
            code += group.n_pairs[b]*ggml_capsule_code_size(GGML_CAPSULE_BITS[b], 2, group.n_lanes);
        }
        for (int i = 1; i <= n_pairs; ++i) {
            if (group.bits[i] == 0) {
                group.pair[n++] = (uint8_t) i;
            }
        }
        code += ggml_capsule_code_size(group.first, 1, group.n_lanes);
        code += ggml_capsule_code_size(group.last,  1, group.n_lanes);
    }
    plan->size = (uint32_t) ((code + 7)/8*8);
}

size_t ggml_capsule_head_size(const ggml_capsule_channels & channels, const uint8_t * table, int h, int w) {
    constexpr size_t most = sizeof(ggml_capsule_plan) + GGML_CAPSULE_MAX_GROUPS*sizeof(ggml_capsule_plan_group);

    alignas(ggml_capsule_plan) uint8_t plan[most];
    ggml_capsule_plan_init((ggml_capsule_plan *) plan, channels, table, h, w);
    return ((const ggml_capsule_plan *) plan)->size;
}

size_t ggml_capsule_form_offsets(const ggml_capsule_form & form, int n_head_kv, uint32_t * k_offset, uint32_t * v_offset) {
    size_t at = 0;
    for (int i = 0; i < n_head_kv; ++i) {
        at += 2*sizeof(float); // its step
        k_offset[i] = (uint32_t) at;
        at += ggml_capsule_form_k(form, i)->size;
        v_offset[i] = (uint32_t) at;
        at += ggml_capsule_form_v(form, i)->size;
    }
    return at;
}
