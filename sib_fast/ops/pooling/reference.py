"""PyTorch's pooling with PyTorch's derivatives, of any order."""

from torch.nn.functional import avg_pool2d, max_pool2d

__all__ = ["avg_pool2d", "max_pool2d"]
