"""Pre-train HIVE on Slurm: one job per stage, each waiting for the one before.

Submit again at any time: finished stages are skipped, queued and running ones kept, failed ones submitted again.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from hive_scale.cli import Parser
from hive_scale.exit_codes import ended

if TYPE_CHECKING:
    from hive_scale.config import Config
    from hive_scale.slurm.chain import Record

EXAMPLES = """\
examples:
  python slurm/submit_pipeline.py --preset paper_siglip --profile one_node
  python slurm/submit_pipeline.py --preset paper_siglip --profile preemptible --ds_config ds_configs/zero2.json \\
      slurm.account=vision slurm.stages.joint.nodes=4 slurm.stages.joint.hours=12
  python slurm/submit_pipeline.py --preset debug --dry_run        the scripts, without a Slurm in reach
  python slurm/submit_pipeline.py --preset debug --cluster local  the same chain as processes of this machine
  python slurm/submit_pipeline.py --preset paper_siglip --then probe,vlm,evaluate after.probe='--set pets,food101'
  python slurm/submit_pipeline.py status runs/debug --follow      also: logs, cancel, resume

--then adds jobs that wait for the last stage: launchers/probe.py on its encoder, launchers/finetune_vlm.py, which
leaves its run in <output>/vlm, and launchers/evaluate.py on that, or without it on the run itself. Options of theirs
are given as after.NAME='OPTIONS'; else they are the paper's sets, recipe and tasks.

Exit codes: 0 submitted (or, off Slurm, done), 1 a stage failed, 2 something to change in command, config or data,
75 try again: stopped by a signal and saved, a process was lost, or Slurm does not answer, 76 stopped by a file STOP.
"""


def main() -> int:
    words = sys.argv[1:]
    commands = {"status": follow, "logs": logs, "cancel": cancel, "resume": resume}
    if words and words[0] in commands:
        return ended(lambda: commands[words[0]](words[1:]))
    if words and (near := get_close_matches(words[0], commands, n=1, cutoff=0.7)):
        return ended(lambda: _refuse(f"there is no '{words[0]}': did you mean {near[0]}?"))
    arguments = _parser().parse_args(words)
    return ended(lambda: _submit(arguments))


def _refuse(message: str) -> int:
    raise ValueError(message)


def _submit(arguments: argparse.Namespace) -> int:
    from hive_scale.cli import check_new_run, named_run
    from hive_scale.slurm import chain, downstream, resources, submission

    plain, slurm_words = resources.split(arguments.overrides)
    plain, then_words = downstream.split(plain)
    config = named_run(arguments, plain)
    before = chain.Record.read(config.run_dir) or chain.Record()
    check_new_run(config)
    followers = downstream.read(arguments.then, then_words, config) or before.followers()
    bases = dict.fromkeys([*config.stages, *followers], resources.Resources())
    asked = resources.read(arguments.profile, slurm_words, bases)
    return submission.submit(config, asked, arguments.cluster, followers, arguments.dry_run)


# -- a run that was submitted ---------------------------------------------------------------------------------


def follow(words: list[str]) -> int:
    from hive_scale.slurm import status

    parser = _sub_parser("status", "How the stages of a run stand.")
    parser.add_argument("--follow", action="store_true", help="until no job is left")
    arguments = parser.parse_args(words)
    return status.show(_read(arguments.run)[0], arguments.follow)


def logs(words: list[str]) -> int:
    parser = _sub_parser("logs", "What a stage's first process has printed.")
    parser.add_argument("stage", nargs="?", help="default: the last that has begun")
    parser.add_argument("--follow", action="store_true", help="as it grows")
    arguments = parser.parse_args(words)
    config, record = _read(arguments.run)
    known = [*config.stages, *record.then]
    if arguments.stage and arguments.stage not in known:
        raise ValueError(f"there is no stage '{arguments.stage}': there are {', '.join(known)}")
    wanted = [arguments.stage] if arguments.stage else known
    folder = config.run_dir / "slurm" / "logs"
    files = [folder / f"{record.jobs[stage]}_0_log.out" for stage in wanted if stage in record.jobs]
    files = [file for file in files if file.exists()]
    if not files:
        raise ValueError(f"{' '.join(wanted)}: nothing has begun: see status")
    sys.stdout.flush()
    os.execvp("tail", ["tail", "-n", "50", *(["-F"] if arguments.follow else []), str(files[-1])])


def cancel(words: list[str]) -> int:
    from hive_scale.slurm import chain, slurm_cli

    arguments = _sub_parser("cancel", "Cancel all jobs of a run, the last first; what runs saves.").parse_args(words)
    config, _ = _read(arguments.run)
    with chain.submitting(config.run_dir):
        jobs = [job for job in chain.known_jobs(config).values() if job.is_active or job.state == "PENDING"]
        slurm_cli.cancel([job.id for job in reversed(jobs)])
    print(f"cancelled: {', '.join(job.id for job in jobs) or 'nothing was queued or running'}")
    return 0


def resume(words: list[str]) -> int:
    from hive_scale.slurm import resources, submission

    parser = _sub_parser("resume", "Submit what is left of a run, as it was submitted or with other resources.")
    parser.add_argument("overrides", nargs="*", metavar="slurm.key=value")
    arguments = parser.parse_args(words)
    config, record = _read(arguments.run)
    plain, slurm_words = resources.split(arguments.overrides)
    if plain:
        raise ValueError(f"{plain[0]}: resume takes slurm.* words only: for another config, submit it")
    before = {stage: resources.Resources(**asked) for stage, asked in record.resources.items()}
    asked = resources.read(None, slurm_words, before)
    return submission.submit(config, asked, record.cluster, record.followers())


def _read(run: Path) -> tuple[Config, Record]:
    """Return (config, record) of the run as submitted; changes to the directory that its relative paths refer to."""
    from hive_scale import config as configs
    from hive_scale import credentials
    from hive_scale.slurm.chain import Record

    record = Record.read(run)
    if record is None:
        raise ValueError(f"{run} was not submitted from here: there is no {Record.path(run)}")
    config = replace(configs.load(run / "slurm" / "config.yaml"), output=str(run.absolute()))
    credentials.recall(run)
    os.chdir(record.cwd)
    return config, record


def _sub_parser(name: str, description: str) -> Parser:
    parser = Parser(f"submit_pipeline.py {name}", description=description)
    parser.add_argument("run", type=Path, help="the run's directory, such as runs/debug")
    return parser


def _parser() -> Parser:
    from hive_scale.cli import add_run_arguments

    parser = Parser(description=__doc__, epilog=EXAMPLES)
    add_run_arguments(parser, "any key of the config, slurm.KEY, or after.NAME")
    parser.add_argument("--then", default="", metavar="A,B", help="after the last stage: probe, vlm, evaluate")
    parser.add_argument("--profile", help="a site's resources: a name in slurm/profiles, or a YAML file")
    parser.add_argument(
        "--cluster", choices=("slurm", "local", "debug"), default="slurm", help="debug: in this process"
    )
    parser.add_argument("--dry_run", action="store_true", help="check everything, print the scripts, submit nothing")
    return parser
