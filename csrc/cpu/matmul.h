// The product a b^T of packed operands, for any multiplier: packing, blocks for the caches,
// threads, and the way out.
//
// A multiplier is a type with
//   Cell                     what a packed panel holds: float, or a pair of BF16
//   kRows, kColumns          its tile of sums, as many as the registers hold
//   kTilesM, kTilesN         tiles of one block, whose sums stay in the L2 cache while the
//   contraction streams by kDepth                   steps of the contraction at a time, for the L1
//   cache kSteps                   elements of the contraction in one step pack<rows>(factor,
//   depth, cells, first, last) multiply(a, b, steps, sums, stride): sums[kRows][kColumns] += a^T b
// Every sum runs along the contraction in the same order whatever the block, the tile or the number
// of threads.
#pragma once

#include "matmul_pack.h"
#include "workspace.h"

NVFP4_BEGIN

// fl(fl(sum * a_global) * b_global) (+ bias), one cast.
inline void write_row(const MatmulArgs& args, const float* sums, int64_t row, int64_t column,
                      int64_t count) {
    const CodeMatrix &a = args.a.codes, &b = args.b.codes;
    const Wide a_global = everywhere(a.codes ? a.global_scale[a.row_scaled ? row : 0] : 1.0f);
    const Wide b_whole = everywhere(b.codes && !b.row_scaled ? b.global_scale[0] : 1.0f);
    const int64_t to = row * args.columns + column;
    for (int64_t c = 0; c < count; c += kWide) {
        const int64_t left = std::min<int64_t>(kWide, count - c), at = column + c;
        Wide y = product(load_wide(sums + c), a_global);
        y = product(
            y, b.row_scaled ? read_first<Element::float32>(b.global_scale + at, left) : b_whole);
        if (args.bias) y = sum(y, read_first<Element::float32>(args.bias + at, left));
        const size_t cells = static_cast<size_t>(left);
        alignas(64) float value[kWide];
        alignas(64) uint16_t half[kWide];
        if (args.out_element == Element::float32) {
            float* out = static_cast<float*>(args.out) + to + c;
            if (left == kWide) {
                store_wide(out, y);
            } else {
                store_wide(value, y);
                memcpy(out, value, cells * sizeof(float));
            }
            continue;
        }
        uint16_t* out = static_cast<uint16_t*>(args.out) + to + c;
        if (args.out_element == Element::bfloat16) {
            narrow_bfloat16(left == kWide ? out : half, y);
            if (left == kWide) continue;
        } else {
            store_wide(value, y);
            for (int i = 0; i < kWide; ++i) half[i] = to_float16(value[i]);
        }
        memcpy(out, half, cells * sizeof(uint16_t));
    }
}

// Fewer multiplications than this are done before a second thread has woken up.
constexpr int64_t kAlone = int64_t{1} << 20;

template <class Multiplier>
void multiply_all(const MatmulArgs& args) {
    using Cell = typename Multiplier::Cell;
    constexpr int rows = Multiplier::kRows, columns = Multiplier::kColumns;
    constexpr int64_t stride = Multiplier::kTilesN * columns;
    const int64_t steps = args.depth / Multiplier::kSteps;
    const int64_t tiles_m = tiles_of(args.rows, rows), tiles_n = tiles_of(args.columns, columns);
    const Workspace packed_a(static_cast<size_t>(tiles_m * rows * steps) * sizeof(Cell));
    const Workspace packed_b(static_cast<size_t>(tiles_n * columns * steps) * sizeof(Cell));
    Cell *a = packed_a.cells<Cell>(), *b = packed_b.cells<Cell>();
    const int threads = args.rows * args.columns * args.depth < kAlone ? 1 : args.threads;
    // whole blocks, unless there would be too few of them to keep all threads busy to the end
    int64_t block_m = Multiplier::kTilesM, block_n = Multiplier::kTilesN;
    while (threads > 1 && tiles_of(tiles_m, block_m) * tiles_of(tiles_n, block_n) < 4 * threads &&
           block_m * block_n > 4)
        (block_m * rows > block_n * columns ? block_m : block_n) /= 2;
    const int64_t blocks_m = tiles_of(tiles_m, block_m), blocks_n = tiles_of(tiles_n, block_n);
    const int64_t groups_m = tiles_of(tiles_m, kTogether), groups_n = tiles_of(tiles_n, kTogether);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        // packing is uneven work and the multiplication needs all of it, hence the barrier at the
        // end of the second loop
#pragma omp for schedule(dynamic) nowait
        for (int64_t g = 0; g < groups_m; ++g)
            Multiplier::template pack<rows>(args.a, args.depth, a, g * kTogether,
                                            std::min(tiles_m, (g + 1) * kTogether));
#pragma omp for schedule(dynamic)
        for (int64_t g = 0; g < groups_n; ++g)
            Multiplier::template pack<columns>(args.b, args.depth, b, g * kTogether,
                                               std::min(tiles_n, (g + 1) * kTogether));
        alignas(64) float sums[Multiplier::kTilesM * rows * stride];
#pragma omp for schedule(dynamic)
        for (int64_t block = 0; block < blocks_m * blocks_n; ++block) {
            const int64_t m0 = block / blocks_n * block_m, n0 = block % blocks_n * block_n;
            const int64_t m1 = std::min(tiles_m, m0 + block_m),
                          n1 = std::min(tiles_n, n0 + block_n);
            memset(sums, 0, static_cast<size_t>((m1 - m0) * rows * stride) * sizeof(float));
            for (int64_t k = 0; k < steps; k += Multiplier::kDepth) {
                const int64_t some = std::min<int64_t>(Multiplier::kDepth, steps - k);
                for (int64_t n = n0; n < n1; ++n)
                    for (int64_t m = m0; m < m1; ++m)
                        Multiplier::multiply(
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

// Float32 panels and fused multiply-adds: ``rows`` by two vectors of sums.
template <int rows, int tiles_m, int tiles_n, int depth_at_once>
struct FusedMultiplier {
    using Cell = float;
    static constexpr int kRows = rows, kColumns = 2 * kWide, kTilesM = tiles_m, kTilesN = tiles_n;
    static constexpr int kDepth = depth_at_once, kSteps = 1;

    template <int tile_rows>
    static void pack(const Factor& factor, int64_t depth, float* cells, int64_t first,
                     int64_t last) {
        pack_floats<tile_rows>(factor, depth, cells, first, last);
    }

    static NVFP4_FN void multiply(const float* a, const float* b, int64_t steps, float* sums,
                                  int64_t stride) {
        Wide acc[rows][2];
#pragma GCC unroll 14
        for (int i = 0; i < rows; ++i) {
            acc[i][0] = load_wide(sums + i * stride);
            acc[i][1] = load_wide(sums + i * stride + kWide);
        }
        for (int64_t k = 0; k < steps; ++k) {
            const Wide b0 = load_wide(b + k * kColumns), b1 = load_wide(b + k * kColumns + kWide);
            // both panels come from the L2 cache; without these two cores do 124 GFLOP/s of a
            // 1536^3 product instead of 229
            __builtin_prefetch(a + (k + 16) * rows);
            __builtin_prefetch(b + (k + 8) * kColumns);
            if (kWide == 16) __builtin_prefetch(b + (k + 8) * kColumns + kWide);
#pragma GCC unroll 14
            for (int i = 0; i < rows; ++i) {
                const Wide x = everywhere(a[k * rows + i]);
                acc[i][0] = fused(x, b0, acc[i][0]);
                acc[i][1] = fused(x, b1, acc[i][1]);
            }
        }
#pragma GCC unroll 14
        for (int i = 0; i < rows; ++i) {
            store_wide(sums + i * stride, acc[i][0]);
            store_wide(sums + i * stride + kWide, acc[i][1]);
        }
    }
};

NVFP4_END
