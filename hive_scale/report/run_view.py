"""Read-only view of a run directory: its metrics, its model after a stage, and images for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from hive_scale.checkpoint import run_reader
from hive_scale.data.tokenizer import Tokenizer, open_tokenizer
from hive_scale.data.transform import read_pixels
from hive_scale.device import this_device
from hive_scale.model import build
from hive_scale.model.hive import Hive
from hive_scale.observability.metrics import read_metrics
from hive_scale.preflight import open_data
from hive_scale.report.curves import History
from hive_scale.run import read_model

Pair = tuple[Tensor, str]  # (image uint8 (3, H, W), caption)


class RunView(run_reader.Run):
    """A run at its present location, which may be unfinished."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.config = replace(self.config, output=str(directory))

    @property
    def name(self) -> str:
        return self.dir.name

    def model(self, stage: str = "") -> Hive:
        """Return the model after `stage` (default: the last finished one), on a GPU if there is one."""
        return read_model(self, stage).to(this_device())

    def tokenizer(self) -> Tokenizer:
        return open_tokenizer(self.config.data.tokenizer)

    def history(self) -> History:
        lines = {stage: read_metrics(self.dir / stage / "metrics.jsonl") for stage in self.config.stages}
        return History(self.name, {stage: found for stage, found in lines.items() if found})

    def read_image(self, path: Path) -> Tensor:
        """Return the image at `path` as the model sees it. Raises ValueError if it is not an image."""
        data, model = self.config.data, self.config.model
        size, colour = build.image_size(model), build.pad_colour(model)
        return read_pixels(path, size, data.image_transform, data.max_pixels, colour)

    def heldout(self, count: int) -> list[Pair]:
        """Return up to `count` held-out pairs, evenly spaced through the set; training pairs if nothing is held out.

        Raises ValueError if none can be read.
        """
        data = open_data(self.config)
        pairs = list((data.heldout or data.train).spread(count))
        if not pairs:
            which = "held-out" if data.heldout else "training"
            raise ValueError(f"no {which} image of {self.dir} can be read: give --images")
        return pairs


def pairs_of(run: RunView, images: Sequence[Path], captions: Sequence[str], count: int) -> list[Pair]:
    """Return the given images with their captions, or `count` held-out pairs if no images are given.

    A missing caption is read from the .txt beside the image. Raises ValueError if there is none.
    """
    if not images:
        return run.heldout(count)
    if captions and len(captions) != len(images):
        raise ValueError(f"{len(captions)} captions for {len(images)} images: give one for each")
    texts = list(captions)
    for path in images if not captions else ():
        if not (beside := path.with_suffix(".txt")).is_file():
            raise ValueError(f"{path} has no caption, which the loss needs: give --captions, or write {beside.name}")
        texts.append(beside.read_text().strip())
    return [(run.read_image(path), text) for path, text in zip(images, texts, strict=True)]
