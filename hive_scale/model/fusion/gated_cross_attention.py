"""Flamingo's gated cross-attention (arXiv:2204.14198): injected layers with feed-forwards, over one encoder depth.

Shapes as in the package: B samples, T text tokens, V visual tokens, D LLM width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hive_scale.config import ModelConfig
from hive_scale.model.attention import KeyValue
from hive_scale.model.encoders import encoder_depths
from hive_scale.model.fusion import one_encoder_layer
from hive_scale.model.fusion.cross_attention import CrossAttention, CrossAttentionLayer, added
from hive_scale.model.hosts import AttentionParts
from hive_scale.registry import FUSIONS


class GatedFeedForward(nn.Module):
    """tanh(g) W_2 gelu(W_1 norm(H)), four times as wide within, without biases. The gate g starts at zero."""

    def __init__(self, width: int, device: torch.device) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=1e-6, device=device)
        self.up = nn.Linear(width, 4 * width, bias=False, device=device)
        self.down = nn.Linear(4 * width, width, bias=False, device=device)
        self.gate = nn.Parameter(torch.zeros(1, device=device))

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        """What is added to hidden states (B, T, D), in their shape."""
        update: Tensor = torch.tanh(self.gate) * self.down(F.gelu(self.up(self.norm(hidden_BTD))))
        return update


class GatedCrossAttentionLayer(CrossAttentionLayer):
    """A `CrossAttentionLayer`, followed by a `GatedFeedForward`. Texts without an image pass both unchanged."""

    def __init__(self, parts: AttentionParts, qk_norm: bool) -> None:
        super().__init__(parts, qk_norm)
        mixer: Any = parts.o_proj
        self.feed_forward = GatedFeedForward(mixer.out_features, mixer.weight.device)

    def forward(
        self,
        hidden_BTD: Tensor,
        visual_BVD: Tensor,
        has_image: Tensor | None = None,
        memory: KeyValue | None = None,
    ) -> Tensor:
        """Fuse hidden states, with arguments as in `CrossAttentionLayer.forward`."""
        attended = super().forward(hidden_BTD, visual_BVD, has_image, memory)
        return added(attended, self.feed_forward(attended), has_image)


@FUSIONS.register("gated_cross_attention")
class GatedCrossAttention(CrossAttention):
    """Injected layers with gates and feed-forwards of their own, all over the encoder's deepest selected features.

    They are in the LLM layers of `CrossAttention`, so that only encoder depth and feed-forward differ from it.
    ``model.encoder_layers`` may list one layer; any rule gives the penultimate one, as in ``last``, and
    ``model.encoder_layer_ratio``, or the length of ``model.llm_layers``, the number of fused LLM layers.

    Flamingo's attention starts at random, and over a few tokens that a Perceiver makes of the patches. Here it starts
    as a copy of the host layer's, over all patches, as in `CrossAttention`. Flamingo's feed-forward also changes texts
    without an image.
    """

    layer: ClassVar[type[CrossAttentionLayer]] = GatedCrossAttentionLayer

    @classmethod
    def encoder_depths(cls, num_layers: int, config: ModelConfig) -> tuple[int, ...]:
        by_ratio = encoder_depths(num_layers, replace(config, encoder_layers="last"))
        number = len(by_ratio if isinstance(config.llm_layers, str) else config.llm_layers)
        depths = by_ratio if isinstance(config.encoder_layers, str) else encoder_depths(num_layers, config)
        if not isinstance(config.encoder_layers, str) and len(depths) > 1:
            raise ValueError(
                f"model.encoder_layers={list(depths)}: fusion=gated_cross_attention takes one, such as [{num_layers}], "
                "for all fused LLM layers"
            )
        return depths[:1] * number

    @classmethod
    def describe(cls, config: ModelConfig) -> str:
        return f"gated_cross_attention: {one_encoder_layer(config)} into all fused LLM layers, with gated feed-forwards"
