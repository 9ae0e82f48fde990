"""Build the feature cache: a pass that runs a frozen encoder once per image, and stores its features on disk."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from hive_scale.config import Config
from hive_scale.data import transform
from hive_scale.data.feature_store import (
    FORMAT,
    DiskError,
    FeatureStore,
    free_bytes,
    open_feature_store,
    parts,
    settle,
    size_of,
)
from hive_scale.data.loader import Loader
from hive_scale.data.workers import worker_options
from hive_scale.distributed import World
from hive_scale.exit_codes import TryAgain
from hive_scale.model import build
from hive_scale.model.hive import Hive
from hive_scale.model.identity import identity, key_of
from hive_scale.observability.console import console, track
from hive_scale.phase_timer import tick
from hive_scale.precision import DTYPES

AT_ONCE = 32  # images per forward pass of the encoder
logger = logging.getLogger(__name__)
Seen = tuple[list[int], list[int], Tensor | None, Exception | None]


def cached_features(
    config: Config, stage: Hive, loader: Loader, weights: Mapping[str, Tensor], world: World, stop: Callable[[], bool]
) -> FeatureStore | None:
    """The complete feature cache of `loader`'s samples, or None if the encoder of `stage` is trained.

    A collective; each rank encodes its share, until `stop` on any rank ends the pass. The file's name is a hash of
    weights, config, depths, precision, transform and samples, so stale features are never read. If the disk cannot
    hold the features, it logs a warning and returns None: the stage then trains on images.
    """
    if not _are_kept(config, stage, loader):
        return None
    try:
        return _completed(config, loader, weights, world, stop)
    except DiskError as error:
        logger.warning(
            "feature_cache=%s: %s. The stage trains on images, with the encoder at work", config.feature_cache, error
        )
        return None


def _completed(
    config: Config, loader: Loader, weights: Mapping[str, Tensor], world: World, stop: Callable[[], bool]
) -> FeatureStore:
    """Fill and open the cache. Raises DiskError if a disk cannot hold it."""
    dtype = DTYPES[config.engine.precision]
    make = partial(build.encoder_only, config.model, weights, world.device, dtype)
    model = make()
    key = key_of(FORMAT, _digest(model), (loader.pad_colour, transform.VERSION), *_digest_of_set(loader))
    path = Path(config.feature_cache).expanduser() / key
    numbers = np.arange(len(loader.index))
    kept, missing = open_feature_store(world, path, numbers, len(numbers), model.features_shape, dtype)
    kept.encode = _Eyes(make)
    failed = _fill(kept, model, loader, parts(numbers, missing, AT_ONCE), world, stop)
    try:
        settle(world, kept, failed)
    except DiskError:
        if world.is_main and len(missing) == len(numbers):  # nothing in it is older: free the room for checkpoints
            kept.file.unlink(missing_ok=True)
        raise
    return kept


def _fill(
    kept: FeatureStore,
    model: Hive,
    loader: Loader,
    missing: Sequence[NDArray[np.integer]],
    world: World,
    stop: Callable[[], bool],
) -> OSError | None:
    """Encode this rank's share of the `missing` parts. Returns the error if the disk cannot take them. A collective."""
    mine = [part.tolist() for part in missing[world.rank :: world.size]]
    mine += [[] for _ in range(-(-len(missing) // world.size) - len(mine))]  # equal counts: each part has a collective
    options = worker_options(loader.config.workers)
    images = DataLoader(_Images(loader), batch_size=None, sampler=mine, generator=torch.Generator(), **options)
    world.timer.enter("features")
    failed: OSError | None = None
    shown: Iterable[Seen] = images
    if world.is_main and mine:
        console.print(f"the frozen encoder runs once on {sum(map(len, missing)):,} images, in batches of {AT_ONCE}")
        shown = track(images, "features")
    for read, broken, pixels, error in shown:
        if error is not None:
            raise error
        if any(world.sum(stop(), failed is not None)):
            break
        tick()
        try:
            if pixels is not None:
                kept.put(read, _features(model, pixels))
            kept.give_up(broken)
        except OSError as full:
            failed = full
    return failed


class _Eyes:
    """Encodes images whose features cannot be read during training. The encoder is loaded on first use."""

    def __init__(self, make: Callable[[], Hive]) -> None:
        self.model = cache(make)

    def __call__(self, pixels: Tensor) -> Tensor:
        return _features(self.model(), pixels)


@torch.no_grad()
def _features(model: Hive, pixels_BCHW: Tensor) -> Tensor:
    """Features (B, S, V, C) of uint8 images (B, 3, H, W): S depths, V visual tokens, width C."""
    states = model.encode(pixels_BCHW.to(model.pixel_mean.device))
    return torch.stack(model.features(states), dim=1)


def check_disk(config: Config, stage: Hive, loader: Loader) -> None:
    """Raises ValueError if a new run's feature cache would not fit on the disk.

    A run that has begun trains without the cache instead, since nobody may be there to choose another disk.

    Space of existing features counts as free: they may be the ones that this stage needs. Only the stage's initial
    weights can tell, and a previous stage may have yet to train these.
    """
    if not _are_kept(config, stage, loader) or (config.run_dir / "config.yaml").exists():
        return
    needed = size_of(len(loader.index), stage.features_shape, DTYPES[config.engine.precision])
    if needed > (room := free_bytes(Path(config.feature_cache).expanduser())):
        raise ValueError(
            f"feature_cache={config.feature_cache}: features of {len(loader.index):,} images are {needed / 1e9:.1f} "
            f"GB, {room / 1e9:.1f} GB are free or hold features: name another disk, or keep none"
        )


def _are_kept(config: Config, stage: Hive, loader: Loader) -> bool:
    trains = any(parameter.requires_grad for parameter in stage.vision.parameters())
    return bool(config.feature_cache) and not trains and not loader.config.blank_images


def _digest(model: Hive) -> str:
    """Hash of what features depend on in the model: depths, normalisation, encoder weights except those never read.

    The weights' dtype is the compute precision.
    """
    unread = {name.removeprefix("vision.") for name in model.unused_parameters()}
    statistics = model.pixel_mean.tolist(), model.pixel_std.tolist()
    return key_of(identity(model.vision, unread), model.encoder_depths, statistics)


def _digest_of_set(loader: Loader) -> tuple[object, ...]:
    """Values that features depend on in the data: fingerprint (which covers every byte) and image transform."""
    data = loader.config  # max_pixels counts too, since too large an image is stored as broken
    return loader.index.fingerprint, loader.image_size, data.image_transform, data.max_pixels


class _Images(Dataset[Seen]):
    """Images by lists of sample numbers, as (readable numbers, broken numbers, pixels (B, 3, H, W), error).

    `error` is set, as in `workers.WorkerResult`, if reading failed for another reason than a broken sample.
    """

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def __getitem__(self, numbers: list[int]) -> Seen:
        try:
            return self._seen(numbers)
        except (OSError, TryAgain) as error:
            return [], [], None, error

    def _seen(self, numbers: list[int]) -> Seen:
        pixels, broken = {}, []
        for number in numbers:
            try:
                pixels[number] = self.loader.pixels(number)
            except ValueError:  # training reports the broken sample when its turn comes
                broken.append(number)
        return list(pixels), broken, torch.stack(list(pixels.values())) if pixels else None, None
