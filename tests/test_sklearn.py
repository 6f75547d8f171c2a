"""Estimators of scikit-learn, by its own checks and against the guide itself."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from numpy.testing import assert_allclose
from sklearn.base import clone
from sklearn.datasets import make_moons
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch import nn

from pyro_subnet.exceptions import OptionError
from pyro_subnet.sklearn import SubnetLaplaceClassifier, SubnetLaplaceRegressor

# Data that are soon learned: most tests are of how estimators behave.
FAST: dict[str, Any] = {
    "network": (5,),
    "num_epochs": 10,
    "lr": 0.3,
    "prior_scale": 1.0,
    "subnet": 10,
    "random_state": 0,
}
# Where the fit would say that weights are far from trained.
TRAINED: dict[str, Any] = {**FAST, "num_epochs": 60, "lr": 0.1}


def refused_by_the_tests_own_types(estimator: Any) -> dict[str, str]:
    """What the tests' run-time checks of annotations refuse before scikit-learn can."""
    return {
        "check_do_not_raise_errors_in_init_or_set_params": "annotations are checked"
    }


@parametrize_with_checks(
    [SubnetLaplaceRegressor(**FAST), SubnetLaplaceClassifier(**FAST)],
    expected_failed_checks=refused_by_the_tests_own_types,
)
def test_checks_of_scikit_learn(estimator: Any, check: Any) -> None:
    with warnings.catch_warnings():
        # Of few, random data, which a network explains badly.
        warnings.simplefilter("ignore")
        check(estimator)


@pytest.mark.parametrize("kind", [SubnetLaplaceRegressor, SubnetLaplaceClassifier])
def test_options_are_looked_at_when_fitting(kind: Any) -> None:
    estimator = kind()
    for name in estimator.get_params():
        estimator.set_params(**{name: -1})
        assert estimator.get_params()[name] == -1


def curve(num_data: int = 120) -> tuple[Any, Any]:
    """Inputs and targets far from zero mean and unit scale."""
    generator = np.random.default_rng(0)
    x = generator.uniform(100.0, 300.0, (num_data, 1))
    y = 5000.0 + 80.0 * np.sin(x[:, 0] / 40) + 8.0 * generator.normal(size=num_data)
    return x, y


def test_a_regression_learns_its_noise_and_widens_beyond_the_data() -> None:
    x, y = curve()
    model = SubnetLaplaceRegressor((20,), subnet=0.5, num_epochs=400, random_state=1)
    model.fit(x, y)
    assert model.score(x, y) > 0.95
    assert 5.0 < model.noise_ < 12.0
    mean, std = model.predict([[200.0], [500.0]], return_std=True)
    assert std[0] < 1.5 * model.noise_
    assert std[1] > 2.0 * std[0]
    # In the units of the data: what the posterior says of standardized inputs.
    posterior = model.posterior_
    at = torch.tensor([[200.0], [500.0]]).double()
    at = (at - x.mean()) / x.std()
    expected = posterior.predictive_distribution(at)
    assert_allclose(mean, expected.mean.numpy() * y.std() + y.mean(), rtol=1e-9)
    assert_allclose(std, expected.stddev.numpy() * y.std(), rtol=1e-9)


def test_several_targets_have_a_noise_each() -> None:
    x, y = curve(60)
    both = np.stack([y, -3.0 * y], 1)
    model = SubnetLaplaceRegressor(**TRAINED).fit(x, both)
    mean, std = model.predict(x[:7], return_std=True)
    assert mean.shape == std.shape == (7, 2)
    assert model.noise_.shape == (2,)
    assert model.noise_[1] == pytest.approx(3 * model.noise_[0])


@pytest.mark.parametrize("num_classes", [2, 3])
def test_labels_of_any_type_and_frames(num_classes: int) -> None:
    x, side = make_moons(90, noise=0.1, random_state=0)
    number = side + (x[:, 0] > 1.5) if num_classes == 3 else side
    labels = np.array(["left", "right", "far"])[number]
    frame = pd.DataFrame(x, columns=["east", "north"])
    model = SubnetLaplaceClassifier(**{**FAST, "num_epochs": 100, "lr": 0.1}).fit(
        frame, labels
    )
    assert list(model.feature_names_in_) == ["east", "north"]
    assert list(model.classes_) == sorted(set(labels))
    probabilities = model.predict_proba(frame)
    assert probabilities.shape == (90, num_classes)
    assert_allclose(probabilities.sum(1), 1.0, rtol=1e-9)
    chosen = model.classes_[probabilities.argmax(1)]
    assert (model.predict(frame) == chosen).all()
    assert model.score(frame, labels) > 0.85
    scaled = torch.as_tensor((x - x.mean(0)) / x.std(0))
    expected = model.posterior_.predictive_distribution(scaled).probs
    columns = expected.reshape(90, -1).numpy()
    assert_allclose(probabilities[:, -columns.shape[1] :], columns, rtol=1e-9)


def test_grids_pipelines_pickles_and_copies() -> None:
    x, y = curve(40)
    grid = GridSearchCV(
        make_pipeline(MinMaxScaler(), SubnetLaplaceRegressor(**FAST)),
        {"subnetlaplaceregressor__network": [(3,), (10,)]},
        cv=2,
    )
    best = grid.fit(x, y).best_estimator_
    expected = best.predict(x, return_std=True)
    for again in (pickle.loads(pickle.dumps(best)), copy.deepcopy(best)):
        for found, value in zip(
            again.predict(x, return_std=True), expected, strict=True
        ):
            assert_allclose(found, value)
    for found, value in zip(best.predict(x, return_std=True), expected, strict=True):
        assert_allclose(found, value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_network_of_the_users_is_copied_and_trained_on(dtype: torch.dtype) -> None:
    x, y = curve(50)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 6), nn.ReLU(), nn.Linear(6, 1)).to(dtype)
    before = copy.deepcopy(net.state_dict())
    options = {**TRAINED, "network": net, "standardize": False, "batch_size": 16}
    model = clone(SubnetLaplaceRegressor(**{**options, "validation_fraction": 0.0}))
    model.fit(x / 100, y / 5000)
    assert model.predict(x / 100).dtype == np.float64
    assert all(torch.equal(v, before[name]) for name, v in net.state_dict().items())
    assert model.posterior_.loc.dtype == dtype


def test_a_seed_repeats_and_the_global_one_stays() -> None:
    x, y = curve(30)
    state = torch.get_rng_state()
    first, again, other = (
        SubnetLaplaceRegressor(**{**FAST, "random_state": seed}).fit(x, y).predict(x)
        for seed in (3, 3, 4)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert_allclose(first, again, rtol=0)
    assert np.abs(first - other).max() > 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"network": (0,)}, "sizes of hidden layers"),
        ({"validation_fraction": 1.0}, r"lie in \[0, 1\)"),
        ({"batch_size": 0}, r"at least 1, or None for one batch; got 0\. Pass a whole"),
    ],
)
def test_options_that_mean_nothing(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        SubnetLaplaceRegressor(**options).fit(*curve(20))


@pytest.mark.parametrize(
    ("num_outputs", "num_classes"), [(3, 2), (5, 3), (2, 3), (1, 3)]
)
def test_outputs_that_are_not_the_classes(num_outputs: int, num_classes: int) -> None:
    """Before any training; a split may have lost a class."""
    x = np.linspace(-1, 1, 12)[:, None]
    net = nn.Linear(1, num_outputs)
    message = f"got {num_outputs} outputs, and data of {num_classes} classes"
    with pytest.raises(OptionError, match=message):
        SubnetLaplaceClassifier(net).fit(x, np.arange(12) % num_classes)


@pytest.mark.parametrize("num_outputs", [1, 2])
def test_two_classes_have_one_output_or_two(num_outputs: int) -> None:
    x = np.linspace(-1, 1, 12)[:, None]
    net = nn.Sequential(nn.Linear(1, num_outputs), nn.Dropout())
    fitted = SubnetLaplaceClassifier(net, num_epochs=5).fit(x, x[:, 0] > 0)
    assert fitted.predict_proba(x).shape == (12, 2)


def test_one_class_is_none() -> None:
    with pytest.raises(ValueError, match="at least two classes; got 1 class"):
        SubnetLaplaceClassifier().fit(np.ones((4, 1)), ["only"] * 4)
