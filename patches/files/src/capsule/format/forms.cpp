#include "capsule/format/forms.h"

#include "ggml-capsule.h"

#include <algorithm>
#include <cstring>

// of all heads
static ggml_capsule_transform capsule_transform(const llama_capsule_tables::layer::transform & t) {
    const auto at = [](const auto & x) { return x.empty() ? nullptr : x.data(); };

    ggml_capsule_transform res;

    res.matrix   = at(t.matrix);
    res.columns  = at(t.columns);
    res.order    = at(t.order);
    res.near     = at(t.near);
    res.n_kept   = t.order.empty() ? 0 : GGML_CAPSULE_MAX_ROWS - t.near.size()/t.n_near;
    res.n_near   = t.n_near;
    res.n_mlp    = t.n_mlp;
    res.gates    = at(t.gates);
    res.mlp_up   = at(t.mlp_up);
    res.mlp_bias = at(t.mlp_bias);
    res.mlp_down = at(t.mlp_down);

    return res;
}

llama_capsule_forms::llama_capsule_forms(llama_capsule_tables_ptr tables) : tables(std::move(tables)) {
}

uint32_t llama_capsule_forms::size() const {
    return forms.size();
}

const ggml_capsule_form & llama_capsule_forms::get(uint32_t i_layer, uint32_t i_form) const {
    return forms[i_form].layers[i_layer]->form;
}

ggml_capsule_channels llama_capsule_forms::channels_k(uint32_t i_layer) const {
    return tables->channels_k(tables->layers[i_layer]);
}

ggml_capsule_channels llama_capsule_forms::channels_v(uint32_t i_layer) const {
    return tables->channels_v(tables->layers[i_layer]);
}

ggml_capsule_coder llama_capsule_forms::coder_k(uint32_t i_layer, uint32_t i_head) const {
    const auto & layer = tables->layers[i_layer];

    const auto   ch    = channels_k(i_layer);

    return { ch, layer.k_mean.data() + i_head*layer.n_embd_head_k, nullptr, capsule_transform(layer.k_transform).of_head(ggml_capsule_n_groups(ch), i_head) };
}

ggml_capsule_coder llama_capsule_forms::coder_v(uint32_t i_layer, uint32_t i_head) const {
    const auto & layer = tables->layers[i_layer];
    const size_t d     = layer.n_embd_head_v;

    return { channels_v(i_layer), layer.v_mean.data() + i_head*d, layer.v_axes.empty() ? nullptr : layer.v_axes.data() + i_head*d*d,
             capsule_transform(layer.v_transform) };
}

uint32_t llama_capsule_forms::find(uint32_t i_tier, uint32_t h, uint32_t w) {
    for (uint32_t i = 0; i < forms.size(); ++i) {
        if (forms[i].i_tier == i_tier && forms[i].h == h && forms[i].w == w) {
            return i;
        }
    }

    form res = { i_tier, h, w, {} };
    for (uint32_t i = 0; i < tables->layers.size(); ++i) {
        res.layers.push_back(make(i, i_tier, h, w));
    }
    forms.push_back(std::move(res));

    return forms.size() - 1;
}

std::unique_ptr<llama_capsule_forms::layer_form> llama_capsule_forms::make(uint32_t i_layer, uint32_t i_tier, uint32_t h, uint32_t w) const {
    const auto & layer = tables->layers[i_layer];

    auto res = std::make_unique<layer_form>();

    // a plan for each head, or for all of them if they have the same table
    const auto add = [&](const ggml_capsule_channels & ch, const std::vector<uint8_t> & all) {
        const int      n_groups = ggml_capsule_n_groups(ch);
        const size_t   n_table  = llama_capsule_tables::N_ROWS*n_groups;
        const uint8_t * table   = all.data() + i_tier*layer.n_head_kv*n_table;

        bool same = true;
        for (uint32_t i = 1; i < layer.n_head_kv; ++i) {
            same = same && std::equal(table, table + n_table, table + i*n_table);
        }

        const size_t n_plan = (ggml_capsule_plan_size(n_groups) + 3)/4;
        for (uint32_t i = 0; i < (same ? 1 : layer.n_head_kv); ++i) {
            res->plans.resize(res->plans.size() + n_plan);
            ggml_capsule_plan_init((ggml_capsule_plan *) (res->plans.data() + res->plans.size() - n_plan), ch, table + i*n_table, h, w);
        }
        return same ? 0 : 4*n_plan;
    };

    auto & f = res->form;

    f.h = h;
    f.w = w;
    f.k_stride = add(channels_k(i_layer), layer.k_table);

    const size_t n_plans_k = res->plans.size();

    f.v_stride = add(channels_v(i_layer), layer.v_table);
    f.k_plan   = (const uint8_t *) res->plans.data();
    f.v_plan   = (const uint8_t *) (res->plans.data() + n_plans_k);

    res->offsets.resize(2*layer.n_head_kv);

    f.k_offset = res->offsets.data();
    f.v_offset = res->offsets.data() + layer.n_head_kv;
    f.size     = ggml_capsule_form_offsets(f, layer.n_head_kv, res->offsets.data(), res->offsets.data() + layer.n_head_kv);

    return res;
}

std::vector<uint8_t> llama_capsule_forms::pack(uint32_t i_layer) const {
    const auto & layer = tables->layers[i_layer];

    std::vector<uint8_t> res;

    const auto add = [&](const void * data, size_t n) {
        const size_t at = res.size();
        res.resize((at + n + 63)/64*64);
        std::copy_n((const uint8_t *) data, n, res.begin() + at);
        return int32_t(at);
    };
    const auto add_all = [&](const auto & x) {
        return x.empty() ? 0 : add(x.data(), x.size()*sizeof(x[0]));
    };

    ggml_capsule_tile_tables head = {};
    add(&head, sizeof(head));

    std::vector<ggml_capsule_tile_form> list;
    for (uint32_t i = 0; i < forms.size(); ++i) {
        const auto & f = get(i_layer, i);

        const size_t n_k = ggml_capsule_plan_size(ggml_capsule_n_groups(channels_k(i_layer)));
        const size_t n_v = ggml_capsule_plan_size(ggml_capsule_n_groups(channels_v(i_layer)));

        ggml_capsule_tile_form form = { f.h, f.w, int32_t(f.size), 0, 0, int32_t(f.k_stride), int32_t(f.v_stride), 0, 0 };

        form.k_plan   = add(f.k_plan, n_k + (layer.n_head_kv - 1)*f.k_stride);
        form.v_plan   = add(f.v_plan, n_v + (layer.n_head_kv - 1)*f.v_stride);
        form.k_offset = add(f.k_offset, layer.n_head_kv*sizeof(*f.k_offset));
        form.v_offset = add(f.v_offset, layer.n_head_kv*sizeof(*f.v_offset));
        list.push_back(form);
    }

    head.n_forms = forms.size();
    head.forms   = add(list.data(), list.size()*sizeof(list[0]));
    head.k_mean  = add_all(layer.k_mean);
    head.v_mean  = add_all(layer.v_mean);
    head.v_axes  = add_all(layer.v_axes);

    const auto & k = layer.k_transform;

    head.k_matrix   = add_all(k.matrix);
    head.k_columns  = add_all(k.columns);
    head.v_matrix   = add_all(layer.v_transform.matrix);
    head.v_columns  = add_all(layer.v_transform.columns);
    head.k_order    = add_all(k.order);
    head.k_near     = add_all(k.near);
    head.k_gates    = add_all(k.gates);
    head.k_mlp_up   = add_all(k.mlp_up);
    head.k_mlp_bias = add_all(k.mlp_bias);
    head.k_mlp_down = add_all(k.mlp_down);
    head.n_kept     = capsule_transform(k).n_kept;
    head.n_near     = k.n_near;
    head.n_mlp      = k.n_mlp;
    std::memcpy(res.data(), &head, sizeof(head));

    return res;
}
