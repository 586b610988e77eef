"""The network that is asked: a file of ours, an architecture with weights, a module or any callable; and what its logits mean."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sib_fast.lab.networks import TIMM, NetworkSpec, build_network, load_network, timm_config
from sib_fast.lab.pretrained import read_document, tensors_in, usual_normalisation
from sib_fast.lab.shortcut.images import first_of

_OP = "diagnose"
OTHER = "another class"
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # lab.transforms has them too, and needs torchvision
_PROBE = 1009  # classes of a network that is built to see which parameters are the classifier's: a prime, no usual width


@dataclass(frozen=True)
class Subject:
    """A network, and how it wants its images.

    Attributes:
        model: takes normalised images [N, C, H, W], returns logits [N, classes].
        name: in the report.
        classes: of the logits, None where nobody says.
        image_size: None takes any.
        mean, std: an image in [0, 1] becomes (image - mean) / std, per channel; None leaves it.
        notes: how it was trained, where its file says.
    """

    model: nn.Module
    name: str
    classes: tuple[str, ...] | None = None
    image_size: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    notes: Mapping[str, Any] | None = None

    @property
    def device(self) -> torch.device:
        return next((p.device for p in self.model.parameters()), torch.device("cpu"))

    def prepared(self, pixels: Tensor) -> Tensor:
        """Images in [0, 1] as the network takes them: normalised, where it is, in its precision."""
        if self.mean is not None and self.std is not None:
            mean, std = (pixels.new_tensor(value).view(-1, 1, 1) for value in (self.mean, self.std))
            pixels = (pixels - mean) / std
        dtype = next((p.dtype for p in self.model.parameters() if p.is_floating_point()), pixels.dtype)
        # oneDNN's convolutions are faster so, the network's own layout whatever it is: a ResNet-18's by a quarter on one core
        return pixels.to(self.device, dtype, memory_format=torch.channels_last)

    def logits(self, pixels: Tensor) -> Tensor:
        """Shapes: pixels [N, C, H, W] in [0, 1] -> [N, classes] float32 on the CPU; one logit z becomes (0, z)."""
        with torch.no_grad():
            output = self.model(self.prepared(pixels))
        output = getattr(output, "logits", output)  # Hugging Face
        if not isinstance(output, Tensor) or output.ndim != 2 or len(output) != len(pixels):
            got = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(f"{_OP}: network must return logits [N, classes], got {got}")
        output = output.detach().float().cpu()
        if not torch.isfinite(output).all():
            raise ValueError(f"{_OP}: network must return finite logits, got NaN or Inf")
        return torch.cat([torch.zeros_like(output), output], dim=1) if output.shape[1] == 1 else output


class _Callable(nn.Module):
    """A function as a module; its parameters, if it has any, are its own business."""

    def __init__(self, function: Callable[[Tensor], Tensor]):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def as_subject(network: Any, data: Any, mean: Sequence[float] | None, std: Sequence[float] | None) -> Subject:
    """Of whatever `diagnose` is given. A module or a function sees images normalised as the data's are."""
    if isinstance(network, Subject):
        return network
    if isinstance(network, (str, Path)):
        return open_network(Path(network))
    if not callable(network):
        raise TypeError(f"{_OP}: network must be a module, a function of images, or a path, got {type(network).__name__}")
    if isinstance(network, type):
        raise TypeError(f"{_OP}: network must be an instance, got the class {network.__name__}")
    mean, std = (
        None if (chosen := value if value is not None else getattr(data, name, None)) is None else tuple(map(float, chosen))
        for value, name in ((mean, "mean"), (std, "std"))
    )
    model = network if isinstance(network, nn.Module) else _Callable(network)
    name = type(network).__name__ if isinstance(network, nn.Module) else getattr(network, "__name__", type(network).__name__)
    return Subject(model, name, None, None, mean, std)


@contextlib.contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """For the block; afterwards every module is as it was."""
    before = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training


def open_network(
    checkpoint: Path,
    arch: str | None = None,
    *,
    image_size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    classes: Sequence[str] | None = None,
) -> Subject:
    """A network from a file: one of ``sib-fast train``, or with `arch` the weights of that architecture.

    The file is read with ``weights_only=True`` (safetensors hold no code): nothing in it runs.

    Args:    arch: a name of :func:`sib_fast.lab.networks.build_network`, or ``timm:<name>``. image_size, mean, std: default
             what our file or timm's configuration says, otherwise 224 and ImageNet's.
    Errors:  FileNotFoundError; ValueError for a file that is not that; ImportError that names the package.
    """
    if not checkpoint.is_file():
        raise FileNotFoundError(f"{_OP}: checkpoint must be an existing file, got {checkpoint}")
    if arch is None:
        try:
            spec, model = load_network(checkpoint)
        except ValueError as error:
            raise ValueError(f"{error}; weights of another program need --arch NAME") from error
    else:
        spec, model = _with_weights(arch, checkpoint)
    known = tuple(classes) if classes else (spec.classes or None)
    return Subject(
        model,
        f"{arch or spec.arch} ({checkpoint.name})",
        known,
        image_size or spec.image_size,
        tuple(map(float, mean)) if mean else spec.mean,
        tuple(map(float, std)) if std else spec.std,
        spec.training,
    )


def _with_weights(arch: str, checkpoint: Path) -> tuple[NetworkSpec, nn.Module]:
    said = f"{_OP}: checkpoint"
    weights = tensors_in(read_document(checkpoint, said), checkpoint, said)
    auxiliary = any(name.lower().startswith("aux") for name in weights)
    with torch.device("meta"):
        probe = _build(arch, _PROBE, auxiliary)
    heads = [name for name, tensor in probe.state_dict().items() if tensor.ndim and tensor.shape[0] == _PROBE]
    found = [int(weights[name].shape[0]) for name in heads if name in weights]
    if not found:
        raise ValueError(
            f"{_OP}: checkpoint must hold weights of {arch}, got no {first_of(heads)} in {checkpoint}, which has "
            f"{len(weights)} tensors ({first_of(weights)})"
        )
    model = _build(arch, found[-1], auxiliary)
    own = model.state_dict()
    missing = [name for name in own if name not in weights and not name.endswith("num_batches_tracked")]
    unlike = [
        f"{name} {list(weights[name].shape)} for {list(own[name].shape)}"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]
    if missing or unlike:
        raise ValueError(
            f"{_OP}: checkpoint must hold the weights of {arch}, got "
            f"{len(missing)} missing ({first_of(missing)}), {len(unlike)} of another shape ({first_of(unlike)}) in {checkpoint}"
        )
    model.load_state_dict({name: weights[name] for name in own if name in weights}, strict=False)
    # googlenet and inception_v3 of 1000 classes undo ImageNet's normalisation themselves (`_build`)
    mean, std = usual_normalisation(arch)
    size = 299 if arch == "inception_v3" else 224
    if arch.startswith(TIMM):
        size = int(timm_config(arch).get("input_size", (size,))[-1])
    return NetworkSpec(arch, (), size, mean or _IMAGENET[0], std or _IMAGENET[1]), model.eval()


def _build(arch: str, num_classes: int, auxiliary: bool) -> nn.Module:
    options: dict[str, Any] = {}
    if arch in ("googlenet", "inception_v3"):
        # torchvision's own weights have 1000 classes, and want its older normalisation on top of ImageNet's
        options = {"aux_logits": auxiliary, "init_weights": False, "transform_input": num_classes == 1000}
    return build_network(arch, num_classes, **options)


# ---- what the logits mean -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClassMap:
    """Which class of the data each logit counts for.

    Attributes:
        index: [logits] int64; `len(classes)` is "another class", which no image of the data has.
        said: one sentence on how it was found.
    """

    index: Tensor
    classes: tuple[str, ...]
    said: str

    def predictions(self, logits: Tensor) -> Tensor:
        """The class of the greatest logit. Shapes: [N, logits] -> [N] int64."""
        return self.index[logits.argmax(dim=1)]

    def probabilities(self, logits: Tensor) -> Tensor:
        """Softmax, summed over the logits of a class; the last column is "another class". Shapes: -> [N, classes + 1]."""
        softmax = logits.double().softmax(dim=1)
        return softmax.new_zeros(len(logits), len(self.classes) + 1).index_add_(1, self.index, softmax)


def map_classes(
    logits: int, network: Sequence[str] | None, data: Sequence[str], given: Mapping[str, Sequence[int | str]] | None
) -> ClassMap:
    """By the map that is given, by names, or by order where there are as many logits as classes.

    Args:    given: the logits of each class of the data, by index or by the network's own name; what is in none is another class.
    Errors:  ValueError where none of the three can be.
    """
    data = tuple(data)
    if network is not None and len(network) != logits:
        raise ValueError(f"{_OP}: classes of the network must be as many as its {logits} logits, got {len(network)}")
    index = torch.full((logits,), len(data))
    if given is not None:
        if set(given) - set(data):
            raise ValueError(
                f"{_OP}: mapping must name classes of the data, got {sorted(set(given) - set(data))[0]!r}; they are "
                f"{first_of(data)}"
            )
        lost = [name for name in data if not given.get(name)]
        if lost:
            raise ValueError(f"{_OP}: mapping must have logits for every class of the data, got none for {first_of(lost)}")
        for k, name in enumerate(data):
            for entry in given[name]:
                place = _logit(entry, logits, network)
                if index[place] not in (k, len(data)):
                    raise ValueError(
                        f"{_OP}: mapping must give a logit to one class, got {entry!r} for {data[int(index[place])]!r} and "
                        f"{name!r}"
                    )
                index[place] = k
        rest = int((index == len(data)).sum())
        return ClassMap(index, data, f"by the map that was given: {logits - rest} of {logits} logits; the others count as wrong")
    if network is not None and set(data) <= set(network):
        for k, name in enumerate(network):
            index[k] = data.index(name) if name in data else len(data)
        return ClassMap(index, data, "by name")
    if logits == len(data) or (logits > len(data) and data == tuple(map(str, range(len(data))))):
        index[: len(data)] = torch.arange(len(data))
        names = "" if network is None else f": the network's names ({first_of(network)}) are others"
        return ClassMap(index, data, f"by order, the first logit being {data[0]!r}, as nothing names them alike{names}")
    raise ValueError(
        f"{_OP}: mapping must be given, got {logits} logits for {len(data)} classes ({first_of(data)}): a JSON file of "
        '{"class of the data": [indices or names of logits], …} (--map), or the names of the network\'s classes (--classes)'
    )


def _logit(entry: int | str, logits: int, network: Sequence[str] | None) -> int:
    if isinstance(entry, int) and 0 <= entry < logits:
        return entry
    if isinstance(entry, str) and network is not None and entry in network:
        return network.index(entry)
    names = "the network's classes have no names" if network is None else f"its names are {first_of(network)}"
    raise ValueError(f"{_OP}: mapping must hold indices below {logits} or names of the network's classes, got {entry!r}; {names}")


def read_mapping(path: Path) -> dict[str, list[int | str]]:
    """Errors: FileNotFoundError; ValueError for another form."""
    if not path.is_file():
        raise FileNotFoundError(f"{_OP}: map must be an existing file, got {path}")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(document, dict) or not all(isinstance(value, list) for value in document.values()):
            raise ValueError("no lists by class")
    except ValueError as error:
        raise ValueError(f"{_OP}: map must be JSON of {{class: [logits]}}, got {error} in {path}") from error
    return document


def read_names(path: Path) -> tuple[str, ...]:
    """One class a line. Errors: FileNotFoundError; ValueError for an empty file."""
    if not path.is_file():
        raise FileNotFoundError(f"{_OP}: classes must be an existing file, got {path}")
    names = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    if not names:
        raise ValueError(f"{_OP}: classes must name a class a line, got an empty file {path}")
    return names
