// The kernels compiled for one instruction set; setup.py gives each of these files its own flags.
#define NVFP4_TARGET avx2
#define NVFP4_VECTOR_LANES 1
#include "../lanes.h"
#include "decode.h"
#include "fingerprint.h"
#include "quantize.h"

namespace nvfp4 {
extern const Kernels avx2_kernels;
const Kernels avx2_kernels = {"avx2", avx2::quantize, avx2::quantize_both, avx2::decode_matrix,
                              avx2::fingerprint};
}  // namespace nvfp4
