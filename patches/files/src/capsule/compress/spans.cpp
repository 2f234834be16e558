#include "capsule/compress/spans.h"

#include "llama-batch.h"

#include <algorithm>
#include <limits>

static bool capsule_is_embd(const llama_batch_ext::token & token) {
    return token.has_embd && token.id == LLAMA_TOKEN_NULL;
}

bool llama_capsule_spans::is_next(const span & s, llama_pos pos) const {
    return mrope ? pos == s.p0 : pos == s.p1;
}

bool llama_capsule_spans::is_whole(const span & s) const {
    return !mrope && n_image > 0 && (uint32_t) (s.p1 - s.p0) == n_image;
}

void llama_capsule_spans::begin(const llama_batch_ext & batch) {
    for (auto & [seq_id, list] : spans) {
        const llama_seq_id id = seq_id;

        // only the first token of the sequence is of interest
        const auto token = std::find_if(batch.tokens.begin(), batch.tokens.end(), [&](const auto & t) { return t.seq_ids.count(id) > 0; });
        if (token == batch.tokens.end()) {
            continue;
        }
        for (auto & s : list) {
            s.closed = s.closed || &s != &list.back() || !capsule_is_embd(*token) || !is_next(s, token->pos[0]);
        }
    }
}

void llama_capsule_spans::end(const llama_batch_ext & batch) {
    for (const auto & token : batch.tokens) {
        for (llama_seq_id seq_id : token.seq_ids) {
            const llama_pos pos = token.pos[0];

            auto & list = spans[seq_id];

            if (!capsule_is_embd(token)) {
                for (auto & s : list) {
                    s.closed = true;
                }
                continue;
            }

            if (!list.empty() && !list.back().closed && is_next(list.back(), pos)) {
                list.back().p1 = pos + 1;
            } else {
                if (!list.empty()) {
                    list.back().closed = true;
                }
                list.push_back({ pos, pos + 1, false });
            }

            // images of a known size may follow each other
            list.back().closed = is_whole(list.back());
        }
    }

    for (auto it = spans.begin(); it != spans.end();) {
        it = it->second.empty() ? spans.erase(it) : std::next(it);
    }
}

void llama_capsule_spans::close_for_room(const llama_batch_ext & batch) {
    begin(batch);

    for (auto & [seq_id, list] : spans) {
        const llama_seq_id id = seq_id;

        const bool in_batch = std::any_of(batch.tokens.begin(), batch.tokens.end(), [&](const auto & t) { return t.seq_ids.count(id) > 0; });
        for (auto & s : list) {
            s.closed = s.closed || !in_batch || (!mrope && n_image == 0);
        }
    }
}

std::vector<std::pair<llama_seq_id, llama_capsule_spans::span>> llama_capsule_spans::take_closed() {
    std::vector<std::pair<llama_seq_id, span>> res;

    for (auto & [seq_id, list] : spans) {
        for (const auto & s : list) {
            // audio and embeddings of text come as images do; where the size of an image is known, it tells them apart
            if (s.closed && (mrope || n_image == 0 || is_whole(s))) {
                res.emplace_back(seq_id, s);
            }
        }
    }
    drop(-1, [](const span & s) { return s.closed; });

    return res;
}

llama_pos llama_capsule_spans::first(llama_seq_id seq_id) const {
    llama_pos res = std::numeric_limits<llama_pos>::max();
    for (const auto & s : get(seq_id)) {
        res = std::min(res, s.p0);
    }
    return res;
}

//
// sequence operations
//

template<typename F>
void llama_capsule_spans::drop(llama_seq_id seq_id, F fn) {
    for (auto & [id, list] : spans) {
        if (seq_id < 0 || id == seq_id) {
            list.erase(std::remove_if(list.begin(), list.end(), fn), list.end());
        }
    }
}

void llama_capsule_spans::seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    drop(seq_id, [&](const span & s) { return s.p0 < p1 && s.p1 > p0; });
}

void llama_capsule_spans::seq_cp(llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1) {
    // the copy may outlive the original
    for (const auto & s : get(seq_id_src)) {
        if (s.p0 >= p0 && s.p1 <= p1) {
            add(seq_id_dst, s);
        }
    }
}

void llama_capsule_spans::seq_keep(llama_seq_id seq_id) {
    for (auto it = spans.begin(); it != spans.end();) {
        it = it->first == seq_id ? std::next(it) : spans.erase(it);
    }
}

void llama_capsule_spans::seq_add(llama_seq_id seq_id, llama_pos p0, llama_pos p1, llama_pos shift) {
    const auto inside = [&](const span & s) { return s.p0 >= p0 && s.p1 <= p1; };

    drop(seq_id, [&](const span & s) { return s.p0 < p1 && s.p1 > p0 && !(inside(s) && s.p0 + shift >= 0); });

    const auto it = spans.find(seq_id);
    if (it != spans.end()) {
        for (auto & s : it->second) {
            if (inside(s)) {
                s.p0 += shift;
                s.p1 += shift;
            }
        }
    }
}

//
// state
//

std::vector<llama_capsule_spans::span> llama_capsule_spans::get(llama_seq_id seq_id) const {
    const auto it = spans.find(seq_id);

    return it == spans.end() ? std::vector<span>() : it->second;
}

void llama_capsule_spans::add(llama_seq_id seq_id, const span & span) {
    spans[seq_id].push_back(span);
}
