"""Who may import whom, what may be imported when, and who may write files."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from equipoise.extras import EXTRA_OF

PACKAGE = Path(__file__).resolve().parents[2] / "src" / "equipoise"

LAYERS: dict[int, tuple[str, ...]] = {
    0: ("errors", "record", "spec", "fs", "extras", "registry", "progress", "provenance"),
    1: (
        "targets", "vouching", "bundle", "data", "lint", "onnxio", "stages", "launch", "isolation",
        "resident", "rwlock", "content", "database",
    ),
    2: ("runtimes",),
    3: ("graph", "parity", "measure", "serving", "deploy", "apps", "testing", "sources", "cluster"),
    4: ("export", "quantize", "compress"),
    5: (
        "recipe", "search", "report", "pipeline", "assembly", "pack", "packing", "tuning",
        "checking", "checks", "doctor", "exporting", "quantizing", "building", "fitting", "engines",
        "signing",
        "locked", "locking", "jobs", "compression", "training", "pruning",
    ),
    6: ("cli", "__main__", "pytest_plugin"),
}  # fmt: skip
"""Each folder or module of the package belongs to one layer and imports from lower ones."""

PEERS: dict[str, set[str]] = {
    "record": {"errors"},
    "spec": {"errors"},
    "fs": {"errors", "record"},
    "extras": {"errors"},
    "registry": {"errors"},
    "onnxio": {"lint"},
    "isolation": {"resident"},
    "launch": {"isolation", "rwlock"},
    "stages": {"content", "isolation", "launch"},
    "bundle": {"data", "vouching"},
    "measure": {"graph", "parity"},
    "deploy": {"serving"},
    "apps": {"deploy"},
    "search": {"pipeline", "recipe"},
    "report": {"pruning", "search", "training"},
    "pipeline": {"recipe"},
    "jobs": {"pipeline"},
    "compression": {"pipeline"},
    "training": {"compression", "jobs", "pipeline"},
    "pruning": {"compression", "jobs", "pipeline", "training"},
    "assembly": {"pipeline", "recipe", "report"},
    "pack": {"assembly", "pipeline", "recipe", "search"},
    "packing": {"assembly", "jobs", "pipeline"},
    "checking": {"checks", "engines", "jobs", "locked", "locking", "pipeline", "report"},
    "checks": {"engines", "pipeline", "report"},
    "locked": {"report"},
    "locking": {"locked", "pipeline", "report"},
    "exporting": {"pipeline"},
    "quantizing": {"pipeline"},
    "building": {"pipeline"},
    "tuning": {"compression", "jobs", "pack", "pipeline", "recipe", "report", "search"},
    "__main__": {"cli"},
}
"""The imports inside one layer that are allowed. They form no circle; layer 4 has none."""

HEAVY = {*EXTRA_OF, "scipy", "pandas"}
TORCH = {"torch"}
LAYER_OF = {name: layer for layer, names in LAYERS.items() for name in names}
_OBJECT_NAME = re.compile(r"equipoise(\.\w+)+:\w+")
_PLACES = {"replacing", "appending", "scratch_directory"}
_PATH_WRITERS = {
    "write_text", "write_bytes", "touch", "mkdir", "rename", "unlink", "rmdir", "symlink_to",
    "hardlink_to", "tofile", "save", "savez", "savez_compressed", "savetxt", "save_model",
    "save_file", "save_pretrained",
}  # fmt: skip
_WRITERS_OF = {
    "os": {
        "rename", "replace", "remove", "unlink", "mkdir", "makedirs", "rmdir", "link", "symlink",
        "open", "truncate",
    },
    "json": {"dump"},
    "pickle": {"dump"},
}  # fmt: skip
_WRITES_TO_SCRATCH: dict[str, list[str]] = {}
"""Calls in functions whose callers give them a path in ``fs.scratch_directory``."""
_NO_MODULES = {"equipoise.__version__"}
_SHUTIL_READERS = {"disk_usage", "which", "get_terminal_size"}
_OURS_WITH_SUCH_NAMES = {"fs", "onnxio"}


# The detectors: source text in, what is wrong in words out.


def unit_of(file: Path) -> str:
    """The folder or module of the package that ``file`` belongs to."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every import, wherever it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                yield node.lineno, "." * node.level + (node.module or "")
            elif node.module == "equipoise":
                yield from ((node.lineno, f"equipoise.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, node.module or ""
        elif isinstance(node, ast.Constant) and _OBJECT_NAME.fullmatch(str(node.value)):
            yield node.lineno, str(node.value).partition(":")[0]


def wrong_imports(source: str, unit: str) -> list[str]:
    """Imports of equipoise that point upward or sideways from ``unit``, and relative ones."""
    problems = []
    for line, module in imported_modules(ast.parse(source)):
        if module.startswith("."):
            problems.append(f"line {line}: relative import {module}")
        if not module.startswith("equipoise.") or module in _NO_MODULES:
            continue
        target = module.split(".")[1]
        lower = LAYER_OF.get(target, 99) < LAYER_OF[unit]
        if not (lower or target == unit or target in PEERS.get(unit, set())):
            problems.append(f"line {line}: {unit} imports {target}")
    return problems


def import_statements(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and top-level package of every import statement."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.partition(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.lineno, (node.module or "").partition(".")[0]


def import_calls(tree: ast.AST) -> Iterator[tuple[ast.Call, str]]:
    """Calls of ``require`` and ``import_module`` with a literal name, and its top package."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and _called(node)[1] in {"require", "import_module"}:
            first = node.args[0] if node.args else None
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield node, first.value.partition(".")[0]


def heavy_imports(source: str) -> list[str]:
    """Optional packages imported by a statement, or by a call outside every function."""
    tree = ast.parse(source)
    problems = [
        f"line {line}: import {name}; use extras.require in a function"
        for line, name in import_statements(tree)
        if name in HEAVY
    ]
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for body in (function.body if isinstance(function.body, list) else [function.body])
        for node in ast.walk(body)
    }
    return problems + [
        f"line {call.lineno}: {name} is imported at module level"
        for call, name in import_calls(tree)
        if name in HEAVY and id(call) not in inside
    ]


def torch_imports(source: str) -> list[str]:
    """Every way in which a module asks for torch."""
    tree = ast.parse(source)
    named = [(line, name) for line, name in import_statements(tree)]
    named += [(call.lineno, name) for call, name in import_calls(tree)]
    return [f"line {line}: {name}" for line, name in named if name in TORCH]


def _called(call: ast.Call) -> tuple[str, str]:
    """What is called: the name before the last dot, if it is one, and the last name."""
    if isinstance(call.func, ast.Name):
        return "", call.func.id
    if isinstance(call.func, ast.Attribute):
        owner = call.func.value
        return (owner.id if isinstance(owner, ast.Name) else "?"), call.func.attr
    return "?", "?"


def _opens_for_writing(call: ast.Call, owner: str) -> bool:
    place = 1 if owner in {"", "io"} else 0
    modes = [k.value for k in call.keywords if k.arg == "mode"] or call.args[place : place + 1]
    if not modes:
        return False
    mode = modes[0]
    known = isinstance(mode, ast.Constant) and isinstance(mode.value, str)
    return not known or bool(set(mode.value) & set("wax+"))


def _writes(call: ast.Call, buffers: set[str]) -> bool:
    """Whether ``call`` changes the file system by another way than fs."""
    owner, name = _called(call)
    if owner in _OURS_WITH_SUCH_NAMES:
        return False
    if owner in _WRITERS_OF:
        to_devnull = bool(call.args) and ast.unparse(call.args[0]) == "os.devnull"
        return name in _WRITERS_OF[owner] and not to_devnull
    if owner in {"shutil", "tempfile"}:
        return name not in _SHUTIL_READERS
    if name == "open":
        return _opens_for_writing(call, owner)
    in_memory = call.args and isinstance(call.args[0], ast.Name) and call.args[0].id in buffers
    return owner != "" and name in _PATH_WRITERS and not in_memory


def _buffers(tree: ast.AST) -> set[str]:
    """Names that are bound to ``io.BytesIO()``."""
    return {
        target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call)
        if _called(node.value) == ("io", "BytesIO")
        for target in node.targets
        if isinstance(target, ast.Name)
    }


def file_writes(source: str) -> list[str]:
    """Calls that write files outside ``with fs.replacing`` and its like."""
    tree = ast.parse(source)
    allowed: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.With) and any(
            isinstance(item.context_expr, ast.Call)
            and _called(item.context_expr)[0] == "fs"
            and _called(item.context_expr)[1] in _PLACES
            for item in node.items
        ):
            allowed.update(id(inner) for inner in ast.walk(node))
    buffers = _buffers(tree)
    return [
        f"line {node.lineno}: {ast.unparse(node):.60}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and id(node) not in allowed and _writes(node, buffers)
    ]


# The rules, on every file of the package.

FILES = sorted(PACKAGE.rglob("*.py"))
IDS = [str(file.relative_to(PACKAGE)) for file in FILES]


def every_file(*, but: frozenset[str] | set[str] = frozenset()) -> pytest.MarkDecorator:
    """Run a test on each file of the package outside the units ``but``."""
    files = [file for file in FILES if unit_of(file) not in but]
    return pytest.mark.parametrize("file", files, ids=[str(f.relative_to(PACKAGE)) for f in files])


def test_every_folder_and_module_has_exactly_one_layer() -> None:
    """A new module is given a place before it is used."""
    units = {unit_of(file) for file in FILES} - {"__init__"}
    named = [name for names in LAYERS.values() for name in names]
    assert sorted(named) == sorted(set(named))
    assert not units - set(named), "give these a layer in LAYERS"


def test_every_source_file_was_found() -> None:
    """The rules below cover the package and not an empty list."""
    assert {"fs.py", "cli/__init__.py", "runtimes/onnxruntime/session.py"} <= set(IDS)


def test_imports_inside_a_layer_form_no_circle() -> None:
    """PEERS stays inside layers and can be put in an order."""
    left = {name: set(peers) for name, peers in PEERS.items()}
    assert all(LAYER_OF[n] == LAYER_OF[p] for n, peers in left.items() for p in peers)
    while left:
        free = [name for name, peers in left.items() if not peers & set(left)]
        assert free, f"a circle among {sorted(left)}"
        for name in free:
            del left[name]


def test_folders_of_layer_4_do_not_know_each_other() -> None:
    """Stages are joined by pipeline.py alone."""
    assert not set(LAYERS[4]) & set(PEERS)


@every_file(but={"__init__"})
def test_imports_point_downward(file: Path) -> None:
    """A module imports lower layers, its own folder, and what PEERS allows."""
    assert wrong_imports(file.read_text(), unit_of(file)) == []


def test_the_package_itself_imports_nothing() -> None:
    """``import equipoise`` runs no import of equipoise: names resolve on first use."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {name for node in top for _, name in import_statements(node)}
    assert names == {"__future__", "importlib", "typing"}


@every_file()
def test_optional_packages_are_imported_in_functions_through_extras(file: Path) -> None:
    """No heavy import at module level; a missing one names its extra."""
    assert heavy_imports(file.read_text()) == []


@every_file(but={"sources", "export", "compress"})
def test_only_export_asks_for_torch(file: Path) -> None:
    """Nothing outside export/ needs PyTorch."""
    assert torch_imports(file.read_text()) == []


@every_file(but={"cli", "__main__"})
def test_only_cli_imports_typer(file: Path) -> None:
    """The library works without its command line."""
    names = {name for _, name in import_statements(ast.parse(file.read_text()))}
    assert "typer" not in names


@every_file(but={"fs"})
def test_only_fs_writes_files(file: Path) -> None:
    """Every write goes through fs, so it is whole or not at all."""
    calls = [problem.partition(": ")[2] for problem in file_writes(file.read_text())]
    assert calls == _WRITES_TO_SCRATCH.get(str(file.relative_to(PACKAGE)), [])


# The detectors find what they are for.


@pytest.mark.parametrize(
    ("unit", "source"),
    [
        ("fs", "import equipoise.data.store"),
        ("fs", "from equipoise import stages"),
        ("quantize", "from equipoise.export.config import ExportConfig"),
        ("export", "def f():\n    from equipoise.quantize import calibrate"),
        ("graph", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import equipoise.cli"),
        ("parity", "from equipoise.measure import latency"),
        ("runtimes", "from .. import fs"),
        ("bundle", 'NAME = "equipoise.deploy:load"'),
        ("tuning", "from equipoise.unheard import of"),
    ],
)
def test_an_upward_import_is_found(unit: str, source: str) -> None:
    """Imports in functions, under TYPE_CHECKING and by name in a string count too."""
    assert len(wrong_imports(source, unit)) == 1


@pytest.mark.parametrize(
    ("unit", "source"),
    [
        ("cli", "from equipoise import fs, tuning"),
        ("measure", "from equipoise.parity.compare import compare"),
        ("data", "from equipoise.data.store import Rows\nimport os, numpy"),
        ("pipeline", 'F = "equipoise.export.export:export"'),
    ],
)
def test_a_downward_import_is_let_through(unit: str, source: str) -> None:
    """Lower layers, the own folder and allowed peers."""
    assert wrong_imports(source, unit) == []


@pytest.mark.parametrize(
    "source",
    [
        "import onnx",
        "import torch.nn as nn",
        "from onnxruntime import InferenceSession",
        "try:\n    import sklearn\nexcept ImportError:\n    pass",
        "def f():\n    import transformers",
        "class A:\n    import plotly",
        'onnx = extras.require("onnx.helper")',
        'def f(x=extras.require("jinja2")): pass',
        '@importlib.import_module("onnx_ir").wrap\ndef f(): pass',
    ],
)
def test_a_heavy_import_is_found(source: str) -> None:
    """Statements anywhere; calls where they run on import, defaults and decorators included."""
    assert len(heavy_imports(source)) == 1


def test_a_lazy_import_is_let_through() -> None:
    """extras.require inside functions and lambdas is the way."""
    source = (
        'import numpy\ndef f():\n    return extras.require("onnx")\ng = lambda: require("onnx")'
    )
    assert heavy_imports(source) == []


@pytest.mark.parametrize(
    "source",
    [
        "import torch",
        "def f():\n    from torch.nn import Linear",
        'def f():\n    return extras.require("torch.export")',
        'importlib.import_module("torch")',
    ],
)
def test_torch_is_found(source: str) -> None:
    """By statement and by call, in functions too."""
    assert len(torch_imports(source)) == 1


def test_names_that_only_begin_like_torch_are_let_through() -> None:
    """A module of ours called torch_model is not torch."""
    assert torch_imports("from equipoise.export import torch_model\nimport torchless") == []


@pytest.mark.parametrize(
    "call",
    [
        'open("a", "w")',
        'open("a", mode="ab")',
        'open("a", mode)',
        'io.open("a", "x")',
        'path.open("wb")',
        'path.open("r+b")',
        '(folder / "a").write_text("x")',
        'path.write_bytes(b"x")',
        "path.mkdir()",
        "path.unlink()",
        "np.save(path, array)",
        "numpy.savez(path, a=array)",
        "array.tofile(path)",
        "shutil.copyfile(a, b)",
        "shutil.rmtree(a)",
        "os.replace(a, b)",
        "tempfile.mkdtemp()",
        "json.dump(value, file)",
        "onnx.save_model(model, path)",
        "onnx.save(model, path)",
    ],
)
def test_a_write_is_found(call: str) -> None:
    """Each way to change the file system."""
    assert len(file_writes(f"def f():\n    {call}")) == 1


@pytest.mark.parametrize(
    "source",
    [
        'open("a")\npath.open("rb")\npath.open()\nopen("a", "r", encoding="utf-8")',
        'fs.write_text(path, "x")\nonnxio.save_model(model, path)',
        'with fs.replacing(p) as t, t.open("wb") as file:\n    np.save(file, array)',
        "with fs.appending(p) as file:\n    onnx.save(model, p)",
        "buffer = io.BytesIO()\nnp.savez(buffer, a=array)",
        'name.replace("a", "b")\nshutil.disk_usage(p)\nlist(os.walk(p))',
        'os.fdopen(3, "w")\nos.open(os.devnull, os.O_WRONLY)',
    ],
)
def test_reading_and_writing_through_fs_are_let_through(source: str) -> None:
    """Reads, buffers in memory, and writes to the temporary place that fs gives."""
    assert file_writes(source) == []
