"""A guide and the param store: whose values count, and copies with values of their own.

The oracle is the value that was asked for: by a function, by a loaded store, by none.
"""

from __future__ import annotations

import copy
import gc
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoGuideList
from pyro.infer.autoguide.initialization import init_to_value
from torch import Tensor, nn
from torch.testing import assert_close

from pyro_subnet import AutoSubnetLaplace
from pyro_subnet.nn import bayesianize

EQUAL = {"rtol": 0.0, "atol": 0.0}
N, D = 7, 3
KEY = "AutoSubnetLaplace.loc"


pytestmark = pytest.mark.usefixtures("no_guides_of_other_tests")


def data(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.randn(N, D, dtype=dtype), torch.randn(N, dtype=dtype)


def model(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(x.new_zeros(D), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 0.3), obs=y)


def at(value: float) -> Callable[..., Any]:
    return init_to_value(values={"w": torch.full((D,), value, dtype=torch.float64)})


def train(guide: Any, x: Tensor, y: Tensor, steps: int = 3) -> Tensor:
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    for _ in range(steps):
        svi.step(x, y)
    return guide.loc.detach().clone()


def ask(guide: AutoSubnetLaplace, way: str, x: Tensor, y: Tensor) -> Tensor:
    """Its values, by a first call of either kind."""
    if way == "call":
        guide(x, y)
        return guide.median()["w"]
    return guide.laplace_approximation(x, y).median()["w"]


WAYS = ["call", "approximation"]


@pytest.mark.parametrize("way", WAYS)
def test_what_was_asked_for_is_used_though_a_guide_left_its_own(way: str) -> None:
    x, y = data()
    guide = AutoSubnetLaplace(model)
    train(guide, x, y)
    del guide
    gc.collect()
    for value in (2.0, 3.0):
        again = AutoSubnetLaplace(model, init_loc_fn=at(value))
        assert_close(ask(again, way, x, y), torch.full((D,), value).double(), **EQUAL)
        before = again.loc.detach().clone()
        assert not torch.equal(train(again, x, y), before)  # what is trained is its own
        assert list(pyro.get_param_store().keys()) == [KEY]
        del again
        gc.collect()


@pytest.mark.parametrize("way", WAYS)
def test_without_a_function_a_guide_goes_on_as_pyros_do(way: str) -> None:
    x, y = data()
    guide = AutoSubnetLaplace(model)
    left = train(guide, x, y)
    del guide
    gc.collect()
    assert_close(ask(AutoSubnetLaplace(model), way, x, y), left, **EQUAL)


def reload_by_file(path: Path) -> None:
    store = pyro.get_param_store()
    store.load(str(path))


def reload_by_state(path: Path) -> None:
    state = torch.load(path, weights_only=False)
    pyro.get_param_store().set_state(state)


def reload_by_item(path: Path) -> None:
    state = torch.load(path, weights_only=False)
    pyro.get_param_store()[KEY] = state["params"][KEY].detach().clone()


@pytest.mark.parametrize("live_first", [False, True])
@pytest.mark.parametrize("cleared", [False, True])
@pytest.mark.parametrize("reload", [reload_by_file, reload_by_state, reload_by_item])
def test_a_store_that_is_loaded_back_reaches_every_guide(
    reload: Callable[[Path], None], cleared: bool, live_first: bool, tmp_path: Path
) -> None:
    x, y = data()
    guide = AutoSubnetLaplace(model)
    wanted = train(guide, x, y)
    pyro.get_param_store().save(str(tmp_path / "store"))
    assert not torch.equal(train(guide, x, y), wanted)
    if cleared:
        pyro.clear_param_store()
    reload(tmp_path / "store")
    if live_first:
        found = guide.laplace_approximation(x, y).median()["w"]
        assert_close(found, wanted, **EQUAL)
    new = AutoSubnetLaplace(model)
    new(x, y)
    told = AutoSubnetLaplace(model, init_loc_fn=at(5.0))
    told(x, y)
    assert_close(new.loc.detach(), wanted, **EQUAL)
    assert_close(guide.loc.detach(), wanted, **EQUAL)
    assert_close(told.median()["w"], torch.full((D,), 5.0).double(), **EQUAL)
    # each trains what is its own
    assert not torch.equal(train(guide, x, y), wanted)
    assert_close(new.loc.detach(), wanted, **EQUAL)
    assert not torch.equal(train(new, x, y), wanted)


def test_a_guide_made_beside_a_live_one_does_not_start_at_it() -> None:
    x, y = data()
    guide = AutoSubnetLaplace(model)
    trained = train(guide, x, y)
    beside = AutoSubnetLaplace(model)
    beside(x, y)
    assert not torch.equal(beside.loc.detach(), trained)


def test_a_bayesianized_network_starts_at_its_own_weights() -> None:
    net = nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    bnn = bayesianize(net)

    def of_network(x: Tensor, y: Tensor | None = None) -> None:
        f = bnn(x).squeeze(-1)
        noise = pyro.sample("noise", dist.LogNormal(x.new_zeros(()), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(f, noise), obs=y)

    x, y = data()
    posterior = AutoSubnetLaplace(of_network).laplace_approximation(x, y)
    loc = posterior.output_distribution(x).loc
    assert_close(loc[:, :1], net(x).detach(), rtol=1e-12, atol=1e-12)


# ----------------------------------------------------------------------------------
# Copies.


def through_pickle(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


def through_torch(value: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def called(guide: Any, x: Tensor, y: Tensor) -> None:
    guide(x, y)


def fitted(guide: Any, x: Tensor, y: Tensor) -> None:
    guide.laplace_approximation(x, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("copied", [through_pickle, through_torch, copy.deepcopy])
@pytest.mark.parametrize("state", [called, train, fitted])
def test_a_guide_is_copied_whatever_was_done_with_it(
    state: Callable[..., Any], copied: Callable[[Any], Any], dtype: torch.dtype
) -> None:
    x, y = data(dtype)
    guide = AutoSubnetLaplace(model)
    state(guide, x, y)
    before = guide.loc.detach().clone()
    back = copied(guide)
    assert_close(back.loc.detach(), before, **EQUAL)
    # both train, each its own
    assert not torch.equal(train(guide, x, y), before)
    assert_close(back.loc.detach(), before, **EQUAL)
    kept = guide.loc.detach().clone()
    assert not torch.equal(train(back, x, y), before)
    assert_close(guide.loc.detach(), kept, **EQUAL)
    precision = guide.laplace_approximation(x, y).get_posterior().precision_matrix
    right = x.mT @ x / 0.09 + torch.eye(D, dtype=dtype)
    assert_close(precision, right)


def test_a_list_of_guides_is_pickled() -> None:
    x, y = data()
    guide = AutoGuideList(model)
    guide.append(AutoSubnetLaplace(model))
    train_list = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    train_list.step(x, y)
    back = through_pickle(guide)
    assert_close(back[0].loc.detach(), guide[0].loc.detach(), **EQUAL)
