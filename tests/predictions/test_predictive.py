"""Closed-form outputs: against J P⁻¹ Jᵀ with autograd's dense J, in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import init_to_value
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from pyro_subnet import AutoSubnetLaplace, AutoSubnetMultivariateNormal
from pyro_subnet.exceptions import ModelError, NoOutputVarianceWarning
from tests.tolerances import FALSE_ALARM_RATE, tolerance

Model = Callable[..., Any]
Values = Mapping[str, Tensor]
Function = Callable[[Values, Tensor], Tensor]

EXACT = tolerance(torch.float64, "reordered")  # 1e-9
NUM_TRAIN, NUM_TEST, NUM_INPUTS, NUM_HIDDEN = 11, 4, 3, 5


def double(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def normal(*shape: int) -> dist.TorchDistribution:
    zero = torch.zeros(shape, dtype=torch.float64)
    return dist.Normal(zero, 0.8).to_event(len(shape))


def shapes(num_outputs: int) -> dict[str, tuple[int, ...]]:
    return {
        "w1": (NUM_HIDDEN, NUM_INPUTS),
        "b1": (NUM_HIDDEN,),
        "w2": (num_outputs, NUM_HIDDEN),
        "b2": (num_outputs,),
    }


def network(weights: Values, x: Tensor) -> Tensor:
    hidden = F.linear(x, weights["w1"], weights["b1"]).tanh()
    return F.linear(hidden, weights["w2"], weights["b2"])


def sampled_weights(num_outputs: int) -> dict[str, Tensor]:
    return {
        site: pyro.sample(site, normal(*shape))
        for site, shape in shapes(num_outputs).items()
    }


def random_weights(num_outputs: int) -> dict[str, Tensor]:
    return {site: double(*shape) for site, shape in shapes(num_outputs).items()}


# Scattered, and in the order of a user's mapping rather than of the packing.
def scattered(num_outputs: int) -> dict[str, Tensor]:
    return {
        "w2": torch.tensor([num_outputs * NUM_HIDDEN - 1, 0]),
        "w1": torch.tensor([2, 13, 7, 4, 0]),
        "b2": torch.arange(num_outputs),
    }


def fitted(
    model: Model, at: Values, subnet: Any, *args: Any, **kwargs: Any
) -> AutoSubnetMultivariateNormal:
    guide = AutoSubnetLaplace(model, subnet, init_loc_fn=init_to_value(values=at))
    return guide.laplace_approximation(*args, **kwargs)


def dense_jacobian(
    function: Function, at: Values, posterior: AutoSubnetMultivariateNormal, x: Tensor
) -> Tensor:
    """J of η (N, C) over the subnet, (N, C, S), columns in packing order.

    ``at`` holds unconstrained values of every site that ``function`` reads.
    """
    jacobians = torch.autograd.functional.jacobian(
        lambda *leaves: function(dict(zip(at, leaves, strict=True)), x),
        tuple(at.values()),
    )
    by_site = dict(zip(at, jacobians, strict=True))
    columns = []
    for site, within in posterior.subnet.indices.items():
        jac = by_site[site].flatten(2)
        columns.append(jac[..., within])
    return torch.cat(columns, dim=-1)


def assert_closed_form(
    function: Function,
    at: Values,
    posterior: AutoSubnetMultivariateNormal,
    x: Tensor,
    **kwargs: Any,
) -> None:
    """Loc, shapes and covariances, per observation and jointly."""
    eta = function(at, x)
    jac = dense_jacobian(function, at, posterior, x)
    covariance = torch.linalg.inv(posterior.get_posterior().precision_matrix)
    num_data, num_outputs = eta.shape

    each = posterior.output_distribution(x, **kwargs)
    assert isinstance(each, dist.MultivariateNormal)
    assert each.batch_shape == (num_data,)
    assert each.event_shape == (num_outputs,)
    assert_close(each.loc, eta, **EXACT)
    assert_close(each.covariance_matrix, jac @ covariance @ jac.mT, **EXACT)
    assert_close(
        each.variance, (jac @ covariance @ jac.mT).diagonal(dim1=-2, dim2=-1), **EXACT
    )

    joint = posterior.output_distribution(x, joint=True, **kwargs)
    flat = jac.flatten(0, 1)
    assert joint.batch_shape == ()
    assert joint.event_shape == (num_data * num_outputs,)
    assert_close(joint.loc, eta.flatten(), **EXACT)
    assert_close(joint.covariance_matrix, flat @ covariance @ flat.mT, **EXACT)
    assert not each.loc.requires_grad
    assert not joint.scale_tril.requires_grad

    for size in (n for n in range(1, num_data + 1) if num_data % n == 0):
        some = posterior.output_distribution(x, joint=size, **kwargs)
        rows = jac.reshape(num_data // size, size * num_outputs, -1)
        assert some.event_shape == (size * num_outputs,)
        assert_close(some.loc, eta.reshape(rows.shape[:2]), **EXACT)
        assert_close(some.covariance_matrix, rows @ covariance @ rows.mT, **EXACT)


# ----------------------------------------------------------------------------------
# Families and shapes.


@pytest.mark.parametrize("num_outputs", [1, 3])
@pytest.mark.parametrize("whole", [False, True], ids=["scattered", "whole"])
def test_regression(num_outputs: int, whole: bool) -> None:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        f = network(sampled_weights(num_outputs), x)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(f, 0.3).to_event(1), obs=y)

    at = random_weights(num_outputs)
    subnet = None if whole else scattered(num_outputs)
    x, y = double(NUM_TRAIN, NUM_INPUTS), double(NUM_TRAIN, num_outputs)
    posterior = fitted(model, at, subnet, x, y)
    # the fixed noise is no output: C counts the columns of the loc alone
    assert_closed_form(network, at, posterior, double(NUM_TEST, NUM_INPUTS))


def test_scalar_outputs_without_to_event() -> None:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        f = network(sampled_weights(1), x).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(f, 0.3), obs=y)

    at = random_weights(1)
    x, y = double(NUM_TRAIN, NUM_INPUTS), double(NUM_TRAIN)
    posterior = fitted(model, at, scattered(1), x, y)
    assert_closed_form(network, at, posterior, double(NUM_TEST, NUM_INPUTS))


def test_columns_in_a_plate_of_their_own() -> None:
    """(N, C) observations without ``to_event``: the first axis is the data."""

    def model(x: Tensor, y: Tensor | None = None) -> None:
        f = network(sampled_weights(3), x)
        with pyro.plate("data", len(x), dim=-2), pyro.plate("columns", 3, dim=-1):
            pyro.sample("y", dist.Normal(f, 0.3), obs=y)

    at = random_weights(3)
    x, y = double(NUM_TRAIN, NUM_INPUTS), double(NUM_TRAIN, 3)
    posterior = fitted(model, at, scattered(3), x, y)
    assert_closed_form(network, at, posterior, double(NUM_TEST, NUM_INPUTS))


def test_classes_are_log_probabilities() -> None:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        logits = network(sampled_weights(3), x)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(logits=logits), obs=y)

    at = random_weights(3)
    x, y = double(NUM_TRAIN, NUM_INPUTS), torch.randint(3, (NUM_TRAIN,))
    posterior = fitted(model, at, scattered(3), x, y)

    def eta(weights: Values, inputs: Tensor) -> Tensor:
        return network(weights, inputs).log_softmax(-1)

    test = double(NUM_TEST, NUM_INPUTS)
    assert_closed_form(eta, at, posterior, test)
    # blind to a constant per row: p is a null vector of each covariance
    p = network(at, test).softmax(-1)
    covariance = posterior.output_distribution(test).covariance_matrix
    null = (covariance @ p.unsqueeze(-1)).squeeze(-1)
    assert_close(null, torch.zeros_like(p), **EXACT)


@pytest.mark.parametrize(
    ("family", "link"),
    [
        (lambda f: dist.Bernoulli(logits=f).to_event(1), lambda f: f),
        (
            lambda f: dist.Poisson(F.softplus(f)).to_event(1),
            lambda f: F.softplus(f).log(),
        ),
        (lambda f: dist.StudentT(5.0, f, 0.7).to_event(1), lambda f: f),
        (
            lambda f: dist.MultivariateNormal(f, torch.eye(3, dtype=torch.float64)),
            lambda f: f,
        ),
    ],
    ids=["bernoulli", "poisson", "student-t", "multivariate-normal"],
)
def test_other_families(
    family: Callable[[Tensor], Any], link: Callable[[Tensor], Tensor]
) -> None:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        f = network(sampled_weights(3), x)
        with pyro.plate("data", len(x)):
            pyro.sample("y", family(f), obs=y)

    at, x = random_weights(3), double(NUM_TRAIN, NUM_INPUTS)
    y = family(network(at, x)).sample()
    posterior = fitted(model, at, scattered(3), x, y)
    assert_closed_form(
        lambda w, inputs: link(network(w, inputs)),
        at,
        posterior,
        double(NUM_TEST, NUM_INPUTS),
    )


def test_heteroscedastic_outputs_follow_parameter_by_parameter() -> None:
    """First the locs of an observation, then its log scales."""

    def model(x: Tensor, y: Tensor | None = None) -> None:
        f = network(sampled_weights(4), x)
        with pyro.plate("data", len(x)):
            family = dist.Normal(f[:, :2], F.softplus(f[:, 2:])).to_event(1)
            pyro.sample("y", family, obs=y)

    def eta(weights: Values, inputs: Tensor) -> Tensor:
        f = network(weights, inputs)
        return torch.cat([f[:, :2], F.softplus(f[:, 2:]).log()], -1)

    at = random_weights(4)
    x, y = double(NUM_TRAIN, NUM_INPUTS), double(NUM_TRAIN, 2)
    posterior = fitted(model, at, scattered(4), x, y)
    assert_closed_form(eta, at, posterior, double(NUM_TEST, NUM_INPUTS))


def noisy_model(x: Tensor, y: Tensor | None = None) -> None:
    """A latent noise scale, one a column."""
    weights = sampled_weights(2)
    prior = dist.LogNormal(torch.zeros(2, dtype=torch.float64), 0.5).to_event(1)
    noise = pyro.sample("noise", prior)
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(network(weights, x), noise).to_event(1), obs=y)


def test_a_latent_noise_scale_is_an_output_if_it_is_in_the_subnet() -> None:
    at = {**random_weights(2), "noise": torch.tensor([0.4, 0.7], dtype=torch.float64)}
    x, y = double(NUM_TRAIN, NUM_INPUTS), double(NUM_TRAIN, 2)
    test = double(NUM_TEST, NUM_INPUTS)

    outside = fitted(noisy_model, at, scattered(2), x, y)
    weights = {site: value for site, value in at.items() if site != "noise"}
    assert_closed_form(network, weights, outside, test)

    inside = fitted(noisy_model, at, {**scattered(2), "noise": torch.arange(2)}, x, y)

    def eta(values: Values, inputs: Tensor) -> Tensor:
        log_noise = values["noise"].expand(len(inputs), 2)
        return torch.cat([network(values, inputs), log_noise], -1)

    unconstrained = {**at, "noise": at["noise"].log()}
    assert_closed_form(eta, unconstrained, inside, test)


def test_a_vector_of_fixed_noise_scales_is_no_output() -> None:
    noise = torch.tensor([0.3, 0.9], dtype=torch.float64)

    def model(x: Tensor, y: Tensor | None = None) -> None:
        f = network(sampled_weights(2), x)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(f, noise).to_event(1), obs=y)

    at = random_weights(2)
    x, y = double(NUM_TRAIN, NUM_INPUTS), double(NUM_TRAIN, 2)
    posterior = fitted(model, at, scattered(2), x, y)
    assert_closed_form(network, at, posterior, double(NUM_TEST, NUM_INPUTS))


def sequence_network(weights: Values, x: Tensor) -> Tensor:
    """(N, T, inputs) to (N, T, outputs), coupled along T."""
    return network(weights, x.cumsum(1))


@pytest.mark.filterwarnings("ignore::pyro_subnet.exceptions.UntrainedWarning")
@pytest.mark.parametrize("family", ["normal", "categorical"])
def test_outputs_with_a_further_axis(family: str) -> None:
    """(N, T, C): the elements of an observation follow in row-major order."""

    def model(x: Tensor, y: Tensor | None = None) -> None:
        f = sequence_network(sampled_weights(3), x)
        with pyro.plate("data", len(x)):
            if family == "normal":
                pyro.sample("y", dist.Normal(f, 0.5).to_event(2), obs=y)
            else:
                pyro.sample("y", dist.Categorical(logits=f).to_event(1), obs=y)

    at = random_weights(3)
    x = double(NUM_TRAIN, 2, NUM_INPUTS)
    y = double(NUM_TRAIN, 2, 3)
    if family == "categorical":
        y = y.argmax(-1)
    posterior = fitted(model, at, scattered(3), x, y)

    def eta(weights: Values, inputs: Tensor) -> Tensor:
        f = sequence_network(weights, inputs)
        return (f if family == "normal" else f.log_softmax(-1)).flatten(1)

    assert_closed_form(eta, at, posterior, double(NUM_TEST, 2, NUM_INPUTS))


def coupled_network(weights: Values, x: Tensor) -> Tensor:
    """Data that are centred over the batch: no observation's output is its own."""
    return network(weights, x - x.mean(0))


def test_outputs_that_depend_on_the_whole_batch() -> None:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        f = coupled_network(sampled_weights(2), x)
        f = f + f.mean(0)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(f, 0.5).to_event(1), obs=y)

    def eta(weights: Values, inputs: Tensor) -> Tensor:
        f = coupled_network(weights, inputs)
        return f + f.mean(0)

    at = random_weights(2)
    x, y = double(NUM_TRAIN, NUM_INPUTS), double(NUM_TRAIN, 2)
    posterior = fitted(model, at, scattered(2), x, y)
    assert_closed_form(eta, at, posterior, double(NUM_TEST, NUM_INPUTS))


# ----------------------------------------------------------------------------------
# Several observed sites.


def two_sites(x: Tensor, y: Tensor | None = None, n: Tensor | None = None) -> None:
    f = network(sampled_weights(3), x)
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(f[:, :2], 0.4).to_event(1), obs=y)
        pyro.sample("n", dist.Poisson(f[:, 2].exp()), obs=n)


def test_several_sites_of_one_data_axis_are_joined() -> None:
    at, x = random_weights(3), double(NUM_TRAIN, NUM_INPUTS)
    n = torch.poisson(network(at, x)[:, 2].exp())
    posterior = fitted(two_sites, at, scattered(3), x, double(NUM_TRAIN, 2), n)
    # the log rate is the third column of f: sites follow each other in a row
    assert_closed_form(network, at, posterior, double(NUM_TEST, NUM_INPUTS))


def test_a_site_that_the_subnet_does_not_move_is_left_out() -> None:
    def model(x: Tensor, y: Tensor | None = None, n: Tensor | None = None) -> None:
        weights = sampled_weights(2)
        level = pyro.sample("level", normal())
        with pyro.plate("data", len(x)):
            pyro.sample("n", dist.Poisson(level.exp().expand(len(x))), obs=n)
            family = dist.Normal(network(weights, x), 0.4).to_event(1)
            pyro.sample("y", family, obs=y)

    at = {**random_weights(2), "level": double()}
    x, y = double(NUM_TRAIN, NUM_INPUTS), double(NUM_TRAIN, 2)
    n = torch.arange(NUM_TRAIN).to(x)
    posterior = fitted(model, at, scattered(2), x, y, n)
    weights = {site: value for site, value in at.items() if site != "level"}
    assert_closed_form(network, weights, posterior, double(NUM_TEST, NUM_INPUTS))


def test_sites_with_different_data_axes_are_refused() -> None:
    def model(x: Tensor, z: Tensor) -> None:
        weights = sampled_weights(1)
        for name, inputs in (("y", x), ("v", z)):
            f = network(weights, inputs).squeeze(-1)
            with pyro.plate(f"data-{name}", len(inputs)):
                pyro.sample(name, dist.Normal(f, 0.4), obs=torch.zeros_like(f))

    x, z = double(NUM_TRAIN, NUM_INPUTS), double(3, NUM_INPUTS)
    posterior = fitted(model, random_weights(1), scattered(1), x, z)
    message = (
        rf"must share one data axis .* got lengths \{{'y': {NUM_TRAIN}, 'v': 3\}}\. "
        "Sample `linearized_model` instead"
    )
    with pytest.raises(ModelError, match=message):
        posterior.output_distribution(x, z)


def test_a_subnet_that_reaches_no_output_predicts_the_map() -> None:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        pyro.sample("unused", normal(2))
        f = network(sampled_weights(1), x).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(f, 0.4), obs=y)

    random = random_weights(1)
    at = {**random, "unused": double(2)}
    x, y = double(NUM_TRAIN, NUM_INPUTS), double(NUM_TRAIN)
    with pytest.warns(NoOutputVarianceWarning, match="moves no output") as caught:
        posterior = fitted(model, at, {"unused": torch.tensor([1])}, x, y)
    assert [warning.filename for warning in caught] == [fitted.__code__.co_filename]
    found = posterior.output_distribution(x)
    assert_close(found.mean, network(random, x), **tolerance(torch.float64))
    assert_close(found.variance, torch.zeros_like(found.mean), **EXACT)


# ----------------------------------------------------------------------------------
# Singular covariances.


def relu_model(x: Tensor, y: Tensor | None = None) -> None:
    w1 = pyro.sample("w1", normal(NUM_HIDDEN, NUM_INPUTS))
    w2 = pyro.sample("w2", normal(3, NUM_HIDDEN))
    with pyro.plate("data", len(x)):
        f = F.linear(F.linear(x, w1).relu(), w2)
        pyro.sample("y", dist.Normal(f, 0.4).to_event(1), obs=y)


def relu_network(weights: Values, x: Tensor) -> Tensor:
    return F.linear(F.linear(x, weights["w1"]).relu(), weights["w2"])


def relu_weights() -> dict[str, Tensor]:
    return {"w1": double(NUM_HIDDEN, NUM_INPUTS), "w2": double(3, NUM_HIDDEN)}


@pytest.mark.parametrize("size", [1, 2])
def test_fewer_weights_than_outputs(size: int) -> None:
    """S < C: the covariance has rank S, and its draws stay in that subspace."""
    at = relu_weights()
    x, y = double(NUM_TRAIN, NUM_INPUTS), double(NUM_TRAIN, 3)
    positions = torch.arange(size) * 4
    posterior = fitted(relu_model, at, {"w1": positions}, x, y)
    test = double(NUM_TEST, NUM_INPUTS)
    assert_closed_form(relu_network, at, posterior, test)
    each = posterior.output_distribution(test)
    jac = dense_jacobian(relu_network, at, posterior, test)
    draws = each.sample(torch.Size((20,))) - each.loc
    # projected on what the weights can move, nothing is lost
    projector = jac @ torch.linalg.pinv(jac)
    assert_close((projector @ draws.unsqueeze(-1)).squeeze(-1), draws, **EXACT)


def test_inputs_that_the_subnet_does_not_move_have_no_variance_at_all() -> None:
    """Exactly zero, not small: a hidden unit that is off, an input that is zero."""
    at = relu_weights()
    x = double(NUM_TRAIN, NUM_INPUTS)
    x[:, 1] = x[:, 1].abs() + 0.1
    y = double(NUM_TRAIN, 3)
    # every chosen weight multiplies the second input
    posterior = fitted(relu_model, at, {"w1": torch.tensor([1, 4, 7, 10, 13])}, x, y)
    test = double(NUM_TEST, NUM_INPUTS)
    test[2, 1] = 0.0
    each = posterior.output_distribution(test)
    zero = torch.zeros(3, 3, dtype=torch.float64)
    assert_close(each.covariance_matrix[2], zero, rtol=0.0, atol=0.0)
    assert_close(each.scale_tril[2], zero, rtol=0.0, atol=0.0)
    draws = each.sample(torch.Size((10,)))
    expected = relu_network(at, test)[2].expand(10, 3)
    assert_close(draws[:, 2], expected, **EXACT)
    assert bool((each.variance[[0, 1, 3]].sum(-1) > 0).all())
    joint = posterior.output_distribution(test, joint=True).covariance_matrix
    rows = joint.unflatten(0, (NUM_TEST, 3))[2]
    assert_close(rows, torch.zeros_like(rows), rtol=0.0, atol=0.0)
    assert_closed_form(relu_network, at, posterior, test)


def test_repeated_inputs_have_one_output() -> None:
    """The joint covariance is singular; draws agree at equal inputs."""
    at = relu_weights()
    posterior = fitted(
        relu_model, at, None, double(NUM_TRAIN, NUM_INPUTS), double(NUM_TRAIN, 3)
    )
    test = double(1, NUM_INPUTS).expand(3, -1)
    joint = posterior.output_distribution(test, joint=True)
    draws = joint.sample(torch.Size((10,))).unflatten(-1, (3, 3))
    assert_close(draws[:, 1], draws[:, 0], **EXACT)
    assert_close(draws[:, 2], draws[:, 0], **EXACT)
    assert_closed_form(relu_network, at, posterior, test)


def test_log_density() -> None:
    """The factor is a Cholesky factor, with a positive diagonal, where one exists."""
    x, y = double(NUM_TRAIN, NUM_INPUTS), double(NUM_TRAIN, 2)
    posterior = fitted(regression_model, random_weights(2), None, x, y)
    test = double(NUM_TEST, NUM_INPUTS)
    for joint in (False, True):
        found = posterior.output_distribution(test, joint=joint)
        assert bool((found.scale_tril.diagonal(dim1=-2, dim2=-1) > 0).all())
        value = found.loc + 0.1 * torch.randn_like(found.loc)
        expected = dist.MultivariateNormal(found.loc, found.covariance_matrix)
        assert_close(
            found.log_prob(value), expected.log_prob(value), rtol=1e-6, atol=1e-6
        )
        assert_close(found.entropy(), expected.entropy(), rtol=1e-6, atol=1e-6)


def test_draws_have_the_covariance() -> None:
    """Whitened, they are standard normal: their sum of squares is χ².

    At FALSE_ALARM_RATE, over one number.
    """
    at = relu_weights()
    posterior = fitted(
        relu_model, at, None, double(NUM_TRAIN, NUM_INPUTS), double(NUM_TRAIN, 3)
    )
    each = posterior.output_distribution(double(NUM_TEST, NUM_INPUTS))
    draws = each.sample(torch.Size((1000,)))
    assert draws.shape == (1000, NUM_TEST, 3)
    factor = torch.linalg.cholesky(each.covariance_matrix)
    white = torch.linalg.solve_triangular(
        factor, (draws - each.loc).unsqueeze(-1), upper=False
    )
    total, count = float(white.square().sum()), white.numel()
    assert scipy.stats.chi2.ppf(FALSE_ALARM_RATE / 2, count) < total
    assert total < scipy.stats.chi2.isf(FALSE_ALARM_RATE / 2, count)


# ----------------------------------------------------------------------------------
# Arguments and surroundings.


def test_keyword_arguments_reach_the_model() -> None:
    def model(x: Tensor, *, gain: float = 1.0, y: Tensor | None = None) -> None:
        f = gain * network(sampled_weights(2), x)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(f, 0.4).to_event(1), obs=y)

    at = random_weights(2)
    x, y = double(NUM_TRAIN, NUM_INPUTS), double(NUM_TRAIN, 2)
    posterior = fitted(model, at, scattered(2), x, y=y)
    test = double(NUM_TEST, NUM_INPUTS)
    assert_closed_form(
        lambda w, inputs: 3.0 * network(w, inputs), at, posterior, test, gain=3.0
    )


def regression_model(x: Tensor, y: Tensor | None = None) -> None:
    f = network(sampled_weights(2), x)
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(f, 0.4).to_event(1), obs=y)


def test_data_of_observed_sites_may_be_given_or_left_out() -> None:
    at = random_weights(2)
    x, y = double(NUM_TRAIN, NUM_INPUTS), double(NUM_TRAIN, 2)
    posterior = fitted(regression_model, at, scattered(2), x, y)
    without, with_data = (
        posterior.output_distribution(x),
        posterior.output_distribution(x, y),
    )
    assert_close(without.loc, with_data.loc, **EXACT)
    assert_close(without.scale_tril, with_data.scale_tril, **EXACT)


@pytest.mark.parametrize("num_test", [1, 2])
def test_few_inputs(num_test: int) -> None:
    at = random_weights(2)
    x, y = double(NUM_TRAIN, NUM_INPUTS), double(NUM_TRAIN, 2)
    posterior = fitted(regression_model, at, scattered(2), x, y)
    assert_closed_form(network, at, posterior, double(num_test, NUM_INPUTS))


def test_non_contiguous_inputs() -> None:
    at = random_weights(2)
    x, y = double(NUM_TRAIN, NUM_INPUTS), double(NUM_TRAIN, 2)
    posterior = fitted(regression_model, at, scattered(2), x, y)
    test = double(NUM_INPUTS, 2 * NUM_TEST).mT[::2]
    assert not test.is_contiguous()
    assert_closed_form(network, at, posterior, test)


def test_masks_and_scales_of_the_data_do_not_touch_the_outputs() -> None:
    """They weigh the training data; a prediction is for any input."""

    def model(x: Tensor, y: Tensor | None = None) -> None:
        f = network(sampled_weights(2), x)
        mask = torch.arange(len(x)) % 2 == 0
        with pyro.plate("data", len(x)), poutine.scale(scale=3.0):
            pyro.sample("y", dist.Normal(f, 0.4).to_event(1).mask(mask), obs=y)

    at = random_weights(2)
    x, y = double(NUM_TRAIN, NUM_INPUTS), double(NUM_TRAIN, 2)
    posterior = fitted(model, at, scattered(2), x, y)
    assert_closed_form(network, at, posterior, double(NUM_TEST, NUM_INPUTS))


@pytest.mark.parametrize("joint", [False, True])
def test_dtype_is_kept_and_nothing_else_is_touched(
    joint: bool, dtype: torch.dtype
) -> None:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        zero = torch.zeros(2, NUM_INPUTS, dtype=dtype)
        w = pyro.sample("w", dist.Normal(zero, 1.0).to_event(2))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(F.linear(x, w), 0.4).to_event(1), obs=y)

    x = torch.randn(NUM_TRAIN, NUM_INPUTS, dtype=dtype)
    y = torch.randn(NUM_TRAIN, 2, dtype=dtype)
    at = {"w": torch.randn(2, NUM_INPUTS, dtype=dtype)}
    posterior = fitted(model, at, None, x, y)
    rng, keys = torch.get_rng_state(), set(pyro.get_param_store().keys())
    found = posterior.output_distribution(x, joint=joint)
    assert_close(torch.get_rng_state(), rng, rtol=0, atol=0)
    assert set(pyro.get_param_store().keys()) == keys
    assert found.loc.dtype == dtype
    assert found.covariance_matrix.dtype == dtype
    assert found.sample().dtype == dtype
    expected = F.linear(x, at["w"]).reshape(found.loc.shape)
    assert_close(found.loc, expected, **tolerance(dtype, "closed_form"))
