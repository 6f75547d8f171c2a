"""Plates: how long they are, and how many data points a call shows in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, final, no_type_check

import torch
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from pyro.poutine.util import site_is_subsample

from pyro_subnet.exceptions import DataError

# Sites that an error lists one by one.
_FEW = 5
Node = Mapping[str, Any]


@final
class WidePlates(Messenger):
    """Lets a plate that subsamples show more data than its size says.

    New inputs may be more than the data whose number a model holds: Pyro draws no
    subsample that long, and refuses the shorter one. Each counts once.
    """

    # Called for each site of each run: checks at run time would take longer.
    @no_type_check
    def _pyro_sample(self, msg: Message) -> None:
        fn: Any = msg["fn"]
        if not site_is_subsample(msg):
            for frame in msg["cond_indep_stack"]:
                if frame.size > (frame.full_size or 0) > 0:
                    msg["scale"] = msg["scale"] * frame.size / frame.full_size
        elif msg["value"] is None and (fn.subsample_size or 0) > fn.size:
            msg["value"] = torch.arange(fn.subsample_size, device=fn.device)


@final
class PlatesAround(Messenger):
    """Remembers the plates around the one site that is drawn inside it."""

    stack: tuple[CondIndepStackFrame, ...] = ()

    @property
    def depth(self) -> int:
        """How many batch dimensions the plates take."""
        return max((-frame.dim for frame in self.stack if frame.vectorized), default=0)

    def _pyro_post_sample(self, msg: Message) -> None:
        self.stack = msg["cond_indep_stack"]


def plate_length(node: Node, frame: CondIndepStackFrame) -> int:
    """Data points that a plate shows at a site; one without a size takes the site's."""
    if frame.size >= 0 or frame.dim is None:
        return int(frame.size)
    shape = node["fn"].batch_shape
    return int(shape[frame.dim]) if -frame.dim <= len(shape) else 1


def plate_scale(node: Node) -> float:
    """N/B, multiplied over the subsampling plates of a site; 1.0 without any."""
    scale = 1.0
    for frame in node["cond_indep_stack"]:
        if (frame.full_size or 0) > frame.size > 0:
            scale *= frame.full_size / frame.size
    return float(scale)


def num_shown(node: Node, rows: int | None) -> int | None:
    """Number of data points that a site's plates show; None if they do not tell.

    Args:
        node: The site's node.
        rows: Length of the first axis of the call's first tensor, if there is one.

    Returns:
        The number, or None.
    """
    lengths = {plate_length(node, frame) for frame in node["cond_indep_stack"]}
    # Of several plates the one over the data is as long as ``rows``.
    if len(lengths) > 1:
        lengths = {length for length in lengths if length == rows}
    return lengths.pop() if len(lengths) == 1 else None


def num_seen(
    counts: Mapping[str, int | None], nodes: Sequence[Node], rows: int | None
) -> int:
    """Number of data points that a call shows at its observed sites.

    Args:
        counts: That of each site by itself; None if its plates do not tell.
        nodes: Their nodes.
        rows: Length of the first axis of the call's first tensor, if there is one.

    Returns:
        The number.

    Raises:
        DataError: If the sites leave it open.
    """
    lengths = set(counts.values())
    seen = lengths.pop() if len(lengths) == 1 else None
    names = [{frame.name for frame in node["cond_indep_stack"]} for node in nodes]
    # Sites of one length may be parts of the data, too, not outputs of each row.
    apart = len(nodes) > 1 and not set.intersection(*names) and rows is not None
    if seen is None or (apart and seen != rows):
        shown = counts if len(counts) <= _FEW else f"{len(counts)} sites"
        raise DataError(
            f"`num_data` needs observed sites of one length; got {shown} (None: no "
            "plate stands out as the one over the data), and first arguments of "
            f"length {rows}. Put each observation in one plate that all sites share, "
            "or leave `num_data` out and pass all data."
        )
    return seen
