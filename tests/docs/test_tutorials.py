"""What the notebooks must hold as committed, and that their runner is strict.

Their smoke runs take minutes: `make tutorials`, which CI calls.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nbformat
import pytest

from tutorials.run import NOTEBOOKS, TutorialError, execute, save

FOLDER = Path(__file__).resolve().parents[2] / "tutorials"
MOST_BYTES = 1_000_000  # with pictures of two dots for one of a page


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


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_it_ends_in_asserts_of_its_claims(name: str) -> None:
    claims = [
        node
        for node in ast.walk(ast.parse(code_cells(name)[-1].source))
        if isinstance(node, ast.Assert)
    ]
    assert len(claims) >= 3
    # Not of constants: each looks at something that the notebook computed.
    for claim in claims:
        assert any(isinstance(node, ast.Name) for node in ast.walk(claim.test))


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


def notebook(path: Path, sources: Sequence[str]) -> Path:
    """A notebook of code cells, each with an output of an earlier run."""
    old = nbformat.v4.new_output("stream", name="stdout", text="old\n")
    cells = [
        nbformat.v4.new_code_cell(source, outputs=[old], metadata={"tags": ["x"]})
        for source in sources
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


# A kernel's sockets, and its event loop, are closed by the garbage collector; one that
# is killed in the middle of a cell leaves threads that still listen to it.
in_kernel = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning",
    "ignore::pytest.PytestUnhandledThreadExceptionWarning",
)
MODE = "import os; print(os.environ.get('SMOKE_TEST'))"


@in_kernel
@pytest.mark.parametrize(("smoke", "found"), [(True, "1\n"), (False, "None\n")])
def test_a_notebook_knows_its_mode(
    tmp_path: Path, smoke: bool, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMOKE_TEST", "of the caller")
    path = notebook(tmp_path / "n.ipynb", [MODE, "import pathlib; pathlib.Path.cwd()"])
    ran, seconds = execute(path, smoke=smoke, limit=60)
    assert [output.text for output in ran.cells[0].outputs] == [found]
    assert str(tmp_path) in ran.cells[1].outputs[0].data["text/plain"]
    assert 0 < seconds < 60


@in_kernel
def test_a_claim_that_fails_is_an_error(tmp_path: Path) -> None:
    path = notebook(tmp_path / "n.ipynb", ["x = 1", "assert x == 2", "never = 1"])
    with pytest.raises(TutorialError, match=r"(?s)`n.ipynb` must run to its.*x == 2"):
        execute(path, smoke=True, limit=60)


@in_kernel
def test_a_notebook_that_takes_too_long_is_an_error(tmp_path: Path) -> None:
    path = notebook(tmp_path / "n.ipynb", ["x = 1", "import time; time.sleep(60)"])
    with pytest.raises(TutorialError, match=r"`n.ipynb` must run within 3 s"):
        execute(path, smoke=True, limit=3)


@in_kernel
def test_a_saved_notebook_has_its_new_outputs_alone(tmp_path: Path) -> None:
    path = notebook(tmp_path / "n.ipynb", ["print(1 + 1)", "y = 2"])
    ran, _ = execute(path, smoke=False, limit=60)
    save(ran, path)
    found = nbformat.read(path, as_version=4)
    assert [cell.execution_count for cell in found.cells] == [1, 2]
    assert [len(cell.outputs) for cell in found.cells] == [1, 0]
    assert found.cells[0].outputs[0].text == "2\n"
    assert found.cells[0].metadata == {}
    assert found.metadata.language_info == {"name": "python"}


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
