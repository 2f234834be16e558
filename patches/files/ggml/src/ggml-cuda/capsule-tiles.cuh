#pragma once

#include "../ggml-capsule/layout.h"

#include "ggml-capsule.h"

//
// GGML_OP_CAPSULE on tiles: the kernels. They need CUDA's own functions alone, so that tests/native/cuda_on_cpu.h can run them without a GPU.
//
// A thread has one place of a group, and with it two channels: of K, the two members of a RoPE pair. So the cosine transform of a tile, the mean and RoPE need no other
// thread. The coefficients of a place lie in a column of shared memory that no other thread reads.
// Threads meet for scores (sums over channels), for the softmax, and for the cosine transform of the weights.
//

static constexpr int CAPSULE_SIDE    = GGML_CAPSULE_SIDE;
static constexpr int CAPSULE_TOKENS  = GGML_CAPSULE_MAX_ROWS;
static constexpr int CAPSULE_QUERIES = 8;  // of one KV head that a block has
static constexpr int CAPSULE_WARP    = 32;

enum capsule_type {
    CAPSULE_F32,
    CAPSULE_F16,
    CAPSULE_BF16,
};

// element (i0, i1, i2) at data + i0*nb0 + i1*nb1 + i2*nb2
struct capsule_tensor {
    const char * data;
    int          type;
    int64_t      nb0;
    int64_t      nb1;
    int64_t      nb2;
};

// GGML_CAPSULE_BITS, a byte each: arrays of the host are not to be had
constexpr unsigned long long capsule_pack_bits() {
    unsigned long long res = 0;
    for (int i = 0; i < GGML_CAPSULE_N_BITS; ++i) {
        res |= (unsigned long long) GGML_CAPSULE_BITS[i] << 8*i;
    }
    return res;
}

static constexpr unsigned long long CAPSULE_BITS = capsule_pack_bits();

// what all kernels are told
struct capsule_tile_args {
    ggml_capsule_tile_params p;

    ggml_capsule_channels k;
    ggml_capsule_channels v;

    int n_slots;
    int n_threads; // places of a head, rounded up to warps
    int ld_angles;

    const uint8_t * pool;
    const int32_t * slots;
    const uint8_t * tables;
    const float   * angles;

    // attention
    int n_head;
    int n_tokens;
    int n_kv;

    capsule_tensor q;    // F32 [d_k, n_head, n_tokens]
    capsule_tensor hot_k;
    capsule_tensor hot_v; // [d_v, n_head_kv, n_kv], also where it is transposed
    capsule_tensor mask;
    capsule_tensor cold;
    capsule_tensor seen;

    // attention: parts; unpack: cells [n_head_kv*d, n], also where they are transposed
    capsule_tensor dst;
};

static __device__ __forceinline__ float capsule_from_half(uint16_t bits) {
    return __half2float(__ushort_as_half(bits));
}

static __device__ __forceinline__ float capsule_from_half(const uint8_t * bytes) {
    return capsule_from_half((uint16_t) (bytes[0] | bytes[1] << 8));
}

static __device__ __forceinline__ float capsule_get(const capsule_tensor & t, int64_t i0, int64_t i1, int64_t i2) {
    const char * at = t.data + i0*t.nb0 + i1*t.nb1 + i2*t.nb2;
    if (t.type == CAPSULE_F32) {
        return *(const float *) at;
    }
    const uint16_t bits = *(const uint16_t *) at;

    return t.type == CAPSULE_F16 ? capsule_from_half(bits) : __uint_as_float((uint32_t) bits << 16);
}

static __device__ __forceinline__ void capsule_put(const capsule_tensor & t, int64_t i0, int64_t i1, float x) {
    char * at = (char *) t.data + i0*t.nb0 + i1*t.nb1;
    if (t.type == CAPSULE_F32) {
        *(float *) at = x;
    } else {
        *(uint16_t *) at = __half_as_ushort(__float2half_rn(x));
    }
}

//
// what lies in shared memory
//

struct capsule_shared {
    float   cosines[CAPSULE_SIDE + 1][CAPSULE_SIDE][CAPSULE_SIDE]; // [n][u][t], orthonormal; zero from n on
    uint8_t place[CAPSULE_TOKENS];                                 // u*8 + v of each row of the tile at hand
};

// of attention, behind the other one
struct capsule_shared_attn {
    float max  [CAPSULE_QUERIES];
    float sum  [CAPSULE_QUERIES];
    float scale[CAPSULE_QUERIES];                  // of what has been added up so far
    float w    [CAPSULE_QUERIES][CAPSULE_TOKENS];  // scores, then weights, then their cosine transform, by place
    float tmp  [CAPSULE_QUERIES][CAPSULE_TOKENS];
};

static __device__ __forceinline__ void capsule_init(capsule_shared & s) {
    constexpr int n_all = (CAPSULE_SIDE + 1)*CAPSULE_TOKENS;

    for (int i = threadIdx.x; i < n_all; i += blockDim.x) {
        const int n = i/CAPSULE_TOKENS;
        const int u = i/CAPSULE_SIDE % CAPSULE_SIDE;
        const int t = i%CAPSULE_SIDE;

        s.cosines[n][u][t] = u < n && t < n ? cospif((t + 0.5f)*u/n)*sqrtf((u == 0 ? 1.0f : 2.0f)/n) : 0.0f;
    }
}

// rows by roughness, as ggml_capsule_row_order(); every thread ranks some of them
static __device__ __forceinline__ void capsule_init_places(capsule_shared & s, int h, int w) {
    for (int i = threadIdx.x; i < h*w; i += blockDim.x) {
        int rank = 0;
        for (int j = 0; j < h*w; ++j) {
            const int diff = ggml_capsule_roughness(j, h, w) - ggml_capsule_roughness(i, h, w);

            rank += diff < 0 || (diff == 0 && j < i);
        }
        s.place[rank] = (uint8_t) (i/w*CAPSULE_SIDE + i%w);
    }
}

//
// the rows of a place
//

// the place of this thread, and what it has to do with channels
struct capsule_lane {
    int g;
    int lane;
    int a; // channels of both registers, -1: none
    int b;
};

static __device__ __forceinline__ capsule_lane capsule_lane_of(const ggml_capsule_channels & channels, int thread) {
    capsule_lane res = { thread/GGML_CAPSULE_LANES, thread%GGML_CAPSULE_LANES, -1, -1 };

    if (res.g < ggml_capsule_n_groups(channels) && res.lane < ggml_capsule_n_lanes(channels, res.g)) {
        res.a = ggml_capsule_channel(channels, res.g, 0, res.lane);
        res.b = ggml_capsule_channel(channels, res.g, 1, res.lane);
    }
    return res;
}

static __device__ __forceinline__ int capsule_plane(const uint8_t * bytes, int width, int n, int j) {
    const int size = (width*n + 7)/8;

    return bytes[j%size] >> j/size*width & ((1 << width) - 1);
}

// element j of a block of n -> the values of both registers, in units of the scale
template<int BITS>
static __device__ __forceinline__ float2 capsule_element(const uint8_t * code, int n, int j) {
    constexpr int width = ggml_capsule_plane_width(BITS);

    const int first  = capsule_plane(code, width, n, j);
    const int second = width == 2*BITS ? 0 : capsule_plane(code + (width*n + 7)/8, 2*BITS - width, n, j);

    int a, b;
    ggml_capsule_codes<BITS>(first, second, a, b);

    return BITS == 1 ? make_float2(2*a - 1, 2*b - 1) : make_float2(a - (1 << (BITS - 1)), b - (1 << (BITS - 1)));
}

static __device__ __forceinline__ float2 capsule_element(const uint8_t * code, int bits, int n_lanes, int n_rows, int lane, int row) {
    const int n = n_rows*n_lanes;
    const int j = lane*n_rows + row;

    switch (bits) {
        case 1: return capsule_element<1>(code, n, j);
        case 2: return capsule_element<2>(code, n, j);
        case 3: return capsule_element<3>(code, n, j);
        case 4: return capsule_element<4>(code, n, j);
        case 6: return capsule_element<6>(code, n, j);
        case 8: return capsule_element<8>(code, n, j);
        case GGML_CAPSULE_F16: {
            const uint8_t * at = code + 2*(2*row*n_lanes + lane);
            return make_float2(capsule_from_half(at), capsule_from_half(at + 2*n_lanes));
        }
        default: {
            const float * at = (const float *) code + 2*row*n_lanes + lane;
            return make_float2(at[0], at[n_lanes]);
        }
    }
}

// calls f(row, value) for every stored row of a place, the registers mixed back
template<typename F>
static __device__ __forceinline__ void capsule_rows(const ggml_capsule_plan * plan, const capsule_lane & at, const uint8_t * bytes, F f) {
    const ggml_capsule_plan_group & group = plan->groups[at.g];

    const int n_tokens = plan->h*plan->w;
    const int n_blocks = 1 + n_tokens/2;

    // which blocks have a scale
    unsigned long long scaled = 0;
    for (int i = 0; i < n_blocks; ++i) {
        scaled |= (unsigned long long) (group.bits[i] > 0 && group.bits[i] < GGML_CAPSULE_F16) << i;
    }

    const uint8_t * code = bytes + group.code;

    const auto block = [&](int i, int row, int n_rows, int bits) {
        const float norm  = n_rows == 2 ? 0.5f : 0.70710678118654752f;
        const float scale = bits >= GGML_CAPSULE_F16 ? norm : norm*capsule_from_half(bytes + group.scale + 2*__popcll(scaled & ((1ull << i) - 1)));

        const float2 x = capsule_element(code, bits, group.n_lanes, n_rows, at.lane, 0);
        const float2 y = n_rows == 2 ? capsule_element(code, bits, group.n_lanes, n_rows, at.lane, 1) : make_float2(0.0f, 0.0f);

        f(row, make_float2(scale*(x.x + x.y + (y.x + y.y)), scale*(x.x - x.y + (y.x - y.y))));
        if (n_rows == 2) {
            f(row + 1, make_float2(scale*(x.x + x.y - (y.x + y.y)), scale*(x.x - x.y - (y.x - y.y))));
        }
        code += ggml_capsule_code_size(bits, n_rows, group.n_lanes);
    };

    if (group.first > 0) {
        block(0, 0, 1, group.first);
    }
    for (int b = 0, k = 0; b < GGML_CAPSULE_N_BITS; ++b) {
        for (int i = 0; i < group.n_pairs[b]; ++i, ++k) {
            block(group.pair[k], 2*group.pair[k] - 1, 2, (int) (CAPSULE_BITS >> 8*b & 0xff));
        }
    }
    if (group.last > 0) {
        block(n_tokens/2, n_tokens - 1, 1, group.last);
    }
}

//
// the inverse cosine transform of a column of shared memory
//

// of fewer points than 8, straight from its definition
static __device__ __forceinline__ void capsule_idct(const float (&c)[CAPSULE_SIDE][CAPSULE_SIDE], float2 * x) {
    float2 y[CAPSULE_SIDE];

#pragma unroll
    for (int t = 0; t < CAPSULE_SIDE; ++t) {
        y[t] = make_float2(0.0f, 0.0f);
#pragma unroll
        for (int u = 0; u < CAPSULE_SIDE; ++u) {
            y[t].x += c[u][t]*x[u].x;
            y[t].y += c[u][t]*x[u].y;
        }
    }
#pragma unroll
    for (int t = 0; t < CAPSULE_SIDE; ++t) {
        x[t] = y[t];
    }
}

// of 8 points: 29 additions and 13 multiplications (Loeffler, Ligtenberg and Moschytz, ICASSP 1989, the even half by Chen)
static __device__ __forceinline__ void capsule_idct8(float2 * x) {
    const auto add = [](float2 a, float2 b) { return make_float2(a.x + b.x, a.y + b.y); };
    const auto sub = [](float2 a, float2 b) { return make_float2(a.x - b.x, a.y - b.y); };
    // a*c + b*s
    const auto mix = [](float2 a, float c, float2 b, float s) { return make_float2(a.x*c + b.x*s, a.y*c + b.y*s); };

    // cos(i pi/16)/2
    constexpr float c1 = 0.49039264f;
    constexpr float c2 = 0.46193977f;
    constexpr float c3 = 0.41573481f;
    constexpr float c4 = 0.35355339f;
    constexpr float c5 = 0.27778512f;
    constexpr float c6 = 0.19134172f;
    constexpr float c7 = 0.09754516f;

    const float2 p = mix(x[0], c4, x[4],  c4);
    const float2 q = mix(x[0], c4, x[4], -c4);
    const float2 r = mix(x[2], c2, x[6],  c6);
    const float2 s = mix(x[2], c6, x[6], -c2);

    const float2 e0 = add(p, r);
    const float2 e1 = add(q, s);
    const float2 e2 = sub(q, s);
    const float2 e3 = sub(p, r);

    const float2 o0 = add(mix(x[1], c1, x[3],  c3), mix(x[5],  c5, x[7],  c7));
    const float2 o1 = add(mix(x[1], c3, x[3], -c7), mix(x[5], -c1, x[7], -c5));
    const float2 o2 = add(mix(x[1], c5, x[3], -c1), mix(x[5],  c7, x[7],  c3));
    const float2 o3 = add(mix(x[1], c7, x[3], -c5), mix(x[5],  c3, x[7], -c1));

    x[0] = add(e0, o0);
    x[7] = sub(e0, o0);
    x[1] = add(e1, o1);
    x[6] = sub(e1, o1);
    x[2] = add(e2, o2);
    x[5] = sub(e2, o2);
    x[3] = add(e3, o3);
    x[4] = sub(e3, o3);
}

// the tile of one thread: coefficient (u, v) at tile[(8*u + v)*n_threads]
struct capsule_column {
    float2 * tile;
    int      ld;

    __device__ __forceinline__ float2 & at(int i) const { return tile[i*ld]; }

    __device__ __forceinline__ void load(const capsule_shared & s, const ggml_capsule_plan * plan, const capsule_lane & lane, const uint8_t * bytes) const {
        for (int i = 0; i < CAPSULE_TOKENS; ++i) {
            at(i) = make_float2(0.0f, 0.0f);
        }
        capsule_rows(plan, lane, bytes, [&](int row, float2 x) { at(s.place[row]) = x; });
    }

    // along the lines; afterwards column x has the coefficients u of the tokens (., x)
    __device__ __forceinline__ void lines(const capsule_shared & s, int h, int w) const {
        for (int u = 0; u < h; ++u) {
            float2 x[CAPSULE_SIDE];
#pragma unroll
            for (int v = 0; v < CAPSULE_SIDE; ++v) {
                x[v] = at(CAPSULE_SIDE*u + v);
            }
            inverse(s, w, x);
#pragma unroll
            for (int v = 0; v < CAPSULE_SIDE; ++v) {
                at(CAPSULE_SIDE*u + v) = x[v];
            }
        }
    }

    // the tokens (y, i_x) of column i_x; y from h on: nothing that means anything
    __device__ __forceinline__ void tokens(const capsule_shared & s, int h, int i_x, float2 * x) const {
#pragma unroll
        for (int u = 0; u < CAPSULE_SIDE; ++u) {
            x[u] = at(CAPSULE_SIDE*u + i_x);
        }
        inverse(s, h, x);
    }

private:
    static __device__ __forceinline__ void inverse(const capsule_shared & s, int n, float2 * x) {
        if (n == CAPSULE_SIDE) {
            capsule_idct8(x);
        } else {
            capsule_idct(s.cosines[n], x);
        }
    }
};

//
// a slot
//

struct capsule_slot {
    const ggml_capsule_tile_form * form;

    const uint8_t * bytes;
    int             token;   // its first column
    int             pattern; // the first row of its tokens' angles
};

static __device__ __forceinline__ capsule_slot capsule_slot_of(const capsule_tile_args & args, int i) {
    const auto * head  = (const ggml_capsule_tile_tables *) args.tables;
    const auto * forms = (const ggml_capsule_tile_form *) (args.tables + head->forms);

    return { forms + args.slots[4*i + 1], args.pool + (size_t) args.slots[4*i]*64, args.slots[4*i + 3], args.slots[4*args.n_slots + i] };
}

static __device__ __forceinline__ const ggml_capsule_plan * capsule_plan_of(const capsule_tile_args & args, const capsule_slot & slot, int head, bool is_v) {
    const auto * f = slot.form;

    return (const ggml_capsule_plan *) (args.tables + (is_v ? f->v_plan + head*f->v_stride : f->k_plan + head*f->k_stride));
}

static __device__ __forceinline__ const uint8_t * capsule_bytes_of(const capsule_tile_args & args, const capsule_slot & slot, int head, bool is_v) {
    return slot.bytes + ((const uint32_t *) (args.tables + (is_v ? slot.form->v_offset : slot.form->k_offset)))[head];
}

static __device__ __forceinline__ const float * capsule_floats(const capsule_tile_args & args, int offset) {
    return offset == 0 ? nullptr : (const float *) (args.tables + offset);
}

static __device__ __forceinline__ const float * capsule_mean_of(const capsule_tile_args & args, int head, bool is_v) {
    const auto  * t   = (const ggml_capsule_tile_tables *) args.tables;
    const float * res = capsule_floats(args, is_v ? t->v_mean : t->k_mean);

    return res ? res + head*(is_v ? args.p.d_v : args.p.d_k) : nullptr;
}

static __device__ __forceinline__ const float * capsule_axes_of(const capsule_tile_args & args, int head) {
    const float * res = capsule_floats(args, ((const ggml_capsule_tile_tables *) args.tables)->v_axes);

    return res ? res + (size_t) head*args.p.d_v*args.p.d_v : nullptr;
}

// cosine and sine of this thread's pair
static __device__ __forceinline__ float2 capsule_angle(const capsule_tile_args & args, int row, int thread) {
    const float * at = args.angles + (size_t) row*args.ld_angles + thread;

    return make_float2(at[0], at[args.ld_angles/2]);
}

static __device__ __forceinline__ float2 capsule_turn(float2 x, float2 angle) {
    return make_float2(x.x*angle.x - x.y*angle.y, x.x*angle.y + x.y*angle.x);
}

// the mean of both channels
static __device__ __forceinline__ float2 capsule_mean(const float * mean, const capsule_lane & lane) {
    return make_float2(mean && lane.a >= 0 ? mean[lane.a] : 0.0f, mean && lane.b >= 0 ? mean[lane.b] : 0.0f);
}

//
// unpack: a block is a slot and a KV head
//

static __host__ __device__ inline size_t capsule_unpack_shared(int n_threads) {
    return sizeof(capsule_shared) + (size_t) CAPSULE_TOKENS*n_threads*sizeof(float2);
}

static __device__ __forceinline__ void capsule_unpack(const capsule_tile_args & args, char * shared) {
    capsule_shared & s = *(capsule_shared *) shared;

    const bool is_v = args.p.flags & GGML_CAPSULE_FLAG_V;
    const int  head = blockIdx.y;
    const int  d    = is_v ? args.p.d_v : args.p.d_k;

    const capsule_slot   slot   = capsule_slot_of(args, blockIdx.x);
    const int            h      = slot.form->h;
    const int            w      = slot.form->w;
    const capsule_lane   lane   = capsule_lane_of(is_v ? args.v : args.k, threadIdx.x);
    const capsule_column column = { (float2 *) (shared + sizeof(capsule_shared)) + threadIdx.x, (int) blockDim.x };
    const float2         mean   = capsule_mean(capsule_mean_of(args, head, is_v), lane);
    const float        * axes   = is_v ? capsule_axes_of(args, head) : nullptr;

    capsule_init(s);
    capsule_init_places(s, h, w);
    __syncthreads();

    if (lane.a >= 0) {
        column.load(s, capsule_plan_of(args, slot, head, is_v), lane, capsule_bytes_of(args, slot, head, is_v));
        column.lines(s, h, w);
    }

    for (int i_x = 0; i_x < w; ++i_x) {
        float2 x[CAPSULE_SIDE];
        if (lane.a >= 0) {
            column.tokens(s, h, i_x, x);
        }
        if (axes) {
            // coefficients along the axes -> channels: the tokens of a column take the place of its coefficients
            if (lane.a >= 0) {
#pragma unroll
                for (int y = 0; y < CAPSULE_SIDE; ++y) {
                    column.at(CAPSULE_SIDE*y + i_x) = x[y];
                }
            }
            continue;
        }
        if (lane.a < 0) {
            continue;
        }
#pragma unroll
        for (int y = 0; y < CAPSULE_SIDE; ++y) {
            if (y >= h) {
                break;
            }
            const int token = y*w + i_x;

            float2 z = make_float2(x[y].x + mean.x, x[y].y + mean.y);
            if (!is_v && args.p.n_rot > 0) {
                z = capsule_turn(capsule_turn(z, capsule_angle(args, slot.pattern + token, threadIdx.x)), capsule_angle(args, blockIdx.x, threadIdx.x));
            }
            capsule_put(args.dst, head*d + lane.a, slot.token + token, z.x);
            if (lane.b >= 0) {
                capsule_put(args.dst, head*d + lane.b, slot.token + token, z.y);
            }
        }
    }
    if (!axes) {
        return;
    }

    __syncthreads();

    // places of all threads, [64 tokens][n_threads]
    const float2 * all = (const float2 *) (shared + sizeof(capsule_shared));
    for (int c = threadIdx.x; c < d; c += blockDim.x) {
        const float m = capsule_mean_of(args, head, true) ? capsule_mean_of(args, head, true)[c] : 0.0f;

        for (int y = 0; y < h; ++y) {
            float x[CAPSULE_SIDE] = { 0.0f };
            for (int i = 0; i < (int) blockDim.x; ++i) {
                const capsule_lane from = capsule_lane_of(args.v, i);
                if (from.a < 0) {
                    continue;
                }
                const float a = axes[c*d + from.a];
                const float b = from.b >= 0 ? axes[c*d + from.b] : 0.0f;
#pragma unroll
                for (int i_x = 0; i_x < CAPSULE_SIDE; ++i_x) {
                    const float2 z = all[(CAPSULE_SIDE*y + i_x)*blockDim.x + i];
                    x[i_x] += a*z.x + b*z.y;
                }
            }
#pragma unroll
            for (int i_x = 0; i_x < CAPSULE_SIDE; ++i_x) {
                if (i_x < w) {
                    capsule_put(args.dst, head*d + c, slot.token + y*w + i_x, x[i_x] + m);
                }
            }
        }
    }
}

//
// attention: a block is a KV head, a part and up to CAPSULE_QUERIES of its queries: rows j = token*n_gqa + i
//

static __host__ __device__ inline size_t capsule_attn_shared(const ggml_capsule_tile_params & p, int n_threads) {
    const size_t tile    = (size_t) CAPSULE_TOKENS*n_threads*sizeof(float2);
    const size_t queries = (size_t) CAPSULE_QUERIES*(p.d_k > p.d_v ? p.d_k : p.d_v)*sizeof(float);
    const size_t scores  = (size_t) n_threads/CAPSULE_WARP*CAPSULE_QUERIES*CAPSULE_TOKENS*sizeof(float);

    return sizeof(capsule_shared) + sizeof(capsule_shared_attn) + (tile > queries ? tile : queries) + scores;
}

// sums of 8 values over the lanes of a warp: afterwards lanes 4*i .. 4*i + 3 have that of value i
static __device__ __forceinline__ float capsule_reduce8(float (&x)[8]) {
    const int lane = threadIdx.x%CAPSULE_WARP;

#pragma unroll
    for (int n = 4, step = 16; n > 0; n /= 2, step /= 2) {
        const bool upper = lane & step;
#pragma unroll
        for (int i = 0; i < n; ++i) {
            const float give = upper ? x[i] : x[i + n];
            const float keep = upper ? x[i + n] : x[i];
            x[i] = keep + __shfl_xor_sync(0xffffffff, give, step);
        }
    }
    float res = x[0];
    res += __shfl_xor_sync(0xffffffff, res, 2);
    res += __shfl_xor_sync(0xffffffff, res, 1);
    return res;
}

static __device__ __forceinline__ float capsule_warp_max(float x) {
#pragma unroll
    for (int step = CAPSULE_WARP/2; step > 0; step /= 2) {
        x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, step));
    }
    return x;
}

static __device__ __forceinline__ float capsule_warp_sum(float x) {
#pragma unroll
    for (int step = CAPSULE_WARP/2; step > 0; step /= 2) {
        x += __shfl_xor_sync(0xffffffff, x, step);
    }
    return x;
}

struct capsule_attention {
    const capsule_tile_args & args;

    capsule_shared      & s;
    capsule_shared_attn & a;

    float * work;   // the tile, or [CAPSULE_QUERIES][d]
    float * scores; // [warps][CAPSULE_QUERIES][CAPSULE_TOKENS]

    int head;
    int part;
    int first; // row
    int n_q;

    capsule_lane k;
    capsule_lane v;

    float2 out[CAPSULE_QUERIES];

    __device__ __forceinline__ int n_gqa() const { return args.n_head/args.p.n_head_kv; }
    __device__ __forceinline__ int token_of(int q) const { return (first + q)/n_gqa(); }
    __device__ __forceinline__ int head_of (int q) const { return head*n_gqa() + (first + q)%n_gqa(); }

    __device__ __forceinline__ float2 query(int q) const {
        return make_float2(
                k.a < 0 ? 0.0f : args.p.scale*capsule_get(args.q, k.a, head_of(q), token_of(q)),
                k.b < 0 ? 0.0f : args.p.scale*capsule_get(args.q, k.b, head_of(q), token_of(q)));
    }

    // scores of n columns in a.w, -INFINITY where there is none -> weights
    __device__ __forceinline__ void softmax() {
        const int lane = threadIdx.x%CAPSULE_WARP;

        for (int q = threadIdx.x/CAPSULE_WARP; q < n_q; q += blockDim.x/CAPSULE_WARP) {
            float * w = a.w[q];

            const float x0  = w[lane];
            const float x1  = w[lane + CAPSULE_WARP];
            const float max = fmaxf(a.max[q], capsule_warp_max(fmaxf(x0, x1)));

            // what is not a number stays one: fmaxf() passes it over, the weights do not
            const float w0  = max == -INFINITY && x0 == -INFINITY ? 0.0f : expf(x0 - max);
            const float w1  = max == -INFINITY && x1 == -INFINITY ? 0.0f : expf(x1 - max);
            const float sum = capsule_warp_sum(w0 + w1);

            w[lane]                = w0;
            w[lane + CAPSULE_WARP] = w1;
            __syncwarp();

            if (lane == 0) {
                const float f = a.max[q] == -INFINITY ? 0.0f : expf(a.max[q] - max);

                a.scale[q] = f;
                a.sum  [q] = f*a.sum[q] + sum;
                a.max  [q] = max;
            }
        }
        __syncthreads();
    }

    // the scores of a slot, by place of their tokens
    __device__ __forceinline__ void slot_scores(int i_slot, const capsule_slot & slot) {
        const int h = slot.form->h;
        const int w = slot.form->w;

        const capsule_column column = { (float2 *) work + threadIdx.x, (int) blockDim.x };

        float2 qs[CAPSULE_QUERIES];
        float2 mean = make_float2(0.0f, 0.0f);
        if (k.a >= 0) {
            column.load(s, capsule_plan_of(args, slot, head, false), k, capsule_bytes_of(args, slot, head, false));
            column.lines(s, h, w);
            mean = capsule_mean(capsule_mean_of(args, head, false), k);
        }
#pragma unroll
        for (int q = 0; q < CAPSULE_QUERIES; ++q) {
            qs[q] = make_float2(0.0f, 0.0f);
            if (q < n_q) {
                qs[q] = query(q);
                if (args.p.n_rot > 0 && k.a >= 0) {
                    // the turn of the first token, back; YaRN's scale comes with it
                    const float2 first_turn = capsule_angle(args, i_slot, threadIdx.x);
                    qs[q] = capsule_turn(qs[q], make_float2(first_turn.x, -first_turn.y));
                }
            }
        }

        float * to = scores + threadIdx.x/CAPSULE_WARP*CAPSULE_QUERIES*CAPSULE_TOKENS;

        for (int i_x = 0; i_x < w; ++i_x) {
            float2 x[CAPSULE_SIDE];
#pragma unroll
            for (int y = 0; y < CAPSULE_SIDE; ++y) {
                x[y] = make_float2(0.0f, 0.0f);
            }
            if (k.a >= 0) {
                column.tokens(s, h, i_x, x);
#pragma unroll
                for (int y = 0; y < CAPSULE_SIDE; ++y) {
                    x[y] = make_float2(x[y].x + mean.x, x[y].y + mean.y);
                    if (args.p.n_rot > 0 && y < h) {
                        x[y] = capsule_turn(x[y], capsule_angle(args, slot.pattern + y*w + i_x, threadIdx.x));
                    }
                }
            }
#pragma unroll
            for (int q = 0; q < CAPSULE_QUERIES; ++q) {
                if (q < n_q) {
                    float dot[CAPSULE_SIDE];
#pragma unroll
                    for (int y = 0; y < CAPSULE_SIDE; ++y) {
                        dot[y] = qs[q].x*x[y].x + qs[q].y*x[y].y;
                    }
                    const float sum = capsule_reduce8(dot);
                    if (threadIdx.x%4 == 0) {
                        to[q*CAPSULE_TOKENS + CAPSULE_SIDE*(threadIdx.x%CAPSULE_WARP/4) + i_x] = sum;
                    }
                }
            }
        }
        __syncthreads();

        for (int i = threadIdx.x; i < n_q*CAPSULE_TOKENS; i += blockDim.x) {
            const int q = i/CAPSULE_TOKENS;
            const int y = i%CAPSULE_TOKENS/CAPSULE_SIDE;
            const int x = i%CAPSULE_SIDE;

            float sum = -INFINITY;
            if (y < h && x < w) {
                const int kind = *(const int8_t *) (args.seen.data + i_slot + token_of(q)*args.seen.nb1);
                const float add = kind == 2 ? capsule_get(args.cold, slot.token + y*w + x, token_of(q), 0) : 0.0f;
                if (kind != 0 && add != -INFINITY) {
                    sum = add;
                    for (int warp = 0; warp < (int) blockDim.x/CAPSULE_WARP; ++warp) {
                        sum += scores[warp*CAPSULE_QUERIES*CAPSULE_TOKENS + i];
                    }
                }
            }
            a.w[q][i%CAPSULE_TOKENS] = sum;
        }
        __syncthreads();
    }

    // the cosine transform of the weights: sum_t w_t v_t = sum_r (T w)_r c_r
    __device__ __forceinline__ void transform_weights(int h, int w) {
        for (int i = threadIdx.x; i < n_q*CAPSULE_TOKENS; i += blockDim.x) {
            const float * from = a.w[i/CAPSULE_TOKENS] + i%CAPSULE_TOKENS/CAPSULE_SIDE*CAPSULE_SIDE;
            const float * c    = s.cosines[w][i%CAPSULE_SIDE];

            float sum = 0.0f;
#pragma unroll
            for (int x = 0; x < CAPSULE_SIDE; ++x) {
                sum += c[x]*from[x];
            }
            a.tmp[0][i] = sum;
        }
        __syncthreads();

        for (int i = threadIdx.x; i < n_q*CAPSULE_TOKENS; i += blockDim.x) {
            const float * from = a.tmp[i/CAPSULE_TOKENS] + i%CAPSULE_SIDE;
            const float * c    = s.cosines[h][i%CAPSULE_TOKENS/CAPSULE_SIDE];

            float sum = 0.0f;
#pragma unroll
            for (int y = 0; y < CAPSULE_SIDE; ++y) {
                sum += c[y]*from[CAPSULE_SIDE*y];
            }
            a.w[0][i] = sum;
        }
        __syncthreads();
    }

    __device__ __forceinline__ void scale_out() {
#pragma unroll
        for (int q = 0; q < CAPSULE_QUERIES; ++q) {
            if (q < n_q) {
                out[q] = make_float2(out[q].x*a.scale[q], out[q].y*a.scale[q]);
            }
        }
    }

    __device__ __forceinline__ void slots() {
        int h = 0;
        int w = 0;

        const int end = (int64_t) args.n_slots*(part + 1)/args.p.n_parts;
        for (int i = (int64_t) args.n_slots*part/args.p.n_parts; i < end; ++i) {
            // does any of them see it?
            bool any = false;
            for (int q = 0; q < n_q; ++q) {
                any = any || *(const int8_t *) (args.seen.data + i + token_of(q)*args.seen.nb1) != 0;
            }
            if (!any) {
                continue;
            }

            const capsule_slot slot = capsule_slot_of(args, i);
            if (slot.form->h != h || slot.form->w != w) {
                h = slot.form->h;
                w = slot.form->w;
                __syncthreads();
                capsule_init_places(s, h, w);
            }
            __syncthreads();

            slot_scores(i, slot);
            softmax();
            scale_out();
            transform_weights(h, w);

            if (v.a >= 0) {
                capsule_rows(capsule_plan_of(args, slot, head, true), v, capsule_bytes_of(args, slot, head, true), [&](int row, float2 x) {
                    const int place = s.place[row];
#pragma unroll
                    for (int q = 0; q < CAPSULE_QUERIES; ++q) {
                        if (q < n_q) {
                            out[q] = make_float2(out[q].x + a.w[q][place]*x.x, out[q].y + a.w[q][place]*x.y);
                        }
                    }
                });
            }
        }
    }

    // from the axes of V to its channels, and the mean; slots alone have them
    __device__ __forceinline__ void turn_out() {
        const float * axes = capsule_axes_of(args, head);
        const float * mean = capsule_mean_of(args, head, true);
        const int     d    = args.p.d_v;

        __syncthreads();
        if (axes) {
            if (v.a >= 0) {
#pragma unroll
                for (int q = 0; q < CAPSULE_QUERIES; ++q) {
                    work[q*d + v.a] = out[q].x;
                    if (v.b >= 0) {
                        work[q*d + v.b] = out[q].y;
                    }
                }
            }
            __syncthreads();

            if (v.a >= 0) {
#pragma unroll
                for (int q = 0; q < CAPSULE_QUERIES; ++q) {
                    out[q] = make_float2(0.0f, 0.0f);
                }
                for (int j = 0; j < d; ++j) {
                    const float x = axes[v.a*d + j];
                    const float y = v.b >= 0 ? axes[v.b*d + j] : 0.0f;
#pragma unroll
                    for (int q = 0; q < CAPSULE_QUERIES; ++q) {
                        if (q < n_q) {
                            out[q] = make_float2(out[q].x + x*work[q*d + j], out[q].y + y*work[q*d + j]);
                        }
                    }
                }
            }
            __syncthreads();
        }
        const float2 m = capsule_mean(mean, v);
#pragma unroll
        for (int q = 0; q < CAPSULE_QUERIES; ++q) {
            if (q < n_q) {
                out[q] = make_float2(out[q].x + a.sum[q]*m.x, out[q].y + a.sum[q]*m.y);
            }
        }
    }

    __device__ __forceinline__ void cells() {
        const int d    = args.p.d_k;
        const int lane = threadIdx.x%CAPSULE_WARP;

        __syncthreads();
        for (int i = threadIdx.x; i < CAPSULE_QUERIES*d; i += blockDim.x) {
            work[i] = i/d < n_q ? args.p.scale*capsule_get(args.q, i%d, head_of(i/d), token_of(i/d)) : 0.0f;
        }
        __syncthreads();

        const int end = (int64_t) args.n_kv*(part + 1)/args.p.n_parts;
        for (int col = (int64_t) args.n_kv*part/args.p.n_parts; col < end; col += CAPSULE_TOKENS) {
            const int n = end - col < CAPSULE_TOKENS ? end - col : CAPSULE_TOKENS;

            // a warp has a cell at a time
            for (int c = threadIdx.x/CAPSULE_WARP; c < CAPSULE_TOKENS; c += blockDim.x/CAPSULE_WARP) {
                float dot[CAPSULE_QUERIES] = { 0.0f };
                for (int i = lane; c < n && i < d; i += CAPSULE_WARP) {
                    const float x = capsule_get(args.hot_k, i, head, col + c);
#pragma unroll
                    for (int q = 0; q < CAPSULE_QUERIES; ++q) {
                        dot[q] += x*work[q*d + i];
                    }
                }
                const float sum = capsule_reduce8(dot);
                const int   q   = lane/4;
                if (lane%4 == 0 && q < n_q) {
                    const float add = c < n ? capsule_get(args.mask, col + c, token_of(q), 0) : -INFINITY;
                    a.w[q][c] = add == -INFINITY ? -INFINITY : sum + add;
                }
            }
            __syncthreads();

            softmax();
            scale_out();

            for (int c = 0; c < n && v.a >= 0; ++c) {
                // a cell that nobody sees may hold anything
                bool any = false;
                for (int q = 0; q < n_q; ++q) {
                    any = any || a.w[q][c] != 0.0f;
                }
                if (!any) {
                    continue;
                }
                const float x = capsule_get(args.hot_v, v.a, head, col + c);
                const float y = v.b >= 0 ? capsule_get(args.hot_v, v.b, head, col + c) : 0.0f;
#pragma unroll
                for (int q = 0; q < CAPSULE_QUERIES; ++q) {
                    if (q < n_q) {
                        out[q] = make_float2(out[q].x + a.w[q][c]*x, out[q].y + a.w[q][c]*y);
                    }
                }
            }
            __syncthreads();
        }
    }

    // [n_head_kv][rows][d_v] of a part, then the largest scores, then the sums of the weights
    __device__ __forceinline__ void store() const {
        const int d     = args.p.d_v;
        const int n_all = n_gqa()*args.n_tokens;

        float * to = (float *) ((char *) args.dst.data + part*args.dst.nb2) + (size_t) head*n_all*(d + 2);

#pragma unroll
        for (int q = 0; q < CAPSULE_QUERIES; ++q) {
            if (q >= n_q) {
                break;
            }
            const int row = first + q;
            if (v.a >= 0) {
                to[row*d + v.a] = out[q].x;
                if (v.b >= 0) {
                    to[row*d + v.b] = out[q].y;
                }
            }
            if (threadIdx.x == 0) {
                to[n_all*d + row]       = a.max[q];
                to[n_all*(d + 1) + row] = a.sum[q];
            }
        }
    }
};

static __device__ __forceinline__ void capsule_attend(const capsule_tile_args & args, char * shared) {
    capsule_shared      & s = *(capsule_shared *) shared;
    capsule_shared_attn & a = *(capsule_shared_attn *) (shared + sizeof(capsule_shared));

    float * scores = (float *) (shared + sizeof(capsule_shared) + sizeof(capsule_shared_attn));
    float * work   = scores + blockDim.x/CAPSULE_WARP*CAPSULE_QUERIES*CAPSULE_TOKENS;

    const int first = blockIdx.z*CAPSULE_QUERIES;
    const int n_all = args.n_head/args.p.n_head_kv*args.n_tokens;

    capsule_attention call = {
        args, s, a, work, scores, (int) blockIdx.x, (int) blockIdx.y, first, n_all - first < CAPSULE_QUERIES ? n_all - first : CAPSULE_QUERIES,
        capsule_lane_of(args.k, threadIdx.x), capsule_lane_of(args.v, threadIdx.x), {},
    };

    capsule_init(s);
    if (threadIdx.x < CAPSULE_QUERIES) {
        a.max[threadIdx.x] = -INFINITY;
        a.sum[threadIdx.x] = 0.0f;
    }
#pragma unroll
    for (int q = 0; q < CAPSULE_QUERIES; ++q) {
        call.out[q] = make_float2(0.0f, 0.0f);
    }
    __syncthreads();

    call.slots();
    call.turn_out();
    call.cells();
    call.store();
}

// parts -> the result; a block is a row of it
static __device__ __forceinline__ void capsule_combine(const capsule_tile_args & args) {
    const int d     = args.p.d_v;
    const int n_gqa = args.n_head/args.p.n_head_kv;
    const int n_all = n_gqa*args.n_tokens;
    const int head  = blockIdx.x%args.n_head;
    const int row   = blockIdx.x/args.n_head*n_gqa + head%n_gqa;

    const auto part = [&](int i) { return (const float *) (args.q.data + i*args.q.nb2) + (size_t) (head/n_gqa)*n_all*(d + 2); };

    float max = -INFINITY;
    for (int i = 0; i < (int) args.p.n_parts; ++i) {
        max = fmaxf(max, part(i)[n_all*d + row]);
    }
    for (int c = threadIdx.x; c < d; c += blockDim.x) {
        float sum = 0.0f;
        float out = 0.0f;
        for (int i = 0; i < (int) args.p.n_parts; ++i) {
            const float f = part(i)[n_all*d + row] == -INFINITY ? 0.0f : expf(part(i)[n_all*d + row] - max);

            sum += f*part(i)[n_all*(d + 1) + row];
            out += f*part(i)[row*d + c];
        }
        // a token that sees nothing gets zeros
        ((float *) args.dst.data)[(size_t) blockIdx.x*d + c] = sum == 0.0f ? 0.0f : out/sum;
    }
}
