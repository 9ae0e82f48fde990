"""Which step checkpoints of a stage stay on disk: the last ones, every n-th, the best."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from math import inf, isfinite
from pathlib import Path
from typing import Any

from hive_scale.checkpoint.files import Damaged
from hive_scale.checkpoint.snapshot import Snapshot, step_of, steps_in
from hive_scale.config import KeepConfig


class Retention:
    def __init__(self, directory: Path, keep: KeepConfig) -> None:
        self.directory, self.keep = directory, keep
        self._refused: set[Path] = set()  # found damaged
        self._losses: dict[Path, float] = {}  # held-out ones

    def refused(self, path: Path) -> None:
        """Do not count `path` any longer: it is damaged."""
        self._refused.add(path)

    def saved(self, path: Path, state: Mapping[str, Any]) -> None:
        """`path` has just been written: delete what need not stay, up to its step. It stays itself, always."""
        self._refused.discard(path)
        self._losses[path] = _loss_of(state)
        reached = [found for found in steps_in(self.directory) if step_of(found) <= step_of(path)]
        kept = self._kept([found for found in reached if found not in self._refused])
        for found in reached:
            if found not in kept:
                shutil.rmtree(found, ignore_errors=True)  # what cannot be deleted now is tried again next time

    def _kept(self, sound: list[Path]) -> set[Path]:
        kept = {*sound[-self.keep.last :]}
        kept |= {path for path in sound if self.keep.every and step_of(path) % self.keep.every == 0}
        if self.keep.best:
            rated = [path for path in sound if isfinite(self._loss(path))]
            kept |= {*sorted(rated, key=self._loss)[:1]}
        return kept

    def _loss(self, path: Path) -> float:
        """The held-out loss that a checkpoint was saved with, or infinity."""
        if path not in self._losses:
            try:
                self._losses[path] = _loss_of(Snapshot(path).state)
            except Damaged:
                return inf
        return self._losses[path]


def _loss_of(state: Mapping[str, Any]) -> float:
    loss = state.get("eval_loss")
    return inf if loss is None else float(loss)
