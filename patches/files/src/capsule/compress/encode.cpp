#include "capsule/compress/encode.h"

#include "capsule/util/floats.h"

#include "../ggml/src/ggml-capsule/clones.h"
#include "../ggml/src/ggml-capsule/half.h"
#include "../ggml/src/ggml-capsule/quantize.h"
#include "../ggml/src/ggml-capsule/tile.h"
#include "llama-context.h"

#include <algorithm>
#include <array>
#include <bitset>
#include <cmath>
#include <cstring>
#include <numeric>

// see kvcapsule_gguf/codec/quality.py
static constexpr double CAPSULE_LIMIT = 0.03;  // an error over the energy of a usual tile that counts as much as rotated q4_0's error
static constexpr double CAPSULE_LEAST = 1e-20;

static constexpr float CAPSULE_F16_MAX = 65504.0f;

static constexpr uint8_t CAPSULE_F32 = 32; // "bits" of a block without an error

llama_capsule_encoder::llama_capsule_encoder(llama_context & lctx, const llama_capsule_kv & kv, const llama_capsule_threads & threads, llama_capsule_tables_ptr tables,
        llama_capsule_forms & forms, const params & params) : lctx(lctx), kv(kv), threads(threads), tables(std::move(tables)), forms(forms), p(params) {
}

uint32_t llama_capsule_encoder::tier_first() const {
    return p.i_tier >= 0 ? p.i_tier : tables->i_tier_first;
}

uint32_t llama_capsule_encoder::tier_end() const {
    return p.i_tier >= 0 ? p.i_tier + 1 : tables->smaller.size();
}

static std::vector<uint32_t> capsule_all_cells(const std::vector<llama_capsule_cut> & cuts) {
    std::vector<uint32_t> res;
    for (const auto & cut : cuts) {
        res.insert(res.end(), cut.cells.begin(), cut.cells.end());
    }
    return res;
}

template<typename F>
void llama_capsule_encoder::for_heads(llama_capsule_kv::reader & reader, const std::vector<llama_capsule_cut> & cuts, uint32_t i_layer, F fn) const {
    const auto & layer = tables->layers[i_layer];

    reader.load(layer.il, layer.rope);

    std::vector<size_t> first(cuts.size(), 0);
    for (size_t i = 1; i < cuts.size(); ++i) {
        first[i] = first[i - 1] + cuts[i - 1].cells.size();
    }

    threads.run(lctx.n_threads_batch(), cuts.size()*2*layer.n_head_kv, [&](size_t i) {
        static thread_local llama_capsule_buf<float> buf;

        const size_t   i_cut  = i/(2*layer.n_head_kv);
        const bool     is_v   = i/layer.n_head_kv % 2;
        const uint32_t i_head = i % layer.n_head_kv;
        const size_t   n      = cuts[i_cut].cells.size();
        const size_t   d      = is_v ? layer.n_embd_head_v : layer.n_embd_head_k;

        float * x = buf.resize(n*d);

        if (is_v) {
            reader.read_v(i_head, first[i_cut], n, x, d);
        } else {
            reader.read_k(i_head, first[i_cut], n, x, d);
        }

        fn(i_cut, is_v, i_head, x);
    });
}

//
// which tier
//

CAPSULE_CLONES static float capsule_max(const float * x, size_t n) {
    return capsule_largest(x, n);
}

// the squared error of a row in q4_0, see quantize_row_q4_0_ref(); d: a multiple of 32
CAPSULE_CLONES static float capsule_q4_row_error(const float * x, uint32_t d) {
    static constexpr uint32_t QK = 32;

    float sums[QK] = {};
    for (uint32_t j = 0; j < d; j += QK, x += QK) {
        const float amax = capsule_largest(x, QK);

        // the first one: its sign is that of the scale
        uint32_t at = 0;
        while (fabsf(x[at]) != amax) {
            ++at;
        }
        const float scale  = x[at]/-8;
        const float inv    = scale != 0.0f ? 1.0f/scale : 0.0f;
        const float stored = ggml_capsule_from_half(ggml_capsule_to_half(scale));

        for (uint32_t i = 0; i < QK; ++i) {
            const float error = x[i] - stored*(std::min(15, (int) (x[i]*inv + 8.5f)) - 8);
            sums[i] += error*error;
        }
    }
    return std::accumulate(sums, sums + QK, 0.0f);
}

// of n rows, rotated; x is overwritten
//   from_q4: they come from cells in q4_0, and would have no error: other signs (those of Rudin and Shapiro) before the rotation take them off that grid
static double capsule_q4_error(float * x, uint32_t n, uint32_t d, bool from_q4) {
    double res = 0.0;
    for (uint32_t t = 0; t < n; ++t, x += d) {
        for (uint32_t i = 0; i < d && from_q4; ++i) {
            x[i] = std::bitset<32>(i & i >> 1).count() % 2 ? -x[i] : x[i];
        }
        llama_capsule_hadamard(x, llama_capsule_hadamard_size(d), d);
        res += capsule_q4_row_error(x, d);
    }
    return res;
}

llama_capsule_encoder::measured llama_capsule_encoder::measure(const llama_capsule_cut & cut, uint32_t i_layer, bool is_v, uint32_t i_head, float * x, range tiers) const {
    static thread_local llama_capsule_buf<float> rows, work, errors;

    const auto & layer    = tables->layers[i_layer];
    const auto   coder    = is_v ? forms.coder_v(i_layer, i_head) : forms.coder_k(i_layer, i_head);
    const auto & table    = is_v ? layer.v_table : layer.k_table;
    const auto   n_groups = ggml_capsule_n_groups(coder.channels);
    const auto   n_blocks = ggml_capsule_n_blocks(cut.h, cut.w);
    const auto   n        = cut.cells.size();
    const size_t d        = coder.channels.d;

    const auto bits_of = [&](uint32_t i_tier) {
        return table.data() + ((size_t) i_tier*layer.n_head_kv + i_head)*llama_capsule_tables::N_ROWS*n_groups;
    };

    // those that occur; without any the error is the energy
    std::vector<uint8_t> bits = { 0 };
    std::array<int, CAPSULE_F32 + 1> place = {};
    for (uint32_t t = tiers.first; t < tiers.end; ++t) {
        for (size_t i = 0; i < (size_t) llama_capsule_tables::N_ROWS*n_groups; ++i) {
            const uint8_t b = bits_of(t)[i];
            if (b != 0 && b != CAPSULE_F32 && place[b] == 0) {
                place[b] = bits.size();
                bits.push_back(b);
            }
        }
    }

    const float max = capsule_max(x, n*d);

    measured res;
    res.errors.resize(tier_end(), 0.0);
    res.finite = max <= CAPSULE_F16_MAX;
    if (!res.finite) {
        res.fits.resize(res.errors.size(), false);
        return res;
    }

    uint8_t used[GGML_CAPSULE_MAX_BLOCKS];
    ggml_capsule_table_rows(cut.h, cut.w, used);

    // what is left of dropped tokens depends on the tier: then each of them is a pass of its own
    const bool     each = coder.whole.order && !coder.whole.is_dct(cut.h, cut.w);
    const uint32_t step = each ? 1 : tiers.end - tiers.first;

    for (uint32_t t0 = tiers.first; t0 < tiers.end; t0 += step) {
        // the types of a block, which costs a search for each of them
        std::vector<uint16_t> wanted(n_blocks*n_groups, 1);
        for (uint32_t t = t0; t < t0 + step; ++t) {
            for (int i = 0; i < n_blocks*n_groups; ++i) {
                wanted[i] |= 1 << place[bits_of(t)[used[i/n_groups]*n_groups + i%n_groups]];
            }
        }

        std::vector<uint32_t> plan((ggml_capsule_plan_size(n_groups) + 3)/4);
        if (each) {
            ggml_capsule_plan_init((ggml_capsule_plan *) plan.data(), coder.channels, bits_of(t0), cut.h, cut.w);
        }

        ggml_capsule_rows(coder, each ? (const ggml_capsule_plan *) plan.data() : nullptr, cut.h, cut.w, x, d, rows.resize(n*d), work.resize(ggml_capsule_rows_work(d)));
        ggml_capsule_errors(coder, cut.h, cut.w, rows.data(), bits.size(), bits.data(), wanted.data(), errors.resize(n_blocks*n_groups*bits.size()));

        for (int i = 0; i < n_blocks; ++i) {
            for (int g = 0; g < n_groups; ++g) {
                const float * e = errors.data() + (i*n_groups + g)*bits.size();
                for (uint32_t t = t0; t < t0 + step; ++t) {
                    const uint8_t b = bits_of(t)[used[i]*n_groups + g];
                    res.errors[t] += b == CAPSULE_F32 ? 0.0f : e[place[b]];
                }
                res.energy += i > 0 && t0 == tiers.first ? e[0] : 0.0f;
            }
        }
    }

    // no value is further off than the error of the head
    for (double e : res.errors) {
        res.fits.push_back(max + sqrt(e) <= CAPSULE_F16_MAX);
    }
    if (d % ggml_blck_size(GGML_TYPE_Q4_0) == 0) {
        res.rival = capsule_q4_error(x, n, d, (is_v ? kv.type_v() : kv.type_k()) == GGML_TYPE_Q4_0);
    }

    return res;
}

bool llama_capsule_encoder::has_rival(size_t i_part) const {
    const auto & layer = tables->layers[i_part/2];

    return (i_part % 2 ? layer.n_embd_head_v : layer.n_embd_head_k) % ggml_blck_size(GGML_TYPE_Q4_0) == 0;
}

llama_capsule_encoder::range llama_capsule_encoder::narrow(const std::vector<measured> & parts, size_t n, range tiers) const {
    if (p.i_tier >= 0) {
        return tiers;
    }

    const auto by_rival = [&](uint32_t t) {
        double res = 0.0;
        for (size_t i = 0; i < n; ++i) {
            res += has_rival(i) ? parts[i].errors[t]/std::max(parts[i].rival, CAPSULE_LEAST) : 0.0;
        }
        return res;
    };
    const auto by_energy = [&](uint32_t t) {
        double res = 0.0;
        for (size_t i = 0; i < n; ++i) {
            res += parts[i].errors[t]/std::max(parts[i].energy, CAPSULE_LEAST)/CAPSULE_LIMIT;
        }
        return res;
    };

    // errors only grow: these are too large already
    while (tiers.first + 1 < tiers.end && by_rival(tiers.first)/parts.size() > p.quality) {
        ++tiers.first;
    }

    // if the other parts are like these, it will be this tier. One more for those that are not; choose() comes back where that is not enough
    uint32_t likely = tiers.first;
    while (likely < tiers.end && std::max(by_rival(likely), by_energy(likely))/n > p.quality) {
        ++likely;
    }
    tiers.end = std::min(tiers.end, likely + 2);

    return tiers;
}

// parts: K and V of each layer; energies: of a usual tile, the same order, <= 0 where that is not known
int32_t llama_capsule_encoder::choose_tier(const std::vector<measured> & parts, const std::vector<double> & energies, uint32_t n_tokens, range tiers) const {
    bool fits = false;

    for (uint32_t t = tiers.first; t < tiers.end; ++t) {
        double by_rival  = 0.0;
        double by_energy = 0.0;

        bool fits_tier = true;
        for (size_t i = 0; i < parts.size(); ++i) {
            if (has_rival(i)) {
                by_rival += parts[i].errors[t]/std::max(parts[i].rival, CAPSULE_LEAST);
            }
            if (energies[i] > 0.0) {
                by_energy += parts[i].errors[t]/(energies[i]*n_tokens/GGML_CAPSULE_MAX_ROWS)/CAPSULE_LIMIT;
            }
            fits_tier = fits_tier && parts[i].fits[t];
        }
        fits = fits || fits_tier;

        if (fits_tier && (p.i_tier >= 0 || std::max(by_rival, by_energy)/parts.size() <= p.quality)) {
            return t;
        }
    }

    return fits ? HOT : BROKEN;
}

std::vector<std::vector<llama_capsule_encoder::measured>> llama_capsule_encoder::measure_all(const std::vector<llama_capsule_cut> & cuts,
        std::vector<range> & tiers) const {
    const size_t n_parts = 2*tables->layers.size();

    llama_capsule_kv::reader reader(kv, capsule_all_cells(cuts));

    std::vector<std::vector<measured>> parts(cuts.size(), std::vector<measured>(n_parts));

    for (uint32_t l = 0; l < tables->layers.size(); ++l) {
        const uint32_t n_head = tables->layers[l].n_head_kv;

        std::vector<measured> heads(cuts.size()*2*n_head);
        for_heads(reader, cuts, l, [&](size_t i_cut, bool is_v, uint32_t i_head, float * x) {
            heads[(i_cut*2 + is_v)*n_head + i_head] = measure(cuts[i_cut], l, is_v, i_head, x, tiers[i_cut]);
        });

        for (size_t i = 0; i < heads.size(); ++i) {
            auto & sum  = parts[i/(2*n_head)][2*l + i/n_head % 2];
            auto & head = heads[i];

            if (i % n_head == 0) {
                sum = std::move(head);
                continue;
            }
            for (size_t t = 0; t < sum.errors.size(); ++t) {
                sum.errors[t] += head.errors[t];
                sum.fits[t]    = sum.fits[t] && head.fits[t];
            }
            sum.rival  += head.rival;
            sum.energy += head.energy;
            sum.finite  = sum.finite && head.finite;
        }

        for (size_t i = 0; i < cuts.size(); ++i) {
            tiers[i] = narrow(parts[i], 2*(l + 1), tiers[i]);
        }
    }

    return parts;
}

// of a usual tile, for each part. Without a file, what is usual is what the tiles of this picture are like
std::vector<double> llama_capsule_encoder::usual_energies(const std::vector<llama_capsule_cut> & cuts,
        const std::vector<std::vector<measured>> & parts) const {
    std::vector<double> res;
    for (size_t i = 0; i < 2*tables->layers.size(); ++i) {
        const auto & layer = tables->layers[i/2];

        double sum = 0.0;
        size_t n   = 0;
        for (size_t j = 0; j < cuts.size(); ++j) {
            sum += parts[j][i].energy;
            n   += cuts[j].cells.size();
        }
        res.push_back(!tables->builtin ? (i % 2 ? layer.v_energy : layer.k_energy) : sum*GGML_CAPSULE_MAX_ROWS/n);
    }
    return res;
}

std::vector<int32_t> llama_capsule_encoder::choose(const std::vector<llama_capsule_cut> & cuts) const {
    std::vector<int32_t> res(cuts.size());
    std::vector<double>  energies;

    // tiles without a tier yet, and what they may take
    std::vector<size_t> left(cuts.size());
    std::vector<range>  tiers(cuts.size(), { tier_first(), tier_end() });
    std::iota(left.begin(), left.end(), 0);

    while (!left.empty()) {
        std::vector<llama_capsule_cut> some;
        for (size_t j : left) {
            some.push_back(cuts[j]);
        }
        const auto parts = measure_all(some, tiers);
        if (energies.empty()) {
            energies = usual_energies(cuts, parts);
        }

        std::vector<size_t> again;
        std::vector<range>  above;
        for (size_t i = 0; i < left.size(); ++i) {
            const bool finite = std::all_of(parts[i].begin(), parts[i].end(), [](const measured & m) { return m.finite; });

            res[left[i]] = finite ? choose_tier(parts[i], energies, some[i].cells.size(), tiers[i]) : BROKEN;
            if (finite && res[left[i]] < 0 && tiers[i].end < tier_end()) {
                again.push_back(left[i]);
                above.push_back({ tiers[i].end, tier_end() });
            }
        }
        left  = again;
        tiers = above;
    }
    return res;
}

//
// the bytes
//

void llama_capsule_encoder::encode(const std::vector<llama_capsule_cut> & cuts, const std::vector<uint32_t> & i_slot, llama_capsule_slots & slots) const {
    llama_capsule_kv::reader reader(kv, capsule_all_cells(cuts));

    for (uint32_t l = 0; l < tables->layers.size(); ++l) {
        const uint32_t n_head = tables->layers[l].n_head_kv;

        std::vector<const ggml_capsule_form *> form;
        std::vector<std::vector<uint8_t>>      data;
        for (uint32_t i : i_slot) {
            const auto & slot = slots.slot(i);

            form.push_back(&forms.get(l, forms.find(slot.i_tier, slot.h, slot.w)));
            data.emplace_back((size_t) slots.size(l, i)*LLAMA_CAPSULE_UNIT, 0);
        }

        std::vector<ggml_capsule_coder> k;
        for (uint32_t h = 0; h < n_head; ++h) {
            k.push_back(forms.coder_k(l, h));
        }

        for_heads(reader, cuts, l, [&](size_t i, bool is_v, uint32_t i_head, const float * x) {
            static thread_local llama_capsule_buf<float> rows, work;

            const auto   coder = is_v ? forms.coder_v(l, i_head) : forms.coder_k(l, i_head);
            const auto * plan  = is_v ? ggml_capsule_form_v(*form[i], i_head) : ggml_capsule_form_k(*form[i], i_head);
            const size_t offs  = is_v ? form[i]->v_offset[i_head] : form[i]->k_offset[i_head];
            const size_t d     = coder.channels.d;

            ggml_capsule_rows(coder, plan, cuts[i].h, cuts[i].w, x, d, rows.resize(cuts[i].cells.size()*d), work.resize(ggml_capsule_rows_work(d)));
            ggml_capsule_store(coder.channels, plan, rows.data(), data[i].data() + offs);
        });

        threads.run(lctx.n_threads_batch(), cuts.size(), [&](size_t i) {
            ggml_capsule_slot_seal(*form[i], n_head, k.data(), data[i].data());
        });

        for (size_t i = 0; i < cuts.size(); ++i) {
            slots.set(l, i_slot[i], data[i].data());
        }
    }
}
