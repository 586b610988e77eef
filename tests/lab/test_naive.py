"""The naive head shares no code with the package, so the two check each other."""

import pytest
import torch

from sib_fast import SIBLoss
from sib_fast.lab.models import SmallConvNet
from sib_fast.lab.naive import naive_sib_loss


@pytest.mark.parametrize("objective", ["exp", "expm1", "linear"])
@pytest.mark.parametrize(("window_size", "weights"), [(7, (1.0, 1e5)), (31, (0.01, 1000.0))])
def test_naive_loss_and_parameter_gradients_equal_the_reference(objective, window_size, weights):
    lambda_fg, lambda_bg = weights
    torch.manual_seed(11)
    model = SmallConvNet(width=4).double()
    images, target = torch.randn(6, 3, 18, 21, dtype=torch.float64), torch.randint(0, 10, (6,))
    parameters = list(model.parameters())

    x = images.clone().requires_grad_()
    naive = naive_sib_loss(
        model(x),
        target,
        x,
        lambda_fg=lambda_fg,
        lambda_bg=lambda_bg,
        window_size=window_size,
        objective=objective,
    )
    naive_gradients = torch.autograd.grad(naive, parameters)

    criterion = SIBLoss(lambda_fg, lambda_bg, window_size=window_size, objective=objective, backend="reference").attach(model)
    loss = criterion(model(images), target)
    gradients = torch.autograd.grad(loss, parameters)

    torch.testing.assert_close(loss, naive, rtol=1e-9, atol=0)
    for expected, got in zip(naive_gradients, gradients, strict=True):
        assert (got - expected).norm() <= 1e-9 * expected.norm() + 1e-15


def test_the_test_would_see_the_extra_terms():
    # with both weights at 0 the naive loss is cross entropy; with the weights of the test above it is not
    torch.manual_seed(11)
    model = SmallConvNet(width=4).double()
    images, target = torch.randn(6, 3, 18, 21, dtype=torch.float64), torch.randint(0, 10, (6,))
    gradients = []
    for lambda_fg, lambda_bg in ((0.0, 0.0), (1.0, 0.0), (0.0, 1e5)):
        x = images.clone().requires_grad_()
        loss = naive_sib_loss(model(x), target, x, lambda_fg=lambda_fg, lambda_bg=lambda_bg, window_size=7)
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
    plain, foreground, background = gradients
    assert (foreground - plain).norm() > 1e-6 * plain.norm()
    assert (background - plain).norm() > 1e-6 * plain.norm()


def test_unknown_objective_is_named():
    x = torch.randn(3, 3, 8, 8, requires_grad=True)
    with pytest.raises(ValueError, match=r"^naive_sib_loss: objective must be 'exp', 'expm1' or 'linear', got 'log'"):
        naive_sib_loss(SmallConvNet(width=2)(x), torch.zeros(3, dtype=torch.int64), x, objective="log")
