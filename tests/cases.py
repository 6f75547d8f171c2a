"""Models as users write them, each beside a plain function that recomputes it.

A case is built in a dtype and on a device, those of ``like``; its plain functions are
in float64 on the CPU. All sizes are awkward: N = 7 is a multiple of no batch size but 1
and 7, weights are no squares, and inputs are not contiguous.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import init_to_value
from pyro.nn import PyroModule, PyroSample
from torch import Tensor, nn

from pyro_subnet import AutoSubnetLaplace
from pyro_subnet.nn import bayesianize
from pyro_subnet.subnet import Subnet
from pyro_subnet.tracing.call import ModelCall
from tests import reference

NUM_DATA = 7
DOUBLE = torch.empty((), dtype=torch.float64)

# Constrained values by site.
Values = Mapping[str, Tensor]


def identity(value: Tensor) -> Tensor:
    """The map of a site that is not constrained."""
    return value


@dataclass(frozen=True)
class Latent:
    """Where a latent site sits, unconstrained, and how it is constrained."""

    name: str
    unconstrained: Tensor
    to_support: Callable[[Tensor], Tensor] = identity


@dataclass(frozen=True)
class Observed:
    """An observed site recomputed: M elements, c outputs that latents can move."""

    outputs: Callable[[Values], Tensor]
    information: Callable[[Tensor], Tensor]
    weights: Tensor = field(default_factory=lambda: torch.ones(NUM_DATA).double())


@dataclass(frozen=True)
class Case:
    """A user's model with its data, and the plain functions of the packed vector."""

    like: Tensor
    model: Callable[..., Any]
    args: tuple[Any, ...]
    latents: tuple[Latent, ...]
    log_prior: Callable[[Values], Tensor]
    observed: tuple[Observed, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def packed(self) -> Tensor:
        """The point, float64, shape (D,)."""
        return torch.cat([latent.unconstrained.flatten() for latent in self.latents])

    @property
    def num_params(self) -> int:
        """D."""
        return self.packed.numel()

    def values(self, packed: Tensor) -> Values:
        """Constrained values of the sites at a packed vector."""
        values, start = {}, 0
        for latent in self.latents:
            stop = start + latent.unconstrained.numel()
            unconstrained = packed[start:stop].reshape(latent.unconstrained.shape)
            values[latent.name] = latent.to_support(unconstrained)
            start = stop
        return values

    def guide(self, subnet: Any = None, **options: Any) -> AutoSubnetLaplace:
        """A guide at the point, not set up yet; ``subnet`` may list positions."""
        if isinstance(subnet, list):
            subnet = self.positions_by_site(subnet)
        values = self.values(self.packed).items()
        init = init_to_value(
            values={site: value.to(self.like) for site, value in values}
        )
        return AutoSubnetLaplace(self.model, subnet, init_loc_fn=init, **options)

    def positions_by_site(self, positions: Sequence[int]) -> dict[str, Tensor]:
        """Packed positions as a user gives them: flat ones within each site."""
        chosen, start = {}, 0
        for latent in self.latents:
            stop = start + latent.unconstrained.numel()
            within = [i - start for i in positions if start <= i < stop]
            chosen[latent.name] = torch.tensor(within, dtype=torch.long)
            start = stop
        return chosen

    def scattered(self, seed: int = 0) -> list[int]:
        """The last element of every site, and a third of all others, in no order."""
        sizes = torch.tensor([latent.unconstrained.numel() for latent in self.latents])
        last = set((sizes.cumsum(0) - 1).tolist())
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(self.num_params, generator=generator).tolist()
        third = {*order[: self.num_params // 3], *last}
        return [i for i in order if i in third]

    def jacobian(self, site: int) -> Tensor:
        """J of one observed site, shape (rows, D)."""
        observed = self.observed[site]
        jac = reference.dense_jacobian(
            lambda packed: observed.outputs(self.values(packed)), self.packed
        )
        return jac.flatten(0, -2)

    def ggn(self) -> Tensor:
        """Σ wJᵀΛJ over all observed sites, shape (D, D)."""
        total = torch.zeros(self.num_params, self.num_params, dtype=torch.float64)
        for site in self.observed:
            total += reference.dense_ggn(
                lambda packed, site=site: site.outputs(self.values(packed)),
                site.information,
                site.weights,
                self.packed,
            )
        return total

    def prior(self) -> Tensor:
        """Negative Hessian of the unconstrained log prior, shape (D, D)."""
        return reference.dense_negative_hessian(self.log_prior_at, self.packed)

    def log_prior_at(self, packed: Tensor) -> Tensor:
        """The unconstrained log prior at a packed vector, up to a constant."""
        density, start = self.log_prior(self.values(packed)), 0
        for latent in self.latents:
            stop = start + latent.unconstrained.numel()
            if latent.to_support is not identity:
                unconstrained = packed[start:stop].reshape(latent.unconstrained.shape)
                density = density + reference.log_volume(
                    latent.to_support, unconstrained
                )
            start = stop
        return density


def read_call(case: Case, subnet: list[int]) -> tuple[ModelCall, Subnet]:
    """The package's reading of a case, and a subnet of it."""
    guide = case.guide()
    guide(*case.args, **case.kwargs)
    call = ModelCall.read(guide.at_map, case.args, case.kwargs)
    chosen = Subnet.from_positions(guide.latents.layout, torch.tensor(subnet))
    return call, chosen


def draw(seed: int, *shape: int) -> Tensor:
    """Standard normal numbers, float64, always the same."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def double(values: Any) -> Tensor:
    """Numbers in float64."""
    return torch.tensor(values, dtype=torch.float64)


def inputs(width: int, seed: int = 1) -> Tensor:
    """Inputs (N, width) that are not contiguous."""
    return draw(seed, width, NUM_DATA).T


def normal_log_density(scale: float | Tensor, *values: Tensor) -> Tensor:
    """Log density of centred normals, up to a constant of the scale's."""
    return sum(
        (-0.5 * (value / scale) ** 2 - torch.as_tensor(scale).log()).sum()
        for value in values
    )


def standard_normal(values: Values) -> Tensor:
    """Log density of independent standard normals over all sites."""
    return normal_log_density(1.0, *values.values())


def normal_prior(like: Tensor, *shape: int) -> dist.Distribution:
    """Independent standard normals over one weight."""
    return dist.Normal(like.new_zeros(shape), 1.0).to_event(len(shape))


def bayesian_linear(like: Tensor, num_in: int, num_out: int) -> PyroModule:
    """A linear layer whose weights are standard normal."""
    layer = PyroModule[nn.Linear](num_in, num_out).to(like)
    layer.weight = PyroSample(normal_prior(like, num_out, num_in))
    layer.bias = PyroSample(normal_prior(like, num_out))
    return layer


class MLP(PyroModule):
    """A tanh network with one hidden layer."""

    def __init__(self, like: Tensor, num_in: int, hidden: int, num_out: int):
        super().__init__()
        self.fc1 = bayesian_linear(like, num_in, hidden)
        self.fc2 = bayesian_linear(like, hidden, num_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.tanh(self.fc1(x)))


def mlp_latents(
    num_in: int, hidden: int, num_out: int, seed: int = 2
) -> tuple[Latent, ...]:
    """A point for :class:`MLP`."""
    return (
        Latent("fc1.weight", draw(seed, hidden, num_in)),
        Latent("fc1.bias", draw(seed + 1, hidden)),
        Latent("fc2.weight", draw(seed + 2, num_out, hidden)),
        Latent("fc2.bias", draw(seed + 3, num_out)),
    )


def mlp_outputs(x: Tensor, values: Values) -> Tensor:
    """What :class:`MLP` computes."""
    hidden = torch.tanh(x @ values["fc1.weight"].T + values["fc1.bias"])
    return hidden @ values["fc2.weight"].T + values["fc2.bias"]


def regression_mlp(like: Tensor) -> Case:
    """C = 1, a known noise scale."""
    net, x = MLP(like, 3, 4, 1), inputs(3)

    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        mean = net(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Normal(mean, 0.3), obs=y)

    return Case(
        like=like,
        model=model,
        args=(x.to(like), draw(9, NUM_DATA).to(like)),
        latents=mlp_latents(3, 4, 1),
        log_prior=standard_normal,
        observed=(
            Observed(lambda v: mlp_outputs(x, v), reference.location_information(0.3)),
        ),
    )


def several_outputs(like: Tensor) -> Case:
    """C = 3 as an event, a noise scale for each of them."""
    net, x = MLP(like, 2, 3, 3), inputs(2)
    scale = double([0.3, 1.0, 2.5])

    def model(x: Tensor, y: Tensor | None = None) -> None:
        mean = net(x)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, scale.to(like)).to_event(1), obs=y)

    return Case(
        like=like,
        model=model,
        args=(x.to(like), draw(9, 3, NUM_DATA).T.to(like)),
        latents=mlp_latents(2, 3, 3),
        log_prior=standard_normal,
        observed=(
            Observed(
                lambda v: mlp_outputs(x, v), reference.location_information(scale)
            ),
        ),
    )


def classification_mlp(like: Tensor) -> Case:
    """C = 3 classes; a latent weight and a bias that is a plain parameter."""
    net, x = MLP(like, 3, 4, 3), inputs(3)
    bias = draw(8, 3)
    del net.fc2.bias
    net.fc2.bias = nn.Parameter(bias.to(like))
    latents = mlp_latents(3, 4, 3)[:-1]

    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        logits = net(x)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(logits=logits), obs=y)
        return logits

    def log_probabilities(v: Values) -> Tensor:
        return mlp_outputs(x, {**v, "fc2.bias": bias}).log_softmax(-1)

    return Case(
        like=like,
        model=model,
        args=(x.to(like), torch.arange(NUM_DATA, device=like.device) % 3),
        latents=latents,
        log_prior=standard_normal,
        observed=(Observed(log_probabilities, reference.categorical_information),),
    )


def cnn(like: Tensor) -> Case:
    """Grouped, strided convolutions and a norm with buffers, by ``bayesianize``."""
    x = draw(1, 2, NUM_DATA, 5, 5).transpose(0, 1)
    mean, variance = draw(3, 4), draw(4, 4).exp()
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, groups=2, bias=False),
        nn.BatchNorm2d(4),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(16, 3),
    ).to(like)
    net[1].running_mean.copy_(mean)
    net[1].running_var.copy_(variance)
    bnn = bayesianize(net.eval(), prior_scale=0.7)

    def model(x: Tensor, y: Tensor | None = None) -> None:
        logits = bnn(x)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(logits=logits), obs=y)

    def log_probabilities(v: Values) -> Tensor:
        h = convolved(x, v["0.weight"])
        h = (h - mean[:, None, None]) / (variance[:, None, None] + 1e-5).sqrt()
        h = torch.tanh(h * v["1.weight"][:, None, None] + v["1.bias"][:, None, None])
        return (h.flatten(1) @ v["4.weight"].T + v["4.bias"]).log_softmax(-1)

    return Case(
        like=like,
        model=model,
        args=(x.to(like), torch.arange(NUM_DATA, device=like.device) % 3),
        latents=(
            Latent("0.weight", draw(5, 4, 1, 3, 3)),
            Latent("1.weight", draw(6, 4)),
            Latent("1.bias", draw(7, 4)),
            Latent("4.weight", draw(8, 3, 16)),
            Latent("4.bias", draw(9, 3)),
        ),
        log_prior=lambda v: normal_log_density(0.7, *v.values()),
        observed=(Observed(log_probabilities, reference.categorical_information),),
    )


def convolved(x: Tensor, weight: Tensor) -> Tensor:
    """A 3 x 3 convolution of stride 2 in groups of one channel in, two out."""
    rows = []
    for channel, kernel in enumerate(weight[:, 0]):
        image = x[:, channel // 2]
        windows = image.unfold(1, 3, 2).unfold(2, 3, 2)
        rows.append((windows * kernel).sum((-2, -1)))
    return torch.stack(rows, dim=1)


def heteroscedastic(like: Tensor) -> Case:
    """The noise is an output too; the scale of the weights is a latent site."""
    x = inputs(3)

    def model(x: Tensor, y: Tensor | None = None) -> None:
        tau = pyro.sample("tau", dist.HalfCauchy(like.new_tensor(1.0)))
        prior = dist.Normal(like.new_zeros(3, 2), tau).to_event(2)
        hidden = torch.tanh(x @ pyro.sample("w", prior))
        prior = dist.Normal(like.new_zeros(2, 2), tau).to_event(2)
        mean, log_scale = (hidden @ pyro.sample("v", prior)).unbind(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, log_scale.exp() * 0.1), obs=y)

    def outputs(v: Values) -> Tensor:
        mean, log_scale = (torch.tanh(x @ v["w"]) @ v["v"]).unbind(-1)
        return torch.stack([mean, (log_scale.exp() * 0.1).log()], dim=-1)

    def log_prior(v: Values) -> Tensor:
        weights = normal_log_density(v["tau"], v["w"], v["v"])
        return weights - torch.log(1 + v["tau"] ** 2)

    return Case(
        like=like,
        model=model,
        args=(x.to(like), draw(9, NUM_DATA).to(like)),
        latents=(
            Latent("tau", double(-0.4), torch.exp),
            Latent("w", draw(2, 3, 2) * 0.6),
            Latent("v", draw(3, 2, 2) * 0.6),
        ),
        log_prior=log_prior,
        observed=(Observed(outputs, reference.normal_information),),
    )


def latent_noise(like: Tensor) -> Case:
    """Plain ``pyro.sample`` of matrices and of the noise scale."""
    x = inputs(3)

    def model(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", normal_prior(like, 3, 4))
        v = pyro.sample("v", normal_prior(like, 4))
        sigma = pyro.sample("sigma", dist.LogNormal(like.new_tensor(-1.0), 0.5))
        mean = torch.tanh(x @ w) @ v
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, sigma), obs=y)

    def outputs(v: Values) -> Tensor:
        mean = torch.tanh(x @ v["w"]) @ v["v"]
        return torch.stack([mean, v["sigma"].log().expand(NUM_DATA)], dim=-1)

    def log_prior(v: Values) -> Tensor:
        u = v["sigma"].log()
        return normal_log_density(1.0, v["w"], v["v"]) - 2 * (u + 1) ** 2 - u

    return Case(
        like=like,
        model=model,
        args=(x.to(like), draw(9, NUM_DATA).to(like)),
        latents=(
            Latent("w", draw(2, 3, 4)),
            Latent("v", draw(3, 4)),
            Latent("sigma", double(-0.7), torch.exp),
        ),
        log_prior=log_prior,
        observed=(Observed(outputs, reference.normal_information),),
    )


def weighted_poisson(like: Tensor) -> Case:
    """A count with a weight for each observation, and some data missing."""
    net, x = MLP(like, 2, 3, 1), inputs(2)
    weights = double([0.5, 2.0, 1.0, 3.0, 1.0, 0.1, 4.0])
    seen = torch.tensor([True, True, False, True, True, True, False])

    def model(x: Tensor, y: Tensor, weights: Tensor, seen: Tensor) -> None:
        rate = net(x).squeeze(-1).exp()
        scaled, masked = poutine.scale(scale=weights), poutine.mask(mask=seen)
        with scaled, masked, pyro.plate("data", len(x)):
            pyro.sample("y", dist.Poisson(rate), obs=y)

    return Case(
        like=like,
        model=model,
        args=(
            x.to(like),
            torch.arange(NUM_DATA).to(like),
            weights.to(like),
            seen.to(like.device),
        ),
        latents=mlp_latents(2, 3, 1),
        log_prior=standard_normal,
        observed=(
            Observed(
                lambda v: mlp_outputs(x, v),
                reference.poisson_information,
                weights * seen,
            ),
        ),
    )


def masked_bernoulli(like: Tensor) -> Case:
    """Two classes, ``.mask`` on the distribution, and a latent prior precision."""
    x = inputs(3)
    seen = torch.tensor([True, False, True, True, True, False, True])

    def model(x: Tensor, seen: Tensor, y: Tensor | None = None) -> None:
        precision = pyro.sample("precision", dist.Gamma(like.new_tensor(9.0), 4.0))
        prior = dist.Normal(like.new_zeros(3), precision.rsqrt()).to_event(1)
        logits = (x @ pyro.sample("w", prior)).sinh()
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Bernoulli(logits=logits).mask(seen), obs=y)

    def log_prior(v: Values) -> Tensor:
        gamma = 8.0 * v["precision"].log() - 4.0 * v["precision"]
        return gamma + normal_log_density(v["precision"].rsqrt(), v["w"])

    return Case(
        like=like,
        model=model,
        args=(
            x.to(like),
            seen.to(like.device),
            (torch.arange(NUM_DATA) % 2).to(like),
        ),
        latents=(
            Latent("precision", double(0.6), torch.exp),
            Latent("w", draw(2, 3) * 0.4),
        ),
        log_prior=log_prior,
        observed=(
            Observed(
                lambda v: (x @ v["w"]).sinh().unsqueeze(-1),
                reference.bernoulli_information,
                seen.double(),
            ),
        ),
    )


def two_sites(like: Tensor) -> Case:
    """A number and a class from one trunk; data come in a dict and by keyword."""
    net, left, right = MLP(like, 3, 2, 4), inputs(3), inputs(3, seed=4)

    def model(batch: Mapping[str, Tensor], *, labels: Mapping[str, Tensor]) -> None:
        out = net(batch["left"] * batch["right"])
        with pyro.plate("data", len(out)):
            mean = pyro.deterministic("mean", out[:, 0])
            pyro.sample("y", dist.Normal(mean, 0.5), obs=labels["y"])
            kind = dist.Categorical(logits=out[:, 1:])
            pyro.sample("kind", kind, obs=labels["kind"])

    def trunk(v: Values) -> Tensor:
        return mlp_outputs(left * right, v)

    return Case(
        like=like,
        model=model,
        args=({"left": left.to(like), "right": right.to(like)},),
        kwargs={
            "labels": {
                "y": draw(9, NUM_DATA).to(like),
                "kind": torch.arange(NUM_DATA, device=like.device) % 3,
            }
        },
        latents=mlp_latents(3, 2, 4),
        log_prior=standard_normal,
        observed=(
            Observed(lambda v: trunk(v)[:, :1], reference.location_information(0.5)),
            Observed(
                lambda v: trunk(v)[:, 1:].log_softmax(-1),
                reference.categorical_information,
            ),
        ),
    )


def two_lengths(like: Tensor) -> Case:
    """Observed sites that share weights but no data axis."""
    long, short = inputs(2), draw(4, 5, 2)

    def model(long: Tensor, short: Tensor, y: Tensor, count: Tensor) -> None:
        w = pyro.sample("w", normal_prior(like, 2))
        b = pyro.sample("b", normal_prior(like))
        with pyro.plate("long", len(long)):
            pyro.sample("y", dist.Normal(torch.tanh(long @ w), 0.2), obs=y)
        with pyro.plate("short", len(short)):
            pyro.sample("count", dist.Poisson((short @ w + b).exp()), obs=count)

    return Case(
        like=like,
        model=model,
        args=(
            long.to(like),
            short.to(like),
            draw(9, NUM_DATA).to(like),
            torch.arange(5).to(like),
        ),
        latents=(Latent("w", draw(2, 2)), Latent("b", draw(3))),
        log_prior=standard_normal,
        observed=(
            Observed(
                lambda v: torch.tanh(long @ v["w"]).unsqueeze(-1),
                reference.location_information(0.2),
            ),
            Observed(
                lambda v: (short @ v["w"] + v["b"]).unsqueeze(-1),
                reference.poisson_information,
                torch.ones(5).double(),
            ),
        ),
    )


def scalar_sites(like: Tensor) -> Case:
    """No plate: a scalar distribution with N values, and one expanded to an event."""
    seen = torch.tensor([[True, False, True], [True, True, False]])

    def model(y: Tensor, counts: Tensor) -> None:
        a = pyro.sample("a", normal_prior(like))
        b = pyro.sample("b", dist.Normal(like.new_tensor(0.5), 2.0))
        sigma = pyro.sample("sigma", dist.Gamma(like.new_tensor(3.0), 2.0))
        pyro.sample("y", dist.Normal(a.exp() * b, sigma), obs=y)
        poisson = dist.Poisson((a * b).exp()).expand([2, 3]).mask(seen.to(like.device))
        pyro.sample("counts", poisson.to_event(1), obs=counts)

    def log_prior(v: Values) -> Tensor:
        gamma = 2.0 * v["sigma"].log() - 2.0 * v["sigma"]
        normals = normal_log_density(1.0, v["a"])
        return gamma + normals + normal_log_density(2.0, v["b"] - 0.5)

    def y_outputs(v: Values) -> Tensor:
        eta = torch.stack([v["a"].exp() * v["b"], v["sigma"].log()])
        return eta.expand(NUM_DATA, 2)

    return Case(
        like=like,
        model=model,
        args=(draw(9, NUM_DATA).to(like), torch.arange(6).reshape(2, 3).to(like)),
        latents=(
            Latent("a", draw(2)),
            Latent("b", draw(3)),
            Latent("sigma", draw(4), torch.exp),
        ),
        log_prior=log_prior,
        observed=(
            Observed(y_outputs, reference.normal_information),
            Observed(
                lambda v: (v["a"] * v["b"]).expand(6, 1),
                reference.poisson_information,
                seen.flatten().double(),
            ),
        ),
    )


def correlated_prior(like: Tensor) -> Case:
    """All weights of a layer under one multivariate normal."""
    x, scale_tril = inputs(2), triangle(5, 6)

    def model(x: Tensor, y: Tensor | None = None) -> None:
        loc, factor = like.new_zeros(6), scale_tril.to(like)
        w = pyro.sample("w", dist.MultivariateNormal(loc, scale_tril=factor))
        v = pyro.sample("v", normal_prior(like, 3))
        mean = torch.tanh(x @ w.reshape(2, 3)) @ v
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, 0.3), obs=y)

    def log_prior(v: Values) -> Tensor:
        whitened = torch.linalg.inv(scale_tril) @ v["w"]
        return normal_log_density(1.0, whitened, v["v"])

    return Case(
        like=like,
        model=model,
        args=(x.to(like), draw(9, NUM_DATA).to(like)),
        latents=(Latent("w", draw(2, 6)), Latent("v", draw(3, 3))),
        log_prior=log_prior,
        observed=(
            Observed(
                lambda v: (torch.tanh(x @ v["w"].reshape(2, 3)) @ v["v"]).unsqueeze(-1),
                reference.location_information(0.3),
            ),
        ),
    )


def triangle(seed: int, size: int) -> Tensor:
    """A well-conditioned lower triangular matrix with a positive diagonal."""
    return 0.3 * draw(seed, size, size).tril(-1) + torch.diag(
        torch.linspace(0.5, 1.5, size, dtype=torch.float64)
    )


def constrained(like: Tensor) -> Case:
    """Latents on the simplex, above zero, and between zero and one."""
    x = inputs(3)

    def model(x: Tensor, y: Tensor | None = None) -> None:
        parts = pyro.sample("parts", dist.Dirichlet(like.new_tensor([2.0, 3.0, 4.0])))
        slope = pyro.sample("slope", dist.Gamma(like.new_tensor(3.0), 2.0))
        shift = pyro.sample("shift", dist.Beta(like.new_tensor(2.0), 3.0))
        mean = torch.tanh(x * slope) @ parts + shift
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, 0.2), obs=y)

    def log_prior(v: Values) -> Tensor:
        powers = double([1.0, 2.0, 3.0])
        dirichlet = powers @ v["parts"].log()
        gamma = 2.0 * v["slope"].log() - 2.0 * v["slope"]
        return dirichlet + gamma + v["shift"].log() + 2.0 * (1 - v["shift"]).log()

    def mean(v: Values) -> Tensor:
        return torch.tanh(x * v["slope"]) @ v["parts"] + v["shift"]

    return Case(
        like=like,
        model=model,
        args=(x.to(like), draw(9, NUM_DATA).to(like)),
        latents=(
            Latent("parts", draw(2, 2), reference.stick_breaking),
            Latent("slope", draw(3), torch.exp),
            Latent("shift", draw(4), torch.sigmoid),
        ),
        log_prior=log_prior,
        observed=(
            Observed(
                lambda v: mean(v).unsqueeze(-1), reference.location_information(0.2)
            ),
        ),
    )


def tied(like: Tensor) -> Case:
    """One weight used twice."""
    x = inputs(2)

    def model(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", normal_prior(like, 2, 3))
        with pyro.plate("data", len(x)):
            reconstruction = dist.Normal(torch.tanh(x @ w) @ w.T, 0.5).to_event(1)
            pyro.sample("y", reconstruction, obs=y)

    return Case(
        like=like,
        model=model,
        args=(x.to(like), x.to(like)),
        latents=(Latent("w", draw(2, 2, 3)),),
        log_prior=standard_normal,
        observed=(
            Observed(
                lambda v: torch.tanh(x @ v["w"]) @ v["w"].T,
                reference.location_information(0.5),
            ),
        ),
    )


def plates(like: Tensor) -> Case:
    """Weights in a plate of hidden units; outputs in a plate left of the data's."""
    x = inputs(3)

    def model(x: Tensor, y: Tensor | None = None) -> None:
        with pyro.plate("hidden", 4):
            w = pyro.sample("w", normal_prior(like, 3))
            b = pyro.sample("b", normal_prior(like))
        v = pyro.sample("v", normal_prior(like, 2, 4))
        mean = v @ torch.tanh(w @ x.T + b.unsqueeze(-1))
        outputs, data = pyro.plate("outputs", 2, dim=-2), pyro.plate("data", len(x))
        with outputs, data:
            pyro.sample("y", dist.Normal(mean, 0.4), obs=y)

    def mean(v: Values) -> Tensor:
        return v["v"] @ torch.tanh(v["w"] @ x.T + v["b"].unsqueeze(-1))

    return Case(
        like=like,
        model=model,
        args=(x.to(like), draw(9, 2, NUM_DATA).to(like)),
        latents=(
            Latent("w", draw(2, 4, 3)),
            Latent("b", draw(3, 4)),
            Latent("v", draw(4, 2, 4)),
        ),
        log_prior=standard_normal,
        observed=(
            Observed(
                lambda v: mean(v).reshape(-1, 1),
                reference.location_information(0.4),
                torch.ones(2 * NUM_DATA).double(),
            ),
        ),
    )


def tokens(like: Tensor) -> Case:
    """Outputs (N, T, C) from an embedding of which one row is never looked up."""
    x = (3 * torch.arange(2 * NUM_DATA) % 4).reshape(2, NUM_DATA).T.to(like.device)
    bnn = bayesianize(nn.Sequential(nn.Embedding(5, 2), nn.Linear(2, 3)).to(like))

    def model(x: Tensor, y: Tensor | None = None) -> None:
        logits = bnn(x)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(logits=logits).to_event(1), obs=y)

    def log_probabilities(v: Values) -> Tensor:
        embedded = v["0.weight"][x.cpu().flatten()]
        return (embedded @ v["1.weight"].T + v["1.bias"]).log_softmax(-1)

    return Case(
        like=like,
        model=model,
        args=(x, x % 3),
        latents=(
            Latent("0.weight", draw(2, 5, 2)),
            Latent("1.weight", draw(3, 3, 2)),
            Latent("1.bias", draw(4, 3)),
        ),
        log_prior=standard_normal,
        observed=(
            Observed(
                log_probabilities,
                reference.categorical_information,
                torch.ones(2 * NUM_DATA).double(),
            ),
        ),
    )


CASES: dict[str, Callable[[Tensor], Case]] = {
    build.__name__: build
    for build in (
        regression_mlp,
        several_outputs,
        classification_mlp,
        cnn,
        heteroscedastic,
        latent_noise,
        weighted_poisson,
        masked_bernoulli,
        two_sites,
        two_lengths,
        scalar_sites,
        correlated_prior,
        constrained,
        tied,
        plates,
        tokens,
    )
}
