"""Closed-form distributions of the linearized outputs, and draws of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_subnet.gaussians.factored import Gaussian
from pyro_subnet.predictions.linearized_outputs import LinearizedOutputs
from pyro_subnet.subnet import Subnet
from pyro_subnet.tensors.grad_mode import outside_inference_mode
from pyro_subnet.tensors.lower_factor import lower_factor
from pyro_subnet.tracing.call import ModelCall
from pyro_subnet.tracing.trace import Latents, Model


@outside_inference_mode()
def output_distribution(
    model: Model,
    latents: Latents,
    subnet: Subnet,
    gaussian: Gaussian,
    call_arguments: tuple[tuple[Any, ...], Mapping[str, Any]],
    *,
    joint: bool,
) -> dist.MultivariateNormal:
    r"""Gaussian :math:`N(\eta(\hat\theta), J P^{-1} J^\top)` over linearized outputs.

    Args:
        model: The user's model.
        latents: Its latent sites at the MAP.
        subnet: The chosen elements.
        gaussian: The posterior over them.
        call_arguments: Positional and keyword arguments of the model.
        joint: Whether to give the covariance across inputs.

    Returns:
        Batch shape (N,) and event shape (C,), or event shape (N * C,). Where gradients
        are on and a tensor among the arguments requires them, differentiable in it.

    Raises:
        ModelError: If no output parameter moves, or there is no common data axis.

    Source: Daxberger et al. (2021), eqs. 5 and 6, arXiv 2010.14689.
    """
    call = ModelCall.read(model, latents, *call_arguments)
    loc, factor = moments(LinearizedOutputs.read(call, subnet, gaussian), joint=joint)
    # A singular covariance has zeros on the factor's diagonal, which torch's check of
    # the argument, though not its arithmetic, refuses.
    return dist.MultivariateNormal(loc, scale_tril=factor, validate_args=False)


def moments(outputs: LinearizedOutputs, *, joint: bool) -> tuple[Tensor, Tensor]:
    r"""Mean of the linearized outputs, and the lower factor of their covariance.

    Args:
        outputs: The outputs.
        joint: Whether to give the covariance across inputs.

    Returns:
        Shapes (N, C) and (N, C, C), or (N * C,) and (N * C, N * C).
    """
    # Without gradients to the inputs there are none at all.
    with torch.set_grad_enabled(outputs.follows_inputs):
        loc, whitened = outputs.loc(), outputs.whitened()
        if joint:
            rows = torch.cat(list(whitened)).flatten(0, 1)
            return loc.flatten(), lower_factor(rows)
        return loc, torch.cat([lower_factor(rows) for rows in whitened])
