"""A save by one engine on n ranks resumes in another on m ranks: with the same bits, and to the same losses.

Every pair is tried, but processes are started once per world: sources train and save, then each target loads all of
them in turn, each time into an engine that holds the state of another. ZeRO-3 replaces `torch.nn.functional.linear`
for the whole process, so its cases have processes of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
import ranks
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from test_parity import GLOBAL_BATCH, Cell, cut, data_of, engine_config, small_jsons
from tiny import SIGLIP, language
from torch import Tensor
from torch.distributed.tensor import DTensor

from hive_scale.batch import Batch
from hive_scale.checkpoint.checkpointer import Checkpointer
from hive_scale.checkpoint.format import StepCheckpoint
from hive_scale.checkpoint.optimizer_transfer import OptimizerTransfer
from hive_scale.config import GroupConfig, ModelConfig, PartConfig, StageConfig
from hive_scale.distributed import World
from hive_scale.engine import Engine, open_engine
from hive_scale.model.build import init_model, meta_model
from hive_scale.param_groups import apply_trainable_groups
from hive_scale.schedule import lr_factor

SAVED, STEPS = 5, 10
BOUND = {"fp32": 1e-6, "bf16": 2e-3}  # relative difference of each of the five losses after resuming
MOMENTS = ("exp_avg", "exp_avg_sq")
ZERO_12, ZERO_3 = ("zero1", "zero2", "zero2_offload"), ("zero3", "zero3_offload")
# engines that share processes, by number of ranks
STARTS = [
    (1, ("one", *ZERO_12)),
    (2, ("ddp", "fsdp", *ZERO_12)),
    (3, ("ddp", "fsdp", *ZERO_12)),
    (4, ("hsdp",)),
    *((size, ZERO_3) for size in (1, 2, 3)),
]
# each kind of engine, and each number of ranks
SOME = [(1, ("one",)), (2, ("fsdp", "zero2")), (3, ("ddp",)), (4, ("hsdp",)), (2, ("zero3",)), (3, ("zero3_offload",))]
FEW = [(2, ("fsdp", "zero2")), (3, ("zero2_offload",)), (1, ("zero3",))]
MODEL = ModelConfig(
    PartConfig(config=SIGLIP | {"num_hidden_layers": 3, "vision_use_head": False}),
    PartConfig(config=language(num_hidden_layers=2)),
    encoder_layer_ratio=0.34,
)


@dataclass
class Source:
    """What a run saved, as other APIs than the engine's see it, and the losses that it went on to."""

    state: dict[str, Tensor]  # by kind/parameter, flat
    losses: list[float]


def stage_of(size: int) -> StageConfig:
    groups = {
        "connector": GroupConfig(["projector.*", "fusion.*"], 3e-3, 1e-3),
        "language": GroupConfig(["language.model.layers.1.*", "language.model.embed_tokens.*"], 3e-3, 1e-3),
        "vision": GroupConfig(["vision.encoder.layers.1.*"], 1e-3, 1e-3),
    }
    # with a small eps Adam makes steps of the rounding noise of gradients that are truly zero
    return StageConfig(groups, GLOBAL_BATCH, max(1, GLOBAL_BATCH // size // 2), max_grad_norm=0.04, eps=1e-4)


def first_weights() -> dict[str, Tensor]:
    weights = {name: p.detach() for name, p in init_model(MODEL, 0).named_parameters()}
    return {name: torch.full_like(w, 0.5) if name.endswith(".gate") else w for name, w in weights.items()}


def opened(cell: Cell, world: World, folder: Path) -> Engine:
    model, stage = meta_model(MODEL), stage_of(world.size)
    groups = apply_trainable_groups(model, stage, model.unused_parameters())
    engine = open_engine(model, groups, stage, engine_config(cell, str(folder)), world, first_weights())
    list(engine.fragments())  # DeepSpeed's safe_get_full_* find moments only if they exist before the first step
    return engine


def my_batches(step: int, world: World) -> list[Batch]:
    share = GLOBAL_BATCH // world.size
    mine = data_of("ragged", step)[world.rank * share : (world.rank + 1) * share]
    return cut(mine, stage_of(world.size).accumulation(world.size))


def train(engine: Engine, world: World, steps: Sequence[int]) -> list[float]:
    return [engine.step(my_batches(step, world), lr_factor(step, STEPS, 0.3, 0.1)).loss for step in steps]


def whole(engine: Any) -> Iterator[tuple[str, Tensor]]:
    """Every master and moment, uncut, by FSDP2's and DeepSpeed's own ways, not by `fragments`. A collective."""
    for name, parameter in engine.model.named_parameters():
        if not parameter.requires_grad:
            continue
        if hasattr(engine, "engine"):  # DeepSpeed's
            state = {moment: safe_get_full_optimizer_state(parameter, moment) for moment in MOMENTS}
            state["master"] = safe_get_full_fp32_param(parameter)
        else:
            state = {moment: engine.optimizer.state[parameter][moment] for moment in MOMENTS}
            state["master"] = parameter.detach()
        for kind, tensor in state.items():
            yield f"{kind}/{name}", (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).flatten()


def save(world: World, cells: list[Cell], folder: Path) -> None:
    for cell in cells:
        engine = opened(cell, world, folder)
        train(engine, world, range(SAVED))
        path = folder / f"{cell.engine}@{world.size}"
        store = Checkpointer(path, world)
        store.save(SAVED, engine.fragments(), {"step": SAVED}, wait=True)
        state = {key: tensor.clone() for key, tensor in whole(engine)}
        source = Source(state, train(engine, world, range(SAVED, STEPS)))
        if world.is_main:
            torch.save(vars(source), path.with_name(f"{path.name}.source"))
            check_files(path / f"step_{SAVED:08d}", sum(map(len, state.values())), even=cell.engine in ("one", "ddp"))


def check_files(path: Path, total: int, even: bool) -> None:
    """Every number is written once, nothing frozen is, and ranks that hold the same share the work."""
    written = [sum(length for _, _, length in file["ranges"]) for file in StepCheckpoint(path).files.values()]
    assert sum(written) == total
    assert not even or max(written) - min(written) <= len(written)
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json"}


def resume(world: World, cells: list[Cell], folder: Path, share: int) -> dict[str, float | None]:
    """{"source to target": the largest relative difference of a loss}; bits are compared here.

    About one of `share` pairs goes on to train, the same ones each time; so do all of one engine and world.
    """
    sources = {path.stem: Source(**torch.load(path)) for path in sorted(folder.glob("*.source"))}
    found: dict[str, float | None] = {}
    for cell in cells:
        engine, target = opened(cell, world, folder), f"{cell.engine}@{world.size}"
        train(engine, world, [STEPS])  # so that moments and step counts are those of another run, too
        for index, (name, source) in enumerate(sources.items()):
            load(engine, Checkpointer(folder / name, world), source, pair := f"{name} to {target}")
            found[pair] = None
            if name == target or (index + crc32(target.encode())) % share == 0:
                losses = train(engine, world, range(SAVED, STEPS))
                found[pair] = max(abs(a / b - 1) for a, b in zip(losses, source.losses, strict=True))
        compare_whole(engine, store := Checkpointer(folder / name, world), source)
        store.load(folder / name / f"step_{SAVED:08d}", engine.fragments())
        engine.after_load(SAVED - 1)
        losses = train(engine, world, range(SAVED, STEPS))
        found[f"control on {target}"] = max(abs(a / b - 1) for a, b in zip(losses, source.losses, strict=True))
    return found


def load(engine: Engine, store: Checkpointer, source: Source, pair: str) -> None:
    """Load, and see that this rank's ranges have the source's bits and that all ranks' make up all of them."""
    path = store.latest()
    assert path is not None
    engine.after_load(int(store.load(path, engine.fragments())["step"]))
    reached = dict.fromkeys(source.state, 0)
    for fragment in engine.fragments():
        key, end = f"{fragment.kind}/{fragment.name}", fragment.offset + fragment.data.numel()
        assert torch.equal(fragment.data, source.state[key][fragment.offset : end]), f"{pair}: {key}"
        reached[key] += fragment.data.numel()
    copies = store.world.sum(*reached.values())
    assert all(n >= len(t) for n, t in zip(copies, source.state.values(), strict=True)), pair


def compare_whole(engine: Engine, store: Checkpointer, source: Source) -> None:
    load(engine, store, source, "for the engine's own view")
    for key, tensor in whole(engine):
        assert torch.equal(tensor, source.state[key]), key


def matrix(starts: Sequence[tuple[int, Sequence[str]]], precision: Any, folder: Path, share: int = 1) -> None:
    small_jsons(folder)
    cells = [(size, [Cell(name, precision=precision) for name in engines]) for size, engines in starts]
    for size, group in cells:
        ranks.run(save, size, group, folder)
    found: dict[str, float | None] = {}
    for size, group in cells:
        found |= ranks.run(resume, size, group, folder, share)[0]
    controls = {pair: found.pop(pair) for pair in list(found) if pair.startswith("control")}
    assert len(found) == len(controls) ** 2
    trained = {pair: value for pair, value in found.items() if value is not None}
    same = {pair: value for pair, value in trained.items() if pair.split(" to ")[0] == pair.split(" to ")[1]}
    print(
        f"{precision}: {len(found)} pairs bit for bit; losses of {len(trained)} within {max(trained.values()):.1e}, "
        f"with a step count off by one within {min(filter(None, controls.values())):.1e}"
    )
    assert len(same) == len(controls)
    assert not {pair: value for pair, value in trained.items() if value > BOUND[precision]}
    assert not {pair: value for pair, value in same.items() if value}, "the same engine and world go on bit for bit"
    if precision == "fp32":
        assert all(value and value > 10 * BOUND["fp32"] for value in controls.values()), "the bound tells a mistake"


def test_any_engine_and_world_goes_on_from_any_other(tmp_path: Path) -> None:
    matrix(SOME, "fp32", tmp_path, share=3)


@pytest.mark.slow  # in fp32 every time, above
def test_some_in_bf16(tmp_path: Path) -> None:
    matrix(FEW, "bf16", tmp_path)


@pytest.mark.slow  # ten minutes: every pair goes on to train
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_all_losses(tmp_path: Path, precision: str) -> None:
    matrix(STARTS, precision, tmp_path)


# ----------------------------------------------------------------------- moments taken over by the next stage


def carry(world: World, cells: list[Cell], folder: Path) -> list[tuple[list[float], list[float]]]:
    """Losses of a run, and of a next stage that trains the same with its moments; and what a larger stage counts."""
    found = []
    for cell in cells:
        engine, first = opened(cell, world, folder), folder / f"{cell.engine}@{world.size}"
        train(engine, world, range(SAVED))
        Checkpointer(first, world).save(SAVED, engine.fragments(), {"step": SAVED}, wait=True)
        uninterrupted = train(engine, world, range(SAVED, STEPS))
        same, _ = next_stage(cell, world, folder, first, stage_of(world.size))
        found.append((uninterrupted, train(same, world, range(SAVED, STEPS))))
        check_more(cell, world, folder, first)
    return found


def check_more(cell: Cell, world: World, folder: Path, first: Path) -> None:
    """A stage that also trains what is new to it resumes with both counts of steps, and hands both on."""
    stage = stage_of(world.size)
    layers = replace(stage.groups["language"], parameters=["language.model.layers.*", "language.model.embed_tokens.*"])
    stage = replace(stage, groups=stage.groups | {"language": layers})
    engine, moments = next_stage(cell, world, folder, first, stage)
    store = Checkpointer(folder / f"{first.name}, second", world)
    train(engine, world, [0])
    store.save(1, engine.fragments(), {"step": 1, **moments}, wait=True)
    expected = train(engine, world, [1])
    again, _ = next_stage(cell, world, folder, first, stage)
    store.load(store.directory / "step_00000001", again.fragments())
    again.after_load(1)
    assert train(again, world, [1]) == expected
    steps = OptimizerTransfer(store.directory).steps
    assert steps["projector.0.up.weight"] == steps["language.model.layers.1.mlp.up_proj.weight"] == SAVED + 1
    assert steps["language.model.layers.0.mlp.up_proj.weight"] == 1


def next_stage(cell: Cell, world: World, folder: Path, first: Path, stage: StageConfig) -> tuple[Engine, Any]:
    """An engine that begins where the checkpoint in `first` ends, with its moments; and what its checkpoints say."""
    moments, snapshot = OptimizerTransfer(first), StepCheckpoint(first / f"step_{SAVED:08d}")
    masters = {name: snapshot.master(name) for name in snapshot.masters()}
    model = meta_model(MODEL)
    groups = moments.divide(apply_trainable_groups(model, stage, model.unused_parameters()))
    engine = open_engine(model, groups, stage, engine_config(cell, str(folder)), world, first_weights() | masters)
    moments.fill(engine.fragments())
    return engine, moments.state(groups)


def test_the_next_stage_may_keep_moments(tmp_path: Path) -> None:
    small_jsons(tmp_path)
    for engines in (("fsdp", "zero2"), ("zero3",)):
        cells = [Cell(name) for name in engines]
        for uninterrupted, carried in ranks.run(carry, 2, cells, tmp_path)[0]:
            assert carried == uninterrupted
