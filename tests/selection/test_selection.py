"""Every selector against a brute force over all weights, and how ties are broken."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jaxtyping
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive
from pyro.infer.autoguide.initialization import init_to_value
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from pyro_subnet import AutoSubnetLaplace, AutoSubnetMultivariateNormal, Subnet
from pyro_subnet.exceptions import (
    DataError,
    NoOutputVarianceWarning,
    OptionError,
    PrecisionError,
    SelectionError,
)
from pyro_subnet.nn import bayesianize, init_to_module
from pyro_subnet.selection import (
    LargestMagnitude,
    LargestVariance,
    LastLayer,
    Mask,
    Modules,
    PredictiveVariance,
    RandomSubnet,
    Selector,
    Sites,
)
from pyro_subnet.tracing.data import Data
from tests.cases import draw
from tests.tolerances import tolerance

Model = Callable[..., Any]

SUM = tolerance(torch.float64, "reordered")
EQUAL = {"rtol": 0, "atol": 0}
N, INPUTS, HIDDEN, C, NOISE = 9, 5, 4, 2, 0.5
# Sites of the network below, in trace order, with their standard deviations.
SITES = {
    "fc1.weight": ((HIDDEN, INPUTS), 1.0),
    "fc1.bias": ((HIDDEN,), 2.0),
    "fc2.weight": ((C, HIDDEN), 0.5),
    "fc2.bias": ((C,), 3.0),
}
D = HIDDEN * INPUTS + HIDDEN + C * HIDDEN + C


def network(weights: dict[str, Tensor], x: Tensor) -> Tensor:
    hidden = F.linear(x, weights["fc1.weight"], weights["fc1.bias"]).tanh()
    return F.linear(hidden, weights["fc2.weight"], weights["fc2.bias"])


def model(x: Tensor, y: Tensor | None = None) -> Tensor:
    weights = {}
    for site, (shape, scale) in SITES.items():
        zero = torch.zeros(shape, dtype=x.dtype)
        weights[site] = pyro.sample(site, dist.Normal(zero, scale).to_event(len(shape)))
    f = network(weights, x)
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(f, NOISE).to_event(1), obs=y)
    return f


def values(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    return {site: torch.randn(shape, dtype=dtype) for site, (shape, _) in SITES.items()}


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.randn(N, INPUTS, dtype=dtype), torch.randn(N, C, dtype=dtype)


def choose(
    selector: Any,
    at: dict[str, Tensor],
    x: Tensor,
    y: Tensor,
    user_model: Model = model,
) -> Subnet:
    guide = AutoSubnetLaplace(
        user_model, selector, init_loc_fn=init_to_value(values=at)
    )
    return guide.laplace_approximation(x, y).subnet


def diagonals(at: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Diagonals of GGN and prior, (D,), from the dense Jacobian."""
    jacobians = torch.autograd.functional.jacobian(
        lambda *leaves: network(dict(zip(at, leaves, strict=True)), x),
        tuple(at.values()),
    )
    jac = torch.cat([jac.flatten(2) for jac in jacobians], -1)
    ggn = jac.square().sum((0, 1)) / NOISE**2
    prior = torch.cat(
        [torch.full((v.numel(),), SITES[site][1] ** -2.0) for site, v in at.items()]
    )
    return ggn, prior.to(ggn)


def top(scores: Tensor, size: int) -> list[int]:
    """Positions of the largest scores by sorting pairs; no ties allowed here."""
    order = sorted(range(len(scores)), key=lambda i: (-float(scores[i]), i))
    return sorted(order[:size])


# ----------------------------------------------------------------------------------
# Each selector.


@pytest.mark.filterwarnings("ignore::pyro_subnet.exceptions.NoOutputVarianceWarning")
@pytest.mark.parametrize("size", [1, 2, 7, D - 1, D])
def test_largest_variance(size: int) -> None:
    at, (x, y) = values(), inputs()
    ggn, prior = diagonals(at, x)
    subnet = choose(LargestVariance(size), at, x, y)
    assert subnet.flat.tolist() == top(1 / (ggn + prior), size)


def test_largest_variance_explains_this_share_of_output_variance() -> None:
    at, (x, y) = values(), inputs()
    ggn, prior = diagonals(at, x)
    variance = 1 / (ggn + prior)
    share = ggn * variance
    for size in (3, 11, D):
        subnet = choose(LargestVariance(size), at, x, y)
        expected = share[top(variance, size)].sum() / share.sum()
        found = torch.tensor(subnet.explained_variance, dtype=torch.float64)
        assert_close(found, expected, **SUM)
    assert_close(found, torch.ones((), dtype=torch.float64), **SUM)


def test_explained_variance_survives_on_the_posterior() -> None:
    at, (x, y) = values(), inputs()
    guide = AutoSubnetLaplace(model, 4, init_loc_fn=init_to_value(values=at))
    posterior = guide.laplace_approximation(x, y)
    explained = posterior.subnet.explained_variance
    assert explained is not None
    assert 0 < explained < 1
    assert f"{explained:.2%} of the output variance" in repr(posterior.subnet)
    rescaled = posterior.with_prior_precision(2.0)
    assert rescaled.subnet.explained_variance == explained


@pytest.mark.parametrize(
    "selector", [RandomSubnet(3), LargestMagnitude(3), LastLayer()]
)
def test_other_selectors_do_not_claim_an_explained_variance(selector: Any) -> None:
    at, (x, y) = values(), inputs()
    assert choose(selector, at, x, y).explained_variance is None


@pytest.mark.parametrize("size", [1, 5, D])
def test_largest_magnitude(size: int) -> None:
    at, (x, y) = values(), inputs()
    packed = torch.cat([value.flatten() for value in at.values()])
    subnet = choose(LargestMagnitude(size), at, x, y)
    assert subnet.flat.tolist() == top(packed.abs(), size)


@pytest.mark.parametrize("size", [7, D // 2, D - 3])
def test_random_subnet_is_uniform_without_replacement(size: int) -> None:
    """Each of D positions is drawn in S / D of the seeds: 5.5 standard errors.

    Fixed seeds, so this either always passes or never does.
    """
    at, (x, y) = values(), inputs()
    guide = AutoSubnetLaplace(model, init_loc_fn=init_to_value(values=at))
    guide(x, y)
    counts, trials = torch.zeros(D), 2000
    for seed in range(trials):
        flat = RandomSubnet(size, seed)(guide, Data.single((x, y), {})).flat
        assert len(flat.unique()) == size
        counts[flat] += 1
    p = size / D
    error = (counts / trials - p).abs() / (p * (1 - p) / trials) ** 0.5
    assert float(error.max()) < 5.5


def test_random_subnet_goes_by_its_seed_alone() -> None:
    at, (x, y) = values(), inputs()
    first = choose(RandomSubnet(6, seed=5), at, x, y).flat
    pyro.set_rng_seed(99)
    state = torch.get_rng_state()
    assert_close(choose(RandomSubnet(6, seed=5), at, x, y).flat, first, **EQUAL)
    assert_close(torch.get_rng_state(), state, **EQUAL)
    other = choose(RandomSubnet(6, seed=6), at, x, y).flat
    assert not torch.equal(other, first)


def test_last_layer() -> None:
    at, (x, y) = values(), inputs()
    subnet = choose(LastLayer(), at, x, y)
    assert subnet.counts == {
        "fc1.weight": 0,
        "fc1.bias": 0,
        "fc2.weight": C * HIDDEN,
        "fc2.bias": C,
    }


def test_last_layer_of_a_network_with_norms_and_a_noise_scale() -> None:
    """Neither a latent scale after the network nor a norm's weights are a layer."""
    net = nn.Sequential(
        nn.Linear(INPUTS, 3), nn.LayerNorm(3), nn.Linear(3, C), nn.LayerNorm(C)
    )
    net = net.double().eval()
    bnn = bayesianize(net)

    def user_model(x: Tensor, y: Tensor | None = None) -> None:
        f = bnn(x)
        one = torch.ones((), dtype=x.dtype)
        noise = pyro.sample("noise", dist.LogNormal(0.0 * one, one))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(f, noise).to_event(1), obs=y)

    x, y = inputs()
    guide = AutoSubnetLaplace(user_model, LastLayer(), init_loc_fn=init_to_module(net))
    subnet = guide.laplace_approximation(x, y).subnet
    assert {site: n for site, n in subnet.counts.items() if n} == {
        "2.weight": 3 * C,
        "2.bias": C,
    }


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ("fc1.*", {"fc1.weight", "fc1.bias"}),
        (["fc1.weight", "*.bias"], {"fc1.weight", "fc1.bias", "fc2.bias"}),
        (["fc2.weight", "fc2.weight"], {"fc2.weight"}),
        (["fc[12].weight"], {"fc1.weight", "fc2.weight"}),
        ("*", set(SITES)),
    ],
)
def test_sites(patterns: Any, expected: set[str]) -> None:
    at, (x, y) = values(), inputs()
    counts = choose(Sites(patterns), at, x, y).counts
    assert {site for site, count in counts.items() if count} == expected
    assert sum(counts.values()) == sum(at[site].numel() for site in expected)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("fc2", {"fc2.weight", "fc2.bias"}),
        (["fc1", "fc2"], set(SITES)),
    ],
)
def test_modules(names: Any, expected: set[str]) -> None:
    at, (x, y) = values(), inputs()
    counts = choose(Modules(names), at, x, y).counts
    assert {site for site, count in counts.items() if count} == expected


def test_modules_take_whole_path_components() -> None:
    """``block.1`` is not ``block.10``; a module holds its submodules."""

    def user_model(x: Tensor, y: Tensor | None = None) -> None:
        sites = ("block.1.weight", "block.10.weight", "block.1.norm.bias")
        total = sum(
            pyro.sample(site, dist.Normal(torch.zeros(()).to(x), 1.0)) for site in sites
        )
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(total * x[:, 0], 1.0), obs=y)

    x, y = inputs()
    guide = AutoSubnetLaplace(user_model, Modules("block.1"))
    subnet = guide.laplace_approximation(x, y[:, 0]).subnet
    assert subnet.names == ["block.1.weight", "block.1.norm.bias"]


def test_mask() -> None:
    at, (x, y) = values(), inputs()
    mask = at["fc1.weight"] > 0
    mapping = {"fc2.bias": torch.tensor([1]), "fc1.weight": mask}
    for chosen in (mapping, Mask(mapping)):
        subnet = choose(chosen, at, x, y)
        assert_close(subnet.mask("fc1.weight"), mask, **EQUAL)
        assert subnet.indices["fc2.bias"].tolist() == [1]
        assert subnet.size == int(mask.sum()) + 1


def test_no_selector_takes_every_weight() -> None:
    at, (x, y) = values(), inputs()
    assert_close(choose(None, at, x, y).flat, torch.arange(D), **EQUAL)


def test_a_callable_is_a_selector() -> None:
    """It gets the guide, at its MAP, and the data; it returns a ``Subnet``."""
    at, (x, y) = values(), inputs()
    seen: list[Any] = []

    def every_third(guide: Any, data: Any) -> Subnet:
        seen.append((guide, data))
        layout = guide.latents.layout
        return Subnet.from_positions(layout, torch.arange(0, layout.num_params, 3))

    guide = AutoSubnetLaplace(model, every_third, init_loc_fn=init_to_value(values=at))
    posterior = guide.laplace_approximation(x, y)
    assert posterior.subnet.flat.tolist() == list(range(0, D, 3))
    ((got, data),) = seen
    assert got is guide
    assert_close(got.latents.values["fc1.weight"], at["fc1.weight"], **EQUAL)
    ((args, kwargs),) = list(data.calls("test"))
    assert (args, kwargs) == ((x, y), {})


def test_selectors_compare_and_print_by_their_options() -> None:
    assert RandomSubnet(3, seed=1) == RandomSubnet(3, seed=1)
    assert RandomSubnet(3, seed=1) != RandomSubnet(3, seed=2)
    assert repr(LargestVariance(0.1)) == (
        "LargestVariance(size=0.1, estimator='ggn', keep_dead=True)"
    )
    for kind in (LargestVariance, LargestMagnitude, RandomSubnet, LastLayer, Sites):
        assert issubclass(kind, Selector)


# ----------------------------------------------------------------------------------
# Sizes.


@pytest.mark.filterwarnings("ignore::pyro_subnet.exceptions.NoOutputVarianceWarning")
@pytest.mark.parametrize("kind", [LargestVariance, LargestMagnitude, RandomSubnet])
@pytest.mark.parametrize(
    ("size", "count"),
    [(1, 1), (D, D), (1.0, D), (0.5, round(0.5 * D)), (1e-9, 1), (0.1, round(0.1 * D))],
)
def test_sizes(kind: Any, size: Any, count: int) -> None:
    at, (x, y) = values(), inputs()
    assert choose(kind(size), at, x, y).size == count


@pytest.mark.parametrize("size", [3, 0.25, 2, 1.0])
def test_a_number_means_most_predictive_variance(size: Any) -> None:
    at, (x, y) = values(), inputs()
    expected = choose(PredictiveVariance(size, method="greedy"), at, x, y)
    found = choose(size, at, x, y)
    assert_close(found.flat, expected.flat, **EQUAL)
    assert found.explained_variance == expected.explained_variance


@pytest.mark.parametrize("kind", [LargestVariance, LargestMagnitude, RandomSubnet])
@pytest.mark.parametrize("size", [0, -3, 0.0, -0.1, 1.5, float("nan"), True])
def test_bad_sizes_are_refused_at_once(kind: Any, size: Any) -> None:
    message = (
        rf"`size` must be a positive int .* or a float in \(0, 1\].*; got {size}\. "
    )
    with pytest.raises(SelectionError, match=message):
        kind(size)


@pytest.mark.parametrize("kind", [LargestVariance, LargestMagnitude, RandomSubnet])
def test_more_weights_than_there_are(kind: Any) -> None:
    at, (x, y) = values(), inputs()
    message = rf"`size` must be at most .* parameters, {D}; got {D + 1}\. Pass a share"
    with pytest.raises(SelectionError, match=message):
        choose(kind(D + 1), at, x, y)


@pytest.fixture
def as_users_run_it() -> Iterator[None]:
    """Without the run-time type checks of the tests, which come before our own."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("as_users_run_it")
def test_unknown_estimator() -> None:
    with pytest.raises(
        OptionError,
        match=r"`estimator` must be 'ggn', 'ef', 'kfac' or 'swag'; got 'crude'",
    ):
        LargestVariance(3, estimator="crude")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("selector", "message"),
    [
        (Sites(["fc1.*", "fc3.*"]), r"must match a latent site .*; got 'fc3\.\*'\. Ch"),
        (Modules(["fc"]), r"must match a latent site .*; got 'fc'\. Check"),
        (Mask({"fc9": torch.tensor([0])}), r"must be a latent site .*; got 'fc9'\. Ch"),
        (Sites([]), r"at least one element; got an empty selection"),
    ],
)
def test_names_that_match_nothing(selector: Any, message: str) -> None:
    at, (x, y) = values(), inputs()
    with pytest.raises(SelectionError, match=message):
        choose(selector, at, x, y)


def test_last_layer_without_modules() -> None:
    def user_model(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(INPUTS).to(x), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)

    x, y = inputs()
    guide = AutoSubnetLaplace(user_model, LastLayer())
    message = r"needs a weight matrix that the outputs .* got sites \['w'\]\. Name"
    with pytest.raises(SelectionError, match=message):
        guide.laplace_approximation(x, y[:, 0])


# ----------------------------------------------------------------------------------
# Ties, and the same subnet everywhere.


def test_ties_go_by_position_between_duplicate_columns() -> None:
    """Two equal input columns under equal weights: equal curvature, to the last bit or
    not. The earlier position wins, in single precision as well."""
    at = values()
    column = at["fc1.weight"][:, 1]
    at["fc1.weight"][:, 3] = column
    x, y = inputs()
    x[:, 3] = x[:, 1]
    ggn, prior = diagonals(at, x)
    variance = 1 / (ggn + prior)
    for cast in (torch.float64, torch.float32):
        single = {site: value.to(cast) for site, value in at.items()}
        for size in range(1, D, 4):
            rounded = (variance * 1e6).round()
            expected = top(rounded, size)
            found = choose(
                LargestVariance(size), single, x.to(cast), y.to(cast)
            ).flat.tolist()
            assert found == expected, (cast, size)


@pytest.mark.filterwarnings("ignore::pyro_subnet.exceptions.UntrainedWarning")
def test_the_order_of_a_sum_does_not_break_ties() -> None:
    """Each feature holds the same numbers in another order: the curvatures of their
    weights are equal, but for round-off, which is no reason to prefer one."""
    num_data, num_features = 300, 20
    column = torch.randn(num_data).exp()
    x = torch.stack([column[torch.randperm(num_data)] for _ in range(num_features)], -1)
    assert len(x.square().sum(0).unique()) > 1

    def user_model(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(num_features), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)

    y = torch.randn(num_data)
    for size in (1, 7, 15):
        guide = AutoSubnetLaplace(user_model, LargestVariance(size))
        found = guide.laplace_approximation(x, y).subnet.flat
        assert found.tolist() == list(range(size))
        guide = AutoSubnetLaplace(user_model, LargestVariance(size))
        batches = list(zip(x.split(37), y.split(37), strict=True))
        found = guide.laplace_approximation_from(batches).subnet.flat
        assert found.tolist() == list(range(size))


@pytest.mark.parametrize(
    "selector", [LargestVariance(6), LargestMagnitude(6), RandomSubnet(6, seed=2)]
)
def test_order_and_batches_of_the_data_do_not_change_the_subnet(selector: Any) -> None:
    at, (x, y) = values(), inputs()
    init = init_to_value(values=at)
    expected = choose(selector, at, x, y)
    order = torch.randperm(N)
    whole = choose(selector, at, x[order], y[order])
    assert_close(whole.flat, expected.flat, **EQUAL)
    for size in (1, 4):
        batches = list(zip(x[order].split(size), y[order].split(size), strict=True))
        guide = AutoSubnetLaplace(model, selector, init_loc_fn=init)
        found = guide.laplace_approximation_from(batches).subnet
        assert_close(found.flat, expected.flat, **EQUAL)
        if expected.explained_variance is not None:
            assert found.explained_variance == pytest.approx(
                expected.explained_variance, rel=1e-9
            )


def test_equal_magnitudes_go_by_position() -> None:
    at, (x, y) = values(), inputs()
    at["fc1.weight"] = torch.ones(HIDDEN, INPUTS, dtype=torch.float64)
    at["fc1.weight"][::2] *= -1
    for site in ("fc1.bias", "fc2.weight", "fc2.bias"):
        at[site] = at[site].clamp(-0.9, 0.9)
    assert choose(LargestMagnitude(7), at, x, y).flat.tolist() == list(range(7))


def test_single_and_double_precision_choose_the_same() -> None:
    at, (x, y) = values(), inputs()
    single = {site: value.float() for site, value in at.items()}
    for selector in (LargestVariance(9), LargestMagnitude(9), RandomSubnet(9)):
        expected = choose(selector, at, x, y)
        found = choose(selector, single, x.float(), y.float())
        assert_close(found.flat, expected.flat, **EQUAL)


# ----------------------------------------------------------------------------------
# Weights that move no output.


def images() -> tuple[nn.Module, Tensor, Tensor]:
    """A network on 'images' two of whose pixels are always zero in training."""
    net = nn.Sequential(nn.Linear(INPUTS, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, C))
    x, y = inputs()
    x[:, [0, 3]] = 0.0
    return net.double(), x, y


def image_posterior(
    net: nn.Module, x: Tensor, y: Tensor, selector: Any
) -> AutoSubnetMultivariateNormal:
    bnn = bayesianize(net)

    def user_model(x: Tensor, y: Tensor | None = None) -> Tensor:
        f = bnn(x)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(f, NOISE).to_event(1), obs=y)
        return f

    guide = AutoSubnetLaplace(user_model, selector, init_loc_fn=init_to_module(net))
    return guide.laplace_approximation(x, y)


IDLE = [row * INPUTS + column for row in range(HIDDEN) for column in (0, 3)]


def test_idle_weights_are_kept_by_default_and_said_to_move_nothing() -> None:
    """No chosen weight moves an output: the predictive on such inputs is the MAP's,
    which is said aloud; on shifted inputs the same weights move outputs."""
    net, x, y = images()
    with pytest.warns(
        NoOutputVarianceWarning,
        match="moves no output at any training input.*the predictive is the MAP's",
    ):
        posterior = image_posterior(net, x, y, LargestVariance(len(IDLE)))
    assert posterior.subnet.flat.tolist() == IDLE
    assert posterior.subnet.explained_variance == 0.0
    assert "0.00% of the output variance" in repr(posterior.subnet)
    covariance = posterior.output_distribution(x).covariance_matrix
    assert_close(covariance, torch.zeros_like(covariance), **EQUAL)
    shifted = x + 1.0
    variance = posterior.output_distribution(shifted).variance
    assert bool((variance > 1e-3).all())
    # prior variance, exactly
    expected = torch.eye(len(IDLE), dtype=torch.float64)
    assert_close(posterior.get_posterior().covariance_matrix, expected, **SUM)
    draws = Predictive(
        posterior.linearized_model,
        guide=posterior,
        num_samples=5,
        return_sites=("_RETURN",),
    )(x)["_RETURN"]
    assert_close(draws, net(x).detach().expand(5, N, C), **SUM)


@pytest.mark.parametrize("size", [1, 3, 7])
def test_ties_among_idle_weights_go_by_position(size: int) -> None:
    """All have the prior's variance, whatever their layer."""
    net, x, y = images()
    with pytest.warns(NoOutputVarianceWarning, match="moves no output"):
        subnet = image_posterior(net, x, y, LargestVariance(size)).subnet
    assert subnet.flat.tolist() == IDLE[:size]


def test_a_subnet_that_moves_hardly_anything_is_said_to_explain_little() -> None:
    """One weight that moves outputs among those that move none."""
    net, x, y = images()
    total = INPUTS * HIDDEN + HIDDEN + HIDDEN * C + C
    share = (len(IDLE) + 1) / total
    with pytest.warns(
        NoOutputVarianceWarning,
        match=rf"explains less .*, with {share:.2%} of them\..*Pass a number as",
    ) as caught:
        posterior = image_posterior(net, x, y, LargestVariance(len(IDLE) + 1))
    assert len(caught) == 1
    assert set(IDLE) < set(posterior.subnet.flat.tolist())
    explained = posterior.subnet.explained_variance
    assert explained is not None
    assert 0 < explained < share / 2
    assert f"{explained:.2%} of a diagonal posterior's" in str(caught[0].message)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 0.05, 0.2, 0.5, 1.0])
def test_the_default_choice_is_not_said_to_explain_little(
    dtype: torch.dtype, size: float
) -> None:
    """Warnings are errors here; nor where every weight is chosen."""
    net, x, y = images()
    image_posterior(net.to(dtype), x.to(dtype), y.to(dtype), PredictiveVariance(size))


@pytest.mark.filterwarnings("ignore::pyro_subnet.exceptions.NoOutputVarianceWarning")
def test_idle_weights_can_be_left_out() -> None:
    net, x, y = images()
    moving = INPUTS * HIDDEN + HIDDEN + HIDDEN * C + C - len(IDLE)
    for size in (5, moving):
        chosen = LargestVariance(size, keep_dead=False)
        subnet = image_posterior(net, x, y, chosen).subnet
        assert not set(subnet.flat.tolist()) & set(IDLE)
        assert subnet.size == size
    # the order among the rest is that of the others' variances
    kept = image_posterior(net, x, y, LargestVariance(len(IDLE) + 5)).subnet
    without = image_posterior(net, x, y, LargestVariance(5, keep_dead=False)).subnet
    assert sorted({*without.flat.tolist(), *IDLE}) == kept.flat.tolist()


def test_too_few_weights_that_move_outputs() -> None:
    net, x, y = images()
    moving = INPUTS * HIDDEN + HIDDEN + HIDDEN * C + C - len(IDLE)
    message = (
        rf"`size` must be at most the number of weights that move an output, "
        rf"{moving}, with keep_dead=False; got {moving + 1}\. Choose fewer"
    )
    with pytest.raises(SelectionError, match=message):
        image_posterior(net, x, y, LargestVariance(moving + 1, keep_dead=False))


def test_weights_of_a_unit_that_never_fires_move_nothing() -> None:
    net = nn.Sequential(nn.Linear(INPUTS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, C))
    net = net.double()
    with torch.no_grad():
        net[0].weight[2] = 0.0
        net[0].bias[2] = -1.0
        net[0].bias[[0, 1, 3]] = 10.0  # the others always fire
    x, y = inputs()
    incoming = [2 * INPUTS + i for i in range(INPUTS)] + [HIDDEN * INPUTS + 2]
    outgoing = [HIDDEN * INPUTS + HIDDEN + row * HIDDEN + 2 for row in range(C)]
    expected = sorted(incoming + outgoing)
    with pytest.warns(NoOutputVarianceWarning, match="moves no output"):
        subnet = image_posterior(net, x, y, LargestVariance(len(expected))).subnet
    assert subnet.flat.tolist() == expected


def test_weights_that_move_outputs_of_masked_data_alone_move_nothing() -> None:
    """An observation with weight zero has no curvature."""

    def user_model(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(INPUTS).to(x), 1.0).to_event(1))
        mask = torch.arange(len(x)) != 0
        with pyro.plate("data", len(x)), poutine.mask(mask=mask):
            pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)

    x, y = inputs()
    x[1:, 2] = 0.0  # the third weight moves the masked output alone
    guide = AutoSubnetLaplace(user_model, LargestVariance(1))
    with pytest.warns(NoOutputVarianceWarning, match="moves no output"):
        posterior = guide.laplace_approximation(x, y[:, 0])
    assert posterior.subnet.names == ["w[2]"]


# ----------------------------------------------------------------------------------
# Data.


def test_one_shot_batches_are_refused_where_choosing_needs_a_pass() -> None:
    at, (x, y) = values(), inputs()
    init = init_to_value(values=at)
    taken: list[int] = []

    def batches() -> Any:
        for i in range(3):
            taken.append(i)
            yield x[3 * i : 3 * i + 3], y[3 * i : 3 * i + 3]

    guide = AutoSubnetLaplace(model, 4, init_loc_fn=init)
    guide(x, y)
    message = r"must be re-iterable because PredictiveVariance passes .* a one-shot gen"
    with pytest.raises(DataError, match=message):
        guide.laplace_approximation_from(batches())
    assert taken == []
    other = AutoSubnetLaplace(model, RandomSubnet(4), init_loc_fn=init)
    other(x, y)
    found = other.laplace_approximation_from(batches())
    assert taken == [0, 1, 2]
    expected = other.laplace_approximation(x, y).get_posterior().precision_matrix
    assert_close(found.get_posterior().precision_matrix, expected, **SUM)


def test_a_prior_without_curvature_is_found_out() -> None:
    """Negative diagonal of the precision: there is no variance to rank by."""

    def user_model(x: Tensor, y: Tensor | None = None) -> None:
        prior = dist.StudentT(1.0, torch.zeros(INPUTS).to(x), 1.0).to_event(1)
        w = pyro.sample("w", prior)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)

    x, y = inputs()
    x[:, 3] = 0.0
    start = torch.zeros(INPUTS, dtype=torch.float64)
    start[3] = 5.0  # far out in the tail, where no observation holds it
    guide = AutoSubnetLaplace(
        user_model, LargestVariance(2), init_loc_fn=init_to_value(values={"w": start})
    )
    message = (
        r"diagonal .* must be positive .* got -.* at w\[3\] \(1 such weights\)\. Tr"
    )
    with pytest.raises(PrecisionError, match=message):
        guide.laplace_approximation(x, y[:, 0])


def test_curvature_that_is_round_off_counts_as_none() -> None:
    """An input of size 1e-12 beside others of size 1: 1e-24 of their curvature."""
    x, y = draw(1, 9, 3), draw(2, 9)
    x[:, 1] *= 1e-12

    def model(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(3).double(), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)

    guide = AutoSubnetLaplace(model, LargestVariance(2, keep_dead=False))
    assert guide.laplace_approximation(x, y).subnet.flat.tolist() == [0, 2]
    guide = AutoSubnetLaplace(model, LargestVariance(3, keep_dead=False))
    with pytest.raises(SelectionError, match=r"that move an output, 2, with"):
        guide.laplace_approximation(x, y)
