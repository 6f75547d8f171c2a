"""A saved posterior comes back equal to the bit; a file that is not whole does not."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import safetensors.torch
import torch
from pyro.infer import Predictive
from pyro.infer.autoguide.initialization import init_to_value
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.testing import assert_close

from pyro_subnet import AutoSubnetLaplace, AutoSubnetMultivariateNormal
from pyro_subnet.exceptions import CheckpointError, ModelError
from pyro_subnet.files.checkpoint import KIND
from pyro_subnet.files.safe_file import FORMAT_VERSION, read_file, write_file
from pyro_subnet.gaussians.registry import FORMS
from tests.cases import CASES, DOUBLE, Case

load = AutoSubnetMultivariateNormal.load
# Their priors couple weights, or do not curve everywhere: there are no rows.
PRIMAL_ONLY = {
    "heteroscedastic",
    "latent_noise",
    "masked_bernoulli",
    "scalar_sites",
    "correlated_prior",
    "constrained",
    "plates",
}

DATA = (
    torch.tensor([[1.0, 2.0], [0.5, -1.0], [3.0, 0.0]]),
    torch.tensor([1.0, -1.0, 0.5]),
)


# How each form is asked for.
ASKED_FOR: dict[str, dict[str, Any]] = {
    "primal": {"form": "primal"},
    "dual": {"form": "dual"},
    "diagonal": {"covariance": "diag"},
    "kronecker": {"covariance": "kron"},
}


def identical(ours: Any, theirs: Any) -> None:
    """Compares to the bit: values, shapes, dtypes, devices."""
    assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def fitted(case: Case, form: str = "primal", **options: Any) -> Any:
    subnet = None if form == "kronecker" else case.scattered()
    guide = case.guide(subnet, **ASKED_FOR[form], **options)
    return guide.laplace_approximation(*case.args, **case.kwargs)


def reloaded(posterior: Any, path: Path, case: Case) -> Any:
    posterior.save(path)
    return load(path, case.model, *case.args, **case.kwargs)


def draws(posterior: Any, case: Case) -> dict[str, Tensor]:
    pyro.set_rng_seed(7)
    return posterior(*case.args, **case.kwargs)


def same(ours: Any, theirs: Any, case: Case) -> None:
    """Everything that a posterior says, asked of both."""
    identical(dict(ours.named_buffers()), dict(theirs.named_buffers()))
    identical(draws(ours, case), draws(theirs, case))
    identical(ours.median(), theirs.median())
    q, r = ours.get_posterior(), theirs.get_posterior()
    point = r.loc + 0.1
    identical(q.log_prob(point), r.log_prob(point))
    identical(q.covariance_matrix, r.covariance_matrix)
    identical(ours.ggn(), theirs.ggn())
    assert repr(ours.subnet) == repr(theirs.subnet)
    for name in ("form_name", "prior_factor", "noise_factor", "options"):
        assert getattr(ours, name) == getattr(theirs, name), name


@pytest.mark.parametrize(
    ("name", "form"),
    [*((name, "primal") for name in CASES)]
    + [(name, "dual") for name in CASES if name not in PRIMAL_ONLY],
)
def test_every_case_comes_back(name: str, form: str, tmp_path: Path) -> None:
    case = CASES[name](DOUBLE)
    posterior = fitted(case, form)
    back = reloaded(posterior, tmp_path / "posterior", case)
    same(back, posterior, case)
    # The live one still works, and can be saved again.
    same(reloaded(posterior, tmp_path / "posterior", case), posterior, case)


@pytest.mark.parametrize("form", FORMS)
def test_all_that_it_can_do(dtype: torch.dtype, form: str, tmp_path: Path) -> None:
    case = CASES["regression_mlp"](torch.zeros((), dtype=dtype))
    posterior = fitted(case, form)
    back = reloaded(posterior, tmp_path / "posterior", case)
    assert back.loc.dtype == dtype
    closed = [p.output_distribution(*case.args) for p in (back, posterior)]
    identical(closed[0].mean, closed[1].mean)
    identical(closed[0].covariance_matrix, closed[1].covariance_matrix)
    same(back.update(*case.args), posterior.update(*case.args), case)
    same(back.with_prior_precision(3.0), posterior.with_prior_precision(3.0), case)
    same(back.with_noise_scale(2.0), posterior.with_noise_scale(2.0), case)
    identical(back.log_marginal_likelihood(), posterior.log_marginal_likelihood())
    drawn = []
    for each in (back, posterior):
        pyro.set_rng_seed(3)
        hybrid = each.hybrid_model()
        guide = Predictive(hybrid, guide=hybrid.guide, num_samples=3)(*case.args)
        linear = Predictive(each.linearized_model, guide=each, num_samples=3)
        drawn.append((guide, linear(*case.args)))
    identical(drawn[0], drawn[1])


@pytest.mark.parametrize("curvature", ["ggn", "ggn-mc", "ef", "hessian"])
def test_options_come_back(curvature: Any, tmp_path: Path) -> None:
    def model(x: Tensor, y: Tensor) -> None:
        weight = pyro.sample("w", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        shift = pyro.sample("b", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ weight + shift, 1.0), obs=y)

    guide = AutoSubnetLaplace(model, curvature=curvature)
    posterior = guide.laplace_approximation(*DATA).with_prior_precision({"b": 200.0})
    posterior.save(tmp_path / "posterior")
    back = load(tmp_path / "posterior", model, *DATA)
    assert back.options == posterior.options
    assert back.prior_factor == {"b": 200.0}
    pyro.set_rng_seed(1)
    new = back.update(*DATA)
    pyro.set_rng_seed(1)
    identical(new.ggn(), posterior.update(*DATA).ggn())
    identical(
        back.with_prior_precision({"w": 0.3}).get_posterior().covariance_matrix,
        posterior.with_prior_precision({"w": 0.3}).get_posterior().covariance_matrix,
    )


def test_scales_selection_and_tuning_come_back(tmp_path: Path) -> None:
    case = CASES["regression_mlp"](DOUBLE)
    base = case.guide(0.5).laplace_approximation(*case.args)
    for posterior in (
        base.with_noise_scale(0.7).with_prior_precision("fraction"),
        base.tune_prior_precision(),
        base.tune_prior_precision(per_site=True),
    ):
        back = reloaded(posterior, tmp_path / "posterior", case)
        same(back, posterior, case)
        assert back.explained_variance == posterior.explained_variance
        assert (back.tuning is None) == (posterior.tuning is None)
        if posterior.tuning is not None:
            ours, theirs = vars(back.tuning), vars(posterior.tuning)
            identical(ours.pop("scales"), theirs["scales"])
            identical(ours.pop("objective"), theirs["objective"])
            assert ours.items() <= theirs.items()


def test_loading_leaves_everything_as_it_was(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).double().eval()

    def model(x: Tensor, y: Tensor | None = None) -> None:
        scale = pyro.param("scale", lambda: torch.rand(()).double() + 0.1)
        weight = pyro.sample("w", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(net(x) @ weight, scale), obs=y)

    x, y = torch.randn(5, 2).double(), torch.randn(5).double()
    guide = AutoSubnetLaplace(model)
    posterior = guide.laplace_approximation(x, y)
    posterior.save(tmp_path / "posterior")
    pyro.clear_param_store()
    state, rng = pickle.dumps(net.state_dict()), torch.get_rng_state()
    with pyro.plate("outer", 4):  # an open plate does no harm
        load(tmp_path / "posterior", model, x, y)
    assert not list(pyro.get_param_store().keys())
    identical(torch.get_rng_state(), rng)
    assert pickle.dumps(net.state_dict()) == state
    net.train()
    with pytest.raises(ModelError, match="eval mode"):
        load(tmp_path / "posterior", model, x, y)


def test_keywords_of_the_model_may_have_any_name(tmp_path: Path) -> None:
    def model(*, path: Tensor, model: Tensor) -> None:
        weight = pyro.sample("w", dist.Normal(path.new_zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(path)):
            pyro.sample("y", dist.Normal(path @ weight, 1.0), obs=model)

    data = {"path": torch.randn(5, 2), "model": torch.randn(5)}
    posterior = AutoSubnetLaplace(model).laplace_approximation(**data)
    posterior.save(tmp_path / "posterior")
    identical(load(tmp_path / "posterior", model, **data).loc, posterior.loc)


def test_a_map_of_another_dtype_than_the_prior(tmp_path: Path) -> None:
    def model(x: Tensor, y: Tensor) -> None:
        weight = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        pyro.sample("y", dist.Normal(x @ weight, 1.0).to_event(1), obs=y)

    x, y = torch.randn(5, 2).double(), torch.randn(5).double()
    init = init_to_value(values={"w": torch.ones(2).double()})
    posterior = AutoSubnetLaplace(model, init_loc_fn=init).laplace_approximation(x, y)
    posterior.save(tmp_path / "posterior")
    back = load(tmp_path / "posterior", model, x, y)
    identical(dict(back.named_buffers()), dict(posterior.named_buffers()))


def test_an_unpickled_posterior_can_be_saved(tmp_path: Path) -> None:
    case = CASES["regression_mlp"](DOUBLE)
    posterior = fitted(case)
    posterior.save(tmp_path / "before")
    pickled = pickle.loads(pickle.dumps(posterior))
    back = reloaded(pickled, tmp_path / "after", case)
    same(back, posterior, case)


def test_every_form_is_saved_here() -> None:
    assert FORMS.keys() == ASKED_FOR.keys()


@pytest.mark.parametrize("form", FORMS)
def test_every_form_has_its_axes(form: Any) -> None:
    held = fitted(CASES["regression_mlp"](DOUBLE), form).form
    own, prior = held.tensors(), held.prior.tensors()
    axes = held.axes_of(own)
    assert axes.keys() == own.keys() - prior.keys()
    lengths: dict[str, int] = {}
    for name, letters in axes.items():
        for letter, length in zip(letters, own[name].shape, strict=True):
            assert lengths.setdefault(letter, length) == length, name


# ----------------------------------------------------------------------------------
# Files that are not as they were written.


def tiny(x: Tensor, y: Tensor) -> None:
    weight = pyro.sample("w", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(x @ weight, 1.0).to_event(1), obs=y)


def linear(x: Tensor, y: Tensor) -> None:
    """As :func:`tiny`, by a linear map, which has a Kronecker block."""
    weight = pyro.sample("w", dist.Normal(x.new_zeros(1, 2), 1.0).to_event(2))
    mean = nn.functional.linear(x, weight).squeeze(-1)
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "posterior.safetensors"
    AutoSubnetLaplace(tiny).laplace_approximation(*DATA).save(path)
    return path


def test_any_altered_byte_is_found(saved: Path) -> None:
    whole = saved.read_bytes()
    unnoticed = []
    for position in range(len(whole)):
        for flip in (0x01, 0x20):  # another number; the other case of a letter
            altered = bytearray(whole)
            altered[position] ^= flip
            saved.write_bytes(altered)
            try:
                load(saved, tiny, *DATA)
            except CheckpointError:
                continue
            unnoticed.append((position, flip))
    assert not unnoticed


def test_padding_that_reads_alike_is_found(saved: Path) -> None:
    whole = saved.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    other = whole[: 8 + length] + b" " * 8 + whole[8 + length :]
    saved.write_bytes((length + 8).to_bytes(8, "little") + other[8:])
    with pytest.raises(CheckpointError, match="truncated or altered"):
        load(saved, tiny, *DATA)


def test_any_truncation_is_found(saved: Path) -> None:
    whole = saved.read_bytes()
    read = []
    for length in [*range(len(whole)), len(whole) + 1]:
        saved.write_bytes((whole + b"\0")[:length])
        try:
            load(saved, tiny, *DATA)
        except CheckpointError:
            continue
        read.append(length)
    assert not read


def test_other_files(tmp_path: Path) -> None:
    path = tmp_path / "other"
    save_file({"weight": torch.ones(3)}, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"that pyro_subnet wrote; got .*other"):
        load(path, tiny, *DATA)
    path.write_bytes(pickle.dumps({"weight": 1}))
    with pytest.raises(CheckpointError, match="that pyro_subnet wrote"):
        load(path, tiny, *DATA)
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="0 bytes"):
        load(path, tiny, *DATA)
    with pytest.raises(CheckpointError, match="got the directory"):
        load(tmp_path, tiny, *DATA)
    with pytest.raises(FileNotFoundError, match="missing"):
        load(tmp_path / "missing", tiny, *DATA)


def resealed(path: Path, content: dict[str, Any]) -> None:
    """Writes a file anew with the same tensors, other content, and a seal that fits."""
    with safe_open(path, framework="pt") as opened:
        tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}
    blank = "0" * 64
    save_file(tensors, path, {"pyro_subnet": json.dumps(content), "sha256": blank})
    whole = path.read_bytes()
    assert whole.count(blank.encode()) == 1
    seal = hashlib.sha256(whole).hexdigest()
    path.write_bytes(whole.replace(blank.encode(), seal.encode()))


def test_a_newer_version(saved: Path) -> None:
    _, content = read_file(saved, KIND)
    resealed(saved, content)
    load(saved, tiny, *DATA)  # all else is as it should be
    kept = {name: content[name] for name in ("kind", "pyro_subnet", "sites")}
    resealed(saved, {**kept, "version": FORMAT_VERSION + 1})
    with pytest.raises(CheckpointError, match=r"version 1 at most; got version 2"):
        load(saved, tiny, *DATA)


def test_another_kind(saved: Path) -> None:
    with pytest.raises(CheckpointError, match="must hold a fit; got a posterior"):
        read_file(saved, "fit")


def rewritten(saved: Path, **changes: Tensor | None) -> None:
    """Writes the file anew, with its own checksum but other tensors."""
    tensors, content = read_file(saved, KIND)
    for key in ("kind", "version", "pyro_subnet", "torch", "pyro", "safetensors"):
        content.pop(key)
    kept = {n: t for n, t in {**tensors, **changes}.items() if t is not None}
    write_file(saved, KIND, kept, content)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"loc": torch.ones(3)}, r"each element of its sites, 2; got 3"),
        ({"loc": torch.ones(1, 2)}, r"'loc' must have shape \(D\)"),
        ({"ggn_diagonal": torch.ones(3)}, r"'ggn_diagonal' must have shape \(2\)"),
        ({"factor_and_ggn": torch.ones(2, 3)}, r"shape \(2, 2\) .*got \(2, 3\)"),
        ({"fit_numbers": torch.ones(4)}, r"'fit_numbers' must have shape \(5\)"),
        ({"prior_coupled": torch.ones(0)}, "of integers; got"),
        ({"subnet_positions": torch.tensor([0, 2])}, r"must lie in \[0, 2\)"),
        ({"subnet_positions": torch.tensor([1, 0])}, "must ascend"),
        ({"subnet_positions": torch.tensor([1, 1])}, "duplicates"),
        ({"prior_gradient": None}, "must hold the tensors"),
        ({"more": torch.ones(1)}, "must hold the tensors"),
    ],
)
def test_tensors_that_do_not_fit(
    saved: Path, changes: dict[str, Tensor], match: str
) -> None:
    rewritten(saved, **changes)
    with pytest.raises(CheckpointError, match=match):
        load(saved, tiny, *DATA)


@pytest.mark.parametrize(
    ("form", "changes", "match"),
    [
        ("dual", {"rows": torch.ones(3, 3)}, r"'rows' must have shape \(3, 2\)"),
        ("dual", {"kernel_tril": torch.ones(2, 2)}, r"shape \(3, 3\) .*got \(2, 2\)"),
        ("diagonal", {"precision": torch.ones(3)}, r"'precision' .* shape \(2\)"),
        ("kronecker", {"kronecker_prior": torch.ones(3)}, r"shape \(2\).*got \(3,\)"),
        ("kronecker", {"site_scales": torch.ones(1, 1)}, r"'site_scales' .*\(n\)"),
        (
            "kronecker",
            {"kronecker_block_0_output_values": torch.ones(3)},
            r"'kronecker_block_0_output_values' must have shape \(1\).*got \(3,\)",
        ),
        (
            "kronecker",
            {"kronecker_block_0_site": torch.tensor(0.0)},
            r"'kronecker_block_0_site' must have shape \(\) of integers; got",
        ),
        ("kronecker", {"kronecker_block_0_weight": None}, "must hold the tensors"),
        ("kronecker", {"kronecker_block_1_prior": DOUBLE}, "must hold the tensors"),
    ],
)
def test_tensors_that_do_not_fit_a_form(
    form: str, changes: dict[str, Tensor], match: str, saved: Path
) -> None:
    guide = AutoSubnetLaplace(linear, **ASKED_FOR[form])
    guide.laplace_approximation(*DATA).save(saved)
    load(saved, linear, *DATA)
    rewritten(saved, **changes)
    with pytest.raises(CheckpointError, match=match):
        load(saved, linear, *DATA)


def test_an_unknown_form(saved: Path) -> None:
    tensors, content = read_file(saved, KIND)
    write_file(saved, KIND, tensors, {**content, "form": "tridiagonal"})
    with pytest.raises(CheckpointError, match=r"form` must be one of .*'tridiagonal'"):
        load(saved, tiny, *DATA)


# ----------------------------------------------------------------------------------
# Models that are not the file's.


def sites(**priors: Callable[[], Any]) -> Callable[[], None]:
    def model() -> None:
        for name, prior in priors.items():
            pyro.sample(name, prior())

    return model


def normal(*shape: int) -> Callable[[], Any]:
    return lambda: dist.Normal(torch.zeros(shape), 1.0).to_event(len(shape))


FITTED = {
    "a": normal(2, 3),
    "b": lambda: dist.Gamma(torch.tensor(2.0), 1.0),
    "c": lambda: dist.Beta(torch.tensor(2.0), torch.tensor(2.0)),
}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"c": None}, r"one without 'c': \['a', 'b'\]"),
        ({"d": normal(1)}, r"\['a', 'b', 'c'\]; got one with 'd' too"),
        ({"a": normal(3, 2)}, r"'a' has .*shape \(2, 3\) there; got \(3, 2\)"),
        ({"a": normal(6)}, r"'a' has .*shape \(2, 3\) there; got \(6,\)"),
        ({"b": normal()}, r"'b' has support .*GreaterThan.*got Real"),
        ({"c": lambda: dist.Uniform(0.0, 2.0)}, r"'c' has support .*0.0.*2.0"),
        (
            {"b": lambda: dist.Gamma(torch.tensor(2.0).double(), 1.0)},
            "float32 there; got torch.float64",
        ),
        ({"b": lambda: dist.Poisson(1.0)}, "'b'"),
    ],
)
def test_another_model(change: dict[str, Any], match: str, tmp_path: Path) -> None:
    posterior = fit_of_sites(sites(**FITTED))
    posterior.save(tmp_path / "posterior")
    other = {k: v for k, v in {**FITTED, **change}.items() if v is not None}
    with pytest.raises((CheckpointError, ValueError), match=match):
        load(tmp_path / "posterior", sites(**other))


def fit_of_sites(model: Callable[[], None]) -> Any:
    guide = AutoSubnetLaplace(model, {"a": torch.arange(3)})
    with pytest.warns(match="no observed site"):
        return guide.laplace_approximation()


def test_a_discrete_site_that_is_new(tmp_path: Path) -> None:
    fit_of_sites(sites(**FITTED)).save(tmp_path / "posterior")
    other = sites(**FITTED, d=lambda: dist.Poisson(1.0))
    with pytest.raises(CheckpointError, match="got one with 'd' too"):
        load(tmp_path / "posterior", other)


def test_another_order(tmp_path: Path) -> None:
    fit_of_sites(sites(**FITTED)).save(tmp_path / "posterior")
    other = sites(**dict(reversed(FITTED.items())))
    with pytest.raises(CheckpointError, match=r"order, \['a', 'b', 'c'\]; got \['c'"):
        load(tmp_path / "posterior", other)


def test_data_left_out(saved: Path) -> None:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        weight = pyro.sample("w", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(x @ weight, 1.0).to_event(1), obs=y)

    with pytest.raises(CheckpointError, match=r"'y' too.*data for every site"):
        load(saved, model, DATA[0])


def test_supports_with_tensors(tmp_path: Path) -> None:
    def bounded(high: float) -> Callable[[], Any]:
        top = torch.tensor([1.0, high])
        return lambda: dist.Uniform(torch.zeros(2), top).to_event(1)

    posterior = fit_of_sites(sites(a=normal(3), u=bounded(1 / 3)))
    posterior.save(tmp_path / "posterior")
    load(tmp_path / "posterior", sites(a=normal(3), u=bounded(1 / 3)))
    # Equal to the four digits that a tensor prints.
    other = sites(a=normal(3), u=bounded(1 / 3 + 1e-6))
    with pytest.raises(CheckpointError, match="'u' has support Independent"):
        load(tmp_path / "posterior", other)


# ----------------------------------------------------------------------------------
# Whole or not at all.


class Stop(Exception):
    """What ends a write in the middle."""


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt, OSError])
@pytest.mark.parametrize(
    ("owner", "where"),
    [
        (safetensors.torch, "serialize_file"),  # in the middle of the tensors
        (os, "fstat"),  # after them, before the seal
        (os, "fsync"),  # sealed, but perhaps not on the disk
        (os, "replace"),  # on the disk, under another name
    ],
)
def test_a_write_that_fails(
    owner: Any, where: str, error: Any, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = saved.read_bytes()

    def fail(*args: Any, **kwargs: Any) -> None:
        if where == "serialize_file":
            Path(args[1]).write_bytes(before[: len(before) // 2])
        raise error("stopped")

    other = AutoSubnetLaplace(tiny).laplace_approximation(*(2 * part for part in DATA))
    monkeypatch.setattr(owner, where, fail)
    with pytest.raises(CheckpointError if error is OSError else error, match="stopped"):
        other.save(saved)
    monkeypatch.undo()
    assert os.listdir(saved.parent) == [saved.name]
    assert saved.read_bytes() == before
    other.save(saved)
    identical(load(saved, tiny, *DATA).ggn(), other.ggn())


ENDED = f"""
import os, resource, signal, sys
import safetensors.torch
from pyro_subnet import AutoSubnetLaplace
from pyro_subnet.exceptions import CheckpointError
from {__name__} import DATA, tiny

path, where = sys.argv[1:]
posterior = AutoSubnetLaplace(tiny).laplace_approximation(*(2 * x for x in DATA))
write = safetensors.torch.serialize_file

def die(*args):
    os.kill(os.getpid(), signal.SIGKILL)

def half(tensors, name, **options):
    write(tensors, name, **options)
    os.truncate(name, os.path.getsize(name) // 2)
    die()

if where == "half":
    safetensors.torch.serialize_file = half
elif where == "unsealed":  # the file is whole, and looked at for its seal
    os.fstat = die
else:  # more is an error, as on a full disk, or ends the process
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))
    if where == "too long":
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
try:
    posterior.save(path)
except CheckpointError as error:
    print(error)
"""


def saved_by_another(path: Path, where: str) -> subprocess.CompletedProcess[str]:
    """A process that saves another posterior, and is ended somewhere."""
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ENDED, str(path), where],
        cwd=Path(__file__).resolve().parents[2],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("where", "ended_by"),
    [
        ("half", signal.SIGKILL),
        ("unsealed", signal.SIGKILL),
        ("too long", signal.SIGXFSZ),
    ],
)
def test_a_process_that_is_killed(where: str, ended_by: int, saved: Path) -> None:
    before = saved.read_bytes()
    assert saved_by_another(saved, where).returncode == -ended_by
    assert saved.read_bytes() == before
    load(saved, tiny, *DATA)
    left = set(os.listdir(saved.parent)) - {saved.name}
    if where == "too long":  # safetensors may have a file of its own there
        left = {name for name in left if not name.startswith(".tmp")}
    (name,) = left
    assert name.endswith(".partial")
    with pytest.raises(CheckpointError, match="truncated or altered"):
        load(saved.parent / name, tiny, *DATA)


def test_a_disk_without_room(saved: Path) -> None:
    before = saved.read_bytes()
    found = saved_by_another(saved, "full")
    assert found.returncode == 0
    assert "`path` must be one that can be written to; got" in found.stdout
    assert "has room." in found.stdout
    assert os.listdir(saved.parent) == [saved.name]
    assert saved.read_bytes() == before
    load(saved, tiny, *DATA)


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    posterior = AutoSubnetLaplace(tiny).laplace_approximation(*DATA)
    with pytest.raises(CheckpointError, match="got the directory"):
        posterior.save(tmp_path)
    with pytest.raises(CheckpointError, match="Check that its directory is there"):
        posterior.save(tmp_path / "missing" / "posterior")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="can be written to"):
        posterior.save(tmp_path / "file" / "posterior")


def test_what_is_no_file_stays_what_it_is(tmp_path: Path) -> None:
    posterior = AutoSubnetLaplace(tiny).laplace_approximation(*DATA)
    pipe, link, circle = (tmp_path / name for name in ("pipe", "link", "circle"))
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    circle.symlink_to(circle)
    for path in (pipe, link):
        with pytest.raises(CheckpointError, match=r"regular file, .*got the pipe"):
            posterior.save(path)
        with pytest.raises(CheckpointError, match=r"regular file, .*got the pipe"):
            load(path, tiny, *DATA)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    with pytest.raises(CheckpointError, match=r"looked up; .*circle"):
        posterior.save(circle)
    assert circle.is_symlink()
    # Not saved to: were it replaced, the machine would be the worse for it.
    with pytest.raises(CheckpointError, match="got the device '/dev/null'"):
        load("/dev/null", tiny, *DATA)
    with pytest.raises(CheckpointError, match="null byte"):
        posterior.save("a\0b")


def test_a_link_to_nothing_is_a_new_name(tmp_path: Path) -> None:
    posterior = AutoSubnetLaplace(tiny).laplace_approximation(*DATA)
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "new")
    posterior.save(link)
    assert link.is_symlink()
    assert_close(load(tmp_path / "new", tiny, *DATA).loc, posterior.loc)


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_links_and_permissions(tmp_path: Path) -> None:
    posterior = AutoSubnetLaplace(tiny).laplace_approximation(*DATA)
    (tmp_path / "far").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "far" / "posterior")
    posterior.save(link)
    assert link.is_symlink()
    load(link, tiny, *DATA)
    plain = tmp_path / "plain"
    plain.write_text("")
    assert mode_of(link) == mode_of(plain)
    plain.chmod(0o640)
    posterior.save(plain)
    assert mode_of(plain) == 0o640


def test_tensors_that_share_memory_or_are_not_contiguous(tmp_path: Path) -> None:
    matrix = torch.arange(6.0).reshape(2, 3)
    tensors = {"a": matrix, "b": matrix[1], "c": matrix.T, "d": matrix[:0]}
    write_file(tmp_path / "file", "x", tensors, {})
    back, _ = read_file(tmp_path / "file", "x")
    identical(back, tensors)


def test_other_tools_can_read_it(saved: Path) -> None:
    with safe_open(saved, framework="numpy") as opened:
        content = json.loads(opened.metadata()["pyro_subnet"])
        assert "factor_and_ggn" in opened.keys()
    assert content["version"] == FORMAT_VERSION
    assert content["torch"] == str(torch.__version__)
