// Products of codes with AVX-512 BF16: e2m1 * e4m3 is exact in BF16, so a cell of a panel is a pair
// of them, neighbours of the contraction, and one instruction multiplies and adds both.
//
// 14 rows by 2 vectors of sums, as with AVX-512. A block of 8 x 4 tiles is 112 x 128 sums (57 KB)
// in the L2 cache; 512 pairs of a (28 KB) stay in L1.
#define NVFP4_TARGET avx512bf16
#define NVFP4_VECTOR_LANES 1
#include "matmul.h"

NVFP4_BEGIN

struct PairStep {
    using Cell = uint32_t;
    static constexpr int kElements = 2;

    template <int tile_rows>
    static void pack(const Factor& factor, int64_t depth, uint32_t* cells, int64_t first,
                     int64_t last) {
        for_decoded_blocks<tile_rows>(
            factor.codes, depth, first, last,
            [&](int64_t tile, int64_t block, auto part, auto width, const Float(&column)[kBlock]) {
                uint32_t* to = cells + (tile * depth + block * kBlock) / 2 * tile_rows + part;
                const __mmask16 mask = static_cast<__mmask16>((1u << width) - 1u);
#pragma GCC unroll 8
                for (int j = 0; j < kBlock / 2; ++j) {
                    const Word even = bits(column[2 * j]) >> 16;
                    const Word odd = bits(column[2 * j + 1]) & 0xffff0000u;
                    _mm512_mask_storeu_epi32(to + j * tile_rows, mask, (__m512i)(odd | even));
                }
            });
    }

    static NVFP4_FN __m512bh vector(const uint32_t* p) { return (__m512bh)_mm512_loadu_si512(p); }
    static NVFP4_FN __m512bh spread(uint32_t pair) {
        return (__m512bh)_mm512_set1_epi32(static_cast<int>(pair));
    }
    static NVFP4_FN Float add(Float sum, __m512bh x, __m512bh y) {
        return (Float)_mm512_dpbf16_ps((__m512)sum, x, y);
    }
    static NVFP4_FN void prefetch(const uint32_t*, const uint32_t*, int) {}

    template <int rows>
    static NVFP4_FN void tile(const uint32_t* a, const uint32_t* b, int64_t steps, float* sums,
                              int64_t stride) {
        multiply_tile<PairStep, rows>(a, b, steps, sums, stride);
    }
};

NVFP4_END

namespace nvfp4 {
void matmul_avx512bf16(const MatmulArgs& args) {
    avx512bf16::multiply_all<avx512bf16::PairStep, 14, 8, 4, 512>(args);
}
}  // namespace nvfp4
