"""A bad batch leaves no trace: weights and moments equal, bit for bit, those of a run that never saw it. Bad weights
send the run back to its last checkpoint, but not forever.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from statistics import NormalDist
from typing import Any

import pytest
import ranks
from test_parity import Cell, my_batches, opened, small_jsons
from torch import Tensor

from hive_scale import presets
from hive_scale.batch import Batch
from hive_scale.callbacks import Callback
from hive_scale.checkpoint.format import steps_in
from hive_scale.checkpoint.stage_files import WEIGHTS
from hive_scale.checkpoint.weights import read_weights
from hive_scale.config import Config, GuardConfig
from hive_scale.data.loader import Loader
from hive_scale.distributed import World, session
from hive_scale.engine import Engine, StepOutput, token_loss
from hive_scale.observability.metrics import read_metrics
from hive_scale.pipeline import run_pipeline
from hive_scale.resilience.loss_guard import LEAST, LossGuard
from hive_scale.train import StageRun

CELLS = [Cell(name) for name in ("ddp", "fsdp", "zero1", "zero2_offload")]
CELLS += [Cell(name, precision="bf16") for name in ("ddp", "zero2")]


def digest(engine: Engine) -> str:
    parts = hashlib.sha256()
    for fragment in engine.fragments():
        parts.update(repr(fragment[:4]).encode())
        parts.update(fragment.data.numpy().tobytes())
    return parts.hexdigest()


def left_out(world: World, cells: list[Cell], folder: str) -> list[tuple[str, str]]:
    """Of each cell, the state after three good steps, and after the same with bad ones between."""
    return [(train(world, cell, folder, bad=False), train(world, cell, folder, bad=True)) for cell in cells]


def no_number(forward: Callable[..., Tensor], batch: Batch) -> Tensor:
    return token_loss(forward, batch) * math.nan


def train(world: World, cell: Cell, folder: str, bad: bool) -> str:
    engine = opened(cell, world, folder)[0]
    for step in range(3):
        output = engine.step(my_batches(cell, step, world), 1.0, votes=lambda: (world.rank, 1))
        assert output.applied
        assert output.votes == (1.0, 2.0)
        if not bad:
            continue
        after = engine.step(my_batches(cell, 10 + step, world), 1.0, max_loss=output.loss / 2)
        assert not after.applied
        assert math.isfinite(after.grad_norm)
        if world.rank == 1:  # and no other
            engine.loss = no_number
        after = engine.step(my_batches(cell, 20 + step, world), 1.0)
        engine.loss = token_loss
        assert not after.applied
        assert math.isnan(after.loss)
        assert math.isnan(after.grad_norm)
    return digest(engine)


ZERO_3 = [Cell("zero3"), Cell("zero3_offload", precision="bf16")]


@pytest.mark.parametrize("cells", [CELLS, pytest.param(ZERO_3, marks=pytest.mark.slow)], ids=["", "zero3"])
def test_a_step_left_out_changes_no_bit(cells: list[Cell], tmp_path: Path) -> None:
    small_jsons(tmp_path)
    for states in ranks.run(left_out, 2, cells, str(tmp_path)):
        for cell, (without, with_bad) in zip(cells, states, strict=True):
            assert without == with_bad, cell


def test_a_spike_is_told_from_noise() -> None:
    draw = random.Random(0)
    guard = LossGuard(GuardConfig(spike=20, window=32))
    for step in range(LEAST):
        assert guard.max_loss == math.inf, step
        guard.accept(2.0 + draw.gauss(0, 0.05))
    assert 2.5 < guard.max_loss < 3.5
    assert not guard.reject()
    assert not guard.reject()
    guard.accept(2.0)  # one good step, and patience begins anew
    assert [guard.reject() for _ in range(3)] == [False, False, True]
    resumed = LossGuard(GuardConfig(spike=20, window=32))
    resumed.restore(json.loads(json.dumps(guard.losses)))
    assert resumed.max_loss == guard.max_loss


def guard_of(losses: Iterable[float], **settings: Any) -> LossGuard:
    guard = LossGuard(GuardConfig(**settings))
    for loss in losses:
        guard.accept(loss)
    return guard


def test_the_limit_is_so_many_standard_deviations_of_normal_losses_from_their_mean() -> None:
    losses = [NormalDist(2.0, 0.05).inv_cdf((i + 0.5) / 200) for i in range(200)]
    random.Random(0).shuffle(losses)
    assert guard_of(losses, spike=20, window=200).max_loss == pytest.approx(2.0 + 20 * 0.05, abs=0.01)
    assert guard_of(losses, spike=5, window=200).max_loss == pytest.approx(2.0 + 5 * 0.05, abs=0.01)
    assert guard_of(losses, spike=0, window=200).max_loss == math.inf, "0 turns it off"


def test_a_few_spikes_that_were_let_in_hardly_move_the_limit() -> None:
    losses = [2.0 + 0.01 * (i % 10) for i in range(30)]
    assert guard_of([*losses, 50.0, 50.0], spike=20, window=32).max_loss < 3.0


def test_only_the_losses_of_the_window_count() -> None:
    early, late = [9.0, 5.0] * 16, [2.0, 2.1] * 16
    guard = guard_of([*early, *late], spike=20, window=32)
    assert guard.losses == late
    assert guard.max_loss == guard_of(late, spike=20, window=32).max_loss
    guard.restore([*early, *late])
    assert guard.losses == late


def test_losses_all_alike_leave_room_for_a_few_thousandths() -> None:
    assert guard_of([2.0] * LEAST, spike=20).max_loss == pytest.approx(2.0 * (1 + 20 / 1000))


def test_patience_begins_anew_from_a_checkpoint_and_going_back_is_counted() -> None:
    guard = LossGuard(GuardConfig(patience=2, rollbacks=2))
    assert [guard.reject() for _ in range(2)] == [False, True]
    guard.restore([2.0])
    assert [guard.reject() for _ in range(3)] == [False, True, True]
    guard.rollback()
    guard.rollback()
    with pytest.raises(ValueError, match="after going back 2 times"):
        guard.rollback()


def test_a_batch_left_out_is_said_and_written_down(tmp_path: Path) -> None:
    guard = guard_of([2.0] * LEAST, spike=20)
    said = guard.note(tmp_path / "bad.jsonl", "joint", 7, 9.5, math.nan, ("a", "b"))
    assert said.startswith("joint: a batch for step 7 is left out: loss 9.500 (at most 2.040 is accepted)")
    line = json.loads((tmp_path / "bad.jsonl").read_text())
    assert line.pop("max_loss") == pytest.approx(2.04)
    assert line == {"stage": "joint", "step": 7, "loss": 9.5, "grad_norm": None, "keys": ["a", "b"]}


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with session() as world:
        yield world


def run(output: Path, *words: str) -> Config:
    stage = ["stages.projector.max_steps=24", "stages.projector.global_batch=4", "save_interval=6"]
    return presets.load("debug", None, [*stage, "data.heldout=[sample:heldout]", f"output={output}", *words])


class Sabotage(Callback):
    """Calls `harm` after each step. Leaves out the held-out samples, which take longer than all else here."""

    def __init__(self, harm: Callable[[StageRun], object] = lambda _: None) -> None:
        self.harm = harm

    def on_stage(self, stage: StageRun) -> None:
        stage.heldout = ()

    def on_step(self, stage: StageRun, _: StepOutput) -> None:
        self.harm(stage)


def test_a_run_with_a_bad_batch_is_the_run_without_it(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = 7  # the number of the batch
    steps = Loader.steps

    def without(self: Loader, **how: Any) -> Iterator[Any]:
        start = how["start"] // how["global_batch"]
        return (batch for number, batch in enumerate(steps(self, **how), start) if number != bad)

    with monkeypatch.context() as patch:
        patch.setattr(Loader, "steps", without)
        run_pipeline(run(tmp_path / "without"), world, until="projector", callbacks=[Sabotage()])

    def poison(stage: StageRun) -> None:
        stage.engine.loss = no_number if stage.at.batch == bad else token_loss

    run_pipeline(run(tmp_path / "with"), world, until="projector", callbacks=[Sabotage(poison)])
    ours, theirs = (dict(read_weights(tmp_path / name / "projector" / WEIGHTS).items()) for name in ("with", "without"))
    assert all(bool((ours[name] == theirs[name]).all()) for name in theirs)
    (line,) = [json.loads(line) for line in (tmp_path / "with" / "bad_batches.jsonl").read_text().splitlines()]
    assert (line["stage"], line["step"], line["loss"], len(line["keys"])) == ("projector", bad + 1, None, 4)


def test_bad_weights_send_a_run_back_to_other_batches(tmp_path: Path, world: World) -> None:
    harmed: list[int] = []

    def harm(stage: StageRun) -> None:
        if stage.at.step == 21 and not harmed:
            harmed.append(stage.at.step)
            for fragment in stage.engine.fragments():
                if fragment.kind == "master":
                    fragment.data.fill_(math.nan)

    run_pipeline(run(tmp_path / "run"), world, until="projector", callbacks=[Sabotage(harm)])
    stage_dir = tmp_path / "run" / "projector"
    lines = read_metrics(stage_dir / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 25))
    assert max(line["loss"] for line in lines) < 10
    state = json.loads((stage_dir / "step_00000024" / "manifest.json").read_text())["content"]["state"]
    # the step whose weights were spoiled; then three that were refused
    assert state["passed"] == 21 - 18 + 3
    assert lines[-1]["lost_steps"] == 3 + 3
    assert lines[-1]["spent"]["lost"] > 0


def spoil(value: float, kind: str) -> Callable[[StageRun], None]:
    """Spoils what the last step of 24 leaves behind."""

    def harm(stage: StageRun) -> None:
        if stage.at.step == 24:
            for fragment in stage.engine.fragments():
                if fragment.kind == kind:
                    fragment.data[:1] = value

    return harm


@pytest.mark.parametrize(("value", "kind"), [(math.nan, "master"), (math.inf, "exp_avg_sq")])
def test_a_stage_that_ends_in_what_is_no_number_is_not_done(
    tmp_path: Path, world: World, value: float, kind: str
) -> None:
    """No later step shows it to the guard."""
    with pytest.raises(ValueError, match=r"after going back 1 times the loss or the weights are again not finite"):
        run_pipeline(
            run(tmp_path / "run", "guard.rollbacks=1"),
            world,
            until="projector",
            callbacks=[Sabotage(spoil(value, kind))],
        )
    assert not (tmp_path / "run" / "projector" / WEIGHTS).exists()
    assert [path.name for path in steps_in(tmp_path / "run" / "projector")][-1] == "step_00000018"


def test_a_held_out_loss_that_is_no_number_is_not_published_and_no_json(tmp_path: Path, world: World) -> None:
    """Finite weights may be ruined, too: only the held-out loss at the end shows it."""

    class Ruined(Callback):
        def on_stage(self, stage: StageRun) -> None:
            stage.engine.evaluate = lambda _: (math.nan, 1)  # type: ignore[method-assign]

    with pytest.raises(ValueError, match="no checkpoint is there to go back to: lower the learning rates"):
        run_pipeline(
            run(tmp_path / "run", "save_interval=100", "eval_interval=0"),
            world,
            until="projector",
            callbacks=[Ruined()],
        )
    stage_dir = tmp_path / "run" / "projector"
    assert not (stage_dir / WEIGHTS).exists()
    last = (stage_dir / "metrics.jsonl").read_text().splitlines()[-1]
    line = json.loads(last, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert line["step"] == 24
    assert "eval_loss" not in line


def test_going_back_for_ever_is_refused(tmp_path: Path, world: World) -> None:
    def harm(stage: StageRun) -> None:
        if stage.at.step == 9:
            stage.engine.loss = no_number

    with pytest.raises(ValueError, match=r"after going back 1 times .* lower the learning rates"):
        run_pipeline(run(tmp_path / "run", "guard.rollbacks=1"), world, until="projector", callbacks=[Sabotage(harm)])
