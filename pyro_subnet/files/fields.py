"""What JSON in a file may say, field by field, so that nothing else gets further."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from pyro_subnet.exceptions import CheckpointError, OptionError
from pyro_subnet.gaussians.registry import FORMS
from pyro_subnet.options import FitOptions

Test = Callable[[Any], bool]
# The test that each field must pass, and what it says.
Fields = Mapping[str, tuple[Test, str]]
_ROUND_OFF = 1e-2


def check_fields(content: Any, expected: Fields, where: str = "") -> None:
    """Refuses JSON without a field, or with one that is not what it must be."""
    if not isinstance(content, dict):
        raise CheckpointError(
            f"The file's {where or 'content'} must be a mapping; got {content!r:.60}. "
            "Take another copy of it."
        )
    if missing := [key for key in expected if key not in content]:
        raise CheckpointError(
            f"The file must hold {', '.join(expected)}; got none of {missing}. Take "
            "another copy of it."
        )
    for key, (test, rule) in expected.items():
        if not test(content[key]):
            raise CheckpointError(
                f"The file's `{where}{key}` must be {rule}; got {content[key]!r:.60}. "
                "Take another copy of it, or upgrade pyro_subnet."
            )


def is_number(value: Any) -> bool:
    """Whether it is a finite number."""
    return type(value) in (int, float) and math.isfinite(value)


def is_positive(value: Any) -> bool:
    """Whether it is a finite number above zero."""
    return is_number(value) and float(value) > 0


def _is_share(value: Any) -> bool:
    # Of sums in another order, so that the whole may round to a little more than 1.
    return is_number(value) and 0 <= value <= 1 + _ROUND_OFF


def is_count(value: Any) -> bool:
    """Whether it is a whole number, zero or more."""
    return type(value) is int and value >= 0


def is_bool(value: Any) -> bool:
    """Whether it is true or false."""
    return type(value) is bool


def is_text(value: Any) -> bool:
    """Whether it is a string."""
    return type(value) is str


def is_factor(value: Any) -> bool:
    """Whether it is a positive number, or one for each of some names."""
    return is_positive(value) or (
        isinstance(value, dict) and all(map(is_positive, value.values()))
    )


def or_none(test: Test) -> Test:
    """Whether it is nothing, or passes a test."""
    return lambda value: value is None or test(value)


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and all(map(is_count, value))


def _are_sites(value: Any) -> bool:
    kinds = {"name": is_text, "support": is_text, "dtype": is_text}
    kinds |= {"unconstrained": _is_shape, "shape": _is_shape}
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(site, dict) and site.keys() == kinds.keys() for site in value
        )
        and all(test(site[key]) for site in value for key, test in kinds.items())
        and len({site["name"] for site in value}) == len(value)
    )


def are_options(value: Any) -> bool:
    """Whether they are all the options of a fit, each one that there is."""
    names = {field.name for field in fields(FitOptions)}
    if not isinstance(value, dict) or value.keys() != names:
        return False
    if not all(map(is_text, value.values())):
        return False
    try:
        FitOptions(**value)
    except OptionError:
        return False
    return True


SITES: tuple[Test, str] = (_are_sites, "latent sites, each of a name of its own")
OPTIONS: tuple[Test, str] = (are_options, "the options of a fit")
POSTERIOR: Fields = {
    "sites": SITES,
    "form": (
        lambda value: is_text(value) and value in FORMS,
        f"one of {', '.join(map(repr, FORMS))}",
    ),
    "prior_scale": (is_factor, "a positive number, or one a site"),
    "noise_scale": (is_positive, "a positive number"),
    "options": OPTIONS,
    "explained_variance": (or_none(_is_share), "a share or nothing"),
    "tuning": (or_none(lambda value: isinstance(value, dict)), "a mapping or nothing"),
    # Files of an earlier version have none of these.
    "chosen_by": (or_none(is_text), "text or nothing"),
    "num_seen": (or_none(is_count), "a count or nothing"),
    "tuning_before": (
        or_none(lambda value: isinstance(value, dict)),
        "a mapping or nothing",
    ),
}
TUNING: Fields = {
    "of": (lambda value: value in ("prior", "noise"), "'prior' or 'noise'"),
    "method": (lambda value: value in ("evidence", "nll"), "'evidence' or 'nll'"),
    "best": (is_positive, "a positive number"),
    "at_bound": (is_bool, "true or false"),
    "is_flat": (is_bool, "true or false"),
    "by_site": (or_none(is_factor), "a positive number a site, or nothing"),
}
FIT: Fields = {
    "identity": (lambda value: isinstance(value, dict), "a mapping"),
    "explained_variance": (or_none(_is_share), "a share or nothing"),
    "sums": (or_none(lambda value: isinstance(value, dict)), "a mapping or nothing"),
    "done": (is_count, "a count"),
    "batches": (is_text, "a hash"),
}
SUMS: Fields = {
    "form": (is_text, "a form's name"),
    "last": (is_number, "a number"),
    "seen": (or_none(is_count), "a count or nothing"),
    "log_prior": (or_none(is_number), "a number or nothing"),
    "has_outputs": (is_bool, "true or false"),
    "scales_noise": (is_bool, "true or false"),
}
