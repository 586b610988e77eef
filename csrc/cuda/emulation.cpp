// The CUDA sources under the emulation: torch.ops.sib_fast_emulated on CPU tensors, for tests. One line per op.

#include "common/schemas.h"
#include "cuda/device_check_cuda.cu"
#include "cuda/region_statistics_cuda.cu"

STABLE_TORCH_LIBRARY(sib_fast_emulated, m) { sib_fast::define_schemas(m); }
