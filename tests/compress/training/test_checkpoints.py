"""Checkpoints: a killed training goes on with the same numbers, and a good one is never lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from equipoise import record
from equipoise.compress.checkpoints import Checkpoints
from equipoise.compress.history import Evaluation, Standing
from equipoise.compress.train import RankConfig, TrainConfig, TrainRecord, train
from equipoise.errors import IntegrityError, OutputError, UsageError

WAIT_S = 120
RUN = """
import sys, pathlib
sys.path.insert(0, str(pathlib.Path.cwd()))
from equipoise import record
from equipoise.compress.train import RankConfig, train
config = record.loads(RankConfig, pathlib.Path(sys.argv[1]).read_text(), where="config").config
found = train(config, output=pathlib.Path(sys.argv[2]))
pathlib.Path(sys.argv[2], "record.json").write_text(record.dumps(found))
"""


def start(bench: Any, config: TrainConfig, place: str) -> subprocess.Popen[bytes]:
    """A training in a process of its own, which leaves ``record.json``."""
    folder = bench.folder / place
    folder.mkdir(exist_ok=True)
    file = bench.folder / f"{place}.json"
    file.write_text(record.dumps(RankConfig(config=config, rendezvous=Path("none"))))
    command = [sys.executable, "-c", RUN, str(file), str(folder)]
    return subprocess.Popen(command, cwd=bench.folder, start_new_session=True)


def recorded(bench: Any, place: str) -> TrainRecord:
    text = (bench.folder / place / "record.json").read_text()
    return record.loads(TrainRecord, text, where=place)


def wait_for(found: Callable[[], object]) -> None:
    """Wait until something is there."""
    deadline = time.monotonic() + WAIT_S
    while not found():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.002)


def equal(bench: Any, one: str, other: str) -> bool:
    ours, theirs = bench.weights(one), bench.weights(other)
    return ours.keys() == theirs.keys() and all(np.array_equal(ours[n], theirs[n]) for n in ours)


SETTINGS = {
    "dropout": True, "save_every": 1, "epochs": 12, "evaluate_every": 0.7, "schedule": "cosine",
}  # fmt: skip
"""Every kind of state: random numbers, momentum, position in the epoch, the best so far."""


def test_a_killed_training_goes_on_with_the_same_numbers(bench: Any) -> None:
    """SIGKILL at any moment, twice; loss curve, metrics and weights are equal to the bit."""
    unbroken = bench.train(bench.config("pictures", settings=SETTINGS), place="unbroken")
    config = bench.config("pictures", settings=SETTINGS)
    for least in (3, 20):
        child = start(bench, config, "broken")
        wait_for(lambda least=least: bench_step(config) >= least)
        child.kill()
        assert child.wait() == -signal.SIGKILL
    child = start(bench, config, "broken")
    assert child.wait(WAIT_S) == 0
    found = recorded(bench, "broken")
    assert 20 <= found.resumed_at_step < found.steps
    assert found.losses == unbroken.losses
    assert found.parts == unbroken.parts
    assert found.evaluations == unbroken.evaluations
    assert equal(bench, "unbroken", "broken")
    left = sorted(path.name for path in own(config).iterdir())
    assert left == [f"best-{found.best_step:09d}.safetensors", f"step-{found.steps:09d}"]


def own(config: TrainConfig) -> Path:
    """The one directory among the checkpoints."""
    (found,) = config.checkpoints.iterdir()
    return found


def bench_step(config: TrainConfig) -> int:
    """Step of the newest checkpoint; -1 when there is none."""
    names = [path.name for path in config.checkpoints.glob("*/step-*")]
    return max((int(name.removeprefix("step-")) for name in names), default=-1)


def stopped(bench: Any, config: TrainConfig, *, at: int) -> None:
    """Train until an evaluation at a step, and stop there."""

    class StopError(BaseException):
        """Ends it."""

    def listen(step: int, _metric: float) -> None:
        if step == at:
            raise StopError

    (bench.folder / "out").mkdir(exist_ok=True)
    with pytest.raises(StopError):
        train(config, output=bench.folder / "out", on_evaluation=listen)


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "sgd", "learning_rate": 0.1},
        {"precision": "bfloat16", "accumulate": 2},
        {"patience": 1, "learning_rate": 1e-12},
    ],
)
def test_any_settings_go_on_with_the_same_numbers(bench: Any, settings: dict[str, Any]) -> None:
    """Momentum of SGD, half precision, accumulation, an early stop after the break."""
    unbroken = bench.train(bench.taught(settings={"epochs": 3, **settings}), place="unbroken")
    config = bench.taught(settings={"epochs": 3, **settings})
    stopped(bench, config, at=5)
    found = train(config, output=bench.folder / "out")
    assert found.resumed_at_step == 5
    assert (found.losses, found.evaluations) == (unbroken.losses, unbroken.evaluations)
    assert equal(bench, "unbroken", "out")


def test_a_finished_training_is_not_trained_again(bench: Any) -> None:
    """Its record and model come from the checkpoint."""
    config = bench.config()
    first = bench.train(config)
    again = bench.train(config)
    assert again.resumed_at_step == again.steps
    assert replace(again, resumed_at_step=0, seconds=first.seconds) == first


def test_other_settings_never_meet_a_checkpoint(bench: Any) -> None:
    """Nor other weights or data; the number of threads is not a setting."""
    config = bench.config()
    bench.train(config)
    assert bench.train(replace(config, threads=2)).resumed_at_step == 10
    for other in (
        bench.config(settings={"learning_rate": 2e-2}),
        bench.config(student=bench.source(seed=5)),
    ):
        assert bench.train(other).resumed_at_step == 0
    assert len(list((bench.folder / "checkpoints-out").iterdir())) == 3


def test_another_number_of_processes_cannot_go_on(bench: Any) -> None:
    """The numbers would differ; the message has both, and nothing is lost."""
    config = bench.config()
    stopped(bench, config, at=5)
    place = own(config)
    state = place / "step-000000005/state.json"
    state.write_text(state.read_text().replace('"processes": 1', '"processes": 4'))
    with pytest.raises(UsageError, match="of 4 processes, and 1 are to go on with it") as caught:
        train(config, output=bench.folder / "out")
    assert "Run with 4 processes" in caught.value.hint
    assert state.exists()


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_checkpoint_is_named(bench: Any, file: str, damage: str) -> None:
    """With what to delete."""
    config = bench.config()
    stopped(bench, config, at=5)
    place = own(config) / "step-000000005" / file
    if damage == "gone":
        place.unlink()
    else:
        place.write_bytes(place.read_bytes()[:-20])
    with pytest.raises(IntegrityError, match=file):
        train(config, output=bench.folder / "out")


def test_a_checkpoint_of_another_model_is_refused(bench: Any) -> None:
    """Tensors of other names, as a directory that was moved by hand has them."""
    import safetensors.numpy

    config = bench.config()
    stopped(bench, config, at=5)
    place = own(config) / "step-000000005"
    for name in ("model", "optimizer"):
        good = (place / f"{name}.safetensors").read_bytes()
        safetensors.numpy.save_file({"other/x": np.ones(2)}, place / f"{name}.safetensors")
        with pytest.raises(IntegrityError, match="step-000000005 holds"):
            train(config, output=bench.folder / "out")
        (place / f"{name}.safetensors").write_bytes(good)
    assert train(config, output=bench.folder / "out").resumed_at_step == 5


def test_what_a_kill_left_half_written_is_removed(bench: Any) -> None:
    """At the next start, and nothing else is."""
    config = bench.config()
    stopped(bench, config, at=5)
    half = own(config) / ".equipoise-abc/step-000000006"
    half.mkdir(parents=True)
    train(config, output=bench.folder / "out")
    assert not half.parent.exists()


def test_checkpoints_that_cannot_be_written_stop_it_before_training(bench: Any) -> None:
    """Before a model is opened: the student is not even there."""
    (bench.folder / "file").write_text("in the way")
    missing = replace(bench.source(), weights=bench.folder / "missing.safetensors")
    config = bench.config(student=missing, checkpoints=bench.folder / "file/checkpoints")
    with pytest.raises(OutputError, match="cannot write"):
        train(config, output=bench.folder)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_directory_is_told(bench: Any) -> None:
    """As above."""
    place = bench.folder / "locked"
    place.mkdir(mode=0o500)
    with pytest.raises(OutputError, match="cannot write"):
        train(bench.config(checkpoints=place), output=bench.folder)


def test_a_disk_that_is_full_keeps_the_checkpoint_before(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error is ours, and training goes on from there with space again."""
    import errno

    import safetensors.torch

    save, calls = safetensors.torch.save_file, iter(range(100))

    def full(tensors: Any, path: Any) -> None:
        if next(calls) == 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(tensors, path)

    config = bench.config(settings={"save_every": 1})
    monkeypatch.setattr(safetensors.torch, "save_file", full)
    (bench.folder / "out").mkdir()
    with pytest.raises(OutputError, match="no space left"):
        train(config, output=bench.folder / "out")
    monkeypatch.undo()
    monkeypatch.chdir(bench.folder)
    # Best, model and optimiser at step 0, model and optimiser at step 1; then no space.
    assert bench_step(config) == 1
    assert train(config, output=bench.folder / "out").resumed_at_step == 1


finite = st.floats(allow_nan=False, allow_infinity=False)
standings = st.builds(
    Standing,
    processes=st.integers(1, 8),
    losses=st.lists(finite, max_size=5).map(tuple),
    parts=st.dictionaries(st.sampled_from(["task", "logits"]), st.tuples(finite, finite)),
    step_seconds=st.lists(finite, max_size=5).map(tuple),
    seconds=finite,
    evaluations=st.lists(
        st.builds(Evaluation, step=st.integers(0, 99), metric=finite), min_size=1, max_size=5
    ).map(tuple),
    scaler=st.dictionaries(st.sampled_from(["scale", "_growth_tracker"]), st.integers(0, 9)),
)


@given(standings)
def test_where_a_training_stands_comes_back_exactly(standing: Standing) -> None:
    """Every bit of every number."""
    assert record.loads(Standing, record.dumps(standing), where="state.json") == standing


def test_of_equal_evaluations_the_last_is_the_best(tmp_path: Path) -> None:
    """It has learned longest; its file is named by its step."""
    found = [Evaluation(step=s, metric=m) for s, m in ((0, 0.5), (3, 0.9), (6, 0.9), (9, 0.8))]
    standing = Standing(processes=1, parts={}, scaler={}, evaluations=tuple(found))
    assert standing.best.step == 6
    assert Checkpoints(tmp_path).best_file(standing).name == "best-000000006.safetensors"
