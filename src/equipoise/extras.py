"""Which optional package is in which extra, and importing them with a helpful error."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType
from typing import Final

from equipoise.errors import MissingExtraError

EXTRA_OF: Final[dict[str, str]] = {
    "onnxruntime": "ort",
    "onnx": "tune",
    "onnx_ir": "tune",
    "onnxscript": "tune",
    "jinja2": "tune",
    "plotly": "tune",
    "sklearn": "tune",
    "seqeval": "tune",
    "tokenizers": "text",
    "filelock": "tune",
    "platformdirs": "tune",
    "torch": "torch",
    "safetensors": "torch",
    "transformers": "transformers",
    "PIL": "vision",
    "timm": "timm",
    "openvino": "openvino",
    "tensorrt_rtx": "tensorrt",
    "pynvml": "nvidia",
    "accelerate": "compress",
    "torch_pruning": "compress",
    "optuna": "tune",
    "tomli_w": "tune",
    "scipy": "tune",
    "ray": "cluster",
    "fsspec": "cluster",
    "cryptography": "verify",
    "model_signing": "sign",
}
"""Import name of each optional package -> the extra of equipoise that installs it."""


def install_line(extra: str) -> str:
    """The command line that installs ``extra``."""
    return f'pip install "equipoise[{extra}]"'


def require(module: str) -> ModuleType:
    """Import ``module``.

    Raises:
        MissingExtraError: It is not installed; the message has the line that installs it.
    """
    top = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != top:
            raise
        extra = EXTRA_OF.get(top, "all")
        raise MissingExtraError(
            f"this needs the package {top!r}, which is not installed (extra {extra!r})",
            hint=f"Install it with: {install_line(extra)}",
        ) from error


def installed(module: str) -> bool:
    """Whether ``module`` can be found, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False
