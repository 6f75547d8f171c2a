"""The tables and the picture: what each posterior costs in distribution, and gains."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt

from benchmarks.harness.looks import look
from benchmarks.harness.reporting import (
    TIE,
    Cell,
    Estimate,
    Found,
    collected,
    differences,
    estimate,
    legend_below,
    mean_and_error,
    saved,
    table,
)
from benchmarks.harness.task import Row
from benchmarks.selectors.measure import PAIRS, PRIORS, TEMPERATURES, Prior
from benchmarks.selectors.methods import (
    CANDIDATES,
    DEFAULT,
    DIAGONAL,
    FULL,
    LAST,
    MAP,
    REST,
    SELECTORS,
    SIZES,
    TEMPERATURE,
    UNSIZED,
    sized,
)

_SHARE = 0.05
# Shifts that stand for their problem in the tables of many problems.
_LAST_SHIFTS = ("gap", "90 degrees")
_GAPS = ", gaps"
_TEMPERED_TO = 0.1  # price, nats, to which temperatures are drawn at least
_ERRORS = 2.0  # standard errors that a difference must have to count
# What is drawn: its name in the picture, and in the other benchmarks' pictures.
_DRAWN = {
    sized(DEFAULT, _SHARE): ("the default, 5%", "PredictiveVariance"),
    sized("LargestVariance ggn", _SHARE): ("largest variance, 5%", "LargestVariance"),
    LAST: ("last layer", "LastLayer"),
    FULL: ("all weights", "full Laplace"),
}


class Place(NamedTuple):
    """A column of judgements: a problem's data, as they come or shifted."""

    dataset: str
    shift: str

    def cell(self, method: str, metric: str) -> Cell:
        return Cell(self.dataset, "", method, self.shift, metric)

    def __str__(self) -> str:
        if not self.shift:
            return self.dataset
        if self.dataset.endswith(_GAPS):
            return f"{self.dataset.removesuffix(_GAPS)}, gap splits"
        there = "in the gap" if self.shift == "gap" else f"turned by {self.shift}"
        return f"{self.dataset}: {there}"


def report(rows: Sequence[Row], folder: Path) -> str:
    """All tables that the rows give; the picture goes to the folder."""
    found = collected(rows)
    places = list(_places(found))
    parts = [_by_use(found, places), _goal(found, places)]
    parts += [_picture(found, places, folder / "price-and-gain.png")]
    parts += [_rest(found, places), _candidates(found, places), _links(found, places)]
    for prior in PRIORS:
        for share in SIZES:
            parts.append(_selectors(found, places, share, prior))
        parts.append(_references(found, places, prior))
    return "\n\n".join(parts)


def _places(found: Found) -> Iterator[Place]:
    """In the order of the rows; of several angles, the last."""
    there = dict.fromkeys(
        Place(cell.dataset, cell.shift) for cell in found if cell.metric == "nll, own"
    )
    for place in there:
        turned = "degrees" in place.shift
        if not turned or place.shift == "90 degrees":
            yield place


def _nll(found: Found, place: Place, method: str, prior: str = "own") -> str:
    return _score(found, place, method, f"nll, {prior}")


def _score(found: Found, place: Place, method: str, metric: str) -> str:
    """The mean over seeds, or a dash where the method was not run."""
    return mean_and_error(found.get(place.cell(method, metric), {}).values())


def _inside(found: Found, place: Place) -> Place | None:
    """Where the same problem is judged as its data come; of gap splits, the others."""
    own = Place(place.dataset.removesuffix(_GAPS), "")
    return own if own.cell(MAP, "nll, own") in found else None


def _by_use(found: Found, places: Sequence[Place]) -> str:
    default = sized(DEFAULT, _SHARE)
    columns = ((MAP, "own"), (default, "own"), (default, "evidence"))
    columns += ((default, "tuned"), (LAST, "own"))
    lines = []
    for place in places:
        cells = [_nll(found, place, method, prior) for method, prior in columns]
        cells += [_equal_price(found, place), _nll(found, place, FULL)]
        lines.append([str(place), *cells])
    heads = [
        "NLL",
        MAP,
        "default, 5%",
        "with evidence",
        "tuned",
        "last layer",
    ]
    heads += ["temperature at equal price", "all weights"]
    return table("By use", heads, lines)


def _equal_price(found: Found, place: Place) -> str:
    """Of the MAP, at the temperature that costs what the default does, or nothing."""
    inside = _inside(found, place)
    if inside is None or not place.shift:
        return "-"
    own = estimate(_prices(found, inside, sized(DEFAULT, _SHARE), "own"))
    # Where the default gains in distribution, a temperature need not.
    most = max(own.mean if own else 0.0, 0.0)
    prices = {
        step: estimate(_prices(found, inside, TEMPERATURE, f"step {step}"))
        for step, value in enumerate(TEMPERATURES)
        if value >= 1
    }
    # Prices rise with the temperature in the end: the last that costs no more.
    fair = [step for step, price in prices.items() if price and price.mean <= most]
    step = max(fair, default=TEMPERATURES.index(1.0))
    found_nll = _nll(found, place, TEMPERATURE, f"step {step}")
    return f"{found_nll} (at {TEMPERATURES[step]:.2g})"


def _prices(found: Found, place: Place, method: str, prior: str) -> list[float]:
    """NLL less the MAP's, seed by seed."""
    metric = f"nll, {prior}"
    return differences(found, place.cell(method, metric), place.cell(MAP, "nll, own"))


def _goal(found: Found, places: Sequence[Place]) -> str:
    """The default beside the best selector of its size and prior, place by place."""
    choices: dict[str, tuple[Prior, ...]] = {prior: (prior,) for prior in PRIORS}
    choices["own or evidence"] = ("own", "evidence")
    lines = []
    for text, priors in choices.items():
        for share in SIZES:
            level, count, worst = 0, 0, {True: 0.0, False: 0.0}
            for place in places:
                each = [_standing(found, place, share, prior) for prior in priors]
                there = [standing for standing in each if standing is not None]
                if not there:
                    continue
                count += 1
                level += any(is_level for is_level, _ in there)
                if not place.shift:
                    price = min(price for _, price in there)
                    of_numbers = place.cell(MAP, "coverage, own") in found
                    worst[of_numbers] = max(worst[of_numbers], price)
            # Noise is tuned in regression alone.
            classes = "-" if priors == ("tuned",) else f"{worst[False]:+.3f}"
            cells = [f"{level} of {count}", f"{worst[True]:+.3f}", classes]
            lines.append([f"{share:.0%}, {text}", *cells])
    heads = ["size, prior", "within one standard error of the best selector"]
    heads += ["most lost in distribution: regression", "classes"]
    return table("The default", heads, lines)


def _standing(
    found: Found, place: Place, share: float, prior: Prior
) -> tuple[bool, float] | None:
    """Whether the default is level with the best there, and its price to the MAP."""
    metric, default = f"nll, {prior}", sized(DEFAULT, share)
    each = {
        name: estimate(list(values.values()))
        for name in SELECTORS
        if (values := found.get(place.cell(sized(name, share), metric)))
    }
    if DEFAULT not in each:
        return None
    best = min(each, key=lambda name: each[name].mean)
    cells = (place.cell(sized(name, share), metric) for name in (DEFAULT, best))
    behind = estimate(differences(found, *cells))
    is_level = behind.mean <= max(behind.error, each[best].error)
    return is_level, estimate(_prices(found, place, default, prior)).mean


def _candidates(found: Found, places: Sequence[Place]) -> str:
    """What might have done better than the default, against it."""
    lines = []
    for name in CANDIDATES:
        for share in SIZES:
            for prior in ("own", "evidence"):
                metric = f"nll, {prior}"
                inside, shifted = (
                    [
                        estimate(pairs)
                        for place in places
                        if bool(place.shift) == is_shifted
                        and (
                            pairs := differences(
                                found,
                                place.cell(sized(name, share), metric),
                                place.cell(sized(DEFAULT, share), metric),
                            )
                        )
                    ]
                    for is_shifted in (False, True)
                )
                if inside or shifted:
                    cells = [_outcome(inside), _outcome(shifted)]
                    lines.append([f"{name}, {share:.0%}, {prior}", *cells])
    outcome = "better / level / worse by two standard errors (median difference)"
    heads = ["candidate, size, prior", f"in distribution: {outcome}", "under shift"]
    return table("Against the default", heads, lines)


def _outcome(found: Sequence[Estimate]) -> str:
    """Of differences in NLL, a problem each."""
    if not found:
        return "-"
    clear = [each for each in found if abs(each.mean) > max(TIE, _ERRORS * each.error)]
    better = sum(each.mean < 0 for each in clear)
    counted = (better, len(found) - len(clear), len(clear) - better)
    median = statistics.median(each.mean for each in found)
    return f"{' / '.join(map(str, counted))} ({median:+.3f})"


def _rest(found: Found, places: Sequence[Place]) -> str:
    """The default with and without a diagonal over the rest, and all weights."""
    methods = (MAP, sized(DEFAULT, _SHARE), REST, DIAGONAL, FULL)
    lines = [
        [str(place), *(_nll(found, place, method) for method in methods)]
        for place in places
    ]
    heads = ["NLL", MAP, "default, 5%", "and a diagonal over the rest"]
    title = "The rest of the weights, the model's own prior"
    return table(title, [*heads, "diagonal, all", "full, all"], lines)


def _links(found: Found, places: Sequence[Place]) -> str:
    """Classes by the default link and by pairs of classes."""
    default = sized(DEFAULT, _SHARE)
    columns = [
        (method, f"{prior}{link}")
        for method in (default, LAST)
        for prior in ("own", "evidence")
        for link in ("", PAIRS)
    ]
    lines = [
        [str(place), _nll(found, place, MAP)]
        + [_nll(found, place, method, prior) for method, prior in columns]
        for place in places
        if place.cell(default, f"nll, own{PAIRS}") in found
    ]
    names = {default: "default, 5%", LAST: "last layer"}
    heads = [MAP, *(f"{names[method]}: {prior}" for method, prior in columns)]
    errors = [
        [str(place)]
        + [
            _score(found, place, method, f"error, {prior}")
            for method, prior in ((MAP, "own"), *columns)
        ]
        for place in places
        if place.cell(default, f"nll, own{PAIRS}") in found
    ]
    first = table("Classes, by two links", ["NLL", *heads], lines)
    second = table("Share of errors, by two links", ["errors", *heads], errors)
    return f"{first}\n\n{second}"


def _selectors(
    found: Found, places: Sequence[Place], share: float, prior: Prior
) -> str:
    rows = {name: sized(name, share) for name in SELECTORS}
    lines = [
        [str(place), _nll(found, place, MAP)]
        + [_nll(found, place, method, prior) for method in rows.values()]
        for place in places
    ]
    title = f"Selectors, {share:.0%} of the weights, prior: {prior}"
    return table(title, ["NLL", MAP, *rows], lines)


def _references(found: Found, places: Sequence[Place], prior: Prior) -> str:
    lines = [
        [str(place), _nll(found, place, MAP), _nll(found, place, TEMPERATURE)]
        + [_nll(found, place, method, prior) for method in UNSIZED]
        for place in places
    ]
    heads = ["NLL", MAP, f"{TEMPERATURE} by held-out data", *UNSIZED]
    return table(f"Last layer and all weights, prior: {prior}", heads, lines)


def _picture(found: Found, places: Sequence[Place], path: Path) -> str:
    """Price in distribution against gain under shift, in nats, a panel a problem."""
    shifted = [
        (place, inside)
        for place in places
        if place.shift and (inside := _inside(found, place)) is not None
    ]
    columns = 3
    count = -(-len(shifted) // columns)
    figure, axes = plt.subplots(
        count, columns, figsize=(11, 3 * count), layout="constrained", squeeze=False
    )
    panels = list(axes.flat)
    for panel, (place, inside) in zip(panels, shifted, strict=False):
        highest = _TEMPERED_TO
        for method, (label, name) in _DRAWN.items():
            for prior, marker in (("own", "o"), ("evidence", "^")):
                point = _point(found, place, inside, method, prior)
                if point is not None:
                    text = f"{label}, {prior} prior"
                    panel.plot(*point, marker, color=look(name)["color"], label=text)
                    highest = max(highest, point[0])
        steps = [s for s, value in enumerate(TEMPERATURES) if value >= 1]
        points = [_point(found, place, inside, TEMPERATURE, f"step {s}") for s in steps]
        drawn = [point for point in points if point is not None and point[0] <= highest]
        tempered = look("MAP with temperature")["color"]
        panel.plot(*zip(*drawn, strict=True), color=tempered, label="MAP, temperature")
        panel.axhline(0, color="0.8", linewidth=0.8)
        panel.axvline(0, color="0.8", linewidth=0.8)
        panel.set_title(str(place), fontsize=9)
        panel.set_xscale("symlog", linthresh=0.01)
        panel.set_xlabel("price in distribution, nats", fontsize=8)
    for panel in panels[len(shifted) :]:
        panel.remove()
    figure.supylabel("gain under shift, nats")
    legend_below(panels, ncols=3)
    text = "Gain under shift against price in distribution, a panel for each problem"
    return saved(panels, path, text)


def _point(
    found: Found, place: Place, inside: Place, method: str, prior: str
) -> tuple[float, float] | None:
    price = estimate(_prices(found, inside, method, prior))
    gain = estimate(_prices(found, place, method, prior))
    return None if price is None or gain is None else (price.mean, -gain.mean)
