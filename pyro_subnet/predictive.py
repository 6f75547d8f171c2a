"""Closed-form distributions of the linearized outputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor

from pyro_subnet.curvature.jacobian.output_map import (
    Blocks,
    OutputMap,
    identity_factors,
)
from pyro_subnet.curvature.jacobian.route import jacobian_blocks
from pyro_subnet.exceptions import ModelError
from pyro_subnet.gaussian import Gaussian
from pyro_subnet.memory import DEFAULT_BUDGET
from pyro_subnet.model_call import ModelCall, MovedParts
from pyro_subnet.subnet import Subnet
from pyro_subnet.trace import Latents, Model

# Blocks of fewer rows are put together before they are solved for: a solve reads the
# whole factor, which at large S takes longer than the operations of a few rows.
_FEW_ROWS = 512


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
        Batch shape (N,) and event shape (C,), or event shape (N * C,).

    Raises:
        ModelError: If no output parameter moves, or there is no common data axis.

    Source: Daxberger et al. (2021), eqs. 5 and 6, arXiv 2010.14689.
    """
    call = ModelCall.read(model, latents, *call_arguments)
    graph = call.graph(with_prior=False)
    moved, activations = call.moved_parts(graph, subnet), graph.activation_bytes
    del graph
    _check_axis(call, moved)
    outputs = call.output_map(subnet, moved, activations)
    with torch.no_grad():
        values = outputs.outputs(outputs.loc)
        loc = torch.cat(
            [_by_datum(call, moved, site, value) for site, value in enumerate(values)],
            dim=-1,
        )
        loc = loc.to(gaussian.loc)
        whitened = _whitened(call, moved, outputs, gaussian)
        if joint:
            rows = torch.cat(list(whitened)).flatten(0, 1)
            return _normal(loc.flatten(), lower_factor(rows))
        factors = torch.cat([lower_factor(rows) for rows in whitened])
        return _normal(loc, factors)


def lower_factor(
    rows: Float[Tensor, "*batch out subnet"],
) -> Float[Tensor, "*batch out out"]:
    r"""Lower triangular T with :math:`T T^\top = W W^\top`, for W of any rank.

    By QR of :math:`W^\top`: unlike a Cholesky factor of the product it exists for
    singular covariances, and loses no digits to the squaring.

    Args:
        rows: W, shape (..., C, S).

    Returns:
        Shape (..., C, C), with a non-negative diagonal.
    """
    num_outputs, size = rows.shape[-2:]
    upper = torch.linalg.qr(rows.mT, mode="r").R
    if size < num_outputs:
        padding = upper.new_zeros(*upper.shape[:-2], num_outputs - size, num_outputs)
        upper = torch.cat([upper, padding], dim=-2)
    sign = torch.where(upper.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(upper)
    return (upper * sign.unsqueeze(-1)).mT


def _normal(loc: Tensor, factor: Tensor) -> dist.MultivariateNormal:
    # A singular covariance has zeros on the factor's diagonal, which torch's check of
    # the argument, though not its arithmetic, refuses.
    return dist.MultivariateNormal(loc, scale_tril=factor, validate_args=False)


def _whitened(
    call: ModelCall, moved: MovedParts, outputs: OutputMap, gaussian: Gaussian
) -> Iterator[Tensor]:
    r"""Rows :math:`L^{-1} j`, (data, C, S), in groups of data."""
    blocks = jacobian_blocks(outputs, identity_factors(outputs), DEFAULT_BUDGET)
    one_element_a_datum = outputs.shapes[0][0] == call.num_data
    if len(outputs.shapes) == 1 and one_element_a_datum:
        for rows in _joined(blocks):
            whitened = gaussian.whiten(rows.to(gaussian.loc))
            yield _by_datum(call, moved, 0, whitened)
        return
    parts: list[list[Tensor]] = [[] for _ in outputs.shapes]
    for block in blocks:
        parts[block.site].append(gaussian.whiten(block.rows.to(gaussian.loc)))
    yield torch.cat(
        [
            _by_datum(call, moved, site, torch.cat(rows))
            for site, rows in enumerate(parts)
        ],
        dim=1,
    )


def _joined(blocks: Blocks) -> Iterator[Tensor]:
    """Rows of successive blocks of one site, put together while they are few."""
    few, count = list[Tensor](), 0
    for block in blocks:
        few.append(block.rows)
        count += block.rows.shape[0] * block.rows.shape[1]
        if count >= _FEW_ROWS:
            yield _cat(few)
            few, count = [], 0
    if few:
        yield _cat(few)


def _by_datum(call: ModelCall, moved: MovedParts, index: int, rows: Tensor) -> Tensor:
    """Regroups a site's (M, c, ...) by datum: (N, C, ...), parameter by parameter."""
    site = [site for site in call.sites if moved[site.name]][index]
    per_datum = site.num_elements // call.num_data
    grouped = rows.unflatten(0, (-1, per_datum))
    widths = site.widths(moved[site.name])
    return _cat([part.flatten(1, 2) for part in grouped.split(widths, dim=2)], dim=1)


def _cat(parts: list[Tensor], dim: int = 0) -> Tensor:
    """Joins tensors; a single one, which may be large, is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)


def _check_axis(call: ModelCall, moved: MovedParts) -> None:
    if not any(moved.values()):
        raise ModelError(
            "The subnet must move a parameter of an observed site; got sites "
            f"{list(moved)} that none of its weights reach. Choose weights of the "
            "network."
        )
    lengths = {site.name: site.leading for site in call.sites}
    if len(set(lengths.values())) > 1:
        raise ModelError(
            "Observed sites must share one data axis for a joint Gaussian over their "
            f"outputs; got lengths {lengths}. Sample `linearized_model` instead."
        )
