"""An adapter is trained alike by every engine, alone is in step checkpoints, and is part of the weights at the end.

The oracle is a bare loop that shares only the plain model with the package, and writes W + (alpha / rank) B A itself.
"""
# ruff: noqa: F811 - fixtures of other modules

from __future__ import annotations

from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from peft import PeftModel
from test_parity import Cell, check_held, cut, data_of, engine_config, factor, folder, model_of, weights_of  # noqa: F401
from test_train import small, some_pairs, world  # noqa: F401
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization
from transformers import AutoModelForCausalLM

from hive_scale.checkpoint.format import StepCheckpoint, steps_in
from hive_scale.checkpoint.weights import read_weights
from hive_scale.config import AdapterConfig, Config, GroupConfig, StageConfig
from hive_scale.distributed import World
from hive_scale.engine import open_engine
from hive_scale.exit_codes import Stopped
from hive_scale.export import export_run
from hive_scale.model import build
from hive_scale.model.adapters import AdaptedWeights
from hive_scale.observability.metrics import read_metrics
from hive_scale.pipeline import run_pipeline
from hive_scale.preflight import open_data

STEPS, BATCH, SEED = 4, 12, 7
TARGETS = ["language.*_proj", "vision.*.fc1"]
Found = tuple[list[float], dict[str, Tensor]]


def stage_of(kind: str, size: int) -> StageConfig:
    groups = {
        "new": GroupConfig(["projector.*", "fusion.*"], 1e-2),
        "parts": GroupConfig(["language.*", "vision.*"], 2e-2, 1e-3),
    }
    micro, adapter = BATCH // size // 2, AdapterConfig(kind, rank=3, alpha=6, targets=TARGETS)
    return StageConfig(groups, BATCH, micro, max_steps=STEPS, eps=1e-4, seed=SEED, adapter=adapter)


class Written(nn.Module):
    """W + 2 B A; with magnitudes, its rows have these lengths (no gradient passes the division: Liu et al., 4.3)."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.named = nn.ParameterDict({name.replace(".", "/"): nn.Parameter(one) for name, one in tensors.items()})

    def forward(self, weight: Tensor) -> Tensor:
        (down,), (up,) = ([one for name, one in self.named.items() if part in name] for part in ("lora_A", "lora_B"))
        changed = weight + 2 * up @ down
        magnitude = next((one for name, one in self.named.items() if "magnitude" in name), None)
        if magnitude is None:
            return changed
        return magnitude[:, None] * changed / changed.norm(dim=1, keepdim=True).detach()


def oracle(kind: str) -> Found:
    config, stage = model_of("cross_attention"), stage_of(kind, 1)
    adapted, groups = build.for_stage(config, stage)
    assert adapted.adapted
    drawn = AdaptedWeights(adapted.adapted, weights_of("cross_attention"), SEED)
    model = build.init_model(config, 0)
    for name, parameter in model.named_parameters():
        parameter.data.copy_(weights_of("cross_attention")[name])
    trained = {}
    for layer in adapted.adapted.layers:
        tensors = {name: drawn[name].clone() for name in adapted.adapted.added if name.startswith(f"{layer}.")}
        written = Written(tensors)
        register_parametrization(model.get_submodule(layer), "weight", written)
        trained |= {name.replace("/", "."): one for name, one in written.named.items()}
    plain = dict(model.named_parameters())
    names = [name for group in groups for name in group.parameters]
    trained |= {name: plain[name] for name in names if name not in trained}
    rates = {name: (group.lr, group.weight_decay) for group in groups for name in group.parameters}
    assert trained.keys() == rates.keys()
    optimizer = torch.optim.AdamW([{"params": [one]} for one in trained.values()], betas=stage.betas, eps=stage.eps)
    losses = []
    for step in range(STEPS):
        (batch,) = cut(data_of("ragged", step), 1)
        loss = model(**batch.inputs()) / batch.num_tokens
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(trained.values()), stage.max_grad_norm)
        for settings, name in zip(optimizer.param_groups, trained, strict=True):
            rate, decay = rates[name]
            settings.update(lr=rate * factor(step), weight_decay=decay)
        optimizer.step()
        model.zero_grad()
        losses.append(loss.item())
    return losses, {name: one.detach() for name, one in trained.items()}


def train(world: World, cells: list[Cell], kinds: list[str], folder: str) -> list[Found]:
    return [train_one(world, cell, kind, folder) for cell in cells for kind in kinds]


def train_one(world: World, cell: Cell, kind: str, folder: str) -> Found:
    stage = stage_of(kind, world.size)
    model, groups = build.for_stage(model_of("cross_attention"), stage)
    assert model.adapted
    given = AdaptedWeights(model.adapted, weights_of("cross_attention"), SEED)
    engine = open_engine(model, groups, stage, engine_config(cell, folder), world, given)
    losses, share = [], BATCH // world.size
    for step in range(STEPS):
        mine = data_of("ragged", step)[world.rank * share : (world.rank + 1) * share]
        losses.append(engine.step(cut(mine, stage.accumulation(world.size)), factor(step)).loss)
    check_held(engine, model)
    pieces: list[Any] = [None] * world.size
    dist.all_gather_object(
        pieces, [(one.name, one.shape, one.offset, one.data) for one in engine.fragments() if one.kind == "master"]
    )
    whole: dict[str, Tensor] = {}
    for name, shape, offset, data in (piece for each in pieces for piece in each):
        whole.setdefault(name, torch.full(shape, torch.nan)).view(-1)[offset : offset + len(data)] = data
    return losses, whole


@pytest.mark.parametrize(
    ("engines", "size", "kinds"),
    [
        (["one"], 1, ["lora", "dora"]),
        (["ddp", "fsdp", "fsdp, offload"], 2, ["lora", "dora"]),
        (["zero2"], 2, ["lora", "dora"]),
        (["zero3"], 2, ["lora", "dora"]),
    ],
    ids=["one", "native", "zero2", "zero3"],
)
def test_every_engine_trains_it_as_a_bare_loop_does(
    folder: str,
    engines: list[str],
    size: int,
    kinds: list[str],
) -> None:
    cells = [Cell(engine, checkpointing=mode) for engine, mode in zip(engines, ("full", "none", "none"), strict=False)]
    expected = {kind: oracle(kind) for kind in kinds}
    for i, (losses, weights) in enumerate(ranks.run(train, size, cells, kinds, folder)[0]):
        kind = kinds[i % len(kinds)]
        assert losses == pytest.approx(expected[kind][0], rel=2e-6), (kind, cells[i // len(kinds)])
        assert weights.keys() == expected[kind][1].keys()
        for name, one in weights.items():
            torch.testing.assert_close(one, expected[kind][1][name], rtol=0, atol=2e-5, msg=f"{kind} {cells} {name}")


def test_bf16(folder: str) -> None:
    cells = [Cell(engine, precision="bf16") for engine in ("ddp", "fsdp")]
    for losses, _ in ranks.run(train, 2, cells, ["lora"], folder)[0]:
        assert losses == pytest.approx(oracle("lora")[0], rel=1e-3)


def adapted_run(output: Path, **changes: Any) -> Config:
    """Three stages; the last trains an adapter of the LLM, and the rest as it is."""
    config = small(output, steps=4, save_interval=2)
    joint = replace(config.stages["joint"], adapter=AdapterConfig(**{"rank": 2, "alpha": 8} | changes))
    return replace(config, stages=config.stages | {"joint": joint})


@pytest.fixture(scope="module", params=["lora", pytest.param("dora", marks=pytest.mark.slow)])
def run(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, world: World, some_pairs: None
) -> Config:
    config = adapted_run(tmp_path_factory.mktemp("adapted") / "run", kind=request.param)
    run_pipeline(config, world)
    return config


def test_checkpoints_hold_the_adapter_and_what_else_is_trained(run: Config) -> None:
    masters = StepCheckpoint(steps_in(run.run_dir / "joint")[-1]).masters()
    of_llm = {name for name in masters if name.startswith("language.")}
    assert of_llm
    assert all(".lora_" in name for name in of_llm)
    assert {name.split(".")[0] for name in masters} == {"language", "vision", "projector", "fusion"}


def test_the_weights_at_its_end_are_a_plain_model_with_the_loss_that_was_logged(run: Config, world: World) -> None:
    before, after = (read_weights(run.run_dir / stage) for stage in ("language", "joint"))
    assert before.keys() == after.keys()
    changed = {name for name in before if name.startswith("language.") and not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if fnmatchcase(name, "language.*_proj.weight")}
    model = build.load_model(run.model, after)
    heldout = open_data(run, "joint").heldout
    assert heldout is not None
    losses, tokens = 0.0, 0
    for batch in heldout.every(batch_size=4, world=world):
        with torch.no_grad():
            losses, tokens = losses + float(model(**batch.inputs())), tokens + batch.num_tokens
    logged = read_metrics(run.run_dir / "joint" / "metrics.jsonl")[-1]["eval_loss"]
    assert losses / tokens == pytest.approx(logged, rel=1e-5)


def test_stock_peft_reads_it_and_merges_it_to_the_same_llm(run: Config, tmp_path: Path) -> None:
    export_run("llm", run.run_dir, tmp_path / "before", stage="language")
    export_run("llm", run.run_dir, tmp_path / "after")
    export_run("adapter", run.run_dir, tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "before")
    merged = PeftModel.from_pretrained(base, str(tmp_path / "adapter" / "language")).merge_and_unload().state_dict()
    for name, tensor in AutoModelForCausalLM.from_pretrained(tmp_path / "after").state_dict().items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


def test_a_stopped_stage_goes_on_to_the_same_end(run: Config, world: World, tmp_path: Path) -> None:
    config = replace(run, output=str(tmp_path / "run"))

    class Stop(Exception):
        pass

    class Callback:
        def on_stage(self, stage: Any) -> None: ...

        def on_evaluate(self, stage: Any, metrics: Any) -> None: ...

        def on_checkpoint(self, stage: Any, checkpoint: Path) -> None: ...

        def on_step(self, stage: Any, output: Any) -> None:
            if stage.name == "joint" and stage.at.step == 1:
                stage.preemption.request()

    with pytest.raises(Stopped):
        run_pipeline(config, world, callbacks=[Callback()])
    run_pipeline(config, world)
    ours, theirs = (read_weights(one.run_dir / "joint") for one in (config, run))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    ("changes", "groups", "message"),
    [
        (
            {"targets": ["language.*.query"]},
            None,
            r"'language\.\*\.query' matches no linear layer .*language\.\*\.q_proj",
        ),
        ({"targets": ["language.lm_head"]}, None, "matches no linear layer of a block"),
        ({"kind": "lorra"}, None, "there is no adapter 'lorra': did you mean lora"),
        ({}, {"projector": GroupConfig(["projector.*"], 1e-3)}, "no group of the stage trains language.*lora_A"),
        ({}, {"norms": GroupConfig(["language.model.norm.*"], 1e-3)}, "group norms would train nothing"),
        ({"rank": 0}, None, "set both to 1 or more"),
        ({"rank": 64}, None, r"rank=64 is more than the \d+ of language\."),
    ],
)
def test_what_is_wrong_is_said_before_training(
    tmp_path: Path,
    changes: dict[str, Any],
    groups: dict[str, GroupConfig] | None,
    message: str,
) -> None:
    def opened() -> None:
        config = adapted_run(tmp_path / "run", **changes)
        stage = config.stages["joint"]
        build.for_stage(config.model, replace(stage, groups=groups or stage.groups))

    with pytest.raises(ValueError, match=message):
        opened()


def test_a_stage_without_an_adapter_has_none_to_export(run: Config, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="stage language has no adapter: those with one are joint"):
        export_run("adapter", run.run_dir, tmp_path / "adapter", stage="language")
