"""What the rules of `sib_fast.ops.convolution` rest on (choice.py there): per shape, the ways to compute one derivative.

    python -m benchmarks.convolution_choice --out benchmarks/results/<device>/convolution_choice.json
    python -m benchmarks.convolution_choice --out FILE --device cuda      # float32, tf32, bf16, 16 times the images

second: the double backward of a layer given u (the weight's and the cotangent's part), PyTorch's own against re-routed.
input: the input gradient of a first layer, the library's own against by phases. weight: the weight gradient of a grouped
layer, as it lies against in channels last, the conversion counted; of another against a convolution whose kernel is the map.
The ways of a row in one run, interleaved; medians. On a CPU of wall time, beside it the process's CPU time (which a busy machine
disturbs less); on a GPU between device events, eagerly, since a loop over groups costs its launches too.

Every row says which way the present rules take and how many times the fastest one's time that is. Where a rule loses more than
TOLERATED, it is printed, and `tests/test_convolution_choice.py` is red once the file is stored: change the rule, a condition on
shape or dtype, until it is green, and name the file in the row's `evidence`. A rule is fixed in the source: a choice timed at
run time would change bits from run to run.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator

import torch

from benchmarks import timing
from benchmarks.provenance import Item, command_line, report
from sib_fast.ops import convolution as op
from sib_fast.ops.convolution import convolution, reference
from sib_fast.ops.convolution.choice import RULES

TOLERATED = 1.2  # times the fastest way's time; closer than that, a simpler rule is worth more
DEFAULT_WAYS = {"second": "pytorch", "input": "library", "weight": "library"}
OUR_WAYS = {"second": "routed", "input": "phases"}
PRECISIONS = {"float32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}
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
    "mobilenet depthwise down": (8, 144, 144, 144, 56, 3, 2, 1),
    "mobilenet depthwise late": (8, 960, 960, 960, 7, 3, 1, 1),
    "convnext depthwise 7x7": (8, 96, 96, 96, 56, 7, 1, 3),
    "convnext depthwise 7x7 late": (8, 384, 384, 384, 14, 7, 1, 3),
}
INPUT = {
    "resnet stem 7x7": (8, 3, 64, 1, 224, 7, 2, 3),
    "convnext patches 4x4": (8, 3, 96, 1, 224, 4, 4, 0),
    "vit patches 16x16": (8, 3, 192, 1, 224, 16, 16, 0),
    "mobilenet stem 3x3": (8, 3, 32, 1, 224, 3, 2, 1),
    "stem 3x3 to 64": (8, 3, 64, 1, 224, 3, 2, 1),
    "resnet down 3x3 64-128": (8, 64, 128, 1, 56, 3, 2, 1),
}
WEIGHT = {
    f"depthwise {kernel}x{kernel} {channels}": (8, channels, channels, channels, size, kernel, 1, kernel // 2)
    for channels, size, kernel in (
        (96, 56, 3), (240, 28, 3), (96, 56, 5), (240, 14, 5), (1152, 7, 5), (96, 56, 7), (192, 28, 7), (384, 14, 7), (768, 7, 7),
    )
} | {
    "resnext 3x3 32 groups of 4": (8, 128, 128, 32, 56, 3, 1, 1),
    "resnext 3x3 32 groups of 8": (8, 256, 256, 32, 28, 3, 1, 1),
    "regnet 3x3 6 groups of 16": (8, 96, 96, 6, 28, 3, 1, 1),
    "resnet 3x3 256 at 14": (8, 256, 256, 1, 14, 3, 1, 1),
    "resnet down 3x3 256-512 at 14": (8, 256, 512, 1, 14, 3, 2, 1),
    "3x3 384 at 7": (8, 384, 384, 1, 7, 3, 1, 1),
    "resnet 3x3 512 at 7": (8, 512, 512, 1, 7, 3, 1, 1),
    "resnet 3x3 512 at 7, 16 images": (16, 512, 512, 1, 7, 3, 1, 1),
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
    ways = {"library": lambda: op._gradients(grad_y, x, weight, *geometry, [False, True, False])}
    if geometry[3] == 1:
        return {**ways, "map": lambda: op._weight_gradient_by_map(grad_y, x, weight, *geometry[:3])}
    return {**ways, "channels_last": lambda: op._weight_gradient_in_channels_last(grad_y, x, weight, *geometry)}


def on_cpu(ways: dict[str, Callable[[], None]], rounds: int) -> dict[str, dict[str, float]]:
    """Medians of wall time and of the process's CPU time, the ways in turn."""
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for round_ in range(rounds + 1):
        for name, way in ways.items():
            wall, cpu = time.perf_counter(), time.process_time()
            way()
            if round_ > 0:  # the first is the warm-up
                spent[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    medians = {name: [statistics.median(column) for column in zip(*pairs, strict=True)] for name, pairs in spent.items()}
    return {name: {"ms": round(1e3 * wall, 3), "cpu_ms": round(1e3 * cpu, 3)} for name, (wall, cpu) in medians.items()}


def on_gpu(ways: dict[str, Callable[[], None]], rounds: int, device: torch.device) -> dict[str, dict]:
    """Medians by the device's clock, the host's beside them; a way that cannot run (memory, no such kernel) says why."""
    failed = {}
    for name, way in ways.items():
        try:
            way()
        except RuntimeError as error:
            failed[name] = {"failed": str(error).splitlines()[0][:200]}
            torch.cuda.empty_cache()
    times = timing.interleaved({k: v for k, v in ways.items() if k not in failed}, device, rounds, graph=False)
    out = {
        name: {
            "ms": round(1e3 * statistics.median(measured.device), 4),
            "eager_ms": round(1e3 * statistics.median(measured.eager), 4),
            "extra_mb": round(timing.peak_extra_bytes(ways[name], device) / 1e6, 1),
        }
        for name, measured in times.items()
    }
    return {**out, **failed}


def chosen(row: dict) -> str:
    """The way that the present rules take for a row, measured here or stored."""
    derivative, rules = row["derivative"], RULES[row["device"]]
    outputs, inputs, groups, _, kernel, stride, padding = row["shape"]
    layout, dtype = getattr(torch, row["layout"]), PRECISIONS[row["precision"]]
    x = torch.empty(row["x"], device="meta", dtype=dtype).contiguous(memory_format=layout)
    weight = torch.empty(outputs, inputs // groups, kernel, kernel, device="meta", dtype=dtype)
    geometry = ([stride] * 2, [padding] * 2, [1, 1], groups)
    if derivative == "second":
        ours = rules.second(x, weight, groups)
    elif derivative == "input":
        ours = rules.input_by_phases(x, weight, geometry[0], geometry[2], groups)
    else:
        grad_y = reference.convolution(x, weight, None, *geometry)
        for way, rule in (("channels_last", rules.weight_in_channels_last), ("map", rules.weight_by_map)):
            if rule(grad_y, x, weight, groups):
                return way
        return DEFAULT_WAYS[derivative]
    return (OUR_WAYS if ours else DEFAULT_WAYS)[derivative]


def lost(row: dict) -> float:
    """How many times the fastest way's time the present rules take; infinite where their way fails."""
    times = {name: way.get("ms", float("inf")) for name, way in row["ways"].items()}
    return times[chosen(row)] / min(times.values())


def losing(rows: list[dict]) -> list[str]:
    """A line for every row where the present rules lose more than TOLERATED."""
    return [
        f"{row['derivative']} {row['layer']} {row['layout']} {row['precision']}: {chosen(row)} takes {lost(row):.2f} times the "
        "fastest way's time"
        for row in rows
        if lost(row) > TOLERATED
    ]


def measure(
    what: str,
    name: str,
    numbers: tuple[int, ...],
    layout: str,
    precision: str,
    rounds: int,
    images: int | None,
    device: torch.device,
) -> dict:
    default_images, inputs, outputs, groups, size, kernel, stride, padding = numbers
    torch.manual_seed(0)
    allowed, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, precision != "float32"
    count = images or default_images * (16 if device.type == "cuda" else 1)
    like = {"device": device, "dtype": PRECISIONS[precision]}
    memory_format = getattr(torch, layout)
    x = torch.randn((count, inputs, size, size), **like).contiguous(memory_format=memory_format)
    weight = torch.randn(outputs, inputs // groups, kernel, kernel, **like).contiguous(memory_format=memory_format)
    geometry = ([stride, stride], [padding, padding], [1, 1], groups)
    if what == "second":
        functions = {"pytorch": reference.convolution, "routed": convolution}
        ways = {key: second_order(function, x, weight, geometry) for key, function in functions.items()}
    else:
        ways = (input_gradients if what == "input" else weight_gradients)(x, weight, geometry)
    row = {
        "derivative": what,
        "layer": name,
        "layout": layout,
        "precision": precision,
        "device": device.type,
        "x": list(x.shape),
        "shape": [outputs, inputs, groups, size, kernel, stride, padding],
        "ways": on_gpu(ways, rounds, device) if device.type == "cuda" else on_cpu(ways, rounds),
    }
    torch.backends.cudnn.allow_tf32 = allowed
    return {**row, "chosen": chosen(row), "lost": round(lost(row), 3)}


def main(argv: list[str] | None = None) -> None:
    parser = command_line(__doc__, rounds=5)
    parser.add_argument("--images", type=int, default=None, help="instead of each layer's own")
    parser.add_argument("--device", choices=tuple(RULES), default="cpu")
    parser.add_argument("--precisions", nargs="+", choices=tuple(PRECISIONS), default=None)
    args = parser.parse_args(argv)
    cases = [
        (what, name, numbers, layout, precision)
        for precision in args.precisions or (list(PRECISIONS) if args.device == "cuda" else ["float32"])
        for what, shapes in (("second", SECOND), ("input", INPUT), ("weight", WEIGHT))
        for name, numbers in shapes.items()
        for layout in ("contiguous_format", "channels_last")
    ]

    def items(*_: object) -> Iterator[Item]:
        for case in cases:
            what, name, _, layout, precision = case
            run = functools.partial(measure, *case, args.rounds, args.images, torch.device(args.device))
            yield Item(f"{what} {name} {layout} {precision}", run)

    rows = report(args, "convolution_choice", items)
    for row in rows:
        print(row)
    print(
        "\n".join(losing([row for row in rows if "ways" in row]))
        or f"no rule loses more than {TOLERATED} times the fastest way's time"
    )


if __name__ == "__main__":
    main()
