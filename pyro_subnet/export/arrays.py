"""Groups of named arrays as ArviZ holds them, whichever major version is installed.

No other file of the package knows that there are two. Plain arrays in, no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import xarray
from numpy.typing import NDArray

from pyro_subnet.export.labels import SAMPLE_DIMS

Arrays = Mapping[str, NDArray[Any]]


def dataset(
    variables: Arrays,
    *,
    chains: int | None,
    dims: Mapping[str, Sequence[str]],
    coords: Mapping[str, Any],
    attrs: Mapping[str, Any],
) -> xarray.Dataset:
    """One group; draws are cut into chains in order; ``chains`` is None for data."""
    arrays, sizes = {}, dict[str, int]()
    for name, value in variables.items():
        leading: tuple[str, ...] = ()
        array = np.asarray(value)
        if chains is not None:
            leading = SAMPLE_DIMS
            array = array.reshape(chains, -1, *array.shape[1:])
        # Axes after those of the draws have the user's names, or numbers.
        own = list(dims.get(name, ()))[: array.ndim - len(leading)]
        rest = range(len(own), array.ndim - len(leading))
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
    """All groups in ArviZ 0.x's ``InferenceData``, or 1.x's ``xarray.DataTree``."""
    # The one place where the versions differ. ArviZ 1.x has the name ``InferenceData``
    # too, but it warns and is another class.
    if int(arviz.__version__.partition(".")[0]) == 0:
        return arviz.InferenceData(attrs=dict(attrs), **groups)
    root = xarray.Dataset(attrs=dict(attrs))
    return xarray.DataTree.from_dict({"/": root, **groups})


def element_labels(positions: Sequence[int], shape: Sequence[int]) -> list[str]:
    """Labels such as ``"3, 7"`` of an array's elements at row-major positions."""
    # ArviZ puts brackets around a label: its tables have rows such as ``w[3, 7]``.
    columns = np.unravel_index(np.asarray(positions, dtype=np.int64), tuple(shape))
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return [", ".join(map(str, row)) for row in rows]
