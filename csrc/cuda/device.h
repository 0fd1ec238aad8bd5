// The words that kernels are written in: CUDA's own, or where another compiler reads this, those of
// simt.h, under which the same sources run whole blocks on a processor.
//
//     multiprocessors  of a device
//     launch(kernel, blocks, threads, shared_bytes, stream, arguments...)
//     OnDevice     the current device for as long as it lives
//     zero, raise  memory cleared in a stream; a maximum over blocks
//
// Nothing here waits for the device or allocates, so that all of it can be captured in a graph.
#pragma once

#include <cstdint>
#include <stdexcept>

#include "../lanes.h"

#if !defined(__CUDACC__)
#include "simt.h"

#define NVFP4_DEVICE inline
#else
#include <cuda_runtime.h>

#define NVFP4_DEVICE __device__ __forceinline__

#define NVFP4_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

namespace nvfp4 {

inline void check(cudaError_t status) {
    if (status != cudaSuccess) throw std::runtime_error(cudaGetErrorString(status));
}

inline void zero(void* to, size_t bytes, void* stream) {
    check(cudaMemsetAsync(to, 0, bytes, static_cast<cudaStream_t>(stream)));
}

// Makes a device the current one of this thread for as long as it lives. This module has a CUDA
// runtime of its own, linked in, and what torch told its runtime is not known here; the driver's
// context, which both set, is.
class OnDevice {
public:
    explicit OnDevice(int device) {
        check(cudaGetDevice(&before_));
        moved_ = device != before_;
        if (moved_) check(cudaSetDevice(device));
    }
    ~OnDevice() {
        if (moved_) cudaSetDevice(before_);
    }
    OnDevice(const OnDevice&) = delete;
    OnDevice& operator=(const OnDevice&) = delete;

private:
    int before_ = 0;
    bool moved_ = false;
};

inline int64_t multiprocessors(int device) {
    int count = 0;
    check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
    return count;
}

// On the current device, in ``stream``.
template <class... P>
void launch(void (*kernel)(P...), int64_t blocks, int threads, int shared_bytes, void* stream,
            P... arguments) {
    if (blocks <= 0 || blocks > 0x7fffffff)
        throw std::invalid_argument("the matrix has more tiles than a grid has blocks");
    if (shared_bytes > (48 << 10))
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   shared_bytes));
    kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes,
             static_cast<cudaStream_t>(stream)>>>(arguments...);
    check(cudaGetLastError());
}

}  // namespace nvfp4
#endif

namespace nvfp4 {

constexpr int kThreads = 256;  // of a block

// What one access of memory moves at most, and half of it.
struct alignas(16) Chunk {
    uint32_t word[4];
};
struct alignas(8) Pair {
    uint32_t low, high;
};

// Raises what several blocks raise. Most find it high enough already, and reads do not queue at an
// address as atomics do: from 16 to 65 thousand blocks come here.
NVFP4_DEVICE void raise(uint32_t* to, uint32_t value) {
    if (*static_cast<volatile uint32_t*>(to) < value) atomicMax(to, value);
}

}  // namespace nvfp4
