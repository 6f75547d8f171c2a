"""What does not fit in memory is refused with its size, whoever sets the limit."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from pyro_subnet import AutoSubnetLaplace
from pyro_subnet.exceptions import MemoryLimitError
from pyro_subnet.selection import RandomSubnet
from pyro_subnet.tensors.memory import available_bytes, cgroup_bytes

CPU = torch.device("cpu")
GIB = 2**30


def linear(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(x.new_zeros(x.shape[1]), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)


def classes(count: int) -> Callable[..., None]:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        zeros = x.new_zeros(x.shape[1], count)
        w = pyro.sample("w", dist.Normal(zeros, 1.0).to_event(2))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(logits=x @ w), obs=y)

    return model


@pytest.fixture
def process_limit() -> Iterator[Callable[[int], None]]:
    """Sets how many bytes more the process may address."""
    before = resource.getrlimit(resource.RLIMIT_AS)

    def limit(more: int) -> None:
        used = psutil.Process().memory_info().vms
        resource.setrlimit(resource.RLIMIT_AS, (used + more, before[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_AS, before)


def test_the_limit_of_the_process_counts(process_limit: Callable[[int], None]) -> None:
    free = available_bytes(CPU)
    process_limit(GIB)
    assert 0 < available_bytes(CPU) <= min(free, GIB)


def group(root: Path, folder: str, **files: str) -> None:
    path = root / folder
    path.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (path / name.replace("__", ".")).write_text(text)


def test_cgroups_of_version_2_count_with_those_above_them(tmp_path: Path) -> None:
    group(tmp_path, "proc/self", cgroup="0::/pod/box\n")
    base = "sys/fs/cgroup"
    group(tmp_path, base)
    group(
        tmp_path,
        f"{base}/pod",
        memory__max="1000\n",
        memory__current="400\n",
        memory__stat="anon 300\ninactive_file 100\n",
    )
    group(
        tmp_path,
        f"{base}/pod/box",
        memory__max="max\n",
        memory__current="400\n",
        memory__stat="",
    )
    assert cgroup_bytes(tmp_path) == [700]


def test_cgroups_of_version_1_under_a_path_that_the_container_has_not(
    tmp_path: Path,
) -> None:
    group(tmp_path, "proc/self", cgroup="5:cpu,cpuacct:/a\n4:memory:/docker/ab\n")
    group(
        tmp_path,
        "sys/fs/cgroup/memory",
        **{
            "memory__limit_in_bytes": "900",
            "memory__usage_in_bytes": "500",
            "memory__stat": "total_inactive_file 50",
        },
    )
    assert cgroup_bytes(tmp_path) == [450]


def test_no_cgroups_are_no_limit(tmp_path: Path) -> None:
    assert cgroup_bytes(tmp_path) == []
    group(tmp_path, "proc/self", cgroup="0::/\n")
    assert cgroup_bytes(tmp_path) == []


def read(name: str) -> Callable[[Any], Tensor]:
    return lambda posterior: getattr(posterior.get_posterior(), name)


@pytest.mark.parametrize("form", ["dual", "primal"])
@pytest.mark.parametrize(
    "use",
    [
        read("precision_matrix"),
        read("covariance_matrix"),
        read("scale_tril"),
        lambda posterior: posterior.ggn(),
        lambda posterior: posterior.hybrid_model().nuts(),
    ],
)
def test_dense_matrices_are_refused(
    use: Callable[[Any], Tensor], form: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(3, 500)
    posterior = AutoSubnetLaplace(linear, form=form).laplace_approximation(x, x[:, 0])
    free = SimpleNamespace(available=900_000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    with pytest.raises(MemoryLimitError, match=r"got S=500, .*900000 bytes"):
        use(posterior)


@pytest.mark.filterwarnings("ignore::pyro_subnet.exceptions.UntrainedWarning")
def test_a_kernel_is_refused_where_the_primal_form_fits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = torch.randn(400, 2)
    free = SimpleNamespace(available=2_000_000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    with pytest.raises(MemoryLimitError, match=r"got R=400 and S=2, which .*'primal'"):
        AutoSubnetLaplace(linear, form="dual").laplace_approximation(x, x[:, 0])
    fitted = AutoSubnetLaplace(linear, form="primal").laplace_approximation(x, x[:, 0])
    expected = x.T @ x + torch.eye(2)
    assert_close(fitted.get_posterior().precision_matrix, expected)


def test_draws_of_many_classes_do_not_repeat_factors(
    dtype: torch.dtype, process_limit: Callable[[int], None]
) -> None:
    """10 inputs, 100 classes, 1,000 draws: 8 MB of draws, 800 MB of factors."""
    x, y = torch.randn(10, 4, dtype=dtype), torch.randint(100, (10,))
    guide = AutoSubnetLaplace(classes(100), RandomSubnet(10, seed=0))
    posterior = guide.laplace_approximation(x, y)
    posterior.predictive_distribution(x, link="mc", num_samples=2)  # what a call loads
    outputs = posterior.output_distribution(x)
    process_limit(300 * 2**20)
    found = posterior.predictive_distribution(x, link="mc", num_samples=1000).probs
    z = torch.randn(1000, 10, 100, 1, dtype=dtype)
    draws = [outputs.loc + (outputs.scale_tril @ one).squeeze(-1) for one in z]
    each = torch.stack(draws).softmax(-1)
    error = each.std(0) / 1000**0.5
    assert bool(((found - each.mean(0)).abs() <= 8 * error + 1e-6).all())


def test_draws_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = torch.randn(10, 4), torch.randint(100, (10,))
    guide = AutoSubnetLaplace(classes(100), RandomSubnet(10, seed=0))
    posterior = guide.laplace_approximation(x, y)
    free = SimpleNamespace(available=10**8)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    with pytest.raises(MemoryLimitError, match=r"got num_samples=20000 of \(10, 100\)"):
        posterior.predictive_distribution(x, link="mc", num_samples=20_000)


def test_roots_of_output_hessians_that_do_not_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, y = torch.randn(30, 2), torch.randint(1000, (30,))
    guide = AutoSubnetLaplace(classes(1000), RandomSubnet(3, seed=0), form="dual")
    free = SimpleNamespace(available=10**8)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    message = r"got 30 of C=1000 at site 'y', which .*in smaller batches"
    with pytest.raises(MemoryLimitError, match=message):
        guide.laplace_approximation(x, y)
