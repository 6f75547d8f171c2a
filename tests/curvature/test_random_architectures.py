"""Random networks under every likelihood, against dense autograd in float64.

The oracle takes the Jacobian of the network row by row, and the information of a
likelihood from torch's own divergences. `make slow-test` runs thousands.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.autograd.functional import hessian, jacobian
from torch.distributions import kl_divergence
from torch.func import functional_call
from torch.testing import assert_close

from pyro_subnet import AutoSubnetLaplace
from pyro_subnet.exceptions import NoOutputVarianceWarning
from pyro_subnet.nn import bayesianize, init_to_module
from tests.tolerances import tolerance

Fn = Callable[[Tensor], Tensor]
WIDTH = 3  # of features between blocks: few, as an example has a fraction of a second
ACTIVATIONS = [nn.Tanh, nn.Sigmoid, nn.SiLU, nn.Softplus, nn.ELU, nn.GELU]


# ----------------------------------------------------------------------------------
# Blocks, from (N, 3) to (N, 3).


class Apply(nn.Module):
    """A function of the input and parameters of some shapes."""

    def __init__(self, function: Callable[..., Tensor], *shapes: tuple[int, ...]):
        super().__init__()
        self.function = function
        self.weights = nn.ParameterList(0.7 * torch.randn(shape) for shape in shapes)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.weights)


class Residual(nn.Module):
    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class Tied(nn.Module):
    """One weight in two layers, once turned."""

    def __init__(self) -> None:
        super().__init__()
        self.there, self.back = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.back.weight = self.there.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.back(torch.tanh(self.there(x))) + x @ self.there.weight


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]):
        super().__init__()
        self.layer = kind(1, WIDTH, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.unsqueeze(-1))[0][:, -1]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(1, 2)
        self.attend = nn.MultiheadAttention(2, 1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x.unsqueeze(-1))
        return self.attend(h, h, h, need_weights=False)[0].sum(-1)


class Convolution(nn.Module):
    def __init__(self, layer: nn.Module, norm: nn.Module):
        super().__init__()
        self.layer, self.norm = layer, norm

    def forward(self, x: Tensor) -> Tensor:
        h = x[:, None, :, None] * x[:, None, None, :]  # a 3 x 3 image
        return self.norm(self.layer(h)).tanh().mean((2, 3))


class Words(nn.Module):
    """An embedding of what the signs of the input spell."""

    def __init__(self, padding: int | None) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, WIDTH, padding_idx=padding)

    def forward(self, x: Tensor) -> Tensor:
        bits = (x.detach() > 0).long()
        words = torch.stack([bits @ torch.tensor([4, 2, 1]), bits.sum(1)], dim=1)
        return x + self.embed(words).mean(1)


def matrices(x: Tensor, w: Tensor) -> Tensor:
    m = torch.einsum("ni,ijk->njk", x, w)
    return m @ m.mT / 4 + torch.eye(2, dtype=x.dtype)


def spread(f: Tensor) -> Tensor:
    return torch.stack([f, f.tanh(), 1 / (1 + f.square())], dim=-1)


def running(norm: nn.Module) -> nn.Module:
    """A norm with running statistics that are not those of a new one."""
    norm.running_mean.normal_(0, 0.3)
    norm.running_var.uniform_(0.5, 2.0)
    return norm


def order(x: Tensor) -> Tensor:
    """An order of the features, the same in float32 where several are equal."""
    return (64 * x.detach()).round().argsort(dim=1, stable=True)


CUBE = (WIDTH, 2, 2)
SQUARE = (WIDTH, WIDTH)
BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    "no-bias": lambda: nn.Linear(WIDTH, WIDTH, bias=False),
    "residual": lambda: Residual(
        nn.Linear(WIDTH, 2), nn.Tanh(), nn.Linear(2, WIDTH), nn.LayerNorm(WIDTH)
    ),
    "tied": Tied,
    "prelu": nn.PReLU,
    "prelu-each": lambda: nn.PReLU(WIDTH),
    "layer-norm": lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)),
    "batch-norm": lambda: running(nn.BatchNorm1d(WIDTH)),
    "group-norm": lambda: nn.Sequential(nn.Linear(WIDTH, 4), nn.GroupNorm(2, 4)),
    "rms-norm": lambda: nn.RMSNorm(WIDTH, eps=1e-3),
    "convolution": lambda: Convolution(
        nn.Conv2d(1, WIDTH, 2, padding=1), running(nn.BatchNorm2d(WIDTH))
    ),
    "transposed": lambda: Convolution(
        nn.ConvTranspose2d(1, 3, 2, stride=2), nn.GroupNorm(1, 3)
    ),
    "embedding": lambda: Words(None),
    "padding": lambda: Words(2),
    "attention": Attention,
    "lstm": lambda: Recurrent(nn.LSTM),
    "gru": lambda: Recurrent(nn.GRU),
    "rnn": lambda: Recurrent(nn.RNN),
    "reshaped": lambda: Apply(
        lambda x, w: x @ w.view(2, WIDTH).T.repeat(1, 2)[:, :WIDTH], (2 * WIDTH,)
    ),
    "sliced": lambda: Apply(lambda x, w: x * w[0] + w[1:, :1].sum(), (3, WIDTH)),
    "einsum": lambda: Apply(
        lambda x, w: torch.einsum("ni,ijk,nj->nk", x.tanh(), w, x.tanh()), (*SQUARE, 3)
    ),
    "gather": lambda: Apply(
        lambda x, w: w[(x.detach() > 0).long().sum(1)] + x.gather(1, order(x)),
        (WIDTH + 1, WIDTH),
    ),
    "scatter": lambda: Apply(
        lambda x, w: torch.zeros_like(x).scatter_add(1, order(x), x * w), (WIDTH,)
    ),
    "in-place": lambda: Apply(
        lambda x, w: x.clone().index_add_(1, torch.tensor([0, 2]), x[:, :2] * w), (2,)
    ),
    "penalty": lambda: Apply(lambda x, w: x + (w @ w.T).sum() / 9, SQUARE),
    "det": lambda: Apply(lambda x, w: spread(torch.linalg.det(matrices(x, w))), CUBE),
    "logdet": lambda: Apply(lambda x, w: spread(torch.logdet(matrices(x, w))), CUBE),
    "slogdet": lambda: Apply(
        lambda x, w: spread(torch.linalg.slogdet(matrices(x, w))[1]), CUBE
    ),
    "solve": lambda: Apply(
        lambda x, w: (
            torch.linalg.solve(matrices(x, w), x[:, :2, None]).flatten(1)
            @ torch.ones(2, WIDTH, dtype=x.dtype)
        ),
        CUBE,
    ),
    "cholesky": lambda: Apply(
        lambda x, w: spread(torch.linalg.cholesky(matrices(x, w))[:, 1, 0]), CUBE
    ),
    "inverse": lambda: Apply(
        lambda x, w: spread(torch.linalg.inv(matrices(x, w)).sum((1, 2))), CUBE
    ),
    "matrix-exp": lambda: Apply(lambda x, w: x @ torch.matrix_exp(w - w.T), SQUARE),
}
AFTER = {"group-norm": 4}  # features that a block leaves, where they are not 3


def random_network(chance: random.Random, num_outputs: int, depth: int) -> nn.Module:
    layers: list[nn.Module] = []
    for name in chance.choices(list(BLOCKS), k=chance.randint(1, depth)):
        layers += [BLOCKS[name](), chance.choice(ACTIVATIONS)()]
        if name in AFTER:
            layers.append(nn.Linear(AFTER[name], WIDTH))
    return nn.Sequential(*layers, nn.Linear(WIDTH, num_outputs))


# ----------------------------------------------------------------------------------
# Likelihoods, as functions of the network's outputs f.


@dataclass(frozen=True)
class Likelihood:
    """What is observed, at outputs f of shape (N, C)."""

    num_outputs: int
    at: Callable[[Tensor], Any]  # the distribution
    eta: Fn = lambda f: f  # parameters in the package's order and space
    information: Fn | None = None  # a diagonal, where torch has no divergence
    # Another distribution with the same divergence: of a bijection of what is observed.
    twin: Callable[[Tensor], Any] | None = None
    copies: int = 1  # how many of the twin are observed together


def normal(f: Tensor) -> Any:
    return dist.Normal(f[:, 0], (f[:, 1] / 2).exp())


def lower(f: Tensor) -> Tensor:
    zero = torch.zeros_like(f[:, 0])
    rows = [f[:, 2].exp(), zero, f[:, 3], f[:, 4].exp()]
    return torch.stack(rows, dim=1).reshape(-1, 2, 2)


def low_rank(f: Tensor) -> Any:
    diagonal = f[:, 4:].exp().expand(-1, 2)
    return dist.LowRankMultivariateNormal(f[:, :2], f[:, 2:4, None], diagonal)


def packed(f: Tensor) -> Tensor:
    """Location, then the Cholesky factor's rows with the diagonal in logs."""
    factor = torch.linalg.cholesky(low_rank(f).covariance_matrix)
    rows = [factor[:, 0, 0].log(), factor[:, 1, 0], factor[:, 1, 1].log()]
    return torch.cat([f[:, :2], torch.stack(rows, dim=1)], dim=1)


def log_odds(f: Tensor) -> Tensor:
    return torch.log_softmax(f, dim=-1)


LIKELIHOODS: dict[str, Likelihood] = {
    "normal": Likelihood(2, lambda f: dist.Normal(f, 0.7).to_event(1)),
    "one-output": Likelihood(1, lambda f: dist.Normal(f[:, 0], 0.7)),
    "heteroscedastic": Likelihood(2, normal, lambda f: f * f.new_tensor([1.0, 0.5])),
    "bernoulli": Likelihood(1, lambda f: dist.Bernoulli(logits=f[:, 0])),
    "labels": Likelihood(3, lambda f: dist.Bernoulli(logits=f).to_event(1)),
    "categorical": Likelihood(3, lambda f: dist.Categorical(logits=f), log_odds),
    "one-hot": Likelihood(3, lambda f: dist.OneHotCategorical(logits=f), log_odds),
    "poisson": Likelihood(1, lambda f: dist.Poisson(f[:, 0].exp())),
    "binomial": Likelihood(1, lambda f: dist.Binomial(5, logits=f[:, 0])),
    "geometric": Likelihood(1, lambda f: dist.Geometric(logits=f[:, 0])),
    "exponential": Likelihood(1, lambda f: dist.Exponential(f[:, 0].exp())),
    "gamma": Likelihood(2, lambda f: dist.Gamma(f[:, 0].exp(), f[:, 1].exp())),
    "beta": Likelihood(2, lambda f: dist.Beta(f[:, 0].exp(), f[:, 1].exp())),
    "dirichlet": Likelihood(3, lambda f: dist.Dirichlet(f.exp())),
    "laplace": Likelihood(
        2,
        lambda f: dist.Laplace(f[:, 0], f[:, 1].exp()),
        information=lambda f: torch.stack([(-2 * f[:, 1]).exp(), 0 * f[:, 1] + 1], 1),
    ),
    "log-normal": Likelihood(2, lambda f: dist.LogNormal(f[:, 0], f[:, 1].exp())),
    "half-normal": Likelihood(1, lambda f: dist.HalfNormal(f[:, 0].exp())),
    "cauchy": Likelihood(2, lambda f: dist.Cauchy(f[:, 0], f[:, 1].exp())),
    "half-cauchy": Likelihood(
        1,
        lambda f: dist.HalfCauchy(f[:, 0].exp()),
        twin=lambda f: dist.Cauchy(0 * f[:, 0], f[:, 0].exp()),
    ),
    "inverse-gamma": Likelihood(
        2,
        lambda f: dist.InverseGamma(f[:, 0].exp(), f[:, 1].exp()),
        twin=lambda f: dist.Gamma(f[:, 0].exp(), f[:, 1].exp()),
    ),
    "weibull": Likelihood(
        2,
        lambda f: dist.Weibull(f[:, 0].exp(), f[:, 1].exp()),
        twin=lambda f: dist.Gumbel(-f[:, 0], (-f[:, 1]).exp()),
    ),
    "multinomial": Likelihood(
        3,
        lambda f: dist.Multinomial(4, logits=f),
        log_odds,
        twin=lambda f: dist.Categorical(logits=f),
        copies=4,
    ),
    "low-rank": Likelihood(5, low_rank, packed),
    "gumbel": Likelihood(2, lambda f: dist.Gumbel(f[:, 0], f[:, 1].exp())),
    "multivariate": Likelihood(
        5,
        lambda f: dist.MultivariateNormal(f[:, :2], scale_tril=lower(f)),
    ),
    "student": Likelihood(
        1,
        lambda f: dist.StudentT(4.0, f[:, 0], 0.5),
        information=lambda f: torch.full_like(f, 5 / 7 / 0.25),
    ),
    "negative-binomial": Likelihood(
        1,
        lambda f: dist.NegativeBinomial(3.0, logits=f[:, 0]),
        information=lambda f: 3 * f.sigmoid(),
    ),
    "von-mises": Likelihood(
        1,
        lambda f: dist.VonMises(f[:, 0], f.new_tensor(2.0)),
        information=lambda f: torch.full_like(
            f,
            float(2 * torch.special.i1(torch.tensor(2.0).double()))
            / float(torch.special.i0(torch.tensor(2.0).double())),
        ),
    ),
}


def information(likelihood: Likelihood, f: Tensor) -> Tensor:
    """Fisher information in all outputs f, (N C, N C): a Hessian of the divergence."""
    if likelihood.information is not None:
        return likelihood.information(f).flatten().diag()
    at = likelihood.twin or likelihood.at
    total = hessian(lambda g: kl_divergence(at(f), at(g)).sum(), f)
    return likelihood.copies * total.reshape(f.numel(), f.numel())


def dense_jacobian(net: nn.Module, x: Tensor, eta: Fn) -> Tensor:
    names, values = zip(*net.named_parameters(), strict=True)

    def outputs(*at: Tensor) -> Tensor:
        return eta(functional_call(net, dict(zip(names, at, strict=True)), (x,)))

    found = jacobian(outputs, tuple(value.detach() for value in values))
    return torch.cat([part.flatten(2) for part in found], dim=-1)


def scaled_close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Up to round-off of the largest number."""
    scale = expected.abs().max().clamp(min=1e-300)
    assert_close(found.double() / scale, expected / scale, **tolerance(dtype))


def check(seed: int, depth: int) -> None:
    """One network, likelihood, type and number of data."""
    chance = random.Random(seed)
    torch.manual_seed(seed)
    pyro.clear_param_store()
    dtype = chance.choice([torch.float32, torch.float64])
    likelihood = LIKELIHOODS[chance.choice(list(LIKELIHOODS))]
    net = random_network(chance, likelihood.num_outputs, depth).to(dtype).eval()
    x, at = (torch.randn(chance.randint(1, 9), WIDTH, dtype=dtype) for _ in range(2))
    bnn, exact = bayesianize(net), deepcopy(net).double()

    def model(x: Tensor, y: Tensor | None = None) -> None:
        f = bnn(x)
        with pyro.plate("data", len(x)):
            pyro.sample("y", likelihood.at(f), obs=y)

    size = sum(value.numel() for value in net.parameters())
    chosen = torch.arange(size)
    if chance.random() < 0.5:
        chosen = torch.randperm(size)[: chance.randint(1, size)].sort().values
    masks, start = {}, 0
    for name, value in net.named_parameters():
        inside = chosen[(chosen >= start) & (chosen < start + value.numel())] - start
        if inside.numel():
            masks[name] = inside
        start += value.numel()
    with torch.no_grad():
        y = likelihood.at(net(x)).sample()
        if not likelihood.at(net(x)).support.is_discrete:
            # What underflows is outside of the support.
            y = y.where(y != 0, torch.finfo(dtype).tiny)
    guide = AutoSubnetLaplace(
        model, masks, init_loc_fn=init_to_module(net), form="primal"
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", NoOutputVarianceWarning)
        posterior = guide.laplace_approximation(x, y)

    wide = x.double()
    jac = dense_jacobian(exact, wide, lambda f: f).flatten(0, 1)[:, chosen]
    precision = jac.mT @ information(likelihood, exact(wide).detach()) @ jac
    precision += torch.eye(len(chosen), dtype=precision.dtype)
    scaled_close(posterior.get_posterior().precision_matrix, precision, dtype)

    assert bool(caught) == (not bool(jac.any()))  # as of words in no observation
    jac = dense_jacobian(exact, at.double(), likelihood.eta)[..., chosen]
    covariance = jac @ torch.linalg.solve(precision, jac.mT)
    scaled_close(posterior.output_distribution(at).covariance_matrix, covariance, dtype)


@pytest.mark.parametrize("first", range(0, 200, 10))
def test_ten_networks(first: int) -> None:
    for seed in range(first, first + 10):
        check(seed, depth=1 if seed % 3 else 2)  # short: CI has many tests


@pytest.mark.slow
@pytest.mark.parametrize("first", range(200, 4200, 100))
def test_thousands_of_networks(first: int) -> None:
    for seed in range(first, first + 100):
        check(seed, depth=4)
