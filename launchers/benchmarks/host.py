"""What the host does in one optimizer step: CPU milliseconds and operators, on one process.

The models have the paper's depth and a width of 32, so that arithmetic costs nothing. On a fast GPU, this is what a
step of small micro-batches takes. The contenders are our engine, a bare loop (bf16 parameters, float32 masters, one
foreach addition per micro-batch), and FSDP2 applied to each block as torchtitan does.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from statistics import median
from time import process_time
from typing import TYPE_CHECKING, Any

from benchmarks.table import describe_machine, show, spread

if TYPE_CHECKING:
    from hive_scale.batch import Batch
    from hive_scale.config import Config, StageConfig
    from hive_scale.distributed import World

HELP = "CPU time and operators of a step on the host"
MICRO_BATCHES, SAMPLES, LENGTH = 4, 2, 20
BARE = "bare loop, bf16"


def configure(parser: argparse.ArgumentParser) -> None:
    stages = ("projector", "language", "joint")
    parser.add_argument("--stages", nargs="+", choices=stages, default=stages)


def run(arguments: argparse.Namespace) -> None:
    import torch

    from hive_scale.distributed import session

    torch.set_num_threads(1)
    rows = []
    with session() as world:
        for name in arguments.stages:
            steps = dict(contenders(name, world, layers=4 if arguments.quick else 0))
            rows += [[name, *row] for row in measure(steps, arguments.rounds)]
    columns = ("stage", "contender", "CPU, ms", "of the bare loop", "quartiles", "operators")
    show(columns, rows, f"{describe_machine()}; one thread, {MICRO_BATCHES} micro-batches", arguments.markdown)


def measure(steps: dict[str, Callable[[], Any]], rounds: int) -> Iterator[list[str]]:
    """Time all contenders in turns; the first two rounds are a warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 2):
        for name, step in steps.items():
            began = process_time()
            step()
            if number > 1:
                seconds[name].append(process_time() - began)
    for name, step in steps.items():
        ratios = [own / bare for own, bare in zip(seconds[name], seconds[BARE], strict=True)]
        yield [
            name,
            f"{1e3 * median(seconds[name]):.0f}",
            f"{median(ratios):.2f}",
            spread(ratios),
            f"{operators(step):,}",
        ]


def operators(step: Callable[[], Any]) -> int:
    """Number of operators that a step calls, those that operators call in turn left out."""
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    return sum(
        event.name.startswith("aten::") and not (event.cpu_parent and event.cpu_parent.name.startswith("aten::"))
        for event in profile.events()
    )


def contenders(stage_name: str, world: World, layers: int = 0) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield (name, a step) of each contender; `layers` shortens encoder and LLM."""
    config = narrow(layers)
    stage = replace(config.stages[stage_name], global_batch=MICRO_BATCHES * SAMPLES, micro_batch=SAMPLES)
    batches = [make_batch(number) for number in range(MICRO_BATCHES)]
    for precision in ("bf16", "fp32"):
        engine = opened(config, stage, precision, world)
        yield f"hive_scale, {precision}", lambda engine=engine: engine.step(batches, 1.0)
    yield BARE, bare_loop(config, stage, batches)
    yield "FSDP2 of each block, bf16", fsdp2(config, stage, batches)


def narrow(layers: int) -> Config:
    """The paper's model with widths of 32, and its depth or `layers`."""
    from hive_scale import presets

    config = presets.load("paper_siglip", None, [])
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    sizes |= {"num_hidden_layers": layers} if layers else {}
    vision = {**config.model.vision.config, **sizes, "image_size": 32, "patch_size": 8}
    language = {**config.model.language.config, **sizes, "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 128}
    parts = {"vision": replace(config.model.vision, path="", config=vision)}
    parts["language"] = replace(config.model.language, path="", config=language)
    return replace(config, model=replace(config.model, **parts))


def make_batch(seed: int) -> Batch:
    import torch

    from hive_scale.batch import Sample, collate

    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (SAMPLES, 3, 32, 32), generator=generator, dtype=torch.uint8)
    tokens = torch.randint(2, 128, (SAMPLES, LENGTH), generator=generator).tolist()
    samples = [Sample(str(i), pixels[i], tokens[i], [False] + [True] * (LENGTH - 1)) for i in range(SAMPLES)]
    return collate(samples, 0, 32)


def opened(config: Config, stage: StageConfig, precision: Any, world: World) -> Any:
    from hive_scale.engine import open_engine
    from hive_scale.model.build import for_stage, init_model

    model, groups = for_stage(config.model, stage)
    weights = {name: one.detach() for name, one in init_model(config.model, 0).named_parameters()}
    return open_engine(model, groups, stage, replace(config.engine, precision=precision, compile=False), world, weights)


def frozen_for(config: Config, stage: StageConfig) -> Any:
    """The stage's model with real weights, in float32."""
    from hive_scale.model.build import init_model
    from hive_scale.param_groups import apply_trainable_groups

    model = init_model(config.model, 0)
    apply_trainable_groups(model, stage, model.unused_parameters())
    return model


def bare_loop(config: Config, stage: StageConfig, batches: list[Batch]) -> Callable[[], float]:
    import torch

    model = frozen_for(config, stage)
    trained = [one for one in model.parameters() if one.requires_grad]
    masters = [one.detach().clone() for one in trained]
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    for master in masters:
        master.grad = torch.zeros_like(master)
    sums = [master.grad for master in masters if master.grad is not None]
    optimizer = torch.optim.AdamW(masters, lr=1e-4, fused=True)
    count = sum(batch.num_tokens for batch in batches)

    def step() -> float:
        total = torch.zeros(())
        for batch in batches:
            loss = model(**batch.inputs())
            loss.backward()
            total += loss.detach()
            torch._foreach_add_(sums, [one.grad for one in trained])
            for one in trained:
                one.grad = None
        torch._foreach_div_(sums, count)
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        torch._foreach_copy_([one.data for one in trained], masters)
        torch._foreach_zero_(sums)
        return total.item()

    return step


def fsdp2(config: Config, stage: StageConfig, batches: list[Batch]) -> Callable[[], float]:
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model = frozen_for(config, stage)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    options: dict[str, Any] = {"mesh": init_device_mesh("cpu", (1,)), "mp_policy": policy}
    for part in model.blocks().values():
        for block in part:
            fully_shard(block, **options)
    fully_shard(model, **options)
    for block in model.blocks()["vision"]:  # FSDP2 fails if a frozen block is never reached
        block.unshard()
        block.reshard()
    trained = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    count = sum(batch.num_tokens for batch in batches)

    def step() -> float:
        total = torch.zeros(())
        for number, batch in enumerate(batches):
            model.set_requires_gradient_sync(number == len(batches) - 1)
            loss = model(**batch.inputs()) / count
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return total.item()

    return step
