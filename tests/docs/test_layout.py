"""The page on the layout says what the code does: its picture, and the two ways."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule, PyroSample
from torch import Tensor, nn

import pyro_subnet
from pyro_subnet import AutoSubnetLaplace
from tests.cases import draw

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(pyro_subnet.__file__).parent
PAGE = (ROOT / "docs" / "layout.md").read_text(encoding="utf-8")


def script() -> ModuleType:
    path = ROOT / "docs" / "draw_layout.py"
    spec = importlib.util.spec_from_file_location("draw_layout", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_picture_is_that_of_the_imports() -> None:
    drawn = (ROOT / "docs" / "layout.svg").read_text(encoding="utf-8")
    assert drawn == script().drawing(), "run `python docs/draw_layout.py`"


def test_the_picture_shows_every_room_above_what_it_imports() -> None:
    module = script()
    graph = module.imports()
    levels = module.floors(graph)
    assert len(graph) > 15
    for room, below in graph.items():
        assert all(levels[room] > levels[other] for other in below)
        assert f"{room}/<" in module.drawing() or f"{room}.py<" in module.drawing()


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/layout.md"])
def test_the_pages_show_the_rooms_from_the_ground_up(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.findall(r"^\| `(\w+/?)` \| (.+?) \|$", text, flags=re.MULTILINE)
    module = script()
    holds = {
        f"{room}/" if (PACKAGE / room).is_dir() else room: module.holds(room).lower()
        for room in module.rooms()
    }
    assert {name: words.lower() for name, words in found} == holds
    order = [name.rstrip("/") for name, _ in found]
    for room, below in module.imports().items():
        assert all(order.index(other) < order.index(room) for other in below), room


class Network(PyroModule):
    """One hidden layer, and outputs that the routes to a Jacobian take differently."""

    def __init__(self, outputs: Callable[[Tensor], Tensor]):
        super().__init__()
        self.hidden = PyroModule[nn.Linear](2, 3)
        self.hidden.weight = PyroSample(dist.Normal(0.0, torch.ones(3, 2)).to_event(2))
        self.scale = PyroSample(dist.Normal(1.0, torch.ones(2)).to_event(1))
        self.outputs = outputs

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.hidden(x))[:, :2]
        return self.outputs(hidden * self.scale.sin())


def layered(f: Tensor) -> Tensor:
    return f


def wide(f: Tensor) -> Tensor:
    return f.repeat(1, 200)


def coupled(f: Tensor) -> Tensor:
    return f - f.mean(0)


def model(outputs: Callable[[Tensor], Tensor]) -> Callable[..., None]:
    net = Network(outputs)

    def of_data(x: Tensor, y: Tensor | None = None) -> None:
        logits = net(x)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(logits=logits), obs=y)

    return of_data


X, Y = draw(1, 3, 2).float(), torch.arange(3) % 2


def files_that_run(call: Callable[[], Any]) -> set[str]:
    """Files of the package of which any function runs, from its root."""
    seen: set[str] = set()

    def note(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            seen.add(frame.f_code.co_filename)

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return {
        path.relative_to(PACKAGE).as_posix()
        for path in map(Path, seen)
        if path.is_relative_to(PACKAGE)
    }


def named(section: str) -> list[str]:
    """Files and folders that the numbered list of a section names, in order."""
    text = re.search(rf"^## {section}\n(.*?)^(?:`|## )", PAGE, flags=re.M | re.S)
    assert text is not None
    return re.findall(r"`([\w/]+(?:\.py|/))`", text[1])


def test_a_fit_passes_the_files_that_the_page_names() -> None:
    def fits() -> None:
        for outputs, subnet, options in (
            (layered, None, {"form": "primal"}),
            (layered, None, {"covariance": "kron"}),
            (layered, {"hidden.weight": torch.arange(2)}, {"curvature": "hessian"}),
            (coupled, 0.5, {"form": "primal"}),
        ):
            guide = AutoSubnetLaplace(model(outputs), subnet, **options)
            guide.laplace_approximation(X, Y)
            pyro.clear_param_store()

    ran, files = files_that_run(fits), named("The way of a fit")
    assert len(files) > 15
    for file in files:
        assert any(path.startswith(file) for path in ran), file


def test_a_prediction_passes_the_files_that_the_page_names() -> None:
    def predicts() -> None:
        for outputs, link in ((layered, "bridge"), (wide, "probit")):
            posterior = AutoSubnetLaplace(model(outputs), 0.5).laplace_approximation(
                X, Y
            )
            posterior.predictive_distribution(X, link=link)
            pyro.clear_param_store()

    ran = files_that_run(predicts)
    files = named("The way of a prediction")
    assert len(files) > 6
    for file in files:
        assert any(path.startswith(file) for path in ran), file
