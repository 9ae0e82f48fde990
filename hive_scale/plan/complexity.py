"""The paper's complexity formulas (equations 4 and 5), in multiply-adds up to constant factors.

T text tokens, V visual tokens, N = T + V; d is the LLM's width, L its number of layers, s the number of layers with
cross-attention. The paper defines s only after (3). In (5) we keep the LLM's depth L, as in (4).
"""

from __future__ import annotations


def self_attention_llm(num_text: float, num_visual: float, width: float, layers: float) -> float:
    """Equation (4), an LLM over all tokens: O(L (N^2 d / 2 + N d^2))."""
    tokens = num_text + num_visual
    return layers * (tokens**2 * width / 2 + tokens * width**2)


def cross_attention_llm(num_text: float, num_visual: float, width: float, layers: float, selected: float) -> float:
    """Equation (5), the LLM with HIVE: O(s V T d + L (T^2 d / 2 + T d^2)), without the keys and values of visual
    tokens.
    """
    text = num_text**2 * width / 2 + num_text * width**2
    return selected * num_visual * num_text * width + layers * text
