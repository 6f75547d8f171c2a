"""The negative log joint of a model under factors, estimated on one batch."""

from __future__ import annotations

import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from pyro_subnet.tracing.arguments import as_tensors
from pyro_subnet.tracing.data import Batch
from pyro_subnet.tracing.data_factors import data_factors, data_terms
from pyro_subnet.tracing.log_prior import log_prior_terms
from pyro_subnet.tracing.plates import plate_scale
from pyro_subnet.tracing.trace import ModelAtMAP, is_output, run_model


def negative_log_joint(
    at_map: ModelAtMAP,
    loc: Tensor,
    batch: Batch,
    weight: float,
) -> Tensor:
    r"""Minus the log joint density, a scalar that is differentiable in ``loc``.

    .. math:: -\log p(\theta) - w \sum_{n \in \text{batch}} \log p(y_n \mid \theta)

    Args:
        at_map: The model under its factors.
        loc: Its latent sites, packed, shape (D,).
        batch: Arguments of one call.
        weight: w, N/B; the scales of the user's own subsampling plates are left out.

    Returns:
        The sum, nats.
    """
    latents = at_map.latents
    given = tuple(batch[0]), dict(batch[1])
    (args, kwargs), _ = as_tensors(given, at_map.model, loc)
    leaves = latents.layout.unpack(loc)
    trace = run_model(at_map.program, args, kwargs, latents.constrain(leaves), {})
    outputs = {n: v for n, v in trace.nodes.items() if is_output(n, v, latents)}
    of_data = data_factors(trace.nodes, outputs, latents)
    terms = log_prior_terms(trace, latents, leaves, of_data)
    data = data_terms(trace, of_data, without_plates=True)
    parts = [term.log_density for term in data]
    for node in outputs.values():
        scale = node["scale"] / plate_scale(node)
        density = node["fn"].log_prob(node["value"])
        parts.append(scale_and_mask(density, scale, node["mask"]).sum())
    prior = torch.stack([term.log_density for term in terms]).sum()
    return -(prior + weight * torch.stack(parts).sum())
