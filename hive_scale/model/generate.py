"""Greedy batched generation with a KV cache: one encoder pass per image, one forward per new token.

Shapes: P images, B texts of up to T tokens, Q new tokens of each, V visual tokens, D LLM width.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from itertools import takewhile

import torch
from torch import Tensor

from hive_scale.model.cache import HiveCache
from hive_scale.model.hive import Hive

LOOK = 8  # new tokens between checks whether all texts have ended; each check makes the host wait for the device


def prefill(
    model: Hive,
    visual: Sequence[Tensor],
    image_of_B: Tensor,
    has_image_B: Tensor,
    slots_B: Tensor | None,
    tokens_BT: Tensor,
    lengths_B: Tensor,
    room: int | None = None,
) -> tuple[Tensor, HiveCache]:
    """Run the beginning of texts padded on the right.

    Args:
        model: the model.
        visual: of each fused layer, (P, V, D) for P images, as from `Hive.encode_images`; at least one image.
        image_of_B: index of each text's image.
        has_image_B: bool, True for texts with an image.
        slots_B: number of tokens of each text that precede its image; None: one.
        tokens_BT: token ids.
        lengths_B: number of tokens of each text; padding behind them has no effect, by causality.
        room: the largest number of further tokens, for which memory is then allocated at once; None: any number.

    Returns:
        Hidden states (B, T, D) that predict the texts' next tokens, and the cache to go on with, by `extend`.
    """
    memory = model.fusion.visual_kv(visual, image_of_B, slots_B)
    # features that are already keys and values are needed for their shape only
    features = [one[image_of_B] if not memory else one[:1] for one in visual]
    has_image = None if bool(has_image_B.all()) else has_image_B
    text = model.host.embed(model.language, tokens_BT)
    hidden, context = model.fusion.prepare(text, features, has_image, slots_B)
    context = replace(context, memory=memory or None)
    is_token = torch.arange(tokens_BT.shape[1], device=tokens_BT.device) < lengths_B[:, None]
    cache = HiveCache(model.fusion, context, is_token, len(model.host.layers(model.language)), room)
    return model.fusion.finish(model.run_layers(hidden, context, cache), context), cache


def extend(model: Hive, cache: HiveCache, tokens_BQ: Tensor, is_token_BQ: Tensor) -> Tensor:
    """Run Q more tokens of each text; False in `is_token_BQ` marks padding. Returns hidden states (B, Q, D)."""
    context = cache.extend(is_token_BQ)
    return model.run_layers(model.host.embed(model.language, tokens_BQ), context, cache)


class Decoder:
    """Decodes texts padded on the right. Each call returns the logits (B, vocabulary) of the next token."""

    cache: HiveCache

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
        self.model, self.images = model, (model.encode_images(pixels_PCHW), image_of_B, has_image_B, slots_B)

    def prefill(self, tokens_BT: Tensor, lengths_B: Tensor, room: int) -> Tensor:
        """Prefill: run the texts' first ``lengths_B[b]`` tokens; padding behind them has no effect, by causality.

        `room` is the largest number of `decode_step` calls to follow. Keys and values are allocated for all of them
        at once, since a growing cache would be copied for every token.
        """
        hidden, self.cache = prefill(self.model, *self.images, tokens_BT, lengths_B, room)
        return self.model.logits(hidden[torch.arange(len(hidden), device=hidden.device), lengths_B - 1])

    def decode_step(self, tokens_B: Tensor) -> Tensor:
        """Run one more token of each text. Raises ValueError after `room` tokens."""
        tokens = tokens_B[:, None]
        hidden = extend(self.model, self.cache, tokens, torch.ones_like(tokens, dtype=torch.bool))
        return self.model.logits(hidden[:, 0])


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
