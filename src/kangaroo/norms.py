"""A model's own norms in fewer calls, where that changes no bit.

A step of a small model spends more time on starting operators than in them, and norms written in plain tensor code are
a quarter of its operators.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional

TRIED = 64
"""Random vectors on which a norm and its replacement must agree to the last bit."""


class FusedNorm(nn.Module):
    """RMSNorm (Zhang and Sennrich 2019) as transformers writes it for Llama, scaled by one kernel."""

    def __init__(self, weight: Tensor, epsilon: float):
        super().__init__()
        self.weight, self.epsilon = weight, epsilon

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D], scaled in single precision whatever that of x."""
        if x.dtype == torch.float64:
            return self.weight * functional.rms_norm(x.float(), self.weight.shape, eps=self.epsilon).to(x.dtype)
        return self.weight * functional.rms_norm(x, self.weight.shape, eps=self.epsilon)  # it widens short numbers


def with_fused_norms(layer: nn.Module) -> nn.Module:
    """The layer with its norms fused where that changes no bit: a view of it, on the same weights; itself if none is.

    A layer whose `forward` a library has replaced on the object (offloading does) stays as it is.
    """
    fused = fused_norms(layer)
    if not fused or "forward" in vars(layer):
        return layer
    view = copy.copy(layer)
    view._modules = {**layer._modules, **fused}
    return view


def fused_norms(module: nn.Module) -> dict[str, FusedNorm]:
    """What may stand for a module's norms, by their names."""
    return {name: norm for name, child in module.named_children() if (norm := _fuse(child)) is not None}


@torch.no_grad()
def _fuse(norm: nn.Module) -> FusedNorm | None:
    weight, epsilon = getattr(norm, "weight", None), getattr(norm, "variance_epsilon", None)
    if epsilon is None or weight is None or weight.ndim != 1 or weight.device.type == "meta" or "forward" in vars(norm):
        return None
    fused = FusedNorm(weight, epsilon)
    random = torch.Generator().manual_seed(0)
    x = torch.randn(TRIED, len(weight), generator=random) * torch.logspace(-4, 3, TRIED)[:, None]
    x = x.to(weight.device, weight.dtype)
    return fused if torch.equal(norm(x), fused(x)) and torch.equal(norm(x[:1]), fused(x[:1])) else None
