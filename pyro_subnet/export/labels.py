"""The names that a user gives to axes, and the labels along them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from typing import Any, NoReturn

from pyro_subnet.exceptions import OptionError, shown

# First axes of variables that are draws.
SAMPLE_DIMS = ("chain", "draw")


def names_of_axes(
    dims: Mapping[str, str | Sequence[str]] | None,
) -> dict[str, Sequence[str]]:
    """Names of axes by variable; one name may be given without a list."""
    named = {} if dims is None else dims
    if not isinstance(named, Mapping):
        _refuse(dims)
    found = {name: [a] if isinstance(a, str) else a for name, a in named.items()}
    if not all(map(_are_names, found.values())):
        _refuse(dims)
    return found


def labels_along_axes(coords: Mapping[str, Any] | None) -> dict[str, Any]:
    """Labels by axis, in sequences."""
    given = {} if coords is None else coords
    sized = isinstance(given, Mapping) and all(
        isinstance(labels, Sized) and not isinstance(labels, str)
        for labels in given.values()
    )
    if not sized:
        raise OptionError(
            "`coords` must be a mapping from names of axes to the labels along them; "
            f"got {shown(coords)}. Pass `{{'site': ['a', 'b']}}`, say."
        )
    return dict(given)


def names_of_sites(sites: str | Sequence[str] | None) -> Sequence[str] | None:
    """Names of latent sites; one may be given without a list."""
    if isinstance(sites, str):
        return [sites]
    if sites is not None and not _are_names(sites):
        raise OptionError(
            f"`sites` must be names of latent sites; got {shown(sites)}. Pass "
            "`['fc1.weight']`, say, or leave it out for all of them."
        )
    return sites


def _are_names(value: Any) -> bool:
    sequence = isinstance(value, Sequence) and not isinstance(value, str)
    return sequence and all(isinstance(name, str) for name in value)


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
    for variable in dims:
        if variable not in shapes:
            raise OptionError(
                f"`dims` must name variables, some of {list(shapes)}; got "
                f"{variable!r}. Check the spelling."
            )
    for variable in (*dims, *(name for name in shapes if name not in dims)):
        axes, shape = dims.get(variable, ()), shapes[variable]
        if len(axes) > len(shape):
            raise OptionError(
                f"`dims` of {variable!r} must name at most its {len(shape)} axes, of "
                f"shape {tuple(shape)}; got {list(axes)}. Leave out chain and draw."
            )
        if len(set(axes)) < len(axes) or set(axes) & set(SAMPLE_DIMS):
            raise OptionError(
                "`dims` must name each axis of a variable once, and neither 'chain' "
                f"nor 'draw', which stand before them; got {list(axes)}. Name them "
                "differently."
            )
        numbered = [f"{variable}_dim_{i}" for i in range(len(axes), len(shape))]
        for axis, size in zip([*axes, *numbered], shape, strict=True):
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
    for axis in coords:
        if axis not in known:
            raise OptionError(
                f"`coords` must label axes of the variables, some of {list(known)}; "
                f"got {axis!r}. Name axes with `dims=`, or check the spelling."
            )
