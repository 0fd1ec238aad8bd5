// The kernels with AVX-512 F, BW, DQ and VL: vectors of 16 lanes.
#define NVFP4_TARGET avx512
#include "instruction_set.h"
