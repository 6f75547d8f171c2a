"""Holds the code to its conventions by reading it: layers, imports, errors, asserts.

The tables come first; a new module is one entry in ``LAYERS``. Each check is a function
from a syntax tree to what it finds, and is itself tested on code that breaks its rule.
"""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# A module may import modules of its own layer and of lower ones, without cycles. The
# name of a folder stands for everything in it. "" is the package's __init__.py.
LAYERS = {
    "_version": 0,
    "exceptions": 0,
    "subnet": 1,
    "tensors": 1,
    "curvature": 2,
    "options": 2,
    "gaussians": 2,
    "laplace": 2,
    "files": 2,
    "fit": 2,
    "models": 2,
    "predictions": 2,
    "guides": 2,
    "selection": 2,
    "tracing": 2,
    "nn": 3,
    "comparison": 3,
    "diagnostics": 3,
    "export": 3,
    "plotting": 3,
    "": 4,
}
# Modules below this layer are functions of tensors: they never import Pyro.
LOWEST_LAYER_WITH_PYRO = LAYERS["tracing"]
# Libraries that one module alone may import.
CONFINED_TO = {"arviz": "export.inference_data", "matplotlib": "plotting.style"}
# Libraries that may be imported inside a function, so that the rest does without them.
LAZILY_IMPORTED = {"matplotlib"}
MAX_LINES = 400
COMPARISONS = {"allclose", "array_equal", "equal", "isclose"}
EXITS = {"exit", "quit", "sys.exit", "os._exit"}

PACKAGE = "pyro_subnet"
ROOT = Path(__file__).resolve().parents[1]
PACKAGE_FILES = sorted((ROOT / PACKAGE).rglob("*.py"))
ALL_FILES = PACKAGE_FILES + [
    path
    for folder in ("tests", "tutorials", "benchmarks")
    for path in sorted((ROOT / folder).rglob("*.py"))
]

Finding = tuple[int, str]
Check = Callable[[ast.AST], Iterator[Finding]]


def module_name(path: Path) -> str:
    """Name below the package: "curvature.ggn", or "" for the package itself."""
    parts = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def label(path: Path) -> str:
    """Path from the root, for the name of a test."""
    return str(path.relative_to(ROOT))


MODULES = {module_name(path): path for path in PACKAGE_FILES}


def parse(path: Path) -> ast.Module:
    """Syntax tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def layer(module: str) -> int:
    """Layer of a module, which its first component decides."""
    top = module.partition(".")[0]
    if top not in LAYERS:
        pytest.fail(f"Module {top!r} is in no layer. Add it to LAYERS in {__file__}")
    return LAYERS[top]


def imported(node: ast.AST, module: str, is_package: bool) -> Iterator[str]:
    """Full dotted names that an import statement names; none for other nodes."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = [node.module] if node.module else []
        if node.level:
            here = [PACKAGE, *filter(None, module.split("."))]
            up = node.level - is_package
            base = [*here[: len(here) - up], *base]
        yield from (".".join([*base, alias.name]) for alias in node.names)


def own_imports(tree: ast.AST, module: str, is_package: bool) -> Iterator[Finding]:
    """Modules of the package that a module imports, as "curvature.ggn"."""
    for node in ast.walk(tree):
        for name in imported(node, module, is_package):
            top, _, rest = name.partition(".")
            if top != PACKAGE:
                continue
            # `from package import name` names a module or something inside one.
            while rest and rest not in MODULES:
                rest = rest.rpartition(".")[0]
            yield node.lineno, rest


def foreign_imports(tree: ast.AST) -> Iterator[Finding]:
    """Top-level names of the libraries that a module imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            continue
        for name in imported(node, "", False):
            if name.split(".")[0] != PACKAGE:
                yield node.lineno, name.split(".")[0]


def upward_imports(tree: ast.AST, module: str, is_package: bool) -> Iterator[Finding]:
    """Imports from a layer above, and libraries that the module may not use."""
    for line, target in own_imports(tree, module, is_package):
        if layer(target) > layer(module):
            yield line, f"{module} (layer {layer(module)}) imports {target or PACKAGE}"
    for line, library in foreign_imports(tree):
        if library == "pyro" and layer(module) < LOWEST_LAYER_WITH_PYRO:
            yield line, f"{module} is below trace.py and imports pyro"
        if module != CONFINED_TO.get(library, module):
            yield line, f"{module} imports {library}"


def imports_in_functions(tree: ast.AST) -> Iterator[Finding]:
    """Imports that run when a function is called."""
    for outer in ast.walk(tree):
        if not isinstance(outer, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        for node in ast.walk(outer):
            if not isinstance(node, ast.Import | ast.ImportFrom):
                continue
            libraries = {name.split(".")[0] for name in imported(node, "", False)}
            if not libraries <= LAZILY_IMPORTED:
                yield node.lineno, ast.unparse(node)


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


PACKAGE_CHECKS: list[Check] = [
    imports_in_functions,
    asserts,
    hidden_nans,
    exits,
]
EVERYWHERE_CHECKS: list[Check] = [dropped_comparisons, raises_without_match]


def report(path: Path, findings: Iterator[Finding]) -> str:
    """One line for each finding, as editors read them."""
    return "\n".join(f"{label(path)}:{line}: {text}" for line, text in findings)


def test_there_are_modules_to_check() -> None:
    assert MODULES


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down_the_layers(module: str) -> None:
    path = MODULES[module]
    found = upward_imports(parse(path), module, path.name == "__init__.py")
    assert not (text := report(path, found)), text


def test_no_import_cycles() -> None:
    graph = {
        module: {
            target
            for _, target in own_imports(
                parse(path), module, path.name == "__init__.py"
            )
        }
        for module, path in MODULES.items()
    }
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"import cycle: {' <- '.join(error.args[1])}")


@pytest.mark.parametrize("path", PACKAGE_FILES, ids=label)
@pytest.mark.parametrize("check", PACKAGE_CHECKS)
def test_the_package_keeps_the_rule(check: Check, path: Path) -> None:
    assert not (text := report(path, check(parse(path)))), text


@pytest.mark.parametrize("path", ALL_FILES, ids=label)
@pytest.mark.parametrize("check", EVERYWHERE_CHECKS)
def test_every_file_keeps_the_rule(check: Check, path: Path) -> None:
    assert not (text := report(path, check(parse(path)))), text


@pytest.mark.parametrize("path", PACKAGE_FILES, ids=label)
def test_modules_are_short(path: Path) -> None:
    count = len(path.read_text(encoding="utf-8").splitlines())
    assert count < MAX_LINES, f"{label(path)}: {count} lines; split it by idea"


@pytest.mark.parametrize(
    ("check", "code"),
    [
        (imports_in_functions, "def f():\n    import torch"),
        (imports_in_functions, "class A:\n    def f(self):\n        from a import b"),
        (asserts, "assert x"),
        (hidden_nans, "torch.nan_to_num(x)"),
        (hidden_nans, "x.nan_to_num_()"),
        (hidden_nans, "nan_to_num(x)"),
        (exits, "exit()"),
        (exits, "sys.exit(1)"),
        (dropped_comparisons, "torch.allclose(a, b)"),
        (dropped_comparisons, "a.equal(b)"),
        (dropped_comparisons, "a == b"),
        (dropped_comparisons, "same = np.array_equal\nsame(a, b)"),
        (raises_without_match, "with pytest.raises(ValueError):\n    f()"),
        (raises_without_match, "with pytest.warns():\n    f()"),
    ],
)
def test_a_broken_rule_is_found(check: Check, code: str) -> None:
    assert len(list(check(ast.parse(code)))) == 1


@pytest.mark.parametrize(
    ("check", "code"),
    [
        (imports_in_functions, "import torch"),
        (imports_in_functions, "def f():\n    import matplotlib.pyplot as plt"),
        (exits, "stack.exit_callback()"),
        (dropped_comparisons, "assert torch.allclose(a, b)"),
        (dropped_comparisons, "assert_close(a, b)"),
        (dropped_comparisons, "with pytest.raises(ValueError, match='a'):\n    a == b"),
        (raises_without_match, "with pytest.raises(ValueError, match='a'):\n    f()"),
    ],
)
def test_a_kept_rule_is_left_alone(check: Check, code: str) -> None:
    assert not list(check(ast.parse(code)))


@pytest.mark.parametrize(
    ("module", "code"),
    [
        ("exceptions", "from pyro_subnet.subnet import Subnet"),
        ("exceptions", "from .subnet import Subnet"),
        ("subnet", "from pyro_subnet import Subnet"),
        ("subnet", "import pyro_subnet"),
        ("subnet", "from . import tracing"),
        ("subnet", "from .tracing.trace import read"),
        ("tensors.memory", "import pyro.distributions as dist"),
        ("guides.map", "import matplotlib.pyplot as plt"),
        ("guides.map", "from arviz import InferenceData"),
    ],
)
def test_an_import_from_above_is_found(module: str, code: str) -> None:
    assert len(list(upward_imports(ast.parse(code), module, False))) == 1


@pytest.mark.parametrize(
    ("module", "code"),
    [
        ("subnet", "from pyro_subnet.exceptions import SelectionError"),
        ("curvature.ggn", "from ..subnet import Subnet"),
        ("tracing.trace", "import pyro"),
        ("export.inference_data", "import arviz"),
    ],
)
def test_an_import_from_below_is_left_alone(module: str, code: str) -> None:
    assert not list(upward_imports(ast.parse(code), module, False))


def test_an_unknown_module_is_sent_to_the_table() -> None:
    with pytest.raises(pytest.fail.Exception, match=r"'utils' is in no layer\. Add it"):
        layer("utils.more")
