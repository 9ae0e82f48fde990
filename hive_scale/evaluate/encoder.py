"""Features of labelled images from a frozen encoder, in batches; cached on disk if no augmentation is used."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from hive_scale.config import ImageMode
from hive_scale.data.feature_store import FORMAT, open_feature_store, parts, settle
from hive_scale.data.transform import VERSION, augmented, fitted
from hive_scale.data.workers import worker_options
from hive_scale.distributed import World
from hive_scale.evaluate.classification_datasets import Split
from hive_scale.model import build
from hive_scale.model.encoders import family_of, hidden_states, patches
from hive_scale.model.identity import identity, key_of
from hive_scale.phase_timer import tick

Draw = tuple[int, int] | None  # (seed, epoch) of an augmentation; None: no augmentation
Features = tuple[Tensor, Tensor]  # (B, V, C) and labels (B,)
Numbers = np.ndarray[Any, np.dtype[np.integer[Any]]]  # image numbers
AT_ONCE = 128  # images per forward of the encoder
LARGEST = 65504.0  # largest finite float16
logger = logging.getLogger(__name__)


class Encoder:
    """A frozen encoder of a registered family. It reads the penultimate depth by default, as the authors do.

    `identity` identifies its features: weights, config, depth, precision and image transform.
    """

    def __init__(self, path: Path, device: torch.device, dtype: torch.dtype = torch.float32, depth: int = -2) -> None:
        """`depth` counts blocks, from the end if negative: -1 is the last block's output.

        Raises ValueError if the encoder has no such depth.
        """
        self.path = path
        self.tower = build.open_encoder(path).to(device).requires_grad_(False)
        config: Any = self.tower.config
        layers: int = config.num_hidden_layers
        self.depth = depth if depth >= 0 else layers + 1 + depth
        if not 0 <= self.depth <= layers:
            raise ValueError(f"{path} has {layers} blocks: there is no depth {depth}")
        self.image_size: int = config.image_size
        family = family_of(config)
        self.mode: ImageMode = family.image_mode
        self.width: int = config.hidden_size
        self.num_tokens = family.num_patches(config)
        self.device, self.dtype = device, dtype
        mean, std = family.pixel_mean, family.pixel_std
        self.mean = 255 * torch.tensor(mean, device=device).view(3, 1, 1)
        self.std = 255 * torch.tensor(std, device=device).view(3, 1, 1)
        self.identity = key_of(identity(self.tower), self.depth, str(dtype), self.mode, mean, std)

    @torch.no_grad()
    def __call__(self, pixels_BCHW: Tensor) -> Tensor:
        """Encode uint8 (B, C, H, W) to features (B, V, C). Raises ValueError if any is not finite: a probe would still
        get a score.
        """
        seen = []
        for pixels in torch.split(pixels_BCHW, AT_ONCE):
            normal = (pixels.to(self.device).float() - self.mean) / self.std
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                seen.append(patches(self.tower, hidden_states(self.tower, normal, self.depth)[-1]))
        features = torch.cat(seen)
        if not bool(features.isfinite().all()):
            remedy = "give sound weights, another --depth, or --precision fp32"
            raise ValueError(f"{self.path} makes features of some images that are not finite: {remedy}")
        return features


@dataclass(frozen=True)
class LabelledImages(Dataset[tuple[Tensor, int]]):
    """Images of a split at the encoder's size, by number; augmented if a draw (seed, epoch) is given."""

    split: Split
    image_size: int
    mode: ImageMode

    def __getitem__(self, asked: tuple[int, Draw]) -> tuple[Tensor, int]:
        index, draw = asked
        pixels, label = self.split.read(index)
        if draw is not None:
            return augmented(pixels, self.image_size, *draw, index), label
        return fitted(pixels, self.image_size, self.mode), label


class Source:
    """Features of a split's images, by image number."""

    def __init__(self, encoder: Encoder, split: Split, workers: int) -> None:
        self.encoder, self.split, self.workers = encoder, split, workers
        self.cache: Cache | None = None
        self._asked: list[list[tuple[int, Draw]]] = []  # the loader's list of batches, refilled for every pass

    @cached_property
    def _loader(self) -> DataLoader[tuple[Tensor, int]]:
        """Data loader whose workers persist between passes."""
        images = LabelledImages(self.split, self.encoder.image_size, self.encoder.mode)
        options = worker_options(self.workers)
        return DataLoader(images, batch_sampler=self._asked, generator=torch.Generator(), **options)

    def batches(self, groups: Sequence[Numbers], draw: Draw = None) -> Iterator[Features]:
        """Yield the features of each group of images, augmented by `draw` if given. Only one pass at a time."""
        if self.cache and draw is None:
            for group in groups:
                tick()
                yield self.cache.read(group, self.encoder.device)
            return
        self._asked[:] = [[(index, draw) for index in group.tolist()] for group in groups]
        for pixels, labels in self._loader:
            tick()
            yield self.encoder(pixels), labels.to(self.encoder.device)


def cut(part: Numbers, size: int) -> list[Numbers]:
    return [part[start : start + size] for start in range(0, len(part), size)]


class Cache:
    """Features of a split as float16 on disk, with its labels, shared by all ranks, probes and seeds.

    The file's name identifies encoder, dataset and split, so other features are never read in their place.
    """

    def __init__(self, folder: Path, data: str, source: Source, numbers: Numbers, world: World) -> None:
        """Compute the missing features of the images `numbers`, shared among ranks. A collective.

        `data` identifies the dataset. Raises DiskError if the disk cannot hold the features.
        """
        encoder, split = source.encoder, source.split
        self.source, self._told = source, False
        path = folder / f"{split.name}-{key_of(FORMAT, encoder.identity, VERSION, data, split.size)}"
        shape = 1, encoder.num_tokens, encoder.width
        self.features, missing = open_feature_store(world, path, numbers, split.size, shape, torch.float16)
        groups = parts(np.sort(numbers), missing, AT_ONCE)[world.rank :: world.size]
        settle(world, self.features, self._complete(groups))

    def read(self, numbers: Numbers, device: torch.device) -> Features:
        found = [self.features.read(number) or self._make(number) for number in numbers.tolist()]
        features = torch.cat([features for features, _ in found]).to(device).float()
        return features, torch.tensor([label for _, label in found], device=device)

    def _complete(self, groups: Sequence[Numbers]) -> OSError | None:
        """Store the features of all groups; return the OSError if the disk fails."""
        for group, (values, told) in zip(groups, self.source.batches(groups), strict=True):
            try:
                self._put(group, values, told)
            except OSError as error:
                return error
        return None

    def _make(self, number: int) -> tuple[Tensor, int]:
        """Encode one image whose stored features cannot be read."""
        if not self._told:
            logger.warning("%s: features cannot be read, or are damaged: made again", self.features.file)
            self._told = True
        encoder = self.source.encoder
        pixels, label = LabelledImages(self.source.split, encoder.image_size, encoder.mode)[number, None]
        features = encoder(pixels[None]).clamp(-LARGEST, LARGEST).cpu().half()
        with suppress(OSError):
            self._put(np.array([number]), features, torch.tensor([label]))
        return features, label

    def _put(self, numbers: Numbers, features: Tensor, labels: Tensor) -> None:
        self.features.put(numbers, features.clamp(-LARGEST, LARGEST)[:, None], labels.tolist())
