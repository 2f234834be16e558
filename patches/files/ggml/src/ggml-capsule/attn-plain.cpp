#include "attn.h"

#include "half.h"
#include "tile.h"

#include <algorithm>
#include <cmath>

//
// attention in f32
//

size_t ggml_capsule_attn_work_plain(const ggml_capsule_attn_args * args) {
    const size_t d = std::max(args->k.d, args->v.d);
    return ((3*GGML_CAPSULE_MAX_ROWS + 2)*d + ggml_capsule_rows_work((int) d) + GGML_CAPSULE_MAX_ROWS)*sizeof(float);
}

// turns the keys of a tile, x: [h*w][d]
static void turn_keys(const ggml_capsule_attn_args * args, int slot, int h, int w, float * x) {
    const auto & rope = *args->ropes[args->slots[slot].rope];
    const int d = args->k.d;
    const int n = (int) ggml_capsule_angles_size(args->k)/2;
    for (int t = 0; t < h*w; ++t) {
        for (int i = 0; i < args->k.n_rot/2; ++i) {
            const int    g  = i/GGML_CAPSULE_LANES;
            const int    ca = ggml_capsule_channel(args->k, g, 0, i % GGML_CAPSULE_LANES);
            const int    cb = ggml_capsule_channel(args->k, g, 1, i % GGML_CAPSULE_LANES);
            const double in = rope.steps[i]*(t % w) + rope.steps[rope.n + i]*(t/w);
            const double c0 = args->angles[(size_t) 2*n*slot + i];
            const double s0 = args->angles[(size_t) 2*n*slot + n + i];
            const double c  = c0*std::cos(in) - s0*std::sin(in);
            const double s  = s0*std::cos(in) + c0*std::sin(in);
            const float  a  = x[t*d + ca];
            const float  b  = x[t*d + cb];
            x[t*d + ca] = (float) (a*c - b*s);
            x[t*d + cb] = (float) (a*s + b*c);
        }
    }
}

void ggml_capsule_attn_tiles_plain(const ggml_capsule_attn_args * args, int head, int first, int last, const ggml_capsule_attn_sums * sums, void * work) {
    const int d_k = args->k.d;
    const int d_v = args->v.d;
    const int d   = std::max(d_k, d_v);

    float * keys   = (float *) work;
    float * values = keys   + GGML_CAPSULE_MAX_ROWS*d;
    float * rows   = values + GGML_CAPSULE_MAX_ROWS*d;
    float * more   = rows   + GGML_CAPSULE_MAX_ROWS*d;
    float * score  = more   + ggml_capsule_rows_work(d);

    const ggml_capsule_coder k = { args->k, args->k_mean ? args->k_mean + (size_t) head*d_k : nullptr, nullptr,
                                   args->k_transform.of_head(ggml_capsule_n_groups(args->k), head) };
    const ggml_capsule_coder v = { args->v, args->v_mean ? args->v_mean + (size_t) head*d_v : nullptr,
                                   args->v_axes ? args->v_axes + (size_t) head*d_v*d_v : nullptr, args->v_transform };

    for (int is = first; is < last; ++is) {
        const auto & slot = args->slots[is];
        const auto & form = args->forms[slot.form];
        const uint8_t * bytes = args->pool + (size_t) slot.offset*args->unit;
        const int n = form.h*form.w;

        ggml_capsule_read(k, ggml_capsule_form_k(form, head), bytes + form.k_offset[head], keys,   d_k, rows, more);
        ggml_capsule_read(v, ggml_capsule_form_v(form, head), bytes + form.v_offset[head], values, d_v, rows, more);
        if (args->ropes) {
            turn_keys(args, is, form.h, form.w, keys);
        }

        for (int j = 0; j < args->n_tokens*args->n_gqa; ++j) {
            const int token = j/args->n_gqa;
            const int seen  = args->seen ? args->seen[token*args->n_seen + is] : 1;
            if (seen == 0) {
                continue;
            }
            const float * q = args->q + token*args->q_token + (head*args->n_gqa + j % args->n_gqa)*args->q_head;
            float max = sums->max[j];
            for (int t = 0; t < n; ++t) {
                float sum = 0.0f;
                for (int c = 0; c < d_k; ++c) {
                    sum += q[c]*keys[t*d_k + c];
                }
                score[t] = sum + (seen == 2 ? ggml_capsule_from_half(args->mask[token*args->n_mask + slot.token + t]) : 0.0f);
                max = score[t] > max || score[t] != score[t] ? score[t] : max;
            }
            if (max == -INFINITY) {
                continue;
            }
            float * out = sums->out + (size_t) j*d_v;
            const float f = std::exp(sums->max[j] - max);
            for (int c = 0; c < d_v; ++c) {
                out[c] *= f;
            }
            sums->sum[j] *= f;
            sums->max[j]  = max;
            for (int t = 0; t < n; ++t) {
                const float p = std::exp(score[t] - max);
                sums->sum[j] += p;
                for (int c = 0; c < d_v; ++c) {
                    out[c] += p*values[t*d_v + c];
                }
            }
        }
    }
}
