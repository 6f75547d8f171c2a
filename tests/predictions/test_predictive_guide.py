"""The posterior's predictive methods: what they pass on, and how they follow tuning."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pyro.infer import Predictive
from torch.testing import assert_close

from pyro_subnet import to_inference_data
from pyro_subnet.exceptions import DataError, NonFiniteError, OptionError
from tests.cases import CASES, DOUBLE
from tests.tolerances import num_standard_errors, tolerance

EXACT = tolerance(torch.float64, "closed_form")


def fitted(name: str, **options: Any) -> Any:
    case = CASES[name](DOUBLE)
    guide = case.guide(case.scattered(), **options)
    return guide.laplace_approximation(*case.args, **case.kwargs)


def test_noise_adds_to_the_variance_of_the_outputs() -> None:
    posterior = fitted("regression_mlp")
    x = CASES["regression_mlp"](DOUBLE).args[0]
    outputs = posterior.output_distribution(x)
    for scale in (1.0, 2.5):
        found = posterior.with_noise_scale(scale)
        outputs = found.output_distribution(x)
        predictive = found.predictive_distribution(x)
        assert_close(predictive.mean, outputs.mean.squeeze(-1), **EXACT)
        expected = outputs.variance.squeeze(-1) + (scale * 0.3) ** 2
        assert_close(predictive.variance, expected, **EXACT)


@pytest.mark.parametrize("form", ["primal", "dual"])
def test_a_tuned_posterior_is_coherent_with_its_linearized_model(form: str) -> None:
    """Moments of draws from it, and of the closed form; 14 checks, 4,000 draws."""
    x = CASES["regression_mlp"](DOUBLE).args[0]
    posterior = fitted("regression_mlp", form=form)
    posterior = posterior.with_prior_precision(0.3).with_noise_scale(2.0)
    torch.manual_seed(1)
    count = 4_000
    draws = Predictive(
        posterior.linearized_model, guide=posterior, num_samples=count, parallel=True
    )(x)["y"]
    closed = posterior.predictive_distribution(x)
    limit = num_standard_errors(2 * len(x))
    error = (draws.mean(0) - closed.mean) / (closed.stddev / math.sqrt(count))
    assert float(error.abs().max()) < limit
    ratio = draws.var(0) / closed.variance - 1
    assert float(ratio.abs().max()) < limit * math.sqrt(2 / count)


def test_weight_space_draws_run_the_model_as_it_is_written() -> None:
    """The noise scale belongs to the linearized model and the closed forms."""
    x = CASES["regression_mlp"](DOUBLE).args[0]
    posterior = fitted("regression_mlp").with_noise_scale(100.0)
    torch.manual_seed(1)
    model = CASES["regression_mlp"](DOUBLE).model
    narrow = posterior.with_prior_precision(1e6)
    draws = Predictive(model, guide=narrow, num_samples=200)(x)["y"]
    assert float(draws.std(0).max()) < 0.6


@pytest.mark.parametrize(
    ("name", "link", "is_exact"),
    [
        ("regression_mlp", None, True),
        ("classification_mlp", "probit", True),
        ("classification_mlp", "mc", False),
        ("heteroscedastic", "mc", False),
    ],
)
def test_the_error_is_stated(name: str, link: str | None, is_exact: bool) -> None:
    case = CASES[name](DOUBLE)
    if name == "heteroscedastic":
        guide = case.guide([8, 9, 10])
        posterior = guide.laplace_approximation(*case.args)
    else:
        posterior = fitted(name)
    x, y = case.args
    error = posterior.predictive_error(y, x, link=link, num_samples=500)
    assert error.shape == (len(x),)
    assert bool((error == 0).all()) is is_exact
    more = posterior.predictive_error(y, x, link=link, num_samples=32_000)
    # Of 64 times as many draws an eighth, up to what the estimates themselves vary.
    assert is_exact or 4 < float((error / more).median()) < 16


def test_functions_share_one_draw_of_the_weights() -> None:
    """Their covariance across inputs is that of ``joint=True``; 10,000 draws."""
    case = CASES["regression_mlp"](DOUBLE)
    posterior, x = fitted("regression_mlp"), case.args[0]
    generator = torch.Generator().manual_seed(5)
    count = 10_000
    draws = posterior.sample_functions(count, x, generator=generator).squeeze(-1)
    joint = posterior.output_distribution(x, joint=True)
    covariance = joint.covariance_matrix
    found = (draws - joint.mean).T @ (draws - joint.mean) / count
    variance = covariance.diagonal()
    spread = (covariance.square() + torch.outer(variance, variance)) / count
    error = ((found - covariance) / spread.sqrt()).abs()
    assert float(error.max()) < num_standard_errors(covariance.numel())
    again = posterior.sample_functions(count, x, generator=generator.manual_seed(5))
    assert_close(again.squeeze(-1), draws, **EXACT)


def test_a_link_that_means_nothing() -> None:
    posterior = fitted("regression_mlp")
    x = CASES["regression_mlp"](DOUBLE).args[0]
    message = r"`link` must be one of 'exact', 'mc' for Normal; got 'bridge'"
    with pytest.raises(OptionError, match=message):
        posterior.predictive_distribution(x, link="bridge")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("name", "parts"),
    [("regression_mlp", ("mean", "variance")), ("classification_mlp", ("probs",))],
)
def test_batches_are_predicted_as_all_inputs_at_once(
    name: str, parts: tuple[str, ...], dtype: torch.dtype
) -> None:
    """Batches that do not divide the data, in every form that a fit takes them."""
    case = CASES[name](torch.empty(0, dtype=dtype))
    posterior = case.guide(case.scattered()).laplace_approximation(*case.args)
    x = case.args[0]
    whole = posterior.predictive_distribution(x)
    batches = [x[:2], (x[2:3],), ((x[3:],), {})]
    found = list(posterior.predictive_distributions_from(batches))
    tight = tolerance(dtype, "reordered")
    assert [each.batch_shape for each in found] == [(2,), (1,), (len(x) - 3,)]
    for part in parts:
        joined = torch.cat([getattr(each, part) for each in found])
        assert_close(joined, getattr(whole, part), **tight)


def test_a_stream_runs_the_model_when_a_batch_is_asked_for() -> None:
    """A loader may be endless, and a batch is loaded when its turn comes."""
    posterior, loaded = fitted("regression_mlp"), list[int]()
    x = CASES["regression_mlp"](DOUBLE).args[0]

    def batches() -> Any:
        while True:
            loaded.append(len(loaded))
            yield x[:2]

    stream = posterior.predictive_distributions_from(batches(), link="mc")
    assert loaded == []
    next(stream)
    next(stream)
    assert loaded == [0, 1]


def test_bad_batches_are_refused_before_the_first_is_asked_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The progress bar is shown where it is asked for alone."""
    posterior = fitted("regression_mlp")
    x = CASES["regression_mlp"](DOUBLE).args[0]
    with pytest.raises(DataError, match="iterable of batches"):
        posterior.predictive_distributions_from(x)
    with pytest.raises(OptionError, match="num_samples"):
        posterior.predictive_distributions_from([x], num_samples=0)
    with pytest.raises(DataError, match="at least one batch"):
        list(posterior.predictive_distributions_from([]))
    list(posterior.predictive_distributions_from([x]))
    assert "Predictions" not in capsys.readouterr().err
    list(posterior.predictive_distributions_from([x], progress=True))
    assert "Predictions" in capsys.readouterr().err


@pytest.mark.parametrize(
    "call",
    [
        lambda posterior, x: posterior.output_distribution(x),
        lambda posterior, x: posterior.output_distribution(x, joint=True),
        lambda posterior, x: posterior.output_variance(x),
        lambda posterior, x: posterior.output_variance(x, num_samples=3),
        lambda posterior, x: posterior.sample_functions(2, x),
        lambda posterior, x: posterior.predictive_distribution(x),
        lambda posterior, x: to_inference_data(posterior, x, x[:, 1], num_samples=3),
    ],
)
def test_an_infinite_input_that_the_network_squashes(call: Any) -> None:
    """The output is finite and its derivative, 0 times infinity, is none."""
    posterior = fitted("regression_mlp")
    x = CASES["regression_mlp"](DOUBLE).args[0].clone()
    x[2, 0] = torch.inf
    with pytest.raises(NonFiniteError, match="Derivatives of the outputs must be fini"):
        call(posterior, x)
