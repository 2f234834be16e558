// the tables that need no file, for one layer of any shape

#include "capsule/format/tables.h"

#include <algorithm>

// k_table, v_table: [tiers][n_head][33][groups]; returns the number of tiers
extern "C" int builtin_tables(uint32_t n_head, uint32_t d_k, uint32_t d_v, bool rope, uint32_t n_rot, float * smaller, uint8_t * k_table, uint8_t * v_table) {
    llama_capsule_tables t;
    t.n_rot = n_rot;
    t.layers.resize(1);
    t.layers[0].rope          = rope;
    t.layers[0].n_head_kv     = n_head;
    t.layers[0].n_embd_head_k = d_k;
    t.layers[0].n_embd_head_v = d_v;

    t.init_builtin();

    const auto & l = t.layers[0];
    std::copy(t.smaller.begin(), t.smaller.end(), smaller);
    std::copy(l.k_table.begin(), l.k_table.end(), k_table);
    std::copy(l.v_table.begin(), l.v_table.end(), v_table);

    return t.smaller.size();
}
