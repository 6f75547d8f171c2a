"""Small posteriors as ArviZ takes them, whose answers are known in closed form.

``python -m tests.export.posteriors FOLDER`` writes them there as netCDF files, for an
environment that has ArviZ and no torch. Each latent function is linear in what is
random: constant data hold its ``features``, those at the MAP.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
import xarray
from pyro.infer import MCMC
from pyro.infer.autoguide.initialization import init_to_value
from torch import Tensor

from pyro_subnet import AutoSubnetLaplace, from_hybrid_mcmc, to_inference_data
from tests.export.known import FEATURES, KINDS, NOISE, NUM_DATA, NUM_DRAWS, WIDTHS

DOUBLE = torch.float64
NAMES = {
    "dims": {"y": ["patient"], "x": ["patient", "feature"], "w": ["feature"]},
    "coords": {"feature": FEATURES},
}


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=DOUBLE)


def linear(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(zeros(3), 1.0).to_event(1))
    b = pyro.sample("b", dist.Normal(zeros(), 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w + b, NOISE), obs=y)


def ridge(features: Tensor, y: Tensor) -> Tensor:
    """The MAP under standard normal priors."""
    precision = features.mT @ features + NOISE**2 * torch.eye(features.shape[1])
    return torch.linalg.solve(precision, features.mT @ y)


def data() -> tuple[Tensor, Tensor]:
    x = torch.randn(NUM_DATA, 3, dtype=DOUBLE)
    noise = NOISE * torch.randn(NUM_DATA, dtype=DOUBLE)
    return x, x[:, 0].tanh() - 0.5 * x[:, 1] + 0.2 + noise


def with_features(data: Any, features: Tensor) -> Any:
    """The same, with what the oracles start from."""
    array = xarray.DataArray(features.numpy(), dims=("row", "column"))
    data["constant_data"]["features"] = array
    return data


def of_linear_model(x: Tensor, y: Tensor) -> dict[str, Any]:
    """All of it random: Laplace, and two chains of NUTS, under the user's names."""
    features = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
    at_map = ridge(features, y)
    at = init_to_value(values={"w": at_map[:3], "b": at_map[3]})
    posterior = AutoSubnetLaplace(linear, None, init_loc_fn=at)
    posterior = posterior.laplace_approximation(x, y)
    hybrid = posterior.hybrid_model()
    with warnings.catch_warnings():
        # With two cores Pyro runs one chain after the other, and says so.
        warnings.filterwarnings("ignore", message="num_chains=2 is more than")
        mcmc = MCMC(
            hybrid.nuts(),
            num_samples=150,
            warmup_steps=30,
            num_chains=2,
            initial_params=hybrid.initial_params(2),
            disable_progbar=True,
        )
        mcmc.run(x, y)
    options: dict[str, Any] = {"num_samples": NUM_DRAWS, "chains": 4, "seed": 1}
    as_nuts: dict[str, Any] = {"num_samples": 300, "chains": 2, "seed": 1}
    both = {
        "linear": to_inference_data(
            posterior, x, y, predictions_args=(x[:5],), **options, **NAMES
        ),
        "elements": to_inference_data(posterior, x, y, prior=False, **options),
        "as many as nuts": to_inference_data(posterior, x, y, **as_nuts, **NAMES),
        "nuts": from_hybrid_mcmc(mcmc, hybrid, x, y, seed=1, **NAMES),
    }
    return {name: with_features(each, features) for name, each in both.items()}


def of_network(x: Tensor, y: Tensor, width: int) -> Any:
    """A network whose hidden layer is held, so that it is linear in the others."""

    def model(x: Tensor, y: Tensor | None = None) -> None:
        u = pyro.sample("u", dist.Normal(zeros(3, width), 1.0).to_event(2))
        v = pyro.sample("v", dist.Normal(zeros(width), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal((x @ u).tanh() @ v, NOISE), obs=y)

    hidden = torch.randn(3, width, dtype=DOUBLE)
    features = (x @ hidden).tanh()
    at = init_to_value(values={"u": hidden, "v": ridge(features, y)})
    guide = AutoSubnetLaplace(model, {"v": torch.arange(width)}, init_loc_fn=at)
    posterior = guide.laplace_approximation(x, y)
    found = to_inference_data(posterior, x, y, num_samples=NUM_DRAWS, chains=4, seed=1)
    return with_features(found, features)


def of_classes(x: Tensor) -> Any:
    """Three classes, about which the weights know something."""

    def model(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(zeros(3, 3), 1.0).to_event(2))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(logits=x @ w), obs=y)

    y = (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long()
    posterior = AutoSubnetLaplace(model, None).laplace_approximation(x, y)
    labels: dict[str, Any] = {
        "dims": {"w": ["feature", "kind"]},
        "coords": {"feature": FEATURES, "kind": KINDS},
    }
    return to_inference_data(posterior, x, y, num_samples=400, seed=1, **labels)


def made() -> dict[str, Any]:
    """All of them, by name; the same each time."""
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    x, y = data()
    networks = {f"width {width}": of_network(x, y, width) for width in WIDTHS}
    return {**of_linear_model(x, y), **networks, "classes": of_classes(x)}


def main(folder: str) -> None:
    for name, each in made().items():
        each.to_netcdf(str(Path(folder) / f"{name}.nc"))


if __name__ == "__main__":
    main(sys.argv[1])
