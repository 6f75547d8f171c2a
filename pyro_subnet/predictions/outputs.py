"""The Gaussian over the linearized outputs of one call, and draws of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_subnet.gaussians.base import Gaussian, standard_normal
from pyro_subnet.predictions.full_normal import FullNormal
from pyro_subnet.predictions.groups import group_size
from pyro_subnet.predictions.links.integration import Integration, PredictiveOptions
from pyro_subnet.predictions.links.likelihood import Likelihood
from pyro_subnet.tensors.finite import finite_rows
from pyro_subnet.tensors.lower_factor import lower_factor
from pyro_subnet.tensors.memory import DEFAULT_BUDGET, check_fits
from pyro_subnet.tracing.linearized_outputs import LinearizedOutputs
from pyro_subnet.tracing.site_distribution import SiteDistribution

# The factors, and what they are joined from.
_FACTORS_HELD = 2


@final
@dataclass(frozen=True, eq=False)
class OutputGaussian:
    r"""The Gaussian :math:`N(\eta(\hat\theta), J P^{-1} J^\top)` over the outputs.

    Source: Daxberger et al. (2021), eqs. 5 and 6, arXiv 2010.14689.
    """

    outputs: LinearizedOutputs
    gaussian: Gaussian

    def holding_rows(self) -> OutputGaussian:
        """The same, with the rows of J kept for other posteriors: N C S numbers."""
        return replace(self, outputs=self.outputs.holding_rows(self.gaussian.loc))

    def loc(self) -> Float[Tensor, "data out"]:
        r""":math:`\eta(x; \hat\theta)`, shape (N, C)."""
        return self.outputs.loc(self.gaussian.loc)

    def moments(self, *, joint: bool | int) -> tuple[Tensor, Tensor]:
        """Mean (N, C) and factor (N, C, C), or (N C,) and (N C, N C) across inputs."""
        self._check_fits(joint=joint)
        with torch.set_grad_enabled(self.outputs.follows_inputs):
            # J P^-1 J^T = W W^T = T T^T with W = J L^-T, P = L L^T and T lower
            # triangular. Its only gradients are those to inputs that want them.
            loc, whitened = self.loc(), self._whitened()
            size = group_size(joint, len(loc))
            if joint is True:
                rows = torch.cat(list(whitened)).flatten(0, 1)
                return loc.flatten(), finite_rows(lower_factor(rows))
            # (N / q, q C) and (N / q, q C, q C) for a number q.
            if size == 1:
                factors = torch.cat([lower_factor(rows) for rows in whitened])
                return loc, finite_rows(factors)
            grouped = torch.cat(list(whitened)).unflatten(0, (-1, size)).flatten(1, 2)
            return loc.reshape(-1, size * loc.shape[1]), finite_rows(
                lower_factor(grouped)
            )

    def marginals(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each output, (N, C), without covariances."""
        with torch.set_grad_enabled(self.outputs.follows_inputs):
            gaussian = self.gaussian
            scales = self.outputs.scales(gaussian.row_scales, gaussian.loc)
            return self.loc(), finite_rows(scales)

    def _check_fits(self, *, joint: bool | int) -> None:
        """Refuses factors of the outputs' covariances that cannot be held."""
        shapes, like = self.outputs.outputs.shapes, self.gaussian.loc
        num_data = self.outputs.outputs.num_data
        total = sum(count * width for count, width in shapes)
        numbers = group_size(joint, num_data) * total**2 // num_data
        needed = _FACTORS_HELD * numbers * like.element_size()
        if needed > DEFAULT_BUDGET:  # smaller ones are not worth asking for
            check_fits(
                needed,
                like.device,
                "Covariances of the outputs must fit in memory; got "
                f"{total // num_data} outputs at each of {num_data} inputs"
                f"{', joint' if joint else ''}",
                "Predict at fewer inputs at once.",
            )

    def distribution(self, *, joint: bool | int) -> FullNormal:
        """The Gaussian as a distribution: N of (C,), or one of (N C,) if joint."""
        loc, factor = self.moments(joint=joint)
        # A singular covariance has zeros on the factor's diagonal, which torch's check
        # of the argument, though not its arithmetic, refuses.
        found = FullNormal.of(loc, factor, validate_args=False)
        names = self.outputs.names
        found.names = names * (loc.shape[-1] // len(names))
        return found

    def problem(self, options: PredictiveOptions) -> Integration:
        """The integral that gives the distribution of y at the only site."""
        (site,) = self.outputs.sites
        node = self.outputs.nodes[site.name]
        likelihood = Likelihood(
            SiteDistribution.of(node["fn"], node["value"]),
            site.family,
            self.outputs.subnet_call.moved[site.name],
            self.gaussian.loc,
            self.outputs.follows_inputs,
            options.noise_factor,
        )
        if likelihood.scales_noise:
            likelihood.noise_of_elements()  # checks it
        return Integration(self, likelihood, options)

    def draw_functions(
        self, num_samples: int, generator: torch.Generator | None
    ) -> Float[Tensor, "num_samples num_data out"]:
        """Draws of the outputs, (K, N, C), differentiable as :meth:`moments`."""
        with torch.set_grad_enabled(self.outputs.follows_inputs):
            # eta + J (theta_k - MAP): one draw of the weights serves all inputs. It
            # costs K S^2 for the weights and K S for each row of J.
            like = self.gaussian.loc
            noise = standard_normal((num_samples, self.gaussian.size), like, generator)
            steps = self.gaussian.draw(noise) - like
            shifts = torch.cat([rows @ steps.mT for rows in self.outputs.rows(like)])
            return self.loc() + finite_rows(shifts).movedim(-1, 0)

    def variances(
        self, num_samples: int | None, generator: torch.Generator | None
    ) -> Float[Tensor, "data ..."]:
        """Variances of the outputs, in their own shape, exact or from draws."""
        if num_samples is None:
            found = self.marginals()[1].square()
        else:
            noise = standard_normal(
                (num_samples, self.gaussian.size), self.gaussian.loc, generator
            )
            steps = self.gaussian.draw(noise) - self.gaussian.loc
            found = finite_rows(self.outputs.mean_squares(steps, self.gaussian.loc))
        return found.unflatten(1, self.outputs.shape_of_datum)

    def _whitened(self) -> Iterator[Tensor]:
        """Rows :math:`L^{-1} j`, (data points, C, S), in groups of data points."""
        for rows in self.outputs.rows(self.gaussian.loc):
            yield self.gaussian.whiten(rows)
