// Products with AVX2 and FMA: six rows by two vectors fill 12 of 16 registers with sums; two more
// hold b, one a.
#define NVFP4_TARGET avx2fma
#include "matmul.h"

NVFP4_BEGIN
// 96 x 256 sums (98 KB) and 96 KB of a in the L2 cache, 16 KB of b in L1.
using Multiplier = FusedMultiplier<6, 16, 16, 256>;
NVFP4_END

namespace nvfp4 {
void matmul_avx2(const MatmulArgs& args) { avx2fma::multiply_all<avx2fma::Multiplier>(args); }
}  // namespace nvfp4
