"""Networks by name, and the file that a trained one is kept in: everything needed to run it again on an image."""

from __future__ import annotations

import dataclasses
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sib_fast.lab.models import EfficientNetLite0, SmallConvNet, SmallResNet
from sib_fast.lab.results import write_atomically

SMALL = {"small_conv_net": SmallConvNet, "small_resnet": SmallResNet}
LITE = "efficientnet_lite0"
TIMM = "timm:"
NETWORK_FORMAT = "sib_fast.network.1"


@dataclass(frozen=True)
class NetworkSpec:
    """What a network is besides its weights; JSON keeps it.

    Attributes:
        arch: a name as :func:`build_network` takes it.
        classes: their names, in the order of the logits.
        image_size: side of the square images it was trained on.
        mean, std: an image in [0, 1] becomes (image - mean) / std, per channel.
        options: further arguments of the architecture, e.g. ``{"width": 16}``.
        training: free notes on how it was trained; strings and numbers only.
    """

    arch: str
    classes: tuple[str, ...]
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    training: dict[str, Any] = dataclasses.field(default_factory=dict)

    def build(self) -> nn.Module:
        """The network with freshly drawn weights. Errors: as :func:`build_network`."""
        return build_network(self.arch, len(self.classes), **self.options)

    def normalise(self, image: Tensor) -> Tensor:
        """Shapes: image [..., 3, H, W] in [0, 1] -> the same."""
        mean, std = (image.new_tensor(v).view(3, 1, 1) for v in (self.mean, self.std))
        return (image - mean) / std

    def denormalise(self, image: Tensor) -> Tensor:
        """The inverse of :meth:`normalise`, clamped to [0, 1] for display."""
        mean, std = (image.new_tensor(v).view(3, 1, 1) for v in (self.mean, self.std))
        return (image * std + mean).clamp(0, 1)


def build_network(arch: str, num_classes: int, **options: Any) -> nn.Module:
    """A network with weights drawn from torch's generator; nothing is downloaded.

    Args:    arch: a name in :data:`SMALL`, ``"efficientnet_lite0"``, one of torchvision's classification models
                   (``torchvision.models.list_models()``), or ``"timm:<name>"`` (``timm.list_models()``).
    Errors:  ValueError for an unknown name; ImportError where the name needs torchvision or timm and it is missing.
    """
    if arch in SMALL:
        return SMALL[arch](num_classes=num_classes, **options)
    if arch == LITE:
        return EfficientNetLite0(num_classes, **options)
    if arch.startswith(TIMM):
        timm_config(arch)
        import timm

        return timm.create_model(arch.removeprefix(TIMM), pretrained=False, num_classes=num_classes, **options)
    try:
        import torchvision
    except ImportError as error:
        raise ImportError(
            f"network: arch {arch!r} needs torchvision, got {error}; install the release that goes with your torch"
        ) from error
    known = torchvision.models.list_models(module=torchvision.models)
    if arch not in known:
        raise ValueError(
            f"network: arch must be one of {', '.join(SMALL)}, {LITE}, a torchvision classification model "
            f"(torchvision.models.list_models()) or timm:<name>, got {arch!r}"
        )
    return torchvision.models.get_model(arch, weights=None, num_classes=num_classes, **options)


def timm_config(arch: str) -> dict[str, Any]:
    """What timm knows of an architecture and the weights that its tag names: mean, std, where they are; empty without weights.

    Errors:  ValueError for an unknown name; ImportError without timm.
    """
    try:
        import timm
    except ImportError as error:
        raise ImportError(f"network: arch {arch!r} needs timm, got {error}; pip install 'sib_fast[timm]'") from error
    name = arch.removeprefix(TIMM)
    try:
        if not timm.is_model(name):
            raise RuntimeError(f"no model {name}")
        config = timm.models.get_pretrained_cfg(name)
    except RuntimeError as error:  # also for a tag that the model does not have
        similar = ", ".join(timm.list_models(f"*{name.partition('.')[0]}*")[:5]) or "timm.list_models()"
        raise ValueError(f"network: arch must be timm:<name> of a model of timm ({similar}), got {arch!r}") from error
    return {} if config is None else config.to_dict()


def classifier_parameters(spec: NetworkSpec) -> frozenset[str]:
    """Names of the tensors whose shape depends on the number of classes. Nothing is allocated for it."""

    def shapes(classes: int) -> dict[str, torch.Size]:
        with torch.device("meta"):
            model = build_network(spec.arch, classes, **spec.options)
        return {name: tensor.shape for name, tensor in model.state_dict().items()}

    first, second = shapes(len(spec.classes)), shapes(len(spec.classes) + 1)
    return frozenset(name for name in first if first[name] != second[name])


def save_network(path: Path, spec: NetworkSpec, model: nn.Module) -> None:
    """One file, replaced in one step; tensors are on the CPU, whatever device the model is on."""
    weights = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    content = io.BytesIO()
    torch.save({"format": NETWORK_FORMAT, "spec": dataclasses.asdict(spec), "state_dict": weights}, content)
    write_atomically(path, content.getvalue())


def load_network(path: Path) -> tuple[NetworkSpec, nn.Module]:
    """The network of a file of :func:`save_network`, on the CPU, in eval mode.

    The file is read with ``weights_only=True``: no code in it runs.

    Errors:  FileNotFoundError; ValueError for a file that is not one of ours or whose weights do not fit.
    """
    try:
        document = torch.load(path, map_location="cpu", weights_only=True)
        if document["format"] != NETWORK_FORMAT:
            raise ValueError(f"format {document['format']!r}")
        fields = document["spec"]
        spec = NetworkSpec(**fields | {name: tuple(fields[name]) for name in ("classes", "mean", "std")})
        model = spec.build()
        model.load_state_dict(document["state_dict"])
    except (FileNotFoundError, ImportError):
        raise
    except Exception as error:  # whatever an unpickler can throw at a foreign file, some of it a page long
        got = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise ValueError(f"network: {path} must be a file that sib-fast train wrote, got {got}") from error
    return spec, model.eval()
