"""The share of the full posterior's predictive variance that a subnet keeps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from pyro_subnet.fit.sums import subnet_curvature, whole_subnet
from pyro_subnet.gaussians.factored import PrecisionGaussian
from pyro_subnet.guides.curvature import CurvatureGuide
from pyro_subnet.laplace.evidence import site_scales
from pyro_subnet.selection.output_variance import (
    Weighting,
    check_weighting,
    reference_data,
)
from pyro_subnet.selection.subspace import WhitenedGradients, gaussian_of_
from pyro_subnet.tensors.memory import check_factor_fits
from pyro_subnet.tensors.modes import full_precision
from pyro_subnet.tensors.triangular import mirror_
from pyro_subnet.tracing.data import Data

# Factor, its copy for a message of error, Gram matrix, its whitened form, a basis.
_MATRICES = 5.0


@torch.inference_mode(False)
@full_precision()
def kept_variance(
    posterior: CurvatureGuide,
    *args: Any,
    inputs: Any = None,
    weighting: Weighting = "equal",
    model_kwargs: Mapping[str, Any] | None = None,
) -> float:
    r"""Share of linearized predictive variance that a posterior's subnet keeps.

    .. math:: \frac{\sum_x \operatorname{tr} J_S P_{SS}^{-1} J_S^\top}
        {\sum_x \operatorname{tr} J P^{-1} J^\top}

    with P the GGN's precision over all D weights, at the posterior's noise scale, and
    its prior scale for every weight (of scales by site: theirs, and 1 for others). It
    is the subnet's, in whatever curvature and form the posterior itself is held. For
    networks whose whole posterior fits: five D x D matrices in float64 and about D^3
    operations. Beside other subnets: ``compare_subnets``.

    Args:
        posterior: The posterior.
        args: The training data, as the model takes them.
        inputs: Where the variance matters: a tensor, a tuple of arguments, a mapping of
            keyword arguments, ``(args, kwargs)``, or a list of such batches; None for
            the training data.
        weighting: Of the outputs, as for :class:`PredictiveVariance
            <pyro_subnet.selection.PredictiveVariance>`.
        model_kwargs: Keyword arguments of the model.

    Returns:
        From 0 to 1.

    Raises:
        MemoryLimitError: If matrices over all weights do not fit.
        SelectionError: If no weight moves an output at the inputs.
        PrecisionError: If the precision is not positive definite.

    Source: Daxberger et al. (2021), section 4, arXiv 2010.14689, for the aim; the share
    is ours, with correlations between weights counted.
    """
    check_weighting(weighting)
    latents, subnet = posterior.latents, posterior.subnet
    check_factor_fits(
        latents.layout.num_params,
        torch.float64,
        latents.loc.device,
        matrices=_MATRICES,
    )
    data = Data.single(args, dict(model_kwargs or {}))
    gaussian = _full_gaussian(posterior, data)
    batches = reference_data(inputs, data)
    gradients = WhitenedGradients.read(posterior, batches, gaussian, weighting)
    # L^T E_S spans the subnet, whitened.
    basis, _ = torch.linalg.qr(gaussian.precision_tril[subnet.flat].mT)
    return min(1.0, gradients.kept(basis))


def _full_gaussian(posterior: CurvatureGuide, data: Data) -> PrecisionGaussian:
    """The posterior over all weights at the scales of a given one, in float64."""
    latents = posterior.latents
    everything = whole_subnet(latents)
    curvature = subnet_curvature(posterior.user_model, latents, everything, data)
    precision = curvature.ggn.to(torch.float64).mul_(posterior.noise_scale**-2)
    scales = site_scales(posterior.prior_scale, everything)
    scale = scales.to(latents.loc.device) if scales.ndim else float(scales)
    prior = curvature.prior.to(torch.float64).scaled(scale)
    prior.add_to_lower_(precision, 1.0)
    mirror_(precision)
    return gaussian_of_(precision, latents.loc)
