"""Holds the code to its conventions by reading it: classes, asserts, comparisons.

The tables come first. Each check is a function from a syntax tree to what it finds, and
is itself tested on code that breaks its rule. Who may import whom stands in
pyproject.toml, for import-linter.
"""

from __future__ import annotations

import ast
import graphlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import grimp
import pytest

MAX_TOP_FILES = 8
# Files on the longest way along imports.
MAX_CHAIN = 16
# Lines of a file that are neither blank nor prose: docstrings make a file no harder.
MAX_LINES = 300
COMPARISONS = {"allclose", "array_equal", "equal", "isclose"}
# Private names of Pyro's on which its guides' users rely, and of torch's and
# matplotlib's that nothing public tells.
FOREIGN_PRIVATE = {
    "_loc_scale",
    "_setup_prototype",
    "_forward_hooks",
    "_forward_pre_hooks",
    "_global_forward_pre_hooks",
    "_pytree",
    "_unscaled_dash_pattern",
    "_validate_args",
}
EXITS = {"exit", "quit", "sys.exit", "os._exit"}

PACKAGE = "pyro_subnet"
ROOT = Path(__file__).resolve().parents[1]
PACKAGE_FILES = sorted((ROOT / PACKAGE).rglob("*.py"))
TEST_FILES = sorted((ROOT / "tests").rglob("*.py"))
ALL_FILES = [
    *PACKAGE_FILES,
    *TEST_FILES,
    *sorted((ROOT / "tutorials").rglob("*.py")),
    *sorted((ROOT / "benchmarks").rglob("*.py")),
]

Finding = tuple[int, str]
Check = Callable[[ast.AST], Iterator[Finding]]


def label(path: Path) -> str:
    """Path from the root, for the name of a test."""
    return str(path.relative_to(ROOT))


def parse(path: Path) -> ast.Module:
    """Syntax tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def open_classes(tree: ast.AST) -> Iterator[Finding]:
    """Classes that are neither final, nor an interface, nor an exception's base."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.ClassDef):
            continue
        decorators = {ast.unparse(decorator) for decorator in node.decorator_list}
        bases = {ast.unparse(base).partition("[")[0] for base in node.bases}
        is_interface = "Protocol" in bases or any(
            "abstractmethod" in {ast.unparse(d) for d in method.decorator_list}
            for method in ast.walk(node)
            if isinstance(method, ast.FunctionDef)
        )
        is_error = bases & {"Exception", "UserWarning"}
        if "final" not in decorators and not is_interface and not is_error:
            yield node.lineno, f"class {node.name} is neither abstract nor @final"


def asserts(tree: ast.AST) -> Iterator[Finding]:
    """Assert statements, which vanish under -O and carry no message for a user."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert):
            yield node.lineno, ast.unparse(node)


def hidden_nans(tree: ast.AST) -> Iterator[Finding]:
    """Uses of nan_to_num, which turns a wrong number into a plausible one."""
    for node in ast.walk(tree):
        name = getattr(node, "attr", getattr(node, "id", ""))
        if name.startswith("nan_to_num"):
            yield node.lineno, ast.unparse(node)


def exits(tree: ast.AST) -> Iterator[Finding]:
    """Calls that end the user's process."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in EXITS:
            yield node.lineno, ast.unparse(node)


def dropped_comparisons(tree: ast.AST) -> Iterator[Finding]:
    """Comparisons whose result nobody reads: assertions that cannot fail.

    Inside ``with raises(...)`` the comparison itself is the act under test.
    """
    names = COMPARISONS | {
        target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Attribute)
        and node.value.attr in COMPARISONS
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    under_test = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.With)
        and any("raises" in ast.unparse(item.context_expr) for item in node.items)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.Expr) or node in under_test:
            continue
        called = isinstance(node.value, ast.Call) and ast.unparse(node.value.func)
        is_call = bool(called) and str(called).split(".")[-1] in names
        if is_call or isinstance(node.value, ast.Compare):
            yield node.lineno, ast.unparse(node)


def raises_without_match(tree: ast.AST) -> Iterator[Finding]:
    """Expected errors and warnings whose message goes unchecked."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        matched = any(keyword.arg == "match" for keyword in node.keywords)
        if called in {"pytest.raises", "pytest.warns"} and not matched:
            yield node.lineno, ast.unparse(node)


def patches_of_the_package(tree: ast.AST) -> Iterator[Finding]:
    """Parts of the package that a test replaces: it then tests what nobody runs."""
    ours = {
        alias.asname or alias.name.partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
        if (getattr(node, "module", None) or alias.name).partition(".")[0] == PACKAGE
    }
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        if node.func.attr not in {"setattr", "delattr", "setitem", "patch", "object"}:
            continue
        for arg in node.args[:1]:
            text = ast.literal_eval(arg) if isinstance(arg, ast.Constant) else None
            root = str(text or ast.unparse(arg)).partition(".")[0].partition("(")[0]
            if root in ours | {PACKAGE}:
                yield node.lineno, ast.unparse(node)


def private_attributes(tree: ast.AST) -> Iterator[Finding]:
    """Attributes of other objects that begin with an underscore, but known ones."""
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Attribute) and re.match(r"_[^_]", node.attr)):
            continue
        own = isinstance(node.value, ast.Name) and node.value.id in {"self", "cls"}
        of_super = isinstance(node.value, ast.Call) and "super()" == ast.unparse(
            node.value
        )
        if not (own or of_super or node.attr in FOREIGN_PRIVATE):
            yield node.lineno, ast.unparse(node)


PACKAGE_CHECKS: list[Check] = [
    asserts,
    hidden_nans,
    exits,
    open_classes,
]
EVERYWHERE_CHECKS: list[Check] = [dropped_comparisons, raises_without_match]
TEST_CHECKS: list[Check] = [patches_of_the_package, private_attributes]


def report(path: Path, findings: Iterator[Finding]) -> str:
    """One line for each finding, as editors read them."""
    return "\n".join(f"{label(path)}:{line}: {text}" for line, text in findings)


def test_there_are_modules_to_check() -> None:
    assert PACKAGE_FILES


def test_the_longest_way_along_imports_is_short() -> None:
    graph = grimp.build_graph(PACKAGE, cache_dir=None)
    below = {
        name: graph.find_modules_directly_imported_by(name) for name in graph.modules
    }
    ways: dict[str, list[str]] = {}
    for module in graphlib.TopologicalSorter(below).static_order():
        longest = max((ways[target] for target in below[module]), key=len, default=[])
        ways[module] = [*longest, module]
    way = max(ways.values(), key=len)
    assert len(way) <= MAX_CHAIN, " <- ".join(way)


def test_at_the_top_stand_folders_and_few_files() -> None:
    files = [path.name for path in (ROOT / PACKAGE).iterdir() if path.is_file()]
    assert len(files) <= MAX_TOP_FILES, files


@pytest.mark.parametrize("path", PACKAGE_FILES, ids=label)
@pytest.mark.parametrize("check", PACKAGE_CHECKS)
def test_the_package_keeps_the_rule(check: Check, path: Path) -> None:
    assert not (text := report(path, check(parse(path)))), text


@pytest.mark.parametrize("path", ALL_FILES, ids=label)
@pytest.mark.parametrize("check", EVERYWHERE_CHECKS)
def test_every_file_keeps_the_rule(check: Check, path: Path) -> None:
    assert not (text := report(path, check(parse(path)))), text


@pytest.mark.parametrize("path", TEST_FILES, ids=label)
@pytest.mark.parametrize("check", TEST_CHECKS)
def test_tests_use_what_users_use(check: Check, path: Path) -> None:
    assert not (text := report(path, check(parse(path)))), text


def lines_of_code(path: Path) -> int:
    """Lines that hold code: neither blank, nor comment, nor of a docstring."""
    text = path.read_text(encoding="utf-8")
    prose = {
        line
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    return sum(
        number not in prose and bool(line.strip()) and not line.strip().startswith("#")
        for number, line in enumerate(text.splitlines(), start=1)
    )


@pytest.mark.parametrize("path", PACKAGE_FILES, ids=label)
def test_modules_are_short(path: Path) -> None:
    count = lines_of_code(path)
    assert count < MAX_LINES, f"{label(path)}: {count} lines; split it by idea"


@pytest.mark.parametrize(
    ("check", "code"),
    [
        (asserts, "assert x"),
        (hidden_nans, "torch.nan_to_num(x)"),
        (hidden_nans, "x.nan_to_num_()"),
        (hidden_nans, "nan_to_num(x)"),
        (exits, "exit()"),
        (exits, "sys.exit(1)"),
        (open_classes, "class A:\n    def f(self):\n        return 1"),
        (open_classes, "@dataclass(frozen=True)\nclass A(B):\n    x: int"),
        (dropped_comparisons, "torch.allclose(a, b)"),
        (dropped_comparisons, "a.equal(b)"),
        (dropped_comparisons, "a == b"),
        (dropped_comparisons, "same = np.array_equal\nsame(a, b)"),
        (
            patches_of_the_package,
            "from pyro_subnet.fit import sums\nmonkeypatch.setattr(sums, 'f', g)",
        ),
        (
            patches_of_the_package,
            "import pyro_subnet\nmonkeypatch.setattr(pyro_subnet.nn, 'f', g)",
        ),
        (patches_of_the_package, "mock.patch('pyro_subnet.nn.f')"),
        (private_attributes, "assert guide._loc is loc"),
        (private_attributes, "posterior.form._factor()"),
        (raises_without_match, "with pytest.raises(ValueError):\n    f()"),
        (raises_without_match, "with pytest.warns():\n    f()"),
    ],
)
def test_a_broken_rule_is_found(check: Check, code: str) -> None:
    assert len(list(check(ast.parse(code)))) == 1


@pytest.mark.parametrize(
    ("check", "code"),
    [
        (exits, "stack.exit_callback()"),
        (open_classes, "@final\n@dataclass\nclass A(B):\n    x: int"),
        (open_classes, "class A(Protocol):\n    x: int"),
        (open_classes, "class A(B):\n    @abstractmethod\n    def f(self): ..."),
        (dropped_comparisons, "assert torch.allclose(a, b)"),
        (dropped_comparisons, "assert_close(a, b)"),
        (dropped_comparisons, "with pytest.raises(ValueError, match='a'):\n    a == b"),
        (
            patches_of_the_package,
            "import pyro_subnet\nmonkeypatch.setattr(psutil, 'virtual_memory', f)",
        ),
        (private_attributes, "self._x = super()._x + guide._loc_scale() + a.__name__"),
        (raises_without_match, "with pytest.raises(ValueError, match='a'):\n    f()"),
    ],
)
def test_a_kept_rule_is_left_alone(check: Check, code: str) -> None:
    assert not list(check(ast.parse(code)))
