"""Programs of ``torch.export``, ``model.pt2``, read without running anything that is in the file.

``torch.export.load`` was not made for strangers' files. It unpickles tensors of unusual classes and
custom objects without restriction, falls back to that when the restricted unpickler refuses sample
inputs, loads compiled code, looks operators up by any dotted name below ``torch``, evaluates the
text of symbolic sizes as Python, imports modules that tree specs name, and puts guards and names
into generated source. So everything that it would do these things with is checked first, in the
same bytes and through the same reader, and a program with more than the known parts is refused.
What is left is data: names, numbers, operators of PyTorch, raw tensors.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import io
import json
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from equipoise import extras
from equipoise.errors import SourceError, UnsafeCheckpointError
from equipoise.sources.checkpoint import unpickle
from equipoise.spec import TensorSpec

_GRAPH: Final = "models/model.json"
_KNOWN: Final = re.compile(
    r"archive_format|archive_version|version|byteorder|\.data/\w+|models/model\.json"
    r"|data/(weights|constants)/(model_(weights|constants)_config\.json|(weight|tensor)_\d+)"
    r"|data/sample_inputs/model\.pt|extra/[\w./-]+"
)
_CODE: Final = re.compile(
    r".*\.(so|py|pyc|pyd|dll|dylib|cpp|cubin|ptx|o)|.*/?(code|aotinductor)/.*"
)
_OPERATOR: Final = re.compile(
    r"torch\.ops\.(aten|prims|quantized_decomposed|torchvision)\.\w+\.\w+"
    r"|torch\.ops\.higher_order\.(cond|while_loop|map_impl|scan|associative_scan|flex_attention"
    r"|wrap_with_set_grad_enabled|wrap_with_autocast|invoke_subgraph)"
    r"|torch\.(_?sym_\w+)|math\.\w+|_operator\.\w+"
)
_ON_FILES: Final = re.compile(r"torch\.ops\.aten\.(from_file|save|load)\..*")
_NAME: Final = re.compile(r"[\w.:+-]*")
_SYMBOL: Final = re.compile(r"[a-z]+_?\d+")
_FUNCTIONS: Final = frozenset(
    {
        "Abs", "Add", "And", "CeilDiv", "CeilToInt", "CleanDiv", "Eq", "Equality", "Float",
        "FloatPow", "FloatTrueDiv", "FloorDiv", "FloorToInt", "Ge", "GreaterThan", "Gt",
        "IntTrueDiv", "Integer", "LShift", "Le", "LessThan", "Lt", "Max", "Min", "Mod",
        "ModularIndexing", "Mul", "Ne", "Not", "Or", "Pow", "PowByNatural", "PythonMod", "RShift",
        "Rational", "RoundDecimal", "RoundToInt", "StrictGreaterThan", "StrictLessThan", "Symbol",
        "ToFloat", "TruncToFloat", "TruncToInt", "Unequality", "Where", "ceiling", "floor",
    }
)  # fmt: skip
_CONSTANTS: Final = frozenset({"int_oo", "oo", "true", "false", "True", "False"})
_SYNTAX: Final = (
    ast.Expression, ast.Call, ast.keyword, ast.Name, ast.Constant, ast.BinOp, ast.UnaryOp,
    ast.BoolOp, ast.Compare, ast.operator, ast.unaryop, ast.boolop, ast.cmpop, ast.expr_context,
)  # fmt: skip
_TREES: Final = frozenset(
    {None, "builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict"}
)
_MODEL_OUTPUTS: Final = "transformers.modeling_outputs."


def load_program(path: Path) -> Any:
    """The ``torch.export.ExportedProgram`` in a ``.pt2`` file.

    Raises:
        UnsafeCheckpointError: It holds code or what could be; names the member and the value.
        SourceError: It is no such file, damaged, or of another version of PyTorch.
    """
    _check_members(path)
    reader = _reader(path)
    uses_outputs = _check_contents(reader, path)
    if uses_outputs:
        extras.require("transformers.modeling_outputs")  # registers their tree specs
    archive: Any = extras.require("torch.export.pt2_archive._package")
    with _told_by(path):
        # Not torch.export.load: that goes on to an older format when it meets an error.
        return archive.load_pt2(str(path)).exported_programs["model"]


def _check_members(path: Path) -> None:
    """Only the known parts, once each, in one folder."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except FileNotFoundError as error:
        raise SourceError(f"no such program: {path}") from error
    except (OSError, zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise SourceError(
            f"{path} is no program of torch.export: {error}",
            hint="Write it with torch.export.save(program, path).",
        ) from error
    members = [name.partition("/")[2] for name in names]
    roots = {name.partition("/")[0] for name in names}
    for name, member in zip(names, members, strict=True):
        if _CODE.fullmatch(member) or ".." in name.split("/") or "\\" in name:
            raise _unsafe(path, name)
    if len(roots) != 1 or _GRAPH not in members:
        raise SourceError(f"{path} is no program of torch.export: it has no {_GRAPH}")
    strange = [name for name, member in zip(names, members, strict=True) if not _known(member)]
    twice = [name for name, times in Counter(names).items() if times > 1]
    if strange or twice:
        raise _unsafe(path, (strange or twice)[0])


def _known(member: str) -> bool:
    return _KNOWN.fullmatch(member) is not None


def _unsafe(path: Path, what: str) -> UnsafeCheckpointError:
    return UnsafeCheckpointError(
        f"{path} holds more than a graph and its weights: {what[:200]}",
        hint="Write it with torch.export.save from plain tensors and operators of PyTorch.",
    )


@contextlib.contextmanager
def _told_by(path: Path) -> Iterator[None]:
    """Turn whatever PyTorch raises on ``path`` into a SourceError."""
    try:
        yield
    except Exception as error:  # PyTorch checks little, so a wrong file reaches any exception
        first = str(error).strip().partition("\n")[0]
        raise SourceError(
            f"{path} is damaged or of another PyTorch: {type(error).__name__}: {first}",
            hint="Write it with torch.export.save in the PyTorch that reads it.",
        ) from error


def _reader(path: Path) -> Any:
    archive: Any = extras.require("torch.export.pt2_archive._package")
    with _told_by(path):
        return archive.PT2ArchiveReader(str(path))


def _check_contents(reader: Any, path: Path) -> bool:
    """Check every part that loading would act on; whether it needs transformers' outputs."""
    with _told_by(path):
        names = reader.get_file_names()
        samples = reader.read_bytes("data/sample_inputs/model.pt")
    for name in names:
        if not _known(name):
            raise _unsafe(path, name)
    for name in (n for n in names if n.endswith("_config.json")):
        _check_payload(_json(reader, name, path), path=path)
    if samples:
        unpickle(io.BytesIO(samples), what=f"{path} (sample inputs)")
    check = _Checker(path)
    check.graph(_json(reader, _GRAPH, path))
    return check.uses_outputs


def _json(reader: Any, name: str, path: Path) -> Any:
    try:
        return json.loads(reader.read_bytes(name))
    except (ValueError, RecursionError, RuntimeError) as error:
        raise SourceError(f"{path} is damaged: {name}: {error}") from error


def _check_payload(payload: Any, *, path: Path) -> None:
    """Tensors in raw bytes only: anything else is unpickled without restriction."""
    parts = payload.get("config") if isinstance(payload, dict) else None
    if not isinstance(parts, dict):
        raise SourceError(f"{path} is damaged: a list of weights is no list")
    for name, part in parts.items():
        plain = isinstance(part, dict) and not part.get("use_pickle")
        if not plain or not re.fullmatch(r"(weight|tensor)_\d+", str(part.get("path_name"))):
            raise _unsafe(path, f"{name!r} is a pickled object")


class _Checker:
    """Walks the JSON of a program. What it does not know as harmless is refused."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.uses_outputs = False
        self._special: dict[str, Callable[[Any], None]] = {
            "target": self._operator,
            "as_operator": self._operator,
            "expr_str": self._expression,
            "in_spec": self._tree_text,
            "out_spec": self._tree_text,
        }

    def graph(self, value: Any) -> None:
        """Check a value and everything in it. Recursion is bounded by the parser's."""
        if isinstance(value, dict):
            for key, inner in value.items():
                self._text(key)
                self._entry(key, inner)
        elif isinstance(value, list):
            for inner in value:
                self.graph(inner)
        elif isinstance(value, str):
            self._text(value)

    def _entry(self, key: str, value: Any) -> None:
        if key in {"metadata", "guards_code", "as_string", "as_strings"}:
            return  # kept as text; guards are never generated from, see ProgramModule
        if key in self._special and value is not None:
            self._special[key](value)
        else:
            self.graph(value)

    def _refuse(self, what: object) -> None:
        raise _unsafe(self.path, str(what))

    def _text(self, text: str) -> None:
        """Names become Python source, where anything but a name could become code."""
        if not _NAME.fullmatch(text):
            self._refuse(f"the name {text!r}")

    def _operator(self, name: Any) -> None:
        if not isinstance(name, str) or not _OPERATOR.fullmatch(name) or _ON_FILES.fullmatch(name):
            self._refuse(f"{name!r} is no operator on tensors that equipoise knows")

    def _expression(self, text: Any) -> None:
        """A size such as ``4*s0``: sympy evaluates it as Python."""
        try:
            nodes = list(ast.walk(ast.parse(str(text)[:4096], mode="eval")))
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            nodes = []
        if not nodes or not all(map(_harmless, nodes)):
            self._refuse(f"the size {text!r}")

    def _tree_text(self, text: Any) -> None:
        try:
            _, tree = json.loads(text)
        except (TypeError, ValueError, RecursionError) as error:
            raise SourceError(f"{self.path} is damaged: a tree spec is no JSON") from error
        self._tree(tree)

    def _tree(self, tree: Any) -> None:
        """Containers of plain kinds; others, and enums among the keys, name modules to import."""
        kind = tree.get("type") if isinstance(tree, dict) else ""
        is_output = isinstance(kind, str) and kind.startswith(_MODEL_OUTPUTS)
        if not is_output and not (kind is None or kind in _TREES):
            self._refuse(f"a container of kind {kind!r}")
        self.uses_outputs = self.uses_outputs or is_output
        context = tree.get("context")
        keys = json.loads(context) if isinstance(context, str) else context
        if not (keys is None or isinstance(keys, list)):
            self._refuse(f"a container with {keys!r}")
        for key in keys or ():
            self._text(key) if isinstance(key, str) else self._refuse(f"the key {key!r}")
        for child in tree.get("children_spec", ()):
            self._tree(child)


def _harmless(node: ast.AST) -> bool:
    """Whether a part of an expression is arithmetic on sizes."""
    if isinstance(node, ast.Name):
        known = node.id in _FUNCTIONS or node.id in _CONSTANTS
        return known or _SYMBOL.fullmatch(node.id) is not None
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.fullmatch(r"\w+", node.value) is not None
    return isinstance(node, _SYNTAX)


def program_inputs(program: Any) -> tuple[TensorSpec, ...]:
    """The inputs of a program, by the names of its ``forward``.

    A symbolic size has a name: ``batch`` for the first axis, else that of the input and its axis,
    as in ``image_2``. Equal symbols have equal names.

    Raises:
        SourceError: It takes something else than tensors, or nests them.
    """
    names = _axis_names(program)
    return tuple(
        TensorSpec(
            name=name,
            dtype=str(value.dtype).removeprefix("torch."),
            shape=tuple(_size(names, d, name, axis) for axis, d in enumerate(value.shape)),
        )
        for name, value in _user_inputs(program)
    )


def program_ranges(program: Any) -> dict[str, tuple[int, int | None]]:
    """The smallest and largest size of each named dimension; None for no largest."""
    names = _axis_names(program)
    ranges = {}
    for symbol, allowed in program.range_constraints.items():
        if str(symbol) in names:
            largest = int(allowed.upper) if allowed.upper.is_Integer else None
            ranges[names[str(symbol)]] = (int(allowed.lower), largest)
    return ranges


def _user_inputs(program: Any) -> Iterator[tuple[str, Any]]:
    torch = extras.require("torch")
    placeholders = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    for name in program.graph_signature.user_inputs:
        value = placeholders[name].meta.get("val") if name in placeholders else None
        if not isinstance(value, torch.Tensor):
            raise SourceError(f"the program takes {name!r}, which is no tensor")
        yield name, value


def _axis_names(program: Any) -> dict[str, str]:
    """A name for each symbol: what its first use suggests, and no other symbol has."""
    names: dict[str, str] = {}
    for name, value in _user_inputs(program):
        for axis, size in enumerate(value.shape):
            if not isinstance(size, int) and str(size) not in names:
                first = axis == 0 and "batch" not in names.values()
                names[str(size)] = "batch" if first else f"{name}_{axis}"
    return names


def _size(names: dict[str, str], size: Any, name: str, axis: int) -> int | str:
    return size if isinstance(size, int) else names.get(str(size), f"{name}_{axis}")


def program_module(program: Any) -> Any:
    """The program as a ``torch.nn.Module`` whose ``forward`` has the program's input names.

    Its ``program`` is the program. Guards are not generated: the text that they would be made from
    comes out of the file. Sizes out of range are caught by the program's own checks.

    Raises:
        SourceError: It takes nested inputs.
    """
    torch = extras.require("torch")
    names = [spec.name for spec in program_inputs(program)]
    positional = _positional(program, names)

    class ProgramModule(torch.nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.inner = program.module(check_guards=False)
            self.program = program

        def forward(self, *tensors: Any, **named: Any) -> Any:
            given = dict(zip(names, tensors, strict=False)) | named
            first = [given.pop(name) for name in names[:positional]]
            return self.inner(*first, **given)

        def train(self, mode: bool = True) -> Any:  # noqa: ARG002, FBT001, FBT002
            return self  # dropout was decided when the program was exported

    ProgramModule.forward.__signature__ = _signature(names)  # type: ignore[attr-defined]
    return ProgramModule()


def _positional(program: Any, names: list[str]) -> int:
    """How many inputs go by position; the others by keyword."""
    spec = program.call_spec.in_spec
    arguments, keywords = (spec.child(0), spec.child(1))
    flat = [child.is_leaf() for tree in (arguments, keywords) for child in tree.children()]
    if not all(flat) or len(flat) != len(names):
        raise SourceError(
            "the program takes lists or dicts of tensors, which ONNX has no inputs for",
            hint="Export a wrapper whose forward takes one tensor per parameter.",
        )
    return len(arguments.children())


def _signature(names: list[str]) -> Any:
    either = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Signature([inspect.Parameter(name, either) for name in ("self", *names)])
