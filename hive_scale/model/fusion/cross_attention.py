"""HIVE's own fusion (paper 3.3): injected layers in which the text attends to the encoder's features.

Shapes as in the package: B samples, T text tokens, V visual tokens, N tokens in the stream, D LLM width.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hive_scale.config import ModelConfig
from hive_scale.model.attention import KeyValue, scaled_dot_product, softmax_scores
from hive_scale.model.fusion import Context, Fusion, head_norm, split_heads
from hive_scale.model.hosts import AttentionParts, Host
from hive_scale.registry import FUSIONS


class CrossAttentionLayer(nn.Module):
    """H' = H + tanh(g) W_O softmax(Q K^T / sqrt(h)) V, Q from the LLM, K and V from the features (paper 3.3).

    Norms and projections start as copies of the host layer's, and scores are scaled and bounded as there. The gate g
    starts at zero, so the LLM is unchanged at first. There are no rotary positions: the encoder's features already
    carry position.
    """

    def __init__(self, parts: AttentionParts, qk_norm: bool) -> None:
        super().__init__()
        self.head_dim, self.scaling, self.softcap = parts.head_dim, parts.scaling, parts.softcap
        self.norm = copy.deepcopy(parts.norm)
        self.q_proj = copy.deepcopy(parts.q_proj)
        self.k_proj = copy.deepcopy(parts.k_proj)
        self.v_proj = copy.deepcopy(parts.v_proj)
        self.o_proj = copy.deepcopy(parts.o_proj)
        self.q_norm = head_norm(parts.q_norm, qk_norm, parts)
        self.k_norm = head_norm(parts.k_norm, qk_norm, parts)
        self.out_norm = nn.Identity() if parts.out_norm is None else copy.deepcopy(parts.out_norm)
        self.gate = nn.Parameter(torch.zeros(1, device=next(parts.o_proj.parameters()).device))

    def visual_kv(self, visual_BVD: Tensor) -> KeyValue:
        """Keys and values (B, K, V, h) from projected features (B, V, D)."""
        normed = self.norm(visual_BVD)
        key = self.k_norm(split_heads(self.k_proj(normed), self.head_dim))
        return key, split_heads(self.v_proj(normed), self.head_dim)

    def forward(
        self,
        hidden_BTD: Tensor,
        visual_BVD: Tensor,
        has_image: Tensor | None = None,
        memory: KeyValue | None = None,
    ) -> Tensor:
        """Fuse hidden states (B, T, D); the shape stays. `memory` has visual keys and values, if already computed."""
        key, value = memory or self.visual_kv(visual_BVD)
        query = self.q_norm(split_heads(self.q_proj(self.norm(hidden_BTD)), self.head_dim))
        mixed = scaled_dot_product(query, key, value, scale=self.scaling, softcap=self.softcap)
        update = torch.tanh(self.gate) * self.out_norm(self.o_proj(mixed.transpose(1, 2).flatten(2)))
        return added(hidden_BTD, update, has_image)

    def attention_weights(self, hidden_BTD: Tensor, visual_BVD: Tensor) -> Tensor:
        """Attention weights (B, heads, T, V), float32; each row sums to 1."""
        query = self.q_norm(split_heads(self.q_proj(self.norm(hidden_BTD)), self.head_dim))
        key = self.k_norm(split_heads(self.k_proj(self.norm(visual_BVD)), self.head_dim))
        return softmax_scores(query, key, None, self.scaling, self.softcap)


def added(hidden_BTD: Tensor, update_BTD: Tensor, has_image: Tensor | None) -> Tensor:
    """Hidden states plus an update, which texts without an image do not get. `has_image` as in `Context`."""
    return hidden_BTD + (update_BTD if has_image is None else update_BTD * has_image[:, None, None])


@FUSIONS.register("cross_attention")
class CrossAttention(Fusion):
    """An injected cross-attention layer at each fused depth, with its own softmax and a gate that starts closed."""

    new_parameters = ("projector.*", "fusion.*")  # all: behind a closed gate, parameters left frozen get no gradient
    gates, beside_gates = ("fusion.*.gate",), ("projector.*", "fusion.*.weight")
    layer: ClassVar[type[CrossAttentionLayer]] = CrossAttentionLayer  # class of the injected layers

    def __init__(self, host: Host, llm: nn.Module, num_features: int, config: ModelConfig) -> None:
        super().__init__(host, llm, num_features, config)
        layers = host.layers(llm)
        parts = (host.attention_parts(layers[depth]) for depth in self.depths)
        self.layers.extend(self.layer(one, config.qk_norm) for one in parts)

    def before_layer(self, depth: int, hidden_BND: Tensor, context: Context) -> tuple[Tensor, dict[str, Any]]:
        if depth in self.depths:
            index = self.depths.index(depth)
            memory = context.memory[index] if context.memory else None
            hidden_BND = self.layers[index](hidden_BND, context.visual[index], context.has_image, memory)
        return hidden_BND, {"attention_mask": context.mask}

    def visual_kv(self, visual: Sequence[Tensor], image_of_B: Tensor, slots: Tensor | None) -> list[KeyValue]:
        layers: Any = self.layers
        made = (layer.visual_kv(one) for layer, one in zip(layers, visual, strict=True))
        return [(key[image_of_B], value[image_of_B]) for key, value in made]

    def attention_layers(self, num_layers: int) -> tuple[int, ...]:
        return self.depths

    def attention_weights(
        self, depth: int, hidden_BND: Tensor, context: Context, host: nn.Module, rotary: tuple[Tensor, Tensor]
    ) -> Tensor:
        index = self.depths.index(depth)
        layer: Any = self.layers[index]
        given: Tensor = layer.attention_weights(hidden_BND, context.visual[index])
        return given
