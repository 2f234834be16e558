#include "capsule/model/rope.h"

#include "ggml-cpp.h"
#include "llama-arch.h"
#include "llama-cparams.h"
#include "llama-kv-cells.h"
#include "llama-model.h"

#include <algorithm>
#include <cmath>
#include <cstring>

llama_capsule_pos llama_capsule_rope_pos(const llama_kv_cells & cells, uint32_t i, uint32_t n_pos) {
    llama_capsule_pos res = {};

    if (!cells.is_empty(i)) {
        res[0] = cells.pos_get(i);
        if (n_pos > 1) {
            // t, y, x, z as in llm_graph_input_pos
            const auto & ext = cells.ext_get(i);

            res[1] = ext.y;
            res[2] = ext.x;
        }
    }
    return res;
}

bool llama_capsule_layer_rope(const llama_model & model, int32_t il) {
    const auto & hparams = model.hparams;

    if (hparams.rope_type == LLAMA_ROPE_TYPE_NONE || !hparams.has_rope(il)) {
        return false;
    }

    // not in has_rope(), the graphs of these models decide it
    switch (model.arch) {
        case LLM_ARCH_LLAMA4:
        case LLM_ARCH_SMOLLM3:
            return hparams.n_no_rope_layer_step > 0 && (il + 1) % hparams.n_no_rope_layer_step != 0;
        default:
            return true;
    }
}

// RoPE as the model does it; x is [d, n_head, n] F32, pos [n*n_pos] I32
static ggml_tensor * capsule_build_rope(
        ggml_context * ctx,
   const llama_model & model,
 const llama_cparams & cparams,
         ggml_tensor * x,
         ggml_tensor * pos,
         ggml_tensor * factors,
             int32_t   il) {
    const auto & hparams = model.hparams;

    const int   n_rot      = hparams.n_rot(il);
    const int   mode       = hparams.rope_type;
    const float freq_base  = model.get_rope_freq_base (cparams, il);
    const float freq_scale = model.get_rope_freq_scale(cparams, il);

    if (hparams.n_pos_per_embd() > 1) {
        int sections[4];
        std::copy(hparams.rope_sections.begin(), hparams.rope_sections.begin() + 4, sections);

        return ggml_rope_multi(ctx, x, pos, factors, n_rot, sections, mode, cparams.n_ctx_orig_yarn, freq_base, freq_scale,
                cparams.yarn_ext_factor, cparams.yarn_attn_factor, cparams.yarn_beta_fast, cparams.yarn_beta_slow);
    }

    return ggml_rope_ext(ctx, x, pos, factors, n_rot, mode, cparams.n_ctx_orig_yarn, freq_base, freq_scale,
            cparams.yarn_ext_factor, cparams.yarn_attn_factor, cparams.yarn_beta_fast, cparams.yarn_beta_slow);
}

bool llama_capsule_check_rope(
        const ggml_cgraph * gf,
        const ggml_tensor * k_cache,
        const ggml_tensor * k_rot,
        const llama_model & model,
      const llama_cparams & cparams,
                  int32_t   il) {
    const ggml_tensor * x = nullptr;

    for (int i = 0; i < ggml_graph_n_nodes(const_cast<ggml_cgraph *>(gf)) && !x; ++i) {
        const ggml_tensor * t = ggml_graph_node(const_cast<ggml_cgraph *>(gf), i);
        if (t->op == GGML_OP_SET_ROWS && t->view_src == k_cache) {
            x = t->src[0];
        }
    }

    // back over what changes no direction and over the rotation of a quantized cache
    while (x) {
        if (x->op == GGML_OP_RESHAPE || x->op == GGML_OP_VIEW || x->op == GGML_OP_PERMUTE || x->op == GGML_OP_CONT || x->op == GGML_OP_RMS_NORM) {
            x = x->src[0];
        } else if (x->op == GGML_OP_MUL_MAT && x->src[0] == k_rot) {
            x = x->src[1];
        } else {
            break;
        }
    }

    // a layer that reuses the cells of another one writes nothing
    if (!x) {
        return true;
    }
    if (x->op != GGML_OP_ROPE || !llama_capsule_layer_rope(model, il)) {
        return (x->op == GGML_OP_ROPE) == llama_capsule_layer_rope(model, il);
    }

    const ggml_init_params params = {
        /*.mem_size   =*/ 4*ggml_tensor_overhead(),
        /*.mem_buffer =*/ nullptr,
        /*.no_alloc   =*/ true,
    };
    ggml_context_ptr ctx { ggml_init(params) };

    auto * factors = model.get_rope_factors(cparams, il);

    const ggml_tensor * y = capsule_build_rope(ctx.get(), model, cparams,
            ggml_dup_tensor(ctx.get(), x->src[0]), ggml_dup_tensor(ctx.get(), x->src[1]), factors, il);

    return x->src[2] == factors && memcmp(x->op_params, y->op_params, sizeof(x->op_params)) == 0;
}

//
// llama_capsule_rope_params
//

bool llama_capsule_rope_params::supported(const llama_model & model) {
    switch (model.hparams.rope_type) {
        case LLAMA_ROPE_TYPE_NORM:
        case LLAMA_ROPE_TYPE_NEOX:
        case LLAMA_ROPE_TYPE_MROPE:
        case LLAMA_ROPE_TYPE_IMROPE:
            return true;
        default:
            return false;
    }
}

llama_capsule_rope_params::llama_capsule_rope_params(const llama_model & model, const llama_cparams & cparams, int il) {
    const auto & hparams = model.hparams;

    const float freq_base = model.get_rope_freq_base(cparams, il);

    n_rot       = hparams.n_rot(il);
    norm        = hparams.rope_type == LLAMA_ROPE_TYPE_NORM;
    multi       = hparams.n_pos_per_embd() > 1;
    interleaved = hparams.rope_type == LLAMA_ROPE_TYPE_IMROPE;
    freq_scale  = model.get_rope_freq_scale(cparams, il);
    theta_scale = powf(freq_base, -2.0f/n_rot);
    ext_factor  = cparams.yarn_ext_factor;
    mscale      = cparams.yarn_attn_factor;

    if (ext_factor != 0.0f) {
        mscale *= 1.0f + 0.1f*logf(1.0f/freq_scale);
    }

    std::copy(hparams.rope_sections.begin(), hparams.rope_sections.begin() + 4, sections.begin());

    ggml_rope_yarn_corr_dims(n_rot, cparams.n_ctx_orig_yarn, freq_base, cparams.yarn_beta_fast, cparams.yarn_beta_slow, corr_dims);

    if (const ggml_tensor * t = model.get_rope_factors(cparams, il)) {
        factors.resize(ggml_nelements(t));
        ggml_backend_tensor_get(t, factors.data(), 0, ggml_nbytes(t));
    }
}

bool llama_capsule_rope_params::operator==(const llama_capsule_rope_params & other) const {
    return n_rot == other.n_rot && norm == other.norm && multi == other.multi && interleaved == other.interleaved && sections == other.sections &&
        freq_scale == other.freq_scale && theta_scale == other.theta_scale && ext_factor == other.ext_factor && mscale == other.mscale &&
        corr_dims[0] == other.corr_dims[0] && corr_dims[1] == other.corr_dims[1] && factors == other.factors;
}

void llama_capsule_rope_params::angles(const llama_capsule_pos & pos, float * angle) const {
    const uint32_t half   = n_rot/2;
    const int32_t  n_sect = sections[0] + sections[1] + sections[2] + sections[3];

    float theta[4];
    for (int k = 0; k < 4; ++k) {
        theta[k] = multi ? pos[k] : pos[0];
    }

    for (uint32_t i = 0; i < half; ++i) {
        int which = 0;
        if (multi) {
            const int32_t sector = i % n_sect;
            if (interleaved) {
                which = sector % 3;
                if (sector >= 3*sections[which]) {
                    which = 3;
                }
            } else {
                for (int32_t first = sections[0]; which < 3 && sector >= first; first += sections[which]) {
                    which++;
                }
            }
        }

        const float extrap = factors.empty() ? theta[which] : theta[which]/factors[i];

        angle[i] = freq_scale*extrap;
        if (ext_factor != 0.0f) {
            const float ramp = ((float) i - corr_dims[0])/std::max(0.001f, corr_dims[1] - corr_dims[0]);
            const float mix  = (1.0f - std::min(1.0f, std::max(0.0f, ramp)))*ext_factor;
            angle[i] = angle[i]*(1.0f - mix) + extrap*mix;
        }

        for (float & t : theta) {
            t *= theta_scale;
        }
    }
}

void llama_capsule_rope_params::fill_inverse(const llama_capsule_pos & pos, float * cs) const {
    const uint32_t half = n_rot/2;

    std::vector<float> angle(half);
    angles(pos, angle.data());

    for (uint32_t i = 0; i < half; ++i) {
        cs[norm ? 2*i     : i]        =  cosf(angle[i])/mscale;
        cs[norm ? 2*i + 1 : i + half] = -sinf(angle[i])/mscale;
    }
}
