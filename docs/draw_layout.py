"""Draws docs/layout.svg, the rooms of the package, from its sources.

`python docs/draw_layout.py` writes the file; `tests/docs/test_layout.py` holds it to
the code. A room stands on the floor above all that it imports. An arrow is an import
for which no longer way of arrows stands.
"""

from __future__ import annotations

import ast
import graphlib
import html
import textwrap
from pathlib import Path

import grimp

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "pyro_subnet"
PICTURE = ROOT / "docs" / "layout.svg"
# Files at the top that hold names for others, and no idea of their own.
LEFT_OUT = {"__init__", "_version"}

WIDTH, BOX, HEIGHT, GAP, FLOOR = 960, 208, 76, 24, 122


def rooms() -> list[str]:
    """Folders of the package, and files at its top."""
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    files = {path.stem for path in PACKAGE.glob("*.py")}
    return sorted(folders | files - LEFT_OUT)


def holds(room: str) -> str:
    """What a room holds: the first sentence of its own words."""
    folder = PACKAGE / room
    path = folder / "__init__.py" if folder.is_dir() else PACKAGE / f"{room}.py"
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    sentence = " ".join((text or "").split("\n\n")[0].split()).partition(". ")[0]
    return sentence.rstrip(".").replace("`", "")


def imports() -> dict[str, set[str]]:
    """Rooms that each room imports from."""
    graph = grimp.build_graph(PACKAGE.name, cache_dir=None)
    names = {room: f"{PACKAGE.name}.{room}" for room in rooms()}
    for name in names.values():
        graph.squash_module(name)
    return {
        room: {
            other
            for other in names
            if other != room
            and graph.direct_import_exists(importer=name, imported=names[other])
        }
        for room, name in names.items()
    }


def floors(graph: dict[str, set[str]]) -> dict[str, int]:
    """Height of each room: above all that it imports."""
    found: dict[str, int] = {}
    for room in graphlib.TopologicalSorter(graph).static_order():
        found[room] = 1 + max((found[other] for other in graph[room]), default=-1)
    return found


def arrows(graph: dict[str, set[str]]) -> list[tuple[str, str]]:
    """Imports that no longer way stands for."""
    below: dict[str, set[str]] = {}
    for room in graphlib.TopologicalSorter(graph).static_order():
        below[room] = graph[room].union(*(below[other] for other in graph[room]))
    return [
        (room, other)
        for room in sorted(graph)
        for other in sorted(graph[room])
        if not any(other in below[between] for between in graph[room])
    ]


def places(graph: dict[str, set[str]]) -> dict[str, tuple[float, float]]:
    """Middle of each room's box: under those that import it, as far as that goes."""
    levels = floors(graph)
    found: dict[str, tuple[float, float]] = {}

    def wish(room: str) -> tuple[float, str]:
        above = [found[other][0] for other in graph if room in graph[other]]
        return (sum(above) / len(above) if above else WIDTH, room)

    for level in range(max(levels.values()), -1, -1):
        here = [room for room, own in levels.items() if own == level]
        left = WIDTH / 2 - (BOX + GAP) * (len(here) - 1) / 2
        y = GAP + HEIGHT / 2 + FLOOR * (max(levels.values()) - level)
        for index, room in enumerate(sorted(here, key=wish)):
            found[room] = (left + (BOX + GAP) * index, y)
    return found


def drawing() -> str:
    """The picture as SVG."""
    graph = imports()
    at = places(graph)
    bottom = max(y for _, y in at.values()) + HEIGHT / 2 + GAP
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom:g}"'
        ' font-family="sans-serif" role="img">',
        "<title>The rooms of pyro_subnet, and what each imports</title>",
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7"'
        ' markerHeight="7" orient="auto"><path d="M0 0 8 4 0 8z" fill="#667"/>'
        "</marker></defs>",
        f'<rect width="{WIDTH}" height="{bottom:g}" fill="#fff"/>',
    ]
    for room, other in arrows(graph):
        (x1, y1), (x2, y2) = at[room], at[other]
        start, stop = y1 + HEIGHT / 2, y2 - HEIGHT / 2
        bend = (stop - start) / 2
        lines.append(
            f'<path d="M{x1:g} {start:g}C{x1:g} {start + bend:g} {x2:g} '
            f'{stop - bend:g} {x2:g} {stop:g}" fill="none" stroke="#667"'
            ' stroke-width="1.3" marker-end="url(#head)"/>'
        )
    for room in sorted(at):
        x, y = at[room]
        is_folder = (PACKAGE / room).is_dir()
        name = f"{room}/" if is_folder else f"{room}.py"
        lines.append(
            f'<rect x="{x - BOX / 2:g}" y="{y - HEIGHT / 2:g}" width="{BOX}"'
            f' height="{HEIGHT}" rx="6" fill="{"#eef3fb" if is_folder else "#f6f6f2"}"'
            ' stroke="#889"/>'
        )
        lines.append(
            f'<text x="{x:g}" y="{y - 20:g}" text-anchor="middle" font-size="14"'
            f' font-weight="bold" fill="#223">{name}</text>'
        )
        for number, text in enumerate(textwrap.wrap(holds(room), 34)[:3]):
            lines.append(
                f'<text x="{x:g}" y="{y - 2 + 13 * number:g}" text-anchor="middle"'
                f' font-size="11" fill="#445">{html.escape(text)}</text>'
            )
    return "\n".join([*lines, "</svg>", ""])


if __name__ == "__main__":
    PICTURE.write_text(drawing(), encoding="utf-8")
