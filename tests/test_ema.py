"""The average of the weights is the same on every engine, goes on where a run stopped, and is exported on request."""
# ruff: noqa: F811 - fixtures of other modules

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from safetensors.torch import load_file
from test_parity import STEPS, Cell, engine_config, factor, folder, model_of, my_batches, stage_of, weights_of  # noqa: F401
from test_train import small, some_pairs, world  # noqa: F401
from torch import Tensor

from hive_scale.callbacks import Callback
from hive_scale.checkpoint.checkpointer import Checkpointer
from hive_scale.checkpoint.format import StepCheckpoint, steps_in
from hive_scale.config import Config
from hive_scale.distributed import World
from hive_scale.engine import Engine, open_engine
from hive_scale.exit_codes import Stopped
from hive_scale.export import export_run
from hive_scale.model import build
from hive_scale.pipeline import run_pipeline
from hive_scale.plan.memory import examine

DECAY = 0.7


def opened(cell: Cell, world: World, folder: str) -> Engine:
    stage = replace(stage_of(3, "cross_attention", world.size), ema=DECAY)
    model, groups = build.for_stage(model_of("cross_attention"), stage)
    return open_engine(model, groups, stage, engine_config(cell, folder), world, weights_of("cross_attention"))


def averages(world: World, cells: list[Cell], folder: str, out: str) -> dict[str, tuple[Path, list[float]]]:
    """Of each cell: the directory of checkpoints after each step."""
    found = {}
    for cell in cells:
        engine, losses = opened(cell, world, folder), []
        path = Path(out, f"{cell.engine} {cell.precision} {world.size}")
        store = Checkpointer(path, world)
        for step in range(STEPS):
            losses.append(engine.step(my_batches(cell, step, world), factor(step)).loss)
        engine.step(my_batches(cell, 0, world), 1.0, max_loss=0.0)  # which is skipped, and moves no average
        store.save(STEPS, engine.fragments(), {"step": STEPS}, wait=True)
        found[cell.engine] = path, losses
    return found


def written_out(engine_steps: int) -> dict[str, Tensor]:
    """Masters of a bare run after each step, averaged by the definition."""
    stage = stage_of(3, "cross_attention", 1)
    model = build.init_model(model_of("cross_attention"), 0)
    _, groups = build.for_stage(model_of("cross_attention"), stage)
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        parameter.data.copy_(weights_of("cross_attention")[name])
    trained = {name: (parameters[name], group) for group in groups for name in group.parameters}
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in trained)
    average = {name: one.detach().clone() for name, (one, _) in trained.items()}
    optimizer = torch.optim.AdamW([{"params": [one]} for one, _ in trained.values()], betas=stage.betas, eps=stage.eps)
    with_world = World(0, 1, torch.device("cpu"))
    for step in range(engine_steps):
        batches = my_batches(Cell("one"), step, with_world)
        loss = sum(model(**batch.inputs()) for batch in batches) / sum(batch.num_tokens for batch in batches)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([one for one, _ in trained.values()], stage.max_grad_norm)
        for settings, (_, group) in zip(optimizer.param_groups, trained.values(), strict=True):
            settings.update(lr=group.lr * factor(step), weight_decay=group.weight_decay)
        optimizer.step()
        optimizer.zero_grad()
        for name, (one, _) in trained.items():
            average[name] = DECAY * average[name] + (1 - DECAY) * one.detach()
    return average


@pytest.mark.parametrize(
    ("engines", "size"),
    [(["one"], 1), (["ddp", "fsdp", "fsdp, offload"], 2), (["zero1", "zero2"], 2), (["zero3"], 2)],
    ids=["one", "native", "zero12", "zero3"],
)
def test_every_engine_averages_as_the_definition_says(
    folder: str, tmp_path: Path, engines: list[str], size: int
) -> None:
    expected = written_out(STEPS)
    cells = [Cell(engine) for engine in engines]
    for engine, (path, _) in ranks.run(averages, size, cells, folder, str(tmp_path))[0].items():
        snapshot = StepCheckpoint(steps_in(path)[-1])
        assert snapshot.masters().keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(snapshot.master(name, "ema"), tensor, rtol=0, atol=2e-5, msg=f"{engine} {name}")


def bf16_start(world: World, cells: list[Cell], folder: str) -> list[float]:
    """Of each cell: the largest difference of the first average from the weights that were given."""
    worst = []
    for cell in cells:
        given = weights_of("cross_attention")
        parts = [one for one in opened(cell, world, folder).fragments() if one.kind == "ema"]
        assert parts
        worst.append(
            max(
                float((one.data - given[one.name].flatten()[one.offset : one.offset + one.data.numel()]).abs().max())
                for one in parts
            )
        )
    return worst


def test_in_bf16_it_begins_with_the_masters_and_not_with_their_rounded_copies(folder: str) -> None:
    cells = [Cell(engine, precision="bf16") for engine in ("ddp", "fsdp", "zero2")]
    for worst in ranks.run(bf16_start, 2, cells, folder):
        assert worst == [0.0] * 3


def averaged(output: Path) -> Config:
    config = small(output, steps=4, save_interval=2)
    return replace(config, stages={name: replace(stage, ema=DECAY) for name, stage in config.stages.items()})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, world: World, some_pairs: None) -> Config:
    config = averaged(tmp_path_factory.mktemp("ema") / "run")
    run_pipeline(config, world)
    return config


def test_a_stopped_stage_goes_on_to_the_same_average(run: Config, world: World, tmp_path: Path) -> None:
    class Stop(Callback):
        def on_step(self, stage: Any, output: Any) -> None:
            if stage.name == "joint" and stage.at.step == 1:
                stage.preemption.request()

    config = replace(run, output=str(tmp_path / "run"))
    with pytest.raises(Stopped):
        run_pipeline(config, world, callbacks=[Stop()])
    run_pipeline(config, world)
    ours, theirs = (StepCheckpoint(steps_in(one.run_dir / "joint")[-1]) for one in (config, run))
    for name in theirs.masters():
        assert torch.equal(ours.master(name, "ema"), theirs.master(name, "ema"))


def test_the_average_is_exported_on_request(run: Config, tmp_path: Path) -> None:
    export_run("encoder", run.run_dir, tmp_path / "last")
    export_run("encoder", run.run_dir, tmp_path / "ema", ema=True)
    last, average = (load_file(tmp_path / name / "model.safetensors") for name in ("last", "ema"))
    snapshot, moved = StepCheckpoint(steps_in(run.run_dir / "joint")[-1]), 0
    assert last.keys() == average.keys()
    for name in snapshot.masters():
        if (own := name.replace("vision.", "vision_model.", 1)) in average:
            assert torch.equal(average[own], snapshot.master(name, "ema"))
            assert torch.equal(last[own], snapshot.master(name))
            moved += not torch.equal(last[own], average[own])
    assert moved
    left = {path.name for path in tmp_path.iterdir() if path.suffix != ".lock"}
    assert left == {"last", "ema"}, "what was written in between is gone"


def test_an_earlier_checkpoint_is_not_taken_for_the_last_one(run: Config, tmp_path: Path) -> None:
    shutil.copytree(run.run_dir, tmp_path / "run")
    last = steps_in(tmp_path / "run" / "joint")[-1]
    shutil.rmtree(last)
    with pytest.raises(ValueError, match=f"{last.name} is not there, and alone holds what stage joint ended with"):
        export_run("llm", tmp_path / "run", tmp_path / "llm", ema=True)


def test_its_card_says_so(run: Config, tmp_path: Path) -> None:
    export_run("llm", run.run_dir, tmp_path / "llm", ema=True)
    text = (tmp_path / "llm" / "README.md").read_text()
    assert "after stage joint, averaged" in text
    assert f"decay {DECAY} per step" in text


def test_the_planner_counts_it(run: Config) -> None:
    stage = run.stages["joint"]
    assert examine(run, stage, 12).states == 1 + examine(run, replace(stage, ema=0.0), 12).states


def test_a_run_without_an_average_has_none_to_export(run: Config, world: World, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="stage initial kept no average of its weights"):
        export_run("encoder", run.run_dir, tmp_path / "ema", stage="initial", ema=True)
    with pytest.raises(ValueError, match=r"ema=1.5 is a decay per step"):
        replace(run.stages["joint"], ema=1.5)
