"""Optimizer moments that a stage takes over, by parameter name, from the last checkpoint of the stage before."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hive_scale.checkpoint.format import StepCheckpoint, audit, key_of, steps_in
from hive_scale.checkpoint.io import CorruptFile
from hive_scale.distributed import Fragment
from hive_scale.param_groups import ParamGroup

STEPS_BEHIND = "steps_behind"  # in a checkpoint's state: by parameter, steps of earlier stages that its moments hold


class OptimizerTransfer:
    """AdamW divides moments by what they lack of their start from zero, so each keeps count of its own steps."""

    def __init__(self, stage_dir: Path | None) -> None:
        """Of the newest sound checkpoint in `stage_dir`; of none, all moments start fresh. Raises CorruptFile."""
        self._snapshot = StepCheckpoint(_newest(stage_dir)) if stage_dir else None
        self.steps: dict[str, int] = {}  # by parameter
        if self._snapshot:
            before: Mapping[str, int] = self._snapshot.state.get(STEPS_BEHIND, {})
            self.steps = {name: self._snapshot.step + before.get(name, 0) for name in self._snapshot.masters()}

    def divide(self, groups: Iterable[ParamGroup]) -> list[ParamGroup]:
        """`groups`, cut so that the moments of each have one number of steps behind them."""
        divided = []
        for group in groups:
            by_steps: dict[int, list[str]] = {}
            for name in group.parameters:
                by_steps.setdefault(self.steps.get(name, 0), []).append(name)
            divided += [replace(group, parameters=tuple(names), steps_behind=n) for n, names in by_steps.items()]
        return divided

    def state(self, groups: Sequence[ParamGroup]) -> dict[str, Any]:
        """What the stage's own checkpoints must say for the stage after it."""
        return {STEPS_BEHIND: {name: g.steps_behind for g in groups if g.steps_behind for name in g.parameters}}

    def fill(self, fragments: Iterable[Fragment]) -> None:
        """Copy the moments of all parameters that the stage before trained. Raises CorruptFile."""
        for fragment in fragments:
            if self._snapshot and fragment.name in self.steps and fragment.kind != "master":
                self._snapshot.read(key_of(fragment), fragment.offset, fragment.data)


def _newest(stage_dir: Path) -> Path:
    for path in reversed(steps_in(stage_dir)):
        if not audit(path):
            return path
    raise CorruptFile(f"{stage_dir} has no sound checkpoint to take moments from: set carry_optimizer_state=false")
