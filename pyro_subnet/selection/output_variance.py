"""Gradients of the linearized outputs at reference inputs, and the precision P_SS."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, final, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_subnet.curvature.ggn import add_ggn_
from pyro_subnet.curvature.jacobian.output_map import (
    Factors,
    OutputMap,
    identity_factors,
    some_of,
)
from pyro_subnet.curvature.jacobian.part import RandomPart
from pyro_subnet.curvature.jacobian.route import jacobian_blocks, squared_columns
from pyro_subnet.exceptions import OptionError, SelectionError
from pyro_subnet.fit.sums import subnet_curvature
from pyro_subnet.laplace.state import SiteFactors, factor_of_each
from pyro_subnet.selection.held_gram import HeldRows, is_of_classes
from pyro_subnet.subnet import Subnet
from pyro_subnet.tensors.memory import DEFAULT_BUDGET
from pyro_subnet.tensors.modes import at_least_float32
from pyro_subnet.tensors.triangular import mirror_
from pyro_subnet.tracing.call import ModelCall
from pyro_subnet.tracing.data import Data
from pyro_subnet.tracing.forgotten_data import check_forgotten
from pyro_subnet.tracing.output_site import OutputSite
from pyro_subnet.tracing.subnet_call import SubnetCall
from pyro_subnet.tracing.trace import ModelAtMAP

_SCALE = "log_scale"
# Numbers of J at least that are worked on at once.
_AT_ONCE = 2**22
# How parameters of the observed distributions are weighted against each other.
Weighting = Literal["equal", "fisher"]


def check_weighting(weighting: str) -> None:
    """Refuses an unknown weighting."""
    if weighting not in get_args(Weighting):
        raise OptionError(
            f"`weighting` must be 'equal' or 'fisher'; got {weighting!r}. Leave it out "
            "to count every output alike."
        )


def check_inputs(inputs: Any) -> None:
    """Refuses inputs that make no call of the model, and one-shot iterators of them."""
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
    """Calls of the model at reference inputs; None stands for the training data."""
    check_inputs(inputs)
    if inputs is None:
        return training
    is_one_call = isinstance(inputs, Tensor | Mapping | tuple)
    return Data([inputs] if is_one_call else inputs, whole=False)


@final
class SquaredGradients(NamedTuple):
    """Squared gradients of the outputs, summed over inputs.

    Attributes:
        total: By weight, (D,).
        num_rows: How many outputs they are the sum of.
    """

    total: Float[Tensor, " params"]
    num_rows: int


def squared_gradients(
    at_map: ModelAtMAP, data: Data, weighting: Weighting
) -> SquaredGradients:
    r""":math:`A_{jj} = \sum_{n,c} (R_n J_n)_{cj}^2`, summed over inputs, (D,)."""
    # Outputs are the unconstrained parameters of the observed distributions that any
    # latent site moves. R is the identity, or the root of the weighted Fisher
    # information w_n Lambda_n, without the N/B of subsampling plates where data come in
    # batches. With the identity, what moves nothing but a noise scale that all data
    # share has -inf, to be left out. One pass, in memory for a few times D numbers
    # beside the pass's own.
    everything = at_map.latents.everything
    total = torch.zeros(everything.size).to(everything.flat.device, torch.float64)
    noise = dict[str, Tensor]()  # squares of scales that are one number in a call
    scales = defaultdict[str, set[float]](set)
    num_rows = 0
    with data.together():
        for call, outputs, factors in _maps(at_map, everything, data, weighting):
            num_rows += sum(len(factor) * factor.shape[1] for factor in factors)
            rest = list(factors)
            for at, site in enumerate(call.sites if weighting == "equal" else ()):
                column = _scale_column(call, site)
                if column is None:
                    continue
                scale = outputs.reference[at][:, column]
                ends = {float(scale.min()), float(scale.max())}
                scales[site.name] |= ends
                if len(ends) > 1:
                    continue
                alone = [factor[:, :0] for factor in factors]
                alone[at] = factors[at][:, column : column + 1]
                squares = squared_columns(outputs, tuple(alone), DEFAULT_BUDGET)
                noise[site.name] = noise.get(site.name, 0.0) + squares
                is_other = torch.arange(factors[at].shape[1]) != column
                rest[at] = factors[at][:, is_other]
            total += squared_columns(outputs, tuple(rest), DEFAULT_BUDGET)
    data.sum_(total)
    if data.ranks is not None:
        num_rows = sum(data.ranks.gathered(num_rows))
        for own in data.ranks.gathered(dict(scales)):
            for name, ends in own.items():
                scales[name] |= ends
        names = sorted(set().union(*data.ranks.gathered(list(noise))))
        noise = {name: noise.get(name, torch.zeros_like(total)) for name in names}
        data.sum_(*noise.values())
    shared = torch.zeros_like(total)
    for name, squares in noise.items():
        (shared if len(scales[name]) == 1 else total).add_(squares)
    total[(shared > 0) & (total == 0)] = -torch.inf
    if not bool((total > 0).any()):
        raise SelectionError(
            "`inputs` must be such that some weight moves an output; got gradients "
            "that are all zero. Pass inputs like those to predict at."
        )
    return SquaredGradients(total, num_rows)


def output_gram(
    at_map: ModelAtMAP, subnet: Subnet, data: Data, weighting: Weighting
) -> Float[Tensor, "subnet subnet"]:
    r"""Gram matrix :math:`A = \sum_n (R_n J_n)^\top R_n J_n`, float64.

    Args:
        at_map: The model at its MAP.
        subnet: The weights.
        data: The inputs n.
        weighting: What R weights the outputs by.

    Returns:
        The matrix, (S, S).
    """
    # A part T of the subnet keeps sum_n tr R_n J_T P_TT^-1 J_T^T R_n^T = tr P_TT^-1
    # A_TT. One pass; 2 S^2 operations a row of J. In float64, twice as long as in
    # float32, weights that are nearly alike are told apart the same way whatever the
    # order of the sum, and over ranks.
    like = at_map.latents.loc
    gram = like.new_zeros(subnet.size, subnet.size, dtype=torch.float64)
    with data.together():
        for _, outputs, factors in _maps(at_map, subnet, data, weighting):
            add_ggn_(gram, outputs, factors, DEFAULT_BUDGET)
    if data.ranks is not None:
        data.ranks.sum_lower_(gram)
    mirror_(gram)
    return gram


def held_rows(
    at_map: ModelAtMAP,
    pool: Subnet,
    data: Data,
    weighting: Weighting,
    *,
    is_bounded: bool,
    share: float = 1.0,
) -> list[HeldRows]:
    r"""Rows :math:`R_n J_n` over the candidates.

    Args:
        at_map: The model at its MAP.
        pool: The candidates.
        data: The inputs n.
        weighting: What R weights the outputs by.
        is_bounded: Whether what an element of a site of classes has to gain is bounded.
        share: Of the inputs that are held, about, a random choice that is the same
            every time.

    Returns:
        Of some elements of a site each; over ranks, of this one's data.
    """
    width = at_least_float32(at_map.latents.loc.dtype)
    held, part = defaultdict[tuple[bool, int], list[Tensor]](list), RandomPart(share)
    with data.together():
        maps = _maps(at_map, pool, data, weighting, part)
        for call, outputs, factors in maps:
            for block in jacobian_blocks(outputs, factors, DEFAULT_BUDGET):
                bounded = is_bounded and is_of_classes(call.sites[block.site])
                rows = part.elements(block.rows).to(width, copy=True)
                held[bounded, rows.shape[1]].append(rows)
    return [
        HeldRows(rows, bounded)
        for (bounded, _), parts in held.items()
        for rows in _joined(parts)
    ]


def _joined(parts: list[Tensor]) -> Iterator[Tensor]:
    """Tensors joined into fewer, which are quicker to work on; takes them."""
    found = list[Tensor]()
    while parts:
        found.append(parts.pop())
        if not parts or sum(each.numel() for each in found) >= _AT_ONCE:
            yield torch.cat(found)
            found = []


def output_rows(
    at_map: ModelAtMAP, data: Data, weighting: Weighting
) -> Float[Tensor, "rows params"] | None:
    r"""Rows :math:`R_n J_n` over all weights, float64; None if there are D or more."""
    everything = at_map.latents.everything
    like = at_map.latents.loc
    held, count = [like.new_empty(0, everything.size, dtype=torch.float64)], 0
    for _, outputs, factors in _maps(at_map, everything, data, weighting):
        count += sum(factor.shape[0] * factor.shape[1] for factor in factors)
        if count >= everything.size:
            return None
        for block in jacobian_blocks(outputs, factors, DEFAULT_BUDGET):
            held.append(block.rows.flatten(0, 1).to(torch.float64))
    return torch.cat(held)


def dense_precision(
    at_map: ModelAtMAP,
    subnet: Subnet,
    data: Data,
    prior_factor: SiteFactors = 1.0,
    noise_factor: float = 1.0,
    *,
    share: float = 1.0,
) -> Float[Tensor, "subnet subnet"]:
    r"""Precision :math:`P_{SS} = G_{SS} + P_{0,SS}` in both triangles, in float64."""
    curvature = subnet_curvature(at_map, subnet, data, share=share)
    precision: Tensor = curvature.likelihood.ggn.to(torch.float64)
    precision.mul_(noise_factor**-2)  # normal noise: G -> G / noise_factor^2
    each = factor_of_each(prior_factor, subnet)
    factor = each.to(precision.device) if each.ndim else float(each)
    curvature.prior.to(torch.float64).scaled(factor).add_to_lower_(precision, 1.0)
    mirror_(precision)
    return precision


def _maps(
    at_map: ModelAtMAP,
    subnet: Subnet,
    data: Data,
    weighting: Weighting,
    part: RandomPart | None = None,
) -> Iterator[tuple[SubnetCall, OutputMap, Factors]]:
    """Each call that the subnet moves, its outputs, and the factors R."""
    for args, kwargs in data.calls("Reference inputs"):
        read = ModelCall.read(at_map, args, kwargs)
        graph = read.graph()
        check_forgotten(read, graph)
        call = SubnetCall.of(read, subnet, graph, without_plates=not data.whole)
        del graph  # frees the activations before the Jacobian needs the room
        if not call.is_moved:
            continue
        outputs = call.outputs()
        weighted = weighting == "fisher"
        factors = call.factors() if weighted else identity_factors(outputs)
        index = None if part is None else part.drawn(outputs)
        if index is not None:
            if not len(index):
                continue
            factors = some_of(factors, outputs.num_data, index)
            outputs = outputs.some(index)
        yield call, outputs, factors


def _scale_column(call: SubnetCall, site: OutputSite) -> int | None:
    """Where a site's outputs have the log of a scale, beside a location."""
    # It says how far data lie from the outputs, not where the outputs are.
    parts = call.moved[site.name]
    if not {"loc", _SCALE} <= set(parts):
        return None
    return sum(site.widths(parts)[: parts.index(_SCALE)])
