"""Samples and batches: the data that pass from the data pipeline to the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

BLANK = 127  # grey value of a blank image


@dataclass(frozen=True)
class Sample:
    """One image with its text.

    `pixels` is uint8 (3, H, W); or floating point features (S, V, C) of a frozen encoder (S depths, V visual tokens
    of width C); or None for text alone. `tokens` begin with the start token. Token *i* is a target, predicted from
    the tokens before it, where ``is_target[i]``; the first token never is.
    """

    key: str
    pixels: Tensor | None
    tokens: Sequence[int]
    is_target: Sequence[bool]
    image_slot: int = 1  # number of tokens before the image


@dataclass(frozen=True)
class Batch:
    """Samples padded on the right to one length T. Pixels stay uint8 until the device normalises them.

    Only N of the B*T positions predict a target token: `target_rows` holds their indices into the flattened (B*T)
    positions, `target_ids` the token that each must predict. A sample without image has blank pixels and
    ``has_image`` False, so that every rank runs the same modules.
    """

    keys: tuple[str, ...]
    pixels: Tensor  # uint8 (B, 3, H, W), or features (B, S, V, C)
    has_image: Tensor  # bool (B,)
    tokens: Tensor  # int64 (B, T)
    target_rows: Tensor  # int64 (N,)
    target_ids: Tensor  # int64 (N,)
    all_images: bool  # has_image.all(), computed on the host to avoid a device synchronisation
    image_slots: Tensor | None = None  # int64 (B,), number of tokens before each image; None: 1

    @property
    def num_tokens(self) -> int:
        """Number of target tokens in the batch."""
        return self.target_ids.numel()

    def __len__(self) -> int:
        return len(self.keys)

    def inputs(self) -> dict[str, Tensor | None]:
        """Keyword arguments of the model's forward."""
        return {
            "pixels": self.pixels,
            "tokens": self.tokens,
            "target_rows": self.target_rows,
            "target_ids": self.target_ids,
            "has_image": None if self.all_images else self.has_image,
            "image_slots": self.image_slots,
        }

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`; copies from pinned memory are asynchronous."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def padded(self, multiple: int) -> Batch:
        """The same batch with texts padded on the right to a multiple of `multiple` tokens."""
        length = self.tokens.shape[1]
        more = -length % multiple
        if not more:
            return self
        # a row's index grows by what is added to the samples before its own
        rows = self.target_rows + self.target_rows // length * more
        return replace(self, tokens=F.pad(self.tokens, (0, more)), target_rows=rows)

    def pin(self) -> Batch:
        """The same batch in pinned memory. `DataLoader` calls this method by its name."""
        return self._map(Tensor.pin_memory)

    def tensors(self) -> list[Tensor]:
        """All tensors of the batch."""
        return [value for value in vars(self).values() if isinstance(value, Tensor)]

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        changed: dict[str, Any] = {k: change(v) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **changed)


def collate(samples: Sequence[Sample], pad_id: int, image_size: int, pixels: Tensor | None = None) -> Batch:
    """Pad `samples` to the longest, and stack them. Causal attention makes the pad token's value irrelevant.

    `pixels`, shaped as in `Batch`, is the buffer for the images. It may be the one that the samples' pixels are views
    of; None allocates one.
    """
    lengths = np.array([len(sample.tokens) for sample in samples])
    is_text = np.arange(lengths.max()) < lengths[:, None]
    tokens, is_target = np.full(is_text.shape, pad_id), np.zeros(is_text.shape, bool)
    tokens[is_text] = np.fromiter(chain.from_iterable(sample.tokens for sample in samples), np.int64)
    is_target[is_text] = np.frombuffer(bytes(chain.from_iterable(sample.is_target for sample in samples)), bool)
    targets = np.flatnonzero(is_target)
    if pixels is None:
        shape = len(samples), 3, image_size, image_size
        # decoded images are channels-last: with the same layout the copy below needs no transposition
        pixels = torch.empty(shape, dtype=torch.uint8, memory_format=torch.channels_last)
    for sample, place in zip(samples, pixels, strict=True):
        if sample.pixels is None:
            place.fill_(BLANK)
        elif sample.pixels.data_ptr() != place.data_ptr():
            place.copy_(sample.pixels)
    slots = [sample.image_slot for sample in samples]
    has_image = torch.tensor([sample.pixels is not None for sample in samples])
    return Batch(
        keys=tuple(sample.key for sample in samples),
        pixels=pixels,
        has_image=has_image,
        tokens=torch.from_numpy(tokens),
        target_rows=torch.from_numpy(targets - 1),  # a target is predicted at the position before it
        target_ids=torch.from_numpy(tokens.flatten()[targets]),
        all_images=all(sample.pixels is not None for sample in samples),
        image_slots=torch.tensor(slots) if set(slots) != {1} else None,
    )
