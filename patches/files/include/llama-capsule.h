#pragma once

// KV capsules: the KV cache of vision tokens, stored compressed
// ref: https://arxiv.org/abs/2605.16439

#include "llama.h"

#ifdef __cplusplus
extern "C" {
#endif

    // what is known of a model's keys and values: from a capsule file, or built in
    struct llama_capsule;

    // what a token of an image sees while it is read
    enum llama_capsule_image_attention {
        LLAMA_CAPSULE_IMAGE_ATTENTION_FULL,    // everything
        LLAMA_CAPSULE_IMAGE_ATTENTION_AUTO,    // in heads that the capsule names: text and its own image, and no other image
        LLAMA_CAPSULE_IMAGE_ATTENTION_MEASURE, // everything; the tensor kqv_narrow-N is what all heads of layer N would give without other images
    };

    struct llama_capsule_context_params {
        size_t size; // sizeof(struct llama_capsule_context_params)

        const struct llama_capsule * capsule; // may be freed before the context

        uint32_t n_hot;         // cells of the hot (normal) KV cache, 0 = default
        uint32_t image_tokens;  // of an image, for models whose positions do not tell where one ends, 0 = not known
        float    quality;       // error that a tile of an image may have, in units of q4_0's, 0 = default of the capsule; the smallest tier that holds it is taken
        float    ratio;         // instead: share of the bytes to save, the nearest tier is taken for everything, 0 = by quality
        bool     auto_compress; // compress an image as soon as something else follows it in its sequence

        enum llama_capsule_image_attention image_attention;
    };

    struct llama_capsule_stats {
        size_t size; // sizeof(struct llama_capsule_stats)

        uint32_t n_hot;            // hot cells
        uint32_t n_hot_used;
        uint32_t n_hot_vision;     // hot cells that hold vision tokens
        uint32_t n_cold;           // vision tokens in slots

        uint64_t bytes_slots;      // slots in use
        uint64_t bytes_pools;      // slots allocated
        uint64_t bytes_scratch;
        uint64_t bytes_hot;        // the hot cache, allocated
        uint64_t bytes_f16_token;  // K and V of one token in f16, all layers

        // tiers of the capsule, from the smallest
        uint32_t n_tiers;
        uint32_t n_slots_tier[16]; // slots in use
        uint32_t n_cold_tier[16];  // vision tokens in them
        uint64_t bytes_tier[16];   // of these slots, all layers
        float    smaller[16];      // f16 bytes over those of a slot of 8x8 tokens

        uint32_t n_heads;          // KV heads of all layers
        uint32_t n_heads_narrow;   // of them, those that see no other image while an image is read
        uint64_t n_tokens_narrow;  // vision tokens that were read so
    };

    // NULL on error: the file is damaged or made for another model, see llama_capsule_last_error()
    LLAMA_API struct llama_capsule * llama_capsule_load_from_file(const struct llama_model * model, const char * path);

    // the capsule that needs no file; NULL if the model is not supported
    LLAMA_API struct llama_capsule * llama_capsule_init_default(const struct llama_model * model);

    LLAMA_API void llama_capsule_free(struct llama_capsule * capsule);

    LLAMA_API struct llama_capsule_context_params llama_capsule_context_default_params(void);

    // llama_init_from_model() with a capsule of this model, or without one (NULL)
    // NULL on error, also if the capsule can not be attached: see llama_capsule_last_error()
    LLAMA_API struct llama_context * llama_capsule_init_from_model(
                     struct llama_model * model,
            struct llama_context_params   params,
            struct llama_capsule_context_params capsule_params);

    LLAMA_API bool llama_capsule_is_attached(const struct llama_context * ctx);

    // moves the vision tokens of a sequence in [p0, p1) into slots
    // returns the number of tokens moved, < 0 on error
    LLAMA_API int32_t llama_capsule_compress(struct llama_context * ctx, llama_seq_id seq_id, llama_pos p0, llama_pos p1);

    // 0 on success
    LLAMA_API int32_t llama_capsule_get_stats(const struct llama_context * ctx, struct llama_capsule_stats * stats);

    // reads the hot cells of a sequence in [p0, p1), ordered by position (M-RoPE: position, y, x), works without a capsule
    //   k [n][n_head_kv][d_k] without RoPE, v [n][n_head_kv][d_v]; either may be NULL; returns n, < 0 on error (n > n_max)
    LLAMA_API int32_t llama_capsule_read_kv(
            struct llama_context * ctx,
                    llama_seq_id   seq_id,
                       llama_pos   p0,
                       llama_pos   p1,
                         int32_t   il,
                         float   * k,
                         float   * v,
                        uint32_t   n_max);

    // KV heads, key and value length of a layer: shape[3], all 0 if it has no K and V of its own; 0 on success
    LLAMA_API int32_t llama_capsule_layer_shape(const struct llama_model * model, int32_t il, int32_t * shape);

    // 64 hex digits and a terminating 0, the same for every quantization of a model; 0 on success
    LLAMA_API int32_t llama_capsule_fingerprint(const struct llama_model * model, char * buf, size_t buf_size);

    // the reason of the last failure in the calling thread, one line; "" if there was none
    LLAMA_API const char * llama_capsule_last_error(void);

#ifdef __cplusplus
}
#endif
