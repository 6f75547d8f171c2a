r"""A Gaussian with a diagonal precision over all D elements, at any prior scale."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_subnet.exceptions import NonFiniteError, OptionError, PrecisionError
from pyro_subnet.gaussians.factored import Gaussian
from pyro_subnet.subnet import Layout, Subnet
from pyro_subnet.tensors.memory import check_factor_fits


@dataclass(frozen=True, eq=False)
class DiagonalGaussian(Gaussian):
    r"""The Gaussian :math:`N(\hat\theta, \operatorname{diag}(p)^{-1})`.

    Attributes:
        loc: Mean, shape (D,).
        precision: p, shape (D,), positive.
    """

    loc: Float[Tensor, " params"]
    precision: Float[Tensor, " params"]

    @property
    def size(self) -> int:
        """D, the number of dimensions."""
        return int(self.loc.shape[-1])  # a tensor while torch.jit traces

    def draw(self, noise: Float[Tensor, "*batch params"]) -> Float[Tensor, "*batch d"]:
        r"""Turns standard normal noise into draws, :math:`\hat\theta + p^{-1/2} z`.

        Args:
            noise: Standard normal, shape (..., D).

        Returns:
            Draws of the same shape; differentiable in ``noise`` and ``loc``.
        """
        return self.loc + noise * self.precision.rsqrt()

    def log_prob(
        self, value: Float[Tensor, "*batch params"]
    ) -> Float[Tensor, "*batch"]:
        """Log density.

        Args:
            value: Shape (..., D).

        Returns:
            Shape (...), in nats.
        """
        quadratic = ((value - self.loc).square() * self.precision).sum(-1)
        constant = 0.5 * self.size * math.log(2 * math.pi)
        return self.half_log_det() - 0.5 * quadratic - constant

    def half_log_det(self) -> Float[Tensor, ""]:
        r"""Returns :math:`\frac12 \sum_i \log p_i`."""
        return 0.5 * self.precision.log().sum()

    def variance(self) -> Float[Tensor, " params"]:
        """Returns the marginal variances, shape (D,)."""
        return self.precision.reciprocal()

    def whiten(self, jac: Float[Tensor, "*rows params"]) -> Float[Tensor, "*rows d"]:
        r"""Maps rows j of a Jacobian to :math:`p^{-1/2} j`.

        Args:
            jac: Shape (..., D).

        Returns:
            Shape (..., D); inner products are :math:`J \\Sigma J^\\top`.
        """
        return jac * self.precision.rsqrt()

    def precision_matrix(self) -> Float[Tensor, "params params"]:
        """Returns the precision as a dense matrix, shape (D, D)."""
        return self._dense(self.precision)

    def covariance_matrix(self) -> Float[Tensor, "params params"]:
        """Returns the covariance as a dense matrix, shape (D, D)."""
        return self._dense(self.variance())

    def scale_tril(self) -> Float[Tensor, "params params"]:
        """Returns the factor of the covariance as a dense matrix, shape (D, D)."""
        return self._dense(self.precision.rsqrt())

    def _dense(self, diagonal: Tensor) -> Tensor:
        check_factor_fits(self.size, diagonal.dtype, diagonal.device)
        return diagonal.diag()


def site_scales(prior_scale: float | Tensor, layout: Layout, like: Tensor) -> Tensor:
    """One prior scale a site.

    Args:
        prior_scale: A number, or one a site.
        layout: The sites.
        like: A tensor of the device.

    Returns:
        Shape (num sites,), float64.

    Raises:
        OptionError: If they are not positive and finite, or too many or few.
    """
    count = len(layout.names)
    scales = torch.as_tensor(prior_scale).to(like.device, torch.float64)
    if scales.ndim > 1 or scales.numel() not in (1, count):
        raise OptionError(
            f"`prior_scale` must be a number or one for each of {count} sites; got "
            f"shape {tuple(scales.shape)}. Pass a tensor in the order of "
            f"{list(layout.names)}."
        )
    if not bool((scales.isfinite() & (scales > 0)).all()):
        raise OptionError(
            "`prior_scale` must be positive and finite; got "
            f"{scales.detach().flatten().tolist()}. Pass 1.0 for the model's own "
            "prior precision."
        )
    return scales.reshape(-1).expand(count)


def check_positive(values: Tensor, positions: Tensor | None, layout: Layout) -> None:
    """Refuses precisions, or eigenvalues of one, that are no precisions.

    Args:
        values: The numbers.
        positions: Positions in the packed vector of the elements that they are of;
            None where they are in its order.
        layout: Where the sites lie in it.

    Raises:
        NonFiniteError: If one is NaN or infinite.
        PrecisionError: If one is not positive.
    """
    flat = values.detach().flatten()
    bad = (~(flat.isfinite() & (flat > 0))).nonzero().squeeze(-1)
    if not bad.numel():
        return
    first = bad[:1] if positions is None else positions.flatten()[bad[:1]]
    site = next(iter(Subnet(layout, first).indices))
    value = float(flat[bad[0]])
    if not math.isfinite(value):
        raise NonFiniteError(
            f"The precision must be finite; got {value} at site {site!r} "
            f"({bad.numel()} such values). Check the model's outputs and its prior at "
            "the MAP."
        )
    raise PrecisionError(
        f"Posterior precision must be positive definite; got smallest eigenvalue "
        f"{float(flat[bad].min()):.3e} at site {site!r} ({bad.numel()} such values). "
        "Train closer to the MAP, or raise the prior's precision: a weight that "
        "neither the data nor the prior curve has no Gaussian."
    )
