"""Fisher information matrices by their shape, and their roots."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Distribution

from pyro_subnet.exceptions import UnsupportedLikelihoodError

# A correlation matrix of scores may have eigenvalues below zero by round-off. Its
# entries err by 1e-9 at most in float64, so what is below this is no round-off.
_ROUND_OFF = -1e-8

Matrix = Float[Tensor, "*batch out out"]
Root = Float[Tensor, "*batch rows out"]


class Information(ABC):
    r"""The Fisher information Λ of one family, and a root R of it.

    .. math:: \Lambda = \operatorname{E}_{y \sim p(y \mid \eta)}
        \left[\nabla_\eta \log p \, \nabla_\eta \log p^\top\right],
        \qquad R^\top R = \Lambda

    Both take the names of the parts of η in the family's order.
    """

    @abstractmethod
    def fisher(self, d: Distribution, parts: tuple[str, ...]) -> Matrix:
        """Λ of every batch element, in nats per output squared."""

    @abstractmethod
    def root(self, d: Distribution, parts: tuple[str, ...]) -> Root:
        """R of every batch element, with no more rows than columns."""


@final
@dataclass(frozen=True)
class Orthogonal(Information):
    """Λ = diag(s²): scalar parts whose scores do not correlate."""

    # From a distribution to s, the root mean square score, of each part.
    scales: Callable[[Any], Mapping[str, Tensor]]

    def fisher(self, d: Distribution, parts: tuple[str, ...]) -> Matrix:
        """See :meth:`Information.fisher`."""
        return self._stacked(d, parts).square().diag_embed()

    def root(self, d: Distribution, parts: tuple[str, ...]) -> Root:
        """See :meth:`Information.root`."""
        return self._stacked(d, parts).diag_embed()

    def _stacked(self, d: Distribution, parts: tuple[str, ...]) -> Tensor:
        scales = self.scales(d)
        return torch.stack([scales[name] for name in parts], dim=-1)


@final
@dataclass(frozen=True)
class Unknown(Information):
    """None is known: the error says what the family lacks."""

    error: UnsupportedLikelihoodError

    def fisher(self, d: Distribution, parts: tuple[str, ...]) -> Matrix:
        """See :meth:`Information.fisher`."""
        raise self.error

    def root(self, d: Distribution, parts: tuple[str, ...]) -> Root:
        """See :meth:`Information.root`."""
        raise self.error


@final
@dataclass(frozen=True)
class Coupled(Information):
    """A dense Λ between scalar parts, computed in float64."""

    # From a distribution and the names of the parts to the entries of Λ on and above
    # the diagonal, in float64; an entry that is left out is zero.
    entries: Callable[[Any, tuple[str, ...]], Mapping[tuple[str, str], Tensor]]

    def fisher(self, d: Distribution, parts: tuple[str, ...]) -> Matrix:
        """See :meth:`Information.fisher`."""
        entries = self.entries(d, parts)
        zero = torch.zeros_like(entries[parts[0], parts[0]])
        rows = [
            [entries.get((a, b), entries.get((b, a), zero)) for b in parts]
            for a in parts
        ]
        return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)

    def root(self, d: Distribution, parts: tuple[str, ...]) -> Root:
        """See :meth:`Information.root`."""
        return psd_root(self.fisher(d, parts))


def psd_root(matrix: Matrix) -> Root:
    r"""Returns R with :math:`R^\top R = \Lambda`; Λ is positive semidefinite, float64.

    .. math:: \Lambda = D C D,\quad C = V E V^\top,\qquad R = E^{1/2} V^\top D

    D is the root of the diagonal: parts differ in units by many orders of magnitude,
    which the eigenvalues of the correlation matrix C do not see.

    Raises:
        UnsupportedLikelihoodError: If Λ has a negative eigenvalue beyond round-off.
    """
    scale = matrix.diagonal(dim1=-2, dim2=-1).sqrt()
    # A part without information has a zero row; dividing by one keeps it zero.
    divisor = torch.where(scale == 0, 1.0, scale)
    correlation = matrix / (divisor.unsqueeze(-1) * divisor.unsqueeze(-2))
    # NaN stays NaN, for the caller to name the family; `eigh` itself would fail.
    bad = ~correlation.isfinite().flatten(-2).all(-1)[..., None, None]
    values, vectors = torch.linalg.eigh(correlation.masked_fill(bad, 0.0))
    smallest = float(values.min()) if values.numel() else 0.0
    if smallest < _ROUND_OFF:
        raise UnsupportedLikelihoodError(
            "A Fisher information must be positive semidefinite; got an eigenvalue of "
            f"{smallest:.3e} where parts are scaled to one. Observe another family."
        )
    # Round-off below zero is clamped: the exact eigenvalue is zero or positive.
    root = values.clamp(min=0.0).sqrt().unsqueeze(-1) * vectors.mT
    return (root * scale.unsqueeze(-2)).masked_fill(bad, torch.nan)
