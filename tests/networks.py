"""Networks beside the precision that dense autograd in float64 gives them."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide.initialization import init_to_value
from torch import Tensor, nn

from pyro_subnet import AutoSubnetLaplace, AutoSubnetMultivariateNormal
from pyro_subnet.nn import bayesianize
from tests.reference import dense_jacobian

NOISE = 0.5
# From a network, or what a bayesianized one is, and inputs to outputs (N,).
Body = Callable[[Callable[..., Tensor], Tensor], Tensor]


def called(net: Callable[..., Tensor], x: Tensor) -> Tensor:
    """A network's one output."""
    return net(x).squeeze(-1)


def model_of(bnn: Any, body: Body, *, in_plate: bool = False) -> Callable[..., Tensor]:
    """A regression with a bayesianized network, as users write it in a function."""

    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        if in_plate:
            with pyro.plate("data", len(x)):
                mean = body(bnn, x)
                pyro.sample("y", dist.Normal(mean, NOISE), obs=y)
        else:
            mean = body(bnn, x)
            with pyro.plate("data", len(x)):
                pyro.sample("y", dist.Normal(mean, NOISE), obs=y)
        return mean

    return model


def moved(net: nn.Module) -> dict[str, Tensor]:
    """Values of the parameters a step away from those in the network."""
    generator = torch.Generator().manual_seed(3)
    return {
        name: p.detach() + 0.2 * torch.randn(p.shape, generator=generator).to(p)
        for name, p in net.named_parameters()
    }


def fitted(
    net: nn.Module,
    x: Tensor,
    body: Body = called,
    *,
    in_plate: bool = False,
    **options: Any,
) -> AutoSubnetMultivariateNormal:
    """The posterior at :func:`moved`, where the network itself is not."""
    bnn = bayesianize(net)
    model = model_of(bnn, body, in_plate=in_plate)
    init = init_to_value(values=moved(net))
    y = torch.zeros(len(x), dtype=next(net.parameters()).dtype)
    guide = AutoSubnetLaplace(model, init_loc_fn=init, **options)
    return guide.laplace_approximation(x, y)


def jacobian(plain: nn.Module, x: Tensor, body: Body = called) -> Tensor:
    """J in float64, (N, D), of a network of the same weights without shortcuts."""
    values = {name: value.double() for name, value in moved(plain).items()}
    plain = deepcopy(plain).double()
    x = x.double() if x.is_floating_point() else x

    def outputs(packed: Tensor) -> Tensor:
        pieces = packed.split([value.numel() for value in values.values()])
        weights = {
            name: piece.view(value.shape)
            for (name, value), piece in zip(values.items(), pieces, strict=True)
        }

        def net(*args: Tensor) -> Tensor:
            return torch.func.functional_call(plain, weights, args)

        return body(net, x)

    packed = torch.cat([value.flatten() for value in values.values()])
    return dense_jacobian(outputs, packed)


def precision(plain: nn.Module, x: Tensor, body: Body = called) -> Tensor:
    """The posterior precision under standard normal priors, float64."""
    jac = jacobian(plain, x, body)
    return jac.mT @ jac / NOISE**2 + torch.eye(jac.shape[-1]).double()
