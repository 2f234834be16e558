#pragma once

#include "capsule/format/tables.h"

#include "../ggml/src/ggml-capsule/layout.h"
#include "../ggml/src/ggml-capsule/quantize.h"

#include <memory>
#include <vector>

// where the blocks of a slot lie, by tier and shape, for every layer; made when first asked for, not by several threads at a time
class llama_capsule_forms {
public:
    explicit llama_capsule_forms(llama_capsule_tables_ptr tables);

    // the number of a form, the same for all layers
    uint32_t find(uint32_t i_tier, uint32_t h, uint32_t w);

    uint32_t size() const; // how many there are

    const ggml_capsule_form & get(uint32_t i_layer, uint32_t i_form) const;

    ggml_capsule_channels channels_k(uint32_t i_layer) const;
    ggml_capsule_channels channels_v(uint32_t i_layer) const;

    ggml_capsule_coder coder_k(uint32_t i_layer, uint32_t i_head) const;
    ggml_capsule_coder coder_v(uint32_t i_layer, uint32_t i_head) const;

    // all that a graph reads of a layer, see ggml_capsule_tile_tables
    std::vector<uint8_t> pack(uint32_t i_layer) const;

    const llama_capsule_tables_ptr tables;

private:
    // of one layer
    struct layer_form {
        ggml_capsule_form form;

        std::vector<uint32_t> plans;   // [heads of K with a table of their own], then V
        std::vector<uint32_t> offsets; // [heads of K], then V
    };

    struct form {
        uint32_t i_tier;
        uint32_t h;
        uint32_t w;

        std::vector<std::unique_ptr<layer_form>> layers;
    };
    std::vector<form> forms;

    std::unique_ptr<layer_form> make(uint32_t i_layer, uint32_t i_tier, uint32_t h, uint32_t w) const;
};
