"""Locks: what is locked, what changes are seen, and what makes no gate fail."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from equipoise import locking, record
from equipoise.errors import IncompatibleError, InputError, UsageError
from equipoise.jobs import JobConfig, make_pipeline
from equipoise.locked import (
    Lock,
    compare,
    incomparable,
    latency_gate,
    read_lock,
)
from equipoise.locking import LatencySettings, check_locked, make_lock
from equipoise.measure.interval import Interval
from equipoise.measure.kernels import kernels_of, lost
from equipoise.measure.regression import Openings, change, time_openings
from equipoise.pipeline import Pipeline
from equipoise.report.gates import Gate
from equipoise.runtimes.engine import EngineFile
from equipoise.runtimes.protocol import SessionSettings

SETTINGS = LatencySettings(rounds=2, pairs=(4, 8))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, linear_onnx: Path) -> Path:
    """400 samples, labelled with the decisions of the linear model."""
    x = np.random.default_rng(0).normal(size=(400, 4)).astype(np.float32)
    with EngineFile(file=linear_onnx).session(SessionSettings()) as session:
        label = session.run({"x": x})["y"].argmax(1).astype(np.int64)
    path = tmp_path_factory.mktemp("data") / "data.npz"
    np.savez(path, x=x, label=label)
    return path


def pipeline_of(model: Path, data: Path, *, metric: str = "accuracy") -> Pipeline:
    """As ``check`` makes it."""
    return make_pipeline(
        JobConfig(
            source=str(model),
            data=str(data),
            metric=metric or "accuracy",
            threads=1,
            labelled=bool(metric),
        )
    )


@pytest.fixture(scope="module")
def pipeline(linear_onnx: Path, data: Path) -> Pipeline:
    return pipeline_of(linear_onnx, data)


@pytest.fixture(scope="module")
def locked(linear_onnx: Path, pipeline: Pipeline) -> Lock:
    """A lock of the float model itself, really measured."""
    with pytest.MonkeyPatch.context() as patch:
        quickly(patch)
        return make_lock(EngineFile(file=linear_onnx), pipeline, settings=SETTINGS)


def quickly(patch: pytest.MonkeyPatch) -> None:
    """Time in this process, with less warm-up: the engines are tiny."""
    patch.setattr("equipoise.measure.latency._WARM_UP_S", 0.01)
    patch.setattr(
        locking,
        "in_children",
        lambda config: lambda pairs: time_openings(replace(config, pairs=pairs), output=Path()),
    )


@pytest.fixture
def lock_file(locked: Lock, tmp_path: Path) -> Path:
    path = tmp_path / "equipoise.lock.json"
    path.write_text(record.dumps(locked))
    return path


def changed(model: Path, path: Path, edit: Callable[[Any], None]) -> EngineFile:
    """Another engine made of ``model``."""
    import onnx

    found = onnx.load(model)
    edit(found.graph)
    onnx.save(found, path)
    return EngineFile(file=path)


def weights(name: str, change_of: Callable[[np.ndarray], np.ndarray]) -> Callable[[Any], None]:
    """An edit of one initializer."""

    def edit(graph: Any) -> None:
        from onnx import numpy_helper

        for tensor in graph.initializer:
            if tensor.name == name:
                array = change_of(numpy_helper.to_array(tensor)).astype(np.float32)
                tensor.CopyFrom(numpy_helper.from_array(array, name))

    return edit


def failed(gates: tuple[Gate, ...]) -> set[str]:
    return {gate.name for gate in gates if not gate.passed}


def test_a_lock_is_canonical_and_comes_back_as_it_was(locked: Lock, lock_file: Path) -> None:
    """The same figures make the same bytes, in an order that diffs show well."""
    text = lock_file.read_text()
    assert read_lock(lock_file) == locked
    assert record.dumps(read_lock(lock_file)) == text
    assert text == json.dumps(json.loads(text), indent=2, sort_keys=True) + "\n"


def test_a_lock_holds_what_was_measured(locked: Lock, linear_onnx: Path) -> None:
    """All figures, where and on what."""
    figures, compared = locked.figures, locked.compared
    assert (figures.metric, figures.reference_metric, figures.drop.value) == (1.0, 1.0, 0.0)
    assert figures.size_bytes == linear_onnx.stat().st_size
    assert sum(figures.kernels.values()) >= 1
    assert [output.name for output in figures.parity] == ["y"]
    assert (compared.metric, compared.threads, compared.target) == ("accuracy", 1, "cpu")
    assert 100 < compared.samples <= 400
    openings = locked.latency.openings
    assert 8 <= len(openings.log_ratios) <= 16
    assert len(openings.log_ratios) == len(openings.engine_ms) == len(openings.baseline_ms)
    assert 0.5 < locked.latency.ratio < 2
    assert "onnxruntime" in locked.versions
    assert "missing" not in locked.versions.values()


def test_paths_below_the_working_directory_are_locked_without_what_is_above(
    linear_onnx: Path, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lock is committed: it does not say where its maker keeps the repository."""
    shutil.copy(linear_onnx, tmp_path / "model.onnx")
    shutil.copy(data, tmp_path / "data.npz")
    monkeypatch.chdir(tmp_path)
    found = pipeline_of(tmp_path / "model.onnx", tmp_path / "data.npz")
    compared = locking._compared(EngineFile(file=tmp_path / "model.onnx"), found)
    assert (compared.source, compared.data) == ("model.onnx", "data.npz")


def test_an_unchanged_engine_passes_every_gate(
    lock_file: Path, linear_onnx: Path, pipeline: Pipeline
) -> None:
    """Measured anew, in new processes. The machine of the tests may be busy: a slow-down of a half
    is what is looked for here; benchmarks/lock.py has the rates of error."""
    settings = replace(SETTINGS, slowdown=0.5)
    gates = check_locked(lock_file, EngineFile(file=linear_onnx), pipeline, settings=settings)
    assert failed(gates) == set()
    assert [gate.name for gate in gates] == [
        "same comparison", "drop of accuracy", "y: SQNR", "y: decisions that differ", "size",
        "kernels", "latency",
    ]  # fmt: skip
    assert {gate.group for gate in gates} == {"lock"}
    assert "openings" in gates[-1].measured


def test_a_slower_engine_fails_by_its_latency_alone(
    lock_file: Path, linear_onnx: Path, pipeline: Pipeline, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The same outputs to the last bit; and 40 more nodes of work on the way."""

    def slow(graph: Any) -> None:
        from onnx import helper, numpy_helper

        eye = np.eye(3, dtype=np.float32)
        wide = np.concatenate([eye, np.zeros((3, 1021), np.float32)], axis=1)
        graph.initializer.append(numpy_helper.from_array(wide, "wide"))
        graph.initializer.append(numpy_helper.from_array(wide.T.copy(), "narrow"))
        graph.node[-1].output[0] = "h0"
        for index in range(20):
            out = "y" if index == 19 else f"h{index + 1}"
            up = helper.make_node("MatMul", [f"h{index}", "wide"], [f"w{index}"])
            down = helper.make_node("MatMul", [f"w{index}", "narrow"], [out])
            graph.node.extend([up, down])

    quickly(monkeypatch)
    engine = changed(linear_onnx, tmp_path / "slow.onnx", slow)
    gates = check_locked(lock_file, engine, pipeline, settings=SETTINGS)
    assert "latency" in failed(gates)
    assert failed(gates) <= {"latency", "size"}
    gate = gates[-1]
    assert gate.measured.startswith("+")
    assert "slower" in gate.advice
    assert "equipoise lock" in gate.advice


def test_noise_in_the_weights_fails_the_parity_and_decisions_the_metric(
    lock_file: Path, linear_onnx: Path, pipeline: Pipeline, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A little noise is seen in the outputs; other weights in the decisions too."""
    monkeypatch.setattr(locking, "in_children", lambda _: _same_as(read_lock(lock_file)))
    little = changed(linear_onnx, tmp_path / "a.onnx", weights("w", lambda w: w * 1.0003))
    assert failed(check_locked(lock_file, little, pipeline)) == {"y: SQNR"}
    other = changed(linear_onnx, tmp_path / "b.onnx", weights("w", lambda w: -w))
    assert failed(check_locked(lock_file, other, pipeline)) == {
        "y: SQNR", "y: decisions that differ", "drop of accuracy",
    }  # fmt: skip


def _same_as(locked: Lock) -> Callable[[int], Openings]:
    """Openings as they were locked, for tests of what does not depend on the clock."""
    ratios = locked.latency.openings.log_ratios

    def measure(pairs: int) -> Openings:
        return Openings(log_ratios=(ratios * 8)[: 2 * pairs])

    return measure


def test_other_samples_and_another_metric_are_another_comparison(
    lock_file: Path, linear_onnx: Path, data: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Nothing is compared in silence with figures of other data."""
    monkeypatch.setattr(locking, "in_children", lambda _: pytest.fail("latency was measured"))
    arrays = dict(np.load(data))
    other = tmp_path / "other.npz"
    np.savez(other, x=arrays["x"] * 0.9, label=arrays["label"])
    engine = EngineFile(file=linear_onnx)
    gates = check_locked(lock_file, engine, pipeline_of(linear_onnx, other))
    assert "same comparison" in failed(gates)
    assert gates[-1].passed
    assert gates[-1].measured.startswith("not compared: locked with samples")
    was = read_lock(lock_file)
    now = replace(was, compared=replace(was.compared, metric="cosine"))
    gates = tuple(compare(was, now, limits={}))
    assert failed(gates) == {"same comparison"}
    assert gates[1].measured == "not compared: locked was accuracy"


def test_data_without_labels_are_locked_with_the_cosine(
    linear_onnx: Path, data: Path, monkeypatch: pytest.MonkeyPatch, locked: Lock
) -> None:
    """A metric that needs none."""
    monkeypatch.setattr(locking, "in_children", lambda _: _same_as(locked))
    arrays = dict(np.load(data))
    plain = data.with_name("plain.npz")
    np.savez(plain, x=arrays["x"])
    found = make_lock(EngineFile(file=linear_onnx), pipeline_of(linear_onnx, plain, metric=""))
    assert (found.compared.metric, found.compared.labelled) == ("cosine", False)
    assert found.compared.samples == 400
    assert found.figures.metric == pytest.approx(1.0)


def test_an_engine_of_another_runtime_names_the_target(
    linear_onnx: Path, pipeline: Pipeline, lock_file: Path
) -> None:
    """The target decides what evaluates."""
    engine = EngineFile(file=linear_onnx, runtime="openvino")
    with pytest.raises(UsageError, match=r"openvino.*target 'cpu' runs\s+onnxruntime"):
        check_locked(lock_file, engine, pipeline)


# What each gate allows, on figures that were really measured and then moved.


def gates_of(was: Lock, now: Lock, *, limits: dict[str, float] | None = None) -> dict[str, Gate]:
    return {gate.name: gate for gate in compare(was, now, limits=limits or {})}


def moved(lock: Lock, **figures: Any) -> Lock:
    return replace(lock, figures=replace(lock.figures, **figures))


@pytest.mark.parametrize(
    ("value", "passed"),
    [(0.0, True), (-0.01, True), (0.0099, True), (0.01, True), (0.0101, False), (0.2, False)],
)
def test_the_drop_may_reach_the_bound_that_was_accepted(
    locked: Lock, *, value: float, passed: bool
) -> None:
    """With 0.01 not ruled out when it was locked, 0.01 is no news, and more is."""
    was = moved(locked, drop=Interval(value=0.0, low=-0.01, high=0.01))
    now = moved(locked, metric=1 - value, drop=Interval(value=value, low=-1.0, high=1.0))
    gate = gates_of(was, now)["drop of accuracy"]
    assert gate.passed is passed
    assert "0.0100" in gate.allowed


@pytest.mark.parametrize(
    ("locked_db", "found_db", "passed"),
    [
        (40.0, 40.0, True), (40.0, 45.0, True), (40.0, 39.6, True), (40.0, 39.4, False),
        (40.0, None, True), (None, None, True), (None, 120.0, False),
    ],
)  # fmt: skip
def test_the_signal_over_noise_may_fall_by_half_a_decibel(
    locked: Lock, *, locked_db: float | None, found_db: float | None, passed: bool
) -> None:
    """None is equal to the last bit, which is above every number."""
    (parity,) = locked.figures.parity
    was = moved(locked, parity=(replace(parity, sqnr_db=locked_db, max_abs=1e-3),))
    now = moved(locked, parity=(replace(parity, sqnr_db=found_db, max_abs=1e-3),))
    assert gates_of(was, now)["y: SQNR"].passed is passed
    # Within the noise of float arithmetic, no number of decibels matters.
    assert gates_of(was, now, limits={"y": 1e-3})["y: SQNR"].passed


@pytest.mark.parametrize(
    ("before", "after", "passed"), [(1.0, 1.0, True), (0.99, 0.9895, True), (0.99, 0.98, False)]
)
def test_more_decisions_that_differ_fail(
    locked: Lock, *, before: float, after: float, passed: bool
) -> None:
    """Beyond one in a thousand."""
    (parity,) = locked.figures.parity
    was = moved(locked, parity=(replace(parity, top1_agreement=before, max_abs=1.0),))
    now = moved(locked, parity=(replace(parity, top1_agreement=after, max_abs=1.0),))
    assert gates_of(was, now)["y: decisions that differ"].passed is passed


def test_an_output_that_is_gone_fails(locked: Lock) -> None:
    """By its name."""
    gate = gates_of(locked, moved(locked, parity=()))["y: output"]
    assert not gate.passed


@pytest.mark.parametrize(
    ("size", "passed"), [(1000, True), (500, True), (1010, True), (1011, False)]
)
def test_the_size_may_grow_by_a_hundredth(locked: Lock, *, size: int, passed: bool) -> None:
    """Of what was locked."""
    was, now = moved(locked, size_bytes=1000), moved(locked, size_bytes=size)
    assert gates_of(was, now)["size"].passed is passed


@pytest.mark.parametrize(
    ("before", "now", "words"),
    [
        ({"QLinearConv": 6}, {"QLinearConv": 6}, ""),
        ({"QLinearConv": 6}, {"QLinearConv": 4, "FusedConv": 2}, "Conv: 6 in integers, now 4"),
        ({"QLinearConv": 6}, {"QLinearConv": 4}, ""),  # a smaller model
        ({"QLinearConv": 4, "FusedConv": 2}, {"QLinearConv": 6}, ""),
        ({"MatMulInteger": 4}, {"QLinearMatMul": 4}, ""),
        ({"QGemm": 1}, {"Gemm": 1, "DequantizeLinear": 2}, "MatMul: 1 in integers, now 0"),
        ({"MatMulNBits": 3}, {"MatMul": 3}, "MatMul: 3 in integers, now 0"),
        ({"DynamicQuantizeMatMul": 3}, {"MatMulIntegerToFloat": 3, "DynamicQuantizeLinear": 3}, ""),
        ({"Convolution u8": 5, "Reorder f32": 2}, {"Convolution f32": 5}, "Convolution: 5"),
        ({"Attention": 6}, {"MatMul": 12, "Softmax": 6}, "Attention: 6, now 0"),
        ({"SkipLayerNormalization": 12, "MatMul": 1}, {"Add": 12, "MatMul": 1, "Mul": 9}, "Skip"),
        ({"Attention": 6, "MatMul": 9}, {"Attention": 3, "MatMul": 5}, ""),  # fewer blocks
        ({"FusedConv": 4}, {"QLinearConv": 4, "QuantizeLinear": 1}, ""),
        ({"Conv": 3}, {"Conv": 3, "Relu": 3}, "Relu: 0 alone, now 3"),
        ({"Conv": 3}, {"Conv": 4, "Relu": 1}, ""),  # a larger model
        ({}, {"Conv": 3, "Relu": 3}, ""),
    ],
)
def test_kernels_that_were_lost_are_named(
    locked: Lock, *, before: dict[str, int], now: dict[str, int], words: str
) -> None:
    """Integers that run in float, and fusions that came apart; a smaller model has lost none."""
    found = lost(before, now)
    assert len(found) == bool(words)
    assert words in "".join(found)
    if before:
        gate = gates_of(moved(locked, kernels=before), moved(locked, kernels=now))["kernels"]
        assert gate.passed is not bool(words)


def test_kernels_are_counted_by_the_runtime(conv_onnx: Path) -> None:
    """The activation is part of the convolution in the graph that runs."""
    found = kernels_of(EngineFile(file=conv_onnx), threads=1)
    assert found["Gemm"] == 1
    assert "Relu" not in found
    assert kernels_of(EngineFile(file=conv_onnx, runtime="null"), threads=1) == {}


def test_kernels_of_another_cpu_or_of_a_silent_runtime_are_not_compared(locked: Lock) -> None:
    """A skipped gate says so."""
    other = replace(locked, machine=replace(locked.machine, flags=("asimd",), cpu="Arm"))
    for now in (other, moved(locked, kernels={})):
        gate = gates_of(locked, now)["kernels"]
        assert gate.passed
        assert gate.measured.startswith("not compared: ")


def test_latency_is_not_compared_with_another_machine_unless_one_insists(locked: Lock) -> None:
    """Another CPU, other features under one name, another number of threads."""
    machine = locked.machine
    compared = replace(locked.compared, threads=7)
    others = [
        replace(locked, machine=replace(machine, cpu="Other CPU")),
        replace(locked, machine=replace(machine, flags=())),
        replace(locked, compared=compared),
    ]
    assert incomparable(locked, locked, any_machine=False) == ""
    for now in others:
        assert incomparable(locked, now, any_machine=False)
        assert incomparable(locked, now, any_machine=True) == ""
    runtime = replace(locked, compared=replace(locked.compared, runtime="openvino"))
    assert "runtime onnxruntime, now openvino" in incomparable(locked, runtime, any_machine=True)


def test_the_advice_names_versions_that_changed(locked: Lock) -> None:
    """The first thing to look at when a figure has moved."""
    versions = {**locked.versions, "onnxruntime": "9.9", "new": "1"}
    now = moved(replace(locked, versions=versions), drop=Interval(value=0.5, low=0.5, high=0.5))
    advice = gates_of(locked, now)["drop of accuracy"].advice
    assert f"onnxruntime {locked.versions['onnxruntime']} to 9.9" in advice
    assert "new – to 1" in advice
    assert "numpy" not in advice


def test_the_latency_gate_says_what_was_found_and_what_it_can_see(locked: Lock) -> None:
    """In per cent, with the interval, as a ratio, and with the noise of the day."""
    quiet = [0.0, 0.01] * 8
    same = change(quiet, quiet)
    gate = latency_gate(replace(locked), locked, found=same, slowdown=0.05)
    assert gate.passed
    assert "+0.0%" in gate.measured
    assert "16 openings" in gate.measured
    assert "95 of 100" in gate.advice
    slower = change(quiet, [value + math.log(1.08) for value in quiet])
    gate = latency_gate(locked, locked, found=slower, slowdown=0.05)
    assert not gate.passed
    assert "+8.0%" in gate.measured
    assert "5.0% slower" in gate.allowed


# Locks that cannot be read.


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"format": 1}', '{"format": "1"}', '{"format": 1, "format": 1}'],
)
def test_what_is_no_lock_is_refused(tmp_path: Path, text: str) -> None:
    """With the name of the file."""
    path = tmp_path / "lock.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"lock\.json"):
        read_lock(path)


def test_a_missing_lock_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_lock(tmp_path / "none.json")


def test_a_lock_of_a_later_version_is_refused(lock_file: Path) -> None:
    """Before its keys are looked at."""
    lock_file.write_text(json.dumps({"format": 2, "unheard": "of"}))
    with pytest.raises(IncompatibleError, match="format 2"):
        read_lock(lock_file)


@pytest.mark.parametrize(
    "edit",
    [
        lambda d: d["latency"]["openings"].update(log_ratios=[0.0, 0.0]),
        lambda d: d["latency"]["openings"].update(log_ratios=[0.0] * 9),
        lambda d: d["figures"].update(drop="none"),
        lambda d: d["compared"].pop("metric"),
        lambda d: d.update(extra=1),
        lambda d: d["machine"].update(flags="avx2"),
    ],
)
def test_a_lock_that_was_edited_is_refused(
    lock_file: Path, edit: Callable[[dict[str, Any]], None]
) -> None:
    """Too few openings, a wrong type, a missing key, an unknown one."""
    found = json.loads(lock_file.read_text())
    edit(found)
    lock_file.write_text(json.dumps(found))
    with pytest.raises(InputError, match=r"equipoise\.lock\.json"):
        read_lock(lock_file)
