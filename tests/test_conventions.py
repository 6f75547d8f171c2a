"""Holds the code to its conventions by reading it: rooms, imports, classes, asserts.

The tables come first. Each check is a function from a syntax tree to what it finds, and
is itself tested on code that breaks its rule.
"""

from __future__ import annotations

import ast
import graphlib
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

# The rooms of the package, from the ground up: what each holds, and which rooms it may
# import, beside all that these may import. A room is a folder, or a file at the top.
# The first sentence of each folder's `__init__.py`, and the tables in CONTRIBUTING.md
# and docs/layout.md, say the same.
ROOMS: dict[str, tuple[str, tuple[str, ...]]] = {
    "_version": ("the version", ()),
    "exceptions": ("errors and warnings, each also a builtin's", ()),
    "subnet": ("which elements of the packed vector are random", ("exceptions",)),
    "options": ("what a user may ask for, in one vocabulary", ("exceptions",)),
    "tensors": (
        "work on tensors alone: factors in place, memory, modes set aside",
        ("exceptions",),
    ),
    "curvature": (
        "derivatives: families, Jacobians, their sums, the prior",
        ("tensors", "subnet", "options"),
    ),
    "gaussians": (
        "the precision G + s P0 in its forms, and the Gaussian of each",
        ("curvature",),
    ),
    "laplace": ("the posterior in numbers: state, evidence, tuning", ("gaussians",)),
    "tracing": (
        "one call of a Pyro model at the MAP, as a function of its subnet",
        ("curvature",),
    ),
    "models": (
        "Pyro models made of the user's: linearized, hybrid",
        ("tracing", "gaussians"),
    ),
    "predictions": (
        "distributions of outputs, and of y, at new inputs",
        ("laplace", "tracing"),
    ),
    "fit": ("one pass over the data, and what it sums", ("laplace", "tracing")),
    "files": (
        "what is written and read, whole or not at all",
        ("laplace", "tracing", "nn", "_version"),
    ),
    "selection": ("strategies that choose a subnet", ("fit",)),
    "training": (
        "prior and noise learned by the evidence while a network trains",
        ("fit",),
    ),
    "guides": (
        "what users hold: the MAP guide, the posterior guide",
        ("models", "predictions", "files", "selection", "training", "nn"),
    ),
    "comparison": ("a subnet beside the full posterior", ("guides",)),
    "diagnostics": (
        "how far predictions and a posterior can be trusted",
        ("comparison",),
    ),
    "export": ("posteriors and chains as ArviZ reads them", ("guides",)),
    "plotting": ("pictures of predictions, posteriors and subnets", ("diagnostics",)),
    "nn": ("torch networks as Pyro modules", ("tensors",)),
    "sklearn": ("estimators of scikit-learn", ("guides",)),
    "botorch": ("a model for Bayesian optimization in BoTorch", ("guides",)),
    "": ("the public names", ("export", "plotting", "nn")),
}
# The first room whose files may import Pyro, with those above it.
WITHOUT_PYRO = {
    "_version",
    "exceptions",
    "subnet",
    "options",
    "tensors",
    "curvature",
    "gaussians",
    "laplace",
}
MAX_TOP_FILES = 8
# Files on the longest way along imports.
MAX_CHAIN = 16
# Libraries that one module alone may import.
CONFINED_TO = {
    "arviz": "export.inference_data",
    "matplotlib": "plotting.style",
    "sklearn": "sklearn",
    "botorch": "botorch",
    "gpytorch": "botorch",
    "linear_operator": "botorch",
}
# Libraries that may be imported inside a function, so that the rest does without them.
LAZILY_IMPORTED = {"matplotlib"}
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


@cache
def allowed(room: str) -> frozenset[str]:
    """Rooms that a room may import, itself among them."""
    if room not in ROOMS:
        pytest.fail(f"{room!r} is in no room. Add it to ROOMS in {__file__}")
    below = (allowed(other) for other in ROOMS[room][1])
    return frozenset({room}).union(*below)


def room_of(module: str) -> str:
    """Room of a module: its first component."""
    return module.partition(".")[0]


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
    """Imports from rooms above, and libraries that the module may not use."""
    room = room_of(module)
    for line, target in own_imports(tree, module, is_package):
        if room_of(target) not in allowed(room):
            yield line, f"{module} imports {target or PACKAGE}, which is no room below"
    for line, library in foreign_imports(tree):
        if library == "pyro" and room in WITHOUT_PYRO:
            yield line, f"{module} is below tracing/ and imports pyro"
        if module != CONFINED_TO.get(library, module):
            yield line, f"{module} imports {library}"


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
    imports_in_functions,
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
    assert MODULES


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down_the_rooms(module: str) -> None:
    path = MODULES[module]
    found = upward_imports(parse(path), module, path.name == "__init__.py")
    assert not (text := report(path, found)), text


def import_graph() -> dict[str, set[str]]:
    """Modules of the package that each module imports."""
    return {
        module: {
            target
            for _, target in own_imports(
                parse(path), module, path.name == "__init__.py"
            )
        }
        for module, path in MODULES.items()
    }


def test_the_longest_way_along_imports_is_short_and_no_circle() -> None:
    graph = import_graph()
    try:
        order = list(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        pytest.fail(f"import cycle: {' <- '.join(error.args[1])}")
    ways: dict[str, list[str]] = {}
    for module in order:
        longest = max((ways[target] for target in graph[module]), key=len, default=[])
        ways[module] = [*longest, module]
    way = max(ways.values(), key=len)
    assert len(way) <= MAX_CHAIN, " <- ".join(way)


def test_rooms_have_no_circle() -> None:
    graph = {room: set(below) for room, (_, below) in ROOMS.items()}
    graphlib.TopologicalSorter(graph).prepare()


def test_at_the_top_stand_folders_and_few_files() -> None:
    files = [path.name for path in (ROOT / PACKAGE).iterdir() if path.is_file()]
    assert len(files) <= MAX_TOP_FILES, files
    tops = {room_of(module) for module in MODULES}
    assert tops == set(ROOMS)


FOLDERS = sorted(room for room in ROOMS if room and (ROOT / PACKAGE / room).is_dir())


@pytest.mark.parametrize("room", FOLDERS)
def test_a_folder_says_what_it_holds_and_may_import(room: str) -> None:
    holds, below = ROOMS[room]
    text = MODULES[room].read_text(encoding="utf-8")
    assert text.startswith(f'"""{holds[0].upper()}{holds[1:]}.')
    assert f"May import {', '.join(below)}." in text


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/layout.md"])
def test_the_pages_show_the_rooms_as_they_are(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.findall(r"^\| `(\w+)/?` \| (.+?) \| (.*?) \|$", text, flags=re.MULTILINE)
    expected = [
        (room, holds, ", ".join(f"`{other}`" for other in below) or "nothing")
        for room, (holds, below) in ROOMS.items()
        if room not in {"", "_version"}
    ]
    assert found == expected


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
        (imports_in_functions, "def f():\n    import torch"),
        (imports_in_functions, "class A:\n    def f(self):\n        from a import b"),
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
        (imports_in_functions, "import torch"),
        (imports_in_functions, "def f():\n    import matplotlib.pyplot as plt"),
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


@pytest.mark.parametrize(
    ("module", "code"),
    [
        ("exceptions", "from pyro_subnet.subnet import Subnet"),
        ("exceptions", "from .subnet import Subnet"),
        ("subnet", "from pyro_subnet import Subnet"),
        ("subnet", "import pyro_subnet"),
        ("subnet", "from . import tracing"),
        ("curvature.ggn", "from ..tracing.trace import read"),
        ("curvature.ggn", "import pyro.distributions as dist"),
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
    with pytest.raises(pytest.fail.Exception, match=r"'utils' is in no room\. Add it"):
        allowed("utils")
