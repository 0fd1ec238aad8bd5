// Kernels that break a rule of CUDA each; ``run_kernel`` returns 1 if simt.h noticed.
#include "../../csrc/cuda/simt.h"

#include <cstring>

namespace {

void right(uint32_t* out) {
    auto* shared = reinterpret_cast<uint32_t*>(nvfp4::simt::shared_memory());
    shared[threadIdx.x] = threadIdx.x;
    __syncthreads();
    atomicMax(out, __shfl_xor_sync(~0u, shared[threadIdx.x ^ 32], 5));
}

void half_a_barrier(uint32_t*) {
    if (threadIdx.x < 32)
        __syncthreads();
    else
        __shfl_xor_sync(~0u, 0, 1);
}

void half_a_shuffle(uint32_t* out) {
    if (threadIdx.x % 2) *out = __shfl_xor_sync(~0u, *out, 1);
}

void early_exit(uint32_t*) {
    if (threadIdx.x >= 60) return;
    __syncthreads();
}

void overrun(uint32_t*) { nvfp4::simt::shared_memory()[256 + threadIdx.x] = 1; }

// What nobody wrote is NaN, which this kernel lets out.
void unwritten(uint32_t* out) {
    float x;
    memcpy(&x, nvfp4::simt::shared_memory(), sizeof x);
    if (x != x) *out = 77;
}

}  // namespace

extern "C" int run_kernel(const char* name) {
    void (*kernel)(uint32_t*) = !strcmp(name, "half_a_barrier")   ? half_a_barrier
                                : !strcmp(name, "half_a_shuffle") ? half_a_shuffle
                                : !strcmp(name, "early_exit")     ? early_exit
                                : !strcmp(name, "overrun")        ? overrun
                                : !strcmp(name, "unwritten")      ? unwritten
                                                                  : right;
    uint32_t out = 0;
    try {
        nvfp4::launch(kernel, 2, 64, 256, nullptr, &out);
    } catch (const std::logic_error&) {
        return 1;
    }
    return kernel == right ? out != 63 : out == 77;
}
