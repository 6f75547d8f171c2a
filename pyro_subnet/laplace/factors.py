r"""Factors of the prior and of the noise of highest evidence, jointly.

Only what a fit has summed is read. With curvature G, prior P0, the noise's weight W and
energy E (:class:`FitSummary`), and the prior's energy
:math:`e = \sum_i g_i (P_0^{-1} g)_i`:

.. math:: \log p(D \mid s, r) = - W \log r - \frac{E}{2 r^2} + \frac D2 \log s
    - \frac s2 e - \frac12 \log\det (r^{-2} G + s P_0) + \text{const}
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pyro_subnet.gaussians.base import CurvatureForm
from pyro_subnet.laplace.evidence import log_evidence, prior_energy, prior_traces
from pyro_subnet.laplace.search import NUM_TRIED, minimize
from pyro_subnet.laplace.summary import FitSummary

# Factors that are looked at, of those that the curvature was summed under.
_BOUNDS = (1e-6, 1e6)
# Fixed-point rounds where priors have several factors, and the change in logarithms at
# which they have converged.
_ROUNDS, _CONVERGED = 5, 1e-4


@final
@dataclass(frozen=True, eq=False)
class Factors:
    """Factors of one evidence.

    Attributes:
        prior: s, one for each group of weights, shape (groups,), float64.
        noise: r.
        log_evidence: Under them, nats.
    """

    prior: Float[Tensor, " groups"]
    noise: float
    log_evidence: float


@final
@dataclass(frozen=True, eq=False)
class EvidenceOfFactors:
    """The evidence as a function of factors of the prior and the noise.

    Attributes:
        form: Curvature of likelihood and prior, at factors 1.
        summary: The log joint density at the MAP.
        groups: Positions of the weights whose prior precisions share a factor; all
            others keep theirs.
        scales_noise: Whether the noise may have a factor.
    """

    form: CurvatureForm
    summary: FitSummary
    groups: Sequence[Int[Tensor, "..."]]
    scales_noise: bool

    def best(self, noise: float | None = None) -> Factors:
        """The factors of highest evidence.

        Args:
            noise: That of the noise, if it is given.

        Returns:
            The factors.
        """
        if not self.scales_noise:
            noise = 1.0
        return self._best_of_one(noise) if self._is_one else self._fixed_point(noise)

    def at(self, prior: Tensor, noise: float) -> Factors:
        """The evidence at given factors."""
        if self._is_one:
            found = self._of_one(float(prior), noise)
        else:
            r = torch.tensor(noise, dtype=torch.float64)
            each = self._of_each(prior)
            found = float(log_evidence(self.form, self.summary, each, r, r.pow(-2)))
        return Factors(prior, noise, found)

    @property
    def _is_one(self) -> bool:
        """Whether all priors share one factor, whose evidence takes one spectrum."""
        return len(self.groups) == 1 and len(self.groups[0]) == self._size

    @property
    def _size(self) -> int:
        return len(self.summary.prior_gradient)

    @cached_property
    def _log_det(self) -> Callable[[Tensor], Tensor]:
        """From a to log det (G + a P0)."""
        return self.form.log_det_function(4 * NUM_TRIED)

    @cached_property
    def _energy(self) -> Float[Tensor, " params"]:
        return prior_energy(self.summary, self.form.prior)

    def _of_one(self, s: float, r: float) -> float:
        """Log evidence under one factor of all priors."""
        summary, size = self.summary, self._size
        likelihood = summary.log_likelihood
        if r != 1.0:
            likelihood -= summary.noise_weight * math.log(r)
            likelihood += 0.5 * summary.noise_energy * (1 - r**-2)
        prior = summary.log_prior + 0.5 * size * math.log(s)
        prior -= 0.5 * (s - 1) * float(self._energy.sum())
        # log det (r^-2 G + s P0) = -2 D log r + log det (G + s r^2 P0)
        log_det = -2 * size * math.log(r) + float(self._at(s * r**2))
        return likelihood + prior + 0.5 * size * math.log(2 * math.pi) - 0.5 * log_det

    def _at(self, a: float) -> Tensor:
        return self._log_det(torch.tensor(a, dtype=torch.float64))

    def _best_of_one(self, noise: float | None) -> Factors:
        weight, energy = self.summary.noise_weight, self.summary.noise_energy
        ridge = float(self._energy.sum())

        def factors(x: float) -> tuple[float, float]:
            if noise is not None:
                return x, noise
            # For s = a / r^2 the determinant is that of a alone, and the best noise
            # r^2 = (E + a e) / W.
            r = math.sqrt((energy + x * ridge) / weight)
            return x / r**2, r

        def loss(x: float) -> float:
            return -self._of_one(*factors(x))

        s, r = factors(minimize(loss, _BOUNDS, "evidence", sign=-1.0).best)
        return self.at(torch.tensor([s], dtype=torch.float64), r)

    def _of_each(self, prior: Tensor) -> Tensor:
        each = torch.ones(self._size, dtype=torch.float64)
        for group, factor in zip(self.groups, prior, strict=True):
            each[group.cpu()] = factor
        return each

    def _fixed_point(self, noise: float | None) -> Factors:
        """The best on the way to MacKay's fixed point, for all factors at once."""
        # s_k <- gamma_k / e_k,  r^2 <- E / (W - gamma): MacKay (1992), doi
        # 10.1162/neco.1992.4.3.448.
        s = torch.ones(len(self.groups), dtype=torch.float64)
        r = 1.0 if noise is None else noise
        best = self.at(s, r)
        for _ in range(_ROUNDS):
            each = self._of_each(s)
            on_device = each.to(self.form.prior.diagonal.device)
            scaled = self.form.rescaled(on_device, r**-2)
            gaussian = scaled.gaussian(self.form.prior.diagonal)
            left = each * prior_traces(gaussian, self.form.prior)
            ratios = [self._ratio(group, left) for group in self.groups]
            new_s, new_r = torch.tensor(ratios, dtype=torch.float64), r
            if noise is None:
                gamma = self._size - float(left.sum())
                rest = max(self.summary.noise_weight - gamma, 1.0)
                new_r = math.sqrt(self.summary.noise_energy / rest)
            steps = [abs(math.log(new_r / r)), *(new_s / s).log().abs().tolist()]
            s, r = new_s, new_r
            found = self.at(s, r)
            best = found if found.log_evidence > best.log_evidence else best
            if max(steps) < _CONVERGED:
                break
        return best

    def _ratio(self, group: Tensor, left: Tensor) -> float:
        """How many weights of a group the data determine, over the prior's energy."""
        group = group.cpu()
        gamma = (len(group) - left[group].sum()).clamp(min=0.0)
        energy = self._energy[group].sum().clamp(min=torch.finfo(left.dtype).tiny)
        return float((gamma / energy).clamp(*_BOUNDS))
