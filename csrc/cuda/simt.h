// CUDA's execution model on a processor, for tests: the threads of a block are fibres, and a
// barrier or a shuffle is where they wait for each other. Blocks run one after the other, in an
// order and with an interleaving that ``set_order`` picks.
//
// What a GPU would leave undefined is an error here: threads that end or wait elsewhere while
// others are at a barrier, lanes missing from a shuffle. Shared memory is filled with NaN before
// each block and fenced by bytes that no one may change. Speed is no aim: a fibre is switched per
// shuffle.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>

namespace nvfp4::simt {

struct Index {
    unsigned x = 0;
};

enum class Wait { none, barrier, shuffle, done };

// Suspends the running thread until all that it waits for have come to the same place.
void wait_for_others(Wait kind);

// Words that the lanes of a warp brought to one place, at most kMail of each.
constexpr int kMail = 8;
struct Mail {
    const uint32_t* first;
    uint32_t word(int lane, int number) const { return first[2 * kMail * lane + number]; }
};

// What all lanes bring, once all have; ``kind`` has to be the same for all.
Mail gather(const uint32_t* words, int count, int kind);

// The value that the lane ``distance`` away (exclusive or) brought to the same shuffle.
uint32_t exchange(uint32_t value, int distance);

unsigned char* shared_memory();

// How sixteen products of a tensor core are added: see simt_mma.h.
void set_tensor_core(int fraction_bits, int length);

// Even: in ascending order; odd: descending, both of blocks and of warps.
void set_order(int order);

void run(const std::function<void()>& body, int64_t blocks, int threads, int shared_bytes);

}  // namespace nvfp4::simt

extern thread_local nvfp4::simt::Index threadIdx, blockIdx, blockDim, gridDim;

#define __global__
#define __launch_bounds__(...)
#define NVFP4_SHARED(name) unsigned char* const name = nvfp4::simt::shared_memory()

inline void __syncthreads() { nvfp4::simt::wait_for_others(nvfp4::simt::Wait::barrier); }

inline uint32_t __shfl_xor_sync(unsigned mask, uint32_t value, int distance) {
    if (mask != ~0u) throw std::logic_error("every shuffle here is of whole warps");
    return nvfp4::simt::exchange(value, distance);
}

inline void atomicMax(uint32_t* to, uint32_t value) { *to = *to < value ? value : *to; }

namespace nvfp4 {

inline void zero(void* to, size_t bytes, void*) { memset(to, 0, bytes); }

// There is one processor.
struct OnDevice {
    explicit OnDevice(int device) {
        if (device != 0) throw std::invalid_argument("kernels on the processor run on device 0");
    }
    ~OnDevice() {}
};

// Few, so that a grid goes over small matrices more than once.
inline int64_t multiprocessors(int) { return 1; }

template <class... P>
void launch(void (*kernel)(P...), int64_t blocks, int threads, int shared_bytes, void*,
            P... arguments) {
    simt::run([&] { kernel(arguments...); }, blocks, threads, shared_bytes);
}

}  // namespace nvfp4
