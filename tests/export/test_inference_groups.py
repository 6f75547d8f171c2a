"""Groups of arrays under ArviZ 0.x, and under 1.x where an environment has it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import arviz
import numpy as np
import pytest

from pyro_subnet.export import arrays as inference_groups
from pyro_subnet.export.arrays import container, dataset, element_labels

PYTHON = os.environ.get("PYRO_SUBNET_ARVIZ1")

# The module is run by its path: importing the package would import torch.
PROGRAM = """
import importlib.util, sys
import arviz, numpy as np, xarray

spec = importlib.util.spec_from_file_location("groups", sys.argv[1])
groups = importlib.util.module_from_spec(spec)
spec.loader.exec_module(groups)
assert "torch" not in sys.modules
assert int(arviz.__version__.split(".")[0]) >= 1

generator = np.random.default_rng(0)
w, y = generator.normal(size=(400, 2)), generator.normal(size=12)
density = -0.5 * (y - 0.1 * w[:, :1]) ** 2 - 0.5 * np.log(2 * np.pi)

def draws(name, value, **options):
    given = {"chains": 4, "dims": {}, "coords": {}, "attrs": {}, **options}
    return groups.dataset({name: value}, **given)

labels = {"w_elem": ["0, 0", "3, 7"]}
tree = groups.container(
    arviz,
    {
        "posterior": draws("w", w, dims={"w": ["w_elem"]}, coords=labels),
        "log_likelihood": draws("y", density),
        "posterior_predictive": draws("y", generator.normal(size=(400, 12))),
        "observed_data": draws("y", y, chains=None),
    },
    {"seed": 1},
)
assert isinstance(tree, xarray.DataTree)
assert tree.posterior["w"].dims == ("chain", "draw", "w_elem")
assert tree.posterior["w"].shape == (4, 100, 2)
assert np.array_equal(tree.posterior["w"].values.reshape(400, 2), w)
summary = arviz.summary(tree, round_to="none")
assert list(summary.index) == ["w[0, 0]", "w[3, 7]"]
assert np.allclose(summary["mean"].astype(float), w.mean(0))
assert arviz.loo(tree).n_data_points == 12
assert len(arviz.compare({"a": tree, "b": tree})) == 2
tree.to_netcdf(sys.argv[2])
read = xarray.open_datatree(sys.argv[2])
assert set(read.children) == set(tree.children)
assert read.attrs["seed"] == 1
assert read.posterior["w"].equals(tree.posterior["w"])
print("passed")
"""


@pytest.mark.skipif(
    PYTHON is None, reason="PYRO_SUBNET_ARVIZ1 names no Python with ArviZ 1.x"
)
def test_arviz_1(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            str(PYTHON),
            "-W",
            "error:arviz.InferenceData",
            "-c",
            PROGRAM,
            inference_groups.__file__,
            str(tmp_path / "tree.nc"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.splitlines() == ["passed"], done.stderr


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
    assert isinstance(idata, arviz.InferenceData)
    assert idata.posterior.equals(group)
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
