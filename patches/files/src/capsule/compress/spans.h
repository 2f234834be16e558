#pragma once

#include "llama.h"

#include <map>
#include <utility>
#include <vector>

struct llama_batch_ext;

// automatic mode: the images in the hot cells that are not compressed yet, as llama_context::decode() saw them come
class llama_capsule_spans {
public:
    struct span {
        llama_pos p0;
        llama_pos p1; // exclusive

        bool closed;  // something else followed
    };

    // mrope: the tokens of an image share one position. n_image: tokens of an image, 0 if that is not known
    llama_capsule_spans(bool mrope, uint32_t n_image) : mrope(mrope), n_image(n_image) {}

    // closes the images that this batch does not continue
    void begin(const llama_batch_ext & batch);

    // after the batch was decoded
    void end(const llama_batch_ext & batch);

    // the hot cells are full: images of other sequences are complete, since a client decodes an image in one go.
    //   So is what there is of an image in 1-D positions of unknown size
    void close_for_room(const llama_batch_ext & batch);

    // the closed images, which are pending no more
    std::vector<std::pair<llama_seq_id, span>> take_closed();

    // where the first pending image of a sequence begins
    llama_pos first(llama_seq_id seq_id) const;

    //
    // sequence operations: what cuts an image leaves it in the hot cells
    //

    void clear() { spans.clear(); }

    void seq_rm  (llama_seq_id seq_id, llama_pos p0, llama_pos p1);
    void seq_cp  (llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1);
    void seq_keep(llama_seq_id seq_id);
    void seq_add (llama_seq_id seq_id, llama_pos p0, llama_pos p1, llama_pos shift);

    //
    // state
    //

    std::vector<span> get(llama_seq_id seq_id) const;

    void add(llama_seq_id seq_id, const span & span);

private:
    const bool     mrope;
    const uint32_t n_image;

    std::map<llama_seq_id, std::vector<span>> spans; // in the order of their decoding

    bool is_next (const span & s, llama_pos pos) const; // does an embedding at this position continue the image?
    bool is_whole(const span & s) const;

    // forgets what fn selects; seq_id < 0: of all sequences
    template<typename F>
    void drop(llama_seq_id seq_id, F fn);
};
