"""The site's pages are complete: public names, errors, modules, tables of contents.

Read from the sources, so that neither Sphinx nor the package is needed. `make docs`
holds the rest: that every name exists, and every link leads somewhere.
"""

from __future__ import annotations

import ast
import pydoc
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE, DOCS = ROOT / "pyro_subnet", ROOT / "docs"
GUIDES = {
    "AutoSubnetLaplace": "guides.map",
    "AutoSubnetMultivariateNormal": "guides.posterior",
}
NOT_SHOWN = {"exceptions.warn"}  # of use to the package alone


@cache
def tree(module: str) -> ast.Module:
    path = PACKAGE.joinpath(*module.split("."))
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(source.read_text(encoding="utf-8"))


def strings(module: str, variable: str) -> list[str] | None:
    """What a module's variable lists; None where there is no such variable."""
    for node in tree(module).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == variable:
            return list(ast.literal_eval(node.value))
    return None


def public_definitions(body: list[ast.stmt]) -> dict[str, ast.stmt]:
    kinds = (ast.ClassDef, ast.FunctionDef)
    found = {node.name: node for node in body if isinstance(node, kinds)}
    return {name: node for name, node in found.items() if not name.startswith("_")}


def names_of(module: str) -> list[str]:
    listed = strings(module, "__all__")
    return listed if listed is not None else list(public_definitions(tree(module).body))


def methods(module: str, name: str) -> Iterator[str]:
    """Public methods and properties of a class, those of bases of ours included."""
    definition = public_definitions(tree(module).body)[name]
    assert isinstance(definition, ast.ClassDef)
    yield from public_definitions(definition.body)
    bases = {ast.unparse(base) for base in definition.bases}
    for node in tree(module).body:
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith(
            "pyro_subnet."
        ):
            for imported in {alias.name for alias in node.names} & bases:
                yield from methods(str(node.module).partition(".")[2], imported)


def is_module(name: str) -> bool:
    path = PACKAGE / name
    return name.islower() and (path.is_dir() or path.with_suffix(".py").is_file())


def public_names() -> set[str]:
    package = names_of("")
    # Names that are imported when asked for stand in no `__all__`.
    names = {*package, *(strings("", "_NEEDS_ARVIZ") or ())}
    for space in filter(is_module, package):
        names |= {f"{space}.{name}" for name in names_of(space)}
    for guide, module in GUIDES.items():
        names |= {f"{guide}.{method}" for method in methods(module, guide)}
    return names - NOT_SHOWN


DIRECTIVE = re.compile(
    r"^\.\. auto(\w+):: pyro_subnet\.?(\S*)\n((?:   +:.*\n)*)", flags=re.MULTILINE
)


def documented(text: str) -> set[str]:
    """The names that a page's autodoc directives show."""
    found = set[str]()
    for kind, name, options in DIRECTIVE.findall(text):
        found.add(name)
        if kind == "module" and ":members:\n" in options:
            found |= {f"{name}.{member}" for member in names_of(name)}
    return found


NAMES = [
    line.split()[0]
    for path in sorted(DOCS.glob("inventories/*.inv"))
    for line in path.read_text(encoding="utf-8").splitlines()
    if not line.startswith("#")
]


@pytest.mark.parametrize("name", NAMES)
def test_names_of_other_projects_exist(name: str) -> None:
    assert pydoc.locate(name) is not None


def pages(folder: str) -> str:
    texts = [path.read_text(encoding="utf-8") for path in DOCS.glob(folder)]
    return "\n".join(texts)


def test_every_public_name_is_in_the_reference() -> None:
    missing = public_names() - documented(pages("reference/*.rst"))
    assert not missing, (
        f"docs/reference/ lacks {sorted(missing)}: add `.. autofunction::`, "
        "`.. autoclass::` or `.. automethod::` to one of its pages"
    )


def test_the_pages_show_classes_by_autodoc_alone() -> None:
    # What is documented by hand would not follow the sources.
    for path in (DOCS / "reference").glob("*.rst"):
        assert ".. py:" not in path.read_text(encoding="utf-8"), path.name


@pytest.mark.parametrize(
    "name",
    [
        "AutoSubnetLaplace.laplace_approximation",
        "AutoSubnetMultivariateNormal.hybrid_model",
        "AutoSubnetMultivariateNormal.with_prior_precision",
        "AutoSubnetMultivariateNormal.median",
        "AutoSubnetMultivariateNormal.save",
        "diagnostics.importance_check",
        "nn.bayesianize",
        "selection.LargestVariance",
        "Subnet",
    ],
)
def test_public_names_are_found_where_they_stand(name: str) -> None:
    assert name in public_names()


def test_a_name_that_is_missing_from_the_pages_is_found() -> None:
    text = pages("reference/*.rst")
    line = ".. automethod:: pyro_subnet.AutoSubnetMultivariateNormal.update\n"
    assert line in text
    lost = documented(text) - documented(text.replace(line, ""))
    assert lost == {"AutoSubnetMultivariateNormal.update"}
    assert lost <= public_names()


@pytest.mark.parametrize(
    "name",
    sorted(
        set(public_definitions(tree("exceptions").body))
        - {"shown", "users_frame", "warn"}
    ),
)
def test_every_error_has_a_section(name: str) -> None:
    page = (DOCS / "errors.md").read_text(encoding="utf-8")
    section = re.search(rf"^## `{name}`\n(.*?)(?=^## |\Z)", page, re.M | re.S)
    assert section is not None, f"docs/errors.md has no section `## `{name}``"
    assert len(section[1].split()) >= 8, f"docs/errors.md says too little of {name}"


def test_errors_md_names_no_other_errors() -> None:
    page = (DOCS / "errors.md").read_text(encoding="utf-8")
    sections = set(re.findall(r"^## `(\w+)`", page, flags=re.MULTILINE))
    assert sections <= set(public_definitions(tree("exceptions").body))


@pytest.mark.parametrize("page", ["concepts.md", "layout.md"])
def test_the_modules_that_a_page_names_are_there(page: str) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")
    known = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py")}
    # Within a folder that the text has named.
    known |= {path.rsplit("/", 1)[-1] for path in known}
    elsewhere = [*ROOT.glob("tests/**/*.py"), *DOCS.glob("*.py")]
    known |= {path.relative_to(ROOT).as_posix() for path in elsewhere}
    named = set(re.findall(r"`([\w/]+\.py)`", text))
    assert named
    assert named <= known, f"{page} names modules that are not there: {named - known}"
    folders = set(re.findall(r"`([\w/]+)/`", text))
    lost = {folder for folder in folders if not (PACKAGE / folder).is_dir()}
    lost -= {"tests", "docs/reference"}
    assert not lost, f"{page} names folders that are not there: {lost}"


@pytest.mark.parametrize("folder", ["", "reference/"])
def test_every_page_is_in_a_table_of_contents(folder: str) -> None:
    index = next((DOCS / folder).glob("index.*"))
    text = index.read_text(encoding="utf-8")
    listed = set(re.findall(r"^ *(?:[\w -]+<)?([\w-]+)>?$", text, flags=re.MULTILINE))
    there = {path.stem for path in (DOCS / folder).glob("*.[mr][ds]*")}
    missing = there - listed - {"index"}
    assert not missing, f"add {sorted(missing)} to a toctree of {index.name}"
