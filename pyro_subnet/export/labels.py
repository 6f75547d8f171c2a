"""The names that a user gives to axes, and the labels along them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from pyro_subnet.exceptions import OptionError, shown


def names_of_axes(
    dims: Mapping[str, str | Sequence[str]] | None,
) -> dict[str, Sequence[str]]:
    """Names of axes by variable; one name may be given without a list."""
    named = {} if dims is None else dims
    if not isinstance(named, Mapping):
        _refuse(dims)
    found = {name: [a] if isinstance(a, str) else a for name, a in named.items()}
    if not all(isinstance(axes, Sequence) for axes in found.values()):
        _refuse(dims)
    return found


def _refuse(dims: Any) -> NoReturn:
    raise OptionError(
        "`dims` must be a mapping from variables to the names of their axes; got "
        f"{shown(dims)}. Pass `{{'y': ['site']}}`, say."
    )


def check_labels(
    dims: Mapping[str, Sequence[str]],
    coords: Mapping[str, Any],
    shapes: Mapping[str, Sequence[int]],
) -> None:
    """Refuses names of variables, axes or labels that do not fit, all at once.

    Raises:
        OptionError: What is too much, and what there is.
    """
    known: dict[str, tuple[int, str]] = {}  # size of an axis, and whose it is
    for variable, axes in dims.items():
        if variable not in shapes:
            raise OptionError(
                f"`dims` must name variables, some of {list(shapes)}; got "
                f"{variable!r}. Check the spelling."
            )
        shape = tuple(shapes[variable])
        if len(axes) > len(shape):
            raise OptionError(
                f"`dims` of {variable!r} must name at most its {len(shape)} axes, of "
                f"shape {shape}; got {list(axes)}. Leave out chain and draw."
            )
        for axis, size in zip(axes, shape, strict=False):
            first, other = known.setdefault(axis, (size, variable))
            if first != size:
                raise OptionError(
                    f"`dims` must name axes of one length alike; got {axis!r} for "
                    f"{first} elements of {other!r} and {size} of {variable!r}. Name "
                    "them differently."
                )
            if axis in coords and len(coords[axis]) != size:
                raise OptionError(
                    f"`coords` of {axis!r} must have one label for each of the {size} "
                    f"elements of that axis of {variable!r}; got "
                    f"{len(coords[axis])}. Pass {size} labels."
                )
