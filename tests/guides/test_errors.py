"""Every mistake of design.md 1.2: a clear message, before any long work.

A message states the rule, what came, and the way out; each ``match`` below holds all
three. "Before any long work" is counted: calls of the model, and batches taken from a
loader, never more than it takes to see the mistake.
"""

from __future__ import annotations

import contextlib
import math
import types
from collections.abc import Callable, Iterator
from typing import Any

import jaxtyping
import psutil
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide.initialization import init_to_value
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import constraints
from torch.testing import assert_close

from pyro_subnet import AutoSubnetLaplace, exceptions
from pyro_subnet.exceptions import (
    DataError,
    MemoryLimitError,
    ModelError,
    NonFiniteError,
    NoObservedSiteWarning,
    OptionError,
    PrecisionError,
    SelectionError,
    SubnetError,
    UnsupportedLikelihoodError,
)
from pyro_subnet.nn import bayesianize, init_to_module
from pyro_subnet.selection import LargestMagnitude, LargestVariance, RandomSubnet
from pyro_subnet.tensors.memory import available_bytes, check_factor_fits

Model = Callable[..., Any]

N, INPUTS, HIDDEN = 6, 3, 4
D = HIDDEN * INPUTS + HIDDEN + HIDDEN


def prior(*shape: int) -> dist.TorchDistribution:
    return dist.Normal(torch.zeros(shape), 1.0).to_event(len(shape))


class Counted:
    """A network that counts its runs."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        self.runs += 1
        w1 = pyro.sample("fc1.weight", prior(HIDDEN, INPUTS))
        b1 = pyro.sample("fc1.bias", prior(HIDDEN))
        w2 = pyro.sample("fc2.weight", prior(1, HIDDEN)).squeeze(0)
        f = (x @ w1.mT + b1).tanh() @ w2
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(f, 0.5), obs=y)
        return f


class Loader:
    """Batches that count how often one is taken."""

    def __init__(self, x: Tensor, y: Tensor, size: int = 2):
        self.batches = list(zip(x.split(size), y.split(size), strict=True))
        self.taken = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self.batches:
            self.taken += 1
            yield batch


def data() -> tuple[Tensor, Tensor]:
    return torch.randn(N, INPUTS), torch.randn(N)


@pytest.fixture
def as_users_run_it() -> Iterator[None]:
    """Without the run-time type checks of the tests, which come before our own."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def assert_refused_before_work(
    kind: type[SubnetError],
    message: str,
    subnet: Any,
    runs: int = 0,
    taken: int = 0,
) -> None:
    """The error comes in both modes of fitting, with a guide that is set up already."""
    x, y = data()
    model, loader = Counted(), Loader(x, y)
    guide = AutoSubnetLaplace(model, subnet)
    guide(x, y)
    before = model.runs
    with pytest.raises(kind, match=message):
        guide.laplace_approximation(x, y)
    assert model.runs - before <= runs
    before = model.runs
    with pytest.raises(kind, match=message):
        guide.laplace_approximation_from(loader)
    assert model.runs - before <= runs
    assert loader.taken <= taken


# ----------------------------------------------------------------------------------
# The subnet.


@pytest.mark.parametrize(
    ("subnet", "message"),
    [
        pytest.param(
            {"fc3.weight": torch.tensor([0])},
            r"`site` must be a latent site of the model, one of \['fc1\.weight', "
            r"'fc1\.bias', 'fc2\.weight'\]; got 'fc3\.weight'\. Check the spelling",
            id="unknown-site",
        ),
        pytest.param(
            {"fc1.weight": torch.ones(INPUTS, HIDDEN, dtype=torch.bool)},
            r"mask of site 'fc1\.weight' must have the site's unconstrained shape "
            r"\(4, 3\); got \(3, 4\)\. Build it with",
            id="mask-of-the-wrong-shape",
        ),
        pytest.param(
            {"fc1.bias": torch.tensor([1, 3, 1])},
            r"positions of site 'fc1\.bias'` must be unique; got 1 duplicates \(first "
            r"1\)\. Pass `positions\.unique\(\)`",
            id="duplicates",
        ),
        pytest.param(
            {"fc1.bias": torch.tensor([0, 4])},
            r"positions of site 'fc1\.bias'` must lie in \[0, 4\); got 1 outside "
            r"\(first 4\)\. Positions count",
            id="out-of-range",
        ),
        pytest.param(
            {"fc1.bias": torch.tensor([-1])},
            r"must lie in \[0, 4\); got 1 outside \(first -1\)\. Positions count",
            id="negative",
        ),
        pytest.param(
            {"fc1.bias": torch.zeros(4, dtype=torch.bool)},
            r"must hold at least one element; got an empty selection over sites "
            r"\['fc1\.bias'\]\. Choose at least one",
            id="empty-mask",
        ),
        pytest.param(
            {},
            r"must hold at least one element; got an empty selection .* Choose",
            id="empty-mapping",
        ),
        pytest.param(
            {"fc1.bias": torch.tensor([0.0, 1.0])},
            r"must be a 1-D integer tensor; got torch\.float32 of shape \(2,\)\. Pass",
            id="float-positions",
        ),
        pytest.param(
            {"fc1.bias": torch.tensor([True, False])},
            r"mask of site 'fc1\.bias' must have .* \(4,\); got \(2,\)\. Build it",
            id="bool-positions",
        ),
        pytest.param(
            {"fc1.bias": torch.tensor([[0, 1]])},
            r"must be a 1-D integer tensor; got torch\.int64 of shape \(1, 2\)\. Pass",
            id="positions-in-two-dimensions",
        ),
        pytest.param(
            D + 1,
            rf"`size` must be at most .* parameters, {D}; got {D + 1}\. Pass a share",
            id="too-many",
        ),
    ],
)
def test_a_bad_subnet_is_refused_before_work(subnet: Any, message: str) -> None:
    assert_refused_before_work(SelectionError, message, subnet)


@pytest.mark.usefixtures("as_users_run_it")
def test_a_selector_that_returns_something_else() -> None:
    def selector(guide: Any, data: Any) -> Any:
        return torch.arange(3)

    assert_refused_before_work(SubnetError, r"Subnet.*got Tensor", selector)


@pytest.mark.usefixtures("as_users_run_it")
def test_lists_of_positions_are_taken_or_refused_clearly() -> None:
    """Neither an AttributeError nor a silent misreading."""
    x, y = data()
    listed: Any = {"fc1.bias": [3, 0]}
    guide = AutoSubnetLaplace(Counted(), listed)
    with contextlib.suppress(SelectionError):
        subnet = guide.laplace_approximation(x, y).subnet
        assert subnet.names == ["fc1.bias[0]", "fc1.bias[3]"]


@pytest.mark.parametrize("size", [0, -1, 0.0, 1.01, -0.5, math.nan, math.inf])
def test_a_bad_size_is_refused_when_the_guide_is_made(size: Any) -> None:
    message = (
        rf"`size` must be a positive int .* a float in \(0, 1\].*; got {size}\. Pa"
    )
    model = Counted()
    with pytest.raises(SelectionError, match=message):
        AutoSubnetLaplace(model, size)
    assert model.runs == 0


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize("subnet", [True, "5%", [1, 2], torch.tensor([1])])
def test_a_bad_kind_of_subnet_is_refused_when_the_guide_is_made(subnet: Any) -> None:
    message = (
        r"`subnet` must be None, an int, a float .* or a mapping .*; got .*\. Pass"
    )
    with pytest.raises(OptionError, match=message):
        AutoSubnetLaplace(Counted(), subnet)


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize("curvature", ["GGN", "kfac", None, True])
def test_a_bad_curvature_is_refused_when_the_guide_is_made(curvature: Any) -> None:
    known = r"'ggn', 'ggn-mc', 'ef', 'hessian'"
    message = rf"`curvature` must be one of {known}; got {curvature!r}\. Leave it out"
    with pytest.raises(OptionError, match=message):
        AutoSubnetLaplace(Counted(), curvature=curvature)


# ----------------------------------------------------------------------------------
# Memory.


def leave_free(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    """The machine has so many bytes left."""
    memory_now = types.SimpleNamespace(available=free)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory_now)


@pytest.mark.parametrize(
    ("subnet", "size"),
    [
        (None, D),
        (LargestVariance(10), 10),
        (RandomSubnet(10), 10),
        (LargestMagnitude(0.5), D // 2),
        ({"fc1.weight": torch.arange(10)}, 10),
    ],
    ids=["every-weight", "variance", "random", "magnitude", "mapping"],
)
def test_a_factor_that_cannot_fit(
    subnet: Any, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """States S, the bytes needed, the bytes there are, the largest S that fits."""
    free = 5 * 5**2 + 3  # room for 1.25 5 x 5 matrices in float32, not for 6 x 6
    leave_free(monkeypatch, free)
    needed = 5 * size**2
    message = (
        rf"must have an S x S factor that fits in memory; got S={size}, which needs .*"
        rf"\({needed} bytes\) where .*\({free} bytes\) are free\. Choose at most 5 wei"
    )
    # A single call is read first, for the data may be few enough for the dual form.
    assert_refused_before_work(MemoryLimitError, message, subnet, runs=2)


def test_the_largest_subnet_that_is_named_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    leave_free(monkeypatch, 5 * 5**2 + 3)
    x, y = data()
    guide = AutoSubnetLaplace(Counted(), RandomSubnet(5))
    assert guide.laplace_approximation(x, y).subnet.size == 5


@pytest.mark.parametrize(
    ("dtype", "largest"), [(torch.float32, 14), (torch.float64, 10)]
)
def test_bytes_follow_the_dtype(
    dtype: torch.dtype, largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_free(monkeypatch, 1000)
    check_factor_fits(largest, dtype, torch.device("cpu"))
    message = rf"got S={largest + 1}, .* Choose at most {largest} weights"
    with pytest.raises(MemoryLimitError, match=message):
        check_factor_fits(largest + 1, dtype, torch.device("cpu"))


def test_the_memory_there_really_is() -> None:
    free = available_bytes(torch.device("cpu"))
    assert 2**20 < free < 2**50
    with pytest.raises(MemoryLimitError, match=r"got S=1000000000, .* Choose at most"):
        check_factor_fits(10**9, torch.float32, torch.device("cpu"))


# ----------------------------------------------------------------------------------
# Values that are not finite.


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("subnet", [None, 3, RandomSubnet(3), {"fc2.weight": [0]}])
def test_the_map_is_not_finite(subnet: Any, value: float) -> None:
    if isinstance(subnet, dict):
        subnet = {site: torch.tensor(at) for site, at in subnet.items()}
    x, y = data()
    model, loader = Counted(), Loader(x, y)
    guide = AutoSubnetLaplace(model, subnet)
    guide(x, y)
    with torch.no_grad():
        guide.loc[1] = value
        guide.loc[7] = value
    before = model.runs
    message = (
        r"The MAP must be finite; got 2 non-finite of 12 values at site 'fc1\.weight'\."
        r" Train again with a smaller learning rate, or start .* `init_loc_fn`"
    )
    with pytest.raises(NonFiniteError, match=message):
        guide.laplace_approximation(x, y)
    with pytest.raises(NonFiniteError, match=message):
        guide.laplace_approximation_from(loader)
    assert model.runs == before
    assert loader.taken <= 1


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_outputs_are_not_finite(value: float) -> None:
    x, y = data()
    guide = AutoSubnetLaplace(Counted(), 3)
    guide(x, y)
    x[2, 1] = value
    with torch.no_grad():
        guide.loc.normal_()
        if not math.isnan(value):
            guide.loc.fill_(1.0)  # tanh(inf) is finite: let the output itself overflow
            guide.loc[-1] = 3e38
            guide.loc[-2] = 3e38
    message = (
        r"The outputs must be finite at the MAP; got \d NaN or inf of 6 values of `loc`"
        r" at site 'y'\. Check the inputs and the network"
    )
    loader = Loader(x, y)
    with pytest.raises(NonFiniteError, match=message):
        guide.laplace_approximation(x, y)
    with pytest.raises(NonFiniteError, match=message.replace("6 values", "2 values")):
        guide.laplace_approximation_from(loader)
    assert loader.taken <= 2


def test_outputs_of_a_prediction_are_not_finite() -> None:
    """Not a NaN in the picture: an error where it arises."""
    x, y = data()
    posterior = AutoSubnetLaplace(Counted(), 3).laplace_approximation(x, y)
    x[4, 0] = math.nan
    message = (
        r"The outputs must be finite .*; got 1 NaN or inf of 6 .* Check the inputs"
    )
    with pytest.raises(NonFiniteError, match=message):
        posterior.output_distribution(x)
    with pytest.raises(NonFiniteError, match=message):
        Predictive(posterior.linearized_model, guide=posterior, num_samples=2)(x)


def test_the_prior_is_not_finite_at_the_map() -> None:
    """Its Hessian is NaN, while the MAP and the outputs are finite."""

    def model(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", prior(INPUTS))
        pyro.factor("bad", (w * 0.0).sqrt().sum())  # the root has no slope at zero
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)

    x, y = data()
    guide = AutoSubnetLaplace(model, init_loc_fn=init_to_value(values={"w": x[0]}))
    message = (
        r"precision must be finite; got NaN or inf in 3 of 3 rows .* Check the model"
    )
    with pytest.raises(NonFiniteError, match=message):
        guide.laplace_approximation(x, y)


# ----------------------------------------------------------------------------------
# The model.


def test_a_discrete_latent_site() -> None:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", prior(INPUTS))
        switch = pyro.sample("switch", dist.Bernoulli(0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(switch * (x @ w), 1.0), obs=y)

    x, y = data()
    message = (
        r"Every latent site must be continuous; got discrete site 'switch'\. Sum it "
        r"out, .*MixtureSameFamily.*https://pyro\.ai/examples/enumeration\.html"
    )
    for call in (
        lambda guide: guide(x, y),
        lambda guide: guide.laplace_approximation(x, y),
        lambda guide: guide.laplace_approximation_from([(x, y)]),
        lambda guide: SVI(
            model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO()
        ).step(x, y),
    ):
        guide = AutoSubnetLaplace(model)
        for _ in range(2):  # the second call says the same
            with pytest.raises(ModelError, match=message):
                call(guide)


class Unreadable(dist.TorchDistribution):
    """A family whose parameters nobody can read back."""

    arg_constraints = {}  # noqa: RUF012 - torch's own interface
    support = constraints.real

    def __init__(self, center: Tensor):
        self._hidden = center
        super().__init__(center.shape)

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        return self._hidden.expand(sample_shape + self._hidden.shape)

    def log_prob(self, value: Tensor) -> Tensor:
        return -((value - self._hidden) ** 2)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Unreadable:
        return Unreadable(self._hidden.expand(batch_shape))


def test_an_unsupported_family_names_the_known_ones() -> None:
    runs = 0

    def model(x: Tensor, y: Tensor | None = None) -> None:
        nonlocal runs
        runs += 1
        w = pyro.sample("w", prior(INPUTS))
        with pyro.plate("data", len(x)):
            pyro.sample("y", Unreadable(x @ w), obs=y)

    x, y = data()
    guide = AutoSubnetLaplace(model)
    guide(x, y)
    before, loader = runs, Loader(x, y)
    message = (
        r"must be one of .*Bernoulli.*Categorical.*Normal.*Poisson.*; got .*Unreadable"
        r".*Observe one of these instead"
    )
    with pytest.raises(UnsupportedLikelihoodError, match=message):
        guide.laplace_approximation(x, y)
    with pytest.raises(UnsupportedLikelihoodError, match=message):
        guide.laplace_approximation_from(loader)
    assert runs - before <= 2
    assert loader.taken <= 1


@pytest.mark.parametrize(
    ("layer", "name"),
    [
        (nn.Dropout(0.5), "Dropout"),
        (nn.AlphaDropout(0.1), "AlphaDropout"),
        (nn.BatchNorm1d(HIDDEN), "BatchNorm1d"),
        (nn.LazyBatchNorm1d(), "BatchNorm1d"),
        (nn.RReLU(), "RReLU"),
        (nn.TransformerEncoderLayer(HIDDEN, 2, 4), "Dropout|MultiheadAttention"),
        (nn.LSTM(HIDDEN, HIDDEN, 2, dropout=0.5), "LSTM"),
        (nn.MultiheadAttention(HIDDEN, 2, dropout=0.5), "MultiheadAttention"),
    ],
)
def test_a_layer_in_training_mode(layer: nn.Module, name: str) -> None:
    """It would be random, or change its buffers: refused, and nothing is changed."""
    net = nn.Sequential(nn.Linear(INPUTS, HIDDEN), Wrapped(layer), nn.Linear(HIDDEN, 1))
    x, y = data()
    net.train()(x)  # lazy layers and statistics exist now
    bnn = bayesianize(net)

    def model(x: Tensor, y: Tensor | None = None) -> None:
        f = bnn(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(f, 0.5), obs=y)

    guide = AutoSubnetLaplace(model, RandomSubnet(3), init_loc_fn=init_to_module(net))
    bnn.eval()
    posterior = guide.laplace_approximation(x, y)
    bnn.train()
    before = {name: b.clone() for name, b in bnn.named_buffers()}
    loader = Loader(x, y)
    message = (
        rf"must run in eval mode .*; got ({name}) in training mode\. Call `\.eval\(\)`"
        r"|must give the same outputs in every run; got .* Switch dropout off with"
    )
    for act in (
        lambda: guide.laplace_approximation(x, y),
        lambda: guide.laplace_approximation_from(loader),
        lambda: posterior.output_distribution(x),
        lambda: posterior.linearized_model(x),
    ):
        with pytest.raises(ModelError, match=message):
            act()
    assert loader.taken <= 1
    for name_, buffer in bnn.named_buffers():
        assert_close(buffer, before[name_], rtol=0, atol=0)
    assert all(module.training for module in bnn.net.modules())


class Wrapped(nn.Module):
    """A layer over (N, HIDDEN), for those that want a time axis or return more."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.layer, nn.MultiheadAttention):
            return self.layer(x, x, x)[0]
        if isinstance(self.layer, nn.LSTM):
            return self.layer(x.unsqueeze(1))[0].squeeze(1)
        return self.layer(x)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Dropout(0.0),
        nn.LayerNorm(HIDDEN),
        nn.BatchNorm1d(HIDDEN, track_running_stats=False),
        nn.Tanh(),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_training_mode_that_is_harmless_is_let_through(layer: nn.Module) -> None:
    net = nn.Sequential(nn.Linear(INPUTS, HIDDEN), layer, nn.Linear(HIDDEN, 1)).train()
    bnn = bayesianize(net)

    def model(x: Tensor, y: Tensor | None = None) -> None:
        f = bnn(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(f, 0.5), obs=y)

    guide = AutoSubnetLaplace(model, RandomSubnet(3), init_loc_fn=init_to_module(net))
    assert guide.laplace_approximation(*data()).subnet.size == 3


def test_dropout_in_training_mode_of_a_users_own_module() -> None:
    """A PyroModule of the user's, as well as our own copy of a network."""

    class Net(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def forward(self, x: Tensor, y: Tensor | None = None) -> None:
            w = pyro.sample("w", prior(INPUTS))
            with pyro.plate("data", len(x)):
                pyro.sample("y", dist.Normal(self.drop(x) @ w, 1.0), obs=y)

    x, y = data()
    net = Net()
    guide = AutoSubnetLaplace(net)
    guide(x, y)  # training as usual
    with pytest.raises(
        ModelError, match=r"got Dropout in training mode\. Call `\.eval"
    ):
        guide.laplace_approximation(x, y)
    net.eval()
    assert guide.laplace_approximation(x, y).subnet.size == INPUTS


def test_randomness_that_no_layer_shows() -> None:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", prior(INPUTS))
        f = nn.functional.dropout(x, 0.5) @ w
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(f, 1.0), obs=y)

    x, y = data()
    guide = AutoSubnetLaplace(model, init_loc_fn=init_to_value(values={"w": x[0]}))
    message = (
        r"must give the same outputs in every run; got values of `loc` at site 'y'"
    )
    with pytest.raises(ModelError, match=message):
        guide.laplace_approximation(x, y)


def test_an_observed_site_without_data() -> None:
    """In the fit, that is; a prediction needs none."""
    x, y = data()
    guide = AutoSubnetLaplace(Counted(), 3)
    guide(x, y)
    message = (
        r"must be latent in the guide or observed; got site 'y' without data\. Pass its"
        r" data to the Laplace approximation"
    )
    with pytest.raises(ModelError, match=message):
        guide.laplace_approximation(x)
    loader = [(x[:2], y[:2]), (x[2:],)]
    with pytest.raises(ModelError, match=message):
        guide.laplace_approximation_from(loader)


def test_a_discrete_site_that_was_never_observed() -> None:
    """Labels left out at the very first call: they look like a discrete latent site."""

    def model(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", prior(INPUTS))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Bernoulli(logits=x @ w), obs=y)

    x, _ = data()
    guide = AutoSubnetLaplace(model)
    with pytest.raises(ModelError, match="continuous; got discrete site 'y'"):
        guide.laplace_approximation(x)


def test_a_model_without_observed_sites_warns() -> None:
    def model(x: Tensor) -> None:
        w = pyro.sample("w", prior(INPUTS))
        pyro.deterministic("f", x @ w)

    x, _ = data()
    guide = AutoSubnetLaplace(model)
    message = (
        "has no observed site, so the posterior is the prior's curvature alone.*"
        "`poutine.block`, pass the full model"
    )
    with pytest.warns(NoObservedSiteWarning, match=message):
        posterior = guide.laplace_approximation(x)
    precision = posterior.get_posterior().precision_matrix
    assert_close(precision, torch.eye(INPUTS))
    with pytest.warns(NoObservedSiteWarning, match=message):
        guide.laplace_approximation_from([x[:2], x[2:]])


def test_sites_that_come_and_go() -> None:
    def model(x: Tensor, y: Tensor | None = None, extra: bool = True) -> None:
        w = pyro.sample("w", prior(INPUTS))
        if extra:
            w = w + pyro.sample("shift", prior(INPUTS))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)

    x, y = data()
    guide = AutoSubnetLaplace(model)
    guide(x, y)
    message = r"must have the guide's latent sites in every call; got .* 'shift'\. Make"
    with pytest.raises(ModelError, match=message):
        guide.laplace_approximation(x, y, extra=False)
    posterior = guide.laplace_approximation(x, y)
    with pytest.raises(ModelError, match=message):
        posterior.output_distribution(x, extra=False)


def test_a_latent_site_for_every_observation() -> None:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    x, y = data()
    guide = AutoSubnetLaplace(model)
    guide(x, y)
    message = (
        r"Site 'z' must have the shape that the guide was set up with, \(6,\); got "
        r"\(2,\) in this call\. Latent sites inside a plate over the data are not"
    )
    with pytest.raises(ModelError, match=message):
        guide.laplace_approximation_from(Loader(x, y))


def test_a_negative_scale() -> None:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", prior(INPUTS))
        scale = torch.where(torch.arange(len(x)) == 1, -0.5, 1.0)
        with pyro.plate("data", len(x)), poutine.scale(scale=scale):
            pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)

    # validating, Pyro says so itself
    guide, (x, y) = AutoSubnetLaplace(model), data()
    message = r"scale of site 'y' must not be negative; got -0\.5\. Check `poutine\.sca"
    with pyro.validation_enabled(False), pytest.raises(ModelError, match=message):
        guide.laplace_approximation(x, y)


# ----------------------------------------------------------------------------------
# The precision.


@pytest.mark.parametrize("size", [2, 3])
def test_a_precision_that_is_not_positive_definite(size: int) -> None:
    """Smallest eigenvalue, S, and what to change; no jitter, no prior variance."""

    def model(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", prior(size))
        # a saddle at zero: curvature +1 + 3 along one diagonal, 1 - 3 along the other
        pyro.factor("saddle", -3.0 * w[0] * w[1])
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(0.0 * w.sum() * x[:, 0], 1.0), obs=y)

    x, y = data()
    zero = {"w": torch.zeros(size)}
    guide = AutoSubnetLaplace(model, init_loc_fn=init_to_value(values=zero))
    message = (
        rf"precision at S={size} must be positive definite; got smallest eigenvalue "
        r"-2\.000e\+00\. Train closer to the MAP, raise the prior's precision \(now 1 "
        r"times the model's\), or choose another subnet"
    )
    with (
        pytest.warns(exceptions.NoOutputVarianceWarning, match="moves no output"),
        pytest.raises(PrecisionError, match=message),
    ):
        guide.laplace_approximation(x, y)


def test_a_singular_precision_is_no_variance() -> None:
    """NumPyro warns here and sets the variance to zero; others to the prior's."""

    def model(x: Tensor, y: Tensor | None = None) -> None:
        flat = dist.ImproperUniform(constraints.real, (), (INPUTS,))
        w = pyro.sample("w", flat)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)

    x, y = data()
    x[:, 2] = 0.0
    zero = init_to_value(values={"w": torch.zeros(INPUTS)})
    guide = AutoSubnetLaplace(model, init_loc_fn=zero)
    message = (
        r"precision at S=3 must be positive definite; got smallest eigenvalue .*\."
    )
    with pytest.raises(PrecisionError, match=message):
        guide.laplace_approximation(x, y)
    fine = AutoSubnetLaplace(model, {"w": torch.tensor([0, 1])}, init_loc_fn=zero)
    found = fine.laplace_approximation(x, y).get_posterior().precision_matrix
    assert_close(found, x[:, :2].mT @ x[:, :2])


# ----------------------------------------------------------------------------------
# The data.


def test_no_batches() -> None:
    x, y = data()
    for batches in ([], iter([])):
        pyro.clear_param_store()
        guide = AutoSubnetLaplace(Counted(), RandomSubnet(3))
        guide(x, y)
        message = r"`batches` must hold at least one batch; got none\. Check the loader"
        with pytest.raises(DataError, match=message):
            guide.laplace_approximation_from(batches)


@pytest.mark.parametrize("item", [3, "xy", None, {1.0}])
def test_a_batch_that_is_no_set_of_arguments(item: Any) -> None:
    x, y = data()
    guide = AutoSubnetLaplace(Counted(), RandomSubnet(3))
    guide(x, y)
    kind = type(item).__name__
    message = (
        rf"A batch must be `\(args, kwargs\)`, .*; got {kind}\. Wrap it in a tuple"
    )
    with pytest.raises(DataError, match=message):
        guide.laplace_approximation_from([item])


@pytest.mark.parametrize("num_data", [0, -5])
def test_a_bad_number_of_data(num_data: int) -> None:
    x, y = data()
    loader = Loader(x, y)
    guide = AutoSubnetLaplace(Counted(), 3)
    message = rf"`num_data` must be a positive count; got {num_data}\. Leave it out"
    with pytest.raises(OptionError, match=message):
        guide.laplace_approximation_from(loader, num_data=num_data)
    assert loader.taken == 0


def test_a_one_shot_iterator_before_the_guide_is_set_up() -> None:
    """Its first batch would be spent on setting up, and missing from the sum."""
    x, y = data()
    model = Counted()
    guide = AutoSubnetLaplace(model, RandomSubnet(3))
    message = (
        r"must be re-iterable because setting up the guide .* got a one-shot .*Pass"
    )
    with pytest.raises(DataError, match=message):
        guide.laplace_approximation_from(iter(Loader(x, y)))
    assert model.runs == 0


def test_a_prior_that_depends_on_the_data() -> None:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(x.mean(0), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)

    x, y = data()
    guide = AutoSubnetLaplace(model, init_loc_fn=init_to_value(values={"w": x[0]}))
    guide(x, y)
    message = (
        r"log prior at the MAP must be the same for every batch; got .* and .*\. A"
    )
    with pytest.raises(ModelError, match=message):
        guide.laplace_approximation_from(Loader(x, y))
    assert guide.laplace_approximation(x, y).subnet.size == INPUTS


# ----------------------------------------------------------------------------------
# All errors.


def test_every_error_can_be_caught_as_one() -> None:
    x, y = data()
    guide = AutoSubnetLaplace(Counted(), {"nowhere": torch.tensor([0])})
    with pytest.raises(SubnetError, match="got 'nowhere'"):
        guide.laplace_approximation(x, y)
    with pytest.raises(ValueError, match="got 'nowhere'"):
        guide.laplace_approximation(x, y)


def test_a_failed_fit_leaves_the_guide_as_it_was() -> None:
    x, y = data()
    guide = AutoSubnetLaplace(Counted(), 3)
    guide(x, y)
    before = guide.loc.detach().clone()
    bad = x.clone()
    bad[0, 0] = math.nan
    with torch.no_grad():
        guide.loc.add_(1.0)
    with pytest.raises(NonFiniteError, match="must be finite"):
        guide.laplace_approximation(bad, y)
    assert_close(guide.loc.detach(), before + 1.0)
    assert len(torch.nn.modules.module._global_forward_pre_hooks) == 0
    assert guide.laplace_approximation(x, y).subnet.size == 3
