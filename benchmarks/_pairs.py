"""Two calls timed in turn, and the ratio of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from equipoise.bundle.golden import GOLDEN_FILE, Golden, golden_bytes
from equipoise.bundle.manifest import Engine, Manifest
from equipoise.bundle.writer import write_bundle
from equipoise.measure.interval import Interval, median_interval
from equipoise.runtimes.onnxruntime.session import open_session, session_options
from equipoise.runtimes.protocol import SessionSettings
from equipoise.spec import ones

SETTINGS = SessionSettings()


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """Ours over another, in turn.

    Attributes:
        rounds: Pairs of measurements.
        ours_us: Median of ours, in microseconds.
        theirs_us: Median of the other.
        ratio: Median of ours over median of the other.
        of_pairs: Median of the ratios of each pair, with its confidence interval.
    """

    rounds: int
    ours_us: float
    theirs_us: float
    ratio: float
    of_pairs: Interval


def compare(ours: Callable[[], object], theirs: Callable[[], object], *, rounds: int) -> Ratio:
    """Time both in turn, the first of each pair changing."""
    times: dict[Callable[[], object], list[int]] = {ours: [], theirs: []}
    for number in range(-max(1, rounds // 20), rounds):
        for call in (ours, theirs) if number % 2 else (theirs, ours):
            start = time.perf_counter_ns()
            call()
            taken = time.perf_counter_ns() - start
            if number >= 0:
                times[call].append(taken)
    mine, other = (np.array(times[call]) / 1e3 for call in (ours, theirs))
    return Ratio(
        rounds=rounds,
        ours_us=float(np.median(mine)),
        theirs_us=float(np.median(other)),
        ratio=float(np.median(mine) / np.median(other)),
        of_pairs=median_interval(mine / other),
    )


def raw_session(model: Path, *, spin: bool = False) -> Any:
    """A session of ONNX Runtime with the options of ours."""
    import onnxruntime

    options = session_options(SessionSettings(spin=spin))
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def bundle_of(model: Path, path: Path) -> Path:
    """A bundle of ``model`` with one golden vector of ones; an archive if it ends in ``.zip``."""
    with open_session(model, settings=SETTINGS) as session:
        feeds = ones(session.inputs)
        outputs, specs = session.run(feeds), (session.inputs, session.outputs)
    file = "engines/float32/engine.onnx"
    engine = Engine(
        name="float32",
        file=file,
        files=(file,),
        runtime="onnxruntime",
        size_bytes=model.stat().st_size,
        golden_tolerance=dict.fromkeys(outputs, 1e-3),
    )
    manifest = Manifest(name=model.name, engines=(engine,), inputs=specs[0], outputs=specs[1])
    vector = Golden(inputs=feeds, reference=outputs, outputs={"float32": outputs})
    documents = {GOLDEN_FILE: golden_bytes([vector])}
    write_bundle(path, manifest, copies={file: model}, documents=documents)
    return path
