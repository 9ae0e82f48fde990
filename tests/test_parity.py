"""Splitting a stage over ranks does not change it: every engine against a bare loop on the whole batch.

The oracle is twenty lines of PyTorch that share only the model with the engines. DeepSpeed's ZeRO-3 replaces
`torch.nn.functional.linear` for the whole process, so its cases have processes of their own.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from tiny import IMAGE, SIGLIP, language, samples
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hive_scale.batch import Batch, Sample, collate
from hive_scale.config import CheckpointingConfig, EngineConfig, GroupConfig, ModelConfig, PartConfig, StageConfig
from hive_scale.distributed import World
from hive_scale.engine import Engine, open_engine
from hive_scale.engine.memory import found, planned, report
from hive_scale.model.build import init_model, meta_model
from hive_scale.param_groups import apply_trainable_groups
from hive_scale.registry import FUSIONS
from hive_scale.schedule import lr_factor

STEPS = 6
GLOBAL_BATCH = 12
CLIP = 0.03  # below every gradient norm that is met
LOSS, WEIGHT = 2e-6, 2e-5  # fp32: relative difference of losses and norms; absolute difference of weights
DS_CONFIGS = Path(__file__).parents[1] / "ds_configs"
OTHERS = ("deepstack", "gated_cross_attention", "q_former")


@dataclass(frozen=True)
class Cell:
    engine: str
    stage: int = 3
    fusion: Any = "cross_attention"
    checkpointing: Any = "none"
    data: str = "ragged"
    precision: Any = "fp32"
    compile: bool = False

    @property
    def truth(self) -> tuple[int, str, str]:
        """What the numbers depend on."""
        return self.stage, self.fusion, self.data


@dataclass
class Outcome:
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)  # trained ones, fp32, whole
    forwards: dict[str, int] = field(default_factory=dict)  # of the probed module, per micro-batch of the first step
    graph: dict[str, bool] = field(default_factory=dict)  # whether the probed module's output had one


def matrix(*engines: str, whole: bool) -> list[Cell]:
    """All combinations; or a third of them: each stage, each fusion, with and without checkpointing."""
    cells = [Cell(*cell) for cell in product(engines, (1, 2, 3), ("cross_attention", "concat"), ("none", "full"))]
    few = [engine for engine in engines if engine in ("one", "fsdp", "zero2", "zero3")]
    if whole:
        cells += [Cell(engine, stage, "joint_attention", "full") for engine in few for stage in (1, 3)]
        return cells + [Cell(*cell) for cell in product(engines, (1, 2, 3), OTHERS, ("none", "full"))]
    kept = [(1, "cross_attention", "none"), (2, "concat", "full")]
    kept += [(3, "cross_attention", "full"), (3, "concat", "none")]
    cells = [one for one in cells if (one.stage, one.fusion, one.checkpointing) in kept]
    return cells + [Cell(engine, 3, fusion, "full") for engine in few for fusion in ("joint_attention", *OTHERS)]


def stage_of(number: int, fusion: str, size: int) -> StageConfig:
    new = list(FUSIONS[fusion].new_parameters)
    groups = {"connector": GroupConfig(new, 1e-2, 1e-3)}
    if number > 1:
        copies = list(FUSIONS[fusion].with_llm)
        groups["language"] = GroupConfig(["language.model.layers.*", "language.model.norm.*", *copies], 3e-3, 1e-3)
    if number > 2:
        groups["vision"] = GroupConfig(["vision.*"], 1e-3, 1e-3)
        groups["embeddings"] = GroupConfig(["language.model.embed_tokens.*"], 2e-3)
    micro_batch = max(1, GLOBAL_BATCH // size // 2)
    # Some true gradients are zero (a bias of keys): with a small eps Adam makes steps of their rounding noise
    return StageConfig(groups, GLOBAL_BATCH, micro_batch, max_steps=STEPS, max_grad_norm=CLIP, eps=1e-4)


@cache
def model_of(fusion: Any) -> ModelConfig:
    vision = PartConfig(config=SIGLIP | {"num_hidden_layers": 3})
    llm = PartConfig(config=language(num_hidden_layers=3))
    few = {"num_query_tokens": 5, "num_query_layers": 2}
    return ModelConfig(vision=vision, language=llm, fusion=fusion, encoder_layer_ratio=0.67, **few)


@cache
def weights_of(fusion: str) -> dict[str, Tensor]:
    weights = {name: p.detach().clone() for name, p in init_model(model_of(fusion), 0).named_parameters()}
    # open gates, or most of the first gradients would be zero
    return {name: torch.full_like(w, 0.5) if name.endswith(".gate") else w for name, w in weights.items()}


def data_of(kind: str, step: int) -> list[Sample]:
    half = GLOBAL_BATCH // 2
    if kind == "text on one rank":
        return samples(GLOBAL_BATCH, step, text_only=half)
    if kind == "long on one rank":
        return samples(half, step, longest=5) + samples(half, step + 100, longest=60)
    return samples(GLOBAL_BATCH, step)


def cut(whole: list[Sample], number: int) -> list[Batch]:
    size = len(whole) // number
    return [collate(whole[i * size : (i + 1) * size], 0, IMAGE) for i in range(number)]


def factor(step: int) -> float:
    return lr_factor(step, STEPS, 0.3, 0.1)


def oracle(number: int, fusion: str, data: str) -> Outcome:
    """A bare loop over whole batches, one parameter per optimizer group."""
    model, outcome = init_model(model_of(fusion), 0), Outcome()
    stage = stage_of(number, fusion, 1)
    groups = apply_trainable_groups(model, stage, model.unused_parameters())
    parameters = dict(model.named_parameters())
    for name, weight in weights_of(fusion).items():
        parameters[name].data.copy_(weight)
    trained = [(parameters[name], group) for group in groups for name in group.parameters]
    optimizer = torch.optim.AdamW([{"params": [p]} for p, _ in trained], betas=stage.betas, eps=stage.eps)
    for step in range(STEPS):
        (batch,) = cut(data_of(data, step), 1)
        loss = model(**batch.inputs()) / batch.num_tokens
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_([p for p, _ in trained], stage.max_grad_norm)
        for settings, (_, group) in zip(optimizer.param_groups, trained, strict=True):
            settings.update(lr=group.lr * factor(step), weight_decay=group.weight_decay)
        optimizer.step()
        optimizer.zero_grad()
        outcome.losses.append(loss.item())
        outcome.norms.append(float(norm))
    outcome.weights = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return outcome


def engine_config(cell: Cell, folder: str) -> EngineConfig:
    modes = CheckpointingConfig(*[cell.checkpointing] * 3)
    config = EngineConfig(cell.precision, checkpointing=modes, compile=cell.compile)
    if cell.engine.startswith("zero"):
        return replace(config, ds_config=str(Path(folder, f"{cell.engine}.json")))
    name, _, how = cell.engine.partition(", ")
    changes: dict[str, dict[str, bool]] = {
        "kept gathered": {"reshard_after_forward": False},
        "kept between": {"reshard_after_backward": False},
        "synced": {"sync_each_micro_batch": True},
        "offload": {"cpu_offload": True},
    }
    return replace(config, shard_size={"ddp": 1, "hsdp": 2}.get(name, 0), **changes.get(how, {}))


def small_jsons(folder: Path) -> None:
    """The shipped JSONs with sizes at which a tiny model, too, fills buckets and is really cut up."""
    for path in DS_CONFIGS.glob("*.json"):
        settings = json.loads(path.read_text())
        zero = settings["zero_optimization"]
        for key in zero:
            if key.endswith(("bucket_size", "live_parameters", "reuse_distance")):
                zero[key] = 20_000
        if zero["stage"] == 3:
            zero["stage3_param_persistence_threshold"] = 1000  # vectors stay whole
        (folder / path.name).write_text(json.dumps(settings))
        if path.stem in ("zero1", "zero2", "zero3"):
            (folder / f"{path.stem}_reduced.json").write_text(
                json.dumps(settings | {"communication_data_type": "bf16"})
            )
        if zero["stage"] == 3:
            zero["zero_hpz_partition_size"] = 2
            (folder / f"{path.stem}_second.json").write_text(json.dumps(settings))


def opened(cell: Cell, world: World, folder: str) -> tuple[Engine, Any]:
    model = meta_model(model_of(cell.fusion))
    stage = stage_of(cell.stage, cell.fusion, world.size)
    groups = apply_trainable_groups(model, stage, model.unused_parameters())
    weights = weights_of(cell.fusion)
    return open_engine(model, groups, stage, engine_config(cell, folder), world, weights), model


def my_batches(cell: Cell, step: int, world: World) -> list[Batch]:
    whole, share = data_of(cell.data, step), GLOBAL_BATCH // world.size
    number = stage_of(cell.stage, cell.fusion, world.size).accumulation(world.size)
    return cut(whole[world.rank * share : (world.rank + 1) * share], number)


# Modules inside the first blocks: run again where a block is recomputed, without a graph where all is frozen
PROBES = {
    "vision": "vision.encoder.layers.0.self_attn.q_proj",
    "fusion": "projector.0.up",
    "language": "language.model.layers.0.self_attn.q_proj",
}


def probe(model: nn.Module, outcome: Outcome, fusion: str) -> list[Any]:
    """Count the forwards of PROBES into `outcome`, until the handles that this returns are removed."""
    probes = PROBES | ({"fusion": "projector.0.query_norm"} if fusion == "q_former" else {})

    def count(component: str, _module: Any, _inputs: Any, output: Tensor) -> None:
        outcome.forwards[component] = outcome.forwards.get(component, 0) + 1
        outcome.graph[component] = outcome.graph.get(component, False) or output.requires_grad

    return [
        model.get_submodule(name).register_forward_hook(partial(count, component)) for component, name in probes.items()
    ]


def check_held(engine: Any, model: nn.Module) -> None:
    """Frozen parameters have neither gradient nor moments; what is held is what was planned, but for padding."""
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {fragment.name for fragment in engine.fragments()} <= trained
    plan, real = planned(engine), found(engine)
    for component, want in plan.items():
        have = real[component]
        assert have.gradients == (want.gradients if getattr(engine, "masters", None) else 0)  # these sums are kept
        if engine.layout.parameter_ranks == 1:
            assert have.parameters == want.parameters
        if not want.optimizer:
            assert have.optimizer == 0
    share = sum(part.optimizer for part in real.values()) / sum(part.optimizer for part in plan.values())
    assert 0.9 < share < 1.1
    assert all(component in report(engine) for component in plan)


def train(world: World, cells: list[Cell], folder: str) -> list[Outcome]:
    return [train_one(world, cell, folder) for cell in cells]


def train_one(world: World, cell: Cell, folder: str) -> Outcome:
    engine, model = opened(cell, world, folder)
    outcome, training = Outcome(), list[bool]()
    handles = [] if cell.compile else probe(model, outcome, cell.fusion)
    for step in range(STEPS):
        batches = my_batches(cell, step, world)
        output = engine.step(batches, factor(step))
        for handle in handles:
            handle.remove()
        if step == 0:
            outcome.forwards = {name: count // len(batches) for name, count in outcome.forwards.items()}
        outcome.losses.append(output.loss)
        outcome.norms.append(output.grad_norm)
        if step == 2:  # looking changes nothing, and knows no dropout
            look = model.register_forward_pre_hook(lambda module, _: training.append(module.training))
            engine.evaluate(batches)
            look.remove()
            assert not any(training)
            assert model.training
            assert all(fragment.data.is_contiguous() for fragment in engine.fragments())  # and all can be saved
    check_held(engine, model)
    mine = [(f.name, f.shape, f.offset, f.data.clone()) for f in engine.fragments() if f.kind == "master"]
    everyone: list[Any] = [None] * world.size
    dist.all_gather_object(everyone, mine)
    for name, shape, offset, data in (part for parts in everyone for part in parts):
        whole = outcome.weights.setdefault(name, torch.full(shape, torch.nan))
        whole.view(-1)[offset : offset + len(data)] = data
    return outcome


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("ds_configs")
    small_jsons(path)
    return str(path)


@cache
def truth(number: int, fusion: str, data: str) -> Outcome:
    torch.set_num_threads(1)
    return oracle(number, fusion, data)


def differences(cell: Cell, found: Outcome) -> tuple[float, float, float]:
    """Largest relative difference of losses, of norms, and absolute difference of weights, from the oracle's."""
    expected = truth(*cell.truth)
    assert found.weights.keys() == expected.weights.keys()
    assert min(expected.norms) > CLIP, "clipping must be active"
    losses = max(abs(a / b - 1) for a, b in zip(found.losses, expected.losses, strict=True))
    norms = max(abs(a / b - 1) for a, b in zip(found.norms, expected.norms, strict=True))
    weights = max(float((w - found.weights[name]).abs().max()) for name, w in expected.weights.items())
    return losses, norms, weights


def check_work(cell: Cell, found: Outcome) -> None:
    """Frozen parts run once and without a graph; what is checkpointed and has one runs twice."""
    if cell.compile:
        return
    below_fusion = not FUSIONS[cell.fusion].lengthens_sequence  # the first LLM layer comes before any image
    graph = {"vision": cell.stage == 3, "fusion": True, "language": cell.stage > 1 or not below_fusion}
    again = cell.checkpointing != "none"
    assert found.graph == graph, cell
    assert found.forwards == {name: 2 if again and graph[name] else 1 for name in graph}, cell


def check(cells: list[Cell], size: int, folder: str, bounds: tuple[float, float, float] = (LOSS, LOSS, WEIGHT)) -> None:
    outcomes = ranks.run(train, size, cells, folder)[0]
    found = {cell: differences(cell, outcome) for cell, outcome in zip(cells, outcomes, strict=True)}
    for cell, outcome in zip(cells, outcomes, strict=True):
        check_work(cell, outcome)
    worst = tuple(max(values) for values in zip(*found.values(), strict=True))
    print(f"{len(cells)} cells on {size} ranks: loss {worst[0]:.1e}, norm {worst[1]:.1e}, weight {worst[2]:.1e}")
    wrong = {
        cell: value for cell, value in found.items() if not all(v <= b for v, b in zip(value, bounds, strict=True))
    }
    assert not wrong, "\n".join(f"{cell}: {value}" for cell, value in wrong.items())


ODD = [Cell("", data="text on one rank"), Cell("", data="long on one rank"), Cell("", checkpointing="selective")]


def odd(*engines: str) -> list[Cell]:
    return [replace(cell, engine=engine) for engine in engines for cell in ODD]


either = pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["pairs", "whole"])


@either
def test_one_process(folder: str, whole: bool) -> None:
    check(matrix("one", whole=whole) + odd("one"), 1, folder)


@either
def test_ddp_and_fsdp(folder: str, whole: bool) -> None:
    variants = [Cell(f"fsdp, {how}") for how in ("kept gathered", "kept between", "synced", "offload")]
    variants += [Cell(f"fsdp, {how}", 1, checkpointing="full") for how in ("kept between", "synced", "offload")]
    check([*matrix("ddp", "fsdp", whole=whole), *odd("ddp", "fsdp"), *variants], 2, folder)


@either
def test_hsdp(folder: str, whole: bool) -> None:
    check([*matrix("hsdp", whole=whole), Cell("hsdp, synced"), Cell("hsdp, kept between", 2)], 4, folder)


@either
def test_zero_1_and_2(folder: str, whole: bool) -> None:
    cells = matrix(*(("zero1", "zero2", "zero2_offload") if whole else ("zero2",)), whole=whole)
    check(
        cells + odd("zero2") + [Cell(engine, checkpointing="full") for engine in ("zero1", "zero2_offload")], 2, folder
    )


@either
def test_zero_3(folder: str, whole: bool) -> None:
    cells = matrix(*(("zero3", "zero3_offload") if whole else ("zero3",)), whole=whole)
    check(cells + odd("zero3") + [Cell("zero3_offload", checkpointing="full")], 2, folder)


class MatmulCount(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return func(*args, **(kwargs or {}))


def matmuls(world: World, engine: str, folder: str) -> list[int]:
    """How many a step takes without checkpointing, with selective, and with full."""
    counts = []
    for checkpointing in ("none", "selective", "full"):
        cell = Cell(engine, checkpointing=checkpointing)
        opened_engine, _ = opened(cell, world, folder)
        with MatmulCount() as mode:
            opened_engine.step(my_batches(cell, 0, world), 1.0)
        counts.append(mode.count)
    return counts


@pytest.mark.parametrize("engine", ["fsdp", "zero3"])
def test_selective_checkpointing_recomputes_no_matmul(engine: str, folder: str) -> None:
    none, selective, full = ranks.run(matmuls, 2, engine, folder)[0]
    assert none == selective < full


BF16 = (2e-4, 1e-2, 5e-3)  # bf16 compute against the fp32 oracle


def bf16(*engines: str) -> list[Cell]:
    return [Cell(engine, stage, checkpointing="full", precision="bf16") for engine in engines for stage in (1, 3)]


def test_bf16(folder: str) -> None:
    check(bf16("ddp", "fsdp", "zero1", "zero2", "zero2_offload"), 2, folder, BF16)


def test_bf16_zero_3(folder: str) -> None:
    check([*bf16("zero3", "zero3_offload"), Cell("zero3_reduced", precision="bf16")], 2, folder, BF16)


def test_gradients_reduced_in_bf16(folder: str) -> None:
    check([Cell(engine, precision="bf16") for engine in ("zero1_reduced", "zero2_reduced")], 2, folder, BF16)


@either
def test_zero_3_with_a_second_copy_in_each_node(folder: str, whole: bool) -> None:
    cells = [Cell("zero3_second"), Cell("zero3_second", 1, checkpointing="full")]
    check(cells + odd("zero3_second") * whole, 4, folder)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp", "zero2", "zero3"])
def test_bf16_of_other_fusions(engine: str, folder: str) -> None:
    check([Cell(engine, 3, fusion, "full", precision="bf16") for fusion in OTHERS], 2, folder, BF16)


def test_compiled_blocks(folder: str) -> None:
    check([Cell("one", checkpointing="full", compile=True)], 1, folder)


@pytest.mark.slow
def test_compiled_blocks_of_other_fusions(folder: str) -> None:
    check([Cell("one", fusion=fusion, checkpointing="full", compile=True) for fusion in OTHERS], 1, folder)


@pytest.mark.slow  # compiling for the first time takes minutes on two cores
def test_compiled_blocks_on_two_ranks(folder: str) -> None:
    check([Cell(engine, checkpointing="full", compile=True) for engine in ("fsdp", "zero2")], 2, folder)


def test_three_ranks(folder: str) -> None:
    check([Cell("fsdp"), Cell("ddp"), Cell("zero2")], 3, folder)
