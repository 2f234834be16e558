#pragma once

#include "capsule/compress/cut.h"
#include "capsule/format/forms.h"
#include "capsule/format/tables.h"
#include "capsule/store/slots.h"

#include "capsule/model/kv.h"
#include "capsule/util/threads.h"

#include <vector>

struct llama_context;

// tiles of hot cells -> slots: a tier for each tile, then its bytes. Threads share the heads of all tiles of a layer; the bytes do not depend on their number
class llama_capsule_encoder {
public:
    struct params {
        float   quality; // the score that a tile may have
        int32_t i_tier;  // >= 0: this tier for all tiles, whatever their score
    };

    llama_capsule_encoder(llama_context & lctx, const llama_capsule_kv & kv, const llama_capsule_threads & threads, llama_capsule_tables_ptr tables, llama_capsule_forms & forms,
            const params & params);

    static constexpr int32_t HOT    = -1; // no tier is good enough
    static constexpr int32_t BROKEN = -2; // keys or values are not finite, or will not fit f16

    // the tier of each tile of one picture: the smallest one that a tile may take
    std::vector<int32_t> choose(const std::vector<llama_capsule_cut> & cuts) const;

    // writes tile i into slot i_slot[i], which has its shape and tier
    void encode(const std::vector<llama_capsule_cut> & cuts, const std::vector<uint32_t> & i_slot, llama_capsule_slots & slots) const;

private:
    llama_context                & lctx;
    const llama_capsule_kv       & kv;
    const llama_capsule_threads  & threads;
    const llama_capsule_tables_ptr tables;
    llama_capsule_forms          & forms;
    const params                   p;

    // what is known of K or V of one tile in one layer: sums over its heads
    struct measured {
        std::vector<double> errors; // of each tier
        std::vector<char>   fits;   // of each tier: no value that is read leaves f16
        double              rival  = 0.0;  // the error of rotated q4_0
        double              energy = 0.0;  // of all rows but the constant one
        bool                finite = true;
    };

    // the tiers that may be taken
    uint32_t tier_first() const;
    uint32_t tier_end()   const;

    // those of a tile that are measured
    struct range {
        uint32_t first;
        uint32_t end;
    };

    // one head; x: its tokens, f32 [n][d], are overwritten
    measured measure(const llama_capsule_cut & cut, uint32_t i_layer, bool is_v, uint32_t i_head, float * x, range tiers) const;

    // K and V of each layer, for each cut; tiers[i] becomes those that were measured in all layers
    std::vector<std::vector<measured>> measure_all(const std::vector<llama_capsule_cut> & cuts, std::vector<range> & tiers) const;

    // what is left after the first n parts
    range narrow(const std::vector<measured> & parts, size_t n, range tiers) const;

    std::vector<double> usual_energies(const std::vector<llama_capsule_cut> & cuts, const std::vector<std::vector<measured>> & parts) const;

    // whether rotated q4_0 fits the heads of a part
    bool has_rival(size_t i_part) const;

    int32_t choose_tier(const std::vector<measured> & parts, const std::vector<double> & energies, uint32_t n_tokens, range tiers) const;

    // calls fn(i_cut, is_v, i_head, x) for every head of every tile of a layer, on several threads; x: f32 [n][d], keys without RoPE
    template<typename F>
    void for_heads(llama_capsule_kv::reader & reader, const std::vector<llama_capsule_cut> & cuts, uint32_t i_layer, F fn) const;
};
