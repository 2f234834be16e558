// GGML_OP_CAPSULE in test-backend-ops, which includes this file

#include "ggml-capsule.h"

#include "../ggml/src/ggml-capsule/attn.h"
#include "../ggml/src/ggml-capsule/tile.h"

// tiles of 8x8 and 5x3 tokens in turn; perf: the larger ones alone
struct test_capsule : public test_case {
    const bool      unpack;
    const int       d;
    const int       n_rot;
    const int       n_head_kv;
    const int       n_group;
    const int       n_tokens;
    const int       n_seqs; // the slots belong to as many sequences, one after the other, and so do the tokens
    const int       n_kv;
    const int       n_slots;
    const ggml_type type; // of the cache, or of what unpack writes
    const int       flags;
    const bool      axes; // values have axes of their own
    const bool      perf; // the parts alone: their combination is nothing beside

    static constexpr int N_SHAPES = 2;
    static constexpr int SIDES[N_SHAPES][2] = { { 8, 8 }, { 5, 3 } };

    struct shape {
        std::vector<uint32_t> k_plan, v_plan, k_offset, v_offset;

        ggml_capsule_form    form;
        std::vector<uint8_t> slot;
    };
    shape shapes[N_SHAPES];

    ggml_capsule_channels ch_k, ch_v;
    std::vector<float>    k_mean, v_mean, v_axes;
    std::vector<int>      columns; // the first one of each slot, and the end

    std::string op_desc(ggml_tensor * t) override {
        GGML_UNUSED(t);
        return "CAPSULE";
    }

    std::string vars() override {
        return VARS_TO_STR12(unpack, d, n_rot, n_head_kv, n_group, n_tokens, n_seqs, n_kv, n_slots, type, flags, axes);
    }

    double max_nmse_err() override {
        return unpack && !ggml_is_quantized(type) ? 1e-6 : 5e-4;
    }

    bool run_whole_graph() override { return true; }

    uint64_t op_flops(ggml_tensor * t) override {
        GGML_UNUSED(t);
        // what plain attention does: to be compared with FLASH_ATTN_EXT
        return unpack ? 0 : 4ull*d*n_head_kv*n_group*n_tokens*(n_kv + columns.back()/n_seqs);
    }

    test_capsule(bool unpack, int d, int n_rot, int n_head_kv, int n_group, int n_tokens, int n_kv, int n_slots, ggml_type type, int flags, bool axes = false,
            bool perf = false, int n_seqs = 1) :
        unpack(unpack), d(d), n_rot(n_rot), n_head_kv(n_head_kv), n_group(n_group), n_tokens(n_tokens), n_seqs(n_seqs), n_kv(n_kv), n_slots(n_slots), type(type),
        flags(flags), axes(axes), perf(perf) {
        const int halves = !(flags & GGML_CAPSULE_FLAG_NORM);

        ch_k = { d, n_rot, halves };
        ch_v = { d, 0,     halves };

        std::mt19937 rng(1234);
        std::normal_distribution<float> normal;
        const auto random = [&](size_t n) {
            std::vector<float> res(n);
            for (float & x : res) {
                x = normal(rng);
            }
            return res;
        };

        k_mean = random(n_head_kv*d);
        v_mean = random(n_head_kv*d);
        for (int h = 0; h < n_head_kv && axes; ++h) {
            // a reflection
            const auto x = random(d);
            float sum = 0.0f;
            for (float y : x) {
                sum += y*y;
            }
            for (int i = 0; i < d*d; ++i) {
                v_axes.push_back((i/d == i%d) - 2.0f*x[i/d]*x[i%d]/sum);
            }
        }
        for (int i = 0; i < N_SHAPES; ++i) {
            init_shape(shapes[i], SIDES[i][0], SIDES[i][1], random);
        }
        columns.push_back(0);
        for (int i = 0; i < n_slots; ++i) {
            columns.push_back(columns.back() + n_cells(i));
        }
    }

    const shape & shape_of(int i_slot) const { return shapes[perf ? 0 : i_slot % N_SHAPES]; }

    int n_cells(int i_slot) const { return shape_of(i_slot).form.h*shape_of(i_slot).form.w; }

    template<typename F>
    void init_shape(shape & s, int h, int w, F random) {
        const auto init_plan = [&](std::vector<uint32_t> & plan, const ggml_capsule_channels & ch) {
            static constexpr uint8_t BITS[] = { 8, 6, 4, 4, 3, 3, 2, 2, 1, 0 };

            const int n_groups = ggml_capsule_n_groups(ch);
            std::vector<uint8_t> table(GGML_CAPSULE_MAX_BLOCKS*n_groups);
            for (size_t i = 0; i < table.size(); ++i) {
                const int row = i/n_groups;
                table[i] = row == 0 ? GGML_CAPSULE_F16 : BITS[(row - 1)*sizeof(BITS)/GGML_CAPSULE_MAX_BLOCKS];
            }
            plan.resize((ggml_capsule_plan_size(n_groups) + 3)/4);
            ggml_capsule_plan_init((ggml_capsule_plan *) plan.data(), ch, table.data(), h, w);
        };
        init_plan(s.k_plan, ch_k);
        init_plan(s.v_plan, ch_v);
        s.k_offset.resize(n_head_kv);
        s.v_offset.resize(n_head_kv);

        s.form = { h, w, 0, (const uint8_t *) s.k_plan.data(), (const uint8_t *) s.v_plan.data(), 0, 0, s.k_offset.data(), s.v_offset.data() };
        s.form.size = ggml_capsule_form_offsets(s.form, n_head_kv, s.k_offset.data(), s.v_offset.data());

        s.slot.resize(GGML_PAD(s.form.size, 64));

        std::vector<ggml_capsule_coder> coders;
        std::vector<float> rows(h*w*d);
        std::vector<float> work(ggml_capsule_rows_work(d));
        for (int i = 0; i < 2*n_head_kv; ++i) {
            const bool is_v = i >= n_head_kv;
            const int  head = i % n_head_kv;

            const ggml_capsule_coder coder = { is_v ? ch_v : ch_k, (is_v ? v_mean : k_mean).data() + head*d, is_v && axes ? v_axes.data() + head*d*d : nullptr };
            const auto x = random(h*w*d);
            ggml_capsule_rows(coder, nullptr, h, w, x.data(), d, rows.data(), work.data());
            ggml_capsule_store(coder.channels, is_v ? ggml_capsule_form_v(s.form, head) : ggml_capsule_form_k(s.form, head), rows.data(),
                    s.slot.data() + (is_v ? s.v_offset : s.k_offset)[head]);
            coders.push_back(coder);
        }
        ggml_capsule_slot_seal(s.form, n_head_kv, coders.data(), s.slot.data());
    }

    //
    // what the op reads
    //

    std::vector<uint8_t> make_pool() const {
        std::vector<uint8_t> res;
        for (int i = 0; i < n_slots; ++i) {
            res.insert(res.end(), shape_of(i).slot.begin(), shape_of(i).slot.end());
        }
        res.resize(res.size() + GGML_CAPSULE_PAD);
        return res;
    }

    std::vector<int32_t> make_slots() const {
        std::vector<int32_t> res;
        size_t offset = 0;
        for (int i = 0; i < n_slots; ++i) {
            const int i_shape = &shape_of(i) - shapes;
            res.insert(res.end(), { int32_t(offset/64), i_shape, i_shape, columns[i] });
            offset += shape_of(i).slot.size();
        }
        for (int i = 0; i < n_slots; ++i) {
            res.push_back(n_slots + (&shape_of(i) == shapes ? 0 : SIDES[0][0]*SIDES[0][1]));
        }
        return res;
    }

    std::vector<uint8_t> make_tables() const {
        ggml_capsule_tile_tables head = {};
        std::vector<uint8_t> res(64);

        const auto add = [&](const void * data, size_t n) {
            const size_t at = res.size();
            res.resize(at + GGML_PAD(n, 64));
            memcpy(res.data() + at, data, n);
            return int32_t(at);
        };
        std::vector<ggml_capsule_tile_form> forms;
        for (const auto & s : shapes) {
            forms.push_back({ s.form.h, s.form.w, int32_t(s.form.size), add(s.k_plan.data(), 4*s.k_plan.size()), add(s.v_plan.data(), 4*s.v_plan.size()), 0, 0,
                add(s.k_offset.data(), 4*s.k_offset.size()), add(s.v_offset.data(), 4*s.v_offset.size()) });
        }
        head.n_forms = N_SHAPES;
        head.forms   = add(forms.data(), forms.size()*sizeof(forms[0]));
        head.k_mean  = add(k_mean.data(), 4*k_mean.size());
        head.v_mean  = add(v_mean.data(), 4*v_mean.size());
        head.v_axes  = axes ? add(v_axes.data(), 4*v_axes.size()) : 0;
        memcpy(res.data(), &head, sizeof(head));
        return res;
    }

    int n_rows() const { return n_slots + SIDES[0][0]*SIDES[0][1] + SIDES[1][0]*SIDES[1][1]; }

    std::vector<float> make_angles() const {
        const size_t n_angles = ggml_capsule_angles_size(ch_k);
        const size_t n_rope   = ggml_capsule_rope_size(ch_k)/sizeof(float);

        std::vector<float> res(n_rows()*n_angles + N_SHAPES*n_rope);

        const auto angle = [&](double pos) {
            std::vector<double> angles;
            for (int i = 0; i < n_rot/2; ++i) {
                angles.push_back(pos*pow(10000.0, -2.0*i/n_rot));
            }
            return angles;
        };
        float * to = res.data();
        const auto add = [&](double pos) {
            ggml_capsule_angles_init(to, ch_k, angle(pos).data(), 1.0f);
            to += n_angles;
        };
        for (int i = 0; i < n_slots; ++i) {
            add(10 + columns[i]);
        }
        for (const auto & side : SIDES) {
            for (int i = 0; i < side[0]*side[1]; ++i) {
                add(i);
            }
        }
        for (const auto & side : SIDES) {
            ggml_capsule_rope_init((ggml_capsule_rope *) to, ch_k, angle(1).data(), angle(side[1]).data());
            to += n_rope;
        }
        return res;
    }

    // a slot in four is not visible, of another one four tokens of five
    bool visible(int i_token, int i_slot, int i_cell) const {
        const bool mine = (int64_t) i_slot*n_seqs/n_slots == i_token % n_seqs;
        return mine && (perf || (i_slot % 4 != 1 && (i_slot % 4 != 2 || i_cell % 5 > 0)));
    }

    //
    // the graph
    //

    ggml_tensor * input(ggml_context * ctx, const char * name, ggml_type type, int64_t ne0, int64_t ne1 = 1, int64_t ne2 = 1) {
        ggml_tensor * t = ggml_new_tensor_3d(ctx, type, ne0, ne1, ne2);
        ggml_set_name(t, name);
        return t;
    }

    ggml_tensor * build_graph(ggml_context * ctx) override {
        ggml_capsule_tile_params p = {};

        p.flags     = flags;
        p.scale     = 1.0f/sqrtf(d);
        p.n_rot     = n_rot;
        p.n_head_kv = n_head_kv;
        p.d_k       = d;
        p.d_v       = d;
        p.n_rows    = n_rows();

        const bool is_v   = flags & GGML_CAPSULE_FLAG_V;
        const bool trans  = flags & GGML_CAPSULE_FLAG_V_TRANS;
        const int  n_cold = columns.back();

        ggml_tensor * pool   = input(ctx, "pool",   GGML_TYPE_I8,  make_pool().size());
        ggml_tensor * slots  = input(ctx, "slots",  GGML_TYPE_I32, n_slots, 5);
        ggml_tensor * tables = input(ctx, "tables", GGML_TYPE_I8,  make_tables().size());
        ggml_tensor * angles = n_rot > 0 ? input(ctx, "angles", GGML_TYPE_F32, make_angles().size()) : nullptr;

        ggml_tensor * out;
        if (unpack) {
            ggml_tensor * dst = is_v && trans ? input(ctx, "dst", type, n_cold, d*n_head_kv) : input(ctx, "dst", type, d*n_head_kv, n_cold);
            out = ggml_capsule_tile_unpack(ctx, &p, dst, false, pool, slots, tables, angles);
        } else {
            ggml_tensor * q    = input(ctx, "q", GGML_TYPE_F32, d, n_head_kv*n_group, n_tokens);
            ggml_tensor * k    = input(ctx, "k", type, d, n_head_kv, n_kv);
            ggml_tensor * v    = trans ? input(ctx, "v", type, n_kv, n_head_kv, d) : input(ctx, "v", type, d, n_head_kv, n_kv);
            ggml_tensor * hot  = input(ctx, "mask_hot",  GGML_TYPE_F16, n_kv,    n_tokens);
            ggml_tensor * cold = input(ctx, "mask_cold", GGML_TYPE_F16, n_cold,  n_tokens);
            ggml_tensor * seen = input(ctx, "seen",      GGML_TYPE_I8,  n_slots, n_tokens);
            out = ggml_capsule_tile_attn(ctx, &p, q, k, v, hot, cold, seen, pool, slots, tables, angles);
            if (perf) {
                out = out->src[0];
            }
        }
        ggml_set_name(out, "out");
        return out;
    }

    void initialize_tensors(ggml_context * ctx) override {
        const auto set = [](ggml_tensor * t, const auto & x) {
            GGML_ASSERT(ggml_nbytes(t) == x.size()*sizeof(x[0]));
            ggml_backend_tensor_set(t, x.data(), 0, ggml_nbytes(t));
        };

        std::vector<ggml_fp16_t> mask;
        std::vector<int8_t>      seen;
        for (int i = 0; i < n_tokens; ++i) {
            for (int j = 0; j < n_slots; ++j) {
                int n = 0;
                for (int c = 0; c < n_cells(j); ++c) {
                    n += visible(i, j, c);
                    mask.push_back(ggml_fp32_to_fp16(visible(i, j, c) ? 0.0f : -INFINITY));
                }
                seen.push_back(n == 0 ? 0 : n == n_cells(j) ? 1 : 2);
            }
        }

        for (ggml_tensor * t = ggml_get_first_tensor(ctx); t != nullptr; t = ggml_get_next_tensor(ctx, t)) {
            const std::string name = ggml_get_name(t);

            if (name == "pool") {
                set(t, make_pool());
            } else if (name == "slots") {
                set(t, make_slots());
            } else if (name == "tables") {
                set(t, make_tables());
            } else if (name == "angles") {
                set(t, make_angles());
            } else if (name == "mask_cold") {
                set(t, mask);
            } else if (name == "seen") {
                set(t, seen);
            } else if (name == "mask_hot") {
                std::vector<ggml_fp16_t> x(ggml_nelements(t));
                for (size_t i = 0; i < x.size(); ++i) {
                    x[i] = ggml_fp32_to_fp16(perf || i % 5 > 0 ? 0.0f : -INFINITY);
                }
                set(t, x);
            } else if (!t->view_src && t->op == GGML_OP_NONE) {
                init_tensor_uniform(t);
            }
        }
    }
};

static void make_capsule_cases_eval(std::vector<std::unique_ptr<test_case>> & cases) {
    const int flag_v     = GGML_CAPSULE_FLAG_V;
    const int flag_norm  = GGML_CAPSULE_FLAG_NORM;
    const int flag_trans = GGML_CAPSULE_FLAG_V_TRANS;
    const int flag_rot   = GGML_CAPSULE_FLAG_ROT_K | GGML_CAPSULE_FLAG_ROT_V;

    const auto attn = [&](int d, int n_rot, int n_group, int n_tokens, int n_slots, ggml_type type, int flags, bool axes, int n_seqs = 1) {
        cases.emplace_back(new test_capsule(false, d, n_rot, 2, n_group, n_tokens, 96, n_slots, type, flags, axes, false, n_seqs));
    };
    const auto unpack = [&](int d, int n_rot, ggml_type type, int flags, bool axes) {
        cases.emplace_back(new test_capsule(true, d, n_rot, 2, 1, 1, 1, 5, type, flags, axes));
    };

    for (int d : { 64, 80, 128, 256 }) {
        for (int n_tokens : { 1, 3, 8, 70 }) {
            for (int n_group : { 1, 4, 7 }) {
                attn(d, d, n_group, n_tokens, 9, GGML_TYPE_F16, 0, n_group == 4);
            }
        }
        attn(d, d,   2, 2, 7, GGML_TYPE_F16, flag_norm,  true);
        attn(d, d/2, 2, 2, 7, GGML_TYPE_F16, 0,          true); // half of the channels have RoPE
        attn(d, 0,   2, 2, 7, GGML_TYPE_F16, 0,          true);
        attn(d, d,   2, 2, 7, GGML_TYPE_F16, flag_trans, true);
        attn(d, d,   2, 8, 17, GGML_TYPE_F16, 0, false, 8);

        for (bool axes : { false, true }) {
            unpack(d, d, GGML_TYPE_F16, flag_v | flag_trans, axes);
            for (int side : { 0, flag_v }) {
                unpack(d, d,   GGML_TYPE_F32, side,             axes);
                unpack(d, d,   GGML_TYPE_F16, side | flag_norm, axes);
                unpack(d, d/2, GGML_TYPE_F16, side,             axes);
            }
        }
    }
    for (ggml_type type : { GGML_TYPE_Q8_0, GGML_TYPE_Q4_0 }) {
        attn(64, 64, 2, 2, 5, type, flag_rot, false);
        for (int side : { 0, flag_v }) {
            unpack(128, 128, type, side,            true);
            unpack(128, 128, type, side | flag_rot, true);
        }
    }
}

// n_cold tokens in slots, one sequence or 32 that share them out, beside flash attention on as many cells (each sequence with cells of its own)
static void make_capsule_cases_perf_of(std::vector<std::unique_ptr<test_case>> & cases, int n_head_kv, int n_group, int n_cold) {
    for (auto [n_tokens, n_seqs] : { std::pair<int, int> { 1, 1 }, { 8, 1 }, { 32, 32 } }) {
        for (bool axes : { false, true }) {
            cases.emplace_back(new test_capsule(false, 128, 128, n_head_kv, n_group, n_tokens, 256, n_cold/64, GGML_TYPE_F16, 0, axes, true, n_seqs));
        }
        for (ggml_type type : { GGML_TYPE_F16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0 }) {
            cases.emplace_back(new test_flash_attn_ext(128, 128, n_head_kv, { n_group, n_seqs }, (n_cold + 256)/n_seqs, n_tokens/n_seqs, true, false, 0, 0,
                GGML_PREC_F32, type, type));
        }
    }
    cases.emplace_back(new test_capsule(true, 128, 128, n_head_kv, n_group, 1, 256, n_cold/64, GGML_TYPE_F16, 0, true, true));
}

static void make_capsule_cases_perf(std::vector<std::unique_ptr<test_case>> & cases) {
    // llava-1.5-7b, qwen2.5-vl-7b, qwen3-vl-8b
    static const struct { int n_head_kv; int n_group; } models[] = { { 32, 1 }, { 4, 7 }, { 8, 4 } };

    for (const auto & m : models) {
        for (int n_cold : { 16384, 65536 }) {
            make_capsule_cases_perf_of(cases, m.n_head_kv, m.n_group, n_cold);
        }
    }
    // to see it run: test-backend-ops perf -o CAPSULE -p n_slots=32,
    make_capsule_cases_perf_of(cases, 1, 2, 2048);
}
