"""Inputs made without data fit the model: its forward runs on every row."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from equipoise.data.preprocessing import from_processor
from equipoise.errors import MissingExtraError, SourceError, UsageError
from equipoise.export.samples import (
    ModelSamples,
    model_samples,
    module_preprocessing,
    parse_input,
    parse_sizes,
    random_rows,
)
from equipoise.sources.program import program_module
from equipoise.sources.source import Source, parse_source
from equipoise.sources.torch_model import NamedModule, load_module
from equipoise.spec import TensorSpec, check_feeds

TIMM = os.environ.get("EQUIPOISE_TEST_TIMM", "")
LAYERS = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 37,
}  # fmt: skip
TEXT = {**LAYERS, "vocab_size": 99, "max_position_embeddings": 40}
IMAGE = {**LAYERS, "image_size": 32, "patch_size": 8}
SPEECH = {
    **LAYERS, "vocab_size": 32, "conv_dim": (16, 16), "conv_stride": (20, 16),
    "conv_kernel": (20, 16), "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2,
}  # fmt: skip
HALVES = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 37, "decoder_ffn_dim": 37, "vocab_size": 99,
}  # fmt: skip
WHISPER = {
    **HALVES, "num_mel_bins": 20, "max_source_positions": 30, "max_target_positions": 24,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
BART = {
    **HALVES, "max_position_embeddings": 40, "pad_token_id": 1, "bos_token_id": 0,
    "eos_token_id": 2, "decoder_start_token_id": 2,
}  # fmt: skip
T5 = {
    "d_model": 32, "d_kv": 16, "d_ff": 37, "num_layers": 1, "num_heads": 2, "vocab_size": 99,
    "decoder_start_token_id": 0,
}  # fmt: skip
STAGES = {"embedding_size": 8, "hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1]}

IDS = "input_ids: int64[batch, sequence]"
MASK = "attention_mask: int64[batch, sequence]"
TYPES = "token_type_ids: int64[batch, sequence]"
PIXELS = "pixel_values: float32[batch, 3, height, width]"
FILM = "pixel_values: float32[batch, frames, 3, height, width]"
DECODER = "decoder_input_ids: int64[batch, decoder_sequence]"
STATES = "encoder_hidden_states: float32[batch, encoder_sequence, 32]"
STATES_MASK = "encoder_attention_mask: int64[batch, encoder_sequence]"


def clip() -> Any:
    """Two towers, small."""
    text = {**TEXT, "bos_token_id": 1, "eos_token_id": 2}
    config = hf.CLIPConfig(text_config=text, vision_config=IMAGE, projection_dim=16)
    return hf.CLIPModel(config)


def detr() -> Any:
    """A detector on a ResNet of transformers."""
    backbone = hf.ResNetConfig(**STAGES, out_features=["stage4"])
    config = hf.DetrConfig(
        **{k: v for k, v in HALVES.items() if k != "vocab_size"}, num_queries=6, backbone=None,
        backbone_config=backbone, use_timm_backbone=False, use_pretrained_backbone=False,
    )  # fmt: skip
    return hf.DetrForObjectDetection(config)


CASES: dict[str, tuple[Callable[[], Any], str, list[str]]] = {
    "BERT": (lambda: hf.BertForTokenClassification(hf.BertConfig(**TEXT)), "", [IDS, MASK, TYPES]),
    "DistilBERT": (
        lambda: hf.DistilBertModel(
            hf.DistilBertConfig(
                dim=32, n_layers=1, n_heads=2, vocab_size=99, max_position_embeddings=40
            )
        ),
        "",
        [IDS, MASK],
    ),
    "RoBERTa": (
        lambda: hf.RobertaModel(hf.RobertaConfig(**TEXT, type_vocab_size=1, pad_token_id=1)),
        "",
        [IDS, MASK],
    ),
    "MPNet": (lambda: hf.MPNetModel(hf.MPNetConfig(**TEXT)), "", [IDS, MASK]),
    "GPT-2": (
        lambda: hf.GPT2LMHeadModel(
            hf.GPT2Config(
                n_embd=32, n_layer=1, n_head=2, vocab_size=99, n_positions=40, bos_token_id=1,
                eos_token_id=1,
            )
        ),
        "",
        [IDS, MASK],
    ),
    "Llama": (
        lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT, num_key_value_heads=2)),
        "",
        [IDS, MASK],
    ),
    "T5 encoder": (lambda: hf.T5EncoderModel(hf.T5Config(**T5)), "", [IDS, MASK]),
    "T5 decoder": (
        lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5)),
        "decoder",
        [DECODER, STATES, STATES_MASK],
    ),
    "T5 whole": (
        lambda: hf.T5Model(hf.T5Config(**T5)), "feature-extraction", [IDS, MASK, DECODER]
    ),
    "BART decoder": (
        lambda: hf.BartForConditionalGeneration(hf.BartConfig(**BART)),
        "decoder",
        [DECODER, STATES, STATES_MASK],
    ),
    "BART classifier": (
        lambda: hf.BartForSequenceClassification(hf.BartConfig(**BART)), "", [IDS, MASK]
    ),
    "ViT": (lambda: hf.ViTForImageClassification(hf.ViTConfig(**IMAGE)), "", [PIXELS]),
    "ViT of one channel": (
        lambda: hf.ViTForImageClassification(hf.ViTConfig(**IMAGE, num_channels=1)),
        "",
        [PIXELS.replace(" 3,", " 1,")],
    ),
    "DeiT": (lambda: hf.DeiTForImageClassification(hf.DeiTConfig(**IMAGE)), "", [PIXELS]),
    "Swin": (
        lambda: hf.SwinForImageClassification(
            hf.SwinConfig(
                image_size=32, patch_size=2, embed_dim=16, depths=[1, 2], num_heads=[2, 2],
                window_size=2,
            )
        ),
        "",
        [PIXELS],
    ),
    "ConvNeXt": (
        lambda: hf.ConvNextForImageClassification(
            hf.ConvNextConfig(hidden_sizes=[8] * 4, depths=[1] * 4, image_size=32)
        ),
        "",
        [PIXELS],
    ),
    "ResNet": (lambda: hf.ResNetForImageClassification(hf.ResNetConfig(**STAGES)), "", [PIXELS]),
    "MobileNetV2": (
        lambda: hf.MobileNetV2ForImageClassification(
            hf.MobileNetV2Config(image_size=32, depth_multiplier=0.25)
        ),
        "",
        [PIXELS],
    ),
    "DETR": (detr, "", [PIXELS]),
    "SegFormer": (
        lambda: hf.SegformerForSemanticSegmentation(
            hf.SegformerConfig(
                hidden_sizes=[8, 8, 16, 16], depths=[1] * 4, num_attention_heads=[1, 1, 2, 2],
                decoder_hidden_size=16,
            )
        ),
        "",
        [PIXELS],
    ),
    "YOLOS": (
        lambda: hf.YolosForObjectDetection(
            hf.YolosConfig(**{**IMAGE, "image_size": [32, 48]}, num_detection_tokens=5)
        ),
        "",
        [PIXELS],
    ),
    "CLIP": (clip, "", [IDS, PIXELS, MASK]),
    "CLIP text": (clip, "text-embedding", [IDS, MASK]),
    "CLIP image": (clip, "image-embedding", [PIXELS]),
    "Whisper encoder": (
        lambda: hf.WhisperForConditionalGeneration(hf.WhisperConfig(**WHISPER)),
        "encoder",
        ["input_features: float32[batch, 20, frames]"],
    ),
    "Whisper decoder": (
        lambda: hf.WhisperForConditionalGeneration(hf.WhisperConfig(**WHISPER)),
        "decoder",
        [DECODER, STATES],
    ),
    "Wav2Vec2": (
        lambda: hf.Wav2Vec2ForCTC(hf.Wav2Vec2Config(**SPEECH)),
        "",
        ["input_values: float32[batch, time]"],
    ),
    "HuBERT": (
        lambda: hf.HubertForSequenceClassification(hf.HubertConfig(**SPEECH)),
        "",
        ["input_values: float32[batch, time]"],
    ),
    "Wav2Vec2-BERT": (
        lambda: hf.Wav2Vec2BertForCTC(
            hf.Wav2Vec2BertConfig(
                **LAYERS, feature_projection_input_dim=20, vocab_size=30, output_hidden_size=32
            )
        ),
        "",
        ["input_features: float32[batch, frames, 20]"],
    ),
    "AST": (
        lambda: hf.ASTForAudioClassification(
            hf.ASTConfig(
                **LAYERS, patch_size=8, frequency_stride=8, time_stride=8, max_length=24,
                num_mel_bins=16,
            )
        ),
        "",
        ["input_values: float32[batch, frames, 16]"],
    ),
    "TimeSformer": (
        lambda: hf.TimesformerForVideoClassification(hf.TimesformerConfig(**IMAGE, num_frames=2)),
        "",
        [FILM],
    ),
    "V-JEPA 2": (
        lambda: hf.VJEPA2Model(
            hf.VJEPA2Config(
                hidden_size=24, num_hidden_layers=1, num_attention_heads=2, crop_size=32,
                patch_size=8, frames_per_clip=4, pred_hidden_size=24, pred_num_attention_heads=2,
                pred_num_hidden_layers=1, pred_num_mask_tokens=2,
            )
        ),
        "",
        ["pixel_values_videos: float32[batch, frames, 3, height, width]"],
    ),
}  # fmt: skip


def runs(samples: ModelSamples, module: Any) -> None:
    """The rows fit the specs, have batch 1, and go through ``forward``."""
    named = NamedModule(module, names=[spec.name for spec in samples.inputs], source="test")
    for row in samples.rows:
        check_feeds(row, samples.inputs)
        assert {array.shape[0] for array in row.values()} == {1}
        assert all(np.isfinite(v).all() for v in named.run(row).values())


@pytest.mark.parametrize(("build", "task", "expected"), CASES.values(), ids=CASES)
def test_inputs_follow_from_signature_and_config(
    tmp_path: Path, build: Callable[[], Any], task: str, expected: list[str]
) -> None:
    """Names, dtypes, dimensions; nothing but the config says what they are."""
    torch.manual_seed(0)
    build().save_pretrained(tmp_path)
    source = parse_source(str(tmp_path), task=task)
    module = load_module(source)
    samples = model_samples(source, module, count=3)
    assert [str(spec) for spec in samples.inputs] == expected
    assert samples.made_by == "signature"
    assert len(samples.rows) == 3
    runs(samples, module)


def test_lengths_differ_from_row_to_row() -> None:
    """Those of texts and sounds; the longest fits the table of positions."""
    bert = hf.BertModel(hf.BertConfig(**{**TEXT, "max_position_embeddings": 12})).eval()
    texts = model_samples(Source(kind="factory", name="bert"), bert)
    lengths = [row["input_ids"].shape[1] for row in texts.rows]
    assert len(set(lengths)) > 3
    assert max(lengths) <= 12
    speech = hf.Wav2Vec2Model(hf.Wav2Vec2Config(**SPEECH)).eval()
    sounds = model_samples(Source(kind="factory", name="wav2vec2"), speech)
    assert len({row["input_values"].shape[1] for row in sounds.rows}) == 4
    runs(texts, bert)


def test_random_ids_avoid_special_ones_but_end_as_texts_do() -> None:
    """A model that pools at the end mark finds one, at the end."""
    config = hf.BertConfig(**{**TEXT, "vocab_size": 6}, eos_token_id=2, bos_token_id=1)
    found = model_samples(Source(kind="factory", name="bert"), hf.BertModel(config).eval())
    ids = np.concatenate([row["input_ids"][0, :-1] for row in found.rows])
    assert set(ids) == {3, 4, 5}
    assert {int(row["input_ids"][0, -1]) for row in found.rows} == {2}


def test_the_same_seed_gives_the_same_rows() -> None:
    """And another seed gives others."""
    vit = hf.ViTModel(hf.ViTConfig(**IMAGE)).eval()
    source = Source(kind="factory", name="vit")
    one, two, other = (model_samples(source, vit, count=2, seed=s) for s in (1, 1, 2))
    np.testing.assert_array_equal(one.rows[1]["pixel_values"], two.rows[1]["pixel_values"])
    assert not np.array_equal(one.rows[1]["pixel_values"], other.rows[1]["pixel_values"])


def save_tokenizer(directory: Path, *, vocabulary: int) -> None:
    """A tokenizer of letters: [CLS] text [SEP] text [SEP]."""
    letters = [chr(code) for code in range(32, 127)]
    ids = {token: i for i, token in enumerate(["[PAD]", "[CLS]", "[SEP]", *letters][:vocabulary])}
    tokenizer = Tokenizer(models.WordLevel(ids | {"[UNK]": vocabulary}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    tokenizer.save(str(directory / "tokenizer.json"))


def test_a_tokenizer_makes_the_texts(tmp_path: Path) -> None:
    """Real sentences, cut where positions end; every other a pair for a model that tells them."""
    config = hf.BertConfig(**{**TEXT, "max_position_embeddings": 120})
    hf.BertForSequenceClassification(config).save_pretrained(tmp_path)
    save_tokenizer(tmp_path, vocabulary=98)
    source = parse_source(str(tmp_path))
    samples = model_samples(source, load_module(source))
    lengths = [row["input_ids"].shape[1] for row in samples.rows]
    assert samples.made_by == "tokenizer"
    assert len(set(lengths)) > 3
    assert 32 < max(lengths) < 120
    assert [bool(row["token_type_ids"].any()) for row in samples.rows[:4]] == [False, True] * 2
    runs(samples, load_module(source))


def test_a_tokenizer_of_another_model_is_named(tmp_path: Path) -> None:
    """Ids beyond the vocabulary would crash the model, or read foreign memory on a device."""
    hf.BertModel(hf.BertConfig(**{**TEXT, "vocab_size": 40})).save_pretrained(tmp_path)
    save_tokenizer(tmp_path, vocabulary=98)
    source = parse_source(str(tmp_path))
    with pytest.raises(SourceError, match=r"tokenizer\.json gives the id \d+.*knows 40 tokens"):
        model_samples(source, load_module(source))


@pytest.mark.parametrize("listed", [["input_ids", "token_type_ids"], ["input_ids"], None])
def test_the_tokenizer_says_whether_there_are_token_types_where_the_config_does_not(
    tmp_path: Path, listed: list[str] | None
) -> None:
    """GPT-2 takes them and has no table of them."""
    config = hf.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=99, n_positions=400)
    hf.GPT2Model(config).save_pretrained(tmp_path)
    save_tokenizer(tmp_path, vocabulary=98)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"model_input_names": listed}))
    source = parse_source(str(tmp_path))
    samples = model_samples(source, load_module(source), count=2)
    assert ("token_type_ids" in samples.rows[0]) is ("token_type_ids" in (listed or []))


def test_an_image_processor_prepares_real_photos(tmp_path: Path) -> None:
    """Its size rules, not the config's, as the model may take others; and its mean and std."""
    hf.ResNetForImageClassification(hf.ResNetConfig(**STAGES)).save_pretrained(tmp_path)
    size = {"height": 40, "width": 64}
    mean = [0.2, 0.3, 0.4]
    processor = hf.ViTImageProcessorPil(size=size, image_mean=mean, image_std=[1.0, 1.0, 1.0])
    processor.save_pretrained(tmp_path)
    source = parse_source(str(tmp_path))
    samples = model_samples(source, load_module(source))
    assert samples.made_by == "image processor"
    pixels = np.concatenate([row["pixel_values"] for row in samples.rows])
    assert pixels.shape == (8, 3, 40, 64)
    low = -np.array(mean)
    assert (pixels.min(axis=(0, 2, 3)) >= low - 1e-6).all()
    assert (pixels.max(axis=(0, 2, 3)) <= low + 1 + 1e-6).all()
    assert pixels.std() > 0.1
    runs(samples, load_module(source))


def test_a_processor_with_unknown_steps_still_says_the_size(tmp_path: Path) -> None:
    """Its steps are not claimed to have been taken."""
    detr().save_pretrained(tmp_path)
    size = {"shortest_edge": 96, "longest_edge": 160}
    hf.DetrImageProcessorPil(size=size).save_pretrained(tmp_path)
    source = parse_source(str(tmp_path))
    samples = model_samples(source, load_module(source), count=2)
    assert samples.made_by == "signature"
    assert samples.rows[0]["pixel_values"].shape == (1, 3, 96, 96)


@pytest.mark.parametrize(
    ("build", "extractor", "task", "dims"),
    [
        (
            lambda: hf.Wav2Vec2ForCTC(hf.Wav2Vec2Config(**SPEECH)),
            hf.Wav2Vec2FeatureExtractor,
            "",
            "input_values: float32[batch, time]",
        ),
        (
            lambda: hf.ASTForAudioClassification(
                hf.ASTConfig(
                    **LAYERS, patch_size=8, frequency_stride=8, time_stride=8, max_length=24,
                    num_mel_bins=16,
                )
            ),
            lambda: hf.ASTFeatureExtractor(max_length=24, num_mel_bins=16),
            "",
            "input_values: float32[batch, frames, 16]",
        ),
        (
            lambda: hf.WhisperForConditionalGeneration(
                hf.WhisperConfig(**{**WHISPER, "max_source_positions": 100})
            ),
            lambda: hf.WhisperFeatureExtractor(feature_size=20, chunk_length=2),
            "encoder",
            "input_features: float32[batch, 20, frames]",
        ),
    ],
    ids=["Wav2Vec2", "AST", "Whisper"],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:At least one mel filter")
def test_a_feature_extractor_hears_sounds(
    tmp_path: Path, build: Any, extractor: Any, task: str, dims: str
) -> None:
    """Chirps in noise, through the checkpoint's own extractor."""
    build().save_pretrained(tmp_path)
    extractor().save_pretrained(tmp_path)
    source = parse_source(str(tmp_path), task=task)
    samples = model_samples(source, load_module(source), count=2)
    assert [str(spec) for spec in samples.inputs] == [dims]
    assert samples.made_by == "feature extractor"
    runs(samples, load_module(source))


def test_a_broken_feature_extractor_is_named(tmp_path: Path) -> None:
    """Its file, and what it cannot make."""
    hf.Wav2Vec2ForCTC(hf.Wav2Vec2Config(**SPEECH)).save_pretrained(tmp_path)
    settings = {"feature_extractor_type": "Wav2Vec2FeatureExtractor", "sampling_rate": "fast"}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    source = parse_source(str(tmp_path))
    with pytest.raises(SourceError, match=r"preprocessor_config\.json.*'input_values'") as caught:
        model_samples(source, load_module(source))
    assert "--sample" in caught.value.hint


def test_pictures_without_pillow_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the line that installs it."""
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    vit = hf.ViTModel(hf.ViTConfig(**IMAGE)).eval()
    with pytest.raises(MissingExtraError, match=r"equipoise\[vision\]"):
        model_samples(Source(kind="factory", name="vit"), vit)


# Modules of one's own, of timm, and programs


class Own(torch.nn.Module):
    """Two inputs that nothing describes."""

    def forward(self, left: Any, right: Any) -> Any:
        return left.sum(-1) + right.float().sum(-1)


OWN = Source(kind="factory", name="module:shop:own")


def test_a_module_that_says_nothing_is_refused_with_what_it_takes() -> None:
    """The hint has the ways to say it."""
    with pytest.raises(SourceError, match="takes left, right; nothing says the shape") as caught:
        model_samples(OWN, Own())
    assert "--input name=float32[batch,3,224,224]" in caught.value.hint


def test_an_input_that_the_config_does_not_describe_is_named() -> None:
    """The others are named as what the model takes."""

    class Boxed(hf.BertModel):
        def forward(self, input_ids: Any, bbox: Any) -> Any:
            raise NotImplementedError

    with pytest.raises(SourceError, match="takes input_ids, bbox; nothing says the shape of bbox"):
        model_samples(OWN, Boxed(hf.BertConfig(**TEXT)))


@pytest.mark.parametrize("attribute", ["example_inputs", "dummy_inputs"])
@pytest.mark.parametrize(
    "examples",
    [
        (torch.rand(3, 5), torch.arange(12).reshape(3, 4)),
        {"left": torch.rand(3, 5), "right": torch.arange(12).reshape(3, 4)},
        lambda: [torch.rand(3, 5), torch.arange(12).reshape(3, 4)],
    ],
    ids=["tuple", "dict", "method"],
)
def test_a_module_may_bring_examples(attribute: str, examples: Any) -> None:
    """The first axis counts samples."""
    module = Own()
    setattr(module, attribute, examples)
    samples = model_samples(OWN, module)
    assert list(map(str, samples.inputs)) == ["left: float32[batch, 5]", "right: int64[batch, 4]"]
    assert [row["right"].tolist() for row in samples.rows][2] == [[8, 9, 10, 11]]
    assert samples.made_by == "examples of the module"
    runs(samples, module)


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ((torch.rand(3, 5), torch.rand(2, 5)), r"left float32\[3, 5\], right float32\[2, 5\]"),
        ((torch.rand(3, 5), 7), "'right' is no tensor"),
        ((torch.tensor(1.0), torch.tensor(1.0)), "first axis"),
        ((), "it has none"),
    ],
)
def test_examples_that_are_no_samples_are_refused(examples: Any, message: str) -> None:
    """With their shapes."""
    module = Own()
    module.example_inputs = examples
    with pytest.raises(SourceError, match=message):
        model_samples(OWN, module)


class Pooled(torch.nn.Module):
    """A picture's means, with timm's description of how it was trained."""

    pretrained_cfg: ClassVar[Any] = {
        "input_size": (3, 20, 20), "crop_pct": 0.8, "interpolation": "bicubic",
        "mean": (0.0, 0.0, 0.0), "std": (0.5, 0.5, 0.5),
    }  # fmt: skip

    def forward(self, x: Any) -> Any:
        return x.mean((2, 3))


def test_a_description_as_timm_has_it_is_enough() -> None:
    """By the name of the first parameter, prepared as in training."""
    samples = model_samples(OWN, Pooled())
    assert list(map(str, samples.inputs)) == ["x: float32[batch, 3, height, width]"]
    assert samples.made_by == "image processor"
    assert samples.rows[0]["x"].shape == (1, 3, 20, 20)
    preprocessing = module_preprocessing(Pooled())
    assert preprocessing is not None
    assert preprocessing.resize_shortest == 25
    assert module_preprocessing(Own()) is None
    runs(samples, Pooled())


def test_a_description_with_other_channels_has_pictures_of_so_many() -> None:
    """What cannot be told of the preprocessing is not claimed."""

    class Grey(Pooled):
        default_cfg: ClassVar[Any] = {**Pooled.pretrained_cfg, "input_size": (1, 20, 30)}
        pretrained_cfg: ClassVar[Any] = None

    samples = model_samples(OWN, Grey())
    assert samples.rows[0]["x"].shape == (1, 1, 20, 30)
    assert samples.made_by == "signature"


@pytest.mark.skipif(not TIMM, reason="EQUIPOISE_TEST_TIMM names no directory with timm")
def test_pictures_are_prepared_as_by_timm() -> None:
    """Odd margins and even ones, on a landscape, a portrait and a small picture."""
    code = f"""
import sys
sys.path.append({TIMM!r})
import numpy as np
from equipoise.data.images import apply
from equipoise.export.samples import model_samples, module_preprocessing
from equipoise.sources.source import Source
from equipoise.sources.timm_model import build_timm
from PIL import Image
from sklearn.datasets import load_sample_images
photo = load_sample_images().images[0]
for name in ("efficientnet_lite0", "resnet18", "vit_tiny_patch16_224"):
    model = build_timm(name)
    import timm
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
    for image in (photo, np.ascontiguousarray(photo.transpose(1, 0, 2)), photo[:151, 100:231]):
        found = apply(image, module_preprocessing(model))
        expected = transform(Image.fromarray(image)).numpy()
        np.testing.assert_allclose(found[0], expected, atol=1e-5)
samples = model_samples(Source(kind="timm", name="timm:" + name), model, count=2)
assert [str(spec) for spec in samples.inputs] == ["x: float32[batch, 3, height, width]"]
assert samples.made_by == "image processor"
"""
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr


def exported(*, carried: bool) -> Any:
    """A program of two inputs, three samples in its example."""
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", max=9)
    example = (torch.rand(3, 5), torch.arange(12).reshape(3, 4))
    shapes = ({0: batch}, {0: batch, 1: length})
    program = torch.export.export(Own(), example, dynamic_shapes=shapes)
    if not carried:
        program.example_inputs = None
    return program_module(program)


PROGRAM = Source(kind="program", name="model.pt2")


def test_a_program_gives_the_inputs_it_was_exported_with() -> None:
    """One row per sample."""
    module = exported(carried=True)
    samples = model_samples(PROGRAM, module)
    assert list(map(str, samples.inputs)) == [
        "left: float32[batch, 5]", "right: int64[batch, right_1]",
    ]  # fmt: skip
    assert [row["right"].tolist() for row in samples.rows][1] == [[4, 5, 6, 7]]
    assert samples.made_by == "examples of the program"
    runs(samples, module)


def test_a_program_without_examples_has_random_inputs_in_its_ranges() -> None:
    """A size stays below the largest that the program takes."""
    module = exported(carried=False)
    samples = model_samples(PROGRAM, module, count=3)
    assert samples.made_by == "signature (random)"
    assert {row["right"].shape for row in samples.rows} == {(1, 9)}
    runs(samples, module)


# Inputs that the user describes


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("image=float32[batch,3,224,224]", ("batch", 3, 224, 224)),
        ("image=float32[ batch, 3, height:32, width ]", ("batch", 3, "height", "width")),
        ("encoder/image.0=float32[1]", (1,)),
        ("scale=float32[]", ()),
    ],
)
def test_a_spec_is_read(text: str, shape: tuple[int | str, ...]) -> None:
    """Numbers are fixed, names dynamic."""
    name = text.partition("=")[0]
    assert parse_input(text) == TensorSpec(name=name, dtype="float32", shape=shape)


@pytest.mark.parametrize(
    "text",
    ["", "image", "image=float32", "image=[1]", "=float32[1]", "a=float32[1][2]", "a=float32[1,]",
     "a=float32[-1]", "a=float32[0]", "a=float32[00]", "a=float32[n:0]", "a=float32[3:4]",
     "a=float32[1.5]", "a=float33[1]", "a=float32[n:]"],
)  # fmt: skip
def test_a_spec_that_is_none_is_a_usage_error(text: str) -> None:
    """With an example of one, or the dtypes there are."""
    with pytest.raises(UsageError) as caught:
        parse_input(text)
    assert "float32" in str(caught.value)


def test_sizes_to_sample_with_are_read() -> None:
    """From all inputs; one dimension has one size."""
    texts = ["ids=int64[batch,sequence:128]", "mask=int64[batch:1,sequence:128]"]
    assert parse_sizes(texts) == {"sequence": 128, "batch": 1}
    with pytest.raises(UsageError, match="'sequence' has two sizes"):
        parse_sizes([texts[0], "mask=int64[batch,sequence:64]"])
    with pytest.raises(UsageError, match="batch:4"):
        parse_sizes(["ids=int64[batch:4]"])


def test_random_rows_fit_their_specs() -> None:
    """Ids below 100, zeros and ones for masks, of which none hides everything."""
    specs = [
        parse_input(text)
        for text in (
            "input_ids=int64[batch,sequence]", "attention_mask=int64[batch,sequence]",
            "token_type_ids=int32[batch,sequence]", "image=float16[batch,3,height,width]",
            "keep=bool[batch,4]", "scale=float32[]",
        )
    ]  # fmt: skip
    rows = list(random_rows(specs, count=6, sizes={"height": 5}))
    for row in rows:
        check_feeds(row, specs)
        assert row["attention_mask"].sum() > 0
        assert set(np.unique(row["attention_mask"])) <= {0, 1}
        assert row["image"].shape == (1, 3, 5, 16)
    assert min(row["input_ids"].min() for row in rows) >= 0
    assert 1 < max(row["input_ids"].max() for row in rows) < 100
    lengths = [row["input_ids"].shape[1] for row in rows]
    assert lengths[0] == 16
    assert len(set(lengths)) > 2
    again = list(random_rows(specs, count=6, sizes={"height": 5}))
    np.testing.assert_array_equal(rows[5]["image"], again[5]["image"])


def test_a_size_that_is_given_holds_for_every_row() -> None:
    """Lengths only differ where nobody asked for one."""
    spec = parse_input("ids=int64[batch,sequence:7]")
    rows = random_rows([spec], count=3, sizes=parse_sizes(["ids=int64[batch,sequence:7]"]))
    assert {row["ids"].shape for row in rows} == {(1, 7)}


def test_steps_of_a_saved_processor_are_those_of_the_samples(tmp_path: Path) -> None:
    """What the bundle will say is what the inputs were made with."""
    processor = hf.CLIPImageProcessorPil(size={"shortest_edge": 36}, crop_size=32)
    clip().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    source = parse_source(str(tmp_path), task="image-embedding")
    samples = model_samples(source, load_module(source), count=1)
    size = from_processor(processor.to_dict()).size
    assert samples.rows[0]["pixel_values"].shape == (1, 3, *size)
