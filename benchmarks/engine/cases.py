"""What is measured: one case for each row of figures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from benchmarks.engine import networks

Work = Literal["fit-predict", "predict", "prior-tuning", "selection", "draws"]

LAPLACE_TORCH = ("CurvlinopsGGN", "AsdlGGN", "BackPackGGN")  # first: its default
NOISE_SCALE = 0.3
NUM_DRAWS = 1000
PRIOR_SCALES = torch.logspace(-2, 2, 100)
WARM_UP_DATA, WARM_UP_SUBNET = 2, 64
SEED = 0


@dataclass(frozen=True)
class Target:
    """Least ratios to reach, theirs over ours, and the most memory of ours in GB.

    ``default_fit`` is held against laplace-torch's default backend, the others against
    its best.
    """

    fit: float | None = None
    predict: float | None = None
    memory: float | None = None
    default_fit: float | None = None


@dataclass(frozen=True)
class Case:
    """One piece of work for both sides.

    Attributes:
        name: What the command line calls it.
        network: Builds the network, untrained.
        input_shape: Shape of one input.
        num_outputs: C.
        subnet_size: S.
        num_data: N of the fit.
        num_predict: Inputs of the prediction.
        target: The figures to reach.
        work: What is done, and so what is compared.
        likelihood: laplace-torch's word for it.
        backends: What ours is compared with; none for a case that only ours can do.
        batch_sizes: Those tried with laplace-torch.
        trial_size: Data of the trial that chooses the batch size, and all the data of
            a backend that is too slow for more.
        our_batch_size: Inputs of one of our predictions; all of them if None.
        prior_precision: 1 / squared scale of the prior.
        tolerance: How far apart the two sides' numbers may be.
        memory_limit: GB that a process may take.
        by_default: Whether it is measured when no case is named.
    """

    name: str
    network: Callable[[], nn.Module]
    input_shape: tuple[int, ...]
    num_outputs: int
    subnet_size: int
    num_data: int
    num_predict: int
    target: Target = Target()
    work: Work = "fit-predict"
    likelihood: Literal["classification", "regression"] = "classification"
    backends: tuple[str, ...] = LAPLACE_TORCH
    batch_sizes: tuple[int, ...] = (8, 32, 128)
    trial_size: int = 128
    our_batch_size: int | None = None
    prior_precision: float = 1.0
    tolerance: float = 1e-3
    memory_limit: float = 14.0
    by_default: bool = True

    def smaller(self, num_data: int) -> Case:
        """The case with at most that many data, to try it out."""
        return replace(
            self,
            num_data=min(self.num_data, num_data),
            num_predict=min(self.num_predict, num_data),
            trial_size=min(self.trial_size, num_data),
        )

    def subnet(self, num_params: int) -> Tensor:
        """A random scattered subnet: ascending positions in the flattened weights."""
        generator = torch.Generator().manual_seed(SEED + 3)
        shuffled = torch.randperm(num_params, generator=generator)
        return shuffled[: self.subnet_size].sort().values


_MNIST, _CIFAR = (1, 28, 28), (3, 32, 32)

_CNN = Case(
    name="cnn",
    network=networks.cnn,
    input_shape=_MNIST,
    num_outputs=10,
    subnet_size=2000,
    num_data=1000,
    num_predict=1000,
    target=Target(7, 6, 1.0),
)
_RESNET = Case(
    name="resnet18-batchnorm",
    network=networks.resnet18_batchnorm,
    input_shape=_CIFAR,
    num_outputs=10,
    subnet_size=1000,
    num_data=16,
    num_predict=16,
    target=Target(10, 30, 1.5),
    batch_sizes=(1, 4, 16),
    trial_size=8,
)
_TRANSFORMER = Case(
    name="transformer",
    network=networks.transformer,
    input_shape=(32, 128),
    num_outputs=10,
    subnet_size=2000,
    num_data=128,
    num_predict=128,
    backends=("CurvlinopsGGN",),
    batch_sizes=(8, 32),
    trial_size=32,
)

_ALL = (
    Case(
        name="mlp-regression",
        network=networks.mlp_regression,
        input_shape=(1,),
        num_outputs=1,
        subnet_size=1000,
        num_data=1000,
        num_predict=1000,
        target=Target(1, 1),
        likelihood="regression",
        batch_sizes=(32, 128, 1000),
        trial_size=1000,
    ),
    Case(
        name="mlp-classes",
        network=networks.mlp_classes,
        input_shape=_MNIST,
        num_outputs=10,
        subnet_size=2000,
        num_data=1000,
        num_predict=1000,
        target=Target(10, 12, 1.0),
    ),
    Case(
        name="lenet",
        network=networks.lenet,
        input_shape=_MNIST,
        num_outputs=10,
        subnet_size=2000,
        num_data=1000,
        num_predict=1000,
        target=Target(4, 5, 1.0),
    ),
    _CNN,
    _RESNET,
    replace(
        _RESNET,
        name="resnet18-groupnorm",
        network=networks.resnet18_groupnorm,
        target=Target(25, 25, 1.5),
        batch_sizes=(1, 4),
    ),
    _TRANSFORMER,
    replace(_TRANSFORMER, name="lstm", network=networks.lstm, input_shape=(50, 64)),
    replace(
        _TRANSFORMER,
        name="vit-small",
        network=networks.vit_small,
        input_shape=_CIFAR,
        num_data=8,
        num_predict=8,
        batch_sizes=(1, 4),
        trial_size=4,
    ),
    replace(
        _TRANSFORMER,
        name="adapters",
        network=networks.vit_adapters,
        input_shape=_CIFAR,
        subnet_size=6144,
        num_data=32,
        num_predict=32,
        backends=(),
    ),
    replace(
        _CNN,
        name="cnn-predict",
        work="predict",
        subnet_size=5000,
        num_data=64,
        num_predict=512,
        our_batch_size=128,
        target=Target(predict=20),
    ),
    Case(
        name="prior-tuning",
        work="prior-tuning",
        network=networks.mlp_classes,
        input_shape=_MNIST,
        num_outputs=10,
        subnet_size=2000,
        num_data=200,
        num_predict=1,
        target=Target(fit=10),
        backends=("100 steps", "100 values"),
        batch_sizes=(128,),
    ),
    replace(
        _RESNET,
        name="largest-variance",
        work="selection",
        target=Target(fit=1, memory=2.0, default_fit=20),
        prior_precision=1e-2,
    ),
    replace(
        _CNN,
        name="linearized-predictive",
        work="draws",
        num_data=200,
        num_predict=500,
        target=Target(predict=20),
        backends=("Pyro",),
        batch_sizes=(500,),
        trial_size=500,
        prior_precision=1e4,
        tolerance=0.2,
    ),
    replace(
        _RESNET,
        name="paper-size",
        subnet_size=42_438,
        num_data=200,
        num_predict=200,
        target=Target(memory=16.0),
        backends=(),
        memory_limit=20.0,
        by_default=False,
    ),
    replace(
        _RESNET,
        name="large-factor",
        subnet_size=100_000,
        num_data=200,
        num_predict=200,
        target=Target(),
        backends=(),
        memory_limit=100.0,
        by_default=False,
    ),
    Case(
        name="toy",
        network=networks.toy,
        input_shape=(4,),
        num_outputs=3,
        subnet_size=25,
        num_data=30,
        num_predict=7,
        batch_sizes=(8, 32),
        by_default=False,
    ),
)
CASES = {case.name: case for case in _ALL}
