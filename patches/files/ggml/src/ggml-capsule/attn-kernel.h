#pragma once

#include "attn.h"
#include "attn-codes.h"
#include "dct.h"

#include <algorithm>
#include <cmath>
#include <vector>

//
// Attention of the queries of one KV head over tiles, in 16-bit integers.
//
// K: rows -> integers -> inverse DCT by butterflies, vectors across the channels -> turned along the line -> dot products with
//    queries that are turned to the middle of each line. What the registers were mixed with is a reflection of each RoPE pair:
//    it turns the angles around and goes into the queries, so it is never undone.
// V: the weights of the tokens -> DCT -> weights of the rows; V is never formed. Rows of up to 3 bits have weights of 8 bits,
//    those of more bits 16. Mixed registers and axes are undone once for each output.
//

template<typename V>
struct capsule_kernel {
    typedef typename V::T T;

    static constexpr int W     = V::W;
    static constexpr int NG    = W/GGML_CAPSULE_LANES; // groups side by side in a vector
    static constexpr int SIDE  = GGML_CAPSULE_SIDE;
    static constexpr int PITCH = 2*W;                  // of a tile, from column to column; both registers
    static constexpr int LINE  = SIDE*PITCH + 32;      // from line to line; a power of 2 would meet itself in the cache
    static constexpr int TILE  = SIDE*LINE;            // of NG groups
    static constexpr int N     = ggml_capsule_shape::N;
    static constexpr int ROWS  = 8;                    // queries at once
    static constexpr int QUERIES = ROWS*PITCH + 32;    // of a line and NG groups
    static constexpr int WIDE  = 4*GGML_CAPSULE_LANES*2*GGML_CAPSULE_MAX_BLOCKS + GGML_CAPSULE_PAD; // codes of a group, at most

    // bytes that will be needed soon are fetched a line at a time
    struct fetcher {
        const char * at  = nullptr;
        const char * end = nullptr;

        void step() {
            for (int i = 0; i < NG && at < end; ++i, at += 64) {
                _mm_prefetch(at, _MM_HINT_T0);
            }
        }
    };

    struct weights { // of a query, in the order of the blocks
        alignas(32) float a[N]; // of the sums of pairs, or of single rows
        alignas(32) float b[N]; // of their differences
        alignas(32) float most[N]; // the larger magnitude
    };

    struct packed { // of a query and a group: weights times scales, two rows beside each other
        alignas(32) int32_t low [N]; // 8 bits, twice: blocks of up to 3 bits
        alignas(32) int32_t high[N]; // 16 bits: blocks of more
        float low_unit;
        float high_unit;
        float bias; // what the zeros of the codes add up to
    };

    struct scales { // of a group of V
        alignas(32) float   low [N];
        alignas(32) float   high[N];
        alignas(32) int32_t zero_low [N]; // of the codes: 4 bytes, or 2 words
        alignas(32) int32_t zero_high[N];
    };

    const ggml_capsule_attn_args & args;

    int head;
    int n_rows;   // queries
    int n_k;      // groups
    int n_v;
    int n_tiles;  // of NG groups
    int n_lanes;  // of all groups of K, padded
    int n_line;   // int16 of all queries at one line

    int16_t * tile;
    int16_t * lines;    // [line][tile of NG groups][query, padded][register][W]
    float   * q_a;      // [n_rows][n_lanes], scaled to integers
    float   * q_b;
    float   * q_unit;   // [n_rows]
    float   * k_mean;   // [n_k][2][16], mixed
    float   * no_angles; // of a tile without RoPE
    ggml_capsule_rope * no_rope;
    int32_t * mul_a;    // [N]
    int32_t * mul_b;
    int32_t (*score)[GGML_CAPSULE_MAX_ROWS]; // [ROWS], x*8 + y; of several queries y*8 + x
    float   (*prob )[GGML_CAPSULE_MAX_ROWS];
    float   * masked;   // x*8 + y
    weights * wanted;   // [ROWS]
    packed  * ready;    // [ROWS][n_v]
    scales  * v_scales; // [n_v]
    uint8_t * wide;     // codes of a short group
    float   * out;      // [n_rows][n_v][2][16]
    float   * max;      // [n_rows]
    float   * sum;      // [n_rows]
    float   * turned;   // [2][n_v*32] one output
    float   * nothing;  // what is no one's output
    int     * visible;  // [n_rows]

    const ggml_capsule_shape * at_shape = nullptr;
    uint16_t at[GGML_CAPSULE_MAX_ROWS]; // where each row of a tile of at_shape is

    size_t place(char * work) {
        size_t size = 0;
        auto take = [&](auto & pointer, size_t n) {
            pointer = (std::remove_reference_t<decltype(pointer)>) (work + size);
            size += (n*sizeof(*pointer) + 63)/64*64;
        };
        n_rows  = args.n_tokens*args.n_gqa;
        n_k     = ggml_capsule_n_groups(args.k);
        n_v     = ggml_capsule_n_groups(args.v);
        n_tiles = (n_k + NG - 1)/NG;
        n_lanes = n_tiles*W;
        n_line  = n_tiles*QUERIES;

        take(tile,     (size_t) n_tiles*TILE);
        take(lines,    (size_t) SIDE*n_line);
        take(q_a,      (size_t) n_rows*n_lanes);
        take(q_b,      (size_t) n_rows*n_lanes);
        take(q_unit,   n_rows);
        take(k_mean,   n_k*2*GGML_CAPSULE_LANES);
        take(no_angles, 2*n_lanes);
        take(mul_a,    N);
        take(mul_b,    N);
        take(score,    ROWS);
        take(prob,     ROWS);
        take(masked,   GGML_CAPSULE_MAX_ROWS);
        take(wanted,   ROWS);
        take(ready,    (size_t) ROWS*n_v);
        take(v_scales, n_v);
        take(wide,     WIDE);
        take(out,      (size_t) n_rows*n_v*2*GGML_CAPSULE_LANES);
        take(max,      n_rows);
        take(sum,      n_rows);
        take(turned,   n_v*4*GGML_CAPSULE_LANES);
        take(nothing,  2*GGML_CAPSULE_LANES);
        take(visible,  n_rows);
        no_rope = (ggml_capsule_rope *) (work + size);
        return size + ggml_capsule_rope_size({ args.k.d, 0, 0 });
    }

    explicit capsule_kernel(const ggml_capsule_attn_args & args) : args(args) {}

    capsule_kernel(const ggml_capsule_attn_args & args, int head, void * work) : args(args), head(head) {
        place((char *) work);
        std::fill(tile, tile + (size_t) n_tiles*TILE, (int16_t) 0);
        if (!args.ropes) {
            const ggml_capsule_channels plain = { args.k.d, 0, 0 };
            ggml_capsule_rope_init(no_rope, plain, nullptr, nullptr);
            ggml_capsule_angles_init(no_angles, plain, nullptr, 1.0f);
        }

        const float * mean = args.k_mean ? args.k_mean + (size_t) head*args.k.d : nullptr;
        for (int g = 0; g < n_k; ++g) {
            for (int i = 0; i < GGML_CAPSULE_LANES; ++i) {
                mix_into(mean, g, i, k_mean[(2*g)*GGML_CAPSULE_LANES + i], k_mean[(2*g + 1)*GGML_CAPSULE_LANES + i]);
            }
        }
        for (int j = 0; j < n_rows; ++j) {
            load_query(j);
        }
        std::fill(out, out + (size_t) n_rows*n_v*2*GGML_CAPSULE_LANES, 0.0f);
        std::fill(max, max + n_rows, -INFINITY);
        std::fill(sum, sum + n_rows, 0.0f);
    }

    static size_t work_size(const ggml_capsule_attn_args & args) {
        return capsule_kernel(args).place(nullptr);
    }

    // the two channels at a lane, mixed as the registers of K are
    void mix_into(const float * x, int g, int lane, float & a, float & b) const {
        a = b = 0.0f;
        if (x && lane < ggml_capsule_n_lanes(args.k, g)) {
            const int   cb = ggml_capsule_channel(args.k, g, 1, lane);
            const float xa = x[ggml_capsule_channel(args.k, g, 0, lane)];
            const float xb = cb < 0 ? 0.0f : x[cb];
            a = (xa + xb)*0.70710678f;
            b = (xa - xb)*0.70710678f;
        }
    }

    // so that neither 16 bits nor sums of 32 bits overflow: see scores()
    void load_query(int j) {
        const float * q = args.q + j/args.n_gqa*args.q_token + (head*args.n_gqa + j % args.n_gqa)*args.q_head;

        float * a = q_a + (size_t) j*n_lanes;
        float * b = q_b + (size_t) j*n_lanes;
        float most = 1e-30f;
        for (int i = 0; i < n_lanes; ++i) {
            a[i] = b[i] = 0.0f;
            if (i < GGML_CAPSULE_LANES*n_k) {
                mix_into(q, i/GGML_CAPSULE_LANES, i % GGML_CAPSULE_LANES, a[i], b[i]);
            }
            most = std::max(most, a[i]*a[i] + b[i]*b[i]);
        }
        const float f = (args.k.d > 256 ? 8190 : 16380)/std::sqrt(most);
        for (int i = 0; i < n_lanes; ++i) {
            a[i] *= f;
            b[i] *= f;
        }
        q_unit[j] = 4/f; // lines are a quarter
    }

    //
    // keys
    //

    // scales of 8 blocks of a group, from number 8*i
    CAPSULE_INLINE __m256 block_scales(const ggml_capsule_plan_group & group, const uint8_t * bytes, int i, int high) {
        const __m128i x = _mm_loadu_si128((const __m128i *) (bytes + group.source[i]));
        return _mm256_cvtph_ps(_mm_shuffle_epi8(x, _mm_loadu_si128((const __m128i *) group.shuffle[high][i])));
    }

    static __m256i twice(__m256i x) { // the low halves of 32 bits
        const __m128i i = _mm_setr_epi8(0, 1, 0, 1, 4, 5, 4, 5, 8, 9, 8, 9, 12, 13, 12, 13);
        return _mm256_shuffle_epi8(x, _mm256_broadcastsi128_si256(i));
    }

    // what the sums and differences of the codes, as multiply_codes() has them, are multiplied by
    CAPSULE_ALONE void key_multipliers(const ggml_capsule_shape & shape, const ggml_capsule_plan_group & group, const uint8_t * bytes,
            float step, int32_t * mul_a, int32_t * mul_b) {
        const __m256 f = _mm256_set1_ps(1/step);
        for (int i = 0; 8*i < shape.n_blocks; ++i) {
            __m256 s = _mm256_or_ps(block_scales(group, bytes, i, 0), block_scales(group, bytes, i, 1));
            // times 2^(1 + bits), at least 2^3; no scale stays as good as none
            __m256i e = _mm256_cvtepu8_epi32(_mm_max_epu8(_mm_loadl_epi64((const __m128i *) (group.bits + 8*i)), _mm_set1_epi8(2)));
            e = _mm256_slli_epi32(_mm256_add_epi32(e, _mm256_set1_epi32(1)), 23);
            s = _mm256_mul_ps(f, _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(s), e)));
            const __m256i a = _mm256_cvtps_epi32(_mm256_mul_ps(s, _mm256_load_ps(shape.pair_a + 8*i)));
            const __m256i b = _mm256_cvtps_epi32(_mm256_mul_ps(s, _mm256_load_ps(shape.pair_b + 8*i)));
            _mm256_store_si256((__m256i *) (mul_a + 8*i), twice(a));
            _mm256_store_si256((__m256i *) (mul_b + 8*i), twice(b));
        }
    }

    // n pairs of rows of B bits
    template<int B>
    CAPSULE_INLINE const uint8_t * key_pairs(const uint8_t * p, const uint8_t * pair, int n,
            const uint16_t * at, const int32_t * mul_a, const int32_t * mul_b, int16_t * o, fetcher & fetch) {
        const __m256i plus  = _mm256_set1_epi16(0x4040);
        const __m256i minus = _mm256_set1_epi16((short) 0xc040);
        const __m256i zero  = _mm256_set1_epi16(B == 1 ? 8192 : 16384); // of two codes
        fetcher next = fetch; // in registers
        for (int i = 0; i < n; ++i, p += 8*B) {
            if (i % 4 == 3) {
                next.step();
            }
            __m256i a, b;
            capsule_codes_high<B, false>(p, a, b);
            const int j = pair[i];
            const __m256i ma = capsule_all(mul_a + j);
            const __m256i mb = capsule_all(mul_b + j);
            int16_t * o0 = o + at[2*j - 1];
            int16_t * o1 = o + at[2*j];
            store(o0,     _mm256_mulhrs_epi16(_mm256_sub_epi16(_mm256_maddubs_epi16(a, plus), zero), ma));
            store(o0 + GGML_CAPSULE_LANES, _mm256_mulhrs_epi16(_mm256_sub_epi16(_mm256_maddubs_epi16(b, plus), zero), ma));
            store(o1,     _mm256_mulhrs_epi16(_mm256_maddubs_epi16(a, minus), mb));
            store(o1 + GGML_CAPSULE_LANES, _mm256_mulhrs_epi16(_mm256_maddubs_epi16(b, minus), mb));
        }
        fetch = next;
        return p;
    }

    template<int B>
    CAPSULE_INLINE void key_lone(const uint8_t * p, int32_t mul, int16_t * o) {
        const __m256i plus = _mm256_set1_epi16(0x4040);
        const __m256i zero = _mm256_set1_epi16(B == 1 ? 4096 : 8192);
        const __m256i m    = _mm256_set1_epi32(mul);
        __m256i a, b;
        capsule_codes_high<B, true>(p, a, b);
        store(o,     _mm256_mulhrs_epi16(_mm256_sub_epi16(_mm256_maddubs_epi16(a, plus), zero), m));
        store(o + GGML_CAPSULE_LANES, _mm256_mulhrs_epi16(_mm256_sub_epi16(_mm256_maddubs_epi16(b, plus), zero), m));
    }

    static void store(int16_t * o, __m256i x) { _mm256_store_si256((__m256i *) o, x); }

    // 16 numbers as integers
    CAPSULE_INLINE __m256i words(__m256 x0, __m256 x1) {
        return _mm256_permute4x64_epi64(_mm256_packs_epi32(_mm256_cvtps_epi32(x0), _mm256_cvtps_epi32(x1)), 0xd8);
    }

    CAPSULE_INLINE void store_floats(int16_t * o, __m256 x0, __m256 x1) {
        store(o, words(x0, x1));
    }

    CAPSULE_INLINE __m256 halves(const uint8_t * p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) p)); }

    // codes of a single row, as numbers: [2][16]
    template<int B>
    CAPSULE_INLINE void lone_floats(const uint8_t * p, float scale, float * o) {
        __m256i x[2];
        capsule_codes_low<B, true>(p, x[0], x[1]);
        const __m256 s = _mm256_set1_ps(scale);
        const __m256 z = _mm256_set1_ps(-(float) (1 << (B - 1)));
        for (int i = 0; i < 4; ++i) {
            const __m128i half = i % 2 ? _mm256_extracti128_si256(x[i/2], 1) : _mm256_castsi256_si128(x[i/2]);
            _mm256_storeu_ps(o + 8*i, _mm256_mul_ps(s, _mm256_add_ps(z, _mm256_cvtepi32_ps(_mm256_cvtepu16_epi32(half)))));
        }
    }

    // calls f(std::integral_constant<int, bits>())
    template<typename F>
    CAPSULE_INLINE void with_bits(int bits, F f) {
        switch (bits) {
            case 1: f(std::integral_constant<int, 1>()); break;
            case 2: f(std::integral_constant<int, 2>()); break;
            case 3: f(std::integral_constant<int, 3>()); break;
            case 4: f(std::integral_constant<int, 4>()); break;
            case 6: f(std::integral_constant<int, 6>()); break;
            case 8: f(std::integral_constant<int, 8>()); break;
        }
    }

    // the constant row, which holds the mean: in floats
    CAPSULE_ALONE const uint8_t * key_first(const ggml_capsule_shape & shape, const ggml_capsule_plan * plan, const ggml_capsule_plan_group & group,
            const uint8_t * p, float scale, const float * mean, float step, int16_t * o) {
        alignas(32) float x[2*GGML_CAPSULE_LANES] = {};
        if (group.first == GGML_CAPSULE_F16) {
            for (int i = 0; i < 2*GGML_CAPSULE_LANES; i += 8) {
                _mm256_store_ps(x + i, halves(p + 2*i));
            }
        } else {
            with_bits(group.first, [&](auto b) { lone_floats<decltype(b)::value>(p, scale, x); });
        }
        const __m256 m = _mm256_set1_ps(std::sqrt((float) (plan->h*plan->w)));
        const __m256 f = _mm256_set1_ps(shape.factor[0]/step);
        for (int i = 0; i < 2; ++i) {
            const float * y  = x    + GGML_CAPSULE_LANES*i;
            const float * mu = mean + GGML_CAPSULE_LANES*i;
            store_floats(o + GGML_CAPSULE_LANES*i, _mm256_mul_ps(f, _mm256_fmadd_ps(m, _mm256_load_ps(mu),     _mm256_load_ps(y))),
                                  _mm256_mul_ps(f, _mm256_fmadd_ps(m, _mm256_load_ps(mu + 8), _mm256_load_ps(y + 8))));
        }
        return p + ggml_capsule_code_size(group.first, 1, GGML_CAPSULE_LANES);
    }

    // pairs, or a single row, in f16
    CAPSULE_ALONE void key_halves(const uint8_t * p, bool pair, float fa, float fb, int16_t * o0, int16_t * o1) {
        for (int i = 0; i < 2; ++i) {
            const uint8_t * x = p + 32*i;
            const uint8_t * y = x + 64;
            const __m256 a  = _mm256_set1_ps(fa);
            const __m256 b  = _mm256_set1_ps(fb);
            const __m256 x0 = halves(x);
            const __m256 x1 = halves(x + 16);
            const __m256 y0 = pair ? halves(y)      : _mm256_setzero_ps();
            const __m256 y1 = pair ? halves(y + 16) : _mm256_setzero_ps();
            store_floats(o0 + GGML_CAPSULE_LANES*i, _mm256_mul_ps(a, _mm256_add_ps(x0, y0)), _mm256_mul_ps(a, _mm256_add_ps(x1, y1)));
            if (pair) {
                store_floats(o1 + GGML_CAPSULE_LANES*i, _mm256_mul_ps(b, _mm256_sub_ps(x0, y0)), _mm256_mul_ps(b, _mm256_sub_ps(x1, y1)));
            }
        }
    }

    CAPSULE_ALONE void key_group(const ggml_capsule_shape & shape, const ggml_capsule_plan * plan, int g, const uint8_t * bytes, float step,
            const float * mean, const uint16_t * at, int32_t * mul_a, int32_t * mul_b, uint8_t * wide, int16_t * o, fetcher & next) {
        const auto & group = plan->groups[g];

        const uint8_t * p = bytes + group.code;
        if (group.n_lanes < GGML_CAPSULE_LANES) {
            capsule_widen(plan, g, p, wide);
            p = wide;
        }
        key_multipliers(shape, group, bytes, step, mul_a, mul_b);
        const float scale = group.first == GGML_CAPSULE_F16 ? 0.0f : _mm256_cvtss_f32(_mm256_or_ps(block_scales(group, bytes, 0, 0), block_scales(group, bytes, 0, 1)));
        p = key_first(shape, plan, group, p, scale, mean, step, o);

        const uint8_t * pair = group.pair;
        for (int i = 0; i < group.n_pairs[0]; ++i, ++pair, p += 8*GGML_CAPSULE_F16) {
            key_halves(p, true, shape.pair_a[*pair]/step, shape.pair_b[*pair]/step, o + at[2**pair - 1], o + at[2**pair]);
        }
        const uint8_t * n = group.n_pairs;
        p = key_pairs<8>(p, pair, n[1], at, mul_a, mul_b, o, next); pair += n[1];
        p = key_pairs<6>(p, pair, n[2], at, mul_a, mul_b, o, next); pair += n[2];
        p = key_pairs<4>(p, pair, n[3], at, mul_a, mul_b, o, next); pair += n[3];
        p = key_pairs<3>(p, pair, n[4], at, mul_a, mul_b, o, next); pair += n[4];
        p = key_pairs<2>(p, pair, n[5], at, mul_a, mul_b, o, next); pair += n[5];
        p = key_pairs<1>(p, pair, n[6], at, mul_a, mul_b, o, next); pair += n[6];
        for (; pair < group.pair + shape.n_pairs; ++pair) {
            clear(o + at[2**pair - 1]);
            clear(o + at[2**pair]);
        }
        if (shape.lone) {
            int16_t * last = o + at[2*shape.n_blocks - 3];
            const int i = shape.n_blocks - 1;
            if (group.last == 0) {
                clear(last);
            } else if (group.last == GGML_CAPSULE_F16) {
                key_halves(p, false, shape.pair_a[i]/step, 0.0f, last, nullptr);
            } else {
                with_bits(group.last, [&](auto b) { key_lone<decltype(b)::value>(p, mul_a[i], last); });
            }
        }
    }

    static void clear(int16_t * o) {
        store(o,     _mm256_setzero_si256());
        store(o + GGML_CAPSULE_LANES, _mm256_setzero_si256());
    }

    // along the lines: [u][v] -> [u][x], in place. The two registers of a group come beside each other, since what is stored
    // together should lie together; those of NG groups leave beside each other
    template<int N_W>
    CAPSULE_ALONE void pass_x(int16_t * tile, int n_tiles, int h, fetcher & fetch) {
        fetcher next = fetch;
        for (int j = 0; j < n_tiles; ++j) {
            for (int u = 0; u < h; ++u) {
                int16_t * p = tile + j*TILE + u*LINE;
                auto load = [&](int reg, T * x) {
                    next.step();
#pragma GCC unroll 8
                    for (int v = 0; v < N_W; ++v) {
                        x[v] = V::gather(p + v*PITCH + reg*GGML_CAPSULE_LANES, 2*GGML_CAPSULE_LANES);
                    }
                };
                auto turn = [&](int reg, T * x) {
                    capsule_idct<V, N_W>(x);
#pragma GCC unroll 8
                    for (int v = 0; v < N_W; ++v) {
                        V::store(p + v*PITCH + reg*W, x[v]);
                    }
                };
                T a[N_W], b[N_W];
                load(0, a);
                if (NG > 1) {
                    load(1, b);
                }
                turn(0, a);
                if (NG == 1) {
                    load(1, b);
                }
                turn(1, b);
            }
        }
        fetch = next;
    }

    // one column of a register: [u] -> [y]
    template<int N_H>
    CAPSULE_INLINE void column(const int16_t * p, T * x) {
#pragma GCC unroll 8
        for (int u = 0; u < N_H; ++u) {
            x[u] = V::load(p + u*LINE);
        }
        capsule_idct<V, N_H>(x);
    }

    //
    // queries and scores
    //

    // the query as the middle of each line sees it: integers up to 4096
    CAPSULE_ALONE void turn_query(const ggml_capsule_rope & rope, const float * angles, int n_angles, const float * q_a, const float * q_b,
            int n_lanes, int n_line, int16_t * lines) {
        for (int j = 0; j < n_lanes; j += W, lines += QUERIES) {
            __m256i first[2][NG]; // as the first token sees it, four times as large
#pragma GCC unroll 2
            for (int n = 0; n < NG; ++n) {
                const int i = j + n*GGML_CAPSULE_LANES;
                const int g = std::min(i, n_angles - GGML_CAPSULE_LANES); // lanes behind the last group: the queries there are zero
                __m256 x[4];
#pragma GCC unroll 2
                for (int k = 0; k < 2; ++k) {
                    const __m256 a = _mm256_load_ps(q_a + i + 8*k);
                    const __m256 b = _mm256_load_ps(q_b + i + 8*k);
                    const __m256 c = _mm256_loadu_ps(angles + g + 8*k);
                    const __m256 s = _mm256_loadu_ps(angles + n_angles + g + 8*k);
                    x[k]     = _mm256_fmsub_ps(a, c, _mm256_mul_ps(b, s));
                    x[k + 2] = _mm256_fmadd_ps(a, s, _mm256_mul_ps(b, c));
                }
                first[0][n] = words(x[0], x[1]);
                first[1][n] = words(x[2], x[3]);
            }
            const T a = V::join(first[0]);
            const T b = V::join(first[1]);
            const int16_t * cosines = rope.y_cos(0) + j;
            const int16_t * sines   = rope.y_sin(0) + j;
            const int       pitch   = rope.n;
#pragma GCC unroll 8
            for (int y = 0; y < SIDE; ++y) {
                const T c = V::loadu(cosines + y*pitch);
                const T s = V::loadu(sines   + y*pitch);
                V::store(lines + y*n_line,     V::sub(V::mul(a, c), V::mul(b, s)));
                V::store(lines + y*n_line + W, V::add(V::mul(b, c), V::mul(a, s)));
            }
        }
    }

    static constexpr float SCORE_UNIT = 8; // sums are divided by it before their lanes are added

    CAPSULE_INLINE void eight(const T * acc, int32_t * score) {
        capsule_i256 a[8];
#pragma GCC unroll 8
        for (int y = 0; y < 8; ++y) {
            a[y] = _mm256_srai_epi32(V::fold(acc[y]), 3);
        }
        _mm256_store_si256((capsule_i256 *) score, capsule_sums(a));
    }

    static int turn_of(const ggml_capsule_rope & rope, int j) {
        return std::max(rope.turn[NG*j], rope.turn[NG*j + NG - 1]);
    }

    // scores [x][y] of one query; nothing is written on the way
    template<int N_H>
    CAPSULE_ALONE void scores_one(const ggml_capsule_rope & rope, const int16_t * tile, int n_tiles, int w, const int16_t * lines, int n_line,
            int32_t * score, fetcher & fetch) {
        fetcher next = fetch;
        for (int x = 0; x < w; ++x) {
            const int i = x < 4 ? 3 - x : x - 4;
            T acc[8];
#pragma GCC unroll 8
            for (int y = 0; y < 8; ++y) {
                acc[y] = V::zero();
            }
            for (int j = 0; j < n_tiles; ++j) {
                next.step();
                const int16_t * p = tile + j*TILE + x*PITCH;
                const int16_t * q = lines + j*QUERIES;
                const int turn = turn_of(rope, j);
                T a[8], b[8];
                column<N_H>(p,     a);
                column<N_H>(p + W, b);
                if (turn == ggml_capsule_rope::NONE) {
#pragma GCC unroll 8
                    for (int y = 0; y < N_H; ++y) {
                        acc[y] = V::dot(acc[y], a[y], V::load(q + y*n_line));
                        acc[y] = V::dot(acc[y], b[y], V::load(q + y*n_line + W));
                    }
                    continue;
                }
                const T s0 = V::loadu(rope.x_sin(i) + j*W);
                const T s  = x < 4 ? V::sub(V::zero(), s0) : s0;
                if (turn == ggml_capsule_rope::SIN) {
#pragma GCC unroll 8
                    for (int y = 0; y < N_H; ++y) {
                        acc[y] = V::dot(acc[y], V::add(a[y], V::mul(b[y], s)), V::load(q + y*n_line));
                        acc[y] = V::dot(acc[y], V::sub(b[y], V::mul(a[y], s)), V::load(q + y*n_line + W));
                    }
                    continue;
                }
                const T c = V::loadu(rope.x_cos(i) + j*W);
#pragma GCC unroll 8
                for (int y = 0; y < N_H; ++y) {
                    acc[y] = V::dot(acc[y], V::add(V::mul(a[y], c), V::mul(b[y], s)), V::load(q + y*n_line));
                    acc[y] = V::dot(acc[y], V::sub(V::mul(b[y], c), V::mul(a[y], s)), V::load(q + y*n_line + W));
                }
            }
            eight(acc, score + 8*x);
        }
        fetch = next;
    }

    // [u][x] -> turned keys [y][x], in place
    template<int N_H>
    CAPSULE_ALONE void pass_y(const ggml_capsule_rope & rope, int16_t * tile, int n_tiles, int w, fetcher & fetch) {
        fetcher next = fetch;
        for (int j = 0; j < n_tiles; ++j) {
            const int turn = turn_of(rope, j);
            for (int x = 0; x < w; ++x) {
                if (x % 2 == 1) {
                    next.step();
                }
                const int i = x < 4 ? 3 - x : x - 4;
                int16_t * p = tile + j*TILE + x*PITCH;
                T a[8], b[8];
                column<N_H>(p,     a);
                column<N_H>(p + W, b);
                const T s0 = V::loadu(rope.x_sin(i) + j*W);
                const T s  = x < 4 ? V::sub(V::zero(), s0) : s0;
                const T c  = V::loadu(rope.x_cos(i) + j*W);
#pragma GCC unroll 8
                for (int y = 0; y < N_H; ++y) {
                    T ta = a[y];
                    T tb = b[y];
                    if (turn == ggml_capsule_rope::SIN) {
                        ta = V::add(a[y], V::mul(b[y], s));
                        tb = V::sub(b[y], V::mul(a[y], s));
                    } else if (turn == ggml_capsule_rope::FULL) {
                        ta = V::add(V::mul(a[y], c), V::mul(b[y], s));
                        tb = V::sub(V::mul(b[y], c), V::mul(a[y], s));
                    }
                    V::store(p + y*LINE,     ta);
                    V::store(p + y*LINE + W, tb);
                }
            }
        }
        fetch = next;
    }

    // scores [y][x] of Q queries; 4 tokens of a line at once, so that what is loaded is used more than once
    template<int Q>
    CAPSULE_ALONE void scores_many(const int16_t * tile, int n_tiles, int h, const int16_t * lines, int n_line, int32_t (*score)[GGML_CAPSULE_MAX_ROWS]) {
        for (int i = 0; i < 2*h; ++i) {
            const int16_t * k = tile  + i/2*LINE + i % 2*4*PITCH;
            const int16_t * q = lines + i/2*n_line;
            T acc[Q][4];
#pragma GCC unroll 4
            for (int j = 0; j < Q; ++j) {
                acc[j][0] = acc[j][1] = acc[j][2] = acc[j][3] = V::zero();
            }
            for (int n = 0; n < n_tiles; ++n, k += TILE, q += QUERIES) {
#pragma GCC unroll 2
                for (int reg = 0; reg < 2*W; reg += W) {
                    T x[4];
#pragma GCC unroll 4
                    for (int t = 0; t < 4; ++t) {
                        x[t] = V::load(k + t*PITCH + reg);
                    }
#pragma GCC unroll 4
                    for (int j = 0; j < Q; ++j) {
                        const T y = V::load(q + j*PITCH + reg);
#pragma GCC unroll 4
                        for (int t = 0; t < 4; ++t) {
                            acc[j][t] = V::dot(acc[j][t], x[t], y);
                        }
                    }
                }
            }
#pragma GCC unroll 4
            for (int j = 0; j < Q; ++j) {
                capsule_i256 a[4];
#pragma GCC unroll 4
                for (int t = 0; t < 4; ++t) {
                    a[t] = _mm256_srai_epi32(V::fold(acc[j][t]), 3);
                }
                _mm_store_si128((__m128i *) (score[j] + 4*i), capsule_sums4(a));
            }
        }
    }

    // scores, [x][y] or [y][x] -> weights [x][y], exp(score - max); a new maximum scales what went before. false: nothing of this tile is seen
    CAPSULE_ALONE bool softmax(const int32_t * score, bool lines, float unit, const float * masked, int n_out, float * out, float & max, float & sum, float * p) {
        const __m256 u = _mm256_set1_ps(unit);
        __m256 x[8];
        __m256 m = _mm256_set1_ps(-INFINITY);
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
            x[i] = _mm256_mul_ps(u, _mm256_cvtepi32_ps(_mm256_load_si256((const __m256i *) (score + 8*i))));
        }
        if (lines) {
            capsule_transpose8(x);
        }
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
            if (masked) {
                x[i] = _mm256_add_ps(x[i], _mm256_load_ps(masked + 8*i));
            }
            m = _mm256_max_ps(m, x[i]);
        }
        const float most = capsule_max(m);
        if (most == -INFINITY) {
            return false;
        }
        if (most > max) {
            const float  f = std::exp(max - most);
            const __m256 v = _mm256_set1_ps(f);
            for (int i = 0; i < n_out; i += 8) {
                _mm256_store_ps(out + i, _mm256_mul_ps(v, _mm256_load_ps(out + i)));
            }
            sum *= f;
            max  = most;
        }
        const __m256 mm = _mm256_set1_ps(max);
        __m256 t = _mm256_setzero_ps();
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
            __m256 e = capsule_exp(_mm256_sub_ps(x[i], mm));
            if (masked) {
                e = _mm256_andnot_ps(_mm256_cmp_ps(x[i], _mm256_set1_ps(-INFINITY), _CMP_EQ_OQ), e);
            }
            t = _mm256_add_ps(t, e);
            _mm256_store_ps(p + 8*i, e);
        }
        sum += capsule_sum(t);
        return true;
    }

    //
    // values
    //

    // weights of tokens [x][y] -> of the rows, as blocks want them
    CAPSULE_ALONE void row_weights(const ggml_capsule_shape & shape, int h, int w, const float * p, weights & o) {
        alignas(32) float c[GGML_CAPSULE_MAX_ROWS]; // u*8 + v
        __m256 x[8];
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
            x[i] = _mm256_load_ps(p + 8*i);
        }
        if (h == SIDE && w == SIDE) {
            capsule_fdct8(x);
            capsule_transpose8(x);
            capsule_fdct8(x);
#pragma GCC unroll 8
            for (int i = 0; i < 8; ++i) {
                _mm256_store_ps(c + 8*i, _mm256_mul_ps(x[i], _mm256_loadu_ps(shape.scale + 8*i)));
            }
        } else {
            __m256 y[8];
            for (int v = 0; v < 8; ++v) {
                y[v] = _mm256_setzero_ps();
                for (int i = 0; i < w; ++i) {
                    y[v] = _mm256_fmadd_ps(_mm256_set1_ps(shape.cos_w[v][i]), x[i], y[v]);
                }
            }
            capsule_transpose8(y);
            for (int u = 0; u < h; ++u) {
                __m256 sum = _mm256_setzero_ps();
                for (int i = 0; i < h; ++i) {
                    sum = _mm256_fmadd_ps(_mm256_set1_ps(shape.cos_h[u][i]), y[i], sum);
                }
                _mm256_store_ps(c + 8*u, sum);
            }
        }
        capsule_pick(c, shape.first,  N, o.a);
        capsule_pick(c, shape.second, N, o.b);
        for (int i = 0; 8*i < shape.n_blocks; ++i) {
            const __m256 pair = _mm256_load_ps(shape.pair + 8*i); // all bits, or none
            const __m256 a    = _mm256_load_ps(o.a + 8*i);
            const __m256 b    = _mm256_and_ps(pair, _mm256_load_ps(o.b + 8*i));
            const __m256 sum  = _mm256_add_ps(a, b);
            const __m256 diff = _mm256_and_ps(pair, _mm256_sub_ps(a, b));
            _mm256_store_ps(o.a + 8*i, sum);
            _mm256_store_ps(o.b + 8*i, diff);
            _mm256_store_ps(o.most + 8*i, _mm256_max_ps(capsule_abs(sum), capsule_abs(diff)));
        }
    }

    CAPSULE_ALONE void value_scales(const ggml_capsule_shape & shape, const ggml_capsule_plan_group & group, const uint8_t * bytes, scales & o) {
        for (int i = 0; 8*i < shape.n_blocks; ++i) {
            _mm256_store_ps(o.low  + 8*i, _mm256_mul_ps(_mm256_loadu_ps(shape.mix + 8*i), block_scales(group, bytes, i, 0)));
            _mm256_store_ps(o.high + 8*i, _mm256_mul_ps(_mm256_loadu_ps(shape.mix + 8*i), block_scales(group, bytes, i, 1)));
            // 2^(bits - 1)
            const __m256i n = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *) (group.bits + 8*i)));
            const __m256i z = _mm256_sub_epi32(n, _mm256_set1_epi32(1)); // without bits nothing is shifted in
            _mm256_store_si256((__m256i *) (o.zero_low  + 8*i), _mm256_sllv_epi32(_mm256_set1_epi32(0x01010101), z));
            _mm256_store_si256((__m256i *) (o.zero_high + 8*i), _mm256_sllv_epi32(_mm256_set1_epi32(0x00010001), z));
        }
    }

    // the largest of weights times scales, in the blocks 8*first .. 8*last - 1
    CAPSULE_INLINE __m256 largest(const weights & w, const float * s, int first, int last) {
        __m256 m = _mm256_setzero_ps();
        for (int i = first; i < last; ++i) {
            m = _mm256_max_ps(m, capsule_abs(_mm256_mul_ps(_mm256_load_ps(w.most + 8*i), _mm256_load_ps(s + 8*i))));
        }
        return m;
    }

    // weights times scales times f in integers -> what the zeros of the codes add up to, of 8 bits twice
    template<bool HIGH>
    CAPSULE_INLINE __m256i pack_weights(const weights & w, const float * s, const int32_t * zero, int first, int last, float f, int32_t * o) {
        const __m256 ff = _mm256_set1_ps(f);
        __m256i zeros = _mm256_setzero_si256();
        for (int i = first; i < last; ++i) {
            const __m256  t = _mm256_mul_ps(ff, _mm256_load_ps(s + 8*i));
            const __m256i x = _mm256_cvtps_epi32(_mm256_mul_ps(t, _mm256_load_ps(w.a + 8*i)));
            const __m256i y = _mm256_cvtps_epi32(_mm256_mul_ps(t, _mm256_load_ps(w.b + 8*i)));
            const __m256i z = _mm256_load_si256((const __m256i *) (zero + 8*i));
            __m256i pairs;
            if (HIGH) {
                pairs = _mm256_blend_epi16(x, _mm256_slli_epi32(y, 16), 0xaa);
                zeros = capsule_v16::dot(zeros, z, pairs);
            } else {
                const __m128i order = _mm_setr_epi8(0, 4, 0, 4, 1, 5, 1, 5, 2, 6, 2, 6, 3, 7, 3, 7);
                const __m256i words = _mm256_packs_epi32(x, y);
                pairs = _mm256_shuffle_epi8(_mm256_packs_epi16(words, words), _mm256_broadcastsi128_si256(order));
                zeros = capsule_dot_bytes(zeros, z, pairs);
            }
            _mm256_store_si256((__m256i *) (o + 8*i), pairs);
        }
        return zeros;
    }

    // of a query, for n <= 4 groups: their steps are the same, so that they need not wait for each other
    CAPSULE_ALONE void pack_groups(const ggml_capsule_plan_group * groups, int n, const weights & w, const scales * s, packed * o) {
        __m256 m[8];
        for (int g = 0; g < 4; ++g) {
            m[2*g]     = g < n ? largest(w, s[g].low,  groups[g].low_first,  groups[g].low_last)  : _mm256_setzero_ps();
            m[2*g + 1] = g < n ? largest(w, s[g].high, groups[g].high_first, groups[g].high_last) : _mm256_setzero_ps();
        }
        const __m256 top  = _mm256_max_ps(capsule_maxima(m), _mm256_set1_ps(1e-30f));
        const __m256 most = _mm256_setr_ps(127, 32767, 127, 32767, 127, 32767, 127, 32767);
        alignas(32) float f[8], unit[8], bias[8];
        _mm256_store_ps(f,    _mm256_div_ps(most, top));
        _mm256_store_ps(unit, _mm256_div_ps(top, most));

        __m256i z[8];
        for (int g = 0; g < 4; ++g) {
            z[2*g] = z[2*g + 1] = _mm256_setzero_si256();
            if (g < n) {
                const auto & group = groups[g];
                z[2*g]     = pack_weights<false>(w, s[g].low,  s[g].zero_low,  group.low_first,  group.low_last,  f[2*g],     o[g].low);
                z[2*g + 1] = pack_weights<true> (w, s[g].high, s[g].zero_high, group.high_first, group.high_last, f[2*g + 1], o[g].high);
            }
        }
        _mm256_store_ps(bias, _mm256_mul_ps(_mm256_cvtepi32_ps(capsule_sums(z)), _mm256_load_ps(unit)));
        for (int g = 0; g < n; ++g) {
            o[g].low_unit  = unit[2*g];
            o[g].high_unit = unit[2*g + 1];
            o[g].bias      = 0.5f*bias[2*g] + bias[2*g + 1];
        }
    }

    // 16 sums in 16 bits
    CAPSULE_INLINE void add_words(float * o, __m256i x, __m256 unit) {
        const __m256 x0 = _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(_mm256_castsi256_si128(x)));
        const __m256 x1 = _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(_mm256_extracti128_si256(x, 1)));
        _mm256_store_ps(o,     _mm256_fmadd_ps(unit, x0, _mm256_load_ps(o)));
        _mm256_store_ps(o + 8, _mm256_fmadd_ps(unit, x1, _mm256_load_ps(o + 8)));
    }

    template<int Q>
    CAPSULE_INLINE void low_step(__m256i a, __m256i b, int block, const packed * const * w, __m256i (*acc)[2]) {
#pragma GCC unroll 8
        for (int q = 0; q < Q; ++q) {
            const __m256i x = capsule_all(w[q]->low + block);
            acc[q][0] = _mm256_add_epi16(acc[q][0], _mm256_maddubs_epi16(a, x));
            acc[q][1] = _mm256_add_epi16(acc[q][1], _mm256_maddubs_epi16(b, x));
        }
    }

    template<int Q>
    CAPSULE_INLINE void low_flush(const packed * const * w, float * const * o, __m256i (*acc)[2]) {
#pragma GCC unroll 8
        for (int q = 0; q < Q; ++q) {
            const __m256 u = _mm256_set1_ps(w[q]->low_unit);
            add_words(o[q],      acc[q][0], u);
            add_words(o[q] + 16, acc[q][1], u);
            acc[q][0] = acc[q][1] = _mm256_setzero_si256();
        }
    }

    template<int Q, int B>
    CAPSULE_INLINE const uint8_t * low_pairs(const uint8_t * p, const uint8_t * pair, int n, const packed * const * w, __m256i (*acc)[2]) {
        for (int i = 0; i < n; ++i, p += 8*B) {
            __m256i a, b;
            capsule_codes_low<B, false>(p, a, b);
            low_step<Q>(a, b, pair[i], w, acc);
        }
        return p;
    }

    static constexpr int NV = 64/W; // vectors of 16 lanes and 2 registers, in 32 bits

    // both rows of a lane in 16 bits each
    template<int Q>
    CAPSULE_INLINE void high_step(__m256i a, __m256i b, int block, const packed * const * w, T (*acc)[NV]) {
        T x[NV];
        V::widen(a, x);
        V::widen(b, x + NV/2);
#pragma GCC unroll 8
        for (int q = 0; q < Q; ++q) {
            const T y = V::all32(w[q]->high + block);
#pragma GCC unroll 4
            for (int i = 0; i < NV; ++i) {
                acc[q][i] = V::dot(acc[q][i], x[i], y);
            }
        }
    }

    // sums and a row in f16 (or none), minus the zeros of all codes
    template<int Q>
    CAPSULE_INLINE void high_flush(const packed * const * w, float * const * o, T (*acc)[NV], bool bias, const uint8_t * row, const weights * const * rows) {
#pragma GCC unroll 8
        for (int q = 0; q < Q; ++q) {
            const float f = row  ? rows[q]->a[0] : 0.0f;
            const float z = bias ? w[q]->bias    : 0.0f;
#pragma GCC unroll 4
            for (int i = 0; i < NV; ++i) {
                V::add_sums(o[q] + W/2*i, acc[q][i], w[q]->high_unit, z, row ? row + W*i : nullptr, f);
            }
        }
    }

    template<int Q, int B>
    CAPSULE_INLINE const uint8_t * high_pairs(const uint8_t * p, const uint8_t * pair, int n, const packed * const * w, T (*acc)[NV]) {
        for (int i = 0; i < n; ++i, p += 8*B) {
            __m256i a, b;
            capsule_codes_low<B, false>(p, a, b);
            high_step<Q>(a, b, pair[i], w, acc);
        }
        return p;
    }

    // single rows, and rows in f16
    template<int Q>
    CAPSULE_ALONE void value_row(const uint8_t * p, int bits, int block, bool pair, const weights * const * rows, const packed * const * w, float * const * o) {
        if (bits == GGML_CAPSULE_F16) {
            const float f = pair ? 0.70710678f : 1.0f;
            for (int i = 0; i < 32; i += 8) {
                const __m256 x = halves(p + 2*i);
                const __m256 y = pair ? halves(p + 64 + 2*i) : _mm256_setzero_ps();
#pragma GCC unroll 8
                for (int q = 0; q < Q; ++q) {
                    __m256 sum = _mm256_load_ps(o[q] + i);
                    sum = _mm256_fmadd_ps(_mm256_set1_ps(f*rows[q]->a[block]), x, sum);
                    if (pair) {
                        sum = _mm256_fmadd_ps(_mm256_set1_ps(f*rows[q]->b[block]), y, sum);
                    }
                    _mm256_store_ps(o[q] + i, sum);
                }
            }
            return;
        }
        with_bits(bits, [&](auto b) {
            constexpr int B = decltype(b)::value;
            __m256i x, y;
            capsule_codes_low<B, true>(p, x, y);
            if (B > 3) {
                T high[Q][NV] = {};
                high_step<Q>(x, y, block, w, high);
                high_flush<Q>(w, o, high, false, nullptr, rows);
            } else {
                __m256i low[Q][2] = {};
                low_step<Q>(x, y, block, w, low);
                low_flush<Q>(w, o, low);
            }
        });
    }

    // a group for Q queries
    template<int Q>
    CAPSULE_ALONE void value_group(const ggml_capsule_shape & shape, const ggml_capsule_plan_group & group, const uint8_t * p,
            const weights * const * rows, const packed * const * w, float * const * o) {
        const uint8_t * pair = group.pair;
        const uint8_t * n    = group.n_pairs;
        // the constant row is almost always in f16
        const uint8_t * row = group.first == GGML_CAPSULE_F16 ? p : nullptr;
        if (group.first > 0) {
            if (!row) {
                value_row<Q>(p, group.first, 0, false, rows, w, o);
            }
            p += ggml_capsule_code_size(group.first, 1, GGML_CAPSULE_LANES);
        }
        for (int i = 0; i < n[0]; ++i, ++pair, p += 8*GGML_CAPSULE_F16) {
            value_row<Q>(p, GGML_CAPSULE_F16, *pair, true, rows, w, o);
        }
        {
            T high[Q][NV];
#pragma GCC unroll 8
            for (int q = 0; q < Q; ++q) {
#pragma GCC unroll 4
                for (int i = 0; i < NV; ++i) {
                    high[q][i] = V::zero();
                }
            }
            p = high_pairs<Q, 8>(p, pair, n[1], w, high); pair += n[1];
            p = high_pairs<Q, 6>(p, pair, n[2], w, high); pair += n[2];
            p = high_pairs<Q, 4>(p, pair, n[3], w, high); pair += n[3];
            high_flush<Q>(w, o, high, true, row, rows);
        }
        __m256i low[Q][2];
#pragma GCC unroll 8
        for (int q = 0; q < Q; ++q) {
            low[q][0] = low[q][1] = _mm256_setzero_si256();
        }
        // 16 pairs of 3 bits, or 32 of 2 bits, are what 16 bits can hold
        int left = n[4];
        while (left > 0) {
            const int now = std::min(left, 16);
            p = low_pairs<Q, 3>(p, pair, now, w, low); pair += now;
            low_flush<Q>(w, o, low);
            left -= now;
        }
        p = low_pairs<Q, 2>(p, pair, n[5], w, low); pair += n[5];
        p = low_pairs<Q, 1>(p, pair, n[6], w, low); pair += n[6];
        const int last = shape.n_blocks - 1;
        if (group.last > 0 && group.last <= 3) {
            with_bits(group.last, [&](auto b) {
                __m256i x, y;
                capsule_codes_low<decltype(b)::value, true>(p, x, y);
                low_step<Q>(x, y, last, w, low);
            });
        } else if (group.last > 0) {
            value_row<Q>(p, group.last, last, false, rows, w, o);
        }
        low_flush<Q>(w, o, low);
    }

    //
    // a tile, and all of them
    //

    void all_scores(int h, int n) {
        int i = 0;
        for (; W > 16 && i + 4 <= n; i += 4) { // 32 registers
            scores_many<4>(tile, n_tiles, h, lines + i*PITCH, n_line, score + i);
        }
        for (; i + 2 <= n; i += 2) {
            scores_many<2>(tile, n_tiles, h, lines + i*PITCH, n_line, score + i);
        }
        if (i < n) {
            scores_many<1>(tile, n_tiles, h, lines + i*PITCH, n_line, score + i);
        }
    }

    // what the mask says of a slot to a token: x*8 + y, NULL if all of it is seen
    const float * mask_of(const ggml_capsule_slot & slot, const ggml_capsule_shape & shape, int h, int w, int token, int seen) {
        const bool whole = h == SIDE && w == SIDE;
        if (seen != 2) {
            return whole ? nullptr : shape.hidden;
        }
        const uint16_t * mask = args.mask + token*args.n_mask + slot.token;
        std::copy(shape.hidden, shape.hidden + GGML_CAPSULE_MAX_ROWS, masked);
        for (int y = 0; y < h; ++y) {
            for (int x = 0; x < w; ++x) {
                masked[SIDE*x + y] = ggml_capsule_from_half(mask[y*w + x]);
            }
        }
        return masked;
    }

    // false: the slot has no step, or blocks in f32
    bool run_tile(int is, int is_next) {
        const auto & slot  = args.slots[is];
        const auto & form  = args.forms[slot.form];
        const auto & shape = ggml_capsule_shape_of(form.h, form.w);
        const auto & rope  = args.ropes ? *args.ropes[slot.rope] : *no_rope;
        const ggml_capsule_plan * k = ggml_capsule_form_k(form, head);
        const ggml_capsule_plan * v = ggml_capsule_form_v(form, head);
        const uint8_t * bytes   = args.pool + (size_t) slot.offset*args.unit;
        const uint8_t * k_bytes = bytes + form.k_offset[head];
        const uint8_t * v_bytes = bytes + form.v_offset[head];

        if (at_shape != &shape) {
            at_shape = &shape;
            for (int r = 0; r < form.h*form.w; ++r) {
                at[r] = (uint16_t) (shape.place[r]/SIDE*LINE + shape.place[r] % SIDE*PITCH);
            }
        }
        const float step = ggml_capsule_step_of(k_bytes);
        if (!(step > 0.0f) || k->exact || v->exact) {
            return false;
        }
        auto seen_by = [&](int token) { return args.seen ? args.seen[token*args.n_seen + is] : 1; };
        int n = 0;
        for (int j = 0; j < n_rows; ++j) {
            if (seen_by(j/args.n_gqa) != 0) {
                visible[n++] = j;
            }
        }
        if (n == 0) {
            return true;
        }

        fetcher now  = { (const char *) v_bytes, (const char *) v_bytes + v->size };
        fetcher next;
        if (is_next >= 0) {
            const auto & slot_next = args.slots[is_next];
            const auto & form_next = args.forms[slot_next.form];
            next.at  = (const char *) args.pool + (size_t) slot_next.offset*args.unit + form_next.k_offset[head];
            next.end = next.at + ggml_capsule_form_k(form_next, head)->size;
            next.at -= 2*sizeof(float); // its step
        }

        for (int g = 0; g < n_k; ++g) {
            key_group(shape, k, g, k_bytes, step, k_mean + 2*GGML_CAPSULE_LANES*g, at, mul_a, mul_b, wide,
                    tile + g/NG*TILE + g % NG*2*GGML_CAPSULE_LANES, now);
        }
        capsule_with_size(form.w, [&](auto n_w) { pass_x<decltype(n_w)::value>(tile, n_tiles, form.h, now); });
        if (n > 1) {
            capsule_with_size(form.h, [&](auto n_h) { pass_y<decltype(n_h)::value>(rope, tile, n_tiles, form.w, next); });
        }
        for (int g = 0; g < n_v; ++g) {
            value_scales(shape, v->groups[g], v_bytes, v_scales[g]);
        }

        const int     n_angles = GGML_CAPSULE_LANES*n_k;
        const float * angles   = args.ropes ? args.angles + (size_t) is*2*n_angles : no_angles;
        for (int j0 = 0; j0 < n; j0 += ROWS) {
            const int n_now = std::min(ROWS, n - j0);
            for (int i = 0; i < n_now; ++i) {
                const size_t j = visible[j0 + i];
                turn_query(rope, angles, n_angles, q_a + j*n_lanes, q_b + j*n_lanes, n_lanes, n_line, lines + i*PITCH);
            }
            if (n == 1) {
                capsule_with_size(form.h, [&](auto n_h) {
                    scores_one<decltype(n_h)::value>(rope, tile, n_tiles, form.w, lines, n_line, score[0], next);
                });
            } else {
                all_scores(form.h, n_now);
            }

            // queries that see something of it
            int m = 0;
            const weights * rows [ROWS];
            float         * outs [ROWS];
            const packed  * packs[ROWS];
            for (int i = 0; i < n_now; ++i) {
                const int     j    = visible[j0 + i];
                const float * mask = mask_of(slot, shape, form.h, form.w, j/args.n_gqa, seen_by(j/args.n_gqa));
                float * o = out + (size_t) j*n_v*2*GGML_CAPSULE_LANES;
                if (softmax(score[i], n > 1, SCORE_UNIT*step*q_unit[j], mask, n_v*2*GGML_CAPSULE_LANES, o, max[j], sum[j], prob[m])) {
                    row_weights(shape, form.h, form.w, prob[m], wanted[m]);
                    rows[m] = &wanted[m];
                    outs[m] = o;
                    ++m;
                }
            }
            for (int i = m; i < ROWS; ++i) { // no one's
                rows [i] = &wanted[0];
                packs[i] = ready;
                outs [i] = nothing;
            }
            for (int i = 0; i < m; ++i) {
                for (int g = 0; g < n_v; g += 4) {
                    pack_groups(v->groups + g, std::min(4, n_v - g), wanted[i], v_scales + g, ready + i*n_v + g);
                }
            }
            for (int g = 0; g < n_v; ++g) {
                const auto & group = v->groups[g];
                for (int i = 0; i < 8; ++i) {
                    next.step();
                }
                for (int i = 0; i < m; ++i) {
                    packs[i] = ready + i*n_v + g;
                }
                const uint8_t * p = v_bytes + group.code;
                if (group.n_lanes < GGML_CAPSULE_LANES) {
                    capsule_widen(v, g, p, wide);
                    p = wide;
                }
                int i = 0;
                for (; W > 16 && i + 4 < m; i += 8) { // 32 registers; some queries may be no one's
                    value_group<8>(shape, group, p, rows + i, packs + i, outs + i);
                }
                for (; W > 16 && i + 2 < m; i += 4) {
                    value_group<4>(shape, group, p, rows + i, packs + i, outs + i);
                }
                for (; i + 2 <= m; i += 2) {
                    value_group<2>(shape, group, p, rows + i, packs + i, outs + i);
                }
                if (i < m) {
                    value_group<1>(shape, group, p, rows + i, packs + i, outs + i);
                }
                for (i = 0; i < m; ++i) {
                    outs[i] += 2*GGML_CAPSULE_LANES;
                }
            }
        }
        return true;
    }

    static float product(const float * a, const float * b, int n) {
        __m256 sum[2] = { _mm256_setzero_ps(), _mm256_setzero_ps() };
        int i = 0;
        for (; i + 16 <= n; i += 16) {
            sum[0] = _mm256_fmadd_ps(_mm256_loadu_ps(a + i),     _mm256_loadu_ps(b + i),     sum[0]);
            sum[1] = _mm256_fmadd_ps(_mm256_loadu_ps(a + i + 8), _mm256_loadu_ps(b + i + 8), sum[1]);
        }
        float res = capsule_sum(_mm256_add_ps(sum[0], sum[1]));
        for (; i < n; ++i) {
            res += a[i]*b[i];
        }
        return res;
    }

    // one query: back to channels, added to what is there
    void finish(int j, const ggml_capsule_attn_sums & sums) {
        if (sum[j] == 0.0f) {
            return;
        }
        const int d = args.v.d;
        const float * o    = out + (size_t) j*n_v*2*GGML_CAPSULE_LANES;
        const float * axes = args.v_axes ? args.v_axes + (size_t) head*d*d : nullptr;
        const float * mean = args.v_mean ? args.v_mean + (size_t) head*d   : nullptr;
        float * x = turned;
        float * y = turned + d;
        for (int g = 0; g < n_v; ++g, o += 2*GGML_CAPSULE_LANES) {
            for (int i = 0; i < ggml_capsule_n_lanes(args.v, g); ++i) {
                const float a  = o[i];
                const float b  = o[GGML_CAPSULE_LANES + i];
                const int   cb = ggml_capsule_channel(args.v, g, 1, i);
                x[ggml_capsule_channel(args.v, g, 0, i)] = (a + b)*0.70710678f;
                if (cb >= 0) {
                    x[cb] = (a - b)*0.70710678f;
                }
            }
        }
        for (int c = 0; c < d; ++c) {
            y[c] = (axes ? product(axes + (size_t) c*d, x, d) : x[c]) + (mean ? mean[c]*sum[j] : 0.0f);
        }
        const float most = std::max(max[j], sums.max[j]);
        const float f    = std::exp(sums.max[j] - most);
        const float f_y  = std::exp(max[j]      - most);
        for (int c = 0; c < d; ++c) {
            sums.out[(size_t) j*d + c] = f*sums.out[(size_t) j*d + c] + f_y*y[c];
        }
        sums.sum[j] = f*sums.sum[j] + f_y*sum[j];
        sums.max[j] = most;
    }

    void run(int first, int last, const ggml_capsule_attn_sums & sums) {
        std::vector<int> plain;
        for (int is = first; is < last; ++is) {
            const auto & form = args.forms[args.slots[is].form];
            if (!args.k_transform.is_dct(form.h, form.w) || !args.v_transform.is_dct(form.h, form.w)) {
                continue; // see general.h
            }
            if (!run_tile(is, is + 1 < last ? is + 1 : -1)) {
                plain.push_back(is);
            }
        }
        for (int j = 0; j < n_rows; ++j) {
            finish(j, sums);
        }
        for (int is : plain) {
            ggml_capsule_attn_tiles_plain(&args, head, is, is + 1, &sums, tile);
        }
    }
};
