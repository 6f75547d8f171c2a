"""Gradients for given cotangents, by a scalar that has them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_subnet.tensors.modes import differentiable


def weighted_sum(
    values: Sequence[Tensor], cotangents: Sequence[Tensor]
) -> Float[Tensor, ""]:
    r"""Returns :math:`\sum u \cdot v`, whose gradient is the pullback of all u."""
    # Torch checks cotangents that are given to `torch.autograd.grad` by symbolic
    # shapes, whose first use imports a computer algebra system: half a second, ten
    # times what a small network's first fit takes otherwise.
    with differentiable():
        # A tensor of inference mode cannot be kept for a backward pass.
        kept = [u.clone() if u.is_inference() else u for u in cotangents]
        pairs = zip(values, kept, strict=True)
        return torch.stack([(value * u).sum() for value, u in pairs]).sum()
