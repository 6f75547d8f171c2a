"""One run of a model: what its layers read, and the gradients of their outputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_subnet.curvature.jacobian.output_map import Factors, OutputMap, factors_of
from pyro_subnet.curvature.jacobian.plain import at_chosen, plain_gradient
from pyro_subnet.curvature.jacobian.structured.composite import COMPOSITES
from pyro_subnet.curvature.jacobian.structured.convolution import CONVOLUTIONS
from pyro_subnet.curvature.jacobian.structured.layers import LAYERS, REARRANGEMENTS
from pyro_subnet.curvature.jacobian.structured.tape import Affine, Entries, Tape, Use
from pyro_subnet.exceptions import SubnetError
from pyro_subnet.tensors.agreement import agree, random_direction
from pyro_subnet.tensors.modes import differentiable
from pyro_subnet.tensors.pullback import weighted_sum

_RULES = {**LAYERS, **CONVOLUTIONS}
# How many data are differentiated together and apart. Odd, so that a pattern over the
# data whose period is a power of two does not end where it began.
_FEW = 7
COUPLED = "the layers couple data, or have them on another axis than the first"
# Below this many bytes of activations a backward pass mostly takes the time of its
# calls, so that more than a few rows share one. (Of few, the import that torch's
# batched passes begin with takes longer: see `weighted_sum`.)
_BATCHED_BYTES, _FEW_ROWS = 2**21, 16

# One tensor for every recorded edge; None where no output depends on it.
Gradients = Sequence[Tensor | None]


class NotLayered(Exception):
    """Raised when a model does not fit this route; then another one is taken."""


@contextmanager
def not_layered_on_errors() -> Iterator[None]:
    """Turns errors of torch and of the user's code, on this route, into NotLayered."""
    # The plainest route meets the same error if it is the model's own.
    try:
        yield
    except (NotLayered, SubnetError):
        raise
    except Exception as error:
        kind = type(error).__name__
        raise NotLayered(f"the layers cannot be taken apart: {kind}") from error


@final
@dataclass(frozen=True, eq=False)
class Column:
    """A use of a weight, and the columns of J that it adds to."""

    site: str
    edge: int  # index of the layer's output among the recording's edges
    entries: Entries
    columns: Tensor | slice
    first: bool  # whether these are all columns of the site, with none written before
    affine: Affine | None


@final
class Recording:
    """A run of an output map, ``whole`` if on all data, and what its layers read."""

    def __init__(self, outputs: OutputMap, *, whole: bool):
        self.outputs = outputs
        self._serial = False
        self.leaves = {
            site: value.detach().requires_grad_()
            for site, value in outputs.base.items()
        }
        self.tape = Tape(self.leaves, _RULES, REARRANGEMENTS, COMPOSITES)
        try:
            with differentiable(), self.tape:
                self.values = outputs.of_sites(self.leaves, None)
        except Exception as error:
            if whole:  # the model ran before, so this is not its fault
                raise
            # On fewer data a model may fail on a fixed plate size or a view.
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
            # Axis 0 must be the data's, or data times positions.
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
        """Uses of the weights that hold a chosen element, with their entries."""
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
        if use.weight.rearranged is None:
            at, columns = within, torch.arange(len(within), device=within.device)
        else:
            index = use.weight.rearranged.flatten()
            size = self.outputs.base[use.weight.site].numel()
            # The chosen element at each place that the layer sees, -1 for no element.
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
        """Yields the gradients of all layers' outputs, cotangent by cotangent."""
        value = self.values[site]
        small = self.outputs.activation_bytes * len(cotangents) <= _BATCHED_BYTES
        if small and len(cotangents) > _FEW_ROWS and not self._serial:
            try:
                batched = self._pull_all(value, cotangents)
            except RuntimeError:  # an operation has no batching rule
                self._serial = True
            else:
                for k in range(len(cotangents)):
                    yield [None if part is None else part[k] for part in batched]
                return
        for cotangent in cotangents:
            yield self._pull(value, cotangent)

    def gradients_of(self, cotangents: Sequence[Tensor]) -> Gradients:
        """The gradients of all layers' outputs, for a cotangent of each site."""
        live = self._live(cotangents)
        if not live:
            return [None] * len(self.edges)
        return torch.autograd.grad(
            weighted_sum(*zip(*live, strict=True)),
            self.edges,
            retain_graph=True,
            allow_unused=True,
        )

    def weight_gradient(self, cotangents: Sequence[Tensor]) -> Tensor:
        """Autograd's gradient at the elements served, for a cotangent of each site."""
        # It frees the run's activations, so it comes last.
        live = self._live(cotangents)
        sites = self.layered_sites
        if not live:
            sizes = [self.outputs.chosen[site].numel() for site in sites]
            return self.outputs.loc.new_zeros(sum(sizes))
        gradients = torch.autograd.grad(
            weighted_sum(*zip(*live, strict=True)),
            [self.leaves[site] for site in sites],
            materialize_grads=True,
        )
        by_site = dict(zip(sites, gradients, strict=True))
        return at_chosen(by_site, self.outputs.chosen)

    def of_layered(self, columns: Float[Tensor, " subnet"]) -> Tensor:
        """Of all columns' numbers, those of the elements served."""
        sizes = [at.numel() for at in self.outputs.chosen.values()]
        pieces = zip(self.outputs.chosen, columns.split(sizes), strict=True)
        served = set(self.layered_sites)
        return torch.cat([piece for site, piece in pieces if site in served])

    def _live(self, cotangents: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Sites' values that have a graph, with their cotangents."""
        pairs = zip(self.values, cotangents, strict=True)
        return [(value, u.to(value)) for value, u in pairs if value.requires_grad]

    def _pull(self, value: Tensor, cotangent: Tensor) -> Gradients:
        if not value.requires_grad:
            return [None] * len(self.edges)
        total = weighted_sum([value], [cotangent.to(value)])
        return torch.autograd.grad(
            total, self.edges, retain_graph=True, allow_unused=True
        )

    def _pull_all(self, value: Tensor, cotangents: Tensor) -> Gradients:
        """Gradients of many cotangents by one pass, led by their number."""
        if not value.requires_grad:
            return [None] * len(self.edges)
        return torch.autograd.grad(
            value,
            self.edges,
            cotangents.to(value),
            retain_graph=True,
            allow_unused=True,
            is_grads_batched=True,
        )


def recordings(
    outputs: OutputMap, factors: Factors, group: int
) -> Iterator[tuple[int, Recording, Factors]]:
    """Yields the first data point of each group, the group's run, and its factors."""
    # Parts of the data are differentiated by themselves only if that gives the same.
    num_data = outputs.num_data
    whole = group == num_data
    if not whole:
        _check_separation(outputs)
    for start in range(0, num_data, group):
        stop = min(start + group, num_data)
        recording = Recording(outputs.at(start, stop), whole=whole)
        yield start, recording, factors_of(factors, num_data, start, stop)


def is_separable(outputs: OutputMap) -> bool:
    """Whether some of the data give their part of the outputs' derivatives."""
    if outputs.num_data == 1:
        return False
    try:
        _check_separation(outputs)
    except NotLayered:
        return False
    return True


def _check_separation(outputs: OutputMap) -> None:
    """Compares a few data's gradient, for a random cotangent, with their parts'."""
    # Each route also compares every group with autograd, and a group's values are those
    # of the whole call. What these miss is a derivative that depends on other data, or
    # on a data point's place, where values do not: a term whose gradient is stopped, a
    # row of a constant weight.
    stop = outputs.num_data
    start = max(0, stop - _FEW)
    middle = (start + stop) // 2
    try:
        together = outputs.at(start, stop)
        cotangents = [
            random_direction(value.shape, value) for value in together.reference
        ]
        for first, last in ((start, middle), (middle, stop)):
            inside = slice(first - start, last - start)
            own = [_of_data(u, together.num_data, inside) for u in cotangents]
            alone = plain_gradient(outputs.at(first, last), own)
            among = [torch.zeros_like(u) for u in cotangents]
            for u, part in zip(among, own, strict=True):
                _of_data(u, together.num_data, inside).copy_(part)
            both = plain_gradient(together, among)
            if not agree(alone.unsqueeze(-1), both.unsqueeze(-1)):
                raise NotLayered(COUPLED)
    except NotLayered:
        raise
    # The user's code may fail on fewer data, with any error.
    except Exception as error:
        raise NotLayered("fewer data do not pass the layers") from error


def _of_data(elements: Tensor, num_data: int, which: slice) -> Tensor:
    """Elements of some data, a view."""
    return elements.unflatten(0, (num_data, -1))[which].flatten(0, 1)
