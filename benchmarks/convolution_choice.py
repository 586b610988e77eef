"""What the rules of `sib_fast.nn.Conv2d` and `sib_fast.ops.convolution` rest on: per shape, the ways to compute one derivative.

    python -m benchmarks.convolution_choice --out benchmarks/results/<device>/convolution_choice.json

second: the double backward of a layer given u (the weight's and the cotangent's part), PyTorch's own against re-routed.
input: the input gradient of a first layer, the library's own against by phases. weight: the weight gradient of a depthwise
layer, as it lies against in channels last, the conversion counted. The ways of a row in one run, interleaved; the fastest
round counts, in wall time and in the process's CPU time (which a busy machine disturbs less).

A rule made from this file is fixed in the source: a choice timed at run time would change bits from run to run.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from benchmarks.provenance import command_line, report
from sib_fast.ops import convolution as op
from sib_fast.ops.convolution import convolution, reference

# name: images, in, out, groups, size, kernel, stride, padding: layers of ResNet, MobileNet, ConvNeXt
SECOND = {
    "resnet 3x3 64": (8, 64, 64, 1, 56, 3, 1, 1),
    "resnet 3x3 128": (8, 128, 128, 1, 28, 3, 1, 1),
    "resnet 3x3 256": (8, 256, 256, 1, 14, 3, 1, 1),
    "resnet 3x3 512": (8, 512, 512, 1, 7, 3, 1, 1),
    "resnet 1x1 256-64": (8, 256, 64, 1, 56, 1, 1, 0),
    "resnet 1x1 512-2048": (8, 512, 2048, 1, 7, 1, 1, 0),
    "resnet down 1x1 64-128": (8, 64, 128, 1, 56, 1, 2, 0),
    "resnet down 3x3 64-128": (8, 64, 128, 1, 56, 3, 2, 1),
    "resnext 3x3 grouped": (8, 128, 128, 32, 56, 3, 1, 1),
    "mobilenet depthwise": (8, 96, 96, 96, 56, 3, 1, 1),
    "convnext depthwise 7x7": (8, 96, 96, 96, 56, 7, 1, 3),
}
INPUT = {
    "resnet stem 7x7": (8, 3, 64, 1, 224, 7, 2, 3),
    "convnext patches 4x4": (8, 3, 96, 1, 224, 4, 4, 0),
    "vit patches 16x16": (8, 3, 192, 1, 224, 16, 16, 0),
    "mobilenet stem 3x3": (8, 3, 32, 1, 224, 3, 2, 1),
    "resnet down 3x3 64-128": (8, 64, 128, 1, 56, 3, 2, 1),
}
WEIGHT = {
    f"depthwise {kernel}x{kernel} {channels}": (8, channels, channels, channels, size, kernel, 1, kernel // 2)
    for channels, size, kernel in (
        (96, 56, 3), (96, 56, 5), (240, 14, 5), (96, 56, 7), (192, 28, 7), (384, 14, 7), (768, 7, 7),
    )
}  # fmt: skip


def second_order(function: Callable, x: torch.Tensor, weight: torch.Tensor, geometry: tuple) -> Callable[[], None]:
    """The double backward alone: given u, the gradients of the cotangent and the weight."""
    leaves = x.clone(memory_format=torch.preserve_format).requires_grad_(), weight.clone().requires_grad_()
    y = function(*leaves, None, *geometry)
    grad_y = torch.randn_like(y).requires_grad_()
    (first,) = torch.autograd.grad(y, leaves[0], grad_y, create_graph=True)
    u = torch.randn_like(first)
    return lambda: torch.autograd.grad(first, (grad_y, leaves[1]), u, retain_graph=True)


def input_gradients(x: torch.Tensor, weight: torch.Tensor, geometry: tuple) -> dict[str, Callable[[], None]]:
    grad_y = torch.randn_like(reference.convolution(x, weight, None, *geometry))
    stride, padding, _, _ = geometry
    return {
        "library": lambda: op._gradients(grad_y, x, weight, *geometry, [True, False, False]),
        "phases": lambda: op._input_gradient_by_phases(grad_y, x, weight, stride, padding),
    }


def weight_gradients(x: torch.Tensor, weight: torch.Tensor, geometry: tuple) -> dict[str, Callable[[], None]]:
    grad_y = torch.randn_like(reference.convolution(x, weight, None, *geometry))
    return {
        "library": lambda: op._gradients(grad_y, x, weight, *geometry, [False, True, False]),
        "channels_last": lambda: op._weight_gradient_in_channels_last(grad_y, x, weight, *geometry),
    }


def fastest(ways: dict[str, Callable[[], None]], rounds: int) -> dict[str, dict[str, float]]:
    best = {name: [float("inf")] * 2 for name in ways}
    for round_ in range(rounds + 1):
        for name, way in ways.items():
            wall, cpu = time.perf_counter(), time.process_time()
            way()
            spent = (time.perf_counter() - wall, time.process_time() - cpu)
            if round_ > 0:  # the first is the warm-up
                best[name] = [min(pair) for pair in zip(best[name], spent, strict=True)]
    return {name: {"wall_ms": round(1e3 * wall, 2), "cpu_ms": round(1e3 * cpu, 2)} for name, (wall, cpu) in best.items()}


def measure(rounds: int, images: int | None) -> list[dict]:
    rows = []
    for what, shapes in (("second", SECOND), ("input", INPUT), ("weight", WEIGHT)):
        for name, (default_images, inputs, outputs, groups, size, kernel, stride, padding) in shapes.items():
            for layout in ("contiguous_format", "channels_last"):
                torch.manual_seed(0)
                memory_format = getattr(torch, layout)
                shape = (images or default_images, inputs, size, size)
                x = torch.randn(shape).contiguous(memory_format=memory_format)
                weight = torch.randn(outputs, inputs // groups, kernel, kernel).contiguous(memory_format=memory_format)
                geometry = ([stride, stride], [padding, padding], [1, 1], groups)
                if what == "second":
                    functions = {"pytorch": reference.convolution, "routed": convolution}
                    ways = {key: second_order(function, x, weight, geometry) for key, function in functions.items()}
                else:
                    ways = (input_gradients if what == "input" else weight_gradients)(x, weight, geometry)
                rows.append({"derivative": what, "layer": name, "layout": layout, "x": list(shape), **fastest(ways, rounds)})
    return rows


def main() -> None:
    parser = command_line(__doc__, rounds=5)
    parser.add_argument("--images", type=int, default=None, help="instead of each layer's own")
    args = parser.parse_args()
    for row in report(args, lambda: measure(args.rounds, args.images)):
        print(row)


if __name__ == "__main__":
    main()
