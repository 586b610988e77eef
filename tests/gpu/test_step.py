"""SIBLoss, prepare, compiled steps, doctor and the command line on a GPU."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import sib_fast
from benchmarks.provenance import ROOT
from sib_fast import EvidenceLoss, SIBLoss
from sib_fast.testing.networks import conv_net, image_batch, parameter_gradients, plain_step, relative_error

KERNELS = ("cuda", "triton")
real_gpu = pytest.mark.real_gpu
WEIGHTS = {"lambda_fg": 3.0, "lambda_bg": 1000.0, "window_size": 5}


def resnet18() -> torch.nn.Module:
    """torchvision's with small images, where it is; otherwise the tests' own convolutional network."""
    torch.manual_seed(0)
    try:
        from torchvision.models import resnet18
    except Exception:  # a torchvision built for another torch fails with more than ImportError
        return conv_net(classes=10)
    with torch.device("cpu"):
        net = resnet18(num_classes=10)
    return net.to(torch.get_default_device())


def test_every_gradient_of_a_resnet18_in_float64(kernel):
    x, target = image_batch(4, 3, 48, 48, classes=10)
    net = resnet18().double().train()
    plain_net = copy.deepcopy(net)
    plain = plain_step(plain_net, x.double(), target, window_size=9)
    leaf = x.double().requires_grad_()
    criterion = SIBLoss(window_size=9, backend=kernel)
    loss = criterion(net(leaf), target, leaf)
    assert relative_error(criterion.terms["foreground"], plain.foreground) < 1e-10
    assert relative_error(criterion.terms["background"], plain.background) < 1e-10
    exact = parameter_gradients(plain.loss, plain_net)
    for name, got in parameter_gradients(loss, net).items():
        assert relative_error(got, exact[name]) < 1e-9, name


@pytest.mark.filterwarnings("ignore:sib_fast. 'auto' runs the reference")  # a layer without kernels here is slow and right
def test_prepared_layers_give_the_same_gradients(kernel):
    x, target = image_batch(6, 3, 24, 20)
    nets = [conv_net().double() for _ in range(2)]
    sib_fast.prepare(nets[1])
    grads = []
    for net in nets:
        leaf = x.double().requires_grad_()
        grads.append(parameter_gradients(SIBLoss(**WEIGHTS, backend=kernel)(net(leaf), target, leaf), net))
    for name in grads[0]:
        assert relative_error(grads[1][name], grads[0][name]) < 1e-9, name


@pytest.mark.parametrize("kind", ["area", "share"])
@pytest.mark.parametrize("form", ["rectified", "absolute"])
def test_every_gradient_of_the_evidence_in_float64(kernel, kind, form):
    """Against the CPU's, whose masks are the reference's."""
    x, target = image_batch(6, 3, 24, 20)
    net = conv_net().double()
    results = []
    for device, backend in ((x.device, kernel), ("cpu", "reference")):
        criterion = EvidenceLoss(kind, evidence=form, window_size=5, backend=backend)
        twin = copy.deepcopy(net).to(device)
        criterion.attach(twin)
        results.append(parameter_gradients(criterion(twin(x.double().to(device)), target.to(device)), twin))
    for name, want in results[1].items():
        assert relative_error(results[0][name].to("cpu"), want) < 1e-9, name


def test_recomputed_gradients_are_the_kept_ones(on_gpu):
    """And a leaf of one's own gets no gradient."""
    x, target = image_batch(6, 3, 24, 20)
    net = conv_net()
    results = []
    for recompute in (False, True):
        twin = sib_fast.prepare(copy.deepcopy(net), recompute=recompute)
        leaf = sib_fast.vjp_leaf(x)
        SIBLoss(**WEIGHTS)(twin(leaf), target, leaf).backward()
        assert leaf.grad is None
        results.append([p.grad for p in twin.parameters()])
    for kept, again in zip(*results, strict=True):
        assert (again - kept).norm() <= 1e-5 * kept.norm()  # cuDNN's weight gradients need not repeat their bits


@real_gpu
def test_recompute_takes_less_memory(on_gpu):
    """The graph of the VJP keeps one activation a convolution less."""
    from tests.nn.test_recompute import Deep

    x, _ = image_batch(16, 3, 128, 128)
    held = []
    for recompute in (False, True):
        net = sib_fast.prepare(Deep(), recompute=recompute).to("cuda")
        leaf = sib_fast.vjp_leaf(x)
        logits = net(leaf)
        before = torch.cuda.memory_allocated()
        vjp = sib_fast.vjp_map(logits, leaf)
        held.append(torch.cuda.memory_allocated() - before)
        del vjp, logits
    one = 16 * 8 * 128 * 128 * 4
    assert held[0] - held[1] >= 4.5 * one


def test_auto_runs_kernels_and_says_nothing(on_gpu, recwarn):
    x, target = image_batch()
    net = conv_net()
    leaf = x.requires_grad_()
    SIBLoss(**WEIGHTS)(net(leaf), target, leaf).backward()
    assert not [w for w in recwarn if "runs the reference" in str(w.message)]
    assert all(torch.isfinite(p.grad).all() for p in net.parameters())


@real_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_and_batches_that_change_size(kernel, dtype):
    net = conv_net(norm="group")
    criterion = SIBLoss(**WEIGHTS, backend=kernel).attach(net)
    for images in (6, 5, 9):
        x, target = image_batch(images)
        with torch.autocast("cuda", dtype=dtype):
            loss = criterion(net(x), target)
        assert loss.dtype == torch.float32
        loss.backward()
        exact = plain_step(conv_net(norm="group").double(), x.double(), target, **WEIGHTS)
        assert relative_error(criterion.terms["foreground"], exact.foreground) < 0.05
    assert all(torch.isfinite(p.grad).all() for p in net.parameters())


@real_gpu
def test_a_step_does_not_synchronise(kernel, request):
    x, target = image_batch()
    net = conv_net()
    criterion = SIBLoss(**WEIGHTS, backend=kernel).attach(net)
    criterion(net(x), target).backward()
    request.getfixturevalue("no_synchronisation")
    criterion(net(x), target).backward()


@real_gpu
@pytest.mark.parametrize("kind", ["area", "share"])
def test_a_step_with_evidence_does_not_synchronise(on_gpu, request, kind):
    x, target = image_batch()
    net = conv_net()
    criterion = EvidenceLoss(kind, window_size=5).attach(net)
    for _ in range(2):  # the first finds the map and looks at the graph
        criterion(net(x), target).backward()
    request.getfixturevalue("no_synchronisation")
    criterion(net(x), target).backward()


@real_gpu
def test_a_whole_step_in_a_cuda_graph(kernel):
    x, target = image_batch()
    net = conv_net(norm="group")
    parameters = list(net.parameters())

    def step():
        leaf = x.detach().requires_grad_()
        loss = SIBLoss(**WEIGHTS, backend=kernel)(net(leaf), target, leaf)
        return [loss.detach(), *torch.autograd.grad(loss, parameters)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for seed in (1, 5):
        other, labels = image_batch(seed=seed)
        x.copy_(other)
        target.copy_(labels)
        graph.replay()
        for got, want in zip(out, step(), strict=True):
            assert relative_error(got, want) < 1e-5


@real_gpu
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")  # inductor's advice
@pytest.mark.skipif(not hasattr(torch._dynamo.config, "trace_autograd_ops"), reason="this torch cannot trace torch.autograd.grad")
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_the_whole_step_compiles_in_one_graph(kernel, compiler):
    net = conv_net(norm="batch").double()
    criterion = SIBLoss(**WEIGHTS, backend=kernel)
    x, target = image_batch()

    def step(x, y):
        return criterion(net(x), y, x)

    def gradients(function):
        net.zero_grad()
        loss = function(x.double().requires_grad_(), target)
        loss.backward()
        return loss.detach(), [p.grad.clone() for p in net.parameters()]

    want = gradients(step)
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        got = gradients(torch.compile(step, fullgraph=True, backend=compiler))
    base = gradients(lambda x, y: F.cross_entropy(net(x), y))
    assert relative_error(got[0], want[0]) < 1e-10
    scale = max(w.norm() for w in want[1])
    for g, w in zip(got[1], want[1], strict=True):
        assert (g - w).norm() <= 1e-9 * scale
    assert max((w - b).norm() for w, b in zip(want[1], base[1], strict=True)) > 1e-6 * scale


def run(*command: str, timeout: float = 300) -> str:
    result = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return result.stdout


@real_gpu
def test_doctor_launches_a_kernel():
    out = run("sib_fast", "doctor")
    assert "launched on" in out
    assert "BROKEN" not in out


@real_gpu
def test_training_runs_on_the_gpu(tmp_path):
    for package in ("lightning", "torchmetrics", "tensorboard", "rich", "skimage", "sklearn"):
        pytest.importorskip(package)
    out = tmp_path / "run"
    run(
        "sib_fast", "train", "--device", "cuda", "--out", str(out), "--epochs", "2", "--train-size", "64", "--test-size", "32",
        "--width", "4", "--no-progress",
    )  # fmt: skip
    assert "cuda" in (out / "settings.json").read_text()
    assert (out / "network.pt").is_file()
    assert (out / "logs" / "metrics.csv").is_file()
