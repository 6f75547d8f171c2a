"""The share of the full posterior's predictive variance that a subnet keeps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from pyro_subnet.guides.posterior import AutoSubnetMultivariateNormal
from pyro_subnet.selection.output_variance import (
    Weighting,
    check_weighting,
    reference_data,
)
from pyro_subnet.selection.subspace import WhitenedGradients, full_gaussian
from pyro_subnet.tensors.memory import check_factor_fits
from pyro_subnet.tensors.modes import full_precision
from pyro_subnet.tracing.data import Data

# D x D matrices held at once: factor, a copy for an error message, Gram matrix, its
# whitened form, a basis.
_MATRICES = 5.0


@torch.inference_mode(False)
@full_precision()
def kept_variance(
    posterior: AutoSubnetMultivariateNormal,
    *args: Any,
    inputs: Any = None,
    weighting: Weighting = "equal",
    model_kwargs: Mapping[str, Any] | None = None,
) -> float:
    r"""Share of linearized predictive variance that a posterior's subnet keeps.

    .. math:: \frac{\sum_x \operatorname{tr} J_S P_{SS}^{-1} J_S^\top}
        {\sum_x \operatorname{tr} J P^{-1} J^\top}

    with P the GGN's precision over all D weights, at the posterior's ``noise_factor``
    and ``prior_factor`` (sites without a factor of their own have 1). It judges the
    subnet, whatever curvature and form the posterior itself is held in. It is for
    networks whose full posterior fits: five D x D matrices in float64, and about D^3
    operations. ``compare_subnets`` sets several subnets side by side.

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
    at_map, subnet = posterior.at_map, posterior.subnet
    latents = at_map.latents
    num_params, device = latents.layout.num_params, latents.loc.device
    check_factor_fits(num_params, torch.float64, device, matrices=_MATRICES)
    data = Data.single(args, dict(model_kwargs or {}))
    factors = posterior.prior_factor, posterior.noise_factor
    gaussian = full_gaussian(at_map, data, *factors)
    batches = reference_data(inputs, data)
    gradients = WhitenedGradients.read(at_map, batches, gaussian, weighting)
    # L^T E_S spans the subnet, whitened.
    basis, _ = torch.linalg.qr(gaussian.precision_tril[subnet.flat].mT)
    return min(1.0, gradients.kept(basis))
