#include "llama-capsule-store.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-kv-cache.h"
#include "llama-model.h"

#include <algorithm>
#include <cmath>
#include <cstring>

//
// slots -> K and V in the scratch, on the CPU: what the reconstruction in llama-capsule-graph.cpp does, as one node and without intermediates
//

// cos and sin of the RoPE of a layer, see ggml_rope_cache_init() and ggml_mrope_cache_init()
struct capsule_rope {
    int   n_rot;
    int   mode;
    bool  multi;
    int   sections[4];
    float freq_scale;
    float theta_scale;
    float ext_factor;
    float mscale;
    float corr_dims[2];

    const float * factors; // may be NULL

    capsule_rope(const llama_model & model, const llama_cparams & cparams, int il, const float * factors) : factors(factors) {
        const auto & hparams = model.hparams;

        const float freq_base = model.get_rope_freq_base(cparams, il);

        n_rot       = hparams.n_rot(il);
        mode        = hparams.rope_type;
        multi       = hparams.n_pos_per_embd() > 1;
        freq_scale  = model.get_rope_freq_scale(cparams, il);
        theta_scale = powf(freq_base, -2.0f/n_rot);
        ext_factor  = cparams.yarn_ext_factor;
        mscale      = cparams.yarn_attn_factor;

        if (ext_factor != 0.0f) {
            mscale *= 1.0f + 0.1f*logf(1.0f/freq_scale);
        }

        std::copy(hparams.rope_sections.begin(), hparams.rope_sections.begin() + 4, sections);

        ggml_rope_yarn_corr_dims(n_rot, cparams.n_ctx_orig_yarn, freq_base, cparams.yarn_beta_fast, cparams.yarn_beta_slow, corr_dims);
    }

    // which of t, y, x, z rotates a pair
    int axis(int sector) const {
        if (mode == LLAMA_ROPE_TYPE_IMROPE) {
            const int res = sector % 3;
            return sector < 3*sections[res] ? res : 3;
        }

        int res = 0;
        for (int first = sections[0]; res < 3 && sector >= first; first += sections[res]) {
            res++;
        }
        return res;
    }

    // pos: t, y, x, z
    void fill(const int32_t * pos, float * cos_sin) const {
        float theta[4] = { (float) pos[0], (float) pos[0], (float) pos[0], (float) pos[0] };
        if (multi) {
            std::copy(pos, pos + 4, theta);
        }

        const int n_sect = sections[0] + sections[1] + sections[2] + sections[3];

        for (int i = 0; i < n_rot/2; ++i) {
            const int which = multi ? axis(i % n_sect) : 0;

            const float extrap = factors ? theta[which]/factors[i] : theta[which];

            float angle = freq_scale*extrap;
            if (ext_factor != 0.0f) {
                const float ramp = ((float) i - corr_dims[0])/std::max(0.001f, corr_dims[1] - corr_dims[0]);
                const float mix  = (1.0f - std::min(1.0f, std::max(0.0f, ramp)))*ext_factor;
                angle = angle*(1.0f - mix) + extrap*mix;
            }

            cos_sin[2*i]     = cosf(angle)*mscale;
            cos_sin[2*i + 1] = sinf(angle)*mscale;

            for (float & t : theta) {
                t *= theta_scale;
            }
        }
    }

    void apply(const float * cos_sin, float * x) const {
        const int half = n_rot/2;
        const bool norm = mode == LLAMA_ROPE_TYPE_NORM;

        for (int i = 0; i < half; ++i) {
            float & a = norm ? x[2*i]     : x[i];
            float & b = norm ? x[2*i + 1] : x[i + half];

            const float x0 = a;
            const float x1 = b;

            a = x0*cos_sin[2*i] - x1*cos_sin[2*i + 1];
            b = x0*cos_sin[2*i + 1] + x1*cos_sin[2*i];
        }
    }
};

bool llama_capsule_store::can_unpack(uint32_t i_layer) const {
    static const char * env = getenv("LLAMA_KVCAPSULE_RECONSTRUCT"); // for tests

    return !(env && atoi(env) > 0) && ggml_backend_buft_is_host(layer_buft(i_layer));
}

// dst: the columns of the slots in the scratch
void llama_capsule_store::unpack(ggml_tensor * dst, uint32_t i_layer, bool is_v, int ith, int nth) const {
    const auto & layer = data().layers[i_layer];

    const uint32_t n_head = layer.n_head_kv;
    const uint32_t d      = is_v ? layer.n_embd_head_v : layer.n_embd_head_k;

    const bool rope  = !is_v && layer.rope;
    const bool trans =  is_v && kv.v_trans;

    // the rotation of a quantized hot cache, see llama_kv_cache::build_input_k_rot()
    const uint32_t n_hadamard = is_v ? (kv.attn_rot_v ? 64 : 0) : (kv.attn_rot_k ? llama_capsule_hadamard_size(d) : 0);

    ggml_tensor * factors = rope ? kv.model.get_rope_factors(lctx.get_cparams(), layer.il) : nullptr;

    std::vector<float> factors_host;
    if (factors) {
        factors_host.resize(ggml_nelements(factors));
        ggml_backend_tensor_get(factors, factors_host.data(), 0, ggml_nbytes(factors));
    }

    const capsule_rope rope_params(kv.model, lctx.get_cparams(), layer.il, factors ? factors_host.data() : nullptr);

    auto store = [dst](const float * src, char * to, int64_t n) {
        switch (dst->type) {
            case GGML_TYPE_F32: memcpy(to, src, n*sizeof(float));                                    break;
            case GGML_TYPE_F16: llama_capsule_to_f16(src, (ggml_fp16_t *) to, n);                    break;
            default:            ggml_get_type_traits(dst->type)->from_float_ref(src, to, n);         break;
        }
    };

    std::vector<float> cos_sin(rope ? N()*rope_params.n_rot : 0);
    std::vector<float> x(N()*d);
    std::vector<float> col(N());

    uint32_t i_slot = 0; // over all tiers
    for (const auto & pool : pools) {
        const auto & codec = pool.codecs[i_layer];
        const auto & blob  = pool.layers[i_layer].blob;

        for (uint32_t s = 0; s < pool.n_used; ++s, ++i_slot) {
            if (i_slot % nth != (uint32_t) ith) {
                continue;
            }

            const uint8_t * slot = (const uint8_t *) blob->data + s*codec.layout.slot_stride;

            for (uint32_t t = 0; t < N() && rope; ++t) {
                int32_t pos[4] = { 0, 0, 0, 0 };
                llama_capsule_rope_pos(pool.cells, s*N() + t, kv.hparams.n_pos_per_embd(), pos, 1);
                rope_params.fill(pos, cos_sin.data() + t*rope_params.n_rot);
            }

            for (uint32_t h = 0; h < n_head; ++h) {
                if (is_v) {
                    codec.decode_v_head(slot, h, x.data());
                } else {
                    codec.decode_k_head(slot, h, x.data());
                }

                if (trans) {
                    // a row per channel
                    for (uint32_t i = 0; i < d; ++i) {
                        for (uint32_t t = 0; t < N(); ++t) {
                            col[t] = x[t*d + i];
                        }
                        store(col.data(), (char *) dst->data + (h*d + i)*dst->nb[1] + i_slot*N()*ggml_type_size(dst->type), N());
                    }
                    continue;
                }

                if (rope) {
                    for (uint32_t t = 0; t < N(); ++t) {
                        rope_params.apply(cos_sin.data() + t*rope_params.n_rot, x.data() + t*d);
                    }
                }
                if (n_hadamard > 0) {
                    llama_capsule_hadamard(x.data(), n_hadamard, x.size());
                }

                for (uint32_t t = 0; t < N(); ++t) {
                    store(x.data() + t*d, (char *) dst->data + (i_slot*N() + t)*dst->nb[1] + ggml_row_size(dst->type, h*d), d);
                }
            }
        }
    }

}

void llama_capsule_store::build_unpack(const llm_graph_context & g, uint32_t i_layer, ggml_tensor * k_cold, ggml_tensor * v_cold) const {
    ggml_tensor * blobs[N_TIERS];

    int n_blobs = 0;
    for (const auto & pool : pools) {
        if (pool.n_used > 0) {
            blobs[n_blobs++] = pool.layers[i_layer].blob;
        }
    }

    auto * arg = const_cast<unpack_arg *>(&unpack_args[i_layer]);

    const ggml_custom_op_t fn_k = [](ggml_tensor * dst, int ith, int nth, void * userdata) {
        const auto * arg = (const unpack_arg *) userdata;
        arg->store->unpack(dst, arg->i_layer, false, ith, nth);
    };
    const ggml_custom_op_t fn_v = [](ggml_tensor * dst, int ith, int nth, void * userdata) {
        const auto * arg = (const unpack_arg *) userdata;
        arg->store->unpack(dst, arg->i_layer, true, ith, nth);
    };

    ggml_build_forward_expand(g.gf, ggml_custom_inplace(g.ctx0, k_cold, blobs, n_blobs, fn_k, GGML_N_TASKS_MAX, arg));
    ggml_build_forward_expand(g.gf, ggml_custom_inplace(g.ctx0, v_cold, blobs, n_blobs, fn_v, GGML_N_TASKS_MAX, arg));
}
