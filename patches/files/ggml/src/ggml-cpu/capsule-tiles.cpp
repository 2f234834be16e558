#include "capsule.h"

#include "ggml-capsule.h"
#include "ggml-capsule/attn.h"
#include "ggml-capsule/general.h"
#include "ggml-capsule/op.h"
#include "ggml-capsule/read.h"

#include "ggml-cpu-impl.h"
#include "ggml-cpu.h"
#include "ggml-impl.h"
#include "simd-gemm.h"
#include "vec.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

//
// GGML_OP_CAPSULE on tiles: hot cells, the parts and their combination. Slots are read by ggml-capsule/
//

static constexpr int HOT_CELLS  = 8;   // of all heads at a time: the heads of a cell lie side by side, its neighbours far away
static constexpr int HOT_COLS   = 64;  // scores at a time
static constexpr int HOT_COLS_T = 512; // ... with V transposed: its rows are long

namespace {

// what a node reads, for one thread
struct tile_node {
    ggml_capsule_tile_params p;

    ggml_capsule_channels ch_k;
    ggml_capsule_channels ch_v;

    const uint8_t * tables;
    const uint8_t * pool;

    int n_slots;

    const ggml_capsule_slot * slots;
    const int32_t           * patterns; // rows of angles

    const float * angles;
    size_t        ld_angles;

    std::vector<ggml_capsule_form> forms;
    std::vector<const ggml_capsule_rope *> ropes;

    explicit tile_node(const ggml_tensor * dst);

    const float * floats(int32_t offset) const { return offset == 0 ? nullptr : (const float *) (tables + offset); }

    const float * mean(int head, bool is_v) const;
    const float * axes(int head) const; // of V, NULL: none

    ggml_capsule_transform transform(bool is_v) const; // of the layer

private:
    const ggml_capsule_tile_tables & head() const { return *(const ggml_capsule_tile_tables *) tables; }
};

tile_node::tile_node(const ggml_tensor * dst) {
    memcpy(&p, dst->op_params, sizeof(p));

    const int halves = !(p.flags & GGML_CAPSULE_FLAG_NORM);

    ch_k = { p.d_k, p.n_rot, halves };
    ch_v = { p.d_v, 0, halves };

    const ggml_tensor * t = dst->src[CAPSULE_TILE_SRC_SLOTS];

    tables   = (const uint8_t *) dst->src[CAPSULE_TILE_SRC_TABLES]->data;
    pool     = (const uint8_t *) dst->src[CAPSULE_TILE_SRC_POOL]->data;
    n_slots  = t->ne[0];
    slots    = (const ggml_capsule_slot *) t->data;
    patterns = (const int32_t *) (slots + n_slots);

    const auto * list = (const ggml_capsule_tile_form *) (tables + head().forms);
    for (int i = 0; i < head().n_forms; ++i) {
        const auto & f = list[i];
        forms.push_back({ f.h, f.w, (size_t) f.size, tables + f.k_plan, tables + f.v_plan, (size_t) f.k_stride, (size_t) f.v_stride,
            (const uint32_t *) (tables + f.k_offset), (const uint32_t *) (tables + f.v_offset) });
    }

    angles    = nullptr;
    ld_angles = 0;
    if (const ggml_tensor * a = dst->src[CAPSULE_TILE_SRC_ANGLES]) {
        angles    = (const float *) a->data;
        ld_angles = ggml_capsule_angles_size(ch_k);

        const size_t size = ggml_capsule_rope_size(ch_k);
        for (size_t at = p.n_rows*ld_angles*sizeof(float); at + size <= ggml_nbytes(a); at += size) {
            ropes.push_back((const ggml_capsule_rope *) ((const char *) a->data + at));
        }
    }
}

const float * tile_node::mean(int i_head, bool is_v) const {
    const float * res = floats(is_v ? head().v_mean : head().k_mean);

    return res ? res + i_head*(is_v ? p.d_v : p.d_k) : nullptr;
}

const float * tile_node::axes(int i_head) const {
    const float * res = floats(head().v_axes);

    return res ? res + (size_t) i_head*p.d_v*p.d_v : nullptr;
}

ggml_capsule_transform tile_node::transform(bool is_v) const {
    const auto & h = head();

    ggml_capsule_transform res;

    res.matrix  = floats(is_v ? h.v_matrix  : h.k_matrix);
    res.columns = floats(is_v ? h.v_columns : h.k_columns);
    if (!is_v && h.k_order != 0) {
        res.order    = tables + h.k_order;
        res.near     = tables + h.k_near;
        res.n_kept   = h.n_kept;
        res.n_near   = h.n_near;
        res.n_mlp    = h.n_mlp;
        res.gates    = floats(h.k_gates);
        res.mlp_up   = floats(h.k_mlp_up);
        res.mlp_bias = floats(h.k_mlp_bias);
        res.mlp_down = floats(h.k_mlp_down);
    }
    return res;
}

// normalised, of runs of n values
void hadamard(float * x, int n, int d) {
    const float norm = 1.0f/sqrtf(n);

    for (int i = 0; i < d; i += n) {
        for (int h = 1; h < n; h *= 2) {
            for (int j = i; j < i + n; j += 2*h) {
                for (int k = j; k < j + h; ++k) {
                    const float a = x[k];
                    const float b = x[k + h];
                    x[k]     = a + b;
                    x[k + h] = a - b;
                }
            }
        }
    }
    ggml_vec_scale_f32(d, x, norm);
}

void to_float(ggml_type type, const void * src, float * dst, int64_t n) {
    switch (type) {
        case GGML_TYPE_F32:  memcpy(dst, src, n*sizeof(float));                         break;
        case GGML_TYPE_F16:  ggml_cpu_fp16_to_fp32((const ggml_fp16_t *) src, dst, n);  break;
        case GGML_TYPE_BF16: ggml_cpu_bf16_to_fp32((const ggml_bf16_t *) src, dst, n);  break;
        default:             ggml_get_type_traits(type)->to_float(src, dst, n);         break;
    }
}

void from_float(ggml_type type, const float * src, void * dst, int64_t n) {
    if (type == GGML_TYPE_F32) {
        memcpy(dst, src, n*sizeof(float));
    } else {
        ggml_get_type_traits_cpu(type)->from_float(src, dst, n);
    }
}

// what is not a number is the largest of all
float max_of(float a, float b) {
    return a >= b || a != a ? a : b;
}

//
// unpack
//

// the slots of one KV head after the other, in one thread
struct reader {
    const tile_node & node;

    const bool is_v;
    const int  d;

    const ggml_capsule_channels & ch;
    const ggml_capsule_transform  transform;

    std::vector<float> x; // [tokens][d], of the slot that was read last

    reader(const tile_node & node, bool is_v) :
        node(node), is_v(is_v), d(is_v ? node.p.d_v : node.p.d_k), ch(is_v ? node.ch_v : node.ch_k), transform(node.transform(is_v)) {
    }

    void read(int i_slot, int head);

    // turns keys by R(first position) R(distance)
    void turn(int i_slot);

private:
    static constexpr int L         = GGML_CAPSULE_LANES;
    static constexpr int GEMM_ROWS = 4;

    std::vector<float> group; // [tokens][2*L]
    std::vector<float> rows;  // [tokens][groups][2*L]
    std::vector<float> out;   // [tokens][ld]
    std::vector<float> turned; // [groups][2*L][ld]: what turns rows back from the axes of a head
    int                turned_head = -1;

    void put_group  (int g, const float * group, size_t ld, int n);
    void read_groups(const ggml_capsule_plan * plan, const uint8_t * bytes, int n);
    void read_whole (const ggml_capsule_plan * plan, const uint8_t * bytes, int head);
    void read_axes  (const ggml_capsule_plan * plan, const uint8_t * bytes, int n, int head);
};

void reader::read(int i_slot, int head) {
    const auto & s = node.slots[i_slot];
    const auto & f = node.forms[s.form];
    const int    n = f.h*f.w;

    const auto    * plan  = is_v ? ggml_capsule_form_v(f, head) : ggml_capsule_form_k(f, head);
    const uint8_t * bytes = node.pool + (size_t) s.offset*64 + (is_v ? f.v_offset : f.k_offset)[head];

    x.resize(n*d);
    if (is_v && node.axes(head)) {
        read_axes(plan, bytes, n, head);
    } else if (!transform.is_dct(f.h, f.w)) {
        read_whole(plan, bytes, head);
    } else {
        read_groups(plan, bytes, n);
    }

    if (const float * mean = node.mean(head, is_v)) {
        for (int j = 0; j < n; ++j) {
            ggml_vec_acc_f32(d, x.data() + j*d, mean);
        }
    }
}

// a group of n tokens -> x
void reader::put_group(int g, const float * group, size_t ld, int n) {
    const int n_lanes = ggml_capsule_n_lanes(ch, g);
    const int c       = ggml_capsule_channel(ch, g, 0, 0);
    const int step    = n_lanes > 1 ? ggml_capsule_channel(ch, g, 0, 1) - c : 1;

    for (int reg = 0; reg < 2; ++reg) {
        const int first = ggml_capsule_channel(ch, g, reg, 0);
        const int n_reg = first < 0 ? 0 : n_lanes - (ggml_capsule_channel(ch, g, reg, n_lanes - 1) < 0);

        for (int j = 0; j < n; ++j) {
            const float * from = group + j*ld + reg*L;
            float       * to   = x.data() + j*d + first;

            if (step == 1) {
                std::copy_n(from, n_reg, to);
            } else {
                for (int i = 0; i < n_reg; ++i) {
                    to[i*step] = from[i];
                }
            }
        }
    }
}

void reader::read_groups(const ggml_capsule_plan * plan, const uint8_t * bytes, int n) {
    group.resize(n*2*L);

    for (int g = 0; g < plan->n_groups; ++g) {
        capsule_read_group(plan, g, bytes, group.data(), 2*L);
        capsule_inverse_tile(group.data(),     2*L, plan->h, plan->w);
        capsule_inverse_tile(group.data() + L, 2*L, plan->h, plan->w);

        put_group(g, group.data(), 2*L, n);
    }
}

void reader::read_whole(const ggml_capsule_plan * plan, const uint8_t * bytes, int head) {
    const size_t ld = plan->n_groups*2*L;

    rows.resize(GGML_CAPSULE_MAX_ROWS*ld);
    out .resize(GGML_CAPSULE_MAX_ROWS*ld);

    const float * tokens = capsule_rebuild(transform.of_head(plan->n_groups, head), plan, bytes, rows.data(), out.data());
    for (int g = 0; g < plan->n_groups; ++g) {
        put_group(g, tokens + g*2*L, ld, GGML_CAPSULE_MAX_ROWS);
    }
}

void reader::read_axes(const ggml_capsule_plan * plan, const uint8_t * bytes, int n, int head) {
    const int ld_rows = plan->n_groups*2*L;
    const int ld      = GGML_PAD(d, L);

    if (turned_head != head) {
        turned_head = head;
        turned.assign(ld_rows*ld, 0.0f);

        const float * axes = node.axes(head);
        for (int i = 0; i < ld_rows; ++i) {
            const int g = i/(2*L);
            const int j = i%L < ggml_capsule_n_lanes(ch, g) ? ggml_capsule_channel(ch, g, i/L%2, i%L) : -1;
            for (int c = 0; c < d && j >= 0; ++c) {
                turned[i*ld + c] = axes[c*d + j];
            }
        }
    }

    const bool is_dct = transform.is_dct(plan->h, plan->w);

    const uint8_t * order = is_dct ? capsule_read_tables::get().order[plan->h][plan->w] : capsule_same_order();

    rows.resize(n*ld_rows);
    for (int g = 0; g < plan->n_groups; ++g) {
        capsule_read_group(plan, g, bytes, rows.data() + g*2*L, ld_rows, order);
    }

    // rows of high frequencies are often not stored
    bool stored[GGML_CAPSULE_MAX_ROWS];
    capsule_stored_rows(plan, stored);

    bool used[GGML_CAPSULE_MAX_ROWS];
    for (int i = 0; i < n; ++i) {
        used[order[i]] = stored[i];
    }

    out.assign(n*ld, 0.0f);
    for (int i = 0; i < n; i += GEMM_ROWS) {
        const int m = std::min(GEMM_ROWS, n - i);
        if (std::any_of(used + i, used + i + m, [](bool x) { return x; })) {
            simd_gemm(out.data() + i*ld, rows.data() + i*ld_rows, turned.data(), m, ld_rows, ld);
        }
    }

    if (is_dct) {
        for (int i = 0; i < ld; i += L) {
            capsule_inverse_tile(out.data() + i, ld, plan->h, plan->w);
        }
    } else {
        rows.resize(n*ld);
        capsule_rebuild_learned(transform.matrix, stored, out.data(), rows.data(), ld, ld);
    }
    const float * tokens = (is_dct ? out : rows).data();
    for (int j = 0; j < n; ++j) {
        std::copy_n(tokens + j*ld, d, x.data() + j*d);
    }
}

// pairs (a, b), `step` apart, turned by two angles; strides that the compiler knows
template<int step>
void turn_pairs(int n, float * a, float * b, const float * cos0, const float * sin0, const float * cos1, const float * sin1) {
    for (int i = 0; i < n; ++i) {
        const float c = cos0[i]*cos1[i] - sin0[i]*sin1[i];
        const float s = sin0[i]*cos1[i] + cos0[i]*sin1[i];
        const float u = a[i*step];
        const float v = b[i*step];

        a[i*step] = u*c - v*s;
        b[i*step] = u*s + v*c;
    }
}

void reader::turn(int i_slot) {
    const auto & f    = node.forms[node.slots[i_slot].form];
    const int    half = node.p.n_rot/2;
    const size_t ld   = node.ld_angles;

    const float * first = node.angles + i_slot*ld;
    const float * angle = node.angles + node.patterns[i_slot]*ld;

    for (int j = 0; j < f.h*f.w; ++j, angle += ld) {
        float * row = x.data() + j*d;
        if (ch.halves) {
            turn_pairs<1>(half, row, row + half, first, first + ld/2, angle, angle + ld/2);
        } else {
            turn_pairs<2>(half, row, row + 1, first, first + ld/2, angle, angle + ld/2);
        }
    }
}

void unpack(const ggml_compute_params * params, ggml_tensor * dst) {
    const tile_node node(dst);

    const auto & p = node.p;

    const bool is_v  = p.flags & GGML_CAPSULE_FLAG_V;
    const bool trans = is_v && (p.flags & GGML_CAPSULE_FLAG_V_TRANS);
    const int  d     = is_v ? p.d_v : p.d_k;

    // of a quantized cache, see llama_kv_cache::build_input_k_rot()
    const int n_rot_cache = is_v ? (p.flags & GGML_CAPSULE_FLAG_ROT_V ? 64 : 0) : (p.flags & GGML_CAPSULE_FLAG_ROT_K ? d & -d : 0);

    reader             r(node, is_v);
    std::vector<float> col;

    const int64_t n_items = (int64_t) node.n_slots*p.n_head_kv;
    for (int64_t item = n_items*params->ith/params->nth; item < n_items*(params->ith + 1)/params->nth; ++item) {
        const int    i    = item%node.n_slots;
        const int    head = item/node.n_slots;
        const auto & s    = node.slots[i];
        const int    n    = node.forms[s.form].h*node.forms[s.form].w;

        r.read(i, head);
        if (!is_v && p.n_rot > 0) {
            r.turn(i);
        }

        if (trans) {
            // a row for each channel
            col.resize(n);
            for (int c = 0; c < d; ++c) {
                for (int j = 0; j < n; ++j) {
                    col[j] = r.x[j*d + c];
                }
                from_float(dst->type, col.data(), (char *) dst->data + (head*d + c)*dst->nb[1] + s.token*dst->nb[0], n);
            }
            continue;
        }
        for (int j = 0; j < n; ++j) {
            float * row = r.x.data() + j*d;

            if (n_rot_cache > 0) {
                hadamard(row, n_rot_cache, d);
            }
            from_float(dst->type, row, (char *) dst->data + (s.token + j)*dst->nb[1] + ggml_row_size(dst->type, head*d), d);
        }
    }
}

//
// attention
//

// of a KV head in a part: rows j = token*n_gqa + i
struct part_sums {
    ggml_capsule_attn_sums sums;

    // s: n scores -> weights
    void add(int j, int d, float * s, const float * mask, int n) const;
};

void part_sums::add(int j, int d, float * s, const float * mask, int n) const {
    float max = -INFINITY;
    for (int i = 0; i < n; ++i) {
        s[i] = mask[i] == -INFINITY ? -INFINITY : s[i] + mask[i];
        max  = max_of(max, s[i]);
    }
    if (max == -INFINITY) {
        std::fill(s, s + n, 0.0f);
        return;
    }

    float & m = sums.max[j];
    if (!(max <= m)) {
        const float f = expf(m - max);

        sums.sum[j] *= f;
        ggml_vec_scale_f32(d, sums.out + j*d, f);
        m = max;
    }
    sums.sum[j] += ggml_vec_soft_max_f32(n, s, s, m);
}

// the next few cells of a head
void prefetch(const ggml_tensor * t, int head, int64_t col) {
#if defined(__GNUC__)
    const size_t size = ggml_row_size(t->type, t->ne[0]);
    for (int64_t c = col; c < std::min(col + HOT_CELLS, t->ne[2]); ++c) {
        const char * cell = (const char *) t->data + head*t->nb[1] + c*t->nb[2];
        for (size_t i = 0; i < size; i += 64) {
            __builtin_prefetch(cell + i);
        }
    }
#else
    GGML_UNUSED(t);
    GGML_UNUSED(head);
    GGML_UNUSED(col);
#endif
}

// one node of attention, in one thread
struct attn_call {
    const ggml_tensor * q;
    const ggml_tensor * k;
    const ggml_tensor * v;
    const ggml_tensor * mask;

    ggml_tensor * dst;

    const tile_node & node;

    int  n_head;
    int  n_gqa;
    bool trans;

    // the tokens at hand
    int t0;
    int n_tokens;
    int n_q;

    ggml_capsule_attn_args args;

    struct buffers {
        std::vector<float>   q;    // [n_head][n_tokens][d_k], times the scale, as slots want them
        std::vector<uint8_t> q_k;  // [heads][n_q], as cells want them
        std::vector<float>   s;    // [heads][n_q][columns]
        std::vector<float>   mask; // [n_tokens][columns]
        std::vector<float>   x;
        std::vector<uint8_t> w;    // weights of the type that V wants
        std::vector<uint8_t> tiles;
        std::vector<float>   work;
    } & b;

    attn_call(ggml_tensor * dst, const tile_node & node, buffers & b);

    void set_tokens(int t0, int t1);

    part_sums sums(int head, int part) const;

    // parts of the slots and of the hot cells; heads h0 .. h1 - 1
    void slots(int head, int part);
    void cells(int h0, int h1, int part);

private:
    bool read_mask(int64_t col, int n);

    void load_queries(int h0, int h1);
    void scores  (int h0, int h1, int64_t col, int n);
    void values  (int h0, int h1, int part, int64_t col, int n);
    void values_t(int h0, int h1, int part, int64_t col, int n);

    const float * query(int head, int j) const {
        return (const float *) ((const char *) q->data + (head*n_gqa + j%n_gqa)*q->nb[1] + (t0 + j/n_gqa)*q->nb[2]);
    }
};

attn_call::attn_call(ggml_tensor * dst, const tile_node & node, buffers & b) : dst(dst), node(node), b(b) {
    q    = dst->src[CAPSULE_TILE_SRC_Q];
    k    = dst->src[CAPSULE_TILE_SRC_K];
    v    = dst->src[CAPSULE_TILE_SRC_V];
    mask = dst->src[CAPSULE_TILE_SRC_MASK];

    n_head = q->ne[1];
    n_gqa  = n_head/node.p.n_head_kv;
    trans  = node.p.flags & GGML_CAPSULE_FLAG_V_TRANS;

    b.q.resize(n_head*CAPSULE_TILE_TOKENS*node.p.d_k);

    args = {};

    args.k         = node.ch_k;
    args.v         = node.ch_v;
    args.n_head_kv = node.p.n_head_kv;
    args.k_mean    = node.mean(0, false);
    args.v_mean    = node.mean(0, true);
    args.v_axes    = node.axes(0);

    args.k_transform = node.transform(false);
    args.v_transform = node.transform(true);

    args.pool      = node.pool;
    args.unit      = 64;
    args.forms     = node.forms.data();
    args.slots     = node.slots;
    args.ropes     = node.p.n_rot > 0 ? node.ropes.data() : nullptr;
    args.angles    = node.angles;
    args.n_gqa     = n_gqa;
    args.q         = b.q.data();
    args.q_token   = node.p.d_k;
    args.q_head    = CAPSULE_TILE_TOKENS*node.p.d_k;
    args.n_seen    = dst->src[CAPSULE_TILE_SRC_SEEN]->nb[1];
    args.n_mask    = dst->src[CAPSULE_TILE_SRC_COLD]->nb[1]/sizeof(uint16_t);

    set_tokens(0, 0);
}

void attn_call::set_tokens(int t0, int t1) {
    this->t0 = t0;

    n_tokens = t1 - t0;
    n_q      = n_gqa*n_tokens;

    args.n_tokens = n_tokens;
    args.seen     = (const uint8_t  *) dst->src[CAPSULE_TILE_SRC_SEEN]->data + t0*args.n_seen;
    args.mask     = (const uint16_t *) dst->src[CAPSULE_TILE_SRC_COLD]->data + t0*args.n_mask;
}

// rows of the tokens at hand, see combine()
part_sums attn_call::sums(int head, int part) const {
    const int d     = node.p.d_v;
    const int n_all = n_gqa*q->ne[2];

    float * out = (float *) ((char *) dst->data + part*dst->nb[2]) + (size_t) head*n_all*(d + 2);

    return { { out + n_all*d + t0*n_gqa, out + n_all*(d + 1) + t0*n_gqa, out + t0*n_gqa*d } };
}

void attn_call::slots(int head, int part) {
    const auto & p   = node.p;
    const auto   sum = sums(head, part).sums;

    std::fill_n(sum.max, n_q, -INFINITY);
    std::fill_n(sum.sum, n_q, 0.0f);
    std::fill_n(sum.out, n_q*p.d_v, 0.0f);

    for (int j = 0; j < n_q; ++j) {
        float * to = b.q.data() + (head*n_gqa + j%n_gqa)*args.q_head + j/n_gqa*args.q_token;

        const float * from = query(head, j);
        for (int i = 0; i < p.d_k; ++i) {
            to[i] = from[i]*p.scale;
        }
        // slots know nothing of the rotation of a quantized cache
        if (p.flags & GGML_CAPSULE_FLAG_ROT_K) {
            hadamard(to, p.d_k & -p.d_k, p.d_k);
        }
    }

    b.tiles.resize(ggml_capsule_attn_work(&args) + 64);
    void * work = (void *) GGML_PAD((uintptr_t) b.tiles.data(), 64);

    ggml_capsule_attn_tiles(&args, head, (int64_t) node.n_slots*part/p.n_parts, (int64_t) node.n_slots*(part + 1)/p.n_parts, &sum, work);

    if (p.flags & GGML_CAPSULE_FLAG_ROT_V) {
        for (int j = 0; j < n_q; ++j) {
            hadamard(sum.out + j*p.d_v, 64, p.d_v);
        }
    }
}

// what the tokens see of n columns; false: nothing
bool attn_call::read_mask(int64_t col, int n) {
    bool any = false;
    for (int i = 0; i < n_tokens; ++i) {
        float * to = b.mask.data() + i*n;

        to_float(mask->type, (const char *) mask->data + (t0 + i)*mask->nb[1] + col*mask->nb[0], to, n);
        any = any || std::any_of(to, to + n, [](float x) { return x != -INFINITY; });
    }
    return any;
}

void attn_call::load_queries(int h0, int h1) {
    const ggml_type type = ggml_get_type_traits_cpu(k->type)->vec_dot_type;
    const size_t    size = ggml_row_size(type, node.p.d_k);

    b.q_k.resize((h1 - h0)*n_q*size);
    for (int h = h0; h < h1; ++h) {
        for (int j = 0; j < n_q; ++j) {
            from_float(type, query(h, j), b.q_k.data() + ((h - h0)*n_q + j)*size, node.p.d_k);
        }
    }
}

void attn_call::scores(int h0, int h1, int64_t col, int n) {
    const auto * traits = ggml_get_type_traits_cpu(k->type);
    const size_t size   = ggml_row_size(traits->vec_dot_type, node.p.d_k);

    for (int c0 = 0; c0 < n; c0 += HOT_CELLS) {
        const int c1 = std::min(c0 + HOT_CELLS, n);

        for (int h = h0; h < h1; ++h) {
            prefetch(k, h, col + c1);

            for (int c = c0; c < c1; ++c) {
                const char * cell = (const char *) k->data + h*k->nb[1] + (col + c)*k->nb[2];

                for (int j = 0; j < n_q; ++j) {
                    const int row = (h - h0)*n_q + j;

                    float s;
                    traits->vec_dot(node.p.d_k, &s, 0, cell, 0, b.q_k.data() + row*size, 0, 1);
                    b.s[row*n + c] = s*node.p.scale;
                }
            }
        }
    }
}

void attn_call::values(int h0, int h1, int part, int64_t col, int n) {
    const int d = node.p.d_v;

    b.w.resize(n_q*HOT_CELLS*sizeof(float));
    float * w = (float *) b.w.data(); // [n_q][cells]

    for (int c0 = 0; c0 < n; c0 += HOT_CELLS) {
        const int n_cells = std::min(HOT_CELLS, n - c0);

        for (int h = h0; h < h1; ++h) {
            prefetch(v, h, col + c0 + n_cells);

            const float * s = b.s.data() + (h - h0)*n_q*n + c0;
            for (int j = 0; j < n_q; ++j) {
                std::copy_n(s + j*n, n_cells, w + j*n_cells);
            }
            for (int c = 0; c < n_cells; ++c) {
                float * x = b.x.data() + c*d;

                // a cell that nobody sees may hold anything
                bool any = false;
                for (int j = 0; j < n_q; ++j) {
                    any = any || w[j*n_cells + c] != 0.0f;
                }
                if (any) {
                    to_float(v->type, (const char *) v->data + h*v->nb[1] + (col + c0 + c)*v->nb[2], x, d);
                } else {
                    std::fill_n(x, d, 0.0f);
                }
            }
            simd_gemm(sums(h, part).sums.out, w, b.x.data(), n_q, n_cells, d);
        }
    }
}

// v: [n_kv, n_head_kv, d]
void attn_call::values_t(int h0, int h1, int part, int64_t col, int n) {
    const auto * traits = ggml_get_type_traits_cpu(v->type);
    const size_t size   = ggml_row_size(traits->vec_dot_type, n);
    const int    d      = node.p.d_v;

    b.w.resize(n_q*size);
    for (int h = h0; h < h1; ++h) {
        const auto sum = sums(h, part).sums;

        for (int j = 0; j < n_q; ++j) {
            from_float(traits->vec_dot_type, b.s.data() + ((h - h0)*n_q + j)*n, b.w.data() + j*size, n);
        }
        for (int i = 0; i < d; ++i) {
            const char * row = (const char *) v->data + h*v->nb[1] + i*v->nb[2] + col*v->nb[0];

            for (int j = 0; j < n_q; ++j) {
                float x;
                traits->vec_dot(n, &x, 0, row, 0, b.w.data() + j*size, 0, 1);
                sum.out[j*d + i] += x;
            }
        }
    }
}

void attn_call::cells(int h0, int h1, int part) {
    const auto & p = node.p;

    const int     ld      = trans ? HOT_COLS_T : HOT_COLS;
    const int64_t n_kv    = k->ne[2];
    const int64_t col_end = n_kv*(part + 1)/p.n_parts;

    b.s   .resize((h1 - h0)*n_q*ld);
    b.mask.resize(n_tokens*ld);
    b.x   .resize(HOT_CELLS*p.d_v);

    load_queries(h0, h1);

    for (int64_t col = n_kv*part/p.n_parts; col < col_end; col += ld) {
        const int n = std::min<int64_t>(ld, col_end - col);

        if (!read_mask(col, n)) {
            continue;
        }
        scores(h0, h1, col, n);

        for (int h = h0; h < h1; ++h) {
            const auto sum = sums(h, part);
            for (int j = 0; j < n_q; ++j) {
                sum.add(j, p.d_v, b.s.data() + ((h - h0)*n_q + j)*n, b.mask.data() + j/n_gqa*n, n);
            }
        }
        if (trans) {
            values_t(h0, h1, part, col, n);
        } else {
            values(h0, h1, part, col, n);
        }
    }
}

// an item is a part, a block of tokens and a KV head; a thread has neighbouring heads
void attend(const ggml_compute_params * params, ggml_tensor * dst) {
    static thread_local attn_call::buffers buffers;

    const tile_node node(dst);

    attn_call call(dst, node, buffers);

    const int n_head   = node.p.n_head_kv;
    const int n_tokens = call.q->ne[2];
    const int n_blocks = (n_tokens + CAPSULE_TILE_TOKENS - 1)/CAPSULE_TILE_TOKENS;

    const int64_t n_items = (int64_t) n_head*n_blocks*node.p.n_parts;
    const int64_t end     = n_items*(params->ith + 1)/params->nth;

    for (int64_t item = n_items*params->ith/params->nth; item < end;) {
        const int part  = item/n_head/n_blocks;
        const int block = item/n_head%n_blocks;
        const int h0    = item%n_head;
        const int h1    = std::min<int64_t>(n_head, h0 + end - item);

        call.set_tokens(block*CAPSULE_TILE_TOKENS, std::min(n_tokens, (block + 1)*CAPSULE_TILE_TOKENS));
        for (int h = h0; h < h1; ++h) {
            call.slots(h, part);
        }
        call.cells(h0, h1, part);

        item += h1 - h0;
    }
}

// parts -> the result
void combine(const ggml_compute_params * params, ggml_tensor * dst) {
    const ggml_tensor * src = dst->src[CAPSULE_TILE_SRC_Q];

    ggml_capsule_tile_params p;
    memcpy(&p, dst->op_params, sizeof(p));

    const int d        = p.d_v;
    const int n_head   = dst->ne[0]/d;
    const int n_tokens = dst->ne[1];
    const int n_gqa    = n_head/p.n_head_kv;
    const int n_q      = n_gqa*n_tokens;

    for (int row = params->ith; row < n_head*n_tokens; row += params->nth) {
        const int head = row%n_head;
        const int j    = row/n_head*n_gqa + head%n_gqa;

        // sums of a part, see attn_call::sums()
        const auto first = [&](uint32_t part) { return (const float *) ((const char *) src->data + part*src->nb[2]) + (size_t) (head/n_gqa)*n_q*(d + 2); };
        const auto max   = [&](uint32_t part) { return first(part)[n_q*d + j]; };
        const auto sum   = [&](uint32_t part) { return first(part)[n_q*(d + 1) + j]; };

        float m = -INFINITY;
        for (uint32_t part = 0; part < p.n_parts; ++part) {
            m = max_of(m, max(part));
        }

        float * out = (float *) dst->data + row*d;
        std::fill_n(out, d, 0.0f);

        // a token that sees nothing gets zeros
        float l = 0.0f;
        for (uint32_t part = 0; part < p.n_parts && m != -INFINITY; ++part) {
            const float f = expf(max(part) - m);

            l += f*sum(part);
            ggml_vec_mad_f32(d, out, first(part) + j*d, f);
        }
        if (l != 0.0f) {
            ggml_vec_scale_f32(d, out, 1.0f/l);
        }
    }
}

} // namespace

void ggml_compute_forward_capsule(const ggml_compute_params * params, ggml_tensor * dst) {
    ggml_capsule_tile_params p;
    memcpy(&p, dst->op_params, sizeof(p));

    switch (p.op) {
        case GGML_CAPSULE_OP_TILE_ATTN:    attend (params, dst); break;
        case GGML_CAPSULE_OP_TILE_COMBINE: combine(params, dst); break;
        case GGML_CAPSULE_OP_TILE_UNPACK:  unpack (params, dst); break;
        default:                           GGML_ABORT("fatal error");
    }
}
