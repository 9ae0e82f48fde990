"""The plan of compiled blocks: what torch's compiler spares is what a whole compiled model is seen to save less."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from test_plan import run_config, stage_of

from hive_scale.batch import Sample, collate
from hive_scale.config import CheckpointingConfig, StageConfig
from hive_scale.engine.activation_checkpointing import blocks_of
from hive_scale.model.build import init_model
from hive_scale.param_groups import apply_trainable_groups
from hive_scale.plan.compiled import GRAPHS
from hive_scale.plan.devices import GPUS
from hive_scale.plan.memory import StageProfile, examine, measure
from hive_scale.plan.run import Machine, plan_run

LENGTH, SAMPLES = 12, 8


def saved(fusion: str, stage: StageConfig, backend: str) -> int:
    """Bytes that a real model of float32 saves in a forward, its blocks compiled by `backend`; "": not compiled."""
    torch.compiler.reset()
    model = init_model(tiny.model_config(fusion), 0)
    apply_trainable_groups(model, stage, model.unused_parameters())
    for block in blocks_of(model) if backend else ():
        block.compile(backend=backend)
    tokens = torch.randint(3, tiny.VOCABULARY, (SAMPLES, LENGTH)).tolist()
    targets = [False] + [True] * (LENGTH - 1)
    blank = torch.zeros(3, tiny.IMAGE, tiny.IMAGE, dtype=torch.uint8)
    batch = collate([Sample(str(i), blank, text, targets) for i, text in enumerate(tokens)], 0, tiny.IMAGE)
    own = {one.untyped_storage().data_ptr() for one in model.parameters()}
    held: dict[int, Any] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(**batch.inputs())
    return sum(tensor.untyped_storage().nbytes() for tensor in held.values())


def profiles(fusion: str, stage: StageConfig, **changes: Any) -> tuple[StageProfile, StageProfile]:
    """As it is, and compiled."""
    config = run_config(fusion, **changes)
    return examine(config, stage, LENGTH), examine(config, stage, LENGTH, compiled=True)


def at_the_turn(facts: StageProfile) -> float:
    """Bytes per sample that are alive when the last block's forward has ended."""
    at = max(event.at for event in facts.trace.events if event.kind == "forward end" and ".layers." in event.name)
    return facts.trace.per_sample[at]


@pytest.mark.parametrize(
    ("fusion", "name", "backend"),
    [
        pytest.param("cross_attention", "joint", GRAPHS, marks=pytest.mark.slow),
        ("cross_attention", "projector", GRAPHS),
        pytest.param("concat", "language", GRAPHS, marks=pytest.mark.slow),
        # the graphs are those that the compiler builds: what it would take minutes to build them is left out above
        pytest.param("cross_attention", "joint", "inductor", marks=pytest.mark.slow),
    ],
)
def test_what_is_spared_is_what_a_compiled_model_saves_less(fusion: str, name: str, backend: str) -> None:
    stage = stage_of(fusion, name, global_batch=8, micro_batch=4)
    plain, compiled = profiles(fusion, stage)
    found = at_the_turn(plain) - at_the_turn(compiled)
    less = (saved(fusion, stage, "") - saved(fusion, stage, backend)) / SAMPLES
    assert less > 10_000
    assert found == pytest.approx(less, rel=0.03)


def test_the_plan_of_compiled_blocks_is_lower_and_computes_the_same() -> None:
    stage = stage_of("cross_attention", "joint", global_batch=8, micro_batch=4)
    plain, compiled = profiles("cross_attention", stage)
    peaks = [measure(facts, run_config().engine, {}, 1, 4, 2).peak for facts in (plain, compiled)]
    assert peaks[1] < peaks[0]
    assert plain.trace.flops == compiled.trace.flops
    assert min(compiled.trace.per_sample) >= 0
    full = CheckpointingConfig("full", "full", "full")
    recomputed, both = profiles("cross_attention", stage, checkpointing=full)
    assert recomputed.trace.per_sample == both.trace.per_sample
    run = replace(run_config(compile="auto"), stages={"joint": stage})
    found = [plan_run(run, Machine(GPUS[name], 1), 1000)[0].memory.peak for name in ("a100-40", "mi300x")]
    assert found[0] < found[1], "by default, on NVIDIA's GPUs alone"
