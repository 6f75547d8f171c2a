"""Latent sites of several floating point types, as adapters and their backbone have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO
from torch import Tensor, nn
from torch.testing import assert_close

from pyro_subnet import AutoSubnetLaplace, AutoSubnetMultivariateNormal
from pyro_subnet.nn import bayesianize, init_to_module
from pyro_subnet.selection import RandomSubnet
from tests.reference import dense_jacobian
from tests.tolerances import num_standard_errors

# Of a network whose head is of bfloat16, round-off and all.
ROUNDED = {"rtol": 0.02, "atol": 0.02}
TYPES = {"head": torch.bfloat16, "up": torch.float32, "down": torch.float32}


class Adapted(nn.Module):
    """A frozen layer of bfloat16 with an adapter of float32, under a bfloat16 head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 8).bfloat16().requires_grad_(False)
        self.head = nn.Linear(8, 3).bfloat16()
        self.down = nn.Linear(3, 2, bias=False)
        self.up = nn.Linear(2, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        low = self.up(self.down(x.to(self.down.weight.dtype)))
        body = self.body(x.to(self.body.weight.dtype))
        return self.head(torch.tanh(body + low.to(body.dtype)))


def example() -> tuple[Adapted, Any, Tensor, Tensor]:
    net = Adapted()
    bnn = bayesianize(net)

    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        logits = bnn(x).float()
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(logits=logits), obs=y)
        return logits

    return net, model, torch.randn(11, 3), torch.randint(3, (11,))


def fitted(subnet: Any = None) -> tuple[AutoSubnetMultivariateNormal, Any]:
    net, model, x, y = example()
    guide = AutoSubnetLaplace(model, subnet, init_loc_fn=init_to_module(net))
    return guide.laplace_approximation(x, y), (net, model, x, y)


def jacobian(net: nn.Module, x: Tensor) -> Tensor:
    """J of the network in float64, (N, C, D)."""
    net, x = net.double(), x.double()
    parameters = {k: p for k, p in net.named_parameters() if p.requires_grad}
    packed = torch.cat([p.detach().flatten() for p in parameters.values()])

    def outputs(theta: Tensor) -> Tensor:
        pieces = theta.split([p.numel() for p in parameters.values()])
        values = {
            name: piece.view(p.shape)
            for (name, p), piece in zip(parameters.items(), pieces, strict=True)
        }
        return torch.func.functional_call(net, values, (x,))

    return dense_jacobian(outputs, packed)


@pytest.mark.parametrize("subnet", [None, RandomSubnet(13, seed=1)])
def test_sites_of_two_types_have_the_curvature_of_float64(subnet: Any) -> None:
    posterior, (net, _, x, _) = fitted(subnet)
    chosen = posterior.subnet.flat
    jac = jacobian(net, x)[..., chosen]
    p = net(x.double()).softmax(-1).detach()
    information = torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)
    expected = torch.einsum("ncd,nce,nef->df", jac, information, jac)
    expected += torch.eye(len(chosen)).double()
    found = posterior.get_posterior().precision_matrix
    assert found.dtype == torch.float32
    assert_close(found.double(), expected, **ROUNDED)


def test_every_draw_has_its_sites_type(tmp_path: Path) -> None:
    posterior, (net, model, x, y) = fitted(RandomSubnet(13, seed=1))
    posterior.save(tmp_path / "file")
    loaded = AutoSubnetMultivariateNormal.load(tmp_path / "file", model, x, y)
    for guide in (posterior, loaded):
        for values in (guide(x), guide.median()):
            for name, value in values.items():
                assert value.dtype == TYPES[name.split(".")[0]], name
    for name, value in posterior.median().items():
        assert_close(value, dict(net.named_parameters())[name].detach())


def test_predictions_in_both_spaces_run() -> None:
    posterior, (_, model, x, _) = fitted(RandomSubnet(13, seed=1))
    outputs = posterior.output_distribution(x)
    options: dict[str, Any] = {"guide": posterior, "return_sites": ["_RETURN"]}
    for program, parallel in (
        (model, False),
        (posterior.linearized_model, False),
        (posterior.linearized_model, True),
    ):
        draws = Predictive(program, num_samples=200, parallel=parallel, **options)(x)
        logits = draws["_RETURN"].squeeze()
        centred = logits - logits.logsumexp(-1, keepdim=True)
        assert centred.shape == (200, 11, 3)
        if program is not model:
            # Standard errors of a mean of 200, 33 of them, and what bfloat16 rounds.
            error = num_standard_errors(33) * outputs.variance.sqrt() / 200**0.5
            assert bool(((centred.mean(0) - outputs.loc).abs() < error + 0.1).all())
    hybrid = posterior.hybrid_model()
    drawn = Predictive(hybrid, guide=hybrid.guide, num_samples=3)(x)
    assert drawn["y"].shape == (3, 11)


def test_svi_trains_sites_of_two_types() -> None:
    net, model, x, y = example()
    guide = AutoSubnetLaplace(model, init_loc_fn=init_to_module(net))
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    losses = [svi.step(x, y) for _ in range(40)]
    assert losses[-1] < losses[0]
    assert {value.dtype for value in guide.median().values()} == set(TYPES.values())
