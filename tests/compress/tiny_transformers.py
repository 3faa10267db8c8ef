"""Small transformers with random weights, one of each way to be built, and rows for them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import transformers

from equipoise.data.store import write_rows
from equipoise.sources.source import Source, parse_source

VOCABULARY = 96
_BERT = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48,
    "num_hidden_layers": 3, "max_position_embeddings": 40,
}  # fmt: skip
_LLAMA = {
    **_BERT, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_MODELS = {
    "bert": ("Bert", "ForTokenClassification", _BERT),
    "roberta": ("Roberta", "ForSequenceClassification", _BERT),
    "distilbert": (
        "DistilBert",
        "ForSequenceClassification",
        {
            "vocab_size": VOCABULARY, "dim": 32, "n_heads": 4, "hidden_dim": 48, "n_layers": 3,
            "max_position_embeddings": 40,
        },
    ),
    "electra": ("Electra", "ForTokenClassification", {**_BERT, "embedding_size": 12}),
    "electra-equal": ("Electra", "ForTokenClassification", {**_BERT, "embedding_size": 32}),
    "modernbert": (
        "ModernBert",
        "ForTokenClassification",
        {
            **_BERT, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1,
            "sep_token_id": 2, "local_attention": 8,
        },
    ),
    "mpnet": ("MPNet", "ForSequenceClassification", _BERT),
    "albert": ("Albert", "ForSequenceClassification", {**_BERT, "embedding_size": 16}),
    "gpt2": (
        "GPT2",
        "LMHeadModel",
        {
            "vocab_size": VOCABULARY, "n_embd": 32, "n_head": 4, "n_layer": 3, "n_positions": 40,
            "bos_token_id": 1, "eos_token_id": 1,
        },
    ),
    "bloom": (
        "Bloom",
        "ForCausalLM",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 3, "n_head": 4},
    ),
    "gpt-neox": ("GPTNeoX", "ForCausalLM", {**_BERT, "bos_token_id": 1, "eos_token_id": 2}),
    "opt": (
        "OPT",
        "ForCausalLM",
        {
            "vocab_size": VOCABULARY, "hidden_size": 32, "num_attention_heads": 4, "ffn_dim": 48,
            "num_hidden_layers": 3, "max_position_embeddings": 40, "word_embed_proj_dim": 32,
        },
    ),
    "llama": ("Llama", "ForCausalLM", _LLAMA),
    "qwen3": ("Qwen3", "ForCausalLM", {**_LLAMA, "head_dim": 16}),
    "phi3": ("Phi3", "ForCausalLM", _LLAMA),
    "vit": (
        "ViT",
        "ForImageClassification",
        {
            "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48,
            "num_hidden_layers": 3, "image_size": 16, "patch_size": 8,
        },
    ),
}  # fmt: skip
KINDS = tuple(_MODELS)
COUPLED = (
    "bert", "roberta", "distilbert", "electra", "electra-equal", "modernbert", "mpnet", "gpt2",
    "gpt-neox", "opt",
)  # fmt: skip
"""Those whose hidden width is the heads times the size of a head."""
INDEPENDENT = ("llama", "qwen3", "phi3", "vit")


def tiny(kind: str):
    """A model of ``kind`` with weights large enough for every part to show in the outputs."""
    family, head, sizes = _MODELS[kind]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**sizes)
    model = getattr(transformers, f"{family}{head}")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def save(model, directory: Path) -> Source:
    """``model`` as a source."""
    model.save_pretrained(directory)
    return parse_source(str(directory))


def names_of(kind: str) -> tuple[str, ...]:
    """Inputs of a model of ``kind``."""
    return ("pixel_values",) if kind == "vit" else ("input_ids", "attention_mask")


def write_samples(directory: Path, kind: str, *, count: int = 8) -> Path:
    """A data directory with training rows for ``kind``, unlabelled."""
    random = np.random.default_rng(0)

    def row(index: int):
        if kind == "vit":
            return {"pixel_values": random.normal(size=(1, 3, 16, 16)).astype(np.float32)}
        length = 6 + index % 5
        ids = random.integers(3, VOCABULARY, size=(1, length))
        return {"input_ids": ids, "attention_mask": np.ones((1, length), dtype=np.int64)}

    write_rows(directory / "training", [row(i) for i in range(count)])
    return directory
