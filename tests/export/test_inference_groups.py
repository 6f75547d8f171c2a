"""Groups of arrays, and the container that the installed ArviZ has for them."""

from __future__ import annotations

import arviz
import numpy as np
import xarray

from pyro_subnet.export.arrays import container, dataset, element_labels
from tests.export.generation import IS_1
from tests.export.generation import group as contents


def test_draws_are_cut_into_chains_in_order() -> None:
    values = np.arange(12.0).reshape(6, 2)
    group = dataset(
        {"w": values},
        chains=2,
        dims={"w": ["w_elem"]},
        coords={"w_elem": ["0", "4"]},
        attrs={"seed": 3},
    )
    assert group["w"].dims == ("chain", "draw", "w_elem")
    assert np.array_equal(group["w"].sel(chain=1).values, values[3:])
    assert list(group["w_elem"].values) == ["0", "4"]
    idata = container(arviz, {"posterior": group}, {"seed": 3})
    assert isinstance(idata, xarray.DataTree if IS_1 else arviz.InferenceData)
    assert contents(idata, "posterior").equals(group)
    assert idata.attrs == {"seed": 3}


def test_axes_without_names_are_numbered() -> None:
    group = dataset(
        {"y": np.zeros((4, 3))}, chains=None, dims={"y": ["row"]}, coords={}, attrs={}
    )
    assert group["y"].dims == ("row", "y_dim_1")
    assert list(group["row"].values) == [0, 1, 2, 3]


def test_labels() -> None:
    assert element_labels([0, 5], (2, 3)) == ["0, 0", "1, 2"]
    assert element_labels([3, 1], (4,)) == ["3", "1"]
