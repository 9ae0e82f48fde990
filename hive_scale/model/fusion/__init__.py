"""Where images enter the LLM: three ways behind one name.

* `CrossAttention` (paper 3.3): at each fused depth an injected layer lets the text attend to the features of
  its encoder depth, with a softmax of its own and behind a gate that starts shut.
* `JointAttention` (the authors' released code): the host layer's own attention also sees visual keys and
  values; one softmax over both, no new layer, no gate.
* `Concat` (the self-attention baseline, LLaVA): visual tokens join the sequence where the text has its image.

A text's image has a slot: the number of text tokens before it. A caption's is 1, behind the start token; a
conversation's is where its first question begins. Row i of what a fusion returns predicts text token i + 1.

Shapes: B samples, T text tokens, V visual tokens, N tokens in the stream (T, or T + V), D LLM width,
K key-value heads, h head width.
"""

from __future__ import annotations

import copy
from abc import ABCMeta, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hive_scale.config import ModelConfig
from hive_scale.model.attention import KeyValue
from hive_scale.model.encoders import encoder_depths, group_ends
from hive_scale.model.hosts import Host
from hive_scale.model.projector import Projector

SLOT = 1  # of every text for which no other is given


@dataclass(frozen=True)
class Context:
    """What stays the same from layer to layer."""

    visual: Sequence[Tensor]  # phi(F_l), (B, V, D) for each fused depth
    has_image: Tensor | None  # bool (B,); None when every sample has an image
    positions: Tensor  # of the stream's N tokens, (B or 1, N)
    slots: Tensor | None = None  # int (B,): of each text's image; None: SLOT
    mask: Tensor | None = None  # bool (B or 1, 1, N, keys): who may attend to whom; None: causal
    text_mask: Tensor | None = None  # the same for layers that see no image, where that differs
    memory: Sequence[KeyValue] | None = None  # of each fused layer, where they are known already


class Fusion(nn.Module, metaclass=ABCMeta):
    """A way for images to enter the LLM. `layers` has one module per fused LLM layer, in the order of `depths`.

    A subclass, registered in `FUSIONS` under the name that ``model.fusion`` gives, answers all that differs from here.
    """

    new_parameters: ClassVar[tuple[str, ...]]  # globs of what the first stage trains (paper 3.5)
    with_llm: ClassVar[tuple[str, ...]] = ()  # globs of what else trains when the LLM does
    gates: ClassVar[tuple[str, ...]] = ()  # globs of what may have a rate of its own in runs of few steps
    beside_gates: ClassVar[tuple[str, ...]] = ()  # globs of the other new parameters then
    projector: ClassVar[type[nn.Module]] = Projector  # from the encoder's width to the LLM's, one for each tapped depth
    is_llava: ClassVar[bool] = False  # whether transformers' LLaVA computes the same: then it can be exported as one

    def __init__(self, host: Host, llm: nn.Module, num_features: int, config: ModelConfig) -> None:
        """`num_features`: how many encoder depths are tapped. Raises ValueError if the LLM has no room for them."""
        super().__init__()
        self.depths = self.llm_depths(len(host.layers(llm)), num_features)
        self.layers = nn.ModuleList()

    @classmethod
    def encoder_depths(cls, num_layers: int, config: ModelConfig) -> tuple[int, ...]:
        """Which of the encoder's depths are tapped, ascending."""
        return encoder_depths(num_layers, config.encoder_layer_ratio, config.encoder_layers)

    @classmethod
    def llm_depths(cls, num_layers: int, num_features: int) -> tuple[int, ...]:
        """Which LLM layers are fused, one for each tapped depth: shallow to shallow, deep to deep."""
        if num_features > num_layers:
            raise ValueError(
                f"{num_features} encoder depths cannot pair with {num_layers} LLM layers: "
                f"lower model.encoder_layer_ratio by a factor of {num_layers / num_features:.2g} or more"
            )
        return group_ends(num_layers, num_features)

    @classmethod
    def describe(cls, config: ModelConfig) -> str:
        """In words, for a model card."""
        return f"{config.fusion}, {config.encoder_layer_ratio:.0%} of the encoder's depths, {config.encoder_layers}"

    def prepare(
        self, text_BTD: Tensor, visual: Sequence[Tensor], has_image: Tensor | None, slots: Tensor | None = None
    ) -> tuple[Tensor, Context]:
        """The hidden states (B, N, D) that the first layer sees, and the context of all layers."""
        positions = torch.arange(text_BTD.shape[1], device=text_BTD.device)[None]
        return text_BTD, Context(visual, has_image, positions, slots)

    @abstractmethod
    def before_layer(self, depth: int, hidden_BND: Tensor, context: Context) -> tuple[Tensor, dict[str, Any]]:
        """Hidden states for LLM layer `depth`, and the keyword arguments of its attention (`attention.attend`)."""

    def finish(self, hidden_BND: Tensor, context: Context) -> Tensor:
        """Of the last hidden states those that predict the text's next tokens, (B, T, D)."""
        return hidden_BND

    @abstractmethod
    def attention_layers(self, num_layers: int) -> tuple[int, ...]:
        """Of an LLM of `num_layers`, those of which `attention_weights` tells where a token looks; () for none."""

    def attention_weights(
        self, depth: int, hidden_BND: Tensor, context: Context, host: nn.Module, rotary: tuple[Tensor, Tensor]
    ) -> Tensor:
        """(B, heads, T, V): what the attention of each row in layer `depth` gives to each patch."""
        raise NotImplementedError

    def visual_kv(self, visual: Sequence[Tensor], image_of_B: Tensor, slots: Tensor | None) -> list[KeyValue]:
        """Keys and values of each fused layer for texts about images `image_of`: all that later tokens need."""
        return []

    def num_beside(self, depth: int, context: Context) -> int:
        """How many visual keys the attention of host layer `depth` has before those of the stream."""
        return 0

    def decode_context(self, context: Context, position_B1: Tensor, seen_BN: Tensor) -> Context:
        """The context of one more token a text, at its text's `position`, which attends where `seen` is True.

        `seen` is over the text's keys, those so far and, False, those to come; `context` is what `prepare` gave for
        the text.
        """
        return replace(context, positions=position_B1, mask=seen_BN[:, None, None])


def split_heads(flat: Tensor, head_dim: int) -> Tensor:
    """(B, N, heads * h) -> (B, heads, N, h)."""
    return flat.view(*flat.shape[:-1], -1, head_dim).transpose(1, 2)


def host_weights(
    host: nn.Module, rotary: tuple[Tensor, Tensor], hidden_BND: Tensor, attention: dict[str, Any]
) -> Tensor:
    """(B, heads, queries, keys): the attention weights of an LLM layer, as it computes them."""
    recorded: list[Tensor] = []
    host(hidden_BND, position_embeddings=rotary, recorded=recorded, **attention)
    return recorded[0]


def copied(host: nn.Module, name: str) -> nn.Module:
    """A copy of the submodule `name` of an LLM layer, with the same weights."""
    return copy.deepcopy(host.get_submodule(name))


def head_norm(attention: Any, name: str, wanted: bool) -> nn.Module:
    """The host's per-head norm where it has one (Qwen3); a new RMSNorm where wanted; else nothing."""
    if hasattr(attention, name):
        return copied(attention, name)
    weight = attention.k_proj.weight
    return nn.RMSNorm(attention.head_dim, eps=1e-6, device=weight.device) if wanted else nn.Identity()


def column(slots: Tensor | None, device: torch.device) -> Tensor:
    """int (B or 1, 1)."""
    return torch.tensor([[SLOT]], device=device) if slots is None else slots[:, None]


def text_positions(
    length: int, extent: int, has_image: Tensor | None, slots: Tensor | None, device: torch.device
) -> Tensor:
    """(B or 1, T): text behind the slot is moved on by the image's extent."""
    steps = torch.arange(length, device=device)[None]
    shift = extent * (steps >= column(slots, device))
    return steps + (shift if has_image is None else shift * has_image[:, None])


def images_there(context: Context, like_BN: Tensor) -> Tensor:
    """bool (B, 1): which texts have an image."""
    return torch.ones_like(like_BN[:, :1]) if context.has_image is None else context.has_image[:, None]
