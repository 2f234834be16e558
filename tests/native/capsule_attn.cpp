// attention over tiles (ggml-capsule/attn.h) for ctypes: encodes K and V, then reads them with the kernel or in plain C++
#include "attn-kernel.h"
#include "tile.h"

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <vector>

#if defined(__AVX512BW__) && defined(__AVX512VNNI__) && !defined(GGML_CAPSULE_NO_512)
typedef capsule_kernel<capsule_v32> kernel;
#else
typedef capsule_kernel<capsule_v16> kernel;
#endif

struct problem {
    int32_t d_k, n_rot, halves, d_v;
    int32_t n_head_kv, n_gqa, n_tokens, n_slots;
    const int32_t * shapes;  // [n_slots][2]
    const uint8_t * k_table; // [n_head_kv][33][groups]
    const uint8_t * v_table;
    const float   * k_mean;  // [n_head_kv][d_k]
    const float   * v_mean;
    const float   * v_axes;  // [n_head_kv][d_v][d_v] or NULL
    const float   * k;       // [n_slots][n_head_kv][64][d_k], the first h*w tokens
    const float   * v;
    const double  * steps;   // [2][n_rot/2], x and y
    const double  * angles;  // [n_slots][n_rot/2]
    const float   * q;       // [n_tokens][n_head_kv*n_gqa][d_k]
    const uint8_t * seen;    // [n_tokens][n_slots] or NULL
    const uint16_t * mask;   // f16 [n_tokens][64*n_slots]
};

// max, sum: [n_head_kv][rows], out: [n_head_kv][rows][d_v], all filled in before; scores: [n_head_kv][n_slots][rows][64] by token, at most 8 rows, or NULL
// k_read, v_read: [n_slots][n_head_kv][64][d], what is stored
extern "C" void attn(const problem * p, int plain, float * max, float * sum, float * out, float * scores, float * k_read, float * v_read) {
    const ggml_capsule_channels k = { p->d_k, p->n_rot, p->halves };
    const ggml_capsule_channels v = { p->d_v, 0, 0 };
    const int g_k = ggml_capsule_n_groups(k);
    const int g_v = ggml_capsule_n_groups(v);
    const int n_rows = p->n_tokens*p->n_gqa;

    std::vector<ggml_capsule_form> forms(p->n_slots);
    std::vector<std::vector<uint8_t>> plans(2*p->n_slots);
    std::vector<std::vector<uint32_t>> offsets(2*p->n_slots);
    std::vector<ggml_capsule_slot> slots(p->n_slots);

    size_t size = 0;
    for (int i = 0; i < p->n_slots; ++i) {
        auto & form = forms[i];
        form.h = p->shapes[2*i];
        form.w = p->shapes[2*i + 1];
        form.k_stride = (ggml_capsule_plan_size(g_k) + 7)/8*8;
        form.v_stride = (ggml_capsule_plan_size(g_v) + 7)/8*8;
        plans[2*i].resize(p->n_head_kv*form.k_stride);
        plans[2*i + 1].resize(p->n_head_kv*form.v_stride);
        for (int h = 0; h < p->n_head_kv; ++h) {
            ggml_capsule_plan_init((ggml_capsule_plan *) (plans[2*i].data()     + h*form.k_stride), k, p->k_table + h*33*g_k, form.h, form.w);
            ggml_capsule_plan_init((ggml_capsule_plan *) (plans[2*i + 1].data() + h*form.v_stride), v, p->v_table + h*33*g_v, form.h, form.w);
        }
        form.k_plan = plans[2*i].data();
        form.v_plan = plans[2*i + 1].data();
        offsets[2*i].resize(p->n_head_kv);
        offsets[2*i + 1].resize(p->n_head_kv);
        form.size = ggml_capsule_form_offsets(form, p->n_head_kv, offsets[2*i].data(), offsets[2*i + 1].data());
        form.k_offset = offsets[2*i].data();
        form.v_offset = offsets[2*i + 1].data();
        slots[i] = { (int32_t) (size/8), i, 0, 64*i };
        size += (form.size + 7)/8*8;
    }

    std::vector<uint64_t> pool((size + GGML_CAPSULE_PAD)/8);
    std::vector<ggml_capsule_coder> k_coders(p->n_head_kv), v_coders(p->n_head_kv);
    for (int h = 0; h < p->n_head_kv; ++h) {
        k_coders[h] = { k, p->k_mean + h*p->d_k, nullptr };
        v_coders[h] = { v, p->v_mean + h*p->d_v, p->v_axes ? p->v_axes + (size_t) h*p->d_v*p->d_v : nullptr };
    }
    const int d = std::max(p->d_k, p->d_v);
    std::vector<float> rows(64*d), work(ggml_capsule_rows_work(d));
    for (int i = 0; i < p->n_slots; ++i) {
        const auto & form = forms[i];
        uint8_t * slot = (uint8_t *) pool.data() + (size_t) slots[i].offset*8;
        for (int h = 0; h < p->n_head_kv; ++h) {
            const size_t at = ((size_t) i*p->n_head_kv + h)*64;
            ggml_capsule_rows(k_coders[h], nullptr, form.h, form.w, p->k + at*p->d_k, p->d_k, rows.data(), work.data());
            ggml_capsule_store(k, ggml_capsule_form_k(form, h), rows.data(), slot + form.k_offset[h]);
            ggml_capsule_rows(v_coders[h], nullptr, form.h, form.w, p->v + at*p->d_v, p->d_v, rows.data(), work.data());
            ggml_capsule_store(v, ggml_capsule_form_v(form, h), rows.data(), slot + form.v_offset[h]);
            ggml_capsule_read(k_coders[h], ggml_capsule_form_k(form, h), slot + form.k_offset[h], k_read + at*p->d_k, p->d_k, rows.data(), work.data());
            ggml_capsule_read(v_coders[h], ggml_capsule_form_v(form, h), slot + form.v_offset[h], v_read + at*p->d_v, p->d_v, rows.data(), work.data());
        }
        ggml_capsule_slot_seal(form, p->n_head_kv, k_coders.data(), slot);
    }

    std::vector<double> memory_of_rope(ggml_capsule_rope_size(k)/sizeof(double));
    auto * rope = (ggml_capsule_rope *) memory_of_rope.data();
    const ggml_capsule_rope * ropes[] = { rope };
    ggml_capsule_rope_init(rope, k, p->steps, p->steps + p->n_rot/2);
    std::vector<float> angles(p->n_slots*ggml_capsule_angles_size(k));
    for (int i = 0; i < p->n_slots; ++i) {
        ggml_capsule_angles_init(angles.data() + i*ggml_capsule_angles_size(k), k, p->angles + i*p->n_rot/2, 1.0f);
    }

    ggml_capsule_attn_args args = {};
    args.k         = k;
    args.v         = v;
    args.n_head_kv = p->n_head_kv;
    args.k_mean    = p->k_mean;
    args.v_mean    = p->v_mean;
    args.v_axes    = p->v_axes;
    args.pool      = (const uint8_t *) pool.data();
    args.unit      = 8;
    args.forms     = forms.data();
    args.slots     = slots.data();
    args.ropes     = p->n_rot > 0 ? ropes : nullptr;
    args.angles    = p->n_rot > 0 ? angles.data() : nullptr;
    args.n_tokens  = p->n_tokens;
    args.n_gqa     = p->n_gqa;
    args.q         = p->q;
    args.q_token   = (size_t) p->n_head_kv*p->n_gqa*p->d_k;
    args.q_head    = p->d_k;
    args.seen      = p->seen;
    args.n_seen    = p->n_slots;
    args.mask      = p->mask;
    args.n_mask    = (size_t) 64*p->n_slots;

    const size_t most = std::max(ggml_capsule_attn_work(&args), ggml_capsule_attn_work_plain(&args));
    void * memory = aligned_alloc(64, (most + 63)/64*64);
    for (int h = 0; h < p->n_head_kv; ++h) {
        const ggml_capsule_attn_sums sums = { max + h*n_rows, sum + h*n_rows, out + (size_t) h*n_rows*p->d_v };
        // in two parts, as threads do it
        const int part = p->n_slots/3;
        if (plain) {
            ggml_capsule_attn_tiles_plain(&args, h, 0, part, &sums, memory);
            ggml_capsule_attn_tiles_plain(&args, h, part, p->n_slots, &sums, memory);
            continue;
        }
        ggml_capsule_attn_tiles(&args, h, 0, part, &sums, memory);
        ggml_capsule_attn_tiles(&args, h, part, p->n_slots, &sums, memory);
        if (!scores) {
            continue;
        }
        kernel one(args, h, memory);
        for (int i = 0; i < p->n_slots; ++i) {
            one.run_tile(i, -1);
            const float step = ggml_capsule_step_of(args.pool + (size_t) slots[i].offset*8 + forms[i].k_offset[h]);
            for (int j = 0; j < n_rows; ++j) {
                float * s = scores + (((size_t) h*p->n_slots + i)*n_rows + j)*64;
                for (int t = 0; t < forms[i].h*forms[i].w; ++t) {
                    const int x = t % forms[i].w;
                    const int y = t/forms[i].w;
                    s[t] = (float) one.score[j][n_rows > 1 ? y*8 + x : x*8 + y]*kernel::SCORE_UNIT*step*one.q_unit[j];
                }
            }
        }
    }
    free(memory);
}

#ifdef CAPSULE_ATTN_PROGRAM
// the same for an emulated machine: the arguments are read from the standard input, what is filled in goes to the standard output
#include <cstdio>

static std::vector<std::vector<uint64_t>> arrays; // of any type

static void * next_array() {
    int64_t size = 0;
    if (fread(&size, sizeof(size), 1, stdin) != 1) {
        exit(1);
    }
    arrays.emplace_back((size + 7)/8 + 1);
    if (fread(arrays.back().data(), 1, size, stdin) != (size_t) size) {
        exit(1);
    }
    arrays.back().back() = size;
    return size > 0 ? arrays.back().data() : nullptr;
}

int main() {
    problem p = {};
    memcpy(&p, next_array(), offsetof(problem, shapes));
    const void ** inputs = (const void **) &p.shapes;
    for (int i = 0; i < 13; ++i) {
        inputs[i] = next_array();
    }
    const bool plain = *(const int32_t *) next_array() != 0;
    float * out[6];
    for (auto & x : out) {
        x = (float *) next_array();
    }
    attn(&p, plain, out[0], out[1], out[2], out[3], out[4], out[5]);
    for (size_t i = arrays.size() - 6; i < arrays.size(); ++i) {
        fwrite(arrays[i].data(), 1, arrays[i].back(), stdout);
    }
}
#endif
