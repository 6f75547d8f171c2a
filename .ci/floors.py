"""Prints the lowest versions that pyproject.toml allows, one pin a line.

They are of what the package and its extras `dev` and `tutorials` need. Arguments are
pins to take instead, such as `torch==2.13.0` where the lowest has no build; an empty
one is none.
"""

from __future__ import annotations

import sys
from pathlib import Path

from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]


def floors(lines: list[str]) -> dict[str, str]:
    """``{name: "name==floor"}`` of requirements such as "numpy>=1.24"."""
    found = {}
    for need in map(Requirement, lines):
        bounds = {bound.operator: bound.version for bound in need.specifier}
        found[need.name] = f"{need.name}=={bounds.get('>=') or bounds['==']}"
    return found


def main(instead: list[str]) -> None:
    """Prints the pins."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    project = tomllib.loads(text)["project"]
    extras = project["optional-dependencies"]
    needs = [*project["dependencies"], *extras["dev"], *extras["tutorials"]]
    pins = floors(needs) | floors([pin for pin in instead if pin])
    print("\n".join(sorted(pins.values())))


if __name__ == "__main__":
    main(sys.argv[1:])
