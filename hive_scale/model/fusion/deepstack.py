"""DeepStack, as in Qwen3-VL: `Concat`, with features of shallower depths added to the visual tokens in the LLM.

Shapes as in the package: B samples, T text tokens, V visual tokens, N = T + V tokens in the stream, D LLM width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from hive_scale.config import ModelConfig
from hive_scale.model.encoders import encoder_depths
from hive_scale.model.fusion import Context
from hive_scale.model.fusion.concat import Concat, merge
from hive_scale.model.hosts import Host
from hive_scale.model.projector import Projector
from hive_scale.registry import FUSIONS


@FUSIONS.register("deepstack")
class DeepStack(Concat):
    """The deepest selected features enter the sequence, as in `Concat`. The others, by projectors of their own, are
    added to the hidden states at the visual tokens before LLM layers 1, 2, ..., from shallow to deep (Qwen3-VL,
    arXiv:2511.21631; DeepStack, arXiv:2406.04334). ``model.llm_layers`` may list other layers for them.

    Qwen3-VL takes the encoder's final output and three more depths, and merges four patches into a token. Here the
    depths are those of ``model.encoder_layers``, as in the other fusions, and a patch is a token.
    """

    projector = Projector  # with a norm: hidden states of several depths differ in size
    is_llava = False

    def __init__(self, host: Host, llm: nn.Module, num_features: int, config: ModelConfig) -> None:
        super().__init__(host, llm, num_features - 1, config)  # the deepest features are added to no layer
        self.deepest = 0 if config.pairing == "deep_to_shallow" else -1  # its place among those of `prepare`

    @classmethod
    def encoder_depths(cls, num_layers: int, config: ModelConfig) -> tuple[int, ...]:
        depths = encoder_depths(num_layers, config)
        if len(depths) < 2 or len(set(depths)) < len(depths):
            raise ValueError(
                f"fusion=deepstack needs two or more encoder layers, each once, and these are {list(depths)}: "
                "set model.encoder_layers to uniform, later or such a list, or raise model.encoder_layer_ratio"
            )
        return depths

    @classmethod
    def llm_depths(cls, num_layers: int, num_features: int) -> tuple[int, ...]:
        if num_features >= num_layers:
            raise ValueError(
                f"features of {num_features} depths cannot be added behind the first of {num_layers} LLM layers: "
                "lower model.encoder_layer_ratio, or list fewer model.encoder_layers"
            )
        return tuple(range(1, num_features + 1))

    @classmethod
    def describe(cls, config: ModelConfig) -> str:
        return super(Concat, cls).describe(config)

    def prepare(
        self, text_BTD: Tensor, visual: Sequence[Tensor], has_image: Tensor | None, slots: Tensor | None = None
    ) -> tuple[Tensor, Context]:
        added = list(visual)
        entering = added.pop(self.deepest)
        hidden, context = super().prepare(text_BTD, [entering], has_image, slots)
        return hidden, replace(context, visual=[entering, *added])

    def before_layer(self, depth: int, hidden_BND: Tensor, context: Context) -> tuple[Tensor, dict[str, Any]]:
        added = context.visual[1:]
        if depth in self.depths and added:
            visual = added[self.depths.index(depth)].to(hidden_BND)
            samples, length, width = hidden_BND.shape
            nothing = hidden_BND.new_zeros(1).expand(samples, length - visual.shape[1], width)
            hidden_BND = hidden_BND + merge(nothing, visual, context)
        return super().before_layer(depth, hidden_BND, context)

    def decode_context(self, context: Context, position_BQ: Tensor, seen_BQK: Tensor) -> Context:
        context = super().decode_context(context, position_BQ, seen_BQK)
        return replace(context, visual=context.visual[:1])  # a new token is text: nothing is added to it
