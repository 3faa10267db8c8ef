"""The other quantisers, in a virtual environment of their own, so that ours stays as it is."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import venv
from importlib.metadata import version
from pathlib import Path

from equipoise.stages import default_cache

REQUIREMENTS = (
    "nncf==3.4.0",
    "amd-quark==0.13",
    "onnx==1.22.0",  # the latest that Quark takes
    f"onnxruntime=={version('onnxruntime')}",  # the one that will run the files
    "torch==2.13.0",
)
ENVIRONMENT = {"NNCF_CI": "1", "ORT_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1"}
"""NNCF and ONNX Runtime report their use unless told not to; the former takes no other word."""

_VERSIONS = """
import importlib.metadata, json, sys
print(json.dumps({name: importlib.metadata.version(name) for name in sys.argv[1:]}))
"""


def interpreter() -> Path:
    """The Python of the peers; their environment is made on first use: 2 GB, some minutes."""
    key = hashlib.sha256("\n".join(REQUIREMENTS).encode()).hexdigest()[:16]
    place = default_cache() / "peers" / key
    python, complete = place / "bin" / "python", place / "complete"
    if not complete.is_file():
        venv.create(place, clear=True, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *REQUIREMENTS], check=True)
        # Quark compiles its operators when first imported; that is not a part of quantising.
        subprocess.run([python, "-c", "import quark.onnx"], check=True, capture_output=True)
        complete.touch()
    return python


def versions() -> dict[str, str]:
    """Distribution -> version, of the peers."""
    names = [requirement.partition("==")[0] for requirement in REQUIREMENTS]
    command = [str(interpreter()), "-c", _VERSIONS, *names]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, str] = json.loads(done.stdout)
    return found


def command(way: str) -> tuple[str, ...]:
    """The command line of a peer, to be filled in as ``quantize.Way`` says."""
    child = str(Path(__file__).with_name("_peer.py"))
    return (str(interpreter()), child, way, "{model}", "{data}", "{output}", "{kind}")


if __name__ == "__main__":
    sys.stdout.write(f"{interpreter()}\n")
