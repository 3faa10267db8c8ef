"""The sizes that layers state beside those that their weights have."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from equipoise import extras


def stated_sizes(layer: Any) -> Iterator[tuple[str, Any, Any]]:
    """Attribute, what it is and what the weights say, of layers whose sizes are known."""
    nn = extras.require("torch").nn
    convolution: Any = extras.require("torch.nn.modules.conv")
    norm: Any = extras.require("torch.nn.modules.batchnorm")
    weight = getattr(layer, "weight", None)
    if weight is None:
        return
    if isinstance(layer, convolution._ConvNd):  # noqa: SLF001 - the class of all convolutions
        out, into = (1, 0) if layer.transposed else (0, 1)
        per_group = {out: weight.shape[out], into: weight.shape[into]}
        per_group[1] *= layer.groups
        yield "out_channels", layer.out_channels, per_group[out]
        yield "in_channels", layer.in_channels, per_group[into]
    elif isinstance(layer, nn.Linear):
        yield "out_features", layer.out_features, weight.shape[0]
        yield "in_features", layer.in_features, weight.shape[1]
    elif isinstance(layer, norm._NormBase):  # noqa: SLF001 - the class of all batch norms
        yield "num_features", layer.num_features, math.prod(weight.shape)
    elif isinstance(layer, nn.GroupNorm):
        yield "num_channels", layer.num_channels, math.prod(weight.shape)
    elif isinstance(layer, nn.LayerNorm):
        yield "normalized_shape", tuple(layer.normalized_shape), tuple(weight.shape)
    elif isinstance(layer, nn.Embedding):
        yield "num_embeddings", layer.num_embeddings, weight.shape[0]
        yield "embedding_dim", layer.embedding_dim, weight.shape[1]
