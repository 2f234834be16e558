#include "llama-capsule-rope.h"

#include "llama-capsule-kv.h"
#include "llama-capsule-simd.h"

#include "llama-context.h"
#include "llama-kv-cells.h"
#include "llama-model.h"

#include <algorithm>
#include <cmath>
#include <cstring>

static constexpr size_t   CAPSULE_SPARE_PATTERNS = 64;
static constexpr uint32_t CAPSULE_PACKED_VIEWS   = 48; // a pattern with more of them is packed without

//
// llama_capsule_rope_params
//

bool llama_capsule_rope_params::supported(const llama_model & model) {
    switch (model.hparams.rope_type) {
        case LLAMA_ROPE_TYPE_NORM:
        case LLAMA_ROPE_TYPE_NEOX:
        case LLAMA_ROPE_TYPE_MROPE:
        case LLAMA_ROPE_TYPE_IMROPE:
            return true;
        default:
            return false;
    }
}

llama_capsule_rope_params::llama_capsule_rope_params(const llama_model & model, const llama_cparams & cparams, int il) {
    const auto & hparams = model.hparams;

    const float freq_base = model.get_rope_freq_base(cparams, il);

    n_rot       = hparams.n_rot(il);
    norm        = hparams.rope_type == LLAMA_ROPE_TYPE_NORM;
    multi       = hparams.n_pos_per_embd() > 1;
    interleaved = hparams.rope_type == LLAMA_ROPE_TYPE_IMROPE;
    freq_scale  = model.get_rope_freq_scale(cparams, il);
    theta_scale = powf(freq_base, -2.0f/n_rot);
    ext_factor  = cparams.yarn_ext_factor;
    mscale      = cparams.yarn_attn_factor;

    if (ext_factor != 0.0f) {
        mscale *= 1.0f + 0.1f*logf(1.0f/freq_scale);
    }

    std::copy(hparams.rope_sections.begin(), hparams.rope_sections.begin() + 4, sections.begin());

    ggml_rope_yarn_corr_dims(n_rot, cparams.n_ctx_orig_yarn, freq_base, cparams.yarn_beta_fast, cparams.yarn_beta_slow, corr_dims);

    if (const ggml_tensor * t = model.get_rope_factors(cparams, il)) {
        factors.resize(ggml_nelements(t));
        ggml_backend_tensor_get(t, factors.data(), 0, ggml_nbytes(t));
    }
}

bool llama_capsule_rope_params::operator==(const llama_capsule_rope_params & other) const {
    return n_rot == other.n_rot && norm == other.norm && multi == other.multi && interleaved == other.interleaved && sections == other.sections &&
        freq_scale == other.freq_scale && theta_scale == other.theta_scale && ext_factor == other.ext_factor && mscale == other.mscale &&
        corr_dims[0] == other.corr_dims[0] && corr_dims[1] == other.corr_dims[1] && factors == other.factors;
}

void llama_capsule_rope_params::angles(const llama_capsule_pos & pos, float * angle) const {
    const uint32_t half   = n_rot/2;
    const int32_t  n_sect = sections[0] + sections[1] + sections[2] + sections[3];

    float theta[4];
    for (int k = 0; k < 4; ++k) {
        theta[k] = multi ? pos[k] : pos[0];
    }

    for (uint32_t i = 0; i < half; ++i) {
        int which = 0;
        if (multi) {
            const int32_t sector = i % n_sect;
            if (interleaved) {
                which = sector % 3;
                if (sector >= 3*sections[which]) {
                    which = 3;
                }
            } else {
                for (int32_t first = sections[0]; which < 3 && sector >= first; first += sections[which]) {
                    which++;
                }
            }
        }

        const float extrap = factors.empty() ? theta[which] : theta[which]/factors[i];

        angle[i] = freq_scale*extrap;
        if (ext_factor != 0.0f) {
            const float ramp = ((float) i - corr_dims[0])/std::max(0.001f, corr_dims[1] - corr_dims[0]);
            const float mix  = (1.0f - std::min(1.0f, std::max(0.0f, ramp)))*ext_factor;
            angle[i] = angle[i]*(1.0f - mix) + extrap*mix;
        }

        for (float & t : theta) {
            t *= theta_scale;
        }
    }
}

void llama_capsule_rope_params::fill(const llama_capsule_pos & pos, bool scale, float * cs) const {
    const uint32_t half = n_rot/2;
    const float    m    = scale ? mscale : 1.0f;

    std::vector<float> angle(half);
    angles(pos, angle.data());

    for (uint32_t i = 0; i < half; ++i) {
        cs[norm ? 2*i     : i]        = cosf(angle[i])*m;
        cs[norm ? 2*i + 1 : i + half] = sinf(angle[i])*m;
    }
}

void llama_capsule_rope_params::fill_inverse(const llama_capsule_pos & pos, float * cs) const {
    fill(pos, false, cs);
    negate(cs, cs);

    for (uint32_t i = 0; i < n_rot && mscale != 1.0f; ++i) {
        cs[i] /= mscale;
    }
}

void llama_capsule_rope_params::add(const float * a, const float * b, float * cs) const {
    const uint32_t half = n_rot/2;

    for (uint32_t i = 0; i < half; ++i) {
        const uint32_t c = norm ? 2*i     : i;
        const uint32_t s = norm ? 2*i + 1 : i + half;

        cs[c] = a[c]*b[c] - a[s]*b[s];
        cs[s] = a[s]*b[c] + a[c]*b[s];
    }
}

void llama_capsule_rope_params::negate(const float * a, float * cs) const {
    const uint32_t half = n_rot/2;

    for (uint32_t i = 0; i < half; ++i) {
        const uint32_t c = norm ? 2*i     : i;
        const uint32_t s = norm ? 2*i + 1 : i + half;

        cs[c] =  a[c];
        cs[s] = -a[s];
    }
}

//
// llama_capsule_rope_cache
//

void llama_capsule_rope_cache::init(std::vector<llama_capsule_rope_params> params, const std::vector<int> & layer_params, uint32_t N, uint32_t d) {
    this->N = N;
    this->d = d;

    if (d > 0) {
        views_still = llama_capsule_views(nullptr, N, 0, false, d, GGML_PAD(N, LLAMA_CAPSULE_VEC));
    }

    layer_table = layer_params;
    for (auto & p : params) {
        tables.push_back({ std::move(p), {}, {}, {}, {} });
    }
}

const llama_capsule_rope_params * llama_capsule_rope_cache::params(uint32_t i_layer) const {
    const int i = layer_table[i_layer];
    return i < 0 ? nullptr : &tables[i].params;
}

const float * llama_capsule_rope_cache::first(uint32_t i_layer, uint32_t i_pool, uint32_t i_slot, bool rotated) const {
    const auto & t = tables[layer_table[i_layer]];
    return (rotated ? t.rest : t.first)[i_pool].data() + i_slot*t.params.n_rot;
}

const float * llama_capsule_rope_cache::distances(uint32_t i_layer, uint32_t i_pool, uint32_t i_slot) const {
    return tables[layer_table[i_layer]].distances[slots[i_pool][i_slot].pattern].data();
}

const llama_capsule_views & llama_capsule_rope_cache::views(uint32_t i_layer, uint32_t i_pool, uint32_t i_slot) const {
    const int i = layer_table[i_layer];
    return i < 0 ? views_still : tables[i].views[slots[i_pool][i_slot].pattern];
}

int llama_capsule_rope_cache::find_table(uint32_t i_layer, bool rotated_0, bool rotated_1) const {
    return layer_table[i_layer] < 0 ? -1 : 4*layer_table[i_layer] + 2*rotated_1 + rotated_0;
}

size_t llama_capsule_rope_cache::packed_size(int i_table) const {
    const size_t n_rot = tables[i_table/4].params.n_rot;

    const size_t n_terms = packed_terms(i_table);

    return (slots[0].size() + slots[1].size())*(n_rot + 1) + patterns.size()*(N*n_rot + (n_terms > 0 ? 1 + n_terms*(N + d) : 0));
}

uint32_t llama_capsule_rope_cache::packed_terms(int i_table) const {
    uint32_t res = 0;
    for (const auto & v : tables[i_table/4].views) {
        res = std::max(res, v.n <= CAPSULE_PACKED_VIEWS ? v.n : 0);
    }
    return res;
}

// see ggml-capsule.h
static std::vector<float> capsule_packed_views(const llama_capsule_views & views, uint32_t n_terms, uint32_t N, uint32_t n_rot, bool norm, uint32_t d) {
    const uint32_t ld = views.phi.size()/views.n;

    std::vector<float> res(1 + n_terms*(N + d), 0.0f);

    const int32_t n = views.n <= n_terms ? views.n : 0;
    std::memcpy(res.data(), &n, sizeof(n));

    for (int32_t m = 0; m < n; ++m) {
        float * phi = res.data() + 1 + m*N;
        float * ab  = res.data() + 1 + n_terms*N + m*d;

        std::copy_n(views.phi.data() + m*ld, N, phi);
        for (uint32_t c = 0; c < n_rot; ++c) {
            const bool is_b = norm ? c%2 == 1 : c >= n_rot/2;

            ab[c] = is_b ? -views.turn[m*n_rot + c] : views.turn[m*n_rot + c];
        }
        for (uint32_t c = n_rot; c < d; c += 2) {
            ab[c] = views.still[m];
        }
    }
    return res;
}

std::vector<int32_t> llama_capsule_rope_cache::packed(int i_table) const {
    const auto & t = tables[i_table/4];

    std::vector<int32_t> res;

    auto add = [&](const std::vector<float> & x) {
        const size_t n = res.size();
        res.resize(n + x.size());
        std::memcpy(res.data() + n, x.data(), x.size()*sizeof(float));
    };

    add((i_table & 1 ? t.rest : t.first)[0]);
    add((i_table & 2 ? t.rest : t.first)[1]);
    for (const auto & list : slots) {
        for (const auto & s : list) {
            res.push_back(s.pattern);
        }
    }
    const uint32_t n_terms = packed_terms(i_table);
    for (size_t i = 0; i < t.distances.size(); ++i) {
        add(t.distances[i]);
        if (n_terms > 0) {
            add(capsule_packed_views(t.views[i], n_terms, N, t.params.n_rot, t.params.norm, d));
        }
    }

    return res;
}

int llama_capsule_rope_cache::pattern(uint32_t i_pool, uint32_t i_slot) const {
    return slots[i_pool][i_slot].pattern;
}

bool llama_capsule_rope_cache::moved(uint32_t i_pool, uint32_t i_slot) const {
    const auto & s = slots[i_pool][i_slot];
    return s.first != s.stored;
}

bool llama_capsule_rope_cache::matches(const std::vector<llama_capsule_pos> & pos, const std::vector<bool> & empty, const llama_capsule_pos & first,
        const std::vector<llama_capsule_pos> & pattern) {
    for (size_t j = 0; j < pos.size(); ++j) {
        if (!empty[j] && llama_capsule_pos_sub(pos[j], first) != pattern[j]) {
            return false;
        }
    }
    return true;
}

void llama_capsule_rope_cache::update(uint32_t i_pool, const llama_kv_cells & cells, const std::vector<llama_capsule_pos> & stored,
        uint32_t n_slots, uint32_t n_pos) {
    if (tables.empty()) {
        return;
    }

    auto & list = slots[i_pool];

    list.resize(n_slots);
    for (auto & t : tables) {
        t.first[i_pool].resize(n_slots*t.params.n_rot);
        t.rest [i_pool].resize(n_slots*t.params.n_rot);
    }

    std::vector<llama_capsule_pos> pos(N);
    std::vector<bool>              empty(N);

    for (uint32_t s = 0; s < n_slots; ++s) {
        uint32_t any = N; // a token that is there
        for (uint32_t j = 0; j < N; ++j) {
            pos[j]   = {};
            empty[j] = cells.is_empty(s*N + j);
            if (!empty[j]) {
                llama_capsule_rope_pos(cells, s*N + j, n_pos, pos[j].data(), 1);
                any = std::min(any, j);
            }
        }

        auto & cur = list[s];
        if (cur.pattern >= 0 && cur.stored == stored[s] && matches(pos, empty, cur.first, patterns[cur.pattern])) {
            continue;
        }

        cur.stored = stored[s];

        cur.pattern = -1;
        for (size_t i = 0; i < patterns.size() && cur.pattern < 0; ++i) {
            if (any < N) {
                cur.first = llama_capsule_pos_sub(pos[any], patterns[i][any]);
            }
            if (matches(pos, empty, cur.first, patterns[i])) {
                cur.pattern = i;
            }
        }

        if (cur.pattern < 0) {
            if (patterns.size() > list.size() + CAPSULE_SPARE_PATTERNS) {
                drop_unused_patterns();
            }

            cur.first   = any < N ? pos[any] : llama_capsule_pos {};
            cur.pattern = patterns.size();

            std::vector<llama_capsule_pos> pattern(N);
            for (uint32_t j = 0; j < N; ++j) {
                if (!empty[j]) {
                    pattern[j] = llama_capsule_pos_sub(pos[j], cur.first);
                }
            }
            for (auto & t : tables) {
                std::vector<float> cs(N*t.params.n_rot);
                for (uint32_t j = 0; j < N; ++j) {
                    t.params.fill(pattern[j], false, cs.data() + j*t.params.n_rot);
                }
                if (d > 0) {
                    t.views.emplace_back(cs.data(), N, t.params.n_rot, t.params.norm, d, GGML_PAD(N, LLAMA_CAPSULE_VEC));
                }
                t.distances.push_back(std::move(cs));
            }
            patterns.push_back(std::move(pattern));
        }

        for (auto & t : tables) {
            t.params.fill(cur.first,                                      true, t.first[i_pool].data() + s*t.params.n_rot);
            t.params.fill(llama_capsule_pos_sub(cur.first, cur.stored), true, t.rest [i_pool].data() + s*t.params.n_rot);
        }
    }
}

void llama_capsule_rope_cache::drop_unused_patterns() {
    std::vector<int> index(patterns.size(), -1);
    for (const auto & list : slots) {
        for (const auto & s : list) {
            if (s.pattern >= 0) {
                index[s.pattern] = 0;
            }
        }
    }

    int n = 0;
    for (size_t i = 0; i < patterns.size(); ++i) {
        if (index[i] < 0) {
            continue;
        }
        index[i] = n;
        std::swap(patterns[n], patterns[i]);
        for (auto & t : tables) {
            std::swap(t.distances[n], t.distances[i]);
            if (d > 0) {
                std::swap(t.views[n], t.views[i]);
            }
        }
        n++;
    }
    patterns.resize(n);
    for (auto & t : tables) {
        t.distances.resize(n);
        t.views    .resize(d > 0 ? n : 0);
    }

    for (auto & list : slots) {
        for (auto & s : list) {
            s.pattern = s.pattern < 0 ? -1 : index[s.pattern];
        }
    }
}
