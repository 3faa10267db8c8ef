"""Several processes: errors come through as they are, deaths are told, and none is left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from equipoise import progress, record
from equipoise.compress.launch import launch, threads_each
from equipoise.compress.train import RankConfig, TrainRecord, train
from equipoise.errors import BackendError, DataError, UsageError

pytestmark = pytest.mark.usefixtures("on_cpu")

WAIT_S = 120
FUNCTIONS = """
import dataclasses, os, signal, sys, time
from pathlib import Path

from equipoise import progress
from equipoise.errors import DataError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    fate: str
    rendezvous: Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    rank: int
    world: int
    threads: str


def work(config: Config, *, output: Path) -> Result:
    rank = int(os.environ["RANK"])
    (output / f"pid-{rank}").write_text(str(os.getpid()))
    for step in range(3):
        progress.report(step, 3 * (rank + 1))
    match config.fate, rank:
        case "refuse", 1:
            raise DataError("sample 3 is bad", hint="Mend it.")
        case "die", 1:
            os.kill(os.getpid(), signal.SIGKILL)
        case "exit" | "take along", 1:
            print("no such device", file=sys.stderr)
            sys.exit(3)
        case "take along", 0:
            while not (output / "pid-1").exists():
                time.sleep(0.01)
            time.sleep(0.1)
            sys.exit("RuntimeError: [pair.cc:547] Connection closed by peer [127.0.0.1]:39812")
        case ("refuse" | "die" | "exit" | "take along" | "hang"), _:
            time.sleep(600)
    world, threads = int(os.environ["WORLD_SIZE"]), os.environ["OMP_NUM_THREADS"]
    return Result(rank=rank, world=world, threads=threads)
"""


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], str]]:
    """Launch three processes of a fate."""
    (tmp_path / "launch_functions.py").write_text(FUNCTIONS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    import launch_functions

    def run(fate: str) -> str:
        config = launch_functions.Config(fate=fate, rendezvous=tmp_path / "rendezvous")
        return launch("launch_functions:work", config, processes=3, threads=2, output=tmp_path)

    yield run
    del sys.modules["launch_functions"]


def alive(pid: int) -> bool:
    """Whether a process runs; one that waits for its parent to take notice does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state.rpartition(")")[2].split()[0] != "Z"


def pids(folder: Path) -> list[int]:
    return [int(file.read_text() or 0) for file in folder.glob("pid-*")]


def wait_for(found: Callable[[], object]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not found():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.01)


def test_the_first_gives_the_record_and_its_progress(start: Callable[[str], str]) -> None:
    """Each has its number, all of them the world and their threads."""
    heard: list[tuple[int, int]] = []
    progress.listen(lambda done, total: heard.append((done, total)))
    assert record.parse(start("well")) == {"rank": 0, "world": 3, "threads": "2"}
    wait_for(lambda: len(heard) == 3)
    assert heard == [(0, 3), (1, 3), (2, 3)]


@pytest.mark.parametrize(
    ("fate", "error", "message"),
    [
        ("refuse", DataError, "sample 3 is bad\nMend it."),
        ("die", BackendError, "process 1 of 3 was killed by SIGKILL"),
        ("exit", BackendError, "process 1 of 3 ended with exit code 3; its last words:\nno such"),
        ("take along", BackendError, "process 1 of 3 ended with exit code 3"),
    ],
)
def test_the_failure_of_one_ends_all_and_is_told(
    start: Callable[[str], str], tmp_path: Path, fate: str, error: Any, message: str
) -> None:
    """Within seconds, though the others would sleep on."""
    begin = time.monotonic()
    with pytest.raises(error) as caught:
        start(fate)
    assert message in str(caught.value)
    assert time.monotonic() - begin < 60
    assert not any(map(alive, pids(tmp_path)))


def test_threads_are_the_usable_cores_between_the_processes() -> None:
    """At least one; what was asked for goes before."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert threads_each(None, processes=1) == cores
    assert threads_each(None, processes=10_000) == 1
    assert threads_each(7, processes=2) == 7


def test_a_worker_that_is_killed_leaves_a_checkpoint_that_goes_on(bench: Any) -> None:
    """The error has its number, the signal and the checkpoint; the same numbers come of it."""
    settings = {"save_every": 1, "epochs": 60}
    config = bench.taught(settings=settings, processes=2)
    (bench.folder / "out").mkdir()

    def kill() -> None:
        wait_for(lambda: list(config.checkpoints.glob("*/step-*[1-9]")))
        os.kill(worker(1), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(BackendError, match="process 1 of 2 was killed by SIGKILL") as caught:
        train(config, output=bench.folder / "out")
    killer.join()
    (last,) = config.checkpoints.glob("*/step-*")
    assert str(last) in caught.value.hint
    assert not children()
    with pytest.raises(UsageError, match="of 2 processes, and 1 are"):
        train(bench.taught(settings=settings), output=bench.folder / "out")


def children() -> list[int]:
    """Processes of this one that run a stage."""
    found = Path(f"/proc/self/task/{os.getpid()}/children")
    threads = [*found.parents[1].glob("*/children")]
    pids = [int(pid) for file in threads for pid in file.read_text().split()]
    return [pid for pid in pids if b"equipoise.isolation" in command(pid)]


def command(pid: int) -> bytes:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def worker(rank: int) -> int:
    """The process of a number."""
    return next(pid for pid in children() if f"rank-{rank}".encode() in command(pid))


RUN = """
import sys, pathlib
sys.path.insert(0, str(pathlib.Path.cwd()))
from equipoise import record
from equipoise.compress.train import RankConfig, train
config = record.loads(RankConfig, pathlib.Path(sys.argv[1]).read_text(), where="config").config
import os
output = pathlib.Path(sys.argv[2]) / os.environ.get("RANK", "alone")
output.mkdir(parents=True)
found = train(config, output=output)
(output / "record.json").write_text(record.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the signal of a parent's death is Linux's")
def test_no_process_outlives_a_killed_parent(bench: Any) -> None:
    """Neither the launcher's children nor any other; and the training goes on in the end."""
    config = bench.taught(settings={"save_every": 1, "epochs": 40}, processes=2)
    file = bench.folder / "config.json"
    file.write_text(record.dumps(RankConfig(config=config, rendezvous=Path("none"))))
    parent = subprocess.Popen(
        [sys.executable, "-c", RUN, str(file), str(bench.folder / "out")], cwd=bench.folder
    )
    wait_for(lambda: list(config.checkpoints.glob("*/step-*[1-9]")))
    found = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
    assert len(found) == 2
    parent.kill()
    parent.wait()
    wait_for(lambda: not any(alive(int(pid)) for pid in found))
    (bench.folder / "again").mkdir()
    again = train(config, output=bench.folder / "again")
    assert again.resumed_at_step > 0
    unbroken = bench.train(config, place="unbroken")
    assert again.losses == unbroken.losses


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torch.distributed.run", "accelerate.commands.launch"])
def test_under_a_launcher_each_process_takes_its_part(bench: Any, launcher: str) -> None:
    """No process is started; all leave the record and the model of one process."""
    config = bench.taught()
    file, script = bench.folder / "config.json", bench.folder / "run.py"
    file.write_text(record.dumps(RankConfig(config=config, rendezvous=Path("none"))))
    script.write_text(RUN)
    options = {
        "torch.distributed.run": ["--standalone", "--nproc-per-node=2"],
        "accelerate.commands.launch": [
            "--multi_gpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no",
            "--dynamo_backend=no", "--main_process_port=0",
        ],
    }[launcher]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", launcher, *options, str(script), str(file), str(bench.folder / "x")],
        cwd=bench.folder, capture_output=True, timeout=250, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    one = bench.train(config)
    for rank in ("0", "1"):
        text = (bench.folder / "x" / rank / "record.json").read_text()
        found = record.loads(TrainRecord, text, where="record.json")
        assert found.processes == 2
        assert found.losses == pytest.approx(one.losses, abs=1e-4)
        assert (bench.folder / "x" / rank / "model/model.safetensors").exists()


def test_more_processes_than_the_launcher_has_are_refused(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two numbers that say the same thing differently."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(
        UsageError, match="2 processes are asked for under a launcher that started 4"
    ):
        train(bench.config(processes=2), output=bench.folder)


def test_more_processes_than_gpus_are_refused(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the two ways out."""
    import torch

    monkeypatch.setenv("ACCELERATE_USE_CPU", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UsageError, match="2 processes need as many GPUs; this machine has 1"):
        train(bench.config(processes=2), output=bench.folder)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(UsageError, match="3 processes need as many GPUs; this machine has 1"):
        train(bench.config(), output=bench.folder)
