"""The linearized outputs of one call: values and rows of J for each data point."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils._pytree import tree_leaves

from pyro_subnet.curvature.jacobian.directional import (
    directional_derivative,
    forward_mode_agrees,
)
from pyro_subnet.curvature.jacobian.output_map import (
    Blocks,
    OutputFunction,
    OutputMap,
    identity_factors,
)
from pyro_subnet.curvature.jacobian.plain import PlainRun
from pyro_subnet.curvature.jacobian.route import (
    differentiable_blocks,
    jacobian_blocks,
    joined_rows,
)
from pyro_subnet.curvature.jacobian.structured.reach import reached_rows
from pyro_subnet.curvature.jacobian.structured.recording import NotLayered
from pyro_subnet.exceptions import ModelError
from pyro_subnet.subnet import Subnet
from pyro_subnet.tensors.memory import DEFAULT_BUDGET
from pyro_subnet.tensors.modes import differentiable
from pyro_subnet.tracing.call import Graph, ModelCall
from pyro_subnet.tracing.output_site import OutputSite
from pyro_subnet.tracing.subnet_call import SubnetCall
from pyro_subnet.tracing.trace import Node, preserved_rng

# Blocks of fewer rows are put together before they are solved for: a solve reads the
# whole factor, which at large S takes longer than the operations of a few rows.
_FEW_ROWS = 512
# Outputs of an observation, and numbers of all rows of J and of their cotangents, from
# which on it pays to find out which weights reach which output.
_MANY_ROWS, _MANY_NUMBERS = 32, 2**18
# Outputs in all, numbers of their gradients and bytes of activations up to which all
# rows of J come from the run that showed what the subnet moves, as of one input in
# service: what a run of its own takes, and its check, is more than its operations.
_SERVED_ROWS, _SERVED_NUMBERS, _SERVED_BYTES = 16, 2**20, 2**21

RowScales = Callable[..., Tensor]


@final
@dataclass(frozen=True, eq=False)
class LinearizedOutputs:
    r"""Values :math:`\eta(x; \hat\theta)` of one call, and :math:`J(x)` over a subnet.

    Attributes:
        outputs: The parameters that are moved, as a function of the subnet.
        nodes: The observed sites of a run at the MAP, with a graph to the inputs where
            those want gradients.
        follows_inputs: Whether values and rows carry gradients to the inputs.
        reached: Whether the subnet moves any; if not, all rows are zero.
        held: Rows of J by data point, if they are kept; None to compute them anew.
        run: Of few outputs, a run with its graph.
    """

    subnet_call: SubnetCall
    outputs: OutputMap
    nodes: Mapping[str, Node]
    follows_inputs: bool
    reached: bool = True
    held: tuple[Tensor, ...] | None = None
    run: PlainRun | None = None

    @classmethod
    def read(cls, call: ModelCall, subnet: Subnet) -> LinearizedOutputs:
        """The outputs that a subnet moves; all, if it moves none at these inputs."""
        graph = call.graph(with_prior=False)
        subnet_call, reached = _moved(call, subnet, graph)
        _check_axis(subnet_call)
        follows = torch.is_grad_enabled() and wants_gradients(call.args, call.kwargs)
        nodes = call.trace.nodes
        if follows:
            with preserved_rng():
                nodes = call.run(call.latents.values).nodes
        outputs = subnet_call.outputs()
        run = None
        if reached and not follows and graph.whole and _are_few(outputs):
            with differentiable():
                run = PlainRun(graph.leaves, subnet_call.read(graph.trace))
        return cls(subnet_call, outputs, nodes, follows, reached, run=run)

    def at_outputs(self, of_sites: OutputFunction) -> LinearizedOutputs:
        """Other outputs of the same call, as numerous, as a function of the subnet."""
        run, own = self.run, self.outputs
        if run is None:
            with torch.no_grad():
                reference = of_sites({}, None)
        else:
            with differentiable():
                values = of_sites(run.leaves, None)
            run = replace(run, values=values)
            reference = tuple(value.detach() for value in values)
        outputs = replace(own, of_sites=of_sites, reference=reference)
        return replace(self, outputs=outputs, run=run)

    @property
    def sites(self) -> tuple[OutputSite, ...]:
        """The sites that the subnet moves, in trace order."""
        return self.subnet_call.sites

    @property
    def names(self) -> tuple[str, ...]:
        """What each of the C outputs of one observation is, such as ``"logits[2]"``."""
        several = len(self.subnet_call.call.sites) > 1
        found = list[str]()
        for site in self.sites:
            parts = self.subnet_call.moved[site.name]
            for part, width in zip(parts, site.widths(parts), strict=True):
                name = f"{site.name}.{part}" if several else part
                axes = (*site.distribution.element_shape[1:], width)
                if math.prod(axes) == 1:  # (N, 1) as (N,)
                    found.append(name)
                    continue
                places = product(*map(range, axes if width > 1 else axes[:-1]))
                found += [f"{name}{list(place)}" for place in places]
        return tuple(found)

    def loc(self, like: Tensor) -> Float[Tensor, "data out"]:
        r""":math:`\eta(x; \hat\theta)`, shape (N, C), in the dtype of a tensor."""
        values = self.outputs.reference
        if self.follows_inputs:
            values = self.outputs.outputs(self.outputs.loc)
        found = [self._by_datum(index, value) for index, value in enumerate(values)]
        return torch.cat(found, dim=-1).to(like)

    def rows(self, like: Tensor) -> Iterator[Float[Tensor, "some_data out subnet"]]:
        """Rows of J, (data points, C, S), in groups and in the dtype of ``like``."""
        if self.held is not None:
            yield from self.held
            return
        if not self.reached:
            yield from self._zeros(like)
            return
        shapes = self.outputs.shapes
        if len(shapes) == 1 and shapes[0][0] == self.outputs.num_data:
            for rows in _few_joined(self._blocks()):
                yield self._by_datum(0, rows.to(like))
            return
        joined = joined_rows(self._blocks(), len(shapes), lambda rows: rows.to(like))
        # Several sites, or several elements a data point: all rows of J are joined.
        yield torch.cat(
            [self._by_datum(site, rows) for site, rows in enumerate(joined)], dim=1
        )

    def scales(self, of_rows: RowScales, like: Tensor) -> Float[Tensor, "data out"]:
        """Standard deviations of the outputs, without covariances or whole rows of J.

        Args:
            of_rows: Those of rows (..., S), or of their entries at some columns and
                these columns.
            like: Dtype of the rows that it takes.

        Returns:
            Shape (N, C). Of many outputs only entries of J that are not zero are made,
            where each place of a layer's output reaches one of them.
        """
        if self.held is not None or not self.reached:
            return torch.cat([of_rows(rows) for rows in self.rows(like)])
        parts = self._reached_scales(of_rows, like)
        if parts is None:
            parts = self._dense_scales(of_rows, like)
        return _cat([self._by_datum(site, part) for site, part in enumerate(parts)], 1)

    @torch.no_grad()
    def mean_squares(
        self, steps: Float[Tensor, "num_steps subnet"], like: Tensor
    ) -> Float[Tensor, "data out"]:
        r"""Means of :math:`(J d)^2` over steps d from the MAP, (N, C), step by step."""
        function, point = self.outputs.outputs, self.outputs.loc
        forward_mode = forward_mode_agrees(function, point)
        totals = [like.new_zeros(shape) for shape in self.outputs.shapes]
        for step in steps.to(point):
            tangents = directional_derivative(function, point, step, forward_mode)[1]
            for total, tangent in zip(totals, tangents, strict=True):
                total.add_(tangent.to(like).square_(), alpha=1 / len(steps))
        return _cat([self._by_datum(i, total) for i, total in enumerate(totals)], 1)

    @property
    def shape_of_datum(self) -> tuple[int, ...]:
        """Axes of an observation's outputs; one of all where sites are several."""
        names = len(self.names)
        if len(self.sites) > 1:
            return (names,)
        (site,) = self.sites
        parts = self.subnet_call.moved[site.name]
        widths = site.widths(parts)
        axes = site.distribution.element_shape[1:]
        if len(parts) > 1 or not axes:
            return (names,)
        return axes if widths == [1] else (*axes, *widths)

    def _reached_scales(self, of_rows: RowScales, like: Tensor) -> list[Tensor] | None:
        """The scales (M, c) of every site, if a place of a layer reaches one output."""
        num_data, shapes = self.outputs.num_data, self.outputs.shapes
        counts = [m * c // num_data for m, c in shapes]
        total = sum(counts)
        numbers = num_data * total * (total + self.outputs.size)
        if self.follows_inputs or total < _MANY_ROWS or numbers < _MANY_NUMBERS:
            return None
        found = like.new_zeros(num_data, total)
        try:
            for some in reached_rows(self.outputs, DEFAULT_BUDGET):
                data = slice(some.start, some.start + len(some.rows))
                found[data, some.outputs] = of_rows(some.rows.to(like), some.columns)
        except NotLayered:
            return None
        parts = zip(found.split(counts, dim=1), shapes, strict=True)
        return [part.reshape(shape) for part, shape in parts]

    def _dense_scales(self, of_rows: RowScales, like: Tensor) -> list[Tensor]:
        """The scales (M, c) of every site, from whole rows of J, block by block."""
        if len(self.outputs.shapes) == 1:
            groups = _few_joined(self._blocks())
            return [_cat([of_rows(rows.to(like)) for rows in groups])]
        num_sites = len(self.outputs.shapes)
        return joined_rows(self._blocks(), num_sites, lambda j: of_rows(j.to(like)))

    def _zeros(self, like: Tensor) -> Iterator[Tensor]:
        count, width = self.outputs.num_data, len(self.names)
        rows = max(1, _FEW_ROWS // width)
        for first in range(0, count, rows):
            yield like.new_zeros(min(rows, count - first), width, self.outputs.size)

    def holding_rows(self, like: Tensor) -> LinearizedOutputs:
        """The same, with the rows of J kept: N C S numbers in the dtype of ``like``."""
        return replace(self, held=tuple(self.rows(like)))

    def _by_datum(self, index: int, rows: Tensor) -> Tensor:
        """Regroups a site's (M, c, ...) to (N, C, ...), parameter by parameter."""
        site, num_data = self.sites[index], self.outputs.num_data
        # (M, c, ...) -> (N, M / N, c, ...) -> (N, C, ...)
        grouped = rows.unflatten(0, (-1, site.num_elements // num_data))
        widths = site.widths(self.subnet_call.moved[site.name])
        return _cat([part.flatten(1, 2) for part in grouped.split(widths, dim=2)], 1)

    def _blocks(self) -> Blocks:
        outputs, factors = self.outputs, identity_factors(self.outputs)
        if self.follows_inputs:
            return differentiable_blocks(outputs, factors, DEFAULT_BUDGET)
        return jacobian_blocks(outputs, factors, DEFAULT_BUDGET, run=self.run)


def _are_few(outputs: OutputMap) -> bool:
    """Whether a backward pass for each output costs less than another run."""
    count = sum(elements * width for elements, width in outputs.shapes)
    return (
        count <= _SERVED_ROWS
        and count * outputs.num_touched <= _SERVED_NUMBERS
        and outputs.activation_bytes <= _SERVED_BYTES
    )


def _moved(call: ModelCall, subnet: Subnet, graph: Graph) -> tuple[SubnetCall, bool]:
    """The call over a subnet, and whether that moves any output of it."""
    found = SubnetCall.of(call, subnet, graph)
    if any(found.moved.values()):
        return found, True
    # As of an expert that none of the inputs enters: the MAP is certain there.
    return found.of_network(graph), False


def wants_gradients(args: Any, kwargs: Any) -> bool:
    """Whether a tensor among the arguments of a call requires gradients."""
    leaves = tree_leaves((args, dict(kwargs)))
    return any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves)


def _few_joined(blocks: Blocks) -> Iterator[Tensor]:
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


def _cat(parts: list[Tensor], dim: int = 0) -> Tensor:
    """Joins tensors; a single one, which may be large, is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)


def _check_axis(subnet_call: SubnetCall) -> None:
    moved, sites = subnet_call.moved, subnet_call.call.sites
    if not any(moved.values()):
        raise ModelError(
            "A latent site must move a parameter of an observed site; got sites "
            f"{list(moved)} that none reaches. Check the model."
        )
    lengths = {site.name: site.leading for site in sites}
    if len(set(lengths.values())) > 1:
        raise ModelError(
            "Observed sites must share one data axis for a joint Gaussian over their "
            f"outputs; got lengths {lengths}. Sample `linearized_model` instead."
        )
