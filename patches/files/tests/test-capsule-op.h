// GGML_OP_CAPSULE in test-backend-ops, which includes this file

#include "ggml-capsule.h"

struct test_capsule : public test_case {
    ggml_capsule_params p = {};

    const int         n_group;
    const int         n_tokens;
    const int         n_kv;
    const ggml_type   type; // of the cache, or of what unpack writes
    const bool        unpack;
    const bool        perf; // the parts alone: their combination is nothing beside
    const std::string kind;

    std::string op_desc(ggml_tensor * t) override {
        GGML_UNUSED(t);
        return "CAPSULE";
    }

    std::string vars() override {
        const int n_block = p.n_block, n_head_kv = p.n_head_kv, d = p.d_k, n_slots = p.n_slots[0] + p.n_slots[1], flags = p.flags;
        return VARS_TO_STR11(kind, unpack, type, d, n_head_kv, n_group, n_tokens, n_kv, n_slots, n_block, flags);
    }

    double max_nmse_err() override {
        return (p.flags & GGML_CAPSULE_FLAG_TILE_F32) && type == GGML_TYPE_F32 ? 1e-7 : 5e-4;
    }

    bool run_whole_graph() override { return true; }

    uint64_t op_flops(ggml_tensor * t) override {
        GGML_UNUSED(t);
        // what plain attention does: to be compared with FLASH_ATTN_EXT
        return unpack ? 0 : 2ull*(p.d_k + p.d_v)*p.n_head_kv*n_group*n_tokens*(n_kv + (p.n_slots[0] + p.n_slots[1])*p.n_block);
    }

    test_capsule(const std::string & kind, int d, int n_block, int n_head_kv, int n_group, int n_tokens, int n_kv, int n_slots, ggml_type type, int flags,
            bool unpack = false, bool perf = false) :
        n_group(n_group), n_tokens(n_tokens), n_kv(n_kv), type(type), unpack(unpack), perf(perf), kind(kind) {
        p.flags        = flags;
        p.scale        = 1.0f/sqrtf(d);
        p.n_block      = n_block;
        p.n_rot        = d;
        p.n_head_kv    = n_head_kv;
        p.d_k          = d;
        p.d_v          = d;
        p.n_slots[0]   = n_slots - n_slots/4;
        p.n_slots[1]   = n_slots/4;
        p.n_parts_hot  = std::max(1, std::min(4, n_kv/n_block));
        p.n_parts_cold = std::max(1, std::min<int>(n_slots, 512/n_head_kv));

        const uint8_t n = n_block;

        // economy, faithful
        uint8_t rows[2][GGML_CAPSULE_N_TYPES] = { { 0, 0, uint8_t(n/16), uint8_t(n/4), uint8_t(n/2) }, { 0, 0, n, 0, 0 } };
        if (d % 64 != 0) {
            const uint8_t f16[2][GGML_CAPSULE_N_TYPES] = { { 0, uint8_t(n/2), 0, 0, 0 }, { 0, n, 0, 0, 0 } };
            memcpy(rows, f16, sizeof(rows));
        }
        if (kind == "f32") {
            const uint8_t f32[2][GGML_CAPSULE_N_TYPES] = { { n, 0, 0, 0, 0 }, { uint8_t(n/2), uint8_t(n - n/2), 0, 0, 0 } };
            memcpy(rows, f32, sizeof(rows));
        }
        memcpy(p.rows_k, rows, sizeof(rows));
        memcpy(p.rows_v, rows, sizeof(rows));

        if (kind == "retain") {
            p.flags       |= GGML_CAPSULE_FLAG_RETAIN;
            p.n_kept       = n/4;
            p.n_neighbours = 2;
            p.n_mlp        = 16;
        }
    }

    ggml_tensor * input(ggml_context * ctx, const char * name, ggml_type type, int64_t ne0, int64_t ne1 = 1, int64_t ne2 = 1) {
        ggml_tensor * t = ggml_new_tensor_3d(ctx, type, ne0, ne1, ne2);
        ggml_set_name(t, name);
        return t;
    }

    ggml_tensor * build_graph(ggml_context * ctx) override {
        const int n_slots = p.n_slots[0] + p.n_slots[1];
        const int n_cold  = n_slots*p.n_block;

        ggml_tensor * blobs[GGML_CAPSULE_N_TIERS];
        for (int i = 0; i < GGML_CAPSULE_N_TIERS; ++i) {
            blobs[i] = p.n_slots[i] == 0 ? nullptr : input(ctx, i == 0 ? "blob0" : "blob1", GGML_TYPE_I8, p.n_slots[i]*ggml_capsule_slot_size(&p, i));
        }
        ggml_tensor * weights = input(ctx, "weights", GGML_TYPE_I32, ggml_capsule_weights_layout(&p).size);
        ggml_tensor * rope    = input(ctx, "rope",    GGML_TYPE_I32, n_slots*(p.n_rot + 1) + p.n_block*p.n_rot);

        ggml_tensor * out;
        if (unpack) {
            const bool trans = (p.flags & GGML_CAPSULE_FLAG_V) && (p.flags & GGML_CAPSULE_FLAG_V_TRANS);
            ggml_tensor * dst = trans ? input(ctx, "dst", type, n_cold, p.d_v*p.n_head_kv) : input(ctx, "dst", type, p.d_k*p.n_head_kv, n_cold);
            out = ggml_capsule_unpack(ctx, &p, dst, blobs[0], blobs[1], weights, rope);
        } else {
            const bool trans = p.flags & GGML_CAPSULE_FLAG_V_TRANS;
            ggml_tensor * q    = input(ctx, "q", GGML_TYPE_F32, p.d_k, p.n_head_kv*n_group, n_tokens);
            ggml_tensor * k    = input(ctx, "k", type, p.d_k, p.n_head_kv, n_kv);
            ggml_tensor * v    = trans ? input(ctx, "v", type, n_kv, p.n_head_kv, p.d_v) : input(ctx, "v", type, p.d_v, p.n_head_kv, n_kv);
            ggml_tensor * hot  = input(ctx, "mask_hot",  GGML_TYPE_F16, n_kv, n_tokens);
            ggml_tensor * cold = input(ctx, "mask_cold", GGML_TYPE_F16, n_cold, n_tokens);
            out = ggml_capsule_attn(ctx, &p, q, k, v, hot, cold, blobs[0], blobs[1], weights, rope);
            if (perf) {
                out = out->src[0];
            }
        }
        ggml_set_name(out, "out");
        return out;
    }

    void initialize_tensors(ggml_context * ctx) override {
        std::mt19937 rng(1234);
        std::normal_distribution<float> normal;

        auto set = [](ggml_tensor * t, const auto & x) {
            ggml_backend_tensor_set(t, x.data(), 0, ggml_nbytes(t));
        };

        for (ggml_tensor * t = ggml_get_first_tensor(ctx); t != nullptr; t = ggml_get_next_tensor(ctx, t)) {
            const std::string name = ggml_get_name(t);

            if (name == "blob0" || name == "blob1") {
                set(t, random_slots(name == "blob1", rng));
            } else if (name == "weights" || name == "rope") {
                // constants and angles of about 1
                std::vector<float> x(ggml_nelements(t));
                for (float & y : x) {
                    y = 0.3f*normal(rng);
                }
                int32_t * words = (int32_t *) x.data();
                if (name == "rope") {
                    const int n_slots = p.n_slots[0] + p.n_slots[1];
                    std::fill_n(words + n_slots*p.n_rot, n_slots, 0);
                } else {
                    const auto w = ggml_capsule_weights_layout(&p);
                    set_half(x.data() + w.k_basis, x.data() + w.k_basis_h);
                    set_half(x.data() + w.v_basis, x.data() + w.v_basis_h);
                    for (int i = 0; i < p.n_block; ++i) {
                        words[w.token_order + i] = (5*i + 1) % p.n_block; // n_block is not a multiple of 5
                    }
                    for (int i = 0; i < (p.n_block - p.n_kept)*p.n_neighbours; ++i) {
                        words[w.neighbours + i] = i % std::max<int>(1, p.n_kept);
                    }
                }
                set(t, x);
            } else if (name.compare(0, 4, "mask") == 0) {
                // a block in four is not visible, nor a column in five of the others
                std::vector<ggml_fp16_t> x(ggml_nelements(t));
                for (size_t i = 0; i < x.size(); ++i) {
                    const bool visible = perf || (i % t->ne[0]/p.n_block % 4 != 1 && rng() % 5 > 0);
                    x[i] = ggml_fp32_to_fp16(visible ? 0.0f : -INFINITY);
                }
                set(t, x);
            } else if (!t->view_src && t->op == GGML_OP_NONE && t->type != GGML_TYPE_I8) {
                init_tensor_uniform(t);
            }
        }
    }

    // the basis for tensor cores
    void set_half(const float * basis, float * basis_h) const {
        const int n_pad = GGML_PAD(p.n_block, 8);
        const int n_mma = GGML_PAD(p.n_block, 16);

        ggml_fp16_t * dst = (ggml_fp16_t *) basis_h;
        std::fill_n(dst, n_mma*n_mma, ggml_fp32_to_fp16(0.0f));
        for (int r = 0; r < p.n_block; ++r) {
            for (int t = 0; t < p.n_block; ++t) {
                dst[t*n_mma + r] = ggml_fp32_to_fp16(basis[r*n_pad + t]);
            }
        }
    }

    std::vector<uint8_t> random_slots(int tier, std::mt19937 & rng) const {
        static const ggml_type types[GGML_CAPSULE_N_TYPES] = { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0, GGML_TYPE_Q2_0 };

        std::normal_distribution<float> normal;
        std::vector<float> row(p.d_k);

        const size_t size = ggml_capsule_slot_size(&p, tier);
        std::vector<uint8_t> slot(size);

        uint8_t * dst = slot.data();
        for (const auto * rows : { p.rows_k[tier], p.rows_v[tier] }) {
            for (int h = 0; h < p.n_head_kv; ++h) {
                for (int t = 0; t < GGML_CAPSULE_N_TYPES; ++t) {
                    for (int r = 0; r < rows[t]; ++r) {
                        for (float & x : row) {
                            x = normal(rng);
                        }
                        if (types[t] == GGML_TYPE_F32) {
                            memcpy(dst, row.data(), row.size()*sizeof(float));
                        } else {
                            ggml_get_type_traits(types[t])->from_float_ref(row.data(), dst, row.size());
                        }
                        dst += ggml_row_size(types[t], row.size());
                    }
                }
            }
        }
        GGML_ASSERT(dst <= slot.data() + size);

        // the same slot with other scales would be no better a test
        std::vector<uint8_t> res;
        for (uint32_t i = 0; i < p.n_slots[tier]; ++i) {
            res.insert(res.end(), slot.begin(), slot.end());
        }
        return res;
    }
};

static void make_capsule_cases_eval(std::vector<std::unique_ptr<test_case>> & cases) {
    for (const char * kind : { "pca", "retain", "f32" }) {
        for (int d : { 64, 80, 128 }) {
            const bool f32   = std::string(kind) == "f32";
            const int  exact = f32 ? GGML_CAPSULE_FLAG_TILE_F32 : 0;

            for (int n_tokens : { 1, 3, 8 }) {
                for (int n_group : { 1, 4, 7 }) {
                    cases.emplace_back(new test_capsule(kind, d, 32, 2, n_group, n_tokens, 100, 9, f32 ? GGML_TYPE_F32 : GGML_TYPE_F16, exact));
                }
            }
            cases.emplace_back(new test_capsule(kind, d, 64, 2, 4, 2, 300, 7, GGML_TYPE_F16, 0));
            cases.emplace_back(new test_capsule(kind, d, 48, 2, 2, 2, 64, 3, GGML_TYPE_F16, exact | GGML_CAPSULE_FLAG_NORM));
            cases.emplace_back(new test_capsule(kind, d, 32, 2, 2, 2, 64, 3, GGML_TYPE_F16, exact | GGML_CAPSULE_FLAG_V_TRANS));

            for (int side : { 0, int(GGML_CAPSULE_FLAG_V) }) {
                cases.emplace_back(new test_capsule(kind, d, 32, 2, 1, 1, 1, 5, GGML_TYPE_F16, exact | side, true));
                cases.emplace_back(new test_capsule(kind, d, 32, 2, 1, 1, 1, 5, GGML_TYPE_F32, GGML_CAPSULE_FLAG_TILE_F32 | side, true));
                if (d % 64 == 0) {
                    cases.emplace_back(new test_capsule(kind, d, 32, 2, 1, 1, 1, 5, GGML_TYPE_Q8_0, exact | side, true));
                    cases.emplace_back(new test_capsule(kind, d, 32, 2, 1, 1, 1, 5, GGML_TYPE_Q8_0, exact | side | GGML_CAPSULE_FLAG_ROT_K | GGML_CAPSULE_FLAG_ROT_V, true));
                }
            }
            cases.emplace_back(new test_capsule(kind, d, 32, 2, 1, 1, 1, 5, GGML_TYPE_F16, exact | GGML_CAPSULE_FLAG_V | GGML_CAPSULE_FLAG_V_TRANS, true));
        }
        for (ggml_type type : { GGML_TYPE_Q8_0, GGML_TYPE_Q4_0 }) {
            cases.emplace_back(new test_capsule(kind, 64, 32, 2, 2, 2, 64, 5, type, GGML_CAPSULE_FLAG_ROT_K | GGML_CAPSULE_FLAG_ROT_V));
        }
    }
}

// 16k and 64k tokens in slots on the geometries of llava-1.5-7b, qwen2.5-vl-7b and qwen3-vl-8b, beside flash attention on as many cells
static void make_capsule_cases_perf(std::vector<std::unique_ptr<test_case>> & cases) {
    for (auto [n_head_kv, n_group] : { std::pair<int, int> { 32, 1 }, { 4, 7 }, { 8, 4 } }) {
        for (int n_cold : { 16384, 65536 }) {
            for (int n_tokens : { 1, 8 }) {
                for (const char * kind : { "pca", "retain" }) {
                    cases.emplace_back(new test_capsule(kind, 128, 64, n_head_kv, n_group, n_tokens, 256, n_cold/64, GGML_TYPE_F16, 0, false, true));
                }
                for (ggml_type type : { GGML_TYPE_F16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0 }) {
                    cases.emplace_back(new test_flash_attn_ext(128, 128, n_head_kv, { n_group, 1 }, n_cold + 256, n_tokens, true, false, 0, 0, GGML_PREC_F32, type, type));
                }
            }
            cases.emplace_back(new test_capsule("pca", 128, 64, n_head_kv, n_group, 1, 256, n_cold/64, GGML_TYPE_F16, 0, true, true));
        }
    }
}
