// Products with AVX-512: 14 rows by 2 vectors of 16 fill 28 of 32 registers with sums.
//
// A block of 8 x 8 tiles is 112 x 256 sums (115 KB), which lie in the L2 cache beside 115 KB of a;
// the 32 KB of b that 256 steps of a tile take come from there as well. Depths of 128 to 384
// measure alike.
#define NVFP4_TARGET avx512fma
#define NVFP4_VECTOR_LANES 1
#include "matmul_groups.h"

namespace nvfp4 {
void matmul_avx512(const MatmulArgs& args) {
    avx512fma::multiply_all<avx512fma::FusedStep, 14, 8, 8, 256>(args);
}
void matmul_groups_avx512(const MatmulArgs& args) {
    avx512fma::multiply_all<avx512fma::GroupedStep, 14, 8, 8, 256>(args);
}
}  // namespace nvfp4
