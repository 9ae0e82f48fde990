"""KV cache of texts and their images, which also holds what is needed to go on with the texts.

Shapes: B texts, N keys of a text so far (padding included), Q new tokens, M = N + Q.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicLayer, StaticLayer

from hive_scale.model.fusion import Context, Fusion


class HiveCache(Cache):
    """transformers' `Cache`, with the image of each text.

    Keys and values of images are computed once. They are repeated, selected, and reordered for beams with the text's.
    Texts may be padded anywhere: keys that do not count are masked, and positions count those that do.
    """

    context: Context  # of the texts as they began
    seen: Tensor  # bool (B, N), True for the text's keys that count; with `room`, places of tokens to come are False

    def __init__(self, fusion: Fusion, context: Context, tokens_BT: Tensor, num_layers: int, room: int | None) -> None:
        """An empty cache for texts that begin with `tokens_BT`, bool, True for tokens and False for padding.

        With `room`, memory for that many further tokens is allocated at once. Otherwise the cache grows by copies.
        """
        growing: Any = DynamicLayer
        if room is None:
            layers: list[Any] = [growing() for _ in range(num_layers)]
        else:
            length = context.positions.shape[1] + room
            beside = [fusion.num_beside(depth, context) for depth in range(num_layers)]
            layers = [StaticLayer(max_cache_len=number + length) for number in beside]
        super().__init__(layers=layers)
        self._fusion, self._room = fusion, room
        self.context = replace(context, mask=None, text_mask=None)  # masks are made anew for each step
        self.seen = torch.nn.functional.pad(tokens_BT, (0, room or 0))
        self.width, self.made = tokens_BT.shape[1], 0  # tokens of the beginning, and tokens that came later
        self._columns: int = tokens_BT.shape[1]
        self.is_first = True  # True while the beginning runs

    def extend(self, tokens_BQ: Tensor) -> Context:
        """Make place for Q more tokens, and return the context to run them in.

        `tokens_BQ` is bool, False for padding. Raises ValueError beyond the cache's `room`.
        """
        count, device = tokens_BQ.shape[1], tokens_BQ.device
        position = self.seen.sum(1, keepdim=True)
        begin = self.width + self.made
        if self._room is None:
            self.seen = torch.cat([self.seen, tokens_BQ], dim=1)
        elif self.made + count > self._room:
            raise ValueError(f"the decoder has room for {self._room} tokens: begin it with more")
        else:
            self.seen[:, begin : begin + count] = tokens_BQ
        allowed = self.seen[:, None]
        if count > 1:  # causal among the new tokens
            position = position + (tokens_BQ.cumsum(1) - 1).clamp(min=0)
            places = torch.arange(self.seen.shape[1], device=device)
            allowed = allowed & (places <= (begin + torch.arange(count, device=device))[:, None])
        self.made += count
        self._columns += count
        self.is_first = False
        return self._fusion.decode_context(self.context, position, allowed)

    def for_layer(self, depth: int, given: dict[str, Any], context: Context) -> dict[str, Any]:
        """The keyword arguments of layer `depth`'s attention with this cache; `given` are those without."""
        given = {**given, "text_cache": self, "is_first": self.is_first}
        if not self.is_first:
            given.pop("visual", None)  # the cache already holds them, before the text's
            given["num_beside"] = self._fusion.num_beside(depth, context)
        return given

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of columns of the token ids given so far, the image's placeholder and padding included."""
        return self._columns

    def count_columns(self, number: int) -> None:
        """Set the number of columns that the beginning had, if that is not the number of its tokens."""
        self._columns = number

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens of each text: -n forgets n, and a positive number is the length to keep.

        Raises ValueError if a text would lose its beginning.
        """
        number = -tokens_to_remove if tokens_to_remove <= 0 else max(0, self._columns - tokens_to_remove)
        if number and bool((self.seen.sum(1) <= number).any()):
            raise ValueError(f"the cache cannot forget {number} tokens: a text would be empty; begin it anew")
        behind = min(number, self.made) if self._room is None else 0
        if behind:
            super().crop(-behind)
            self.seen = self.seen[:, :-behind]
            self.made -= behind
        if rest := number - behind:  # tokens of the beginning stay where they are, masked
            later = self.seen.flip(1).cumsum(1).flip(1)  # tokens from this one on
            self.seen = self.seen & (later > rest)
        self._columns -= number

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Text b becomes what text ``beam_idx[b]`` was."""
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self._take(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the texts at `indices`, in that order."""
        super().batch_select_indices(indices)
        self._take(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each text `repeats` times, one copy behind the other."""
        super().batch_repeat_interleave(repeats)
        self._take(torch.arange(len(self.seen), device=self.seen.device).repeat_interleave(repeats))

    def _take(self, index: Tensor) -> None:
        index, number = index.to(self.seen.device), len(self.seen)

        def rows(one: Tensor | None) -> Any:
            return one if one is None or len(one) != number else one[index]

        old = self.context
        self.context = replace(
            old,
            visual=[rows(one) for one in old.visual],
            has_image=rows(old.has_image),
            positions=rows(old.positions),
            slots=rows(old.slots),
            memory=None if old.memory is None else [(rows(key), rows(value)) for key, value in old.memory],
        )
        self.seen = rows(self.seen)

    def reset(self) -> None:
        """Refused: a cache belongs to its texts."""
        raise ValueError("a cache of texts and images cannot be emptied: begin with none")
