// The table of kernels of one instruction set. A file that defines NVFP4_TARGET and includes this
// is all that an instruction set takes: its flags in setup.py decide how wide vectors are, and
// simd.h follows them. Everything lies in an inline namespace of that name.
#define NVFP4_VECTOR_LANES 1
#include "../lanes.h"
#include "decode.h"
#include "fingerprint.h"
#include "quantize.h"

// in two steps, so that NVFP4_TARGET is replaced by its value before it is quoted and joined
#define NVFP4_TABLE_OF(target) NVFP4_TABLE(target)
#define NVFP4_TABLE(target)                                                             \
    extern const Kernels target##_kernels;                                              \
    const Kernels target##_kernels = {#target, target::quantize, target::quantize_both, \
                                      target::decode_matrix, target::fingerprint};

namespace nvfp4 {
NVFP4_TABLE_OF(NVFP4_TARGET)
}  // namespace nvfp4
