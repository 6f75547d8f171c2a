"""One run of a model, as its layers see it: what they read, and their gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_subnet.curvature.jacobian.output_map import OutputMap, agree
from pyro_subnet.curvature.jacobian.structured.convolution import CONVOLUTIONS
from pyro_subnet.curvature.jacobian.structured.entries import Entries
from pyro_subnet.curvature.jacobian.structured.layers import LAYERS, REARRANGEMENTS
from pyro_subnet.curvature.jacobian.structured.tape import Affine, Tape, Use
from pyro_subnet.tensors.grad_mode import differentiable

_RULES = {**LAYERS, **CONVOLUTIONS}
# Below this many bytes of activations a backward pass is mostly its calls, so several
# rows share one.
_BATCHED_BYTES = 2**21

# One tensor for every recorded edge; None where no output depends on it.
Gradients = Sequence[Tensor | None]


class NotLayered(Exception):
    """Raised when a model does not fit this route; another one serves."""


@dataclass(frozen=True, eq=False)
class Column:
    """A use of a weight, and the columns of J that it adds to.

    Attributes:
        site: Name of the site.
        edge: Index of the layer's output among the recording's.
        entries: From the output's gradient to entries of J.
        columns: Where they belong, (S of this use,).
        first: Whether these are all columns of the site, and none were written before.
        affine: See :class:`~pyro_subnet.curvature.jacobian.structured.tape.Layer`.
    """

    site: str
    edge: int
    entries: Entries
    columns: Tensor | slice
    first: bool
    affine: Affine | None


class Recording:
    """One run of an output map, and what its layers read.

    Args:
        outputs: The map.
        whole: Whether it is that of the whole call.

    Raises:
        NotLayered: If the run differs from the reference, or no chosen site enters
            layers only.
    """

    def __init__(self, outputs: OutputMap, *, whole: bool):
        self.outputs = outputs
        self._serial = False
        self.leaves = {
            site: value.detach().requires_grad_()
            for site, value in outputs.base.items()
        }
        self.tape = Tape(self.leaves, _RULES, REARRANGEMENTS)
        try:
            with differentiable(), self.tape:
                self.values = outputs.of_sites(self.leaves, None)
        except Exception as error:
            if whole:  # it ran before, so this is no fault of the model's
                raise
            # On fewer data it may fail in ways of its own: a fixed plate size, a view.
            raise NotLayered("fewer data do not pass the layers") from error
        self.tape.settle()
        for value, reference in zip(self.values, outputs.reference, strict=True):
            if not agree(value.detach(), reference):
                raise NotLayered("the layers' outputs depend on other data")
        self._check_axes()
        if not self.layered_sites:
            raise NotLayered("no chosen site enters layers alone")
        self.edges = list(dict.fromkeys(use.edge for use in self.tape.uses))

    @property
    def layered_sites(self) -> list[str]:
        """Chosen sites that this route serves."""
        escaped = self.tape.escaped
        return [site for site in self.outputs.chosen if site not in escaped]

    def _check_axes(self) -> None:
        num_data = self.outputs.num_data
        for use in self.tape.uses:
            if not use.shape or use.shape[0] % num_data:
                self.tape.escaped.add(use.weight.site)
        self.tape.settle()

    def escaped_columns(self) -> Tensor:
        """Columns of J of the sites that this route does not serve."""
        counts = [at.numel() for at in self.outputs.chosen.values()]
        flags = torch.tensor(
            [site in self.tape.escaped for site in self.outputs.chosen]
        )
        of_column = flags.repeat_interleave(torch.tensor(counts))
        return of_column.nonzero().squeeze(-1).to(self.outputs.loc.device)

    def columns(self) -> list[Column]:
        """Uses of the weights, with what they need besides output gradients.

        Returns:
            One for every use that holds a chosen element.
        """
        result, start = list[Column](), 0
        for site, within in self.outputs.chosen.items():
            uses = [use for use in self.tape.uses if use.weight.site == site]
            for i, use in enumerate(uses):
                column = self._column(use, within, start, first=i == 0)
                if column is not None:
                    result.append(column)
            start += within.numel()
        return result

    def _column(
        self, use: Use, within: Tensor, start: int, first: bool
    ) -> Column | None:
        if use.weight.as_is:
            at, columns = within, torch.arange(len(within), device=within.device)
        else:
            index = use.weight.index.flatten()
            size = self.outputs.base[use.weight.site].numel()
            where = torch.full((size,), -1, device=index.device)
            where[within] = torch.arange(len(within), device=index.device)
            found = where[index]
            at = (found >= 0).nonzero().squeeze(-1)
            columns = found[at]
        if not at.numel():
            return None
        entries = use.entries(at, self.outputs.num_data)
        whole = columns.numel() == within.numel() and bool(
            (columns[1:] > columns[:-1]).all()
        )
        place = slice(start, start + len(within)) if whole else start + columns
        edge = self.edges.index(use.edge)
        return Column(
            use.weight.site, edge, entries, place, first and whole, use.affine
        )

    def gradients(self, site: int, cotangents: Tensor) -> Iterator[Gradients]:
        """Gradients of all layers' outputs, row by row.

        Args:
            site: Index of the observed site.
            cotangents: Rows of cotangents of its outputs, (K, M, c).

        Yields:
            K times one tensor for every edge; None where no output depends on it.
        """
        value = self.values[site]
        small = self.outputs.activation_bytes * len(cotangents) <= _BATCHED_BYTES
        if small and len(cotangents) > 1 and not self._serial:
            try:
                batched = self._pull(value, cotangents, is_grads_batched=True)
            except RuntimeError:  # what has no batching rule
                self._serial = True
            else:
                for k in range(len(cotangents)):
                    yield [None if part is None else part[k] for part in batched]
                return
        for cotangent in cotangents:
            yield self._pull(value, cotangent)

    def _pull(self, value: Tensor, cotangent: Tensor, **options: bool) -> Gradients:
        if not value.requires_grad:
            return [None] * len(self.edges)
        return torch.autograd.grad(
            value,
            self.edges,
            cotangent.to(value),
            retain_graph=True,
            allow_unused=True,
            **options,
        )
