"""Search of training settings with real Optuna: found, stopped, limited, killed and resumed."""

from __future__ import annotations

import json
import math
import os
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from equipoise import record
from equipoise.compress import study_file
from equipoise.compress.settings import Objective, TrainSettings
from equipoise.compress.study import (
    Hyperband,
    Median,
    Range,
    Space,
    StudyResult,
    StudySettings,
    search,
    space_around,
    study_name,
    with_values,
)
from equipoise.errors import (
    BackendError,
    IntegrityError,
    LockError,
    MissingExtraError,
    NonFiniteError,
    NotMetError,
    OutputError,
    RecipeError,
    ResourceError,
)

BASE = TrainSettings(learning_rate=1e-4, batch_size=32)
RATES = Space(learning_rate=Range(low=1e-6, high=1e-1, log=True))
BEST = 3e-3


def score(settings: TrainSettings) -> float:
    """Largest at a rate of 3e-3."""
    return 1.0 - 0.1 * abs(math.log10(settings.learning_rate / BEST))


def run(settings, report):
    """Four reports, each nearer to the score in the end."""
    for step in range(4):
        report(step, score(settings) - 0.5 / (step + 1))
    return score(settings)


@pytest.fixture
def asked(tmp_path) -> StudySettings:
    return StudySettings(space=RATES, storage=tmp_path / "study.db", trials=8)


def test_it_finds_better_settings_and_begins_with_those_at_hand(asked) -> None:
    found = search(asked, base=BASE, run=run)
    assert found.trials[0].settings == {"learning_rate": 1e-4}
    assert found.base_value == pytest.approx(score(BASE))
    assert found.best_value > found.base_value
    assert found.best_value == pytest.approx(score(found.best))
    assert replace(found.best, learning_rate=BASE.learning_rate) == BASE
    assert len(found.trials) == 8
    assert [t.number for t in found.trials] == list(range(8))


def test_it_is_never_worse_than_the_settings_at_hand(asked) -> None:
    """The first trial is not stopped, and of equals it wins."""
    best = replace(BASE, learning_rate=BEST)
    found = search(asked, base=best, run=run)
    assert found.best == best
    constant = replace(asked, question="constant")
    assert search(constant, base=BASE, run=lambda *_: 0.5).best == BASE


def test_bad_trials_are_stopped_early(asked) -> None:
    """They take fewer steps and are no candidates; the file says why."""
    steps = []

    def counted(settings, report):
        steps.append(0)
        for step in range(6):
            steps[-1] += 1
            report(step, score(settings))
        return score(settings)

    found = search(asked, base=BASE, run=counted)
    stopped = [t for t in found.trials if t.state == "pruned"]
    assert stopped
    assert all(t.steps < 5 and "worse than others" in t.reason for t in stopped)
    assert [t.steps + 1 for t in found.trials] == steps
    assert max(t.value for t in stopped) <= found.best_value
    everything = replace(asked, pruner=None, question="no pruner")
    assert {t.state for t in search(everything, base=BASE, run=counted).trials} == {"complete"}


def test_hyperband_stops_trials_too(asked) -> None:
    halving = replace(asked, pruner=Hyperband(reduction_factor=2), trials=12)
    states = [t.state for t in search(halving, base=BASE, run=run).trials]
    assert states[0] == "complete"
    assert "pruned" in states


def test_the_signal_passes_those_who_swallow_exceptions(asked) -> None:
    def careless(settings, report):
        for step in range(6):
            try:
                report(step, score(settings))
            except Exception:  # noqa: BLE001
                pytest.fail("it was swallowed")
        return score(settings)

    states = {t.state for t in search(asked, base=BASE, run=careless).trials}
    assert states == {"complete", "pruned"}


def test_proposals_follow_from_the_seed(asked, tmp_path) -> None:
    short = replace(asked, trials=3, pruner=None)
    first = search(short, base=BASE, run=run)
    other = search(replace(short, storage=tmp_path / "o.db", seed=1), base=BASE, run=run)
    assert settings_of(first)[0] == settings_of(other)[0]
    assert settings_of(first)[1:] != settings_of(other)[1:]


def settings_of(found: StudyResult) -> list[dict[str, object]]:
    return [dict(t.settings) for t in found.trials if t.state != "died"]


def test_a_study_goes_on_with_what_it_has(asked, tmp_path) -> None:
    """In two runs it proposes what it would have in one, and runs nothing twice."""
    ran = []

    def counted(settings, report):
        ran.append(settings.learning_rate)
        return run(settings, report)

    search(replace(asked, trials=5), base=BASE, run=counted)
    both = search(asked, base=BASE, run=counted)
    assert len(ran) == len(set(ran)) == 8
    once = search(replace(asked, storage=tmp_path / "once.db"), base=BASE, run=run)
    assert settings_of(both) == settings_of(once)
    assert search(asked, base=BASE, run=lambda *_: pytest.fail("it ran")).best == both.best


CHILD = """
import sys, time
from pathlib import Path
from equipoise.compress.settings import TrainSettings
from equipoise.compress.study import Range, Space, StudySettings, search

def run(settings, report):
    log = Path(sys.argv[2])
    with log.open("a") as file:
        print("start", repr(settings.learning_rate), file=file, flush=True)
    time.sleep(0.05 if log.read_text().count("start") < 3 else 60)
    report(0, settings.learning_rate)
    with log.open("a") as file:
        print("end", repr(settings.learning_rate), file=file, flush=True)
    return settings.learning_rate

space = Space(learning_rate=Range(low=1e-6, high=1e-1, log=True))
settings = StudySettings(space=space, storage=Path(sys.argv[1]), trials=6, pruner=None)
search(settings, base=TrainSettings(learning_rate=1e-4), run=run)
"""


def killed_in_the_third_trial(storage: Path, log: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(storage), str(log)])
    try:
        deadline = time.monotonic() + 60
        while not (log.exists() and log.read_text().count("start") == 3):
            assert child.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.wait()


def test_after_a_kill_it_goes_on_and_runs_what_died_again(tmp_path) -> None:
    """SIGKILL in the middle of a trial loses that trial's work and nothing else."""
    storage, log = tmp_path / "study.db", tmp_path / "log.txt"
    killed_in_the_third_trial(storage, log)
    before = [float(line.split()[1]) for line in log.read_text().splitlines() if "start" in line]
    ran = []

    def again(settings, report):
        ran.append(settings.learning_rate)
        report(0, settings.learning_rate)
        return settings.learning_rate

    asked = StudySettings(space=RATES, storage=storage, trials=6, pruner=None)
    base = TrainSettings(learning_rate=1e-4)
    found = search(asked, base=base, run=again)
    assert ran[0] == before[2]
    assert not set(ran) & set(before[:2])
    assert [t.state for t in found.trials].count("died") == 1
    assert [t.state for t in found.trials].count("complete") == 6
    whole = search(replace(asked, storage=tmp_path / "whole.db"), base=base, run=again)
    assert sorted(map(str, settings_of(found))) == sorted(map(str, settings_of(whole)))


def test_a_trial_that_kills_its_process_each_time_is_given_up(asked) -> None:
    """Three times it dies, then others have their turn."""

    class Dead(BaseException):
        pass

    def deadly(settings, report):
        if settings.learning_rate == BASE.learning_rate:
            raise Dead
        return run(settings, report)

    for _ in range(3):
        with pytest.raises(Dead):
            search(asked, base=BASE, run=deadly)
    found = search(asked, base=BASE, run=deadly)
    assert [t.state for t in found.trials[:4]] == ["died", "died", "died", "complete"]
    assert found.base_value is None
    assert len(found.trials) == 11


def test_the_time_is_kept(asked) -> None:
    """No trial begins after it, and one that runs stops at its next report."""

    def slow(settings, report):
        for step in range(20):
            time.sleep(0.02)
            report(step, score(settings))
        return score(settings)

    timed = replace(asked, trials=None, budget_s=0.3, pruner=None)
    first = search(replace(timed, trials=1), base=BASE, run=slow)
    timed = replace(timed, budget_s=2.5 * first.seconds)
    found = search(timed, base=BASE, run=slow)
    assert found.trials[0].state == "complete"
    assert found.trials[-1].reason.startswith("the time was over")
    assert found.seconds == pytest.approx(sum(t.seconds for t in found.trials))
    assert 2.5 * first.seconds <= found.seconds < 10 * first.seconds
    again = search(timed, base=BASE, run=lambda *_: pytest.fail("no time is left"))
    assert again.trials == found.trials


def test_the_first_trial_runs_whatever_the_time(asked) -> None:
    def slow(settings, report):
        for step in range(5):
            time.sleep(0.02)
            report(step, 0.5)
        return score(settings)

    found = search(replace(asked, budget_s=0.001), base=BASE, run=slow)
    assert [t.state for t in found.trials] == ["complete"]
    assert found.best == BASE


@pytest.mark.parametrize("error", [NonFiniteError("loss is NaN"), ResourceError("out of memory")])
def test_a_trial_that_diverges_or_does_not_fit_fails_alone(asked, error) -> None:
    def fragile(settings, report):
        if settings.learning_rate > 1e-2:
            raise error
        return run(settings, report)

    found = search(asked, base=BASE, run=fragile)
    failed = [t for t in found.trials if t.state == "failed"]
    assert failed
    assert {t.reason for t in failed} == {error.message}
    assert len(found.trials) == 8


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_metric_that_is_no_number_fails_its_trial(asked, value) -> None:
    def broken(settings, _):
        return value if settings != BASE else 0.5

    def reporting(settings, report):
        report(0, value if settings != BASE else 0.5)
        return 0.5

    for question, function in (("returned", broken), ("reported", reporting)):
        settings = replace(asked, question=question, trials=3)
        found = search(settings, base=BASE, run=function)
        assert [t.state for t in found.trials] == ["complete", "failed", "failed"]


def test_when_no_trial_ends_well_it_says_why(asked) -> None:
    def diverges(*_: object):
        raise NonFiniteError("loss is NaN at step 3")

    with pytest.raises(NotMetError, match="loss is NaN at step 3"):
        search(asked, base=BASE, run=diverges)


@pytest.mark.parametrize("error", [BackendError("it broke"), OutputError("no space")])
def test_other_errors_end_the_search_and_the_trial_runs_again(asked, error) -> None:
    ran = []

    def breaks(settings, report):
        ran.append(settings.learning_rate)
        if len(ran) == 3:
            raise error
        return run(settings, report)

    with pytest.raises(type(error), match=error.message):
        search(asked, base=BASE, run=breaks)
    search(asked, base=BASE, run=breaks)
    assert ran[3] == ran[2]


def test_another_question_is_another_study_in_the_same_file(asked) -> None:
    """Values of other data, settings or another space say nothing here."""
    search(replace(asked, trials=3), base=BASE, run=run)
    others = [
        (replace(asked, question="other data", trials=2), BASE),
        (replace(asked, trials=2), replace(BASE, epochs=5.0)),
        (replace(asked, trials=2, space=Space(warmup=Range(low=0.0, high=0.5))), BASE),
    ]
    for settings, base in others:
        assert len(search(settings, base=base, run=run).trials) == 2
    assert len(search(replace(asked, trials=3), base=BASE, run=run).trials) == 3
    longer = replace(asked, trials=99, budget_s=1.0, pruner=None, seed=5)
    assert study_name(longer, base=BASE) == study_name(asked, base=BASE)


def test_every_setting_of_the_space_is_searched(tmp_path) -> None:
    goal = Objective(task=1.0, logits=1.0, hidden=0.5, attention=0.5, features=0.5)
    base = replace(BASE, objective=goal)
    weight = Range(low=0.1, high=2.0)
    space = Space(
        learning_rate=Range(low=1e-5, high=1e-3, log=True), warmup=Range(low=0, high=0.5),
        weight_decay=Range(low=0.001, high=0.1, log=True), temperature=Range(low=1, high=4),
        task=weight, logits=weight, hidden=weight, attention=weight, features=weight,
        batch_size=(16, 32, 64), optimizer=("adamw", "sgd"),
    )  # fmt: skip
    seen = []
    search(
        StudySettings(space=space, storage=tmp_path / "s.db", trials=8),
        base=base,
        run=lambda settings, _: seen.append(settings) or 0.5,
    )
    for name in space.__dataclass_fields__:
        owner = "objective" if hasattr(goal, name) else ""
        values = {getattr(getattr(s, owner) if owner else s, name) for s in seen}
        assert len(values) > 1, name
    assert {type(s.batch_size) for s in seen} == {int}


def test_without_a_space_it_is_the_usual_one_around_the_settings(tmp_path) -> None:
    settings = StudySettings(storage=tmp_path / "s.db", trials=3)
    found = search(settings, base=BASE, run=run)
    assert set(found.trials[1].settings) == {
        "learning_rate", "warmup", "weight_decay", "batch_size",
    }  # fmt: skip


@given(
    rate=st.floats(1e-7, 1.0), decay=st.floats(0, 1), warmup=st.floats(0, 0.9),
    batch=st.integers(1, 4096), logits=st.floats(0, 10), temperature=st.floats(0.5, 20),
)  # fmt: skip
def test_the_usual_space_holds_any_settings(  # noqa: PLR0917
    rate, decay, warmup, batch, logits, temperature
) -> None:
    """What it does not use is not searched."""
    goal = Objective(logits=logits, temperature=temperature)
    base = TrainSettings(
        learning_rate=rate, weight_decay=decay, warmup=warmup, batch_size=batch, objective=goal
    )
    space = space_around(base)
    assert space.learning_rate.low <= rate <= space.learning_rate.high
    assert batch in space.batch_size
    assert min(space.batch_size) >= 1
    assert (space.temperature is None) == (logits == 0)
    assert space.hidden is None
    assert with_values(base, {"temperature": 3.0}).objective == replace(goal, temperature=3.0)


def test_results_and_settings_are_json(asked) -> None:
    found = search(replace(asked, trials=2), base=BASE, run=run)
    assert record.loads(StudyResult, record.dumps(found), where="result") == found
    assert record.loads(StudySettings, record.dumps(asked), where="settings") == asked
    assert json.loads(record.dumps(found))["trials"][0]["state"] == "complete"


# Bad questions.


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"trials": None}, "needs a limit"),
        ({"trials": 0}, "trials is 0"),
        ({"budget_s": 0.0}, "budget_s is 0.0"),
        ({"budget_s": math.inf}, "budget_s is inf"),
        ({"space": Space()}, "space is empty"),
        ({"space": Space(learning_rate=Range(low=1.0, high=2.0))}, "outside of its range"),
        ({"space": Space(learning_rate=Range(low=1e-3, high=1e-5))}, "low < high"),
        ({"space": Space(learning_rate=Range(low=0.0, high=1.0, log=True))}, "above 0"),
        ({"space": Space(warmup=Range(low=-1.0, high=1.0))}, "from 0"),
        ({"space": Space(batch_size=(8, 16))}, "batch_size is 32 now"),
        ({"space": Space(batch_size=(32, 32))}, "have to differ"),
    ],
)
def test_a_question_that_makes_no_sense_is_refused(asked, changes, said) -> None:
    with pytest.raises(RecipeError, match=said):
        search(replace(asked, **changes), base=BASE, run=run)
    assert not asked.storage.exists()


# Bad files.


def test_a_file_that_is_no_database_is_left_alone(asked) -> None:
    asked.storage.write_text("my notes\n" * 100)
    with pytest.raises(IntegrityError, match="no SQLite file"):
        search(asked, base=BASE, run=run)
    assert asked.storage.read_text() == "my notes\n" * 100


def test_a_database_of_something_else_is_left_alone(asked) -> None:
    with sqlite3.connect(asked.storage) as connection:
        connection.execute("CREATE TABLE bills (amount)")
    with pytest.raises(IntegrityError, match="bills"):
        search(asked, base=BASE, run=run)
    with sqlite3.connect(asked.storage) as connection:
        tables = connection.execute("SELECT name FROM sqlite_master").fetchall()
    assert tables == [("bills",)]


def test_a_damaged_study_is_named(asked) -> None:
    """Bytes in the middle are not what SQLite wrote."""
    search(replace(asked, trials=3), base=BASE, run=run)
    content = bytearray(asked.storage.read_bytes())
    content[2048:] = b"\xff" * (len(content) - 2048)
    asked.storage.write_bytes(content)
    with pytest.raises(IntegrityError, match="damaged"):
        search(asked, base=BASE, run=run)


def test_a_truncated_study_is_named(asked) -> None:
    search(replace(asked, trials=3), base=BASE, run=run)
    asked.storage.write_bytes(asked.storage.read_bytes()[:5000])
    with pytest.raises(IntegrityError):
        search(asked, base=BASE, run=run)


def test_a_locked_database_is_named(asked, monkeypatch) -> None:
    monkeypatch.setattr(study_file, "WAIT_S", 0.1)
    search(replace(asked, trials=1), base=BASE, run=run)
    other = sqlite3.connect(asked.storage, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    try:
        with pytest.raises(LockError, match="locked by another program"):
            search(asked, base=BASE, run=run)
    finally:
        other.close()


def test_two_searches_at_once_on_one_file_are_refused(asked) -> None:
    """The one would take the trials of the other for dead."""

    def nested(*_: object):
        with pytest.raises(LockError, match="another process searches"):
            search(asked, base=BASE, run=run)
        return 0.5

    assert search(replace(asked, trials=1), base=BASE, run=nested).best == BASE


def test_a_directory_in_place_of_the_file_is_refused(asked) -> None:
    asked.storage.mkdir()
    with pytest.raises(OutputError, match="is a directory"):
        search(asked, base=BASE, run=run)


def test_a_place_below_a_file_is_refused(asked, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        search(replace(asked, storage=tmp_path / "file" / "s.db"), base=BASE, run=run)


def test_a_file_that_is_read_only_is_refused(asked, monkeypatch) -> None:
    """As SQLite says it; a mode of 0444 would not stop root."""
    search(replace(asked, trials=1), base=BASE, run=run)
    connect = sqlite3.connect

    def read_only(path, **options: object):
        return connect(f"file:{path}?mode=ro", uri=True, **options)

    monkeypatch.setattr(study_file.sqlite3, "connect", read_only)
    with pytest.raises(OutputError, match="readonly"):
        search(asked, base=BASE, run=run)


@pytest.mark.parametrize("name", ["a study?.db", "50%25 #1.db", "número.db"])
def test_any_name_of_a_file_will_do(asked, tmp_path, name) -> None:
    storage = tmp_path / "new folder" / name
    search(replace(asked, storage=storage, trials=1), base=BASE, run=run)
    assert storage.read_bytes().startswith(b"SQLite format 3")


def test_without_optuna_it_says_what_to_install(asked, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(MissingExtraError, match="tune"):
        search(asked, base=BASE, run=run)


def test_optuna_is_as_talkative_afterwards_as_before(asked) -> None:
    import optuna

    before = optuna.logging.get_verbosity()
    search(replace(asked, trials=1, pruner=Median()), base=BASE, run=run)
    assert optuna.logging.get_verbosity() == before
