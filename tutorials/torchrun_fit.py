"""A posterior over all weights of a digits network, fitted by several processes.

Each rank that torchrun starts trains on a part of the digits, under
``DistributedDataParallel``, and fits on the same part. All end with the posterior that
one process makes of all digits, which rank 0 then makes to compare::

    torchrun --nproc-per-node=2 tutorials/torchrun_fit.py

Data: scikit-learn's digits, 1,797 images of 8 x 8 pixels (Alpaydin and Kaynak, 1998).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
import torch.distributed as td
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Subset, TensorDataset

from pyro_subnet import AutoSubnetLaplace, AutoSubnetMultivariateNormal
from pyro_subnet.nn import bayesianize, init_to_module

NUM_EPOCHS = 10
SUBNET = 0.05
# What the two may differ by, relative to the largest entry: float32's rounding.
MOST_APART = 1e-4


def load() -> TensorDataset:
    """All digits, pixels in [0, 1]."""
    images, labels = load_digits(return_X_y=True)
    return TensorDataset(torch.from_numpy(images / 16).float(), torch.tensor(labels))


def train(net: nn.Module, loader: DataLoader[Any]) -> None:
    """Trains one network on every rank: gradients are averaged over ranks."""
    parallel = DistributedDataParallel(net)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(NUM_EPOCHS):
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(parallel(x), y).backward()
            optimizer.step()


def make_model(net: nn.Module) -> Callable[..., None]:
    """The network as a Pyro model, with N(0, 1) priors."""
    bnn = bayesianize(net)

    def model(x: Tensor, y: Tensor | None = None) -> None:
        logits = bnn(x)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(logits=logits), obs=y)

    return model


def compared(
    posterior: AutoSubnetMultivariateNormal, alone: AutoSubnetMultivariateNormal
) -> float:
    """How far two precisions are apart, relative to the largest entry."""
    first, second = (p.get_posterior().precision_matrix for p in (posterior, alone))
    return float((first - second).abs().max() / second.abs().max())


def main() -> None:
    td.init_process_group("gloo")  # "nccl" where each rank has a GPU
    rank, size = td.get_rank(), td.get_world_size()
    torch.manual_seed(0)
    dataset = load()
    # Each of the data on one rank: `DistributedSampler` would repeat some of them.
    part = Subset(dataset, range(rank, len(dataset), size))
    net = nn.Sequential(nn.Linear(64, 50), nn.ReLU(), nn.Linear(50, 10))
    # As many batches on every rank, which training needs and a fit does not.
    train(net, DataLoader(part, batch_size=32, shuffle=True, drop_last=True))
    guide = AutoSubnetLaplace(
        make_model(net), subnet=SUBNET, init_loc_fn=init_to_module(net)
    )
    start = time.perf_counter()
    posterior = guide.laplace_approximation_from(
        DataLoader(part, batch_size=256), process_group=True
    )
    seconds = time.perf_counter() - start
    if rank == 0:
        alone = guide.laplace_approximation(*dataset.tensors)
        apart = compared(posterior, alone)
        seen = posterior.state.num_seen
        print(posterior)
        print(f"{size} ranks saw {seen} of {len(dataset)} digits in {seconds:.1f} s")
        print(f"one process: the same weights, precision {apart:.0e} apart")
        if not torch.equal(posterior.subnet.flat, alone.subnet.flat):
            raise SystemExit("the ranks chose other weights than one process")
        if apart > MOST_APART:
            raise SystemExit(f"the posteriors are {apart:.1e} apart")
    td.barrier()
    td.destroy_process_group()


if __name__ == "__main__":
    main()
