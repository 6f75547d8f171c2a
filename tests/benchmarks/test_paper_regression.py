"""Networks trained at once, and the baselines, against sums made by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from benchmarks.paper import toy, uci
from benchmarks.paper.members import (
    Best,
    Members,
    Schedule,
    Shape,
    batches,
    loss_of,
    parse_hidden,
    train,
)
from benchmarks.paper.regression import Fitted, Mixture, Network, Plan, fit_rival
from benchmarks.paper.swag import SCALES, STEPS, swag
from benchmarks.selectors.data import Split, uci_split
from pyro_subnet.selection import RandomSubnet
from tests.benchmarks.test_paper_harness import uci_folder
from tests.tolerances import num_standard_errors, tolerance

F32 = tolerance(torch.float32)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def members(count: int = 3, hidden: tuple[int, ...] = (4, 5)) -> Members:
    made = Members.random(Shape(hidden, "tanh"), 2, count, seeded())
    return replace(made, log_scale=torch.linspace(-1, 0, count))


def small_split() -> Split:
    generator = seeded(1)

    def pairs(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.randn(count, 2, generator=generator, dtype=torch.float64)
        noise = torch.randn(count, generator=generator, dtype=torch.float64)
        return x, x.prod(1) + 0.1 * noise

    return Split("set", "standard", 3, pairs(30), pairs(11), {"test": pairs(7)}, 2.0)


@pytest.fixture(scope="module")
def network() -> Network:
    plan = Plan(Schedule(60, batch=16, every=20), num_members=3, swag_steps=40)
    return Network(small_split(), Shape((6,), "relu"), plan)


@pytest.mark.parametrize("hidden", [(4,), (4, 5)])
def test_outputs_are_those_of_each_network(hidden: tuple[int, ...]) -> None:
    made = members(3, hidden)
    x = torch.randn(6, 2, generator=seeded())
    for member in range(3):
        net = made.module(member)
        want = net(x.double()).squeeze(-1).float()
        torch.testing.assert_close(made(x)[member], want, **F32)
        packed = nn.utils.parameters_to_vector(net.parameters())
        torch.testing.assert_close(made.packed()[member], packed.float())
    again = made.unpacked(made.packed())
    torch.testing.assert_close(again(x), made(x))
    assert made.shape.num_params(2) == made.packed().shape[1]


def test_each_network_may_have_its_own_inputs() -> None:
    made, x = members(), torch.randn(3, 6, 2, generator=seeded())
    want = torch.stack([made(x[member])[member] for member in range(3)])
    torch.testing.assert_close(made(x), want)


def test_loss_is_the_negative_log_joint() -> None:
    made, num_data = members(), 20
    x, y = torch.randn(5, 2, generator=seeded()), torch.randn(5, generator=seeded(1))
    losses = loss_of(made, made(x), y, num_data)
    for member in range(3):
        scale = made.log_scale[member].exp()
        noise = torch.distributions.Normal(made(x)[member], scale).log_prob(y)
        weights = made.packed()[member]
        prior = torch.distributions.Normal(0.0, 1.0).log_prob(weights)
        half = 0.5 * math.log(2 * math.pi)
        want = -noise.mean() - half - (prior + half).sum() / num_data
        torch.testing.assert_close(losses[member], want, **F32)


def test_batches_pass_over_all_data_in_orders_of_their_own() -> None:
    rows = list(batches(10, Schedule(4, batch=5), 3, seeded()))
    assert all(part.shape == (3, 5) for part in rows)
    for first, second in (rows[:2], rows[2:]):
        for member in range(3):
            both = torch.cat([first[member], second[member]])
            assert sorted(both.tolist()) == list(range(10))
    assert rows[0][0].tolist() != rows[0][1].tolist()


def test_training_keeps_the_best_state_of_each_network() -> None:
    x = torch.zeros(4, 2)
    start = replace(members(2), log_scale=torch.zeros(2))
    y = start(x)[0].detach()  # the first network fits as it is; the second does not
    best = Best((x, y))
    best.look(start)
    other = Members(start.shape, tuple(2 * p for p in start.parameters), torch.ones(2))
    best.look(other)
    assert best.members is not None
    torch.testing.assert_close(best.members.log_scale[0], torch.tensor(0.0))
    torch.testing.assert_close(best.members.packed()[0], start.packed()[0])


def test_training_learns_the_function_and_the_noise() -> None:
    split = small_split()
    start = Members.random(Shape((20,)), 2, 2, seeded())
    trained = train(
        start, split.train, split.held_out, Schedule(400, batch=30), generator=seeded()
    )
    x, y = (part.float() for part in split.train)
    error = (trained(x) - y).square().mean(1)
    assert (error < 0.2 * y.var()).all()
    assert (trained.log_scale < -0.5).all()
    assert not trained.packed().requires_grad
    again = train(
        start, split.train, split.held_out, Schedule(400, batch=30), generator=seeded()
    )
    torch.testing.assert_close(again.packed(), trained.packed(), rtol=0, atol=0)


def test_training_reaches_a_noise_of_a_thousandth() -> None:
    """As on naval: of a linear network, whose error is the noise."""
    generator = seeded(5)
    x = torch.randn(300, 2, generator=generator)
    y = x @ torch.tensor([0.5, -0.3]) + 1e-3 * torch.randn(300, generator=generator)
    start = Members.random(Shape(()), 2, 1, seeded())
    schedule = Schedule(1500, every=None)
    trained = train(start, (x, y), (x, y), schedule, generator=seeded())
    errors = (trained(x) - y).square().mean(1).sqrt()
    torch.testing.assert_close(trained.log_scale.exp(), errors, rtol=0.15, atol=0)
    assert 0.8e-3 < float(errors) < 1.5e-3


def test_held_out_noise_is_the_best_for_them(network: Network) -> None:
    x, y = network.split.held_out
    found = network.at_map_with_held_out_noise()
    own = network.at_map().predict(x)
    best = found.predict(x)
    torch.testing.assert_close(best.loc, own.loc)
    assert best.nll(y) <= own.nll(y)
    for factor in (0.9, 1.1):
        other = Mixture(best.loc, factor * best.scale)
        assert best.nll(y) < other.nll(y)


def test_training_by_the_evidence_keeps_its_priors_and_noise(network: Network) -> None:
    found = network.by_evidence(5)
    assert found.notes["S"] == 5
    assert found.notes["scale"] > 0
    assert found.notes["noise"] > 0
    x, y = network.split.train
    assert found.predict(x).rmse(y) < float(y.std(correction=0))
    # Noise, and a function that five weights move.
    assert (found.predict(x).scale > found.notes["noise"]).any()


def test_ella_of_all_directions_is_full_laplace_on_its_inputs(network: Network) -> None:
    """Gradients of the training inputs lie in the span of their kernel."""
    own = replace(network, plan=replace(network.plan, tuned=False))
    found, whole = fit_rival("ELLA", own), own.subnet(None)
    x, _ = network.split.train
    assert 10 < found.notes["directions"] <= 20
    torch.testing.assert_close(found.spread(x), whole.spread(x), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.predict(x).loc, whole.predict(x).loc)


def test_rivals_take_the_best_of_what_is_tried(network: Network) -> None:
    x, y = network.split.held_out
    own = replace(network, plan=replace(network.plan, tuned=False))
    best = fit_rival("ELLA", network).predict(x).nll(y)
    assert best <= fit_rival("ELLA", own).predict(x).nll(y)
    found = fit_rival("VaLLA", network)
    assert found.notes["rate"] in (1e-3, 1e-2)
    assert (found.spread(x) > 0).all()


def test_a_given_noise_stays() -> None:
    split = small_split()
    start = Members.random(Shape((3,)), 2, 2, seeded())
    schedule = Schedule(5, noise_scale=0.1, every=None)
    trained = train(start, split.train, split.held_out, schedule, generator=seeded())
    torch.testing.assert_close(trained.log_scale.exp(), torch.full((2,), 0.1))


def test_dropout_keeps_the_mean_of_a_linear_layer() -> None:
    made = Members.random(Shape((50,), "relu"), 2, 1, seeded())
    count, rate = 4000, 0.3
    many = made[torch.zeros(count, dtype=torch.int64)]
    x = torch.randn(3, 2, generator=seeded(1))
    drawn = many(x, torch.full((count,), rate), seeded(2))
    error = drawn.std(0) / count**0.5
    # The mean of masks that keep their scale is the network without dropout.
    gap = (drawn.mean(0) - made(x)[0]).abs()
    assert (gap < num_standard_errors(3) * error).all()
    hidden = torch.relu(x @ made.parameters[0][0].mT + made.parameters[1][0])
    squares = (hidden * made.parameters[2][0]).square().sum(1)
    want = (squares * rate / (1 - rate)).sqrt()
    # A standard deviation of n draws is off by about itself over sqrt(2 n).
    torch.testing.assert_close(
        drawn.std(0), want, rtol=num_standard_errors(3) / (2 * count) ** 0.5, atol=0.0
    )


def test_a_mixture_averages_densities() -> None:
    loc = torch.tensor([[0.0, 1.0], [2.0, 1.0], [-1.0, 4.0]], dtype=torch.float64)
    scale = torch.tensor([[1.0], [0.5], [2.0]], dtype=torch.float64)
    y = torch.tensor([0.3, 2.0], dtype=torch.float64)
    mixed = Mixture(loc, scale)
    want = [
        math.log(
            sum(
                math.exp(-0.5 * ((float(y[n]) - float(loc[k, n])) / s) ** 2)
                / (s * math.sqrt(2 * math.pi))
                for k, s in enumerate((1.0, 0.5, 2.0))
            )
            / 3
        )
        for n in range(2)
    ]
    torch.testing.assert_close(
        mixed.log_prob(y), torch.tensor(want, dtype=torch.float64)
    )
    assert mixed.nll(y) == pytest.approx(-sum(want) / 2)
    errors = [(1 / 3 - 0.3) ** 2, 0.0]
    assert mixed.rmse(y) == pytest.approx((sum(errors) / 2) ** 0.5)


def test_an_ensemble_is_its_networks(network: Network) -> None:
    x, _ = network.split.tests["test"]
    each = [network.members.module(member) for member in range(3)]
    outputs = torch.stack([net(x).squeeze(-1) for net in each]).detach()
    found = network.ensemble().predict(x)
    torch.testing.assert_close(found.loc, outputs, rtol=1e-4, atol=1e-5)
    noise = network.members.log_scale.double().exp()
    torch.testing.assert_close(found.scale.squeeze(-1), noise)
    spread = outputs.std(0, correction=0)
    torch.testing.assert_close(
        network.ensemble().spread(x), spread, rtol=1e-3, atol=1e-5
    )
    first = network.at_map().predict(x)
    torch.testing.assert_close(first.loc, found.loc[:1])


def test_mc_dropout_takes_the_rate_of_best_held_out_density(network: Network) -> None:
    found = network.mc_dropout()
    x, y = network.split.held_out
    assert round(found.notes["rate"], 3) in network.plan.rates
    assert found.predict(x).loc.shape == (network.plan.num_draws, len(x))
    assert math.isfinite(found.predict(x).nll(y))
    torch.testing.assert_close(found.predict(x).loc, found.predict(x).loc)


def test_swag_draws_have_the_moments_of_its_iterates(network: Network) -> None:
    split, count = network.split, 4000
    found = swag(
        network.members[:1],
        split.train,
        split.held_out,
        40,
        num_draws=count,
        generator=seeded(5),
    )
    assert found.step in STEPS
    assert found.scale in SCALES
    draws = found.draws.packed().double()
    error = draws.std(0) / count**0.5
    checks = num_standard_errors(draws.shape[1])
    gap = (draws.mean(0) - found.moments.mean).abs()
    assert (gap <= checks * error + 1e-5).all()
    # Half of the variance is the iterates' own, which no draw can be below.
    least = 0.5 * found.scale * found.moments.variance
    assert (draws.var(0) > least * (1 - checks * (2 / count) ** 0.5) - 1e-9).all()


def test_a_subnet_is_the_library_s_at_the_best_scale(network: Network) -> None:
    found = network.subnet(RandomSubnet(7, 0))
    posterior = network.posterior(RandomSubnet(7, 0))
    if not found.notes["flat"]:
        posterior = posterior.with_prior_precision(found.notes["scale"])
    x, y = network.split.tests["test"]
    want = posterior.predictive_distribution(x)
    torch.testing.assert_close(found.predict(x).log_prob(y), want.log_prob(y))
    held_out, values = network.split.held_out
    best = found.predict(held_out).nll(values)
    for scale in (1e-6, 1e-3, 1.0, 1e3, 1e6):
        other = posterior.with_prior_precision(scale).predictive_distribution(held_out)
        assert best <= -float(other.log_prob(values).mean()) + 1e-3 + 1e-9


def test_an_ensemble_of_subnets_mixes_them(network: Network) -> None:
    found = network.ensemble_of_subnets("RandomSubnet", 4)
    x, _ = network.split.tests["test"]
    each = [network.subnet(network.selector("RandomSubnet", 4), m) for m in range(3)]
    loc = torch.cat([part.predict(x).loc for part in each])
    torch.testing.assert_close(found.predict(x).loc, loc)
    within = torch.stack([part.spread(x) ** 2 for part in each]).mean(0)
    want = (within + loc.var(0, correction=0)).sqrt()
    torch.testing.assert_close(found.spread(x), want)


def test_scores_are_in_the_target_s_unit(network: Network) -> None:
    x, y = network.split.tests["test"]
    zeros = torch.zeros(1, len(x), dtype=torch.float64)
    fitted = Fitted(
        lambda inputs: Mixture(
            zeros[:, : len(inputs)].new_zeros(1, len(inputs)), zeros[:, :1] + 1
        ),
        lambda inputs: zeros[0],
    )
    found = {each.metric: each.value for each in uci.judge(network, fitted, "")}
    unit = 2 * y  # the split's scale
    want = torch.distributions.Normal(0.0, 2.0).log_prob(unit).mean()
    assert found["log_likelihood"] == pytest.approx(float(want))
    assert found["rmse"] == pytest.approx(float(unit.square().mean().sqrt()))


def test_uci_data_are_all_there(tmp_path) -> None:
    folder = uci_folder(tmp_path)
    whole = uci_split(folder, "yacht", "standard", 0, most=10**9)
    split = uci.read_split(folder, ("yacht", "standard", 0))
    assert len(split.train[0]) + len(split.held_out[0]) == 52
    torch.testing.assert_close(split.train[0], whole.train[0])
    assert uci.indices(folder / "uci" / "yacht") == [0, 1]


def test_held_out_data_beyond_the_limit_train(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(uci, "_HELD_OUT", 3)
    split = uci.read_split(uci_folder(tmp_path), ("yacht", "gap", 1))
    assert len(split.held_out[0]) == 3
    assert len(split.train[0]) == 37
    test_x = split.tests["test"][0][:, 1]
    train_x = split.train[0][:, 1]
    between = (train_x > test_x.min()) & (train_x < test_x.max())
    assert not between.any()


def test_equal_sizes_are_the_small_networks(network: Network) -> None:
    large = replace(network, shape=Shape(parse_hidden("2x100")))
    assert uci.size_of(large) == 50 * 3 + 51
    assert uci.num_params(large, "1x100") == 100 * 3 + 101
    middle = replace(network, shape=Shape(parse_hidden("2x50")))
    assert uci.size_of(middle) == round(0.05 * (50 * 3 + 50 * 51 + 51))


def test_the_toy_has_a_gap() -> None:
    split = toy.toy_split(0)
    x = split.train[0].squeeze(-1)
    assert len(x) == 100
    between = (x > toy.CLUSTERS[0][1]) & (x < toy.CLUSTERS[1][0])
    assert not between.any()
    gap_x, gap_y = split.tests["gap"]
    assert float(gap_x.min()) > toy.CLUSTERS[0][1]
    assert float(gap_x.max()) < toy.CLUSTERS[1][0]
    residual = gap_y - (4 * gap_x.squeeze(-1) + 0.8).cos()
    # A standard deviation of 200 draws, with its chance of a false alarm.
    assert abs(float(residual.std()) / 0.1 - 1) < num_standard_errors() / 400**0.5


def test_the_toy_s_priors_are_the_model_s_own() -> None:
    split = toy.toy_split(1)
    schedule = Schedule(20, batch=100, every=None, noise_scale=0.1)
    network = Network(split, Shape((5,), "tanh"), Plan(schedule, tuned=False))
    own = toy.fit(network, "subnet RandomSubnet 50.0%")
    scaled = toy.fit(network, "subnet RandomSubnet 50.0%, S/D prior")
    chosen = network.selector("RandomSubnet", int(own.notes["S"]))
    posterior = network.posterior(chosen)
    x = split.tests["gap"][0]
    for fitted, want in (
        (own, posterior),
        (scaled, posterior.with_prior_precision(own.notes["S"] / 16)),
    ):
        std = want.output_distribution(x).variance.squeeze(-1).sqrt()
        torch.testing.assert_close(fitted.spread(x), std.detach())
    assert (scaled.spread(x) > own.spread(x)).all()


def test_a_tuned_posterior_of_the_toy_fits_held_out_data_best() -> None:
    split = toy.toy_split(1)
    schedule = Schedule(20, batch=100, every=None, noise_scale=0.1)
    network = Network(split, Shape((5,), "tanh"), Plan(schedule, tuned=False))
    x, y = split.held_out
    for name in (toy.FULL, "subnet LastLayer", "subnet RandomSubnet 50.0%"):
        own = toy.fit(network, name)
        tuned = toy.fit(network, f"{name}{toy.TUNED}")
        assert "scale" not in own.notes
        assert tuned.notes["scale"] > 0
        assert tuned.predict(x).nll(y) < own.predict(x).nll(y)


def test_untuned_and_sized_subnets_of_uci_are_those_they_are_called(
    network: Network,
) -> None:
    x, _ = network.split.train

    def fit(method: str) -> Fitted:
        made = uci.fit_of(network, method)
        assert made is not None
        return made()

    size = round(0.05 * network.num_params)
    for name, subnet in (
        (uci.DEFAULT, size),
        ("full Laplace", None),
        ("subnet LastLayer", network.selector("LastLayer", 1)),
    ):
        found = fit(f"{name}{uci.OWN_PRIOR}")
        want = network.subnet(subnet, tuned=False)
        assert "scale" not in found.notes
        torch.testing.assert_close(found.spread(x), want.spread(x))
    for name, share in zip(uci.SIZED, uci.SHARES, strict=True):
        assert fit(name).notes["S"] == max(1, round(share * network.num_params))
