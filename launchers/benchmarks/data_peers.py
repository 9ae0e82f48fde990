"""Loaders that `benchmark.py data` compares with ours, each used as its own documentation shows.

All shuffle, return the same samples and decode with our transform. They differ in how they find samples, move them
between processes and resume.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cache
from itertools import chain, islice, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hive_scale.batch import Batch, Sample

IMAGE_SIZE, BATCH, SHUFFLED = 384, 32, 1000  # pixels per side, samples of a micro-batch, samples of a shuffle buffer
Raw = tuple[str, bytes, bytes]  # key, image, caption


class Peer(ABC):
    """One loader of the shards `tars`; `folder` is its own, for files it must create first."""

    name: str

    def __init__(self, tars: list[Path], folder: Path) -> None:
        self.tars = tars
        self.folder = folder
        self.prepare()

    def prepare(self) -> None:  # noqa: B027 loaders that read the tars directly have nothing to prepare
        """Convert the set to the loader's own format if necessary; not timed. Raises ImportError if it is not
        installed.
        """

    @abstractmethod
    def raw(self) -> Iterator[Raw]:
        """Yield undecoded samples, found and read in this process, endlessly."""

    @abstractmethod
    def batches(self, workers: int) -> Iterator[Batch]:
        """Yield decoded and collated batches, endlessly."""

    def save(self, position: int) -> None:  # noqa: B027 most loaders can seek to any position
        """Write to the folder the state that `resumed` needs, as a run at `position` would; not timed."""

    def resumed(self, position: int) -> Iterator[Raw]:
        """Yield the samples after `position`, in a fresh process that knows what was saved there."""
        raise NotImplementedError

    def part(self, state: Any, world: int, steps: int) -> tuple[list[str], Any]:
        """Return (keys that `world` ranks see in `steps` global batches of `GLOBAL` after `state`, the state then)."""
        raise NotImplementedError


GLOBAL = 24  # global batch of `Peer.part`: divisible among one, two and three ranks


@cache
def tokenizer() -> Any:
    """The single tokenizer of this process, which forked workers inherit."""
    from hive_scale.config import TokenizerConfig
    from hive_scale.data.tokenizer import open_tokenizer

    return open_tokenizer(TokenizerConfig())


def sample(key: str, jpg: bytes, text: bytes) -> Sample:
    from hive_scale.data.tokenizer import caption_sample
    from hive_scale.data.transform import to_pixels

    pixels = to_pixels(jpg, IMAGE_SIZE, "resize", 10**8)
    return caption_sample(key, pixels, text.decode().strip(), tokenizer(), 77)


def collated(samples: list[Sample]) -> Batch:
    from hive_scale.batch import collate

    return collate(samples, tokenizer().pad_id, IMAGE_SIZE)


class Ours(Peer):
    name = "ours"

    def _loader(self, workers: int = 0, size: int = IMAGE_SIZE) -> Any:
        from hive_scale.config import DataConfig
        from hive_scale.data.loader import Loader

        return Loader(DataConfig(workers=workers), [str(tar) for tar in self.tars], tokenizer(), image_size=size)

    def raw(self) -> Iterator[Raw]:
        return self.resumed(0)

    def resumed(self, position: int) -> Iterator[Raw]:
        loader = self._loader()
        order = loader.stream(seed=0)
        while True:
            for i in order.ids(position, BATCH).tolist():
                yield loader.index.key(i), loader.encoded(i), loader.caption(i).encode()
            position += BATCH

    def batches(self, workers: int) -> Iterator[Batch]:
        return chain.from_iterable(self._steps(self._loader(workers), BATCH, 0, 0, 1))

    def part(self, state: Any, world: int, steps: int) -> tuple[list[str], Any]:
        start = state or 0
        ranks = [self._steps(self._loader(size=16), GLOBAL, start, rank, world) for rank in range(world)]
        keys = [key for rank in ranks for step in islice(rank, steps) for batch in step for key in batch.keys]
        return keys, start + steps * GLOBAL

    def _steps(self, loader: Any, global_batch: int, start: int, rank: int, world: int) -> Iterator[list[Batch]]:
        import torch

        from hive_scale.distributed import World

        here = World(rank, world, torch.device("cpu"))
        steps: Iterator[list[Batch]] = loader.steps(
            global_batch=global_batch, accumulation=1, seed=0, start=start, world=here
        )
        return steps


class WebDataset(Peer):
    """webdataset keeps no state: a resumed run rereads what it has read, or starts over."""

    name = "webdataset"

    def _pipeline(self, rank: int = 0, world: int = 1) -> Any:
        import webdataset

        return webdataset.WebDataset(
            [str(tar) for tar in self.tars],
            shardshuffle=len(self.tars),
            seed=0,
            nodesplitter=lambda urls: list(urls)[rank::world],
            empty_check=False,
        ).shuffle(SHUFFLED, seed=0)

    def raw(self) -> Iterator[Raw]:
        return ((one["__key__"], one["jpg"], one["txt"]) for one in self._pipeline().repeat())

    def batches(self, workers: int) -> Iterator[Batch]:
        import webdataset

        pipeline = self._pipeline().map(lambda one: sample(one["__key__"], one["jpg"], one["txt"]))
        pipeline = pipeline.batched(BATCH, collation_fn=collated).repeat()
        return iter(webdataset.WebLoader(pipeline, batch_size=None, num_workers=workers))

    def resumed(self, position: int) -> Iterator[Raw]:
        return islice(self.raw(), position, None)

    def part(self, state: Any, world: int, steps: int) -> tuple[list[str], Any]:
        ranks = [iter(self._pipeline(rank, world).repeat()) for rank in range(world)]
        return [one["__key__"] for rank in ranks for one in islice(rank, steps * GLOBAL // world)], None


class ImageFolder(Peer):
    """torchvision's ImageFolder with its shuffling sampler; it has no captions."""

    name = "ImageFolder"

    def prepare(self) -> None:
        if not self.folder.exists():
            for number, (key, jpg, _) in enumerate(once(self.tars)):
                path = self.folder / f"class{number % 10}" / f"{key}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(jpg)

    def _set(self, decode: bool) -> Any:
        from torchvision.datasets import ImageFolder as Folder

        def load(path: str) -> Any:
            jpg = Path(path).read_bytes()
            return sample(path, jpg, b"a caption of some words") if decode else (path, jpg, b"")

        return Folder(str(self.folder), loader=load)

    def raw(self) -> Iterator[Raw]:
        import torch

        images = self._set(decode=False)
        while True:
            for i in torch.randperm(len(images)).tolist():
                yield images[i][0]

    def batches(self, workers: int) -> Iterator[Batch]:
        from torch.utils.data import DataLoader

        loader = DataLoader(
            self._set(decode=True),
            batch_size=BATCH,
            shuffle=True,
            num_workers=workers,
            persistent_workers=workers > 0,
            drop_last=True,
            collate_fn=lambda pairs: collated([one for one, _ in pairs]),
        )
        return chain.from_iterable(repeat(loader))


def once(tars: list[Path]) -> Iterator[Raw]:
    import webdataset

    for one in webdataset.WebDataset([str(tar) for tar in tars], shardshuffle=False):
        yield one["__key__"], one["jpg"], one["txt"]
