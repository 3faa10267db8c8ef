"""Run malformed inputs in a child process, and count what becomes of each.

A case is **typed** when it ends in an error of the tree with the exit code that it should have and
the name of the file in its message, **harmless** when it is rightly accepted with the same answer,
and **recorded** when it is rightly accepted with another answer: another file of one's own, under
another SHA-256. What must not be is **crashed** (a signal, an exception of another kind or without
the name, a hang), **silent** (accepted with another answer) and **escaped** (something outside the
folder of the case was opened, or code was run).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import selectors
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

HANG_S = 20.0
"""No verdict for so long is a hang."""

WARM_S = 120.0
"""Longest time for the libraries to be imported."""

SLOW_S = 10.0
"""Nothing may take longer to be refused."""

GROWTH_BYTES = 512 * 2**20
"""Most memory that refusing small files may take, beyond what the libraries hold."""

BAD = ("crashed", "silent", "escaped")
_NUMBER = re.compile(r"[0-9]+")
_WORKER = Path(__file__).with_name("worker.py")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One malformed input.

    Attributes:
        name: What is wrong with it.
        subject: Function of ``worker.py`` that reads it.
        folder: The only place that may be opened.
        file: Name of the file in it that the message has to say.
        target: What the subject is given: a file or directory below ``folder``.
        good: A file of the same kind that is read first, so that every library is imported.
        cut: Keep so many bytes of ``file``; None keeps all.
        flip: Turn over this bit of ``file``; None none.
        codes: Exit codes of the errors that are right.
        words: What the message has to say besides the name of the file.
        otherwise: What it is when another answer comes out: ``silent``, or ``recorded`` where that
            is right. ``accepted`` demands that it is accepted.
    """

    name: str
    subject: str
    folder: Path
    file: str
    target: str
    good: str = ""
    cut: int | None = None
    flip: int | None = None
    codes: tuple[int, ...] = (3,)
    words: tuple[str, ...] = ()
    otherwise: str = "silent"


@dataclass(kw_only=True)
class Outcome:
    """What became of some cases.

    Attributes:
        counts: Verdict -> number of cases.
        details: Verdict -> what was said, case by case, where a verdict is bad.
        slowest_s: Longest time of a case.
        growth_bytes: Memory that the worker took beyond what it had when it was warm.
    """

    counts: Counter[str] = field(default_factory=Counter)
    details: dict[str, list[str]] = field(default_factory=dict)
    slowest_s: float = 0.0
    growth_bytes: int = 0

    @property
    def run(self) -> int:
        """Number of cases."""
        return self.counts.total()

    def add(self, case: Case, verdict: str, said: str) -> None:
        """Count one case."""
        self.counts[verdict] += 1
        if verdict in BAD:
            self.details.setdefault(verdict, []).append(f"{case.name}: {said}")

    def line(self, what: str) -> str:
        """The counts in words; what is rightly accepted is named where there is any."""
        kinds = ["typed", *BAD, *(k for k in ("harmless", "recorded") if self.counts[k])]
        return f"{what}: {self.run:,} run, " + ", ".join(f"{self.counts[k]:,} {k}" for k in kinds)

    def check(self, *, least: int) -> None:
        """Raise AssertionError unless all of at least ``least`` cases went well."""
        bad = [f"{kind}: {text}" for kind in BAD for text in self.details.get(kind, ())]
        kinds = {_NUMBER.sub("#", text): text for text in bad}  # one of each will do
        shown = "\n".join([*kinds.values()][:30])
        assert not bad, f"{len(bad)} of {self.run} cases, such as:\n{shown}"
        assert self.run >= least, f"{self.run} cases; the family asks for {least}"
        assert self.counts["typed"], "nothing was refused at all"
        assert self.slowest_s < SLOW_S, f"a case took {self.slowest_s:.1f} s"
        assert self.growth_bytes < GROWTH_BYTES, f"{self.growth_bytes:,} bytes more"


def every_cut(case: Case) -> Iterator[Case]:
    """``case`` with its file cut before every byte."""
    size = (case.folder / case.file).stat().st_size
    yield from (replace(case, name=f"{case.name} of {at} bytes", cut=at) for at in range(size))


def every_flip(case: Case) -> Iterator[Case]:
    """``case`` with every single bit of its file turned over, one after the other."""
    bits = 8 * (case.folder / case.file).stat().st_size
    yield from (replace(case, name=f"{case.name} bit {bit}", flip=bit) for bit in range(bits))


class Worker:
    """A child process that reads cases one after the other; a new one when it dies."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._child: subprocess.Popen[bytes] | None = None
        self._results = -1

    def _start(self) -> subprocess.Popen[bytes]:
        if self._child is not None and self._child.poll() is None:
            return self._child
        reader, writer = os.pipe()
        command = [sys.executable, str(_WORKER), str(writer)]
        with self._log.open("ab") as log:
            self._child = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=log, pass_fds=[writer]
            )
        os.close(writer)
        if self._results >= 0:
            os.close(self._results)
        self._results = reader
        return self._child

    def run(self, cases: Iterable[Case]) -> Outcome:
        """Run every case; one that kills the worker is counted, and the next one goes on."""
        outcome, left = Outcome(), list(cases)
        mutated = {c.folder / c.file for c in left if c.cut is not None or c.flip is not None}
        whole = {file: file.read_bytes() for file in mutated}
        while left:
            left = left[self._batch(left, outcome) :]
            for file, content in whole.items():
                file.write_bytes(content)
        return outcome

    def _batch(self, cases: Sequence[Case], outcome: Outcome) -> int:
        """Give ``cases`` to the worker; the number of them that have a verdict in the end."""
        child = self._start()
        assert child.stdin is not None
        text = json.dumps([asdict(case) | {"folder": str(case.folder)} for case in cases])
        child.stdin.write(text.encode() + b"\n")
        child.stdin.flush()
        done, warm = 0, False
        for line in self._lines():
            told = json.loads(line)
            if "warm" in told:
                warm = True
                continue
            if "growth" in told:
                outcome.growth_bytes = max(outcome.growth_bytes, told["growth"])
                return done
            outcome.add(cases[done], told["verdict"], told["said"])
            outcome.slowest_s = max(outcome.slowest_s, told["seconds"])
            done += 1
        alive = child.poll() is None
        self.close()
        if not warm:
            raise RuntimeError(
                f"the worker cannot read good files:\n{self._log.read_text()[-3000:]}"
            )
        death = f"no verdict within {HANG_S:.0f} s" if alive else f"died: {child.returncode}"
        outcome.add(cases[done], "crashed", death)
        return done + 1

    def _lines(self) -> Iterator[bytes]:
        """Lines of the worker until it dies or hangs."""
        held = b""
        with selectors.DefaultSelector() as selector:
            selector.register(self._results, selectors.EVENT_READ)
            wait = WARM_S
            while selector.select(timeout=wait):
                wait = HANG_S
                data = os.read(self._results, 1 << 16)
                if not data:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        if self._child is not None:
                            self._child.wait(timeout=HANG_S)
                    return
                *lines, held = (held + data).split(b"\n")
                yield from lines

    def close(self) -> None:
        """End the child."""
        if self._child is not None:
            self._child.kill()
            self._child.wait()


@dataclass(frozen=True, kw_only=True)
class Campaign:
    """A family of cases, run and counted.

    Attributes:
        worker: The child that runs them.
        lines: What is printed at the end.
    """

    worker: Worker
    lines: list[str]

    def run(self, cases: Iterable[Case], *, what: str, least: int) -> Outcome:
        """Run ``cases``, at least ``least`` of them; keep the line; fail on a bad verdict."""
        outcome = self.worker.run(cases)
        self.lines.append(outcome.line(what))
        outcome.check(least=least)
        return outcome
