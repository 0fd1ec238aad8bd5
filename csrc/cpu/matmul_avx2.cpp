// Products with AVX2, FMA and F16C: 6 rows by 2 vectors of 8 fill 12 of 16 registers with sums.
//
// A block of 16 x 16 tiles is 96 x 256 sums (98 KB), which lie in the L2 cache beside 98 KB of a;
// the 16 KB of b that 256 steps of a tile take stay in L1. Depths of 128 to 384 measure alike.
#define NVFP4_TARGET avx2fma
#define NVFP4_VECTOR_LANES 1
#include "matmul_groups.h"

namespace nvfp4 {
void matmul_avx2(const MatmulArgs& args) {
    avx2fma::multiply_all<avx2fma::FusedStep, 6, 16, 16, 256>(args);
}
void matmul_groups_avx2(const MatmulArgs& args) {
    avx2fma::multiply_all<avx2fma::GroupedStep, 6, 16, 16, 256>(args);
}
}  // namespace nvfp4
