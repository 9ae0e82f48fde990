"""A frozen encoder need see each picture only once: the pass that makes its features and keeps them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
import xxhash
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from hive_scale.config import Config
from hive_scale.data import transform
from hive_scale.data.batches import ignore_signals
from hive_scale.data.kept import KeptFeatures, open_kept, room_in, size_of
from hive_scale.data.loader import Loader
from hive_scale.distributed import World
from hive_scale.model import build
from hive_scale.model.hive import Hive
from hive_scale.model.identity import identity, key_of
from hive_scale.precision import DTYPES
from hive_scale.pulse import tick
from hive_scale.stops import TryAgain

AT_ONCE = 32  # pictures that run through the encoder together
Seen = tuple[list[int], list[int], Tensor | None, Exception | None]
LOOKED_AT = 16  # pictures of a set whose bytes tell it from one of equal sizes: all would take as long as training


def kept_features(
    config: Config, stage: Hive, loader: Loader, weights: Mapping[str, Tensor], world: World, stop: Callable[[], bool]
) -> KeptFeatures | None:
    """What `config.feature_cache` has of `loader`'s set, completed; None where the encoder of `stage` learns.

    A collective; each rank makes its share. `stop` on any rank ends it before all are there. The file's name tells
    weights, config, depths, precision, transform and set: other features are never read for these. Raises ValueError
    if the disk has no room for them.
    """
    if not _are_kept(config, stage, loader):
        return None
    dtype = DTYPES[config.engine.precision]
    model = build.eyes(config.model, weights, world.device, dtype)
    pixels = loader.pad_colour, transform.VERSION
    key = key_of(_digest(model), pixels, *_digest_of_set(loader))
    path = Path(config.feature_cache).expanduser() / key
    numbers = np.arange(len(loader.index))
    kept, missing = open_kept(world, path, numbers, len(numbers), model.features_shape, dtype)
    parts = np.array_split(missing, max(1, -(-len(missing) // AT_ONCE)))
    mine = [part.tolist() for part in parts[world.rank :: world.size]]
    mine += [[] for _ in range(-(-len(parts) // world.size) - len(mine))]  # as many for each: they meet at every one
    pictures = DataLoader(
        _Pictures(loader),
        batch_size=None,
        sampler=mine,
        num_workers=loader.config.workers,
        worker_init_fn=ignore_signals,
        generator=torch.Generator(),
    )
    world.pulse.enter("features")
    text = f"features of {len(missing)} pictures, once"
    quiet = not (world.is_main and len(missing))
    for read, broken, pixels, error in track(pictures, text, total=len(mine), disable=quiet):
        if error is not None:
            raise error
        if any(world.sum(stop())):
            break
        tick()
        if read:
            with torch.no_grad():
                kept.put(read, torch.stack(model.features(model.encode(pixels.to(world.device))), dim=1))
        if broken:
            kept.give_up(broken)
    world.barrier()
    return kept


def check_disk(config: Config, stage: Hive, loader: Loader) -> None:
    """Raises ValueError if what `kept_features` would keep is more than the disk can hold.

    Features that are there may be those wanted: only the stage's weights, which a stage before may yet have to make,
    tell which.
    """
    if not _are_kept(config, stage, loader):
        return
    needed = size_of(len(loader.index), stage.features_shape, DTYPES[config.engine.precision])
    if needed > (room := room_in(Path(config.feature_cache).expanduser())):
        raise ValueError(
            f"feature_cache={config.feature_cache}: features of {len(loader.index):,} pictures are {needed / 1e9:.1f} "
            f"GB, {room / 1e9:.1f} GB are free or hold features: name another disk, or keep none"
        )


def _are_kept(config: Config, stage: Hive, loader: Loader) -> bool:
    trains = any(parameter.requires_grad for parameter in stage.vision.parameters())
    return bool(config.feature_cache) and not trains and not loader.config.blank


def _digest(model: Hive) -> str:
    """Of what the features depend on in the model: depths, and the encoder but for weights that it never reads.

    The precision of compute is that of the weights.
    """
    unread = {name.removeprefix("vision.") for name in model.dormant()}
    statistics = model.pixel_mean.tolist(), model.pixel_std.tolist()
    return key_of(identity(model.vision, unread), model.encoder_depths, statistics)


def _digest_of_set(loader: Loader) -> tuple[object, ...]:
    """Of what they depend on in the data. The index knows each picture's place and size, but not what it shows."""
    shown = xxhash.xxh3_128()
    for number in np.linspace(0, len(loader.index) - 1, LOOKED_AT).astype(int).tolist():
        with suppress(ValueError):  # a broken one is told when its turn comes in training
            shown.update(loader.encoded(number))
    data = loader.config  # too large a picture counts as broken, and that is kept, too
    return loader.fingerprint, shown.hexdigest(), loader.image_size, data.image, data.max_pixels


class _Pictures(Dataset[Seen]):
    """By a list of numbers: those of pictures that can be used, of those that cannot, and the first as (B, 3, H, W).

    And, as in `batches.Loaded`, why there are none.
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
            except ValueError:  # told when its turn comes in training
                broken.append(number)
        return list(pixels), broken, torch.stack(list(pixels.values())) if pixels else None, None
