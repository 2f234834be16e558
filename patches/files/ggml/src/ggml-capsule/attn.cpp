#include "attn.h"
#include "tile.h"

#include <algorithm>
#include <cmath>

//
// plain, on K and V as they are read
//

// work of one call, in floats
struct plain_work {
    float * q;    // [d_k], turned back by the first position of a slot
    float * s;    // [n_q][tokens], scores, then weights
    float * x;    // [tokens][d], K, then V
    float * rows; // of ggml_capsule_read()
    float * more;

    size_t size;

    plain_work(const ggml_capsule_attn_args & a, float * work) {
        const size_t d   = std::max(a.k.d, a.v.d);
        const size_t n_q = a.n_tokens*a.n_gqa;

        q    = work;
        s    = q    + d;
        x    = s    + GGML_CAPSULE_MAX_ROWS*n_q;
        rows = x    + GGML_CAPSULE_MAX_ROWS*d;
        more = rows + GGML_CAPSULE_MAX_ROWS*d;
        size = more + ggml_capsule_rows_work(d) - work;
    }
};

size_t ggml_capsule_attn_work(const ggml_capsule_attn_args * args) {
    return plain_work(*args, nullptr).size*sizeof(float);
}

// turns the pairs of a row
static void turn(const ggml_capsule_channels & k, float * x, int i, float c, float s) {
    float & a = x[k.halves ? i             : 2*i];
    float & b = x[k.halves ? i + k.n_rot/2 : 2*i + 1];

    const float y = a*c - b*s;
    b = a*s + b*c;
    a = y;
}

static void turn_keys(const ggml_capsule_channels & k, const ggml_capsule_rope * rope, int h, int w, float * x) {
    const float * step_x = (const float *) rope;
    const float * step_y = step_x + ggml_capsule_rope_size(k)/sizeof(float)/2;

    for (int t = 0; t < h*w; ++t) {
        for (int i = 0; i < k.n_rot/2; ++i) {
            const float angle = t%w*step_x[i] + t/w*step_y[i];

            turn(k, x + t*k.d, i, cosf(angle), sinf(angle));
        }
    }
}

// n scores -> weights
static void add_scores(const ggml_capsule_attn_sums & sums, int j, int d, float * s, int n) {
    float max = -INFINITY;
    for (int t = 0; t < n; ++t) {
        max = max >= s[t] || max != max ? max : s[t]; // what is not a number is the largest of all
    }
    if (max == -INFINITY) {
        std::fill(s, s + n, 0.0f);
        return;
    }

    if (!(max <= sums.max[j])) {
        const float f = expf(sums.max[j] - max);

        sums.max[j]  = max;
        sums.sum[j] *= f;
        for (int i = 0; i < d; ++i) {
            sums.out[j*d + i] *= f;
        }
    }
    for (int t = 0; t < n; ++t) {
        s[t] = expf(s[t] - sums.max[j]);
        sums.sum[j] += s[t];
    }
}

void ggml_capsule_attn_tiles(const ggml_capsule_attn_args * args, int head, int first, int last, const ggml_capsule_attn_sums * sums, void * work) {
    const auto & a = *args;

    const plain_work w(a, (float *) work);

    const int n_q = a.n_tokens*a.n_gqa;
    const int d_k = a.k.d;
    const int d_v = a.v.d;

    const ggml_capsule_coder k = { a.k, a.k_mean ? a.k_mean + head*d_k : nullptr, nullptr };
    const ggml_capsule_coder v = { a.v, a.v_mean ? a.v_mean + head*d_v : nullptr, a.v_axes ? a.v_axes + (size_t) head*d_v*d_v : nullptr };

    for (int i_slot = first; i_slot < last; ++i_slot) {
        const auto & slot  = a.slots[i_slot];
        const auto & form  = a.forms[slot.form];
        const int    n     = form.h*form.w;
        const auto * bytes = a.pool + (size_t) slot.offset*a.unit;

        const auto seen = [&](int token) { return a.seen ? a.seen[token*a.n_seen + i_slot] : 1; };

        bool any = false;
        for (int token = 0; token < a.n_tokens; ++token) {
            any = any || seen(token) != 0;
        }
        if (!any) {
            continue;
        }

        ggml_capsule_read(k, ggml_capsule_form_k(form, head), bytes + form.k_offset[head], w.x, d_k, w.rows, w.more);
        if (a.ropes) {
            turn_keys(a.k, a.ropes[slot.rope], form.h, form.w, w.x);
        }

        for (int j = 0; j < n_q; ++j) {
            const int token = j/a.n_gqa;

            float * s = w.s + j*n;
            if (seen(token) == 0) {
                std::fill(s, s + n, -INFINITY);
                continue;
            }

            const float * q = a.q + token*a.q_token + (head*a.n_gqa + j%a.n_gqa)*a.q_head;

            std::copy(q, q + d_k, w.q);
            if (a.ropes) {
                const size_t  half  = ggml_capsule_angles_size(a.k)/2;
                const float * angle = a.angles + 2*half*i_slot;

                for (int i = 0; i < a.k.n_rot/2; ++i) {
                    turn(a.k, w.q, i, angle[i], -angle[half + i]);
                }
            }

            const uint16_t * mask = a.mask + token*a.n_mask + slot.token;
            for (int t = 0; t < n; ++t) {
                float x = 0.0f;
                for (int i = 0; i < d_k; ++i) {
                    x += w.q[i]*w.x[t*d_k + i];
                }
                s[t] = seen(token) == 2 && mask[t] != 0 ? -INFINITY : x;
            }
        }
        for (int j = 0; j < n_q; ++j) {
            add_scores(*sums, j, d_v, w.s + j*n, n);
        }

        ggml_capsule_read(v, ggml_capsule_form_v(form, head), bytes + form.v_offset[head], w.x, d_v, w.rows, w.more);
        for (int j = 0; j < n_q; ++j) {
            for (int t = 0; t < n; ++t) {
                for (int i = 0; i < d_v; ++i) {
                    sums->out[j*d_v + i] += w.s[j*n + t]*w.x[t*d_v + i];
                }
            }
        }
    }
}
