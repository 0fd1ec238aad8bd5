// The kernels with what every processor of a family has: vectors of 4 lanes, SSE2 on x86-64 and
// NEON on aarch64.
#define NVFP4_TARGET portable
#include "instruction_set.h"
