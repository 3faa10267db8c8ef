"""One worker for all families, and a place where their lines can be seen."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.malformed.counting import Campaign, Worker

_LINES = pytest.StashKey[list[str]]()


@pytest.fixture(scope="session")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    """The child that reads every malformed input."""
    child = Worker(tmp_path_factory.mktemp("worker") / "log.txt")
    yield child
    child.close()


@pytest.fixture
def campaign(worker: Worker, request: pytest.FixtureRequest) -> Campaign:
    """Run cases, say at the end of the run what was counted, and check it."""
    return Campaign(worker=worker, lines=request.config.stash.setdefault(_LINES, []))


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Print what the families counted."""
    lines = config.stash.get(_LINES, [])
    if lines:
        terminalreporter.section("malformed inputs")
        for line in lines:
            terminalreporter.write_line(line)
