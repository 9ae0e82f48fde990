"""Text after text about images, one token at a time: each image is seen once, each token run once.

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

LOOK = 8  # tokens between looks whether all texts have ended, for which the host waits for the device


class Decoder:
    """Texts padded on the right, of which every call returns the logits (B, vocabulary) of the token that follows."""

    def __init__(
        self,
        model: Hive,
        pixels_PCHW: Tensor,
        image_of_B: Tensor,
        has_image_B: Tensor,
        slots_B: Tensor | None = None,
    ) -> None:
        """Text b is about image ``image_of[b]``, if ``has_image[b]``; `pixels` uint8, at least one image.

        ``slots[b]`` tokens come before it; None: one.
        """
        self.model, self.slots = model, slots_B
        seen = model.encode_images(pixels_PCHW)
        self.memory = model.fusion.visual_kv(seen, image_of_B, slots_B)
        # what has become keys and values is not read any more, but for its shape
        self.visual = [one[image_of_B] if not self.memory else one[:1] for one in seen]
        self.has_image = None if bool(has_image_B.all()) else has_image_B

    def prefill(self, tokens_BT: Tensor, lengths_B: Tensor, room: int) -> Tensor:
        """Run the texts, of which the first ``lengths[b]`` tokens count: by causality the others change nothing.

        `room` is for the tokens to come, of which there may be fewer: keys and values have one place in memory from
        the first token to the last, where a cache that grows would copy them for every token.
        """
        self.lengths, self.width, self.room, self.made = lengths_B, tokens_BT.shape[1], room, 0
        text = self.model.host.embed(self.model.language, tokens_BT)
        hidden, context = self.model.fusion.prepare(text, self.visual, self.has_image, self.slots)
        self.context = replace(context, memory=self.memory or None)
        self.cache = self._cache(hidden.shape[1])
        texts = self.model.fusion.finish(self._run(hidden, self.context), self.context)
        return self.model.logits(texts[torch.arange(len(texts), device=texts.device), lengths_B - 1])

    def decode_step(self, tokens_B: Tensor) -> Tensor:
        """Run one more token of each text. Raises ValueError if there is no more room."""
        if self.made == self.room:
            raise ValueError(f"the decoder has room for {self.room} tokens: begin it with more")
        place = torch.arange(self.width + self.room, device=tokens_B.device)
        seen = (place < self.lengths[:, None]) | ((place >= self.width) & (place <= self.width + self.made))
        context = self.model.fusion.decode_context(self.context, (self.lengths + self.made)[:, None], seen)
        self.made += 1
        hidden = self.model.host.embed(self.model.language, tokens_B[:, None])
        return self.model.logits(self._run(hidden, context)[:, 0])

    def _cache(self, num_tokens: int) -> Cache:
        """Of each layer for `num_tokens` of the stream, what else the layer attends to, and those to come."""
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
                attention.pop("visual", None)  # the cache has them, before the text's
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
    """Greedy continuations of prompts.

    Args:
        pixels_PCHW: uint8, at least one image.
        image_of: which image each prompt is about, or None.
        prompts: token ids.
        end_ids: the tokens that end a text; they are left out of it.
        max_tokens: of each continuation.
        slots: how many tokens of each prompt come before its image; None: one.
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
