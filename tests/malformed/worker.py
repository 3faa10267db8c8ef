"""The child that reads malformed inputs: a list of cases per line in, a verdict per line out.

Run by ``counting.Worker``. Each subject reads one kind of file as equipoise itself does, and
returns the SHA-256 of the answer. Audit hooks see what Python opens and runs while it does.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from equipoise.errors import EquipoiseError, SourceError
from equipoise.spec import Array

RUNS_CODE = {
    "exec", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork",
    "socket.connect", "socket.bind", "ctypes.dlopen", "pickle.find_class",
}  # fmt: skip
CHANGES_FILES = {"os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink"}
_LIBRARIES = tuple({os.path.realpath(p) for p in (sys.prefix, sys.base_prefix)})
_TORCH_OWN = ("torch", "collections")
_MOST_BYTES = 6 * 2**30


class Guard:
    """An audit hook: what was opened outside ``root``, and what code was run, while it is on."""

    def __init__(self) -> None:
        self.root = ""
        self.on = False
        self.seen: list[str] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event == "open":
            self._opened(args[0], args[2] if isinstance(args[2], int) else 0)
        elif event in CHANGES_FILES:
            self._opened(args[0], os.O_RDWR)
        elif event == "pickle.find_class":
            if str(args[0]).partition(".")[0] not in _TORCH_OWN:
                self.seen.append(f"{event} {args[0]}.{args[1]}")
        elif event in RUNS_CODE:
            self.seen.append(f"{event} {args!r:.80}")

    def _opened(self, path: object, flags: int) -> None:
        if isinstance(path, int) or path is None:
            return
        name = os.path.realpath(os.fsdecode(path))  # type: ignore[arg-type]
        inside = name == self.root or name.startswith(self.root + os.sep)
        library = name.startswith(_LIBRARIES) and not flags & (os.O_WRONLY | os.O_RDWR)
        if not (inside or library or name == os.devnull):
            self.seen.append(f"opened {name}")


def digest(arrays: dict[str, Array]) -> str:
    """SHA-256 of named arrays: names, types, shapes and bytes."""
    found = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        found.update(f"{name} {array.dtype} {array.shape}".encode("utf-8", "backslashreplace"))
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


def _ones(session: Any) -> dict[str, Array]:
    from equipoise.spec import ones

    feeds = ones(session.inputs)
    return {
        k: (np.linspace(-1, 1, v.size).reshape(v.shape)).astype(v.dtype) for k, v in feeds.items()
    }


def onnx_load(path: Path) -> str:
    """The protobuf with its weights."""
    from equipoise import onnxio

    model = onnxio.load_model(path)
    return hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest()


def onnx_load_ir(path: Path) -> str:
    """The graph, and every weight of it."""
    from equipoise import onnxio

    model = onnxio.load_ir(path)
    values = {
        name: value.const_value.numpy()
        for graph in model.graphs()
        for name, value in graph.initializers.items()
    }
    return digest(values)


def onnx_specs(path: Path) -> str:
    """What goes in and out: what every command looks at first."""
    from equipoise import onnxio

    return repr(onnxio.file_specs(path))


def onnx_import(path: Path) -> str:
    """As a source is taken: read, opened by ONNX Runtime, run on numbers of the right shapes."""
    from equipoise import onnxio
    from equipoise.export import onnx_source
    from equipoise.export.config import ExportConfig
    from equipoise.export.samples import random_rows
    from equipoise.runtimes.protocol import SessionSettings
    from equipoise.runtimes.registry import session_opener
    from equipoise.sources.source import Source

    onnxio.load_model(path)
    config = ExportConfig(source=Source(kind="onnx", name=str(path), path=path))
    settings = SessionSettings(optimize="none")
    with session_opener("onnxruntime")(path, settings=settings) as session:
        row = next(random_rows(session.inputs))
        return digest(onnx_source._run(session, row, config))


def onnx_open(path: Path) -> str:
    """As an engine is built: read, and opened by ONNX Runtime."""
    from equipoise import onnxio
    from equipoise.runtimes.protocol import SessionSettings
    from equipoise.runtimes.registry import session_opener

    onnxio.file_specs(path)
    session_opener("onnxruntime")(path, settings=SessionSettings()).close()
    return onnx_load(path)


def checkpoint(path: Path) -> str:
    """Tensors of a file of weights."""
    from equipoise.sources.checkpoint import read_checkpoint

    return digest({name: value.numpy() for name, value in read_checkpoint(path).items()})


def engine(path: Path) -> str:
    """An engine directory, opened and run."""
    from equipoise.runtimes.engine import open_engine

    with open_engine(path) as session:
        return digest(session.run(_ones(session)))


def openvino(path: Path) -> str:
    """An OpenVINO IR that no manifest vouches for, opened and run."""
    from equipoise.runtimes.protocol import SessionSettings
    from equipoise.runtimes.registry import session_opener

    with session_opener("openvino")(path, settings=SessionSettings()) as session:
        return digest(session.run(_ones(session)))


def golden(path: Path) -> str:
    """Golden vectors."""
    from equipoise.bundle.golden import read_golden

    arrays = {
        f"{i} {part} {name}": array
        for i, vector in enumerate(read_golden(path))
        for part in ("inputs", "reference")
        for name, array in getattr(vector, part).items()
    }
    return digest(arrays)


def npz(path: Path) -> str:
    """Arrays of a data file."""
    from equipoise.data.readers.npz import read_arrays

    return digest(read_arrays(path))


def rows(path: Path) -> str:
    """Rows of a directory, every one of them."""
    from equipoise.data.store import Rows

    stored = Rows(path)
    return digest({f"{i} {n}": a for i, row in enumerate(stored) for n, a in row.items()})


def control(path: Path) -> str:
    """Whatever the file says, to prove that each verdict can be reached."""
    word = path.read_text()
    if word == "die":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif word == "raise":
        raise ValueError(word)
    elif word == "open":
        (path.parent.parent / "outside").read_text()
    elif word == "run":
        subprocess.run(["true"], check=True)
    elif word in {"nameless", "refuse"}:
        raise SourceError(f"{path.name if word == 'refuse' else 'it'} is bad")
    return word


SUBJECTS: dict[str, Callable[[Path], str]] = {
    f.__name__: f
    for f in (
        onnx_load, onnx_load_ir, onnx_specs, onnx_import, onnx_open, checkpoint, engine, openvino,
        golden, npz, rows, control,
    )
}  # fmt: skip


def _mutated(whole: bytes, case: dict[str, Any]) -> bytes:
    if case["cut"] is not None:
        return whole[: case["cut"]]
    if case["flip"] is None:
        return whole
    changed = bytearray(whole)
    changed[case["flip"] // 8] ^= 1 << case["flip"] % 8
    return bytes(changed)


class Runner:
    """Runs cases; keeps the bytes and the answer of each whole file."""

    def __init__(self) -> None:
        self.guard = Guard()
        self._whole: dict[Path, bytes] = {}
        self._clean: dict[tuple[str, Path], str] = {}
        self._changed: Path | None = None
        self._warm: set[tuple[str, str]] = set()

    def prepare(self, case: dict[str, Any]) -> None:
        """Run the subject of ``case`` on the whole file: all that it imports is there then."""
        file = Path(case["folder"], case["file"])
        if case["good"] and (case["subject"], case["good"]) not in self._warm:
            self._warm.add((case["subject"], case["good"]))
            SUBJECTS[case["subject"]](Path(case["folder"], case["good"]))
        mutates = case["cut"] is not None or case["flip"] is not None
        if not mutates or file in self._whole:
            return
        self._whole[file] = file.read_bytes()
        subject, target = case["subject"], Path(case["folder"], case["target"])
        for _ in range(2):
            self._clean[subject, target] = SUBJECTS[subject](target)

    def _put_back(self, file: Path) -> None:
        """Before another file is changed, the last one becomes whole again."""
        if self._changed not in (None, file):
            self._changed.write_bytes(self._whole[self._changed])
        self._changed = file

    def verdict(self, case: dict[str, Any]) -> tuple[str, str]:
        """What becomes of ``case``, and what was said."""
        folder = Path(case["folder"])
        file, target = folder / case["file"], folder / case["target"]
        if file in self._whole:
            self._put_back(file)
            file.write_bytes(_mutated(self._whole[file], case))
        self.guard.root, self.guard.seen, self.guard.on = os.path.realpath(folder), [], True
        try:
            answer = SUBJECTS[case["subject"]](target)
        except EquipoiseError as error:
            found = _typed(error, case)
        except BaseException as error:  # noqa: BLE001
            self.guard.on = False
            where = traceback.extract_tb(error.__traceback__)[-1]
            found = "crashed", f"{error!r:.300} at {Path(where.filename).name}:{where.lineno}"
        else:
            same = self._clean.get((case["subject"], target)) == answer
            wanted = case["otherwise"] == "accepted"
            found = ("harmless" if same or wanted else case["otherwise"]), "accepted"
        finally:
            self.guard.on = False
        return ("escaped", "; ".join(self.guard.seen)) if self.guard.seen else found


def _typed(error: EquipoiseError, case: dict[str, Any]) -> tuple[str, str]:
    said = f"{type(error).__name__} {error.exit_code}: {error}"
    if case["otherwise"] == "accepted":
        return "silent", f"refused, and must not be: {said}"
    missing = [w for w in (Path(case["file"]).name, *case["words"]) if w not in error.message]
    if error.exit_code not in case["codes"]:
        return "crashed", f"another exit code: {said}"
    return ("crashed", f"does not say {missing}: {said}") if missing else ("typed", said)


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _verdicts(runner: Runner, cases: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for case in cases:
        runner.prepare(case)
    warm = _peak_bytes()
    yield {"warm": warm}
    for case in cases:
        begin = time.perf_counter()
        verdict, said = runner.verdict(case)
        yield {"verdict": verdict, "said": said[:1500], "seconds": time.perf_counter() - begin}
    yield {"growth": _peak_bytes() - warm}


def main() -> None:
    """Answer until there is nothing more to read."""
    resource.setrlimit(resource.RLIMIT_AS, (_MOST_BYTES, _MOST_BYTES))
    results = os.fdopen(int(sys.argv[1]), "w", encoding="utf-8")
    for line in sys.stdin:
        runner = Runner()
        for told in _verdicts(runner, json.loads(line)):
            results.write(json.dumps(told) + "\n")
            results.flush()


if __name__ == "__main__":
    main()
