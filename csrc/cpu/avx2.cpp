// The kernels with AVX2 and FMA: vectors of 8 lanes.
#define NVFP4_TARGET avx2
#include "instruction_set.h"
