"""Which architectures can be exported: ``equipoise export`` against plain ``torch.onnx.export``.

    python benchmarks/architectures.py --output RECORD.json [--table TABLE.md] [--only NAME,NAME]

Each architecture is built small from its config with seeded random weights and saved as a user
would have it. Then each way of exporting runs in a process of its own, and one yardstick, which
shares no code with equipoise's own proof, judges every file: ONNX Runtime against PyTorch at three
combinations of sizes that no exporter was told of.

timm is used where it is installed, or from the folder that ``EQUIPOISE_TEST_TIMM`` names.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from equipoise import fs
from equipoise.spec import Array, TensorSpec
from equipoise.stages import versions_of
from equipoise.targets.machine import Machine, detect_machine

TIME_LIMIT_S = 600
RELATIVE_TOLERANCE = 1e-3
WAYS = ("equipoise", "plain")
"""Ours; ``torch.onnx.export`` with ``Dim`` objects; the same with ``Dim.AUTO``."""

# Dimension -> its size in the traced call, and at the three runs of the yardstick.
SIZES = {
    "batch": (2, (1, 3, 3)),
    "sequence": (12, (7, 7, 19)),
    "decoder_sequence": (6, (5, 5, 9)),
    "encoder_sequence": (12, (7, 7, 19)),
    "time": (4000, (3200, 3200, 5600)),
}
VOCABULARY = 120


@dataclass(frozen=True, kw_only=True)
class Case:
    """One architecture.

    Attributes:
        name: Unique, short.
        model: Class in transformers, or ``timm``.
        config: Class of its config, or the name of the model in timm.
        settings: Arguments of the config that make it small.
        task: As ``--task`` of equipoise; passed on where the class does not say it.
        inputs: What ``forward`` takes; a name is a dynamic dimension.
        backbone: Class and settings of a nested ``backbone_config``.
    """

    name: str
    model: str
    config: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    task: str
    inputs: tuple[TensorSpec, ...]
    backbone: tuple[str, Mapping[str, Any]] | None = None

    @property
    def dynamic(self) -> list[str]:
        """The dynamic dimensions, each once."""
        names = (dim for spec in self.inputs for dim in spec.shape if isinstance(dim, str))
        return list(dict.fromkeys(names))


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one way of exporting made of one architecture.

    Attributes:
        way: One of ``WAYS``.
        verdict: ``ok``, ``wrong numbers``, ``frozen dimension``, ``does not run``,
            ``export failed`` or ``not run``.
        reason: First line of the cause; empty when ok.
        wall_s: Seconds of the whole process that exported.
        file_bytes: Size of the ONNX file with its external data.
        relative: Largest difference over the largest value of the reference, over all outputs.
        rung: The exporter that equipoise kept.
    """

    way: str
    verdict: str
    reason: str = ""
    wall_s: float | None = None
    file_bytes: int | None = None
    relative: float | None = None
    rung: str = ""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One architecture and what became of it."""

    name: str
    model: str
    task: str
    parameters: int
    outcomes: tuple[Outcome, ...]


@dataclass(frozen=True, kw_only=True)
class Record:
    """All architectures, and where they were exported."""

    machine: Machine
    versions: dict[str, str]
    sizes: dict[str, tuple[int, ...]]
    relative_tolerance: float
    rows: tuple[Row, ...]


# The list.

_TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
_DECODER = _TEXT | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 10,
}
_SEQ2SEQ = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "decoder_start_token_id": 1,
}
_WHISPER = _SEQ2SEQ | {
    "num_mel_bins": 16,
    "max_source_positions": 20,
    "max_target_positions": 32,
}
_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
}
_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_TWO_TOWERS = {
    "text_config": _TOWER
    | {"vocab_size": VOCABULARY, "max_position_embeddings": 32, "eos_token_id": 2},
    "vision_config": _TOWER | {"image_size": 32, "patch_size": 8},
}
_SPEECH = {
    "vocab_size": 20,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "conv_dim": (16, 16, 16),
    "conv_stride": (5, 4, 4),
    "conv_kernel": (10, 4, 4),
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
_STAGES = {"hidden_sizes": (8, 16, 24, 32), "depths": (1, 1, 2, 1), "num_labels": 10}

_DETR = {
    "use_timm_backbone": False,
    "use_pretrained_backbone": False,
    "backbone": None,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_queries": 8,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "num_labels": 10,
}
_RESNET = _STAGES | {"embedding_size": 8}
_RESNET_LEVELS = ("ResNetConfig", _RESNET | {"out_features": ["stage2", "stage3", "stage4"]})


def _ids(name: str = "input_ids", *, length: str = "sequence") -> TensorSpec:
    return TensorSpec(name=name, dtype="int64", shape=("batch", length))


def _floats(name: str, *shape: int | str) -> TensorSpec:
    return TensorSpec(name=name, dtype="float32", shape=("batch", *shape))


_MASK = _ids("attention_mask")
_KINDS = _ids("token_type_ids")
_HIDDEN = _floats("encoder_hidden_states", "encoder_sequence", 32)


def _text(name: str, model: str, config: str, *, task: str, **settings: Any) -> Case:
    """A model of ids and a mask."""
    inputs = (_ids(), _MASK)
    return Case(name=name, model=model, config=config, settings=settings, task=task, inputs=inputs)


def _image(
    name: str,
    model: str,
    config: str,
    *,
    size: int = 32,
    task: str = "image-classification",
    **settings: Any,
) -> Case:
    """A model of square pictures."""
    inputs = (_floats("pixel_values", 3, size, size),)
    return Case(name=name, model=model, config=config, settings=settings, task=task, inputs=inputs)


def _timm(name: str, *, size: int) -> Case:
    inputs = (_floats("x", 3, size, size),)
    return Case(
        name=f"timm-{name}",
        model="timm",
        config=name,
        task="image-classification",
        inputs=inputs,
    )


FEATURES = "feature-extraction"

CASES = (
    _text("bert", "BertModel", "BertConfig", task=FEATURES, **_TEXT),
    _text(
        "bert-tokens", "BertForTokenClassification", "BertConfig",
        task="token-classification", num_labels=9, **_TEXT,
    ),
    _text(
        "bert-sequence", "BertForSequenceClassification", "BertConfig",
        task="sequence-classification", num_labels=3, **_TEXT,
    ),
    _text(
        "bert-answers", "BertForQuestionAnswering", "BertConfig",
        task="question-answering", **_TEXT,
    ),
    _text("bert-mask", "BertForMaskedLM", "BertConfig", task="fill-mask", **_TEXT),
    _text("roberta", "RobertaModel", "RobertaConfig", task=FEATURES, **_TEXT),
    _text(
        "xlm-roberta", "XLMRobertaForTokenClassification", "XLMRobertaConfig",
        task="token-classification", num_labels=9, **_TEXT,
    ),
    _text(
        "distilbert", "DistilBertModel", "DistilBertConfig", task=FEATURES,
        vocab_size=VOCABULARY, dim=32, n_layers=2, n_heads=4, hidden_dim=64,
        max_position_embeddings=64,
    ),
    _text(
        "deberta", "DebertaModel", "DebertaConfig", task=FEATURES,
        relative_attention=True, pos_att_type=["c2p", "p2c"], **_TEXT,
    ),
    _text(
        "deberta-v2", "DebertaV2Model", "DebertaV2Config", task=FEATURES,
        relative_attention=True, pos_att_type=["c2p", "p2c"], position_buckets=16,
        share_att_key=True, norm_rel_ebd="layer_norm", **_TEXT,
    ),
    _text("albert", "AlbertModel", "AlbertConfig", task=FEATURES, embedding_size=16, **_TEXT),
    _text("electra", "ElectraModel", "ElectraConfig", task=FEATURES, embedding_size=16, **_TEXT),
    _text("mpnet", "MPNetModel", "MPNetConfig", task=FEATURES, **_TEXT),
    _text(
        "mobilebert", "MobileBertModel", "MobileBertConfig", task=FEATURES, **_TEXT,
        embedding_size=16, intra_bottleneck_size=32, num_feedforward_networks=2,
    ),
    _text(
        "squeezebert", "SqueezeBertModel", "SqueezeBertConfig", task=FEATURES, **_TEXT,
        embedding_size=32,
    ),
    _text("roformer", "RoFormerModel", "RoFormerConfig", task=FEATURES, **_TEXT),
    _text(
        "modernbert", "ModernBertModel", "ModernBertConfig", task=FEATURES, **_DECODER,
        local_attention=8, cls_token_id=1, sep_token_id=2,
    ),
    _text("t5-encoder", "T5EncoderModel", "T5Config", task="encoder", **_T5),
    Case(
        name="t5-decoder", model="T5ForConditionalGeneration", config="T5Config", task="decoder",
        settings=_T5 | {"decoder_start_token_id": 0},
        inputs=(
            _ids("decoder_input_ids", length="decoder_sequence"), _HIDDEN,
            _ids("encoder_attention_mask", length="encoder_sequence"),
        ),
    ),
    _text(
        "bart-encoder", "BartForConditionalGeneration", "BartConfig", task="encoder",
        max_position_embeddings=64, **_SEQ2SEQ,
    ),
    Case(
        name="bart-decoder", model="BartForConditionalGeneration", config="BartConfig",
        task="decoder", settings=_SEQ2SEQ | {"max_position_embeddings": 64},
        inputs=(
            _ids("decoder_input_ids", length="decoder_sequence"), _HIDDEN,
            _ids("encoder_attention_mask", length="encoder_sequence"),
        ),
    ),
    _text(
        "gpt2", "GPT2LMHeadModel", "GPT2Config", task="causal-lm", vocab_size=VOCABULARY,
        n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2,
    ),
    _text("gpt-neox", "GPTNeoXForCausalLM", "GPTNeoXConfig", task="causal-lm", **_DECODER),
    _text(
        "opt", "OPTForCausalLM", "OPTConfig", task="causal-lm", vocab_size=VOCABULARY,
        hidden_size=32, word_embed_proj_dim=32, num_hidden_layers=2, num_attention_heads=4,
        ffn_dim=64, max_position_embeddings=64,
    ),
    _text(
        "llama", "LlamaForCausalLM", "LlamaConfig", task="causal-lm", num_key_value_heads=2,
        **_DECODER,
    ),
    _text(
        "mistral", "MistralForCausalLM", "MistralConfig", task="causal-lm",
        num_key_value_heads=2, sliding_window=8, **_DECODER,
    ),
    _text(
        "qwen3", "Qwen3ForCausalLM", "Qwen3Config", task="causal-lm", num_key_value_heads=2,
        head_dim=8, **_DECODER,
    ),
    _text(
        "gemma3", "Gemma3ForCausalLM", "Gemma3TextConfig", task="causal-lm",
        num_key_value_heads=2, head_dim=8, sliding_window=8,
        layer_types=["sliding_attention", "full_attention"], **_DECODER,
    ),
    _text("bloom", "BloomForCausalLM", "BloomConfig", task="causal-lm", vocab_size=VOCABULARY,
          hidden_size=32, n_layer=2, n_head=4),
    _text("phi", "PhiForCausalLM", "PhiConfig", task="causal-lm", **_DECODER),
    _text(
        "gpt-neo", "GPTNeoForCausalLM", "GPTNeoConfig", task="causal-lm", vocab_size=VOCABULARY,
        hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]],
        window_size=8, max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
    ),
    _text(
        "mixtral", "MixtralForCausalLM", "MixtralConfig", task="causal-lm", num_key_value_heads=2,
        num_local_experts=4, **_DECODER,
    ),
    Case(
        name="mamba", model="MambaForCausalLM", config="MambaConfig", task="causal-lm",
        settings={
            "vocab_size": VOCABULARY, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 2,
        },
        inputs=(_ids(),),
    ),
    _text(
        "longformer", "LongformerModel", "LongformerConfig", task=FEATURES,
        attention_window=[8, 8], **_TEXT,
    ),
    _text(
        "bigbird", "BigBirdModel", "BigBirdConfig", task=FEATURES,
        attention_type="original_full", **_TEXT,
    ),
    _text(
        "convbert", "ConvBertModel", "ConvBertConfig", task=FEATURES, embedding_size=32,
        head_ratio=2, conv_kernel_size=3, **_TEXT,
    ),
    _text(
        "funnel", "FunnelModel", "FunnelConfig", task=FEATURES, vocab_size=VOCABULARY,
        block_sizes=[1, 1], d_model=32, n_head=4, d_head=8, d_inner=64, num_decoder_layers=1,
    ),
    _text(
        "xlnet", "XLNetModel", "XLNetConfig", task=FEATURES, vocab_size=VOCABULARY, d_model=32,
        n_layer=2, n_head=4, d_inner=64,
    ),
    Case(
        name="fnet", model="FNetModel", config="FNetConfig", task=FEATURES, settings=_TEXT,
        inputs=(_ids(),),
    ),
    _text(
        "esm", "EsmForMaskedLM", "EsmConfig", task="fill-mask", pad_token_id=1, mask_token_id=2,
        position_embedding_type="rotary", **_TEXT,
    ),
    _text(
        "marian-encoder", "MarianMTModel", "MarianConfig", task="encoder",
        max_position_embeddings=64, **_SEQ2SEQ,
    ),
    _image("vit", "ViTForImageClassification", "ViTConfig", **_VIT),
    _image("deit", "DeiTForImageClassificationWithTeacher", "DeiTConfig", **_VIT),
    _image(
        "beit", "BeitForImageClassification", "BeitConfig", use_relative_position_bias=True, **_VIT
    ),
    _image(
        "data2vec-vision", "Data2VecVisionForImageClassification", "Data2VecVisionConfig",
        use_relative_position_bias=True, **_VIT,
    ),
    _image("dinov2", "Dinov2ForImageClassification", "Dinov2Config", **_VIT),
    _image("dinov2-features", "Dinov2Model", "Dinov2Config", task=FEATURES, **_VIT),
    _image(
        "swin", "SwinForImageClassification", "SwinConfig", image_size=32, patch_size=2,
        embed_dim=16, depths=(2, 2), num_heads=(2, 4), window_size=4, num_labels=10,
    ),
    _image(
        "swinv2", "Swinv2ForImageClassification", "Swinv2Config", image_size=32, patch_size=2,
        embed_dim=16, depths=(2, 2), num_heads=(2, 4), window_size=4, num_labels=10,
    ),
    _image("convnext", "ConvNextForImageClassification", "ConvNextConfig", size=64, **_STAGES),
    _image(
        "convnextv2", "ConvNextV2ForImageClassification", "ConvNextV2Config", size=64, **_STAGES
    ),
    _image(
        "resnet", "ResNetForImageClassification", "ResNetConfig", size=64, embedding_size=8,
        layer_type="bottleneck", **_STAGES,
    ),
    _image(
        "regnet", "RegNetForImageClassification", "RegNetConfig", size=64, embedding_size=8,
        groups_width=4, **_STAGES,
    ),
    _image(
        "efficientnet", "EfficientNetForImageClassification", "EfficientNetConfig", size=64,
        image_size=64, width_coefficient=0.25, depth_coefficient=0.5, hidden_dim=320, num_labels=10,
    ),
    _image(
        "mobilenet-v1", "MobileNetV1ForImageClassification", "MobileNetV1Config", size=64,
        image_size=64, depth_multiplier=0.25, num_labels=10,
    ),
    _image(
        "mobilenet-v2", "MobileNetV2ForImageClassification", "MobileNetV2Config", size=64,
        image_size=64, depth_multiplier=0.35, num_labels=10,
    ),
    _image(
        "mobilevit", "MobileViTForImageClassification", "MobileViTConfig", size=64, image_size=64,
        hidden_sizes=(16, 24, 32), neck_hidden_sizes=(8, 8, 16, 24, 32, 40, 48),
        num_attention_heads=4, num_labels=10,
    ),
    _image(
        "mobilevit-v2", "MobileViTV2ForImageClassification", "MobileViTV2Config", size=64,
        image_size=64, width_multiplier=0.25, num_labels=10,
    ),
    _image(
        "poolformer", "PoolFormerForImageClassification", "PoolFormerConfig", size=64, **_STAGES
    ),
    _image(
        "levit", "LevitForImageClassificationWithTeacher", "LevitConfig", size=64, image_size=64,
        hidden_sizes=(16, 32, 48), num_attention_heads=(1, 2, 3), depths=(1, 1, 1),
        key_dim=(8, 8, 8), num_labels=10,
    ),
    _image(
        "pvt", "PvtForImageClassification", "PvtConfig", size=64, image_size=64,
        hidden_sizes=(8, 16, 24, 32), depths=(1, 1, 1, 1), num_attention_heads=(1, 1, 2, 2),
        num_labels=10,
    ),
    _image(
        "focalnet", "FocalNetForImageClassification", "FocalNetConfig", size=64, image_size=64,
        embed_dim=16, depths=(1, 1, 1, 1), hidden_sizes=(16, 32, 64, 128), num_labels=10,
    ),
    _image(
        "hiera", "HieraForImageClassification", "HieraConfig", size=64, image_size=(64, 64),
        embed_dim=16, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8), num_labels=10,
    ),
    _image(
        "mobilevit-segments", "MobileViTForSemanticSegmentation", "MobileViTConfig", size=64,
        task="semantic-segmentation", image_size=64, hidden_sizes=(16, 24, 32),
        neck_hidden_sizes=(8, 8, 16, 24, 32, 40, 48), num_attention_heads=4, num_labels=10,
    ),
    _image(
        "segformer", "SegformerForSemanticSegmentation", "SegformerConfig", size=64,
        task="semantic-segmentation", image_size=64, hidden_sizes=(8, 16, 24, 32),
        depths=(1, 1, 1, 1), num_attention_heads=(1, 1, 2, 2), decoder_hidden_size=32,
        num_labels=10,
    ),
    _image(
        "yolos", "YolosForObjectDetection", "YolosConfig", task="object-detection",
        num_detection_tokens=10, **(_VIT | {"image_size": (32, 32)}),
    ),
    Case(
        name="detr", model="DetrForObjectDetection", config="DetrConfig", task="object-detection",
        settings=_DETR, inputs=(_floats("pixel_values", 3, 96, 96),),
        backbone=("ResNetConfig", _RESNET | {"out_features": ["stage4"]}),
    ),
    Case(
        name="deformable-detr", model="DeformableDetrForObjectDetection",
        config="DeformableDetrConfig", task="object-detection",
        settings=_DETR | {"num_feature_levels": 3},
        inputs=(_floats("pixel_values", 3, 128, 128),), backbone=_RESNET_LEVELS,
    ),
    Case(
        name="rt-detr", model="RTDetrForObjectDetection", config="RTDetrConfig",
        task="object-detection",
        settings={
            "d_model": 32, "encoder_hidden_dim": 32, "encoder_in_channels": [16, 24, 32],
            "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_queries": 10, "decoder_layers": 2,
            "encoder_attention_heads": 4, "decoder_attention_heads": 4,
            "decoder_in_channels": [32, 32, 32], "num_labels": 10,
        },
        inputs=(_floats("pixel_values", 3, 128, 128),),
        backbone=("RTDetrResNetConfig", _RESNET_LEVELS[1]),
    ),
    _text("clip-text", "CLIPModel", "CLIPConfig", task="text-embedding", **_TWO_TOWERS),
    _image("clip-image", "CLIPModel", "CLIPConfig", task="image-embedding", **_TWO_TOWERS),
    _text("siglip-text", "SiglipModel", "SiglipConfig", task="text-embedding", **_TWO_TOWERS),
    _image("siglip-image", "SiglipModel", "SiglipConfig", task="image-embedding", **_TWO_TOWERS),
    Case(
        name="whisper-encoder", model="WhisperForConditionalGeneration", config="WhisperConfig",
        task="encoder", settings=_WHISPER, inputs=(_floats("input_features", 16, 40),),
    ),
    Case(
        name="whisper-decoder", model="WhisperForConditionalGeneration", config="WhisperConfig",
        task="decoder", settings=_WHISPER,
        inputs=(
            _ids("decoder_input_ids", length="decoder_sequence"),
            _floats("encoder_hidden_states", 20, 32),
        ),
    ),
    Case(
        name="wav2vec2", model="Wav2Vec2ForCTC", config="Wav2Vec2Config", task="ctc",
        settings=_SPEECH, inputs=(_floats("input_values", "time"),),
    ),
    Case(
        name="hubert", model="HubertModel", config="HubertConfig", task=FEATURES,
        settings=_SPEECH, inputs=(_floats("input_values", "time"),),
    ),
    Case(
        name="wav2vec2-classes", model="Wav2Vec2ForSequenceClassification",
        config="Wav2Vec2Config", task="audio-classification",
        settings=_SPEECH | {"num_labels": 5}, inputs=(_floats("input_values", "time"),),
    ),
    Case(
        name="wavlm", model="WavLMForCTC", config="WavLMConfig", task="ctc", settings=_SPEECH,
        inputs=(_floats("input_values", "time"),),
    ),
    Case(
        name="ast", model="ASTForAudioClassification", config="ASTConfig",
        task="audio-classification",
        settings=_TOWER | {"patch_size": 8, "max_length": 48, "num_mel_bins": 24, "num_labels": 10},
        inputs=(_floats("input_values", 48, 24),),
    ),
    Case(
        name="timesformer", model="TimesformerForVideoClassification", config="TimesformerConfig",
        task="video-classification", settings=_VIT | {"num_frames": 4},
        inputs=(_floats("pixel_values", 4, 3, 32, 32),),
    ),
    Case(
        name="vivit", model="VivitForVideoClassification", config="VivitConfig",
        task="video-classification", settings=_VIT | {"num_frames": 4, "tubelet_size": [2, 8, 8]},
        inputs=(_floats("pixel_values", 4, 3, 32, 32),),
    ),
    Case(
        name="videomae", model="VideoMAEForVideoClassification", config="VideoMAEConfig",
        task="video-classification", settings=_VIT | {"num_frames": 4},
        inputs=(_floats("pixel_values", 4, 3, 32, 32),),
    ),
    _timm("mobilenetv3_small_100", size=224),
    _timm("mobilenetv4_conv_small", size=224),
    _timm("efficientnet_lite0", size=224),
    _timm("regnety_002", size=224),
    _timm("resnet18", size=224),
    _timm("convnext_atto", size=224),
    _timm("vit_tiny_patch16_224", size=224),
)  # fmt: skip


# Building and calling the models.


def build(case: Case) -> Any:
    """The model with seeded random weights, in evaluation mode."""
    import torch

    torch.manual_seed(0)
    if case.model == "timm":
        model = _import_timm().create_model(case.config, pretrained=False)
    else:
        import transformers

        model = getattr(transformers, case.model)(_config(case))
    return _settle_statistics(_liven(model.eval()), case)


def _config(case: Case) -> Any:
    import transformers

    settings = dict(case.settings)
    if case.backbone is not None:
        name, nested = case.backbone
        settings["backbone_config"] = getattr(transformers, name)(**nested)
    return getattr(transformers, case.config)(**settings)


def _liven(model: Any) -> Any:
    """Weights of the size that training leaves.

    The initial ones are so small, and gates so nearly shut, that a wrong mask or a lost layer
    would hardly show in the output.
    """
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                gain = 2.0 if parameter.ndim == 4 else 1.0
                parameter.normal_(std=(gain / parameter[0].numel()) ** 0.5)
            elif parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def _settle_statistics(model: Any, case: Case) -> Any:
    """Give every batch normalisation the mean and variance of random inputs."""
    import torch

    layers = [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]  # noqa: SLF001
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.train()
        layer.momentum = 1.0
    if layers:
        expected(model, feeds_of(case, {"batch": 8}))
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.eval()
        layer.momentum = momentum
    return model


def timm_available() -> bool:
    """Whether timm can be imported, from the folder that tests name if need be."""
    folder = os.environ.get("EQUIPOISE_TEST_TIMM", "")
    return (Path(folder) / "timm").is_dir() if folder else bool(importlib.util.find_spec("timm"))


def _import_timm() -> Any:
    """Import timm beside a PyTorch without the compiled half of torchvision."""
    import torch

    folder = os.environ.get("EQUIPOISE_TEST_TIMM", "")
    if folder and folder not in sys.path:
        sys.path.append(folder)
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import timm

    return timm


def save(case: Case, folder: Path) -> int:
    """Write the model as a user would have it; return its number of parameters."""
    from safetensors.torch import save_file

    model = build(case)
    if case.model == "timm":
        save_file(model.state_dict(), folder / "model.safetensors")
    else:
        model.save_pretrained(folder)
        _save_processor(case, folder)
    return sum(parameter.numel() for parameter in model.parameters())


def _save_processor(case: Case, folder: Path) -> None:
    """What says the size of pictures: not every config does."""
    shape = case.inputs[0].shape
    if case.inputs[0].name == "pixel_values" and len(shape) == 4:
        settings = {
            "image_processor_type": "ViTImageProcessor",
            "do_resize": True,
            "size": {"height": shape[2], "width": shape[3]},
            "resample": 2,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
        }
        fs.write_json(folder / "preprocessor_config.json", settings)


def load(case: Case, folder: Path) -> Any:
    """The saved model as a module of exactly ``case.inputs``, without a cache of keys."""
    if case.model == "timm":
        from safetensors.torch import load_file

        model = _import_timm().create_model(case.config, pretrained=False)
        model.load_state_dict(load_file(folder / "model.safetensors"))
        return model.eval()
    import transformers

    model = getattr(transformers, case.model).from_pretrained(folder, local_files_only=True).eval()
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    return _part(model, case.task)


def _part(model: Any, task: str) -> Any:
    """The half of a two-part model that the task means; the model itself for other tasks."""
    import torch

    class Decoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(
            self,
            decoder_input_ids: Any,
            encoder_hidden_states: Any,
            encoder_attention_mask: Any = None,
        ) -> Any:
            given = {"encoder_outputs": (encoder_hidden_states,)}
            if encoder_attention_mask is not None:
                given["attention_mask"] = encoder_attention_mask
            return self.model(decoder_input_ids=decoder_input_ids, **given).logits

    class Text(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            return _pooled(self.model.get_text_features(input_ids, attention_mask=attention_mask))

    class Image(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, pixel_values: Any) -> Any:
            return _pooled(self.model.get_image_features(pixel_values))

    if task == "encoder":
        return model.get_encoder()
    parts = {"decoder": Decoder, "text-embedding": Text, "image-embedding": Image}
    return parts[task]() if task in parts else model


def _pooled(found: Any) -> Any:
    return getattr(found, "pooler_output", found)


def sizes_of(case: Case, run: int | None) -> dict[str, int]:
    """Sizes of the dynamic dimensions: of the traced call for None, else of a yardstick's run."""
    return {dim: SIZES[dim][0] if run is None else SIZES[dim][1][run] for dim in case.dynamic}


def feeds_of(case: Case, sizes: Mapping[str, int], *, seed: int = 0) -> dict[str, Array]:
    """Random inputs at the sizes. All but the first text of a batch are padded at the end."""
    rng = np.random.default_rng(seed)
    return {spec.name: _array(spec, sizes, rng) for spec in case.inputs}


def _array(spec: TensorSpec, sizes: Mapping[str, int], rng: np.random.Generator) -> Array:
    shape = [sizes[dim] if isinstance(dim, str) else dim for dim in spec.shape]
    if spec.dtype == "float32":
        return rng.standard_normal(shape, dtype=np.float32)
    if spec.name == "token_type_ids":
        return rng.integers(0, 2, shape)
    if "mask" not in spec.name:
        return rng.integers(3, VOCABULARY, shape)
    lengths = np.maximum(shape[1] - 2 * np.arange(shape[0]), 1)
    return (np.arange(shape[1]) < lengths[:, None]).astype(np.int64)


def expected(module: Any, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """What PyTorch gives, by the names of the outputs."""
    import torch

    tensors = {name: torch.from_numpy(array) for name, array in feeds.items()}
    with torch.inference_mode():
        one = len(tensors) == 1  # timm's parameter is called x
        found = module(*tensors.values()) if one else module(**tensors)
    return dict(_leaves(found if hasattr(found, "items") else {"output": found}))


def _leaves(found: Any, prefix: str = "") -> Iterator[tuple[str, Array]]:
    """All tensors in their order; those inside of tuples have a dot in their names."""
    if hasattr(found, "numpy"):
        yield prefix, found.numpy()
        return
    pairs = found.items() if hasattr(found, "items") else enumerate(found or ())
    for key, value in pairs:
        yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))


# The ways of exporting.


def export_plain(case: Case, folder: Path, file: Path) -> None:
    """``torch.onnx.export`` as its documentation shows it for dynamic shapes."""
    import torch

    module = load(case, folder)
    feeds = feeds_of(case, sizes_of(case, None))
    tensors = {name: torch.from_numpy(array) for name, array in feeds.items()}
    auto = torch.export.Dim.AUTO  # named Dim objects give the same verdicts
    shapes = {
        spec.name: {axis: auto for axis, dim in enumerate(spec.shape) if isinstance(dim, str)}
        for spec in case.inputs
    }
    torch.onnx.export(
        module, (), str(file), kwargs=tensors, dynamo=True, dynamic_shapes=shapes,
        input_names=list(tensors), verbose=False,
    )  # fmt: skip


def our_command(case: Case, folder: Path, file: Path) -> list[str]:
    """The command line of equipoise for a saved case."""
    source = [str(folder)]
    if case.model == "timm":
        source = [f"timm:{case.config}", "--weights", str(folder / "model.safetensors")]
    elif case.task in {"encoder", "decoder", "text-embedding", "image-embedding"}:
        source += ["--task", case.task]
    options = ["--dynamic", ",".join(case.dynamic), "-o", str(file), "--json"]
    options += ["--cache-dir", str(folder / "cache")]
    return [sys.executable, "-m", "equipoise", "export", *source, *options]


# The yardstick.


def judge(case: Case, folder: Path, file: Path) -> tuple[str, str, float | None]:
    """Verdict, reason and largest relative difference of one file."""
    import onnxruntime as ort

    module = load(case, folder)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    try:
        session = ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # noqa: BLE001 - ONNX Runtime has no common base class
        return "does not run", first_line(error), None
    specs = _specs(case, session)
    for value, spec in zip(session.get_inputs(), specs, strict=True):
        for size, dim in zip(value.shape, spec.shape, strict=True):
            if isinstance(dim, str) and isinstance(size, int):
                return "frozen dimension", f"{dim} of {value.name} is {size}", None
    return _compare(replace(case, inputs=specs), module, session)


def _specs(case: Case, session: Any) -> tuple[TensorSpec, ...]:
    """What the file's inputs mean to the model; a single input may have any name."""
    names = [value.name for value in session.get_inputs()]
    if len(names) == len(case.inputs) == 1:
        return case.inputs
    known = {spec.name: spec for spec in (_MASK, _KINDS, *case.inputs)}
    return tuple(known[name] for name in names)


def _compare(case: Case, module: Any, session: Any) -> tuple[str, str, float | None]:
    worst, failures = 0.0, []
    runs = len(SIZES["batch"][1])
    for run in range(runs):
        sizes = sizes_of(case, run)
        at = ", ".join(f"{dim} {size}" for dim, size in sizes.items())
        feeds = feeds_of(case, sizes, seed=run + 1)
        reference = expected(module, feeds)
        names = [value.name for value in session.get_inputs()]
        try:
            found = session.run(None, dict(zip(names, feeds.values(), strict=True)))
        except Exception as error:  # noqa: BLE001 - ONNX Runtime has no common base class
            failures.append(f"at {at}: {first_line(error)}")
            continue
        differing, relative = _difference(reference, _by_name(session, found, reference))
        if differing:
            return "wrong numbers", f"at {at}: {differing}", relative
        worst = max(worst, relative)
    if failures:
        every = len(failures) == runs
        return ("does not run" if every else "frozen dimension"), failures[0], None
    return "ok", "", worst


def _by_name(
    session: Any, found: Sequence[Array], reference: Mapping[str, Array]
) -> dict[str, Array]:
    """Outputs by the names of the reference; by position when the exporter chose its own."""
    names = [value.name for value in session.get_outputs()]
    if not {name for name in reference if "." not in name} <= set(names):
        names = list(reference)
    return dict(zip(names, found, strict=False))


def _difference(reference: Mapping[str, Array], found: Mapping[str, Array]) -> tuple[str, float]:
    """What differs, in words, and the largest relative difference of all outputs."""
    worst = 0.0
    for name, right in reference.items():
        if "." in name and name not in found:  # a by-product, which an exporter may leave out
            continue
        if name not in found:
            return f"output {name} is missing", worst
        if found[name].shape != right.shape:
            return f"{name} is {list(found[name].shape)}, not {list(right.shape)}", worst
        scale = float(np.abs(right).max(initial=1e-12))
        difference = np.abs(found[name].astype(np.float64) - right).max(initial=0.0)
        relative = float(np.nan_to_num(difference / scale, nan=1e9, posinf=1e9))
        worst = max(worst, relative)
        if relative > RELATIVE_TOLERANCE:
            return f"{name} is off by {relative:.2g} of its largest value", worst
    return "", worst


_FOLDER = re.compile(r"/\S*/tmp\w+(/\S*)?")
_NOISE = re.compile(r"\x1b\[[0-9;]*m")


def first_line(error: BaseException) -> str:
    """The first line of the innermost cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = _NOISE.sub("", str(error)).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


# Children: one process per model, way and judgement.


_JUDGE = "judge:"


def child(step: str, name: str, folder: Path) -> dict[str, Any]:
    """Do one step of one case here; the answer is a JSON object."""
    case = next(case for case in CASES if case.name == name)
    try:
        if step == "save":
            return {"parameters": save(case, folder)}
        if step in WAYS:
            export_plain(case, folder, _file(folder, step))
            return {}
        ways = step.removeprefix(_JUDGE).split(",")
        return {way: judge(case, folder, _file(folder, way)) for way in ways}
    except Exception as error:  # noqa: BLE001 - whatever an exporter raises is the result
        return {"failure": first_line(error)}


def _file(folder: Path, way: str) -> Path:
    return folder / f"{way}.onnx"


def run_child(step: str, case: Case, folder: Path) -> dict[str, Any]:
    """One step in a process of its own: its answer, or why there is none."""
    return answer_of([sys.executable, __file__, "--child", step, case.name, str(folder)], case)


def answer_of(command: Sequence[str], case: Case) -> dict[str, Any]:
    """The JSON object that a command prints last, or ``failure``; always with ``wall_s``."""
    begin = time.perf_counter()
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            timeout=TIME_LIMIT_S,
            env=_environment(case),
        )
    except subprocess.TimeoutExpired:
        return {"failure": f"not finished after {TIME_LIMIT_S} s", "wall_s": float(TIME_LIMIT_S)}
    wall = time.perf_counter() - begin
    if done.returncode:
        return {"failure": _complaint(done.stderr, done.returncode), "wall_s": wall}
    return _last_object(done.stdout) | {"wall_s": wall}


def _environment(case: Case) -> dict[str, str]:
    """This environment; timm's folder, where torchvision lies too, is there for timm only."""
    timm = os.environ.get("EQUIPOISE_TEST_TIMM", "") if case.model == "timm" else ""
    folders = [folder for folder in (timm, os.environ.get("PYTHONPATH", "")) if folder]
    return os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(folders)}


def _complaint(stderr: str, code: int) -> str:
    lines = [line.strip() for line in _NOISE.sub("", stderr).splitlines() if line.strip()]
    begin = next((i for i, line in enumerate(lines) if line.startswith("error")), len(lines) - 1)
    told = _FOLDER.sub("the model", " ".join(lines[max(begin, 0) :]))
    return told.removeprefix("error: ")[:600] or f"exit code {code}"


def _last_object(text: str) -> dict[str, Any]:
    """The JSON object at the end of the text."""
    return dict(json.loads(text[max(("\n" + text).rfind("\n{"), 0) :]))


# Joining.


def measure(case: Case, ways: Sequence[str]) -> Row:
    """All ways on one architecture."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        saved = run_child("save", case, folder)
        if "failure" in saved:
            sys.exit(f"{case.name} cannot be built: {saved['failure']}")
        made = {way: _made(way, case, folder) for way in ways}
        files = [way for way in ways if _file(folder, way).is_file()]
        judged = run_child(_JUDGE + ",".join(files), case, folder) if files else {}
        outcomes = tuple(_outcome(way, made[way], judged, folder) for way in ways)
    return Row(
        name=case.name,
        model=case.config if case.model == "timm" else case.model,
        task=case.task,
        parameters=saved["parameters"],
        outcomes=outcomes,
    )


def _made(way: str, case: Case, folder: Path) -> dict[str, Any]:
    if way == "equipoise":
        return answer_of(our_command(case, folder, _file(folder, way)), case)
    return run_child(way, case, folder)


def _outcome(way: str, made: Mapping[str, Any], judged: Mapping[str, Any], folder: Path) -> Outcome:
    if "failure" in made or not _file(folder, way).is_file():
        reason = made.get("failure", "no file was written")
        return Outcome(way=way, verdict="export failed", reason=reason, wall_s=made["wall_s"])
    died = ("does not run", judged.get("failure", ""), None)
    verdict, reason, relative = judged.get(way, died)
    return Outcome(
        way=way,
        verdict=verdict,
        reason=reason,
        wall_s=made["wall_s"],
        file_bytes=sum(part.stat().st_size for part in folder.glob(f"{way}.onnx*")),
        relative=relative,
        rung=made.get("record", {}).get("exporter", ""),
    )


def _skipped(case: Case, ways: Sequence[str]) -> Row:
    outcomes = (Outcome(way=w, verdict="not run", reason="timm is not installed") for w in ways)
    return Row(
        name=case.name, model=case.config, task=case.task, parameters=0, outcomes=tuple(outcomes)
    )


def measured(cases: Sequence[Case], ways: Sequence[str], *, workers: int) -> Iterator[Row]:
    """A row for each case, printed as it comes."""
    timm = timm_available()

    def row_of(case: Case) -> Row:
        return _skipped(case, ways) if case.model == "timm" and not timm else measure(case, ways)

    with ThreadPoolExecutor(workers) as pool:
        for row in pool.map(row_of, cases):
            for outcome in row.outcomes:
                print(row.name, outcome.way, outcome.verdict, outcome.reason, flush=True)
            yield row


# The table.


def table(found: Record) -> str:
    """The record as a Markdown page."""
    ways = [way for way in WAYS if any(o.way == way for row in found.rows for o in row.outcomes)]
    titles = ["architecture", "task", *map(_title, ways), "why"]
    lines = [_HEAD.format(**_counts(found)), _line(titles), "|" + " --- |" * len(titles)]
    for row in found.rows:
        by_way = {outcome.way: outcome for outcome in row.outcomes}
        cells = [_cell(by_way[way]) if way in by_way else "–" for way in ways]
        lines.append(_line([f"{row.name} (`{row.model}`)", row.task, *cells, _why(row)]))
    return "\n".join([*lines, _EXPLAINED])


_EXPLAINED = """
## What the list is, and what it is not

The list is no random sample, and no held-out one. The first 68 were taken as they are used (plain:
64 ok). Of about 45 harder ones that were tried, every failure of the plain exporter was kept, and
only some of those that pass. The eager-attention rung and the grouped experts were built on what
this list showed. Outputs nested in tuples are not compared where a file leaves them out. cvt,
dinov3 and upernet are absent: no small config of theirs could be built. nystromformer takes fixed
lengths alone.

## What no exporter can follow

- **mamba** and **funnel** compute sizes in Python from the length of the text: a loop over the
  positions, a pooling plan. A graph traced at one length is right at that length alone. The plain
  exporter writes it all the same; equipoise refuses it, and takes both with `--dynamic batch`.
- **longformer** decides by the values of its mask which positions are global. `torch.export`
  refuses the guard, and the trace of the TorchScript exporter is wrong at other lengths.
"""

_HEAD = """# Architectures that export

Written by `benchmarks/architectures.py` from `benchmarks/records/architectures.json`: small models
with seeded random weights, each exported by the command line of equipoise and by
`torch.onnx.export(dynamo=True)` with `Dim.AUTO` for the batch and the length. A file is ok when
ONNX Runtime gives PyTorch's shapes and its numbers within {tolerance:g} of the largest one, at
batch 1 and 3 and at two lengths where there is one. {summary}. Made with {versions}.
"""


def _counts(found: Record) -> dict[str, Any]:
    totals = []
    for way in WAYS:
        verdicts = [o.verdict for row in found.rows for o in row.outcomes if o.way == way]
        ran = [verdict for verdict in verdicts if verdict != "not run"]
        if ran:
            totals.append(f"{_title(way)}: {ran.count('ok')} of {len(ran)} are ok")
    return {
        "tolerance": found.relative_tolerance,
        "summary": "; ".join(totals),
        "versions": ", ".join(f"{name} {version}" for name, version in found.versions.items()),
    }


def _title(way: str) -> str:
    return {"equipoise": "equipoise", "plain": "`torch.onnx.export`"}[way]


def _cell(outcome: Outcome) -> str:
    return f"{outcome.verdict} ({outcome.rung})" if outcome.rung else outcome.verdict


def _why(row: Row) -> str:
    """Every reason once, with whose it is."""
    ways: dict[str, list[str]] = {}
    for outcome in row.outcomes:
        if outcome.reason:
            ways.setdefault(outcome.reason, []).append(_title(outcome.way))
    return "; ".join(f"{', '.join(of)}: {_cut(reason)}" for reason, of in ways.items())


def _cut(reason: str) -> str:
    text = reason.replace("|", "\\|")
    return text if len(text) <= 240 else f"{text[:239]}…"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Measure the architectures asked for, and write the record and the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="names, comma separated; all when empty")
    parser.add_argument("--ours", action="store_true", help="equipoise only")
    parser.add_argument("--plain", action="store_true", help="torch.onnx.export only")
    parser.add_argument("--output", type=Path, help="JSON record to write")
    parser.add_argument("--table", type=Path, help="Markdown table to write")
    parser.add_argument("--workers", type=int, default=1, help="architectures at a time")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        step, name, folder = options.child
        print("\n" + json.dumps(child(step, name, Path(folder))), flush=True)
        return
    found = _record(_chosen(options.only), _ways(options), workers=options.workers)
    if options.output:
        fs.write_json(options.output, found)
    if options.table:
        fs.write_text(options.table, table(found))


def _chosen(only: str) -> list[Case]:
    names = [name for name in only.split(",") if name] or [case.name for case in CASES]
    unknown = sorted(set(names) - {case.name for case in CASES})
    if unknown:
        sys.exit(f"no such case: {', '.join(unknown)}")
    return [case for case in CASES if case.name in names]


def _ways(options: argparse.Namespace) -> Sequence[str]:
    if options.ours:
        return WAYS[:1]
    return WAYS[1:] if options.plain else WAYS


def _timm_version() -> dict[str, str]:
    """From the folder that is named for tests, where there is one."""
    folder = os.environ.get("EQUIPOISE_TEST_TIMM", "")
    found = list(metadata.distributions(name="timm", path=[folder])) if folder else []
    return {"timm": found[0].version} if found else {}


def _record(cases: Sequence[Case], ways: Sequence[str], *, workers: int) -> Record:
    packages = ("equipoise", "torch", "transformers", "timm", "onnx", "onnxscript", "onnxruntime")
    return Record(
        machine=detect_machine(),
        versions=versions_of(packages) | _timm_version(),
        sizes={dim: tested for dim, (_, tested) in SIZES.items()},
        relative_tolerance=RELATIVE_TOLERANCE,
        rows=tuple(measured(cases, ways, workers=workers)),
    )


if __name__ == "__main__":
    main()
