"""Fusions: ways for images to enter the LLM, behind one interface.

* `CrossAttention` (paper 3.3): at each fused depth an injected layer lets the text attend to the features of
  its encoder depth, with a softmax of its own and a gate that starts closed.
* `GatedCrossAttention` (Flamingo): such layers with a feed-forward of their own, all over one encoder depth.
* `JointAttention` (the authors' released code): the host layer's own attention also gets visual keys and
  values; one softmax over both, no new layer, no gate.
* `Concat` (the self-attention baseline, LLaVA): visual tokens are inserted into the sequence at the image's slot.
* `DeepStack` (Qwen3-VL): `Concat`, with shallower features added to the visual tokens before the first LLM layers.
* `QFormer` (BLIP-2): `Concat`, with a few tokens that learned queries make of the patches.

The slot of a text's image is the number of text tokens before it. A caption's slot is 1, after the start token; a
conversation's is where its first question begins. Row i of a fusion's output predicts text token i + 1.

Shapes: B samples, T text tokens, V visual tokens, N tokens in the stream (T, or T + V), D LLM width,
K key-value heads, h head width; in `decode_context` Q new tokens and K keys.
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
from hive_scale.model.hosts import AttentionParts, Host
from hive_scale.model.projector import Projector

SLOT = 1  # default slot, if a text gives none


@dataclass(frozen=True)
class Context:
    """The inputs that are the same for all LLM layers."""

    visual: Sequence[Tensor]  # phi(F_l), (B, V, D), for each fused depth
    has_image: Tensor | None  # bool (B,); None if every sample has an image
    positions: Tensor  # rotary positions of the stream's N tokens, (B or 1, N)
    slots: Tensor | None = None  # int (B,), the slot of each text's image; None: SLOT for all
    mask: Tensor | None = None  # bool (B or 1, 1, N, keys), True where attention is allowed; None: causal
    text_mask: Tensor | None = None  # the mask of layers without visual keys, if it differs
    memory: Sequence[KeyValue] | None = None  # visual keys and values of each fused layer, if already computed


class Fusion(nn.Module, metaclass=ABCMeta):
    """Base class of fusions. `layers` has one module per fused LLM layer, in the order of `depths`.

    A subclass, registered in `FUSIONS` under its ``model.fusion`` name, overrides what differs.
    """

    new_parameters: ClassVar[tuple[str, ...]]  # globs of parameters that the first stage trains (paper 3.5)
    with_llm: ClassVar[tuple[str, ...]] = ()  # globs of further parameters, which train together with the LLM
    gates: ClassVar[tuple[str, ...]] = ()  # globs of gates, which short runs may give a learning rate of their own
    beside_gates: ClassVar[tuple[str, ...]] = ()  # globs of the new parameters other than gates
    projector: ClassVar[type[nn.Module]] = Projector  # class of the projectors, one per selected encoder depth
    lengthens_sequence: ClassVar[bool] = False  # True if visual tokens run through the LLM, so that fewer samples fit
    is_llava: ClassVar[bool] = False  # True if transformers' LLaVA computes the same, so that export to it is possible

    def __init__(self, host: Host, llm: nn.Module, num_features: int, config: ModelConfig) -> None:
        """`num_features` is the number of encoder depths, one for each fused layer.

        Raises ValueError if the LLM has fewer layers, or not those that ``model.llm_layers`` lists.
        """
        super().__init__()
        num_layers = len(host.layers(llm))
        self.depths = self.llm_depths(num_layers, num_features)
        if not self.depths and (config.llm_layers != "uniform" or config.pairing != "shallow_to_shallow"):
            raise ValueError(f"fusion={config.fusion} fuses no LLM layers: remove model.llm_layers, model.pairing")
        if not isinstance(config.llm_layers, str):
            self.depths = _listed(config.llm_layers, num_layers, num_features)
        self.layers = nn.ModuleList()

    @classmethod
    def encoder_depths(cls, num_layers: int, config: ModelConfig) -> tuple[int, ...]:
        """The encoder depth for each fused LLM layer, ascending; a depth may serve several."""
        return encoder_depths(num_layers, config)

    @classmethod
    def llm_depths(cls, num_layers: int, num_features: int) -> tuple[int, ...]:
        """The fused LLM layers by the default rule, one per encoder depth. Raises ValueError for too few."""
        if num_features > num_layers:
            raise ValueError(
                f"{num_features} encoder depths cannot pair with {num_layers} LLM layers: "
                f"lower model.encoder_layer_ratio by a factor of {num_layers / num_features:.2g} or more"
            )
        return group_ends(num_layers, num_features)

    @classmethod
    def make_projector(cls, vision: Any, language: Any, config: ModelConfig) -> nn.Module:
        """A projector of one depth, (B, patches, C) to (B, V, D), from the Hugging Face configs of encoder and LLM."""
        return cls.projector(vision.hidden_size, language.hidden_size)

    @classmethod
    def num_visual(cls, num_patches: int, config: ModelConfig) -> int:
        """V, the number of visual tokens that a projector makes of an image's patches."""
        return num_patches

    @classmethod
    def describe(cls, config: ModelConfig) -> str:
        """A description for the model card."""
        layers = config.encoder_layers
        if not isinstance(layers, str):
            return f"{config.fusion}, the encoder's layers {', '.join(map(str, layers))}"
        return f"{config.fusion}, {config.encoder_layer_ratio:.0%} of the encoder's depths, {layers}"

    def check(self, num_visual: int) -> None:
        """Raises ValueError if the fusion cannot take `num_visual` visual tokens of an image."""

    def prepare(
        self, text_BTD: Tensor, visual: Sequence[Tensor], has_image: Tensor | None, slots: Tensor | None = None
    ) -> tuple[Tensor, Context]:
        """The first layer's input (B, N, D), and the context for all layers."""
        positions = torch.arange(text_BTD.shape[1], device=text_BTD.device)[None]
        return text_BTD, Context(visual, has_image, positions, slots)

    @abstractmethod
    def before_layer(self, depth: int, hidden_BND: Tensor, context: Context) -> tuple[Tensor, dict[str, Any]]:
        """The input of LLM layer `depth`, and the keyword arguments of its attention (see `attention.attend`)."""

    def finish(self, hidden_BND: Tensor, context: Context) -> Tensor:
        """Select the hidden states (B, T, D) that predict the text's next tokens from the last layer's output."""
        return hidden_BND

    @abstractmethod
    def attention_layers(self, num_layers: int) -> tuple[int, ...]:
        """Of `num_layers` LLM layers, those for which `attention_weights` works; () for none."""

    def attention_weights(
        self, depth: int, hidden_BND: Tensor, context: Context, host: nn.Module, rotary: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Attention weights (B, heads, T, V) of each text token on each patch, in LLM layer `depth`."""
        raise ValueError(f"{type(self).__name__} has no attention maps")

    def visual_kv(self, visual: Sequence[Tensor], image_of_B: Tensor, slots: Tensor | None) -> list[KeyValue]:
        """Visual keys and values of each fused layer, computed once per image for all texts: (B, K, V, h) each."""
        return []

    def num_beside(self, depth: int, context: Context) -> int:
        """Number of visual keys that precede the stream's keys in LLM layer `depth`."""
        return 0

    def decode_context(self, context: Context, position_BQ: Tensor, seen_BQK: Tensor) -> Context:
        """The context for decoding Q more tokens of each text, at `position_BQ`, attending where `seen_BQK` is True.

        `seen_BQK` covers the text's K keys: those so far, those of the Q tokens, and those to come, which are False.
        `context` is the one that `prepare` returned for the text.
        """
        return replace(context, positions=position_BQ, mask=seen_BQK[:, None])


def _listed(layers: Sequence[int], num_layers: int, num_features: int) -> tuple[int, ...]:
    if not 0 <= layers[0] <= layers[-1] < num_layers or len(set(layers)) < len(layers):
        raise ValueError(
            f"model.llm_layers={list(layers)}: the LLM's layers are 0 to {num_layers - 1}, each at most once"
        )
    if len(layers) != num_features:
        raise ValueError(
            f"model.llm_layers={list(layers)} has {len(layers)} layers, and {num_features} encoder layers feed them: "
            "list as many, or set model.encoder_layers or model.encoder_layer_ratio"
        )
    return tuple(layers)


def one_encoder_layer(config: ModelConfig) -> str:
    """The encoder layer of a fusion that takes one, in words: any rule gives the penultimate one."""
    layers = config.encoder_layers
    return "the penultimate encoder layer" if isinstance(layers, str) else f"encoder layer {layers[0]}"


def split_heads(flat: Tensor, head_dim: int) -> Tensor:
    """(B, N, heads * h) -> (B, heads, N, h)."""
    return flat.view(*flat.shape[:-1], -1, head_dim).transpose(1, 2)


def host_weights(
    host: nn.Module, rotary: tuple[Tensor, Tensor], hidden_BND: Tensor, attention: dict[str, Any]
) -> Tensor:
    """Attention weights (B, heads, queries, keys) of an LLM layer, recorded while running it."""
    recorded: list[Tensor] = []
    host(hidden_BND, position_embeddings=rotary, recorded=recorded, **attention)
    return recorded[0]


def head_norm(given: nn.Module | None, wanted: bool, parts: AttentionParts) -> nn.Module:
    """A per-head norm: a copy of the host's `given` one (Qwen3), else a new RMSNorm if `wanted`, else identity."""
    if given is not None:
        return copy.deepcopy(given)
    device = next(parts.k_proj.parameters()).device
    return nn.RMSNorm(parts.head_dim, eps=1e-6, device=device) if wanted else nn.Identity()


def column(slots: Tensor | None, device: torch.device) -> Tensor:
    """Slots as a column: int (B, 1), or (1, 1) for the default."""
    return torch.tensor([[SLOT]], device=device) if slots is None else slots[:, None]


def text_positions(
    length: int, extent: int, has_image: Tensor | None, slots: Tensor | None, device: torch.device
) -> Tensor:
    """Rotary positions of text tokens, (B or 1, T): those after the slot are shifted by the image's `extent`."""
    steps = torch.arange(length, device=device)[None]
    shift = extent * (steps >= column(slots, device))
    return steps + (shift if has_image is None else shift * has_image[:, None])


def images_there(context: Context, like_BN: Tensor) -> Tensor:
    """bool (B, 1), True for texts with an image."""
    return torch.ones_like(like_BN[:, :1]) if context.has_image is None else context.has_image[:, None]
