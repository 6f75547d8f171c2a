"""Groups of named arrays as ArviZ holds them, whichever major version is installed.

Plain arrays in, no torch: the one place where ArviZ 0.x and 1.x differ is
:func:`container`. ArviZ itself is passed in, so this file can be run by its path.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import xarray
from numpy.typing import NDArray

# What the first axes of a group's variables are, where they are draws.
SAMPLE_DIMS = ("chain", "draw")
Arrays = Mapping[str, NDArray[Any]]


def dataset(
    variables: Arrays,
    *,
    chains: int | None,
    dims: Mapping[str, Sequence[str]],
    coords: Mapping[str, Any],
    attrs: Mapping[str, Any],
) -> xarray.Dataset:
    """One group.

    Args:
        variables: ``{name: array}``; of draws, with these on the first axis.
        chains: How many chains the draws are cut into, first to last; None for
            variables that are no draws.
        dims: Names of a variable's axes after those of the draws; axes without one are
            called ``<variable>_dim_<i>``.
        coords: Labels along axes, by their names; axes without any are numbered.
        attrs: What is known of the group.

    Returns:
        The group, with the axes ``("chain", "draw", ...)`` where it holds draws.
    """
    arrays, sizes = {}, dict[str, int]()
    for name, value in variables.items():
        leading: tuple[str, ...] = ()
        array = np.asarray(value)
        if chains is not None:
            leading = SAMPLE_DIMS
            array = array.reshape(chains, -1, *array.shape[1:])
        own = list(dims.get(name, ()))[: array.ndim - len(leading)]
        first = len(own)
        rest = range(first, array.ndim - len(leading))
        names = (*leading, *own, *(f"{name}_dim_{i}" for i in rest))
        arrays[name] = (names, array)
        sizes |= dict(zip(names, array.shape, strict=True))
    labels = {
        dim: np.asarray(coords[dim]) if dim in coords else np.arange(size)
        for dim, size in sizes.items()
    }
    return xarray.Dataset(arrays, coords=labels, attrs=dict(attrs))


def container(
    arviz: ModuleType, groups: Mapping[str, xarray.Dataset], attrs: Mapping[str, Any]
) -> Any:
    """All groups in one.

    Args:
        arviz: The library, as it is installed.
        groups: ``{name: group}``.
        attrs: What is known of all.

    Returns:
        An ``arviz.InferenceData``; from ArviZ 1.0 on, which has none, an
        ``xarray.DataTree``.
    """
    # ArviZ 1.x answers for the name, with a warning and another class.
    if int(arviz.__version__.partition(".")[0]) == 0:
        return arviz.InferenceData(attrs=dict(attrs), **groups)
    root = xarray.Dataset(attrs=dict(attrs))
    return xarray.DataTree.from_dict({"/": root, **groups})


def element_labels(positions: Sequence[int], shape: Sequence[int]) -> list[str]:
    """What elements of an array are called, such as ``"[3, 7]"``.

    Args:
        positions: Flat positions, in row-major order.
        shape: The array's shape.

    Returns:
        One label a position.
    """
    if math.prod(shape) == 0 or not shape:
        return ["[]" for _ in positions]
    columns = np.unravel_index(np.asarray(positions, dtype=np.int64), tuple(shape))
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return [f"[{', '.join(map(str, row))}]" for row in rows]
