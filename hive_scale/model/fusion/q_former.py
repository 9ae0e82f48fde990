"""Q-Former (BLIP-2, arXiv:2301.12597): learned queries make a few visual tokens of the patches, for the sequence.

Shapes as in the package: B samples, V visual tokens, here as many as queries, C encoder width, D LLM width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hive_scale.config import ModelConfig
from hive_scale.model.fusion import Context, one_encoder_layer
from hive_scale.model.fusion.concat import Concat
from hive_scale.registry import FUSIONS


class QueryTransformer(nn.Module):
    """Queries attend to each other and to the patches, pass a feed-forward, and are projected to the LLM's width.

    Each layer is BLIP-2's: self-attention, cross-attention, feed-forward, with a norm behind each.
    """

    def __init__(self, width_in: int, width_out: int, num_heads: int, config: ModelConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width_in)
        self.queries = nn.Parameter(torch.empty(config.num_query_tokens, width_in).normal_(std=0.02))
        self.query_norm = nn.LayerNorm(width_in)
        self.layers = nn.ModuleList(
            nn.TransformerDecoderLayer(
                width_in, num_heads, 4 * width_in, dropout=0.0, activation="gelu", batch_first=True
            )
            for _ in range(config.num_query_layers)
        )
        self.out = nn.Linear(width_in, width_out)

    def forward(self, features_BPC: Tensor) -> Tensor:
        """Features (B, patches, C) to visual tokens (B, V, D)."""
        patches = self.norm(features_BPC)
        made = self.query_norm(self.queries).expand(len(patches), -1, -1)
        for layer in self.layers:
            made = layer(made, patches)
        projected: Tensor = self.out(made)
        return projected.clone()  # FSDP2 warns about views as a unit's output, and a linear layer may return one


@FUSIONS.register("q_former")
class QFormer(Concat):
    """``model.num_query_tokens`` tokens, made of the patches of one depth by learned queries, run through every layer.

    BLIP-2's Q-Former starts as a BERT, attends to the patches in every second of its twelve layers, makes 32 tokens,
    and is first trained without the LLM, by contrast, matching and captions. Here it has ``model.num_query_layers``
    layers in the encoder's width, which all attend to the patches, starts at random, and learns by the loss of the
    captions alone, as all fusions do.
    """

    is_llava = False

    @classmethod
    def make_projector(cls, vision: Any, language: Any, config: ModelConfig) -> nn.Module:
        return QueryTransformer(vision.hidden_size, language.hidden_size, vision.num_attention_heads, config)

    @classmethod
    def num_visual(cls, num_patches: int, config: ModelConfig) -> int:
        return config.num_query_tokens

    @classmethod
    def describe(cls, config: ModelConfig) -> str:
        return f"q_former: {config.num_query_tokens} tokens made of {one_encoder_layer(config)} by learned queries"

    def attention_layers(self, num_layers: int) -> tuple[int, ...]:
        return ()  # visual tokens are no patches

    def attention_weights(
        self, depth: int, hidden_BND: Tensor, context: Context, host: nn.Module, rotary: tuple[Tensor, Tensor]
    ) -> Tensor:
        return super(Concat, self).attention_weights(depth, hidden_BND, context, host, rotary)
