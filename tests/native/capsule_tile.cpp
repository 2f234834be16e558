// ggml-capsule/ for ctypes: one head of one tile
#include "tile.h"

#include <vector>

struct head {
    ggml_capsule_coder   coder;
    std::vector<uint8_t> plan;

    head(int d, int n_rot, int halves, const float * mean, const float * axes, const uint8_t * table, int h, int w) :
        coder{ { d, n_rot, halves }, mean, axes }, plan(ggml_capsule_plan_size(ggml_capsule_n_groups(coder.channels))) {
        ggml_capsule_plan_init(get(), coder.channels, table, h, w);
    }

    ggml_capsule_plan * get() { return (ggml_capsule_plan *) plan.data(); }
};

extern "C" {

// channels [groups][2][16], -1 where there is none -> number of groups
int channels(int d, int n_rot, int halves, int32_t * out) {
    const ggml_capsule_channels c = { d, n_rot, halves };
    for (int g = 0; g < ggml_capsule_n_groups(c); ++g) {
        for (int i = 0; i < 2*GGML_CAPSULE_LANES; ++i) {
            const int lane = i % GGML_CAPSULE_LANES;
            *out++ = lane < ggml_capsule_n_lanes(c, g) ? ggml_capsule_channel(c, g, i/GGML_CAPSULE_LANES, lane) : -1;
        }
    }
    return ggml_capsule_n_groups(c);
}

void order(int h, int w, uint8_t * rows, uint8_t * table_rows) {
    ggml_capsule_row_order(h, w, rows);
    ggml_capsule_table_rows(h, w, table_rows);
}

int size(int d, int n_rot, int halves, const uint8_t * table, int h, int w) {
    return (int) ggml_capsule_head_size({ d, n_rot, halves }, table, h, w);
}

void search(const float * x, int n_blocks, int n, int bits, float * scales, int8_t * codes) {
    for (int i = 0; i < n_blocks; ++i) {
        scales[i] = ggml_capsule_search(x + i*n, n, bits, codes + i*n);
    }
}

void rows(int d, int n_rot, int halves, const float * mean, const float * axes, int h, int w, const float * x, float * out) {
    std::vector<float> work(ggml_capsule_rows_work(d));
    ggml_capsule_rows({ { d, n_rot, halves }, mean, axes }, nullptr, h, w, x, d, out, work.data());
}

void errors(int d, int n_rot, int halves, int h, int w, const float * rows, int n_bits, const uint8_t * bits, float * out) {
    ggml_capsule_errors({ { d, n_rot, halves }, nullptr, nullptr }, h, w, rows, n_bits, bits, nullptr, out);
}

void store(int d, int n_rot, int halves, const uint8_t * table, int h, int w, const float * rows, uint8_t * bytes) {
    head x(d, n_rot, halves, nullptr, nullptr, table, h, w);
    ggml_capsule_store(x.coder.channels, x.get(), rows, bytes);
}

void load(int d, int n_rot, int halves, const uint8_t * table, int h, int w, const uint8_t * bytes, float * rows) {
    head x(d, n_rot, halves, nullptr, nullptr, table, h, w);
    ggml_capsule_load(x.coder.channels, x.get(), bytes, rows);
}

void read(int d, int n_rot, int halves, const float * mean, const float * axes, const uint8_t * table, int h, int w, const uint8_t * bytes, float * out) {
    head x(d, n_rot, halves, mean, axes, table, h, w);
    std::vector<float> rows(h*w*d), work(ggml_capsule_rows_work(d));
    ggml_capsule_read(x.coder, x.get(), bytes, out, d, rows.data(), work.data());
}

// the same two of a whole tile with a transform
void rows_whole(const ggml_capsule_transform * whole, int d, int n_rot, int halves, const float * mean, const float * axes, const uint8_t * table, const float * x, float * out) {
    head c(d, n_rot, halves, mean, axes, table, 8, 8);
    c.coder.whole = *whole;
    std::vector<float> work(ggml_capsule_rows_work(d));
    ggml_capsule_rows(c.coder, c.get(), 8, 8, x, d, out, work.data());
}

void read_whole(const ggml_capsule_transform * whole, int d, int n_rot, int halves, const float * mean, const float * axes, const uint8_t * table, const uint8_t * bytes, float * out) {
    head x(d, n_rot, halves, mean, axes, table, 8, 8);
    x.coder.whole = *whole;
    std::vector<float> rows(64*d), work(ggml_capsule_rows_work(d));
    ggml_capsule_read(x.coder, x.get(), bytes, out, d, rows.data(), work.data());
}

}
