// The conversion to E2M1 that Blackwell's processors have, eight elements at a time. Equal to
// e2m1_nearest of rounding.h: ties to the even code, saturating, sign kept. NVFP4_CONVERTS says
// that it is there.
#pragma once

#include <cstdint>

#if defined(__CUDA_ARCH_FEAT_SM100_ALL) || defined(__CUDA_ARCH_FEAT_SM103_ALL) || \
    defined(__CUDA_ARCH_FEAT_SM120_ALL) || defined(__CUDA_ARCH_FEAT_SM121_ALL)
#define NVFP4_CONVERTS 1

namespace nvfp4::cuda {

// Signed codes of x[0..7] * multiplier, the first in the lowest nibble.
__device__ __forceinline__ uint32_t convert_eight(const float* x, float multiplier) {
    uint32_t word;
    asm("{\n"
        ".reg .b8 a, b, c, d;\n"
        "cvt.rn.satfinite.e2m1x2.f32 a, %2, %1;\n"
        "cvt.rn.satfinite.e2m1x2.f32 b, %4, %3;\n"
        "cvt.rn.satfinite.e2m1x2.f32 c, %6, %5;\n"
        "cvt.rn.satfinite.e2m1x2.f32 d, %8, %7;\n"
        "mov.b32 %0, {a, b, c, d};\n"
        "\t}"
        : "=r"(word)
        : "f"(x[0] * multiplier), "f"(x[1] * multiplier), "f"(x[2] * multiplier),
          "f"(x[3] * multiplier), "f"(x[4] * multiplier), "f"(x[5] * multiplier),
          "f"(x[6] * multiplier), "f"(x[7] * multiplier));
    return word;
}

}  // namespace nvfp4::cuda
#endif
