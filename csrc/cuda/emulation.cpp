// The CUDA sources under the emulation: torch.ops.sib_fast_emulated on CPU tensors, for tests. One line per op.

#include "common/schemas.h"
#include "cuda/activation_bits_cuda.cu"
#include "cuda/activation_cuda.cu"
#include "cuda/batch_norm_cuda.cu"
#include "cuda/device_check_cuda.cu"
#include "cuda/emulation_probes.h"
#include "cuda/foreground_mask_cuda.cu"
#include "cuda/hsic_objective_cuda.cu"
#include "cuda/layer_norm_cuda.cu"
#include "cuda/region_statistics_cuda.cu"
#include "cuda/softmax_cuda.cu"

STABLE_TORCH_LIBRARY(sib_fast_emulated, m) {
  sib_fast::define_schemas(m);
  m.def("_probe(Tensor x, int number) -> Tensor");
  m.def("_record(Tensor x, bool on) -> Tensor");
  m.def("_banks(Tensor x, bool on) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(sib_fast_emulated, CPU, m) {
  m.impl("_probe", TORCH_BOX(&sib_fast::cuda::probes::probe));
  m.impl("_record", TORCH_BOX(&sib_fast::cuda::probes::record));
  m.impl("_banks", TORCH_BOX(&sib_fast::cuda::probes::banks));
}
