"""What beginners ask for, and the message that each mistake gets."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.testing import assert_close

import pyro_subnet
from pyro_subnet import AutoSubnetLaplace, AutoSubnetMultivariateNormal
from pyro_subnet.exceptions import (
    CheckpointError,
    ModelError,
    OptionError,
    SelectionError,
)
from pyro_subnet.export.inference_data import to_inference_data
from pyro_subnet.nn import bayesianize, init_to_module
from pyro_subnet.selection import LargestVariance, RandomSubnet
from pyro_subnet.sklearn import SubnetLaplaceRegressor
from tests.mistakes.programs import Mistake, Program, as_users_run_it, assert_told

__all__ = ["as_users_run_it"]  # a fixture for this file

SUBNETS: dict[str, tuple[Any, str, type[Exception]]] = {
    "a selector's class": (
        LargestVariance,
        r"got the class LargestVariance\. Make one .*`LargestVariance\(0\.05\)`",
        OptionError,
    ),
    "the last layer by a word": (
        "last_layer",
        r"got 'last_layer'\. .*`LastLayer\(\)` for the last layer",
        OptionError,
    ),
    "a share as text": ("5%", r"got '5%'\. Pass 0\.05 for 5%", OptionError),
    "names of sites": (
        ["weight", "bias"],
        r"got \['weight', 'bias'\]\. .*`Sites\(\[\.\.\.\]\)` for sites",
        OptionError,
    ),
    "positions": ([0, 1], r"got \[0, 1\]\. Pass 0\.05", OptionError),
    "a mask without a site": (
        torch.ones(4, dtype=torch.bool),
        r"a mapping from sites to masks .*; got tensor.*\. Pass 0\.05",
        OptionError,
    ),
    "the network": (nn.Linear(3, 1), r"got Linear\(.*\)\. Pass 0\.05", OptionError),
    "a truth": (True, r"got True\. Pass 0\.05", OptionError),
    "a truth of NumPy's": (np.True_, r"got np\.True_\. Pass 0\.05", OptionError),
    "none": (0, r"a positive int .*; got 0\. Pass 0\.05", SelectionError),
    "a negative number": (-3, r"a positive int .*; got -3\. Pass 0", SelectionError),
    "percents": (5.0, r"a float in \(0, 1\] .*; got 5\.0\. Pass 0", SelectionError),
    "not a number": (math.nan, r"a float in .*; got nan\. Pass 0", SelectionError),
    "more than there are": (
        5,
        r"at most the number of latent parameters, 4; got 5\. Pass a share",
        SelectionError,
    ),
    "a site by a word": (
        {"weight": "all"},
        r"site 'weight' must be a bool mask or flat positions; got 'all'\. Pass `Sites",
        SelectionError,
    ),
    "a site by None": (
        {"weight": None},
        r"site 'weight' must be a bool mask or flat .*; got None\. Pass `Sites\(\['we",
        SelectionError,
    ),
    "a selector of the guide alone": (
        lambda guide: None,
        r"must take the guide and the data, .*; got \(guide\)\. Give it these two",
        OptionError,
    ),
    "a selector of three arguments": (
        lambda guide, data, size: None,
        r"must take the guide and the data, .*; got \(guide, data, size\)\. Give it",
        OptionError,
    ),
    "an unknown site": (
        {"fc1.weight": torch.tensor([0])},
        r"one of \['weight', 'bias'\]; got 'fc1\.weight'\. Check the spelling",
        SelectionError,
    ),
}


@pytest.mark.parametrize("name", SUBNETS)
def test_a_mistaken_subnet_is_told(name: str) -> None:
    subnet, message, kind = SUBNETS[name]
    assert_told(lambda p: p.posterior(subnet), message, kind)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (np.int64(3), 3),
        (np.uint8(3), 3),
        (np.float64(0.5), 0.5),
        (np.float32(0.5), 0.5),
        (lambda: LargestVariance(np.int32(3)), LargestVariance(3)),
        (lambda: RandomSubnet(np.float32(0.5)), RandomSubnet(0.5)),
    ],
)
def test_numbers_of_numpys_are_numbers(given: Any, meant: Any) -> None:
    p, given = Program(), given() if callable(given) else given
    found, expected = (p.posterior(subnet).subnet for subnet in (given, meant))
    assert_close(found.flat, expected.flat)


MADE: dict[str, tuple[Mistake, str, type[Exception]]] = {
    "a model's name": (
        lambda p: AutoSubnetLaplace("model"),
        r"`model` must be a Pyro model: .*; got 'model'\. The order is",
        OptionError,
    ),
    "subnet and model swapped": (
        lambda p: AutoSubnetLaplace(0.05, p.model),
        r"`model` must be .*; got 0\.05\. The order is `AutoSubnetLaplace\(model, sub",
        OptionError,
    ),
    "bayesianize itself": (
        lambda p: AutoSubnetLaplace(bayesianize),
        r"got the function bayesianize\. Pass a model that calls `bayesianize\(net\)`",
        OptionError,
    ),
    "a network's class": (
        lambda p: AutoSubnetLaplace(nn.Linear),
        r"got the class Linear\. Make one of the class, such as `Linear\(\)`",
        OptionError,
    ),
    "a guide as the model": (
        lambda p: AutoSubnetLaplace(p.guide()),
        r"got an AutoSubnetLaplace\. Pass the model that the guide was made for",
        OptionError,
    ),
    "a start at a network": (
        lambda p: p.guide(init_loc_fn=p.net),
        r"`init_loc_fn` must be .*; got Linear.*Pass `init_to_module\(net\)`",
        OptionError,
    ),
    "a start at values": (
        lambda p: p.guide(init_loc_fn={"weight": torch.zeros(1, 3)}),
        r"`init_loc_fn` must be .*; got \{'weight'.*Pass `init_to_value\(values=",
        OptionError,
    ),
    "a start at a tensor": (
        lambda p: p.guide(init_loc_fn=torch.zeros(4)),
        r"`init_loc_fn` must be .*; got tensor.*Leave it out",
        OptionError,
    ),
    "an unknown curvature": (
        lambda p: p.guide(curvature="fisher"),
        r"`curvature` must be one of 'ggn', .*; got 'fisher'\. Leave it out",
        OptionError,
    ),
    "an unknown covariance": (
        lambda p: p.guide(covariance="diagonal"),
        r"`covariance` must be one of 'full', .*; got 'diagonal'\. Leave it out",
        OptionError,
    ),
    "an unknown form": (
        lambda p: p.guide(form="dense"),
        r"`form` must be one of 'auto', .*; got 'dense'\. Leave it out",
        OptionError,
    ),
    "a distribution as the prior's scale": (
        lambda p: bayesianize(p.net, dist.Normal(0.0, 1.0)),
        r"`prior_scale` must be a number, .*; got a distribution\. Pass `prior=lambda",
        OptionError,
    ),
    "a distribution as the prior": (
        lambda p: bayesianize(p.net, prior=dist.Normal(0.0, 1.0)),
        r"`prior` a function .*; got a distribution\. Pass `prior=lambda",
        OptionError,
    ),
    "a prior of another shape": (
        lambda p: bayesianize(p.net, prior=lambda name, w: dist.Normal(0.0, 1.0)),
        r"prior of parameter 'weight' must have its shape, \(1, 3\); got \(\)\. Use",
        OptionError,
    ),
    "a prior that is a number": (
        lambda p: bayesianize(p.net, prior=lambda name, w: 1.0),
        r"prior of parameter 'weight' must be a distribution; got 1\.0\. Return one",
        OptionError,
    ),
    "a scale as text": (
        lambda p: bayesianize(p.net, "1.0"),
        r"`prior_scale` must be positive and finite.*; got '1\.0'\. Pass 1\.0",
        OptionError,
    ),
    "a scale of zero": (
        lambda p: bayesianize(p.net, 0),
        r"`prior_scale` must be positive and finite.*; got 0\. Pass 1\.0",
        OptionError,
    ),
    "a function made Bayesian": (
        lambda p: bayesianize(p.model),
        r"`net` must be a `torch\.nn\.Module` .*; got the function model\. Pass the",
        OptionError,
    ),
    "a network made Bayesian twice": (
        lambda p: bayesianize(p.bnn),
        r"that is not Bayesian yet; got .*\. Pass the network itself",
        OptionError,
    ),
    "a network without parameters": (
        lambda p: bayesianize(nn.Tanh()),
        r"must have a parameter with `requires_grad=True` .*; got none\.",
        ModelError,
    ),
    "a start at a state dict": (
        lambda p: init_to_module(p.net.state_dict()),  # type: ignore[arg-type]
        r"`net` must be a torch\.nn\.Module; got OrderedDict\. Pass the trained",
        OptionError,
    ),
}


@pytest.mark.parametrize("name", MADE)
def test_a_mistake_in_making_is_told_before_the_model_runs(name: str) -> None:
    mistake, message, kind = MADE[name]
    assert_told(mistake, message, kind)


ASKED: dict[str, tuple[Mistake, str, type[Exception]]] = {
    "an unknown link": (
        lambda p: p.posterior().predictive_distribution(p.x, link="softmax"),
        r"`link` must be one of 'exact', 'mc' for Normal; got 'softmax'\. Pass one",
        OptionError,
    ),
    "an unknown site": (
        lambda p: p.posterior().predictive_distribution(p.x, site="z"),
        r"`site` must name an observed site, .*\['y'\]; got 'z'\. Pass one",
        ModelError,
    ),
    "half a draw": (
        lambda p: p.posterior().predictive_distribution(p.x, num_samples=2.5),
        r"`num_samples` must be at least 1; got 2\.5\. Pass a whole number",
        OptionError,
    ),
    "draws as text": (
        lambda p: p.posterior().predictive_distribution(p.x, num_samples="9"),
        r"`num_samples` must be at least 1; got '9'\. Pass a whole",
        OptionError,
    ),
    "inputs before the number of draws": (
        lambda p: p.posterior().sample_functions(p.x, 3),
        r"`num_samples` must be at least 1; got a Tensor\. Pass a whole",
        OptionError,
    ),
    "a seed as the generator": (
        lambda p: p.posterior().predictive_distribution(p.x, generator=0),
        r"`generator` must be a `torch\.Generator`; got 0\. Pass `torch\.Gen",
        OptionError,
    ),
    "no prior precision": (
        lambda p: p.posterior().with_prior_precision(None),
        r"`scale` must be a number; got None\. Pass 1\.0 for the model's own prior",
        OptionError,
    ),
    "a negative prior precision": (
        lambda p: p.posterior().with_prior_precision(-1),
        r"`scale` must be positive and finite; got -1\.0\. Pass 1\.0",
        OptionError,
    ),
    "a prior precision by a word": (
        lambda p: p.posterior().with_prior_precision("auto"),
        r"`scale` must be a number, a mapping, or 'fraction'; got 'auto'\. Pass 1\.0",
        OptionError,
    ),
    "a site's prior precision as text": (
        lambda p: p.posterior().with_prior_precision({"weight": "2"}),
        r"`scale\['weight'\]` must be a number; got '2'\. Pass 1\.0",
        OptionError,
    ),
    "noise as text": (
        lambda p: p.posterior().with_noise_scale("2"),
        r"`scale` must be a number; got '2'\. Pass 1\.0 for the model's own noise",
        OptionError,
    ),
    "no noise": (
        lambda p: p.posterior().with_noise_scale(0),
        r"`scale` must be positive and finite; got 0\.0\. Pass 1\.0",
        OptionError,
    ),
    "an unknown way to tune": (
        lambda p: p.posterior().tune_prior_precision("gridsearch"),
        r"`method` must be 'evidence' or 'nll'; got 'gridsearch'\. Leave it out",
        OptionError,
    ),
    "held-out data without a method": (
        lambda p: p.posterior().tune_prior_precision(val=(p.x, p.y)),
        r"`val` must be given for method='nll', .*; got method='evidence' .*Pass held",
        OptionError,
    ),
    "bounds that are a number": (
        lambda p: p.posterior().tune_prior_precision(bounds=3),
        r"`bounds` must be positive, finite and in order; got 3\. Pass \(1e-6, 1e6\)",
        OptionError,
    ),
    "bounds as text": (
        lambda p: p.posterior().tune_prior_precision(bounds=("1", "2")),
        r"`bounds` must be a number; got '1'\. Pass \(1e-6, 1e6\)",
        OptionError,
    ),
    "forgetting as text": (
        lambda p: p.posterior().update(p.x, p.y, forgetting="all"),
        r"`forgetting` must be a number; got 'all'\. Pass 1\.0",
        OptionError,
    ),
    "one quantile": (
        lambda p: p.posterior().quantiles(0.5),
        r"`quantiles` must be a list of numbers in \[0, 1\]; got 0\.5\. Pass \[0\.05",
        OptionError,
    ),
    "quantiles in percent": (
        lambda p: p.posterior().quantiles([5, 95]),
        r"`quantiles` must be a list of numbers in \[0, 1\]; got \[5, 95\]\. Pass",
        OptionError,
    ),
    "a file every no batches": (
        lambda p: p.guide().laplace_approximation_from(
            p.loader, checkpoint="fit", checkpoint_every=0
        ),
        r"`checkpoint_every` must be a positive count of batches; got 0\. Leave it",
        OptionError,
    ),
    "a folder to save to": (
        lambda p: p.posterior().save("."),
        r"`path` must be that of a regular file.*; got the directory '\.'\. Pass the",
        CheckpointError,
    ),
    "no path to save to": (
        lambda p: p.posterior().save(None),
        r"`path` must be a str or a `pathlib\.Path`; got None\. Name a file",
        CheckpointError,
    ),
    "a foreign file": (
        lambda p: AutoSubnetMultivariateNormal.load(__file__, p.model, p.x, p.y),
        r"`path` must be that of a file that pyro_subnet wrote; got .*Check the path",
        CheckpointError,
    ),
    "model and path swapped": (
        lambda p: AutoSubnetMultivariateNormal.load(p.model, "fit", p.x, p.y),
        r"`path` must be a str or a `pathlib\.Path`; got the function model\. Name",
        CheckpointError,
    ),
    "the guide to ArviZ": (
        lambda p: to_inference_data(p.guide(), p.x, p.y),
        r"`posterior` must be what `guide\.laplace_approximation` returns; got .*Auto",
        OptionError,
    ),
    "data before the posterior": (
        lambda p: to_inference_data(p.x, p.y),  # type: ignore[arg-type]
        r"`posterior` must be what .* returns; got a Tensor\. Pass it first",
        OptionError,
    ),
    "names of axes without variables": (
        lambda p: to_inference_data(p.posterior(), p.x, p.y, dims=["a"]),  # type: ignore[arg-type]
        r"`dims` must be a mapping from variables .*; got \['a'\]\. Pass `\{'y'",
        OptionError,
    ),
    "axes that are a number": (
        lambda p: to_inference_data(p.posterior(), p.x, p.y, dims={"y": 3}),  # type: ignore[dict-item]
        r"`dims` must be a mapping from variables .*; got \{'y': 3\}\. Pass",
        OptionError,
    ),
    "axes named by numbers": (
        lambda p: to_inference_data(p.posterior(), p.x, p.y, dims={"y": [3]}),  # type: ignore[list-item]
        r"`dims` must be a mapping from variables .*; got \{'y': \[3\]\}\. Pass",
        OptionError,
    ),
    "an axis that is the draws'": (
        lambda p: to_inference_data(p.posterior(), p.x, p.y, dims={"y": ["draw"]}),
        r"`dims` must name each axis .* neither 'chain' nor 'draw'.*; got \['draw'\]\.",
        OptionError,
    ),
    "labels without axes": (
        lambda p: to_inference_data(p.posterior(), p.x, p.y, coords=["a"]),  # type: ignore[arg-type]
        r"`coords` must be a mapping from names of axes .*; got \['a'\]\. Pass",
        OptionError,
    ),
    "labels that are a number": (
        lambda p: to_inference_data(p.posterior(), p.x, p.y, coords={"y_dim_0": 3}),
        r"`coords` must be a mapping from names of axes .*; got \{'y_dim_0': 3\}\.",
        OptionError,
    ),
    "labels of no axis": (
        lambda p: to_inference_data(p.posterior(), p.x, p.y, coords={"row": [1]}),
        r"`coords` must label axes .*'y_dim_0'.*; got 'row'\. Name axes with `dims=`",
        OptionError,
    ),
    "too few labels": (
        lambda p: to_inference_data(p.posterior(), p.x, p.y, coords={"y_dim_0": [1]}),
        r"`coords` of 'y_dim_0' must have one label .* 6 elements .*; got 1\. Pass 6",
        OptionError,
    ),
    "a site by its number": (
        lambda p: to_inference_data(p.posterior(), p.x, p.y, sites=3),  # type: ignore[arg-type]
        r"`sites` must be names of latent sites; got 3\. Pass `\['fc1\.weight'\]`",
        OptionError,
    ),
    "a site by a prefix": (
        lambda p: to_inference_data(p.posterior(), p.x, p.y, sites="w"),
        r"`sites` must be latent sites .* of \['weight', 'bias'\]; got 'w'\. Leave",
        SelectionError,
    ),
    "a seed as text": (
        lambda p: to_inference_data(p.posterior(), p.x, p.y, seed="1"),  # type: ignore[arg-type]
        r"`seed` must be a whole number; got '1'\. Pass 0, say, or leave it out",
        OptionError,
    ),
    "a subnet's seed as text": (
        lambda p: RandomSubnet(0.5, seed="1"),  # type: ignore[arg-type]
        r"`seed` must be a whole number; got '1'\. Pass 0, say",
        SelectionError,
    ),
    "a fraction of the inputs as a group": (
        lambda p: p.posterior().output_distribution(p.x, joint=1.5),  # type: ignore[arg-type]
        r"`joint` must be a bool, or a number that divides .*; got 1\.5\. Pass the",
        OptionError,
    ),
    "a group as text": (
        lambda p: p.posterior().predictive_distribution(p.x, joint="yes"),  # type: ignore[arg-type]
        r"`joint` must be a bool, or a number that divides .*; got 'yes'\. Pass the",
        OptionError,
    ),
    "one number as hidden layers": (
        lambda p: SubnetLaplaceRegressor(network=50).fit(p.x, p.y),  # type: ignore[arg-type]
        r"a module or sizes of hidden layers; got 50\. Pass \(50, 50\), say",
        OptionError,
    ),
    "no hidden layers": (
        lambda p: SubnetLaplaceRegressor(network=None).fit(p.x, p.y),  # type: ignore[arg-type]
        r"a module or sizes of hidden layers; got None\. Pass",
        OptionError,
    ),
    "no share of held-out rows": (
        lambda p: SubnetLaplaceRegressor(validation_fraction=None).fit(p.x, p.y),  # type: ignore[arg-type]
        r"`validation_fraction` must be a number; got None\. Pass 0\.1",
        OptionError,
    ),
    "a batch size as text": (
        lambda p: SubnetLaplaceRegressor(batch_size="8").fit(p.x, p.y),  # type: ignore[arg-type]
        r"at least 1, or None for one batch; got '8'\. Pass a whole number",
        OptionError,
    ),
    "standard errors as text": (
        lambda p: p.posterior().tune_prior_precision(
            "nll", val=(p.x, p.y), standard_errors="2"
        ),
        r"`standard_errors` must be a number; got '2'\. Pass 2",
        OptionError,
    ),
    "chains as text": (
        lambda p: to_inference_data(p.posterior(), p.x, p.y, chains="2"),  # type: ignore[arg-type]
        r"`chains` must be positive and divide .*; got chains='2' and num_samples=1000",
        OptionError,
    ),
}


@pytest.mark.parametrize("name", ASKED)
def test_a_mistaken_option_is_told(name: str) -> None:
    mistake, message, kind = ASKED[name]
    assert_told(mistake, message, kind)


def test_a_site_and_a_seed_are_taken_as_they_are_meant() -> None:
    p = Program()
    posterior = p.posterior()
    found = to_inference_data(
        posterior, p.x, p.y, num_samples=4, sites="weight", seed=np.int64(1)
    )
    expected = to_inference_data(
        posterior, p.x, p.y, num_samples=4, sites=["weight"], seed=1
    )
    assert list(found.posterior.data_vars) == ["weight"]
    weights = (torch.as_tensor(d.posterior.weight.values) for d in (found, expected))
    assert_close(*weights)
    assert found.posterior.attrs["seed"] == 1


def test_a_batch_size_of_numpys() -> None:
    """As a grid search gives it."""
    p, fast = Program(), {"prior_scale": 1.0, "num_epochs": 20, "random_state": 0}
    found, expected = (
        SubnetLaplaceRegressor(batch_size=size, **fast).fit(p.x, p.y).predict(p.x)
        for size in (np.int64(4), 4)
    )
    assert_close(torch.as_tensor(found), torch.as_tensor(expected))


def test_a_subnet_of_numpys_seed() -> None:
    p = Program()
    found, expected = (
        AutoSubnetLaplace(p.model, RandomSubnet(0.5, seed=seed))
        .laplace_approximation(p.x, p.y)
        .subnet.flat
        for seed in (np.int64(3), 3)
    )
    assert torch.equal(found, expected)


# ----------------------------------------------------------------------------------
# Names in the wrong place.


@pytest.mark.parametrize(
    "name",
    ["predictive_distribution", "update", "save", "load", "subnet", "linearized_model"],
)
def test_what_is_the_posteriors_is_not_the_guides(name: str) -> None:
    message = rf"`{name}` must be asked of a posterior; .*guide\.laplace_approx.* first"
    assert_told(lambda p: getattr(p.guide(), name), message, AttributeError)
    assert not hasattr(Program().guide(), name)


@pytest.mark.parametrize(
    "ask",
    [
        lambda guide: guide.loc,
        lambda guide: guide.median(),
        lambda guide: guide.quantiles([0.5]),
        lambda guide: guide.get_posterior(),
        lambda guide: guide.layout,
        lambda guide: guide.latents,
    ],
)
def test_what_waits_for_the_first_call_says_so(ask: Any) -> None:
    message = r"must wait for the guide's first call.*; got none so far\. Train it"
    assert_told(lambda p: ask(p.guide()), message, AttributeError)


@pytest.mark.parametrize(
    ("name", "home"),
    [
        ("bayesianize", "nn"),
        ("LargestVariance", "selection"),
        ("DataError", "exceptions"),
        ("LastLayer", "selection"),
    ],
)
def test_a_name_that_lives_elsewhere_is_told_where(name: str, home: str) -> None:
    message = rf"no attribute '{name}'; it is in `pyro_subnet\.{home}`\. Import it"
    with pytest.raises(AttributeError, match=message):
        getattr(pyro_subnet, name)
    with pytest.raises(ImportError, match=message):
        exec(f"from pyro_subnet import {name}")
    assert not hasattr(pyro_subnet, name)


def test_a_name_that_lives_nowhere_is_told_as_ever() -> None:
    with pytest.raises(AttributeError, match=r"has no attribute 'SubnetPosterior'$"):
        pyro_subnet.SubnetPosterior  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'SubnetPosterior'"):
        exec("from pyro_subnet import SubnetPosterior")
