"""A run directory opened for looking at: its numbers, its model at the end of a stage, pictures for it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from hive_scale import config as configs
from hive_scale.checkpoint.handoff import read_weights
from hive_scale.checkpoint.marker import WEIGHTS, find_weights
from hive_scale.config import Config
from hive_scale.data.transform import Tokenizer, open_tokenizer, picture
from hive_scale.model import build
from hive_scale.model.hive import Hive
from hive_scale.preparation import open_data
from hive_scale.show.curves import History
from hive_scale.watch.metrics import read_metrics

INITIAL = "initial"
Pair = tuple[Tensor, str]  # a picture, uint8 (3, H, W), and its caption


@dataclass(frozen=True)
class Run:
    """A run directory."""

    dir: Path
    config: Config

    @property
    def name(self) -> str:
        return self.dir.name

    def finished(self) -> list[str]:
        return [stage for stage in self.config.stages if find_weights(self.dir / stage / WEIGHTS)]

    def model(self, stage: str = "") -> Hive:
        """The model at the end of `stage`, by default the last finished one, on a GPU if there is one."""
        known = [*self.config.stages, INITIAL]
        if stage and stage not in known:
            raise ValueError(f"{self.dir} has no stage '{stage}': there are {', '.join(known)}")
        wanted = stage or next(reversed(self.finished()), "")
        if not wanted or not find_weights(self.dir / wanted / WEIGHTS):
            raise ValueError(
                f"{self.dir} has no finished {f'stage {stage}' if stage else 'stage'}: train it to its end, or look at "
                "what it began with by --stage initial"
            )
        model = build.materialise(self.config.model, read_weights(self.dir / wanted / WEIGHTS))
        return model.to("cuda" if torch.cuda.is_available() else "cpu")

    def tokenizer(self) -> Tokenizer:
        return open_tokenizer(self.config.data.tokenizer)

    def history(self) -> History:
        lines = {stage: read_metrics(self.dir / stage / "metrics.jsonl") for stage in self.config.stages}
        return History(self.name, {stage: found for stage, found in lines.items() if found})

    def read_picture(self, path: Path) -> Tensor:
        """As the model sees it. Raises ValueError for what is not a picture."""
        data = self.config.data
        try:
            return picture(path.read_bytes(), build.image_size(self.config.model), data.image, data.max_pixels)
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: {getattr(error, 'strerror', None) or error}: give a JPEG, PNG or WebP") from None

    def heldout(self, count: int) -> list[Pair]:
        """Held-out pairs, evenly spaced through the set."""
        heldout = open_data(self.config).heldout
        stride = max(1, heldout.num_samples // count)
        pairs: list[Pair] = []
        for index in range(stride // 2, heldout.num_samples, stride):
            with suppress(ValueError):  # a broken sample has had its line in bad_samples.jsonl
                if (pixels := heldout.sample(index).pixels) is not None:
                    pairs.append((pixels, heldout.caption(index)))
        if not pairs:
            raise ValueError(f"no held-out picture of {self.dir} can be read: give --images")
        return pairs[:count]


def open_run(path: Path) -> Run:
    """Raises ValueError where there is no run."""
    if not (path / "config.yaml").is_file():
        raise ValueError(f"{path} is no run, for it has no config.yaml: give the directory that output= named")
    return Run(path, replace(configs.load(path / "config.yaml"), output=str(path)))


def pairs_of(run: Run, images: Sequence[Path], captions: Sequence[str], count: int) -> list[Pair]:
    """Pictures with their captions: those given, or some held-out ones.

    A caption that is not given is the picture's .txt. Raises ValueError if there is none.
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
    return [(run.read_picture(path), text) for path, text in zip(images, texts, strict=True)]
