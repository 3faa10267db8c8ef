"""The server of docs/edge.md, run as it stands there."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from equipoise.apps.text import TextClassifier

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def bundle(tmp_path: Path, make, pack) -> Path:
    made = make("class", labels=("a", "b", "c"), task="sequence-classification")
    return pack(tmp_path / "bundle.zip", made)


@pytest.fixture
def port(bundle: Path) -> Iterator[int]:
    """A server that has been started, and that stops when it is told to."""
    command = [sys.executable, "-m", "examples.edge.server", str(bundle), "--port", "0"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        found = re.fullmatch(r"listening on port (\d+)\n", server.stdout.readline())
        assert found
        yield int(found[1])
        server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=20) == 0


async def talk(port: int, lines: list[bytes]) -> list[dict]:
    """All lines at once, then the answers."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"".join(line + b"\n" for line in lines))
    writer.write_eof()
    answers = [json.loads(await reader.readline()) for _ in lines]
    writer.close()
    return answers


def test_many_clients_get_their_own_answers(bundle: Path, port: int, texts) -> None:
    """In order, whatever ran together; what is no text is answered, and spoils nothing."""

    async def clients() -> list[list[dict]]:
        lines = [json.dumps(text).encode() for text in texts]
        bad = [b"{", b"3", b'""', json.dumps(texts[0]).encode()]
        return await asyncio.gather(*(talk(port, lines) for _ in range(20)), talk(port, bad))

    *good, bad = asyncio.run(clients())
    with TextClassifier(bundle) as classify:
        expected = classify(list(texts))
    for answers in good:
        assert [answer["label"] for answer in answers] == [one.label for one in expected]
        scores = [one.score for one in expected]
        assert [answer["score"] for answer in answers] == pytest.approx(scores, abs=1e-6)
    assert "no JSON" in bad[0]["error"]
    assert "int is" in bad[1]["error"] or "text 0 is int" in bad[1]["error"]
    assert "is empty" in bad[2]["error"]
    assert bad[3]["label"] == expected[0].label
