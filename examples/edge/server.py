"""Serve a text classifier with asyncio alone: requests that wait together run together.

    python -m examples.edge.server BUNDLE --port 8765

A JSON string per line in, a JSON object per line out, in the same order.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import signal
from collections.abc import Sequence

import equipoise

MOST_TOGETHER, MOST_WAITING, LONGEST_LINE = 32, 256, 1 << 20


def outcomes(classify: equipoise.TextClassifier, texts: Sequence[str]) -> list[dict]:
    """What is said of each text; a text that is refused spoils no other."""
    try:
        return [{"label": one.label, "score": one.score} for one in classify(list(texts))]
    except equipoise.EquipoiseError as error:
        if len(texts) == 1:
            return [{"error": str(error)}]
        return [outcome for text in texts for outcome in outcomes(classify, [text])]


class Desk:
    """Collects texts while the engine is busy, and gives them to it together."""

    def __init__(self, classify: equipoise.TextClassifier) -> None:
        self._classify = classify
        self._waiting: asyncio.Queue = asyncio.Queue(MOST_WAITING)  # full: clients wait

    async def ask(self, text: str) -> dict:
        answer = asyncio.get_running_loop().create_future()
        await self._waiting.put((text, answer))
        return await answer

    async def work(self) -> None:
        while True:
            batch = [await self._waiting.get()]
            while len(batch) < MOST_TOGETHER and not self._waiting.empty():
                batch.append(self._waiting.get_nowait())
            texts = [text for text, _ in batch]
            found = await asyncio.to_thread(outcomes, self._classify, texts)
            for (_, answer), outcome in zip(batch, found, strict=True):
                if not answer.done():  # a client that hung up
                    answer.set_result(outcome)


async def converse(desk: Desk, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One client, until it hangs up or sends a line that is too long."""
    with contextlib.suppress(ConnectionError, ValueError):
        while line := await reader.readline():
            try:
                answer = await desk.ask(json.loads(line))
            except ValueError as error:
                answer = {"error": f"no JSON: {error}"}
            writer.write(json.dumps(answer).encode() + b"\n")
            await writer.drain()
    writer.close()


async def serve(bundle: str, *, port: int) -> None:
    """Until SIGTERM or SIGINT."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    with equipoise.TextClassifier(bundle) as classify:
        desk = Desk(classify)
        worker = asyncio.create_task(desk.work())
        server = await asyncio.start_server(
            lambda reader, writer: converse(desk, reader, writer),
            "127.0.0.1",
            port,
            limit=LONGEST_LINE,
        )
        async with server:
            print(f"listening on port {server.sockets[0].getsockname()[1]}", flush=True)
            await stop.wait()
        worker.cancel()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle")
    parser.add_argument("--port", type=int, default=8765, help="0 for any that is free")
    options = parser.parse_args()
    asyncio.run(serve(options.bundle, port=options.port))


if __name__ == "__main__":
    main()
