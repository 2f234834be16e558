#pragma once

#include <cstdint>
#include <vector>

//
// how the tokens of a slot see a query: turned back by their distances, R(-D_t) q. RoPE turns little within a slot, so that these N views have a low rank:
//   exp(-i theta_f D_t) ~= sum_m phi_m(t) (a_mf - i b_mf), with orthonormal phi_m. See docs/design/architecture.md
//

struct llama_capsule_views {
    uint32_t n = 0; // base views

    std::vector<float> phi;   // [n][ld]
    std::vector<float> turn;  // [n][n_rot], (a, -b) as the (cos, sin) of a rotation
    std::vector<float> still; // [n], the factor of channels without RoPE

    llama_capsule_views() = default;

    // cs: [N][n_rot], cos and sin of the distances, in pairs (norm) or in halves; d: channels; rows of phi are padded with zeros to ld
    llama_capsule_views(const float * cs, uint32_t N, uint32_t n_rot, bool norm, uint32_t d, uint32_t ld);
};

// eigenvalues of the symmetric matrix a [n][n], the largest first, and orthonormal eigenvectors in the rows of v; a is overwritten
std::vector<double> llama_capsule_eigen(uint32_t n, std::vector<double> & a, std::vector<double> & v);
