// The kernels compiled for one instruction set; setup.py gives each of these files its own flags.
#define NVFP4_TARGET portable
#define NVFP4_VECTOR_LANES 1
#include "../lanes.h"
#include "decode.h"
#include "fingerprint.h"
#include "quantize.h"

namespace nvfp4 {
extern const Kernels portable_kernels;
const Kernels portable_kernels = {"portable", portable::quantize, portable::quantize_both,
                                  portable::decode_matrix, portable::fingerprint};
}  // namespace nvfp4
