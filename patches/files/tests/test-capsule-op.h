// GGML_OP_CAPSULE in test-backend-ops, which includes this file

#include "ggml-capsule.h"

struct test_capsule : public test_case {
    ggml_capsule_params p = {};

    const int         n_group;
    const int         n_tokens;
    const int         n_kv;
    const ggml_type   type; // of the cache, or of what unpack writes
    const bool        unpack;
    const bool        perf; // the parts alone: their combination is nothing beside; all slots in the economy tier
    const int         n_seqs; // the slots belong to as many sequences, one after the other, and so do the tokens
    const std::string kind;   // rebuilt: f32 (exact rows), pca, retain (with key MLP); not rebuilt: project, turn (pca, retain)

    std::string op_desc(ggml_tensor * t) override {
        GGML_UNUSED(t);
        return "CAPSULE";
    }

    std::string vars() override {
        const int n_block = p.n_block, n_head_kv = p.n_head_kv, d = p.d_k, n_slots = p.n_slots[0] + p.n_slots[1], flags = p.flags;
        const int n_terms = p.n_terms;
        return VARS_TO_STR13(kind, unpack, type, d, n_head_kv, n_group, n_tokens, n_seqs, n_kv, n_slots, n_block, n_terms, flags);
    }

    double max_nmse_err() override {
        return (p.flags & GGML_CAPSULE_FLAG_TILE_F32) && type == GGML_TYPE_F32 ? 1e-7 : 5e-4;
    }

    bool run_whole_graph() override { return true; }

    uint64_t op_flops(ggml_tensor * t) override {
        GGML_UNUSED(t);
        // what plain attention does: to be compared with FLASH_ATTN_EXT
        return unpack ? 0 : 2ull*(p.d_k + p.d_v)*p.n_head_kv*n_group*n_tokens*(n_kv + (p.n_slots[0] + p.n_slots[1])*p.n_block/n_seqs);
    }

    test_capsule(const std::string & kind, int d, int n_block, int n_head_kv, int n_group, int n_tokens, int n_kv, int n_slots, ggml_type type, int flags,
            bool unpack = false, bool perf = false, int n_terms = 0, int n_seqs = 1) :
        n_group(n_group), n_tokens(n_tokens), n_kv(n_kv), type(type), unpack(unpack), perf(perf), n_seqs(n_seqs), kind(kind) {
        p.flags        = flags;
        p.scale        = 1.0f/sqrtf(d);
        p.n_block      = n_block;
        p.n_rot        = d;
        p.n_head_kv    = n_head_kv;
        p.d_k          = d;
        p.d_v          = d;
        p.n_slots[1]   = perf ? 0 : n_slots/4;
        p.n_slots[0]   = n_slots - p.n_slots[1];
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

        if (kind == "retain" || kind == "turn" || kind == "encode retain") {
            p.flags       |= GGML_CAPSULE_FLAG_RETAIN*(kind == "encode retain" ? 3 : 1);
            p.n_kept       = n/4;
            p.n_neighbours = 2;
            p.n_mlp        = kind == "turn" ? 0 : 16;
        }
        if (kind == "project" || kind == "turn") {
            p.flags  |= GGML_CAPSULE_FLAG_QUERY;
            p.n_terms = n_terms;
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
        ggml_tensor * rope    = input(ctx, "rope",    GGML_TYPE_I32, n_angles() + (p.n_terms > 0 ? 1 + p.n_terms*(p.n_block + p.d_k) : 0));

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
                    if (p.n_terms > 0) {
                        words[n_angles()] = p.n_terms;
                    }
                    // keys that are stored rotated: their slots begin at 0, but for those that have been moved
                    for (int i = 1; i < n_slots && kind == "turn"; ++i) {
                        memcpy(words + i*p.n_rot, words + (i % 4 == 3 ? i : 0)*p.n_rot, p.n_rot*sizeof(int32_t));
                    }
                } else {
                    const auto w = ggml_capsule_weights_layout(&p);
                    set_half(x.data() + w.k_basis, x.data() + w.k_basis_h);
                    set_half(x.data() + w.v_basis, x.data() + w.v_basis_h);
                    for (int i = 0; i < p.n_block*p.n_block; ++i) {
                        x[w.v_basis_t + i] = x[w.v_basis + i%p.n_block*GGML_PAD(p.n_block, 8) + i/p.n_block];
                    }
                    set_half_mlp(x.data(), w);
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
                    const int64_t col  = i % t->ne[0];
                    const bool    mine = name == "mask_hot" || col*n_seqs/t->ne[0] == int64_t(i/t->ne[0]) % n_seqs;

                    const bool visible = mine && (perf || (col/p.n_block % 4 != 1 && rng() % 5 > 0));
                    x[i] = ggml_fp32_to_fp16(visible ? 0.0f : -INFINITY);
                }
                set(t, x);
            } else if (!t->view_src && t->op == GGML_OP_NONE && t->type != GGML_TYPE_I8) {
                init_tensor_uniform(t);
            }
        }
    }

    int n_angles() const {
        return (p.n_slots[0] + p.n_slots[1])*(p.n_rot + 1) + p.n_block*p.n_rot;
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

    void set_half_mlp(float * x, const ggml_capsule_weights & w) const {
        const int d      = p.d_k;
        const int n_in   = p.n_neighbours*d;
        const int ld_up  = GGML_PAD(p.n_neighbours*p.n_mlp, 16);
        const int n_down = GGML_PAD(p.n_mlp, 16);

        ggml_fp16_t * up   = (ggml_fp16_t *) (x + w.mlp_up_h);
        ggml_fp16_t * down = (ggml_fp16_t *) (x + w.mlp_down_h);

        std::fill_n(up,   p.n_head_kv*d*ld_up,  ggml_fp32_to_fp16(0.0f));
        std::fill_n(down, p.n_head_kv*d*n_down, ggml_fp32_to_fp16(0.0f));
        for (int h = 0; h < p.n_head_kv; ++h) {
            for (int m = 0; m < p.n_mlp; ++m) {
                for (int i = 0; i < n_in; ++i) {
                    up[(h*d + i%d)*ld_up + i/d*p.n_mlp + m] = ggml_fp32_to_fp16(x[w.mlp_up + (h*n_in + i)*p.n_mlp + m]);
                }
                for (int i = 0; i < d; ++i) {
                    down[(h*n_down + m)*d + i] = ggml_fp32_to_fp16(x[w.mlp_down + (h*p.n_mlp + m)*d + i]);
                }
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

// cells -> rows of slots, and their errors
struct test_capsule_encode : public test_capsule {
    const int n_blocks;

    test_capsule_encode(const char * kind, int d, int n_block, int n_head_kv, int n_blocks, ggml_type type, int flags, bool perf = false) :
        test_capsule(kind, d, n_block, n_head_kv, 1, 1, n_blocks*n_block + 10, 4, type, flags, true, perf), n_blocks(n_blocks) {
    }

    uint64_t op_flops(ggml_tensor * t) override {
        GGML_UNUSED(t);
        // of the projection: at most N rows of N tokens
        return 2ull*n_blocks*p.n_block*p.n_block*p.n_head_kv*p.d_k;
    }

    ggml_tensor * build_graph(ggml_context * ctx) override {
        const bool is_v   = p.flags & GGML_CAPSULE_FLAG_V;
        const bool trans  = is_v && (p.flags & GGML_CAPSULE_FLAG_V_TRANS);
        const int  n_embd = p.n_head_kv*p.d_k;

        ggml_tensor * slots   = input(ctx, "slots", GGML_TYPE_I8, n_blocks*ggml_capsule_slot_size(&p, (p.flags & GGML_CAPSULE_FLAG_TIER_1) ? 1 : 0));
        ggml_tensor * cells   = trans ? input(ctx, "cells", type, n_kv, n_embd) : input(ctx, "cells", type, n_embd, n_kv);
        ggml_tensor * index   = input(ctx, "index", GGML_TYPE_I32, p.n_block + 1, n_blocks);
        ggml_tensor * angles  = is_v ? nullptr : input(ctx, "angles", GGML_TYPE_F32, p.n_rot, p.n_block, n_blocks);
        ggml_tensor * weights = input(ctx, "weights", GGML_TYPE_I32, ggml_capsule_weights_layout(&p).size);

        ggml_tensor * out = ggml_capsule_encode(ctx, &p, slots, cells, index, angles, weights);
        if (!perf) {
            // bytes of codes can not be compared; what they are worth can, beside that of q4_0
            ggml_tensor * errors = ggml_capsule_errors(ctx, &p, out, cells, index, angles, weights);
            out = ggml_cont(ctx, ggml_view_4d(ctx, errors, 2, errors->ne[1], errors->ne[2], errors->ne[3], errors->nb[1], errors->nb[2], errors->nb[3], 0));
        }
        ggml_set_name(out, "out");
        return out;
    }

    void initialize_tensors(ggml_context * ctx) override {
        test_capsule::initialize_tensors(ctx);

        // every second cell backwards, the last block has no cells at its end
        std::vector<int32_t> x;
        for (int b = 0; b < n_blocks; ++b) {
            for (int j = 0; j < int(p.n_block); ++j) {
                const int i = b*p.n_block + j;
                x.push_back(b == n_blocks - 1 && j >= p.n_block - 5 ? -1 : i % 2 ? n_kv - i : i);
            }
            x.push_back(n_blocks - 1 - b);
        }
        ggml_backend_tensor_set(ggml_get_tensor(ctx, "index"), x.data(), 0, x.size()*sizeof(int32_t));
    }
};

static void make_capsule_cases_encode(std::vector<std::unique_ptr<test_case>> & cases) {
    const auto encode = [&](const char * kind, int d, int n_block, ggml_type type, int flags) {
        cases.emplace_back(new test_capsule_encode(kind, d, n_block, 2, 3, type, flags));
    };
    for (const char * kind : { "encode", "encode retain" }) {
        for (int flags : { 0, int(GGML_CAPSULE_FLAG_TIER_1), int(GGML_CAPSULE_FLAG_NORM) }) {
            for (int d : { 64, 96, 128 }) {
                encode(kind, d, 48, GGML_TYPE_F16, flags);
            }
            encode(kind, 128, 64, GGML_TYPE_F32, flags);
        }
        for (ggml_type type : { GGML_TYPE_Q8_0, GGML_TYPE_Q4_0 }) {
            encode(kind, 128, 64, type, GGML_CAPSULE_FLAG_ROT_K);
        }
    }
    // values are the same in both
    for (int flags : { int(GGML_CAPSULE_FLAG_V), int(GGML_CAPSULE_FLAG_V | GGML_CAPSULE_FLAG_V_TRANS) }) {
        for (int d : { 64, 96, 128 }) {
            encode("encode", d, 48, GGML_TYPE_F16, flags);
        }
        encode("encode", 128, 64, GGML_TYPE_F32, flags);
    }
    for (ggml_type type : { GGML_TYPE_Q8_0, GGML_TYPE_Q4_0 }) {
        encode("encode", 128, 64, type, GGML_CAPSULE_FLAG_ROT_V | GGML_CAPSULE_FLAG_V);
    }
}

static void make_capsule_cases_eval(std::vector<std::unique_ptr<test_case>> & cases) {
    make_capsule_cases_encode(cases);

    // queries in 8 bits: with fused multiply-add a few of them are rounded to the next integer
    for (int n_tokens : { 1, 3, 8 }) {
        for (int n_group : { 1, 4, 7 }) {
            cases.emplace_back(new test_capsule("project", 128, 32, 2, n_group, n_tokens, 100, 9, GGML_TYPE_F16, 0, false, false, n_tokens == 1 ? 5 : 2));
            cases.emplace_back(new test_capsule("turn",    128, 32, 2, n_group, n_tokens, 100, 9, GGML_TYPE_F16, 0));
        }
    }
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
        for (int n_seqs : { 3, 8 }) {
            cases.emplace_back(new test_capsule(kind, 128, 32, 2, 2, n_seqs, 64, 17, GGML_TYPE_F16, 0, false, false, 0, n_seqs));
        }
        for (ggml_type type : { GGML_TYPE_Q8_0, GGML_TYPE_Q4_0 }) {
            cases.emplace_back(new test_capsule(kind, 64, 32, 2, 2, 2, 64, 5, type, GGML_CAPSULE_FLAG_ROT_K | GGML_CAPSULE_FLAG_ROT_V));
        }
    }
}

// n_cold tokens in slots, one sequence or 32 that share them out, beside flash attention on as many cells (each sequence with cells of its own)
static void make_capsule_cases_perf_of(std::vector<std::unique_ptr<test_case>> & cases, int n_head_kv, int n_group, int n_terms, int n_cold) {
    const auto capsule = [&](const char * kind, int n_tokens, int n_seqs) {
        const int terms = std::string(kind) == "project" ? n_terms : 0;
        cases.emplace_back(new test_capsule(kind, 128, 64, n_head_kv, n_group, n_tokens, 256, n_cold/64, GGML_TYPE_F16, 0, false, true, terms, n_seqs));
    };
    for (auto [n_tokens, n_seqs] : { std::pair<int, int> { 1, 1 }, { 8, 1 }, { 32, 32 } }) {
        for (const char * kind : { "pca", "project", "retain", "turn" }) {
            capsule(kind, n_tokens, n_seqs);
        }
        for (ggml_type type : { GGML_TYPE_F16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0 }) {
            cases.emplace_back(new test_flash_attn_ext(128, 128, n_head_kv, { n_group, n_seqs }, (n_cold + 256)/n_seqs, n_tokens/n_seqs, true, false, 0, 0,
                GGML_PREC_F32, type, type));
        }
    }
    cases.emplace_back(new test_capsule("pca", 128, 64, n_head_kv, n_group, 1, 256, n_cold/64, GGML_TYPE_F16, 0, true, true));
}

static void make_capsule_cases_perf(std::vector<std::unique_ptr<test_case>> & cases) {
    // llava-1.5-7b, qwen2.5-vl-7b, qwen3-vl-8b, with the terms that blocks of 64 tokens take there
    static const struct { int n_head_kv; int n_group; int n_terms; } models[] = { { 32, 1, 22 }, { 4, 7, 2 }, { 8, 4, 8 } };

    for (const auto & m : models) {
        // an image of 1024 tokens
        for (int side : { 0, int(GGML_CAPSULE_FLAG_V) }) {
            cases.emplace_back(new test_capsule_encode("encode", 128, 64, m.n_head_kv, 16, GGML_TYPE_F16, side, true));
        }
        cases.emplace_back(new test_capsule_encode("encode retain", 128, 64, m.n_head_kv, 16, GGML_TYPE_F16, 0, true));
        for (int n_cold : { 16384, 65536 }) {
            make_capsule_cases_perf_of(cases, m.n_head_kv, m.n_group, m.n_terms, n_cold);
        }
    }
    // to see it run: test-backend-ops perf -o CAPSULE -p n_slots=32,
    make_capsule_cases_perf_of(cases, 1, 2, 2, 2048);
}
