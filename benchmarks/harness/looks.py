"""How pictures draw each method: the same in all of them, whatever else is there.

Subnet, MAP, last layer and all weights have the colours of the package's own pictures.
What is kin to one of them, and is beside it, has its colour and hollow points.
"""

from __future__ import annotations

from typing import Any

from pyro_subnet.plotting.style import (
    BLUE,
    GREEN,
    INK,
    ORANGE,
    PURPLE,
    REFERENCE,
    SKY,
    VERMILLION,
    Stroke,
)

FILLED = {
    "PredictiveVariance": Stroke(BLUE, "-", "o"),
    "MAP": Stroke(VERMILLION, "--", "s"),
    "full Laplace": Stroke(GREEN, "-.", "^"),
    "LastLayer": Stroke(PURPLE, (0, (1, 1)), "D"),
    "deep ensemble": Stroke(ORANGE, (0, (5, 1, 1, 1, 1, 1)), "v"),
    "LargestVariance": Stroke(SKY, (0, (8, 2)), "P"),
    "MC dropout": Stroke(REFERENCE, "-", "X"),
    "SWAG": Stroke(INK, ":", "*"),
}
HOLLOW = {
    "PredictiveVariance, greedy": Stroke(BLUE, (0, (4, 2)), "s"),
    "MAP with temperature": Stroke(VERMILLION, ":", "o"),
    "diagonal Laplace": Stroke(GREEN, "--", "d"),
    "RandomSubnet": Stroke(PURPLE, "-.", "o"),
    "ensemble of subnets (PredictiveVariance)": Stroke(ORANGE, "-", "^"),
    "LargestVariance (alive)": Stroke(SKY, "-", "o"),
    "LargestVariance (SWAG)": Stroke(SKY, ":", "s"),
    "ELLA": Stroke(INK, "--", "h"),
    "GreedyVariance, gap": Stroke(REFERENCE, "-.", "D"),
}
# What is drawn as another: it is the same, or the same with one number more.
_ALIASES = {
    "by default": "PredictiveVariance",
    "subnet, by evidence": "PredictiveVariance, greedy",
    "deep ensemble with temperature": "deep ensemble",
}


def look(method: str) -> dict[str, Any]:
    """Arguments of ``Axes.plot`` for a method; "subnet" before its name is left out."""
    name = method.removeprefix("subnet ")
    name = _ALIASES.get(name, name)
    if name in FILLED:
        return FILLED[name].options()
    return {**HOLLOW[name].options(), "markerfacecolor": "white"}
