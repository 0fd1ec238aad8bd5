// Products with AVX-512: fourteen rows by two vectors fill 28 of 32 registers with sums; two more
// hold b, one a.
#define NVFP4_TARGET avx512fma
#include "matmul.h"

NVFP4_BEGIN
// 112 x 256 sums (115 KB) and 115 KB of a lie in the L2 cache, 32 KB of b come from it.
using Multiplier = FusedMultiplier<14, 8, 8, 256>;
NVFP4_END

namespace nvfp4 {
void matmul_avx512(const MatmulArgs& args) { avx512fma::multiply_all<avx512fma::Multiplier>(args); }
}  // namespace nvfp4
