"""Plan a run before it is launched: memory, FLOPs and time. Needs no GPU, no weights and no data."""

from __future__ import annotations

import argparse
import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hive_scale.cli import Parser, add_run_arguments, count, named_run
from hive_scale.exit_codes import ended
from hive_scale.locate import command_name
from hive_scale.strict_json import dumps

if TYPE_CHECKING:
    from hive_scale.config import Config
    from hive_scale.plan.devices import Gpu
    from hive_scale.plan.run import Machine, StagePlan

EXAMPLES = """\
examples:
  python launchers/plan.py --preset paper_siglip --world 8 --gpu a100-80
  python launchers/plan.py --preset paper_siglip --stage joint --world 2 engine.shard_size=1 fusion=concat
  python launchers/plan.py --preset rtx3090 --ds_config ds_configs/rtx3090.json
  python launchers/plan.py --preset paper_siglip --gpu rtx3090 --fit            the fastest settings that fit
  python launchers/plan.py --preset paper_siglip --gpu h100 --sweep 1,8,64,512  scaling, as a table and sweep.png
  python launchers/plan.py --preset paper_siglip --json

Exit codes: 0 planned (and fits), 1 planned and does not fit, 2 something to change.
"""
DEFAULT_GPU = "rtx3090"  # on machines without one
CC3M = 595_375  # pairs of LLaVA-CC3M-Pretrain-595K, the paper's training set


def main() -> int:
    arguments = _parse()
    return ended(lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> int:
    from hive_scale.plan.devices import find

    if arguments.gpu:
        find(arguments.gpu)  # a mistake is answered before torch is imported, which takes long
    config = named_run(arguments, arguments.overrides)
    from hive_scale.plan.run import Machine

    host = arguments.host_gb * 1e9 if arguments.host_gb else None
    machine = Machine(_gpu(arguments), arguments.world, host)
    if arguments.sweep:
        return _sweep(config, machine, arguments)
    return _plan(config, machine, arguments)


def _gpu(arguments: argparse.Namespace) -> Gpu:
    """The GPU that is named or described; else this machine's, else the default."""
    from hive_scale.plan.devices import described, find, gpu_here

    named = find(arguments.gpu) if arguments.gpu else None
    figures = arguments.gpu_memory_gb, arguments.gpu_tflops, arguments.gpu_bandwidth_gb_s
    return described(named, *figures) or gpu_here() or find(DEFAULT_GPU)


def _plan(config: Config, machine: Machine, arguments: argparse.Namespace) -> int:
    from hive_scale.plan.fit import fit
    from hive_scale.plan.run import plan_run

    words: list[str] = []
    if arguments.stage:
        if arguments.stage not in config.stages:
            raise ValueError(f"--stage {arguments.stage}: there is no such stage: there are {', '.join(config.stages)}")
        config = replace(config, stages={arguments.stage: config.stages[arguments.stage]})
    if arguments.fit:
        found = fit(config, machine, arguments.samples, arguments.spare_gb * 1e9)
        config, plans, words = found.config, found.plans, found.words()
    else:
        plans = plan_run(config, machine, arguments.samples)
    if arguments.json:
        stages = [plan.to_dict() for plan in plans]
        print(dumps({"gpu": machine.gpu.title, "stages": stages, "settings": words}, indent=2))
    else:
        print(_report(plans, machine, arguments))
        if short := [plan.stage for plan in plans if not plan.fits]:
            print(f"{', '.join(short)}: more memory than there is. --fit finds settings that fit.")
        if config.engine.precision == "bf16" and not machine.gpu.has_bf16:
            print(f"The {machine.gpu.title} has no bf16: the plan is at its fp32 speed. Set engine.precision=fp32.")
        if words:
            given = [*_named(arguments), *_kept(arguments, words)]
            print(f"\n  {command_name('pretrain')} {shlex.join([*given, *words])}")
    return 0 if all(plan.fits for plan in plans) else 1


def _named(arguments: argparse.Namespace) -> list[str]:
    """The options that name the run, as they were given."""
    named = {name: getattr(arguments, name) for name in ("preset", "config", "ds_config", "ds_config_owned")}
    return [word for name, value in named.items() if value for word in (f"--{name}", str(value))]


def _kept(arguments: argparse.Namespace, words: list[str]) -> list[str]:
    """The words given by the user, but for those that `words` replace."""
    replaced = {word.split("=")[0] for word in words}
    return [word for word in arguments.overrides if word.split("=")[0] not in replaced]


def _report(plans: list[StagePlan], machine: Machine, arguments: argparse.Namespace) -> str:
    """Format a Markdown table with one column per stage, readable in a terminal and in a README."""
    rows = [["", *(plan.stage for plan in plans)], ["---", *("---:" for _ in plans)]]
    for component in plans[0].components:
        rows.append([f"{component}: trained / frozen, M", *(_pair(plan.components[component]) for plan in plans)])
    for title, read in _lines(machine):
        rows.append([title, *(read(plan) for plan in plans)])
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(_cell(cell, width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    hours = sum(plan.hours for plan in plans) + max(plan.seeing for plan in plans) / 3600
    gpu = f"{machine.world} x {machine.gpu.title} (--gpu)"
    lines.append(
        f"\n{gpu}, {arguments.samples:,} pairs (--samples): {hours:.1f} hours in all. Memory is planned; time is an "
        "estimate (see plan/time.py)."
    )
    return "\n".join(lines)


def _cell(cell: str, width: int) -> str:
    return cell.ljust(width) if not cell.endswith("-:") else cell.rjust(width, "-")


def _pair(numbers: tuple[int, int]) -> str:
    return " / ".join(f"{number / 1e6:.1f}" for number in numbers)


def _lines(machine: Machine) -> list[tuple[str, Any]]:
    from hive_scale.plan.run import checkpoint_seconds

    def gb(size: float) -> str:
        return f"{size / 1e9:.2f}"

    def held(what: str) -> Any:
        return lambda plan: gb(plan.memory.moment.held.get(what, 0.0))

    return [
        ("micro-batch x accumulation", lambda plan: f"{plan.micro_batch} x {plan.accumulation}"),
        ("GPUs that share one copy", lambda plan: str(plan.engine.shard_size or machine.world)),
        ("gathered between micro-batches", lambda plan: "no" if plan.engine.reshard_after_backward else "yes"),
        ("parameters, GB per GPU", lambda plan: gb(plan.memory.parameters)),
        ("masters, GB", lambda plan: gb(plan.memory.masters)),
        ("moments, GB", lambda plan: gb(plan.memory.moments)),
        ("on the host, GB", lambda plan: gb(plan.memory.on_host)),
        ("of it pinned, for checkpoints, GB", lambda plan: gb(plan.memory.staging)),
        ("at the worst moment: gradients, GB", held("gradients")),
        ("gathered parameters, GB", held("gathered")),
        ("communication buffers, GB", held("buffers")),
        ("activations and batch, GB", lambda plan: gb(plan.memory.moment.activations + plan.memory.batch)),
        ("peak, GB", lambda plan: gb(plan.memory.peak)),
        ("which is in the", lambda plan: plan.memory.moment.where),
        ("fits, with GB to spare", lambda plan: f"{'yes' if plan.fits else 'NO'}, {gb(plan.spare)}"),
        ("forward, GFLOP per sample", lambda plan: f"{plan.flops['forward'] / 1e9:.1f}"),
        ("backward", lambda plan: f"{plan.flops['backward'] / 1e9:.1f}"),
        ("recomputed", lambda plan: f"{plan.flops['recompute'] / 1e9:.1f}"),
        ("step, s", lambda plan: f"{plan.time.total:.2f}"),
        ("of it update, s", lambda plan: f"{plan.time.updating:.2f}"),
        ("sent per GPU and step, GB", lambda plan: gb(plan.time.volume.sent)),
        ("in s, overlapped", lambda plan: f"{plan.time.communicating:.2f}"),
        ("features read in s, overlapped", lambda plan: f"{plan.time.reading:.2f}" if plan.seeing else "-"),
        ("samples/s", lambda plan: f"{plan.samples / plan.time.total:.0f}"),
        ("MFU", lambda plan: f"{plan.mfu:.0%}"),
        ("steps", lambda plan: str(plan.steps)),
        ("hours", lambda plan: f"{plan.hours:.2f}"),
        ("a checkpoint, GB", lambda plan: gb(plan.checkpoint)),
        ("written in s, beside training", lambda plan: f"{checkpoint_seconds(plan, machine):.0f}"),
        ("feature_cache takes, GB", lambda plan: gb(plan.features) if plan.features else "-"),
        ("filled in hours, once", lambda plan: f"{plan.seeing / 3600:.2f}" if plan.seeing else "-"),
    ]


def _sweep(config: Config, machine: Machine, arguments: argparse.Namespace) -> int:
    from hive_scale.plan.sweep import draw, limit, sweep

    try:
        worlds = [int(part) for part in arguments.sweep.split(",")]
    except ValueError:
        raise ValueError(f"--sweep {arguments.sweep}: give worlds as numbers, such as 1,8,64") from None
    stage = arguments.stage or list(config.stages)[-1]
    points = sweep(config, stage, machine.gpu, worlds, arguments.samples)
    if arguments.json:
        print(dumps(points, indent=2))
        return 0
    print("| engine | scaling | GPUs | samples/s | efficiency | step, s | sent, GB | peak, GB |\n|" + " --- |" * 8)
    for point in points:
        print(
            f"| {point['engine']} | {point['scaling']} | {point['world']} | {point['samples_per_second']:.0f} | "
            f"{point['efficiency']:.0%} | {point['step']:.2f} | {point['sent'] / 1e9:.2f} | {point['peak'] / 1e9:.2f} |"
        )
    path = Path(arguments.output)
    draw(points, f"{config.name}, {stage}, {machine.gpu.title}", machine.gpu, path)
    if said := limit(points, config.stages[stage].global_batch, stage):
        print(f"\n{said}")
    print(f"\ndrawn in {path}")
    return 0


def _parse() -> argparse.Namespace:
    parser = Parser(description=__doc__, epilog=EXAMPLES)
    add_run_arguments(parser)
    parser.add_argument("--stage", help="this stage only")
    parser.add_argument("--world", type=int, default=1, help="GPUs (default 1)")
    parser.add_argument(
        "--gpu", metavar="NAME", help=f"such as rtx4090, a100-80, l40s, h100-pcie (this machine's, else {DEFAULT_GPU})"
    )
    for name, help in (
        ("memory_gb", "memory of a GPU that --gpu does not know, 1e9 bytes"),
        ("tflops", "its dense matrix products a second, in the precision of the run"),
        ("bandwidth_gb_s", "the bandwidth of its memory"),
    ):
        parser.add_argument(f"--gpu_{name}", type=float, metavar="N", help=help)
    parser.add_argument("--host_gb", type=float, help="host memory per GPU, 1e9 bytes, for offload and checkpoints")
    parser.add_argument(
        "--samples", type=count, default=CC3M, help=f"pairs of the training set, such as 60k or 3M (default {CC3M})"
    )
    parser.add_argument("--fit", action="store_true", help="find the fastest settings that fit")
    parser.add_argument("--spare_gb", type=float, default=0.0, help="with --fit: leave so much free (default 0)")
    parser.add_argument("--sweep", metavar="WORLDS", help="scaling over these numbers of GPUs, such as 1,8,64,512")
    parser.add_argument("--output", default="sweep.png", help="with --sweep: where to draw it (sweep.png)")
    parser.add_argument("--json", action="store_true", help="print as JSON, in bytes and seconds")
    return parser.parse_args()  # overrides may come anywhere among the options
