#pragma once

#include "capsule/format/tables.h"

#include "llama-capsule.h"

#include <utility>
#include <vector>

struct ggml_tensor;
struct llama_ubatch;

class llama_capsule_kv;
class llama_capsule_slots;

//
// heads that see text and their own image while an image is read, and no other image
//
// ref: https://arxiv.org/abs/2507.09071
//

class llama_capsule_narrow {
public:
    // neighbouring KV heads of one kind
    struct run {
        uint32_t first;
        uint32_t n;
        bool     narrow;
    };

    // n_image: tokens of an image, 0 if that is not known
    llama_capsule_narrow(const llama_capsule_kv & hot, const llama_capsule_slots & slots, const llama_capsule_tables & tables, uint32_t n_image,
            llama_capsule_image_attention mode);

    // of all heads of a layer; empty if none is narrowed
    const std::vector<run> & runs(uint32_t i_layer) const { return layers[i_layer]; }

    // all heads are to be computed both ways
    bool measures() const { return mode == LLAMA_CAPSULE_IMAGE_ATTENTION_MEASURE; }

    // true if all tokens of the batch are of images that lie in the hot cells as a whole, and there may be other images
    bool find(const llama_ubatch & ubatch) const;

    // F16 or F32 [n_kv, n_tokens]: 0, or -INF for the hot cells of other images than the token's own
    void set_hide(ggml_tensor * dst, const llama_ubatch & ubatch) const;

private:
    const llama_capsule_kv    & hot;
    const llama_capsule_slots & slots;

    const uint32_t n_image;

    const llama_capsule_image_attention mode;

    std::vector<std::vector<run>> layers;

    using range = std::pair<llama_pos, llama_pos>; // [first, second)

    // positions of the image of each token; empty: see find()
    std::vector<range> own_images(const llama_ubatch & ubatch) const;
};
