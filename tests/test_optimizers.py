"""Muon and Adafactor take the steps of torch's own, on every engine that can give them whole matrices; others refuse.

The reference is a bare loop over the same model, with torch's optimizers and the parameters picked out by name. Muon
computes in bf16, whose rounding depends on how a matrix lies in memory and on ranks, so bounds are wider than AdamW's.
"""
# ruff: noqa: F811 - fixtures of other modules

from __future__ import annotations

import math
import re
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from test_parity import (  # noqa: F401
    STEPS,
    Cell,
    engine_config,
    factor,
    folder,
    model_of,
    my_batches,
    stage_of,
    weights_of,
)
from test_train import small, some_pairs, world  # noqa: F401
from torch import Tensor

from hive_scale import header, presets
from hive_scale.callbacks import Callback
from hive_scale.checkpoint.checkpointer import Checkpointer
from hive_scale.checkpoint.format import StepCheckpoint, steps_in
from hive_scale.config import AdapterConfig, Config, EngineConfig, GroupConfig, StageConfig
from hive_scale.distributed import World
from hive_scale.engine import Engine, memory, open_engine
from hive_scale.engine.optimizer import optimizer_kind
from hive_scale.exit_codes import Stopped
from hive_scale.model import build
from hive_scale.observability.layer_stats import layer_grad_rms
from hive_scale.observability.metrics import read_metrics
from hive_scale.pipeline import run_pipeline
from hive_scale.plan.devices import GPUS
from hive_scale.plan.run import Machine, plan_run

ROOT = Path(__file__).parents[1]
BOUNDS = {"muon": (5e-5, 5e-3), "adafactor": (2e-6, 1e-4)}  # relative of losses, absolute of weights
BF16 = {"muon": (3e-4, 1e-2), "adafactor": (5e-4, 1e-2)}


def stage(optimizer: str, size: int = 1, **changes: Any) -> StageConfig:
    return replace(stage_of(3, "cross_attention", size), optimizer=optimizer, **changes)


def opened(optimizer: str, cell: Cell, world: World, folder: str, **changes: Any) -> tuple[Engine, StageConfig]:
    of = stage(optimizer, world.size, **changes)
    model, groups = build.for_stage(model_of("cross_attention"), of)
    engine = open_engine(model, groups, of, engine_config(cell, folder), world, weights_of("cross_attention"))
    return engine, of


def is_matrix(name: str, parameter: Tensor) -> bool:
    """By name: the model has embeddings of tokens, positions and patches, no head, and a pooler that nothing reads."""
    return parameter.ndim == 2 and "embed" not in name and "in_proj" not in name


@cache
def by_hand(optimizer: str) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of a bare loop over whole batches, and what its weights are in the end."""
    torch.set_num_threads(1)
    of = stage(optimizer)
    model = build.init_model(model_of("cross_attention"), 0)
    _, groups = build.for_stage(model_of("cross_attention"), of)
    peaks = {name: (group.lr, group.weight_decay) for group in groups for name in group.parameters}
    trained = {name: one for name, one in model.named_parameters() if name in peaks}
    for name, one in model.named_parameters():
        one.data.copy_(weights_of("cross_attention")[name])
        one.requires_grad_(name in peaks)
    settings = [{"params": [one], "name": name} for name, one in trained.items()]
    matrices = [group for group in settings if is_matrix(group["name"], group["params"][0])]
    rest = [group for group in settings if not is_matrix(group["name"], group["params"][0])]
    made: list[torch.optim.Optimizer] = []
    if optimizer == "muon":
        made = [torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw")]
        made += [torch.optim.AdamW(rest, betas=of.betas, eps=of.eps)]
    else:
        made = [torch.optim.Adafactor(settings, eps=(of.eps**2, 1.0))]
    losses, alone = [], World(0, 1, torch.device("cpu"))
    for step in range(STEPS):
        batches = my_batches(Cell("one"), step, alone)
        loss = sum(model(**batch.inputs()) for batch in batches) / sum(batch.num_tokens for batch in batches)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), of.max_grad_norm)
        for one in made:
            for group in one.param_groups:
                lr, decay = peaks[group["name"]]
                group.update(lr=lr * factor(step), weight_decay=decay)
            one.step()
            one.zero_grad()
        losses.append(loss.item())
    return losses, {name: one.detach() for name, one in trained.items()}


def gathered(mine: Any, world: World) -> list[Any]:
    everyone = [mine] * world.size
    if world.size > 1:
        dist.all_gather_object(everyone, mine)
    return everyone


def trained(world: World, cells: list[tuple[str, Cell]], folder: str, out: str) -> list[tuple[list[float], str]]:
    """Of each optimizer and cell: losses, and the directory with a checkpoint of the last step."""
    found = []
    for number, (optimizer, cell) in enumerate(cells):
        engine, _ = opened(optimizer, cell, world, folder)
        losses, path = [], Path(out, f"{number}")
        for step in range(STEPS):
            losses.append(engine.step(my_batches(cell, step, world), factor(step)).loss)
            if step == 2 and "then ddp" in cell.engine:  # goes on there, from a checkpoint
                Checkpointer(path, world).save(3, engine.fragments(), {}, wait=True)
                engine, _ = opened(optimizer, Cell("ddp"), world, folder)
                Checkpointer(path, world).load(steps_in(path)[-1], engine.fragments())
                engine.after_load(3)
        plan, real = memory.planned(engine), memory.found(engine)
        share = sum(one.optimizer for one in real.values()) / sum(one.optimizer for one in plan.values())
        assert 0.98 < share < 1.02, "what is held was planned"
        mine = {(one.kind, one.name, one.offset): one.data.clone() for one in engine.fragments()}
        for theirs in gathered(mine, world):
            both = mine.keys() & theirs.keys()
            assert all(torch.equal(mine[key], theirs[key]) for key in both), "copies of the model stay equal"
            assert both or "ddp" not in cell.engine
        Checkpointer(path, world).save(STEPS, engine.fragments(), {"step": STEPS}, wait=True)
        found.append((losses, str(path)))
    return found


NATIVE = [("muon", Cell("ddp")), ("muon", Cell("fsdp")), ("muon", Cell("ddp", precision="bf16"))]
NATIVE += [("muon", Cell("fsdp", precision="bf16")), ("muon", Cell("fsdp, then ddp")), ("adafactor", Cell("ddp"))]
NATIVE += [("adafactor", Cell("ddp", precision="bf16"))]
ALONE = [(name, Cell("one", precision=precision)) for name in BOUNDS for precision in ("fp32", "bf16")]


@pytest.mark.contract  # torch's Muon on DTensors
@pytest.mark.parametrize(
    ("cells", "size"),
    [(ALONE, 1), (NATIVE, 2)],
    ids=["one", "two"],
)
def test_steps_are_those_of_torchs_own_optimizers(
    folder: str, tmp_path: Path, cells: list[tuple[str, Cell]], size: int
) -> None:
    outcomes = ranks.run(trained, size, cells, folder, str(tmp_path))[0]
    for (optimizer, cell), (losses, path) in zip(cells, outcomes, strict=True):
        expected, weights = by_hand(optimizer)
        loss_bound, weight_bound = (BF16 if cell.precision == "bf16" else BOUNDS)[optimizer]
        worst = max(abs(a / b - 1) for a, b in zip(losses, expected, strict=True))
        snapshot = StepCheckpoint(steps_in(Path(path))[-1])
        assert snapshot.masters().keys() == weights.keys()
        apart = {name: float((snapshot.master(name) - one).abs().max()) for name, one in weights.items()}
        print(f"{optimizer} {cell.engine} {cell.precision}: loss {worst:.1e}, weight {max(apart.values()):.1e}")
        assert worst < loss_bound
        assert max(apart.values()) < weight_bound


# -- what is Muon's, and what AdamW's ------------------------------------------------------------------------------


def test_hidden_matrices_are_the_linear_layers_but_the_head() -> None:
    model = build.meta_model(model_of("cross_attention"))
    assert model.matrices() == {name for name, one in model.named_parameters() if is_matrix(name, one)}
    config = model_of("cross_attention")
    untied = dict(config.language.config or {}) | {"tie_word_embeddings": False}
    model = build.meta_model(replace(config, language=replace(config.language, config=untied)))
    left = {name for name, one in model.named_parameters() if one.ndim == 2} - model.matrices()
    assert left == {
        "language.model.embed_tokens.weight",
        "language.lm_head.weight",
        "vision.embeddings.position_embedding.weight",
        "vision.head.attention.in_proj_weight",  # never trained
    }


def test_muon_trains_the_factors_of_an_adapter(folder: str, world: World) -> None:
    of = stage("muon", adapter=AdapterConfig(rank=4, targets=["language.*q_proj"]))
    of = replace(of, groups={"all": GroupConfig(["language.*"], 1e-3)})
    model, groups = build.for_stage(model_of("cross_attention"), of)
    divided = optimizer_kind(of).divide(groups, model.matrices())
    assert [(group.name, group.matrices) for group in divided] == [("all", True)]
    assert all(".lora_" in name for name in divided[0].parameters)


# -- checkpoints ---------------------------------------------------------------------------------------------------


def config_of(output: Path, optimizer: str) -> Config:
    config = small(output, steps=3, save_interval=1)
    stages = {name: replace(config.stages[name], optimizer=optimizer) for name in ("projector", "joint")}
    return replace(config, stages=stages)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, world: World, some_pairs: None) -> dict[str, Config]:
    """A whole run with each optimizer."""
    found = {}
    for optimizer in BOUNDS:
        found[optimizer] = config_of(tmp_path_factory.mktemp(optimizer) / "run", optimizer)
        run_pipeline(found[optimizer], world)
    return found


@pytest.mark.parametrize("optimizer", BOUNDS)
def test_a_stopped_stage_goes_on_bit_for_bit(
    optimizer: str, runs: dict[str, Config], world: World, tmp_path: Path
) -> None:
    class Stop(Callback):
        def on_step(self, stage: Any, output: Any) -> None:
            if stage.name == "joint" and stage.at.step == 1:
                stage.preemption.request()

    config = replace(runs[optimizer], output=str(tmp_path / "run"))
    with pytest.raises(Stopped):
        run_pipeline(config, world, callbacks=[Stop()])
    run_pipeline(config, world)
    ours, theirs = (StepCheckpoint(steps_in(one.run_dir / "joint")[-1]) for one in (config, runs[optimizer]))
    assert ours.shapes == theirs.shapes
    kinds = {key.split("/")[0] for key in theirs.shapes}
    assert kinds == {"master", *optimizer_kind(config.stages["joint"]).states}
    for key in theirs.shapes:
        kind, name = key.split("/", 1)
        assert torch.equal(ours.master(name, kind), theirs.master(name, kind)), key


def test_states_have_shapes_of_their_own(runs: dict[str, Config]) -> None:
    matrix, vector = "language.model.layers.0.mlp.up_proj.weight", "language.model.norm.weight"
    muon, adafactor = (StepCheckpoint(steps_in(runs[one].run_dir / "joint")[-1]).shapes for one in BOUNDS)
    rows, columns = muon[f"master/{matrix}"]
    of = {key.split("/", 1)[0]: shape for key, shape in adafactor.items() if key.endswith(f"/{matrix}")}
    assert of == {"master": (rows, columns), "row_var": (rows, 1), "col_var": (1, columns)}
    assert {key.split("/", 1)[0] for key in adafactor if key.endswith(f"/{vector}")} == {"master", "variance"}
    assert {key.split("/", 1)[0] for key in muon if key.endswith(f"/{matrix}")} == {"master", "momentum_buffer"}
    assert {key.split("/", 1)[0] for key in muon if key.endswith(f"/{vector}")} == {"master", "exp_avg", "exp_avg_sq"}


def test_another_optimizers_checkpoint_is_refused(runs: dict[str, Config], folder: str, world: World) -> None:
    path = steps_in(runs["muon"].run_dir / "joint")[-1]
    config = runs["adafactor"]
    model, groups = build.for_stage(config.model, config.stages["joint"])
    weights = {name: torch.zeros(one.shape) for name, one in model.named_parameters()}
    engine = open_engine(model, groups, config.stages["joint"], config.engine, world, weights)
    message = (
        "holds another optimizer's state, exp_avg, exp_avg_sq, momentum_buffer and not col_var, row_var, variance: set "
        "the stage's optimizer and ema to what it began with, or use --overwrite"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        Checkpointer(path.parent, world).load(path, engine.fragments())


@pytest.mark.parametrize("optimizer", BOUNDS)
def test_states_are_carried_into_the_next_stage(
    optimizer: str, runs: dict[str, Config], world: World, tmp_path: Path
) -> None:
    began: dict[str, Tensor] = {}
    counts: set[int] = set()

    class Look(Callback):
        def on_stage(self, stage: Any) -> None:
            if stage.name == "joint":
                for one in stage.engine.fragments():
                    began[f"{one.kind}/{one.name}"] = one.data.clone().view(one.shape)
                counts.update(int(one["step"]) for one in stage.engine.optimizer.state.values() if "step" in one)

    config = replace(runs[optimizer], output=str(tmp_path / "run"))
    stages = {**config.stages, "joint": replace(config.stages["joint"], carry_optimizer_state=True, max_steps=1)}
    run_pipeline(replace(config, stages=stages), world, callbacks=[Look()])
    assert counts == {0, 3}, "each parameter counts its own steps"
    before = StepCheckpoint(steps_in(config.run_dir / "projector")[-1])
    carried = [key for key in before.shapes if not key.startswith("master/") and key in began]
    assert {key.split("/")[0] for key in carried} == set(optimizer_kind(config.stages["joint"]).states)
    for key in carried:
        kind, name = key.split("/", 1)
        assert torch.equal(began[key], before.master(name, kind)), key
        assert began[key].any(), key


# -- engines that cannot -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("optimizer", "engine", "size", "message"),
    [
        ("muon", {"ds_config": "zero2"}, 2, "DeepSpeed flattens them: leave engine.ds_config empty, for FSDP2 or DDP"),
        ("adafactor", {"ds_config": "zero2"}, 2, "leave engine.ds_config empty, and set engine.shard_size=1 for DDP"),
        ("adafactor", {}, 2, "needs whole tensors, and FSDP2 cuts them: set engine.shard_size=1 for DDP"),
        ("muon", {"cpu_offload": True}, 2, "is not for tensors in host memory: set engine.cpu_offload=false"),
        ("muon", {}, 64, "has 24 rows, too few for a shard on each of 64 processes: set engine.shard_size=1 for DDP"),
        ("muon", {"shard_size": 2}, 4, "the copies of an HSDP model drift apart: set engine.shard_size=0 for FSDP2, 1"),
    ],
)
def test_an_engine_that_cannot_is_refused_with_the_remedy(
    optimizer: str, engine: dict[str, Any], size: int, message: str, world: World
) -> None:
    of = replace(stage(optimizer), global_batch=64)
    model, groups = build.for_stage(model_of("cross_attention"), of)
    with pytest.raises(ValueError, match=rf"optimizer={optimizer}.*{re.escape(message)}.*stages\.\*\.optimizer=adamw"):
        open_engine(model, groups, of, EngineConfig(**engine), World(0, size, torch.device("cpu")), {})


def test_a_command_refuses_before_training(tmp_path: Path) -> None:
    words = [f"output={tmp_path / 'run'}", "stages.joint.optimizer=muon", "--ds_config=ds_configs/zero2.json"]
    command = [sys.executable, "launchers/pretrain.py", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "stages.joint: optimizer=muon needs tensors in their shapes" in done.stderr
    assert not list(tmp_path.rglob("*.safetensors"))


# -- what else knows them ------------------------------------------------------------------------------------------


def config_to_plan(optimizer: str, **engine: Any) -> Config:
    config = presets.load("debug", None, ["output=unused"])
    stages = {"joint": replace(config.stages["joint"], optimizer=optimizer)}
    return replace(config, stages=stages, engine=replace(config.engine, compile=False, **engine))


def test_the_planner_counts_their_states() -> None:
    machine, joint = Machine(GPUS["rtx3090"], 1), config_to_plan("adamw").stages["joint"]
    model, _ = build.for_stage(config_to_plan("adamw").model, joint)
    shapes = {name: tuple(one.shape) for name, one in model.named_parameters() if one.requires_grad}
    every = sum(map(math.prod, shapes.values()))
    matrices = sum(math.prod(shape) for name, shape in shapes.items() if len(shape) == 2 and "embed" not in name)
    factors = sum(math.prod(one[:-2]) * (one[-2] + one[-1]) for one in shapes.values() if len(one) > 1)
    vectors = sum(math.prod(shape) for shape in shapes.values() if len(shape) < 2)
    sizes = {"adamw": 2 * every, "muon": 2 * every - matrices, "adafactor": factors + vectors}
    plans = {optimizer: plan_run(config_to_plan(optimizer), machine, 1000)[0] for optimizer in sizes}
    for optimizer, elements in sizes.items():
        assert plans[optimizer].memory.moments == pytest.approx(4 * elements)
        assert plans[optimizer].checkpoint == pytest.approx(4 * (every + elements))
    assert plans["muon"].time.updating > plans["adafactor"].time.updating, "products of matrices take time"


def test_a_matrix_of_muon_costs_what_its_products_do() -> None:
    of = stage("muon")
    x = torch.nn.Parameter(torch.randn(24, 40))
    x.grad = torch.randn(24, 40)
    optimizer = torch.optim.Muon([x])
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        optimizer.step()
    assert optimizer_kind(of).update_flops((24, 40), True) == counter.get_total_flops()
    assert optimizer_kind(of).update_flops((40, 24), True) == counter.get_total_flops()
    assert optimizer_kind(of).update_flops((24, 40), False) == 0


def test_a_search_for_settings_leaves_out_engines_that_cannot() -> None:
    from hive_scale.plan.fit import fit

    found = fit(config_to_plan("adafactor"), Machine(GPUS["rtx3090"], 2), 1000)
    assert found.config.engine.shard_size == 1
    with pytest.raises(ValueError, match=r"stages\.joint: optimizer=adafactor needs whole tensors"):
        plan_run(config_to_plan("adafactor"), Machine(GPUS["rtx3090"], 2), 1000)


def test_layers_gradients_are_read_off_adafactors_states(folder: str, world: World) -> None:
    """After one step the mean squares are those of that step's gradient, whose norm the engine tells."""
    engine, of = opened("adafactor", Cell("one"), world, folder, max_grad_norm=1e9)
    output = engine.step(my_batches(Cell("one"), 0, world), 1.0)
    factor_of = lambda *found: optimizer_kind(of).square_factor(*found, of)  # noqa: E731
    layers = layer_grad_rms(engine.model, engine.fragments(), 1, factor_of, world)["grad_rms"]
    assert math.hypot(*layers.values()) == pytest.approx(output.grad_norm, rel=1e-5)


def test_muon_tells_no_layers_gradients(runs: dict[str, Config]) -> None:
    last = {name: read_metrics(run.run_dir / "joint" / "metrics.jsonl")[-1] for name, run in runs.items()}
    assert "grad_rms" not in last["muon"]
    assert last["adafactor"]["grad_rms"]
    assert all("gates" in one for one in last.values())


def test_small_gradients_and_gates_at_zero_move_adafactor_as_they_move_adamw() -> None:
    """torch's defaults do not: 1e-7 bounds mean squares, and a gate's step is a thousandth of its learning rate."""
    of = replace(stage("adafactor"), eps=1e-8)
    moved = []
    for scale in (1.0, 1e-5):
        torch.manual_seed(0)
        matrix, gate = torch.nn.Parameter(torch.zeros(8, 6)), torch.nn.Parameter(torch.zeros(1))
        group = {"params": [matrix, gate], "lr": 1e-3, "weight_decay": 0.0, "matrices": False}
        matrix.grad, gate.grad = scale * torch.randn(8, 6), torch.full((1,), scale)
        optimizer_kind(of).make([group], of).step()
        moved.append(matrix.detach())
        assert float(gate.detach()) == pytest.approx(-1e-3, rel=1e-4)
    torch.testing.assert_close(moved[0], moved[1], rtol=1e-3, atol=1e-7)


def test_the_average_of_the_weights_goes_with_them(folder: str, world: World) -> None:
    for optimizer in BOUNDS:
        engine, _ = opened(optimizer, Cell("ddp", precision="bf16"), world, folder, ema=0.7)
        first = {one.name: one.data.clone() for one in engine.fragments() if one.kind == "master"}
        engine.step(my_batches(Cell("one"), 0, world), 1.0)
        last = {one.name: one.data.clone() for one in engine.fragments() if one.kind == "master"}
        found = {one.name: one.data for one in engine.fragments() if one.kind == "ema"}
        assert found.keys() == first.keys()
        for name, average in found.items():
            torch.testing.assert_close(average, 0.7 * first[name] + 0.3 * last[name], rtol=0, atol=1e-6, msg=name)


def test_the_header_names_the_optimizer(
    runs: dict[str, Config], world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    from hive_scale.preflight import open_all

    config = runs["muon"]
    header.show_data(config, open_all(config, noted=False), ["joint"], world)
    assert re.search(r"^stage +joint: 3 steps .*; muon; trained: ", capsys.readouterr().out, re.MULTILINE)
