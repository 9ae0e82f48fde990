"""LLM families: the parts of a decoder-only transformers LLM that Hive uses, since it runs the layers itself.

Shapes: B samples, N tokens in the stream, D LLM width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, PretrainedConfig

from hive_scale.registry import HOSTS

Rotary = tuple[Tensor, Tensor]  # cosines and sines, (B or 1, N, head width) each
LAYER_TYPES = {"full_attention", "sliding_attention"}  # `attention.attend` computes these


@dataclass(frozen=True)
class AttentionParts:
    """What the attention of an LLM layer consists of; fusions start their own modules as copies of these.

    The layer adds ``out_norm(o_proj(mixed))`` to its input H. Queries are ``q_norm(split_heads(q_proj(norm(H))))``,
    keys likewise, values ``split_heads(v_proj(norm(H)))``. `scaling` and `softcap` are as in
    `attention.softmax_scores`.
    """

    norm: nn.Module
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module
    head_dim: int
    scaling: float
    q_norm: nn.Module | None = None  # of each head; None if the layer has no norm of queries
    k_norm: nn.Module | None = None
    out_norm: nn.Module | None = None
    softcap: float | None = None


@HOSTS.register("llama")
@HOSTS.register("mistral")
@HOSTS.register("qwen2")
@HOSTS.register("qwen3")
class Host:
    """A causal LM with Llama's structure. A registered subclass for another family overrides what differs.

    A layer is called as ``layer(hidden, position_embeddings=..., attention_mask=..., **more)``, and must pass unknown
    arguments on to its attention function, with the options of its own that `attention.attend` knows.
    """

    # fields of its configs that transformers' LLaVA ignores -> the values with which that changes nothing
    llava_lacks: ClassVar[Mapping[str, Any]] = {}

    def check(self, config: PretrainedConfig) -> None:
        """Raises ValueError for a config of this family that Hive cannot run correctly."""
        kinds, window = set(getattr(config, "layer_types", None) or ()), getattr(config, "sliding_window", None)
        if unknown := kinds - LAYER_TYPES:
            raise ValueError(
                f"layer_types has {', '.join(sorted(unknown))}: layers may be of {' or '.join(sorted(LAYER_TYPES))}"
            )
        if ("sliding_attention" in kinds) if window is None else window < 1:
            raise ValueError(
                f"sliding_window is {window}: give the number of tokens that a token sees, itself included"
            )
        if getattr(config, "use_bidirectional_attention", False):
            raise ValueError(
                "use_bidirectional_attention is on: a text is predicted from left to right, set it to false"
            )
        heads, shared = config.num_attention_heads, config.num_key_value_heads
        if not 0 < shared <= heads or heads % shared:
            raise ValueError(f"num_key_value_heads {shared} does not divide the {heads} attention heads")

    def max_positions(self, config: PretrainedConfig) -> int | None:
        """Number of positions beyond which all rotary frequencies change; None if they never do.

        Longer streams cannot be run correctly: keys in a cache, and visual keys, keep the first frequencies.
        """
        given: Any = getattr(config, "rope_parameters", None) or {}
        ropes = [given] if "rope_type" in given else [one for one in given.values() if one]  # one, or by type of layer
        limits = [one["original_max_position_embeddings"] for one in ropes if one["rope_type"] == "longrope"]
        limits += [config.max_position_embeddings for one in ropes if one["rope_type"] == "dynamic"]
        return min(limits, default=None)

    def longest(self, config: PretrainedConfig) -> int:
        """Most tokens of a prompt and its answer together."""
        most: int = config.max_position_embeddings
        return min(most, self.max_positions(config) or most)

    def layers(self, llm: Any) -> Sequence[nn.Module]:
        """The LLM's layers, in the order in which they run."""
        layers: Sequence[nn.Module] = llm.model.layers
        return layers

    def attention_parts(self, layer: Any) -> AttentionParts:
        """The parts of the attention of one of the LLM's layers, which fusions copy."""
        attention = layer.self_attn
        return AttentionParts(
            norm=layer.input_layernorm,
            q_proj=attention.q_proj,
            k_proj=attention.k_proj,
            v_proj=attention.v_proj,
            o_proj=attention.o_proj,
            head_dim=attention.head_dim,
            scaling=attention.scaling,
            q_norm=getattr(attention, "q_norm", None),
            k_norm=getattr(attention, "k_norm", None),
        )

    def embed(self, llm: Any, tokens: Tensor) -> Tensor:
        """Embed token ids (B, T) as hidden states (B, T, D), the first layer's input."""
        hidden: Tensor = llm.model.embed_tokens(tokens)
        return hidden

    def positions(self, llm: Any, hidden_BND: Tensor, positions_BN: Tensor) -> Sequence[Rotary]:
        """The ``position_embeddings`` argument of each layer, from token positions (B or 1, N)."""
        rotary: Rotary = llm.model.rotary_emb(hidden_BND, positions_BN)
        return [rotary] * len(self.layers(llm))

    def rotary(self, llm: Any, depth: int) -> tuple[Tensor, float]:
        """Inverse frequencies of layer `depth`'s rotary positions, and the factor on rotated keys.

        There is one frequency for each rotated pair of a head's channels. Channels behind these pairs are not rotated.
        """
        rotary = llm.model.rotary_emb
        return rotary.inv_freq, rotary.attention_scaling

    def logits(self, llm: Any, hidden: Tensor) -> Tensor:
        """Last hidden states (..., D) to (..., vocabulary): final norm and head."""
        scores: Tensor = llm.lm_head(llm.model.norm(hidden))
        return scores


@HOSTS.register("smollm3")
class SmolLM3(Host):
    """Llama, with some layers without rotary positions."""

    def check(self, config: Any) -> None:
        super().check(config)
        if "sliding_attention" in config.layer_types and not config.use_sliding_window:
            raise ValueError("layer_types has sliding_attention and use_sliding_window is false: make them agree")

    def rotary(self, llm: Any, depth: int) -> tuple[Tensor, float]:
        frequencies, scaling = super().rotary(llm, depth)
        if llm.config.no_rope_layers[depth]:
            return frequencies, scaling
        return torch.zeros_like(frequencies), 1.0  # keys stay as they are


@HOSTS.register("olmo2")
class Olmo2(Host):
    """No norm before a layer's attention, one behind it, and norms of all heads' queries, and keys, together."""

    def attention_parts(self, layer: Any) -> AttentionParts:
        attention = layer.self_attn
        return AttentionParts(
            norm=nn.Identity(),
            q_proj=nn.Sequential(attention.q_proj, attention.q_norm),
            k_proj=nn.Sequential(attention.k_proj, attention.k_norm),
            v_proj=attention.v_proj,
            o_proj=attention.o_proj,
            head_dim=attention.head_dim,
            scaling=attention.scaling,
            q_norm=nn.Identity(),
            k_norm=nn.Identity(),
            out_norm=layer.post_attention_layernorm,
        )


@HOSTS.register("granite")
class Granite(Host):
    """Llama, with factors on embeddings, on what layers add, and on logits."""

    llava_lacks: ClassVar[Mapping[str, Any]] = {"embedding_multiplier": 1, "logits_scaling": 1}

    def attention_parts(self, layer: Any) -> AttentionParts:
        parts, factor = super().attention_parts(layer), layer.residual_multiplier
        mixer: Any = parts.o_proj
        return replace(
            parts, o_proj=_linear(mixer.weight * factor, None if mixer.bias is None else mixer.bias * factor)
        )

    def embed(self, llm: Any, tokens: Tensor) -> Tensor:
        hidden: Tensor = super().embed(llm, tokens) * llm.config.embedding_multiplier
        return hidden

    def logits(self, llm: Any, hidden: Tensor) -> Tensor:
        scores: Tensor = super().logits(llm, hidden) / llm.config.logits_scaling
        return scores


@HOSTS.register("phi3")
class Phi3(Host):
    """One projection for queries, keys and values; rotary positions on a part of each head."""

    def attention_parts(self, layer: Any) -> AttentionParts:
        attention, config = layer.self_attn, layer.self_attn.config
        heads = config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads
        rows = attention.qkv_proj.weight.split([number * attention.head_dim for number in heads])
        query, key, value = map(_linear, rows)
        return AttentionParts(
            norm=layer.input_layernorm,
            q_proj=query,
            k_proj=key,
            v_proj=value,
            o_proj=attention.o_proj,
            head_dim=attention.head_dim,
            scaling=attention.scaling,
        )


class Gemma(Host):
    """Norms before and behind each layer's attention, and a bound on logits."""

    llava_lacks: ClassVar[Mapping[str, Any]] = {"final_logit_softcapping": None}

    def attention_parts(self, layer: Any) -> AttentionParts:
        return replace(super().attention_parts(layer), out_norm=layer.post_attention_layernorm)

    def logits(self, llm: Any, hidden: Tensor) -> Tensor:
        scores, cap = super().logits(llm, hidden), llm.config.final_logit_softcapping
        return scores if cap is None else cap * torch.tanh(scores / cap)


@HOSTS.register("gemma2")
class Gemma2(Gemma):
    """Gemma 2 also bounds the scores of its attention."""

    def attention_parts(self, layer: Any) -> AttentionParts:
        return replace(super().attention_parts(layer), softcap=layer.self_attn.attn_logit_softcapping)


@HOSTS.register("gemma3_text")
class Gemma3(Gemma):
    """Gemma 3 has rotary positions of their own in layers with a sliding window."""

    def positions(self, llm: Any, hidden_BND: Tensor, positions_BN: Tensor) -> Sequence[Rotary]:
        kinds = llm.config.layer_types
        made = {kind: llm.model.rotary_emb(hidden_BND, positions_BN, kind) for kind in dict.fromkeys(kinds)}
        return [made[kind] for kind in kinds]

    def rotary(self, llm: Any, depth: int) -> tuple[Tensor, float]:
        rotary, kind = llm.model.rotary_emb, llm.config.layer_types[depth]
        return getattr(rotary, f"{kind}_inv_freq"), getattr(rotary, f"{kind}_attention_scaling")


def _linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """A linear layer with a copy of `weight` (out, in)."""
    made = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    made.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().clone())
    return made


def _mobilellm(said: Mapping[str, Any]) -> PretrainedConfig:
    """MobileLLM is Llama; it shares its embeddings by a key of its own. Raises ValueError if it also shares layers."""
    if said.get("layer_sharing"):
        raise ValueError("model.language: a MobileLLM-LS shares layers: use the MobileLLM of the same size without LS")
    known = LlamaConfig().to_dict().keys() | {"rope_theta", "rope_scaling"}
    fields = {name: said[name] for name in known & said.keys() if name not in ("model_type", "transformers_version")}
    return LlamaConfig(**fields | {"tie_word_embeddings": bool(said.get("share_embedding", True))})


# Types of published configs that transformers does not know, but whose models are of a family that it knows.
ALIASES: Mapping[str, Callable[[Mapping[str, Any]], PretrainedConfig]] = {"mobilellm": _mobilellm}


def host_of(llm: Any) -> Host:
    """The family of an LLM. Raises ValueError for an unregistered one."""
    made: Host = HOSTS[llm.config.model_type]()
    return made
