"""Ask a model a benchmark's questions, and score its answers as the benchmark's own scorer does."""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hive_scale import strict_json
from hive_scale.cli import Parser
from hive_scale.exit_codes import ended
from hive_scale.strangers import printable

if TYPE_CHECKING:
    from hive_scale.distributed import World
    from hive_scale.evaluate.vqa_runner import Answerer
    from hive_scale.evaluate.vqa_types import Question, Task

EXAMPLES = """\
examples:
  python launchers/evaluate.py runs/vlm --tasks mme,gqa,okvqa,scienceqa        a run of finetune_vlm.py
  python launchers/evaluate.py models/llava-1.5-7b-hf --tasks mme              any stock LLaVA directory
  torchrun --nproc_per_node 8 launchers/evaluate.py runs/vlm --tasks gqa       on 8 GPUs
  python launchers/evaluate.py --tasks gqa --score predictions.jsonl           again, without a model
  python launchers/evaluate.py models/llava --tasks gqa --backend lmms_eval    by lmms-eval, if it is installed

Files are read from --data/<task>, in the layout of the hub's lmms-lab sets or of the official release. The same
command again goes on where it stopped. Exit codes: 0 done, 2 something to change.
"""
PARTS = ("vision", "language", "connector")  # fields of ModelConfig that say where weights come from
# lmms-eval's names of our tasks; its other tasks go by its own names
LMMS_TASKS = {"mme": "mme", "gqa": "gqa", "okvqa": "ok_vqa_val2014", "scienceqa": "scienceqa,scienceqa_img"}
LMMS_RESULTS = "*_results.json"


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parse(argv)
    if arguments.backend == "lmms_eval":
        return ended(lambda: _lmms_eval(arguments))
    return ended(lambda: _score(arguments) if arguments.score else _evaluate(arguments))


def check(argv: Sequence[str]) -> None:
    """Raise ValueError now for mistakes in the command `argv`, though its model does not exist yet."""
    _questions(_parse(argv))


def _score(arguments: argparse.Namespace) -> int:
    from hive_scale.evaluate.vqa_runner import read_predictions, result

    if not arguments.score.is_file():
        raise ValueError(f"--score {arguments.score}: no such file")
    asked = _questions(arguments)
    if len(asked) != 1:
        raise ValueError(f"--score {arguments.score}: predictions are of one task: name that one with --tasks")
    [(task, questions)] = asked
    _show({task.name: result(task, questions, read_predictions(arguments.score))})
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    from hive_scale.locate import check_there

    if arguments.model is None:
        raise ValueError("name the model: a run, or a LLaVA directory")
    asked, results = _questions(arguments), {}
    check_there(arguments.model)
    # imported now, since torch takes long, and mistakes are answered before that
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    from hive_scale.distributed import session
    from hive_scale.evaluate.vqa_runner import answer_all, read_predictions, result
    from hive_scale.resilience.run_lock import locked
    from hive_scale.resilience.watchdog import watching

    with session() as world, watching(world):
        output, answerer, identity = _open(arguments, world)
        columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
        # two evaluations at once would take away each other's half-written answers
        with locked(output, world) as lock, Progress(*columns, disable=not world.is_main) as bar:
            _claim(output / "model.json", identity, world)
            lock.stay()
            for task, questions in asked:
                folder = output / task.name
                shown = bar.add_task(task.name, total=len(questions))
                limit = arguments.max_tokens or task.max_tokens
                advance = partial(bar.advance, shown)
                answer_all(questions, answerer, limit, folder, world, arguments.batch, advance)
                results[task.name] = result(task, questions, read_predictions(folder))
                if world.is_main:  # saved after each task, since the next may fail
                    _save(output / "results.json", results)
        if world.is_main:
            _show(results)
            print(f"answers  {output}/<task>/predictions.jsonl\nscores   {output}/results.json")
    return 0


def _questions(arguments: argparse.Namespace) -> list[tuple[Task, list[Question]]]:
    limit, asked = arguments.limit, [(task, task.read(arguments.data / task.name)) for task in _tasks(arguments.tasks)]
    for name in ("batch", "limit", "max_tokens"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            raise ValueError(f"--{name} {value} must be at least 1")
    return [(task, questions if limit is None else task.first(questions, limit)) for task, questions in asked]


def _open(arguments: argparse.Namespace, world: World) -> tuple[Path, Answerer, dict[str, str]]:
    """(output directory, answerer, everything besides the questions that its answers depend on)."""
    from hive_scale.device import choose_precision
    from hive_scale.evaluate.vqa_runner import HiveAnswerer, LlavaAnswerer
    from hive_scale.model.identity import key_of
    from hive_scale.model.llava import StockLlava
    from hive_scale.precision import DTYPES
    from hive_scale.run import open_hive

    path: Path = arguments.model
    precision, told = choose_precision(world.device, arguments.precision)
    if world.is_main:
        print(told)
    dtype = DTYPES[precision]
    answerer: Answerer
    built: dict[str, Any] = {}  # settings that join the parts, which neither weights nor configs of the parts contain
    if (path / "config.json").is_file():
        answerer = LlavaAnswerer(StockLlava(path, world.device, dtype))
    else:
        config, stage, model = open_hive(path)
        answerer = HiveAnswerer(model, config.data_of(stage), world.device, dtype)
        built = {name: value for name, value in asdict(config.model).items() if name not in PARTS}
        path = path / stage if (path / "config.yaml").is_file() else path
    output = arguments.output or path / "evaluation"
    return output, answerer, answerer.identity | {"fusion": key_of(built)}


def _claim(path: Path, identity: dict[str, str], world: World) -> None:
    """Raise ValueError if the directory holds answers of another model, or of other settings."""
    from hive_scale.evaluate.readers import write_json

    if world.is_main and not path.exists():
        write_json(path, identity)
    world.barrier()
    before = _object_in(path)
    others = [what for what in identity if before.get(what) != identity[what]]
    if others:
        raise ValueError(f"{path.parent} holds answers of other {', '.join(others)}: give --output DIR, or delete it")


def _save(path: Path, results: dict[str, Any]) -> None:
    """Merge `results` with those of other tasks."""
    from hive_scale.evaluate.readers import write_json

    # a damaged file may be replaced: its answers still exist
    write_json(path, _object_in(path) | results)


def _object_in(path: Path) -> dict[str, Any]:
    """The object in the JSON file `path`; {} if the file is missing, damaged, or not an object."""
    found: Any = None
    with suppress(OSError, ValueError):
        found = strict_json.read(path)
    return found if isinstance(found, dict) else {}


def _show(results: dict[str, Any]) -> None:
    from rich.table import Table

    from hive_scale.observability.console import console

    table = Table("task", "score", "", "questions", "missing", "cut")
    for name, one in results.items():
        counts = [str(one[key]) for key in ("questions", "missing", "cut")]
        for place, (what, value) in enumerate(one["scores"].items()):
            table.add_row(*((name, what, f"{value:.2f}", *counts) if place == 0 else ("", what, f"{value:.2f}")))
    console.print(table)
    for name, one in results.items():
        if broken := one.get("broken"):
            id, reason = next(iter(broken.items()))
            such = printable(f"{id}: {reason}")
            print(f"{name}: {len(broken)} questions have a broken image and no answer, such as {such}")


def _tasks(names: str) -> list[Task]:
    from hive_scale.evaluate.tasks import find_task

    return [find_task(name) for name in names.split(",")]


def _lmms_eval(arguments: argparse.Namespace) -> int:
    """Run lmms-eval on the model; it downloads the sets itself. Returns its exit code, or 1 if it left no results."""
    if missing := [name for name in ("lmms_eval", "decord") if find_spec(name) is None]:
        raise ValueError(
            f"{missing[0]} is not installed: pip install lmms-eval decord 'filelock<3.24', or leave --backend out"
        )
    model: Path = arguments.model
    if model is None or not (model / "config.json").is_file():
        raise ValueError(f"lmms-eval reads LLaVA directories: export {model} first (launchers/export.py llava)")
    if {",", "="} & set(str(model)):
        raise ValueError(f"lmms-eval cuts its arguments at commas and equals signs: give {model} another name")
    from hive_scale.device import kind

    device = kind()
    tasks = ",".join(LMMS_TASKS.get(name, name) for name in arguments.tasks.split(","))
    output = arguments.output or model / "evaluation" / "lmms_eval"
    before = set(output.rglob(LMMS_RESULTS))
    command = [sys.executable, "-m", "lmms_eval", "--model", "llava_hf", "--tasks", tasks, "--batch_size", "1"]
    command += ["--model_args", f"pretrained={model},device_map={device}", "--device", device]
    # at other levels lmms-eval prints errors but exits with 0
    command += ["--verbosity", "DEBUG", "--output_path", str(output), "--log_samples"]
    command += ["--limit", str(arguments.limit)] if arguments.limit else []
    code = subprocess.run([*command, *shlex.split(arguments.lmms_args)], check=False).returncode
    if code == 0 and not set(output.rglob(LMMS_RESULTS)) - before:
        print("error: lmms-eval ended without results: its words above say why", file=sys.stderr)
        return 1
    return code


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, epilog=EXAMPLES)
    parser.add_argument("model", type=Path, nargs="?", help="a run, one of its stages, or a LLaVA directory")
    parser.add_argument("--tasks", required=True, metavar="A,B", help="mme, gqa, okvqa, scienceqa, easyvqa")
    parser.add_argument("--data", type=Path, default=Path("data"), metavar="DIR", help="holds DIR/<task> (%(default)s)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="for answers and scores (<model>/evaluation)")
    parser.add_argument("--batch", type=int, default=32, help="questions at a time (%(default)s)")
    parser.add_argument("--max_tokens", type=int, help="of an answer, instead of the task's own limit")
    parser.add_argument("--limit", type=int, metavar="N", help="ask the first N questions only (MME's by pairs)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="of compute (bf16 on GPUs that have it)")
    parser.add_argument("--score", type=Path, metavar="FILE", help="score these predictions instead of asking")
    parser.add_argument("--lmms_args", default="", metavar="'...'", help="more arguments for lmms-eval")
    parser.add_argument("--backend", choices=("own", "lmms_eval"), default="own", help="who asks and scores")
    return parser.parse_args(argv)
