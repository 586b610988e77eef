// The namespace torch.ops.sib_fast. Its ops: common/schemas.h; their kernels: cpu/ and cuda/.

#include "common/schemas.h"

STABLE_TORCH_LIBRARY(sib_fast, m) { sib_fast::define_schemas(m); }
