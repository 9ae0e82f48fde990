"""The paper's complexity formulas (equations 4 and 5), in multiply-adds up to constants.

T text tokens, V visual tokens, N = T + V, d the LLM's width, L its layers, s of them with cross-attention. The
paper defines s after (3) only; (5) is read here with the LLM's depth kept, as (4) has it.
"""

from __future__ import annotations


def self_attention_llm(num_text: float, num_visual: float, width: float, layers: float) -> float:
    """(4), the LLM over all tokens: O(L (N^2 d / 2 + N d^2))."""
    tokens = num_text + num_visual
    return layers * (tokens**2 * width / 2 + tokens * width**2)


def cross_attention_llm(num_text: float, num_visual: float, width: float, layers: float, selected: float) -> float:
    """(5), the LLM with HIVE: O(s V T d + L (T^2 d / 2 + T d^2)). Visual keys and values are left out of it."""
    text = num_text**2 * width / 2 + num_text * width**2
    return selected * num_visual * num_text * width + layers * text
