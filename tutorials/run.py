"""Runs the tutorials' notebooks: short, as a check, or whole, to keep their outputs.

    python tutorials/run.py --smoke                # all of them, fewer steps and draws
    python tutorials/run.py --save 5-arviz-workflow  # one, whole, outputs written back

With ``--smoke`` the parameters of a notebook, which are the assignments in its cells
tagged ``parameters``, are set to what ``SMOKE`` names, and cells tagged
``full-run-only`` are left out; all other claims are asserted all the same. A notebook
that fails, takes longer than it may, or lacks a parameter of ``SMOKE`` is an error.

CONTRIBUTING.md says how a notebook is written, and why this is not nbmake or papermill.
"""

from __future__ import annotations

import argparse
import ast
import base64
import os
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from PIL import Image

FOLDER = Path(__file__).resolve().parent
# In the order to read them. A notebook that is not here is never run: a test compares.
NOTEBOOKS = (
    "1-quickstart",
    "2-in-between-uncertainty",
    "3-choosing-the-subnet",
    "4-pretrained-cnn",
    "5-arviz-workflow",
    "6-when-to-trust-it",
    "7-coming-from",
    "8-fine-tuned-transformer",
    "9-bayesian-optimization",
)
# Parameters of a smoke run, by notebook: less work, and limits of claims that less work
# cannot keep.
SMOKE: dict[str, dict[str, Any]] = {
    "1-quickstart": {"NUM_STEPS": 500, "NUM_DIGIT_STEPS": 300, "NUM_DRAWS": 200},
    "2-in-between-uncertainty": {
        "NUM_NUTS": 60,
        "NUM_WARMUP": 40,
        "NUM_CHECKS": 200,
        "MOST_NUTS_ERROR": 0.5,
    },
    "3-choosing-the-subnet": {
        "NUM_STEPS": 250,
        "NUM_TABLE_STEPS": 200,
        "NUM_TABLES": 2,
        "EVERY": 12,
        "SIZES": [0.01, 0.1],
        "SUBSPACE": False,
        "TILTS": [-30, 0, 30],
        "ROTATIONS": [0, 30, 60, 90],
    },
    "4-pretrained-cnn": {
        "NUM_EPOCHS": 10,
        "NUM_DRAWS": 100,
        "ROTATIONS": [0, 15, 90],
        "NOISES": [0, 0.2, 0.6],
        "BLURS": [0, 0.6, 1.5],
        "INKS": [0, 0.2, 0.6],
    },
    "5-arviz-workflow": {
        "NUM_STEPS": 800,
        "NUM_NUTS": 150,
        "NUM_WARMUP": 30,
        "MOST_SHIFT": 0.9,
    },
    "6-when-to-trust-it": {
        "NUM_STEPS": 500,
        "NUM_CHECKS": 500,
        "NUM_NUTS": 40,
        "NUM_WARMUP": 20,
        "MOST_K_HAT": 0.9,
    },
    "7-coming-from": {"NUM_DIGIT_STEPS": 200},
    "8-fine-tuned-transformer": {
        "BACKBONE_EPOCHS": 1,
        "EPOCHS": 5,
        "PASSES": 5,
        "EVERY": 6,
    },
    "9-bayesian-optimization": {
        "NUM_SEEDS": 2,
        "NUM_STEPS": 2,
        "NUM_EPOCHS": 60,
        "NUM_WAVES": 1,
        "WAVE_DATA": 40,
        "WORKERS": 1,
    },
}
PARAMETERS, FULL_RUN_ONLY = "parameters", "full-run-only"  # tags of cells
# Seconds of a notebook; an idle machine takes a fifth, a busy one should not fail.
SMOKE_LIMIT = 300
LIMIT = 900
# A kernel warns of its own, local connection. Pictures have two dots for one of a page.
KERNEL = ["--log-level=ERROR", "--InlineBackend.figure_formats=retina"]


class TutorialError(RuntimeError):
    """A notebook did not run to its end."""


def tags(cell: Any) -> list[str]:
    """The tags of a cell; none is an empty list."""
    return list(cell.metadata.get("tags", ()))


def parameters(cell: Any) -> dict[str, Any]:
    """Names and values that a cell tagged ``parameters`` assigns; of others none.

    Raises:
        TutorialError: If it holds anything but ``NAME = literal``.
    """
    found: dict[str, Any] = {}
    for statement in ast.parse(cell.source).body if PARAMETERS in tags(cell) else ():
        try:
            (target,) = statement.targets  # type: ignore[attr-defined]
            found[target.id] = ast.literal_eval(statement.value)  # type: ignore[attr-defined]
        except (AttributeError, ValueError) as error:
            raise TutorialError(
                f"A cell tagged `{PARAMETERS}` must hold `NAME = literal` alone; got "
                f"`{ast.unparse(statement)}`. Move it to another cell."
            ) from error
    return found


def set_parameters(notebook: Any, values: Mapping[str, Any]) -> None:
    """Puts a cell with new values after each that assigns some of these parameters.

    Raises:
        TutorialError: If the notebook does not have one of them.
    """
    cells: list[Any] = []
    missing = set(values)
    for cell in notebook.cells:
        cells.append(cell)
        names = [name for name in parameters(cell) if name in values]
        if names:
            lines = [f"{name} = {values[name]!r}" for name in names]
            cells.append(nbformat.v4.new_code_cell("\n".join(lines)))
            missing -= set(names)
    if missing:
        raise TutorialError(
            f"A parameter must be assigned in a cell tagged `{PARAMETERS}`; there is "
            f"no {', '.join(sorted(missing))}. Name it as the notebook does."
        )
    notebook.cells = cells


def execute(
    path: Path, *, limit: float, smoke: Mapping[str, Any] | None = None
) -> tuple[Any, float]:
    """Runs a notebook in a kernel of its own, in the notebook's folder.

    Args:
        path: Of the notebook.
        limit: Of the whole run, in seconds.
        smoke: Parameters of a smoke run, which leaves out cells tagged
            ``full-run-only``; None for a whole run.

    Returns:
        The notebook with its new outputs, and how long it took, in seconds.

    Raises:
        TutorialError: If a cell fails, the time is over, or a parameter is not there.
            The message ends with the cell and its traceback.
    """
    notebook = nbformat.read(path, as_version=4)
    try:
        set_parameters(notebook, smoke or {})
    except TutorialError as error:
        raise TutorialError(f"`{path.name}`: {error}") from error
    client = NotebookClient(
        notebook,
        timeout=limit,
        record_timing=False,
        skip_cells_with_tag="" if smoke is None else FULL_RUN_ONLY,
        coalesce_streams=True,
        extra_arguments=KERNEL,
        resources={"metadata": {"path": str(path.parent)}},
    )
    start = time.perf_counter()
    # tqdm warns of bars that it could draw, had it ipywidgets; no bar is wanted here.
    environment = {**os.environ, "PYTHONWARNINGS": "ignore:IProgress not found"}
    try:
        with client.setup_kernel(env=environment):
            for index, cell in enumerate(notebook.cells):
                client.timeout = max(1, round(limit - (time.perf_counter() - start)))
                client.execute_cell(cell, index)
    except CellTimeoutError as error:
        raise TutorialError(
            f"`{path.name}` must run within {limit:g} s; it did not. Take fewer steps, "
            f"in a smoke run by SMOKE in tutorials/run.py.\n{error}"
        ) from error
    except (CellExecutionError, DeadKernelError) as error:
        raise TutorialError(f"`{path.name}` must run to its end.\n{error}") from error
    return notebook, time.perf_counter() - start


def smaller(picture: str) -> str:
    """A PNG, in base64, with a palette of 256 colours: a third of the bytes."""
    buffer = BytesIO()
    with Image.open(BytesIO(base64.b64decode(picture))) as image:
        # By coverage, so that a thin line keeps its colour beside a large surface; then
        # by means, so that a large one keeps its own.
        by_coverage = Image.Quantize.MAXCOVERAGE
        few = image.convert("RGB").quantize(256, method=by_coverage, kmeans=2)
    few.save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def save(notebook: Any, path: Path) -> None:
    """Writes a notebook without what differs from machine to machine; tags stay."""
    for output in (out for cell in notebook.cells for out in cell.get("outputs", ())):
        if "image/png" in output.get("data", {}):
            output.data["image/png"] = smaller(output.data["image/png"])
    notebook.metadata = {
        "kernelspec": {
            "display_name": "Python 3",
            "language": "python",
            "name": "python3",
        },
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        cell.metadata = {"tags": tags(cell)} if tags(cell) else {}
    nbformat.write(notebook, path)


def run(name: str, options: argparse.Namespace) -> str | None:
    """Runs one notebook and says how long it took; returns what went wrong."""
    path = options.folder / f"{name}.ipynb"
    limit = SMOKE_LIMIT if options.smoke else LIMIT
    try:
        smoke = SMOKE.get(name, {}) if options.smoke else None
        notebook, seconds = execute(path, limit=limit, smoke=smoke)
    except TutorialError as error:
        return str(error)
    if options.save:
        save(notebook, path)
    print(f"{name}: {seconds:.0f} s", flush=True)
    return None


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=NOTEBOOKS, metavar="NAME")
    parser.add_argument("--smoke", action="store_true", help="fewer steps and draws")
    parser.add_argument("--save", action="store_true", help="write the outputs back")
    parser.add_argument("--workers", type=int, default=1, help="notebooks at a time")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of the notebooks")
    options = parser.parse_args(arguments)
    if options.smoke and options.save:
        parser.error("--save keeps the outputs of a whole run; leave --smoke out")
    missing = [
        name
        for name in options.names
        if not (options.folder / f"{name}.ipynb").exists()
    ]
    if missing:
        parser.error(f"no such notebook: {', '.join(missing)}; one of {NOTEBOOKS}")
    with ThreadPoolExecutor(options.workers) as pool:
        failures = list(pool.map(lambda name: run(name, options), options.names))
    for failure in filter(None, failures):
        print(failure, file=sys.stderr)
    if any(failures):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
