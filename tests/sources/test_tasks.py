"""transformers models: the task found, every weight placed, the part that was asked for."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from equipoise.errors import NonFiniteError, SourceError, UnsafeCheckpointError, UsageError
from equipoise.export.signature import SignatureConfig, read_signature
from equipoise.sources.source import parse_source
from equipoise.sources.tasks import TASKS, get_task, task_of
from equipoise.sources.torch_model import NamedModule, build_module, load_module, named_outputs

SMALL = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16,
}  # fmt: skip
TEXT = {"vocab_size": 32, **SMALL}
IMAGE = {"image_size": 32, "patch_size": 16, **SMALL}
SEQ2SEQ = {
    "vocab_size": 64, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 1,
}  # fmt: skip
T5 = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
SPEECH = {
    "conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 8,
    **TEXT,
}  # fmt: skip
CLIP = {
    "text_config": {**TEXT, "max_position_embeddings": 16, "eos_token_id": 3},
    "vision_config": IMAGE,
    "projection_dim": 8,
}
WHISPER = {**SEQ2SEQ, "max_source_positions": 50, "num_mel_bins": 8}
IDS = torch.tensor([[1, 5, 6, 2]])
ONES = torch.ones_like(IDS)
PIXELS = torch.rand(1, 3, 32, 32)


def saved(folder: Path, name: str, settings: dict, **others: object):
    """A tiny model of transformers with random weights, and that model."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    model = kind(kind.config_class(**settings, **others)).eval()
    model.save_pretrained(folder)
    return model


MODELS = [
    ("BertForTokenClassification", TEXT, "token-classification", {"input_ids": IDS}),
    ("DistilBertForSequenceClassification", {"vocab_size": 32, "dim": 16, "n_layers": 1,
     "n_heads": 2, "hidden_dim": 16}, "sequence-classification", {"input_ids": IDS}),
    ("BertForQuestionAnswering", TEXT, "question-answering", {"input_ids": IDS}),
    ("BertForMaskedLM", TEXT, "fill-mask", {"input_ids": IDS}),
    ("MPNetModel", TEXT, "feature-extraction", {"input_ids": IDS, "attention_mask": ONES}),
    ("GPT2LMHeadModel", {"vocab_size": 32, "n_embd": 16, "n_layer": 1, "n_head": 2},
     "causal-lm", {"input_ids": IDS, "attention_mask": ONES}),
    ("LlamaForCausalLM", TEXT | {"num_key_value_heads": 1}, "causal-lm", {"input_ids": IDS}),
    ("ViTForImageClassification", IMAGE, "image-classification", {"pixel_values": PIXELS}),
    ("YolosForObjectDetection", {**IMAGE, "image_size": [32, 32], "num_detection_tokens": 4},
     "object-detection", {"pixel_values": PIXELS}),
    ("SegformerForSemanticSegmentation", {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1],
     "decoder_hidden_size": 16}, "semantic-segmentation", {"pixel_values": PIXELS}),
    ("TimesformerForVideoClassification", {"num_frames": 2, **IMAGE}, "video-classification",
     {"pixel_values": torch.rand(1, 2, 3, 32, 32)}),
    ("ASTForAudioClassification", {"max_length": 32, "num_mel_bins": 16, **SMALL},
     "audio-classification", {"input_values": torch.rand(1, 32, 16)}),
    ("Wav2Vec2ForSequenceClassification", SPEECH, "audio-classification",
     {"input_values": torch.rand(1, 400)}),
    ("Wav2Vec2ForCTC", SPEECH, "ctc", {"input_values": torch.rand(1, 400)}),
    ("BartForSequenceClassification", SEQ2SEQ, "sequence-classification", {"input_ids": IDS}),
    ("CLIPModel", CLIP, "feature-extraction",
     {"input_ids": IDS, "pixel_values": PIXELS, "attention_mask": ONES}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "settings", "task", "feeds"), MODELS, ids=[model[0] for model in MODELS]
)
def test_task_is_found_and_the_numbers_are_those_of_the_model(
    tmp_path: Path, name: str, settings: dict, task: str, feeds: dict
) -> None:
    """The loaded module gives what the saved one gave, without caches, and only tensors."""
    original = saved(tmp_path, name, settings)
    source = parse_source(str(tmp_path))
    assert source.task == task
    module = load_module(source)
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
    with torch.no_grad():
        expected = named_outputs(original(**feeds))
        found = named_outputs(module(**feeds))
    assert not any("past" in output for output in found)
    for output, value in found.items():
        torch.testing.assert_close(value, expected[output], rtol=1e-4, atol=1e-5)
    empty = build_module(source)
    assert empty.state_dict().keys() == module.state_dict().keys()
    assert set(feeds) <= set(read_signature(SignatureConfig(source=source), output=tmp_path).names)


@pytest.mark.parametrize(
    ("name", "settings", "main"),
    [
        ("T5ForConditionalGeneration", T5, "input_ids"),
        ("BartForConditionalGeneration", SEQ2SEQ, "input_ids"),
        ("WhisperForConditionalGeneration", WHISPER, "input_features"),
    ],
)
def test_halves_of_an_encoder_decoder_make_the_whole(
    tmp_path: Path, name: str, settings: dict, main: str
) -> None:
    """Encoder and decoder are two modules with plain signatures; together they are the model."""
    original = saved(tmp_path, name, settings)
    with pytest.raises(SourceError, match="an encoder and a decoder") as raised:
        parse_source(str(tmp_path))
    assert "--task encoder or --task decoder" in raised.value.hint
    encoder, decoder = (load_module(parse_source(str(tmp_path), task=t)) for t in TASKS_OF_HALVES)
    text = main == "input_ids"
    mask = {"attention_mask": ONES} if text else {}
    first = {main: IDS if text else torch.rand(1, 8, 100), **mask}
    second = {"encoder_attention_mask": ONES} if text else {}
    assert list(inspect.signature(encoder.forward).parameters) == list(first)
    with torch.no_grad():
        states = encoder(**first)["last_hidden_state"]
        found = decoder(decoder_input_ids=IDS, encoder_hidden_states=states, **second)
        expected = original(**first, decoder_input_ids=IDS)
    assert list(found) == ["logits"]
    torch.testing.assert_close(found["logits"], expected.logits, rtol=1e-4, atol=1e-5)
    names = list(inspect.signature(decoder.forward).parameters)
    assert names == ["decoder_input_ids", "encoder_hidden_states", *second]


TASKS_OF_HALVES = ("encoder", "decoder")


def test_towers_of_a_two_tower_model_are_apart(tmp_path: Path) -> None:
    """Embeddings as CLIP projects them, by name; arrays go in by the names of the tower."""
    original = saved(tmp_path, "CLIPModel", CLIP)
    both = original(input_ids=IDS, pixel_values=PIXELS, attention_mask=ONES)
    feeds = {"input_ids": IDS, "attention_mask": ONES, "pixel_values": PIXELS}
    for kind, names in (("text", ["input_ids", "attention_mask"]), ("image", ["pixel_values"])):
        module = load_module(parse_source(str(tmp_path), task=f"{kind}-embedding"))
        named = NamedModule(module, names=names, source="clip")
        found = named.run({name: feeds[name].numpy() for name in names})
        assert list(found) == [f"{kind}_embeds"]
        value = torch.from_numpy(found[f"{kind}_embeds"])
        unit = value / value.norm(dim=-1, keepdim=True)  # the whole model normalises
        torch.testing.assert_close(unit, both[f"{kind}_embeds"].detach(), rtol=1e-4, atol=1e-5)


def test_part_that_a_model_has_not_got_is_named(tmp_path: Path) -> None:
    """A decoder of an encoder, a tower of one model, a head of a headless one."""
    saved(tmp_path / "bert", "BertModel", TEXT)
    saved(tmp_path / "t5", "T5Model", T5)
    for folder, task, words in (
        ("bert", "decoder", "BertModel has no decoder that gives logits"),
        ("t5", "decoder", "T5Model has no decoder that gives logits"),
        ("bert", "image-embedding", "BertModel has no image tower"),
        ("bert", "token-classification", r"missing: classifier\.bias, classifier\.weight"),
        ("bert", "image-classification", "transformers cannot build"),
    ):
        source = parse_source(str(tmp_path / folder), task=task)
        with pytest.raises(SourceError, match=words):
            load_module(source)


def test_unknown_tasks_and_architectures_are_told(tmp_path: Path) -> None:
    """All tasks are listed, and the nearest is suggested."""
    with pytest.raises(UsageError, match="fill-mask") as raised:
        get_task("fil-mask")
    assert "'fill-mask'" in raised.value.hint
    for config in ({"architectures": ["BertForNextSentencePrediction"]}, {}, {"architectures": 3}):
        with pytest.raises(SourceError, match="no task is known"):
            task_of(config, directory=tmp_path)
    assert task_of({"architectures": ["T5EncoderModel"], "is_encoder_decoder": True},
                   directory=tmp_path).name == "encoder"  # fmt: skip
    assert set(TASKS) >= {"encoder", "decoder", "text-embedding", "image-embedding"}


def test_unused_pooler_and_dropped_heads_are_no_fault(tmp_path: Path) -> None:
    """A masked language model has no pooler and one head too many for its features."""
    original = saved(tmp_path, "BertForMaskedLM", TEXT)
    module = load_module(parse_source(str(tmp_path), task="feature-extraction"))
    found = named_outputs(module(input_ids=IDS))
    assert list(found) == ["last_hidden_state"]
    torch.testing.assert_close(found["last_hidden_state"], original.bert(IDS)[0])


def rewrite(folder: Path, change) -> None:
    """Change the weights of a saved model."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.pop("bert.encoder.layer.1.output.dense.bias"),
         r"missing: bert\.encoder\.layer\.1\.output\.dense\.bias"),
        (lambda w: w.update({"classifier.weight": torch.ones(7, 16)}),
         r"of another shape: classifier\.weight"),
        (lambda w: w.update({"bert.encoder.layer.2.output.dense.bias": torch.ones(16)}),
         r"without a place: bert\.encoder\.layer\.2"),
        (lambda w: w.update({"bert.embeddings.word_embeddings.lora_A.weight": torch.ones(2)}),
         r"without a place: bert\.embeddings\.word_embeddings\.lora_A"),
    ],
)  # fmt: skip
def test_weights_that_would_be_random_or_dropped_are_refused(
    tmp_path: Path, change, words: str
) -> None:
    """transformers itself would only warn."""
    saved(tmp_path, "BertForTokenClassification", TEXT)
    rewrite(tmp_path, change)
    with pytest.raises(SourceError, match=words):
        load_module(parse_source(str(tmp_path)))


def test_weights_that_are_not_finite_are_named(tmp_path: Path) -> None:
    """With the directory and the count."""
    saved(tmp_path, "BertForTokenClassification", TEXT)
    rewrite(tmp_path, lambda w: w["classifier.bias"].fill_(float("nan")))
    with pytest.raises(NonFiniteError, match=r"2 of 2 numbers in the weight 'classifier\.bias'"):
        load_module(parse_source(str(tmp_path)))


def test_pickled_and_sharded_weights_give_the_same_module(tmp_path: Path) -> None:
    """pytorch_model.bin through the safe reader; shards of both kinds by their index."""
    saved(tmp_path, "BertForTokenClassification", TEXT)
    whole = load_module(parse_source(str(tmp_path))).state_dict()
    weights = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names = sorted(weights)
    halves = [{n: weights[n] for n in part} for part in (names[::2], names[1::2])]

    def check() -> None:
        found = load_module(parse_source(str(tmp_path))).state_dict()
        assert all(torch.equal(found[name], value) for name, value in whole.items())

    torch.save(weights, tmp_path / "pytorch_model.bin")
    check()
    (tmp_path / "pytorch_model.bin").unlink()
    for form, save in (("pytorch_model.bin", torch.save), ("model.safetensors", save_file)):
        files = [f"half-{i}{Path(form).suffix}" for i in range(2)]
        for half, file in zip(halves, files, strict=True):
            save(half, tmp_path / file)
        index = {name: files[i % 2] for i, name in enumerate(names)}
        (tmp_path / f"{form}.index.json").write_text(json.dumps({"weight_map": index}))
        check()
        (tmp_path / f"{form}.index.json").unlink()


def test_pickled_weights_that_hold_code_are_refused(tmp_path: Path) -> None:
    """The directory with only a .bin goes through the same reader as a checkpoint."""
    saved(tmp_path, "BertForTokenClassification", TEXT)
    (tmp_path / "model.safetensors").unlink()
    torch.save(torch.nn.Linear(2, 2), tmp_path / "pytorch_model.bin")
    with pytest.raises(UnsafeCheckpointError, match=r"pytorch_model\.bin holds a whole module"):
        load_module(parse_source(str(tmp_path)))


def test_architecture_that_transformers_has_not_got_is_named(tmp_path: Path) -> None:
    """A misspelt class, and one that is no model."""
    saved(tmp_path, "BertForTokenClassification", TEXT)
    config = json.loads((tmp_path / "config.json").read_text())
    for name in ("BerdForTokenClassification", "AutoModelForTokenClassification"):
        (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": [name]}))
        with pytest.raises(SourceError, match=name):
            load_module(parse_source(str(tmp_path)))
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "berd"}))
    with pytest.raises(SourceError, match="berd"):
        load_module(parse_source(str(tmp_path)))
