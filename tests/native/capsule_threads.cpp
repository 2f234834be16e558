// GGML_OP_CAPSULE as a GPU runs it: every thread of a group is a real one, with barriers between the phases
// capsule_threads [number of a barrier to leave out]: prints the largest difference from the CPU backend; to be built with the thread sanitizer, which finds phases that race
#include <pthread.h>

static pthread_barrier_t g_barrier;
static int               g_skip = -1; // this barrier is left out, to see that the sanitizer finds it
static thread_local int  g_n_barriers;

#define CAPSULE_PHASES
#define CAPSULE_BARRIER() (g_n_barriers++ == g_skip ? 0 : pthread_barrier_wait(&g_barrier))

#include "ggml-capsule-attn.h"
#include "ggml-capsule-encode.h"
#include "ggml-capsule.h"
#include "ggml-cpu.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

static constexpr int N_THREADS = 32;

static std::mt19937 g_rng(1);

static void fill(ggml_tensor * t) {
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < ggml_nelements(t); ++i) {
        ((float *) t->data)[i] = normal(g_rng);
    }
}

// rows of random values in the layout of the op
static void fill_slots(ggml_tensor * blob, const ggml_capsule_params & p, int tier) {
    static const ggml_type types[] = { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0, GGML_TYPE_Q2_0 };

    std::normal_distribution<float> normal;
    std::vector<float> row(p.d_k); // d_k == d_v

    char * dst = (char *) blob->data;
    for (uint32_t s = 0; s < p.n_slots[tier]; ++s) {
        for (const auto * rows : { p.rows_k[tier], p.rows_v[tier] }) {
            for (int h = 0; h < p.n_head_kv; ++h) {
                for (int t = 0; t < GGML_CAPSULE_N_TYPES; ++t) {
                    for (int r = 0; r < rows[t]; ++r) {
                        for (float & x : row) {
                            x = normal(g_rng);
                        }
                        if (types[t] == GGML_TYPE_F32) {
                            memcpy(dst, row.data(), p.d_k*sizeof(float));
                        } else {
                            ggml_get_type_traits(types[t])->from_float_ref(row.data(), dst, p.d_k);
                        }
                        dst += ggml_row_size(types[t], p.d_k);
                    }
                }
            }
        }
    }
    GGML_ASSERT(dst == (char *) blob->data + p.n_slots[tier]*ggml_capsule_slot_size(&p, tier));
}

static float run_as_gpu(ggml_tensor * op, size_t max_shared, bool mma) {
    std::vector<char> expected((char *) op->data, (char *) op->data + ggml_nbytes(op));
    memset(op->data, 0, ggml_nbytes(op));

    capsule_args args;
    capsule_ptrs ptrs;
    ggml_capsule_args_init(op, max_shared, max_shared, mma, args, ptrs);
    GGML_ASSERT((args.mma || args.mma_v) == mma);

    std::vector<float> shared(args.s_size/sizeof(float));
    char * sm = (char *) shared.data();

    pthread_barrier_init(&g_barrier, nullptr, N_THREADS);

    std::vector<std::thread> threads;
    for (int i = 0; i < N_THREADS; ++i) {
        threads.emplace_back([=]() {
            const capsule_threads t = { N_THREADS, i };
            for (int item = 0; item < args.n_items; ++item) {
                if (ggml_capsule_op_of(op) == GGML_CAPSULE_OP_UNPACK) {
                    capsule_unpack<capsule_half, capsule_half>(t, args, ptrs, sm, item);
                } else if (ggml_capsule_op_of(op) == GGML_CAPSULE_OP_ENCODE) {
                    capsule_encode(t, args, ptrs, sm, item);
                } else if (ggml_capsule_op_of(op) == GGML_CAPSULE_OP_ERRORS) {
                    capsule_errors(t, args, ptrs, sm, item);
                } else if (mma) {
                    capsule_attn<capsule_half, float>(t, args, ptrs, sm, item);
                } else {
                    capsule_attn<capsule_half, capsule_half>(t, args, ptrs, sm, item);
                }
                CAPSULE_BARRIER(); // a GPU gives the next item other shared memory
            }
        });
    }
    for (auto & t : threads) {
        t.join();
    }
    pthread_barrier_destroy(&g_barrier);

    // slots: the errors tell
    float res = 0.0f;
    for (int64_t i = 0; i < ggml_nelements(op) && op->type == GGML_TYPE_F32; ++i) {
        const float x = ((float *) expected.data())[i];
        const float d = fabsf(((float *) op->data)[i] - x)/std::max(1.0f, fabsf(x));
        res = d <= res ? res : std::isnan(d) ? INFINITY : d;
    }
    return res;
}

// what tensor cores read of the key MLP
static void fill_half_mlp(float * x, const ggml_capsule_weights & w, const ggml_capsule_params & p) {
    const int d      = p.d_k;
    const int n_in   = p.n_neighbours*d;
    const int ld_up  = GGML_PAD(p.n_neighbours*p.n_mlp, 16);
    const int n_down = GGML_PAD(p.n_mlp, 16);

    ggml_fp16_t * up   = (ggml_fp16_t *) (x + w.mlp_up_h);
    ggml_fp16_t * down = (ggml_fp16_t *) (x + w.mlp_down_h);

    memset(up,   0, p.n_head_kv*d*ld_up *sizeof(ggml_fp16_t));
    memset(down, 0, p.n_head_kv*d*n_down*sizeof(ggml_fp16_t));
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

static void fill_weights(ggml_tensor * weights, const ggml_capsule_params & p) {
    const auto layout = ggml_capsule_weights_layout(&p);

    fill(weights);
    for (int i = 0; i < layout.size; ++i) {
        ((float *) weights->data)[i] *= 0.3f; // as constants are: keys of about 10
    }
    // n_block is a multiple of 16
    float * x = (float *) weights->data;
    for (int i = 0; i < p.n_block*p.n_block; ++i) {
        const int t = i%p.n_block*p.n_block + i/p.n_block;

        ((ggml_fp16_t *) (x + layout.k_basis_h))[t] = ggml_fp32_to_fp16(x[layout.k_basis + i]);
        ((ggml_fp16_t *) (x + layout.v_basis_h))[t] = ggml_fp32_to_fp16(x[layout.v_basis + i]);
        x[layout.v_basis_t + t] = x[layout.v_basis + i];
    }
    for (int i = 0; i < p.n_block; ++i) {
        ((int32_t *) weights->data)[layout.token_order + i] = (i + 3) % p.n_block;
    }
    for (int i = 0; i < (p.n_block - p.n_kept)*p.n_neighbours; ++i) {
        ((int32_t *) weights->data)[layout.neighbours + i] = i % std::max<int>(p.n_kept, 1);
    }
    fill_half_mlp((float *) weights->data, layout, p);
}

static float run_case(ggml_capsule_params p, int n_kv, int n_group, int n_tokens, bool unpack, size_t max_shared = 8*1024, bool mma = false) { // pieces of tiles
    ggml_context * ctx = ggml_init({ 1u << 24, nullptr, false });

    ggml_tensor * blobs[GGML_CAPSULE_N_TIERS];
    for (int i = 0; i < GGML_CAPSULE_N_TIERS; ++i) {
        blobs[i] = ggml_new_tensor_1d(ctx, GGML_TYPE_I8, p.n_slots[i]*ggml_capsule_slot_size(&p, i));
        fill_slots(blobs[i], p, i);
    }
    const int n_slots = p.n_slots[0] + p.n_slots[1];
    const int n_cold  = n_slots*p.n_block;

    ggml_tensor * weights = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, ggml_capsule_weights_layout(&p).size);
    fill_weights(weights, p);

    const int n_angles = n_slots*(p.n_rot + 1) + p.n_block*p.n_rot;

    ggml_tensor * rope = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n_angles + (p.n_terms > 0 ? 1 + p.n_terms*(p.n_block + p.d_k) : 0));
    fill(rope);
    memset((int32_t *) rope->data + n_slots*p.n_rot, 0, n_slots*sizeof(int32_t));
    if (p.n_terms > 0) {
        ((int32_t *) rope->data)[n_angles] = p.n_terms - 1;
    }
    // slots that begin at the same position
    memcpy((float *) rope->data + p.n_rot, rope->data, p.n_rot*sizeof(float));

    ggml_tensor * q    = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, p.d_k, p.n_head_kv*n_group, n_tokens);
    ggml_tensor * k    = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, p.d_k, p.n_head_kv, n_kv);
    ggml_tensor * v    = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, p.d_v, p.n_head_kv, n_kv);
    ggml_tensor * hot  = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n_kv, n_tokens);
    ggml_tensor * cold = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n_cold, n_tokens);
    ggml_tensor * dst  = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, p.d_k*p.n_head_kv, n_cold);
    for (auto * t : { q, k, v, hot, cold, dst }) {
        fill(t);
    }
    // a block in three is not visible, nor a column in three of the others
    for (int i = 0; i < n_cold*n_tokens; ++i) {
        float & x = ((float *) cold->data)[i];
        x = i % n_cold/p.n_block % 3 == 1 || x < -0.4f ? -INFINITY : 0.0f;
    }

    ggml_tensor * out = unpack ?
        ggml_capsule_unpack(ctx, &p, dst, blobs[0], blobs[1], weights, rope) :
        ggml_capsule_attn(ctx, &p, q, k, v, hot, cold, blobs[0], blobs[1], weights, rope)->src[0];

    ggml_cgraph * gf = ggml_new_graph(ctx);
    ggml_build_forward_expand(gf, out);
    ggml_graph_compute_with_ctx(ctx, gf, 1);

    const float res = run_as_gpu(out, max_shared, mma);

    ggml_free(ctx);

    return res;
}

// two blocks of cells into their slots, then the errors
static float run_encode(ggml_capsule_params p, size_t max_shared = 8*1024) {
    ggml_context * ctx = ggml_init({ 1u << 24, nullptr, false });

    ggml_tensor * slots   = ggml_new_tensor_1d(ctx, GGML_TYPE_I8, 2*ggml_capsule_slot_size(&p, 0));
    ggml_tensor * cells   = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, p.d_k*p.n_head_kv, 2*p.n_block);
    ggml_tensor * index   = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, p.n_block + 1, 2);
    ggml_tensor * angles  = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, p.n_rot, p.n_block, 2);
    ggml_tensor * weights = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, ggml_capsule_weights_layout(&p).size);
    for (auto * t : { cells, angles }) {
        fill(t);
    }
    fill_weights(weights, p);
    for (int i = 0; i < 2*(p.n_block + 1); ++i) {
        ((int32_t *) index->data)[i] = i % (p.n_block + 1) == p.n_block ? i/(p.n_block + 1) : 2*p.n_block - 1 - i;
    }

    ggml_tensor * encoded = ggml_capsule_encode(ctx, &p, slots,   cells, index, angles, weights);
    ggml_tensor * errors  = ggml_capsule_errors(ctx, &p, encoded, cells, index, angles, weights);

    ggml_cgraph * gf = ggml_new_graph(ctx);
    ggml_build_forward_expand(gf, errors);
    ggml_graph_compute_with_ctx(ctx, gf, 1);

    run_as_gpu(encoded, max_shared, false);

    const float res = run_as_gpu(errors, max_shared, false);

    ggml_free(ctx);

    return res;
}

int main(int argc, char ** argv) {
    g_skip = argc > 1 ? atoi(argv[1]) : -1;

    ggml_capsule_params pca = {};
    pca.scale        = 0.125f;
    pca.n_block      = 16;
    pca.n_rot        = 64;
    pca.n_head_kv    = 1;
    pca.d_k          = 64;
    pca.d_v          = 64;
    pca.n_slots[0]   = 4;
    pca.n_slots[1]   = 2;
    pca.n_parts_hot  = 1;
    pca.n_parts_cold = 2;
    const uint8_t rows[2][GGML_CAPSULE_N_TYPES] = { { 0, 0, 2, 4, 6 }, { 0, 4, 4, 4, 4 } };
    for (int i = 0; i < 2; ++i) {
        memcpy(pca.rows_k[i], rows[i], sizeof(rows[i]));
        memcpy(pca.rows_v[i], rows[i], sizeof(rows[i]));
    }

    ggml_capsule_params retain = pca;
    retain.flags        = GGML_CAPSULE_FLAG_RETAIN | GGML_CAPSULE_FLAG_NORM | GGML_CAPSULE_FLAG_ROT_K | GGML_CAPSULE_FLAG_ROT_V;
    retain.n_kept       = 6;
    retain.n_neighbours = 2;
    retain.n_mlp        = 8;

    ggml_capsule_params project = pca;
    project.flags         = GGML_CAPSULE_FLAG_QUERY;
    project.n_terms       = 4;
    project.rows_k[1][1]  = 0;
    project.rows_v[1][1]  = 0;

    ggml_capsule_params turn = project;
    turn.flags        = GGML_CAPSULE_FLAG_QUERY | GGML_CAPSULE_FLAG_RETAIN | (GGML_CAPSULE_FLAG_RETAIN << 1);
    turn.n_kept       = 6;
    turn.n_neighbours = 2;

    // tiles of F32: scores that differ less than those of F16 may
    ggml_capsule_params product = pca;
    product.scale = 0.001f;

    ggml_capsule_params mlp = retain;
    mlp.flags &= ~(GGML_CAPSULE_FLAG_ROT_K | GGML_CAPSULE_FLAG_ROT_V);
    mlp.scale  = product.scale;

    float res = 0.0f;
    res = std::max(res, run_case(pca,    40, 3, 3, false));
    res = std::max(res, run_case(retain, 16, 1, 1, false));
    res = std::max(res, run_case(retain, 16, 1, 1, true));
    res = std::max(res, run_case(project, 16, 2, 1, false, CAPSULE_SHARED_DEFAULT));
    res = std::max(res, run_case(turn,    16, 1, 1, false, CAPSULE_SHARED_DEFAULT));
    res = std::max(res, run_case(product, 16, 2, 1, false, CAPSULE_SHARED_DEFAULT, true));
    res = std::max(res, run_case(mlp,     16, 1, 1, false, CAPSULE_SHARED_DEFAULT, true));
    project.scale = 0.1f*product.scale; // the CPU has queries in 8 bits
    res = std::max(res, run_case(project, 16, 2, 1, false, CAPSULE_SHARED_DEFAULT, true));
    // values too: 5 queries, without and with keys that are rebuilt; sums of many products of f16
    turn.scale = product.scale;
    turn.rows_k[1][1] = turn.rows_v[1][1] = product.rows_k[1][1] = product.rows_v[1][1] = 0;
    res = std::max(res, run_case(turn,    16, 5, 1, false, 64*1024, true)/5);
    res = std::max(res, run_case(product, 16, 5, 1, false, CAPSULE_SHARED_DEFAULT, true)/5);
    res = std::max(res, run_encode(retain));
    res = std::max(res, run_encode(pca));
    pca.flags = GGML_CAPSULE_FLAG_V;
    res = std::max(res, run_encode(pca));
    printf("largest difference from the CPU backend, of values above 1 relative: %g\n", res);
    return res < 2e-3f ? 0 : 1; // tiles of f16, with and without fused multiply-add
}
