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
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hive_scale.config import ModelConfig
from hive_scale.model.attention import KeyValue, causal, scaled_dot_product, softmax_scores

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


class Fusion(nn.Module):
    """The common shape. `layers` has one module per fused LLM depth, in the order of `depths`."""

    def __init__(self, depths: Sequence[int]) -> None:
        super().__init__()
        self.depths = tuple(depths)
        self.layers = nn.ModuleList()

    def prepare(
        self, text_BTD: Tensor, visual: Sequence[Tensor], has_image: Tensor | None, slots: Tensor | None = None
    ) -> tuple[Tensor, Context]:
        """The hidden states (B, N, D) that the first layer sees, and the context of all layers."""
        positions = torch.arange(text_BTD.shape[1], device=text_BTD.device)[None]
        return text_BTD, Context(visual, has_image, positions, slots)

    def before_layer(self, depth: int, hidden_BND: Tensor, context: Context) -> tuple[Tensor, dict[str, Any]]:
        """Hidden states for host layer `depth`, and the keyword arguments of its attention (`attention.attend`)."""
        return hidden_BND, {"attention_mask": context.mask}

    def finish(self, hidden_BND: Tensor, context: Context) -> Tensor:
        """Of the last hidden states those that predict the text's next tokens, (B, T, D)."""
        return hidden_BND

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


class CrossAttentionLayer(nn.Module):
    """H' = H + tanh(g) W_O softmax(Q K^T / sqrt(h)) V, Q from the LLM, K and V from the features (paper 3.3).

    Norm and projections start as copies of the host layer's; g starts at zero, so the LLM is untouched. No
    rotary positions: the encoder has put position into its features.
    """

    def __init__(self, host: nn.Module, qk_norm: bool) -> None:
        super().__init__()
        attention: Any = host.self_attn
        self.head_dim: int = attention.head_dim
        self.norm = _copy(host, "input_layernorm")
        self.q_proj = _copy(attention, "q_proj")
        self.k_proj = _copy(attention, "k_proj")
        self.v_proj = _copy(attention, "v_proj")
        self.o_proj = _copy(attention, "o_proj")
        self.q_norm = _head_norm(attention, "q_norm", qk_norm)
        self.k_norm = _head_norm(attention, "k_norm", qk_norm)
        self.gate = nn.Parameter(torch.zeros(1, device=attention.o_proj.weight.device))

    def visual_kv(self, visual_BVD: Tensor) -> KeyValue:
        normed = self.norm(visual_BVD)
        key = self.k_norm(_heads(self.k_proj(normed), self.head_dim))
        return key, _heads(self.v_proj(normed), self.head_dim)

    def forward(
        self,
        hidden_BTD: Tensor,
        visual_BVD: Tensor,
        has_image: Tensor | None = None,
        memory: KeyValue | None = None,
    ) -> Tensor:
        key, value = memory or self.visual_kv(visual_BVD)
        query = self.q_norm(_heads(self.q_proj(self.norm(hidden_BTD)), self.head_dim))
        mixed = scaled_dot_product(query, key, value)
        update = torch.tanh(self.gate) * self.o_proj(mixed.transpose(1, 2).flatten(2))
        if has_image is not None:
            update = update * has_image[:, None, None]
        fused: Tensor = hidden_BTD + update
        return fused

    def attention_weights(self, hidden_BTD: Tensor, visual_BVD: Tensor) -> Tensor:
        query = self.q_norm(_heads(self.q_proj(self.norm(hidden_BTD)), self.head_dim))
        key = self.k_norm(_heads(self.k_proj(self.norm(visual_BVD)), self.head_dim))
        return softmax_scores(query, key, None)


class CrossAttention(Fusion):
    def __init__(self, hosts: Sequence[nn.Module], depths: Sequence[int], config: ModelConfig) -> None:
        super().__init__(depths)
        self.layers.extend(CrossAttentionLayer(hosts[depth], config.qk_norm) for depth in depths)

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

    def attention_weights(
        self, depth: int, hidden_BND: Tensor, context: Context, host: nn.Module, rotary: tuple[Tensor, Tensor]
    ) -> Tensor:
        index = self.depths.index(depth)
        layer: Any = self.layers[index]
        given: Tensor = layer.attention_weights(hidden_BND, context.visual[index])
        return given


class VisualKeyValue(nn.Module):
    """Visual keys and values for one host layer: norm and projections start as copies of the host's own.

    Frozen, these copies are the LLM's weights (first stage); trained, they are the images' own.
    """

    def __init__(self, host: nn.Module, rotary: Any, config: ModelConfig) -> None:
        super().__init__()
        attention: Any = host.self_attn
        self.head_dim: int = attention.head_dim
        self.grid = config.positions == "grid"
        self.norm = _copy(host, "input_layernorm")
        self.k_proj = _copy(attention, "k_proj")
        self.v_proj = _copy(attention, "v_proj")
        self.k_norm = _head_norm(attention, "k_norm", config.qk_norm)
        self.inverse_frequencies: Tensor
        self.register_buffer("inverse_frequencies", rotary.inv_freq.clone(), persistent=False)
        self.scaling: float = rotary.attention_scaling  # of rotated keys, other than 1 under yarn

    def forward(self, visual_BVD: Tensor, slots: Tensor | None = None) -> KeyValue:
        """Key and value, (B, K, V, h) each; keys rotated to their place in the image, counted from its slot."""
        normed = self.norm(visual_BVD)
        key = self.k_norm(_heads(self.k_proj(normed), self.head_dim))
        places = _visual_positions(key.shape[2], len(self.inverse_frequencies), self.grid, key.device)
        if slots is not None:
            places = places + (slots - SLOT)[:, None, None, None]
        # not views, which FSDP2 warns of: hooks hang on what a unit returns
        return self._rotate(key, places, self.scaling), _heads(self.v_proj(normed), self.head_dim).contiguous()

    def move(self, key_BKVh: Tensor, slots: Tensor | None) -> Tensor:
        """Keys of images at `slots`, of those that `forward` has made for SLOT."""
        return key_BKVh if slots is None else self._rotate(key_BKVh, (slots - SLOT)[:, None, None, None])

    def _rotate(self, key_BKVh: Tensor, places: Tensor, scaling: float = 1.0) -> Tensor:
        """`places`: the positions by which pairs of channels turn, (V, pairs) or (B, 1, V or 1, pairs or 1)."""
        angles = places * self.inverse_frequencies  # (h / 2,)
        cos, sin = (
            torch.cat([part, part], dim=-1).to(key_BKVh) for part in (scaling * angles.cos(), scaling * angles.sin())
        )
        first, second = key_BKVh.chunk(2, dim=-1)
        return key_BKVh * cos + torch.cat([-second, first], dim=-1) * sin


class JointAttention(Fusion):
    def __init__(self, hosts: Sequence[nn.Module], depths: Sequence[int], config: ModelConfig, rotary: Any) -> None:
        super().__init__(depths)
        self.grid = config.positions == "grid"
        self.layers.extend(VisualKeyValue(hosts[depth], rotary, config) for depth in depths)

    def prepare(
        self, text_BTD: Tensor, visual: Sequence[Tensor], has_image: Tensor | None, slots: Tensor | None = None
    ) -> tuple[Tensor, Context]:
        num_visual, length, device = visual[0].shape[1], text_BTD.shape[1], text_BTD.device
        extent = _side(num_visual) if self.grid else num_visual
        # text before the slot cannot see the image: a caption's first token, which the start token predicts, is
        # predicted blindly, as in the authors' code
        behind = torch.arange(length, device=device) >= _column(slots, device)
        sees_image = behind[:, :, None].expand(-1, length, num_visual)
        if has_image is not None:
            sees_image = sees_image & has_image[:, None, None]
        sees_text = causal(length, device).expand(len(sees_image), length, length)
        mask = torch.cat([sees_image, sees_text], dim=-1)[:, None]
        positions = _text_positions(length, extent, has_image, slots, device)
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

    def decode_context(self, context: Context, position_B1: Tensor, seen_BN: Tensor) -> Context:
        num_visual = context.visual[0].shape[1]
        extent = _side(num_visual) if self.grid else num_visual
        has_image = _has_image(context, seen_BN)
        mask = torch.cat([has_image.expand(-1, num_visual), seen_BN], dim=1)
        return replace(
            context,
            positions=position_B1 + extent * has_image,
            mask=mask[:, None, None],
            text_mask=seen_BN[:, None, None],
        )

    def attention_weights(
        self, depth: int, hidden_BND: Tensor, context: Context, host: nn.Module, rotary: tuple[Tensor, Tensor]
    ) -> Tensor:
        weights = _host_weights(host, rotary, *self.before_layer(depth, hidden_BND, context))
        return weights[..., : context.visual[0].shape[1]]


class Concat(Fusion):
    """Visual tokens run through every layer, causally, like words (the paper's SA, after LLaVA)."""

    def __init__(self) -> None:
        super().__init__(())

    def prepare(
        self, text_BTD: Tensor, visual: Sequence[Tensor], has_image: Tensor | None, slots: Tensor | None = None
    ) -> tuple[Tensor, Context]:
        num_visual, length, device = visual[0].shape[1], text_BTD.shape[1], text_BTD.device
        text = _text_positions(length, num_visual, has_image, slots, device)
        of_image = _column(slots, device) + torch.arange(num_visual, device=device)
        context = Context(visual, has_image, torch.empty(0), slots)
        positions = _merge(text, of_image.expand(len(text), num_visual), context)
        context = replace(context, positions=positions)
        hidden = _merge(text_BTD, visual[0].to(text_BTD), context)
        if has_image is None:
            return hidden, context
        mask = causal(hidden.shape[1], device) & _seen(torch.ones_like(text, dtype=torch.bool), context)[:, None]
        return hidden, replace(context, mask=mask[:, None])

    def finish(self, hidden_BND: Tensor, context: Context) -> Tensor:
        if context.has_image is None and context.slots is None:
            return hidden_BND[:, context.visual[0].shape[1] :]  # the start token's row is the last visual token's
        return hidden_BND.take_along_dim(self._rows(hidden_BND, context)[:, :, None], dim=1)

    def attention_weights(
        self, depth: int, hidden_BND: Tensor, context: Context, host: nn.Module, rotary: tuple[Tensor, Tensor]
    ) -> Tensor:
        seen = _host_weights(host, rotary, *self.before_layer(depth, hidden_BND, context))
        seen = seen.take_along_dim(self._rows(hidden_BND, context)[:, None, :, None], dim=2)
        places = _column(context.slots, seen.device) + torch.arange(context.visual[0].shape[1], device=seen.device)
        return seen.take_along_dim(places[:, None, None], dim=3)

    def decode_context(self, context: Context, position_B1: Tensor, seen_BN: Tensor) -> Context:
        length = context.positions.shape[1] - context.visual[0].shape[1]  # of the texts that `prepare` was given
        mask = torch.cat([_seen(seen_BN[:, :length], context), seen_BN[:, length:]], dim=1)
        shift = context.visual[0].shape[1] * _has_image(context, seen_BN)
        return replace(context, positions=position_B1 + shift, mask=mask[:, None, None])

    def _rows(self, hidden_BND: Tensor, context: Context) -> Tensor:
        """int (B or 1, T): where in the stream the next text token is predicted.

        At the text's own token, or where the image comes next at its last visual token, as in LLaVA.
        """
        num_visual, device = context.visual[0].shape[1], hidden_BND.device
        text = torch.arange(hidden_BND.shape[1] - num_visual, device=device)[None]
        is_seen = 1 if context.has_image is None else context.has_image[:, None].long()
        return text + num_visual * (text >= _column(context.slots, device) - is_seen)


def _merge(text: Tensor, visual: Tensor, context: Context) -> Tensor:
    """(B, T, ...) and (B, V, ...) in the stream's order, (B, N, ...): each image at its text's slot."""
    if context.slots is None:
        return torch.cat([text[:, :SLOT], visual, text[:, SLOT:]], dim=1)
    length, num_visual = text.shape[1], visual.shape[1]
    place = torch.arange(length + num_visual, device=text.device)
    begin = context.slots[:, None]
    behind = torch.where(place < begin + num_visual, length + place - begin, place - num_visual)
    order = torch.where(place < begin, place, behind)  # (B, N), into text and visual one after the other
    both = torch.cat([text.expand(len(order), *text.shape[1:]), visual], dim=1)
    return both.take_along_dim(order.view(*order.shape, *[1] * (both.ndim - 2)), dim=1)


def _seen(text_BT: Tensor, context: Context) -> Tensor:
    """bool (B, N): which of the stream's keys count, given which of the text's do."""
    visual = _has_image(context, text_BT).expand(-1, context.visual[0].shape[1])
    return _merge(text_BT.expand(len(visual), -1), visual, context)


def _has_image(context: Context, like_BN: Tensor) -> Tensor:
    """bool (B, 1): which texts have an image."""
    return torch.ones_like(like_BN[:, :1]) if context.has_image is None else context.has_image[:, None]


def _heads(flat: Tensor, head_dim: int) -> Tensor:
    """(B, N, heads * h) -> (B, heads, N, h)."""
    return flat.view(*flat.shape[:-1], -1, head_dim).transpose(1, 2)


def _host_weights(
    host: nn.Module, rotary: tuple[Tensor, Tensor], hidden_BND: Tensor, attention: dict[str, Any]
) -> Tensor:
    """(B, heads, queries, keys): the attention weights of an LLM layer, as it computes them."""
    recorded: list[Tensor] = []
    host(hidden_BND, position_embeddings=rotary, recorded=recorded, **attention)
    return recorded[0]


def _copy(host: nn.Module, name: str) -> nn.Module:
    return copy.deepcopy(host.get_submodule(name))


def _head_norm(attention: Any, name: str, wanted: bool) -> nn.Module:
    """The host's per-head norm where it has one (Qwen3); a new RMSNorm where wanted; else nothing."""
    if hasattr(attention, name):
        return _copy(attention, name)
    weight = attention.k_proj.weight
    return nn.RMSNorm(attention.head_dim, eps=1e-6, device=weight.device) if wanted else nn.Identity()


def _side(num_visual: int) -> int:
    """Rows, and columns, of a square image's patches."""
    return math.isqrt(num_visual)


def _column(slots: Tensor | None, device: torch.device) -> Tensor:
    """int (B or 1, 1)."""
    return torch.tensor([[SLOT]], device=device) if slots is None else slots[:, None]


def _text_positions(
    length: int, extent: int, has_image: Tensor | None, slots: Tensor | None, device: torch.device
) -> Tensor:
    """(B or 1, T): text behind the slot is moved on by the image's extent."""
    steps = torch.arange(length, device=device)[None]
    shift = extent * (steps >= _column(slots, device))
    return steps + (shift if has_image is None else shift * has_image[:, None])


def _visual_positions(num_visual: int, num_pairs: int, grid: bool, device: torch.device) -> Tensor:
    """(V, rotary pairs): the position by which each pair of channels turns.

    On a grid three quarters of the pairs turn alternately by row and column, the rest by a constant, half
    the image's side; on a line all turn by the index. Counted from the slot.
    """
    index = torch.arange(num_visual, device=device)
    if not grid:
        return SLOT + index[:, None].expand(num_visual, num_pairs)
    side = _side(num_visual)
    pair = torch.arange(num_pairs, device=device)
    row_or_column = torch.where(pair % 2 == 0, (index // side)[:, None], (index % side)[:, None])
    on_grid = pair < num_pairs - num_pairs // 4
    return SLOT + torch.where(on_grid, row_or_column, side // 2)
