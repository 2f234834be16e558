#pragma once

#include "ggml-capsule-unpack.h"

//
// rows of floats -> a slot
//

// rows [r0, r0 + n) of the list that are not Q2_0 -> the slot
CAPSULE_FN void capsule_store_rows(int tid, int nt, CAPSULE_ARGS, CAPSULE_PARAM const capsule_part & part, int d, int r0, int n, CAPSULE_SHARED const float * rows,
        CAPSULE_GLOBAL char * head) {
    int first = 0; // of the type

    for (int type = CAPSULE_F32; type < CAPSULE_Q2_0; ++type) {
        const int begin = first > r0 ? first : r0;
        const int count = capsule_min(first + part.count[type], r0 + n) - begin;
        const bool plain = type == CAPSULE_F32 || type == CAPSULE_F16;

        for (int u = tid; u < count*(plain ? d : d/32); u += nt) {
            const int r = plain ? u/d : u%count;
            const int c = plain ? u%d : u/count;

            CAPSULE_SHARED const float * x   = rows + (begin - r0 + r)*a.ld_rows;
            CAPSULE_GLOBAL char        * dst = head + part.type_offs[type] + (begin - first + r)*part.row_size[type];

            if (type == CAPSULE_F32) {
                ((CAPSULE_GLOBAL float *) dst)[c] = x[c];
            } else if (type == CAPSULE_F16) {
                capsule_put(((CAPSULE_GLOBAL capsule_half *) dst)[c], x[c]);
            } else {
                capsule_quantize<float>(type, x + 32*c, dst + c*(type == CAPSULE_Q8_0 ? 34 : 18));
            }
        }
        first += part.count[type];
    }
}

//
// Q2_0: the search of docs/design/codec.md, all candidates of all blocks at once;
// block u: the values from u/n_rows*64 on in row u%n_rows
//

CAPSULE_FN void capsule_q2_0_amax(int tid, int nt, CAPSULE_ARGS, int n_rows, int d, CAPSULE_SHARED const float * rows, CAPSULE_SHARED float * amax) {
    for (int u = tid; u < n_rows*(d/64); u += nt) {
        CAPSULE_SHARED const float * x = rows + u%n_rows*a.ld_rows + u/n_rows*64;

        float res = 0.0f;
        for (int c = 0; c < 64; ++c) {
            const float y = capsule_abs(x[c]);
            res = y > res ? y : res;
        }
        amax[u] = res;
    }
}

// values -> integers of 16 bits, as floats
CAPSULE_FN void capsule_q2_0_scale(int tid, int nt, CAPSULE_ARGS, int n_rows, int d, CAPSULE_SHARED const float * amax, CAPSULE_SHARED float * rows) {
    for (int i = tid; i < n_rows*d; i += nt) {
        const int   r = i/d;
        const int   c = i%d;
        const float m = amax[c/64*n_rows + r];

        CAPSULE_SHARED float & x = rows[r*a.ld_rows + c];

        x = m >= 9.5367431640625e-7f ? CAPSULE_RINT(x*CAPSULE_DIV(32768.0f, m)) : 0.0f;
    }
}

CAPSULE_FN int capsule_q2_0_code(int z, int num, int den) {
    const int twice = 2*den*z;

    return (twice >= num) + (twice >= 3*num) - (twice < -num);
}

// is xc^2/cc, the squared error that is removed, larger?
CAPSULE_FN bool capsule_q2_0_better(int xc, int cc, int best_xc, int best_cc) {
    return (int64_t) xc*xc*best_cc > (int64_t) best_xc*best_xc*cc;
}

// the better round of each factor and sign: xc, cc and the scale num/den that its codes are for
CAPSULE_FN void capsule_q2_0_search(int tid, int nt, CAPSULE_ARGS, int n_rows, int d, CAPSULE_SHARED const float * rows, CAPSULE_SHARED int32_t * best) {
    const int n_blocks = n_rows*(d/64);

    for (int i = tid; i < n_blocks*CAPSULE_N_FACTORS*2; i += nt) {
        const int u = i%n_blocks;
        const int k = i/n_blocks;

        CAPSULE_SHARED const float * y   = rows + u%n_rows*a.ld_rows + u/n_rows*64;
        CAPSULE_SHARED int32_t     * out = best + (u*CAPSULE_N_FACTORS*2 + k)*4;

        // 10, 12, 15, 18, 23, 32
        const int factor = (int) ((k < 8 ? 0x120f0c0au : 0x2017u) >> k%8/2*8 & 255u);
        const int sign   = k%2 == 0 ? 1 : -1;

        int num = 1024*factor;
        int den = 1;

        int best_xc  = 0;
        int best_cc  = 1;
        int best_num = num;
        int best_den = den;

        for (int round = 0; round < 2; ++round) {
            int xc = 0;
            int cc = 0;
            for (int c = 0; c < 64; ++c) {
                const int z    = sign*(int) y[c];
                const int code = capsule_q2_0_code(z, num, den);

                xc += z*code;
                cc += code*code;
            }
            if (cc == 0) {
                break;
            }
            if (capsule_q2_0_better(xc, cc, best_xc, best_cc)) {
                best_xc  = xc;
                best_cc  = cc;
                best_num = num;
                best_den = den;
            }
            num = xc;
            den = cc;
        }
        out[0] = best_xc;
        out[1] = best_cc;
        out[2] = best_num;
        out[3] = best_den;
    }
}

// a thread per byte of codes, the first of a block writes its scale
CAPSULE_FN void capsule_q2_0_store(int tid, int nt, CAPSULE_ARGS, int n_rows, int d, CAPSULE_SHARED const float * rows, CAPSULE_SHARED const float * amax,
        CAPSULE_SHARED const int32_t * best, CAPSULE_GLOBAL char * dst, int row_size) {
    for (int i = tid; i < n_rows*(d/4); i += nt) {
        const int u = i/16;
        const int b = i%16;

        CAPSULE_SHARED const float   * y     = rows + u%n_rows*a.ld_rows + u/n_rows*64;
        CAPSULE_SHARED const int32_t * list  = best + u*CAPSULE_N_FACTORS*2*4;
        CAPSULE_GLOBAL char          * block = dst + u%n_rows*row_size + u/n_rows*18;

        int k = 0; // ties keep the first
        for (int m = 1; m < CAPSULE_N_FACTORS*2; ++m) {
            if (capsule_q2_0_better(list[4*m], list[4*m + 1], list[4*k], list[4*k + 1])) {
                k = m;
            }
        }
        const int sign = k%2 == 0 ? 1 : -1;

        if (b == 0) {
            const float scale = CAPSULE_DIV((float) list[4*k], (float) list[4*k + 1])*(amax[u]*3.0517578125e-5f);

            capsule_put(*(CAPSULE_GLOBAL capsule_half *) block, (float) sign*(scale < 65504.0f ? scale : 65504.0f));
        }

        int codes = 0;
        for (int c = 0; c < 4; ++c) {
            codes |= (capsule_q2_0_code(sign*(int) y[4*b + c], list[4*k + 2], list[4*k + 3]) + 1) << 2*c;
        }
        ((CAPSULE_GLOBAL uint8_t *) block)[2 + b] = (uint8_t) codes;
    }
}

// n rows from r0 on of the list -> the slot; those of quantized types are Hadamard-transformed first
CAPSULE_FN void capsule_put_rows(capsule_threads t, CAPSULE_ARGS, CAPSULE_PARAM const capsule_part & part, int d, int r0, int n, CAPSULE_SHARED float * rows,
        CAPSULE_GLOBAL char * head, CAPSULE_SHARED char * sm) {
    CAPSULE_SHARED float   * amax = CAPSULE_SM_F(a.s_amax);
    CAPSULE_SHARED int32_t * best = (CAPSULE_SHARED int32_t *) (sm + a.s_best);

    const int n_plain = r0 < part.n_plain ? capsule_min(n, part.n_plain - r0) : 0;
    if (n_plain < n) {
        CAPSULE_HADAMARD(float, rows + n_plain*a.ld_rows, n - n_plain, d, a.ld_rows, d & -d);
    }

    CAPSULE_PHASE((capsule_store_rows(tid, t.n, a, part, d, r0, n, rows, head)));

    const int first_q2 = part.n_rows - part.count[CAPSULE_Q2_0];

    const int r2 = first_q2 > r0 ? first_q2 : r0;
    const int n2 = r0 + n - r2;
    if (n2 > 0) {
        CAPSULE_SHARED float * rows2 = rows + (r2 - r0)*a.ld_rows;

        CAPSULE_PHASE((capsule_q2_0_amax  (tid, t.n, a, n2, d, rows2, amax)));
        CAPSULE_PHASE((capsule_q2_0_scale (tid, t.n, a, n2, d, amax, rows2)));
        CAPSULE_PHASE((capsule_q2_0_search(tid, t.n, a, n2, d, rows2, best)));
        CAPSULE_PHASE((capsule_q2_0_store (tid, t.n, a, n2, d, rows2, amax, best,
                        head + part.type_offs[CAPSULE_Q2_0] + (r2 - first_q2)*part.row_size[CAPSULE_Q2_0], part.row_size[CAPSULE_Q2_0])));
    }
}
