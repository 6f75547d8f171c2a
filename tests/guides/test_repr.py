"""What guides and posteriors say of themselves."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_subnet import AutoSubnetLaplace, AutoSubnetMultivariateNormal, Subnet
from pyro_subnet.selection import LargestVariance, RandomSubnet
from tests.files.test_hostile_files import listed, read, seal


def model(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(x.new_zeros(4), 1.0).to_event(1))
    b = pyro.sample("b", dist.Normal(x.new_zeros(()), 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w + b, 0.5), obs=y)


def test_each_says_what_it_holds() -> None:
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    guide = AutoSubnetLaplace(model, RandomSubnet(2, seed=1), curvature="ef")
    assert "not called yet" in repr(guide)
    posterior = guide.laplace_approximation(x, y)
    assert "MAP of 5 weights at 2 sites" in repr(guide)
    assert "RandomSubnet(size=2, seed=1" in repr(guide)
    assert "'ef'" in repr(guide)
    for part in (
        "2 of 5 weights (40.00%)",
        "curvature 'ef', covariance 'full', held in primal form",
        "prior precision times 1, noise times 1",
    ):
        assert part in repr(posterior)
    assert "S=2" in repr(posterior.get_posterior())
    assert "float64" in repr(posterior.get_posterior())


def test_factors_share_and_form_are_told() -> None:
    x, y = torch.randn(6, 4), torch.randn(6)
    posterior = AutoSubnetLaplace(model, 2).laplace_approximation(x, y)
    assert "of the output variance" in repr(posterior)
    by_site = posterior.with_prior_precision({"w": 3.0})
    assert "prior precision times 3 at w" in repr(by_site)
    assert "noise times 2.5" in repr(posterior.with_noise_scale(2.5))
    tuned = posterior.tune_prior_precision()
    scale = f"{tuned.prior_factor:.4g}"
    told = f"prior precision times {scale} (by evidence), noise times 1\n"
    assert told in repr(tuned)
    diagonal = AutoSubnetLaplace(model, covariance="diag").laplace_approximation(x, y)
    assert "held in diagonal form" in repr(diagonal)
    assert "all weights" in repr(AutoSubnetLaplace(model))


@dataclass(frozen=True)
class FirstWeight:
    """A selector of the user's own, which is none of ours."""

    site: str = "w"

    def __call__(self, guide: Any, data: Any) -> Subnet:
        return first_weight(guide, data)


class Nameless:
    """One without a repr of its own."""

    def __call__(self, guide: Any, data: Any) -> Subnet:
        return first_weight(guide, data)


def first_weight(guide: Any, data: Any) -> Subnet:
    return Subnet.from_positions(guide.latents.layout, torch.tensor([0]))


CHOSEN_BY: dict[str, tuple[Any, str]] = {
    "all": (None, "all weights"),
    "a selector": (LargestVariance(2, keep_dead=False), "(2, keep_dead=False)"),
    "another option": (RandomSubnet(3, seed=1), "RandomSubnet(3, seed=1)"),
    "a mapping": ({"w": torch.tensor([1])}, "Mask({'w': tensor([1])})"),
    "a user's class": (FirstWeight(), "FirstWeight(site='w')"),
    "a user's class without a repr": (Nameless(), "Nameless"),
    "a function": (first_weight, "the function first_weight"),
}


@pytest.mark.parametrize("name", CHOSEN_BY)
def test_what_chose_the_subnet_is_told(name: str) -> None:
    chosen_by, said = CHOSEN_BY[name]
    x, y = torch.randn(6, 4), torch.randn(6)
    posterior = AutoSubnetLaplace(model, chosen_by).laplace_approximation(x, y)
    (line,) = (row for row in repr(posterior).splitlines() if "  subnet: " in row)
    assert line.endswith(said)


@pytest.mark.parametrize("count", [1, 6])
def test_the_data_that_were_seen_are_told(count: int) -> None:
    x, y = torch.randn(count, 4), torch.randn(count)
    guide = AutoSubnetLaplace(model)
    posterior = guide.laplace_approximation(x, y)
    assert f"data seen: {count}\n" in f"{posterior}\n"
    batches = [(x, y)] * 3
    guide(x, y)
    in_batches = guide.laplace_approximation_from(batches)
    assert f"data seen: {3 * count}" in repr(in_batches)
    of_more = guide.laplace_approximation_from(batches, num_data=100)
    assert f"data seen: {3 * count}" in repr(of_more)
    assert f"data seen: {2 * count}" in repr(posterior.update(x, y, forgetting=0.5))
    assert f"data seen: {count}" in repr(posterior.tune_prior_precision())


def test_data_that_plates_do_not_count_are_not_told() -> None:
    def of_two_lengths(x: Tensor, y: Tensor, z: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(x.new_zeros(4), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(x @ w, 0.5).to_event(1), obs=y)
        pyro.sample("z", dist.Normal(w, 0.5).to_event(1), obs=z)

    args = torch.randn(6, 4), torch.randn(6), torch.randn(4)
    posterior = AutoSubnetLaplace(of_two_lengths).laplace_approximation(*args)
    assert "data seen" not in repr(posterior)
    assert "data seen" not in repr(posterior.update(*args))


def test_both_come_back_from_a_file_and_are_left_out_of_an_older_one(
    tmp_path: Path,
) -> None:
    x, y = torch.randn(6, 4), torch.randn(6)
    path = tmp_path / "posterior"
    guide = AutoSubnetLaplace(model, RandomSubnet(2, seed=1))
    posterior = guide.laplace_approximation(x, y)
    posterior.save(path)
    load = AutoSubnetMultivariateNormal.load
    assert repr(load(path, model, x, y)) == repr(posterior)
    tensors, content = read(path)
    del content["chosen_by"], content["num_seen"]
    seal(path, tensors, listed(tensors, content))
    older = repr(load(path, model, x, y))
    assert "subnet:" not in older
    assert "data seen" not in older
    kept = [line for line in repr(posterior).splitlines() if line in older]
    assert older == "\n".join(kept)
    assert "data seen" not in repr(load(path, model, x, y).update(x, y))
