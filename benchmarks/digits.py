"""The quickstart's network: this package, laplace-torch and Pyro's own Laplace guide.

One network on scikit-learn's digits (64-50-50-10, D = 6,310), trained once; the same
subnet of 316 weights, prior and data for both libraries, each in a process of its own,
in turns. Of laplace-torch every backend that fits subnets is run, in batches of 128,
which is where it is fast. Pyro's guide has no subnets: it is asked for all weights,
once.

    python benchmarks/digits.py [--pairs 3]

Prints medians, the median of the pairs' ratios (theirs over ours), and how far the
precisions and predictive variances are apart; exits with an error if that is more than
1e-3 of the largest entry.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from laplace import Laplace, curvature
from pyro.infer.autoguide import AutoLaplaceApproximation
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pyro_subnet import AutoSubnetLaplace
from pyro_subnet.nn import bayesianize, init_to_module
from pyro_subnet.selection import RandomSubnet

SUBNET_SIZE = 316  # 5%
NUM_TRAIN, NUM_TEST = 1078, 360
BATCH_SIZE = 128
BACKENDS = (
    "CurvlinopsGGN",
    "AsdlGGN",
    "BackPackGGN",
)  # laplace-torch's; first: default
AGREEMENT = 1e-3  # of the largest entry, float32 on both sides

Model = Callable[..., None]
Result = dict[str, Any]


def digits() -> tuple[Tensor, Tensor, Tensor]:
    """Training images and labels, and test images, in a shuffled order."""
    bunch = load_digits()
    order = torch.randperm(len(bunch.target), generator=torch.manual_seed(0))
    x = torch.from_numpy(bunch.data).float()[order] / 16
    y = torch.from_numpy(bunch.target)[order]
    return x[:NUM_TRAIN], y[:NUM_TRAIN], x[NUM_TRAIN : NUM_TRAIN + NUM_TEST]


def make_network() -> nn.Module:
    return nn.Sequential(
        nn.Linear(64, 50), nn.ReLU(), nn.Linear(50, 50), nn.ReLU(), nn.Linear(50, 10)
    )


def trained_network() -> nn.Module:
    """A network at (close to) the MAP under N(0, 1) priors."""
    torch.manual_seed(0)
    net = make_network()
    x, y, _ = digits()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02, weight_decay=1 / len(x))
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.997)
    for _ in range(1000):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
        schedule.step()
    return net.eval()


def pyro_model(net: nn.Module) -> Model:
    bnn = bayesianize(net)

    def model(x: Tensor, y: Tensor | None = None) -> None:
        logits = bnn(x)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(logits=logits), obs=y)

    return model


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    value = function()
    return time.perf_counter() - start, value


def ours(net: nn.Module) -> Result:
    x, y, x_test = digits()
    guide = AutoSubnetLaplace(
        pyro_model(net), RandomSubnet(SUBNET_SIZE), init_loc_fn=init_to_module(net)
    )
    guide(x, y)
    fit, posterior = timed(lambda: guide.laplace_approximation(x, y))
    predict, outputs = timed(lambda: posterior.output_distribution(x_test))
    return {
        "fit": fit,
        "predict": predict,
        "precision": posterior.get_posterior().precision_matrix,
        "variance": outputs.covariance_matrix,
    }


def laplace_torch(net: nn.Module, backend: str) -> Result:
    x, y, x_test = digits()
    guide = AutoSubnetLaplace(
        pyro_model(net), RandomSubnet(SUBNET_SIZE), init_loc_fn=init_to_module(net)
    )
    # Sites come in the order of `parameters_to_vector`: positions are the same.
    indices = guide.laplace_approximation(x[:2], y[:2]).subnet.flat
    theirs = Laplace(
        net,
        "classification",
        subset_of_weights="subnetwork",
        hessian_structure="full",
        subnetwork_indices=indices,
        prior_precision=1.0,
        backend=getattr(curvature, backend),
    )
    loader = DataLoader(TensorDataset(x, y), batch_size=BATCH_SIZE)
    fit, _ = timed(lambda: theirs.fit(loader))
    predict, parts = timed(
        lambda: [
            theirs._glm_predictive_distribution(part)
            for part in x_test.split(BATCH_SIZE)
        ]
    )
    loc, variance = (torch.cat(part) for part in zip(*parts, strict=True))
    # Their logits are raw, ours log-probabilities: softmax is blind to the difference.
    shift = torch.eye(10) - loc.softmax(-1).unsqueeze(-2)
    return {
        "fit": fit,
        "predict": predict,
        "precision": theirs.posterior_precision,
        "variance": shift @ variance @ shift.mT,
    }


def pyro_guide(net: nn.Module) -> Result:
    x, y, _ = digits()
    guide = AutoLaplaceApproximation(pyro_model(net), init_loc_fn=init_to_module(net))
    guide(x, y)
    start = time.perf_counter()
    try:
        guide.laplace_approximation(x, y)
        outcome = "fitted"
    except torch.linalg.LinAlgError as error:
        outcome = str(error)
    return {"fit": time.perf_counter() - start, "outcome": outcome}


SIDES: dict[str, Callable[[nn.Module], Result]] = {
    "ours": ours,
    **{backend: partial(laplace_torch, backend=backend) for backend in BACKENDS},
    "pyro": pyro_guide,
}


def run_side(side: str, folder: Path) -> Result:
    """Runs one side in a process of its own."""
    command = [sys.executable, __file__, "--side", side, "--folder", str(folder)]
    subprocess.run(command, check=True)
    return torch.load(folder / f"{side}.pt")


def distance(ours: Result, theirs: Result) -> float:
    """Largest difference, relative to the largest entry."""
    return max(
        float((ours[key] - theirs[key]).abs().max() / theirs[key].abs().max())
        for key in ("precision", "variance")
    )


def report(backend: str, pairs: Sequence[tuple[Result, Result]]) -> float:
    """Prints one backend's rows; returns how far its numbers are from ours."""
    for key, unit in (("fit", "s"), ("predict", "s"), ("memory", "GB")):
        ours, theirs = (
            statistics.median(pair[side][key] for pair in pairs) for side in (0, 1)
        )
        ratio = statistics.median(theirs[key] / ours[key] for ours, theirs in pairs)
        print(f"{backend:15}{key:>9} {unit:3}{ours:9.3f}{theirs:9.3f}{ratio:8.1f}")
    return max(distance(*pair) for pair in pairs)


def compare(num_pairs: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.save(trained_network().state_dict(), folder / "net.pt")
        print(f"{'laplace-torch':28}{'ours':>9}{'theirs':>9}{'ratio':>8}", flush=True)
        apart = {}
        for backend in BACKENDS:
            pairs = [
                (run_side("ours", folder), run_side(backend, folder))
                for _ in range(num_pairs)
            ]
            apart[backend] = report(backend, pairs)
        whole = run_side("pyro", folder)
    print("apart: " + ", ".join(f"{key} {value:.1e}" for key, value in apart.items()))
    cost = f"{whole['fit']:.0f} s, {whole['memory']:.1f} GB"
    print(f"AutoLaplaceApproximation, all weights: {cost}, {whole['outcome']}")
    if max(apart.values()) > AGREEMENT:
        raise SystemExit("The two libraries disagree; see the lines above.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--side", choices=SIDES)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    if options.side is None:
        compare(options.pairs)
        return
    net = make_network()
    net.load_state_dict(torch.load(options.folder / "net.pt"))
    result = SIDES[options.side](net.eval())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    torch.save({**result, "memory": peak / 1e9}, options.folder / f"{options.side}.pt")


if __name__ == "__main__":
    main()
