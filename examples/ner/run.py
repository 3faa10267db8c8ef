"""Tune a named-entity model on CoNLL-2003 and print both per-class tables.

    python -m examples.ner.run --model DIRECTORY --output out/ner

--model is a transformers directory, such as the one that examples.ner.train writes.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from examples.ner.fetch import CONLL, fetch


def command(options: argparse.Namespace) -> list[str]:
    """The command line that tunes a model; test text judges, and nothing else looks at it."""
    line = [
        "tune", str(options.model), "--task", "token-classification", "--data", str(fetch(CONLL)),
        "--target", "cpu", "--metric", "entity-f1", "--max-drop", "0.01",
        "--threads", str(options.threads), "--budget", options.budget, "-o", str(options.output),
    ]  # fmt: skip
    return line if options.samples is None else [*line, "--samples", str(options.samples)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="transformers directory")
    parser.add_argument("--output", type=Path, default=Path("out/ner"))
    parser.add_argument("--samples", type=int, default=None, help="first so many test sentences")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--budget", default="30m", help="time for trials")
    line = command(parser.parse_args())
    print("equipoise", *line, flush=True)
    sys.exit(subprocess.call([sys.executable, "-m", "equipoise", *line]))


if __name__ == "__main__":
    main()
