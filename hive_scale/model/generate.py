"""Greedy batched generation with a KV cache: one encoder pass per image, one forward per new token.

Shapes: P images, B texts of up to T tokens, D LLM width.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from itertools import takewhile

import torch
from torch import Tensor
from transformers import Cache, StaticLayer

from hive_scale.model.fusion import Context
from hive_scale.model.hive import Hive

LOOK = 8  # new tokens between checks whether all texts have ended; each check makes the host wait for the device


class Decoder:
    """Decodes texts padded on the right. Each call returns the logits (B, vocabulary) of the next token."""

    def __init__(
        self,
        model: Hive,
        pixels_PCHW: Tensor,
        image_of_B: Tensor,
        has_image_B: Tensor,
        slots_B: Tensor | None = None,
    ) -> None:
        """Encode the images. Text b is about image ``image_of_B[b]`` if ``has_image_B[b]``.

        `pixels_PCHW` is uint8, with at least one image. ``slots_B[b]`` tokens of text b precede its image; None: one.
        """
        self.model, self.slots = model, slots_B
        seen = model.encode_images(pixels_PCHW)
        self.memory = model.fusion.visual_kv(seen, image_of_B, slots_B)
        # features that are already keys and values are needed for their shape only
        self.visual = [one[image_of_B] if not self.memory else one[:1] for one in seen]
        self.has_image = None if bool(has_image_B.all()) else has_image_B

    def prefill(self, tokens_BT: Tensor, lengths_B: Tensor, room: int) -> Tensor:
        """Prefill: run the texts' first ``lengths_B[b]`` tokens; padding behind them has no effect, by causality.

        `room` is the largest number of `decode_step` calls to follow. Keys and values are allocated for all of them
        at once, since a growing cache would be copied for every token.
        """
        self.lengths, self.width, self.room, self.made = lengths_B, tokens_BT.shape[1], room, 0
        text = self.model.host.embed(self.model.language, tokens_BT)
        hidden, context = self.model.fusion.prepare(text, self.visual, self.has_image, self.slots)
        self.context = replace(context, memory=self.memory or None)
        self.cache = self._cache(hidden.shape[1])
        texts = self.model.fusion.finish(self._run(hidden, self.context), self.context)
        return self.model.logits(texts[torch.arange(len(texts), device=texts.device), lengths_B - 1])

    def decode_step(self, tokens_B: Tensor) -> Tensor:
        """Run one more token of each text. Raises ValueError after `room` tokens."""
        if self.made == self.room:
            raise ValueError(f"the decoder has room for {self.room} tokens: begin it with more")
        place = torch.arange(self.width + self.room, device=tokens_B.device)
        seen = (place < self.lengths[:, None]) | ((place >= self.width) & (place <= self.width + self.made))
        context = self.model.fusion.decode_context(self.context, (self.lengths + self.made)[:, None], seen)
        self.made += 1
        hidden = self.model.host.embed(self.model.language, tokens_B[:, None])
        return self.model.logits(self._run(hidden, context)[:, 0])

    def _cache(self, num_tokens: int) -> Cache:
        """A static KV cache with, in each layer, places for `num_tokens`, visual keys beside them, and new tokens."""
        layers = range(len(self.model.host.layers(self.model.language)))
        beside = [self.model.fusion.num_beside(depth, self.context) for depth in layers]
        return Cache(layers=[StaticLayer(max_cache_len=number + num_tokens + self.room) for number in beside])

    def _run(self, hidden: Tensor, context: Context) -> Tensor:
        is_first = not self.made
        host, llm = self.model.host, self.model.language
        rotary = host.positions(llm, hidden, context.positions)
        for depth, layer in enumerate(host.layers(llm)):
            hidden, attention = self.model.fusion.before_layer(depth, hidden, context)
            if not is_first:
                attention.pop("visual", None)  # the cache already holds them, before the text's
                attention["num_beside"] = self.model.fusion.num_beside(depth, context)
            given = {"text_cache": self.cache, "is_first": is_first, **attention}
            hidden = layer(hidden, position_embeddings=rotary[depth], **given)
        return hidden


@torch.inference_mode()
def generate(
    model: Hive,
    pixels_PCHW: Tensor,
    image_of: Sequence[int | None],
    prompts: Sequence[Sequence[int]],
    end_ids: int | Collection[int],
    max_tokens: int,
    slots: Sequence[int] | None = None,
) -> list[list[int]]:
    """Greedy continuations of the prompts, as token ids without the end token.

    Args:
        pixels_PCHW: uint8, at least one image.
        image_of: index of each prompt's image, or None for text alone.
        prompts: token ids.
        end_ids: ids of the tokens that end a text.
        max_tokens: most tokens of each continuation.
        slots: number of tokens of each prompt that precede its image; None: one.
    """
    device = pixels_PCHW.device
    ends = {end_ids} if isinstance(end_ids, int) else set(end_ids)
    end = torch.tensor(sorted(ends), device=device)
    image = torch.tensor([index or 0 for index in image_of], device=device)
    has_image = torch.tensor([index is not None for index in image_of], device=device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True)
    slot = None if slots is None else torch.tensor(slots, device=device)
    decoder = Decoder(model, pixels_PCHW, image, has_image, slot)
    following = decoder.prefill(tokens.to(device), lengths, room=max_tokens - 1).argmax(-1)
    written, ended = [following], torch.isin(following, end)
    while len(written) < max_tokens and not (len(written) % LOOK == 0 and ended.all()):
        following = decoder.decode_step(following).argmax(-1)
        written.append(following)
        ended |= torch.isin(following, end)
    rows = torch.stack(written, dim=1).tolist()
    return [list(takewhile(lambda token: token not in ends, row)) for row in rows]
