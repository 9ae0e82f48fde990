"""The LLM's side: what Hive asks of a decoder-only LLM of transformers, whose layers it runs itself.

Shapes: B samples, N tokens in the stream, D LLM width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig

from hive_scale.registry import HOSTS

Rotary = tuple[Tensor, Tensor]  # cosines and sines, (B or 1, N, head width) each


@HOSTS.register("llama")
@HOSTS.register("qwen2")
@HOSTS.register("qwen3")
class Host:
    """Of a causal LM of llama's shape. An entry for another family overrides what differs.

    A layer is called as ``layer(hidden, position_embeddings=..., attention_mask=..., **more)`` and hands what it does
    not know on to its attention function; it has ``self_attn`` with ``q_proj``, ``k_proj``, ``v_proj``, ``o_proj`` and
    ``head_dim``, and ``input_layernorm``, of which fusions make their copies.
    """

    def check(self, config: PretrainedConfig) -> None:
        """Raises ValueError for a config of this family that Hive would not run as it is meant."""
        if set(getattr(config, "layer_types", None) or {"full_attention"}) != {"full_attention"}:
            raise ValueError("sliding-window layers are not supported: use a full-attention LLM")
        heads, shared = config.num_attention_heads, config.num_key_value_heads
        if not 0 < shared <= heads or heads % shared:
            raise ValueError(f"num_key_value_heads {shared} does not divide the {heads} attention heads")

    def layers(self, llm: Any) -> Sequence[nn.Module]:
        """In the order in which they run."""
        layers: Sequence[nn.Module] = llm.model.layers
        return layers

    def embed(self, llm: Any, tokens: Tensor) -> Tensor:
        """int (B, T) to the hidden states (B, T, D) that the first layer takes."""
        hidden: Tensor = llm.model.embed_tokens(tokens)
        return hidden

    def positions(self, llm: Any, hidden_BND: Tensor, positions_BN: Tensor) -> Sequence[Rotary]:
        """What each layer takes as ``position_embeddings``."""
        rotary: Rotary = llm.model.rotary_emb(hidden_BND, positions_BN)
        return [rotary] * len(self.layers(llm))

    def rotary(self, llm: Any, depth: int) -> tuple[Tensor, float]:
        """Inverse frequencies (head width / 2,) by which layer `depth` turns its keys, and what it scales them by."""
        rotary = llm.model.rotary_emb
        return rotary.inv_freq, rotary.attention_scaling

    def logits(self, llm: Any, hidden: Tensor) -> Tensor:
        """Last hidden states (..., D) to (..., vocabulary): final norm and head."""
        scores: Tensor = llm.lm_head(llm.model.norm(hidden))
        return scores


def host_of(llm: Any) -> Host:
    """The entry of an LLM's family."""
    made: Host = HOSTS[llm.config.model_type]()
    return made
