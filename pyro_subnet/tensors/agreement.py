"""Whether two linear maps agree: they do where they agree on a random vector.

Two that agree on a random vector are equal with probability one: so two ways to a
derivative are compared before their numbers are used.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Types with a larger epsilon have too few digits for the tolerance of the others.
_HALF_EPS = 1e-4
# Any fixed seed serves: what is checked holds for nearly all directions.
_SEED = 20_106_896


def random_stream() -> torch.Generator:
    """A generator for several directions, the same at every call."""
    return torch.Generator().manual_seed(_SEED)


def random_direction(
    shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    """A standard normal tensor, the same at every call without a generator."""
    stream = generator or random_stream()
    return torch.randn(shape, generator=stream, dtype=torch.float64).to(like)


def agree(found: Tensor, expected: Tensor) -> bool:
    """Whether tensors are equal up to the round-off of sums in another order."""
    if found.shape != expected.shape:
        return False
    if found.numel() == 0:
        return True
    finite = expected.isfinite()
    # Infinities must be in the same places: minus infinity is a class of probability 0.
    if not bool(finite.all()):
        same = torch.equal(found.isfinite(), finite)
        return same and agree(found[finite], expected[finite])
    eps = max(torch.finfo(found.dtype).eps, torch.finfo(expected.dtype).eps)
    if eps > _HALF_EPS:  # wrong numbers are off by a large part of the scale
        tolerance = 32 * eps
    else:
        tolerance = 100 * math.sqrt(found.shape[-1]) * eps**0.75
    scale = expected.abs().amax()
    return bool(((found - expected).abs() <= tolerance * scale).all())
