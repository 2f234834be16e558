// what a test of the op on tiles cannot make in numpy: the tables of a layer and ropes, for ctypes
#include "capsule/format/forms.h"

#include "ggml-capsule/attn.h"

#include <cstring>

template<typename T>
static std::vector<T> copy(const T * x, size_t n) {
    return x ? std::vector<T>(x, x + n) : std::vector<T>();
}

static llama_capsule_tables::layer::transform copy(const ggml_capsule_transform & t, int n_head, int n_groups) {
    const size_t n_drop = GGML_CAPSULE_MAX_ROWS - t.n_kept;
    const size_t lanes  = 2*GGML_CAPSULE_LANES*n_groups;
    return {
        copy(t.matrix, 64*64), copy(t.columns, 64*64), copy(t.order, 64), copy(t.near, n_drop*t.n_near), copy(t.gates, n_head*n_drop*t.n_near*lanes/2),
        copy(t.mlp_up, n_head*t.n_mlp*t.n_near*lanes), copy(t.mlp_bias, n_head*t.n_mlp), copy(t.mlp_down, n_head*t.n_mlp*lanes), (uint32_t) t.n_near, (uint32_t) t.n_mlp,
    };
}

extern "C" {

// one layer; forms: (tier, h, w) of each. Sizes of slots -> sizes
llama_capsule_forms * make_forms(int n_head_kv, int d_k, int d_v, int n_rot, int halves, int n_tiers, const float * k_mean, const float * v_mean, const float * v_axes,
        const ggml_capsule_transform * k_transform, const ggml_capsule_transform * v_transform,
        const uint8_t * k_table, const uint8_t * v_table, int n_forms, const int32_t * forms, int64_t * sizes) {
    auto tables = std::make_shared<llama_capsule_tables>();

    llama_capsule_tables::layer layer = {};

    layer.rope          = n_rot > 0;
    layer.n_head_kv     = n_head_kv;
    layer.n_embd_head_k = d_k;
    layer.n_embd_head_v = d_v;
    layer.k_mean.assign(k_mean, k_mean + n_head_kv*d_k);
    layer.v_mean.assign(v_mean, v_mean + n_head_kv*d_v);
    if (v_axes) {
        layer.v_axes.assign(v_axes, v_axes + n_head_kv*d_v*d_v);
    }

    const int groups_k = ggml_capsule_n_groups({ d_k, n_rot, halves });
    const int groups_v = ggml_capsule_n_groups({ d_v, 0, halves });

    layer.k_transform = copy(*k_transform, n_head_kv, groups_k);
    layer.v_transform = copy(*v_transform, n_head_kv, groups_v);

    const size_t n_k = n_tiers*n_head_kv*llama_capsule_tables::N_ROWS*groups_k;
    const size_t n_v = n_tiers*n_head_kv*llama_capsule_tables::N_ROWS*groups_v;

    layer.k_table.assign(k_table, k_table + n_k);
    layer.v_table.assign(v_table, v_table + n_v);

    tables->n_rot     = n_rot;
    tables->rope_type = halves ? "neox" : "norm";
    tables->layers.push_back(std::move(layer));

    auto * res = new llama_capsule_forms(tables);
    for (int i = 0; i < n_forms; ++i) {
        sizes[i] = res->get(0, res->find(forms[3*i], forms[3*i + 1], forms[3*i + 2])).size;
    }
    return res;
}

void free_forms(llama_capsule_forms * forms) {
    delete forms;
}

// -> how many bytes; data may be NULL
int64_t pack_forms(const llama_capsule_forms * forms, uint8_t * data) {
    const auto res = forms->pack(0);
    if (data) {
        memcpy(data, res.data(), res.size());
    }
    return res.size();
}

int rope_floats(int d, int n_rot, int halves) {
    return ggml_capsule_rope_size({ d, n_rot, halves })/sizeof(float);
}

int angle_floats(int d, int n_rot, int halves) {
    return ggml_capsule_angles_size({ d, n_rot, halves });
}

void make_rope(int d, int n_rot, int halves, const double * step_x, const double * step_y, float * rope) {
    ggml_capsule_rope_init((ggml_capsule_rope *) rope, { d, n_rot, halves }, step_x, step_y);
}

void make_angles(int d, int n_rot, int halves, const double * angle, float scale, float * angles) {
    ggml_capsule_angles_init(angles, { d, n_rot, halves }, angle, scale);
}

}
