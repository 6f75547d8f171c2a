r"""Kronecker factors of the likelihood's curvature, one pair a weight matrix.

A matrix W that maps inputs a to outputs enters the curvature as
:math:`\sum_n \sum_{tu} a_{nt} a_{nu}^\top \otimes \delta_{nt}^\top \delta_{nu}`, with
:math:`\delta_{nt}` the gradients of the rows of :math:`\sqrt{w_n} R_n \eta_n` at the
layer's output, and positions t and u at which data point n uses W: one for a plain
layer, many for a convolution, an axis of time, or a layer that is called several times.
It is approximated as in KFAC's form "expand", which counts positions as further data:

.. math:: G_W \approx A \otimes B,\qquad
    A = \frac{\sum_{nt} w_n\, a_{nt} a_{nt}^\top}{\sum_{nt} w_n},\qquad
    B = \sum_{nt} \delta_{nt}^\top \delta_{nt}

It is exact for one data point at one position, and where inputs and output gradients
are unrelated. A layer's bias has :math:`a = 1`, so its block is B alone: exact at one
position. A vector that is added by a sum of its own, as in ``x @ w + b``, has its exact
block, whatever its positions. All other elements have their exact diagonal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from pyro_subnet.curvature.density_term import DensityTerm
from pyro_subnet.curvature.jacobian.output_map import Factors, OutputMap
from pyro_subnet.curvature.jacobian.route import squared_columns
from pyro_subnet.curvature.jacobian.structured.grids import (
    FactoredUse,
    factored_uses,
    same_positions,
)
from pyro_subnet.curvature.jacobian.structured.recording import (
    NotLayered,
    Recording,
    not_layered_on_errors,
    recordings,
)
from pyro_subnet.curvature.jacobian.structured.squares import (
    SquaredColumns,
    checked_gradients,
    group_size,
)
from pyro_subnet.curvature.kronecker_factors import (
    KroneckerBlock,
    KroneckerFactors,
    changed,
)
from pyro_subnet.curvature.prior import PriorPrecision, prior_diagonal
from pyro_subnet.curvature.sums import CurvatureSum, Summed
from pyro_subnet.exceptions import (
    CheckpointError,
    MemoryLimitError,
    ModelError,
    NoKroneckerFactorsWarning,
    OptionError,
    warn,
)
from pyro_subnet.options import FormName, HeldAs
from pyro_subnet.subnet import Subnet
from pyro_subnet.tensors.memory import available_bytes
from pyro_subnet.tensors.modes import at_least_float32
from pyro_subnet.tensors.ranks import Ranks, first_with
from pyro_subnet.tensors.stored import check_stored


@final
class KroneckerSum(CurvatureSum):
    """Kronecker factors over all D elements, and the diagonal of the rest.

    Batches may be of any size: their sums are those of one call on all data.
    """

    form: FormName = "kronecker"

    def __init__(self, size: int, like: Tensor):
        self.diagonal = torch.zeros(size, dtype=torch.float64, device=like.device)
        # Why the model does not fit the structured route; None if it does.
        self.reason: str | None = None
        self._dtype = at_least_float32(like.dtype)
        self._blocks: list[_Sums] | None = None

    def read_prior(
        self,
        terms: Sequence[DensityTerm],
        leaves: Mapping[str, Tensor],
        subnet: Subnet,
        budget: int,
    ) -> PriorPrecision:
        """See :meth:`CurvatureSum.read_prior`; coupling of elements is left out."""
        return PriorPrecision.of_diagonal(prior_diagonal(terms, leaves, budget))

    def add(
        self, outputs: OutputMap, factors: Factors, weights: Tensor, budget: int
    ) -> None:
        """See :meth:`CurvatureSum.add`."""
        # Costs the forward pass, a backward pass for every row of R, and T (r P^2 +
        # Q^2) products a data point for each P x Q matrix that is used at T positions.
        with torch.no_grad():
            before = self.diagonal.clone()
            try:
                self._add_groups(outputs, factors, weights, budget)
            except NotLayered as error:
                if self._blocks:
                    raise ModelError(changed(str(error))) from error
                self._blocks, self.reason = [], str(error)
                self.diagonal = before + squared_columns(outputs, factors, budget)

    def add_terms(
        self,
        terms: Sequence[DensityTerm],
        leaves: Mapping[str, Tensor],
        subnet: Subnet,
        budget: int,
    ) -> None:
        """See :meth:`CurvatureSum.add_terms`: no factors hold it."""
        raise OptionError(
            "Kronecker factors must have observed sites alone for data; got "
            f"`pyro.factor` site {terms[0].site!r} in the data's plate. Pass "
            "`covariance='full'`, or observe the data by a distribution."
        )

    def join(self, ranks: Ranks) -> None:
        """See :meth:`CurvatureSum.join`."""
        seen = ranks.gathered(None if self._blocks is None else len(self._blocks))
        reasons = ranks.gathered(self.reason)
        counts = {count for count in seen if count is not None}
        if len(counts) > 1:
            raise ModelError(changed(f"blocks on the ranks: {seen}"))
        self.reason = reasons[first_with(reasons)]
        ranks.sum_(self.diagonal)
        if not counts:
            return
        source, device = first_with(seen), self.diagonal.device
        first = ranks.shared(tuple(self._blocks or ()), source, device)
        if self._blocks is None:  # a rank without data
            self._blocks = [sums.zeros() for sums in first]
        differ = [
            own.site
            for own, other in zip(self._blocks, first, strict=True)
            if not same_positions(own.positions, other.positions)
        ]
        for sites in ranks.gathered(differ):
            if sites:
                raise ModelError(changed(f"site {sites[0]!r} in other layers"))
        for sums in self._blocks:
            ranks.sum_(sums.output, sums.input, sums.weight)

    def finish(self, scale: float) -> Summed:
        """See :meth:`CurvatureSum.finish`; warns if there are no factors at all."""
        blocks = tuple(sums.block(scale) for sums in self._blocks or [])
        found = KroneckerFactors(blocks, self.diagonal * scale)
        is_zero = not bool((found.ggn_diagonal() != 0).any())
        if not blocks and self._blocks is not None:
            warn(
                "Kronecker factors need weights that enter layers, data on their first "
                f"axis and uncoupled; got none ({self.reason or 'no such weight'}), so "
                f"all {len(self.diagonal)} elements have their diagonal alone. Check "
                "with `.eval()` and `F.linear`-like layers, or choose another "
                "covariance.",
                NoKroneckerFactorsWarning,
            )
        return Summed("kronecker", found, is_zero)

    def tensors(self) -> dict[str, Tensor]:
        """See :meth:`CurvatureSum.tensors`."""
        reason = (self.reason or "").encode()
        found = {
            "diagonal": self.diagonal,
            "is_empty": torch.tensor(self._blocks is None),
            "reason": torch.tensor(list(reason), dtype=torch.uint8),
        }
        for i, sums in enumerate(self._blocks or []):
            for part in _PARTS:
                found[f"{i}/{sums.site}/{part}"] = getattr(sums, part)
        return found

    def restore(self, form: HeldAs, tensors: Mapping[str, Tensor]) -> None:
        """See :meth:`CurvatureSum.restore`."""
        self._check_stored(tensors)
        device = self.diagonal.device
        self.diagonal = tensors["diagonal"].to(device)
        self.reason = bytes(tensors["reason"].tolist()).decode() or None
        parts: dict[int, dict[str, Any]] = {}
        for name, tensor in tensors.items():
            number, _, rest = name.partition("/")
            if number.isdecimal():
                site, _, part = rest.rpartition("/")
                own = parts.setdefault(int(number), {"site": site})
                own[part] = tensor.to(device)
        if not bool(tensors["is_empty"]):
            self._blocks = [_Sums(**parts[i]) for i in sorted(parts)]

    def _check_stored(self, tensors: Mapping[str, Tensor]) -> None:
        # Blocks are numbered from 0 on, and each names its site.
        heads = {name.rpartition("/")[0] for name in tensors if "/" in name}
        numbers = sorted(
            int(n) for head in heads if (n := head.partition("/")[0]).isdecimal()
        )
        size = len(self.diagonal)
        axes = {"diagonal": ("D",), "is_empty": (), "reason": ("r",)}
        types = {
            "is_empty": torch.bool,
            "reason": torch.uint8,
            "diagonal": torch.float64,
        }
        for head in heads:
            for part, letters in _PARTS.items():
                axes[f"{head}/{part}"] = tuple(head + letter for letter in letters)
                whole = part == "positions"
                types[f"{head}/{part}"] = torch.int64 if whole else self._dtype
        check_stored(tensors, axes, types, {"D": size})
        places = [tensors[f"{head}/positions"] for head in heads]
        inside = all(bool(((at >= 0) & (at < size)).all()) for at in places)
        if numbers != list(range(len(heads))) or not inside:
            raise CheckpointError(
                "The file's Kronecker blocks must be numbered from 0 on, with "
                f"positions in [0, {size}); got others. Take another copy of it."
            )

    @not_layered_on_errors()
    def _add_groups(
        self, outputs: OutputMap, factors: Factors, weights: Tensor, budget: int
    ) -> None:
        group = group_size(outputs, budget)
        for start, recording, sliced in recordings(outputs, factors, group):
            part = recording.outputs
            own = weights[start : start + part.num_data]
            found = _of_recording(recording, sliced, own, self.diagonal, self._dtype)
            self._include(found)
            if recording.tape.escaped:
                rest = part.over(recording.tape.escaped)
                place = recording.escaped_columns()
                self.diagonal[place] += squared_columns(rest, sliced, budget)

    def _include(self, found: list[_Sums]) -> None:
        if self._blocks is None:
            self._blocks = found
            return
        if len(self._blocks) != len(found):
            counts = f"{len(self._blocks)} blocks, then {len(found)}"
            raise ModelError(changed(counts))
        for sums, more in zip(self._blocks, found, strict=True):
            if not same_positions(sums.positions, more.positions):
                raise ModelError(changed(f"site {more.site!r} in other layers"))
            sums.add_(more)


# Tensors of the sums of a block, and their axes.
_PARTS = {"positions": "pq", "output": "pp", "input": "qq", "weight": ""}


@final
@dataclass(eq=False)
class _Sums:
    """Sums over data and positions, from which the factors of a block are made."""

    site: str
    positions: Tensor
    output: Tensor
    input: Tensor
    weight: Tensor

    def add_(self, other: _Sums) -> None:
        self.output += other.output
        self.input += other.input
        self.weight += other.weight

    def zeros(self) -> _Sums:
        """The same block, of no data."""
        parts = (torch.zeros_like(x) for x in (self.output, self.input, self.weight))
        return _Sums(self.site, self.positions, *parts)

    def block(self, scale: float) -> KroneckerBlock:
        # Without any weight all sums are 0, and stay so.
        mean = self.input / self.weight.where(self.weight > 0, 1.0)
        return KroneckerBlock(
            self.site, self.positions, self.output * scale, mean, self.weight * scale
        )


def _of_recording(
    recording: Recording,
    factors: Factors,
    weights: Tensor,
    diagonal: Tensor,
    dtype: torch.dtype,
) -> list[_Sums]:
    """Sums of a group's data; the diagonal of the rest is added in place."""
    num_data = recording.outputs.num_data
    columns = recording.columns()
    blocks, rest = factored_uses(columns, num_data)
    squares = SquaredColumns(rest, recording.outputs)
    uses = [use for block in blocks for use in block]
    _check_fits(uses, dtype)
    heights = [len(use.rows) for use in uses]
    outputs = [diagonal.new_zeros(p, p, dtype=dtype) for p in heights]
    for deltas in checked_gradients(recording, columns, factors):
        squares.add(diagonal, deltas)
        for output, use in zip(outputs, uses, strict=True):
            delta = deltas[use.column.edge]
            if delta is not None:
                # B += sum_nt delta_nt^T delta_nt, with data and positions on one axis
                side = use.left(delta).to(dtype).transpose(0, 1).flatten(1)
                output.addmm_(side, side.mT)
    squares.finish(diagonal)
    of_use, found = iter(outputs), list[_Sums]()
    for block in blocks:
        parts = [_use_sums(use, next(of_use), weights, dtype) for use in block]
        for part in parts[1:]:
            parts[0].add_(part)
        found.append(parts[0])
    return found


def _check_fits(uses: Sequence[FactoredUse], dtype: torch.dtype) -> None:
    """Refuses factors that cannot be held, before any is made."""
    sizes = [(sum(n**2 for n in use.positions.shape), use) for use in uses]
    # The sums, and what is added to them.
    needed = 2 * sum(size for size, _ in sizes) * torch.finfo(dtype).bits // 8
    if not sizes or needed <= (free := available_bytes(uses[0].positions.device)):
        return
    largest = max(sizes, key=lambda pair: pair[0])[1]
    raise MemoryLimitError(
        f"Kronecker factors must fit in memory; got factors of sizes "
        f"{tuple(largest.positions.shape)} at site {largest.column.site!r} and others, "
        f"which need {needed / 2**30:.1f} GiB ({needed} bytes) where "
        f"{free / 2**30:.1f} GiB ({free} bytes) are free. Choose a diagonal covariance "
        "or a subnet."
    )


def _use_sums(
    use: FactoredUse, output: Tensor, weights: Tensor, dtype: torch.dtype
) -> _Sums:
    """The sums of one use: its A before the division by the weights, and its B."""
    num_data, num_right, num_positions = use.right.shape
    side = use.right.new_empty(num_right, num_data, num_positions, dtype=dtype)
    # sum_nt w_n a_nt a_nt^T, from the sides sqrt(w_n) a_nt
    root = weights.sqrt().to(dtype)[:, None]
    torch.mul(use.right.transpose(0, 1), root, out=side)
    side, masked = side.flatten(1), weights == 0
    if bool(masked.any()):  # weight 0 counts for nothing, even where a is not finite
        side.view(num_right, num_data, -1)[:, masked] = 0.0
    return _Sums(
        use.column.site,
        use.positions,
        output[use.rows][:, use.rows],
        (side @ side.mT)[use.columns][:, use.columns],
        weights.sum().to(dtype) * num_positions,
    )
