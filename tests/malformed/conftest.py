"""One worker for all families, and a place where their lines can be seen."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.malformed.counting import Campaign, Worker


@pytest.fixture(scope="session")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    """The child that reads every malformed input."""
    child = Worker(tmp_path_factory.mktemp("worker") / "log.txt")
    yield child
    child.close()


@pytest.fixture
def campaign(worker: Worker, request: pytest.FixtureRequest) -> Iterator[Campaign]:
    """Run cases, say at the end of the run what was counted, and check it.

    Lines travel with the reports of the tests, from whichever process runs them.
    """
    lines: list[str] = []
    yield Campaign(worker=worker, lines=lines)
    request.node.user_properties.extend(("counted", line) for line in lines)
