#include "capsule/graph/angles.h"

#include "capsule/store/slots.h"

#include "../ggml/src/ggml-capsule/attn.h"

#include "capsule/model/kv.h"
#include "llama-kv-cells.h"

#include <algorithm>

void llama_capsule_angles::init(std::vector<kind> kinds, uint32_t n_pos) {
    this->kinds = std::move(kinds);
    this->n_pos = n_pos;

    tables.resize(this->kinds.size());
}

uint32_t llama_capsule_angles::n_rows() const {
    return n_rows_all;
}

uint32_t llama_capsule_angles::pattern_row(uint32_t i_slot) const {
    return patterns[slots[i_slot].i_pattern].row;
}

int32_t llama_capsule_angles::rope(uint32_t i_slot) const {
    return patterns[slots[i_slot].i_pattern].rope;
}

bool llama_capsule_angles::regular() const {
    return all_regular;
}

const std::vector<float> & llama_capsule_angles::table(uint32_t i_kind) const {
    return tables[i_kind];
}

void llama_capsule_angles::update(const llama_capsule_slots & all) {
    if (kinds.empty() || (valid && version == all.version())) {
        return;
    }

    const auto & cells = all.cells();

    slots.clear();
    patterns.clear();

    n_rows_all  = all.n_slots();
    n_ropes     = 0;
    all_regular = true;

    tokens t;
    for (uint32_t i = 0; i < all.n_slots(); ++i) {
        const auto & s = all.slot(i);

        t.h = s.h;
        t.w = s.w;
        t.pos  .assign(s.h*s.w, {});
        t.empty.assign(s.h*s.w, false);
        for (size_t j = 0; j < t.pos.size(); ++j) {
            t.empty[j] = cells.is_empty(s.first + j);
            t.pos[j]   = llama_capsule_rope_pos(cells, s.first + j, n_pos);
        }
        slots.push_back(find(t));
    }
    for (size_t i = 0; i < kinds.size(); ++i) {
        fill(kinds[i], tables[i]);
    }

    version = all.version();
    valid   = true;
}

// the pattern of a slot, a new one if there is none like it
llama_capsule_angles::slot llama_capsule_angles::find(const tokens & t) {
    const size_t any = std::find(t.empty.begin(), t.empty.end(), false) - t.empty.begin();

    const auto matches = [&](const pattern & p, const llama_capsule_pos & first) {
        for (size_t j = 0; j < t.pos.size(); ++j) {
            if (!t.empty[j] && llama_capsule_pos_sub(t.pos[j], first) != p.distances[j]) {
                return false;
            }
        }
        return true;
    };

    for (uint32_t i = 0; i < patterns.size(); ++i) {
        const auto & p = patterns[i];
        if (p.distances.size() != t.pos.size() || any == t.pos.size()) {
            continue;
        }

        const auto first = llama_capsule_pos_sub(t.pos[any], p.distances[any]);
        if (p.w == t.w && matches(p, first)) {
            return { first, i };
        }
    }

    slot    res = { any < t.pos.size() ? t.pos[any] : llama_capsule_pos {}, uint32_t(patterns.size()) };
    pattern p   = describe(t, res.first);

    p.row  = n_rows_all;
    p.rope = -1;
    if (matches(p, res.first)) {
        p.rope = n_ropes++;
    } else {
        // anything
        all_regular = false;

        for (size_t j = 0; j < t.pos.size(); ++j) {
            p.distances[j] = t.empty[j] ? llama_capsule_pos {} : llama_capsule_pos_sub(t.pos[j], res.first);
        }
    }
    n_rows_all += t.pos.size();
    patterns.push_back(std::move(p));

    return res;
}

// the same step from each token to the next one, and from each line to the next one, if that is what they are; `first`: of a token that is there -> of the first one
llama_capsule_angles::pattern llama_capsule_angles::describe(const tokens & t, llama_capsule_pos & first) const {
    pattern res = {};

    res.w = t.w;

    bool has_x = false;
    bool has_y = false;
    for (uint32_t j = 0; j < t.pos.size(); ++j) {
        if (!has_x && j % t.w + 1 < t.w && !t.empty[j] && !t.empty[j + 1]) {
            res.step_x = llama_capsule_pos_sub(t.pos[j + 1], t.pos[j]);
            has_x = true;
        }
        if (!has_y && j + t.w < t.pos.size() && !t.empty[j] && !t.empty[j + t.w]) {
            res.step_y = llama_capsule_pos_sub(t.pos[j + t.w], t.pos[j]);
            has_y = true;
        }
    }

    // the positions of a saved state may be anything
    const auto along = [&](uint32_t j) {
        llama_capsule_pos pos;
        for (size_t k = 0; k < pos.size(); ++k) {
            pos[k] = (int32_t) (j % t.w*(uint32_t) res.step_x[k] + j/t.w*(uint32_t) res.step_y[k]);
        }
        return pos;
    };

    const size_t any = std::find(t.empty.begin(), t.empty.end(), false) - t.empty.begin();
    if (any < t.pos.size()) {
        first = llama_capsule_pos_sub(t.pos[any], along(any));
    }
    for (uint32_t j = 0; j < t.pos.size(); ++j) {
        res.distances.push_back(along(j));
    }
    return res;
}

void llama_capsule_angles::fill(const kind & k, std::vector<float> & res) const {
    const size_t n_row  = ggml_capsule_angles_size(k.channels);
    const size_t n_rope = ggml_capsule_rope_size(k.channels)/sizeof(float);

    std::vector<float> angle(k.rope.n_rot/2);

    const auto angles = [&](const llama_capsule_pos & pos) {
        k.rope.angles(pos, angle.data());
        return std::vector<double>(angle.begin(), angle.end());
    };

    res.assign(n_rows_all*n_row + n_ropes*n_rope, 0.0f);

    float * to = res.data();
    for (const auto & s : slots) {
        ggml_capsule_angles_init(to, k.channels, angles(s.first).data(), k.rope.scale()); // every key is turned by it once
        to += n_row;
    }
    for (const auto & p : patterns) {
        for (const auto & distance : p.distances) {
            ggml_capsule_angles_init(to, k.channels, angles(distance).data(), 1.0f);
            to += n_row;
        }
    }
    for (const auto & p : patterns) {
        if (p.rope >= 0) {
            ggml_capsule_rope_init((ggml_capsule_rope *) to, k.channels, angles(p.step_x).data(), angles(p.step_y).data());
            to += n_rope;
        }
    }
}
