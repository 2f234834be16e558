#pragma once

#include "attn.h"
#include "read.h"
#include "transform.h"

#include <algorithm>
#include <cmath>

//
// Whole tiles with another transform than the DCT: one general routine in f32, for code that is built for an instruction set (ggml-cpu).
// K is rebuilt token by token. V is not: the weights of the tokens become weights of its rows.
//

// rows stay where they are
inline const uint8_t * capsule_same_order() {
    static const struct table {
        uint8_t x[GGML_CAPSULE_MAX_ROWS];

        table() {
            for (int i = 0; i < GGML_CAPSULE_MAX_ROWS; ++i) {
                x[i] = (uint8_t) i;
            }
        }
    } same;

    return same.x;
}

// y[token] = sum over rows of matrix[row][token] x[row], of n_lanes each (a multiple of 16); what is not stored is left out
inline void capsule_rebuild_learned(const float * matrix, const bool * stored, const float * x, float * y, size_t ld, size_t n_lanes) {
    constexpr int L     = GGML_CAPSULE_LANES;
    constexpr int N     = GGML_CAPSULE_MAX_ROWS;
    constexpr int BLOCK = 4;

    for (int t = 0; t < N; t += BLOCK) {
        for (size_t c = 0; c < n_lanes; c += L) {
            capsule_vec sums[BLOCK] = {};
            for (int r = 0; r < N; ++r) {
                if (stored[r]) {
                    const capsule_vec row = *(const capsule_vec *) (x + r*ld + c);
                    for (int i = 0; i < BLOCK; ++i) {
                        sums[i] = sums[i] + row*matrix[r*N + t + i];
                    }
                }
            }
            for (int i = 0; i < BLOCK; ++i) {
                *(capsule_vec *) (y + (t + i)*ld + c) = sums[i];
            }
        }
    }
}

// which rows have blocks of their own in some group
inline void capsule_stored_rows(const ggml_capsule_plan * plan, bool * stored) {
    std::fill_n(stored, GGML_CAPSULE_MAX_ROWS, false);
    for (int g = 0; g < plan->n_groups; ++g) {
        ggml_capsule_plan_blocks(plan, g, [&](int row, int n_rows, int, int) {
            std::fill_n(stored + row, n_rows, true);
        });
    }
}

// the bytes of a head -> tokens without the mean, in groups: [64][ld], in x or in y; both have room for them
inline float * capsule_rebuild(const ggml_capsule_transform & t, const ggml_capsule_plan * plan, const uint8_t * bytes, float * x, float * y) {
    constexpr int L = GGML_CAPSULE_LANES;

    const size_t ld = (size_t) 2*L*plan->n_groups;

    for (int g = 0; g < plan->n_groups; ++g) {
        capsule_read_group(plan, g, bytes, x + 2*L*g, ld, t.order ? t.order : t.matrix ? capsule_same_order() : nullptr);
    }
    if (t.order) {
        ggml_capsule_predict(t, plan->n_groups, x);
        return x;
    }
    if (t.matrix) {
        bool stored[GGML_CAPSULE_MAX_ROWS];
        capsule_stored_rows(plan, stored);
        capsule_rebuild_learned(t.matrix, stored, x, y, ld, ld);
        return y;
    }
    for (size_t c = 0; c < ld; c += L) {
        capsule_inverse_tile(x + c, ld, GGML_CAPSULE_SIDE, GGML_CAPSULE_SIDE);
    }
    return x;
}

// attention of the queries of one KV head, see ggml_capsule_attn_tiles()
struct capsule_general {
    static constexpr int L    = GGML_CAPSULE_LANES;
    static constexpr int SIDE = GGML_CAPSULE_SIDE;
    static constexpr int N    = GGML_CAPSULE_MAX_ROWS;

    const ggml_capsule_attn_args & args;

    int head = 0;

    int n_rows; // queries
    int n_k;    // groups
    int n_v;
    int ld_k;   // lanes of both registers
    int ld_v;

    ggml_capsule_transform k;
    ggml_capsule_transform v;

    // work memory
    float * tile;    // [64][ld]
    float * more;    // [64][ld]
    float * mean;    // [ld_k]
    float * q;       // [n_rows][ld_k]
    float * weights; // [n_rows][64], of the tokens, then of the rows
    float * out;     // [n_rows][ld_v]
    float * max;     // [n_rows]
    float * sum;     // [n_rows]
    float * turned;  // [2*d_v]
    float * line;    // [2][16*n_k]: the angles of the middle of a line
    float * columns; // [token][row]: of V where its transform is the DCT
    int   * visible; // [n_rows]

    static bool takes(const ggml_capsule_attn_args & args, const ggml_capsule_slot & slot) {
        const auto & form = args.forms[slot.form];
        return !args.k_transform.is_dct(form.h, form.w) || !args.v_transform.is_dct(form.h, form.w);
    }

    size_t place(char * work) {
        size_t size = 0;
        auto take = [&](auto & pointer, size_t n) {
            pointer = (std::remove_reference_t<decltype(pointer)>) (work + size);
            size += (n*sizeof(*pointer) + 63)/64*64;
        };
        n_rows = args.n_tokens*args.n_gqa;
        n_k    = ggml_capsule_n_groups(args.k);
        n_v    = ggml_capsule_n_groups(args.v);
        ld_k   = 2*L*n_k;
        ld_v   = 2*L*n_v;

        take(tile,    (size_t) N*std::max(ld_k, ld_v));
        take(more,    (size_t) N*std::max(ld_k, ld_v));
        take(mean,    ld_k);
        take(q,       (size_t) n_rows*ld_k);
        take(weights, (size_t) n_rows*N);
        take(out,     (size_t) n_rows*ld_v);
        take(max,     n_rows);
        take(sum,     n_rows);
        take(turned,  2*args.v.d);
        take(line,    2*L*n_k);
        take(columns, N*N);
        take(visible, n_rows);
        return size;
    }

    explicit capsule_general(const ggml_capsule_attn_args & args) : args(args) {}

    static size_t work_size(const ggml_capsule_attn_args & args) {
        return capsule_general(args).place(nullptr);
    }

    capsule_general(const ggml_capsule_attn_args & args, int head, void * work) : args(args), head(head) {
        place((char *) work);

        k = args.k_transform.of_head(n_k, head);
        v = args.v_transform.of_head(n_v, head);

        if (!v.matrix) {
            const auto & t = capsule_read_tables::get();
            for (int r = 0; r < N; ++r) {
                const int at = t.order[SIDE][SIDE][r];
                for (int i = 0; i < N; ++i) {
                    columns[i*N + r] = t.cosines[SIDE][at/SIDE][i/SIDE]*t.cosines[SIDE][at % SIDE][i % SIDE];
                }
            }
        }

        if (args.k_mean) {
            to_groups(args.k_mean + (size_t) head*args.k.d, mean);
        } else {
            std::fill_n(mean, ld_k, 0.0f);
        }
        for (int j = 0; j < n_rows; ++j) {
            to_groups(args.q + j/args.n_gqa*args.q_token + (head*args.n_gqa + j % args.n_gqa)*args.q_head, q + (size_t) j*ld_k);
        }
        std::fill_n(out, (size_t) n_rows*ld_v, 0.0f);
        std::fill_n(max, n_rows, -INFINITY);
        std::fill_n(sum, n_rows, 0.0f);
    }

    // channels of K -> lanes, zero where there is none
    void to_groups(const float * from, float * to) const {
        std::fill_n(to, ld_k, 0.0f);
        for (int g = 0; g < n_k; ++g) {
            for (int i = 0; i < 2*L; ++i) {
                const int c = i % L < ggml_capsule_n_lanes(args.k, g) ? ggml_capsule_channel(args.k, g, i/L, i % L) : -1;
                to[2*L*g + i] = c >= 0 ? from[c] : 0.0f;
            }
        }
    }

    static float add_up(const capsule_vec & x) {
        float lanes[L];
        std::memcpy(lanes, &x, sizeof(lanes));
        for (int n = L/2; n > 0; n /= 2) {
            for (int i = 0; i < n; ++i) {
                lanes[i] += lanes[i + n];
            }
        }
        return lanes[0];
    }

    // the scores of the tokens of a tile, into the weights of n queries
    void scores(int is, const float * x, int n) {
        float key[2*L*GGML_CAPSULE_MAX_GROUPS];

        const int n_lanes = L*n_k;
        const ggml_capsule_rope * rope = args.ropes ? args.ropes[args.slots[is].rope] : nullptr;

        for (int t = 0; t < N; ++t) {
            if (rope && t % SIDE == 0) {
                const float * first = args.angles + (size_t) is*2*n_lanes;
                const float * c     = rope->exact(rope->y_cos(t/SIDE));
                const float * s     = rope->exact(rope->y_sin(t/SIDE));
                for (int i = 0; i < n_lanes; ++i) {
                    line[i]           = first[i]*c[i] - first[n_lanes + i]*s[i];
                    line[n_lanes + i] = first[i]*s[i] + first[n_lanes + i]*c[i];
                }
            }
            // the line has its angles in the middle, half a token from the nearest
            const int     from  = t % SIDE - SIDE/2;
            const int     step  = from < 0 ? -1 - from : from;
            const float   side  = from < 0 ? -1.0f : 1.0f;
            const float * turn  = rope ? rope->exact(rope->x_cos(step)) : nullptr;
            const float * sines = rope ? rope->exact(rope->x_sin(step)) : nullptr;
            const float * token = x + (size_t) t*ld_k;
            for (int g = 0; g < n_k; ++g) {
                const auto at = [&](const float * p) { return *(const capsule_vec *) (p + L*g); };

                const capsule_vec a = *(const capsule_vec *) (token + 2*L*g)     + *(const capsule_vec *) (mean + 2*L*g);
                const capsule_vec b = *(const capsule_vec *) (token + 2*L*g + L) + *(const capsule_vec *) (mean + 2*L*g + L);

                capsule_vec u = a;
                capsule_vec w = b;
                if (rope) {
                    const capsule_vec sine = at(sines)*side;
                    const capsule_vec c = at(line)*at(turn) - at(line + n_lanes)*sine;
                    const capsule_vec s = at(line)*sine     + at(line + n_lanes)*at(turn);
                    u = a*c - b*s;
                    w = a*s + b*c;
                }
                *(capsule_vec *) (key + 2*L*g)     = u;
                *(capsule_vec *) (key + 2*L*g + L) = w;
            }
            for (int i = 0; i < n; ++i) {
                const float * query = q + (size_t) visible[i]*ld_k;
                capsule_vec s0 = *(const capsule_vec *) key     * *(const capsule_vec *) query;
                capsule_vec s1 = *(const capsule_vec *) (key + L)* *(const capsule_vec *) (query + L);
                for (int c = 2*L; c < ld_k; c += 2*L) {
                    s0 = s0 + *(const capsule_vec *) (key + c)    * *(const capsule_vec *) (query + c);
                    s1 = s1 + *(const capsule_vec *) (key + c + L)* *(const capsule_vec *) (query + c + L);
                }
                weights[i*N + t] = add_up(s0 + s1);
            }
        }
    }

    // the scores of query i of a slot -> weights of its rows; false: it sees nothing
    bool softmax(int is, int i, int seen) {
        const int j = visible[i];
        float * w = weights + i*N;

        float most = max[j];
        if (seen == 2) {
            const uint16_t * mask = args.mask + j/args.n_gqa*args.n_mask + args.slots[is].token;
            for (int t = 0; t < N; ++t) {
                w[t] += ggml_capsule_from_half(mask[t]);
            }
        }
        for (int t = 0; t < N; ++t) {
            most = w[t] > most || w[t] != w[t] ? w[t] : most;
        }
        if (most == -INFINITY) {
            return false;
        }
        if (most != max[j]) {
            const float f = std::exp(max[j] - most);
            for (int c = 0; c < ld_v; ++c) {
                out[(size_t) j*ld_v + c] *= f;
            }
            sum[j] *= f;
            max[j]  = most;
        }

        const float * from = v.matrix ? v.columns : columns;

        capsule_vec rows[N/L] = {};
        for (int t = 0; t < N; ++t) {
            const float p = std::exp(w[t] - most);
            sum[j] += p;
            for (int r = 0; r < N/L; ++r) {
                rows[r] = rows[r] + *(const capsule_vec *) (from + t*N + L*r)*p;
            }
        }
        std::memcpy(w, rows, sizeof(rows));

        return true;
    }

    void run_tile(int is) {
        const auto & slot = args.slots[is];
        const auto & form = args.forms[slot.form];
        const uint8_t * bytes = args.pool + (size_t) slot.offset*args.unit;

        const auto seen_by = [&](int j) { return args.seen ? args.seen[j/args.n_gqa*args.n_seen + is] : 1; };

        int n = 0;
        for (int j = 0; j < n_rows; ++j) {
            if (seen_by(j) != 0) {
                visible[n++] = j;
            }
        }
        if (n == 0) {
            return;
        }

        scores(is, capsule_rebuild(k, ggml_capsule_form_k(form, head), bytes + form.k_offset[head], tile, more), n);

        int m = 0;
        for (int i = 0; i < n; ++i) {
            if (softmax(is, i, seen_by(visible[i]))) {
                std::copy_n(weights + i*N, N, weights + m*N);
                visible[m++] = visible[i];
            }
        }

        const ggml_capsule_plan * plan = ggml_capsule_form_v(form, head);

        // a row that is not stored is zero
        bool stored[N];
        capsule_stored_rows(plan, stored);

        int list[N];
        int n_list = 0;
        for (int r = 0; r < N; ++r) {
            if (stored[r]) {
                list[n_list++] = r;
            }
        }

        for (int g = 0; g < n_v && m > 0; ++g) {
            capsule_read_group(plan, g, bytes + form.v_offset[head], tile + 2*L*g, ld_v, capsule_same_order());
        }
        for (int i = 0; i < m; ++i) {
            const float * w = weights + i*N;
            float       * o = out + (size_t) visible[i]*ld_v;
            for (int c = 0; c < ld_v; c += 2*L) {
                capsule_vec a = *(const capsule_vec *) (o + c);
                capsule_vec b = *(const capsule_vec *) (o + c + L);
                for (int r = 0; r < n_list; ++r) {
                    const float * row = tile + (size_t) list[r]*ld_v + c;
                    a = a + *(const capsule_vec *) row      *w[list[r]];
                    b = b + *(const capsule_vec *) (row + L)*w[list[r]];
                }
                *(capsule_vec *) (o + c)     = a;
                *(capsule_vec *) (o + c + L) = b;
            }
        }
    }

    // one query: back to channels, added to what is there
    void finish(int j, const ggml_capsule_attn_sums & sums) {
        if (max[j] == -INFINITY) {
            return;
        }
        const int d = args.v.d;
        const float * axes = args.v_axes ? args.v_axes + (size_t) head*d*d : nullptr;
        const float * add  = args.v_mean ? args.v_mean + (size_t) head*d   : nullptr;
        float * x = turned;
        float * y = turned + d;
        for (int g = 0; g < n_v; ++g) {
            for (int i = 0; i < 2*L; ++i) {
                const int c = i % L < ggml_capsule_n_lanes(args.v, g) ? ggml_capsule_channel(args.v, g, i/L, i % L) : -1;
                if (c >= 0) {
                    x[c] = out[(size_t) j*ld_v + 2*L*g + i];
                }
            }
        }
        for (int c = 0; c < d; ++c) {
            float total = axes ? 0.0f : x[c];
            for (int i = 0; axes && i < d; ++i) {
                total += axes[(size_t) c*d + i]*x[i];
            }
            y[c] = total + (add ? add[c]*sum[j] : 0.0f);
        }
        const float most = max[j] <= sums.max[j] ? sums.max[j] : max[j];
        const float f    = std::exp(sums.max[j] - most);
        const float f_y  = std::exp(max[j]      - most);
        for (int c = 0; c < d; ++c) {
            sums.out[(size_t) j*d + c] = f*sums.out[(size_t) j*d + c] + f_y*y[c];
        }
        sums.sum[j] = f*sums.sum[j] + f_y*sum[j];
        sums.max[j] = most;
    }

    void run(int first, int last, const ggml_capsule_attn_sums & sums) {
        for (int is = first; is < last; ++is) {
            if (takes(args, args.slots[is])) {
                run_tile(is);
            }
        }
        for (int j = 0; j < n_rows; ++j) {
            finish(j, sums);
        }
    }
};
