"""Gaussian noise of a known scale on Gaussian outputs: the exact predictive."""

from __future__ import annotations

import torch
import torch.distributions as td
from torch import Tensor

from pyro_subnet.predictions.groups import group_size
from pyro_subnet.predictions.links.gaussian_noise import multivariate, noisy
from pyro_subnet.predictions.links.integration import Integrated, Integration


def exact(problem: Integration) -> Integrated:
    """The link ``"exact"``, for Gaussian noise whose scale no subnet weight moves."""
    likelihood, joint = problem.likelihood, problem.options.joint
    own = likelihood.own()
    loc, factor = problem.moments()
    event = likelihood.rest
    if likelihood.family.distribution is td.MultivariateNormal:
        noise = likelihood.argument("scale_tril", own)
        event = event + noise.shape[-1:]
    else:
        noise = own["log_scale"].exp().unsqueeze(-1)
    if likelihood.scales_noise:
        noise = noise * likelihood.noise_of_elements()[..., None, None]
    num_data, width = likelihood.shape[0], noise.shape[-1]
    # y ~ N(eta, J P^-1 J^T + N N^T), with the elements' noise factors in N's blocks.
    groups = () if joint is True else (num_data // group_size(joint, num_data),)
    noise = noise.reshape(*groups, -1, width, width)
    noise = _block_diagonal(noise)
    if joint is not False:
        return Integrated(problem.on_scale_of_y(multivariate(loc, factor, noise)))
    return Integrated(problem.of_shape(noisy(loc, factor, noise), event))


def _block_diagonal(blocks: Tensor) -> Tensor:
    """Blocks (..., E, w, w) on a diagonal, (..., E w, E w)."""
    count, width = blocks.shape[-3], blocks.shape[-1]
    eye = torch.eye(count, dtype=blocks.dtype, device=blocks.device)
    spread = torch.einsum("...eij,ef->...eifj", blocks, eye)
    return spread.reshape(*blocks.shape[:-3], count * width, count * width)
