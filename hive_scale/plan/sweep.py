"""Planned scaling to more GPUs: at a fixed global batch (strong), or at a fixed batch per GPU (weak)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hive_scale.config import Config, EngineConfig
from hive_scale.engine.compilation import would_compile
from hive_scale.plan.choose import choose
from hive_scale.plan.devices import Gpu
from hive_scale.plan.memory import examine, measure
from hive_scale.plan.run import Machine
from hive_scale.plan.time import LATENCY, step_time

# ZeRO with the settings of the shipped JSON files, as far as scaling depends on them
ENGINES: dict[str, dict[str, Any]] = {
    "DDP": {},
    "FSDP2": {},
    "HSDP": {},
    "ZeRO-2": {"stage": 2, "reduce_bucket_size": 50_000_000, "overlap_comm": True},
    "ZeRO-3": {
        "stage": 3,
        "reduce_bucket_size": 50_000_000,
        "stage3_prefetch_bucket_size": 20_000_000,
        "stage3_param_persistence_threshold": 10_000,
        "stage3_max_live_parameters": 100_000_000,
        "stage3_max_reuse_distance": 100_000_000,
    },
}


EFFICIENT = 0.8  # samples/s per GPU, as a share of the smallest world's, below which more GPUs do not pay


def sweep(config: Config, stage_name: str, gpu: Gpu, worlds: Sequence[int], num_samples: int) -> list[dict[str, Any]]:
    """Return one point per engine, kind of scaling and world: rates, memory, and efficiency relative to the first
    world.

    Weak scaling keeps the samples per GPU at those of the smallest world. Strong scaling ends where a GPU would have
    less than one sample. Raises ValueError for an unknown stage and for an invalid world.
    """
    if stage_name not in config.stages:
        raise ValueError(f"--stage {stage_name}: there is no such stage: there are {', '.join(config.stages)}")
    stage = config.stages[stage_name]
    plain = replace(config, engine=replace(config.engine, ds_config="", shard_size=0))
    num_tokens = config.data_of(stage_name).max_tokens
    facts = {False: examine(plain, stage, num_tokens, compiled=would_compile(plain.engine, gpu.compiles))}
    facts[True] = examine(plain, stage, num_tokens, saves_inputs=True)
    points = []
    for title, zero in ENGINES.items():
        for scaling in ("weak", "strong"):
            base = None
            for world in sorted(worlds):
                machine = Machine(gpu, world)  # raises ValueError for an invalid world
                batch = stage.global_batch if scaling == "strong" else stage.global_batch * world // min(worlds)
                if batch % world:
                    continue
                micro_batch = max(n for n in range(1, stage.micro_batch + 1) if batch // world % n == 0)
                accumulation = batch // world // micro_batch
                engine = _engine(plain.engine, title, world, gpu)
                if facts[False].refusal(stage, replace(engine, ds_config=title if zero else ""), world):
                    continue
                if not zero:
                    engine = choose(engine, facts[False], machine.ranks, micro_batch, accumulation)
                arguments = facts[zero.get("stage") == 3], engine, zero
                time = step_time(*arguments, gpu, world, micro_batch, accumulation)
                memory = measure(*arguments, world, micro_batch, accumulation)
                rate = batch / time.total
                base = base or rate / world
                points.append(
                    {
                        "engine": title,
                        "scaling": scaling,
                        "world": world,
                        "samples_per_second": rate,
                        "efficiency": rate / world / base,
                        "step": time.total,
                        "sent": time.volume.sent,
                        "peak": memory.peak,
                    }
                )
    return points


def _engine(engine: EngineConfig, title: str, world: int, gpu: Gpu) -> EngineConfig:
    """`engine` with the sharding that `title` names; HSDP shards inside a node, and replicates over nodes."""
    return replace(engine, shard_size={"DDP": 1, "HSDP": min(world, gpu.per_node)}.get(title, world))


def limit(points: Sequence[dict[str, Any]], global_batch: int, stage: str) -> str:
    """How far the stage's own global batch scales, and what to do beyond.

    "" if it scales to all of `points`, or can be divided among the GPUs of none.
    """
    strong = [point for point in points if point["scaling"] == "strong"]
    good = [point for point in strong if point["efficiency"] >= EFFICIENT]
    best = max(good, key=lambda point: (point["world"], point["samples_per_second"]), default=None)
    if best is None or best["world"] == max(point["world"] for point in points):
        return ""
    return (
        f"A global batch of {global_batch} keeps {EFFICIENT:.0%} of its efficiency to {best['world']} GPUs "
        f"({best['engine']}, {best['step']:.2f} s a step). Beyond, raise stages.{stage}.global_batch, with its "
        "learning rate, or run several runs beside each other."
    )


def draw(points: Sequence[dict[str, Any]], title: str, gpu: Gpu, path: Path) -> None:
    """Plot samples per second against GPUs on logarithmic axes, weak beside strong, with the assumptions below."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5), layout="constrained")
    for axes, scaling in zip(figure.subplots(1, 2, sharey=True), ("weak", "strong"), strict=True):
        for engine in ENGINES:
            line = [point for point in points if point["engine"] == engine and point["scaling"] == scaling]
            worlds = [point["world"] for point in line]
            axes.loglog(worlds, [point["samples_per_second"] for point in line], marker="o", label=engine)
        first = next((point for point in points if point["scaling"] == scaling), None)
        if first:
            worlds = sorted({point["world"] for point in points})
            ideal = [first["samples_per_second"] * world / first["world"] for world in worlds]
            axes.loglog(worlds, ideal, linestyle=":", color="grey", label="ideal")
        axes.set(title=f"{scaling} scaling", xlabel="GPUs", ylabel="samples/s")
        axes.legend()
    figure.suptitle(title)
    figure.supxlabel(
        f"planned: products at 60 % of peak, memory at 80 %; rings, overlapped, at {gpu.link / 1e9:.0f} GB/s inside a "
        f"node of {gpu.per_node} and {gpu.network / 1e9:.0f} GB/s between nodes, {LATENCY * 1e6:.0f} us a collective",
        fontsize=8,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
