"""Fine-tune MiniLM for CoNLL-2003 named entities: about 20 minutes on a CPU.

python -m examples.ner.train --output out/ner/model
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from examples.ner.fetch import CONLL, ENCODER, fetch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from transformers import BertConfig, BertForTokenClassification

from equipoise.data.readers.conll import encode_sentences, read_sentences
from equipoise.data.text import IGNORED, TextEncoder

LABELS = ("O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC", "B-MISC", "I-MISC")
MAX_LENGTH, BATCH, LEARNING_RATE, WARM_UP = 128, 32, 2e-4, 0.06


def pad(rows: list[Tensor], value: int) -> Tensor:
    """Rows of unequal length as one tensor."""
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)


def initial_model(encoder: Path) -> BertForTokenClassification:
    """The encoder with a new head for the labels."""
    names = {
        "id2label": dict(enumerate(LABELS)),
        "label2id": {name: index for index, name in enumerate(LABELS)},
    }
    config = BertConfig(**(json.loads((encoder / "config.json").read_text()) | names))
    model = BertForTokenClassification(config)
    weights = load_file(encoder / "model.safetensors")
    prefixed = {f"bert.{name.removeprefix('bert.')}": value for name, value in weights.items()}
    missing = model.load_state_dict(prefixed, strict=False).missing_keys
    if any(not name.startswith("classifier.") for name in missing):
        raise SystemExit(f"the encoder lacks {missing}")
    return model


def train(model: BertForTokenClassification, samples: list, *, epochs: int) -> None:
    """First-subword labels, AdamW, linear warm-up and decay, clipped gradients."""
    steps = epochs * -(-len(samples) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    warm = max(1, int(WARM_UP * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(step / warm, max(0.0, (steps - step) / max(1, steps - warm)))
    )
    model.train()
    for epoch in range(epochs):
        total = 0.0
        for indices in torch.randperm(len(samples)).split(BATCH):
            rows = [samples[i] for i in indices.tolist()]
            loss = model(
                input_ids=pad([r["input_ids"] for r in rows], 0),
                attention_mask=pad([r["attention_mask"] for r in rows], 0),
                labels=pad([r["label"] for r in rows], IGNORED),
            ).loss
            optimizer.zero_grad()
            loss.backward()
            clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += loss.item() * len(rows)
        print(f"epoch {epoch + 1}: mean loss {total / len(samples):.4f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="directory to write")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--sentences", type=int, default=None, help="train on the first so many")
    options = parser.parse_args()
    torch.manual_seed(0)
    data, encoder = fetch(CONLL), fetch(ENCODER)
    sentences = list(read_sentences(data / "train.txt"))[: options.sentences]
    text = TextEncoder(encoder / "tokenizer.json", max_length=MAX_LENGTH)
    encoded = encode_sentences(sentences, text, labels=LABELS, where="train.txt")
    samples = [
        {name: torch.from_numpy(array[0]) for name, array in s.feeds.items()}
        | {"label": torch.from_numpy(s.label)}
        for s in encoded
    ]
    model = initial_model(encoder)
    train(model, samples, epochs=options.epochs)
    model.eval().save_pretrained(options.output)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(encoder / name, options.output / name)
    print(f"saved {options.output}")


if __name__ == "__main__":
    main()
