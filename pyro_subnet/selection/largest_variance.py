"""The paper's rule: the weights of largest marginal variance."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, final

import torch
from torch import Tensor

from pyro_subnet.curvature.kronecker_factors import KroneckerFactors
from pyro_subnet.exceptions import OptionError, SelectionError
from pyro_subnet.fit.sums import DiagonalCurvature, diagonal_curvature, subnet_curvature
from pyro_subnet.gaussians.kronecker import KroneckerForm
from pyro_subnet.options import FitOptions
from pyro_subnet.selection.base import (
    GuideAtMAP,
    Selector,
    check_size,
    largest,
    resolve_size,
)
from pyro_subnet.selection.diagonal import explained_variance, marginal_variance
from pyro_subnet.selection.swag import SwagMoments
from pyro_subnet.subnet import Subnet
from pyro_subnet.tensors.memory import check_factor_fits
from pyro_subnet.tensors.modes import at_least_float32
from pyro_subnet.tracing.data import Data


@final
@dataclass(frozen=True)
class LargestVariance(Selector):
    r"""Keeps the weights of largest variance under a diagonal Laplace posterior.

    .. math:: \sigma_j^2 = \Big(\sum_n J_n^\top \Lambda_n J_n + P_0\Big)_{jj}^{-1}

    Among subnets of one size this one minimises the 2-Wasserstein distance to the full
    posterior, if that is taken to be diagonal. Costs one pass over the data and memory
    linear in D.

    Weights that no training data move (a pixel that is always zero, a unit that never
    fires) have the largest variance of all, the prior's. They leave predictions at
    inputs like the training data unchanged, and move them at shifted inputs, where
    uncertainty is often wanted. They are kept unless ``keep_dead=False``. The iterates
    of SGD rank them the other way round: only the prior moves such a weight, so its
    variance over the steps is about zero and ``"swag"`` ranks it last;
    ``keep_dead=False`` then takes a pass over the data.

    Attributes:
        size: A count (int) or a share in (0, 1] (float).
        estimator: How the variances are estimated: ``"ggn"``, the exact diagonal of
            the generalized Gauss-Newton matrix; ``"ef"``, that of the empirical Fisher,
            one backward pass in place of one a class; ``"kfac"``, those of a
            Kronecker-factored posterior (``covariance="kron"``), which counts
            correlations within a layer and takes eigendecompositions of the factors;
            ``"swag"``, the variances of SGD iterates that ``moments`` has collected,
            without a pass over the data and without ``explained_variance``, unless
            ``keep_dead=False``.
        keep_dead: Whether weights without curvature may be chosen, that is with less
            than the largest curvature times the dtype's eps.
        moments: Moments of the iterates, for ``"swag"`` alone.

    Raises:
        SelectionError: If ``size`` is neither a count nor a share. When called, if too
            few weights have curvature, with ``keep_dead=False``, or the moments are of
            fewer than two iterates or another length.
        OptionError: If ``estimator`` is not known, or ``moments`` are missing or not
            asked for.
        PrecisionError: When called, if a diagonal precision is not positive.
        ModelError: When called, if a site's prior precision differs within it, for
            ``"kfac"``.

    Source: Daxberger et al. (2021), section 4 and eq. 9, arXiv 2010.14689; Maddox et
    al. (2019), arXiv 1902.02476, for ``"swag"``.
    """

    size: int | float
    estimator: Literal["ggn", "ef", "kfac", "swag"] = "ggn"
    keep_dead: bool = True
    moments: SwagMoments | None = field(default=None, repr=False)

    passes_over_data = True

    def __post_init__(self) -> None:
        check_size(self.size)
        if self.estimator not in ("ggn", "ef", "kfac", "swag"):
            raise OptionError(
                "`estimator` must be 'ggn', 'ef', 'kfac' or 'swag'; got "
                f"{self.estimator!r}. Leave it out for the GGN."
            )
        if (self.estimator == "swag") != (self.moments is not None):
            raise OptionError(
                "`moments` must come with estimator='swag', and with no other; got "
                f"{type(self.moments).__name__} with {self.estimator!r}. Collect them "
                "in training with `SwagMoments(guide)`."
            )
        if self.estimator == "swag" and self.keep_dead:
            object.__setattr__(self, "passes_over_data", False)

    def __call__(self, guide: GuideAtMAP, data: Data) -> Subnet:
        """See :meth:`Selector.__call__`."""
        latents = guide.latents
        layout = latents.layout
        size = resolve_size(self.size, layout.num_params)
        dtype = at_least_float32(latents.loc.dtype)
        check_factor_fits(size, dtype, latents.loc.device)
        noise = torch.finfo(latents.loc.dtype).eps ** 0.75
        collected = None
        if self.moments is not None:
            collected = self.moments.variance.to(latents.loc.device)
            if len(collected) != layout.num_params:
                raise SelectionError(
                    "`moments` must be of the guide's latent parameters, "
                    f"{layout.num_params}; got {len(collected)}. Collect them from a "
                    "guide of the same model."
                )
            if self.keep_dead:
                return Subnet.from_positions(layout, largest(collected, size, noise))
        curvature, variance = self._estimate(guide, data)
        scores = variance if collected is None else collected
        if not self.keep_dead:
            # Curvature that should be zero differs from it by round-off.
            smallest = torch.finfo(latents.loc.dtype).eps * curvature.ggn.max()
            moving = curvature.ggn > smallest
            if int(moving.sum()) < size:
                raise SelectionError(
                    f"`size` must be at most the number of weights that move an "
                    f"output, {int(moving.sum())}, with keep_dead=False; got {size}. "
                    "Choose fewer, or keep the others."
                )
            scores = scores.where(moving, -torch.inf)
        positions = largest(scores, size, noise)
        explained = explained_variance(curvature, variance, positions)
        return Subnet.from_positions(layout, positions, explained)

    def _estimate(
        self, guide: GuideAtMAP, data: Data
    ) -> tuple[DiagonalCurvature, Tensor]:
        """Diagonals of the curvature, and marginal variances, shape (D,)."""
        at_map, latents = guide.at_map, guide.latents
        if self.estimator != "kfac":
            kind: Literal["ggn", "ef"] = "ef" if self.estimator == "ef" else "ggn"
            curvature = diagonal_curvature(at_map, data, kind=kind)
            return curvature, marginal_variance(curvature, latents.layout)
        options = FitOptions(covariance="kron")
        found = subnet_curvature(at_map, latents.everything, data, options)
        factors: KroneckerFactors = found.likelihood.ggn
        form = KroneckerForm.of(factors, found.prior, latents.layout)
        variance = form.gaussian(latents.loc.to(torch.float64)).variance()
        prior = found.prior.diagonal.to(torch.float64)
        return DiagonalCurvature(factors.ggn_diagonal(), prior), variance
