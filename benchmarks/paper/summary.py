"""Where a subnet helps: one table and one picture of all experiments."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.harness.looks import look
from benchmarks.harness.reporting import (
    Cell,
    Estimate,
    Found,
    collected,
    differences,
    estimate,
    legend_below,
    pooled,
    saved,
    shown,
    table,
)
from benchmarks.harness.task import Row
from benchmarks.paper import of_today, toy, uci
from benchmarks.paper.images import published
from benchmarks.paper.images.case import (
    BY_EVIDENCE,
    CURVE,
    ON_SHIFT,
    OWN_PRIOR,
    at_temperature,
)
from benchmarks.paper.images.methods import DEFAULT
from benchmarks.paper.images.reporting import Column, by_seed
from benchmarks.paper.toy_report import at
from benchmarks.paper.uci_report import KINDS, cell, sets_of, to_base
from pyro_subnet.plotting.style import INK, Axes, frame, new_row

Rows = Mapping[str, Sequence[Row]]  # of each experiment, by its name
Gain = Callable[[str], Estimate | None]  # of a method, by its name

_COLUMNS = ("default", "by evidence", "last layer", "temperature", "ensemble", "all")
_HEADS = (
    "NLL of",
    "MAP",
    "default",
    "by evidence",
    "last layer",
    "temperature at the default's price, or noise on held-out data",
    "ensemble of five",
    "all weights",
)
_TOY = "2x50 tanh"
_PRICES = (-0.02, 0, 0.01, 0.03, 0.1, 0.3)
# Of the picture: what is drawn filled, untuned, and hollow, tuned on turned images.
_UNTUNED = {
    DEFAULT: OWN_PRIOR,
    "subnet LastLayer": OWN_PRIOR,
    "ELLA": OWN_PRIOR,
    "deep ensemble": "",
}
_TUNED = (
    DEFAULT,
    "subnet LargestVariance",
    "subnet LastLayer",
    "ELLA",
    "SWAG",
    "MC dropout",
    "deep ensemble with temperature",
)


class Line(NamedTuple):
    """A line of the table.

    Attributes:
        head: What is predicted.
        base: NLL of the MAP.
        gain: What a method gains on it, nats.
        methods: Which stands in each column.
        one_unit: Whether the base is of one set, so that it says something.
    """

    head: str
    base: Estimate | None
    gain: Gain
    methods: Mapping[str, str]
    one_unit: bool = True


def opening(rows: Rows, folder: Path) -> str:
    """What stands before all tables: this one, rivals of today, published figures."""
    parts = [report(rows, folder), of_today.report(rows), published.report(rows)]
    return "\n\n".join(filter(None, parts))


def report(rows: Rows, folder: Path) -> str:
    """The table and the picture; the latter where there are images."""
    every = (*_toy(rows), *_uci(rows), *_images(rows))
    lines = [line for line in every if line.base is not None]
    cells = [
        [
            line.head,
            shown(line.base) if line.one_unit else "-",
            *(
                shown(line.gain(line.methods.get(name, "")), sign=True)
                for name in _COLUMNS
            ),
        ]
        for line in lines
    ]
    parts = [table("What each gains on the MAP, nats", _HEADS, cells)]
    if "rotated" in rows:
        parts.append(_picture(rows["rotated"], folder / "gain-and-price.png"))
    return "\n\n".join(parts)


def _toy(rows: Rows) -> Iterator[Line]:
    found = collected(rows.get("toy", ()))
    methods = {
        "default": "subnet PredictiveVariance, greedy 5.0%",
        "by evidence": toy.EVIDENCE,
        "last layer": "subnet LastLayer",
        "ensemble": "deep ensemble",
        "all": toy.FULL,
    }
    for shift, words in (("gap", "in the gap"), ("", "at the data")):
        base = at(_TOY, "MAP", shift, "nll")
        yield Line(
            f"one-dimensional toy, {words}",
            estimate(list(found.get(base, {}).values())),
            lambda name, base=base: _gain(found, base, base._replace(method=name)),
            methods,
        )


def _gain(found: Found, base: Cell, own: Cell) -> Estimate | None:
    return estimate(differences(found, base, own))


def _uci(rows: Rows) -> Iterator[Line]:
    found = collected(rows.get("uci", ()))
    methods = {
        "default": f"{uci.DEFAULT}{uci.OWN_PRIOR}",
        "by evidence": uci.EVIDENCE,
        "last layer": f"subnet LastLayer{uci.OWN_PRIOR}",
        "temperature": uci.MAP_NOISE,
        "ensemble": "deep ensemble",
    }
    network = uci.ENDS[1]
    for kind in KINDS:
        names = sets_of(found, kind)
        base = [found[cell(name, kind, network, "MAP")] for name in names]
        yield Line(
            f"{len(names)} UCI sets, {kind} splits",
            pooled([[-value for value in each.values()] for each in base]),
            lambda name, kind=kind: pooled(
                to_base(found, kind, (network, name), (network, "MAP"))
            ),
            methods,
            one_unit=False,
        )


def _images(rows: Rows) -> Iterator[Line]:
    for dataset, title in of_today.IMAGES.items():
        own = [row for row in rows.get("rotated", ()) if row["dataset"] == dataset]
        yield _image_line(own, "rotation=*", f"{title}, turned by 0 to 180 degrees")
        yield _image_line(own, "", f"{title}, upright")
    own = rows.get("corrupted", ())
    yield _image_line(own, "*=*", "MNIST, four corruptions")


def _image_line(rows: Sequence[Row], shift: str, head: str) -> Line:
    methods = {
        "default": f"{DEFAULT}{OWN_PRIOR}",
        "by evidence": f"{DEFAULT}{BY_EVIDENCE}",
        "last layer": f"subnet LastLayer{OWN_PRIOR}",
        "temperature": "temperature",
        "ensemble": "deep ensemble",
    }

    def gain(name: str) -> Estimate | None:
        if name == "temperature":
            return estimate(_of_temperature(rows, methods["default"], shift))
        return estimate(_gains(rows, name, shift))

    base = estimate(by_seed(rows, "MAP", Column(shift, "nll")))
    return Line(head, base, gain, methods)


def _gains(rows: Sequence[Row], method: str, shift: str) -> list[float]:
    """NLL of the MAP less a method's, seed by seed."""
    column = Column(shift, "nll", to_map=True)
    return [-value for value in by_seed(rows, method, column)]


def _of_temperature(rows: Sequence[Row], method: str, shift: str) -> list[float]:
    """What the temperature gains that costs as much in distribution as a method."""
    beyond = by_seed(rows, method, Column(shift, "nll", to_temperature=True))
    return [
        gain + value
        for gain, value in zip(_gains(rows, method, shift), beyond, strict=False)
    ]


def _picture(rows: Sequence[Row], path: Path) -> str:
    """Gain over all angles against its price upright, beside that of temperatures."""
    panels = new_row(None, len(of_today.IMAGES), "set", (4.6, 4.0))
    for ax, (dataset, title) in zip(panels, of_today.IMAGES.items(), strict=True):
        own = [row for row in rows if row["dataset"] == dataset]
        curve = [_place(own, "MAP", at_temperature(t)) for t in CURVE]
        there = [place for place in curve if place is not None]
        if there:
            ax.plot(
                [price.mean for price, _ in there],
                [gain.mean for _, gain in there],
                color=INK,
                linestyle=":",
                label="MAP at temperatures from 1 to 8",
            )
        for name, end in _UNTUNED.items():
            _point(ax, own, name, end, f"{_short(name)}, not tuned")
        for name in _TUNED:
            _point(ax, own, name, ON_SHIFT, f"{_short(name)}, tuned on turned images")
        ax.set_title(title)
        frame(ax, "price upright, nats", "gain over all angles, nats")
        # Most of them cost less than a hundredth, and a few a fifth.
        ax.set_xscale("symlog", linthresh=0.01, linscale=0.7)
        ax.set_xticks(_PRICES, map(str, _PRICES))
        ax.set_xlim(-0.04, 0.4)
        ax.minorticks_off()
    legend_below(panels, ncols=2)
    text = "Gain on the MAP over all angles against its price upright, by method"
    return saved(panels, path, text)


def _short(name: str) -> str:
    return name.removeprefix("subnet ")


def _place(
    rows: Sequence[Row], method: str, metric: str = "nll"
) -> tuple[Estimate, Estimate] | None:
    """Price in distribution and gain under rotations."""
    places = []
    for shift, sign in (("", 1), ("rotation=*", -1)):
        own = by_seed(rows, method, Column(shift, metric))
        base = by_seed(rows, "MAP", Column(shift, "nll"))
        if not own or len(own) != len(base):
            return None
        differing = [sign * (o - b) for o, b in zip(own, base, strict=True)]
        places.append(estimate(differing))
    price, gain = places
    return (price, gain) if price and gain else None


def _point(ax: Axes, rows: Sequence[Row], name: str, end: str, label: str) -> None:
    place = _place(rows, f"{name}{end}")
    if place is None:
        return
    price, gain = place
    options = {**look(name), "linestyle": "none"}
    options["markerfacecolor"] = "white" if end == ON_SHIFT else options["color"]
    ax.errorbar(price.mean, gain.mean, gain.error, price.error, label=label, **options)
