"""Draws of whole linearized functions: one draw of the weights serves all inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_subnet.exceptions import OptionError
from pyro_subnet.gaussians.factored import Gaussian
from pyro_subnet.predictions.linearized_outputs import LinearizedOutputs
from pyro_subnet.subnet import Subnet
from pyro_subnet.tensors.grad_mode import outside_inference_mode
from pyro_subnet.tracing.call import ModelCall
from pyro_subnet.tracing.trace import Latents, Model


@outside_inference_mode()
def sample_functions(
    model: Model,
    latents: Latents,
    subnet: Subnet,
    gaussian: Gaussian,
    call_arguments: tuple[tuple[Any, ...], Mapping[str, Any]],
    *,
    num_samples: int,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "num_samples num_data out"]:
    r"""Draws :math:`\eta(x; \hat\theta) + J(x) (\theta_k - \hat\theta)` at all inputs.

    Args:
        model: The user's model.
        latents: Its latent sites at the MAP.
        subnet: The chosen elements.
        gaussian: The posterior over them.
        call_arguments: Positional and keyword arguments of the model.
        num_samples: K, how many functions.
        generator: Source of the random numbers; torch's own by default.

    Returns:
        Shape (K, N, C), outputs in the order of
        :func:`~pyro_subnet.predictions.outputs.output_distribution`; differentiable in
        the inputs as that is.

    Raises:
        OptionError: If ``num_samples`` is less than 1.
        ModelError: If no output parameter moves, or there is no common data axis.

    Source: Daxberger et al. (2021), eqs. 5 and 6, arXiv 2010.14689.
    """
    check_num_samples(num_samples)
    call = ModelCall.read(model, latents, *call_arguments)
    outputs = LinearizedOutputs.read(call, subnet, gaussian)
    with torch.set_grad_enabled(outputs.follows_inputs):
        return draw_functions(outputs, num_samples, generator)


def draw_functions(
    outputs: LinearizedOutputs, num_samples: int, generator: torch.Generator | None
) -> Float[Tensor, "num_samples num_data out"]:
    """Draws functions; costs K S^2 for the weights and K S for each row of J.

    Args:
        outputs: The linearized outputs.
        num_samples: K.
        generator: Source of the random numbers; torch's own by default.

    Returns:
        Shape (K, N, C).
    """
    gaussian = outputs.gaussian
    noise = standard_normal((num_samples, gaussian.size), gaussian.loc, generator)
    steps = gaussian.draw(noise) - gaussian.loc
    shifts = torch.cat([rows @ steps.mT for rows in outputs.rows()])
    return outputs.loc() + shifts.movedim(-1, 0)


def standard_normal(
    shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None
) -> Tensor:
    """Standard normal noise.

    Args:
        shape: Its shape.
        like: Its dtype and device.
        generator: Source of the random numbers, on any device; torch's own by default.

    Returns:
        The noise.
    """
    device = like.device if generator is None else generator.device
    noise = torch.randn(shape, generator=generator, dtype=like.dtype, device=device)
    return noise.to(like.device)


def check_num_samples(num_samples: int) -> None:
    """Checks a number of draws.

    Args:
        num_samples: K.

    Raises:
        OptionError: If it is less than 1.
    """
    if num_samples < 1:
        raise OptionError(
            f"`num_samples` must be at least 1; got {num_samples}. Pass 1000 or so."
        )
