"""Information from scores: against closed forms, and without leaving traces."""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np
import pyro.distributions as dist
import pytest
import torch
import torch.distributions as td
from torch import Tensor
from torch.distributions import constraints
from torch.testing import assert_close

from pyro_subnet.curvature.likelihood import find_family
from pyro_subnet.curvature.monte_carlo import NUM_DRAWS, sampled_family
from pyro_subnet.exceptions import (
    MonteCarloFisherWarning,
    NonFiniteError,
    UnsupportedLikelihoodError,
)
from tests.tolerances import num_standard_errors, tolerance

NO_SHAPE = torch.Size()

sampled = pytest.mark.filterwarnings(
    "ignore::pyro_subnet.exceptions.MonteCarloFisherWarning"
)


class Plain(td.Distribution):
    """A user's normal: keeps its arguments as they came, says little about itself."""

    arg_constraints: ClassVar = {
        "loc": constraints.real,
        "scale": constraints.positive,
    }
    support = constraints.real

    def __init__(self, loc: Tensor, scale: Tensor) -> None:
        self.loc, self.scale = loc, scale
        super().__init__(torch.broadcast_shapes(loc.shape, scale.shape))

    def sample(self, sample_shape: torch.Size = NO_SHAPE) -> Tensor:
        noise = torch.randn(self._extended_shape(sample_shape), dtype=self.loc.dtype)
        return (self.loc + self.scale * noise).detach()

    def log_prob(self, value: Tensor) -> Tensor:
        return td.Normal(self.loc, self.scale).log_prob(value)


class Unconstrained(Plain):
    """Does not say where its scale lies."""

    arg_constraints: ClassVar = {"loc": constraints.real}


class Terse(Plain):
    """Says nothing about its arguments."""

    arg_constraints = td.Distribution.arg_constraints


class Unreadable(Plain):
    """Does not keep what it was given."""

    def __init__(self, center: Tensor, width: Tensor) -> None:
        super().__init__(center, width)


class Misread(Plain):
    """Keeps something else than it was given."""

    def __init__(self, loc: Tensor, scale: Tensor) -> None:
        super().__init__(loc, 2 * scale)


class Silent(Plain):
    """Has a density, no sampler."""

    def sample(self, sample_shape: torch.Size = NO_SHAPE) -> Tensor:
        raise NotImplementedError("no sampler")


class Overflowing(Plain):
    """Its sampler rounds to infinity now and then."""

    def sample(self, sample_shape: torch.Size = NO_SHAPE) -> Tensor:
        value = super().sample(sample_shape)
        return torch.where(torch.rand_like(value) < 0.01, torch.inf, value)


class Nameless(Plain):
    """Hides the names of its arguments."""

    def __init__(self, *args: Tensor) -> None:
        super().__init__(*args)


@sampled
def test_draws_agree_with_the_closed_form_of_a_normal(dtype) -> None:
    data = 400
    scale = torch.linspace(0.5, 2.0, data, dtype=dtype)
    d = dist.Normal(torch.linspace(-1.0, 1.0, data, dtype=dtype), scale)
    family = sampled_family(d)
    assert not family.exact
    assert family.part_names == ("loc", "log_scale")
    scores = torch.stack([1 / scale, torch.full_like(scale, math.sqrt(2))], dim=-1)
    units = scores.unsqueeze(-1) * scores.unsqueeze(-2)
    found = (family.fisher(d, family.part_names) / units).mean(0)
    # Variances of z², z (z² - 1) / √2 and (z² - 1)² / 2 of a normal z: each entry's
    # standard error. Three checks share the false-alarm rate of 2e-5.
    variances = torch.tensor([[2.0, 5.0], [5.0, 14.0]], dtype=dtype)
    errors = (variances / (NUM_DRAWS * data)).sqrt()
    deviation = (found - torch.eye(2, dtype=dtype)).abs() / errors
    assert deviation.max() < num_standard_errors(3)


@sampled
def test_draws_agree_with_the_closed_form_of_a_logistic() -> None:
    data = 400
    d = dist.Logistic(torch.zeros(data).double(), torch.full((data,), 0.5).double())
    family = find_family(d)
    found = family.fisher(d, family.part_names).mean(0)
    # With t = tanh(z/2) the scores are t and z t - 1, with variances 1/3 and
    # (3 + π²)/9. Fourth moments are below 1/5 and 12.
    expected = torch.tensor([1 / 3 / 0.5**2, (3 + math.pi**2) / 9]).double()
    bound = torch.tensor([0.2 / 0.5**4, 12.0]).div(NUM_DRAWS * data).sqrt().double()
    deviation = (found.diagonal() - expected).abs() / bound
    assert deviation.max() < num_standard_errors(2)


@sampled
def test_draws_agree_with_the_same_family_under_another_name() -> None:
    data = 200
    shape = torch.full((data,), 3.0, dtype=torch.float64)
    rate = torch.full((data,), 0.7, dtype=torch.float64)
    mixed = dist.GammaPoisson(shape, rate)
    counts = dist.NegativeBinomial(shape, logits=-rate.log())
    family = find_family(mixed)
    assert family.part_names == ("log_concentration", "log_rate")
    found = family.fisher(mixed, family.part_names)
    known = find_family(counts)
    # logits = -log rate
    sign = torch.tensor([1.0, -1.0]).double()
    expected = known.fisher(counts, known.part_names) * sign * sign[:, None]
    errors = found.std(0) / math.sqrt(data)
    deviation = (found.mean(0) - expected[0]).abs() / errors
    assert deviation.max() < num_standard_errors(3)


@sampled
def test_root_squares_to_the_same_estimate(dtype) -> None:
    d = dist.Logistic(torch.zeros(2, 3, dtype=dtype), torch.ones((), dtype=dtype))
    family = find_family(d)
    for parts in (["loc"], ["log_scale"], ["loc", "log_scale"]):
        root, fisher = family.root(d, parts), family.fisher(d, parts)
        assert root.dtype == fisher.dtype == dtype
        assert fisher.shape == (2, 3, len(parts), len(parts))
        assert_close(root.mT @ root, fisher, **tolerance(dtype, "closed_form"))


@sampled
def test_draws_come_from_a_stream_of_their_own() -> None:
    d = dist.Logistic(torch.zeros(3), torch.ones(3))
    other = dist.Logistic(torch.ones(3), torch.ones(3))
    family = find_family(d)
    state = torch.get_rng_state()
    first = family.fisher(d, family.part_names)
    assert_close(torch.get_rng_state(), state, rtol=0, atol=0)
    torch.manual_seed(1)
    assert_close(family.fisher(d, family.part_names), first, rtol=0, atol=0)
    # Another minibatch and another observation get other draws.
    assert (family.fisher(other, family.part_names) != first).any()
    assert (first[0] != first[1]).any()


def test_the_estimate_is_announced_with_its_error() -> None:
    d = dist.Logistic(torch.zeros(2), torch.ones(2))
    message = r"of Logistic has no .* over 4096 draws .* about [1-5]\.\d% for each"
    with pytest.warns(MonteCarloFisherWarning, match=message):
        find_family(d).root(d, ["loc"])


@pytest.mark.parametrize("shape", [(), (3,), (2, 2)])
@pytest.mark.parametrize(
    "d",
    [
        dist.Bernoulli(logits=torch.tensor(0.3).double()),
        dist.Categorical(logits=torch.tensor([1.0, -2.0, 0.0]).double()),
        dist.OneHotCategorical(probs=torch.tensor([0.1, 0.2, 0.7]).double()),
        dist.Binomial(6, probs=torch.tensor(0.2).double()),
    ],
    ids=lambda d: type(d).__name__,
)
def test_a_small_support_is_summed_exactly(d, shape) -> None:
    d = d.expand(shape)
    family = sampled_family(d)
    assert family.exact
    assert family.part_names == ("logits",)
    known = find_family(d)
    expected = known.fisher(d, ["logits"])
    assert_close(family.fisher(d, ["logits"]), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("d", "num_data"),
    [
        # Of 2^22 scores, the most that are held at once: one value, and two of three.
        (dist.Bernoulli(logits=torch.tensor(0.3).double()), 2**21 + 1),
        (dist.Categorical(logits=torch.tensor([1.0, -2.0, 0.0]).double()), 500_000),
    ],
    ids=["one", "two"],
)
def test_a_support_is_summed_in_parts_where_data_are_many(
    d: td.Distribution, num_data: int
) -> None:
    expected = find_family(d).fisher(d, ["logits"])
    many = d.expand((num_data,))
    found = sampled_family(many).fisher(many, ["logits"])
    expected = expected.expand(num_data, -1, -1)
    assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_a_beta_binomial_is_exact_up_to_a_support_too_large() -> None:
    a, b = torch.tensor([0.5, 3.0]).double(), torch.tensor([2.0, 1.0]).double()
    d = dist.BetaBinomial(a, b, total_count=1)
    family = find_family(d)
    assert family.exact
    # One trial is a Bernoulli of mean a / (a + b): logit = log a - log b.
    trial = dist.Bernoulli(a / (a + b))
    variance = find_family(trial).fisher(trial, ["logits"])
    expected = variance * torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).double()
    assert_close(family.fisher(d, family.part_names), expected, rtol=1e-10, atol=1e-12)
    assert not find_family(dist.BetaBinomial(a, b, total_count=5000)).exact


@sampled
def test_draws_in_chunks_are_as_many() -> None:
    """Of 2^22 scores, the most that are held at once: 3495 draws, then 601."""
    num_data = 1200
    d = Plain(torch.zeros(num_data).double(), torch.tensor(2.0).double())
    found = find_family(d).fisher(d, ["loc"])
    # Sums of 4096 squares: weights that miscount draws would show as 2% or more.
    bound = num_standard_errors(1) * math.sqrt(2 / (NUM_DRAWS * num_data))
    assert (4 * found.mean() - 1).abs() < bound


@sampled
def test_an_infinite_label_is_drawn_again() -> None:
    d = Overflowing(torch.zeros(2).double(), torch.tensor(1.0).double())
    found = find_family(d).fisher(d, ["loc"])
    bound = num_standard_errors(2) * math.sqrt(2 / NUM_DRAWS)
    assert ((found - 1).abs() < bound).all()


REBUILT = [
    dist.Logistic(torch.zeros(2, 1), torch.ones(3)),
    dist.SoftLaplace(torch.zeros(2), torch.ones(2)),
    dist.Kumaraswamy(torch.ones(2), 2.0),
    dist.FisherSnedecor(torch.tensor([3.0, 9.0]), torch.tensor(12.0)),
    dist.ContinuousBernoulli(probs=torch.tensor([0.2, 0.9])),
    dist.RelaxedBernoulli(torch.tensor(0.5), logits=torch.tensor([0.2, 1.0])),
    dist.GammaPoisson(torch.ones(2), torch.tensor(2.0)),
    dist.ZeroInflatedPoisson(torch.ones(2), gate=torch.tensor([0.2, 0.6])),
    dist.ZeroInflatedNegativeBinomial(
        torch.tensor([2.0, 3.0]), logits=torch.zeros(2), gate=torch.tensor(0.3)
    ),
    dist.DirichletMultinomial(torch.ones(2, 3), total_count=4),
    dist.MultivariateStudentT(torch.tensor(5.0), torch.zeros(2, 3), torch.eye(3)),
    Plain(torch.zeros(2, 1), torch.ones(3)),
]


@sampled
@pytest.mark.parametrize("d", REBUILT, ids=lambda d: type(d).__name__)
def test_distributions_are_built_again_from_their_outputs(d: td.Distribution) -> None:
    family = find_family(d)
    outputs = family.outputs(d)
    assert all(eta.shape[:-1] == d.batch_shape for eta in outputs.values())
    rebuilt = family.distribution(**family.parameters(d, outputs))
    y = d.sample()
    assert_close(rebuilt.log_prob(y), d.log_prob(y), rtol=1e-4, atol=1e-4)
    leading = {name: torch.stack([eta] * 4) for name, eta in outputs.items()}
    wider = family.distribution(**family.parameters(d, leading))
    assert wider.batch_shape == (4, *d.batch_shape)
    fisher = family.fisher(d, family.part_names)
    size = sum(eta.shape[-1] for eta in outputs.values())
    assert fisher.shape == (*d.batch_shape, size, size)
    assert (fisher.diagonal(dim1=-2, dim2=-1) > 0).all()


def test_the_stored_synonym_does_not_change_the_outputs() -> None:
    probs = dist.ContinuousBernoulli(probs=torch.tensor([0.2, 0.9]))
    logits = dist.ContinuousBernoulli(logits=probs.logits)
    assert (
        find_family(probs).part_names == find_family(logits).part_names == ("logits",)
    )


@pytest.mark.filterwarnings("ignore:.*does not define `arg_constraints`:UserWarning")
def test_a_tensor_without_a_constraint_is_an_output_too() -> None:
    # Held constant, its dependence on latents would go unseen.
    for kind in (Unconstrained, Terse):
        d = kind(torch.zeros(2), torch.ones(2))
        assert find_family(d).part_names == ("loc", "scale")


def test_outputs_of_a_sampled_family_pass_through_transforms() -> None:
    start = torch.tensor([[0.1, 0.2], [0.3, 0.4]])

    def outputs(log_scale: Tensor) -> Tensor:
        d = Plain(torch.zeros(2), log_scale.exp())
        return find_family(d).outputs(d)["log_scale"].squeeze(-1)

    td.Distribution.set_default_validate_args(False)
    assert_close(torch.func.vmap(outputs)(start), start)
    moved, tangent = torch.func.jvp(outputs, (start[0],), (start[1],))
    assert_close(moved, start[0])
    assert_close(tangent, start[1])


def refuse(d: td.Distribution) -> None:
    family = find_family(d)
    family.fisher(d, family.part_names)


@pytest.mark.parametrize(
    ("d", "reason"),
    [
        (Unreadable(torch.zeros(2), torch.ones(2)), "argument `center` cannot be read"),
        (Nameless(torch.zeros(2), torch.ones(2)), "constructor takes no tensor"),
        (Misread(torch.zeros(2), torch.ones(2)), "arguments do not describe"),
        (Silent(torch.zeros(2), torch.ones(2)), r"cannot be sampled \(no sampler\)"),
        (
            td.Uniform(torch.zeros(2), 2.0),
            "score has the mean -1 instead|no unconstrained",
        ),
        (td.Pareto(torch.ones(2), 3.0), "score has the mean 3 instead of 0"),
        (
            dist.ZeroInflatedDistribution(
                dist.Poisson(torch.ones(2)), gate=torch.tensor(0.1)
            ),
            "argument `base_dist` is a Poisson",
        ),
        (
            td.TransformedDistribution(
                td.Normal(torch.zeros(2), 1.0), [td.ExpTransform()]
            ),
            "argument `base_distribution` cannot be read",
        ),
        (dist.ImproperUniform(constraints.real, (2,), ()), "argument `support` is a"),
    ],
)
def test_what_cannot_be_followed_is_refused(d, reason) -> None:
    message = rf"must be one of .* got .*, .*{reason}.*\. Observe one of these instead"
    with pytest.raises(UnsupportedLikelihoodError, match=message):
        refuse(d)


@sampled
def test_scores_that_are_not_finite_are_named() -> None:
    td.Distribution.set_default_validate_args(False)
    d = Plain(torch.tensor([0.0, np.nan]), torch.ones(2))
    with pytest.raises(NonFiniteError, match=r"Plain must be finite; got 1 .*\(1,\)"):
        find_family(d).root(d, ["loc"])
