"""The conformance suite of a runtime: what every runtime does alike, as cases to run.

For pytest, in the tests of the package that brings the runtime::

    from equipoise import testing

    @pytest.mark.parametrize("case", testing.cases(), ids=str)
    def test_conformance(case, tmp_path):
        case.run("my-runtime", folder=tmp_path)

Elsewhere ``check_runtime("my-runtime")`` runs them all. A case that does not hold raises
AssertionError with what was expected and what was found. Needs the extra ``tune``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from equipoise import extras, fs, onnxio
from equipoise.errors import EquipoiseError, InputError, IntegrityError, UsageError
from equipoise.runtimes.build import BuildConfig, build
from equipoise.runtimes.engine import ENGINE_MANIFEST
from equipoise.runtimes.protocol import EngineRecord, Session, SessionSettings
from equipoise.runtimes.registry import builder, session_opener
from equipoise.spec import Array, Feeds, TensorSpec

BATCHES: Final = (1, 3)
"""Batch sizes at which the model is run."""

_TOLERANCE: Final = 1e-4
_MODEL_TEXT: Final = """
<ir_version: 9, opset_import: ["" : 20]>
conformance (float[batch, 4] x, int64[batch] ids) => (float[batch, 3] y, float[batch, 3] rows) {
    product = MatMul(x, weight)
    rows = Gather <axis = 0> (table, ids)
    sum = Add(product, rows)
    y = Relu(sum)
}
"""
_INPUTS: Final = (
    TensorSpec(name="x", dtype="float32", shape=("batch", 4)),
    TensorSpec(name="ids", dtype="int64", shape=("batch",)),
)
_OUTPUTS: Final = (
    TensorSpec(name="y", dtype="float32", shape=("batch", 3)),
    TensorSpec(name="rows", dtype="float32", shape=("batch", 3)),
)
_WEIGHTS: Final[dict[str, Array]] = {
    "weight": np.linspace(-1.0, 1.0, 12, dtype=np.float32).reshape(4, 3),
    "table": np.linspace(-2.0, 3.0, 15, dtype=np.float32).reshape(5, 3),
}


def write_model(path: Path) -> None:
    """Write the ONNX model that the cases build: two inputs of two types, two outputs."""
    onnx: Any = extras.require("onnx")
    parser: Any = extras.require("onnx.parser")
    model = parser.parse_model(_MODEL_TEXT)
    tensors = [onnx.numpy_helper.from_array(array, name) for name, array in _WEIGHTS.items()]
    model.graph.initializer.extend(tensors)
    onnxio.save_model(model, path)


def sample_feeds(batch: int) -> dict[str, Array]:
    """Inputs for :func:`write_model`'s model: x float32[batch, 4] and ids int64[batch]."""
    random = np.random.default_rng(batch)
    return {
        "x": random.normal(size=(batch, 4)).astype(np.float32),
        "ids": random.integers(0, 5, size=batch),
    }


def expected_outputs(feeds: Feeds) -> dict[str, Array]:
    """What the model gives for ``feeds``, by NumPy."""
    rows = _WEIGHTS["table"][feeds["ids"]]
    return {"y": np.maximum(feeds["x"] @ _WEIGHTS["weight"] + rows, 0.0), "rows": rows}


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A runtime under test and a folder to work in.

    Attributes:
        runtime: Its name.
        folder: An empty directory.
    """

    runtime: str
    folder: Path

    def build(self) -> tuple[EngineRecord, Path]:
        """Build the model; the record and the directory of the engine."""
        model, output = self.folder / "model.onnx", self.folder / "engine"
        write_model(model)
        fs.make_directory(output)
        config = BuildConfig(model=model, runtime=self.runtime, settings=SessionSettings())
        return build(config, output=output), output

    def session(self, engine: Path | None = None) -> Session:
        """Open ``engine``, or one built for the purpose."""
        if engine is None:
            made, output = self.build()
            engine = output / made.file
        return session_opener(self.runtime)(engine, settings=SessionSettings())


@dataclass(frozen=True, kw_only=True)
class Case:
    """One thing that every runtime does.

    Attributes:
        name: Short name, also ``str(case)``.
        computes: Whether the case looks at numbers, which a runtime such as ``null`` has none of.
        check: Raises AssertionError when the subject does not do it.
    """

    name: str
    computes: bool
    check: Callable[[Subject], None]

    def __str__(self) -> str:
        return self.name

    def run(self, runtime: str, *, folder: Path) -> None:
        """Check ``runtime`` in ``folder``.

        Raises:
            AssertionError: It does not do what the case says.
            UsageError: There is no such runtime.
        """
        self.check(Subject(runtime=runtime, folder=folder))


_CASES: Final[list[Case]] = []


def _case(*, computes: bool = False) -> Callable[[Callable[[Subject], None]], object]:
    def register(check: Callable[[Subject], None]) -> Callable[[Subject], None]:
        name = check.__name__.removeprefix("_").replace("_", "-")
        _CASES.append(Case(name=name, computes=computes, check=check))
        return check

    return register


def cases(*, computes: bool = True) -> tuple[Case, ...]:
    """The suite.

    Args:
        computes: Whether the runtime computes; without, cases about numbers are left out.
    """
    return tuple(case for case in _CASES if computes or not case.computes)


def check_runtime(name: str, *, computes: bool = True) -> None:
    """Run every case on the runtime ``name``.

    Raises:
        AssertionError: Names each case that does not hold, and why.
        UsageError: There is no such runtime.
    """
    builder(name)
    problems = []
    for case in cases(computes=computes):
        with fs.scratch_directory() as folder:
            try:
                case.run(name, folder=folder)
            except (AssertionError, EquipoiseError) as error:
                problems.append(f"{case}: {error}")
    _expect(not problems, f"runtime {name!r} does not conform:\n" + "\n".join(problems))


def _expect(condition: object, message: str) -> None:
    if not condition:
        raise AssertionError(message)


class _Refused(AbstractContextManager["_Refused"]):
    """Expect an error of one of ``kinds`` whose message has ``word``."""

    def __init__(self, *kinds: type[EquipoiseError], word: str, what: str) -> None:
        self._kinds, self._word, self._what = kinds, word, what

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if error is None or not isinstance(error, self._kinds):
            expected = " or ".join(kind.__name__ for kind in self._kinds)
            raise AssertionError(
                f"{self._what}: expected {expected},"
                f" got {type(error).__name__ if error else 'no error'}"
            ) from error
        _expect(self._word in str(error), f"{self._what}: {error} does not name {self._word!r}")
        return True


def _expect_close(found: Mapping[str, Array], feeds: Feeds, *, what: str) -> None:
    for name, expected in expected_outputs(feeds).items():
        worst = float(np.abs(found[name] - expected).max(initial=0.0))
        _expect(worst <= _TOLERANCE, f"{what}: output {name!r} is off by {worst:.3g}")


def _expect_form(found: Mapping[str, Array], *, batch: int) -> None:
    names = [spec.name for spec in _OUTPUTS]
    _expect(set(found) == set(names), f"outputs are {sorted(found)}, not {sorted(names)}")
    for spec in _OUTPUTS:
        array, shape = found[spec.name], (batch, *spec.shape[1:])
        _expect(isinstance(array, np.ndarray), f"output {spec.name!r} is no NumPy array")
        _expect(array.shape == shape, f"output {spec.name!r} has shape {array.shape}, not {shape}")
        _expect(array.dtype == spec.dtype, f"output {spec.name!r} is {array.dtype}")


@_case()
def _says_whether_it_is_available(subject: Subject) -> None:
    found = builder(subject.runtime).availability()
    if found.available:
        _expect(found.version, "available, but without a version")
    else:
        _expect(found.reason and found.install, "not available, without a reason or install line")


@_case()
def _builds_an_engine_that_its_record_describes(subject: Subject) -> None:
    made, output = subject.build()
    _expect((output / made.file).exists(), f"the engine file {made.file!r} is not in the output")
    size = fs.tree_size_bytes(output) - (output / ENGINE_MANIFEST).stat().st_size
    _expect(made.size_bytes == size, f"size_bytes is {made.size_bytes}; on disk it is {size}")


@_case()
def _leaves_the_model_as_it_was(subject: Subject) -> None:
    write_model(subject.folder / "same.onnx")
    subject.build()
    same = fs.sha256_file(subject.folder / "same.onnx")
    _expect(fs.sha256_file(subject.folder / "model.onnx") == same, "build changed its input")


@_case()
def _refuses_a_model_that_is_none(subject: Subject) -> None:
    model, output = subject.folder / "broken.onnx", subject.folder / "engine"
    fs.write_bytes(model, b"this is no model")
    fs.make_directory(output)
    with _Refused(InputError, word="broken.onnx", what="a file that is no ONNX model"):
        builder(subject.runtime).build(model, output, settings=SessionSettings())
    with _Refused(InputError, word="missing.onnx", what="a missing model"):
        missing = subject.folder / "missing.onnx"
        builder(subject.runtime).build(missing, output, settings=SessionSettings())
    _expect(not any(output.iterdir()), "a refused build left files in the output")


@_case()
def _has_the_specs_of_the_model(subject: Subject) -> None:
    with subject.session() as session:
        for found, expected in ((session.inputs, _INPUTS), (session.outputs, _OUTPUTS)):
            forms = [_form(spec) for spec in found]
            wanted = [_form(spec) for spec in expected]
            _expect(forms == wanted, f"specs are {forms}, not {wanted}")


def _form(spec: TensorSpec) -> tuple[str, str, tuple[int | None, ...]]:
    """Name, dtype and sizes, None for dynamic: a runtime may rename dynamic dimensions."""
    return spec.name, spec.dtype, tuple(d if isinstance(d, int) else None for d in spec.shape)


@_case()
def _gives_arrays_of_the_right_form_at_two_batch_sizes(subject: Subject) -> None:
    with subject.session() as session:
        for batch in (*BATCHES, BATCHES[0]):
            _expect_form(session.run(sample_feeds(batch)), batch=batch)


@_case(computes=True)
def _agrees_with_numpy_at_two_batch_sizes(subject: Subject) -> None:
    with subject.session() as session:
        for batch in (*BATCHES, BATCHES[0]):
            feeds = sample_feeds(batch)
            _expect_close(session.run(feeds), feeds, what=f"batch {batch}")


@_case(computes=True)
def _agrees_with_numpy_without_optimisation(subject: Subject) -> None:
    made, output = subject.build()
    settings = SessionSettings(optimize="none", threads=2)
    feeds = sample_feeds(3)
    with session_opener(subject.runtime)(output / made.file, settings=settings) as session:
        _expect_close(session.run(feeds), feeds, what="optimize='none'")


@_case(computes=True)
def _takes_arrays_that_are_not_contiguous(subject: Subject) -> None:
    feeds = sample_feeds(3)
    wide = np.repeat(feeds["ids"], 2)
    strided = {"x": np.asfortranarray(feeds["x"]), "ids": wide[::2]}
    with subject.session() as session:
        _expect_close(session.run(strided), feeds, what="strided inputs")


@_case(computes=True)
def _keeps_earlier_results_and_its_inputs_as_they_were(subject: Subject) -> None:
    first, second = sample_feeds(3), {n: a[::-1].copy() for n, a in sample_feeds(3).items()}
    with subject.session() as session:
        results = session.run(first)
        session.run(second)
        _expect_close(results, sample_feeds(3), what="results after a second run")
    for name, array in sample_feeds(3).items():
        _expect(np.array_equal(first[name], array), f"run changed its input {name!r}")


def _wrong_feeds() -> dict[str, tuple[str, dict[str, Any]]]:
    """What is wrong -> the tensor that the error has to name, and such feeds."""
    good = sample_feeds(3)
    x, ids = good["x"], good["ids"]
    return {
        "a missing input": ("ids", {"x": x}),
        "an unknown input": ("extra", {**good, "extra": x}),
        "no input": ("ids", {}),
        "a wrong dtype": ("x", {**good, "x": x.astype(np.float64)}),
        "a wrong integer type": ("ids", {**good, "ids": ids.astype(np.int32)}),
        "a wrong rank": ("x", {**good, "x": x[0]}),
        "a rank too many": ("ids", {**good, "ids": ids[:, None]}),
        "a wrong fixed size": ("x", {**good, "x": x[:, :3]}),
        "a list": ("x", {**good, "x": x.tolist()}),
    }


@_case()
def _refuses_feeds_that_do_not_fit_and_goes_on(subject: Subject) -> None:
    with subject.session() as session:
        for what, (name, feeds) in _wrong_feeds().items():
            with _Refused(InputError, word=name, what=what):
                session.run(feeds)
        _expect_form(session.run(sample_feeds(1)), batch=1)


@_case()
def _fills_the_buffers_of_the_caller(subject: Subject) -> None:
    feeds = sample_feeds(3)
    buffers = {s.name: np.full((3, 3), 7.0, dtype=s.dtype) for s in _OUTPUTS}
    with subject.session() as session:
        plain = session.run(feeds)
        filled = session.run(feeds, out=buffers)
        one = session.run(feeds, out={"y": buffers["y"]})
    _expect_form(one, batch=3)
    for name, buffer in buffers.items():
        _expect(filled[name] is buffer, f"the buffer for {name!r} did not come back")
        _expect(np.array_equal(buffer, plain[name]), f"the buffer for {name!r} was not filled")
    _expect(one["y"] is buffers["y"], "the buffer for 'y' alone did not come back")
    _expect(one["rows"] is not buffers["rows"], "an output that was not named is no new array")


@_case()
def _refuses_buffers_that_do_not_fit(subject: Subject) -> None:
    wrong: dict[str, tuple[str, dict[str, Array]]] = {
        "a buffer for no output": ("z", {"z": np.zeros((3, 3), dtype=np.float32)}),
        "a buffer of a wrong shape": ("y", {"y": np.zeros((1, 3), dtype=np.float32)}),
        "a buffer of a wrong dtype": ("rows", {"rows": np.zeros((3, 3))}),
    }
    with subject.session() as session:
        for what, (name, buffers) in wrong.items():
            with _Refused(InputError, word=repr(name), what=what):
                session.run(sample_feeds(3), out=buffers)


@_case()
def _refuses_to_run_once_closed(subject: Subject) -> None:
    session = subject.session()
    session.close()
    session.close()
    with _Refused(UsageError, word="closed", what="a run after close"):
        session.run(sample_feeds(1))


@_case()
def _closes_at_the_end_of_a_with_block(subject: Subject) -> None:
    with subject.session() as session:
        session.run(sample_feeds(1))
    with _Refused(UsageError, word="closed", what="a run after the with block"):
        session.run(sample_feeds(1))


@_case()
def _opens_an_engine_twice(subject: Subject) -> None:
    made, output = subject.build()
    with subject.session(output / made.file) as kept:
        subject.session(output / made.file).close()
        _expect_form(kept.run(sample_feeds(1)), batch=1)


@_case()
def _refuses_an_engine_that_is_broken(subject: Subject) -> None:
    made, output = subject.build()
    engine = output / made.file
    whole = engine.read_bytes()
    broken = {"an engine cut short": whole[: len(whole) // 2], "noise": b"\x93" * 512, "": b""}
    for what, content in broken.items():
        fs.write_bytes(engine, content)
        with _Refused(InputError, IntegrityError, word=made.file, what=what or "an empty engine"):
            subject.session(engine)
    fs.remove(engine)
    with _Refused(InputError, IntegrityError, word=made.file, what="a missing engine"):
        subject.session(engine)
