"""The export to ArviZ against dense computation and closed forms.

What ArviZ makes of it is in `test_arviz_workflows.py`.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import HMC, MCMC
from pyro.infer.autoguide.initialization import init_to_value
from pyro.nn import PyroModule, PyroSample
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import pyro_subnet
from pyro_subnet import AutoSubnetLaplace, AutoSubnetMultivariateNormal
from pyro_subnet.exceptions import (
    ChoiceWarning,
    ModelError,
    OptionError,
    SelectionError,
)
from pyro_subnet.export.inference_data import from_hybrid_mcmc, to_inference_data
from tests.models.test_hybrid import (
    MODELS,
    Fit,
    constrained,
    fitted,
    log_density,
    whole,
)
from tests.tolerances import num_standard_errors, tolerance

DOUBLE = torch.float64
CLOSED = tolerance(DOUBLE, "closed_form")
SUM = tolerance(DOUBLE, "reordered")
AUTOGRAD = tolerance(DOUBLE, "autograd")
EQUAL = {"rtol": 0.0, "atol": 0.0}
NOISE = 0.5


def tensor(array: Any) -> Tensor:
    """Values of a variable, chains joined."""
    values = torch.as_tensor(array.values)
    return values.flatten(0, 1) if array.dims[:2] == ("chain", "draw") else values


def linear(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(3, dtype=DOUBLE), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, NOISE), obs=y)


def linear_data(count: int = 20) -> tuple[Tensor, Tensor]:
    x = torch.randn(count, 3, dtype=DOUBLE)
    w = torch.tensor([1.0, -0.5, 0.2], dtype=DOUBLE)
    return x, x @ w + NOISE * torch.randn(count, dtype=DOUBLE)


def fit_linear(
    x: Tensor, y: Tensor, subnet: Any = None
) -> AutoSubnetMultivariateNormal:
    precision = x.T @ x / NOISE**2 + torch.eye(3, dtype=DOUBLE)
    at = torch.linalg.solve(precision, x.T @ y / NOISE**2)
    init = init_to_value(values={"w": at})
    return AutoSubnetLaplace(linear, subnet, init_loc_fn=init).laplace_approximation(
        x, y
    )


def draws_of(idata: Any, posterior: AutoSubnetMultivariateNormal) -> Tensor:
    """Draws of a subnet whose sites are not constrained, (K, S)."""
    parts = [tensor(idata.posterior[site]) for site in posterior.subnet.indices]
    return torch.cat([part.reshape(len(part), -1) for part in parts], dim=1)


# ----------------------------------------------------------------------------------
# Densities.


@pytest.mark.parametrize("linearized", [False, True])
@pytest.mark.parametrize("subnet", [None, {"w": torch.tensor([2, 0])}])
def test_log_likelihood_is_pointwise(linearized: bool, subnet: Any) -> None:
    x, y = linear_data(7)
    posterior = fit_linear(x, y, subnet)
    idata = to_inference_data(
        posterior, x, y, num_samples=6, chains=3, linearized=linearized
    )
    w = posterior.loc.expand(6, 3).clone()
    w[:, posterior.subnet.flat] = draws_of(idata, posterior)
    expected = dist.Normal(w @ x.T, NOISE).log_prob(y)
    assert idata.log_likelihood["y"].dims == ("chain", "draw", "y_dim_0")
    assert idata.log_likelihood["y"].shape == (3, 2, 7)
    assert_close(tensor(idata.log_likelihood["y"]), expected, **CLOSED)


def classes(x: Tensor, y: Tensor | None = None) -> None:
    """Three classes, pairs of labels, one of them missing, a tempered likelihood."""
    w = pyro.sample("w", dist.Normal(torch.zeros(3, 2, dtype=DOUBLE), 1.0).to_event(2))
    b = pyro.sample("b", dist.Normal(torch.zeros((), dtype=DOUBLE), 1.0))
    logits = (x @ w.mT + b * torch.tensor([0.0, 1.0, 2.0], dtype=DOUBLE)).tanh()
    both = torch.stack([logits, -logits], dim=1)
    present = torch.ones(len(x), 2, dtype=torch.bool)
    present[0, 1] = False
    fn = dist.Categorical(logits=both).mask(present).to_event(1)
    with poutine.scale(scale=0.5), pyro.plate("data", 3 * len(x), len(x)):
        pyro.sample("y", fn, obs=y)


@pytest.mark.parametrize("linearized", [False, True])
def test_masks_scales_and_events(linearized: bool) -> None:
    """Against the logits by hand; the expansion by dense autograd."""
    x = torch.randn(7, 2, dtype=DOUBLE)
    y = torch.randint(3, (7, 2))
    guide = AutoSubnetLaplace(
        classes,
        {"w": torch.tensor([5, 1]), "b": torch.tensor([0])},
        init_loc_fn=init_to_value(
            values={
                "w": torch.randn(3, 2, dtype=DOUBLE),
                "b": torch.randn((), dtype=DOUBLE),
            }
        ),
    )
    posterior = guide.laplace_approximation(x, y)
    idata = to_inference_data(posterior, x, y, num_samples=5, linearized=linearized)
    theta = draws_of(idata, posterior)

    def logits(theta: Tensor) -> Tensor:
        values = whole(posterior, theta)
        slopes = torch.tensor([0.0, 1.0, 2.0], dtype=DOUBLE)
        f = (x @ values["w"].mT + values["b"] * slopes).tanh()
        return torch.stack([f, -f], dim=1).log_softmax(-1)

    found = tensor(idata.log_likelihood["y"])
    assert found.shape == (5, 7)
    total = []
    for k in range(5):
        at = logits(theta[k])
        if linearized:
            loc = posterior.get_posterior().loc
            jac = torch.autograd.functional.jacobian(logits, loc)
            at = (logits(loc) + jac @ (theta[k] - loc)).log_softmax(-1)
        density = at.gather(-1, y.unsqueeze(-1)).squeeze(-1)
        density[0, 1] = 0.0
        assert_close(found[k], density.sum(1), **AUTOGRAD)
        total.append(0.5 * 3 * density.sum())
    prior = dist.Normal(0.0, 1.0).log_prob(
        torch.cat([u.flatten() for u in whole(posterior, theta[0]).values()])
    )
    stats = idata.sample_stats
    log_joint = tensor(stats["log_importance_ratio"] + stats["lp"])
    assert_close(log_joint[0], total[0] + prior.sum(), **AUTOGRAD)
    assert idata.posterior_predictive["y"].shape == (1, 5, 7, 2)


def test_what_is_masked_may_be_nan() -> None:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2, dtype=DOUBLE), 1.0).to_event(1))
        seen = torch.arange(len(x)) != 2
        with pyro.plate("data", len(x)), poutine.mask(mask=seen):
            pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)

    x, y = torch.randn(5, 2, dtype=DOUBLE), torch.randn(5, dtype=DOUBLE)
    y[2] = math.nan
    with pyro.validation_enabled(False):
        guide = AutoSubnetLaplace(
            model, init_loc_fn=init_to_value(values={"w": torch.zeros(2, dtype=DOUBLE)})
        )
        posterior = guide.laplace_approximation(x, y)
    idata = to_inference_data(posterior, x, y, num_samples=4, seed=1)
    w = draws_of(idata, posterior)
    expected = dist.Normal(w @ x.T, 1.0, validate_args=False).log_prob(y)
    expected[:, 2] = 0.0
    assert_close(tensor(idata.log_likelihood["y"]), expected, **CLOSED)
    assert bool(np.isfinite(idata.sample_stats["log_importance_ratio"]).all())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("linearized", [False, True])
def test_importance_ratio_is_the_hybrid_models(name: str, linearized: bool) -> None:
    """Hierarchies, simplexes, Cholesky factors, scales, masks, factors among them."""
    fit = fitted(name)
    idata = to_inference_data(
        fit.posterior, fit.x, fit.y, num_samples=4, linearized=linearized, seed=2
    )
    with torch.random.fork_rng():
        torch.manual_seed(2)
        theta = fit.posterior.get_posterior().sample(torch.Size([4]))
    hybrid = fit.posterior.hybrid_model(linearized)
    log_q = fit.posterior.get_posterior().log_prob(theta)
    assert_close(tensor(idata.sample_stats["lp"]), log_q, **CLOSED)
    with torch.no_grad():
        joint = [log_density(hybrid, row, fit.x, fit.y) for row in theta]
    found = tensor(idata.sample_stats["log_importance_ratio"])
    assert_close(found, torch.stack(joint) - log_q, **SUM)


@pytest.mark.parametrize("subnet", [None, {"w": torch.tensor([1])}])
@pytest.mark.parametrize("linearized", [False, True])
def test_importance_ratio_is_constant_where_exact(
    subnet: Any, linearized: bool
) -> None:
    x, y = linear_data()
    posterior = fit_linear(x, y, subnet)
    idata = to_inference_data(
        posterior, x, y, num_samples=30, linearized=linearized, prior=False
    )
    ratio = tensor(idata.sample_stats["log_importance_ratio"])
    assert_close(ratio, ratio[:1].expand(30), **SUM)
    # It is the log evidence then.
    assert_close(ratio[0], posterior.log_marginal_likelihood(), **SUM)


def test_tuned_scales_have_the_ratios_of_the_scaled_model() -> None:
    x, y = linear_data(7)
    posterior = fit_linear(x, y)
    for s, r in ((3.0, 1.0), (1.0, 2.0)):
        other = posterior.with_prior_precision(s).with_noise_scale(r)
        idata = to_inference_data(other, x, y, num_samples=4, prior=False)
        w = draws_of(idata, posterior)
        joint = dist.Normal(w @ x.T, r * NOISE).log_prob(y).sum(-1)
        scale = torch.tensor(s**-0.5, dtype=DOUBLE)
        joint += dist.Normal(0.0, scale).log_prob(w).sum(-1)
        ratio = joint - other.get_posterior().log_prob(w)
        found = tensor(idata.sample_stats["log_importance_ratio"])
        assert_close(found.flatten(), ratio.flatten(), **SUM)
    w = draws_of(idata, posterior)
    expected = dist.Normal(w @ x.T, 2 * NOISE).log_prob(y)
    assert_close(tensor(idata.log_likelihood["y"]), expected, **CLOSED)
    assert idata.attrs["noise_factor"] == 2.0


# ----------------------------------------------------------------------------------
# Variables.


def test_draws_are_the_posteriors() -> None:
    x, y = linear_data()
    posterior = fit_linear(x, y, {"w": torch.tensor([0, 2])})
    idata = to_inference_data(posterior, x, y, num_samples=4000, chains=4, seed=5)
    w = idata.posterior["w"]
    assert w.dims == ("chain", "draw", "w_elem")
    assert list(w.coords["w_elem"].values) == ["0", "2"]
    drawn = draws_of(idata, posterior)
    q = posterior.get_posterior()
    z = num_standard_errors(4)
    error = q.variance.sqrt() / math.sqrt(4000)
    assert bool(((drawn.mean(0) - q.loc).abs() < z * error).all())
    assert bool(((drawn.std(0) - q.variance.sqrt()).abs() < z * error / 1.41).all())


@pytest.mark.parametrize("name", ["awkward", "network"])
def test_values_are_constrained(name: str) -> None:
    """A simplex appears whole, a Cholesky factor too, others element by element."""
    fit = fitted(name)
    idata = to_inference_data(fit.posterior, fit.x, fit.y, num_samples=3, seed=2)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        theta = fit.posterior.get_posterior().sample(torch.Size([3]))
    assert list(idata.posterior) == list(fit.posterior.subnet.indices)
    for k in range(3):
        u = whole(fit.posterior, theta[k])
        values = constrained(MODELS[name], u, fit.x, fit.y)
        for site, within in fit.posterior.subnet.indices.items():
            expected = values[site]
            if site not in {"shares", "corr"}:
                expected = expected.flatten()[within]
            found = tensor(idata.posterior[site])[k]
            assert_close(found, expected.reshape(found.shape), **SUM)
    if name == "network":
        assert idata.posterior["scale"].dims == ("chain", "draw")
        labels = ["0, 0", "1, 0", "3, 1"]
        assert list(idata.posterior["w1_elem"].values) == labels
    else:
        labels = [f"{i}" for i in range(4)]
        assert list(idata.posterior["shares_elem"].values) == labels
        assert list(idata.posterior["rates_elem"].values) == ["2, 0", "4, 0"]


def test_only_touched_simplexes_appear() -> None:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        alpha = torch.full((4, 3), 2.0, dtype=DOUBLE)
        p = pyro.sample("p", dist.Dirichlet(alpha).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ p.flatten(), 1.0), obs=y)

    x, y = torch.randn(5, 12, dtype=DOUBLE), torch.randn(5, dtype=DOUBLE)
    guide = AutoSubnetLaplace(model, {"p": torch.tensor([3, 6])})  # of 4 x 2
    posterior = guide.laplace_approximation(x, y)
    p = to_inference_data(posterior, x, y, num_samples=4).posterior["p"]
    labels = [f"{row}, {i}" for row in (1, 3) for i in range(3)]
    assert list(p["p_elem"].values) == labels
    by_row = tensor(p).reshape(4, 2, 3).sum(-1)
    assert_close(by_row, torch.ones(4, 2, dtype=DOUBLE), **CLOSED)


@pytest.mark.parametrize("positive", [False, True])
def test_elements_of_a_site_of_another_type(positive: bool) -> None:
    """Of a narrower one than another site's only those of the subnet appear, too."""
    normal = dist.LogNormal if positive else dist.Normal

    def model(x: Tensor, y: Tensor | None = None) -> None:
        zeros = torch.zeros(2, 3)  # float32
        w = pyro.sample("w", normal(zeros, 1.0).to_event(2))
        shares = pyro.sample("p", dist.Dirichlet(torch.ones(2)))
        b = pyro.sample("b", dist.Normal(torch.zeros((), dtype=DOUBLE), 1.0))
        with pyro.plate("data", len(x)):
            loc = (x.float() @ w.mT).double() @ shares.double() + b
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y)

    x, y = torch.randn(5, 3, dtype=DOUBLE), torch.randn(5, dtype=DOUBLE)
    subnet = {"w": torch.tensor([4, 1]), "p": torch.tensor([0]), "b": torch.tensor([0])}
    values = {"w": torch.ones(2, 3), "p": torch.tensor([0.4, 0.6])}
    values["b"] = torch.tensor(0.2, dtype=DOUBLE)
    guide = AutoSubnetLaplace(model, subnet, init_loc_fn=init_to_value(values=values))
    posterior = guide.laplace_approximation(x, y)
    found = to_inference_data(posterior, x, y, num_samples=50).posterior
    assert list(found["w_elem"].values) == ["0, 1", "1, 1"]
    assert list(found["p_elem"].values) == ["0", "1"]
    assert found["w"].dtype == np.float32
    assert bool((found["w"].std("draw") > 0.01).all())
    assert bool((found["w"] > 0).all()) == positive


def test_some_sites_alone() -> None:
    fit = fitted()
    idata = to_inference_data(fit.posterior, fit.x, fit.y, num_samples=2, sites=["w1"])
    assert list(idata.posterior) == list(idata.prior) == ["w1"]
    with pytest.raises(SelectionError, match=r"in the subnet.*'w1'.*got 'w2'"):
        to_inference_data(fit.posterior, fit.x, fit.y, num_samples=2, sites=["w2"])


# ----------------------------------------------------------------------------------
# Other groups.


@pytest.mark.parametrize("linearized", [False, True])
def test_predictive_draws(linearized: bool) -> None:
    """Standardized by each draw's own mean they are standard normal."""
    x, y = linear_data(7)
    posterior = fit_linear(x, y)
    idata = to_inference_data(
        posterior,
        x,
        y,
        num_samples=2000,
        linearized=linearized,
        predictions_args=(3 * x[:4],),
        seed=3,
    )
    w = draws_of(idata, posterior)
    prior = tensor(idata.prior["w"])
    for group, at, weights in (
        ("posterior_predictive", x, w),
        ("predictions", 3 * x[:4], w),
        ("prior_predictive", x, prior),
    ):
        z = (tensor(idata[group]["y"]) - weights @ at.T) / NOISE
        bound = num_standard_errors(12)
        assert abs(float(z.mean())) < bound / math.sqrt(z.numel()), group
        spread = abs(float(z.square().mean()) - 1)
        assert spread < bound * math.sqrt(2 / z.numel()), group
    assert abs(float(prior.mean())) < num_standard_errors(12) / math.sqrt(6000)
    bound = num_standard_errors(12) * math.sqrt(2 / 6000)
    assert abs(float(prior.square().mean()) - 1) < bound
    assert_close(tensor(idata.observed_data["y"]), y, **EQUAL)
    assert_close(tensor(idata.constant_data["x"]), x, **EQUAL)
    assert set(idata.constant_data) == {"x"}
    assert_close(tensor(idata.predictions_constant_data["x"]), 3 * x[:4], **EQUAL)


def test_the_priors_other_elements_are_at_the_map() -> None:
    x, y = linear_data(7)
    posterior = fit_linear(x, y, {"w": torch.tensor([1])})
    idata = to_inference_data(posterior, x, y, num_samples=2000, seed=3)
    drawn = tensor(idata.prior["w"])
    rest = posterior.loc * torch.tensor([1.0, 0.0, 1.0], dtype=DOUBLE)
    mean = x @ rest + drawn * x[:, 1]
    z = (tensor(idata.prior_predictive["y"]) - mean) / NOISE
    assert abs(float(z.mean())) < num_standard_errors() / math.sqrt(z.numel())


def test_a_hierarchical_prior_is_drawn_by_the_model() -> None:
    """w1 of the network has a latent scale, half-normal: its variance is 1."""
    fit = fitted()
    idata = to_inference_data(fit.posterior, fit.x, fit.y, num_samples=2000, seed=1)
    w1, scale = tensor(idata.prior["w1"]), tensor(idata.prior["scale"])
    assert bool((scale > 0).all())
    # Given its scale w1 is normal; E w^4 = 3 E s^4 = 9 bounds the error of E w^2.
    bound = num_standard_errors(2) * math.sqrt(8 / 2000)
    assert abs(float(w1.square().mean()) - 1) < bound
    z = (w1 / scale.unsqueeze(-1)).square().mean()
    assert abs(float(z) - 1) < num_standard_errors(2) * math.sqrt(2 / w1.numel())


def test_without_observations() -> None:
    x, y = linear_data(7)
    posterior = fit_linear(x, y)
    with pytest.warns(ChoiceWarning, match="got no observations"):
        idata = to_inference_data(posterior, x, num_samples=3, prior=False)
    groups = {"posterior", "posterior_predictive", "sample_stats", "constant_data"}
    assert set(idata) == groups
    assert set(idata.sample_stats) == {"lp"}


def test_names_of_axes_and_labels_are_the_users() -> None:
    x, y = linear_data(7)
    idata = to_inference_data(
        fit_linear(x, y),
        x,
        y,
        num_samples=3,
        predictions_args=(x[:2],),
        dims={"y": ["city"], "x": ["city", "feature"]},
        coords={"city": list("abcdefg"), "feature": ["p", "q", "r"]},
    )
    for group in ("posterior_predictive", "log_likelihood", "observed_data"):
        assert list(idata[group]["y"]["city"].values) == list("abcdefg")
    assert idata.constant_data["x"].dims == ("city", "feature")
    assert idata.predictions["y"].dims == ("chain", "draw", "city")
    assert list(idata.predictions["y"]["city"].values) == [0, 1]


def grouped(group: Tensor, y: Tensor | None = None) -> None:
    with pyro.plate("groups", 3):
        effect = pyro.sample("effect", dist.Normal(y.new_zeros(()), 1.0))
        share = pyro.sample("share", dist.Dirichlet(y.new_ones(2)))
    with pyro.plate("data", len(group)):
        loc = effect[group] + share[group, 0]
        pyro.sample("y", dist.Normal(loc, 0.5), obs=y)


@pytest.mark.parametrize("chosen", [None, {"effect": [1], "share": [2]}])
def test_axes_of_latent_sites_have_the_users_names(
    chosen: Any, dtype: torch.dtype
) -> None:
    group, y = torch.arange(9) % 3, torch.randn(9, dtype=dtype)
    subnet = chosen and {site: torch.tensor(at) for site, at in chosen.items()}
    posterior = AutoSubnetLaplace(grouped, subnet).laplace_approximation(group, y)
    labels: dict[str, Any] = {
        "dims": {"effect": "county", "share": ["county", "part"]},
        "coords": {"county": list("ABC"), "part": ["urban", "rural"]},
    }
    both = [
        to_inference_data(posterior, group, y, num_samples=12, chains=2, seed=3, **more)
        for more in ({}, labels)
    ]
    for name in ("posterior", "prior"):
        plain, found = (idata[name] for idata in both)
        assert found["effect"].dims == ("chain", "draw", "county")
        assert found["share"].dims == ("chain", "draw", "county", "part")
        at_map = {site: value for site, value in posterior.median().items()}
        for site, at in at_map.items():
            moved = plain[f"{site}_elem"].values.tolist()
            for index in np.ndindex(*at.shape):
                label = ", ".join(map(str, index))
                values = found[site].values[(..., *index)]
                if label in moved:
                    expected = plain[site].sel({f"{site}_elem": label}).values
                else:
                    expected = np.full_like(values, float(at[index]))
                np.testing.assert_allclose(values, expected, **EQUAL)
    assert both[1].posterior["share"].sel(county="B", part="rural").shape == (2, 6)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"dims": {"efect": ["county"]}}, r"some of .*'effect'.*; got 'efect'\. Check"),
        (
            {"dims": {"effect": ["chain", "county"]}},
            r"at most its 1 axes, of shape .3,.; got .'chain', 'county'.\. Leave",
        ),
        (
            {"dims": {"effect": ["county"]}, "coords": {"county": ["A", "B"]}},
            r"one label for each of the 3 elements .* 'effect'; got 2\. Pass 3 labels",
        ),
        (
            {"dims": {"effect": ["county"], "y": ["county"]}},
            r"one length alike; got 'county' for 3 elements of 'effect' and 9 of 'y'",
        ),
    ],
)
def test_names_and_labels_that_do_not_fit(labels: Any, message: str) -> None:
    group, y = torch.arange(9) % 3, torch.randn(9)
    posterior = AutoSubnetLaplace(grouped).laplace_approximation(group, y)
    with pytest.raises(OptionError, match=message):
        to_inference_data(posterior, group, y, **labels)


class Module(PyroModule):  # type: ignore[misc]
    """Arguments inside of a mapping, and one that is no row."""

    def __init__(self) -> None:
        super().__init__()
        prior = dist.Normal(torch.zeros(2, dtype=DOUBLE), 1.0).to_event(1)
        self.w = PyroSample(prior)

    def forward(self, batch: dict[str, Tensor], shift: Tensor, *, flag: bool) -> Tensor:
        f = batch["x"] @ self.w + shift if flag else batch["x"] @ self.w
        with pyro.plate("data", len(f)):
            return pyro.sample("out", dist.Bernoulli(logits=f), obs=batch.get("y"))


def test_arguments_inside_of_mappings() -> None:
    x, y = torch.randn(5, 2, dtype=DOUBLE), torch.tensor([1.0, 0, 1, 0, 0]).double()
    shift = torch.ones((), dtype=DOUBLE)
    posterior = AutoSubnetLaplace(Module()).laplace_approximation(
        {"x": x, "y": y}, shift, flag=True
    )
    idata = to_inference_data(
        posterior,
        {"x": x, "y": y},
        shift,
        flag=True,
        num_samples=3,
        predictions_args=(({"x": x[:2]}, shift), {"flag": False}),
    )
    assert set(idata.constant_data) == {"batch.x"}
    assert set(idata.observed_data) == {"out"}
    assert idata.predictions["out"].shape == (1, 3, 2)


def test_attributes() -> None:
    x, y = linear_data(7)
    idata = to_inference_data(
        fit_linear(x, y), x, y, num_samples=6, chains=2, predictions_args=x[:2], seed=9
    )
    assert idata.posterior.attrs["num_subnet"] == 3
    assert idata.attrs["num_params"] == 3
    assert idata.attrs["seed"] == 9
    assert idata.attrs["linearized"] == 1
    assert idata.attrs["curvature"] == "ggn"
    assert idata.attrs["inference_library"] == "pyro_subnet"
    assert idata.attrs["inference_library_version"] == pyro_subnet.__version__


# ----------------------------------------------------------------------------------
# MCMC.


def run(fit: Fit, kernel: Any, **options: Any) -> MCMC:
    mcmc = MCMC(kernel, num_samples=6, warmup_steps=4, disable_progbar=True, **options)
    mcmc.run(fit.x, fit.y)
    return mcmc


@pytest.mark.parametrize("linearized", [False, True])
def test_a_chain(linearized: bool) -> None:
    fit = fitted()
    hybrid = fit.posterior.hybrid_model(linearized)
    mcmc = run(fit, hybrid.nuts(), initial_params=hybrid.initial_params())
    before = set(pyro.get_param_store().keys())
    args = (fit.x, fit.y)
    idata = from_hybrid_mcmc(mcmc, hybrid, *args, predictions_args=fit.x[:2])
    assert set(pyro.get_param_store().keys()) == before
    theta = mcmc.get_samples()["subnet"]
    with torch.no_grad():
        joint = [log_density(hybrid, row, fit.x, fit.y) for row in theta]
    assert_close(tensor(idata.sample_stats["lp"]), torch.stack(joint), **SUM)
    w1 = theta[:, fit.posterior.subnet.names.index("w1[0, 0]") :][:, :3]
    assert_close(tensor(idata.posterior["w1"]), w1, **EQUAL)
    (rate,) = idata.sample_stats.attrs["acceptance_rate"]
    (told,) = mcmc.diagnostics()["acceptance rate"].values()
    assert rate == told
    diverged = mcmc.diagnostics()["divergences"]["chain 0"]
    assert list(np.flatnonzero(idata.sample_stats["diverging"])) == diverged
    assert idata.predictions["y"].shape == (1, 6, 2)
    assert idata.attrs["sampler"] == "NUTS"
    again = from_hybrid_mcmc(mcmc, fit.posterior, *args, linearized=linearized)
    assert_close(
        tensor(again.sample_stats["lp"]), tensor(idata.sample_stats["lp"]), **SUM
    )


def test_divergences_are_marked() -> None:
    """Steps far too long: the sampler tells which draws they spoiled."""
    fit = fitted()
    hybrid = fit.posterior.hybrid_model()
    kernel = HMC(
        hybrid,
        step_size=60.0,
        num_steps=2,
        adapt_step_size=False,
        adapt_mass_matrix=False,
    )
    idata = from_hybrid_mcmc(
        run(fit, kernel, initial_params=hybrid.initial_params()), hybrid, fit.x, fit.y
    )
    assert bool(idata.sample_stats["diverging"].any())


def train(site: str, value: Tensor) -> None:
    """Moves the one parameter of a hybrid model that is named for a site."""
    store = pyro.get_param_store()
    (key,) = [key for key in store.keys() if key.endswith(f".{site}")]
    store[key] = value


def test_trained_parameters_count() -> None:
    fit = fitted()
    hybrid = fit.posterior.hybrid_model()
    mcmc = run(fit, hybrid.nuts(), initial_params=hybrid.initial_params())
    train("noise", torch.tensor(1.5, dtype=DOUBLE))
    train("w2", torch.zeros(4, dtype=DOUBLE))
    idata = from_hybrid_mcmc(mcmc, hybrid, fit.x, fit.y)
    expected = dist.Normal(torch.zeros(7, dtype=DOUBLE), 1.5).log_prob(fit.y)
    assert_close(tensor(idata.log_likelihood["y"]), expected.expand(6, 7), **SUM)


def test_trained_parameters_of_a_linearized_model() -> None:
    fit = fitted()
    hybrid = fit.posterior.hybrid_model(linearized=True)
    mcmc = run(fit, hybrid.nuts(), initial_params=hybrid.initial_params())
    train("w2", torch.zeros(4, dtype=DOUBLE))
    with pytest.raises(ModelError, match="at the MAP; got some that were trained"):
        from_hybrid_mcmc(mcmc, hybrid, fit.x, fit.y)


def test_a_run_on_something_else() -> None:
    fit, x = fitted(), linear_data(7)
    other = fit_linear(*x)
    hybrid = fit.posterior.hybrid_model()
    mcmc = run(fit, hybrid.nuts(), initial_params=hybrid.initial_params())
    with pytest.raises(
        OptionError, match=r"with 3 elements; got \{'subnet': \(1, 6, 4"
    ):
        from_hybrid_mcmc(mcmc, other, *x)
    with pytest.raises(OptionError, match="hybrid model's, False; got True"):
        from_hybrid_mcmc(mcmc, hybrid, fit.x, fit.y, linearized=True)


# ----------------------------------------------------------------------------------
# What it costs, and what it leaves alone.


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that is made."""

    numel = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in torch.utils._pytree.tree_leaves(out):
            if isinstance(leaf, Tensor):
                # A view of all, broadcast, holds no numbers of its own.
                held = leaf.untyped_storage().nbytes() // leaf.element_size()
                self.numel = max(self.numel, held)
        return out


@pytest.mark.parametrize(
    ("num_params", "linearized", "prior"),
    [(10**6, True, False), (10**5, True, True), (10**5, False, True)],
)
def test_no_tensor_of_draws_times_parameters(
    num_params: int, linearized: bool, prior: bool
) -> None:
    """D = 1e6, S = 10, K = 500: K x D would take 4 GB. With less, all groups."""
    count = 500

    def model(x: Tensor, y: Tensor | None = None) -> None:
        zeros = torch.zeros(num_params - 1, dtype=DOUBLE)
        w = pyro.sample("w", dist.Normal(zeros, 1.0).to_event(1))
        b = pyro.sample("b", dist.Normal(torch.zeros((), dtype=DOUBLE), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w[:4] + b, 0.5), obs=y)

    x, y = torch.randn(6, 4, dtype=DOUBLE), torch.randn(6, dtype=DOUBLE)
    subnet = {"w": torch.tensor([0, 1, 2, 3, *range(9000, 9005)]), "b": torch.tensor(0)}
    subnet["b"] = subnet["b"].reshape(1)
    init = init_to_value(
        values={
            "w": torch.ones(num_params - 1, dtype=DOUBLE),
            "b": torch.zeros((), dtype=DOUBLE),
        }
    )
    guide = AutoSubnetLaplace(model, subnet, init_loc_fn=init)
    posterior = guide.laplace_approximation(x, y)
    with Largest() as largest:
        idata = to_inference_data(
            posterior,
            x,
            y,
            num_samples=count,
            linearized=linearized,
            prior=prior,
        )
    assert idata.posterior["w"].shape == (1, count, 9)
    assert num_params <= largest.numel < 10 * num_params


def test_random_numbers() -> None:
    """A seed leaves torch's own stream alone; without one it is drawn from."""
    x, y = linear_data(7)
    posterior = fit_linear(x, y)
    before = torch.get_rng_state()
    first = to_inference_data(posterior, x, y, num_samples=4, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    second = to_inference_data(posterior, x, y, num_samples=4, seed=1)
    for group in ("posterior", "posterior_predictive", "prior", "prior_predictive"):
        assert first[group].equals(second[group]), group
    third = to_inference_data(posterior, x, y, num_samples=4)
    assert not torch.equal(torch.get_rng_state(), before)
    torch.set_rng_state(before)
    fourth = to_inference_data(posterior, x, y, num_samples=4)
    assert third.posterior.equals(fourth.posterior)
    assert third.attrs["seed"] == "global random state"


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_in_any_gradient_mode(mode: Callable[[], Any]) -> None:
    x, y = linear_data(7)
    posterior = fit_linear(x, y)
    expected = to_inference_data(posterior, x, y, num_samples=4, seed=1)
    with mode():
        found = to_inference_data(posterior, x, y, num_samples=4, seed=1)
    assert found.log_likelihood.equals(expected.log_likelihood)


@pytest.mark.parametrize(("count", "chains"), [(10, 3), (10, 0), (2, 4)])
def test_chains_must_divide_the_draws(count: int, chains: int) -> None:
    x, y = linear_data(7)
    posterior = fit_linear(x, y)
    match = f"divide `num_samples`; got chains={chains} and num_samples={count}"
    with pytest.raises(OptionError, match=match):
        to_inference_data(posterior, x, y, num_samples=count, chains=chains)


def test_the_package_does_without_arviz() -> None:
    """A star import too; what needs ArviZ says so when it is asked for."""
    code = """
import sys
sys.modules["arviz"] = None
from pyro_subnet import *
import pyro_subnet
assert AutoSubnetLaplace
assert "to_inference_data" in dir(pyro_subnet)
try:
    pyro_subnet.to_inference_data
except ImportError as error:
    print(error)
try:
    pyro_subnet.nothing
except AttributeError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).resolve().parents[2],
    )
    first, second = done.stdout.splitlines()
    assert "`to_inference_data` needs ArviZ" in first
    assert "Run `pip install arviz`." in first
    assert "has no attribute 'nothing'" in second


def test_the_package_has_the_functions() -> None:
    assert pyro_subnet.to_inference_data is to_inference_data
    assert pyro_subnet.from_hybrid_mcmc is from_hybrid_mcmc
