"""A fit that ends early and is made again equals one that was never interrupted.

To the bit: both sum the same blocks in the same order.
"""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide.initialization import init_to_value
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from pyro_subnet import AutoSubnetLaplace
from pyro_subnet.curvature.ggn import dual_pays
from pyro_subnet.exceptions import (
    CheckpointError,
    NoKroneckerFactorsWarning,
    OptionError,
    PrecisionError,
)
from pyro_subnet.files.fingerprint import digest
from pyro_subnet.files.resume import KIND, FitCheckpoint
from pyro_subnet.files.safe_file import read_file
from pyro_subnet.fit.sums import FitSums
from pyro_subnet.selection import LargestVariance, RandomSubnet
from pyro_subnet.tracing.data import Data

N, BATCH, D, C = 11, 2, 12, 3  # six batches, the last of one observation
NUM_BATCHES = -(-N // BATCH)
X = torch.randn(N, 4, generator=torch.Generator().manual_seed(1)).double()
Y = torch.arange(N) % C
MAP = torch.randn(4, C, generator=torch.Generator().manual_seed(2)).double()
BATCHES = list(zip(X.split(BATCH), Y.split(BATCH), strict=True))
KINDS: dict[str, dict[str, Any]] = {
    "primal": {"form": "primal"},
    "dual": {"form": "dual"},
    "auto": {"form": "auto"},
    "ggn-mc": {"curvature": "ggn-mc"},
    "ggn-mc dual": {"curvature": "ggn-mc", "form": "dual"},
    "ef": {"curvature": "ef"},
    "hessian": {"curvature": "hessian"},
    "diag": {"covariance": "diag"},
    "kron": {"covariance": "kron"},
    "kron ggn-mc": {"covariance": "kron", "curvature": "ggn-mc"},
    "kron ef": {"covariance": "kron", "curvature": "ef"},
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def model(x: Tensor, y: Tensor | None = None) -> None:
    """Softmax regression: its exact Hessian is positive definite everywhere."""
    weight = pyro.sample("w", dist.Normal(x.new_zeros(4, C), 1.0).to_event(2))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Categorical(logits=x @ weight), obs=y)


def layered(x: Tensor, y: Tensor | None = None) -> None:
    """Two layers, whose weights have Kronecker factors, and shifts that have none."""
    first = pyro.sample("v", dist.Normal(x.new_zeros(5, 4), 1.0).to_event(2))
    last = pyro.sample("w", dist.Normal(x.new_zeros(C, 5), 1.0).to_event(2))
    shift = pyro.sample("b", dist.Normal(x.new_zeros(C), 1.0).to_event(1))
    hidden = nn.functional.linear(x, first).tanh()
    logits = nn.functional.linear(hidden, last) + shift.sin()
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Categorical(logits=logits), obs=y)


LAYERED_MAP = {
    "v": torch.arange(-2, 3).double()[:, None] * MAP[:, 0],
    "w": MAP.T[:, [0, 1, 2, 3, 0]] + 0.1,
    "b": MAP[0],
}


# Its choice is one pass over the data, before that of the fit.
CHOICE = LargestVariance(7)


def guide(subnet: Any = CHOICE, at: Tensor = MAP, **options: Any) -> AutoSubnetLaplace:
    """At the MAP; Kronecker factors are those of all weights of two layers."""
    if options.get("covariance") == "kron":
        init = init_to_value(values=LAYERED_MAP)
        return AutoSubnetLaplace(layered, init_loc_fn=init, **options)
    init = init_to_value(values={"w": at})
    return AutoSubnetLaplace(model, subnet, init_loc_fn=init, **options)


class Stop(Exception):
    """What ends a pass in the middle."""


class Loader:
    """Batches that end in an exception before one of them, in one pass of several."""

    def __init__(self, stop: int | None, ends: int = 0, batches: Any = None):
        self.stop, self.ends, self.passes = stop, ends, 0
        self.batches = BATCHES if batches is None else batches

    def __iter__(self) -> Iterator[Any]:
        this, self.passes = self.passes, self.passes + 1
        for i, batch in enumerate(self.batches):
            if this == self.ends and i == self.stop:
                raise Stop("stopped")
            yield batch
        if this == self.ends and self.stop == len(self.batches):
            raise Stop("stopped")


def identical(ours: Any, theirs: Any) -> None:
    assert_close(ours, theirs, rtol=0, atol=0)


def same(ours: Any, theirs: Any) -> None:
    """Every number of two posteriors, to the bit."""
    identical(dict(ours.named_buffers()), dict(theirs.named_buffers()))
    assert ours.form_name == theirs.form_name
    assert ours.options == theirs.options
    assert ours.explained_variance == theirs.explained_variance


def interrupt(made: AutoSubnetLaplace, loader: Loader, **options: Any) -> None:
    made(*BATCHES[0])  # set up, which is a pass of its own
    with pytest.raises(Stop, match="stopped"):
        made.laplace_approximation_from(loader, **options)


@functools.cache
def whole_fit() -> Any:
    """The fit without interruption that most are compared with."""
    return guide().laplace_approximation_from(BATCHES)


@each_kind
def test_ended_at_any_batch(kind: str, tmp_path: Path) -> None:
    options, path = KINDS[kind], tmp_path / "fit"
    if "dual" in kind:  # with a selector that is asked again
        options = {**options, "subnet": RandomSubnet(7)}
    kept: dict[str, Any] = {"checkpoint": path, "checkpoint_every": 4}
    pyro.set_rng_seed(5)
    whole = guide(**options).laplace_approximation_from(BATCHES)
    after = torch.get_rng_state()
    # Choosing by variance is a pass before that of the fit.
    ends = int("dual" not in kind and "kron" not in kind)
    for stop in range(NUM_BATCHES + 1):
        pyro.set_rng_seed(5)
        interrupt(guide(**options), Loader(stop, ends), **kept)
        pyro.set_rng_seed(5 if "mc" not in kind else 99)  # another process
        same(guide(**options).laplace_approximation_from(BATCHES, **kept), whole)
        identical(torch.get_rng_state(), after)
        assert not path.exists()


def test_kronecker_factors_are_held() -> None:
    """Of both layers; the fits above would be equal without any, too."""
    form = guide(**KINDS["kron"]).laplace_approximation_from(BATCHES).form
    held = set(form.tensors())
    assert "kronecker_block_1_output_values" in held
    assert "kronecker_block_2_output_values" not in held
    assert bool((form.tensors()["kronecker_ggn"] > 0).any())


class Runs(Loader):
    """Counts how often the model runs while it has a batch."""

    def __init__(self, batches: Any, stop: int | None = None):
        super().__init__(stop, batches=batches)
        self.runs, self.at = Counter[int](), -1

    def __iter__(self) -> Iterator[Any]:
        for self.at, batch in enumerate(super().__iter__()):
            yield batch

    def model(self, x: Tensor, y: Tensor | None = None) -> None:
        self.runs[self.at] += 1
        weight = pyro.sample("w", dist.Normal(x.new_zeros(22, C), 1.0).to_event(2))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(logits=x @ weight), obs=y)

    def fit(self, **options: Any) -> Any:
        start = {"w": torch.linspace(-1, 1, 22 * C).reshape(22, C).double()}
        made = AutoSubnetLaplace(self.model, init_loc_fn=init_to_value(values=start))
        made(*self.batches[0])  # set up, which is a pass of its own
        self.runs.clear()
        return made.laplace_approximation_from(self, **options)


@pytest.mark.parametrize("stop", range(NUM_BATCHES + 1))
@pytest.mark.parametrize("every", [1, 4])
def test_what_was_summed_is_not_summed_again(
    every: int, stop: int, tmp_path: Path
) -> None:
    """Rows become a matrix within the pass, before and after it is resumed."""
    size, rows = 22 * C, BATCH * C
    assert dual_pays(2 * rows, size, torch.float64)
    assert not dual_pays(3 * rows, size, torch.float64)
    x = torch.randn(N, 22, generator=torch.Generator().manual_seed(3)).double()
    batches = list(zip(x.split(BATCH), Y.split(BATCH), strict=True))
    assert Runs(batches[:2]).fit().form_name == "dual"
    kept: dict[str, Any] = {"checkpoint": tmp_path / "fit", "checkpoint_every": every}
    first = Runs(batches)
    # With a file of its own: without one a fit may look at its noise once more.
    whole = first.fit(checkpoint=tmp_path / "whole")
    assert whole.form_name == "primal"
    with pytest.raises(Stop, match="stopped"):
        Runs(batches, stop).fit(**kept)
    resumed = Runs(batches)
    same(resumed.fit(**kept), whole)
    # The last batch's sums are written when the next one is asked for.
    done = stop // every * every
    summed = {at: first.runs[at] for at in range(done, NUM_BATCHES)}
    assert all(summed.values())
    # Of the last one that was summed, the log likelihood alone is compared.
    compared = resumed.runs.pop(done - 1, 0)
    assert dict(resumed.runs) == summed
    assert (compared > 0) == (done > 0)
    assert compared < first.runs[0]


@each_kind
def test_ended_again_and_again(kind: str, tmp_path: Path) -> None:
    options = {"checkpoint": tmp_path / "fit", "checkpoint_every": 1, "num_data": 30}
    pyro.set_rng_seed(5)
    whole = guide(None, **KINDS[kind]).laplace_approximation_from(BATCHES, num_data=30)
    pyro.set_rng_seed(5)
    for stop in range(NUM_BATCHES + 1):
        interrupt(guide(None, **KINDS[kind]), Loader(stop), **options)
    again = guide(None, **KINDS[kind]).laplace_approximation_from(BATCHES, **options)
    same(again, whole)


def test_the_diagonal_sum(tmp_path: Path) -> None:
    """Below the guide: the sums themselves, as ``covariance='diag'`` holds them."""
    whole = curvature_of(Loader(None))
    for stop in range(NUM_BATCHES + 1):
        with pytest.raises(Stop, match="stopped"):
            curvature_of(Loader(stop), tmp_path / "fit")
        again = curvature_of(Loader(None), tmp_path / "fit")
        assert again.likelihood.form == whole.likelihood.form == "diagonal"
        identical(again.likelihood.ggn, whole.likelihood.ggn)
        identical(again.prior.tensors(), whole.prior.tensors())
        identical(again.summary.tensors(), whole.summary.tensors())
        (tmp_path / "fit").unlink()


def curvature_of(batches: Loader, path: Path | None = None) -> Any:
    made = guide(None, covariance="diag")
    made(*BATCHES[0])
    data, subnet = Data(batches, whole=False), made.latents.everything
    sums = FitSums(made.at_map, subnet, data, made.options)
    if path is None:
        return sums.over(data.calls("Sums"))
    file = FitCheckpoint.open(path, 2, made, made.options, (data, None))
    file.keep_subnet(subnet)
    return sums.over(file.calls(data, "Sums", sums))


def test_the_subnet_is_not_chosen_again(tmp_path: Path) -> None:
    options: dict[str, Any] = {"checkpoint": tmp_path / "fit"}
    interrupt(guide(), Loader(0, ends=1), **options)
    loader = Loader(None)
    made = guide()
    made(*BATCHES[0])
    posterior = made.laplace_approximation_from(loader, **options)
    assert loader.passes == 1
    same(posterior, whole_fit())


def test_a_dataloader_in_float32(tmp_path: Path) -> None:
    data = TensorDataset(X.float(), Y)
    init = init_to_value(values={"w": MAP.float()})

    def made() -> AutoSubnetLaplace:
        return AutoSubnetLaplace(model, CHOICE, init_loc_fn=init)

    whole = made().laplace_approximation_from(DataLoader(data, BATCH))
    kept: dict[str, Any] = {"checkpoint": tmp_path / "fit", "checkpoint_every": 2}
    stopped = Loader(5, ends=2, batches=DataLoader(data, BATCH))
    with pytest.raises(Stop, match="stopped"):
        made().laplace_approximation_from(stopped, **kept)
    same(made().laplace_approximation_from(DataLoader(data, BATCH), **kept), whole)


def test_a_fit_without_interruption_is_the_same(tmp_path: Path) -> None:
    path = str(tmp_path / "fit")
    kept = guide().laplace_approximation_from(BATCHES, checkpoint=path)
    same(kept, whole_fit())
    assert not os.listdir(tmp_path)


class Watching(Loader):
    """Notes, before each batch and after the last, which file is there."""

    def __init__(self, path: Path):
        super().__init__(None)
        self.path = path
        self.found: list[tuple[int, int, int] | None] = []

    def __iter__(self) -> Iterator[Any]:
        for batch in super().__iter__():
            self.look()
            yield batch
        self.look()

    def look(self) -> None:
        if not self.path.exists():
            self.found.append(None)
            return
        _, content = read_file(self.path, KIND)
        written = self.path.stat()  # another file each time it is written
        self.found.append((content["done"], written.st_ino, written.st_mtime_ns))


def test_it_is_written_when_it_says(tmp_path: Path) -> None:
    path = tmp_path / "fit"
    loader, made = Watching(path), guide()
    made(*BATCHES[0])
    made.laplace_approximation_from(loader, checkpoint=path, checkpoint_every=4)
    # Nothing before the subnet is chosen, which is a pass of its own.
    choosing, fitting = loader.found[: NUM_BATCHES + 1], loader.found[NUM_BATCHES + 1 :]
    assert choosing == [None] * (NUM_BATCHES + 1)
    assert [found and found[0] for found in fitting] == [0, 0, 0, 0, 4, 4, 4]
    assert len(set(fitting)) == 2


def test_a_fit_that_fails_keeps_its_file(tmp_path: Path) -> None:
    """A warning that ends it, after the pass, is allowed the second time."""

    def unlayered(x: Tensor, y: Tensor | None = None) -> None:
        weight = pyro.sample("w", dist.Normal(x.new_zeros(4, C), 1.0).to_event(2))
        logits = (x.unsqueeze(-1) * weight.sin()).sum(1)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(logits=logits), obs=y)

    path = tmp_path / "fit"
    kept: dict[str, Any] = {"checkpoint": path, "checkpoint_every": NUM_BATCHES}

    def fit(**options: Any) -> Any:
        init = init_to_value(values={"w": MAP})
        made = AutoSubnetLaplace(unlayered, init_loc_fn=init, covariance="kron")
        return made.laplace_approximation_from(BATCHES, **options)

    with pytest.raises(NoKroneckerFactorsWarning, match=r"got none \(no chosen site"):
        fit(**kept)
    _, content = read_file(path, KIND)
    assert content["done"] == NUM_BATCHES
    with pytest.warns(NoKroneckerFactorsWarning, match=r"got none \(no chosen site"):
        again = fit(**kept)
    assert not path.exists()
    with pytest.warns(NoKroneckerFactorsWarning, match=r"got none \(no chosen site"):
        same(again, fit())
    assert bool((again.ggn().diagonal() > 0).all())


def test_a_precision_that_fails_keeps_the_file(tmp_path: Path) -> None:
    """Below its data f = (x w)² bends so that -log p is concave there."""

    def bent(x: Tensor, y: Tensor) -> None:
        weight = pyro.sample("w", dist.Normal(x.new_zeros(4), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal((x @ weight).square(), 1.0), obs=y)

    path, batches = tmp_path / "fit", [(x, y + 100.0) for x, y in BATCHES]
    kept: dict[str, Any] = {"checkpoint": path, "checkpoint_every": NUM_BATCHES}
    init = init_to_value(values={"w": MAP[:, 0]})
    before = b""
    for _ in range(2):
        made = AutoSubnetLaplace(bent, init_loc_fn=init, curvature="hessian")
        with pytest.raises(PrecisionError, match="S=4 must be positive definite; got"):
            made.laplace_approximation_from(batches, **kept)
        _, content = read_file(path, KIND)
        assert content["done"] == NUM_BATCHES
        # What was summed is not written again, either.
        before = before or path.read_bytes()
        assert path.read_bytes() == before


# ----------------------------------------------------------------------------------
# Fits that are not the file's.


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    path = tmp_path / "fit"
    interrupt(guide(), Loader(5, ends=1), checkpoint=path, checkpoint_every=2)
    return path


def other_model(x: Tensor, y: Tensor | None = None) -> None:
    weight = pyro.sample("w", dist.Normal(x.new_zeros(4, C), 1.0).to_event(2))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Categorical(logits=2 * x @ weight), obs=y)


def other_prior(x: Tensor, y: Tensor | None = None) -> None:
    weight = pyro.sample("w", dist.Normal(x.new_zeros(4, C), 2.0).to_event(2))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Categorical(logits=x @ weight), obs=y)


def of_model(which: Callable[..., Any]) -> AutoSubnetLaplace:
    return AutoSubnetLaplace(
        which, CHOICE, init_loc_fn=init_to_value(values={"w": MAP})
    )


def renamed(x: Tensor, y: Tensor | None = None) -> None:
    weight = pyro.sample("v", dist.Normal(x.new_zeros(4, C), 1.0).to_event(2))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Categorical(logits=x @ weight), obs=y)


MOVED = [(x + 1e-9 * (i == 1), y) for i, (x, y) in enumerate(BATCHES)]
SWAPPED = [BATCHES[1], BATCHES[0], *BATCHES[2:]]


@pytest.mark.parametrize(
    ("make", "batches", "match"),
    [
        (lambda: guide(at=MAP + 1e-12), BATCHES, "The MAP must be as in the fit that"),
        (lambda: guide(LargestVariance(8)), BATCHES, "`subnet` must be as in the fit"),
        (lambda: guide(LargestVariance(7, "ef")), BATCHES, "`subnet` must be as in"),
        (lambda: guide(RandomSubnet(7)), BATCHES, "`subnet` must be as in the fit"),
        (lambda: guide(form="primal"), BATCHES, "`options` must be.*'auto'.*'primal'"),
        (lambda: guide(curvature="ef"), BATCHES, "`options` must be as in the fit"),
        (lambda: of_model(renamed), BATCHES, r"without 'w'.*delete the file"),
        (lambda: of_model(other_model), BATCHES, "log likelihood of the batch"),
        (lambda: of_model(other_prior), BATCHES, "prior must be the one under which"),
        (guide, MOVED, "`batches` must begin with the 4 .*in the same order"),
        (guide, SWAPPED, "in the same order; got others"),
        (guide, BATCHES[:3], r"begin with the 4 .*got 3 in all"),
    ],
)
def test_another_fit(
    make: Callable[[], AutoSubnetLaplace], batches: Any, match: str, begun: Path
) -> None:
    before = begun.read_bytes()
    made = make()
    with pytest.raises(ValueError, match=match):
        made.laplace_approximation_from(batches, checkpoint=begun, checkpoint_every=2)
    assert begun.read_bytes() == before
    # The fit that it belongs to goes on.
    again = guide().laplace_approximation_from(BATCHES, checkpoint=begun)
    same(again, whole_fit())


def of_prior(scale: float, subnet: Any, options: dict[str, Any]) -> AutoSubnetLaplace:
    """Softmax regression under a normal prior of some scale."""

    def model(x: Tensor, y: Tensor | None = None) -> None:
        weight = pyro.sample("w", dist.Normal(x.new_zeros(4, C), scale).to_event(2))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(logits=x @ weight), obs=y)

    init = init_to_value(values={"w": MAP})
    return AutoSubnetLaplace(model, subnet, init_loc_fn=init, **options)


@pytest.mark.parametrize("stop", [1, NUM_BATCHES])
@pytest.mark.parametrize("kind", ["auto", "dual", "hessian", "diag", "ggn-mc"])
def test_the_prior_of_now_is_taken(kind: str, stop: int, tmp_path: Path) -> None:
    options, kept = KINDS[kind], {"checkpoint": tmp_path / "fit"}
    subnet = RandomSubnet(4, seed=2)
    first = of_prior(1.0, subnet, options)
    torch.manual_seed(5)
    interrupt(first, Loader(stop), **kept, checkpoint_every=1)
    resumed = of_prior(0.1, subnet, options)
    resumed = resumed.laplace_approximation_from(BATCHES, **kept)
    torch.manual_seed(5)
    right = of_prior(0.1, subnet, options).laplace_approximation_from(BATCHES)
    same(resumed, right)
    assert_close(
        resumed.log_marginal_likelihood(),
        right.log_marginal_likelihood(),
        rtol=0.0,
        atol=0.0,
    )


def test_the_advice_of_a_fit_that_failed_after_its_last_batch(tmp_path: Path) -> None:
    x = torch.linspace(-1.0, 1.0, 6).double()
    y = -3.0 * torch.sin(3.0 * x)
    batches, kept = list(zip(x.split(2), y.split(2), strict=True)), tmp_path / "fit"

    def of(scale: float) -> AutoSubnetLaplace:
        def model(x: Tensor, y: Tensor) -> None:
            w = pyro.sample("w", dist.Normal(x.new_zeros(()), scale))
            with pyro.plate("data", len(x)):
                pyro.sample("y", dist.Normal(torch.sin(3.0 * w * x), 0.1), obs=y)

        init = init_to_value(values={"w": x.new_ones(())})
        return AutoSubnetLaplace(model, init_loc_fn=init, curvature="hessian")

    with pytest.raises(PrecisionError, match="raise the prior's precision"):
        of(1.0).laplace_approximation_from(batches, checkpoint=kept, checkpoint_every=1)
    found = of(1e-3).laplace_approximation_from(batches, checkpoint=kept)
    w = torch.tensor(1.0, dtype=torch.float64)
    right = torch.func.hessian(
        lambda w: 50.0 * (y - torch.sin(3.0 * w * x)).square().sum() + 5e5 * w.square()
    )(w)
    precision = found.get_posterior().precision_matrix
    assert_close(precision, right.reshape(1, 1), rtol=1e-10, atol=1e-10)
    assert not kept.exists()


@pytest.mark.parametrize("chosen", [{"w": [0, 5]}, None, RandomSubnet(4, seed=2)])
def test_another_subnet_of_a_selector_that_is_asked_again(
    chosen: Any, tmp_path: Path
) -> None:
    kept: dict[str, Any] = {"checkpoint": tmp_path / "fit", "checkpoint_every": 2}
    first = guide({"w": torch.tensor([0, 4])})
    interrupt(first, Loader(3), **kept)
    if isinstance(chosen, dict):
        chosen = {"w": torch.tensor(chosen["w"])}
    with pytest.raises(CheckpointError, match="`subnet` must be as in the fit"):
        guide(chosen).laplace_approximation_from(BATCHES, **kept)


def test_another_number_of_data(begun: Path) -> None:
    with pytest.raises(CheckpointError, match=r"`num_data` must be.*None; got 30"):
        guide().laplace_approximation_from(BATCHES, checkpoint=begun, num_data=30)


def test_parameters_that_were_trained_on(tmp_path: Path) -> None:
    net = nn.Linear(4, 4).double()

    def with_net(x: Tensor, y: Tensor | None = None) -> None:
        model(net(x), y)

    kept: dict[str, Any] = {"checkpoint": tmp_path / "fit", "checkpoint_every": 2}
    interrupt(of_model(with_net), Loader(5, ends=1), **kept)
    with torch.no_grad():
        net.weight += 0.01
    with pytest.raises(CheckpointError, match="log likelihood of the batch that was"):
        of_model(with_net).laplace_approximation_from(BATCHES, **kept)


def test_files_that_are_no_fits(begun: Path) -> None:
    begun.write_bytes(begun.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="truncated or altered"):
        guide().laplace_approximation_from(BATCHES, checkpoint=begun)
    guide().laplace_approximation_from(BATCHES).save(begun)
    with pytest.raises(CheckpointError, match="must hold a fit; got a posterior"):
        guide().laplace_approximation_from(BATCHES, checkpoint=begun)


def test_where_it_cannot_be_written_the_fit_does_not_begin(tmp_path: Path) -> None:
    loader = Loader(None)
    made = guide(None)
    made(*BATCHES[0])
    missing = tmp_path / "missing" / "fit"
    with pytest.raises(CheckpointError, match="Check that its directory is there"):
        made.laplace_approximation_from(loader, checkpoint=missing)
    assert loader.passes == 0


def test_a_pipe_is_refused_before_the_fit_begins(tmp_path: Path) -> None:
    loader, pipe = Loader(None), tmp_path / "pipe"
    os.mkfifo(pipe)
    made = guide(None)
    made(*BATCHES[0])
    with pytest.raises(CheckpointError, match=r"regular file, .*got the pipe"):
        made.laplace_approximation_from(loader, checkpoint=pipe)
    assert loader.passes == 0


def test_a_checkpoint_through_a_link_is_deleted_where_it_is(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "fit")
    guide().laplace_approximation_from(BATCHES, checkpoint=link, checkpoint_every=1)
    assert link.is_symlink()
    assert not (tmp_path / "fit").exists()


def test_a_count_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"`checkpoint_every` must be .*got 0"):
        guide().laplace_approximation_from(
            BATCHES, checkpoint=tmp_path / "fit", checkpoint_every=0
        )


# ----------------------------------------------------------------------------------
# Killed, not stopped.

KILLED = f"""
import os, signal, sys
import pyro
from {__name__} import BATCHES, KINDS, Loader, guide

path, kind, passes, at = sys.argv[1:]

class Killing(Loader):
    def __iter__(self):
        self.passes += 1
        for i, batch in enumerate(BATCHES):
            if self.passes == int(passes) and i == int(at):
                os.kill(os.getpid(), signal.SIGKILL)
            yield batch

made = guide(**KINDS[kind])
made(*BATCHES[0])
pyro.set_rng_seed(5)
made.laplace_approximation_from(Killing(None), checkpoint=path, checkpoint_every=2)
"""


@pytest.mark.parametrize("kind", ["primal", "ggn-mc", "kron ggn-mc"])
def test_a_process_that_is_killed(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "fit"
    root = Path(__file__).resolve().parents[2]
    # Choosing by variance is a pass before that of the fit.
    passes = "1" if "kron" in kind else "2"
    program = [sys.executable, "-W", "ignore", "-c", KILLED]
    command = [*program, str(path), kind, passes, "5"]
    ended = subprocess.run(command, cwd=root, check=False)
    assert ended.returncode == -signal.SIGKILL
    _, content = read_file(path, KIND)
    assert content["done"] == 4
    kept: dict[str, Any] = {"checkpoint": path, "checkpoint_every": 2}
    again = guide(**KINDS[kind]).laplace_approximation_from(BATCHES, **kept)
    pyro.set_rng_seed(5)
    same(again, guide(**KINDS[kind]).laplace_approximation_from(BATCHES))


# ----------------------------------------------------------------------------------
# What tells one batch from another.

TELLING = [
    torch.ones(2),
    torch.ones(2).double(),
    torch.ones(2, 1),
    torch.ones(2).int(),
    torch.tensor([1.0, -1.0]),
    torch.ones(2).bfloat16(),
    torch.ones(2).to(torch.complex64),
    np.ones(2),
    np.array(["a", None], dtype=object),
    [1.0, 1.0],
    [1, 1],
    [True, 1],
    [[1], 1],
    [1, [1]],
    ["1", 1],
    "11",
    b"11",
    None,
    {"a": 1},
    {"b": 1},
    LargestVariance(3),
    LargestVariance(4),
    object(),
]


def test_what_differs_is_told_apart() -> None:
    assert len({digest(value) for value in TELLING}) == len(TELLING)
    assert len({digest(*TELLING[:i]) for i in range(len(TELLING))}) == len(TELLING)


def test_what_is_equal_is_not() -> None:
    grid = torch.arange(6.0).reshape(2, 3)
    equal_pairs = [
        (grid.T, grid.T.contiguous()),
        (grid.to_sparse().to_dense(), grid),
        (np.array(["a", None], dtype=object), np.array(["a", None], dtype=object)),
        ((1, 2), [1, 2]),
        (torch.zeros(0), torch.zeros(0)),
        (torch.tensor(1.0), torch.tensor(1.0)),
    ]
    for one, other in equal_pairs:
        assert digest(one) == digest(other)
    assert digest(grid.to_sparse()) == digest(grid.clone().to_sparse())
