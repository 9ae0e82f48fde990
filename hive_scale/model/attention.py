"""Attention function of the LLM's layers, registered through transformers' public `AttentionInterface`.

A layer passes keyword arguments that it does not know on to its attention function. Visual keys and values and a KV
cache reach `attend` in this way, whatever the layer itself calls its cache, which differs between transformers
releases.

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
    num_beside: int = 0,
    text_cache: Cache | None = None,
    is_first: bool = False,
    recorded: list[Tensor] | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' `sdpa` over visual keys and values, cached ones, and the layer's own.

    Args:
        module: the layer's attention module.
        query: (B, heads, N, h), rotated.
        key: (B, K, N, h), rotated; `value` likewise.
        attention_mask: bool, (B or 1, 1, N, all keys), over visual, cached and new keys in that order; None for causal
            attention.
        visual: keys and values that precede the text's.
        num_beside: number of visual keys that the cache already holds before the text's, if `visual` is None.
        text_cache: KV cache of earlier calls, to which those of this call are added, `visual` included.
        is_first: True for the prefill, with an empty cache. Attention is then over this call's keys and values only.
            (A static cache would return its unused length with them; otherwise `attention_mask` covers that length.)
        recorded: list to which attention weights (B, heads, N, all keys), float32, are appended; the fused kernels do
            not return any.
        sliding_window: the layer's; a query sees this many of the stream's keys, itself included (see `windowed`).
        softcap: the layer's bound on scores, see `softmax_scores`. No fused kernel has it, so all scores are kept.
        options: further arguments of the layer, of which ``scaling`` and ``dropout`` are used.

    Returns:
        (B, N, heads, h) and None, as transformers requires of an attention function.
    """
    if visual is not None:
        key, value = torch.cat([visual[0], key], dim=2), torch.cat([visual[1], value], dim=2)
        num_beside = visual[0].shape[2]
    if text_cache is not None:
        # under autocast values are half precision, but rotation leaves keys in float32: store both as half
        all_so_far = text_cache.update(key.to(value.dtype), value, module.layer_idx)
        key, value = (key, value) if is_first else all_so_far
    if sliding_window is not None and key.shape[2] - num_beside > sliding_window:  # else it holds every key
        mask = causal(query.shape[2], query.device) if attention_mask is None else attention_mask
        attention_mask = windowed(mask, sliding_window, num_beside)
    dropout, scale = options.get("dropout", 0.0), options.get("scaling")
    if recorded is not None:
        mask = causal(query.shape[2], query.device) if attention_mask is None else attention_mask
        recorded.append(softmax_scores(query, key, mask, scale, softcap))
    if softcap is not None or (attention_mask is None and not _takes_groups(query, key)):
        # without a mask, transformers' function gives torch grouped key-value heads, which this kernel lacks
        # `and` ends in a plain bool also in torch.compile, which breaks the graph at the symbolic one that bool() keeps
        is_causal = query.shape[2] > 1 and attention_mask is None
        mixed = scaled_dot_product(query, key, value, dropout, scale, is_causal, attention_mask, softcap)
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
    mask: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention of (B, heads, N, h) over (B, K, M, h); K divides the number of heads.

    A fused kernel computes it, unless there is a `softcap` (see `softmax_scores`). `mask` is as in `softmax_scores`.
    On GPUs only the half-precision kernels accept grouped key-value heads. In float32 torch would fall back to one
    that materialises all (B, heads, N, M) scores, so keys and values are repeated instead.
    """
    if softcap is not None:
        weights = softmax_scores(
            query, key, causal(query.shape[2], query.device) if is_causal else mask, scale, softcap
        )
        weights = F.dropout(weights, dropout).to(value.dtype)
        return weights @ value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
    grouped = query.shape[1] != key.shape[1]
    if grouped and not _takes_groups(query, key):
        key, value = (one.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for one in (key, value))
        grouped = False
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=is_causal, scale=scale, enable_gqa=grouped
    )


def _takes_groups(query: Tensor, key: Tensor) -> bool:
    """True if a fused kernel accepts the heads as they are: half precision, or as many key as query heads."""
    halved = query.dtype.itemsize == 2 or torch.is_autocast_enabled(query.device.type)
    return halved or query.shape[1] == key.shape[1]


def softmax_scores(
    query: Tensor, key: Tensor, mask: Tensor | None, scale: float | None = None, softcap: float | None = None
) -> Tensor:
    """Attention weights (B, heads, queries, keys), float32; `mask` is bool, True where attention is allowed.

    Scores are multiplied by `scale`, by default 1 / sqrt(h). A `softcap` c then makes them c tanh(score / c).
    """
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = (query @ key.transpose(2, 3)).float() * (query.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return (scores if mask is None else scores.masked_fill(~mask, -math.inf)).softmax(-1)


def causal(length: int, device: torch.device) -> Tensor:
    """bool (length, length): query i may attend to keys 0 to i."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


def windowed(mask: Tensor, window: int, num_beside: int) -> Tensor:
    """`mask` (..., queries, keys) under a sliding window: each query keeps the last `window` keys that it may see.

    Keys are counted and not their places, since a padded text has gaps. The first `num_beside` keys, an image's beside
    the stream, stay: no text is between them and the query.
    """
    beside, stream = mask[..., :num_beside], mask[..., num_beside:]
    later = stream.flip(-1).cumsum(-1, dtype=torch.int32).flip(-1)  # keys seen from this one on, itself included
    return torch.cat([beside, stream & (later <= window)], dim=-1)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, _masks["sdpa"])  # used if the whole LLM is called, as by `LLM.generate`
