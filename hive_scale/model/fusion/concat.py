"""The self-attention baseline (paper's SA, after LLaVA): visual tokens are inserted into the text at the image's slot.

Shapes as in the package: B samples, T text tokens, V visual tokens, N = T + V tokens in the stream, D LLM width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hive_scale.config import ModelConfig
from hive_scale.model.encoders import encoder_depths
from hive_scale.model.fusion import (
    SLOT,
    Context,
    Fusion,
    column,
    host_weights,
    images_there,
    one_encoder_layer,
    text_positions,
)
from hive_scale.model.projector import MLP
from hive_scale.registry import FUSIONS


@FUSIONS.register("concat")
class Concat(Fusion):
    """Visual tokens run causally through every layer, like words. As in LLaVA, they are of the penultimate layer.

    ``model.encoder_layers`` may list another one.
    """

    new_parameters = ("projector.*",)
    projector = MLP
    lengthens_sequence = True
    is_llava = True

    @classmethod
    def encoder_depths(cls, num_layers: int, config: ModelConfig) -> tuple[int, ...]:
        if isinstance(config.encoder_layers, str):
            return (num_layers - 1,)
        depths = encoder_depths(num_layers, config)
        if len(depths) > 1:
            raise ValueError(
                f"model.encoder_layers={list(depths)}: fusion={config.fusion} takes one, such as [{num_layers}]"
            )
        return depths

    @classmethod
    def llm_depths(cls, num_layers: int, num_features: int) -> tuple[int, ...]:
        return ()

    @classmethod
    def describe(cls, config: ModelConfig) -> str:
        return f"concat: one MLP after {one_encoder_layer(config)}, visual tokens after the start token"

    def prepare(
        self, text_BTD: Tensor, visual: Sequence[Tensor], has_image: Tensor | None, slots: Tensor | None = None
    ) -> tuple[Tensor, Context]:
        num_visual, length, device = visual[0].shape[1], text_BTD.shape[1], text_BTD.device
        text = text_positions(length, num_visual, has_image, slots, device)
        of_image = column(slots, device) + torch.arange(num_visual, device=device)
        if has_image is not None:
            # blank images come after all text, which then cannot see them: plain causal attention, without a mask
            slots = torch.where(has_image, column(slots, device)[:, 0], length)
        context = Context(visual, has_image, torch.empty(0), slots)
        positions = merge(text, of_image.expand(len(text), num_visual), context)
        return merge(text_BTD, visual[0].to(text_BTD), context), replace(context, positions=positions)

    def before_layer(self, depth: int, hidden_BND: Tensor, context: Context) -> tuple[Tensor, dict[str, Any]]:
        return hidden_BND, {"attention_mask": context.mask}

    def finish(self, hidden_BND: Tensor, context: Context) -> Tensor:
        if context.has_image is None and context.slots is None:
            return hidden_BND[:, context.visual[0].shape[1] :]  # row 0: the last visual token predicts text token 1
        return hidden_BND.take_along_dim(self._rows(hidden_BND, context)[:, :, None], dim=1)

    def attention_layers(self, num_layers: int) -> tuple[int, ...]:
        return tuple(range(num_layers))

    def attention_weights(
        self, depth: int, hidden_BND: Tensor, context: Context, host: nn.Module, rotary: tuple[Tensor, Tensor]
    ) -> Tensor:
        seen = host_weights(host, rotary, *self.before_layer(depth, hidden_BND, context))
        seen = seen.take_along_dim(self._rows(hidden_BND, context)[:, None, :, None], dim=2)
        places = column(context.slots, seen.device) + torch.arange(context.visual[0].shape[1], device=seen.device)
        return seen.take_along_dim(places[:, None, None], dim=3)

    def decode_context(self, context: Context, position_BQ: Tensor, seen_BQK: Tensor) -> Context:
        length = context.positions.shape[1] - context.visual[0].shape[1]  # T of the texts given to `prepare`
        mask = torch.cat([_seen(seen_BQK[..., :length], context), seen_BQK[..., length:]], dim=2)
        shift = context.visual[0].shape[1] * images_there(context, seen_BQK[..., 0])
        return replace(context, positions=position_BQ + shift, mask=mask[:, None])

    def _rows(self, hidden_BND: Tensor, context: Context) -> Tensor:
        """Stream positions that predict the next text token, int (B or 1, T).

        This is the text token's own position; before the image it is the last visual token's, as in LLaVA.
        """
        num_visual, device = context.visual[0].shape[1], hidden_BND.device
        text = torch.arange(hidden_BND.shape[1] - num_visual, device=device)[None]
        is_seen = 1 if context.has_image is None else context.has_image[:, None].long()
        return text + num_visual * (text >= column(context.slots, device) - is_seen)


def merge(text: Tensor, visual: Tensor, context: Context) -> Tensor:
    """Merge text (B, T, ...) and visual tokens (B, V, ...) into the stream (B, N, ...), each image at its slot."""
    if context.slots is None:
        return torch.cat([text[:, :SLOT], visual, text[:, SLOT:]], dim=1)
    length, num_visual = text.shape[1], visual.shape[1]
    place = torch.arange(length + num_visual, device=text.device)
    begin = context.slots[:, None]
    behind = torch.where(place < begin + num_visual, length + place - begin, place - num_visual)
    order = torch.where(place < begin, place, behind)  # (B, N), indices into text followed by visual tokens
    both = torch.cat([text.expand(len(order), *text.shape[1:]), visual], dim=1)
    return both.take_along_dim(order.view(*order.shape, *[1] * (both.ndim - 2)), dim=1)


def _seen(text_BQT: Tensor, context: Context) -> Tensor:
    """bool (B, Q, N): the stream's keys that may be attended to, from the text's; visual ones need an image."""
    visual = images_there(context, text_BQT[..., 0])[:, :, None]
    visual = visual.expand(-1, context.visual[0].shape[1], text_BQT.shape[1])
    return merge(text_BQT.transpose(1, 2), visual, context).transpose(1, 2)
