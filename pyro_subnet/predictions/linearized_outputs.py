"""The linearized outputs of one call of a model: values and Jacobian rows, by datum."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from pyro_subnet.curvature.jacobian.output_map import (
    Blocks,
    OutputMap,
    identity_factors,
)
from pyro_subnet.curvature.jacobian.route import differentiable_blocks, jacobian_blocks
from pyro_subnet.exceptions import ModelError
from pyro_subnet.gaussians.factored import Gaussian
from pyro_subnet.subnet import Subnet
from pyro_subnet.tensors.memory import DEFAULT_BUDGET
from pyro_subnet.tracing.call import ModelCall, MovedParts
from pyro_subnet.tracing.output_site import OutputSite
from pyro_subnet.tracing.trace import Node, preserved_rng

# Blocks of fewer rows are put together before they are solved for: a solve reads the
# whole factor, which at large S takes longer than the operations of a few rows.
_FEW_ROWS = 512


@dataclass(frozen=True, eq=False)
class LinearizedOutputs:
    r"""Values :math:`\eta(x; \hat\theta)` of one call, and the map they come from.

    Attributes:
        call: The call of the model.
        moved: The parameters of each output site that the subnet moves.
        outputs: Those parameters as a function of the subnet.
        gaussian: The posterior over the subnet.
        nodes: The observed sites of a run at the MAP; with a graph to the inputs where
            those want gradients.
        follows_inputs: Whether everything carries gradients to the inputs.
        held: Rows of J by datum, kept for other Gaussians; None to make them anew.
    """

    call: ModelCall
    moved: MovedParts
    outputs: OutputMap
    gaussian: Gaussian
    nodes: Mapping[str, Node]
    follows_inputs: bool
    held: tuple[Tensor, ...] | None = None

    @classmethod
    def read(
        cls, call: ModelCall, subnet: Subnet, gaussian: Gaussian
    ) -> LinearizedOutputs:
        """Finds out what a subnet moves.

        Args:
            call: The call of the model.
            subnet: The chosen elements.
            gaussian: The posterior over them.

        Returns:
            The outputs. Where gradients are on and a tensor of the call wants them,
            everything read from these carries them.

        Raises:
            ModelError: If no output parameter moves, or there is no common data axis.
        """
        graph = call.graph(with_prior=False)
        moved, activations = call.moved_parts(graph, subnet), graph.activation_bytes
        del graph
        _check_axis(call, moved)
        follows = torch.is_grad_enabled() and wants_gradients(call.args, call.kwargs)
        nodes = call.trace.nodes
        if follows:
            with preserved_rng():
                nodes = call.run(call.latents.values).nodes
        outputs = call.output_map(subnet, moved, activations)
        return cls(call, moved, outputs, gaussian, nodes, follows)

    @property
    def sites(self) -> list[OutputSite]:
        """The sites that the subnet moves, in trace order."""
        return [site for site in self.call.sites if self.moved[site.name]]

    def loc(self) -> Tensor:
        r""":math:`\eta(x; \hat\theta)`, shape (N, C), in the posterior's dtype."""
        values = self.outputs.reference
        if self.follows_inputs:
            values = self.outputs.outputs(self.outputs.loc)
        found = [self.by_datum(index, value) for index, value in enumerate(values)]
        return torch.cat(found, dim=-1).to(self.gaussian.loc)

    def rows(self) -> Iterator[Tensor]:
        """Rows of J by datum, (data, C, S), in groups of data.

        Yields:
            The groups, in order, in the posterior's dtype.
        """
        if self.held is not None:
            yield from self.held
            return
        like = self.gaussian.loc
        one_element_a_datum = self.outputs.shapes[0][0] == self.call.num_data
        if len(self.outputs.shapes) == 1 and one_element_a_datum:
            for rows in _joined(self._blocks()):
                yield self.by_datum(0, rows.to(like))
            return
        parts: list[list[Tensor]] = [[] for _ in self.outputs.shapes]
        for block in self._blocks():
            parts[block.site].append(block.rows.to(like))
        yield torch.cat(
            [self.by_datum(site, _cat(rows)) for site, rows in enumerate(parts)], dim=1
        )

    def holding_rows(self) -> LinearizedOutputs:
        """The same, with the rows of J kept: N x C x S numbers.

        Returns:
            The outputs.
        """
        return replace(self, held=tuple(self.rows()))

    def with_gaussian(self, gaussian: Gaussian) -> LinearizedOutputs:
        """The same outputs under another posterior over the same subnet.

        Args:
            gaussian: The posterior.

        Returns:
            The outputs.
        """
        return replace(self, gaussian=gaussian)

    def whitened(self) -> Iterator[Tensor]:
        r"""Rows :math:`L^{-1} j` by datum, (data, C, S), in groups of data.

        Yields:
            The groups, in order.
        """
        for rows in self.rows():
            yield self.gaussian.whiten(rows)

    def by_datum(self, index: int, rows: Tensor) -> Tensor:
        """Regroups a site's rows by datum, parameter by parameter.

        Args:
            index: Which of :attr:`sites`.
            rows: Shape (M, c, ...), element by element.

        Returns:
            Shape (N, C, ...).
        """
        site = self.sites[index]
        grouped = rows.unflatten(0, (-1, site.num_elements // self.call.num_data))
        widths = site.widths(self.moved[site.name])
        return _cat([part.flatten(1, 2) for part in grouped.split(widths, dim=2)], 1)

    def _blocks(self) -> Blocks:
        blocks = differentiable_blocks if self.follows_inputs else jacobian_blocks
        return blocks(self.outputs, identity_factors(self.outputs), DEFAULT_BUDGET)


def of_site(call: ModelCall, name: str | None) -> ModelCall:
    """A call with one observed site alone.

    Args:
        call: The call.
        name: The site; None for the only one.

    Returns:
        The call, its other observed sites left out.

    Raises:
        ModelError: If there is no such site, or several to choose from.
    """
    names = [site.name for site in call.sites]
    if name is None and len(names) != 1:
        raise ModelError(
            "A predictive distribution is over one observed site; got a model that "
            f"has {len(names)}: {names}. Name one with `site=`."
        )
    chosen = tuple(site for site in call.sites if name in {None, site.name})
    if not chosen:
        raise ModelError(
            f"`site` must name an observed site, of which the model has {names}; got "
            f"{name!r}. Pass one of these."
        )
    return replace(call, sites=chosen)


def wants_gradients(args: Any, kwargs: Any) -> bool:
    """Whether a tensor among the arguments of a call requires gradients.

    Args:
        args: Positional arguments.
        kwargs: Keyword arguments.

    Returns:
        True if one does.
    """
    leaves = tree_leaves((args, dict(kwargs)))
    return any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves)


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
