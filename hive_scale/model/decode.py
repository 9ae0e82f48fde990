"""Text after text about pictures, one token at a time: each picture is seen once, each token run once.

Shapes: P pictures, B texts of up to T tokens, D LLM width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import DynamicCache

from hive_scale.model.fusion import Context
from hive_scale.model.hive import Hive


class Decoder:
    """Texts padded on the right, of which every call returns the logits (B, vocabulary) of the token that follows."""

    def __init__(self, model: Hive, pixels_PCHW: Tensor, picture_of_B: Tensor, has_image_B: Tensor) -> None:
        """Text b is about picture ``picture_of[b]``, if ``has_image[b]``; `pixels` uint8, at least one picture."""
        self.model = model
        seen = model.see(pixels_PCHW)
        self.memory = [(key[picture_of_B], value[picture_of_B]) for key, value in model.fusion.remember(seen)]
        # what has become keys and values is not read any more, but for its shape
        self.visual = [one[picture_of_B] if not self.memory else one[:1] for one in seen]
        self.has_image = None if bool(has_image_B.all()) else has_image_B

    def begin(self, tokens_BT: Tensor, lengths_B: Tensor) -> Tensor:
        """Run the texts, of which the first ``lengths[b]`` tokens count: by causality the others change nothing."""
        self.lengths, self.width, self.made, self.cache = lengths_B, tokens_BT.shape[1], 0, DynamicCache()
        text = self.model.language.model.embed_tokens(tokens_BT)
        hidden, context = self.model.fusion.enter(text, self.visual, self.has_image)
        self.context = replace(context, memory=self.memory or None)
        texts = self.model.fusion.leave(self._run(hidden, self.context), self.context)
        return self.model.logits(texts[torch.arange(len(texts), device=texts.device), lengths_B - 1])

    def go_on(self, tokens_B: Tensor) -> Tensor:
        """Run one more token of each text."""
        place = torch.arange(self.width + self.made + 1, device=tokens_B.device)
        seen = (place < self.lengths[:, None]) | (place >= self.width)
        context = self.model.fusion.follow(self.context, (self.lengths + self.made)[:, None], seen)
        self.made += 1
        hidden = self.model.language.model.embed_tokens(tokens_B[:, None])
        return self.model.logits(self._run(hidden, context)[:, 0])

    def _run(self, hidden: Tensor, context: Context) -> Tensor:
        rotary = self.model.language.model.rotary_emb(hidden, context.positions)
        for depth, layer in enumerate(self.model.language.model.layers):
            hidden, attention = self.model.fusion.fuse(depth, hidden, context)
            visual = attention.pop("visual", None)
            if visual and not self.made:  # once, before the text's
                self.cache.update(*visual, depth)
            hidden = layer(hidden, position_embeddings=rotary, text_cache=self.cache, **attention)
        return hidden


@torch.inference_mode()
def generate(
    model: Hive,
    pixels_PCHW: Tensor,
    picture_of: Sequence[int | None],
    prompts: Sequence[Sequence[int]],
    eos_id: int,
    max_tokens: int,
) -> list[list[int]]:
    """Greedy continuations of `prompts` (token ids), each about one of the pictures or none; the end left out."""
    device = pixels_PCHW.device
    picture = torch.tensor([index or 0 for index in picture_of], device=device)
    has_image = torch.tensor([index is not None for index in picture_of], device=device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True)
    decoder = Decoder(model, pixels_PCHW, picture, has_image)
    following = decoder.begin(tokens.to(device), lengths).argmax(-1)
    written, ended = [following], following == eos_id
    while len(written) < max_tokens and not ended.all():
        following = decoder.go_on(following).argmax(-1)
        written.append(following)
        ended |= following == eos_id
    return [_until(row, eos_id) for row in torch.stack(written, dim=1).tolist()]


def _until(ids: list[int], eos_id: int) -> list[int]:
    return ids[: ids.index(eos_id)] if eos_id in ids else ids
