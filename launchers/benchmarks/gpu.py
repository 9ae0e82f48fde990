"""One GPU at full size: every stage of both fusions, eager and compiled, at the micro-batches that are planned to fit.

Each case trains in a process of its own, on random images and captions of the recipe's length, through the engine that
`pretrain.py` uses. The table has the time of a step, MFU and HFU, and the planner's errors. A second table repeats the
preset rtx3090 within 24 GB. A third says whether losses are those of float32 on the CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import TYPE_CHECKING, Any

from benchmarks.table import describe_machine, show, this_device
from benchmarks.task import from_scratch
from benchmarks.workers import LAUNCHER
from hive_scale.strict_json import dumps

if TYPE_CHECKING:
    from hive_scale.config import Config
    from hive_scale.distributed import World
    from hive_scale.plan.devices import Gpu

HELP = "one GPU at full size: time, MFU and memory of every stage beside their plan"
STAGES, FUSIONS = ("projector", "language", "joint"), ("cross_attention", "concat")
CAP = 24e9  # bytes of an RTX 3090
ACCUMULATION, WARM, PARITY = 2, 2, 20  # micro-batches of a step; steps before the clock; steps of the comparison
BOUND = {"fp32": 1e-4, "bf16": 2e-2}  # relative difference of losses from those of float32 on the CPU
PREFIX = {True: "compiled", False: "eager"}


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", default="paper_siglip", help="the model (paper_siglip)")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--fusions", nargs="+", choices=FUSIONS, default=FUSIONS)
    parser.add_argument("--minutes", type=float, default=8.0, help="begin no case after so many (8)")
    parser.add_argument("--worker", nargs=2, metavar=("CASE", "FILE"), help=argparse.SUPPRESS)


def run(arguments: argparse.Namespace) -> int:
    if arguments.worker:
        _work(json.loads(arguments.worker[0]), Path(arguments.worker[1]))
        return 0
    began, rounds = perf_counter(), 2 if arguments.quick else arguments.rounds
    common = {"quick": arguments.quick, "rounds": rounds}
    cases = [
        {"kind": "speed", "preset": arguments.preset, "fusion": fusion, "stage": stage, "compile": compiled, **common}
        for stage in arguments.stages
        for fusion in arguments.fusions
        for compiled in (False, True)
        if not (arguments.quick and compiled)
    ]
    cases += [
        {"kind": "cap", "preset": "rtx3090", "fusion": FUSIONS[0], "stage": stage, "compile": False, **common}
        for stage in arguments.stages
    ]
    cases += [{"kind": "parity", "precision": precision, **common} for precision in BOUND]
    rows: list[dict[str, Any]] = []
    for case in sorted(cases, key=lambda case: case["kind"] != "parity"):  # what is wrong is known first
        if (perf_counter() - began) / 60 > arguments.minutes:
            print(f"no time left for {dumps(case)}", file=sys.stderr)
            continue
        rows.append(case | _launch(case))
        print(dumps(rows[-1]), file=sys.stderr, flush=True)
    machine = f"{describe_machine()}; {rounds} steps each; {(perf_counter() - began) / 60:.1f} minutes"
    for kind, what in (("speed", arguments.preset), ("cap", "rtx3090 within 24 GB")):
        found = [_row(row) for row in rows if row["kind"] == kind]
        columns = ("stage", "fusion", "blocks", "micro-batch", "s/step", "planned", "samples/s", "MFU", "HFU")
        show([*columns, "peak, GB", "planned", "error"], found, f"{what}; {machine}", arguments.markdown)
    compared = [row for row in rows if row["kind"] == "parity"]
    table = [[row["precision"], row.get("worst", row.get("failed", "")), str(row.get("agrees"))] for row in compared]
    show(("precision", "worst difference of a loss", "within bounds"), table, f"{PARITY} steps", arguments.markdown)
    return int(not all(row.get("agrees", row["kind"] != "parity") and "failed" not in row for row in rows))


def _row(row: dict[str, Any]) -> list[str]:
    first = [row["stage"], row["fusion"], PREFIX[row["compile"]]]
    if "failed" in row:
        return [*first, row["failed"], *["-"] * 8]
    return [
        *(*first, str(row["micro_batch"]), f"{row['seconds']:.3f}", f"{row['planned_seconds']:.3f}"),
        *(
            f"{row['samples'] / row['seconds']:.0f}",
            *(f"{row[name]:.1%}" if row[name] else "-" for name in ("mfu", "hfu")),
        ),
        *(f"{row['peak'] / 1e9:.2f}", f"{row['planned'] / 1e9:.2f}", f"{row['planned'] / row['peak'] - 1:+.1%}"),
    ]


def _launch(case: dict[str, Any]) -> dict[str, Any]:
    """What a process of its own finds; a case that fails does not end the others."""
    with TemporaryDirectory() as folder:
        result = Path(folder, "row.json")
        command = [sys.executable, str(LAUNCHER), "gpu", "--worker", dumps(case), str(result)]
        done = subprocess.run(command, env=dict(os.environ), capture_output=True, text=True, check=False)
        if not result.exists():
            return {"failed": (done.stderr.strip().splitlines() or ["no word"])[-1][:200]}
        found: dict[str, Any] = json.loads(result.read_text())
        return found


# -- one case --------------------------------------------------------------------------------------------------


def _work(case: dict[str, Any], result: Path) -> None:
    from hive_scale.distributed import session

    with session() as world:
        found = _parity(case, world) if case["kind"] == "parity" else _speed(case, world)
    result.write_text(dumps(found))


def _speed(case: dict[str, Any], world: World) -> dict[str, Any]:
    """Seconds and peak bytes of a step, and the plan of both."""
    import torch

    from hive_scale.engine.compilation import is_compiled
    from hive_scale.plan.devices import peak_flops
    from hive_scale.plan.flops import estimate
    from hive_scale.plan.memory import examine, measure
    from hive_scale.plan.time import step_time

    config = _config(case, world)
    (stage,) = config.stages.values()
    is_gpu = world.device.type == "cuda"
    if case["kind"] == "cap" and is_gpu:
        torch.cuda.set_per_process_memory_fraction(CAP / torch.cuda.get_device_properties(world.device).total_memory)
    compiled = is_compiled(config.engine, world.device.type)
    facts = examine(config, stage, config.data.max_tokens, compiled=compiled)
    sizes = world.size, stage.micro_batch, stage.accumulation(world.size)
    planned = measure(facts, config.engine, {}, *sizes)
    time = step_time(facts, config.engine, {}, _gpu(world), *sizes)
    engine, batches = _opened(config, world)
    for _ in range(WARM):
        engine.step(batches, 1.0)
    if is_gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(case["rounds"]):
        began = perf_counter()
        engine.step(batches, 1.0)  # ends when loss and norm were read, behind all kernels but the update's
        seconds.append(perf_counter() - began)
    work = estimate(config.model, stage, config.engine.checkpointing)
    assert work is not None
    total = [work.total(len(batch), batch.tokens.shape[1], batch.num_tokens) for batch in batches]
    rate = peak_flops(world.device, config.engine.precision)
    used = {
        which: rate and sum(getattr(one, kind) for one in total) / median(seconds) / rate
        for which, kind in (("mfu", "model"), ("hfu", "hardware"))
    }
    return used | {
        "micro_batch": stage.micro_batch,
        "samples": stage.global_batch,
        "seconds": median(seconds),
        "planned_seconds": time.total,
        # on a CPU that of the whole process, for a trial of this script
        "peak": torch.cuda.max_memory_allocated() if is_gpu else 1024 * getrusage(RUSAGE_SELF).ru_maxrss,
        "planned": planned.peak,
    }


def _config(case: dict[str, Any], world: World) -> Config:
    """The preset from random weights, with one stage, at the micro-batch that is planned to fit."""
    from hive_scale.plan.fit import fit
    from hive_scale.plan.run import Machine

    preset = "debug" if case["quick"] else case["preset"]
    config = from_scratch(preset, [f"fusion={case['fusion']}"])
    engine = replace(config.engine, compile=case["compile"])
    stages = {case["stage"]: config.stages[case["stage"]]}
    config = replace(config, engine=engine, stages=stages)
    if case["kind"] == "speed" and not case["quick"]:
        config = fit(config, Machine(_gpu(world), 1), 600_000).config
    (stage,) = config.stages.values()
    stage = replace(stage, global_batch=ACCUMULATION * stage.micro_batch)
    return replace(config, stages={case["stage"]: stage}, engine=replace(config.engine, compile=case["compile"]))


def _gpu(world: World) -> Gpu:
    from hive_scale.plan.devices import find, this_gpu

    return this_gpu(world.device) or find("rtx3090")  # on a CPU, for a trial of this script


def _opened(config: Config, world: World, seed: int = 0) -> tuple[Any, list[Any]]:
    """The engine of the config's only stage, and the micro-batches of a step."""
    import torch

    from hive_scale.batch import Sample, collate
    from hive_scale.engine import open_engine
    from hive_scale.model import build

    (stage,) = config.stages.values()
    random, side = torch.Generator().manual_seed(seed), build.image_size(config.model)
    vocabulary, length = config.model.language.config["vocab_size"], config.data.max_tokens

    def sample() -> Sample:
        pixels = torch.randint(0, 256, (3, side, side), dtype=torch.uint8, generator=random)
        tokens = torch.randint(3, vocabulary, (length,), generator=random).tolist()
        return Sample("", pixels, tokens, [False] + [True] * (length - 1))

    batches = [
        collate([sample() for _ in range(stage.micro_batch)], 0, side) for _ in range(stage.accumulation(world.size))
    ]
    weights = {name: one.detach() for name, one in build.init_model(config.model, seed=0).named_parameters()}
    model, groups = build.for_stage(config.model, stage)
    return open_engine(model, groups, stage, config.engine, world, weights), batches


def _parity(case: dict[str, Any], world: World) -> dict[str, Any]:
    """Losses of a small model here, in the case's precision, beside those of float32 on the CPU."""
    import torch

    config = from_scratch("debug", [])
    stage = replace(config.stages["joint"], global_batch=16, micro_batch=8)
    config = replace(config, stages={"joint": stage})
    losses = []
    for place, precision in ((torch.device("cpu"), "fp32"), (this_device(), case["precision"])):
        engine_config = replace(config.engine, precision=precision, compile=False)
        engine, batches = _opened(replace(config, engine=engine_config), replace(world, device=place))
        losses.append([engine.step(batches, 1.0).loss for _ in range(PARITY)])
    worst = max(abs(b / a - 1) for a, b in zip(*losses, strict=True))  # not finite if a loss is not
    return {"worst": f"{worst:.1e}", "agrees": worst <= BOUND[case["precision"]]}
