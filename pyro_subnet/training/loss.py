"""The negative log joint of a model under factors, and its residuals, on one batch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from pyro_subnet.tracing.arguments import as_tensors
from pyro_subnet.tracing.data import Batch
from pyro_subnet.tracing.data_factors import data_factors, data_terms
from pyro_subnet.tracing.log_prior import log_prior_terms
from pyro_subnet.tracing.plates import plate_scale
from pyro_subnet.tracing.scaled_model import has_normal_noise
from pyro_subnet.tracing.site_distribution import SiteDistribution
from pyro_subnet.tracing.trace import ModelAtMAP, Node, is_output, run_model


def negative_log_joint(
    at_map: ModelAtMAP,
    loc: Tensor,
    batch: Batch,
    weight: float,
) -> tuple[Tensor, float]:
    r"""Minus the log joint density, a scalar that is differentiable in ``loc``.

    .. math:: -\log p(\theta) - w \sum_{n \in \text{batch}} \log p(y_n \mid \theta)

    Args:
        at_map: The model under its factors.
        loc: Its latent sites, packed, shape (D,).
        batch: Arguments of one call.
        weight: w, N/B; the scales of the user's own subsampling plates are left out.

    Returns:
        The sum, nats, and the mean of squared residuals over the noise's variance; NaN
        of data without normal noise.
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
    loss = -(prior + weight * torch.stack(parts).sum())
    return loss, _mean_square(outputs.values())


@torch.no_grad()
def _mean_square(nodes: Iterable[Node]) -> float:
    """Squared residuals over the noise's variance, per observation of normal sites."""
    total, count = torch.zeros((), dtype=torch.float64), 0.0
    for node in nodes:
        taken = SiteDistribution.of(node["fn"], node["value"])
        if not has_normal_noise(node["fn"]):
            continue
        base: Any = taken.base
        squares = ((node["value"] - base.loc) / base.scale).square()
        live = torch.ones_like(squares, dtype=torch.bool)
        for mask in (node["mask"], taken.mask):
            live = live if mask is None else live & torch.as_tensor(mask)
        total += squares.where(live, 0.0).sum().double().cpu()
        count += float(live.sum())
    return float(total) / count if count else math.nan
