"""Carry optimizer moments over from the previous stage's last checkpoint, by parameter name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hive_scale.checkpoint.format import StepCheckpoint, audit, key_of, steps_in
from hive_scale.checkpoint.io import CorruptFile
from hive_scale.distributed import EMA, Fragment
from hive_scale.param_groups import ParamGroup

STEPS_BEHIND = "steps_behind"  # key of a checkpoint's state: by parameter, steps of earlier stages in its moments


class OptimizerTransfer:
    """Adam's bias correction needs each parameter's own step count, so parameters carried over keep theirs."""

    def __init__(self, stage_dir: Path | None) -> None:
        """Open the newest sound checkpoint in `stage_dir`; None: carry nothing over. Raises CorruptFile."""
        self._snapshot = StepCheckpoint(_newest(stage_dir)) if stage_dir else None
        self.steps: dict[str, int] = {}  # optimizer steps in the carried moments, by parameter
        if self._snapshot:
            before: Mapping[str, int] = self._snapshot.state.get(STEPS_BEHIND, {})
            self.steps = {name: self._snapshot.step + before.get(name, 0) for name in self._snapshot.masters()}

    def divide(self, groups: Iterable[ParamGroup]) -> list[ParamGroup]:
        """Split `groups` so that all parameters of a group have the same number of steps in their moments."""
        divided = []
        for group in groups:
            by_steps: dict[int, list[str]] = {}
            for name in group.parameters:
                by_steps.setdefault(self.steps.get(name, 0), []).append(name)
            divided += [replace(group, parameters=tuple(names), steps_behind=n) for n, names in by_steps.items()]
        return divided

    def state(self, groups: Sequence[ParamGroup]) -> dict[str, Any]:
        """The entry in this stage's checkpoints that the next stage needs to carry moments over from it."""
        return {STEPS_BEHIND: {name: g.steps_behind for g in groups if g.steps_behind for name in g.parameters}}

    def fill(self, fragments: Iterable[Fragment]) -> None:
        """Copy the moments of all parameters that the previous stage trained. Raises CorruptFile."""
        for fragment in fragments:
            # the average of a stage begins with the weights that the stage begins with
            if self._snapshot and fragment.name in self.steps and fragment.kind not in ("master", EMA):
                self._snapshot.read(key_of(fragment), fragment.offset, fragment.data)


def _newest(stage_dir: Path) -> Path:
    for path in reversed(steps_in(stage_dir)):
        if not audit(path):
            return path
    raise CorruptFile(f"{stage_dir} has no sound checkpoint to take moments from: set carry_optimizer_state=false")
