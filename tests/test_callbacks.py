"""A caller's own code sees steps, evaluations and checkpoints of a run, and may replace the loss and stop the run."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from hive_scale import presets
from hive_scale.batch import Batch
from hive_scale.callbacks import Callback
from hive_scale.config import Config
from hive_scale.distributed import World, session
from hive_scale.engine import StepOutput, token_loss
from hive_scale.exit_codes import Stopped
from hive_scale.observability.metrics import read_metrics
from hive_scale.pipeline import run_pipeline
from hive_scale.train import StageRun

DOCS = Path(__file__).resolve().parents[1] / "docs" / "extending.md"


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with session() as world:
        yield world


def run(output: Path) -> Config:
    words = ["stages.projector.max_steps=4", "stages.projector.global_batch=4", "save_interval=2", "eval_interval=2"]
    return presets.load("debug", None, [*words, f"output={output}"])


class Noted(Callback):
    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []

    def on_stage(self, stage: StageRun) -> None:
        stage.heldout = list(stage.heldout)[:1]
        self.seen.append(("stage", stage.name, stage.at.step))

    def on_step(self, stage: StageRun, output: StepOutput) -> None:
        self.seen.append(("step", stage.at.step, output.applied))

    def on_evaluate(self, stage: StageRun, metrics: Mapping[str, Any]) -> None:
        self.seen.append(("evaluate", stage.at.step, metrics["eval_loss"]))

    def on_checkpoint(self, stage: StageRun, path: Path) -> None:
        self.seen.append(("checkpoint", stage.at.step, path.name))


class Doubled(Callback):
    def on_stage(self, stage: StageRun) -> None:
        def doubled(forward: Callable[..., Tensor], batch: Batch) -> Tensor:
            return 2 * token_loss(forward, batch)

        stage.engine.loss = doubled


class Low(Callback):
    def on_stage(self, stage: StageRun) -> None:
        stage.engine.evaluate = lambda _: (1.0, 1)  # type: ignore[method-assign]


def test_callbacks_are_called_in_order_and_may_replace_the_loss(tmp_path: Path, world: World) -> None:
    plain, doubled = Noted(), Noted()
    run_pipeline(run(tmp_path / "plain"), world, until="projector", callbacks=[plain])
    run_pipeline(run(tmp_path / "doubled"), world, until="projector", callbacks=[Doubled(), doubled])
    metrics = read_metrics(tmp_path / "plain" / "projector" / "metrics.jsonl")
    losses = {line["step"]: line["eval_loss"] for line in metrics if "eval_loss" in line}
    assert plain.seen == [
        ("stage", "projector", 0),
        ("step", 1, True),
        ("evaluate", 2, losses[2]),
        ("step", 2, True),
        ("checkpoint", 2, "step_00000002"),
        ("step", 3, True),
        ("evaluate", 4, losses[4]),
        ("step", 4, True),
        ("checkpoint", 4, "step_00000004"),
    ]
    first = read_metrics(tmp_path / "doubled" / "projector" / "metrics.jsonl")[0]
    assert first["loss"] == pytest.approx(2 * metrics[0]["loss"])
    assert [event[:2] for event in doubled.seen] == [event[:2] for event in plain.seen]


def test_the_docs_callback_stops_a_run(tmp_path: Path, world: World) -> None:
    (code,) = re.findall(r"```python\n([^`]*class StopEarly.*?)```", DOCS.read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    with pytest.raises(Stopped, match="projector stopped after step 3 of 4, and saved it"):
        run_pipeline(run(tmp_path / "run"), world, until="projector", callbacks=[Low(), names["StopEarly"]()])
