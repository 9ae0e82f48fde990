"""HIVE's own fusion (paper 3.3): injected layers in which the text attends to the encoder's features.

Shapes as in the package: B samples, T text tokens, V visual tokens, N tokens in the stream, D LLM width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hive_scale.config import ModelConfig
from hive_scale.model.attention import KeyValue, scaled_dot_product, softmax_scores
from hive_scale.model.fusion import Context, Fusion, copied, head_norm, split_heads
from hive_scale.model.hosts import Host
from hive_scale.registry import FUSIONS


class CrossAttentionLayer(nn.Module):
    """H' = H + tanh(g) W_O softmax(Q K^T / sqrt(h)) V, Q from the LLM, K and V from the features (paper 3.3).

    Norm and projections start as copies of the host layer's. The gate g starts at zero, so the LLM is unchanged at
    first. There are no rotary positions: the encoder's features already carry position.
    """

    def __init__(self, host: nn.Module, qk_norm: bool) -> None:
        super().__init__()
        attention: Any = host.self_attn
        self.head_dim: int = attention.head_dim
        self.norm = copied(host, "input_layernorm")
        self.q_proj = copied(attention, "q_proj")
        self.k_proj = copied(attention, "k_proj")
        self.v_proj = copied(attention, "v_proj")
        self.o_proj = copied(attention, "o_proj")
        self.q_norm = head_norm(attention, "q_norm", qk_norm)
        self.k_norm = head_norm(attention, "k_norm", qk_norm)
        self.gate = nn.Parameter(torch.zeros(1, device=attention.o_proj.weight.device))

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
        mixed = scaled_dot_product(query, key, value)
        update = torch.tanh(self.gate) * self.o_proj(mixed.transpose(1, 2).flatten(2))
        if has_image is not None:
            update = update * has_image[:, None, None]
        fused: Tensor = hidden_BTD + update
        return fused

    def attention_weights(self, hidden_BTD: Tensor, visual_BVD: Tensor) -> Tensor:
        """Attention weights (B, heads, T, V), float32; each row sums to 1."""
        query = self.q_norm(split_heads(self.q_proj(self.norm(hidden_BTD)), self.head_dim))
        key = self.k_norm(split_heads(self.k_proj(self.norm(visual_BVD)), self.head_dim))
        return softmax_scores(query, key, None)


@FUSIONS.register("cross_attention")
class CrossAttention(Fusion):
    """An injected cross-attention layer at each fused depth, with its own softmax and a gate that starts closed."""

    new_parameters = ("projector.*", "fusion.*")  # all: behind a closed gate, parameters left frozen get no gradient
    gates, beside_gates = ("fusion.*.gate",), ("projector.*", "fusion.*.weight")

    def __init__(self, host: Host, llm: nn.Module, num_features: int, config: ModelConfig) -> None:
        super().__init__(host, llm, num_features, config)
        layers = host.layers(llm)
        self.layers.extend(CrossAttentionLayer(layers[depth], config.qk_norm) for depth in self.depths)

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
