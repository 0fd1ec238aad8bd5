// The NVFP4 GEMM on AVX-512 BF16: codes are decoded straight into the packed panels that the multiplier reads, products
// accumulate in float32, and the global scales, the bias and the one cast happen on the way out.
//
// e2m1 * e4m3 is exact in BF16 and the product of two of them in float32, so only the order of summation is a choice.
#define NVFP4_TARGET avx512bf16
#define NVFP4_VECTOR_LANES 1
#include "../lanes.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <new>
#include <utility>

#include "decode.h"

NVFP4_BEGIN

// One micro-tile: 14 rows by 2 vectors fills 28 of 32 registers with sums; two more hold b, one a.
constexpr int kTileRows = 14;
constexpr int kTileColumns = 32;
// One block: 8 by 4 micro-tiles. Its sums (57 KB) stay in the L2 cache while the contraction streams by.
constexpr int kBlockTilesM = 8;
constexpr int kBlockTilesN = 4;
constexpr int64_t kDepth = 512;  // pairs of the contraction at a time: 28 KB of a stays in L1

// Memory for packed operands, in whole huge pages where it is large: page faults would cost as much as packing. Small and
// middling ones are kept for the next product, since clearing fresh pages took a twelfth of a 1024^3 one.
class Workspace {
   public:
    explicit Workspace(size_t bytes) : bytes_(rounded(bytes)), data_(kept().take(bytes_)) {
        if (data_) return;
        const bool huge = bytes_ >= kHugePage;
        data_ = std::aligned_alloc(huge ? kHugePage : 64, bytes_);
        if (!data_) throw std::bad_alloc();
        if (huge) madvise(data_, bytes_, MADV_HUGEPAGE);
    }
    ~Workspace() {
        if (!kept().put(bytes_, data_)) std::free(data_);
    }
    Workspace(const Workspace&) = delete;
    Workspace& operator=(const Workspace&) = delete;
    uint32_t* words() const { return static_cast<uint32_t*>(data_); }

   private:
    static constexpr size_t kHugePage = size_t{1} << 21, kLargest = size_t{1} << 24;
    static constexpr int kSlots = 4;  // two products at a time

    class Kept {
       public:
        void* take(size_t bytes) {
            const std::lock_guard<std::mutex> lock(mutex_);
            for (Slot& slot : slots_)
                if (slot.data && slot.bytes == bytes) return std::exchange(slot.data, nullptr);
            return nullptr;
        }
        bool put(size_t bytes, void* data) {
            if (bytes > kLargest) return false;
            const std::lock_guard<std::mutex> lock(mutex_);
            Slot& slot = slots_[next_++ % kSlots];  // the oldest goes
            std::free(slot.data);
            slot = {bytes, data};
            return true;
        }

       private:
        struct Slot {
            size_t bytes = 0;
            void* data = nullptr;
        };
        std::mutex mutex_;
        Slot slots_[kSlots];
        unsigned next_ = 0;
    };

    // A power of two or one and a half times it, so that layers of similar sizes share.
    static size_t rounded(size_t bytes) {
        size_t size = 4096;
        while (size < bytes) size *= 2;
        return size / 4 * 3 >= bytes && size / 4 * 3 % (size < kHugePage ? 64 : kHugePage) == 0 ? size / 4 * 3 : size;
    }
    static Kept& kept() {
        static Kept* all = new Kept;  // never destroyed: products may run while the process ends
        return *all;
    }

    size_t bytes_;
    void* data_;
};

NVFP4_FN int64_t tiles_of(int64_t size, int64_t tile) { return (size + tile - 1) / tile; }

// Sixteen rows' BF16 pairs for one block of the contraction: word[j] holds columns 2j and 2j + 1 of every row.
NVFP4_FN void decode_pairs(const CodeMatrix& m, int64_t row, int64_t rows, int64_t block, Word (&pair)[8]) {
    uint32_t half[2][kLanes] = {};
    float scale[kLanes] = {};
    for (int64_t r = 0; r < rows; ++r) {
        uint64_t codes;
        memcpy(&codes, m.codes + (row + r) * m.row_bytes + block * 8, sizeof codes);
        half[0][r] = static_cast<uint32_t>(codes);
        half[1][r] = static_cast<uint32_t>(codes >> 32);
        scale[r] = decode<E4M3, float>(m.block_scale[(row + r) / m.scale_block_rows * m.scale_stride + block] & 127u);
    }
    const Float s = load(scale);
    for (int h = 0; h < 2; ++h) {
        Word codes;
        memcpy(&codes, half[h], sizeof codes);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
            const Word even = bits(decode_codes(codes >> (8 * j)) * s), odd = bits(decode_codes(codes >> (8 * j + 4)) * s);
            pair[4 * h + j] = (odd & 0xffff0000u) | even >> 16;
        }
    }
}

// Packed as [tile][pair of the contraction][row of the tile]; rows beyond the matrix are zero.
template <int tile_rows>
void pack(const CodeMatrix& m, int64_t pairs, uint32_t* out, int64_t tile) {
    uint32_t* base = out + tile * pairs * tile_rows;
    for (int part = 0; part < tile_rows; part += kLanes) {
        const int width = std::min(kLanes, tile_rows - part);
        const int64_t row = tile * tile_rows + part, rows = std::clamp<int64_t>(m.rows - row, 0, width);
        const __mmask16 mask = static_cast<__mmask16>((1u << width) - 1u);
        for (int64_t block = 0; block < pairs / 8; ++block) {
            Word pair[8];
            decode_pairs(m, row, rows, block, pair);
#pragma GCC unroll 8
            for (int j = 0; j < 8; ++j)
                _mm512_mask_storeu_epi32(base + (block * 8 + j) * tile_rows + part, mask, (__m512i)pair[j]);
        }
    }
}

// sums[14][32] += a^T b over ``depth`` pairs.
NVFP4_FN void multiply_tile(const uint32_t* a, const uint32_t* b, int64_t depth, float* sums, int64_t stride) {
    __m512 acc[kTileRows][2];
#pragma GCC unroll 14
    for (int i = 0; i < kTileRows; ++i) {
        acc[i][0] = _mm512_loadu_ps(sums + i * stride);
        acc[i][1] = _mm512_loadu_ps(sums + i * stride + kLanes);
    }
    for (int64_t k = 0; k < depth; ++k) {
        const __m512bh b0 = (__m512bh)_mm512_loadu_si512(b + k * kTileColumns);
        const __m512bh b1 = (__m512bh)_mm512_loadu_si512(b + k * kTileColumns + kLanes);
#pragma GCC unroll 14
        for (int i = 0; i < kTileRows; ++i) {
            const __m512bh x = (__m512bh)_mm512_set1_epi32(static_cast<int>(a[k * kTileRows + i]));
            acc[i][0] = _mm512_dpbf16_ps(acc[i][0], x, b0);
            acc[i][1] = _mm512_dpbf16_ps(acc[i][1], x, b1);
        }
    }
#pragma GCC unroll 14
    for (int i = 0; i < kTileRows; ++i) {
        _mm512_storeu_ps(sums + i * stride, acc[i][0]);
        _mm512_storeu_ps(sums + i * stride + kLanes, acc[i][1]);
    }
}

// fl(fl(acc * a_global) * b_global) (+ bias), one cast.
inline void write_row(const MatmulArgs& args, const float* sums, int64_t row, int64_t column, int64_t count) {
    const float a_global = args.a.global_scale[args.a.row_scaled ? row : 0];
    for (int64_t c = 0; c < count; c += kLanes) {
        const int64_t left = std::min<int64_t>(kLanes, count - c), at = column + c;
        const Float b_global = args.b.row_scaled ? read_some<Element::float32>(args.b.global_scale + at, left)
                                                 : splat<Float>(args.b.global_scale[0]);
        Float y = load(sums + c) * a_global * b_global;
        if (args.bias) y = y + read_some<Element::float32>(args.bias + at, left);
        const int64_t to = row * args.b.rows + at;
        const __mmask16 mask = static_cast<__mmask16>((1u << left) - 1u);
        if (args.out_element == Element::float32) {
            _mm512_mask_storeu_ps(static_cast<float*>(args.out) + to, mask, (__m512)y);
        } else if (args.out_element == Element::bfloat16) {
            const Half h = __builtin_convertvector(bits(to_bfloat16(y)) >> 16, Half);
            memcpy(static_cast<uint16_t*>(args.out) + to, &h, sizeof(uint16_t) * static_cast<size_t>(left));
        } else {
            for (int64_t i = 0; i < left; ++i) static_cast<uint16_t*>(args.out)[to + i] = to_float16(y[i]);
        }
    }
}

inline void matmul(const MatmulArgs& args) {
    const int64_t pairs = args.padded_columns / 2;
    const int64_t tiles_m = tiles_of(args.a.rows, kTileRows), tiles_n = tiles_of(args.b.rows, kTileColumns);
    const Workspace packed_a(static_cast<size_t>(tiles_m * kTileRows * pairs) * 4), packed_b(static_cast<size_t>(tiles_n * kTileColumns * pairs) * 4);
    const int64_t blocks_m = tiles_of(tiles_m, kBlockTilesM), blocks_n = tiles_of(tiles_n, kBlockTilesN);
    const int threads = args.a.rows * args.b.rows * args.padded_columns < (1 << 18) ? 1 : args.threads;
#pragma omp parallel num_threads(threads)
    {
        // packing is uneven work and the multiplication needs all of it, hence the barriers at the ends of these loops
#pragma omp for schedule(dynamic, 4) nowait
        for (int64_t t = 0; t < tiles_m; ++t) pack<kTileRows>(args.a, pairs, packed_a.words(), t);
#pragma omp for schedule(dynamic, 4)
        for (int64_t t = 0; t < tiles_n; ++t) pack<kTileColumns>(args.b, pairs, packed_b.words(), t);
        alignas(64) float sums[kBlockTilesM * kTileRows][kBlockTilesN * kTileColumns];
#pragma omp for schedule(dynamic)
        for (int64_t block = 0; block < blocks_m * blocks_n; ++block) {
            const int64_t m0 = block / blocks_n * kBlockTilesM, n0 = block % blocks_n * kBlockTilesN;
            const int64_t m1 = std::min(tiles_m, m0 + kBlockTilesM), n1 = std::min(tiles_n, n0 + kBlockTilesN);
            memset(sums, 0, sizeof sums);
            for (int64_t k = 0; k < pairs; k += kDepth)
                for (int64_t n = n0; n < n1; ++n)
                    for (int64_t m = m0; m < m1; ++m)
                        multiply_tile(packed_a.words() + (m * pairs + k) * kTileRows,
                                      packed_b.words() + (n * pairs + k) * kTileColumns, std::min(kDepth, pairs - k),
                                      &sums[(m - m0) * kTileRows][(n - n0) * kTileColumns],
                                      kBlockTilesN * kTileColumns);
            const int64_t row_end = std::min(args.a.rows, m1 * kTileRows), column = n0 * kTileColumns;
            for (int64_t row = m0 * kTileRows; row < row_end; ++row)
                write_row(args, sums[row - m0 * kTileRows], row, column, std::min(args.b.rows, n1 * kTileColumns) - column);
        }
    }
}

NVFP4_END

namespace nvfp4 {
void matmul_avx512bf16(const MatmulArgs& args) { avx512bf16::matmul(args); }
}  // namespace nvfp4
