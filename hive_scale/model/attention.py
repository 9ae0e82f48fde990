"""The LLM's own attention, extended through transformers' public `AttentionInterface`.

A keyword argument that an LLM layer does not know reaches its attention function. So visual keys and values and a
cache come to `attend` whatever the layer itself calls its cache, which differs between releases of transformers.

Shapes: B samples, N query tokens, M keys so far, V visual tokens, K key-value heads, h head width.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, Cache

NAME = "hive"  # attn_implementation of every LLM that Hive runs
KeyValue = tuple[Tensor, Tensor]  # (B, K, V, h) each
_functions, _masks = cast(Any, AttentionInterface)(), cast(Any, AttentionMaskInterface)()


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    visual: KeyValue | None = None,
    text_cache: Cache | None = None,
    is_first: bool = False,
    recorded: list[Tensor] | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' `sdpa` over the layer's keys and values and what precedes them.

    Args:
        module: the layer's attention.
        query: (B, heads, N, h), rotated.
        key: (B, K, N, h), rotated; `value` likewise.
        attention_mask: bool or additive, (B or 1, 1, N, all keys), over visual, cached and new keys in that order;
            None for causal attention.
        visual: keys and values that come before the text's.
        text_cache: keys and values of earlier calls, to which those of this one are added, `visual` included.
        is_first: there are no earlier calls. Then attention is over the keys and values of this one alone, though a
            cache of fixed length returns its room for later ones with them; `attention_mask` is as wide as that else.
        recorded: takes the attention weights (B, heads, N, all keys), float32, which the fused kernels do not return.

    Returns:
        (B, N, heads, h) and None, as transformers asks of an attention function.
    """
    if visual is not None:
        key, value = torch.cat([visual[0], key], dim=2), torch.cat([visual[1], value], dim=2)
    if text_cache is not None:
        # autocast makes values of half precision, and rotation leaves keys in full: the kernel takes both in half
        all_so_far = text_cache.update(key.to(value.dtype), value, module.layer_idx)
        key, value = (key, value) if is_first else all_so_far
    if recorded is not None:
        mask = causal(query.shape[2], query.device) if attention_mask is None else attention_mask
        recorded.append(softmax_scores(query, key, mask))
    if attention_mask is None and not _takes_groups(query, key):
        # transformers' leaves fewer heads of keys to torch where there is no mask
        dropout, scale = options.get("dropout", 0.0), options.get("scaling")
        mixed = scaled_dot_product(query, key, value, dropout, scale, is_causal=query.shape[2] > 1)
        return mixed.transpose(1, 2).contiguous(), None
    made: tuple[Tensor, None] = _functions["sdpa"](module, query, key, value, attention_mask, **options)
    return made


def scaled_dot_product(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout: float = 0.0,
    scale: float | None = None,
    is_causal: bool = False,
) -> Tensor:
    """Attention of (B, heads, N, h) over (B, K, M, h), where K divides the heads, by a kernel that keeps no scores.

    Of GPUs' kernels only those in half precision take fewer heads of keys than of queries. In float32 torch would
    fall back to one that makes all (B, heads, N, M) scores; there keys and values are repeated instead.
    """
    grouped = query.shape[1] != key.shape[1]
    if grouped and not _takes_groups(query, key):
        key, value = (one.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for one in (key, value))
        grouped = False
    return F.scaled_dot_product_attention(
        query, key, value, dropout_p=dropout, is_causal=is_causal, scale=scale, enable_gqa=grouped
    )


def _takes_groups(query: Tensor, key: Tensor) -> bool:
    """Whether a fused kernel takes the heads as they are."""
    halved = query.dtype.itemsize == 2 or torch.is_autocast_enabled(query.device.type)
    return halved or query.shape[1] == key.shape[1]


def softmax_scores(query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
    """Attention weights (B, heads, queries, keys), float32; `mask` is bool, True where attention is allowed."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = (query @ key.transpose(2, 3)).float() / math.sqrt(query.shape[-1])
    return (scores if mask is None else scores.masked_fill(~mask, -math.inf)).softmax(-1)


def causal(length: int, device: torch.device) -> Tensor:
    """bool (length, length): query i may attend to keys 0 to i."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, _masks["sdpa"])  # where the whole LLM is called, as by generate
