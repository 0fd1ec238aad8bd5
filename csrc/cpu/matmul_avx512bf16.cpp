// Products of codes with AVX-512 BF16: e2m1 * e4m3 is exact in BF16, so a panel holds pairs of them
// and one instruction multiplies and adds two steps of the contraction.
#define NVFP4_TARGET avx512bf16
#include "matmul.h"

NVFP4_BEGIN

// 14 rows by 2 vectors of sums. 112 x 128 sums (57 KB) stay in the L2 cache, 512 pairs of a (28 KB)
// in L1.
struct PairMultiplier {
    using Cell = uint32_t;
    static constexpr int kRows = 14, kColumns = 2 * kWide, kTilesM = 8, kTilesN = 4, kDepth = 512,
                         kSteps = 2;

    template <int tile_rows>
    static void pack(const Factor& factor, int64_t depth, uint32_t* cells, int64_t first,
                     int64_t last) {
        static const ScaleTable scales;
        const CodeMatrix& m = factor.codes;
        const __m512i upper = _mm512_set1_epi32(INT32_MIN >> 15);
        for (int64_t tile = first; tile < last; ++tile)
            for_parts<tile_rows>([&](auto part, auto width) {
                const int64_t row = tile * tile_rows + part,
                              rows = std::clamp<int64_t>(m.rows - row, 0, width);
                const __mmask16 mask = static_cast<__mmask16>((1u << width) - 1u);
                for (int64_t block = 0; block < depth / kBlock; ++block) {
                    Wide column[kBlock];
                    decode_block(m, scales, row, rows, block, column);
                    uint32_t* to = cells + (tile * depth + block * kBlock) / 2 * tile_rows + part;
#pragma GCC unroll 8
                    for (int j = 0; j < kBlock / 2; ++j) {
                        const __m512i even =
                            _mm512_srli_epi32(_mm512_castps_si512(column[2 * j]), 16);
                        const __m512i odd =
                            _mm512_and_si512(_mm512_castps_si512(column[2 * j + 1]), upper);
                        _mm512_mask_storeu_epi32(to + j * tile_rows, mask,
                                                 _mm512_or_si512(odd, even));
                    }
                }
            });
    }

    static NVFP4_FN void multiply(const uint32_t* a, const uint32_t* b, int64_t steps, float* sums,
                                  int64_t stride) {
        __m512 acc[kRows][2];
#pragma GCC unroll 14
        for (int i = 0; i < kRows; ++i) {
            acc[i][0] = _mm512_loadu_ps(sums + i * stride);
            acc[i][1] = _mm512_loadu_ps(sums + i * stride + kWide);
        }
        for (int64_t k = 0; k < steps; ++k) {
            const __m512bh b0 = (__m512bh)_mm512_loadu_si512(b + k * kColumns);
            const __m512bh b1 = (__m512bh)_mm512_loadu_si512(b + k * kColumns + kWide);
#pragma GCC unroll 14
            for (int i = 0; i < kRows; ++i) {
                const __m512bh x = (__m512bh)_mm512_set1_epi32(static_cast<int>(a[k * kRows + i]));
                acc[i][0] = _mm512_dpbf16_ps(acc[i][0], x, b0);
                acc[i][1] = _mm512_dpbf16_ps(acc[i][1], x, b1);
            }
        }
#pragma GCC unroll 14
        for (int i = 0; i < kRows; ++i) {
            _mm512_storeu_ps(sums + i * stride, acc[i][0]);
            _mm512_storeu_ps(sums + i * stride + kWide, acc[i][1]);
        }
    }
};

NVFP4_END

namespace nvfp4 {
void matmul_avx512bf16(const MatmulArgs& args) {
    avx512bf16::multiply_all<avx512bf16::PairMultiplier>(args);
}
}  // namespace nvfp4
