"""Plants one fault at a time and says which test goes red.

    python tools/plant_faults.py /tmp/faults [word]                            every fault, or those whose name holds the word
    python tools/plant_faults.py /tmp/faults --sample 60 --seed 7 --out FILE   as many of them, from as many files as there are

Works on a copy of the tree, builds it there, and runs the short suite: first the tests next to the faulty file, then, where those
are green, everything that `make quick` runs. A fault that no test notices is printed as SURVIVED, and the exit status is then 1.
Hours for all of them; not part of `make test`. A new kernel, layer or part of the lab adds its faults to FAULTS.

--out gets JSON, rewritten after every fault: commit, machine, seed, and of each fault the file, the verdict and the first red test.
A run that was cut short goes on where it was: verdicts of the same commit and seed are kept.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.provenance import provenance, write_json  # noqa: E402

# Where the tests of a file stand; the first that fits.
NEAR = [
    (r".*/triton(/.*)?\.py", ["tests/ops", "tests/triton", "-k", "triton"]),
    (r"csrc/.*|sib_fast/ops/.*", ["tests/ops", "tests/cuda"]),
    (r"sib_fast/nn/.*|sib_fast/network_checks\.py", ["tests/nn"]),
    (r"sib_fast/lab/.*", ["tests/lab"]),
    (r"sib_fast/explain/.*", ["tests/explain"]),
    (r"sib_fast/estimators/.*|sib_fast/masks/.*", ["tests/estimators", "tests/masks"]),
    (
        r"sib_fast/.*",
        ["tests/test_loss.py", "tests/test_attach.py", "tests/test_vjp.py", "tests/test_lazy.py", "tests/test_step.py"],
    ),
]
EVERYTHING = ["-m", "not packaging", "-n", "2", "--dist", "loadfile"]
MASK, MASK_OP = "csrc/cpu/foreground_mask_kernels.cpp", "sib_fast/ops/foreground_mask/__init__.py"
STATS, STATS_HOST = "csrc/cpu/region_statistics_kernels.cpp", "csrc/cpu/region_statistics_cpu.cpp"
STATS_HEADER = "csrc/cpu/region_statistics_kernels.h"
NORM, BN_FORMULAS, BN_OPS = "csrc/common/norm.h", "csrc/common/batch_norm.h", "csrc/common/batch_norm_ops.h"
LN_FORMULAS, SOFT_FORMULAS, TASKS = "csrc/common/layer_norm.h", "csrc/common/softmax.h", "csrc/cpu/tensor_view.h"
ARGUMENTS, CUDA_NORM = "csrc/common/arguments.h", "csrc/cuda/norm.cuh"
WINDOW, SIMD, BN = "csrc/common/rank_window.h", "csrc/cpu/simd.h", "csrc/cpu/batch_norm_kernels.cpp"
BN_HOST, ACT, ACT_HOST = "csrc/cpu/batch_norm_cpu.cpp", "csrc/common/activation.h", "csrc/cpu/activation_cpu.cpp"
BN_OP, HANDOVER = "sib_fast/ops/batch_norm/__init__.py", "sib_fast/ops/_handover.py"
TRITON_MASK, TRITON_STATS = "sib_fast/ops/foreground_mask/triton/", "sib_fast/ops/region_statistics/triton/"
RUNNING_BN = "sib_fast/ops/batch_norm/running.py"
CUDA_ACT, LAYOUT, PACK = "csrc/cuda/activation_cuda.cu", "csrc/common/layout.h", "csrc/cuda/pack.cuh"
BITS, BITS_CPU, BITS_HOST = (
    "csrc/common/activation_bits.h",
    "csrc/cpu/activation_bits_kernels.cpp",
    "csrc/cpu/activation_bits_cpu.cpp",
)
CUDA_BITS = "csrc/cuda/activation_bits_cuda.cu"
ACT_OP, CONV_OP = "sib_fast/ops/activation/__init__.py", "sib_fast/ops/convolution/__init__.py"
POOL_OP = "sib_fast/ops/pooling/__init__.py"
LN, LN_HOST, LN_OP = "csrc/cpu/layer_norm_kernels.cpp", "csrc/cpu/layer_norm_cpu.cpp", "sib_fast/ops/layer_norm/__init__.py"
SOFT, SOFT_HOST, SOFT_OP = "csrc/cpu/softmax_kernels.cpp", "csrc/cpu/softmax_cpu.cpp", "sib_fast/ops/softmax/__init__.py"
OBJ, OBJ_HOST = "csrc/cpu/hsic_objective_kernels.cpp", "csrc/cpu/hsic_objective_cpu.cpp"
OBJ_HEADER, OBJ_OP, CUDA_OBJ = (
    "csrc/common/objective.h",
    "sib_fast/ops/hsic_objective/__init__.py",
    "csrc/cuda/hsic_objective_cuda.cu",
)
SELECT, BOX = "csrc/cuda/foreground_mask_select.cuh", "csrc/cuda/foreground_mask_box.cuh"
CUDA_GRAMS, CUDA_GRADS = "csrc/cuda/region_statistics_forward.cuh", "csrc/cuda/region_statistics_backward.cuh"
CUDA_MATH, CUDA_STATS = "csrc/cuda/region_statistics_math.cuh", "csrc/cuda/region_statistics_cuda.cu"
CUDA_BN, CUDA_BN_FORMULAS, CUDA_BN_PASSES = (
    "csrc/cuda/batch_norm_cuda.cu",
    "csrc/cuda/batch_norm_formulas.cuh",
    "csrc/cuda/batch_norm_passes.cuh",
)
CUDA_ROWS, CUDA_SOFT = "csrc/cuda/row_passes.cuh", "csrc/cuda/softmax_cuda.cu"
CUDA_LN, CUDA_LN_FORMULAS, CUDA_LN_COLUMNS = (
    "csrc/cuda/layer_norm_cuda.cu",
    "csrc/cuda/layer_norm_formulas.cuh",
    "csrc/cuda/layer_norm_columns.cuh",
)
CUDA_MASK, ARITHMETIC = "csrc/cuda/foreground_mask_cuda.cu", "csrc/cuda/foreground_mask_arithmetic.cuh"
HEAD = "csrc/common/head_ops.h"

# (what, file, text, replacement). The text must occur exactly once.
FAULTS = [
    ("mean not divided by C", MASK, "c + 1 == C ? scale : T(1)", "T(1)"),
    ("ties by the higher pixel", MASK, "if (in.span != 0) {", "if (in.span == 0) std::reverse(begin, end);\n    if (in.span != 0) {"),
    ("one rank too high", MASK, "const int64_t rank = window.first + j;", "const int64_t rank = window.first + j + 1;"),
    ("last pixel not counted", MASK, "if (i < pixels) ++bins[(K::key(values[i]) - low) >> shift];", ""),
    ("candidates of the last group lost", MASK, "if (any == 0) continue;\n    }", "if (any == 0) continue;\n    } else continue;"),
    ("window one column short", MASK, "row[x] = static_cast<T>((prefix[x + 2 * reach_x + 1]", "row[x] = static_cast<T>((prefix[x + 2 * reach_x]"),
    ("leaving row forgotten", MASK, "} else if (leaving >= 0) {", "} else if (false && leaving >= 0) {"),
    ("box not divided by w²", MASK, "const double scale = 1.0 / (static_cast<double>(window_size) * static_cast<double>(window_size));", "const double scale = 1.0 / static_cast<double>(window_size);"),
    ("eps forgotten", MASK, "+ static_cast<T>(eps);", "+ T(0) * static_cast<T>(eps);"),
    ("rank gradient of t forgotten", MASK, "if (at[j] >= 0) grad_d[at[j]] -=", "if (at[j] < -1) grad_d[at[j]] -="),
    ("sign of rho", MASK, "const double weight_of[3] = {-rho, rho, -alpha};", "const double weight_of[3] = {rho, -rho, -alpha};"),
    ("alpha forgotten", MASK, "const double weight_of[3] = {-rho, rho, -alpha};", "const double weight_of[3] = {-rho, rho, 0.0};"),
    ("gradient where hi <= lo", MASK, "rho = levels[kHi] <= levels[kLo] ? 0.0 : rho / geo.slope;", "rho = rho / geo.slope;"),
    ("sign of g in the gradient", MASK, "const T sign = m > T(0) ? inverse_channels : m < T(0) ? -inverse_channels : T(0);\n    grad_plane[i]", "const T sign = inverse_channels;\n    grad_plane[i]"),
    ("temperature ignored", WINDOW, "- position)) / temperature) / total;", "- position)) / 0.1) / total;"),
    ("nearest rank rounded down", WINDOW, "std::floor(position + 0.5)", "std::floor(position)"),
    ("exp 1e-6 off", SIMD, "float p = 1.98412698412698e-4f;", "float p = 1.98412698412698e-4f + 0.05f;"),
    ("float64 sigmoid of float accuracy", SIMD, "p = p * r + 1.0 / 6.0;", "p = p * r + 1.0 / 6.0000001;"),
    ("background variance of R·M", STATS, "sum_v += static_cast<double>(r[i] * (T(1) - m[i]));", "sum_v += static_cast<double>(r[i] * m[i]);"),
    ("variances not merged by Chan's rule", STATS_HEADER, "into.m2 += part.m2 + delta * delta * into.count * part.count / total;", "into.m2 += part.m2;"),
    ("variance biased", STATS_HOST, "m.m2 / (m.count - 1)", "m.m2 / m.count"),
    ("a task's Gram lost", STATS_HOST, "for (int64_t t = 1; t < tasks; ++t) {", "for (int64_t t = 2; t < tasks; ++t) {"),
    ("longer block's tail not cleared", STATS, "for (int64_t i = elements; i < row; ++i) packed[k][n * b.row + i] = 0;", ""),
    ("Gram cotangent not symmetrised", STATS_HOST, "static_cast<T>(g[i * N + j] + g[j * N + i])", "static_cast<T>(2 * g[i * N + j])"),
    ("gradient of the variance without its mean", STATS, "scale_v * (value[i] * rest - mean_v)", "scale_v * (value[i] * rest)"),
    ("whole-map variance has no gradient", STATS, "+ scale_r * (value[i] - mean_r)", ""),
    ("background sign in grad_mask", STATS, "term[i] = value[i] * (inside[i] - grad_v);", "term[i] = value[i] * (inside[i] + grad_v);"),
    ("x left out of grad_mask", STATS, "if (grads.grad_x.data || grads.grad_mask) {", "if (grads.grad_x.data) {"),
    ("long float sums", STATS, "constexpr int64_t kMaxRow = 1024;", "constexpr int64_t kMaxRow = 1048576;"),
    ("grad_mask not cleared", STATS, "std::memset(grads.grad_mask + n * pixels_all + from, 0, (to - from) * sizeof(T));", ""),
    ("channels_last gradient transposed", STATS, "const T* from = fastest ? in + first * block.channels + c : in + c * block.pixels + first;", "const T* from = in + c * block.pixels + first;"),
    ("norms: pivot not added back", NORM, "return {pivot + shift, variance,", "return {pivot, variance,"),
    ("batch norm: B forgotten", BN_FORMULAS, "((gy - k[2]) - (x - k[0]) * k[3])", "(gy - k[2] + T(0) * x)"),
    ("batch norm: kappa without B·T", BN_FORMULAS, "const double kappa = V - A * U - B * Tx;", "const double kappa = V - A * U;"),
    ("batch norm: u_gamma out of omega", BN_FORMULAS, "omega_g = u_gamma - scale * Tx;", "omega_g = -scale * Tx;"),
    ("batch norm: u_beta forgotten", BN_FORMULAS, "k[3] = u_beta - scale * U;", "k[3] = -scale * U;"),
    ("batch norm: kappa out of x", BN_FORMULAS, "-(invstd * omega_dot + scale * invstd * kappa) * invstd", "-(invstd * omega_dot) * invstd"),
    ("batch norm: a chunk of rows lost", BN_HOST, "for (int64_t i = 0; i < chunks; ++i) {\n      for (int s", "for (int64_t i = 0; i + 1 < chunks; ++i) {\n      for (int s"),
    ("batch norm: last row of a chunk not written", BN, "for (int64_t row = part.begin; row < part.end; ++row) {\n      const int64_t at = row * channels;\n#pragma omp simd\n      for (int64_t c = 0; c < channels; ++c) visit", "for (int64_t row = part.begin; row + 1 < part.end; ++row) {\n      const int64_t at = row * channels;\n#pragma omp simd\n      for (int64_t c = 0; c < channels; ++c) visit"),
    ("batch norm: channels last read as channels first", BN_OPS, "return {!first || spatial == 1,", "return {spatial == 1,"),
    ("batch norm: a cotangent's layout not looked at", BN_OPS, 'check_alike(kOp, "u", u, x, shape.channels_last);', ""),
    ("batch norm: addend forgotten", BN, "put(grad_x + i, at(i, of) + get(addend[i]));", "put(grad_x + i, at(i, of));"),
    ("batch norm: addend's layout not looked at", BN_OPS, 'if (addend) check_alike(kOp, "addend", *addend, x, shape.channels_last);', ""),
    ("running batch norm: grad_weight about 0", BN_HOST, "m[c] = value_of(centre, c, 0.0);", "m[c] = 0.0;"),
    ("running batch norm: eps forgotten", BN_HOST, "std::sqrt(square + eps)", "std::sqrt(square)"),
    ("running batch norm: gamma out of grad_x", BN_HOST, "batch_norm_coefficients({0.0, square, invstd}, value_of(gamma, c, 1.0), 0.0, k);", "batch_norm_coefficients({0.0, square, invstd}, 1.0, 0.0, k);"),
    ("running batch norm: u and grad_y change places", RUNNING_BN, "_OPS.backward(u, grad_y, weight,", "_OPS.backward(grad_y, u, weight,"),
    ("running batch norm: x gets nothing of u_weight", RUNNING_BN, "if need_x and u_weight is not None:", "if False:"),
    ("running batch norm: weight's gradient in every VJP", RUNNING_BN, "need_weight = weight is not None and needed(ctx, 1)", "need_weight = weight is not None"),
    ("handover: not added", BN_OP, "addend = None if handed is None or not need_x else _as_laid_out(handed, x)", "addend = None"),
    ("handover: lost where there is no grad_y", BN_OP, "return handed if need_x else None, None, None, None", "return None, None, None, None"),
    ("handover: the addend has no gradient", BN_OP, "to_addend = u if ctx.need_x and ctx.needs_input_grad[5] else None", "to_addend = None"),
    ("handover: x itself goes to the backward op", HANDOVER, "(x if own is None else own, *rest)", "(x, *rest)"),
    ("handover: x without a gradient asks for one", HANDOVER, "x.detach() if x.requires_grad else None", "x.detach()"),
    ("bfloat16 truncated", SIMD, "(bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16", "bits >> 16"),
    ("float16 subnormals rounded off", SIMD, "body < 0x38800000u ? small : normal", "body < 0x38800000u ? 0 : normal"),
    ("float16 ties away from even", SIMD, "body - 0x38000000u + 0x0fffu + ((body >> 13) & 1u)", "body - 0x38000000u + 0x1000u"),
    ("activation: last element of a task lost", ACT_HOST, "in<E>(saved) + from, to - from,", "in<E>(saved) + from, to - from - 1,"),
    ("activation: u left out of to_saved", ACT, 'to_saved = u_gy * (slope * (T(2) + x * (rest - s)));', 'to_saved = u_gy / u * (slope * (T(2) + x * (rest - s)));'),
    ("activation: silu's f'' by half", ACT, 'u_gy * (slope * (T(2) + x * (rest - s)))', 'u_gy * (slope * (T(1) + x * (rest - s)))'),
    ("activation: hardswish past its kinks", ACT, '(x > T(-3)) & (x < T(3)) ? u_gy * (T(1) / T(3)) : T(0)', 'u_gy * (T(1) / T(3))'),
    ("activation: gelu's sign", ACT, 'density * (T(2) - x * x)', 'density * (x * x - T(2))'),
    ("activation: gelu_tanh without the cubic's second derivative", ACT, '(rest - s) * z1 * z1 + z2)', '(rest - s) * z1 * z1)'),
    ("activation: mish overflows", ACT, 'Math::exp(x > T(20) ? T(20) : x)', 'Math::exp(x)'),
    ("activation: 1 - s cancels", ACT, 'rest = e * s;', 'rest = T(1) - s;'),
    ("activation: softplus without beta", ACT, 'T(0) : a * s * rest', 'T(0) : s * rest'),
    ("activation: f'' left out", ACT_OP, "return to_grad_y if need_grad_y else None, to_saved if need_saved else None, None, None, None", "return to_grad_y if need_grad_y else None, None, None, None, None"),
    ("activation: zeros instead of nothing", ACT_OP, "return _first_derivative(ctx, u) if need_grad_y else None, None, None, None, None", "return _first_derivative(ctx, u) + torch.zeros_like(u) if need_grad_y else None, None, None, None, None"),
    ("activation: in place keeps x as it is after", ACT_OP, "None if rule.saves_result else x.clone()", "None if rule.saves_result else x.detach()"),
    ("activation: in place not marked", ACT_OP, "        ctx.mark_dirty(x)\n", ""),
    ("convolution: a phase too far", CONV_OP, "taps.append((r, (r + padding - k) // stride, k))", "taps.append((r, (r + padding - k) // stride + (k == kernel - 1), k))"),
    ("convolution: phases need_x of the rest", CONV_OP, "needs, grads = [need_x and not phases, need_weight and not weight_apart, need_bias]", "needs, grads = [need_x and not phases, need_weight and not weight_apart and not phases, need_bias]"),
    ("convolution: u in the place of grad_y", CONV_OP, "_OPS.backward(grad_y, u, weight, *ctx.geometry, False, True, False)", "_OPS.backward(u, grad_y, weight, *ctx.geometry, False, True, False) if u.shape == grad_y.shape else _OPS.backward(grad_y, 2 * u, weight, *ctx.geometry, False, True, False)"),
    ("pooling: u not gathered", POOL_OP, "indices.flatten(2))", "indices.flatten(2).flip(2))"),
    ("pooling: the mean's u by its backward", POOL_OP, "_OPS.average(u, *ctx.geometry) if wanted", "2 * _OPS.average(u, *ctx.geometry) if wanted"),
    ("second derivative a silent zero", MASK_OP, "def backward(ctx, *_):\n        raise NotImplementedError(", "def backward(ctx, *_):\n        return (None,) * 8\n        raise NotImplementedError("),
    ("saved mask scaled in place", MASK_OP, "        mask, mean_map, levels, ranks = ctx.saved_tensors\n", "        mask, mean_map, levels, ranks = ctx.saved_tensors\n        with torch.no_grad():\n            mask.detach().mul_(0.9)\n"),
    # CUDA sources, through their emulation
    ("objective: row's norm has no gradient", OBJ_HOST, 'to.grad_vjp[own] -= along.vjp', 'to.grad_vjp[own] -= 0.0 * along.vjp'),
    ('objective: gradient through a norm at the floor', OBJ_HEADER, 'return diagonal > kNormFloor * kNormFloor;', 'return diagonal > 0.0;'),
    ("objective: x's gradient centred with R's mean", OBJ, '(row_vjp[j] * own_vjp * columns.inverse_vjp[j] + (shift_vjp - columns.mean_vjp[j]))', '(row_vjp[j] * own_vjp * columns.inverse_vjp[j] + (shift_vjp - columns.mean_x[j]))'),
    ('objective: products of means counted once', OBJ_HEADER, '2.0 * images * mean_products', 'images * mean_products'),
    ('objective: HSIC over N²', OBJ_HEADER, '1.0 / ((n - 1.0) * (n - 1.0))', '1.0 / (n * n)'),
    ('objective: sign of the foreground', OBJ_HEADER, 'return kind == 1 ? -lambda_fg : -lambda_fg * exp(-foreground);', 'return kind == 1 ? lambda_fg : -lambda_fg * exp(-foreground);'),
    ('objective: expm1 by exp', OBJ_HEADER, 'lambda_bg * expm1(background)', 'lambda_bg * (exp(background) - 1.0)'),
    ('objective: variance not averaged', OBJ_HOST, 'total[1] = variance * scale.mean;', 'total[1] = variance;'),
    ('objective: cotangent of the foreground dropped', OBJ_HOST, '+ to.to_foreground.read()) * batch.hsic', ') * batch.hsic'),
    ("grams: a ring of one stage", CUDA_STATS, "SIB_CHECK(kStatistics, fit >= 2,", "SIB_CHECK(kStatistics, fit >= 0,"),
    ('objective: last row of a block left out', CUDA_OBJ, 'const bool has_row = i < end;', 'const bool has_row = i < end && i % 33 != 32;'),
    ('objective: columns overwritten while read', CUDA_OBJ, '__syncthreads();  // the columns before these have been read', ''),
    ('objective: columns read before they are there', CUDA_OBJ, '        __syncthreads();\n      }\n      if (!has_row) continue;', '      }\n      if (!has_row) continue;'),
    ('objective: diagonal by the wrong lane', CUDA_OBJ, 'if (lane != i % 32) return;', 'if (lane != 0) return;'),
    ("objective: diagonal's own term dropped", CUDA_OBJ, 'diagonal_vjp = grad_k * pair_vjp;', 'diagonal_vjp = 0.0;'),
    ('objective: partial sums of one warp lost', CUDA_OBJ, 'for (int w = 0; w < kHsicWarps; ++w) sums[s]', 'for (int w = 1; w < kHsicWarps; ++w) sums[s]'),
    ("objective: x's norms in place of R's", CUDA_OBJ, 'rows[N + i] = own_x;', 'rows[N + i] = own_vjp;'),
    ("objective: variances out of the gradient's graph", OBJ_OP, 'ctx.save_for_backward(background_variance, gram_vjp', 'ctx.save_for_backward(background_variance.detach(), gram_vjp'),
    ('objective: gradient of base scaled', OBJ_OP, 'grads = (grad_loss, *grads)', 'grads = (2 * grad_loss, *grads)'),
    ('cuda mask: mean not divided by C', CUDA_MASK, 'out.value[v] = sum[v] * scale;', 'out.value[v] = sum[v];'),
    ('cuda mask: ties by the higher pixel', SELECT, 'below += shared->chosen[j] < mine;', 'below += (shared->chosen[j] ^ 0xffffffffu) < (mine ^ 0xffffffffu);'),
    ('cuda mask: one rank too high', SELECT, 'static_cast<int64_t>(range.base) + below - window.first;', 'static_cast<int64_t>(range.base) + below - window.first + 1;'),
    ('cuda mask: histogram flushed without its barrier', SELECT, '  __syncthreads();\n  finish_histogram(s, n, low, shift, s.cut', '  finish_histogram(s, n, low, shift, s.cut'),
    ('cuda mask: prefix sums read without their barrier', BOX, 'prefix[x] = sum += prefix[x];\n  __syncwarp();', 'prefix[x] = sum += prefix[x];'),
    ('cuda mask: candidates ranked without their barrier', SELECT, '    if (rank < 0 || rank >= pixels) rank_pixels[j] = -1;\n  }\n  __syncthreads();\n  for (uint32_t i', '    if (rank < 0 || rank >= pixels) rank_pixels[j] = -1;\n  }\n  for (uint32_t i'),
    ('cuda mask: fixed point truncates', BOX, 'uint32_t) { return __float2uint_rn(h * one); }', 'uint32_t) { return static_cast<uint32_t>(h * one); }'),
    ('cuda mask: ten bits of fraction', CUDA_MASK, 'sizeof(Sum) == 4 ? 24 : 30', 'sizeof(Sum) == 4 ? 10 : 30'),
    ('cuda mask: window sums overflow', ARITHMETIC, 'const int bits = sum_bits - bit_length(', 'const int bits = 2 + sum_bits - bit_length('),
    ('cuda mask: alpha and rho swapped', BOX, 'l == kLo ? -rho : l == kHi ? rho : -alpha;', 'l == kLo ? -alpha : l == kHi ? alpha : -rho;'),
    ('cuda mask: sign of rho', BOX, 'rho -= static_cast<double>(grad_g)', 'rho += static_cast<double>(grad_g)'),
    ('cuda mask: strides of rows and columns swapped', CUDA_MASK, 'offset = y * vjp.stride_h + x * vjp.stride_w;', 'offset = x * vjp.stride_h + y * vjp.stride_w;'),
    ('cuda mask: alpha of the first image for all', BOX, 'alpha += g.sums[2 * (n * blocks + b)];', 'alpha += g.sums[2 * b];'),
    ('cuda mask: rank terms of t within the wrong reach', BOX, 'if (across <= g.reach_x && -across <= g.reach_x)', 'if (across <= c.reach && -across <= c.reach)'),
    ('cuda mask: rank terms of t forgotten', BOX, 'if (down <= c.reach && -down <= c.reach) sum -= spike_weight[k];', ''),
    ('cuda mask: one zero too few is a tie', SELECT, 'stop < state.ties;', 'stop <= state.ties;'),
    ('cuda mask: NaN hidden', SELECT, 'if (s.state[n].not_finite != 0) quantile = NAN;', ''),
    ('cuda mask: counters not cleared', CUDA_MASK, '    counters[w] = 0;', '    if (w % 2 == 0) counters[w] = 0;'),
    ('cuda mask: narrowing forgets what lies below', SELECT, 'range.base += shared->found[1];', ''),
    ('cuda mask: gradient where hi <= lo', BOX, 'rho = level[kHi] <= level[kLo] ? 0.0 : rho / g.slope;', 'rho = rho / g.slope;'),
    ('cuda mask: packed channels lose one', CUDA_MASK, 'for (int v = 0; v < V * A; ++v) sum[v % V]', 'for (int v = 0; v < V * A - (A > 1); ++v) sum[v % V]'),
    ('cuda mask: range of the first chunk only', SELECT, 'const Key* range = ranges + 2 * (n * s.cut.chunks + c);', 'const Key* range = ranges + 2 * n * s.cut.chunks;'),
    ('cuda statistics: panels without their gap', CUDA_GRAMS, 'return (rows + 1) * kPanel;', 'return rows * kPanel;'),
    ("cuda statistics: moments about another image's first element", CUDA_GRAMS, 'const auto shift = shifts[n - first_i];', 'const auto shift = shifts[0];'),
    ("cuda statistics: moments' shifts read before they are there", CUDA_GRAMS, 'moment_shifts(args.pixels, map, first_i + tid);\n    __syncthreads();', 'moment_shifts(args.pixels, map, first_i + tid);'),
    ("cuda norms: cuts of an H200 on every device", "csrc/cuda/norm.cuh", "blocks_for(x, kNormRounds)", "int64_t{16 * 132}"),
    ('cuda statistics: cuts of an H200 on every device', "csrc/cuda/platform.cuh", 'return rounds * device_of(tensor).multiprocessors;', 'return rounds * (132 + 0 * device_of(tensor).multiprocessors);'),
    ('cuda mask: unequal chunks', ARITHMETIC, 'divide_up(pixels, divide_up(pixels, kMostPixels) * kBatch) * kBatch;', 'kMostPixels;'),
    ('cuda mask: too long a window', CUDA_MASK, 'SIB_CHECK(kOp, o.length <= kLongestWindow,', 'SIB_CHECK(kOp, o.length <= kLongestWindow + 8,'),
    ('cuda mask: too wide a row', CUDA_MASK, 'SIB_CHECK(kOp, o.width <= kWidest,', 'SIB_CHECK(kOp, o.width <= kWidest + 1,'),
    ('cuda pack: the second half of a long one not stored', PACK, 'part < static_cast<int>(sizeof(pack)) / 16; ++part', 'part < 1; ++part'),
    ('objective: rows combined before they are written', CUDA_OBJ, '  __syncthreads();  // the rows are written, and the shared memory is free\n', ''),
    ('objective: a launch for the rows of any batch', CUDA_OBJ, 'if (N <= kHsicOneBlock) {', 'if (N < 0 * kHsicOneBlock) {'),
    ('cuda statistics: Gram not mirrored', CUDA_GRAMS, '      gram[j * shape.images + i] = value;\n', ''),
    ('cuda statistics: diagonal tile shifted', CUDA_GRAMS, '(diagonal ? 0 : kTile)', '(diagonal ? 8 : kTile)'),
    ('cuda statistics: no barrier before the products', CUDA_GRAMS, '    __syncthreads();\n    // Everyone is past the products', '    // Everyone is past the products'),
    ('cuda statistics: one copy too many under way, forward', CUDA_GRAMS, 'copy_async_wait(args.stages - 2);', 'copy_async_wait(args.stages - 1);'),
    ('cuda statistics: one copy too many under way, backward', CUDA_GRADS, 'copy_async_wait(args.stages - 2);', 'copy_async_wait(args.stages - 1);'),
    ('cuda statistics: one panel lost', CUDA_GRAMS, 'for (int p = 0; p < kDepth / kPanel / Tiles::kGroups;', 'for (int p = 0; p < kDepth / kPanel / Tiles::kGroups - (kDepth / kPanel / Tiles::kGroups > 1);'),
    ('cuda statistics: last part cut short', CUDA_GRAMS, 'static_cast<uint32_t>(static_cast<uint64_t>(chunks) * (part + 1) / args.parts);', 'static_cast<uint32_t>(static_cast<uint64_t>(chunks) / args.parts * (part + 1));'),
    ('cuda statistics: variance without its mean', CUDA_GRAMS, 'const double squares = sums[2 * m + 1] - sums[2 * m] * sums[2 * m] / count;', 'const double squares = sums[2 * m + 1];'),
    ('cuda statistics: padding counted in the variance', CUDA_GRAMS, 'if (j >= left) break;', ''),
    ("cuda statistics: x's mask gradient only where x's own is needed", CUDA_STATS, '(grad == nullptr && grad_mask == nullptr)', '(grad == nullptr)'),
    ('cuda statistics: need_vjp ignored', HEAD, 'Tensor grad_vjp = grad_like(vjp, need_vjp)', 'Tensor grad_vjp = grad_like(vjp, false)'),
    ('cuda statistics: cotangent not symmetrised', CUDA_GRADS, 'static_cast<T>(grad[i * N + j] + grad[j * N + i])', 'static_cast<T>(2 * grad[i * N + j])'),
    ('cuda statistics: small part dropped (twin)', "csrc/cuda/emulation.h", '    product(1, 0);\n    product(0, 1);\n', '    product(1, 0);\n'),
    ('cuda statistics: chain of a whole part', CUDA_GRAMS, 'for (int e = 0; e < Math::kAcc; ++e) sum[e] += chain[e];', 'for (int e = 0; e < Math::kAcc; ++e) sum[e] = chain[e];'),
    ('cuda statistics: flush forgets the sum before', CUDA_GRAMS, 'total[e] + static_cast<double>(sum[begin + e]);', 'static_cast<double>(sum[begin + e]);'),
    ("cuda statistics: grad_M of the vjp overwrites x's", CUDA_STATS, 'args.add_mask = mask_written && !in_parts;', 'args.add_mask = false;'),
    ('cuda statistics: channel parts of grad_M overwrite', CUDA_STATS, 'args.channel_parts, mask_written);', 'args.channel_parts, false);'),
    ('cuda statistics: background sign in grad_M', CUDA_GRADS, 'args.foreground ? r * product : -r * product', 'r * product'),
    ('cuda statistics: background gradient overwrites', CUDA_STATS, 'args.add_grad = which >= 2;', 'args.add_grad = false;'),
    ('cuda statistics: variance gradient without its mean', CUDA_GRADS, '((r * (T(1) - m) - variance.background_high) - variance.background_low)', '(r * (T(1) - m))'),
    ('cuda statistics: no barrier in the backward', CUDA_GRADS, '        __syncthreads();\n        // Everyone', '        // Everyone'),
    ('cuda statistics: swizzle of one side only', CUDA_MATH, 'b + in_panel(8 * n + g, 2 * t)', 'b + (8 * n + g) * kPanel + 2 * t'),
    ("cuda statistics: a group's part lost", CUDA_GRAMS, 'const int64_t count = static_cast<int64_t>(args.parts) * Tiles::kGroups;', 'const int64_t count = static_cast<int64_t>(args.parts) * Tiles::kGroups - (Tiles::kGroups > 1);'),
    ('cuda statistics: channels_last mask by the wrong axis', CUDA_GRAMS, 'const int64_t p = !valid ? 0 : map.channels_fastest ? slow_at : fast_at;', 'const int64_t p = !valid ? 0 : map.channels_fastest ? fast_at % shape.pixels : fast_at;'),
    ('cuda statistics: tf32 asked, tf32x3 run', HEAD, 'precision == "tf32" ? Precision::tf32 : Precision::tf32x3', 'Precision::tf32x3'),
    ("cuda norms: a few elements' sum out of their squares about the pivot", CUDA_NORM, "(2.0 * s + shift) * step;", "shift * step;"),
    ("cuda batch norm: y about the rounded mean", CUDA_BN_FORMULAS, "exact[2] += (static_cast<double>(centre) - found.mean) * exact[1];", ""),
    ("cuda batch norm: grad_x about the rounded mean", CUDA_BN_FORMULAS, "    exact[2] += gap * exact[3];\n", ""),
    ("cuda batch norm: grad_weight about the rounded mean", CUDA_BN_FORMULAS, "{sums[0], sums[1] + gap * sums[0]};", "{sums[0], sums[1]};"),
    ("cuda batch norm: B of the double backward about the rounded mean", CUDA_BN_FORMULAS, "sums[4] + gap * sums[3]}", "sums[4]}"),
    ('cuda batch norm: addend forgotten', CUDA_BN_FORMULAS, 'to[0] = added ? grad_x + v[0] : grad_x;', 'to[0] = grad_x;'),
    ('cuda batch norm: addend not loaded, channels first', CUDA_BN_PASSES, 'load_next(walk, 0);', 'load_next(walk, Op::kUnsummed);'),
    ('cuda batch norm: addend not loaded, channels last', CUDA_BN_PASSES, 'load_rows(row, 0);', 'load_rows(row, Op::kUnsummed);'),
    ('cuda batch norm: addend summed, channels first', CUDA_BN_PASSES, 'v[t][i] = static_cast<T>(raw[u][Op::kUnsummed + t].value[i]);', 'v[t][i] = static_cast<T>(raw[u][t].value[i]);'),
    ('cuda batch norm: addend summed, channels last', CUDA_BN_PASSES, 'v[t][u] = static_cast<T>(raw[u][Op::kUnsummed + t].value[i]);', 'v[t][u] = static_cast<T>(raw[u][t].value[i]);'),
    ('cuda batch norm: addend in packs wherever it starts', CUDA_BN, 'for (int t = 0; t < Op::kInputs; ++t) note(a.in[t], t);', 'for (int t = 0; t < Op::kInputs; ++t) note(a.in[t < Op::kUnsummed ? Op::kInputs - 1 : t], t);'),
    ("batch norm: kappa without A·U", BN_FORMULAS, "kappa = V - A * U - B * Tx;", "kappa = V - B * Tx;"),
    ("batch norm: mean of omega·x̂ without its gy", BN_FORMULAS, "omega_dot = omega_u * Tx + omega_g * B;", "omega_dot = omega_u * Tx;"),
    ("batch norm: to_weight a mean", BN_FORMULAS, "to_gamma = invstd * count * kappa;", "to_gamma = invstd * kappa;"),
    ('cuda batch norm: count of an image', CUDA_BN, 'a.of.count = static_cast<double>(shape.count());', 'a.of.count = static_cast<double>(shape.spatial);'),
    ('cuda batch norm: runs of x taken for whole packs wherever it starts', CUDA_BN, 'const bool on_boundaries = misaligned == 0 && ', 'const bool on_boundaries = '),
    ("cuda batch norm: a run's last pack lost", CUDA_BN_PASSES, 'j_end = min(first + at.pack_step, at.packs);', 'j_end = min(first + at.pack_step, at.packs - (at.packs > 1));'),
    ('cuda batch norm: runs one channel apart', CUDA_BN_PASSES, '(kThreads >> at.width_bits) * at.channels * spatial;', '(kThreads >> at.width_bits) * spatial;'),
    ("cuda batch norm: neighbours' places counted", CUDA_BN_PASSES, '        blank(v, lo[u], hi[u]);\n', ''),
    ("cuda batch norm: neighbours' places overwritten", PACK, "if (packed && lo == 0 && hi == V) return", "if (packed && hi == V) return"),
    ("cuda batch norm: a pack's first place not written", PACK, 'if (i >= lo && i < hi) to[first + i]', 'if (i > lo && i < hi) to[first + i]'),
    ("cuda batch norm: a warp's sums lost", CUDA_BN_PASSES, 'for (int w = 0; w < kWarps; ++w) sums[k]', 'for (int w = 1; w < kWarps; ++w) sums[k]'),
    ("cuda batch norm: block's sums without their barrier", CUDA_BN_PASSES, '  __syncthreads();\n#pragma unroll\n  for (int k = 0; k < K; ++k) {\n    sums[k] = 0.0;', '#pragma unroll\n  for (int k = 0; k < K; ++k) {\n    sums[k] = 0.0;'),
    ('cuda batch norm: the last row counted again', CUDA_BN_PASSES, '        blank(v, 0, rows);\n', ''),
    ("cuda norms: rows of threads added without a barrier", CUDA_NORM, "    __syncthreads();\n    if (thread >= half) continue;", "    if (thread >= half) continue;"),
    ("cuda norms: a row of threads lost", CUDA_NORM, "half >= width; half /= 2", "half > width; half /= 2"),
    ('cuda batch norm: coefficients over sums still to be read', CUDA_BN_PASSES, '    __syncthreads();  // the sums have been read\n', ''),
    ("cuda batch norm: a tile's coefficients by the thread's first channel", CUDA_BN_PASSES, 'read_coefficients(of_tile, x * V + i, width * V, k[i]);', 'read_coefficients(of_tile, x * V, width * V, k[i]);'),
    ('cuda batch norm: last part not merged', CUDA_BN_PASSES, 'p < a.at.parts; p += 32', 'p + 1 < a.at.parts; p += 32'),
    ("cuda batch norm: merged about the first channel's centre", CUDA_BN_PASSES, 'Op::coefficients(a.of, c, a.centre(c), sums, k);', 'Op::coefficients(a.of, c, a.centre(0), sums, k);'),
    ("activation: hardswish's kink at 3", ACT, "x < T(3) ? u * (x", "x <= T(3) ? u * (x"),
    ("activation: elu's f'' at 0", ACT, "u_gy * (x < T(0) ? e : T(0))", "u_gy * (x <= T(0) ? e : T(0))"),
    ("cuda activation: a tile's rest lost", CUDA_ACT, "tile < count; tile += gridDim.x * kTile", "tile + kTile <= count || tile == 0; tile += gridDim.x * kTile"),
    ("cuda activation: one tile a block", CUDA_ACT, "tile += gridDim.x * kTile", "tile += count"),
    ("cuda activation: packs past the end", CUDA_ACT, "aligned && tile + kTile <= count;", "aligned && tile + kTile <= count + 1;"),
    ("cuda activation: packs where nothing is aligned", PACK, "% 16 != 0) return false;", "% 16 != 0) return true;"),
    ("cuda activation: last element of a rest lost", CUDA_ACT, "tile + kTile < count ? tile + kTile : count;", "tile + kTile < count ? tile + kTile : count - 1;"),
    ("cuda activation: gy not read element by element", CUDA_ACT, "g.value[k] = gy[i];", "g.value[k] = u[i];"),
    ("cuda activation: a part alone lost", CUDA_ACT, "if (to_saved != nullptr) g = ", "if (to_saved != nullptr && to_grad_y != nullptr) g = "),
    ("cuda activation: exp not clamped", CUDA_ACT, "return ::expf(x > 87.0f ? 87.0f : x);", "return ::expf(x);"),
    ("cuda activation: reciprocal not refined", CUDA_ACT, "return ::fmaf(r, ::fmaf(-y, r, 1.0f), r);", "return ::fmaf(r, ::fmaf(-y, r, 1.001f), r);"),
    ("cuda activation: gelu's f' without the density", ACT, "0.70710678118654752440))) + x * density)", "0.70710678118654752440))))"),
    ("cuda activation: gelu's f' never written", CUDA_ACT, "has_erf = true", "has_erf = false"),
    ("cuda activation: softplus's parameters swapped", CUDA_ACT, "parameters.a, parameters.b, y, x", "parameters.b, parameters.a, y, x"),
    ("cuda activation: halves multiplied as halves", CUDA_ACT, "wide * static_cast<T>(g.value[k])", "static_cast<T>(v.value[k] * g.value[k])"),
    ("activation: cotangents taken in any layout", LAYOUT, "SIB_CHECK(op, lies(t, channels_last)", "SIB_CHECK(op, true"),
    ("activation: cotangent not laid out as x", ACT_OP, "u, grad_y = (t if _is_channels_last(t) else t.movedim(1, -1).contiguous().movedim(-1, 1) for t in (u, grad_y))", "pass"),
    ("activation: composed for the kernel", ACT_OP, 'if _extension.MISSING[_name] is None:\n        _LIBRARY', 'if False:\n        _LIBRARY'),
    ("activation bits: relu blocks NaN", BITS, "passes = !(x <= T(0));", "passes = x > T(0);"),
    ("activation bits: relu passes at 0", BITS, "passes = !(x <= T(0));", "passes = !(x < T(0));"),
    ("activation bits: hardtanh passes at its upper bound", BITS, "(x > of.a) & (x < of.b)", "(x > of.a) & (x <= of.b)"),
    ("activation bits: NaN passes hardtanh as on CUDA", BITS_CPU, "bound_is_low = false, nan_passes = false;", "bound_is_low = false, nan_passes = true;"),
    ("activation bits: zero loses its sign", BITS_CPU, "bound_is_low = false, nan_passes = false;", "bound_is_low = true, nan_passes = false;"),
    ("activation bits: a row's tail lost", BITS_CPU, "for (int64_t i = 0; i < count - row * kBitsRow; ++i) element(i);", ""),
    ("activation bits: not cleared before they are set", BITS_CPU, "    std::memset(bits, 0, kBitsRow);\n", ""),
    ("activation bits: the first row's bit for every row", BITS_CPU, "const unsigned bit = 1u << first / kBitsRow % 8;", "const unsigned bit = 1u;"),
    ("activation bits: bits of the first block for every block", BITS_HOST, "in<uint8_t>(bits) + first / kBitsUnit * kBitsRow", "in<uint8_t>(bits)"),
    ("activation bits: slope of leaky_relu where the gradient passes", BITS_CPU, "(get(given) * slope)) & static_cast<Word>(~keep)", "(get(given) * slope)) & keep"),
    ("activation bits: a tensor with gaps taken for a dense one", LAYOUT, "return run == t.numel();", "return true;"),
    ("activation bits: a gradient in another layout read as it lies", ACT_OP, "    if _lies(grad, order):\n        return grad\n", "    return grad.contiguous()\n"),
    ("activation bits: order of the dimensions forgotten", ACT_OP, "_keep(ctx, *inputs[1:], [bits], _memory_order(y))", "_keep(ctx, *inputs[1:], [bits], list(range(y.ndim)))"),
    ("activation bits: made for nobody", ACT_OP, "if not (torch.is_grad_enabled() and x.requires_grad) or KINDS[kind].bits is None:", "if KINDS[kind].bits is None:"),
    ("activation bits: y kept besides", ACT_OP, "_keep(ctx, *inputs[1:], [bits], _memory_order(y))", "_keep(ctx, *inputs[1:], [bits], _memory_order(y))\n    ctx.y = y.detach()"),
    ("activation bits: x in place kept besides", ACT_OP, "saved = _OPS.forward_bits_(x, kind, parameters)", "saved, ctx.x = _OPS.forward_bits_(x, kind, parameters), x.detach()"),
    ("cuda activation bits: bytes of other columns", CUDA_BITS, "if constexpr (makes) *reinterpret_cast<Word*>(row + first) = word;", "if constexpr (makes) *reinterpret_cast<Word*>(row + kBitsRow - Shape::kColumns - first) = word;"),
    ("cuda activation bits: packs past the end", CUDA_BITS, "if (aligned && left >= kBitsUnit) {", "if (aligned && left >= kBitsUnit - 1) {"),
    ("cuda activation bits: one unit a thread", CUDA_BITS, "unit < units; unit += step", "unit < units; unit += units"),
    ("cuda activation bits: last row of a short unit lost", CUDA_BITS, "if (k * kBitsRow + column >= left) break;", "if (k * kBitsRow + column + 1 >= left) break;"),
    ("cuda activation bits: not those of the column", CUDA_BITS, "byte = row[column];", "byte = row[thread];"),
    ("cuda activation bits: NaN blocked as on the CPU", CUDA_BITS, "bound_is_low = true, nan_passes = true;", "bound_is_low = true, nan_passes = false;"),
    ("cuda activation bits: packs where nothing is aligned", CUDA_BITS, "start_at_packs({from, to, made})", "true"),
    # layer norm, group norm, softmax
    ("norms: x less the first part of the mean alone", NORM, "return (x - centre.high) - centre.low;", "return x - centre.high;"),
    ("batch norm: beta forgotten", BN_FORMULAS, "  k[2] = beta;", "  k[2] = 0 * beta;"),
    ("batch norm: to_grad_y without x", BN_FORMULAS, "k[1] * u + k[2] * (x - k[0]) + k[3]", "k[1] * u + k[3] + T(0) * x"),
    ("batch norm: to_x without gy", BN_FORMULAS, "k[4] * u + k[5] * gy +", "k[4] * u +"),
    ("batch norm: a term of the double backward without d", BN_FORMULAS, "{u, u * d, u * gy, gy, gy * d}", "{u, u * d, u * gy, gy, gy}"),
    ("batch norm: grad_gamma not scaled", BN_FORMULAS, "grad_gamma = sums[1] * invstd;", "grad_gamma = sums[1];"),
    ("layer norm: beta dropped", LN_FORMULAS, "return hat * gamma + beta;", "return hat * gamma + T(0) * beta;"),
    ("layer norm: to_x without u_gamma", LN_FORMULAS, "return by_h * gamma + invstd * u_gamma;", "return by_h * gamma + T(0) * invstd * u_gamma;"),
    ("layer norm: to_x without its constant", LN_FORMULAS, "+ by_hat * hat + shift;", "+ by_hat * hat;"),
    ("norms: a parameter of another length taken", ARGUMENTS, "accumulation_type(x.scalar_type()), channels);\n  }", "accumulation_type(x.scalar_type()), t->numel());\n  }"),
    ("norms, softmax: another dtype beside x taken", ARGUMENTS, 'SIB_CHECK(op, t.scalar_type() == x.scalar_type(), name, " must have the dtype of x");', ""),
    ("layer norm: variance without the mean's own rounding", LN, "mean[r] = of.mean;", "mean[r] = static_cast<float>(m);"),
    ("norms: eps forgotten", NORM, "sqrt(variance + eps)", "sqrt(variance)"),
    ("layer norm: groups' weights by the row", LN, "const int64_t first = r % rows.groups * rows.channels();\n    const Compute<E>*g", "const int64_t first = 0 * rows.channels();\n    const Compute<E>*g"),
    ("layer norm: last element of a row not summed", LN, "    for (int64_t i = 0; i < length; ++i) {\n      const Three t", "    for (int64_t i = 0; i < length - (length > 16); ++i) {\n      const Three t"),
    ("layer norm: last channel of a row not written", LN, "for (int64_t c = 0; c < rows.channels(); ++c) {\n    const int64_t from = c * rows.spatial, to = from + rows.spatial;\n#pragma omp simd\n", "for (int64_t c = 0; c < rows.channels() - (rows.channels() > 3); ++c) {\n    const int64_t from = c * rows.spatial, to = from + rows.spatial;\n#pragma omp simd\n"),
    ("layer norm: a channel's sum overwritten", LN, "sums[c] += run;", "sums[c] = run;"),
    ("layer norm: A left out of grad_x", LN_FORMULAS, "invstd * ((gy * gamma - A) - hat * B)", "invstd * (gy * gamma - hat * B)"),
    ("layer norm: U left out of w", LN_FORMULAS, "invstd * ((u - U) - hat * Tx)", "invstd * (u - hat * Tx)"),
    ("layer norm: u_beta dropped", LN_FORMULAS, "return gamma * w + u_gamma * hat + u_beta;", "return gamma * w + u_gamma * hat;"),
    ("layer norm: kappa without B T", LN_FORMULAS, "kappa = V - A * U - B * Tx;", "kappa = V - A * U;"),
    ("layer norm: mean of o without U B", LN_FORMULAS, "o_mean = -s * (A * Tx + U * B)", "o_mean = -s * (A * Tx)"),
    ("layer norm: one of two B T in the dot of o", LN_FORMULAS, "o_dot = -2 * s * B * Tx;", "o_dot = -s * B * Tx;"),
    ("layer norm: u_gamma's mean left out", LN_FORMULAS, "o_mean += q_mean;", ""),
    ("layer norm: kappa's own term left out", LN_FORMULAS, "static_cast<T>(-s * o_dot - s * s * kappa)", "static_cast<T>(-s * o_dot)"),
    ("layer norm: gradient of gamma by x̂ in the second", LN, "return static_cast<double>(get(grad[i]) * w(i));", "return static_cast<double>(get(grad[i]) * hat(i));"),
    ("layer norm: a chunk's sums lost", LN_HOST, "for (int64_t chunk = 0; chunk < chunks_; ++chunk) total", "for (int64_t chunk = 1 - (chunks_ == 1); chunk < chunks_; ++chunk) total"),
    ("layer norm: sums not zeroed", LN_HOST, "    std::memset(memory_.get(), 0,", "    if (chunks_ < 2) std::memset(memory_.get(), 0,"),
    ("layer norm: grad_beta in the place of grad_gamma", LN_HOST, "gb ? sums.of(i, gw != nullptr) : nullptr", "gb ? sums.of(i, 0) : nullptr"),
    ("layer norm: every gradient in every pass", LN_OP, "needs = (needed(ctx, 0), has_weight", "needs = (True, has_weight"),
    ("layer norm: to_x dropped", LN_OP, "return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), *[None] * 8", "return grads[0], None, grads[2] if needs[2] else None, *[None] * 8"),
    ("softmax: b left out of to_grad_y", SOFT_FORMULAS, "return y * (u - b);", "return y * u;"),
    ("softmax: c left out of to_y", SOFT_FORMULAS, "return u * (gy - c) - b * gy;", "return u * gy - b * gy;"),
    ("softmax: b·gy left out of to_y", SOFT_FORMULAS, "return u * (gy - c) - b * gy;", "return u * (gy - c);"),
    ("softmax, activation: the last block cut short", TASKS, "end * block < count ? end * block : count);", "end * block < count ? end * block : count - (end > 1));"),
    ("softmax: composed part without b·gy", SOFT_OP, "(u * (grad_y - c) - b * grad_y)", "(u * (grad_y - c))"),
    ("softmax: to_y dropped", SOFT_OP, "return tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))", "return grads[0], None"),
    # layer norm, group norm and softmax on CUDA
    ("cuda rows: neighbours' places counted", CUDA_ROWS, "  blank(v, place.lo, place.hi);\n", ""),
    ("cuda rows: last pack of a row lost", CUDA_ROWS, "(line + 2 * V - 2) / V;", "(line + V - 1) / V;"),
    ("cuda rows: whole packs wherever x starts", CUDA_ROWS, "on_boundaries = at.misaligned == 0 && line % V == 0;", "on_boundaries = line % V == 0;"),
    ("cuda rows: parameters in packs wherever they start", CUDA_ROWS, "reinterpret_cast<uintptr_t>(a.parameters[t]) % 16 == 0;", "true;"),
    ("cuda rows: outputs in packs wherever x starts", CUDA_ROWS, "(packs::misalignment(a.out[t], V) == at.misaligned)", "(packs::misalignment(a.out[t], V) == 0)"),
    ("cuda rows: parameters by the pack's place", CUDA_ROWS, "    of += from + place.inside;", "    of += from;"),
    ("cuda rows: half the lanes", CUDA_ROWS, "for (int bit = 16; bit > 0; bit /= 2) {\n    if (bit >= lanes)", "for (int bit = 8; bit > 0; bit /= 2) {\n    if (bit >= lanes)"),
    ("cuda rows: the next row's lanes added", CUDA_ROWS, "    if (bit >= lanes) continue;\n", ""),
    ("cuda rows: a warp's sums lost", CUDA_ROWS, "for (int w = 0; w < warps; ++w) sums[s]", "for (int w = 1; w < warps; ++w) sums[s]"),
    ("cuda rows: warps' sums without their barrier", CUDA_ROWS, "  __syncthreads();\n#pragma unroll\n  for (int s = 0; s < K; ++s) {\n    if (s >= used)", "#pragma unroll\n  for (int s = 0; s < K; ++s) {\n    if (s >= used)"),
    ("cuda rows: parameters of the first group", CUDA_ROWS, "? 0 : row % a.at.groups * a.at.length;", "? 0 : 0 * row;"),
    ("cuda rows: a row's third pack lost", CUDA_ROWS, "held_rows_kernel<Op, 2> : held_rows_kernel<Op, 3>", "held_rows_kernel<Op, 2> : held_rows_kernel<Op, 2>"),
    ("cuda rows: last pack of a piece lost", CUDA_ROWS, "min(first + at.piece_packs, at.packs)", "min(first + at.piece_packs - (at.pieces > 1), at.packs)"),
    ("cuda rows: runs' parameters of the first group", CUDA_ROWS, "line % (at.lines_of_row * at.groups)", "line % at.lines_of_row"),
    ("cuda rows: runs joined with the first group's weights", CUDA_ROWS, "of[row % a.at.groups * a.at.lines_of_row + q / a.at.pieces]", "of[q / a.at.pieces]"),
    ("cuda rows: units past the first of each thread lost", CUDA_ROWS, "q < units; q += blockDim.x", "q < units; q += units"),
    ("norms: the mean's second part lost", NORM, "return {high, static_cast<T>(mean - static_cast<double>(high))};", "return {high, T(0)};"),
    ("norms: variance about the pivot", NORM, "const double square = mean_square - shift * shift;", "const double square = mean_square;"),
    ("layer norm: kappa without A U", LN_FORMULAS, "kappa = V - A * U - B * Tx;", "kappa = V - B * Tx;"),
    ("cuda layer norm: runs joined without u_gamma", CUDA_LN_FORMULAS, "sums[6] += p[1] * run[4];", "sums[6] += run[4];"),
    ("cuda layer norm: to_weight of runs without U", CUDA_LN_FORMULAS, "(run[2] - of.means[row] * run[3] - s", "(run[2] - s"),
    ("cuda layer norm: columns' last row counted again", CUDA_LN_COLUMNS, "        if (r >= rows) continue;\n", ""),
    ("cuda norms: a part of the rows lost", CUDA_NORM, "static_cast<int>(divide_up(rows, step))", "static_cast<int>(rows / step)"),
    ("cuda layer norm: parts of one warp lost", CUDA_LN_COLUMNS, "for (int w = 0; w < kWarps; ++w) total", "for (int w = 1; w < kWarps; ++w) total"),
    ("cuda layer norm: parts merged without a barrier", CUDA_LN_COLUMNS, "  __syncthreads();\n  if (warp != 0", "  if (warp != 0"),
    ("cuda layer norm: columns by the first group's statistics", CUDA_LN_COLUMNS, "n * a.at.groups + group, k[r]", "n * a.at.groups, k[r]"),
    ("cuda layer norm: runs' pieces but the first lost", CUDA_LN_COLUMNS, "q < a.at.images * a.at.pieces;", "q < a.at.images;"),
    ("cuda layer norm: sums over rows only beside grad_x", CUDA_LN, "if (any || a.out[0] != nullptr) run", "if (a.out[0] != nullptr) run"),
    ("cuda layer norm: U kept for T", CUDA_LN_FORMULAS, "of.means[of.rows + row] = Tx;", "of.means[of.rows + row] = U;"),
    ("cuda softmax: b and c swapped", CUDA_SOFT, "k[0] = static_cast<T>(sums[0]);", "k[0] = static_cast<T>(sums[1]);"),
    ("cuda softmax: gy read for the other part", CUDA_SOFT, "a.in[1] = a.out[1] ?", "a.in[1] = a.out[0] ?"),
    # Kernel files whose faults above are their callers'
    ("activation: only the first result where both are asked for", "csrc/cpu/activation_kernels.cpp", "? write<E, which, kFirst, true>", "? write<E, which, kFirst, !kFirst>"),
    ("mask: every image by the ranks of the first", "csrc/cpu/foreground_mask_cpu.cpp", "ranks + n * per_image, to + n * pixels, scratch);", "ranks, to + n * pixels, scratch);"),
    ("an instruction set that was not asked for", "csrc/cpu/capability.cpp", "return wanted < best ? wanted : best;", "return best;"),
    ("cuda block: a warp's part of a scan lost", "csrc/cuda/block.cuh", "if (w < warp_of_thread()) before += shared[w];", "if (w + 1 < warp_of_thread()) before += shared[w];"),
    ("cuda statistics: halves of a word swapped", "csrc/cuda/region_statistics_maps.cuh", "const uint16_t bits = halves.value[i];", "const uint16_t bits = halves.value[i ^ 1];"),
    ("triton objective: products of means counted once", "sib_fast/ops/hsic_objective/triton.py", "- 2.0 * n * tl.sum(mean_product, axis=0)", "- n * tl.sum(mean_product, axis=0)"),
    ("triton statistics: variance about the first pixel", TRITON_STATS + "grams.py", "tl.sum(square_v, axis=1) - total_v * total_v / n", "tl.sum(square_v, axis=1)"),
    ("triton statistics: x's Gram merged with the VJP's number of splits", TRITON_STATS + "grams.py", "x_diagonal_ptr, x_diagonal_splits", "x_diagonal_ptr, diagonal_splits"),
    ("triton statistics: partial sums as wide as one map asks", TRITON_STATS + "__init__.py", "for of_map in cuts for cut in of_map", "for of_map in cuts[:1] for cut in of_map"),
    ("triton statistics: shares of grad_mask beyond eight", TRITON_STATS + "gradient.py", "for first in range(0, slots, 8):", "for first in range(0, 8, 8):"),
    ("triton statistics: cut for an H200 wherever it runs", TRITON_STATS + "tiles.py", "properties.multi_processor_count)", "132)"),
    ("triton statistics: the small half of a product", TRITON_STATS + "operands.py", "return big, t - big", "return big, t"),
    ("triton mask: sigmoid without its bound", TRITON_MASK + "box.py", "    x = tl.where(x < -bound, -bound, x)\n", ""),
    ("triton mask: a rank of t beyond the tile's own columns", TRITON_MASK + "box.py", "near_x = (tl.abs(x - pixel % width) <= reach_x)", "near_x = (x == pixel % width)"),
    ("triton mask: the ranks of lo, hi and gate by no program", TRITON_MASK + "box.py", "== tiles - 1:", "== tiles:"),
    ("triton mask: tickets of the image before", TRITON_MASK + "box.py", "    if tile == 0:\n        tl.store(tickets + n, 0)\n", ""),
    ("triton mask: keys of the sub-bins before", TRITON_MASK + "select.py", "        base += before\n", ""),
    ("triton mask: as long a window as there is", MASK_OP, "if length > limits.window:", "if length > 2 * limits.window:"),
    ("synchronised batch norm: means of processes not merged", "sib_fast/ops/batch_norm/synchronised.py", "(m2 + counts * (means - mean).square()).sum(0)", "m2.sum(0)"),
    ("synchronised batch norm: one of two B·T", "sib_fast/ops/batch_norm/synchronised.py", "omega_hat - 2 * scale * B * T", "omega_hat - scale * B * T"),
    ("convolution: phases for a dilated kernel", "sib_fast/ops/convolution/choice.py", "or min(stride) < 2 or max(dilation) > 1:", "or min(stride) < 2:"),
    # The loss and what it is made of
    ("loss: background term lowered", "sib_fast/loss.py", "return base + lambda_bg * torch.exp(background) + lambda_fg * torch.exp(-foreground)", "return base - lambda_bg * torch.exp(background) + lambda_fg * torch.exp(-foreground)"),
    ("loss: every_weight=mean multiplies too", "sib_fast/criterion.py", 'return self.every if self.every_weight == "sum" else 1', "return self.every"),
    ("loss: images without annotation get zeros", "sib_fast/loss.py", "mask = torch.where(annotated[:, None, None, None], mask, self._made(self.mask, vjp))", "mask = torch.where(annotated[:, None, None, None], mask, 0 * self._made(self.mask, vjp))"),
    ("attachment: a paused one captures", "sib_fast/attachment.py", "or attachment.is_paused or not criterion.active", "or not criterion.active"),
    ("attachment: an input with a graph is cut off", "sib_fast/attachment.py", "        if value.requires_grad:\n            slot.captured", "        if False:\n            slot.captured"),
    ("evidence: rectified is not", "sib_fast/evidence.py", "(vjp * features).sum(dim=1, keepdim=True).relu()", "(vjp * features).sum(dim=1, keepdim=True).abs()"),
    ("evidence: absolute cancels between channels", "sib_fast/evidence.py", "(vjp * features).abs().sum(dim=1, keepdim=True)", "(vjp * features).sum(dim=1, keepdim=True).abs()"),
    ("evidence: share of the object", "sib_fast/evidence.py", "((1 - mask) * evidence)", "(mask * evidence)"),
    ("evidence: cells averaged", "sib_fast/evidence.py", "torch.nn.functional.adaptive_max_pool2d(mask", "torch.nn.functional.adaptive_avg_pool2d(mask"),
    ("evidence: no hinge", "sib_fast/evidence.py", "(values - self.target_area).relu() if", "(values - self.target_area) if"),
    ("evidence: dead maps count", "sib_fast/distributed.py", "return total / count.clamp(min=1), images - count", "return total / images, images - count"),
    ("evidence: tiny maps are not divided", "sib_fast/evidence.py", "return map_ / torch.where(nothing, 1.0, greatest), ~nothing.flatten()", "return map_, ~nothing.flatten()"),
    ("evidence: images without annotation get the given mask", "sib_fast/evidence.py", "torch.where(annotated[:, None, None, None], values, made)", "torch.where(annotated[:, None, None, None], values, values)"),
    ("place: activations are linear", "sib_fast/place.py", "    bent = _non_linear(path, target) if rectified else None", "    bent = None"),
    ("place: attention is passed", "sib_fast/place.py", "    if tokens is not None:", "    if False:"),
    ("vjp: energy without its other half", "sib_fast/vjp.py", "of_other = p - (p * p).sum(1, keepdim=True)", "of_other = p - p.sum(1, keepdim=True)"),
    ("vjp: not divided by its scale", "sib_fast/vjp.py", "return vjp if scale == 1.0 else vjp / scale", "return vjp"),
    ("vjp: float16 without a scale", "sib_fast/vjp.py", "FLOAT16_SCALE = 1024.0", "FLOAT16_SCALE = 1.0"),
    ("step: masks are not handed on", "sib_fast/step.py", "self.criterion.active_loss(logits, target, leaf, mask)", "self.criterion.active_loss(logits, target, leaf, None)"),
    ("network checks: static graphs pass", "sib_fast/network_checks.py", "if isinstance(module, DistributedDataParallel) and module.static_graph:", "if isinstance(module, DistributedDataParallel) and False:"),
    ("distributed: a rank's share one pixel short", "sib_fast/distributed.py", "share = max(2, -(-height * width // world))", "share = max(2, height * width // world)"),
    ("estimators: norms not floored", "sib_fast/estimators/_gram.py", "alive = diagonal > NORM_FLOOR * NORM_FLOOR", "alive = diagonal > -1.0"),
    ("estimators: not centred by the grand mean", "sib_fast/estimators/_gram.py", "- kernel.mean(1, keepdim=True) + kernel.mean()", "- kernel.mean(1, keepdim=True)"),
    ("relative variance: of the sum", "sib_fast/estimators/background.py", "torch.where(alive, whole, 1.0), 0.0).mean()", "torch.where(alive, whole, 1.0), 0.0).sum()"),
    ("cka: without its root", "sib_fast/estimators/cka.py", ".clamp_min(FLOOR).sqrt()", ".clamp_min(FLOOR)"),
    ("biased HSIC of the Grams as they are", "sib_fast/estimators/hsic_biased.py", "hsic_of_kernels(normalised(gram_vjp), normalised(gram_x))", "hsic_of_kernels(normalised(gram_vjp), gram_x)"),
    ("gaussian HSIC: sigma once", "sib_fast/estimators/hsic_gaussian.py", "(-2.0 * sigma * sigma)", "(-2.0 * sigma)"),
    ("unbiased HSIC: diagonal kept", "sib_fast/estimators/hsic_unbiased.py", "k - k.diagonal().diag()", "k"),
    ("mask: scaled window even", "sib_fast/masks/density.py", "round((self.window_size * factor - 1) / 2)) + 1)", "round((self.window_size * factor - 1) / 2)))"),
    ("given mask: boxes of pixels' corners", "sib_fast/masks/given.py", "across = torch.arange(width, device=boxes.device) + 0.5", "across = torch.arange(width, device=boxes.device) - 0.5"),
    # Layers
    ("layers: hardswish by hardsigmoid", "sib_fast/nn/activation.py", 'activation(input, "hardswish", inplace=self.inplace)', 'activation(input, "hardsigmoid", inplace=self.inplace)'),
    ("layers: attention without its scale", "sib_fast/nn/attention.py", "query * (1 / math.sqrt(query.shape[-1]))", "query"),
    ("layers: heads of a batch-first input transposed", "sib_fast/nn/attention.py", "order = (0, 2, 1, 3) if self.batch_first else (1, 2, 0, 3)", "order = (1, 2, 0, 3)"),
    ("layers: running statistics where nothing is trained", "sib_fast/nn/batch_norm.py", "if self.training and self.track_running_stats and self.running_mean is not None and not _recomputing():", "if self.track_running_stats and self.running_mean is not None and not _recomputing():"),
    ("layers: running statistics twice with checkpointing", "sib_fast/nn/batch_norm.py", "self.running_mean is not None and not _recomputing():", "self.running_mean is not None:"),
    ("layers: padding of the other side", "sib_fast/nn/convolution.py", "return input, list(around[::-2])", "return input, list(around[::2])"),
    ("layers: eps of group norm", "sib_fast/nn/layer_norm.py", "self.num_groups, self.weight, self.bias, eps=self.eps)", "self.num_groups, self.weight, self.bias, eps=2 * self.eps)"),
    ("layers: ceil_mode of the mean", "sib_fast/nn/pooling.py", "*geometry, self.ceil_mode, self.count_include_pad", "*geometry, False, self.count_include_pad"),
    ("prepare: recompute is not set", "sib_fast/nn/prepare.py", "            module.recompute = True\n", "            module.recompute = False\n"),
    ("inspect: what the prepared network does is not tried", "sib_fast/nn/inspect.py", "prepared_outcome = _differentiate_twice(prepare(copy_of(model)), example_input)[0]", "prepared_outcome = _differentiate_twice(copy_of(model), example_input)[0]"),
    # Explanations
    ("controls: the least important pixels first", "sib_fast/explain/controls.py", "argsort(dim=1, descending=True, stable=True)", "argsort(dim=1, descending=False, stable=True)"),
    ("controls: ties ranked by their first", "sib_fast/explain/controls.py", "ranks = _checks.to_float64(first + last) / 2", "ranks = _checks.to_float64(first)"),
    # The lab
    ("lab: digits of the test set in training", "sib_fast/lab/data.py", 'first = 0 if split == "train" else 1', "first = 0"),
    ("lab: a batch's share over the images", "sib_fast/lab/evaluate.py", "return (gradient * mask.flatten(1)).sum(dim=1) / gradient.sum(dim=1)", "return (gradient * mask.flatten(1)).sum(dim=1) / gradient.sum()"),
    ("lab: residual without its shortcut", "sib_fast/lab/models.py", "+ self.shortcut(x))", "+ 0 * self.shortcut(x))"),
    ("lab: naive variance biased", "sib_fast/lab/naive.py", "var(dim=1, unbiased=True)", "var(dim=1, unbiased=False)"),
    ("lab: naive HSIC over N²", "sib_fast/lab/naive.py", "@ centring) / (n - 1) ** 2", "@ centring) / n**2"),
    ("lab: images not brought back to [0, 1]", "sib_fast/lab/networks.py", "return (image * std + mean).clamp(0, 1)", "return image * std + mean"),
    ("lab: the validation counts padding", "sib_fast/lab/recipe.py", "counted = place * self.trainer.world_size + self.global_rank < self.val_size", "counted = place >= 0"),
    ("train: accumulation is not handed on", "sib_fast/lab/config.py", "base_loss=base_loss, accumulation_steps=accumulation_steps)", "base_loss=base_loss)"),
    ("cutouts: test objects are training's", "sib_fast/lab/datasets/cutouts.py", 'order[:tests] if split == "test" else order[tests:]', "order[tests:]"),
    ("annotation: classes not stratified", "sib_fast/lab/annotation.py", "place[rng.permutation(members)] = (np.arange(len(members)) + rng.random()) / len(members)", "place[members] = rng.random(len(members))"),
    ("mix: masks stay where they were", "sib_fast/lab/transforms.py", "mask = blend(mask.to(images.dtype))", "mask = mask.to(images.dtype)"),
    ("init: the classifier is kept", "sib_fast/lab/pretrained.py", "classifier = frozenset() if same else classifier_parameters(spec)", "classifier = frozenset()"),
    ("parts: a frozen batch norm counts on", "sib_fast/lab/parts.py", "                module.eval()", "                module.train()"),
    ("fit: the last epoch's terms are the first's", "sib_fast/lab/fit.py", "        self._values.clear()", "        pass"),
    ("panel: window wider than the image", "sib_fast/lab/panel.py", "window = min(window, spec.image_size - 1 + spec.image_size % 2)", "window = window"),
    ("cub: training and test images swapped", "sib_fast/lab/datasets/cub.py", 'if flag == (split == "train")', 'if flag != (split == "train")'),
    ("digits: the test set is as long as asked for training", "sib_fast/lab/datasets/digits.py", "size or TEST_DIGITS", "size or digits - TEST_DIGITS"),
    ("dogs: boxes not scaled down", "sib_fast/lab/datasets/dogs.py", "across, down = width / size[0], height / size[1]", "across, down = height / size[1], width / size[0]"),
    ("pets: lists swapped", "sib_fast/lab/datasets/pets.py", 'entries["train" if split == "train" else "test"]', 'entries["test" if split == "train" else "train"]'),
    ("voc: unlabelled pixels are background", "sib_fast/lab/datasets/voc.py", "(values == sample.label + 1) | (values == _VOID)", "(values == sample.label + 1)"),
    ("folder: classes of the test set not looked at", "sib_fast/lab/datasets/folder.py", "    if list(numbers) != classes:", "    if False:"),
    ("study: shifted images are not shifted", "sib_fast/lab/study/network.py", "correlation=0.0, **common)", 'correlation=settings["correlation"], **common)'),
    ("study: mean of six by the wrong count", "sib_fast/lab/study/records.py", "math.fsum(six) / len(six)", "math.fsum(six) / max(1, len(six) - 1)"),
    ("study: sd of the differences biased", "sib_fast/lab/study/statistics.py", "pairs.std(ddof=1)", "pairs.std(ddof=0)"),
    ("study: interval of one side", "sib_fast/lab/study/statistics.py", "t.ppf((1 + LEVEL) / 2, freedom)", "t.ppf(LEVEL, freedom)"),
    ("study: worse shown as better", "sib_fast/lab/study/statistics.py", 'return "better" if self.mean * direction > 0 else "worse"', 'return "better" if self.mean > 0 else "worse"'),
    ("study: explained images more than there are", "sib_fast/lab/study/run.py", "if self.explained > self.test_size:", "if False:"),
    ("study: warm-up steps are timed", "sib_fast/lab/study/timing.py", "if i >= _WARM_UP:", "if i >= 0:"),
    ("study: the variant's mask is the density", "sib_fast/lab/study/variants.py", "mask=_MASKS[self.mask]).attach(model)", 'mask="density").attach(model)'),
]  # fmt: skip


def run(command: list[str], tree: Path, **more: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(tree), "SIB_FAST_CUDA": "0", "SIB_FAST_BLOCKS": "1", **more}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)


def pytest(tree: Path, *arguments: str, **more: str) -> tuple[bool, str]:
    """(green, the first test that failed)."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *arguments]
    tested = run(command, tree, OMP_NUM_THREADS="1", **more)
    red = re.search(r"^(?:FAILED|ERROR) (?:tests/)?(.+?)(?: - .*)?$", tested.stdout, re.MULTILINE)
    # Exit status 5: nothing was selected, which is no proof of anything.
    return tested.returncode in (0, 5), red.group(1) if red else tested.stdout[-300:] + tested.stderr[-300:]


def near(file: str) -> tuple[list[str], dict[str, str]]:
    """pytest's arguments and environment for the tests next to a file: of an op its own, where they can be told by name."""
    arguments = next(arguments for pattern, arguments in NEAR if re.fullmatch(pattern, file))
    if "/triton" in file:
        return arguments, {"TRITON_INTERPRET": "1"}
    ops = sorted((path.name for path in (ROOT / "sib_fast/ops").iterdir() if path.is_dir()), key=len, reverse=True)
    if arguments[0] == "tests/ops" and (op := next((op for op in ops if op in file), None)):
        arguments = [
            str(path.relative_to(ROOT)) for where in ("ops", "cuda") for path in ROOT.glob(f"tests/{where}/test_*{op}*.py")
        ]
    return arguments, {}


def build(tree: Path) -> str | None:
    """The compiler's complaint, or None."""
    built = run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], tree)
    return None if built.returncode == 0 else f"DOES NOT COMPILE: {(built.stdout + built.stderr)[-300:]}"


def verdict(file: str, tree: Path, seed: int, red_anyway: list[str]) -> tuple[str, str]:
    """("caught" | "SURVIVED" | "STALE", why), with the fault in place."""
    # Of a Python fault too: the fault before it may have been one of the kernels.
    if (complaint := build(tree)) is not None:
        return "STALE", complaint
    arguments, more = near(file)
    selection = f"--sample-seed={seed}"
    green, detail = pytest(tree, *arguments, selection, *(f"--deselect={test}" for test in red_anyway), **more)
    if green:
        green, detail = pytest(tree, *EVERYTHING, selection, *(f"--deselect={test}" for test in red_anyway))
    return ("SURVIVED", "") if green else ("caught", detail)


def drawn(count: int, seed: int) -> list[tuple[str, str, str, str]]:
    """Round by round one fault of every file, until there are enough."""
    draw, by_file = random.Random(seed), defaultdict(list)
    for fault in FAULTS:
        by_file[fault[1]].append(fault)
    for faults in by_file.values():
        draw.shuffle(faults)
    rounds = max(len(faults) for faults in by_file.values())
    order = [faults[r] for r in range(rounds) for faults in by_file.values() if r < len(faults)]
    return order[: max(count, len(by_file))]


def copy(tree: Path) -> None:
    ignore = shutil.ignore_patterns(".git", ".hypothesis", ".venv*", "build", "*.so", "lib", "__pycache__", ".*_cache", "runs")
    shutil.rmtree(tree, ignore_errors=True)
    shutil.copytree(ROOT, tree, ignore=ignore)


def plant(fault: tuple[str, str, str, str], tree: Path, seed: int, red_anyway: list[str]) -> tuple[str, str]:
    _, file, text, replacement = fault
    path = tree / file
    source = path.read_text()
    if source.count(text) != 1:
        return "STALE", f"the text occurs {source.count(text)} times in {file}"
    path.write_text(source.replace(text, replacement))
    try:
        return verdict(file, tree, seed, red_anyway)
    finally:
        path.write_text(source)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tree", type=Path, help="folder for the copy; what is there is deleted")
    parser.add_argument("word", nargs="?", default="", help="only faults whose name holds it")
    parser.add_argument("--sample", type=int, help="how many, at least one of every file")
    parser.add_argument("--seed", type=int, default=0, help="of the sample, and of the tests' own (--sample-seed)")
    parser.add_argument("--out", type=Path, help="JSON")
    args = parser.parse_args()
    tree = args.tree.resolve()
    chosen = [fault for fault in (drawn(args.sample, args.seed) if args.sample else FAULTS) if args.word in fault[0]]
    record = {**provenance(), "seed": args.seed, "of": len(FAULTS), "files": len({fault[1] for fault in chosen}), "faults": []}
    if args.out and args.out.is_file():
        before = json.loads(args.out.read_text())
        if (before["commit"], before["seed"]) == (record["commit"], args.seed):
            record["faults"] = before["faults"]
    copy(tree)
    if (complaint := build(tree)) is not None:
        print(complaint)
        return 1
    # What is red without a fault proves nothing: a few tests want the git folder, or libraries that are not built here.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *EVERYTHING, f"--sample-seed={args.seed}"]
    whole = run(command, tree, OMP_NUM_THREADS="1").stdout
    record["red_anyway"] = red_anyway = re.findall(r"^(?:FAILED|ERROR) (\S+)", whole, re.MULTILINE)
    print(f"without a fault: {whole.strip().splitlines()[-1]} {' '.join(red_anyway)}", flush=True)
    if len(red_anyway) > 10 or not re.search(r"\d+ passed", whole):
        return 1
    known = {one["fault"] for one in record["faults"]}
    for fault in chosen:
        if fault[0] in known:
            continue
        began = time.monotonic()
        found, detail = plant(fault, tree, args.seed, red_anyway)
        one = {"fault": fault[0], "file": fault[1], "verdict": found, "by": detail, "seconds": round(time.monotonic() - began)}
        record["faults"].append(one)
        print(f"{found:<8}  {fault[0]}: {detail}", flush=True)
        if args.out:
            write_json(args.out, record)
    missed = [one["fault"] for one in record["faults"] if one["verdict"] != "caught"]
    print(f"{len(missed)} of {len(record['faults'])} faults not caught")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
