#!/usr/bin/env python
"""Reproduce the paper's comparison of Base, self-attention and HIVE: pre-train, probe, fine-tune with an LLM."""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

if TYPE_CHECKING:
    from collections.abc import Sequence

    from launchers.reproduction.paper import Row, Trial
    from launchers.reproduction.scales import Scale

EXAMPLES = """\
examples:
  python launchers/reproduce.py --scale small              about 160 minutes on two cores
  python launchers/reproduce.py --scale small --seeds 1    a third of it, without deviations
  python launchers/reproduce.py --scale paper --world 8 --gpu h100     the commands of Tables 1 and 2, with hours
  python launchers/reproduce.py --scale paper --submit --profile one_node slurm.account=vision
  python launchers/reproduce.py --scale paper --submit --dry_run       without a Slurm in reach
  python launchers/reproduce.py --study fusions            one choice varied, at equal steps and at equal FLOPs
  python launchers/reproduce.py --study density --scale paper --gpu h100

Studies: fusions, depths (which of the encoder's layers), density (how many of them).
The small scale needs 50 GB of disk and, under --data: smollm2, emoji (--styles all), tuxpaint, fashion_mnist and
easyvqa (not for studies), each by launchers/prepare_data.py. The same command again goes on where it stopped. --submit
hands the paper's runs to slurm/submit_pipeline.py, which takes the profile and the slurm.* words (slurm.gpu=h100: with
hours). Exit codes: 0 done, 2 something to change.
"""


def main() -> int:
    from hive_scale.exit_codes import ended

    arguments = _parse()
    return ended(lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> int:
    if arguments.scale != "paper" and (arguments.submit or arguments.words):
        raise ValueError(f"--submit and slurm.* words are for --scale paper: {arguments.scale} runs here")
    if arguments.scale == "paper":
        from launchers.reproduction.paper import ROWS, trials

        rows = trials(arguments.study) if arguments.study else ROWS
        return _submit(rows, arguments) if arguments.submit else _paper(rows, arguments)
    return _study(arguments) if arguments.study else _reproduce(arguments)


def _paper(rows: Sequence[Row | Trial], arguments: argparse.Namespace) -> int:
    """Print every command, with the planner's hours of what it trains."""
    from hive_scale.plan.devices import find
    from hive_scale.plan.run import Machine

    machine, whole = Machine(find(arguments.gpu), arguments.world), 0.0
    launch = "python" if machine.world == 1 else f"torchrun --nproc_per_node {machine.world}"
    for row in rows:
        planned = row.hours(machine)
        whole += sum(planned.values())
        print(f"\n# {row.method}, {row.family}")
        for what, command in row.commands(launch):
            print(f"# {what}{f': {planned[what]:.1f} h' if what in planned else ''}\n{command}")
    print(
        f"\n# {whole:.0f} h of training on {machine.world} x {machine.gpu.title}, by the planner: estimates; texts of"
    )
    print("# fine-tuning taken to have 512 tokens. Probes and benchmarks come on top.")
    return 0


def _submit(rows: Sequence[Row | Trial], arguments: argparse.Namespace) -> int:
    """Submit every run to Slurm; stop at the first that is refused and return its exit code."""
    more = ["--dry_run"] * arguments.dry_run + ["--profile", arguments.profile] * bool(arguments.profile)
    for row in rows:
        words = row.submission()
        if not words:
            [(_, command)] = row.commands("python")
            print(f"\n# {row.method}, {row.family}: nothing to train; probe it yourself:\n{command}", flush=True)
            continue
        line = [sys.executable, "slurm/submit_pipeline.py", *words, *more, *arguments.words]
        print(f"\n# {row.method}, {row.family}\n{shlex.join(['python', *line[1:]])}", flush=True)
        if code := subprocess.run(line, cwd=ROOT, check=False).returncode:
            return code
    return 0


def _reproduce(arguments: argparse.Namespace) -> int:
    from hive_scale.strict_json import dumps
    from launchers.reproduction.phases import Phases
    from launchers.reproduction.scales import SCALES
    from launchers.reproduction.steps import run
    from launchers.reproduction.table import collect, markdown

    data, output = arguments.data.resolve(), (arguments.output or Path("runs/reproduce")).resolve()
    scale = SCALES[arguments.scale](data)
    _check(scale, [*_pretraining_data(scale), data / "easyvqa"])
    seeds = arguments.seeds or scale.seeds
    _write_settings(output, scale)
    _write(output / "vlm.json", scale.vlm)
    for steps in Phases(scale, data, output).all(seeds):
        run(steps, output / "steps", arguments.jobs)
    made = collect(output, seeds, list(scale.probe))
    (output / "figures.json").write_text(dumps(made, indent=1) + "\n")
    table = markdown(made, f"{scale.note}; {seeds} seed{'s' * (seeds > 1)}")
    (output / "table.md").write_text(table)
    print(table)
    return 0


def _study(arguments: argparse.Namespace) -> int:
    from hive_scale.strict_json import dumps
    from launchers.reproduction.scales import STUDY_SCALES
    from launchers.reproduction.steps import run
    from launchers.reproduction.studies import Study, arms
    from launchers.reproduction.study_table import collect, draw, markdown

    data, output = arguments.data.resolve(), (arguments.output or Path("runs", arguments.study)).resolve()
    scale = STUDY_SCALES[arguments.scale](data)
    _check(scale, _pretraining_data(scale))
    seeds = arguments.seeds or scale.seeds
    _write_settings(output, scale)
    study = Study(scale, data, output, arms(arguments.study, "demo", output / "pretrain.json", num_samples=0))
    for steps in study.all(seeds):
        run(steps, output / "steps", arguments.jobs)
    rows = collect(study, seeds)
    (output / "figures.json").write_text(dumps(rows, indent=1) + "\n")
    draw(rows, study, output / "figures.png")
    table = markdown(rows, study.arms, f"{scale.note}; {seeds} seed{'s' * (seeds > 1)}")
    (output / "table.md").write_text(table)
    print(table)
    return 0


def _write_settings(output: Path, scale: Scale) -> None:
    output.mkdir(parents=True, exist_ok=True)
    pretrain = scale.pretrain | {"model": scale.pretrain["model"] | {"vision": {"config": scale.encoder}}}
    _write(output / "encoder.json", scale.encoder)
    _write(output / "pretrain.json", pretrain)


def _pretraining_data(scale: Scale) -> list[Path]:
    tokenizer = scale.pretrain["data"]["tokenizer"]["path"]
    paths = [] if tokenizer == "bytes" else [Path(tokenizer)]
    return paths + [Path(one).parent for one in scale.pretrain["data"]["train"] if not one.startswith("sample:")]


def _check(scale: Scale, paths: Sequence[Path]) -> None:
    """Raise ValueError now for missing data, instead of after an hour."""
    for path in (*(Path(words[1]) for words in scale.probe.values()), *paths):
        if not path.is_dir():
            raise ValueError(f"{path} is not there: make it with launchers/prepare_data.py (see its --help)")


def _write(path: Path, content: Any) -> None:
    from hive_scale.strict_json import dumps

    text = dumps(content, indent=1) + "\n"
    if path.exists() and path.read_text() != text:
        raise ValueError(f"{path.parent} holds a reproduction with other settings: give another --output")
    path.write_text(text)


def _parse() -> argparse.Namespace:
    from hive_scale.cli import Parser

    parser = Parser(description=__doc__, epilog=EXAMPLES)
    parser.add_argument("--scale", choices=("smoke", "small", "paper"), default="small", help="(default small)")
    parser.add_argument(
        "--study", choices=("fusions", "depths", "density"), help="one choice varied, instead of Tables 1, 2"
    )
    parser.add_argument("--seeds", type=int, default=0, help="instead of the scale's own number")
    parser.add_argument("--jobs", type=int, default=2, help="commands at a time (%(default)s)")
    parser.add_argument("--data", type=Path, default=Path("data"), metavar="DIR", help="(%(default)s)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="(runs/reproduce, or runs/<study>)")
    paper = parser.add_argument_group("the paper's scale")
    paper.add_argument("--world", type=int, default=8, help="GPUs to plan for (%(default)s)")
    paper.add_argument("--gpu", default="h100", help="of this kind (%(default)s): see plan.py")
    paper.add_argument("--submit", action="store_true", help="submit its runs to Slurm")
    paper.add_argument("--dry_run", action="store_true", help="with --submit: check everything, print the scripts")
    paper.add_argument("--profile", help="with --submit: a site's resources, as of submit_pipeline.py")
    paper.add_argument("words", nargs="*", metavar="slurm.key=value", help="with --submit: resources over the profile")
    return parser.parse_args()


if __name__ == "__main__":
    from hive_scale.__main__ import check_environment

    sys.exit(check_environment() or main())
