"""The fusion of the authors' released code: visual keys and values in the LLM layers' own attention.

Shapes as in the package: B samples, T text tokens, V visual tokens, N tokens in the stream, K key-value heads, h head
width.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hive_scale.config import ModelConfig
from hive_scale.model.attention import KeyValue, causal
from hive_scale.model.fusion import (
    SLOT,
    Context,
    Fusion,
    column,
    head_norm,
    host_weights,
    images_there,
    split_heads,
    text_positions,
)
from hive_scale.model.hosts import AttentionParts, Host
from hive_scale.registry import FUSIONS


class VisualKeyValue(nn.Module):
    """Visual keys and values for one LLM layer. Norm and projections start as copies of the layer's own.

    While frozen (first stage), the copies equal the LLM's weights; later they are trained for images.
    """

    def __init__(self, parts: AttentionParts, frequencies: Tensor, scaling: float, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = parts.head_dim
        self.grid = config.positions == "grid"
        self.norm = copy.deepcopy(parts.norm)
        self.k_proj = copy.deepcopy(parts.k_proj)
        self.v_proj = copy.deepcopy(parts.v_proj)
        self.k_norm = head_norm(parts.k_norm, config.qk_norm, parts)
        self.inverse_frequencies: Tensor
        self.register_buffer("inverse_frequencies", frequencies.clone(), persistent=False)
        self.scaling = scaling  # factor on rotated keys; other than 1 under YaRN

    def forward(self, visual_BVD: Tensor, slots: Tensor | None = None) -> KeyValue:
        """Key and value, (B, K, V, h) each. Keys are rotated to their position in the image, relative to its slot."""
        normed = self.norm(visual_BVD)
        key = self.k_norm(split_heads(self.k_proj(normed), self.head_dim))
        places = visual_positions(key.shape[2], len(self.inverse_frequencies), self.grid, key.device)
        if slots is not None:
            places = places + (slots - SLOT)[:, None, None, None]
        # contiguous, since FSDP2 puts hooks on a unit's outputs and warns about views
        return self._rotate(key, places, self.scaling), split_heads(self.v_proj(normed), self.head_dim).contiguous()

    def move(self, key_BKVh: Tensor, slots: Tensor | None) -> Tensor:
        """Rotate keys, which `forward` made for the default SLOT, to images at `slots`."""
        return key_BKVh if slots is None else self._rotate(key_BKVh, (slots - SLOT)[:, None, None, None])

    def _rotate(self, key_BKVh: Tensor, places: Tensor, scaling: float = 1.0) -> Tensor:
        """Rotate keys by `places`, the position of each channel pair: (V, pairs) or (B, 1, V or 1, pairs or 1)."""
        angles = places * self.inverse_frequencies  # one per rotated pair, h / 2 of them or fewer
        cos, sin = (
            torch.cat([part, part], dim=-1).to(key_BKVh) for part in (scaling * angles.cos(), scaling * angles.sin())
        )
        turned, rest = key_BKVh[..., : cos.shape[-1]], key_BKVh[..., cos.shape[-1] :]
        first, second = turned.chunk(2, dim=-1)
        turned = turned * cos + torch.cat([-second, first], dim=-1) * sin
        return torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned


@FUSIONS.register("joint_attention")
class JointAttention(Fusion):
    """One softmax over patches and text in the LLM's own attention: no new layer, no gate."""

    new_parameters = ("projector.*",)
    with_llm = ("fusion.*",)  # the visual copies of the LLM's weights

    def __init__(self, host: Host, llm: nn.Module, num_features: int, config: ModelConfig) -> None:
        super().__init__(host, llm, num_features, config)
        self.grid = config.positions == "grid"
        layers = host.layers(llm)
        for depth in self.depths:
            parts = host.attention_parts(layers[depth])
            self.layers.append(VisualKeyValue(parts, *host.rotary(llm, depth), config))

    def check(self, num_visual: int) -> None:
        if self.grid and math.isqrt(num_visual) ** 2 != num_visual:
            raise ValueError(
                f"model.positions=grid needs a square grid of patches, and the encoder makes {num_visual} of an image: "
                "set model.positions=line"
            )

    def prepare(
        self, text_BTD: Tensor, visual: Sequence[Tensor], has_image: Tensor | None, slots: Tensor | None = None
    ) -> tuple[Tensor, Context]:
        num_visual, length, device = visual[0].shape[1], text_BTD.shape[1], text_BTD.device
        extent = _side(num_visual) if self.grid else num_visual
        # text before the slot cannot see the image. So a caption's first token, predicted by the start token, is
        # predicted without the image, as in the authors' code
        behind = torch.arange(length, device=device) >= column(slots, device)
        sees_image = behind[:, :, None].expand(-1, length, num_visual)
        if has_image is not None:
            sees_image = sees_image & has_image[:, None, None]
        sees_text = causal(length, device).expand(len(sees_image), length, length)
        mask = torch.cat([sees_image, sees_text], dim=-1)[:, None]
        positions = text_positions(length, extent, has_image, slots, device)
        return text_BTD, Context(visual, has_image, positions, slots, mask)

    def before_layer(self, depth: int, hidden_BND: Tensor, context: Context) -> tuple[Tensor, dict[str, Any]]:
        if depth not in self.depths:
            return hidden_BND, {"attention_mask": context.text_mask}
        index = self.depths.index(depth)
        memory = context.memory[index] if context.memory else self.layers[index](context.visual[index], context.slots)
        return hidden_BND, {"attention_mask": context.mask, "visual": memory}

    def visual_kv(self, visual: Sequence[Tensor], image_of_B: Tensor, slots: Tensor | None) -> list[KeyValue]:
        layers: Any = self.layers
        made = ((layer, *layer(one)) for layer, one in zip(layers, visual, strict=True))
        return [(layer.move(key[image_of_B], slots), value[image_of_B]) for layer, key, value in made]

    def num_beside(self, depth: int, context: Context) -> int:
        return context.visual[0].shape[1] if depth in self.depths else 0

    def decode_context(self, context: Context, position_BQ: Tensor, seen_BQK: Tensor) -> Context:
        num_visual = context.visual[0].shape[1]
        extent = _side(num_visual) if self.grid else num_visual
        seeing = images_there(context, seen_BQK[..., 0])
        mask = torch.cat([seeing[:, None].expand(-1, seen_BQK.shape[1], num_visual), seen_BQK], dim=2)
        return replace(
            context,
            positions=position_BQ + extent * seeing,
            mask=mask[:, None],
            text_mask=seen_BQK[:, None],
        )

    def attention_layers(self, num_layers: int) -> tuple[int, ...]:
        return self.depths

    def attention_weights(
        self, depth: int, hidden_BND: Tensor, context: Context, host: nn.Module, rotary: tuple[Tensor, Tensor]
    ) -> Tensor:
        weights = host_weights(host, rotary, *self.before_layer(depth, hidden_BND, context))
        return weights[..., : context.visual[0].shape[1]]


def _side(num_visual: int) -> int:
    """Patches per row, and per column, of a square image."""
    return math.isqrt(num_visual)


def visual_positions(num_visual: int, num_pairs: int, grid: bool, device: torch.device) -> Tensor:
    """Rotary position of each channel pair, (V, pairs), for an image at the default SLOT.

    On a grid, three quarters of the pairs alternate between row and column, and the rest have a constant, half the
    image's side. On a line, all pairs have the patch's index.
    """
    index = torch.arange(num_visual, device=device)
    if not grid:
        return SLOT + index[:, None].expand(num_visual, num_pairs)
    side = _side(num_visual)
    pair = torch.arange(num_pairs, device=device)
    row_or_column = torch.where(pair % 2 == 0, (index // side)[:, None], (index % side)[:, None])
    on_grid = pair < num_pairs - num_pairs // 4
    return SLOT + torch.where(on_grid, row_or_column, side // 2)
