"""What the notebooks must hold as committed, and that their runner is strict.

Their smoke runs take minutes: `make tutorials`, which CI calls.
"""

from __future__ import annotations

import ast
import base64
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
from PIL import Image

from tutorials.run import (
    FULL_RUN_ONLY,
    NOTEBOOKS,
    PARAMETERS,
    SMOKE,
    TutorialError,
    execute,
    parameters,
    save,
    set_parameters,
    smaller,
    tags,
)

FOLDER = Path(__file__).resolve().parents[2] / "tutorials"
MOST_BYTES = 1_000_000  # with pictures of two dots for one of a page
MOST_COLUMNS = 100  # of a printed line; the site wraps longer ones
HIDDEN = "remove-cell"  # myst-nb leaves such cells out of the site


def read(name: str) -> Any:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def code_cells(name: str) -> list[Any]:
    return [cell for cell in read(name).cells if cell.cell_type == "code"]


def test_every_notebook_is_run() -> None:
    there = sorted(path.stem for path in FOLDER.glob("**/*.ipynb"))
    assert there == sorted(NOTEBOOKS)


def test_the_order_is_that_of_their_numbers() -> None:
    assert [int(name.split("-")[0]) for name in NOTEBOOKS] == list(
        range(1, len(NOTEBOOKS) + 1)
    )


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_it_is_committed_as_a_whole_run_left_it(name: str) -> None:
    cells = code_cells(name)
    counts = [cell.execution_count for cell in cells]
    assert counts == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert {output.output_type for output in outputs} <= {
        "stream",
        "display_data",
        "execute_result",
    }
    # Warnings and progress bars go there; a warning that matters is shown on purpose.
    assert not [out for out in outputs if out.get("name") == "stderr"]
    text = str(outputs)
    assert not re.findall(r"(?<![\w.])/(?:home|root|tmp|work|Users)/", text)
    # A cell that ends in a plotting call shows the object, at some address, too.
    assert not re.findall(r"<matplotlib|Text\(| at 0x", text)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_it_says_what_it_rests_on(name: str) -> None:
    first = read(name).cells[0]
    assert first.cell_type == "markdown"
    assert first.source.startswith("# ")
    for word in ("Data:", "Seed:", "Time:"):
        assert word in first.source


def claims(cell: Any) -> list[ast.Assert]:
    nodes = ast.walk(ast.parse(cell.source))
    return [node for node in nodes if isinstance(node, ast.Assert)]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_it_ends_in_asserts_of_its_claims(name: str) -> None:
    cells = code_cells(name)
    assert claims(cells[-1])
    in_both_runs = [cell for cell in cells if FULL_RUN_ONLY not in tags(cell)]
    assert len(claims(in_both_runs[-1])) >= 3
    # Not of constants: each looks at something that the notebook computed.
    for claim in (claim for cell in cells for claim in claims(cell)):
        assert any(isinstance(node, ast.Name) for node in ast.walk(claim.test))


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_readers_of_the_site_see_no_checks(name: str) -> None:
    cells = read(name).cells
    checks = [k for k, cell in enumerate(cells) if "assert " in cell.source]
    for cell in (cells[k] for k in checks):
        assert HIDDEN in tags(cell)
        assert not cell.outputs
    # What is hidden holds checks or their limits, all of it at the end, after a note.
    hidden = [k for k, cell in enumerate(cells) if HIDDEN in tags(cell)]
    assert hidden == list(range(hidden[0], len(cells)))
    for k in set(hidden) - set(checks):
        assert parameters(cells[k])
    assert "The claims of this page are checked" in cells[hidden[0] - 1].source
    for cell in cells:
        assert not re.search(r"SMOKE|smoke|os\.environ", cell.source)
        assert set(tags(cell)) <= {HIDDEN, PARAMETERS, FULL_RUN_ONLY}


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_parameters_come_first_and_smoke_runs_set_some(name: str) -> None:
    first, *rest = code_cells(name)
    assert PARAMETERS in tags(first)
    assert HIDDEN not in tags(first)
    shown, limits = parameters(first), {}
    for cell in rest:
        assert not parameters(cell) or HIDDEN in tags(cell)
        limits |= parameters(cell)
    assert "SEED" in shown
    assert not shown.keys() & limits.keys()
    whole = shown | limits
    assert SMOKE[name].keys() <= whole.keys()
    for parameter, value in SMOKE[name].items():
        assert type(value) is type(whole[parameter])
        assert value != whole[parameter]
    # A parameter that nothing reads would do nothing.
    sources = "\n".join(cell.source for cell in rest if not parameters(cell))
    read_names = {n.id for n in ast.walk(ast.parse(sources)) if isinstance(n, ast.Name)}
    assert whole.keys() <= read_names


def test_smoke_runs_are_of_notebooks() -> None:
    assert tuple(SMOKE) == NOTEBOOKS


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_its_pictures_are_alike(name: str) -> None:
    """Two dots for one of a page, at the size that pages have, in named colours."""
    for cell in code_cells(name):
        assert "figure.dpi" not in cell.source
        assert not re.search(r"#[0-9A-Fa-f]{6}\b", cell.source)
        for output in cell.outputs:
            if "image/png" in output.get("data", {}):
                assert output.metadata["image/png"].keys() == {"height", "width"}


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_its_words_and_lines_are_plain(name: str) -> None:
    text = "\n".join(cell.source for cell in read(name).cells)
    assert not re.findall(r"\b(?:datum|dead|dear|asleep|wakes? up)\b", text)
    outputs = [output for cell in code_cells(name) for output in cell.outputs]
    lines = "".join(output.get("text", "") for output in outputs).splitlines()
    assert not [line for line in lines if len(line) > MOST_COLUMNS]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_it_loads_quickly(name: str) -> None:
    assert (FOLDER / f"{name}.ipynb").stat().st_size < MOST_BYTES


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_its_links_lead_somewhere(name: str) -> None:
    text = "\n".join(c.source for c in read(name).cells if c.cell_type == "markdown")
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if "://" not in target:
            assert (FOLDER / target).is_file(), target


def test_the_readme_names_each_by_its_title() -> None:
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    for name in NOTEBOOKS:
        title = read(name).cells[0].source.splitlines()[0].removeprefix("# ")
        assert f"[{title}]({name}.ipynb)" in readme


def notebook(path: Path, sources: Sequence[str] | Mapping[str, list[str]]) -> Path:
    """A notebook of code cells with tags, each with an output of an earlier run."""
    old = nbformat.v4.new_output("stream", name="stdout", text="old\n")
    tagged = sources if isinstance(sources, Mapping) else {key: [] for key in sources}
    cells = [
        nbformat.v4.new_code_cell(
            source, outputs=[old], metadata={"tags": found, "x": 1}
        )
        for source, found in tagged.items()
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


# A kernel's sockets, and its event loop, are closed by the garbage collector; one that
# is killed in the middle of a cell leaves threads that still listen to it.
in_kernel = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning",
    "ignore::pytest.PytestUnhandledThreadExceptionWarning",
)


@in_kernel
@pytest.mark.parametrize(
    ("smoke", "found"), [({"STEPS": 2}, ["2 9\n"]), (None, ["5 9\n", "whole\n"])]
)
def test_a_smoke_run_sets_parameters_and_leaves_cells_out(
    tmp_path: Path, smoke: dict[str, Any] | None, found: list[str]
) -> None:
    path = notebook(
        tmp_path / "n.ipynb",
        {
            "STEPS = 5\nDRAWS = 9": [PARAMETERS],
            "print(STEPS, DRAWS)": [],
            "import pathlib; pathlib.Path.cwd()": [],
            "print('whole')": [FULL_RUN_ONLY],
        },
    )
    ran, seconds = execute(path, smoke=smoke, limit=60)
    outputs = [out for cell in ran.cells for out in cell.outputs]
    texts = [out.text for out in outputs if out.get("text", "old\n") != "old\n"]
    assert texts == found
    (folder,) = [out.data["text/plain"] for out in outputs if "data" in out]
    assert str(tmp_path) in folder
    assert 0 < seconds < 60


def test_a_parameter_that_no_notebook_has_is_an_error(tmp_path: Path) -> None:
    cells = {"STEPS = 5": [PARAMETERS], "DRAWS = 9": [], "LIMIT = 0.1": [PARAMETERS]}
    path = notebook(tmp_path / "n.ipynb", cells)
    with pytest.raises(TutorialError, match=r"`n.ipynb`: A parameter .* no DRAWS, X"):
        execute(path, smoke={"X": 1, "STEPS": 2, "DRAWS": 3}, limit=60)
    found = nbformat.read(path, as_version=4)
    set_parameters(found, {"LIMIT": 0.2, "STEPS": 2})
    assert [cell.source for cell in found.cells] == [
        *("STEPS = 5", "STEPS = 2"),
        *("DRAWS = 9", "LIMIT = 0.1", "LIMIT = 0.2"),
    ]


@pytest.mark.parametrize(
    "line", ["import os", "STEPS = 2 * N", "A, B = 1, 2", "a.b = 1"]
)
def test_parameters_are_literals(line: str) -> None:
    cell = nbformat.v4.new_code_cell(line, metadata={"tags": [PARAMETERS]})
    message = rf"must hold `NAME = literal` alone; got `\(?{re.escape(line[:5])}"
    with pytest.raises(TutorialError, match=message):
        parameters(cell)


@in_kernel
def test_a_claim_that_fails_is_an_error(tmp_path: Path) -> None:
    path = notebook(tmp_path / "n.ipynb", ["x = 1", "assert x == 2", "never = 1"])
    with pytest.raises(TutorialError, match=r"(?s)`n.ipynb` must run to its.*x == 2"):
        execute(path, smoke={}, limit=60)


@in_kernel
def test_a_notebook_that_takes_too_long_is_an_error(tmp_path: Path) -> None:
    path = notebook(tmp_path / "n.ipynb", ["x = 1", "import time; time.sleep(60)"])
    with pytest.raises(TutorialError, match=r"`n.ipynb` must run within 3 s"):
        execute(path, smoke={}, limit=3)


@in_kernel
def test_a_saved_notebook_has_its_new_outputs_alone(tmp_path: Path) -> None:
    path = notebook(tmp_path / "n.ipynb", {"print(1 + 1)": [], "y = 2": [HIDDEN]})
    ran, _ = execute(path, limit=60)
    save(ran, path)
    found = nbformat.read(path, as_version=4)
    assert [cell.execution_count for cell in found.cells] == [1, 2]
    assert [len(cell.outputs) for cell in found.cells] == [1, 0]
    assert found.cells[0].outputs[0].text == "2\n"
    assert [cell.metadata for cell in found.cells] == [{}, {"tags": [HIDDEN]}]
    assert found.metadata.language_info == {"name": "python"}


def test_a_saved_picture_is_smaller_and_looks_the_same() -> None:
    shade = np.linspace(0, 255, 400 * 300).reshape(300, 400)
    colours = np.stack([shade, shade[::-1], shade / 2], axis=-1).astype(np.uint8)
    colours[150:152] = (213, 94, 0)  # a thin line
    buffer = BytesIO()
    Image.fromarray(colours).save(buffer, "PNG")
    before = base64.b64encode(buffer.getvalue()).decode()
    after = smaller(before)
    assert len(after) < 0.8 * len(before)
    with Image.open(BytesIO(base64.b64decode(after))) as image:
        found = np.asarray(image.convert("RGB"), dtype=int)
    assert found.shape == colours.shape
    assert np.abs(found - colours).max() < 10


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(FOLDER / "run.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_one_failure_fails_the_run(tmp_path: Path) -> None:
    notebook(tmp_path / "good.ipynb", ["x = 1"])
    bad = notebook(tmp_path / "bad.ipynb", ["x = 1", "assert x == 2"]).read_bytes()
    folder = ("--folder", str(tmp_path))
    ended = run("--save", *folder, "bad", "good")
    assert ended.returncode == 1
    assert re.fullmatch(r"good: \d+ s\n", ended.stdout)
    assert "assert x == 2" in ended.stderr
    assert (tmp_path / "bad.ipynb").read_bytes() == bad
    assert run("--smoke", *folder, "good").returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("no-such",), "no such notebook: no-such"),
        (("--smoke", "--save"), "--save keeps the outputs of a whole run"),
    ],
)
def test_a_wrong_call_is_refused(arguments: tuple[str, ...], message: str) -> None:
    ended = run(*arguments)
    assert ended.returncode == 2
    assert message in ended.stderr
