"""What beginners pass as data, and the message that each mistake gets."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule, PyroSample
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from pyro_subnet import AutoSubnetLaplace, AutoSubnetMultivariateNormal
from pyro_subnet.diagnostics import importance_check
from pyro_subnet.exceptions import (
    CheckpointError,
    DataError,
    ModelError,
    OptionError,
)
from pyro_subnet.nn import bayesianize, init_to_module
from tests.mistakes.programs import Mistake, Program, as_users_run_it, assert_told
from tests.tolerances import tolerance

__all__ = ["as_users_run_it"]  # a fixture for this file

NORMAL = dist.Normal(0.0, 1.0)


def load(p: Program, *data: Any) -> Any:
    p.posterior().save("posterior.safetensors")
    return AutoSubnetMultivariateNormal.load("posterior.safetensors", p.model, *data)


def load_without_a_latent_site(p: Program) -> Any:
    p.posterior().save("posterior.safetensors")
    return AutoSubnetMultivariateNormal.load(
        "posterior.safetensors", lambda x: pyro.sample("y", NORMAL, obs=x[0, 0]), p.x
    )


class InThePlate(PyroModule):
    """Calls its network inside the plate, where Pyro gives each row its own weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = PyroModule[nn.Linear](3, 1)
        self.layer.weight = PyroSample(dist.Normal(0.0, torch.ones(1, 3)).to_event(2))

    def forward(self, x: Tensor, y: Tensor | None = None) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(self.layer(x).squeeze(-1), 0.5), obs=y)


def one_by_one(p: Program) -> Any:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        mean = p.bnn(x).squeeze(-1)
        for i in pyro.plate("rows", len(x)):
            obs = None if y is None else y[i]
            pyro.sample(f"y_{i}", dist.Normal(mean[i], 0.5), obs=obs)

    return AutoSubnetLaplace(model)


def holed(x: Tensor, value: float) -> Tensor:
    return torch.cat([x[:-1], torch.full_like(x[-1:], value)])


def takes_a_loader(p: Program) -> Any:
    return p.posterior().predictive_distribution(p.loader)


DATA: dict[str, tuple[Mistake, str, type[Exception]]] = {
    "the model as data": (
        lambda p: p.guide()(p.model),
        r"must be the model's data: .*got \(function\).*Pass the data alone",
        DataError,
    ),
    "the network as data": (
        lambda p: p.guide().laplace_approximation(p.net),
        r"must be the model's data: .*got \(Linear\).*Pass the data alone",
        DataError,
    ),
    "the model before the data": (
        lambda p: p.guide().laplace_approximation(p.model, p.x, p.y),
        r"own arguments, \(x, y=None\); got \(function, torch\.float32 \[6, 3\]",
        DataError,
    ),
    "x and y swapped": (
        lambda p: p.guide().laplace_approximation(p.y, p.x),
        r"must run on the data; got \(torch\.float32 \[6\], .*Check their order",
        DataError,
    ),
    "inputs of another width": (
        lambda p: p.posterior().predictive_distribution(p.x[:, :2]),
        r"must run on the data; got \(torch\.float32 \[6, 2\].*Check th",
        DataError,
    ),
    "no data at all": (
        lambda p: p.guide().laplace_approximation(),
        r"with its own arguments, \(x, y=None\); got \(\) .*such as `\(x, y\)`",
        DataError,
    ),
    "a wrong keyword": (
        lambda p: p.guide().laplace_approximation(p.x, target=p.y),
        r"own arguments, \(x, y=None\); got \(torch\.float32 \[6, 3\], target=torch",
        DataError,
    ),
    "holes in the inputs of the first call": (
        lambda p: p.guide()(holed(p.x, math.nan), p.y),
        r"Inputs must be finite; got 3 NaN or inf of 18 values of `x` .*Leave such",
        DataError,
    ),
    "holes in an input by keyword": (
        lambda p: p.guide().laplace_approximation(y=p.y, x=holed(p.x, math.nan)),
        r"Inputs must be finite; got 3 NaN or inf of 18 values of `x` .*Leave such",
        DataError,
    ),
    "infinite inputs": (
        lambda p: p.guide().laplace_approximation(holed(p.x, math.inf), p.y),
        r"Inputs must be finite; got 3 NaN or inf of 18 values of `x` .*Leave such",
        DataError,
    ),
    "a network called in the plate": (
        lambda p: AutoSubnetLaplace(InThePlate())(p.x, p.y),
        r"outside of the plate over the data.*'layer\.weight' in plate 'data', and th"
        r"en: t\(\) .*call the network before the plate",
        ModelError,
    ),
    "targets forgotten, observation by observation": (
        lambda p: one_by_one(p).laplace_approximation(p.x),
        r"outside of sequential plates.*site 'y_0' in plate 'rows', without data \(no "
        r"value came for `y`\)\. Pass the data",
        ModelError,
    ),
    "no rows": (
        lambda p: p.guide().laplace_approximation(p.x[:0], p.y[:0]),
        r"at least one row; got \(torch\.float32 \[0, 3\].*Check what was filtered",
        DataError,
    ),
    "float64 inputs": (
        lambda p: p.guide().laplace_approximation(p.x.double(), p.y),
        r"network's dtype, likely torch\.float32.*got \(torch\.float64 .*Convert",
        DataError,
    ),
    "float64 inputs of a prediction": (
        lambda p: p.posterior().predictive_distribution(p.x.double()),
        r"network's dtype, likely torch\.float32.*got \(torch\.float64 .*Convert",
        DataError,
    ),
    "integer inputs": (
        lambda p: p.guide().laplace_approximation(p.x.long(), p.y),
        r"network's dtype, .*got \(torch\.int64 .*Convert inputs with `\.to\(torch",
        DataError,
    ),
    "boolean inputs": (
        lambda p: p.posterior().output_distribution(p.x > 0),
        r"network's dtype, .*got \(torch\.bool .*Convert inputs with `\.to\(torch",
        DataError,
    ),
    "another device": (
        lambda p: p.guide().laplace_approximation(p.x.to("meta"), p.y),
        r"on the model's device, cpu; got .* on meta.*Move them with `\.to\('cpu'\)`",
        DataError,
    ),
    "another device in a prediction": (
        lambda p: p.posterior().sample_functions(2, p.x.to("meta")),
        r"on the model's device, cpu; got .* on meta.*Move them with `\.to\('cpu'\)`",
        DataError,
    ),
    "a list of numbers": (
        lambda p: p.guide().laplace_approximation(p.x.tolist(), p.y),
        r"must be tensors, or NumPy arrays; got \(list, .*Convert them with `torch\.as",
        DataError,
    ),
    "text": (
        lambda p: p.guide().laplace_approximation("train.csv", p.y),
        r"must be tensors, or NumPy arrays; got \(str, .*Convert them",
        DataError,
    ),
    "an array of objects": (
        lambda p: p.guide().laplace_approximation(np.array([["a"]], object), p.y),
        r"must be numbers; got a ndarray of dtype object\. Encode text",
        DataError,
    ),
    "a frame with text": (
        lambda p: p.guide().laplace_approximation(pd.DataFrame({"a": ["b"]}), p.y),
        r"must be numbers; got a DataFrame of dtype .*\. Encode text",
        DataError,
    ),
    "a loader where one call is made": (
        takes_a_loader,
        r"one call must be tensors, and no DataLoader; .* or call this for each batch",
        DataError,
    ),
    "a data set where one call is made": (
        lambda p: p.posterior().predictive_distribution(p.loader.dataset),
        r"must be tensors, and no TensorDataset; .* or call this for each batch",
        DataError,
    ),
    "one call's data as batches": (
        lambda p: p.guide().laplace_approximation_from((p.x, p.y)),
        r"must be an iterable of batches.*; got a tuple of tensors.*\[\(x, y\)\]",
        DataError,
    ),
    "a tensor as batches": (
        lambda p: p.guide().laplace_approximation_from(p.x),
        r"iterable of batches.*; got a Tensor of shape \(6, 3\).*Pass a DataLoader",
        DataError,
    ),
    "an array as batches": (
        lambda p: p.guide().laplace_approximation_from(p.x.numpy()),
        r"iterable of batches.*; got a ndarray of shape \(6, 3\).*Pass a DataLoader",
        DataError,
    ),
    "a data set as batches": (
        lambda p: p.guide().laplace_approximation_from(p.loader.dataset),
        r"iterable of batches.*; got a TensorDataset, whose items are single data",
        DataError,
    ),
    "a path as batches": (
        lambda p: p.guide().laplace_approximation_from("train"),
        r"iterable of batches.*; got a str\. Pass a DataLoader",
        DataError,
    ),
    "no batches": (
        lambda p: p.guide().laplace_approximation_from(None),
        r"iterable of batches.*; got a NoneType\. Pass a DataLoader",
        DataError,
    ),
    "one batch's mapping as batches": (
        lambda p: p.guide().laplace_approximation_from({"x": p.x, "y": p.y}),
        r"iterable of batches.*; got a dict\. Pass a DataLoader",
        DataError,
    ),
    "an empty loader": (
        lambda p: p.guide().laplace_approximation_from([]),
        r"must hold at least one batch; got none\. Check the loader",
        DataError,
    ),
    "an empty loader of new data": (
        lambda p: p.posterior().update_from([]),
        r"must hold at least one batch; got none\. Check the loader",
        DataError,
    ),
    "an empty loader of held-out data": (
        lambda p: p.posterior().tune_prior_precision("nll", val=iter([])),
        r"must hold at least one batch; got none\. Check the loader",
        DataError,
    ),
    "an empty list of held-out data": (
        lambda p: p.posterior().tune(val=[]),
        r"`val` must hold observations; got an empty list\. Pass what training takes",
        DataError,
    ),
    "no held-out data for the evidence": (
        lambda p: p.guide().train_by_evidence([(p.x, p.y)], num_epochs=1, val={}),
        r"`val` must hold observations; got an empty dict\. Pass what training takes",
        DataError,
    ),
    "held-out data without targets": (
        lambda p: p.posterior().tune_prior_precision("nll", val=p.x),
        r"`val` must hold observations; got none at site 'y'\. Pass what training",
        DataError,
    ),
    "fewer observations than inputs": (
        lambda p: p.posterior().predictive_error(p.y[:4], p.x),
        r"must have batch shape \(4,\), one for each of `y`.*; got \(6,\)\. Pass both",
        DataError,
    ),
    "one observation of many inputs": (
        lambda p: p.posterior().predictive_error(p.y[:1], p.x, link="mc"),
        r"must have batch shape \(1,\), one for each of `y`.*; got \(6,\)\. Pass both",
        DataError,
    ),
    "observations as a column": (
        lambda p: p.posterior().predictive_error(p.y[:, None], p.x),
        r"`y` must have the shape of the predictions, \(6,\); got \(6, 1\)\. Pass",
        DataError,
    ),
    "observations as a list": (
        lambda p: p.posterior().predictive_error(p.y.tolist(), p.x),
        r"`y` must be a tensor; got a list\. Pass `torch\.as_tensor\(y\)`",
        DataError,
    ),
    "fewer observations than draws of weights are judged by": (
        lambda p: importance_check(p.posterior(), p.x, p.y[:4], num_samples=25),
        r"must have the shape of its distribution; got data of shape \(4,\) at",
        ModelError,
    ),
    "draws of weights judged without data": (
        lambda p: importance_check(p.posterior(), p.x, num_samples=25),
        r"training data must be given, .*; got none at site 'y'\. Pass what the fit",
        DataError,
    ),
    "num_data of zero": (
        lambda p: p.guide().laplace_approximation_from(p.loader, num_data=0),
        r"`num_data` must be a positive count; got 0\. Leave it out",
        OptionError,
    ),
    "num_data as a float": (
        lambda p: p.guide().laplace_approximation_from(p.loader, num_data=6.5),
        r"`num_data` must be a positive count; got 6\.5\. Leave it out",
        OptionError,
    ),
    "num_data as text": (
        lambda p: p.posterior().update_from(p.loader, num_data="6"),
        r"`num_data` must be a positive count; got '6'\. Leave it out",
        OptionError,
    ),
    "a network that is not Bayesian": (
        lambda p: AutoSubnetLaplace(p.net).laplace_approximation(p.x),
        r"must have a latent site.*got none\. Make a torch network Bayesian with",
        ModelError,
    ),
    "another model": (
        lambda p: (
            p.posterior()
            .with_model(lambda x: pyro.sample("v", dist.Normal(0.0, 1.0)))
            .predictive_distribution(p.x)
        ),
        r"must have the guide's latent sites in every call; got .* without site 'weigh",
        ModelError,
    ),
}


@pytest.mark.parametrize("name", DATA)
def test_a_mistake_with_data_is_told(name: str) -> None:
    mistake, message, kind = DATA[name]
    assert_told(mistake, message, kind)


def test_data_one_by_one_are_those_of_a_plate() -> None:
    p = Program()
    found = one_by_one(p).laplace_approximation(p.x, p.y)
    close = tolerance(torch.float32, "reordered")
    assert_close(covariance(found), covariance(p.posterior()), **close)


def test_a_file_is_loaded_with_the_models_data(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert_told(
        load,
        r"with its own arguments, \(x, y=None\); got \(\) .*such as `\(x, y\)`",
        DataError,
    )
    assert_told(
        load_without_a_latent_site,
        r"must be the one of the file, .*\['weight', 'bias'\]; got one without ",
        CheckpointError,
    )
    p = Program()
    assert_close(load(p, p.x.numpy(), p.y.numpy()).loc, p.posterior().loc)


# ----------------------------------------------------------------------------------
# What is plain is taken.


def covariance(posterior: Any) -> Tensor:
    return posterior.get_posterior().covariance_matrix


TAKEN: dict[str, Any] = {
    "NumPy arrays": lambda p: (p.x.numpy(), p.y.numpy()),
    "NumPy's float64": lambda p: (p.x.double().numpy(), p.y.double().numpy()),
    "reversed arrays": lambda p: (p.x.flip(0).numpy()[::-1], p.y.flip(0).numpy()[::-1]),
    "a frame and a series": lambda p: (
        pd.DataFrame(p.x.double().numpy()),
        pd.Series(p.y.numpy()),
    ),
}


@pytest.mark.parametrize("name", TAKEN)
def test_arrays_are_taken_as_tensors(name: str) -> None:
    p = Program()
    x, y = TAKEN[name](p)
    right = p.posterior()
    fits = [
        p.guide().laplace_approximation(x, y),
        p.guide().laplace_approximation_from([(x, y)]),
        p.guide().laplace_approximation_from([{"x": x, "y": y}]),
    ]
    for found in fits:
        assert_close(covariance(found), covariance(right))
    expected = right.predictive_distribution(p.x)
    assert_close(right.predictive_distribution(x).stddev, expected.stddev)
    error = right.predictive_error(y, x)
    assert_close(error, right.predictive_error(p.y, p.x))
    assert_close(right.update(x, y).loc, right.update(p.x, p.y).loc)
    tuned = right.tune_prior_precision("nll", val=(x, y)).prior_factor
    assert tuned == right.tune_prior_precision("nll", val=(p.x, p.y)).prior_factor


def test_a_model_that_takes_arrays_still_gets_them() -> None:
    def model(x: Any, y: Any = None) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        mean = torch.from_numpy(x) @ w
        with pyro.plate("data", len(x)):
            obs = None if y is None else torch.from_numpy(y)
            pyro.sample("y", dist.Normal(mean, 0.5), obs=obs)

    p = Program()
    found = AutoSubnetLaplace(model).laplace_approximation(p.x.numpy(), p.y.numpy())
    expected = torch.eye(3) + p.x.mT @ p.x / 0.25
    precision = found.get_posterior().precision_matrix
    assert_close(precision, expected, **tolerance(torch.float32, "reordered"))


def test_a_loader_is_taken_where_all_data_are() -> None:
    p = Program()
    right = p.posterior()
    found = p.guide().laplace_approximation(p.loader)
    assert_close(covariance(found), covariance(right))
    more = right.update(p.loader, forgetting=0.5)
    assert_close(covariance(more), covariance(right.update(p.x, p.y, forgetting=0.5)))


@pytest.mark.parametrize("family", ["normal", "classes", "labels"])
def test_held_out_data_in_batches_choose_what_they_do_in_one_call(
    family: str,
) -> None:
    net = nn.Linear(3, 1 if family == "normal" else 4).double()
    bnn = bayesianize(net)

    def model(x: Tensor, y: Tensor | None = None) -> None:
        f = bnn(x)
        found: Any = dist.Normal(f.squeeze(-1), 0.5)
        if family == "classes":
            found = dist.Categorical(logits=f)
        elif family == "labels":
            found = dist.Bernoulli(logits=f).to_event(1)
        with pyro.plate("data", len(x)):
            pyro.sample("y", found, obs=y)

    x = torch.randn(5, 3, dtype=torch.float64)
    y = torch.randn(5, dtype=torch.float64)
    if family != "normal":
        y = torch.randint(4, (5,))
    if family == "labels":
        y = torch.randint(2, (5, 4)).double()
    guide = AutoSubnetLaplace(model, init_loc_fn=init_to_module(net))
    posterior = guide.laplace_approximation(x, y)
    expected = posterior.tune_prior_precision("nll", val=(x, y))
    loader = DataLoader(TensorDataset(x, y), batch_size=2)
    for val in (loader, [*loader], [{"x": x, "y": y}]):
        found = posterior.tune_prior_precision("nll", val=val)
        assert_close(found.tuning.objective, expected.tuning.objective)
        assert found.prior_factor == pytest.approx(expected.prior_factor, rel=1e-5)
