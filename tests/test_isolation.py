"""A stage runs in a child process: what it raises comes back, and its death is told."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from equipoise import extras, resident
from equipoise.errors import BackendError, DataError, IncompatibleError, ResourceError
from equipoise.isolation import run_isolated

FUNCTIONS = """
import dataclasses, os, signal, subprocess, sys, time
from pathlib import Path

from equipoise import progress
from equipoise.errors import DataError, MissingExtraError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    number: int = 0
    text: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    number: int
    pid: int
    text: str


def double(config: Config, *, output: Path) -> Result:
    (output / "doubled.txt").write_text(str(2 * config.number))
    return Result(number=2 * config.number, pid=os.getpid(), text=config.text)


def refuse(config: Config, *, output: Path) -> Result:
    raise DataError(f"sample {config.number} is bad", hint="Mend it.")


def miss(config: Config, *, output: Path) -> Result:
    raise MissingExtraError("no package", hint="pip install it")


class OwnError(DataError):
    pass


def refuse_in_its_own_way(config: Config, *, output: Path) -> Result:
    raise OwnError("mine")


def fault(config: Config, *, output: Path) -> Result:
    return 1 // config.number


def exhaust(config: Config, *, output: Path) -> Result:
    raise MemoryError


def die(config: Config, *, output: Path) -> Result:
    print("last words", file=sys.stderr, flush=True)
    os.kill(os.getpid(), config.number)


def leave(config: Config, *, output: Path) -> Result:
    os._exit(config.number)


def advance(config: Config, *, output: Path) -> Result:
    for _ in progress.track(range(config.number), total=config.number):
        time.sleep(0.06)
    return Result(number=config.number, pid=os.getpid(), text="")


def sleep(config: Config, *, output: Path) -> Result:
    Path(config.text).write_text(str(os.getpid()))
    time.sleep(600)


def eat(config: Config, *, output: Path) -> Result:
    eaten = b"x" * config.number
    time.sleep(float(config.text or 600))
    return Result(number=len(eaten), pid=os.getpid(), text="")


def eat_in_children(config: Config, *, output: Path) -> Result:
    code = f"import time; eaten = b'x' * {config.number // 2}; time.sleep(600)"
    children = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    Path(config.text).write_text(" ".join(str(child.pid) for child in children))
    time.sleep(600)


def talk(config: Config, *, output: Path) -> Result:
    print("x" * config.number)
    return Result(number=config.number, pid=os.getpid(), text="")
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The same form as in the child."""

    number: int = 0
    text: str = ""


SLEEPER = """
import os, pathlib, sys, time
pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))
time.sleep(60)
"""
Call = Callable[..., dict[str, object]]


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    """Call a function above in a child; gives its record."""
    (tmp_path / "functions.py").write_text(FUNCTIONS)
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path)

    def run(
        function: str,
        config: Config | None = None,
        *,
        time_limit_s: float = 60,
        memory_limit_bytes: int | None = None,
        on_progress: Callable[[int, int], None] = lambda _done, _total: None,
    ) -> dict[str, object]:
        text = run_isolated(
            f"functions:{function}",
            config or Config(),
            output=tmp_path / "out",
            on_progress=on_progress,
            time_limit_s=time_limit_s,
            memory_limit_bytes=memory_limit_bytes,
        )
        return json.loads(text)

    return run


def alive(pid: int) -> bool:
    """Whether a process runs; one that is dead and not yet collected does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def wait_for(condition: Callable[[], object]) -> object:
    """The first true value of ``condition``, which has to come within twenty seconds."""
    end = time.monotonic() + 20
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError("it did not happen within 20 s")


def test_a_record_comes_back_from_another_process(call: Call, tmp_path: Path) -> None:
    """Config and record cross unchanged, files are where they should be."""
    found = call("double", Config(number=21, text='"ö\n'))
    assert found["number"] == 42
    assert found["text"] == '"ö\n'
    assert found["pid"] != os.getpid()
    assert (tmp_path / "out" / "doubled.txt").read_text() == "42"


def test_an_error_crosses_with_its_class_message_and_hint(call: Call) -> None:
    """So the parent exits with the code of the child's error."""
    with pytest.raises(DataError) as caught:
        call("refuse", Config(number=7))
    assert type(caught.value) is DataError
    assert caught.value.message == "sample 7 is bad"
    assert caught.value.hint == "Mend it."


def test_a_subclass_crosses_as_itself(call: Call) -> None:
    """A missing extra in a child is a missing extra here, with its exit code."""
    with pytest.raises(IncompatibleError, match="no package") as caught:
        call("miss")
    assert type(caught.value).__name__ == "MissingExtraError"
    assert caught.value.exit_code == 5


def test_an_error_class_from_elsewhere_becomes_a_backend_error(call: Call) -> None:
    """Its message is kept."""
    with pytest.raises(BackendError, match="mine"):
        call("refuse_in_its_own_way")


def test_any_other_exception_is_a_backend_error_with_its_traceback(call: Call) -> None:
    """The function and the last words of the log are in the message."""
    with pytest.raises(BackendError, match=r"functions:fault ended with exit code 1") as caught:
        call("fault")
    assert "ZeroDivisionError" in str(caught.value)


def test_running_out_of_memory_is_a_resource_error(call: Call) -> None:
    """With what to do about it."""
    with pytest.raises(ResourceError, match="out of memory") as caught:
        call("exhaust")
    assert "fewer" in caught.value.hint


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL, signal.SIGABRT])
def test_a_child_that_is_killed_is_a_backend_error_that_names_the_signal(
    call: Call, number: signal.Signals
) -> None:
    """With the function and what the child said last."""
    with pytest.raises(BackendError, match=f"functions:die was killed by {number.name}") as caught:
        call("die", Config(number=int(number)))
    assert "last words" in str(caught.value)
    assert caught.value.exit_code == 9


def test_a_real_time_signal_has_a_number(call: Call) -> None:
    """A signal that Python has no name for."""
    number = signal.SIGRTMIN + 3
    with pytest.raises(BackendError, match=f"was killed by signal {number}"):
        call("die", Config(number=number))


def test_a_child_that_leaves_without_a_result_is_a_backend_error(call: Call) -> None:
    """A vendor library that calls exit."""
    with pytest.raises(BackendError, match="ended with exit code 3"):
        call("leave", Config(number=3))


def test_a_child_that_leaves_with_code_zero_is_a_backend_error(call: Call) -> None:
    """Success without a result is none."""
    with pytest.raises(BackendError, match="functions:leave"):
        call("leave", Config(number=0))


def test_a_function_that_does_not_exist_is_a_backend_error(call: Call) -> None:
    """Its name is in the message."""
    with pytest.raises(BackendError, match="functions:nothing"):
        call("nothing")


def test_the_time_limit_kills_the_child(call: Call, tmp_path: Path) -> None:
    """A ResourceError that names the limit, and nobody is left running."""
    with pytest.raises(ResourceError, match="within 3 s") as caught:
        call("sleep", Config(text=str(tmp_path / "pid")), time_limit_s=3)
    assert "--time-limit" in caught.value.hint
    assert not alive(int((tmp_path / "pid").read_text()))


def test_the_memory_limit_kills_a_child_that_eats(call: Call) -> None:
    """A ResourceError with the limit and with what the child had, long before it is done."""
    begin = time.monotonic()
    with pytest.raises(ResourceError, match=r"its limit is 200,000,000") as caught:
        call("eat", Config(number=300_000_000), memory_limit_bytes=200_000_000)
    had = int(caught.value.message.split(" bytes")[0].rpartition(" ")[2].replace(",", ""))
    assert 200_000_000 < had < 700_000_000
    assert "memory limit" in caught.value.hint
    assert time.monotonic() - begin < 30


def test_the_memory_limit_counts_what_children_of_the_child_have(
    call: Call, tmp_path: Path
) -> None:
    """None of three processes passes it; together they do, and all of them are gone."""
    config = Config(number=200_000_000, text=str(tmp_path / "pids"))
    with pytest.raises(ResourceError, match="with its children"):
        call("eat_in_children", config, memory_limit_bytes=180_000_000)
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert len(pids) == 2
    assert wait_for(lambda: not any(alive(pid) for pid in pids))


def test_a_child_below_its_memory_limit_is_left_alone(call: Call) -> None:
    """It is looked at several times and gives its record."""
    config = Config(number=100_000_000, text="0.5")
    assert call("eat", config, memory_limit_bytes=400_000_000)["number"] == 100_000_000


def test_the_time_limit_kills_the_children_of_the_child_too(call: Call, tmp_path: Path) -> None:
    """Nobody is left working for nobody."""
    config = Config(number=2, text=str(tmp_path / "pids"))
    with pytest.raises(ResourceError, match="within 2 s"):
        call("eat_in_children", config, time_limit_s=2)
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert wait_for(lambda: not any(alive(pid) for pid in pids))


def test_a_child_that_the_kernel_kills_for_want_of_memory_is_a_resource_error(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel counts such kills; the counter here stands for one that went up meanwhile."""
    counts = iter([3, 4])
    monkeypatch.setattr(resident, "kernel_kills", lambda: next(counts))
    with pytest.raises(ResourceError, match="out of memory") as caught:
        call("die", Config(number=int(signal.SIGKILL)))
    assert "last words" in caught.value.message
    assert "memory limit" in caught.value.hint


def test_where_memory_cannot_be_seen_that_is_said(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither /proc nor psutil: the stage runs, and a warning says that the limit does not hold."""
    monkeypatch.setattr(resident, "_PROC", tmp_path / "none")
    monkeypatch.setattr(extras, "installed", lambda _module: False)
    with pytest.warns(RuntimeWarning, match="not enforced"):
        assert call("double", Config(number=2), memory_limit_bytes=1)["number"] == 4


def test_without_proc_psutil_sees_the_memory(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on macOS."""
    pytest.importorskip("psutil")
    monkeypatch.setattr(resident, "_PROC", tmp_path / "none")
    with pytest.raises(ResourceError, match="its limit is 150,000,000"):
        call("eat", Config(number=250_000_000), memory_limit_bytes=150_000_000)


def test_the_kernel_counts_what_it_kills() -> None:
    """A number that does not fall."""
    first = resident.kernel_kills()
    assert 0 <= first <= resident.kernel_kills()


def test_a_family_is_found_without_the_list_of_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some kernels have no such list; then everybody is asked for the parent."""
    code = (
        f"import subprocess, sys; subprocess.run([sys.executable, '-c', {SLEEPER!r}, sys.argv[1]])"
    )
    pid_file = tmp_path / "pid"
    child = subprocess.Popen([sys.executable, "-c", code, str(pid_file)])
    try:
        grandchild = int(str(wait_for(lambda: pid_file.exists() and pid_file.read_text())))
        assert resident.family(child.pid) == [child.pid, grandchild]
        search = resident._children_by_search
        monkeypatch.setattr(resident, "_children", search)
        assert resident.family(child.pid) == [child.pid, grandchild]
    finally:
        for pid in reversed(resident.family(child.pid)):
            os.kill(pid, signal.SIGKILL)
        child.wait()
    assert resident.family(child.pid) == []


def test_progress_arrives_in_order_and_ends_complete(call: Call) -> None:
    """Steps done only grow, and the last report is all of them."""
    heard: list[tuple[int, int]] = []
    call("advance", Config(number=5), on_progress=lambda *step: heard.append(step))
    assert heard == sorted(heard)
    assert len(heard) >= 3
    assert heard[0] == (0, 5)
    assert heard[-1] == (5, 5)


def test_much_output_does_not_stop_a_child(call: Call) -> None:
    """More than a pipe holds."""
    assert call("talk", Config(number=1_000_000))["number"] == 1_000_000


PARENT = """
import dataclasses, sys
from pathlib import Path
from equipoise.isolation import run_isolated

@dataclasses.dataclass(frozen=True)
class Config:
    number: int
    text: str

run_isolated(
    "functions:sleep", Config(0, sys.argv[1]), output=Path("out"),
    on_progress=lambda done, total: None, time_limit_s=600,
)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.usefixtures("call")
def test_a_child_dies_with_its_parent(tmp_path: Path, number: signal.Signals) -> None:
    """Ctrl-C or kill -9 of the parent leaves nobody working for nobody."""
    pid_file = tmp_path / "pid"
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(pid_file)], cwd=tmp_path, stderr=subprocess.DEVNULL
    )
    child = int(str(wait_for(lambda: pid_file.exists() and pid_file.read_text())))
    assert alive(child)
    parent.send_signal(number)
    parent.wait(timeout=20)
    assert wait_for(lambda: not alive(child))
