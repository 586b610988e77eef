"""``sib-fast train``: a plain and an S-IB network on the embedded data, a table, and a picture.

Importing this module needs no extra: Lightning and the plotting libraries are imported when a run starts.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sib_fast import SIBLoss
from sib_fast._backends import resolve
from sib_fast.lab.data import EmbeddedDigits
from sib_fast.lab.evaluate import accuracy, gradient_map, inside_share
from sib_fast.lab.models import SmallConvNet
from sib_fast.lab.naive import naive_sib_loss
from sib_fast.lab.report import LABELS, save_panel, tables
from sib_fast.lab.results import NetworkResult, Results, environment, write_atomically
from sib_fast.ops.foreground_mask import KERNELS as MASK_KERNELS

if TYPE_CHECKING:
    from rich.console import Console

_METHODS = {"both": ("plain", "sib"), "plain": ("plain",), "sib": ("sib",)}
_PANEL_IMAGES = 8
_WARM_UP_STEPS = 3
# Settings that change neither a network nor its numbers, so that --resume may change them.
_FREE_TO_CHANGE = {"which", "seeds", "out", "threads", "timing_steps", "progress", "resume"}


@dataclass(frozen=True)
class TrainConfig:
    """Everything a run depends on; each field is an option of ``sib-fast train``.

    Attributes:
        which: ``"plain"``, ``"sib"`` or ``"both"``.
        seeds: one plain and one S-IB network for each; a seed fixes data, initial weights and order of the batches.
        epochs, batch_size, lr, weight_decay: AdamW with a one-cycle schedule whose peak is ``lr``.
        lambda_fg, lambda_bg, window_size, estimator, background, objective, backend: of :class:`sib_fast.SIBLoss`.
            The weights and the window are for this image size and normalisation; docs/demo.md says how they were found.
        train_size, test_size, image_size, correlation: of the embedded data.
        width: channels of the network's first layer.
        out: folder for everything that the run writes.
        threads: of torch's pool, for the run only; None leaves the pool as it is.
        device: ``"cpu"`` or ``"cuda"``.
        timing_steps: steps that every method is timed for after training; 0 leaves the timing out.
        progress: show progress bars.
        resume: keep the networks that an interrupted run with the same settings left in ``out``.

    Errors:  ValueError, naming the option, for a value out of range.
    """

    which: str = "both"
    seeds: tuple[int, ...] = (100, 101, 102)
    epochs: int = 50
    batch_size: int = 32
    lr: float = 3e-3
    weight_decay: float = 1e-2
    lambda_fg: float = 1.0
    lambda_bg: float = 1e6
    window_size: int = 7
    estimator: str = "hsic_biased"
    background: str = "variance"
    objective: str = "expm1"
    backend: str = "auto"
    train_size: int = 512
    test_size: int = 1000
    image_size: int = 32
    correlation: float = 0.4
    width: int = 16
    out: Path = Path("runs/demo")
    threads: int | None = None
    device: str = "cpu"
    timing_steps: int = 20
    progress: bool = True
    resume: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "seeds", tuple(self.seeds))
        object.__setattr__(self, "out", Path(self.out))
        if self.which not in _METHODS:
            raise ValueError(f"train: which must be one of {', '.join(_METHODS)}, got {self.which!r}")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"train: seeds must be distinct and not negative, got {list(self.seeds)}")
        for name in ("epochs", "batch_size", "train_size", "test_size", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"train: {name} must be at least 1, got {getattr(self, name)}")
        if self.batch_size > self.train_size:
            raise ValueError(f"train: batch_size must not exceed train_size {self.train_size}, got {self.batch_size}")
        if self.image_size < 16:
            raise ValueError(f"train: image_size must be at least 16, got {self.image_size}")
        if not 0 <= self.correlation <= 1:
            raise ValueError(f"train: correlation must be in [0, 1], got {self.correlation}")
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise ValueError(f"train: lr must be positive and finite, got {self.lr}")
        for name in ("weight_decay", "lambda_fg", "lambda_bg", "timing_steps"):
            if not (getattr(self, name) >= 0 and math.isfinite(getattr(self, name))):
                raise ValueError(f"train: {name} must be finite and not negative, got {getattr(self, name)}")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"train: threads must be at least 1, got {self.threads}")
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"train: device must be 'cpu' or 'cuda', got {self.device!r}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("train: device must be usable, got 'cuda' where torch.cuda.is_available() is False")

    def criterion(self) -> SIBLoss:
        """A new S-IB criterion with these settings. Errors: as :class:`sib_fast.SIBLoss`."""
        return SIBLoss(
            self.lambda_fg,
            self.lambda_bg,
            estimator=self.estimator,
            background=self.background,
            objective=self.objective,
            window_size=self.window_size,
            backend=self.backend,
        )

    def settings(self) -> dict[str, Any]:
        """The fields as JSON keeps them."""
        return dataclasses.asdict(self) | {"seeds": list(self.seeds), "out": str(self.out)}


def run(config: TrainConfig, console: Console | None = None) -> Results:
    """Train, evaluate, time and draw; everything lands in ``config.out``.

    A finished network is on disk (``results.json``, ``results.csv``, ``networks/*.pt``) before the next one starts. On
    an interrupt or an error the folder says so and the console lists what it holds; ``resume=True`` goes on from there.

    Errors:  ValueError for settings that do not fit each other or the run to be resumed; ImportError without the lab
             extra; KeyboardInterrupt when the user interrupts.
    """
    console = console or _console()
    backend = _check_sib_options(config)
    with _threads(config.threads):
        results = _start(config, console, environment(torch.get_num_threads(), config.device, backend))
        results.save()
        try:
            for seed in config.seeds:
                _train_seed(config, seed, results, console)
            if config.timing_steps:
                console.print("timing one training step of each method …")
                results.step_seconds = time_steps(config)
            results.panel = _draw(config, results)
            results.status = "complete"
            results.save()
        except BaseException as error:
            results.status = "interrupted"
            results.save()
            _explain_interruption(config, results, error, console)
            raise
    for table in tables(results):
        console.print(table)
    console.print(f"picture: {config.out / results.panel}", soft_wrap=True)
    console.print(f"numbers: {config.out / 'results.json'}, {config.out / 'results.csv'}", soft_wrap=True)
    return results


def _console() -> Console:
    try:
        from rich.console import Console
    except ImportError as error:
        raise ImportError(f"train: needs the lab extra, got {error}; pip install 'sib_fast[lab]'") from error
    return Console(highlight=False)


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _check_sib_options(config: TrainConfig) -> str:
    """A bad S-IB option must not surface after the plain network has been trained. Returns the backend that will run."""
    criterion = config.criterion()
    smallest = max(getattr(role, "minimum_batch", 1) for role in (criterion.estimator, criterion.background))
    if config.which != "plain" and config.batch_size < smallest:
        raise ValueError(f"train: batch_size must be at least {smallest} for S-IB, got {config.batch_size}")
    try:
        return resolve("train", config.backend, torch.device(config.device), MASK_KERNELS)
    except RuntimeError as error:
        raise ValueError(str(error)) from error


def _start(config: TrainConfig, console: Console, environment: dict[str, Any]) -> Results:
    for folder in ("networks", "logs"):
        (config.out / folder).mkdir(parents=True, exist_ok=True)
    if not config.resume:
        (config.out / "panel.png").unlink(missing_ok=True)  # a new run's numbers beside an old one's picture mislead
        return Results(config.out, config.settings(), environment)
    try:
        results = Results.load(config.out)
    except FileNotFoundError as error:
        raise ValueError(f"train: resume needs an earlier run in {config.out}, got no results.json there") from error
    settings = config.settings()
    for name in settings.keys() - _FREE_TO_CHANGE:
        if results.config.get(name) != settings[name]:
            raise ValueError(
                f"train: resume needs the earlier run's settings, {name} {results.config.get(name)!r}, got {settings[name]!r}"
            )
    wanted = [(method, seed) for seed in config.seeds for method in _METHODS[config.which]]
    results.networks = [n for n in results.networks if (n.method, n.seed) in wanted]
    results.config, results.environment = settings, environment
    results.status, results.step_seconds, results.panel = "running", {}, None
    for network in results.networks:
        console.print(f"{LABELS[network.method]}, seed {network.seed}: kept from the earlier run")
    return results


def _train_seed(config: TrainConfig, seed: int, results: Results, console: Console) -> None:
    methods = [m for m in _METHODS[config.which] if results.network(m, seed) is None]
    if not methods:
        return
    common = {"image_size": config.image_size, "seed": seed}
    train = EmbeddedDigits("train", config.train_size, correlation=config.correlation, **common)
    same = EmbeddedDigits("test", config.test_size, correlation=config.correlation, **common)
    shifted = EmbeddedDigits("test", config.test_size, correlation=0.0, **common)
    for method in methods:
        console.print(f"{LABELS[method]}, seed {seed}: training for {config.epochs} epochs …")
        network = _train_network(config, method, seed, train, same, shifted)
        results.networks.append(network)
        results.save()
        console.print(
            f"{LABELS[method]}, seed {seed}: accuracy {network.accuracy_in_distribution:.3f}, "
            f"shifted {network.accuracy_shifted:.3f}, gradient inside the object {network.inside_share:.3f}, "
            f"{network.train_seconds:.0f} s"
        )


def _new_network(config: TrainConfig, seed: int) -> SmallConvNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SmallConvNet(width=config.width)


def _train_network(
    config: TrainConfig,
    method: str,
    seed: int,
    train: EmbeddedDigits,
    same: EmbeddedDigits,
    shifted: EmbeddedDigits,
) -> NetworkResult:
    from sib_fast.lab.recipe import fit

    model = _new_network(config, seed)
    name = f"{method}-seed{seed}"
    criterion = config.criterion().attach(model) if method == "sib" else nn.CrossEntropyLoss()
    steps, seconds, terms = fit(
        model,
        criterion,
        train,
        epochs=config.epochs,
        batch_size=config.batch_size,
        lr=config.lr,
        weight_decay=config.weight_decay,
        seed=seed,
        device=config.device,
        log_folder=config.out / "logs" / name,
        progress=config.progress,
    )
    model.to(config.device)
    weights = Path("networks") / f"{name}.pt"
    _save_weights(model, config.out / weights)
    shares = inside_share(gradient_map(model, shifted.images), shifted.masks)
    return NetworkResult(
        method=method,
        seed=seed,
        accuracy_in_distribution=accuracy(model, same),
        accuracy_shifted=accuracy(model, shifted),
        inside_share_in_distribution=float(inside_share(gradient_map(model, same.images), same.masks).nanmean()),
        inside_share=float(shares.nanmean()),
        zero_gradients=int(shares.isnan().sum()),
        mask_area=float(shifted.masks.double().mean()),
        steps=steps,
        train_seconds=seconds,
        terms=terms,
        weights=str(weights),
        log=str(Path("logs") / name / "metrics.csv"),
    )


def _save_weights(model: nn.Module, path: Path) -> None:
    import io

    content = io.BytesIO()
    torch.save({name: tensor.cpu() for name, tensor in model.state_dict().items()}, content)
    write_atomically(path, content.getvalue())


def load_network(results: Results, network: NetworkResult) -> SmallConvNet:
    """A trained network of a run, on the CPU, in eval mode."""
    model = SmallConvNet(width=results.config["width"])
    model.load_state_dict(torch.load(results.out / network.weights, weights_only=True))
    return model.eval()


def _draw(config: TrainConfig, results: Results) -> str:
    seed = config.seeds[0]
    shifted = EmbeddedDigits("test", config.test_size, correlation=0.0, image_size=config.image_size, seed=seed)
    # the first image of every class, not chosen by eye
    first = [int((shifted.labels == k).nonzero()[0]) for k in shifted.labels.unique()][:_PANEL_IMAGES]
    images = shifted.images[first]
    gradients = {}
    for method in _METHODS[config.which]:
        network = results.network(method, seed)
        assert network is not None
        gradients[method] = gradient_map(load_network(results, network), images)
    save_panel(config.out / "panel.png", images, shifted.masks[first], shifted.labels[first], gradients)
    return "panel.png"


def time_steps(config: TrainConfig) -> dict[str, float]:
    """Median seconds of one optimiser step per method, on one batch, the methods taking turns.

    ``naive`` is timed only where the naive head computes the same loss: background ``"variance"``, estimator
    ``"hsic_biased"``. Neither Lightning nor data loading is in these numbers.
    """
    data = EmbeddedDigits("train", config.batch_size, image_size=config.image_size, seed=config.seeds[0])
    images, labels = data.images.to(config.device), data.labels.to(config.device)
    steps = {"plain": _step(config, lambda logits, x: F.cross_entropy(logits, labels), images)}
    if config.which != "plain":
        if (config.background, config.estimator) == ("variance", "hsic_biased"):

            def naive(logits: Tensor, x: Tensor) -> Tensor:
                return naive_sib_loss(
                    logits,
                    labels,
                    x,
                    lambda_fg=config.lambda_fg,
                    lambda_bg=config.lambda_bg,
                    window_size=config.window_size,
                    objective=config.objective,
                )

            steps["naive"] = _step(config, naive, images, input_gradient=True)
        criterion = config.criterion()
        steps["sib"] = _step(config, lambda logits, x: criterion(logits, labels, x), images, input_gradient=True)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(_WARM_UP_STEPS + config.timing_steps):
        for name, step in steps.items():
            begin = time.perf_counter()
            step()
            if config.device == "cuda":
                torch.cuda.synchronize()
            if i >= _WARM_UP_STEPS:
                seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _step(
    config: TrainConfig, loss: Callable[[Tensor, Tensor], Tensor], images: Tensor, input_gradient: bool = False
) -> Callable[[], None]:
    model = _new_network(config, config.seeds[0]).to(config.device)
    optimiser = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)

    def step() -> None:
        optimiser.zero_grad()
        x = images.detach().requires_grad_(input_gradient)
        loss(model(x), x).backward(inputs=list(model.parameters()))
        optimiser.step()

    return step


def _explain_interruption(config: TrainConfig, results: Results, error: BaseException, console: Console) -> None:
    done = [f"{LABELS[n.method]} seed {n.seed}" for n in results.networks]
    missing = [
        f"{LABELS[method]} seed {seed}"
        for seed in config.seeds
        for method in _METHODS[config.which]
        if results.network(method, seed) is None
    ]
    reason = "interrupted" if isinstance(error, KeyboardInterrupt) else f"stopped by {type(error).__name__}"
    console.print(
        f"train: {reason}. {config.out} holds {', '.join(done) or 'no finished network'}"
        + (f"; missing: {', '.join(missing)}" if missing else "; missing: timing and picture")
        + ". The same command with --resume goes on from there.",
        soft_wrap=True,
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``sib-fast train``; their defaults are :class:`TrainConfig`'s."""
    default = TrainConfig()

    def option(flag: str, text: str, **kwargs: Any) -> None:
        value = getattr(default, flag[2:].replace("-", "_"))
        shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
        parser.add_argument(flag, default=value, help=f"{text} (default: {shown})", **kwargs)

    which = parser.add_mutually_exclusive_group()
    which.add_argument("--plain", dest="which", action="store_const", const="plain", help="train plain networks only")
    which.add_argument("--sib", dest="which", action="store_const", const="sib", help="train S-IB networks only")
    parser.set_defaults(which=default.which)
    option("--out", "folder for results, weights, logs and the picture", type=Path, metavar="FOLDER")
    option("--seeds", "one network of each kind per seed", type=int, nargs="+", metavar="SEED")
    option("--epochs", "passes over the training images", type=int, metavar="N")
    option("--batch-size", "images per step", type=int, metavar="N")
    option("--lr", "peak learning rate", type=float, metavar="RATE")
    option("--weight-decay", "AdamW's", type=float, metavar="RATE")
    option("--lambda-fg", "weight of the foreground term", type=float, metavar="WEIGHT")
    option("--lambda-bg", "weight of the background term", type=float, metavar="WEIGHT")
    option("--window-size", "side of the mask's density window, odd", type=int, metavar="PIXELS")
    option("--estimator", "dependence estimator of the foreground term", metavar="NAME")
    option("--background", "background term: variance, hsic or relative_variance", metavar="NAME")
    option("--objective", "exp, expm1 or linear", metavar="NAME")
    option("--backend", "of the ops: auto, reference or cpu", metavar="NAME")
    option("--train-size", "training images", type=int, metavar="N")
    option("--test-size", "images of each test set", type=int, metavar="N")
    option("--image-size", "height and width of the images", type=int, metavar="PIXELS")
    option("--correlation", "excess probability of the class's own background in training", type=float, metavar="P")
    option("--width", "channels of the network's first layer", type=int, metavar="N")
    option("--threads", "torch threads", type=int, metavar="N")
    option("--device", "cpu or cuda", metavar="NAME")
    option("--timing-steps", "steps to time every method for, 0 for none", type=int, metavar="N")
    parser.add_argument("--no-progress", dest="progress", action="store_false", help="no progress bars")
    parser.add_argument("--resume", action="store_true", help="keep the networks an interrupted run left in the folder")


def main(args: argparse.Namespace) -> int:
    """Run with the options of :func:`add_arguments`. Returns 0, 2 for a bad option, 130 after an interrupt."""
    names = [f.name for f in dataclasses.fields(TrainConfig)]
    try:
        config = TrainConfig(**{name: getattr(args, name) for name in names})
        run(config)
    except (ValueError, ImportError) as error:
        print(f"sib-fast train: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0
