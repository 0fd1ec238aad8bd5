// The kernels compiled for one instruction set; setup.py gives each of these files its own flags.
#define NVFP4_TARGET avx512
#define NVFP4_VECTOR_LANES 1
#include "../lanes.h"
#include "decode.h"
#include "fingerprint.h"
#include "quantize.h"

namespace nvfp4 {
extern const Kernels avx512_kernels;
const Kernels avx512_kernels = {"avx512", avx512::quantize, avx512::quantize_both,
                                avx512::decode_matrix, avx512::fingerprint};
}  // namespace nvfp4
