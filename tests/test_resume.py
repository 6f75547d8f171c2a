"""A fit that ends early and is made again equals one that was never interrupted.

To the bit: both sum the same blocks in the same order.
"""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
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
from pyro_subnet.curvature import ggn
from pyro_subnet.exceptions import CheckpointError, OptionError, PrecisionError
from pyro_subnet.files import resume
from pyro_subnet.files.fingerprint import digest
from pyro_subnet.files.safe_file import read_file
from pyro_subnet.fit.sums import subnet_curvature, whole_subnet
from pyro_subnet.selection import LargestVariance, RandomSubnet
from pyro_subnet.tracing.data import Data

N, BATCH, D, C = 11, 2, 12, 3  # six batches, the last of one datum
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
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def model(x: Tensor, y: Tensor | None = None) -> None:
    """Softmax regression: its exact Hessian is positive definite everywhere."""
    weight = pyro.sample("w", dist.Normal(x.new_zeros(4, C), 1.0).to_event(2))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Categorical(logits=x @ weight), obs=y)


def guide(subnet: Any = 7, at: Tensor = MAP, **options: Any) -> AutoSubnetLaplace:
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
    ends = int("dual" not in kind)
    for stop in range(NUM_BATCHES + 1):
        pyro.set_rng_seed(5)
        interrupt(guide(**options), Loader(stop, ends), **kept)
        pyro.set_rng_seed(5 if "mc" not in kind else 99)  # another process
        same(guide(**options).laplace_approximation_from(BATCHES, **kept), whole)
        identical(torch.get_rng_state(), after)
        assert not path.exists()


@pytest.mark.parametrize("stop", range(NUM_BATCHES + 1))
@pytest.mark.parametrize("every", [1, 4])
def test_what_was_summed_is_not_summed_again(
    every: int, stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows become a matrix within the pass, before and after it is resumed."""
    monkeypatch.setattr(ggn, "dual_pays", lambda rows, size, dtype: rows < 15)
    kept: dict[str, Any] = {"checkpoint": tmp_path / "fit", "checkpoint_every": every}
    whole = guide(None).laplace_approximation_from(BATCHES)
    interrupt(guide(None), Loader(stop), **kept)
    added, add = [], ggn.GGNSum.add

    def note(self: Any, *args: Any) -> None:
        added.append(1)
        add(self, *args)

    monkeypatch.setattr(ggn.GGNSum, "add", note)
    same(guide(None).laplace_approximation_from(BATCHES, **kept), whole)
    # The last batch's sums are written when the next one is asked for.
    assert len(added) == NUM_BATCHES - stop // every * every


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
        assert again.held == whole.held == "diagonal"
        identical(again.ggn, whole.ggn)
        identical(vars(again.prior), vars(whole.prior))
        identical(again.summary.tensors(), whole.summary.tensors())
        (tmp_path / "fit").unlink()


def curvature_of(batches: Loader, path: Path | None = None) -> Any:
    made = guide(None, covariance="diag")
    made(*BATCHES[0])
    data = Data(batches, whole=False)
    subnet, file = whole_subnet(made.latents), None
    if path is not None:
        file = resume.FitCheckpoint.open(path, 2, made, made.options, (data, None))
        file.keep_subnet(subnet)
    return subnet_curvature(
        model, made.latents, subnet, data, made.options, checkpoint=file
    )


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
        return AutoSubnetLaplace(model, 7, init_loc_fn=init)

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


def test_it_is_written_when_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = []
    write = resume.write_file

    def note(path: Any, kind: str, tensors: Any, content: Any) -> None:
        done.append(content["done"])
        write(path, kind, tensors, content)

    monkeypatch.setattr(resume, "write_file", note)
    options: dict[str, Any] = {"checkpoint": tmp_path / "fit", "checkpoint_every": 4}
    guide().laplace_approximation_from(BATCHES, **options)
    assert done == [0, 4]


def test_a_fit_that_fails_keeps_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise PrecisionError("not positive definite")

    path = tmp_path / "fit"
    kept: dict[str, Any] = {"checkpoint": path, "checkpoint_every": NUM_BATCHES}
    monkeypatch.setattr("pyro_subnet.guides.posterior.form_of", fail)
    with pytest.raises(PrecisionError, match="not positive"):
        guide().laplace_approximation_from(BATCHES, **kept)
    monkeypatch.undo()
    _, content = read_file(path, resume.KIND)
    assert content["done"] == NUM_BATCHES
    again = guide().laplace_approximation_from(BATCHES, **kept)
    same(again, whole_fit())


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
    return AutoSubnetLaplace(which, 7, init_loc_fn=init_to_value(values={"w": MAP}))


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
        (lambda: guide(8), BATCHES, "`subnet` must be as in the fit"),
        (lambda: guide(LargestVariance(7, "ef")), BATCHES, "`subnet` must be as in"),
        (lambda: guide(RandomSubnet(7)), BATCHES, "`subnet` must be as in the fit"),
        (lambda: guide(form="primal"), BATCHES, "`options` must be.*'auto'.*'primal'"),
        (lambda: guide(curvature="ef"), BATCHES, "`options` must be as in the fit"),
        (lambda: of_model(renamed), BATCHES, r"without 'w'.*delete the file"),
        (lambda: of_model(other_model), BATCHES, "log likelihood of the batch"),
        (lambda: of_model(other_prior), BATCHES, "log prior at the MAP must be"),
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


def test_a_count_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"`checkpoint_every` must be .*got 0"):
        guide().laplace_approximation_from(
            BATCHES, checkpoint=tmp_path / "fit", checkpoint_every=0
        )


# ----------------------------------------------------------------------------------
# Killed, not stopped.

KILLED = """
import os, signal, sys
import pyro
from tests.test_resume import BATCHES, KINDS, Loader, guide

path, kind, at = sys.argv[1:]

class Killing(Loader):
    def __iter__(self):
        self.passes += 1
        for i, batch in enumerate(BATCHES):
            if self.passes == 2 and i == int(at):
                os.kill(os.getpid(), signal.SIGKILL)
            yield batch

made = guide(**KINDS[kind])
made(*BATCHES[0])
pyro.set_rng_seed(5)
made.laplace_approximation_from(Killing(None), checkpoint=path, checkpoint_every=2)
"""


@pytest.mark.parametrize("kind", ["primal", "ggn-mc"])
def test_a_process_that_is_killed(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "fit"
    root = Path(__file__).resolve().parents[1]
    command = [sys.executable, "-W", "ignore", "-c", KILLED, str(path), kind, "5"]
    ended = subprocess.run(command, cwd=root, check=False)
    assert ended.returncode == -signal.SIGKILL
    _, content = read_file(path, resume.KIND)
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
