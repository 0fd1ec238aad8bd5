// The amax of what is not rotated, straight from memory: no tile, no shared memory but a word per
// warp.
//
//     flat_amax_kernel    of a tensor whose rows follow each other without a gap: four blocks of
//                         threads per multiprocessor go over it in steps of a grid, and each raises
//                         the peak once
//     lines_amax_kernel   of each row, by a warp of its own
//
// A thread has four loads of 16 bytes under way. Maxima of BF16 are taken two at a time, with NaN
// larger than anything; what has been read last is what the kernel that rounds begins with.
#pragma once

#include "device.h"
#include "kernels.h"
#include "words.h"

namespace nvfp4::cuda {

constexpr int kUnderWay = 4;
constexpr int kWarps = kThreads / 32;

NVFP4_DEVICE uint32_t warp_max(uint32_t x, int lanes = 32) {
    NVFP4_UNROLL(64)
    for (int distance = 1; distance < lanes; distance *= 2)
        x = larger_bits(x, __shfl_xor_sync(~0u, x, distance));
    return x;
}

// Maxima of magnitudes, by place within 16 bytes: of one float32 or of two BF16 per word.
template <class Stored>
struct Maxima {
    uint32_t word[4] = {0u, 0u, 0u, 0u};

    NVFP4_DEVICE void take(const Chunk& chunk) {
        NVFP4_UNROLL(4)
        for (int i = 0; i < 4; ++i)
            if constexpr (sizeof(Stored) == 2)
                word[i] = larger_pair(word[i], chunk.word[i]);
            else
                word[i] = bits(larger_magnitude(from_bits(word[i]), from_bits(chunk.word[i])));
    }

    // As the bits of a float32.
    NVFP4_DEVICE uint32_t all() const {
        uint32_t most = 0;
        NVFP4_UNROLL(4)
        for (int i = 0; i < 4; ++i) {
            most = larger_bits(most, word[i] & (sizeof(Stored) == 2 ? 0x7fff0000u : 0x7fffffffu));
            if (sizeof(Stored) == 2) most = larger_bits(most, word[i] << 16 & 0x7fff0000u);
        }
        return most;
    }
};

// Chunks number first, first + step, ... of ``count``.
template <class Stored>
NVFP4_DEVICE Maxima<Stored> maxima_of(const Chunk* from, int64_t first, int64_t step,
                                      int64_t count) {
    Maxima<Stored> maxima;
    int64_t n = first;
    NVFP4_ROLLED
    for (; n + (kUnderWay - 1) * step < count; n += kUnderWay * step) {
        Chunk chunk[kUnderWay];
        NVFP4_UNROLL(4)
        for (int i = 0; i < kUnderWay; ++i) chunk[i] = from[n + i * step];
        NVFP4_UNROLL(4)
        for (int i = 0; i < kUnderWay; ++i) maxima.take(chunk[i]);
    }
    NVFP4_ROLLED
    for (; n < count; n += step) maxima.take(from[n]);
    return maxima;
}

// Raises one peak or two, which may be null.
template <class Stored>
__global__ void __launch_bounds__(kThreads)
    flat_amax_kernel(const Chunk* data, int64_t count, uint32_t* first, uint32_t* second) {
    NVFP4_SHARED(memory);
    auto* of_warp = reinterpret_cast<uint32_t*>(memory);
    const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
    const uint32_t mine = warp_max(maxima_of<Stored>(data, thread, step, count).all());

    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = mine;
    __syncthreads();
    if (threadIdx.x != 0) return;
    uint32_t peak = 0;
    NVFP4_UNROLL(8)
    for (int i = 0; i < kWarps; ++i) peak = larger_bits(peak, of_warp[i]);
    if (first != nullptr) atomicMax(first, peak);
    if (second != nullptr) atomicMax(second, peak);
}

// peak: of each row. across: chunks of a row; stride: from a row to the next, in chunks.
template <class Stored>
__global__ void __launch_bounds__(kThreads)
    lines_amax_kernel(const Chunk* data, int64_t rows, int64_t across, int64_t stride,
                      uint32_t* peak) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
    if (row >= rows) return;  // a whole warp at a time
    const uint32_t most = warp_max(maxima_of<Stored>(data + row * stride, lane, 32, across).all());
    if (lane == 0) peak[row] = most;
}

}  // namespace nvfp4::cuda
