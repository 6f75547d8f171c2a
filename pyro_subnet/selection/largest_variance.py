"""The paper's rule: the weights of largest marginal variance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pyro_subnet.data import Data
from pyro_subnet.exceptions import OptionError, PrecisionError, SelectionError
from pyro_subnet.full_precision import at_least_float32
from pyro_subnet.kronecker_curvature import kronecker_curvature
from pyro_subnet.kronecker_precision import KroneckerPrecision
from pyro_subnet.laplace import DiagonalCurvature, diagonal_curvature
from pyro_subnet.memory import check_factor_fits
from pyro_subnet.selection.base import (
    GuideAtMAP,
    Selector,
    check_size,
    largest,
    resolve_size,
)
from pyro_subnet.subnet import Layout, Subnet


@dataclass(frozen=True)
class LargestVariance(Selector):
    r"""Keeps the weights of largest variance under a diagonal Laplace posterior.

    .. math:: \sigma_j^2 = \Big(\sum_n J_n^\top \Lambda_n J_n + P_0\Big)_{jj}^{-1}

    Among subnets of one size this one minimises the 2-Wasserstein distance to the
    full posterior, if that is taken to be diagonal. Costs one pass over the data and
    memory linear in D.

    Weights that no training datum moves (a pixel that is always zero, a unit that
    never fires) have the largest variance of all, the prior's. On inputs like the
    training data they leave the predictive at the MAP; on shifted inputs they wake
    up, which is often where uncertainty is wanted. They are kept unless
    ``keep_dead=False``.

    Attributes:
        size: A count (int) or a share in (0, 1] (float).
        estimator: How the variances are estimated: ``"ggn"``, the exact diagonal of
            the generalized Gauss-Newton matrix; ``"ef"``, that of the empirical Fisher,
            one backward pass in place of one a class; ``"kfac"``, those of a
            Kronecker-factored posterior (:mod:`~pyro_subnet.curvature.kronecker`),
            which counts correlations within a layer. It takes eigendecompositions of
            the factors.
        keep_dead: Whether weights without any curvature may be chosen.

    Raises:
        SelectionError: If ``size`` is neither a count nor a share.
        OptionError: If ``estimator`` is not known.

    Source: Daxberger et al. (2021), section 4 and eq. 9, arXiv 2010.14689.
    """

    size: int | float
    estimator: Literal["ggn", "ef", "kfac"] = "ggn"
    keep_dead: bool = True

    passes_over_data = True

    def __post_init__(self) -> None:
        """Checks the options."""
        check_size(self.size)
        if self.estimator not in ("ggn", "ef", "kfac"):
            raise OptionError(
                f"`estimator` must be 'ggn', 'ef' or 'kfac'; got {self.estimator!r}. "
                "Leave it out for the GGN."
            )

    def __call__(self, guide: GuideAtMAP, data: Data) -> Subnet:
        """Chooses the subnet.

        Args:
            guide: A guide at its MAP.
            data: The training data.

        Returns:
            The subnet, with the share of output variance it explains.

        Raises:
            PrecisionError: If a diagonal precision is not positive.
            ModelError: If a site's prior precision differs within it, for ``"kfac"``.
            SelectionError: If too few weights have curvature, with ``keep_dead=False``.
        """
        latents = guide.latents
        layout = latents.layout
        size = resolve_size(self.size, layout.num_params)
        dtype = at_least_float32(latents.loc.dtype)
        check_factor_fits(size, dtype, latents.loc.device)
        curvature, variance = self._estimate(guide, data)
        scores = variance
        if not self.keep_dead:
            alive = curvature.ggn > 0
            if int(alive.sum()) < size:
                raise SelectionError(
                    f"`size` must be at most the number of weights that the training "
                    f"data move, {int(alive.sum())}, with keep_dead=False; got {size}. "
                    "Choose fewer, or keep the others."
                )
            scores = variance.where(alive, -torch.inf)
        noise = torch.finfo(latents.loc.dtype).eps ** 0.75
        positions = largest(scores, size, noise)
        # Under a diagonal posterior weight j adds G_jj sigma_j^2 of (scaled) variance.
        share = curvature.ggn * variance
        total = float(share.sum())
        explained = float(share[positions].sum()) / total if total > 0 else 0.0
        return Subnet.from_positions(layout, positions, explained)

    def _estimate(
        self, guide: GuideAtMAP, data: Data
    ) -> tuple[DiagonalCurvature, Tensor]:
        """Diagonals of the curvature, and marginal variances, both (D,)."""
        latents, model = guide.latents, guide.user_model
        if self.estimator != "kfac":
            curvature = diagonal_curvature(model, latents, data, kind=self.estimator)
            return curvature, _marginal_variance(curvature, latents.layout)
        found = kronecker_curvature(model, latents, data)
        precision = KroneckerPrecision.decompose(
            found.blocks, found.diagonal, found.prior, latents.layout
        )
        variance = precision.gaussian(latents.loc.to(torch.float64)).variance()
        return DiagonalCurvature(found.ggn_diagonal(), found.prior), variance


def _marginal_variance(curvature: DiagonalCurvature, layout: Layout) -> Tensor:
    precision = curvature.ggn + curvature.prior
    bad = (~(precision > 0)).nonzero().squeeze(-1)
    if bad.numel():
        first = Subnet(layout, bad[:1]).names[0]
        raise PrecisionError(
            f"The diagonal of the precision must be positive to rank weights; got "
            f"{float(precision[bad[0]]):.3e} at {first} ({bad.numel()} such weights). "
            "Train closer to the MAP, or choose sites whose prior has curvature with "
            "`Sites([...])`."
        )
    return precision.reciprocal()
