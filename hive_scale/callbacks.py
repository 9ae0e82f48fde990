"""Callbacks: the caller's own code, which a run calls while it trains."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hive_scale.engine import StepOutput
    from hive_scale.train import StageRun


class Callback:
    """Base class of callbacks: override the methods that you need, and pass instances to `run_pipeline`.

    Give the same callbacks to every rank: all ranks call them at the same points, so a callback may use collectives
    (``stage.world``). What it does takes time from training, and an error that it raises ends the run. The attributes
    of `stage` without an underscore are public: config, name, world, model, engine, at (the TrainState), preemption.
    """

    def on_stage(self, stage: StageRun) -> None:
        """A stage is about to train: its engine is open, its checkpoint loaded. `stage.engine.loss` may be replaced."""

    def on_step(self, stage: StageRun, output: StepOutput) -> None:
        """A global batch is done, evaluated if that was due, and logged; its checkpoint comes afterwards.

        `output.applied` tells whether the weights changed. A batch that makes the run roll back is not reported.
        ``stage.preemption.request()`` lets the run save and stop after the next step.
        """

    def on_evaluate(self, stage: StageRun, metrics: Mapping[str, Any]) -> None:
        """The held-out samples were evaluated: `metrics` has `eval_loss`, in nats per token, and layer statistics."""

    def on_checkpoint(self, stage: StageRun, path: Path) -> None:
        """A checkpoint is on its way to the directory `path`. It may still be written in the background."""
