"""How often a pass counts its data, by what plates and scales say of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, final

from torch import Tensor

from pyro_subnet.exceptions import DataError
from pyro_subnet.tracing.call import ModelCall
from pyro_subnet.tracing.data import Data
from pyro_subnet.tracing.loader import loader_doubts
from pyro_subnet.tracing.plates import plate_length, plate_scale

# What ranks tell each other.
_COUNTED = ("_sizes", "_shown", "_partly", "_scaled", "_subsamples", "_is_whole")


@final
class DataCounts:
    """What the calls of one pass show of the plates' data, and at what scales."""

    def __init__(self, data: Data):
        self._data = data
        self._calls = 0
        self._sizes: dict[str, int] = {}  # of plates, as they say
        self._shown: dict[str, int] = {}
        self._partly: set[str] = set()  # plates that some call shows a part of
        self._scaled: dict[str, list[tuple[float, int]]] = {}
        self._subsamples: str | None = None
        self._is_whole = True

    def add(self, call: ModelCall) -> None:
        """Counts one call.

        Raises:
            DataError: If a plate has shown more data than it holds.
        """
        self._calls += 1
        if self._calls == 1:
            self._subsamples = call.own_subsample()
        nodes = {site.name: site.node for site in call.sites} | dict(call.factors)
        frames = {
            frame.name: (frame, node)
            for node in nodes.values()
            for frame in node["cond_indep_stack"]
        }
        for name, (frame, node) in frames.items():
            length, size = plate_length(node, frame), frame.full_size or frame.size
            if self._sizes.setdefault(name, size) != size:
                self._sizes[name] = 0  # as long as each batch
            if length != size:
                self._partly.add(name)
            self._shown[name] = self._shown.get(name, 0) + length
            self._check_size(name)
        shown = call.shown(None)
        for name, node in nodes.items():
            scale, seen = node["scale"], shown[name]
            if isinstance(scale, Tensor):  # with an axis it weighs each observation
                scale = math.nan if scale.ndim else float(scale)
            own = scale / plate_scale(node)
            self._scaled.setdefault(name, []).append((own, seen or 0))

    def state(self) -> dict[str, Any]:
        """All that was counted, for :meth:`join`."""
        return {name: getattr(self, name) for name in _COUNTED}

    def join(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Counts what all ranks have counted, in their order, in place of its own.

        Raises:
            DataError: If together they have shown more data than a plate holds.
        """
        for name in _COUNTED:
            setattr(self, name, type(getattr(self, name))())
        self._subsamples, self._is_whole = None, True
        for state in states:
            for name, size in state["_sizes"].items():
                if self._sizes.setdefault(name, size) != size:
                    self._sizes[name] = 0  # as long as each batch
            for name, length in state["_shown"].items():
                self._shown[name] = self._shown.get(name, 0) + length
            for name, pairs in state["_scaled"].items():
                self._scaled.setdefault(name, []).extend(pairs)
            self._partly |= state["_partly"]
            self._subsamples = self._subsamples or state["_subsamples"]
            self._is_whole &= state["_is_whole"]
        for name in self._sizes:
            self._check_size(name)

    def resume(self) -> None:
        """Forgets: what was counted before a pass was resumed is not known."""
        self._is_whole = False

    def doubts(self) -> list[str]:
        """Why the sum may count data never, or several times."""
        over_ranks = self._data.ranks is not None
        found = loader_doubts(self._data.batches, self._data.num_data, over_ranks)
        if self._subsamples is not None:
            found.append(
                "The model draws a subsample of its own in every call, in plate "
                f"{self._subsamples!r}: the fit sees that part of the data alone. "
                "Leave `subsample_size` out of the plate, or pass the batches as "
                "arguments."
            )
        if self._is_whole and not self._data.whole and not self._data.added:
            found += [] if found else self._left_out()
        return [*found, *self._scaled_by_hand()]

    def _check_size(self, name: str) -> None:
        size, shown = self._sizes[name], self._shown[name]
        if self._data.added or self._data.num_data is not None:
            return
        if name in self._partly and 0 < size < shown:
            raise DataError(
                f"The size of plate {name!r} must be the number of all data; got "
                f"{size}, and {shown} data so far. Show each observation once, and "
                "pass the plate the number of all data."
            )

    def _left_out(self) -> list[str]:
        return [
            f"The batches show {self._shown[name]} of the {size} data that plate "
            f"{name!r} holds: the sum is over those alone. Pass num_data={size} to "
            "scale it up to all data."
            for name, size in self._sizes.items()
            if name in self._partly
            and size > self._shown[name]
            and self._data.num_data is None
        ]

    def _scaled_by_hand(self) -> list[str]:
        """Scales N/B that a model sets itself, which no sum of batches can tell."""
        found = []
        for name, pairs in self._scaled.items():
            total = sum(seen for _, seen in pairs)
            products = [scale * seen for scale, seen in pairs]
            known = {total, self._data.num_data}
            same = all(math.isclose(p, products[0], rel_tol=1e-5) for p in products)
            sizes = {seen for _, seen in pairs}
            is_all = any(
                n and math.isclose(products[0], n, rel_tol=1e-5) for n in known
            )
            if same and len(pairs) > 1 and (len(sizes) > 1 or is_all):
                if any(scale != 1 for scale, _ in pairs):
                    found.append(
                        f"The scale of site {name!r} seems to be N/B, by "
                        "`poutine.scale`: each observation of the batches counts that "
                        "often. Leave it out of the fit, or scale by `pyro.plate(name, "
                        "N, subsample_size=B)`, which is left out of a sum of batches."
                    )
        return found
