"""Files that are whole but wrong: an error of ours, or the numbers that were saved."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide.initialization import init_to_value
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from torch.testing import assert_close

from pyro_subnet import AutoSubnetLaplace, AutoSubnetMultivariateNormal
from pyro_subnet.exceptions import CheckpointError

X = torch.randn(5, 3, generator=torch.Generator().manual_seed(3)).double()
Y = X[:, 0] - X[:, 1]
AT = init_to_value(values={"w": X[:1], "b": X[0, :1]})
BATCHES = [(X[:2], Y[:2]), (X[2:4], Y[2:4]), (X[4:], Y[4:])]
ASKED_FOR: dict[str, dict[str, Any]] = {
    "primal": {"form": "primal"},
    "dual": {"form": "dual"},
    "diagonal": {"covariance": "diag"},
    "kronecker": {"covariance": "kron"},
}
each_form = pytest.mark.parametrize("form", ASKED_FOR)
Tensors = dict[str, Tensor]


def model(x: Tensor, y: Tensor | None = None) -> None:
    """A layer with a bias, so that there are two Kronecker blocks."""
    w = pyro.sample("w", dist.Normal(x.new_zeros(1, 3), 1.0).to_event(2))
    b = pyro.sample("b", dist.Normal(x.new_zeros(1), 2.0).to_event(1))
    mean = torch.nn.functional.linear(x, w, b).squeeze(-1)
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(mean, 0.5), obs=y)


def coupled(x: Tensor, y: Tensor | None = None) -> None:
    """A prior with dense columns."""
    scale = pyro.sample("scale", dist.LogNormal(x.new_zeros(()), 1.0))
    w = pyro.sample("w", dist.Normal(x.new_zeros(3), scale).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)


def read(path: Path) -> tuple[Tensors, dict[str, Any]]:
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
        return tensors, json.loads(file.metadata()["pyro_subnet"])


def seal(path: Path, tensors: Tensors, text: str) -> None:
    """Writes any tensors and text as a file whose SHA-256 is right."""
    raw = save(tensors, {"pyro_subnet": text, "sha256": "0" * 64})
    at = raw.index(b'"sha256":"' + b"0" * 64) + 10
    digest = hashlib.sha256(raw).hexdigest().encode()
    path.write_bytes(raw[:at] + digest + raw[at + 64 :])


def listed(tensors: Tensors, content: dict[str, Any]) -> str:
    """The content as it would be written with these tensors."""
    names = {name: [str(t.dtype), *t.shape] for name, t in tensors.items()}
    return json.dumps({**content, "tensors": names})


def spoilt(value: Any) -> Iterator[Any]:
    """Each part of JSON in turn as what it cannot be."""
    yield from (None, -1) if isinstance(value, dict | list) else ([], float("nan"))
    if isinstance(value, dict):
        for key, part in value.items():
            yield {name: other for name, other in value.items() if name != key}
            for bad in spoilt(part):
                yield {**value, key: bad}
    elif isinstance(value, list):
        for at, part in enumerate(value):
            for bad in spoilt(part):
                yield [*value[:at], bad, *value[at + 1 :]]


def replaced(tensor: Tensor) -> Iterator[Tensor | None]:
    """A tensor as what it cannot be; None for none."""
    yield None
    yield tensor.unsqueeze(0)
    if tensor.is_floating_point():
        yield tensor * torch.nan
        yield tensor.to(torch.complex64)
    else:
        yield tensor + 10**6
        yield -tensor.long() - 1
        yield tensor.double()


def numbers(posterior: AutoSubnetMultivariateNormal) -> Tensor:
    outputs = posterior.output_distribution(X)
    wider = posterior.with_prior_precision(2.0).output_distribution(X)
    evidence = posterior.log_marginal_likelihood().reshape(1)
    return torch.cat([*outputs.mean, *outputs.variance, *wider.variance, evidence])


def wrong_of(attempt: Callable[[], Tensor], right: Tensor) -> str | None:
    """What came of a file that is neither refused nor the one that was saved."""
    try:
        found = attempt()
    except CheckpointError:
        return None
    # Any other error is what is looked for.
    except Exception as error:
        return repr(error)
    same = torch.allclose(found, right, rtol=1e-12)
    return None if same else "other numbers"


@each_form
def test_posteriors_are_refused_or_right(form: str, tmp_path: Path) -> None:
    path = tmp_path / "posterior"
    guide = AutoSubnetLaplace(model, **ASKED_FOR[form])
    fitted = guide.laplace_approximation(X, Y).tune_prior_precision()
    fitted.save(path)
    tensors, content = read(path)
    right = numbers(fitted)

    def loaded() -> Tensor:
        return numbers(AutoSubnetMultivariateNormal.load(path, model, X, Y))

    assert_close(loaded(), right, rtol=0, atol=0)
    listing = content.pop("tensors")
    assert listing.keys() == tensors.keys()
    files: list[tuple[Tensors, str]] = [
        (tensors, json.dumps(bad)) for bad in spoilt(content)
    ]
    files.append((tensors, "[" * 10**5))
    for name, tensor in tensors.items():
        for other in replaced(tensor):
            rest = {key: part for key, part in tensors.items() if key != name}
            changed = rest if other is None else {**rest, name: other}
            files.append((changed, listed(changed, content)))
    wrong = []
    for changed, text in files:
        seal(path, changed, text)
        if found := wrong_of(loaded, right):
            wrong.append((found, text[:300]))
    assert not wrong


@each_form
def test_parts_that_do_not_belong_together(form: str, tmp_path: Path) -> None:
    path = tmp_path / "posterior"
    guide = AutoSubnetLaplace(model, **ASKED_FOR[form])
    guide.laplace_approximation(X, Y).save(path)
    tensors, content = read(path)
    content["prior_scale"] = 1.001
    seal(path, tensors, json.dumps(content))
    with pytest.raises(CheckpointError, match=f"belong together; got a {form} form"):
        AutoSubnetMultivariateNormal.load(path, model, X, Y)


@pytest.mark.parametrize(
    ("form", "name", "change"),
    [
        ("primal", "factor_and_ggn", lambda t: t.index_put(_at(1, 0), t[1, 0] + 1e-6)),
        ("primal", "factor_and_ggn", lambda t: t.index_put(_at(0, 1), t[0, 1] + 1e-6)),
        ("primal", "factor_and_ggn", lambda t: t.neg()),
        ("primal", "ggn_diagonal", lambda t: t * 1.001),
        ("primal", "prior_diagonal", lambda t: t * 1.001),
        ("dual", "rows", lambda t: t * 1.001),
        ("dual", "kernel_tril", lambda t: t * 1.001),
        ("dual", "scaled_prior", lambda t: t * 1.001),
        ("diagonal", "precision", lambda t: t * 1.001),
        ("diagonal", "ggn_diagonal", lambda t: t.neg()),
        ("kronecker", "kronecker_block_0_positions", lambda t: t.clamp(max=0)),
        ("kronecker", "kronecker_block_0_input_vectors", lambda t: t * 1.001),
        ("kronecker", "kronecker_block_0_input_values", lambda t: t - 100),
        ("kronecker", "kronecker_block_1_site", lambda t: t - 1),
        ("kronecker", "site_scales", lambda t: t * 1.001),
    ],
)
def test_a_tensor_of_another_posterior(
    form: str, name: str, change: Callable[[Tensor], Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "posterior"
    guide = AutoSubnetLaplace(model, **ASKED_FOR[form])
    guide.laplace_approximation(X, Y).save(path)
    tensors, content = read(path)
    seal(path, {**tensors, name: change(tensors[name])}, json.dumps(content))
    with pytest.raises(CheckpointError, match=r"must belong together; got a"):
        AutoSubnetMultivariateNormal.load(path, model, X, Y)


def _at(row: int, column: int) -> tuple[Tensor, Tensor]:
    return torch.tensor(row), torch.tensor(column)


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({"prior_coupled": lambda t: t + 1}, True),
        ({"prior_columns": lambda t: t * 1.01}, True),
        ({"prior_columns": lambda t: t}, False),
    ],
)
def test_a_prior_that_couples(
    change: dict[str, Callable[[Tensor], Tensor]], wrong: bool, tmp_path: Path
) -> None:
    path = tmp_path / "posterior"
    AutoSubnetLaplace(coupled).laplace_approximation(X, Y).save(path)
    tensors, content = read(path)
    changed = {name: of(tensors[name]) for name, of in change.items()}
    seal(path, {**tensors, **changed}, json.dumps(content))
    if wrong:
        with pytest.raises(CheckpointError, match="must belong together"):
            AutoSubnetMultivariateNormal.load(path, coupled, X, Y)
    else:
        AutoSubnetMultivariateNormal.load(path, coupled, X, Y)


def test_a_file_without_its_last_kronecker_block(tmp_path: Path) -> None:
    path = tmp_path / "posterior"
    guide = AutoSubnetLaplace(model, covariance="kron")
    guide.laplace_approximation(X, Y).save(path)
    tensors, content = read(path)
    assert "kronecker_block_1_site" in tensors
    for block, match in (
        ("1", "tensors that it lists"),
        ("0", "tensors that it lists"),
    ):
        rest = {n: t for n, t in tensors.items() if f"_block_{block}_" not in n}
        seal(path, rest, json.dumps(content))
        with pytest.raises(CheckpointError, match=match):
            AutoSubnetMultivariateNormal.load(path, model, X, Y)
    seal(path, rest, listed(rest, content))
    with pytest.raises(CheckpointError, match="must hold the tensors"):
        AutoSubnetMultivariateNormal.load(path, model, X, Y)


def test_a_map_outside_a_support(tmp_path: Path) -> None:
    path = tmp_path / "posterior"
    AutoSubnetLaplace(coupled).laplace_approximation(X, Y).save(path)
    tensors, content = read(path)
    tensors["loc"][0] = 1e4  # whose exponential is infinite
    seal(path, tensors, json.dumps(content))
    with pytest.raises(CheckpointError, match="'scale' must lie in its support"):
        AutoSubnetMultivariateNormal.load(path, coupled, X, Y)


class Stop(Exception):
    """What ends a fit."""


def stopping() -> Iterator[Any]:
    yield from BATCHES[:2]
    raise Stop("stopped")


class Batches:
    """Batches that end in an exception, in every pass but the first."""

    def __iter__(self) -> Iterator[Any]:
        return stopping()


FITS = {**ASKED_FOR, "ggn-mc": {"curvature": "ggn-mc"}}


@pytest.mark.parametrize("kind", FITS)
def test_fits_are_refused_or_right(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "fit"

    def guide() -> AutoSubnetLaplace:
        pyro.clear_param_store()
        made = AutoSubnetLaplace(model, init_loc_fn=AT, **FITS[kind])
        made(X, Y)
        return made

    with pytest.raises(Stop, match="stopped"):
        guide().laplace_approximation_from(
            Batches(), checkpoint=path, checkpoint_every=1
        )
    tensors, content = read(path)
    whole = path.read_bytes()
    state = torch.get_rng_state()

    def resumed() -> Tensor:
        torch.set_rng_state(state)
        made = guide().laplace_approximation_from(
            BATCHES, checkpoint=path, checkpoint_every=1
        )
        return numbers(made)

    right = resumed()
    listing = content["tensors"]
    # The versions, and the fit's identity, are compared and not read.
    told = copy.deepcopy({key: content[key] for key in ("sums", "done", "batches")})
    files = [
        (tensors, json.dumps({**content, **bad}))
        for bad in spoilt(told)
        if isinstance(bad, dict)
    ]
    files += [(tensors, json.dumps({**content, "identity": bad})) for bad in (None, {})]
    for name, tensor in tensors.items():
        for other in replaced(tensor):
            rest = {key: part for key, part in tensors.items() if key != name}
            if other is None:  # a sum of nothing has none, so that the list must tell
                files.append((rest, json.dumps({**content, "tensors": listing})))
            else:
                changed = {**rest, name: other}
                files.append((changed, listed(changed, content)))
    wrong = []
    for changed, text in files:
        seal(path, changed, text)
        if found := wrong_of(resumed, right):
            wrong.append((found, text[-600:]))
    assert not wrong
    path.write_bytes(whole)
    assert_close(resumed(), right, rtol=0, atol=0)
