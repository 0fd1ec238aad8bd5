// The product out = a b^T of packed operands, a [M, K] and b [N, K], for any multiplier.
//
//     1. pack      both operands into panels (matmul_pack.h), kTogether tiles per piece of work
//     2. multiply  blocks of tiles_m x tiles_n tiles, one thread per block: the sums of the block
//                  stay in the L2 cache while the contraction streams by, some steps at a time, so
//                  that a strip of one panel stays in L1
//     3. way out   fl(fl(sum * a_global) * b_global) (+ bias), rounded once to the output's format
//
// What multiplies a tile is a policy, ``Step``, with
//     Cell            what a panel holds per row and step: float, or a pair of BF16
//     kElements       elements of the contraction in a cell
//     vector(cells)   kLanes cells, and spread(cell) the same one in every lane
//     add(sum, x, y)  sum + x * y in every lane
//     pack<rows>(factor, depth, cells, first, last)
//     prefetch(a, b, rows)
//     tile<rows>(a, b, steps, sums, stride)   a tile's sums over some steps: ``multiply_tile``, or
//                                             another order of summation (matmul_groups.h)
// Every sum runs along the contraction in the same order whatever the block, the tile or the number
// of threads, so the result does not depend on them. Products of 4- and 16-bit floats are exact in
// float32; those of float32 are fused into the sum.
#pragma once

#include "matmul_pack.h"
#include "workspace.h"

#if !defined(__AVX2__)
#error "the products are written for AVX2 with FMA and F16C, and for AVX-512"
#endif

NVFP4_BEGIN

// One row of a block of sums, ``count`` of them, to columns ``column`` and following of the result.
inline void write_row(const MatmulArgs& args, const float* sums, int64_t row, int64_t column,
                      int64_t count) {
    const CodeMatrix& a = args.a.codes;
    const CodeMatrix& b = args.b.codes;
    const Float a_global = splat<Float>(a.codes ? a.global_scale[a.row_scaled ? row : 0] : 1.0f);
    const Float b_whole = splat<Float>(b.codes && !b.row_scaled ? b.global_scale[0] : 1.0f);
    for (int64_t c = 0; c < count; c += kLanes) {
        const int64_t left = std::min<int64_t>(kLanes, count - c);
        const int64_t at = column + c;
        Float y = load(sums + c) * a_global;
        y = y * (b.row_scaled ? read_some<Element::float32>(b.global_scale + at, left) : b_whole);
        if (args.bias) y = y + read_some<Element::float32>(args.bias + at, left);
        write_some(args.out_element, args.out, row * args.columns + at, y, left);
    }
}

// sums[rows][2 vectors] += a^T b over ``steps`` steps of the packed panels. The sums fill the
// registers; two more hold b, one a.
template <class Step, int rows>
NVFP4_FN void multiply_tile(const typename Step::Cell* a, const typename Step::Cell* b,
                            int64_t steps, float* sums, int64_t stride) {
    constexpr int columns = 2 * kLanes;
    Float acc[rows][2];
#pragma GCC unroll 14
    for (int i = 0; i < rows; ++i) {
        acc[i][0] = load(sums + i * stride);
        acc[i][1] = load(sums + i * stride + kLanes);
    }

    for (int64_t k = 0; k < steps; ++k) {
        const auto b0 = Step::vector(b + k * columns);
        const auto b1 = Step::vector(b + k * columns + kLanes);
        Step::prefetch(a + k * rows, b + k * columns, rows);
#pragma GCC unroll 14
        for (int i = 0; i < rows; ++i) {
            const auto x = Step::spread(a[k * rows + i]);
            acc[i][0] = Step::add(acc[i][0], x, b0);
            acc[i][1] = Step::add(acc[i][1], x, b1);
        }
    }

#pragma GCC unroll 14
    for (int i = 0; i < rows; ++i) {
        store(sums + i * stride, acc[i][0]);
        store(sums + i * stride + kLanes, acc[i][1]);
    }
}

// Fewer multiplications than this are done before a second thread has woken up.
constexpr int64_t kAlone = int64_t{1} << 20;

// rows: of a tile, whose columns are two vectors. tiles_m, tiles_n: of a block. depth_at_once:
// steps.
template <class Step, int rows, int tiles_m, int tiles_n, int depth_at_once>
void multiply_all(const MatmulArgs& args) {
    using Cell = typename Step::Cell;
    constexpr int columns = 2 * kLanes;
    constexpr int64_t stride = tiles_n * columns;
    const int64_t steps = args.depth / Step::kElements;
    const int64_t all_m = ceil_div(args.rows, rows);
    const int64_t all_n = ceil_div(args.columns, columns);
    const Workspace packed_a(static_cast<size_t>(all_m * rows * steps) * sizeof(Cell));
    const Workspace packed_b(static_cast<size_t>(all_n * columns * steps) * sizeof(Cell));
    Cell* a = packed_a.cells<Cell>();
    Cell* b = packed_b.cells<Cell>();

    // whole blocks, unless there would be too few of them to keep all threads busy to the end
    const int threads = args.rows * args.columns * args.depth < kAlone ? 1 : args.threads;
    int64_t block_m = tiles_m, block_n = tiles_n;
    while (threads > 1 && ceil_div(all_m, block_m) * ceil_div(all_n, block_n) < 4 * threads &&
           block_m * block_n > 4)
        (block_m * rows > block_n * columns ? block_m : block_n) /= 2;
    const int64_t blocks_m = ceil_div(all_m, block_m), blocks_n = ceil_div(all_n, block_n);
    const int64_t groups_m = ceil_div(all_m, kTogether), groups_n = ceil_div(all_n, kTogether);

#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        // packing is uneven work and the multiplication needs all of it, hence the barrier at the
        // end of the second loop
#pragma omp for schedule(dynamic) nowait
        for (int64_t g = 0; g < groups_m; ++g)
            Step::template pack<rows>(args.a, args.depth, a, g * kTogether,
                                      std::min(all_m, (g + 1) * kTogether));
#pragma omp for schedule(dynamic)
        for (int64_t g = 0; g < groups_n; ++g)
            Step::template pack<columns>(args.b, args.depth, b, g * kTogether,
                                         std::min(all_n, (g + 1) * kTogether));

        alignas(64) float sums[tiles_m * rows * stride];
#pragma omp for schedule(dynamic)
        for (int64_t block = 0; block < blocks_m * blocks_n; ++block) {
            const int64_t m0 = block / blocks_n * block_m, m1 = std::min(all_m, m0 + block_m);
            const int64_t n0 = block % blocks_n * block_n, n1 = std::min(all_n, n0 + block_n);
            memset(sums, 0, static_cast<size_t>((m1 - m0) * rows * stride) * sizeof(float));

            for (int64_t k = 0; k < steps; k += depth_at_once) {
                const int64_t some = std::min<int64_t>(depth_at_once, steps - k);
                for (int64_t n = n0; n < n1; ++n)
                    for (int64_t m = m0; m < m1; ++m)
                        Step::template tile<rows>(
                            a + (m * steps + k) * rows, b + (n * steps + k) * columns, some,
                            sums + (m - m0) * rows * stride + (n - n0) * columns, stride);
            }

            const int64_t row_end = std::min(args.rows, m1 * rows), column = n0 * columns;
            const int64_t count = std::min(args.columns, n1 * columns) - column;
            for (int64_t row = m0 * rows; row < row_end; ++row)
                write_row(args, sums + (row - m0 * rows) * stride, row, column, count);
        }
    }
}

// Float32 panels and fused multiply-adds.
struct FusedStep {
    using Cell = float;
    static constexpr int kElements = 1;

    template <int tile_rows>
    static void pack(const Factor& factor, int64_t depth, float* cells, int64_t first,
                     int64_t last) {
        pack_floats<tile_rows>(factor, depth, cells, first, last);
    }

#if defined(__AVX512F__)
    static NVFP4_FN Float vector(const float* p) { return (Float)_mm512_loadu_ps(p); }
    static NVFP4_FN Float add(Float sum, Float x, Float y) {
        return (Float)_mm512_fmadd_ps((__m512)x, (__m512)y, (__m512)sum);
    }
#else
    static NVFP4_FN Float vector(const float* p) { return (Float)_mm256_loadu_ps(p); }
    static NVFP4_FN Float add(Float sum, Float x, Float y) {
        return (Float)_mm256_fmadd_ps((__m256)x, (__m256)y, (__m256)sum);
    }
#endif
    static NVFP4_FN Float spread(float x) { return splat<Float>(x); }

    template <int rows>
    static NVFP4_FN void tile(const float* a, const float* b, int64_t steps, float* sums,
                              int64_t stride) {
        multiply_tile<FusedStep, rows>(a, b, steps, sums, stride);
    }

    // Both panels come from the L2 cache. Without prefetching, two cores with AVX-512 did 124
    // GFLOP/s of a 1536^3 product instead of 229.
    static NVFP4_FN void prefetch(const float* a, const float* b, int rows) {
        __builtin_prefetch(a + 16 * rows);
        __builtin_prefetch(b + 8 * 2 * kLanes);
        if (kLanes == 16) __builtin_prefetch(b + 8 * 2 * kLanes + kLanes);
    }
};

NVFP4_END
