"""What an index, a forge and those who install will see: links, pins, workflows."""

from __future__ import annotations

import itertools
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = SETTINGS["project"]
URL = PROJECT["urls"]["Repository"]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CODE = re.compile(r"```.*?```", flags=re.DOTALL)
TARGETS = re.findall(
    r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE
)
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = [*WORKFLOWS, *(ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")]
HOOKS = ROOT / ".pre-commit-config.yaml"
LOCK = (ROOT / "constraints.txt").read_text(encoding="utf-8")
PINS = [Requirement(line) for line in LOCK.splitlines() if line[:1] not in {"#", " "}]
PAGES = [
    path
    for folder in (".", "docs", "docs/reference", "tutorials", "benchmarks")
    for path in sorted((ROOT / folder).iterdir())
    if path.suffix in {".md", ".rst", ".ipynb"}
]


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def on_an_index() -> str:
    """The README as the build changes it."""
    text = README
    hook = SETTINGS["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]
    for change in hook["substitutions"]:
        text = re.sub(change["pattern"], change["replacement"], text)
    return text


def test_links_on_an_index_are_whole_and_lead_to_files() -> None:
    found = re.findall(r"(!?)\[[^\]]*\]\(([^)]+)\)", CODE.sub("", on_an_index()))
    ours = [(mark, link) for mark, link in found if link.startswith(URL)]
    assert len(ours) > 10
    for mark, link in ours:
        kind = "raw" if mark else "blob"
        assert link.startswith(f"{URL}/{kind}/main/")
        assert (ROOT / link.split("/main/")[1].partition("#")[0]).is_file()
    for _, link in found:
        assert link.startswith("https://"), f"pyproject.toml leaves {link} as it is"


def test_code_on_an_index_is_that_of_the_readme() -> None:
    assert CODE.findall(on_an_index()) == CODE.findall(README)


def test_one_address_is_named() -> None:
    assert read(ROOT / "CITATION.cff")["repository-code"] == URL
    assert read(ROOT / "CITATION.cff")["license"] == PROJECT["license"]
    for link in PROJECT["urls"].values():
        assert link.startswith(URL)
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert set(re.findall(r"https://github\.com/[\w-]+/[\w-]+", text)) == {URL}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_nothing_is_installed_from_where_it_is_not(path: Path) -> None:
    """Until it is on PyPI; then README.md changes, and this test."""
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"install\s[^`\n]*\bpyro[-_]subnet\b", text)


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.name)
def test_forms_and_workflows_parse(path: Path) -> None:
    form = read(path)
    assert form["name"]
    # YAML 1.1 reads the key `on` as a truth value.
    assert form.get("body") or (form["jobs"] and form[True])


def steps(path: Path) -> list[dict[str, Any]]:
    return [step for job in read(path)["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_run_targets_of_the_makefile(path: Path) -> None:
    commands = [step["run"] for step in steps(path) if "run" in step]
    named = set(re.findall(r"\bmake ([a-z0-9-]+)", "\n".join(commands)))
    for job in read(path)["jobs"].values():
        named |= set(job.get("strategy", {}).get("matrix", {}).get("target", []))
    assert named
    assert named <= set(TARGETS), f"the Makefile lacks {sorted(named - set(TARGETS))}"


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_actions_are_pinned_to_a_major_version(path: Path) -> None:
    actions = [step["uses"] for step in steps(path) if "uses" in step]
    assert actions
    for action in actions:
        assert re.fullmatch(r"[\w./-]+@(release/)?v\d+", action), action


def test_every_python_is_tested() -> None:
    tests = read(ROOT / ".github" / "workflows" / "tests.yml")["jobs"]["test"]
    versions = tests["strategy"]["matrix"]["python"]
    named = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
    assert set(named) <= set(versions)
    assert PROJECT["requires-python"] == f">={versions[0]}"


def test_publishing_needs_no_token() -> None:
    jobs = read(ROOT / ".github" / "workflows" / "release.yml")["jobs"]
    assert jobs["publish"]["permissions"] == {"id-token": "write"}
    text = (ROOT / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8")
    assert "secrets." not in text
    # As the workflow looks for it.
    line = f'Repository = "{URL}"\n'
    assert line in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def pins(name: str) -> list[Requirement]:
    found = [pin for pin in PINS if canonicalize_name(pin.name) == name]
    return [pin for pin in found if pin.marker is None or pin.marker.evaluate()]


def test_hooks_run_the_ruff_of_the_lock() -> None:
    (ruff,) = pins("ruff")
    (repository,) = read(HOOKS)["repos"]
    hooks = {hook["id"]: hook for hook in repository["hooks"]}
    assert set(hooks) == {"ruff-check", "ruff-format", "mypy"}
    for name in ("ruff-check", "ruff-format"):
        assert hooks[name]["additional_dependencies"] == [str(ruff)]


@pytest.mark.parametrize(
    "line",
    [
        *SETTINGS["build-system"]["requires"],
        *PROJECT["dependencies"],
        *itertools.chain(*PROJECT["optional-dependencies"].values()),
    ],
)
def test_the_lock_has_a_version_in_every_range(line: str) -> None:
    need = Requirement(line)
    (pin,) = pins(canonicalize_name(need.name))
    (version,) = pin.specifier
    assert need.specifier.contains(version.version), f"run `make lock`: {pin}"


def test_the_lock_says_how_it_was_made() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "uv pip compile" in LOCK.splitlines()[1]
    recipe = makefile.partition("\nlock:")[2].partition("\n\n")[0].replace("\\\n", "")
    options = set(re.findall(r"--[a-z-]+", recipe)) - {"--quiet"}
    assert options == set(re.findall(r"--[a-z-]+", LOCK.splitlines()[1]))
