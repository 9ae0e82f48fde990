"""LLM families: the parts of a decoder-only transformers LLM that Hive uses, since it runs the layers itself.

Shapes: B samples, N tokens in the stream, D LLM width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import LlamaConfig, PretrainedConfig

from hive_scale.registry import HOSTS

Rotary = tuple[Tensor, Tensor]  # cosines and sines, (B or 1, N, head width) each


@HOSTS.register("llama")
@HOSTS.register("qwen2")
@HOSTS.register("qwen3")
class Host:
    """A causal LM with Llama's structure. A registered subclass for another family overrides what differs.

    A layer is called as ``layer(hidden, position_embeddings=..., attention_mask=..., **more)``, and must pass unknown
    arguments on to its attention function. It has ``self_attn`` with ``q_proj``, ``k_proj``, ``v_proj``, ``o_proj`` and
    ``head_dim``, and ``input_layernorm``: fusions copy these modules.
    """

    def check(self, config: PretrainedConfig) -> None:
        """Raises ValueError for a config of this family that Hive cannot run correctly."""
        if set(getattr(config, "layer_types", None) or {"full_attention"}) != {"full_attention"}:
            raise ValueError("sliding-window layers are not supported: use a full-attention LLM")
        heads, shared = config.num_attention_heads, config.num_key_value_heads
        if not 0 < shared <= heads or heads % shared:
            raise ValueError(f"num_key_value_heads {shared} does not divide the {heads} attention heads")

    def layers(self, llm: Any) -> Sequence[nn.Module]:
        """The LLM's layers, in the order in which they run."""
        layers: Sequence[nn.Module] = llm.model.layers
        return layers

    def embed(self, llm: Any, tokens: Tensor) -> Tensor:
        """Embed token ids (B, T) as hidden states (B, T, D), the first layer's input."""
        hidden: Tensor = llm.model.embed_tokens(tokens)
        return hidden

    def positions(self, llm: Any, hidden_BND: Tensor, positions_BN: Tensor) -> Sequence[Rotary]:
        """The ``position_embeddings`` argument of each layer, from token positions (B or 1, N)."""
        rotary: Rotary = llm.model.rotary_emb(hidden_BND, positions_BN)
        return [rotary] * len(self.layers(llm))

    def rotary(self, llm: Any, depth: int) -> tuple[Tensor, float]:
        """Inverse frequencies (head width / 2,) of layer `depth`'s rotary positions, and the factor on rotated keys."""
        rotary = llm.model.rotary_emb
        return rotary.inv_freq, rotary.attention_scaling

    def logits(self, llm: Any, hidden: Tensor) -> Tensor:
        """Last hidden states (..., D) to (..., vocabulary): final norm and head."""
        scores: Tensor = llm.lm_head(llm.model.norm(hidden))
        return scores


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
