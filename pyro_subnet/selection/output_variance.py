"""What linearized outputs say at reference inputs, over many elements at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_subnet.curvature.ggn import add_ggn_, ggn_diagonal
from pyro_subnet.curvature.jacobian.output_map import (
    Factors,
    OutputMap,
    identity_factors,
)
from pyro_subnet.curvature.jacobian.route import jacobian_blocks
from pyro_subnet.exceptions import ModelError, OptionError, SelectionError
from pyro_subnet.fit.sums import subnet_curvature, whole_subnet
from pyro_subnet.subnet import Subnet
from pyro_subnet.tensors.memory import DEFAULT_BUDGET
from pyro_subnet.tensors.triangular import mirror_
from pyro_subnet.tracing.call import ModelCall, MovedParts
from pyro_subnet.tracing.data import Batch, Data
from pyro_subnet.tracing.output_site import OutputSite
from pyro_subnet.tracing.trace import Latents, Model

# How the parameters of the observed distributions are weighed against each other.
Weighting = Literal["equal", "fisher"]


def check_weighting(weighting: str) -> None:
    """Refuses an unknown weighting.

    Args:
        weighting: What the user gave.

    Raises:
        OptionError: If it is none of those there are.
    """
    if weighting not in get_args(Weighting):
        raise OptionError(
            f"`weighting` must be 'equal' or 'fisher'; got {weighting!r}. Leave it out "
            "to count every output alike."
        )


def check_inputs(inputs: Any) -> None:
    """Refuses reference inputs that no call of the model can be made of.

    Args:
        inputs: What the user gave.

    Raises:
        OptionError: If they are neither arguments of a call nor batches of them.
        DataError: If they are a one-shot iterator, which one reading uses up.
    """
    if inputs is None or isinstance(inputs, Tensor | Mapping | tuple):
        return
    if not isinstance(inputs, Iterable):
        raise OptionError(
            "`inputs` must be a tensor, a tuple of arguments, a mapping of keyword "
            "arguments, `(args, kwargs)`, a list of such batches, or None; got "
            f"{type(inputs).__name__}. Pass what the model takes."
        )
    Data(inputs, whole=False).require_repeatable("a selector at `inputs`")


def reference_data(inputs: Any, training: Data) -> Data:
    """Reference inputs as calls of the model.

    Args:
        inputs: A tensor, a tuple of arguments, a mapping of keyword arguments or
            ``(args, kwargs)`` for one call; a list, or another re-iterable, of such
            for several; None for the training data.
        training: The training data.

    Returns:
        The calls.

    Raises:
        OptionError: If ``inputs`` are nothing of that.
        DataError: If they are a one-shot iterator.
    """
    check_inputs(inputs)
    if inputs is None:
        return training
    if isinstance(inputs, Tensor | Mapping | tuple):
        return Data([inputs], whole=False)
    return Data(inputs, whole=False)


def squared_gradients(
    model: Model, latents: Latents, data: Data, weighting: Weighting
) -> Float[Tensor, " params"]:
    r"""Squared gradients of the outputs, for every weight j.

    .. math:: A_{jj} = \sum_{n,c} (R_n J_n)_{cj}^2

    Outputs are the unconstrained parameters of the observed distributions that any
    latent moves. R is the identity (``"equal"``), or the root of the weighted Fisher
    information :math:`w_n \Lambda_n` (``"fisher"``); of batches, w leaves out the N/B
    of subsampling plates. A sum: the mean over inputs ranks weights alike. One pass, in
    memory for D numbers beside the passes' own.

    Args:
        model: The user's model.
        latents: Its latent sites at the MAP.
        data: The reference inputs.
        weighting: See above.

    Returns:
        Shape (D,), float64.

    Raises:
        SelectionError: If no latent moves any output there.
    """
    everything = whole_subnet(latents)
    total = torch.zeros(everything.size, dtype=torch.float64, device=latents.loc.device)
    for outputs, factors in _maps(model, latents, everything, data, weighting):
        total += ggn_diagonal(outputs, factors, DEFAULT_BUDGET)
    if not bool((total > 0).any()):
        raise SelectionError(
            "`inputs` must be such that some weight moves an output; got gradients "
            "that are all zero. Pass inputs like those to predict at."
        )
    return total


def output_gram(
    model: Model, latents: Latents, subnet: Subnet, data: Data, weighting: Weighting
) -> Float[Tensor, "subnet subnet"]:
    r"""Gram matrix of output gradients, :math:`A = \sum_n (R_n J_n)^\top R_n J_n`.

    With it the kept variance of any part T of the subnet is
    :math:`\sum_n \operatorname{tr} R_n J_T P_{TT}^{-1} J_T^\top R_n^\top =
    \operatorname{tr}(P_{TT}^{-1} A_{TT})`. One pass; 2 S^2 operations a row.

    Args:
        model: The user's model.
        latents: Its latent sites at the MAP.
        subnet: The chosen elements.
        data: The reference inputs.
        weighting: As for :func:`squared_gradients`.

    Returns:
        Shape (S, S), float64, symmetric.
    """
    gram = torch.zeros(
        subnet.size, subnet.size, dtype=torch.float64, device=latents.loc.device
    )
    for outputs, factors in _maps(model, latents, subnet, data, weighting):
        add_ggn_(gram, outputs, factors, DEFAULT_BUDGET)
    mirror_(gram)
    return gram


def output_rows(
    model: Model, latents: Latents, data: Data, weighting: Weighting
) -> Float[Tensor, "rows params"] | None:
    r"""Output gradients over all weights, the rows of :math:`R_n J_n`, if they are few.

    Args:
        model: The user's model.
        latents: Its latent sites at the MAP.
        data: The reference inputs.
        weighting: As for :func:`squared_gradients`.

    Returns:
        Shape (rows, D), float64; None if there are D rows or more.
    """
    everything = whole_subnet(latents)
    held, count = [latents.loc.new_empty(0, everything.size, dtype=torch.float64)], 0
    for outputs, factors in _maps(model, latents, everything, data, weighting):
        count += sum(factor.shape[0] * factor.shape[1] for factor in factors)
        if count >= everything.size:
            return None
        for block in jacobian_blocks(outputs, factors, DEFAULT_BUDGET):
            held.append(block.rows.flatten(0, 1).to(torch.float64))
    return torch.cat(held)


def dense_precision(
    model: Model, latents: Latents, subnet: Subnet, data: Data
) -> Float[Tensor, "subnet subnet"]:
    r"""Posterior precision :math:`P_{SS} = G_{SS} + P_{0,SS}` as a full matrix.

    Args:
        model: The user's model.
        latents: Its latent sites at the MAP.
        subnet: The chosen elements.
        data: The training data.

    Returns:
        Shape (S, S), float64, symmetric.
    """
    curvature = subnet_curvature(model, latents, subnet, data)
    precision = curvature.ggn.to(torch.float64)
    curvature.prior.to(torch.float64).add_to_lower_(precision, 1.0)
    mirror_(precision)
    return precision


@dataclass(frozen=True, eq=False)
class DenseOutputs:
    """Outputs of one call and their Jacobian over all D elements, datum by datum.

    Attributes:
        sites: Observed sites with a parameter that any latent moves.
        moved: Those parameters.
        loc: Outputs at the MAP, shape (N, C): site by site, parameter by parameter,
            the elements of a datum in row-major order.
        jac: Shape (N, C, D), float64.
    """

    sites: tuple[OutputSite, ...]
    moved: MovedParts
    loc: Float[Tensor, "batch out"]
    jac: Float[Tensor, "batch out params"]

    @classmethod
    def read(cls, model: Model, latents: Latents, batch: Batch) -> DenseOutputs:
        """Calls the model and differentiates it; holds N C D numbers.

        Args:
            model: The user's model.
            latents: Its latent sites at the MAP.
            batch: Positional and keyword arguments.

        Returns:
            Outputs and Jacobian.

        Raises:
            ModelError: If no latent moves an output, or observed sites have data axes
                of different lengths.
        """
        everything = whole_subnet(latents)
        call = ModelCall.read(model, latents, *batch)
        outputs, moved = _map(call, everything)
        lengths = {site.name: site.leading for site in call.sites}
        if outputs is None or len(set(lengths.values())) > 1:
            raise ModelError(
                "Observed sites must share one data axis, and a latent must move one; "
                f"got lengths {lengths}, moved parameters {dict(moved)}. Pass inputs "
                "of one length."
            )
        sites = tuple(site for site in call.sites if moved[site.name])
        rows: list[list[Tensor]] = [[] for _ in sites]
        for block in jacobian_blocks(
            outputs, identity_factors(outputs), DEFAULT_BUDGET
        ):
            rows[block.site].append(block.rows.to(torch.float64))
        jac, loc = [], []
        for index, site in enumerate(sites):
            widths = site.widths(moved[site.name])
            jac.append(_by_datum(torch.cat(rows[index]), call.num_data, widths))
            value = outputs.reference[index].detach().to(torch.float64)
            loc.append(_by_datum(value, call.num_data, widths))
        return cls(sites, moved, torch.cat(loc, 1), torch.cat(jac, 1))


def _by_datum(rows: Tensor, num_data: int, widths: list[int]) -> Tensor:
    """Regroups a site's (M, c, ...) to (N, C, ...), parameter by parameter."""
    grouped = rows.unflatten(0, (num_data, -1))
    parts = grouped.split(widths, dim=2)
    return torch.cat([part.flatten(1, 2) for part in parts], dim=1)


def _maps(
    model: Model, latents: Latents, subnet: Subnet, data: Data, weighting: Weighting
) -> Iterator[tuple[OutputMap, Factors]]:
    for args, kwargs in data.calls("Reference inputs"):
        call = ModelCall.read(model, latents, args, kwargs)
        outputs, moved = _map(call, subnet)
        if outputs is None or not call.num_data:
            continue
        if weighting == "fisher":
            yield outputs, call.factors(moved, without_plates=not data.whole)
        else:
            yield outputs, identity_factors(outputs)


def _map(call: ModelCall, subnet: Subnet) -> tuple[OutputMap | None, MovedParts]:
    """The outputs that a subnet moves, None where there are none."""
    graph = call.graph(with_prior=False)
    moved, activations = call.moved_parts(graph, subnet), graph.activation_bytes
    del graph  # frees the activations before the Jacobian needs the room
    if not any(moved.values()):
        return None, moved
    return call.output_map(subnet, moved, activations), moved
